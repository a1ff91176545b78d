"""Speech enhancement with a DVAE as the prior of clean speech; the noise is learned from the recording itself.

    x = s + n,   s_tf ~ N_c(0, g_tf·v_tf(z)),   n_tf ~ N_c(0, (HW)_tf),   so   x_tf ~ N_c(0, V_tf),  V = g·v(z) + HW

v = e^l is the decoder's variance, H (frames × K) and W (K × bins) are non-negative (Leglaive et al., ICASSP 2020; Bie
et al., IEEE/ACM TASLP 2022). The gain g_tf > 0 is a_t, theirs, times c_f, the response of a microphone that the model
has not heard, which is constant in bands. Latents and noise are improved in turn on

    −log p(x, z) = Σ_tf (|x_tf|²/V_tf + log V_tf) − log p(z)                 or its bound with q(z)

by one of four E-steps, and what comes out is the Wiener estimate ŝ = mean_r(g·v_r/V_r)·x over samples z_r:

    vem       the inference network, started from the trained one, is trained on this recording
    peem      z itself is: the most probable one (Sadeghi & Serizel, ICASSP 2022)
    ldem      the same with noise in every step and several chains: latents around it (Sadeghi & Serizel 2024), as
              their authors run it, with Adam's steps, which does not draw exactly from the posterior
    langevin  the definition of ldem, z ← z + (η/2)·∇log p(x, z) + √η·ξ: draws from the posterior as η → 0

An autoregressive decoder is given the present estimate of the clean past.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import audio
from ..data.audio import STFT
from ..files import CheckpointError
from ..kernels.gaussian_kl import gaussian_kl
from ..models.base import DVAE, Gaussian, bounded, past
from ..training.checkpoint import load_run
from ..training.config import SettingError

BLOCK, OVERLAP = (
    10 * audio.SAMPLE_RATE,
    audio.SAMPLE_RATE,
)  # samples enhanced at once, and shared by two blocks
DEFAULT = "light_dvae-librispeech"  # the model
QUIET = 0.2  # of the frames, in each bin, are taken for noise at first
BANDS, KNEE = 20, 300  # of a microphone's response: even over log(1 + f/KNEE), Hz
FLOOR = 1e-10  # of the noise; a recording has a peak of 1


@dataclass(frozen=True)
class Settings:
    method: str = "ldem"
    iterations: int = 30
    rank: int = 8  # K, of the noise
    hold: int = 4  # frames for which its levels stay: what changes faster is speech
    chains: int = 2  # how many z there are side by side
    rate: float = (
        0.2  # of Adam's steps, or η; latents move in units of their spread over the recording
    )
    noise: float = 0.1  # ldem: deviation of what is added to each step, in the same unit
    encoder: float = (
        0.25  # share of the encoder's own estimate in the gains, the rest is what the E-step found
    )

    @classmethod
    def of(cls, method: str, iterations: int | None = None) -> "Settings":
        """The settings of a method. SettingError for less than one iteration."""
        if iterations is not None and iterations < 1:
            raise SettingError(f"--iterations {iterations}: expected at least 1")
        own = {
            "vem": dict(rate=1e-3, chains=1),
            "peem": dict(chains=1),
            "langevin": dict(rate=0.001),
        }.get(method, {})
        return cls(method, **own | ({} if iterations is None else {"iterations": iterations}))


class Observation:
    """What was recorded, and the noise and the gains in it that are known so far."""

    def __init__(
        self,
        power: Tensor,
        rank: int,
        hold: int,
        generator: torch.Generator,
        spectra: Tensor | None = None,
    ):
        """power: |x|² (frames, bins). spectra: W (rank, bins) to go on from."""

        def positive(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).add(0.1).to(power)

        self.power, self.hold, self.gain = power, hold, torch.ones_like(power)
        place = torch.linspace(0, audio.SAMPLE_RATE / 2 / KNEE, power.shape[1]).log1p()
        self.bands = F.one_hot((BANDS * place / place[-1]).long().clamp_max(BANDS - 1)).to(
            power
        )  # (bins, BANDS)
        audible = power.mean(1) > 10 * audio.POWER_FLOOR
        self.audible = audible if audible.any() else ~audible
        floor = power[self.audible].quantile(QUIET, dim=0) / -math.log1p(
            -QUIET
        )  # its mean, if steady
        self.spectra = positive(rank, power.shape[1]) * floor if spectra is None else spectra
        self.spectra = self.spectra / self.spectra.sum(1, keepdim=True)
        loud = self.held(power.sum(1, keepdim=True)) / hold
        share = positive(len(loud), rank) / 0.6 / rank
        self.levels = share * torch.minimum(loud, floor.sum())  # H, a row for `hold` frames

    @property
    def noise(self) -> Tensor:
        return (self.each_frame() @ self.spectra).clamp_min(FLOOR)

    def each_frame(self) -> Tensor:
        """H (frames, rank)"""
        return self.levels.repeat_interleave(self.hold, 0)[: len(self.power)]

    def held(self, frames: Tensor) -> Tensor:
        """The sum over the frames that share a row of H."""
        padded = F.pad(frames, (0, 0, 0, -len(frames) % self.hold))
        return padded.unflatten(0, (-1, self.hold)).sum(1)

    def variance(self, speech: Tensor) -> Tensor:
        """V of decoded variances (chains, frames, bins), same shape."""
        return self.gain * speech + self.noise

    def cost(self, speech: Tensor) -> Tensor:
        """Σ |x|²/V + log V, (chains,)"""
        variance = self.variance(speech)
        return (self.power / variance + variance.log()).sum(dim=(1, 2))

    def wiener(self, speech: Tensor) -> Tensor:
        """The mean over chains of g·v/V, (frames, bins)."""
        return (self.gain * speech / self.variance(speech)).mean(0)

    def first_estimate(self) -> Tensor:
        """|ŝ|² before the model is asked: Wiener gains of what exceeds the noise, at least 0.1."""
        return (1 - self.noise / self.power).clamp_min(0.1).square() * self.power

    def update(self, speech: Tensor) -> None:
        """The M-step: W, H, a and c in turn, each by multiplication; none of them raises the cost, c that of the frames
        with sound (auxiliary functions, Févotte & Idier 2011, with the exponent ½)."""

        def sums() -> tuple[Tensor, Tensor]:
            inverse = self.variance(speech).reciprocal()
            return self.power * inverse.square().sum(0), inverse.sum(0)

        levels, (over, under) = self.each_frame(), sums()
        self.spectra = self.spectra * ((levels.T @ over) / (levels.T @ under)).sqrt()
        over, under = sums()
        self.levels = (
            self.levels
            * (self.held(over @ self.spectra.T) / self.held(under @ self.spectra.T)).sqrt()
        )
        total = self.spectra.sum(1, keepdim=True).clamp_min(FLOOR)
        self.spectra, self.levels = self.spectra / total, self.levels * total.T

        def heard() -> tuple[Tensor, Tensor]:
            inverse = self.variance(speech).reciprocal()
            share = self.gain * speech * inverse
            return (self.power * share * inverse).sum(0), share.sum(0)

        over, under = (x.sum(1, keepdim=True) for x in heard())
        self.gain = self.gain * (over / under).sqrt()
        over, under = (x[self.audible].sum(0) @ self.bands @ self.bands.T for x in heard())
        self.gain = (self.gain * (over / under).sqrt()).clamp_min(
            1e-20
        )  # 0 would make 0/0 of the next one


def log_prior(z: Tensor, p: Gaussian | None) -> Tensor:
    """log p(z) per chain but for a constant, (chains,); p: its mean and log-variance, else N(0, I)."""
    terms = (
        z.square()
        if p is None
        else (z - p.mean).square() * torch.exp(-p.log_variance) + p.log_variance
    )
    return -0.5 * terms.flatten(1).sum(1)


def posterior_means(model: DVAE, power: Tensor, generator: torch.Generator) -> list[Tensor]:
    """What the encoder says of a power spectrum (frames, bins): the means of z and, where there is one, of w."""
    output = model(power[None], model.draw_noise(1, len(power), generator))
    return [q.mean for q in (output.q_z, output.q_w) if q is not None]


class Latents:
    """z of every chain, and what `draw_w` makes w of, as parameters; the E-steps `peem`, `ldem` and `langevin`."""

    def __init__(self, model: DVAE, power: Tensor, settings: Settings, generator: torch.Generator):
        self.model, self.generator, rate = model, generator, settings.rate
        self.deviation = {"ldem": settings.noise, "langevin": rate**0.5}.get(settings.method, 0.0)
        with torch.no_grad():
            z, *w = posterior_means(model, power, generator)
            starts = [z, *(model.whiten_w(mean) for mean in w)]
        self.spreads = [z[0].std(0, correction=0).clamp_min(1e-2), 1.0]
        self.latents = [start.expand(settings.chains, *start.shape[1:]).clone() for start in starts]
        kind, rate = (
            (torch.optim.SGD, rate / 2)
            if settings.method == "langevin"
            else (torch.optim.Adam, rate)
        )
        self.optimiser = kind([u.requires_grad_() for u in self.latents], rate)

    def decode(self, x_past: Tensor) -> tuple[Tensor, Tensor]:
        """The variance of speech (chains, frames, bins), and what the latents cost, (chains,)."""
        z, *standard = self.latents
        w = [self.model.draw_w(u) for u in standard]
        log_variance, p_z = self.model.score(x_past.expand(len(z), -1, -1), z, *w)
        cost = -log_prior(z, p_z) - sum(log_prior(u, None) for u in standard)
        return bounded(log_variance).exp(), cost

    @torch.no_grad()
    def step(self) -> None:
        """Latents move in units σ of their spread; `langevin`: z ← z − (η/2)·σ²·∇(−log p(x, z)) + √η·σ·ξ, whose samples
        are those of the posterior but for an error of the order of η."""
        before = [u.clone() for u in self.latents]
        for u, spread in zip(self.latents, self.spreads, strict=False):
            u.grad *= spread
        self.optimiser.step()
        for u, start, spread in zip(self.latents, before, self.spreads, strict=False):
            noise = torch.randn(u.shape, generator=self.generator).to(u) if self.deviation else 0.0
            u.copy_(start + spread * (u - start + self.deviation * noise))


class Inference:
    """A copy of the model whose inference network is trained, the E-step `vem`. What its prior or its decoder uses too
    stays as it is."""

    def __init__(self, model: DVAE, power: Tensor, settings: Settings, generator: torch.Generator):
        self.model, self.power, self.generator = (
            copy.deepcopy(model).requires_grad_(),
            power,
            generator,
        )
        self.chains = settings.chains
        parameters, noise = (
            list(self.model.parameters()),
            model.draw_noise(1, len(power), generator),
        )
        with torch.enable_grad():
            latents = noise if isinstance(noise, tuple) else (noise,)
            score = self.model.score(past(self.model.input_scale(power[None])), *latents)
            total = sum(part.sum() for part in (score.log_variance, *(score.p_z or ())))
            used = torch.autograd.grad(total, parameters, allow_unused=True)
        trained = [p for p, gradient in zip(parameters, used, strict=True) if gradient is None]
        self.optimiser = torch.optim.Adam(trained, settings.rate)

    def decode(self, x_past: Tensor) -> tuple[Tensor, Tensor]:
        x = self.power.expand(self.chains, -1, -1)
        output = self.model(x, self.model.draw_noise(self.chains, len(self.power), self.generator))
        log_variance, p_z = self.model.score(x_past.expand(self.chains, -1, -1), output.z, output.w)
        cost = gaussian_kl(*output.q_z, *(p_z or ())).sum(-1)
        if output.q_w is not None:  # by the draw, and but for a constant: its prior is `draw_w`'s
            cost = (
                cost
                - log_prior(self.model.whiten_w(output.w), None)
                - output.q_w.log_variance.sum(-1) / 2
            )
        return bounded(log_variance).exp(), cost

    def step(self) -> None:
        self.optimiser.step()


E_STEPS = {"vem": Inference, "peem": Latents, "ldem": Latents, "langevin": Latents}


def improve(
    e_step: Latents | Inference, observation: Observation, estimate: Tensor
) -> tuple[Tensor, float]:
    """An M-step and an E-step → the variances that were decoded before them, (chains, frames, bins), and the objective.
    estimate: |ŝ|² (frames, bins), which an autoregressive decoder is given as the past."""
    with torch.enable_grad():
        speech, cost = e_step.decode(past(e_step.model.input_scale(estimate[None])))
        observation.update(speech.detach())
        loss = observation.cost(speech) + cost
        moved = e_step.optimiser.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss.sum(), moved, allow_unused=True)
    for parameter, gradient in zip(moved, gradients, strict=True):
        parameter.grad = gradient
    e_step.step()
    return speech.detach(), loss.mean().item()


@torch.no_grad()
def encoder_gains(model: DVAE, observation: Observation, generator: torch.Generator) -> Tensor:
    """Wiener gains (frames, bins) from what the encoder says at once. It is asked three times, of a cleaner estimate
    each time, with three M-steps after each, whose noise and gains are not kept."""
    observation, estimate = copy.copy(observation), observation.first_estimate()
    for _ in range(3):
        latents = posterior_means(model, estimate, generator)
        log_variance, _ = model.score(past(model.input_scale(estimate[None])), *latents)
        speech = bounded(log_variance).exp()
        for _ in range(3):
            observation.update(speech)
        gains = observation.wiener(speech)
        estimate = gains.square() * observation.power
    return gains


def gains_of(
    model: DVAE,
    power: Tensor,
    settings: Settings,
    generator: torch.Generator,
    spectra=None,
    tick: Callable = bool,
) -> tuple[Tensor, Observation, list[float]]:
    """|x|² (frames, bins) of a recording with a peak of 1 → the gains of the Wiener estimate, (frames, bins), what was
    learned of its noise, and the objective of every iteration. They are the encoder's own for a share, and those of
    the last quarter of the iterations, of peem the last. vem and peem stop when the objective has moved by less than
    1e-4 of itself in ten iterations. `tick` is called after each iteration. spectra: W to start from."""
    observation = Observation(power, settings.rank, settings.hold, generator, spectra)
    estimate, encoded = observation.first_estimate(), encoder_gains(model, observation, generator)
    e_step = E_STEPS[settings.method](model, estimate, settings, generator)
    kept, objective = [], []
    for iteration in range(settings.iterations):
        speech, loss = improve(e_step, observation, estimate)
        gains = observation.wiener(speech)
        estimate = gains.square() * power
        objective.append(loss)
        if iteration < 0.75 * settings.iterations or settings.method == "peem":
            kept.clear()
        kept.append(gains)
        tick()
        before = objective[max(0, iteration - 10)]
        if (
            settings.method in ("vem", "peem")
            and iteration >= 10
            and abs(before - objective[-1]) < 1e-4 * abs(before)
        ):
            break
    return torch.lerp(torch.stack(kept).mean(0), encoded, settings.encoder), observation, objective


@torch.no_grad()
def enhance_speech(
    model: DVAE,
    stft: STFT,
    waveform: Tensor,
    settings: Settings,
    seed: int = 0,
    tick: Callable = bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, list[float]]]]:
    """A noisy waveform (samples,) at 16 kHz → the clean one, same shape, level and phase, and of each block that is not
    silent what was learned: H (frames, rank), W (rank, bins), the objective."""
    generator, peak = torch.Generator().manual_seed(seed), waveform.abs().max()
    clean, spectra, learned = torch.zeros_like(waveform), None, []
    for start, stop, weight in blocks(len(waveform)):
        if not waveform[start:stop].any():
            continue
        spectrum = stft.analyse(waveform[start:stop] / peak)
        power = spectrum.abs().square().clamp_min(audio.POWER_FLOOR)
        with torch.backends.cudnn.flags(
            enabled=False
        ):  # whose recurrent layers have no backward pass in eval()
            gains, observation, objective = gains_of(
                model, power, settings, generator, spectra, tick
            )
        clean[start:stop] += (
            weight.to(clean) * peak * stft.synthesise(gains * spectrum, stop - start)
        )
        spectra = observation.spectra  # the next block goes on from the noise of this one
        learned.append((observation.each_frame(), spectra, objective))
    return clean, learned


def enhance(
    waveform: np.ndarray, rate: int, model=DEFAULT, method=Settings.method, device="cpu"
) -> np.ndarray:
    """Noisy speech (samples,) at `rate` Hz → clean speech at 16 kHz. model: run folder of a DVAE, or one that ships.
    ValueError where the waveform has another shape or is not finite, or the model is none."""
    if waveform.ndim != 1 or not np.isfinite(waveform).all():
        raise ValueError(f"waveform of shape {waveform.shape}: expected finite numbers, (samples,)")
    network, stft = load_dvae(model, device)
    noisy = torch.from_numpy(
        audio.resample(waveform.astype(np.float32), rate, audio.SAMPLE_RATE)
    ).to(device)
    return enhance_speech(network, stft, noisy, Settings.of(method))[0].cpu().numpy()


def load_dvae(folder, device: str | torch.device) -> tuple[DVAE, STFT]:
    """The DVAE of a run folder, or one that ships, in `eval()`. CheckpointError where it is another model."""
    model, stft, content = load_run(folder, device)
    if not isinstance(model, DVAE):
        raise CheckpointError(
            f"{folder}: holds a {content['model']}; expected a DVAE, which knows clean speech"
        )
    return model.eval(), stft


def blocks(samples: int) -> Iterator[tuple[int, int, Tensor]]:
    """First and last sample of each block, all about as long, and weights (samples,) to fade them into one another."""
    count = max(1, math.ceil((samples - OVERLAP) / (BLOCK - OVERLAP)))
    length = math.ceil((samples + (count - 1) * OVERLAP) / count)
    fade = (torch.arange(OVERLAP) + 0.5) / OVERLAP
    for k in range(count):
        start = k * (length - OVERLAP)
        stop = min(samples, start + length)
        weight = torch.ones(stop - start)
        if k > 0:
            weight[:OVERLAP] = fade
        if k < count - 1:
            weight[-OVERLAP:] = 1 - fade
        yield start, stop, weight
