"""DSAE: disentangled sequential autoencoder (Li & Mandt 2018; benchmark paper, section 11).

    φ_t = MLP(x_t)
    q(v | x_{1:T}) = head(MLP(final states of a bidirectional LSTM on φ))
    q(z_t | v, x_{1:T}) = head(RNN(MLP(bidirectional LSTM on MLP([φ_t, v]))))
    p(v) = N(0, I),    p(z_t | z_{1:t−1}) = head(LSTM(z_{t−1}))
    p(x_t | z_t, v):  l_t = linear(MLP([v, z_t]))

There is one v per sequence. The RNN is a plain one (tanh), forward in time. v takes the place of
the sequence latent w in outputs, terms and settings. No layer needs a sample of z of the frame
before: each is one pass over all frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import (
    DVAE,
    DVAEOutput,
    Gaussian,
    GaussianHead,
    Generators,
    Noise,
    Score,
    mlp,
    past,
    per_frame,
)
from .recurrent import LSTM, RecurrentConfig, framewise, stack_frames


@dataclass
class DSAEConfig(RecurrentConfig):
    beta_w: float = 1.0  # weight of KL(q(v) ‖ p(v)) in the loss
    w_latent: int = 16  # dimensions of v
    x_hidden: tuple[int, ...] = (256,)
    v_rnn: int = 128  # per direction
    v_hidden: tuple[int, ...] = (64, 32)
    xv_hidden: tuple[int, ...] = (256,)  # MLP on [φ_t, v]
    xv_rnn: int = 128  # per direction
    z_hidden: tuple[int, ...] = (64,)  # MLP before the plain RNN
    z_rnn: int = 32
    prior_rnn: int = 32
    decoder_hidden: tuple[int, ...] = (32, 64, 128, 256)


class DSAE(DVAE):
    sequence_latent = "v"
    kl_w_per_frame = False  # As published, KL(q(v)) has T times its weight in the bound.

    def __init__(self, config: DSAEConfig):
        super().__init__(config)
        activation = config.activation
        bins = config.bins
        latent = config.latent
        layers = config.layers
        self.mlp_x = mlp(bins, config.x_hidden, activation)
        self.lstm_v = LSTM(self.mlp_x.outputs, config.v_rnn, layers, bidirectional=True)
        self.mlp_v = mlp(2 * config.v_rnn, config.v_hidden, activation)
        self.posterior_v = GaussianHead(self.mlp_v.outputs, config.w_latent)
        self.mlp_xv = mlp(self.mlp_x.outputs + config.w_latent, config.xv_hidden, activation)
        self.lstm_xv = LSTM(self.mlp_xv.outputs, config.xv_rnn, layers, bidirectional=True)
        self.mlp_z = mlp(2 * config.xv_rnn, config.z_hidden, activation)
        self.rnn_z = nn.RNN(self.mlp_z.outputs, config.z_rnn, layers, batch_first=True)
        self.posterior = GaussianHead(config.z_rnn, latent)
        self.lstm_prior = LSTM(latent, config.prior_rnn, layers)
        self.prior = GaussianHead(config.prior_rnn, latent)
        self.decoder = mlp(config.w_latent + latent, config.decoder_hidden, activation)
        self.output = nn.Linear(self.decoder.outputs, bins)

    def infer_w(self, inputs: Tensor) -> Gaussian:
        """Return q(v | x_{1:T}) from the scaled spectrum."""
        return self.infer_v(self.lstm_v(self.mlp_x(inputs)))

    def infer_v(self, states: Tensor) -> Gaussian:
        """Return q(v | x_{1:T}) from the outputs of its LSTM: forward at the last frame, backward
        at the first."""
        width = self.config.v_rnn
        final_states = torch.cat([states[:, -1, :width], states[:, 0, width:]], dim=-1)
        return self.posterior_v(self.mlp_v(final_states))

    def score(self, x_past: Tensor | None, z: Tensor, w: Tensor | None = None) -> Score:
        log_variance = self.output(self.decoder(torch.cat([per_frame(w, z), z], dim=-1)))
        return Score(log_variance, self.prior(self.lstm_prior(past(z))))

    def forward(self, x: Tensor, noise: Noise | None = None) -> DVAEOutput:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        features = self.mlp_x(self.input_scale(x))
        q_v = self.infer_v(self.lstm_v(features))
        v = q_v.sample(noise.w)
        g = self.lstm_xv(self.mlp_xv(torch.cat([features, per_frame(v, features)], dim=-1)))
        q_z = self.posterior(self.rnn_z(self.mlp_z(g))[0])
        z = q_z.sample(noise.z)
        log_variance, p_z = self.score(None, z, v)
        return DVAEOutput(log_variance, z, q_z, p_z, v, q_v)

    @torch.no_grad()
    def decode(self, z: Tensor, w: Tensor) -> Tensor:
        return self.score(None, z, w).log_variance

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise = self.draw_noise(n, frames, generator)
        v = self.draw_w(noise.w)
        z = [torch.zeros_like(noise.z[:, 0])]
        state = None
        for t in range(frames):
            h, state = self.lstm_prior.step(z[-1], state)
            z.append(self.prior(h).sample(noise.z[:, t]))
        return self.decode(torch.stack(z[1:], dim=1), v)

    def forward_reference(self, x: Tensor, noise: Noise) -> DVAEOutput:
        """Compute `forward` one frame at a time."""
        noise_z = noise.z
        features = framewise(self.mlp_x, self.input_scale(x))
        q_v = self.infer_v(self.lstm_v.forward_reference(features))
        v = q_v.sample(noise.w)
        g = framewise(lambda frame: self.mlp_xv(torch.cat([frame, v], dim=-1)), features)
        g = self.lstm_xv.forward_reference(g)
        frames = []
        z = torch.zeros_like(noise_z[:, 0])
        state = None
        prior_state = None
        for t in range(x.shape[1]):
            h, state = self.rnn_z(self.mlp_z(g[:, t : t + 1]), state)
            prior_h, prior_state = self.lstm_prior.step(z, prior_state)
            q_z = self.posterior(h[:, 0])
            p_z = self.prior(prior_h)
            z = q_z.sample(noise_z[:, t])
            log_variance = self.output(self.decoder(torch.cat([v, z], dim=-1)))
            frames.append(DVAEOutput(log_variance, z, q_z, p_z))
        return stack_frames(frames)._replace(w=v, q_w=q_v)
