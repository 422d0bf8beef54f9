"""Every command, with a text in each of its inputs that would command a terminal, or begin a line of its own: it is
shown, and neither obeyed nor taken for what the command says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.command import Answer, Work
from tests.unit.test_console import OURS, obeyed

FORGED = "verdict: it got better"
ANSWER = "\x1b]0;pwned\x07[red]mark[/red][/nothing]"
ESC = f"{ANSWER}\n{FORGED}"
DIRECTION = f"\x9d0;pwned\x9c\u202e\n{FORGED}"
TERMINAL = """
import io, os
class Terminal(io.StringIO):
    def isatty(self):
        return True
io.StringIO = Terminal
os.environ.update(TERM="xterm-256color", COLUMNS="60", LINES="30")
"""
ANSWERS = f"""
from finetune.commands import chat
chat.Speaker.answer = lambda *arguments: {ANSWER!r}
"""
PIPE = "import os; os.environ['NO_COLOR'] = '1'\n"
BYPASS = "import finetune.text, finetune.streams; finetune.streams.harmless = finetune.text.harmless = str\n"
DATA = "data: {train: train.jsonl, max_dropped: 0.9}\n"
RUN = "prompt: {template: chat}\ntrain: {steps: 2, batch_size: 8, max_length: 512}\nlora: {rank: 2}\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    folder = tmp_path_factory.mktemp("poison")
    work = Work(folder / "work", _poisoned(model_with_tokenizer(folder / "model")))
    texts = [f"a {'good' if i % 2 else 'bad'} film {i} [red]mark[/red][/nothing] \u202e" for i in range(40)]
    work.lines("train.jsonl", [
        {"text": text, "label": ("positive" if i % 2 else "negative") + DIRECTION, f"id{ESC}": i}
        for i, text in enumerate(texts)
    ])  # fmt: skip
    twice = json.dumps(f"a{ESC}")
    (work.folder / "twice.json").write_text(f'[{{"text": "a", {twice}: 1, {twice}: 2}}]')
    work.lines("one.jsonl", [{"text": f"a film {i}", "label": DIRECTION} for i in range(9)])
    work.recipe(DATA + RUN)
    for name, text in MISTAKES.items():
        work.recipe(text, f"{name}.yaml")
    return work


def _poisoned(folder: Path) -> Path:
    """A special token of its tokenizer, and its chat template, are poisoned."""
    for file in (*folder.glob("tokenizer*.json"), *folder.glob("special*.json"), *folder.glob("*.jinja")):
        written = f"<e{ESC}>" if file.suffix == ".jinja" else json.dumps(f"<e{ESC}>")[1:-1]
        file.write_text(file.read_text(encoding="utf-8").replace("<|im_end|>", written), encoding="utf-8")
    return folder


KEY = json.dumps(ESC)
MISTAKES = {
    "key": DATA + f"{KEY}: 1\n",
    "value": DATA + f"train: {{steps: {KEY}}}\n",
    "source": f"data: {{train: {json.dumps(f'no{ESC}.csv')}}}\n",
    "column": f"data: {{train: train.jsonl, columns: {{text: {KEY}}}}}\n",
    "placeholder": DATA + f"prompt: {{template: {json.dumps(f'{{te{ESC}}}')}}}\n",
    "target": DATA + RUN.replace("rank: 2", f"rank: 2, targets: [{KEY}]"),
    "model": "",
}
BEGIN = [
    ["init", "train.jsonl", "--output", "new{}.yaml", "--model", "model"],
    ["init", "twice.json", "--output", "other.yaml"], ["check", "one.jsonl"], ["check", "recipe.yaml"],
    ["plan", "recipe.yaml"], ["train", "recipe.yaml"],
    *(["plan", f"{name}.yaml"] for name in MISTAKES), ["check", "target.yaml"], ["check", "column.yaml"],
    ["plan", f"no{ESC}.yaml"], ["plan", "recipe.yaml", f"--a{ESC}"], ["plan", "recipe.yaml", f"a{ESC}=1"],
    ["eval", f"no{ESC}"], ["resume", f"no{ESC}"],
]  # fmt: skip


def forged(shown: str) -> list[str]:
    """Lines that a value began: at the left, or in a cell of a table."""
    return [line for line in OURS.sub("", shown).splitlines() if line.removeprefix("│ ").startswith(FORGED)]


def _look(answers: list[Answer], commands: list[list[str]]) -> None:
    for answer, command in zip(answers, commands, strict=True):
        shown = answer.out + answer.err
        assert not obeyed(shown), (command, sorted(map(ascii, obeyed(shown))))
        assert "Traceback" not in shown, (command, shown)
        assert not forged(shown), (command, shown)
        assert answer.code in (0, 2, 3, 7, 8), (command, answer)


@pytest.mark.parametrize("surroundings", [TERMINAL, PIPE], ids=["terminal", "pipe"])
@pytest.mark.slow
def test_no_command_obeys_what_it_reads(work: Work, surroundings: str) -> None:
    number = str(len(work.runs()))
    (work.folder / "model.yaml").write_text(f"model: {{path: {json.dumps(f'no/x{ESC}')}}}\n{DATA}", encoding="utf-8")
    begin = [[word.format(number) if word == "new{}.yaml" else word for word in command] for command in BEGIN]
    answers = work.several(*begin, before=surroundings)
    _look(answers, begin)
    assert [answer.code for answer in answers][:6] == [0, 3, 3, 0, 0, 0], answers[:6]
    shown = re.sub(r"\n *", "", OURS.sub("", answers[4].out))
    assert r"<e\x1b]0;pwned" in shown  # the special token, shown with a row
    run = work.runs()[-1]
    asked = [["eval", str(run)], ["generate", str(run), f"a {ESC}"], ["chat", str(run)], ["resume", str(run)]]
    said = work.several(*asked, typed=f"a film {ESC}\n\n", before=surroundings + ANSWERS)
    _look(said, asked)
    assert [answer.code for answer in said] == [0, 0, 0, 0], said
    assert r"\x1b]0;pwned\x07" in said[1].out
    for name in ("report.txt", "check.txt"):
        page = (run / name).read_text(encoding="utf-8")
        assert not obeyed(page)
        assert not forged(page), page
        assert r"\u202e" in page


@pytest.mark.slow
def test_a_bypass_is_seen(work: Work) -> None:
    commands = [["plan", "key.yaml"], ["check", "one.jsonl"]]
    answers = work.several(*commands, before=BYPASS)
    with pytest.raises(AssertionError):
        _look(answers, commands)
