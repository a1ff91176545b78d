"""Segments of features with the sequence (the utterance) that each belongs to, for FHVAE and β-VAE."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus
from ..data.crops import Windows
from ..models.segments import SegmentBatch, SegmentModel
from . import distributed
from .batches import Batches
from .config import Recipe, SettingError
from .features import FEATURE_EXTRACTORS, mean_and_deviation
from .utterance_batches import members


class FeatureSegments(Batches):
    """Every segment of the corpus is equally likely, and none is stored. With `recipe.sequences` = K, hierarchical
    sampling (Hsu & Glass, Scalable factorized hierarchical variational autoencoder training, 2018): for `table_steps`
    steps at a time, the segments of K drawn sequences only, which the K rows of the table then stand for."""

    models = SegmentModel
    settings = ("features", "shift", "sequences", "table_steps", "table_rate", "trim", "domain")

    def __init__(self, corpus: Corpus, recipe: Recipe, seed: int, device: torch.device):
        self.index = feature_segments(corpus, recipe)
        super().__init__(
            corpus, recipe, seed, device, len(self.index) // recipe.batch, self.index.skipped
        )
        known = len(self.index.counts)
        self.rows = min(recipe.sequences or known, known)
        self.drawn = self.rows < known
        self.rows_drawn = lru_cache(1)(self.draw_rows)

    def features(self, windows: Tensor) -> Tensor:
        extract = FEATURE_EXTRACTORS[self.recipe.features].extract
        return extract(windows.to(self.device, non_blocking=True), centred=False)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per bin over the whole corpus, (bins,) each."""
        index, batch = (
            feature_segments(self.corpus, self.recipe, shift=self.recipe.frames),
            4 * self.recipe.batch,
        )
        pieces = tqdm(
            index.in_order(batch), "statistics", -(-len(index) // batch), leave=False, disable=None
        )
        return mean_and_deviation(self.features(windows).flatten(0, 1) for _, windows in pieces)

    def chosen(self, step: int) -> np.ndarray:
        """The sequences that the rows of the table stand for at a step, (rows,)."""
        return (
            self.rows_drawn(step // self.recipe.table_steps) if self.drawn else np.arange(self.rows)
        )

    def draw_rows(self, number: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, number, 1))
        return random.choice(len(self.index.counts), self.rows, replace=False)

    def new_rows_at(self, step: int) -> bool:
        """Whether the rows of the table stand for other sequences from this step on."""
        return self.drawn and step > 0 and step % self.recipe.table_steps == 0

    def __call__(self, step: int) -> SegmentBatch:
        chosen = self.chosen(step)
        segments = self.index.counts[chosen].sum()
        places = np.random.default_rng((self.seed, step)).integers(segments, size=self.recipe.batch)
        rows, numbers = self.among(chosen, places[distributed.own(self.recipe.batch)])
        x = self.features(self.index[numbers])
        counts = torch.from_numpy(self.index.counts[chosen[rows]])
        return SegmentBatch(x, counts.to(x), torch.from_numpy(rows).to(self.device))

    def among(self, chosen: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of segments counted through the chosen sequences only: their rows in `chosen`, and numbers in the index."""
        ends = np.cumsum(self.index.counts[chosen])
        rows = np.searchsorted(ends, places, side="right")
        return rows, places - ends[rows] + self.index.ends[chosen[rows]]

    def of_sequences(
        self, chosen: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All segments of some sequences (default: of all): x (batch, frames, bins), the row in `chosen` of each
        (batch,), and the number of segments of every sequence (chosen,)."""
        chosen = np.arange(len(self.index.counts)) if chosen is None else chosen
        counts, batch = (
            torch.from_numpy(self.index.counts[chosen]).to(self.device),
            4 * self.recipe.batch,
        )
        segments = int(self.index.counts[chosen].sum())
        for first in range(0, segments, batch):
            rows, numbers = self.among(chosen, np.arange(first, min(first + batch, segments)))
            yield self.features(self.index[numbers]), torch.from_numpy(rows).to(self.device), counts

    def development(self, model: SegmentModel) -> Iterator[tuple[SegmentBatch, int]]:
        """Every segment, its sequence's s-vector from the closed form."""
        s_vectors = model.s_vectors(self.of_sequences())
        for numbers, windows in self.index.in_order(self.recipe.batch):
            rows, x = self.index.rows(numbers), self.features(windows)
            counts = torch.from_numpy(self.index.counts[rows]).to(x)
            yield (
                SegmentBatch(x, counts, None, None if s_vectors is None else s_vectors[rows]),
                len(x),
            )

    @classmethod
    def derived(cls, recipe: Recipe) -> dict:
        return super().derived(recipe) | {"frames": recipe.frames}

    @classmethod
    def check(cls, name, recipe, config, given) -> None:
        super().check(name, recipe, config, given)
        if recipe.shift > recipe.frames:
            raise SettingError(
                f"shift={recipe.shift}: expected at most frames={recipe.frames}, else frames are lost"
            )

    @classmethod
    def check_lengths(cls, corpus: Corpus, recipe: Recipe) -> None:
        super().check_lengths(of_domain(corpus, recipe), recipe)

    @classmethod
    def for_model(cls, recipe, model, stft, before) -> Recipe:
        return replace(recipe, features=before["features"], frames=model.config.frames)


def of_domain(corpus: Corpus, recipe: Recipe) -> Corpus:
    return replace(
        corpus, utterances=tuple(corpus.utterances[i] for i in members(corpus, recipe.domain))
    )


def feature_segments(corpus: Corpus, recipe: Recipe, shift: int = 0) -> Windows:
    """The segments of every utterance in the recipe's domain, `shift` frames apart (the recipe's if 0)."""
    stft, corpus = audio.FEATURE_STFT, of_domain(corpus, recipe)
    return Windows(
        corpus, stft.samples(recipe.frames), (shift or recipe.shift) * stft.hop, recipe.trim
    )
