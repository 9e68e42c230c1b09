"""What this rank holds of each gradient.

Imports torch and ``mesh_rows``. Its collectives are the first ones of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, zeros

from megatron_adam_mini.standalone.mesh_rows import local


def take_gradients(params: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
    """Return the gradients of parameters, of sharded ones what this rank holds.

    The gradient of a ``DTensor`` is one tensor: if a rank has none and another one of the mesh
    does, the rank's part is zero, so that all of them take the step. Tensor parallelism may leave
    partial sums for a replicated weight; the ranks of its mesh add them up here.

    Collectives, of all ranks of a mesh: an all-reduce of one number per parameter for each of its
    dimensions, and those that add up partial sums.

    Args:
        params: parameters with their names, in the same order on all ranks.

    Returns:
        Parameters without a gradient are missing.

    Raises:
        TypeError: a gradient is sparse.
    """
    found = {param: param.grad for param in params if param.grad is not None}
    for param, grad in found.items():
        if grad.layout != torch.strided:
            raise TypeError(
                f"The gradient of {params[param]!r} has layout {grad.layout}; AdamMini allows "
                "dense ones. Remedy: nn.Embedding(..., sparse=False), or torch.optim.SparseAdam."
            )
    by_mesh: dict[DeviceMesh, list[DTensor]] = {}
    for param in params:
        if isinstance(param, DTensor):
            by_mesh.setdefault(param.device_mesh, []).append(param)
    for mesh, sharded in by_mesh.items():
        found.update(_zeros_of_missing(mesh, sharded))
    return {
        param: local(
            grad.redistribute(placements=param.placements)
            if isinstance(grad, DTensor) and isinstance(param, DTensor)
            else grad
        )
        for param, grad in found.items()
    }


def _zeros_of_missing(
    mesh: DeviceMesh, params: Sequence[DTensor]
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield zeros for the gradients that this rank lacks and others of the mesh have."""
    layouts = [_layout(param) for param in params]
    if mesh.size() == 1:
        return
    # Where the mesh has collectives: parameters may lie in host memory (CPUOffloadPolicy).
    most = torch.tensor(layouts, dtype=torch.float32).to(mesh.device_type, non_blocking=True)
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            distributed.all_reduce(most, op=distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    if 0 not in layouts:
        return  # and the device need not be waited for
    for param, own, others in zip(params, layouts, most.tolist(), strict=True):
        if others and not own:
            yield param, _zero_gradient(param, int(others))


def _layout(param: DTensor) -> int:
    """Return 0 without a gradient, else 1 and a bit for each mesh dimension of partial sums."""
    if param.grad is None:
        return 0
    placements: Sequence[Placement] = getattr(param.grad, "placements", param.placements)
    return 1 + sum(2 << dim for dim, placement in enumerate(placements) if placement.is_partial())


def _zero_gradient(param: DTensor, layout: int) -> DTensor:
    partial = [bool(layout & 2 << dim) for dim in range(param.device_mesh.ndim)]
    held = [
        Replicate() if summed else placement
        for summed, placement in zip(partial, param.placements, strict=True)
    ]
    whole = zeros(param.shape, dtype=param.dtype, device_mesh=param.device_mesh, placements=held)
    return DTensor.from_local(
        whole.to_local().to(param.device),
        param.device_mesh,
        [Partial() if summed else held[dim] for dim, summed in enumerate(partial)],
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
