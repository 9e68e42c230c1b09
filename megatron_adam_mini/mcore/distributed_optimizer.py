"""The optimizer that Megatron's training loop holds: one object for all chunks of a rank.

Imports megatron.core and ``engine``. It replaces both Megatron's chain of optimizers and its
distributed optimizer: gradients are read where the reduce-scatter left them, and weights are
written where the parameter all-gather takes them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
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

from megatron_adam_mini.engine import Engine
from megatron_adam_mini.mcore import checkpoint

logger = logging.getLogger(__name__)

#: As in megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32.
_CLIP_EPS = 1.0e-6


class AdamMiniOptimizer(MegatronOptimizer):  # type: ignore[misc]
    """Adam-mini behind Megatron's optimizer interface.

    Built by ``factory.build_optimizer``; users get it from Megatron's ``get_megatron_optimizer``.

    Args:
        engine: state and step of this rank.
        config: Megatron's optimizer config.
        model_chunks: DDP-wrapped chunks.
        param_groups: groups of model parameters; schedulers write ``lr`` and ``weight_decay``.
        parameters: all trainable parameters, in the engine's numbering.
        manifest: partition of the whole model.
        groups: Megatron's process groups.

    Attributes:
        manifest: as above; the same on all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        config: OptimizerConfig,
        model_chunks: Sequence[Any],
        param_groups: list[dict[str, Any]],
        parameters: Sequence[Parameter],
        manifest: dict[str, Any],
        groups: ProcessGroupCollection,
    ) -> None:
        # MegatronOptimizer.__init__ is for a wrapped torch optimizer, which does not exist here.
        self.engine = engine
        self.config = config
        self.model_chunks = list(model_chunks)
        self.manifest = manifest
        self.grad_scaler = _grad_scaler(config)
        # Never a stub, also where nothing is trainable: each rank takes part in saving and norms.
        self.is_stub_optimizer = False
        self._groups = param_groups
        self._parameters = list(parameters)
        self._groups_of_ranks = groups
        self._pending_load: Any = None
        self._ddp_config: Any = model_chunks[0].ddp_config
        self._scale_one = torch.ones(1, dtype=torch.float32, device=engine.device)
        self._norm_sq: float | None = None
        self._grad_scale = 1.0
        self._warned_non_finite = False
        self._point_at_main_params()

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """Take one step; all ranks must call it.

        Clipping and the decision to skip the step are made on the device; the host waits for it
        only at the end, for what it has to return.

        Returns:
            ``(updated, grad_norm, num_zeros_in_grad)``. A step with a non-finite gradient on any
            rank is skipped everywhere: ``(False, None, None)``, with no state changed.
        """
        if self.engine.config.single_phase:
            return self._single_phase_step()
        with self._timer("optimizer-block-sums"):
            stats = self.engine.collect()
        with self._timer("optimizer-inner-step"):
            self.engine.update(self._grad_scale_of(stats))
        self._start_param_sync()
        found_inf = self._look_at(stats)
        if found_inf:
            self._norm_sq = None
            return False, None, None
        grad_norm = self.get_grad_norm()
        num_zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        self._norm_sq = None
        if grad_norm > self.config.grad_norm_skip_threshold:
            logger.info(
                "skipping a step: grad_norm %s exceeds grad_norm_skip_threshold %s",
                grad_norm,
                self.config.grad_norm_skip_threshold,
            )
            return False, grad_norm, num_zeros
        self.engine.step_count += 1
        return True, grad_norm, num_zeros

    def _single_phase_step(self) -> tuple[bool, float | None, int | None]:
        """Take a step that waits for no norm; Megatron, too, reports 0 without clipping."""
        with self._timer("optimizer-block-sums"):
            self.engine.collect_cut()
        with self._timer("optimizer-inner-step"):
            self.engine.update(1.0)
        self.engine.step_count += 1
        self._start_param_sync()
        return True, 0.0, self.count_zeros() if self.config.log_num_zeros_in_grad else None

    # The same phase by phase, for callers that drive a MegatronOptimizer themselves.

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Take all block sums; return whether any gradient of any rank is not finite."""
        if self.engine.config.single_phase:
            raise RuntimeError(
                "A single-phase step has no phases to drive one by one; call step(), or drop "
                "--adam-mini-single-phase."
            )
        with self._timer("optimizer-block-sums"):
            stats = self.engine.collect()
        return self._look_at(stats)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Return the norm of all gradients of the model, loss scale removed, before clipping."""
        if self._norm_sq is None:
            raise RuntimeError("get_grad_norm needs prepare_grads first: it takes the block sums.")
        return math.sqrt(self._norm_sq)

    @torch.no_grad()
    def clip_grad_norm(self, clip_grad: float) -> float:
        """Fold clipping into the update, and return the norm before it.

        The gradient itself is never rewritten: who reads ``main_grad`` after the step sees it
        unclipped.
        """
        grad_norm = self.get_grad_norm()
        if clip_grad > 0.0:
            self._grad_scale *= min(1.0, clip_grad / (grad_norm + _CLIP_EPS))
        return grad_norm

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update state and weights, and start Megatron's parameter all-gather."""
        if self._norm_sq is None:
            raise RuntimeError(
                "step_with_ready_grads needs prepare_grads first: it takes the block sums."
            )
        with self._timer("optimizer-inner-step"):
            self.engine.update(self._grad_scale)
        self.engine.step_count += 1
        self._norm_sq = None
        self._start_param_sync()
        return True

    def _grad_scale_of(self, stats: Tensor) -> Tensor:
        """Return inverse loss scale times clipping, on the device; NaN if the step is skipped."""
        # In the order of _look_at, so that host and device decide alike.
        inv_scale = torch.ones_like(stats[0])
        if self.grad_scaler is not None:
            inv_scale *= self.grad_scaler.inv_scale.squeeze()
        grad_norm = (stats[0] * inv_scale**2).sqrt()
        grad_scale = inv_scale
        if self.config.clip_grad > 0.0:
            grad_scale = inv_scale * (self.config.clip_grad / (grad_norm + _CLIP_EPS)).clamp(
                max=1.0
            )
        skip = (stats[1] > 0) | ~grad_norm.isfinite()
        skip |= grad_norm > self.config.grad_norm_skip_threshold
        return grad_scale.masked_fill(skip, math.nan)

    def _look_at(self, stats: Tensor) -> bool:
        """Wait for the block sums, tell the loss scaler; return whether any is not finite."""
        norm_sq, num_non_finite = stats.tolist()
        found_inf = num_non_finite > 0 or not math.isfinite(norm_sq)
        inv_scale = 1.0
        if self.grad_scaler is not None:
            inv_scale = float(self.grad_scaler.inv_scale)
            self.grad_scaler.update(found_inf)
        elif found_inf and not self._warned_non_finite:
            self._warned_non_finite = True
            logger.warning(
                "skipping a step with non-finite gradients; optimizer state and weights are "
                "unchanged (further skipped steps are only counted in Megatron's log)"
            )
        self._norm_sq = norm_sq * inv_scale**2
        self._grad_scale = inv_scale
        return found_inf

    def _start_param_sync(self) -> None:
        """Start Megatron's all-gather of weights, unless the next forward pass does."""
        if self._ddp_config.use_distributed_optimizer and not (
            self._ddp_config.overlap_param_gather
        ):
            with self._timer("params-all-gather"):
                for chunk in self.model_chunks:
                    chunk.start_param_sync()

    @torch.no_grad()
    def count_zeros(self) -> int:
        """Return the number of zeros in the model's gradients, each parameter counted once."""
        domains = self.engine.domains
        counts = torch.zeros(len(domains), dtype=torch.int64, device=self.engine.device)
        for piece in self.engine.pieces():
            if self.engine.parameters[piece.parameter].info.in_norm:
                grad = piece.bucket.source.grad[piece.window]
                counts[domains.index(piece.bucket.domain)] += (grad == 0).sum()
        for count, domain in zip(counts, domains, strict=True):
            distributed.all_reduce(count, group=domain.norm_group)
        return int(counts.sum())

    # What the training loop asks of any optimizer.

    @property
    def chained_optimizers(self) -> list[AdamMiniOptimizer]:
        """The optimizer itself: Megatron's loop walks the members of its chain."""
        return [self]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups, equal in number and order on all ranks."""
        return self._groups

    def get_parameters(self) -> list[Parameter]:
        """Return the model parameters that this optimizer updates."""
        return list(self._parameters)

    def get_grad_stats_parallel_group(self) -> distributed.ProcessGroup | None:
        """Return the group over which gradient statistics are added."""
        return self.engine.domains[0].norm_group

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop ``.grad`` of all parameters; Megatron zeroes its buffers itself."""
        for param in self._parameters:
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

    @torch.no_grad()
    def reload_model_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Copy model weights to the main parameters, after somebody changed the weights."""
        if state_dict is not None:
            raise NotImplementedError(
                "Adam-mini cannot take main parameters from a model state dict "
                "(--load-main-params-from-ckpt); drop the flag to start from the model's weights."
            )
        for bucket in self.engine.buckets:
            bucket.state.take_weights()

    def state_bytes(self) -> dict[str, int]:
        """Return this rank's optimizer state in bytes: main_param, exp_avg, exp_avg_sq."""
        return self.engine.state_bytes()

    def communication_per_step(self) -> dict[str, Any]:
        """Return what Adam-mini adds per step on this rank: collectives, bytes, by group."""
        return self.engine.communication_per_step()

    # Checkpoints; see the module ``checkpoint``.

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return what this rank writes to a ``torch_dist`` checkpoint, or reads from one.

        Args:
            model_sharded_state_dict: the model's sharded state dict, parameters and all.
            is_loading: whether to read.
            metadata: content metadata of the checkpoint; on save, what identifies Adam-mini's
                state is added to it (modified in place).

        Raises:
            ValueError: the checkpoint's state is of another partition, or of another optimizer.
        """
        if is_loading:
            return checkpoint.state_to_load(self, model_sharded_state_dict, metadata)
        return checkpoint.state_to_save(self, model_sharded_state_dict, metadata)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint load returned; all ranks must call it."""
        checkpoint.take_over(self, state_dict)

    @property
    def replica_number(self) -> int | None:
        """Number of the optimizer instance, by which holders of one slice are told apart.

        ``None`` without the distributed optimizer: every data-parallel rank holds everything.
        """
        if not self._ddp_config.use_distributed_optimizer:
            return None
        if self._ddp_config.num_distributed_optimizer_instances == 1:
            return 0
        return int(self._groups_of_ranks.inter_dist_opt.rank())

    @property
    def model_parallel_rank(self) -> int:
        """This rank's number among the model's tensor- and pipeline-parallel parts."""
        return int(self._groups_of_ranks.mp.rank())

    @property
    def layout_sizes(self) -> dict[str, int]:
        """Sizes of the parallel layout, for the record in checkpoints."""
        groups = self._groups_of_ranks
        return {
            "tensor": groups.tp.size(),
            "pipeline": groups.pp.size(),
            "virtual_pipeline": len(self.model_chunks),
            "context": groups.cp.size(),
            "data": groups.dp_cp.size() // groups.cp.size(),
            "distributed_optimizer": int(self._ddp_config.use_distributed_optimizer),
        }

    @torch.no_grad()
    def store(self, states: Mapping[int, dict[str, Tensor]]) -> None:
        """Take over loaded state and write model weights, on all ranks; all must call it.

        Megatron reads the model's weights on its own, and they need not be the rounded main
        parameters (another precision, another checkpoint).

        Args:
            states: what ``state_entries.float_states`` returned, after it was read into.
        """
        for bucket in self.engine.buckets:
            bucket.state.store(states[id(bucket)])
        if self._ddp_config.use_distributed_optimizer:
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

    def state_dict(self) -> dict[str, Any]:
        """Refuse: a state dict of one rank's slices could not be loaded anywhere else."""
        raise NotImplementedError(checkpoint.ONLY_TORCH_DIST)

    save_parameter_state = load_parameter_state = state_dict

    def offload_to_cpu(self) -> None:
        """Not supported: the state is views of one flat tensor per bucket."""
        raise NotImplementedError("Adam-mini's state cannot be offloaded to the CPU yet.")

    restore_from_cpu = offload_to_cpu

    def _timer(self, name: str) -> Any:
        timers = self.config.timers
        if timers is None:
            return _NoTimer()
        return _RunningTimer(timers(name, log_level=1), self.config.barrier_with_L1_time)

    def _point_at_main_params(self) -> None:
        """Give 16-bit parameters the ``main_param`` view that Megatron's parameter norm reads.

        Remainders have no such view; Megatron then takes the norm of the weights.
        """
        if self.engine.config.param_remainders:
            return
        sharded = bool(self._ddp_config.use_distributed_optimizer)
        for param in self._parameters:
            if param.dtype != torch.float32:
                param.main_param = None  # type: ignore[attr-defined]
                param.main_param_sharded = sharded  # type: ignore[attr-defined]
        for piece in self.engine.pieces():
            state = piece.bucket.state
            if state.owns_main_param:
                param = self._parameters[piece.parameter]
                param.main_param = state.main_param[piece.window]  # type: ignore[attr-defined]


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


class _NoTimer:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


class _RunningTimer:
    def __init__(self, timer: Any, barrier: bool) -> None:
        self._timer, self._barrier = timer, barrier

    def __enter__(self) -> None:
        self._timer.start(barrier=self._barrier)

    def __exit__(self, *exc: object) -> None:
        self._timer.stop()
