"""RVAE: recurrent VAE (Leglaive et al. 2020; benchmark paper, section 10).

    gx_t = LSTM(MLP(x_t), gx_{t+1})                            from the last frame to the first
    gz_t = LSTM(MLP(z_{t−1}), gz_{t−1})
    q(z_t | z_{1:t−1}, x_{t:T}) = head(MLP([gx_t, gz_t]))      p(z_t) = N(0, I)
    h_t = LSTM(MLP(z_t), h_{t−1})
    p(x_t | z_{1:t}):       l_t = linear(MLP(h_t))

Non-causal (`bidirectional`): gx reads both ways (with the outputs of the causal direction last),
and so does h. The RVAE of its own paper has no MLPs: all lists of widths are empty.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.latent_scan import latent_scan
from .base import DVAE, DVAEOutput, Gaussian, GaussianHead, Noise, Score, mlp
from .recurrent import LSTM, RecurrentConfig, affine, framewise, stack_frames


@dataclass
class RVAEConfig(RecurrentConfig):
    x_hidden: tuple[int, ...] = (256,)  # MLP on x_t before gx
    gx_rnn: int = 128
    z_hidden: tuple[int, ...] = (32, 64)  # MLP on z_{t−1} before gz
    gz_rnn: int = 128
    posterior_hidden: tuple[int, ...] = (64, 32)
    decoder_z_hidden: tuple[int, ...] = (32, 64)  # MLP on z_t before h
    h_rnn: int = 128
    decoder_hidden: tuple[int, ...] = (256,)
    bidirectional: bool = False  # non-causal


class RVAE(DVAE):
    def __init__(self, config: RVAEConfig):
        super().__init__(config)
        activation = config.activation
        bins = config.bins
        latent = config.latent
        bidirectional = config.bidirectional
        self.mlp_x = mlp(bins, config.x_hidden, activation)
        self.lstm_gx = LSTM(
            self.mlp_x.outputs,
            config.gx_rnn,
            config.layers,
            reverse=True,
            bidirectional=bidirectional,
        )
        self.mlp_gz = mlp(latent, config.z_hidden, activation)
        self.lstm_gz = LSTM(self.mlp_gz.outputs, config.gz_rnn, config.layers)
        g_width = self.lstm_gx.outputs + config.gz_rnn
        self.posterior_mlp = mlp(g_width, config.posterior_hidden, activation)
        self.posterior = GaussianHead(self.posterior_mlp.outputs, latent)
        self.mlp_h = mlp(latent, config.decoder_z_hidden, activation)
        self.lstm_h = LSTM(
            self.mlp_h.outputs, config.h_rnn, config.layers, bidirectional=bidirectional
        )
        self.decoder = mlp(self.lstm_h.outputs, config.decoder_hidden, activation)
        self.output = nn.Linear(self.decoder.outputs, bins)

    def infer_z(self, gx: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
        """Return q(z_t | z_{1:t−1}, x_{t:T}) and its sample, from gx (batch, frames, width)."""
        (weight, bias), *posterior = affine(self.posterior_mlp, self.posterior)
        width = gx.shape[-1]
        inputs = F.linear(gx, weight[:, :width], bias)
        gz_weight = weight[:, width:]
        transition = affine(self.mlp_gz)
        lstm = self.lstm_gz.weights()
        _, state = self.lstm_gz.step(self.mlp_gz(torch.zeros_like(noise[:, 0])))
        activation = self.config.activation
        mean, log_variance, z, _ = latent_scan(
            inputs, noise, state, gz_weight, posterior, transition, lstm, activation=activation
        )
        return Gaussian(mean, log_variance), z

    def score(self, x_past: Tensor | None, z: Tensor, w: None = None) -> Score:
        return Score(self.output(self.decoder(self.lstm_h(self.mlp_h(z)))))

    def forward(self, x: Tensor, noise: Noise | None = None) -> DVAEOutput:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        q_z, z = self.infer_z(self.lstm_gx(self.mlp_x(self.input_scale(x))), noise.z)
        return DVAEOutput(self.score(None, z).log_variance, z, q_z)

    def forward_reference(self, x: Tensor, noise: Noise) -> DVAEOutput:
        """Compute `forward` one frame at a time."""
        noise_z = noise.z
        gx = self.lstm_gx.forward_reference(framewise(self.mlp_x, self.input_scale(x)))
        posteriors = []
        samples = []
        z = torch.zeros_like(noise_z[:, 0])
        state = None
        for t in range(x.shape[1]):
            gz, state = self.lstm_gz.step(self.mlp_gz(z), state)
            q_z = self.posterior(self.posterior_mlp(torch.cat([gx[:, t], gz], dim=-1)))
            z = q_z.sample(noise_z[:, t])
            posteriors.append(q_z)
            samples.append(z)
        h = self.lstm_h.forward_reference(framewise(self.mlp_h, torch.stack(samples, dim=1)))
        frames = []
        for t, z in enumerate(samples):
            log_variance = self.output(self.decoder(h[:, t]))
            frames.append(DVAEOutput(log_variance, z, posteriors[t]))
        return stack_frames(frames)
