"""What is timed of the way to the experts and back: plan, dispatch, combine, align, and a whole step of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

import bridge
from benchmarks import operation, peers, stated, timing
from benchmarks.operation import Build, Entry, Operation, empty, expect, random
from benchmarks.parts import room_for
from benchmarks.routing import bias_of, config_of, empty_routing
from bridge import DispatchPlan
from bridge.compat import vllm as compat

WIDTH, TOP_K, EXPERTS = 7168, 8, 256  # DeepSeek-V3's
TOKENS = (1, 8, 64, 512, 4096, 16384, 40960)
BLOCK = 64
CACHE = 50 << 20  # of an H100 or H200

Tensor = torch.Tensor


def _random_ids(tokens: int) -> Tensor:
    """Distinct ids for each token."""
    return torch.rand(tokens, EXPERTS, device=operation.DEVICE).argsort(dim=1)[:, :TOP_K].int().contiguous()


def _calls(tokens: int) -> int:
    return 20 if tokens <= 4096 else 4


def _buffers(tokens: int, top_k: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(x, rows, y), each as often as it takes for the cache to have lost one by the time it comes round again."""
    pairs = tokens * top_k
    number = range(timing.input_sets((tokens + pairs) * WIDTH * 2, calls=_calls(tokens)))
    return (
        [random(tokens, WIDTH) for _ in number],
        [empty(pairs, WIDTH) for _ in number],
        [empty(tokens, WIDTH) for _ in number],
    )


def movement(quick: bool) -> Iterator[Build]:
    """plan, dispatch, both, and combine, at DeepSeek-V3's width."""
    for tokens in (1, 64, 512, 4096) if quick else TOKENS:
        yield functools.partial(_movement, tokens)


def _movement(tokens: int) -> Iterator[Operation]:
    pairs, row, calls = tokens * TOP_K, WIDTH * 2, _calls(tokens)
    x, rows, y = _buffers(tokens, TOP_K)
    num_sets = len(x)
    ids, weights = _random_ids(tokens), torch.rand(tokens, TOP_K, device=operation.DEVICE)
    plan = bridge.plan_dispatch(ids, EXPERTS)
    permutes = [peers.Permute(out, TOP_K, EXPERTS) for out in rows] if peers.loaded(peers.vllm) else []

    def check_plan(got: DispatchPlan) -> None:
        stated.check_plan(got, ids, EXPERTS)

    def check_rows(got: Tensor) -> None:
        stated.check_rows(got, x[0], stated.plan(ids, EXPERTS, 1, pairs))

    def check_sums(got: Tensor) -> None:
        stated.check_close(got, stated.combine(rows[0], stated.plan(ids, EXPERTS, 1, pairs), weights), 1e-2, "sums")

    def plan_and_dispatch(i: int) -> Tensor:
        return bridge.dispatch(x[i % num_sets], bridge.plan_dispatch(ids, EXPERTS), out=rows[i % num_sets])

    def drop_in(i: int) -> Tensor:
        k = i % num_sets
        return compat.moe_permute(x[k], None, ids, EXPERTS, permuted_hidden_states=rows[k])[0]

    def dispatch(i: int) -> Tensor:
        return bridge.dispatch(x[i % num_sets], plan, out=rows[i % num_sets])

    def combine(i: int) -> Tensor:
        return bridge.combine(rows[i % num_sets], plan, weights, out=y[i % num_sets])

    def unpermute(i: int) -> Tensor:
        k = i % num_sets
        return permutes[k].unpermute(rows[k], weights, y[k])

    index, offsets = plan.rows.flatten(), torch.nn.functional.pad(plan.group_sizes.cumsum(0), (1, 0))

    def drop_in_back(i: int) -> Tensor:
        k = i % num_sets
        compat.moe_unpermute(y[k], rows[k], weights, index, offsets)
        return y[k]

    make = functools.partial(Operation, tokens=tokens, calls=calls)
    plan_call = Entry(lambda _: bridge.plan_dispatch(ids, EXPERTS), check_plan)
    yield make("plan", bytes=pairs * 12 + EXPERTS * 4, ours=plan_call)
    moved = (tokens + pairs) * row
    into_rows = functools.partial(Entry, check=check_rows, writes=(rows[0],))
    yield make("dispatch", bytes=moved + pairs * 8, ours=into_rows(dispatch))
    others = {}
    if permutes:
        others["vLLM moe_permute"] = into_rows(lambda i: permutes[i % num_sets](x[i % num_sets], ids))
    yield make("plan + dispatch", bytes=moved + pairs * 12, ours=into_rows(plan_and_dispatch), peers=others)
    yield make("permute, vLLM's form", bytes=moved + pairs * 12, ours=into_rows(drop_in), peers=others)
    for filled in rows:
        filled.normal_()
    into_y = functools.partial(Entry, check=check_sums, writes=(y[0],))
    others = {}
    if permutes:
        for permute in permutes:
            permute.set_maps(plan.rows, plan.group_sizes)
        others["vLLM moe_unpermute"] = into_y(unpermute)
    yield make("combine", bytes=moved + pairs * 8, ours=into_y(combine), peers=others)
    yield make("unpermute, vLLM's form", bytes=moved + pairs * 8, ours=into_y(drop_in_back), peers=others)


