"""β-VAE of segments (Higgins et al. 2017), the baseline feature extractor of the FHVAE paper
(appendix G), with one latent z.

    p(z) = N(0, I),    q(z | x) from an LSTM over the segment,    p(x | z) from an LSTM fed z
    loss = −E log p(x | z) + β KL(q(z | x) ‖ p(z))
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.gaussian_kl import gaussian_kl
from .base import Gaussian, Standardise
from .segments import (
    SegmentBatch,
    SegmentDecoder,
    SegmentEncoder,
    gaussian_log_likelihood,
)


@dataclass
class BetaVAEConfig:
    bins: int = 80
    frames: int = 20  # frames of a segment
    latent: int = 64
    encoder_width: int = 512  # LSTM cells
    width: int = 256  # LSTM cells of the decoder
    beta: float = 1.0  # weight of KL(q(z) ‖ p(z)) in the loss


class BetaVAE(nn.Module):
    def __init__(self, config: BetaVAEConfig):
        super().__init__()
        self.config = config
        size = ("lstm", config.frames, config.bins)
        self.standardise = Standardise(config.bins)
        self.encoder = SegmentEncoder(*size, 0, config.encoder_width, 1, config.latent)
        self.decoder = SegmentDecoder(*size, config.latent, config.width, 1)

    def infer(self, x: Tensor) -> Gaussian:
        """Return q(z | x) of segments (batch, frames, bins), not standardised."""
        return self.encoder(self.standardise(x))

    def loss(
        self, batch: SegmentBatch, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return −log p(x | z) + β KL(q(z | x) ‖ p(z)) per segment, mean over the batch, and its
        terms, detached."""
        q_z = self.infer(batch.x)
        if noise is None:
            noise = torch.randn_like(q_z.mean)
        z = q_z.sample(noise)
        reconstruction = -gaussian_log_likelihood(self.standardise(batch.x), self.decoder(z)).mean()
        terms = {"reconstruction": reconstruction, "kl_z": gaussian_kl(*q_z).mean()}
        loss = terms["reconstruction"] + self.config.beta * terms["kl_z"]
        return loss, {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}
