"""moe_permute and moe_unpermute of bridge.compat.vllm against plain statements of what vLLM's functions return."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bridge
from bridge.compat import vllm
from tests.check_compat_vllm import (
    CASES,
    IDS,
    MAPPED,
    Case,
    check_permute,
    check_unpermute,
    drawn,
    local_ids,
    numbers,
    stated_align,
    stated_unpermute,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_permute(case: Case, device: torch.device) -> None:
    ids, expert_map = case.inputs(device)
    x = numbers(case.tokens, 16, device=device)
    got = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    assert got[1] is None
    check_permute(got, x, ids, case, expert_map)


def test_permute_checks_reject_wrong_results() -> None:
    device = torch.device("cpu")
    case = Case("", 5, top_k=3)
    ids, _ = case.inputs(device)
    x = numbers(case.tokens, 16, device=device)
    good = vllm.moe_permute(x, None, ids, 5)
    check_permute(good, x, ids, case, None)
    for place in (0, 2, 3, 4):
        for wrong in (torch.zeros_like(good[place]), good[place].flip(0)):
            with pytest.raises(AssertionError):
                check_permute((*good[:place], wrong, *good[place + 1 :]), x, ids, case, None)


def test_fewer_local_experts_without_a_map(device: torch.device) -> None:
    """The first experts have offsets; the rows of the others follow, and are there."""
    ids, x = drawn(0, 9)(21, 2).to(device, torch.int32), numbers(21, 16, device=device)
    whole = vllm.moe_permute(x, None, ids, 9)
    rows, _, offsets, inverse, index = vllm.moe_permute(x, None, ids, 9, 4)
    assert torch.equal(offsets, whole[2][:5])
    for got, wanted in zip((rows, inverse, index), (whole[0], whole[3], whole[4]), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8, torch.uint32], ids=str)
def test_ids_of_any_integer_dtype(dtype: torch.dtype, device: torch.device) -> None:
    ids, x = drawn(0, 9)(21, 2).to(device), numbers(21, 16, device=device)
    wanted = vllm.moe_permute(x, None, ids.int(), 9)
    aligned = vllm.moe_align_block_size(ids.int(), 4, 9)
    for a, b in zip(vllm.moe_permute(x, None, ids.to(dtype), 9), wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip(vllm.moe_align_block_size(ids.to(dtype), 4, 9), aligned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_permute_has_a_gradient(dtype: torch.dtype, device: torch.device) -> None:
    case = MAPPED[1]
    ids, expert_map = case.inputs(device)
    x = numbers(case.tokens, 16, device=device, dtype=dtype).requires_grad_()
    rows, _, _, _, index = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    factors = torch.arange(1, len(rows) + 1, device=device, dtype=dtype)[:, None]
    (grad,) = torch.autograd.grad((rows * factors).sum(), x)
    held = index < ids.numel()
    wanted = torch.zeros_like(x, dtype=torch.float64)
    wanted.index_add_(0, (index // ids.shape[1])[held].long(), factors.double().expand(-1, 16)[held])
    torch.testing.assert_close(grad.double(), wanted, rtol=0.01, atol=0)
    assert wanted.any()


def test_rows_without_a_token_are_cleared_where_a_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What scales the rows has a gradient, too, and 0 * NaN would be in it."""
    cleared: list[bool] = []
    rows_of = vllm.dispatch_rows

    def recorded(*given: Any, clear: bool, **more: Any) -> torch.Tensor:
        cleared.append(clear)
        return rows_of(*given, clear=clear, **more)

    monkeypatch.setattr(vllm, "dispatch_rows", recorded)
    ids, x = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 16)
    vllm.moe_permute(x, None, ids, 2)
    vllm.moe_permute(x.requires_grad_(), None, ids, 2)
    with torch.no_grad():
        vllm.moe_permute(x, None, ids, 2)
    assert cleared == [False, True, False]


def test_on_a_gpu_that_the_kernels_do_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ops do for such tensors, here on a CPU: they go through JAX's runtime, as jaxmoe's functions do."""
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    case = MAPPED[1]
    ids, expert_map = case.inputs(torch.device("cpu"))
    x, weights = numbers(case.tokens, 16, device=ids.device), numbers(*ids.shape, device=ids.device)
    rows, _, *maps = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    plan = bridge.plan_dispatch(ids, case.num_local, expert_map=expert_map)
    ops, filled, sums = torch.ops.jaxmoe, [torch.empty_like(tensor) for tensor in maps], torch.empty_like(x)
    ops.permute_maps_out.default.redispatch(on_cuda, *plan, *filled)
    assert all(torch.equal(a, b) for a, b in zip(filled, maps, strict=True))
    ops.unpermute_out.default.redispatch(on_cuda, rows, maps[1].view(ids.shape), weights, maps[0][-1:], sums)
    check_unpermute(sums, stated_unpermute(rows, weights, maps[1], maps[0]))
    wanted = stated_align(ids, 4, case.num_experts, expert_map, False, False)
    got = ops.align_blocks.default.redispatch(on_cuda, ids, case.num_experts, 4, expert_map, True, len(wanted[0]))
    assert [tensor.tolist() for tensor in got] == [wanted[0], wanted[1], [wanted[2]]]


def test_what_need_not_be_contiguous(device: torch.device) -> None:
    """A map of names, offsets, of which the last one is read, and vLLM's inverse map."""
    case = MAPPED[1]
    ids, expert_map = case.inputs(device)
    assert expert_map is not None
    apart = lambda tensor: torch.stack([tensor, tensor], 1)[:, 0]
    for a, b in zip(*(vllm.moe_align_block_size(ids, 4, 13, m) for m in (expert_map, apart(expert_map))), strict=True):
        assert torch.equal(a, b)
    x, weights = numbers(case.tokens, 16, device=device), numbers(*ids.shape, device=device)
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, 13, case.num_local, expert_map)
    out = torch.empty_like(x)
    vllm.moe_unpermute(out, rows, weights, apart(inverse), apart(offsets))
    check_unpermute(out, stated_unpermute(rows, weights, inverse, offsets))


