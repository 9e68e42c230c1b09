"""Blocks that rules could make of a parameter which keeps one second moment per element.

Imports numpy, ``config`` and ``partition``. Data flow: facts about a parameter -> **Candidates** ->
``second_moment_noise``, which measures how alike v is within such blocks.

A *part* is a run of rows, or several, that is one matrix: Query, gate, Key and Value of a fused
attention weight, gate and up of the first weight of a gated MLP. Other weights are one part. What
fits one part need not fit the next, so each has candidates of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import (
    IntArray,
    ParameterBlocks,
    has_columns,
    partition_by_rule,
    partition_parameter,
)

#: All candidates, in the order of reports: one block per row, column or head, or for the part.
CANDIDATES = ("row", "column", "head", "tensor")

#: Parts whose heads are blocks of the rule ``head``.
_WITH_HEADS = ("query", "key")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Parts of a whole parameter, and the heads in them.

    Attributes:
        parts: name of each part; ``("",)``: the parameter is one matrix.
        rules: for each part, which candidate the preset makes of it, or ``element``.
        num_columns: columns of the whole parameter.
        has_columns: whether they may be blocks.
        part_of_row: number of the part of each row, ``(rows,)``.
        head_of_row: number of the head of each row, for all heads of the parameter; ``None``: it
            has none. Rows of parts without heads have numbers, too, which mean nothing.
    """

    parts: tuple[str, ...]
    rules: tuple[str, ...]
    num_columns: int
    has_columns: bool
    part_of_row: IntArray
    head_of_row: IntArray | None

    def of_part(self, part: int) -> tuple[str, ...]:
        """Return the candidates of a part that have blocks of several elements."""
        num_rows = int((self.part_of_row == part).sum())
        applies = {
            "row": num_rows > 1 and self.num_columns > 1,
            "column": self.has_columns and num_rows > 1 and self.num_columns > 1,
            "head": self.head_of_row is not None and self.parts[part] in _WITH_HEADS,
            "tensor": True,
        }
        return tuple(name for name in CANDIDATES if applies[name])


def candidates_of(info: ParameterInfo, config: AdamMiniConfig) -> Candidates:
    """Return the candidates of one parameter.

    Args:
        info: facts about the parameter.
        config: its preset and rules tell which candidate it would have without ``full_v``.

    Raises:
        ValueError: the shape does not match the head geometry, or a rule does not apply.
    """
    num_rows, *others = info.global_shape or (1,)
    parts, part_of_row = _parts_of(info, num_rows)
    head_of_row = None
    if info.heads is not None:
        heads = partition_by_rule(info, "head", AdamMiniConfig()).pattern
        assert heads is not None
        head_of_row = heads.block_of_rows()
    chosen = partition_parameter(info, replace(config, full_v=()))
    rules = tuple(_rule_of(chosen, part_of_row == part) for part in range(len(parts)))
    return Candidates(parts, rules, math.prod(others), has_columns(info), part_of_row, head_of_row)


def _parts_of(info: ParameterInfo, num_rows: int) -> tuple[tuple[str, ...], IntArray]:
    """Return names of the parts, and the number of the part of each row."""
    if info.heads is not None:
        # Query, gate, Key and Value are one block each.
        pattern = partition_by_rule(info, "qkv", AdamMiniConfig(preset="tensor")).pattern
        assert pattern is not None
        return info.heads.parts, pattern.block_of_rows()
    if info.num_stacked > 1:
        pattern = partition_by_rule(info, "column", AdamMiniConfig()).pattern
        assert pattern is not None
        stacked = tuple(str(number) for number in range(info.num_stacked))
        names = ("gate", "up") if info.num_stacked == 2 else stacked
        return names, pattern.column_set_of_rows()
    return ("",), np.zeros(num_rows, dtype=np.int64)


def _rule_of(chosen: ParameterBlocks, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
    """Return the candidate whose blocks some rows of a parameter have."""
    if chosen.pattern is None:
        return "element"
    if chosen.pattern.column_set_of_rows()[rows].max() >= 0:
        return "column"
    num_blocks = len(np.unique(chosen.pattern.block_of_rows()[rows]))
    if num_blocks == 1:
        return "tensor"
    return "row" if num_blocks == rows.sum() else "head"
