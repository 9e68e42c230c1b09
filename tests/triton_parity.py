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

from megatron_adam_mini.kernels import reference, triton_gpu
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from tests import triton_interpreter
from tests.triton_cases import (
    COLUMNS,
    COLUMNS_IN_PARTS,
    DTYPES,
    GRADS,
    LAYOUTS,
    MOMENTS,
    STORAGE,
    WHOLE_VECTORS,
    Case,
    ColumnCase,
    column_sum_sq,
    noise,
    ordered_sums,
    segment_sum_sq,
    step_size,
    update,
    update_columns,
    update_elementwise,
    update_in_one_pass,
)  # fmt: skip
from tests.warm_up import assert_unchanged, lasting, make_rank

triton_interpreter.install()

#: Squares are added in float32 within 16,384 elements: some ten roundings of 2**-24 in a row by
#: one thread, and a tree of at most 11 levels.
SUM_RTOL = 3e-6
#: Two orders of adding a few dozen float64 numbers.
NORM_RTOL = 1e-14

#: Layouts with state that does not lie where its buffer does.
ELSEWHERE = ("slices", "parts elsewhere", "mixed elsewhere", "odd slices")


@pytest.fixture(autouse=True)
def correct_square_roots(monkeypatch):
    """Let torch round square roots correctly, as GPUs do; MKL's are 1 ulp off in 0.6 % of cases."""

    def root(value):
        return torch.from_numpy(np.sqrt(value.reshape(-1).numpy())).view_as(value)

    monkeypatch.setattr(torch.Tensor, "sqrt", root)


def bits(tensor):
    """Return bit patterns; NaNs of different payload count as equal, signed zeros do not."""
    if not tensor.dtype.is_floating_point:
        return tensor.clone()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    quiet = torch.where(tensor.isnan(), torch.nan, tensor)
    return quiet.view(kinds[tensor.element_size()])


def one_pass_from_found_sums(sum_sq):
    """Return update_in_one_pass_ by the reference's pieces, from sums that are known already."""

    def function(case, backend):
        case.sum_sq.copy_(sum_sq)
        step_size(case, backend, torch.from_numpy(case.table.indices))
        update(case, backend)

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


def assert_one_pass(case):
    """Check sums within a tolerance, and all that follows from them bit by bit."""
    before = case.sum_sq.clone()
    found = case.after(update_in_one_pass, triton_gpu)
    sums = case.after(segment_sum_sq, reference)["sum_sq"]
    torch.testing.assert_close(found["sum_sq"], sums, rtol=SUM_RTOL, atol=0, equal_nan=True)
    untouched = torch.ones(case.entries, dtype=torch.bool)
    untouched[torch.from_numpy(case.table.indices)] = False
    assert torch.equal(found["sum_sq"][untouched], before[untouched])
    assert_equal_bits(found, case.after(one_pass_from_found_sums(found["sum_sq"]), reference))
    return found


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_squares(layout, grad):
    case = Case(layout, grad)
    found = case.after(segment_sum_sq, triton_gpu)["sum_sq"]
    expected = case.after(segment_sum_sq, reference)["sum_sq"]
    torch.testing.assert_close(found, expected, rtol=SUM_RTOL, atol=0)
    # The same bits in parts, as sums behind the backward pass are taken.
    parts, chosen = found.clone(), np.arange(len(case.table)) % 3 == 1
    parts[torch.from_numpy(case.table.indices)] = torch.nan
    for table in (case.table.subset(chosen), case.table.subset(~chosen)):
        triton_gpu.segment_sum_sq_(parts, case.grad, table)
    assert torch.equal(parts, found)


@pytest.mark.parametrize("kind", [update, update_elementwise, update_in_one_pass])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, kind):
    case = Case(layout, torch.float32, (torch.bfloat16, True), STORAGE[1])
    if kind is update_in_one_pass:
        assert_one_pass(case)
    else:
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


