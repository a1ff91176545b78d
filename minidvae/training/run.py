"""A training run: what it is made of, how it begins, how it is resumed, what its folder holds."""

import dataclasses
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from ..data.corpus import absolute, load_corpus
from ..files import CheckpointError, append_line, lock, write_json
from ..models import MODELS, build_model
from ..models.base import Model
from . import checkpoint, distributed
from .batches import Batches
from .checkpoint import Plan, Progress
from .config import RECIPES, Recipe, SettingError, check_config, known, overrides, parse
from .features import stft_of
from .kinds import kind_of

OF_SOME_KINDS = {
    name for model, _ in MODELS.values() for name in kind_of(model).settings
}  # fields of Recipe


@dataclass
class TrainingRun:
    folder: Path
    plan: Plan
    model: Model
    recipe: Recipe
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    reports: list[dict] = field(
        default_factory=list
    )  # the lines of log.jsonl, in the process that writes it
    log_file: BinaryIO | None = None  # log.jsonl, open and locked while this process trains
    optimiser: dict | None = None  # its state in the checkpoint that is resumed
    frames_given: bool = (
        False  # by the user or a trained model: shorter utterances are left out, however many
    )

    @property
    def resumed(self) -> bool:
        return self.optimiser is not None

    def sources(self) -> tuple[Batches, Batches]:
        """The batches of the training and of the development split. The recipe and the plan become complete.
        Raises SettingError where the corpus, or the extractor, is not the one that the run began with."""
        plan, kind, several = self.plan, kind_of(type(self.model)), distributed.count()
        if several > 1 and not kind.divisible:
            raise SettingError(
                f"{plan.model}: is trained in one process; start it without torchrun"
            )
        if self.recipe.batch % several:
            raise SettingError(
                f"batch={self.recipe.batch}: expected a multiple of the {several} processes"
            )
        corpus = load_corpus(plan.data)
        labels = corpus.labels_fingerprint if kind.needs_labels or self.recipe.domain else ""
        found = {"fingerprint": corpus.fingerprint, "labels": labels}
        if self.resumed and found != {name: getattr(plan, name) for name in found}:
            raise SettingError(
                f"{plan.data}: not the speech that this run began with; it can only go on with the same"
            )
        if not self.resumed and not self.frames_given:
            kind.check_lengths(corpus.split("train"), self.recipe)
        batches = kind(corpus.split("train"), self.recipe, plan.seed, self.device)
        held_out = kind(corpus.split("dev"), batches.recipe, plan.seed, self.device)
        if self.resumed and batches.extractor != plan.extractor:
            other = "holds another model than the one whose features this run began with"
            raise SettingError(f"{self.recipe.extractor}: {other}")
        self.recipe = batches.recipe
        settings = asdict(replace(self.recipe, models={}))
        self.plan = replace(plan, **found, extractor=batches.extractor, recipe=settings)
        return batches, held_out

    def make_folder(self, exist_ok: bool) -> None:
        """Make the folder, or one of a longer name where a run that began in the same second has this one, and lock it.
        The log of a run that is resumed is read, what a training left that did not come to its first checkpoint goes.
        CheckpointError: another training has the folder, it holds a run already, or a line of the log is no report."""
        if distributed.rank() > 0:
            return
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=exist_ok)
                break
            except FileExistsError:
                if exist_ok:  # it is a file
                    raise
                self.folder = self.folder.with_name(f"{self.folder.name}+")
        self.log_file = open(self.folder / "log.jsonl", "ab+", buffering=0)
        if not lock(self.log_file):
            raise CheckpointError(
                f"{self.folder}: another training writes to it now; choose another --run"
            )
        if self.resumed:
            self.read_log()
        else:
            refuse_run(self.folder)
            self.log_file.truncate(0)
            for name in ("best.pt", "curves.png"):
                (self.folder / name).unlink(missing_ok=True)
        write_json(
            self.folder / "config.json",
            asdict(self.plan) | {"model_settings": asdict(self.model.config)},
        )

    def save(self, name: str, **state) -> None:
        if distributed.rank() > 0:
            return
        state |= {"plan": asdict(self.plan), "progress": asdict(self.progress)}
        checkpoint.save(
            self.folder / name, self.plan.model, self.model, stft_of(self.recipe), **state
        )

    def read_log(self) -> None:
        """The reports up to the checkpoint. Those past it, and a last line that is not whole, as a kill may leave it,
        are cut off."""
        size = self.log_file.seek(0)
        for number, line in enumerate(self.log_file, start=1):
            try:
                if (
                    not line.endswith(b"\n")
                    or (report := json.loads(line))["step"] > self.progress.step
                ):
                    break
                math.fsum([*report["train"].values(), *report["dev"].values()])  # they are numbers
            except (AttributeError, KeyError, TypeError, ValueError):
                wrong = f"line {number} is no report of train.py; expected one JSON object with a step a line"
                raise CheckpointError(f"{self.log_file.name}: {wrong}") from None
            self.reports.append(report)
            size += len(line)
        self.log_file.truncate(size)

    def load_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Give a new optimiser the state in the checkpoint. CheckpointError where it is not one of these parameters."""
        groups, twins = (
            optimiser.state_dict()["param_groups"],
            {},
        )  # what groups say follows from recipe and model
        try:
            optimiser.load_state_dict({"state": self.optimiser["state"], "param_groups": groups})
            for group in optimiser.param_groups:  # what a step leaves, by parameters without memory
                twins |= {p: torch.empty_like(p, device="meta") for p in group["params"]}
            twin = type(optimiser)(
                [g | {"params": [twins[p] for p in g["params"]]} for g in optimiser.param_groups]
            )
            for parameter in twins.values():
                parameter.grad = torch.empty_like(parameter)
            twin.step()
            for parameter, state in optimiser.state.items():
                expected = {
                    name: value.shape for name, value in twin.state[twins[parameter]].items()
                }
                if {name: value.shape for name, value in state.items()} != expected or not state[
                    "step"
                ] >= 0:
                    raise ValueError("of other parameters")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            wrong = f"the state of the optimiser is not one of this model ({error})"
            raise CheckpointError(f"{self.folder / 'last.pt'}: {wrong}") from None

    def log(self, report: dict) -> None:
        if distributed.rank() == 0:
            self.reports.append(report)
            append_line(self.log_file, json.dumps(report))


def refuse_run(folder: Path) -> None:
    """CheckpointError where a training came to its first checkpoint, be it there still or not."""
    log = folder / "log.jsonl"
    if (folder / "last.pt").exists() or (log.exists() and log.read_bytes().count(b"\n") > 1):
        raise CheckpointError(
            f"{folder}: already holds a run; go on with --resume, or choose another --run"
        )


def begin(args, device: torch.device) -> TrainingRun:
    """A new run, from train.py's flags."""
    model, name = None, args.model
    if args.init:
        model, stft, content = checkpoint.load_run(args.init, device)
        if name not in (None, content["model"]):
            raise CheckpointError(f"{args.init}: holds a {content['model']}, not a {name}")
        name = content["model"]
    if name is None:
        raise SettingError(f"--model: missing; choose one of {', '.join(MODELS)}")
    known("model", name, MODELS)
    papers = next(
        recipe for recipe in RECIPES if recipe != "quick" and name in RECIPES[recipe].models
    )
    default, other, found = (
        (papers, "quick", "a GPU") if device.type == "cuda" else ("quick", papers, "no GPU")
    )
    if args.recipe is None:
        print(f"Recipe {default}, since there is {found}; choose the other with --recipe {other}.")
    recipe_name, given, seed = args.recipe or default, overrides(args.set), args.seed or 0
    recipe, config = resolve(name, recipe_name, given)
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    if model is None:
        torch.manual_seed(seed)
        try:
            model = build_model(name, **config).to(device)
        except (RuntimeError, ValueError) as error:
            raise SettingError(
                f"--set {' '.join(args.set)}: no such {name} can be built ({error})"
            ) from None
    else:
        fixed = {"window", "hop", "features", "extractor", "latent", "targets", *config} - {
            "sequences"
        }
        if wrong := [key for key in given if key in fixed]:
            raise SettingError(f"--set {wrong[0]}: comes with the model of --init; leave it out")
        before = content.get("plan", {}).get("recipe")
        recipe = kind_of(type(model)).for_model(recipe, model, stft, before)
    if (
        recipe.extractor and (folder := Path(os.path.expanduser(recipe.extractor))).is_dir()
    ):  # else a model that ships
        recipe = replace(recipe, extractor=str(folder.absolute()))
    folder = args.run or checkpoint.RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{recipe_name}"
    refuse_run(folder)
    data = absolute("built-in" if args.data is None else args.data)
    plan = Plan(name, recipe_name, data, seed, args.precision or "fp32", str(args.init or ""))
    return TrainingRun(
        folder, plan, model, recipe, device, frames_given="frames" in given or bool(args.init)
    )


