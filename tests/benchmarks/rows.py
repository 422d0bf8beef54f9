"""CPU seconds of `finetune check`, and of check and preparation as `train` needs both, over 100,000 rows of chat.

    python tests/benchmarks/rows.py                                  # this checkout alone
    python tests/benchmarks/rows.py --against 86e72af                # beside a commit, taking turns
    python tests/benchmarks/rows.py --checkout DIR --against DIR     # any two checkouts
    python tests/benchmarks/rows.py --rows 10000 --rounds 5          # quicker: the work grows with the rows

Rows, tokenizer and model are made here from a seed. Every figure is of a process of its own, user and system time with
that of its children (chat templates are rendered in one), so other work on the machine hardly matters to it; wall time
is told beside it. In each round:

- `check`: `python -m finetune check recipe.yaml --json found.json`, from its start to its end;
- `prepare`: the rows made ready for training and nothing more, by `rows_worker.py`, less its start;
- `both`: their sum, which is what `train` spends on rows where it prepares and then checks, each with its own walk over
  them. Where `check` is known to hold the one preparation, `--one-walk` makes `both` the same as `check`;
- `start`: `check` of two dozen rows, which is what the libraries cost.

With `--against`, the last lines are medians of each round's ratios: `check` and `both` of this checkout over `both` of
the other. The goal of a single walk over the rows: `check` at most 0.6 of `both` at 86e72af. It is also said whether
both found the same in the rows. One row in a hundred is an exact copy of an earlier one, one a near copy, and one has
an address or a number that looks personal.

What was promised of `check` before stands: 60 seconds and 1 GB for 100,000 rows on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # as a script it is in neither

from machine import machine  # noqa: E402

from tests.assets.make_old_run import check_out  # noqa: E402

FEW = 24  # rows of the run that is all start
VOCABULARY = 4096
SYSTEM = "You are a patient assistant. Answer briefly, and say so where you do not know."
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]


def chat_rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of one or two exchanges in words that nobody knows, frequent ones far more often than rare ones."""
    draw = random.Random(seed)
    words = list(dict.fromkeys("".join(draw.choices(_SYLLABLES, k=draw.choice((1, 2, 2, 3, 4)))) for _ in range(6000)))
    earlier: dict[str, Any] = {}
    for number in range(count):
        if number % 100 == 50:
            yield earlier
        elif number % 100 == 75:
            *rest, last = earlier["messages"]
            yield {"messages": [*rest, last | {"content": last["content"] + " indeed"}]}
        else:
            system = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.25 else []
            roles = ("user", "assistant") * (1 if draw.random() < 0.8 else 2)
            told = [_said(role, words, draw) for role in roles]
            if number % 100 == 25:
                told[0]["content"] += (
                    f" Write to {words[number % 50]}.{number}@example.org, or call +44 20 7946 {number:04}."
                )
            earlier = {"messages": system + told}
            yield earlier


def _said(role: str, words: Sequence[str], draw: random.Random) -> dict[str, str]:
    """Sentences: with capitals, points, and here and there a number."""
    left, sentences = draw.randint(5, 30) if role == "user" else draw.randint(10, 70), []
    while left > 0:
        size = min(left, draw.randint(4, 14))
        left -= size
        said = [words[int(len(words) ** draw.random()) - 1] for _ in range(size)]
        if draw.random() < 0.1:
            said.append(str(draw.randint(1, 3000)))
        sentences.append(" ".join(said).capitalize() + draw.choice(".....?!"))
    return {"role": role, "content": " ".join(sentences)}


