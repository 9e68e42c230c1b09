"""Hessian spectra of small networks at initialisation: ``python -m evidence.spectra``.

Imports numpy, ``networks``, the package and, once it draws, matplotlib. Writes a dated result and a
picture.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import RESULTS, machine, versions
from evidence import networks
from megatron_adam_mini.heterogeneity.distance import Axis, log_axis
from megatron_adam_mini.heterogeneity.measurement import (
    LINEAR_WIDTH,
    Measurement,
    Options,
    measure,
)
from megatron_adam_mini.heterogeneity.plot import draw_spectra
from megatron_adam_mini.heterogeneity.report import decades

ROOT = Path(__file__).resolve().parents[1]
#: Function of ``networks`` -> what it is, and what the talk's table has of its kind.
NETWORKS = {
    "vgg": ("small VGG", "VGG16 0.09"),
    "resnet": ("small ResNet", "ResNet18 0.10"),
    "mixer": ("small MLP-mixer", "MLP-mixer 34.90"),
    "vit": ("small ViT", "ViT-base 286.41"),
    "gpt": ("small GPT-2", "GPT-2 83.23"),
}
FLOORS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
WIDTHS = (0.25, 0.5, 1.0)
LINEAR = Axis(None, LINEAR_WIDTH)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m evidence.spectra", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data")
    parser.add_argument("--steps", type=int, default=30, help="Lanczos steps (%(default)s)")
    parser.add_argument("--probes", type=int, default=4, help="random vectors (%(default)s)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/spectra.png")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / f"{date.today().isoformat()}-heterogeneity.md"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {name: _measured(name, args) for name in args.networks}
    command = shlex.join(
        ["python", "-m", "evidence.spectra", *(sys.argv[1:] if arguments is None else arguments)]
    )
    args.output.write_text(_report(found, command, args), encoding="utf-8")
    draw({name: of_seed[0] for name, of_seed in found.items()}, args.picture)
    print(args.output)


def _measured(name: str, args: argparse.Namespace) -> list[Measurement]:
    made = []
    for seed in args.seeds:
        begun = time.process_time()
        options = Options(steps=args.steps, probes=args.probes)
        made.append(measure(*getattr(networks, name)(seed=seed), options))
        seconds = time.process_time() - begun
        print(f"{name}, seed {seed}: JS^0 {made[-1].js0():.3f}, {seconds:.0f} s", flush=True)
    return made


def _report(found: dict[str, list[Measurement]], command: str, args: argparse.Namespace) -> str:
    lines = [
        f"# Heterogeneity of Hessian spectra at initialisation, {date.today().isoformat()}",
        "",
        f"Command: `{command}`. Machine: {machine()}. {versions()}; one thread.",
        "",
        f"Networks of `evidence/networks.py`; seeds of weights and data: "
        f"{', '.join(map(str, args.seeds))}; blocks: weight matrices; {args.probes} probes of "
        f"{args.steps} Lanczos steps, float32. JS^0 in nats, at most 0.6931: mean over seeds, "
        "least and largest if there are several. *Noise*: the divergence between two estimates of "
        "one block, each of half the probes. *Decades*: between the largest eigenvalues of the two "
        "blocks farthest apart.",
        "",
        "| network | talk | blocks | JS^0, logarithmic axis | noise | JS^0, linear axis | noise | "
        "decades |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, of_seed) for name, of_seed in found.items()),
        "",
        "JS^0 on the logarithmic axis by floor (relative to the largest eigenvalue of all blocks) "
        "and width of the smoothing (decades), mean over seeds:",
        "",
        "| floor | width | " + " | ".join(NETWORKS[name][0] for name in found) + " |",
        "|---|---|" + "---|" * len(found),
    ]
    for floor in FLOORS:
        for width in WIDTHS:
            values = (
                np.mean([one.js0(log_axis(one.spectra, floor=floor, width=width)) for one in made])
                for made in found.values()
            )
            cells = " | ".join(f"{value:.3f}" for value in values)
            lines.append(f"| {floor:g} | {width:g} | {cells} |")
    lines += ["", "Blocks of the first seed: the largest magnitude of an eigenvalue.", ""]
    lines += ["| network | block | elements | largest |", "|---|---|---|---|"]
    for name, made in found.items():
        for block, numel, largest in zip(
            made[0].names, made[0].numels, made[0].largest, strict=True
        ):
            lines.append(f"| {name} | `{block}` | {numel:,} | {largest:.2e} |")
    return "\n".join(lines) + "\n"


def _row(name: str, made: list[Measurement]) -> str:
    cells = [
        *NETWORKS[name],
        str(len(made[0].names)),
        _spread([one.js0() for one in made]),
        f"{np.mean([one.noise() for one in made]):.3f}",
        _spread([one.js0(LINEAR) for one in made]),
        f"{np.mean([one.noise(LINEAR) for one in made]):.3f}",
        _spread([decades(one) for one in made], digits=1),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], digits: int = 3) -> str:
    mean, least, most = float(np.mean(values)), min(values), max(values)
    spread = f" ({least:.{digits}f} to {most:.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def draw(found: dict[str, Measurement], path: Path) -> None:
    """Draw the spectra of each network's blocks as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    places = figure.subplots(2, -(-len(found) // 2), squeeze=False).ravel()
    for axes, (name, measured) in zip(places, found.items(), strict=False):
        draw_spectra(axes, measured)
        axes.set_title(f"{NETWORKS[name][0]}: JS$^0$ {measured.js0():.2f}", fontsize=10)
    for axes in places[len(found) :]:
        axes.axis("off")
    figure.suptitle("Spectral density of the Hessian of each weight, at initialisation")
    figure.savefig(path, dpi=75, format="png")


if __name__ == "__main__":
    main()
