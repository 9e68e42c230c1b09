"""How unlike the elements of v are within the blocks that rules could make of a parameter.

Imports numpy, torch, ``plan``, ``state`` and ``optimizer``. Data flow: v per element, as a step has
left it -> sums over rows and columns of this rank -> those of whole parameters -> SNR and spread of
every candidate -> ``mcore/noise_report``. Plain torch, one parameter at a time, in bounded memory:
it runs between steps, if at all, and a step knows nothing of it.

Heads and whole parts consist of rows, so sums over rows and columns are enough for all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.candidates import Candidates, candidates_of
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.step_plan import EXPERT, Piece
from megatron_adam_mini.state import RankState

FloatArray = NDArray[np.float64]

#: Elements that are read at once; each takes some float64 numbers.
_CHUNK = 2**20


class Noise(NamedTuple):
    """What a candidate would average away, as means over its blocks.

    Attributes:
        num_blocks: second moments that the part would keep.
        snr: ``mean(v)^2 / variance(v)`` within a block; ``None``: v is equal within every block.
        spread: ``mean(v) / exp(mean(log v))`` within a block, at least 1, without elements whose v
            is 0; ``None``: all are.
    """

    num_blocks: int
    snr: float | None
    spread: float | None


class PartNoise(NamedTuple):
    """What was measured of one part of a parameter.

    Attributes:
        name: of the parameter in the whole model.
        role: its role, ``expert_...`` for routed experts.
        part: name of the part, ``""`` if the parameter is one.
        rule: what the run's preset would make of it.
        zeros: share of elements whose v is 0, which never had a gradient.
        by_candidate: what each candidate averages away.
    """

    name: str
    role: str
    part: str
    rule: str
    zeros: float
    by_candidate: dict[str, Noise]

    @property
    def best(self) -> str | None:
        """The candidate with the highest SNR."""
        snr = {name: noise.snr for name, noise in self.by_candidate.items() if noise.snr}
        return max(snr, key=lambda name: snr[name] or 0.0) if snr else None


class _Blocks(NamedTuple):
    """Sums over each block of a candidate, whole ones: float64, one entry per block.

    Attributes:
        numel: elements.
        nonzero: elements whose v is not 0.
        total: sum of v.
        log_total: sum of ``log v`` of those that are not 0.
        deviation: sum of ``(v - mean of the block)^2``.
    """

    numel: FloatArray
    nonzero: FloatArray
    total: FloatArray
    log_total: FloatArray
    deviation: FloatArray

    def of(self, blocks: NDArray[np.bool_]) -> _Blocks:
        """Return some of the blocks."""
        return _Blocks(*(sums[blocks] for sums in self))

    def merged(self, into: IntArray) -> _Blocks:
        """Return blocks that consist of these; ``into`` numbers them, one for each of these."""
        _, number = np.unique(into, return_inverse=True)

        def add(values: FloatArray) -> FloatArray:
            return np.bincount(number, weights=values)

        numel, total = add(self.numel), add(self.total)
        between = self.total / self.numel - (total / numel)[number]
        deviation = add(self.deviation + self.numel * between**2)
        return _Blocks(numel, add(self.nonzero), total, add(self.log_total), deviation)


def average_snr(mean: FloatArray, variance: FloatArray) -> float | None:
    """Return mean^2 / variance of v, averaged over blocks.

    Blocks within which v is equal are left out; ``None``: there is no other.

    Source: Kalra et al., arXiv:2503.01843, section 3; their code leaves out the same blocks.
    """
    varies = variance > 0.0
    return float((mean[varies] ** 2 / variance[varies]).mean()) if varies.any() else None


def _average_spread(blocks: _Blocks) -> float | None:
    """Return the mean of v by its geometric mean, averaged over blocks that have one."""
    blocks = blocks.of(blocks.nonzero > 0)
    if not len(blocks.numel):
        return None
    logs = np.log(blocks.total / blocks.nonzero) - blocks.log_total / blocks.nonzero
    return float(np.exp(logs).mean())


@torch.no_grad()
def measure_noise(inner: AdamMini, state: RankState) -> list[PartNoise]:
    """Measure the parameters of this rank's part of the model that keep one v per element.

    All ranks must call it; those that share parameters get the same.

    Collectives: for each such parameter two all-reduces in its data-parallel group and, if tensor
    parallelism splits it, two in its tensor-parallel group: of 32 bytes, in sum, per row and per
    column of each part.
    """
    plan = inner.plan
    found: list[PartNoise] = []
    piece_of = {piece.parameter: piece for piece in plan.pieces}
    for number, domain in enumerate(plan.domains):
        for placement in (p for bucket in domain.buckets for p in bucket.placements):
            blocks = plan.parameters[placement.parameter]
            if blocks.pattern is None:
                piece = piece_of.get(placement.parameter)
                candidates = candidates_of(blocks.info, inner.config)
                sums = _Sums(inner, state, blocks.info, candidates, piece, domain=number)
                role = f"expert_{blocks.info.role}" if domain.name == EXPERT else blocks.info.role
                found += _parts(blocks.info.name, role, candidates, *sums.blocks())
    return found


def _parts(
    name: str, role: str, candidates: Candidates, rows: _Blocks, columns: _Blocks
) -> Iterator[PartNoise]:
    """Yield what the sums over rows, and over the columns of each part, say of the parts."""
    part_of_column = np.arange(len(columns.numel)) // candidates.num_columns
    for number, part in enumerate(candidates.parts):
        here = candidates.part_of_row == number
        own = rows.of(here)
        whole = own.merged(np.zeros(len(own.numel), dtype=np.int64))
        noise = {}
        for candidate in candidates.of_part(number):
            if candidate == "head":
                assert candidates.head_of_row is not None
                blocks = own.merged(candidates.head_of_row[here])
            else:
                columns_of_part = columns.of(part_of_column == number)
                blocks = {"row": own, "column": columns_of_part, "tensor": whole}[candidate]
            snr = average_snr(blocks.total / blocks.numel, blocks.deviation / blocks.numel)
            noise[candidate] = Noise(len(blocks.numel), snr, _average_spread(blocks))
        zeros = 1.0 - float(whole.nonzero[0] / whole.numel[0])
        yield PartNoise(name, role, part, candidates.rules[number], zeros, noise)


class _Sums:
    """Sums over the rows of one parameter, and over the columns of each of its parts.

    Args:
        inner: the optimizer.
        state: its state.
        info: the parameter.
        candidates: its parts.
        piece: what this rank holds of it, if anything.
        domain: index of its domain.
    """

    def __init__(
        self,
        inner: AdamMini,
        state: RankState,
        info: ParameterInfo,
        candidates: Candidates,
        piece: Piece | None,
        *,
        domain: int,
    ) -> None:
        self._inner, self._info, self._piece, self._domain = inner, info, piece, domain
        self._v = None if piece is None else state.v_of_elements(piece)
        self._num_rows, self._num_parts = len(candidates.part_of_row), len(candidates.parts)
        self._num_columns = candidates.num_columns
        self._part_of_row = torch.from_numpy(candidates.part_of_row)
        self._first_column = info.part_of_rows[1] * info.row_numel

    def blocks(self) -> tuple[_Blocks, _Blocks]:
        """Return the sums over rows and over columns, complete."""
        totals = self._complete(self._totals(), 3)
        in_part = np.bincount(self._part_of_row.numpy(), minlength=self._num_parts)
        numel = np.concatenate(
            [
                np.full(self._num_rows, float(self._num_columns)),
                np.repeat(in_part.astype(np.float64), self._num_columns),
            ]
        )
        # Not from sums of squares, which cancel: v that is equal must have no deviation at all.
        (deviation,) = self._complete(self._deviations(torch.from_numpy(totals[1] / numel)), 1)
        nonzero, total, log_total = totals
        every = _Blocks(numel, nonzero, total, log_total, deviation)
        is_row = np.arange(len(numel)) < self._num_rows
        return every.of(is_row), every.of(~is_row)

    def _complete(self, chunks: Iterator[tuple[slice, Tensor, Tensor]], kinds: int) -> FloatArray:
        """Add up numbers of elements over rows and columns, on all ranks that hold some.

        Args:
            chunks: rows, numbers as :meth:`_chunks` has v, ``(kinds, rows, columns)``, first those
                to add over rows, then those to add over columns.
            kinds: how many numbers each element has.

        Returns:
            ``(kinds, rows + parts * columns)``.
        """
        numel = self._num_rows + self._num_parts * self._num_columns
        device = self._inner.device
        sums = torch.zeros(kinds, numel, dtype=torch.float64, device=device)
        of_rows = sums[:, : self._num_rows]
        of_columns = sums[:, self._num_rows :].view(kinds, self._num_parts, self._num_columns)
        here = slice(self._first_column, self._first_column + self._info.row_numel)
        for rows, over_rows, over_columns in chunks:
            of_rows[:, rows] += over_rows.sum(dim=2).to(device)
            parts = torch.arange(self._num_parts)[:, None]
            in_part = (self._part_of_row[rows] == parts).to(over_columns)
            of_columns[:, :, here] += (in_part @ over_columns).to(device)
        self._inner.collectives.add_over_shards_(
            sums, self._domain, over_tp=self._info.tp_dim is not None
        )
        return sums.cpu().numpy()

    def _totals(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows, and of their elements whether v is not 0, v and its logarithm, twice."""
        for rows, v, _ in self._chunks():
            nonzero = v > 0.0
            logs = torch.where(nonzero, v, 1.0).log()
            numbers = torch.stack([nonzero.to(v), v, logs])
            yield rows, numbers, numbers

    def _deviations(self, mean: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows, and squares of what separates v from the mean of its row, of its column.

        Args:
            mean: of v in each row, then in each column of each part, float64.
        """
        here = slice(self._first_column, self._first_column + self._info.row_numel)
        of_columns = mean[self._num_rows :].view(self._num_parts, self._num_columns)[:, here]
        for rows, v, held in self._chunks():
            of_row = mean[rows].to(v.device)[:, None]
            of_column = of_columns[self._part_of_row[rows]].to(v.device)
            yield (
                rows,
                torch.where(held, v - of_row, 0.0).square()[None],
                torch.where(held, v - of_column, 0.0).square()[None],
            )

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows of the whole parameter, v of what this rank holds of them, and what it holds.

        Both have the shape ``(rows, columns of this rank)``; v is float64, and 0 elsewhere.
        """
        if self._piece is None or self._v is None:
            return
        begin, end, width = self._piece.begin, self._piece.end, self._info.row_numel
        step = max(_CHUNK // width, 1)
        for first in range(begin // width, -(-end // width), step):
            last = min(first + step, -(-end // width))
            low, high = max(begin, first * width), min(end, last * width)
            v = self._v[low - begin : high - begin].double()
            missing = low - first * width, last * width - high
            held = pad(torch.ones_like(v, dtype=torch.bool), missing).view(-1, width)
            offset = self._info.row_offset
            yield slice(offset + first, offset + last), pad(v, missing).view(-1, width), held
