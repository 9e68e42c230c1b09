"""Every backend's kernels against loops in float64, segment by segment and element by element.

Triton's kernels run in its interpreter, in ``test_triton.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_adam_mini import rounding
from megatron_adam_mini.config import BACKENDS
from megatron_adam_mini.kernels import (
    BufferTensors,
    SegmentVectors,
    StepScalars,
    cpu,
    reference,
    select_backend,
)
from megatron_adam_mini.kernels.cpu_tiles import TILE_FIELDS, tiles
from megatron_adam_mini.plan.segment_table import SegmentTable

CPU = torch.device("cpu")
NAN = float("nan")

#: Sum of at most 200,000 squares. Kernels square and add in float32 or better, in runs of at most
#: a few thousand; adding up random roundings of 2**-24 = 6e-8 stays far below.
SUM_RTOL = 3e-6
#: A handful of float32 operations on positive numbers.
SCALAR_RTOL = 1e-6
#: One update: a handful of float32 operations, relative to the largest term of each sum.
UPDATE_TOL = 1e-6
#: Ten steps of AdamW with |p| about 1 and lr 1e-2: float32 roundings of p (6e-8 each) add up, and
#: bias corrections are taken in another order than in torch.
ADAMW_TOL = 2e-6

BETA1, BETA2 = 0.9, 0.95

#: Segment lengths with the gap before each; the last number is the gap at the end of the buffer.
IN_PLACE = {
    "one": ([(0, 7)], 0),
    "rows": ([(0, 16)] * 9, 0),
    "wide rows": ([(5, 300)] + [(0, 300)] * 10, 0),
    "many rows": ([(0, 5)] * 150, 0),
    "single elements": ([(0, 1)] * 5 + [(2, 1), (0, 3)], 1),
    "gaps": ([(3, 5), (0, 5), (1, 8), (0, 8), (0, 3), (4, 8)], 6),
    "long": ([(1, 400), (0, 64), (0, 64), (0, 400)], 3),
    "in parts": ([(3, 140_001), (0, 70_000), (0, 70_000), (0, 9)], 0),
    "uneven": ([(0, n) for n in (13, 1, 64, 2, 2, 31, 5)], 2),
    "none": ([], 10),
    "empty slice": ([], 0),
}
#: State that does not lie where its buffer does: a third number is the gap before it in the state.
ELSEWHERE = {
    "slices": ([(96, 64, 0), (0, 64, 0), (200, 48, 0), (0, 48, 0), (0, 5, 0)], 70),
    "state ahead": ([(0, 16, 33)] + [(0, 16, 0)] * 8 + [(3, 300, 20)], 0),
    "state apart": (
        [(7, 13, 0), (0, 13, 2), (0, 13, 1), (5, 70, 90), (0, 1, 0), (9, 130, 1), (30, 1, 0)], 4,
    ),
    "parts elsewhere": ([(1003, 140_001, 5), (200, 70_000, 0), (0, 9, 1)], 0),
}  # fmt: skip
LAYOUTS = IN_PLACE | ELSEWHERE
SMALL = [name for name in LAYOUTS if "parts" not in name]

#: grad, m, main parameter and weight, as the optimizer combines them.
STORAGE = {
    "fp32": (torch.float32, torch.float32, torch.float32, None),
    "bf16 m, fp32 weight": (torch.float32, torch.bfloat16, torch.float32, None),
    "fp32 grad, bf16 weight": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    "bf16 grad and weight": (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
    "fp16 grad and weight": (torch.float16, torch.float32, torch.float32, torch.float16),
    "fp16 weight": (torch.float32, torch.float32, torch.float32, torch.float16),
    "bf16 m": (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    "remainders": (torch.float32, torch.float32, torch.int16, torch.bfloat16),
    "bf16 m, remainders": (torch.bfloat16, torch.bfloat16, torch.int16, torch.bfloat16),
    "quantized weight": (torch.float32, torch.float32, torch.float32, torch.uint8),
    "8-bit m, fp32 weight": (torch.float32, torch.uint8, torch.float32, None),
    "8-bit m, remainders": (torch.bfloat16, torch.uint8, torch.int16, torch.bfloat16),
}


@pytest.fixture(params=[name for name in BACKENDS if name in ("reference", "cpu")])
def kernels(request):
    return select_backend(request.param, CPU)


@pytest.fixture
def correct_square_roots(monkeypatch):
    """Let torch round square roots correctly, as C++ does; MKL's are 1 ulp off in 0.6 % of cases.

    Which ones also depends on an element's place in what is passed to MKL.
    """
    monkeypatch.setattr(Tensor, "sqrt", lambda value: torch.sqrt(value.double()).to(value.dtype))


def one_segment(numel: int) -> SegmentTable:
    return SegmentTable(np.asarray([0]), np.asarray([numel]))


@dataclass
class Layout:
    """Segments in a buffer and in the state; their entries are some of vectors with more entries.

    Args:
        bounds: of the segments in the buffer.
        numel: elements of the buffer.
        state_starts: of the segments in the state.
        state_numel: elements of the state.
    """

    bounds: list[tuple[int, int]]
    numel: int
    state_starts: list[int]
    state_numel: int

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, ...]], tail: int = 0) -> Layout:
        bounds, starts, end, state_end = [], [], 0, 0
        for gap, length, *state_gap in pieces:
            start, state_start = end + gap, state_end + (state_gap or [gap])[0]
            end, state_end = start + length, state_start + length
            bounds.append((start, end))
            starts.append(state_start)
        return cls(bounds, end + tail, starts, state_end + tail)

    @property
    def in_place(self) -> Layout:
        """The same with state that lies where its buffer does."""
        return Layout(self.bounds, self.numel, [low for low, _ in self.bounds], self.numel)

    @property
    def entries(self) -> int:
        return len(self.bounds) + 5

    def entry(self, segment: int) -> int:
        return 2 + segment

    @property
    def shifts(self) -> list[int]:
        return [s - low for s, (low, _) in zip(self.state_starts, self.bounds, strict=True)]

    @cached_property
    def table(self) -> SegmentTable:
        bounds = np.asarray(self.bounds, dtype=np.int64).reshape(-1, 2)
        index = np.arange(len(bounds), dtype=np.int64) + self.entry(0)
        shifts = np.asarray(self.shifts, dtype=np.int64)
        return SegmentTable(bounds[:, 0], bounds[:, 1], index, shifts if shifts.any() else None)

    @cached_property
    def at(self) -> Tensor:
        """Elements of the buffer that are in segments, one segment after the other."""
        ranges = [torch.arange(low, high) for low, high in self.bounds]
        return torch.cat([torch.empty(0, dtype=torch.int64), *ranges])

    @cached_property
    def state_at(self) -> Tensor:
        """The same elements in the state."""
        lengths = torch.tensor([high - low for low, high in self.bounds], dtype=torch.int64)
        return self.at + torch.tensor(self.shifts, dtype=torch.int64).repeat_interleave(lengths)

    @property
    def parts(self) -> list[slice]:
        """Each segment's part of what ``at`` and ``state_at`` pick."""
        ends = np.cumsum([0, *(b - a for a, b in self.bounds)]).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    @property
    def origins(self) -> Tensor:
        """Numbers of the segments' first elements, of which 32 bits count; elsewhere nonsense."""
        found = torch.full((self.entries,), -1, dtype=torch.int64)
        for segment, (low, _) in enumerate(self.bounds):
            found[self.entry(segment)] = 7 * low + 0xFFFFFF00
        return found.to(torch.int32)

    @property
    def unused(self) -> Tensor:
        mask = torch.ones(self.entries, dtype=torch.bool)
        mask[2 : 2 + len(self.bounds)] = False
        return mask


