"""Triton's kernels on a GPU against the plain-torch reference, on fresh random data.

    python -m benchmarks.gpu.parity [--seconds 90] [--workers 8] [--seed N]

Every round draws a layout, the same elements as runs of rows whose columns are segments, dtypes,
alignments, subsets and numbers of the step, and compares bit for bit all that kernels may write,
what lies outside of the segments included: v, step sizes, m, main parameters or remainders,
weights. Sums of squares may differ by the order of additions; what follows from them is compared
given the same sums, and they must repeat bit for bit. Outputs are poisoned with NaN before they are
written. Each worker is a process of its own, since most of the time goes into compilation; together
they begin with every combination of dtypes.

``--segments-beyond-2e31`` adds one case with 64-bit positions (18 GB). ``TRITON_INTERPRET=1`` with
``--device cpu --small`` interprets a few rounds, to try this script without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import queue
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import measure
from megatron_adam_mini.kernels import BufferTensors, SegmentVectors, StepScalars, reference
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.rounding import fp8_scale

GRADS = (torch.float32, torch.bfloat16, torch.float16)
#: exp_avg's dtype, and whether it is rounded stochastically.
MOMENTS = (
    (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.uint8, True),
)  # fmt: skip
#: Dtypes of main parameters and of model weights; int16: remainders.
STORAGE = (
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.int16, torch.bfloat16),
)
DTYPES = list(itertools.product(GRADS, MOMENTS, STORAGE))
LENGTHS = (1, 3, 7, 40, 64, 128, 512, 1000, 1376, 2048, 2056, 2880, 4096, 5120, 11008)
LONG = (16384, 16392, 65536)

#: Squares are added in float32 within 16,384 elements: some ten roundings of 2**-24 in a row by
#: one thread, and a tree of at most 11 levels.
SUM_RTOL = 3e-6
#: Orders of adding up to 400,000 float64 numbers, all positive.
NORM_RTOL = 1e-13
#: What kernels may write.
STATE = (
    "exp_avg", "weight", "param", "sum_sq", "exp_avg_sq", "step_size", "exp_avg_sq_E",
    "exp_avg_scale",
)  # fmt: skip

State = dict[str, Tensor | None]


class Case:
    """Random inputs of all kernels.

    Args:
        rng: source of everything.
        device: where.
        dtypes: one of :data:`DTYPES`.
        largest: about how many elements there may be.
        grad_scale: factor of the gradients.
        bad_grad: put an infinity and a NaN among the gradients.
    """

    def __init__(
        self,
        rng: random.Random,
        device: torch.device,
        dtypes: tuple[Any, Any, Any],
        *,
        largest: int,
        grad_scale: float = 0.25,
        bad_grad: bool = False,
    ) -> None:
        grad, (moment, stochastic), (param, weight) = dtypes
        self._generator = torch.Generator(device=device).manual_seed(rng.randrange(2**31))
        self._device = device
        self._skipped = rng.choice((0, 0, 0, 1, 2, 4))  # elements before each stream
        self.table = self._layout(rng, largest)
        begins, ends = self.table.start_S, self.table.end_S
        self.columns, self.parts = self._columns(rng, self.table)
        tail = rng.randint(0, 5)
        in_buffer, in_state = (
            int(v.max(initial=0)) + tail for v in (ends, ends + self.table.shifts)
        )
        if len(begins) > 1 and rng.random() < 0.3:
            self.table = self.table.subset(np.arange(len(begins)) % 2 == 0)
        self.grad = self._noise(in_buffer, grad)
        if bad_grad:
            places = rng.sample(range(in_buffer), min(2, in_buffer))
            self.grad[places[0]], self.grad[places[-1]] = torch.inf, torch.nan
        self.exp_avg = self._noise(in_state, moment)
        self.weight = None if weight is None else self._noise(in_buffer, weight)
        self.param = self._noise(in_buffer if weight is None else in_state, param)
        entries = max(len(begins) + 2, self.columns.num_entries, self.parts.num_entries) + 2
        self.sum_sq, self.exp_avg_sq, self.inv_numel = (
            self._noise(entries).abs() for _ in range(3)
        )
        self.step_size = self._noise(entries).abs() * 0.01
        self.exp_avg_sq_E = self._noise(self.table.numel).abs()
        self.exp_avg_scale = None
        if moment == torch.uint8:
            scales = [fp8_scale(self._noise(entries).abs().contiguous()) for _ in range(2)]
            self.exp_avg_scale = torch.stack(scales, dim=1)
        numbers = torch.arange(entries, device=device)
        self.group = (numbers % 3).to(torch.int32)
        self.origin = (numbers * 100003 - 7).to(torch.int32) if stochastic else None
        self.index = torch.from_numpy(self.table.indices).to(device)
        self.scalars = StepScalars(3, device, seed=rng.randrange(100))
        self.scalars.fill(
            [{"lr": 0.01 * n, "eps": 1e-8 * n, "weight_decay": 0.1} for n in (1, 2, 3)],
            betas=(0.9, 0.95), step=rng.randint(1, 9), grad_scale=grad_scale,
        )  # fmt: skip

    @staticmethod
    def _layout(rng: random.Random, largest: int) -> SegmentTable:
        """Rows of one length with gaps, as Megatron makes them, or odd ones; state elsewhere."""
        aligned, elsewhere = rng.random() < 0.6, rng.random() < 0.6
        starts, lengths, shifts = [], [], []
        at = shift = 0
        for _ in range(rng.randint(1, 5)):
            length = rng.choice(LENGTHS + (LONG if rng.random() < 0.4 else ()))
            if aligned:
                length = max(64, length // 64 * 64)
            at += rng.choice((0, 64, 128)) if aligned else rng.randint(0, 9)
            if elsewhere:  # state only ever moves towards its start, as slices of a buffer do
                shift -= rng.choice((0, 16, 64)) if aligned else rng.randint(0, 20)
                shift = max(shift, -at)
            for _ in range(max(1, min(rng.randint(1, 300), largest // length))):
                starts.append(at)
                lengths.append(length)
                shifts.append(shift)
                at += length
        start_S, length_S, shift_S = (
            np.asarray(v, dtype=np.int64) for v in (starts, lengths, shifts)
        )
        disjoint = (start_S + shift_S)[1:] >= (start_S + length_S + shift_S)[:-1]
        if not disjoint.all():
            shift_S = np.zeros_like(shift_S)
        return SegmentTable(start_S, start_S + length_S, np.arange(len(start_S)) + 2, shift_S)

    @staticmethod
    def _columns(rng: random.Random, table: SegmentTable) -> tuple[ColumnTable, ColumnTable]:
        """Return runs of rows of some width with the same elements, and parts of longer ones."""
        found = []
        for parts in (False, True):
            runs, index = [], 2
            for run in table.runs:
                width = rng.choice((*LENGTHS, run.length))
                skip = rng.choice((0, rng.randint(1, 3 * width))) if parts else 0
                numel, stride = run.count * run.length, width * rng.choice((1, 8, 2**20 + 1))
                place = (run.start, run.start + numel, width, index, skip, run.shift, stride)
                runs.append(place)
                index += min(width, skip + numel) + rng.randint(0, 1)
            found.append(ColumnTable(*np.asarray(runs, dtype=np.int64).T))
        return found[0], found[1]

    def _noise(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        numel += self._skipped
        found = torch.randn(numel, generator=self._generator, device=self._device)
        if dtype == torch.uint8:  # any codes, NaN among them
            found = (found * 1e4) % 256
        return (found * 1e4 if dtype == torch.int16 else found).to(dtype)[self._skipped :]

    @property
    def tensors(self) -> BufferTensors:
        """Streams."""
        return BufferTensors(self.param, self.exp_avg, self.weight, self.grad)

    @property
    def vectors(self) -> SegmentVectors:
        """Vectors with one entry per segment."""
        return SegmentVectors(
            self.exp_avg_sq, self.step_size, self.sum_sq, self.inv_numel, self.group, self.origin,
            self.exp_avg_scale,
        )  # fmt: skip

    def after(self, call: Callable[[Case], object], *poisoned: str) -> State:
        """Return copies of all state after a call, which leaves the case's own as it was.

        Args:
            call: the call.
            poisoned: vectors of which all entries are NaN before it.
        """
        kept = {name: getattr(self, name) for name in STATE}
        for name, value in kept.items():
            if value is not None:  # a copy that is aligned alike
                offset = value.storage_offset()
                moved = torch.empty(offset + value.numel(), dtype=value.dtype, device=value.device)
                setattr(self, name, moved[offset:].view(value.shape).copy_(value))
                if name in poisoned:
                    getattr(self, name).fill_(torch.nan)
        call(self)
        found = {name: getattr(self, name) for name in STATE}
        for name, value in kept.items():
            setattr(self, name, value)
        return found


# What is compared; each returns a call for a backend.


def sums(backend: Any) -> Callable[[Case], object]:
    """Sums of squares."""
    return lambda case: backend.segment_sum_sq_(case.sum_sq, case.grad, case.table)


def column_sums(backend: Any) -> Callable[[Case], object]:
    """Sums of squares of columns."""
    return lambda case: backend.column_sum_sq_(case.sum_sq, case.grad, case.columns)


def columns(backend: Any) -> Callable[[Case], object]:
    """Update from step sizes of columns."""
    return lambda case: backend.update_columns_(
        case.tensors, case.columns, case.vectors, case.scalars
    )


def column_parts(backend: Any) -> Callable[[Case], object]:
    """The same where runs are parts of longer ones."""
    return lambda case: backend.update_columns_(
        case.tensors, case.parts, case.vectors, case.scalars
    )


def sizes(backend: Any) -> Callable[[Case], object]:
    """Step sizes of the table's entries."""
    return lambda case: backend.segment_step_size_(case.vectors, case.scalars, case.index)


