"""GPU targets, and how a kernel becomes machine code for one on a machine that has none.

    kernels = lower(fn, *shapes, target="sm_90")     # the Triton IR of every kernel that jax.jit(fn) would launch
    report(compile_kernel(kernels[0], "sm_90"))      # bytes, registers, spills, shared memory

Lowering asks jax for a device of that kind (an abstract one); compiling is the work of the `triton` package, which
carries the compilers of both vendors. Private names of jax stand in this file and nowhere else: the Triton dialect that
decodes Pallas' bytecode, a CPU client of one's own and, before jax 0.11.1, the name of Pallas' custom call. Of triton:
the passes that `triton.compile` leaves out. Tried with jax 0.10.2, 0.11.2 and 0.12.0.1, triton 3.6, 3.7.1 and 3.9.0.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.pallas import triton as plgpu
from jax.extend.mlir import ir

from kernels_pallas.launch import runtime_sizes, shared_memory


@dataclass(frozen=True)
class Target:
    """A GPU that kernels are built for."""

    name: str  # "sm_90", "gfx942"
    platform: str  # "cuda" or "rocm", as jax says it
    device_kind: str  # what jax calls the device
    arch: int | str  # what triton calls it
    warp_size: int
    shared_bytes: int  # the most that one program can have


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", "NVIDIA A100-SXM4-80GB", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", "NVIDIA H100 80GB HBM3", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", "NVIDIA B200", 100, 32, 227 * 1024),
        Target("gfx942", "rocm", "gfx942", "gfx942", 64, 64 * 1024),
        Target("gfx950", "rocm", "gfx950", "gfx950", 64, 160 * 1024),
    )
}


ALIGNED = " {tt.divisibility = 32 : i32}"  # what Pallas says of every pointer
# Waits until the launches before are done; and a launch of few programs lets the one behind begin to wait at once (each
# program that says so takes half a nanosecond, and many take longer than is gained).
_ASM = '%{0} = tt.elementwise_inline_asm "griddepcontrol.{0}; // $0"'
_ASM += ' {{constraints = "=r", packed_element = 1 : i32, pure = false}} -> i32'
WAITING = f"""    {_ASM.format("wait")}
    %programs_x = tt.get_num_programs x : i32
    %programs_y = tt.get_num_programs y : i32
    %programs = arith.muli %programs_x, %programs_y : i32
    %few = arith.constant 512 : i32
    %are_few = arith.cmpi sle, %programs, %few : i32
    scf.if %are_few {{
      {_ASM.format("launch_dependents")}
    }}
"""
STRIDE = 1299709  # stands for a distance of rows that is passed at the launch: a prime, which nothing else is


@dataclass(frozen=True)
class Lowered:
    """One kernel as Triton IR, with what a launch needs to know."""

    name: str
    ttir: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    sizes: tuple[str, ...] = ()  # int32 arguments between the arrays that go in and those that come out
    outputs: int = 0  # which argument is the first of those
    dependent: bool = False  # it waits for the launch before, see below

    def waiting(self) -> Lowered:
        """The same as a dependent launch (CUDA from sm_90 on): it may be started before what precedes it is done.

        Before anything else it waits for that, so nothing changes but when the GPU begins to launch: the microsecond
        that a launch takes passes while the one before runs. Launched in the ordinary way it does not wait.
        """
        ttir, count = re.subn(r"( *tt\.func public @[^\n]*\{\n)", lambda found: found[1] + WAITING, self.ttir)
        if count != 1:
            raise RuntimeError(f"{self.name}: this jax ({jax.__version__}) writes functions otherwise than expected")
        return dataclasses.replace(self, ttir=ttir, dependent=True)

    def unaligned(self) -> Lowered:
        """The same for arrays that may begin anywhere; as it is, the kernel counts on multiples of 32 bytes."""
        if ALIGNED not in self.ttir:
            raise RuntimeError(f"{self.name}: this jax ({jax.__version__}) does not mark pointers with {ALIGNED!r}")
        return dataclasses.replace(self, ttir=self.ttir.replace(ALIGNED, ""))

    def with_stride(self, divisor: int) -> Lowered:
        """The same with the distance of rows, `STRIDE` as it is, as the last size: a multiple of `divisor`.

        Pallas writes it as a constant of 32 or 64 bits wherever it computes an address; what comes out is checked.
        """
        declared = f"%arg{self.outputs}: !tt.ptr"
        name = "%arg1000"  # `binary` reads the arguments off their names
        ttir, count = re.subn(rf"arith\.constant {STRIDE} : i32\b", f"arith.ori {name}, {name} : i32", self.ttir)
        ttir, wide = re.subn(rf"arith\.constant {STRIDE} : i64\b", f"arith.extsi {name} : i32 to i64", ttir)
        if not count + wide or ttir.count(declared) != 1 or re.search(rf"(?<!%c){STRIDE}", ttir):
            raise RuntimeError(f"this jax ({jax.__version__}) writes the stride otherwise than expected:\n{ttir}")
        argument = f"{name}: i32 {{tt.divisibility = {divisor} : i32}}, {declared}"
        return dataclasses.replace(self, ttir=ttir.replace(declared, argument), sizes=(*self.sizes, "stride"))


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes.

    `registers` are those of a thread (vector registers on ROCm). `spills` says what did not fit into them: on CUDA the
    instructions that load or store local memory (Triton declares no local arrays; the stack frame that the cubin names
    is no measure, some frames are never touched), on ROCm the number of registers.
    """

    machine_code_bytes: int
    registers: int
    spills: int
    shared_bytes: int


@dataclass(frozen=True)
class Binary:
    """One kernel's machine code, with what a driver needs to launch it."""

    name: str
    code: bytes
    threads: int  # of a program
    shared_bytes: int
    own: str  # the arguments it is passed, in struct's letters: "Q" an address, "i" an int32
    arguments: str  # and those that triton adds behind them, null
    sizes: tuple[str, ...]
    dependent: bool = False  # to be launched as `Lowered.waiting` says


def target_for(name: str, shared_bytes: int | None = None) -> Target:
    """The target of that name; a CUDA device that is none of `TARGETS` is taken for the nearest older one's kind.

    Raises ValueError where the kernels do not run: CUDA before sm_80, and AMD GPUs other than those in `TARGETS`.
    """
    if name in TARGETS:
        return TARGETS[name]
    cuda = {int(t.arch): t for t in TARGETS.values() if t.platform == "cuda"}
    older = [arch for arch in cuda if name.startswith("sm_") and arch <= int(name.removeprefix("sm_"))]
    if not older:
        raise ValueError(f"target: expected one of {tuple(TARGETS)} or a newer CUDA device, got {name!r}")
    kind = cuda[max(older)]
    arch = int(name.removeprefix("sm_"))
    return dataclasses.replace(kind, name=name, arch=arch, shared_bytes=shared_bytes or kind.shared_bytes)


def waits(target: Target) -> bool:
    """Whether kernels for this target can be `Lowered.waiting`."""
    return target.platform == "cuda" and int(target.arch) >= 90


def custom_call_target() -> str:
    """What a Pallas kernel is called in a lowered computation."""
    return getattr(plgpu, "CUSTOM_CALL_TARGET_NAME", "__gpu$xla.gpu.triton")  # public from jax 0.11.1 on


def _decode(bytecode: bytes) -> str:
    from jaxlib.triton import dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        return str(ir.Module.parse(bytecode).operation.get_asm(assume_verified=True))


def _as_numbers(ttir: str, first: int, count: int) -> str:
    """The kernel with `count` arguments from `first` on, arrays of one int32 each, taken as numbers.

    Each is read once, by a `tt.addptr` and a `tt.load` (`launch.runtime_sizes`), or never, if nothing depends on it. A
    later jax may write that otherwise, so what comes out is checked.
    """
    for name in (f"%arg{i}" for i in range(first, first + count)):
        ttir, declared = re.subn(re.escape(f"{name}: !tt.ptr<i32>{ALIGNED}"), f"{name}: i32", ttir)
        ttir, read = re.subn(
            rf"%\w+ = tt\.addptr {name}, %\w+ : !tt\.ptr<i32>, i32\n *(%\w+) = tt\.load %\w+ : !tt\.ptr<i32>\n",
            rf"\1 = arith.ori {name}, {name} : i32\n",
            ttir,
        )
        if (declared, read, len(re.findall(rf"{name}\b", ttir))) not in ((1, 1, 3), (1, 0, 1)):
            raise RuntimeError(f"this jax ({jax.__version__}) writes the size {name} otherwise than expected:\n{ttir}")
    return ttir


@functools.cache
def _host() -> Any:
    """A CPU device of its own.

    jax asks for some device even to lower for an abstract one, and would start all of its backends, the GPU's with most
    of the GPU's memory. (Before jax 0.11 Pallas does that nevertheless.)
    """
    from jaxlib import xla_client

    client: Any = xla_client.make_cpu_client()
    return client.devices()[0]


def lower(fn: Callable[..., Any], *args: Any, target: str | Target, sizes_at_run_time: bool = False) -> list[Lowered]:
    """The kernels that `jax.jit(fn)(*args)` launches on `target`, in order. `args` may be shapes (ShapeDtypeStruct).

    With `sizes_at_run_time` what depends on the number of rows is not built into a kernel, but passed to it.
    """
    t = target if isinstance(target, Target) else TARGETS[target]
    device = jax.sharding.AbstractDevice(device_kind=t.device_kind, platform=t.platform, num_cores=None)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    sizes: list[tuple[int, tuple[str, ...]]] = []
    reading = runtime_sizes() if sizes_at_run_time else nullcontext(sizes)
    room = shared_memory(t.shared_bytes)
    with jax.sharding.use_abstract_mesh(mesh), jax.default_device(_host()), room, reading as sizes:
        traced = jax.jit(lambda *args: fn(*args)).trace(*args)  # a function of its own: jax remembers what it traced
        lowered = traced.lower(lowering_platforms=(t.platform,))
    found: list[Lowered] = []

    def visit(op: Any) -> Any:
        is_call = op.name == "stablehlo.custom_call"
        if is_call and ir.StringAttr(op.attributes["call_target_name"]).value == custom_call_target():
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            number = lambda key: ir.IntegerAttr(config[key]).value
            first, names = sizes[len(found)] if sizes else (0, ())
            found.append(
                Lowered(
                    name=ir.StringAttr(config["name"]).value,
                    ttir=_as_numbers(_decode(ir.StringAttr(config["ir"]).value_bytes), first, len(names)),
                    sizes=names,
                    outputs=first + len(names),
                    grid=(number("grid_x"), number("grid_y"), number("grid_z")),
                    num_warps=number("num_warps"),
                    num_stages=number("num_stages"),
                )
            )
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


def _simplified(path: Path, gpu: Any, options: dict[str, Any]) -> str:
    """The Triton IR after triton's own passes over it, which `triton.compile` leaves out for IR that comes in a file.

    One of them makes dot(a, b, total) of Pallas' total + dot(a, b, 0): without it tensor cores wait for each product.
    """
    from triton._C.libtriton import ir as triton_ir
    from triton.backends.compiler import Language
    from triton.compiler.compiler import make_backend

    backend, context = make_backend(gpu), triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(path), context)
    module.context = context
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, backend.parse_options(dict(options)), Language.TRITON)
    return str(stages["ttir"](module, {}))


_POLICY = re.compile(
    r" evictionPolicy = (\w+) :| \{cachePolicy = #tt\.cache_policy<cache_modifier = none, eviction_policy = (\w+)>\} :"
)


def _with_policies(ttir: str, version: str) -> str:
    """How long the cache keeps what is loaded or stored, as this triton writes it: otherwise from 3.9 on."""
    said = " evictionPolicy = {} :"
    major, minor = re.findall(r"\d+", version)[:2]
    if (int(major), int(minor)) >= (3, 9):
        said = " {{cachePolicy = #tt.cache_policy<cache_modifier = none, eviction_policy = {}>}} :"
    ttir, found = _POLICY.subn(lambda match: said.format(match[1] or match[2]), ttir)
    if found != len(re.findall(r"evict_\w+", ttir)):
        raise RuntimeError(f"this jax ({jax.__version__}) writes cache policies otherwise than expected:\n{ttir}")
    return ttir


