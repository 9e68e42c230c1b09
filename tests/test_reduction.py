"""Completing cut blocks: all ranks of DP x TP in one process, against sums over whole tensors."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.large_layouts import parallel_of
from benchmarks.launches import rank_plan
from megatron_adam_mini import exchange
from megatron_adam_mini.collectives import Collectives, DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.models import MODELS
from megatron_adam_mini.kernels import select_backend
from megatron_adam_mini.plan.cut_blocks import spread_elements
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.reduction import ReductionPlan
from megatron_adam_mini.plan.step_plan import DomainLayout, StepPlan, plan_step
from tests.test_layout import Kind, kinds

#: Completed sums against float64. All terms are positive, so relative errors do not grow by
#: cancellation. Up to 3 roundings to float32 per rank (segment, part, completed sum) and up to 8
#: additions in float32 in the tensor-parallel group, 2**-24 = 6e-8 each: below 7e-7.
SUM_RTOL = 1e-6

CPU = torch.device("cpu")
KERNELS = select_backend("auto", CPU)


# An in-memory stand-in for torch.distributed.


class NeedsPeersError(Exception):
    """A collective was entered; its result is there when all ranks have entered it."""


@dataclass
class Group:
    """A communicator that adds in an order of its own, as real ones do.

    Attributes:
        offered: for each of its collectives, what the ranks brought.
        results: of those that all ranks have entered.
    """

    size: int
    seed: int
    offered: list[dict[int, torch.Tensor]] = field(default_factory=list)
    results: dict[int, torch.Tensor] = field(default_factory=dict)

    def result(self, number: int) -> torch.Tensor:
        """Return the sum of what all ranks brought, each number added in another order."""
        if number not in self.results:
            found = self.offered[number]
            sizes = {value.numel() for value in found.values()}
            assert len(sizes) == 1, f"would hang or crash: ranks disagree on sizes {sizes}"
            values = torch.stack([found[rank] for rank in range(self.size)])
            keys = np.random.default_rng([self.seed, number]).random(values.shape)
            total = torch.zeros_like(values[0])
            for ranks in torch.from_numpy(keys.argsort(axis=0)):
                total = total + values.gather(0, ranks[None])[0]
            self.results[number] = total
        return self.results[number]


@dataclass
class Member:
    """One rank's handle of a group, and how many collectives it has entered in this attempt."""

    group: Group
    rank: int
    entered: int = 0


class Done:
    """A collective that is over."""

    def wait(self) -> None: ...


def all_reduce(tensor: torch.Tensor, op: Any, group: Member, async_op: bool) -> Done:
    """Enter an all-reduce, which an earlier attempt of the rank may have entered before."""
    of_group, number = group.group, group.entered
    group.entered += 1
    if number == len(of_group.offered):
        of_group.offered.append({})
    offered = of_group.offered[number]
    before = offered.setdefault(group.rank, tensor.clone())
    torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
    if len(offered) < of_group.size:
        raise NeedsPeersError
    tensor.copy_(of_group.result(number))
    return Done()


# A grid of ranks with whole tensors behind it.


@dataclass(frozen=True)
class Grid:
    """``replicas`` copies of a DP x TP grid that hold the same parameters.

    Attributes:
        buckets: for each bucket the parameters in it and the gaps around them.
        order: for each replica the order of its buckets (default: as listed).
    """

    kinds: Sequence[Kind]
    buckets: Sequence[tuple[Sequence[int], Sequence[int]]]
    dp: int
    tp: int
    replicas: int = 1
    dp_replicas: bool = False
    order: Sequence[Sequence[int]] | None = None


@dataclass
class Outcome:
    """Everything that the ranks hold, by rank ``(replica, dp, tp)``."""

    plans: dict
    ranks: dict
    members: list
    before: dict
    after: dict
    #: (rank, segment) by (parameter, label), see Kind.labels
    holders: dict
    expected: dict
    dp_groups: list
    tp_groups: list

    def of(self, replica: int, dp: int, tp: int) -> ReductionPlan:
        """Return what a rank plans for its one domain."""
        return self.plans[replica, dp, tp].reductions[0]


