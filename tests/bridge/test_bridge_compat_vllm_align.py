"""moe_align_block_size of bridge.compat.vllm against a plain statement of what vLLM's returns."""

from __future__ import annotations

import itertools

import pytest
import torch

from bridge.compat import vllm
from tests.check_compat_vllm import CASES, MAPPED, Case, local_ids, stated_align

pytestmark = pytest.mark.usefixtures("compiled_quickly")

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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32], ids=str)
def test_ids_past_32_bits_are_no_experts(dtype: torch.dtype, device: torch.device) -> None:
    far = 2**32 if dtype == torch.int64 else 2**31
    ids = torch.tensor([[0, far], [far + 1, 2]], device=device).to(dtype)
    sorted_ids, experts, rows = vllm.moe_align_block_size(ids, 2, 3)
    assert (sorted_ids.tolist(), experts.tolist(), rows.tolist()) == ([0, 4, 3, 4, 4, 4, 4], [0, 2, -1, -1], [4])
