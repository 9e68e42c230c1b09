"""Does Adam-mini lose anything against AdamW? Language models, trained by both and compared.

``python -m evidence`` (``make evidence``) trains them by the package's stand-alone ``AdamMini`` and
by ``torch.optim.AdamW``; nothing of the package imports this folder.

Data flow: ``settings`` (what one run is) -> ``grid`` (which runs a stage has; later stages take the
best rates of earlier ones) -> ``sweep`` (processes) -> ``training`` (one run, of ``corpora`` and
``model``) -> ``run_log`` (one JSON line per run) -> ``comparison`` (gaps and their intervals) ->
``figures``, ``report``. What comes after ``run_log`` reads the lines only. ``twin`` trains one of
the models by Megatron, too.
"""
