"""FHVAE: the factorised hierarchical variational autoencoder (Hsu, Zhang & Glass, NIPS 2017), Seq2Seq-FHVAE.

A sequence i is cut into N segments x of 20 frames, each with two latents. z2 stays near the sequence's own μ2 and comes
to hold what does not change within it, the speaker and the channel; z1 holds the rest, what is said.

    p(μ2) = N(0, I)                                            one per sequence: the s-vector
    p(z2 | μ2) = N(μ2, 0.25 I),    p(z1) = N(0, I)
    p(x | z1, z2)                                              decoder, a Gaussian for every frame
    q(z2 | x),    q(z1 | x, z2)                                encoders

μ2 of a training sequence is a row of a table; for an unseen sequence it has a closed form (paper, appendix B).
The discriminative bound (eq. 3) adds α·log p(i | z2), a softmax over the table of log p(z2 | μ2).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.gaussian_kl import gaussian_kl
from .base import Gaussian, Standardise
from .segments import (
    SegmentBatch,
    SegmentDecoder,
    SegmentEncoder,
    gaussian_log_likelihood,
)

ARCHITECTURES = ("lstm", "gru", "rnn", "fc")


@dataclass
class FHVAEConfig:
    bins: int = 80
    frames: int = 20  # of a segment
    sequences: int = 0  # rows of the table of s-vectors; set when training begins
    z1_latent: int = 16
    z2_latent: int = 16
    architecture: str = "lstm"  # or gru, rnn, fc
    width: int = 256  # of every hidden layer
    layers: int = 1  # of the encoders and of the decoder
    alpha: float = 10.0  # weight of the discriminative term
    discriminate: str = "mean"  # what of q(z2 | x) that term sees: mean, or sample as in eq. 3
    z1_variance: float = 1.0
    z2_variance: float = 0.25
    mu2_variance: float = 1.0


class Latents(NamedTuple):
    q_z1: Gaussian
    z1: Tensor
    q_z2: Gaussian
    z2: Tensor


class FHVAE(nn.Module):
    def __init__(self, config: FHVAEConfig):
        super().__init__()
        for name, choices in (
            ("architecture", ARCHITECTURES),
            ("discriminate", ("mean", "sample")),
        ):
            if getattr(config, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} is none of {', '.join(choices)}"
                )
        self.config = config
        size, shape = (
            (config.architecture, config.frames, config.bins),
            (config.width, config.layers),
        )
        self.standardise = Standardise(config.bins)
        self.encoder_z2 = SegmentEncoder(*size, 0, *shape, config.z2_latent)
        self.encoder_z1 = SegmentEncoder(*size, config.z2_latent, *shape, config.z1_latent)
        self.decoder = SegmentDecoder(*size, config.z1_latent + config.z2_latent, *shape)
        self.make_table(config.sequences)

    def make_table(self, sequences: int) -> None:
        """Make a new table of s-vectors, drawn from their prior. Were they all alike at first, the
        discriminative term could not tell sequences apart, and learning would take far longer."""
        self.config.sequences = sequences
        draws = torch.randn(sequences, self.config.z2_latent) * self.config.mu2_variance**0.5
        self.table = nn.Parameter(draws.to(self.standardise.mean.device))

    def draw_noise(
        self, batch: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return standard-normal draws for z1 and z2, (batch, latent) each; a CPU generator gives
        the same on every device."""
        like = self.standardise.mean
        device = like.device if generator is None else generator.device

        def normal(latent: int) -> Tensor:
            draws = torch.empty(batch, latent, device=device, dtype=like.dtype)
            return draws.normal_(generator=generator).to(like.device)

        return normal(self.config.z1_latent), normal(self.config.z2_latent)

    def infer(self, x: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Latents:
        """Of segments (batch, frames, bins). Without noise the latents are the means."""
        x = self.standardise(x)
        q_z2 = self.encoder_z2(x)
        z2 = q_z2.mean if noise is None else q_z2.sample(noise[1])
        q_z1 = self.encoder_z1(x, z2)
        return Latents(q_z1, q_z1.mean if noise is None else q_z1.sample(noise[0]), q_z2, z2)

    def decode(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The mean of p(x | z1, z2) as features (batch, frames, bins)."""
        return self.standardise.inverse(self.decoder(torch.cat([z1, z2], dim=-1)).mean)

    def forward(
        self, x: Tensor, noise: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Gaussian, Latents]:
        """p(x | z1, z2) on the standardised scale, (batch, frames, bins), and the latents that were drawn."""
        latents = self.infer(x, self.draw_noise(len(x)) if noise is None else noise)
        return self.decoder(torch.cat([latents.z1, latents.z2], dim=-1)), latents

    def loss(
        self, batch: SegmentBatch, noise: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the discriminative segment bound (eq. 3), mean over the batch; and its terms, detached: reconstruction,
        −log p(x | z1, z2); kl_z1; kl_z2, to N(μ2, 0.25 I); prior, −(1/N) log p(μ2); discrimination, −log p(i | z2), for
        sequences of the table only: without it, the loss is minus the segment bound (eq. 1)."""
        config, (p_x, latents) = self.config, self(batch.x, noise)
        mu2 = batch.s_vector if batch.row is None else self.table[batch.row]
        terms = {
            "reconstruction": -gaussian_log_likelihood(self.standardise(batch.x), p_x),
            "kl_z1": gaussian_kl(
                *latents.q_z1, *prior(torch.zeros_like(latents.z1), config.z1_variance)
            ),
            "kl_z2": gaussian_kl(*latents.q_z2, *prior(mu2, config.z2_variance)),
            "prior": -gaussian_log_likelihood(
                mu2, prior(torch.zeros_like(mu2), config.mu2_variance)
            )
            / batch.count,
        }
        loss = sum(terms.values()).mean()
        if batch.row is not None and config.alpha > 0:
            z2 = latents.q_z2.mean if config.discriminate == "mean" else latents.z2
            terms["discrimination"] = F.cross_entropy(
                self.closeness(z2), batch.row, reduction="none"
            )
            loss = loss + config.alpha * terms["discrimination"].mean()
        return loss, {"loss": loss.detach()} | {
            name: term.detach().mean() for name, term in terms.items()
        }

    def closeness(self, z2: Tensor) -> Tensor:
        """log p(z2 | μ2) for every row of the table, (batch, sequences), up to a constant per segment: −‖z2 − μ2‖²/2σ²
        without ‖z2‖², one matrix product, and no tensor (batch, sequences, latent). From the centre of the table, where
        the numbers are smallest: on a GPU the product is one of TF32."""
        centre = self.table.detach().float().mean(0)
        z2, table = z2.float() - centre, self.table.float() - centre
        with torch.autocast(z2.device.type, enabled=False):
            return (z2 @ table.t() - 0.5 * table.square().sum(-1)) / self.config.z2_variance

    def s_vector(self, z2_means: Tensor) -> Tensor:
        """μ2 of an unseen sequence from the means of q(z2 | x) of its segments, (…, N, z2_latent) → (…, z2_latent)."""
        return self.s_vector_of(z2_means.sum(-2), z2_means.shape[-2])

    def s_vector_of(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Σ_n E[z2⁽ⁿ⁾] / (N + σ²_{z2}/σ²_{μ2}), the maximum of the bound (appendix B), from that sum and N."""
        return total / (count + self.config.z2_variance / self.config.mu2_variance)

    def mu1(self, z1_means: Tensor) -> Tensor:
        """The same of z1, Σ_n E[z1⁽ⁿ⁾] / (N + σ²_{z1}): it should not know the speaker (section 4.2)."""
        return z1_means.sum(-2) / (z1_means.shape[-2] + self.config.z1_variance)


def prior(mean: Tensor, variance: float) -> Gaussian:
    return Gaussian(mean, torch.full_like(mean, math.log(variance)))
