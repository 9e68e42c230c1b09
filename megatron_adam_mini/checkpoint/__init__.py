"""``torch_dist`` checkpoints on disk: read, checked and written without Megatron or process group.

May import torch, and nothing else of this package: it does not interpret the entries.
Data flow: ``metadata`` and ``chunks`` (bytes) -> ``reader`` -> ``writer``. Tensors pass through in
windows, so memory use does not depend on their size.
"""