def simulate(grid: Grid, seed: int = 0, whole_numbers: bool = False) -> Outcome:
    """Complete the sums of all ranks, and sum over labels of whole tensors in float64."""
    generator = np.random.default_rng(seed)
    squares, labels, expected = [], [], {}
    for index, kind in enumerate(grid.kinds):
        if whole_numbers:
            values = generator.integers(1, 9, size=kind.shape).astype(np.float64)
        else:
            values = generator.standard_normal(kind.shape) ** 2 + 1e-3
        squares.append(values)
        labels.append(kind.labels())
        for name in np.unique(labels[-1]):
            if name >= 0:
                expected[index, int(name)] = values[labels[-1] == name].sum()

    dp_groups = {
        (r, t): Group(grid.dp, seed + 100 * r + t)
        for r in range(grid.replicas)
        for t in range(grid.tp)
    }
    tp_groups = {
        (r, d): Group(grid.tp, seed + 5000 + 100 * r + d)
        for r in range(grid.replicas)
        for d in range(grid.dp)
    }
    plans, ranks, members, sums, holders = {}, {}, [], {}, defaultdict(list)
    for replica in range(grid.replicas):
        order = range(len(grid.buckets)) if grid.order is None else grid.order[replica]
        for t in range(grid.tp):
            blocks = [kind.blocks(grid.tp, t) for kind in grid.kinds]
            buckets, square, label = [], [], []
            offset = 0
            for numbers, gaps in (grid.buckets[b] for b in order):
                placements, at = [], 0
                for number, gap in zip(numbers, gaps, strict=False):
                    kind = grid.kinds[number]
                    local = kind.local(squares[number], grid.tp, t).reshape(-1)
                    square += [np.full(gap, np.nan), local]
                    label += [np.full(gap, -2), kind.local(labels[number], grid.tp, t).reshape(-1)]
                    placements.append(Placement(number, at + gap, at + gap + len(local)))
                    at += gap + len(local)
                padding = -at % grid.dp
                square.append(np.full(padding, np.nan))
                label.append(np.full(padding, -2))
                buckets.append(BucketLayout(at + padding, grid.dp, tuple(placements), offset))
                offset += at + padding
            flat_square, flat_label = np.concatenate(square), np.concatenate(label)
            buffer = BufferLayout(tuple(buckets))
            for d in range(grid.dp):
                rank = (replica, d, t)
                layout = DomainLayout("dense", (buffer,), d, t, grid.tp, grid.dp_replicas)
                plan = plan_step(blocks, [layout])
                table, own = plan.buffers[0].segments, torch.zeros(plan.num_segments)
                for start, end, s in zip(table.start_S, table.end_S, table.indices, strict=True):
                    name = (int(plan.parameter_SR[s]), int(flat_label[start]))
                    holders[name].append((rank, int(s)))
                    own[s] = flat_square[start:end].sum()
                plans[rank], sums[rank] = plan, own
                group = DomainGroups(
                    Member(dp_groups[replica, t], d),  # type: ignore[arg-type]
                    Member(tp_groups[replica, d], t),  # type: ignore[arg-type]
                )
                members += [group.dp, group.tp]
                ranks[rank] = Collectives(plan, [group], KERNELS, device=CPU)
    before = {rank: value.clone() for rank, value in sums.items()}
    outcome = Outcome(
        plans,
        ranks,
        members,
        before,
        sums,
        dict(holders),
        expected,
        list(dp_groups.values()),
        list(tp_groups.values()),
    )
    complete_(sums, outcome)
    return outcome