def layout_of(name: str) -> Layout:
    return Layout.of(*LAYOUTS[name])


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return layout_of(request.param)


@pytest.fixture(params=SMALL)
def small_layout(request):
    """Layouts that loops over elements in Python can go through."""
    return layout_of(request.param)


def noise(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype)


def positive(numel: int, seed: int) -> Tensor:
    return noise(numel, seed).abs() + 0.01


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns, so that equal NaNs count as equal and signed zeros do not."""
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}
    return tensor.clone().view(kinds[tensor.element_size()])


def scalars_of(
    groups: int = 3, *, step: int = 3, grad_scale: float = 0.37, weight_decay: float = 0.1
) -> StepScalars:
    scalars = StepScalars(groups, CPU, seed=5)
    scalars.fill(
        [
            {"lr": 1e-2 * (g + 1), "eps": 1e-8 * (g + 1), "weight_decay": weight_decay}
            for g in range(groups)
        ],
        betas=(BETA1, BETA2),
        step=step,
        grad_scale=grad_scale,
    )
    return scalars


def groups_of(entries: int) -> Tensor:
    return (torch.arange(entries) % 3).to(torch.int32)


def is_eight_bit(storage: str) -> bool:
    return storage.startswith("8-bit m")


def is_stochastic(storage: str) -> bool:
    return storage.startswith("bf16 m") or is_eight_bit(storage)


def scales_of(storage: str, entries: int) -> Tensor | None:
    """Return the scales of m before and after a step, if it has any: powers of two, often equal."""
    if not is_eight_bit(storage):
        return None
    return rounding.fp8_scale(torch.stack([positive(entries, 30), positive(entries, 31)], dim=1))


def m_of(exp_avg: Tensor, scale: Tensor | None) -> Tensor:
    """Return what is stored of m, float32."""
    return exp_avg.float() if scale is None else rounding.from_fp8(exp_avg, scale)


def vectors_of(entries: int, **given: Tensor | None) -> SegmentVectors:
    """Return vectors, NaN where none is given: a kernel has no business to read these."""
    floats = {name: torch.full((entries,), NAN) for name in SegmentVectors._fields[:4]}
    return SegmentVectors(**({**floats, "group_SR": groups_of(entries)} | given))


@contextmanager
def unchanged(**tensors: Tensor | None) -> Iterator[None]:
    """Check that no bit of some inputs changes."""
    before = {name: bits(tensor) for name, tensor in tensors.items() if tensor is not None}
    yield
    for name, copy in before.items():
        assert torch.equal(bits(tensors[name]), copy), f"{name} was modified"


def tensors_of(storage: str, layout: Layout) -> BufferTensors:
    """Return tensors whose elements do not depend on where the state lies; NaN between them."""
    grad, m, param, weight = STORAGE[storage]
    at, outside = layout.at, torch.ones(layout.numel, dtype=torch.bool)
    outside[at] = False
    values, moments, grads = (noise(layout.numel, seed) for seed in (10, 11, 12))
    values[outside] = grads[outside] = NAN
    moments = rounding.to_fp8(moments * 4, torch.ones(())) if m == torch.uint8 else moments.to(m)

    def in_state(stream: Tensor, poison: float = NAN) -> Tensor:
        found = torch.full((layout.state_numel,), poison, dtype=stream.dtype)
        found[layout.state_at] = stream[at]
        return found

    # 127 is the code of NaN.
    exp_avg, grads = in_state(moments, 127 if m == torch.uint8 else NAN), grads.to(grad)
    if weight is None:
        return BufferTensors(values, exp_avg, None, grads)
    if param == torch.int16:
        high, low = rounding.split(values)
        return BufferTensors(in_state(low, 0x5A5A), exp_avg, high, grads)
    return BufferTensors(in_state(values), exp_avg, rounding.to_weight(values, weight), grads)


def clone(tensors: BufferTensors) -> BufferTensors:
    return BufferTensors(*(None if t is None else t.clone() for t in tensors))


def elements_of(tensors: BufferTensors, layout: Layout) -> BufferTensors:
    """Return copies of the elements in segments, ``param`` the complete main parameters."""
    param, exp_avg, weight, grad = tensors
    at, state_at = layout.at, layout.state_at
    weights = None if weight is None else weight[at]
    main_param = param[at if weights is None else state_at]
    if param.dtype == torch.int16:
        main_param = rounding.join(weights, main_param)
    return BufferTensors(main_param, exp_avg[state_at], weights, grad[at])


def outside_of_segments(tensors: BufferTensors, layout: Layout) -> list[Tensor]:
    """Return the bits of all elements outside of segments that kernels could write to."""
    found, (param, exp_avg, weight, _) = [], tensors
    in_state, in_buffer = (exp_avg, param), (weight,)
    if weight is None:
        in_state, in_buffer = (exp_avg,), (param,)
    for streams, at in ((in_state, layout.state_at), (in_buffer, layout.at)):
        for stream in streams:
            mask = torch.ones(len(stream), dtype=torch.bool)
            mask[at] = False
            found.append(bits(stream)[mask])
    return found


def assert_equal_bits(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> None:
    for number, (mine, other) in enumerate(zip(left, right, strict=True)):
        if mine is None or other is None:
            assert mine is other
        else:
            assert torch.equal(bits(mine), bits(other)), f"tensor {number} differs"


def origins_of(storage: str, layout: Layout) -> Tensor | None:
    """Round m stochastically where it has few bits."""
    return layout.origins if is_stochastic(storage) else None


@contextmanager
def writes_segments_only(tensors: BufferTensors, layout: Layout) -> Iterator[None]:
    """Check that neither gradients change nor anything outside of segments."""
    before = outside_of_segments(tensors, layout)
    with unchanged(grad=tensors.grad):
        yield
    assert_equal_bits(outside_of_segments(tensors, layout), before)


# segment_sum_sq_.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_segment_sum_sq(kernels, layout, dtype):
    grad = torch.full((layout.numel,), NAN, dtype=dtype)
    grad[layout.at] = noise(layout.numel, 1, dtype)[layout.at]
    found = torch.full((layout.entries,), NAN)  # must be overwritten, not added to
    with unchanged(grad=grad):
        kernels.segment_sum_sq_(found, grad, layout.table)
    assert found[layout.unused].isnan().all(), "wrote outside of the table's entries"
    values = grad.double().tolist()
    for s, (low, high) in enumerate(layout.bounds):
        expected = math.fsum(value * value for value in values[low:high])
        assert float(found[layout.entry(s)]) == pytest.approx(expected, rel=SUM_RTOL)


def test_segment_sum_sq_of_bfloat16_is_not_taken_in_bfloat16(kernels):
    # 256 ones and one 1/16: bfloat16 holds neither 257 nor 256 + 1/256.
    grad = torch.ones(257, dtype=torch.bfloat16)
    grad[-1] = 0.0625
    found = torch.empty(1)
    kernels.segment_sum_sq_(found, grad, one_segment(257))
    assert found.item() == 256 + 0.0625**2


def test_segment_sum_sq_keeps_non_finite_values_apart(kernels, layout):
    grad = noise(layout.numel, 2)
    for poison in (float("inf"), float("-inf"), NAN):
        for victim in {0, len(layout.bounds) - 1} if layout.bounds else ():
            poisoned = grad.clone()
            poisoned[layout.bounds[victim][1] - 1] = poison
            found = torch.zeros(layout.entries)
            kernels.segment_sum_sq_(found, poisoned, layout.table)
            expected = [e != layout.entry(victim) for e in range(layout.entries)]
            assert torch.isfinite(found).tolist() == expected


@pytest.mark.parametrize("length", [1000, 8192])
def test_a_segments_sum_depends_on_its_values_alone(kernels, length):
    """Not on its neighbours, nor on how many rows go together: replicas must agree."""
    row = noise(length, 4)
    sums = []
    for count, at in ((1, 0), (8, 3), (9, 8), (17, 16)):
        grad = noise(count * length, 5)
        grad[at * length : (at + 1) * length] = row
        starts = np.arange(count) * length
        found = torch.empty(count)
        kernels.segment_sum_sq_(found, grad, SegmentTable(starts, starts + length))
        sums.append(found[at].item())
    assert len(set(sums)) == 1


# norm_partials_.


def test_norm_partials(kernels):
    sums = positive(77, 3)
    domain = torch.tensor([0, 0, -1, 1, 1, -1, 0, 1, -1], dtype=torch.int8).repeat(9)[:77]
    stats = torch.full((2, 2), NAN, dtype=torch.float64)
    kernels.norm_partials_(stats, sums, domain)
    for d in range(2):
        expected = math.fsum(float(s) for s, i in zip(sums, domain, strict=True) if i == d)
        assert float(stats[d, 0]) == pytest.approx(expected, rel=1e-14)
    assert stats[:, 1].tolist() == [0, 0]
    sums[2], sums[4] = float("inf"), NAN
    kernels.norm_partials_(stats, sums, domain)
    assert stats[0].isfinite().all(), "a sum outside of the norm entered it"
    assert stats[1, 0].isnan()
    assert stats[0, 1] == 2, "non-finite sums count also where the norm leaves them out"


# segment_step_size_.


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25, 1 / 65536])
@pytest.mark.parametrize("chosen", [None, [], [140, *range(3, 73), 0]])
def test_segment_step_size(kernels, chosen, grad_scale, step):
    num, num_ranges = 150, 3
    before, sums = positive(num, 5), positive(num + num_ranges, 6) * 100 / grad_scale**2
    inv_numel, group = 1 / positive(num, 7).mul(100).ceil(), groups_of(num + num_ranges)
    v, step_size = before.clone(), torch.full((num,), NAN)
    scalars = scalars_of(step=step, grad_scale=grad_scale)
    index = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    with unchanged(sums=sums, inv_numel=inv_numel, group=group):
        vectors = SegmentVectors(v, step_size, sums, inv_numel, group)
        kernels.segment_step_size_(vectors, scalars, index)
    for s in range(num):
        if chosen is not None and s not in chosen:
            assert v[s] == before[s]
            assert step_size[s].isnan()
            continue
        mean = float(sums[s]) * float(inv_numel[s]) * grad_scale**2
        expected = BETA2 * float(before[s]) + (1 - BETA2) * mean
        assert float(v[s]) == pytest.approx(expected, rel=SCALAR_RTOL)
        g = int(group[s])
        root = math.sqrt(expected / (1 - BETA2**step)) + 1e-8 * (g + 1)
        expected = 1e-2 * (g + 1) / (1 - BETA1**step) / root
        assert float(step_size[s]) == pytest.approx(expected, rel=SCALAR_RTOL)


def test_step_size_of_a_block_without_gradient_is_finite(kernels):
    """A token that was never seen: m = v = 0, so that nothing moves, whatever the step size."""
    zero, one = torch.zeros(1), torch.ones(1)
    vectors = vectors_of(1, exp_avg_sq_S=zero.clone(), sum_sq_SR=zero, inv_numel_S=one)
    kernels.segment_step_size_(vectors, scalars_of(step=1))
    assert vectors.exp_avg_sq_S.item() == 0
    expected = 1e-2 / (1 - BETA1) / 1e-8
    assert vectors.step_size_S.item() == pytest.approx(expected, rel=SCALAR_RTOL)


# update_.


def step_sizes(layout: Layout) -> Tensor:
    return positive(layout.entries, 13) * 1e-2


def update(
    kernels: ModuleType,
    tensors: BufferTensors,
    layout: Layout,
    scalars: StepScalars,
    origins: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    vectors = vectors_of(
        layout.entries,
        step_size_S=step_sizes(layout),
        origin_SR=origins,
        exp_avg_scale_S2=scales,
    )
    with writes_segments_only(tensors, layout), unchanged(**vectors._asdict()):
        kernels.update_(tensors, layout.table, vectors, scalars)


def update_elementwise(
    kernels: ModuleType,
    tensors: BufferTensors,
    v: Tensor,
    layout: Layout,
    scalars: StepScalars,
    origins: Tensor | None = None,
) -> None:
    vectors = vectors_of(layout.entries, origin_SR=origins)
    with writes_segments_only(tensors, layout), unchanged(**vectors._asdict()):
        kernels.update_elementwise_(tensors, v, layout.table, vectors, scalars)


@pytest.mark.parametrize("storage", STORAGE)
def test_update(kernels, small_layout, storage):
    layout = small_layout
    tensors = tensors_of(storage, layout)
    before = elements_of(tensors, layout)
    scales = scales_of(storage, layout.entries)
    origins = None if scales is None else layout.origins
    update(kernels, tensors, layout, scalars_of(), origins, scales)
    after = elements_of(tensors, layout)
    step_size, group = step_sizes(layout), groups_of(layout.entries)
    # What storage of m in few bits may add to the rounding of the arithmetic.
    stored = {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.uint8: 2.0**-3}[after.exp_avg.dtype]
    for s, part in enumerate(layout.parts):
        e = layout.entry(s)
        decay = 1 - 1e-2 * (int(group[e]) + 1) * 0.1
        scale_before, scale_after = (None, None) if scales is None else scales[e]
        least = 0.0 if scale_after is None else float(scale_after) * 2.0**-9
        olds, news = m_of(before.exp_avg, scale_before), m_of(after.exp_avg, scale_after)
        for i in range(part.start, part.stop):
            old, g = float(olds[i]), float(before.grad[i]) * 0.37
            m = BETA1 * old + (1 - BETA1) * g
            size = abs(old) + abs(g)
            assert abs(float(news[i]) - m) <= UPDATE_TOL * size + max(stored * abs(m), least)
            p = float(before.param[i])
            expected = decay * p - float(step_size[e]) * m
            # Not changed by the rounding of m: the step takes it before.
            assert abs(float(after.param[i]) - expected) <= UPDATE_TOL * (abs(p) + size)
    if storage == "quantized weight":
        assert torch.equal(after.weight, before.weight)
    elif after.weight is not None:
        assert torch.equal(
            bits(after.weight), bits(rounding.to_weight(after.param, after.weight.dtype))
        )


@pytest.mark.parametrize("storage", STORAGE)
def test_update_equals_the_reference_bit_for_bit(layout, storage):
    """Given equal step sizes nothing is reordered, so that backends and layouts cannot differ."""
    mine = tensors_of(storage, layout)
    theirs = clone(mine)
    options = origins_of(storage, layout), scales_of(storage, layout.entries)
    update(cpu, mine, layout, scalars_of(), *options)
    update(reference, theirs, layout, scalars_of(), *options)
    assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("storage", STORAGE)
def test_update_elementwise_equals_the_reference_bit_for_bit(layout, storage, correct_square_roots):
    found = []
    for backend in (cpu, reference):
        tensors, v = tensors_of(storage, layout), positive(layout.table.numel, 5)
        origins = origins_of(storage, layout)
        update_elementwise(backend, tensors, v, layout, scalars_of(), origins)
        found.append((v, *tensors))
    assert_equal_bits(*found)


def test_remainders_train_bit_for_bit_as_stored_main_parameters(kernels):
    layout = layout_of("long")
    stored = tensors_of("fp32 grad, bf16 weight", layout)
    completed = tensors_of("remainders", layout)
    # Ties between two weights are where another rounding would go wrong.
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32)
    stored.param[1:4] = ties.view(torch.float32)
    stored.weight[1:4], completed.param[1:4] = rounding.split(stored.param[1:4])
    completed.weight[1:4] = stored.weight[1:4]
    for step in range(1, 20):
        both = [elements_of(tensors, layout) for tensors in (stored, completed)]
        assert_equal_bits(*(elements[::2] for elements in both))  # param and weight
        grad = noise(layout.numel, 50 + step)
        for tensors in (stored, completed):
            update(kernels, tensors._replace(grad=grad), layout, scalars_of(step=step))
    param, _, weight, _ = elements_of(stored, layout)
    assert (param != weight).float().mean() > 0.9


def test_stochastic_rounding_is_unbiased_and_another_one_in_each_step(kernels):
    """A moment that nearest rounding would leave where it is moves on average as it should."""
    layout = Layout.of([(0, 40_000)])
    means, patterns = [], []
    for step in (1, 2):
        tensors = tensors_of("bf16 m", layout)
        tensors.exp_avg.fill_(1.0)
        # m = 0.9 + 0.1 (1 + 0.01) = 1.001: an eighth of the way to the next bfloat16, 1.0078125.
        tensors.grad.fill_(1.01)
        update(kernels, tensors, layout, scalars_of(step=step, grad_scale=1.0), layout.origins)
        assert set(tensors.exp_avg.tolist()) == {1.0, 1.0078125}
        means.append(float(tensors.exp_avg.double().mean()))
        patterns.append(tensors.exp_avg > 1)
    # Standard deviation of the mean: 0.0078 * sqrt(0.128 * 0.872 / 40000) = 1.3e-5.
    assert means == pytest.approx([1.001, 1.001], abs=6e-5)
    agree = float((patterns[0] == patterns[1]).double().mean())
    assert agree == pytest.approx(0.128**2 + 0.872**2, abs=0.02), "steps are not independent"


# update_in_one_pass_.


def update_in_one_pass(
    kernels: ModuleType,
    tensors: BufferTensors,
    layout: Layout,
    scalars: StepScalars,
    origins: Tensor | None = None,
    *,
    scales: bool = False,
) -> SegmentVectors:
    """Return the vectors, of which it writes v, step sizes, sums and scales of m."""
    vectors = SegmentVectors(
        exp_avg_sq_S=positive(layout.entries, 5),
        step_size_S=torch.zeros(layout.entries),
        sum_sq_SR=torch.zeros(layout.entries),
        inv_numel_S=positive(layout.entries, 6),
        group_SR=groups_of(layout.entries),
        origin_SR=origins,
        exp_avg_scale_S2=torch.zeros(layout.entries, 2) if scales else None,
    )
    read_only = {name: getattr(vectors, name) for name in vectors._fields[3:6]}
    with writes_segments_only(tensors, layout), unchanged(**read_only):
        kernels.update_in_one_pass_(tensors, layout.table, vectors, scalars)
    return vectors


@pytest.mark.parametrize("storage", STORAGE)
def test_update_in_one_pass_equals_the_kernels_that_it_joins(kernels, layout, storage):
    origins, scalars = origins_of(storage, layout), scalars_of()
    together = tensors_of(storage, layout)
    apart = clone(together)
    scales = is_eight_bit(storage)
    mine = update_in_one_pass(kernels, together, layout, scalars, origins, scales=scales)
    theirs = mine._replace(
        exp_avg_sq_S=positive(layout.entries, 5),
        step_size_S=torch.zeros(layout.entries),
        sum_sq_SR=torch.zeros(layout.entries),
        exp_avg_scale_S2=torch.zeros(layout.entries, 2) if scales else None,
    )
    kernels.segment_sum_sq_(theirs.sum_sq_SR, apart.grad, layout.table)
    kernels.segment_step_size_(theirs, scalars, torch.from_numpy(layout.table.indices))
    kernels.update_(apart, layout.table, theirs, scalars)
    # Long segments are added up in another order here than there.
    for left, right in zip(mine[:3], theirs[:3], strict=True):
        torch.testing.assert_close(left, right, rtol=SUM_RTOL, atol=0)
    if max([high - low for low, high in layout.bounds], default=0) <= 65536:
        assert_equal_bits([*together, mine[-1]], [*apart, theirs[-1]])


# update_elementwise_.


def test_update_elementwise_equals_torch_adamw(kernels, small_layout):
    """In float32 with bfloat16 weights, for ten steps of bfloat16 gradients with a loss scale."""
    layout = small_layout
    group, weight_decay = groups_of(layout.entries), 0.1
    tensors = tensors_of("bf16 grad and weight", layout)
    tensors.exp_avg[layout.state_at] = 0
    v = torch.zeros(layout.table.numel)
    start = elements_of(tensors, layout).param
    theirs = [start[part].double().requires_grad_() for part in layout.parts]
    optimizers = []
    for s, p in enumerate(theirs):
        g = int(group[layout.entry(s)]) + 1
        options = {"lr": 1e-2 * g, "eps": 1e-8 * g, "weight_decay": weight_decay}
        optimizers.append(torch.optim.AdamW([p], betas=(BETA1, BETA2), **options))
    loss_scale = 512.0
    for step in range(1, 11):
        grad = (noise(layout.numel, 100 + step) * loss_scale).to(torch.bfloat16)
        tensors.grad[layout.at] = grad[layout.at]
        scalars = scalars_of(step=step, grad_scale=1 / loss_scale)
        update_elementwise(kernels, tensors, v, layout, scalars)
        for p, optimizer, (low, high) in zip(theirs, optimizers, layout.bounds, strict=True):
            p.grad = grad[low:high].double() / loss_scale
            optimizer.step()
    found = elements_of(tensors, layout)
    for p, optimizer, part in zip(theirs, optimizers, layout.parts, strict=True):
        state = optimizer.state[p]
        for mine, other in (
            (found.param[part], p.detach()),
            (found.exp_avg[part], state["exp_avg"]),
            (v[part], state["exp_avg_sq"]),
        ):
            torch.testing.assert_close(mine.double(), other, rtol=ADAMW_TOL, atol=ADAMW_TOL)
    assert_equal_bits([found.weight], [rounding.to_weight(found.param, torch.bfloat16)])


@pytest.mark.parametrize("storage", STORAGE)
def test_update_elementwise_equals_blocks_of_one_element(kernels, storage):
    """The limit that ties both kernels together."""
    numel, scalars = 24, scalars_of()
    one_each = SegmentTable(np.arange(numel), np.arange(1, numel + 1))
    layout = Layout.of([(0, numel)])
    left = tensors_of(storage, layout)
    right, stochastic = clone(left), is_stochastic(storage)
    vectors = vectors_of(
        numel,
        exp_avg_sq_S=torch.zeros(numel),
        inv_numel_S=torch.ones(numel),
        group_SR=torch.zeros(numel).int(),
        origin_SR=torch.arange(9, numel + 9, dtype=torch.int32) if stochastic else None,
        exp_avg_scale_S2=torch.zeros(numel, 2) if is_eight_bit(storage) else None,
    )
    kernels.segment_sum_sq_(vectors.sum_sq_SR, left.grad, one_each)
    kernels.segment_step_size_(vectors, scalars)
    kernels.update_(left, one_each, vectors, scalars)
    v = torch.zeros(numel)
    kernels.update_elementwise_(right, v, one_segment(numel), vectors, scalars)
    torch.testing.assert_close(vectors.exp_avg_sq_S, v, rtol=SCALAR_RTOL, atol=0)
    assert torch.equal(bits(left.exp_avg), bits(right.exp_avg))
    left, right = elements_of(left, layout), elements_of(right, layout)
    torch.testing.assert_close(left.param, right.param, rtol=ADAMW_TOL, atol=ADAMW_TOL)


# All kernels.


@pytest.mark.parametrize("storage", ["bf16 m, remainders", "8-bit m, remainders"])
@pytest.mark.parametrize("grad_scale", [NAN, float("inf")])
def test_nothing_changes_in_a_skipped_step(kernels, grad_scale, storage):
    layout, scalars = layout_of("gaps"), scalars_of(grad_scale=grad_scale)
    tensors, elements = tensors_of(storage, layout), positive(layout.table.numel, 4)
    floats = {
        name: positive(layout.entries, 20 + i) for i, name in enumerate(SegmentVectors._fields[:4])
    }
    vectors = vectors_of(
        layout.entries, **floats, exp_avg_scale_S2=scales_of(storage, layout.entries)
    )
    with unchanged(**tensors._asdict(), **vectors._asdict(), elements=elements):
        kernels.segment_step_size_(vectors, scalars)
        kernels.update_(tensors, layout.table, vectors, scalars)
        kernels.update_in_one_pass_(tensors, layout.table, vectors, scalars)
        kernels.update_elementwise_(tensors, elements, layout.table, vectors, scalars)


def outcome_of_updates(kernels: ModuleType, storage: str, layout: Layout) -> list[Tensor | None]:
    """Return sums and all that updates write, each element where its segment has it."""
    tensors, origins = tensors_of(storage, layout), origins_of(storage, layout)
    sums, scalars = torch.zeros(layout.entries), scalars_of()
    kernels.segment_sum_sq_(sums, tensors.grad, layout.table)
    update(kernels, tensors, layout, scalars, origins, scales_of(storage, layout.entries))
    found = [sums, *elements_of(tensors, layout)]
    v = positive(layout.table.numel, 5)
    update_elementwise(kernels, tensors, v, layout, scalars, origins)
    found += [v, *elements_of(tensors, layout)]
    scales = is_eight_bit(storage)
    vectors = update_in_one_pass(kernels, tensors, layout, scalars, origins, scales=scales)
    return [*found, *vectors, *elements_of(tensors, layout)]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_the_state_lies_changes_no_bit(kernels, name, storage, correct_square_roots):
    """A step equals one with a copy of the state that lies where the buffer does."""
    layout = layout_of(name)
    assert any(layout.shifts)
    assert not any(layout.in_place.shifts)
    assert_equal_bits(
        outcome_of_updates(kernels, storage, layout),
        outcome_of_updates(kernels, storage, layout.in_place),
    )


@pytest.mark.support("CPU kernels: instruction sets, threads", "test")
@pytest.mark.parametrize("storage", STORAGE)
def test_instruction_sets_and_threads_change_no_bit(storage):
    layout, num = layout_of("in parts"), 50_000
    threads, found = torch.get_num_threads(), []
    try:
        for level, num_threads in ((0, 1), (1, 2), (2, 3), (2, 1)):
            cpu.library().adam_mini_limit_level(level)
            torch.set_num_threads(num_threads)
            stats, sums = torch.zeros(2, 2, dtype=torch.float64), positive(num, 7)
            cpu.norm_partials_(stats, sums, (torch.arange(num) % 3 - 1).to(torch.int8))
            vectors = vectors_of(
                num,
                exp_avg_sq_S=positive(num, 8),
                sum_sq_SR=sums,
                inv_numel_S=torch.full((num,), 0.1),
            )
            cpu.segment_step_size_(vectors, scalars_of())
            found.append([*outcome_of_updates(cpu, storage, layout), stats, *vectors])
    finally:
        cpu.library().adam_mini_limit_level(9)
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_equal_bits(found[0], other)


def test_float16_weights_are_rounded_as_torch_does():
    """All exponents and both neighbours of every tie, subnormals and overflow included."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    values = torch.cat([halves, ties, ties.nextafter(halves[1:]), ties.nextafter(halves[:-1])])
    extra = torch.tensor([65519.99, 65520.0, 7e4, 1e30, math.inf, math.nan, 1e-8, 2.0**-25])
    values = torch.cat([values, -values, extra, -extra])
    n = len(values)
    m, grad = torch.zeros(2, n)
    weight = torch.zeros(n, dtype=torch.float16)
    tensors = BufferTensors(values.clone(), m, weight, grad)
    vectors = vectors_of(1, step_size_S=torch.zeros(1))
    cpu.update_(tensors, one_segment(n), vectors, scalars_of(weight_decay=0.0))
    expected, nan = values.half(), values.isnan()
    assert torch.equal(bits(weight)[~nan], bits(expected)[~nan])
    assert weight[nan].isnan().all()


