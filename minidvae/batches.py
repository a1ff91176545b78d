"""What the training loop is fed: the batch of each step and the development set, for each kind of model.

    batches = SOURCES[model.batches](training, recipe, seed, device)
    batches.fit(model, fresh)                          statistics of the training set, before the first step of a run
    batches.groups(model, recipe)                      its parameters as the optimiser takes them
    batches.prepare(model, optimiser, recipe, step)    what the model needs to know before a step
    model.loss(batches(step))                          a function of (seed, step) alone
    batches.development(corpus, model, recipe)         → batch, its number of examples
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from . import audio
from .corpus import CLEAN, Corpus, CorpusError, Cuts, Segments, Utterance, segments
from .features import FEATURES, utterance_features
from .models.acoustic import Acoustic
from .models.base import FrameBatch, TranscriptBatch
from .models.fhvae import FHVAE, SegmentBatch

STATISTICS_BATCHES = 8  # training batches from which the input scale and the output bias of a DVAE are taken
TARGETS = ("frames", "phones", "characters")  # the phone at each frame; transcripts in phones or characters
DOMAINS = {  # name: which field of an utterance has one of which values
    "female": ("sex", ("F",)),
    "male": ("sex", ("M",)),
    "clean": ("condition", CLEAN),
    **{name: ("condition", (name,)) for name in ("noisy", "channel", "both")},
}


class Spectra:
    """Power spectra of random cuts, (batch, frames, bins), for the DVAEs."""

    unused = "shorter than one training sequence"  # what the utterances are that `skipped` counts

    def __init__(self, corpus: Corpus, recipe, seed: int, device: torch.device):
        self.stft, self.device = recipe.stft, device
        self.samples = self.stft.samples(recipe.frames)
        self.cuts = Cuts(corpus, self.samples, recipe.batch, seed, recipe.trim)
        self.per_epoch, self.skipped = max(1, self.cuts.sequences // recipe.batch), self.cuts.skipped

    def fit(self, model, fresh: bool) -> None:
        """A model that has been trained before (not `fresh`) keeps its own."""
        if not fresh:
            return
        sample = torch.cat([self.stft.power(self.cuts(step)) for step in range(STATISTICS_BATCHES)])
        model.fit_statistics(sample.to(self.device))

    def groups(self, model, recipe) -> list[dict]:
        return [{"params": list(model.parameters())}]

    def prepare(self, model, optimiser, recipe, step: int) -> None:
        model.own_past = recipe.own_past_at(step)

    def __call__(self, step: int) -> Tensor:
        return self.stft.power(self.cuts(step).to(self.device, non_blocking=True))

    def development(self, corpus: Corpus, model, recipe) -> Iterator[tuple[Tensor, int]]:
        """The past is as it will be at the end of training, so that the best checkpoint is the best at that."""
        model.own_past = recipe.own_past[-1]
        for cut in segments(corpus, self.samples, recipe.batch, recipe.trim):
            yield self.stft.power(cut.to(self.device)), len(cut)


class FeatureSegments:
    """Segments of features with the sequence (the utterance) that each belongs to, for FHVAE and β-VAE.

    Every segment of the corpus is equally likely, and none is stored. With `recipe.sequences` = K, hierarchical
    sampling (Hsu & Glass, Scalable factorized hierarchical variational autoencoder training, 2018): for `redraw`
    steps at a time, the segments of K drawn sequences only, which the K rows of the table then stand for.
    """

    unused = Spectra.unused

    def __init__(self, corpus: Corpus, recipe, seed: int, device: torch.device):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.index = feature_segments(corpus, recipe)
        self.per_epoch, self.skipped = max(1, len(self.index) // recipe.batch), self.index.skipped
        known = len(self.index.counts)
        self.rows = min(recipe.sequences or known, known)
        self.drawn, self.block = self.rows < known, -1

    def features(self, cuts: Tensor) -> Tensor:
        return FEATURES[self.recipe.features][1](cuts.to(self.device, non_blocking=True), centred=False)

    def fit(self, model, fresh: bool) -> None:
        """Mean and deviation per bin, and the table of s-vectors: a model that has been trained before (not `fresh`)
        keeps the first, and its table begins with the closed form."""
        if fresh:
            model.standardise.set(*self.statistics())
        if isinstance(model, FHVAE):
            model.make_table(self.rows)
            if not fresh:
                model.table.data.copy_(self.s_vectors(model, self.index, self.choose(0)))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per bin over the whole training set, (bins,) each."""
        recipe = self.recipe
        index = feature_segments(self.index.corpus, recipe, shift=recipe.frames)
        steps = index.in_order(4 * recipe.batch)
        steps = tqdm(steps, "statistics", -(-len(index) // (4 * recipe.batch)), leave=False, disable=None)
        return mean_and_deviation(self.features(cuts).flatten(0, 1) for _, cuts in steps)

    def choose(self, step: int) -> np.ndarray:
        """The sequences that the rows of the table stand for at a step, (rows,)."""
        block = step // self.recipe.redraw if self.drawn else 0
        if block != self.block:
            self.block, self.chosen = block, np.arange(self.rows)
            if self.drawn:
                random = np.random.default_rng((self.seed, block, 1))
                self.chosen = random.choice(len(self.index.counts), self.rows, replace=False)
            self.ends = np.cumsum(self.index.counts[self.chosen])
        return self.chosen

    def groups(self, model, recipe) -> list[dict]:
        """The table, of which a step meets few rows, has a learning rate of its own, and no weight decay: its prior is
        in the bound, and a second one would move its rows away from the closed form."""
        groups = [{"params": [p for name, p in model.named_parameters() if name != "table"]}]
        if isinstance(model, FHVAE):
            groups.append({"params": [model.table], "rate": recipe.table_rate, "weight_decay": 0.0})
        return groups

    def prepare(self, model, optimiser, recipe, step: int) -> None:
        """Where the table's rows are drawn anew, they get the closed form of their sequences."""
        if isinstance(model, FHVAE) and self.drawn and step > 0 and step % recipe.redraw == 0:
            model.table.data.copy_(self.s_vectors(model, self.index, self.choose(step)))
            optimiser.state.pop(model.table, None)  # the moments were other sequences'

    def __call__(self, step: int) -> SegmentBatch:
        chosen = self.choose(step)
        drawn = np.random.default_rng((self.seed, step)).integers(self.ends[-1], size=self.recipe.batch)
        rows, numbers = among(self.index, chosen, self.ends, drawn)
        counts = torch.from_numpy(self.index.counts[chosen[rows]])
        x = self.features(self.index[numbers])
        return SegmentBatch(x, counts.to(x), torch.from_numpy(rows).to(self.device))

    @torch.no_grad()
    def s_vectors(self, model: FHVAE, index: Segments, chosen: np.ndarray) -> Tensor:
        """The closed form of μ2 for some sequences of an index, (chosen, z2_latent)."""
        ends = np.cumsum(index.counts[chosen])
        sums = torch.zeros(len(chosen), model.config.z2_latent, device=self.device)
        for first in range(0, ends[-1], 4 * self.recipe.batch):
            some = np.arange(first, min(first + 4 * self.recipe.batch, ends[-1]))
            rows, numbers = among(index, chosen, ends, some)
            x = self.features(index[numbers])
            z2 = model.encoder_z2(model.standardise(x)).mean
            sums.index_put_((torch.from_numpy(rows).to(self.device),), z2.to(sums), accumulate=True)  # in order
        return model.s_vector_of(sums, torch.from_numpy(index.counts[chosen]).to(sums)[:, None])

    def development(self, corpus: Corpus, model, recipe) -> Iterator[tuple[SegmentBatch, int]]:
        """Every segment, its sequence's s-vector from the closed form."""
        index = feature_segments(corpus, recipe)
        s_vectors = None
        if isinstance(model, FHVAE):
            s_vectors = self.s_vectors(model, index, np.arange(len(index.counts)))
        for numbers, cuts in index.in_order(recipe.batch):
            rows, x = index.rows(numbers), self.features(cuts)
            counts = torch.from_numpy(index.counts[rows]).to(x)
            yield SegmentBatch(x, counts, None, None if s_vectors is None else s_vectors[rows]), len(x)


def mean_and_deviation(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Per bin, in float64, over all frames of pieces (frames, bins): (bins,) each"""
    count, total, squares = 0, 0.0, 0.0
    for frames in pieces:
        frames = frames.double()
        count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def among(index: Segments, chosen: np.ndarray, ends: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of segments counted through the chosen sequences only, `ends` their ends in that count: the row in `chosen` of
    each, and its number in the index."""
    rows = np.searchsorted(ends, places, side="right")
    return rows, places - ends[rows] + index.ends[chosen[rows]]


def feature_segments(corpus: Corpus, recipe, shift: int = 0) -> Segments:
    """The segments of `frames` frames, `shift` frames apart (the recipe's if 0), of every utterance in the recipe's
    domain."""
    stft = audio.FEATURES
    if recipe.domain:
        corpus = replace(corpus, utterances=tuple(corpus.utterances[i] for i in members(corpus, recipe.domain)))
    return Segments(corpus, stft.samples(recipe.frames), (shift or recipe.shift) * stft.hop, recipe.trim)


class Utterances:
    """Whole utterances, untrimmed, with what is said in them, for recognisers.

    Targets "phones" or "characters": a TranscriptBatch of utterances of about the same length. Every pass over the
    corpus orders them anew.

    Targets "frames": a FrameBatch for truncated back-propagation through time. Each row of the batch is a lane that
    reads one utterance after the other, `frames` frames at each step, in an order of its own that is new in every
    pass. As all orders take the same number of steps, where a lane is follows from the step. The label of a frame
    comes `delay` frames after it; for that the last frame of an utterance is repeated.
    """

    unused = "without the labels that are learned"

    def __init__(self, corpus: Corpus, recipe, seed: int, device: torch.device):
        self.recipe, self.seed, self.device = recipe, seed, device
        inside = members(corpus, recipe.domain)
        self.used = [i for i in inside if transcript(corpus.utterances[i], recipe.targets)]
        if not self.used:
            possible = [t for t in TARGETS if any(transcript(corpus.utterances[i], t) for i in inside)]
            remedy = f"try targets={' or '.join(possible)}" if possible else "expected phone labels or text"
            needed = "text" if recipe.targets == "characters" else "phone labels"
            raise CorpusError(f"{corpus.name}: has no {needed} for targets={recipe.targets}; {remedy}")
        self.corpus, self.skipped = corpus, len(inside) - len(self.used)
        self.features = utterance_features(corpus, recipe, device)
        lengths = [audio.FEATURES.frames(corpus.utterances[i].length) for i in self.used]
        self.lengths, self.steps = np.array(lengths), -(-(np.array(lengths) + recipe.delay) // recipe.frames)
        if recipe.targets == "frames":
            self.per_epoch = -(-int(self.steps.sum()) // recipe.batch)
        else:
            self.per_epoch = -(-len(self.used) // recipe.batch)
        self.orders, self.loaded, self.held_out = {}, {}, None

    def fit(self, model, fresh: bool) -> None:
        """Mean and deviation of the features, the symbols to be told apart, and how often each is: a model that has
        been trained before (not `fresh`) keeps them."""
        if fresh:
            frames, symbols = self.recipe.targets == "frames", Counter()
            for i in self.used:
                utterance = self.corpus.utterances[i]
                symbols.update(frame_labels(utterance) if frames else transcript(utterance, self.recipe.targets))
            model.build(self.features.bins, tuple(sorted(symbols)))
            used = tqdm(self.used, "statistics", leave=False, disable=None)
            model.standardise.set(*mean_and_deviation(self.features[i] for i in used))
            if frames:
                shares = torch.tensor([symbols[symbol] for symbol in model.config.symbols]) / symbols.total()
                model.log_priors.copy_(shares.log())
        if isinstance(model, Acoustic):
            model.carry(self.recipe.batch)
        self.prepare(model, None, self.recipe, 0)

    def groups(self, model, recipe) -> list[dict]:
        return [{"params": list(model.parameters())}]

    def prepare(self, model, optimiser, recipe, step: int) -> None:
        """The labels become the numbers that the model has for them."""
        first = 0 if recipe.targets == "frames" else 1  # 0 is the blank
        self.numbers = {symbol: number for number, symbol in enumerate(model.config.symbols, first)}

    def __call__(self, step: int) -> FrameBatch | TranscriptBatch:
        if self.recipe.targets != "frames":
            number, place = divmod(step, self.per_epoch)
            return self.transcripts(self.order_of("batches", number)[place])
        rows = [self.lane(lane, step) for lane in range(self.recipe.batch)]
        x, labels, first = zip(*rows, strict=True)
        return FrameBatch(torch.stack(x), torch.stack(labels), torch.tensor(first, device=self.device))

    def lane(self, lane: int, step: int) -> tuple[Tensor, Tensor, bool]:
        """What one lane reads at a step: (frames, bins), (frames,) and whether an utterance begins."""
        number, place = divmod(step, int(self.steps.sum()))
        order, ends = self.order_of(lane, number)
        k = np.searchsorted(ends, place, side="right")
        at = place - int(ends[k] - self.steps[order[k]])
        if self.loaded.get(lane, (None,))[0] != order[k]:
            self.loaded[lane] = order[k], *self.labelled(order[k], self.steps[order[k]] * self.recipe.frames)
        _, x, labels = self.loaded[lane]
        here = slice(at * self.recipe.frames, (at + 1) * self.recipe.frames)
        return x[here], labels[here], at == 0

    def order_of(self, lane: int | str, number: int):
        """The order of the utterances in pass `number` and the steps at which each is over; of `batches`, what is in
        each."""
        if self.orders.get(lane, (None,))[0] != number:
            random = np.random.default_rng((self.seed, number, *([] if lane == "batches" else [lane])))
            if lane == "batches":
                order = np.argsort(self.lengths * random.uniform(0.9, 1.1, len(self.lengths)))
                groups = np.array_split(order, self.per_epoch)
                self.orders[lane] = number, [groups[k] for k in random.permutation(len(groups))]
            else:
                order = random.permutation(len(self.lengths))
                self.orders[lane] = number, (order, np.cumsum(self.steps[order]))
        return self.orders[lane][1]

    def labelled(self, k: int, frames: int) -> tuple[Tensor, Tensor]:
        """An utterance of `used` made `frames` long: (frames, bins), (frames,)"""
        x, utterance = self.features[self.used[k]], self.corpus.utterances[self.used[k]]
        labels = torch.full((frames,), -1)
        numbers = [self.numbers.get(symbol, -1) for symbol in frame_labels(utterance)]
        labels[self.recipe.delay : self.recipe.delay + len(x)] = torch.tensor(numbers)
        x = torch.cat([x, x[-1:].expand(frames - len(x), -1)])
        return x, labels.to(self.device)

    def transcripts(self, chosen: np.ndarray) -> TranscriptBatch:
        utterances = [self.corpus.utterances[self.used[k]] for k in chosen]
        spoken = [transcript(u, self.recipe.targets) for u in utterances]
        labels = [torch.tensor([self.numbers[s] for s in symbols if s in self.numbers]) for symbols in spoken]
        x = pad_sequence([self.features[self.used[k]] for k in chosen], batch_first=True)
        lengths, counts = torch.from_numpy(self.lengths[chosen]), torch.tensor([len(row) for row in labels])
        labels = pad_sequence(labels, batch_first=True).long()
        return TranscriptBatch(x, *(tensor.to(self.device) for tensor in (lengths, labels, counts)))

    def development(self, corpus: Corpus, model, recipe) -> Iterator[tuple[FrameBatch | TranscriptBatch, int]]:
        """Every utterance of the domain, whole."""
        if self.held_out is None or self.held_out.corpus is not corpus:
            self.held_out = Utterances(corpus, recipe, self.seed, self.device)
        source = self.held_out
        source.prepare(model, None, recipe, 0)
        order = np.argsort(source.lengths, kind="stable")
        for first in range(0, len(order), recipe.batch):
            chosen = order[first : first + recipe.batch]
            if recipe.targets != "frames":
                yield source.transcripts(chosen), len(chosen)
                continue
            longest = int(source.lengths[chosen].max()) + recipe.delay
            x, labels = zip(*(source.labelled(k, longest) for k in chosen), strict=True)
            begun = torch.ones(len(chosen), dtype=torch.bool, device=self.device)
            batch = FrameBatch(torch.stack(x), torch.stack(labels), begun)
            yield batch, max(1, int((batch.labels >= 0).sum()))


def in_domain(utterance: Utterance, domain: str) -> bool:
    """Whether an utterance is in a domain: names of DOMAINS with commas between them. Names of one field (sex,
    condition) are alternatives; of both fields, one has to fit in each. An empty domain holds all."""
    allowed = {}
    for name in domain.split(",") if domain else ():
        field, values = DOMAINS[name]
        allowed.setdefault(field, set()).update(values)
    return all(getattr(utterance, field) in values for field, values in allowed.items())


def members(corpus: Corpus, domain: str) -> list[int]:
    """Which utterances are in a domain. CorpusError where none is."""
    inside = [i for i, utterance in enumerate(corpus.utterances) if in_domain(utterance, domain)]
    if not inside:
        there = [name for name in DOMAINS if any(in_domain(u, name) for u in corpus.utterances)] or ["none of these"]
        split = corpus.utterances[0].split
        raise CorpusError(f"{corpus.name}: no utterance of {split} is in domain={domain}; there is: {', '.join(there)}")
    return inside


def transcript(utterance: Utterance, targets: str) -> list[str]:
    """What is said, in phones (targets "frames" or "phones") or in lower-case characters; empty where unknown."""
    return list(utterance.text.lower()) if targets == "characters" else [label for *_, label in utterance.phones]


def frame_labels(utterance: Utterance) -> list[str]:
    """The phone at the centre of each frame of `audio.FEATURES`: the one that began last, so that frames after the
    last label belong to the last phone, and frames before the first to the first."""
    starts = [start for start, *_ in utterance.phones]
    centres = np.arange(audio.FEATURES.frames(utterance.length)) * audio.FEATURES.hop
    begun = np.searchsorted(starts, centres, side="right")
    return [utterance.phones[k][2] for k in (begun - 1).clip(0)]


SOURCES = {"spectra": Spectra, "segments": FeatureSegments, "utterances": Utterances}
