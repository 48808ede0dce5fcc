"""A Flax NNX transformer block with jaxmoe.nnx.MoE for feed-forward: it trains, and its bias evens out the load.

    python examples/nnx_block.py

Needs flax and optax. The task: after each token comes the sum of it and the one before, modulo the vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxmoe
from jaxmoe.nnx import MoE

VOCABULARY, WIDTH, LENGTH, BATCH, STEPS = 16, 32, 16, 16, 60
CONFIG = jaxmoe.RoutingConfig(num_experts=8, top_k=2, routed_scaling_factor=2.5, n_shared_experts=1)


class Block(nnx.Module):
    """Embedding, one pre-norm transformer block, and the head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.moe = MoE(CONFIG, WIDTH, 32, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits [batch, length, vocabulary], the balance loss of the MoE layer)."""
        x = self.embedding(tokens) + self.position[...]
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(tokens))
        h = self.moe_norm(x)
        y, routing = self.moe(h)
        balance = jaxmoe.sequence_balance_loss(self.moe.logits(h), routing, CONFIG, sequence_length=LENGTH)
        return self.head(x + y), balance


@nnx.jit
def train_step(block: Block, optimizer: nnx.Optimizer[Block], tokens: jax.Array) -> jax.Array:
    """One step of the optimiser and one of the bias; the cross entropy."""

    def loss(block: Block) -> tuple[jax.Array, jax.Array]:
        logits, balance = block(tokens[:, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return entropy + 1e-4 * balance, entropy

    grads, entropy = nnx.grad(loss, has_aux=True)(block)
    optimizer.update(block, grads)
    block.moe.update_bias(rate=0.001)  # by the load that the call kept
    return entropy


def batch(rng: np.random.Generator) -> jax.Array:
    """Tokens [BATCH, LENGTH + 1]."""
    tokens = rng.integers(VOCABULARY, size=(BATCH, LENGTH + 1))
    for i in range(2, LENGTH + 1):
        tokens[:, i] = (tokens[:, i - 1] + tokens[:, i - 2]) % VOCABULARY
    return jnp.asarray(tokens, jnp.int32)


def main() -> tuple[list[float], jax.Array, jax.Array]:
    """Trains; returns (the losses, the bias, the load of the last step)."""
    rng = np.random.default_rng(0)
    block = nnx.jit(lambda: Block(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(block, optax.adam(3e-3), wrt=nnx.Param)  # the bias is no nnx.Param
    losses = [float(train_step(block, optimizer, batch(rng))) for _ in range(STEPS)]
    assert block.moe.bias is not None  # use_bias is True unless said otherwise
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"load {block.moe.load[...].tolist()}, the shared expert last")
    print(f"bias {block.moe.bias[...].round(4).tolist()}")
    return losses, block.moe.bias[...], block.moe.load[...]


if __name__ == "__main__":
    main()
