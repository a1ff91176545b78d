"""The built-in corpus: seeded synthetic speech whose ground truth is known.

A source-filter formant synthesiser after Klatt, "Software for a cascade/parallel formant
synthesizer", JASA 67 (1980). Words are drawn from a small grammar. `_timing` gives them phones with
durations; `articulate` makes control tracks, one value per millisecond; `render` makes the sound:
glottal pulses and aspiration noise through the vocal tract, plus shaped frication noise.
docs/data.md says more, and names the sources of the tables. The same seed gives the same samples,
bit for bit, with the same NumPy and SciPy on the same processor.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import convolve1d
from scipy.signal import lfilter

HERE = Path(__file__).parent
VERSION = 3  # raised whenever the samples change: part of the cache key of the corpus
SAMPLE_RATE = 16_000
MILLISECOND = SAMPLE_RATE // 1000  # samples per value of a control track
REFERENCE_LENGTH = 17.5  # cm, the vocal tract of the formant tables
SPLITS = ("train", "dev", "test")
CONDITIONS = ("clean", "noise", "channel", "both")
NOISES = ("white", "car", "babble", "restaurant")


class Phone(NamedTuple):
    """A row of phones.tsv. Durations in ms, frequencies in Hz, levels in dB relative to a vowel.
    All formants belong to a vocal tract of 17.5 cm and scale with its inverse."""

    manner: str
    duration: float  # inherent duration
    minimum: float  # shortest duration
    slope: float  # locus equation: how far F2 and F3 of a consonant follow those of the vowel beside it
    voicing: float
    frication: float
    release: float  # burst and voice onset time of a stop
    formants: tuple  # (F1, F2, F3): target of a monophthong, locus of a consonant
    bandwidths: tuple  # (B1, B2, B3)
    glide: tuple  # (F1, F2, F3) at the end of a diphthong, else empty
    noise: tuple  # ((peak, bandwidth, level), ...) of the frication; peak 0 stands for F2


def _numbers(cell: str) -> tuple[float, ...]:
    return tuple(map(float, cell.split()))


def _phone(manner: str, *cells: str) -> Phone:
    noise = tuple(_numbers(peak) for peak in cells[9].split(", ") if peak)
    return Phone(manner, *map(float, cells[:6]), *map(_numbers, cells[6:9]), noise)


_ROWS = [row.split("\t") for row in (HERE / "phones.tsv").read_text().splitlines()[1:]]
TABLE = {label: _phone(*cells) for label, *cells in _ROWS}
SCHWA = (500, 1500, 2500)  # the neutral tube: unstressed "ah"

# Each word with its pronunciation in ARPAbet; the digit is the stress of the syllable (1 primary, 0
# none).
_CATEGORIES = re.split(r"\n(?=\w)", (HERE / "vocabulary.txt").read_text().strip())
_WORDS = {
    category: {word: tuple(phones) for word, *phones in map(str.split, entries.split(","))}
    for category, entries in (line.split(":") for line in _CATEGORIES)
}
LEXICON = {word: phones for entries in _WORDS.values() for word, phones in entries.items()}
SENTENCES = (  # a comma is a pause
    "determiner adjective person verb determiner thing preposition determiner thing",
    "adverb , determiner person verb determiner adjective thing",
    "pronoun verb determiner adjective thing , conjunction pronoun verb determiner thing",
    "determiner person preposition determiner thing verb determiner thing adverb",
    "determiner adjective thing , determiner thing conjunction determiner person",
)


@dataclass(frozen=True)
class Speaker:
    """A voice, in the true values that make it."""

    name: str
    sex: str  # "F" or "M"
    split: str
    f0: float  # mean F0 of the voice, Hz
    f0_range: float  # factor on all F0 movements
    vocal_tract_length: float  # cm
    formant_factors: tuple[
        float, ...
    ]  # deviation of F1 ... F8 from the table, beside the vocal-tract length
    open_quotient: float  # part of the glottal cycle in which the glottis is open
    breathiness: float  # aspiration noise relative to voicing in a vowel, dB
    tilt: float  # attenuation of voicing at 3 kHz by the return phase of the glottal pulse, dB
    jitter: float  # standard deviation of the glottal period, relative
    shimmer: float  # standard deviation of the pulse amplitude, relative
    rate: float  # speaking rate, relative to the duration tables


class SyntheticUtterance(NamedTuple):
    """`phones` are (start, stop, label) in samples and cover the waveform without gaps."""

    name: str
    speaker: str
    split: str
    sex: str
    waveform: np.ndarray  # int16
    text: str
    phones: tuple[tuple[int, int, str], ...]
    condition: str = "clean"


class Segment(NamedTuple):
    """A phone in time (ms); `release` is the part of a stop after its closure."""

    label: str
    stress: str
    start: int
    stop: int
    release: int


class Tracks(NamedTuple):
    """What the articulators do: arrays with one value per millisecond, amplitudes linear."""

    segments: list[Segment]
    f0: np.ndarray  # Hz
    formants: np.ndarray  # (ms, formants), Hz
    bandwidths: np.ndarray  # (ms, formants), Hz
    nasal_pole: float  # Hz
    nasal_zero: np.ndarray  # Hz; equal to the nasal pole where the velum is closed
    tilt: np.ndarray  # dB at 3 kHz
    voicing: np.ndarray
    aspiration: np.ndarray
    loudness: np.ndarray  # of all three sources


def _make_speaker(seed: int, split: str, number: int) -> Speaker:
    """A woman where the number is even, else a man."""
    rng, sex = (
        np.random.default_rng([seed, SPLITS.index(split), number]),
        "M" if number % 2 else "F",
    )
    if sex == "F":
        mean, spread, lowest, highest, length = 205, 0.12, 165, 270, (14.9, 0.5)
        open_quotient, breathiness, tilt = (0.5, 0.75), (-32, -18), (0.5, 9)
    else:
        mean, spread, lowest, highest, length = 115, 0.15, 82, 158, (17.3, 0.6)
        open_quotient, breathiness, tilt = (0.4, 0.65), (-36, -22), (0.5, 7)
    f0 = float(np.clip(mean * np.exp(rng.normal(0, spread)), lowest, highest))
    f0_range, length = rng.uniform(0.8, 1.8), rng.normal(*length)
    formant_factors = tuple(np.exp(rng.normal(0, [0.02] * 3 + [0.03] * 5)).tolist())
    jitter, shimmer, rate = (0.004, 0.012), (0.02, 0.06), (0.85, 1.2)
    others = [
        rng.uniform(*between)
        for between in (open_quotient, breathiness, tilt, jitter, shimmer, rate)
    ]
    return Speaker(
        f"{split}-{number:02d}{sex}", sex, split, f0, f0_range, length, formant_factors, *others
    )


def make_speakers(seed: int = 0, train: int = 32, dev: int = 8, test: int = 8) -> list[Speaker]:
    """The speakers of each split, women and men alternating. A speaker depends on seed, split and
    number only."""
    counts = zip(SPLITS, (train, dev, test), strict=True)
    return [
        _make_speaker(seed, split, number) for split, count in counts for number in range(count)
    ]


def make_sentence(split: str, rng: Generator) -> list[str]:
    """Words and pauses (",") of a random sentence. No sentence occurs in two splits."""
    while True:
        parts = rng.choice(SENTENCES).split()
        words = [part if part == "," else rng.choice(list(_WORDS[part])).item() for part in parts]
        share = zlib.crc32(" ".join(words).encode()) % 10
        if split == ("dev" if share == 8 else "test" if share == 9 else "train"):
            return words


def _timing(speaker: Speaker, words: list[str], rng: Generator) -> list[Segment]:
    """The phones of a sentence. Durations after the rules of Klatt (1979): stress, final
    lengthening, clusters, voicing of the next consonant, number of syllables; voice onset times
    after Lisker and Abramson (1964)."""
    segments = []

    def add(label, duration, stress="", release=0.0):
        start = segments[-1].stop if segments else 0
        segments.append(
            Segment(label, stress, start, start + round(duration + release), round(release))
        )

    add("sil", rng.uniform(120, 250))
    for word, following_word in zip(words, [*words[1:], ","], strict=True):
        if word == ",":
            add("sil", rng.uniform(150, 350))
            continue
        symbols = LEXICON[word]
        nuclei = [i for i, symbol in enumerate(symbols) if symbol[-1].isdigit()]
        labels = [symbol.rstrip("01") for symbol in symbols]
        for i, label in enumerate(labels):
            phone, stress = TABLE[label], symbols[i][len(label) :]
            following = TABLE[labels[i + 1]] if i + 1 < len(labels) else None
            factor = np.clip(rng.normal(1, 0.07), 0.8, 1.2)
            if phone.manner == "vowel":
                factor *= (0.55 if stress == "0" else 1.0) * (0.85 if len(nuclei) > 1 else 1.0)
                if following is not None and following.frication > -np.inf:
                    voiceless = following.voicing == -np.inf
                    factor *= 0.75 if voiceless else 1.2 if following.manner == "fricative" else 1.0
            elif (i > 0 and i - 1 not in nuclei) or (following is not None and i + 1 not in nuclei):
                factor *= 0.7
            if following_word == "," and i >= nuclei[-1]:
                factor *= 1.4
            release = phone.release
            if phone.manner == "stop" and phone.voicing == -np.inf:
                if i > 0 and labels[i - 1] == "s":
                    release *= 0.25
                elif (
                    following is None or following.manner != "vowel" or symbols[i + 1].endswith("0")
                ):
                    release *= 0.5
            duration = phone.minimum + max(0.0, phone.duration * factor - phone.minimum)
            if phone.manner == "affricate":
                duration -= release  # the affricates of the table include their release
            add(label, duration / speaker.rate, stress, release / speaker.rate)
    add("sil", rng.uniform(150, 300))
    return segments


def _smooth(track: np.ndarray, width: int) -> np.ndarray:
    """Weighted moving average over a Hann window of `width` ms."""
    window = np.hanning(width + 2)[1:-1]
    return convolve1d(track, window / window.sum(), axis=0, mode="nearest")


def _targets(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """(F1, F2, F3) at the beginning and the end of a vowel, Hz."""
    phone = TABLE[segment.label]
    begin = SCHWA if segment.label == "ah" and segment.stress == "0" else phone.formants
    return np.array(begin, float), np.array(phone.glide or begin, float)


def _formant_targets(segments: list[Segment], length: int, rng: Generator) -> np.ndarray:
    """F1 to F3 of the reference vocal tract, (length, 3): loci and vowel targets, smoothly
    joined."""
    times, values = [], []
    for i, segment in enumerate(segments):
        if segment.label in ("sil", "hh"):  # shaped by their neighbours
            continue
        phone, duration = TABLE[segment.label], segment.stop - segment.start
        if phone.manner == "vowel":
            begin, end = _targets(segment)
            edges = (min(50, 0.35 * duration), (0.15 if phone.glide else 0.35) * duration)
        else:
            # Locus equation: F2 and F3 move from the locus towards the nearest vowel on either
            # side.
            before = [_targets(s)[1] for s in segments[:i] if s.stress][-1:]
            after = [_targets(s)[0] for s in segments[i + 1 :] if s.stress][:1]
            locus, slope = np.array(phone.formants, float), phone.slope * np.array([0, 1, 1])
            begin = locus + slope * ((before or after)[0] - locus)
            end = locus + slope * ((after or before)[0] - locus)
            edges = (
                (0.35 * duration,) * 2
                if phone.manner == "glide"
                else (min(10, 0.2 * duration),) * 2
            )
        times += [segment.start + edges[0], segment.stop - min(50, edges[1])]
        values += [begin * np.exp(rng.normal(0, 0.02, 3)), end * np.exp(rng.normal(0, 0.02, 3))]
    grid = np.arange(length)
    return _smooth(
        np.stack([np.interp(grid, times, column) for column in np.array(values).T], axis=1), 30
    )


def _f0_contour(speaker: Speaker, segments: list[Segment], rng: Generator) -> np.ndarray:
    """F0 in Hz, one value per ms: ln F0 = phrase and accent components (Fujisaki and Hirose
    1984)."""
    t = np.arange(segments[-1].stop) / 1000

    def phrase(start, alpha=3.0):
        x = np.maximum(t - start, 0)
        return alpha**2 * x * np.exp(-alpha * x)

    def accent(start, beta=20.0):
        x = np.maximum(t - start, 0)
        return np.minimum(1 - (1 + beta * x) * np.exp(-beta * x), 0.9)

    contour = np.zeros_like(t)
    for segment in segments[:-1]:
        start, stop = segment.start / 1000, segment.stop / 1000
        if segment.label == "sil":
            contour += rng.uniform(0.15, 0.3) * phrase(stop - 0.2)
            if start > 0:  # a pause follows a small rise
                contour += rng.uniform(0.05, 0.2) * (accent(start - 0.15) - accent(start + 0.02))
        elif segment.stress == "1":
            contour += rng.uniform(0.1, 0.35) * (accent(start - 0.05) - accent(stop - 0.03))
    contour -= rng.uniform(0.1, 0.25) * accent(segments[-1].start / 1000 - 0.25, beta=8.0)
    voiced = np.concatenate([np.arange(s.start, s.stop) for s in segments if s.stress])
    contour = speaker.f0_range * (contour - contour[voiced].mean()) + rng.normal(0, 0.03)
    return speaker.f0 * np.exp(contour)


def _amplitude(decibels):
    return 10.0 ** (np.asarray(decibels) / 20)


def articulate(speaker: Speaker, words: list[str], rng: Generator) -> Tracks:
    """Control tracks for a sentence: words of LEXICON (KeyError for any other), "," for a pause."""
    segments = _timing(speaker, words, rng)
    length = segments[-1].stop
    scale = REFERENCE_LENGTH / speaker.vocal_tract_length
    nominal = scale * 500 * (2 * np.arange(8) + 1)  # resonances of a uniform tube
    count = int(np.sum(nominal < 0.49 * SAMPLE_RATE))
    formants = np.tile(nominal[:count], (length, 1))
    formants[:, :3] = scale * _formant_targets(segments, length, rng)
    formants[:, 3:] *= (
        formants[:, 2:3] / nominal[2]
    ) ** 0.15  # as F4 with F3, Hillenbrand et al. (1995)
    formants *= np.array(speaker.formant_factors[:count])
    bandwidths = np.tile([100.0, 100, 150, 180, 250, 400, 500, 600][:count], (length, 1))
    nasal_pole = 270 * scale
    nasal_zero, tilt = np.full(length, nasal_pole), np.full(length, speaker.tilt)
    voicing, aspiration, loudness = np.zeros(length), np.zeros(length), np.zeros(length)
    for i, (label, stress, start, stop, release) in enumerate(segments):
        if label == "sil":
            beginning, loudness[start:stop] = stop, -30
            loudness[:start][-150:] -= 4
            continue
        phone, here = TABLE[label], slice(start, stop)
        bandwidths[here, :3] = phone.bandwidths
        voicing[here] = _amplitude(phone.voicing)
        # Stressed syllables are louder, a phrase grows softer and fades over its last 150 ms.
        loudness[here] = (0.0 if stress == "1" else -4.0) - 2e-3 * (start - beginning)
        if phone.manner == "nasal":
            nasal_zero[here] = 450 * scale
        elif phone.manner == "fricative":
            tilt[here] += 10
        elif label == "hh":
            aspiration[here] = _amplitude(-12)
        elif phone.manner in ("stop", "affricate"):
            tilt[here] += (
                25  # only the low frequencies of voicing pass the closed lips or tongue: voice bar
            )
            if segments[i - 1].label == "sil":
                voicing[start : stop - release] = 0  # no voice bar after a pause
            if phone.manner == "stop" and phone.voicing == -np.inf:
                aspiration[stop - release : stop] = _amplitude(-14)
    loudness = _smooth(loudness, 80)
    tilt = _smooth(tilt - 0.4 * loudness, 20)  # soft voices close the glottis less abruptly
    bandwidths, nasal_zero = _smooth(bandwidths, 30), _smooth(nasal_zero, 60)
    voicing, aspiration, loudness = (
        _smooth(voicing, 16),
        _smooth(aspiration, 12),
        _amplitude(loudness),
    )
    f0 = _f0_contour(speaker, segments, rng)
    return Tracks(
        segments,
        f0,
        formants,
        bandwidths,
        nasal_pole,
        nasal_zero,
        tilt,
        voicing,
        aspiration,
        loudness,
    )


def _resonator(frequency: np.ndarray, bandwidth: np.ndarray | float) -> np.ndarray:
    """Coefficients (..., 3) of 1 - 2 r cos(2 pi F) z^-1 + r^2 z^-2, scaled to 1 at frequency 0."""
    radius = np.exp(-np.pi * np.asarray(bandwidth) / SAMPLE_RATE)
    middle = -2 * radius * np.cos(2 * np.pi * frequency / SAMPLE_RATE)
    coefficients = np.stack(np.broadcast_arrays(1.0, middle, radius**2), axis=-1)
    return coefficients / coefficients.sum(-1, keepdims=True)


def _tract(tracks: Tracks, rows: np.ndarray, n: int) -> np.ndarray:
    """Frequency response (rows, n / 2 + 1) of the vocal tract at `rows` (ms): a cascade of
    resonators."""
    sections = _resonator(tracks.formants[rows], tracks.bandwidths[rows])
    poles = np.broadcast_to(_resonator(tracks.nasal_pole, 100.0), (len(rows), 3))
    for a, b, c in sections.transpose(1, 2, 0)[..., None]:  # times (a + b z^-1 + c z^-2)
        padded = np.pad(poles, ((0, 0), (2, 2)))
        poles = a * padded[:, 2:] + b * padded[:, 1:-1] + c * padded[:, :-2]
    losses = np.cos(
        np.pi * np.arange(n // 2 + 1) / n
    )  # towards 8 kHz, where the cascade leaves out formants
    return losses * rfft(_resonator(tracks.nasal_zero[rows], 100.0), n) / rfft(poles, n)


def _glottal_pulse(open_time: np.ndarray, tilt: np.ndarray, n: int) -> np.ndarray:
    """Spectra (pulses, n / 2 + 1) of the KLGLOTT88 flow derivative (Klatt and Klatt 1990), closure
    at time 0. In the open phase, x = t / open_time from 0 to 1, the derivative of the flow is 2x -
    3x^2: it ends at -1 with the closure. The return phase is a one-pole low-pass: `tilt` dB at 3
    kHz. open_time in s."""
    omega = 2 * np.pi * np.arange(1, n // 2 + 1) * SAMPLE_RATE / n
    s = 1j * omega * open_time[:, None]
    first = np.exp(s) - 1 - s  # the Fourier integrals of x and x^2 by parts, without dividing twice
    pulse = open_time[:, None] * (2 * first - 3 * (2 * first - s * s) / s) / (s * s)
    cutoff = 2 * np.pi * 3000 / np.sqrt(10 ** (tilt[:, None] / 10) - 1)
    return np.pad(
        pulse / (1 + 1j * omega / cutoff), ((0, 0), (1, 0))
    )  # no flow derivative at frequency 0


def _overlap_add(frames: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Sum of frames (count, n) laid at `starts`; what falls outside [0, length) is dropped."""
    n = frames.shape[1]
    out = np.zeros(length + 2 * n)
    for frame, start in zip(frames, starts, strict=True):
        out[start + n : start + 2 * n] += frame
    return out[n : n + length]


