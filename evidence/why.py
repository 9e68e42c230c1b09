"""Make docs/why.md, the talk's problems run and drawn: ``python -m evidence.why``.

Imports ``quadratic``, ``scaled_mlp`` and, once it draws, matplotlib. The words stand here; every
number and every verdict comes from the run. A dated result has all of them.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import RESULTS, machine, versions
from evidence import quadratic, scaled_mlp
from evidence.quadratic import BLOCKWISE, Run

ROOT = Path(__file__).resolve().parents[1]
SIZES, KAPPAS = (5, 20, 50), (100.0, 5000.0)
#: From diagonal to dense.
AMOUNTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TRIALS = 50
#: Of the single block.
SINGLE = (30, 100.0)
#: A method counts as better where its loss is this many times smaller.
CLEARLY = 3.0


class Sizes(NamedTuple):
    """How much is run; less in tests."""

    seeds: int = quadratic.SEEDS
    steps: int = quadratic.STEPS
    rates: tuple[float, ...] = quadratic.RATES
    trials: int = TRIALS
    degrees: tuple[float, ...] = scaled_mlp.DEGREES
    mlp: Mapping[str, Any] = {}


class Found(NamedTuple):
    """All that was run.

    Attributes:
        blocks: ``heterogeneous`` and ``homogeneous`` -> method -> run.
        single: ``diagonal`` and ``dense`` -> the same.
        ratios: (size, condition number) -> (tau, r) of each amount of rotation.
        mlp: degree -> method -> losses.
        spectra: degree -> JS^0 and the largest eigenvalue of each layer.
    """

    blocks: dict[str, dict[str, Run]]
    single: dict[str, dict[str, Run]]
    ratios: dict[tuple[int, float], list[tuple[float, float]]]
    mlp: dict[float, dict[str, scaled_mlp.Trained]]
    spectra: dict[float, tuple[float, list[float]]]


def run(sizes: Sizes) -> Found:
    """Run everything."""
    how: dict[str, Any] = {"seeds": sizes.seeds, "steps": sizes.steps, "rates": sizes.rates}
    blocks = {
        "heterogeneous": quadratic.compare(quadratic.HETEROGENEOUS, **how),
        "homogeneous": quadratic.compare(quadratic.HOMOGENEOUS, **how),
    }
    one = (quadratic.between(*SINGLE, seed=0),)
    single = {
        name: quadratic.compare(one, amount=amount, **how)
        for name, amount in (("diagonal", 0.0), ("dense", 1.0))
    }
    ratios = {
        (size, kappa): quadratic.ratios(size, kappa, AMOUNTS, sizes.trials)
        for size in SIZES
        for kappa in KAPPAS
    }
    mlp = {
        degree: {name: scaled_mlp.tuned(degree, name, **sizes.mlp) for name in scaled_mlp.METHODS}
        for degree in sizes.degrees
    }
    spectra = {}
    for degree in sizes.degrees:
        measured = scaled_mlp.heterogeneity(degree)
        spectra[degree] = measured.js0(), measured.largest
    return Found(blocks, single, ratios, mlp, spectra)


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """Run, draw and write."""
    parser = argparse.ArgumentParser(prog="python -m evidence.why", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="of page and pictures")
    name = f"{date.today().isoformat()}-why.md"
    parser.add_argument("--output", type=Path, default=RESULTS / name, help="all numbers")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.process_time()
    found = run(sizes or Sizes())
    draw(found, args.folder)
    (args.folder / "why.md").write_text(page(found, args.output.name), encoding="utf-8")
    command = shlex.join(
        ["python", "-m", "evidence.why", *(sys.argv[1:] if arguments is None else arguments)]
    )
    seconds = time.process_time() - begun
    args.output.write_text(tables(found, command, seconds), encoding="utf-8")
    print(f"{args.folder / 'why.md'}, {args.output}: {seconds:.0f} s of one core")


# Words.


def verdict(right: bool) -> str:
    """Return whether what the talk says is what was found."""
    return "**Seen.**" if right else "**Not seen.**"


def number(value: float) -> str:
    """Return a loss in a few characters."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "lost"


def _row(name: str, runs: Mapping[str, Run]) -> str:
    return f"| {name} | " + " | ".join(number(one.last) for one in runs.values()) + " |"


