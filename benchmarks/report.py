"""Heading of every result file: the date, the machine, the versions and the command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """Describe the machine, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()}-core {platform.machine()} machine, {memory:.0f} GiB, no GPU used"


def versions() -> str:
    """Return the versions on which results depend."""
    names = ("torch", "megatron-core", "numpy")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {platform.python_version()}, {found}"


def heading(title: str, module: str) -> str:
    """Return the first lines of a result file."""
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return (
        f"# {title}, {date.today().isoformat()}\n\n"
        f"Command: `{command}`. Machine: {machine()}. {versions()}; CPU host, gloo.\n"
    )


def write(name: str, text: str) -> Path:
    """Write a dated result file and return its path."""
    path = RESULTS / f"{date.today().isoformat()}-{name}.md"
    path.write_text(text)
    return path
