"""Pieces of fixed length out of a corpus: numbered windows, random crops, consecutive crops."""

from collections.abc import Iterator

import numpy as np
import torch

from . import audio
from .corpus import Corpus, CorpusError


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
            raise CorpusError(f"{corpus.name}: no utterance is as long as one sequence of {needed}; {there}")
        self.corpus, self.samples, self.stride = corpus, samples, stride
        self.utterances = np.flatnonzero(lengths >= samples)  # index in the corpus of each that is used
        self.starts = starts[self.utterances]  # first sample of each in the packed file
        self.counts = (lengths[self.utterances] - samples) // stride + 1  # windows of each
        self.ends = np.cumsum(self.counts)  # number of the window after the last of each
        self.skipped = len(corpus) - len(self.utterances)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The place in `utterances` of the utterance that each window belongs to."""
        return np.searchsorted(self.ends, numbers, side="right")

    def __getitem__(self, numbers: np.ndarray) -> torch.Tensor:
        """Windows by their numbers: (n,) → (n, samples) float32 on the CPU, pinned where there is a GPU."""
        rows = self.rows(numbers)
        starts = self.starts[rows] + (numbers - (self.ends - self.counts)[rows]) * self.stride
        windows = torch.empty(len(numbers), self.samples, pin_memory=torch.cuda.is_available())
        for window, start in zip(windows.numpy(), starts, strict=True):
            window[:] = self.corpus.packed[start : start + self.samples]
        return windows.mul_(1 / 32767)

    def in_order(self, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """All windows once: their numbers (≤ batch_size,) and samples (≤ batch_size, samples)."""
        for first in range(0, len(self), batch_size):
            numbers = np.arange(first, min(first + batch_size, len(self)))
            yield numbers, self[numbers]


class RandomCrops:
    """Random crops for training: `crops(step)` is a function of (seed, step) alone, so resuming needs no state. Each of
    the `Windows` with a stride of 1 is equally likely; `skipped` and CorpusError as there. `sequences`: how many crops
    the corpus holds side by side, the length of an epoch."""

    def __init__(self, corpus: Corpus, samples: int, batch_size: int, seed: int = 0, trim: bool = True):
        self.windows = Windows(corpus, samples, trim=trim)
        self.batch_size, self.seed, self.skipped = batch_size, seed, self.windows.skipped
        self.sequences = int(((self.windows.counts - 1 + samples) // samples).sum())

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of a step: (batch, samples) float32 on the CPU, pinned where there is a GPU."""
        numbers = np.random.default_rng((self.seed, step)).integers(len(self.windows), size=self.batch_size)
        return self.windows[numbers]


def consecutive_crops(corpus: Corpus, samples: int, batch_size: int, trim: bool = True) -> Iterator[torch.Tensor]:
    """Crops (≤ batch_size, samples), float32, of the corpus once through, as a development set: those of an utterance
    follow one another without overlap, and what is left at its end is dropped. CorpusError, when called, where no
    utterance holds one."""
    windows = Windows(corpus, samples, stride=samples, trim=trim)
    return (crops for _, crops in windows.in_order(batch_size))
