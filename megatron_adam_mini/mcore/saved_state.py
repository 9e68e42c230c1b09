"""The state of one rank between steps: saved, loaded, moved, set from other weights.

Imports ``distributed_names`` and ``state_part`` (checkpoints in ``torch_dist``). ``gathered_state``
adds Megatron's older format ``torch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore import checkpoint, compat
from megatron_adam_mini.mcore.distributed_names import DistributedNames
from megatron_adam_mini.mcore.model_space import ModelEntries
from megatron_adam_mini.mcore.model_weights import weights_by_parameter
from megatron_adam_mini.mcore.param_groups import take_bounds
from megatron_adam_mini.mcore.quantized import values_of
from megatron_adam_mini.mcore.state_part import StatePart, part_of
from megatron_adam_mini.mcore.state_view import DomainPart, StateView
from megatron_adam_mini.plan.step_plan import DENSE


class SavedState(DistributedNames):
    """What an optimizer of Megatron does with its state between two steps.

    Args:
        args, kwargs: of ``RankOptimizer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Groups of the checkpoint that was loaded last.
        self._saved_groups: list[Mapping[str, Any] | None] = []

    # Checkpoints in ``torch_dist``.

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return what this rank writes to a ``torch_dist`` checkpoint, or reads from one.

        All ranks must call it: which of them find an error depends on the parameters they hold.

        Args:
            model_sharded_state_dict: the model's whole sharded state dict.
            is_loading: whether to read.
            metadata: content metadata of the checkpoint that is read. Without Adam-mini's identity
                in it, ``dist_checkpointing.load`` finds out what the checkpoint holds.

        Raises:
            ValueError: the model's state dict lacks a parameter.
        """

        def make() -> dict[str, Any]:
            part = StatePart(self, ModelEntries(model_sharded_state_dict))
            return part.to_load(metadata) if is_loading else part.to_save()

        verb = "loaded" if is_loading else "saved"
        return on_all_ranks(make, f"Adam-mini's state cannot be {verb}")

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store what a checkpoint load returned; all ranks must call it.

        Raises:
            RuntimeError: the dict is of a torch_dist checkpoint, and no load was prepared.
            ValueError: nothing was read, or it does not fit this run.
        """
        part = part_of(state_dict)
        if part is None:
            raise RuntimeError(
                "Adam-mini's load_state_dict needs what state_dict() returned; or, for a "
                "torch_dist checkpoint, sharded_state_dict(..., is_loading=True) before the load."
            )
        read = on_all_ranks(lambda: part.taken_by(self), "Adam-mini's state cannot be loaded")
        self.optimizer.put_back(read.state)
        checkpoint.finish_load(self.state_view(), read, state_dict)
        read.taken = self.optimizer.step_count
        self._quantize_weights()
        self._sync_weights()

    def take_bounds_of_checkpoint(self) -> None:
        """Set the bounds of learning rate and weight decay to those of the loaded checkpoint."""
        if self._saved_groups:
            take_bounds(self.param_groups, self._saved_groups)

    def state_view(self, *, to_save: bool = False) -> StateView:
        """Return the parts that saving and loading use, with the state as it is now.

        Gathers of weights that began within the step are over then: a load changes weights.

        Args:
            to_save: leave state that was moved to the CPU there.
        """
        for chunk in self.model_chunks:
            for group in compat.bucket_groups(chunk):
                compat.finish_gather(group)
        return StateView(
            inner=self.inner,
            state=self.optimizer.attach(where_it_is=to_save),
            parameters=self.model_params,
            param_groups=self.param_groups,
            saved_groups=self._saved_groups,
            grad_scaler=self.grad_scaler,
            manifest=self.manifest,
            replica=self._replica(),
            domains=self._domain_parts(),
            sizes=self._sizes,
        )

    def _domain_parts(self) -> list[DomainPart]:
        """Return this rank's part of each domain."""
        plan, groups = self.inner.plan, self._groups_of_ranks
        chained = len(plan.domains) > 1
        return [
            DomainPart(
                name=domain.name,
                data_parallel_group=of_domain.dp,
                model_parallel_rank=(
                    (lambda: self.data_parallel_group_idx)
                    if domain.name == DENSE
                    else (lambda: int(groups.tp_ep_pp.rank()))
                ),
                chain=f"chained_{number}." if chained else "",
            )
            for number, (domain, of_domain) in enumerate(
                zip(plan.domains, self.domain_groups, strict=True)
            )
        ]

    def _sizes(self) -> dict[str, int]:
        groups, chunk = self._groups_of_ranks, self.model_chunks[0]
        dp_group, whole_group = chunk.dp_group, chunk.dp_cp_group
        experts = (
            {"expert": groups.ep.size(), "expert_tensor": self.expert_tp_group.size()}
            if len(self.domain_groups) > 1
            else {}
        )
        return {
            "tensor": groups.tp.size(),
            "pipeline": groups.pp.size(),
            "virtual_pipeline": len(self.model_chunks),
            "context": whole_group.size() // dp_group.size(),
            "data": dp_group.size(),
            "distributed_optimizer": int(self.ddp_config.use_distributed_optimizer),
            **experts,
        }

    def _sync_weights(self) -> None:
        # Megatron loads the model's weights itself, and they need not be the rounded main
        # parameters (another precision, another checkpoint).
        if self.ddp_config.use_distributed_optimizer:
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

    # Between two phases of a training.

    def offload_to_cpu(self) -> None:
        """Move all state to the CPU, and free its memory on the device.

        A step or a load brings it back, too; a save leaves it there.
        """
        self.optimizer.move_to("cpu")
        torch.cuda.empty_cache()

    def restore_from_cpu(self) -> None:
        """Move the state back to the device."""
        self.optimizer.attach()

    @torch.no_grad()
    def exp_avg_sq_per_element(self, shard: Tensor) -> Tensor:
        """Return v of every element of a main shard, float32, shape ``(n,)``."""
        found: Tensor = self.optimizer.exp_avg_sq_per_element(shard)
        return found

    @torch.no_grad()
    def reload_model_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Copy model weights to the main parameters, after the weights were changed.

        All ranks must call it.

        Args:
            state_dict: take them from there, where they may have more bits; see
                :func:`~megatron_adam_mini.mcore.model_weights.weights_by_parameter`.

        Raises:
            ValueError: the dict lacks a parameter, or has it with another shape.
        """
        self._copy_model_params_to_main_params(state_dict)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Set the main parameters to this rank's weights, or to those of a state dict."""
        self.optimizer.take_weights()
        if state_dict is None:
            return
        weights = on_all_ranks(
            lambda: weights_by_parameter(self.model_chunks, state_dict),
            "Main parameters cannot be taken from the state dict",
        )
        state = self.optimizer.attach()
        for piece in self.inner.plan.pieces:
            held = state.of(piece)
            weight = values_of(weights[self.model_params[piece.parameter]]).reshape(-1)
            values = weight[piece.begin : piece.end]
            if held.param_is_weight:
                held.store(piece.window, {"param": values})
            else:
                held.main_param(piece.window).copy_(values)
        # Other weights stay as they are until the next step, as with Megatron's own optimizer.
        if any(held.param_is_weight for held in state.everywhere):
            self._sync_weights()

    @torch.no_grad()
    def _copy_main_params_to_model_params(self) -> None:
        """Set this rank's weights to the rounded main parameters; gathers nothing.

        All data-parallel ranks must call it if weights are quantized.
        """
        for held in self.optimizer.attach().everywhere:
            held.write_weights()
        self._quantize_weights()

    @torch.no_grad()
    def _copy_main_params_to_param_buffer(self) -> None:
        """Do the same, and let the next forward pass gather weights again if it overlaps that."""
        self._copy_main_params_to_model_params()
        if self.ddp_config.use_distributed_optimizer:
            for chunk in self.model_chunks:
                compat.gather_again(chunk)
