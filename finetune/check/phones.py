"""Phone numbers in a text: a pattern picks what may be one, and libphonenumber's rules judge it.

Found: numbers with + or 00 before the country's code; numbers of 17 countries that begin with 0, grouped or written
together; those grouped as few other figures are, (212) 555-0123, 212-555-0123 or 612 34 56 78; and any number of some
30 countries beside a word that speaks of a call. Not found: short codes, numbers in words, and digits alone that begin
with no 0 and have no such word near them: they may as well be an id, a price or a sum. No number is looked up.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache

_WITH_ZERO = ("GB", "DE", "FR", "IT", "NL", "CH", "AT", "BE", "SE", "AU", "IN", "JP", "CN", "KR", "ZA", "TR", "IE")
_OTHERS = (
    "US", "ES", "PL", "PT", "BR", "CN", "IN", "IT", "MX", "DK", "NO", "RU", "CZ", "GR", "SG", "HK",
)  # fmt: skip
_BETWEEN = r"(?:[ .\-/\u00a0\u2010\u2011]|\)[ .\-/]?| ?\()?"
# Every step reads one digit, so that the time grows with the text. E.164 allows 15; 00 and (0) stand before some.
_CANDIDATE = re.compile(
    r"(?:(?<![\w=*^$€£#/+-])(?<!\d[.,:])|(?<=(?i:call|text|ring))|(?<=(?i:tel|fax|mob)))"
    rf"\+?\(?\+?\d(?:{_BETWEEN}\d){{6,17}}(?!\d|[.,:/%*=-]\d|[^\W\d_]{{1,2}}\b)"
)
_AMERICAN = re.compile(r"(?:\+?1[ .-])?(?:\([2-9]\d\d\) ?\d{3}[ .-]\d{4}|[2-9]\d\d([.-])\d{3}\1\d{4})")
_EXAMPLE = re.compile(r"1?555[2-9]\d{6}")  # of a city that films and examples have
_DATE = re.compile(r"(?:\d{1,2}([ ./-])\d{1,2}\1(?:19|20)\d\d|(?:19|20)\d\d([ ./-])\d{1,2}\2\d{1,2})(?!\d)")
_NONE = (_DATE, re.compile(r"\d{1,3}(?:\.\d{1,3}){3}$"), re.compile(r"\+?\d+\.\d+$"))  # an address, a decimal
_DIGITS, _GROUP = re.compile(r"\d+"), re.compile(r"\S+")
_GROUPED = ((3, 3, 4), (3, 4, 4), (3, 2, 2, 2))  # how many digits stand together in numbers and seldom elsewhere
_KINDS = (
    "fixed_line", "mobile", "toll_free", "premium_rate", "shared_cost", "personal_number", "voip", "pager", "uan",
)  # fmt: skip
# Words that speak of a call: as whole words, by their beginning, and of languages without spaces or with endings.
_WORDS = (
    "call", "calls", "called", "calling", "phone", "phones", "telephone", "cellphone", "smartphone", "tel", "teléfono",
    "téléphone", "mobile", "mob", "cell", "handy", "fax", "whatsapp", "signal", "sms", "text", "texts", "txt", "ring",
    "dial", "contact", "hotline", "helpline", "reach", "ligue", "ruf", "rufen", "móvil", "celular", "cellulare",
    "portable",
)  # fmt: skip
_BEGINNINGS = ("telefon", "llam", "appel", "anruf")
_SIGNS = ("тел", "звон", "电话", "電話", "手机", "전화", "फ़ोन", "☎", "☏", "✆", "📞", "📱")
_CALL = re.compile(
    rf"\b(?:{'|'.join(_WORDS)}|(?:{'|'.join(_BEGINNINGS)})\w*|(?:my|our|your|his|her|their) (?:\w+ )?number)\b"
    f"|{'|'.join(_SIGNS)}"
)
_ANY_CALL = (*_WORDS, *_BEGINNINGS, *_SIGNS, "number")  # without one of them `_CALL` is not looked for
_OTHER = re.compile(
    r"(?i)\b(?:isbn|issn|ean|upc|id|uid|order|ref|sku|invoice|account|serial|ticket|version|part|item|model|"
    r"batch|tracking|transaction|bestell\w*|commande|pedido)\b[\s\w.:#-]{0,16}$"
)
_BEFORE, _AFTER = 40, 25  # characters in which `_CALL` is looked for


def phone_numbers(text: str) -> Iterator[str]:
    """Every number that can be one, as it is written."""
    calls: list[int] | None = None  # where a call is spoken of
    for match in _CANDIDATE.finditer(text):
        if calls is None:
            lowered = text.lower()
            spoken = any(word in lowered for word in _ANY_CALL)
            calls = [call.end() for call in _CALL.finditer(lowered)] if spoken else []
        before = bisect_left(calls, match.start() - _BEFORE)
        spoken_of = before < len(calls) and calls[before] <= match.end() + _AFTER
        if spoken_of or not _OTHER.search(text, max(match.start() - _BEFORE, 0), match.start()):
            yield from _in_groups(match[0], [group.span() for group in _GROUP.finditer(match[0])], spoken_of)


def _in_groups(text: str, groups: Sequence[tuple[int, int]], spoken_of: bool) -> Iterator[str]:
    """The numbers in a run of groups with spaces between them: from each start the longest that is one."""
    first = 0
    while first < len(groups):
        start, end = groups[first]
        telling = spoken_of or text[start] in "+(0" or end - start > 2
        for last in range(len(groups), first if telling else len(groups), -1):
            number, whole = text[start : groups[last - 1][1]], (first, last) == (0, len(groups))
            if len(number) > 6 and _is_number(number, spoken_of, whole):
                yield number
                first = last - 1
                break
        first += 1


@lru_cache(maxsize=4096)
def _is_number(text: str, spoken_of: bool, whole: bool) -> bool:
    """whole: no other figures stand beside it, with a space between."""
    sizes = [len(group) for group in _DIGITS.findall(text)]
    if not 7 <= sum(sizes) <= 17 or any(pattern.match(text) for pattern in _NONE):
        return False
    if _AMERICAN.fullmatch(text):
        return True
    if text.startswith(("+", "(+")) or (text.startswith("00") and text[2] != "0"):
        return _international(text, text[0] != "0" or spoken_of or (len(sizes) > 1 and sizes[0] in (3, 4, 5)))
    digits = "".join(_DIGITS.findall(text))
    if digits[0] == "0":
        long = sum(sizes) > (7 if spoken_of else 8) and sizes[-1] > 1 and (sizes[0] > 1 or text.startswith("(0)"))
        return long and (spoken_of or len(sizes) > 1 or not _isbn(digits)) and _national(_WITH_ZERO, digits)
    telling = spoken_of or text.startswith("(") or (whole and tuple(sizes) in _GROUPED)
    price = sizes[0] < 3 and set(sizes[1:]) == {3}  # 12 500 000
    return (
        telling
        and not price
        and len(digits) > 7
        and (_national(_OTHERS, digits) or _EXAMPLE.fullmatch(digits) is not None)
    )


def _international(text: str, plausible: bool) -> bool:
    """Whether the number is one of the country that it names. told: one as long as that country's suffices, as those
    are that films and examples have (+44 7700 900123).
    """
    import phonenumbers

    try:
        number = phonenumbers.parse(text, "DE")  # a country that dials 00 before another's code
    except phonenumbers.NumberParseException:
        return False
    possible = phonenumbers.is_possible_number_with_reason(number) == phonenumbers.ValidationResult.IS_POSSIBLE
    return (plausible and possible) or phonenumbers.is_valid_number(number)


def _national(regions: tuple[str, ...], digits: str) -> bool:
    """Whether the number is one of a region's, as it is dialled there."""
    return _numbers_of(regions).fullmatch(digits) is not None


@lru_cache(maxsize=2)
def _numbers_of(regions: tuple[str, ...]) -> re.Pattern[str]:
    """All numbers of the regions, as libphonenumber has them: one pattern is many times as quick as its functions."""
    from phonenumbers import PhoneMetadata

    patterns = []
    for region in regions:
        known = PhoneMetadata.metadata_for_region(region)
        assert known is not None
        kinds = (getattr(known, kind) for kind in _KINDS)
        numbers = [kind.national_number_pattern for kind in kinds if kind and kind.national_number_pattern]
        prefix = known.national_prefix or ""
        patterns.append(f"(?:{prefix})?(?:{'|'.join(dict.fromkeys(numbers))})")
    return re.compile("|".join(patterns), re.ASCII)


def _isbn(digits: str) -> bool:
    """Whether the check digit of a book's number of ten digits is right (ISO 2108:1992)."""
    return len(digits) == 10 and sum((10 - i) * int(digit) for i, digit in enumerate(digits)) % 11 == 0