def complete_(sums: dict, outcome: Outcome) -> None:
    """Complete one vector of sums per rank (modified in place).

    Every rank starts anew until the collectives that it meets are complete.
    """
    for group in outcome.dp_groups + outcome.tp_groups:
        group.offered, group.results = [], {}
    original = exchange.distributed
    exchange.distributed = SimpleNamespace(all_reduce=all_reduce)  # type: ignore[assignment]
    try:
        waiting = dict(outcome.ranks)
        for _ in range(3):  # up to two collectives
            for member in outcome.members:
                member.entered = 0
            for key, rank in list(waiting.items()):
                own = rank.sum_sq_SR[: len(sums[key])]
                own.copy_(sums[key])
                try:
                    rank.start_()
                    rank.finish_()
                except NeedsPeersError:
                    continue
                sums[key].copy_(own)
                del waiting[key]
        assert not waiting, "would hang: a rank stayed away"
    finally:
        exchange.distributed = original


def check(grid: Grid, outcome: Outcome, *, exact: bool = False) -> None:
    """Compare with brute force, compare bits between holders, and look at sizes."""
    assert set(outcome.holders) == set(outcome.expected)
    for name, holders in outcome.holders.items():
        values = [outcome.after[rank][segment] for rank, segment in holders]
        bits = {struct.pack("f", float(value)) for value in values}
        assert len(bits) == 1, f"block {name} differs between its holders {holders}: {values}"
        if exact:
            assert float(values[0]) == outcome.expected[name]
        else:
            assert float(values[0]) == pytest.approx(outcome.expected[name], rel=SUM_RTOL)
    for replica in range(grid.replicas):
        for t in range(grid.tp):
            assert len({outcome.of(replica, d, t).dp_numel for d in range(grid.dp)}) == 1
        for d in range(grid.dp):
            assert len({outcome.of(replica, d, t).tp_numel for t in range(grid.tp)}) == 1
    for rank, plan in outcome.plans.items():
        sizes = outcome.of(*rank).dp_numel, outcome.of(*rank).tp_numel
        found = {f"dense {g}": 4 * n for g, n in zip(("dp", "tp"), sizes, strict=True) if n}
        assert outcome.ranks[rank].per_step()["by_group"] == found
        assert plan.num_values >= max(t.num_values for t in tables_of(outcome.of(*rank)))
    for groups, numel in ((outcome.dp_groups, "dp_numel"), (outcome.tp_groups, "tp_numel")):
        for group in groups:
            assert len(group.offered) <= 1, "one collective per group and step at most"
        assert any(group.offered for group in groups) == any(
            getattr(plan.reductions[0], numel) for plan in outcome.plans.values()
        )
    # The all-reduce adds nothing but zeros to the one rank that owns a place.
    for group in outcome.dp_groups:
        for offered in group.offered:
            owners = sum((value != 0).int() for value in offered.values())
            assert owners.max() <= 1


def tables_of(plan: ReductionPlan) -> list[OrderedSums]:
    return [plan.before_dp, plan.between, plan.after_tp]


def run(grid: Grid, seed: int = 0) -> Outcome:
    """Check a grid with whole numbers (exact in float32) and with rounding."""
    check(grid, simulate(grid, seed, whole_numbers=True), exact=True)
    outcome = simulate(grid, seed)
    check(grid, outcome)
    return outcome


def one_bucket(kinds: Sequence[Kind], gaps: Sequence[int] | None = None) -> list:
    return [(range(len(kinds)), gaps or [0] * len(kinds))]


# The worked example of the module's docstring, number by number.


def example_plan(dp_rank: int, tp_rank: int) -> StepPlan:
    kinds = [
        Kind((3, 4), "row", tp_dim=1),
        Kind((4, 2), "tensor", tp_dim=0),
        Kind((2, 6), "row"),
    ]
    buckets = (
        BucketLayout(16, 2, (Placement(0, 0, 6), Placement(1, 6, 10))),
        BucketLayout(16, 2, (Placement(2, 0, 12),), 16),
    )
    blocks = [kind.blocks(2, tp_rank) for kind in kinds]
    return plan_step(
        blocks, [DomainLayout("dense", (BufferLayout(buckets),), dp_rank, tp_rank, tp_size=2)]
    )


