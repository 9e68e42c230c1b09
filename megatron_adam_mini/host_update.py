"""The update of what is in host memory: chunk by chunk on the CPU, while the device does the rest.

Imports torch, ``plan``, ``state``, ``kernels``, and the vectors and numbers of a step. Data flow:
step sizes, gradients -> **HostUpdate** -> main parameters and m on the host, model weights on the
device.

For each chunk: gradients (and weights that are main parameters, or parts of them) are copied to the
host, the kernels of the CPU update the state there, new weights are copied back. There are two
places for chunks, so one is copied while the other is computed. Sums, norm and v of blocks stay on
the device. ``docs/offload.md`` says what crosses the bus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.config import OffloadConfig
from megatron_adam_mini.hyper_parameters import HyperParameters
from megatron_adam_mini.kernels import (
    BufferTensors,
    SegmentVectors,
    StepScalars,
    select_backend,
)
from megatron_adam_mini.plan.chunks import Chunk, Parts, plan_chunks
from megatron_adam_mini.plan.shares import Share
from megatron_adam_mini.plan.step_plan import StepPlan
from megatron_adam_mini.state import HOST, Buffer, BufferState, RankState
from megatron_adam_mini.step_vectors import StepVectors

#: Elements of a chunk: copying it takes a fraction of a millisecond, many times what starting does.
CHUNK_NUMEL = 2**22


@dataclass
class _Place:
    """Host memory for one chunk.

    Attributes:
        grad, weight: for each dtype, a tensor of the length of the longest chunk.
        filled, emptied: when copies to the host, and from it, are done.
    """

    grad: dict[torch.dtype, Tensor]
    weight: dict[torch.dtype, Tensor]
    filled: torch.cuda.Event
    emptied: torch.cuda.Event


class HostUpdate:
    """Updates the shares of a rank that are in host memory.

    A step calls :meth:`begin` once the step sizes of all blocks are known, then starts what the
    device has to do, then calls :meth:`finish`.

    Args:
        plan: all integers of the rank.
        shares: in host memory, by index of the buffer.
        buffers: live tensors of the plan's buffers.
        options: which memory is pinned, and whether copies overlap.
        backend: name of the device's kernels.
        vectors: of all segments of the rank.
        device: where the buffers are.
        num_groups: number of parameter groups.
    """

    def __init__(
        self,
        plan: StepPlan,
        shares: dict[int, Share],
        buffers: Sequence[Buffer],
        options: OffloadConfig,
        backend: str,
        *,
        vectors: StepVectors,
        device: torch.device,
        num_groups: int,
    ) -> None:
        # The device's kernels, if they run on a CPU, too: then all bits are as without offload.
        self._kernels = select_backend("auto" if backend == "triton" else backend, HOST)
        self._scalars = StepScalars(num_groups, HOST)
        self._buffers = buffers
        planned = plan_chunks(shares.values(), plan.pieces, CHUNK_NUMEL)
        self._chunks = planned.chunks

        on_gpu = device.type == "cuda"
        has_codes = vectors.exp_avg_scale_S2 is not None
        # Step sizes, then the scales of codes of m, and at last the factor of the gradients.
        self._num = num = len(planned.segments.source)
        self._sent = torch.zeros(
            (3 if has_codes else 1) * num + 1, dtype=torch.float32, device=device
        )
        self._received = torch.zeros(
            len(self._sent), dtype=torch.float32, device=HOST, pin_memory=on_gpu
        )
        self._source = torch.from_numpy(planned.segments.source).to(device)
        self._vectors_S = _vectors(planned.segments, vectors, self._received[:num])
        self._vectors_R = _vectors(planned.ranges, vectors, self._received[:0])
        if has_codes:
            scales = self._received[num:-1].view(num, 2)
            self._vectors_S = self._vectors_S._replace(exp_avg_scale_S2=scales)

        self._places = [
            _Place(
                self._tensors("grad", pin=options.pin_grads and on_gpu),
                self._tensors("weight", pin=options.pin_weights and on_gpu),
                _event(),
                _event(),
            )
            for _ in range(2)
        ]
        self._down = _stream() if options.overlap else None
        self._up = _stream() if options.overlap else None
        self._arrived = _event()

    def _tensors(self, name: str, *, pin: bool) -> dict[torch.dtype, Tensor]:
        numel: dict[torch.dtype, int] = {}
        for chunk in self._chunks:
            dtype = getattr(self._buffers[chunk.share.number], name).dtype
            end = chunk.windows[-1].in_state.stop
            numel[dtype] = max(numel.get(dtype, 0), end)
        return {
            dtype: torch.zeros(length, dtype=dtype, device=HOST, pin_memory=pin)
            for dtype, length in numel.items()
        }

    @property
    def staging_bytes(self) -> int:
        """Bytes of host memory that copies need."""
        places = [t for p in self._places for held in (p.grad, p.weight) for t in held.values()]
        return sum(tensor.nbytes for tensor in (*places, self._received))

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that its kernels walk, made so far."""
        return sum(table.derived_bytes for chunk in self._chunks for table in chunk.tables)

    def warm_up(self, state: RankState, *, betas: tuple[float, float]) -> None:
        """Make the tables of all chunks; modifies nothing that lasts."""
        self._scalars.fill([], betas=betas, step=1, grad_scale=math.nan)
        for chunk in self._chunks:
            self._update(chunk, self._places[0], state.on_host[chunk.share.number])

    def begin(self, state: RankState, vectors: SegmentVectors, grad_scale: Tensor) -> None:
        """Start to copy step sizes, and the first gradients; does not wait for the device.

        Args:
            state: of the rank.
            vectors: of all segments of the rank, after ``segment_step_size_``.
            grad_scale: float32, on the device.
        """
        num, source = self._num, self._source
        torch.index_select(vectors.step_size_S, 0, source, out=self._sent[:num])
        if vectors.exp_avg_scale_S2 is not None:
            scales = self._sent[num:-1].view(num, 2)
            torch.index_select(vectors.exp_avg_scale_S2, 0, source, out=scales)
        self._sent[-1:].copy_(grad_scale)
        if self._down is not None:
            self._down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._down):
            self._received.copy_(self._sent, non_blocking=True)
            self._arrived.record()
        self._fill(0, state)

    def finish(self, state: RankState, hyper: HyperParameters) -> None:
        """Update everything on the host; waits for step sizes and gradients, not for the device.

        What the device does next, such as gathering weights, waits for the new ones.

        Args:
            state: of the rank, modified in place.
            hyper: of this step.
        """
        self._arrived.synchronize()
        grad_scale = float(self._received[-1])
        if not math.isfinite(grad_scale):
            self._places[0].filled.synchronize()  # the caller may free the gradients now
            return
        hyper.write(self._scalars, grad_scale)
        self._scalars.send()
        for number, chunk in enumerate(self._chunks):
            if number + 1 < len(self._chunks):
                self._fill(number + 1, state)
            place = self._places[number % 2]
            place.filled.synchronize()
            self._update(chunk, place, state.on_host[chunk.share.number])
            self._empty(chunk, place)
        if self._up is not None:
            torch.cuda.current_stream().wait_stream(self._up)

    def _fill(self, number: int, state: RankState) -> None:
        """Start to copy a chunk to its place on the host, once that is empty."""
        chunk, place = self._chunks[number], self._places[number % 2]
        buffer = self._buffers[chunk.share.number]
        copies = [(buffer.grad, place.grad)]
        if state.on_host[chunk.share.number].param_is_weight:
            copies.append((buffer.weight.detach(), place.weight))
        with torch.cuda.stream(self._down):
            torch.cuda.current_stream().wait_event(place.emptied)
            for source, into in copies:
                for in_buffer, in_chunk in chunk.windows:
                    into[source.dtype][in_chunk].copy_(source[in_buffer], non_blocking=True)
            place.filled.record()

    def _update(self, chunk: Chunk, place: _Place, held: BufferState) -> None:
        buffer, kernels, scalars = held.buffer, self._kernels, self._scalars
        grad, weight = place.grad[buffer.grad.dtype], place.weight[buffer.weight.dtype]
        tensors = BufferTensors.of(held.param, held.exp_avg, weight, grad)
        if len(chunk.segments):
            kernels.update_(tensors, chunk.segments, self._vectors_S, scalars)
        if len(chunk.columns):
            kernels.update_columns_(tensors, chunk.columns, self._vectors_S, scalars)
        if len(chunk.ranges):
            elements = held.exp_avg_sq_E[chunk.elements]
            kernels.update_elementwise_(tensors, elements, chunk.ranges, self._vectors_R, scalars)

    def _empty(self, chunk: Chunk, place: _Place) -> None:
        """Start to copy the new weights of a chunk to the device.

        All that read the old ones is done: it came before the step sizes.
        """
        weight = self._buffers[chunk.share.number].weight.detach()
        with torch.cuda.stream(self._up):
            for in_buffer, in_chunk in chunk.windows:
                weight[in_buffer].copy_(place.weight[weight.dtype][in_chunk], non_blocking=True)
            place.emptied.record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _vectors(parts: Parts, of_rank: StepVectors, step_size: Tensor) -> SegmentVectors:
    """Return what an update reads of the entries of parts; nothing reads the other vectors."""
    origin = None
    if of_rank.origin_SR is not None:
        origin_SR = of_rank.origin_SR.cpu().numpy()
        numbers = (origin_SR[parts.source].astype(np.int64) + parts.offset) & 0xFFFFFFFF
        origin = torch.from_numpy(numbers.astype(np.uint32).view(np.int32))
    return SegmentVectors(
        exp_avg_sq_S=step_size,
        step_size_S=step_size,
        sum_sq_SR=step_size,
        inv_numel_S=step_size,
        group_SR=torch.from_numpy(of_rank.group_SR.cpu().numpy()[parts.source]),
        origin_SR=origin,
    )
