"""Features of whole utterances, a row for each frame of `audio.FEATURE_STFT`, centred: what recognisers see."""

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
KEPT = 2**28  # bytes of spectral features that are kept once made
SEGMENTS_PER_BATCH = 1024
FORMAT = 1  # of the files of latents: another number makes them anew


def stft_of(recipe: Recipe) -> audio.STFT:
    return (
        audio.STFT(recipe.window, recipe.hop) if recipe.features == "power" else audio.FEATURE_STFT
    )


def bins_of(recipe: Recipe) -> int:
    return (
        stft_of(recipe).bins
        if recipe.features == "power"
        else FEATURE_EXTRACTORS[recipe.features].bins
    )


class SpectralFeatures:
    """Made of the waveforms when asked for; the first `room` bytes of them are kept."""

    extractor = ""

    def __init__(self, corpus: Corpus, kind: str, device: torch.device, room: int = KEPT):
        self.corpus, self.device = corpus, device
        self.bins, self.function = FEATURE_EXTRACTORS[kind]
        self.kept, self.room = {}, room

    def __getitem__(self, i: int) -> Tensor:
        if i in self.kept:
            return self.kept[i]
        x = self.function(torch.from_numpy(self.corpus.waveform(i, trim=False)).to(self.device))
        if x.nbytes <= self.room:
            self.kept[i], self.room = x, self.room - x.nbytes
        return x


class LatentFeatures:
    """Mean and log-variance of a latent's posterior, of the segment around each frame, from a trained FHVAE or β-VAE,
    `extractor` its digest. Made once for a corpus and an extractor, into a file beside the packed corpus."""

    def __init__(self, corpus: Corpus, folder: str, latent: str, device: torch.device):
        self.device = device
        model, _, content = checkpoint.load_run(folder, device)
        if content["model"] not in LATENTS:
            raise CheckpointError(
                f"extractor={folder}: holds a {content['model']}; expected {' or '.join(LATENTS)}"
            )
        if latent not in LATENTS[content["model"]]:
            there = " or ".join(f"latent={name}" for name in LATENTS[content["model"]])
            raise CheckpointError(
                f"extractor={folder}: a {content['model']} has no {latent}; expected {there}"
            )
        features = content["plan"]["recipe"]["features"]
        self.bins = 2 * getattr(model.config, "latent" if latent == "z" else f"{latent}_latent")
        self.ends = np.cumsum([audio.FEATURE_STFT.frames(u.length) for u in corpus.utterances])

        digest = hashlib.sha256(
            json.dumps([content["model"], asdict(model.config), features]).encode()
        )
        for parameter in model.state_dict().values():
            digest.update(parameter.cpu().numpy().tobytes())
        self.extractor = digest.hexdigest()[:24]
        key = hashlib.sha256(
            json.dumps([FORMAT, corpus.fingerprint, self.extractor, latent]).encode()
        )
        file = Path(corpus.packed.filename).parent / f"latents-{key.hexdigest()[:24]}.npy"
        if not file.exists():
            self.write(
                file, model.eval(), latent, SpectralFeatures(corpus, features, device, room=0)
            )
        self.rows = np.load(file, mmap_mode="r")

    @torch.no_grad()
    def write(self, file: Path, model, latent: str, spectral: SpectralFeatures) -> None:
        described = {
            "descr": "<f4",
            "fortran_order": False,
            "shape": (int(self.ends[-1]), self.bins),
        }
        with atomic_write(file) as beside, open(beside, "wb") as rows:
            np.lib.format.write_array_header_1_0(rows, described)
            for i in trange(
                len(self.ends), desc=f"extracting {latent}", unit=" utterances", disable=None
            ):
                x, frames = spectral[i], model.config.frames
                before, after = (
                    x[:1].expand(frames // 2, -1),
                    x[-1:].expand(frames - frames // 2 - 1, -1),
                )
                segments = (
                    torch.cat([before, x, after]).unfold(0, frames, 1).transpose(1, 2)
                )  # one around each frame
                for some in segments.split(SEGMENTS_PER_BATCH):
                    posterior = torch.cat(encode(model, some, latent), dim=-1)
                    rows.write(posterior.float().cpu().numpy().astype("<f4").tobytes())

    def __getitem__(self, i: int) -> Tensor:
        start = self.ends[i - 1] if i else 0
        return torch.from_numpy(np.array(self.rows[start : self.ends[i]])).to(self.device)


def encode(model, segments: Tensor, latent: str) -> Gaussian:
    """q(latent | x) of segments; z1's with z2 at its mean"""
    posterior = model.infer(segments)
    return posterior if latent == "z" else getattr(posterior, f"q_{latent}")


def utterance_features(
    corpus: Corpus, recipe: Recipe, device: torch.device
) -> SpectralFeatures | LatentFeatures:
    """The features that a recipe names: those of `extractor` where there is one, else its `features`. Raises
    CheckpointError where the extractor is missing, is no FHVAE or β-VAE or has no such latent."""
    if recipe.extractor:
        return LatentFeatures(corpus, recipe.extractor, recipe.latent, device)
    return SpectralFeatures(corpus, recipe.features, device)


def mean_and_deviation(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Per bin, in float64, over all frames of pieces (frames, bins): (bins,) each"""
    count, total, squares = 0, 0.0, 0.0
    for frames in (piece.double() for piece in pieces):
        count, total, squares = (
            count + len(frames),
            total + frames.sum(0),
            squares + frames.square().sum(0),
        )
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()
