"""What a package has and says: metadata and an sdist. `make package` builds and tries wheels."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.support import SUITE_PYTHONS
from tests.test_imports import MODULES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def in_sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the files of an sdist, without the name of its folder."""
    folder = tmp_path_factory.mktemp("sdist")
    egg_info, dist = ["egg_info", "--egg-base", folder], ["sdist", "--dist-dir", folder]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *egg_info, *dist],
        cwd=ROOT,
        env={"PATH": "", "MEGATRON_ADAM_MINI_NO_COMPILER": "1"},
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


def test_an_sdist_has_all_that_an_installation_needs(in_sdist: set[str]) -> None:
    assert {f"megatron_adam_mini/{module}" for module in MODULES} <= in_sdist
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= in_sdist
    kernels = {path.name for path in (ROOT / "megatron_adam_mini/kernels").glob("cpu*.[ci]*")}
    assert {"cpu.cpp", "cpu_kernels.inc", "cpu_storage.inc"} <= kernels
    assert {f"megatron_adam_mini/kernels/{name}" for name in kernels} <= in_sdist
    assert "megatron_adam_mini/py.typed" in in_sdist
    assert not any(name.startswith(("tests", ".venv")) or ".so" in name for name in in_sdist)


@pytest.mark.parametrize("script", ["tools/bootstrap.sh", "tools/package.sh"])
def test_scripts_take_the_pythons_that_the_package_names(script: str) -> None:
    """Of these, ``make`` takes those for which there is the Megatron-Core of the suite."""
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    supported = re.search(r'^SUPPORTED="(.*)"$', (ROOT / script).read_text(), re.MULTILINE)
    assert supported is not None
    expected = list(SUITE_PYTHONS) if script == "tools/bootstrap.sh" else named
    assert supported[1].split() == expected
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_commands_need_no_megatron() -> None:
    assert {re.split(r"\W", name)[0] for name in PROJECT["dependencies"]} == {
        "torch",
        "numpy",
        "tqdm",
    }