def page(found: Found, results: str) -> str:
    """Return docs/why.md; ``results`` is the name of the dated result."""
    het, hom = found.blocks["heterogeneous"], found.blocks["homogeneous"]
    diagonal, dense = found.single["diagonal"], found.single["dense"]
    gd, adam, mini = quadratic.METHODS

    def better(runs: Mapping[str, Run], one: str, other: str) -> bool:
        return CLEARLY * runs[one].last < runs[other].last

    fewest, most = min(found.mlp), max(found.mlp)
    sgd = next(iter(scaled_mlp.METHODS))

    def growth(name: str) -> float:
        return found.mlp[most][name].mean / found.mlp[fewest][name].mean

    falls = all(points[0][1] < points[-1][1] for points in found.ratios.values())
    useless = all(points[-1][1] > 0.5 for points in found.ratios.values())
    methods = " | ".join(het)
    return f"""# Why one rate per block

This page runs the arguments of the talk *Why Transformers Need Adam* and of its papers
([arXiv:2402.16788](https://arxiv.org/abs/2402.16788), [arXiv:2406.16793](https://arxiv.org/abs/2406.16793)) on
problems of a few numbers, and says of each whether we see it. `make why` makes page and pictures in half a minute
of one core ([all numbers, with machine and versions](../benchmarks/results/{results})). Adam-mini is this project's
`AdamMini`, the others are torch's. Each method has the best of the same rates; blockwise gradient descent has that of
each block, and one more to choose from, 2 / (least + largest eigenvalue). Losses are those after {quadratic.STEPS} steps by those at the start, medians of {quadratic.SEEDS} random problems and starts. Adam and Adam-mini have no
momentum here (betas {quadratic.BETAS[0]:g} and {quadratic.BETAS[1]:g}), like gradient descent.
"Clearly" means by a factor of {CLEARLY:g}.

## Blocks that differ

Three blocks of three variables, `f(x) = sum_b x_b . H_b x_b / 2`, each rotated at random, so dense inside. All
eigenvalues are the same in both problems, so is the condition number, 2000; only who sits with whom differs.

* *Heterogeneous*: {{1, 2, 3}}, {{99, 100, 101}}, {{1998, 1999, 2000}}.
* *Homogeneous*: {{1, 99, 1998}}, {{2, 100, 1999}}, {{3, 101, 2000}}.

![Loss against step for both problems](why-blocks.png)

| problem | {methods} |
|---|{"---|" * len(het)}
{_row("heterogeneous", het)}
{_row("homogeneous", hom)}

* The talk: on heterogeneous blocks Adam is clearly better than gradient descent. {verdict(better(het, adam, gd))}
* The talk: on homogeneous blocks it is not. {verdict(not better(hom, adam, gd))}
* The talk: for gradient descent the arrangement makes no difference.
  {verdict(max(het[gd].last, hom[gd].last) < CLEARLY * min(het[gd].last, hom[gd].last))}
* The talk: one good rate per block is enough: blockwise gradient descent is clearly better than Adam on
  heterogeneous blocks. {verdict(better(het, BLOCKWISE, adam))}
* The paper: Adam-mini's one v per block is such a rate: no worse than Adam on heterogeneous blocks.
  {verdict(not better(het, adam, mini))}

## Inside a dense block

One block of {SINGLE[0]} variables, condition number {SINGLE[1]:g}, once diagonal and once with the same eigenvalues
rotated at random.

![Loss against step for both blocks](why-dense.png)

| block | {methods} |
|---|{"---|" * len(het)}
{_row("diagonal", diagonal)}
{_row("dense", dense)}

* The talk: a rate per variable helps where the block is diagonal: Adam is clearly better than gradient descent.
  {verdict(better(diagonal, adam, gd))}
* The talk: in a dense block it does not: one good rate, gradient descent's, is no worse than Adam.
  {verdict(not better(dense, adam, gd))}
* Adam-mini has one rate here, which v makes shrink with the gradient; it is no worse than Adam in the dense block.
  {verdict(not better(dense, adam, mini))}

## tau and r

`tau = sum_i |H_ii| / sum_ij |H_ij|` says how diagonal a block is: 1 if it is nothing else. `r` is the condition number of
`D H` by that of `H`, where `D = diag(1 / |g|)` is Adam's preconditioner at its first step, `g = H x` with x standard
normal. Where r is below 1, Adam's rates help; Adam-mini's one rate has r = 1 by definition. Eigenvalues lie
between 1 and the condition number with random logarithms, and only their directions are turned. The exact
draw of the paper is not known to us; the definitions are its own.

![r against tau for three sizes and two condition numbers](why-ratio.png)

| size | condition number | r when diagonal (tau = 1) | tau when dense | r when dense |
|---|---|---|---|---|
{_ratio_rows(found)}

* The paper: r falls as the block becomes diagonal. {verdict(falls)}
* The paper: in dense blocks Adam's preconditioner is of little use (r above 0.5 in all of them). {verdict(useless)}

## An MLP whose layers are scaled apart

The paper scales the layers of an MLP to make its blocks unlike, and finds that SGD gets worse with the degree while
Adam does not. Ours has four linear layers on pictures of ten classes, of which a fifth are mislabelled. Layer l computes
`c_l W_l x`, and starts from weights divided by `c_l`: the same function for every degree s, with `c_l` of 10^-s, 10^s,
10^-s, 10^s, while the Hessian of a layer is multiplied by `c_l^2`. Loss after {scaled_mlp.STEPS} steps at the best rate,
mean of {scaled_mlp.SEEDS} seeds; betas {scaled_mlp.BETAS[0]:g} and {scaled_mlp.BETAS[1]:g}, the same momentum for SGD;
Adam-mini has one v per row. How the paper scales is not known to us in detail.

![Loss against the degree of heterogeneity](why-mlp.png)

| degree | JS^0 | {" | ".join(scaled_mlp.METHODS)} |
|---|---|{"---|" * len(scaled_mlp.METHODS)}
{_mlp_rows(found)}

* JS^0 grows with the degree. {verdict(_rises([js0 for js0, _ in found.spectra.values()]))}
* The paper: SGD gets clearly worse from the least degree to the largest. {verdict(growth(sgd) > CLEARLY)}
* So it does with every degree. {verdict(_rises([by[sgd].mean for by in found.mlp.values()]))}
* The paper: Adam does not. {verdict(growth(adam) < CLEARLY)}
* Adam-mini does not. {verdict(growth(mini) < CLEARLY)}
* The paper: at the largest degree SGD is clearly worse than Adam.
  {verdict(found.mlp[most][sgd].mean > CLEARLY * found.mlp[most][adam].mean)}
* At the largest degree SGD is clearly worse than Adam-mini.
  {verdict(found.mlp[most][sgd].mean > CLEARLY * found.mlp[most][mini].mean)}

## What this does not show

Quadratics of nine variables and full batches say nothing about noise, and the rate of every method was chosen by the
last loss. The spectra of small networks are [measured too](heterogeneity.md#small-networks); how Adam-mini's loss
compares in training is what [the evidence](../evidence/README.md) is for.
"""


