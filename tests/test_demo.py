"""`python -m jaxmoe demo`, in a size for tests: what it shows is real, and it fails where JAX and PyTorch differ."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
import jaxmoe
from bridge import demo, demo_torch
from jaxmoe.demo import model, training
from jaxmoe.demo.text import Text, baselines, load_text
from jaxmoe.implementation import default_implementation

TINY = functools.partial(model.ModelConfig, layers=2, width=32, heads=2, hidden=16, context=32)
PLAN = training.TrainingConfig(steps=5)


@pytest.fixture
def run_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command on a tiny model: (exit code, output folder)."""
    monkeypatch.setattr(demo, "ModelConfig", TINY)
    monkeypatch.setattr(demo, "SAMPLE_BYTES", 4)

    def run(*options: str) -> tuple[int, Path]:
        return demo.main(["--steps", "5", "--output", str(tmp_path / "out"), *options]), tmp_path / "out"

    return run


def layer(config: jaxmoe.RoutingConfig, width: int = 24, hidden: int = 8) -> jaxmoe.MoEParams:
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) * 0.3
    return jaxmoe.MoEParams(
        router=normal(0, config.num_experts, width),
        bias=normal(1, config.num_experts),
        gate_up=normal(2, config.num_expert_ids, width, 2 * hidden),
        down=normal(3, config.num_expert_ids, hidden, width),
    )


