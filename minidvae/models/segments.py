"""What the models of segments share, FHVAE and β-VAE: their batches and their networks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Gaussian, GaussianHead, mlp, per_frame
from .recurrent import recurrent


class SegmentBatch(NamedTuple):
    """Segments of one or several sequences. FHVAE needs either `row` or `s_vector`."""

    x: Tensor  # (batch, frames, bins), not standardised
    count: Tensor  # (batch,), N, the number of segments of its sequence
    row: Tensor | None = None  # (batch,), row of its sequence in the table of s-vectors
    s_vector: Tensor | None = None  # (batch, z2_latent), μ2 of a sequence that is not in the table


class SegmentEncoder(nn.Module):
    """q(z | x, condition) of a segment x (batch, frames, bins).

    A recurrent network over the frames, whose last output goes to a Gaussian head. The condition, a
    second latent that z depends on (batch, condition_width), is given to every frame. With the
    architecture "fc" the segment is one vector.
    """

    def __init__(
        self,
        architecture: str,
        frames: int,
        bins: int,
        condition_width: int,
        width: int,
        layers: int,
        latent: int,
    ):
        super().__init__()
        self.flat = architecture == "fc"
        inputs = condition_width + (frames * bins if self.flat else bins)
        self.network = make_network(architecture, inputs, width, layers)
        self.posterior = GaussianHead(width, latent)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Gaussian:
        if self.flat:
            x = x.flatten(1)
        if condition is not None:
            condition = condition if self.flat else per_frame(condition, x)
            x = torch.cat([x, condition], dim=-1)
        h = self.network(x)
        return self.posterior(h if self.flat else h[:, -1])


class SegmentDecoder(nn.Module):
    """p(x | z) of a segment: a recurrent network fed z (batch, latent) at every frame, and a
    Gaussian head, (batch, frames, bins). With the architecture "fc", all frames at once."""

    def __init__(
        self, architecture: str, frames: int, bins: int, latent: int, width: int, layers: int
    ):
        super().__init__()
        self.frames = frames
        self.flat = architecture == "fc"
        self.network = make_network(architecture, latent, width, layers)
        self.output = GaussianHead(width, frames * bins if self.flat else bins)

    def forward(self, z: Tensor) -> Gaussian:
        if self.flat:
            mean, log_variance = self.output(self.network(z))
            shape = (self.frames, -1)
            return Gaussian(mean.unflatten(-1, shape), log_variance.unflatten(-1, shape))
        return self.output(self.network(z[:, None].expand(-1, self.frames, -1)))


def make_network(architecture: str, inputs: int, width: int, layers: int) -> nn.Module:
    """Return an MLP ("fc") or a recurrent network of this width."""
    if architecture == "fc":
        return mlp(inputs, (width,) * layers)
    return recurrent(architecture, inputs, width, layers)


def gaussian_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """Return log N(x; μ, diag e^λ) = −½ Σ ( log 2π + λ + (x − μ)²·e^{−λ} ), (batch, …) → (batch,),
    float32."""
    mean = p.mean.float()
    log_variance = p.log_variance.float()
    squares = (x - mean).square() * torch.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squares).flatten(1).sum(-1)
