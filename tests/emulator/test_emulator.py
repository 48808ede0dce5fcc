"""The emulator itself, on PTX written by hand: every instruction here has a result that is known without it."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from tests.emulator import warp
from tests.emulator.arithmetic import operation
from tests.emulator.machine import Code, Record, launch
from tests.emulator.memory import POISON, Fault, Global

THREADS = 64
NAN, INF, TINY = 0x7FFFFFFF, 0x7F800000, 0x00000001


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def whole(body: str) -> str:
    """A kernel that reads %r1 to %r4 of each thread and writes its %r5."""
    return f"""
.version 8.0
.target sm_90
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u32 kernel_param_2
)
.reqntid {THREADS}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;
    .loc 1 2 0 // a comment; with a semicolon
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r8, [kernel_param_2];
    mov.u32 %r6, %tid.x;
    mov.u32 %r7, %ctaid.x;
    mad.lo.s32 %r0, %r7, {THREADS}, %r6;
    mad.wide.u32 %rd3, %r0, 16, %rd1;
    mad.wide.u32 %rd4, %r0, 4, %rd2;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd3 + 0];
    {body}
    st.global.b32 [%rd4], %r5;
    ret;
}} // -- End function
"""


def run(body: str, values: Any = (0, 0, 0, 0), *, programs: int = 1, shared: int = 256, number: int = 0) -> Any:
    """What each thread writes, and the record. `values`: %r1 to %r4, of all threads or of each."""
    given = np.ascontiguousarray(np.broadcast_to(np.asarray(values, np.uint32), (programs * THREADS, 4)))
    out = np.full(programs * THREADS, 0xA5A5A5A5, np.uint32)
    memory = Global()
    memory.add(given.ctypes.data, given.nbytes, 4, writable=False)
    memory.add(out.ctypes.data, out.nbytes, 4)
    code = Code(whole(body), shared, seed=1)
    record = launch(code, memory, (programs, 1), [given.ctypes.data, out.ctypes.data, number])
    return out, record


LOCAL = """.local .align 4 .b8 __local_depot0[8]; .reg .b64 %SP; .reg .b32 %SPL; mov.b32 %SPL, __local_depot0;
    cvt.u64.u32 %SP, %SPL; cvta.local.u64 %SP, %SP; mov.b32 {%rs1, %rs2}, %r1; st.b16 [%SP+2], %rs1;
    ld.b8 %rs3, [%SP+3]; cvt.u32.u16 %r5, %rs3;"""
ONE_THREAD: list[tuple[str, tuple[int, ...], int]] = [
    ("add.s32 %r5, %r1, %r2;", (0x7FFFFFFF, 1), 0x80000000),
    ("mul.lo.s32 %r5, %r1, %r2;", (0x10001, 0x10001), 0x20001),
    ("mul.hi.u32 %r5, %r1, %r2;", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.wide.s32 %rd5, %r1, %r2; mov.b64 {_, %r5}, %rd5;", (0xFFFFFFFF, 5), 0xFFFFFFFF),
    ("mul.wide.u32 %rd5, %r1, %r2; mov.b64 {_, %r5}, %rd5;", (0xFFFFFFFF, 5), 4),
    ("div.s32 %r5, %r1, %r2;", (0xFFFFFFF9, 2), 0xFFFFFFFD),  # -7 / 2 is -3
    ("rem.s32 %r5, %r1, %r2;", (0xFFFFFFF9, 2), 0xFFFFFFFF),
    ("shl.b32 %r5, %r1, %r2;", (1, 32), 0),
    ("shr.u32 %r5, %r1, %r2;", (0x80000000, 40), 0),
    ("shr.s32 %r5, %r1, %r2;", (0x80000000, 40), 0xFFFFFFFF),
    ("shf.l.wrap.b32 %r5, %r1, %r2, %r3;", (0x80000000, 1, 33), 3),
    ("shf.r.clamp.b32 %r5, %r1, %r2, %r3;", (7, 5, 40), 5),
    ("bfe.u32 %r5, %r1, 4, 8;", (0x12345678,), 0x67),
    ("bfe.s32 %r5, %r1, 28, 8;", (0x9ABCDEF0,), 0xFFFFFFF9),  # beyond the top is the sign
    ("bfe.s32 %r5, %r1, 0, 1;", (1,), 0xFFFFFFFF),
    ("mov.b64 %rd5, {%r1, %r2}; bfe.s64 %rd5, %rd5, 28, 8; mov.b64 {%r5, _}, %rd5;", (0x10000000, 9), 0xFFFFFF91),
    ("mov.b64 %rd5, {%r1, %r2}; bfe.s64 %rd5, %rd5, 60, 8; mov.b64 {_, %r5}, %rd5;", (0, 0x80000000), 0xFFFFFFFF),
    ("mov.b64 %rd5, {%r1, %r2}; bfe.s64 %rd5, %rd5, 0, 64; mov.b64 {_, %r5}, %rd5;", (5, 0x12345678), 0x12345678),
    ("bfi.b32 %r5, %r1, %r2, 8, 4;", (0xF5, 0xFFFFFFFF), 0xFFFFF5FF),
    ("prmt.b32 %r5, %r1, %r2, 0x5410U;", (0x33221100, 0x77665544), 0x55441100),
    ("prmt.b32 %r5, %r1, %r2, 0xB0;", (0x80, 0xFF000000), 0x80800080 & 0xFFFF | 0x80800000),
    ("lop3.b32 %r5, %r1, %r2, %r3, 0xE8;", (0b1100, 0b1010, 0b0110), 0b1110),  # the majority
    ("popc.b32 %r5, %r1;", (0xF0F0,), 8),
    ("clz.b32 %r5, %r1;", (0x00010000,), 15),
    ("brev.b32 %r5, %r1;", (0x1,), 0x80000000),
    ("neg.s32 %r5, %r1;", (0x80000000,), 0x80000000),
    ("max.s32 %r5, %r1, %r2;", (0xFFFFFFFF, 1), 1),
    ("min.u32 %r5, %r1, %r2;", (0xFFFFFFFF, 1), 1),
    ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r5, {%rs2, %rs1};", (0x12345678,), 0x56781234),
    ("cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r5, %rs1;", (0x18000,), 0xFFFF8000),
    ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (0xFFFFFFFF, 1), 2),
    ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (0xFFFFFFFF, 1), 1),
    ("setp.lt.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (NAN, bits(1)), 2),
    ("setp.ltu.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (NAN, bits(1)), 1),
    ("setp.ne.f32 %p1, %r1, %r1; selp.b32 %r5, 1, 2, %p1;", (NAN,), 2),
    ("setp.neu.f32 %p1, %r1, %r1; selp.b32 %r5, 1, 2, %p1;", (NAN,), 1),
    ("setp.nan.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (bits(1), 0xFFC00000), 1),
    ("setp.eq.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (bits(0.0), bits(-0.0)), 1),
    ("setp.eq.b32 %p1, %r1, 0; setp.ne.and.b32 %p2, %r2, 0, %p1; selp.b32 %r5, 1, 2, %p2;", (0, 7), 1),
    ("mov.u32 %r5, 9; setp.eq.b32 %p1, %r1, 0; @!%p1 mov.u32 %r5, 8;", (0,), 9),
    ("add.f32 %r5, %r1, %r2;", (INF, bits(-np.inf)), NAN),  # not x86's, which is negative
    ("mul.f32 %r5, %r1, %r2;", (0xFFC12345, bits(1)), NAN),  # nor is what NaN carries kept
    ("add.f32 %r5, %r1, %r2;", (TINY, TINY), 2),
    ("add.ftz.f32 %r5, %r1, %r2;", (TINY, bits(-0.0)), 0),
    ("max.f32 %r5, %r1, %r2;", (NAN, bits(-3)), bits(-3)),
    ("max.NaN.f32 %r5, %r1, %r2;", (NAN, bits(-3)), NAN),
    ("max.f32 %r5, %r1, %r2;", (bits(-0.0), bits(0.0)), bits(0.0)),
    ("min.f32 %r5, %r1, %r2;", (bits(0.0), bits(-0.0)), bits(-0.0)),
    # 1 + 2**-12 squared, less what float32 keeps of it: fused, the 2**-24 remains
    ("fma.rn.f32 %r5, %r1, %r1, %r2;", (bits(1 + 2**-12), bits(-(1 + 2**-11))), bits(2**-24)),
    # 1 + 2**-24 + 2**-60, just above the middle between two: rounding in float64 first would lose it
    ("fma.rn.f32 %r5, %r1, %r2, %r3;", (bits(2**-30), bits(2**-30), bits(1)), bits(1)),
    ("fma.rn.f32 %r5, %r1, %r2, %r3;", (bits(1 + 2**-23), bits(2**-24), bits(1)), bits(1 + 2**-23)),
    ("fma.rm.ftz.f32 %r5, %r1, %r2, %r3;", (bits(1 + 2**-23), bits(2**-24), bits(1)), bits(1)),
    ("fma.rm.ftz.f32 %r5, %r1, %r2, %r3;", (bits(-(2**-30)), bits(2**-30), bits(1)), bits(1 - 2**-24)),
    ("abs.ftz.f32 %r5, %r1;", (bits(-2.5),), bits(2.5)),
    ("neg.f32 %r5, %r1;", (0,), bits(-0.0)),
    ("ex2.approx.ftz.f32 %r5, %r1;", (bits(-np.inf),), 0),
    ("ex2.approx.ftz.f32 %r5, %r1;", (bits(-0.0),), bits(1)),
    ("ex2.approx.ftz.f32 %r5, %r1;", (bits(-140),), 0),
    ("rcp.approx.ftz.f32 %r5, %r1;", (bits(-0.0),), bits(-np.inf)),
    ("rsqrt.approx.ftz.f32 %r5, %r1;", (bits(np.inf),), 0),
    ("rsqrt.approx.ftz.f32 %r5, %r1;", (bits(-1),), NAN),
    ("div.full.f32 %r5, %r1, %r2;", (0, 0), NAN),
    ("div.rn.f32 %r5, %r1, %r2;", (bits(1), bits(3)), bits(1 / 3)),
    ("sqrt.rn.f32 %r5, %r1;", (bits(2),), bits(2**0.5)),
    ("cvt.ftz.sat.f32.f32 %r5, %r1;", (NAN,), 0),
    ("fma.rn.sat.f32 %r5, %r1, %r2, %r3;", (bits(3), bits(0.25), bits(-0.5)), bits(0.25)),
    ("fma.rn.sat.f32 %r5, %r1, %r2, %r3;", (bits(9), bits(0.25), bits(-0.5)), bits(1)),
    ("fma.rn.sat.f32 %r5, %r1, %r2, %r3;", (bits(-9), bits(0.25), bits(0.5)), 0),
    ("fma.rn.sat.f32 %r5, %r1, %r2, %r3;", (NAN, bits(0.25), bits(0.5)), 0),
    ("cvt.ftz.sat.f32.f32 %r5, %r1;", (bits(7),), bits(1)),
    ("cvt.rzi.s32.f32 %r5, %r1;", (bits(-2.9),), 0xFFFFFFFE),
    ("cvt.rzi.s32.f32 %r5, %r1;", (bits(3e9),), 0x7FFFFFFF),
    ("cvt.rzi.u32.f32 %r5, %r1;", (NAN,), 0),
    ("cvt.rmi.f32.f32 %r5, %r1;", (bits(-2.1),), bits(-3)),
    ("cvt.rn.f32.s32 %r5, %r1;", (0xFEFFFFFF,), bits(-16777216.0)),  # a tie to even
    ("cvt.rn.bf16.f32 %rs1, %r1; cvt.u32.u16 %r5, %rs1;", (0x3F808000,), 0x3F80),
    ("cvt.rn.bf16.f32 %rs1, %r1; cvt.u32.u16 %r5, %rs1;", (0x3F818000,), 0x3F82),
    ("cvt.rn.bf16.f32 %rs1, %r1; cvt.u32.u16 %r5, %rs1;", (0xFFC00000,), 0x7FFF),
    ("cvt.rn.bf16.f32 %rs1, %r1; cvt.u32.u16 %r5, %rs1;", (0x7F7FFFFF,), 0x7F80),
    ("cvt.rn.f16.f32 %rs1, %r1; cvt.u32.u16 %r5, %rs1;", (bits(65520),), 0x7C00),
    ("cvt.rn.bf16x2.f32 %r5, %r1, %r2;", (bits(1), bits(2)), 0x3F804000),  # the first one above
    ("cvt.rn.f16x2.f32 %r5, %r1, %r2;", (bits(1), bits(2)), 0x3C004000),
    ("mov.b32 {%rs1, %rs2}, %r1; cvt.f32.bf16 %r5, %rs2;", (0x40400000,), bits(3)),
    ("mov.b32 {%rs1, %rs2}, %r1; cvt.f32.f16 %r5, %rs1;", (0x3C00,), bits(1)),
    ("mov.b32 {%rs1, %rs2}, %r1; setp.nan.bf16 %p1, %rs1, %rs2; selp.b32 %r5, 1, 2, %p1;", (0x7FC03F80,), 1),
    (
        "setp.lt.bf16x2 %p1|%p2, %r1, %r2; selp.b32 %r5, 1, 0, %p1; @%p2 add.s32 %r5, %r5, 2;",
        (0x40003F80, 0x40004000),
        1,
    ),
    ("setp.lt.u32 %p1|%p2, %r1, 5; selp.b32 %r5, 1, 0, %p1; @%p2 add.s32 %r5, %r5, 2;", (9,), 2),
    ("mov.b32 {_, %rs1}, %r1; sub.rn.f32.bf16 %r5, %rs1, %r2;", (0x40400000, bits(1)), bits(2)),
    ("mov.b32 {_, %rs1}, %r1; fma.rn.f32.bf16 %r5, %rs1, %rs1, %r2;", (0x40400000, bits(1)), bits(10)),
    ("max.f32 %r5, %r1, %r2, %r3;", (bits(-1), NAN, bits(-2)), bits(-1)),
    ("mov.b64 %rd5, {%r1, %r2}; add.f32x2 %rd5, %rd5, %rd5; mov.b64 {_, %r5}, %rd5;", (0, bits(1)), bits(2)),
    ("add.s16x2 %r5, %r1, -1;", (0x00010001,), 0),
    ("redux.sync.max.f32 %r5, %r1, -1;", (bits(-1),), bits(-1)),
    ("add.s16x2 %r5, %r1, %r2;", (0x0001FFFF, 0x00020002), 0x00030001),
    (
        LOCAL,
        (0x1234,),
        0x12,
    ),
    ("mov.b32 %r5, 0f3FB8AA3B;", (), 0x3FB8AA3B),
    ("{ .reg .b32 %r<19>; mov.u32 %r5, -1; }", (), 0xFFFFFFFF),
]


@pytest.mark.parametrize(
    ("body", "values", "want"), ONE_THREAD, ids=[" ".join(body.split()) for body, *_ in ONE_THREAD]
)
def test_one_thread(body: str, values: tuple[int, ...], want: int) -> None:
    out, _ = run(body, (*values, 0, 0, 0, 0)[:4])
    assert [hex(x) for x in np.unique(out)] == [hex(want)]


def test_fma_rounds_once() -> None:
    """Against exact fractions, for numbers that cancel and numbers that do not."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(500).astype(np.float32) for _ in range(2))
    c = np.where(rng.random(500) < 0.5, -(a * b), rng.standard_normal(500).astype(np.float32) * np.float32(1e-4))
    got = operation("fma.rn.f32", 0).function(a, b, c)
    for x, y, z, found in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(found)) - exact)
        for other in (np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf))):
            assert error <= abs(Fraction(float(other)) - exact)


