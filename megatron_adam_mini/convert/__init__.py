"""Tools for checkpoints that need no cluster: inspect, verify, convert.

May import torch, tqdm, ``checkpoint``, ``plan``, ``config``, ``adam_rules`` and ``rounding``. Data
flow: ``parameters`` (keys -> parameters) -> ``keys`` (parameters -> blocks) -> ``adam_state``,
``mini_state``, ``llama`` and ``public_state`` (what there is) -> ``inspection``, ``verification``,
``from_adam``, ``to_adam``, ``from_public``, ``to_public``, of which ``conversions`` makes commands.
"""
