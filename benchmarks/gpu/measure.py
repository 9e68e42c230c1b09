"""Timing on a GPU, and the record of a stage: rows that are printed, and kept in a JSON file.

A record is written after every row, so a stage that is stopped at its time limit loses nothing.
``device("cpu")`` lets every stage be tried without a GPU; its times then mean nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: GPU cycles that a stream is kept busy before a sample, so that the host is ahead: some 8 ms.
_AHEAD_CYCLES = 15_000_000


def device(name: str) -> torch.device:
    """Return the device to measure: ``cuda`` (the first one), or ``cpu`` to try a script.

    Raises:
        SystemExit: there is no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu found no CUDA device, and measures nothing else: run it on a machine "
            "with an NVIDIA GPU of compute capability 8.0 or later (--device cpu tries a script)."
        )
    if name == "cuda":
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    return torch.device(name)


def environment(on: torch.device) -> dict[str, Any]:
    """Return what results depend on: device, driver and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "megatron-core", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if on.type == "cpu":
        return found | {"device": "CPU"}
    properties = torch.cuda.get_device_properties(0)
    found["device"] = properties.name
    found["GiB"] = round(properties.total_memory / 2**30, 1)
    found["CUDA"] = torch.version.cuda
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        numbers = re.findall(r"\d+\.\d[\d.]*", driver.read_text())
        found["driver"] = numbers[0] if numbers else "unknown"
    return found


class Record:
    """Results of one stage.

    Args:
        stage: name of the stage, and of its file in ``$OUT`` (default ``gpu-results``).
        on: device that is measured.
        echo: print rows and failures.
        facts: about the whole stage.

    Attributes:
        values: everything.
        log: file for the output of processes that a stage starts.
    """

    def __init__(self, stage: str, on: torch.device, *, echo: bool = True, **facts: Any) -> None:
        folder = Path(os.environ.get("OUT", "gpu-results"))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{stage}.json"
        self._echo = echo
        self.log = folder / "runs.log"
        self._began = time.monotonic()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.values: dict[str, Any] = {
            "stage": stage,
            "command": ["python", "-m", f"benchmarks.gpu.{Path(sys.argv[0]).stem}", *sys.argv[1:]],
            "began": now,
            "environment": environment(on),
            "facts": facts,
            "rows": [],
            "failures": [],
            "ended": False,
        }
        self._write()

    def add(self, **row: Any) -> None:
        """Add a row, and print its numbers."""
        self.values["rows"].append(row)
        self._print(row)
        self._write()

    def note(self, **facts: Any) -> None:
        """Add facts about the whole stage."""
        self.values["facts"] |= facts
        self._print(facts)
        self._write()

    def fail(self, text: str) -> None:
        """Add a failure, and print the first ones."""
        self.values["failures"].append(text[:2000])
        if self._echo and len(self.values["failures"]) <= 12:
            print(f"FAILED {text[-700:]}", flush=True)
        self._write()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn an exception into a failure, so that what follows is still measured."""
        try:
            yield
        except Exception as error:
            where = traceback.format_exc().splitlines()[-7:-1]
            self.fail(f"{what}: {type(error).__name__}: {error} {where}")

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()

    def close(self) -> int:
        """Print a summary, and return the exit status."""
        rows, failures = len(self.values["rows"]), len(self.values["failures"])
        self.values["ended"] = True
        self._write()
        print(f"{self.values['stage']}: {rows} rows, {failures} failures", flush=True)
        return 1 if failures else 0

    def _print(self, values: dict[str, Any]) -> None:
        if self._echo:
            plain = {k: v for k, v in values.items() if not isinstance(v, (dict, list))}
            print("  ".join(f"{k}={shown(v)}" for k, v in plain.items()), flush=True)

    def _write(self) -> None:
        self.values["seconds"] = round(time.monotonic() - self._began, 1)
        self._path.write_text(json.dumps(self.values, indent=1) + "\n")


def shown(value: Any) -> str:
    """Return a number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Time(NamedTuple):
    """Medians in milliseconds, and quartiles of the first.

    Attributes:
        ms: device time of work that was queued before: no launch gaps.
        low, high: its quartiles.
        idle_ms: device time from an idle device: launch gaps included.
        host_ms: time that the host took to queue the work.
    """

    ms: float
    low: float
    high: float
    idle_ms: float
    host_ms: float


def milliseconds(
    call: Callable[[], object], on: torch.device, *, samples: int = 12, warm: int = 3
) -> Time:
    """Time a call by CUDA events; on a CPU by the clock."""
    for _ in range(warm):
        call()
    if on.type == "cpu":
        times = sorted(1e3 * _seconds(call) for _ in range(samples))
        middle = statistics.median(times)
        return Time(middle, times[len(times) // 4], times[-1 - len(times) // 4], middle, middle)
    queued, idle, host = [], [], []
    for _ in range(samples):
        queued.append(_between_events(call, ahead=True)[0])
        device_ms, host_ms = _between_events(call, ahead=False)
        idle.append(device_ms)
        host.append(host_ms)
    low, middle, high = statistics.quantiles(queued, n=4)
    return Time(middle, low, high, statistics.median(idle), statistics.median(host))


def _between_events(call: Callable[[], object], *, ahead: bool) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(_AHEAD_CYCLES)
    begin.record()
    host = _seconds(call)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), 1e3 * host


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def kernels(call: Callable[[], object], *, calls: int = 3) -> tuple[dict[str, float], float]:
    """Return device milliseconds of a call by kernel, and its launches and copies (CUDA only)."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    found = {e.key[:70]: round(e.self_device_time_total / calls / 1e3, 4) for e in events[:14]}
    return found, sum(event.count for event in events) / calls


def peak_gigabytes(on: torch.device) -> float:
    """Return the largest allocation since the last call, and start anew."""
    if on.type == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak
