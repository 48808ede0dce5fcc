"""Every kernel becomes machine code for every target, on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.__main__ import main
from kernels_pallas import catalogue
from kernels_pallas.catalogue import CATALOGUE, Entry
from kernels_pallas.launch import iota, launch, store
from kernels_pallas.targets import TARGETS, _with_policies, compile_kernel, lower, report, waits

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
BY_NAME = {entry.name: entry for entry in CATALOGUE}


def test_catalogue_holds_every_kernel() -> None:
    """A kernel that nobody lists would not be compiled below."""
    sources = [path.read_text() for path in Path(catalogue.__file__).parent.glob("*.py")]
    launched = {name for source in sources for name in re.findall(r'\bname="(\w+)"', source)}
    launched |= {
        name
        for source in sources
        for names in re.findall(r"^NAMES = .*", source, re.M)
        for name in re.findall(r"\w+(?=\")", names)
    }
    assert launched == {kernel for entry in CATALOGUE for kernel in entry.kernels}
    assert len(BY_NAME) == len(CATALOGUE)


# Every kernel once for the target that is run and the one with the least shared memory; all of the catalogue for all
# targets in CI (it takes minutes), and `python -m jaxmoe targets` says the same as a table.
EVERYTHING = "JAXMOE_EVERY_TARGET" in os.environ
FIRST = {entry.kernels: entry.name for entry in reversed(CATALOGUE)}.values()
SOME = list(BY_NAME) if EVERYTHING else [name for name in BY_NAME if name in FIRST]
COMPILED = [
    pytest.param(name, target, id=f"{name}-{target}")
    for name in SOME
    for target in TARGETS
    if EVERYTHING or target in ("sm_90", "gfx942")
]


@needs_triton
@pytest.mark.parametrize(("name", "target"), COMPILED)
def test_compiles(name: str, target: str) -> None:
    """Machine code comes out, without spills on CUDA, within what a thread and a program can have."""
    t = TARGETS[target]
    for kernel in BY_NAME[name].lower(target):
        got = report(compile_kernel(kernel, target))
        assert got.machine_code_bytes > 500
        assert 4 <= got.registers <= (255 if t.platform == "cuda" else 512)
        assert 0 <= got.shared_bytes <= t.shared_bytes
        if t.platform == "cuda":
            assert got.spills == 0


@needs_triton
@pytest.mark.parametrize("name", [name for name in BY_NAME if re.match(r"(gated|grouped)_.*float16", name)])
def test_products_load_16_bytes_at_a_time(name: str) -> None:
    """Where lines begin at 16 bytes. Triton has to see that of the addresses: else it takes 13 times as long."""
    for kernel in BY_NAME[name].lower("sm_90"):
        ptx = compile_kernel(kernel, "sm_90").asm["ptx"]
        sizes = set(re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+|\d+)(?:,|;)", ptx))
        assert sizes == (set() if "ragged" in name or name.startswith("gated_grad") else {"0x10"})
        assert bool(re.search(r"ld\.global\S*\.b16", ptx)) == ("ragged" in name)


@needs_triton
@pytest.mark.parametrize(
    "name", [name for name in BY_NAME if re.match(r"(gated_matmul|grouped_).*float16(?!.*ragged)", name)]
)
def test_loops_move_addresses(name: str) -> None:
    """Where a compiler sees that no index wraps: else a step widens one for every 16 bytes. See `launch.bounded`.

    It counts most in XLA's build, which this is not: its LLVM sees somewhat less.
    """
    if name.startswith("grouped_outer") and version("triton").startswith("3.6."):
        pytest.skip("triton 3.6 widens indices of these all the same, later ones do not")
    for kernel in BY_NAME[name].lower("sm_90"):
        ptx = compile_kernel(kernel, "sm_90").asm["ptx"]
        loops = re.findall(r"^(\$L__BB\w+):((?:(?!^\$L__BB).)*?)bra \t?\1;", ptx, re.S | re.M)
        products = [body for _, body in loops if "mma" in body and "cp.async" in body]
        shapes = set(re.findall(r"wgmma\.mma_async\S+", ptx))  # low last tiles have their own
        assert len(products) == max(1, len(shapes))
        assert all(len(re.findall(r"\bm(?:ul|ad)\.wide\.", body)) <= 1 for body in products)


def lowered(name: str) -> list[tuple[str, str]]:
    """A call's kernels as both paths lower them: sizes built in, as for XLA, and passed at the launch, as for torch."""
    entry = BY_NAME[name]
    fn = functools.partial(entry.fn, target="cuda") if entry.takes_target else entry.fn
    return [
        (kernel.name, kernel.ttir)
        for at_run_time in (False, True)
        for kernel in lower(fn, *entry.args, target="sm_90", sizes_at_run_time=at_run_time)
    ]


