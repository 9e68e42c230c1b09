"""The log: one JSON line for each run that is done, written at once, read to resume.

Imports ``settings``.
"""

from __future__ import annotations

import fcntl
import json
import platform
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
        self.results = read(path)

    def append(self, run: Run, result: dict[str, Any]) -> None:
        """Add a run that is done."""
        line = {"run": run.to_json(), "result": result, "environment": _environment(run.device)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.results[run] = result


def read(path: Path) -> dict[Run, dict[str, Any]]:
    """Return what the lines of a log say; a line that a kill cut off is left out."""
    results = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        results[Run.from_json(line["run"])] = line["result"]
    return results


def environments(path: Path) -> list[dict[str, str]]:
    """Return the different environments in which the runs of a log were made."""
    found = [json.loads(text)["environment"] for text in path.read_text().splitlines()]
    return [one for number, one in enumerate(found) if one not in found[:number]]


def _environment(device: str) -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }
