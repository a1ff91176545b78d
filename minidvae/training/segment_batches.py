"""Segments of features with the sequence (the utterance) that each belongs to, for FHVAE and
β-VAE."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus
from ..data.crops import Windows
from ..models.beta_vae import BetaVAE
from ..models.fhvae import FHVAE
from ..models.segments import SegmentBatch
from . import distributed
from .batches import Batches
from .config import Recipe, SettingError
from .features import FEATURE_EXTRACTORS, mean_and_deviation
from .utterance_batches import members

# Segments x (batch, frames, bins), the sequence that each belongs to (batch,), and the number of
# segments of every sequence (sequences,).
SequenceSegments = tuple[Tensor, Tensor, Tensor]


class FeatureSegments(Batches):
    """Random segments, every segment of the corpus equally likely; none is stored.

    With `recipe.sequences` = K, hierarchical sampling (Hsu & Glass, Scalable factorized
    hierarchical variational autoencoder training, 2018): for `table_steps` steps at a time, only
    segments of K drawn sequences, which the K rows of the table of s-vectors then stand for.
    """

    model_types = (FHVAE, BetaVAE)
    recipe_fields = (
        "features",
        "shift",
        "sequences",
        "table_steps",
        "table_rate",
        "trim",
        "domain",
    )

    def __init__(self, corpus: Corpus, recipe: Recipe, seed: int, device: torch.device):
        self.index = feature_segments(corpus, recipe)
        steps_per_epoch = len(self.index) // recipe.batch
        super().__init__(corpus, recipe, seed, device, steps_per_epoch, self.index.skipped)
        num_sequences = len(self.index.counts)
        # Rows of the table of s-vectors.
        self.rows = min(recipe.sequences or num_sequences, num_sequences)
        self.is_hierarchical = self.rows < num_sequences
        self.drawn_sequences = lru_cache(1)(self.draw_sequences)

    def features(self, windows: Tensor) -> Tensor:
        extract = FEATURE_EXTRACTORS[self.recipe.features].extract
        return extract(windows.to(self.device, non_blocking=True), centred=False)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per bin over the whole corpus, (bins,) each."""
        index = feature_segments(self.corpus, self.recipe, shift=self.recipe.frames)
        batch = 4 * self.recipe.batch
        num_batches = -(-len(index) // batch)
        windows_of_batches = tqdm(
            index.in_order(batch), "statistics", num_batches, leave=False, disable=None
        )
        return mean_and_deviation(
            self.features(windows).flatten(0, 1) for _, windows in windows_of_batches
        )

    def sequences_at(self, step: int) -> np.ndarray:
        """Return the sequences that the rows of the table stand for at a step, (rows,)."""
        if not self.is_hierarchical:
            return np.arange(self.rows)
        return self.drawn_sequences(step // self.recipe.table_steps)

    def draw_sequences(self, number: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, number, 1))
        return random.choice(len(self.index.counts), self.rows, replace=False)

    def has_new_rows_at(self, step: int) -> bool:
        """Return whether the rows of the table stand for other sequences from this step on."""
        return self.is_hierarchical and step > 0 and step % self.recipe.table_steps == 0

    def __call__(self, step: int) -> SegmentBatch:
        sequences = self.sequences_at(step)
        num_segments = self.index.counts[sequences].sum()
        random = np.random.default_rng((distributed.seed_of_process(self.seed), step))
        batch = self.recipe.batch // distributed.process_count()
        segments = random.integers(num_segments, size=batch)
        rows, numbers = self.locate(sequences, segments)
        x = self.features(self.index[numbers])
        counts = torch.from_numpy(self.index.counts[sequences[rows]])
        return SegmentBatch(x, counts.to(x), torch.from_numpy(rows).to(self.device))

    def locate(self, sequences: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where segments are that are counted through these sequences only: their rows in
        `sequences`, and their numbers in the index."""
        ends = np.cumsum(self.index.counts[sequences])
        rows = np.searchsorted(ends, segments, side="right")
        return rows, segments - ends[rows] + self.index.ends[sequences[rows]]

    def of_sequences(self, sequences: np.ndarray | None = None) -> Iterator[SequenceSegments]:
        """Yield all segments of some sequences (None: of all) in batches."""
        if sequences is None:
            sequences = np.arange(len(self.index.counts))
        counts = torch.from_numpy(self.index.counts[sequences]).to(self.device)
        num_segments = int(self.index.counts[sequences].sum())
        batch = 4 * self.recipe.batch
        for first in range(0, num_segments, batch):
            segments = np.arange(first, min(first + batch, num_segments))
            rows, numbers = self.locate(sequences, segments)
            yield self.features(self.index[numbers]), torch.from_numpy(rows).to(self.device), counts

    def development(self, model: nn.Module) -> Iterator[tuple[SegmentBatch, int]]:
        """Yield every segment; of FHVAE with the s-vector of its sequence in closed form."""
        table = None
        if isinstance(model, FHVAE):
            table = compute_s_vectors(model, self.of_sequences())
        for numbers, windows in self.index.in_order(self.recipe.batch):
            rows = self.index.rows(numbers)
            x = self.features(windows)
            counts = torch.from_numpy(self.index.counts[rows]).to(x)
            s_vectors = None if table is None else table[rows]
            yield SegmentBatch(x, counts, None, s_vectors), len(x)

    def prepare(self, model: nn.Module, fresh: bool) -> None:
        """Also make FHVAE's table of s-vectors: drawn from the prior, or, for a model that has
        been trained before, the closed form."""
        if fresh:
            model.standardise.set(*self.statistics())
        if isinstance(model, FHVAE):
            model.make_table(self.rows)
            if not fresh:
                self.fill_table(model, step=0)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """Return the parameter groups of the optimiser. FHVAE's table of s-vectors has its own
        learning rate, and no Muon, which would move all rows though a step has few of them. It has
        no weight decay: the prior of its rows is in the bound, and a second one would move them
        away from the closed form."""
        if not isinstance(model, FHVAE):
            return super().parameter_groups(model)
        networks = [p for name, p in model.named_parameters() if name != "table"]
        table = {
            "params": [model.table],
            "rate": self.recipe.table_rate,
            "weight_decay": 0.0,
            "muon": False,
        }
        return [{"params": networks}, table]

    def before_step(self, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Compute the s-vectors of the table where its rows belong to new sequences from this step
        on."""
        if isinstance(model, FHVAE) and self.has_new_rows_at(step):
            self.fill_table(model, step)
            optimiser.state.pop(model.table, None)  # The moments were those of other sequences.

    def fill_table(self, model: FHVAE, step: int) -> None:
        segments = self.of_sequences(self.sequences_at(step))
        model.table.data.copy_(compute_s_vectors(model, segments))

    @classmethod
    def derived_settings(cls, recipe: Recipe) -> dict:
        return super().derived_settings(recipe) | {"frames": recipe.frames}

    @classmethod
    def check(cls, name: str, recipe: Recipe, config: dict, overrides: dict[str, str]) -> None:
        super().check(name, recipe, config, overrides)
        if recipe.shift > recipe.frames:
            raise SettingError(
                f"shift={recipe.shift}: expected at most frames={recipe.frames}, "
                "else frames are lost"
            )

    @classmethod
    def check_lengths(cls, corpus: Corpus, recipe: Recipe) -> None:
        super().check_lengths(of_domain(corpus, recipe), recipe)

    @classmethod
    def recipe_for(cls, recipe: Recipe, model: nn.Module, stft: audio.STFT, former: dict) -> Recipe:
        return replace(recipe, features=former["features"], frames=model.config.frames)


@torch.no_grad()
def compute_s_vectors(model: FHVAE, segments: Iterable[SequenceSegments]) -> Tensor:
    """Return μ2 of sequences in closed form, (sequences, z2_latent), from all their segments."""
    sums = None
    for x, rows, counts in segments:
        z2 = model.encoder_z2(model.standardise(x)).mean.float()
        if sums is None:
            sums = z2.new_zeros(len(counts), z2.shape[1])
        sums.index_put_((rows,), z2, accumulate=True)  # adds in order, unlike index_add_
    return model.s_vector_of(sums, counts.to(sums)[:, None])


def of_domain(corpus: Corpus, recipe: Recipe) -> Corpus:
    """Return the utterances of the recipe's domain."""
    utterances = tuple(corpus.utterances[i] for i in members(corpus, recipe.domain))
    return replace(corpus, utterances=utterances)


def feature_segments(corpus: Corpus, recipe: Recipe, shift: int = 0) -> Windows:
    """Return the segments of every utterance in the recipe's domain, `shift` frames apart (the
    recipe's if 0)."""
    stft = audio.FEATURE_STFT
    samples = stft.samples(recipe.frames)
    stride = (shift or recipe.shift) * stft.hop
    return Windows(of_domain(corpus, recipe), samples, stride, recipe.trim)
