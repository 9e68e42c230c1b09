"""Every backend's kernels against loops in float64, segment by segment and element by element.

Triton's kernels run in its interpreter, in ``test_triton.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_adam_mini import rounding
from megatron_adam_mini.config import BACKENDS
from megatron_adam_mini.kernels import SegmentTable, StepScalars, cpu, reference, select_backend
from megatron_adam_mini.kernels.cpu_tiles import TILE_FIELDS, tiles

CPU = torch.device("cpu")

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

#: Segment lengths with the gap before each; the last number is the gap at the end of the slice.
LAYOUTS = {
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
SMALL = [name for name in LAYOUTS if name != "in parts"]

#: grad, m, main parameter and weight, as the engine combines them.
STORAGE = {
    "fp32": (torch.float32, torch.float32, torch.float32, None),
    "fp32 grad, bf16 weight": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    "bf16 grad and weight": (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
    "fp16 grad and weight": (torch.float16, torch.float32, torch.float32, torch.float16),
    "fp16 weight": (torch.float32, torch.float32, torch.float32, torch.float16),
    "bf16 m": (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    "remainders": (torch.float32, torch.float32, torch.int16, torch.bfloat16),
    "bf16 m, remainders": (torch.bfloat16, torch.bfloat16, torch.int16, torch.bfloat16),
}


@pytest.fixture(params=[name for name in BACKENDS if name in ("reference", "cpu")])
def kernels(request):
    return select_backend(request.param, CPU)


@dataclass
class Layout:
    """A table whose entries lie apart from each other, in vectors with more entries."""

    bounds: list[tuple[int, int]]
    numel: int
    table: SegmentTable

    @property
    def entries(self) -> int:
        return len(self.bounds) + 5

    def entry(self, segment: int) -> int:
        return 2 + segment

    @property
    def origins(self) -> torch.Tensor:
        """Numbers of the segments' first elements, of which 32 bits count; elsewhere nonsense."""
        found = torch.full((self.entries,), -1, dtype=torch.int64)
        for segment, (low, _) in enumerate(self.bounds):
            found[self.entry(segment)] = 7 * low + 0xFFFFFF00
        return found.to(torch.int32)

    @property
    def outside(self) -> torch.Tensor:
        mask = torch.ones(self.numel, dtype=torch.bool)
        for low, high in self.bounds:
            mask[low:high] = False
        return mask

    @property
    def unused(self) -> torch.Tensor:
        mask = torch.ones(self.entries, dtype=torch.bool)
        mask[2 : 2 + len(self.bounds)] = False
        return mask


def layout_of(name: str) -> Layout:
    pieces, tail = LAYOUTS[name]
    bounds, at = [], 0
    for gap, length in pieces:
        bounds.append((at + gap, at + gap + length))
        at += gap + length
    starts = np.asarray([b[0] for b in bounds], dtype=np.int64)
    ends = np.asarray([b[1] for b in bounds], dtype=np.int64)
    index = np.arange(2, 2 + len(bounds), dtype=np.int64)
    return Layout(bounds, at + tail, SegmentTable(starts, ends, CPU, index))


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return layout_of(request.param)


@pytest.fixture(params=SMALL)
def small_layout(request):
    """Layouts that loops over elements in Python can go through."""
    return layout_of(request.param)


def noise(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype)


def positive(numel: int, seed: int) -> torch.Tensor:
    return noise(numel, seed).abs() + 0.01


def bits(tensor: torch.Tensor) -> torch.Tensor:
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


def groups_of(entries: int) -> torch.Tensor:
    return (torch.arange(entries) % 3).to(torch.int32)