def test_end_to_end(run_demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    # What a stranger sees: every part is there, nothing was copied, both layers agree, the picture is a picture.
    code, output = run_demo()
    printed = capsys.readouterr().out
    assert code == 0
    assert (output / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    addresses = [line.split() for line in printed.splitlines() if " 0x" in line]
    assert len(addresses) == 2 * 5
    for *_, in_jax, in_torch, back, copied in addresses:
        assert in_jax == in_torch == back
        assert copied == "no"
    agreement = [line.split() for line in printed.splitlines() if "100.00%" in line or "%)" in line]
    assert [words[-1] for words in agreement] == ["yes", "yes"]
    assert f"implementation: {default_implementation()[0]!r}" in printed
    for part in ("balancing starts", "before balancing (step 2)", "bias set to 0", "from byte pairs alone", "[MODEL:]"):
        assert part in printed


def test_own_text(run_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # --text is what is learnt: the baselines of a text with one possible next byte are near zero, bytes are not UTF-8.
    path = tmp_path / "text.bin"
    path.write_bytes(bytes([255, 0]) * 5000)
    assert run_demo("--text", str(path))[0] == 0
    printed = capsys.readouterr().out
    assert f"{path}: 9,000 bytes to learn, 1,000 held out" in printed
    pairs = next(line for line in printed.splitlines() if "from byte pairs alone" in line)
    assert float(pairs.split()[-1]) < 0.1


def test_swapped_experts_fail(
    run_demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The check must be able to fail: plain PyTorch gets two experts the wrong way round.
    plain = demo_torch.moe

    def swapped(x: torch.Tensor, params: bridge.MoEParams, config: jaxmoe.RoutingConfig) -> Any:
        order = torch.arange(config.num_expert_ids)
        order[[0, 1]] = order[[1, 0]]
        return plain(x, params._replace(down=params.down[order]), config)

    monkeypatch.setattr(demo_torch, "moe", swapped)
    assert run_demo()[0] == 1
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines() if "(100.00%)" in line] == ["NO", "NO"]
    assert "FAILED" in printed


def test_other_choices_fail(run_demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Ids that differ are not excused as ties: plain PyTorch routes without the groups.
    plain = demo_torch.choose
    ungrouped = lambda logits, bias, config: plain(logits, bias, replace(config, n_group=1, topk_group=1))
    monkeypatch.setattr(demo_torch, "choose", ungrouped)
    assert run_demo()[0] == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_copy_fails(run_demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # The addresses are compared, not only printed.
    view = bridge.to_torch
    monkeypatch.setattr(bridge, "to_torch", lambda array: view(array).clone())
    assert run_demo()[0] == 1
    assert capsys.readouterr().out.count("  YES\n") == 2 * 5


def test_what_counts_as_agreement() -> None:
    # Ties may differ, nothing else; and what was not compared (nan) has not agreed.
    agreement = demo.Agreement(tokens=10, equal=9, ties=1, absolute=1e-7, relative=1e-7)
    assert agreement.passed
    assert not agreement._replace(ties=0).passed
    assert not agreement._replace(relative=2 * demo.TOLERANCE).passed
    assert not agreement._replace(relative=float("nan")).passed
    assert not agreement._replace(equal=0, ties=10).passed


@pytest.mark.parametrize(
    ("config", "has_bias"),
    [
        pytest.param(model.ModelConfig().routing, True, id="demo"),
        pytest.param(model.ModelConfig().routing, False, id="no bias"),
        pytest.param(jaxmoe.RoutingConfig(num_experts=12, top_k=3), True, id="one group"),
        pytest.param(
            jaxmoe.RoutingConfig(num_experts=12, top_k=6, n_group=6, topk_group=3, n_shared_experts=2),
            True,
            id="all in reach, two shared",
        ),
    ],
)
def test_plain_torch_agrees_with_jaxmoe(config: jaxmoe.RoutingConfig, has_bias: bool) -> None:
    # Without the bridge: two implementations that share no code, on random weights.
    config = replace(config, group_score="top2")
    params = layer(config) if has_bias else replace(layer(config), bias=None)
    x = jax.random.normal(jax.random.key(4), (64, 24))
    y, routing = jaxmoe.moe(x, params, config, implementation="xla")
    tensor = lambda array: None if array is None else torch.tensor(np.asarray(array))
    tensors = bridge.MoEParams(*(tensor(getattr(params, name)) for name in bridge.MoEParams._fields))
    expected, choice = demo_torch.moe(tensor(x), tensors, config)
    assert choice.margin.min() > demo.TIE  # else the ids need not be equal
    np.testing.assert_array_equal(routing.experts[:, : config.top_k], choice.ids)
    np.testing.assert_allclose(routing.weights[:, : config.top_k], choice.weights, rtol=2e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_margin_names_the_narrowest_choice() -> None:
    # By hand, scores plus bias: groups (8 + 1, 6 + 2, 7 + 0) keep two by a margin of 1; the experts then by 1, 2 and 4.
    config = jaxmoe.RoutingConfig(num_experts=6, top_k=2, n_group=3, topk_group=2)
    logits = torch.zeros(1, 6)
    bias = torch.tensor([8.0, 1.0, 6.0, 2.0, 7.0, 0.0])
    choice = demo_torch.choose(logits, bias, config)
    assert choice.ids.tolist() == [[0, 2]]
    assert choice.margin.tolist() == [1.0]
    assert demo_torch.choose(logits, torch.tensor([8.0, 1.0, 6.0, 2.0, 8.0, 0.0]), config).margin.tolist() == [0.0]


def test_balancing_alone_moves_the_bias() -> None:
    # With a rate of 0 the bias keeps its bits while everything else is trained; weight decay would shrink it.
    config = TINY(layers=1)
    params = model.init(jax.random.key(0), config)
    bias = np.linspace(-1, 1, config.routing.num_experts, dtype=np.float32)
    for block in params["blocks"]:
        block["moe"].bias = jnp.array(bias)
    state = training.State(params, PLAN.optimizer().init(params))
    router = np.array(params["blocks"][0]["moe"].router)
    tokens = np.zeros((PLAN.batch, config.context + 1), np.int32)
    options = {"config": config, "training": PLAN, "implementation": None}
    for rate, moved in ((0.0, False), (0.5, True)):
        old = state
        state, loss, load = training.step(old, tokens, np.float32(rate), **options)
        after = np.array(state.params["blocks"][0]["moe"].bias)
        assert (after != bias).any() == moved
        assert old.params["head"].is_deleted()  # donated: two copies of a model need not fit
        assert np.isfinite(loss)
        assert (
            np.asarray(load).sum(axis=1).tolist()
            == [PLAN.batch * config.context * config.routing.top_k] * config.layers
        )
    assert (np.array(state.params["blocks"][0]["moe"].router) != router).any()


def test_same_seed_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    # Training is reproducible; another seed is another run.
    config = TINY(layers=1)
    text = load_text(None, 1000)
    held_out = jnp.zeros((1, config.context + 1), jnp.int32)
    first, again, other = (training.train(text, held_out, config, PLAN, seed, None) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.loss, again.loss)
    np.testing.assert_array_equal(first.load, again.load)
    assert (first.loss != other.loss).any()
    assert "bits per byte" in capsys.readouterr().out


def test_the_model_is_causal() -> None:
    # Else the loss would mean nothing: a later byte must not reach an earlier prediction.
    config = TINY()
    params = model.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (1, config.context), 0, 256)
    logits = jax.jit(lambda tokens: model.apply(params, tokens, config, None)[0])
    before, after = logits(tokens), logits(tokens.at[0, 20].set((tokens[0, 20] + 1) % 256))
    np.testing.assert_array_equal(before[0, :20], after[0, :20])
    assert (before[0, 20:] != after[0, 20:]).any(axis=1).all()


def test_held_out_text_was_not_learnt() -> None:
    # Python's topics repeat each other's paragraphs; the split must not.
    train, held_out = (bytes(part).split(b"\n\n") for part in load_text(None, 1000)[1:])
    assert not set(train[:-1]) & set(held_out[1:])


def test_baselines() -> None:
    # Counted by hand, each of the 256 bytes once more than seen.
    train, held_out = np.array([1, 1, 2, 1], np.uint8), np.array([1, 2], np.uint8)
    found = baselines(Text("", train, held_out))
    assert found["byte frequencies"] == pytest.approx(-(np.log2(4 / 260) + np.log2(2 / 260)) / 2)
    assert found["byte pairs"] == pytest.approx(-np.log2(2 / 258))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "4"], "--steps: expected at least 5, got 4"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--text", "no such file"], "no such file"),
        (["--text", __file__], "text: expected at least"),
        (["--implementation", "cuda"], "invalid choice: 'cuda'"),
    ],
)
def test_wrong_options(
    options: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each is refused by name before anything is trained.
    monkeypatch.setattr(demo, "ModelConfig", lambda: model.ModelConfig(context=10**6))
    with pytest.raises(SystemExit) as stop:
        demo.main(["--output", str(tmp_path), *options])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_pallas_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Never a silent fallback.
    if default_implementation()[0] == "pallas":
        pytest.skip("this machine has a GPU that runs the kernels")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--output", str(tmp_path), "--implementation", "pallas"])
    assert stop.value.code == 2
    assert "need a GPU" in capsys.readouterr().err
