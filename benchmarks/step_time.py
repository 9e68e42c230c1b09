"""A model of how long an optimizer's step takes on a GPU: bytes, launches, small collectives.

A model on paper, not a measurement. ``compare`` says how far it is from what was measured on one
H100; nothing of what it says about B200 or about several GPUs has been measured.

A step is a chain: pass over memory, exchange, pass over memory. Its time is the sum of

* bytes of memory / (peak bandwidth x ``COPY``);
* launches x ``LAUNCH``: what a small launch costs on the device while the host is ahead;
* all-reduces of few bytes: their latency, by the formulas and constants by which NCCL 2.28.3
  itself chooses an algorithm (src/graph/tuning.cc; Hopper, Intel host, eight GPUs in a node), and
  their bytes, which travel twice over the slowest link, with a flag beside each number, as NCCL
  sends what is small. Those over tensor parallelism are in flight while others work, and count as
  far as they are longer. Exchanges of columns are left out.

Reduce-scatter of gradients: left out on both sides. All-gather of weights: a number of its own,
the same for both sides, as where it does not overlap the forward pass.

Stock Adam is Megatron's with Transformer Engine's kernels, read in Megatron-Core 0.19.2 and
Transformer Engine 2.x and never run here: per parameter 4 bytes for the norm, 8 to clip in place,
28 in Adam (p, m, v read and written, g read), 6 to copy the main parameter to the bfloat16 weight,
in launches of at most 320 chunks of 65,536 elements, the last one parameter by parameter. It gets
the bandwidth of a copy, too, of which torch's fused pipeline reached 0.87.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.launches import Launches
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.plan.step_plan import StepPlan

#: What a copy reaches of the peak bandwidth: 3.012 of 3.35 TB/s on an H100 (results of 2026-11-28).
COPY = 0.90
#: Seconds on the device, from "Llama-2-7B, 1 of 64 ranks" in the same results: 1.140 ms, less
#: 0.924 in the two kernels that move the data, for 105 other launches.
LAUNCH = 2.1e-6
#: Seconds of the host: 0.81 ms for 27 launches there, the least of its cases.
HOST_LAUNCH = 30e-6
#: GPUs in a node.
NODE = 8

#: Bytes per parameter: read g, twice; read and write m and main parameter; write the weight.
OURS = 4 + 22
#: Norm, clip, Adam, copy to weights; see above.
STOCK = 4 + 8 + 28 + 6
#: Chunk, blocks of a launch, and tensors of a launch by number of lists: Transformer Engine's.
_CHUNK, _BLOCKS, _TENSORS = 65536, 320, {1: 110, 2: 64, 4: 36}


class Gpu(NamedTuple):
    """Peak bandwidths in bytes per second: memory; NVLink and network in one direction."""

    memory: float
    nvlink: float
    network: float


#: H100 SXM: NVIDIA's data sheet (3.35 TB/s, NVLink 900 GB/s in both directions). B200: 7,680 bits
#: at 3,996 MHz as its driver says (pytorch/ao#4002; data sheets: 8 TB/s), NVLink 1.8 TB/s. Network:
#: one ConnectX-7 of 400 Gb/s for each GPU, as in DGX systems of both.
GPUS = {"H100": Gpu(3.35e12, 450e9, 50e9), "B200": Gpu(7.67e12, 900e9, 50e9)}


@dataclass(frozen=True)
class Group:
    """Ranks of a process group, and how many of them share a node."""

    ranks: int
    per_node: int = 1

    @classmethod
    def of(cls, ranks: int, stride: int) -> Group:
        """Return the group whose members are ``stride`` ranks apart."""
        return cls(ranks, max(1, min(ranks, NODE // stride)))

    @property
    def nodes(self) -> int:
        """Nodes with ranks of the group."""
        return -(-self.ranks // self.per_node)

    def all_reduce(self, num_bytes: float = 0.0, gpu: Gpu | None = None) -> float:
        """Return the seconds of a small all-reduce, tree or ring; without ``gpu``, its latency."""
        if self.ranks == 1:
            return 0.0
        tree = 6.8 + 2 * ((self.per_node - 1) * 0.6 + int(math.log2(self.nodes)) * 5.0)
        latency = 1e-6 * min(tree, 6.6 + 2 * self._ring_steps())
        if gpu is None:
            return latency
        return latency + 2 * 2 * num_bytes / (gpu.nvlink if self.nodes == 1 else gpu.network)

    def _ring_steps(self) -> float:
        """Return microseconds of one round: within nodes, and between them."""
        inter = self.nodes if self.nodes > 1 else 1
        within, between = (1.0, 5.0 if self.per_node == 1 else 2.7) if self.nodes > 1 else (0.6, 0)
        return (self.ranks - inter) * within + (inter - 1) * between

    def gather_weights(self, num_bytes: float, gpu: Gpu) -> float:
        """Return the seconds of an all-gather of many bytes at the rate of the slowest link."""
        link = gpu.nvlink if self.nodes == 1 else min(gpu.nvlink, self.per_node * gpu.network)
        return num_bytes * (self.ranks - 1) / self.ranks / link


class Parts(NamedTuple):
    """Seconds of the parts of a step, one after the other."""

    memory: float
    launches: float
    exchange: float
    norm: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class Rank(NamedTuple):
    """What the time of a rank's step depends on.

    Attributes:
        elements: that the rank updates.
        ours, stock: bytes of memory that the step moves.
        stock_launches: of stock Adam.
        launches: ours.
        dp, tp: groups of our all-reduces with their bytes; only those that the plan needs.
        norm: group of the norm.
        weights: bytes of bfloat16 weights that are gathered in each group.
    """

    elements: int
    ours: float
    stock: float
    launches: Launches
    stock_launches: int
    dp: Sequence[tuple[Group, float]]
    tp: Sequence[tuple[Group, float]]
    norm: Group
    weights: Sequence[tuple[Group, float]]

    def our_path(self, gpu: Gpu) -> Parts:
        """Return the parts of Adam-mini's step."""
        norm = self.norm.all_reduce()
        update = 22 / OURS * _moved(self.ours, gpu)
        over_dp, over_tp = (
            sum(group.all_reduce(size, gpu) for group, size in sizes)
            for sizes in (self.dp, self.tp)
        )
        return Parts(
            _moved(self.ours, gpu),
            LAUNCH * (self.launches.triton + self.launches.torch),
            over_dp + max(0.0, over_tp - norm - update),
            norm,
        )

    def stock_path(self, gpu: Gpu) -> Parts:
        """Return the parts of stock Adam's step."""
        launches = LAUNCH * self.stock_launches
        return Parts(_moved(self.stock, gpu), launches, 0.0, self.norm.all_reduce())

    def gather(self, gpu: Gpu) -> float:
        """Return the seconds of the gather of weights, on both sides."""
        return sum(group.gather_weights(size, gpu) for group, size in self.weights)

    @property
    def host(self) -> float:
        """Seconds that the host takes to launch Adam-mini's step."""
        return HOST_LAUNCH * self.launches.total


