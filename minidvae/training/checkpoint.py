"""Checkpoints: what is in them, how they are written and read."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..data.audio import STFT
from ..files import CheckpointError, atomic_write, load_checkpoint
from ..models import MODELS, build_model
from ..models.base import DVAE
from ..models.published import load_dvae_speech
from .config import SettingError, check_config

RUNS = Path("runs")  # default folder of train.py for run folders
PRETRAINED = Path(__file__).parents[1] / "pretrained"  # NAME.pt, and its card NAME.md


@dataclass
class Plan:
    """Everything that a training depends on. A resumed run keeps it, so that it continues as if it
    had not been interrupted."""

    model: str
    recipe_name: str
    data: str
    seed: int
    precision: str
    init: str = ""  # folder of the run that it started from
    recipe: dict = field(default_factory=dict)  # complete: with steps and report
    fingerprint: str = ""  # fingerprint of the corpus
    labels: str = ""  # fingerprint of the labels, where the model learns from them
    extractor: str = ""  # digest of the model whose latents it learns from


@dataclass
class Progress:
    step: int = 0
    best: float = math.inf  # development loss
    waited: int = 0  # reports since that was reached
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)  # sums of the terms since the last report
    count: int = 0  # steps since the last report


def save(path: str | Path, model_name: str, model: nn.Module, stft: STFT, **state) -> None:
    """Write a checkpoint: everything that `restore` needs to rebuild the model, and any further
    tensors, numbers and strings."""
    content = {
        "format": "minidvae",
        "model": model_name,
        "config": dataclasses.asdict(model.config),
        "stft": dataclasses.asdict(stft),
        "parameters": model.state_dict(),
        **state,
    }
    try:
        with atomic_write(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
        raise CheckpointError(
            f"{path}: could not be written, the former file is kept ({error})"
        ) from None


def restore(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """Return the model of a checkpoint that `save` wrote, its STFT and the whole content.

    Raises:
        CheckpointError: the file is missing, or is no checkpoint of this project, or its
            parameters do not fit its settings.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that train.py wrote")
    content = load_checkpoint(path, device)
    if not isinstance(content, dict) or content.get("format") != "minidvae":
        raise CheckpointError(
            f"{path}: not a checkpoint of minidvae; expected a file that train.py wrote"
        )
    try:
        content = upgrade(content)
        stft = STFT(**content["stft"])
        check_config(content["config"])
        with torch.device("meta"):  # Sizes are checked before memory is allocated.
            model = build_model(content["model"], **content["config"])
        model.load_state_dict(content["parameters"], strict=True, assign=True)
        model.float()  # Models that ship are stored in half precision.
        if isinstance(model, DVAE) and stft.bins != model.config.bins:
            raise SettingError(
                f"a window of {stft.window_length} samples does not have {model.config.bins} bins"
            )
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path}: does not describe a model of this version ({reason})"
        ) from None
    return model.to(device), stft, content


# Settings that only the local models have, with the values at which a former `light_dvae` or
# `hit_dvae`, which had them too, is the paper's model.
LOCAL_SETTINGS = {"context": 0, "phases": 1, "w_prior": "standard"}


def upgrade(content: dict) -> dict:
    """Return the content of a checkpoint with the names that this version has for models and
    settings."""
    config = dict(content["config"])
    config.pop("position_offset", None)  # Version 0.2 shifted positions in training.
    content = content | {"config": config}
    if content["model"] in ("light_dvae", "hit_dvae") and "context" in config:
        is_papers = all(config.get(name, value) == value for name, value in LOCAL_SETTINGS.items())
        if is_papers:
            for name in LOCAL_SETTINGS:
                config.pop(name, None)
        else:
            content["model"] = f"{content['model']}_local"
            for name, value in LOCAL_SETTINGS.items():
                config.setdefault(name, value)
            if "plan" in content:
                content["plan"] = content["plan"] | {"model": content["model"]}
    return content


def load_run(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[nn.Module, STFT, dict]:
    """Return a trained model, its STFT and the content of its checkpoint.

    Args:
        folder: a run folder (its best model so far); a folder in the published format
            "DVAE-speech", whose content is only {"model": name}; or, where there is no such
            folder, the name of a model that ships.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return load_pretrained(str(folder), device)
    if (folder / "config.ini").exists():
        model, stft = load_dvae_speech(folder)
        name = next(name for name, (kind, _) in MODELS.items() if type(model) is kind)
        return model.to(device), stft, {"model": name}
    best = folder / "best.pt"
    if best.exists():
        return restore(best, device)
    return restore(folder / "last.pt", device)  # The run was stopped before its first report.


# Former names of models that ship.
RENAMED_PRETRAINED = {"light_dvae-librispeech": "light_dvae_local-librispeech"}


def pretrained() -> list[str]:
    """Return the names of the models that ship."""
    return sorted(file.stem for file in PRETRAINED.glob("*.pt"))


def load_pretrained(name: str, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """Return a model that ships, trained on real speech, its STFT and the content of its
    checkpoint. Raises CheckpointError naming all of them where none has this name."""
    name = RENAMED_PRETRAINED.get(name, name)
    if name not in pretrained():
        raise CheckpointError(
            f"{name}: no such run folder (train.py writes them to runs/ by default), nor a model "
            f"that ships: {', '.join(pretrained())}"
        )
    return restore(PRETRAINED / f"{name}.pt", device)


def newest_run() -> Path:
    """Return the run folder whose checkpoint was written last."""
    checkpoints = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise CheckpointError(
            f"{RUNS}/: holds no run yet; train one first: python train.py --model light_dvae"
        )
    return checkpoints[-1].parent
