"""Values of the segments of a piece <-> values of its elements.

Imports torch and ``plan``. Used between steps: saves, loads, reports.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.plan.step_plan import ColumnRun, Piece, StepPlan


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
        elements: one value for each of its elements.
    """
    found = [elements.new_empty(0, dtype=torch.float64)]
    for run in plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            own = elements[run.begin : run.end].double()
            if len(own) > run.width:
                own = torch.nn.functional.pad(own, (0, -len(own) % run.width))
                own = own.view(-1, run.width).sum(dim=0)
            found.append(own)
            continue
        # Prefix sums: one pass whatever the number of segments.
        first, last = int(run.start_S[0]), int(run.end_S[-1])
        own = elements[first:last].double()
        prefix = torch.cat([own.new_zeros(1), own.cumsum(0)])
        starts, ends = (
            torch.from_numpy(bound - first).to(own.device) for bound in (run.start_S, run.end_S)
        )
        found.append(prefix[ends] - prefix[starts])
    return torch.cat(found)
