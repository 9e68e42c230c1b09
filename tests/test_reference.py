"""The oracle itself, against two implementations that it shares nothing with."""

from __future__ import annotations

import adam_mini
import pytest
import torch
from torch import Tensor, nn

from tests.reference import (
    WholeTensorAdamMini,
    element_labels,
    one_label,
    qkv_labels,
    row_labels,
)

# float32 against float64 over 20 steps, of parameters relative to the largest element.
TOLERANCE = 3e-6
# The same of v, relative to each element: a mean of up to 256 squares and 20 roundings after it.
V_TOLERANCE = 2e-6
# 20 steps at a rate of 1e-2 move every parameter by more.
MOVED = 1e-3
# Both sides float64: a few roundings of 1e-16.
CLOSED_FORM_TOLERANCE = 1e-9

DIM, HEADS, KV_HEADS, FFN, VOCAB = 32, 4, 2, 48, 40


class PlainLlamaLayer(nn.Module):
    """Parameters of a Llama with one layer under Hugging Face's names, and some loss of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        head = DIM // HEADS
        self.embed_tokens = nn.Embedding(VOCAB, DIM)
        self.q_proj = nn.Linear(DIM, HEADS * head)
        self.k_proj = nn.Linear(DIM, KV_HEADS * head, bias=False)
        self.v_proj = nn.Linear(DIM, KV_HEADS * head, bias=False)
        self.o_proj = nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.ModuleDict(
            {"gate": nn.Linear(DIM, FFN, bias=False), "down": nn.Linear(FFN, DIM, bias=False)}
        )
        self.norm = nn.RMSNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed_tokens(tokens))
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=-1) for t in (k, v))
        x = x + self.o_proj(torch.sigmoid(q * k) * v)
        x = x + self.mlp["down"](torch.tanh(self.mlp["gate"](x)))
        return nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), tokens.roll(1).flatten())


def labels_of(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("bias"):
        return element_labels(*shape)
    if name in ("q_proj.weight", "k_proj.weight"):
        head = DIM // HEADS
        return (torch.arange(shape[0]) // head)[:, None].expand(shape).contiguous()
    return one_label(*shape) if len(shape) == 1 else row_labels(*shape)


def test_oracle_equals_the_public_adam_mini() -> None:
    model = PlainLlamaLayer()
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    public = adam_mini.Adam_mini(
        model.named_parameters(),
        betas=(0.9, 0.95),
        dim=DIM,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        verbose=False,
        **options,
    )
    oracle = {
        name: WholeTensorAdamMini(param, labels_of(name, tuple(param.shape)))
        for name, param in model.named_parameters()
    }
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(20):
        tokens = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(tokens).backward()
        for name, param in model.named_parameters():
            # The public code decays neither norms nor biases, and calls one parameter "norm" by
            # substring: so does every name with "ln", of which this model has none.
            decay = 0.0 if "norm" in name or "bias" in name else 0.1
            oracle[name].step(
                param.grad, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=decay
            )
        public.step()
    for name, param in model.named_parameters():
        expected = oracle[name].param
        error = float((param.detach().double() - expected).abs().max() / expected.abs().max())
        assert error < TOLERANCE, f"{name}: {error:.1e}"
        assert float((param.detach() - start[name]).abs().max()) > MOVED, f"{name} did not move"
        found, wanted = public_v(public.state[param], param), oracle[name].v_of_elements()
        assert torch.allclose(found, wanted, rtol=V_TOLERANCE, atol=0.0), f"v {name}"
        if name != "norm.weight":  # elsewhere a v in the wrong block would be seen
            assert not torch.allclose(found.flip(0), wanted, rtol=0.1), f"v {name} is alike"


def public_v(state: dict[str, Tensor], param: Tensor) -> Tensor:
    """Return v of every element; blocks of the public package are contiguous in memory."""
    v = (state["vmean"] if "vmean" in state else state["v"]).double().reshape(-1)
    return v.repeat_interleave(param.numel() // len(v)).reshape(param.shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_oracle_with_one_element_per_block_is_adamw(weight_decay: float) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(7, 5))
    oracle = WholeTensorAdamMini(param, element_labels(7, 5))
    adamw = torch.optim.AdamW(
        [param], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
    )
    for _ in range(20):
        param.grad = torch.randn(7, 5)
        oracle.step(param.grad, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay)
        adamw.step()
    assert torch.allclose(param.double(), oracle.param, rtol=TOLERANCE, atol=TOLERANCE)


def test_oracle_with_one_block_follows_the_closed_form() -> None:
    """Constant gradients: m_hat = g and v_hat = mean(g * g) in every step."""
    grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    oracle = WholeTensorAdamMini(torch.zeros(2), one_label(2))
    for _ in range(5):
        oracle.step(grad, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)
    expected = -5 * 0.1 * grad / (12.5**0.5)
    assert torch.allclose(oracle.param, expected, rtol=CLOSED_FORM_TOLERANCE)


def test_qkv_labels_interleave_by_group() -> None:
    rows = qkv_labels(4, 2, 2, 1)[:, 0].tolist()
    assert rows == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 9]
