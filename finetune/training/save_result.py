"""Saves the trained adapter or model."""

from __future__ import annotations

from collections.abc import Mapping

from backends import libraries, registry
from backends.interface import FloatArray, Session
from finetune.disk.adapter_check import in_words, loadings
from finetune.disk.adapter_writer import write_adapter
from finetune.disk.atomic import new_folder
from finetune.disk.base_model import base_model, fingerprint
from finetune.disk.model_writer import write_tokenizer
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import write_model
from finetune.events import result_of
from finetune.recipe.specs import lora_spec, model_spec
from finetune.training.job import Job


def save_trained(job: Job, run: RunFolder, tensors: Mapping[str, FloatArray], session: Session, step: int) -> None:
    """The folder, whole or absent, with the tokenizer and template that it was trained with."""
    base = job.recipe.model.path if not job.recipe.model.path.startswith("builtin:") else str(job.folder.path)
    facts = {
        "base_fingerprint": fingerprint(result_of(base_model(job.folder))),
        "scheme": session.scheme,
        "step": step,
        "template": job.prepared.template,
        "prompt": job.recipe.prompt.model_dump(mode="json"),
        **({"labels": list(job.prepared.labels)} if job.recipe.head else {}),
    }
    if job.recipe.method == "full":
        with new_folder(run.model) as folder:
            write_model(folder, job.folder, tensors, facts)
            write_tokenizer(folder, job.folder, job.tokenizer, job.tokenizer.chat_template)
            (folder / "README.md").write_text(_how_to_load_whole(job, base), encoding="utf-8")
        return
    with new_folder(run.adapter) as folder:
        write_adapter(folder, tensors, lora_spec(job.recipe), base, job.folder.blocks, facts, job.folder)
        job.tokenizer.save_pretrained(folder)
        limits = "".join(f"- {line}\n" for line in in_words(loadings(folder, job.folder)))
        (folder / "README.md").write_text(_how_to_load(job, session, base) + f"\n{limits}", encoding="utf-8")


_HEAD = (
    "The head reads the state of the last token, so give it the prompt as training wrote it (in adapter_config.json, "
    "`finetune.prompt`), one row at a time; for several rows set `base.config.pad_token_id`.\n\n"
)


def _how_to_load_whole(job: Job, base: str) -> str:
    lines = "".join(f"```python\n{one}```\n\n" for one in libraries.whole_lines(job.folder))
    return (
        f"# Model trained from {base}\n\nEvery weight was trained, in float32. This loads it, run in this folder:\n\n"
        f"{lines}`finetune export` writes it in other types and for other programs. How training wrote its "
        "prompt is in finetune.json.\n"
    )


def _how_to_load(job: Job, session: Session, base: str) -> str:
    """The adapter's README: how to load what was measured, and what differs where it is loaded otherwise."""
    half = registry.describe(job.backend, job.recipe.device)["half"]
    spec = model_spec(job.recipe, job.folder)
    labels = job.prepared.labels if job.recipe.head else ()
    lines = libraries.loading_lines(job.backend, spec, base, ".", session.device, half, labels)
    if lines is None:
        return f"# Adapter for {base}\n\nMade by the backend {job.backend}.\n"
    return (
        f"# Adapter for {base}\n\nThe report's figures are of these base weights: {session.scheme}. "
        f"Run in this folder, this loads the same ({job.backend}, {session.device}):\n\n```python\n{lines}```\n\n"
        f"{_HEAD if labels else ''}"
        "Another library, another type of number or other quantisation of the base gives other figures, usually by "
        "little: measure again before you rely on them.\n"
    )
