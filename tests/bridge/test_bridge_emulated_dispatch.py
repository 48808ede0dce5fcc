"""Kernels of the plan, dispatch and combine in the emulator (tests/emulator/native.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bridge.native import dispatch
from kernels_pallas import plan_dispatch as plan_kernels
from tests import oracle
from tests.cases import BF16, F16, F32, normal
from tests.check_dispatch import check_combine, check_dispatch, rounding
from tests.check_plan import PLAN_CASES, WAYS, PlanCase, blocks_length, check_blocks, drawn
from tests.emulator.native import FLOAT32, INT32, Emulator, array, plan, some

pytest.importorskip("triton")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> plan_kernels.Config:
    """Every way for every case, however few its pairs are."""
    config: plan_kernels.Config = WAYS[request.param]
    monkeypatch.setattr(plan_kernels, "config_for", lambda *args: config)
    return config


@pytest.mark.parametrize(
    "case",
    some(
        PLAN_CASES,
        {
            "no tokens, aligned",
            "one pair",
            "odd E",
            "more experts than pairs",
            "ids past the end",
            "all dropped, aligned",
            "aligned to 3",
            "aligned to 64",
            "expert map with -1",
            # Nothing is written behind the last row: no pair, no size, nothing that fills up.
            "cut within a group",
            "cut, aligned to 3",
            "cut to one",
            "cut, with an expert map, aligned",
            "cut, no tokens",
        },
    ),
)
def test_plan(case: PlanCase, way: plan_kernels.Config, emulator: Emulator) -> None:
    plan(emulator, case)
    plan(emulator, case, tokens=case.tokens + 70)
    assert len(emulator.records) == (2 if way.at_once else 4) * (case.tokens > 0)


@pytest.mark.parametrize(
    ("tokens", "case"),
    [
        (600, PlanCase("the two launches that many pairs take", 257, slots=9, ids=drawn(-1, 258))),
        (130, PlanCase("so many experts that a block's bits are counted in turns", 2048, slots=9, ids=drawn(-1, 2049))),
        (2000, PlanCase("chunks of which one is not full, and one without pairs", 3, slots=8, ids=drawn(-1, 4))),
        (256, PlanCase("as many pairs as one launch takes", 33, slots=16, ids=drawn(-1, 34))),
        (300, PlanCase("and with padding", 128, slots=8, align=128, ids=drawn(-1, 129))),
        (7, PlanCase("few pairs of 300 experts with padding", 300, slots=8, align=64)),
        (7, PlanCase("of so many that four warps count together on sm_90", 898, slots=8, align=16)),
        (600, PlanCase("two launches, cut", 257, slots=9, align=3, max_rows=1500, ids=drawn(-1, 258))),
        (300, PlanCase("two launches of many experts, cut", 1024, slots=9, max_rows=1000, ids=drawn(-1, 1024))),
        (300, PlanCase("one launch, cut, with padding", 128, slots=8, align=128, max_rows=1024, ids=drawn(-1, 129))),
    ],
    ids=lambda value: getattr(value, "why", ""),
)
def test_plan_as_configured(tokens: int, case: PlanCase, emulator: Emulator) -> None:
    plan(emulator, case, tokens)
    plan(emulator, case, tokens, offset=1)


@pytest.mark.in_ci(way="two launches")  # the same but for how blocks are counted
@pytest.mark.parametrize(
    ("case", "named"),
    [
        (PlanCase("no tokens", 5, tokens=0, align=4), False),
        (PlanCase("one token, odd E", 5, tokens=1, align=4), False),
        (PlanCase("ids out of range", 9, align=3, ids=drawn(-3, 12)), False),
        (PlanCase("more experts than pairs", 200, tokens=7, align=64), False),
        (PlanCase("some are elsewhere", 3, align=8, expert_map=(-1, 2, -1, 0, 1, -1)), False),
        (PlanCase("experts by name", 6, align=4, expert_map=(-1, 2, -1, 0, 1, -1)), True),
    ],
    ids=lambda value: getattr(value, "why", ""),
)
def test_align_blocks(case: PlanCase, named: bool, way: plan_kernels.Config, emulator: Emulator) -> None:
    for tokens, offset in ((case.tokens, 0), (case.tokens + 70, 1)):
        ids, expert_map = case.inputs(tokens)
        length = blocks_length(ids.size, case.num_experts, case.align)
        sizes = length, -(-length // case.align), 1
        outs = [emulator.empty(size, dtype=INT32, offset=offset) for size in sizes]
        here = None if expert_map is None else emulator.put(expert_map, offset)
        dispatch.align_blocks(emulator.put(ids, offset), case.num_experts, case.align, here, named, *outs)
        found = tuple(tensor.numpy() for tensor in outs)
        check_blocks(found, ids, case.num_experts, case.align, expert_map, named=named)


@pytest.mark.parametrize(("local", "offset"), [(13, 0), (5, 1)])
def test_permute_maps(local: int, offset: int, emulator: Emulator) -> None:
    found = plan(emulator, PlanCase("", 13, ids=drawn(-3, 16)))
    pairs, ends = found.slots.size, np.cumsum(found.group_sizes)[:local]
    outs = [emulator.empty(size, dtype=INT32, offset=offset) for size in (2 * local + 2, pairs, pairs)]
    offsets = outs[0].view(torch.int64) if offset == 0 else torch.empty(local + 1, dtype=torch.int64)
    if offset:
        emulator.add(offsets)
    dispatch.permute_maps(*(emulator.put(a, offset) for a in found), offsets, *outs[1:])
    np.testing.assert_array_equal(offsets.numpy(), [0, *ends])
    np.testing.assert_array_equal(outs[1].numpy(), np.where(found.rows < 0, pairs - 1, found.rows).reshape(-1))
    np.testing.assert_array_equal(outs[2].numpy(), np.where(found.slots < 0, pairs, found.slots))


DTYPES = {"bfloat16": (BF16, 8, 0), "float32, shifted": (F32, 24, 1), "float16, odd width": (F16, 37, 0)}


@pytest.mark.parametrize("tokens", [11, 1025], ids=["", "combined as many tokens are"])
@pytest.mark.parametrize("kind", DTYPES)
def test_dispatch_and_back(kind: str, tokens: int, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows out and back, with dropped pairs and rows that hold nothing; then both gradients' kernels."""
    config_for = dispatch.combine_kernels.config_for
    monkeypatch.setattr(dispatch.combine_kernels, "config_for", lambda _, *args: config_for(tokens, *args))
    dtype, width, offset = DTYPES[kind]
    case = PlanCase("", 5, align=4, tokens=11, ids=drawn(-1, 5))
    found = plan(emulator, case)
    places, slots = emulator.put(found.rows, offset), emulator.put(found.slots, offset)
    x, rows, dy = (normal(seed, n, width, dtype=dtype) for seed, n in enumerate((11, len(found.slots), 11)))
    held = emulator.put(x, offset, extra=0 if offset else 5)
    out = emulator.empty(*rows.shape, dtype=held.dtype, offset=offset)
    dispatch.dispatch(held, places, slots, None, out)
    check_dispatch(array(out), x, found)

    left = emulator.empty(*rows.shape, dtype=held.dtype, offset=offset).fill_(7.0)
    dispatch.dispatch(held, places, slots, None, left, clear=False)
    empty = found.slots < 0
    assert empty.any()
    assert (array(left)[empty] == 7.0).all()
    np.testing.assert_array_equal(array(left)[~empty], array(out)[~empty])

    weights = normal(7, *found.rows.shape)
    sums = emulator.empty(11, width, dtype=held.dtype, offset=offset)
    dispatch.combine(emulator.put(rows, offset), places, emulator.put(weights, offset), sums)
    check_combine(array(sums), rows, found, weights)

    end = emulator.add(torch.tensor([0, 3, 7])[2:], writable=False)  # rows from 7 on are left out
    dispatch.combine(emulator.put(rows, offset), places, emulator.put(weights, offset), sums, end)
    check_combine(array(sums), rows, found._replace(rows=np.where(found.rows < 7, found.rows, -1)), weights)

    scaled = emulator.empty(*rows.shape, dtype=held.dtype, offset=offset)
    dispatch.dispatch(emulator.put(dy, offset), places, slots, emulator.put(weights, offset), scaled)
    holds = np.flatnonzero(found.slots >= 0)
    flat = found.slots[holds]
    want = np.zeros(rows.shape)
    want[holds] = np.asarray(dy, np.float64)[flat // 2] * np.asarray(weights, np.float64).reshape(-1)[flat][:, None]
    oracle.same(array(scaled), want, **rounding(dtype))

    products = emulator.empty(*found.rows.shape, dtype=FLOAT32, offset=offset)
    dispatch.combine_weight_grad(emulator.put(rows, offset), emulator.put(dy, offset), places, products)
    pairs = np.einsum("tsh,th->ts", np.asarray(rows, np.float64)[found.rows], np.asarray(dy, np.float64))
    oracle.same(array(products), np.where(found.rows >= 0, pairs, 0), rtol=1e-5, atol=1e-5)
