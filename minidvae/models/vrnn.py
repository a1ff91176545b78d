"""VRNN: variational recurrent neural network (Chung et al. 2015; benchmark paper, section 8).

    φx_t = MLP(x_t),   φz_t = MLP(z_t)
    q(z_t | x_{1:t}, z_{1:t−1})   = head(MLP([φx_t, h_t]))
    p(z_t | x_{1:t−1}, z_{1:t−1}) = head(MLP(h_t))
    p(x_t | x_{1:t−1}, z_{1:t}):  l_t = linear(MLP([φz_t, h_t]))
    h_{t+1} = LSTM([φx_t, φz_t], h_t),  h_1 = 0

All three distributions use h_t, which does not depend on x_t and z_t. `latent_scan` computes the
posterior and the LSTM frame by frame; the prior and the decoder are one pass over all frames.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.latent_scan import latent_scan
from ..kernels.lstm_scan import LSTMWeights
from .base import DVAEOutput, Gaussian, GaussianHead, Noise, Score, mlp
from .recurrent import (
    LSTM,
    AutoregressiveDVAE,
    DecodedFrame,
    RecurrentConfig,
    affine,
    stack_frames,
)


@dataclass
class VRNNConfig(RecurrentConfig):
    x_hidden: tuple[int, ...] = (256,)
    z_hidden: tuple[int, ...] = (32, 64)
    rnn: int = 128
    posterior_hidden: tuple[int, ...] = (64, 32)
    prior_hidden: tuple[int, ...] = (64, 32)
    decoder_hidden: tuple[int, ...] = (256,)


class VRNN(AutoregressiveDVAE):
    def __init__(self, config: VRNNConfig):
        super().__init__(config)
        activation = config.activation
        self.mlp_x = mlp(config.bins, config.x_hidden, activation)
        self.mlp_z = mlp(config.latent, config.z_hidden, activation)
        x_width = self.mlp_x.outputs
        z_width = self.mlp_z.outputs
        self.lstm = LSTM(x_width + z_width, config.rnn, config.layers)
        self.posterior_mlp = mlp(x_width + config.rnn, config.posterior_hidden, activation)
        self.posterior = GaussianHead(self.posterior_mlp.outputs, config.latent)
        self.prior_mlp = mlp(config.rnn, config.prior_hidden, activation)
        self.prior = GaussianHead(self.prior_mlp.outputs, config.latent)
        self.decoder = mlp(z_width + config.rnn, config.decoder_hidden, activation)
        self.output = nn.Linear(self.decoder.outputs, config.bins)

    def infer_z(self, x_features: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor, Tensor]:
        """Return q(z_t | x_{1:t}, z_{1:t−1}), its sample and h, from φx (batch, frames, width)."""
        width = x_features.shape[-1]
        (weight, bias), *posterior = affine(self.posterior_mlp, self.posterior)
        inputs = F.linear(x_features, weight[:, :width], bias)
        h_weight = weight[:, width:]
        (w_ih, w_hh, lstm_bias), *further_layers = self.lstm.weights()
        gates = F.linear(x_features, w_ih[:, :width], lstm_bias)
        lstm = [LSTMWeights(w_ih[:, width:], w_hh, None), *further_layers]
        zeros = noise.new_zeros(len(noise), self.config.rnn)
        state = [(zeros, zeros)] * self.config.layers
        transition = affine(self.mlp_z)
        activation = self.config.activation
        mean, log_variance, z, h = latent_scan(
            inputs, noise, state, h_weight, posterior, transition, lstm, gates, activation
        )
        return Gaussian(mean, log_variance), z, h

    def infer_prior(self, h: Tensor) -> Gaussian:
        """Return p(z_t | x_{1:t−1}, z_{1:t−1})."""
        return self.prior(self.prior_mlp(h))

    def likelihood(self, h: Tensor, z: Tensor) -> Tensor:
        """Return the log-variance of p(x_t | x_{1:t−1}, z_{1:t})."""
        return self.output(self.decoder(torch.cat([self.mlp_z(z), h], dim=-1)))

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor, Tensor]:
        return self.infer_z(self.mlp_x(inputs), noise)

    def hidden(self, x_past: Tensor, z: Tensor) -> Tensor:
        """Return h (batch, frames, rnn): zeros at the first frame, then the state of the LSTM after
        x_{1:t−1} and z_{1:t−1}."""
        features = torch.cat([self.mlp_x(x_past[:, 1:]), self.mlp_z(z[:, :-1])], dim=-1)
        return F.pad(self.lstm(features), (0, 0, 1, 0))

    def score_of(self, h: Tensor, z: Tensor) -> Score:
        return Score(self.likelihood(h, z), self.infer_prior(h))

    def decode_frame(self, x_past, z_past, state, z, noise) -> DecodedFrame:
        if state is None:
            h = x_past.new_zeros(len(x_past), self.config.rnn)
            zeros = torch.zeros_like(h)
            state = [(zeros, zeros)] * self.config.layers
        else:
            features = torch.cat([self.mlp_x(x_past), self.mlp_z(z_past)], dim=-1)
            h, state = self.lstm.step(features, state)
        if z is None:
            z = self.infer_prior(h).sample(noise)
        return DecodedFrame(self.likelihood(h, z), z, state)

    def forward_reference(self, x: Tensor, noise: Noise) -> DVAEOutput:
        """Compute `forward` with the true past, one frame at a time."""
        noise_z = noise.z
        frames = []
        state = None
        h = noise_z.new_zeros(len(noise_z), self.config.rnn)
        for t, inputs in enumerate(self.input_scale(x).unbind(1)):
            x_features = self.mlp_x(inputs)
            q_z = self.posterior(self.posterior_mlp(torch.cat([x_features, h], dim=-1)))
            z = q_z.sample(noise_z[:, t])
            frames.append(DVAEOutput(self.likelihood(h, z), z, q_z, self.infer_prior(h)))
            h, state = self.lstm.step(torch.cat([x_features, self.mlp_z(z)], dim=-1), state)
        return stack_frames(frames)
