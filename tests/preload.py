# ruff: noqa: F401 (imported so that it is there already in every rank)
"""Imported once by the server that forks the ranks of distributed tests.

Importing torch and Megatron takes seconds per process; a forked rank starts in milliseconds. What
ranks would import on their own stands here too: eight of them on two cores took half a second.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_adam_mini import cpu_host

cpu_host.enable()

import argparse
import contextlib
import functools
import gc
import multiprocessing.managers
import multiprocessing.popen_fork

import megatron.core.datasets.blended_megatron_dataset_builder
import megatron.core.datasets.gpt_dataset
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
import megatron.core.dist_checkpointing.strategies.fully_parallel
import megatron.core.distributed
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.training.arguments
import megatron.training.checkpointing
import megatron.training.training
import numpy.ma
import pytest  # also by every rank, as the main module of its parent
import torch
import torch._dynamo  # by the first torch optimizer of a process, in half a second
import torch.utils.serialization.config
from megatron.core.dist_checkpointing.strategies import filesystem_async

with contextlib.suppress(ModuleNotFoundError):  # since 0.17
    import megatron.core.models.mimo.optimizer
    import megatron.core.tokenizers.text
    import megatron.core.tokenizers.utils.build_tokenizer

import megatron_adam_mini.kernels.cpu
import megatron_adam_mini.mcore.registration
import tests.gather
import tests.megatron_job
import tests.older_megatron
import tests.older_torch
import tests.reference

torch.set_num_threads(1)
tests.older_megatron.install()
tests.older_torch.install()

# The writers of a checkpoint report through a process that Megatron would spawn on every rank, with
# all imports of the main module; here it is forked, as the ranks are.
filesystem_async.get_write_results_queue.__wrapped__.__defaults__ = ("fork",)

# Megatron reads the help of flags from its source, which took each rank as long as eight steps.
with contextlib.suppress(ImportError):  # since 0.17
    from megatron.training.argument_utils import ArgumentGroupFactory

    _read_help = ArgumentGroupFactory._get_field_docstrings
    _help_of = functools.cache(lambda kind: _read_help(ArgumentGroupFactory, kind))
    ArgumentGroupFactory._get_field_docstrings = classmethod(lambda _, kind: dict(_help_of(kind)))
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())

if os.environ.get("TRITON_INTERPRET") == "1":  # see test_backends.py
    import tests.triton_interpreter

    tests.triton_interpreter.install()

# Ranks share these objects with the server for as long as nobody touches them.
gc.collect()
gc.freeze()
