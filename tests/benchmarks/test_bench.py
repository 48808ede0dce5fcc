"""The runner of the benchmarks, without a GPU: refusals, what is checked first, what fails, what is kept."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, operation, record, timing
from benchmarks.operation import Build, Entry, Operation, expect
from jaxmoe.__main__ import main

MACHINE = {
    "gpu": "Card X",
    "commit": "abc",
    "copy_bytes_per_second": 1e12,
    "matmul_flops_per_second": 1e14,
    "empty_launch_us": 1.0,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to time")
def test_bench_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is missing and writes no file: times of anything else would pass for a GPU's."""
    path = tmp_path / "result.json"
    assert main(["bench", "--output", str(path)]) == 2
    printed = capsys.readouterr()
    assert "needs a CUDA or ROCm GPU that torch sees" in printed.err
    assert printed.out == ""
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "route,rout"], "expected some of route, load, router_logits, .*got rout$"),
        (["--append"], "expected --output with a file that is there"),
        (["--append", "--output", "/nowhere/bench.json"], "expected --output with a file that is there"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.M)


def test_choice_of_kinds() -> None:
    """What is compiled at first use, and what measures by itself, is left out of a quick run unless named."""
    assert bench._arguments([]).only == list(bench.KINDS)
    assert bench._arguments(["--quick"]).only == [name for name in bench.KINDS if name not in bench.ALONE]
    assert bench._arguments(["--quick", "--only", "host,route"]).only == ["host", "route"]


def test_every_kind_is_there() -> None:
    for module, function in bench.KINDS.values():
        assert callable(getattr(__import__(module, fromlist=[function]), function))


