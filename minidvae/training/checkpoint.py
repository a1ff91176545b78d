"""Checkpoints: written whole or not at all, read without running code, checked before use."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..data.audio import STFT
from ..files import CheckpointError, atomic_write, check_parameters, unpickle
from ..models import MODELS, build_model, outline
from ..models.base import DVAE
from ..models.published import load_dvae_speech
from .config import Recipe, SettingError, check_config, check_numbers, typed

RUNS = Path("runs")  # where train.py puts the folders of runs by default
PRETRAINED = (
    Path(__file__).parents[1] / "pretrained"
)  # NAME.pt and its card NAME.md for each model that ships


@dataclass
class Plan:
    """What the checkpoints of a run say of it: with the same, it goes on as if it had not been interrupted."""

    model: str
    recipe_name: str
    data: str
    seed: int
    precision: str
    init: str = ""  # folder of the run that it started from
    recipe: dict = field(default_factory=dict)  # complete: with steps and report
    fingerprint: str = ""  # of the corpus
    labels: str = ""  # of what is known of its utterances, where the model learns from that
    extractor: str = ""  # of the model whose latents it learns from


@dataclass
class Progress:
    step: int = 0
    best: float = math.inf  # development loss
    waited: int = 0  # reports since that was reached
    seconds: float = 0.0
    sums: dict[str, float] = field(
        default_factory=dict
    )  # of each term of the loss since the last report
    count: int = 0  # steps since then


def save(path: str | Path, model_name: str, model: nn.Module, stft: STFT, **state) -> None:
    """Write a checkpoint: all that `load` needs to rebuild the model, and any further tensors, numbers and texts."""
    path, config = Path(path), dataclasses.asdict(model.config)
    content = {
        "format": "minidvae",
        "model": model_name,
        "config": config,
        "stft": dataclasses.asdict(stft),
    }
    content |= {"parameters": model.state_dict(), **state}
    try:
        with atomic_write(path) as beside:
            torch.save(content, beside)
    except (OSError, RuntimeError) as error:  # a full disk is either
        raise CheckpointError(
            f"{path}: could not be written, what was there is kept ({error})"
        ) from None


def restore(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, STFT, dict]:
    """The model of a checkpoint that `save` wrote, its STFT and the whole content. CheckpointError for other files."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that train.py wrote")
    content = unpickle(path, device)
    if not isinstance(content, dict) or content.get("format") != "minidvae":
        raise CheckpointError(
            f"{path}: not a checkpoint of minidvae; expected a file that train.py wrote"
        )
    try:
        content["config"].pop("position_offset", None)  # of 0.2, which moved positions in training
        name, parameters, stft = (
            content["model"],
            content["parameters"],
            typed(STFT, content["stft"]),
        )
        config = vars(typed(MODELS[name][1], content["config"]))
        check_config(config)
        sketch = outline(name, config, len(parameters))
        check_parameters(sketch.state_dict(), parameters)
        if isinstance(sketch, DVAE) and stft.bins != sketch.config.bins:
            raise SettingError(
                f"a window of {stft.window_length} samples does not have {sketch.config.bins} bins"
            )
        if "plan" in content:
            check_plan(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not describe a model of this version ({error})"
        ) from None
    model = build_model(name, **config).to(device)
    model.load_state_dict(parameters)
    return model, stft, content


def check_plan(content: dict) -> None:
    """Raises KeyError, TypeError or SettingError where a checkpoint's plan and progress are not those of a training of
    its model. Some fields may be missing: models that ship do not name the data."""
    known = {
        "model": content["model"],
        "recipe_name": "",
        "data": "",
        "seed": 0,
        "precision": "fp32",
    }
    plan, progress = (
        typed(Plan, known | content["plan"]),
        typed(Progress, content.get("progress", {})),
    )
    Recipe.of(plan.recipe)
    check_numbers(vars(progress), not_negative=("step", "waited", "seconds", "count"))
    check_numbers(progress.sums, finite=progress.sums)
    if (
        plan.model != content["model"]
        or plan.precision not in ("fp32", "bf16")
        or not 0 <= plan.seed < 2**32
    ):
        raise SettingError(f"no training of a {content['model']} has this plan")


def load_run(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[nn.Module, STFT, dict]:
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
    return restore(
        best if best.exists() else folder / "last.pt", device
    )  # stopped before its first report


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
        raise CheckpointError(
            f"{RUNS}/: holds no run yet; train one first: python train.py --model light_dvae"
        )
    return found[-1].parent
