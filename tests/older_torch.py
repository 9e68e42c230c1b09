"""What the CPU host meets in older versions of torch, and tests must not."""

from __future__ import annotations

import inspect


def install() -> None:
    """Let a mesh of all ranks use the job's gloo group; from torch 2.11 on, it does so by itself.

    Before, it makes a group of NCCL beside it where ``torch.cuda.is_available()``, which is what
    the CPU host says.
    """
    from torch.distributed import device_mesh

    if "cuda:nccl" in inspect.getsource(device_mesh):
        device_mesh.get_backend = lambda group=None: "not gloo"
