"""Pieces of fixed length out of a corpus: numbered windows, random crops, consecutive crops."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from . import audio
from .corpus import Corpus, CorpusError
from .packing import prefetch

COSINES = 4  # of an equaliser's curve
RATE_STEP = 800  # Hz: speeds are multiples of 1/20, for which resampling takes a short filter


class Windows:
    """All windows of `samples` samples, numbered utterance by utterance: their starts are `stride` samples apart, the
    first at the start of the utterance (of its trimmed part with `trim`). `windows[numbers]` reads them from the packed
    file. Utterances shorter than one window are left out and counted in `skipped`; CorpusError when all are."""

    def __init__(self, corpus: Corpus, samples: int, stride: int = 1, trim: bool = True):
        spans = [(u.start, *(u.trim if trim else (0, u.length))) for u in corpus.utterances]
        start, first, stop = np.array(spans, dtype=np.int64).T
        starts, lengths = start + first, stop - first
        if lengths.max() < samples:
            needed, longest = (f"{n / audio.SAMPLE_RATE:.2f} s" for n in (samples, lengths.max()))
            there = f"the longest of {len(corpus)} has {longest}"
            raise CorpusError(
                f"{corpus.name}: no utterance is as long as one sequence of {needed}; {there}"
            )
        self.corpus, self.samples, self.stride = corpus, samples, stride
        self.utterances = np.flatnonzero(
            lengths >= samples
        )  # index in the corpus of each that is used
        self.starts = starts[self.utterances]  # first sample of each in the packed file
        self.counts = (lengths[self.utterances] - samples) // stride + 1  # windows of each
        self.ends = np.cumsum(self.counts)  # number of the window after the last of each
        self.skipped = len(corpus) - len(self.utterances)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The place in `utterances` of the utterance that each window belongs to."""
        return np.searchsorted(self.ends, numbers, side="right")

    def start(self, numbers: np.ndarray) -> np.ndarray:
        """The first sample of each window in the packed file."""
        rows = self.rows(numbers)
        return self.starts[rows] + (numbers - (self.ends - self.counts)[rows]) * self.stride

    def __getitem__(self, numbers: np.ndarray) -> torch.Tensor:
        """Windows by their numbers: (n,) → (n, samples) float32 on the CPU, pinned where there is a GPU."""
        starts = self.start(numbers)
        prefetch(self.corpus.packed, starts, self.samples)
        windows = torch.empty(len(numbers), self.samples, pin_memory=torch.cuda.is_available())
        for window, start in zip(windows.numpy(), starts, strict=True):
            window[:] = self.corpus.packed[start : start + self.samples]
        return windows.mul_(1 / 32767)

    def around(self, number: int, samples: int) -> np.ndarray:
        """Samples (samples,) from the start of a window on, or from as much earlier as the end of its utterance asks
        for; fewer where the utterance has no more."""
        row, start = self.rows(number), self.start(number)
        first, stop = (
            self.starts[row],
            self.starts[row] + (self.counts[row] - 1) * self.stride + self.samples,
        )
        start = max(first, min(start, stop - samples))
        return self.corpus.packed[start : min(start + samples, stop)] * np.float32(1 / 32767)

    def in_order(self, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """All windows once: their numbers (≤ batch_size,) and samples (≤ batch_size, samples)."""
        for first in range(0, len(self), batch_size):
            numbers = np.arange(first, min(first + batch_size, len(self)))
            yield numbers, self[numbers]


@dataclass(frozen=True)
class Augmentation:
    """Of random crops. Speed and gain are drawn evenly between two ends; speed moves pitch and formants with it: other
    voices. The equaliser is a smooth curve over the logarithm of frequency, four cosines: other microphones."""

    speed: tuple[float, float] = (1.0, 1.0)  # relative to the recording's
    gain: tuple[float, float] = (0.0, 0.0)  # dB
    equaliser: float = 0.0  # standard deviation of each cosine's amplitude, dB

    def __call__(
        self, windows: Windows, numbers: np.ndarray, random: np.random.Generator
    ) -> torch.Tensor:
        """Windows by their numbers, augmented: (n,) → (n, samples). Rounded to 16 bits as what is packed
        is, so that digital silence stays silent. A window whose utterance is too short to be played faster keeps its
        speed."""
        slowest, fastest = (round(speed * audio.SAMPLE_RATE / RATE_STEP) for speed in self.speed)
        rates = RATE_STEP * random.integers(slowest, fastest, size=len(numbers), endpoint=True)
        gains = 10 ** (random.uniform(*self.gain, size=len(numbers)) / 20)
        amplitudes = (
            random.normal(0, self.equaliser, (len(numbers), COSINES)) if self.equaliser else None
        )
        crops = windows[numbers]
        for crop, number, rate, gain in zip(crops.numpy(), numbers, rates, gains, strict=True):
            needed = -(-windows.samples * rate // audio.SAMPLE_RATE)
            if len(piece := windows.around(number, needed)) == needed:
                crop[:] = audio.resample(piece, rate, audio.SAMPLE_RATE)[: windows.samples]
            crop *= gain
        if self.equaliser:
            length = (
                2 ** windows.samples.bit_length()
            )  # of a fast transform, with room for the filter's tail
            curves = torch.from_numpy(amplitudes).float() @ cosines(length)  # dB, (n, frequencies)
            spectra = torch.fft.rfft(crops, length) * 10 ** (curves / 20)
            crops[:] = torch.fft.irfft(spectra, length)[:, : windows.samples]
        return crops.mul_(32767).round_().div_(32767)


@lru_cache(1)
def cosines(samples: int) -> torch.Tensor:
    """cos(πkg) for k = 1 … COSINES, (COSINES, frequencies of a transform of so many samples); g rises from 0 to 1 with
    log(1 + f/100 Hz)."""
    hertz = torch.fft.rfftfreq(samples, 1 / audio.SAMPLE_RATE)
    place = torch.log1p(hertz / 100) / math.log1p(audio.SAMPLE_RATE / 200)
    return torch.cos(torch.pi * torch.arange(1, COSINES + 1)[:, None] * place)


class RandomCrops:
    """Random crops for training: `crops(step)` is a function of (seed, step) alone, so resuming needs no state. Each of
    the `Windows` with a stride of 1 is equally likely; `skipped` and CorpusError as there. `sequences`: how many crops
    the corpus holds side by side, the length of an epoch."""

    def __init__(
        self, corpus: Corpus, samples: int, batch_size: int, seed=0, trim=True, augmentation=None
    ):
        self.windows, self.augmentation = (
            Windows(corpus, samples, trim=trim),
            augmentation or Augmentation(),
        )
        self.batch_size, self.seed, self.skipped = batch_size, seed, self.windows.skipped
        self.sequences = int(((self.windows.counts - 1 + samples) // samples).sum())

    def __call__(self, step: int) -> torch.Tensor:
        """Return the batch of a step, (batch_size, samples) float32 on the CPU, pinned where there is a GPU."""
        random = np.random.default_rng((self.seed, step))
        numbers = random.integers(len(self.windows), size=self.batch_size)
        if self.augmentation == Augmentation():
            return self.windows[numbers]
        return self.augmentation(self.windows, numbers, random)


def consecutive_crops(
    corpus: Corpus, samples: int, batch_size: int, trim: bool = True
) -> Iterator[torch.Tensor]:
    """Crops (≤ batch_size, samples), float32, of the corpus once through, as a development set: those of an utterance
    follow one another without overlap, and what is left at its end is dropped. CorpusError, when called, where no
    utterance holds one."""
    windows = Windows(corpus, samples, stride=samples, trim=trim)
    return (crops for _, crops in windows.in_order(batch_size))