class Unchanged:
    """Checks that no bit of some inputs changes."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors
        self.copies = {name: bits(tensor) for name, tensor in tensors.items()}

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for name, tensor in self.tensors.items():
                assert torch.equal(bits(tensor), self.copies[name]), f"{name} was modified"


@dataclass
class Tensors:
    """What one slice stores, with its main parameters as float32 next to it."""

    param: torch.Tensor
    exp_avg: torch.Tensor
    weight: torch.Tensor | None
    grad: torch.Tensor

    @classmethod
    def make(cls, storage: str, numel: int, poison: torch.Tensor) -> Tensors:
        grad, m, param, weight = STORAGE[storage]
        values, grads, moments = noise(numel, 10), noise(numel, 12, grad), noise(numel, 11, m)
        values[poison] = grads[poison] = moments[poison] = float("nan")
        if param == torch.int16:
            high, low = rounding.split(values)
            return cls(low, moments, high, grads)
        rounded = None if weight is None else rounding.to_weight(values, weight)
        return cls(values, moments, rounded, grads)

    def clone(self) -> Tensors:
        return Tensors(
            *(None if t is None else t.clone() for t in self)  # type: ignore[arg-type]
        )

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self.param, self.exp_avg, self.weight, self.grad))

    @property
    def main_param(self) -> torch.Tensor:
        if self.param.dtype == torch.int16:
            return rounding.join(self.weight, self.param)
        return self.param

    def written(self) -> list[torch.Tensor]:
        return [t for t in (self.param, self.exp_avg, self.weight) if t is not None]


# block_sum_sq_.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_sum_sq(kernels, layout, dtype):
    grad = noise(layout.numel, 1, dtype)
    grad[layout.outside] = float("nan")
    found = torch.full((layout.entries,), float("nan"))  # must be overwritten, not added to
    with Unchanged(grad=grad, others=found[layout.unused]):
        kernels.block_sum_sq_(found, grad, layout.table)
    assert found[layout.unused].isnan().all(), "wrote outside of the table's entries"
    values = grad.double().tolist()
    for s, (low, high) in enumerate(layout.bounds):
        expected = math.fsum(value * value for value in values[low:high])
        assert float(found[layout.entry(s)]) == pytest.approx(expected, rel=SUM_RTOL)


def test_block_sum_sq_of_bfloat16_is_not_taken_in_bfloat16(kernels):
    # 256 ones and one 1/16: bfloat16 holds neither 257 nor 256 + 1/256.
    grad = torch.ones(257, dtype=torch.bfloat16)
    grad[-1] = 0.0625
    table = SegmentTable(np.asarray([0]), np.asarray([257]), CPU)
    found = torch.empty(1)
    kernels.block_sum_sq_(found, grad, table)
    assert found.item() == 256 + 0.0625**2


def test_block_sum_sq_keeps_non_finite_values_apart(kernels, layout):
    grad = noise(layout.numel, 2)
    for poison in (float("inf"), float("-inf"), float("nan")):
        for victim in {0, len(layout.bounds) - 1} if layout.bounds else ():
            poisoned = grad.clone()
            poisoned[layout.bounds[victim][1] - 1] = poison
            found = torch.zeros(layout.entries)
            kernels.block_sum_sq_(found, poisoned, layout.table)
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
        kernels.block_sum_sq_(found, grad, SegmentTable(starts, starts + length, CPU))
        sums.append(found[at].item())
    assert len(set(sums)) == 1


# norm_partials_.


def test_norm_partials(kernels):
    sums = positive(77, 3)
    domain = torch.tensor([0, 0, -1, 1, 1, -1, 0, 1, -1], dtype=torch.int8).repeat(9)[:77]
    stats = torch.full((2, 2), float("nan"), dtype=torch.float64)
    kernels.norm_partials_(stats, sums, domain)
    for d in range(2):
        expected = math.fsum(float(s) for s, i in zip(sums, domain, strict=True) if i == d)
        assert float(stats[d, 0]) == pytest.approx(expected, rel=1e-14)
    assert stats[:, 1].tolist() == [0, 0]
    sums[2], sums[4] = float("inf"), float("nan")
    kernels.norm_partials_(stats, sums, domain)
    assert stats[0].isfinite().all(), "a sum outside of the norm entered it"
    assert stats[1, 0].isnan()
    assert stats[0, 1] == 2, "non-finite sums count also where the norm leaves them out"


# block_step_size_.


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25, 1 / 65536])
@pytest.mark.parametrize("chosen", [None, [], [140, *range(3, 73), 0]])
def test_block_step_size(kernels, chosen, grad_scale, step):
    num = 150
    v, sums = positive(num, 5), positive(num, 6) * 100 / grad_scale**2
    inv_numel = 1 / positive(num, 7).mul(100).ceil()
    before, step_size = v.clone(), torch.full((num,), float("nan"))
    scalars, group = scalars_of(step=step, grad_scale=grad_scale), groups_of(num)
    index = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    with Unchanged(sums=sums, inv_numel=inv_numel, group=group):
        kernels.block_step_size_(
            v, step_size, sums, inv_numel_B=inv_numel, group_B=group, scalars=scalars, index=index
        )
    for b in range(num):
        if chosen is not None and b not in chosen:
            assert v[b] == before[b]
            assert step_size[b].isnan()
            continue
        mean = float(sums[b]) * float(inv_numel[b]) * grad_scale**2
        expected = BETA2 * float(before[b]) + (1 - BETA2) * mean
        assert float(v[b]) == pytest.approx(expected, rel=SCALAR_RTOL)
        g = int(group[b])
        root = math.sqrt(expected / (1 - BETA2**step)) + 1e-8 * (g + 1)
        expected = 1e-2 * (g + 1) / (1 - BETA1**step) / root
        assert float(step_size[b]) == pytest.approx(expected, rel=SCALAR_RTOL)


def test_step_size_of_a_block_without_gradient_is_finite(kernels):
    """A token that was never seen: m = v = 0, so that nothing moves, whatever the step size."""
    v, step_size = torch.zeros(1), torch.empty(1)
    kernels.block_step_size_(
        v,
        step_size,
        torch.zeros(1),
        inv_numel_B=torch.ones(1),
        group_B=groups_of(1),
        scalars=scalars_of(step=1),
    )
    assert v.item() == 0
    assert step_size.item() == pytest.approx(1e-2 / (1 - BETA1) / 1e-8, rel=SCALAR_RTOL)


# update_.


def update(kernels, tensors: Tensors, layout: Layout, scalars: StepScalars, **options) -> None:
    kernels.update_(
        *tensors,
        layout.table,
        step_size_B=positive(layout.entries, 13) * 1e-2,
        group_B=groups_of(layout.entries),
        scalars=scalars,
        **options,
    )


def update_elementwise(
    kernels, tensors: Tensors, v: torch.Tensor, layout: Layout, scalars: StepScalars, **options
) -> None:
    param, exp_avg, weight, grad = tensors
    kernels.update_elementwise_(
        param,
        exp_avg,
        v,
        weight,
        grad,
        layout.table,
        group_B=groups_of(layout.entries),
        scalars=scalars,
        **options,
    )


@pytest.mark.parametrize("storage", STORAGE)
def test_update(kernels, small_layout, storage):
    layout, scalars = small_layout, scalars_of()
    outside, inside = layout.outside, ~layout.outside
    tensors = Tensors.make(storage, layout.numel, outside)
    before = tensors.clone()
    with Unchanged(grad=tensors.grad):
        update(kernels, tensors, layout, scalars)
    for mine, old in zip(tensors.written(), before.written(), strict=True):
        assert torch.equal(bits(mine)[outside], bits(old)[outside]), "wrote outside of segments"
    step_size, group = positive(layout.entries, 13) * 1e-2, groups_of(layout.entries)
    # What bfloat16 storage of m may add to the rounding of the arithmetic.
    stored = 0 if tensors.exp_avg.dtype == torch.float32 else 2.0**-8
    for s, (low, high) in enumerate(layout.bounds):
        e = layout.entry(s)
        decay = 1 - 1e-2 * (int(group[e]) + 1) * 0.1
        for i in range(low, high):
            old, g = float(before.exp_avg[i]), float(tensors.grad[i]) * 0.37
            m = BETA1 * old + (1 - BETA1) * g
            size = abs(old) + abs(g)
            assert abs(float(tensors.exp_avg[i]) - m) <= UPDATE_TOL * size + stored * abs(m)
            p = float(before.main_param[i])
            expected = decay * p - float(step_size[e]) * m
            # Not changed by the rounding of m: the step takes it before.
            assert abs(float(tensors.main_param[i]) - expected) <= UPDATE_TOL * (abs(p) + size)
    if tensors.weight is not None and tensors.param.dtype == torch.float32:
        rounded = rounding.to_weight(tensors.param, tensors.weight.dtype)
        assert torch.equal(bits(tensors.weight)[inside], bits(rounded)[inside])


@pytest.mark.parametrize("storage", STORAGE)
def test_update_equals_the_reference_bit_for_bit(layout, storage):
    """Given equal step sizes nothing is reordered, so that backends and layouts cannot differ."""
    origins = layout.origins if storage.startswith("bf16 m") else None
    mine = Tensors.make(storage, layout.numel, layout.outside)
    theirs = mine.clone()
    update(cpu, mine, layout, scalars_of(), origin_B=origins)
    update(reference, theirs, layout, scalars_of(), origin_B=origins)
    for left, right in zip(mine.written(), theirs.written(), strict=True):
        assert torch.equal(bits(left), bits(right))


@pytest.mark.parametrize("storage", STORAGE)
def test_update_elementwise_equals_the_reference(layout, storage):
    """Bit for bit, but for p: torch's square root is not always the nearest number."""
    origins = layout.origins if storage.startswith("bf16 m") else None
    found = []
    for backend in (cpu, reference):
        tensors = Tensors.make(storage, layout.numel, layout.outside)
        v = positive(layout.table.numel, 5)
        update_elementwise(backend, tensors, v, layout, scalars_of(), origin_B=origins)
        found.append((v, tensors.exp_avg, tensors.main_param))
    for left, right in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(bits(left), bits(right))
    left, right = (main_param[~layout.outside] for _, _, main_param in found)
    torch.testing.assert_close(left, right, rtol=UPDATE_TOL, atol=UPDATE_TOL)


