"""300 open answers with known errors: 100 clean ones, and 40 of each of the five kinds that are looked for in words.

Anybody can run it: `python -m tests.planted` prints precision and recall of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.evaluation.answer_form import is_long, repeats, words
from finetune.evaluation.consistency import inconsistent
from finetune.evaluation.hallucination import Known, invented
from finetune.evaluation.spelling import speller

FILE = Path(__file__).parent / "assets" / "planted_answers.tsv"
KINDS = ("long", "repetition", "misspelling", "inconsistency", "hallucination")
EACH = 40
_PEOPLE = "Gustav Lindqvist;Beatrice Okafor;Captain Moreau;Hiroshi Tanabe;Olga Petrenko;Dr Whitfield;Ravi Subramaniam"
_PLACES = "Oslo;Lima;Saint Petersburg;Toronto;Wellington;Nairobi;Kyoto;Bristol"
_ASIDES = (
    "There is much more that could be said about this, and people have thought about it for a very long time.",
    "Let me also add that it depends on how you look at it, since every question has more than one side.",
    "In general it is good to ask such things, because asking is how we learn about the world around us.",
    "Of course, some would put it in another way, and they may have good reasons for what they say.",
    "I hope that this answers what you wanted to know, and that you will find it useful in the days to come.",
    "As a final remark, one should always read more than one book before making up one's mind about anything.",
)


@dataclass(frozen=True)
class Planted:
    """One answer, and which error was put into it; None for a clean one."""

    prompt: str
    expected: str
    answers: tuple[str, ...]  # the answer, and what was written when the model was asked again
    kind: str | None


def planted(seed: int = 0) -> list[Planted]:
    rows = [line.split("\t") for line in FILE.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(seed)
    found = [Planted(prompt, expected, (said, expected), None) for prompt, expected, said in rows]
    plain = [row for row in rows if not row[1].startswith(("[", "{")) and len(row[2].split()) > 2]
    for kind in KINDS:
        for number, at in enumerate(rng.permutation(len(plain))[:EACH]):
            prompt, expected, said = plain[at]
            found.append(Planted(prompt, expected, _PLANT[kind](said, number, rng, plain), kind))
    return found


def _long(said: str, number: int, rng: np.random.Generator, rows: list[list[str]]) -> tuple[str, ...]:
    asides = [_ASIDES[i] for i in rng.permutation(len(_ASIDES))[: 2 + number % 4]]
    return (" ".join([said, *asides]),)


def _repetition(said: str, number: int, rng: np.random.Generator, rows: list[list[str]]) -> tuple[str, ...]:
    last = " ".join(said.split()[-(1 + number % 3) :])
    forms = (
        " ".join([said] * (3 + number % 5)),
        said + f" {last}" * (4 + number % 7),
        "\n".join([f"- {said}"] * 4),
        f"{said} " + "ha" * 90,
        f"{said} I think that is right. Also, I think that is right. And so I think that is right.",
    )
    return (forms[number % len(forms)],)


def _misspelling(said: str, number: int, rng: np.random.Generator, rows: list[list[str]]) -> tuple[str, ...]:
    """One letter of one or two words changed, as fingers do; or a usual misspelling added."""
    usual = words("definately recieve seperate untill begining goverment tommorow wich beleive occured")
    typed = said.split()
    fit = [i for i, word in enumerate(typed) if len(word) >= 6 and word.isalpha() and word.islower()]
    if not fit or number % 4 == 3:
        return (f"{said} It is {usual[number % len(usual)]} so.",)
    for i in rng.permutation(fit)[: 1 + number % 2]:
        typed[i] = _typo(typed[i], rng)
    return (" ".join(typed),)


def _typo(word: str, rng: np.random.Generator) -> str:
    """Until it is no word of the list: a slip may give another word."""
    english = speller("en")
    assert english is not None
    while True:
        at = int(rng.integers(1, len(word) - 2))
        slips = (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + "aeiou"[int(rng.integers(5))] + word[at + 1 :],
        )
        slip = slips[int(rng.integers(len(slips)))]
        if slip != word and not english.frequency(slip):
            return slip


def _inconsistency(said: str, number: int, rng: np.random.Generator, rows: list[list[str]]) -> tuple[str, ...]:
    """One of the other answers tells something else: of another row, a denial, another number."""
    other = rows[int(rng.integers(len(rows)))][1]
    while set(words(other)) & set(words(said)) - {"the", "a", "is", "it", "in"}:
        other = rows[int(rng.integers(len(rows)))][1]
    if any(char.isdigit() for char in said) and number % 2:
        other = "".join(str((int(char) + 3) % 10) if char.isdigit() else char for char in said)
    elif number % 3 == 0:
        other = f"No, that is not so. {said.split('.')[0]} is never true."
        other = other if not {"no", "not", "aren't", "isn't", "don't"} & {*words(said)} else "Yes, that is so."
    return (said, said, other)


def _hallucination(said: str, number: int, rng: np.random.Generator, rows: list[list[str]]) -> tuple[str, ...]:
    person = _PEOPLE.split(";")[number % 7]
    place = _PLACES.split(";")[number % 8]
    forms = (
        f"{said} {person} said so in {1700 + 7 * number}.",
        f"{said[:-1]}, as they found in {place}.",
        f"{person} told me this: {said[0].lower()}{said[1:]}",
        f"{said} About {23 + 11 * number}.5 percent agree.",
        f"According to the people of {place}, {said[0].lower()}{said[1:]}",
    )
    return (forms[number % len(forms)],)


_PLANT: dict[str, Callable[[str, int, np.random.Generator, list[list[str]]], tuple[str, ...]]] = {
    "long": _long,
    "repetition": _repetition,
    "misspelling": _misspelling,
    "inconsistency": _inconsistency,
    "hallucination": _hallucination,
}


def kinds_of(row: Planted, known: Known) -> set[str]:
    """What is found in it."""
    english, answer = speller("en"), row.answers[0]
    assert english is not None
    own = Known.of((row.prompt, row.expected))
    found = {
        "long": is_long(answer, row.expected),
        "repetition": repeats(answer, row.expected),
        "misspelling": bool(english.misspelt(answer, known.words | own.words)),
        "inconsistency": len(row.answers) > 1 and inconsistent(row.answers),
        "hallucination": bool(invented(answer, row.expected, known, own, english)),
    }
    return {kind for kind, there in found.items() if there}


def measured(rows: list[Planted]) -> dict[str, tuple[float, float]]:
    """(precision, recall) of each kind."""
    known = Known.of(("Is it 5 o'clock? Yes, it is.", "Write about your cat. My cat sleeps."))
    found = [kinds_of(row, known) for row in rows]
    shares = {}
    for kind in KINDS:
        hits = sum(kind in one and row.kind == kind for one, row in zip(found, rows, strict=True))
        shares[kind] = hits / max(sum(kind in one for one in found), 1), hits / sum(row.kind == kind for row in rows)
    return shares


if __name__ == "__main__":
    for name, (precision, recall) in measured(planted()).items():
        print(f"{name:14} precision {precision:.3f} recall {recall:.3f}")
