"""The four conversions, from path to path: whole or not at all.

Imports the modules of this folder; ``cli`` and scripts call it.
"""

from __future__ import annotations

from pathlib import Path

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.offline.from_adam import convert_from_adam
from megatron_adam_mini.offline.reader import Checkpoint, iteration_folder
from megatron_adam_mini.offline.to_adam import convert_to_adam
from megatron_adam_mini.offline.writer import AtomicResult, CheckpointWriter


def adam_to_adam_mini(source: Path, destination: Path, config: AdamMiniConfig) -> None:
    """Make a checkpoint of Adam-mini from one of Megatron's Adam.

    Args:
        source: iteration folder, or folder of ``--save``.
        destination: the same kind of folder; must not exist.
        config: partition into blocks.

    Raises:
        UnreadableError: a path or state that cannot be used.
        CorruptError: damaged, incomplete or unsound state.
    """
    with AtomicResult(source, destination) as result:
        checkpoint = Checkpoint(iteration_folder(source)[0])
        convert_from_adam(checkpoint, CheckpointWriter(checkpoint, result.folder), config)


def adam_mini_to_adam(source: Path, destination: Path) -> None:
    """Make a checkpoint of Megatron's Adam from one of Adam-mini; see :func:`adam_to_adam_mini`."""
    with AtomicResult(source, destination) as result:
        checkpoint = Checkpoint(iteration_folder(source)[0])
        convert_to_adam(checkpoint, CheckpointWriter(checkpoint, result.folder))
