"""The stand-alone optimizer on whole parameters, against the oracle, AdamW, the public package."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from megatron_adam_mini import AdamMini
from tests.plain_models import (
    DIM,
    FFN,
    GEOMETRY,
    GROUPS,
    HEADS,
    HIDDEN,
    HYPER,
    VOCAB,
    Oracle,
    give_gradients,
    gradient,
    head_labels,
    labels_of,
    module_of,
    shapes_of_llama,
)
from tests.reference import element_labels, one_label, row_labels
from tests.test_convert_public import JOB, public_pair, public_step

#: float32 against the oracle's float64, after five steps of size 0.01.
ORACLE_TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
#: Two float32 implementations of AdamW that round in another order, after five steps.
ADAMW_TOLERANCE = {"rtol": 2e-6, "atol": 1e-7}
#: Two float32 implementations of Adam-mini in the training of a model, where differences add up.
PUBLIC_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
#: A bfloat16 parameter after one step: half a unit of its eighth bit.
BF16_TOLERANCE = {"rtol": 2**-8, "atol": 1e-3}
STEPS = 5

BACKENDS = ["reference", "cpu"]

#: All experts of a layer in one weight, (experts, out, in), and (experts, in, out).
EXPERTS = {
    "mlp.experts.gate_up_proj": (3, 2 * FFN, HIDDEN),
    "mlp.experts.down_proj": (3, HIDDEN, FFN),
}
TURNED_EXPERTS = {name: (e, b, a) for name, (e, a, b) in EXPERTS.items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def adam_mini(model: nn.Module, **options: Any) -> AdamMini:
    return AdamMini(model.named_parameters(), **(HYPER | GEOMETRY | options))


def compare_with_oracle(model: nn.Module, labels: dict[str, Tensor], **options: Any) -> None:
    oracle, optimizer = Oracle(model, labels), adam_mini(model, **options)
    train(model, optimizer)
    for step in range(STEPS):
        oracle.step(step)
    actual = dict(model.named_parameters())
    for name, expected in oracle.params():
        torch.testing.assert_close(actual[name].double(), expected, **ORACLE_TOLERANCE, msg=name)


def blocks_of(optimizer: AdamMini) -> dict[str, tuple[str, int]]:
    return {entry["name"]: (entry["rule"], entry["blocks"]) for entry in optimizer.manifest()}


# The arithmetic.


@pytest.mark.parametrize("backend", BACKENDS)
def test_llama_trains_as_the_oracle_does(backend):
    shapes = shapes_of_llama()
    labels = {name: labels_of(name, shape) for name, shape in shapes.items()}
    compare_with_oracle(module_of(shapes), labels, backend=backend)


def column_labels(rows: int, columns: int) -> Tensor:
    return torch.arange(columns).expand(rows, columns).contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["row-column", "slim"])
def test_presets_by_columns_train_as_the_oracle_does(preset, backend):
    model = module_of(shapes_of_llama())
    by_columns = ("v_proj", "o_proj", *(["gate_proj", "up_proj", "down_proj"] * (preset == "slim")))
    labels = {}
    for name, shape in shapes_of_llama().items():
        if len(shape) == 1:
            labels[name] = (element_labels if preset == "slim" else one_label)(*shape)
        else:
            of_columns = name.endswith(tuple(f"{part}.weight" for part in by_columns))
            labels[name] = (column_labels if of_columns else row_labels)(*shape)
    # Rows of Query and Key need no numbers of heads.
    compare_with_oracle(
        model, labels, preset=preset, backend=backend, num_heads=None, num_query_groups=None
    )


def test_columns_of_a_transposed_weight_are_its_rows():
    shapes = {"transformer.h.0.mlp.c_proj.weight": (6, 4), "transformer.h.0.mlp.c_fc.bias": (4,)}
    model = module_of(shapes | {"transformer.h.0.attn.c_attn.weight": (4, 12)})
    labels = {
        "transformer.h.0.mlp.c_proj.weight": row_labels(6, 4),
        "transformer.h.0.mlp.c_fc.bias": one_label(4),
        "transformer.h.0.attn.c_attn.weight": row_labels(4, 12),
    }
    compare_with_oracle(model, labels, rules={"*": "column"}, num_heads=None, num_query_groups=None)


@pytest.mark.parametrize(
    ("name", "shape", "rules", "words"),
    [
        ("layers.0.self_attn.qkv_proj.weight", (12, 4), {}, "holds query, key, value in one"),
        ("layers.0.mlp.gate_up_proj.weight", (12, 4), {}, "has the matrices of an MLP"),
        ("stem.weight", (3, 2, 2), {"*": "column"}, r"of shape \(3, 2, 2\) has 3 dimensions"),
    ],
)
def test_columns_of_several_matrices_are_refused(name, shape, rules, words):
    model = module_of({name: shape})
    with pytest.raises(NotImplementedError, match=f"{words}.*Remedy: .*'row'"):
        AdamMini(model.named_parameters(), preset="slim", rules=rules)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_v_everywhere_is_adamw(backend):
    model = module_of(shapes_of_llama())
    other = copy.deepcopy(model)
    train(model, adam_mini(model, full_v=("*",), backend=backend))
    train(other, torch.optim.AdamW(other.parameters(), **HYPER))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **ADAMW_TOLERANCE, msg=name)


def test_one_block_per_tensor_is_algorithm_3():
    shapes = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "fc.weight": (5, 54)}
    labels = {name: one_label(*shape) for name, shape in shapes.items()}
    model = module_of(shapes)
    compare_with_oracle(model, labels, rules={"*": "tensor"})
    channels_last = module_of(shapes).to(memory_format=torch.channels_last)
    assert not channels_last.conv.weight.is_contiguous()
    compare_with_oracle(channels_last, labels, rules={"*": "tensor"})


def test_the_public_package_trains_the_same():
    model, public = public_pair()
    other = copy.deepcopy(model)
    is_norm = {True: 0.0, False: JOB.weight_decay}  # the package decays no norm
    groups = [
        {
            "params": [(n, p) for n, p in other.named_parameters() if ("norm" in n) is norm],
            "weight_decay": decay,
        }
        for norm, decay in is_norm.items()
    ]
    ours = AdamMini(
        groups, lr=JOB.lr, betas=(0.9, 0.95), num_heads=JOB.heads, num_query_groups=JOB.groups
    )
    for step in range(STEPS):
        expected, loss = public_step(model, public, step), public_step(other, ours, step)
        assert loss == pytest.approx(expected, rel=1e-6)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, **PUBLIC_TOLERANCE, msg=name)


def test_conv1d_of_gpt2_trains_as_the_linear_layer_that_it_is():
    """transformers stores GPT-2's weights transposed, nanoGPT does not; the names are the same."""
    linear = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.wpe.weight": (8, HIDDEN),
        "transformer.h.0.attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
        "transformer.h.0.attn.c_attn.bias": (3 * HIDDEN,),
        "transformer.h.0.attn.c_proj.weight": (HIDDEN, HIDDEN),
        "transformer.h.0.mlp.c_fc.weight": (FFN, HIDDEN),
        "transformer.h.0.mlp.c_proj.weight": (HIDDEN, FFN),
        "transformer.h.0.ln_1.weight": (HIDDEN,),
        "transformer.ln_f.bias": (HIDDEN,),
    }
    turned = [name for name in linear if ".c_" in name and name.endswith("weight")]
    conv1d = {name: shape[::-1] if name in turned else shape for name, shape in linear.items()}
    heads = head_labels(2 * HEADS, DIM, HIDDEN)  # Query, then Key
    values = 2 * HEADS + row_labels(HIDDEN, HIDDEN)
    labels = {name: row_labels(*shape) for name, shape in linear.items() if len(shape) == 2}
    labels["transformer.h.0.attn.c_attn.weight"] = torch.cat([heads, values])
    labels["transformer.h.0.attn.c_attn.bias"] = element_labels(3 * HIDDEN)
    labels["transformer.h.0.ln_1.weight"] = one_label(HIDDEN)
    labels["transformer.ln_f.bias"] = element_labels(HIDDEN)
    compare_with_oracle(module_of(linear), labels, num_query_groups=None)
    for name in turned:
        labels[name] = labels[name].T.contiguous()
    compare_with_oracle(module_of(conv1d), labels, num_query_groups=None)


