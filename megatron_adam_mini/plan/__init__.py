"""Every integer of a run's step, made once and frozen: no torch, no Megatron.

May import numpy, the standard library and ``config``. Data flow: ``roles`` (name -> what it is) ->
``partition`` (what shares one second moment) -> ``manifest`` (what checkpoints say of that);
``partition`` -> ``layout`` (where that lies in a rank's slices) -> ``reduction`` (which sums cross
ranks).
"""
