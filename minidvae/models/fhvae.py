"""FHVAE: the factorised hierarchical variational autoencoder (Hsu, Zhang & Glass, NIPS 2017),
Seq2Seq-FHVAE.

A sequence i consists of N segments x of 20 frames, each with two latents. z2 is near the μ2 of its
sequence and represents what does not change within it, the speaker and the channel; z1 represents
the rest, the content.

    p(μ2) = N(0, I)                                            one per sequence: the s-vector
    p(z2 | μ2) = N(μ2, 0.25 I),    p(z1) = N(0, I)
    p(x | z1, z2)                                              decoder, a Gaussian for every frame
    q(z2 | x),    q(z1 | x, z2)                                encoders

μ2 of a training sequence is a row of a table; for an unseen sequence it has a closed form (paper,
appendix B). The discriminative bound (eq. 3) adds α·log p(i | z2), a softmax over the table of log
p(z2 | μ2).
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
    frames: int = 20  # frames of a segment
    sequences: int = 0  # rows of the table of s-vectors; set by the training
    z1_latent: int = 16
    z2_latent: int = 16
    architecture: str = "lstm"  # or gru, rnn, fc
    width: int = 256  # width of every hidden layer
    layers: int = 1  # layers of each encoder and of the decoder
    alpha: float = 10.0  # weight of the discriminative term
    discriminate: str = "mean"  # z2 in that term: the mean of q(z2 | x), or a sample as in eq. 3
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
        choices = {"architecture": ARCHITECTURES, "discriminate": ("mean", "sample")}
        for name, names in choices.items():
            value = getattr(config, name)
            if value not in names:
                raise ValueError(f"{name}={value!r} is none of {', '.join(names)}")
        self.config = config
        self.standardise = Standardise(config.bins)
        segment = (config.architecture, config.frames, config.bins)
        network = (config.width, config.layers)
        self.encoder_z2 = SegmentEncoder(*segment, 0, *network, config.z2_latent)
        self.encoder_z1 = SegmentEncoder(*segment, config.z2_latent, *network, config.z1_latent)
        self.decoder = SegmentDecoder(*segment, config.z1_latent + config.z2_latent, *network)
        self.make_table(config.sequences)

    def make_table(self, sequences: int) -> None:
        """Make a new table of s-vectors, drawn from their prior. With equal rows the discriminative
        term could not tell sequences apart at first, and learning would take far longer."""
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
        """Return the latents of segments (batch, frames, bins). Without noise they are the
        means."""
        x = self.standardise(x)
        q_z2 = self.encoder_z2(x)
        z2 = q_z2.mean if noise is None else q_z2.sample(noise[1])
        q_z1 = self.encoder_z1(x, z2)
        z1 = q_z1.mean if noise is None else q_z1.sample(noise[0])
        return Latents(q_z1, z1, q_z2, z2)

    def decode(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the mean of p(x | z1, z2) as features (batch, frames, bins), not standardised."""
        p_x = self.decoder(torch.cat([z1, z2], dim=-1))
        return self.standardise.inverse(p_x.mean)

    def forward(
        self, x: Tensor, noise: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Gaussian, Latents]:
        """Return p(x | z1, z2) on the standardised scale, (batch, frames, bins), and the
        latents."""
        if noise is None:
            noise = self.draw_noise(len(x))
        latents = self.infer(x, noise)
        return self.decoder(torch.cat([latents.z1, latents.z2], dim=-1)), latents

    def loss(
        self, batch: SegmentBatch, noise: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return minus the discriminative segment bound (eq. 3), mean over the batch, and its
        terms, detached.

        The terms are reconstruction, −log p(x | z1, z2); kl_z1; kl_z2, to N(μ2, 0.25 I); prior,
        −(1/N) log p(μ2); and discrimination, −log p(i | z2), for sequences of the table only.
        Without it the loss is minus the segment bound (eq. 1).
        """
        config = self.config
        p_x, latents = self(batch.x, noise)
        mu2 = batch.s_vector if batch.row is None else self.table[batch.row]
        p_z1 = prior(torch.zeros_like(latents.z1), config.z1_variance)
        p_z2 = prior(mu2, config.z2_variance)
        p_mu2 = prior(torch.zeros_like(mu2), config.mu2_variance)
        terms = {
            "reconstruction": -gaussian_log_likelihood(self.standardise(batch.x), p_x),
            "kl_z1": gaussian_kl(*latents.q_z1, *p_z1),
            "kl_z2": gaussian_kl(*latents.q_z2, *p_z2),
            "prior": -gaussian_log_likelihood(mu2, p_mu2) / batch.count,
        }
        loss = sum(terms.values()).mean()
        if batch.row is not None and config.alpha > 0:
            z2 = latents.q_z2.mean if config.discriminate == "mean" else latents.z2
            logits = self.closeness(z2)
            terms["discrimination"] = F.cross_entropy(logits, batch.row, reduction="none")
            loss = loss + config.alpha * terms["discrimination"].mean()
        means = {name: term.detach().mean() for name, term in terms.items()}
        return loss, {"loss": loss.detach()} | means

    def closeness(self, z2: Tensor) -> Tensor:
        """Return log p(z2 | μ2) for every row of the table, (batch, sequences), up to a constant
        per segment.

        It is −‖z2 − μ2‖²/2σ² without ‖z2‖², which takes one matrix product and no tensor (batch,
        sequences, latent). The centre of the table is subtracted, so that the numbers are small: on
        a GPU the product is in TF32.
        """
        centre = self.table.detach().float().mean(0)
        z2 = z2.float() - centre
        table = self.table.float() - centre
        with torch.autocast(z2.device.type, enabled=False):
            return (z2 @ table.t() - 0.5 * table.square().sum(-1)) / self.config.z2_variance

    def s_vector(self, z2_means: Tensor) -> Tensor:
        """Return μ2 of an unseen sequence from the means of q(z2 | x) of its segments, (…, N,
        z2_latent) → (…, z2_latent)."""
        return self.s_vector_of(z2_means.sum(-2), z2_means.shape[-2])

    def s_vector_of(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Return Σ_n E[z2⁽ⁿ⁾] / (N + σ²_{z2}/σ²_{μ2}), the maximum of the bound (appendix B), from
        the sum and N."""
        return total / (count + self.config.z2_variance / self.config.mu2_variance)

    def mu1(self, z1_means: Tensor) -> Tensor:
        """Return Σ_n E[z1⁽ⁿ⁾] / (N + σ²_{z1}), the same of z1. It should not identify the speaker
        (section 4.2)."""
        return z1_means.sum(-2) / (z1_means.shape[-2] + self.config.z1_variance)


def prior(mean: Tensor, variance: float) -> Gaussian:
    """Return N(mean, variance·I)."""
    return Gaussian(mean, torch.full_like(mean, math.log(variance)))