@pytest.mark.parametrize(("experts", "dim"), [(EXPERTS, 1), (TURNED_EXPERTS, 2)])
def test_each_expert_has_one_v_per_output_neuron_or_per_input(experts, dim):
    rules = {"*.down_proj": "column"}
    for dims, options in (((dim, dim), {}), ((dim, 3 - dim), {"rules": rules})):
        labels = {}
        for (name, shape), kept in zip(experts.items(), dims, strict=True):
            rows = torch.arange(shape[0] * shape[kept]).reshape(shape[0], shape[kept])
            labels[name] = rows.unsqueeze(3 - kept).expand(shape).contiguous()
        compare_with_oracle(module_of(experts), labels, **options)


@pytest.mark.parametrize("preset", ["row", "first", "tensor"])
def test_presets_are_those_of_the_megatron_path(preset):
    model = module_of(shapes_of_llama())
    optimizer = adam_mini(model, preset=preset)
    found = blocks_of(optimizer)
    attention = "model.layers.0.self_attn."
    query, value = (found[f"{attention}{part}_proj.weight"][1] for part in "qv")
    assert (query, value) == {
        "row": (HEADS * DIM, GROUPS * DIM), "first": (HEADS, 1), "tensor": (1, 1)
    }[preset]  # fmt: skip
    train(model, optimizer)


def test_value_as_block_and_rules():
    shapes = shapes_of_llama()
    rules = {"*.o_proj.weight": "element", "*.mlp.*": "tensor", "*.q_proj.weight": "row"}
    optimizer = adam_mini(module_of(shapes), value_as_block=True, rules=rules)
    found = {name.split(".")[-2]: blocks for name, (_, blocks) in blocks_of(optimizer).items()}
    assert found["v_proj"] == 1
    assert found["o_proj"] == HIDDEN * HEADS * DIM
    assert found["up_proj"] == 1
    assert found["q_proj"] == HEADS * DIM


