"""Formatting: single-line text without control characters, and numbers with readable units."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

# What a terminal obeys, or shows otherwise than it stands there: control characters (but tab and newline), separators
# of lines, changes of direction, and halves of surrogate pairs.
COMMANDS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")

# Tokens of the hub, OpenAI and Anthropic, GitHub, GitLab, AWS, Google and Slack, signed tokens (JWT), private keys, and
# a password in an address; and what any of them holds, which is quicker to look for.
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}\b|api_org_[A-Za-z0-9]{20,}\b|gh[pousr]_[A-Za-z0-9]{30,}\b|github_pat_[A-Za-z0-9]{22}"
    r"|sk-(?:proj|ant|svcacct|admin)-[\w-]{16,}|sk-(?:[a-z0-9]+-){0,2}(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}\b"
    r"|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abprs]-\d[\w-]{9,}|(?<!-)eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----|\w://[^/\s:@]+:(?![{<\[*$])[^/\s@]+@"
)
_SIGNS = (
    "hf_", "api_org_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "AKIA", "AIza", "xox",
    "eyJ", "-----BEGIN", "://",
)  # fmt: skip


def secrets_in(text: str) -> list[str]:
    """What looks like a key, a token or a password in it."""
    return _SECRET.findall(text) if any(sign in text for sign in _SIGNS) else []


def harmless(text: str) -> str:
    """The text with each character that a terminal would obey written out, such as \\x1b and \\u202e."""
    return text if text.isprintable() else COMMANDS.sub(_written_out, text)


def one_line(text: str) -> str:
    """As `harmless`, and line breaks written out too: a value from elsewhere begins no line of its own."""
    return harmless(text).replace("\n", "\\n")


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def shorten(text: str, length: int) -> str:
    """The text on one line, without control characters; where it is longer than `length` (at least 6) its middle is
    left out, since long texts often begin alike or end alike.
    """
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(line) <= length:
        return line
    head = (length - 4) // 2
    return f"{line[:head]} ... {line[len(line) - (length - 5 - head) :]}"


def from_here(text: str) -> str:
    """The text with the paths in it as they are named from this folder: of many, its own name says nothing."""
    here = os.getcwd().rstrip(os.sep)  # noqa: PTH109
    return text.replace(f"{here}{os.sep}", "") if here else text


def command_line(*words: str) -> str:
    """As a person can paste it: quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `2 h 05 min`; `?` when it is not known."""
    if seconds is None:
        return "?"
    if seconds < 1:
        return "under 1 s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours > 1 else f"{60 * hours + minutes} min"


def amount(count: float) -> str:
    """Bytes in powers of 1000: `1.4 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def p_text(p_value: float) -> str:
    """p = 0.012, or p < 0.0001."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"
