"""A torch_dist checkpoint on disk: its keys, chunks, boxes and common state.

Imports torch; no process group. Data flow: ``metadata``, ``chunks`` -> **Checkpoint** -> tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_adam_mini.checkpoint.chunks import ChunkReader, StoredChunk
from megatron_adam_mini.checkpoint.common_state import load_common
from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.metadata import read_metadata

COMMON_KEY = "common_state/shard_0_1"
COMMON_FILE = "common.pt"
CONFIG_FILE = "metadata.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: shape, dtype, and where its boxes are."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """An iteration folder, opened for reading.

    Args:
        folder: such as ``iter_0000010``; see :func:`iteration_folder`.

    Attributes:
        tensors: by key.
        objects: chunks of everything else, by key.
        common: state that is not a tensor.

    Raises:
        UnreadableError: not a complete torch_dist checkpoint, or it cannot be read.
        CorruptError: the common state is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: dict[str, StoredChunk] = {}
        for key, entry in self.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                chunks = tuple(
                    self._locate(key, tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks
                )
                dtype = entry.properties.dtype
                self.tensors[key] = StoredTensor(key, tuple(entry.size), dtype, chunks)
            elif isinstance(entry, BytesStorageMetadata):
                self.objects[key] = self._locate(key, (), ())
        self.common = self._read_common()

    @property
    def has_common_file(self) -> bool:
        """Whether the common state is a file, as older releases of Megatron write it."""
        return COMMON_KEY not in self.objects

    @property
    def content(self) -> dict[str, Any]:
        """Megatron's content metadata."""
        return dict(self.common.get("content_metadata") or {})

    @property
    def optimizer(self) -> dict[str, Any]:
        """Common state of the optimizer; empty if there is none."""
        found = self.common.get("optimizer")
        return found if isinstance(found, dict) else {}

    def windows(self, tensor: StoredTensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield a tensor in boxes, chunk by chunk; see :meth:`ChunkReader.windows`."""
        for chunk in tensor.chunks:
            with ChunkReader(chunk) as reader:
                if reader.dtype() != tensor.dtype:
                    raise CorruptError(
                        f"{chunk}: stored as {reader.dtype()}, but .metadata says {tensor.dtype}."
                    )
                yield from reader.windows()

    def box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return a box of a tensor, assembled from the chunks that overlap it.

        Raises:
            CorruptError: a part of it is missing or damaged.
        """
        tensor = self.tensors[key]
        found = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        count = 0
        for chunk in tensor.chunks:
            low = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
            high = [
                min(a + s, b + t)
                for a, s, b, t in zip(offset, shape, chunk.offset, chunk.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            size = tuple(b - a for a, b in zip(low, high, strict=True))
            inner = tuple(a - o for a, o in zip(low, chunk.offset, strict=True))
            place = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            with ChunkReader(chunk) as reader:
                found[place] = reader.box(inner, size)
            count += math.prod(size)
        if count != math.prod(shape):
            raise CorruptError(
                f"{key} in {self.folder}: of {math.prod(shape)} elements at {list(offset)}, "
                f"{count} are stored."
            )
        return found

    def read(self, key: str) -> Tensor:
        """Return a whole tensor after checking its checksums; it must fit into memory."""
        tensor = self.tensors[key]
        problem = tiling_problem(tensor)
        if problem:
            raise CorruptError(problem)
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for offset, window in self.windows(tensor):
            found[tuple(slice(o, o + s) for o, s in zip(offset, window.shape, strict=True))] = (
                window
            )
        return found

    def _locate(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> StoredChunk:
        storage: Any = self.metadata.storage_data
        index = MetadataIndex(key, offset) if shape or offset else MetadataIndex(key)
        info = storage.get(index)
        if info is None and not shape:  # a tensor without dimensions
            info = storage.get(MetadataIndex(key, torch.Size([])))
        if info is None:
            raise UnreadableError(
                f"{self.folder}/.metadata has no place for {key} at {list(offset)}."
            )
        if getattr(info, "transform_descriptors", None):
            raise UnreadableError(
                f"{key} in {self.folder} is stored with transformations "
                f"{info.transform_descriptors}, which are not supported; save without them."
            )
        path = Path(info.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise UnreadableError(
                f"{self.folder}/.metadata points outside of the checkpoint: {path}."
            )
        return StoredChunk(key, offset, shape, self.folder / path, info.offset, info.length)

    def _read_common(self) -> dict[str, Any]:
        if COMMON_KEY in self.objects:
            chunk = self.objects[COMMON_KEY]
            with ChunkReader(chunk) as reader:
                return load_common(reader.object_bytes(), str(chunk))
        path = self.folder / COMMON_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise UnreadableError(
                f"{self.folder} holds neither {COMMON_KEY} nor {COMMON_FILE}, so it is no "
                "checkpoint of Megatron."
            ) from error
        return load_common(data, str(path))


def iteration_folder(path: Path) -> tuple[Path, str | None]:
    """Return the iteration folder for a path, and the tracker's text if it is a save folder.

    Raises:
        UnreadableError: it is neither, or the tracker names a folder that does not exist.
    """
    if not path.is_dir():
        raise UnreadableError(f"{path} is no folder.")
    tracker = path / TRACKER_FILE
    if not tracker.exists():
        return path, None
    text = tracker.read_text(encoding="utf-8").strip()
    if text != "release" and not text.isdigit():
        raise UnreadableError(f"{tracker} holds {text!r}, which is no iteration.")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise UnreadableError(f"{tracker} names {folder}, which does not exist.")
    return folder, text


def tiling_problem(tensor: StoredTensor) -> str | None:
    """Return ``None`` if the chunks cover every element exactly once, else the problem.

    Boxes inside the tensor that do not overlap cover it if their sizes add up to its size.
    """
    boxes = tensor.chunks
    for chunk in boxes:
        ends = [o + s for o, s in zip(chunk.offset, chunk.shape, strict=True)]
        if min(chunk.offset, default=0) < 0 or any(
            e > n for e, n in zip(ends, tensor.shape, strict=True)
        ):
            return f"{chunk}: shape {list(chunk.shape)} leaves the tensor {list(tensor.shape)}."
    pair = _overlap(boxes)
    if pair:
        return f"{tensor.key}: boxes at {list(pair[0].offset)} and {list(pair[1].offset)} overlap."
    covered, numel = sum(math.prod(c.shape) for c in boxes), math.prod(tensor.shape)
    if covered != numel:
        return f"{tensor.key}: {numel - covered} of {numel} elements are not stored (a hole)."
    return None


def _overlap(boxes: tuple[StoredChunk, ...]) -> tuple[StoredChunk, StoredChunk] | None:
    """Return two boxes that overlap, comparing each with those that start before its end."""
    if len(boxes) < 2:
        return None
    low = np.array([b.offset for b in boxes], dtype=np.int64).reshape(len(boxes), -1)
    high = low + np.array([b.shape for b in boxes], dtype=np.int64).reshape(len(boxes), -1)
    order = np.lexsort(low.T[::-1])
    low, high = low[order], high[order]
    last = np.searchsorted(low[:, 0], high[:, 0]) if low.shape[1] else np.full(len(boxes), 2)
    for index in range(len(boxes)):
        others = slice(index + 1, int(last[index]))
        meets = ((low[others] < high[index]) & (high[others] > low[index])).all(axis=1)
        if meets.any():
            other = index + 1 + int(meets.argmax())
            return boxes[int(order[index])], boxes[int(order[other])]
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnreadableError(
            f"{path} does not exist, so {folder} is no distributed checkpoint of Megatron. Give an "
            "iteration folder (iter_0000010) or the folder of --save."
        ) from error
    except ValueError as error:
        raise UnreadableError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("sharded_backend") != "torch_dist":
        raise UnreadableError(f"{path} does not describe a torch_dist checkpoint: {config!r}.")
    return config