class Stub:
    """A kind whose operations add 1 to a tensor, some of them wrongly."""

    def __init__(self) -> None:
        self.out = torch.ones(3)

    def right(self, _: int) -> torch.Tensor:
        return self.out.fill_(1)

    def idle(self, _: int) -> torch.Tensor:
        return self.out

    def raising(self, _: int) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand more")

    def entry(self, call: Any) -> Entry:
        return Entry(call, lambda got: expect((got == 1).all(), "ones"), (self.out,))

    def kind(self, quick: bool) -> Iterator[Build]:
        yield functools.partial(self.build, 1, "fine")
        yield functools.partial(self.build, 2, "without inputs")
        yield functools.partial(self.build, 3, "wrong")

    def build(self, tokens: int, name: str) -> Iterator[Operation]:
        if name == "without inputs":
            raise RuntimeError("out of memory")
        ours = self.idle if name == "wrong" else self.right
        peers = {"Good": self.entry(self.right), "Idle": self.entry(self.idle), "Bad": self.entry(self.raising)}
        peers["Clocked"] = self.entry(self.right)._replace(runs=5)
        yield Operation(name, tokens, 4_000_000, self.entry(ours), peers, {"Absent": "not for this"}, flops=10**9)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """In place of the kinds; what times is a stub too."""
    stub = Stub()
    monkeypatch.setattr(bench, "KINDS", {"stub": (__name__, "kind"), "host": (__name__, "alone")})
    modules = {__name__: type("Module", (), {"kind": stub.kind, "alone": lambda: {"a call": 7.5}})}
    monkeypatch.setattr(bench.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(timing, "time_graph", lambda call, calls, pause: timing.Timing(1.0, 2.0, 3.0))
    monkeypatch.setattr(timing, "time_wall", lambda call, runs: timing.Timing(10.0, 20.0, 30.0 * runs))
    return stub


def test_how_an_operation_is_timed(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it says: how often in a graph, and after which pause."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(timing, "time_graph", lambda call, **how: asked.append(how) or timing.Timing(1.0, 2.0, 3.0))
    bench.timed(Operation("", 1, 1, stub.entry(stub.right), calls=2, pause=0.5), MACHINE)
    assert asked == [{"calls": 2, "pause": 0.5}]


def test_run(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong result has no time; a peer that fails, or leaves what another wrote, is missing, with the reason."""
    data, saved = record.start(MACHINE), []
    problems = bench.run(["stub", "host"], False, data, lambda: saved.append(len(data["results"])))
    fine, failed, wrong = data["results"]
    assert saved == [1, 2, 3, 3]
    assert fine["jaxmoe"] == {"p20": 1.0, "p50": 2.0, "p80": 3.0, "tflops": 500.0}
    assert list(fine["peers"]) == ["Good", "Clocked"]
    assert fine["peers"]["Clocked"]["p80"] == 150.0
    assert fine["missing"] == {
        "Absent": "not for this",
        "Idle": "AssertionError: wrong result: ones",
        "Bad": "RuntimeError: no kernel for this",
    }
    assert fine["floor_us"] == 10.0, "operations take longer than bytes here"
    assert (failed["operation"], failed["tokens"]) == ("build without inputs", 2)
    assert failed["error"] == "RuntimeError: out of memory"
    assert "jaxmoe" not in wrong
    assert wrong["error"] == "AssertionError: wrong result: ones"
    assert wrong["peers"] == {}
    assert problems == [
        "build without inputs at 2 tokens: RuntimeError: out of memory",
        "wrong at 3 tokens: AssertionError: wrong result: ones",
    ]
    assert data["host"] == {"a call": 7.5, "run": 0}
    printed = capsys.readouterr().out
    assert "Good 2.00 (1.00x)" in printed
    assert "500 TFLOP/s" in printed
    assert "* a call: 7.5" in printed


def test_append(stub: Stub, tmp_path: Path) -> None:
    """A later run takes the place of the same sizes and leaves the rest; each timing knows its run."""
    path = tmp_path / "folder" / "bench.json"
    data = record.start(MACHINE)
    record.add(data, {"operation": "fine", "tokens": 1, "peers": {}})
    record.add(data, {"operation": "fine", "tokens": 64, "peers": {}})
    record.save(path, data)
    later = record.start({**MACHINE, "commit": "def"}, record.load(path))
    bench.run(["stub"], False, later, lambda: record.save(path, later))
    kept = json.loads(path.read_text())
    assert [run["commit"] for run in kept["runs"]] == ["abc", "def"]
    assert kept["machine"]["commit"] == "def"
    runs = {(r["operation"], r["tokens"]): r["run"] for r in kept["results"]}
    assert runs == {("fine", 64): 0, ("fine", 1): 1, ("build without inputs", 2): 1, ("wrong", 3): 1}
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]
    with pytest.raises(ValueError, match=r"--append: expected results of Card Y, got those of Card X"):
        record.start({**MACHINE, "gpu": "Card Y"}, kept)


def test_checked_sees_no_earlier_result() -> None:
    floats, ints = torch.ones(2), torch.ones(2, dtype=torch.int32)
    seen = []
    entry = Entry(lambda _: seen.append((floats.isnan().all(), ints.tolist())), lambda _: None, (floats, ints))
    operation.checked(entry)
    assert seen == [(True, [-7, -7])]


@pytest.mark.parametrize(
    ("bytes_of_one", "calls", "beyond", "sets"),
    [
        (1 << 30, 20, 160 << 20, 2),  # more than the cache by itself: still another set for the next call
        (40 << 20, 20, 160 << 20, 4),
        ((40 << 20) - 1, 20, 160 << 20, 5),  # rounded up: four would just fit
        (512, 20, 160 << 20, 20),  # never more than there are calls to use them
        (0, 20, 160 << 20, 20),  # no division by zero
        (1, 1, 10, 2),
    ],
)
def test_input_sets(bytes_of_one: int, calls: int, beyond: int, sets: int) -> None:
    """Enough input sets that one call does not find in the cache what the last one left, and no more than needed."""
    assert timing.input_sets(bytes_of_one, calls=calls, beyond=beyond) == sets


def test_input_sets_of_the_benchmarks() -> None:
    """The sizes that are timed, with the defaults: 40960 tokens of 256 bfloat16 logits are 20 MiB."""
    assert timing.input_sets(40960 * 256 * 2) == 8


def test_time_wall() -> None:
    """Microseconds a run, by the host's clock."""
    result = timing.time_wall(lambda _: None, runs=4, repeats=5)
    assert 0 < result.p20 <= result.p50 <= result.p80 < 1e4
