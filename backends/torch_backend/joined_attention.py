"""Attention of rows to one shared prefix and to themselves: computed apart, and joined by their normalisers.

With out_i and the normaliser's logarithm lse_i of each part, lse = log(sum(exp(lse_i))), and the whole's out is the
sum of exp(lse_i - lse) out_i. The gradient of a part is FlashAttention's, of the whole's out and lse (Dao et al.,
2022, B.2). So the prefix's keys and values are read once for all rows, in as few heads as the model has of them, and
no mask [T, S] is made.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from backends.torch_backend.attention import attend_by
from backends.torch_backend.own_code import agree

_NAME = "joined_to_a_prefix"
_aten = torch.ops.aten

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values [1, G, L, d]


def continuing(keys: torch.Tensor, prefix: Pair) -> torch.Tensor:
    """A row's own keys, marked: what attends to them attends to the prefix before them too."""
    keys.prefix = prefix
    return keys


def join_prefixes(model: Any) -> bool:
    """Lets a model whose attention is torch's own attend to marked keys. Returns whether it can."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    if model.config._attn_implementation != "sdpa" or not _works(model.device, model.dtype, heads, groups, width):
        return False
    attend_by(model, _NAME, _attention)
    return True


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: [B, H, T, d], [B, G, T, d] twice -> [B, T, H, d]."""
    prefix: Pair | None = getattr(key, "prefix", None)
    if prefix is None:
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
        return cast(tuple[torch.Tensor, None], plain)
    if attention_mask is not None:
        raise TypeError("rows that continue a prefix attend by more than the order of their tokens")
    out = attend(query, key, value, prefix, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: Pair, scale: float) -> torch.Tensor:
    """Causal attention of rows [B, H, T, d] to the prefix and to their own keys and values [B, G, T, d]."""
    out: torch.Tensor = _Joined.apply(q, k, v, *prefix, scale)
    return out


class _Joined(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prefix_k: torch.Tensor,
        prefix_v: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        own, own_lse, ctx.own = _flash(q, k, v, True, scale)
        before, before_lse, ctx.before = _flash(_one_row(q), prefix_k, prefix_v, False, scale)
        before, before_lse = _rows(before, len(q)), _rows(before_lse[..., None], len(q))  # [B, H, T, 1]
        share = torch.sigmoid(own_lse[..., None] - before_lse).to(q.dtype)  # exp(own_lse - lse)
        out, lse = torch.lerp(before, own, share), torch.logaddexp(own_lse, before_lse[..., 0])
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = _flash_back(grad, q, k, v, out, lse, ctx.own, True, ctx.scale)
        whole = (_one_row(grad), _one_row(q), prefix_k, prefix_v, _one_row(out), _one_row(lse[..., None])[..., 0])
        of_prefix = _flash_back(*whole, ctx.before, False, ctx.scale)
        return grad_q + _rows(of_prefix[0], len(q)), grad_k, grad_v, of_prefix[1], of_prefix[2], None


def _one_row(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, d] -> [1, H, B T, d]; a view where heads lie by token, as layers make them."""
    return x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def _rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """The other way."""
    return x.transpose(1, 2).unflatten(1, (count, -1))[0].transpose(1, 2)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """Out, lse, and what the gradient is to be given again."""
    if q.is_cuda:
        out, lse, *state = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse, tuple(state[:6])
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse, ()


def _flash_back(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    state: tuple[Any, ...],
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    if q.is_cuda:
        *lengths, seed, offset = state
        back = _aten._scaled_dot_product_flash_attention_backward
        grads = back(grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, seed, offset, scale=scale)
    else:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple(grads))


@cache
def _works(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> bool:
    """Whether it gives here what attention over all keys gives, with every gradient, of some random numbers."""
    if device.type not in ("cpu", "cuda"):
        return False
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 5, heads, width), *[(2, 5, groups, width)] * 2, *[(1, 3, groups, width)] * 2]
    with torch.inference_mode(False), torch.enable_grad():
        parts = [torch.randn(shape, generator=draw).to(device, dtype).transpose(1, 2) for shape in shapes]
        try:
            pairs = zip(_results(_joined, parts), _results(_over_all, parts), strict=True)
            return all(agree(one, other, dtype) for one, other in pairs)
        except Exception:  # a build without such a kernel, heads of a width that it does not know
            return False


def _joined(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor
) -> torch.Tensor:
    return attend(q, k, v, (prefix_k, prefix_v), q.shape[-1] ** -0.5)


def _over_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor
) -> torch.Tensor:
    keys, values = (torch.cat([x.expand(len(q), -1, -1, -1), y], 2) for x, y in ((prefix_k, k), (prefix_v, v)))
    seen = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(prefix_k.shape[2])
    whole: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)
    return whole


def _results(function: Any, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
