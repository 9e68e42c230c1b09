"""State of the public package ``adam-mini`` 1.1.1, one parameter at a time.

Imports torch. Its optimizer keeps ``m`` (for Query and Key viewed as ``(heads, -1)``) and
``vmean``: one number per head for Query and Key, one for a whole norm (and for Value if the user
emptied ``wv_names``), else one per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.plan.partition import IntArray

_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class PublicParameter:
    """Weights and state of one parameter.

    Attributes:
        weight: any float type, whole shape.
        exp_avg: m, same shape.
        v_of_rows: float64, shape ``(rows,)``.
        labels: block of each row, from 0.
        step: steps taken.
    """

    weight: Tensor
    exp_avg: Tensor
    v_of_rows: Tensor
    labels: IntArray
    step: int


class PublicFile:
    """A file ``torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})``.

    Other entries are ignored. Parameters are memory-mapped and read when they are used.

    Args:
        content: what ``torch.load(..., weights_only=True)`` returned.
        where: for messages.

    Raises:
        UnreadableError: another structure.
    """

    def __init__(self, content: Any, where: str) -> None:
        self._where = where
        try:
            self._weights = {_bare(name): w for name, w in content["model"].items()}
            groups = content["optimizer"]["param_groups"]
            self._state = content["optimizer"]["state"]
            self._groups = {_bare(group["name"]): group for group in groups}
            self._numbers = {name: group["params"][0] for name, group in self._groups.items()}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UnreadableError(
                f"{where} is no file of adam_mini.Adam_mini 1.1.1: {error!r}. Save it as "
                "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, "
                "path)."
            ) from error

    @property
    def names(self) -> list[str]:
        """Names of the parameters that were optimized."""
        return list(self._groups)

    def options(self) -> dict[str, Any]:
        """Return lr, betas and eps, which are the same for all, and the largest weight decay."""
        group = next(iter(self._groups.values()))
        decay = max(float(g["weight_decay"]) for g in self._groups.values())
        return {
            "lr": float(group["lr"]),
            "betas": (float(group["beta1"]), float(group["beta2"])),
            "eps": float(group["eps"]),
            "weight_decay": decay,
        }

    def parameter(self, name: str, head_dim: int) -> PublicParameter:
        """Return one parameter.

        Args:
            name: Hugging Face's.
            head_dim: rows of a head, which the blocks of Query and Key must match.

        Raises:
            UnreadableError: it is missing, never took a step, or has blocks that are not heads.
            CorruptError: a value is not finite, or v is negative.
        """
        state = self._state.get(self._numbers.get(name.lower()))
        weight = self._weights.get(name)
        if weight is None or not state:
            raise UnreadableError(
                f"{self._where} has no {'weights' if weight is None else 'state'} of {name!r}; "
                f"it has {', '.join(self.names[:4])}, ..."
            )
        if "vmean" not in state:
            raise UnreadableError(
                f"{self._where}: {name!r} keeps v per element; blocks are needed."
            )
        rows, blocks = len(weight), state["vmean"].numel()
        if rows % blocks or ("head_per_gpu" in state and rows != blocks * head_dim):
            raise UnreadableError(
                f"{self._where}: {name!r} has {blocks} blocks for {rows} rows, but the model's "
                f"heads have {head_dim} rows. dim and n_heads of Adam_mini must be those of the "
                "model, and dim / n_heads its head size."
            )
        v = state["vmean"].double().reshape(-1).repeat_interleave(rows // blocks)
        m = state["m"].reshape(weight.shape)
        for values in (weight, m, v):
            if not torch.isfinite(values).all():
                raise CorruptError(f"{self._where}: {name!r} has values that are not finite.")
        if (v < 0).any():
            raise CorruptError(f"{self._where}: {name!r} has a negative second moment.")
        labels = np.arange(rows, dtype=np.int64) // (rows // blocks)
        return PublicParameter(weight, m, v, labels, int(state["step"]))


def entry_of(name: str, exp_avg: Tensor, vmean: Tensor, step: int) -> dict[str, Any]:
    """Return one entry of ``optimizer.state_dict()["state"]`` as the package writes it.

    Args:
        name: Hugging Face's; determines the kind of entry.
        exp_avg: m, whole shape.
        vmean: one number per block, shape ``(blocks,)``.
        step: steps taken.
    """
    if "q_proj" in name or "k_proj" in name:
        heads = len(vmean)
        return {
            "m": exp_avg.reshape(heads, -1),
            "head_per_gpu": heads,
            "step": step,
            "vmean": vmean.reshape(-1, 1),
        }
    if exp_avg.ndim == 2 and len(vmean) > 1:
        return {
            "m": exp_avg,
            "step": step,
            "neuron_per_gpu": len(exp_avg),
            "vmean": vmean.reshape(-1, 1),
        }
    return {
        "m": exp_avg,
        "step": step,
        "reduced": False,
        "vmean": vmean.reshape(()),
        "block_numel": float(exp_avg.numel()),
    }


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
