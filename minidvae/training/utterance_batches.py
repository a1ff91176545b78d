"""Whole utterances with what is said in them, for recognisers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data import audio
from ..data.corpus import CLEAN, Corpus, CorpusError, Utterance
from ..models.recognisers import FrameBatch, Recogniser, TranscriptBatch
from .batches import Batches
from .config import TARGETS, Recipe, SettingError
from .features import mean_and_deviation, utterance_features

# name: which field of an utterance has one of which values
DOMAIN_FIELDS = {"female": ("sex", ("F",)), "male": ("sex", ("M",)), "clean": ("condition", CLEAN)}
DOMAIN_FIELDS |= {name: ("condition", (name,)) for name in ("noisy", "channel", "both")}


class Utterances(Batches):
    """Whole utterances, untrimmed, with what is said in them.

    Targets "phones" or "characters": a TranscriptBatch of utterances of about the same length, which every pass over
    the corpus orders anew.

    Targets "frames": a FrameBatch for truncated back-propagation through time. Each row of the batch is a lane that
    reads one utterance after the other, `frames` frames at each step, in an order of its own that is new in every
    pass. As all orders take the same number of steps, where a lane is follows from the step. The label of a frame
    comes `delay` frames after it; for that the last frame of an utterance is repeated.
    """

    models = Recogniser
    settings = ("features", "extractor", "latent", "targets", "delay", "domain")
    needs_labels = True
    divisible = False  # a lane carries its state, and transcripts differ in length
    unused = "without the labels that are learned"

    def __init__(self, corpus: Corpus, recipe: Recipe, seed: int, device: torch.device):
        inside = members(corpus, recipe.domain)
        self.used = [i for i in inside if transcript(corpus.utterances[i], recipe.targets)]
        if not self.used:
            possible = [
                t for t in TARGETS if any(transcript(corpus.utterances[i], t) for i in inside)
            ]
            remedy = (
                f"try targets={' or '.join(possible)}"
                if possible
                else "expected phone labels or text"
            )
            needed = "text" if recipe.targets == "characters" else "phone labels"
            raise CorpusError(
                f"{corpus.name}: has no {needed} for targets={recipe.targets}; {remedy}"
            )
        self.features = utterance_features(corpus, recipe, device)
        self.extractor = self.features.extractor
        self.framewise = recipe.targets == "frames"
        self.lengths = np.array(
            [audio.FEATURE_STFT.frames(corpus.utterances[i].length) for i in self.used]
        )
        self.steps = -(
            -(self.lengths + recipe.delay) // recipe.frames
        )  # that a lane takes for each
        per_epoch = -(-int(self.steps.sum() if self.framewise else len(self.used)) // recipe.batch)
        super().__init__(corpus, recipe, seed, device, per_epoch, len(inside) - len(self.used))
        self.order, self.groups = (
            lru_cache(recipe.batch)(self.pass_of_lane),
            lru_cache(1)(self.pass_in_batches),
        )
        self.read = lru_cache(recipe.batch)(self.labelled)  # what each lane reads

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the features, (bins,) each."""
        return mean_and_deviation(
            self.features[i] for i in tqdm(self.used, "statistics", leave=False, disable=None)
        )

    def symbol_counts(self) -> Counter:
        """How often each symbol that is learned occurs: in frames, or in transcripts."""
        spoken = [self.corpus.utterances[i] for i in self.used]
        symbols = (
            frame_labels(u) if self.framewise else transcript(u, self.recipe.targets)
            for u in spoken
        )
        return Counter(chain.from_iterable(symbols))

    def number_labels(self, symbols: tuple[str, ...]) -> None:
        """The labels of batches are the numbers that a model has for its symbols. Of CTC, 0 is the blank."""
        self.numbers = {
            symbol: number for number, symbol in enumerate(symbols, 0 if self.framewise else 1)
        }

    def __call__(self, step: int) -> FrameBatch | TranscriptBatch:
        if not self.framewise:
            number, place = divmod(step, self.per_epoch)
            return self.transcripts(self.groups(number)[place])
        rows = [self.lane(lane, step) for lane in range(self.recipe.batch)]
        x, labels, first = zip(*rows, strict=True)
        return FrameBatch(
            torch.stack(x), torch.stack(labels), torch.tensor(first, device=self.device)
        )

    def lane(self, lane: int, step: int) -> tuple[Tensor, Tensor, bool]:
        """What one lane reads at a step: (frames, bins), (frames,) and whether an utterance begins."""
        number, place = divmod(step, int(self.steps.sum()))
        order, ends = self.order(lane, number)
        k = np.searchsorted(ends, place, side="right")
        at = place - int(ends[k] - self.steps[order[k]])
        x, labels = self.read(order[k], self.steps[order[k]] * self.recipe.frames)
        here = slice(at * self.recipe.frames, (at + 1) * self.recipe.frames)
        return x[here], labels[here], at == 0

    def pass_of_lane(self, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the utterances in pass `number` of a lane, and the steps at which each is over."""
        order = np.random.default_rng((self.seed, number, lane)).permutation(len(self.lengths))
        return order, np.cumsum(self.steps[order])

    def pass_in_batches(self, number: int) -> list[np.ndarray]:
        """The utterances of each batch of pass `number`, of similar lengths."""
        random = np.random.default_rng((self.seed, number))
        order = np.argsort(self.lengths * random.uniform(0.9, 1.1, len(self.lengths)))
        groups = np.array_split(order, self.per_epoch)
        return [groups[k] for k in random.permutation(len(groups))]

    def labelled(self, k: int, frames: int) -> tuple[Tensor, Tensor]:
        """An utterance of `used` made `frames` long: (frames, bins), (frames,)"""
        x, utterance = self.features[self.used[k]], self.corpus.utterances[self.used[k]]
        labels = torch.full((frames,), -1)
        numbers = [self.numbers.get(symbol, -1) for symbol in frame_labels(utterance)]
        labels[self.recipe.delay : self.recipe.delay + len(x)] = torch.tensor(numbers)
        x = torch.cat([x, x[-1:].expand(frames - len(x), -1)])
        return x, labels.to(self.device)

    def transcripts(self, chosen: np.ndarray) -> TranscriptBatch:
        spoken = [
            transcript(self.corpus.utterances[self.used[k]], self.recipe.targets) for k in chosen
        ]
        labels = [
            torch.tensor([self.numbers[s] for s in symbols if s in self.numbers])
            for symbols in spoken
        ]
        x = pad_sequence([self.features[self.used[k]] for k in chosen], batch_first=True)
        lengths, counts = (
            torch.from_numpy(self.lengths[chosen]),
            torch.tensor([len(row) for row in labels]),
        )
        labels = pad_sequence(labels, batch_first=True).long()
        return TranscriptBatch(x, *(tensor.to(self.device) for tensor in (lengths, labels, counts)))

    def development(self, model: Recogniser) -> Iterator[tuple[FrameBatch | TranscriptBatch, int]]:
        """Every utterance of the domain, whole."""
        self.number_labels(model.config.symbols)
        order = np.argsort(self.lengths, kind="stable")
        for first in range(0, len(order), self.recipe.batch):
            chosen = order[first : first + self.recipe.batch]
            if not self.framewise:
                yield self.transcripts(chosen), len(chosen)
                continue
            longest = int(self.lengths[chosen].max()) + self.recipe.delay
            x, labels = zip(*(self.labelled(k, longest) for k in chosen), strict=True)
            begun = torch.ones(len(chosen), dtype=torch.bool, device=self.device)
            batch = FrameBatch(torch.stack(x), torch.stack(labels), begun)
            yield batch, max(1, int((batch.labels >= 0).sum()))

    @property
    def size(self) -> str:
        return super().size if self.framewise else f"{self.recipe.batch} utterances"

    @classmethod
    def derived(cls, recipe: Recipe) -> dict:
        criterion = "frames" if recipe.targets == "frames" else "ctc"
        return super().derived(recipe) | {"delay": recipe.delay, "criterion": criterion}

    @classmethod
    def check(cls, name, recipe, config, given) -> None:
        super().check(name, recipe, config, given)
        if recipe.targets == "frames":
            if "criterion" not in config:
                raise SettingError(
                    f"targets=frames: {name} learns from transcripts; expected phones or characters"
                )
        elif idle := {"frames", "delay"} & set(given):
            raise SettingError(
                f"{min(idle)}={given[min(idle)]}: is for targets=frames, not {recipe.targets}"
            )

    @classmethod
    def check_lengths(cls, corpus, recipe) -> None:
        """Utterances of every length are read to their end."""

    @classmethod
    def for_model(cls, recipe, model, stft, before) -> Recipe:
        kept = ("features", "extractor", "latent", "targets", "delay")
        return replace(recipe, **{name: before[name] for name in kept})


def in_domain(utterance: Utterance, domain: str) -> bool:
    """Whether an utterance is in a domain: names of DOMAINS with commas between them. Names of one field (sex,
    condition) are alternatives; of both fields, one has to fit in each. An empty domain holds all."""
    allowed = {}
    for name in domain.split(",") if domain else ():
        field, values = DOMAIN_FIELDS[name]
        allowed.setdefault(field, set()).update(values)
    return all(getattr(utterance, field) in values for field, values in allowed.items())


def members(corpus: Corpus, domain: str) -> list[int]:
    """Which utterances are in a domain. CorpusError where none is."""
    inside = [i for i, utterance in enumerate(corpus.utterances) if in_domain(utterance, domain)]
    if not inside:
        there = ", ".join(
            name for name in DOMAIN_FIELDS if any(in_domain(u, name) for u in corpus.utterances)
        )
        where = f"{corpus.name}: no utterance of {corpus.utterances[0].split} is in domain={domain}"
        raise CorpusError(f"{where}; there is: {there or 'none of these'}")
    return inside


def transcript(utterance: Utterance, targets: str) -> list[str]:
    """What is said, in phones (targets "frames" or "phones") or in lower-case characters; empty where unknown."""
    return (
        list(utterance.text.lower())
        if targets == "characters"
        else [label for *_, label in utterance.phones]
    )


def frame_labels(utterance: Utterance) -> list[str]:
    """The phone at the centre of each frame of `audio.FEATURE_STFT`: the one that began last, so that frames after the
    last label belong to the last phone, and frames before the first to the first."""
    starts = [start for start, *_ in utterance.phones]
    centres = np.arange(audio.FEATURE_STFT.frames(utterance.length)) * audio.FEATURE_STFT.hop
    begun = np.searchsorted(starts, centres, side="right")
    return [utterance.phones[k][2] for k in (begun - 1).clip(0)]
