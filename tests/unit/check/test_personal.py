"""Personal data are found, and never shown whole."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.check.personal import Personal, luhn, masked, personal_data

FOUND = {
    "write to jane.doe+x@mail.example.org today": ("e-mail address", "jane.doe+x@mail.example.org"),
    "call +44 20 7946 0958 now": ("phone number", "+44 20 7946 0958"),
    "call (555) 010-9999": ("phone number", "(555) 010-9999"),
    "call 555-010-9999.": ("phone number", "555-010-9999"),
    "ring +4915112345678": ("phone number", "+4915112345678"),
    "card 4111 1111 1111 1111 expires": ("card number", "4111 1111 1111 1111"),
    "card 5500005555555559": ("card number", "5500005555555559"),
    "export HF=hf_" + "aB3" * 10: ("key or token", "hf_" + "aB3" * 10),
    "sk-proj-" + "x1Y2" * 8: ("key or token", "sk-proj-" + "x1Y2" * 8),
    "AKIA" + "ABCD1234EFGH5678": ("key or token", "AKIAABCD1234EFGH5678"),
    "password = 'tr0ub4dor&3xKqz'": ("key or token", "tr0ub4dor&3xKqz"),
    "api_key: 9f8e7d6c5b4a39281706f5e4": ("key or token", "9f8e7d6c5b4a39281706f5e4"),
    "-----BEGIN RSA PRIVATE KEY-----": ("key or token", "-----BEGIN RSA PRIVATE KEY-----"),
}
CLEAN = [
    "on 2024-01-02 and 12.05.1999 and 3 4 5",
    "it cost 1 000 000 in 1999 - 2003",
    "the number 4111 1111 1111 1112 is no card",
    "0000 0000 0000 0000",
    "follow @someone, version 1.2.3.4",
    "your password: must be long enough",
    "the token: administrator",
    "ISBN 978-3-16-148410-0x",
    "pi is 3.14159265358979",
    "a score of 10-12 and 8-10 of 20",
]


@pytest.mark.parametrize("text", FOUND)
def test_found(text):
    assert list(personal_data(text)) == [FOUND[text]]


@pytest.mark.parametrize("text", CLEAN)
def test_not_found(text):
    assert list(personal_data(text)) == []


@pytest.mark.parametrize("text", FOUND)
def test_never_whole(text):
    found = Personal()
    found.look(text, "a:1")
    (kind, value), (one,) = FOUND[text], found.kinds.values()
    assert found.kinds.keys() == {kind}
    assert one.shown[0][0] == "a:1" and value[2:] not in one.shown[0][1] and str(len(value)) in one.shown[0][1]


def test_counts_findings_and_rows():
    found = Personal()
    found.look("a@b.org and c@d.org", "f:1")
    found.look("nothing", "f:2")
    found.look("e@f.org", "f:3")
    one = found.kinds["e-mail address"]
    assert (one.count, one.rows, found.locations) == (3, 2, {"f:1", "f:3"})


@given(st.text(st.sampled_from("0123456789"), min_size=12, max_size=18), st.integers(0, 9))
def test_luhn_notices_every_single_wrong_digit(start, wrong):
    number = next((f"4{start}{last}" for last in range(10) if luhn(f"4{start}{last}")), None)
    if number and number[5] != str(wrong):
        assert not luhn(number[:5] + str(wrong) + number[6:])


@given(st.text())
def test_any_text_can_be_looked_at(text):
    for _, value in personal_data(text):
        assert len(masked(value)) < 25


HOSTILE = {
    "letters": "a" * 100_000 + " @",
    "letters and an at": "a" * 100_000 + "@",
    "dots": "a." * 50_000 + "@" + "a-" * 50_000,
    "dotted domain": "b@" + "a." * 50_000 + "1",
    "many ats": "a@" * 50_000,
    "tokens": "eyJ-" * 25_000,
    "token of a web page": "eyJ" + "a" * 100_000,
    "keys": "sk-" * 33_000,
    "keys and letters": "sk-" + "a-" * 50_000,
    "digits": "1" * 100_000,
    "groups of digits": "12-" * 33_000,
    "addresses": "a://b:" * 16_000 + "@",
    "passwords": "password" + " " * 100_000,
    "many passwords": "token = " * 12_000,
    "private keys": "-----BEGIN " * 9_000,
    "words of a private key": "-----BEGIN " + "A " * 50_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_long_run_takes_linear_time(kind: str) -> None:
    began = time.process_time()
    list(personal_data(HOSTILE[kind]))
    assert time.process_time() - began < 2.0


def test_neighbours_in_a_run_are_all_found() -> None:
    found = [value for _, value in personal_data("a@b.com-d@e.fr, x@y@z.org; " + "l" * 80 + "@m.net")]
    assert found == ["a@b.com", "-d@e.fr", "y@z.org", "l" * 64 + "@m.net"]