def elsewhere(quick: bool) -> Iterator[Build]:
    """The way to the experts and back where an eighth of them is here, as with expert parallelism over eight GPUs."""
    for tokens in (1, 64, 4096) if quick else TOKENS:
        yield functools.partial(_elsewhere, tokens)


def _elsewhere(tokens: int) -> Iterator[Operation]:
    pairs, row, calls, local = tokens * TOP_K, WIDTH * 2, _calls(tokens), max(EXPERTS // 8, 1)
    x, rows, y = _buffers(tokens, TOP_K)
    num_sets = len(x)
    ids, weights = _random_ids(tokens), torch.rand(tokens, TOP_K, device=operation.DEVICE)
    here = torch.full((EXPERTS,), -1, dtype=torch.int32, device=operation.DEVICE)
    here[:local] = torch.arange(local, device=operation.DEVICE)
    want = stated.plan(here[ids.long()], local, 1, pairs)
    offsets = torch.nn.functional.pad(want.group_sizes.cumsum(0), (1, 0))
    held, used = int(offsets[-1]), int((want.rows >= 0).any(dim=1).sum())
    permutes = []
    if peers.loaded(peers.vllm):
        permutes = [peers.Permute(out, TOP_K, EXPERTS, here, local) for out in rows]

    def check_held(got: Tensor) -> None:  # what the other rows hold is open
        stated.check_rows(got[:held], x[0], want._replace(slots=want.slots[:held]))

    def check_rows(got: Tensor) -> None:
        stated.check_rows(got, x[0], want)

    def check_sums(got: Tensor) -> None:
        stated.check_close(got, stated.combine(rows[0], want, weights), 1e-2, "sums")

    room = min(pairs, room_for(pairs, EXPERTS, local))

    def check_cut(got: Tensor) -> None:
        expect(held <= room, f"{held} rows, and room for {room}: some are dropped")
        stated.check_rows(got, x[0], want._replace(slots=want.slots[:room]))

    def permute(i: int) -> Tensor:
        k = i % num_sets
        return compat.moe_permute(x[k], None, ids, EXPERTS, local, here, permuted_hidden_states=rows[k])[0]

    def plan_and_dispatch(i: int) -> Tensor:
        k = i % num_sets
        return bridge.dispatch(x[k], bridge.plan_dispatch(ids, local, expert_map=here), out=rows[k])

    def with_room(i: int) -> Tensor:
        k = i % num_sets
        plan = bridge.plan_dispatch(ids, local, expert_map=here, max_rows=room)
        return bridge.dispatch(x[k], plan, out=rows[k][:room])

    inverse = want.rows.where(want.rows >= 0, pairs - 1)  # vLLM's kernel takes no negative ones

    def unpermute(i: int) -> Tensor:
        compat.moe_unpermute(y[i % num_sets], rows[i % num_sets], weights, inverse.flatten(), offsets)
        return y[i % num_sets]

    make, name = functools.partial(Operation, tokens=tokens, calls=calls), "an eighth of the experts here"
    theirs, back = {}, {}
    if permutes:
        writes = (rows[0],)
        theirs["vLLM moe_permute"] = Entry(lambda i: permutes[i % num_sets](x[i % num_sets], ids), check_held, writes)
    moved = (used + held) * row
    ours = Entry(permute, check_held, (rows[0],))
    yield make(f"permute, vLLM's form, {name}", bytes=moved + pairs * 12, ours=ours, peers=theirs)
    ours = Entry(plan_and_dispatch, check_rows, (rows[0],))
    size = (used + pairs) * row + pairs * 12  # all rows are written
    yield make(f"plan + dispatch, {name}", bytes=size, ours=ours, peers=theirs)
    ours = Entry(with_room, check_cut, (rows[0],))
    size = (used + room) * row + pairs * 8 + room * 4
    yield make(f"plan + dispatch, {name}, max_rows", bytes=size, ours=ours, peers=theirs)
    for filled in rows:
        filled.normal_()
    if permutes:
        for permute_into in permutes:
            permute_into.set_maps(inverse, want.group_sizes)
        unpermutes = lambda i: permutes[i % num_sets].unpermute(rows[i % num_sets], weights, y[i % num_sets])
        back["vLLM moe_unpermute"] = Entry(unpermutes, check_sums, (y[0],))
    ours = Entry(unpermute, check_sums, (y[0],))
    size = (tokens + held) * row + pairs * 8
    yield make(f"unpermute, vLLM's form, {name}", bytes=size, ours=ours, peers=back)


def align(quick: bool) -> Iterator[Build]:
    """The plan with whole blocks of each expert, and vLLM's form of it."""
    for tokens in (1, 64, 4096) if quick else TOKENS:
        yield functools.partial(_align, tokens)


def _align(tokens: int) -> Iterator[Operation]:
    ids = _random_ids(tokens)
    pairs = ids.numel()

    def check_plan(got: DispatchPlan) -> None:
        stated.check_plan(got, ids, EXPERTS, BLOCK)

    def check_blocks(got: tuple[Tensor, ...]) -> None:
        """The order of an expert's pairs is open, and what stands behind the blocks in use."""
        pairs_by_place, of_block, used = got[0].long(), got[1].long(), int(got[2])
        plan = stated.plan(ids, EXPERTS, BLOCK, pairs + EXPERTS * (BLOCK - 1))
        expect(used == int(plan.group_sizes.sum()), "number of rows")
        of_place = torch.arange(EXPERTS, device=ids.device).repeat_interleave(plan.group_sizes.long())
        expect(torch.equal(of_block[: used // BLOCK], of_place[::BLOCK]), "experts of the blocks")
        want = plan.slots[:used].long().where(plan.slots[:used] >= 0, pairs)
        by_expert = lambda places: (of_place * (pairs + 1) + places).sort().values
        expect(torch.equal(by_expert(pairs_by_place[:used]), by_expert(want)), "places of the pairs")

    others = {}
    if peers.loaded(peers.vllm):
        theirs = peers.Align(ids, BLOCK, EXPERTS)
        others["vLLM moe_align_block_size"] = Entry(lambda _: theirs(), check_blocks)
    size = pairs * 12 + EXPERTS * BLOCK * 4
    ours = Entry(lambda _: bridge.plan_dispatch(ids, EXPERTS, align=BLOCK), check_plan)
    yield Operation(f"align {BLOCK}", tokens, size, ours, others)
    drop_in = Entry(lambda _: compat.moe_align_block_size(ids, BLOCK, EXPERTS), check_blocks)
    yield Operation(f"align {BLOCK}, vLLM's form", tokens, size, drop_in, others)


def step(quick: bool) -> Iterator[Build]:
    """route, plan, dispatch and combine, one after another, as they stand in a model's graph."""
    for name in ("deepseek-v3",) if quick else ("deepseek-v3", "kimi-k2"):
        for tokens in (1, 64, 4096) if quick else TOKENS:
            yield functools.partial(_step, name, tokens)


def _step(name: str, tokens: int) -> Iterator[Operation]:
    config, calls = config_of(name), _calls(tokens)
    experts, k = config.num_experts, config.top_k
    pairs, row = tokens * k, WIDTH * 2
    x, rows, y = _buffers(tokens, k)
    num_sets = len(x)
    logits = [random(tokens, experts) for _ in range(num_sets)]
    bias = bias_of(config)
    routings, written = [empty_routing(config, tokens) for _ in range(num_sets)], (rows[0], y[0])

    def ours(i: int) -> tuple[Tensor, ...]:
        s = i % num_sets
        routing = bridge.route(logits[s], bias, config=config, return_load=False, out=routings[s])
        plan = bridge.plan_dispatch(routing.experts, experts)
        moved = bridge.dispatch(x[s], plan, out=rows[s])
        return routing.weights, routing.experts, moved, bridge.combine(moved, plan, routing.weights, out=y[s])

    def check(got: tuple[Tensor, ...], rtol: float = 1e-5, least: float = 0.999) -> None:
        weights, ids, moved, sums = got
        stated.check_routing(weights, ids, logits[0], bias, config, rtol=rtol, least=least)
        stated.check_rows(moved, x[0], stated.plan(ids, experts, 1, pairs))
        # No expert stands in between: a token is multiplied by the sum of its weights.
        stated.check_close(sums, x[0].float() * weights.sum(dim=1, keepdim=True), 1e-2, "sums")

    others: dict[str, Entry] = {}
    if (ops := peers.loaded(peers.vllm)) and bias is not None:
        permutes = [peers.Permute(out, k, experts) for out in rows]
        options = (config.n_group, config.topk_group, k, config.renormalize, config.routed_scaling_factor, bias)

        def theirs(i: int) -> tuple[Tensor, ...]:
            s = i % num_sets
            weights, ids = ops.grouped_topk(logits[s], *options, peers.SIGMOID)
            moved = permutes[s](x[s], ids)
            return weights, ids, moved, permutes[s].unpermute(moved, weights, y[s])

        their_check: Any = functools.partial(check, rtol=1e-4, least=0.99)
        others["vLLM grouped_topk, moe_permute, moe_unpermute"] = Entry(theirs, their_check, written)
    between = 2 * pairs * row  # written and read again: from the cache, where they fit
    size = tokens * (experts * 2 + 2 * row) + (between if between > 2 * CACHE else 0)
    yield Operation(f"step {name}", tokens, size, Entry(ours, check, (*routings[0][:2], *written)), others, calls=calls)
