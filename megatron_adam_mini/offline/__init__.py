"""Checkpoints on disk, without Megatron, process group or GPU: inspect, verify, convert.

May import torch, ``config``, ``partition`` and ``roles``. Data flow: ``metadata`` and ``chunks``
(bytes) -> ``reader`` -> ``inspection`` | ``verification`` | ``from_adam`` | ``to_adam`` |
``from_public`` | ``to_public`` -> ``writer``. Work is done on one window of one chunk at a time.
"""