@pytest.mark.parametrize("kind", [update, update_elementwise, update_in_one_pass])
@pytest.mark.parametrize(("grad", "moment", "storage"), DTYPES)
@pytest.mark.parametrize("layout", ["mixed", "mixed elsewhere"])
def test_dtypes(layout, grad, moment, storage, kind):
    case = Case(layout, grad, moment, storage)
    if kind is update_in_one_pass:
        assert_one_pass(case)
    else:
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


def sums_of_columns(layout, grad=torch.float32, **options):
    case = ColumnCase(layout, grad, **options)
    found = case.after(column_sum_sq, triton_gpu)["sum_sq"]
    expected = case.after(column_sum_sq, reference)["sum_sq"]
    torch.testing.assert_close(found, expected, rtol=SUM_RTOL, atol=0)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", COLUMNS | COLUMNS_IN_PARTS)
def test_sums_of_columns(layout, grad):
    if not ColumnCase(layout).table.skip_C.any():
        sums_of_columns(layout, grad)


@pytest.mark.parametrize("layout", COLUMNS)
def test_columns(layout):
    case = ColumnCase(layout, torch.float32, (torch.bfloat16, True), STORAGE[1])
    assert_equal_bits(case.after(update_columns, triton_gpu), case.after(update_columns, reference))


@pytest.mark.parametrize(("grad", "moment", "storage"), DTYPES)
def test_dtypes_of_columns(grad, moment, storage):
    case = ColumnCase("over row ends", grad, moment, storage)
    assert_equal_bits(case.after(update_columns, triton_gpu), case.after(update_columns, reference))


@pytest.mark.parametrize("unaligned", [False, True])
def test_some_runs_with_entries_and_numbers_of_their_own(unaligned):
    options = {"subset": True, "unaligned": unaligned}
    sums_of_columns("over row ends", torch.bfloat16, **options)
    for layout in ("parts of runs", "odd runs"):
        case = ColumnCase(layout, torch.bfloat16, (torch.bfloat16, True), STORAGE[3], **options)
        assert_equal_bits(
            case.after(update_columns, triton_gpu), case.after(update_columns, reference)
        )


@pytest.mark.parametrize("unaligned", [False, True])
@pytest.mark.parametrize("layout", ["mixed", "odd start", "odd slices"])
def test_subset_of_segments_with_entries_and_numbers_of_their_own(layout, unaligned):
    case = Case(
        layout, torch.bfloat16, (torch.bfloat16, True), STORAGE[3], subset=True, unaligned=unaligned
    )
    assert_one_pass(case)
    for kind in (update, update_elementwise):
        assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


@pytest.mark.parametrize("storage", [STORAGE[0], STORAGE[1], STORAGE[3]])
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *itertools.product(ELSEWHERE, [update, update_elementwise]),
        # Where the state does not suit vectors, also gradients are added in another order.
        *((layout, update_in_one_pass) for layout in ELSEWHERE if layout in WHOLE_VECTORS),
    ],
)
def test_where_the_state_lies_changes_no_bit(layout, kind, storage):
    """A step equals one with a copy of the state that lies where the buffer does."""
    here, elsewhere = (
        Case(layout, torch.float32, (torch.bfloat16, True), storage, in_place=in_place)
        for in_place in (True, False)
    )
    assert_equal_bits(
        elsewhere.of_segments(elsewhere.after(kind, triton_gpu)),
        here.of_segments(here.after(kind, triton_gpu)),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [step_size, update, update_elementwise, update_in_one_pass])
