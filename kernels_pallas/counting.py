"""How often a number occurs among those of a program, and how often before: `histogram`, `places`.

On CUDA the threads count in shared memory, for which Pallas has no name, so in inline assembly (`assembly`). Then all
threads of the program must come by together, which nobody tells LLVM: it may double what stands in a loop, to unroll it
or where a condition of a thread divides it. So these must stand in no loop. Elsewhere, on ROCm and in the interpreter,
numbers are compared or multiplied, which takes some ten times as many instructions.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.launch import iota, next_power_of_2, plgpu

LOW = 16  # the base in which numbers have two digits
STRIP = 128  # numbers of one product
BITS = 32  # of a word
STATIC = 40 * 1024  # bytes of shared memory, at most: Triton adds some, and more than 48 have to be asked for


def tally(total: jax.Array, number: jax.Array) -> jax.Array:
    """Adds to counts: total [n, LOW], that of i * LOW + j at (i, j); other numbers are not counted.

    One product of matrices of 0 and 1, the high digits by the low ones: tensor cores count.
    """
    high = (number // LOW)[None, :] == iota((total.shape[0], number.shape[0]), 0)
    low = (number & (LOW - 1))[None, :] == iota((LOW, number.shape[0]), 0)
    return total + jax.lax.dot_general(
        high.astype(jnp.int8),
        low.astype(jnp.int8),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32,
    )


class _Assembly:
    """PTX of one thread for all its elements of some arrays, with `words` of shared memory, cleared, and a barrier.

    The memory is declared outside the braces, so that the assembler refuses a program that has this twice: where Triton
    laid an element out on several threads, its result would be wrong.
    """

    def __init__(self, words: int, length: int, num_warps: int, *, arrays: int) -> None:
        self.threads = num_warps * 32
        assert length % self.threads == 0, f"{length} elements for {self.threads} threads"
        self.pack, self.length, self.arrays = length // self.threads, length, arrays  # with the result
        self.lines = [
            f".shared .align 4 .b32 jaxmoe_words[{words}];",
            "{",
            ".reg .pred %in;",
            *(f".reg .b32 %{name};" for name in ("words", "at", "x", "y")),
            "mov.u32 %words, jaxmoe_words;",
        ]
        self._zero(0, words)

    def meet(self) -> None:
        """A barrier."""
        self.lines.append("bar.sync 0;")

    def clear(self, first: int, words: int) -> None:
        """So many words from the first on, which have been read."""
        self.meet()
        self._zero(first, words)

    def _zero(self, first: int, words: int) -> None:
        self.lines += ["mov.u32 %x, %tid.x;", "mad.lo.u32 %at, %x, 4, %words;"]
        for i in range(0, words, self.threads):
            if words - i < self.threads:
                self.lines.append(f"setp.lt.u32 %in, %x, {words - i};")
            guard = "@%in " * (words - i < self.threads)
            self.lines.append(f"{guard}st.shared.b32 [%at+{4 * (first + i)}], 0;")
        self.meet()

    def each(self, template: str) -> None:
        """Lines for every element; {0}, {1}, ... stand for the result and the arguments."""
        for i in range(self.pack):
            registers = [f"${i + j * self.pack}" for j in range(self.arrays)]
            self.lines += [line.strip().format(*registers) for line in template.strip().splitlines()]

    def __call__(self, *args: jax.Array) -> jax.Array:
        assert len(args) == self.arrays - 1
        operands = ["=&r"] * self.pack + ["r"] * (self.pack * len(args))
        (result,) = plgpu.elementwise_inline_asm(
            "\n".join([*self.lines, "}"]),
            args=args,
            constraints=",".join(operands),
            pack=self.pack,
            result_shape_dtypes=[jax.ShapeDtypeStruct((self.length,), jnp.int32)],
        )
        return result


def histogram(
    numbers: Callable[[jax.Array], jax.Array],
    size: int,
    bins: int,
    num_warps: int,
    assembly: bool,
    *,
    parts: int = 1,
) -> jax.Array:
    """int32 [at least bins]: how many of numbers(0), ..., numbers(size - 1) are each of 0 to bins - 1, then zeros.

    `size` and `parts` are powers of two; `numbers` says what stands at an array of indices [n], also beyond `size`: a
    negative number, which is not counted. With assembly they are read as so many arrays, and the result is as long as
    one of them, or as there are bins or threads, if these are more.
    """
    bins = next_power_of_2(bins)
    if not assembly:
        tile = (max(bins // LOW, LOW), LOW)
        step = lambda i, total: tally(total, numbers(i * STRIP + iota((STRIP,), 0)))
        total = jax.lax.fori_loop(0, max(size // STRIP, 1), step, jnp.zeros(tile, jnp.int32))
        return total.reshape(-1)
    length = max(size // parts, bins, num_warps * 32)
    count = _Assembly(bins, length, num_warps, arrays=parts + 2)
    for part in range(1, parts + 1):
        count.each(f"""
        setp.lt.u32 %in, {{{part}}}, {bins};
        mad.lo.u32 %at, {{{part}}}, 4, %words;
        @%in red.shared.add.u32 [%at], 1;""")
    count.meet()
    count.each(f"""
        mov.u32 {{0}}, 0;
        setp.lt.u32 %in, {{{parts + 1}}}, {bins};
        mad.lo.u32 %at, {{{parts + 1}}}, 4, %words;
        @%in ld.shared.b32 {{0}}, [%at];""")
    index = iota((length,), 0)
    return count(*(numbers(part * length + index) for part in range(parts)), index)


def places(number: jax.Array, first: jax.Array, size: int, bins: int, num_warps: int) -> jax.Array:
    """int32 [n], on CUDA: first[number] and how often the number stood before; -1 where it is negative.

    number, first [n], n a power of two from `bins` on; numbers, below `bins`, stand at the first `size` indices, a
    multiple of 32.
    """
    rows, bins = size // BITS, next_power_of_2(bins)
    some = bins  # numbers at a time
    while 4 * (bins + rows * some) > STATIC:
        some //= 2
    # `first`, and [rows, some]: a bit for each index
    place = _Assembly(bins + rows * some, number.shape[0], num_warps, arrays=4)
    place.each(f"""
        setp.lt.u32 %in, {{3}}, {bins};
        mad.lo.u32 %at, {{3}}, 4, %words;
        @%in st.shared.b32 [%at], {{2}};""")
    for low in range(0, bins, some):
        if low:
            place.clear(bins, rows * some)
        place.each(f"""
            sub.s32 %at, {{1}}, {low};
            setp.lt.u32 %in, %at, {some};
            shr.u32 %x, {{3}}, 5;
            mad.lo.u32 %at, %x, {some}, %at;
            mad.lo.u32 %at, %at, 4, %words;
            and.b32 %x, {{3}}, 31;
            shl.b32 %x, 1, %x;
            @%in red.shared.or.b32 [%at+{4 * bins}], %x;""")
        place.meet()
        if not low:
            place.each("""
                max.s32 %at, {1}, 0;
                mad.lo.u32 %at, %at, 4, %words;
                ld.shared.b32 {0}, [%at];""")
        place.each(
            f"""
            sub.s32 %at, {{1}}, {low};
            setp.lt.u32 %in, %at, {some};
            mad.lo.u32 %at, %at, 4, %words;"""
            + "".join(
                f"""
            mov.u32 %y, 0;
            @%in ld.shared.b32 %y, [%at+{4 * (bins + some * row)}];
            sub.s32 %x, {{3}}, {BITS * row}; // of these bits those below the index: all, some or none
            max.s32 %x, %x, 0;
            shl.b32 %x, 1, %x; // from 32 on 0
            sub.s32 %x, %x, 1;
            and.b32 %y, %y, %x;
            popc.b32 %y, %y;
            add.s32 {{0}}, {{0}}, %y;"""
                for row in range(rows)
            )
        )
    place.each("""
        setp.ge.s32 %in, {1}, 0;
        selp.b32 {0}, {0}, -1, %in;""")
    return place(number, first, iota(number.shape, 0))