def _moved(num_bytes: float, gpu: Gpu) -> float:
    return num_bytes / (COPY * gpu.memory)


def rank_of(plan: StepPlan, parallel: Parallel, launches: Launches) -> Rank:
    """Return what the time of a planned rank depends on."""
    sizes = [piece.window.numel for piece in plan.pieces]
    is_vector = [len(plan.parameters[piece.parameter].info.shape) == 1 for piece in plan.pieces]
    elements = sum(sizes)
    dense = Group.of(parallel.dense_shards, parallel.tp)
    expert = Group.of(parallel.expert_shards, parallel.etp * parallel.expert_model_parallel_size)
    groups = [dense, expert][: len(plan.domains)]
    tp = [Group.of(parallel.tp, 1), Group.of(parallel.etp, 1)]
    return Rank(
        elements=elements,
        ours=OURS * elements + 8 * plan.num_elementwise,
        stock=STOCK * elements,
        launches=launches,
        stock_launches=stock_launches(sizes, is_vector),
        dp=[(groups[i], 4.0 * r.dp_numel) for i, r in enumerate(plan.reductions) if r.dp_numel],
        tp=[(tp[i], 4.0 * r.tp_numel) for i, r in enumerate(plan.reductions) if r.tp_numel],
        norm=Group.of(parallel.world_size, 1),
        weights=[
            (
                group,
                2.0 * sum(b.numel for layout in domain.buffers for b in layout.buckets),
            )
            for group, domain in zip(groups, plan.domains, strict=True)
        ],
    )


def stock_launches(sizes: Sequence[int], is_vector: Sequence[bool]) -> int:
    """Return the launches of stock Adam for shards of these sizes; vectors are not decayed."""
    groups = [
        [s for s, v in zip(sizes, is_vector, strict=True) if v == chosen]
        for chosen in (False, True)
    ]
    # Parts of the norm are added up by one more kernel; root, factor of the clipping: seven.
    norm = multi_tensor_launches(sizes, 1) + 1 + 7
    adam = sum(multi_tensor_launches(group, 4) for group in groups)
    return norm + multi_tensor_launches(sizes, 2) + adam + len(sizes)


def multi_tensor_launches(sizes: Iterable[int], lists: int) -> int:
    """Return the launches of one multi-tensor call over tensors of these sizes.

    A launch is full with 320 chunks, or with so many tensors, of which the last one is complete.
    """
    launches = blocks = tensors = 0
    for size in sizes:
        tensors += 1
        chunks = -(-size // _CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            complete = chunk == chunks
            if blocks == _BLOCKS or (complete and tensors == _TENSORS[lists]):
                launches, blocks, tensors = launches + 1, 0, int(not complete)
    return launches + (blocks > 0)


class Compared(NamedTuple):
    """A measured time, and the model's."""

    case: str
    measured: float
    model: float

    @property
    def error(self) -> float:
        """What the model says too much, as a part of what was measured."""
        return self.model / self.measured - 1


def compare(results: Path) -> list[Compared]:
    """Compare the model with the table ``bench`` of a results file, in milliseconds.

    Bytes, launches and the bandwidth of a copy are those of the file. Rows without ``of_copy``,
    whose optimizers are many small launches, are left out.

    Raises:
        ValueError: the file has no such table.
    """
    text = results.read_text(encoding="utf-8")
    found = re.search(r"copy TB/s: ([\d.]+)", text)
    if found is None:
        raise ValueError(f"{results} has no bandwidth of a copy; give a results file of `bench`.")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head = next(row for row in rows if row[:2] == ["case", "elements"])
    compared = []
    for row in rows[rows.index(head) + 2 :]:
        if len(row) != len(head):
            break
        of = dict(zip(head, row, strict=True))
        if not of["of_copy"]:
            continue
        moved = float(of["bytes"]) * int(of["elements"].replace(",", "")) / float(found[1]) / 1e9
        launches = 1e3 * LAUNCH * int(of["launches"] or 0)
        compared.append(Compared(of["case"], float(of["ms"]), moved + launches))
    return compared
