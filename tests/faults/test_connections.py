"""Nothing connects unasked: once model and data are here no command reaches beyond the machine, and a library that
tries ends it with exit 7.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from finetune import connections
from finetune.errors import EnvironmentProblem
from tests.end_to_end.command import ROOT, Answer, Work

BACKENDS = ["torch", "reference"]
RECIPE = """\
data: {train: train.jsonl, test: test.jsonl}
lora: {rank: 2, alpha: 4, targets: [q_proj]}
train: {steps: 2, batch_size: 4}
"""
# In every Python process that sees this file, children too: a line for each name and address beyond this machine.
SPY = """
import os, sys
LOG = os.path.join(os.path.dirname(__file__), "reached")
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0] if "get" in event else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if "get" not in event and arguments[0].family == 1 or str(host) in ("127.0.0.1", "::1", "localhost", "None"):
            return
        handle = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{event} {address}\\n".encode())
        os.close(handle)
sys.addaudithook(hook)
"""


@pytest.fixture
def spied(work: Work) -> Work:
    """A working folder whose commands are watched, with no offline variable set by the user."""
    spy = work.folder / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(SPY)
    work.env["PYTHONPATH"] = f"{spy}{os.pathsep}{ROOT}"
    work.env["HF_HOME"] = str(work.folder / "cache")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        work.env.pop(name, None)
    work.recipe(RECIPE)
    return work


def reached(work: Work) -> str:
    log = work.folder / "spy" / "reached"
    return log.read_text() if log.exists() else ""


def test_the_spy_sees_a_connection(spied: Work) -> None:
    code = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", code], env=spied.env, check=False, capture_output=True)
    assert "192.0.2.1" in reached(spied)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_command_reaches_beyond_the_machine(spied: Work, backend: str) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    end = ["--backend", backend]
    (trained,) = spied.several(["train", "recipe.yaml", *end])
    trained.good()
    (run,) = spied.runs()
    shutil.copytree(run, spied.folder / "again")
    (spied.folder / "again" / "report.json").unlink()
    resumed, measured, answered, *rest = spied.several(
        ["resume", "again", *end],
        ["eval", str(run), *end],
        ["generate", str(run), "a fine film", "--max-tokens", "2", *end],
        ["check", "recipe.yaml"],
        ["plan", "recipe.yaml"],
        ["init", "train.jsonl", "--output", "new.yaml"],
        ["doctor"],
    )
    for answer in (resumed, measured, answered, *rest):
        answer.good()
    assert reached(spied) == ""
    report = json.loads((run / "report.json").read_text())
    assert (report["connections"], report["connections_to"]) == (0, [])
    assert "sys.addaudithook" in report["connections_watched"]


@pytest.mark.slow
def test_the_demo_reaches_nothing(spied: Work) -> None:
    spied.finetune("demo", "--backend", "torch").good()
    assert reached(spied) == ""


def without_network() -> list[str]:
    """A command before a command that gives it a network namespace with nothing in it."""
    inside = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    done = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespace may be made here: {done.stderr.strip()}")
    return inside


@pytest.mark.slow
def test_without_any_network_a_supervised_run_ends_well(spied: Work) -> None:
    command = [*without_network(), sys.executable, "-m", "finetune", "train", "recipe.yaml", "--backend", "reference"]
    done = subprocess.run(command, cwd=spied.folder, env=spied.env, capture_output=True, text=True, check=False)
    Answer(done.returncode, done.stdout, done.stderr).good()


# A library that tries

NOSY = """
import socket, threading
def quietly(target):
    try:
        socket.create_connection((target, 443), timeout=1)
    except Exception:
        pass
def in_a_thread(target):
    thread = threading.Thread(target=quietly, args=(target,)); thread.start(); thread.join()
def packet(target):
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("192.0.2.7", 53))
    except Exception:
        pass
"""
CALLS = """
import nosy
from finetune.training import job
real = job.load_tokenizer
def load_tokenizer(folder):
    nosy.{how}("telemetry.example.org")
    return real(folder)
