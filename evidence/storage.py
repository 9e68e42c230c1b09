"""The optimizer of Megatron runs, on one rank of a plain model: its state in fewer bits.

Imports torch, the package's engine and ``settings``. The model computes in float32 with weights
that are bfloat16 numbers, so that runs differ by the storage of the optimizer's state alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evidence.settings import STORAGES, Run
from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import partition_parameter
from megatron_adam_mini.plan.step_plan import DENSE, DomainLayout, plan_step
from megatron_adam_mini.standalone.names import weights_of

#: Relative change of the initial main parameters of a nudged run: far less than a bfloat16 has.
_NUDGE = 2.0**-16
#: Megatron pads slices to multiples of it.
_ALIGNMENT = 128
EMBEDDING = "embed_tokens.weight"


@dataclass
class _Flat:
    """A buffer as Megatron has them."""

    grad: Tensor
    weight: Tensor

    def values(self, where: slice) -> Tensor:
        """Return a part of the weights."""
        return self.weight[where]


class StoredAdamMini:
    """Adam-mini as Megatron runs have it, with as much of torch's interface as a run needs.

    Args:
        model: its parameters become views of one tensor, and bfloat16 numbers.
        run: preset, storage, rate.
        values: betas, eps and weight decay; one-dimensional parameters do not decay.

    Attributes:
        param_groups: of the engine.
    """

    def __init__(self, model: nn.Module, run: Run, values: dict[str, Any]) -> None:
        named = dict(model.named_parameters())
        roles = weights_of({name: tuple(param.shape) for name, param in named.items()})
        storage = dict(STORAGES[run.storage])
        nudged = storage.pop("nudged", False)
        config = AdamMiniConfig(preset=run.optimizer, **storage)
        self._blocks = [
            partition_parameter(
                ParameterInfo(name=name, shape=tuple(param.shape), role=roles[name].role), config
            )
            for name, param in named.items()
        ]
        placements = list(_placed(list(named.values())))
        numel = -(-placements[-1].end // _ALIGNMENT) * _ALIGNMENT
        flat = _Flat(torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16))
        self._weight, self._grad = flat.weight, flat.grad
        self._seen = torch.zeros(numel)  # the same numbers, as the model computes with them
        for param, place in zip(named.values(), placements, strict=True):
            where = slice(place.start, place.end)
            flat.weight[where] = param.detach().flatten()
            param.data = self._seen[where].view_as(param)
            param.grad = flat.grad[where].view_as(param)
        self._seen.copy_(flat.weight)
        layout = BufferLayout((BucketLayout(numel, 1, tuple(placements), 0),))
        self._engine = AdamMini(
            plan_step([*self._blocks], [DomainLayout(DENSE, (layout,))]),
            config,
            [flat],
            [DomainGroups()],
            [{**values, "lr": run.lr}, {**values, "lr": run.lr, "weight_decay": 0.0}],
            [int(param.ndim <= 1) for param in named.values()],
            device=flat.weight.device,
        )
        self.param_groups = self._engine.main_params.param_groups
        if nudged:
            for state, piece in self._pieces():
                param = state.as_float32(piece.window, "param") * (1.0 + _NUDGE)
                state.store(piece.window, {"param": param})
            self._seen.copy_(flat.weight)

    def step(self) -> None:
        """Take one step with the gradients as they are."""
        engine = self._engine
        decision = engine.decide(engine.sum_squares())
        engine.update(decision)
        engine.finish(decision)
        self._seen.copy_(self._weight)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self._grad.zero_()

    def manifest(self) -> list[dict[str, Any]]:
        """Return what each parameter is."""
        return [entry.manifest_entry() for entry in self._blocks]

    def norms(self) -> dict[str, float]:
        """Return the norms of m and of the main parameters, of all and of the embedding."""
        squares = dict.fromkeys(("m", "weights", "m of embedding", "embedding"), 0.0)
        for state, piece in self._pieces():
            m, param = (state.as_float32(piece.window, kind) for kind in ("exp_avg", "param"))
            parts = {"m": m, "weights": param}
            if self._blocks[piece.parameter].info.name == EMBEDDING:
                parts |= {"m of embedding": m, "embedding": param}
            for name, values in parts.items():
                squares[name] += float(values.double().square().sum())
        return {name: value**0.5 for name, value in squares.items()}

    def digest(self) -> str:
        """Return a hash of main parameters and m."""
        found = hashlib.sha256()
        for state, piece in self._pieces():
            for kind in ("param", "exp_avg"):
                found.update(state.as_float32(piece.window, kind).contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def _pieces(self) -> Iterator[tuple[Any, Any]]:
        state = self._engine.main_params.attach()
        for piece in self._engine.plan.pieces:
            yield state.of(piece), piece


def _placed(params: list[Tensor]) -> Iterator[Placement]:
    end = 0
    for index, param in enumerate(params):
        start = -(-end // 64) * 64  # as in Megatron's buffers
        end = start + param.numel()
        yield Placement(index, start, end)