def _rises(values: list[float]) -> bool:
    return all(first < second for first, second in pairwise(values))


def _ratio_rows(found: Found) -> str:
    return "\n".join(
        f"| {size} | {kappa:g} | {points[0][1]:.3g} | {points[-1][0]:.2f} | {points[-1][1]:.3g} |"
        for (size, kappa), points in found.ratios.items()
    )


def _mlp_rows(found: Found) -> str:
    return "\n".join(
        f"| {degree:g} | {found.spectra[degree][0]:.3f} | "
        + " | ".join(number(one.mean) for one in by_method.values())
        + " |"
        for degree, by_method in found.mlp.items()
    )


def tables(found: Found, command: str, seconds: float) -> str:
    """Return the dated result."""
    lines = [
        f"# The talk's quadratic problems and its MLP, {date.today().isoformat()}",
        "",
        f"Command: `{command}`, {seconds:.0f} s of one core. Machine: {machine()}. {versions()}; "
        "one thread.",
        "",
        f"Rates of quadratic problems: {_list(quadratic.RATES)}; of the MLP: "
        f"{_list(scaled_mlp.RATES)}. Loss at the end by that at the start, by seed, and the rates "
        "that were best.",
        "",
        "| problem | method | median | of each seed | best rates |",
        "|---|---|---|---|---|",
    ]
    for problem, runs in (*found.blocks.items(), *found.single.items()):
        for method, one in runs.items():
            last = ", ".join(map(number, one.losses[:, -1]))
            rates = _list(one.rates) or "of each block"
            lines.append(f"| {problem} | {method} | {number(one.last)} | {last} | {rates} |")
    lines += ["", f"tau and r, medians of {TRIALS} matrices:", ""]
    lines += ["| size | condition number | tau | r |", "|---|---|---|---|"]
    for (size, kappa), points in found.ratios.items():
        lines += [f"| {size} | {kappa:g} | {tau:.3f} | {r:.3g} |" for tau, r in points]
    lines += ["", "MLP, last loss of each seed:", ""]
    lines += ["| degree | method | losses | best rates |", "|---|---|---|---|"]
    for degree, by_method in found.mlp.items():
        for method, trained in by_method.items():
            losses = ", ".join(map(number, trained.losses))
            lines.append(f"| {degree:g} | {method} | {losses} | {_list(trained.rates)} |")
    lines += ["", "Its spectra at the start:", ""]
    lines += ["| degree | JS^0 | largest eigenvalue of each layer |", "|---|---|---|"]
    for degree, (js0, largest) in found.spectra.items():
        lines.append(f"| {degree:g} | {js0:.3f} | {_list(largest)} |")
    return "\n".join(lines) + "\n"


