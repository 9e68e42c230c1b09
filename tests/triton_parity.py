"""Triton's kernels in its interpreter against the reference; run by test_triton.py.

Triton decides when it is imported whether it interprets, for the whole process. So these tests
are collected only if named, with TRITON_INTERPRET=1, in a process of their own.

Bit-equal to the reference, given the same inputs: v, step sizes, m, main parameters, remainders
and model weights. Sums of squares are not, because they are added in another order.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_triton.py"

from megatron_adam_mini.kernels import reference, triton_gpu, triton_tiles
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.kernels.segments import SegmentTable

CPU = torch.device("cpu")
#: Squares are added in float32 within 16,384 elements: some ten roundings of 2**-24 in a row by
#: one thread, and a tree of at most 11 levels.
SUM_RTOL = 3e-6
#: Two orders of adding a few dozen float64 numbers.
NORM_RTOL = 1e-14

LONG = triton_tiles.ROW_LIMIT
#: (gap before, length) of segments, and the gap at the end. "aligned" are those that Megatron makes.
LAYOUTS = {
    "aligned rows": ([(0, 64)] * 3 + [(64, 128)] * 40 + [(0, 1000)] * 5, 64),
    "aligned passes": ([(0, 4096)] * 2 + [(16, 2048), (0, 2056)], 8),
    "aligned parts": ([(64, 2 * LONG), (0, LONG), (0, LONG + 8), (0, 512)], 0),
    "single elements": ([(0, 1)] * 5 + [(2, 1), (0, 3)], 1),
    "odd rows": ([(3, 3)] * 4 + [(0, 7)] * 700 + [(5, 1001)] * 3, 2),
    "odd start": ([(5, 64)] + [(0, 64)] * 3 + [(0, 2500), (0, 2500)], 3),
    "odd parts": ([(3, 2 * LONG + 5), (1, LONG + 1), (0, LONG + 1)], 1),
    "uneven": ([(0, n) for n in (13, 1, 64, 2, 2, 31, 5)], 2),
    "none": ([], 10),
    "empty slice": ([], 0),
}
SMALL = ("aligned rows", "odd start", "uneven")

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


@pytest.fixture(autouse=True)
def correct_square_roots(monkeypatch):
    """Let torch round square roots correctly, as GPUs do; MKL's are 1 ulp off in 0.6 % of cases."""
    monkeypatch.setattr(
        torch.Tensor, "sqrt", lambda value: torch.sqrt(value.double()).to(value.dtype)
    )


def noise(numel, seed, dtype=torch.float32):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor):
    """Return bit patterns; NaNs of different payload count as equal, signed zeros do not."""
    if not tensor.dtype.is_floating_point:
        return tensor.clone()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    quiet = torch.where(tensor.isnan(), torch.nan, tensor)
    return quiet.view(kinds[tensor.element_size()])


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
        origin_S = (start_S * 3 + 0xFFFFFF00) if subset else None
        index_S = np.arange(len(start_S)) + 2 if subset else None
        self.table = SegmentTable(start_S, end_S, CPU, index_S, origin_S)
        if subset:
            self.table = self.table.subset(np.arange(len(start_S)) % 2 == 0)
        self.entries = len(start_S) + 4
        moment_dtype, self.stochastic = moment
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
        stochastic=case.stochastic,
    )  # fmt: skip


def update_whole(case, backend):
    backend.update_whole_(
        case.param, case.exp_avg, case.weight, case.grad, case.table,
        exp_avg_sq_B=case.exp_avg_sq, step_size_B=case.step_size, sum_sq_B=case.sum_sq,
        inv_numel_B=case.inv_numel, group_B=case.group, scalars=case.scalars,
        stochastic=case.stochastic,
    )  # fmt: skip


def update_elementwise(case, backend):
    backend.update_elementwise_(
        case.param, case.exp_avg, case.exp_avg_sq_E, case.weight, case.grad, case.table,
        group_B=case.group, scalars=case.scalars, stochastic=case.stochastic,
    )  # fmt: skip


def whole_from_found_sums(sum_sq):
    """Return update_whole_ by the reference's pieces, from sums that are known already."""

    def function(case, backend):
        finite = sum_sq[torch.from_numpy(case.table.indices)].isfinite()
        case.sum_sq.copy_(sum_sq)
        step_size(case, backend, torch.from_numpy(case.table.indices)[finite])
        table, case.table = case.table, case.table.subset(finite.numpy())
        update(case, backend)
        case.table = table

    return function


def assert_equal_bits(found, expected):
    for name, value in expected.items():
        if value is None:
            continue
        differ = (bits(found[name]) != bits(value)).nonzero().flatten()
        assert not len(differ), (
            f"{name} differs at {len(differ)} of {len(value)}, first at {differ[:5].tolist()}: "
            f"{found[name][differ[:5]].tolist()} instead of {value[differ[:5]].tolist()}"
        )


def assert_whole(case):
    """Check update_whole_: sums within a tolerance, and all that follows from them bit by bit."""
    before = case.sum_sq.clone()
    found = case.after(update_whole, triton_gpu)
    sums = case.after(block_sum_sq, reference)["sum_sq"]
    torch.testing.assert_close(found["sum_sq"], sums, rtol=SUM_RTOL, atol=0, equal_nan=True)
    untouched = torch.ones(case.entries, dtype=torch.bool)
    untouched[torch.from_numpy(case.table.indices)] = False
    assert torch.equal(found["sum_sq"][untouched], before[untouched])
    assert_equal_bits(found, case.after(whole_from_found_sums(found["sum_sq"]), reference))
    return found


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_squares(layout, grad):
    case = Case(layout, grad)
    found = case.after(block_sum_sq, triton_gpu)["sum_sq"]
    expected = case.after(block_sum_sq, reference)["sum_sq"]
    torch.testing.assert_close(found, expected, rtol=SUM_RTOL, atol=0)


