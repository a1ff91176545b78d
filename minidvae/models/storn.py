"""STORN: stochastic recurrent network (Bayer & Osendorfer 2014; benchmark paper, section 7).

    g_t = LSTM(MLP(x_t), g_{t−1})
    q(z_t | x_{1:t}) = head(MLP(g_t)),    p(z_t) = N(0, I)
    h_t = LSTM([MLP(z_t), MLP(x_{t−1})], h_{t−1})
    p(x_t | x_{1:t−1}, z_{1:t}):  l_t = linear(MLP(h_t))

No layer needs a sample of z of the frame before: each is one pass over all frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import DVAEOutput, Gaussian, GaussianHead, Noise, Score, mlp, past
from .recurrent import (
    LSTM,
    AutoregressiveDVAE,
    DecodedFrame,
    RecurrentConfig,
    framewise,
    stack_frames,
)


@dataclass
class STORNConfig(RecurrentConfig):
    x_hidden: tuple[int, ...] = (256,)  # MLP on x_t before g
    g_rnn: int = 128
    posterior_hidden: tuple[int, ...] = (64, 32)
    z_hidden: tuple[int, ...] = (32, 64)  # MLP on z_t before h
    past_hidden: tuple[int, ...] = (256,)  # MLP on x_{t−1} before h
    h_rnn: int = 128
    decoder_hidden: tuple[int, ...] = (256,)


class STORN(AutoregressiveDVAE):
    def __init__(self, config: STORNConfig):
        super().__init__(config)
        activation = config.activation
        bins = config.bins
        latent = config.latent
        self.mlp_x = mlp(bins, config.x_hidden, activation)
        self.lstm_g = LSTM(self.mlp_x.outputs, config.g_rnn, config.layers)
        self.mlp_g = mlp(config.g_rnn, config.posterior_hidden, activation)
        self.posterior = GaussianHead(self.mlp_g.outputs, latent)
        self.mlp_z = mlp(latent, config.z_hidden, activation)
        self.mlp_past = mlp(bins, config.past_hidden, activation)
        self.lstm_h = LSTM(self.mlp_z.outputs + self.mlp_past.outputs, config.h_rnn, config.layers)
        self.mlp_h = mlp(config.h_rnn, config.decoder_hidden, activation)
        self.output = nn.Linear(self.mlp_h.outputs, bins)

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor, None]:
        q_z = self.posterior(self.mlp_g(self.lstm_g(self.mlp_x(inputs))))
        return q_z, q_z.sample(noise), None

    def hidden(self, x_past: Tensor, z: Tensor) -> Tensor:
        return self.lstm_h(torch.cat([self.mlp_z(z), self.mlp_past(x_past)], dim=-1))

    def score_of(self, h: Tensor, z: Tensor) -> Score:
        return Score(self.output(self.mlp_h(h)))

    def decode_frame(self, x_past, z_past, state, z, noise) -> DecodedFrame:
        if z is None:
            z = noise  # p(z_t) = N(0, I)
        features = torch.cat([self.mlp_z(z), self.mlp_past(x_past)], dim=-1)
        h, state = self.lstm_h.step(features, state)
        return DecodedFrame(self.output(self.mlp_h(h)), z, state)

    def forward_reference(self, x: Tensor, noise: Noise) -> DVAEOutput:
        """Compute `forward` with the true past, one frame at a time."""
        noise_z = noise.z
        inputs = self.input_scale(x)
        g = self.lstm_g.forward_reference(framewise(self.mlp_x, inputs))
        frames = []
        state = None
        for t, x_past in enumerate(past(inputs).unbind(1)):
            q_z = self.posterior(self.mlp_g(g[:, t]))
            z = q_z.sample(noise_z[:, t])
            features = torch.cat([self.mlp_z(z), self.mlp_past(x_past)], dim=-1)
            h, state = self.lstm_h.step(features, state)
            frames.append(DVAEOutput(self.output(self.mlp_h(h)), z, q_z))
        return stack_frames(frames)
