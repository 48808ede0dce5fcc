"""Counting instructions along the shortest path."""

from __future__ import annotations

import pytest

from benchmarks import instructions


def test_shortest() -> None:
    """A branch that may be taken or not, one that is always, and a guarded end that is none."""
    code = ["MOV", "@P0 EXIT", "@P1 BRA `(.L_x_1)", "ADD", "ADD", "ADD", "BRA `(.L_x_2)", "MUL", "EXIT", "NOP"]
    labels = {".L_x_1": 7, ".L_x_2": 8}
    assert instructions.shortest(code, labels) == 5, "MOV, EXIT not taken, BRA taken, MUL, EXIT"
    code[2] = "NOP"
    assert instructions.shortest(code, labels) == 8
    with pytest.raises(RuntimeError, match="no instruction that ends"):
        instructions.shortest(["MOV", "@P0 EXIT"], {})