def resume(args, device: torch.device) -> TrainingRun:
    """A run that was interrupted, or is to be longer, as its last checkpoint has it."""
    for flag in ("model", "recipe", "data", "init", "seed", "precision", "set"):
        if getattr(args, flag) not in (None, []):
            raise SettingError(f"--{flag}: cannot change in a run that is resumed; leave it out")
    folder = args.run or checkpoint.newest_run()
    model, stft, content = checkpoint.restore(folder / "last.pt", device)
    try:
        plan, progress, optimiser = (
            Plan(**content["plan"]),
            Progress(**content["progress"]),
            content["optimiser"],
        )
        recipe, config = Recipe.of(plan.recipe), asdict(model.config)
        derived = kind_of(type(model)).derived(recipe) | (
            {"bins": config["bins"]} if recipe.extractor else {}
        )
        if config | {
            name: derived[name] for name in derived if name in config
        } != config or stft != stft_of(recipe):
            raise SettingError("its recipe is another model's")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a run that this version can go on with ({error})"
        ) from None
    if args.steps and args.steps < progress.step:
        raise SettingError(f"--steps {args.steps}: the run has {progress.step} steps already")
    if recipe.patience and progress.waited >= recipe.patience:
        print(
            f"This run stopped early, after {recipe.patience} reports without a better development loss."
        )
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    return TrainingRun(folder, plan, model, recipe, device, progress, optimiser=optimiser)