def test_towers_of_gpt2_names_are_told_apart():
    """A GPT-2 of transformers, a nanoGPT and a CLIP in one model, and one that says nothing."""
    hidden = HIDDEN
    shapes = {
        "decoder.h.0.attn.c_attn.weight": (hidden, 3 * hidden),
        "decoder.h.0.mlp.c_fc.weight": (hidden, FFN),
        "decoder.h.0.mlp.experts.3.c_fc.weight": (hidden, FFN),
        "encoder.h.0.attn.c_attn.weight": (3 * hidden, hidden),
        "encoder.h.1.mlp.c_fc.weight": (FFN, hidden),
        "visual.resblocks.0.attn.in_proj_weight": (3 * hidden, hidden),
        "visual.resblocks.0.mlp.c_fc.weight": (FFN, hidden),
        "other.0.c_proj.weight": (FFN, hidden),
    }
    optimizer = adam_mini(module_of(shapes), num_query_groups=None)
    found = {name: blocks for name, (_, blocks) in blocks_of(optimizer).items()}
    assert found.pop("other.0.c_proj.weight") == FFN * hidden
    fused = 2 * HEADS + hidden
    assert list(found.values()) == [fused, FFN, FFN, fused, FFN, fused, FFN]
    shapes["encoder.h.1.attn.c_attn.weight"] = (hidden, 3 * hidden)
    with pytest.raises(ValueError, match=r"encoder.h.0.*True.*differ") as caught:
        adam_mini(module_of(shapes), num_query_groups=None)
    assert "decoder" not in str(caught.value)


# Names.

