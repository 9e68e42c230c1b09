"""Small networks and their data, for ``megatron-adam-mini heterogeneity evidence.networks:NAME``.

Imports torch. Each function returns a module at its initialisation, ``loss(module, batch)`` and one
batch, all from fixed seeds. Four read the same synthetic pictures, so that only the network
differs: each of ten classes is a smooth random pattern, to which noise is added. One reads text,
the source of the Python standard library, byte by byte.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Target = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Iterable[Any]]

CLASSES = 10
SIDE = 16
PATCH = 4
HIDDEN = 32
HEADS = 4
LAYERS = 4
SEQUENCE = 32
VOCABULARY = 256
#: Standard deviation of a Transformer's initial weights, as in GPT-2 and ViT.
STD = 0.02


def pictures(number: int = 64, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return pictures, shape ``(number, 3, 16, 16)``, of mean 0 and variance 1, and classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    patterns = functional.interpolate(coarse, size=SIDE, mode="bicubic", align_corners=False)
    classes = torch.randint(CLASSES, (number,), generator=generator)
    noise = torch.randn(number, 3, SIDE, SIDE, generator=generator)
    mixed = patterns[classes] + 0.5 * noise
    return (mixed - mixed.mean()) / mixed.std(), classes


def text(number: int = 16, *, seed: int = 0) -> Tensor:
    """Return windows of the standard library's source, int64, ``(number, SEQUENCE + 1)``."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "calendar", "copy", "datetime", "random", "textwrap", "typing")
    joined = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(joined) - SEQUENCE - 1, (number, 1), generator=generator)
    tokens = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    return tokens[starts + torch.arange(SEQUENCE + 1)].long()


def classify(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of pictures."""
    inputs, classes = batch
    return functional.cross_entropy(module(inputs), classes)


def predict(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of the next token."""
    return functional.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


# Convolutions.


class Residual(nn.Module):
    """Two convolutions with batch norm, as in ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways."""
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(inner + self.shortcut(x))


def resnet(*, seed: int = 0) -> Target:
    """Return a small ResNet: a stem, four blocks of two convolutions, a linear layer."""
    torch.manual_seed(seed)
    module = nn.Sequential()
    module.add_module("stem", nn.Conv2d(3, 16, 3, padding=1, bias=False))
    module.add_module("norm", nn.BatchNorm2d(16))
    module.add_module("relu", nn.ReLU())
    for number, (inside, outside, stride) in enumerate(
        ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
    ):
        module.add_module(f"block{number}", Residual(inside, outside, stride))
    module.add_module("pool", nn.AdaptiveAvgPool2d(1))
    module.add_module("flatten", nn.Flatten())
    module.add_module("fc", nn.Linear(64, CLASSES))
    for param in module.parameters():
        if param.ndim == 4:
            nn.init.kaiming_normal_(param, mode="fan_out", nonlinearity="relu")
    return module, classify, [pictures(seed=seed)]


def vgg(*, seed: int = 0) -> Target:
    """Return a small VGG: six convolutions with ReLU and pooling, two linear layers."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, outside in ((3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()]
        if inside == outside:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
    module = nn.Sequential(*layers)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    return module, classify, [pictures(seed=seed)]


# Patches.


class Patches(nn.Module):
    """Cut pictures into patches and embed each; shape ``(samples, patches, hidden)``."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, HIDDEN, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """Return embedded patches."""
        return self.proj(x).flatten(2).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return self.fc2(functional.gelu(self.fc1(x)))


class MixerLayer(nn.Module):
    """An MLP across patches, then one across features."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.mlp_tokens = MLP(patches, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.mlp_channels = MLP(HIDDEN, 4 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.layers = nn.Sequential(*(MixerLayer((SIDE // PATCH) ** 2) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.norm(self.layers(self.patches(x))).mean(1))


def mixer(*, seed: int = 0) -> Target:
    """Return a small MLP-mixer."""
    torch.manual_seed(seed)
    return Mixer(), classify, [pictures(seed=seed)]


# Transformers.


class Attention(nn.Module):
    """Attention with Query, Key and Value as weights of their own."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what attention adds."""
        query, key, value = (
            weight(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for weight in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A Transformer's layer, with norms before attention and MLP."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attn = Attention(causal=causal)
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = MLP(HIDDEN, 4 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class ViT(nn.Module):
    """A vision Transformer that averages over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.positions = nn.Parameter(torch.zeros((SIDE // PATCH) ** 2, HIDDEN))
        self.layers = nn.Sequential(*(Layer(causal=False) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.norm(self.layers(self.patches(x) + self.positions)).mean(1))


class GPT(nn.Module):
    """A decoder of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, HIDDEN)
        self.wpe = nn.Embedding(SEQUENCE, HIDDEN)
        self.layers = nn.Sequential(*(Layer(causal=True) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits for each next token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.lm_head(self.norm(self.layers(self.wte(tokens) + self.wpe(places))))


def _transformer(module: nn.Module) -> nn.Module:
    """Initialise as GPT-2 does: small normal weights, smaller ones before the residual sums."""
    for name, param in module.named_parameters():
        if param.ndim > 1:
            last = "o_proj" in name or "mlp.fc2" in name
            nn.init.normal_(param, std=STD / (2 * LAYERS) ** 0.5 if last else STD)
        elif name.endswith("bias"):
            nn.init.zeros_(param)
    return module


def vit(*, seed: int = 0) -> Target:
    """Return a small vision Transformer."""
    torch.manual_seed(seed)
    return _transformer(ViT()), classify, [pictures(seed=seed)]


def gpt(*, seed: int = 0) -> Target:
    """Return a small GPT-2 of bytes."""
    torch.manual_seed(seed)
    return _transformer(GPT()), predict, [text(seed=seed)]
