"""How Megatron's flags and config store state in fewer bits -> Adam-mini's options for it.

Imports ``config``, torch and nothing of Megatron. ``use_precision_aware_optimizer`` selects
Transformer Engine's Adam there. Here it selects what that one would have stored, so that a recipe
needs another name of the optimizer and nothing else.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from megatron_adam_mini.config import LEAN_WITHOUT_REMAINDERS, AdamMiniConfig

logger = logging.getLogger(__name__)

FLAG = "use_precision_aware_optimizer"
DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
#: What to give instead of a dtype that is refused.
_REMEDIES = {
    "main_params_dtype": "drop the flag; with --bf16, --adam-mini-param-remainders takes 16 bits, "
    "too, and loses none of the 32",
    "main_grads_dtype": "--grad-reduce-in-bf16, or add that flag",
    "exp_avg_sq_dtype": "drop the flag, as v is one number per block; or add that flag, with which "
    "it is accepted and v stays float32",
}
#: What Megatron's config allows for all optimizers.
PLAIN: dict[str, Any] = {FLAG: False, **dict.fromkeys(DTYPES, torch.float32)}


def storage_options(
    source: Any, options: AdamMiniConfig, *, fp8_weights: bool = False
) -> AdamMiniConfig:
    """Return the options with what Megatron's flags or config ask for.

    Gradients are read as they are in Megatron's buffers, whatever ``main_grads_dtype`` says, and v
    stays float32, which takes next to nothing.

    Args:
        source: arguments, or ``OptimizerConfig``.
        options: Adam-mini's own.
        fp8_weights: whether weights are quantized, so that Megatron keeps float32 main parameters.

    Raises:
        NotImplementedError: main parameters would be of another type than float32; or another
            dtype is given without the flag that Megatron wants for it.
        ValueError: m cannot be stored like that, or the config says other than the options.
    """
    aware = bool(getattr(source, FLAG, False))
    for name in ("main_params_dtype", *(() if aware else ("main_grads_dtype", "exp_avg_sq_dtype"))):
        dtype = dtype_name(getattr(source, name, "fp32"))
        if dtype != "fp32":
            raise NotImplementedError(
                f"--optimizer adam_mini does not support --{name.replace('_', '-')} {dtype}"
                f"{'' if aware else ' without --use-precision-aware-optimizer'}: allowed is fp32. "
                f"Remedy: {_REMEDIES[name]}."
            )
    remainders = bool(getattr(source, "store_param_remainders", True))
    if options.param_remainders and not remainders:
        name = "lean" if options.lean else "param_remainders"
        rest = f"; {LEAN_WITHOUT_REMAINDERS} keeps float32 main parameters" if options.lean else ""
        raise ValueError(
            f"Adam-mini {name}=True (--adam-mini-{name.replace('_', '-')}) stores main parameters "
            "as 16-bit remainders, but the config has store_param_remainders=False. Remedy: drop "
            f"one of them{rest}."
        )
    asked: dict[str, Any] = {}
    exp_avg_dtype = dtype_name(getattr(source, "exp_avg_dtype", "fp32"))
    if exp_avg_dtype != "fp32":
        if not options.lean and options.exp_avg_dtype not in ("fp32", exp_avg_dtype):
            raise ValueError(
                f"Adam-mini exp_avg_dtype={options.exp_avg_dtype!r}, but the config has "
                f"exp_avg_dtype {exp_avg_dtype} for m. Remedy: give both the same, or leave one of "
                "them at float32."
            )
        asked["exp_avg_dtype"] = exp_avg_dtype
    # With the state in host memory, Megatron wants the flag for other reasons, and keeps float32.
    host = bool(getattr(source, "optimizer_cpu_offload", False))
    if aware and source.bf16 and remainders and not host and not fp8_weights:
        asked["param_remainders"] = True
    return replace(options, **asked)


def report_ignored_dtype(source: Any) -> None:
    """Log on the first rank that v does not get the dtype that arguments or config want for it."""
    dtype = dtype_name(getattr(source, "exp_avg_sq_dtype", "fp32"))
    if dtype != "fp32" and _is_first_rank():
        _report_ignored(dtype)


@functools.cache  # once: Megatron makes a config from the same arguments several times
def _report_ignored(dtype: str) -> None:
    logger.warning(
        "Adam-mini keeps v in float32, not in %s (exp_avg_sq_dtype): it is one number per block, "
        "and takes next to nothing.",
        dtype,
    )


def report_other_storage(saved: Mapping[str, Any] | None, options: AdamMiniConfig) -> None:
    """Log on the first rank that a checkpoint's run stored its state in other bits than this one.

    Checkpoints hold float32 values, so any run loads them.

    Args:
        saved: :meth:`AdamMiniConfig.storage_fields` of that run; ``None``: it did not say.
        options: of this run.
    """
    own = options.storage_fields()
    if saved is None or saved == own or not _is_first_rank():
        return
    before, now = saved["exp_avg_dtype"], own["exp_avg_dtype"]
    # Codes times powers of two are bfloat16 numbers.
    loses = before != now != "fp32" and (before, now) != ("fp8", "bf16")
    logger.warning(
        "The checkpoint's run stored %s; this run stores %s. Main parameters are the same, bit for "
        "bit, and so is v; m %s.",
        _described(saved),
        _described(own),
        f"is rounded to {now} once, now" if loses else "is that of the checkpoint",
    )


def _is_first_rank() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _described(storage: Mapping[str, Any]) -> str:
    main = "16-bit remainders" if storage["param_remainders"] else "float32 main parameters"
    rounded = ", rounded stochastically" if storage["stochastic_rounding"] else ""
    return f"{main} and m as {storage['exp_avg_dtype']}{rounded}"


def plain_config(config: Any) -> Any:
    """Return the config as Megatron's own code may see it: without what is Adam-mini's now."""
    if not getattr(config, FLAG, False):
        return config
    plain = copy.copy(config)
    vars(plain).update(PLAIN)
    plain.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False  # made of the flag
    return plain


def wrap_config_check(original: Callable[..., Any], optimizer: str) -> Callable[..., Any]:
    """Return the check of Megatron's config, which asks for Transformer Engine's Adam otherwise.

    Args:
        original: ``OptimizerConfig.__post_init__``.
        optimizer: name of Adam-mini.
    """

    @functools.wraps(original)
    def check(config: Any) -> Any:
        if config.optimizer != optimizer:
            return original(config)
        storage_options(config, AdamMiniConfig())
        given = {name: getattr(config, name) for name in PLAIN}
        vars(config).update(PLAIN)
        try:
            return original(config)
        finally:
            vars(config).update(given)

    return check


def dtype_name(dtype: Any) -> str:
    """Return Megatron's name of a dtype: arguments hold that or torch's, configs also as text."""
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}
    names["uint8"] = "fp8"  # what Megatron's parser makes of it
    return names.get(str(dtype).removeprefix("torch."), str(dtype))
