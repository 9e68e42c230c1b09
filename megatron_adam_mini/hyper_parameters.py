"""What the parameter groups say for the next step: rates, decays, betas, and its number.

Imports ``config``, ``main_params`` and ``kernels``. Data flow: parameter groups ->
**HyperParameters** -> scalars of the kernels, on the device and on the host.
"""

from __future__ import annotations

from torch import Tensor

from megatron_adam_mini.config import check_adam_values
from megatron_adam_mini.kernels import StepScalars
from megatron_adam_mini.main_params import MainParams


class HyperParameters:
    """Values of parameter groups, read anew in every step.

    Args:
        main_params: whose groups.
        decoupled_weight_decay: ``False``: kernels get no decay, as gradients contain it.

    Raises:
        ValueError: a group's value is out of range.
        NotImplementedError: groups have different betas.
    """

    def __init__(self, main_params: MainParams, *, decoupled_weight_decay: bool) -> None:
        self._main_params = main_params
        self._decoupled = decoupled_weight_decay
        for group in main_params.param_groups:  # overrides may have values of their own
            check_adam_values(**{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
        self.betas()

    def betas(self) -> tuple[float, float]:
        """Return the one pair of all groups.

        Raises:
            NotImplementedError: there are several.
        """
        groups = self._main_params.param_groups
        betas = {tuple(group["betas"]) for group in groups} or {(0.0, 0.0)}  # nothing to train
        if len(betas) != 1:
            raise NotImplementedError(
                f"Adam-mini got parameter groups with different betas {sorted(betas)}; all groups "
                "must share one pair. Give the groups different lr or weight_decay instead."
            )
        return betas.pop()

    def write(self, scalars: StepScalars, grad_scale: float | Tensor) -> None:
        """Set the numbers of the next step.

        Args:
            scalars: modified in place, see :meth:`StepScalars.write`.
            grad_scale: factor of the gradients.
        """
        groups = self._main_params.param_groups
        if not self._decoupled:
            groups = [{**group, "weight_decay": 0.0} for group in groups]
        step = self._main_params.step_count + 1
        scalars.write(groups, betas=self.betas(), step=step, grad_scale=grad_scale)
