"""`--to ollama`: a GGUF file and the Modelfile that makes an Ollama model of it."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.data.chat_template import ChatRenderer
from finetune.data.conversation import Conversation
from finetune.data.rows import Message
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import begin_tokens
from finetune.export.gguf_export import MODEL, GgufFile
from finetune.export.go_template import GoTemplate, go_template
from finetune.export.making import Making
from finetune.export.prompt import asked_rows
from finetune.export.verify import Check
from finetune.text import command_line
from finetune.training.job import Job

_CONTEXT = 4096  # positions, at least: Ollama's own default cuts long prompts
_READS_JINJA = "0.30.0"  # from this version on Ollama renders the file's own chat template with llama.cpp


class OllamaFolder(GgufFile):
    """A GGUF file as `GgufFile` writes and verifies it, beside a Modelfile."""

    def write(self, to: Path, making: Making) -> list[Check]:
        template = _template(making)
        (to / "Modelfile").write_text(modelfile(making, template), encoding="utf-8")
        said = "says the same for Ollama" if template else f"left to Ollama {_READS_JINJA} and newer"
        return [*super().write(to, making), Check("Modelfile", "its TEMPLATE", said, "yes")]

    def commands(self, path: Path) -> list[str]:
        named = path.resolve().parent.parent if path.parent.name == "exports" else path
        model = re.sub(r"[^a-z0-9_-]+", "-", named.name.lower()).strip("-")[-80:] or "model"  # Ollama takes no others
        made = command_line("ollama", "create", model, "-f", str(path / "Modelfile"))
        return [made, command_line("ollama", "run", model)]


def _template(making: Making) -> GoTemplate | None:
    job, template = making.job, making.travels.template
    assert job.prepared.renderer is not None
    rows = list(asked_rows(job.prepared.renderer, job.prepared.format, job.prepared.held_out.records, making.always))
    if any(tools for _, _, tools, _ in rows):
        return None

    def write(messages: list[Message]) -> str:
        return render(job.tokenizer, Conversation(messages, [(len(messages), True)]), template=template)[0]

    begin = job.tokenizer.decode(begin_tokens(job.tokenizer))
    return go_template(write, begin, (messages for _, messages, _, _ in rows))  # type: ignore[arg-type]


def modelfile(making: Making, template: GoTemplate | None) -> str:
    """Its text: the file, how its prompt is written, and what answers need."""
    job = making.job
    lines = [f"FROM ./{MODEL}"]
    lines.append(f'TEMPLATE """{template.text}"""' if template else f"REQUIRES {_READS_JINJA}")
    lines.append(f"PARAMETER num_ctx {_context(job)}")
    if job.prepared.format not in ("chat", "sharegpt"):
        lines.append("PARAMETER temperature 0")
    renderer = job.prepared.renderer
    if isinstance(renderer, ChatRenderer) and renderer.template is not None:  # no special token ends the user's turn
        lines.append('PARAMETER stop "\\nUser:"')
    return "\n".join(lines) + "\n"


def _context(job: Job) -> int:
    longest = max((len(one) for split in job.prepared.splits for one in split.examples), default=0)
    wanted = max(_CONTEXT, longest + job.recipe.evaluate.max_tokens)
    known = job.folder.text_config.get("max_position_embeddings")
    return min(wanted, known) if isinstance(known, int) else wanted
