"""A stand-in for Transformer Engine's ``FusedAdam``, so that Megatron's Adam can save and resume.

Without Transformer Engine or Apex, Megatron falls back to torch's AdamW, with which a resume fails.
Here is what its distributed optimizer sees of the fused one: one step count per group, and two
moments per parameter, made in the first step.
"""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool,
    ) -> None:
        assert adam_w_mode
        assert not capturable
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            group["step"] = step = group.get("step", 0) + 1
            for param in group["params"]:
                state, grad = self.state[param], param.grad
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                param.mul_(1 - lr * group["weight_decay"])
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_() + group["eps"]
                param.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**step))


def install() -> None:
    """Let Megatron believe that Transformer Engine is there, as far as its Adam is concerned."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
