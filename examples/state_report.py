"""Measure the optimizer's state after a Megatron run, summed over all ranks.

If an optimizer has the methods ``state_bytes`` and ``communication_per_step``, as Adam-mini does,
their results are reported; otherwise its tensors are counted.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.training.training
import torch


class StateReport:
    """Captures the optimizer that Megatron builds, because ``pretrain`` does not return it."""

    def __init__(self) -> None:
        self._optimizer: Any = None
        build = megatron.training.training.get_megatron_optimizer

        def build_and_remember(*args: Any, **kwargs: Any) -> Any:
            self._optimizer = build(*args, **kwargs)
            return self._optimizer

        megatron.training.training.get_megatron_optimizer = build_and_remember

    def write(self, path: str) -> None:
        """Sum over all ranks and write the result from rank 0. Collective: every rank must call it.

        ``state_bytes`` is the sum over the ranks, by kind of state; ``communication`` is what one
        step adds to Megatron's own communication on the rank where it adds most.
        """
        members = list(_members(self._optimizer))
        state_bytes: Counter[str] = Counter()
        communication: Counter[str] = Counter()
        for member in members:
            state_bytes.update(
                member.state_bytes() if hasattr(member, "state_bytes") else _allocated_bytes(member)
            )
            if hasattr(member, "communication_per_step"):
                communication.update(member.communication_per_step())

        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, (state_bytes, communication))
        if torch.distributed.get_rank() == 0:
            report = {
                "optimizer": sorted({type(member).__name__ for member in members}),
                "state_bytes": dict(sum((of_rank for of_rank, _ in of_ranks), Counter())),
                "communication": {
                    "collectives_per_step": max(of_rank["collectives"] for _, of_rank in of_ranks),
                    "bytes_per_step": max(of_rank["bytes"] for _, of_rank in of_ranks),
                },
            }
            Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _members(optimizer: Any) -> Iterator[Any]:
    # Megatron chains one optimizer per kind of parameter; a chain that reports its own state is not
    # taken apart.
    if hasattr(optimizer, "chained_optimizers") and not hasattr(optimizer, "state_bytes"):
        for member in optimizer.chained_optimizers:
            yield from _members(member)
    else:
        yield optimizer


def _allocated_bytes(member: Any) -> Counter[str]:
    """Return the bytes of this rank's main parameters and of the inner optimizer's state."""
    sizes: Counter[str] = Counter()
    for groups in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
        for group in getattr(member, groups, []):
            sizes["main_param"] += sum(tensor.nbytes for tensor in group if tensor is not None)
    if member.optimizer is not None:  # None: this rank has no parameter to update
        for state in member.optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and name != "step":
                    sizes[name] += value.nbytes
    return sizes
