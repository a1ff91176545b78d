"""What an evaluation is given: trained models with the speech that they are evaluated on, and the
options of the user."""

import itertools
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.audio import STFT
from ..data.corpus import Corpus
from ..files import CheckpointError
from ..training.config import Recipe
from .results import RunResult


@dataclass
class Run:
    """A trained model and the speech that it is evaluated on."""

    folder: Path  # run folder, as the user named it
    name: str  # name of the model, a key of models.MODELS
    model: nn.Module
    stft: STFT
    content: dict  # content of the checkpoint; {"model": name} for a published model
    data: str  # the corpus: built-in, a folder, a manifest
    corpus: Corpus | None  # all its splits; None for recorded pairs
    test: Corpus | list  # the utterances to evaluate on; of recorded pairs a list of mixtures

    @property
    def trained(self) -> str:
        if "plan" not in self.content:
            return "published"
        return f"step {self.content['progress']['step']}"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was trained with. Raises CheckpointError where it is none of this
        version."""
        try:
            return Recipe.from_dict(self.content["plan"]["recipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: not a run that this version can evaluate ({error})"
            ) from None

    def check_finite(
        self, output: Tensor | np.ndarray, description: str = "the model's output"
    ) -> None:
        """Raise CheckpointError where `output` holds nan or infinity, or only zeros, as e^l of
        huge weights may."""
        output = torch.as_tensor(output)
        if not output.isfinite().all() or not output.any():
            raise CheckpointError(
                f"{self.folder}: {description} is not finite, or zero; it cannot be evaluated"
            )

    def result(self, values: dict, **lists) -> RunResult:
        """Return the RunResult of this run with these values, sounds, figures, …"""
        return RunResult(str(self.folder), self.name, self.data, values, **lists)


@dataclass
class Options:
    """The options of the user, beside the runs."""

    split: str = "test"
    mode: str = "generation"
    limit: int | None = None
    seed: int = 0
    trials: Path | None = None
    recogniser: Path | None = None
    clips: int | None = None
    repeats: int | None = None
    w: str | None = None
    lexicon: Path | None = None
    noise: Path | None = None
    snr: tuple[float, ...] | None = None
    pairs: Path | None = None
    method: str | None = None
    iterations: int | None = None

    def select(self, *names: str) -> dict:
        """Return the options that every task has, and these."""
        values = asdict(self)
        return {name: values[name] for name in ("split", "limit", "seed", *names)}


def generator_for(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random numbers of an utterance or a clip, which are the same whatever else is
    evaluated."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def group_by_corpus(runs: list[Run]) -> list[list[Run]]:
    """Return the runs on one corpus, then those on the next."""
    groups = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    return list(groups.values())


def in_order_of(runs: list[Run], results: list[RunResult]) -> list[RunResult]:
    """Return the results of runs that were evaluated corpus by corpus in the order of the runs."""
    order = {id(run): number for number, run in enumerate(runs)}
    grouped = list(itertools.chain(*group_by_corpus(runs)))
    pairs = sorted(zip(grouped, results, strict=True), key=lambda pair: order[id(pair[0])])
    return [result for _, result in pairs]
