"""Chat templates that loop, allocate or reach out: refused in 2 s and 512 MB, and honest ones read as before."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from finetune.data import template_process
from finetune.data import template_sandbox as sandbox
from finetune.data.chat_template import PLAIN_CHAT
from finetune.data.conversation import Conversation
from finetune.data.template_clock import DATE
from finetune.errors import EnvironmentProblem
from tests.unit.data.toy_tokenizers import TEMPLATES, byte_level
from tests.unit.hostile import SECONDS, harmless, refused

TURNS = [{"role": "user", "content": "Is it warm? <b>é\n"}, {"role": "assistant", "content": "It is."}]
EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NESTED = "{% macro f(n) %}{% for i in range(99) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(9) }}"
TAKES_ALL = {
    "loops": EVER,
    "macros": NESTED,
    "power": "{{ 7 ** (7 ** 9) }}",
    "strings": "{{ 'a' * 10**9 }}",
    "output": "{{ 'a' * 10**6 }}",
    "doubling": "{% set n = namespace(a='aa') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "lists": "{{ [0] * 10**9 }}",
    "a list of lists": "{{ (range(99999) | list * 9999) | length }}",
    "centre": "{{ 'x' | center(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "json": "{{ messages | tojson(indent=10**9) }}",
    "joins": "{{ range(99999) | join('x' * 99999) }}",
    "lipsum": "{{ lipsum(n=10**4, max=1000) }}",
    "long": "x" * 1_000_001,
}
FAILS = {
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{{ range(10**9) | list }}",
    "parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "digits": "{{ 2 ** 10 ** 5 ~ 9 ** (10 ** 4) }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format to globals": "{{ '{0.__init__.__globals__}'.format(cycler) }}",
    "attr": "{{ ((cycler | attr('__init__')) | attr('__globals__')).os }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "change": "{{ messages.append(1) }}",
    "cut": "{% for",
}


@pytest.fixture(autouse=True)
def _running() -> Iterator[None]:
    """The child is there, as it is on any row but the first."""
    sandbox.render(byte_level(PLAIN_CHAT), Conversation(TURNS, [(2, False)]))
    yield


def rendered(template: str) -> list[str]:
    return sandbox.render(byte_level(PLAIN_CHAT), Conversation(TURNS, [(2, False), (1, True)]), template=template)


@contextmanager
def watched() -> Iterator[list[int]]:
    """Bytes that the children hold, looked at every few milliseconds. (getrusage counts this process's own too.)"""
    seen, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    seen.append(child.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (place > 5)) for place, kind in enumerate(TAKES_ALL)]
)
def test_a_template_that_takes_all_there_is(kind: str) -> None:
    words = {"output": "wrote 2,000,000 characters", "loops": "ran for more than"}
    with (
        watched() as most,
        harmless(),
        pytest.raises(EnvironmentProblem, match=words.get(kind, "the chat template of")),
    ):
        rendered(TAKES_ALL[kind])
    assert max(most) < 640 * 2**20
    assert rendered("{{ messages[0].role }}") == ["user", "user"]  # the next one is rendered as ever


@pytest.mark.parametrize("kind", FAILS)
def test_a_template_that_fails_is_a_refused_conversation(kind: str) -> None:
    with harmless(), pytest.raises(ValueError, match=r"\w"):
        rendered(FAILS[kind])


@pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_pieces_put_together(times: int) -> None:
    rng = random.Random(7)
    pieces = [
        "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m", "}}", "{% if m %}",
        "{% endif %}", "{% raw %}",
        "{{ x.y.z }}", "{{ messages[9] }}", "{{ 1 / 0 }}", "{{ namespace(__a=1) }}", "{{ '\\ud800' }}", "{{ self }}",
        "{# ",
        "{{ raise_exception(messages) }}", "{% generation %}", "{{ dict }}", "{% break %}", "{{ messages | tojson }}",
    ]  # fmt: skip
    for _ in range(30 * times):
        template = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
        with harmless():
            try:
                assert all(isinstance(one, str) for one in rendered(template))
            except ValueError:
                continue


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_honest_template_writes_what_transformers_writes(name: str) -> None:
    tokenizer = byte_level(TEMPLATES[name])
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    kept: list[dict[str, Any]] = [*TURNS, {"role": "user", "content": "so?", "name": None}]
    conversation = Conversation(kept, [(2, False), (3, True)], tools)
    ours = sandbox.render(tokenizer, conversation, values={"date_string": DATE})
    theirs = [
        tokenizer.apply_chat_template(
            kept[:n], tools=tools, add_generation_prompt=answering, tokenize=False, date_string=DATE
        )
        for n, answering in ((2, False), (3, True))
    ]
    assert ours == theirs


@pytest.mark.skipif(sys.platform == "win32", reason="no bounds of a process there")
def test_the_child_can_open_no_file_and_no_socket_and_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child as it is started, with other questions asked in it than templates."""
    monkeypatch.setenv("HF_TOKEN", "canary")
    start = """
import os, socket, sys
from finetune.data import template_child as child
child._restrict()
done = [os.environ.get("HF_TOKEN", "")]
for use in (lambda: open("/etc/passwd"), lambda: open("canary", "w"), socket.socket):
    try:
        use()
        done.append(str(use))
    except OSError:
        pass
child.send(sys.stdout.buffer, child.json.dumps({"error": f"done: {''.join(done)}."}).encode())
"""
    monkeypatch.setattr(template_process, "_START", f"exec({start!r})")
    monkeypatch.setattr(sandbox, "_child", None)
    with pytest.raises(EnvironmentProblem, match=r"\(done: \.\)"):
        rendered("a")


def test_an_interrupt_leaves_no_answer_for_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    real = template_process.receive

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(template_process, "receive", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(template_process, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rendered("first")
    assert rendered("second") == ["second", "second"]


def test_a_killed_child_is_a_refusal_and_the_next_has_a_new_one() -> None:
    assert sandbox._child is not None
    os.kill(sandbox._child._process.pid, 9)
    assert "ended the process" in (refused(rendered, "a") or "")
    assert rendered("a") == ["a", "a"]


def test_an_idle_child_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    child = sandbox._child
    assert child is not None
    monkeypatch.setattr(template_process, "IDLE", 0.0)
    child._over.wait(SECONDS)
    for _ in range(50):
        if child.ended:
            break
        child._over.wait(0.1)
    assert child.ended
    assert rendered("a") == ["a", "a"]
