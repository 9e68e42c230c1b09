"""What Triton needs on a machine to compile kernels, and what of it is there.

Standard library only: it is asked after Triton has failed.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def describe_toolchain() -> str:
    """Return a sentence on the cache folder, the C compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return (
        f"Triton writes to {_cache_folder()}, and builds a C module with {_compiler()} and "
        f"{headers} ({'there' if headers.exists() else 'missing'})"
    )


def _cache_folder() -> str:
    given = os.environ.get("TRITON_CACHE_DIR")
    home = os.environ.get("TRITON_HOME", "~")
    folder = Path(given or Path(home, ".triton", "cache")).expanduser()
    # Path's own exists() raises where one may not look.
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    name = f"TRITON_CACHE_DIR={given}" if given else f"{folder} (TRITON_CACHE_DIR is not set)"
    return name + (", which is writable" if writable else f", but {parent} is not writable")


def _compiler() -> str:
    given = os.environ.get("CC")
    found = shutil.which(given) if given else shutil.which("gcc") or shutil.which("clang")
    if given:
        return f"CC={given} ({'there' if found else 'missing'})"
    return found or "a C compiler, but CC is not set and neither gcc nor clang is there"
