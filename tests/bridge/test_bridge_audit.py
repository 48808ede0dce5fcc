"""`python -m jaxmoe audit` on fake tensors: the limits hold, and every way to break one is noticed."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
import jaxmoe
from bridge import audit, counting
from bridge.native.driver import observers
from bridge.ops import layer as ops
from jaxmoe.__main__ import main
from jaxmoe.command.audit import layer, lowered
from tests.bridge.calls import arguments, tensors
from tests.cases import normal

LAYER = audit.Layer(tokens=9, hidden=64, inner=24, experts=16, dtype="bfloat16")
SIZES = ["--tokens", "9", "--hidden", "64", "--inner", "24", "--experts", "16"]
KERNELS = {
    "router_logits": {"router_logits": 1},
    "route": {"route": 1},
    "plan_dispatch": {"plan_dispatch": 1},
    "dispatch": {"dispatch": 1},
    "experts": {"gated_matmul": 1, "grouped_matmul": 1},
    "combine": {"combine": 1},
}


def own(layer: audit.Layer = LAYER) -> counting.Counts:
    return counting.count(functools.partial(audit._own, layer), "meta")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our columns keep the limits, to the launch; transformers' own, beside them, casts and copies."""
    pytest.importorskip("transformers")
    path = tmp_path / "counts.json"
    assert main(["audit", *SIZES, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    columns = report["columns"]
    assert list(columns) == ["transformers", "patched", "patched, fused", "jaxmoe", "jaxmoe in JAX"]
    assert report["broken"] == []
    assert report["layer"] == {"tokens": 9, "hidden": 64, "inner": 24, "experts": 16, "dtype": "bfloat16"}
    theirs = columns.pop("transformers")
    assert not theirs["launches"]
    assert sum(theirs["casts"].values()) >= 3, "tokens, router weight, and the sum over experts back"
    assert theirs["operations"]["aten::topk"] == 3
    assert sum(theirs["operations"].values()) > 30
    gathered = {name: kernels for name, kernels in KERNELS.items() if name != "dispatch"}
    for name, column in columns.items():
        assert column["launches"] == (gathered if name.startswith("patched") else KERNELS)
        assert not column["casts"]
        assert not column["copies"]
    shared = {"aten::mm": 3, "aten::silu": 1, "aten::mul": 1, "aten::add": 1}
    assert columns["patched"]["operations"] == shared, "the shared expert, which stays torch's"
    assert not any(columns[name]["operations"] for name in ("patched, fused", "jaxmoe", "jaxmoe in JAX"))
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "plan_dispatch" in line)
    assert row.split()[-5:] == ["-", "1", "1", "1", "1"]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "fake tensors"
    assert any(where in line for line in lines)


def test_it_is_transformers_layer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(n_routed_experts=LAYER.experts)
    assert bridge.RoutingConfig.from_hf(config) == LAYER.config
    with torch.no_grad():
        y = audit._block(LAYER, "cpu")()
    assert y.shape == (1, 9, 64)
    assert y.dtype == torch.bfloat16
    assert y.any()
    assert torch.get_default_dtype() == torch.float32


def test_it_is_our_layer() -> None:
    """What is counted computes what `moe` computes."""
    config, ids = LAYER.config, 17
    x, router, bias = normal(0, 9, 64), normal(1, 16, 64), normal(2, 16)
    gate_up, down = normal(3, ids, 48, 64), normal(4, ids, 64, 24)
    y = layer(config)(x, router, bias, gate_up, down)
    params = jaxmoe.MoEParams(router=router, bias=bias, gate_up=gate_up.mT, down=down.mT)
    np.testing.assert_allclose(y, jaxmoe.moe(x, params, config)[0], rtol=1e-5, atol=1e-3)
    assert float(jnp.abs(y).min(axis=1).max()) > 0
    with torch.no_grad():
        own = audit._own(LAYER, "cpu")()
    assert own.shape == (9, 64)
    assert own.any()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert audit.main(SIZES) == 0
    out = capsys.readouterr().out
    assert "patched: not counted, transformers is not installed" in out
    assert next(line for line in out.splitlines() if "of combine" in line).split()[-2:] == ["1", "1"]


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "float16"), (64, "bfloat16"), (5000, "float32")])
def test_no_size_breaks_a_limit(tokens: int, dtype: str) -> None:
    """At full width. Each function allocates its results, and nothing else does."""
    counts = own(audit.Layer(tokens, 7168, 2048, 256, dtype))
    more = {
        64: {"router_logits": {"router_logits": 1, "router_logits_sum": 1}},
        5000: {"plan_dispatch": {"plan_count": 1, "plan_place": 1}},
    }
    assert counts.launches == KERNELS | more.get(tokens, {})
    assert audit.broken(audit.OWN, counts) == []
    pairs, item = tokens * 9, audit.DTYPES[dtype].itemsize
    integers_and_weights = 4 * (tokens * 256 + 2 * pairs + (2 * pairs + 257))  # router_logits, route, plan_dispatch
    rows = 7168 * item * (pairs + pairs + tokens)  # dispatch, experts, combine
    assert (counts.allocations, counts.allocated_bytes) == (1 + 2 + 3 + 1 + 1 + 1, integers_and_weights + rows)


