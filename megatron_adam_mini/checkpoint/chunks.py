"""One stored chunk: a ``torch.save`` container, which is a zip, inside a larger file.

Imports torch and zipfile. torch's own reader ignores the checksums of the zip; here every chunk
that is read completely is checked against them. Tensors are read in windows, so memory use does
not depend on the size of a chunk.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.checkpoint.errors import CorruptError

#: Elements of a window. A conversion holds only a few windows of float64 at a time.
WINDOW_NUMEL = 1 << 22

#: Type of a storage's elements by its class; untyped ones hold bytes.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class StoredChunk:
    """Where the bytes of a chunk are, and which part of which entry they hold.

    Attributes:
        key: entry of the checkpoint.
        offset: first index of the box in the whole tensor (empty for objects).
        shape: shape of the box (empty for objects).
        path: file.
        position: first byte in the file.
        length: number of bytes.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    position: int
    length: int

    def __str__(self) -> str:
        """Name the chunk for messages: key, place in the tensor, file."""
        place = f" at {list(self.offset)}" if self.offset else ""
        return f"{self.key}{place} in {self.path}"


@dataclass(frozen=True)
class _Header:
    """Description of a chunk's tensor, from its ``data.pkl``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    contiguous: bool
    member: str


class _ByteRange(io.RawIOBase):
    """A part of a file that reads like a file."""

    def __init__(self, path: Path, position: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._first, self._length, self._at = position, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._first + self._at)
        got = self._file.readinto(memoryview(buffer)[:count])
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


class ChunkReader:
    """Reads one chunk; use it as a context manager.

    Raises:
        CorruptError: the file is missing or too short, a checksum does not match, or the tensor is
            not the one in the metadata; the message names key and file.
    """

    def __init__(self, chunk: StoredChunk) -> None:
        self.chunk = chunk
        try:
            size = chunk.path.stat().st_size
        except OSError as error:
            raise CorruptError(f"{chunk}: the file is missing ({error.strerror}).") from error
        if chunk.position + chunk.length > size:
            raise CorruptError(
                f"{chunk}: the file is truncated; it has {size} bytes, the chunk ends at byte "
                f"{chunk.position + chunk.length}."
            )
        self._bytes = io.BufferedReader(_ByteRange(chunk.path, chunk.position, chunk.length))
        try:
            self._zip = zipfile.ZipFile(self._bytes)
        except zipfile.BadZipFile as error:
            self._bytes.close()
            raise self._damaged(error) from error

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._bytes.close()

    def object_bytes(self) -> bytes:
        """Return the whole chunk after checking all checksums."""
        self.check_members()
        self._bytes.seek(0)
        return self._bytes.read()

    def check_members(self, *, skip_tensor: bool = False) -> None:
        """Check the checksum of every part of the container."""
        for info in self._zip.infolist():
            if skip_tensor and "/data/" in info.filename:
                continue
            try:
                with self._zip.open(info) as stream:
                    while stream.read(1 << 20):
                        pass
            except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
                raise self._damaged(error) from error

    def dtype(self) -> torch.dtype:
        """Return the dtype of the stored tensor."""
        return self._header().dtype

    def windows(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield the tensor in boxes of at most ``WINDOW_NUMEL`` elements (or one row).

        Yields:
            Index of the box in the whole tensor of the key, and its values. The checksum is checked
            after the last one only: a caller that writes what it reads must be able to undo that.
        """
        header = self._header()
        if not header.contiguous:
            tensor = self._as_stored()
            for offset, shape in boxes_of(self.chunk.shape):
                part = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
                yield self._shift(offset), tensor[part].contiguous()
            return
        try:
            with self._zip.open(header.member) as stream:
                for offset, shape in boxes_of(self.chunk.shape):
                    size = math.prod(shape) * header.dtype.itemsize
                    data = bytearray(stream.read(size))
                    if len(data) != size:
                        raise EOFError("it ends too early")
                    tensor = (
                        torch.frombuffer(data, dtype=header.dtype)
                        if size
                        else torch.empty(0, dtype=header.dtype)
                    )
                    yield self._shift(offset), tensor.view(shape)
                stream.read(1)  # reaches the end, where the checksum is compared
        except (zipfile.BadZipFile, EOFError) as error:
            raise self._damaged(error) from error

    def box(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return the box of the tensor at ``offset`` in the chunk; no checksum is checked."""
        header = self._header()
        part = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
        if not header.contiguous or self._zip.getinfo(header.member).compress_type:
            return self._as_stored()[part].contiguous()
        info = self._zip.getinfo(header.member)
        start = self.chunk.position + info.header_offset
        with self.chunk.path.open("rb") as file:
            file.seek(start + 26)  # lengths of name and extra field in the local header
            lengths = np.frombuffer(file.read(4), dtype="<u2")
        stored: Any = np.memmap(
            self.chunk.path,
            mode="r",
            dtype=f"u{header.dtype.itemsize}",
            shape=header.shape,
            offset=start + 30 + int(lengths.sum()),
        )
        return torch.from_numpy(np.array(stored[part])).view(header.dtype)

    def _header(self) -> _Header:
        try:
            name = next(n for n in self._zip.namelist() if n.endswith("/data.pkl"))
            header = _HeaderUnpickler(io.BytesIO(self._zip.read(name)), name).load()
        except Exception as error:  # a damaged pickle can fail in any way
            raise self._damaged(error) from error
        if not isinstance(header, _Header) or header.shape != self.chunk.shape:
            shape = list(header.shape) if isinstance(header, _Header) else type(header).__name__
            raise CorruptError(
                f"{self.chunk}: stored shape {shape}, but .metadata says {list(self.chunk.shape)}."
            )
        return header

    def _as_stored(self) -> Tensor:
        self.check_members()
        self._bytes.seek(0)
        tensor: Tensor = torch.load(self._bytes, map_location="cpu", weights_only=True)
        return tensor

    def _shift(self, offset: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self.chunk.offset, offset, strict=True))

    def _damaged(self, error: Exception) -> CorruptError:
        return CorruptError(f"{self.chunk}: the bytes are damaged: {error}")


class _HeaderUnpickler(pickle.Unpickler):
    """Reads shape and dtype of a stored tensor; makes no tensor, and refuses all other names."""

    def __init__(self, file: io.BytesIO, member: str) -> None:
        super().__init__(file)
        self._folder = member.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return _header_of
        if path == "torch._utils._rebuild_parameter":
            return lambda header, *_: header
        if path == "collections.OrderedDict":
            return dict
        if path == "torch.Size":
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {path}, which no plain tensor needs")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        _, dtype, key, _, numel = pid
        return f"{self._folder}data/{key}", dtype, int(numel)


def _header_of(
    storage: tuple[str, torch.dtype, int], start: int, shape: Any, stride: Any, *rest: Any
) -> _Header:
    member, dtype, numel = storage
    if len(rest) > 2 and isinstance(rest[2], torch.dtype):
        numel = numel // rest[2].itemsize
        dtype = rest[2]
    size = tuple(int(s) for s in shape)
    dense = torch.empty(size, device="meta").stride() == tuple(stride) or math.prod(size) <= 1
    return _Header(dtype, size, dense and start == 0 and numel == math.prod(size), member)


def boxes_of(shape: tuple[int, ...], limit: int | None = None) -> Iterator[Box]:
    """Cut a tensor into boxes of at most ``limit`` elements, in the order of memory.

    Yields:
        Offset and shape; a box exceeds the limit only if it cannot be cut further along
        dimension 0.
    """
    limit = WINDOW_NUMEL if limit is None else limit
    if not shape or math.prod(shape) <= limit:
        yield (0,) * len(shape), shape
        return
    rest = shape[1:]
    rows = limit // math.prod(rest)
    for first in range(0, shape[0], max(rows, 1)):
        if rows:
            yield (first, *(0,) * len(rest)), (min(rows, shape[0] - first), *rest)
        else:
            for offset, size in boxes_of(rest, limit):
                yield (first, *offset), (1, *size)
