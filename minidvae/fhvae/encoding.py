"""Whole utterances in segments of an FHVAE, with their latents."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus, Utterance
from ..evaluation.runs import Run
from ..inference.convert import segments_of
from ..training.features import FEATURE_EXTRACTORS


@dataclass
class EncodedUtterance:
    """A whole utterance in N segments of an FHVAE."""

    utterance: Utterance
    waveform: np.ndarray  # (samples,)
    features: Tensor  # (frames, bins)
    z1: Tensor  # (N, z1_latent), the means of q(z1) of the segments
    z2: Tensor  # (N, z2_latent)
    mu1: Tensor  # (z1_latent,), of the utterance
    mu2: Tensor  # (z2_latent,), its s-vector in closed form


@torch.no_grad()
def encode(run: Run, corpus: Corpus, index: int, shift: int = 0) -> EncodedUtterance:
    """Encode an utterance of a corpus in segments that are `shift` frames apart (the recipe's if
    0)."""
    waveform = corpus.waveform(index, trim=run.recipe.trim)
    features = features_of(run, waveform)
    segments = segments_of(features, run.recipe.frames, shift or run.recipe.shift)
    means = run.model.infer(segments)
    return EncodedUtterance(
        utterance=corpus.utterances[index],
        waveform=waveform,
        features=features,
        z1=means.z1,
        z2=means.z2,
        mu1=run.model.mu1(means.z1),
        mu2=run.model.s_vector(means.z2),
    )


def features_of(run: Run, waveform: np.ndarray) -> Tensor:
    """Return the features (frames, bins) that the model sees of a waveform (samples,). Their frames
    are those of `FEATURE_STFT.analyse`."""
    extract = FEATURE_EXTRACTORS[run.recipe.features].extract
    return extract(torch.from_numpy(waveform).to(run.device))
