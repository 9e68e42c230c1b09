"""Facts about one parameter -> blocks: which elements share one second moment.

Imports numpy, ``config`` and ``parameter_info``; no torch, no Megatron, so the partition of a
400-billion-parameter model can be planned on a laptop.

Data flow: facts about each parameter (``parameter_info``) -> **partition** -> segments, manifest.

Vocabulary: a *row* is an index of dimension 0 of the whole parameter; if dimension 0 is split, the
tensor-parallel shards are stacked in rank order. A *row segment* is a run of consecutive rows of
one block. Most blocks consist of one row segment; Value as one block in a fused QKV weight has one
row segment per query group. A *column* is an index of all other dimensions together; a *column set*
is a set of row segments within which each column is a block.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adam_mini.config import BY_COLUMNS, AdamMiniConfig
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: Increment whenever a rule would give the same parameter other blocks than before. Checkpoints
#: name the rule of each parameter, so another rule for a role needs no new version: v is converted.
RULE_VERSION = 1

#: role -> rule, of each preset; argued in docs/partition.md. ``qkv`` is resolved further by
#: :func:`head_pattern`. Parameters with other roles get one second moment per element and are
#: reported as such.
_PAPER = {
    "embedding": "row",
    "output": "row",
    "position_embedding": "row",
    "tokentype_embedding": "row",
    "relative_position": "element",
    "vision_token": "element",
    "qkv": "qkv",
    "query": "qkv",
    "key_value": "qkv",
    "latent_query": "qkv",
    "latent_key_value": "qkv",
    "latent_down": "row",
    "attention_projection": "row",
    "softmax_offset": "element",
    "mixer_input": "row",
    "mixer_output": "row",
    "convolution": "element",
    "state_space": "element",
    "mlp": "row",
    "linear": "row",
    "adapter": "row",
    "router": "element",
    "norm": "tensor",
    "bias": "element",
}
_OF_HEADS = ("qkv", "query", "key_value", "latent_query", "latent_key_value")
_HIDDEN = ("latent_down", "attention_projection", "mixer_output", "mlp", "linear", "adapter")
_VECTORS = ("embedding", "output", "position_embedding", "tokentype_embedding")
#: Weights whose outputs are added to the residual stream, MLPs apart.
_BACK = ("attention_projection", "mixer_output")
_ROW_COLUMN = _PAPER | dict.fromkeys(_BACK, "column")
_FIRST = _PAPER | dict.fromkeys(_VECTORS, "element") | dict.fromkeys(_HIDDEN, "tensor")
_ROLE_RULES: dict[str, dict[str, str]] = {
    "paper": _PAPER,
    "row": _PAPER | dict.fromkeys(_OF_HEADS, "row"),
    # "qkv" is by rows of Query and Key, and by columns of Value
    "row-column": _ROW_COLUMN,
    "slim": _ROW_COLUMN | {"mlp": "column", "norm": "element"},
    "first": _FIRST,
    # Several projections that differ in scale lie in one weight of a mixer: it is never one block.
    "tensor": dict.fromkeys(_PAPER, "tensor")
    | {role: _PAPER[role] for role in (*_OF_HEADS, "mixer_input", "convolution", "state_space")},
}

#: Roles of weights whose columns are not those of one matrix: several projections, or channels.
_WITHOUT_COLUMNS = ("mixer_input", "convolution", "state_space")

#: All roles.
ROLES = (*_PAPER, "unknown")


@dataclass(frozen=True)
class RowPattern:
    """Blocks of whole rows, or of columns of some rows: a period of row segments that repeats.

    A fused QKV weight of two query groups with two Query heads each, Value as one block, has one
    period per group. Its Value is one block over both; every other head is a block of its own::

        row segment    Q head  Q head  K head  V     | Q head  Q head  K head  V
        segment_rows   dim     dim     dim     dim   | (the period is written once)
        shared         -1      -1      -1      0     |
        block          1       2       3       0     | 4       5       6       0

    With one block per column of Value instead, its row segments are one column set::

        column_set     -1      -1      -1      0     |
        block          0       1       2       6 + c | 3       4       5       6 + c

    Attributes:
        segment_rows: rows of each row segment of one period.
        shared: for each of them, -1 if every period has its own block there, else the number of
            the block that all periods share.
        num_periods: how often the period repeats.
        column_set: for each row segment, -1, or the number of its column set, which all periods
            share; ``()``: there is none. Blocks of columns are numbered last, set after set.
        num_columns: columns of the whole parameter; 0 if there is no column set.
    """

    segment_rows: tuple[int, ...]
    shared: tuple[int, ...]
    num_periods: int
    column_set: tuple[int, ...] = ()
    num_columns: int = 0

    @cached_property
    def _starts(self) -> IntArray:
        return np.concatenate([[0], np.cumsum(np.asarray(self.segment_rows, dtype=np.int64))])

    @cached_property
    def _shared(self) -> IntArray:
        return np.asarray(self.shared, dtype=np.int64)

    @cached_property
    def _column_set(self) -> IntArray:
        sets = self.column_set or (-1,) * len(self.segment_rows)
        return np.asarray(sets, dtype=np.int64)

    @property
    def period_rows(self) -> int:
        """Rows of one period."""
        return int(self._starts[-1])

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return self.period_rows * self.num_periods

    @property
    def num_row_segments(self) -> int:
        """Row segments of the whole parameter."""
        return len(self.segment_rows) * self.num_periods

    @cached_property
    def num_shared(self) -> int:
        """Blocks that all periods share; they are numbered first."""
        return int(self._shared.max(initial=-1)) + 1

    @cached_property
    def _private_index(self) -> IntArray:
        private = self._is_private
        return np.where(private, np.cumsum(private) - 1, -1)

    @cached_property
    def _is_private(self) -> BoolArray:
        return (self._shared < 0) & (self._column_set < 0)

    @cached_property
    def num_private(self) -> int:
        """Blocks of each period that it does not share."""
        return int(self._is_private.sum())

    @cached_property
    def num_column_sets(self) -> int:
        """Column sets of the parameter."""
        return int(self._column_set.max(initial=-1)) + 1

    @property
    def num_row_blocks(self) -> int:
        """Blocks of whole rows; those of columns are numbered from here on."""
        return self.num_shared + self.num_private * self.num_periods

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole parameter."""
        return self.num_row_blocks + self.num_column_sets * self.num_columns

    def column_set_of(self, segments: IntArray) -> IntArray:
        """Return the column set of each row segment, -1 for those whose rows are whole blocks."""
        return self._column_set[segments % len(self.segment_rows)]

    def column_set_of_rows(self) -> IntArray:
        """Return the column set of every row of the parameter, -1 for none; ``(num_rows,)``."""
        segments = np.arange(self.num_row_segments, dtype=np.int64)
        low, high = self.row_bounds(segments)
        return np.repeat(self.column_set_of(segments), high - low)

    def block_of_rows(self) -> IntArray:
        """Return the block of every row of the whole parameter, shape ``(num_rows,)``.

        For rows of a column set, it is the block of the first column.
        """
        segments = np.arange(self.num_row_segments, dtype=np.int64)
        low, high = self.row_bounds(segments)
        return np.repeat(self.block_of_row_segment(segments), high - low)

    def row_segment_of(self, row: int) -> int:
        """Return the row segment that holds ``row``."""
        period, within = divmod(row, self.period_rows)
        return period * len(self.segment_rows) + bisect_right(self._starts, within) - 1

    def row_segments_of(self, rows: IntArray) -> IntArray:
        """Return the row segment that holds each of ``rows``."""
        period, within = np.divmod(rows, self.period_rows)
        index = np.searchsorted(self._starts, within, side="right") - 1
        return period * len(self.segment_rows) + index

    def row_bounds(self, segments: IntArray) -> tuple[IntArray, IntArray]:
        """Return first and one-past-last row of each row segment."""
        period, index = np.divmod(segments, len(self.segment_rows))
        base = period * self.period_rows
        return base + self._starts[index], base + self._starts[index + 1]

    def block_of_row_segment(self, segments: IntArray) -> IntArray:
        """Return the block of each row segment; in a column set, that of the first column."""
        period, index = np.divmod(segments, len(self.segment_rows))
        private = self.num_shared + period * self.num_private + self._private_index[index]
        of_rows = np.where(self._shared[index] >= 0, self._shared[index], private)
        column_set = self._column_set[index]
        of_columns = self.num_row_blocks + column_set * self.num_columns
        return np.where(column_set >= 0, of_columns, of_rows)

    def rows_of_block(self, segments: IntArray) -> IntArray:
        """Return, for each row segment, the number of rows of its whole block or column set."""
        rows = np.asarray(self.segment_rows, dtype=np.int64)
        # What all periods share: blocks, then column sets.
        common = np.where(self._column_set < 0, self._shared, self.num_shared + self._column_set)
        common_rows = np.zeros(self.num_shared + self.num_column_sets + 1, dtype=np.int64)
        np.add.at(common_rows, common[common >= 0], rows[common >= 0])
        index = segments % len(self.segment_rows)
        found = common_rows[common[index]] * self.num_periods
        return np.where(common[index] >= 0, found, rows[index])

    def is_of_several(self, segments: IntArray) -> BoolArray:
        """Return, for each row segment, whether its block has several row segments."""
        counts = np.bincount(self._shared[self._shared >= 0], minlength=max(self.num_shared, 1))
        shared = self._shared[segments % len(self.segment_rows)]
        return (shared >= 0) & (counts[shared] * self.num_periods > 1)


