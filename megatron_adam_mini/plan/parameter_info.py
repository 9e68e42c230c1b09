"""What the partition must know of one parameter: name, shape, role, heads, tensor-parallel split.

Imports ``roles``. Data flow: the running model (mcore/param_info), a checkpoint (convert/blocks) or
a description of a model (estimate/stages) -> **ParameterInfo** -> partition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.plan.roles import role_of


@dataclass(frozen=True, kw_only=True)
class HeadGeometry:
    """How the rows of a fused QKV weight form heads.

    Rows come in ``num_query_groups`` equal groups, each with the Query heads of the group, as many
    gate heads if the attention output is gated, one Key head and one Value head.
    """

    num_heads: int
    num_query_groups: int
    head_dim: int
    gated: bool = False

    @classmethod
    def of(cls, source: Any) -> HeadGeometry:
        """Read the geometry from any object with Megatron's names for it.

        Megatron's ``TransformerConfig``, the ``args`` in its checkpoints and ``estimate``'s model
        differ in what they leave out:

        * ``num_query_groups`` counts only with ``group_query_attention``, a switch of the command
          line that ``TransformerConfig`` does not have. If it is off, or the number is ``None``,
          every attention head has a Key and a Value of its own.
        * ``kv_channels`` may be ``None`` or missing: then ``hidden_size`` is divided by the heads.
        * ``attention_output_gate`` is missing in older releases.

        Raises:
            AttributeError: ``source`` lacks another name that is needed.
        """
        heads = source.num_attention_heads
        grouped = getattr(source, "group_query_attention", True)
        return cls(
            num_heads=heads,
            num_query_groups=(source.num_query_groups if grouped else None) or heads,
            head_dim=getattr(source, "kv_channels", None) or source.hidden_size // heads,
            gated=bool(getattr(source, "attention_output_gate", False)),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the whole fused weight."""
        query_rows = self.num_heads * (2 if self.gated else 1)
        return (query_rows + 2 * self.num_query_groups) * self.head_dim


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
        heads: for ``role="qkv"``.
        expert: whether it is reduced over the expert-data-parallel group.
        in_norm: whether it counts in the gradient norm on this rank (not shared, not a TP
            duplicate).
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
    key: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        heads: Callable[[], HeadGeometry | None],
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
            heads: returns the geometry of its attention; called for fused QKV weights only,
                because not every module has one.
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
            heads=heads() if role == "qkv" else None,
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
