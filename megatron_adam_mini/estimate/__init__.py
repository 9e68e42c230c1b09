"""Plan a run without running it: bytes per rank of any model and layout, in seconds on a laptop.

May import numpy, ``config`` and ``plan``; no torch, no Megatron. Data flow: flags
-> ``parallel``, ``models`` -> ``stages`` (the parameters that a rank will hold) -> ``buckets``
(where Megatron will put them) -> ``memory`` (what that allocates) -> ``report`` (text and JSON).
"""
