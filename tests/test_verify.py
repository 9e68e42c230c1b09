"""``inspect`` and ``verify``: what is said of a good checkpoint, and that every fault is found."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini.checkpoint.chunks import StoredChunk
from megatron_adam_mini.checkpoint.reader import Checkpoint, StoredTensor, tiling_problem
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from megatron_adam_mini.cli import main
from megatron_adam_mini.convert.parameters import name_of, parameter_of
from megatron_adam_mini.plan.manifest import manifest_hash
from megatron_adam_mini.plan.roles import role_of
from tests.adam_checkpoints import MINI, saved

M_KEY = "optimizer.adam_mini.exp_avg.decoder.layers.1.mlp.linear_fc2.weight"
V_KEY = "optimizer.adam_mini.v_row.decoder.layers.1.mlp.linear_fc2.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
HEADS_KEY = f"optimizer.adam_mini.v_row.{QKV}"


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a checkpoint saved at TP 2, PP 2, to be damaged."""
    return Path(shutil.copytree(saved("mini", tmp_path_factory), tmp_path / "iter_0000002"))


def problems(folder: Path, capsys: Any) -> list[str]:
    code = main(["verify", "--json", str(folder)])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ok"] else 1)
    assert report["ok"] == (not report["problems"])
    return report["problems"]


def rewritten(
    folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor], common: Any = None
) -> Path:
    """Return a well-formed checkpoint with other values in it."""
    source, result = Checkpoint(folder), folder.with_name("changed")
    result.mkdir()
    writer = CheckpointWriter(source, result)
    writer.copy(list(source.objects))
    for key, tensor in source.tensors.items():
        for offset, window in source.windows(tensor):
            writer.add(key, tensor.shape, offset, change(key, window.clone()))
    writer.finish(common or source.common)
    return result


def chunk_of(folder: Path, key: str) -> StoredChunk:
    return Checkpoint(folder).tensors[key].chunks[0]


@pytest.mark.support("inspect, verify and convert without a cluster", "test")
def test_a_good_checkpoint_is_good(folder, capsys):
    assert problems(folder, capsys) == []
    assert problems(rewritten(folder, lambda _, value: value), capsys) == []


def test_inspect_says_what_is_there(folder, capsys):
    assert main(["inspect", "--json", str(folder)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == report["iteration"] == MINI.steps
    assert report["optimizer"] == "adam_mini"
    sizes = report["adam_mini"]["saved_from"]
    assert (sizes["tensor"], sizes["pipeline"]) == (2, 2)
    assert report["adam_mini"]["preset"] == "paper"
    width, head_dim = MINI.hidden, MINI.hidden // MINI.heads
    qkv = MINI.heads + MINI.groups + MINI.groups * head_dim
    blocks = 2 * MINI.vocab + 1 + MINI.layers * (2 + qkv + width + 2 * MINI.ffn + width)
    elements = 2 * MINI.vocab * width + width
    elements += (
        MINI.layers
        * width
        * (2 + (MINI.heads + 2 * MINI.groups) * head_dim + MINI.heads * head_dim + 3 * MINI.ffn)
    )
    assert report["adam_mini"]["blocks"] == blocks
    assert report["adam_mini"]["elements"] == elements
    assert report["bytes"]["param"] == report["bytes"]["exp_avg"] == 4 * elements
    assert report["bytes"]["model"] == 2 * elements
    assert "args" in report["other_content"]
    assert main(["inspect", str(folder)]) == 0
    words = capsys.readouterr().out
    assert f"step {MINI.steps}" in words
    assert "in memory     exp_avg_dtype fp32, stochastic_rounding False, param_rem" in words
    assert f"{blocks:,} for {elements:,} elements" in words


def test_a_flipped_bit_is_found(folder, capsys):
    chunk = chunk_of(folder, M_KEY)
    with chunk.path.open("r+b") as file:
        file.seek(chunk.position + chunk.length // 2)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 4]))
    found = problems(folder, capsys)
    assert any(M_KEY in p and chunk.path.name in p and "damaged" in p for p in found)
    # Nothing is built on damaged state.
    assert main(["convert", "--to", "adam", str(folder), str(folder.with_name("x"))]) == 1
    assert chunk.path.name in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_truncated_file_is_found(folder, capsys):
    path = max(folder.glob("*.distcp"))
    os.truncate(path, path.stat().st_size // 2)
    found = problems(folder, capsys)
    assert found
    assert all(path.name in p for p in found)
    assert any("truncated" in p for p in found)


def test_a_missing_file_is_found(folder, capsys):
    path = max(folder.glob("*.distcp"))
    path.unlink()
    found = problems(folder, capsys)
    assert found
    assert all(path.name in p for p in found)
    assert any("missing" in p for p in found)


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_missing_or_damaged_metadata_is_unreadable(name, folder, capsys):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert main(["verify", str(folder)]) == 2
    assert name in capsys.readouterr().err
    (folder / name).unlink()
    assert main(["inspect", str(folder)]) == 2
    assert name in capsys.readouterr().err


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/evil-was-here",)


def test_metadata_cannot_run_code(folder, capsys):
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil()))
    assert main(["inspect", str(folder)]) == 2
    assert "system" in capsys.readouterr().err
    assert not Path("/tmp/evil-was-here").exists()


def test_common_state_cannot_run_code(folder, capsys):
    source, result = Checkpoint(folder), folder.with_name("changed")
    result.mkdir()
    writer = CheckpointWriter(source, result)
    writer.copy([*source.tensors, *source.objects])
    writer.finish({**source.common, "more": _Evil()})
    assert main(["inspect", str(result)]) == 2
    assert "system" in capsys.readouterr().err
    assert not Path("/tmp/evil-was-here").exists()


def test_a_path_out_of_the_checkpoint_is_refused(folder, capsys):
    metadata = Checkpoint(folder).metadata
    next(iter(metadata.storage_data.values())).relative_path = "../other/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert main(["verify", str(folder)]) == 2
    assert "outside" in capsys.readouterr().err


def test_a_hole_is_found(folder, capsys):
    metadata = Checkpoint(folder).metadata
    metadata.state_dict_metadata[M_KEY].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert any(M_KEY in p and "hole" in p for p in problems(folder, capsys))


def test_an_overlap_is_found(folder, capsys):
    metadata = Checkpoint(folder).metadata
    chunks = metadata.state_dict_metadata[V_KEY.replace("v_row", "exp_avg")].chunks
    assert len(chunks) > 1
    chunks.append(chunks[0])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert any(M_KEY in p and "overlap" in p for p in problems(folder, capsys))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (M_KEY, float("nan"), "1 values are not finite"),
        (M_KEY, float("inf"), "1 values are not finite"),
        (V_KEY, -1.0, "1 second moments are negative"),
        (HEADS_KEY, 3.0, "rows differ from their block"),
        (M_KEY.replace("exp_avg", "param"), 7.0, "differ from"),
    ],
)
def test_wrong_values_are_found(key, value, words, folder, capsys):
    def change(found: str, tensor: torch.Tensor) -> torch.Tensor:
        if found == key:
            tensor.view(-1)[0] = value
        return tensor

    (problem,) = [p for p in problems(rewritten(folder, change), capsys) if key in p][:1]
    assert words in problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.update(manifest_hash="0"), "manifest hash"),
        (lambda i: i["rules"].pop("output_layer.weight"), "is not in the manifest"),
        (lambda i: i["rules"].update({"more.weight": ["row", 1]}), "has no state"),
        (lambda i: i["rules"].update({"output_layer.weight": ["tensor", 1]}), "its options make"),
        (lambda i: i["partition"].update(preset="tensor"), "its options make"),
        (lambda i: i.update(layout="x"), "content metadata"),
        (lambda i: i["heads"].update({QKV: {"heads": 4}}), "stores heads of"),
        (lambda i: i["heads"][QKV].update(num_heads=2), "2 heads"),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(change, words, folder, capsys):
    source = Checkpoint(folder)
    common = json.loads(json.dumps({"o": source.optimizer["adam_mini"]}))["o"]
    change(common)
    optimizer = {**source.optimizer, "adam_mini": common}
    result = rewritten(folder, lambda _, v: v, {**source.common, "optimizer": optimizer})
    assert any(words in p for p in problems(result, capsys))


