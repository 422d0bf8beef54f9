"""From hidden states to losses, gradients and scores, in chunks, so that logits [N, vocab] never exist whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from backends.interface import BackendError
from backends.torch_backend.fused import kernels_on
from backends.torch_backend.patch import forward_as


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (W h + b) / cap); without a cap, scale * (W h + b)."""

    linear: Any  # a torch.nn.Linear, frozen or not; None: the states are already the model's own logits
    logits_at_once: int  # numbers of the logits that exist at a time
    scale: float = 1.0
    cap: float | None = None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V] in float32."""
        if self.linear is None:
            return states.float()
        raw = self.linear(states).float()
        if self.scale != 1:
            raw *= self.scale
        return raw if self.cap is None else raw.div_(self.cap).tanh_().mul_(self.cap)

    def loss(
        self, states: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum(share * nll), and its gradient for the states [N, D]; targets and shares are [N].

        The gradient of a linear layer that trains is added to it.
        """
        loss, grad_states = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
        with torch.no_grad():
            for rows in self._chunks(states, targets):
                part, grad = self._of_some(states[rows], targets[rows], shares[rows])
                loss += part
                grad_states[rows] = self._backward(grad, states[rows])
        return loss, grad_states

    def _of_some(
        self, states: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of some positions, and its gradient for what the linear layer makes of their states [n, V]."""
        kernels = kernels_on(states.device, states.dtype)
        if kernels is not None and self.linear is not None:
            raw = self.linear(states)
            return kernels.cross_entropy(raw, targets, shares, self.scale, self.cap).sum(), raw
        logits, target, share = self.logits(states), targets[:, None], shares[:, None]
        cap_grad = None if self.cap is None else 1 - (logits / self.cap).square_()
        logs = torch.log_softmax(logits, -1)
        loss = -(share * logs.gather(-1, target)).sum()
        grad = logs.exp_().mul_(share)  # d nll / d logits = softmax - one hot
        grad.scatter_(-1, target, grad.gather(-1, target) - share)
        if cap_grad is not None:
            grad.mul_(cap_grad)
        return loss, (grad.mul_(self.scale) if self.scale != 1 else grad).to(states.dtype)

    def score(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(target) and the most probable token. [N], [N]"""
        logprob, greedy = states.new_empty(len(states), dtype=torch.float32), torch.empty_like(targets)
        with torch.no_grad():
            for rows in self._chunks(states, targets):
                logits = self.logits(states[rows])
                greedy[rows] = logits.argmax(-1)
                logprob[rows] = logits.gather(-1, targets[rows, None])[:, 0] - logits.logsumexp(-1)
        return logprob, greedy

    def _backward(self, grad: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The gradient of some states [n, D] from that of what the linear layer makes of them [n, V]."""
        if self.linear is None:
            return grad
        weight, bias = self.linear.weight, self.linear.bias
        if weight.requires_grad:
            weight.grad = grad.T @ states if weight.grad is None else weight.grad.addmm_(grad.T, states)
        if bias is not None and bias.requires_grad:
            bias.grad = grad.sum(0) if bias.grad is None else bias.grad.add_(grad.sum(0))
        return grad @ weight

    def _width(self, states: torch.Tensor) -> int:
        """How many logits a position has."""
        return int(states.shape[-1] if self.linear is None else self.linear.out_features)

    def _chunks(self, states: torch.Tensor, targets: torch.Tensor) -> Iterator[slice]:
        size = max(1, self.logits_at_once // self._width(states))
        size -= size % 4 if size > 4 else 0  # so that each chunk's targets and shares begin at a multiple of 16 bytes
        return (slice(start, start + size) for start in range(0, len(targets), size))


class ClassHead(Head):
    """logits = S h in float32, where S [K, D], which stands in the place of the linear layer, is trained."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = states.float() @ self.linear.T
        return logits

    def loss(
        self, states: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Head.loss`; the gradient of S is added to it."""
        leaf = states.detach().float().requires_grad_()
        nll = torch.nn.functional.cross_entropy(self.logits(leaf), targets, reduction="none")
        loss = (shares * nll).sum()
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad.to(states.dtype)

    def _width(self, states: torch.Tensor) -> int:
        return len(self.linear)


def class_head(model: Any, weight: torch.nn.Parameter, logits_at_once: int) -> ClassHead:
    """Raises BackendError where the model has no body of its own that gives hidden states."""
    if model.base_model is model:
        raise BackendError("this model has no body apart from its output layer, so it takes no classification head")
    return ClassHead(weight, logits_at_once)


def find_head(model: Any, logits_at_once: int) -> Head:
    """The model's head as its configuration describes it, if the model's own forward pass gives the same logits.

    The pass is run on random states in place of its blocks, so it costs no more than the head.
    """
    unknown = Head(None, logits_at_once)
    linear, text = model.get_output_embeddings(), model.config.get_text_config()
    if type(linear) is not torch.nn.Linear or model.base_model is model:
        return unknown
    divided = getattr(text, "logits_scaling", None) or 1.0  # Granite
    scale = (getattr(text, "logit_scale", None) or 1.0) / divided
    head = Head(linear, logits_at_once, scale, getattr(text, "final_logit_softcapping", None))
    generator = torch.Generator().manual_seed(0)
    size = 4 * (head.cap or 1.0) / abs(head.scale)  # logits of a size at which a cap bends them
    states = torch.randn(1, 4, linear.in_features, generator=generator) * size / linear.in_features**0.5
    states = states.to(linear.weight)
    try:
        theirs = _bypassing_blocks(model, states)
    except Exception:  # a model's own code may fail in many ways on states that it did not compute
        return unknown
    ours = head.logits(states[0]).detach()
    if not ours.isfinite().all():  # a row of the head is not: the losses will say so
        return unknown
    near = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(states.dtype, 1e-4)
    return head if torch.allclose(ours, theirs[0].float(), near, near * float(ours.abs().mean())) else unknown


class _States(BaseModelOutputWithPast):  # type: ignore[misc]
    """A body's output that has only its hidden states: what else a model asks for, say its experts' choice, is None."""

    def __getattr__(self, name: str) -> None:
        return None


def _bypassing_blocks(model: Any, states: torch.Tensor) -> torch.Tensor:
    """The logits that the model makes of these final hidden states. [1, T, D] -> [1, T, V]"""
    body = _States(last_hidden_state=states)
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    with torch.no_grad(), forward_as(model.base_model, lambda *_, **__: body):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