def all_sizes(backend: Any) -> Callable[[Case], object]:
    """Step sizes of all entries."""
    return lambda case: backend.segment_step_size_(case.vectors, case.scalars)


def update(backend: Any) -> Callable[[Case], object]:
    """Update from step sizes."""
    return lambda case: backend.update_(case.tensors, case.table, case.vectors, case.scalars)


def elementwise(backend: Any) -> Callable[[Case], object]:
    """Update with v per element."""
    return lambda case: backend.update_elementwise_(
        case.tensors, case.exp_avg_sq_E, case.table, case.vectors, case.scalars
    )


def one_pass(backend: Any) -> Callable[[Case], object]:
    """The whole step."""
    return lambda case: backend.update_in_one_pass_(
        case.tensors, case.table, case.vectors, case.scalars
    )


def one_pass_from(found_sums: Tensor) -> Callable[[Case], object]:
    """Return the whole step by the reference, from sums that are known."""

    def call(case: Case) -> None:
        case.sum_sq.copy_(found_sums)
        sizes(reference)(case)
        update(reference)(case)

    return call


def bits(tensor: Tensor) -> Tensor:
    """Return bit patterns; NaNs of different payload count as equal, signed zeros do not."""
    if not tensor.dtype.is_floating_point:
        return tensor
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(tensor.isnan(), torch.nan, tensor).view(kinds[tensor.element_size()])


