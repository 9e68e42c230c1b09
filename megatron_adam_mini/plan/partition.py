"""Facts about one parameter -> blocks: which elements share one second moment.

Imports numpy, ``config`` and ``parameter_info``; no torch, no Megatron, so the partition of a
400-billion-parameter model can be planned on a laptop.

Data flow: facts about each parameter (``parameter_info``) -> **partition** -> layout, manifest.

Vocabulary: a *row* is an index of dimension 0 of the whole parameter; if dimension 0 is split, the
tensor-parallel shards are stacked in rank order. A *row segment* is a run of consecutive rows of
one block. Most blocks consist of one row segment; Value as one block in a fused QKV weight has one
row segment per query group.
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

from megatron_adam_mini.config import PRESETS, AdamMiniConfig
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo

IntArray = NDArray[np.int64]

#: Increment whenever a rule would give the same parameter other blocks than before. Checkpoints
#: name the rule of each parameter, so another rule for a role needs no new version: v is converted.
RULE_VERSION = 1

#: role -> its rule under each of ``PRESETS``, argued in docs/partition.md. ``qkv``
#: is resolved further by :func:`head_pattern`. Parameters with other roles get one second moment
#: per element and are reported as such.
_ROLE_RULES: dict[str, tuple[str, str, str, str]] = {
    "embedding": ("row", "row", "element", "tensor"),
    "output": ("row", "row", "element", "tensor"),
    "position_embedding": ("row", "row", "element", "tensor"),
    "tokentype_embedding": ("row", "row", "element", "tensor"),
    "relative_position": ("element", "element", "element", "tensor"),
    "vision_token": ("element", "element", "element", "tensor"),
    "qkv": ("qkv", "row", "qkv", "qkv"),
    "query": ("qkv", "row", "qkv", "qkv"),
    "key_value": ("qkv", "row", "qkv", "qkv"),
    "latent_query": ("qkv", "row", "qkv", "qkv"),
    "latent_key_value": ("qkv", "row", "qkv", "qkv"),
    "latent_down": ("row", "row", "tensor", "tensor"),
    "attention_projection": ("row", "row", "tensor", "tensor"),
    "softmax_offset": ("element", "element", "element", "tensor"),
    # Several projections that differ in scale lie in one weight, so it is never one block.
    "mixer_input": ("row", "row", "row", "row"),
    "mixer_output": ("row", "row", "tensor", "tensor"),
    "convolution": ("element", "element", "element", "element"),
    "state_space": ("element", "element", "element", "element"),
    "mlp": ("row", "row", "tensor", "tensor"),
    "linear": ("row", "row", "tensor", "tensor"),
    "adapter": ("row", "row", "tensor", "tensor"),
    "router": ("element", "element", "element", "tensor"),
    "norm": ("tensor", "tensor", "tensor", "tensor"),
    "bias": ("element", "element", "element", "tensor"),
}

#: All roles.
ROLES = (*_ROLE_RULES, "unknown")


@dataclass(frozen=True)
class RowPattern:
    """Blocks of whole rows: a period of row segments that repeats down the parameter.

    A fused QKV weight of two query groups with two Query heads each, Value as one block, has one
    period per group. Its Value is one block over both; every other head is a block of its own::

        row segment    Q head  Q head  K head  V     | Q head  Q head  K head  V
        segment_rows   dim     dim     dim     dim   | (the period is written once)
        shared         -1      -1      -1      0     |
        block          1       2       3       0     | 4       5       6       0

    Attributes:
        segment_rows: rows of each row segment of one period.
        shared: for each of them, -1 if every period has its own block there, else the number of
            the block that all periods share.
        num_periods: how often the period repeats.
    """

    segment_rows: tuple[int, ...]
    shared: tuple[int, ...]
    num_periods: int

    @cached_property
    def _starts(self) -> IntArray:
        return np.concatenate([[0], np.cumsum(np.asarray(self.segment_rows, dtype=np.int64))])

    @cached_property
    def _shared(self) -> IntArray:
        return np.asarray(self.shared, dtype=np.int64)

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
        private = self._shared < 0
        return np.where(private, np.cumsum(private) - 1, -1)

    @cached_property
    def num_private(self) -> int:
        """Blocks of each period that it does not share."""
        return int((self._shared < 0).sum())

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole parameter."""
        return self.num_shared + self.num_private * self.num_periods

    def block_of_rows(self) -> IntArray:
        """Return the block of every row of the whole parameter, shape ``(num_rows,)``."""
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
        """Return the block of each row segment."""
        period, index = np.divmod(segments, len(self.segment_rows))
        private = self.num_shared + period * self.num_private + self._private_index[index]
        return np.where(self._shared[index] >= 0, self._shared[index], private)

    def rows_of_block(self, segments: IntArray) -> IntArray:
        """Return, for each row segment, the number of rows of its whole block."""
        rows = np.asarray(self.segment_rows, dtype=np.int64)
        shared_rows = np.zeros(max(self.num_shared, 1), dtype=np.int64)
        np.add.at(shared_rows, self._shared[self._shared >= 0], rows[self._shared >= 0])
        index = segments % len(self.segment_rows)
        shared = self._shared[index]
        return np.where(shared >= 0, shared_rows[shared] * self.num_periods, rows[index])

    def is_of_several(self, segments: IntArray) -> NDArray[np.bool_]:
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
        }

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
    rules = _ROLE_RULES.get(info.role)
    return "element" if rules is None else rules[PRESETS.index(config.preset)]


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
    if rule == "row":
        return ParameterBlocks(info, rule, RowPattern((1,), (-1,), num_rows))
    return ParameterBlocks(info, rule, RowPattern((num_rows,), (-1,), 1))


def head_pattern(
    info: ParameterInfo, heads: HeadGeometry, config: AdamMiniConfig, rule: str
) -> RowPattern:
    """Return the row segments of one query group: Query heads, gate, Key head, Value.

    Raises:
        ValueError: the heads do not divide into groups, or the number of rows does not match.
    """
    _check_heads(info, heads)
    per_group, dim = heads.num_heads // heads.num_query_groups, heads.head_dim
    one_tensor = config.preset == "tensor" and rule == "qkv"
    one_value = one_tensor or config.preset == "first" or config.value_as_block
    one_gate = one_tensor or config.preset == "first"
    parts = {
        "query": ([dim] * per_group, one_tensor),
        "gate": ([1] * (per_group * dim), one_gate),
        "key": ([dim], one_tensor),
        "value": ([1] * heads.value_dim, one_value),
    }
    rows: list[int] = []
    shared: list[int] = []
    num_shared = 0
    for part in heads.parts:
        sizes, one_block = parts[part]
        if one_block:
            # One row segment in each group; all groups share the block.
            rows.append(sum(sizes))
            shared.append(num_shared)
            num_shared += 1
        else:
            rows.extend(sizes)
            shared.extend([-1] * len(sizes))
    if shared == [0]:
        return RowPattern((heads.num_rows,), (-1,), 1)
    return RowPattern(tuple(rows), tuple(shared), heads.num_query_groups)


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
