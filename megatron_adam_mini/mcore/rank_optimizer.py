"""One rank's optimizer as Megatron's callers know it: groups, buffers, process groups, loss scale.

Imports megatron.core and ``optimizer``. ``saved_state`` adds what saves, loads and moves the state,
``distributed_optimizer`` the step. ``docs/megatron-contract.md`` compares them with Megatron's own,
name by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.grad_scaler import (
    ConstantGradScaler,
    DynamicGradScaler,
    MegatronGradScaler,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, distributed
from torch.nn import Parameter

from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.quantized import Shard, quantize_, quantized_in
from megatron_adam_mini.mcore.slices import buffers_of
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.step_plan import EXPERT, Piece


class RankOptimizer(MegatronOptimizer):  # type: ignore[misc]
    """What an optimizer of Megatron has beside its step and its checkpoints.

    Args:
        inner: state and step of this rank.
        config: Megatron's optimizer config.
        model_chunks: DDP-wrapped chunks.
        model_params: all trainable parameters, in the plan's numbering.
        manifest: partition of the whole model.
        groups: Megatron's process groups.
        domain_groups: process groups of each of the plan's domains.

    Attributes:
        inner, model_chunks, model_params, manifest, domain_groups: as above.
        data_parallel_group: group whose ranks share the state of dense parameters, ``None`` without
            the distributed optimizer.
        optimizer: parameter groups and state as torch's optimizers have them, see ``MainParams``.
        ddp_config: of the chunks.
    """

    def __init__(
        self,
        inner: AdamMini,
        config: OptimizerConfig,
        model_chunks: Sequence[Any],
        model_params: Sequence[Parameter],
        manifest: dict[str, Any],
        groups: ProcessGroupCollection,
        domain_groups: Sequence[DomainGroups],
    ) -> None:
        # Callers make the state of an optimizer that has none, as of a rank without parameters.
        super().__init__(inner.main_params, config, init_state_fn=lambda *_: None)
        self.inner = inner
        self.model_chunks = list(model_chunks)
        self.model_params = list(model_params)
        self.domain_groups = list(domain_groups)
        self.data_parallel_group = self.domain_groups[0].dp
        self.manifest = manifest
        # FP8 weights of each domain, in the order that its data-parallel ranks agree on.
        self._quantized = [
            quantized_in(buffers_of(model_chunks, expert=domain.name == EXPERT))
            for domain in inner.plan.domains
        ]
        self.grad_scaler = _grad_scaler(config)
        # Never a stub, even without trainable parameters: each rank takes part in saves and norms.
        self.is_stub_optimizer = False
        self.ddp_config: Any = model_chunks[0].ddp_config
        self._groups_of_ranks = groups
        self.tp_group = groups.tp
        self.expert_tp_group = compat.expert_tp_group(groups)
        self.grad_stats_parallel_group = inner.collectives.norm_group
        self.grad_norms_by_group: dict[str, float] = {}
        self.found_inf = torch.zeros(1, dtype=torch.float32, device=inner.device)
        self._scale_one = torch.ones(1, dtype=torch.float32, device=inner.device)
        self._describe_shards()

    # What the training loop needs of any optimizer.

    def get_grad_stats_parallel_group(self) -> distributed.ProcessGroup | None:
        """Return the group over which gradient statistics are added."""
        return self.inner.collectives.norm_group

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop ``.grad`` of all parameters and shards; Megatron zeroes its buffers itself."""
        for param in (*self.model_params, *self.optimizer.shards):
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    def get_loss_scale(self) -> Tensor:
        """Return the loss scale, shape ``(1,)``."""
        if self.grad_scaler is None:
            return self._scale_one
        scale: Tensor = self.grad_scaler.scale
        return scale

    @property
    def groups_of_parts(self) -> list[distributed.ProcessGroup]:
        """Groups whose ranks hold different parameters: of experts if there are any, of stages."""
        experts = any(domain.name == EXPERT for domain in self.inner.plan.domains)
        return [self._groups_of_ranks.ep] * experts + [self._groups_of_ranks.pp]

    # What this rank has.

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's optimizer state: main_param, exp_avg, exp_avg_sq."""
        return self.inner.state_bytes()

    def communication_per_step(self) -> dict[str, Any]:
        """Return what Adam-mini adds per step on this rank: collectives, and bytes by group."""
        return self.inner.collectives.per_step()

    @property
    def buffers(self) -> list[Any]:
        """Megatron's parameter and gradient buffers of all chunks; those of experts come last."""
        return [
            buffer
            for expert in (False, True)
            for buffer in buffers_of(self.model_chunks, expert=expert)
        ]

    @property
    def data_parallel_group_idx(self) -> int:
        """Number of this rank's part of the model, among tensor- and pipeline-parallel parts."""
        return int(self._groups_of_ranks.mp.rank())

    @property
    def data_parallel_group_gloo(self) -> distributed.ProcessGroup | None:
        """The data-parallel group on the CPU, if Megatron made it."""
        return self._gloo_groups()[0]

    def _gloo_groups(self) -> list[distributed.ProcessGroup | None]:
        return [
            None if groups.dp is None else compat.gloo_group_like(groups.dp)
            for groups in self.domain_groups
        ]

    @property
    def distributed_optimizer_instance_id(self) -> int:
        """Number of this rank's optimizer instance."""
        return self._replica() or 0

    def _replica(self) -> int | None:
        if not self.ddp_config.use_distributed_optimizer:
            return None
        if self.ddp_config.num_distributed_optimizer_instances == 1:
            return 0
        return int(self._groups_of_ranks.inter_dist_opt.rank())

    # Weights that are quantized.

    def _quantize_weights(self) -> None:
        """Make FP8 weights of the main parameters; all data-parallel ranks must call it."""
        if not any(self._quantized):
            return
        state = self.optimizer.attach()
        shards: dict[Parameter, Shard] = {
            self.model_params[piece.parameter]: (
                state.of(piece).main_param(piece.window),
                piece.begin,
            )
            for piece in self.inner.plan.pieces
        }
        for params, groups in zip(self._quantized, self.domain_groups, strict=True):
            quantize_(params, shards.get, groups.dp)

    # Model parameters and their shards, by parameter group.

    @property
    def model_float16_groups(self) -> list[list[Tensor]]:
        """16-bit model parameters of which this rank has a shard, by parameter group."""
        return self._by_group(lambda param, _, __: None if _is_float32(param) else param)

    @property
    def model_fp32_groups(self) -> list[list[Tensor]]:
        """Float32 model parameters of which this rank has a shard, by parameter group."""
        return self._by_group(lambda param, _, __: param if _is_float32(param) else None)

    @property
    def shard_float16_groups(self) -> list[list[Tensor]]:
        """This rank's parts of :attr:`model_float16_groups`, 1-D views of the weights."""
        return self._by_group(
            lambda param, piece, _: None if _is_float32(param) else self.inner.weight(piece)
        )

    @property
    def shard_fp32_groups(self) -> list[list[Tensor]]:
        """This rank's parts of :attr:`model_fp32_groups`: main shards that are weights."""
        return self._by_group(lambda param, _, shard: shard if _is_float32(param) else None)

    @property
    def shard_fp32_from_float16_groups(self) -> Sequence[Sequence[Tensor | None]]:
        """Float32 main shards of :attr:`model_float16_groups`; with remainders ``None`` for each.

        So does Megatron's precision-aware optimizer, and callers that need main shards can tell.
        """
        if self.inner.config.param_remainders:
            return [[None] * len(group) for group in self.model_float16_groups]
        return self._by_group(lambda param, _, shard: None if _is_float32(param) else shard)

    def _model_params_by_group(self) -> list[list[Parameter]]:
        found: Any = self._by_group(lambda param, _, __: param)
        return list(found)

    def _by_group(
        self, select: Callable[[Parameter, Piece, Tensor], Tensor | None]
    ) -> list[list[Tensor]]:
        pieces = zip(self.optimizer.shards, self.inner.plan.pieces, strict=True)
        of_shard = {shard: (self.model_params[piece.parameter], piece) for shard, piece in pieces}
        found = [
            [select(*of_shard[shard], shard) for shard in group["params"]]
            for group in self.param_groups
        ]
        return [[tensor for tensor in group if tensor is not None] for group in found]

    def _describe_shards(self) -> None:
        """Give shards Megatron's attributes of their parameters, and parameters ``main_param``.

        Megatron's parameter norm reads it. Remainders allow no such view; ``metrics`` helps the
        norm then. The order within groups is that of Megatron's Adam.
        """
        owned = not self.inner.config.param_remainders
        for param in self.model_params:
            if owned and not _is_float32(param):
                param.main_param = None  # type: ignore[attr-defined]
                param.main_param_sharded = bool(  # type: ignore[attr-defined]
                    self.ddp_config.use_distributed_optimizer
                )
        for piece, shard in zip(self.inner.plan.pieces, self.optimizer.shards, strict=True):
            param = self.model_params[piece.parameter]
            compat.copy_attributes(shard, param)
            if owned and not _is_float32(param):
                param.main_param = shard  # type: ignore[attr-defined]
        is_sharded = self.ddp_config.use_distributed_optimizer
        self.optimizer.sort_shards(
            lambda piece: (
                not _is_float32(self.model_params[piece.parameter])
                if is_sharded
                else piece.parameter
            )
        )

    @contextmanager
    def _timer(self, name: str) -> Iterator[None]:
        timers = self.config.timers
        if timers is None:
            yield
            return
        timer = timers(name, log_level=1)
        timer.start(barrier=self.config.barrier_with_L1_time)
        try:
            yield
        finally:
            timer.stop()


def _is_float32(param: Tensor) -> bool:
    return param.dtype == torch.float32


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """Choose the loss scaler as Megatron does for its own optimizers."""
    if not (config.fp16 or config.bf16 or config.use_distributed_optimizer):
        return None
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if config.fp16:
        return DynamicGradScaler(
            initial_scale=config.initial_loss_scale,
            min_scale=config.min_loss_scale,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=config.loss_scale_window,
            hysteresis=config.hysteresis,
        )
    return None