def rows_of(table: OrderedSums, plan: ReductionPlan) -> dict[Any, list[Any]]:
    """Return sources by target: numbers of segments, or ``("dp", place)`` and ``("tp", place)``."""

    def name(position: int) -> Any:
        for group, vector in (("dp", plan.dp_vector), ("tp", plan.tp_vector)):
            if vector.start <= position < vector.stop:
                return group, position - vector.start
        return position

    sources = np.split(table.source, table.bounds[1:-1])
    found = zip(table.target.tolist(), sources, strict=True)
    return {name(target): list(map(name, row.tolist())) for target, row in found}


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_the_worked_example(tp_rank):
    first, second = (example_plan(rank, tp_rank).reductions[0] for rank in (0, 1))
    # Places of both parts of R 1, and of both parts of Q, in rank order.
    places = [("dp", place) for place in range(4)]
    for plan, own in ((first, [[5], [], [3], []]), (second, [[], [1], [], [0]])):
        assert plan.dp_numel == 4
        assert rows_of(plan.before_dp, plan) == dict(zip(places, own, strict=True))
    # R 1 is complete; the tensor-parallel group gets rows of P, then a place for each half of Q.
    half, other = sorted((("tp", 3 + rank) for rank in (0, 1)), key=lambda p: p[1] != 3 + tp_rank)
    assert rows_of(first.between, first) == {
        5: places[:2],
        ("tp", 0): [0],
        ("tp", 1): [1],
        ("tp", 2): [2],
        half: places[2:],
        other: [],
    }
    assert rows_of(second.between, second) == {
        1: places[:2],
        ("tp", tp_rank): places[2:],
        ("tp", 1 - tp_rank): [],
    }
    assert (first.tp_numel, second.tp_numel) == (5, 2)
    assert rows_of(first.after_tp, first) == {
        **{row: [("tp", row)] for row in range(3)},
        3: [("tp", 3), ("tp", 4)],
    }
    assert rows_of(second.after_tp, second) == {0: [("tp", 0), ("tp", 1)]}
    assert first.completed.tolist() == [0, 1, 2, 3, 5]
    assert second.completed.tolist() == [0, 1]


@pytest.mark.parametrize("dp", [2, 8, 1024])
def test_chains_are_as_long_as_slices_have_parts(dp):
    """A row that two ranks share takes two additions, however many ranks there are."""
    kind = Kind((3 * dp, 4), "row")
    bucket = BucketLayout(12 * dp + dp, dp, (Placement(0, 2, 12 * dp + 2),))
    layout = DomainLayout("dense", (BufferLayout((bucket,)),), dp_rank=1)
    (plan,) = plan_step([kind.blocks(1, 0)], [layout]).reductions
    assert len(plan.between) > 0
    assert set(plan.between.counts.tolist()) == {2}
    assert plan.dp_numel <= 2 * (dp - 1)
    assert plan.before_dp.counts.sum() <= 2


def test_a_thousand_ranks():
    """Rows, a norm over three slices, and Value as one block with a part on most slices."""
    value = Kind((2048, 4), "head", heads=(64, 2, 8, False), value_as_block=True)
    kinds = [Kind((1024, 3), "row"), Kind((40,), "tensor"), value, Kind((301, 5), "row")]
    grid = Grid(kinds, [([0, 1], [1, 0]), ([2, 3], [0, 3])], 1024, 1)
    outcome = simulate(grid)
    check(grid, outcome)
    assert outcome.of(0, 0, 0).dp_numel <= 3 * grid.dp
    (name,) = value.spread_labels(1)
    assert len(outcome.holders[2, name]) > 200


