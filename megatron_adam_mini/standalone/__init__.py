"""Adam-mini for plain PyTorch: ``torch.optim.Optimizer`` over whole and sharded parameters.

May import torch, numpy, ``config``, ``plan`` and ``kernels``; no Megatron.

Data flow: ``names`` (name -> what a weight is) -> ``blocks`` (-> which rows share one v)
-> ``mesh_rows`` (which of them this rank holds) -> ``partition`` (all parameters, checked) |
``gradients`` (what this rank holds of them) | ``block_sums`` (sums of squares over whole blocks)
-> ``local_shard`` (state and step of one parameter) | ``scalar_pool`` -> ``optimizer``.

v lies in *row space*: one number per row of the parameter, the same for all rows of a block, so it
is sharded as the rows are. A *row* is an output neuron: an index of dimension 0, or of dimension 1
of a weight that is stored transposed (GPT-2 of transformers). Further words: see ``plan``.
"""
