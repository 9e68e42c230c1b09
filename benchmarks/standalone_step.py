"""Time of a step of the stand-alone optimizer on a CPU, and of AdamW and the public package.

All update float32 parameters of a Llama with the names of transformers, by gradients that stay the
same; each contender has its own. Interleaved within one process.

Run from the project's root: ``python -m benchmarks.standalone_step [--threads N] [--rounds N]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn

from benchmarks.report import heading, write
from benchmarks.timing import interleave, table
from megatron_adam_mini import AdamMini

HIDDEN, LAYERS, FFN, VOCAB, HEADS, GROUPS = 256, 8, 688, 8192, 8, 4
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters of a Llama, with gradients."""
    key = HIDDEN * GROUPS // HEADS
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (key, HIDDEN),
        "self_attn.v_proj.weight": (key, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number in range(LAYERS):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    generator = torch.Generator().manual_seed(1)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    found = [(name, nn.Parameter(normal(shape))) for name, shape in shapes.items()]
    for _, param in found:
        param.grad = normal(tuple(param.shape))
    return found


def public_adam_mini() -> torch.optim.Optimizer:
    """Return the optimizer of the public package."""
    from adam_mini import Adam_mini

    return Adam_mini(
        parameters(), **HYPER, dim=HIDDEN, n_heads=HEADS, n_kv_heads=GROUPS, verbose=False
    )


def contenders() -> dict[str, Callable[[], object]]:
    """Return a step of each optimizer, by its name."""
    heads = {"num_heads": HEADS, "num_query_groups": GROUPS}
    made = {
        "AdamMini": AdamMini(parameters(), **HYPER, **heads),
        "AdamMini, preset row": AdamMini(parameters(), **HYPER, preset="row"),
        "AdamMini, preset slim": AdamMini(parameters(), **HYPER, preset="slim"),
        "torch AdamW(fused=True)": torch.optim.AdamW(parameters(), **HYPER, fused=True),
        "torch AdamW(foreach=True)": torch.optim.AdamW(parameters(), **HYPER, foreach=True),
        "torch AdamW, its default": torch.optim.AdamW(parameters(), **HYPER),
        f"the public adam-mini {version('adam-mini')}": public_adam_mini(),
    }
    return {name: optimizer.step for name, optimizer in made.items()}


def main() -> None:
    """Time all, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    numel = sum(param.numel() for _, param in parameters())
    text = heading("A step of the stand-alone optimizer", "benchmarks.standalone_step")
    text += f"\n{numel / 1e6:.1f}M float32 parameters of a Llama; the median of {options.rounds}.\n"
    for threads in options.threads:
        torch.set_num_threads(threads)
        timings = interleave(contenders(), rounds=options.rounds)
        part = f"\n## Threads: {threads}\n\n{table(timings, 'torch AdamW(fused=True)')}\n"
        print(part, flush=True)
        text += part
    print(write("standalone-step", text))


if __name__ == "__main__":
    main()
