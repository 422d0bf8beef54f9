"""A session as a model class of EleutherAI's lm-eval, on every backend."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from backends.interface import Session
from finetune.data.rows import Example
from finetune.data.tokenizer import Tokenizer
from finetune.errors import DataError, EnvironmentProblem
from finetune.evaluation.scoring import row_losses, write_tokens
from finetune.events import Progress, Result, Work

LONGEST = 2048  # tokens, where the model's config says nothing, as lm-eval has it
_ENDINGS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_INSTALL = 'pip install -c requirements.lock ".[benchmark]"'
Show = Callable[[Progress], None]


def task_manager() -> Any:
    """Of all tasks that lm-eval comes with. Raises EnvironmentProblem where it is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EnvironmentProblem(f"benchmark needs the package lm-eval ({error}); install it: {_INSTALL}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def model_of(session: Session, tokenizer: Tokenizer, longest: int, micro_tokens: int, show: Show) -> Any:
    """An lm_eval.api.model.LM over the session as it is now. Texts become tokens as lm-eval's transformers class makes
    them, so that figures compare with published ones.

    longest: tokens that the model takes; of longer requests the end. show: gets the progress. Its methods raise
    MemoryExhausted.
    """
    from lm_eval.api.model import TemplateLM

    class SessionModel(_Answers, TemplateLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

    return SessionModel(session, tokenizer, longest, micro_tokens, show)


class _Answers:
    """What lm-eval's class leaves to a model: texts to tokens, scores, and answers."""

    def __init__(self, session: Session, tokenizer: Tokenizer, longest: int, micro_tokens: int, show: Show) -> None:
        super().__init__()
        self._session, self._tokenizer, self._show = session, tokenizer, show
        self._longest, self._micro_tokens = longest, micro_tokens

    @property
    def eot_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self._tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # the tokenizer's own, unless its begin token stands there already
            add_special_tokens = not string.startswith(self._tokenizer.decode(self.prefix_token_id))
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        examples = [_continued(context, answer, self._longest, i) for i, (_, context, answer) in enumerate(requests)]
        losses = _shown(row_losses(self._session, examples, self._micro_tokens, "scoring"), self._show)
        greedy = losses.correct == losses.tokens
        return list(zip((-losses.loss).tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        from lm_eval import utils

        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self._longest, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        scores = self._loglikelihood_tokens(windows) if windows else []
        return np.bincount(owners, [score for score, _ in scores], minlength=len(requests)).tolist()  # type: ignore[no-any-return]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        answers = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)  # requests with the same settings
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        for numbers in alike.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], 256)
            made = self._written([requests[i].args[0] for i in numbers], settings)
            for i, text in zip(numbers, made, strict=True):
                answers[i] = text
        return answers

    def _written(self, contexts: Sequence[str], settings: Any) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        most, until = settings["max_gen_toks"], list(settings["until"])
        if most >= self._longest:
            raise DataError(f"a task asks for answers of {most:,} tokens, and the model takes {self._longest:,} in all")
        if settings.get("do_sample"):
            raise DataError("a task asks for answers drawn at random; only the most probable ones are written here")
        examples = [_asked(self.tok_encode(text)[most - self._longest :], i) for i, text in enumerate(contexts)]
        stop = frozenset({self.eot_token_id})
        written = _shown(write_tokens(self._session, examples, stop, most, "answers"), self._show)
        ends = [*until, self._tokenizer.decode(self.eot_token_id)]
        return [postprocess_generated_text(self._tokenizer.decode(tokens), ends, None) for tokens in written]


def _continued(context: Sequence[int], answer: Sequence[int], longest: int, number: int) -> Example:
    """The end of both, as far as the model takes it; the answer alone is scored."""
    tokens = np.array([*context, *answer][-(longest + 1) :], np.int32)
    weights = (np.arange(len(tokens)) >= len(tokens) - len(answer)).astype(np.float32)
    weights[0] = 0.0  # nothing predicts it
    return Example(tokens, weights, f"request {number + 1}")


def _asked(tokens: Sequence[int], number: int) -> Example:
    count = len(tokens)
    asked = np.array(tokens, np.int32)
    return Example(asked, np.zeros(count, np.float32), f"request {number + 1}", answer_start=count, answer_end=count)


def _shown(events: Generator[Progress, None, Result], show: Show) -> Result:
    work = Work(events)
    for event in work:
        show(event)
    return work.result


@contextmanager
def local_data(folder: Path) -> Iterator[None]:
    """Inside, the data sets of tasks come from `folder` alone: org/name is folder/org/name, as the hub has it, or in it
    CONFIG/SPLIT.jsonl (.json, .csv, .parquet). Raises DataError for one that is not there.
    """
    import datasets

    from_hub, cache = datasets.load_dataset, TemporaryDirectory(ignore_cleanup_errors=True)

    def load_dataset(path: str, name: str | None = None, **settings: Any) -> Any:
        whole = folder / path
        place = whole / name if name and (whole / name).is_dir() else whole
        if not place.is_dir():
            raise DataError(
                f"{whole}: no such folder; get it where there is a network, with "
                f"`hf download {path} --repo-type dataset --local-dir {whole}`, or write "
                f"{whole / (name or '')}/SPLIT.jsonl with the columns that the hub's has"
            )
        files = {file.stem: str(file) for file in sorted(place.iterdir()) if file.suffix in _ENDINGS}
        kinds = {_ENDINGS[Path(file).suffix] for file in files.values()}
        if len(kinds) == 1:
            return from_hub(kinds.pop(), data_files=files, cache_dir=cache.name)
        return from_hub(str(place), name if place == whole else None, cache_dir=cache.name, **settings)

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = from_hub
        cache.cleanup()
