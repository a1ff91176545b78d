"""What the models share: Gaussian heads, MLPs, the input scale, and the DVAE contract.

A model file, this file and `kernels/` are all that a model needs: copy them into any project.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import gaussian_kl, is_divergence

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of an output that is fed back as the past: e^l stays finite
ROOT_EXPONENT = 0.25  # of the `root` input scale, on power
LOG_FLOOR = 1e-6  # of the `log` input scale, on power, for waveforms with max|s| = 1


class Gaussian(NamedTuple):
    """Diagonal Gaussian, each field (…, dimensions)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """μ + σ·ε, the reparameterisation trick, with ε ~ N(0, I) given."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def flatten(self) -> "Gaussian":
        return Gaussian(self.mean.flatten(1), self.log_variance.flatten(1))


class GaussianHead(nn.Module):
    """Two linear layers: mean and log-variance."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.log_variance = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor) -> Gaussian:
        return Gaussian(self.mean(h), self.log_variance(h))


def mlp(inputs: int, widths: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of the given widths, an activation after each. No widths: the identity."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers)


def past(sequence: Tensor) -> Tensor:
    """(batch, frames, …) → the same one frame later: zeros, then frames 0 … T−2."""
    return torch.cat([torch.zeros_like(sequence[:, :1]), sequence[:, :-1]], dim=1)


class InputScale(nn.Module):
    """The scale on which a network sees the power spectrum.

    power: as it is (what the papers do). log: log(x + 1e-6). root: x^¼. The last two are then standardised
    to zero mean and unit variance per bin with the statistics of the training set (`fit`).
    """

    SCALES = ("power", "log", "root")

    def __init__(self, bins: int, scale: str):
        super().__init__()
        if scale not in self.SCALES:
            raise ValueError(f"input_scale={scale!r} is none of {', '.join(self.SCALES)}")
        self.scale = scale
        self.register_buffer("mean", torch.zeros(bins))
        self.register_buffer("deviation", torch.ones(bins))

    def compress(self, power: Tensor) -> Tensor:
        if self.scale == "power":
            return power
        return torch.log(power + LOG_FLOOR) if self.scale == "log" else power.clamp_min(0) ** ROOT_EXPONENT

    def fit(self, power: Tensor) -> None:
        if self.scale != "power":
            compressed = self.compress(power).flatten(0, -2)
            self.mean.copy_(compressed.mean(0))
            self.deviation.copy_(compressed.std(0).clamp_min(1e-3))

    def forward(self, power: Tensor) -> Tensor:
        return (self.compress(power) - self.mean) / self.deviation


@dataclass
class DVAEOutput:
    """What a forward pass knows. p_z is None where the prior of z is N(0, I)."""

    log_variance: Tensor  # l, (batch, frames, bins): p(s_t | ·) = N_c(0, diag e^l)
    z: Tensor  # (batch, frames, latent)
    q_z: Gaussian
    p_z: Gaussian | None = None
    w: Tensor | None = None  # the sequence latent (w of HiT and LigHT, v of DSAE), (batch, sequence latent)
    q_w: Gaussian | None = None  # its posterior; its prior is N(0, I)


@dataclass
class DVAEConfig:
    """Settings that every DVAE has."""

    bins: int = 513
    latent: int = 16
    beta_z: float = 1.0  # weight of KL(q(z) ‖ p(z)) in the loss
    input_scale: str = "power"


class DVAE(nn.Module):
    """A dynamical VAE on power spectra x (batch, frames, bins). Subclasses define `forward` and `sample`."""

    autoregressive = False  # whether x_{t−1} feeds the decoder, so that the two modes of resynthesis differ
    output: nn.Linear  # the last layer, to log-variance

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.input_scale = InputScale(config.bins, config.input_scale)
        self.own_past = 0.0  # while training: the probability that a past frame is the model's own output

    def fit_statistics(self, power: Tensor) -> None:
        """Take the input scale from a sample of the training set (…, frames, bins), and start the output at
        its log mean power per bin, the best constant: a first loss orders of magnitude smaller."""
        with torch.no_grad():
            self.input_scale.fit(power)
            self.output.bias.copy_(power.flatten(0, -2).mean(0).clamp_min(1e-12).log())

    def draw_noise(self, batch: int, frames: int, generator: torch.Generator | None = None):
        """The standard-normal draws of one forward pass: (batch, frames, latent) for z; a pair of that and
        (batch, sequence latent) where there is a sequence latent. Drawn on the generator's device, so that
        a CPU generator gives the same draws on every device."""
        return self._normal((batch, frames, self.config.latent), generator)

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        parameter = next(self.parameters())
        source = generator.device if generator is not None else parameter.device
        return torch.randn(shape, generator=generator, device=source, dtype=parameter.dtype).to(parameter.device)

    def forward(self, x: Tensor, noise=None) -> DVAEOutput:
        """One pass over the power spectrum with the true past (teacher forcing)."""
        raise NotImplementedError

    def loss(self, batch: Tensor, noise=None) -> tuple[Tensor, dict[str, Tensor]]:
        """−ELBO per frame, mean over the batch; and its terms, detached.

        reconstruction: Σ_f d_IS per frame; kl_z: per frame; kl_w: per sequence (it enters the loss divided
        by the number of frames, as the bound over a sequence is).
        """
        output = self(batch, noise)
        terms = {"reconstruction": is_divergence(batch, output.log_variance).mean()}
        terms["kl_z"] = gaussian_kl(*output.q_z, *(output.p_z or ())).mean()
        loss = terms["reconstruction"] + self.config.beta_z * terms["kl_z"]
        if output.q_w is not None:
            terms["kl_w"] = gaussian_kl(*output.q_w).mean()
            loss = loss + self.config.beta_w * terms["kl_w"] / batch.shape[1]
        return loss, {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def resynthesise(self, x: Tensor, mode: str = "generation", noise=None) -> Tensor:
        """Power spectrum (batch, frames, bins) → log-variance of its reconstruction, same shape.

        z (and w) come from the posterior given the true x. In mode "generation" the decoder's past is its
        own output e^{l_{t−1}}, in mode "teacher_forcing" the true x_{t−1}.
        """
        if mode not in ("generation", "teacher_forcing"):
            raise ValueError(f'mode={mode!r} is neither "generation" nor "teacher_forcing"')
        if mode == "generation" and self.autoregressive:
            return self.resynthesise_from_own_past(x, noise)
        return self(x, noise).log_variance

    def resynthesise_from_own_past(self, x: Tensor, noise=None) -> Tensor:
        raise NotImplementedError

    def sample(self, n: int, frames: int, generator: torch.Generator | None = None) -> Tensor:
        """n sequences drawn from the prior → log-variance (n, frames, bins)."""
        raise NotImplementedError