# Hypothesis.


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    dp, tp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3, 4]))
    members = draw(st.lists(kinds(tp), min_size=1, max_size=4))
    cut = draw(st.integers(0, len(members)))
    gap = draw(st.integers(0, 3))
    halves = [range(cut), range(cut, len(members))]
    replicas = draw(st.sampled_from([1, 1, 2]))
    return Grid(
        members,
        [(half, [gap] * len(half)) for half in halves if len(half)],
        dp,
        tp,
        replicas=replicas,
        dp_replicas=replicas > 1 or draw(st.booleans()),
    )


@settings(max_examples=120, deadline=None)
@given(grids(), st.integers(0, 2**16))
def test_any_grid(grid, seed):
    run(grid, seed)


# Named cases.

NORM = Kind((7,), "tensor")
ROW_PARALLEL = Kind((3, 16), "row", tp_dim=1)
#: Query groups, Query heads per group, head size.
HEADS_MQA = Kind((48, 2), "head", tp_dim=0, heads=(1, 1, 16, False))
HEADS_TWO = Kind((48, 2), "head", tp_dim=0, heads=(2, 1, 8, False))


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "tp"),
    [
        (Kind((12, 3), "head", tp_dim=0, heads=(1, 1, 4, False)), 4),
        (Kind((24, 2), "head", tp_dim=0, heads=(1, 4, 4, False)), 4),
        (Kind((48, 1), "head", tp_dim=0, heads=(2, 4, 4, False)), 8),
        (HEADS_TWO, 8),
        (HEADS_MQA, 8),
        (Kind((40, 1), "head", tp_dim=0, heads=(1, 4, 4, True)), 4),
    ],
    ids=["G1-TP4", "G1-4Q-TP4", "G2-4Q-TP8", "G2-TP8", "G1-TP8", "gated-TP4"],
)
def test_heads_that_straddle_tensor_parallel_ranks(kind, tp, dp):
    grid = Grid([kind, NORM], one_bucket([kind, NORM], [1, 2]), dp, tp)
    outcome = run(grid)
    straddling = kind.spread_labels(tp)
    assert straddling, "the case shows nothing"
    for name in straddling:
        assert len({rank[2] for rank, _ in outcome.holders[0, name]}) > 1


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_value_as_one_block_is_complete_everywhere(dp, tp):
    value = Kind((32, 2), "head", tp_dim=0, heads=(4, 2, 2, False), value_as_block=True)
    outcome = run(Grid([value], one_bucket([value]), dp, tp))
    name = max(outcome.holders, key=lambda name: len(outcome.holders[name]))
    assert len(outcome.holders[name]) >= 4, "Value is not scattered"


def test_norm_that_spans_three_slices():
    long = Kind((15,), "tensor")
    grid = Grid([Kind((1, 1), "row"), long, Kind((1, 1), "row")], one_bucket([0, 1, 2]), 3, 2)
    outcome = run(grid)
    assert {rank[1] for rank, _ in outcome.holders[1, 0]} == {0, 1, 2}
    assert outcome.of(0, 1, 0).dp_numel == 3
    assert not any(group.offered for group in outcome.tp_groups)


@pytest.mark.parametrize("dp", [2, 3, 5])
def test_row_parallel_rows_that_data_parallelism_cuts(dp):
    kind = Kind((3, 22), "row", tp_dim=1)
    grid = Grid([kind], one_bucket([kind], [1]), dp, 2)
    outcome = run(grid)
    cut = [name for name, held in outcome.holders.items() if len({r[1] for r, _ in held}) > 1]
    assert cut, "the case shows nothing"
    for name in cut:
        for rank, segment in outcome.holders[name]:
            plan = outcome.of(*rank)
            assert plan.dp_numel
            sources = rows_of(plan.after_tp, plan)[segment]
            assert len(sources) == 2, "a plain sum, whose bits depend on the communicator"


