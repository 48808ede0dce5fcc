"""What is timed of the router: route and router_logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import bridge
from benchmarks import operation, peers, stated, timing
from benchmarks.operation import Build, Entry, Operation, expect, random
from bridge import Routing, RoutingConfig, presets

MODELS = ("deepseek-v3", "deepseek-v2", "kimi-k2", "glm-4.5", "qwen3-next", "kimi-k3")
TOKENS = (1, 8, 64, 512, 4096, 16384, 40960)
TABLE = range(5000, 40001, 5000)  # as in the pull requests of vLLM's and SGLang's fused gates, for DeepSeek-V3
# What takes long to compile is compiled for a few.
COMPILED, COMPILED_AT = ("deepseek-v3", "deepseek-v2", "kimi-k2"), (64, 4096, 40960)
XLA = ("deepseek-v3",)
WIDTH, EXPERTS = 7168, 256


def config_of(name: str) -> RoutingConfig:
    """A preset with its routed experts alone, as the peers have them."""
    return dataclasses.replace(presets[name], n_shared_experts=0)


def bias_of(config: RoutingConfig) -> torch.Tensor | None:
    """A float32 bias where the model has one, of values that FlashInfer's bfloat16 holds too."""
    if config.scoring_func != "sigmoid":
        return None
    return (torch.randn(config.num_experts, device=operation.DEVICE) * 0.1).bfloat16().float()


def routes(quick: bool) -> Iterator[Build]:
    """route, for every model and number of tokens; `quick`: few of them, and nothing that is compiled at first use."""
    for name in MODELS:
        config = config_of(name)
        compiled = None
        if name in COMPILED and not quick:
            compiled = _compiled(config)
        if quick:
            tokens = [1, 64, 4096, 40960] if name == MODELS[0] else [64, 4096]
        else:
            tokens = sorted({*TOKENS, *(TABLE if name == MODELS[0] else ())})
        for number in tokens:
            here = number in COMPILED_AT and not quick
            yield functools.partial(
                _route, name, config, number, compiled if here else None, xla=here and name in XLA, jit=not quick
            )


def loads(quick: bool) -> Iterator[Build]:
    """Routing with the load, as in training; a peer's load by torch."""
    for number in (64, 4096) if quick else TOKENS:
        yield functools.partial(_route_and_load, number)


def _compiled(config: RoutingConfig) -> Callable[..., Any]:
    return torch.compile(lambda logits, bias: stated.route(logits, bias, config), dynamic=True)


def _route(
    name: str, config: RoutingConfig, tokens: int, compiled: Callable[..., Any] | None, *, xla: bool, jit: bool
) -> Iterator[Operation]:
    """In place and without the load, as in inference."""
    experts, k = config.num_experts, config.top_k
    num_sets = timing.input_sets(tokens * experts * 2)
    logits = [random(tokens, experts) for _ in range(num_sets)]
    bias, out = bias_of(config), empty_routing(config, tokens)

    def entry(function: Callable[[torch.Tensor], Any], rtol: float = 1e-5, least: float = 0.999) -> Entry:
        def check(got: tuple[Any, ...]) -> None:
            stated.check_routing(got[0], got[1], logits[0], bias, config, rtol=rtol, least=least)

        return Entry(lambda i: function(logits[i % num_sets]), check)

    others = {"torch eager": entry(lambda x: stated.route(x, bias, config))}
    if compiled is not None:
        others["torch.compile"] = entry(lambda x: compiled(x, bias))
    if xla:
        program = _Xla(config, logits, bias)
        others["XLA (wall clock)"] = entry(lambda _: program.run())._replace(runs=num_sets)
    for peer, function in peers.routing(config, tokens, bias, jit=jit).items():
        # vLLM's sigmoid goes by tanh, FlashInfer's weights are bfloat16.
        others[peer] = entry(function, rtol=1e-2 if peer.startswith("FlashInfer") else 1e-4, least=0.99)
    missing = {}
    if bias is None and config.n_group > 1:
        missing["vLLM"] = "no kernel for groups without a bias: vLLM compiles them with torch.compile"
    ours = entry(lambda x: bridge.route(x, bias, config=config, return_load=False, out=out))
    size = tokens * (experts * 2 + k * 8) + (0 if bias is None else experts * 4)
    yield Operation(f"route {name}", tokens, size, ours._replace(writes=(out.weights, out.experts)), others, missing)


def empty_routing(config: RoutingConfig, tokens: int) -> Routing:
    """Where to route into, without the load."""
    weights = torch.empty(tokens, config.num_slots, device=operation.DEVICE)
    return Routing(weights, torch.empty_like(weights, dtype=torch.int32), None)


