"""State dicts, read without running code and checked before they are loaded."""

from pathlib import Path

import torch


class CheckpointError(ValueError):
    """One line: the file, what is wrong, what would be right."""


def unpickle(path: Path, device: str | torch.device = "cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises anything for a file that is not its own
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason})") from None


def check_parameters(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor], source: str = "") -> None:
    """Raises CheckpointError naming the first key, shape or kind of number of `given` that is not as expected. Or where
    `given` has fewer numbers than its shapes say: in a file, one number can stand for a tensor of any size."""
    for key, value in expected.items():
        if key not in given:
            raise CheckpointError(f"{source}parameter {key!r} is missing; is it another model's checkpoint?")
        if given[key].shape != value.shape:
            shapes = f"{tuple(given[key].shape)}, expected {tuple(value.shape)}"
            raise CheckpointError(f"{source}parameter {key!r} has shape {shapes}")
        if given[key].layout != value.layout or given[key].is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{source}parameter {key!r} is {given[key].dtype}, expected {value.dtype}")
    if extra := sorted(set(given) - set(expected), key=str):
        raise CheckpointError(f"{source}parameter {extra[0]!r} belongs to no part of this model")
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in given.values()}
    if sum(value.nbytes for value in given.values()) > sum(stored.values()):
        raise CheckpointError(f"{source}holds fewer numbers than its parameters have")
