"""Muon (Jordan et al., 2024), the optimizer of the hidden matrices.

`torch.optim.Muon` orthogonalizes in bfloat16, which is very slow on CPUs that emulate it; this one stays in float32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon:
    """Momentum whose update is replaced by the nearest semi-orthogonal matrix."""

    def __init__(self, parameters: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._parameters = list(parameters)
        self._velocities = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply the gradients and clear them."""
        for parameter, velocity in zip(self._parameters, self._velocities, strict=True):
            assert parameter.grad is not None
            velocity.lerp_(parameter.grad, 1 - self._momentum)
            update = orthogonalize(parameter.grad.lerp(velocity, self._momentum))  # Nesterov
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.mul_(1 - learning_rate * self._weight_decay)
            parameter.add_(update, alpha=-learning_rate * scale)
            parameter.grad = None


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of the matrix's singular value decomposition, by Newton-Schulz iteration. float32 [n, m]"""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
