"""The log: one JSON line for each run that is done, written at once, read to resume.

Imports ``settings``.
"""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from evidence.settings import Run


class RunLog:
    """A file of runs that one process at a time appends to.

    Args:
        path: of the file; it and its folder are made.

    Raises:
        RuntimeError: another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"Another sweep writes to {path}; wait for it, or give another --log."
            ) from error
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # a kill cut off the last line
            self._file.write("\n")
        self.results = read(path)

    def append(self, run: Run, result: dict[str, Any]) -> None:
        """Add a run that is done."""
        line = {"run": run.to_json(), "result": result, "environment": _environment(run.device)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.results[run] = result


def read(path: Path) -> dict[Run, dict[str, Any]]:
    """Return what the lines of a log say, without lines that a kill cut off."""
    return {Run.from_json(line["run"]): line["result"] for line in _lines(path)}


def environments(path: Path) -> list[dict[str, str]]:
    """Return the different environments in which the runs of a log were made."""
    found = [line["environment"] for line in _lines(path)]
    return [one for number, one in enumerate(found) if one not in found[:number]]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def _environment(device: str) -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }
