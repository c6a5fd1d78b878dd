"""Muon: the directions of its steps, in each number format, one by one or many matrices at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpsearch.training.optimizing.muon import Muon, orthogonalised

SHAPES = [(32, 32), (32, 96), (128, 32), (1, 16), (16, 1)]
FORMATS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_become_equally_long_and_stay_where_they_were(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    found = orthogonalised(matrices, dtype).float()
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ found @ right.mT  # diagonal when no direction was turned
    lengths = inside.diagonal(dim1=1, dim2=2)
    trusted = values > 0.01 * values[:, :1]  # what is smaller counts as nothing
    assert (lengths[trusted] > 0.7).all()
    assert (lengths[trusted] < 1.3).all()
    assert (inside - torch.diag_embed(lengths)).abs().max() < (0.05 if dtype is torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_matrix_of_low_rank_or_of_zeros_stays_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    low = torch.randn(1, 64, 2) @ torch.randn(1, 2, 256)
    found = orthogonalised(torch.cat([low, torch.zeros_like(low)]), dtype).float()
    assert torch.linalg.svdvals(found[0])[:2].min() > 0.7
    assert torch.linalg.svdvals(found[0]).max() < 1.4
    assert found[1].abs().max() == 0


def test_a_step_is_as_long_as_torchs_own_and_points_the_same_way() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(32, 64), (32, 64), (64, 32), (32, 32)]]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    before = [parameter.detach().clone() for parameter in ours]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for was, mine, other in zip(before, ours, theirs, strict=True):
        steps = (mine - was).flatten(), (other - was).flatten()
        assert torch.cosine_similarity(*steps, dim=0) > 0.95
        assert 0.85 < steps[0].norm() / steps[1].norm() < 1.3


def test_matrices_of_one_shape_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(16, 48)) for _ in range(3)]
    alone = copy.deepcopy(together)
    for mine, other in zip(together, alone, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    Muon(together, lr=0.1, weight_decay=0.0).step()
    for other in alone:
        Muon([other], lr=0.1, weight_decay=0.0).step()
    for mine, other in zip(together, alone, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)
