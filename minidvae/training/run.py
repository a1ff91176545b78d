"""A training run: how it begins, how it is resumed, and what its folder holds."""

import dataclasses
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import nn

from ..data.corpus import absolute, load_corpus
from ..files import CheckpointError, append_line, write_json
from ..models import MODELS, build_model
from . import checkpoint, distributed
from .batches import Batches, Spectra
from .checkpoint import Plan, Progress
from .config import (
    PAPER_RECIPES,
    RECIPES,
    RENAMED_SETTINGS,
    Recipe,
    SettingError,
    check_config,
    known,
    parse,
)
from .features import stft_of
from .segment_batches import FeatureSegments
from .utterance_batches import Utterances


def batches_type(model_type: type[nn.Module]) -> type[Batches]:
    """Return which type of batches a type of model learns from."""
    for kind in (Spectra, FeatureSegments, Utterances):
        if issubclass(model_type, kind.model_types):
            return kind
    raise ValueError(f"{model_type.__name__}: there are no batches for this type of model")


@dataclass
class TrainingRun:
    folder: Path
    plan: Plan
    model: nn.Module
    recipe: Recipe
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    reports: list[dict] = field(default_factory=list)  # the lines of log.jsonl
    optimiser_state: dict | None = None  # optimiser of the checkpoint, if resumed
    has_chosen_frames: bool = False  # the sequence length was chosen: do not refuse a corpus for it
    log_file: BinaryIO | None = None  # log.jsonl, open while this process trains
    lock: FileLock | None = None

    @property
    def resumed(self) -> bool:
        return self.optimiser_state is not None

    def load_batches(self) -> tuple[Batches, Batches]:
        """Return the batches of the training and of the development split, and complete the plan
        and the recipe. Raises SettingError where the corpus or the extractor is not the one that
        the run began with."""
        kind = batches_type(type(self.model))
        self.check_processes(kind)
        corpus = load_corpus(self.plan.data)
        learns_labels = kind.needs_labels or self.recipe.domain
        labels = corpus.labels_fingerprint if learns_labels else ""
        if self.resumed:
            if (corpus.fingerprint, labels) != (self.plan.fingerprint, self.plan.labels):
                raise SettingError(
                    f"{self.plan.data}: not the speech that this run began with; it can only "
                    "continue with the same"
                )
        elif not self.has_chosen_frames:
            kind.check_lengths(corpus.split("train"), self.recipe)
        batches = kind(corpus.split("train"), self.recipe, self.plan.seed, self.device)
        self.recipe = batches.recipe
        held_out = kind(corpus.split("dev"), self.recipe, self.plan.seed, self.device)
        if self.resumed and batches.extractor != self.plan.extractor:
            raise SettingError(
                f"{self.recipe.extractor}: holds another model than the one whose features this "
                "run began with"
            )
        self.plan = replace(
            self.plan,
            fingerprint=corpus.fingerprint,
            labels=labels,
            extractor=batches.extractor,
            recipe=asdict(replace(self.recipe, models={})),
        )
        return batches, held_out

    def check_processes(self, kind: type[Batches]) -> None:
        """Raise SettingError where this training cannot be shared by the processes that there
        are."""
        count = distributed.process_count()
        if count > 1 and not kind.can_be_distributed:
            raise SettingError(
                f"{self.plan.model}: is trained in one process; start it without torchrun"
            )
        if self.recipe.batch % count:
            raise SettingError(
                f"batch={self.recipe.batch}: expected a multiple of the {count} processes"
            )

    def open_folder(self, exist_ok: bool) -> None:
        """Make and lock the run folder, and open its log.

        Not exist_ok: a folder that another run of the same second made is left alone, and this run
        takes a longer name. In the folder of a training that did not come to its first
        checkpoint, a new one begins. Raises CheckpointError where another training has the
        folder, where it holds a run already, or where a line of the log is no report.
        """
        if distributed.rank() > 0:
            return
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=exist_ok)
                break
            except FileExistsError:
                if exist_ok:  # It is a file.
                    raise
                self.folder = self.folder.with_name(f"{self.folder.name}+")
        self.lock = FileLock(self.folder / ".lock", blocking=False)
        try:
            self.lock.acquire()
        except NotImplementedError:
            pass  # This file system has no locks.
        except Timeout:
            raise CheckpointError(
                f"{self.folder}: another training writes to it now; choose another --run"
            ) from None
        if self.resumed:
            self.open_log()
        else:
            refuse_existing_run(self.folder)
            self.log_file = open(self.folder / "log.jsonl", "wb", buffering=0)
            for name in ("best.pt", "curves.png"):
                (self.folder / name).unlink(missing_ok=True)
        content = asdict(self.plan) | {"model_settings": asdict(self.model.config)}
        write_json(self.folder / "config.json", content)

    def open_log(self) -> None:
        """Open the log and read the reports up to the checkpoint. Lines after it, and a last line
        that is incomplete because the process was killed, are cut off."""
        self.log_file = open(self.folder / "log.jsonl", "ab+", buffering=0)
        self.log_file.seek(0)
        size = 0
        for number, line in enumerate(self.log_file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                report = json.loads(line)
                values = [*report["train"].values(), *report["dev"].values()]
                is_late = report["step"] > self.progress.step
                math.fsum(values)  # raises TypeError where one is no number
            except (AttributeError, KeyError, TypeError, ValueError):
                raise CheckpointError(
                    f"{self.log_file.name}: line {number} is no report of train.py; expected one "
                    "JSON object with a step a line"
                ) from None
            if is_late:
                break
            self.reports.append(report)
            size += len(line)
        self.log_file.truncate(size)

    def close(self) -> None:
        """Release the run folder."""
        if self.log_file is not None:
            self.log_file.close()
        if self.lock is not None and self.lock.is_locked:
            self.lock.release()
            Path(self.lock.lock_file).unlink(missing_ok=True)

    def save(self, name: str, **state) -> None:
        if distributed.rank() > 0:
            return
        state |= {"plan": asdict(self.plan), "progress": asdict(self.progress)}
        stft = stft_of(self.recipe)
        checkpoint.save(self.folder / name, self.plan.model, self.model, stft, **state)

    def load_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Give a new optimiser the state in the checkpoint. Raises CheckpointError where it is not
        of these parameters."""
        # The settings of the groups follow from the recipe and the model.
        param_groups = optimiser.state_dict()["param_groups"]
        try:
            state = {"state": self.optimiser_state["state"], "param_groups": param_groups}
            optimiser.load_state_dict(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / 'last.pt'}: its optimiser is not one of this model ({error})"
            ) from None

    def log(self, report: dict) -> None:
        if distributed.rank() == 0:
            self.reports.append(report)
            append_line(self.log_file, json.dumps(report))


def refuse_existing_run(folder: Path) -> None:
    """Raise CheckpointError where a training came to its first checkpoint, even if it is gone."""
    log = folder / "log.jsonl"
    has_reports = log.exists() and log.read_bytes().count(b"\n") > 1
    if (folder / "last.pt").exists() or has_reports:
        raise CheckpointError(
            f"{folder}: already holds a run; continue it with --resume, or choose another --run"
        )


@dataclass(frozen=True)
class TrainingRequest:
    """The settings of a new run, as the user gave them."""

    model: str | None  # a key of MODELS; None: that of `init`
    recipe: str | None  # a key of RECIPES; None: the paper's on a GPU, `quick` on a CPU
    data: str = "built-in"
    settings: dict[str, str] = field(default_factory=dict)  # setting of recipe or model → text
    steps: int | None = None  # None: the recipe's
    init: Path | None = None  # start from this run, published model or model that ships
    seed: int = 0
    precision: str = "fp32"
    folder: Path | None = None  # None: a new one in RUNS


def begin(request: TrainingRequest, device: torch.device) -> TrainingRun:
    """Return a new run. Raises SettingError or CheckpointError where it cannot be."""
    if request.init:
        model, stft, content = checkpoint.load_run(request.init, device)
        name = content["model"]
        if request.model not in (None, name):
            raise CheckpointError(f"{request.init}: holds a {name}, not a {request.model}")
    else:
        name = known("model", request.model, MODELS)
    recipe_name = request.recipe or default_recipe(name, device)
    recipe, config = resolve(name, recipe_name, request.settings)
    recipe = replace(recipe, steps=request.steps or recipe.steps)
    if request.init:
        refuse_settings_of_init(request.settings, config)
        former = content.get("plan", {}).get("recipe")
        recipe = batches_type(type(model)).recipe_for(recipe, model, stft, former)
    else:
        model = build_new_model(name, config, request, device)
    extractor = Path(recipe.extractor).expanduser()
    if recipe.extractor and extractor.is_dir():  # else it is the name of a model that ships
        recipe = replace(recipe, extractor=str(extractor.absolute()))
    folder = request.folder
    if folder is None:
        time_stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = checkpoint.RUNS / f"{time_stamp}-{name}-{recipe_name}"
    refuse_existing_run(folder)
    plan = Plan(
        model=name,
        recipe_name=recipe_name,
        data=absolute(request.data),
        seed=request.seed,
        precision=request.precision,
        init=str(request.init or ""),
    )
    has_chosen_frames = "frames" in request.settings or bool(request.init)
    return TrainingRun(folder, plan, model, recipe, device, has_chosen_frames=has_chosen_frames)


def paper_recipe(model: str) -> str | None:
    """Return the recipe of the paper that a model is trained by; None where there is none."""
    for name in PAPER_RECIPES:
        if model in RECIPES[name].models:
            return name
    return None


def default_recipe(model: str, device: torch.device) -> str:
    if device.type == "cuda":
        return paper_recipe(model) or "quick"
    return "quick"


def build_new_model(
    name: str, config: dict, request: TrainingRequest, device: torch.device
) -> nn.Module:
    torch.manual_seed(request.seed)
    try:
        return build_model(name, **config).to(device)
    except (RuntimeError, ValueError) as error:
        settings = " ".join(f"{key}={value}" for key, value in request.settings.items())
        raise SettingError(f"--set {settings}: no such {name} can be built ({error})") from None


def refuse_settings_of_init(settings: dict[str, str], config: dict) -> None:
    """Raise SettingError where settings are given that come with a trained model."""
    fixed = {"window", "hop", "features", "extractor", "latent", "targets", *config}
    for key in settings:
        if key in fixed - {"sequences"}:
            raise SettingError(f"--set {key}: comes with the model of --init; leave it out")


def resume(folder: Path, steps: int | None, device: torch.device) -> TrainingRun:
    """Return a run that was interrupted, or is to be longer, as its last checkpoint has it.

    steps: length of the training; None: as before.
    """
    model, stft, content = checkpoint.restore(folder / "last.pt", device)
    try:
        plan = Plan(**content["plan"])
        progress = Progress(**content["progress"])
        optimiser_state = content["optimiser"]
        recipe = Recipe.from_dict(plan.recipe)
        check_recipe_fits(recipe, model, stft)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a run that this version can continue ({error})"
        ) from None
    if steps and steps < progress.step:
        raise SettingError(f"--steps {steps}: the run has {progress.step} steps already")
    recipe = replace(recipe, steps=steps or recipe.steps)
    return TrainingRun(
        folder, plan, model, recipe, device, progress, optimiser_state=optimiser_state
    )


def check_recipe_fits(recipe: Recipe, model: nn.Module, stft) -> None:
    """Raise SettingError where a recipe is not that of a training of this model."""
    config = asdict(model.config)
    derived = batches_type(type(model)).derived_settings(recipe)
    if recipe.extractor:
        derived["bins"] = config["bins"]
    differs = any(config[name] != value for name, value in derived.items() if name in config)
    if differs or stft != stft_of(recipe):
        raise SettingError("its recipe is another model's")


def resolve(model: str, recipe: str, overrides: dict[str, str]) -> tuple[Recipe, dict]:
    """Return a recipe and the settings of a model under it, with `key=value` overrides of either.
    Raises SettingError naming the nearest known name or the expected type."""
    overrides = {RENAMED_SETTINGS.get(key, key): text for key, text in overrides.items()}
    settings = RECIPES[known("recipe", recipe, RECIPES)]
    model_type, config_type = MODELS[known("model", model, MODELS)]
    kind = batches_type(model_type)
    if model not in settings.models:
        offered = [name for name, other in RECIPES.items() if model in other.models]
        raise SettingError(
            f"recipe {recipe} has no settings for {model}; recipes that have: {', '.join(offered)}"
        )
    recipe_types = types_of_recipe(kind)
    # These settings of a model follow from the recipe or the corpus.
    derived = {*kind.derived_settings(settings), "frames", "sequences", "symbols", "lanes"}
    config_types = {}
    for setting in dataclasses.fields(config_type):
        if setting.name not in derived:
            config_types[setting.name] = setting.type
    types = recipe_types | config_types
    values = {}
    for key, text in overrides.items():
        values[key] = parse(key, text, types[known("setting", key, types)])
    if "steps" in values and "epochs" in values:
        raise SettingError("--set steps and epochs: expected one of them, both set the length")
    if "epochs" in values:
        values["steps"] = 0
    values = settings.models[model] | values
    # "latent" of a DVAE is a number and a setting of the model; that of a recipe is a name.
    config_values = {}
    recipe_values = {}
    for key, value in values.items():
        if key in config_types:
            config_values[key] = value
        elif key in vars(settings):
            recipe_values[key] = value
    settings = replace(settings, **recipe_values)
    config = asdict(config_type(**config_values))
    kind.check(model, settings, config, overrides)
    for name, value in kind.derived_settings(settings).items():
        if name in config:
            config[name] = value
    check_config(config)
    return settings, config


def types_of_recipe(kind: type[Batches]) -> dict[str, type]:
    """Return the types of the fields of Recipe that this type of batches has a use for."""
    of_some_types = set()
    for other in (Spectra, FeatureSegments, Utterances):
        of_some_types.update(other.recipe_fields)
    excluded = of_some_types.difference(kind.recipe_fields) | {"models"}
    return {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in excluded}