def test_float16_gradients_are_read_exactly():
    """Every finite pattern, subnormals included, through both kernels that read gradients."""
    patterns = torch.arange(0, 0x7C00, dtype=torch.int32)
    half = torch.cat([patterns, patterns + 0x8000]).to(torch.int16).view(torch.float16)
    n, one = len(half), torch.ones(1)
    each = SegmentTable(np.arange(n), np.arange(1, n + 1))
    found = torch.empty(n)
    cpu.segment_sum_sq_(found, half, each)
    assert torch.equal(found, half.float() ** 2)
    tensors = BufferTensors(torch.zeros(n), torch.zeros(n), None, half)
    vectors = vectors_of(1, step_size_S=one)
    cpu.update_(tensors, one_segment(n), vectors, scalars_of(grad_scale=1.0))
    factor = torch.tensor(1.0) * (1 - BETA1)
    assert torch.equal(tensors.exp_avg, half.float() * factor)
    for special in (float("inf"), float("-inf"), NAN):
        cpu.segment_sum_sq_(one, torch.tensor([special], dtype=torch.float16), one_segment(1))
        assert not one.isfinite()


# rounding.


def test_state_of_any_origin_counts_as_rounded():
    tie = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    for weight in (tie.bfloat16(), rounding.to_weight(tie, torch.bfloat16)):
        assert rounding.is_rounded(weight, tie).all()
    assert not torch.equal(tie.bfloat16(), rounding.to_weight(tie, torch.bfloat16))
    assert not rounding.is_rounded(tie.bfloat16(), tie * 1.01).any()


