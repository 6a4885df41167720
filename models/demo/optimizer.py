"""Muon for the matrices inside the layers, AdamW for the rest.

Muon (Jordan et al. 2024) makes every update a nearly orthogonal matrix. It needs about half the tokens of AdamW here,
and tokens are what two CPU cores lack.
"""

import torch
import torch.distributed as dist

from model import FAST_BF16


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix; `update` is [matrices, rows, columns].

    The iteration corrects itself, so bf16 is enough for it (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.size(1) > update.size(2)
    x = update.transpose(1, 2) if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if FAST_BF16 else x
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then `orthogonal`. The processes share the matrices out and add up what they made."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                updates = []
                for param in params:
                    moving = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    moving.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(moving, group["momentum"]))
                stacked = torch.stack(updates)
                mine = slice(dist.get_rank(), None, dist.get_world_size())
                shared = torch.zeros_like(stacked)
                shared[mine] = orthogonal(stacked[mine])
                dist.all_reduce(shared)
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, shared):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def optimizers(model: torch.nn.Module, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """The two optimizers; each group remembers its peak rate for the schedule."""
    inner = [p for key, p in model.named_parameters() if p.ndim == 2 and "embed" not in key and "lm_head" not in key]
    ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in ids]
    both = [Muon(inner, matrix_lr, weight_decay=0.1),
            torch.optim.AdamW(rest, other_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return both