def test_remainders_train_bit_for_bit_as_stored_main_parameters(kernels):
    layout = layout_of("long")
    stored = Tensors.make("fp32 grad, bf16 weight", layout.numel, layout.outside)
    completed = Tensors.make("remainders", layout.numel, layout.outside)
    # Ties between two weights are where another rounding would go wrong.
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32)
    stored.param[1:4] = ties.view(torch.float32)
    stored.weight[1:4], completed.param[1:4] = rounding.split(stored.param[1:4])
    completed.weight[1:4] = stored.weight[1:4]
    inside = ~layout.outside
    for step in range(1, 20):
        assert torch.equal(bits(stored.param)[inside], bits(completed.main_param)[inside])
        assert torch.equal(bits(stored.weight)[inside], bits(completed.weight)[inside])
        stored.grad = completed.grad = noise(layout.numel, 50 + step)
        for tensors in (stored, completed):
            update(kernels, tensors, layout, scalars_of(step=step))
    assert (stored.param[inside] != stored.weight[inside]).float().mean() > 0.9


def test_stochastic_rounding_is_unbiased_and_another_one_in_each_step(kernels):
    """A moment that nearest rounding would leave where it is moves on average as it should."""
    numel = 40_000
    table = SegmentTable(np.asarray([0]), np.asarray([numel]), CPU)
    layout = Layout([(0, numel)], numel, table)
    layout.table = SegmentTable(np.asarray([0]), np.asarray([numel]), CPU, np.asarray([2]))
    means, patterns = [], []
    for step in (1, 2):
        tensors = Tensors.make("bf16 m", numel, torch.zeros(numel, dtype=torch.bool))
        tensors.exp_avg.fill_(1.0)
        # m = 0.9 + 0.1 (1 + 0.01) = 1.001: an eighth of the way to the next bfloat16, 1.0078125.
        tensors.grad.fill_(1.01)
        scalars = scalars_of(step=step, grad_scale=1.0)
        update(kernels, tensors, layout, scalars, origin_B=layout.origins)
        assert set(tensors.exp_avg.tolist()) == {1.0, 1.0078125}
        means.append(float(tensors.exp_avg.double().mean()))
        patterns.append(tensors.exp_avg > 1)
    # Standard deviation of the mean: 0.0078 * sqrt(0.128 * 0.872 / 40000) = 1.3e-5.
    assert means == pytest.approx([1.001, 1.001], abs=6e-5)
    agree = float((patterns[0] == patterns[1]).double().mean())
    assert agree == pytest.approx(0.128**2 + 0.872**2, abs=0.02), "steps are not independent"


