"""Train, compare and report: ``python -m evidence``; see ``evidence/README.md``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

from evidence.grid import PLANS, Plan
from evidence.settings import OPTIMIZERS

STAGES = ("tuned", "twin", "map", "ablation", "storage")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    made.add_argument("--plan", choices=PLANS, default="cpu", help="what to run (%(default)s)")
    made.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="of the plan")
    made.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, help="those of the plan")
    made.add_argument("--sizes", nargs="+", help="of the plan, instead of all")
    made.add_argument("--corpus", help="a name, or a .npy file of tokens, instead of the plan's")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    made.add_argument("--minutes", type=float, default=float("inf"), help="then begin no run")
    made.add_argument("--log", type=Path, help="JSON lines (build/evidence/PLAN.jsonl)")
    made.add_argument("--report", type=Path, help="its file, with pictures beside it (beside log)")
    made.add_argument("--report-only", action="store_true", help="train nothing")
    return made


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the command line asks for.

    Raises:
        ValueError: no setting has the sizes.
    """
    plan = PLANS[arguments.plan]
    settings = [
        replace(setting, corpus=arguments.corpus or setting.corpus)
        for setting in plan.settings
        if arguments.sizes is None or setting.size in arguments.sizes
    ]
    if not settings:
        sizes = sorted({setting.size for setting in plan.settings})
        raise ValueError(f"--plan {arguments.plan} has sizes {', '.join(sizes)}; give one of them.")
    return replace(
        plan,
        settings=tuple(dict.fromkeys(settings)) if "tuned" in arguments.stages else (),
        map=plan.map if "map" in arguments.stages else None,
        twin=plan.twin if "twin" in arguments.stages else None,
        ablation=plan.ablation if "ablation" in arguments.stages else None,
        storage=tuple(
            test
            for test in plan.storage
            if "storage" in arguments.stages
            and (arguments.sizes is None or test.size in arguments.sizes)
        ),
        optimizers=tuple(arguments.optimizers or plan.optimizers),
        device=arguments.device,
    )


def main() -> int:
    """Run the command; return the exit code: 0, or 3 if ``--minutes`` ended it."""
    made = parser()
    arguments = made.parse_args()
    log = arguments.log or Path("build/evidence") / f"{arguments.plan}.jsonl"
    try:
        plan = plan_of(arguments)
    except ValueError as error:
        made.error(str(error))
    # Imported here, because it takes seconds: a wrong argument is reported before.
    from evidence.report import write
    from evidence.run_log import RunLog
    from evidence.sweep import sweep

    # As Ctrl-C: the pool then ends its processes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    complete = True
    if not arguments.report_only:
        try:
            complete = sweep(
                plan, RunLog(log), workers=arguments.workers, minutes=arguments.minutes
            )
        except KeyboardInterrupt:
            print("\nevidence: interrupted; the same command goes on.", file=sys.stderr)
            return 130
        if not complete:
            print("evidence: not all is done; the same command goes on.", file=sys.stderr)
    if not log.exists() or not log.read_text().strip():
        return 3
    words = [word for word in sys.argv[1:] if word != "--report-only"]
    command = shlex.join(["python", "-m", "evidence", *words])
    print(*write(plan, log, arguments.report or log.with_suffix(".md"), command), sep="\n")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
