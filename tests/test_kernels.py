"""Every backend's kernels against loops in float64, segment by segment and element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron_adam_mini.config import BACKENDS
from megatron_adam_mini.kernels import SegmentTable, select_backend

#: Sum of at most 400 squares. Kernels square and add in float32 or better; adding in float32 in
#: the order of a vectorised loop costs a few dozen roundings of 2**-24 = 6e-8.
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
    "single elements": ([(0, 1)] * 5 + [(2, 1), (0, 3)], 1),
    "gaps": ([(3, 5), (0, 5), (1, 8), (0, 8), (0, 3), (4, 8)], 6),
    "long": ([(1, 400), (0, 64), (0, 64), (0, 400)], 3),
    "uneven": ([(0, n) for n in (13, 1, 64, 2, 2, 31, 5)], 2),
    "none": ([], 10),
    "empty slice": ([], 0),
}


@pytest.fixture(params=BACKENDS)
def kernels(request):
    return select_backend(request.param)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """Return ``(table, ranges as pairs, length of the slice)``."""
    pieces, tail = LAYOUTS[request.param]
    bounds, at = [], 0
    for gap, length in pieces:
        bounds.append((at + gap, at + gap + length))
        at += gap + length
    starts = np.asarray([b[0] for b in bounds], dtype=np.int64)
    ends = np.asarray([b[1] for b in bounds], dtype=np.int64)
    return SegmentTable(starts, ends, torch.device("cpu")), bounds, at + tail


def noise(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype)


def positive(numel: int, seed: int) -> torch.Tensor:
    return noise(numel, seed).abs() + 0.01


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns, so that equal NaNs count as equal and signed zeros do not."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return tensor.clone().view(kinds[tensor.dtype])


def outside_of(bounds: Sequence[tuple[int, int]], numel: int) -> torch.Tensor:
    mask = torch.ones(numel, dtype=torch.bool)
    for low, high in bounds:
        mask[low:high] = False
    return mask


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


# block_sum_sq_.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_sum_sq(kernels, layout, dtype):
    table, bounds, numel = layout
    grad = noise(numel, 1, dtype)
    found = torch.full((len(bounds),), float("nan"))  # must be overwritten, not added to
    with Unchanged(grad=grad):
        kernels.block_sum_sq_(found, grad, table)
    values = grad.double().tolist()
    for s, (low, high) in enumerate(bounds):
        expected = math.fsum(value * value for value in values[low:high])
        assert float(found[s]) == pytest.approx(expected, rel=SUM_RTOL)


def test_block_sum_sq_of_bfloat16_is_not_taken_in_bfloat16(kernels):
    # 256 ones and one 1/16: bfloat16 holds neither 257 nor 256 + 1/256.
    grad = torch.ones(257, dtype=torch.bfloat16)
    grad[-1] = 0.0625
    table = SegmentTable(np.asarray([0]), np.asarray([257]), torch.device("cpu"))
    found = torch.empty(1)
    kernels.block_sum_sq_(found, grad, table)
    assert found.item() == 256 + 0.0625**2


def test_block_sum_sq_reads_no_gap_and_keeps_non_finite_values_apart(kernels, layout):
    table, bounds, numel = layout
    if not bounds:
        found = torch.empty(0)
        kernels.block_sum_sq_(found, noise(numel, 2), table)
        return
    grad = noise(numel, 2)
    grad[outside_of(bounds, numel)] = float("nan")
    for poison in (float("inf"), float("-inf"), float("nan")):
        for victim in {0, len(bounds) - 1}:
            poisoned = grad.clone()
            poisoned[bounds[victim][1] - 1] = poison
            found = torch.zeros(len(bounds))
            kernels.block_sum_sq_(found, poisoned, table)
            expected = [s != victim for s in range(len(bounds))]
            assert torch.isfinite(found).tolist() == expected


def test_block_sum_sq_writes_into_a_view(kernels, layout):
    """The engine hands out parts of one vector."""
    table, bounds, numel = layout
    whole = torch.full((len(bounds) + 4,), 7.0)
    kernels.block_sum_sq_(whole[2 : 2 + len(bounds)], noise(numel, 3), table)
    assert whole[:2].tolist() == whole[2 + len(bounds) :].tolist() == [7.0, 7.0]


def test_block_sum_sq_is_deterministic(kernels, layout):
    table, bounds, numel = layout
    grad = noise(numel, 4)
    first, second = torch.empty(len(bounds)), torch.empty(len(bounds))
    kernels.block_sum_sq_(first, grad, table)
    kernels.block_sum_sq_(second, grad.clone(), table)
    assert torch.equal(bits(first), bits(second))


# block_step_size_.


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25, 1 / 65536])
@pytest.mark.parametrize("num_blocks", [0, 1, 17])
def test_block_step_size(kernels, num_blocks, grad_scale, step):
    v, sums = positive(num_blocks, 5), positive(num_blocks, 6) * 100 / grad_scale**2
    inv_numel, lr = 1 / positive(num_blocks, 7).mul(100).ceil(), positive(num_blocks, 8) * 1e-3
    eps = positive(num_blocks, 9) * 1e-8
    before, step_size = v.clone(), torch.full((num_blocks,), float("nan"))
    correction1, correction2 = 1 - BETA1**step, 1 - BETA2**step
    with Unchanged(sums=sums, inv_numel=inv_numel, lr=lr, eps=eps):
        kernels.block_step_size_(
            v,
            step_size,
            sums,
            inv_numel_B=inv_numel,
            lr_B=lr,
            eps_B=eps,
            grad_scale=scalar(grad_scale),
            bias_correction1=scalar(correction1),
            bias_correction2=scalar(correction2),
            beta2=BETA2,
        )
    for b in range(num_blocks):
        mean = float(sums[b]) * float(inv_numel[b]) * grad_scale**2
        expected = BETA2 * float(before[b]) + (1 - BETA2) * mean
        assert float(v[b]) == pytest.approx(expected, rel=SCALAR_RTOL)
        expected = float(lr[b]) / correction1 / (math.sqrt(expected / correction2) + float(eps[b]))
        assert float(step_size[b]) == pytest.approx(expected, rel=SCALAR_RTOL)


def test_step_size_of_a_block_without_gradient_is_finite(kernels):
    """A token that was never seen: m = v = 0, so that nothing moves, whatever the step size."""
    v, step_size = torch.zeros(1), torch.empty(1)
    one = torch.ones(1)
    kernels.block_step_size_(
        v,
        step_size,
        torch.zeros(1),
        inv_numel_B=one,
        lr_B=one * 1e-3,
        eps_B=one * 1e-8,
        grad_scale=scalar(1),
        bias_correction1=scalar(0.1),
        bias_correction2=scalar(0.05),
        beta2=BETA2,
    )
    assert v.item() == 0
    assert step_size.item() == pytest.approx(1e-3 / 0.1 / 1e-8, rel=SCALAR_RTOL)


# update_.


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_update(kernels, layout, grad_dtype, weight_dtype):
    table, bounds, numel = layout
    param, exp_avg, grad = noise(numel, 10), noise(numel, 11), noise(numel, 12, grad_dtype)
    step_size, decay = positive(len(bounds), 13) * 1e-2, 1 - positive(len(bounds), 14) * 1e-2
    weight = None if weight_dtype is None else noise(numel, 15, weight_dtype)
    outside = outside_of(bounds, numel)
    param[outside] = exp_avg[outside] = grad[outside] = float("nan")
    before = {"param": param.clone(), "exp_avg": exp_avg.clone()}
    untouched = [param, exp_avg] if weight is None else [param, exp_avg, weight]
    kept = [bits(tensor)[outside] for tensor in untouched]
    grad_scale = 0.37
    with Unchanged(grad=grad, step_size=step_size, decay=decay):
        kernels.update_(
            param,
            exp_avg,
            weight,
            grad,
            table,
            step_size_S=step_size,
            decay_S=decay,
            grad_scale=scalar(grad_scale),
            beta1=BETA1,
        )
    for tensor, bits_before in zip(untouched, kept, strict=True):
        assert torch.equal(bits(tensor)[outside], bits_before), "wrote outside of the segments"
    for s, (low, high) in enumerate(bounds):
        for i in range(low, high):
            old, g = float(before["exp_avg"][i]), float(grad[i]) * grad_scale
            m = BETA1 * old + (1 - BETA1) * g
            assert abs(float(exp_avg[i]) - m) <= UPDATE_TOL * (abs(old) + abs(g))
            p = float(before["param"][i])
            expected = float(decay[s]) * p - float(step_size[s]) * m
            assert abs(float(param[i]) - expected) <= UPDATE_TOL * (abs(p) + abs(old) + abs(g))
    if weight is not None:
        inside = ~outside
        assert torch.equal(bits(weight)[inside], bits(param.to(weight_dtype))[inside])


def test_update_takes_scale_and_steps_from_views(kernels):
    """The engine hands out parts of longer vectors."""
    table = SegmentTable(np.asarray([0, 4]), np.asarray([4, 6]), torch.device("cpu"))
    steps, decays = torch.tensor([9.0, 0.5, 0.25, 9.0]), torch.tensor([9.0, 1.0, 0.5, 9.0])
    param, exp_avg = torch.ones(6), torch.zeros(6)
    kernels.update_(
        param,
        exp_avg,
        None,
        torch.ones(6),
        table,
        step_size_S=steps[1:3],
        decay_S=decays[1:3],
        grad_scale=scalar(1.0),
        beta1=0.5,
    )
    assert exp_avg.tolist() == [0.5] * 6
    assert param.tolist() == [1 - 0.5 * 0.5] * 4 + [0.5 - 0.25 * 0.5] * 2


# update_elementwise_.


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_update_elementwise_equals_torch_adamw(kernels, layout, grad_dtype, weight_dtype):
    table, bounds, numel = layout
    lr, eps = positive(len(bounds), 20) * 1e-2, torch.full((len(bounds),), 1e-8)
    weight_decay = 0.1
    decay = (1 - lr.double() * weight_decay).float()
    param, exp_avg = noise(numel, 21), torch.zeros(numel)
    outside = outside_of(bounds, numel)
    param[outside] = exp_avg[outside] = float("nan")
    weight = None if weight_dtype is None else noise(numel, 22, weight_dtype)
    v = torch.zeros(sum(high - low for low, high in bounds))
    theirs = [param[low:high].clone().double().requires_grad_() for low, high in bounds]
    optimizers = [
        torch.optim.AdamW(
            [p], lr=float(lr[r]), betas=(BETA1, BETA2), eps=1e-8, weight_decay=weight_decay
        )
        for r, p in enumerate(theirs)
    ]
    untouched = [param, exp_avg] if weight is None else [param, exp_avg, weight]
    kept = [bits(tensor)[outside] for tensor in untouched]
    loss_scale = 512.0
    for step in range(1, 11):
        grad = (noise(numel, 100 + step) * loss_scale).to(grad_dtype)
        grad[outside] = float("nan")
        with Unchanged(grad=grad, lr=lr, eps=eps, decay=decay):
            kernels.update_elementwise_(
                param,
                exp_avg,
                v,
                weight,
                grad,
                table,
                lr_R=lr,
                eps_R=eps,
                decay_R=decay,
                grad_scale=scalar(1 / loss_scale),
                bias_correction1=scalar(1 - BETA1**step),
                bias_correction2=scalar(1 - BETA2**step),
                beta1=BETA1,
                beta2=BETA2,
            )
        for p, optimizer, (low, high) in zip(theirs, optimizers, bounds, strict=True):
            p.grad = grad[low:high].double() / loss_scale
            optimizer.step()
    begin = 0
    for p, optimizer, (low, high) in zip(theirs, optimizers, bounds, strict=True):
        state = optimizer.state[p]
        for mine, other in (
            (param[low:high], p.detach()),
            (exp_avg[low:high], state["exp_avg"]),
            (v[begin : begin + high - low], state["exp_avg_sq"]),
        ):
            torch.testing.assert_close(mine.double(), other, rtol=ADAMW_TOL, atol=ADAMW_TOL)
        begin += high - low
    for tensor, bits_before in zip(untouched, kept, strict=True):
        assert torch.equal(bits(tensor)[outside], bits_before), "wrote outside of the ranges"
    if weight is not None:
        inside = ~outside
        assert torch.equal(bits(weight)[inside], bits(param.to(weight_dtype))[inside])


def test_update_elementwise_equals_blocks_of_one_element(kernels):
    """The limit that ties both kernels together."""
    numel, lr, eps = 24, 1e-2, 1e-8
    one_each = SegmentTable(np.arange(numel), np.arange(1, numel + 1), torch.device("cpu"))
    together = SegmentTable(np.asarray([0]), np.asarray([numel]), torch.device("cpu"))
    start = noise(numel, 30)
    left = [start.clone(), torch.zeros(numel), torch.zeros(numel)]
    right = [start.clone(), torch.zeros(numel), torch.zeros(numel)]
    sums, step_size = torch.empty(numel), torch.empty(numel)
    every, decay = torch.ones(numel), 0.999
    for step in range(1, 6):
        grad = noise(numel, 40 + step)
        scalars = {
            "grad_scale": scalar(0.5),
            "bias_correction1": scalar(1 - BETA1**step),
            "bias_correction2": scalar(1 - BETA2**step),
        }
        kernels.block_sum_sq_(sums, grad, one_each)
        kernels.block_step_size_(
            left[2],
            step_size,
            sums,
            inv_numel_B=every,
            lr_B=every * lr,
            eps_B=every * eps,
            beta2=BETA2,
            **scalars,
        )
        kernels.update_(
            left[0],
            left[1],
            None,
            grad,
            one_each,
            step_size_S=step_size,
            decay_S=every * decay,
            grad_scale=scalars["grad_scale"],
            beta1=BETA1,
        )
        kernels.update_elementwise_(
            right[0],
            right[1],
            right[2],
            None,
            grad,
            together,
            lr_R=torch.tensor([lr]),
            eps_R=torch.tensor([eps]),
            decay_R=torch.tensor([decay]),
            beta1=BETA1,
            beta2=BETA2,
            **scalars,
        )
    for mine, other in zip(left, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=ADAMW_TOL, atol=ADAMW_TOL)


# SegmentTable and the choice of a backend.


def test_runs_cover_the_segments_in_order(layout):
    table, bounds, _ = layout
    found = []
    for run in table.runs:
        assert run.first == len(found)
        for index in range(run.count):
            start = run.start + index * run.length
            found.append((start, start + run.length))
        assert run.window == slice(found[run.first][0], found[-1][1])
        assert run.segments == slice(run.first, len(found))
    assert found == bounds
    assert len(table) == len(bounds)
    assert table.starts.tolist() == [low for low, _ in bounds]
    assert table.ends.tolist() == [high for _, high in bounds]


def test_runs_are_as_long_as_possible():
    starts, ends = np.asarray([0, 4, 8, 10, 12, 17]), np.asarray([4, 8, 10, 12, 14, 19])
    table = SegmentTable(starts, ends, torch.device("cpu"))
    assert [(run.first, run.count, run.length) for run in table.runs] == [
        (0, 2, 4),
        (2, 3, 2),
        (5, 1, 2),
    ]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"^Adam-mini backend='abacus' is not known; allowed: "):
        select_backend("abacus")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_every_kernel(name):
    backend = select_backend(name)
    for kernel in ("block_sum_sq_", "block_step_size_", "update_", "update_elementwise_"):
        assert callable(getattr(backend, kernel))
