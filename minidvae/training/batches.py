"""What the training loop reads: the batch of each step, and the development set.

    batches = batches_type(corpus, recipe, seed, device)
    batches.prepare(model, fresh)                    fit statistics of the training set
    batches.parameter_groups(model)                  the parameters as the optimiser takes them
    batches.before_step(model, optimiser, step)      what has to happen before a step
    batch = batches(step)                            depends on (seed, step) alone
    model.loss(batch, **batches.loss_arguments(step))
    for batch, count in held_out.development(model)  the development set

This module has the batches of DVAEs; `segment_batches` and `utterance_batches` those of the other
models. A model knows nothing of batches or recipes: it is called with tensors and numbers.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data.audio import SAMPLE_RATE, STFT
from ..data.corpus import Corpus
from ..data.crops import Augmentation, RandomCrops, consecutive_crops
from ..models.base import DVAE
from . import distributed
from .config import FEATURES, Recipe, SettingError
from .features import bins_of, stft_of

STATISTICS_BATCHES = 8  # training batches to which the statistics of a DVAE are fitted


class Batches:
    """The batches of one type of model."""

    model_types: ClassVar[tuple[type[nn.Module], ...]]  # the models that learn from them
    recipe_fields: ClassVar[tuple[str, ...]]  # fields of Recipe that only some types of batches use
    needs_labels = False
    can_be_distributed = True  # whether several processes can train together
    skipped_because = "shorter than one training sequence"  # why utterances are skipped
    extractor = ""  # digest of the trained model whose latents take the place of features

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        steps_per_epoch: int,
        skipped: int,
    ):
        """steps_per_epoch: steps in which the whole corpus is seen about once. skipped: number of
        utterances that cannot be used."""
        self.corpus = corpus
        self.seed = seed
        self.device = device
        self.skipped = skipped
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.recipe = replace(
            recipe,
            steps=recipe.steps or recipe.epochs * self.steps_per_epoch,
            report=recipe.report or self.steps_per_epoch,
        )

    def __call__(self, step: int):
        """Return the batch of a training step, which depends on (seed, step) alone."""
        raise NotImplementedError

    def development(self, model: nn.Module) -> Iterator[tuple]:
        """Yield every batch of the corpus once, with the number of examples in it."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, fresh: bool) -> None:
        """Fit the statistics of the training set before the first step of a run. Not fresh: the
        model has been trained before, and keeps its statistics."""
        raise NotImplementedError

    def resume(self, model: nn.Module) -> None:
        """Do what is needed to continue an interrupted run."""

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """Return the parameters as a torch optimiser takes them. "rate": the learning rate of a
        group relative to the recipe's."""
        return [{"params": list(model.parameters())}]

    def before_step(self, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Do what has to happen before a training step."""

    def loss_arguments(self, step: int | None) -> dict:
        """Return the arguments of `model.loss` beside the batch, at a step; None: at the end of
        training, as the development loss takes them."""
        return {}

    @property
    def size(self) -> str:
        """The size of a batch, in words."""
        return f"{self.recipe.batch} × {self.recipe.frames} frames"

    @classmethod
    def derived_settings(cls, recipe: Recipe) -> dict:
        """Return the settings of a model that follow from the recipe."""
        return {"bins": bins_of(recipe)}

    @classmethod
    def check(cls, name: str, recipe: Recipe, config: dict, overrides: dict[str, str]) -> None:
        """Raise SettingError where the recipe does not go with the config of model `name`.
        overrides: the settings of the user."""
        if recipe.features == "power":
            raise SettingError(f"features=power: {name} takes {' or '.join(FEATURES[1:])}")

    @classmethod
    def check_lengths(cls, corpus: Corpus, recipe: Recipe) -> None:
        """Raise SettingError where most utterances are shorter than one training sequence. The
        message says how many frames nine in ten have."""
        stft = stft_of(recipe)
        needed = stft.samples(recipe.frames)
        lengths = []
        for utterance in corpus.utterances:
            start, stop = utterance.trim
            lengths.append(stop - start if recipe.trim else utterance.length)
        lengths.sort()
        too_short = bisect_left(lengths, needed)
        if too_short <= len(lengths) / 2:
            return
        remedies = []
        samples = lengths[len(lengths) // 10] - stft.samples(1)
        if samples >= 0:
            remedies.append(f"--set frames={samples // stft.hop + 1} fits nine in ten")
        if too_short < len(lengths):
            remedies.append(f"--set frames={recipe.frames} trains on the others")
        raise SettingError(
            f"{corpus.name}: {too_short} of {len(lengths)} utterances are shorter than a training "
            f"sequence ({needed / SAMPLE_RATE:.2f} s); "
            f"{', '.join(remedies) or 'expected longer ones'}"
        )

    @classmethod
    def recipe_for(cls, recipe: Recipe, model: nn.Module, stft: STFT, former: dict) -> Recipe:
        """Return the recipe of a training that starts from a trained model. former: the recipe of
        that model's training."""
        raise NotImplementedError


class Spectra(Batches):
    """Power spectra (batch, frames, bins) of random crops, for DVAEs."""

    model_types = (DVAE,)
    recipe_fields = ("window", "hop", "scheduled_sampling", "trim", "speed", "gain", "equaliser")

    def __init__(self, corpus: Corpus, recipe: Recipe, seed: int, device: torch.device):
        self.stft = stft_of(recipe)
        self.samples = self.stft.samples(recipe.frames)
        self.crops = RandomCrops(
            corpus,
            self.samples,
            recipe.batch // distributed.process_count(),
            distributed.seed_of_process(seed),
            recipe.trim,
            Augmentation(recipe.speed, recipe.gain, recipe.equaliser),
        )
        steps_per_epoch = self.crops.sequences // recipe.batch
        super().__init__(corpus, recipe, seed, device, steps_per_epoch, self.crops.skipped)

    def __call__(self, step: int) -> Tensor:
        return self.stft.power(self.crops(step).to(self.device, non_blocking=True))

    def development(self, model: DVAE) -> Iterator[tuple[Tensor, int]]:
        crops_of_corpus = consecutive_crops(
            self.corpus, self.samples, self.recipe.batch, self.recipe.trim
        )
        for crops in crops_of_corpus:
            yield self.stft.power(crops.to(self.device)), len(crops)

    def prepare(self, model: DVAE, fresh: bool) -> None:
        if fresh:
            power = [self.stft.power(self.crops(step)) for step in range(STATISTICS_BATCHES)]
            model.fit_statistics(torch.cat(power).to(self.device))

    def loss_arguments(self, step: int | None) -> dict:
        """The development loss has the past of the end of training, so that the best checkpoint
        is the best at that."""
        if step is None:
            return {"scheduled_sampling_prob": self.recipe.scheduled_sampling[-1]}
        return {"scheduled_sampling_prob": self.recipe.scheduled_sampling_at(step)}

    @classmethod
    def check(cls, name: str, recipe: Recipe, config: dict, overrides: dict[str, str]) -> None:
        """Every recipe goes with every DVAE."""

    @classmethod
    def recipe_for(cls, recipe: Recipe, model: DVAE, stft: STFT, former: dict) -> Recipe:
        return replace(recipe, window=stft.window_length, hop=stft.hop)
