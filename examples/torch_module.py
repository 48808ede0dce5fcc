"""A torch module before and after: the same MoE block in plain torch, and with `bridge.moe` in its place.

    python examples/torch_module.py

The parameters are the same tensors, and outputs and gradients are the same. On a GPU `bridge.moe` runs the kernels on
torch's stream; elsewhere it goes through JAX.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

import bridge

CONFIG = bridge.RoutingConfig(num_experts=6, top_k=2, routed_scaling_factor=2.5)
TOKENS, WIDTH, INNER = 24, 16, 8


class Before(torch.nn.Module):
    """Sigmoid scores, a bias for the choice, one expert after the other."""

    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        experts = CONFIG.num_experts
        self.router = torch.nn.Parameter(torch.randn(experts, WIDTH) * WIDTH**-0.5)
        self.gate_up = torch.nn.Parameter(torch.randn(experts, WIDTH, 2 * INNER) * WIDTH**-0.5)
        self.down = torch.nn.Parameter(torch.randn(experts, INNER, WIDTH) * INNER**-0.5)
        self.register_buffer("bias", 0.1 * torch.randn(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, WIDTH] for x [T, WIDTH]."""
        scores = (x @ self.router.T).sigmoid()
        chosen = (scores + self.bias).topk(CONFIG.top_k, dim=1).indices
        weights = scores.gather(1, chosen)
        weights = CONFIG.routed_scaling_factor * weights / weights.sum(dim=1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(CONFIG.num_experts):
            token, slot = torch.where(chosen == expert)
            gate, up = (x[token] @ self.gate_up[expert]).chunk(2, dim=1)
            out = (silu(gate) * up) @ self.down[expert]
            y = y.index_add(0, token, out * weights[token, slot, None])
        return y


class After(Before):
    """The same parameters; forward is one call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, WIDTH] for x [T, WIDTH]."""
        params = bridge.MoEParams(router=self.router, gate_up=self.gate_up, down=self.down, bias=self.bias)
        y, _ = bridge.moe(x, params, CONFIG)
        return y


def results(block: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.sin().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


def main() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Both blocks' results."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = Before().to(device), After().to(device)
    after.load_state_dict(before.state_dict())
    x = torch.randn(TOKENS, WIDTH, device=device)
    old, new = results(before, x), results(after, x)
    for name, value in old.items():
        print(f"{name:8} largest {value.abs().max():.3f}, difference {(value - new[name]).abs().max():.1e}")
    return old, new


if __name__ == "__main__":
    main()
