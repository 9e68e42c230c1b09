"""Progress of a tool: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from tqdm import tqdm


def bytes_bar(total: int, label: str) -> tqdm:
    """Return a progress bar that counts bytes; use it as a context manager.

    Args:
        total: total number of bytes.
        label: text before the bar.
    """
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
