"""Checkpoints: written whole or not at all, read without running code, checked before use."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from ..data.audio import STFT
from ..files import atomic_write
from ..models import MODELS, build_model
from ..models.parameters import CheckpointError, check_parameters, unpickle
from ..models.published import load_dvae_speech

RUNS = Path("runs")  # where train.py puts the folders of runs by default
PRETRAINED = Path(__file__).parents[1] / "pretrained"  # NAME.pt and its card NAME.md for each model that ships


def save(path: str | Path, model_name: str, model: nn.Module, stft: STFT, **state) -> None:
    """Write a checkpoint: all that `load` needs to rebuild the model, and any further tensors, numbers and texts."""
    path, config = Path(path), dataclasses.asdict(model.config)
    content = {"format": "minidvae", "model": model_name, "config": config, "stft": dataclasses.asdict(stft)}
    content |= {"parameters": model.state_dict(), **state}
    try:
        with atomic_write(path) as beside:
            torch.save(content, beside)
    except (OSError, RuntimeError) as error:  # a full disk is either
        raise CheckpointError(f"{path}: could not be written, what was there is kept ({error})") from None


def restore(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """The model of a checkpoint that `save` wrote, its STFT and the whole content. CheckpointError for other files."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that train.py wrote")
    content = unpickle(path, device)
    if not isinstance(content, dict) or content.get("format") != "minidvae":
        raise CheckpointError(f"{path}: not a checkpoint of minidvae; expected a file that train.py wrote")
    try:
        content["config"].pop("position_offset", None)  # of 0.2, which moved positions in training
        model = build_model(content["model"], **content["config"]).to(device)
        check_parameters(model.state_dict(), content["parameters"], f"{path}: ")
        model.load_state_dict(content["parameters"])
        return model, STFT(**content["stft"]), content
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a model of this version ({error})") from None


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """What a run folder holds (the best model so far), or a folder in the published format "DVAE-speech", or, where
    there is no such folder, the pretrained model of that name: the model, its STFT and the content of the checkpoint,
    of a published model only {"model": its name}."""
    folder = Path(folder)
    if not folder.is_dir():
        return load_pretrained(str(folder), device)
    if (folder / "config.ini").exists():
        model, stft = load_dvae_speech(folder)
        name = next(name for name, (kind, _) in MODELS.items() if type(model) is kind)
        return model.to(device), stft, {"model": name}
    best = folder / "best.pt"
    return restore(best if best.exists() else folder / "last.pt", device)  # stopped before its first report


def pretrained() -> list[str]:
    """The names of the models that ship."""
    return sorted(file.stem for file in PRETRAINED.glob("*.pt"))


def load_pretrained(name: str, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """A model that ships, trained on real speech, its STFT and the content of its checkpoint. CheckpointError naming
    all of them where none has this name."""
    if name not in pretrained():
        no_folder = f"{name}: no such run folder (train.py writes them to runs/ by default), nor a model that ships"
        raise CheckpointError(f"{no_folder}: {', '.join(pretrained())}")
    return restore(PRETRAINED / f"{name}.pt", device)


def newest_run() -> Path:
    found = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"{RUNS}/: holds no run yet; train one first: python train.py --model light_dvae")
    return found[-1].parent
