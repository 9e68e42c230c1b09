"""Glue to Megatron-Core: the only folder that imports ``megatron``.

May import everything but ``convert`` and ``estimate``: a run needs no tools.

Data flow: ``compat``, ``preflight``, ``slices``, ``model_space`` (Megatron's objects) ->
``arguments``, ``param_info``, ``entries`` (as ours) -> ``adam_import`` -> ``checkpoint`` ->
``distributed_optimizer`` (what Megatron's loop calls) -> ``metrics`` -> ``factory`` (builds it) ->
``registration`` (makes Megatron call the factory) -> ``workers``, ``bridge`` (frameworks).
"""
