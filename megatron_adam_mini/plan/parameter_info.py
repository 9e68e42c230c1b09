"""What the partition must know of one parameter: name, shape, role, heads, tensor-parallel split.

Imports ``roles``. Data flow: the running model (mcore/param_info), a checkpoint (convert/blocks) or
a description of a model (estimate/stages) -> **ParameterInfo** -> partition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.plan.roles import role_of

#: Roles of weights whose rows form heads -> which parts of attention such a weight holds.
HEAD_PARTS = {
    "qkv": ("query", "key", "value"),
    "query": ("query",),
    "key_value": ("key", "value"),
    "latent_query": ("query",),
    "latent_key_value": ("key", "value"),
}


_GATED = re.compile(r"\.linear_fc1\.weight\d*$")


def num_stacked(name: str, *, gated: bool) -> int:
    """Return the number of matrices in the rows of a weight, see :class:`ParameterInfo`.

    Args:
        name: of the weight.
        gated: whether the model's MLPs are gated.
    """
    return 2 if gated and _GATED.search(name) else 1


@dataclass(frozen=True, kw_only=True)
class HeadGeometry:
    """How the rows of an attention weight form heads.

    Rows come in ``num_query_groups`` equal groups. A group of a fused QKV weight has the Query
    heads of the group, as many gate heads if the attention output is gated, one Key head and one
    Value head; other weights hold some of these parts only.

    Attributes:
        num_heads: Query heads of the layer.
        num_query_groups: Key heads of the layer.
        head_dim: rows of a Query, gate or Key head.
        gated: whether the attention output is gated.
        holds: the parts in the weight, of ``query``, ``key`` and ``value``.
        value_head_dim: rows of a Value head; ``None``: ``head_dim``.
    """

    num_heads: int
    num_query_groups: int
    head_dim: int
    gated: bool = False
    holds: tuple[str, ...] = HEAD_PARTS["qkv"]
    value_head_dim: int | None = None

    @classmethod
    def of(cls, source: Any, role: str = "qkv") -> HeadGeometry:
        """Read the geometry from any object with Megatron's names for it.

        Megatron's ``TransformerConfig``, the ``args`` in its checkpoints and ``estimate``'s model
        differ in what they leave out:

        * ``num_query_groups`` counts only with ``group_query_attention``, a switch of the command
          line that ``TransformerConfig`` does not have. If it is off, or the number is ``None``,
          every attention head has a Key and a Value of its own.
        * ``kv_channels`` may be ``None`` or missing: then ``hidden_size`` is divided by the heads.
        * ``attention_output_gate`` is missing in older releases.

        Args:
            source: the object.
            role: the weight's, a key of ``HEAD_PARTS``.

        Raises:
            AttributeError: ``source`` lacks another name that is needed.
        """
        heads, holds = source.num_attention_heads, HEAD_PARTS[role]
        if role.startswith("latent"):
            # The rotary part of a Key is common to all heads; kv_down_proj makes it.
            rotary = source.qk_pos_emb_head_dim if role == "latent_query" else 0
            return cls(
                num_heads=heads,
                num_query_groups=heads,
                head_dim=source.qk_head_dim + rotary,
                holds=holds,
                value_head_dim=source.v_head_dim,
            )
        grouped = getattr(source, "group_query_attention", True) and role == "qkv"
        return cls(
            num_heads=heads,
            num_query_groups=(source.num_query_groups if grouped else None) or heads,
            head_dim=getattr(source, "kv_channels", None) or source.hidden_size // heads,
            gated=role == "qkv" and bool(getattr(source, "attention_output_gate", False)),
            holds=holds,
        )

    @classmethod
    def stored(cls, numbers: Mapping[str, Any], role: str) -> HeadGeometry:
        """Return the geometry that :meth:`to_store` described.

        Args:
            numbers: the description.
            role: the weight's, a key of ``HEAD_PARTS``.

        Raises:
            TypeError: it is not such a description.
        """
        return cls(holds=HEAD_PARTS[role], **numbers)

    def to_store(self) -> dict[str, int]:
        """Return plain values for a checkpoint: all but what the role tells."""
        return {
            "num_heads": self.num_heads,
            "num_query_groups": self.num_query_groups,
            "head_dim": self.head_dim,
            "gated": self.gated,
            "value_head_dim": self.value_dim,
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of one group in the order of its rows: ``query``, ``gate``, ``key``, ``value``."""
        if self.gated and self.holds[0] == "query":
            return ("query", "gate", *self.holds[1:])
        return self.holds

    @property
    def value_dim(self) -> int:
        """Rows of a Value head."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def num_rows(self) -> int:
        """Rows of the whole weight."""
        rows = {
            "query": self.num_heads * self.head_dim,
            "gate": self.num_heads * self.head_dim,
            "key": self.num_query_groups * self.head_dim,
            "value": self.num_query_groups * self.value_dim,
        }
        return sum(rows[part] for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What the partition must know of one parameter on one rank.

    Attributes:
        name: name in the whole model (global layer number), the same on all ranks; rules match
            it.
        shape: shape of this rank's tensor-parallel shard.
        role: a key of the rule table, or ``"unknown"``.
        tp_dim: dimension that tensor parallelism splits, ``None`` if it is replicated.
        tp_size: tensor-parallel size of the group that splits it (expert-TP for experts).
        tp_rank: this rank in that group.
        heads: for the roles in ``HEAD_PARTS``.
        expert: whether it is reduced over the expert-data-parallel group.
        in_norm: whether it counts in the gradient norm on this rank (not shared, not a TP
            duplicate).
        num_stacked: matrices of equal size that the rows of each tensor-parallel shard hold, one
            after the other: 2 for the first weight of a gated MLP (gate, up), else 1.
        key: its key in checkpoints, layer number included; ``""``: as ``name``. Models that name
            their parameters differently can share checkpoints.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    tp_dim: int | None = None
    tp_size: int = 1
    tp_rank: int = 0
    heads: HeadGeometry | None = None
    expert: bool = False
    in_norm: bool = True
    num_stacked: int = 1
    key: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        heads: Callable[[str], HeadGeometry | None],
        *,
        tp_dim: int | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        **facts: Any,
    ) -> ParameterInfo:
        """Describe a parameter by its name.

        Args:
            name: see the class.
            shape: see the class.
            heads: takes a role in ``HEAD_PARTS`` and returns the geometry of such a weight; called
                for these only, because not every module has attention.
            tp_dim: dimension that is split, even if over a group of one rank.
            tp_size: size of the group.
            tp_rank: this rank in the group.
            facts: further attributes.
        """
        role = role_of(name, len(shape))
        split = tp_dim is not None and tp_size > 1
        return cls(
            name=name,
            shape=shape,
            role=role,
            heads=heads(role) if role in HEAD_PARTS else None,
            tp_dim=tp_dim if split else None,
            tp_size=tp_size if split else 1,
            tp_rank=tp_rank if split else 0,
            **facts,
        )

    @property
    def checkpoint_key(self) -> str:
        """``key`` with its default."""
        return self.key or self.name

    @property
    def numel(self) -> int:
        """Elements of this rank's shard."""
        return math.prod(self.shape)

    @property
    def row_numel(self) -> int:
        """Elements of one local row (1 for a vector)."""
        return math.prod(self.shape[1:])

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(
            size * self.tp_size if dim == self.tp_dim else size
            for dim, size in enumerate(self.shape)
        )

    @property
    def row_offset(self) -> int:
        """Row of the whole tensor at which this rank's rows start."""
        return self.tp_rank * self.shape[0] if self.tp_dim == 0 else 0

    @property
    def rows_are_split(self) -> bool:
        """Whether each tensor-parallel rank has rows of its own, so a block may span ranks."""
        return self.tp_dim == 0 and self.tp_size > 1

    @property
    def row_parallel(self) -> bool:
        """Whether every tensor-parallel rank holds a part of each row."""
        return (self.tp_dim or 0) > 0 and self.tp_size > 1

    @property
    def part_of_rows(self) -> tuple[int, int]:
        """Into how many parts tensor parallelism splits each row, and which one is here."""
        return (self.tp_size, self.tp_rank) if self.row_parallel else (1, 0)
