"""State of the public package <-> Megatron checkpoints, with both optimizers really running."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.cli import main
from megatron_adam_mini.convert.llama import parts_of
from megatron_adam_mini.plan.parameter_info import HeadGeometry
from tests.adam_checkpoints import read_all, save, train_and_save
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import load

JOB = Job(hidden=64, heads=4, groups=2, ffn=96, vocab=96, layers=2, steps=2, clip_grad=0.0)
DIM = JOB.hidden // JOB.heads

#: Two float32 models and two optimizers that sum in other orders, after one step.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}
#: One float32 loss from the same weights and tokens, computed by two implementations of a model.
LOSS_TOLERANCE = 1e-5


class Attention(nn.Module):
    """Grouped-query attention as Hugging Face's Llama has it: rotation of halves."""

    def __init__(self) -> None:
        super().__init__()
        kv = JOB.groups * DIM
        self.q_proj = nn.Linear(JOB.hidden, JOB.hidden, bias=False)
        self.k_proj = nn.Linear(JOB.hidden, kv, bias=False)
        self.v_proj = nn.Linear(JOB.hidden, kv, bias=False)
        self.o_proj = nn.Linear(JOB.hidden, JOB.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            linear(x).view(batch, length, -1, DIM).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        frequency = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        angle = torch.arange(length)[:, None] * frequency
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

        def rotated(t: Tensor) -> Tensor:
            first, second = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-second, first], -1) * sin

        repeat = JOB.heads // JOB.groups
        k, v = rotated(k).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = functional.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(JOB.hidden, JOB.ffn, bias=False)
        self.up_proj = nn.Linear(JOB.hidden, JOB.ffn, bias=False)
        self.down_proj = nn.Linear(JOB.ffn, JOB.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()
        self.input_layernorm = nn.RMSNorm(JOB.hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(JOB.hidden, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The same function as Hugging Face's LlamaForCausalLM, with its parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(JOB.vocab, JOB.hidden)
        self.model.layers = nn.ModuleList(Layer() for _ in range(JOB.layers))
        self.model.norm = nn.RMSNorm(JOB.hidden, eps=1e-5)
        self.lm_head = nn.Linear(JOB.hidden, JOB.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


def public_pair(empty_wv: bool = False) -> tuple[Llama, Any]:
    from adam_mini import Adam_mini

    torch.manual_seed(3)
    model = Llama()
    optimizer = Adam_mini(
        list(model.named_parameters()),
        lr=JOB.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=JOB.weight_decay,
        dim=JOB.hidden,
        n_heads=JOB.heads,
        n_kv_heads=JOB.groups,
        verbose=False,
    )
    if empty_wv:
        optimizer.wv_names = set()
    return model, optimizer


def batch_of(step: int) -> Tensor:
    return Trainer.batch_of(argparse.Namespace(job=JOB), step)  # type: ignore[arg-type]


def public_step(model: Llama, optimizer: Any, step: int) -> float:
    tokens = batch_of(step)
    logits = model(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


def megatron_step(job: Job, folder: str, result: str) -> list[float]:
    """Load, take one step and save."""
    trainer = Trainer(job)
    load(trainer, folder)
    trainer.step(job.steps)
    save(trainer, result, "fully_reshardable")
    return trainer.losses


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "iter_0000002"
    run_ranks(2, train_and_save, replace(JOB, tp=2), str(folder))
    return folder


def public_file(folder: Path, path: Path) -> dict[str, Any]:
    assert main(["convert", "--to", "public", str(folder), str(path)]) == 0
    return torch.load(path, weights_only=True)


def compare(ours: dict[str, Any], public: dict[str, Any], exact: bool = False) -> None:
    """Compare weights and every entry of the optimizer's state."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else TOLERANCE
    assert list(ours["model"]) == list(public["model"])
    for name, value in public["model"].items():
        torch.testing.assert_close(ours["model"][name], value, **tolerance, msg=name)
    a, b = ours["optimizer"], public["optimizer"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, entry in b["state"].items():
        assert a["state"][number].keys() == entry.keys()
        for key, value in entry.items():
            if isinstance(value, Tensor):
                scale = float(value.abs().max())
                limits = {"rtol": tolerance["rtol"], "atol": tolerance["rtol"] * scale}
                torch.testing.assert_close(a["state"][number][key], value, **limits, msg=key)
            else:
                assert a["state"][number][key] == value, key


@pytest.mark.support("conversion from and to the public adam_mini", "test")
def test_the_public_optimizer_takes_megatrons_next_step(template, tmp_path):
    content = public_file(template, tmp_path / "file.pt")
    model, optimizer = public_pair()
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    loss = public_step(model, optimizer, JOB.steps)
    result = tmp_path / "next"
    (losses,) = run_ranks(1, megatron_step, JOB, str(template), str(result))
    assert losses[0] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    after = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    compare(public_file(result, tmp_path / "next.pt"), after)


@pytest.mark.support("conversion from and to the public adam_mini", "test")
def test_megatron_takes_the_public_optimizers_next_step(template, tmp_path):
    model, optimizer = public_pair()
    for step in range(JOB.steps):
        public_step(model, optimizer, step)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "file.pt")
    command = ["convert", "--from", "public", str(tmp_path / "file.pt"), str(tmp_path / "x")]
    assert main([*command, "--like", str(template)]) == 0
    assert main(["verify", str(tmp_path / "x")]) == 0
    compare(public_file(tmp_path / "x", tmp_path / "again.pt"), content, exact=True)
    loss = public_step(model, optimizer, JOB.steps)
    result = tmp_path / "next"
    losses = run_ranks(2, megatron_step, replace(JOB, tp=2), str(tmp_path / "x"), str(result))
    assert losses[0][0] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    after = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    compare(public_file(result, tmp_path / "next.pt"), after)


def test_value_as_one_block_needs_a_template_that_has_it(template, tmp_path, capsys):
    model, optimizer = public_pair(empty_wv=True)
    public_step(model, optimizer, 0)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "file.pt")
    command = ["convert", "--from", "public", str(tmp_path / "file.pt"), str(tmp_path / "x")]
    assert main([*command, "--like", str(template)]) == 2
    assert "--adam-mini-value-as-block" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    other = tmp_path / "other"
    run_ranks(1, train_and_save, replace(JOB, adam_mini={"value_as_block": True}), str(other))
    assert main([*command, "--like", str(other)]) == 0
    compare(public_file(tmp_path / "x", tmp_path / "again.pt"), content, exact=True)


def test_padding_of_the_vocabulary_is_left_out_and_comes_back_as_zeros(tmp_path):
    source, result = tmp_path / "a", tmp_path / "b"
    run_ranks(1, train_and_save, replace(JOB, padded_vocab=128), str(source))
    content = public_file(source, tmp_path / "file.pt")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert content["model"][name].shape == (JOB.vocab, JOB.hidden)
    command = ["convert", "--from", "public", str(tmp_path / "file.pt"), str(result)]
    assert main([*command, "--like", str(source)]) == 0
    assert main(["verify", str(result)]) == 0
    before, after = read_all(source), read_all(result)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if "word_embeddings" in key or "output_layer" in key:
            assert value.shape[0] == 128
            assert not after[key][JOB.vocab :].any(), key
            value[JOB.vocab :] = 0
        assert torch.equal(value, after[key]), key


def test_files_that_do_not_fit_are_refused(template, tmp_path, capsys):
    model, optimizer = public_pair()
    public_step(model, optimizer, 0)
    good = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    without = {**good, "model": {k: v for k, v in good["model"].items() if "o_proj" not in k}}
    damaged = {**good, "model": {k: v.clone() for k, v in good["model"].items()}}
    damaged["model"]["model.norm.weight"][0] = float("nan")
    fresh = {**good, "optimizer": public_pair()[1].state_dict()}
    for content, code, words in (
        ({"state_dict": {}}, 2, "no file of adam_mini"),
        (without, 2, "o_proj"),
        (fresh, 2, "no state"),
        (damaged, 1, "not finite"),
    ):
        torch.save(content, tmp_path / "file.pt")
        command = ["convert", "--from", "public", str(tmp_path / "file.pt"), str(tmp_path / "x")]
        assert main([*command, "--like", str(template)]) == code
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_other_presets_do_not_fit_the_public_package(tmp_path, capsys):
    job = replace(JOB, adam_mini={"preset": "first"})
    run_ranks(1, train_and_save, job, str(tmp_path / "a"))
    assert main(["convert", "--to", "public", str(tmp_path / "a"), str(tmp_path / "f")]) == 2
    assert "preset 'paper'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_rows_of_fused_query_key_value():
    heads = HeadGeometry(num_heads=4, num_query_groups=2, head_dim=2)
    q, k, v = parts_of("decoder.layers.3.self_attention.linear_qkv.weight", 16, heads)
    assert q.name == "model.layers.3.self_attn.q_proj.weight"
    assert q.rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.rows.tolist() == [4, 5, 12, 13]
    assert v.rows.tolist() == [6, 7, 14, 15]
    assert np.array_equal(np.sort(np.concatenate([q.rows, k.rows, v.rows])), np.arange(16))
    with pytest.raises(UnreadableError, match="no counterpart"):
        parts_of("decoder.layers.0.self_attention.linear_qkv.bias", 16, heads)
    with pytest.raises(UnreadableError, match="make 16"):
        parts_of("decoder.layers.0.self_attention.linear_qkv.weight", 20, heads)
