"""The scale of Gemma 3's embeddings, which mlx-lm rounds to bfloat16 whatever type the model computes in."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gemma3_text import Gemma3Model

from backends.mlx_backend.patch import subclassed


def as_transformers_embeds(model: nn.Module, dtype: mx.Dtype) -> None:
    """Scales the embeddings of a loaded model as transformers does, by sqrt(width) in the model's own type."""
    for module in model.modules():
        if isinstance(module, Gemma3Model):
            root = math.sqrt(module.args.hidden_size)
            ratio = float(mx.array(root, dtype)) / float(mx.array(root, mx.bfloat16))
            if ratio != 1:
                subclassed(module.embed_tokens, lambda base, self, ids, ratio=ratio: base(self, ids) * ratio)
