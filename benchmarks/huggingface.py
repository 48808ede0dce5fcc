"""Prefill and decode of a few decoder layers at DeepSeek-V3's width, in transformers, before and after `patch`.

    python -m benchmarks.huggingface [--experts 256] [--output results.json]

Two decoder layers, attention included, with random weights; and the MoE block of the first of them alone. Unpatched,
the experts run transformers' grouped_mm, the fastest of what it has at these sizes ("batched_mm" copies the weights of
every choice, "eager" goes from expert to expert and waits for each). Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import inspect
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import operation, timing
from benchmarks.operation import expect
from benchmarks.stated import relative_error
from bridge import huggingface

# Of the norm of the difference: the block's output is what jaxmoe computes. In the whole model the later layer reads
# the rounding of the first, and a few tokens choose another expert for it.
BLOCK_LIMIT, MODEL_LIMIT = 0.02, 0.15


@dataclass(frozen=True)
class Sizes:
    """Of the model and of what it is given; the rest is as in DeepSeek-V3."""

    experts: int = 256
    layers: int = 2
    hidden: int = 7168
    inner: int = 2048
    heads: int = 128
    prefill: int = 4096  # tokens of one sequence
    batch: int = 64  # sequences that decode a token each
    past: int = 128  # tokens of each that are in the cache
    dtype: torch.dtype = torch.bfloat16


def num_experts() -> int:
    """As many as in DeepSeek-V3, or half where the card has less than 100 GB."""
    return 256 if torch.cuda.get_device_properties().total_memory > 100e9 else 128


def build(sizes: Sizes) -> Any:
    """The decoder layers, every one with experts."""
    from transformers import AutoModel, DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.inner,
        n_routed_experts=sizes.experts,
        num_hidden_layers=sizes.layers,
        first_k_dense_replace=0,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=128,
        max_position_embeddings=max(sizes.prefill, sizes.past + 1),
    )
    with torch.device(operation.DEVICE):
        options: dict[str, Any] = {"experts_implementation": "grouped_mm", "attn_implementation": "sdpa"}
        model = AutoModel.from_config(config, dtype=sizes.dtype, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02)
    for layer in model.layers:  # float32 in a loaded model, whatever the dtype of its parameters
        bias = torch.randn(sizes.experts, device=operation.DEVICE) * 0.02
        layer.mlp.gate.register_buffer("e_score_correction_bias", bias)
    return model


class Work:
    """What a model is given, and the calls that are compared and timed."""

    def __init__(self, model: Any, sizes: Sizes) -> None:
        from transformers import StaticCache

        make = lambda *shape: torch.randn(shape, device=operation.DEVICE, dtype=sizes.dtype)
        self.model, self.block, self.past = model, model.layers[0].mlp, sizes.past
        self.prompt = make(1, sizes.prefill, sizes.hidden)
        self.tokens = make(sizes.batch, 1, sizes.hidden)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=sizes.past + 1)
        # transformers 5.24 calls it `cache` and warns of the older name.
        named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.cached = {named: self.cache, "use_cache": True}
        model(inputs_embeds=make(sizes.batch, sizes.past, sizes.hidden), **self.cached)

    def prefill(self) -> torch.Tensor:
        """One sequence, no cache."""
        return self.model(inputs_embeds=self.prompt, use_cache=False).last_hidden_state

    def decode(self) -> torch.Tensor:
        """One token of each sequence, behind what is in the cache."""
        for layer in self.cache.layers:  # always the same place
            layer.cumulative_length.fill_(self.past)
        return self.model(inputs_embeds=self.tokens, **self.cached).last_hidden_state

    def prefill_block(self) -> torch.Tensor:
        """The MoE block alone on the same number of tokens."""
        return self.block(self.prompt)

    def decode_block(self) -> torch.Tensor:
        """The MoE block alone."""
        return self.block(self.tokens)

    @property
    def calls(self) -> dict[str, Callable[[], torch.Tensor]]:
        """All of them, by name."""
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "prefill, MoE block": self.prefill_block,
            "decode, MoE block": self.decode_block,
        }


def _text(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}


def _ignoring(call: Callable[[], torch.Tensor], _: int) -> torch.Tensor:
    return call()


def _times(calls: dict[str, Callable[[], torch.Tensor]]) -> dict[str, Any]:
    """Microseconds of each call as made from Python, and in a CUDA graph; or why not."""
    found: dict[str, Any] = {}
    for name, call in calls.items():
        found[f"{name}, eager"] = asdict(timing.time_eager(call))
        if name == "prefill":  # the GPU is what takes the time
            continue
        try:
            found[f"{name}, graph"] = asdict(timing.time_graph(functools.partial(_ignoring, call), calls=2))
        except Exception as error:  # what cannot be captured
            found[f"{name}, graph"] = _text(error)
    return found


def _compared(calls: dict[str, Callable[[], torch.Tensor]], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative error of each output; raises AssertionError where one is too large."""
    errors = {name: relative_error(call(), wanted[name]) for name, call in calls.items()}
    for name, error in errors.items():
        limit = BLOCK_LIMIT if "block" in name else MODEL_LIMIT
        expect(error < limit, f"{name}, relative error {error:.1e} against the unpatched model")
    return errors


@torch.no_grad()
def measure(sizes: Sizes | None = None) -> dict[str, Any]:
    """Errors and microseconds of each state of the model; text in place of what could not be measured."""
    import transformers

    sizes = sizes or Sizes(experts=num_experts())
    torch.manual_seed(0)
    model = build(sizes)
    work = Work(model, sizes)
    wanted = {name: call() for name, call in work.calls.items()}
    states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "transformers grouped_mm": contextlib.nullcontext,
        "patched": lambda: huggingface.patch(model),
        "patched, shared expert fused": lambda: huggingface.patch(model, fuse_shared_experts=True),
    }
    found: dict[str, Any] = {"sizes": asdict(sizes) | {"dtype": str(sizes.dtype)}, "version": transformers.__version__}
    for name, state in states.items():
        try:
            with state():
                found[name] = {"relative error": _compared(work.calls, wanted)} | _times(work.calls)
        except Exception as error:  # recorded: the other states are measured all the same
            found[name] = _text(error)
        gc.collect()
    return found


def main() -> None:
    """Prints the figures; with --output writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=None, help="in a layer (default: 256, or 128 on a smaller card)")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    results |= measure(Sizes(experts=arguments.experts or num_experts()))
    print(json.dumps(results, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
