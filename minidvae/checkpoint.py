"""Checkpoints: written whole or not at all, read without running code, checked before use."""

import configparser
import dataclasses
from pathlib import Path

import torch
from torch import nn

from . import dvae_speech
from .audio import SAMPLE_RATE, STFT
from .files import whole
from .models import build_model, name_of


class CheckpointError(ValueError):
    """One line: the file, what is wrong, what would be right."""


def save(path: str | Path, model_name: str, model: nn.Module, stft: STFT, **state) -> None:
    """Write a checkpoint: all that `load` needs to rebuild the model, and any further tensors, numbers and texts."""
    path = Path(path)
    content = {
        "format": "minidvae",
        "model": model_name,
        "config": dataclasses.asdict(model.config),
        "stft": dataclasses.asdict(stft),
        "parameters": model.state_dict(),
        **state,
    }
    try:
        with whole(path) as beside:
            torch.save(content, beside)
    except (OSError, RuntimeError) as error:  # a full disk is either
        raise CheckpointError(f"{path}: could not be written, what was there is kept ({error})") from None


def read(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """The content of a checkpoint that `save` wrote. Raises CheckpointError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that train.py wrote")
    content = unpickle(path, device)
    if not isinstance(content, dict) or content.get("format") != "minidvae":
        raise CheckpointError(f"{path}: not a checkpoint of minidvae; expected a file that train.py wrote")
    return content


def unpickle(path: Path, device: str | torch.device = "cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises anything for a file that is not its own
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason})") from None


def restore(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """The model of a checkpoint, its STFT and the whole content. Raises CheckpointError where they do not fit."""
    content = read(path, device)
    try:
        model = build_model(content["model"], **content["config"]).to(device)
        load_parameters(model, content["parameters"], path)
        return model, STFT(**content["stft"]), content
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a model of this version ({error})") from None


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """What a run folder holds (the best model so far), or a folder in the published format "DVAE-speech": the model,
    its STFT and the content of the checkpoint, in the second case only {"model": its name}."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run folder; runs are written by train.py, to runs/ by default")
    if (folder / "config.ini").exists():
        model, stft = load_dvae_speech(folder)
        return model.to(device), stft, {"model": name_of(model)}
    best = folder / "best.pt"
    return restore(best if best.exists() else folder / "last.pt", device)  # stopped before its first report


def load_parameters(model: nn.Module, parameters: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load `parameters`, naming the first mismatch where they are another model's (CheckpointError)."""
    check_parameters(model.state_dict(), parameters, f"{source}: ")
    model.load_state_dict(parameters)


def check_parameters(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor], source: str = "") -> None:
    """Raises CheckpointError naming the first key or shape of `given` that is not as expected."""
    for key, value in expected.items():
        if key not in given:
            raise CheckpointError(f"{source}parameter {key!r} is missing; is it another model's checkpoint?")
        if given[key].shape != value.shape:
            shapes = f"{tuple(given[key].shape)}, expected {tuple(value.shape)}"
            raise CheckpointError(f"{source}parameter {key!r} has shape {shapes}")
    if extra := sorted(set(given) - set(expected)):
        raise CheckpointError(f"{source}parameter {extra[0]!r} belongs to no part of this model")


def import_dvae_speech(state_dict: dict[str, torch.Tensor], network: dict[str, str]) -> nn.Module:
    """The model of a state dict in the published format "DVAE-speech"; `network` is the [Network] section.

    Raises CheckpointError naming the first setting, key or shape that does not fit.
    """
    try:
        name, config = dvae_speech.read_settings(network)
        model = build_model(name, **config)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError("not a plain state dict of tensors")
    state_dict = {dvae_speech.settled_key(key): value for key, value in state_dict.items()}
    parameters = dict(model.named_parameters())
    theirs = {dvae_speech.their_key(name, key, config): key for key in parameters}
    expected = {key: parameters[ours] for key, ours in theirs.items()}
    check_parameters(expected, state_dict, f"not the {name} of [Network]: ")
    model.load_state_dict({ours: state_dict[key] for key, ours in theirs.items()}, strict=False)
    return model


def load_dvae_speech(folder: str | Path) -> tuple[nn.Module, STFT]:
    """The model of a folder with a state dict (one .pt file) and its `config.ini`, and the STFT it was trained on.

    Raises CheckpointError naming the file where something is missing or does not fit.
    """
    folder = Path(folder)
    configuration, files = folder / "config.ini", sorted(folder.glob("*.pt"))
    if not configuration.is_file() or len(files) != 1:
        raise CheckpointError(f"{folder}: expected one .pt file and config.ini, found {len(files)} .pt file(s)")
    ini = configparser.ConfigParser(interpolation=None)
    ini.optionxform = str
    try:
        ini.read_string(configuration.read_text())
        rate, window = ini.getint("STFT", "fs"), ini.getfloat("STFT", "wlen_sec")
        length = round(rate * window)
        stft = STFT(length, round(length * ini.getfloat("STFT", "hop_percent")))
        network = dict(ini["Network"])
    except (configparser.Error, KeyError, ValueError) as error:
        raise CheckpointError(f"{configuration}: {str(error).splitlines()[0]}") from None
    if rate != SAMPLE_RATE:
        raise CheckpointError(f"{configuration}: fs={rate}; expected {SAMPLE_RATE}")
    try:
        return import_dvae_speech(unpickle(files[0]), network), stft
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
