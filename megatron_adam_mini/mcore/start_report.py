"""What the first rank says of an optimizer that was built, and the file with the manifest.

Imports torch.distributed. Used by ``start_checks``, before there is anything to report, and
``factory``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

logger = logging.getLogger(__name__)


def check_writable(path: str | None) -> None:
    """Check on the first rank that the file of the manifest can be written, before a long start.

    Args:
        path: as for :func:`write_manifest`.

    Raises:
        ValueError: names the file and the reason.
    """
    if path is None or distributed.get_rank() != 0:
        return
    try:
        with Path(path).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise _not_written(path, error) from error


def write_manifest(path: str | None, manifest: dict[str, Any]) -> None:
    """Write the manifest of the whole model, on the first rank.

    Args:
        path: of the file; ``None``: write none.
        manifest: the manifest.

    Raises:
        ValueError: names the file and the reason.
    """
    if path is None or distributed.get_rank() != 0:
        return
    text = json.dumps(manifest, indent=1) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: str, error: OSError) -> ValueError:
    return ValueError(
        f"Adam-mini manifest={path!r} cannot be written: {error.strerror}. Name a file in "
        "a folder that exists and is writable on rank 0's machine, with free space."
    )


def report(optimizer: AdamMiniOptimizer) -> None:
    """Print the partition on the first rank, and log which parameters Adam-mini does not know."""
    if distributed.get_rank() != 0:
        return
    manifest = optimizer.manifest
    by_rule: dict[tuple[str, str], list[int]] = {}
    for entry in manifest["parameters"]:
        row = by_rule.setdefault((entry["role"], entry["rule"]), [0, 0, 0])
        row[0] += 1
        row[1] += entry["elements"]
        row[2] += entry["blocks"]
    lines = [f"{'role':<22}{'rule':<10}{'tensors':>8}{'elements':>16}{'blocks':>14}"]
    lines += [
        f"{role:<22}{rule:<10}{row[0]:>8}{row[1]:>16,}{row[2]:>14,}"
        for (role, rule), row in sorted(by_rule.items())
    ]
    added = optimizer.communication_per_step()
    print(  # noqa: T201 (where Megatron prints its own start-up report)
        f"Adam-mini partition {manifest['preset']!r} (manifest {manifest['hash']}): "
        f"{manifest['elements']:,} elements share {manifest['blocks']:,} second moments\n"
        + "\n".join(lines)
        + f"\ncheckpoint format {optimizer.inner.config.checkpoint_format!r}; this rank: kernels "
        f"{optimizer.inner.kernels.NAME!r}, state bytes {optimizer.state_bytes()}, added per step "
        f"{added}",
        flush=True,
    )
    unknown = manifest["elementwise_unknown"]
    if unknown:
        logger.warning(
            "Adam-mini does not know %d parameters and keeps one second moment per element of "
            "them: %s. --adam-mini-full-v with their names says that this is meant.",
            len(unknown),
            ", ".join(unknown),
        )
