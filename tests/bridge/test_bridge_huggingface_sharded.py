"""bridge.huggingface on models that FSDP2 (`fully_shard`) shards over two processes, with gloo on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers", minversion="5.13")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402

fully_shard = pytest.importorskip("torch.distributed.fsdp").__dict__.get("fully_shard")
if fully_shard is None:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)
from bridge.huggingface import patch  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    assert_equal,
    layers_of,
    logits_of,
    make,
    prompt,
)

WORLD = 2
WHOLE = "expected parameters that are neither sharded nor of another kind than torch.nn.Parameter"


def shard(model: Any, each_layer: bool = True) -> Any:
    for layer in model.model.layers if each_layer else ():
        fully_shard(layer)
    return fully_shard(model)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def refuse_to_fuse(each_layer: bool, forward: bool) -> None:
    """Shards cannot be folded; nor can what is whole since the last call and FSDP's all the same."""
    model = make("deepseek_v3")
    expected = logits_of(model)
    shard(model, each_layer)
    if forward:
        close(logits_of(model), expected)
    for part in (model, layers_of(model)[0] if each_layer and not forward else model):
        with pytest.raises(ValueError, match=rf"^fuse_shared_experts: {WHOLE}, got .* before fully_shard"):
            patch(part, fuse_shared_experts=True)
    close(logits_of(model), expected)


def refuse_what_is_sharded_inside() -> None:
    """The shared experts alone, and whole for now; another layer is nobody's business."""
    model = make("ernie4_5_moe")
    first, second = layers_of(model)
    fully_shard(second.shared_experts).unshard()
    for part, name in ((model, "model.layers.1.mlp."), (second, "")):
        got = rf"got FSDPErnie4_5_MoeMLP in '{name}shared_experts'"
        with pytest.raises(ValueError, match=f"^fuse_shared_experts: {WHOLE}, {got}"):
            patch(part, fuse_shared_experts=True)
    expected = logits_of(model)
    patch(first, fuse_shared_experts=True)
    close(logits_of(model), expected)


def refuse_dtensor() -> None:
    """Sharded otherwise, as for tensor parallelism."""
    model, mesh = make("deepseek_v3"), init_device_mesh("cpu", (WORLD,))
    (layer,) = layers_of(model)
    layer.experts.down_proj = torch.nn.Parameter(distribute_tensor(layer.experts.down_proj.data, mesh, [Shard(0)]))
    before = {name: id(p) for name, p in model.named_parameters()}
    got = "got DTensor in 'model.layers.1.mlp.experts.down_proj'"
    with pytest.raises(ValueError, match=f"^fuse_shared_experts: {WHOLE}, {got}"):
        patch(model, fuse_shared_experts=True)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def refuse_to_restore(each_layer: bool, forward: bool) -> None:
    """Nor can they be unfolded; the model goes on."""
    model = make("deepseek_v3")
    expected = logits_of(model)
    handle = patch(model, fuse_shared_experts=True)
    shard(model, each_layer)
    if forward:
        close(logits_of(model), expected)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^model: {WHOLE}, got FSDP\w+ in '.*'; "):
            handle.restore()
    close(logits_of(model), expected)


OPTIONS = {
    "full": StateDictOptions(full_state_dict=True),
    "sharded": StateDictOptions(),
    "offloaded": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def load(options: StateDictOptions) -> None:
    """Checkpoints in the names and shapes of the plain model, whole and in shards, go in and come out."""
    other = make("deepseek_v3", seed=7)
    values, expected = other.state_dict(), logits_of(other)
    model = make("deepseek_v3")
    patch(model, fuse_shared_experts=True)
    shard(model)
    assert (logits_of(model) - expected).abs().max() > 0.02
    model.reshard()  # torch loads no model that is whole after a call
    if options.full_state_dict:
        given = {name: value.clone() for name, value in values.items()}
    else:
        source = make("deepseek_v3", seed=7)
        patch(source, fuse_shared_experts=True)
        given = get_model_state_dict(shard(source), options=options)
    set_model_state_dict(model, given, options=options)
    close(logits_of(model), expected)
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert_equal(found, dict(values))


def load_part() -> None:
    """What is missing stays as it was."""
    model, name = make("deepseek_v3"), "model.layers.1.mlp.shared_experts.up_proj.weight"
    expected = dict(make("deepseek_v3", seed=7).state_dict())
    expected[name] = model.state_dict()[name].clone()
    patch(model, fuse_shared_experts=True)
    shard(model)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, {key: value for key, value in expected.items() if key != name}, options=options)
    assert_equal(get_model_state_dict(model, options=options), expected)


def train_and_restore() -> None:
    """Without fusing any order does: a model that is patched, sharded with its experts apart, trained and restored."""
    model, tokens = make("deepseek_v3").train(), prompt()
    handle = patch(model)
    (layer,) = layers_of(model)
    fully_shard(layer.experts)
    fully_shard(layer.gate)
    shard(model)
    plain = make("deepseek_v3").train()
    plain(input_ids=tokens, labels=tokens).loss.backward()
    for _ in range(2):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                assert p.grad is not None, name
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-5)
        handle.restore()
    close(logits_of(model), logits_of(plain))


CASES: dict[str, Callable[[], None]] = {
    f"{name} each_layer={each_layer} forward={forward}": lambda run=run, a=each_layer, b=forward: run(a, b)
    for name, run in {"fuse": refuse_to_fuse, "restore": refuse_to_restore}.items()
    for each_layer in (False, True)
    for forward in (False, True)
}
CASES |= {f"load {name}": lambda options=options: load(options) for name, options in OPTIONS.items()}
CASES |= {
    "load part": load_part,
    "inside": refuse_what_is_sharded_inside,
    "dtensor": refuse_dtensor,
    "train": train_and_restore,
}


def work(rank: int, folder: str) -> None:
    """Runs all cases; a file says what came of them."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results = {}
    for name, case in CASES.items():
        try:
            case()
        except BaseException as error:  # also what pytest.raises raises
            results[name] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_sharded(case: str, results: list[dict[str, str]]) -> None:
    """Each case, in both processes."""
    assert [found.get(case) for found in results] == [None] * WORLD
