"""Glue to Megatron-Core: the only folder that imports ``megatron``.

May import everything but ``convert`` and ``estimate``: a run needs no tools.

Data flow: ``compat``, ``preflight``, ``slices``, ``model_space`` (Megatron's objects) ->
``arguments``, ``param_info``, ``entries``, ``state_view`` (as ours) -> ``pending_load`` ->
``stored_v``, ``flat_buckets``, ``slice_exchange`` -> ``stored_buckets`` -> ``parameter_state`` ->
``adam_import`` -> ``checkpoint`` -> ``distributed_optimizer`` (what Megatron's loop calls) ->
``metrics`` -> ``start_checks`` -> ``rank_plan`` (of one rank) -> ``factory`` (builds the optimizer)
-> ``registration`` (makes Megatron call the factory) -> ``workers``, ``bridge`` (frameworks).
"""
