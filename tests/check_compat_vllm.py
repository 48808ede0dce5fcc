"""Cases of vLLM's permutation and alignment, and plain statements of what comes out, for the CPU and the GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


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
