"""Tools for checkpoints that need no cluster: inspect, verify, convert.

May import torch, ``checkpoint``, ``plan`` and ``config``. Data flow: ``keys`` (entries ->
parameters) -> ``inspection`` | ``verification`` | ``from_adam`` | ``to_adam`` | ``from_public`` |
``to_public``, of which ``conversions`` makes commands.
"""
