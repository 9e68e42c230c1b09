"""Saving and loading: copies of state are made in host memory, in parts, and none on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_adam_mini import piece_values
from megatron_adam_mini.main_params import MainParams
from megatron_adam_mini.mcore import checkpoint, parameter_state
from megatron_adam_mini.mcore.entries import SHARDS
from megatron_adam_mini.mcore.model_space import ModelEntries
from megatron_adam_mini.mcore.slices import ShardedBuffer
from megatron_adam_mini.plan import buffer_plan
from megatron_adam_mini.plan.step_plan import ColumnRun, RowRun, StepPlan
from megatron_adam_mini.state import BufferState, RankState
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import load, metadata_of, model_state, save
from tests.test_checkpoint_calls import JOB, move
from tests.test_step import state_bits

#: Elements of a part here; pieces have up to 2,240.
PART = 1000
SMALL = {"param_remainders": True, "exp_avg_dtype": "bf16"}
JOBS = {
    "float32 weights": replace(JOB, tp=1, bf16=False),
    "float32 main parameters": replace(JOB, tp=1),
    "bf16 m": replace(JOB, tp=1, adam_mini={"exp_avg_dtype": "bf16"}),
    "small": replace(JOB, tp=1, adam_mini=SMALL),
    "small, buckets": replace(JOB, tp=1, adam_mini=SMALL | {"checkpoint_format": "buckets"}),
    "small, columns": replace(JOB, tp=1, adam_mini=SMALL | {"preset": "row-column"}),
    "small, replicated": replace(
        JOB, tp=1, adam_mini=SMALL, distributed_optimizer=False, overlap=False
    ),
}


#: Its constants cannot be made on a GPU that is not there.
EIGHT_BITS = {"8 bits": replace(JOB, tp=1, adam_mini=SMALL | {"exp_avg_dtype": "fp8"})}


class DeviceMemory(TorchDispatchMode):
    """Records the bytes of each storage that an operator makes in device memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.device.type == "cuda" and storage_of(t) not in known:
                self.made.append(t.untyped_storage().nbytes())
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def on_gpu(mode: FakeTensorMode, plan: StepPlan, state: RankState) -> RankState:
    """Return the state on a GPU that is not there: tensors that compute nothing."""

    def moved(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda", 0))

    def buffer_of(held: BufferState) -> Any:
        weight = moved(held.buffer.weight)
        if not isinstance(held.buffer, ShardedBuffer):
            return SimpleNamespace(weight=weight)
        fields = {**vars(held.buffer.buffer), "param_data": weight}
        return ShardedBuffer(SimpleNamespace(**fields), held.buffer.number)

    found = RankState(
        [
            BufferState(
                buffer_of(held),
                held.share,
                None if held.param is None else moved(held.param),
                moved(held.exp_avg),
                moved(held.exp_avg_sq_E),
            )
            for held in state.on_device
        ],
        moved(state.exp_avg_sq_S),
        {},
    )
    return found.with_scales(plan)


def not_redirected() -> Any:
    """Return a context in which the CPU host leaves tensors where they are."""
    return torch._C.DisableTorchFunction()


def each_in_turn(jobs: dict[str, Job]) -> Iterator[tuple[str, Trainer]]:
    from megatron.core import parallel_state

    buffer_plan.PART_NUMEL = parameter_state.PART_NUMEL = PART
    for name, job in jobs.items():
        yield name, Trainer(job)
        parallel_state.destroy_model_parallel()


def saved_and_loaded_on_gpu(jobs: dict[str, Job]) -> dict[str, Any]:
    """Return the largest storage that a save, and a load, make on the device; and entries there."""
    found = {}
    for name, trainer in each_in_turn(jobs):
        entries = ModelEntries(model_state(trainer, metadata_of(None)))
        view = trainer.optimizer.member.state_view()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        torch._C._ensureCUDADeviceGuardSet()  # which the mode calls where there is no GPU
        with not_redirected():
            view = replace(view, state=on_gpu(mode, view.inner.plan, view.state))
        kept = {storage_of(flat) for flat in view.state.flat_tensors()}
        kept |= {storage_of(held.buffer.weight) for held in view.state.on_device}
        with not_redirected(), mode, DeviceMemory() as saving:
            saved = checkpoint.state_to_save(view, entries)
        with not_redirected(), mode, DeviceMemory() as loading:
            pending = checkpoint.prepare_load(view, entries, saved["adam_mini"])
            read = {n: {k: s.data for k, s in boxes.items()} for n, boxes in pending.asked.items()}
            checkpoint.finish_load(view, pending, {**saved, SHARDS: read})
        places = set()
        for boxes in (*saved[SHARDS].values(), *pending.asked.values()):
            for box in boxes.values():
                on_host = box.data.device.type == "cpu"
                assert on_host or storage_of(box.data) in kept, f"{box.key} is a copy on the device"
                places.add((box.key.split(".")[2], "host" if on_host else "device"))
        found[name] = max(saving.made), max(loading.made), places
    return found


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_saving_and_loading_make_no_copy_of_state_on_the_device() -> None:
    (found,) = run_ranks(1, saved_and_loaded_on_gpu, JOBS)
    assert found.keys() == JOBS.keys()
    for name, (saving, loading, places) in found.items():
        # Temporaries of a part, such as remainders and weights as int32.
        assert saving <= 4 * PART, name
        assert loading <= 4 * PART, name
        where = {kind: {place for key, place in places if key == kind} for kind, _ in places}
        if name.startswith("small, buckets"):
            assert where["bucket"] == {"host"}
        elif name.startswith("small"):
            assert where["param"] == where["exp_avg"] == {"host"}
        elif name == "float32 main parameters":
            assert where["param"] == where["exp_avg"] == {"device"}
        else:
            assert where["v_row"] == {"host"}


def saved_after_a_move(job: Job) -> tuple[int, set[str], set[str]]:
    """Return the largest storage that the save makes on the device, and where the state is."""
    trainer = Trainer(job)
    view = trainer.optimizer.member.state_view()
    entries = ModelEntries(model_state(trainer, metadata_of(None)))
    plan, groups = view.inner.plan, [{"lr": 0.1}]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch._C._ensureCUDADeviceGuardSet()
    with not_redirected(), mode:
        gpu, owners = torch.device("cuda", 0), [0] * len(plan.parameters)
        state = on_gpu(mode, plan, view.state)
        main_params = MainParams(plan, state, groups, owners, device=gpu)
        main_params.move_to("cpu")
        with DeviceMemory() as memory:
            held = main_params.attach(where_it_is=True)
            checkpoint.state_to_save(replace(view, state=held), entries)
        there = {flat.device.type for flat in held.flat_tensors()}
        back = {flat.device.type for flat in main_params.attach().flat_tensors()}
    return max(memory.made), there, back


def test_state_that_was_moved_to_the_cpu_is_saved_from_there() -> None:
    (found,) = run_ranks(1, saved_after_a_move, JOBS["small"])
    assert found == (0, {"cpu"}, {"cuda"})


def comes_back(jobs: dict[str, Job], folder: str) -> dict[str, bool]:
    """Save and load in both formats, in many parts; return whether all bits came back."""
    found = {}
    for name, trainer in each_in_turn(jobs):
        move(trainer)
        wanted, path = state_bits(trainer), Path(folder, name)
        if torch.distributed.get_rank() == 0:
            path.mkdir()
        torch.distributed.barrier()
        save(trainer, str(path))
        gathered = trainer.optimizer.member.get_parameter_state_dp_zero()
        move(trainer)
        assert state_bits(trainer) != wanted
        load(trainer, str(path))
        found[name] = state_bits(trainer) == wanted
        if trainer.job.distributed_optimizer:
            move(trainer)
            trainer.optimizer.member.load_parameter_state_from_dp_zero(gathered)
            trainer.optimizer.member.optimizer.step_count = trainer.job.steps
            found[f"{name}, gathered"] = state_bits(trainer) == wanted
    return found


def test_state_in_many_parts_comes_back_bit_for_bit(tmp_path: Path) -> None:
    jobs = JOBS | EIGHT_BITS
    for found in run_ranks(2, comes_back, jobs, str(tmp_path)):
        assert found == dict.fromkeys(found, True)
        assert len(found) == 2 * len(jobs) - 1


def test_sums_of_segments_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ends = np.array([3, 350, 351, 700])
    rows = RowRun(slice(0, 4), np.array([0, 3, 350, 351]), ends)
    columns = ColumnRun(slice(4, 11), 700, 1000, 7, 0, 3)
    short = ColumnRun(slice(11, 16), 0, 5, 7, 0, 0)
    plan: Any = SimpleNamespace(runs_of=lambda _: [rows, columns, short])
    piece: Any = None
    exact = elements.double()
    expected = [
        *(part.sum() for part in exact[:700].tensor_split(ends[:-1].tolist())),
        *(exact[700 + column : 1000 : 7].sum() for column in range(7)),
        *exact[:5],
    ]
    for part in (1, 20, 100, 5000):
        monkeypatch.setattr(piece_values, "PART_NUMEL", part)
        found = piece_values.sum_over_segments(plan, piece, elements)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