def resolve(model: str, recipe: str, overrides: dict[str, str]) -> tuple[Recipe, dict]:
    """A recipe and the settings of a model under it, with `key=value` overrides of either. Raises SettingError naming
    the nearest right name or the expected type."""
    settings = RECIPES[known("recipe", recipe, RECIPES)]
    model_type, config_type = MODELS[known("model", model, MODELS)]
    kind = kind_of(model_type)
    if model not in settings.models:
        offered = ", ".join(name for name, other in RECIPES.items() if model in other.models)
        raise SettingError(
            f"recipe {recipe} has no settings for {model}; recipes that have: {offered}"
        )
    foreign = OF_SOME_KINDS.difference(kind.settings) | {"models"}
    derived = kind.derived(settings).keys() | {
        "frames",
        "sequences",
        "symbols",
        "lanes",
    }  # from recipe and corpus
    recipe_fields = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in foreign}
    config_fields = {
        f.name: f.type for f in dataclasses.fields(config_type) if f.name not in derived
    }
    types = recipe_fields | config_fields
    given = {
        key: parse(key, text, types[known("setting", key, types)])
        for key, text in overrides.items()
    }
    if {"steps", "epochs"} <= set(given):
        raise SettingError("--set steps and epochs: one of them says how long to train")
    if "epochs" in given:
        given["steps"] = 0
    given = settings.models[model] | given
    own = set(vars(settings)).difference(
        config_fields
    )  # the latent of a DVAE is a number, that of a recipe a name
    settings = dataclasses.replace(settings, **{k: v for k, v in given.items() if k in own})
    config = dataclasses.asdict(
        config_type(**{k: v for k, v in given.items() if k in config_fields})
    )
    kind.check(model, settings, config, overrides)
    config |= {name: value for name, value in kind.derived(settings).items() if name in config}
    check_config(config)
    return settings, config
