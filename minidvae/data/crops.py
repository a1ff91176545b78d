"""Pieces of fixed length of a corpus: numbered windows, random crops, consecutive crops."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from . import audio
from .corpus import Corpus, CorpusError
from .packing import prefetch

COSINES = 4  # number of cosines in the curve of an equaliser
RATE_STEP = 800  # Hz. Speeds are multiples of 1/20, for which resampling takes a short filter.
KNEE = 100  # Hz. The equaliser's curve is smooth over log(1 + f/KNEE).
INT16_SCALE = 32767


class Windows:
    """All windows of `samples` samples, numbered utterance by utterance.

    Their starts are `stride` samples apart, the first at the start of the utterance (of its trimmed
    part with `trim`). `windows[numbers]` reads them from the packed file. Utterances shorter than
    one window are left out and counted in `skipped`.

    Raises:
        CorpusError: all utterances are shorter.
    """

    def __init__(self, corpus: Corpus, samples: int, stride: int = 1, trim: bool = True):
        bounds = []
        for utterance in corpus.utterances:
            first, stop = utterance.trim if trim else (0, utterance.length)
            bounds.append((utterance.start + first, stop - first))
        starts, lengths = np.array(bounds, dtype=np.int64).T
        if lengths.max() < samples:
            needed = f"{samples / audio.SAMPLE_RATE:.2f} s"
            longest = f"{lengths.max() / audio.SAMPLE_RATE:.2f} s"
            raise CorpusError(
                f"{corpus.name}: no utterance is as long as one sequence of {needed}; "
                f"the longest of {len(corpus)} has {longest}"
            )
        self.corpus = corpus
        self.samples = samples
        self.stride = stride
        # For each utterance that is used: its index in the corpus, its first sample in the packed
        # file, its number of windows, and the number of the window after its last one.
        self.utterances = np.flatnonzero(lengths >= samples)
        self.starts = starts[self.utterances]
        self.counts = (lengths[self.utterances] - samples) // stride + 1
        self.ends = np.cumsum(self.counts)
        self.skipped = len(corpus) - len(self.utterances)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the index into `utterances` of the utterance that each window belongs to."""
        return np.searchsorted(self.ends, numbers, side="right")

    def start(self, numbers: np.ndarray) -> np.ndarray:
        """Return the first sample of each window in the packed file."""
        rows = self.rows(numbers)
        first_numbers = (self.ends - self.counts)[rows]
        return self.starts[rows] + (numbers - first_numbers) * self.stride

    def __getitem__(self, numbers: np.ndarray) -> torch.Tensor:
        """Return windows by their numbers: (n,) → (n, samples), float32 on the CPU, pinned where
        there is a GPU."""
        starts = self.start(numbers)
        prefetch(self.corpus.packed, starts, self.samples)
        windows = torch.empty(len(numbers), self.samples, pin_memory=torch.cuda.is_available())
        for window, start in zip(windows.numpy(), starts, strict=True):
            window[:] = self.corpus.packed[start : start + self.samples]
        return windows.mul_(1 / INT16_SCALE)

    def around(self, number: int, samples: int) -> np.ndarray:
        """Return samples (samples,) from the start of a window on, or from earlier where its
        utterance would end before; fewer where the utterance has no more."""
        row = self.rows(number)
        first = self.starts[row]
        stop = first + (self.counts[row] - 1) * self.stride + self.samples
        start = max(first, min(self.start(number), stop - samples))
        piece = self.corpus.packed[start : min(start + samples, stop)]
        return piece * np.float32(1 / INT16_SCALE)

    def in_order(self, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield all windows once: their numbers (≤ batch_size,) and samples (≤ batch_size,
        samples)."""
        for first in range(0, len(self), batch_size):
            numbers = np.arange(first, min(first + batch_size, len(self)))
            yield numbers, self[numbers]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of random crops by speed, gain and an equaliser.

    Speed and gain are drawn uniformly between two values. Speed changes pitch and formants too, as
    in other voices. The equaliser is a smooth curve over the logarithm of frequency, a sum of
    cosines, as of other microphones.
    """

    speed: tuple[float, float] = (1.0, 1.0)  # relative to that of the recording
    gain: tuple[float, float] = (0.0, 0.0)  # dB
    equaliser: float = 0.0  # standard deviation of each cosine's amplitude, dB

    def __call__(
        self, windows: Windows, numbers: np.ndarray, random: np.random.Generator
    ) -> torch.Tensor:
        """Return augmented windows by their numbers, (n,) → (n, samples).

        They are rounded to 16 bits as the packed samples are, so that digital silence stays silent.
        A window keeps its speed where its utterance is too short to be played faster.
        """
        slowest = round(self.speed[0] * audio.SAMPLE_RATE / RATE_STEP)
        fastest = round(self.speed[1] * audio.SAMPLE_RATE / RATE_STEP)
        rates = RATE_STEP * random.integers(slowest, fastest, size=len(numbers), endpoint=True)
        gains = 10 ** (random.uniform(*self.gain, size=len(numbers)) / 20)
        amplitudes = None
        if self.equaliser:
            amplitudes = random.normal(0, self.equaliser, (len(numbers), COSINES))
        crops = windows[numbers]
        for crop, number, rate, gain in zip(crops.numpy(), numbers, rates, gains, strict=True):
            needed = -(-windows.samples * rate // audio.SAMPLE_RATE)
            piece = windows.around(number, needed)
            if len(piece) == needed:
                crop[:] = audio.resample(piece, rate, audio.SAMPLE_RATE)[: windows.samples]
            crop *= gain
        if amplitudes is not None:
            equalise(crops, amplitudes)
        return crops.mul_(INT16_SCALE).round_().div_(INT16_SCALE)


def equalise(crops: torch.Tensor, amplitudes: np.ndarray) -> None:
    """Filter crops (n, samples) in place by curves with these amplitudes (n, COSINES) of their
    cosines, dB."""
    num_samples = crops.shape[1]
    length = 2 ** num_samples.bit_length()  # long enough for the tail of the filter
    curves = torch.from_numpy(amplitudes).float() @ cosines(length)  # dB, (n, frequencies)
    spectra = torch.fft.rfft(crops, length) * 10 ** (curves / 20)
    crops[:] = torch.fft.irfft(spectra, length)[:, :num_samples]


@lru_cache(1)
def cosines(samples: int) -> torch.Tensor:
    """Return cos(πkg) for k = 1 … COSINES, (COSINES, frequencies of a transform of so many
    samples). g rises from 0 to 1 with log(1 + f/KNEE)."""
    hertz = torch.fft.rfftfreq(samples, 1 / audio.SAMPLE_RATE)
    g = torch.log1p(hertz / KNEE) / math.log1p(audio.SAMPLE_RATE / 2 / KNEE)
    return torch.cos(torch.pi * torch.arange(1, COSINES + 1)[:, None] * g)


class RandomCrops:
    """Random crops for training. `crops(step)` is a function of (seed, step) alone, so that
    resuming needs no state.

    Each of the `Windows` with a stride of 1 is equally likely; `skipped` and CorpusError are as
    there. `sequences` is the number of crops that the corpus holds without overlap, the length of
    an epoch.
    """

    def __init__(
        self, corpus: Corpus, samples: int, batch_size: int, seed=0, trim=True, augmentation=None
    ):
        self.windows = Windows(corpus, samples, trim=trim)
        self.augmentation = augmentation or Augmentation()
        self.batch_size = batch_size
        self.seed = seed
        self.skipped = self.windows.skipped
        self.sequences = int(((self.windows.counts - 1 + samples) // samples).sum())

    def __call__(self, step: int) -> torch.Tensor:
        """Return the batch of a step, (batch_size, samples), float32 on the CPU, pinned where there
        is a GPU."""
        random = np.random.default_rng((self.seed, step))
        numbers = random.integers(len(self.windows), size=self.batch_size)
        if self.augmentation == Augmentation():
            return self.windows[numbers]
        return self.augmentation(self.windows, numbers, random)


def consecutive_crops(
    corpus: Corpus, samples: int, batch_size: int, trim: bool = True
) -> Iterator[torch.Tensor]:
    """Return an iterator over the corpus once, for a development set: crops (≤ batch_size,
    samples), float32. Those of an utterance follow one another without overlap, and the rest at its
    end is dropped. Raises CorpusError, when called, where no utterance is long enough."""
    windows = Windows(corpus, samples, stride=samples, trim=trim)
    return (crops for _, crops in windows.in_order(batch_size))