def test_remainders_complete_every_float32():
    every = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64)
    ties = torch.arange(-(2**15), 2**15, dtype=torch.int64) * 65536 + 0x8000
    values = torch.cat([every, ties, ties + 1, ties - 1]).to(torch.int32).view(torch.float32)
    weight, remainder = rounding.split(values)
    back, nan = rounding.join(weight, remainder), values.isnan()
    assert torch.equal(bits(back)[~nan], bits(values)[~nan])
    assert back[nan].isnan().all()
    assert weight[nan].isnan().all()
    # The nearest weight: torch's, but at exact ties.
    other = bits(weight) != bits(values.bfloat16())
    tie = (bits(values) & 0xFFFF) == 0x8000
    assert not (other & ~tie & ~nan).any()
    assert (weight.float().abs() >= values.abs())[tie & ~nan].all(), "ties go away from zero"


# SegmentTable and the choice of a backend.


def test_runs_cover_the_segments_in_order(layout):
    table, found, starts = layout.table, [], []
    for run in table.runs:
        assert run.first == layout.entry(len(found))
        for index in range(run.count):
            start = run.start + index * run.length
            found.append((start, start + run.length))
            starts.append(start + run.shift)
        assert run.in_buffer.stop == found[-1][1]
        assert run.in_state.stop == starts[-1] + run.length
        assert run.in_state.stop - run.in_state.start == run.count * run.length
        assert run.entries == slice(run.first, layout.entry(len(found)))
    assert found == layout.bounds
    assert starts == layout.state_starts
    assert len(table) == len(layout.bounds)