def _route_and_load(tokens: int) -> Iterator[Operation]:
    config = config_of("deepseek-v3")
    experts, k = config.num_experts, config.top_k
    num_sets = timing.input_sets(tokens * experts * 2)
    logits = [random(tokens, experts) for _ in range(num_sets)]
    bias, load = bias_of(config), torch.empty(experts, dtype=torch.int32, device=operation.DEVICE)
    out = empty_routing(config, tokens)._replace(load=load)

    def check(got: Routing, rtol: float = 1e-5, least: float = 0.999) -> None:
        stated.check_routing(got.weights, got.experts, logits[0], bias, config, rtol=rtol, least=least)
        expect(torch.equal(load.long(), got.experts.flatten().long().bincount(minlength=experts)), "load")

    run = functools.partial(bridge.route, config=config, out=out)
    ours = Entry(lambda i: run(logits[i % num_sets], bias), check, (out.weights, out.experts, load))
    one = torch.ones(tokens * k, dtype=torch.int32, device=operation.DEVICE)

    def counting(function: Callable[[torch.Tensor], Any]) -> Entry:
        def counted(i: int) -> Routing:
            weights, ids = function(logits[i % num_sets])
            load.zero_().scatter_add_(0, ids.flatten().long(), one)
            return Routing(weights, ids, load)

        return Entry(counted, functools.partial(check, rtol=1e-4, least=0.99), (load,))

    found = peers.routing(config, tokens, bias, jit=False)
    others = {f"{name}, torch scatter_add_": counting(run) for name, run in found.items() if name.startswith("vLLM")}
    size = tokens * (experts * 2 + k * 8) + experts * 8
    yield Operation("route + load deepseek-v3", tokens, size, ours, others)


class _Xla:
    """jaxmoe's XLA implementation on all input sets, one after another in one program, waited for.

    Its kernels are not in a CUDA graph of torch's, so its figure holds what the host takes to launch them.
    """

    def __init__(self, config: RoutingConfig, logits: list[torch.Tensor], bias: torch.Tensor | None) -> None:
        self.config, self.logits, self.bias = config, logits, bias
        self.program: Callable[[], Any] | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The results of the first set."""
        import jax

        if self.program is None:
            self.program = self._compile()
        weights, ids = jax.block_until_ready(self.program())
        return bridge.to_torch(weights)[0], bridge.to_torch(ids)[0]

    def _compile(self) -> Callable[[], Any]:
        import jax

        import jaxmoe

        one = functools.partial(jaxmoe.route, config=self.config, return_load=False, implementation="xla")
        program = jax.jit(lambda logits, bias: jax.lax.map(lambda x: one(x, bias)[:2], logits))
        logits = bridge.to_jax(torch.stack(self.logits))
        bias = None if self.bias is None else bridge.to_jax(self.bias)
        return lambda: program(logits, bias)


def router_logits(quick: bool) -> Iterator[Build]:
    """router_logits of DeepSeek-V3's width, with a weight in the dtype of the tokens and in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 64, 4096) if quick else TOKENS:
            yield functools.partial(_product, tokens, dtype)


def _product(tokens: int, dtype: torch.dtype) -> Iterator[Operation]:
    """x @ weight.T in float32."""
    calls = 48 if tokens <= 512 else 8  # many layers' weights, so that none stays in the cache
    size = tokens * WIDTH * 2 + EXPERTS * WIDTH * dtype.itemsize
    num_sets = timing.input_sets(size, calls=calls)
    x = [random(tokens, WIDTH) for _ in range(num_sets)]
    weight = [torch.randn(EXPERTS, WIDTH, device=operation.DEVICE).mul_(WIDTH**-0.5).to(dtype) for _ in range(num_sets)]
    some = slice(None) if tokens <= 2048 else torch.arange(0, tokens, tokens // 1024, device=operation.DEVICE)

    def entry(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], limit: float = 1e-4) -> Entry:
        def check(got: torch.Tensor) -> None:
            expect(got.shape == (tokens, EXPERTS), f"logits of shape {list(got.shape)}")
            want = x[0][some].double() @ weight[0].double().T
            stated.check_close(got[some], want, limit, "logits")

        return Entry(lambda i: function(x[i % num_sets], weight[i % num_sets]), check)

    others = {"transformers (casts to float32)": entry(lambda a, b: F.linear(a.float(), b.float()))}
    if dtype == torch.bfloat16:
        others["torch.mm(out_dtype=float32)"] = entry(lambda a, b: torch.mm(a, b.T, out_dtype=torch.float32))
        others["torch linear, bfloat16 result"] = entry(F.linear, limit=1e-2)
    name = "router logits" if dtype == torch.bfloat16 else "router logits, float32 weight"
    yield Operation(
        name,
        tokens,
        size + tokens * EXPERTS * 4,
        entry(bridge.router_logits),
        others,
        flops=2 * tokens * EXPERTS * WIDTH,
        calls=calls,
    )
