"""`generate` and `chat`: ask a run's model, with the very prompt it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from backends import registry
from backends.interface import Session, TrainState
from finetune.data.renderers import question_tokens
from finetune.data.tokenizer import answer_text, stop_tokens
from finetune.disk.adapter import check_base, read_adapter
from finetune.disk.identity import clock_of
from finetune.disk.run_folder import RunFolder
from finetune.recipe.schema import Recipe
from finetune.training.job import set_up


class Speaker:
    """A run's model, its tokenizer, and the way its prompts are written."""

    def __init__(self, run: RunFolder, recipe: Recipe, base: bool, backend: str | None) -> None:
        self.recipe, self.clock = recipe, clock_of(run.path)
        adapter = read_adapter(run.adapter)
        setup = set_up(recipe, run.path)
        check_base(run.adapter, setup.folder)
        self.tokenizer, self.stop = setup.tokenizer, stop_tokens(setup.tokenizer)
        self.session: Session = setup.session(registry.choose(backend or recipe.backend))
        if not base:
            self.session.set_state(TrainState(0, adapter.tensors, {}))

    def question(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation that ends with the user, as the run has written its prompts."""
        return question_tokens(self.recipe, self.tokenizer, messages, self.clock)

    def answer(self, prompt: list[int], max_tokens: int, temperature: float, seed: int) -> str:
        written = self.session.generate([prompt], max_tokens, self.stop, temperature, seed)[0]
        return answer_text(self.tokenizer, written, self.stop)


def run(
    opened: RunFolder,
    recipe: Recipe,
    prompt: str | None,
    base: bool,
    temperature: float,
    max_tokens: int,
    backend: str | None,
) -> None:
    """Answer `prompt`, or talk where it is None."""
    if prompt is None:
        _talk(opened, recipe, base, temperature, max_tokens, backend)
    else:
        _answer(opened, recipe, prompt, base, temperature, max_tokens, backend)


def _answer(
    opened: RunFolder, recipe: Recipe, prompt: str, base: bool, temperature: float, max_tokens: int, backend: str | None
) -> None:
    speaker = Speaker(opened, recipe, base, backend)
    tokens = speaker.question([{"role": "user", "content": prompt}])
    print(speaker.answer(tokens, max_tokens, temperature, speaker.recipe.seed))


def _talk(
    opened: RunFolder, recipe: Recipe, base: bool, temperature: float, max_tokens: int, backend: str | None
) -> None:
    """Several turns where the recipe trains conversations; otherwise each line is a question of its own."""
    speaker = Speaker(opened, recipe, base, backend)
    console, turns = Console(), 0
    messages: list[dict[str, str]] = []
    console.print(f"{opened.path.name}: {'base' if base else 'tuned'} model. An empty line ends.", markup=False)
    while text := _ask(console):
        messages.append({"role": "user", "content": text})
        tokens = speaker.question(messages)
        answer = speaker.answer(tokens, max_tokens, temperature, speaker.recipe.seed + turns)
        turns += 1
        messages.append({"role": "assistant", "content": answer})
        if not _keeps_turns(speaker.recipe):
            messages.clear()
        console.print(answer, markup=False)


def _keeps_turns(recipe: Recipe) -> bool:
    return recipe.data.format in ("chat", "sharegpt") or recipe.prompt.template == "chat"


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
