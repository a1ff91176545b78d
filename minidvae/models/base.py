"""What every model shares: Gaussians, MLPs, scales of the input, and the contract of a DVAE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.gaussian_kl import gaussian_kl
from ..kernels.is_divergence import is_divergence
from ..training import distributed

W_RATE = 0.01  # at which the moments of w follow those of a batch
LOG_FLOOR = 1e-6  # of the `log` input scale, on power, for waveforms with max|s| = 1
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}

Generators = (
    torch.Generator | Sequence[torch.Generator] | None
)  # of random numbers: one, or one for each sequence


class Gaussian(NamedTuple):
    """Diagonal Gaussian, each field (…, dimensions)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """μ + σ·ε, the reparameterisation trick, with ε ~ N(0, I) given."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


def bounded(log_variance: Tensor) -> Tensor:
    """Within −30 … 20, where e^l is finite."""
    return log_variance.clamp(-30.0, 20.0)


class GaussianHead(nn.Module):
    """Two linear layers: mean and log-variance."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.log_variance = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor) -> Gaussian:
        return Gaussian(self.mean(h), self.log_variance(h))


def mlp(inputs: int, widths: Sequence[int], activation: str = "tanh") -> nn.Sequential:
    """Linear layers of these widths, an activation after each; without any, the identity. `outputs`: the last width."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    network = nn.Sequential()
    for width in widths:
        network.extend([nn.Linear(inputs, width), ACTIVATIONS[activation]()])
        inputs = width
    network.outputs = inputs
    return network


def past(sequence: Tensor) -> Tensor:
    """(batch, frames, …) → the same one frame later: zeros, then frames 0 … T−2."""
    return torch.cat([torch.zeros_like(sequence[:, :1]), sequence[:, :-1]], dim=1)


def per_frame(w: Tensor, frames: Tensor) -> Tensor:
    """w (batch, n) repeated along the frames of (batch, frames, …)"""
    return w[:, None].expand(-1, frames.shape[1], -1)


class Standardise(nn.Module):
    """Zero mean and unit variance per bin, with the statistics of the training set."""

    def __init__(self, bins: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(bins))
        self.register_buffer("deviation", torch.ones(bins))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.deviation + self.mean


class InputScale(Standardise):
    """The scale on which a network sees the power spectrum: `power`, as it is (what the papers do), or standardised
    with the statistics of the training set (`fit`) after `log`, log(x + 1e-6), or `root`, x^¼."""

    SCALES = ("power", "log", "root")

    def __init__(self, bins: int, scale: str):
        super().__init__(bins)
        if scale not in self.SCALES:
            raise ValueError(f"input_scale={scale!r} is none of {', '.join(self.SCALES)}")
        self.scale = scale

    def compress(self, power: Tensor) -> Tensor:
        return torch.log(power + LOG_FLOOR) if self.scale == "log" else power.sqrt().sqrt()

    def fit(self, power: Tensor) -> None:
        if self.scale != "power":
            compressed = self.compress(power).flatten(0, -2)
            self.set(compressed.mean(0), compressed.std(0))

    def forward(self, power: Tensor) -> Tensor:
        return power if self.scale == "power" else super().forward(self.compress(power))

    def of_log(self, log_power: Tensor) -> Tensor:
        """`self(e^l)` of log-powers l (…, bins); of `root` without taking roots, for decoding calls it every frame."""
        if self.scale == "root":
            return super().forward(torch.exp(log_power / 4))
        return self(torch.exp(log_power))


class Score(NamedTuple):
    """The generative model, given past and latents. p_z is None where that is N(0, I), as p(w) is in every model."""

    log_variance: Tensor  # l, (batch, frames, bins): p(s_t | ·) = N_c(0, diag e^l)
    p_z: Gaussian | None = None  # (batch, frames, latent)


class DVAEOutput(NamedTuple):
    """What a forward pass knows: the posteriors, their samples, and the `Score` of these."""

    log_variance: Tensor  # (batch, frames, bins)
    z: Tensor  # (batch, frames, latent)
    q_z: Gaussian
    p_z: Gaussian | None = None
    w: Tensor | None = (
        None  # the sequence latent (w of HiT and LigHT, v of DSAE), (batch, sequence latent)
    )
    q_w: Gaussian | None = None


class Model(nn.Module):
    """What the training loop asks of a model, beside `loss(batch)`. `batches` is the source of its training batches:
    `Spectra`, `FeatureSegments` or `Utterances` of minidvae/training."""

    def fit(self, batches, fresh: bool) -> None:
        """Take the statistics of the training set, before a run's first step; not `fresh`: it keeps those it has."""
        raise NotImplementedError

    def parameter_groups(self, batches) -> list[dict]:
        """The parameters as a torch optimiser takes them. `rate`: of the learning rate, relative to the recipe's."""
        return [{"params": list(self.parameters())}]

    def before_step(self, batches, optimiser: torch.optim.Optimizer, step: int) -> None:
        """What has to happen before a training step."""