def test_nothing_is_written_if_grad_scale_is_not_finite(kind, bad):
    case = Case("mixed", torch.float32, (torch.bfloat16, True), STORAGE[3], grad_scale=bad)
    before = case.after(lambda *_: None, reference)
    assert_equal_bits(case.after(kind, triton_gpu), before)
    good = Case("mixed", torch.float32, (torch.bfloat16, True), STORAGE[3])
    after = good.after(kind, triton_gpu)
    assert any(
        value is not None and not torch.equal(bits(value), bits(before[name]))
        for name, value in after.items()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_column_is_written_if_grad_scale_is_not_finite(bad):
    case = ColumnCase("matrix", torch.float32, (torch.bfloat16, True), STORAGE[3], grad_scale=bad)
    assert_equal_bits(
        case.after(update_columns, triton_gpu), case.after(lambda *_: None, reference)
    )


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_columns_with_gradients_that_are_not_finite():
    case = ColumnCase("over row ends")
    for bad, victim in ((float("nan"), 5), (float("inf"), 1199), (1e30, 1201)):
        case.grad[case.at[victim]] = bad
    found = case.after(column_sum_sq, triton_gpu)["sum_sq"]
    assert (~found.isfinite()).nonzero().flatten().tolist() == [2 + 5, 2 + 99, 2 + 101 + 1]
    assert_equal_bits(case.after(update_columns, triton_gpu), case.after(update_columns, reference))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(
    ("layout", "storage"), [("few", STORAGE[1]), ("few", STORAGE[3]), ("parts", STORAGE[1])]
)
def test_gradients_that_are_not_finite(layout, storage, bad):
    """A sum that overflows counts as not finite, too."""
    case = Case(layout, torch.float32, (torch.bfloat16, False), storage)
    case.grad[int(case.table.start_S[1]) + 17] = bad
    case.grad[int(case.table.end_S[-1]) - 1] = bad
    found = assert_one_pass(case)
    assert found["sum_sq"][: len(case.table)].isfinite().tolist() == [
        index not in (1, len(case.table) - 1) for index in range(len(case.table))
    ]
    if layout == "few":
        for kind in (update, update_elementwise):
            assert_equal_bits(case.after(kind, triton_gpu), case.after(kind, reference))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_rounding_of_special_values():
    """Ties, signed zeros, denormals, values that round to infinity, and NaN go through update_."""
    patterns = [0x3F808000, 0x3F818000, 0x80000000, 1, 0x8000, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
                0x7F7F8000, 0x7F7F7FFF, 0x7FC00001, 0x477FF000, 0x33000000, 0xBF808001]  # fmt: skip
    special = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    for storage, moment in itertools.product(STORAGE[:3], MOMENTS):
        case = Case("few", torch.float32, moment, storage)
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
    case = Case("rows")
    for index in (None, torch.tensor([3, 0, 7]), torch.empty(0, dtype=torch.int64)):
        found = case.after(lambda c, b, index=index: step_size(c, b, index), triton_gpu)
        expected = case.after(lambda c, b, index=index: step_size(c, b, index), reference)
        assert_equal_bits(found, expected)


@pytest.mark.parametrize(("rows", "longest"), [(0, 0), (1, 1), (300, 3), (5, 100), (200, 33)])
def test_ordered_sums(rows, longest):
    """Whole numbers, whose sums are exact in any order; every position is compared."""
    table = ordered_sums(1, rows, longest, 50)
    values = torch.cat([torch.arange(50.0), torch.full((rows + 3,), 7.0)])
    found, expected = values.clone(), values.clone()
    triton_gpu.ordered_sum_(found, table)
    reference.ordered_sum_(expected, table)
    assert torch.equal(found, expected)


def test_an_ordered_sum_depends_on_its_sources_alone():
    """Not on the row's place, nor on other rows: replicas have other tables."""
    values = torch.cat([noise(50, 1).abs() * 10.0 ** torch.arange(50).sub(25), torch.zeros(700)])
    values = values.float()
    table = ordered_sums(2, 300, 40, 50)
    sources = np.split(table.source, table.bounds[1:-1])
    chosen = np.random.default_rng(3).permutation(300)[:200]
    other = OrderedSums(
        table.target[chosen] + 300,
        table.counts[chosen],
        np.concatenate([sources[row] for row in chosen]),
    )
    for each in (table, other):
        triton_gpu.ordered_sum_(values, each)
    assert torch.equal(values[table.target[chosen]], values[other.target])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_ordered_sums_of_numbers_that_are_not_finite():
    values = torch.tensor([float("inf"), float("nan"), 3.0, 7.0, 7.0, 7.0, 7.0])
    counts, source = np.asarray([0, 1, 2, 2]), np.asarray([2, 0, 2, 1, 2])
    triton_gpu.ordered_sum_(values, OrderedSums(np.arange(3, 7), counts, source))
    assert values[3:5].tolist() == [0.0, 3.0]
    assert not values[5:].isfinite().any()


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


INF, NAN = float("inf"), float("nan")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by):RuntimeWarning")
@pytest.mark.parametrize("inv_scale", [None, 1.0, 2.0**-16, 1 / 3, 3e-39, 0.0, INF, NAN])
def test_decide(inv_scale):
    """Bit-equal: norms of any size, no clipping and much, thresholds, sums that are not finite."""
    random = np.random.default_rng(1)
    norms_sq = [0.0, 5e-324, 1e-30, 1.0, 2.0**126, 2.0**127, 1e70, 1e308, INF, NAN]
    norms_sq += (10.0 ** random.uniform(-20, 60, 20)).tolist()
    for number, norm_sq in enumerate(norms_sq):
        stats = torch.tensor([[norm_sq, 0.0]], dtype=torch.float64)
        if number % 3:
            more = [[random.uniform(0, 2) * norm_sq, float(number % 5 == 0)]]
            stats = torch.cat([stats, torch.tensor(more, dtype=torch.float64)])
        options = {
            "clip_grad": random.choice([INF, 1.0, 0.3, 1e-6, 1e3]),
            "skip_threshold": random.choice([INF, 1e9, 1.0]),
            "largest_sq": random.choice([INF, 2.0**126, 1e-3]),
        }
        found = []
        for backend in (reference, triton_gpu):
            values = torch.full((3,), 7.0, dtype=torch.float64)
            scales = torch.full((3,), 7.0)
            scale = None if inv_scale is None else torch.tensor([inv_scale])
            backend.decide_(values, scales[1], stats, scale, **options)
            found.append({"values": values, "grad_scale": scales})
        assert_equal_bits(found[1], found[0])


