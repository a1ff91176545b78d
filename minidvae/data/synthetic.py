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
    slope: float  # locus equation: change of F2 and F3 with those of the vowel
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


def _read_vocabulary(path: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return category → word → its pronunciation in ARPAbet, in which a digit is the stress of the
    syllable (1 primary, 0 none)."""
    categories = {}
    for line in re.split(r"\n(?=\w)", path.read_text().strip()):
        category, entries = line.split(":")
        words = {}
        for entry in entries.split(","):
            word, *symbols = entry.split()
            words[word] = tuple(symbols)
        categories[category] = words
    return categories


_WORDS = _read_vocabulary(HERE / "vocabulary.txt")
LEXICON = {}
for _entries in _WORDS.values():
    LEXICON |= _entries
BURST_DURATIONS = {"p": 10, "b": 10, "t": 16, "d": 16, "k": 24, "g": 24}  # ms
SENTENCES = (  # A comma is a pause.
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
    """Control tracks of the articulators: arrays with one value per millisecond, amplitudes
    linear."""

    segments: list[Segment]
    f0: np.ndarray  # Hz
    formants: np.ndarray  # (ms, formants), Hz
    bandwidths: np.ndarray  # (ms, formants), Hz
    nasal_pole: float  # Hz
    nasal_zero: np.ndarray  # Hz; equal to the nasal pole where the velum is closed
    tilt: np.ndarray  # dB at 3 kHz
    voicing: np.ndarray
    aspiration: np.ndarray
    loudness: np.ndarray  # a factor on voicing, aspiration and frication


def _make_speaker(seed: int, split: str, number: int) -> Speaker:
    """Return a woman where the number is even, else a man."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    if number % 2 == 0:
        sex = "F"
        mean_f0, f0_spread, lowest_f0, highest_f0 = 205, 0.12, 165, 270
        mean_length, length_spread = 14.9, 0.5
        open_quotients = (0.5, 0.75)
        breathiness = (-32, -18)
        tilts = (0.5, 9)
    else:
        sex = "M"
        mean_f0, f0_spread, lowest_f0, highest_f0 = 115, 0.15, 82, 158
        mean_length, length_spread = 17.3, 0.6
        open_quotients = (0.4, 0.65)
        breathiness = (-36, -22)
        tilts = (0.5, 7)
    f0 = float(np.clip(mean_f0 * np.exp(rng.normal(0, f0_spread)), lowest_f0, highest_f0))
    f0_range = rng.uniform(0.8, 1.8)
    length = rng.normal(mean_length, length_spread)
    formant_factors = tuple(np.exp(rng.normal(0, [0.02] * 3 + [0.03] * 5)).tolist())
    return Speaker(
        name=f"{split}-{number:02d}{sex}",
        sex=sex,
        split=split,
        f0=f0,
        f0_range=f0_range,
        vocal_tract_length=length,
        formant_factors=formant_factors,
        open_quotient=rng.uniform(*open_quotients),
        breathiness=rng.uniform(*breathiness),
        tilt=rng.uniform(*tilts),
        jitter=rng.uniform(0.004, 0.012),
        shimmer=rng.uniform(0.02, 0.06),
        rate=rng.uniform(0.85, 1.2),
    )


def make_speakers(seed: int = 0, train: int = 32, dev: int = 8, test: int = 8) -> list[Speaker]:
    """Return the speakers of each split, women and men alternating. A speaker depends on seed,
    split and number only."""
    speakers = []
    for split, count in zip(SPLITS, (train, dev, test), strict=True):
        for number in range(count):
            speakers.append(_make_speaker(seed, split, number))
    return speakers


def make_sentence(split: str, rng: Generator) -> list[str]:
    """Return words and pauses (",") of a random sentence. No sentence occurs in two splits."""
    while True:
        words = []
        for part in rng.choice(SENTENCES).split():
            if part == ",":
                words.append(part)
            else:
                words.append(rng.choice(list(_WORDS[part])).item())
        tenth = zlib.crc32(" ".join(words).encode()) % 10
        if split == {8: "dev", 9: "test"}.get(tenth, "train"):
            return words


def _timing(speaker: Speaker, words: list[str], rng: Generator) -> list[Segment]:
    """Return the phones of a sentence. Durations after the rules of Klatt (1979): stress, final
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
            phone = TABLE[label]
            stress = symbols[i][len(label) :]
            following = TABLE[labels[i + 1]] if i + 1 < len(labels) else None
            factor = np.clip(rng.normal(1, 0.07), 0.8, 1.2)
            if phone.manner == "vowel":
                factor *= (0.55 if stress == "0" else 1.0) * (0.85 if len(nuclei) > 1 else 1.0)
                if following is not None and following.frication > -np.inf:
                    if following.voicing == -np.inf:
                        factor *= 0.75
                    elif following.manner == "fricative":
                        factor *= 1.2
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
    """Return the weighted moving average over a Hann window of `width` ms."""
    window = np.hanning(width + 2)[1:-1]
    return convolve1d(track, window / window.sum(), axis=0, mode="nearest")


def _targets(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """Return (F1, F2, F3) at the beginning and the end of a vowel, Hz."""
    phone = TABLE[segment.label]
    begin = SCHWA if segment.label == "ah" and segment.stress == "0" else phone.formants
    return np.array(begin, float), np.array(phone.glide or begin, float)


def _formant_targets(segments: list[Segment], length: int, rng: Generator) -> np.ndarray:
    """Return F1 to F3 of the reference vocal tract, (length, 3): loci and vowel targets, smoothly
    joined."""
    times = []
    values = []
    for i, segment in enumerate(segments):
        if segment.label in ("sil", "hh"):  # shaped by their neighbours
            continue
        phone = TABLE[segment.label]
        duration = segment.stop - segment.start
        if phone.manner == "vowel":
            begin, end = _targets(segment)
            edges = (min(50, 0.35 * duration), (0.15 if phone.glide else 0.35) * duration)
        else:
            # Locus equation: F2 and F3 move from the locus towards the nearest vowel on either
            # side.
            before = [_targets(s)[1] for s in segments[:i] if s.stress][-1:]
            after = [_targets(s)[0] for s in segments[i + 1 :] if s.stress][:1]
            locus = np.array(phone.formants, float)
            slope = phone.slope * np.array([0, 1, 1])
            begin = locus + slope * ((before or after)[0] - locus)
            end = locus + slope * ((after or before)[0] - locus)
            edge = 0.35 * duration if phone.manner == "glide" else min(10, 0.2 * duration)
            edges = (edge, edge)
        times += [segment.start + edges[0], segment.stop - min(50, edges[1])]
        values += [begin * np.exp(rng.normal(0, 0.02, 3)), end * np.exp(rng.normal(0, 0.02, 3))]
    grid = np.arange(length)
    tracks = [np.interp(grid, times, column) for column in np.array(values).T]
    return _smooth(np.stack(tracks, axis=1), 30)


def _f0_contour(speaker: Speaker, segments: list[Segment], rng: Generator) -> np.ndarray:
    """Return F0 in Hz, one value per ms: ln F0 = phrase and accent components (Fujisaki and Hirose
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
        start = segment.start / 1000
        stop = segment.stop / 1000
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
    """Return the control tracks of a sentence: words of LEXICON (KeyError for any other), "," for a
    pause."""
    segments = _timing(speaker, words, rng)
    length = segments[-1].stop
    scale = REFERENCE_LENGTH / speaker.vocal_tract_length
    nominal = scale * 500 * (2 * np.arange(8) + 1)  # resonances of a uniform tube
    count = int(np.sum(nominal < 0.49 * SAMPLE_RATE))
    formants = np.tile(nominal[:count], (length, 1))
    formants[:, :3] = scale * _formant_targets(segments, length, rng)
    # F4 follows F3 in this way in the data of Hillenbrand et al. (1995).
    formants[:, 3:] *= (formants[:, 2:3] / nominal[2]) ** 0.15
    formants *= np.array(speaker.formant_factors[:count])
    bandwidths = np.tile([100.0, 100, 150, 180, 250, 400, 500, 600][:count], (length, 1))
    nasal_pole = 270 * scale
    nasal_zero = np.full(length, nasal_pole)
    tilt = np.full(length, speaker.tilt)
    voicing = np.zeros(length)
    aspiration = np.zeros(length)
    loudness = np.zeros(length)
    for i, (label, stress, start, stop, release) in enumerate(segments):
        if label == "sil":
            beginning = stop
            loudness[start:stop] = -30
            loudness[:start][-150:] -= 4
            continue
        phone = TABLE[label]
        span = slice(start, stop)
        bandwidths[span, :3] = phone.bandwidths
        voicing[span] = _amplitude(phone.voicing)
        # Stressed syllables are louder, a phrase grows softer and fades over its last 150 ms.
        loudness[span] = (0.0 if stress == "1" else -4.0) - 2e-3 * (start - beginning)
        if phone.manner == "nasal":
            nasal_zero[span] = 450 * scale
        elif phone.manner == "fricative":
            tilt[span] += 10
        elif label == "hh":
            aspiration[span] = _amplitude(-12)
        elif phone.manner in ("stop", "affricate"):
            # Voice bar: only low frequencies of voicing pass the closed lips or tongue.
            tilt[span] += 25
            if segments[i - 1].label == "sil":
                voicing[start : stop - release] = 0  # no voice bar after a pause
            if phone.manner == "stop" and phone.voicing == -np.inf:
                aspiration[stop - release : stop] = _amplitude(-14)
    loudness = _smooth(loudness, 80)
    tilt = _smooth(tilt - 0.4 * loudness, 20)  # soft voices close the glottis less abruptly
    return Tracks(
        segments,
        f0=_f0_contour(speaker, segments, rng),
        formants=formants,
        bandwidths=_smooth(bandwidths, 30),
        nasal_pole=nasal_pole,
        nasal_zero=_smooth(nasal_zero, 60),
        tilt=tilt,
        voicing=_smooth(voicing, 16),
        aspiration=_smooth(aspiration, 12),
        loudness=_amplitude(loudness),
    )


def _resonator(frequency: np.ndarray, bandwidth: np.ndarray | float) -> np.ndarray:
    """Return the coefficients (..., 3) of 1 - 2 r cos(2 pi F) z^-1 + r^2 z^-2, scaled to 1 at
    frequency 0."""
    radius = np.exp(-np.pi * np.asarray(bandwidth) / SAMPLE_RATE)
    middle = -2 * radius * np.cos(2 * np.pi * frequency / SAMPLE_RATE)
    coefficients = np.stack(np.broadcast_arrays(1.0, middle, radius**2), axis=-1)
    return coefficients / coefficients.sum(-1, keepdims=True)


def _tract(tracks: Tracks, rows: np.ndarray, n: int) -> np.ndarray:
    """Return the frequency response (rows, n / 2 + 1) of the vocal tract at `rows` (ms): a cascade
    of resonators."""
    sections = _resonator(tracks.formants[rows], tracks.bandwidths[rows])
    poles = np.broadcast_to(_resonator(tracks.nasal_pole, 100.0), (len(rows), 3))
    for a, b, c in sections.transpose(1, 2, 0)[..., None]:  # times (a + b z^-1 + c z^-2)
        padded = np.pad(poles, ((0, 0), (2, 2)))
        poles = a * padded[:, 2:] + b * padded[:, 1:-1] + c * padded[:, :-2]
    # Losses towards 8 kHz, where the cascade leaves out formants.
    losses = np.cos(np.pi * np.arange(n // 2 + 1) / n)
    return losses * rfft(_resonator(tracks.nasal_zero[rows], 100.0), n) / rfft(poles, n)


def _glottal_pulse(open_time: np.ndarray, tilt: np.ndarray, n: int) -> np.ndarray:
    """Return the spectra (pulses, n / 2 + 1) of the KLGLOTT88 flow derivative (Klatt and Klatt
    1990), closure at time 0. In the open phase, x = t / open_time from 0 to 1, the derivative of
    the flow is 2x - 3x^2: it ends at -1 with the closure. The return phase is a one-pole low-pass:
    `tilt` dB at 3 kHz. open_time in s."""
    omega = 2 * np.pi * np.arange(1, n // 2 + 1) * SAMPLE_RATE / n
    s = 1j * omega * open_time[:, None]
    first = np.exp(s) - 1 - s  # the Fourier integrals of x and x^2 by parts, without dividing twice
    pulse = open_time[:, None] * (2 * first - 3 * (2 * first - s * s) / s) / (s * s)
    cutoff = 2 * np.pi * 3000 / np.sqrt(10 ** (tilt[:, None] / 10) - 1)
    pulse = pulse / (1 + 1j * omega / cutoff)
    return np.pad(pulse, ((0, 0), (1, 0)))  # The flow has no derivative at frequency 0.


def _overlap_add(frames: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return the sum of frames (count, n) that begin at `starts`; what falls outside [0, length) is
    dropped."""
    n = frames.shape[1]
    out = np.zeros(length + 2 * n)
    for frame, start in zip(frames, starts, strict=True):
        out[start + n : start + 2 * n] += frame
    return out[n : n + length]


def _voiced(speaker: Speaker, tracks: Tracks, phase: np.ndarray, rng: Generator) -> np.ndarray:
    """Return glottal pulses through the vocal tract."""
    n = 1024  # length of the transforms
    lead = 256  # samples before the closure
    cycles = np.arange(1, int(phase[-1]))
    jittered = cycles + rng.normal(0, speaker.jitter, len(cycles))
    instants = np.interp(jittered, phase, np.arange(len(phase)))
    rows = (instants / MILLISECOND).astype(int)
    amplitude = tracks.voicing[rows] * (1 + rng.normal(0, speaker.shimmer, len(cycles)))
    sounding = amplitude > 1e-3
    instants = instants[sounding]
    rows = rows[sounding]
    amplitude = amplitude[sounding]
    spectrum = _glottal_pulse(speaker.open_quotient / tracks.f0[rows], tracks.tilt[rows], n)
    starts = np.floor(instants).astype(int) - lead
    delay = (instants - starts)[:, None] * np.arange(n // 2 + 1)
    spectrum *= np.exp(-2j * np.pi / n * delay) * amplitude[:, None]
    return _overlap_add(irfft(spectrum * _tract(tracks, rows, n), n), starts, len(phase))


def _aspirated(
    tracks: Tracks, envelope: np.ndarray, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return white noise of the given envelope through the vocal tract, and the gain of the tract
    at each frame."""
    n = 512  # length of the transforms
    hop = 5 * MILLISECOND
    noise = np.pad(envelope * rng.standard_normal(len(envelope)), hop)
    starts = np.arange(0, len(envelope), hop)
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)
    response = _tract(tracks, np.minimum(starts // MILLISECOND, len(tracks.f0) - 1), n)
    frames = rfft(noise[starts[:, None] + np.arange(2 * hop)] * window, n) * response
    aspirated = _overlap_add(irfft(frames, n), starts - hop, len(envelope))
    return aspirated, np.mean(np.abs(response) ** 2, axis=1)


def _frication(
    speaker: Speaker, tracks: Tracks, modulation: np.ndarray, rng: Generator
) -> np.ndarray:
    """Return the noise of fricatives, bursts and affricates: a sum of resonances, their levels
    relative to a vowel."""
    out = np.zeros(len(modulation))
    scale = REFERENCE_LENGTH / speaker.vocal_tract_length
    for label, _, start, stop, release in tracks.segments:
        if label == "sil" or TABLE[label].frication == -np.inf:
            continue
        phone = TABLE[label]
        start = stop - release if release else start
        if phone.manner == "stop":
            stop = min(stop + 5, start + BURST_DURATIONS[label])
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
        span = slice(start * MILLISECOND, stop * MILLISECOND)
        envelope = np.interp(np.arange(n) / MILLISECOND, corners, [0, 1, 1, 0])
        if phone.voicing > -np.inf:
            envelope *= modulation[span]
        out[span] += _amplitude(phone.frication) * envelope * noise
    return out


def render(speaker: Speaker, tracks: Tracks, rng: Generator) -> np.ndarray:
    """Return the sound of control tracks, float64 at SAMPLE_RATE with max |s| = 1."""
    length = len(tracks.f0) * MILLISECOND
    time = np.arange(length) / MILLISECOND
    # Phase in cycles: the glottis closes where it is a whole number.
    phase = np.cumsum(np.repeat(tracks.f0, MILLISECOND)) / SAMPLE_RATE
    track_times = np.arange(len(tracks.f0))
    voicing = np.interp(time, track_times, tracks.voicing)
    aspiration = np.interp(time, track_times, tracks.aspiration)
    loudness = np.interp(time, track_times, tracks.loudness)
    is_vowel = [s.stress != "" for s in tracks.segments]
    durations = [s.stop - s.start for s in tracks.segments]
    vowels = np.repeat(is_vowel, durations)
    # Noise is strongest around the closure. Levels of noise are relative to the voicing of vowels.
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
    """Return eight talkers of speech-shaped noise, each modulated at a syllable rate of 3 to 6
    Hz."""
    talkers = lfilter(
        [1.0], [1.0, -0.85], lfilter([1.0, -1.0], [1.0, -0.97], rng.standard_normal((8, n)))
    )
    rate = rng.uniform(3, 6, (8, 1))
    start = rng.uniform(0, 2 * np.pi, (8, 1))
    return (talkers * (1 + np.sin(2 * np.pi * rate * np.arange(n) / SAMPLE_RATE + start))).sum(0)


def make_noise(kind: str, n: int, rng: Generator, babble: Callable = _babble) -> np.ndarray:
    """Return one of NOISES, (n,); restaurant is the clatter of dishes over babble."""
    if kind == "white":
        return rng.standard_normal(n)
    if kind == "car":
        return lfilter([1.0], [1.0, -rng.uniform(0.9, 0.98)], rng.standard_normal(n))
    voices = babble(n, rng)
    if kind == "babble":
        return voices
    # Dishes: about four blows a second, each ringing at 2 to 6 kHz and gone after some 30 ms.
    blows = rng.integers(n, size=1 + rng.poisson(4 * n / SAMPLE_RATE))
    frequencies = rng.uniform(2e3, 6e3, len(blows))
    decays = rng.uniform(60, 250, len(blows))
    duration = SAMPLE_RATE // 5
    clatter = np.zeros(n + duration)
    t = np.arange(duration) / SAMPLE_RATE
    for start, frequency, decay in zip(blows, frequencies, decays, strict=True):
        blow = rng.exponential() * np.exp(-decay * t) * np.sin(2 * np.pi * frequency * t)
        clatter[start : start + duration] += blow
    return clatter[:n] + 0.5 * voices * np.sqrt(np.mean(clatter[:n] ** 2) / np.mean(voices**2))


def at_ratio(noise: np.ndarray, speech: np.ndarray, ratio: float) -> np.ndarray:
    """Return the noise (n,) with a gain that gives speech (n,) this signal-to-noise ratio in dB."""
    return noise * np.sqrt(np.mean(speech**2) / np.mean(noise**2)) * _amplitude(-ratio)


def apply_condition(
    waveform: np.ndarray, condition: str, rng: Generator, babble: Callable = _babble
) -> np.ndarray:
    """Return an utterance (samples,) in one of CONDITIONS; its type and peak are kept. "channel"
    is a spectral tilt of up to 6 dB per octave either way, a low cut, three peaks or dips of up to
    10 dB; "noise" is one of NOISES at a signal-to-noise ratio of 5 to 15 dB; "both" is the channel,
    then the noise. `babble(samples, rng)` → (samples,) makes the voices of others. ValueError where
    the condition is unknown."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r}: must be one of {', '.join(CONDITIONS)}")
    if condition == "clean":
        return waveform
    y = waveform.astype(np.float64)
    peak = np.abs(y).max()
    if condition != "noise":
        padded = next_fast_len(2 * len(y), real=True)
        octaves = np.log2(np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE), 50) / 1000)
        gain = rng.uniform(-6, 6) * octaves
        gain -= 12 * np.maximum(np.log2(rng.uniform(80, 300) / 1000) - octaves, 0)
        for _ in range(3):
            centre = rng.uniform(-2, 2.8)
            width = rng.uniform(0.2, 0.6)
            gain += rng.uniform(-10, 10) * np.exp(-0.5 * ((octaves - centre) / width) ** 2)
        y = irfft(rfft(y, padded) * _amplitude(gain), padded)[: len(y)]
    if condition != "channel":
        noise_name = rng.choice(NOISES).item()
        ratio = rng.uniform(5, 15)
        y = y + at_ratio(make_noise(noise_name, len(y), rng, babble), y, ratio)
    y *= peak / np.abs(y).max()
    if np.issubdtype(waveform.dtype, np.integer):
        y = np.rint(y)
    return y.astype(waveform.dtype)


def generate(seed=0, speakers=(32, 8, 8), utterances=10) -> Iterator[SyntheticUtterance]:
    """Yield the corpus: `utterances` by each of `speakers` (train, dev, test), one at a time. An
    utterance depends on the seed, its split, and its own and its speaker's number, not on the size
    of the corpus."""
    for split, count in zip(SPLITS, speakers, strict=True):
        for number, k in itertools.product(range(count), range(utterances)):
            speaker = _make_speaker(seed, split, number)
            rng = np.random.default_rng([seed, SPLITS.index(split), number, k, 0])
            words = make_sentence(split, rng)
            tracks = articulate(speaker, words, rng)
            samples = np.rint(0.99 * 32767 * render(speaker, tracks, rng)).astype(np.int16)
            phones = []
            for segment in tracks.segments:
                start = segment.start * MILLISECOND
                stop = segment.stop * MILLISECOND
                phones.append((start, stop, segment.label))
            yield SyntheticUtterance(
                name=f"{speaker.name}-{k:02d}",
                speaker=speaker.name,
                split=split,
                sex=speaker.sex,
                waveform=samples,
                text=" ".join(word for word in words if word != ","),
                phones=tuple(phones),
            )
