"""Run folders of an earlier version, kept in tests/assets/old_runs for tests/end_to_end/test_old_runs.py.

    python tests/assets/make_old_run.py [--commit 86e72af] [--case classification-reference ...] [--output FOLDER]

The code of that commit trains twice on a toy job, by its own command line: once to the end, and once until SIGTERM
after a checkpoint. Both run folders are written down as they stand, but for the folder's own path and for what no
command reads again: pictures, texts for people, and of the finished run all but the last checkpoint. The model and
the rows are not kept: they are made again from a seed, in plain numbers, without any library that could make others
one day.

A kept run is never made anew because a test of it fails: that is what it is for. Make a new one beside it when the
format of a run changes on purpose, and keep the old one for as long as such runs are to be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
OLD_RUNS = Path(__file__).parent / "old_runs"
FIRST = "86e72af"  # the last commit before the code was rearranged
WAS = "/where/it/was/made"  # stands in the kept files for the folder of the job
PROMPT = "a fine good film"
ANSWER_TOKENS = 6
PATIENCE = 300.0  # seconds


@dataclass(frozen=True)
class Case:
    """A job. The reference backend defines the arithmetic, and its bytes are to stay as they are.

    Another backend may learn to compute the same in another order, and is held to rounding. What 0.1.0 stopped with
    dropout goes on with other masks.
    """

    backend: str
    dropout: float
    micro_tokens: int

    @property
    def recipe(self) -> str:
        return (
            "model: {path: model}\n"
            "data: {train: train.jsonl, valid: valid.jsonl, test: test.jsonl}\n"
            f"lora: {{rank: 2, alpha: 4, dropout: {self.dropout}, targets: [q_proj, down_proj]}}\n"
            f"train: {{steps: {STEPS}, batch_size: 4, micro_tokens: {self.micro_tokens}, learning_rate: 1e-2, "
            "checkpoint_every: 3}\n"
            f"evaluate: {{every: 6, max_tokens: {ANSWER_TOKENS}}}\n"
            f"backend: {self.backend}\n"
        )


STEPS = 24
CASES = {
    "classification-reference": Case("reference", 0.1, 160),  # with the masks of 0.1.0
    "classification-plain": Case("reference", 0.0, 160),
    "chat-torch": Case("torch", 0.0, 400),
}

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 104  # the special tokens, then 96 characters; the rest stands for nothing
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def lay_out(name: str, folder: Path, seed: int = 0) -> None:
    """The toy job of a case: model/, the rows and recipe.yaml."""
    write_model(folder / "model", seed)
    make = _classification if name.startswith("classification") else _chat
    for file, first, count in (("train.jsonl", 0, 22), ("valid.jsonl", 50, 5), ("test.jsonl", 70, 5)):
        rows = [json.dumps(make(number)) + "\n" for number in range(first, first + count)]
        (folder / file).write_text("".join(rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(CASES[name].recipe, encoding="utf-8")


def _classification(number: int) -> dict[str, Any]:
    words = ("a fine good film", "a dull bad film")[number % 2]
    return {"text": f"{words} {number}", "label": ("positive", "negative")[number % 2]}


def _chat(number: int) -> dict[str, Any]:
    said = [("user", f"is film {number} good"), ("assistant", ("yes", "no")[number % 2])]
    if number % 3 == 0:
        said += [("user", "sure"), ("assistant", f"yes {number % 10}")]
    return {"messages": [{"role": role, "content": words} for role, words in said]}


def write_model(folder: Path, seed: int = 0) -> None:
    """A Llama of two blocks and 104 tokens with a tokenizer of single characters, the same bytes for ever."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _write_json(folder / "config.json", config)
    (folder / "model.safetensors").write_bytes(_tensor_file(dict(_weights(seed))))
    _write_json(folder / "tokenizer.json", _tokenizer())
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks},
    )
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")


def _weights(seed: int) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    # RandomState's stream is frozen for ever, and whole numbers pass through no function that rounds
    draw = np.random.RandomState(seed)

    def matrix(out: int, inputs: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        whole = draw.randint(-1024, 1025, (out, inputs)).astype(np.float32)
        return whole * np.float32(2 / 1024 / 2 ** round(np.log2(inputs) / 2))

    def norm() -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.float32(1) + draw.randint(-64, 65, 32).astype(np.float32) / np.float32(512)

    yield "model.embed_tokens.weight", matrix(VOCABULARY, 32)
    for block in range(2):
        here = f"model.layers.{block}"
        for part, out, inputs in (
            ("self_attn.q_proj", 32, 32),
            ("self_attn.k_proj", 16, 32),
            ("self_attn.v_proj", 16, 32),
            ("self_attn.o_proj", 32, 32),
            ("mlp.gate_proj", 48, 32),
            ("mlp.up_proj", 48, 32),
            ("mlp.down_proj", 32, 48),
        ):
            yield f"{here}.{part}.weight", matrix(out, inputs)
        yield f"{here}.input_layernorm.weight", norm()
        yield f"{here}.post_attention_layernorm.weight", norm()
    yield "model.norm.weight", norm()
    yield "lm_head.weight", matrix(VOCABULARY, 32)


def _tensor_file(tensors: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """A safetensors file, written here: a run knows its base by these very bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name in sorted(tensors):
        data = tensors[name].astype("<f4").tobytes()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _tokenizer() -> dict[str, Any]:
    """tokenizer.json: one token for each printable ASCII character and the line's end."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # as byte-level tokenizers write a space and a line's end
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **added} for number, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate([*SPECIAL, *characters])},
            "merges": [],
        },
    }


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def arithmetic() -> dict[str, str]:
    """How numpy rounds here in the kinds of sums that the reference backend is made of.

    Where that is as it was when a run was kept, a run on that backend must end with the same bytes.
    """
    draw = np.random.RandomState(0)
    x, w = (draw.randint(-1024, 1025, shape).astype(np.float32) / np.float32(700) for shape in ((60, 48), (48, 104)))
    parts = [x @ w[:, :32], x[:7, :32] @ w[:32], x.T @ x, x[:5] @ w, np.exp(x), np.log(np.abs(x) + 1), np.sqrt(x * x)]
    parts += [x.sum(-1), np.square(w).sum(), np.exp(x).sum(-1)]
    return {"numpy": np.__version__, "rounding": hashlib.sha256(b"".join(one.tobytes() for one in parts)).hexdigest()}


