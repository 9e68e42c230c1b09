"""``torch_dist`` checkpoints on disk: read, checked and written without Megatron or process group.

May import torch, and nothing else of this package: what the entries mean is not known here.
Data flow: ``metadata`` and ``chunks`` (bytes) -> ``reader`` -> ``writer``. Tensors pass through in
windows, so that memory does not depend on their size.
"""
