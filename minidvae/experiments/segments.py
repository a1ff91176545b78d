"""Whole utterances as segments of features, and their latents, for the experiments with FHVAE and β-VAE."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import batches
from ..checkpoint import CheckpointError
from ..corpus import Corpus
from ..recipes import Recipe
from . import Run


def recipe_of(run: Run) -> Recipe:
    """The recipe that a run was trained with."""
    try:
        return Recipe(**run.content["plan"]["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run.folder}: not a run that this version can evaluate ({error})") from None


def features(waveform: np.ndarray, kind: str, device: torch.device | str = "cpu") -> Tensor:
    """(samples,) → features (frames, bins), frames centred as `FEATURES.analyse` has them; kind as in a recipe."""
    return batches.FEATURES[kind][1](torch.from_numpy(waveform).to(device))


def cut(features: Tensor, frames: int, shift: int) -> Tensor:
    """(all frames, bins) → segments (N, frames, bins), `shift` frames apart, the last frame repeated at the end until
    every frame is in one."""
    count = max(0, -(-(len(features) - frames) // shift)) + 1
    missing = (count - 1) * shift + frames - len(features)
    padded = torch.cat([features, features[-1:].expand(missing, -1)])
    return padded.unfold(0, frames, shift).transpose(1, 2)


@torch.no_grad()
def encode(run: Run, waveform: np.ndarray, shift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(samples,) through an FHVAE: its features (frames, bins), and the means of q(z1) and q(z2) of its segments,
    (N, z1_latent) and (N, z2_latent); they are `shift` frames apart (the recipe's if 0)."""
    recipe, model = recipe_of(run), run.model
    x = features(waveform, recipe.features, model.standardise.mean.device)
    _, z1, _, z2 = model.infer(cut(x, recipe.frames, shift or recipe.shift))
    return x, z1, z2


def latent_means(run: Run, corpus: Corpus) -> Iterator[tuple[Tensor, Tensor]]:
    """Of an FHVAE, for every utterance: the means of q(z1) and q(z2) of its segments."""
    trim = recipe_of(run).trim
    for index in range(len(corpus)):
        yield encode(run, corpus.waveform(index, trim=trim))[1:]
