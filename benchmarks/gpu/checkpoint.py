"""Save and resume on a GPU: memory that a save and a load take, and whether training goes on alike.

    python -m benchmarks.gpu.checkpoint [--model 125m]

For Adam-mini and Adam-mini with small state: eight steps with a checkpoint after the fourth; then a
new process loads it and takes the last four steps. Losses of these must agree; not to the last bit,
because attention's backward pass adds in any order.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import measure
from benchmarks.gpu.training import MODELS, OPTIMIZERS, flags, make_dataset, run

STEPS, SAVED = 8, 4
#: Weights equal, gradients of attention added in another order; the log has seven digits.
LOSS_RTOL = 1e-3


def main() -> int:
    """Save and resume with each optimizer, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=MODELS, default="125m")
    parser.add_argument("--limit", type=float, default=75.0, help="seconds for each run")
    names = ["adam_mini, small state", "adam_mini"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    device = measure.device(options.device)
    record = measure.Record("checkpoint", device, model=options.model)
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder))
        common = flags(options.model, data, batch=4, micro_batch=4, steps=STEPS)
        for name in options.only:
            saved = str(Path(folder, "checkpoint"))
            arguments = [*common, *OPTIMIZERS[name]]
            arguments += ["--dist-ckpt-optim-fully-reshardable", "--save-interval", str(SAVED)]
            losses = []
            for what, more in (
                ("save", ["--save", saved]),
                ("resume", ["--load", saved, "--ckpt-step", str(SAVED)]),
            ):
                found = run(
                    [*arguments, *more], device=options.device, limit=options.limit, log=record.log
                )
                if not found["ok"]:
                    record.fail(f"{name}, {what}: {found['why']}")
                record.add(optimizer=name, run=what, **found)
                losses.append(found["losses"])
            if len(losses[0]) != STEPS or len(losses[1]) != STEPS - SAVED:
                record.fail(f"{name}: {len(losses[0])} and {len(losses[1])} steps")
            for before, after in zip(losses[0][SAVED:], losses[1], strict=False):
                if abs(before - after) > LOSS_RTOL * before:
                    record.fail(f"{name}: losses {losses[0][SAVED:]}, resumed {losses[1]}")
                    break
            shutil.rmtree(saved, ignore_errors=True)
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
