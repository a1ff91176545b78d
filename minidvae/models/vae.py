"""VAE of independent frames (Kingma & Welling 2014; the baseline of both DVAE papers).

q(z_t | x_t) = head(MLP(x_t)),    p(z_t) = N(0, I)
p(x_t | z_t):  l_t = linear(MLP(z_t))
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DVAE, DVAEConfig, DVAEOutput, GaussianHead, Noise, Score, mlp


@dataclass
class VAEConfig(DVAEConfig):
    # Widths of the encoder; the decoder has them reversed.
    hidden: tuple[int, ...] = (256, 128, 64, 32)


class VAE(DVAE):
    def __init__(self, config: VAEConfig):
        super().__init__(config)
        widths = tuple(config.hidden)
        self.encoder = mlp(config.bins, widths)
        self.posterior = GaussianHead(self.encoder.outputs, config.latent)
        self.decoder = mlp(config.latent, widths[::-1])
        self.output = torch.nn.Linear(self.decoder.outputs, config.bins)

    def forward(self, x: Tensor, noise: Noise | None = None) -> DVAEOutput:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        q_z = self.posterior(self.encoder(self.input_scale(x)))
        z = q_z.sample(noise.z)
        return DVAEOutput(self.score(None, z).log_variance, z, q_z)

    def score(self, x_past: Tensor | None, z: Tensor, w: None = None) -> Score:
        return Score(self.output(self.decoder(z)))
