"""Error kinds, groups, consistency and forgetting: measurements beyond accuracy.

What it costs is bounded by what the run itself computes, so that it is the same in every run of a recipe.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from backends.interface import FloatArray, Session
from finetune.data.rows import Example, Prepared
from finetune.data.tokenizer import Tokenizer, answer_text
from finetune.data.variants import Variants, held_out_with, variants
from finetune.evaluation.consistency import SAMPLED, TEMPERATURE, in_other_words
from finetune.evaluation.error_kinds import Analysis, Asked, Data, Kind, confusions, kinds_of_answers
from finetune.evaluation.evaluate import Evaluation, base_weights, evaluate
from finetune.evaluation.forgetting import Forgetting, GeneralText, judge, measuring
from finetune.evaluation.groups import By, Swaps, by_length, flips, pairs_of, slices, swapped, swaps_of
from finetune.evaluation.hallucination import Known
from finetune.evaluation.row_shares import Found
from finetune.evaluation.scoring import write_answers
from finetune.evaluation.spelling import language_of, speller
from finetune.events import Progress
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe

ASKED_AGAIN = 0.02  # of a run's tokens
MOST_AGAIN, FEWEST_AGAIN = 32, 3  # rows that are asked again; fewer tell nothing
MOST_SWAPPED = 200  # rows with labels; of open answers as many as are asked again
# In the progress, of a model:
AGAIN, SWAPPED = "errors: {} asked again, time {}", "errors: {}, words swapped"
MOST_READ = 20_000_000  # characters of the training rows, to know their words by


@dataclass(frozen=True)
class Questions:
    """What is asked beside the held-out rows themselves; made while the rows are there as records."""

    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)  # group -> numbers of held-out examples
    in_other_words: Variants = field(default_factory=Variants)
    swapped: Variants = field(default_factory=Variants)
    general: GeneralText = field(default_factory=GeneralText)

    @property
    def rows(self) -> int:
        """That are asked again."""
        return len(self.in_other_words.rows) + len(self.swapped.rows)


def questions(
    recipe: Recipe,
    tokenizer: Tokenizer,
    prepared: Prepared,
    groups: Mapping[str, Sequence[int]],
    general: GeneralText,
) -> Questions:
    """The held-out rows in other words, and with their words swapped. `prepared` must still have its records."""
    again = rows_again(recipe, prepared)
    pairs = pairs_of(recipe.evaluate.swaps)
    most = MOST_SWAPPED if prepared.task == "classification" else MOST_AGAIN

    def swap(parts: Mapping[str, str]) -> Mapping[str, str]:
        return {name: new for name, text in parts.items() if (new := swapped(text, pairs)) != text}

    return Questions(
        groups,
        variants(recipe, tokenizer, prepared, _last_in_other_words, again),
        variants(recipe, tokenizer, prepared, swap, most if pairs else 0),
        general,
    )


def _last_in_other_words(parts: Mapping[str, str]) -> Mapping[str, str]:
    """Of what is asked: an instruction or a prompt, or the last turn of a conversation."""
    name = next((name for name in ("instruction", "prompt") if name in parts), ["", *parts][-1])
    return {name: in_other_words(parts[name])} if name else {}


def run_tokens(recipe: Recipe, prepared: Prepared) -> float:
    """What a run computes, in tokens of one forward pass. A step's tokens count twice: frozen weights have no gradient.

    Measured: SmolLM2 takes 1.8 times as long for a step's token as for one that it reads (SST-2, torch on a CPU).
    """
    train, held_out = prepared.train.examples, prepared.held_out.examples
    if not train or not held_out:
        return 0.0
    mean = sum(map(len, train)) / len(train)
    steps = make_plan(recipe, len(train)).steps
    measured = sum(map(len, held_out))
    if _writes(recipe, prepared):
        measured += len(held_out) * recipe.evaluate.max_tokens
    return 2 * steps * min(recipe.train.batch_size, len(train)) * mean + 2 * measured


def _writes(recipe: Recipe, prepared: Prepared) -> bool:
    return prepared.task == "generation" and recipe.evaluate.generate


def rows_again(recipe: Recipe, prepared: Prepared) -> int:
    """How many rows are asked again; 0 where the run is too short for enough of them, or writes no answers."""
    if not _writes(recipe, prepared) or not prepared.held_out.examples:
        return 0
    rows = prepared.held_out.examples
    answer = sum(len(row.prompt_tokens) for row in rows) / len(rows) + recipe.evaluate.max_tokens
    affordable = int(ASKED_AGAIN * run_tokens(recipe, prepared) / (2 * (SAMPLED + 1) * answer))
    count = min(MOST_AGAIN, affordable, len(rows))
    return count if count >= FEWEST_AGAIN else 0


@dataclass(frozen=True)
class Analyst:
    """Looks at both models of a run, in its session, in which the tuned one is."""

    session: Session
    recipe: Recipe
    prepared: Prepared
    tokenizer: Tokenizer
    questions: Questions
    head: Mapping[str, FloatArray] | None = None  # as `base_weights` takes it

    def analysing(self, base: Evaluation | None, tuned: Evaluation) -> Generator[Progress, None, Analysis]:
        """base, tuned: on the held-out rows. Raises MemoryExhausted."""
        examples = self.prepared.held_out.examples
        named: dict[By, Mapping[str, Sequence[int]]] = {
            "group": self.questions.groups,
            "length": by_length([len(example.prompt_tokens) for example in examples]),
        }
        data, kinds = self._data(), [] if tuned.pairs else confusions(base, tuned)
        if _writes(self.recipe, self.prepared):
            kinds = yield from self._kinds_of_answers(base, tuned, data)
        swaps = yield from self._swaps(base, tuned)
        forgetting = yield from self._forgetting(base, tuned)
        language = data.speller.language if data and data.speller else None
        return Analysis(tuple(kinds), tuple(slices(base, tuned, named)), language, swaps, forgetting)

    def _data(self) -> Data | None:
        """Of the training rows, or else of those that are measured. None where no answers are written."""
        trained = self.prepared.train.examples
        if not _writes(self.recipe, self.prepared):
            return None
        rows = trained or self.prepared.held_out.examples
        known = Known.of(_texts(rows))
        return Data(known, speller(language_of(example.answer or "" for example in rows)), bool(trained))

    def _kinds_of_answers(
        self, base: Evaluation | None, tuned: Evaluation, data: Data | None
    ) -> Generator[Progress, None, list[Kind]]:
        before: Asked = {}
        if base is not None:
            with base_weights(self.session, self.head):
                before = yield from self._asked_again("base model")
        after = yield from self._asked_again("tuned model")
        return kinds_of_answers(base, tuned, self.prepared.held_out.examples, data, (before, after))

    def _asked_again(self, name: str) -> Generator[Progress, None, dict[int, list[str]]]:
        """A few rows asked again by chance, and in other words."""
        worded = self.questions.in_other_words
        rows = [self.prepared.held_out.examples[row] for row in worded.rows]
        answers: dict[int, list[str]] = {row: [] for row in worded.rows}
        for draw in range(SAMPLED + 1):
            chance = draw < SAMPLED
            written = yield from write_answers(
                self.session,
                rows if chance else worded.examples,
                self.prepared.stop_tokens,
                self.recipe.evaluate.max_tokens,
                self._decode,
                AGAIN.format(name, draw + 1),
                TEMPERATURE if chance else 0.0,
                1000 * draw,
            )
            for row, answer in zip(worded.rows, written, strict=True):
                answers[row].append(answer.text)
        return answers

    def _decode(self, tokens: Sequence[int]) -> str:
        return answer_text(self.tokenizer, tokens, self.prepared.stop_tokens)

    def _swaps(self, base: Evaluation | None, tuned: Evaluation) -> Generator[Progress, None, Swaps | None]:
        asked = self.questions.swapped
        if not asked.rows or tuned.accuracy is None:
            return None
        before: Found | None = None
        if base is not None:
            with base_weights(self.session, self.head):
                before = yield from self._flips("base model", base)
        after = yield from self._flips("tuned model", tuned)
        return swaps_of(asked.rows, before, after)

    def _flips(self, name: str, first: Evaluation) -> Generator[Progress, None, Found]:
        asked = self.questions.swapped
        prepared = held_out_with(self.prepared, asked.examples)
        again = yield from evaluate(
            self.session,
            prepared,
            prepared.held_out,
            name=SWAPPED.format(name),
            micro_tokens=self.recipe.train.tokens_at_once,
            max_tokens=self.recipe.evaluate.max_tokens if _writes(self.recipe, prepared) else 0,
            decode=self._decode,
        )
        answers = [row.predicted for row in again.results]
        return flips(asked.rows, first, answers, pairs_of(self.recipe.evaluate.swaps), bool(prepared.labels))

    def _forgetting(self, base: Evaluation | None, tuned: Evaluation) -> Generator[Progress, None, Forgetting | None]:
        if not self.recipe.evaluate.forgetting or self.recipe.head:  # a head reads no text
            return None
        stop, micro_tokens = self.prepared.stop_tokens, self.recipe.train.tokens_at_once
        changes = yield from measuring(self.session, self.questions.general, stop, micro_tokens)
        return judge(changes, base, tuned)


def _texts(rows: Sequence[Example]) -> list[str]:
    """Prompts and answers, up to so many characters."""
    texts: list[str] = []
    read = 0
    for row in rows:
        texts += (row.prompt, row.answer or "")
        read += len(row.prompt) + len(row.answer or "")
        if read > MOST_READ:
            break
    return texts
