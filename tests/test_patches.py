"""The patches for Megatron-LM trees apply, and a patched tree trains without the launcher."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import megatron.training
import pytest

from megatron_adam_mini.mcore.compat import SUITE_VERSION
from tests.support import RELEASES
from tests.test_examples import TINY_MODEL

ROOT = Path(__file__).resolve().parent.parent
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
LINE = SUITE_VERSION.rpartition(".")[0]
TIMEOUT_S = 150

#: What a GPU would make unnecessary. Nothing here registers Adam-mini.
RUN = """
import runpy, sys
from megatron_adam_mini import cpu_host
cpu_host.enable()
import megatron.training
print("tree:", megatron.training.__file__)
sys.argv = [sys.argv[1], *cpu_host.with_cpu_flags(sys.argv[2:])]
sys.path.insert(0, "examples")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_there_is_a_patch_for_each_tested_release() -> None:
    releases = {version.rpartition(".")[0] for version in RELEASES}
    names = [f"megatron-lm-core_v{release}.patch" for release in sorted(releases)]
    assert [patch.name for patch in PATCHES] == names
    table = (ROOT / "patches/README.md").read_text(encoding="utf-8")
    for name, version in zip(names, sorted(RELEASES), strict=True):
        (row,) = (line for line in table.splitlines() if f"`{name}`" in line)
        assert version in row
        assert name in (ROOT / "patches" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("launcher", [False, True], ids=["plain", "launcher"])
def test_patched_tree_trains(launcher: bool, tmp_path: Path) -> None:
    """Also with the launcher, which registers before the tree does.

    ``tests/releases.py`` does so with the other releases.
    """
    patch = ROOT / "patches" / f"megatron-lm-core_v{LINE}.patch"
    tree = tmp_path / "megatron" / "training"
    shutil.copytree(Path(megatron.training.__file__).parent, tree)
    applied = subprocess.run(
        ["git", "apply", "--verbose", str(patch)],
        cwd=tmp_path,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        capture_output=True,
        text=True,
    )
    assert applied.returncode == 0, applied.stderr
    changed = re.findall(r"^Applied patch (\S+) cleanly", applied.stderr, re.MULTILINE)
    assert changed == ["megatron/training/__init__.py"], applied.stderr

    start = ["-m", "megatron_adam_mini.launch", "--cpu-host"] if launcher else ["-c", RUN]
    run = [sys.executable, *start, "examples/pretrain_llama.py", "--optimizer", "adam_mini"]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    result = subprocess.run(
        [*run, *TINY_MODEL.split(), "--mock-data"],
        cwd=ROOT,
        env=os.environ | alone | {"PYTHONPATH": str(tmp_path), "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert launcher or f"tree: {tree}" in result.stdout
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+) \|", result.stdout)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "Adam-mini" in result.stdout + result.stderr