@pytest.mark.parametrize("given", [False, True], ids=["result", "out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_permute_dtypes(dtype: torch.dtype, given: bool, device: torch.device) -> None:
    """What is passed for the rows is written to and comes back; on a GPU not where there is no token."""
    case = MAPPED[1]
    ids, expert_map = case.inputs(device)
    x = numbers(case.tokens, 16, device=device, dtype=dtype)
    out = torch.full((ids.numel(), 16), -77.0, device=device, dtype=dtype) if given else None
    got = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map, out)
    assert out is None or got[0] is out
    check_permute(got, x, ids, case, expert_map)
    assert got[2][-1] < ids.numel()
    if out is not None and device.type == "cuda":
        assert (out[got[2][-1] :] == -77.0).all()


@pytest.mark.parametrize("given", [False, True], ids=["result", "out"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["whole rows", "columns"])
def test_quantised_rows_move_bit_for_bit(dtype: torch.dtype, given: bool, strided: bool, device: torch.device) -> None:
    """Every byte there is, those of NaN among them."""
    stored = torch.arange(16 * 128, device=device).reshape(16, 128).remainder(256).to(torch.uint8)
    x = (stored[:, 64:] if strided else stored[:, 64:].clone()).view(dtype)
    ids = drawn(0, 5)(16, 3).to(device, torch.int32)
    out = torch.zeros(48, 64, dtype=torch.uint8, device=device).view(dtype) if given else None
    rows, _, _, _, index = vllm.moe_permute(x, None, ids, 5, permuted_hidden_states=out)
    assert out is None or rows is out
    assert rows.dtype == dtype
    assert torch.equal(rows.view(torch.uint8), stored[index.long() // 3, 64:])


@pytest.mark.parametrize("given", [False, True], ids=["result", "out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_no_gradient_of_what_moves_bit_for_bit(dtype: torch.dtype, given: bool, device: torch.device) -> None:
    """It would be lost in silence; the values are moved where nobody asks for one."""
    x = numbers(21, 16, device=device).to(dtype).requires_grad_()
    ids = drawn(0, 9)(21, 2).to(device, torch.int32)
    out = torch.zeros(42, 16, dtype=dtype, device=device) if given else None
    with pytest.raises(ValueError, match=r"^hidden_states: expected bfloat16.* where it requires grad, got .*64\[21"):
        vllm.moe_permute(x, None, ids, 9, permuted_hidden_states=out)
    assert out is None or not out.any()
    with torch.no_grad():
        rows, _, _, _, index = vllm.moe_permute(x, None, ids, 9, permuted_hidden_states=out)
    assert out is None or rows is out
    assert torch.equal(rows, x.detach()[index.long() // 2])
    with pytest.raises(ValueError, match=r"^permuted_hidden_states: expected a tensor without requires_grad"):
        vllm.moe_permute(x.detach(), None, ids, 9, permuted_hidden_states=torch.zeros_like(rows).requires_grad_())


def test_scales(device: torch.device) -> None:
    """Scales of tokens go with them, whatever their layout; one scale for all comes back itself."""
    case = MAPPED[1]
    ids, expert_map = case.inputs(device)
    x = numbers(case.tokens, 16, device=device)
    columns_first = torch.rand(4, case.tokens, device=device).T
    bytes_ = torch.randint(0, 255, (case.tokens, 2), device=device, dtype=torch.uint8)
    for scale in (torch.rand(case.tokens, 1, device=device), columns_first, bytes_):
        _, got, offsets, _, index = vllm.moe_permute(x, scale, ids, case.num_experts, case.num_local, expert_map)
        token = index.long().clamp(max=ids.numel() - 1) // ids.shape[1]
        assert got.dtype == scale.dtype
        assert torch.equal(got, scale[token])
        assert 0 < int(offsets[-1]) < ids.numel()
    for one in (torch.rand(1, device=device), torch.tensor(0.5, device=device)):
        assert vllm.moe_permute(x, one, ids, case.num_experts, case.num_local, expert_map)[1] is one
    empty = vllm.moe_permute(x[:0], torch.rand(0, 3, device=device), ids[:0], case.num_experts)
    assert empty[1].shape == (0, 3)


class Scratch(SimpleNamespace):
    """The part of vLLM's MoEPermuteScratch that is used: buffers that grow."""

    def __init__(self, num_local: int, device: torch.device) -> None:
        super().__init__(expert_first_token_offset=torch.full((num_local + 1,), -7, device=device), device=device)

    def reserve(self, rows: int) -> None:
        self.inv_permuted_idx = torch.full((rows + 5,), -7, dtype=torch.int32, device=self.device)
        self.permuted_idx = torch.full((rows + 5,), -7, dtype=torch.int32, device=self.device)


@pytest.mark.parametrize("case", MAPPED, ids=IDS)
def test_scratch_is_used(case: Case, device: torch.device) -> None:
    """The results lie in vLLM's buffers where it passes them, as callers in vLLM do."""
    ids, expert_map = case.inputs(device)
    x, scratch = numbers(case.tokens, 16, device=device), Scratch(case.num_local, device)
    got = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map, scratch=scratch)
    check_permute(got, x, ids, case, expert_map)
    if case.tokens:
        assert got[2] is scratch.expert_first_token_offset
        assert got[3].data_ptr() == scratch.inv_permuted_idx.data_ptr()
        assert got[4].data_ptr() == scratch.permuted_idx.data_ptr()


ROUND_TRIPS = [(case, torch.float32) for case in CASES] + [(CASES[4], torch.bfloat16), (MAPPED[2], torch.bfloat16)]


@pytest.mark.parametrize(("case", "dtype"), ROUND_TRIPS, ids=lambda v: str(getattr(v, "why", v)))
def test_there_and_back(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """What moe_permute returns is what moe_unpermute takes; rows that hold no token count for nothing, NaN included."""
    ids, expert_map = case.inputs(device)
    x, weights = numbers(case.tokens, 16, device=device, dtype=dtype), numbers(*ids.shape, device=device).abs()
    rows, _, offsets, inverse, index = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    rows = rows.masked_fill((index == ids.numel())[:, None], torch.nan)
    out = torch.full_like(x, -77.0)
    assert vllm.moe_unpermute(out, rows, weights, inverse, offsets) is None
    has_row = local_ids(ids, case.num_experts, expert_map).reshape(ids.shape) >= 0
    check_unpermute(out, x.double() * (weights.double() * has_row).sum(1, keepdim=True))
    check_unpermute(out, stated_unpermute(rows, weights, inverse, offsets))


def test_unpermute_without_offsets(device: torch.device) -> None:
    """Every row holds a token then; of a given inverse, negative rows add nothing."""
    ids, weights = drawn(0, 9)(21, 3).to(device, torch.int32), numbers(21, 3, device=device)
    x, out = numbers(21, 16, device=device), torch.empty(21, 16, device=device)
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, 9)
    vllm.moe_unpermute(out, rows, weights, inverse)
    check_unpermute(out, stated_unpermute(rows, weights, inverse, None))
    with_offsets = torch.empty_like(out)
    vllm.moe_unpermute(with_offsets, rows, weights, inverse, offsets)
    check_unpermute(with_offsets, stated_unpermute(rows, weights, inverse, offsets))
    if device.type == "cpu":  # else the first is XLA's build of the kernel, and rounds in other places than triton's
        assert torch.equal(out, with_offsets)
    vllm.moe_unpermute(out, rows, weights, torch.full_like(inverse, -1))
    assert not out.any()


def test_unpermute_shapes_and_strides(device: torch.device) -> None:
    """Rows as [T, K, H], in a wider buffer, and more of them than pairs: as callers in vLLM have them."""
    ids, weights = drawn(0, 9)(21, 3).to(device, torch.int32), numbers(21, 3, device=device).to(torch.bfloat16)
    x = numbers(21, 16, device=device)
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, 9)
    wanted = stated_unpermute(rows, weights, inverse, offsets)
    wide = torch.full((80, 64), torch.nan, device=device)
    wide[:63, 16:32] = rows
    for given in (rows.view(21, 3, 16), wide[:, 16:32]):
        for index in (inverse, inverse.view(21, 3)):
            out = torch.full_like(x, -77.0)
            vllm.moe_unpermute(out, given, weights, index, offsets)
            check_unpermute(out, wanted)


def test_unpermute_takes_vllms_inverse(device: torch.device) -> None:
    """vLLM gives each pair that is not here a row of its own behind the others: that row is not read."""
    case = MAPPED[1]
    ids, expert_map = case.inputs(device)
    x, weights = numbers(case.tokens, 16, device=device), numbers(*ids.shape, device=device)
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    local = local_ids(ids, case.num_experts, expert_map)
    inverse = inverse.where(local >= 0, offsets[-1].int() + (local < 0).cumsum(0, dtype=torch.int32) - 1)
    assert inverse.sort().values.tolist() == list(range(ids.numel()))
    rows[offsets[-1] :] = torch.nan
    out = torch.empty_like(x)
    vllm.moe_unpermute(out, rows, weights, inverse, offsets)
    check_unpermute(out, stated_unpermute(rows, weights, inverse, offsets))