def test_runs_are_as_long_as_possible():
    starts, ends = np.asarray([0, 4, 8, 10, 12, 17]), np.asarray([4, 8, 10, 12, 14, 19])
    table = SegmentTable(starts, ends)
    expected = [(0, 2, 4), (2, 3, 2), (5, 1, 2)]
    assert [(run.first, run.count, run.length) for run in table.runs] == expected
    chosen = table.subset(np.asarray([True, True, True, False, True, True]))
    assert [(run.first, run.count) for run in chosen.runs] == [(0, 2), (2, 1), (4, 1), (5, 1)]


def test_runs_end_where_the_state_goes_on_elsewhere():
    starts = np.arange(6) * 4
    table = SegmentTable(starts, starts + 4, shift_S=np.asarray([-2, -2, 7, 7, 7, 0]))
    assert [(run.first, run.count, run.shift) for run in table.runs] == [
        (0, 2, -2), (2, 3, 7), (5, 1, 0)
    ]  # fmt: skip
    assert [run.in_state for run in table.runs] == [
        slice(-2, 6), slice(15, 27), slice(20, 24)
    ]  # fmt: skip


def test_what_tensors_must_have_for_a_table():
    starts, ends = np.asarray([10, 20, 40]), np.asarray([15, 30, 41])
    table = SegmentTable(starts, ends, np.asarray([3, 9, 4]), np.asarray([-10, 25, -20]))
    for found, num_entries, numel, reach, state_reach in (
        (table, 10, 16, 41, 55),
        # Entries and state of chosen segments stay where they are.
        (table.subset(np.asarray([True, False, True])), 5, 6, 41, 21),
        (table.subset(np.zeros(3, dtype=np.bool_)), 0, 0, 0, 0),
        (SegmentTable(starts, ends), 3, 16, 41, 41),
    ):
        assert (found.num_entries, found.numel) == (num_entries, numel)
        assert (found.reach, found.state_reach) == (reach, state_reach)


