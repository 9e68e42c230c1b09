"""What a file of format ``torch`` holds of a model-parallel part <-> whole buckets of this run.

Imports ``state_view``, ``stored_v`` and ``slices``. All in host memory, on the first rank of a
group. Used by ``parameter_state``, which describes Adam-mini's format; a file of Megatron's Adam
has whole buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.mcore.slices import ShardedBuffer
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.mcore.stored_v import elements_of, rows_and_columns_of
from megatron_adam_mini.plan.layout import Placement
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.state import HOST

KINDS = ("param", "exp_avg", "exp_avg_sq")
#: v of columns.
COLUMNS = "exp_avg_sq_columns"
#: Key of a list of what each optimizer in a chain of Megatron's has, dense and experts.
MEMBERS = "members"
#: Key of the parameters in Adam-mini's files, and the name of their format.
PARAMETERS = "parameters"

#: ``param`` and ``exp_avg``, and v per element, of one whole bucket: float32, ``(bucket.numel,)``.
BucketValues = dict[str, Tensor]


def no_values(numel: int) -> BucketValues:
    """Return zeros for so many elements."""
    return {kind: torch.zeros(numel, dtype=torch.float32, device=HOST) for kind in KINDS}


def parameter_of(
    whole: Mapping[str, Tensor], placement: Placement, blocks: ParameterBlocks
) -> dict[str, Tensor]:
    """Return a parameter of a bucket as it is stored: new tensors.

    Args:
        whole: values of the bucket.
        placement: where the parameter is in it.
        blocks: of the parameter.
    """
    found = {kind: flat[placement.start : placement.end].clone() for kind, flat in whole.items()}
    if blocks.pattern is not None:
        found["exp_avg_sq"], columns = rows_and_columns_of(blocks, found["exp_avg_sq"])
        if columns is not None:
            found[COLUMNS] = columns
    return found


@dataclass(frozen=True)
class StoredParameters:
    """A file of Adam-mini.

    Attributes:
        view: the optimizer that loads it.
        parameters: of the file, by checkpoint key; empty on ranks that do not read it.
        sources: blocks of the file's v, by parameter of the rank; ``None``: it has no state there.
    """

    view: StateView
    parameters: Mapping[str, Mapping[str, Tensor]]
    sources: Sequence[ParameterBlocks | None]

    def check(self, number: int) -> None:
        """Check that the file has all parameters of a buffer, in this run's shapes.

        Raises:
            ValueError: it has not.
        """
        for held in self.view.inner.plan.buffers[number].slices:
            for placement in held.bucket.placements:
                source = self.sources[placement.parameter]
                if source is not None:
                    self._stored(source, placement)

    def bucket(self, number: int, bucket: int) -> BucketValues:
        """Return the values of a bucket of a buffer."""
        layout = self.view.inner.plan.buffers[number].slices[bucket].bucket
        whole = no_values(layout.numel)
        for placement in layout.placements:
            source = self.sources[placement.parameter]
            if source is None:
                continue
            stored = self._stored(source, placement)
            for kind, flat in whole.items():
                values = stored[kind]
                if kind == "exp_avg_sq" and source.pattern is not None:
                    columns = stored.get(COLUMNS)
                    values = elements_of(source, values, columns, 0, source.info.numel)
                flat[placement.start : placement.end] = values
        return whole

    def _stored(self, source: ParameterBlocks, placement: Placement) -> Mapping[str, Tensor]:
        key, numel = source.info.checkpoint_key, placement.end - placement.start
        found = self.parameters.get(key)
        if found is None or found["param"].numel() != numel:
            has = "lacks it" if found is None else f"has {found['param'].numel()} elements of it"
            raise ValueError(
                f"This rank has {numel} elements of {key!r}, and the file of the checkpoint {has}: "
                "it was saved under another tensor- or pipeline-parallel layout, and format torch "
                "loads under its own only. Load it under that layout and save it with "
                "--ckpt-format torch_dist (or --ckpt-convert-format torch_dist), which loads under "
                "any."
            )
        return found


@dataclass(frozen=True)
class StoredBuffers:
    """A file of Megatron's Adam, in which buckets lack their padding.

    Attributes:
        view: the optimizer that loads it.
        stored: what ``get_parameter_state_dp_zero`` of Megatron returned; empty on ranks that do
            not read it.
    """

    view: StateView
    stored: Mapping[Any, Any]

    def check(self, number: int) -> None:
        """Check that the file has a buffer, in this run's size.

        Raises:
            ValueError: it has not.
        """
        self._stored(number)

    def bucket(self, number: int, bucket: int) -> BucketValues:
        """Return the values of a bucket of a buffer."""
        found, sizes = self._stored(number)
        begin = sum(sizes[:bucket])
        whole = no_values(self.view.inner.plan.buffers[number].slices[bucket].bucket.numel)
        for kind, flat in whole.items():
            flat[: sizes[bucket]] = found[kind][begin : begin + sizes[bucket]]
        return whole

    def _stored(self, number: int) -> tuple[dict[str, Any], list[int]]:
        """Return a buffer's entry in the file, and the sizes of its buckets there."""
        inner = self.view.inner
        buffer, plan = inner.buffers[number], inner.plan.buffers[number]
        assert isinstance(buffer, ShardedBuffer)
        sizes = [buffer.unpadded_numel(index) for index in range(len(plan.slices))]
        members = self.stored.get(MEMBERS, (self.stored,))
        found = None
        if plan.domain < len(members):
            found = buffer.of_megatrons_state(members[plan.domain] or {})
        if found is None or found["numel_unpadded"] != sum(sizes):
            has = "nothing" if found is None else f"{found['numel_unpadded']} elements"
            raise ValueError(
                f"The file of Megatron's Adam has {has} for buffer {number}, this rank "
                f"{sum(sizes)} elements. Format torch loads under the layout that it was saved "
                "with; save it again with --ckpt-format torch_dist, or use --no-load-optim."
            )
        return found, sizes
