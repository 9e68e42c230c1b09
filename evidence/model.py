"""A Llama in plain PyTorch, with the names of transformers, and Megatron's initialisation.

Imports torch and ``settings``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from evidence.settings import Size

_STD = 0.02
_EPS = 1e-5
_ROTARY_BASE = 10000.0


class Attention(nn.Module):
    """Causal attention with rotary embeddings and grouped heads of Key and Value."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.groups = size.heads, size.groups
        self.head_dim = size.hidden // size.heads
        rows = size.groups * self.head_dim
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, rows, bias=False)
        self.v_proj = nn.Linear(size.hidden, rows, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what attention adds; x has shape ``(samples, sequence, hidden)``."""
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        qkv = functional.linear(x, weight).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query_key, value = qkv.split((self.heads + self.groups, self.groups), dim=1)
        query, key = _rotate(query_key, cos, sin).split((self.heads, self.groups), dim=1)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.heads != self.groups
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated linear unit of Llama."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.ffn, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.ffn, bias=False)
        self.down_proj = nn.Linear(size.ffn, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the MLP adds."""
        both = functional.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight)))
        gate, up = both.chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Layer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden, eps=_EPS)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, eps=_EPS)
        self.mlp = MLP(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole model; embedding and output are separate weights."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=_EPS)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        half = size.hidden // size.heads // 2
        angles = torch.outer(
            torch.arange(size.sequence), _ROTARY_BASE ** (-torch.arange(half) / half)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    parameter, std=_STD / math.sqrt(2 * size.layers) if ends_branch else _STD
                )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss in nats per token; arguments have shape ``(samples, sequence)``."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.lm_head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
