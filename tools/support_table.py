"""Run the tests that show features, and write ``docs/support.md``.

    python tools/support_table.py [--release] [FILES...] [--numprocesses N]

Without FILES, all marked tests run (minutes), and the table is written anew. With FILES (such as
``tests/test_oracle.py``), only theirs do; what other files have shown stays in the table. If a test
fails, nothing is written. With ``--release``, only the row of the installed release of
Megatron-Core, or of another torch or Python, is written; ``tools/releases.sh`` calls it so. See
``tests/support.py`` for the marker and the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import OTHERS, RELEASES, Shown, read_table, table  # noqa: E402

TABLE = ROOT / "docs/support.md"


def main(arguments: list[str] | None = None) -> int:
    """Write the table; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="test files (default: all)")
    parser.add_argument(
        "--release", action="store_true", help="leave the rows of other releases as they are"
    )
    parser.add_argument("--numprocesses", default="0", help="tests at a time (default: 0, in one)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        command = [
            *(sys.executable, "-m", "pytest", "-p", "tests.support", "-m", "support", "-q"),
            *("--support-outcomes", str(outcomes), "--numprocesses", args.numprocesses),
        ]
        ended = subprocess.run([*command, *map(str, args.files)], cwd=ROOT, check=False)
        if ended.returncode not in (0, 1, 5):  # passed, failed, no marked test in these files
            return 1
        found = json.loads(outcomes.read_text(encoding="utf-8"))
    if found["failed"] or ended.returncode == 1:
        print("nothing written, because tests failed:", *found["failed"], sep="\n  ")
        return 1
    passed = {(feature, column, file) for feature, column, file in found["passed"]}
    shown = merged(
        TABLE.read_text(encoding="utf-8") if TABLE.exists() else "",
        passed,
        {path.stem for path in args.files},
        {feature for feature, _, _ in passed} if args.release else None,
    )
    TABLE.write_text(table(shown), encoding="utf-8")
    return 0


def merged(
    old: str, shown: set[Shown], files: set[str], rows: set[str] | None = None
) -> set[Shown]:
    """Join what a run of some files (none: all) showed with what the table says of the others.

    Args:
        old: the table.
        shown: what the run showed.
        files: which files ran.
        rows: what other rows say of these files stays; ``None``: nothing does.
    """
    releases = {*RELEASES.values(), *OTHERS}
    return shown | {
        entry
        for entry in read_table(old)
        if (files and entry[2] not in files)
        or (entry[0] in releases and (rows is None or entry[0] not in rows))
    }


if __name__ == "__main__":
    sys.exit(main())
