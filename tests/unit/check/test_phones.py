"""Phone numbers of several countries are found in any form, and figures of other kinds are not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import phonenumbers
import pytest
from phonenumbers import PhoneNumberFormat as Format
from phonenumbers import PhoneNumberType as Kind

from finetune.check.phones import phone_numbers

COUNTRIES = ("US", "GB", "DE", "FR", "ES", "IT", "IN", "CN", "BR", "JP", "AU", "NL", "PL", "SE", "CH", "ZA", "TR", "MX")
SENTENCES = ("You can call me on {} tonight.", "Tel: {}", "My number is {}, thanks", "{} (mobile)", "WhatsApp {}!")


def written(country: str, kind: int) -> Iterator[str]:
    """An example of the library, in each form in which people write it."""
    number = phonenumbers.example_number_for_type(country, kind)
    for form in (Format.E164, Format.INTERNATIONAL, Format.NATIONAL):
        yield phonenumbers.format_number(number, form)
    yield phonenumbers.format_number(number, Format.E164).replace("+", "00")
    yield "".join(filter(str.isdigit, phonenumbers.format_number(number, Format.NATIONAL)))
    yield phonenumbers.format_number(number, Format.INTERNATIONAL).replace(" ", "-")


def planted() -> list[tuple[str, str]]:
    numbers = [
        text for country in COUNTRIES for kind in (Kind.MOBILE, Kind.FIXED_LINE) for text in written(country, kind)
    ]
    draw = random.Random(0)
    return [(draw.choice(SENTENCES).format(text), text) for text in draw.sample(numbers, 100)]


def test_nine_in_ten_planted_numbers_are_found_whole() -> None:
    found = [list(phone_numbers(text)) == [number] for text, number in planted()]
    assert sum(found) >= 95


@pytest.mark.parametrize(
    "text",
    [
        "+4915112345678", "+44 (0)20 7946 0958", "0044 7700 900123", "07700900123", "030/12345678", "(030) 1234567",
        "06 12 34 56 78", "(212) 555-0123", "212-555-0123", "212.555.0123", "+1 212 555 0123", "612 34 56 78",
        "0171-1234567", "09061701461", "(11) 96123-4567", "+15551234567", "+44 7700 900123", "312 345 6789",
    ],
)  # fmt: skip
def test_no_word_need_stand_beside_a_number_that_tells_itself(text: str) -> None:
    assert list(phone_numbers(f"Sam, {text}, 4 Main Street")) == [text] == list(phone_numbers(text))


def test_two_numbers_side_by_side_are_two() -> None:
    assert list(phone_numbers("07700900123 07700900456")) == ["07700900123", "07700900456"]
    assert list(phone_numbers("Call 13123456789 or 2125550123 please")) == ["13123456789", "2125550123"]
    assert list(phone_numbers("text 5552341234 or (555) 010-9999")) == ["5552341234", "(555) 010-9999"]


OTHERS: dict[str, Callable[[random.Random], str]] = {
    "sums": lambda r: f"{r.randrange(10**4)} + {r.randrange(10**6)} - {r.randrange(10**8)} = {r.randrange(10**9)}",
    "rows of figures": lambda r: " ".join(str(r.randrange(10, 10**4)) for _ in range(8)),
    "dates": lambda r: f"{r.randrange(1, 29):02}.{r.randrange(1, 13):02}.19{r.randrange(10, 99)} to 2024-1-07",
    "ISBN": lambda r: f"ISBN 978-0-{r.randrange(100, 999)}-{r.randrange(10**4, 10**5)}-3, 0-306-40615-2",
    "books": lambda r: r.choice(["0306406152", "0131103628", "0201633612", "0140328726", "0385472579"]),
    "prices": lambda r: f"$ {r.randrange(10**9):,} or {r.randrange(1, 9)} {r.randrange(100, 999)} 000 EUR",
    "prices of phones": lambda r: f"a mobile phone costs {r.randrange(1, 99)} {r.randrange(100, 999)} 000 won",
    "ids": lambda r: f"order {r.randrange(10**10)}, id {r.randrange(10**11):011d} and {r.randrange(10**9, 10**10)}",
    "versions": lambda r: f"version {r.randrange(20)}.{r.randrange(100)}.{r.randrange(10**4)}.{r.randrange(10**4)}",
    "coordinates": lambda r: f"{r.uniform(-90, 90):+.6f}, {r.uniform(-180, 180):.8f} and +49.{r.randrange(10**8):08}",
    "addresses": lambda r: ".".join(str(r.randrange(256)) for _ in range(4)) + " and 010.020.030.040",
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_figures_are_no_phone_numbers(kind: str) -> None:
    draw = random.Random(1)
    false = [found for _ in range(25) if (found := list(phone_numbers(OTHERS[kind](draw))))]
    assert false == []


def test_a_hundred_thousand_rows_take_seconds() -> None:
    """Here a hundredth of them, in half a second at most on a slow machine."""
    draw = random.Random(2)
    rows = [
        f"call {draw.randrange(10**10):011d} or 12 34 56 {i}, {draw.random()} and {i} * 37 = {i * 37}"
        for i in range(1000)
    ]
    list(phone_numbers(rows[0]))  # the rules are read
    began = time.process_time()
    for row in rows:
        list(phone_numbers(row))
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "text",
    ["1" * 10**5, "12 " * 40_000, "0171 " * 30_000, "+1" * 50_000, "call " * 30_000 + "0 1" * 30_000, "(0" * 50_000],
)
def test_a_long_run_takes_linear_time(text: str) -> None:
    began = time.process_time()
    list(phone_numbers(text))
    assert time.process_time() - began < 3.0
