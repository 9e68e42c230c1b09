# ruff: noqa: F401 (imported so that it is there already in every rank)
"""Imported once by the server that forks the ranks of distributed tests.

Importing torch and Megatron takes seconds per process; a forked rank starts in milliseconds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_adam_mini import cpu_host

cpu_host.enable()

import megatron.core.distributed
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.training.arguments
import megatron.training.training
import torch

torch.set_num_threads(1)
