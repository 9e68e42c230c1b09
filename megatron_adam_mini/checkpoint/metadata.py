"""``.metadata`` of a torch_dist checkpoint: read without trusting it, and written.

Imports torch's metadata classes only. The file is a pickle, and a pickle can run any code; so it
is read by an unpickler that allows these classes and refuses every other name.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_adam_mini.checkpoint.errors import UnreadableError

FILE_NAME = ".metadata"

#: Module -> names that a metadata file may contain. Megatron adds the ranks' plans.
_ALLOWED: dict[str, tuple[str, ...]] = {
    metadata.__name__: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem.__name__: ("_StorageInfo", "_StoragePrefix"),
    planner.__name__: (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves the names above and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Return the metadata of a checkpoint folder.

    Raises:
        UnreadableError: the file is missing, holds no metadata, or contains other names than
            torch's metadata classes; says which.
    """
    path = folder / FILE_NAME
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise UnreadableError(
            f"{path} does not exist, so {folder} is no complete torch_dist checkpoint. Give an "
            "iteration folder (iter_0000010) or the folder of --save."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise UnreadableError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise UnreadableError(f"{path} holds no metadata of a torch_dist checkpoint.")
    return found


def write_metadata(folder: Path, content: Metadata) -> None:
    """Write the metadata of a checkpoint folder; this completes it, so call it last."""
    (folder / FILE_NAME).write_bytes(pickle.dumps(content))