def test_row_parallel_rows_that_nothing_else_cuts_need_one_plain_sum():
    grid = Grid([ROW_PARALLEL], one_bucket([ROW_PARALLEL]), 3, 4)
    outcome = run(grid)
    for plan in outcome.plans.values():
        assert (plan.reductions[0].dp_numel, plan.reductions[0].tp_numel) == (0, 1)
    assert all(not group.offered for group in outcome.dp_groups)
    assert all(len(group.offered) == 1 for group in outcome.tp_groups)


def test_ranks_with_empty_slices_take_part():
    # 7 + 1 elements over 8 slices of which some hold no segment of a cut parameter.
    kinds = [Kind((2,), "element"), Kind((6,), "tensor"), Kind((8,), "element")]
    outcome = run(Grid(kinds, one_bucket(kinds), 4, 2))
    assert len(outcome.before[0, 3, 0]) == 0
    assert outcome.of(0, 3, 0).dp_numel
    assert all(len(group.offered) == 1 for group in outcome.dp_groups)


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_no_collective_where_nothing_is_cut(dp, tp):
    kinds = [
        Kind((8, 2), "row", tp_dim=0),  # 8 or 16 elements: slice boundaries between rows
        Kind((4, 2), "element", tp_dim=1),  # cut anywhere, but every element is a block
    ]
    outcome = run(Grid(kinds, [([0], [0]), ([1], [0])], dp, tp))
    for rank, plan in outcome.plans.items():
        assert all(len(table) == 0 for table in tables_of(plan.reductions[0]))
        assert outcome.ranks[rank].per_step()["collectives"] == 0
        assert torch.equal(outcome.before[rank], outcome.after[rank])
    assert not any(group.offered for group in outcome.dp_groups + outcome.tp_groups)


@pytest.mark.parametrize("dp_replicas", [False, True])
def test_single_process_completes_scattered_blocks_without_collectives(dp_replicas):
    value = Kind((32, 2), "head", tp_dim=0, heads=(4, 2, 2, False), value_as_block=True)
    outcome = run(Grid([value], one_bucket([value]), 1, 1, dp_replicas=dp_replicas))
    assert outcome.ranks[0, 0, 0].per_step()["collectives"] == 0


def test_bytes_are_those_of_the_vectors():
    kind = Kind((3, 10), "row", tp_dim=1)  # 15 local elements, padded to 16 and cut at 8
    outcome = run(Grid([kind], one_bucket([kind]), 2, 2))
    # Two parts of the cut row; one plain row per slice, and the cut row twice.
    by_group = outcome.ranks[0, 0, 0].per_step()["by_group"]
    assert by_group == {"dense dp": 4 * 2, "dense tp": 4 * (1 + 2)}


@pytest.mark.parametrize(
    "kind", [ROW_PARALLEL, Kind((2, 12), "tensor", tp_dim=1), HEADS_MQA, NORM], ids=str
)
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_replicas_in_other_groups_get_the_same_bits(kind, dp):
    """Without sharding, or with several optimizer instances: same slices, other communicators."""
    for seed in range(5):
        grid = Grid([kind], one_bucket([kind]), dp, 4, replicas=3, dp_replicas=True)
        check(grid, simulate(grid, seed))


def test_the_stand_in_adds_in_different_orders():
    """Shows that the comparison of bits above can fail: a plain sum does differ by group."""
    bits = set()
    for seed in range(20):
        grid = Grid([ROW_PARALLEL], one_bucket([ROW_PARALLEL]), 1, 4, replicas=2)
        outcome = simulate(grid, seed)
        bits.add(torch.equal(outcome.after[0, 0, 0], outcome.after[1, 0, 0]))
    assert bits == {True, False}