# update_whole_.


@pytest.mark.parametrize("storage", STORAGE)
def test_update_whole_equals_the_kernels_that_it_joins(kernels, layout, storage):
    origins, scalars = layout.origins if storage.startswith("bf16 m") else None, scalars_of()
    together = Tensors.make(storage, layout.numel, layout.outside)
    apart = together.clone()
    v, group = positive(layout.entries, 5), groups_of(layout.entries)
    inv_numel, sums, steps = positive(layout.entries, 6), *torch.zeros(2, layout.entries)
    mine = [v.clone(), steps.clone(), sums.clone()]
    kernels.update_whole_(
        *together,
        layout.table,
        exp_avg_sq_B=mine[0],
        step_size_B=mine[1],
        sum_sq_B=mine[2],
        inv_numel_B=inv_numel,
        group_B=group,
        scalars=scalars,
        origin_B=origins,
    )
    kernels.block_sum_sq_(sums, apart.grad, layout.table)
    kernels.block_step_size_(
        v,
        steps,
        sums,
        inv_numel_B=inv_numel,
        group_B=group,
        scalars=scalars,
        index=torch.from_numpy(layout.table.indices),
    )
    kernels.update_(
        *apart,
        layout.table,
        step_size_B=steps,
        group_B=group,
        scalars=scalars,
        origin_B=origins,
    )
    # Long segments are added up in another order here than there.
    for left, right in zip(mine, (v, steps, sums), strict=True):
        torch.testing.assert_close(left, right, rtol=SUM_RTOL, atol=0)
    if max([high - low for low, high in layout.bounds], default=0) <= 65536:
        for left, right in zip(together.written(), apart.written(), strict=True):
            assert torch.equal(bits(left), bits(right))