@pytest.mark.in_ci(name=lambda name: name not in SOME[::5])
@pytest.mark.parametrize("name", SOME)
def test_lowers_whatever_jax_is_set_to(name: str) -> None:
    """With 64-bit types there is a kernel; with another precision of products it's the same one, sums included."""
    wanted = lowered(name)
    with jax.default_matmul_precision("F16_F16_F16"):
        assert lowered(name) == wanted
    with jax.enable_x64(True):
        assert [kernel for kernel, _ in lowered(name)] == [kernel for kernel, _ in wanted]


@needs_triton
def test_triton_knows_a_kernel_again() -> None:
    """By what it is, wherever the file lay: then its code comes from triton's own cache."""
    (kernel,) = BY_NAME["combine bfloat16"].lower("sm_90")
    first, second = (compile_kernel(kernel, "sm_90") for _ in range(2))
    assert first.hash == second.hash
    other = compile_kernel(dataclasses.replace(kernel, num_warps=2 * kernel.num_warps), "sm_90")
    assert other.hash != first.hash


def _code(kernel: Any) -> str:
    """The compiled kernel as text, without the lines that say where it came from."""
    entry = compile_kernel(kernel, "sm_90").asm["ptx"].split(".visible .entry")[1].split("\t.file")[0]
    return re.sub(r"\s*\.loc\t.*|\s*//.*", "", entry)


@needs_triton
def test_cache_policies_are_said_as_triton_reads_them() -> None:
    """jax and triton changed the words, each with a version of its own; no other order of them is passed on."""
    (kernel,) = BY_NAME["combine bfloat16, 1024 tokens"].lower("sm_90")
    old, new = (_with_policies(kernel.ttir, version) for version in ("3.8rc1", "3.10.0+rocm7"))
    count = old.count(" evictionPolicy = evict_first : ")
    assert count == new.count("eviction_policy = evict_first>} : ") == 18, "eight loads and a store, at once or apart"
    assert old != new
    assert _with_policies(new, "3.6.0") == old
    assert _with_policies(old, "3.9.0") == new
    with pytest.raises(RuntimeError, match="writes cache policies otherwise than expected"):
        _with_policies(old.replace("evictionPolicy =", "evictionPolicy:"), "3.9.0")
    for target, text in (("sm_90", "L2::evict_first"), ("gfx942", " nt")):
        (kernel,) = BY_NAME["combine bfloat16, 1024 tokens"].lower(target)
        code = compile_kernel(kernel, target).asm
        assert (text in code["ptx" if target == "sm_90" else "amdgcn"]) == (target == "sm_90"), "not measured on ROCm"


RUN_TIME = {
    "plan_dispatch 256 experts": (0,),
    "align_blocks 256 experts": (0,),
    "permute_maps 256 experts": (0, 1),
    "dispatch bfloat16": (0, 1),
    "combine bfloat16": (0, 1),
    "count_load 257 ids": (0,),
    "router_logits bfloat16": (0,),
    "router_logits bfloat16, few tokens": (0,),
    "router_logits bfloat16, many tokens": (0,),
    "router_logits bfloat16 by float32": (0,),
    "grouped_matmul float16, middling, transposed": (0,),
    "route 256/8, 8 groups": (0,),
}


@needs_triton
@pytest.mark.parametrize("name", RUN_TIME)
def test_one_kernel_for_every_number_of_rows(name: str) -> None:
    """With sizes at run time the machine code does not know how many rows there are, if the config is the same."""
    entry = BY_NAME[name]

    def lowered(times: float) -> list[Any]:
        shapes = [
            jax.ShapeDtypeStruct((int(a.shape[0] * times), *a.shape[1:]), a.dtype)
            if a is not None and i in RUN_TIME[name] + ((2,) if "dispatch b" in name else ())
            else a
            for i, a in enumerate(entry.args)
        ]
        fn = functools.partial(entry.fn, target="cuda") if entry.takes_target else entry.fn
        return lower(fn, *shapes, target="sm_90", sizes_at_run_time=True)

    for few, many in zip(lowered(15 / 16), lowered(1), strict=True):
        assert few.sizes == many.sizes
        assert _code(few) == _code(many)


@needs_triton
def test_a_dependent_kernel_waits_first() -> None:
    """Before it reads anything that others share. CUDA has such launches from sm_90 on."""
    assert [name for name, target in TARGETS.items() if waits(target)] == ["sm_90", "sm_100"]
    (kernel,) = BY_NAME["dispatch bfloat16"].lower("sm_90")
    for made, count in ((kernel, 0), (kernel.waiting(), 1)):
        ptx = compile_kernel(made, "sm_90").asm["ptx"]
        assert (made.dependent, ptx.count("griddepcontrol.wait")) == (bool(count), count)
        assert "griddepcontrol" not in ptx or ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


@needs_triton
def test_spills_are_seen() -> None:
    """The report of no spills means something: a kernel squeezed into few registers has some."""
    kernel = BY_NAME["route 256/8, 8 groups"].lower("sm_90")[0]
    squeezed = report(compile_kernel(kernel, "sm_90", maxnreg=24))
    assert squeezed.registers <= 24
    assert squeezed.spills > 0


