"""What the training loop is fed: the batch of each step and the development set.

    batches = kind_of(type(model))(training, recipe, seed, device)
    model.fit(batches, fresh)                              statistics of the training set, before the first step
    model.parameter_groups(batches)                        its parameters as the optimiser takes them
    model.before_step(batches, optimiser, step)            what has to happen before a step
    model.loss(batches(step))                              the batch is a function of (seed, step) alone
    for batch, count in held_out.development(model): …     `held_out`: the same of the development split

`batches` knows no optimiser, and a model knows batches by their methods only.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch

from ..data.audio import SAMPLE_RATE, STFT
from ..data.corpus import Corpus
from ..models.base import Model
from .config import FEATURES, Recipe, SettingError
from .features import bins_of, stft_of


class Batches:
    """A source of batches for one kind of model."""

    models: ClassVar[type[Model]]  # what they have in common
    settings: ClassVar[
        tuple[str, ...]
    ]  # fields of Recipe that only some kinds have a use for, this one among them
    needs_labels = False
    divisible = True  # whether several processes can share a batch
    unused = "shorter than one training sequence"  # what the utterances are that `skipped` counts
    extractor = ""  # digest of the trained model whose latents take the place of features

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        per_epoch: int,
        skipped: int,
    ):
        """per_epoch: steps in which the whole corpus is seen about once. Completes the recipe with it."""
        self.corpus, self.seed, self.device, self.skipped = corpus, seed, device, skipped
        self.per_epoch = max(1, per_epoch)
        steps, report = (
            recipe.steps or recipe.epochs * self.per_epoch,
            recipe.report or self.per_epoch,
        )
        self.recipe = replace(recipe, steps=steps, report=report)

    def __call__(self, step: int):
        raise NotImplementedError

    def development(self, model: Model) -> Iterator[tuple]:
        """Every batch of the corpus once, with the number of examples in it."""
        raise NotImplementedError

    @property
    def size(self) -> str:
        """Of a batch, in words."""
        return f"{self.recipe.batch} × {self.recipe.frames} frames"

    @classmethod
    def derived(cls, recipe: Recipe) -> dict:
        """The settings of a model that follow from the recipe."""
        return {"bins": bins_of(recipe)}

    @classmethod
    def check(cls, name: str, recipe: Recipe, config: dict, given: dict[str, str]) -> None:
        """Raises SettingError where the recipe does not go with the config of model `name`. given: by the user."""
        if recipe.features == "power":
            raise SettingError(f"features=power: {name} takes {' or '.join(FEATURES[1:])}")

    @classmethod
    def check_lengths(cls, corpus: Corpus, recipe: Recipe) -> None:
        """Raises SettingError where most utterances are shorter than one training sequence, and says how many frames
        nine in ten have."""
        stft, frames = stft_of(recipe), recipe.frames
        lengths = sorted(
            u.trim[1] - u.trim[0] if recipe.trim else u.length for u in corpus.utterances
        )
        short = bisect_left(lengths, stft.samples(frames))
        if short > len(lengths) / 2:
            seconds, fitting = (
                stft.samples(frames) / SAMPLE_RATE,
                lengths[len(lengths) // 10] - stft.samples(1),
            )
            wrong = f"{short} of {len(lengths)} utterances are shorter than a training sequence ({seconds:.2f} s)"
            remedies = (
                [f"--set frames={fitting // stft.hop + 1} fits nine in ten"] if fitting >= 0 else []
            )
            if short < len(lengths):
                remedies.append(f"--set frames={frames} trains on the others")
            raise SettingError(
                f"{corpus.name}: {wrong}; {', '.join(remedies) or 'expected longer ones'}"
            )

    @classmethod
    def for_model(cls, recipe: Recipe, model: Model, stft: STFT, before: dict) -> Recipe:
        """The recipe of a training that starts from a trained model; before: the recipe of that one's training."""
        raise NotImplementedError
