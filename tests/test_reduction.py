"""Completing cut blocks: all ranks of DP x TP in one process, against sums over whole tensors."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adam_mini import exchange
from megatron_adam_mini.collectives import OrderedSum, Reduction
from megatron_adam_mini.plan.layout import BucketLayout, Placement, segment_slice
from megatron_adam_mini.plan.reduction import ReductionPlan, plan_reduction
from tests.test_layout import Kind, kinds

#: Completed sums against float64. All terms are positive, so relative errors do not grow by
#: cancellation. Up to 3 roundings to float32 per rank (segment, contribution, completed sum) and
#: up to 8 additions in float32 in the tensor-parallel group, 2**-24 = 6e-8 each: below 7e-7.
SUM_RTOL = 1e-6


# An in-memory stand-in for torch.distributed.


class NeedsPeersError(Exception):
    """A collective was entered; its result is there when all ranks have entered it."""


@dataclass
class Group:
    """A communicator that adds in an order of its own, as real ones do."""

    size: int
    seed: int
    offered: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: int = 0

    def order(self, position: int) -> list[int]:
        """Return the order in which the ranks' values at ``position`` are added."""
        generator = np.random.default_rng([self.seed, position])
        return generator.permutation(self.size).tolist()


@dataclass(frozen=True)
class Member:
    """One rank's handle of a group."""

    group: Group
    rank: int


class Done:
    """A collective that is over."""

    def wait(self) -> None: ...


class Collectives:
    """``all_gather_into_tensor`` and ``all_reduce`` for ranks that run one after the other.

    :func:`run_phase` runs every rank twice: until it enters the collective, then with the result.
    """

    def __init__(self) -> None:
        self.replays = False

    def _exchange(self, member: Member, offered: torch.Tensor) -> list[torch.Tensor]:
        group = member.group
        if not self.replays:
            assert member.rank not in group.offered, "a rank entered two collectives in one phase"
            group.offered[member.rank] = offered.detach().clone()
            group.calls += 1
            raise NeedsPeersError
        torch.testing.assert_close(
            offered, group.offered[member.rank], rtol=0, atol=0, equal_nan=True
        )
        assert set(group.offered) == set(range(group.size)), "would hang: a rank stayed away"
        sizes = {value.numel() for value in group.offered.values()}
        assert len(sizes) == 1, f"would hang or crash: ranks disagree on sizes {sizes}"
        return [group.offered[rank] for rank in range(group.size)]

    def all_gather_into_tensor(self, output, offered, group):
        gathered = torch.cat(self._exchange(group, offered))
        assert output.shape == gathered.shape
        output.copy_(gathered)

    def all_reduce(self, tensor, op, group, async_op):
        assert async_op
        values = self._exchange(group, tensor)
        for position in range(tensor.numel()):
            total = torch.zeros((), dtype=tensor.dtype)
            for rank in group.group.order(position):
                total = total + values[rank][position]
            tensor[position] = total
        return Done()