def compile_kernel(kernel: Lowered, target: str | Target, **options: Any) -> Any:
    """Compiles for `target` with the installed triton, GPU or not; returns triton's compiled kernel.

    `options` are further ones of triton's. Raises RuntimeError where the kernel needs more shared memory than the
    target has, which no compiler notices before the launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    t = target if isinstance(target, Target) else TARGETS[target]
    gpu = GPUTarget("cuda" if t.platform == "cuda" else "hip", t.arch, t.warp_size)
    # Multiplications and additions are fused: triton's default up to 3.9, said aloud because 3.10 turns it around.
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True, **options}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel.name}.ttir"
        path.write_text(_with_policies(kernel.ttir, triton.__version__))
        # Without the folder's name in it, so that triton knows it again and takes its code from its own cache.
        path.write_text(_simplified(path, gpu, options).replace(f"{folder}/", ""))
        compiled = triton.compile(str(path), target=gpu, options=options)
    if compiled.metadata.shared > t.shared_bytes:
        raise RuntimeError(
            f"{kernel.name} needs {compiled.metadata.shared} bytes of shared memory, {t.name} has {t.shared_bytes}"
        )
    return compiled


def binary(kernel: Lowered, compiled: Any) -> Binary:
    """What `compile_kernel` returned, without triton; its arguments are read off the code and checked."""
    metadata = compiled.metadata
    if "cubin" in compiled.asm:
        entry = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        code, sizes = compiled.asm["cubin"], re.findall(r"\.param \.[ub](32|64)", entry)
    else:
        entries = re.findall(r"\.offset: .*\n\s*\.size: +(\d+)", compiled.asm["amdgcn"])
        code, sizes = compiled.asm["hsaco"], [str(8 * int(size)) for size in entries]
    arguments = "".join({"64": "Q", "32": "i"}[size] for size in sizes)
    declared = kernel.ttir[: kernel.ttir.index("{\n", kernel.ttir.index("tt.func"))]
    own = "".join("Q" if kind else "i" for kind in re.findall(r"%arg\d+: (?:(!tt\.ptr)|i32)", declared))
    scratch = sum(getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    if not own or not re.fullmatch(f"{own}Q*", arguments) or scratch:
        raise RuntimeError(
            f"{kernel.name}: triton made arguments {arguments!r} of {own!r}, with {scratch} bytes of scratch memory"
        )
    threads = metadata.num_warps * metadata.target.warp_size
    return Binary(metadata.name, code, threads, metadata.shared, own, arguments, kernel.sizes, kernel.dependent)


def report(compiled: Any) -> Report:
    """Machine-code size, registers, spills and shared memory, read off the compiled binary."""
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        code = compiled.asm["cubin"]
        registers, spills = _cubin_resources(code)
    else:
        code, text = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = sum(_number(rf"\.{kind}_spill_count:\s*(\d+)", text) for kind in ("vgpr", "sgpr"))
    return Report(_code_bytes(code), registers, spills, shared)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[:2000]!r}")
    return int(found[1])


def _code_bytes(elf: bytes) -> int:
    """The size of the sections that hold instructions, in a 64-bit little-endian ELF file (a cubin or a hsaco)."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    sections = (struct.unpack_from("<8xQ16xQ", elf, table + i * size) for i in range(count))
    executable = 4
    return sum(length for flags, length in sections if flags & executable)


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, instructions that touch local memory) of a cubin's kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name]).stdout
        code = run([knobs.nvidia.nvdisasm.path, "-c", file.name]).stdout
    if "EXIT" not in code:
        raise RuntimeError(f"nvdisasm printed no instructions: {code[:200]!r}")
    return _number(r"REG:(\d+)", usage), len(re.findall(r"\b(?:STL|LDL)\b", code))
