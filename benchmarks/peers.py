"""The peers' kernels, where their packages are installed: vLLM's and FlashInfer's."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIGMOID = 1  # vLLM's number for it


@functools.cache
def vllm() -> Any | None:
    """torch.ops._moe_C with vLLM's kernels loaded, or None where vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in sorted(Path(folder).glob("_moe_C*.so")):
            torch.ops.load_library(str(library))
            return torch.ops._moe_C
    return None


@functools.cache
def flashinfer() -> Callable[..., None] | None:
    """FlashInfer's fused_topk_deepseek, or None where FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer.fused_moe.fused_routing_dsv3 import fused_topk_deepseek

    return fused_topk_deepseek


def versions() -> dict[str, str]:
    """The versions of the peers that are here, for the record; kernels without package data have none."""
    found: dict[str, str] = {}
    for name, package, present in (
        ("vllm", "vllm", vllm() is not None),
        ("flashinfer", "flashinfer-python", flashinfer() is not None),
    ):
        try:
            found |= {name: importlib.metadata.version(package)} if present else {}
        except importlib.metadata.PackageNotFoundError:
            found[name] = "(see the note)"
    return found


class Permute:
    """vLLM's moe_permute into buffers made once (its scratch memory it allocates itself)."""

    def __init__(self, x: torch.Tensor, experts: torch.Tensor, num_experts: int) -> None:
        self.x, self.experts, self.num_experts = x, experts, num_experts
        tokens, top_k = experts.shape
        make = functools.partial(torch.empty, device=x.device)
        self.indices = torch.arange(tokens * top_k, dtype=torch.int32, device=x.device).reshape(tokens, top_k)
        self.out = make(tokens * top_k, x.shape[1], dtype=x.dtype)
        self.offsets = make(num_experts + 1, dtype=torch.int64)
        self.inverse = make((tokens, top_k), dtype=torch.int32)
        self.permuted = make(tokens * top_k, dtype=torch.int32)

    def __call__(self) -> None:
        ops = vllm()
        assert ops is not None
        ops.moe_permute(
            self.x,
            self.experts,
            self.indices,
            None,
            self.num_experts,
            self.num_experts,
            self.experts.shape[1],
            self.out,
            self.offsets,
            self.inverse,
            self.permuted,
        )

    def unpermute(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        ops = vllm()
        assert ops is not None
        ops.moe_unpermute(self.out, weights, self.inverse, self.offsets, self.experts.shape[1], out)


def routing_calls(logits: torch.Tensor, bias: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The peers' routing of DeepSeek-V3, called as their users call it."""
    calls: dict[str, Callable[[], Any]] = {}
    if ops := vllm():
        calls["vLLM grouped_topk"] = lambda: ops.grouped_topk(logits, 8, 4, 8, True, 2.5, bias, SIGMOID)
    if fused := flashinfer():
        weights = torch.empty(len(logits), 8, device=logits.device)
        experts = torch.empty(len(logits), 8, device=logits.device, dtype=torch.int32)
        calls["FlashInfer fused_topk_deepseek"] = lambda: fused(logits, bias, 8, 4, 8, 2.5, weights, experts)
    return calls