# update_elementwise_.


def test_update_elementwise_equals_torch_adamw(kernels, small_layout):
    """In float32 with bfloat16 weights, for ten steps of bfloat16 gradients with a loss scale."""
    layout = small_layout
    group, weight_decay = groups_of(layout.entries), 0.1
    outside, inside = layout.outside, ~layout.outside
    tensors = Tensors.make("bf16 grad and weight", layout.numel, outside)
    tensors.exp_avg[inside] = 0
    v = torch.zeros(layout.table.numel)
    start = tensors.clone()
    theirs = [tensors.param[a:b].clone().double().requires_grad_() for a, b in layout.bounds]
    optimizers = []
    for s, p in enumerate(theirs):
        g = int(group[layout.entry(s)]) + 1
        options = {"lr": 1e-2 * g, "eps": 1e-8 * g, "weight_decay": weight_decay}
        optimizers.append(torch.optim.AdamW([p], betas=(BETA1, BETA2), **options))
    loss_scale = 512.0
    for step in range(1, 11):
        tensors.grad = (noise(layout.numel, 100 + step) * loss_scale).to(torch.bfloat16)
        tensors.grad[outside] = float("nan")
        with Unchanged(grad=tensors.grad):
            kernels.update_elementwise_(
                tensors.param,
                tensors.exp_avg,
                v,
                tensors.weight,
                tensors.grad,
                layout.table,
                group_B=group,
                scalars=scalars_of(step=step, grad_scale=1 / loss_scale),
            )
        for p, optimizer, (low, high) in zip(theirs, optimizers, layout.bounds, strict=True):
            p.grad = tensors.grad[low:high].double() / loss_scale
            optimizer.step()
    begin = 0
    for p, optimizer, (low, high) in zip(theirs, optimizers, layout.bounds, strict=True):
        state = optimizer.state[p]
        for mine, other in (
            (tensors.param[low:high], p.detach()),
            (tensors.exp_avg[low:high], state["exp_avg"]),
            (v[begin : begin + high - low], state["exp_avg_sq"]),
        ):
            torch.testing.assert_close(mine.double(), other, rtol=ADAMW_TOL, atol=ADAMW_TOL)
        begin += high - low
    for mine, old in zip(tensors.written(), start.written(), strict=True):
        assert torch.equal(bits(mine)[outside], bits(old)[outside]), "wrote outside of the ranges"
    rounded = rounding.to_weight(tensors.param, torch.bfloat16)
    assert torch.equal(bits(tensors.weight)[inside], bits(rounded)[inside])


@pytest.mark.parametrize("storage", STORAGE)
def test_update_elementwise_equals_blocks_of_one_element(kernels, storage):
    """The limit that ties both kernels together."""
    numel, scalars = 24, scalars_of()
    one_each = SegmentTable(np.arange(numel), np.arange(1, numel + 1), CPU)
    together = SegmentTable(np.asarray([0]), np.asarray([numel]), CPU)
    origins = torch.arange(9, numel + 9, dtype=torch.int32)
    left = Tensors.make(storage, numel, torch.zeros(numel, dtype=torch.bool))
    right, stochastic = left.clone(), storage.startswith("bf16 m")
    sums, steps, group = torch.empty(numel), torch.empty(numel), torch.zeros(numel).int()
    v_left, v_right = torch.zeros(numel), torch.zeros(numel)
    kernels.block_sum_sq_(sums, left.grad, one_each)
    kernels.block_step_size_(
        v_left, steps, sums, inv_numel_B=torch.ones(numel), group_B=group, scalars=scalars
    )
    kernels.update_(
        *left,
        one_each,
        step_size_B=steps,
        group_B=group,
        scalars=scalars,
        origin_B=origins if stochastic else None,
    )
    kernels.update_elementwise_(
        right.param,
        right.exp_avg,
        v_right,
        right.weight,
        right.grad,
        together,
        group_B=group,
        scalars=scalars,
        origin_B=origins[:1] if stochastic else None,
    )
    torch.testing.assert_close(v_left, v_right, rtol=SCALAR_RTOL, atol=0)
    assert torch.equal(bits(left.exp_avg), bits(right.exp_avg))
    torch.testing.assert_close(left.main_param, right.main_param, rtol=ADAMW_TOL, atol=ADAMW_TOL)


