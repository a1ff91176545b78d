"""What every model shares: Gaussians, MLPs, scales of the input, and the contract of a DVAE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.gaussian_kl import gaussian_kl
from ..kernels.is_divergence import is_divergence

LOG_FLOOR = 1e-6  # Added to the power before the `log` input scale, for waveforms with max|s| = 1.
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}

# One random generator, or one for each sequence of the batch; None: the default generator.
Generators = torch.Generator | Sequence[torch.Generator] | None


class Gaussian(NamedTuple):
    """Diagonal Gaussian, each field (…, dimensions)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return μ + σ·ε, the reparameterisation trick, with ε ~ N(0, I) given."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class Noise(NamedTuple):
    """Every random draw of one forward pass of a DVAE. Given it, the pass is deterministic."""

    z: Tensor  # (batch, frames, latent), standard normal
    w: Tensor | None = None  # (batch, sequence latent), standard normal
    past: Tensor | None = None  # Uniform in [0, 1), for scheduled sampling: see `draw_past_noise`.


def bounded(log_variance: Tensor) -> Tensor:
    """Clamp to −30 … 20, where e^l is finite."""
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
    """Return linear layers of these widths with an activation after each; the identity for no
    widths. Its attribute `outputs` is the last width."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    network = nn.Sequential()
    for width in widths:
        network.extend([nn.Linear(inputs, width), ACTIVATIONS[activation]()])
        inputs = width
    network.outputs = inputs
    return network


def past(sequence: Tensor) -> Tensor:
    """Shift (batch, frames, …) by one frame: zeros, then frames 0 … T−2."""
    return torch.cat([torch.zeros_like(sequence[:, :1]), sequence[:, :-1]], dim=1)


def per_frame(w: Tensor, frames: Tensor) -> Tensor:
    """Repeat w (batch, n) along the frames of (batch, frames, …)."""
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
    """The scale on which a network sees the power spectrum.

    `power`: as it is, as in the papers. `log`: log(x + 1e-6), and `root`: x^¼, both standardised
    with the statistics of the training set (`fit`).
    """

    SCALES = ("power", "log", "root")

    def __init__(self, bins: int, scale: str):
        super().__init__(bins)
        if scale not in self.SCALES:
            raise ValueError(f"input_scale={scale!r} is none of {', '.join(self.SCALES)}")
        self.scale = scale

    def compress(self, power: Tensor) -> Tensor:
        if self.scale == "log":
            return torch.log(power + LOG_FLOOR)
        return power.sqrt().sqrt()

    def fit(self, power: Tensor) -> None:
        if self.scale != "power":
            compressed = self.compress(power).flatten(0, -2)
            self.set(compressed.mean(0), compressed.std(0))

    def forward(self, power: Tensor) -> Tensor:
        if self.scale == "power":
            return power
        return super().forward(self.compress(power))

    def of_log(self, log_power: Tensor) -> Tensor:
        """Return `self(e^l)` for log-powers l (…, bins). `root` needs no roots here, which matters
        because decoding calls this in every frame."""
        if self.scale == "root":
            return super().forward(torch.exp(log_power / 4))
        return self(torch.exp(log_power))


class Score(NamedTuple):
    """The generative model, given the past and the latents."""

    log_variance: Tensor  # l, (batch, frames, bins): p(s_t | ·) = N_c(0, diag e^l)
    p_z: Gaussian | None = None  # (batch, frames, latent); None: N(0, I), as p(w) is in every model


class DVAEOutput(NamedTuple):
    """Result of a forward pass: the posteriors, their samples, and the `Score` of these."""

    log_variance: Tensor  # (batch, frames, bins)
    z: Tensor  # (batch, frames, latent)
    q_z: Gaussian
    p_z: Gaussian | None = None
    w: Tensor | None = None  # sequence latent: w of HiT and LigHT, v of DSAE, (batch, w_latent)
    q_w: Gaussian | None = None


@dataclass
class DVAEConfig:
    """Settings that every DVAE has."""

    bins: int = 513
    latent: int = 16
    beta_z: float = 1.0  # weight of KL(q(z) ‖ p(z)) in the loss
    input_scale: str = "power"


class DVAE(nn.Module):
    """A dynamical VAE on power spectra x (batch, frames, bins).

    Subclasses define `score`, and `forward(x, noise=None)` → DVAEOutput with the true past.
    Autoregressive ones also take `scheduled_sampling_prob` in `forward`, and define
    `draw_past_noise` and `resynthesise_from_own_past(x, noise)`. Models with a sequence latent
    define `infer_w(scaled spectrum)` and `decode(z, w)`.
    """

    autoregressive = False  # x_{t−1} feeds the decoder, so the two modes of resynthesis differ
    sequence_latent = "w"  # the name of the sequence latent in the paper
    kl_w_per_frame = True  # divide KL(q(w)) by the number of frames, as in the bound of a sequence
    output: nn.Linear  # the last layer, to log-variance

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.input_scale = InputScale(config.bins, config.input_scale)
        # Gaussian from which `sample` draws w: mean and covariance, (1 + w_latent, w_latent), with
        # the mean in the first row. None: N(0, I).
        self.register_buffer("w_moments", None)

    @torch.no_grad()
    def fit_statistics(self, power: Tensor) -> None:
        """Fit the input scale to a sample of the training set (…, frames, bins), and start the
        output at its log mean power per bin, the best constant: the first loss is then orders of
        magnitude smaller."""
        self.input_scale.fit(power)
        self.output.bias.copy_(power.flatten(0, -2).mean(0).clamp_min(1e-12).log())

    @torch.no_grad()
    def fit_w(self, power: Tensor) -> None:
        """Let `sample` draw w from the Gaussian with the moments of q(w | x) over these sequences
        (n ≥ 2, frames, bins) in place of N(0, I): ex-post density estimation (Ghosh et al.,
        ICLR 2020). With a small β_w, N(0, I) hardly ever draws where the posteriors lie.
        In `eval()`."""
        posteriors = [self(part).q_w for part in power.split(32)]
        mean = torch.cat([q_w.mean for q_w in posteriors])
        variance = torch.cat([q_w.log_variance for q_w in posteriors]).exp()
        covariance = mean.T.cov() + variance.mean(0).diag()
        self.w_moments = torch.cat([mean.mean(0)[None], covariance])

    def draw_w(self, noise: Tensor) -> Tensor:
        """Return the w (batch, w_latent) of samples from standard-normal draws of this shape.
        Raises torch.linalg.LinAlgError where moments are not finite."""
        if self.w_moments is None:
            return noise
        return self.w_moments[0] + noise @ torch.linalg.cholesky(self.w_moments[1:]).T

    def whiten_w(self, w: Tensor) -> Tensor:
        """Return the standard-normal draws that `draw_w` would map to w (batch, w_latent)."""
        if self.w_moments is None:
            return w
        root = torch.linalg.cholesky(self.w_moments[1:])
        return torch.linalg.solve_triangular(root.T, w - self.w_moments[0], upper=True, left=False)

    def draw_noise(
        self,
        batch: int,
        frames: int,
        generator: Generators = None,
        scheduled_sampling: bool = False,
    ) -> Noise:
        """Draw the random numbers of one forward pass, those of scheduled sampling if asked for.

        They are drawn on the generator's device: a CPU generator gives the same on every device.
        A sequence with a generator of its own has the same draws in every batch. Raises ValueError
        for a number of generators that is not the number of sequences.
        """
        generators = generator if isinstance(generator, Sequence) else [generator]
        sequences = 1 if isinstance(generator, Sequence) else batch  # drawn by each generator
        if len(generators) * sequences != batch:
            raise ValueError(
                f"{len(generators)} generators for {batch} sequences; expected one for each, or one"
            )
        parameter = next(self.parameters())

        def empty(generator: torch.Generator | None, *shape: int) -> Tensor:
            device = parameter.device if generator is None else generator.device
            return torch.empty(sequences, *shape, device=device, dtype=parameter.dtype)

        def normal(*shape: int) -> Tensor:
            draws = [empty(g, *shape).normal_(generator=g) for g in generators]
            return torch.cat(draws).to(parameter.device)

        noise_z = normal(frames, self.config.latent)
        noise_w = normal(self.config.w_latent) if hasattr(self.config, "w_latent") else None
        noise_past = None
        if scheduled_sampling and self.autoregressive:
            draws = [self.draw_past_noise(sequences, frames, g) for g in generators]
            noise_past = torch.cat(draws).to(parameter.device)
        return Noise(noise_z, noise_w, noise_past)

    def score(self, x_past: Tensor | None, z: Tensor, w: Tensor | None = None) -> Score:
        """Return log-variance of p(x | past of x, z, w) and the prior of z, differentiable in all
        three.

        Args:
            x_past: (batch, frames, bins), the past on the model's scale,
                `past(model.input_scale(x))`. Only autoregressive models look at it.
            z: (batch, frames, latent).
            w: (batch, w_latent), of models that have one.
        """
        raise NotImplementedError

    def loss(
        self, batch: Tensor, noise: Noise | None = None, scheduled_sampling_prob: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return −ELBO per frame with weights β on its divergences, mean over the batch, and its
        terms.

        Args:
            batch: power spectra (batch, frames, bins).
            noise: every random draw of the pass; drawn here if None.
            scheduled_sampling_prob: how much of an autoregressive decoder's past is not the true
                one (0 to 1); other models ignore it.

        Returns:
            The loss, and its terms, detached: loss; reconstruction, Σ_f d_IS per frame; kl_z per
            frame; kl_w per sequence.
        """
        if self.autoregressive:
            output = self(batch, noise, scheduled_sampling_prob)
        else:
            output = self(batch, noise)
        return self.negative_elbo(batch, output)

    def negative_elbo(self, x: Tensor, output: DVAEOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and terms, as `loss` does, from the output of a forward pass."""
        reconstruction = is_divergence(x, output.log_variance).mean()
        p_z = output.p_z or ()
        kl_z = gaussian_kl(*output.q_z, *p_z).mean()
        terms = {"reconstruction": reconstruction, "kl_z": kl_z}
        loss = reconstruction + self.config.beta_z * kl_z
        if output.q_w is not None:
            terms["kl_w"] = gaussian_kl(*output.q_w).mean()
            frames = x.shape[1] if self.kl_w_per_frame else 1
            loss = loss + self.config.beta_w * terms["kl_w"] / frames
        detached = {name: term.detach() for name, term in terms.items()}
        return loss, {"loss": loss.detach()} | detached

    @torch.no_grad()
    def resynthesise(
        self,
        x: Tensor,
        mode: str = "generation",
        noise: Noise | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the log-variance of the reconstruction of power spectra, same shape.

        Args:
            x: (batch, frames, bins). z (and w) come from the posterior given this.
            mode: what an autoregressive decoder's past is: its own output e^{l_{t−1}}
                ("generation"), or the true x_{t−1} ("teacher_forcing").
            noise: every random draw of the pass; drawn here if None.
            lengths: numbers of frames of padded sequences, for models that take them.
        """
        if mode not in ("generation", "teacher_forcing"):
            raise ValueError(f'mode={mode!r} is neither "generation" nor "teacher_forcing"')
        padding = {} if lengths is None else {"lengths": lengths}
        if mode == "generation" and self.autoregressive:
            return self.resynthesise_from_own_past(x, noise, **padding)
        return self(x, noise, **padding).log_variance

    def resynthesise_each(
        self, spectra: Sequence[Tensor], mode: str, noises: Sequence[Noise]
    ) -> Iterator[Tensor]:
        """Yield `resynthesise` of utterances (frames, bins) of different length, each with its
        own noise of a batch of one."""
        for x, noise in zip(spectra, noises, strict=True):
            yield self.resynthesise(x[None], mode, noise)[0]

    def feed_back(self, log_variance: Tensor) -> Tensor:
        """Return the model's own output on the scale of its input."""
        return self.input_scale.of_log(bounded(log_variance))

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        """Return the log-variance (n, frames, bins) of n sequences drawn from the prior, w as in
        `draw_w`. This one is for models without w, without own past and with p(z) = N(0, I)."""
        return self.score(None, self.draw_noise(n, frames, generator).z).log_variance