def run_phase(
    collectives: Collectives, groups: Sequence[Group], ranks: Sequence[Callable[[], None]]
) -> None:
    """Run one phase on every rank in lock-step."""
    for group in groups:
        group.offered.clear()
    waiting = []
    collectives.replays = False
    for rank in ranks:
        try:
            rank()
        except NeedsPeersError:
            waiting.append(rank)
    collectives.replays = True
    for rank in waiting:
        rank()


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
    reductions: dict
    before: dict
    after: dict
    #: (rank, segment) by (parameter, label), see Kind.labels
    holders: dict
    expected: dict
    dp_groups: list
    tp_groups: list


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
    plans, reductions, sums, holders = {}, {}, {}, defaultdict(list)
    for replica in range(grid.replicas):
        order = range(len(grid.buckets)) if grid.order is None else grid.order[replica]
        for t in range(grid.tp):
            blocks = [kind.blocks(grid.tp, t) for kind in grid.kinds]
            buckets, flat_squares, flat_labels = [], [], []
            for members, gaps in (grid.buckets[b] for b in order):
                placements, at = [], 0
                square, label = [], []
                for member, gap in zip(members, gaps, strict=False):
                    kind = grid.kinds[member]
                    local = kind.local(squares[member], grid.tp, t).reshape(-1)
                    square += [np.full(gap, np.nan), local]
                    label += [np.full(gap, -2), kind.local(labels[member], grid.tp, t).reshape(-1)]
                    placements.append(Placement(member, at + gap, at + gap + len(local)))
                    at += gap + len(local)
                padding = -at % grid.dp
                square.append(np.full(padding, np.nan))
                label.append(np.full(padding, -2))
                buckets.append(BucketLayout(at + padding, grid.dp, tuple(placements)))
                flat_squares.append(np.concatenate(square))
                flat_labels.append(np.concatenate(label))
            for d in range(grid.dp):
                rank = (replica, d, t)
                parts = [segment_slice(bucket, blocks, d) for bucket in buckets]
                own = []
                for bucket, part, square, label in zip(
                    buckets, parts, flat_squares, flat_labels, strict=True
                ):
                    begin = d * bucket.slice_numel
                    for s in range(part.num_segments):
                        window = slice(begin + part.start_S[s], begin + part.end_S[s])
                        name = (int(part.parameter_S[s]), int(label[window][0]))
                        holders[name].append((rank, len(own)))
                        own.append(square[window].sum())
                plans[rank] = plan_reduction(
                    buckets,
                    parts,
                    blocks,
                    dp_rank=d,
                    tp_rank=t,
                    tp_size=grid.tp,
                    dp_replicas=grid.dp_replicas,
                )
                sums[rank] = torch.tensor(own, dtype=torch.float64).float()
                reductions[rank] = Reduction(
                    plans[rank],
                    len(own),
                    dp_group=Member(dp_groups[replica, t], d),
                    tp_group=Member(tp_groups[replica, d], t),
                    device=torch.device("cpu"),
                )
    before = {rank: value.clone() for rank, value in sums.items()}
    outcome = Outcome(
        plans,
        reductions,
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
    """Complete one vector of sums per rank (modified in place)."""
    in_memory = Collectives()
    original, exchange.distributed = exchange.distributed, in_memory
    try:
        run_phase(
            in_memory,
            outcome.dp_groups,
            [lambda k=k: outcome.reductions[k].complete_over_dp_(sums[k]) for k in sums],
        )
        run_phase(
            in_memory,
            outcome.tp_groups,
            [lambda k=k: complete_over_tp_(outcome.reductions[k], sums[k]) for k in sums],
        )
    finally:
        exchange.distributed = original


def complete_over_tp_(reduction: Reduction, sums: torch.Tensor) -> None:
    reduction.start_tp(sums)
    reduction.finish_tp_(sums)


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
            sizes = {outcome.plans[replica, d, t].num_contributions for d in range(grid.dp)}
            gathers = {outcome.plans[replica, d, t].gathers for d in range(grid.dp)}
            assert len(sizes) == len(gathers) == 1
        for d in range(grid.dp):
            assert len({outcome.plans[replica, d, t].tp_numel for t in range(grid.tp)}) == 1
    for rank, plan in outcome.plans.items():
        found = outcome.reductions[rank].collectives
        assert [group for group, _ in found] == ["dp"] * plan.gathers + ["tp"] * (plan.tp_numel > 0)
    # At most one collective per group and step.
    assert all(group.calls in (0, group.size) for group in outcome.dp_groups + outcome.tp_groups)


def run(grid: Grid, seed: int = 0) -> Outcome:
    """Check a grid with whole numbers (exact in float32) and with rounding."""
    check(grid, simulate(grid, seed, whole_numbers=True), exact=True)
    outcome = simulate(grid, seed)
    check(grid, outcome)
    return outcome


def one_bucket(kinds: Sequence[Kind], gaps: Sequence[int] | None = None) -> list:
    return [(range(len(kinds)), gaps or [0] * len(kinds))]


# The worked example of the module's docstring, number by number.


def example_plan(dp_rank: int, tp_rank: int) -> ReductionPlan:
    kinds = [
        Kind((3, 4), "row", tp_dim=1),
        Kind((4, 2), "tensor", tp_dim=0),
        Kind((2, 6), "row"),
    ]
    buckets = [
        BucketLayout(16, 2, (Placement(0, 0, 6), Placement(1, 6, 10))),
        BucketLayout(16, 2, (Placement(2, 0, 12),), 16),
    ]
    blocks = [kind.blocks(2, tp_rank) for kind in kinds]
    return plan_reduction(
        buckets,
        [segment_slice(bucket, blocks, dp_rank) for bucket in buckets],
        blocks,
        dp_rank=dp_rank,
        tp_rank=tp_rank,
        tp_size=2,
        dp_replicas=False,
    )


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_the_worked_example(tp_rank):
    first, second = example_plan(0, tp_rank), example_plan(1, tp_rank)
    # Each rank offers front and back of bucket 1, and slot 0: its segment of Q.
    assert first.contribution.tolist() == [[-1], [5], [3]]
    assert second.contribution.tolist() == [[1], [-1], [0]]
    # R 1: the back that rank 0 offers and the front that rank 1 offers, in rank order.
    assert first.dp_target.tolist() == [5]
    assert second.dp_target.tolist() == [1]
    # The vectors of the tensor-parallel groups: rows of P, then a place for each rank's half of Q.
    assert first.tp_plain.tolist() == [0, 1, 2]
    assert second.tp_plain.tolist() == []
    assert (first.tp_numel, second.tp_numel) == (5, 2)
    for plan, segment_of_q in ((first, 3), (second, 0)):
        assert plan.gathers
        assert plan.dp_table.tolist() == [[1, 3]]
        assert plan.tp_slot_table.tolist() == [[2, 5]]  # both contributions, in rank order
        assert plan.tp_exact.tolist() == []
        assert plan.tp_target.tolist() == [segment_of_q]
        assert plan.tp_table.tolist() == [[0, 1]]  # both places, in rank order


@pytest.mark.parametrize("dp", [2, 8, 1024])
def test_tables_are_as_wide_as_chains_are_long(dp):
    """A row that two ranks share takes two additions, however many ranks there are."""
    kind = Kind((3 * dp, 4), "row")
    bucket = BucketLayout(12 * dp + dp, dp, (Placement(0, 2, 12 * dp + 2),))
    blocks = [kind.blocks(1, 0)]
    plan = plan_reduction(
        [bucket],
        [segment_slice(bucket, blocks, 1)],
        blocks,
        dp_rank=1,
        tp_rank=0,
        tp_size=1,
        dp_replicas=False,
    )
    assert len(plan.dp_target) > 0
    assert plan.dp_table.shape[1] == 2
    assert plan.contribution.shape == (2, 1)


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
    assert outcome.plans[0, 1, 0].num_contributions == 2  # head and tail of the one bucket
    assert all(group.calls == 0 for group in outcome.tp_groups)


@pytest.mark.parametrize("dp", [2, 3, 5])
def test_row_parallel_rows_that_data_parallelism_cuts(dp):
    kind = Kind((3, 22), "row", tp_dim=1)
    grid = Grid([kind], one_bucket([kind], [1]), dp, 2)
    outcome = run(grid)
    cut = [name for name, held in outcome.holders.items() if len({r[1] for r, _ in held}) > 1]
    assert cut, "the case shows nothing"
    for name in cut:
        for rank, segment in outcome.holders[name]:
            assert outcome.plans[rank].gathers
            assert segment in outcome.plans[rank].tp_exact


def test_row_parallel_rows_that_nothing_else_cuts_need_one_plain_sum():
    grid = Grid([ROW_PARALLEL], one_bucket([ROW_PARALLEL]), 3, 4)
    outcome = run(grid)
    for plan in outcome.plans.values():
        assert not plan.gathers
        assert plan.num_exact == 0
        assert plan.tp_numel == 1
    assert all(group.calls == 0 for group in outcome.dp_groups)
    assert all(group.calls == 4 for group in outcome.tp_groups)


def test_ranks_with_empty_slices_take_part():
    # 7 + 1 elements over 8 slices of which some hold no segment of a cut parameter.
    kinds = [Kind((2,), "element"), Kind((6,), "tensor"), Kind((8,), "element")]
    outcome = run(Grid(kinds, one_bucket(kinds), 4, 2))
    assert len(outcome.before[0, 3, 0]) == 0
    assert outcome.plans[0, 3, 0].gathers
    assert all(group.calls == 4 for group in outcome.dp_groups)


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_no_collective_where_nothing_is_cut(dp, tp):
    kinds = [
        Kind((8, 2), "row", tp_dim=0),  # 8 or 16 elements: slice boundaries between rows
        Kind((4, 2), "element", tp_dim=1),  # cut anywhere, but every element is a block
    ]
    outcome = run(Grid(kinds, [([0], [0]), ([1], [0])], dp, tp))
    for rank, plan in outcome.plans.items():
        assert not plan.gathers
        assert plan.num_contributions == 0
        assert plan.tp_numel == 0
        assert outcome.reductions[rank].collectives == []
        assert torch.equal(outcome.before[rank], outcome.after[rank])
    assert all(group.calls == 0 for group in outcome.dp_groups + outcome.tp_groups)


@pytest.mark.parametrize("dp_replicas", [False, True])
def test_single_process_completes_scattered_blocks_without_collectives(dp_replicas):
    value = Kind((32, 2), "head", tp_dim=0, heads=(4, 2, 2, False), value_as_block=True)
    outcome = run(Grid([value], one_bucket([value]), 1, 1, dp_replicas=dp_replicas))
    assert outcome.reductions[0, 0, 0].collectives == []


def test_bytes_are_those_of_the_vectors():
    kind = Kind((3, 10), "row", tp_dim=1)  # 15 local elements, padded to 16 and cut at 8
    outcome = run(Grid([kind], one_bucket([kind]), 2, 2))
    # 2 contributions from each of 2 ranks; one plain row per slice, and the cut row twice.
    assert outcome.reductions[0, 0, 0].collectives == [("dp", 4 * 2 * 2), ("tp", 4 * (1 + 2))]


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


# OrderedSum.


def ordered_sum(source: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(table),), float("nan"))
    OrderedSum(table.numpy(), len(source), torch.device("cpu"))(source, out=out)
    return out