# All kernels.


@pytest.mark.parametrize("grad_scale", [float("nan"), float("inf")])
def test_nothing_changes_in_a_skipped_step(kernels, grad_scale):
    layout, scalars = layout_of("gaps"), scalars_of(grad_scale=grad_scale)
    tensors = Tensors.make("bf16 m, remainders", layout.numel, layout.outside)
    vectors = {name: positive(layout.entries, 20 + i) for i, name in enumerate(("v", "s", "q"))}
    elements, group = positive(layout.table.numel, 4), groups_of(layout.entries)
    state = {f"tensor {i}": tensor for i, tensor in enumerate(tensors.written())}
    shared = {"inv_numel_B": positive(layout.entries, 3), "group_B": group, "scalars": scalars}
    with Unchanged(**state, **vectors, elements=elements):
        kernels.block_step_size_(*vectors.values(), **shared)
        kernels.update_(
            *tensors, layout.table, step_size_B=vectors["s"], group_B=group, scalars=scalars
        )
        kernels.update_whole_(
            *tensors,
            layout.table,
            exp_avg_sq_B=vectors["v"],
            step_size_B=vectors["s"],
            sum_sq_B=vectors["q"],
            **shared,
        )
        kernels.update_elementwise_(
            tensors.param,
            tensors.exp_avg,
            elements,
            tensors.weight,
            tensors.grad,
            layout.table,
            group_B=group,
            scalars=scalars,
        )


def outcome_of_all_kernels(storage: str, layout: Layout) -> list[torch.Tensor]:
    tensors = Tensors.make(storage, layout.numel, layout.outside)
    options = {"origin_B": layout.origins if storage.startswith("bf16 m") else None}
    sums, group, scalars = positive(layout.entries, 4), groups_of(layout.entries), scalars_of()
    cpu.block_sum_sq_(sums, tensors.grad, layout.table)
    update(cpu, tensors, layout, scalars, **options)
    found = [sums, *tensors.clone().written()]
    elements = positive(layout.table.numel, 5)
    update_elementwise(cpu, tensors, elements, layout, scalars, **options)
    found += [elements, *tensors.clone().written()]
    blocks = {"inv_numel_B": positive(layout.entries, 6), "group_B": group, "scalars": scalars}
    v, steps, whole_sums = positive(layout.entries, 5), *torch.zeros(2, layout.entries)
    cpu.update_whole_(
        *tensors,
        layout.table,
        exp_avg_sq_B=v,
        step_size_B=steps,
        sum_sq_B=whole_sums,
        **blocks,
        **options,
    )
    found += [v, steps, whole_sums, *tensors.written()]
    many, stats = positive(50_000, 7), torch.zeros(2, 2, dtype=torch.float64)
    cpu.norm_partials_(stats, many, (torch.arange(50_000) % 3 - 1).to(torch.int8))
    many_v, many_steps = positive(50_000, 8), torch.zeros(50_000)
    cpu.block_step_size_(
        many_v,
        many_steps,
        many,
        inv_numel_B=torch.full((50_000,), 0.1),
        group_B=groups_of(50_000),
        scalars=scalars,
    )
    return [*found, stats, many_v, many_steps]


@pytest.mark.parametrize("storage", STORAGE)
def test_instruction_sets_and_threads_change_no_bit(storage):
    layout = layout_of("in parts")
    threads, found = torch.get_num_threads(), []
    try:
        for level, num_threads in ((0, 1), (1, 2), (2, 3), (2, 1)):
            cpu.library().adam_mini_limit_level(level)
            torch.set_num_threads(num_threads)
            found.append([bits(tensor) for tensor in outcome_of_all_kernels(storage, layout)])
    finally:
        cpu.library().adam_mini_limit_level(9)
        torch.set_num_threads(threads)
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            assert torch.equal(left, right)


