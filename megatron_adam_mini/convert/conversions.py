"""The four conversions, from path to path; a result is complete or does not exist.

Imports the modules of this folder; called by ``cli`` and scripts.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_adam_mini.checkpoint.reader import Checkpoint, iteration_folder
from megatron_adam_mini.checkpoint.writer import (
    AtomicResult,
    CheckpointWriter,
    partial_path,
    refuse_existing,
)
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.convert.from_adam import convert_from_adam
from megatron_adam_mini.convert.from_public import convert_from_public, read_public_file
from megatron_adam_mini.convert.to_adam import convert_to_adam
from megatron_adam_mini.convert.to_public import public_content


def adam_to_adam_mini(source: Path, destination: Path, config: AdamMiniConfig) -> None:
    """Make a checkpoint of Adam-mini from one of Megatron's Adam.

    Args:
        source: iteration folder, or folder of ``--save``.
        destination: the same kind of folder; must not exist.
        config: partition into blocks.

    Raises:
        UnreadableError: a path or the state cannot be used.
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


def public_to_adam_mini(source: Path, destination: Path, template: Path) -> None:
    """Make a checkpoint of Adam-mini from a file with the state of ``adam_mini.Adam_mini`` 1.1.1.

    Args:
        source: the file.
        destination: the same kind of folder as ``template``; must not exist.
        template: checkpoint of Adam-mini for the same model.

    Raises:
        UnreadableError: another model or structure, or a partition finer than the file's v.
        CorruptError: damaged or incomplete state.
    """
    with AtomicResult(template, destination) as result:
        file = read_public_file(source)
        checkpoint = Checkpoint(iteration_folder(template)[0])
        convert_from_public(file, checkpoint, CheckpointWriter(checkpoint, result.folder))


def adam_mini_to_public(source: Path, destination: Path) -> None:
    """Make a file for ``adam_mini.Adam_mini`` 1.1.1 from a checkpoint of Adam-mini.

    The file is one ``torch.save`` of everything, so this needs memory for weights and m.

    Args:
        source: iteration folder, or folder of ``--save``.
        destination: file; must not exist.

    Raises:
        UnreadableError: the model is not a Llama, or the package does not have the partition.
        CorruptError: damaged or incomplete state.
    """
    destination = Path(os.path.abspath(destination))
    refuse_existing(destination)
    partial = partial_path(destination)
    content = public_content(Checkpoint(iteration_folder(source)[0]))
    try:
        with partial.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(destination)
        partial.rename(destination)
    finally:
        partial.unlink(missing_ok=True)