def _voiced(speaker: Speaker, tracks: Tracks, phase: np.ndarray, rng: Generator) -> np.ndarray:
    """Glottal pulses through the vocal tract."""
    n, lead = 1024, 256
    cycles = np.arange(1, int(phase[-1]))
    instants = np.interp(
        cycles + rng.normal(0, speaker.jitter, len(cycles)), phase, np.arange(len(phase))
    )
    rows = (instants / MILLISECOND).astype(int)
    amplitude = tracks.voicing[rows] * (1 + rng.normal(0, speaker.shimmer, len(cycles)))
    sounding = amplitude > 1e-3
    instants, rows, amplitude = instants[sounding], rows[sounding], amplitude[sounding]
    spectrum = _glottal_pulse(speaker.open_quotient / tracks.f0[rows], tracks.tilt[rows], n)
    starts = np.floor(instants).astype(int) - lead
    delay = (instants - starts)[:, None] * np.arange(n // 2 + 1)
    spectrum *= np.exp(-2j * np.pi / n * delay) * amplitude[:, None]
    return _overlap_add(irfft(spectrum * _tract(tracks, rows, n), n), starts, len(phase))


def _aspirated(
    tracks: Tracks, envelope: np.ndarray, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """White noise of the given envelope through the vocal tract, and the gain of the tract at each
    frame."""
    n, hop = 512, 5 * MILLISECOND
    noise = np.pad(envelope * rng.standard_normal(len(envelope)), hop)
    starts = np.arange(0, len(envelope), hop)
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)
    response = _tract(tracks, np.minimum(starts // MILLISECOND, len(tracks.f0) - 1), n)
    frames = rfft(noise[starts[:, None] + np.arange(2 * hop)] * window, n) * response
    return _overlap_add(irfft(frames, n), starts - hop, len(envelope)), np.mean(
        np.abs(response) ** 2, axis=1
    )


def _frication(
    speaker: Speaker, tracks: Tracks, modulation: np.ndarray, rng: Generator
) -> np.ndarray:
    """Noise of fricatives, bursts and affricates: a sum of resonances, their levels relative to a
    vowel."""
    out, scale = np.zeros(len(modulation)), REFERENCE_LENGTH / speaker.vocal_tract_length
    for label, _, start, stop, release in tracks.segments:
        if label == "sil" or TABLE[label].frication == -np.inf:
            continue
        phone = TABLE[label]
        start = stop - release if release else start
        if phone.manner == "stop":
            stop = min(stop + 5, start + (10 if label in "pb" else 16 if label in "td" else 24))
            corners = [0, 0.5, 3, stop - start]  # ms: onset, peak, beginning and end of the decay
        else:
            corners = np.multiply([0, 0.08 if release else 0.35, 0.75, 1], stop - start)
        n = (stop - start) * MILLISECOND
        frequency = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
        power = np.zeros_like(frequency)
        for peak, bandwidth, level in phone.noise:
            peak = peak * scale or tracks.formants[min(stop, len(tracks.f0)) - 1, 1]
            width = (bandwidth * frequency) ** 2
            power += 10 ** (level / 10) * (width / ((peak**2 - frequency**2) ** 2 + width)) ** 2
        noise = irfft(rfft(rng.standard_normal(n)) * np.sqrt(power / power.mean()), n)
        here = slice(start * MILLISECOND, stop * MILLISECOND)
        envelope = np.interp(np.arange(n) / MILLISECOND, corners, [0, 1, 1, 0])
        if phone.voicing > -np.inf:
            envelope *= modulation[here]
        out[here] += _amplitude(phone.frication) * envelope * noise
    return out


def render(speaker: Speaker, tracks: Tracks, rng: Generator) -> np.ndarray:
    """Sound of control tracks, float64 at SAMPLE_RATE with max |s| = 1."""
    length = len(tracks.f0) * MILLISECOND
    time = np.arange(length) / MILLISECOND
    phase = (
        np.cumsum(np.repeat(tracks.f0, MILLISECOND)) / SAMPLE_RATE
    )  # the glottis closes at whole cycles
    amplitudes = tracks.voicing, tracks.aspiration, tracks.loudness
    voicing, aspiration, loudness = (
        np.interp(time, np.arange(len(track)), track) for track in amplitudes
    )
    vowels = np.repeat(
        [s.stress != "" for s in tracks.segments], [s.stop - s.start for s in tracks.segments]
    )
    # Noise is strongest around the closure; the levels of noise are relative to the voicing of
    # vowels.
    modulation = 1 + 0.5 * np.cos(2 * np.pi * phase)
    breath = voicing * _amplitude(speaker.breathiness) * modulation
    voiced = _voiced(speaker, tracks, phase, rng)
    aspirated, gain = _aspirated(tracks, aspiration + breath, rng)
    voiced /= np.sqrt(np.mean(voiced[np.repeat(vowels, MILLISECOND)] ** 2))
    aspirated /= np.sqrt(np.mean(gain[vowels[::5]]))
    speech = loudness * (voiced + aspirated + _frication(speaker, tracks, modulation, rng))
    floor = lfilter([1.0], [1.0, -0.8], rng.standard_normal(length))  # room and microphone
    speech += floor * (_amplitude(rng.uniform(-50, -40)) / floor.std())
    return speech / np.abs(speech).max()


def _babble(n: int, rng: Generator) -> np.ndarray:
    """Eight talkers of speech-shaped noise, each modulated at a syllable rate of 3 to 6 Hz."""
    talkers = lfilter(
        [1.0], [1.0, -0.85], lfilter([1.0, -1.0], [1.0, -0.97], rng.standard_normal((8, n)))
    )
    rate, start = rng.uniform(3, 6, (8, 1)), rng.uniform(0, 2 * np.pi, (8, 1))
    return (talkers * (1 + np.sin(2 * np.pi * rate * np.arange(n) / SAMPLE_RATE + start))).sum(0)


def make_noise(kind: str, n: int, rng: Generator, babble: Callable = _babble) -> np.ndarray:
    """One of NOISES, (n,); restaurant is the clatter of dishes over babble."""
    if kind == "white":
        return rng.standard_normal(n)
    if kind == "car":
        return lfilter([1.0], [1.0, -rng.uniform(0.9, 0.98)], rng.standard_normal(n))
    voices = babble(n, rng)
    if kind == "babble":
        return voices
    # Dishes: about four blows a second, each ringing at 2 to 6 kHz and gone after some 30 ms.
    blows = rng.integers(n, size=1 + rng.poisson(4 * n / SAMPLE_RATE))
    frequencies, decays = rng.uniform(2e3, 6e3, len(blows)), rng.uniform(60, 250, len(blows))
    clatter, t = np.zeros(n + SAMPLE_RATE // 5), np.arange(SAMPLE_RATE // 5) / SAMPLE_RATE
    for start, frequency, decay in zip(blows, frequencies, decays, strict=True):
        clatter[start : start + len(t)] += (
            rng.exponential() * np.exp(-decay * t) * np.sin(2 * np.pi * frequency * t)
        )
    return clatter[:n] + 0.5 * voices * np.sqrt(np.mean(clatter[:n] ** 2) / np.mean(voices**2))


def at_ratio(noise: np.ndarray, speech: np.ndarray, ratio: float) -> np.ndarray:
    """The noise (n,), as loud as gives speech (n,) this signal-to-noise ratio in dB."""
    return noise * np.sqrt(np.mean(speech**2) / np.mean(noise**2)) * _amplitude(-ratio)


def apply_condition(
    waveform: np.ndarray, condition: str, rng: Generator, babble: Callable = _babble
) -> np.ndarray:
    """An utterance (samples,) with one of CONDITIONS over it; its type and peak are kept. "channel"
    is a spectral tilt of up to 6 dB per octave either way, a low cut, three peaks or dips of up to
    10 dB; "noise" is one of NOISES at a signal-to-noise ratio of 5 to 15 dB; "both" is the channel,
    then the noise. `babble(samples, rng)` → (samples,) makes the voices of others. ValueError where
    the condition is unknown."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r}: must be one of {', '.join(CONDITIONS)}")
    if condition == "clean":
        return waveform
    peak, y = np.abs(waveform.astype(np.float64)).max(), waveform.astype(np.float64)
    if condition != "noise":
        padded = next_fast_len(2 * len(y), real=True)
        octaves = np.log2(np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE), 50) / 1000)
        gain = rng.uniform(-6, 6) * octaves
        gain -= 12 * np.maximum(np.log2(rng.uniform(80, 300) / 1000) - octaves, 0)
        for _ in range(3):
            centre, width = rng.uniform(-2, 2.8), rng.uniform(0.2, 0.6)
            gain += rng.uniform(-10, 10) * np.exp(-0.5 * ((octaves - centre) / width) ** 2)
        y = irfft(rfft(y, padded) * _amplitude(gain), padded)[: len(y)]
    if condition != "channel":
        kind, ratio = rng.choice(NOISES).item(), rng.uniform(5, 15)
        y = y + at_ratio(make_noise(kind, len(y), rng, babble), y, ratio)
    y *= peak / np.abs(y).max()
    return (np.rint(y) if np.issubdtype(waveform.dtype, np.integer) else y).astype(waveform.dtype)


def generate(seed=0, speakers=(32, 8, 8), utterances=10) -> Iterator[SyntheticUtterance]:
    """The corpus: `utterances` by each of `speakers` (train, dev, test), one at a time. An
    utterance depends on the seed, its split, and its own and its speaker's number, not on the size
    of the corpus."""
    for split, count in zip(SPLITS, speakers, strict=True):
        for number, k in itertools.product(range(count), range(utterances)):
            speaker = _make_speaker(seed, split, number)
            rng = np.random.default_rng([seed, SPLITS.index(split), number, k, 0])
            words = make_sentence(split, rng)
            tracks = articulate(speaker, words, rng)
            samples = np.rint(0.99 * 32767 * render(speaker, tracks, rng)).astype(np.int16)
            phones = tuple(
                (s.start * MILLISECOND, s.stop * MILLISECOND, s.label) for s in tracks.segments
            )
            text, name = " ".join(word for word in words if word != ","), f"{speaker.name}-{k:02d}"
            yield SyntheticUtterance(name, speaker.name, split, speaker.sex, samples, text, phones)
