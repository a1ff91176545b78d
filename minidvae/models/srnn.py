"""SRNN: stochastic recurrent neural network (Fraccaro et al. 2016; benchmark paper, section 9).

    h_t = LSTM(MLP(x_{t−1}), h_{t−1})
    g_t = LSTM(MLP([h_t, x_t]), g_{t+1})                       from the last frame to the first
    q(z_t | z_{t−1}, x_{1:T})     = head(MLP([g_t, z_{t−1}]))
    p(z_t | z_{t−1}, x_{1:t−1})   = head(MLP([h_t, z_{t−1}]))
    p(x_t | z_t, x_{1:t−1}):  l_t = linear(MLP([h_t, z_t]))

Only the posterior needs a sample of z_{t−1}: `latent_scan` computes it frame by frame. All else is
one pass over all frames.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.latent_scan import latent_scan
from .base import DVAEOutput, Gaussian, GaussianHead, Noise, Score, mlp, past
from .recurrent import (
    LSTM,
    AutoregressiveDVAE,
    DecodedFrame,
    RecurrentConfig,
    affine,
    framewise,
    stack_frames,
)


@dataclass
class SRNNConfig(RecurrentConfig):
    x_hidden: tuple[int, ...] = (256,)  # MLP on x_{t−1} before h
    h_rnn: int = 128
    hx_hidden: tuple[int, ...] = (256,)  # MLP on [h_t, x_t] before g
    g_rnn: int = 128
    posterior_hidden: tuple[int, ...] = (64, 32)
    prior_hidden: tuple[int, ...] = (64, 32)
    decoder_hidden: tuple[int, ...] = (256,)


class SRNN(AutoregressiveDVAE):
    def __init__(self, config: SRNNConfig):
        super().__init__(config)
        activation = config.activation
        bins = config.bins
        latent = config.latent
        self.mlp_x = mlp(bins, config.x_hidden, activation)
        self.lstm_h = LSTM(self.mlp_x.outputs, config.h_rnn, config.layers)
        self.mlp_hx = mlp(config.h_rnn + bins, config.hx_hidden, activation)
        self.lstm_g = LSTM(self.mlp_hx.outputs, config.g_rnn, config.layers, reverse=True)
        gz_width = config.g_rnn + latent
        hz_width = config.h_rnn + latent
        self.posterior_mlp = mlp(gz_width, config.posterior_hidden, activation)
        self.posterior = GaussianHead(self.posterior_mlp.outputs, latent)
        self.prior_mlp = mlp(hz_width, config.prior_hidden, activation)
        self.prior = GaussianHead(self.prior_mlp.outputs, latent)
        self.decoder = mlp(hz_width, config.decoder_hidden, activation)
        self.output = nn.Linear(self.decoder.outputs, bins)

    def infer_z(self, g: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
        """Return q(z_t | z_{t−1}, x_{1:T}) and its sample, from g (batch, frames, g_rnn)."""
        (weight, bias), *posterior = affine(self.posterior_mlp, self.posterior)
        g_weight, z_weight = weight.split([g.shape[-1], self.config.latent], dim=1)
        inputs = F.linear(g, g_weight, bias)
        state = [torch.zeros_like(noise[:, 0])]
        mean, log_variance, z, _ = latent_scan(
            inputs, noise, state, z_weight, posterior, activation=self.config.activation
        )
        return Gaussian(mean, log_variance), z

    def infer_prior(self, h: Tensor, z_past: Tensor) -> Gaussian:
        """Return p(z_t | z_{t−1}, x_{1:t−1})."""
        return self.prior(self.prior_mlp(torch.cat([h, z_past], dim=-1)))

    def likelihood(self, h: Tensor, z: Tensor) -> Tensor:
        """Return the log-variance of p(x_t | z_t, x_{1:t−1})."""
        return self.output(self.decoder(torch.cat([h, z], dim=-1)))

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor, Tensor]:
        h = self.hidden(past(inputs))
        g = self.lstm_g(self.mlp_hx(torch.cat([h, inputs], dim=-1)))
        q_z, z = self.infer_z(g, noise)
        return q_z, z, h

    def hidden(self, x_past: Tensor, z: Tensor | None = None) -> Tensor:
        return self.lstm_h(self.mlp_x(x_past))

    def score_of(self, h: Tensor, z: Tensor) -> Score:
        return Score(self.likelihood(h, z), self.infer_prior(h, past(z)))

    def decode_frame(self, x_past, z_past, state, z, noise) -> DecodedFrame:
        h, state = self.lstm_h.step(self.mlp_x(x_past), state)
        if z is None:
            z = self.infer_prior(h, z_past).sample(noise)
        return DecodedFrame(self.likelihood(h, z), z, state)

    def forward_reference(self, x: Tensor, noise: Noise) -> DVAEOutput:
        """Compute `forward` with the true past, one frame at a time."""
        noise_z = noise.z
        inputs = self.input_scale(x)
        h = self.lstm_h.forward_reference(framewise(self.mlp_x, past(inputs)))
        g = self.lstm_g.forward_reference(framewise(self.mlp_hx, torch.cat([h, inputs], dim=-1)))
        frames = []
        z = torch.zeros_like(noise_z[:, 0])
        for t in range(x.shape[1]):
            q_z = self.posterior(self.posterior_mlp(torch.cat([g[:, t], z], dim=-1)))
            p_z = self.infer_prior(h[:, t], z)
            z = q_z.sample(noise_z[:, t])
            frames.append(DVAEOutput(self.likelihood(h[:, t], z), z, q_z, p_z))
        return stack_frames(frames)