@dataclass(frozen=True)
class ParameterBlocks:
    """One parameter with the rule that applies to it.

    ``pattern`` is ``None`` if every element has its own second moment.
    """

    info: ParameterInfo
    rule: str
    pattern: RowPattern | None

    @property
    def num_blocks(self) -> int:
        """Number of second moments of the whole parameter."""
        if self.pattern is None:
            return math.prod(self.info.global_shape)
        return self.pattern.num_blocks

    @property
    def num_column_sets(self) -> int:
        """Column sets of the parameter; 0: no column has a second moment of its own."""
        return 0 if self.pattern is None else self.pattern.num_column_sets

    def manifest_entry(self) -> dict[str, Any]:
        """Return this parameter's entry in the manifest, independent of the layout."""
        return {
            "name": self.info.name,
            "key": self.info.checkpoint_key,
            "shape": list(self.info.global_shape),
            "role": self.info.role,
            "rule": self.rule,
            "blocks": self.num_blocks,
            "elements": math.prod(self.info.global_shape),
            "v_bytes": 4 * self.num_blocks,
            "heads": None if self.info.heads is None else self.info.heads.to_store(),
            **self._about_columns(),
        }

    def _about_columns(self) -> dict[str, int]:
        """Return how many column sets there are, and how many matrices; nothing without columns."""
        if self.pattern is None or not self.pattern.num_column_sets:
            return {}
        return {"column_sets": self.pattern.num_column_sets, "stacked": self.info.num_stacked}

    def identity(self) -> dict[str, Any]:
        """Return what must be equal on all ranks that hold this parameter."""
        facts = asdict(self.info)
        for per_rank in ("tp_rank", "in_norm"):
            facts.pop(per_rank)
        return {"rule": self.rule, **facts}