def test_what_kernels_derive_from_a_table_is_made_once_per_key():
    table, made = one_segment(4), []

    def make(*arguments: object) -> object:
        made.append(arguments)
        return object()

    first, other = table.derived(make), table.derived(make, "cuda:1")
    assert first is not other
    assert table.derived(make) is first
    assert table.derived(make, "cuda:1") is other
    assert made == [(table,), (table, "cuda:1")]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
def test_tiles_cover_every_element_once(small_layout, limit, split):
    table, covered, packed, parts = small_layout.table, [], 0, []
    for row in tiles(table, limit, split=split):
        tile = dict(zip(TILE_FIELDS, row.tolist(), strict=True))
        assert tile["packed"] == packed
        for k in range(tile["count"]):
            start = tile["start"] + k * tile["length"]
            low, high = small_layout.bounds[tile["index"] + k - 2]
            assert start == low + tile["within"]
            assert tile["shift"] == small_layout.shifts[tile["index"] + k - 2]
            if tile["partial"] < 0:
                assert (start, tile["length"]) == (low, high - low)
            covered += range(start, start + tile["length"])
        packed += tile["count"] * tile["length"]
        if tile["partial"] >= 0:
            assert split
            assert tile["length"] <= limit
            parts.append(tile["partial"])
    assert covered == [i for low, high in small_layout.bounds for i in range(low, high)]
    assert parts == list(range(len(parts)))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"^Adam-mini backend='abacus' is not known; allowed: "):
        select_backend("abacus", CPU)


