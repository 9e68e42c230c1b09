"""Memory of a run without running it: bytes per rank for any model and layout, within seconds.

May import numpy, ``config`` and ``plan``, and matplotlib for pictures; no torch, no Megatron.
Data flow: flags -> ``parallel``, ``models`` -> ``stages`` (the parameters that a rank will hold) ->
``buckets`` (where Megatron will put them) -> ``memory`` (bytes that these take) -> ``report`` (text
and JSON) | ``search`` (the same for all layouts of a cluster) -> ``search_report`` -> ``plot``.
"""
