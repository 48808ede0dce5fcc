"""The op of what lies behind routing in the emulator: what it computes, and what it leaves as it was."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import bridge
from bridge.native import experts
from bridge.ops import layer as ops
from bridge.ops import weighted_experts
from jaxmoe import layer
from tests import oracle
from tests.cases import BF16, F32, normal
from tests.check_plan import PlanCase, drawn
from tests.emulator import native
from tests.emulator.native import Emulator, array, plan

WIDTH, INNER = 72, 24
IDS = (-1, 3, -1, -1, 0, -1, -1, 4, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, -1)  # five of twenty are here
# With them, for how many rows tiles are chosen: as many as experts that are here get of all pairs, if no id is special.
CASES = [
    (PlanCase("dropped pairs, groups are filled up", 5, align=4, tokens=11, ids=drawn(-1, 5)), 22),
    (PlanCase("a quarter of the experts", 5, expert_map=IDS), 11),
    (PlanCase("a quarter of the experts, groups are filled up", 5, align=4, expert_map=IDS), 11),
    (PlanCase("a quarter of the experts, room for few", 5, expert_map=IDS, max_rows=7), 7),
    (PlanCase("nothing is here", 5, align=4, expert_map=(-1,) * 20), 11),
]


def check_left(tensors: list[torch.Tensor], rows: int, end: int, widths: list[int]) -> None:
    """Of the arrays with as many rows, these: rows before the end are written, and those behind it are not."""
    found = [tensor for tensor in tensors if tensor.dtype == torch.bfloat16 and tensor.shape[0] == rows]
    assert sorted(tensor.shape[1] for tensor in found) == widths
    for tensor in found:
        assert not tensor[:end].isnan().any()
        assert (tensor[end:].view(torch.int16) == -1).all()


@pytest.mark.in_ci(transposed=True, case=lambda case: case is not CASES[2][0])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(("case", "expected"), CASES, ids=lambda value: getattr(value, "why", ""))
def test_weighted_experts(
    case: PlanCase, expected: int, transposed: bool, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. New memory is full of NaN, which would show wherever it is read."""
    monkeypatch.setattr(native, "POISON", 0xFF)
    found, tokens = plan(emulator, case), case.tokens
    end, rows, num_ids = int(found.group_sizes.sum()), len(found.slots), len(case.expert_map or range(5))
    x, up = (normal(seed, tokens, WIDTH, dtype=BF16) for seed in (0, 1))
    weights = normal(2, *found.rows.shape)
    gate_up = normal(3, 5, WIDTH, 2 * INNER, dtype=BF16, scale=0.1)
    down = normal(4, 5, INNER, WIDTH, dtype=BF16, scale=0.2)
    lay = lambda w: emulator.put(np.asarray(w).swapaxes(1, 2)).mT if transposed else emulator.put(w)
    tensors = [emulator.put(a) for a in (x, found.rows, found.slots, found.group_sizes, weights)]
    tensors += [lay(gate_up), lay(down)]

    activation = ("silu", "gelu", "gelu_tanh")[(expected + transposed) % 3]
    asked: set[int] = set()
    for module in (experts.kernels, experts.grad_kernels):
        config_for = module.config_for
        noted = lambda n, *args, of=config_for, **options: asked.add(n) or of(n, *args, **options)
        monkeypatch.setattr(module, "config_for", noted)
    before = len(emulator.kept)
    y, kept = weighted_experts._native(*tensors, num_ids, activation, True)
    check_left(emulator.kept[before:], rows, end, [INNER, 2 * INNER, WIDTH])  # hidden, gate and up, what comes out
    out = tensors[0].new_empty((tokens, WIDTH))
    before, version = len(emulator.kept), out._version
    weighted_experts._out_native(*tensors, num_ids, activation, out)
    check_left(emulator.kept[before:], rows, end, [INNER, WIDTH])
    assert torch.equal(out, y)
    assert out._version > version, "autograd sees that it was written to"
    with pytest.raises(ValueError, match=r"^out: expected memory of its own, got a tensor that overlaps x$"):
        weighted_experts._out_native(*tensors, num_ids, activation, tensors[0])
    with pytest.raises(ValueError, match=r"^out: expected a contiguous tensor"):
        weighted_experts._out_native(*tensors, num_ids, activation, out.t().contiguous().t())
    with pytest.raises(ValueError, match=r"^activation: expected one of .*, got 'relu'"):
        weighted_experts._out_native(*tensors, num_ids, "relu", out)

    gated_grad, dispatch = experts.gated_grad, weighted_experts.moves.dispatch

    def with_scale(*args: Any) -> None:
        emulator.add(args[5], writable=False)  # indexing made it
        gated_grad(*args)

    def with_end(*args: Any, end: torch.Tensor) -> None:
        emulator.add(end, writable=False)  # a sum
        dispatch(*args, end=end)

    monkeypatch.setattr(experts, "gated_grad", with_scale)
    monkeypatch.setattr(weighted_experts.moves, "dispatch", with_end)
    bits, gradient = kept.view(torch.int16).clone(), emulator.put(up)
    results = []
    for over, widths in ((False, [INNER, 2 * INNER, WIDTH]), (True, [INNER, WIDTH])):
        before = len(emulator.kept)
        given = gradient, *tensors, kept, num_ids, activation, True
        results.append(weighted_experts._backward_native(*given, over=over))
        check_left(emulator.kept[before:], rows, end, widths)
        assert torch.equal(bits, kept.view(torch.int16)) != (over and end > 0), "there may be a second backward pass"
    check_left([kept], rows, end, [2 * INNER])
    got, last = results
    assert all(torch.equal(one, other) for one, other in zip(got, last, strict=True))
    assert asked == {expected}

    def exactly(x: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        arrays = x, found.rows, found.slots, found.group_sizes, weights, gate_up, down
        return layer.weighted_experts(("xla", activation, weighted_experts.LEFT), *arrays, None)

    wide = [jax.numpy.asarray(a, F32) for a in (x, weights, gate_up, down)]
    want, pull = jax.vjp(exactly, *wide)
    oracle.same(array(y), np.asarray(want, np.float64), rtol=0.03, atol=0.03)
    for g, w in zip(got, pull(jax.numpy.asarray(up, F32)), strict=True):
        scale = float(jax.numpy.abs(w).max())
        assert (scale > 0) == (end > 0)
        oracle.same(array(g), np.asarray(w, np.float64), rtol=0.03, atol=0.01 * scale)


@pytest.mark.parametrize("local", [(2, -1, 0, 1, -1), None], ids=["three are here", ""])
def test_the_layer_at_once(local: tuple[int, ...] | None, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, and what lies behind routing, as they are launched where nobody asks for gradients."""
    monkeypatch.setattr(native, "POISON", 0xFF)
    config = bridge.RoutingConfig(num_experts=4, top_k=2, n_shared_experts=1)
    here, most = (5, None) if local is None else (3, 8)
    arrays = [normal(0, 6, WIDTH, dtype=BF16), normal(1, 4, WIDTH, scale=0.1), normal(2, 4)]
    arrays += [normal(3, here, WIDTH, 2 * INNER, dtype=BF16, scale=0.1), normal(4, here, INNER, WIDTH, dtype=BF16)]
    x, router, bias, gate_up, down = map(emulator.put, arrays)
    expert_map = None if local is None else emulator.put(np.asarray(local, np.int32))
    out = emulator.empty(6, WIDTH, dtype=torch.bfloat16)
    given = x, router, bias, gate_up, down, None, 5, config.json, expert_map, most, "gelu"
    y, *routing = ops._moe_native(*given)
    again = ops._moe_out_native(*given, out)
    weights, chosen, load = routing
    behind = x, chosen, weights, gate_up, down, expert_map, most, "gelu"
    part = ops._fused_experts_native(*behind)
    params = bridge.MoEParams(router, gate_up, down, bias)
    options = {"num_valid_tokens": 5, "expert_map": expert_map, "max_rows": most, "activation": "gelu"}
    want, wanted = bridge.moe(x, params, config, **options, implementation="xla")
    assert torch.equal(chosen, wanted.experts)
    assert torch.equal(load, wanted.load)
    torch.testing.assert_close(weights, wanted.weights)
    scale = float(want.float().abs().max())
    torch.testing.assert_close(y.float(), want.float(), rtol=0.03, atol=0.02 * scale)
    assert not y[5:].any(), "of tokens that are not valid"
    assert all(torch.equal(one, other) for one, other in zip((*routing, y), (*again, out), strict=True))
    assert torch.equal(part, y)
    ops._fused_experts_out_native(*behind, out.zero_())
    assert torch.equal(out, y)
