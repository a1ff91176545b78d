"""One training in several processes, as `torchrun` starts them: each has its rows of every batch. In one process, which
is the rule, nothing here does anything."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(
    days=1
)  # with the first, while it packs a corpus; that a process died is noticed at once

apart = False  # whether this process works on whole batches by itself


def join(device: torch.device) -> torch.device:
    """Meet the other processes, where torchrun has started this one. Of several GPUs each process has its own."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() and not apart else 1


def rank() -> int:
    """The number of this process; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def own(rows: int) -> slice:
    """Which rows of a whole batch are this process's."""
    return (
        slice(rank() * rows // count(), (rank() + 1) * rows // count())
        if count() > 1
        else slice(rows)
    )


def drawn(draw: Callable[[int], Tensor], rows: int, dim: int = 0) -> Tensor:
    """Random numbers for the rows of this process: what `draw` gives for the whole batch, cut along `dim`."""
    return draw(rows * count()).narrow(dim, rank() * rows if count() > 1 else 0, rows)


def normal(like: Tensor, rows: int, *shape: int) -> Tensor:
    """Standard-normal draws (rows, *shape) for the rows of this process, of the type and on the device of `like`."""
    return drawn(lambda count: like.new_empty(count, *shape).normal_(), rows)


def whole(rows: Tensor) -> Tensor:
    """The rows of all processes, (own rows, …) → (all rows, …), without gradient."""
    if count() == 1:
        return rows.detach()
    everyone = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(everyone, rows.detach().contiguous())
    return torch.cat(everyone)


def total(values: Tensor) -> Tensor:
    """The sum over the distributed."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def lost_another(error: Exception) -> bool:
    """Whether an error says that another process has ended; gloo's are of no type of their own."""
    return isinstance(error, dist.DistError) or (dist.is_initialized() and "gloo" in str(error))


@contextmanager
def each_apart() -> Iterator[None]:
    """Inside, every process works on whole batches by itself."""
    global apart
    apart = True
    try:
        yield
    finally:
        apart = False


@contextmanager
def first_alone() -> Iterator[None]:
    """The others enter once the first process has left: they find what it has written."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and count() > 1:
        dist.barrier()