def differences(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], rtol: float = 0.0
) -> list[str]:
    """Describe what differs; ``rtol`` is for sums of squares."""
    texts = []
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            continue
        if name == "sum_sq" and rtol:
            differ = ~torch.isclose(other, value, rtol=rtol, atol=0.0, equal_nan=True)
        else:
            differ = bits(other) != bits(value)
        if differ.any():
            at = differ.nonzero().flatten()[:3]
            texts.append(
                f"{name} differs at {int(differ.sum())} of {len(value)}, first at {at.tolist()}: "
                f"{other[at].tolist()} instead of {value[at].tolist()}"
            )
    return texts


def check(case: Case, triton_gpu: Any) -> list[str]:
    """Compare all kernels on one case."""
    found = []

    def compare(what: str, *states: Any) -> None:
        found.extend(f"{what}: {text}" for text in differences(*states))

    expected_sums = case.after(sums(reference), "sum_sq")
    both = [case.after(sums(triton_gpu), "sum_sq") for _ in range(2)]
    compare("sums", both[0], expected_sums, SUM_RTOL)
    compare("sums, again", both[1], both[0])
    expected = case.after(column_sums(reference), "sum_sq")
    both = [case.after(column_sums(triton_gpu), "sum_sq") for _ in range(2)]
    compare("sums of columns", both[0], expected, SUM_RTOL)
    compare("sums of columns, again", both[1], both[0])
    for kernel, *poisoned in (
        (sizes, "step_size"),
        (all_sizes, "step_size"),
        (update,),
        (columns,),
        (column_parts,),
        (elementwise,),
    ):
        states = (case.after(kernel(backend), *poisoned) for backend in (triton_gpu, reference))
        compare(kernel.__name__, *states)
    both = [case.after(one_pass(triton_gpu), "sum_sq", "step_size") for _ in range(2)]
    compare("one pass, again", both[1], both[0])
    sums_only = {"sum_sq": both[0]["sum_sq"]}
    compare("one pass, sums", sums_only, {"sum_sq": expected_sums["sum_sq"]}, SUM_RTOL)
    compare("one pass", both[0], case.after(one_pass_from(both[0]["sum_sq"]), "step_size"))
    return found


