"""Llama with Hugging Face's names <-> the same model with Megatron's keys.

Imports numpy and the readers of Adam-mini's state. Both rotate halves of a head (Megatron unless
``--rotary-interleaved``), so the rows within a head keep their order. Megatron fuses Query, Key and
Value by query group::

    [q heads of group 0, k 0, v 0, q heads of group 1, k 1, v 1, ...]

and the MLP's first matrix as ``[gate; up]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.convert.blocks import args_of, heads_of
from megatron_adam_mini.convert.mini_state import MiniState, find_mini_state, stored_blocks
from megatron_adam_mini.plan.parameter_info import HeadGeometry
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_WITHIN = {
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
}
#: Order of ``named_parameters()`` of Hugging Face's Llama, by which torch matches optimizer state.
_ORDER = (
    "model.embed_tokens.",
    "self_attn.q_proj.",
    "self_attn.k_proj.",
    "self_attn.v_proj.",
    "self_attn.o_proj.",
    "mlp.gate_proj.",
    "mlp.up_proj.",
    "mlp.down_proj.",
    "input_layernorm.",
    "post_attention_layernorm.",
    "model.norm.",
    "lm_head.",
)


@dataclass(frozen=True)
class HuggingFaceParameter:
    """A Hugging Face parameter within a Megatron one.

    Attributes:
        name: Hugging Face's name.
        rows: for each of its rows, the row of Megatron's tensor that holds it.
    """

    name: str
    rows: IntArray


@dataclass(frozen=True)
class Llama:
    """State of Adam-mini for a Llama in Megatron, and what is needed to rename and reorder it."""

    state: MiniState
    args: Any
    heads: HeadGeometry
    blocks: dict[str, ParameterBlocks]


def read_llama(checkpoint: Checkpoint) -> Llama:
    """Find the state of Adam-mini in a checkpoint of a Llama.

    Raises:
        UnreadableError: there is none, or rows of heads are in another order than Hugging Face's
            (``--rotary-interleaved``).
        CorruptError: damaged or incomplete state.
    """
    state, args = find_mini_state(checkpoint), args_of(checkpoint)
    if getattr(args, "rotary_interleaved", False):
        raise UnreadableError(
            "The Megatron model was made with --rotary-interleaved; Hugging Face's Llama rotates "
            "halves of a head, and its rows lie in another order."
        )
    if state.by_column:
        raise UnreadableError(
            f"{checkpoint.folder} has v of columns ({min(state.by_column)!r}), which the public "
            "package does not know: it has v of rows, heads and whole tensors. Use the preset "
            "'paper'."
        )
    blocks = {p.key: stored_blocks(state, p, args) for p in state.parameters}
    return Llama(state, args, heads_of(args), blocks)


def parts_of(key: str, num_rows: int, heads: HeadGeometry) -> tuple[HuggingFaceParameter, ...]:
    """Return the Hugging Face parameters within a parameter of Megatron.

    Args:
        key: folded key.
        num_rows: number of its rows.
        heads: geometry of attention.

    Raises:
        UnreadableError: Llama has no such parameter.
    """
    if key in _OUTER:
        return (HuggingFaceParameter(_OUTER[key], np.arange(num_rows)),)
    match = _LAYER.match(key)
    names = _WITHIN.get(match[2]) if match else None
    if match is None or names is None:
        raise UnreadableError(
            f"{key!r} has no counterpart in Hugging Face's Llama; only its architecture can be "
            "converted (RMSNorm, SwiGLU, rotary embedding, no biases)."
        )
    prefix = f"model.layers.{match[1]}."
    if len(names) == 3:
        rows = _qkv_rows(heads, num_rows)
    else:
        rows = np.split(np.arange(num_rows), len(names))
    return tuple(
        HuggingFaceParameter(prefix + name, r) for name, r in zip(names, rows, strict=True)
    )


def sort_key_of(name: str) -> tuple[int, int, int]:
    """Return a sort key that gives the order of ``named_parameters()``."""
    place = next(i for i, part in enumerate(_ORDER) if part in name)
    match = re.match(r"model\.layers\.(\d+)\.", name)
    outer = 1 if match else (0 if place == 0 else 2)
    return outer, int(match[1]) if match else 0, place


def _qkv_rows(heads: HeadGeometry, num_rows: int) -> list[IntArray]:
    if heads.gated or heads.num_rows != num_rows:
        raise UnreadableError(
            f"A fused QKV weight with {num_rows} rows is not Llama's: {heads.num_heads} heads, "
            f"{heads.num_query_groups} groups of size {heads.head_dim} make {heads.num_rows}"
            f"{', and its attention output is gated' if heads.gated else ''}."
        )
    dim, per_group = heads.head_dim, heads.num_heads // heads.num_query_groups
    grouped = np.arange(num_rows).reshape(heads.num_query_groups, per_group + 2, dim)
    return [
        grouped[:, :per_group].reshape(-1),
        grouped[:, per_group].reshape(-1),
        grouped[:, per_group + 1].reshape(-1),
    ]
