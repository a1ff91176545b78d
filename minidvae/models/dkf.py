"""DKF: deep Kalman filter (Krishnan et al. 2015, 2017; benchmark paper, section 5).

    g_t = LSTM(MLP(x_t), g_{t+1})                              from the last frame to the first
    q(z_t | z_{t−1}, x_{t:T}) = head(MLP(g̃_t)),  g̃_t = ½(MLP(z_{t−1}) + g_t)
    p(z_t | z_{t−1}):  from z = z_{t−1},  γ = σ(W₂ relu(W₁ z)),  u = V₂ relu(V₁ z):
                       mean (1−γ)⊙A z + γ⊙u,  variance softplus(B relu(u))
    p(x_t | z_t):  l_t = linear(MLP(z_t))

With `bidirectional` g reads both ways and g̃_t is the mean of three terms. `latent_scan` computes
the posterior frame by frame; the prior and the decoder are one pass over all frames.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.latent_scan import latent_scan
from .base import DVAE, DVAEOutput, Gaussian, GaussianHead, Generators, Noise, Score, mlp, past
from .recurrent import LSTM, RecurrentConfig, affine, framewise, stack_frames


@dataclass
class DKFConfig(RecurrentConfig):
    x_hidden: tuple[int, ...] = (256,)
    rnn: int = 128
    z_hidden: tuple[int, ...] = (32, 64)  # MLP on z_{t−1}; a last layer of width `rnn` follows
    posterior_hidden: tuple[int, ...] = (64, 32)
    decoder_hidden: tuple[int, ...] = (32, 64, 128, 256)
    bidirectional: bool = False


class GatedTransition(nn.Module):
    """p(z_t | z_{t−1}): a gate for each dimension between a linear and a nonlinear transition."""

    def __init__(self, latent: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(latent, latent), nn.ReLU(), nn.Linear(latent, latent), nn.Sigmoid()
        )
        self.proposal = nn.Sequential(
            nn.Linear(latent, latent), nn.ReLU(), nn.Linear(latent, latent)
        )
        self.mean = nn.Linear(latent, latent)
        self.variance = nn.Linear(latent, latent)  # before the softplus

    def forward(self, z: Tensor) -> Gaussian:
        gate = self.gate(z)
        proposal = self.proposal(z)
        mean = (1 - gate) * self.mean(z) + gate * proposal
        return Gaussian(mean, log_softplus(self.variance(torch.relu(proposal))))


def log_softplus(a: Tensor) -> Tensor:
    """Return log log(1 + eᵃ). Where eᵃ is small it equals a up to rounding."""
    return torch.where(a < -16, a, F.softplus(a.clamp_min(-16)).log())


class DKF(DVAE):
    def __init__(self, config: DKFConfig):
        super().__init__(config)
        activation = config.activation
        bins = config.bins
        latent = config.latent
        self.mlp_x = mlp(bins, config.x_hidden, activation)
        self.lstm_g = LSTM(
            self.mlp_x.outputs,
            config.rnn,
            config.layers,
            reverse=not config.bidirectional,
            bidirectional=config.bidirectional,
        )
        self.mlp_z = mlp(latent, (*config.z_hidden, config.rnn), activation)
        self.posterior_mlp = mlp(config.rnn, config.posterior_hidden, activation)
        self.posterior = GaussianHead(self.posterior_mlp.outputs, latent)
        self.prior = GatedTransition(latent)
        self.decoder = mlp(latent, config.decoder_hidden, activation)
        self.output = nn.Linear(self.decoder.outputs, bins)
        self.share = 1 / (3 if config.bidirectional else 2)  # weight of each term in g̃

    def infer_z(self, g: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
        """Return q(z_t | z_{t−1}, x_{t:T}) and its sample, from g (batch, frames, rnn), the sum
        over directions."""
        (weight, bias), *posterior = affine(self.posterior_mlp, self.posterior)
        weight = self.share * weight
        inputs = F.linear(g, weight, bias)
        state = [self.mlp_z(torch.zeros_like(noise[:, 0]))]
        transition = affine(self.mlp_z)
        activation = self.config.activation
        mean, log_variance, z, _ = latent_scan(
            inputs, noise, state, weight, posterior, transition, activation=activation
        )
        return Gaussian(mean, log_variance), z

    def forward(self, x: Tensor, noise: Noise | None = None) -> DVAEOutput:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        g = self.sum_directions(self.lstm_g(self.mlp_x(self.input_scale(x))))
        q_z, z = self.infer_z(g, noise.z)
        log_variance, p_z = self.score(None, z)
        return DVAEOutput(log_variance, z, q_z, p_z)

    def score(self, x_past: Tensor | None, z: Tensor, w: None = None) -> Score:
        return Score(self.output(self.decoder(z)), self.prior(past(z)))

    def sum_directions(self, g: Tensor) -> Tensor:
        return g.unflatten(-1, (-1, self.config.rnn)).sum(-2)

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise = self.draw_noise(n, frames, generator).z
        z = [torch.zeros_like(noise[:, 0])]
        for t in range(frames):
            z.append(self.prior(z[-1]).sample(noise[:, t]))
        return self.output(self.decoder(torch.stack(z[1:], dim=1)))

    def forward_reference(self, x: Tensor, noise: Noise) -> DVAEOutput:
        """Compute `forward` one frame at a time."""
        noise_z = noise.z
        features = framewise(self.mlp_x, self.input_scale(x))
        g = self.sum_directions(self.lstm_g.forward_reference(features))
        frames = []
        z = torch.zeros_like(noise_z[:, 0])
        for t in range(x.shape[1]):
            q_z = self.posterior(self.posterior_mlp(self.share * (self.mlp_z(z) + g[:, t])))
            p_z = self.prior(z)
            z = q_z.sample(noise_z[:, t])
            frames.append(DVAEOutput(self.output(self.decoder(z)), z, q_z, p_z))
        return stack_frames(frames)
