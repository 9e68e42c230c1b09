"""Inputs for the Triton kernels, shared by the tests that interpret and that compile them.

Does not import triton, because whether it interprets is decided by then.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from megatron_adam_mini.kernels.segments import SegmentTable

from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.kernels.triton_tiles import ROW_LIMIT

CPU = torch.device("cpu")

LONG = ROW_LIMIT
#: (gap before, length) of segments, and the gap at the end; the first four suit whole vectors.
#: The interpreter takes about 0.1 s per program, so layouts make few programs.
LAYOUTS = {
    "few": ([(0, 64)] * 3, 0),
    "rows": ([(0, 64)] * 3 + [(64, 128)] * 20 + [(0, 1000)] * 3, 64),
    "passes": ([(0, 4096), (16, 2048), (0, 2056)], 8),
    "parts": ([(64, LONG + 64), (0, LONG), (0, 512)], 0),
    "single elements": ([(0, 1)] * 5 + [(2, 1), (0, 3)], 1),
    "odd rows": ([(3, 3)] + [(0, 7)] * 300 + [(5, 1001)] * 2, 2),
    "odd start": ([(5, 64)] + [(0, 64)] * 3 + [(0, 2500), (0, 2500)], 3),
    "odd parts": ([(3, LONG + 5), (1, 40)], 1),
    "mixed": ([(0, 64)] * 3 + [(1, 7)], 3),
    "none": ([], 10),
    "empty slice": ([], 0),
}

GRADS = (torch.float32, torch.bfloat16)
#: exp_avg's dtype, and whether it is rounded stochastically.
MOMENTS = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
#: Dtypes of main parameters and of model weights; int16: remainders.
STORAGE = (
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.int16, torch.bfloat16),
)
DTYPES = list(itertools.product(GRADS, MOMENTS, STORAGE))


def noise(numel, seed, dtype=torch.float32):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """Inputs of all kernels for one layout; ``subset``: every other segment, entries moved."""

    def __init__(
        self,
        layout,
        grad=torch.float32,
        moment=(torch.float32, False),
        storage=STORAGE[0],
        *,
        grad_scale=0.25,
        subset=False,
        unaligned=False,
    ):
        pieces, tail = LAYOUTS[layout]
        end_S = np.cumsum([gap + length for gap, length in pieces], dtype=np.int64)
        start_S = end_S - np.asarray([length for _, length in pieces], dtype=np.int64)
        numel = int(end_S.max(initial=0)) + tail
        index_S = np.arange(len(start_S)) + 2 if subset else None
        self.table = SegmentTable(start_S, end_S, CPU, index_S)
        if subset:
            self.table = self.table.subset(np.arange(len(start_S)) % 2 == 0)
        self.entries = len(start_S) + 4
        moment_dtype, stochastic = moment
        # The rows of entry 2, the first one that subsets use, pass the end of 32 bits.
        numbers = torch.arange(self.entries) * 1000 - (2256 if subset else 0)
        self.origins = numbers.to(torch.int32) if stochastic else None
        param_dtype, weight_dtype = storage
        shift = 1 if unaligned else 0

        def stream(seed, dtype):
            return noise(numel + shift, seed, dtype)[shift:]

        self.grad = stream(1, grad)
        self.exp_avg = stream(2, moment_dtype)
        self.weight = None if weight_dtype is None else stream(3, weight_dtype)
        self.param = stream(4, torch.float32)
        if param_dtype == torch.int16:
            self.param = (self.param * 1e4).to(torch.int16)
        self.sum_sq = noise(self.entries, 5).abs()
        self.exp_avg_sq = noise(self.entries, 6).abs()
        self.step_size = noise(self.entries, 7).abs() * 0.01
        self.inv_numel = noise(self.entries, 8).abs()
        self.exp_avg_sq_E = noise(self.table.numel, 9).abs()
        self.group = (torch.arange(self.entries) % 3).to(torch.int32)
        self.domain = (torch.arange(self.entries) % 3 - 1).to(torch.int8)
        self.scalars = StepScalars(3, CPU, seed=7)
        self.scalars.fill(
            [{"lr": 0.01 * n, "eps": 1e-8 * n, "weight_decay": 0.1} for n in (1, 2, 3)],
            betas=(0.9, 0.95), step=3, grad_scale=grad_scale,
        )  # fmt: skip

    #: What kernels may write.
    STATE = (
        "exp_avg", "weight", "param", "sum_sq", "exp_avg_sq", "step_size", "exp_avg_sq_E",
    )  # fmt: skip

    def after(self, function, backend):
        """Return copies of all state after a call, which leaves the case's own as it was."""
        kept = {name: getattr(self, name) for name in self.STATE}
        for name, value in kept.items():
            if value is not None:
                moved = torch.empty(len(value) + value.storage_offset(), dtype=value.dtype)
                moved = moved[value.storage_offset() :]
                setattr(self, name, moved.copy_(value))
        function(self, backend)
        found = {name: getattr(self, name) for name in self.STATE}
        for name, value in kept.items():
            setattr(self, name, value)
        return found


def block_sum_sq(case, backend):
    backend.block_sum_sq_(case.sum_sq, case.grad, case.table)


def step_size(case, backend, index=None):
    backend.block_step_size_(
        case.exp_avg_sq, case.step_size, case.sum_sq, inv_numel_B=case.inv_numel,
        group_B=case.group, scalars=case.scalars, index=index,
    )  # fmt: skip


def update(case, backend):
    backend.update_(
        case.param, case.exp_avg, case.weight, case.grad, case.table,
        step_size_B=case.step_size, group_B=case.group, scalars=case.scalars,
        origin_B=case.origins,
    )  # fmt: skip


def update_whole(case, backend):
    backend.update_whole_(
        case.param, case.exp_avg, case.weight, case.grad, case.table,
        exp_avg_sq_B=case.exp_avg_sq, step_size_B=case.step_size, sum_sq_B=case.sum_sq,
        inv_numel_B=case.inv_numel, group_B=case.group, scalars=case.scalars,
        origin_B=case.origins,
    )  # fmt: skip


def update_elementwise(case, backend):
    backend.update_elementwise_(
        case.param, case.exp_avg, case.exp_avg_sq_E, case.weight, case.grad, case.table,
        group_B=case.group, scalars=case.scalars, origin_B=case.origins,
    )  # fmt: skip
