"""What both trainings of the demo share: optimiser, schedule, average, and how far a picture is off."""

from __future__ import annotations

import math
from typing import Any

import torch


class Muon:
    """Momentum made orthogonal for convolutions inside the network, Adam for the rest."""

    def __init__(self, module: Any) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        ends = ("conv_in.weight", "conv_out.weight")
        self.matrices = [p for name, p in named if p.ndim == 4 and not name.endswith(ends)]
        chosen = {id(p) for p in self.matrices}
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.Adam([p for _, p in named if id(p) not in chosen], lr=1e-3, betas=(0.9, 0.98))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the parameters from their gradients and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = 0.1 * rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for parameter, momentum in zip(self.matrices, self.momenta, strict=True):
            if parameter.grad is None:
                continue
            momentum.lerp_(parameter.grad, 0.08)
            matrix = parameter.grad.lerp(momentum, 0.92).flatten(1)
            update = orthogonal(matrix).view(parameter.shape)
            parameter.add_(update, alpha=-rate * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
            parameter.grad = None


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a matrix near 1 (five Newton-Schulz steps)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = (matrix.T if tall else matrix) / (matrix.norm() + 1e-12)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def picture_loss(output: torch.Tensor, target: torch.Tensor, sharp: float) -> torch.Tensor:
    """L1 + MSE + a weighted L1 on vertical and horizontal differences."""
    error = output - target
    gradient = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + sharp * gradient


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """PSNR in dB of 8-bit pictures, as a viewer of the decoded PNG would measure it."""
    a = ((output / 2 + 0.5).clamp(0, 1) * 255).round()
    b = ((target / 2 + 0.5).clamp(0, 1) * 255).round()
    return 10.0 * math.log10(255.0**2 / max(float((a - b).square().mean()), 1e-9))


def update_average(average: Any, model: Any, step: int) -> None:
    """Move the EMA weights towards the model's, faster in the first steps."""
    decay = min(0.985, (1 + step) / (10 + step))
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1.0 - decay)


def schedule(step: int, share: float, peak: float, floor: float) -> float:
    """Warm up over 15 steps, then follow a cosine from ``peak`` to ``floor * peak``."""
    level = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return peak * level * min(1.0, (step + 1) / 15)
