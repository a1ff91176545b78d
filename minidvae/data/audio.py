"""Sound files, waveforms, spectra and features.

Waveforms are float32 with full scale ±1: numpy arrays (samples,) where they come from or go to a file, tensors
(..., samples) where they are analysed. Spectra and features are tensors (..., frames, bins).

*Centred* frames: frame t is centred on sample t·hop, with zeros beyond both ends, so that a whole utterance can be
reconstructed from its first sample to its last. *Not centred*: frame t starts at sample t·hop and nothing is padded, so
that a crop of an utterance is analysed as it is.
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
SLOWEST, FASTEST = (
    4_000,
    768_000,
)  # sampling rates of files, Hz; a header that claims less makes gigabytes of kilobytes
MOST_PER_BYTE = 1_000  # samples; only silence comes near, and a decoder that goes on after the end of a damaged file
# The least power of a bin in what models learn from. It is about what rounding to 16 bits leaves in it (2⁻³⁰/12,
# times 159 to 512, the sum of the squares of the window): digital silence then looks like rounded silence.
POWER_FLOOR = 1e-8


class AudioError(ValueError):
    """A sound file that cannot be used. One line: the file, what is wrong, what would be right."""


class _FromStartToEnd(soundfile.SoundFile):
    """Never seeks: soundfile does after each read, which fails at the end of a FLAC whose header lacks its length."""

    def seekable(self) -> bool:
        return False


def read(
    path: str | Path, new_rate: int | None = None, mix: bool = True
) -> tuple[np.ndarray, int, int]:
    """Decode a sound file: wav, flac, ogg, NIST SPHERE or whatever else libsndfile opens. Returns the waveform
    (samples,) as float32, channels averaged, at `new_rate` Hz (None: as it is); the file's sampling rate in Hz; how
    many channels it had. Without `mix` channels are kept, (samples, channels). Raises AudioError where the file is
    missing, does not decode, has a rate outside of SLOWEST to FASTEST, is empty or does not become finite numbers."""
    path = Path(path)
    if not path.is_file():
        raise AudioError(
            f"{path}: no such file; expected a sound file (wav, flac, ogg, NIST SPHERE)"
        )
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(1024)
            if head.startswith(b"NIST_1A") and b"shorten" in head:
                raise AudioError(
                    f"{path}: SPHERE packed with 'shorten'; unpack it with sph2pipe -f wav IN OUT"
                )
            file.seek(0)
            with (
                _FromStartToEnd(file.fileno(), closefd=False) as sound,
                np.errstate(over="ignore", invalid="ignore"),
            ):
                rate, channels, blocks = sound.samplerate, sound.channels, []
                if not SLOWEST <= rate <= FASTEST:
                    raise AudioError(
                        f"{path}: claims a sampling rate of {rate} Hz; expected {SLOWEST} to {FASTEST}"
                    )
                while len(block := sound.read(2**16 // channels, "float32", always_2d=True)):
                    blocks.append(block.mean(axis=1) if mix else block)
                    if len(blocks) * 2**16 > 2**17 + MOST_PER_BYTE * path.stat().st_size:
                        raise AudioError(
                            f"{path}: decodes without an end; expected a whole sound file"
                        )
                waveform = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    except (soundfile.SoundFileError, OSError, TypeError, MemoryError) as error:
        why = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(
            f"{path}: does not decode ({why}); expected wav, flac, ogg, NIST SPHERE"
        ) from None
    if not len(waveform):
        raise AudioError(f"{path}: holds no samples; expected at least one")
    waveform = resample(waveform, rate, new_rate or rate)
    if not np.isfinite(waveform).all():
        raise AudioError(
            f"{path}: holds samples that are infinite, too large or not numbers; expected finite ones"
        )
    return waveform, rate, channels


def load(path: str | Path, rate: int = SAMPLE_RATE) -> np.ndarray:
    """The waveform of a sound file (samples,), mono float32, at `rate` Hz. AudioError as `read` raises it."""
    return read(path, rate)[0]


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """n samples (n, …) at `rate` Hz → (⌈n·new_rate/rate⌉, …) at `new_rate` Hz, by a polyphase low-pass filter."""
    if rate == new_rate:
        return waveform
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    window = low_pass(max(up, down)).astype(waveform.dtype)
    return resample_poly(waveform, up, down, window=window).astype(np.float32)


@lru_cache(32)
def low_pass(factor: int) -> np.ndarray:
    """A filter that keeps 1/factor of the frequencies: `resample_poly`'s own, which it designs anew at every call."""
    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0))


