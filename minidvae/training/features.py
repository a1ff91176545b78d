"""Features of utterances for recognisers, a row for each frame of `audio.FEATURE_STFT`, centred."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from ..data import audio
from ..data.corpus import Corpus
from ..files import CheckpointError, atomic_write
from ..models.base import Gaussian
from . import checkpoint
from .config import LATENTS, Recipe


class FeatureExtractor(NamedTuple):
    bins: int
    extract: Callable[..., Tensor]  # (…, samples) → (…, frames, bins), `centred=False` for crops


FEATURE_EXTRACTORS = {
    "fbank": FeatureExtractor(80, audio.fbank),
    "log_magnitude": FeatureExtractor(200, audio.log_magnitude),
}
CACHE_BYTES = 2**28  # spectral features that are kept in memory
SEGMENTS_PER_BATCH = 1024
FORMAT = 1  # version of the files of latents; with another number they are made again


def stft_of(recipe: Recipe) -> audio.STFT:
    """Return the STFT of the features of a recipe."""
    if recipe.features == "power":
        return audio.STFT(recipe.window, recipe.hop)
    return audio.FEATURE_STFT


def bins_of(recipe: Recipe) -> int:
    """Return the number of bins of the features of a recipe."""
    if recipe.features == "power":
        return stft_of(recipe).bins
    return FEATURE_EXTRACTORS[recipe.features].bins


class SpectralFeatures:
    """Features that are computed from the waveforms when needed. The first `cache_bytes` of them
    are kept."""

    extractor = ""

    def __init__(
        self, corpus: Corpus, name: str, device: torch.device, cache_bytes: int = CACHE_BYTES
    ):
        self.corpus = corpus
        self.device = device
        self.bins, self.extract = FEATURE_EXTRACTORS[name]
        self.cache = {}
        self.free_bytes = cache_bytes

    def __getitem__(self, i: int) -> Tensor:
        if i in self.cache:
            return self.cache[i]
        waveform = torch.from_numpy(self.corpus.waveform(i, trim=False))
        x = self.extract(waveform.to(self.device))
        if x.nbytes <= self.free_bytes:
            self.cache[i] = x
            self.free_bytes -= x.nbytes
        return x


class LatentFeatures:
    """Mean and log-variance of the posterior of a latent, for the segment around each frame, by a
    trained FHVAE or β-VAE, whose digest is `extractor`. They are computed once for a corpus and an
    extractor, into a file beside the packed corpus."""

    def __init__(self, corpus: Corpus, folder: str, latent: str, device: torch.device):
        self.device = device
        model, _, content = checkpoint.load_run(folder, device)
        if content["model"] not in LATENTS:
            raise CheckpointError(
                f"extractor={folder}: holds a {content['model']}; expected {' or '.join(LATENTS)}"
            )
        latents = LATENTS[content["model"]]
        if latent not in latents:
            expected = " or ".join(f"latent={name}" for name in latents)
            raise CheckpointError(
                f"extractor={folder}: a {content['model']} has no {latent}; expected {expected}"
            )
        features = content["plan"]["recipe"]["features"]
        self.bins = 2 * getattr(model.config, "latent" if latent == "z" else f"{latent}_latent")
        self.ends = np.cumsum([audio.FEATURE_STFT.frames(u.length) for u in corpus.utterances])

        description = json.dumps([content["model"], asdict(model.config), features])
        digest = hashlib.sha256(description.encode())
        for parameter in model.state_dict().values():
            digest.update(parameter.cpu().numpy().tobytes())
        self.extractor = digest.hexdigest()[:24]
        key = json.dumps([FORMAT, corpus.fingerprint, self.extractor, latent])
        key = hashlib.sha256(key.encode())
        file = Path(corpus.packed.filename).parent / f"latents-{key.hexdigest()[:24]}.npy"
        if not file.exists():
            spectral = SpectralFeatures(corpus, features, device, cache_bytes=0)
            self.write(file, model.eval(), latent, spectral)
        self.rows = np.load(file, mmap_mode="r")

    @torch.no_grad()
    def write(self, file: Path, model, latent: str, spectral: SpectralFeatures) -> None:
        """Write the latents of all utterances as a NumPy file (all frames, bins)."""
        shape = (int(self.ends[-1]), self.bins)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        progress = trange(
            len(self.ends), desc=f"extracting {latent}", unit=" utterances", disable=None
        )
        with atomic_write(file) as temporary, open(temporary, "wb") as rows:
            np.lib.format.write_array_header_1_0(rows, header)
            for i in progress:
                segments = segments_around_frames(spectral[i], model.config.frames)
                for batch in segments.split(SEGMENTS_PER_BATCH):
                    posterior = torch.cat(encode(model, batch, latent), dim=-1)
                    rows.write(posterior.float().cpu().numpy().astype("<f4").tobytes())

    def __getitem__(self, i: int) -> Tensor:
        start = self.ends[i - 1] if i else 0
        return torch.from_numpy(np.array(self.rows[start : self.ends[i]])).to(self.device)


def segments_around_frames(x: Tensor, num_frames: int) -> Tensor:
    """Return the segment around each frame of an utterance, (frames, bins) → (frames, num_frames,
    bins). The first and the last frame are repeated beyond the ends."""
    before = x[:1].expand(num_frames // 2, -1)
    after = x[-1:].expand(num_frames - num_frames // 2 - 1, -1)
    return torch.cat([before, x, after]).unfold(0, num_frames, 1).transpose(1, 2)


def encode(model, segments: Tensor, latent: str) -> Gaussian:
    """Return q(latent | x) of segments; that of z1 with z2 at its mean."""
    posterior = model.infer(segments)
    return posterior if latent == "z" else getattr(posterior, f"q_{latent}")


def utterance_features(
    corpus: Corpus, recipe: Recipe, device: torch.device
) -> SpectralFeatures | LatentFeatures:
    """Return the features of a recipe: those of `extractor` where there is one, else its
    `features`. Raises CheckpointError where the extractor is missing, is no FHVAE or β-VAE or has
    no such latent."""
    if recipe.extractor:
        return LatentFeatures(corpus, recipe.extractor, recipe.latent, device)
    return SpectralFeatures(corpus, recipe.features, device)


def mean_and_deviation(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per bin, (bins,) each, in float64, over all frames of
    pieces (frames, bins)."""
    count = 0
    total = 0.0
    squares = 0.0
    for piece in pieces:
        frames = piece.double()
        count += len(frames)
        total = total + frames.sum(0)
        squares = squares + frames.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()
