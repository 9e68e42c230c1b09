"""Try an installed package without Megatron: a step of AdamMini, by the C++ kernels."""

import importlib.util

import torch

from megatron_adam_mini import AdamMini

assert importlib.util.find_spec("megatron") is None, "this is to show what works without Megatron"
layer = torch.nn.Linear(8, 4)
before = layer.weight.detach().clone()
optimizer = AdamMini(layer.named_parameters(), lr=1e-2, rules={"*": "tensor"}, backend="cpu")
layer(torch.ones(2, 8)).sum().backward()
optimizer.step()
assert not torch.equal(layer.weight, before)
print("a step by the C++ kernels was taken without Megatron")
