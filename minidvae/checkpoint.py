"""Checkpoints: written whole or not at all, read without running code, checked before use."""

import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from .audio import STFT
from .models import build_model


class CheckpointError(ValueError):
    """One line: the file, what is wrong, what would be right."""


def save(path: str | Path, model_name: str, model: nn.Module, stft: STFT, **state) -> None:
    """Write a checkpoint: all that `load` needs to rebuild the model, and any further tensors, numbers and texts."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    content = {
        "format": "minidvae",
        "model": model_name,
        "config": dataclasses.asdict(model.config),
        "stft": dataclasses.asdict(stft),
        "parameters": model.state_dict(),
        **state,
    }
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """The content of a checkpoint that `save` wrote. Raises CheckpointError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that train.py wrote")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises anything for a file that is not its own
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != "minidvae":
        raise CheckpointError(f"{path}: not a checkpoint of minidvae; expected a file that train.py wrote")
    return content


def restore(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """The model of a checkpoint, its STFT and the whole content. Raises CheckpointError where they do not fit."""
    content = read(path, device)
    try:
        model = build_model(content["model"], **content["config"]).to(device)
        load_parameters(model, content["parameters"], path)
        return model, STFT(**content["stft"]), content
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: does not describe a model of this version ({error})") from None


def load_parameters(model: nn.Module, parameters: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load `parameters`, naming the first mismatch where they are another model's (CheckpointError)."""
    expected = model.state_dict()
    for key, value in expected.items():
        if key not in parameters:
            raise CheckpointError(f"{source}: parameter {key!r} is missing; is it another model's checkpoint?")
        if parameters[key].shape != value.shape:
            shapes = f"{tuple(parameters[key].shape)}, expected {tuple(value.shape)}"
            raise CheckpointError(f"{source}: parameter {key!r} has shape {shapes}")
    if extra := sorted(set(parameters) - set(expected)):
        raise CheckpointError(f"{source}: parameter {extra[0]!r} belongs to no part of this model")
    model.load_state_dict(parameters)
