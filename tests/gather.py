"""Collect what every rank holds, and put whole tensors together from it.

The first half runs inside the ranks, the second half in the test. Nothing here asks the package
which block an element belongs to: that is the oracle's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.piece_values import v_per_element
from tests.megatron_job import (
    Job,
    Trainer,
    global_names,
    parts_of,
    split_dim_of,
    split_rank,
    split_size,
)


@dataclass(frozen=True)
class Part:
    """Elements ``[begin, end)`` of one tensor-parallel shard of a parameter."""

    name: str
    shape: tuple[int, ...]
    split_dim: int | None
    tp_rank: int
    pp_rank: int
    begin: int
    values: dict[str, np.ndarray]


def nearest_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16, ties away from zero (torch's own rule differs at ties)."""
    return ((values.view(torch.int32) + 0x8000) >> 16 << 16).view(torch.float32)


def weights_of(trainer: Trainer) -> list[Part]:
    """Return the model weights of this rank as float32 (all of its shard)."""
    return [
        _part(trainer, name, param, 0, {"weight": param.detach().float()})
        for name, param in global_names(trainer.chunks).items()
    ]


def slices_of(trainer: Trainer, *, grads_only: bool = False) -> list[Part]:
    """Return what the optimizer of this rank owns: grad, and param, exp_avg, v per element."""
    names = {param: name for name, param in global_names(trainer.chunks).items()}
    inner = trainer.optimizer.inner
    held_state = inner.main_params.attach()
    params = trainer.optimizer.member.model_params
    parts = []
    for piece in inner.plan.pieces:
        param = params[piece.parameter]
        tensors = {"grad": inner.grad(piece)}
        if not grads_only:
            state = held_state.of(piece)
            stored = held_state.v_of_elements if piece.is_elementwise else held_state.v_of_segments
            v = v_per_element(inner.plan, piece, stored(piece))
            floats = {key: state.as_float32(piece.window, key) for key in ("param", "exp_avg")}
            tensors |= {**floats, "v": v}
        values = {key: tensor.float() for key, tensor in tensors.items()}
        parts.append(_part(trainer, names[param], param, piece.begin, values))
    return parts


def _part(
    trainer: Trainer, name: str, param: Tensor, begin: int, values: dict[str, Tensor]
) -> Part:
    from megatron.core import parallel_state

    split = split_size(name, trainer.job) > 1
    return Part(
        name=name,
        shape=tuple(param.shape),
        split_dim=split_dim_of(name, param) if split else None,
        tp_rank=split_rank(name),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        begin=begin,
        values={key: value.detach().reshape(-1).numpy().copy() for key, value in values.items()},
    )


def whole_tensors(ranks: list[list[Part]], key: str, job: Job) -> dict[str, Tensor]:
    """Put whole tensors together; every element must be there, and copies must be bit-equal.

    Copies are: the same elements on several data-parallel ranks, replicas on tensor-parallel
    ranks, tied embeddings on two pipeline stages.
    """
    shards: dict[tuple[str, int, int], tuple[Part, np.ndarray]] = {}
    for parts in ranks:
        for part in parts:
            where = (part.name, part.tp_rank, part.pp_rank)
            if where not in shards:
                shards[where] = (part, np.full(int(np.prod(part.shape)), np.inf, np.float32))
            flat = shards[where][1]
            value = part.values[key]
            window = flat[part.begin : part.begin + len(value)]
            seen = ~np.isinf(window)
            assert np.array_equal(window[seen], value[seen], equal_nan=True), (
                f"{part.name}: copies differ within the data-parallel group"
            )
            window[:] = value
    names = sorted({name for name, _, _ in shards})
    found = {}
    for name in names:
        stages = {}
        for (other, tp_rank, pp_rank), (part, flat) in shards.items():
            if other == name:
                assert not np.isinf(flat).any(), f"{name}: elements that no rank holds"
                stages.setdefault(pp_rank, {})[tp_rank] = (part, flat.reshape(part.shape))
        wholes = [_join(name, by_rank, job) for by_rank in stages.values()]
        for other in wholes[1:]:
            assert np.array_equal(wholes[0], other, equal_nan=True), f"{name}: stages differ"
        found[name] = torch.from_numpy(wholes[0])
    return found


def _join(name: str, by_rank: dict[int, Any], job: Job) -> np.ndarray:
    part = by_rank[0][0]
    pieces = [by_rank[rank][1] for rank in range(split_size(name, job))]
    if part.split_dim is None:
        for piece in pieces[1:]:
            assert np.array_equal(pieces[0], piece, equal_nan=True), (
                f"{name}: tensor-parallel replicas differ"
            )
        return pieces[0]
    parts = parts_of(name, sum(len(piece) for piece in pieces), job)
    if parts is not None:
        ends = np.cumsum(parts)[:-1] // len(pieces)
        split = [np.split(piece, ends) for piece in pieces]
        return np.concatenate([shards[i] for i in range(len(parts)) for shards in split])
    return np.concatenate(pieces, axis=part.split_dim)