@pytest.mark.parametrize("rule", ["row", "tensor"])
@pytest.mark.parametrize("dp", [2, 3])
def test_tied_embedding_on_two_stages_gets_the_same_bits(rule, dp):
    """Megatron gives it a bucket of its own; what else the stages hold differs."""
    kinds = [Kind((8, 7), rule, tp_dim=0), NORM, ROW_PARALLEL, HEADS_TWO]
    buckets = [([0], [0]), ([1, 2], [1, 0]), ([3], [2])]
    grid = Grid(kinds, buckets, dp, 2, replicas=2, order=[(0, 1), (2, 1, 0)])
    for seed in range(5):
        outcome = simulate(grid, seed)
        for (parameter, name), held in outcome.holders.items():
            if parameter == 0:
                assert {rank[0] for rank, _ in held} == {0, 1}
                values = {float(outcome.after[rank][segment]) for rank, segment in held}
                assert len(values) == 1, f"block {name} differs between the stages"


def test_non_finite_sums_reach_every_holder():
    kinds = [Kind((40,), "tensor"), ROW_PARALLEL]
    outcome = simulate(Grid(kinds, one_bucket(kinds), 3, 2))
    for poison in (float("inf"), float("nan")):
        sums = {rank: value.clone() for rank, value in outcome.before.items()}
        (victim, segment), *_ = outcome.holders[0, 0]
        sums[victim][segment] = poison
        complete_(sums, outcome)
        same_copy = [held for held in outcome.holders[0, 0] if held[0][2] == victim[2]]
        assert len(same_copy) > 1
        assert not any(bool(torch.isfinite(sums[rank][at])) for rank, at in same_copy)
        for name, held in outcome.holders.items():
            if name != (0, 0):
                assert all(sums[rank][at] == outcome.after[rank][at] for rank, at in held)


def test_a_second_step_starts_afresh():
    """Buffers are reused: what an earlier step left in them must not leak into the next."""
    kinds = [NORM, ROW_PARALLEL, HEADS_TWO]
    grid = Grid(kinds, one_bucket(kinds), 3, 4)
    outcome = simulate(grid)
    sums = {rank: value * 4 for rank, value in outcome.before.items()}  # exact in binary
    complete_(sums, outcome)
    for rank, value in sums.items():
        assert torch.equal(value, outcome.after[rank] * 4)


# Large plans.


@pytest.mark.parametrize("options", [{}, {"value_as_block": True}, {"preset": "tensor"}], ids=str)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("llama-3-8b", (1, 1, 4096)), ("llama-3-405b", (8, 16, 1024))],
)
def test_places_of_large_plans_are_few(name, sizes, options):
    """Two for each boundary at most, and for each slot a part of the ranks."""
    config = AdamMiniConfig(**options)
    plan = rank_plan(MODELS[name], parallel_of(name, *sizes, overlap_grad_reduce=True), config)
    (domain,), (reduction,) = plan.domains, plan.reductions
    slots = sum(
        int(((end - 1) // bucket.slice_numel - first // bucket.slice_numel + 1).sum())
        for bucket in domain.buckets
        for placement in bucket.placements
        for first, end in [
            placement.start + np.stack(spread_elements(plan.parameters[placement.parameter]))
        ]
    )
    boundaries = len(domain.buckets) * (domain.num_slices - 1)
    assert 0 < reduction.dp_numel <= 2 * boundaries + slots
    assert reduction.before_dp.counts.sum() <= plan.num_segments
    assert slots <= (2 * len(domain.buckets) * domain.num_slices if options else 0)


# Tables of sums.


def test_tables_of_sums_whose_rows_depend_on_their_order_are_refused():
    def table(target: list[int], counts: list[int], source: list[int]) -> OrderedSums:
        return OrderedSums(*(np.asarray(part, dtype=np.int64) for part in (target, counts, source)))

    for target, counts, source in (([0, 0], [1, 0], [1]), ([0, 1], [1, 1], [2, 0])):
        with pytest.raises(ValueError, match="writes a position twice, or reads what it writes"):
            table(target, counts, source)
    with pytest.raises(ValueError, match=r"1 targets, 1 counts with sum 2, and 1 sources"):
        table([0], [2], [1])
    assert (len(table([], [], [])), table([], [], []).num_values) == (0, 0)
