"""The bootstrap script, with programs on PATH that only pretend: nothing is installed here."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FAKE_PYTHON = """#!/bin/sh
# A Python of version {version} that writes down what it is asked to install.
case "$*" in
"-c import ensurepip"*) echo {version} ;;
"-c ") ;;
"-c "*) echo "{version} at {name}" ;;
"-m venv"*)
    echo "{name} venv" >>"$FAKE_LOG"
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    ;;
"-m pip"*)
    echo "{name} pip $*" >>"$FAKE_LOG"
    [ ! -e "$FAKE_LOG.pip-fails" ] || exit 1
    case "$*" in *pytorch.org*) [ ! -e "$FAKE_LOG.no-cpu-torch" ] ;; esac
    ;;
*) exit 99 ;;
esac
"""

FAKE_SHIM = """#!/bin/sh
echo "pyenv: command not found" >&2
exit 127
"""


class Checkout:
    """A copy of what the script needs, and a PATH with nothing but basic tools."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.bin = folder / "bin"
        self.log = folder / "log"
        (self.root / "tools").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "tools/bootstrap.sh", self.root / "tools")
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)
        kernels = self.root / "megatron_adam_mini/kernels"
        kernels.mkdir(parents=True)
        for path in (ROOT / "megatron_adam_mini/kernels").glob("cpu*.[ci]*"):
            shutil.copy(path, kernels)
        for name in ("sh", "dirname", "cat", "cksum", "tr", "sed", "rm", "mkdir", "cp"):
            tool = shutil.which(name)
            assert tool is not None, name
            (self.bin / name).symlink_to(tool)
        self.path = [str(self.bin)]
        self.environment = {"HOME": str(folder / "home"), "FAKE_LOG": str(self.log)}

    def add_python(self, path: Path, version: str, text: str = FAKE_PYTHON) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            text.format(version=version, name=path.parent.parent.name + "/" + path.name)
        )
        path.chmod(0o755)

    def bootstrap(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "tools/bootstrap.sh")],
            env={**self.environment, "PATH": os.pathsep.join(self.path), **environment},
            capture_output=True,
            text=True,
            timeout=30,
            cwd="/",
        )

    def take_log(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [" ".join(line.split()[:2]) for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("version", [None, "3.11", "3.14", "broken"])
def test_no_suitable_python_gives_the_remedy(checkout: Checkout, version: str | None) -> None:
    if version == "broken":
        checkout.add_python(checkout.bin / "python3.12", "", FAKE_SHIM)
    elif version is not None:
        checkout.add_python(checkout.bin / "python3", version)
    result = checkout.bootstrap()
    assert result.returncode == 1
    assert "no suitable Python found. Needed is one of the versions 3.12 3.13" in result.stderr
    assert "pyenv install 3.12" in result.stderr
    assert "make PYTHON=/path/to/python3.12" in result.stderr
    assert checkout.take_log() == []
    assert not (checkout.root / ".venv").exists()


def test_named_python_that_does_not_fit(checkout: Checkout) -> None:
    checkout.add_python(checkout.bin / "python3.12", "3.12")
    checkout.add_python(checkout.bin / "old", "3.9")
    result = checkout.bootstrap(PYTHON="old")
    assert result.returncode == 1
    assert "PYTHON=old does not run, has no venv module, or is none of" in result.stderr


def test_second_call_installs_nothing(checkout: Checkout) -> None:
    checkout.add_python(checkout.bin / "python3.12", "3.12")
    first = checkout.bootstrap()
    assert first.returncode == 0, first.stderr
    name = f"{checkout.bin.parent.name}/python3.12"
    assert checkout.take_log() == [f"{name} venv", f"{name} pip", f"{name} pip"]

    second = checkout.bootstrap()
    assert second.returncode == 0, second.stderr
    assert second.stdout + second.stderr == ""
    assert checkout.take_log() == []


@pytest.mark.parametrize("file", ["requirements/runtime.txt", "pyproject.toml", "setup.py"])
def test_a_change_updates_the_environment(checkout: Checkout, file: str) -> None:
    checkout.add_python(checkout.bin / "python3.12", "3.12")
    assert checkout.bootstrap().returncode == 0
    checkout.take_log()
    with (checkout.root / file).open("a") as stream:
        stream.write("# changed\n")
    assert checkout.bootstrap().returncode == 0
    name = f"{checkout.bin.parent.name}/python3.12"
    assert checkout.take_log() == [f"{name} pip", f"{name} pip"]  # and no new environment
    assert checkout.bootstrap().returncode == 0
    assert checkout.take_log() == []


def test_failed_installation_is_told_and_done_again(checkout: Checkout) -> None:
    checkout.add_python(checkout.bin / "python3.12", "3.12")
    failure = Path(f"{checkout.log}.pip-fails")
    failure.touch()
    result = checkout.bootstrap()
    assert result.returncode == 1
    assert "the installation failed" in result.stderr
    assert "has 6 GB free" in result.stderr
    checkout.take_log()

    failure.unlink()
    assert checkout.bootstrap().returncode == 0
    assert checkout.take_log()[0].endswith("venv")  # from nothing


@pytest.mark.parametrize("reached", [True, False])
def test_torch_without_cuda_is_taken_where_it_is_reached(checkout: Checkout, reached: bool) -> None:
    checkout.add_python(checkout.bin / "python3.12", "3.12")
    if not reached:
        Path(f"{checkout.log}.no-cpu-torch").touch()
    first = checkout.bootstrap(TORCH="cpu")
    assert first.returncode == 0, first.stderr
    assert ("the package index's comes instead" in first.stderr) != reached
    pinned = re.search(r"^torch==(.*)$", (ROOT / "requirements/runtime.txt").read_text(), re.M)
    assert pinned is not None
    venv, cpu, *others = checkout.log.read_text().splitlines()
    assert venv.endswith(" venv")
    assert cpu.endswith(f"--index-url https://download.pytorch.org/whl/cpu torch=={pinned[1]}+cpu")
    assert len(others) == 2
    checkout.take_log()

    assert checkout.bootstrap().returncode == 0
    assert checkout.bootstrap(TORCH="cpu").returncode == 0
    assert checkout.take_log() == [], "the choice stays"
    assert checkout.bootstrap(TORCH="cuda").returncode == 0
    name = f"{checkout.bin.parent.name}/python3.12"
    assert checkout.take_log() == [f"{name} venv", f"{name} pip", f"{name} pip"]


def test_torch_that_is_not_known(checkout: Checkout) -> None:
    checkout.add_python(checkout.bin / "python3.12", "3.12")
    result = checkout.bootstrap(TORCH="rocm")
    assert result.returncode == 1
    assert "TORCH=rocm is not known; allowed: cpu, cuda." in result.stderr
    assert checkout.take_log() == []


@pytest.mark.parametrize("hint", ["PYENV_ROOT", "HOME", "shims", "bin"])
def test_python_that_only_pyenv_knows(checkout: Checkout, tmp_path: Path, hint: str) -> None:
    root = tmp_path / ("home/.pyenv" if hint == "HOME" else "pyenv")
    for version in ("3.11.9", "3.13.2", "3.14.0"):
        checkout.add_python(root / "versions" / version / "bin/python3", version[:4])
    (root / "bin").mkdir()
    checkout.add_python(root / "shims/python3.13", "", FAKE_SHIM)
    if hint == "PYENV_ROOT":
        checkout.environment["PYENV_ROOT"] = str(root)
    elif hint != "HOME":
        checkout.path.insert(0, str(root / hint))
    result = checkout.bootstrap()
    assert result.returncode == 0, result.stderr
    assert checkout.take_log()[0] == "3.13.2/python3 venv"
    assert f"{root}/versions/3.13.2/bin/python3" in result.stderr


def test_makefile_and_ci_start_here() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo: bootstrap", "lint: bootstrap", "check: lint", "test: lint"):
        assert target in makefile
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / ".ci/run").read_text()
