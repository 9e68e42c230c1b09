"""Make a dated result of the records of the other stages.

    python -m benchmarks.gpu.report FOLDER [--note TEXT] [--no-file]

FOLDER has the JSON files of one or several runs, on one device.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import shown
from benchmarks.report import RESULTS

#: Columns of the tables, in this order; others of a row are left out.
COLUMNS = (
    "case", "worker", "job", "optimizer", "run", "cases", "elements", "buckets", "ms", "low",
    "high", "idle_ms", "host_ms", "first_ms", "launches", "graph_ms", "graph_host_ms", "bytes",
    "TB/s", "of_copy", "ratio", "kept_MB", "peak_MB", "steps", "step_ms", "iterations", "tokens/s",
    "optimizer_ms", "peak_GB", "reserved_GB", "save_rise_GB", "load_rise_GB", "loss", "why",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(row[name]) if name in row else "" for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else shown(value)
    return text.replace("|", "/").replace("\n", " ")[:200]


def section(record: Mapping[str, Any]) -> str:
    """Return the section of one record."""
    command = shlex.join(record["command"])
    parts = [f"## {record['stage']}", f"`{command}`, {record['seconds']} s."]
    if record["facts"]:
        parts.append(", ".join(f"{k}: {shown(v)}" for k, v in record["facts"].items()) + ".")
    if record["rows"]:
        parts.append(table(record["rows"]))
    for row in record["rows"]:
        if row.get("kernels") and isinstance(row["kernels"], dict):
            kernels = ", ".join(f"{name} {ms}" for name, ms in list(row["kernels"].items())[:6])
            parts.append(f"* {row['case']}, milliseconds by kernel: {kernels}.")
        if len(row.get("losses", ())) > 1:
            losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
            parts.append(f"* {row['optimizer']} {row.get('run', '')}: losses {losses}.")
    failures = record["failures"]
    early = "" if record["ended"] else " Stopped at its time limit: the last rows are missing."
    parts.append(f"Failures: {len(failures) or 'none'}.{early}")
    parts += [f"* `{text[:300]}`" for text in failures[:20]]
    return "\n\n".join(parts)


def report(records: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """Return the whole result; ``notes`` are paragraphs about what no record tells.

    Raises:
        ValueError: the records are of several environments.
    """
    environments = {json.dumps(record["environment"], sort_keys=True) for record in records}
    devices = {record["environment"]["device"] for record in records}
    if len(devices) != 1:
        raise ValueError(
            f"The records are of several devices: {', '.join(sorted(devices))}; give a folder "
            "with records of one."
        )
    day = min(record["began"] for record in records)[:10]
    heads = [
        ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in sorted(environments)
    ]
    heading = f"# On a GPU, {day}\n\n" + "\n\n".join(f"Environment: {head}." for head in heads)
    return "\n\n".join([heading, *notes, *(section(record) for record in records)]) + "\n"


def main() -> None:
    """Read the records, print the result, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument("--note", action="append", default=[], help="paragraph below the heading")
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in sorted(options.folder.glob("**/*.json"))]
    if not records:
        raise SystemExit(f"{options.folder} has no records; give the folder that $OUT named.")
    text = report(sorted(records, key=lambda record: record["began"]), options.note)
    print(text)
    if not options.no_file:
        day = min(record["began"] for record in records)[:10]
        path = RESULTS / f"{day}-gpu.md"
        path.write_text(text)
        print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