def test_backend_that_does_not_fit_the_device_is_refused():
    with pytest.raises(ValueError, match=r"backend='cpu' runs on cpu tensors, but .* cuda:3"):
        select_backend("cpu", torch.device("cuda", 3))
    with pytest.raises(ValueError, match=r"backend='triton' runs on cuda tensors, but .* cpu"):
        select_backend("triton", CPU)


def test_auto_follows_the_device_of_the_tensors():
    assert select_backend("auto", CPU) is cpu
    assert select_backend("auto", torch.device("cuda")).NAME == "triton"
    assert select_backend("auto", torch.device("meta")) is reference


def test_missing_library_is_an_error_only_if_asked_for(monkeypatch, caplog):
    def missing() -> None:
        raise ImportError("the C++ kernels were not built")

    monkeypatch.setattr(cpu, "library", missing)
    with pytest.raises(ImportError, match="were not built"):
        select_backend("cpu", CPU)
    with caplog.at_level("WARNING"):
        assert select_backend("auto", CPU) is reference
        assert select_backend("auto", CPU) is reference
    assert [r.message for r in caplog.records if "were not built" in r.message] == [
        "Adam-mini runs on plain torch, which takes several times as long per step and large "
        "temporaries: the C++ kernels were not built"
    ]


def test_cpp_kernels_refuse_tensors_that_they_cannot_read():
    table = one_segment(8)
    with pytest.raises(ValueError, match=r"shape \(8,\) and strides \(2,\) on cpu; needed are 8"):
        cpu.segment_sum_sq_(torch.zeros(1), torch.zeros(16)[::2], table)
    with pytest.raises(ValueError, match=r"needed are 8 adjacent"):
        cpu.segment_sum_sq_(torch.zeros(1), torch.zeros(7), table)


