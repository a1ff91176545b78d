"""What the training loop is fed: the batch of each step and the development set, for each kind of model.

    batches = SOURCES[model.batches](training, recipe, seed, device)
    batches.fit(model, fresh)                          statistics of the training set, before the first step of a run
    batches.groups(model, recipe)                      its parameters as the optimiser takes them
    batches.prepare(model, optimiser, recipe, step)    what the model needs to know before a step
    model.loss(batches(step))                          a function of (seed, step) alone
    batches.development(corpus, model, recipe)         → batch, its number of examples
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import audio
from .corpus import Corpus, Cuts, Segments, segments
from .models.fhvae import FHVAE, SegmentBatch

STATISTICS_BATCHES = 8  # training batches from which the input scale and the output bias of a DVAE are taken
FEATURES = {  # name: bins, of uncentred frames (…, samples) → (…, frames, bins)
    "fbank": (80, audio.fbank),
    "log_magnitude": (200, audio.log_magnitude),
}


class Spectra:
    """Power spectra of random cuts, (batch, frames, bins), for the DVAEs."""

    def __init__(self, corpus: Corpus, recipe, seed: int, device: torch.device):
        self.stft, self.device = recipe.stft, device
        self.samples = self.stft.samples(recipe.frames)
        self.cuts = Cuts(corpus, self.samples, recipe.batch, seed, recipe.trim)
        self.per_epoch, self.skipped = max(1, self.cuts.sequences // recipe.batch), self.cuts.skipped

    def fit(self, model, fresh: bool) -> None:
        """A model that has been trained before (not `fresh`) keeps its own."""
        if not fresh:
            return
        sample = torch.cat([self.stft.power(self.cuts(step)) for step in range(STATISTICS_BATCHES)])
        model.fit_statistics(sample.to(self.device))

    def groups(self, model, recipe) -> list[dict]:
        return [{"params": list(model.parameters())}]

    def prepare(self, model, optimiser, recipe, step: int) -> None:
        model.own_past = recipe.own_past_at(step)

    def __call__(self, step: int) -> Tensor:
        return self.stft.power(self.cuts(step).to(self.device, non_blocking=True))

    def development(self, corpus: Corpus, model, recipe) -> Iterator[tuple[Tensor, int]]:
        """The past is as it will be at the end of training, so that the best checkpoint is the best at that."""
        model.own_past = recipe.own_past[-1]
        for cut in segments(corpus, self.samples, recipe.batch, recipe.trim):
            yield self.stft.power(cut.to(self.device)), len(cut)


class FeatureSegments:
    """Segments of features with the sequence (the utterance) that each belongs to, for FHVAE and β-VAE.

    Every segment of the corpus is equally likely, and none is stored. With `recipe.sequences` = K, hierarchical
    sampling (Hsu & Glass, Scalable factorized hierarchical variational autoencoder training, 2018): for `redraw`
    steps at a time, the segments of K drawn sequences only, which the K rows of the table then stand for.
    """

    def __init__(self, corpus: Corpus, recipe, seed: int, device: torch.device):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.index = feature_segments(corpus, recipe)
        self.per_epoch, self.skipped = max(1, len(self.index) // recipe.batch), self.index.skipped
        known = len(self.index.counts)
        self.rows = min(recipe.sequences or known, known)
        self.drawn, self.block = self.rows < known, -1

    def features(self, cuts: Tensor) -> Tensor:
        return FEATURES[self.recipe.features][1](cuts.to(self.device, non_blocking=True), centred=False)

    def fit(self, model, fresh: bool) -> None:
        """Mean and deviation per bin, and the table of s-vectors: a model that has been trained before (not `fresh`)
        keeps the first, and its table begins with the closed form."""
        if fresh:
            model.standardise.set(*self.statistics())
        if isinstance(model, FHVAE):
            model.make_table(self.rows)
            if not fresh:
                model.table.data.copy_(self.s_vectors(model, self.index, self.choose(0)))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per bin over the whole training set, (bins,) each."""
        recipe = self.recipe
        index = feature_segments(self.index.corpus, recipe, shift=recipe.frames)
        count, total, squares = 0, 0.0, 0.0
        steps = index.in_order(4 * recipe.batch)
        for _, cuts in tqdm(steps, "statistics", -(-len(index) // (4 * recipe.batch)), leave=False, disable=None):
            frames = self.features(cuts).flatten(0, 1).double()
            count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp_min(0).sqrt()

    def choose(self, step: int) -> np.ndarray:
        """The sequences that the rows of the table stand for at a step, (rows,)."""
        block = step // self.recipe.redraw if self.drawn else 0
        if block != self.block:
            self.block, self.chosen = block, np.arange(self.rows)
            if self.drawn:
                random = np.random.default_rng((self.seed, block, 1))
                self.chosen = random.choice(len(self.index.counts), self.rows, replace=False)
            self.ends = np.cumsum(self.index.counts[self.chosen])
        return self.chosen

    def groups(self, model, recipe) -> list[dict]:
        """The table, of which a step meets few rows, has a learning rate of its own, and no weight decay: its prior is
        in the bound, and a second one would move its rows away from the closed form."""
        groups = [{"params": [p for name, p in model.named_parameters() if name != "table"]}]
        if isinstance(model, FHVAE):
            groups.append({"params": [model.table], "rate": recipe.table_rate, "weight_decay": 0.0})
        return groups

    def prepare(self, model, optimiser, recipe, step: int) -> None:
        """Where the table's rows are drawn anew, they get the closed form of their sequences."""
        if isinstance(model, FHVAE) and self.drawn and step > 0 and step % recipe.redraw == 0:
            model.table.data.copy_(self.s_vectors(model, self.index, self.choose(step)))
            optimiser.state.pop(model.table, None)  # the moments were other sequences'

    def __call__(self, step: int) -> SegmentBatch:
        chosen = self.choose(step)
        drawn = np.random.default_rng((self.seed, step)).integers(self.ends[-1], size=self.recipe.batch)
        rows, numbers = among(self.index, chosen, self.ends, drawn)
        counts = torch.from_numpy(self.index.counts[chosen[rows]])
        x = self.features(self.index[numbers])
        return SegmentBatch(x, counts.to(x), torch.from_numpy(rows).to(self.device))

    @torch.no_grad()
    def s_vectors(self, model: FHVAE, index: Segments, chosen: np.ndarray) -> Tensor:
        """The closed form of μ2 for some sequences of an index, (chosen, z2_latent)."""
        ends = np.cumsum(index.counts[chosen])
        sums = torch.zeros(len(chosen), model.config.z2_latent, device=self.device)
        for first in range(0, ends[-1], 4 * self.recipe.batch):
            some = np.arange(first, min(first + 4 * self.recipe.batch, ends[-1]))
            rows, numbers = among(index, chosen, ends, some)
            x = self.features(index[numbers])
            z2 = model.encoder_z2(model.standardise(x)).mean
            sums.index_put_((torch.from_numpy(rows).to(self.device),), z2.to(sums), accumulate=True)  # in order
        return model.s_vector_of(sums, torch.from_numpy(index.counts[chosen]).to(sums)[:, None])

    def development(self, corpus: Corpus, model, recipe) -> Iterator[tuple[SegmentBatch, int]]:
        """Every segment, its sequence's s-vector from the closed form."""
        index = feature_segments(corpus, recipe)
        s_vectors = None
        if isinstance(model, FHVAE):
            s_vectors = self.s_vectors(model, index, np.arange(len(index.counts)))
        for numbers, cuts in index.in_order(recipe.batch):
            rows, x = index.rows(numbers), self.features(cuts)
            counts = torch.from_numpy(index.counts[rows]).to(x)
            yield SegmentBatch(x, counts, None, None if s_vectors is None else s_vectors[rows]), len(x)


def among(index: Segments, chosen: np.ndarray, ends: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of segments counted through the chosen sequences only, `ends` their ends in that count: the row in `chosen` of
    each, and its number in the index."""
    rows = np.searchsorted(ends, places, side="right")
    return rows, places - ends[rows] + index.ends[chosen[rows]]


def feature_segments(corpus: Corpus, recipe, shift: int = 0) -> Segments:
    """The segments of `frames` frames, `shift` frames apart (the recipe's if 0), of every utterance."""
    stft = audio.FEATURES
    return Segments(corpus, stft.samples(recipe.frames), (shift or recipe.shift) * stft.hop, recipe.trim)


SOURCES = {"spectra": Spectra, "segments": FeatureSegments}
