"""Texts -> tokens, for training and, from other files, for validation.

Imports torch, numpy and ``settings``. A token is a byte of UTF-8; 256 ends a document.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evidence.settings import CORPORA

END_OF_DOCUMENT = 256
#: Of the files, the last in the order of a hash of their names.
HELD_OUT = 0.05
#: Folders of third-party packages, or of tests, which some Pythons lack.
_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text.

    Attributes:
        training, validation: token numbers, int32 or uint16, shape ``(tokens,)``.
        digest: of all of them, so that runs on different texts are not compared.
    """

    training: Tensor
    validation: Tensor
    digest: str


@cache
def read(name: str) -> Corpus:
    """Read a corpus.

    Args:
        name: ``source``: the Python standard library, *.py without tests. ``docstrings``: the
            docstrings in these files, which are mostly English. Else the path of a ``.npy`` file
            of token numbers, whose last part is held out.

    Raises:
        ValueError: there is no such corpus.
    """
    if name in CORPORA:
        documents = [
            np.append(np.frombuffer(text, dtype=np.uint8).astype(np.uint16), END_OF_DOCUMENT)
            for text in _texts(Path(sysconfig.get_path("stdlib")), docstrings=name == "docstrings")
        ]
        kept = len(documents) - max(1, round(len(documents) * HELD_OUT))
        parts = [np.concatenate(documents[:kept]), np.concatenate(documents[kept:])]
    elif name.endswith(".npy") and Path(name).exists():
        tokens = np.load(name, mmap_mode="r")
        parts = np.split(tokens, [int(len(tokens) * (1 - HELD_OUT))])
    else:
        raise ValueError(
            f"There is no corpus {name!r}; give {', '.join(CORPORA)}, or the path of a .npy file "
            "of token numbers."
        )
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    training, validation = (torch.from_numpy(part.astype(np.int32)) for part in parts)
    return Corpus(training, validation, digest.hexdigest()[:16])


def _texts(folder: Path, *, docstrings: bool) -> Iterator[bytes]:
    names = (path.relative_to(folder) for path in folder.rglob("*.py"))
    kept = [name for name in names if _EXCLUDED.isdisjoint(name.parts)]
    for name in sorted(kept, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        text = (folder / name).read_bytes()
        if docstrings:
            text = _docstrings(text)
        if text:
            yield text


def _docstrings(source: bytes) -> bytes:
    """Return the docstrings of a module one after the other, with an empty line between."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    except (SyntaxError, ValueError):  # templates of lib2to3 and the like
        return b""
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text).encode()


def draw(
    tokens: Tensor, *, samples: int, sequence: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw samples at random places.

    Returns:
        Tokens and labels, int64, each of shape ``(samples, sequence)``.
    """
    starts = torch.randint(len(tokens) - sequence, (samples,), generator=generator)
    return at(tokens, starts, sequence=sequence)


def at(tokens: Tensor, starts: Tensor, *, sequence: int) -> tuple[Tensor, Tensor]:
    """Return the samples that begin at some places; see :func:`draw`."""
    windows = tokens[starts[:, None] + torch.arange(sequence + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
