"""FP8 weights with the interface of Transformer Engine's, which needs a GPU: a stand-in.

Megatron's own code stores them in DDP's buffers, gathers and saves them; only what it calls of
Transformer Engine is computed here. Numbers are e4m3 with one scale for each weight, which is that
of its largest element now (current scaling), or of the step before (delayed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

LARGEST = 448.0
#: Weights that Transformer Engine's layers quantize.
QUANTIZED = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


class Float8Tensor(torch.Tensor):
    """Bytes and a scale in the place of a 16-bit tensor.

    Attributes:
        _data: uint8, of the tensor's shape.
        _scale_inv: what multiplies the bytes' numbers.
        _amax: largest absolute value when it was quantized last.
        _delayed: whether the scale follows ``_amax`` one step later.
    """

    _data: Tensor
    _scale_inv: Tensor
    _amax: Tensor
    _delayed: bool

    @staticmethod
    def __new__(cls, like: Tensor, **attributes: Any) -> Float8Tensor:
        tensor: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        vars(tensor).update(attributes)
        return tensor  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def quantized(cls, values: Tensor, *, delayed: bool) -> Float8Tensor:
        """Return a tensor's quantized copy."""
        amax = values.abs().amax().float()
        data = torch.empty_like(values, dtype=torch.uint8)
        scale_inv = torch.ones_like(amax)
        tensor = cls(values, _data=data, _scale_inv=scale_inv, _amax=amax, _delayed=delayed)
        tensor.copy_(values)
        return tensor

    def dequantize(self) -> Tensor:
        """Return the numbers in the tensor's 16-bit type."""
        numbers = self._data.view(torch.float8_e4m3fn).float()
        return (numbers * self._scale_inv).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0], **{k: vars(args[0])[k] for k in cls.__annotations__})
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            source = args[1].dequantize() if isinstance(args[1], cls) else args[1]
            quantize([args[0]], [source.reshape(-1)], [0], None)
            return args[0]

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, cls) else value

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantize(weights: list[Any], main: list[Any], starts: list[Any], group: Any, *_: Any) -> None:
    """Do what Transformer Engine's ``cast_master_weights_to_fp8`` does."""
    amax = torch.stack(
        [
            w._amax.new_zeros(()) if m is None else m.abs().amax().float()
            for w, m in zip(weights, main, strict=True)
        ]
    )
    if group is not None:
        distributed.all_reduce(amax, op=distributed.ReduceOp.MAX, group=group)
    for weight, shard, start, now in zip(weights, main, starts, amax, strict=True):
        scale = LARGEST / (weight._amax if weight._delayed else now)
        if shard is not None:
            numbers = (shard.to(weight.dtype).float() * scale).clamp(-LARGEST, LARGEST)
            part = weight._data.view(-1)[start : start + shard.numel()]
            part.copy_(numbers.to(torch.float8_e4m3fn).view(torch.uint8))
        weight._scale_inv.copy_(1.0 / scale)
        weight._amax.copy_(now)


def _move(weight: Any, data: Tensor) -> None:
    data.detach().copy_(weight._data)
    weight._data = data


def make_known() -> None:
    """Let Megatron find this class where it looks for Transformer Engine's."""
    from megatron.core import fp8_utils
    from megatron.core.distributed import param_and_grad_buffer

    if fp8_utils.FP8_TENSOR_CLASS is Float8Tensor:
        return
    gather = param_and_grad_buffer.dist_all_gather_func

    def gather_bytes(whole: Tensor, part: Tensor, **options: Any) -> Any:
        # Gloo gathers tensors of one type only in one call, NCCL any.
        return gather(whole.view(torch.uint8), part.view(torch.uint8), **options)

    param_and_grad_buffer.dist_all_gather_func = gather_bytes
    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS = True
    fp8_utils.FP8_TENSOR_CLASS = Float8Tensor
    fp8_utils._modify_underlying_storage_impl = _move
    fp8_utils._quantize_param_shard_impl = quantize
    fp8_utils.is_te_min_version = lambda *_, **__: True


def quantize_weights(model: Any, recipe: str) -> None:
    """Replace weights of linear layers by quantized ones, which keep what they were made from.

    Args:
        model: chunk with 16-bit weights.
        recipe: ``current`` or ``delayed``, of the scale.
    """
    make_known()
    for name, param in list(model.named_parameters()):
        if not name.endswith(QUANTIZED):
            continue
        kept = [param.detach().clone()]
        weight: Any = torch.nn.Parameter(
            Float8Tensor.quantized(param.detach(), delayed=recipe == "delayed")
        )
        vars(weight).update(vars(param))
        weight.get_high_precision_init_val = lambda kept=kept: kept[0] if kept else None
        weight.clear_high_precision_init_val = kept.clear
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, weight)