def rule_for(info: ParameterInfo, config: AdamMiniConfig) -> str:
    """Return the rule of one parameter: an override by name, else the preset's rule by role."""
    for pattern, rule in config.overrides():
        if fnmatchcase(info.name, pattern):
            return rule
    return _ROLE_RULES[config.preset].get(info.role, "element")


def partition_parameter(info: ParameterInfo, config: AdamMiniConfig) -> ParameterBlocks:
    """Partition one parameter into blocks.

    Raises:
        ValueError: the shape does not match the head geometry, or a rule does not apply.

    Source: Zhang et al., arXiv:2406.16793, Section 2.2 (partition principle), Algorithm 3.
    """
    return partition_by_rule(info, rule_for(info, config), config)


def partition_by_rule(info: ParameterInfo, rule: str, config: AdamMiniConfig) -> ParameterBlocks:
    """Partition one parameter into blocks by a given rule; see :func:`partition_parameter`."""
    if rule == "element":
        return ParameterBlocks(info, rule, None)
    if rule in ("qkv", "head"):
        if info.heads is None:
            raise ValueError(
                f"Adam-mini rule 'head' was asked for parameter {info.name!r} of role "
                f"{info.role!r}, which has no heads; use 'row', 'tensor' or 'element'."
            )
        return ParameterBlocks(info, rule, head_pattern(info, info.heads, config, rule))
    num_rows = info.global_shape[0]
    if rule == "column" and len(info.shape) > 1:
        return ParameterBlocks(info, rule, column_pattern(info))
    if rule == "row":
        return ParameterBlocks(info, rule, RowPattern((1,), (-1,), num_rows))
    return ParameterBlocks(info, rule, RowPattern((num_rows,), (-1,), 1))


