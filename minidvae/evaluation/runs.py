"""What an experiment is given: trained models with the speech that they are evaluated on, and what was asked for; and
FHVAE's encoder over whole utterances."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.audio import STFT
from ..data.corpus import Corpus, Utterance
from ..files import CheckpointError
from ..inference.convert import segments_of
from ..inference.enhance import Settings
from ..training.config import Recipe
from ..training.features import FEATURE_EXTRACTORS


@dataclass
class Run:
    """A trained model and the speech that it is evaluated on."""

    folder: Path  # as the user named it
    name: str  # of the model, a key of models.MODELS
    model: nn.Module
    stft: STFT
    content: dict  # of its checkpoint; {"model": name} for a published one
    data: str  # the corpus: built-in, a folder, a manifest
    corpus: Corpus  # all its splits
    test: Corpus  # the utterances to evaluate on; of --pairs a list of mixtures, and no corpus beside it
    target: Path  # folder for results and pictures

    @property
    def trained(self) -> str:
        return f"step {self.content['progress']['step']}" if "plan" in self.content else "published"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was trained with. CheckpointError where it is none of this version."""
        try:
            return Recipe.from_dict(self.content["plan"]["recipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: not a run that this version can evaluate ({error})"
            ) from None

    def check_finite(self, output: Tensor | np.ndarray, what: str = "the model's output") -> None:
        """Raises CheckpointError where `output` holds nan or infinity, or zeros only, as e^l of huge weights may be."""
        if not (output := torch.as_tensor(output)).isfinite().all() or not output.any():
            raise CheckpointError(
                f"{self.folder}: {what} is not finite, or nothing; it cannot be evaluated"
            )


@dataclass
class Options:
    """What the command line says beside the runs."""

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
    method: str = Settings.method
    iterations: int | None = None


def noise_of(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of an utterance or a clip, which are the same whatever else is evaluated."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


@dataclass
class Speech:
    """A whole utterance in N segments of an FHVAE."""

    utterance: Utterance
    waveform: np.ndarray  # (samples,)
    features: Tensor  # (frames, bins)
    z1: Tensor  # (N, z1_latent), the means of q(z1) of the segments
    z2: Tensor  # (N, z2_latent)
    mu1: Tensor  # (z1_latent,), of the utterance
    mu2: Tensor  # (z2_latent,), its s-vector in closed form


@torch.no_grad()
def encode(run: Run, corpus: Corpus, index: int, shift: int = 0) -> Speech:
    """An utterance of a corpus in segments that are `shift` frames apart (the recipe's if 0)."""
    waveform = corpus.waveform(index, trim=run.recipe.trim)
    features = features_of(run, waveform)
    means = run.model.infer(segments_of(features, run.recipe.frames, shift or run.recipe.shift))
    mu1, mu2 = run.model.mu1(means.z1), run.model.s_vector(means.z2)
    return Speech(corpus.utterances[index], waveform, features, means.z1, means.z2, mu1, mu2)


def features_of(run: Run, waveform: np.ndarray) -> Tensor:
    """(samples,) → the features that the model sees (frames, bins), its frames those of `FEATURE_STFT.analyse`."""
    return FEATURE_EXTRACTORS[run.recipe.features].extract(
        torch.from_numpy(waveform).to(run.device)
    )
