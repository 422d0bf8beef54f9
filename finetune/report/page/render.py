"""Renders templates to HTML. All foreign text is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune.text import harmless

_TEMPLATES = "report/page/templates"
KINDS = {  # of error, in words
    "long": "much longer than expected",
    "repetition": "the same again and again",
    "misspelling": "misspelt words",
    "inconsistency": "another answer when asked again",
    "hallucination": "names or numbers that stand nowhere in the data",
    "wrong": "not the expected answer",
    "empty": "no answer",
    "unstopped": "no end within the longest answer",
    "format": "JSON is expected and not given",
}

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "pt": "Portuguese", "it": "Italian", "nl": "Dutch"}


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page, the same for the same values. Its policy forbids every request, and every script but ours."""
    style, script = _source("page.css"), _source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(values, style=Markup(style), script=Markup(script), script_hash=digest)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("finetune", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "percent": percent,
        "nats": nats,
        "number": number,
        "p": p_value,
        "short_p": short_p,
        "interval": interval,
    }
    environment.globals |= {"figure": figure, "KINDS": KINDS, "LANGUAGES": LANGUAGES}
    return environment


def _source(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


def _shown(value: Any) -> Any:
    """Of every value that a template writes: no control characters. Ours alone is Markup, and made of such values."""
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def figure(value: float | None, of: str, shown: object) -> Markup:
    """A figure with its exact value and its key in report.json or compare.json, for other programs and for tests."""
    if value is None:
        return Markup("&ndash;")
    return Markup('<data value="{}" data-of="{}">{}</data>').format(json.dumps(value), of, harmless(str(shown)))


def percent(value: float | None, places: int = 1) -> str:
    return "\u2013" if value is None else f"{100 * value:.{places}f}%"


def nats(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.4f}"


def number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"p\u00a0{short_p(value)}" if value < 1e-4 else f"p\u00a0=\u00a0{short_p(value)}"


def short_p(value: float) -> str:
    """In a column that is headed by p."""
    return "<\u00a00.0001" if value < 1e-4 else f"{value:.2g}"


def interval(bounds: Sequence[float] | None, shares: bool = True) -> str:
    if bounds is None:
        return "\u2013"
    low, high = bounds
    return f"{100 * low:.1f}\u2013{100 * high:.1f}%" if shares else f"{low:.3f}\u2013{high:.3f}"


def marked(pieces: Sequence[tuple[str, bool]], tag: str) -> Markup:
    """Texts in a row; those that are flagged stand in `tag`."""
    shown = [(escape(harmless(text)), flagged) for text, flagged in pieces]
    return Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(text) if on else text for text, on in shown)