def check_nothing_written(
    rng: random.Random, device: torch.device, triton_gpu: Any, *, largest: int
) -> list[str]:
    """A factor that is not finite must leave everything as it was."""
    found = []
    for scale, dtypes in ((float("nan"), DTYPES[0]), (float("inf"), DTYPES[-1])):
        case = Case(rng, device, dtypes, largest=largest, grad_scale=scale)
        before = case.after(lambda _: None)
        for kernel in (sizes, all_sizes, update, columns, elementwise, one_pass):
            texts = differences(case.after(kernel(triton_gpu)), before)
            found += [f"grad_scale {scale}, {kernel.__name__}: {text}" for text in texts]
    return found


def check_norm(
    rng: random.Random, device: torch.device, triton_gpu: Any, *, largest: int
) -> list[str]:
    """Norms of several domains, with and without infinities."""
    found = []
    for domains, entries in itertools.product((1, 2, 4), (1, 5000, largest // 10 + 1)):
        generator = torch.Generator(device=device).manual_seed(rng.randrange(2**31))
        sum_sq = torch.rand(entries, generator=generator, device=device)
        if rng.random() < 0.3:
            sum_sq[rng.randrange(entries)] = torch.inf
        domain = (torch.arange(entries, device=device) % (domains + 1) - 1).to(torch.int8)
        stats = []
        for backend in (reference, triton_gpu, triton_gpu):
            poisoned = torch.full((domains, 2), torch.nan, dtype=torch.float64, device=device)
            backend.norm_partials_(poisoned, sum_sq, domain)
            stats.append(poisoned)
        if not torch.allclose(stats[1], stats[0], rtol=NORM_RTOL, atol=0.0, equal_nan=True):
            found.append(f"norm of {entries} in {domains}: {stats[1]} instead of {stats[0]}")
        if not torch.equal(bits(stats[1]), bits(stats[2])):
            found.append(f"norm of {entries} in {domains}, again: {stats[2]}, before {stats[1]}")
    return found


def check_decide(
    rng: random.Random, device: torch.device, triton_gpu: Any, *, largest: int
) -> list[str]:
    """Factors of gradients of any size; of ``largest`` nothing depends."""
    del largest
    found = []
    for number in range(200):
        norm_sq = rng.choice((0.0, torch.inf, torch.nan, *(10 ** rng.uniform(-20, 60),) * 9))
        rows = [[norm_sq, float(rng.random() < 0.1)], [rng.random(), 0.0]][: 1 + number % 2]
        stats = torch.tensor(rows, dtype=torch.float64, device=device)
        inv_scale = rng.choice((None, torch.tensor([rng.random()], device=device)))
        limits = {
            "clip_grad": rng.choice((torch.inf, 1.0, 0.3)),
            "skip_threshold": rng.choice((torch.inf, 1e9)),
            "largest_sq": rng.choice((torch.inf, 2.0**126)),
        }
        results = []
        for backend in (reference, triton_gpu):
            values = torch.full((3,), 7.0, dtype=torch.float64, device=device)
            scale = torch.full((1,), 7.0, device=device)
            backend.decide_(values, scale[0], stats, inv_scale, **limits)
            results.append({"values": values, "grad_scale": scale})
        found += [
            f"decision on {rows}, inv_scale {inv_scale}, {limits}: {text}"
            for text in differences(results[1], results[0])
        ]
    return found


def check_ordered_sums(
    rng: random.Random, device: torch.device, triton_gpu: Any, *, largest: int
) -> list[str]:
    """Sums of whole numbers, which are exact in any order; of any others, again elsewhere."""
    found = []
    for rows, longest in itertools.product((1, 300, largest // 40), (2, 5, 200)):
        generator = np.random.default_rng(rng.randrange(2**31))
        counts = generator.integers(0, longest + 1, rows)
        source = generator.integers(0, 1000, counts.sum())
        table = OrderedSums(1000 + generator.permutation(rows), counts, source)
        # The same rows in the other direction.
        parts = np.split(source, table.bounds[1:-1])[::-1]
        turned = OrderedSums(table.target[::-1], counts[::-1], np.concatenate(parts))
        values = torch.full((1000 + rows,), torch.nan, device=device)
        for label, numbers in (
            ("whole", generator.integers(0, 4096, 1000)),
            ("any", 10.0 ** generator.uniform(-20, 20, 1000)),
        ):
            values[:1000] = torch.from_numpy(numbers.astype(np.float32))
            results = [values.clone() for _ in range(3)]
            reference.ordered_sum_(results[0], table)
            triton_gpu.ordered_sum_(results[1], table)
            triton_gpu.ordered_sum_(results[2], turned)
            pairs = [(results[2], results[1])]
            pairs += [(results[1], results[0])] if label == "whole" else []
            found += [
                f"ordered sums, {rows} rows up to {longest}, {label}: {text}"
                for pair in pairs
                for text in differences({"values": pair[0]}, {"values": pair[1]})
            ]
    return found


def check_far(device: torch.device, triton_gpu: Any, *, before: int = 2**31) -> list[str]:
    """Segments beyond ``before`` elements, compared with a copy of the end of the buffer."""
    width, rows = 4096, 256
    first, numel = before - 128 * width, before + 128 * width
    kinds = {"grad": torch.bfloat16, "exp_avg": torch.bfloat16, "weight": torch.bfloat16}
    far = {
        name: torch.empty(numel, dtype=dtype, device=device)
        for name, dtype in (kinds | {"param": torch.int16}).items()
    }
    for value in far.values():
        value[first:] = (torch.randn(numel - first, device=device) * 100).to(value.dtype)
    near = {name: value[first:].clone() for name, value in far.items()}
    scalars = StepScalars(1, device)
    groups = [{"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}]
    scalars.fill(groups, betas=(0.9, 0.95), step=2, grad_scale=0.5)
    starts = np.arange(rows, dtype=np.int64) * width
    results = []
    for backend, data, base in ((triton_gpu, far, first), (reference, near, 0)):
        table = SegmentTable(starts + base, starts + base + width)
        v, step_size, sum_sq = torch.full((3, rows), 0.5, device=device)
        inverse = torch.full((rows,), 1 / width, device=device)
        group = torch.zeros(rows, dtype=torch.int32, device=device)
        vectors = SegmentVectors(v, step_size, sum_sq, inverse, group)
        tensors = BufferTensors(data["param"], data["exp_avg"], data["weight"], data["grad"])
        backend.segment_sum_sq_(sum_sq, data["grad"], table)
        backend.update_(tensors, table, vectors, scalars)
        results.append({name: v[base:] for name, v in data.items()} | {"sum_sq": sum_sq})
    return [f"far: {text}" for text in differences(*results, SUM_RTOL)]


def worker(number: int, options: argparse.Namespace, results: Any) -> None:
    """Check cases until the time is over; put texts of failures, and at the end the count."""
    began = time.monotonic()
    device = measure.device(options.device)
    if device.type == "cpu":  # MKL's square roots are not always correctly rounded
        torch.Tensor.sqrt = lambda value: torch.from_numpy(  # type: ignore[assignment]
            np.sqrt(value.reshape(-1).numpy())
        ).view_as(value)
    from megatron_adam_mini.kernels import triton_gpu

    rng = random.Random(options.seed + number)
    shared = random.Random(options.seed)
    order = shared.sample(DTYPES, len(DTYPES))[number :: options.workers]
    largest = 4_000 if options.small else 4_000_000
    inputs: dict[str, Any] = {
        "rng": rng, "device": device, "triton_gpu": triton_gpu, "largest": largest,
    }  # fmt: skip

    def put(label: str, texts: list[str]) -> None:
        for text in texts:
            results.put(("failure", f"seed {options.seed + number}, {label}: {text}"))

    def guarded(label: str, call: Callable[[], list[str]]) -> None:
        try:
            put(label, call())
        except Exception as error:
            put(label, [f"{type(error).__name__}: {error}"])

    def one(dtypes: Any) -> list[str]:
        case = Case(
            rng, device, dtypes, largest=largest,
            grad_scale=rng.choice((0.25, 1.0, 3.7)), bad_grad=rng.random() < 0.1,
        )  # fmt: skip
        return check(case, triton_gpu)

    guarded("not finite", lambda: check_nothing_written(**inputs))
    guarded("norm", lambda: check_norm(**inputs))
    guarded("decision", lambda: check_decide(**inputs))
    guarded("ordered sums", lambda: check_ordered_sums(**inputs))
    count = 0
    while time.monotonic() - began < options.seconds and count < options.rounds:
        dtypes = order[count] if count < len(order) else rng.choice(DTYPES)
        guarded(f"round {count} {dtypes}", lambda chosen=dtypes: one(chosen))
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    results.put(("done", {"worker": number, "cases": count, "of_dtypes": min(count, len(order))}))


def main() -> int:
    """Run the workers, and collect what they find; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each worker")
    parser.add_argument("--rounds", type=int, default=10**9, help="at most, for each worker")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--small", action="store_true", help="few elements, for sanitizers")
    parser.add_argument("--segments-beyond-2e31", action="store_true", dest="far")
    parser.add_argument("--name", default="parity", help="of the record")
    options = parser.parse_args()
    device = measure.device(options.device)
    record = measure.Record(options.name, device, seed=options.seed, sum_rtol=SUM_RTOL)
    if options.workers == 1:  # in this process, which a sanitizer watches
        results: Any = queue.Queue()
        worker(0, options, results)
        _collect(results, record, [])
    else:
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        processes = [
            context.Process(target=worker, args=(number, options, results), daemon=True)
            for number in range(options.workers)
        ]
        for process in processes:
            process.start()
        _collect(results, record, processes)
    if options.far:
        from megatron_adam_mini.kernels import triton_gpu

        with record.guard("segments beyond 2**31"):
            texts = check_far(device, triton_gpu, before=2**31 if device.type == "cuda" else 2**20)
            for text in texts:
                record.fail(text)
            record.add(worker="segments beyond 2**31", cases=1)
    record.note(cases=sum(row["cases"] for row in record.values["rows"]))
    return record.close()


def _collect(results: Any, record: measure.Record, processes: list[Any]) -> None:
    """Record what workers put, until all are done or have died."""
    while True:
        alive = any(process.is_alive() for process in processes)
        try:
            kind, value = results.get(timeout=0.2)
        except queue.Empty:
            if not alive:
                break
            continue
        if kind == "failure":
            record.fail(value)
        else:
            record.add(**value)
    for number, process in enumerate(processes):
        if process.exitcode:
            record.fail(f"worker {number} ended with status {process.exitcode}")


if __name__ == "__main__":
    sys.exit(main())
