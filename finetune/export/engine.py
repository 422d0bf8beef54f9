"""llama.cpp behind the evaluation interface: a GGUF file is measured by the same code as the run's models."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from backends.interface import Batch, Scores
from finetune.errors import EnvironmentProblem
from finetune.export.packages import optional
from finetune.launch import processors
from finetune.text import harmless

_ERRORS = 1  # how much llama.cpp prints
_BIAS = 1e4  # makes a token the sampled one; what is reported are the model's own probabilities


class Engine:
    """One GGUF file, and an adapter where one is given, behind the two reading methods of a session.

    It is a server inside this process, on a port of this machine alone that asks for a key. Attention and its cache are
    in float32, so that what is measured is the file and not the engine's shortcuts.
    """

    shares_prefixes = False  # it keeps the last prompt by itself

    def __init__(self, file: Path, adapter: Path | None, context: int) -> None:
        """context: positions of the longest row and its answer. Raises EnvironmentProblem for what cannot be loaded."""
        library = optional("xllamacpp")
        self._key = secrets.token_hex(16)
        try:
            self._server: Any = library.Server(_settings(library, file, adapter, context, self._key))
        except Exception as error:  # the binding raises RuntimeError and what C++ threw; llama.cpp has printed why
            raise EnvironmentProblem(f"{file}: llama.cpp cannot load it: {error!s:.200}") from None
        self._address = urlsplit(self._server.listening_address)
        self._filler = self.tokenise("a", special=False)[-1]  # a token that is a whole character

    def score(self, batch: Batch) -> Scores:
        """Of every position whose weight is not 0; one call for each, as llama.cpp tells of no other."""
        logprob = np.zeros(batch.targets.shape, np.float32)
        greedy = np.zeros(batch.targets.shape, np.int32)
        for row, targets in enumerate(batch.targets):
            before = batch.prefixes[batch.prefix_of[row]].tolist() if batch.prefixes else []
            tokens = before + batch.inputs[row].tolist()
            for column in np.flatnonzero(batch.weights[row] > 0):
                seen = tokens[: len(before) + int(column) + 1]
                logprob[row, column], greedy[row, column] = self._next(seen, int(targets[column]))
        return Scores(logprob, greedy)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """A completion for each prompt, ended where the file ends it, or by a token of `stop`."""
        if not max_tokens:
            return [[] for _ in prompts]
        answers = []
        for number, prompt in enumerate(prompts):
            body = {"prompt": [int(token) for token in prompt], "n_predict": max_tokens, "return_tokens": True}
            answer = self._ask("/completion", {**body, "temperature": temperature, "seed": seed + number})
            tokens = [int(token) for token in answer["tokens"]]
            ended = answer.get("stop_type") == "eos"
            at = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
            answers.append(tokens[: min(at, len(tokens) - ended)])
        return answers

    def distribution(self, tokens: Sequence[int]) -> dict[int, float]:
        """Every token of the vocabulary and its log-probability after these, the most probable first."""
        returned = self._tell(tokens, self._filler, 1 << 24)["top_logprobs"]
        return {int(token["id"]): float(token["logprob"]) for token in returned}

    def tokenise(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens as the file reads them. special: with what it puts before a text by itself."""
        answer = self._ask("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> str:
        """The prompt that the file's chat template writes for an answer to these messages."""
        body = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        return str(self._ask("/apply-template", body)["prompt"])

    def _next(self, tokens: Sequence[int], target: int) -> tuple[float, int]:
        """The log-probability of `target` after these tokens, and the most probable token."""
        returned = self._tell(tokens, target, 1)
        if returned is not None:
            return float(returned["logprob"]), int(returned["top_logprobs"][0]["id"])
        whole = self.distribution(tokens)  # of a target that is half a character nothing is told
        return whole[target], next(iter(whole))

    def _tell(self, tokens: Sequence[int], sampled: int, count: int) -> Any:
        """What is said of the next token: the sampled one's log-probability, and the `count` most probable ones."""
        body: dict[str, Any] = {"n_predict": 1, "n_probs": count, "temperature": 0.0, "cache_prompt": True}
        body |= {"prompt": [int(token) for token in tokens], "logit_bias": [[int(sampled), _BIAS]]}
        answer = self._ask("/v1/completions", body)
        returned = (answer["choices"][0].get("logprobs") or {}).get("content")
        return returned[0] if returned else None

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        with closing(http.client.HTTPConnection(str(self._address.hostname), self._address.port)) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        if answer.status != 200:
            raise EnvironmentProblem(f"llama.cpp: {harmless(text.decode(errors='replace')):.300}")
        return json.loads(text)


def _settings(library: Any, file: Path, adapter: Path | None, context: int, key: str) -> Any:
    settings = library.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.fit_params = context, 1, False, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = processors()
    settings.verbosity, settings.api_keys, settings.offline = _ERRORS, [key], True
    settings.cache_ram_mib, settings.swa_full = 0, True  # the last prompt is kept whole, and no other
    settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        settings.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return settings
