"""QK-clip: Query and Key rows are scaled down after a step where attention logits grew too large.

Imports torch and ``compat``. Megatron scales the weights and, as if it had their shape, their
``main_param``; a distributed optimizer has flat parts of it, or none. Here the main parameters
that a rank owns are scaled, row by row with Megatron's factors, and weights follow from them.

Source: Kimi Team, arXiv:2507.20534, Algorithm 1 (MuonClip); ``clip_qk`` of Megatron's attention.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_adam_mini.mcore import compat

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

#: Which optimizer, as a weak reference, trains a parameter.
_optimizers: MutableMapping[Parameter, Any] = WeakTensorKeyDictionary()


def follow(optimizer: AdamMiniOptimizer) -> None:
    """Let QK-clip of the parameters' modules scale this optimizer's main parameters."""
    for param in optimizer.model_params:
        _optimizers[param] = weakref.ref(optimizer)


def wrap_clip_qk(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``clip_qk`` of one of Megatron's attention classes, for Adam-mini's parameters, too.

    As with Megatron's, all data-parallel ranks must have the same maximum logits.
    """

    @functools.wraps(original)
    def clip_qk(attention: Any) -> None:
        logits = attention.core_attention.current_max_attn_logits
        found = [_optimizers.get(weight) for weight in _weights(attention)]
        optimizer = next((one() for one in found if one is not None), None)
        if optimizer is None or not attention.config.qk_clip or logits is None:
            original(attention)  # which raises if there is nothing to clip by
            return
        if (logits > attention.config.qk_clip_threshold).any():
            scale_rows(optimizer, row_factors(attention, logits))
        attention.core_attention.current_max_attn_logits = None

    return clip_qk


def row_factors(attention: Any, logits: Tensor) -> dict[Parameter, Tensor]:
    """Return the factor of each row of this rank's shards of the weights that make Query and Key.

    Args:
        attention: Megatron's self-attention, latent or not.
        logits: maximum logit of each of this rank's heads, float32.
    """
    threshold, alpha = attention.config.qk_clip_threshold, attention.config.qk_clip_alpha
    heads_of_key = 1
    if not _is_latent(attention):
        heads_of_key = len(logits) // attention.num_query_groups_per_partition
    eta = (threshold / logits.view(-1, heads_of_key).amax(dim=1)).clamp(max=1.0)
    query, key, one = eta**alpha, eta ** (1 - alpha), torch.ones_like(eta)
    weights = _weights(attention)
    if _is_latent(attention):
        config = attention.config
        nope, rope, value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        rows = [_rows((query, nope), (eta, rope)), _rows((key, nope), (one, value))]
        return dict(zip(weights, rows, strict=True))
    width = attention.hidden_size_per_attention_head
    queries = heads_of_key * width
    gates = queries if attention.config.attention_output_gate else 0
    return {weights[0]: _rows((query, queries), (one, gates), (key, width), (one, width))}


@torch.no_grad()
def scale_rows(optimizer: AdamMiniOptimizer, factors: dict[Parameter, Tensor]) -> None:
    """Scale rows of main parameters, and let the weights of all ranks follow.

    All data-parallel ranks must call it. Collectives: unless the next forward pass gathers the
    weights anyway, a gather of each bucket group that has one of the parameters; also of one
    whose gather began within the step.

    Args:
        optimizer: of the parameters.
        factors: of each row of this rank's shard of a parameter, float32.
    """
    overlap = optimizer.ddp_config.overlap_param_gather
    gathered = [
        group
        for group in _bucket_groups(optimizer, factors)
        if compat.finish_gather(group) or not overlap
    ]
    state = optimizer.optimizer.attach()
    for piece in optimizer.inner.plan.pieces:
        param = optimizer.model_params[piece.parameter]
        if param in factors:
            held = state.of(piece)
            values = held.as_float32(piece.window, "param")
            _scale_(values, factors[param].to(values.device), piece.begin, param.shape[1])
            held.store(piece.window, {"param": values})
    for param, factors_of_rows in factors.items():
        if not param.requires_grad:  # no optimizer has it, nor is it gathered
            param.mul_(factors_of_rows[:, None])
    for group in gathered:
        group.start_param_sync(force_sync=True)


def _bucket_groups(optimizer: AdamMiniOptimizer, params: Iterable[Parameter]) -> list[Any]:
    """Return the groups of buckets that hold parameters; none without sharded state."""
    if not optimizer.ddp_config.use_distributed_optimizer:
        return []
    found = [
        chunk.param_to_bucket_group.get(param)  # frozen ones have none
        for chunk in optimizer.model_chunks
        for param in params
    ]
    return list({id(group): group for group in found if group is not None}.values())


def _scale_(values: Tensor, factors: Tensor, begin: int, width: int) -> None:
    """Scale elements ``[begin, begin + len(values))`` of a matrix, whose rows have factors."""
    head = min(-begin % width, len(values))
    middle = head + (len(values) - head) // width * width
    first = (begin + head) // width
    if head:
        values[:head] *= factors[begin // width]
    rows = values[head:middle].view(-1, width)
    rows *= factors[first : first + len(rows), None]
    if middle < len(values):
        values[middle:] *= factors[first + len(rows)]


def _rows(*parts: tuple[Tensor, int]) -> Tensor:
    """Return factors by row: for each head or group, its factor of each part, so many times."""
    return torch.cat([factor[:, None].expand(-1, rows) for factor, rows in parts], dim=1).flatten()


def _is_latent(attention: Any) -> bool:
    return hasattr(attention, "linear_kv_up_proj")


def _weights(attention: Any) -> list[Parameter]:
    """Return the weight of Query, Key and Value, or the weights of latent attention."""
    if not _is_latent(attention):
        return [attention.linear_qkv.weight]
    name = "linear_q_proj" if attention.config.q_lora_rank is None else "linear_q_up_proj"
    return [getattr(attention, name).weight, attention.linear_kv_up_proj.weight]
