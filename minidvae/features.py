"""Features of whole utterances, a row for each frame of `audio.FEATURES`, centred: what recognisers see.

    features = utterance_features(corpus, recipe, device)
    features[i]                                        (frames, features.bins), on the device
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from . import audio, checkpoint
from .checkpoint import CheckpointError
from .corpus import Corpus
from .files import whole

FEATURES = {  # name: bins, of frames (…, samples) → (…, frames, bins), `centred=False` for cuts
    "fbank": (80, audio.fbank),
    "log_magnitude": (200, audio.log_magnitude),
}
LATENTS = {"fhvae": ("z1", "z2"), "beta_vae": ("z",)}  # of which a recogniser can be given the posterior
KEPT = 2**28  # bytes of spectral features that are kept once made
SEGMENTS = 1024  # that an extractor encodes at a time
FORMAT = 1  # of the files of latents: another number makes them anew


class SpectralFeatures:
    """Made of the waveforms when asked for; the first `room` bytes of them are kept."""

    extractor = ""

    def __init__(self, corpus: Corpus, kind: str, device: torch.device, room: int = KEPT):
        self.corpus, self.device = corpus, device
        self.bins, self.function = FEATURES[kind]
        self.kept, self.room = {}, room

    def __getitem__(self, i: int) -> Tensor:
        if i in self.kept:
            return self.kept[i]
        x = self.function(torch.from_numpy(self.corpus.waveform(i, trim=False)).to(self.device))
        if x.nbytes <= self.room:
            self.kept[i], self.room = x, self.room - x.nbytes
        return x


class LatentFeatures:
    """Mean and log-variance of the posterior of a latent, of the segment around each frame, from a trained FHVAE or
    β-VAE. Made once for a corpus and an extractor, into a file beside the packed corpus. `extractor`: a digest of that
    model."""

    def __init__(self, corpus: Corpus, folder: str, latent: str, device: torch.device):
        self.device = device
        model, _, content = checkpoint.load_run(folder, device)
        if content["model"] not in LATENTS:
            raise CheckpointError(f"extractor={folder}: holds a {content['model']}; expected {' or '.join(LATENTS)}")
        if latent not in LATENTS[content["model"]]:
            there = " or ".join(f"latent={name}" for name in LATENTS[content["model"]])
            raise CheckpointError(f"extractor={folder}: a {content['model']} has no {latent}; expected {there}")
        features = content["plan"]["recipe"]["features"]
        self.bins = 2 * getattr(model.config, "latent" if latent == "z" else f"{latent}_latent")
        self.ends = np.cumsum([audio.FEATURES.frames(u.length) for u in corpus.utterances])

        digest = hashlib.sha256(json.dumps([content["model"], asdict(model.config), features]).encode())
        for parameter in model.state_dict().values():
            digest.update(parameter.cpu().numpy().tobytes())
        self.extractor = digest.hexdigest()[:24]
        key = hashlib.sha256(json.dumps([FORMAT, corpus.fingerprint, self.extractor, latent]).encode())
        file = Path(corpus.packed.filename).parent / f"latents-{key.hexdigest()[:24]}.npy"
        if not file.exists():
            self.write(file, model.eval(), latent, SpectralFeatures(corpus, features, device, room=0))
        self.rows = np.load(file, mmap_mode="r")

    @torch.no_grad()
    def write(self, file: Path, model, latent: str, spectral: SpectralFeatures) -> None:
        described = {"descr": "<f4", "fortran_order": False, "shape": (int(self.ends[-1]), self.bins)}
        with whole(file) as beside, open(beside, "wb") as rows:
            np.lib.format.write_array_header_1_0(rows, described)
            for i in trange(len(self.ends), desc=f"extracting {latent}", unit=" utterances", disable=None):
                segments = centred_segments(spectral[i], model.config.frames)
                posterior = [torch.cat(encode(model, some, latent), dim=-1) for some in segments.split(SEGMENTS)]
                rows.write(torch.cat(posterior).float().cpu().numpy().astype("<f4").tobytes())

    def __getitem__(self, i: int) -> Tensor:
        start = self.ends[i - 1] if i else 0
        return torch.from_numpy(np.array(self.rows[start : self.ends[i]])).to(self.device)


def centred_segments(x: Tensor, frames: int) -> Tensor:
    """(all frames, bins) → (all frames, frames, bins): segment t is of frames t − frames // 2 and on; the first and
    the last frame are repeated beyond the ends."""
    before, after = frames // 2, frames - frames // 2 - 1
    padded = torch.cat([x[:1].expand(before, -1), x, x[-1:].expand(after, -1)])
    return padded.unfold(0, frames, 1).transpose(1, 2)


def encode(model, segments: Tensor, latent: str):
    """q(latent | x) of segments, a Gaussian; z1's with z2 at its mean"""
    posterior = model.infer(segments)
    return posterior if latent == "z" else posterior[{"z1": 0, "z2": 2}[latent]]


def utterance_features(corpus: Corpus, recipe, device: torch.device) -> SpectralFeatures | LatentFeatures:
    """The features that a recipe names: those of `extractor` where there is one, else its `features`.

    Raises CheckpointError where the extractor is missing, is no FHVAE or β-VAE or has no such latent.
    """
    if recipe.extractor:
        return LatentFeatures(corpus, recipe.extractor, recipe.latent, device)
    return SpectralFeatures(corpus, recipe.features, device)
