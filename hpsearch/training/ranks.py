"""The processes that train one run together, one a device: the first leads, the others follow. Owns torch.distributed.

Gradients and losses travel by NCCL between GPUs and by gloo between CPUs; what the processes say to each other travels
by gloo as numbers and bytes, and nothing of it is unpickled.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from hpsearch.training import torch_internals


class Ranks:
    """One process that trains alone: what it asks the others it answers itself."""

    rank = 0
    size = 1

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the others."""

    def largest(self, number: int) -> int:
        """The largest number that a process brings along; all of them must, and wait here for the last."""
        return number

    def tell(self, content: bytes = b"") -> bytes:
        """What the first process says; the others' content is not looked at."""
        return content

    def gather(self, content: bytes) -> list[bytes]:
        """What each process says, by rank."""
        return [content]

    def add(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in its place."""
        return value

    def spread(self, values: Iterable[Tensor]) -> None:
        """Put the first process's tensors in the place of the others'."""

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module, so that its gradients are the mean over all processes after each backward pass."""
        return module

    def without_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Backward passes inside keep their gradients to themselves, for one outside that sends the sum."""
        return nullcontext()


class ProcessRanks(Ranks):
    """One of several processes that found each other through a store. See `lead` and `join`."""

    def __init__(self, store: Store, *, rank: int, size: int, host: str, timeout: timedelta) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = _interface(host)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        self._store = store  # the first process's store serves the others for as long as it lives
        self._replicas: list[DistributedDataParallel] = []
        self.rank = rank
        self.size = size

    def __exit__(self, *_: object) -> None:
        for replica in self._replicas:
            torch_internals.release(replica)
        dist.destroy_process_group()

    def largest(self, number: int) -> int:
        value = torch.tensor(int(number))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def tell(self, content: bytes = b"") -> bytes:
        length = torch.tensor(len(content))
        dist.broadcast(length, 0)
        if not self.rank:
            dist.broadcast(_tensor(content), 0)
            return content
        heard = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(heard, 0)
        return heard.numpy().tobytes()

    def gather(self, content: bytes) -> list[bytes]:
        lengths = [torch.tensor(0) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(content)))
        longest = max(map(int, lengths))
        heard = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(heard, _tensor(content.ljust(longest, b"\0")))
        return [part.numpy().tobytes()[: int(length)] for part, length in zip(heard, lengths, strict=True)]

    def add(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def spread(self, values: Iterable[Tensor]) -> None:
        for value in values:
            dist.broadcast(value, 0)

    def replicate(self, module: nn.Module) -> nn.Module:
        # Some architectures have weights that some losses do not touch.
        replica = DistributedDataParallel(
            module, forward_sync_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        self._replicas.append(replica)
        return replica

    def without_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()


def lead(host: str, size: int, call: Callable[[str], None], *, timeout: timedelta) -> ProcessRanks:
    """Be the first of `size` processes; `call` is given the address, by which it makes the others `join`.

    `host` is this machine as the others reach it: nothing listens on its other addresses.
    """
    listener = socket.create_server((host, 0), family=_family(host))
    port = listener.getsockname()[1]
    store = TCPStore(
        host, port, size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    call(f"{host} {port}")
    return ProcessRanks(store, rank=0, size=size, host=host, timeout=timeout)


def join(address: str, *, rank: int, size: int, host: str, timeout: timedelta) -> ProcessRanks:
    """Be another of the processes that the one at `address` leads; `host` is this machine as the others reach it."""
    there, port = address.split()
    store = TCPStore(there, int(port), size, is_master=False, timeout=timeout, wait_for_workers=False)
    return ProcessRanks(store, rank=rank, size=size, host=host, timeout=timeout)


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET


def _interface(host: str) -> str:
    """The network interface with this address: left to itself gloo takes whatever the host's name resolves to."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return str(name)
    raise OSError(f"no network interface of this machine has the address {host}")
