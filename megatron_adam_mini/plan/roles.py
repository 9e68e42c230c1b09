"""Name of a parameter -> its role.

Standard library only, so tools without Megatron can use it. Data flow: mcore/param_info,
convert/blocks and estimate/stages collect names -> **role** -> ``partition`` turns it into a rule.
``docs/partition.md`` says which role each parameter of Megatron-Core's models has, and why.
"""

from __future__ import annotations

import re

#: End of the name -> role, for parameters with two dimensions. First match wins.
_MATRIX_ROLES = (
    ("word_embeddings.weight", "embedding"),
    ("position_embeddings.weight", "position_embedding"),
    ("tokentype_embeddings.weight", "tokentype_embedding"),
    ("relative_attention_bias.weight", "relative_position"),
    ("output_layer.weight", "output"),
    ("self_attention.linear_qkv.weight", "qkv"),
    ("cross_attention.linear_q.weight", "query"),
    ("cross_attention.linear_kv.weight", "key_value"),
    # Multi-latent attention.
    (".linear_q_proj.weight", "latent_query"),
    (".linear_q_up_proj.weight", "latent_query"),
    (".linear_kv_up_proj.weight", "latent_key_value"),
    (".linear_q_down_proj.weight", "latent_down"),
    (".linear_kv_down_proj.weight", "latent_down"),
    (".linear_qkv_down_proj.weight", "latent_down"),
    # The indexer of sparse attention.
    (".indexer.linear_wq_b.weight", "linear"),
    (".indexer.linear_wk.weight", "linear"),
    (".indexer.linear_weights_proj.weight", "linear"),
    ("attention.linear_proj.weight", "attention_projection"),
    # Mamba, gated delta net.
    (".in_proj.weight", "mixer_input"),
    (".out_proj.weight", "mixer_output"),
    # Feed-forward networks, multimodal projectors.
    (".linear_fc1.weight", "mlp"),
    (".linear_fc2.weight", "mlp"),
    ("mlp.router.weight", "router"),
    ("mlp.gate_weight", "router"),  # of shared experts
    ("mlp.fc1_latent_proj.weight", "linear"),
    ("mlp.fc2_latent_proj.weight", "linear"),
    # One linear layer in place of a whole attention or MLP (heterogeneous layers).
    ("self_attention.weight", "linear"),
    ("mlp.weight", "linear"),
    (".eh_proj.weight", "linear"),  # multi-token prediction
    ("lm_head.dense.weight", "linear"),
    ("pooler.dense.weight", "linear"),
    ("binary_head.weight", "linear"),
    ("embedder.weight", "linear"),  # patches of an image or video
    # Low-rank adapters.
    (".linear_in.weight", "adapter"),
    (".linear_out.weight", "adapter"),
)
#: The same for names that vary.
_MATRIX_PATTERNS = (
    (re.compile(r"\.lora_[AB](\.\w+)?\.weight$"), "adapter"),
    # A multimodal projector that is one linear layer.
    (re.compile(r"projections?(\.\d+)?\.encoder\.weight$"), "linear"),
)
#: End of the name -> role, for parameters with another number of dimensions.
_OTHER_ROLES = (
    ("conv1.weight", 4, "linear"),  # patch embedding: a linear layer on the pixels of a patch
    ("conv1d.weight", 3, "convolution"),
    ("conv1d_weight", 3, "convolution"),
    ("conv1d_bias", 1, "bias"),
    (".A_log", 1, "state_space"),
    (".D", 1, "state_space"),
    (".dt_bias", 1, "state_space"),
    (".softmax_offset", 1, "softmax_offset"),
    (".class_token", 3, "vision_token"),
    (".class_token", 2, "vision_token"),
    (".mask_token", 2, "vision_token"),
    (".position_embeddings", 3, "vision_token"),
)

#: What an expert's name contains and a dense MLP's does not: shared experts, one module for each
#: expert (SequentialMLP), one for all of them (grouped GEMM).
_EXPERT = re.compile(r"\.(?:shared_experts|experts(?:\.local_experts\.\d+)?)\.")
#: A grouped GEMM numbers its experts' weights and biases.
_GROUPED = re.compile(r"(linear_fc[12]\.(?:weight|bias))\d+$")
_NORM_WEIGHT = re.compile(r"(norm\w*\.weight|\.layer_norm_weight|\.ln_(?:pre|post)\.weight)$")


def role_of(name: str, num_dimensions: int) -> str:
    """Return the role of a parameter: a key of the rule table, or ``"unknown"``.

    Args:
        name: name in the whole model. A parameter of an expert has the role of its counterpart in
            a dense MLP.
        num_dimensions: number of dimensions of one layer's tensor.
    """
    if _EXPERT.search(name):
        name = _GROUPED.sub(r"\1", _EXPERT.sub(".", name))
    name = f".{name}"
    if num_dimensions == 2:
        for suffix, role in _MATRIX_ROLES:
            if name.endswith(suffix):
                return role
        for pattern, role in _MATRIX_PATTERNS:
            if pattern.search(name):
                return role
    for suffix, dimensions, role in _OTHER_ROLES:
        if num_dimensions == dimensions and name.endswith(suffix):
            return role
    if num_dimensions == 1:
        if _NORM_WEIGHT.search(name):
            return "norm"
        return "bias" if name.endswith("bias") else "unknown"
    return "unknown"


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to a routed expert.

    Shared experts process every token and are reduced like dense parameters, so they do not count.
    """
    return ".experts." in name
