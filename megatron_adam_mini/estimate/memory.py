"""Buckets -> bytes that each rank allocates for weights, gradients and optimizer state.

Imports numpy, ``layout`` and the modules before it. Numbers of segments come from
``segments.slice_size``, which walks slices as the optimizer does, not from a formula.

Counted are Megatron's parameter and gradient buffers with their padding, and the tensors of the
optimizer's state. Adam's state has no padding; Adam-mini's main parameters and m mirror the slices,
at the positions of ``layout.state_starts``.
Ranks are numbered in Megatron's default order, tp-cp-ep-dp-pp.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.buckets import plan_stage, stage_blocks
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.offload import host_size
from megatron_adam_mini.estimate.parallel import Parallel, stage_layers
from megatron_adam_mini.estimate.stages import stage_parameters
from megatron_adam_mini.plan.layout import BufferLayout, state_starts
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks, unmatched_patterns
from megatron_adam_mini.plan.segments import slice_size

KINDS = ("weights", "gradients", "main_param", "exp_avg", "exp_avg_sq")
#: The same in host memory, as ``state_bytes()`` of the optimizer names it.
HOST_KINDS = ("host_main_param", "host_exp_avg", "host_exp_avg_sq")
#: Launch tables of the GPU kernels: at most so many bytes per parameter that a rank updates, in
#: every layout that was looked at; they depend on runs of equal rows, which nobody counts here.
LAUNCH_TABLE_BYTES = 0.025
_WEIGHT_BYTES = 2  # bf16 or fp16; FP8: one less
_FLOAT32 = 4


@dataclass(frozen=True)
class StateFormat:
    """Bytes per number of an optimizer's state.

    Attributes:
        label: name in the report.
        main_param: bytes of the main parameter; 2 for 16-bit remainders.
        exp_avg: bytes of m.
        exp_avg_sq: bytes of v.
        blocks: whether v is one number per block, and the rest mirrors slices with their padding.
    """

    label: str
    main_param: int
    exp_avg: int
    exp_avg_sq: int
    blocks: bool


#: All that are compared. FlashAdamW: 8 bits more of a bfloat16 weight, m and v in 8 bits; their
#: scales, 2 bytes for 32 numbers each, are not in its authors' 7 bytes per parameter, which count
#: weight and bfloat16 gradient.
#: Source: Gonzalez Ortiz et al., arXiv:2602.23349; for Megatron-Core: NVIDIA/Megatron-LM #4229.
FORMATS = {
    "adam": StateFormat("Adam", 4, 4, 4, False),
    "adam_precision_aware": StateFormat("Adam, bf16 m and v, 16-bit remainders", 2, 2, 2, False),
    "flash_adamw": StateFormat("FlashAdamW, by its authors' count", 1, 1, 1, False),
    "adam_mini": StateFormat("Adam-mini", 4, 4, 4, True),
    "adam_mini_remainders": StateFormat("Adam-mini, 16-bit remainders", 2, 4, 4, True),
    "adam_mini_bf16_m": StateFormat("Adam-mini, bf16 m", 4, 2, 4, True),
    "adam_mini_fp8_m": StateFormat("Adam-mini, fp8 m", 4, 1, 4, True),
    "adam_mini_remainders_bf16_m": StateFormat(
        "Adam-mini, lean: remainders, bf16 m", 2, 2, 4, True
    ),
    "adam_mini_remainders_fp8_m": StateFormat("Adam-mini, remainders, fp8 m", 2, 1, 4, True),
}


def formats_of(parallel: Parallel) -> dict[str, StateFormat]:
    """Return the formats that a run can have: FP8 weights leave nothing for remainders to add."""
    return {
        name: form
        for name, form in FORMATS.items()
        if form.main_param == _FLOAT32 or not parallel.fp8_param_gather
    }


#: Largest data-parallel size that is tried.
MAX_SHARING = 2**16


@dataclass(frozen=True)
class StageMemory:
    """What the ranks of one pipeline stage allocate.

    Attributes:
        num_parameters: elements of the parameters of one rank.
        buffer_numel: elements of its buffers, padding included.
        quantized_numel: of these, elements of buffers with FP8 weights.
        gradient_bytes: bytes of one gradient.
        elements: elements of parameters in its slices, by rank of the stage.
        second_moments: Adam-mini's numbers of v, by rank of the stage.
        state_numel: elements of Adam-mini's m, padding included, by rank of the stage.
        host_numel, host_second_moments: what of ``state_numel`` and ``second_moments`` lies in host
            memory.
    """

    num_parameters: int
    buffer_numel: int
    quantized_numel: int
    gradient_bytes: int
    elements: IntArray
    second_moments: IntArray
    state_numel: IntArray
    host_numel: IntArray
    host_second_moments: IntArray

    def bytes_of(self, form: StateFormat) -> dict[str, IntArray]:
        """Return bytes by kind, see :data:`KINDS` and :data:`HOST_KINDS`, and rank of the stage."""
        on_host = self.host_numel if form.blocks else np.zeros_like(self.elements)
        v_on_host = self.host_second_moments if form.blocks else on_host
        mirrored = self.state_numel - on_host if form.blocks else self.elements
        second_moments = self.second_moments - v_on_host if form.blocks else self.elements
        return {
            "weights": np.full_like(
                self.elements, _WEIGHT_BYTES * self.buffer_numel - self.quantized_numel
            ),
            "gradients": np.full_like(self.elements, self.gradient_bytes * self.buffer_numel),
            "main_param": form.main_param * mirrored,
            "exp_avg": form.exp_avg * mirrored,
            "exp_avg_sq": form.exp_avg_sq * second_moments,
            "host_main_param": form.main_param * on_host,
            "host_exp_avg": form.exp_avg * on_host,
            "host_exp_avg_sq": form.exp_avg_sq * v_on_host,
        }

    def total_of(self, form: StateFormat) -> IntArray:
        """Return all bytes on the device by rank of the stage."""
        kinds = self.bytes_of(form)
        return np.sum([kinds[kind] for kind in KINDS], axis=0, dtype=np.int64)


class Planner:
    """Memory of one model under several layouts; parameters are described once per stage.

    Raises:
        ValueError: the layout does not fit the model, or a name pattern matches nothing.
    """

    def __init__(self, model: Model, parallel: Parallel, options: AdamMiniConfig) -> None:
        self.model = model
        self.parallel = parallel
        self.options = options
        self.layers = stage_layers(parallel, model.num_layers)
        self._blocks: dict[Hashable, list[list[ParameterBlocks]]] = {}
        #: Numbers of stages and ranks by their content; see ``_number``.
        self._numbers: dict[Hashable, int] = {}
        self._number_of: dict[tuple[int, int, int], int] = {}
        names = [
            blocks.info.name
            for stage in range(parallel.pp)
            for chunk in self._stage_blocks(stage, 0, 0)
            for blocks in chunk
        ]
        missing = unmatched_patterns(names, options)
        if missing:
            raise ValueError(
                f"Name patterns {missing} match no parameter; one of them is {names[0]!r}. "
                "Correct or remove them."
            )

    def num_parameters(self) -> int:
        """Return the number of elements of the model, a tied embedding counted once."""
        alone = stage_parameters(self.model, Parallel(), pp_rank=0)
        return sum(info.numel for chunk in alone for info in chunk)

    def stages(self, parallel: Parallel, *, offload_fraction: float = 0.0) -> list[StageMemory]:
        """Return the memory of every pipeline stage.

        Args:
            parallel: may differ from the planner's own only in the number of data-parallel ranks.
            offload_fraction: of Adam-mini's state, in host memory.

        Raises:
            ValueError: a run with FP8 weights cannot keep state in host memory.
        """
        if parallel.fp8_param_gather and offload_fraction:
            raise ValueError(
                "--optimizer adam_mini does not support --optimizer-cpu-offload with "
                "--fp8-param-gather; drop one of the two."
            )
        known: dict[Hashable, IntArray] = {}
        return [
            self._stage(parallel, stage, known, offload_fraction) for stage in range(parallel.pp)
        ]

    def _stage(
        self,
        parallel: Parallel,
        stage: int,
        known: dict[Hashable, IntArray],
        offload_fraction: float,
    ) -> StageMemory:
        """Return the memory of a stage; ``known`` caches results of equal work."""
        plan = plan_stage(self.model, parallel, self._stage_blocks(stage, 0, 0), pp_rank=stage)

        def sizes(tp_rank: int, expert_tp_rank: int, expert: bool) -> IntArray:
            key = (self._number(stage, tp_rank, expert_tp_rank), stage == 0, expert)
            if key not in known:
                chunks = self._stage_blocks(stage, tp_rank, expert_tp_rank)
                own = plan_stage(self.model, parallel, chunks, pp_rank=stage)
                chosen = own.expert if expert else own.dense
                shards = parallel.expert_shards if expert else parallel.dense_shards
                known[key] = _slice_sizes(chosen, own.parameters, shards, offload_fraction)
            return known[key]

        dense = np.stack([sizes(tp, 0, False) for tp in range(parallel.tp)])
        experts = np.stack([sizes(0, etp, True) for etp in range(parallel.etp)])
        rank = np.arange(parallel.world_size // parallel.pp)
        dense_shard = rank // parallel.tp % parallel.dense_shards
        expert_shard = (
            rank // (parallel.etp * parallel.expert_model_parallel_size) % parallel.expert_shards
        )
        of_rank = (
            dense[rank % parallel.tp, dense_shard] + experts[rank % parallel.etp, expert_shard]
        )
        return StageMemory(
            num_parameters=sum(blocks.info.numel for blocks in plan.parameters),
            buffer_numel=sum(bucket.numel for bucket in plan.buckets),
            quantized_numel=plan.quantized_numel,
            gradient_bytes=2 if parallel.grad_reduce_in_bf16 else 4,
            elements=of_rank[:, 0],
            second_moments=of_rank[:, 1],
            state_numel=of_rank[:, 2],
            host_numel=of_rank[:, 3],
            host_second_moments=of_rank[:, 4],
        )

    def _stage_blocks(
        self, stage: int, tp_rank: int, expert_tp_rank: int
    ) -> list[list[ParameterBlocks]]:
        key = (stage, tp_rank, expert_tp_rank)
        if key not in self._blocks:
            self._blocks[key] = stage_blocks(
                self.model,
                self.parallel,
                self.options,
                pp_rank=stage,
                tp_rank=tp_rank,
                expert_tp_rank=expert_tp_rank,
            )
        return self._blocks[key]

    def _number(self, stage: int, tp_rank: int, expert_tp_rank: int) -> int:
        """Return a number; if equal, slices of equal buckets have equal segments."""
        place = (stage, tp_rank, expert_tp_rank)
        if place not in self._number_of:
            chunks = self._stage_blocks(*place)
            facts = tuple(
                tuple(
                    (
                        blocks.info.role,
                        blocks.info.shape,
                        blocks.info.expert,
                        blocks.pattern,
                        blocks.pattern and blocks.info.row_offset % blocks.pattern.period_rows,
                    )
                    for blocks in chunk
                )
                for chunk in chunks
            )
            self._number_of[place] = self._numbers.setdefault(facts, len(self._numbers))
        return self._number_of[place]


def _slice_sizes(
    buffers: Sequence[BufferLayout],
    parameters: Sequence[ParameterBlocks],
    num_slices: int,
    offload_fraction: float,
) -> IntArray:
    """Return the content of each rank's slices of some buffers, shape ``(slices, 5)``.

    Columns: elements of parameters, numbers of v, elements of m; elements of m and numbers of v in
    host memory.
    """
    found = np.zeros((num_slices, 5), dtype=np.int64)
    if offload_fraction > 0.0:
        found[:, 3:] = [
            host_size(buffers, parameters, rank, offload_fraction) for rank in range(num_slices)
        ]
    for buffer in buffers:
        found[:, 2] += state_starts(buffer, np.arange(num_slices))[1]
        for bucket in buffer.buckets:
            for rank in range(num_slices):
                size = slice_size(bucket, parameters, rank)
                found[rank, :2] += (size.num_elements, size.num_segments + size.num_elementwise)
    return found


def largest_rank(stages: Sequence[StageMemory], form: StateFormat) -> dict[str, Any]:
    """Return the rank that holds most on its device, and its bytes by kind and in total there.

    ``launch_tables`` is a bound on what the GPU kernels take besides.
    """
    best: dict[str, Any] = {}
    first = 0
    for number, stage in enumerate(stages):
        kinds = stage.bytes_of(form)
        totals = stage.total_of(form)
        rank = int(totals.argmax())
        if not best or int(totals[rank]) > best["total"]:
            best = {
                "stage": number,
                "rank": first + rank,
                **{kind: int(kinds[kind][rank]) for kind in (*KINDS, *HOST_KINDS)},
                "total": int(totals[rank]),
                "launch_tables": int(LAUNCH_TABLE_BYTES * stage.elements[rank] * form.blocks),
            }
        first += len(totals)
    return best


class Sharing:
    """The number of ranks that may share the state before a saving becomes too small.

    The layout is the planner's, without context parallelism and with one optimizer instance:
    d data-parallel ranks share the state of a dense parameter, and ``tp * d / (etp * ep)`` that
    of an expert. Savings are of all ranks together: which rank holds most, and whether its slices
    hold elementwise parameters, may change with d.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        parallel = planner.parallel
        unit = parallel.etp * parallel.expert_model_parallel_size
        #: Smallest number of data-parallel ranks among which the experts can be divided.
        self.step = unit // int(np.gcd(unit, parallel.tp))
        self._totals: dict[int, dict[str, int]] = {}

    def saving(self, name: str, ranks: int) -> float:
        """Return the share of Adam's bytes that a kind of state saves, over all ranks together."""
        if ranks not in self._totals:
            parallel = replace(
                self._planner.parallel,
                data_parallel_size=ranks,
                context_parallel_size=1,
                num_distributed_optimizer_instances=1,
            )
            stages = self._planner.stages(parallel)
            self._totals[ranks] = {
                key: sum(int(stage.total_of(form).sum()) for stage in stages)
                for key, form in formats_of(parallel).items()
            }
        totals = self._totals[ranks]
        return 1 - totals[name] / totals["adam"]

    def largest(self, name: str, share: float) -> int | None:
        """Return the largest number of ranks at which at least ``share`` is saved.

        The saving falls with the number of ranks (except for padding), so this is a bisection.
        ``None``: not even with the fewest; :data:`MAX_SHARING`: with that many or more.
        """
        good, bad = 0, 1
        while self.saving(name, bad * self.step) >= share:
            good, bad = bad, 2 * bad
            if bad * self.step > MAX_SHARING:
                return MAX_SHARING
        while bad - good > 1:
            middle = (good + bad) // 2
            if self.saving(name, middle * self.step) >= share:
                good = middle
            else:
                bad = middle
        return good * self.step or None
