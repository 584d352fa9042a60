"""Muon: momentum whose matrices are made nearly orthogonal before each step; for the hidden matrices of a network.

Source: Keller Jordan, KellerJordan/Muon: muon.py; the step is scaled to AdamW's as in arXiv:2502.16982. torch has one too, which
takes the matrices one by one; here those of one shape, the same weight of each layer, go through one batched product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """g (n, rows, cols) with all singular values pulled to about 1, by Newton and Schulz's iteration in bfloat16."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over matrices; lr is of AdamW's size."""

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        groups: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            groups.setdefault(p.shape, []).append(p)
        super().__init__(
            [{"params": group} for group in groups.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients there are."""
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            state["momentum"].lerp_(grads, 1 - group["momentum"])
            update = orthogonalize(grads.lerp(state["momentum"], group["momentum"]))
            scale = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-scale)