@pytest.mark.parametrize("short", ["param", "exp_avg", "weight", "grad", None])
def test_cpp_kernels_know_how_far_buffer_and_state_must_reach(short):
    """The state of the table's eight elements begins at its sixth."""
    table = SegmentTable(np.asarray([0]), np.asarray([8]), shift_S=np.asarray([5]))
    needed = BufferTensors(13, 13, 8, 8)
    tensors = BufferTensors(
        *(torch.zeros(n - (name == short)) for name, n in needed._asdict().items())
    )
    tensors = tensors._replace(weight=tensors.weight.bfloat16())
    vectors = vectors_of(1, step_size_S=torch.ones(1))
    if short is None:
        cpu.update_(tensors, table, vectors, scalars_of())
    else:
        numel = getattr(needed, short)
        with pytest.raises(ValueError, match=rf"shape \({numel - 1},\).* needed are {numel} "):
            cpu.update_(tensors, table, vectors, scalars_of())


def signatures(backend: ModuleType) -> dict[str, inspect.Signature]:
    """Return the signatures of all kernels: names, order, annotations and defaults."""
    kernels = [name for name in dir(backend) if name.endswith("_") and name[0] != "_"]
    return {name: inspect.signature(getattr(backend, name)) for name in kernels}


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "auto"])
def test_every_backend_has_every_kernel(name):
    backend = select_backend(name, torch.device("cuda" if name == "triton" else "cpu"))
    assert len(signatures(reference)) == 10
    assert signatures(backend) == signatures(reference)
    assert name == backend.NAME
