"""Offline conversion between Megatron's Adam and Adam-mini, on checkpoints of real runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_adam_mini.cli import main
from megatron_adam_mini.config import PRESETS
from tests.adam_checkpoints import (
    ADAM,
    MINI,
    load_and_train,
    load_each,
    read_all,
    saved,
    train_and_save,
)
from tests.gather import whole_tensors
from tests.ranks import run_ranks
from tests.reference import element_labels, one_label, qkv_labels, row_labels

#: Relative error of a float64 mean rounded to float32, against one summed in another order.
MEAN_TOLERANCE = 2.0**-23
#: On load v is a float32 sum over the segments of a block, and over ranks: a few float32 roundings,
#: of which offline there is one.
SUM_TOLERANCE = 8 * 2.0**-24

OURS, STOCK = "optimizer.adam_mini.", "optimizer.state."


class Checkpoints:
    """Folders of real runs, saved when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __getitem__(self, name: str) -> Path:
        return saved(name, self._factory)


@pytest.fixture
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory)


def labels_of(key: str, shape: torch.Size) -> Tensor:
    """Return the paper's blocks of one parameter, written apart from the package."""
    if "linear_qkv.weight" in key:
        return qkv_labels(MINI.heads, MINI.groups, MINI.hidden // MINI.heads, MINI.hidden)
    if "router" in key:
        return element_labels(*shape)
    return row_labels(*shape) if len(shape) == 2 else one_label(*shape)


def means(values: Tensor, labels: Tensor) -> Tensor:
    """Return every element's block mean, by brute force in float64."""
    found = torch.empty_like(values, dtype=torch.float64)
    for label in labels.unique():
        found[labels == label] = values[labels == label].double().mean()
    return found


def layers_of(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Cut a stack of layers, and one of the experts in them, into parameters."""
    found = [(key, value)]
    if re.search(r"\.layers\.(?!\d)", key):
        found = [(key.replace(".layers.", f".layers.{i}."), v) for i, v in enumerate(value)]
    return [
        (name.replace(".experts.experts.", f".experts.experts.{i}."), part)
        for name, stack in found
        for i, part in enumerate(stack if ".experts.experts." in name else [stack])
    ]


@pytest.mark.support(
    {
        "adam": "GPT, Llama: GQA, SwiGLU or GELU, biases",
        "adam-tp2": "tensor parallelism",
        "plain": "data parallelism, replicated state",
    },
    "conversion",
)
@pytest.mark.parametrize("name", ["adam", "adam-tp2", "plain", "adam-experts"])
def test_adam_to_adam_mini_keeps_masters_and_m_and_averages_v(name, checkpoints, tmp_path):
    assert main(["convert", "--to", "adam-mini", str(checkpoints[name]), str(tmp_path / "x")]) == 0
    before, after = read_all(checkpoints[name]), read_all(tmp_path / "x")
    main_kind = "fp32_param" if name == "plain" else "param"
    seen = 0
    for key, value in before.items():
        kind, _, model_key = key.removeprefix(STOCK).partition(".")
        if not key.startswith(STOCK):
            assert torch.equal(after.pop(key), value), key
            continue
        for layer_key, layer in layers_of(model_key, value):
            seen += 1
            if kind in (main_kind, "exp_avg"):
                ours = after.pop(f"{OURS}{kind.removeprefix('fp32_')}.{layer_key}")
                assert torch.equal(ours, layer), layer_key
                assert layer.abs().max() > 0
            else:
                assert kind == "exp_avg_sq"
                by_element = f"{OURS}v_element.{layer_key}"
                if "router" in layer_key:
                    assert torch.equal(after.pop(by_element), layer), layer_key
                    continue
                rows = after.pop(f"{OURS}v_row.{layer_key}")
                expected = means(layer, labels_of(layer_key, layer.shape))
                narrow = (1,) * (layer.ndim - 1)
                difference = (rows.double().view(-1, *narrow) - expected).abs()
                assert (difference <= MEAN_TOLERANCE * expected).all(), layer_key
    assert seen == 3 * (46 if name == "adam-experts" else 3 + 6 * MINI.layers)
    assert not after, "entries that come from nothing"


@pytest.mark.parametrize("name", ["adam", "adam-tp2", "adam-experts"])
def test_the_round_trip_keeps_masters_and_m_and_gives_elements_their_mean(
    name, checkpoints, tmp_path
):
    assert main(["convert", "--to", "adam-mini", str(checkpoints[name]), str(tmp_path / "a")]) == 0
    assert main(["convert", "--to", "adam", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    before, after = read_all(checkpoints[name]), read_all(tmp_path / "b")
    assert before.keys() == after.keys()
    for key, value in before.items():
        if f"{STOCK}exp_avg_sq" not in key:
            assert torch.equal(value, after[key]), key
            continue
        old, new = layers_of(key, value), layers_of(key, after[key])
        for (layer_key, a), (_, b) in zip(old, new, strict=True):
            expected = means(a, labels_of(layer_key, a.shape))
            assert ((b.double() - expected).abs() <= MEAN_TOLERANCE * expected).all(), layer_key
    for step in ("a", "b"):
        assert main(["verify", str(tmp_path / step)]) == 0


def test_with_one_block_per_element_adam_continues_bit_for_bit(checkpoints, tmp_path):
    args = ["convert", "--to", "adam-mini", "--full-v", "*", "--"]
    assert main([*args, str(checkpoints["adam"]), str(tmp_path / "a")]) == 0
    assert main(["convert", "--to", "adam", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    (direct,) = run_ranks(1, load_and_train, ADAM, str(checkpoints["adam"]), 2)
    (converted,) = run_ranks(1, load_and_train, ADAM, str(tmp_path / "b"), 2)
    for name, tensors in direct[0].items():
        for kind, value in tensors.items():
            assert torch.equal(value, converted[0][name][kind]), f"{kind} {name}"
    for a, b in zip(direct[1], converted[1], strict=True):
        assert (a.values["weight"] == b.values["weight"]).all()
    assert direct[2] == converted[2]


def test_adam_mini_trains_on_from_a_converted_checkpoint(checkpoints, tmp_path):
    source, result = checkpoints["adam"], tmp_path / "a"
    assert main(["convert", "--to", "adam-mini", str(source), str(result)]) == 0
    job = replace(MINI, tp=2)
    loaded = run_ranks(2, load_and_train, job, str(result), 3)
    stored = read_all(result)
    from megatron_adam_mini.convert.parameters import name_of

    for kind, key in (("param", "param"), ("exp_avg", "exp_avg"), ("v_row", "v")):
        found = whole_tensors([r[0] for r in loaded], key, job)
        for stored_key, value in stored.items():
            if stored_key.startswith(f"{OURS}{kind}."):
                name = name_of(stored_key.removeprefix(f"{OURS}{kind}."), local=True)
                got = found.pop(name)
                if kind == "v_row":
                    value = value.view(-1, *(1,) * (got.ndim - 1)).expand(got.shape)
                assert torch.equal(got, value), stored_key
        assert not found
    losses = loaded[0][2]
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("preset", PRESETS)
def test_convert_and_on_load_adam_becomes_the_same_adam_mini(preset, checkpoints, tmp_path):
    source, result = checkpoints["adam"], tmp_path / "a"
    command = ["convert", "--to", "adam-mini", "--preset", preset]
    assert main([*command, str(source), str(result)]) == 0
    job = replace(MINI, tp=2, adam_mini={"preset": preset})
    ranks = run_ranks(2, load_each, job, [str(result), str(source)])
    for key in ("param", "exp_avg", "v"):
        offline, online = (whole_tensors([r[i] for r in ranks], key, job) for i in (0, 1))
        assert offline.keys() == online.keys()
        for name, value in offline.items():
            if key == "v":
                limits = {"rtol": SUM_TOLERANCE, "atol": 0.0}
                torch.testing.assert_close(value, online[name], **limits, msg=name)
            else:
                assert torch.equal(value, online[name]), name


def test_megatrons_adam_trains_on_from_a_checkpoint_of_adam_mini(checkpoints, tmp_path):
    result = tmp_path / "a"
    assert main(["convert", "--to", "adam", str(checkpoints["mini"]), str(result)]) == 0
    ((state, _, losses),) = run_ranks(1, load_and_train, ADAM, str(result), 3)
    ours = read_all(checkpoints["mini"])
    layer = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(state[layer]["param"], ours[f"{OURS}param.{layer}"])
    assert torch.equal(state[layer]["exp_avg"], ours[f"{OURS}exp_avg.{layer}"])
    rows = ours[f"{OURS}v_row.{layer}"]
    assert torch.equal(state[layer]["exp_avg_sq"], rows[:, None].expand(-1, MINI.ffn))
    assert all(torch.isfinite(torch.tensor(losses)))


def test_options_of_the_partition(checkpoints, tmp_path, capsys):
    command = ["convert", "--to", "adam-mini", str(checkpoints["adam"])]
    assert main([*command, str(tmp_path / "t"), "--preset", "tensor"]) == 0
    assert main([*command, str(tmp_path / "v"), "--value-as-block"]) == 0
    key = f"{OURS}v_row.decoder.layers.0.self_attention.linear_qkv.weight"
    tensor, value = read_all(tmp_path / "t")[key], read_all(tmp_path / "v")[key]
    assert len(tensor.unique()) == 3
    assert len(value.unique()) == MINI.heads + MINI.groups + 1
    for folder in ("t", "v"):
        assert main(["verify", str(tmp_path / folder)]) == 0
    assert main([*command, str(tmp_path / "n"), "--full-v", "no.such.*"]) == 2
    assert "match no parameter" in capsys.readouterr().err


def test_save_folders_keep_their_tracker_and_other_files(checkpoints, tmp_path):
    save = tmp_path / "save"
    folder = save / "iter_0000002"
    folder.parent.mkdir()
    subprocess.run(["cp", "-r", checkpoints["adam"], folder], check=True)
    (folder / "notes.txt").write_text("kept")
    (folder / "integrity.json").write_text("{}")
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    assert main(["convert", "--to", "adam-mini", str(save), str(tmp_path / "new")]) == 0
    new = tmp_path / "new"
    assert (new / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (new / "iter_0000002" / "notes.txt").read_text() == "kept"
    assert not (new / "iter_0000002" / "integrity.json").exists()
    assert main(["verify", str(new)]) == 0


def test_common_state_survives_with_its_classes(checkpoints, tmp_path):
    from megatron.core import dist_checkpointing

    assert (
        main(["convert", "--to", "adam-mini", str(checkpoints["adam"]), str(tmp_path / "x")]) == 0
    )
    old = dist_checkpointing.load_common_state_dict(str(checkpoints["adam"]))
    new = dist_checkpointing.load_common_state_dict(str(tmp_path / "x"))
    assert vars(old["args"]) == vars(new["args"])
    assert type(new["args"].attention_backend).__name__ == "AttnBackend"
    assert old["iteration"] == new["iteration"] == ADAM.steps
    assert new["optimizer"]["step"] == ADAM.steps


def test_reading_leaves_megatrons_safe_classes_alone(checkpoints):
    from megatron.core.safe_globals import register_safe_globals

    from megatron_adam_mini.checkpoint.reader import Checkpoint

    register_safe_globals()
    before = set(torch.serialization.get_safe_globals())
    Checkpoint(checkpoints["adam"])
    assert set(torch.serialization.get_safe_globals()) == before


def test_common_state_in_a_file_of_its_own_stays_there(checkpoints, tmp_path):
    """As older releases of Megatron have it."""
    from megatron.core import dist_checkpointing

    from megatron_adam_mini.checkpoint.common_state import save_common
    from megatron_adam_mini.checkpoint.reader import Checkpoint
    from megatron_adam_mini.checkpoint.writer import CheckpointWriter

    checkpoint = Checkpoint(checkpoints["adam"])
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "common.pt").write_bytes(save_common(checkpoint.common, as_object=False))
    del checkpoint.objects["common_state/shard_0_1"]
    writer = CheckpointWriter(checkpoint, old)
    writer.copy([*checkpoint.tensors, *checkpoint.objects])
    writer.finish(checkpoint.common)
    assert main(["convert", "--to", "adam-mini", str(old), str(new)]) == 0
    assert main(["verify", str(new)]) == 0
    common = dist_checkpointing.load_common_state_dict(str(new))
    assert (new / "common.pt").exists()
    assert common["optimizer"]["step"] == ADAM.steps
    assert common["args"].num_attention_heads == ADAM.heads


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("buckets", "adam", "--adam-mini-checkpoint-format model_space"),
        ("mini", "adam-mini", "already"),
        ("adam", "adam", "holds no state of Adam-mini"),
    ],
)
def test_what_cannot_be_converted_is_refused(name, to, words, checkpoints, tmp_path, capsys):
    assert main(["convert", "--to", to, str(checkpoints[name]), str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_stock_flat_buckets_are_refused(tmp_path, capsys):
    run_ranks(1, train_and_save, ADAM, str(tmp_path / "a"), "dp_reshardable")
    assert main(["convert", "--to", "adam-mini", str(tmp_path / "a"), str(tmp_path / "x")]) == 2
    assert "--dist-ckpt-optim-fully-reshardable" in capsys.readouterr().err


def test_unsound_content_of_megatron_is_refused(tmp_path, capsys):
    # Hidden 56 and small buckets: padded bucket ends, which these releases write wrongly.
    job = replace(ADAM, hidden=56, ffn=120, bucket_size=3000, overlap=True)
    run_ranks(2, train_and_save, job, str(tmp_path / "a"))
    assert main(["convert", "--to", "adam-mini", str(tmp_path / "a"), str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "not the state of the stored model" in error
    assert "0.19.2" in error
    assert not (tmp_path / "x").exists()


def test_an_existing_destination_is_refused(checkpoints, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    assert main(["convert", "--to", "adam", str(checkpoints["mini"]), str(tmp_path / "x")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_error_in_the_middle_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    from megatron_adam_mini.checkpoint.writer import CheckpointWriter

    def fail(*_: Any) -> None:
        assert list(tmp_path.glob("x.partial-*/*.distcp"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointWriter, "copy", fail)
    assert main(["convert", "--to", "adam", str(checkpoints["mini"]), str(tmp_path / "x")]) == 2
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle_there_is_no_destination(checkpoints, tmp_path):
    # The child stops itself where a kill hurts most: all is written, nothing has its name yet.
    code = (
        "import os, sys, time\n"
        "from megatron_adam_mini import cli\n"
        "from megatron_adam_mini.checkpoint import writer\n"
        "def stop(*a):\n"
        "    sys.stdout.write('written'); sys.stdout.flush(); time.sleep(60)\n"
        "writer.write_metadata = stop\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = ["convert", "--to", "adam", str(checkpoints["mini"]), str(tmp_path / "x")]
    child = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.read(7) == b"written"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (partial,) = tmp_path.iterdir()
    assert partial.name == f"x.partial-{child.pid}"
    assert main(["inspect", str(partial)]) == 2
    assert main(command) == 0
    assert main(["verify", str(tmp_path / "x")]) == 0


def test_memory_does_not_grow_with_the_checkpoint(checkpoints, tmp_path):
    """The bound: a few windows, however large a tensor is and however many there are."""
    from megatron_adam_mini.checkpoint.chunks import WINDOW_NUMEL

    big = enlarged(checkpoints["adam"], tmp_path / "big", rows=1 << 18)
    largest = 4 * (1 << 18) * 64
    assert sum(path.stat().st_size for path in big.glob("*.distcp")) > 3 * largest
    peaks = {}
    for name, source in (("small", checkpoints["adam"]), ("big", big)):
        code = (
            "import resource, sys\n"
            "from megatron_adam_mini import cli\n"
            "code = cli.main(sys.argv[1:])\n"
            "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
        )
        command = ["convert", "--to", "adam-mini", str(source), str(tmp_path / f"to-{name}")]
        output = subprocess.check_output([sys.executable, "-c", code, *command], text=True)
        status, peak = output.split()
        assert status == "0"
        peaks[name] = int(peak)
    # Held at once, of one window: float32 values, their bytes as read, as written (and in float64
    # for sums), and the weights next to them.
    assert peaks["big"] - peaks["small"] < 6 * 4 * WINDOW_NUMEL
    assert 2 * largest > 6 * 4 * WINDOW_NUMEL


def enlarged(source: Path, destination: Path, rows: int) -> Path:
    """Write a checkpoint with a larger vocabulary, by torch's own writer."""
    from megatron_adam_mini.checkpoint.reader import Checkpoint
    from megatron_adam_mini.checkpoint.writer import CheckpointWriter

    checkpoint = Checkpoint(source)
    destination.mkdir()
    writer = CheckpointWriter(checkpoint, destination)
    large = [key for key in checkpoint.tensors if "word_embeddings" in key]
    writer.copy([k for k in (*checkpoint.tensors, *checkpoint.objects) if k not in large])
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    for key in large:
        values = weight.abs() if "exp_avg_sq" in key else weight
        values = values.to(checkpoint.tensors[key].dtype)
        writer.add(key, tuple(values.shape), (0, 0), values)
    writer.finish(checkpoint.common)
    return destination


@pytest.mark.support("inspect, verify and convert without a cluster", "test")
def test_it_answers_quickly_without_megatron(checkpoints):
    code = (
        "import sys\n"
        "from megatron_adam_mini import cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "assert 'megatron' not in sys.modules\n"
    )
    started = time.monotonic()
    subprocess.check_call([sys.executable, "-c", code, "inspect", str(checkpoints["mini"])])
    assert time.monotonic() - started < 60
