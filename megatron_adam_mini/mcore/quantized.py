"""FP8 weights (``--fp8-param-gather``): a byte per element, quantized from the main parameters.

Imports megatron.core and ``plan``. A kernel's step writes main parameters only. Then all
data-parallel ranks quantize together, as the scale of a weight depends on all of its elements, by
the function that Megatron's own distributed optimizer calls. The gather of weights sends the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import fp4_utils, fp8_utils
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

#: What Transformer Engine gives parameters that were made from numbers of more bits.
_GET_INITIAL, _CLEAR_INITIAL = "get_high_precision_init_val", "clear_high_precision_init_val"

#: A shard's main parameter, and its first element's position in the parameter.
Shard = tuple[Tensor, int]


def is_quantized(tensor: Tensor) -> bool:
    """Return whether Megatron knows a tensor as one of Transformer Engine's quantized ones."""
    return bool(
        fp8_utils.is_float8tensor(tensor) or _is_grouped(tensor) or fp4_utils.is_nvfp4tensor(tensor)
    )


def _is_grouped(tensor: Tensor) -> bool:
    probe = getattr(fp8_utils, "is_grouped_tensor_with_quantized_storage", None)  # since 0.19
    return bool(probe is not None and probe(tensor))


def refusal(param: Parameter) -> str | None:
    """Return why a quantized parameter is not supported, and the remedy; ``None``: it is."""
    if _is_grouped(param):
        return "is one tensor of several experts. Make a parameter of each expert's weight."
    if fp4_utils.is_nvfp4tensor(param):
        return (
            "is NVFP4, two weights to a byte: positions of weights and gradients differ. Train "
            "without --fp4-param-gather."
        )
    if fp8_utils.is_mxfp8tensor(param):
        return (
            "is MXFP8, whose weights are gathered in bfloat16 through the memory of the gradients. "
            "Use another --fp8-recipe, or train without --fp8-param-gather."
        )
    if param.dtype not in (torch.bfloat16, torch.float16):
        return f"is FP8 in the place of {param.dtype}. Train with --bf16 or --fp16."
    return None


def values_of(tensor: Tensor) -> Tensor:
    """Return the numbers that a tensor stands for; plain tensors stand for themselves."""
    if not is_quantized(tensor):
        return tensor
    values: Tensor = fp8_utils.dequantize_fp8_tensor(tensor)
    return values


def values_in_buffer(
    param_index_map: Mapping[Parameter, Sequence[int]], where: slice, device: torch.device
) -> Tensor:
    """Return what the FP8 weights of a part of a buffer stand for, float32; 0 between them.

    Until :func:`drop_initial_values`, these are the numbers that the weights were made from.

    Args:
        param_index_map: first element and end of each parameter in the buffer.
        where: the part.
        device: where the buffer is.
    """
    values = torch.zeros(where.stop - where.start, dtype=torch.float32, device=device)
    for param, (start, end, *_) in param_index_map.items():
        first, last = max(start, where.start), min(end, where.stop)
        if first < last:
            initial = getattr(param, _GET_INITIAL, lambda: None)()
            whole = (values_of(param.detach()) if initial is None else initial).reshape(-1)
            part = whole[first - start : last - start]
            values[first - where.start : last - where.start].copy_(part)
    return values


def drop_initial_values(params: Iterable[Parameter]) -> None:
    """Free the numbers that quantized weights were made from, as Megatron's optimizer does."""
    for param in params:
        clear = getattr(param, _CLEAR_INITIAL, None)
        if clear is not None:
            clear()


def quantized_in(buffers: Sequence[Any]) -> list[Parameter]:
    """Return the quantized parameters of some of Megatron's buffers, equal on all their ranks."""
    return [param for buffer in buffers for param in buffer.params if is_quantized(param)]


def quantize_(
    params: Sequence[Parameter],
    shard_of: Callable[[Parameter], Shard | None],
    group: ProcessGroup | None,
) -> None:
    """Set the FP8 weights to the quantized main parameters; all ranks of the group must call it.

    Args:
        params: of the buffers that the ranks share, in the same order on all of them.
        shard_of: returns this rank's shard of a parameter, ``None`` if it has none.
        group: the ranks; with parameters never ``None``. They exchange the largest absolute values.
    """
    if not params:
        return
    shards = [shard_of(param) or (None, None) for param in params]
    main, start = zip(*shards, strict=True)
    fp8_utils.quantize_param_shard(list(params), list(main), list(start), group)