def has_columns(info: ParameterInfo) -> bool:
    """Return whether a parameter's columns are those of one matrix, or of equal ones."""
    return len(info.shape) == 2 and info.role not in _WITHOUT_COLUMNS


def column_pattern(info: ParameterInfo) -> RowPattern:
    """Return one block per column, for each of the matrices that the rows of a weight hold.

    Source: Kalra et al., arXiv:2503.01843, table 1 (SlimAdam: means over outputs).
    """
    num_columns = math.prod(info.global_shape[1:])
    if info.num_stacked == 1:
        return RowPattern((info.global_shape[0],), (-1,), 1, (0,), num_columns)
    shards = info.tp_size if info.tp_dim == 0 else 1
    rows, rest = divmod(info.global_shape[0], shards * info.num_stacked)
    if rest:
        raise ValueError(
            f"Parameter {info.name!r} has {info.global_shape[0]} rows, which are not "
            f"{info.num_stacked} matrices of equal size on {shards} tensor-parallel ranks; give it "
            "another rule than 'column'."
        )
    sets = range(info.num_stacked)
    return RowPattern((rows,) * len(sets), (-1,) * len(sets), shards, tuple(sets), num_columns)


def head_pattern(
    info: ParameterInfo, heads: HeadGeometry, config: AdamMiniConfig, rule: str
) -> RowPattern:
    """Return the row segments of one query group: Query heads, gate, Key head, Value.

    The presets ``row-column`` and ``slim`` have rows instead of heads, and columns of Value.

    Raises:
        ValueError: the heads do not divide into groups, or the number of rows does not match.
    """
    _check_heads(info, heads)
    per_group, dim = heads.num_heads // heads.num_query_groups, heads.head_dim
    one_tensor = config.preset == "tensor" and rule == "qkv"
    one_value = one_tensor or config.preset == "first" or config.value_as_block
    one_gate = one_tensor or config.preset == "first"
    by_columns = config.preset in BY_COLUMNS and rule == "qkv"
    head = [1] * dim if by_columns else [dim]
    parts = {
        "query": (head * per_group, one_tensor),
        "gate": ([1] * (per_group * dim), one_gate),
        "key": (head, one_tensor),
        "value": ([1] * heads.value_dim, one_value),
    }
    rows: list[int] = []
    shared: list[int] = []
    column_set: list[int] = []
    num_shared = 0
    for part in heads.parts:
        sizes, one_block = parts[part]
        if by_columns and part == "value":
            column_set = [-1] * len(rows) + [0]
            rows.append(sum(sizes))
            shared.append(-1)
        elif one_block:
            # One row segment in each group; all groups share the block.
            rows.append(sum(sizes))
            shared.append(num_shared)
            num_shared += 1
        else:
            rows.extend(sizes)
            shared.extend([-1] * len(sizes))
    if shared == [0]:
        return RowPattern((heads.num_rows,), (-1,), 1)
    num_columns = math.prod(info.global_shape[1:]) if column_set else 0
    return RowPattern(
        tuple(rows), tuple(shared), heads.num_query_groups, tuple(column_set), num_columns
    )


def _check_heads(info: ParameterInfo, heads: HeadGeometry) -> None:
    """Check that a parameter has the rows that its heads make."""
    if heads.num_heads % heads.num_query_groups:
        raise ValueError(
            f"Parameter {info.name!r}: {heads.num_heads} attention heads are not divisible by "
            f"{heads.num_query_groups} query groups; choose numbers that are."
        )
    if heads.num_rows != info.global_shape[0]:
        latent = info.role.startswith("latent")
        flags = (
            "--qk-head-dim, --qk-pos-emb-head-dim and --v-head-dim"
            if latent
            else "--num-query-groups and --kv-channels"
        )
        raise ValueError(
            f"Parameter {info.name!r} has {info.global_shape[0]} rows, but {heads.num_heads} "
            f"heads, {heads.num_query_groups} query groups and head size {heads.head_dim}"
            f"{' with an output gate' if 'gate' in heads.parts else ''} make {heads.num_rows}; "
            f"check --num-attention-heads, {flags}, or give the parameter another rule."
        )


def unmatched_patterns(names: Sequence[str], config: AdamMiniConfig) -> list[str]:
    """Return the name patterns of the config that match none of ``names``."""
    return [
        pattern
        for pattern, _ in config.overrides()
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
