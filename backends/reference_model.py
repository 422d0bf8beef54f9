"""The reference backend's model: a bigram table as a product of matrices.

With x = E[token], its logits are the sum over the adapted modules of

    U (W x + scale * B A dropout(x)), and with DoRA U (m / |W + scale * B A| * (W + scale * B A) x)

where E [V, in] and U [V, out] are shared by modules of one size, and |..| are the lengths of a matrix's rows. E, U
and W are random, the same for every seed, and frozen; modules and shapes are the folder's own (without weights in it,
one module of 32 x 32).
With a classification head U is [D, out], the sum is the states h, and the logits are S h with S trained.
Where the whole model trains, E, U and W do, and there are no A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backends import dropout
from backends.arithmetic import Arrays, log_softmax
from backends.interface import HEAD_WEIGHT, MAGNITUDE, Batch, FloatArray, IntArray, LoraSpec, Modules
from backends.micro_batches import places_of


class Bigram:
    """Its arithmetic, with what a session says: what trains, how, and after how many steps."""

    lora_shapes: Modules
    _lora: LoraSpec
    _adapter: dict[str, Any]  # what trains
    _seed: int
    _step: int

    def __init__(self, modules: Modules, vocabulary: int, hidden: int) -> None:
        """hidden: D, the width of what a classification head is given; 0: the states are the logits."""
        rng = np.random.default_rng(20190111)  # the base is one model, whatever the run's seed
        inputs, outputs = sorted({i for _, i in modules.values()}), sorted({o for o, _ in modules.values()})
        self._embed = {i: _normal(rng, (vocabulary, i), 1.0) for i in inputs}
        self._head = {o: _normal(rng, (hidden or vocabulary, o), o**-0.5) for o in outputs}
        self._frozen = {m: _normal(rng, (o, i), (i * len(modules)) ** -0.5) for m, (o, i) in modules.items()}

    def _weights(self) -> dict[str, FloatArray]:
        """All of the base's, by their names where they train."""
        weights = {f"embedding.{i}.weight": value for i, value in self._embed.items()}
        weights |= {f"{module}.weight": value for module, value in self._frozen.items()}
        return weights | {f"output.{o}.weight": value for o, value in self._head.items()}

    def _logits(self, tokens: IntArray, masks: Mapping[str, FloatArray] | None = None) -> FloatArray:
        """[N] -> [N, V], or with a head [N, K]; `masks` as in `_states`."""
        states = self._states(tokens, masks)
        return states @ self._adapter[HEAD_WEIGHT].T if self._lora.classes else states

    def _states(self, tokens: IntArray, masks: Mapping[str, FloatArray] | None = None) -> FloatArray:
        """[N] -> [N, D]; `masks` holds each module's dropout mask [N, in], already over 1 - p."""
        states = np.zeros((len(tokens), len(next(iter(self._head.values())))), np.float32)
        for module, (outputs, inputs) in self.lora_shapes.items():
            x = self._embedding(inputs)[tokens]  # [N, in]
            states += self._hidden(module, x, masks) @ self._output(outputs).T
        return states

    def _hidden(self, module: str, x: FloatArray, masks: Mapping[str, FloatArray] | None) -> FloatArray:
        """[N, in] -> [N, out]"""
        hidden: FloatArray = x @ self._layer(module).T
        if self._lora.whole:
            return hidden
        return self._gate(module) * self._product(module, x, x if masks is None else x * masks[module])

    def _product(self, module: str, x: FloatArray, dropped: FloatArray) -> FloatArray:
        """W x + scale * B A dropout(x). [N, out]"""
        a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
        product: FloatArray = x @ self._frozen[module].T + self._lora.scale * (dropped @ a.T) @ b.T
        return product

    def _gate(self, module: str) -> FloatArray:
        """What DoRA multiplies a module's outputs by: m / |W + scale * B A| [out]; without it 1."""
        if not self._lora.dora:
            return np.ones(1, np.float32)
        a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
        adapted: FloatArray = (self._frozen[module] + self._lora.scale * b @ a).astype(np.float32)
        gate: FloatArray = self._adapter[f"{module}.{MAGNITUDE}"] / row_lengths(adapted)
        return gate

    def _embedding(self, inputs: int) -> FloatArray:
        weight: FloatArray = self._adapter.get(f"embedding.{inputs}.weight", self._embed[inputs])
        return weight

    def _output(self, outputs: int) -> FloatArray:
        weight: FloatArray = self._adapter.get(f"output.{outputs}.weight", self._head[outputs])
        return weight

    def _layer(self, module: str) -> FloatArray:
        weight: FloatArray = self._adapter.get(f"{module}.weight", self._frozen[module])
        return weight

    def _gradient(self, batch: Batch, total: float) -> tuple[float, Arrays]:
        """sum(w * nll) / total over this micro-batch, and its gradient for everything that trains."""
        chosen = batch.weights != 0
        tokens, targets = batch.inputs[chosen], batch.targets[chosen]  # [N]
        share = batch.weights[chosen] / np.float32(total)  # [N]
        masks = self._dropout(places_of(batch)[chosen])
        logs = log_softmax(self._logits(tokens, masks))  # [N, V]
        rows, grad_logits = np.arange(len(tokens)), np.exp(logs)
        grad_logits[rows, targets] -= 1  # d nll / d logits = softmax - one hot
        grad_logits *= share[:, None]
        grads: Arrays = {}
        grad_states = grad_logits  # [N, D]
        if self._lora.classes:
            grads[HEAD_WEIGHT] = grad_logits.T @ self._states(tokens, masks)
            grad_states = grad_logits @ self._adapter[HEAD_WEIGHT]
        grads |= (
            self._of_weights(tokens, grad_states) if self._lora.whole else self._of_adapter(tokens, grad_states, masks)
        )
        return float(np.sum(share * -logs[rows, targets], dtype=np.float64)), grads

    def _of_adapter(self, tokens: IntArray, grad_states: FloatArray, masks: Arrays) -> Arrays:
        grads: Arrays = {}
        for module, (outputs, inputs) in self.lora_shapes.items():
            a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
            whole = self._embed[inputs][tokens]
            x, gate = whole * masks[module], self._gate(module)  # [N, in]
            grad_output = self._lora.scale * gate * (grad_states @ self._head[outputs])  # [N, out]
            grads |= {f"{module}.lora_A": (grad_output @ b).T @ x, f"{module}.lora_B": grad_output.T @ (x @ a.T)}
            if self._lora.dora:  # the lengths count as constants, as in the paper
                magnitude = f"{module}.{MAGNITUDE}"
                of_gate = ((grad_states @ self._head[outputs]) * self._product(module, whole, x)).sum(0)
                grads[magnitude] = of_gate * gate / self._adapter[magnitude]
        return grads

    def _of_weights(self, tokens: IntArray, grad_states: FloatArray) -> Arrays:
        grads = {name: np.zeros_like(value) for name, value in self._weights().items()}
        for module, (outputs, inputs) in self.lora_shapes.items():
            x = self._embedding(inputs)[tokens]  # [N, in]
            grad_output = grad_states @ self._output(outputs)  # [N, out]
            grads[f"{module}.weight"] += grad_output.T @ x
            grads[f"output.{outputs}.weight"] += grad_states.T @ self._hidden(module, x, None)
            np.add.at(grads[f"embedding.{inputs}.weight"], tokens, grad_output @ self._layer(module))
        return grads

    def _dropout(self, where: dropout.Places) -> Arrays:
        """Each module's mask [N, in] over what it keeps on average; `where` [N] the tokens stand."""
        probability, modules = self._lora.dropout, self.lora_shapes
        if not probability:
            return {module: np.ones((len(where), inputs), np.float32) for module, (_, inputs) in modules.items()}
        tokens = dropout.token_words(self._seed, self._step, where)
        kept = zip(modules.items(), dropout.keys(tokens, dropout.module_words(modules)), strict=True)
        share = np.float32(dropout.kept_share(probability))
        return {module: dropout.mask(keys, inputs, probability) / share for (module, (_, inputs)), keys in kept}


def row_lengths(weight: FloatArray) -> FloatArray:
    """[out]"""
    lengths: FloatArray = np.linalg.norm(weight, axis=1).astype(np.float32)
    return lengths


def _normal(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> FloatArray:
    return (rng.standard_normal(shape) * deviation).astype(np.float32)
