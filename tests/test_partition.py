"""Which elements share a second moment: rules, head geometry, manifest, and every refusal."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain, groupby
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adam_mini.config import (
    BACKENDS,
    PRESETS,
    RULES,
    AdamMiniConfig,
    check_adam_values,
)
from megatron_adam_mini.estimate.models import MODELS, Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.estimate.stages import stage_parameters
from megatron_adam_mini.partition_flags import read_rules
from megatron_adam_mini.plan.manifest import (
    FORMAT_VERSION,
    are_unions,
    config_of,
    format_problem,
    identity_of,
    is_coarsening,
    manifest_of,
    partition_fields,
    short_hash,
    stored_rules,
)
from megatron_adam_mini.plan.parameter_info import HEAD_PARTS, HeadGeometry, ParameterInfo
from megatron_adam_mini.plan.partition import partition_parameter, rule_for, unmatched_patterns
from megatron_adam_mini.plan.roles import is_expert, role_of

LAYER = "decoder.layers.0."

#: What the presets ask for, written apart from the package: role -> (paper, row, first, tensor);
#: ``row-column`` and ``slim`` differ from ``row`` by :data:`EXPECTED_COLUMNS`.
EXPECTED_RULES = {
    "embedding": ("row", "row", "element", "tensor"),
    "output": ("row", "row", "element", "tensor"),
    "position_embedding": ("row", "row", "element", "tensor"),
    "tokentype_embedding": ("row", "row", "element", "tensor"),
    "qkv": ("qkv", "row", "qkv", "qkv"),
    "query": ("qkv", "row", "qkv", "qkv"),
    "key_value": ("qkv", "row", "qkv", "qkv"),
    "latent_query": ("qkv", "row", "qkv", "qkv"),
    "latent_key_value": ("qkv", "row", "qkv", "qkv"),
    "latent_down": ("row", "row", "tensor", "tensor"),
    "attention_projection": ("row", "row", "tensor", "tensor"),
    "mlp": ("row", "row", "tensor", "tensor"),
    "linear": ("row", "row", "tensor", "tensor"),
    "adapter": ("row", "row", "tensor", "tensor"),
    "mixer_input": ("row", "row", "row", "row"),
    "mixer_output": ("row", "row", "tensor", "tensor"),
    "convolution": ("element", "element", "element", "element"),
    "state_space": ("element", "element", "element", "element"),
    "softmax_offset": ("element", "element", "element", "tensor"),
    "relative_position": ("element", "element", "element", "tensor"),
    "vision_token": ("element", "element", "element", "tensor"),
    "norm": ("tensor", "tensor", "tensor", "tensor"),
    "bias": ("element", "element", "element", "tensor"),
    "router": ("element", "element", "element", "tensor"),
    "unknown": ("element", "element", "element", "element"),
}
#: role -> (row-column, slim).
EXPECTED_COLUMNS = {
    # by rows of Query and Key, and by columns of Value
    "qkv": ("qkv", "qkv"),
    "query": ("qkv", "qkv"),
    "key_value": ("qkv", "qkv"),
    "latent_query": ("qkv", "qkv"),
    "latent_key_value": ("qkv", "qkv"),
    "attention_projection": ("column", "column"),
    "mixer_output": ("column", "column"),
    "mlp": ("row", "column"),
    "norm": ("tensor", "element"),
}

#: Tied embeddings, learned positions, biases, gated attention, Megatron's own layers.
GPT = Model(
    num_layers=3,
    hidden_size=96,
    num_attention_heads=6,
    padded_vocab_size=512,
    max_position_embeddings=64,
    group_query_attention=True,
    num_query_groups=3,
    qk_layernorm=True,
    attention_output_gate=True,
    transformer_impl="local",
)

#: (heads, query groups, head size, gated): MHA, GQA, MQA, single head, gated, head size 1.
GEOMETRIES = [
    (4, 4, 3, False),
    (8, 4, 2, False),
    (8, 2, 4, False),
    (6, 1, 2, False),
    (1, 1, 5, False),
    (4, 4, 3, True),
    (8, 2, 2, True),
    (6, 1, 2, True),
    (4, 2, 1, False),
    (4, 2, 1, True),
]


def info_of(role: str = "mlp", shape: tuple[int, ...] = (6, 4), **facts: object) -> ParameterInfo:
    return ParameterInfo(name=f"{LAYER}{role}.weight", shape=shape, role=role, **facts)


def expected_rule(role: str, preset: str) -> str:
    paper, row, first, tensor = EXPECTED_RULES[role]
    row_column, slim = EXPECTED_COLUMNS.get(role, (row, row))
    return {
        "paper": paper,
        "row": row,
        "row-column": row_column,
        "slim": slim,
        "first": first,
        "tensor": tensor,
    }[preset]


def qkv_info(heads: int, groups: int, dim: int, gated: bool, width: int = 3) -> ParameterInfo:
    geometry = HeadGeometry(num_heads=heads, num_query_groups=groups, head_dim=dim, gated=gated)
    rows = groups * (heads // groups * (2 if gated else 1) + 2) * dim
    return info_of("qkv", (rows, width), heads=geometry)


def label_rows(
    heads: int,
    groups: int,
    dim: int,
    gated: bool,
    *,
    q: str = "head",
    gate: str = "row",
    k: str = "head",
    v: str = "row",
) -> list[tuple[object, ...]]:
    """Walk the fused rows one by one; each part is cut by ``head``, ``row`` or ``tensor``."""

    def label(part: str, how: str, head: int, row: int) -> tuple[object, ...]:
        return {"tensor": (part,), "head": (part, head), "row": (part, head, row)}[how]

    labels = []
    for group in range(groups):
        mine = range(group * (heads // groups), (group + 1) * (heads // groups))
        labels += [label("q", q, head, row) for head in mine for row in range(dim)]
        if gated:
            labels += [label("gate", gate, head, row) for head in mine for row in range(dim)]
        labels += [label("k", k, group, row) for row in range(dim)]
        labels += [label("v", v, group, row) for row in range(dim)]
    return labels


def assert_pattern_equals_labels(pattern, labels):
    """Compare every method of a pattern with what follows from one label per row."""
    assert pattern.num_rows == len(labels)
    segments = [pattern.row_segment_of(row) for row in range(len(labels))]
    assert segments == sorted(segments)
    assert set(segments) == set(range(pattern.num_row_segments))
    blocks = pattern.block_of_row_segment(np.asarray(segments)).tolist()
    assert set(blocks) == set(range(pattern.num_blocks))
    # The same partition: block numbers and labels determine each other.
    pairs = set(zip(blocks, labels, strict=True))
    assert len(pairs) == len(set(blocks)) == len(set(labels))
    # Row segments are the runs of rows with one label.
    runs, row = [], 0
    for label, members in groupby(labels):
        count = len(list(members))
        runs.append((row, row + count, label))
        row += count
    index = np.arange(pattern.num_row_segments)
    low, high = pattern.row_bounds(index)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [run[:2] for run in runs]
    rows_of = Counter(labels)
    runs_of = Counter(run[2] for run in runs)
    assert pattern.rows_of_block(index).tolist() == [rows_of[run[2]] for run in runs]
    assert pattern.is_of_several(index).tolist() == [runs_of[run[2]] > 1 for run in runs]


# Rules.


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("role", EXPECTED_RULES)
def test_rule_table(role, preset):
    config = AdamMiniConfig(preset=preset)
    assert rule_for(info_of(role), config) == expected_rule(role, preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_role_that_nobody_listed_is_elementwise_never_one_block(preset):
    blocks = partition_parameter(info_of("kernel", (5, 2, 3)), AdamMiniConfig(preset=preset))
    assert (blocks.rule, blocks.pattern, blocks.num_blocks) == ("element", None, 30)


def test_row_rule_is_one_block_per_row():
    blocks = partition_parameter(info_of("mlp", (6, 4)), AdamMiniConfig())
    assert_pattern_equals_labels(blocks.pattern, list(range(6)))


@pytest.mark.parametrize("shape", [(6, 4), (7,), (2, 3, 4)])
def test_tensor_rule_is_one_block(shape):
    blocks = partition_parameter(info_of("norm", shape), AdamMiniConfig())
    assert_pattern_equals_labels(blocks.pattern, [0] * shape[0])


@pytest.mark.parametrize(
    ("tp_dim", "whole", "num_blocks"), [(None, (6, 4), 6), (0, (24, 4), 24), (1, (6, 16), 6)]
)
def test_rows_are_those_of_the_whole_tensor(tp_dim, whole, num_blocks):
    tp_size = 1 if tp_dim is None else 4
    info = info_of("mlp", (6, 4), tp_dim=tp_dim, tp_size=tp_size)
    assert info.global_shape == whole
    assert partition_parameter(info, AdamMiniConfig()).num_blocks == num_blocks


def test_row_offset_and_sizes_of_a_shard():
    info = info_of("mlp", (6, 4, 2), tp_dim=0, tp_size=4, tp_rank=3)
    assert (info.row_offset, info.row_numel, info.numel) == (18, 8, 48)
    assert replace(info, tp_dim=1).row_offset == 0
    assert replace(info, shape=(6,)).row_numel == 1


# Overrides.


def test_first_matching_rule_wins():
    config = AdamMiniConfig(rules=(("*.mlp.*", "tensor"), (f"{LAYER}mlp.weight", "element")))
    assert rule_for(info_of("mlp"), config) == "tensor"
    assert rule_for(info_of("norm", (4,)), config) == "tensor"
    assert rule_for(info_of("router"), config) == "element"


def test_full_v_comes_before_rules():
    config = AdamMiniConfig(full_v=("*.mlp.*",), rules=(("*", "tensor"),))
    assert config.overrides() == (("*.mlp.*", "element"), ("*", "tensor"))
    blocks = partition_parameter(info_of("mlp", (6, 4)), config)
    assert (blocks.rule, blocks.num_blocks) == ("element", 24)
    assert rule_for(info_of("bias", (4,)), config) == "tensor"


def test_patterns_are_case_sensitive_whole_names():
    config = AdamMiniConfig(full_v=("mlp.weight", "*.MLP.*"))
    assert rule_for(info_of("mlp"), config) == "row"
    names = [f"{LAYER}mlp.weight"]
    assert unmatched_patterns(names, config) == ["mlp.weight", "*.MLP.*"]
    assert unmatched_patterns([*names, "mlp.weight"], config) == ["*.MLP.*"]


@given(
    names=st.lists(st.text("ab.", max_size=4), max_size=4),
    patterns=st.lists(st.text("ab.*?", max_size=3), max_size=4),
)
def test_unmatched_patterns_equals_brute_force(names, patterns):
    expected = [p for p in patterns if not [n for n in names if fnmatchcase(n, p)]]
    assert unmatched_patterns(names, AdamMiniConfig(full_v=tuple(patterns))) == expected


# Head geometry.

#: What Megatron's flags make of heads: (flags as its ``args`` hold them, geometry).
ARGS_GEOMETRIES = {
    "no groups, whose default is 1": (
        {"group_query_attention": False, "num_query_groups": 1, "kv_channels": 8},
        (8, 8, 8, False),
    ),
    "groups": (
        {"group_query_attention": True, "num_query_groups": 2, "kv_channels": 8},
        (8, 2, 8, False),
    ),
    "groups without a number": (
        {"group_query_attention": True, "num_query_groups": None, "kv_channels": 8},
        (8, 8, 8, False),
    ),
    "head size of its own": (
        {"group_query_attention": False, "num_query_groups": 1, "kv_channels": 24},
        (8, 8, 24, False),
    ),
    "head size left open": (
        {"group_query_attention": False, "num_query_groups": 1, "kv_channels": None},
        (8, 8, 8, False),
    ),
    "gate": (
        {
            "group_query_attention": True,
            "num_query_groups": 4,
            "kv_channels": 8,
            "attention_output_gate": True,
        },
        (8, 4, 8, True),
    ),
    "a release without gate, kv_channels and the switch": (
        {"num_query_groups": 4},
        (8, 4, 8, False),
    ),
}


def geometry_of(source: object) -> tuple[int, int, int, bool]:
    found = HeadGeometry.of(source)
    return (found.num_heads, found.num_query_groups, found.head_dim, found.gated)


@pytest.mark.parametrize("case", ARGS_GEOMETRIES)
def test_heads_of_the_args_in_a_checkpoint(case):
    flags, expected = ARGS_GEOMETRIES[case]
    args = SimpleNamespace(num_attention_heads=8, hidden_size=64, **flags)
    assert geometry_of(args) == expected


@pytest.mark.parametrize(("groups", "expected"), [(8, 8), (2, 2), (None, 8)])
def test_heads_of_megatrons_config(groups, expected):
    # It has no group_query_attention, and fills in what is left open.
    config = SimpleNamespace(
        num_attention_heads=8,
        num_query_groups=groups,
        kv_channels=24,
        hidden_size=64,
        attention_output_gate=True,
    )
    assert geometry_of(config) == (8, expected, 24, True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (6, 6, 16, False)),
        ({"kv_channels": 8}, (6, 6, 8, False)),
        ({"group_query_attention": True, "num_query_groups": 3}, (6, 3, 16, False)),
        # The default of Megatron's flag is 1.
        ({"group_query_attention": True}, (6, 1, 16, False)),
        ({"attention_output_gate": True}, (6, 6, 16, True)),
    ],
)
def test_heads_of_an_estimated_model(flags, expected):
    plain = replace(GPT, group_query_attention=False, num_query_groups=None)
    found = replace(plain, **{"attention_output_gate": False} | flags)
    assert geometry_of(found) == expected == geometry_of(SimpleNamespace(**vars(found)))


@pytest.mark.parametrize("name", ["num_attention_heads", "num_query_groups", "hidden_size"])
def test_heads_of_a_source_that_lacks_something(name):
    given = {"num_attention_heads": 8, "num_query_groups": 2, "hidden_size": 64}
    del given[name]
    with pytest.raises(AttributeError) as caught:
        HeadGeometry.of(SimpleNamespace(**given))
    assert caught.value.name == name


# Fused Query, Key, Value.


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {}),
        ({"value_as_block": True}, {"v": "tensor"}),
        ({"preset": "row"}, {"q": "row", "k": "row"}),
        ({"preset": "first"}, {"v": "tensor", "gate": "tensor"}),
        ({"preset": "tensor"}, dict.fromkeys(("q", "gate", "k", "v"), "tensor")),
        # Asked for by name, 'head' means heads under any preset.
        ({"preset": "tensor", "rules": (("*", "head"),)}, {}),
        ({"rules": (("*", "head"),)}, {}),
    ],
    ids=["paper", "value_as_block", "row", "first", "tensor", "tensor-head", "paper-head"],
)
def test_qkv_pattern_equals_row_by_row_labels(geometry, options, parts):
    blocks = partition_parameter(qkv_info(*geometry), AdamMiniConfig(**options))
    labels = label_rows(*geometry, **parts)
    assert blocks.num_blocks == len(set(labels))
    assert_pattern_equals_labels(blocks.pattern, labels)


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    dim=st.integers(1, 5),
    gated=st.booleans(),
    value_as_block=st.booleans(),
)
def test_qkv_pattern_property(groups, per_group, dim, gated, value_as_block):
    geometry = (groups * per_group, groups, dim, gated)
    config = AdamMiniConfig(value_as_block=value_as_block)
    labels = label_rows(*geometry, v="tensor" if value_as_block else "row")
    assert_pattern_equals_labels(partition_parameter(qkv_info(*geometry), config).pattern, labels)


@pytest.mark.parametrize(
    ("rule", "num_blocks"), [("row", 24), ("tensor", 1), ("element", 24 * 3), ("head", 4 + 2 + 6)]
)
def test_qkv_may_be_given_any_rule_by_name(rule, num_blocks):
    config = AdamMiniConfig(rules=(("*.qkv.*", rule),))
    assert partition_parameter(qkv_info(4, 2, 3, False), config).num_blocks == num_blocks


# Other attention weights.

#: What Megatron's config says of heads: head size 5 for cross attention, else latent attention.
HEADS = SimpleNamespace(
    num_attention_heads=3,
    num_query_groups=3,
    kv_channels=5,
    hidden_size=15,
    attention_output_gate=True,
    qk_head_dim=4,
    qk_pos_emb_head_dim=2,
    v_head_dim=3,
)


def label_heads(
    key_rows: int, value_rows: int, *, key: str, value: str
) -> list[tuple[object, ...]]:
    """Walk the rows of all heads: first a Query or Key, then a Value, each cut as in label_rows."""
    labels: list[tuple[object, ...]] = []
    for head in range(HEADS.num_attention_heads):
        for part, rows, how in (("k", key_rows, key), ("v", value_rows, value)):
            kept = {"tensor": 1, "head": 2, "row": 3}[how]
            labels += [(part, head, row)[:kept] for row in range(rows)]
    return labels


@pytest.mark.parametrize(
    ("role", "key_rows", "value_rows"),
    [
        ("query", 5, 0),
        ("key_value", 5, 5),
        ("latent_query", 6, 0),
        ("latent_key_value", 4, 3),
    ],
)
@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ({}, "head", "row"),
        ({"value_as_block": True}, "head", "tensor"),
        ({"preset": "row"}, "row", "row"),
        ({"preset": "first"}, "head", "tensor"),
        ({"preset": "tensor"}, "tensor", "tensor"),
    ],
    ids=["paper", "value_as_block", "row", "first", "tensor"],
)
def test_heads_of_other_attention_weights(role, key_rows, value_rows, options, key, value):
    heads = HeadGeometry.of(HEADS, role)
    info = info_of(role, (3 * (key_rows + value_rows), 2), heads=heads)
    labels = label_heads(key_rows, value_rows, key=key, value=value)
    blocks = partition_parameter(info, AdamMiniConfig(**options))
    assert blocks.num_blocks == len(set(labels))
    assert_pattern_equals_labels(blocks.pattern, labels)


@pytest.mark.parametrize(
    ("preset", "part"), [("row", "row"), ("row-column", "column"), ("slim", "column")]
)
def test_value_as_block_contradicts_rows_and_columns(preset, part):
    text = (
        f"Adam-mini value_as_block=True has no meaning with preset={preset!r}, where each {part} "
        "of Value is a block; drop one of them, or use preset='paper'."
    )
    with pytest.raises(ValueError, match=message(text)):
        AdamMiniConfig(preset=preset, value_as_block=True)


# Columns.


def block_of_elements(pattern, num_columns):
    """Return the block of each element, row by row and column by column."""
    blocks, column_set = pattern.block_of_rows(), pattern.column_set_of_rows()
    return [
        [int(block) + (column if in_set >= 0 else 0) for column in range(num_columns)]
        for block, in_set in zip(blocks, column_set, strict=True)
    ]


def assert_elements_are_labelled(pattern, labels):
    """Compare the blocks of elements with one label per element, and numbers with counts."""
    num_columns = len(labels[0])
    found = block_of_elements(pattern, num_columns)
    flat = list(chain.from_iterable(found))
    expected = list(chain.from_iterable(labels))
    pairs = set(zip(flat, expected, strict=True))
    assert len(pairs) == len(set(flat)) == len(set(expected))
    assert set(flat) == set(range(pattern.num_blocks))
    sizes = Counter(flat)
    index = np.arange(pattern.num_row_segments)
    rows_of, in_set = pattern.rows_of_block(index), pattern.column_set_of(index) >= 0
    first_row, _ = pattern.row_bounds(index)
    for row, rows, columns in zip(first_row, rows_of, in_set, strict=True):
        assert sizes[found[row][0]] == rows * (1 if columns else num_columns)
    assert not pattern.is_of_several(index)[in_set].any()


@pytest.mark.parametrize("preset", ["row-column", "slim"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_value_by_columns_equals_labels_of_elements(geometry, preset):
    pattern = partition_parameter(qkv_info(*geometry), AdamMiniConfig(preset=preset)).pattern
    labels = [
        [("v", column) if label[0] == "v" else label for column in range(3)]
        for label in label_rows(*geometry, q="row", k="row")
    ]
    assert_elements_are_labelled(pattern, labels)


@pytest.mark.parametrize(
    ("facts", "shards"),
    [({}, 1), ({"tp_dim": 0, "tp_size": 2}, 2), ({"tp_dim": 1, "tp_size": 2}, 1)],
)
@pytest.mark.parametrize("num_stacked", [1, 2, 3])
def test_columns_of_each_stacked_matrix(num_stacked, facts, shards):
    info = info_of("mlp", (6, 4), num_stacked=num_stacked, **facts)
    pattern = partition_parameter(info, AdamMiniConfig(preset="slim")).pattern
    rows, columns = info.global_shape
    labels = [
        [(row % (rows // shards) // (rows // shards // num_stacked), c) for c in range(columns)]
        for row in range(rows)
    ]
    assert_elements_are_labelled(pattern, labels)


def test_columns_of_a_vector_are_one_block():
    config = AdamMiniConfig(rules=(("*", "column"),))
    blocks = partition_parameter(info_of("bias", (5,)), config)
    assert_pattern_equals_labels(blocks.pattern, [0] * 5)


def test_columns_of_matrices_that_are_not_equal():
    text = (
        "Parameter 'decoder.layers.0.mlp.weight' has 10 rows, which are not 3 matrices of equal "
        "size on 2 tensor-parallel ranks; give it another rule than 'column'."
    )
    info = info_of("mlp", (5, 4), num_stacked=3, tp_dim=0, tp_size=2)
    with pytest.raises(ValueError, match=message(text)):
        partition_parameter(info, AdamMiniConfig(preset="slim"))


@pytest.mark.parametrize("fine", [*RULES, "slim"])
@pytest.mark.parametrize("coarse", [*RULES, "slim"])
def test_coarser_blocks_equal_unions_of_elements(fine, coarse):
    info = qkv_info(4, 2, 2, False)

    def blocks_of(rule):
        options = {"preset": rule} if rule in PRESETS else {"rules": (("*", rule),)}
        return partition_parameter(info, AdamMiniConfig(**options))

    def labels(blocks):
        if blocks.pattern is None:
            return np.arange(blocks.num_blocks)
        return np.concatenate(block_of_elements(blocks.pattern, 3))

    found = blocks_of(fine), blocks_of(coarse)
    assert is_coarsening(*found) == are_unions(labels(found[1]), labels(found[0]))


def test_rows_that_do_not_fit_latent_heads():
    info = info_of("latent_key_value", (20, 4), heads=HeadGeometry.of(HEADS, "latent_key_value"))
    text = (
        f"Parameter '{LAYER}latent_key_value.weight' has 20 rows, but 3 heads, 3 query groups and "
        "head size 4 make 21; check --num-attention-heads, --qk-head-dim, --qk-pos-emb-head-dim "
        "and --v-head-dim, or give the parameter another rule."
    )
    with pytest.raises(ValueError, match=message(text)):
        partition_parameter(info, AdamMiniConfig())


# Roles.

ROLES = {
    # (name within a layer, dimensions): role
    ("self_attention.linear_qkv.weight", 2): "qkv",
    ("self_attention.linear_qkv.bias", 1): "bias",
    ("self_attention.linear_qkv.layer_norm_weight", 1): "norm",
    ("self_attention.linear_proj.weight", 2): "attention_projection",
    ("self_attention.q_layernorm.weight", 1): "norm",
    ("mlp.linear_fc1.weight", 2): "mlp",
    ("mlp.linear_fc2.weight", 2): "mlp",
    ("mlp.router.weight", 2): "router",
    # One module for each expert.
    ("mlp.experts.local_experts.3.linear_fc1.weight", 2): "mlp",
    ("mlp.experts.local_experts.31.linear_fc2.weight", 2): "mlp",
    ("mlp.experts.local_experts.0.linear_fc2.bias", 1): "bias",
    # Grouped GEMM.
    ("mlp.experts.linear_fc1.weight0", 2): "mlp",
    ("mlp.experts.linear_fc2.weight17", 2): "mlp",
    ("mlp.experts.linear_fc1.bias17", 1): "bias",
    # Before 0.17, all experts in one weight whose neurons are columns.
    ("mlp.experts.weight1", 2): "unknown",
    ("mlp.shared_experts.linear_fc1.weight", 2): "mlp",
    ("mlp.shared_experts.linear_fc2.weight", 2): "mlp",
    ("mlp.shared_experts.gate_weight", 2): "router",
    ("mlp.router.bias", 1): "bias",
    ("mlp.fc1_latent_proj.weight", 2): "linear",
    # Numbers mean an expert's only within experts.
    ("mlp.linear_fc1.weight0", 2): "unknown",
    # Cross attention; a sink of the softmax.
    ("cross_attention.linear_q.weight", 2): "query",
    ("cross_attention.linear_kv.weight", 2): "key_value",
    ("cross_attention.linear_kv.bias", 1): "bias",
    ("cross_attention.linear_proj.weight", 2): "attention_projection",
    ("self_attention.core_attention.softmax_offset", 1): "softmax_offset",
    # Multi-latent attention, and the indexer of its sparse variant.
    ("self_attention.linear_q_proj.weight", 2): "latent_query",
    ("self_attention.linear_q_up_proj.weight", 2): "latent_query",
    ("self_attention.linear_kv_up_proj.weight", 2): "latent_key_value",
    ("self_attention.linear_q_down_proj.weight", 2): "latent_down",
    ("self_attention.linear_kv_down_proj.weight", 2): "latent_down",
    ("self_attention.linear_qkv_down_proj.weight", 2): "latent_down",
    ("self_attention.linear_kv_up_proj.layer_norm_weight", 1): "norm",
    ("self_attention.core_attention.indexer.linear_wq_b.weight", 2): "linear",
    ("self_attention.core_attention.indexer.k_norm.weight", 1): "norm",
    # Mamba, gated delta net.
    ("mixer.in_proj.weight", 2): "mixer_input",
    ("mixer.in_proj.layer_norm_weight", 1): "norm",
    ("mixer.out_proj.weight", 2): "mixer_output",
    ("mixer.conv1d.weight", 3): "convolution",
    ("mixer.conv1d_weight", 3): "convolution",
    ("mixer.conv1d_bias", 1): "bias",
    ("mixer.A_log", 1): "state_space",
    ("mixer.D", 1): "state_space",
    ("mixer.dt_bias", 1): "state_space",
    ("mixer.norm.weight", 1): "norm",
    ("self_attention.in_proj.weight", 2): "mixer_input",
    ("self_attention.out_proj.weight", 2): "mixer_output",
    ("self_attention.out_norm.weight", 1): "norm",
    # A linear layer in place of an attention or MLP.
    ("self_attention.weight", 2): "linear",
    ("mlp.weight", 2): "linear",
    # Low-rank adapters of Megatron-Bridge and of PEFT, also of experts.
    ("self_attention.linear_qkv.adapter.linear_in.weight", 2): "adapter",
    ("self_attention.linear_qkv.adapter.adapter_q.linear_out.weight", 2): "adapter",
    ("mlp.experts.linear_fc1.adapter.linear_in.weight", 2): "adapter",
    ("mlp.linear_fc1.lora_A.weight", 2): "adapter",
    ("mlp.linear_fc1.lora_B.default.weight", 2): "adapter",
    # Parts of a weight that Megatron stores apart have no name in a model.
    ("mixer.in_proj.weight.dt", 2): "unknown",
    ("something.kernel", 3): "unknown",
    ("something.scale", 1): "unknown",
}

#: The same for parameters outside layers.
OUTER_ROLES = {
    ("embedding.word_embeddings.weight", 2): "embedding",
    ("embedding.position_embeddings.weight", 2): "position_embedding",
    ("embedding.tokentype_embeddings.weight", 2): "tokentype_embedding",
    ("encoder_relative_pos_emb.relative_attention_bias.weight", 2): "relative_position",
    ("output_layer.weight", 2): "output",
    ("output_layer.bias", 1): "bias",
    ("lm_head.output_layer.bias", 1): "bias",
    ("decoder.final_layernorm.weight", 1): "norm",
    # Multi-token prediction.
    ("mtp.layers.0.eh_proj.weight", 2): "linear",
    ("mtp.layers.0.enorm.weight", 1): "norm",
    ("mtp.layers.0.hnorm.weight", 1): "norm",
    ("mtp.layers.0.mtp_model_layer.self_attention.linear_qkv.weight", 2): "qkv",
    # BERT.
    ("lm_head.dense.weight", 2): "linear",
    ("lm_head.layer_norm.weight", 1): "norm",
    ("pooler.dense.weight", 2): "linear",
    ("binary_head.weight", 2): "linear",
    # Vision and multimodal.
    ("vision_model.conv1.weight", 4): "linear",
    ("vision_model.conv1.bias", 1): "bias",
    ("vision_model.class_token", 3): "vision_token",
    ("class_token", 2): "vision_token",
    ("vision_model.position_embeddings.weight", 2): "position_embedding",
    ("vision_model.position_embeddings", 3): "vision_token",
    ("vision_model.embedder.weight", 2): "linear",
    ("vision_model.ln_pre.weight", 1): "norm",
    ("vision_model.decoder.layers.0.self_attention.linear_qkv.weight", 2): "qkv",
    ("vision_projection.encoder.linear_fc1.weight", 2): "mlp",
    ("vision_projection.encoder.weight", 2): "linear",
    ("modality_submodules.images.input_projections.0.encoder.weight", 2): "linear",
    ("language_model.embedding.word_embeddings.weight", 2): "embedding",
}


@pytest.mark.parametrize(("name", "num_dimensions"), ROLES)
def test_role_of_a_name(name, num_dimensions):
    assert role_of(LAYER + name, num_dimensions) == ROLES[name, num_dimensions]


@pytest.mark.parametrize(("name", "num_dimensions"), OUTER_ROLES)
def test_role_of_a_name_outside_layers(name, num_dimensions):
    assert role_of(name, num_dimensions) == OUTER_ROLES[name, num_dimensions]


@pytest.mark.parametrize("name", [name for name, _ in ROLES])
def test_experts_are_those_that_some_tokens_are_sent_to(name):
    assert is_expert(LAYER + name) == ("mlp.experts." in name)


# Manifest.


def model(tp: int, padded_vocabulary: int = 16) -> list[ParameterInfo]:
    """Return a small model as rank 0 of a tensor-parallel group of ``tp`` sees it."""

    def split(name: str, role: str, shape: tuple[int, ...], dim: int | None, **facts: object):
        local = tuple(n // tp if i == dim else n for i, n in enumerate(shape))
        return ParameterInfo(
            name=name,
            shape=local,
            role=role,
            tp_dim=dim if tp > 1 else None,
            tp_size=tp if tp > 1 and dim is not None else 1,
            **facts,
        )

    heads = HeadGeometry(num_heads=4, num_query_groups=2, head_dim=2)
    return [
        split("embedding.word_embeddings.weight", "embedding", (padded_vocabulary, 8), 0),
        split(f"{LAYER}self_attention.linear_qkv.weight", "qkv", (16, 8), 0, heads=heads),
        split(f"{LAYER}self_attention.linear_proj.weight", "attention_projection", (8, 8), 1),
        split(f"{LAYER}mlp.linear_fc1.weight", "mlp", (32, 8), 0),
        split(f"{LAYER}mlp.linear_fc1.bias", "bias", (32,), 0),
        split(f"{LAYER}mlp.linear_fc2.weight", "mlp", (8, 16), 1),
        split("decoder.final_layernorm.weight", "norm", (8,), None),
        split("decoder.something.kernel", "unknown", (4, 2, 2), None),
        split("output_layer.weight", "output", (padded_vocabulary, 8), 0),
    ]


def manifest(infos: list[ParameterInfo], **options: object) -> dict:
    config = AdamMiniConfig(**options)
    return manifest_of([partition_parameter(i, config).manifest_entry() for i in infos], config)


PINNED_OPTIONS = {
    "paper": {},
    "first": {"preset": "first"},
    "tensor": {"preset": "tensor"},
    "value as block": {"value_as_block": True, "full_v": ("*.linear_fc1.*",)},
}
#: Hash of the manifest, and of its list of parameters with their roles, names and counts.
PINNED_MANIFESTS = {
    ("llama-2-7b", "paper"): ("3ea6cdd21d7dcc79", "647041546bef3c35"),
    ("llama-2-7b", "first"): ("46b28e0a2a5d2d4d", "15d3435c5a5c2f0b"),
    ("llama-2-7b", "tensor"): ("fa24d2a21e54f375", "67c8a78d0b0db7bc"),
    ("llama-2-7b", "value as block"): ("5dfb4e20f22a12ab", "1bec5e32bd53dd23"),
    ("llama-3-70b", "paper"): ("89ad80d22cb482c3", "2da96d978ebb272f"),
    ("llama-3-70b", "first"): ("c4c2ebec05613252", "a16e8b5a12af56ca"),
    ("llama-3-70b", "tensor"): ("3b583f26382e16c7", "d7af53d13ed39f0b"),
    ("llama-3-70b", "value as block"): ("6e4ab94ea09b2f8b", "c28c0b100c298d11"),
    ("gpt", "paper"): ("03ef2d5949eef875", "e6cb83ee2aa4c2c8"),
    ("gpt", "first"): ("d9c2d9f6ff648376", "e1a07af4489fbb9a"),
    ("gpt", "tensor"): ("0e62edff965289ee", "c0242763ed2db4d5"),
    ("gpt", "value as block"): ("2bf57b1875400d6f", "f899fa3412c6e50b"),
}


@pytest.mark.parametrize(("name", "options"), PINNED_MANIFESTS)
def test_manifest_of_dense_models_stays_what_checkpoints_hold(name, options):
    (infos,) = stage_parameters(GPT if name == "gpt" else MODELS[name], Parallel(), pp_rank=0)
    found = manifest(infos, **PINNED_OPTIONS[options])
    entries = [{k: v for k, v in e.items() if k != "heads"} for e in found["parameters"]]
    assert (found["hash"], short_hash(entries)) == PINNED_MANIFESTS[name, options]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tp", [2, 4])
def test_manifest_does_not_depend_on_tensor_parallelism_or_order(tp, preset):
    assert manifest(model(tp)[::-1], preset=preset) == manifest(model(1), preset=preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_manifest_hash_does_not_depend_on_vocabulary_padding(preset):
    short, long = manifest(model(1), preset=preset), manifest(model(4, 64), preset=preset)
    assert short["hash"] == long["hash"]
    assert short["elements"] != long["elements"]


def test_manifest_hash_is_that_of_the_checkpoints_there_are():
    assert manifest(model(1))["hash"] == "ac12142e2bd992a2"


def test_manifest_hash_depends_on_rules_names_and_shapes():
    variants = [
        manifest(model(1)),
        manifest(model(1), preset="first"),
        manifest(model(1), preset="tensor"),
        manifest(model(1), value_as_block=True),
        manifest(model(1), full_v=("*.bias",)),
        manifest(model(1), rules=(("*.bias", "tensor"),)),
        manifest(model(1)[1:]),
        manifest([replace(model(1)[0], name="other.weight"), *model(1)[1:]]),
        manifest([replace(model(1)[0], shape=(16, 9)), *model(1)[1:]]),
        manifest([replace(model(1)[3], shape=(33, 8)), *model(1)[:3], *model(1)[4:]]),
    ]
    assert len({entry["hash"] for entry in variants}) == len(variants)


def test_manifest_hash_ignores_what_does_not_decide_the_partition():
    other = manifest(model(1), backend="reference", manifest="somewhere.json")
    assert other["hash"] == manifest(model(1))["hash"]


def test_a_checkpoint_names_the_partition_that_it_was_saved_with():
    config = AdamMiniConfig(
        preset="first", value_as_block=True, full_v=("a*",), rules=(("b*", "row"),), manifest="m"
    )
    whole = manifest_of([partition_parameter(i, config).manifest_entry() for i in model(1)], config)
    identity = identity_of(whole, config, checkpoint_format="model_space", saved_from={"data": 2})
    found = json.loads(json.dumps(identity))
    assert partition_fields(config_of(found)) == partition_fields(config) == found["partition"]
    assert config_of(found).overrides() == config.overrides()
    rules = stored_rules(found, {})
    assert {key: rule.num_blocks for key, rule in rules.items()} == {
        entry["key"]: entry["blocks"] for entry in whole["parameters"]
    }
    assert format_problem(found) is None
    assert "reads up to" in str(format_problem({"format": FORMAT_VERSION + 1}))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=12))
def test_blocks_are_unions_of_others_if_each_of_those_lies_in_one(rows):
    coarse, fine = (np.array(labels, dtype=np.int64) for labels in zip(*rows, strict=True))
    expected = all(len(set(coarse[fine == block])) == 1 for block in set(fine))
    assert are_unions(coarse, fine) == expected


def test_manifest_counts_and_lists_what_it_does_not_know():
    found = json.loads(json.dumps(manifest(model(2))))
    assert found["elementwise_unknown"] == ["decoder.something.kernel"]
    blocks = {entry["name"].removeprefix(LAYER): entry["blocks"] for entry in found["parameters"]}
    assert blocks == {
        "embedding.word_embeddings.weight": 16,
        "self_attention.linear_qkv.weight": 4 + 2 + 2 * 2,  # Q heads, K heads, V rows
        "self_attention.linear_proj.weight": 8,
        "mlp.linear_fc1.weight": 32,
        "mlp.linear_fc1.bias": 32,
        "mlp.linear_fc2.weight": 8,
        "decoder.final_layernorm.weight": 1,
        "decoder.something.kernel": 16,
        "output_layer.weight": 16,
    }
    assert found["blocks"] == sum(blocks.values())
    assert found["v_bytes"] == 4 * found["blocks"]
    elements = [2 * 16 * 8, 16 * 8, 8 * 8, 32 * 8, 32, 8 * 16, 8, 16]
    assert found["elements"] == sum(elements)


def test_identity_leaves_out_what_differs_between_ranks_that_agree():
    config = AdamMiniConfig()
    one = model(4)[1]
    other = replace(one, tp_rank=3, in_norm=False)
    assert (
        partition_parameter(one, config).identity() == partition_parameter(other, config).identity()
    )
    for change in ({"shape": (4, 9)}, {"name": "x"}, {"tp_size": 2}, {"expert": True}):
        changed = partition_parameter(replace(one, **change), AdamMiniConfig(rules=(("*", "row"),)))
        base = partition_parameter(one, AdamMiniConfig(rules=(("*", "row"),)))
        assert changed.identity() != base.identity()


# Refusals.


def message(text: str) -> str:
    return "^" + re.escape(text) + "$"


def test_unknown_preset():
    text = (
        "Adam-mini preset='adam' is not known; allowed: paper, row, row-column, slim, "
        "first, tensor."
    )
    with pytest.raises(ValueError, match=message(text)):
        AdamMiniConfig(preset="adam")


def test_unknown_backend():
    text = f"Adam-mini backend='abacus' is not known; allowed: {', '.join(BACKENDS)}."
    with pytest.raises(ValueError, match=message(text)):
        AdamMiniConfig(backend="abacus")


def test_unknown_rule():
    text = (
        "Adam-mini rule 'diagonal' for pattern '*.bias' is not known; allowed: row, column, head, "
        "tensor, element."
    )
    with pytest.raises(ValueError, match=message(text)):
        AdamMiniConfig(rules=(("*.norm", "row"), ("*.bias", "diagonal")))


def test_one_pattern_as_a_bare_string_is_refused():
    # tuple("*.bias") would be one pattern per character, and '*' alone matches every parameter.
    with pytest.raises(TypeError, match=r"full_v='\*\.bias'"):
        AdamMiniConfig(full_v="*.bias")


@pytest.mark.parametrize("role", sorted(set(EXPECTED_RULES) - set(HEAD_PARTS)))
def test_head_rule_needs_heads(role):
    text = (
        f"Adam-mini rule 'head' was asked for parameter '{LAYER}{role}.weight' of role '{role}', "
        "which has no heads; use 'row', 'tensor' or 'element'."
    )
    with pytest.raises(ValueError, match=message(text)):
        partition_parameter(info_of(role), AdamMiniConfig(rules=(("*", "head"),)))


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "row"])
def test_heads_that_do_not_divide_into_groups(preset):
    geometry = HeadGeometry(num_heads=6, num_query_groups=4, head_dim=2)
    text = (
        f"Parameter '{LAYER}qkv.weight': 6 attention heads are not divisible by 4 query groups; "
        "choose numbers that are."
    )
    with pytest.raises(ValueError, match=message(text)):
        partition_parameter(
            info_of("qkv", (geometry.num_rows, 4), heads=geometry), AdamMiniConfig(preset=preset)
        )


@pytest.mark.parametrize(
    ("gated", "rows", "note"), [(False, 16, ""), (True, 24, " with an output gate")]
)
def test_rows_that_do_not_fit_the_heads(gated, rows, note):
    geometry = HeadGeometry(num_heads=4, num_query_groups=2, head_dim=2, gated=gated)
    text = (
        f"Parameter '{LAYER}qkv.weight' has 40 rows, but 4 heads, 2 query groups and head size 2"
        f"{note} make {rows}; check --num-attention-heads, --num-query-groups and --kv-channels, "
        "or give the parameter another rule."
    )
    info = info_of("qkv", (20, 4), heads=geometry, tp_dim=0, tp_size=2)
    with pytest.raises(ValueError, match=message(text)):
        partition_parameter(info, AdamMiniConfig())
    # The remedy works.
    assert partition_parameter(info, AdamMiniConfig(rules=(("*", "row"),))).num_blocks == 40


GOOD_VALUES = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": None},
        {"lr": 0.0},
        {"betas": (0.0, 0.0)},
        {"betas": (0.0, 0.999999)},
        {"weight_decay": 0.0},
        {"eps": 1e-30},
    ],
)
def test_adam_values_at_the_edge_of_what_is_allowed(values):
    check_adam_values(**(GOOD_VALUES | values))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": -1e-3}, "lr=-0.001 is not allowed; it must be >= 0."),
        ({"lr": float("nan")}, "lr=nan is not allowed; it must be >= 0."),
        ({"betas": (-0.1, 0.9)}, "beta1=-0.1 is not allowed; it must be in [0, 1)."),
        ({"betas": (1.0, 0.9)}, "beta1=1.0 is not allowed; it must be in [0, 1)."),
        ({"betas": (0.9, 1.0)}, "beta2=1.0 is not allowed; it must be in [0, 1)."),
        ({"betas": (0.9, float("nan"))}, "beta2=nan is not allowed; it must be in [0, 1)."),
        ({"eps": 0.0}, "eps=0.0 is not allowed; it must be > 0 (the usual value is 1e-8)."),
        ({"eps": -1e-8}, "eps=-1e-08 is not allowed; it must be > 0 (the usual value is 1e-8)."),
        (
            {"eps": float("nan")},
            "eps=nan is not allowed; it must be > 0 (the usual value is 1e-8).",
        ),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is not allowed; it must be >= 0."),
        ({"weight_decay": float("nan")}, "weight_decay=nan is not allowed; it must be >= 0."),
    ],
)
def test_adam_values_out_of_range(values, text):
    with pytest.raises(ValueError, match=message(text)):
        check_adam_values(**(GOOD_VALUES | values))


def test_rules_file_keeps_its_order(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text('{"z*": "row", "a*": "element", "*": "tensor"}')
    assert read_rules(path) == (("z*", "row"), ("a*", "element"), ("*", "tensor"))
    assert read_rules(str(path)) == AdamMiniConfig(rules=read_rules(path)).rules


@pytest.mark.parametrize("content", ["[]", "{}", '"row"', "3", '[["*", "row"]]'])
def test_rules_file_of_another_form(tmp_path, content):
    path = tmp_path / "rules.json"
    path.write_text(content)
    text = (
        f"Adam-mini rules file {str(path)!r} must hold a JSON object that maps name patterns to "
        f"one of {', '.join(RULES)}, and at least one of them."
    )
    with pytest.raises(ValueError, match=message(text)):
        read_rules(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"{", "Expecting property name"), (b"\xff", "utf-8")],
)
def test_rules_file_that_cannot_be_read(tmp_path, content, reason):
    path = tmp_path / "rules.json"
    if content is not None:
        path.write_bytes(content)
    start = re.escape(f"Adam-mini rules file {str(path)!r} cannot be read: ")
    with pytest.raises(ValueError, match=f"^{start}.*{reason}"):
        read_rules(path)


@pytest.mark.parametrize("value", ["1", "null", '"rows"', '["row"]'])
def test_rules_file_with_a_rule_that_does_not_exist(tmp_path, value):
    path = tmp_path / "rules.json"
    path.write_text(f'{{"*": {value}}}')
    with pytest.raises(ValueError, match=r"for pattern '\*' is not known; allowed: row, column"):
        AdamMiniConfig(rules=read_rules(path))
