"""Measurement -> a dict for JSON, and words.

Imports ``distance`` and ``measurement``.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_adam_mini.heterogeneity.distance import Axis
from megatron_adam_mini.heterogeneity.measurement import LINEAR_WIDTH, Measurement


def report_of(measured: Measurement) -> dict[str, Any]:
    """Return what was found, for JSON."""
    options, linear = measured.options, Axis(None, LINEAR_WIDTH)
    blocks = [
        {
            "name": name,
            "elements": numel,
            "least": spectrum.range[0],
            "largest": spectrum.range[1],
            "mean": spectrum.moment(1),
            "root_mean_square": math.sqrt(spectrum.moment(2)),
            "spectrum": spectrum.as_dict(),
        }
        for name, numel, spectrum in zip(
            measured.names, measured.numels, measured.spectra, strict=True
        )
    ]
    return {
        "js0": measured.js0(),
        "noise": measured.noise(),
        "js0_linear": measured.js0(linear),
        "noise_linear": measured.noise(linear),
        "decades": decades(measured),
        "blocks": blocks,
        "distances": measured.distances().tolist(),
        "options": {
            "preset": options.config.preset,
            "steps": options.steps,
            "probes": options.probes,
            "floor": options.floor,
            "width": options.width,
            "linear_width": LINEAR_WIDTH,
            "seed": options.seed,
            "dtype": options.dtype,
            "device": options.device,
        },
    }


def decades(measured: Measurement) -> float:
    """Return the decades between the largest eigenvalues of the two blocks farthest apart.

    Infinite if the Hessian of a block is zero.
    """
    low, high = min(measured.largest), max(measured.largest)
    return math.log10(high / low) if low else math.inf


def in_words(report: dict[str, Any]) -> str:
    """Return the report as text."""
    width = max(len(block["name"]) for block in report["blocks"])
    lines = [f"{'block':{width}}  {'elements':>9}  {'least':>10}  {'largest':>10}  {'rms':>9}"]
    lines += [
        f"{block['name']:{width}}  {block['elements']:>9,}  {block['least']:>10.3g}  "
        f"{block['largest']:>10.3g}  {block['root_mean_square']:>9.3g}"
        for block in report["blocks"]
    ]
    options = report["options"]
    return "\n".join(
        [
            *lines,
            "",
            f"JS^0 {report['js0']:.4f} nats, at most {math.log(2):.4f}: mean Jensen-Shannon "
            f"divergence of {len(report['blocks'])} blocks' spectra, logarithmic axis "
            f"(two estimates of one block: {report['noise']:.4f})",
            f"JS^0 {report['js0_linear']:.4f} nats on a linear axis, standard deviation of the "
            f"smoothing {options['linear_width']:.4f} (two estimates: "
            f"{report['noise_linear']:.4f})",
            f"{report['decades']:.1f} decades between the largest eigenvalues of blocks",
            f"{options['probes']} probes of {options['steps']} Lanczos steps, "
            f"{options['dtype']}, seed {options['seed']}",
        ]
    )