def test_a_manifest_with_the_names_of_a_run_is_good(folder, capsys):
    """As the first checkpoints have it; what was saved since then has keys."""
    source = Checkpoint(folder)
    identity = json.loads(json.dumps(source.optimizer["adam_mini"]))
    names = {key: name_of(key, local=True) for key in identity["rules"]}
    assert any(key != name for key, name in names.items())
    identity["format"] = 1
    del identity["heads"]
    identity["rules"] = {names[key]: rule for key, rule in identity["rules"].items()}
    shapes = {names[key]: parameter_of(source, key).shape for key in names}
    parameters = [
        (name, shapes[name], role_of(name, len(shapes[name])), rule)
        for name, (rule, _) in identity["rules"].items()
    ]
    identity["manifest_hash"] = manifest_hash(identity["partition"], parameters)
    optimizer = {**source.optimizer, "adam_mini": identity}
    content = {**source.content, "adam_mini": identity}
    common = {**source.common, "optimizer": optimizer, "content_metadata": content}
    assert problems(rewritten(folder, lambda _, value: value, common), capsys) == []


@pytest.mark.parametrize(
    ("shape", "boxes", "words"),
    [
        ((4, 4), [((0, 0), (4, 4))], None),
        ((4, 4), [((0, 0), (4, 1)), ((0, 1), (4, 3))], None),
        ((4, 4), [((0, 0), (1, 4)), ((2, 0), (2, 4)), ((1, 0), (1, 2)), ((1, 2), (1, 2))], None),
        ((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap"),
        ((4, 4), [((0, 0), (4, 2)), ((0, 3), (4, 1))], "4 of 16 elements are not stored"),
        ((4, 4), [((0, 0), (4, 3)), ((0, 2), (4, 1)), ((3, 3), (1, 1))], "overlap"),
        ((4, 4), [((2, 0), (3, 4))], "leaves"),
        ((0,), [], None),
        ((3,), [], "3 of 3"),
    ],
)
def test_tiling(shape, boxes, words):
    chunks = tuple(StoredChunk("k", o, s, Path("f"), 0, 0) for o, s in boxes)
    found = tiling_problem(StoredTensor("k", shape, torch.float32, chunks))
    assert (found is None) == (words is None)
    assert words is None or words in found


def test_usage_errors_return_two(tmp_path, capsys):
    assert main([]) == 2
    assert main(["inspect"]) == 2
    assert main(["convert", "--to", "nothing", "a", "b"]) == 2
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert main(["convert", "--to", "adam", "--preset", "tensor", "a", "b"]) == 2
    capsys.readouterr()
    assert main(["verify", "--help"]) == 0
    assert "exit codes" in capsys.readouterr().out