def write_job(folder: Path, count: int) -> None:
    """model/ with a tokenizer that was trained on some of the rows, all rows, a few rows, and a recipe for each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_models import CHAT, tiny_llama

    texts: list[str] = []
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as every, (folder / "few.jsonl").open("w") as few:
        for number, row in enumerate(chat_rows(count)):
            line = json.dumps(row) + "\n"
            every.write(line)
            if number < FEW:
                few.write(line)
            if number < 2000:
                texts += [message["content"] for message in row["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    whole.chat_template = CHAT
    whole.save_pretrained(folder / "model")
    tiny_llama(folder / "model", vocab_size=VOCABULARY)
    for name in ("chat", "few"):
        recipe = f"model: {{path: model}}\ndata: {{train: {name}.jsonl}}\nbackend: reference\n"
        (folder / f"{name}.yaml").write_text(recipe)


@dataclass(frozen=True)
class Spent:
    cpu: float  # seconds of the process and of the children it waited for
    wall: float
    peak: float  # bytes of the largest of them


def spent(code: Path, folder: Path, *arguments: str) -> Spent:
    """What one Python process with the code of a checkout takes. Ends the program where that fails."""
    environment = os.environ | {
        "PYTHONPATH": str(code),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",  # idle threads of the tokenizer spin, and more so on a busy machine
    }
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            told = output.read().decode(errors="replace")[-4000:]
            raise SystemExit(f"{code}: {' '.join(arguments)}: exit {process.returncode}\n{told}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Spent(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * unit)


@dataclass
class Tree:
    """One checkout, and what was measured of it, a value a round."""

    name: str
    code: Path
    one_walk: bool
    check: list[float]
    both: list[float]

    def round(self, folder: Path) -> dict[str, Any]:
        """Measures once, says so, and returns what `check` found."""
        found = folder / "found.json"
        start = spent(self.code, folder, "-m", "finetune", "check", "few.yaml")
        check = spent(self.code, folder, "-m", "finetune", "check", "chat.yaml", "--json", str(found))
        told = f"{self.name}: start {start.cpu:.1f} s; check {check.cpu:.1f} CPU s, {check.wall:.1f} s, "
        told += f"peak {check.peak / 1e6:,.0f} MB"
        both = check.cpu
        if not self.one_walk:
            worker = str(Path(__file__).with_name("rows_worker.py"))
            prepare = (
                spent(self.code, folder, worker, "chat.yaml").cpu - spent(self.code, folder, worker, "few.yaml").cpu
            )
            both += prepare
            told += f"; prepare {prepare:.1f} CPU s; both {both:.1f} CPU s"
        print(told, flush=True)
        self.check.append(check.cpu)
        self.both.append(both)
        values: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        return values


def code_of(asked: str, temporary: Path) -> Path:
    """A checkout's folder; a commit is unpacked into one."""
    code = Path(asked).resolve()
    if not code.is_dir():
        code = temporary / "checkout"
        check_out(asked, code)
    command = [sys.executable, "-c", "import finetune; print(finetune.__file__)"]
    told = subprocess.run(command, cwd=temporary, env=os.environ | {"PYTHONPATH": str(code)}, capture_output=True)
    if not Path(told.stdout.decode().strip()).is_relative_to(code):
        raise SystemExit(f"{code}: there is no finetune to be imported")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", default=str(ROOT), help="a folder; this one where it is not said")
    parser.add_argument("--against", metavar="DIR_OR_COMMIT")
    parser.add_argument("--one-walk", action="store_true", help="`check` of --checkout holds its one preparation")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        trees = [Tree("this", code_of(chosen.checkout, folder), chosen.one_walk, [], [])]
        if chosen.against:
            trees.append(Tree("other", code_of(chosen.against, folder), False, [], []))
        write_job(folder, chosen.rows)
        size = (folder / "chat.jsonl").stat().st_size / 1e6
        print(f"{machine(1)}\n{chosen.rows:,} rows, {size:.0f} MB", flush=True)
        for number in range(chosen.rounds):
            order = trees if number % 2 == 0 else trees[::-1]
            found = {tree.name: tree.round(folder) for tree in order}
        if chosen.against:
            compare(trees[0], trees[1], found["this"], found["other"])


def compare(this: Tree, other: Tree, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    print(f"found in the rows: {', '.join(sorted(different)) + ' differ' if different else 'the same'}")
    for name, top, bottom in (
        ("check / check", this.check, other.check),
        ("both / both", this.both, other.both),
        ("check / both", this.check, other.both),
    ):
        ratios = [a / b for a, b in zip(top, bottom, strict=True)]
        told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name}: {told}, {len(ratios)} rounds")


if __name__ == "__main__":
    main()
