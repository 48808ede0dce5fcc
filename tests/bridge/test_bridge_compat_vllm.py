"""Permutation and alignment of bridge.compat.vllm against plain statements of what vLLM's functions return."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import torch

import bridge
from bridge.compat import vllm


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly() -> Iterator[None]:
    """What runs once takes longer to compile well than to run; kernels on a GPU are compiled as for users."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not torch.cuda.is_available())
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclass(frozen=True)
class Case:
    """Pairs to put in the order of their experts."""

    why: str
    num_experts: int
    top_k: int = 2
    tokens: int = 21
    ids: Callable[[int, int], torch.Tensor] | None = None  # (tokens, top_k) -> ids
    expert_map: tuple[int, ...] | None = None
    num_local: int = -1
    peers: bool = True  # whether vLLM's own kernels take it

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda t, k: torch.randint(0, self.num_experts, (t, k), generator=generator)
        ids = (self.ids or draw)(self.tokens, self.top_k).to(device, torch.int32)
        if self.expert_map is None:
            return ids, None
        return ids, torch.tensor(self.expert_map, dtype=torch.int32, device=device)


def drawn(low: int, high: int) -> Callable[[int, int], torch.Tensor]:
    return lambda t, k: torch.randint(low, high, (t, k), generator=torch.Generator().manual_seed(1))


def distinct(experts: int) -> Callable[[int, int], torch.Tensor]:
    return lambda t, k: torch.rand(t, experts, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :k]


# As many tokens and experts wherever neither matters: JAX compiles for each.
CASES = [
    Case("no tokens", 13, tokens=0, peers=False),
    Case("no tokens, with a map", 13, tokens=0, expert_map=(-1, 0, -1, 1, 2, *[-1] * 8), num_local=5, peers=False),
    Case("one token", 13, tokens=1),
    Case("one pair, one expert", 1, tokens=1, top_k=1),
    Case("odd E", 13),
    Case("K = E", 6, top_k=6, ids=distinct(6)),
    Case("every pair to the last expert", 13, ids=lambda t, k: torch.full((t, k), 12)),
    Case("only the first and the last expert", 13, ids=lambda t, k: drawn(0, 2)(t, k) * 12),
    Case("256 experts, 8 of them a token: DeepSeek-V3; most get none", 256, top_k=8, ids=distinct(256)),
    Case("more pairs than one block", 6, tokens=300, top_k=4),
    Case("the first and the last are here", 13, expert_map=(0, *[-1] * 11, 1), num_local=5),
    Case("a map with -1, in another order", 13, expert_map=(-1, 2, -1, 0, 1, -1, 4, 3, *[-1] * 5), num_local=5),
    Case("nothing is here", 13, expert_map=(-1,) * 13, num_local=5),
    Case("all are here, in another order", 13, expert_map=(*range(6, 13), *range(6)), num_local=13),
    Case("the first of 8 ranks", 64, top_k=6, expert_map=(*range(8), *[-1] * 56), num_local=8, ids=distinct(64)),
    Case("ids out of range", 13, ids=drawn(-3, 16), peers=False),
    Case("all ids out of range", 13, ids=lambda t, k: torch.full((t, k), -1), peers=False),
    Case(
        "ids out of range, with a map",
        13,
        ids=drawn(-1, 16),
        expert_map=(1, -1, 0, 2, *[-1] * 9),
        num_local=5,
        peers=False,
    ),
    Case(
        "more pairs than one launch aligns, some elsewhere", 6, tokens=300, expert_map=(1, -1, 0, 2, -1, 3), num_local=5
    ),
]
MAPPED = [case for case in CASES if case.expert_map]
IDS = lambda case: case.why


def numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def local_ids(ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The local expert of each pair [T * K], -1 for none."""
    flat = ids.flatten().long()
    known = (flat >= 0) & (flat < num_experts)
    mapped = flat if expert_map is None else expert_map.long()[flat.clamp(0, num_experts - 1)]
    return mapped.where(known, -1)


# moe_permute


def stated_permute(
    x: torch.Tensor, ids: torch.Tensor, n_expert: int, n_local: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, offsets, inverse, index): a stable sort by local expert, those that are not here last.

    What rows without a token hold is open: here zeros. They have index T * K; a pair without a row has the inverse -1.
    """
    local, pairs = local_ids(ids, n_expert, expert_map), ids.numel()
    keys = local.where(local >= 0, n_expert)
    index = keys.argsort(stable=True)
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(pairs, device=ids.device)
    rows = x[index // ids.shape[1]]
    held = keys[index] < n_expert
    rows = rows.where(held[:, None], torch.zeros((), dtype=x.dtype, device=x.device))
    offsets = torch.stack([(keys < e).sum() for e in range(n_local + 1)])
    return rows, offsets, inverse.where(local >= 0, -1), index.where(held, pairs)


def check_permute(got: tuple[Any, ...], x: torch.Tensor, ids: torch.Tensor, case: Case, expert_map: Any) -> None:
    n_local = case.num_experts if case.num_local == -1 else case.num_local
    rows, offsets, inverse, index = stated_permute(x, ids, case.num_experts, n_local, expert_map)
    got_rows, _, got_offsets, got_inverse, got_index = got
    assert (got_offsets.dtype, got_inverse.dtype, got_index.dtype) == (torch.int64, torch.int32, torch.int32)
    assert got_rows.dtype == x.dtype
    assert got_rows.shape == rows.shape
    assert torch.equal(got_rows[index < ids.numel()], rows[index < ids.numel()])
    assert torch.equal(got_offsets, offsets)
    assert torch.equal(got_index.long(), index)
    has_row = inverse >= 0
    assert got_inverse.shape == inverse.shape
    assert torch.equal(got_inverse[has_row].long(), inverse[has_row])
    elsewhere = got_inverse[~has_row]  # rows of the buffer that hold no token, as those of vLLM
    assert ((elsewhere >= has_row.sum()) & (elsewhere < ids.numel())).all()


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32], ids=str)
def test_ids_past_32_bits_are_no_experts(dtype: torch.dtype, device: torch.device) -> None:
    far = 2**32 if dtype == torch.int64 else 2**31
    ids = torch.tensor([[0, far], [far + 1, 2]], device=device).to(dtype)
    sorted_ids, experts, rows = vllm.moe_align_block_size(ids, 2, 3)
    assert (sorted_ids.tolist(), experts.tolist(), rows.tolist()) == ([0, 4, 3, 4, 4, 4, 4], [0, 2, -1, -1], [4])


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


