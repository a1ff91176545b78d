"""Speech enhancement with a DVAE as the prior of clean speech. The noise is learned from the
recording itself.

    x = s + n,   s_tf ~ N_c(0, g_tf·v_tf(z)),   n_tf ~ N_c(0, (HW)_tf)
    so x_tf ~ N_c(0, V_tf) with V = g·v(z) + HW

v = e^l is the decoder's variance, H (frames × K) and W (K × bins) are non-negative (Leglaive et
al., ICASSP 2020; Bie et al., IEEE/ACM TASLP 2022). The gain g_tf > 0 is a_t, as in these papers,
times c_f, the response of a microphone that the model has not heard, which is constant in bands.
Latents and noise are improved in turn on

    −log p(x, z) = Σ_tf (|x_tf|²/V_tf + log V_tf) − log p(z)          or its bound with q(z)

by one of four E-steps. The result is the Wiener estimate ŝ = mean_r(g·v_r/V_r)·x over samples z_r
of the latents, with a quarter of its gain from the encoder's estimate (`encoder`), which the papers
do not have:

    vem       the inference network, started from the trained one, is trained on this recording
    peem      z itself is optimised: the most probable one (Sadeghi & Serizel, ICASSP 2022)
    ldem      the same with noise in every step and several chains (Sadeghi & Serizel 2024), as
              their authors run it, with Adam's steps, which does not sample the posterior exactly
    langevin  the definition of ldem, z ← z + (η/2)·∇log p(x, z) + √η·ξ: samples of the posterior
              as η → 0

An autoregressive decoder is given the present estimate of the clean past.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import audio
from ..data.audio import SAMPLE_RATE, STFT
from ..files import CheckpointError
from ..kernels.gaussian_kl import gaussian_kl
from ..models.base import DVAE, Gaussian, Noise, bounded, past
from ..training.checkpoint import load_run

DEFAULT_MODEL = "light_dvae_local-librispeech"
METHODS = ("vem", "peem", "ldem", "langevin")

BLOCK = 10 * SAMPLE_RATE  # samples enhanced at once
OVERLAP = SAMPLE_RATE  # samples that two blocks share
QUIET_SHARE = 0.2  # share of the frames, in each bin, that is taken for noise at first
RESPONSE_BANDS = 20  # bands of the microphone's response, even over log(1 + f/RESPONSE_KNEE)
RESPONSE_KNEE = 300  # Hz
NOISE_FLOOR = 1e-10  # smallest variance of the noise; a recording has a peak of 1
MIN_GAIN = 1e-20  # A gain of 0 would make 0/0 of the next one.


@dataclass(frozen=True)
class EnhancementSettings:
    method: str = "ldem"
    iterations: int = 30
    rank: int = 8  # K, of the noise
    hold: int = 4  # frames for which the levels of the noise stay: what changes faster is speech
    chains: int = 2  # number of z that are found side by side
    rate: float = 0.2  # step size, Adam's or η, in standard deviations of the latents
    noise: float = 0.1  # ldem: standard deviation of the noise of each step, in the same unit
    encoder: float = 0.25  # share of the encoder's estimate in the gains; the rest is the E-step's

    @classmethod
    def for_method(
        cls, method: str | None = None, iterations: int | None = None
    ) -> "EnhancementSettings":
        """Return the settings of a method; None: the default. Raises ValueError for an unknown
        method or less than one iteration."""
        method = method or cls.method
        if method not in METHODS:
            raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
        if iterations is None:
            iterations = cls.iterations
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: expected at least 1")
        if method == "vem":
            return cls(method, iterations, rate=1e-3, chains=1)
        if method == "peem":
            return cls(method, iterations, chains=1)
        if method == "langevin":
            return cls(method, iterations, rate=0.001)
        return cls(method, iterations)


class LearnedNoise(NamedTuple):
    """The noise of a block, as learned from it."""

    levels: Tensor  # H, (frames, rank)
    spectra: Tensor  # W, (rank, bins)
    objective: list[float]  # after each iteration


class NoisySpeech:
    """A recording, and what is known so far of the noise and of the gains in it.

    Args:
        power: |x|², (frames, bins).
        rank: K, the number of noise spectra.
        hold: frames for which a level of the noise stays.
        spectra: W (rank, bins) to start from; None: random.
    """

    def __init__(
        self,
        power: Tensor,
        rank: int,
        hold: int,
        generator: torch.Generator,
        spectra: Tensor | None = None,
    ):
        self.power = power
        self.hold = hold
        self.gain = torch.ones_like(power)
        self.bands = response_bands(power.shape[1]).to(power)  # (bins, RESPONSE_BANDS)
        is_audible = power.mean(1) > 10 * audio.POWER_FLOOR
        self.is_audible = is_audible if is_audible.any() else ~is_audible

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).add(0.1).to(power)

        # The power of stationary noise has an exponential distribution in each bin. Its mean
        # follows from a quantile.
        quantile = power[self.is_audible].quantile(QUIET_SHARE, dim=0)
        floor = quantile / -math.log1p(-QUIET_SHARE)
        if spectra is None:
            spectra = random(rank, power.shape[1]) * floor
        self.spectra = spectra / spectra.sum(1, keepdim=True)  # W
        loudness = self.sum_held(power.sum(1, keepdim=True)) / hold
        share = random(len(loudness), rank) / 0.6 / rank
        # H, a row for every `hold` frames.
        self.levels = share * torch.minimum(loudness, floor.sum())

    @property
    def noise(self) -> Tensor:
        """The variance of the noise, (frames, bins)."""
        return (self.frame_levels() @ self.spectra).clamp_min(NOISE_FLOOR)

    def frame_levels(self) -> Tensor:
        """Return H, (frames, rank)."""
        return self.levels.repeat_interleave(self.hold, 0)[: len(self.power)]

    def sum_held(self, frames: Tensor) -> Tensor:
        """Sum the frames that share a row of H."""
        padded = F.pad(frames, (0, 0, 0, -len(frames) % self.hold))
        return padded.unflatten(0, (-1, self.hold)).sum(1)

    def variance(self, speech: Tensor) -> Tensor:
        """Return V for decoded variances (chains, frames, bins), same shape."""
        return self.gain * speech + self.noise

    def cost(self, speech: Tensor) -> Tensor:
        """Return Σ |x|²/V + log V, (chains,)."""
        variance = self.variance(speech)
        return (self.power / variance + variance.log()).sum(dim=(1, 2))

    def wiener_gains(self, speech: Tensor) -> Tensor:
        """Return the mean over chains of g·v/V, (frames, bins)."""
        return (self.gain * speech / self.variance(speech)).mean(0)

    def first_estimate(self) -> Tensor:
        """Return |ŝ|² before the model is asked: Wiener gains of what exceeds the noise, at least
        0.1."""
        return (1 - self.noise / self.power).clamp_min(0.1).square() * self.power

    def update(self, speech: Tensor) -> None:
        """Do the M-step: W, H, a and c in turn, each by multiplication. None of them raises the
        cost, c that of the audible frames (auxiliary functions, Févotte & Idier 2011, with the
        exponent ½)."""
        self.update_spectra(speech)
        self.update_levels(speech)
        total = self.spectra.sum(1, keepdim=True).clamp_min(NOISE_FLOOR)
        self.spectra = self.spectra / total
        self.levels = self.levels * total.T
        self.update_frame_gains(speech)
        self.update_response(speech)

    def noise_ratios(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of the updates of W and H, (frames, bins) each."""
        inverse = self.variance(speech).reciprocal()
        return self.power * inverse.square().sum(0), inverse.sum(0)

    def gain_ratios(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of the updates of the gains, (frames, bins) each."""
        inverse = self.variance(speech).reciprocal()
        share = self.gain * speech * inverse
        return (self.power * share * inverse).sum(0), share.sum(0)

    def update_spectra(self, speech: Tensor) -> None:
        levels = self.frame_levels()
        numerator, denominator = self.noise_ratios(speech)
        self.spectra = self.spectra * ((levels.T @ numerator) / (levels.T @ denominator)).sqrt()

    def update_levels(self, speech: Tensor) -> None:
        numerator, denominator = self.noise_ratios(speech)
        numerator = self.sum_held(numerator @ self.spectra.T)
        denominator = self.sum_held(denominator @ self.spectra.T)
        self.levels = self.levels * (numerator / denominator).sqrt()

    def update_frame_gains(self, speech: Tensor) -> None:
        numerator, denominator = self.gain_ratios(speech)
        ratio = numerator.sum(1, keepdim=True) / denominator.sum(1, keepdim=True)
        self.gain = self.gain * ratio.sqrt()

    def update_response(self, speech: Tensor) -> None:
        numerator, denominator = self.gain_ratios(speech)
        numerator = numerator[self.is_audible].sum(0) @ self.bands @ self.bands.T
        denominator = denominator[self.is_audible].sum(0) @ self.bands @ self.bands.T
        self.gain = (self.gain * (numerator / denominator).sqrt()).clamp_min(MIN_GAIN)


def response_bands(bins: int) -> Tensor:
    """Return which band of the microphone's response each bin is in, (bins, RESPONSE_BANDS)."""
    position = torch.linspace(0, SAMPLE_RATE / 2 / RESPONSE_KNEE, bins).log1p()
    band = (RESPONSE_BANDS * position / position[-1]).long().clamp_max(RESPONSE_BANDS - 1)
    return F.one_hot(band)


def log_prior(z: Tensor, p: Gaussian | None) -> Tensor:
    """Return log p(z) of each chain but for a constant, (chains,). p: its mean and log-variance;
    None: N(0, I)."""
    if p is None:
        terms = z.square()
    else:
        terms = (z - p.mean).square() * torch.exp(-p.log_variance) + p.log_variance
    return -0.5 * terms.flatten(1).sum(1)


def posterior_means(
    model: DVAE, power: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Return the encoder's means of z and of w (None: the model has none) for a power spectrum
    (frames, bins)."""
    output = model(power[None], model.draw_noise(1, len(power), generator))
    return output.q_z.mean, None if output.q_w is None else output.q_w.mean


class LatentOptimisation:
    """The E-steps `peem`, `ldem` and `langevin`: the parameters are z of every chain and, of models
    with w, the standard-normal draws that `draw_w` maps to w."""

    def __init__(
        self,
        model: DVAE,
        power: Tensor,
        settings: EnhancementSettings,
        generator: torch.Generator,
    ):
        self.model = model
        self.generator = generator
        self.noise_deviation = {
            "peem": 0.0,
            "ldem": settings.noise,
            "langevin": settings.rate**0.5,
        }[settings.method]
        with torch.no_grad():
            z, w = posterior_means(model, power, generator)
            starts = [z] if w is None else [z, model.whiten_w(w)]
        z_deviation = z[0].std(0, correction=0).clamp_min(1e-2)
        self.deviations = [z_deviation, 1.0][: len(starts)]
        self.latents = []
        for start in starts:
            latent = start.expand(settings.chains, *start.shape[1:]).clone()
            self.latents.append(latent.requires_grad_())
        if settings.method == "langevin":
            self.optimiser = torch.optim.SGD(self.latents, settings.rate / 2)
        else:
            self.optimiser = torch.optim.Adam(self.latents, settings.rate)

    def decode(self, x_past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the variance of speech (chains, frames, bins) and −log p of the latents,
        (chains,)."""
        z = self.latents[0]
        w = None
        if len(self.latents) > 1:
            w = self.model.draw_w(self.latents[1])
        log_variance, p_z = self.model.score(x_past.expand(len(z), -1, -1), z, w)
        cost = -log_prior(z, p_z)
        for latent in self.latents[1:]:
            cost = cost - log_prior(latent, None)
        return bounded(log_variance).exp(), cost

    @torch.no_grad()
    def step(self) -> None:
        """Move the latents in units σ of their deviation. `langevin`:
        z ← z − (η/2)·σ²·∇(−log p(x, z)) + √η·σ·ξ, whose samples are those of the posterior but for
        an error of the order of η."""
        before = [latent.clone() for latent in self.latents]
        for latent, deviation in zip(self.latents, self.deviations, strict=True):
            latent.grad *= deviation
        self.optimiser.step()
        for latent, start, deviation in zip(self.latents, before, self.deviations, strict=True):
            change = latent - start
            if self.noise_deviation:
                draws = torch.randn(latent.shape, generator=self.generator).to(latent)
                change = change + self.noise_deviation * draws
            latent.copy_(start + deviation * change)


class EncoderFineTuning:
    """The E-step `vem`: the inference network of a copy of the model is trained. What its prior or
    its decoder uses too stays as it is."""

    def __init__(
        self,
        model: DVAE,
        power: Tensor,
        settings: EnhancementSettings,
        generator: torch.Generator,
    ):
        self.model = copy.deepcopy(model).requires_grad_()
        self.power = power
        self.generator = generator
        self.chains = settings.chains
        noise = model.draw_noise(1, len(power), generator)
        self.optimiser = torch.optim.Adam(self.encoder_parameters(noise), settings.rate)

    def encoder_parameters(self, noise: Noise) -> list[Tensor]:
        """Return the parameters on which neither decoder nor prior depends."""
        parameters = list(self.model.parameters())
        with torch.enable_grad():
            x_past = past(self.model.input_scale(self.power[None]))
            score = self.model.score(x_past, noise.z, noise.w)
            total = score.log_variance.sum()
            if score.p_z is not None:
                total = total + score.p_z.mean.sum() + score.p_z.log_variance.sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    def decode(self, x_past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the variance of speech (chains, frames, bins) and the divergences of the latents,
        (chains,)."""
        x = self.power.expand(self.chains, -1, -1)
        noise = self.model.draw_noise(self.chains, len(self.power), self.generator)
        output = self.model(x, noise)
        x_past = x_past.expand(self.chains, -1, -1)
        log_variance, p_z = self.model.score(x_past, output.z, output.w)
        cost = gaussian_kl(*output.q_z, *(p_z or ())).sum(-1)
        if output.q_w is not None:
            # A one-sample estimate of KL(q(w) ‖ p(w)), up to a constant; p(w) is that of `draw_w`.
            cost = cost - log_prior(self.model.whiten_w(output.w), None)
            cost = cost - output.q_w.log_variance.sum(-1) / 2
        return bounded(log_variance).exp(), cost

    def step(self) -> None:
        self.optimiser.step()


def make_e_step(
    model: DVAE, power: Tensor, settings: EnhancementSettings, generator: torch.Generator
) -> LatentOptimisation | EncoderFineTuning:
    """Return the E-step of a method. power: |ŝ|² (frames, bins), from which latents start."""
    if settings.method == "vem":
        return EncoderFineTuning(model, power, settings, generator)
    return LatentOptimisation(model, power, settings, generator)


def improve(
    e_step: LatentOptimisation | EncoderFineTuning, noisy: NoisySpeech, estimate: Tensor
) -> tuple[Tensor, float]:
    """Do an M-step and an E-step. estimate: |ŝ|² (frames, bins), which an autoregressive decoder is
    given as the past. Return the variances that were decoded before, (chains, frames, bins), and
    the objective."""
    with torch.enable_grad():
        speech, cost = e_step.decode(past(e_step.model.input_scale(estimate[None])))
        noisy.update(speech.detach())
        loss = noisy.cost(speech) + cost
        parameters = e_step.optimiser.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    e_step.step()
    return speech.detach(), loss.mean().item()


@torch.no_grad()
def encoder_gains(model: DVAE, noisy: NoisySpeech, generator: torch.Generator) -> Tensor:
    """Return Wiener gains (frames, bins) from the encoder alone. It is asked three times, for a
    cleaner estimate each time, with three M-steps after each; the noise and the gains of these are
    not kept."""
    noisy = copy.copy(noisy)
    estimate = noisy.first_estimate()
    for _ in range(3):
        z, w = posterior_means(model, estimate, generator)
        log_variance, _ = model.score(past(model.input_scale(estimate[None])), z, w)
        speech = bounded(log_variance).exp()
        for _ in range(3):
            noisy.update(speech)
        gains = noisy.wiener_gains(speech)
        estimate = gains.square() * noisy.power
    return gains


def find_gains(
    model: DVAE,
    power: Tensor,
    settings: EnhancementSettings,
    generator: torch.Generator,
    spectra: Tensor | None = None,
    on_iteration: Callable[[], object] | None = None,
) -> tuple[Tensor, NoisySpeech, list[float]]:
    """Find the gains of the Wiener estimate.

    They are the encoder's own for a share `settings.encoder`; the rest are those of the last
    quarter of the iterations, of peem the last. vem and peem stop when the objective has moved by
    less than 1e-4 of itself in ten iterations.

    Args:
        power: |x|² (frames, bins) of a recording with a peak of 1.
        spectra: W to start from.
        on_iteration: called after each iteration.

    Returns:
        gains (frames, bins), what was learned of the noise, and the objective after each iteration.
    """
    noisy = NoisySpeech(power, settings.rank, settings.hold, generator, spectra)
    estimate = noisy.first_estimate()
    gains_of_encoder = encoder_gains(model, noisy, generator)
    e_step = make_e_step(model, estimate, settings, generator)
    gains_to_average = []
    objective = []
    for iteration in range(settings.iterations):
        speech, loss = improve(e_step, noisy, estimate)
        gains = noisy.wiener_gains(speech)
        estimate = gains.square() * power
        objective.append(loss)
        if iteration < 0.75 * settings.iterations or settings.method == "peem":
            gains_to_average.clear()
        gains_to_average.append(gains)
        if on_iteration is not None:
            on_iteration()
        if settings.method in ("vem", "peem") and has_converged(objective):
            break
    mean_gains = torch.stack(gains_to_average).mean(0)
    gains = torch.lerp(mean_gains, gains_of_encoder, settings.encoder)
    return gains, noisy, objective


def has_converged(objective: list[float]) -> bool:
    if len(objective) <= 10:
        return False
    before = objective[-11]
    return abs(before - objective[-1]) < 1e-4 * abs(before)


def enhance_speech(
    model: DVAE,
    stft: STFT,
    waveform: Tensor,
    settings: EnhancementSettings,
    seed: int = 0,
    on_iteration: Callable[[], object] | None = None,
) -> tuple[Tensor, list[LearnedNoise]]:
    """Enhance noisy speech (samples,) at 16 kHz.

    Returns:
        the clean speech, same shape, level and phase, and what was learned of the noise of each
        block that is not silent.
    """
    generator = torch.Generator().manual_seed(seed)
    peak = waveform.abs().max()
    clean = torch.zeros_like(waveform)
    spectra = None
    learned = []
    for start, stop, weight in blocks(len(waveform)):
        if not waveform[start:stop].any():
            continue
        spectrum = stft.analyse(waveform[start:stop] / peak)
        power = spectrum.abs().square().clamp_min(audio.POWER_FLOOR)
        # cuDNN's recurrent layers have no backward pass in eval().
        with torch.backends.cudnn.flags(enabled=False):
            gains, noisy, objective = find_gains(
                model, power, settings, generator, spectra, on_iteration
            )
        enhanced = stft.synthesise(gains * spectrum, stop - start)
        clean[start:stop] += weight.to(clean) * peak * enhanced
        spectra = noisy.spectra  # The next block starts from the noise of this one.
        learned.append(LearnedNoise(noisy.frame_levels(), spectra, objective))
    return clean, learned


def blocks(samples: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first sample, end and weights (length,) of overlapping blocks of similar length; the
    weights of all blocks add up to 1."""
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


class EnhancedRecording(NamedTuple):
    waveform: np.ndarray  # (samples, channels)
    rate: int  # sampling rate of the waveform, Hz
    noise_of_channels: list[list[LearnedNoise]]  # for each channel, of each block


def enhance_recording(
    model: DVAE,
    stft: STFT,
    waveform: np.ndarray,
    rate: int,
    settings: EnhancementSettings,
    seed: int = 0,
    on_iteration: Callable[[], object] | None = None,
) -> EnhancedRecording:
    """Enhance a recording (samples, channels), each channel by itself, at 16 kHz. `rate` is that of
    the original: the result is resampled to it if it is lower than 16 kHz."""
    device = next(model.parameters()).device
    channels = torch.from_numpy(np.ascontiguousarray(waveform.T)).to(device)
    enhanced = []
    noise_of_channels = []
    for channel in channels:
        clean, learned = enhance_speech(model, stft, channel, settings, seed, on_iteration)
        enhanced.append(clean)
        noise_of_channels.append(learned)
    clean = torch.stack(enhanced, dim=1).cpu().numpy()
    rate = min(rate, SAMPLE_RATE)
    length = len(clean) * rate // SAMPLE_RATE
    clean = audio.resample(clean, SAMPLE_RATE, rate)[:length]
    return EnhancedRecording(clean, rate, noise_of_channels)


def enhance(
    waveform: np.ndarray | Tensor,
    rate: int,
    model: str | Path = DEFAULT_MODEL,
    method: str | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> np.ndarray:
    """Return noisy speech without the noise.

    Args:
        waveform: (samples,).
        rate: of the waveform, Hz.
        model: run folder of a DVAE, or the name of a model that ships.
        method: one of METHODS; None: the default.
        seed: of everything that is drawn at random.

    Returns:
        the clean speech at 16 kHz, (samples at 16 kHz,) float32.

    Raises:
        ValueError: the waveform has another shape or is not finite, or there is no such model or
            method.
    """
    waveform = as_waveform(waveform)
    network, stft = load_dvae(model, device)
    resampled = audio.resample(waveform, rate, SAMPLE_RATE)
    noisy = torch.from_numpy(resampled).to(device)
    settings = EnhancementSettings.for_method(method)
    return enhance_speech(network, stft, noisy, settings, seed)[0].cpu().numpy()


def as_waveform(waveform: np.ndarray | Tensor) -> np.ndarray:
    """Return a waveform as float32. Raises ValueError where it is not one channel of finite
    numbers."""
    if isinstance(waveform, Tensor):
        waveform = waveform.detach().cpu().numpy()
    if waveform.ndim != 1 or not np.isfinite(waveform).all():
        raise ValueError(f"waveform of shape {waveform.shape}: expected finite numbers, (samples,)")
    return waveform.astype(np.float32)


def load_dvae(folder: str | Path, device: str | torch.device) -> tuple[DVAE, STFT]:
    """Return the DVAE of a run folder, or one that ships, in `eval()`. Raises CheckpointError where
    it is another model."""
    model, stft, content = load_run(folder, device)
    if not isinstance(model, DVAE):
        raise CheckpointError(
            f"{folder}: holds a {content['model']}; expected a DVAE, which models clean speech"
        )
    return model.eval(), stft
