"""What is routed how, as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

from kernels_pallas.layout import Layout
from kernels_pallas.select import Groups


@dataclass(frozen=True)
class Rule:
    """What is routed how; the meaning of each field is that of jaxmoe.RoutingConfig."""

    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    scoring_func: str
    group_score: str
    renormalize: bool
    scale: float  # of the routed weights
    n_shared: int
    replicas: int
    shared_weight: float

    @property
    def num_slots(self) -> int:
        return self.top_k + self.n_shared

    @property
    def num_ids(self) -> int:
        return self.num_experts + self.n_shared * self.replicas

    @property
    def grouped(self) -> bool:
        """Whether some group is dropped; if not, there might as well be one."""
        return self.n_group > self.topk_group

    @property
    def groups(self) -> tuple[int, int]:
        """(how many, how large)."""
        count = self.n_group if self.grouped else 1
        return count, self.num_experts // count

    @property
    def top2(self) -> bool:
        return self.grouped and self.group_score == "top2" and self.groups[1] > 1

    def on_lanes(self, layout: Layout) -> Groups:
        """The groups as they lie there."""
        return Groups(layout.runs, self.n_group, self.topk_group, self.top2)

    def by_logit(self, has_bias: bool) -> bool:
        """Whether logits are the choices.

        Softmax keeps their order, so without a bias they are: finer than scores in float32, which round different
        logits to one score, and no exp for E experts. The sum of two needs the scores themselves.
        """
        return self.scoring_func == "softmax" and not has_bias and not (self.grouped and self.group_score == "top2")
