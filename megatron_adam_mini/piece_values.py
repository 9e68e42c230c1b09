"""Values of the segments of a piece <-> values of its elements.

Imports torch and ``plan``. Used between steps: saves, loads, reports.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.plan.buffer_plan import PART_NUMEL
from megatron_adam_mini.plan.step_plan import ColumnRun, Piece, RowRun, StepPlan


def v_per_element(plan: StepPlan, piece: Piece, v: Tensor) -> Tensor:
    """Return v of every element of a piece, float32, from v as it is stored.

    Args:
        plan: all integers.
        piece: the piece.
        v: one value per segment of the piece, or per element if the piece keeps these.
    """
    return v if piece.is_elementwise else per_element(plan, piece, v)


def per_element(plan: StepPlan, piece: Piece, values: Tensor, part: slice | None = None) -> Tensor:
    """Return the value of each element's segment.

    Args:
        plan: all integers.
        piece: the piece, which has segments.
        values: one for each of its segments.
        part: elements of the piece; default all.
    """
    begin, end = (0, piece.end - piece.begin) if part is None else (part.start, part.stop)
    found = [values[:0]]
    for run in plan.runs_of(piece):
        own = values[run.entries]
        if isinstance(run, ColumnRun):
            first, last = max(run.begin, begin), min(run.end, end)
            if first < last:
                own = own.roll(-((first - run.begin) % len(own)))
                found.append(own.repeat(-(-(last - first) // len(own)))[: last - first])
            continue
        bounds = np.clip(np.stack([run.start_S, run.end_S]), begin, end)
        lengths = torch.from_numpy(bounds[1] - bounds[0]).to(own.device)
        numel = int(bounds[1, -1] - bounds[0, 0])
        found.append(own.repeat_interleave(lengths, output_size=numel))
    return torch.cat(found)


def first_of_segments(plan: StepPlan, piece: Piece, elements: Tensor) -> Tensor:
    """Return the value of each segment's first element; see :func:`sum_over_segments`."""
    found = [elements[:0]]
    for run in plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            found.append(elements[run.begin : run.end][: run.width])
        else:
            found.append(elements[torch.from_numpy(run.start_S).to(elements.device)])
    return torch.cat(found)


def sum_over_segments(plan: StepPlan, piece: Piece, elements: Tensor) -> Tensor:
    """Return the sum of the values of each segment's elements, float64.

    Args:
        plan: all integers.
        piece: the piece, which has segments.
        elements: one value for each of its elements, in host memory: torch has no prefix sums of
            floats on GPUs that ``--deterministic-mode`` allows.
    """
    found = [elements.new_empty(0, dtype=torch.float64)]
    for run in plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            found.append(_sums_of_columns(run, elements))
        else:
            found.append(_sums_of_rows(run, elements))
    return torch.cat(found)


def _sums_of_columns(run: ColumnRun, elements: Tensor) -> Tensor:
    total = elements.new_zeros(min(run.width, run.end - run.begin), dtype=torch.float64)
    # In parts, here and below: in float64, the largest parameters would take much memory.
    rows = max(PART_NUMEL // run.width, 1)
    for part in torch.split(elements[run.begin : run.end], rows * run.width):
        whole = len(part) // run.width * run.width
        if whole:
            total += part[:whole].view(-1, run.width).sum(dim=0, dtype=torch.float64)
        total[: len(part) - whole] += part[whole:]
    return total


def _sums_of_rows(run: RowRun, elements: Tensor) -> Tensor:
    total = elements.new_zeros(len(run.start_S), dtype=torch.float64)
    first, last = int(run.start_S[0]), int(run.end_S[-1])
    for begin in range(first, last, PART_NUMEL):
        end = min(begin + PART_NUMEL, last)
        # Prefix sums: one pass whatever the number of segments.
        prefix = elements.new_zeros(end - begin + 1, dtype=torch.float64)
        torch.cumsum(elements[begin:end], 0, dtype=torch.float64, out=prefix[1:])
        here = slice(
            np.searchsorted(run.end_S, begin, side="right"), np.searchsorted(run.start_S, end)
        )
        starts, ends = (
            torch.from_numpy(np.clip(bound[here], begin, end) - begin)
            for bound in (run.start_S, run.end_S)
        )
        total[here] += prefix[ends] - prefix[starts]
    return total
