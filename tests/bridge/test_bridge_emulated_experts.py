"""The experts' products in the emulator (tests/emulator/native.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bridge.native import experts
from tests import oracle
from tests.cases import BF16, normal
from tests.check_dispatch import rounding
from tests.check_plan import PlanCase
from tests.emulator.native import Emulator, array, plan

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("counts", "transposed"),
    [((7, 0, 30, 1), False), ((7, 0, 30, 1), True), ((70, 0, 60, 1), False)],
    ids=["", "transposed", "enough rows for four warps together"],
)
def test_grouped_matmul(counts: tuple[int, ...], transposed: bool, emulator: Emulator) -> None:
    """Rows of several experts, of none, and behind the last group; weights in either layout, and their gradient."""
    num_rows, owner = sum(counts) + 3, np.repeat(np.arange(4), counts)
    rows, weight = normal(0, num_rows, 72, dtype=BF16), normal(1, 4, 72, 40, dtype=BF16, scale=0.1)
    laid = emulator.put(np.asarray(weight).swapaxes(1, 2)).mT if transposed else emulator.put(weight)
    held, sizes = emulator.put(rows), emulator.put(np.array(counts, np.int32))
    out = emulator.empty(num_rows, 40, dtype=torch.bfloat16)
    experts.grouped_matmul(held, laid, sizes, out)
    want, left = np.zeros((num_rows, 40)), np.asarray(rows, np.float64)[: len(owner)]
    want[: len(owner)] = np.einsum("rk,rkn->rn", left, np.asarray(weight, np.float64)[owner])
    oracle.same(array(out), want, **rounding(BF16))

    up = normal(2, num_rows, 40, dtype=BF16)
    grad = emulator.empty(*((4, 40, 72) if transposed else (4, 72, 40)), dtype=torch.bfloat16)
    experts.grouped_outer(held, emulator.put(up), sizes, grad.mT if transposed else grad)
    right, products = np.asarray(up, np.float64)[: len(owner)], np.zeros((4, 72, 40))
    np.add.at(products, owner, left[:, :, None] * right[:, None, :])
    oracle.same(array(grad.mT if transposed else grad), products, rtol=rounding(BF16)["rtol"], atol=1e-4)


WRONG = [(-2, 3, 3), (3, -20, 5), (-(2**31), 2**31 - 1, 1), (9, 9, 9), (2**30, 2**30, 7), (2**31 - 1,) * 3]


@pytest.mark.parametrize("counts", WRONG, ids=str)
def test_wrong_sizes_reach_no_other_memory(counts: tuple[int, ...], emulator: Emulator) -> None:
    """Whatever sizes say, the emulator meets no address outside, and every weight has some gradient."""
    held, up = (emulator.put(normal(i, 12, width, dtype=BF16)) for i, width in ((0, 40), (1, 48)))
    weight, sizes = emulator.put(normal(2, 3, 40, 48, dtype=BF16)), emulator.put(np.array(counts, np.int32))
    grad, slots = emulator.empty(3, 40, 48, dtype=torch.bfloat16), emulator.put(np.arange(12, dtype=np.int32))
    experts.grouped_matmul(held, weight, sizes, emulator.empty(12, 48, dtype=torch.bfloat16))
    hidden = emulator.empty(12, 24, dtype=torch.bfloat16)
    experts.gated_matmul(held, weight, sizes, "silu", hidden, slots=slots, num_slots=1)
    experts.grouped_outer(held, up, sizes, grad)
    assert not grad.isnan().any()


@pytest.mark.parametrize("last", [140, 2**30], ids=["", "more rows than there are"])
def test_products_in_parts(last: int, emulator: Emulator) -> None:
    """More tiles of an expert's rows than take turns together, in whole tiles of columns; programs that are too many.

    Of those, one that took itself for another column would write into the rows that follow.
    """
    counts = np.array([140, 0, 1, *[0] * 60, last], np.int32)  # tiles of 16 rows: 9 in parts of 5 and 4, none, 1, 9
    owner = np.repeat([0, 2, 63], [140, 1, 140])
    rows, weight = normal(0, len(owner), 16, dtype=BF16), normal(1, 64, 16, 256, dtype=BF16, scale=0.2)
    held, laid, sizes = emulator.put(rows), emulator.put(weight), emulator.put(counts)
    out, hidden = (emulator.empty(len(owner), width, dtype=torch.bfloat16) for width in (256, 128))
    experts.grouped_matmul(held, laid, sizes, out)
    experts.gated_matmul(held, laid, sizes, "silu", hidden)
    want = np.einsum("rk,rkn->rn", np.asarray(rows, np.float64), np.asarray(weight, np.float64)[owner])
    oracle.same(array(out), want, **rounding(BF16))
    gate, up = np.split(want, 2, axis=1)
    oracle.same(array(hidden), gate / (1 + np.exp(-gate)) * up, **rounding(BF16))


@pytest.mark.parametrize(
    "how", [{}, {"extra": 8}, {"extra": 3}, {"offset": 1}], ids=["", "strided", "odd stride", "shifted"]
)
def test_gated_matmul_gathers(how: dict[str, int], emulator: Emulator) -> None:
    """Tokens that the product gathers, in high tiles and low last ones, as if they had been dispatched."""
    ids = np.array([[0, 2]] * 60 + [[2, -1]] * 9 + [[3, 0]], np.int32)  # 61 rows, 0, 69 and 1, padded
    found = plan(emulator, PlanCase("", 4, align=4, tokens=70, ids=lambda t, s: ids))
    x, gate_up = normal(0, 70, 40, dtype=BF16), normal(1, 4, 40, 48, dtype=BF16, scale=0.2)
    weight, sizes = emulator.put(gate_up), emulator.put(found.group_sizes)
    slots = emulator.put(found.slots, how.get("offset", 0))
    results = []
    for held, more in (
        (emulator.put(x, **how), {"slots": slots, "num_slots": 2}),
        (emulator.put(np.where(found.slots[:, None] >= 0, np.asarray(x)[found.slots // 2], 0).astype(BF16)), {}),
    ):
        outs = [emulator.empty(len(found.slots), n, dtype=torch.bfloat16) for n in (24, 48)]
        experts.gated_matmul(held, weight, sizes, "silu", *outs, **more)
        results.append(outs)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert float(results[0][1].float().abs().max()) > 1
