"""Training in several processes, as `torchrun` starts them: plain DistributedDataParallel, with
seeds that differ between the processes. In a single process, the rule, nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Processes wait for the first one while it packs a corpus. A process that dies is noticed at once.
TIMEOUT = timedelta(days=1)


def join(device: torch.device) -> torch.device:
    """Join the process group if torchrun started this process. Return the device of this process:
    of several GPUs each process has its own."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def seed_of_process(seed: int) -> int:
    """Return a seed that differs between processes; `seed` itself in process 0."""
    return seed + 1_000_003 * rank()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the tensors of all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def is_lost_process(error: Exception) -> bool:
    """Return whether an error says that another process has ended. Errors of gloo have no type of
    their own."""
    return isinstance(error, dist.DistError) or (dist.is_initialized() and "gloo" in str(error))


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run a block before the others, which then find what it has written."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and process_count() > 1:
        dist.barrier()