def with_cast(function: Any, x: Any, *args: Any, **options: Any) -> Any:
    return function(x.float().to(x.dtype), *args, **options)


def with_copy(function: Any, x: Any, *args: Any, **options: Any) -> Any:
    return function(x.clone(), *args, **options)


def twice(function: Any, *args: Any, **options: Any) -> Any:
    function(*args, **options)
    return function(*args, **options)


def never(function: Any, x: Any, plan: Any, *args: Any, **options: Any) -> Any:
    return x.new_empty(x.shape[0] if args else plan.slots.shape[0], x.shape[1])


def with_sum(function: Any, x: Any, *args: Any, **options: Any) -> Any:
    return function(x + 1, *args, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_cast, "casts: expected none, got aten::_to_copy bfloat16 to float32, aten::_to_copy float32 to bfloat16"),
        (with_copy, "copies: expected none, got aten::clone bfloat16"),
        (twice, "launches of dispatch: expected 1, got 2"),
        (never, "launches of dispatch: expected 1, got 0"),
        (with_sum, "other operations: expected none, got aten::add"),
    ],
)
def test_waste_is_noticed(change: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors, in the layer of its own and in a patched block, where experts and combine are one op."""
    monkeypatch.setattr(bridge, "dispatch", functools.partial(change, bridge.dispatch))
    assert f"{audit.OWN}: {said}" in audit.broken(audit.OWN, own())
    pytest.importorskip("transformers")
    make = functools.partial(audit._block, LAYER, patched=True, fused=True)
    assert audit.broken(audit.FUSED, counting.count(make, "meta")) == [], "it does not dispatch"
    monkeypatch.setattr(ops, "weighted", functools.partial(change, ops.weighted))
    said = said.replace("of dispatch", "of combine")
    assert f"{audit.FUSED}: {said}" in audit.broken(audit.FUSED, counting.count(make, "meta"))


def test_a_patched_model_does_not_dispatch() -> None:
    pytest.importorskip("transformers")
    counts = counting.count(functools.partial(audit._block, LAYER, patched=True, fused=True), "meta")
    counts.launches["dispatch"] = Counter(dispatch=1)
    assert audit.broken(audit.FUSED, counts) == [f"{audit.FUSED}: launches of dispatch: expected 0, got 1"]


def test_the_load_would_be_a_second_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    route = bridge.route
    monkeypatch.setattr(bridge, "route", lambda *args, return_load, **options: route(*args, **options))
    assert audit.broken(audit.OWN, own()) == ["jaxmoe: launches of route: expected 1, got 2"]


def test_a_cast_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # one column less to count
    monkeypatch.setattr(bridge, "dispatch", functools.partial(with_cast, bridge.dispatch))
    assert main(["audit", *SIZES]) == 1
    said = capsys.readouterr()
    assert "BROKEN: jaxmoe: casts: expected none" in said.err
    assert next(line for line in said.out.splitlines() if "casts (none)" in line).split()[-2:] == ["2", "0"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.astype(jnp.float32).astype(x.dtype), "casts: expected none, got 2 stablehlo.convert"),
        (lambda x: jnp.concatenate([x[:4], x[4:]]), "copies: expected none, got 2 stablehlo.slice, stablehlo.conc"),
        (jnp.sin, "other operations: expected none, got stablehlo.sine"),
    ],
)
def test_waste_is_noticed_in_jax(change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = jaxmoe.dispatch
    monkeypatch.setattr(jaxmoe, "dispatch", lambda x, plan: dispatch(change(x), plan))
    launches = {name: Counter(kernels) for name, kernels in KERNELS.items()}
    found = audit.broken(audit.JAX, audit._count_jax(LAYER, launches))
    assert [what for what in found if what.startswith(f"{audit.JAX}: {said}")]
    assert not [what for what in found if "launches" in what]


def test_what_the_gpu_ran_is_compared() -> None:
    """Made up, as torch.profiler would have counted it."""
    counts = own()
    counts.kernels, counts.transfers = Counter(counts.ours), Counter()
    assert audit.broken(audit.OWN, counts) == []
    counts.kernels["elementwise"] = 1
    assert audit.broken(audit.OWN, counts) == ["jaxmoe: other kernels: expected none, got elementwise"]
    patched = copy.deepcopy(counts)
    del patched.launches["dispatch"]
    assert audit.broken(audit.PATCHED, patched) == [], "there torch runs the shared expert"
    del counts.kernels["elementwise"], counts.kernels["combine"], patched.kernels["combine"]
    for column, counted in ((audit.OWN, counts), (audit.PATCHED, patched)):
        assert audit.broken(column, counted) == [
            f"{column}: kernels that the GPU did not run: expected none, got combine"
        ]
    counts.kernels["combine"] = 1
    counts.transfers = Counter({"Memset (Device)": 1})
    assert audit.broken(audit.OWN, counts) == ["jaxmoe: other operations: expected none, got Memset (Device)"]
    patched.kernels["combine"] = 1
    patched.transfers = Counter({"Memcpy DtoD (Device -> Device)": 1})
    assert audit.broken(audit.PATCHED, patched) == [
        "patched: copies: expected none, got Memcpy DtoD (Device -> Device)"
    ]


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("run", "operations", "casts", "copies", "allocations"),
    [
        (lambda: X.view(3, 2).mT[0].reshape(-1, 1).detach(), 0, 0, 0, 0),
        (lambda: X.mT.reshape(6), 1, 0, 1, 1),  # cannot be a view
        (lambda: X.mT.contiguous(), 1, 0, 1, 1),
        (lambda: X.contiguous(), 0, 0, 0, 0),
        (lambda: X.to(torch.float32), 0, 0, 0, 0),
        (lambda: X.bfloat16(), 1, 1, 0, 1),
        (lambda: torch.empty(2, 3, dtype=torch.int32).copy_(X), 1, 1, 0, 1),
        (lambda: torch.empty_like(X).copy_(X), 1, 0, 1, 1),
        (lambda: X.new_empty(5), 0, 0, 0, 1),
        (lambda: X.new_empty(0), 0, 0, 0, 0),
        (lambda: torch.zeros(5), 1, 0, 0, 1),
        (lambda: X[torch.tensor([1, 0])], 1, 0, 0, 1),  # a gather: it computes
        (lambda: torch.add(X, X, out=torch.empty(2, 3)), 1, 0, 0, 1),
        (lambda: X.add_(0).mul_(1), 2, 0, 0, 0),
        (lambda: X.sum().item(), 2, 0, 1, 1),
        (lambda: X.sort(), 1, 0, 0, 2),
        (lambda: X.chunk(2), 0, 0, 0, 0),
        (lambda: torch.split_copy(X, 1), 1, 0, 0, 2),
        (lambda: X @ X.mT, 1, 0, 0, 1),
    ],
)
def test_recorder(run: Callable[[], Any], operations: int, casts: int, copies: int, allocations: int) -> None:
    with torch.no_grad(), counting.Recorder() as recorder:
        run()
    counts = recorder.counts
    found = (counts.operations.total(), counts.casts.total(), counts.copies.total(), len(recorder.sizes))
    assert found == (operations, casts, copies, allocations)


def test_a_plan_that_is_cut_is_counted() -> None:
    def make(device: str) -> Callable[[], Any]:
        ids = torch.zeros(5, 2, dtype=torch.int32, device=device)
        return lambda: bridge.plan_dispatch(ids, 3, max_rows=4)

    assert counting.count(make, "meta").launches == {"plan_dispatch": {"plan_dispatch": 1}}


def test_what_lies_behind_routing_is_counted() -> None:
    """Under expert parallelism too, as of kernels that leave rows behind the last group alone."""

    def make(device: str) -> Callable[[], Any]:
        given = tensors(arguments("fused_experts"), torch.device(device))
        return lambda: bridge.fused_experts(**given, max_rows=9)

    def in_place(device: str) -> Callable[[], Any]:
        given = tensors(arguments("fused_experts"), torch.device(device))
        out = torch.empty_like(given["x"])
        return lambda: bridge.fused_experts(**given, max_rows=9, activation="gelu", out=out)

    for called in (make, in_place):
        counts = counting.count(called, "meta")
        assert counts.launches == {name: KERNELS[name] for name in ("plan_dispatch", "experts", "combine")}
        assert not counts.operations


def test_recorder_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="experts"), counting.Recorder():
        torch.ops.jaxmoe.plan_dispatch(torch.zeros(2, 2), 3, 1, None)
    assert observers == []


def test_lowered_counts_every_call() -> None:
    """jax emits one function for equal calls."""
    x, twice = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.jit(jnp.sin)
    assert lowered(lambda x: twice(twice(x)), x) == (Counter(), Counter({"stablehlo.sine": 2}))
    config = jaxmoe.RoutingConfig(num_experts=8, top_k=2)
    route = functools.partial(jaxmoe.route, config=config, return_load=False)
    kernels, others = lowered(lambda x: (route(x).weights, route(x).experts), x)
    assert kernels == Counter({"route": 2})
    assert not others
    assert lowered(jnp.linalg.inv, jax.ShapeDtypeStruct((8, 8), jnp.float32))[1].total() > 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--tokens", "0"], "--tokens: expected a multiple of 1 from 1 on, got 0"),
        (["--hidden", "20"], "--hidden: expected a multiple of 8 from 8 on, got 20"),
        (["--experts", "8"], "--experts: expected a multiple of 8 from 16 on, got 8"),
        (["--experts", "1032"], "--experts: expected at most 1024, got 1032"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_options(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        audit.main(option)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
