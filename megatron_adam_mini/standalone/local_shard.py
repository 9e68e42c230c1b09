"""One parameter on this rank: its state, and its part of a step.

Imports torch, numpy, ``plan``, ``kernels`` and the modules before it. For the kernels, a parameter
is a buffer of its own whose segments are its rows; ``kernels.reference`` says what they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from megatron_adam_mini.kernels import BufferTensors, SegmentVectors, StepScalars
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.standalone.block_sums import BlockSums
from megatron_adam_mini.standalone.blocks import Blocks
from megatron_adam_mini.standalone.mesh_rows import local, mesh_rows, zeros_of_rows

#: ``optimizer.state`` of one parameter.
State = dict[str, Any]


class LocalShard:
    """What one rank needs to update its part of one parameter.

    Args:
        param: the parameter.
        blocks: of the whole parameter.
        kernels: a backend.

    Attributes:
        sums: of squared gradients per block; ``None`` if every element has its own v.
        v_key: name of v in the state: ``exp_avg_sq`` per element, as Adam's, or ``row_exp_avg_sq``
            per row; ``column_exp_avg_sq`` per column.
    """

    def __init__(self, param: Tensor, blocks: Blocks, kernels: ModuleType) -> None:
        self.param, self.blocks = param, blocks
        self._kernels, self._device = kernels, param.device
        self.rows = mesh_rows(param, blocks)
        self._grad: Tensor | None = None  # on this rank, in the course of a step
        self.sums: BlockSums | None = None
        self.v_key = "exp_avg_sq"
        numel = local(param).numel()
        if blocks.block_of_row is None:
            self._table = SegmentTable(np.zeros(1, np.int64), np.full(1, numel, np.int64))
            self._vectors = _vectors(torch.zeros(1, dtype=torch.float32, device=self._device))
            return
        self.v_key = "column_exp_avg_sq" if blocks.rule == "column" else "row_exp_avg_sq"
        rows, width = self.rows, numel // max(len(self.rows.block_S), 1)
        self.sums = BlockSums(rows, blocks, row_numel=width, device=self._device)
        start_S = np.arange(len(rows.block_S), dtype=np.int64) * width
        self._table = SegmentTable(start_S, start_S + width)
        block_numel = np.maximum(np.bincount(blocks.block_of_row) * blocks.row_numel, 1)
        inv_numel = 1.0 / block_numel[rows.block_S]
        inv_numel_S = torch.from_numpy(inv_numel.astype(np.float32)).to(self._device)
        self._vectors = _vectors(inv_numel_S, self.sums.sum_sq_S)

    @property
    def moved(self) -> bool:
        """Whether the parameter has left for another device, so that all this must be made anew."""
        return self.param.device != self._device

    def new_state(self) -> State:
        """Return the state before the first step.

        m is bfloat16 for a bfloat16 parameter, else float32; v is always float32.
        """
        param = self.param
        exp_avg = torch.zeros_like(param, dtype=_m_dtype(param))
        state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu"), "exp_avg": exp_avg}
        if self.sums is None:
            return {**state, self.v_key: torch.zeros_like(param, dtype=torch.float32)}
        zeros = zeros_of_rows(param, self.blocks)
        return {**state, self.v_key: zeros, "num_blocks": self.blocks.num_blocks}

    def adopt(self, saved: State) -> State:
        """Return a loaded state in this optimizer's dtypes and devices.

        Raises:
            ValueError: it is the state of another partition, layout or optimizer.
        """
        param, name = self.param, self.blocks.name
        shape = self.blocks.shape if self.sums is None else self.blocks.row_shape
        v = saved.get(self.v_key)
        blocks = saved.get("num_blocks", self.blocks.num_blocks)
        m = saved.get("exp_avg")
        if m is None or tuple(m.shape) != self.blocks.shape:
            raise ValueError(
                f"The loaded state of {name!r} has {_described(saved)}; needed is exp_avg of shape "
                f"{self.blocks.shape}, that of the parameter. Remedy: the state of this model."
            )
        if v is None or tuple(v.shape) != shape or blocks != self.blocks.num_blocks:
            raise ValueError(
                f"The loaded state of {name!r} has {_described(saved)}; needed is {self.v_key} of "
                f"shape {shape} for {self.blocks.num_blocks} blocks (rule {self.blocks.rule!r}). "
                "Remedy: the rules, num_heads and num_query_groups that the state was saved with; "
                "load_adamw_state_dict(...) for state of torch.optim.AdamW."
            )
        if isinstance(v, DTensor) != isinstance(param, DTensor):
            raise ValueError(
                f"The loaded state of {name!r} is {_sharded(v)}, but the parameter is otherwise. "
                "Remedy: load with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
            )
        dtype = _m_dtype(param)
        v = v.to(device=param.device, dtype=torch.float32)
        return {
            **saved,
            "step": torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu"),
            "exp_avg": saved["exp_avg"].to(device=param.device, dtype=dtype),
            self.v_key: v if self.sums is None else v.contiguous(),
        }

    def from_adamw(self, saved: State) -> State:
        """Return a state of AdamW as one of this optimizer, with the mean v of each block.

        Collectives: an all-reduce per group of ranks that hold parts of the parameter's blocks.

        Args:
            saved: not modified, and not shared.

        Raises:
            ValueError: it is not such a state, or of another model or layout.
        """
        param, v = self.param, saved.get("exp_avg_sq")
        if (
            v is None
            or v.shape != param.shape
            or isinstance(v, DTensor) != isinstance(param, DTensor)
        ):
            raise ValueError(
                f"The state of {self.blocks.name!r} has {_described(saved)}; needed is exp_avg_sq "
                f"of shape {tuple(param.shape)}, {_sharded(param)}. Remedy: the state_dict() of "
                "the torch.optim.AdamW that has trained the same parameters."
            )
        step = torch.as_tensor(saved["step"]).clone()
        state = {"step": step, "exp_avg": saved["exp_avg"].clone()}
        if self.sums is None:
            return {**state, self.v_key: v.clone()}
        means = zeros_of_rows(param, self.blocks)
        local(means).copy_(self._block_means(local(v)).view(local(means).shape))
        return {**state, self.v_key: means, "num_blocks": self.blocks.num_blocks}

    def _block_means(self, values: Tensor) -> Tensor:
        """Return, for each row of this rank, the mean over its whole block, in float64."""
        rows = self._rows_of(values.double())
        row_dims = len(self.blocks.row_dims)
        sum_S = rows.flatten(row_dims).sum(-1) if rows.ndim > row_dims else rows
        block_S = torch.from_numpy(self.rows.block_S).to(sum_S.device)
        num_blocks = len(block_S) if self.blocks.rows_are_blocks else self.blocks.num_blocks
        sums = sum_S.new_zeros(num_blocks).index_add_(0, block_S, sum_S.reshape(-1))
        for group in self.rows.groups:
            distributed.all_reduce(sums, group=group)
        assert self.blocks.block_of_row is not None
        count = np.bincount(self.blocks.block_of_row)[self.rows.block_S] * self.blocks.row_numel
        return sums[block_S] / torch.from_numpy(count).to(sums)

    def sum_squares_(self, grad: Tensor | None) -> None:
        """Sum the squares of the gradient over this rank's part of each block.

        Args:
            grad: what this rank holds of it, kept until the update.
        """
        self._grad = grad
        if self.sums is not None and not self.sums.in_one_pass:
            self.sums.sum_squares_(None if grad is None else self._gradient(), self._kernels)

    def update_(self, state: State, scalars: StepScalars) -> None:
        """Advance v, m and the parameter by one step.

        Args:
            state: modified in place.
            scalars: the numbers of the step.
        """
        if local(self.param).numel():
            self._update(state, scalars)
        elif self.sums is not None and len(self.sums.cut_C):
            # Rows without columns on this rank: a checkpoint may take their v from here.
            self._advance_v(state, self.sums, scalars)
        self._grad = None

    def _update(self, state: State, scalars: StepScalars) -> None:
        torch.autograd.graph.increment_version(self.param)  # kernels write behind autograd's back
        with self._in_rows(self.param) as p_N, self._in_rows(state["exp_avg"]) as m_N:
            tensors = BufferTensors(p_N, m_N, None, self._gradient())
            if self.sums is None:
                with self._in_rows(state[self.v_key]) as v_E:
                    self._kernels.update_elementwise_(
                        tensors, v_E, self._table, self._vectors, scalars
                    )
                return
            if self.sums.in_one_pass:
                vectors = self._vectors._replace(exp_avg_sq_S=local(state[self.v_key]).view(-1))
                self._kernels.update_in_one_pass_(tensors, self._table, vectors, scalars)
                return
            vectors = self._advance_v(state, self.sums, scalars)
            self._kernels.update_(tensors, self._table, vectors, scalars)

    def _advance_v(self, state: State, sums: BlockSums, scalars: StepScalars) -> SegmentVectors:
        """Advance v, and return it with the step sizes that follow from it."""
        vectors = self._vectors._replace(exp_avg_sq_S=local(state[self.v_key]).view(-1))
        sums.spread_()
        self._kernels.segment_step_size_(vectors, scalars)
        return vectors

    def _gradient(self) -> Tensor:
        assert self._grad is not None
        return _flat(self._rows_of(self._grad))

    def _rows_of(self, tensor: Tensor) -> Tensor:
        dims = self.blocks.row_dims
        return tensor.movedim(dims, tuple(range(len(dims)))) if tensor.ndim else tensor

    @contextmanager
    def _in_rows(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield what this rank holds of a tensor, row after row, and write changes back.

        It is a copy only where kernels cannot work in place: if the tensor is stored otherwise
        (transposed, channels last), or a parameter is not float32.
        """
        rows = self._rows_of(local(tensor.detach()))
        wide = rows.float() if tensor is self.param else rows
        flat = _flat(wide)
        yield flat
        if flat.data_ptr() != rows.data_ptr():
            rows.copy_(flat.view(rows.shape))


def _flat(rows: Tensor) -> Tensor:
    """Return adjacent elements, row after row; of a column, ``reshape`` alone makes a view."""
    return rows.reshape(-1).contiguous()


def _m_dtype(param: Tensor) -> torch.dtype:
    return torch.bfloat16 if param.dtype == torch.bfloat16 else torch.float32


def _sharded(tensor: Tensor) -> str:
    return "sharded" if isinstance(tensor, DTensor) else "not sharded"


def _described(saved: State) -> str:
    return ", ".join(
        f"{key} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{key} {value}"
        for key, value in saved.items()
        if key != "step"
    )


def _vectors(inv_numel_S: Tensor, sum_sq_S: Tensor | None = None) -> SegmentVectors:
    zeros = torch.zeros_like(inv_numel_S)
    return SegmentVectors(
        exp_avg_sq_S=zeros,  # each step brings its own
        step_size_S=zeros,
        sum_sq_SR=zeros if sum_sq_S is None else sum_sq_S,
        inv_numel_S=inv_numel_S,
        group_SR=torch.zeros_like(inv_numel_S, dtype=torch.int32),
    )