def write(path: str | Path, waveform: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write a waveform (samples,) or (samples, channels) as 16-bit wav, scaled down to full scale where its peak is
    above 1. AudioError where a sample is not finite or the file cannot be written."""
    path = Path(path)
    waveform = np.asarray(waveform, dtype=np.float64)
    peak = np.abs(waveform).max(initial=0.0)
    if not np.isfinite(peak):
        raise AudioError(
            f"{path}: not written, samples are infinite or not numbers; expected finite ones"
        )
    samples = np.rint(waveform / max(peak, 1.0) * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)
    try:
        with atomic_write(path) as beside:
            soundfile.write(beside, samples, rate, format="WAV", subtype="PCM_16")
    except soundfile.SoundFileError as error:  # a full disk
        raise AudioError(f"{path}: could not be written ({error})") from None


def trim_bounds(waveform: np.ndarray, threshold_db: float = 30.0) -> tuple[int, int]:
    """Where speech starts and stops, in samples: waveform[start:stop] is without the silence at both ends. It goes from
    the first to the last frame (2048 samples around every 512th) whose level, the RMS, is above the highest one minus
    `threshold_db`, the last counted with its hop; (0, 0) for digital silence."""
    n, hop = len(waveform), 512
    energy_before = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
    centres = np.arange(1 + n // hop) * hop
    energy = energy_before[(centres + 1024).clip(0, n)] - energy_before[(centres - 1024).clip(0, n)]
    if energy.max() == 0:
        return 0, 0
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-threshold_db / 10))
    return int(loud[0] * hop), int(min(n, (loud[-1] + 1) * hop))


@lru_cache
@torch.inference_mode(False)  # else a window first needed in inference could not serve in training
def _window(shape: str, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The window (length,), made once for each device and precision."""
    n = torch.arange(length, dtype=torch.float64)
    if shape == "sine":
        window = torch.sin(torch.pi * (n + 0.5) / length)
    else:
        window = 0.54 - 0.46 * torch.cos(2 * torch.pi * n / length)
    return window.to(device, dtype)


def _power(spectrum: Tensor) -> Tensor:
    return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)


