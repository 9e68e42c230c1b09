"""Names of Megatron's distributed optimizer that Adam-mini itself has no use for.

Imports megatron.core and ``rank_optimizer``. Megatron's tools and people's own scripts read them:
tables of which rank owns which part of a buffer are made, by Megatron's own functions, when
somebody asks for one; what cannot be had is refused. ``docs/megatron-contract.md`` lists all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn

from megatron.core.distributed.param_and_grad_buffer import partition_buckets
from torch import Tensor
from torch.nn import Parameter

from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.rank_optimizer import RankOptimizer

_Dtypes = tuple[Any, Any]


def _refusal(name: str, reason: str) -> Callable[..., NoReturn]:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"Adam-mini has no {name}: {reason}")

    refused.__name__ = name
    refused.__doc__ = f"Refuse: {reason}"
    return refused


def _adams(name: str) -> Callable[..., NoReturn]:
    return _refusal(
        name,
        "its state has one v per block, which this format of Adam's state cannot hold. "
        "sharded_state_dict() and load_state_dict() save and load the state, and "
        "`megatron-adam-mini convert` makes Adam's of it.",
    )


class DistributedNames(RankOptimizer):
    """What a distributed optimizer of Megatron has beside what Adam-mini uses.

    Args:
        args, kwargs: of ``RankOptimizer``.
    """

    checkpoint_fully_reshardable_formats = compat.RESHARDABLE_FORMATS
    compute_full_param_layout = compat.PARAM_LAYOUT
    #: Keys of the state of each main shard.
    optimizer_state_keys = ("exp_avg", "exp_avg_sq")

    # Tables of buffers.

    @cached_property
    def per_model_buffers(self) -> dict[int, list[Any]]:
        """Buffers of each model chunk; those of experts come last."""
        return {
            number: [*chunk.buffers, *chunk.expert_parallel_buffers]
            for number, chunk in enumerate(self.model_chunks)
        }

    @cached_property
    def gbuf_idx_to_model_idx_map(self) -> dict[int, int]:
        """Number of the model chunk of each buffer."""
        of_buffer = {
            id(buffer): number
            for number, buffers in self.per_model_buffers.items()
            for buffer in buffers
        }
        return {number: of_buffer[id(buffer)] for number, buffer in enumerate(self.buffers)}

    @cached_property
    def per_model_bucket_groups(self) -> dict[int, list[Any]]:
        """Buckets of each model chunk, in groups."""
        return {
            number: partition_buckets(buffers) for number, buffers in self.per_model_buffers.items()
        }

    @cached_property
    def per_bucket_numel(self) -> list[dict[_Dtypes, list[int]]]:
        """Elements of each bucket, padded."""
        return self._of_buckets(lambda bucket: int(bucket.grad_data.numel()))

    @cached_property
    def per_bucket_numel_unpadded(self) -> list[dict[_Dtypes, list[int]]]:
        """Elements of each bucket, without the padding at its end."""
        return self._of_buckets(lambda bucket: int(bucket.numel_unpadded))

    def _of_buckets(self, value: Callable[[Any], int]) -> list[dict[_Dtypes, list[int]]]:
        return [
            {(b.param_dtype, b.grad_dtype): [value(bucket) for bucket in b.buckets]}
            for b in self.buffers
        ]

    @cached_property
    def gbuf_ranges(self) -> list[dict[_Dtypes, list[dict[str, Any]]]]:
        """What this rank owns of each bucket, and of each parameter there."""
        if not self.ddp_config.use_distributed_optimizer:
            raise AttributeError(
                "Ranges of buffers exist with the distributed optimizer only, as Megatron's do: "
                "without it, each rank owns all of them."
            )
        return [compat.owned_ranges(buffer) for buffer in self.buffers]

    @cached_property
    def model_param_gbuf_map(self) -> dict[Parameter, tuple[int, _Dtypes, int]]:
        """Buffer, types and bucket of each parameter of which this rank owns a part."""
        return compat.buffer_of_params(self.gbuf_ranges)

    @cached_property
    def model_param_group_index_map(self) -> dict[Parameter, tuple[int, int]]:
        """Group of each such parameter, and its place among the group's parameters."""
        return self._group_ranges[0]

    @cached_property
    def opt_group_ranges(self) -> list[dict[str, Any]]:
        """Groups, each with those of its parameters of which this rank owns a part."""
        return self._group_ranges[1]

    @cached_property
    def _group_ranges(self) -> tuple[dict[Parameter, tuple[int, int]], list[dict[str, Any]]]:
        groups = [{"params": params} for params in self._model_params_by_group()]
        index, ranges = compat.owned_by_group(groups, self.gbuf_ranges)
        for found, group in zip(ranges, self.param_groups, strict=True):
            found["orig_group"] = found["orig_group_idx"] = group
        return index, ranges

    @cached_property
    def param_to_name(self) -> dict[Tensor, str]:
        """Name of each parameter in its model chunk."""
        return {p: name for chunk in self.model_chunks for name, p in chunk.named_parameters()}

    # The parameter gather.

    def start_param_sync_for_bucket_group_subset(self) -> None:
        """Start the all-gather of weights."""
        for chunk in self.model_chunks:
            chunk.start_param_sync()

    def split_state_dict_if_needed(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: Adam-mini's own formats do not depend on which weights are FP8."""

    # Formats of Adam's state.

    get_parameter_state_dp_reshardable = _adams("get_parameter_state_dp_reshardable")
    load_parameter_state_from_dp_reshardable = _adams("load_parameter_state_from_dp_reshardable")
    load_parameter_state_from_dp_zero_legacy = _adams("load_parameter_state_from_dp_zero_legacy")
    load_parameter_state_from_fs_model_space = _adams("load_parameter_state_from_fs_model_space")
    load_parameter_state_from_fully_reshardable = _adams(
        "load_parameter_state_from_fully_reshardable"
    )
    sharded_param_state_dp_reshardable = _adams("sharded_param_state_dp_reshardable")
    sharded_param_state_dp_zero = _adams("sharded_param_state_dp_zero")
    sharded_param_state_fs_model_space = _adams("sharded_param_state_fs_model_space")
    sharded_param_state_fully_reshardable = _adams("sharded_param_state_fully_reshardable")
    sharded_param_state_fsdp_dtensor = _refusal(
        "sharded_param_state_fsdp_dtensor",
        "Megatron-FSDP keeps parameters and state of its own; use --use-distributed-optimizer "
        "without --use-megatron-fsdp.",
    )
