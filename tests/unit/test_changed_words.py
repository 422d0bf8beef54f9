"""Words that changed are marked, and nothing else; what is longer than a page can hold is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.report.page.words import LONGEST, changed_words, cut


@pytest.mark.parametrize(
    ("before", "after", "lost", "gained"),
    [
        ("the cat sat", "the dog sat", ["cat "], ["dog "]),
        ("yes", "yes", [], []),
        ("", "an answer", [], ["an answer"]),
        ("it costs 5 euros", "it costs 50 euros today", ["5 "], ["50 ", "today"]),
        ("a\nb", "a b", [], []),
    ],
)
def test_only_changed_words_are_marked(before: str, after: str, lost: list[str], gained: list[str]) -> None:
    left, right = changed_words(before, after)
    assert [text for text, flagged in left if flagged] == lost
    assert [text for text, flagged in right if flagged] == gained


@given(st.text(max_size=60), st.text(max_size=60))
def test_together_the_pieces_are_the_text(before: str, after: str) -> None:
    left, right = changed_words(before, after)
    assert ("".join(text for text, _ in left), "".join(text for text, _ in right)) == (before, after)


def test_long_answers_take_no_long_time() -> None:
    before, after = "a b " * 50_000, "b a " * 50_000
    assert changed_words(before, after) == ([(before, True)], [(after, True)])


@given(st.text(max_size=3 * LONGEST))
def test_a_cut_text_fits(text: str) -> None:
    assert len(cut(text)) <= LONGEST