job.load_tokenizer = load_tokenizer
"""


CHECK = "check recipe.yaml"


@pytest.mark.parametrize(
    ("how", "command"),
    [
        ("in_a_thread", CHECK),
        pytest.param("quietly", "train recipe.yaml --backend reference", marks=pytest.mark.slow),
        pytest.param("packet", CHECK, marks=pytest.mark.slow),
    ],
)
def test_a_library_that_tries_is_named_even_if_it_hides_its_failure(spied: Work, how: str, command: str) -> None:
    (spied.folder / "spy" / "nosy.py").write_text(NOSY)
    (answer,) = spied.several(command.split(), before=CALLS.format(how=how))
    message = answer.failed(7)
    assert "nosy tried to reach" in message
    assert ("192.0.2.7" if how == "packet" else "telemetry.example.org") in message


def test_the_machine_itself_may_be_reached(spied: Work) -> None:
    """As distributed training on one machine does, and tools beside it."""
    code = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("", 0)) as every:
    for one in (server, every):
        socket.create_connection(("localhost", one.getsockname()[1])).close()
socket.getaddrinfo(socket.gethostname(), 80); socket.getaddrinfo("10.1.2.3", 80); socket.socketpair()
with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
    server.bind("here"); server.listen(); client.connect("here")
"""
    watched = f"from finetune.connections import check, watch; watch()\n{code}\ncheck()"
    done = subprocess.run(
        [sys.executable, "-c", watched], cwd=spied.folder, env=spied.env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# Where the recipe names the hub


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The watch of this process, if another test began it, without what it has seen."""
    for name, value in (("_allowed", ()), ("_reached", []), ("_refused", []), ("_ours", set())):
        monkeypatch.setattr(connections, name, value)
    return


INTERNET = SimpleNamespace(family=socket.AF_INET)  # as much of a socket as the hook looks at
HOSTS = {
    "huggingface.co": True, "hf.co": True, "cdn-lfs.hf.co": True, "cas-bridge.xethub.hf.co": True,
    "HuggingFace.CO.": True, "huggingface.co.evil.org": False, "nothuggingface.co": False, "example.org": False,
    "s3.amazonaws.com": False,
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_for_a_hub_id_the_hubs_hosts_are_reached_and_no_others(rule: None, host: str) -> None:
    with pytest.raises(EnvironmentProblem, match="tried to reach"):
        connections._hook("socket.getaddrinfo", (host, 443, 0, 0, 0))
    connections._refused.clear()
    with connections.to_hub():
        if HOSTS[host]:
            connections._hook("socket.getaddrinfo", (host, 443, 0, 0, 0))
            connections._hook("socket.connect", (INTERNET, ("192.0.2.1", 443)))
            assert connections._reached == ["192.0.2.1"]
        else:
            with pytest.raises(EnvironmentProblem):
                connections._hook("socket.getaddrinfo", (host, 443, 0, 0, 0))
    with pytest.raises(EnvironmentProblem):
        connections._hook("socket.connect", (INTERNET, ("192.0.2.1", 443)))


class Hub(BaseHTTPRequestHandler):
    """Answers everything with 404, and remembers what it was asked."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        Hub.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *rest: object) -> None: ...


def test_a_hub_id_is_asked_of_the_hub_and_of_nobody_else(spied: Work) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        spied.env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        model, data = spied.several(
            ["train", "recipe.yaml", "model.path=someone/something", "--backend", "reference"],
            ["train", "recipe.yaml", "data.train=someone/rows", "--backend", "reference"],
        )
        server.shutdown()
    model.failed(7)
    data.failed(3)
    assert any("someone/something" in path for path in Hub.asked)
    assert any("someone/rows" in path for path in Hub.asked)
    assert reached(spied) == ""


@pytest.mark.parametrize("users", ["1", "0", None])
def test_the_users_own_setting_stays(spied: Work, users: str | None) -> None:
    """HF_HUB_OFFLINE is ours only where the user has not set it."""
    if users:
        spied.env["HF_HUB_OFFLINE"] = users
    code = (
        "from finetune import connections; connections.watch(); import os; from huggingface_hub import constants\n"
        "before = os.environ['HF_HUB_OFFLINE'], constants.HF_HUB_OFFLINE\n"
        "with connections.to_hub(): within = constants.HF_HUB_OFFLINE\n"
        "print(before, within, constants.HF_HUB_OFFLINE)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=spied.env, capture_output=True, text=True, check=True)
    expected = {"1": "('1', True) True True", "0": "('0', False) False False", None: "('1', True) False True"}
    assert done.stdout.strip() == expected[users]


def test_a_run_that_nobody_watched_claims_nothing(rule: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_watching", False)
    assert connections.account()["connections"] is None