def tables(rows: int, width: int, source: int) -> st.SearchStrategy:
    entry = st.integers(-1, source - 1)
    row = st.lists(entry, min_size=width, max_size=width)
    return st.lists(row, min_size=rows, max_size=rows)


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4))
def test_ordered_sum_adds_from_left_to_right(data, size, width, rows):
    numbers = st.floats(-(2.0**40), 2.0**40, width=32)
    source = data.draw(st.lists(numbers, min_size=size, max_size=size))
    table = data.draw(tables(rows, width, size))
    expected = []
    for row in table:
        total = 0.0
        for position in row:
            total += source[position] if position >= 0 else 0.0
        expected.append(total)
    source = torch.tensor(source, dtype=torch.float32)
    index = torch.tensor(table, dtype=torch.int64).reshape(rows, width)
    found = ordered_sum(source, index)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64).float())
    # More columns of zeros, on either side, change no bit.
    zeros = torch.full((rows, 2), -1)
    assert torch.equal(ordered_sum(source, torch.cat([index, zeros], dim=1)), found)
    assert torch.equal(ordered_sum(source, torch.cat([zeros, index], dim=1)), found)


def test_ordered_sum_depends_on_the_order_of_the_table_alone():
    # In float64, (2**53 + 1) + 1 loses both ones and (1 + 1) + 2**53 keeps them.
    source = torch.tensor([2.0**53, 1.0, 1.0, -(2.0**53)])
    table = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 3]])
    assert ordered_sum(source, table).tolist() == [0.0, 2.0]


def test_ordered_sum_of_nothing_is_zero_also_next_to_non_finite_values():
    source = torch.tensor([float("inf"), float("nan"), 3.0])
    table = torch.tensor([[-1, -1], [-1, 2], [0, 2], [1, 2]])
    found = ordered_sum(source, table)
    assert found[:2].tolist() == [0.0, 3.0]
    assert not torch.isfinite(found[2:]).any()
    assert ordered_sum(torch.empty(0), torch.full((2, 1), -1)).tolist() == [0.0, 0.0]


def test_ordered_sum_keeps_its_inputs_and_no_memory_of_earlier_ones():
    source, table = torch.rand(4), torch.tensor([[0, 3], [-1, 2]])
    copies, out = (source.clone(), table.clone()), torch.empty(2)
    total = OrderedSum(table.numpy(), 4, torch.device("cpu"))
    total(torch.full((4,), float("nan")), out=out)
    total(source, out=out)
    assert torch.equal(out, ordered_sum(source, table))
    assert torch.equal(source, copies[0])
    assert torch.equal(table, copies[1])
