"""Interleaved timing: every contender in every round, so that disturbances affect all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Times of one contender in seconds, one per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Return the ratio of the medians, and the quartiles of the ratios per round."""
        rounds = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        low, _, high = statistics.quantiles(rounds, n=4)
        return self.median / other.median, low, high


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
    warm_up: int = 3,
) -> dict[str, Timing]:
    """Time all contenders in turn, ``rounds`` times.

    A round in which one of them was preempted (less processor time than wall time) is repeated for
    all of them, at most ``rounds`` times in total.

    Args:
        contenders: functions by name.
        rounds: samples of each.
        before: called before each sample, not timed.
        warm_up: rounds whose times are dropped.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    done, tries = -warm_up, 0
    while done < rounds:
        samples, preempted = {}, False
        for name, run in contenders.items():
            before()
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            samples[name] = wall
            preempted |= cpu < 0.97 * wall
        tries += 1
        if preempted and tries < 2 * rounds + warm_up and done >= 0:
            continue
        if done >= 0:
            for name, wall in samples.items():
                found[name].append(wall)
        done += 1
    return {name: Timing(tuple(times)) for name, times in found.items()}


def table(timings: Mapping[str, Timing], base: str, labels: Mapping[str, str] | None = None) -> str:
    """Return a Markdown table with the ratio of each contender to ``base``."""
    lines = [f"| | ms | x {base} (quartiles) |", "|---|---|---|"]
    for name, timing in timings.items():
        ratio, low, high = timing.ratio_to(timings[base])
        label = (labels or {}).get(name, name)
        lines.append(
            f"| {label} | {timing.median * 1e3:.1f} | {ratio:.3f} ({low:.3f}-{high:.3f}) |"
        )
    return "\n".join(lines)
