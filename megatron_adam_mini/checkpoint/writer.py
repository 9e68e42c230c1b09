"""A torch_dist checkpoint, written box by box, that gets its name only when it is complete.

Imports torch. One process writes ``__0_0.distcp``, ``__0_1.distcp``, ...; ``.metadata`` comes last,
then the folder gets its name. A folder under another name is incomplete.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_adam_mini.checkpoint.chunks import StoredChunk
from megatron_adam_mini.checkpoint.common_state import save_common
from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.metadata import FILE_NAME, write_metadata
from megatron_adam_mini.checkpoint.reader import (
    COMMON_FILE,
    COMMON_KEY,
    CONFIG_FILE,
    TRACKER_FILE,
    Checkpoint,
    iteration_folder,
)

#: A new file is started after this many bytes.
_FILE_BYTES = 8 << 30
_BLOCK = 1 << 22


class CheckpointWriter:
    """Writes the entries of a checkpoint that is made from another one.

    Args:
        source: checkpoint that it is made from.
        folder: empty folder to write into.
    """

    def __init__(self, source: Checkpoint, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._entries: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._file: BinaryIO | None = None
        self._number = -1

    def copy(self, keys: Sequence[str]) -> None:
        """Copy entries unchanged, byte for byte, except the common state."""
        for key in keys:
            if key in self._source.tensors:
                tensor = self._source.tensors[key]
                self._declare(key, tensor.shape, tensor.dtype)
                for chunk in tensor.chunks:
                    self._copy_bytes(chunk)
            elif key != COMMON_KEY:
                self._copy_bytes(self._source.objects[key])
                self._entries[key] = BytesStorageMetadata()

    def add(
        self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor
    ) -> None:
        """Write a box of a tensor.

        Args:
            key: entry.
            shape: shape of the whole tensor.
            offset: first index of the box.
            values: the box.
        """
        self._declare(key, shape, values.dtype)
        # Without the clone, a view would be stored with all of its storage.
        values = values.clone() if values.numel() * values.itemsize != _held(values) else values
        buffer = io.BytesIO()
        torch.save(values, buffer)
        self._place(key, tuple(offset), tuple(values.shape), buffer.getbuffer())

    def finish(self, common: dict[str, Any]) -> None:
        """Write the common state, other files and finally the metadata."""
        if self._source.has_common_file:
            (self._folder / COMMON_FILE).write_bytes(save_common(common, as_object=False))
        else:
            self._place(COMMON_KEY, (), (), save_common(common, as_object=True))
            self._entries[COMMON_KEY] = BytesStorageMetadata()
        self._close()
        _copy_other_files(self._source.folder, self._folder)
        write_metadata(
            self._folder,
            Metadata(
                state_dict_metadata=self._entries,
                storage_data=self._storage,
                version=getattr(self._source.metadata, "version", None),
            ),
        )
        for path in self._folder.iterdir():
            _sync(path)
        _sync(self._folder)

    def _declare(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if key not in self._entries:
            self._entries[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(shape), []
            )

    def _place(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], data: Any) -> None:
        file = self._next_file()
        position = file.tell()
        file.write(data)
        self._record(key, offset, shape, position, len(data))

    def _copy_bytes(self, chunk: StoredChunk) -> None:
        file = self._next_file()
        position, left = file.tell(), chunk.length
        try:
            with chunk.path.open("rb") as source:
                source.seek(chunk.position)
                while left:
                    data = source.read(min(left, _BLOCK))
                    if not data:
                        raise CorruptError(f"{chunk}: the file is truncated.")
                    file.write(data)
                    left -= len(data)
        except FileNotFoundError as error:
            raise CorruptError(f"{chunk}: the file is missing.") from error
        self._record(chunk.key, chunk.offset, chunk.shape, position, chunk.length)

    def _record(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], position: int, length: int
    ) -> None:
        entry = self._entries.get(key)
        index = MetadataIndex(key)
        if isinstance(entry, TensorStorageMetadata):
            index = MetadataIndex(key, torch.Size(offset), len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
        self._storage[index] = _StorageInfo(f"__0_{self._number}.distcp", position, length)

    def _next_file(self) -> BinaryIO:
        if self._file is None or self._file.tell() > _FILE_BYTES:
            self._close()
            self._number += 1
            self._file = (self._folder / f"__0_{self._number}.distcp").open("wb")
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class AtomicResult:
    """A folder or file that gets its name only when it is complete; use it as a context manager.

    Args:
        source: what it is made from, which shows whether it is a save or an iteration folder.
        destination: final path; it must not exist.

    Attributes:
        folder: iteration folder to write into.

    Raises:
        UnreadableError: the destination exists, or its parent does not.
    """

    def __init__(self, source: Path, destination: Path) -> None:
        destination = Path(os.path.abspath(destination))
        refuse_existing(destination)
        self._destination = destination
        self._partial = partial_path(destination)
        folder, tracker = iteration_folder(source)
        self._tracker = tracker
        self.folder = self._partial / folder.name if tracker is not None else self._partial

    def __enter__(self) -> AtomicResult:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        if not (self.folder / FILE_NAME).exists():
            raise RuntimeError(f"{self.folder} was left without being finished.")
        if self._tracker is not None:
            tracker = self._partial / TRACKER_FILE
            tracker.write_text(self._tracker, encoding="utf-8")
            _sync(tracker)
            _sync(self._partial)
        refuse_existing(self._destination)
        self._partial.rename(self._destination)
        _sync(self._destination.parent)


def partial_path(destination: Path) -> Path:
    """Return the name under which a result is written before it is complete."""
    return destination.with_name(f"{destination.name}.partial-{os.getpid()}")


def refuse_existing(destination: Path) -> None:
    """Refuse a destination that exists, or whose parent does not.

    Raises:
        UnreadableError: says which.
    """
    if destination.exists() or destination.is_symlink():
        raise UnreadableError(f"{destination} exists already; give another name or remove it.")
    if not destination.parent.is_dir():
        raise UnreadableError(f"{destination.parent} does not exist; make it first.")


def _copy_other_files(source: Path, destination: Path) -> None:
    """Copy files other than tensors and metadata, but no hashes: they would be wrong."""
    own = {FILE_NAME, COMMON_FILE, "integrity.json"}
    for path in sorted(source.iterdir()):
        if path.name in own or path.suffix == ".distcp":
            continue
        if path.is_dir():
            shutil.copytree(path, destination / path.name)
        else:
            shutil.copy2(path, destination / path.name)
    assert (destination / CONFIG_FILE).exists()


def _held(values: Tensor) -> int:
    return values.untyped_storage().nbytes()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
