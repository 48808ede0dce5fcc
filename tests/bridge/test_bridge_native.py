"""The native path without a GPU: what is compiled, kept on disk and would be launched, with what arguments."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from bridge.native import build, cache, dispatch, driver, experts, routing
from bridge.ops import experts as ops
from bridge.ops import weighted_experts
from kernels_pallas.targets import TARGETS, Binary

pytest.importorskip("triton")
V3 = bridge.presets["deepseek-v3"]
BINARIES = [
    Binary("one", b"code of one\n\x00\xff", 32, 0, "QQi", "QQiQ", ("num_rows",)),
    Binary("two", b"more", 128, 4096, "QQ", "QQ", ()),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXMOE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_kept_and_found(folder: Path) -> None:
    assert cache.load("key") is None
    cache.store("key", BINARIES)
    assert cache.load("key") == BINARIES
    assert cache.load("another key") is None
    assert entry(folder).stat().st_mode & 0o077 == 0, "nobody else's business"
    cache.store("key", BINARIES[:1])
    assert cache.load("key") == BINARIES[:1], "replaced"


@pytest.mark.parametrize(
    "damage",
    {
        "a bit of the code": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        "a bit of the header": lambda b: b.replace(b'"threads": 32', b'"threads": 64'),
        "cut off": lambda b: b[:-3],
        "longer": lambda b: b + b"x",
        "empty": lambda b: b"",
        "no header": lambda b: b"\x7fELF" + b,
        "a list for a header": lambda b: b"[]\n" + b,
        "another key": lambda b: b.replace(b'"key": "key"', b'"key": "kez"'),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_entry_is_not_used(damage: Any, folder: Path) -> None:
    cache.store("key", BINARIES)
    path = entry(folder)
    before = path.read_bytes()
    path.write_bytes(damage[1](before))
    assert path.read_bytes() != before
    assert cache.load("key") is None
    cache.store("key", BINARIES)
    assert cache.load("key") == BINARIES


def test_an_entry_of_somebody_else_is_not_used(folder: Path) -> None:
    """Machine code that others could have written is not run."""
    cache.store("key", BINARIES)
    path = entry(folder)
    path.chmod(0o666)
    assert cache.load("key") is None
    path.chmod(0o600)
    assert cache.load("key") == BINARIES
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
        assert cache.load("key") is None


def test_an_entry_of_another_key_under_this_name_is_not_used(folder: Path) -> None:
    cache.store("key", BINARIES)
    path = entry(folder)
    cache.store("other", BINARIES[:1])
    path.rename(path.with_name("moved"))
    (other,) = [p for p in folder.iterdir() if p.name != "moved"]
    other.rename(path)
    assert cache.load("key") is None


def test_where_nothing_can_be_kept_it_says_so(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept in .*kernels"):
        cache.store("key", BINARIES)
    assert cache.load("key") is None


def test_several_processes_at_once(folder: Path) -> None:
    """Each writes and reads the same entry many times: whatever is read is whole."""
    program = (
        "from bridge.native import cache\nfrom kernels_pallas.targets import Binary\n"
        "import sys\nb = [Binary('k', bytes([int(sys.argv[1])]) * 200_000, 32, 0, 'Q', 'Q', ())]\nseen = 0\n"
        "for _ in range(60):\n    cache.store('key', b)\n    got = cache.load('key')\n"
        "    assert got and len(set(got[0].code)) == 1 and len(got[0].code) == 200_000\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(i)]) for i in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert len(list(folder.iterdir())) == 1, "no file is left behind"


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
        weighted_experts._backward_native(x, x, ids, flat, sizes, weights, gate_up, down, kept, 9, trained, over=over)
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


def test_the_key_holds_what_matters() -> None:
    """Another jax, triton or source, another key: an entry of theirs is never taken for ours."""
    toolchain = build._toolchain()
    assert f"jax {build.jax.__version__}" in toolchain
    assert "triton" in toolchain


class FakeDriver:
    """A driver that reads what a real one would read at a launch."""

    def __init__(self, hip: bool) -> None:
        self.hip, self.seen, self.failing = hip, [], []
        self.attributes: list[Any] = []  # of each launch
        pointer, number, status = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
        cuda = ctypes.CFUNCTYPE(status, pointer, pointer, pointer, pointer)
        amd = ctypes.CFUNCTYPE(status, pointer, *[number] * 7, pointer, pointer, pointer)
        self.launch = amd(self.launch_hip) if hip else cuda(self.launch_cuda)

    def load(self, binary: Binary) -> ctypes.c_void_p:
        return ctypes.c_void_p(0xF00)

    def enter(self, device: int) -> None:
        self.seen.append("enter")

    def arguments(self, extra: int, end: int) -> bytes:
        kind, memory, size_kind, size, last = (ctypes.c_void_p * 5).from_address(extra)
        assert (kind, size_kind, last or 0) == (1, 2, end)
        return ctypes.string_at(memory, ctypes.c_size_t.from_address(size).value)

    def launch_cuda(self, config: int, function: int, parameters: int | None, extra: int) -> int:
        *sizes, stream, attributes, count = struct.unpack("@7I4xQQI4x", ctypes.string_at(config, 56))
        assert (function, parameters) == (0xF00, None)
        self.attributes.append(ctypes.string_at(attributes, 72 * count) if count else attributes)
        self.seen.append((*sizes, stream, self.arguments(extra, 0)))
        return self.failing.pop() if self.failing else 0

    def launch_hip(self, function: int, *rest: Any) -> int:
        *sizes, stream, parameters, extra = rest
        assert (function, parameters) == (0xF00, None)
        self.seen.append((*sizes, stream, self.arguments(extra, 3)))
        return self.failing.pop() if self.failing else 0

    def check(self, status: int, what: str) -> None:
        raise RuntimeError(f"{what}: {status}")


@pytest.mark.parametrize("hip", [False, True], ids=["cuda", "rocm"])
def test_what_the_driver_is_given(hip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, block, shared memory, stream and arguments, laid out as C does; what triton adds is null."""
    fake = FakeDriver(hip)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    monkeypatch.setattr(driver, "_current_device", lambda: 0)
    monkeypatch.setattr(driver, "_raw_stream", lambda device: 0xABCDEF0123)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    kernel = driver.Kernel(Binary("k", b"", 128, 4096, "QiiQ", "QiiQQ", ("a", "b")), 0)
    dependent = driver.Kernel(Binary("k", b"", 32, 0, "Q", "Q", (), dependent=True), 0)
    dependent(2, 1, 0x7F0000000010)
    assert fake.seen.pop()[:8] == (2, 1, 1, 32, 1, 1, 0, 0xABCDEF0123)
    if not hip:
        assert fake.attributes.pop() == struct.pack("@IIII56x", 6, 0, 1, 0), "programmatic stream serialization"
    fake.seen.pop()
    noted: list[Any] = []
    monkeypatch.setattr(driver, "observers", [lambda *launch: noted.append(launch)])
    kernel(7, 3, 0x7F0000000010, 5, 2**31 - 1, 0x7F0000000020)
    kernel(1, 1, 1, 2, 3, 4)
    first, second = fake.seen[1:]
    assert first[:8] == (7, 3, 1, 128, 1, 1, 4096, 0xABCDEF0123)
    assert first[8] == struct.pack("@QiiQQ", 0x7F0000000010, 5, 2**31 - 1, 0x7F0000000020, 0)
    assert second[8] == struct.pack("@QiiQQ", 1, 2, 3, 4, 0)
    assert noted == [("k", (7, 3)), ("k", (1, 1))]
    assert not any(fake.attributes), "none for a kernel that does not wait"
    fake.failing = [0, 201] if not hip else []
    kernel(1, 1, 1, 2, 3, 4)
    assert ("enter" in fake.seen[3:]) == (not hip), "a thread without a context gets one"
    fake.failing = [1]
    with pytest.raises(RuntimeError, match="launching k on a grid of 9 by 2: 1"):
        kernel(9, 2, 1, 2, 3, 4)
    with pytest.raises(struct.error):
        kernel(1, 1, 1, 2, 3)
