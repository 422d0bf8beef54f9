"""The servers that an export names answer as the run does."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from backends.interface import TrainState
from finetune.data.tokenizer import answer_text
from finetune.disk.adapter import read_adapter
from finetune.export.prompt import Prompts
from finetune.recipe.load import load_recipe
from tests.unit.export.exported_run import Runs, made
from tests.unit.toy_run import load_job

PATIENCE = 60.0  # seconds


def ask(port: int, model: Path, messages: list[Any]) -> str:
    body = {"model": str(model), "messages": messages, "temperature": 0.0, "max_tokens": 12}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return str(json.loads(connection.getresponse().read())["choices"][0]["message"]["content"])


@pytest.mark.slow
def test_mlx_lm_server_gives_the_answers_of_the_run(runs: Runs) -> None:
    pytest.importorskip("mlx_lm")
    run = runs("torch")
    path = made(run, "merged", "f32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm.server", "--model", str(path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        job = load_job(load_recipe(run.recipe))
        session = job.open()
        session.set_state(TrainState(0, read_adapter(run.adapter).tensors, {}))
        rows = Prompts(job.prepared, {}).rows(job.prepared.train.records)
        asked = [messages for _, messages, *_ in rows][:20]
        prompts = [example.prompt_tokens.tolist() for example in job.prepared.train.examples][:20]
        stop = job.prepared.stop_tokens
        for messages, tokens in zip(asked, session.generate(prompts, 12, stop), strict=True):
            assert ask(port, path, messages).strip() == answer_text(job.tokenizer, tokens, stop)
    finally:
        server.kill()
        server.wait()
