"""Adam-mini in the place of Megatron's distributed optimizer, for all model chunks of a rank.

Imports megatron.core and ``optimizer``. It reads gradients where the reduce-scatter left them, and
writes weights where the parameter all-gather reads them. ``docs/megatron-contract.md`` compares it
with Megatron's own, name by name.
"""

from __future__ import annotations

import logging
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

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore import checkpoint, compat, parameter_state
from megatron_adam_mini.mcore.distributed_names import DistributedNames
from megatron_adam_mini.mcore.entries import StateView
from megatron_adam_mini.mcore.model_space import ModelEntries
from megatron_adam_mini.mcore.state_part import StatePart, part_of
from megatron_adam_mini.optimizer import AdamMini, Decision, Outcome
from megatron_adam_mini.plan.step_plan import Piece
from megatron_adam_mini.wide_sums import WideSums

logger = logging.getLogger(__name__)

#: The pass that takes block sums, norm and clipping factor. Megatron prints the timers that it
#: knows by name, and no others.
_SUMS_TIMER = "optimizer-clip-main-grad"


class AdamMiniOptimizer(DistributedNames, MegatronOptimizer):  # type: ignore[misc]
    """Adam-mini behind Megatron's optimizer interface.

    Built by ``factory.build_optimizer``; users get it from Megatron's ``get_megatron_optimizer``,
    as the only member of a chain.

    Args:
        inner: state and step of this rank.
        config: Megatron's optimizer config.
        model_chunks: DDP-wrapped chunks.
        model_params: all trainable parameters, in the plan's numbering.
        manifest: partition of the whole model.
        groups: Megatron's process groups.
        data_parallel_group: group whose ranks share the state, ``None`` without the distributed
            optimizer.

    Attributes:
        inner, model_chunks, model_params, manifest, data_parallel_group: as above.
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
        data_parallel_group: distributed.ProcessGroup | None,
    ) -> None:
        # Callers make the state of an optimizer that has none, as of a rank without parameters.
        super().__init__(inner.main_params, config, init_state_fn=lambda *_: None)
        self.inner = inner
        self.model_chunks = list(model_chunks)
        self.model_params = list(model_params)
        self.data_parallel_group = data_parallel_group
        self.manifest = manifest
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
        # Sums of squares in float32 or, too, in float64, and the inverse loss scale.
        self._sums: tuple[Tensor, WideSums | None, Tensor | None] | None = None
        self._decision: Decision | None = None
        self._clip_grad = 0.0
        self._warned: set[str] = set()
        self._describe_shards()

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """Take one step; all ranks must call it.

        Clipping, and whether to skip the step, are computed on the device; the host waits for it
        only at the end, for the values to return.

        Returns:
            ``(updated, grad_norm, num_zeros_in_grad)``; the norm is ``None`` in a single-phase
            step, which does not know it. A step with a non-finite gradient on any rank is skipped
            everywhere: ``(False, None, None)``, with no state changed. If all are finite, but v
            would not fit into float32: ``(False, grad_norm, num_zeros_in_grad)``.
        """
        self._sums = self._decision = None
        decision = self._decide_at_once()
        self._update(decision)
        if decision.in_doubt:
            decision = self._decide(*self._wide_sums())
            if decision.read().updated:
                self._update(decision)
        outcome = self.inner.finish(decision)
        self._tell_scaler(outcome)
        self._report(decision)
        if outcome.found_inf:
            return False, None, None
        num_zeros = None
        if self.config.log_num_zeros_in_grad:
            with self._timer("optimizer-count-zeros"):
                num_zeros = self.count_zeros()
        if not outcome.updated and decision.problem is None:
            logger.info(
                "skipping a step: grad_norm %s exceeds grad_norm_skip_threshold %s",
                outcome.grad_norm,
                compat.grad_norm_skip_threshold(self.config),
            )
        return outcome.updated, outcome.grad_norm, num_zeros

    def _decide_at_once(self) -> Decision:
        """Compute all sums and decide, without waiting for the device."""
        with self._timer(_SUMS_TIMER):
            if self.inner.config.single_phase:
                self.inner.sum_squares_of_cut_blocks()
                return Decision()
            return self._decide(self.inner.sum_squares())

    def _decide(self, stats: Tensor, wide: WideSums | None = None) -> Decision:
        return self.inner.decide(
            stats,
            wide,
            inv_scale=self._inv_scale(),
            clip_grad=self.config.clip_grad,
            skip_threshold=compat.grad_norm_skip_threshold(self.config),
        )

    def _wide_sums(self) -> tuple[Tensor, WideSums]:
        with self._timer(_SUMS_TIMER):
            return self.inner.sum_squares_in_float64()

    # The same phase by phase, for callers that drive a MegatronOptimizer themselves.

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Compute all sums; return whether any gradient of any rank is not finite.

        ``.grad`` of each main shard is its gradient from here on, for callers that change it.
        """
        if self.inner.config.single_phase:
            raise RuntimeError(
                "A single-phase step has no phases to drive one by one; call step(), or drop "
                "--adam-mini-single-phase."
            )
        with self._timer(_SUMS_TIMER):
            # The loss scale of these gradients: the scaler changes it before they are used.
            self._sums = self.inner.sum_squares(), None, self._inv_scale()
        self._clip_grad = 0.0
        decision = self._decide_phase()
        self._lend_gradients()
        outcome = decision.read()
        self._tell_scaler(outcome)
        if outcome.found_inf:
            self._report(decision)
        return outcome.found_inf

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Return the norm of the model's gradient, without the loss scale, before clipping."""
        grad_norm = self._decided("get_grad_norm").read().grad_norm
        assert grad_norm is not None
        return grad_norm

    @torch.no_grad()
    def clip_grad_norm(self, clip_grad: float) -> float:
        """Set the clipping factor of the update, and return the norm before clipping.

        Gradients are never rewritten: after the step, ``main_grad`` is unclipped.
        """
        self._decided("clip_grad_norm")
        self._clip_grad = clip_grad
        self._decide_phase()
        return self.get_grad_norm()

    def _decide_phase(self) -> Decision:
        assert self._sums is not None
        stats, wide, inv_scale = self._sums
        decision = self.inner.decide(stats, wide, inv_scale=inv_scale, clip_grad=self._clip_grad)
        if decision.in_doubt:
            self._sums = (*self._wide_sums(), inv_scale)
            return self._decide_phase()
        self._decision = decision
        return decision

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update state and weights, and start Megatron's parameter all-gather.

        Sums are taken again: the caller may have clipped the gradients of the main shards.
        """
        self._decided("step_with_ready_grads")
        assert self._sums is not None
        _, _, inv_scale = self._sums
        self._take_gradients_back()
        with self._timer(_SUMS_TIMER):
            self._sums = self.inner.sum_squares(), None, inv_scale
        decision = self._decide_phase()
        self._update(decision)
        self._sums = self._decision = None
        outcome = self.inner.finish(decision)
        self._report(decision)
        return outcome.updated

    def _lend_gradients(self) -> None:
        """Let ``.grad`` of the main shards be their gradients, still with the loss scale.

        They are views of float32 gradients and copies of others. Shards that are 16-bit weights,
        completed by remainders, cannot have float32 gradients, and have none.
        """
        for shard, piece in zip(self.optimizer.shards, self.inner.plan.pieces, strict=True):
            if _is_float32(shard):
                shard.grad = self.inner.grad(piece).float()

    def _take_gradients_back(self) -> None:
        for shard, piece in zip(self.optimizer.shards, self.inner.plan.pieces, strict=True):
            grad = self.inner.grad(piece)
            if shard.grad is not None and shard.grad.data_ptr() != grad.data_ptr():
                grad.copy_(shard.grad)

    def _decided(self, caller: str) -> Decision:
        if self._decision is None:
            raise RuntimeError(f"{caller} needs prepare_grads first: it takes the block sums.")
        return self._decision

    def _inv_scale(self) -> Tensor | None:
        return None if self.grad_scaler is None else self.grad_scaler.inv_scale

    def _update(self, decision: Decision) -> None:
        """Update state and weights; start their all-gather unless the forward pass does that."""
        with self._timer("optimizer-inner-step"):
            self.inner.update(decision)
        if self.ddp_config.use_distributed_optimizer and not (self.ddp_config.overlap_param_gather):
            with self._timer("params-all-gather"):
                for chunk in self.model_chunks:
                    chunk.start_param_sync()

    def _tell_scaler(self, outcome: Outcome) -> None:
        if self.grad_scaler is not None:
            self.found_inf.fill_(outcome.found_inf)
            self.grad_scaler.update(outcome.found_inf)

    def _report(self, decision: Decision) -> None:
        """Log, once of each kind, what float32 cannot hold: on rank 0 and where it is."""
        outcome, wide, problem = decision.read(), decision.wide, decision.problem
        if wide is None or (outcome.found_inf and self.grad_scaler is not None):
            return  # with a loss scale, gradients that are not finite are nothing special
        if not (outcome.updated or outcome.found_inf or problem):
            return  # above the threshold of norms
        kind = "non-finite" if outcome.found_inf else problem or "float64"
        if kind in self._warned:
            return
        self._warned.add(kind)
        names = wide.non_finite_names() if outcome.found_inf else decision.names
        finite = f"gradients are finite (norm {outcome.grad_norm:.3g})"
        if outcome.updated:
            text = (
                f"{finite}, but sums of their squares overflow float32, or nearly: such steps take "
                "sums in float64, and longer (further ones are not logged)"
            )
        else:
            reason = "non-finite gradients" if outcome.found_inf else f"{finite}, but {problem}"
            text = (
                f"skipping a step: {reason}; optimizer state and weights are unchanged (further "
                "skipped steps are only counted in Megatron's log)"
            )
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            text += f". On this rank: {', '.join(names[:5])}{more}"
        if names or not distributed.is_initialized() or distributed.get_rank() == 0:
            logger.warning(text)

    def count_zeros(self) -> int:
        """Return the number of zeros in the model's gradients, each parameter counted once."""
        return self.inner.count_zeros()

    # What the training loop needs of any optimizer.

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[Tensor]:
        """Return this rank's gradients that count in the norm, without the loss scale.

        Args:
            grad_norm_group: parameters with a norm of their own, which Adam-mini refuses: none.
        """
        if grad_norm_group is not None:
            return []
        inv_scale = self._inv_scale()
        grads = [
            self.inner.grad(piece)
            for piece in self.inner.plan.pieces
            if self.inner.plan.parameters[piece.parameter].info.in_norm
        ]
        return grads if inv_scale is None else [grad * inv_scale for grad in grads]

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

    @torch.no_grad()
    def reload_model_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Copy model weights to the main parameters, after the weights were changed."""
        if state_dict is not None:
            raise NotImplementedError(
                "Adam-mini cannot take main parameters from a model state dict "
                "(--load-main-params-from-ckpt); drop the flag to start from the model's weights."
            )
        self._copy_model_params_to_main_params()

    # Names that tools and frameworks use.

    @property
    def buffers(self) -> list[Any]:
        """Megatron's parameter and gradient buffers of all chunks."""
        return [buffer for chunk in self.model_chunks for buffer in chunk.buffers]

    @property
    def data_parallel_group_idx(self) -> int:
        """Number of this rank's part of the model, among tensor- and pipeline-parallel parts."""
        return int(self._groups_of_ranks.mp.rank())

    @property
    def data_parallel_group_gloo(self) -> distributed.ProcessGroup | None:
        """The data-parallel group on the CPU, if Megatron made it."""
        if self.data_parallel_group is None:
            return None
        return compat.gloo_group_like(self.data_parallel_group)

    @property
    def distributed_optimizer_instance_id(self) -> int:
        """Number of this rank's optimizer instance."""
        return self._replica() or 0

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

    @torch.no_grad()
    def _copy_main_params_to_model_params(self) -> None:
        """Set this rank's weights to the rounded main parameters; gathers nothing."""
        for held in self.optimizer.attach().buffers:
            held.write_weights()

    @torch.no_grad()
    def _copy_main_params_to_param_buffer(self) -> None:
        """Do the same, and let the next forward pass gather weights again if it overlaps that."""
        self._copy_main_params_to_model_params()
        if self.ddp_config.use_distributed_optimizer:
            for chunk in self.model_chunks:
                compat.gather_again(chunk)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self) -> None:
        """Set the main parameters to this rank's weights."""
        self.optimizer.take_weights()

    @torch.no_grad()
    def exp_avg_sq_per_element(self, shard: Tensor) -> Tensor:
        """Return v of every element of a main shard, float32, shape ``(n,)``."""
        found: Tensor = self.optimizer.exp_avg_sq_per_element(shard)
        return found

    def offload_to_cpu(self) -> None:
        """Move all state to the CPU, and free its memory on the device.

        A step or a load brings it back, too; a save leaves it there.
        """
        self.optimizer.move_to("cpu")
        torch.cuda.empty_cache()

    def restore_from_cpu(self) -> None:
        """Move the state back to the device."""
        self.optimizer.attach()

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's optimizer state: main_param, exp_avg, exp_avg_sq."""
        return self.inner.state_bytes()

    def communication_per_step(self) -> dict[str, Any]:
        """Return what Adam-mini adds per step on this rank: collectives, and bytes by group."""
        return self.inner.collectives.per_step()

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
            model_sharded_state_dict: the model's whole sharded state dict.
            is_loading: whether to read.
            metadata: content metadata of the checkpoint that is read. Without Adam-mini's identity
                in it, ``dist_checkpointing.load`` finds out what the checkpoint holds.

        Raises:
            ValueError: the state that ``metadata`` describes has another partition, or the model's
                state dict lacks a parameter.
        """
        part = StatePart(self, ModelEntries(model_sharded_state_dict))
        if not is_loading:
            return part.to_save()
        return on_all_ranks(lambda: part.to_load(metadata), "Adam-mini's state cannot be loaded")

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store what a checkpoint load returned; all ranks must call it.

        Raises:
            RuntimeError: the dict is of a torch_dist checkpoint, and no load was prepared.
            ValueError: nothing was read, or parameter groups do not match this run.
        """
        part = part_of(state_dict)
        if part is None and "optimizer" in state_dict:
            self._load_legacy(state_dict)
            return
        if part is None:
            raise RuntimeError(
                "Adam-mini's load_state_dict needs what state_dict() returned; or, for a "
                "torch_dist checkpoint, sharded_state_dict(..., is_loading=True) before the load."
            )
        read = on_all_ranks(lambda: part.taken_by(self), "Adam-mini's state cannot be loaded")
        self.optimizer.put_back(read.state)
        checkpoint.finish_load(self.state_view(), read, state_dict)
        read.taken = self.optimizer.step_count
        self._sync_weights()

    def state_view(self) -> StateView:
        """Return the parts that saving and loading use, with the state as it is now."""
        return StateView(
            inner=self.inner,
            state=self.optimizer.attach(),
            parameters=self.model_params,
            param_groups=self.param_groups,
            grad_scaler=self.grad_scaler,
            manifest=self.manifest,
            replica=self._replica(),
            model_parallel_rank=lambda: self.data_parallel_group_idx,
            data_parallel_group=self.data_parallel_group,
            sizes=self._sizes,
        )

    def _replica(self) -> int | None:
        if not self.ddp_config.use_distributed_optimizer:
            return None
        if self.ddp_config.num_distributed_optimizer_instances == 1:
            return 0
        return int(self._groups_of_ranks.inter_dist_opt.rank())

    def _sizes(self) -> dict[str, int]:
        groups = self._groups_of_ranks
        return {
            "tensor": groups.tp.size(),
            "pipeline": groups.pp.size(),
            "virtual_pipeline": len(self.model_chunks),
            "context": groups.cp.size(),
            "data": groups.dp_cp.size() // groups.cp.size(),
            "distributed_optimizer": int(self.ddp_config.use_distributed_optimizer),
        }

    # Megatron's older format; see the module ``parameter_state``.

    @torch.no_grad()
    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Return groups, steps and loss scale: what ``--ckpt-format torch`` saves with the model.

        With the distributed optimizer the rest is in the file of :meth:`save_parameter_state`;
        without it, it is in the dict, too.
        """
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        found: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler is not None:
            found["grad_scaler"] = self.grad_scaler.state_dict()
        with self.optimizer.left_where_it_is():
            view = self.state_view()
            found["adam_mini"] = parameter_state.identity(view)
            if not self.ddp_config.use_distributed_optimizer and not is_loading:
                found["parameter_state"] = parameter_state.gather(view, None)
        return found

    def _load_legacy(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.step_count = checkpoint.load_common(self.state_view(), state_dict)
        if not self.ddp_config.use_distributed_optimizer:
            if "parameter_state" not in state_dict:
                raise ValueError(
                    "The checkpoint's optimizer state has no parameter state of Adam-mini: it was "
                    "saved with --use-distributed-optimizer, or by another optimizer. Load it as "
                    "it was saved, or use --no-load-optim."
                )
            parameter_state.scatter(self.state_view(), None, lambda: state_dict["parameter_state"])

    def get_parameter_state_dp_zero(
        self,
        use_gloo_comm: bool = True,
        empty_data: bool = False,
        return_on_all_ranks: bool = False,
    ) -> dict[str, Any] | None:
        """Gather the state of all parameters on the first data-parallel rank, on the CPU.

        Args:
            use_gloo_comm: gather through Megatron's gloo group, if there is one.
            empty_data: return zeros.
            return_on_all_ranks: return it on all ranks, instead of ``None`` on the others.
        """
        group = (self.data_parallel_group_gloo if use_gloo_comm else None) or (
            self.data_parallel_group
        )
        with self.optimizer.left_where_it_is():
            return parameter_state.gather(
                self.state_view(), group, everywhere=return_on_all_ranks, empty=empty_data
            )

    def save_parameter_state(self, filename: str) -> None:
        """Save :meth:`get_parameter_state_dp_zero` to a file; all ranks must call it."""
        found = self.get_parameter_state_dp_zero()
        if found is not None and self.distributed_optimizer_instance_id == 0:
            torch.save(found, filename)

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """Load the file of :meth:`save_parameter_state`, or that of Megatron's Adam.

        All ranks must call it; only the first of each data-parallel group reads.

        Raises:
            ValueError: the file is damaged, or of another layout.
        """
        self._load_parameter_state(
            lambda: parameter_state.read_file(filename, check=self.inner.config.check_files),
            update_legacy_format,
        )

    def load_parameter_state_from_dp_zero(
        self, state_dict: dict[str, Any] | None, *, update_legacy_format: bool = False
    ) -> None:
        """Load what :meth:`get_parameter_state_dp_zero` returned; others than the first: any."""
        self._load_parameter_state(lambda: state_dict or {}, update_legacy_format)

    @torch.no_grad()
    def _load_parameter_state(
        self, read: Callable[[], dict[str, Any]], update_legacy_format: bool
    ) -> None:
        if update_legacy_format:
            raise NotImplementedError(
                "--ckpt-convert-update-legacy-dist-opt-format is for files of Megatron's Adam from "
                "before February 2024. Convert them with --optimizer adam first."
            )
        parameter_state.scatter(
            self.state_view(), self.data_parallel_group_gloo or self.data_parallel_group, read
        )
        self._sync_weights()

    def _sync_weights(self) -> None:
        # Megatron loads the model's weights itself, and they need not be the rounded main
        # parameters (another precision, another checkpoint).
        if self.ddp_config.use_distributed_optimizer:
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

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