def test_approximate_functions_are_off_a_little_and_always_the_same() -> None:
    x = np.linspace(-20, 20, 4001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    first, again, other = (operation("ex2.approx.ftz.f32", seed).function(x) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    error = np.abs(first / exact - 1)
    assert 2**-24 < error.max() <= 2**-22.5 + 2**-24  # and one rounding


def test_warp() -> None:
    lane = np.arange(THREADS, dtype=np.uint32) % 32
    values = np.stack([np.arange(THREADS), lane ^ 5, lane, lane], axis=1)
    ours = np.arange(THREADS) // 32 * 32
    for body, want in {
        "redux.sync.max.s32 %r5, %r1, 0xffffffff;": ours + 31,
        "redux.sync.add.s32 %r5, %r3, -1;": np.full(THREADS, 496),
        "redux.sync.min.u32 %r5, %r1, -1;": ours,
        "shfl.sync.bfly.b32 %r5, %r1, 3, 31, -1;": ours + (lane ^ 3),
        "shfl.sync.up.b32 %r5, %r1, 1, 0, -1;": ours + np.maximum(lane, 1) - 1,
        "shfl.sync.down.b32 %r5, %r1, 2, 0x181f, -1;": ours + np.where(lane % 8 < 6, lane + 2, lane),
        "shfl.sync.idx.b32 %r5, %r1, %r2, 31, -1;": ours + (lane ^ 5),
        "shfl.sync.up.b32 %r5|%p1, %r1, 1, 0, -1; selp.b32 %r5, 1, 0, %p1;": lane > 0,
        "setp.lt.u32 %p1, %r3, 3; vote.sync.ballot.b32 %r5, %p1, -1;": np.full(THREADS, 7),
    }.items():
        out, _ = run(body, values)
        np.testing.assert_array_equal(out, want, err_msg=body)


def test_each_goes_its_own_way() -> None:
    """A loop that every thread leaves at another time, and a branch after which all meet."""
    body = """mov.u32 %r5, 0;
    $L__BB0_1: add.s32 %r5, %r5, 3; setp.le.u32 %p1, %r5, %r6; @%p1 bra $L__BB0_1;
    setp.gt.u32 %p2, %r6, 9; @%p2 bra $L__BB0_3; add.s32 %r5, %r5, 1000; bra.uni $L__BB0_3;
    $L__BB0_3: redux.sync.max.u32 %r9, %r5, -1; mad.lo.s32 %r5, %r9, 10000, %r5;"""
    out, record = run(body, programs=3)
    thread = np.tile(np.arange(THREADS), 3)
    each = thread // 3 * 3 + 3 + np.where(thread > 9, 0, 1000)
    np.testing.assert_array_equal(out, each.reshape(-1, 32).max(axis=1).repeat(32) * 10000 + each)
    assert isinstance(record, Record)
    assert len(set(record.by_program)) == 1
    assert record.by_program.sum() == record.by_instruction.sum()


def test_shared_memory_and_barrier() -> None:
    body = """shl.b32 %r9, %r6, 2; mov.b32 %r10, global_smem; add.s32 %r11, %r10, %r9; st.shared.b32 [%r11], %r6;
    bar.sync 0; sub.s32 %r12, 63, %r6; shl.b32 %r12, %r12, 2; add.s32 %r12, %r10, %r12; ld.shared.b32 %r5, [%r12];"""
    out, _ = run(body)
    np.testing.assert_array_equal(out, np.arange(THREADS)[::-1])
    with pytest.raises(Fault, match="reads what"):
        run(body.replace("bar.sync 0;", ""))
    with pytest.raises(Fault, match="some threads"):
        run(body.replace("bar.sync 0;", "setp.eq.b32 %p1, %r6, 3; @%p1 bar.sync 0;"))
    with pytest.raises(Fault, match="of the 255 that there are"):
        run(body, shared=255)
    out, _ = run("mov.b32 %r10, global_smem; ld.shared.b32 %r5, [%r10 + 4];")
    assert set(out) == {POISON * 0x01010101}, "nobody wrote it"


def test_changes_of_shared_memory() -> None:
    """Variables there, and what threads add or join atomically: a barrier has to stand before and behind."""
    body = """.shared .align 4 .b32 first[1]; .shared .align 4 .b32 second[64];
    mov.u32 %r9, second; shl.b32 %r10, %r6, 2; add.s32 %r10, %r9, %r10; st.shared.b32 [%r10], 0; bar.sync 0;
    shl.b32 %r11, %r1, %r6; red.shared.or.b32 [%r9], %r11; red.shared.add.u32 [%r9+4], 3; bar.sync 0;
    ld.shared.b32 %r11, [%r9]; ld.shared.b32 %r12, [%r9+4]; add.s32 %r5, %r11, %r12;"""
    out, _ = run(body, (5, 0, 0, 0), programs=2, shared=4)
    assert set(out) == {3 * THREADS - 1}
    for without in (1, 2):
        parts = body.split("bar.sync 0;")
        parts[without - 1 : without + 1] = [parts[without - 1] + parts[without]]
        with pytest.raises(Fault, match="changes what 0 wrote" if without == 1 else "reads what -3 wrote"):
            run("bar.sync 0;".join(parts))
    read_before = "ld.shared.b32 %r12, [%r9+4]; red.shared.or.b32 [%r9], %r11;"
    with pytest.raises(Fault, match=r"changes what .* read"):
        run(body.replace("red.shared.or.b32 [%r9], %r11;", read_before))
    with pytest.raises(Fault, match="of the 272 that there are"):
        run(body.replace("ld.shared.b32 %r11, [%r9];", "ld.shared.b32 %r11, [%r9+256];"), shared=0)
    with pytest.raises(NotImplementedError, match="first is declared twice"):
        run(body.replace("second[64]", "first[64]"))


def test_asynchronous_copies_arrive_when_they_are_waited_for() -> None:
    body = """shl.b32 %r9, %r6, 4; mov.b32 %r10, global_smem; add.s32 %r9, %r10, %r9;
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x10, %r8; cp.async.commit_group; WAIT
    ld.shared.b32 %r5, [%r9];"""
    waits = {"cp.async.wait_group 0;": 7, "cp.async.wait_group 1;": 0xA5A5A5A5, "": 0xA5A5A5A5}
    for wait, want in waits.items():
        out, _ = run(body.replace("WAIT", wait), (7, 0, 0, 0), shared=1024, number=16)
        assert set(out) == {want}
    out, _ = run(body.replace("WAIT", "cp.async.wait_group 0;"), (7, 0, 0, 0), shared=1024, number=0)
    assert set(out) == {0}, "what is not to be read is zero"


def test_atomic_additions() -> None:
    """Each is seen by the next, whichever program makes it."""
    out, _ = run("atom.global.gpu.acq_rel.add.u32 %r9, [ %rd2 + 0 ], %r1; bra.uni $L__BB0_9; $L__BB0_8: "
                 "st.global.b32 [%rd4], %r5; $L__BB0_9: ret;", (2, 0, 0, 0), programs=5)  # fmt: skip
    assert int(out[0]) == (0xA5A5A5A5 + 2 * 5 * THREADS) % 2**32


def test_what_a_kernel_must_not_do() -> None:
    for body, message in {
        "add.s64 %rd4, %rd4, 4;": "in no tensor",
        "add.s64 %rd4, %rd4, 2;": "no multiple of 4",
        "ld.global.v2.b32 {%r5, %r9}, [%rd3 + 4];": "no multiple of 8",
        "mov.u64 %rd4, %rd3;": "only to be read",
        "mov.u64 %rd4, %rd2; mov.u32 %r5, %r6;": "different values",
        "setp.lt.u32 %p1, %r6, 40; @%p1 redux.sync.max.s32 %r5, %r1, -1;": "do not reach",
    }.items():
        with pytest.raises(Fault, match=message) as caught:
            run(body)
        assert "kernel, instruction" in caught.value.__notes__[0]
    # Two programs, of which nobody knows which comes first.
    for body in ("mov.u64 %rd4, %rd2; mov.u32 %r5, %r7;", "ld.global.b32 %r5, [%rd2 + 8]; not.b32 %r5, %r5;"):
        with pytest.raises(Fault, match=r"different values|overwrites what"):
            run(body, programs=2)


def test_a_kernel_waits_before_it_reads() -> None:
    """`whole` reads before its body; a kernel that waits for the launch before it must not have done so."""
    with pytest.raises(Fault, match=r"ld.global.v4.b32 before the wait"):
        run("griddepcontrol.wait;")
    assert run("griddepcontrol.launch_dependents; mov.b32 %r5, 7;")[0][0] == 7


POLICY = "createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0;"


def test_cache_policy() -> None:
    """It changes nothing, but has to be one."""
    load = "ld.global.L1::evict_first.L2::cache_hint.b32 { %r5 }, [ %rd3 + 4 ], %rd5;"
    assert run(f"{POLICY} {load}", (1, 7, 0, 0))[0][0] == 7
    with pytest.raises(Fault, match="under no policy"):
        run(f"{POLICY} add.s64 %rd5, %rd5, 1; {load}")


@pytest.mark.parametrize(
    "text",
    [
        "createpolicy.fractional.L2::evict_last.b64 %rd5, 1.0;",
        "createpolicy.fractional.L2::evict_first.b64 %rd5, 0.5;",
        "wgmma.fence;",
        "add.cc.u32 %r5, %r1, %r2;",
        "cvt.rz.bf16.f32 %rs1, %r1;",
        "mov.u32 %r5, %clock;",
        "redux.sync.max.s32 %r5, %r1, 0x0000ffff;",
        "ld.const.b32 %r5, [%r1];",
        "bar.sync 1;",
    ],
)
def test_what_is_not_known_is_not_skipped(text: str) -> None:
    with pytest.raises(NotImplementedError):
        run(text)


@pytest.mark.parametrize("kind", ["bf16", "f16", "s8"])
def test_matrix_product(kind: str) -> None:
    """The layouts as the manual's tables give them, element by element, not as the code computes them."""
    rng = np.random.default_rng(3)
    run_, depth = (4, 32) if kind == "s8" else (2, 16)
    if kind == "s8":
        left, right = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, depth), (depth, 8)))
        start = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
        want = np.clip(left.astype(np.int64) @ right.astype(np.int64) + start, -(2**31), 2**31 - 1).astype(np.int32)
        code = "b"
    else:
        left, right = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((16, depth), (depth, 8)))
        start = rng.integers(-9, 9, (16, 8)).astype(np.float32)
        want, code = left @ right + start, "e"
    cast = (lambda x: x) if kind == "s8" else (lambda x: x.astype(np.float16)) if kind == "f16" else None

    def packed(values: list[Any]) -> int:
        if cast is None:
            halves = [int(np.float32(v).view(np.uint32)) >> 16 for v in values]
            return halves[0] | halves[1] << 16
        return int(struct.unpack("<I", struct.pack(f"<{len(values)}{code}", *(cast(np.asarray(v)) for v in values)))[0])

    a, b, c = np.zeros((4, 1, 32), np.uint32), np.zeros((2, 1, 32), np.uint32), np.zeros((4, 1, 32), np.uint32)
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for i, (down, along) in enumerate(((0, 0), (8, 0), (0, depth // 2), (8, depth // 2))):
            columns = [place * run_ + along + j for j in range(run_)]
            a[i, 0, lane] = packed([left[group + down, k] for k in columns])
        for i in range(2):
            b[i, 0, lane] = packed([right[place * run_ + i * depth // 2 + j, group] for j in range(run_)])
        for i in range(4):
            row, column = group + 8 * (i // 2), place * 2 + i % 2
            c[i, 0, lane] = start[row, column].view(np.uint32)
    matrices = warp.left(kind, list(a)), warp.right(kind, list(b))
    got = warp.add_product(kind, *matrices, list(c), saturate=True)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2
            assert got[i][0, lane].view(want.dtype) == want[row, column]


def test_matrices_in_shared_memory() -> None:
    """Each thread gets two neighbours of row lane // 4, transposed of column lane // 4; stores undo loads."""
    matrix = np.arange(64, dtype=np.uint16).reshape(1, 8, 8)
    (plain,), (turned,) = warp.from_rows([matrix], False), warp.from_rows([matrix], True)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        assert plain[0, lane] == int(matrix[0, row, column]) | int(matrix[0, row, column + 1]) << 16
        assert turned[0, lane] == int(matrix[0, column, row]) | int(matrix[0, column + 1, row]) << 16
    for transposed in (False, True):
        (again,) = warp.to_rows(warp.from_rows([matrix], transposed), transposed)
        np.testing.assert_array_equal(again, matrix)
