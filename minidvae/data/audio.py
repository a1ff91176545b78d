"""Sound files, waveforms, spectra and features.

Waveforms are float32 with full scale ±1: numpy arrays (samples,) where they come from a file or go
to one, tensors (…, samples) where they are analysed. Spectra and features are tensors
(…, frames, bins).

*Centred* frames: frame t is centred on sample t·hop, with zeros beyond both ends, so that a whole
utterance can be reconstructed from its first sample to its last. *Not centred*: frame t starts at
sample t·hop and nothing is padded, so that a crop of an utterance is analysed as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from scipy.signal import firwin, resample_poly
from torch import Tensor

from ..files import atomic_write

SAMPLE_RATE = 16_000
# Range of the sampling rates of files, Hz. A file of kilobytes with a lower rate in its header
# would become gigabytes.
MIN_FILE_RATE = 4_000
MAX_FILE_RATE = 768_000
BLOCK_VALUES = 2**16  # values that are decoded at a time
# Only silence comes near this number. A decoder that does not stop at the end of a damaged file
# exceeds it.
MAX_SAMPLES_PER_BYTE = 1_000
# The smallest power of a bin in what models learn from. It is about the power of rounding to 16
# bits (2⁻³⁰/12 times 159 to 512, the sum of the squares of the window): digital silence then looks
# like rounded silence.
POWER_FLOOR = 1e-8


class AudioError(ValueError):
    """A sound file that cannot be used. The message is one line: the file, what is wrong, what was
    expected."""


class _SequentialFile(soundfile.SoundFile):
    """Reads without seeking. soundfile seeks after each read, which fails at the end of a FLAC file
    whose header lacks its length."""

    def seekable(self) -> bool:
        return False


def read(
    path: str | Path, new_rate: int | None = None, mix: bool = True
) -> tuple[np.ndarray, int, int]:
    """Decode a sound file: wav, flac, ogg, NIST SPHERE or whatever else libsndfile opens.

    Args:
        path: of the file.
        new_rate: Hz; None: the sampling rate of the file.
        mix: average the channels.

    Returns:
        the waveform (samples,), float32, or without `mix` (samples, channels); the sampling rate of
        the file, Hz; its number of channels.

    Raises:
        AudioError: the file is missing, does not decode, has a sampling rate outside of
            MIN_FILE_RATE to MAX_FILE_RATE, is empty or does not become finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(
            f"{path}: no such file; expected a sound file (wav, flac, ogg, NIST SPHERE)"
        )
    try:
        waveform, rate, channels = decode(path, mix)
    except (soundfile.SoundFileError, OSError, TypeError, MemoryError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(
            f"{path}: does not decode ({reason}); expected wav, flac, ogg, NIST SPHERE"
        ) from None
    if not len(waveform):
        raise AudioError(f"{path}: holds no samples; expected at least one")
    waveform = resample(waveform, rate, new_rate or rate)
    if not np.isfinite(waveform).all():
        raise AudioError(
            f"{path}: holds samples that are infinite, too large or not numbers; "
            "expected finite ones"
        )
    return waveform, rate, channels


def decode(path: Path, mix: bool) -> tuple[np.ndarray, int, int]:
    """Return the waveform of a file at its own sampling rate, this rate, and its number of
    channels. Raises AudioError, or an error of libsndfile."""
    with path.open("rb", buffering=0) as file:
        header = file.read(1024)
        if header.startswith(b"NIST_1A") and b"shorten" in header:
            raise AudioError(
                f"{path}: SPHERE packed with 'shorten'; unpack it with sph2pipe -f wav IN OUT"
            )
        file.seek(0)
        with (
            _SequentialFile(file.fileno(), closefd=False) as sound,
            np.errstate(over="ignore", invalid="ignore"),
        ):
            rate = sound.samplerate
            channels = sound.channels
            if not MIN_FILE_RATE <= rate <= MAX_FILE_RATE:
                raise AudioError(
                    f"{path}: claims a sampling rate of {rate} Hz; "
                    f"expected {MIN_FILE_RATE} to {MAX_FILE_RATE}"
                )
            max_values = 2 * BLOCK_VALUES + MAX_SAMPLES_PER_BYTE * path.stat().st_size
            blocks = []
            while True:
                block = sound.read(BLOCK_VALUES // channels, "float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(axis=1) if mix else block)
                if len(blocks) * BLOCK_VALUES > max_values:
                    raise AudioError(f"{path}: decodes without an end; expected a whole sound file")
    waveform = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    return waveform, rate, channels


def load(path: str | Path, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return the waveform of a sound file (samples,), mono float32, at `rate` Hz. Raises AudioError
    as `read` does."""
    return read(path, rate)[0]


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample n samples (n, …) from `rate` to `new_rate` Hz, (⌈n·new_rate/rate⌉, …), by a
    polyphase low-pass filter."""
    if rate == new_rate:
        return waveform
    common = math.gcd(rate, new_rate)
    up = new_rate // common
    down = rate // common
    window = low_pass(max(up, down)).astype(waveform.dtype)
    return resample_poly(waveform, up, down, window=window).astype(np.float32)


@lru_cache(32)
def low_pass(factor: int) -> np.ndarray:
    """Return a filter that keeps 1/factor of the frequencies. It is the one of `resample_poly`,
    which would design it anew at every call."""
    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0))


def write(path: str | Path, waveform: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write a waveform (samples,) or (samples, channels) as 16-bit wav, scaled down to full scale
    where its peak is above 1. Raises AudioError where a sample is not finite or the file cannot be
    written."""
    path = Path(path)
    waveform = np.asarray(waveform, dtype=np.float64)
    peak = np.abs(waveform).max(initial=0.0)
    if not np.isfinite(peak):
        raise AudioError(
            f"{path}: not written, samples are infinite or not numbers; expected finite ones"
        )
    scaled = np.rint(waveform / max(peak, 1.0) * 2**15)
    samples = scaled.clip(-(2**15), 2**15 - 1).astype(np.int16)
    try:
        with atomic_write(path) as temporary:
            soundfile.write(temporary, samples, rate, format="WAV", subtype="PCM_16")
    except soundfile.SoundFileError as error:  # The disk is full.
        raise AudioError(f"{path}: could not be written ({error})") from None


def trim_bounds(waveform: np.ndarray, threshold_db: float = 30.0) -> tuple[int, int]:
    """Return start and stop of the speech, in samples: waveform[start:stop] has no silence at its
    ends.

    It extends from the first to the last frame (2048 samples around every 512th) whose RMS is above
    the highest one minus `threshold_db`, the last one with its hop; (0, 0) for digital silence.
    """
    num_samples = len(waveform)
    hop = 512
    half_frame = 1024
    squares = np.square(waveform, dtype=np.float64)
    energy_before = np.concatenate([[0.0], np.cumsum(squares)])
    centres = np.arange(1 + num_samples // hop) * hop
    starts = (centres - half_frame).clip(0, num_samples)
    stops = (centres + half_frame).clip(0, num_samples)
    energy = energy_before[stops] - energy_before[starts]
    if energy.max() == 0:
        return 0, 0
    loud_frames = np.flatnonzero(energy > energy.max() * 10 ** (-threshold_db / 10))
    return int(loud_frames[0] * hop), int(min(num_samples, (loud_frames[-1] + 1) * hop))


@lru_cache
@torch.inference_mode(False)  # A window that is made in inference may be used in training later.
def _window(shape: str, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the window (length,), made once for each device and precision."""
    n = torch.arange(length, dtype=torch.float64)
    if shape == "sine":
        window = torch.sin(torch.pi * (n + 0.5) / length)
    else:
        window = 0.54 - 0.46 * torch.cos(2 * torch.pi * n / length)
    return window.to(device, dtype)


def _power(spectrum: Tensor) -> Tensor:
    """Return |s|² of a complex spectrum."""
    return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)


@dataclass(frozen=True)
class STFT:
    """Short-time Fourier transform of real waveforms and its inverse, in the precision and on the
    device of its input.

    Raises:
        ValueError: the window length is odd, or the hop is longer than half of it, so that
        waveforms
            could not be reconstructed.
    """

    window_length: int = 1024  # samples
    hop: int = 256  # samples
    window: str = "sine"  # sin π(n+½)/N as in the DVAE papers; or hamming

    def __post_init__(self):
        if self.window_length % 2 or not 0 < self.hop <= self.window_length // 2:
            raise ValueError(
                f"a window of {self.window_length} with a hop of {self.hop} samples cannot be "
                "inverted; expected an even window and a hop of at most half of it"
            )
        if self.window not in ("sine", "hamming"):
            raise ValueError(f"window {self.window!r} is unknown; expected 'sine' or 'hamming'")

    @property
    def bins(self) -> int:
        """Number of frequencies from 0 to half the sampling rate, both included."""
        return self.window_length // 2 + 1

    @property
    def energy(self) -> float:
        """Sum of the squares of the window: the mean power of white noise of variance 1."""
        window = _window(self.window, self.window_length, torch.device("cpu"), torch.float64)
        return float(window.square().sum())

    def frames(self, samples: int) -> int:
        """Return the number of frames of `analyse` for so many samples: up to the first centre
        after the last sample."""
        return 1 + -(-samples // self.hop)

    def samples(self, frames: int) -> int:
        """Return the length of a crop of which `power` makes exactly so many frames."""
        return self.window_length + (frames - 1) * self.hop

    def analyse(self, waveform: Tensor) -> Tensor:
        """Return the complex spectra (…, frames, bins) of waveforms (…, samples), frames
        centred."""
        return torch.fft.rfft(self.windowed(waveform))

    def power(self, crop: Tensor) -> Tensor:
        """Return |STFT|² (…, frames, bins), float32, of crops (…, samples), frames not centred. It
        is at least POWER_FLOOR: the Itakura-Saito divergence to a power of 0 has no minimum."""
        power = _power(torch.fft.rfft(self.windowed(crop, centred=False)))
        return power.float().clamp_min(POWER_FLOOR)

    def windowed(self, waveform: Tensor, centred: bool = True) -> Tensor:
        """Return the frames (…, frames, window_length) of waveforms (…, samples), times the
        window."""
        if centred:
            num_samples = waveform.shape[-1]
            before = self.window_length // 2
            after = self.samples(self.frames(num_samples)) - before - num_samples
            waveform = F.pad(waveform, (before, after))
        window = _window(self.window, self.window_length, waveform.device, waveform.dtype)
        return waveform.unfold(-1, self.window_length, self.hop) * window

    def synthesise(self, spectrum: Tensor, length: int | None = None) -> Tensor:
        """Return the waveforms (…, length) whose STFT is nearest to the complex spectra
        (…, frames, bins) in the least-squares sense (Griffin & Lim 1984, eq. 6): windowed inverse
        transforms, overlapped and added, divided by the sum of the squared windows.

        `length` defaults to the longest possible. Raises ValueError where so many samples do not
        have as many frames as the spectrum.
        """
        num_frames = spectrum.shape[-2]
        if length is None:
            length = (num_frames - 1) * self.hop
        if self.frames(length) != num_frames:
            raise ValueError(
                f"{length} samples have {self.frames(length)} frames, the spectrum has {num_frames}"
            )
        pieces = torch.fft.irfft(spectrum, self.window_length)
        window = _window(self.window, self.window_length, pieces.device, pieces.dtype)
        total = self._overlap_add((pieces * window).reshape(-1, num_frames, self.window_length))
        weight = self._overlap_add(window.square().expand(1, num_frames, -1))
        before = self.window_length // 2
        bounds = slice(before, before + length)
        return (total[:, bounds] / weight[:, bounds]).reshape(*spectrum.shape[:-2], length)

    def _overlap_add(self, pieces: Tensor) -> Tensor:
        """Overlap and add: (batch, frames, window_length) → (batch, samples)."""
        num_frames = pieces.shape[1]
        hops_per_window = -(-self.window_length // self.hop)
        pieces = F.pad(pieces, (0, hops_per_window * self.hop - self.window_length))
        pieces = pieces.unflatten(-1, (hops_per_window, self.hop))
        total = pieces.new_zeros(len(pieces), num_frames + hops_per_window - 1, self.hop)
        for k in range(hops_per_window):
            total[:, k : k + num_frames] += pieces[:, :, k]
        return total.flatten(1)[:, : self.samples(num_frames)]


def resynthesise(log_variance: Tensor, spectrum: Tensor, stft: STFT, length: int) -> Tensor:
    """Return waveforms (…, length) with the magnitude √(e^l) and the phase of the input.
    log-variance and spectrum: (…, frames, bins)."""
    return stft.synthesise(torch.polar(torch.exp(log_variance / 2), spectrum.angle()), length)


@torch.no_grad()
def griffin_lim(
    power: Tensor, stft: STFT, iterations=60, momentum=0.99, length=None, generator=None
) -> Tensor:
    """Return waveforms (…, length) whose |STFT|² is about `power` (…, frames, bins).

    Griffin & Lim, Signal estimation from modified short-time Fourier transform, 1984, in the faster
    form of Perraudin, Balazs & Søndergaard, A fast Griffin-Lim algorithm, 2013. From random phases,

        c_n = P₁ P₂ t_{n−1},    t_n = c_n + α (c_n − c_{n−1}),

    where P₂ imposes the magnitudes, P₁ goes to a waveform and back, and α is the momentum (0: the
    original algorithm).

    Args:
        length: as in `STFT.synthesise`.
        generator: of the random phases; or one for each spectrum of `power` (batch, frames, bins),
            so that a waveform does not depend on the rest of the batch.

    Raises:
        ValueError: the numbers of generators and of spectra differ.
    """
    magnitude = power.sqrt()

    def impose_magnitude(estimate: Tensor) -> Tensor:
        scale = magnitude * _power(estimate).clamp_min(torch.finfo(power.dtype).tiny).rsqrt()
        return torch.complex(estimate.real * scale, estimate.imag * scale)

    phases = 2 * torch.pi * random_turns(power, generator)
    estimate = torch.polar(torch.ones_like(power), phases)
    consistent = torch.zeros_like(estimate)
    for _ in range(iterations):
        previous = consistent
        consistent = stft.analyse(stft.synthesise(impose_magnitude(estimate), length))
        estimate = torch.lerp(previous, consistent, 1 + momentum)
    return stft.synthesise(impose_magnitude(estimate), length)


def random_turns(power: Tensor, generator) -> Tensor:
    """Return random numbers in [0, 1) of the shape of `power`. generator: as in `griffin_lim`."""
    if not isinstance(generator, Sequence):
        device = (generator or power).device
        turns = torch.rand(power.shape, generator=generator, device=device, dtype=power.dtype)
        return turns.to(power.device)
    if len(generator) != len(power):
        raise ValueError(
            f"{len(generator)} generators for {len(power)} spectra; expected one for each, or one"
        )
    turns = []
    for spectrum, own_generator in zip(power, generator, strict=True):
        device = own_generator.device
        turns.append(
            torch.rand(spectrum.shape, generator=own_generator, device=device, dtype=power.dtype)
        )
    return torch.stack(turns).to(power.device)


# The frames of the FHVAE paper's features: 25 ms Hamming windows, every 10 ms.
FEATURE_STFT = STFT(window_length=400, hop=160, window="hamming")


@lru_cache
@torch.inference_mode(False)
def _mel_filters(bins: int, frequencies: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return triangular filters (frequencies, bins) from 20 to 8000 Hz. Each extends from the
    centre of the filter before it to the centre of the one after it."""
    hertz = torch.linspace(0, SAMPLE_RATE / 2, frequencies, dtype=torch.float64)
    mel = 1127 * torch.log1p(hertz / 700)
    lowest = 1127 * math.log1p(20 / 700)
    highest = 1127 * math.log1p(SAMPLE_RATE / 2 / 700)
    spacing = (highest - lowest) / (bins + 1)
    centres = lowest + spacing * torch.arange(1, bins + 1, dtype=torch.float64)
    distances = (mel[:, None] - centres).abs() / spacing
    return (1 - distances).clamp(min=0).to(device, dtype)


def fbank(waveform: Tensor, bins: int = 80, centred: bool = True) -> Tensor:
    """Return the log mel filter bank energies (…, frames, bins) of waveforms (…, samples) at 16
    kHz.

    The power spectrum of the frames of FEATURE_STFT (`centred=False` for crops), triangular filters
    evenly spaced on the mel scale 1127 ln(1 + f/700) from 20 to 8000 Hz, the natural logarithm. The
    transform has 1024 points: with 400 the lowest of 80 filters would have a single frequency each.
    There is no pre-emphasis, which would be an offset for each bin that normalisation removes
    again. Hsu, Zhang & Glass, Unsupervised learning of disentangled and interpretable
    representations from sequential data, 2017, section 4.
    """
    power = _power(torch.fft.rfft(FEATURE_STFT.windowed(waveform, centred), 1024))
    energy = power @ _mel_filters(bins, power.shape[-1], power.device, power.dtype)
    return energy.clamp(min=POWER_FLOOR).log()


def log_magnitude(waveform: Tensor, centred: bool = True) -> Tensor:
    """Return the log-magnitude spectrum ln |STFT| (…, frames, 200) of waveforms (…, samples) at
    16 kHz: the frames of FEATURE_STFT (`centred=False` for crops) without the bin at 0 Hz."""
    power = _power(torch.fft.rfft(FEATURE_STFT.windowed(waveform, centred)))
    return power[..., 1:].clamp(min=POWER_FLOOR).log() / 2


def log_magnitude_to_power(log_magnitude: Tensor) -> Tensor:
    """Return |STFT|² (…, frames, 201), 0 at 0 Hz, of ln |STFT| (…, frames, 200): the inverse of
    `log_magnitude`."""
    return F.pad((2 * log_magnitude).exp(), (1, 0))


def mfcc(waveform: Tensor, coefficients: int = 20, bins: int = 40) -> Tensor:
    """Return the mel-frequency cepstral coefficients (…, frames, coefficients) of waveforms
    (…, samples) at 16 kHz: the orthonormal discrete cosine transform (type II) of `fbank`, from the
    0th coefficient on."""
    order = torch.arange(coefficients, dtype=torch.float64)
    positions = torch.arange(bins, dtype=torch.float64)[:, None] + 0.5
    cosines = torch.cos(torch.pi / bins * positions * order)
    cosines *= torch.where(order == 0, 1 / bins, 2 / bins).sqrt()
    energy = fbank(waveform, bins)
    return energy @ cosines.to(energy)


def deltas(features: Tensor) -> Tensor:
    """Return the slopes of features (…, frames, dimensions) over time, per frame, in the same
    shape.

    They are those of the least-squares line through five frames, d_t = Σ_k k (c_{t+k} − c_{t−k}) /
    2 Σ_k k² with k = 1, 2. The first and the last frame are repeated beyond the ends.
    """
    num_frames = features.shape[-2]
    first = features[..., :1, :]
    last = features[..., -1:, :]
    padded = torch.cat([first, first, features, last, last], dim=-2)
    shifted = [padded[..., k : k + num_frames, :] for k in range(5)]
    return (2 * (shifted[4] - shifted[0]) + shifted[3] - shifted[1]) / 10


def voiced_frames(waveform: Tensor, threshold_db: float = 30.0) -> Tensor:
    """Return which frames of FEATURE_STFT have speech, (…, frames), of waveforms (…, samples), by
    an energy detector.

    They are those whose energy is above the highest of the waveform minus `threshold_db`; in
    digital silence there are none. Kinnunen & Li, An overview of text-independent speaker
    recognition: from features to supervectors, 2010.
    """
    energy = FEATURE_STFT.windowed(waveform).square().sum(-1)
    return energy > energy.amax(-1, keepdim=True) * 10 ** (-threshold_db / 10)


def pitch(
    power: Tensor, stft: STFT, lowest: float = 75.0, highest: float = 400.0, voicing: float = 0.4
) -> Tensor:
    """Return the fundamental frequency, Hz (…, frames), of power spectra (…, frames, bins); nan in
    frames without one.

    The autocorrelation is the inverse transform of the power spectrum, divided by that of the
    window (Boersma, Accurate short-term analysis of the fundamental frequency and the
    harmonics-to-noise ratio of a sampled sound, 1993). The period is its first peak within 10 % of
    the highest one between the two frequencies (Hz), by a parabola through three points. A frame
    has none where the peak is below `voicing` times the value at lag 0. Periods over half a window
    are not detected.
    """
    tiny = torch.finfo(power.dtype).tiny
    window = _window(stft.window, stft.window_length, power.device, power.dtype)
    shortest = math.ceil(SAMPLE_RATE / highest)
    longest = min(int(SAMPLE_RATE / lowest), stft.window_length // 2 - 1)
    correlation = torch.fft.irfft(power)[..., : longest + 2]
    correlation_of_window = torch.fft.irfft(_power(torch.fft.rfft(window)))[..., : longest + 2]
    correlation = correlation / correlation_of_window
    correlation = correlation / correlation[..., :1].clamp_min(tiny)

    # Find the first high peak.
    before = correlation[..., shortest - 1 : longest]
    at_lag = correlation[..., shortest : longest + 1]
    after = correlation[..., shortest + 1 : longest + 2]
    peaks = torch.where((at_lag >= before) & (at_lag > after), at_lag, 0)
    is_high = peaks >= 0.9 * peaks.amax(-1, keepdim=True)
    first = is_high.byte().argmax(-1, keepdim=True)

    # Interpolate by a parabola through three points.
    before = before.gather(-1, first)
    at_lag = at_lag.gather(-1, first)
    after = after.gather(-1, first)
    curvature = (2 * (before - 2 * at_lag + after)).clamp_max(-tiny)
    offset = (before - after) / curvature
    hertz = SAMPLE_RATE / (shortest + first + offset)
    return torch.where(peaks.gather(-1, first) >= voicing, hertz, torch.nan)[..., 0]