def test_float16_weights_are_rounded_as_torch_does():
    """All exponents and both neighbours of every tie, subnormals and overflow included."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    values = torch.cat([halves, ties, ties.nextafter(halves[1:]), ties.nextafter(halves[:-1])])
    extra = torch.tensor([65519.99, 65520.0, 7e4, 1e30, math.inf, math.nan, 1e-8, 2.0**-25])
    values = torch.cat([values, -values, extra, -extra])
    n = len(values)
    table = SegmentTable(np.asarray([0]), np.asarray([n]), CPU)
    scalars, weight = scalars_of(weight_decay=0.0), torch.zeros(n, dtype=torch.float16)
    step, group = torch.zeros(1), groups_of(1)
    zeros = torch.zeros(2, n)
    cpu.update_(
        values.clone(), zeros[0], weight, zeros[1], table, step_size_B=step, group_B=group,
        scalars=scalars,
    )  # fmt: skip
    expected, nan = values.half(), values.isnan()
    assert torch.equal(bits(weight)[~nan], bits(expected)[~nan])
    assert weight[nan].isnan().all()


def test_float16_gradients_are_read_exactly():
    """Every finite pattern, subnormals included, through both kernels that read gradients."""
    patterns = torch.arange(0, 0x7C00, dtype=torch.int32)
    half = torch.cat([patterns, patterns + 0x8000]).to(torch.int16).view(torch.float16)
    n, one = len(half), torch.ones(1)
    each = SegmentTable(np.arange(n), np.arange(1, n + 1), CPU)
    found = torch.empty(n)
    cpu.block_sum_sq_(found, half, each)
    assert torch.equal(found, half.float() ** 2)
    scalars, m = scalars_of(grad_scale=1.0), torch.zeros(n)
    together = SegmentTable(np.asarray([0]), np.asarray([n]), CPU)
    cpu.update_(
        torch.zeros(n), m, None, half, together, step_size_B=one, group_B=groups_of(1),
        scalars=scalars,
    )  # fmt: skip
    factor = torch.tensor(1.0) * (1 - BETA1)
    assert torch.equal(m, half.float() * factor)
    for special in (float("inf"), float("-inf"), float("nan")):
        cpu.block_sum_sq_(one, torch.tensor([special], dtype=torch.float16), together_of(1))
        assert not one.isfinite()


def together_of(numel: int) -> SegmentTable:
    return SegmentTable(np.asarray([0]), np.asarray([numel]), CPU)


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
    table = layout.table
    found = []
    for run in table.runs:
        assert run.first == layout.entry(len(found))
        for index in range(run.count):
            start = run.start + index * run.length
            found.append((start, start + run.length))
        assert run.window.stop == found[-1][1]
        assert run.segments == slice(run.first, layout.entry(len(found)))
    assert found == layout.bounds
    assert len(table) == len(layout.bounds)


def test_runs_are_as_long_as_possible():
    starts, ends = np.asarray([0, 4, 8, 10, 12, 17]), np.asarray([4, 8, 10, 12, 14, 19])
    table = SegmentTable(starts, ends, CPU)
    expected = [(0, 2, 4), (2, 3, 2), (5, 1, 2)]
    assert [(run.first, run.count, run.length) for run in table.runs] == expected
    chosen = table.subset(np.asarray([True, True, True, False, True, True]))
    assert [(run.first, run.count) for run in chosen.runs] == [(0, 2), (2, 1), (4, 1), (5, 1)]


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
    table = SegmentTable(np.asarray([0]), np.asarray([8]), CPU)
    with pytest.raises(ValueError, match=r"shape \(8,\) and strides \(2,\) on cpu; needed are 8"):
        cpu.block_sum_sq_(torch.zeros(1), torch.zeros(16)[::2], table)
    with pytest.raises(ValueError, match=r"needed are 8 adjacent"):
        cpu.block_sum_sq_(torch.zeros(1), torch.zeros(7), table)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "auto"])
def test_every_backend_has_every_kernel(name):
    device = torch.device("cuda" if name == "triton" else "cpu")
    backend = select_backend(name, device)
    for kernel in (name for name in dir(reference) if name.endswith("_") and name[0] != "_"):
        assert callable(getattr(backend, kernel))
    assert name == backend.NAME
