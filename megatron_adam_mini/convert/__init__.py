"""Tools for checkpoints that need no cluster: inspect, verify, convert.

May import torch, tqdm, ``checkpoint``, ``plan``, ``config``, ``adam_rules`` and ``rounding``.

Data flow: ``parameters`` (of keys) -> ``blocks`` (of parameters) -> ``adam_state``, ``mini_state``,
``public_state`` -> ``inspection``, ``verification``, ``from_adam``, ``to_adam`` -> ``from_public``,
``to_public`` -> ``conversions`` (of paths).
"""
