"""Inputs for the Triton kernels, shared by the tests that interpret and that compile them.

Does not import triton, because whether it interprets is decided by then.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from megatron_adam_mini.kernels import BufferTensors, SegmentVectors, StepScalars
from megatron_adam_mini.kernels.triton_tiles import ROW_LIMIT
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.rounding import fp8_scale

CPU = torch.device("cpu")

LONG = ROW_LIMIT
#: (gap before, length) of segments, and the gap at the end. A third number: the gap before the
#: segment in the state, whose place is then not that in the buffer.
#: The interpreter takes about 0.1 s per program, so layouts make few programs.
WHOLE_VECTORS = {
    "few": ([(0, 64)] * 3, 0),
    "rows": ([(0, 64)] * 3 + [(64, 128)] * 20 + [(0, 1000)] * 3, 64),
    "passes": ([(0, 4096), (16, 2048), (0, 2056)], 8),
    "parts": ([(64, LONG + 64), (0, LONG), (0, 512)], 0),
    "slices": ([(64, 64, 0), (0, 64, 0), (128, 128, 0), (32, 4096, 64)], 8),
    "parts elsewhere": ([(64, 512, 192), (64, LONG + 64, 0)], 0),
}
SINGLE_ELEMENTS = {
    "single elements": ([(0, 1)] * 5 + [(2, 1), (0, 3)], 1),
    "odd rows": ([(3, 3)] + [(0, 7)] * 300 + [(5, 1001)] * 2, 2),
    "odd start": ([(5, 64)] + [(0, 64)] * 3 + [(0, 2500), (0, 2500)], 3),
    "odd parts": ([(3, LONG + 5), (1, 40)], 1),
    "mixed": ([(0, 64)] * 3 + [(1, 7)], 3),
    "mixed elsewhere": ([(8, 64, 0), (8, 64, 17), (3, 7, 0)], 3),
    # Shifts of -60, -60, -64, -63, -71: in vectors of eight, of four and of one.
    "odd slices": ([(64, 64, 4), (0, 64, 0), (64, 64, 60), (0, 2504, 1), (8, 40, 0)], 3),
}
LAYOUTS = WHOLE_VECTORS | SINGLE_ELEMENTS | {"none": ([], 10), "empty slice": ([], 0)}

#: Runs of rows: gap before the run, elements, width, elements of the run that are elsewhere, and,
#: if it differs, the gap in the state. Vectors begin with the runs; they may be in two rows.
COLUMNS_IN_VECTORS = {
    "matrix": ([(0, 1024, 64, 0)], 0),
    "lines": ([(64, 4096, 64, 0), (0, 2064, 1032, 0)], 8),
    "over row ends": ([(8, 1200, 100, 0), (16, 648, 37, 0, 8)], 0),
    "shorter than a row": ([(8, 160, 4096, 0), (0, 2304, 2048, 0, 0)], 0),
    "parts of runs": ([(8, 1000, 96, 40), (8, 640, 37, 1001, 24)], 0),
}
COLUMNS = COLUMNS_IN_VECTORS | {
    "odd columns": ([(0, 100, 1, 0), (4, 602, 3, 0), (2, 33, 5, 0, 7)], 1),
    "odd runs": ([(3, 301, 7, 0), (5, 2500, 1001, 0, 4), (1, 5, 9, 2, 0)], 2),
    "no runs": ([], 10),
}
#: Sums only: windows would be many.
COLUMNS_IN_PARTS = {"parts": ([(8, 1030 * 140 + 24, 1030, 0), (0, 3, 2, 0)], 0)}

GRADS = (torch.float32, torch.bfloat16)
#: exp_avg's dtype, and whether it is rounded stochastically.
MOMENTS = (
    (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.uint8, True),
)  # fmt: skip
#: Dtypes of main parameters and of model weights; int16: remainders; uint8:
#: quantized weights, which kernels leave alone.
STORAGE = (
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.int16, torch.bfloat16),
    (torch.float32, torch.uint8),
)
#: With m in 8 bits: in vectors of four and of eight.
EIGHT_BITS = [(GRADS[0], MOMENTS[3], STORAGE[0]), (GRADS[1], MOMENTS[3], STORAGE[3])]
DTYPES = [*itertools.product(GRADS, MOMENTS[:3], STORAGE), *EIGHT_BITS]


def noise(numel, seed, dtype=torch.float32):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def elements(start_S, end_S):
    """Return the elements of all segments, one segment after the other."""
    ranges = [torch.arange(a, b) for a, b in zip(start_S, end_S, strict=True)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ranges])


class Case:
    """Inputs of all kernels for one layout.

    Elements of segments do not depend on where the state lies.

    Args:
        subset: every other segment, entries moved.
        unaligned: no stream begins at a vector.
        in_place: the state lies where the buffer does, whatever the layout says.
    """

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
        in_place=False,
    ):
        end, state_end, tail = self._lay_out(layout, subset=subset, in_place=in_place)
        moment_dtype, stochastic = moment
        # The rows of entry 2, the first one that subsets use, pass the end of 32 bits.
        numbers = torch.arange(self.entries) * 1000 - (2256 if subset else 0)
        self.origins = numbers.to(torch.int32) if stochastic else None
        param_dtype, weight_dtype = storage
        skipped = 1 if unaligned else 0

        def stream(seed, dtype, *, of_state):
            at, last = (self.state_at, state_end) if of_state else (self.at, end)
            found = noise(skipped + last + tail, seed + 20)[skipped:]
            found[at] = noise(len(at), seed)
            found = found * 1e4 if dtype == torch.int16 else found
            if dtype == torch.uint8 and of_state:  # codes of m, NaN among them
                found = (found * 1e4) % 256
            moved = torch.empty(skipped + len(found), dtype=dtype)[skipped:]
            return moved.copy_(found)

        self.grad = stream(1, grad, of_state=False)
        self.exp_avg = stream(2, moment_dtype, of_state=True)
        self.weight = None if weight_dtype is None else stream(3, weight_dtype, of_state=False)
        self.param = stream(4, param_dtype, of_state=weight_dtype is not None)
        self.sum_sq = noise(self.entries, 5).abs()
        self.exp_avg_sq = noise(self.entries, 6).abs()
        has_codes = moment_dtype == torch.uint8
        scales = fp8_scale(noise(2 * self.entries, 10).abs())
        self.exp_avg_scale = scales.view(-1, 2) if has_codes else None
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

    def _lay_out(self, layout, *, subset, in_place):
        """Set table, elements and number of entries; return the ends of buffer and state."""
        pieces, tail = LAYOUTS[layout]
        length_S = np.asarray([piece[1] for piece in pieces], dtype=np.int64)
        end_S = length_S.cumsum() + np.cumsum([piece[0] for piece in pieces], dtype=np.int64)
        gaps = [piece[0 if in_place else 2 * (len(piece) - 2)] for piece in pieces]
        state_end_S = length_S.cumsum() + np.cumsum(gaps, dtype=np.int64)
        start_S = end_S - length_S
        index_S = np.arange(len(start_S)) + 2 if subset else None
        self.table = SegmentTable(start_S, end_S, index_S, state_end_S - end_S)
        if subset:
            self.table = self.table.subset(np.arange(len(start_S)) % 2 == 0)
        self.at = elements(start_S, end_S)
        self.state_at = elements(state_end_S - length_S, state_end_S)
        self.entries = len(start_S) + 4
        return int(end_S.max(initial=0)), int(state_end_S.max(initial=0)), tail

    @property
    def tensors(self):
        return BufferTensors(self.param, self.exp_avg, self.weight, self.grad)

    @property
    def vectors(self):
        return SegmentVectors(
            self.exp_avg_sq, self.step_size, self.sum_sq, self.inv_numel, self.group, self.origins,
            self.exp_avg_scale,
        )  # fmt: skip

    #: What kernels may write.
    STATE = (
        "exp_avg", "weight", "param", "sum_sq", "exp_avg_sq", "step_size", "exp_avg_sq_E",
        "exp_avg_scale",
    )  # fmt: skip

    def after(self, function, backend):
        """Return copies of all state after a call, which leaves the case's own as it was."""
        kept = {name: getattr(self, name) for name in self.STATE}
        for name, value in kept.items():
            if value is not None:
                moved = torch.empty(value.numel() + value.storage_offset(), dtype=value.dtype)
                moved = moved[value.storage_offset() :].view(value.shape)
                setattr(self, name, moved.copy_(value))
        function(self, backend)
        found = {name: getattr(self, name) for name in self.STATE}
        for name, value in kept.items():
            setattr(self, name, value)
        return found

    def of_segments(self, state):
        """Return state as :meth:`after` returns it, of streams only what is in segments."""
        param_at = self.at if self.weight is None else self.state_at
        places = {"param": param_at, "exp_avg": self.state_at, "weight": self.at}
        return {
            name: value if value is None or name not in places else value[places[name]]
            for name, value in state.items()
        }


class ColumnCase(Case):
    """The same for runs of rows, whose columns are segments; subsets are of these."""

    def _lay_out(self, layout, *, subset, in_place):
        pieces, tail = (COLUMNS | COLUMNS_IN_PARTS)[layout]
        found, end, state_end, index = [], 0, 0, 2
        for number, (gap, numel, width, skip, *state_gap) in enumerate(pieces):
            start, state_start = end + gap, state_end + (gap if in_place else [*state_gap, gap][0])
            end, state_end = start + numel, state_start + numel
            stride = (width, 3 * width, 2**32 + 7)[number % 3]
            found.append((start, end, width, index, skip, state_start - start, stride))
            index += min(width, skip + numel) + 1
        chosen = found[::2] if subset else found
        self.table = ColumnTable(*np.asarray(chosen, dtype=np.int64).reshape(-1, 7).T)
        starts, ends, _, _, _, shifts, _ = np.asarray(found, dtype=np.int64).reshape(-1, 7).T
        self.at, self.state_at = elements(starts, ends), elements(starts + shifts, ends + shifts)
        self.entries = index + 1
        return end, state_end, tail


def segment_sum_sq(case, backend):
    backend.segment_sum_sq_(case.sum_sq, case.grad, case.table)


def column_sum_sq(case, backend):
    backend.column_sum_sq_(case.sum_sq, case.grad, case.table)


def update_columns(case, backend):
    backend.update_columns_(case.tensors, case.table, case.vectors, case.scalars)


def step_size(case, backend, index=None):
    backend.segment_step_size_(case.vectors, case.scalars, index)


def update(case, backend):
    backend.update_(case.tensors, case.table, case.vectors, case.scalars)


def update_in_one_pass(case, backend):
    backend.update_in_one_pass_(case.tensors, case.table, case.vectors, case.scalars)


def update_elementwise(case, backend):
    backend.update_elementwise_(
        case.tensors, case.exp_avg_sq_E, case.table, case.vectors, case.scalars
    )


def ordered_sums(seed: int, rows: int, longest: int, num_sources: int) -> OrderedSums:
    """Return a table whose rows have up to ``longest`` sources, and targets behind all sources."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, longest + 1, rows)
    sources = generator.integers(0, num_sources, counts.sum())
    return OrderedSums(num_sources + generator.permutation(rows), counts, sources)
