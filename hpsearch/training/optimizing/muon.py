"""Muon for hidden matrices: a momentum step with all its directions equally long (Jordan et al., 2024).

`torch.optim.Muon` takes one matrix at a time, always in bfloat16, which many CPUs only emulate. Here matrices of one
shape share each product, in the format that the device computes fast in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.training import torch_internals

COEFFICIENTS = (
    (8.13772386717465, -22.713708635181533, 16.32543755560506),
    (3.965223820939575, -2.836400988165974, 0.522467436609286),
    (3.4886746892998373, -2.5621672977697334, 0.5016249217987441),
    (2.51152716635273, -1.8524483560830065, 0.43883263558021074),
)
"""Of each iteration's odd polynomial of degree 5. Each is the best one for the singular values that the one before
leaves of 0.003 to 1 (Amsel et al., Polar Express, arXiv 2505.16932): these end within 0.79 and 1.21. Fewer iterations
train some models as well and others worse."""
_MARGIN = 1.01
"""Rounding may leave a singular value this much above 1, where the polynomials do not hold."""
_MOST_STACKED = 2**25
"""Elements of matrices that are orthogonalised at once; they are held twice."""


class Muon(torch.optim.Optimizer):
    """Its steps are as long as AdamW's, so that one learning rate serves both (Liu et al., arXiv 2502.16982)."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`params` are matrices; `dtype` is what they are orthogonalised in."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        loss = None if closure is None else float(torch.enable_grad()(closure)())
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                size = max(1, _MOST_STACKED // shape.numel())
                for start in range(0, len(parameters), size):
                    self._update(parameters[start : start + size], group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """A step of matrices of one shape."""
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch_internals.lerp_(momentum, gradients, 1 - group["momentum"])
        directions = torch.stack(torch_internals.lerp(gradients, momentum, group["momentum"]))
        updates = orthogonalised(directions, self._dtype).to(parameters[0].dtype)
        step = 0.2 * group["lr"] * math.sqrt(max(parameters[0].shape))
        torch_internals.mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch_internals.add_(parameters, list(updates), alpha=-step)


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices of shape (count, rows, columns) with their singular values brought near 1; zeros stay zeros."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT, dtype).mT
    x = matrices.to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    # The Schatten 4-norm bounds the largest singular value more tightly than the Frobenius norm does.
    scale = 1 / (_MARGIN * torch.linalg.matrix_norm(gram, keepdim=True).sqrt().clamp(min=1e-7))
    x, gram = scale * x, scale**2 * gram
    # Among small factors the products are cheaper, and in bfloat16 their errors add up.
    if dtype is torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        return torch.bmm(_polar_factor(gram), x)
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        gram = x @ x.mT if number else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _polar_factor(gram: Tensor) -> Tensor:
    """What the iterations multiply `x` by from the left, from `x @ x.mT` alone: they are polynomials of it."""
    product = gram
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if number else factor
        if number < len(COEFFICIENTS) - 1:
            gram = factor @ (gram @ factor)
    return product