# moe_unpermute


def stated_unpermute(
    rows: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    """float64 [T, H]: each token's rows, weighted; those at or past the last offset are left out."""
    place = inverse.reshape(weights.shape).long()
    held = place < (len(rows) if offsets is None else offsets[-1])
    chosen = rows.double()[place.clamp(0, max(len(rows) - 1, 0))] if len(rows) else rows.double()[None].expand(0, 0, -1)
    chosen = chosen.reshape(*weights.shape, rows.shape[1]).masked_fill(~held[:, :, None], 0)
    return (chosen * weights.double()[:, :, None]).sum(1)


def check_unpermute(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """One rounding to the dtype, on a sum in float32."""
    close = {"rtol": max(1e-6, torch.finfo(got.dtype).eps), "atol": 1e-5}
    torch.testing.assert_close(got.double(), wanted, **close)
    if len(wanted) > 1 and wanted.any():
        for wrong in (torch.zeros_like(wanted), wanted.flip(0)):
            with pytest.raises(AssertionError):
                torch.testing.assert_close(wrong, wanted, **close)


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


# moe_align_block_size


def stated_align(
    ids: torch.Tensor, block: int, num_experts: int, expert_map: Any, padded: bool, ignore: bool
) -> tuple[list[int], list[int], int, list[int]]:
    """(sorted ids, expert of each block, rows in use, where each expert's rows begin), expert by expert."""
    flat, pairs = ids.flatten().tolist(), ids.numel()
    length = pairs + num_experts * (block - 1)
    length = -(-length // block) * block if padded else length
    length = min(length, pairs * block) if pairs < num_experts else length
    local = expert_map.tolist() if expert_map is not None else list(range(num_experts))
    known = [i if 0 <= i < num_experts else None for i in flat]
    groups = [local[i] if i is not None and ignore else i for i in known]  # what has blocks of its own
    sorted_ids, experts, begins = [], [], []
    for group in range(num_experts):
        members = [pair for pair, g in enumerate(groups) if g == group]
        blocks = -(-len(members) // block)
        begins.append(len(sorted_ids))
        sorted_ids += members + [pairs] * (blocks * block - len(members))
        experts += [group if ignore else local[group]] * blocks
    used = len(sorted_ids)
    sorted_ids += [pairs] * (length - used)
    experts += [-1] * (-(-length // block) - len(experts))
    return sorted_ids, experts, used, begins


BLOCKS = [(case, 4) for case in CASES] + [(case, block) for case in (CASES[4], MAPPED[2]) for block in (1, 3, 16)]


@pytest.mark.parametrize(("case", "block"), BLOCKS, ids=lambda v: str(getattr(v, "why", v)))
def test_align(case: Case, block: int, device: torch.device) -> None:
    ids, expert_map = case.inputs(device)
    pair, local = torch.arange(ids.numel(), device=device), local_ids(ids, case.num_experts, expert_map)
    for padded, ignore, scatter in itertools.product((False, True), repeat=3):
        if expert_map is not None and scatter and not ignore:
            continue  # which vLLM refuses
        got = vllm.moe_align_block_size(ids, block, case.num_experts, expert_map, padded, ignore, scatter)
        sorted_ids, experts, used, _ = stated_align(ids, block, case.num_experts, expert_map, padded, ignore)
        assert len(got) == 3 + scatter
        assert {tensor.dtype for tensor in got} == {torch.int32}
        assert [tensor.tolist() for tensor in got[:3]] == [sorted_ids, experts, [used]]
        if scatter:  # each pair's own index, -1 where it was left out
            assert torch.equal(got[3], pair.where(local >= 0, -1).int()[:, None])


def test_align_as_documented_by_vllm(device: torch.device) -> None:
    """The example in vLLM's documentation, which leaves its fourth expert out by counting from 1."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], device=device)
    sorted_ids, experts, rows = vllm.moe_align_block_size(ids, 4, 5)
    assert sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert experts[:4].tolist() == [1, 2, 3, 4]
    assert rows.tolist() == [16]
