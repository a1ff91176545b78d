"""What the models of segments share, FHVAE and β-VAE: their batches and their networks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Gaussian, GaussianHead, mlp, per_frame
from .recurrent import recurrent


class SegmentBatch(NamedTuple):
    """Segments out of one or many sequences. FHVAE needs either `row` or `s_vector`."""

    x: Tensor  # (batch, frames, bins), features as they are
    count: Tensor  # (batch,) N, the number of segments of its sequence
    row: Tensor | None = None  # (batch,) row of its sequence in the table of s-vectors
    s_vector: Tensor | None = None  # (batch, z2_latent) μ2 of a sequence that is not in the table


class SegmentEncoder(nn.Module):
    """q(z | x, ·) of a segment x (batch, frames, bins): a recurrent network over the frames, its last output → Gaussian
    head. A second latent that z depends on is given to every frame. Architecture "fc": the segment as one vector."""

    def __init__(
        self,
        architecture: str,
        frames: int,
        bins: int,
        given: int,
        width: int,
        layers: int,
        latent: int,
    ):
        super().__init__()
        self.flat = architecture == "fc"
        inputs = given + (frames * bins if self.flat else bins)
        self.network = (
            mlp(inputs, (width,) * layers)
            if self.flat
            else recurrent(architecture, inputs, width, layers)
        )
        self.posterior = GaussianHead(width, latent)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Gaussian:
        if self.flat:
            x = x.flatten(1)
            return self.posterior(
                self.network(x if given is None else torch.cat([x, given], dim=-1))
            )
        x = x if given is None else torch.cat([x, per_frame(given, x)], dim=-1)
        return self.posterior(self.network(x)[:, -1])


class SegmentDecoder(nn.Module):
    """p(x | z) of a segment: a recurrent network fed z (batch, latent) at every frame → Gaussian head per frame,
    (batch, frames, bins). Architecture "fc": all frames at once."""

    def __init__(
        self, architecture: str, frames: int, bins: int, latent: int, width: int, layers: int
    ):
        super().__init__()
        self.frames, self.flat = frames, architecture == "fc"
        self.network = (
            mlp(latent, (width,) * layers)
            if self.flat
            else recurrent(architecture, latent, width, layers)
        )
        self.output = GaussianHead(width, frames * bins if self.flat else bins)

    def forward(self, z: Tensor) -> Gaussian:
        if self.flat:
            return Gaussian(
                *(p.unflatten(-1, (self.frames, -1)) for p in self.output(self.network(z)))
            )
        return self.output(self.network(z[:, None].expand(-1, self.frames, -1)))


def gaussian_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """log N(x; μ, diag e^λ) = −½ Σ ( log 2π + λ + (x − μ)²·e^{−λ} ), (batch, …) → (batch,), float32"""
    mean, log_variance = p.mean.float(), p.log_variance.float()
    squares = (x - mean).square() * torch.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squares).flatten(1).sum(-1)