@dataclass(frozen=True)
class STFT:
    """Short-time Fourier transform of real waveforms and its inverse, in the precision and on the device of what they
    are given. window_length and hop are in samples; window is "sine", sin π(n+½)/N as in the DVAE papers, or "hamming".
    ValueError where the window is odd or the hop longer than half of it: waveforms could not be reconstructed."""

    window_length: int = 1024
    hop: int = 256
    window: str = "sine"

    def __post_init__(self):
        if self.window_length % 2 or not 0 < self.hop <= self.window_length // 2:
            what = f"a window of {self.window_length} with a hop of {self.hop} samples"
            raise ValueError(
                f"{what} cannot be inverted; expected an even window and a hop of at most half of it"
            )
        if self.window not in ("sine", "hamming"):
            raise ValueError(f"window {self.window!r} is unknown; expected 'sine' or 'hamming'")

    @property
    def bins(self) -> int:
        """Frequencies from 0 to half the sampling rate, both included."""
        return self.window_length // 2 + 1

    @property
    def energy(self) -> float:
        """Σ of the squares of the window: what white noise of variance 1 has as its mean power."""
        return float(
            _window(self.window, self.window_length, torch.device("cpu"), torch.float64)
            .square()
            .sum()
        )

    def frames(self, samples: int) -> int:
        """How many frames `analyse` makes of so many samples: up to the first centre past the last sample."""
        return 1 + -(-samples // self.hop)

    def samples(self, frames: int) -> int:
        """How long a crop has to be for `power` to make exactly so many frames of it."""
        return self.window_length + (frames - 1) * self.hop

    def analyse(self, waveform: Tensor) -> Tensor:
        """Waveforms (..., samples) → complex spectra (..., frames, bins), frames centred."""
        return torch.fft.rfft(self.windowed(waveform))

    def power(self, crop: Tensor) -> Tensor:
        """Crops (..., samples) → |STFT|² (..., frames, bins), float32, frames not centred, nothing padded. At least
        POWER_FLOOR: the Itakura-Saito divergence to a power of 0 has no minimum."""
        return (
            _power(torch.fft.rfft(self.windowed(crop, centred=False)))
            .float()
            .clamp_min(POWER_FLOOR)
        )

    def windowed(self, waveform: Tensor, centred: bool = True) -> Tensor:
        """Waveforms (..., samples) → frames (..., frames, window_length), multiplied by the window."""
        if centred:
            before, n = self.window_length // 2, waveform.shape[-1]
            waveform = F.pad(waveform, (before, self.samples(self.frames(n)) - before - n))
        window = _window(self.window, self.window_length, waveform.device, waveform.dtype)
        return waveform.unfold(-1, self.window_length, self.hop) * window

    def synthesise(self, spectrum: Tensor, length: int | None = None) -> Tensor:
        """Complex spectra (..., frames, bins) as `analyse` makes them → waveforms (..., length), whose STFT is nearest
        to the spectrum in the least-squares sense (Griffin & Lim 1984, eq. 6): windowed inverse transforms, overlapped
        and added, over the sum of the squared windows. `length` defaults to the longest; ValueError where it does not
        have as many frames as the spectrum."""
        frames, before = spectrum.shape[-2], self.window_length // 2
        length = (frames - 1) * self.hop if length is None else length
        if self.frames(length) != frames:
            raise ValueError(
                f"{length} samples have {self.frames(length)} frames, the spectrum has {frames}"
            )
        pieces = torch.fft.irfft(spectrum, self.window_length)
        window = _window(self.window, self.window_length, pieces.device, pieces.dtype)
        total = self._overlap_add((pieces * window).reshape(-1, frames, self.window_length))
        weight = self._overlap_add(window.square().expand(1, frames, -1))
        kept = slice(before, before + length)
        return (total[:, kept] / weight[:, kept]).reshape(*spectrum.shape[:-2], length)

    def _overlap_add(self, pieces: Tensor) -> Tensor:
        """(batch, frames, window_length) → (batch, samples)"""
        frames, hops = pieces.shape[1], -(-self.window_length // self.hop)
        pieces = F.pad(pieces, (0, hops * self.hop - self.window_length)).unflatten(
            -1, (hops, self.hop)
        )
        total = pieces.new_zeros(len(pieces), frames + hops - 1, self.hop)
        for k in range(hops):
            total[:, k : k + frames] += pieces[:, :, k]
        return total.flatten(1)[:, : self.samples(frames)]


def resynthesise(log_variance: Tensor, spectrum: Tensor, stft: STFT, length: int) -> Tensor:
    """√(e^l) with the phase of the input: log-variance and spectrum (..., frames, bins) → (..., length)."""
    return stft.synthesise(torch.polar(torch.exp(log_variance / 2), spectrum.angle()), length)


@torch.no_grad()
def griffin_lim(
    power: Tensor, stft: STFT, iterations=60, momentum=0.99, length=None, generator=None
) -> Tensor:
    """Waveforms (..., length) whose |STFT|² is about `power` (..., frames, bins). Griffin & Lim, Signal estimation from
    modified short-time Fourier transform, 1984, in the faster form of Perraudin, Balazs & Søndergaard, A fast Griffin-
    Lim algorithm, 2013: from random phases, drawn by `generator`,

        c_n = P₁ P₂ t_{n−1},    t_n = c_n + α (c_n − c_{n−1}),

    where P₂ imposes the magnitudes, P₁ goes to a waveform and back, and α is the momentum (0: the original). `length`
    is as in `STFT.synthesise`. `generator`: a torch.Generator, or one for each of `power` (batch, frames, bins), so
    that a waveform is the same in every batch; ValueError where their numbers differ."""

    def impose(estimate: Tensor) -> Tensor:
        scale = magnitude * _power(estimate).clamp_min(torch.finfo(power.dtype).tiny).rsqrt()
        return torch.complex(estimate.real * scale, estimate.imag * scale)

    magnitude = power.sqrt()
    parts, generators = (
        (power, generator) if isinstance(generator, Sequence) else ([power], [generator])
    )
    if len(generators) != len(parts):
        raise ValueError(
            f"{len(generators)} generators for {len(power)} spectra; expected one for each, or one"
        )
    drawn = zip([part.shape for part in parts], generators, strict=True)
    turns = [
        torch.rand(n, generator=one, device=(one or power).device, dtype=power.dtype)
        for n, one in drawn
    ]
    turns = torch.stack(turns).view_as(power).to(power.device)
    estimate = torch.polar(torch.ones_like(power), 2 * torch.pi * turns)
    consistent = torch.zeros_like(estimate)
    for _ in range(iterations):
        previous = consistent
        consistent = stft.analyse(stft.synthesise(impose(estimate), length))
        estimate = torch.lerp(previous, consistent, 1 + momentum)
    return stft.synthesise(impose(estimate), length)


# The frames of the FHVAE paper's features: 25 ms Hamming windows, every 10 ms.
FEATURE_STFT = STFT(window_length=400, hop=160, window="hamming")


@lru_cache
@torch.inference_mode(False)
def _mel_filters(bins: int, frequencies: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Triangles (frequencies, bins) from 20 to 8000 Hz, each from its left neighbour's centre to its right one's."""
    hertz = torch.linspace(0, SAMPLE_RATE / 2, frequencies, dtype=torch.float64)
    mel = 1127 * torch.log1p(hertz / 700)
    lowest, highest = 1127 * math.log1p(20 / 700), 1127 * math.log1p(SAMPLE_RATE / 2 / 700)
    spacing = (highest - lowest) / (bins + 1)
    centres = lowest + spacing * torch.arange(1, bins + 1, dtype=torch.float64)
    return (1 - (mel[:, None] - centres).abs() / spacing).clamp(min=0).to(device, dtype)


def fbank(waveform: Tensor, bins: int = 80, centred: bool = True) -> Tensor:
    """Log mel filter bank: waveforms (..., samples) at 16 kHz → ln energies (..., frames, bins). The power spectrum of
    the frames of FEATURE_STFT (`centred=False` for crops), triangles evenly spaced on the mel scale 1127 ln(1 + f/700)
    from 20 to 8000 Hz, the natural logarithm. The transform has 1024 points, since with 400 the lowest of 80 triangles
    would rest on a single frequency each. No pre-emphasis: it would be an offset for each bin, which normalising takes
    out again. Hsu, Zhang & Glass, Unsupervised learning of disentangled and interpretable representations from
    sequential data, 2017, section 4."""
    power = _power(torch.fft.rfft(FEATURE_STFT.windowed(waveform, centred), 1024))
    energy = power @ _mel_filters(bins, power.shape[-1], power.device, power.dtype)
    return energy.clamp(min=POWER_FLOOR).log()


def log_magnitude(waveform: Tensor, centred: bool = True) -> Tensor:
    """Log-magnitude spectrum: waveforms (..., samples) at 16 kHz → ln |STFT| (..., frames, 200). The frames of
    FEATURE_STFT (`centred=False` for crops), and of its 201 bins all but the first: 0 Hz is no sound."""
    power = _power(torch.fft.rfft(FEATURE_STFT.windowed(waveform, centred)))
    return power[..., 1:].clamp(min=POWER_FLOOR).log() / 2


def log_magnitude_to_power(log_magnitude: Tensor) -> Tensor:
    """ln |STFT| (..., frames, 200) → |STFT|² (..., frames, 201), 0 at 0 Hz: undoes `log_magnitude`."""
    return F.pad((2 * log_magnitude).exp(), (1, 0))


def mfcc(waveform: Tensor, coefficients: int = 20, bins: int = 40) -> Tensor:
    """Mel-frequency cepstral coefficients: waveforms (..., samples) at 16 kHz → (..., frames, coefficients). The
    orthonormal discrete cosine transform (type II) of `fbank`, from the 0th coefficient on."""
    order = torch.arange(coefficients, dtype=torch.float64)
    cosines = torch.cos(
        torch.pi / bins * (torch.arange(bins, dtype=torch.float64)[:, None] + 0.5) * order
    )
    cosines *= torch.where(order == 0, 1 / bins, 2 / bins).sqrt()
    energy = fbank(waveform, bins)
    return energy @ cosines.to(energy)


def deltas(features: Tensor) -> Tensor:
    """Slopes of features (..., frames, dimensions) over time, the same shape, per frame: the least-squares line through
    five frames, d_t = Σ_k k (c_{t+k} − c_{t−k}) / 2 Σ_k k² with k = 1, 2. The first and the last frame are
    repeated beyond the ends."""
    frames = features.shape[-2]
    padded = torch.cat(
        [features[..., :1, :]] * 2 + [features] + [features[..., -1:, :]] * 2, dim=-2
    )
    shifted = [padded[..., k : k + frames, :] for k in range(5)]
    return (2 * (shifted[4] - shifted[0]) + shifted[3] - shifted[1]) / 10


def voiced_frames(waveform: Tensor, threshold_db: float = 30.0) -> Tensor:
    """Energy detector of speech: waveforms (..., samples) → which frames of FEATURE_STFT hold speech, (..., frames).
    Those whose energy is above the highest of the waveform minus `threshold_db`. None of digital silence. Kinnunen &
    Li, An overview of text-independent speaker recognition: from features to supervectors, 2010."""
    energy = FEATURE_STFT.windowed(waveform).square().sum(-1)
    return energy > energy.amax(-1, keepdim=True) * 10 ** (-threshold_db / 10)


def pitch(
    power: Tensor, stft: STFT, lowest: float = 75.0, highest: float = 400.0, voicing: float = 0.4
) -> Tensor:
    """Fundamental frequency of power spectra (..., frames, bins): Hz (..., frames), nan in frames without one. The
    autocorrelation is the inverse transform of the power spectrum; over that of the window, as in Boersma, Accurate
    short-term analysis of the fundamental frequency and the harmonics-to-noise ratio of a sampled sound, 1993. Its
    first peak within 10 % of the highest between the two frequencies (Hz), a parabola through three points, is the
    period; a frame whose peak is under `voicing` times the value at lag 0 has none. Periods over half a window cannot
    be seen."""
    window = _window(stft.window, stft.window_length, power.device, power.dtype)
    shortest = math.ceil(SAMPLE_RATE / highest)
    longest = min(int(SAMPLE_RATE / lowest), stft.window_length // 2 - 1)
    correlation, own = (
        torch.fft.irfft(p)[..., : longest + 2] for p in (power, _power(torch.fft.rfft(window)))
    )
    correlation = correlation / own
    correlation = correlation / correlation[..., :1].clamp_min(torch.finfo(power.dtype).tiny)
    before, here, after = (correlation[..., shortest + k : longest + k + 1] for k in (-1, 0, 1))
    peaks = torch.where((here >= before) & (here > after), here, 0)
    first = (peaks >= 0.9 * peaks.amax(-1, keepdim=True)).byte().argmax(-1, keepdim=True)
    before, here, after = (c.gather(-1, first) for c in (before, here, after))
    offset = (before - after) / (2 * (before - 2 * here + after)).clamp_max(
        -torch.finfo(power.dtype).tiny
    )
    hertz = SAMPLE_RATE / (shortest + first + offset)
    return torch.where(peaks.gather(-1, first) >= voicing, hertz, torch.nan)[..., 0]
