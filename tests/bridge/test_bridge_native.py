"""The native path without a GPU: what is compiled and would be launched, with what arguments and memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from bridge.native import build, dispatch, experts, routing
from bridge.ops import experts as ops
from bridge.ops import layer as layer_ops
from bridge.ops import weighted_experts
from jaxmoe.grouped_matmul import ANY
from kernels_pallas.targets import TARGETS, Binary

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("cache_folder")

V3 = bridge.presets["deepseek-v3"]


class Recorder:
    """Stands in for a kernel on a GPU: notes what would be launched, and checks it against the machine code."""

    launches: list[tuple[str, tuple[int, int]]]

    def __init__(self, binary: Binary, device: int) -> None:
        self.binary = binary

    def __call__(self, x: int, y: int, *arguments: int) -> None:
        declared = self.binary.own
        assert len(declared) <= len(self.binary.arguments) <= len(declared) + 2, "triton adds scratch memory"
        sizes = [value for kind, value in zip(declared, arguments, strict=True) if kind == "i"]
        assert len(sizes) == len(self.binary.sizes)
        assert all(0 <= size < 2**31 for size in sizes)
        assert all(value > 2**20 for kind, value in zip(declared, arguments, strict=True) if kind == "Q")
        assert x > 0
        assert 0 < y < 2**16, "the limit of the grid's second axis"
        self.launches.append((self.binary.name, (x, y)))


@pytest.fixture(params=["sm_90", *(["gfx942"] if "JAXMOE_EVERY_TARGET" in os.environ else [])])  # as CI does
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """CPU tensors in the place of GPU tensors; every kernel is really compiled for the target."""
    target = TARGETS[request.param]
    monkeypatch.setattr(build, "target_of", lambda device: target)
    monkeypatch.setattr(build, "Kernel", Recorder)
    monkeypatch.setattr(torch.version, "hip", "7.0" if target.platform == "rocm" else None)
    monkeypatch.setattr(build, "builds", [])
    monkeypatch.setattr(Recorder, "launches", [], raising=False)
    clear()
    yield Recorder.launches
    clear()


def clear() -> None:
    for module in (routing, dispatch, experts):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    routing._known.clear()


def step(tokens: int, *, shifted: bool = False) -> None:
    """A decode step, as the ops launch it."""
    offset = int(shifted)
    make = lambda dtype, *shape: torch.zeros(int(torch.Size(shape).numel()) + offset, dtype=dtype)[offset:].view(shape)
    logits, bias = make(torch.bfloat16, tokens, 256), make(torch.float32, 256)
    weights, ids = make(torch.float32, tokens, 9), make(torch.int32, tokens, 9)
    routing.route(logits, bias, None, None, V3.json, weights, ids, None)
    rows, slots, sizes = make(torch.int32, tokens, 9), make(torch.int32, tokens * 9), make(torch.int32, 257)
    dispatch.plan_dispatch(ids, 257, 1, None, rows, slots, sizes)
    x, out = make(torch.bfloat16, tokens, 64), make(torch.bfloat16, tokens * 9, 64)
    dispatch.dispatch(x, rows, slots, None, out)
    dispatch.combine(out, rows, weights, x)


def test_one_compilation_serves_every_number_of_tokens(launches: list[Any]) -> None:
    for tokens in (0, 1, 2, 7, 15, 64, 200, 513, 4096):
        step(tokens)
    names = [made.name.rpartition(".")[2] for made in build.builds]
    assert sorted(set(names)) == ["combine", "dispatch", "plan_dispatch", "route"]
    counts = {name: names.count(name) for name in ("route", "dispatch", "combine")}
    assert counts == {"route": 2, "dispatch": 3, "combine": 2}, "as many as there are configs for these"
    assert names.count("plan_dispatch") == 6, "as many as there are configs for these"
    few, many = (["route", *plan, "dispatch", "combine"] for plan in (["plan_dispatch"], ["plan_count", "plan_place"]))
    assert [name for name, _ in launches] == few * 6 + many * 2, "no tokens, no launch"


@pytest.mark.parametrize("tokens", [5, 600], ids=["one launch", "two"])
@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_a_plan_that_is_cut_takes_no_other_kernel(launches: list[Any], tokens: int) -> None:
    """Where it is cut, `slots` say."""
    ids, sizes = torch.zeros(tokens, 9, dtype=torch.int32), torch.zeros(33, dtype=torch.int32)
    for rows in (tokens * 9, 16, 1):
        dispatch.plan_dispatch(ids, 33, 1, None, ids, torch.zeros(rows, dtype=torch.int32), sizes)
    names = {5: ["plan_dispatch"], 600: ["plan_count", "plan_place"]}[tokens]
    assert [made.name.rpartition(".")[2] for made in build.builds] == ["plan_dispatch"]
    assert [name for name, _ in launches] == names * 3


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "bfloat16 float32", "float32 float32"])
def test_the_router_has_few_compilations(dtypes: str, launches: list[Any]) -> None:
    """H is cut into as many slices as it takes to fill the GPU, and the kernels do not know how many."""
    x_dtype, weight_dtype = (getattr(torch, name) for name in dtypes.split())
    weight, wide = torch.zeros(256, 1024, dtype=weight_dtype), torch.zeros(1 << 24, dtype=x_dtype)
    tokens = (0, 1, 2, 8, 9, 17, 64, 128, 129, 300, 1000, 4096, 16384)
    for number in tokens:
        x = wide[: 1024 * number].view(number, 1024)
        assert routing.router_logits(x, weight).shape == (number, 256)
    names = [made.name.rpartition(".")[2] for made in build.builds]
    assert (names.count("router_logits"), names.count("router_logits_sum")) == (5 if "bfloat16" in dtypes else 4, 1)
    for number in tokens[1:]:
        names = [name for name, _ in launches[:2]]
        count = 2 if names[1:] == ["router_logits_sum"] else 1
        assert names[0] == "router_logits"
        (_, (_, slices)), *_ = launches
        assert (slices > 1) == (count == 2)
        assert count == (2 if 8 < number <= 1000 else count), "few tiles: several slices"
        assert count == (1 if number <= 8 or number == 16384 else count), "many tiles: one"
        del launches[:count]
    assert not launches


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_a_second_process_compiles_nothing(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step(5)
    assert all(made.compiled for made in build.builds)
    count = len(build.builds)
    clear()  # what a process forgets
    monkeypatch.setattr(build.targets, "lower", None)
    monkeypatch.setattr(build.targets, "compile_kernel", None)
    step(5)
    again = build.builds[count:]
    assert len(again) == count
    assert not any(made.compiled for made in again)
    assert sum(made.seconds for made in again) < 0.3


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_addresses_that_are_not_aligned_get_a_kernel_of_their_own(launches: list[Any]) -> None:
    step(5)
    count = len(build.builds)
    step(5, shifted=True)
    assert len(build.builds) == 2 * count
    keys = [made.key for made in build.builds]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_strides_are_passed_at_the_launch(launches: list[Any]) -> None:
    """One kernel serves all strides that are multiples of the same power of two, to 16; dense rows have their own."""
    rows, slots, _ = bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int32), 3)
    out = torch.zeros(10, 64, dtype=torch.bfloat16)
    count = len(build.builds)
    for width in (64, 80, 96, 160, 1600, 72, 104, 65, 1233):
        x = torch.zeros(5, width, dtype=torch.bfloat16)[:, :64]
        dispatch.dispatch(x, rows, slots, None, out)
        dispatch.combine(torch.zeros(10, width, dtype=torch.bfloat16)[:, :64], rows, None, out[:5])
    names = [made.name.rpartition(".")[2] for made in build.builds[count:]]
    assert names.count("dispatch") == names.count("combine") == 4, "dense, and multiples of 16, 8 and 1"
    assert launches[-1][0] == "combine"


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_no_alignment_is_assumed_then(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    compile_kernel = build.targets.compile_kernel
    monkeypatch.setattr(
        build.targets,
        "compile_kernel",
        lambda kernel, target: seen.append(kernel.ttir) or compile_kernel(kernel, target),
    )
    step(5, shifted=True)
    assert seen
    assert not any("divisibility" in ttir for ttir in seen)
    seen.clear()
    step(5)
    assert all("tt.divisibility = 32" in ttir for ttir in seen)


def test_every_other_launch(launches: list[Any]) -> None:
    """Gradients, the load, the router, the experts: as many arguments as the machine code takes."""
    zeros = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype)
    int32, float32 = torch.int32, torch.float32
    logits, weights, ids = zeros(5, 256), zeros(5, 9, dtype=float32), zeros(5, 9, dtype=int32)
    valid, load = torch.tensor(3, dtype=int32), zeros(257, dtype=int32)
    routing.route(logits, None, valid, None, V3.json, weights, ids, load)
    routing.route(logits, None, None, 3, V3.json, weights, ids, None)
    routing.route_backward(weights, logits, ids, V3.json)
    x, router = zeros(5, 64), zeros(256, 64, dtype=float32)
    routing.router_logits(x, router)
    routing.router_logits(zeros(9, 256), zeros(256, 256))
    routing.router_logits_backward(zeros(5, 256, dtype=float32), x, router)
    rows, slots, sizes, held = ids, zeros(88, dtype=int32), zeros(7, dtype=int32), zeros(88, 64)
    dispatch.plan_dispatch(ids, 7, 8, zeros(300, dtype=int32), rows, slots, sizes)
    dispatch.dispatch(x, rows, slots, weights, held)
    dispatch.combine(held, rows, None, x)
    dispatch.combine_weight_grad(held, x, rows, zeros(5, 9))
    gate_up, down = zeros(7, 64, 96), zeros(7, 64, 48).mT
    hidden, both = zeros(88, 48), zeros(88, 96)
    experts.gated_matmul(held, gate_up, sizes, "silu", hidden)
    experts.gated_matmul(held, gate_up, sizes, "gelu", hidden, both)
    experts.gated_matmul(x, gate_up, sizes, "silu", hidden, both, slots=slots, num_slots=9)
    experts.gated_matmul(zeros(5, 80)[:, :64], gate_up, sizes, "silu", hidden, slots=slots, num_slots=9)
    experts.grouped_matmul(hidden, down, sizes, held)
    experts.gated_grad(both, hidden, "silu", both, hidden)
    experts.gated_grad(both, hidden, "gelu", both, hidden, zeros(88, dtype=float32), zeros(88, dtype=float32))
    experts.grouped_outer(hidden, held, sizes, torch.empty_like(down))
    assert [name for name, _ in launches] == [
        *("route", "count_load", "route", "route_grad"),
        *("router_logits", "router_logits", "router_logits_sum", "router_logits_grad_x"),
        *("router_logits_grad_weight", "plan_dispatch", "dispatch", "combine", "combine_weight_grad"),
        *("gated_matmul",) * 4,
        *("grouped_matmul", "gated_grad", "gated_grad", "grouped_outer"),
    ]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_frozen_weights_launch_nothing(launches: list[Any], trained: bool) -> None:
    """A gradient of a weight is a product of its own; a frozen one must not cost it, nor memory."""
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    rows, gate_up, down, sizes = zeros(8, 64), zeros(3, 64, 96), zeros(3, 48, 64), torch.zeros(3, dtype=torch.int32)
    _, dweight = ops._matmul_backward_native(zeros(8, 96), rows, gate_up, sizes, trained)
    _, *stack = ops._experts_backward_native(rows, rows, gate_up, down, sizes, "silu", trained)
    assert [name for name, _ in launches].count("grouped_outer") == 3 * trained
    assert [tuple(g.shape) for g in (dweight, *stack)] == (
        [tuple(w.shape) for w in (gate_up, gate_up, down)] if trained else [(0,)] * 3
    )


class Live(TorchDispatchMode):
    """The most bytes that uninitialised tensors made meanwhile took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default):
            self.now += out.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(out, self._free, out.nbytes)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(("trained", "over"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_memory_of_the_backward_pass(launches: list[Any], trained: bool, over: bool) -> None:
    """Besides gradients, one array of rows as wide as a token, and one for gate and up if these stay."""
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    tokens, slots, width, inner = 40, 8, 64, 48
    ids = torch.zeros(tokens, slots, dtype=torch.int32)
    x, gate_up, down = zeros(tokens, width), zeros(9, width, 2 * inner), zeros(9, inner, width)
    weights = torch.zeros(tokens, slots)
    flat, sizes, kept = ids.reshape(-1), torch.zeros(9, dtype=torch.int32), zeros(tokens * slots, 2 * inner)
    with Live() as live:
        given = x, x, ids, flat, sizes, weights, gate_up, down, kept, 9, "silu", trained
        weighted_experts._backward_native(*given, over=over)
    assert [name for name, _ in launches].count("grouped_outer") == 2 * trained
    rows = tokens * slots * (2 * width + 4) + weights.nbytes  # and a number for each
    both = 0 if over else kept.nbytes
    last = gate_up.nbytes + down.nbytes + x.nbytes if trained else tokens * slots * 2 * inner  # one of hidden rows
    assert live.peak == both + rows + last


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
def test_memory_of_the_experts_backward_pass(launches: list[Any]) -> None:
    """Besides gradients gate and up alone, when the last is made."""
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    rows, gate_up, down, sizes = zeros(320, 64), zeros(9, 64, 96), zeros(9, 48, 64), torch.zeros(9, dtype=torch.int32)
    with Live() as live:
        ops._experts_backward_native(rows, rows, gate_up, down, sizes, "silu", True)
    assert [name for name, _ in launches].count("grouped_outer") == 2
    assert live.peak == 320 * 96 * 2 + gate_up.nbytes + down.nbytes + rows.nbytes


class Found:
    """Stands in for a kernel: which one it is, and how it was launched, but for addresses."""

    def __init__(self, launches: list[Any], request: str) -> None:
        self.launches, self.request = launches, request

    def __call__(self, x: int, y: int, *arguments: int) -> None:
        self.launches.append((self.request, x, y, [value if value < 2**20 else "address" for value in arguments]))


def kinds_of_calls() -> list[Callable[[], Any]]:
    """Calls of which each differs from the first of its kind in one thing alone."""
    zeros = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype)
    int32, float32 = torch.int32, torch.float32
    shifted = lambda *shape, dtype=torch.bfloat16: zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    apart = lambda rows, width, by: zeros(rows, width + by)[:, :width]

    def layer(
        tokens: int = 5,
        slots: int = 2,
        width: int = 64,
        inner: int = 48,
        here: int = 7,
        most: int | None = None,
        **k: Any,
    ) -> Any:
        dtype = k.get("dtype", torch.bfloat16)
        ids = zeros(tokens, slots, dtype=int32)
        gate_up, down = zeros(here, width, 2 * inner, dtype=dtype), zeros(here, inner, width, dtype=dtype)
        if k.get("transposed"):
            gate_up, down = (w.mT.contiguous().mT for w in (gate_up, down))
        local = k.get("local") and zeros(k["local"], dtype=int32)
        weights = zeros(tokens, slots, dtype=k.get("weights", float32))
        x = k["x"]() if "x" in k else zeros(tokens, width, dtype=dtype)
        return lambda: layer_ops._fused_experts_native(x, ids, weights, gate_up, down, local, most, k.get("of", "silu"))

    def router(x: Any, weight: Any) -> Any:
        return lambda: routing.router_logits(x, weight)

    def combined(x: Any, tokens: int = 5, end: Any = None) -> Any:
        rows, weights, out = zeros(tokens, 2, dtype=int32), zeros(tokens, 2), zeros(tokens, x.shape[1])
        return lambda: dispatch.combine(x, rows, weights, out, end)

    def gated(*, keep: bool = False, clear: bool = True) -> Any:
        rows, weight, sizes = zeros(16, 64), zeros(3, 64, 96), zeros(3, dtype=int32)
        outs = [zeros(16, 48), *([zeros(16, 96)] if keep else [])]
        return lambda: experts.gated_matmul(rows, weight, sizes, "silu", *outs, groups=ANY._replace(clear=clear))

    return [
        *(gated(), gated(keep=True), gated(clear=False)),
        *(layer(), layer(6), layer(400), layer(slots=3), layer(width=80), layer(inner=64), layer(here=8)),
        *(layer(dtype=torch.float16), layer(weights=torch.bfloat16), layer(transposed=True), layer(of="gelu")),
        *(layer(most=8), layer(local=20), layer(local=40), layer(local=20, most=8)),
        *(layer(x=lambda: apart(5, 64, 16)), layer(x=lambda: apart(5, 64, 32)), layer(x=lambda: apart(5, 64, 3))),
        layer(x=lambda: shifted(5, 64)),
        *(router(zeros(5, 64), zeros(8, 64)), router(zeros(9, 64), zeros(8, 64)), router(zeros(5, 80), zeros(8, 80))),
        *(router(zeros(5, 64), zeros(9, 64)), router(zeros(5, 64), zeros(8, 64, dtype=float32))),
        *(router(apart(5, 64, 16), zeros(8, 64)), router(apart(5, 64, 3), zeros(8, 64))),
        *(router(shifted(5, 64), zeros(8, 64)), router(zeros(100, 4096), zeros(64, 4096))),
        *(
            combined(zeros(10, 64)),
            combined(zeros(10, 64), 600),
            combined(apart(10, 64, 16)),
            combined(apart(10, 64, 3)),
        ),
        *(combined(zeros(10, 80)), combined(zeros(10, 64), end=zeros(1, dtype=torch.int64)), combined(shifted(10, 64))),
    ]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is launched, of kernels that are not compiled."""
    seen: list[Any] = []

    def made(function: Any, device: int, is_aligned: bool, **arguments: Any) -> list[Found]:
        return [Found(seen, f"{function.__name__} {number} {device} {is_aligned} {arguments}") for number in (0, 1)]

    for module in (dispatch, experts, routing):
        monkeypatch.setattr(module, "build", made)
    monkeypatch.setattr(build, "target_of", lambda device: TARGETS["sm_90"])
    clear()
    yield seen
    clear()


def test_what_is_remembered_of_a_call_is_not_that_of_another(found: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each after all the others is launched as in a process that knows none; also after the same on another GPU."""
    calls = kinds_of_calls()

    def launches(call: Any) -> list[Any]:
        found.clear()
        call()
        return list(found)

    alone = [clear() or launches(call) for call in calls]
    together = [launches(call) for call in [*calls, *calls]]
    assert together == alone * 2
    assert len({str(each) for each in alone}) == len(alone), "each differs"
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1)
    elsewhere = [launches(call) for call in calls]
    assert elsewhere == [clear() or launches(call) for call in calls]
    assert not {str(each) for each in elsewhere} & {str(each) for each in alone}


def test_offsets_of_64_bits_where_one_array_asks_for_them(found: list[Any]) -> None:
    """The rows that are read, those that are written, or gate and up, which are twice as wide, where these are kept."""

    def rows(depth: int, columns: int, activation: str | None, keep: bool) -> str:
        sizes, how = (8, depth, columns), (False, 2**20, None, ANY, True, 0)
        kernel = experts._planned(torch.bfloat16, sizes, activation, keep, *how)[0]
        return "wide" if f"shape=({2**20}" in kernel.request else "narrow"  # else lowered for one row

    assert rows(2048, 4096, "silu", False) == "narrow"
    assert rows(2048, 4096, "silu", True) == "wide"
    assert rows(2064, 4096, "silu", False) == rows(2064, 64, None, False) == "wide"
    assert (rows(64, 2048, None, False), rows(64, 2064, None, False)) == ("narrow", "wide")