QUERY, KEY = (HEADS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN)
#: name -> shape, number of blocks under the preset ``paper``.
KNOWN = {
    "qwen3": {
        "model.layers.0.self_attn.q_proj.bias": ((16,), 16),
        "model.layers.0.self_attn.q_norm.weight": ((DIM,), 1),
    },
    "qwen2_moe": {
        "model.layers.0.mlp.gate.weight": ((4, HIDDEN), 4 * HIDDEN),
        "model.layers.0.mlp.shared_expert.up_proj.weight": ((FFN, HIDDEN), FFN),
        "model.layers.0.mlp.shared_expert_gate.weight": ((1, HIDDEN), HIDDEN),
    },
    "qwen3_moe, mixtral, deepseek_v3": {
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 2 * FFN, HIDDEN), 4 * 2 * FFN),
        "model.layers.0.mlp.experts.down_proj": ((4, HIDDEN, FFN), 4 * HIDDEN),
    },
    "gpt_oss, llama4": {
        "model.layers.0.mlp.router.weight": ((4, HIDDEN), 4 * HIDDEN),
        "model.layers.0.mlp.experts.gate_up_proj": ((4, HIDDEN, 2 * FFN), 4 * 2 * FFN),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ((4, 2 * FFN), 4 * 2 * FFN),
        "model.layers.0.mlp.experts.down_proj": ((4, FFN, HIDDEN), 4 * HIDDEN),
        "model.layers.0.mlp.experts.down_proj_bias": ((4, HIDDEN), 4 * HIDDEN),
    },
    "longcat_flash, whose identity experts have no down_proj": {
        "model.layers.0.mlp.experts.gate_up_proj": ((5, 2 * FFN, HIDDEN), 5 * 2 * FFN),
        "model.layers.0.mlp.experts.down_proj": ((4, HIDDEN, FFN), 4 * HIDDEN),
    },
    "nemotron_h": {
        "model.layers.0.mixer.experts.up_proj": ((4, FFN, HIDDEN), 4 * FFN),
        "model.layers.0.mixer.experts.down_proj": ((4, HIDDEN, FFN), 4 * HIDDEN),
    },
    "jetmoe": {
        "model.layers.0.mlp.input_linear.weight": ((4, 2 * FFN, HIDDEN), 4 * 2 * FFN),
        "model.layers.0.mlp.output_linear.weight": ((4, HIDDEN, FFN), 4 * HIDDEN),
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": ((32, HIDDEN), HEADS + GROUPS + 8),
        "model.layers.0.self_attn.o_proj.weight": ((HIDDEN, 16), HIDDEN),
        "model.layers.0.mlp.gate_up_proj.weight": ((2 * FFN, HIDDEN), 2 * FFN),
    },
    "torchtitan": {
        "tok_embeddings.weight": ((VOCAB, HIDDEN), VOCAB),
        "layers.0.attention.qkv_linear.wq.weight": (QUERY, HEADS),
        "layers.0.attention.qkv_linear.wk.weight": (KEY, GROUPS),
        "layers.0.attention.qkv_linear.wv.weight": (KEY, GROUPS * DIM),
        "layers.0.attention.wo.weight": ((HIDDEN, 16), HIDDEN),
        "layers.0.feed_forward.w1.weight": ((FFN, HIDDEN), FFN),
        "layers.0.attention_norm.weight": ((HIDDEN,), 1),
        "layers.0.moe.router.gate.weight": ((4, HIDDEN), 4 * HIDDEN),
        "layers.0.moe.experts.w1_EFD": ((4, FFN, HIDDEN), 4 * FFN),
        "layers.0.moe.experts.w2_EDF": ((4, HIDDEN, FFN), 4 * HIDDEN),
        "norm.weight": ((HIDDEN,), 1),
        "output.weight": ((VOCAB, HIDDEN), VOCAB),
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": ((VOCAB, HIDDEN), VOCAB),
        "bert.embeddings.token_type_embeddings.weight": ((2, HIDDEN), 2),
        "bert.embeddings.LayerNorm.weight": ((HIDDEN,), 1),
        "bert.encoder.layer.0.attention.self.query.weight": (QUERY, HEADS),
        "bert.encoder.layer.0.attention.output.dense.weight": ((HIDDEN, 16), HIDDEN),
        "bert.encoder.layer.0.intermediate.dense.weight": ((FFN, HIDDEN), FFN),
        "cls.predictions.bias": ((VOCAB,), VOCAB),
    },
    "nn.TransformerEncoderLayer": {
        "layers.0.self_attn.in_proj_weight": ((32, HIDDEN), HEADS + GROUPS + 8),
        "layers.0.self_attn.in_proj_bias": ((32,), 32),
        "layers.0.self_attn.out_proj.weight": ((HIDDEN, HIDDEN), HIDDEN),
        "layers.0.linear1.weight": ((FFN, HIDDEN), FFN),
        "layers.0.norm1.weight": ((HIDDEN,), 1),
    },
    "megatron": {
        "embedding.word_embeddings.weight": ((VOCAB, HIDDEN), VOCAB),
        "decoder.layers.0.self_attention.linear_qkv.weight": ((32, HIDDEN), HEADS + GROUPS + 8),
        "decoder.layers.0.self_attention.linear_proj.weight": ((HIDDEN, 16), HIDDEN),
        "decoder.layers.0.mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), 2 * FFN),
        "decoder.layers.0.mlp.router.weight": ((4, HIDDEN), 4 * HIDDEN),
        "decoder.final_layernorm.weight": ((HIDDEN,), 1),
        "output_layer.weight": ((VOCAB, HIDDEN), VOCAB),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", KNOWN)
def test_names_of_well_known_models(family, caplog):
    known = KNOWN[family]
    optimizer = adam_mini(module_of({name: shape for name, (shape, _) in known.items()}))
    assert {name: blocks for name, (_, blocks) in blocks_of(optimizer).items()} == {
        name: blocks for name, (_, blocks) in known.items()
    }
    assert not caplog.records


def test_fused_rows_lie_as_each_model_has_them():
    """Megatron repeats Query heads, Key, Value for each group; Phi-3 has all Queries first."""
    heads, values = [[n] * 4 for n in range(6)], [[6, 7, 8, 9], [10, 11, 12, 13]]
    for name, parts in {
        "decoder.layers.0.self_attention.linear_qkv.weight":
            [*heads[:3], values[0], *heads[3:], values[1]],
        "model.layers.0.self_attn.qkv_proj.weight": [*heads, *values],
    }.items():  # fmt: skip
        labels = torch.tensor(parts).reshape(-1, 1).expand(-1, HIDDEN).contiguous()
        compare_with_oracle(module_of({name: (32, HIDDEN)}), {name: labels})


def test_wrappers_are_no_part_of_a_name():
    model = module_of(shapes_of_llama())
    plain = blocks_of(adam_mini(model))
    model.model.layers = checkpoint_wrapper(model.model.layers)
    wrapped = torch.compile(model)
    names = [name for name, _ in wrapped.named_parameters()]
    assert any("_checkpoint_wrapped_module" in name and "_orig_mod" in name for name in names)
    assert blocks_of(adam_mini(wrapped)) == plain
    ddp = [(f"module.{name}", param) for name, param in wrapped.named_parameters()]
    assert blocks_of(AdamMini(ddp, **GEOMETRY)) == plain


def test_a_compiled_model_trains_as_one_that_is_not():
    model = nn.ModuleDict({"fc1": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "fc2": nn.Linear(8, 1)})
    other = copy.deepcopy(model)
    losses = []
    for module, disable in ((model, True), (other, False)):
        loss_of = torch.compile(Chain(module), backend="aot_eager", disable=disable)
        optimizer = AdamMini(loss_of.named_parameters(), preset="row", **HYPER)
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses.append(loss_of(torch.eye(4)))
            losses[-1].backward()
            optimizer.step()
    assert float(losses[STEPS - 1]) < float(losses[0])
    torch.testing.assert_close(losses[:STEPS], losses[STEPS:], **ADAMW_TOLERANCE)


class Chain(nn.Module):
    """The mean square of what layers make one after the other."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x.square().mean()


def test_what_is_not_known_keeps_full_v_and_is_listed(caplog):
    shapes = shapes_of_llama() | {"model.gadget.weight": (3, 5), "model.frozen.weight": (2, 2)}
    model = module_of(shapes)
    model.model.frozen.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        optimizer = adam_mini(model)
    (record,) = caplog.records
    assert "1 parameters that it does not know: model.gadget.weight." in record.message
    assert "{'*': 'tensor'}" in record.message
    assert blocks_of(optimizer)["model.gadget.weight"] == ("element", 15)
    caplog.clear()
    adam_mini(model, full_v=("*gadget*",))
    assert blocks_of(adam_mini(model, rules={"*gadget*": "row"}))["model.gadget.weight"][1] == 3
    assert not caplog.records


def test_experts_whose_layout_nothing_tells():
    """One of a pair alone, or a name of nobody: full v, unless a rule says that rows are right."""
    shapes = {"layers.0.experts.down_proj": (4, HIDDEN, FFN), "layers.0.experts.w1": (4, 3, 5)}
    assert set(blocks_of(adam_mini(module_of(shapes))).values()) == {
        ("element", 4 * HIDDEN * FFN),
        ("element", 60),
    }
    rows = blocks_of(adam_mini(module_of(shapes), rules={"*.experts.*": "row"}))
    assert [blocks for _, blocks in rows.values()] == [4 * HIDDEN, 12]


def test_groups_as_torchtitan_makes_them():
    """Names beside the parameters, and all values in the group."""
    model = module_of(shapes_of_llama())
    group = {
        "params": list(model.parameters()),
        "param_names": [name for name, _ in model.named_parameters()],
        "fused": True,
        "foreach": False,
        **HYPER,
        **GEOMETRY,
    }
    optimizer = AdamMini([group], value_as_block=True)
    assert blocks_of(optimizer) == blocks_of(adam_mini(model, value_as_block=True))
    train(model, optimizer)
    with pytest.raises(ValueError, match=r"preset, which all groups share; .* AdamMini\(...\)"):
        AdamMini([group | {"preset": "row"}])


def test_heads_of_another_model_by_a_rule():
    model = module_of({"my_query": (12, 5)})
    optimizer = AdamMini(model.named_parameters(), rules={"my_query": "head"}, head_dim=4)
    assert blocks_of(optimizer) == {"my_query": ("head", 3)}


# What users do with an optimizer.


def test_groups_have_rates_of_their_own_and_schedulers_change_them():
    model, other = module_of(shapes_of_llama()), module_of(shapes_of_llama())
    optimizers = []
    for module, make in ((model, adam_mini_of_groups), (other, adamw_of_groups)):
        named = list(module.named_parameters())
        optimizer = make(
            [
                {"params": [(n, p) for n, p in named if "norm" not in n]},
                {
                    "params": [(n, p) for n, p in named if "norm" in n],
                    "lr": 3e-3,
                    "weight_decay": 0,
                },
            ]
        )
        optimizers.append((module, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)))
    for module, optimizer, scheduler in optimizers:
        for step in range(STEPS):
            train(module, optimizer, range(step, step + 1))
            scheduler.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **ADAMW_TOLERANCE, msg=name)


def adam_mini_of_groups(groups: list[Any]) -> AdamMini:
    return AdamMini(groups, **HYPER, **GEOMETRY, full_v=("*",))


def adamw_of_groups(groups: list[Any]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, **HYPER)


def test_parameters_without_gradients_are_skipped_as_by_adamw():
    model, other = module_of(shapes_of_llama()), module_of(shapes_of_llama())
    ours = adam_mini(model, full_v=("*",))
    adamw = torch.optim.AdamW(other.named_parameters(), **HYPER)
    for module, optimizer in ((model, ours), (other, adamw)):
        module.model.norm.weight.requires_grad_(False)
        for step in range(STEPS):
            give_gradients(module, step)
            module.model.norm.weight.grad = None
            if step % 2:
                module.lm_head.weight.grad = None  # its own count of steps: 3
            optimizer.step()
    assert len(ours.state) == len(adamw.state) == len(shapes_of_llama()) - 1
    assert int(ours.state[model.lm_head.weight]["step"]) == 3
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **ADAMW_TOLERANCE, msg=name)


def test_a_tied_weight_is_updated_once():
    model = module_of(shapes_of_llama())
    model.lm_head.weight = model.model.embed_tokens.weight
    other = copy.deepcopy(model)
    twice = AdamMini(model.named_parameters(remove_duplicate=False), **HYPER, **GEOMETRY)
    once = adam_mini(other)
    assert blocks_of(twice) == blocks_of(once)
    assert blocks_of(twice)["model.embed_tokens.weight"] == ("row", VOCAB)
    train(model, twice)
    train(other, once)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_grad_scaler_skips_steps_that_overflow():
    model = module_of({"fc.weight": (3, 4)})
    before = model.fc.weight.detach().clone()
    optimizer = AdamMini(model.named_parameters(), rules={"*": "row"}, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for factor in (torch.inf, 1.0):
        model.fc.weight.grad = 4 * gradient("fc.weight", (3, 4), 0) * factor
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert torch.equal(model.fc.weight, before)
            assert not optimizer.state
            scaler.update(4.0)
    expected = module_of({"fc.weight": (3, 4)})
    train(expected, AdamMini(expected.named_parameters(), rules={"*": "row"}, **HYPER), range(1))
    torch.testing.assert_close(model.fc.weight, expected.fc.weight, **ADAMW_TOLERANCE)


def test_a_closure_is_called_with_gradients_enabled():
    model = module_of({"fc.weight": (3, 4)})
    optimizer = AdamMini(model.named_parameters(), rules={"*": "row"})

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.fc.weight.square().sum()
        loss.backward()
        return loss

    before = float(model.fc.weight.square().sum())
    assert float(optimizer.step(closure)) == before
    assert float(optimizer.step(closure)) < before


def test_a_step_counts_for_autograd():
    """torch refuses a backward pass over weights that were changed after the forward pass."""
    model = module_of({"fc.weight": (3, 4)})
    loss = model.fc.weight.square().sum()
    train(model, AdamMini(model.named_parameters(), rules={"*": "row"}), range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_updated_in_float32_and_rounded(dtype):
    wide, narrow = module_of(shapes_of_llama(), dtype).float(), module_of(shapes_of_llama(), dtype)
    train(wide, adam_mini(wide), range(1))
    optimizer = adam_mini(narrow)
    train(narrow, optimizer, range(1))
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, **BF16_TOLERANCE, msg=name)
    state = optimizer.state[narrow.lm_head.weight]
    assert state["exp_avg"].dtype == (dtype if dtype == torch.bfloat16 else torch.float32)
    assert state["row_exp_avg_sq"].dtype == torch.float32
    restored = adam_mini(narrow)
    restored.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert torch.equal(
        restored.state[narrow.lm_head.weight]["row_exp_avg_sq"], state["row_exp_avg_sq"]
    )


def test_a_run_goes_on_from_its_state_dict():
    model = module_of(shapes_of_llama())
    optimizer = adam_mini(model)
    train(model, optimizer)
    other = copy.deepcopy(model)
    resumed = adam_mini(other, lr=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert resumed.param_groups[0]["lr"] == HYPER["lr"]
    for module, one in ((model, optimizer), (other, resumed)):
        train(module, one, range(STEPS, 2 * STEPS))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_an_optimizer_can_be_pickled_and_grow():
    model = module_of(shapes_of_llama())
    optimizer = adam_mini(model, preset="row")
    train(model, optimizer, range(1))
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    gadget = nn.Parameter(torch.ones(3, 2))
    optimizer.add_param_group({"params": [("gadget.fc1.weight", gadget)], "lr": 0.1})
    gadget.grad = torch.ones(3, 2)
    train(model, optimizer, range(1, 2))
    assert optimizer.config.preset == "row"
    assert float(gadget[0, 0]) < 1.0


def test_a_refused_group_leaves_nothing():
    model = module_of(shapes_of_llama())
    optimizer = adam_mini(model)
    other = nn.Parameter(torch.ones(3, 2))
    for options, text in (({"lr": -1.0}, "lr"), ({"num_heads": 7}, "num_heads")):
        named = [("layers.9.self_attn.q_proj.weight", other)]
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group({"params": named, **options})
        assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(1))


def test_parameters_may_be_exchanged_before_the_first_step():
    """As accelerate does: it makes the optimizer first, and puts sharded parameters in later."""
    model = module_of(shapes_of_llama())
    optimizer = adam_mini(model)
    other = copy.deepcopy(model)
    whole = weakref.ref(model.lm_head.weight)
    for group in optimizer.param_groups:
        group["params"] = list(other.parameters())
    weight = model.lm_head.weight.detach().clone()
    del model.lm_head.weight
    assert whole() is None, "nothing keeps the memory of whole parameters"
    model.lm_head.weight = nn.Parameter(weight)
    train(other, optimizer)
    train(model, adam_mini(model))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_the_state_of_adamw(dtype):
    shapes = shapes_of_llama() | EXPERTS | {"scale": ()}
    model = module_of(shapes, dtype)
    adamw = torch.optim.AdamW(model.parameters(), **HYPER | {"lr": 2e-3})
    for step in range(2):
        give_gradients(model, step)
        model.model.norm.weight.grad = None
        adamw.step()
    saved = copy.deepcopy(adamw.state_dict())
    optimizer = adam_mini(model, rules={"*.o_proj.weight": "column", "scale": "tensor"})
    with pytest.raises(ValueError, match=r"load_adamw_state_dict\(...\)"):
        optimizer.load_state_dict(saved)
    optimizer.load_adamw_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 2e-3
    assert model.model.norm.weight not in optimizer.state
    for name, param in model.named_parameters():
        if name == "model.norm.weight":
            continue
        old, new = adamw.state[param], optimizer.state[param]
        assert torch.equal(new["exp_avg"], old["exp_avg"])
        assert int(new["step"]) == 2
        if "q_proj" in name or "k_proj" in name:
            heads = HEADS if "q_proj" in name else GROUPS
            v = old["exp_avg_sq"].double().view(heads, -1).mean(1).repeat_interleave(DIM)
        elif "norm" in name or name == "scale":
            v = old["exp_avg_sq"].double().mean().expand(max(param.numel(), 1))
        else:
            dim = 0 if "o_proj" in name else -1
            v = old["exp_avg_sq"].double().mean(dim)
        key = "column_exp_avg_sq" if "o_proj" in name else "row_exp_avg_sq"
        assert new[key].dtype == torch.float32
        assert torch.equal(new[key], v.float()), name
    train(model, optimizer, range(2, 3))
    assert all(
        torch.equal(value, adamw.state_dict()["state"][number][key])
        for number, state in saved["state"].items()
        for key, value in state.items()
    ), "AdamW's state is not shared"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), NotImplementedError, "asks for amsgrad"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), NotImplementedError, "weight_decay=0.1"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), ValueError, "needed is exp_avg_sq"),
        (lambda p: torch.optim.AdamW([*p][::-1]), ValueError, "of shape (16, 16), not sharded"),
    ],
)
def test_other_states_are_not_taken_for_adamws(make, error, words):
    model = module_of(shapes_of_llama())
    other = make(model.parameters())
    train(model, other, range(1))
    optimizer = adam_mini(model)
    with pytest.raises(error) as caught:
        optimizer.load_adamw_state_dict(other.state_dict())
    assert words in str(caught.value)
    assert not optimizer.state


def test_a_loaded_state_does_not_change_the_partition():
    """A state dict has the groups of its optimizer, also what they say of the model."""
    model = module_of(shapes_of_llama())
    optimizer = adam_mini(model, preset="row")
    before = blocks_of(optimizer)
    wrong = {"num_heads": 2, "num_query_groups": None}
    fresh = AdamMini(model.named_parameters(), preset="row", **HYPER).state_dict()
    for group in fresh["param_groups"]:
        group.update(wrong, param_names=group["param_names"][::-1])
    optimizer.load_state_dict(fresh)
    assert blocks_of(optimizer) == before
    assert {key: optimizer.param_groups[0][key] for key in GEOMETRY} == GEOMETRY
    adamw = torch.optim.AdamW(model.parameters(), **HYPER)
    train(model, adamw, range(1))
    full = adam_mini(model, full_v=("*",))
    full.load_state_dict(adamw.state_dict())  # the same state, without names and heads
    train(model, full, range(1, 2))


def test_the_state_of_a_frozen_parameter_keeps_its_dtype():
    """It may be trained again, and kernels take v for float32."""
    model = module_of(shapes_of_llama(), torch.bfloat16)
    optimizer, resumed = adam_mini(model), adam_mini(model)
    train(model, optimizer, range(1))
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[model.lm_head.weight]["row_exp_avg_sq"].dtype == torch.float32


def test_a_frozen_parameter_with_a_gradient_is_updated_as_by_adamw():
    model, other = module_of(shapes_of_llama()), module_of(shapes_of_llama())
    ours = pickle.loads(pickle.dumps((model, adam_mini(model, full_v=("*",)))))
    for module, optimizer in (ours, (other, torch.optim.AdamW(other.parameters(), **HYPER))):
        module.lm_head.weight.requires_grad_(False)
        train(module, optimizer, range(2))
    torch.testing.assert_close(ours[0].lm_head.weight, other.lm_head.weight, **ADAMW_TOLERANCE)


@pytest.mark.parametrize("rule", ["row", "tensor", "element"])
def test_gradients_and_parameters_that_are_not_contiguous(rule):
    shapes = {"a.weight": (4, 3), "b.weight": (4, 1), "c.bias": (4,)}
    model, other = module_of(shapes), module_of(shapes)
    for param in other.parameters():
        strided = torch.zeros(*param.shape, 2)
        param.data = strided[..., 1].copy_(param)
    for module in (model, other):
        optimizer = AdamMini(module.named_parameters(), rules={"*": rule}, **HYPER)
        for step in range(2):
            give_gradients(module, step)
            if module is other:
                for param in module.parameters():
                    param.grad = torch.stack([param.grad, param.grad], dim=-1)[..., 0]
                    assert not param.grad.is_contiguous()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_elements_and_scalars():
    shapes = {"a.weight": (0, 4), "b.weight": (4, 0), "c.bias": (0,), "d.scale": ()}
    for rule in ("row", "tensor", "element"):
        model = module_of(shapes)
        train(model, AdamMini(model.named_parameters(), rules={"*": rule}, **HYPER))
        assert model.d.scale.isfinite()


def test_frozen_parameters_may_have_any_dtype():
    model = module_of({"fc.weight": (3, 4), "base.weight": (3, 4)})
    base = model.base.weight.detach().double()
    model.base.weight = nn.Parameter(base, requires_grad=False)
    optimizer = AdamMini(model.named_parameters(), rules={"*": "row"}, **HYPER)
    model.fc.weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(model.base.weight, base)


# What is refused.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: AdamMini(m.parameters()), ValueError, "model.named_parameters()"),
        (lambda m: AdamMini(m.named_parameters()), ValueError, "needs num_heads="),
        (lambda m: AdamMini(m.named_parameters(), num_heads=3), ValueError, "num_heads=3"),
        (lambda m: AdamMini(m.named_parameters(), num_heads=4), ValueError, "size of a head"),
        (lambda m: AdamMini(m.named_parameters(), num_heads=4, num_query_groups=3), ValueError, ""),
        (lambda m: adam_mini(m, head_dim=8), ValueError, "head_dim=8"),
        (lambda m: adam_mini(m, lr=-1.0), ValueError, "lr=-1.0"),
        (lambda m: adam_mini(m, betas=(0.9, 1.0)), ValueError, "beta2=1.0"),
        (lambda m: adam_mini(m, preset="papre"), ValueError, "papre"),
        (lambda m: adam_mini(m, rules={"*.q_porj.*": "row"}), ValueError, "match no parameter"),
        (lambda m: adam_mini(m, rules={"lm_head.weight": "head"}), ValueError, "head_dim="),
        (lambda m: adam_mini(m, full_v="norm"), TypeError, "one string"),
        (lambda m: adam_mini(m.double()), TypeError, "torch.float64"),
        (
            lambda m: AdamMini([("fc.weight", nn.Parameter(torch.zeros(2, dtype=torch.cfloat)))]),
            TypeError,
            "torch.complex64",
        ),
        (
            lambda m: AdamMini([{"params": m.named_parameters(), "maximize": True}], **GEOMETRY),
            NotImplementedError,
            "asks for maximize",
        ),
        (
            lambda m: AdamMini([*m.named_parameters(), ("lm_head.weight", torch.ones(1))]),
            ValueError,
            "called 'lm_head.weight'",
        ),
        (
            lambda m: AdamMini([(f"_fsdp_wrapped_module.{n}", p) for n, p in m.named_parameters()]),
            NotImplementedError,
            "fully_shard",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_a_remedy(make, error, words):
    with pytest.raises(error) as caught:
        make(module_of(shapes_of_llama()))
    assert words in str(caught.value)


def test_gpt2_with_heads_that_do_not_fit_the_projection():
    shapes = {
        "decoder.layers.0.self_attention.linear_qkv.weight": (48, 16),  # gated: 2 * 4 + 2 * 2 heads
        "decoder.layers.0.self_attention.linear_proj.weight": (16, 16),
    }
    with pytest.raises(ValueError, match="do not agree on the size of a head"):
        adam_mini(module_of(shapes))


def test_projections_of_a_group_without_heads_are_not_compared():
    shapes = {
        "decoder.layers.0.self_attention.linear_qkv.weight": (32, 16),
        "decoder.layers.0.self_attention.linear_proj.weight": (16, 16),
    }
    fused, projection = module_of(shapes).named_parameters()
    optimizer = AdamMini([{"params": [fused], **GEOMETRY}, {"params": [projection]}])
    assert [blocks for _, blocks in blocks_of(optimizer).values()] == [HEADS + GROUPS + 8, 16]


def test_state_of_another_partition_is_refused():
    model = module_of(shapes_of_llama())
    optimizer, rows = adam_mini(model), adam_mini(model, preset="row")
    train(model, rows, range(1))
    saved = rows.state_dict()
    with pytest.raises(ValueError, match=r"q_proj.weight' has .*num_blocks 16; needed .* 4 blocks"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    adamw = torch.optim.AdamW(model.named_parameters())
    train(model, adamw, range(1))
    with pytest.raises(ValueError, match="exp_avg_sq of shape"):
        optimizer.load_state_dict(adamw.state_dict())


def test_v_of_rows_is_not_taken_for_v_of_columns():
    name, rules = "model.layers.0.self_attn.o_proj.weight", {"*.o_proj.weight": "column"}
    model = module_of({name: (8, 8)})
    by_rows = adam_mini(model)
    train(model, by_rows)
    with pytest.raises(ValueError, match="needed is column_exp_avg_sq"):
        adam_mini(model, rules=rules).load_state_dict(by_rows.state_dict())


def test_state_of_a_wider_model_is_refused():
    model, wider = module_of({"fc.weight": (4, 3)}), module_of({"fc.weight": (4, 5)})
    optimizer, other = (AdamMini(m.named_parameters(), rules={"*": "row"}) for m in (model, wider))
    train(wider, other, range(1))
    with pytest.raises(ValueError, match=r"exp_avg of shape \(4, 5\).*shape \(4, 3\)"):
        optimizer.load_state_dict(other.state_dict())


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = AdamMini(embedding.named_parameters(), rules={"*": "row"})
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"'weight' has layout torch.sparse_coo.*sparse=False"):
        optimizer.step()


# Documents.


@pytest.mark.parametrize("document", ["README.md", "docs/standalone.md"])
def test_python_in_the_documents_runs(document, tmp_path):
    text = (Path(__file__).parents[1] / document).read_text()
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for block in found if "AdamMini(" in block]
    assert blocks
    shapes = {name: tuple(32 for _ in shape) for name, shape in shapes_of_llama().items()}
    for name in ("k_proj", "v_proj"):
        shapes[f"model.layers.0.self_attn.{name}.weight"] = (8, 32)
    model = module_of(shapes)
    names: dict[str, Any] = {"model": model, "torch": torch, "folder": tmp_path}
    for block in blocks:
        exec(block, names)
        before = model.lm_head.weight.detach().clone()
        train(model, names["optimizer"], range(1))
        assert not torch.equal(model.lm_head.weight, before)


def test_state_takes_half_of_adamws():
    """The numbers of docs/standalone.md, without the memory: shapes of 23.2M parameters."""
    shapes = {"model.embed_tokens.weight": (8192, 512), "model.norm.weight": (512,)}
    for layer in range(6):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (512, 512)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{layer}.mlp.{name}.weight"] = (1376, 512)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (512, 1376)
    sizes = []
    with torch.device("meta"):
        named = [(name, nn.Parameter(torch.empty(shape))) for name, shape in shapes.items()]
    optimizer = AdamMini(named, num_heads=8)
    for shard in optimizer._local_shards().values():
        sizes += [t.nbytes for t in shard.new_state().values() if isinstance(t, Tensor)]
    elements = sum(param.numel() for _, param in named)
    assert (round(elements / 1e6, 1), round(sum(sizes) / 1e6, 1)) == (23.2, 92.8)
    assert round((8 * elements + 4 * len(named)) / 1e6, 1) == 185.3
    assert (
        "23.2M parameters takes 92.8 MB of state, with AdamW 185.3 MB"
        in (Path(__file__).parents[1] / "docs/standalone.md").read_text()
    )
