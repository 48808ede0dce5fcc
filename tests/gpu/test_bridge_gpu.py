"""What only a GPU can show of the bridge: the order of streams, who may use memory again when, and true donation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxmoe

torch = pytest.importorskip("torch")
import bridge  # noqa: E402
from bridge import views  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU"),
    pytest.mark.usefixtures("through_dlpack"),
]

CONFIG = jaxmoe.RoutingConfig(num_experts=64, top_k=4, n_group=8, topk_group=4)
TOKENS, WIDTH = 512, 1024
LONG = 200_000_000  # clock cycles of a GPU: about 0.1 s, far longer than any launch takes to get there


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The device; whatever a test leaves running is done before the next one."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


def late(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Writes to the tensor a long time from now, on the current stream."""
    torch.cuda._sleep(LONG)
    tensor.copy_(value)


def plan_for(gpu: torch.device, tokens: int = TOKENS) -> bridge.DispatchPlan:
    logits = torch.randn(tokens, CONFIG.num_experts, device=gpu, generator=torch.Generator(gpu).manual_seed(0))
    return bridge.plan_dispatch(bridge.route(logits, config=CONFIG).experts, CONFIG.num_experts)


def expected(x: torch.Tensor, plan: bridge.DispatchPlan) -> torch.Tensor:
    return x[plan.slots.long() // plan.rows.shape[1]]


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("with_out", [False, True], ids=["result", "out"])
def test_streams_in_both_directions(side: bool, with_out: bool, gpu: torch.device) -> None:
    """JAX must wait for what torch's stream has yet to write, and that stream for JAX; the host waits for neither."""
    plan, value = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    wanted = expected(value, plan)
    x, out = torch.zeros_like(value), torch.zeros_like(wanted)
    bridge.dispatch(x, plan, out=out.clone())  # compiled: from here on the host runs ahead
    bridge.dispatch(x, plan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        late(x, value)
        rows = bridge.dispatch(x, plan, out=out if with_out else None)
        assert not stream.query(), "the host must not have waited, or this shows nothing"
        seen = rows.clone()  # on torch's stream, right behind
    torch.cuda.synchronize()
    assert torch.equal(seen, wanted)


def test_inputs_may_be_overwritten_at_once(gpu: torch.device) -> None:
    """Behind a call, torch's stream holds back its own writes until JAX has read."""
    plan, x = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    wanted, gate = expected(x, plan), torch.zeros_like(x)
    bridge.dispatch(x, plan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late(gate, x)
        rows = bridge.dispatch(gate, plan)
        gate.fill_(-1)
    torch.cuda.synchronize()
    assert torch.equal(rows, wanted)


def test_freed_inputs_are_not_used_again_too_early(gpu: torch.device) -> None:
    """torch may hand a freed input's memory to its stream's next tensor, which JAX, yet to read it, must not mind.

    JAX holds on to the tensor until it has read it (so far the next tensor was seen to get other memory).
    """
    plan, value = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    wanted = expected(value, plan)
    bridge.dispatch(value, plan)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    x = value.clone()
    rows = bridge.dispatch(x, plan)
    del x
    again = [torch.full_like(value, -1) for _ in range(8)]
    torch.cuda.synchronize()
    assert all((a == -1).all() for a in again)
    assert torch.equal(rows, wanted)


def test_freed_results_are_not_used_again_too_early(gpu: torch.device) -> None:
    """JAX's allocator knows nothing of a torch kernel that still reads a result which has died."""
    plan, x = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    wanted = expected(x, plan)
    bridge.dispatch(x, plan)
    fill = jax.jit(lambda: jnp.full(wanted.shape, -1.0))
    fill().block_until_ready()
    torch.cuda.synchronize()
    rows = bridge.dispatch(x, plan)
    address, seen = rows.data_ptr(), torch.empty_like(rows)
    torch.cuda._sleep(LONG)
    seen.copy_(rows)
    del rows
    gc.collect()
    taken = [fill() for _ in range(4)]  # JAX alone, not held back by any tensor
    assert address not in [array.unsafe_buffer_pointer() for array in taken]
    torch.cuda.synchronize()
    assert torch.equal(seen, wanted)


def test_memory_of_results_is_given_back(gpu: torch.device) -> None:
    """What is kept for torch's stream goes once the stream is past it: no leak."""
    plan, x = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    for _ in range(20):
        bridge.dispatch(x, plan)
        torch.cuda.synchronize()
    assert len(views._retired) <= 1


def test_out_is_donated(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place in the strictest sense: the address of JAX's result is the tensor's own."""
    plan, x = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    out, addresses, dispatch = torch.full((plan.slots.shape[0], WIDTH), -77.0, device=gpu), [], jaxmoe.dispatch

    def watched(**given: Any) -> jax.Array:
        result = dispatch(**given)
        addresses.append(result.unsafe_buffer_pointer())
        return result

    monkeypatch.setattr(jaxmoe, "dispatch", watched)
    address = out.data_ptr()
    assert bridge.dispatch(x, plan, out=out) is out
    assert addresses == [out.data_ptr()] == [address]
    assert torch.equal(out, expected(x, plan))


def test_a_result_elsewhere_is_an_error(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should JAX ever stop to write in place, nobody must take the unwritten tensor for a result."""
    plan, x = plan_for(gpu), torch.randn(TOKENS, WIDTH, device=gpu)
    dispatch = jaxmoe.dispatch
    monkeypatch.setattr(jaxmoe, "dispatch", lambda *, out, **given: dispatch(**given))
    with pytest.raises(RuntimeError, match="out: JAX did not write to the tensor it was given"):
        bridge.dispatch(x, plan, out=torch.zeros(plan.slots.shape[0], WIDTH, device=gpu))


def test_address_that_kernels_cannot_take(gpu: torch.device) -> None:
    """Pallas has the compiler assume 32 bytes: a kernel on anything less would read the wrong words."""
    memory = torch.zeros(TOKENS * 64 + 8, device=gpu)
    with pytest.raises(ValueError, match="logits: expected an address that is a multiple of 32 bytes"):
        bridge.route(memory[4:-4].view(TOKENS, 64), config=CONFIG)
    bridge.route(memory[8:].view(TOKENS, 64), config=CONFIG)


def test_capture_is_refused(gpu: torch.device) -> None:
    """JAX's runtime cannot be captured; the error says so and comes before anything is launched."""
    logits = torch.zeros(TOKENS, 64, device=gpu)
    bridge.route(logits, config=CONFIG)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        logits.add_(1)  # torch warns of an empty graph
        bridge.route(logits, config=CONFIG)


def test_gradients_on_a_side_stream(gpu: torch.device) -> None:
    """The backward pass runs in another thread, on the stream of the forward pass."""
    plan = plan_for(gpu)
    for _ in range(2):  # the first compiles
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = torch.zeros(TOKENS, WIDTH, device=gpu, requires_grad=True)
            rows = bridge.dispatch(x, plan)
            gradient = torch.zeros_like(rows)
            late(gradient, torch.ones_like(rows))
            (found,) = torch.autograd.grad(rows, x, gradient)
            found = found.clone()
        torch.cuda.synchronize()
        assert torch.equal(found, torch.full_like(found, CONFIG.top_k))


@pytest.mark.skipif("torch.cuda.device_count() < 2 or len(jax.local_devices()) < 2", reason="needs two GPUs")
def test_second_gpu() -> None:
    """torch's current device need not be the tensors'; tensors of both are refused."""
    logits = torch.randn(TOKENS, 64, device="cuda:1")
    routing = bridge.route(logits, config=CONFIG)
    assert routing.weights.device == logits.device
    with pytest.raises(ValueError, match="logits: expected the device of bias, cuda:0, got cuda:1"):
        bridge.route(logits, torch.zeros(64, device="cuda:0"), config=CONFIG)
