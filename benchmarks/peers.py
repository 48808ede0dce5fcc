"""The peers' kernels, where their packages are installed: vLLM's and FlashInfer's."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bridge import RoutingConfig

SIGMOID = 1  # vLLM's number for it
Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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


def found() -> dict[str, str]:
    """What became of each peer, for the record: its version, that it is not here, or why it does not load."""
    return {
        name: _found(package, load)
        for name, package, load in (("vllm", "vllm", vllm), ("flashinfer", "flashinfer-python", flashinfer))
    }


def _found(package: str, load: Callable[[], Any]) -> str:
    try:
        if load() is None:
            return "not installed"
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # kernels alone, without the package's data
        return "(see the note)"
    except Exception as error:  # whatever its import may raise: the others are timed all the same
        return f"does not load: {type(error).__name__}: {error}"


def routing(config: RoutingConfig, tokens: int, bias: torch.Tensor | None, *, jit: bool) -> dict[str, Route]:
    """The peers' kernels that serve this routing; whether FlashInfer's, which is built at first use, says `jit`."""
    routes: dict[str, Route] = {}
    k, scale, groups = config.top_k, config.routed_scaling_factor, (config.n_group, config.topk_group)
    sigmoid = config.scoring_func == "sigmoid"
    if ops := loaded(vllm):
        if sigmoid and bias is not None:
            routes["vLLM grouped_topk"] = lambda logits: ops.grouped_topk(
                logits, *groups, k, config.renormalize, scale, bias, SIGMOID
            )
        if config.n_group == 1 and (sigmoid or scale == 1):
            routes["vLLM topk_sigmoid" if sigmoid else "vLLM topk_softmax"] = _vllm_topk(ops, config, tokens, bias)
    if jit and sigmoid and config.renormalize and bias is not None and (fused := loaded(flashinfer)):
        bias16 = bias.bfloat16()
        weights = torch.full((tokens, k), float("nan"), device=bias.device, dtype=torch.bfloat16)
        ids = torch.full((tokens, k), -7, device=bias.device, dtype=torch.int32)

        def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            fused(logits, bias16, *groups, k, scale, weights, ids)
            return weights, ids

        routes["FlashInfer fused_topk_deepseek"] = run
    return routes


def loaded(load: Callable[[], Any]) -> Any | None:
    """What `load` gives; None where it fails, which `found` has recorded."""
    try:
        return load()
    except Exception:
        return None


def _vllm_topk(ops: Any, config: RoutingConfig, tokens: int, bias: torch.Tensor | None) -> Route:
    """vLLM's top-k without groups, into tensors that are there."""

    def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = logits.new_empty(tokens, config.top_k, dtype=torch.float32)
        ids, scratch = (logits.new_empty(tokens, config.top_k, dtype=torch.int32) for _ in range(2))
        if config.scoring_func == "sigmoid":
            scale = config.routed_scaling_factor
            ops.topk_sigmoid(weights, ids, scratch, logits, config.renormalize, bias, scale, None)
        else:
            ops.topk_softmax(weights, ids, scratch, logits, config.renormalize, bias, None)
        return weights, ids

    return run


class Permute:
    """vLLM's moe_permute and moe_unpermute, with buffers made once (scratch memory they allocate themselves)."""

    def __init__(
        self,
        out: torch.Tensor,
        top_k: int,
        num_experts: int,
        expert_map: torch.Tensor | None = None,
        num_local: int | None = None,
    ) -> None:
        """`out`: [T * top_k, H], what the tokens are permuted into; with a map `num_local` of the experts are here."""
        make = functools.partial(torch.empty, device=out.device)
        self.ops, self.out, self.top_k, self.num_experts = vllm(), out, top_k, num_experts
        self.expert_map, self.num_local = expert_map, num_experts if num_local is None else num_local
        self.indices = torch.arange(len(out), dtype=torch.int32, device=out.device).reshape(-1, top_k)
        self.offsets = make(self.num_local + 1, dtype=torch.int64)
        self.inverse = make((len(out) // top_k, top_k), dtype=torch.int32)
        self.permuted = make(len(out), dtype=torch.int32)

    def __call__(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The rows in the order of their experts."""
        assert self.ops is not None
        numbers, results = (self.num_experts, self.num_local), (self.out, self.offsets, self.inverse, self.permuted)
        self.ops.moe_permute(x, experts, self.indices, self.expert_map, *numbers, self.top_k, *results)
        return self.out

    def set_maps(self, rows: torch.Tensor, group_sizes: torch.Tensor) -> None:
        """The maps that permuting leaves for `unpermute`, from a plan: `rows` [T, top_k], `group_sizes` [E]."""
        self.inverse.copy_(rows)
        self.offsets.zero_()
        torch.cumsum(group_sizes, 0, out=self.offsets[1:])

    def unpermute(self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The weighted sums of the rows, in the order of the tokens that were permuted last."""
        assert self.ops is not None
        self.ops.moe_unpermute(rows, weights, self.inverse, self.offsets, self.top_k, out)
        return out


class Align:
    """vLLM's moe_align_block_size into buffers made once."""

    def __init__(self, experts: torch.Tensor, block: int, num_experts: int) -> None:
        pairs = experts.numel()
        length = pairs + num_experts * (block - 1)
        if pairs < num_experts:
            length = min(length, pairs * block)
        make = functools.partial(experts.new_empty, dtype=torch.int32)
        self.ops, self.experts, self.block, self.num_experts = vllm(), experts, block, num_experts
        self.results = make(length), make(-(-length // block)), make(1)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """(sorted_token_ids, expert_ids, num_tokens_post_padded)."""
        assert self.ops is not None
        self.ops.moe_align_block_size(self.experts, self.num_experts, self.block, *self.results, None)
        return self.results


def routing_calls(logits: torch.Tensor, bias: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The peers' routing of DeepSeek-V3, called as their users call it."""
    calls: dict[str, Callable[[], Any]] = {}
    if ops := loaded(vllm):
        calls["vLLM grouped_topk"] = lambda: ops.grouped_topk(logits, 8, 4, 8, True, 2.5, bias, SIGMOID)
    if fused := loaded(flashinfer):
        weights = torch.empty(len(logits), 8, device=logits.device)
        experts = torch.empty(len(logits), 8, device=logits.device, dtype=torch.int32)
        calls["FlashInfer fused_topk_deepseek"] = lambda: fused(logits, bias, 8, 4, 8, 2.5, weights, experts)
    return calls
