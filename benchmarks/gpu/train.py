"""Train one model with Adam, Adam-mini and Adam-mini with small state on the same data.

    python -m benchmarks.gpu.train [--model 1.3b] [--steps 40] [--batch 8] [--micro-batch 4]

``megatron.training`` on one GPU, see ``training``: tokens per second, time of ``optimizer.step()``,
peak memory and losses. The text is the source of the standard library.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import measure
from benchmarks.gpu.training import MODELS, OPTIMIZERS, flags, make_dataset, run


def main() -> int:
    """Train with each optimizer, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--limit", type=float, default=110.0, help="seconds for each optimizer")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--name", default="train", help="of the record")
    options, more = parser.parse_known_args()
    device = measure.device(options.device)
    facts = {"model": options.model, "batch": options.batch, "micro-batch": options.micro_batch}
    record = measure.Record(
        options.name, device, **facts, sequence=MODELS[options.model][5], more=more
    )
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder))
        arguments = flags(
            options.model, data, batch=options.batch, micro_batch=options.micro_batch,
            steps=options.steps,
        )  # fmt: skip
        for name in options.only:
            found = run(
                [*arguments, *OPTIMIZERS[name], *more],
                device=options.device, limit=options.limit, log=record.log,
            )  # fmt: skip
            if "ms" in found:
                tokens = options.batch * MODELS[options.model][5]
                found["tokens/s"] = 1e3 * tokens / found["ms"]
            if found["losses"]:
                found["loss"] = found["losses"][-1]
            if found.get("kernels", "triton") != "triton" and device.type == "cuda":
                record.fail(f"{name}: kernels {found['kernels']!r} instead of 'triton'")
            if not found["ok"]:
                record.fail(f"{name}: {found['why']}")
            record.add(optimizer=name, **found)
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
