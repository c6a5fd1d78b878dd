"""Private parts of torch, each with the version it was read from (2.13). See `tests/unit/test_internals.py`.

The operations on lists of tensors are those of torch's own optimizers; its documentation calls them beta.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

add_ = torch._foreach_add_
div_ = torch._foreach_div_
lerp = torch._foreach_lerp
lerp_ = torch._foreach_lerp_
mul_ = torch._foreach_mul_


def is_in_bad_fork() -> bool:
    """Whether this process is a fork of one that has used CUDA."""
    return bool(torch.cuda._is_in_bad_fork())


def release(replica: DistributedDataParallel) -> None:
    """Let go of a replica's threads before its process group ends: else they wait with Python's lock in their hand."""
    del replica.logger
    del replica.reducer
