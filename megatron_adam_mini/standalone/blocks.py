"""What a parameter is -> its blocks: for each row of the whole parameter, the block that it is in.

Blocks of columns are blocks of rows of the transposed weight.

Imports numpy, ``config``, ``plan`` and ``names``. The rules are those of ``plan.partition``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_adam_mini.config import BY_COLUMNS, AdamMiniConfig
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo
from megatron_adam_mini.plan.partition import (
    IntArray,
    partition_by_rule,
    rule_for,
)
from megatron_adam_mini.standalone.names import Weight


@dataclass(frozen=True)
class Heads:
    """Numbers of a model's attention.

    Attributes:
        num_heads: Query heads; ``None``: the user did not say.
        num_query_groups: Key heads; ``None``: as many.
        head_dim: rows of a head; ``None``: from the number of rows.
    """

    num_heads: int | None = None
    num_query_groups: int | None = None
    head_dim: int | None = None

    def count(self, part: str) -> int:
        """Return how many heads of ``query``, ``key`` or ``value`` a weight has."""
        heads = self.num_heads or 0
        return heads if part == "query" else self.num_query_groups or heads


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one parameter.

    Attributes:
        name: bare name.
        shape: of the whole parameter.
        rule: the rule that made them.
        row_dims: dimensions whose indices are rows: one, or that of experts and one more; with the
            rule ``column``, those of the inputs.
        block_of_row: int64, shape ``(rows,)``; ``None``: one second moment per element.
        head_dim: rows of a head, 0 if heads are not used.
        known: whether its name has a role.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    row_dims: tuple[int, ...]
    block_of_row: IntArray | None
    head_dim: int = 0
    known: bool = True

    @property
    def rows_are_blocks(self) -> bool:
        """Whether each row is a block of its own."""
        return self.rule in ("row", "column")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of v if it has one number per row."""
        return tuple(self.shape[dim] for dim in self.row_dims) if self.shape else (1,)

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return math.prod(self.row_shape)

    @property
    def row_numel(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape) // max(self.num_rows, 1)

    @property
    def num_blocks(self) -> int:
        """Second moments of the whole parameter."""
        if self.block_of_row is None:
            return math.prod(self.shape)
        return int(self.block_of_row.max(initial=-1)) + 1

    def manifest_entry(self) -> dict[str, Any]:
        """Return what a user wants to know of it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rule": self.rule,
            "blocks": self.num_blocks,
        }


def partition(
    name: str, shape: tuple[int, ...], weight: Weight, heads: Heads, config: AdamMiniConfig
) -> Blocks:
    """Partition one parameter.

    Raises:
        ValueError: heads are needed and their numbers are missing or do not fit.
    """
    rule = _rule(ParameterInfo(name=name, shape=shape, role=weight.role), weight, config)
    if rule == "column" and len(shape) < 2:
        rule = "tensor"  # a vector is one column
    if rule == "column":
        _check_columns(name, weight, shape)
        num_rows = math.prod(shape[dim] for dim in weight.column_dims)
        return Blocks(name, shape, rule, weight.column_dims, np.arange(num_rows, dtype=np.int64))
    row_dims = weight.row_dims if rule == "row" else weight.row_dims[-1:]
    if rule in ("tensor", "element"):
        row_dims = (0,)  # any would do, and these are adjacent in memory
    num_rows = math.prod(shape[dim] for dim in row_dims) if shape else 1
    width = math.prod(shape) // max(num_rows, 1)
    info = ParameterInfo(name=name, shape=(num_rows, width), role=weight.role)
    if rule == "element":
        return Blocks(name, shape, rule, row_dims, None, known=weight.role != "unknown")
    if rule not in ("qkv", "head"):
        return Blocks(name, shape, rule, row_dims, _block_of_row(info, rule, config))
    parts = weight.parts or ("query",)  # a weight that the user calls one of heads
    head_dim = _head_dim(name, num_rows, parts, heads, known=bool(weight.parts))
    blocks: list[IntArray] = [np.empty(0, dtype=np.int64)]
    for held in [parts] if weight.interleaved else [(part,) for part in parts]:
        geometry = _geometry(held, heads, head_dim, num_rows, known=bool(weight.parts))
        info = ParameterInfo(
            name=name, shape=(geometry.num_rows, width), role=weight.role, heads=geometry
        )
        before = max((int(part.max(initial=-1)) + 1 for part in blocks), default=0)
        blocks.append(_block_of_row(info, rule, config) + before)
    return Blocks(name, shape, rule, row_dims, np.concatenate(blocks), head_dim)


def _rule(info: ParameterInfo, weight: Weight, config: AdamMiniConfig) -> str:
    """Return the rule of a parameter; weights of Query, Key and Value may lie apart."""
    rule = rule_for(info, config)
    if rule != "qkv" or config.preset not in BY_COLUMNS:
        return rule
    if "value" not in weight.parts:
        return "row"
    if weight.parts == ("value",):
        return "column"
    raise NotImplementedError(
        f"Parameter {info.name!r} holds {', '.join(weight.parts)} in one weight; AdamMini with "
        f"preset={config.preset!r} needs the columns of Value in one of their own. Remedy: "
        f"preset='row', or rules={{{info.name!r}: 'row'}}."
    )


def _check_columns(name: str, weight: Weight, shape: tuple[int, ...]) -> None:
    """Check that the columns of a parameter are those of one matrix, or of one per expert.

    Raises:
        NotImplementedError: they are not.
    """
    held = "the matrices of an MLP" if weight.stacked else f"{len(shape)} dimensions"
    if weight.stacked or len(shape) != (3 if weight.experts else 2):
        raise NotImplementedError(
            f"Parameter {name!r} of shape {shape} has {held}; AdamMini's rule 'column' allows "
            f"one matrix. Remedy: rules={{{name!r}: 'row'}}."
        )


def _block_of_row(info: ParameterInfo, rule: str, config: AdamMiniConfig) -> IntArray:
    pattern = partition_by_rule(info, rule, config).pattern
    assert pattern is not None  # only the rule "element" has none
    return pattern.block_of_rows()


def _geometry(
    parts: tuple[str, ...], heads: Heads, head_dim: int, num_rows: int, *, known: bool
) -> HeadGeometry:
    if not known:
        count = num_rows // head_dim
        return HeadGeometry(num_heads=count, num_query_groups=count, head_dim=head_dim, holds=parts)
    groups = heads.count(parts[-1])
    count = heads.count(parts[0]) if "query" in parts else groups
    return HeadGeometry(num_heads=count, num_query_groups=groups, head_dim=head_dim, holds=parts)


def _head_dim(
    name: str, num_rows: int, parts: tuple[str, ...], heads: Heads, *, known: bool
) -> int:
    """Return the rows of a head of a weight that holds some parts of attention."""
    if not known and heads.head_dim is None:
        raise ValueError(
            f"Adam-mini rule 'head' was asked for parameter {name!r}, whose heads it does not "
            "know; give head_dim=..., the rows of one head, or use 'row', 'tensor' or 'element'."
        )
    if known and heads.num_heads is None:
        raise ValueError(
            f"Parameter {name!r} holds attention heads, so AdamMini needs num_heads=... (and "
            "num_query_groups=... if Keys have fewer; config.num_attention_heads and "
            "config.num_key_value_heads in transformers), or another rule for it: "
            f"rules={{{name!r}: 'row'}}."
        )
    counts = [heads.count(part) for part in parts]
    total = sum(counts) if known else num_rows // (heads.head_dim or 1)
    if not total or num_rows % total or heads.head_dim not in (None, num_rows // total):
        raise ValueError(
            f"Parameter {name!r} has {num_rows} rows, which are not {' + '.join(parts)} of "
            f"num_heads={heads.num_heads}, num_query_groups={heads.num_query_groups}, "
            f"head_dim={heads.head_dim}; give the numbers of the model, or another rule for it: "
            f"rules={{{name!r}: 'row'}}."
        )
    if heads.num_heads and heads.num_heads % heads.count("key"):
        raise ValueError(
            f"num_heads={heads.num_heads} is not divisible by num_query_groups="
            f"{heads.num_query_groups}; give numbers that are."
        )
    return num_rows // total


def check_head_dims(
    blocks: Mapping[str, Blocks], weights: Mapping[str, Weight], heads: Mapping[str, Heads]
) -> None:
    """Check that the weights of each attention agree on the size of a head.

    A wrong ``num_heads`` divides many numbers of rows without a remainder, but then Query and Key
    differ, or a fused weight and the projection of the output.

    Raises:
        ValueError: they do not agree.
    """
    sizes: dict[str, dict[str, float]] = {}
    for name, made in blocks.items():
        if made.head_dim and weights[name].parts != ("value",):
            sizes.setdefault(_module(name), {})[name] = made.head_dim
    for name, made in blocks.items():
        if weights[name].role == "attention_projection":
            found = sizes.get(_module(name), {})
            count = heads[name].count("query")
            if count and any(len(weights[other].parts) == 3 for other in found):
                found[name] = made.shape[weights[name].column_dims[-1]] / count
    for module, found in sizes.items():
        if len(set(found.values())) > 1:
            raise ValueError(
                f"Weights of {module!r} do not agree on the size of a head: {found}. Give the "
                f"model's num_heads and num_query_groups, or other rules: "
                f"rules={{'{module}.*': 'row'}}."
            )


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]
