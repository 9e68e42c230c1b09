"""Imported once by the server that forks the ranks of distributed tests.

Importing torch and Megatron takes seconds per process; a forked rank starts in milliseconds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_adam_mini import cpu_host

cpu_host.enable()

# Not used here, but then already there in every rank: importing them takes seconds.
import megatron.core.distributed  # noqa: F401
import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
import megatron.core.optimizer  # noqa: F401
import megatron.core.pipeline_parallel  # noqa: F401
import megatron.training.arguments  # noqa: F401
import megatron.training.training  # noqa: F401
import torch

torch.set_num_threads(1)
