"""The state of one rank in Megatron's older format ``torch``: gathered on one rank of each group.

Imports ``saved_state`` and ``parameter_state``, which describes the format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore import checkpoint, parameter_state
from megatron_adam_mini.mcore.preflight import refuse_experts_in_format_torch
from megatron_adam_mini.mcore.saved_state import SavedState
from megatron_adam_mini.mcore.state_part import PART


class GatheredState(SavedState):
    """What an optimizer of Megatron does for ``--ckpt-format torch``, and for tools.

    Args:
        args, kwargs: of ``RankOptimizer``.
    """

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
            view = self.state_view(to_save=True)
            found["adam_mini"] = parameter_state.identity(view)
            if not self.ddp_config.use_distributed_optimizer and not is_loading:
                found["parameter_state"] = parameter_state.gather(view, self._no_groups())
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store what a checkpoint load returned, or :meth:`state_dict`; all ranks must call it.

        Raises:
            RuntimeError: the dict is of a torch_dist checkpoint, and no load was prepared.
            ValueError: nothing was read, or it does not fit this run.
        """
        if PART in state_dict or "optimizer" not in state_dict:
            super().load_state_dict(state_dict)
            return
        view = self.state_view()
        if not self.ddp_config.use_distributed_optimizer:
            parameter_state.scatter(view, self._no_groups(), lambda: _parameter_state(state_dict))
        checkpoint.load_common(view, state_dict)

    def get_parameter_state_dp_zero(
        self,
        use_gloo_comm: bool = True,
        empty_data: bool = False,
        return_on_all_ranks: bool = False,
    ) -> dict[str, Any] | None:
        """Gather the state of all parameters on the first data-parallel rank, on the CPU.

        That of experts on the first of their own data-parallel group.

        Args:
            use_gloo_comm: gather through Megatron's gloo group, if there is one.
            empty_data: return zeros.
            return_on_all_ranks: return it on all ranks, instead of ``None`` on the others.
        """
        groups = self._groups_to_gather(use_gloo=use_gloo_comm)
        with self.optimizer.left_where_it_is():
            view = self.state_view(to_save=True)
            return parameter_state.gather(
                view, groups, everywhere=return_on_all_ranks, empty=empty_data
            )

    def _groups_to_gather(self, *, use_gloo: bool) -> list[ProcessGroup | None]:
        """Return the data-parallel group of each domain, Megatron's gloo groups if wanted."""
        if len(self.domain_groups) > 1:
            refuse_experts_in_format_torch(
                tp_size=self.tp_group.size(), expert_tp_size=self.expert_tp_group.size()
            )
        gloo = self._gloo_groups() if use_gloo else self._no_groups()
        return [
            on_cpu or groups.dp for on_cpu, groups in zip(gloo, self.domain_groups, strict=True)
        ]

    def _no_groups(self) -> list[ProcessGroup | None]:
        return [None] * len(self.domain_groups)

    def save_parameter_state(self, filename: str) -> None:
        """Save :meth:`get_parameter_state_dp_zero` to a file; all ranks must call it.

        Raises:
            Exception: on a rank that could not write, its own error.
            RuntimeError: on the others.
        """
        found = self.get_parameter_state_dp_zero()
        writes = found is not None and self.distributed_optimizer_instance_id == 0
        on_all_ranks(
            lambda: torch.save(found, filename) if writes else None,
            "Adam-mini's state was not saved",
        )

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
    def _load_parameter_state(self, read: Callable[[], Any], update_legacy_format: bool) -> None:
        if update_legacy_format:
            raise NotImplementedError(
                "--ckpt-convert-update-legacy-dist-opt-format is for files of Megatron's Adam from "
                "before February 2024. Convert them with --optimizer adam first."
            )
        groups = self._groups_to_gather(use_gloo=True)
        parameter_state.scatter(self.state_view(), groups, read)
        self._quantize_weights()
        self._sync_weights()


def _parameter_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return what :meth:`GatheredState.state_dict` adds without the distributed optimizer.

    Raises:
        ValueError: the dict lacks it.
    """
    found: dict[str, Any] | None = state_dict.get("parameter_state")
    if found is None:
        raise ValueError(
            "The checkpoint's optimizer state has no parameter state of Adam-mini: it was saved "
            "with --use-distributed-optimizer, or by another optimizer. Load it as it was saved, "
            "or use --no-load-optim."
        )
    return found
