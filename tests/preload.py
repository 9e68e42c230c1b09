"""Imported once by the server that forks the ranks of distributed tests.

Importing torch and Megatron takes seconds per process; a forked rank starts in milliseconds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_adam_mini import cpu_host

cpu_host.enable()

import torch

torch.set_num_threads(1)
