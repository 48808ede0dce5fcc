"""The reader of XLA's text sees every operation: a copy that it misses would pass for none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests import hlo


@pytest.mark.parametrize(
    ("line", "op"),
    [
        ("%x.1 = bf16[64,7168]{1,0} parameter(2), sharding={replicated}", "parameter"),
        ('ROOT %y = f32[] convert(%x), metadata={op_name="jit(f)/convert"}', "convert"),
        ("%s = (f32[8]{0}, f32[8]{0:S(5)}, u32[]) copy-start(f32[8]{0} %p)", "copy-start"),
        ("%d = f32[8]{0} copy-done((f32[8]{0}, f32[8]{0:S(5)}, u32[]) %s)", "copy-done"),
        ("%f = (f32[4]{0}, /*index=1*/s32[4]{0}) fusion(%a, %b), kind=kLoop, calls=%fused", "fusion"),
        ('%c = (f32[4,2]{1,0}, s32[4,2]{1,0}) custom-call(%a), custom_call_target="triton"', "custom-call"),
        ("%w = ((f32[2]{0}), (f32[2]{0}, f32[2]{0})) async-start(%a), calls=%wrapped", "async-start"),
        ("HloModule jit_f, entry_computation_layout={(f32[8]{0})->(f32[8]{0}, f32[8]{0})}", None),
        ("ENTRY %main.4 (p: f32[8]) -> (f32[8], f32[8]) {", None),
    ],
)  # fmt: skip
def test_ops_of_a_line(line: str, op: str | None) -> None:
    assert hlo.ops(line) == ({op} if op else set())


def test_ops_of_a_program() -> None:
    """XLA's own text: a cast that leaves a fusion as one of two results."""
    two = jax.jit(lambda x: (x.astype(jnp.bfloat16), jnp.sin(x)))
    seen = hlo.ops(two.lower(jnp.ones(8)).compile().as_text())
    assert seen >= {"parameter", "convert", "tuple"}