def test_no_domain():
    triton_gpu.norm_partials_(torch.zeros(0, 2, dtype=torch.float64), noise(3, 1), torch.zeros(3))


def test_tables_and_scratch_are_made_once(monkeypatch):
    """A later step neither copies to the device nor allocates, so it can be captured."""
    case = Case("odd parts", torch.float32, (torch.bfloat16, True), STORAGE[1])
    columns = ColumnCase("odd runs", torch.float32, (torch.bfloat16, True), STORAGE[1], subset=True)
    columns.table.skip_C[:] = 0
    kinds = (segment_sum_sq, step_size, update, update_in_one_pass, update_elementwise)
    of_columns = (column_sum_sq, update_columns)
    for kind in kinds:
        kind(case, triton_gpu)
    for kind in of_columns:
        kind(columns, triton_gpu)
    values, sums = torch.zeros(20), ordered_sums(4, 10, 3, 10)
    triton_gpu.ordered_sum_(values, sums)
    for name in ("from_numpy", "zeros", "empty", "tensor"):
        monkeypatch.setattr(torch, name, None)
    for kind in kinds:
        kind(case, triton_gpu)
    for kind in of_columns:
        kind(columns, triton_gpu)
    triton_gpu.ordered_sum_(values, sums)


@pytest.mark.parametrize(
    "mode", ["small state, bf16 gradients", "columns", "single phase", "elementwise"]
)
def test_a_warm_up_writes_nothing_that_lasts(mode):
    optimizer = make_rank(mode, "triton")
    before = lasting(optimizer)
    assert optimizer.warm_up(clip_grad=1.0, inv_scale=torch.tensor([0.5]))
    assert_unchanged(optimizer, before)