def _offsets(ttir: str, argument: int) -> set[str]:
    """The integer types of the offsets that are added to the pointer %arg<argument>."""
    splats = re.findall(rf"(%\w+) = tt\.splat %arg{argument} ", ttir)
    bases = "|".join(map(re.escape, [f"%arg{argument}", *splats]))
    lines = re.findall(rf"tt\.addptr (?:{bases}), .*", ttir)
    return {re.findall(r"i\d+", line)[-1] for line in lines}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("dispatch float32, over 2**31 elements", 3),  # x, rows, slots, then the output
        ("combine bfloat16, over 2**31 elements, into out", 0),
        ("combine float32, over 2**31 elements", 0),
        ("combine_weight_grad float32, over 2**31 elements", 0),
    ],
)
def test_offsets_are_64_bit_past_2_31_elements(name: str, argument: int, target: str) -> None:
    """32-bit offsets wrap at 37.4k tokens x 8 x 7168 (DLBlas #171, TransformerEngine #2908, FlashInfer #2642)."""
    kernel = BY_NAME[name].lower(target)[0]
    assert _offsets(kernel.ttir, argument) == {"i64"}
    products = re.findall(r"arith\.muli .* : tensor<\w+xi64>", kernel.ttir)
    assert products, "a product in 32 bits that is widened afterwards has wrapped already"


def test_offsets_are_32_bit_below() -> None:
    """The check above tells the two apart, and small arrays do not pay for 64 bits."""
    assert _offsets(BY_NAME["combine bfloat16"].lower("sm_90")[0].ttir, 0) == {"i32"}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_load_is_counted_in_integers(target: str) -> None:
    """plgpu.atomic_add of jax 0.10.2 adds a tensor of integers as floats: on CUDA silently, with a load of zeros."""
    ttir = BY_NAME["count_load 257 ids"].lower(target)[0].ttir
    assert re.findall(r"tt\.atomic_rmw (\w+)", ttir) == ["add"]


def _needs_much_shared_memory(x: jax.Array) -> Any:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        i, j = iota((256, 256), 0), iota((256, 256), 1)
        store(out_ref.at[i, j], jnp.dot(x_ref[...], x_ref[...]))

    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    return launch(kernel, x, name="too_large", grid=(1,), out_shape=[shape], num_warps=8)


def _not_for_triton(x: jax.Array) -> Any:
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)  # not a power of two
    kernel = lambda x_ref, out_ref: store(out_ref.at[iota((3,), 0)], x_ref[...])
    return launch(kernel, x, name="three", grid=(1,), out_shape=[shape], num_warps=1)


BROKEN = {
    "too_large": (_needs_much_shared_memory, jax.ShapeDtypeStruct((256, 256), jnp.float32), "shared memory"),
    "three": (_not_for_triton, jax.ShapeDtypeStruct((3,), jnp.float32), "power of 2"),
}


@needs_triton
@pytest.mark.parametrize("name", BROKEN)
def test_command_fails_and_names_the_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that does not compile, or could not be launched, makes the exit code 1; the rest is still reported."""
    fn, shape, reason = BROKEN[name]
    broken = Entry(f"broken {name}", (name,), fn, (shape,), takes_target=False)
    monkeypatch.setattr(catalogue, "CATALOGUE", (broken, BY_NAME["route 1/1"]))
    assert main(["targets", "--target", "gfx942"]) == 1
    out, err = capsys.readouterr()
    assert f"FAILED: broken {name} for gfx942" in err
    assert reason in out
    assert re.search(r"^route 1/1 +gfx942 +\d+ +\d+ +0 +\d+$", out, re.M)


@needs_triton
def test_command_prints_what_the_report_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--kernel", "dispatch bfloat16", "--target", "sm_80", "--target", "gfx950"]) == 0
    out = capsys.readouterr().out
    for target in ("sm_80", "gfx950"):
        r = report(compile_kernel(BY_NAME["dispatch bfloat16"].lower(target)[0], target))
        row = rf"^dispatch bfloat16 +{target} +{r.machine_code_bytes} +{r.registers} +{r.spills} +{r.shared_bytes}$"
        assert re.search(row, out, re.M)
    assert "sm_90" not in out
    assert "gfx950: compiled, not run." in out


def test_command_refuses_an_unknown_kernel_or_target() -> None:
    for arguments in (["--kernel", "no such kernel"], ["--target", "sm_70"]):
        with pytest.raises(SystemExit) as stopped:
            main(["targets", *arguments])
        assert stopped.value.code == 2


def test_command_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["targets"]) == 2
    assert "triton, which is not installed" in capsys.readouterr().out


def test_lower_keeps_the_order_of_launches() -> None:
    """plan_dispatch's second launch reads what the first one wrote."""
    entry = BY_NAME["plan_dispatch 256 experts"]
    fn = functools.partial(entry.fn, target="cuda")
    assert [k.name for k in lower(fn, *entry.args, target="sm_90")] == ["plan_count", "plan_place"]
