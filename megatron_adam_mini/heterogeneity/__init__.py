"""How much the Hessians of a model's blocks differ: their spectra, and a distance among these.

May import torch, numpy, ``config``, ``plan`` and ``standalone``, matplotlib where it draws and tqdm
where it waits; no Megatron.

Data flow: ``parts`` (module -> blocks) -> ``products`` (Hessian of one block, times a vector) ->
``lanczos`` (-> its spectrum) -> ``distance`` (spectra -> how far they lie apart) ->
``measurement`` (all of it) -> ``plot``, and ``report`` for ``flags`` and the command line.

Words: the *spectrum* of a block is a distribution of eigenvalues, given by nodes and their
weights; further words: see ``plan``.

Source: Zhang et al., "Why Transformers Need Adam: A Hessian Perspective", arXiv:2402.16788;
stochastic Lanczos quadrature: Ghorbani, Krishnan and Xiao, arXiv:1901.10159.
"""