def _list(values: Any) -> str:
    return ", ".join(f"{value:.2g}" for value in values)


# Pictures.

_COLORS = ("#555555", "#4c72b0", "#dd8452", "#55a868")


def draw(found: Found, folder: Path) -> None:
    """Draw all pictures as PNGs."""
    _panels(folder / "why-blocks.png", len(found.blocks), _curves(found.blocks))
    _panels(folder / "why-dense.png", len(found.single), _curves(found.single))
    _panels(folder / "why-ratio.png", len(KAPPAS), _ratio_panels(found))
    _panels(folder / "why-mlp.png", 2, _mlp_panels(found))


def _panels(path: Path, count: int, fill: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    fill(figure.subplots(1, count, squeeze=False)[0])
    figure.savefig(path, dpi=80, format="png")


def _curves(problems: Mapping[str, Mapping[str, Run]]) -> Callable[[Any], None]:
    def fill(places: Any) -> None:
        for axes, (title, runs) in zip(places, problems.items(), strict=True):
            for color, (name, one) in zip(_COLORS, runs.items(), strict=True):
                middle = sorted(one.losses, key=lambda losses: float(losses[-1]))
                curve = middle[len(middle) // 2]
                axes.semilogy(curve.clip(1e-14), color=color, label=name)
            axes.set_ylim(1e-12, 10)
            axes.set_title(title)
            axes.set_xlabel("step")
        places[0].set_ylabel("loss / loss at the start")
        places[0].legend(fontsize=7)

    return fill


def _ratio_panels(found: Found) -> Callable[[Any], None]:
    def fill(places: Any) -> None:
        for axes, kappa in zip(places, KAPPAS, strict=True):
            for color, size in zip(_COLORS, SIZES, strict=False):
                taus, rs = zip(*found.ratios[size, kappa], strict=True)
                axes.loglog(taus, rs, "o-", color=color, label=f"{size} variables")
            axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
            axes.set_xlabel("tau (1: diagonal)")
            axes.set_title(f"condition number {kappa:g}")
        places[0].set_ylabel("r (dashed: one rate per block)")
        places[0].legend(fontsize=7)

    return fill


def _mlp_panels(found: Found) -> Callable[[Any], None]:
    def fill(places: Any) -> None:
        degrees = list(found.mlp)
        for color, name in zip(_COLORS, scaled_mlp.METHODS, strict=False):
            means = [found.mlp[degree][name].mean for degree in degrees]
            places[0].semilogy(degrees, means, "o-", color=color, label=name)
        places[0].set_title("last loss at the best rate")
        places[0].legend(fontsize=7)
        places[1].plot(degrees, [found.spectra[degree][0] for degree in degrees], "o-")
        places[1].set_title("JS$^0$ of the layers at the start")
        for axes in places:
            axes.set_xlabel("degree of heterogeneity")

    return fill


if __name__ == "__main__":
    main()
