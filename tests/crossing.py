"""Checkpoints that one release of Megatron-Core saves and its neighbours load.

    python tests/crossing.py save FOLDER

writes one of Adam-mini by the installed release, and beside it what the optimizer held;
``tools/releases.sh`` calls it for each release, then ``tests/releases.py`` loads them.
"""

from __future__ import annotations

import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ranks import run_ranks
from tests.support import RELEASES
from tests.test_checkpoint import BASE, train_and_save

JOB = replace(BASE, tp=2, layers=2)


def save(folder: Path, release: str) -> None:
    shutil.rmtree(folder / release, ignore_errors=True)
    (folder / release / "checkpoint").mkdir(parents=True)
    ranks = run_ranks(4, train_and_save, JOB, str(folder / release / "checkpoint"))
    (folder / release / "held.pickle").write_bytes(pickle.dumps(ranks))


def neighbours(folder: Path, release: str) -> dict[str, tuple[Path, Any]]:
    """Return the checkpoints that the next older and the next newer release left, and this one."""
    there = [name for name in RELEASES if (folder / name / "held.pickle").exists()]
    at = there.index(release)
    return {
        name: (
            folder / name / "checkpoint",
            pickle.loads((folder / name / "held.pickle").read_bytes()),
        )
        for name in there[max(0, at - 1) : at + 2]
    }


if __name__ == "__main__":
    import megatron.core

    assert sys.argv[1] == "save"
    save(Path(sys.argv[2]), megatron.core.__version__.partition("+")[0])