@pytest.mark.parametrize("kind", [update, update_elementwise, update_whole])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, kind):
    case = Case(layout, torch.float32, (torch.bfloat16, True), STORAGE[1])
    if kind is update_whole:
        assert_whole(case)
    else:
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("kind", [update, update_elementwise, update_whole])
@pytest.mark.parametrize(("grad", "moment", "storage"), DTYPES)
def test_dtypes(grad, moment, storage, kind, layout):
    case = Case(layout, grad, moment, storage)
    if kind is update_whole:
        assert_whole(case)
    else:
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


@pytest.mark.parametrize("unaligned", [False, True])
@pytest.mark.parametrize("layout", ["aligned rows", "odd start", "odd parts"])
def test_subset_of_segments_with_entries_and_numbers_of_their_own(layout, unaligned):
    case = Case(
        layout, torch.bfloat16, (torch.bfloat16, True), STORAGE[3], subset=True, unaligned=unaligned
    )
    assert_whole(case)
    for kind in (update, update_elementwise):
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [step_size, update, update_elementwise, update_whole])
def test_nothing_is_written_if_grad_scale_is_not_finite(kind, bad):
    case = Case("odd parts", torch.float32, (torch.bfloat16, True), STORAGE[3], grad_scale=bad)
    before = case.after(lambda *_: None, reference)
    assert_equal_bits(case.after(kind, triton_gpu), before)
    good = Case("odd parts", torch.float32, (torch.bfloat16, True), STORAGE[3])
    after = good.after(kind, triton_gpu)
    assert any(
        value is not None and not torch.equal(bits(value), bits(before[name]))
        for name, value in after.items()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layout", ["aligned rows", "aligned parts"])
@pytest.mark.parametrize("storage", [STORAGE[1], STORAGE[3]])
def test_gradients_that_are_not_finite(storage, layout, bad):
    """A sum that overflows counts as not finite, too."""
    case = Case(layout, torch.float32, (torch.bfloat16, False), storage)
    case.grad[int(case.table.start_S[1]) + 17] = bad
    case.grad[int(case.table.end_S[-1]) - 1] = bad
    found = assert_whole(case)
    assert found["sum_sq"][: len(case.table)].isfinite().tolist() == [
        index not in (1, len(case.table) - 1) for index in range(len(case.table))
    ]
    for kind in (update, update_elementwise):
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


def test_rounding_of_special_values():
    """Ties, signed zeros, denormals, values that round to infinity, and NaN go through update_."""
    patterns = [0x3F808000, 0x3F818000, 0x80000000, 1, 0x8000, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
                0x7F7F8000, 0x7F7F7FFF, 0x7FC00001, 0x477FF000, 0x33000000, 0xBF808001]  # fmt: skip
    special = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    for storage, moment in itertools.product(STORAGE[:3], MOMENTS):
        case = Case("aligned rows", torch.float32, moment, storage)
        case.scalars.fill(
            [{"lr": 0.0, "eps": 1e-8, "weight_decay": 0.0}] * 3,
            betas=(0.0, 0.95), step=1, grad_scale=1.0,
        )  # fmt: skip
        case.step_size.zero_()
        case.param[: len(special)] = special
        case.grad[: len(special)] = special
        case.exp_avg.zero_()
        assert_equal_bits(case.after(update, triton_gpu), case.after(update, reference))


def test_step_sizes():
    case = Case("aligned rows")
    for index in (None, torch.tensor([3, 0, 7]), torch.empty(0, dtype=torch.int64)):
        found = case.after(lambda c, b, index=index: step_size(c, b, index), triton_gpu)
        expected = case.after(lambda c, b, index=index: step_size(c, b, index), reference)
        assert_equal_bits(found, expected)


@pytest.mark.parametrize("entries", [0, 1, 5000])
@pytest.mark.parametrize("domains", [1, 2, 4])
def test_norm(domains, entries):
    sum_sq = noise(entries, 1).abs()
    domain = (torch.arange(entries) % (domains + 1) - 1).to(torch.int8)
    stats = {
        backend.NAME: torch.full((domains, 2), 7.0, dtype=torch.float64)
        for backend in (reference, triton_gpu)
    }
    for bad in (None, float("inf"), float("nan")):
        if bad is not None:
            sum_sq[:3] = bad
        for backend in (reference, triton_gpu):
            backend.norm_partials_(stats[backend.NAME], sum_sq, domain)
        torch.testing.assert_close(
            stats["triton"], stats["reference"], rtol=NORM_RTOL, atol=0, equal_nan=True
        )


def test_no_domain():
    triton_gpu.norm_partials_(torch.zeros(0, 2, dtype=torch.float64), noise(3, 1), torch.zeros(3))


def test_tables_and_scratch_are_made_once(monkeypatch):
    """A later step neither copies to the device nor allocates, so it can be captured."""
    case = Case("odd parts", torch.float32, (torch.bfloat16, True), STORAGE[1])
    kinds = (block_sum_sq, step_size, update, update_whole, update_elementwise)
    for kind in kinds:
        kind(case, triton_gpu)
    for name in ("from_numpy", "zeros", "empty", "tensor"):
        monkeypatch.setattr(torch, name, None)
    for kind in kinds:
        kind(case, triton_gpu)