def make(name: str, commit: str, output: Path) -> None:
    """Writes output/name/{finished,stopped}, and facts.json beside them."""
    with tempfile.TemporaryDirectory() as temporary:
        code, job = Path(temporary).resolve() / "code", Path(temporary).resolve() / "job"
        check_out(commit, code)
        job.mkdir()
        lay_out(name, job)
        old = Old(code, job)
        old.run("train", "recipe.yaml")
        (finished,) = old.runs()
        answer = old.run("generate", str(finished), PROMPT, "--max-tokens", str(ANSWER_TOKENS)).stdout
        stopped = old.stopped_run()
        probe = "import json; from tests.assets.make_old_run import arithmetic; print(json.dumps(arithmetic()))"
        facts = {
            "commit": old.full_name(commit),
            "arithmetic": json.loads(old.python("-c", probe, path=ROOT).stdout),
            "prompt": PROMPT,
            "answer": answer,
        }
        shutil.rmtree(output / name, ignore_errors=True)
        keep(finished, output / name / "finished", job)
        keep(stopped, output / name / "stopped", job)
        _write_json(output / name / "facts.json", facts)
    size = sum(path.stat().st_size for path in (output / name).rglob("*") if path.is_file())
    print(f"{output / name}: {size / 1000:.0f} kB")


def check_out(commit: str, folder: Path) -> None:
    """The code of a commit, without its history."""
    folder.mkdir(parents=True)
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)


class Old:
    """The command line of the code in one folder, at work in another."""

    def __init__(self, code: Path, job: Path) -> None:
        self.code, self.job = code, job
        where = self.python("-c", "import finetune; print(finetune.__file__)").stdout
        assert Path(where.strip()).is_relative_to(code), f"{where.strip()} is not the code of that commit"

    def environment(self, path: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        return kept | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def python(self, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        given = {"cwd": self.job, "env": self.environment(path or self.code), "text": True, "timeout": PATIENCE}
        done = subprocess.run(command, capture_output=True, check=False, **given)
        if done.returncode:
            raise SystemExit(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "finetune", *arguments)

    def runs(self) -> list[Path]:
        return sorted((self.job / "runs").iterdir())

    def full_name(self, commit: str) -> str:
        told = subprocess.run(["git", "rev-parse", commit], cwd=ROOT, capture_output=True, text=True, check=True)
        return told.stdout.strip()

    def stopped_run(self) -> Path:
        """A run that SIGTERM ended in its middle. It stops where the signal finds it: some tries may be needed."""
        for _ in range(20):
            before = set(self.runs())
            command = [sys.executable, "-m", "finetune", "train", "recipe.yaml"]
            process = subprocess.Popen(
                command, cwd=self.job, env=self.environment(self.code), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            until = time.monotonic() + PATIENCE
            while process.poll() is None and time.monotonic() < until:
                if list((self.job / "runs").glob("*/checkpoints/step-*6")) != self._sixes(before):
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.001)
            process.communicate(timeout=PATIENCE)
            (run,) = set(self.runs()) - before
            if process.returncode == 143 and 6 <= last_step(run) <= STEPS - 4:
                return run
            shutil.rmtree(run)
        raise SystemExit("no try was stopped in its middle")

    def _sixes(self, runs: set[Path]) -> list[Path]:
        return [path for run in runs for path in run.glob("checkpoints/step-*6")]


def last_step(run: Path) -> int:
    """Of the newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def keep(run: Path, copy: Path, job: Path) -> None:
    """A copy of what is read again, which names neither the job's folder nor the machine's system."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.png", "*.txt"))
    if (copy / "report.json").exists():
        for path in (copy / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) < last_step(copy):
                shutil.rmtree(path)
    environment = json.loads((copy / "environment.json").read_text(encoding="utf-8"))
    _write_json(copy / "environment.json", environment | {"system": environment["system"].partition("-")[0]})
    for path in copy.rglob("*"):
        if path.is_file() and str(job).encode() in (data := path.read_bytes()):
            assert "checkpoints" not in path.parts, f"{path}: a checkpoint must not hold a path"
            path.write_bytes(data.replace(str(job).encode(), WAS.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=FIRST)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=OLD_RUNS)
    chosen = parser.parse_args()
    for name in chosen.case:
        make(name, chosen.commit, chosen.output)


if __name__ == "__main__":
    main()