@dataclass
class DVAEConfig:
    """Settings that every DVAE has."""

    bins: int = 513
    latent: int = 16
    beta_z: float = 1.0  # weight of KL(q(z) ‖ p(z)) in the loss
    input_scale: str = "power"


class DVAE(Model):
    """A dynamical VAE on power spectra x (batch, frames, bins). Subclasses define `score` and `forward(x, noise=None)`
    → DVAEOutput, whose past is the true one, or in a share `own_past` another one; autoregressive ones
    `resynthesise_from_own_past(x, noise)`; those with a sequence latent `decode(z, w)`, log-variance from own past."""

    autoregressive = (
        False  # whether x_{t−1} feeds the decoder, so that the two modes of resynthesis differ
    )
    sequence_latent = "w"  # its name in the paper, where there is one
    kl_w_per_frame = True  # whether kl_w enters the loss divided by the number of frames, as in the bound of a sequence
    output: nn.Linear  # the last layer, to log-variance

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.input_scale = InputScale(config.bins, config.input_scale)
        self.own_past = (
            0.0  # scheduled sampling: the share of the past that is not the true one in training
        )
        self.register_buffer(
            "w_moments", None
        )  # what w is drawn from: mean, covariance (1 + d, d); None: N(0, I)

    def fit(self, batches, fresh: bool) -> None:
        if fresh:
            self.fit_statistics(batches.sample().to(self.output.weight.device))

    def before_step(self, batches, optimiser, step: int) -> None:
        self.own_past = batches.recipe.own_past_at(step)

    @torch.no_grad()
    def fit_statistics(self, power: Tensor) -> None:
        """Take the input scale from a sample of the training set (…, frames, bins), and start the output at
        its log mean power per bin, the best constant: a first loss orders of magnitude smaller."""
        self.input_scale.fit(power)
        self.output.bias.copy_(power.flatten(0, -2).mean(0).clamp_min(1e-12).log())

    @torch.no_grad()
    def fit_w(self, power: Tensor) -> None:
        """Let `sample` draw w from the Gaussian with the moments of q(w | x) over these sequences (n ≥ 2, frames, bins)
        in place of N(0, I): ex-post density estimation (Ghosh et al., ICLR 2020), since with a small β_w N(0, I) hardly
        ever draws where the posteriors lie. In `eval()`."""
        mean, log_variance = map(
            torch.cat, zip(*(self(part).q_w for part in power.split(32)), strict=True)
        )
        covariance = mean.T.cov() + log_variance.exp().mean(0).diag()
        self.w_moments = torch.cat([mean.mean(0)[None], covariance])

    @torch.no_grad()
    def follow_w(self, q_w: Gaussian) -> None:
        """The same in the course of training: the moments follow those of q(w) of every batch."""
        mean, variance = (
            distributed.whole(part.float()) for part in (q_w.mean, q_w.log_variance.exp())
        )
        centre = self.w_moments[0].lerp(mean.mean(0), W_RATE)
        squares = ((mean - centre)[:, :, None] * (mean - centre)[:, None]).mean(0) + variance.mean(
            0
        ).diag()
        self.w_moments.copy_(torch.cat([centre[None], self.w_moments[1:].lerp(squares, W_RATE)]))

    def draw_w(self, noise: Tensor) -> Tensor:
        """w (batch, sequence latent) of a sample, from standard-normal draws of this shape. torch.linalg.LinAlgError
        where moments are not finite."""
        if self.w_moments is None:
            return noise
        return self.w_moments[0] + noise @ torch.linalg.cholesky(self.w_moments[1:]).T

    def whiten_w(self, w: Tensor) -> Tensor:
        """The draws that `draw_w` makes a w (batch, sequence latent) of."""
        if self.w_moments is None:
            return w
        root = torch.linalg.cholesky(self.w_moments[1:])
        return torch.linalg.solve_triangular(root.T, w - self.w_moments[0], upper=True, left=False)

    def draw_noise(self, batch: int, frames: int, generator: Generators = None):
        """The standard-normal draws of one forward pass: (batch, frames, latent) for z, in a pair with (batch, sequence
        latent) where there is one. Drawn on the generator's device: a CPU generator gives the same on every device. A
        sequence with a generator of its own has the same draws in every batch; ValueError for another number."""
        sources, count = (generator, 1) if isinstance(generator, Sequence) else ([generator], batch)
        if len(sources) * count != batch:
            raise ValueError(
                f"{len(sources)} generators for {batch} sequences; expected one for each, or one"
            )
        like = next(self.parameters())

        def normal(*shape: int) -> Tensor:
            if generator is None:  # in training, of which this may be one process of several
                return distributed.normal(like, batch, *shape)
            noise = [
                torch.empty(count, *shape, device=g.device, dtype=like.dtype).normal_(generator=g)
                for g in sources
            ]
            return torch.cat(noise).to(like.device)

        noise_z = normal(frames, self.config.latent)
        return (
            (noise_z, normal(self.config.w_latent)) if hasattr(self.config, "w_latent") else noise_z
        )

    def score(self, x_past: Tensor | None, z: Tensor, w: Tensor | None = None) -> Score:
        """log-variance of p(x | past of x, z, w) and the prior of z, differentiable in all three. x_past: (batch,
        frames, bins), the past on the model's scale, `past(model.input_scale(x))`; only autoregressive models look at
        it. z: (batch, frames, latent). w: (batch, sequence latent) of models that have one."""
        raise NotImplementedError

    def loss(self, batch: Tensor, noise=None) -> tuple[Tensor, dict[str, Tensor]]:
        """−ELBO per frame with weights β on its divergences, mean over the batch; and its terms, detached:
        reconstruction, Σ_f d_IS per frame; kl_z per frame; kl_w per sequence."""
        output = self(batch, noise)
        terms = {"reconstruction": is_divergence(batch, output.log_variance).mean()}
        terms["kl_z"] = gaussian_kl(*output.q_z, *(output.p_z or ())).mean()
        loss = terms["reconstruction"] + self.config.beta_z * terms["kl_z"]
        if output.q_w is not None:
            if self.training and self.w_moments is not None:
                self.follow_w(output.q_w)
            terms["kl_w"] = gaussian_kl(*output.q_w).mean()
            loss = loss + self.config.beta_w * terms["kl_w"] / (
                batch.shape[1] if self.kl_w_per_frame else 1
            )
        return loss, {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def resynthesise(
        self, x: Tensor, mode: str = "generation", noise=None, lengths: Tensor | None = None
    ) -> Tensor:
        """Power spectrum (batch, frames, bins) → log-variance of its reconstruction, same shape. z (and w): from the
        posterior given the true x. The decoder's past is its own output e^{l_{t−1}} in mode "generation", the true
        x_{t−1} in mode "teacher_forcing". lengths: of padded sequences, for models that take them."""
        if mode not in ("generation", "teacher_forcing"):
            raise ValueError(f'mode={mode!r} is neither "generation" nor "teacher_forcing"')
        arguments = (x, noise) if lengths is None else (x, noise, lengths)
        training, self.own_past = self.own_past, 0.0
        try:
            if mode == "generation" and self.autoregressive:
                return self.resynthesise_from_own_past(*arguments)
            return self(*arguments).log_variance
        finally:
            self.own_past = training

    def resynthesise_each(
        self, spectra: Sequence[Tensor], mode: str, noises: Sequence
    ) -> Iterator[Tensor]:
        """`resynthesise` for utterances (frames, bins) of different length, with the noise of each."""
        for x, noise in zip(spectra, noises, strict=True):
            yield self.resynthesise(x[None], mode, noise)[0]

    def feed_back(self, log_variance: Tensor) -> Tensor:
        """The model's own output on the scale of its input."""
        return self.input_scale.of_log(bounded(log_variance))

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        """n sequences drawn from the prior, w as `draw_w` says → log-variance (n, frames, bins). This one is
        for models without w and without own past whose prior of z is N(0, I)."""
        return self.score(None, self.draw_noise(n, frames, generator)).log_variance
