"""Power spectra of random crops, for the DVAEs."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..data.crops import Augmentation, RandomCrops, consecutive_crops
from ..models.base import DVAE
from . import distributed
from .batches import Batches
from .config import Recipe
from .features import stft_of

STATISTICS_BATCHES = (
    8  # training batches from which the input scale and the output bias of a DVAE are taken
)


class Spectra(Batches):
    """Batches are power spectra (batch, frames, bins)."""

    models = DVAE
    settings = ("window", "hop", "own_past", "trim", "speed", "gain", "equaliser")

    def __init__(self, corpus: Corpus, recipe: Recipe, seed: int, device: torch.device):
        self.stft = stft_of(recipe)
        self.samples = self.stft.samples(recipe.frames)
        augmentation = Augmentation(recipe.speed, recipe.gain, recipe.equaliser)
        self.crops = RandomCrops(
            corpus, self.samples, recipe.batch, seed, recipe.trim, augmentation
        )
        super().__init__(
            corpus, recipe, seed, device, self.crops.sequences // recipe.batch, self.crops.skipped
        )

    def sample(self) -> Tensor:
        """Spectra from which statistics are taken, (batch, frames, bins)."""
        return torch.cat([self.stft.power(self.crops(step)) for step in range(STATISTICS_BATCHES)])

    def __call__(self, step: int) -> Tensor:
        return self.stft.power(
            self.crops(step, distributed.own(self.recipe.batch)).to(self.device, non_blocking=True)
        )

    def development(self, model: DVAE) -> Iterator[tuple[Tensor, int]]:
        """The past is as it will be at the end of training, so that the best checkpoint is the best at that."""
        model.own_past = self.recipe.own_past[-1]
        for crops in consecutive_crops(
            self.corpus, self.samples, self.recipe.batch, self.recipe.trim
        ):
            yield self.stft.power(crops.to(self.device)), len(crops)

    @classmethod
    def check(cls, name: str, recipe: Recipe, config: dict, given: dict[str, str]) -> None:
        """Every recipe goes with every DVAE."""

    @classmethod
    def for_model(cls, recipe, model, stft, before) -> Recipe:
        return replace(recipe, window=stft.window_length, hop=stft.hop)
