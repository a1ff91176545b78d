"""Whole utterances with what is said in them, for recognisers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data import audio
from ..data.corpus import CLEAN, Corpus, CorpusError, Utterance
from ..models.acoustic import Acoustic
from ..models.recognisers import FrameBatch, Recogniser, TranscriptBatch
from .batches import Batches
from .config import TARGETS, Recipe, SettingError
from .features import mean_and_deviation, utterance_features

# Domain → the field of an utterance that decides, and its values in the domain.
DOMAIN_FIELDS = {
    "female": ("sex", ("F",)),
    "male": ("sex", ("M",)),
    "clean": ("condition", CLEAN),
    "noisy": ("condition", ("noisy",)),
    "channel": ("condition", ("channel",)),
    "both": ("condition", ("both",)),
}


class Utterances(Batches):
    """Whole utterances, untrimmed, with what is said in them.

    Targets "phones" or "characters": a TranscriptBatch of utterances of about the same length, in
    a new order in every pass over the corpus.

    Targets "frames": a FrameBatch for truncated back-propagation through time. Each row of the
    batch is a lane that reads one utterance after the other, `frames` frames in each step, in an
    order of its own that is new in every pass. All orders take the same number of steps, so the
    position of a lane follows from the step. The label of a frame comes `delay` frames after it;
    for that the last frame of an utterance is repeated.
    """

    model_types = (Recogniser,)
    recipe_fields = ("features", "extractor", "latent", "targets", "delay", "domain")
    needs_labels = True
    can_be_distributed = False  # Lanes carry a state, and transcripts differ in length.
    skipped_because = "without the labels that are learned"

    def __init__(self, corpus: Corpus, recipe: Recipe, seed: int, device: torch.device):
        indices = members(corpus, recipe.domain)
        self.used = []
        for i in indices:
            if transcript(corpus.utterances[i], recipe.targets):
                self.used.append(i)
        if not self.used:
            raise CorpusError(missing_labels(corpus, indices, recipe.targets))
        self.features = utterance_features(corpus, recipe, device)
        self.extractor = self.features.extractor
        self.is_framewise = recipe.targets == "frames"
        lengths = [audio.FEATURE_STFT.frames(corpus.utterances[i].length) for i in self.used]
        self.lengths = np.array(lengths)
        # Steps that a lane takes for each utterance.
        self.lane_steps = -(-(self.lengths + recipe.delay) // recipe.frames)
        examples = int(self.lane_steps.sum()) if self.is_framewise else len(self.used)
        steps_per_epoch = -(-examples // recipe.batch)
        skipped = len(indices) - len(self.used)
        super().__init__(corpus, recipe, seed, device, steps_per_epoch, skipped)
        self.cached_lane_order = lru_cache(recipe.batch)(self.lane_order)
        self.cached_groups = lru_cache(1)(self.groups_of_pass)
        self.cached_frames = lru_cache(recipe.batch)(self.labelled_frames)  # one for each lane

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the features, (bins,) each."""
        indices = tqdm(self.used, "statistics", leave=False, disable=None)
        return mean_and_deviation(self.features[i] for i in indices)

    def symbol_counts(self) -> Counter:
        """Return how often each symbol that is learned occurs: in frames, or in transcripts."""
        counts = Counter()
        for i in self.used:
            utterance = self.corpus.utterances[i]
            if self.is_framewise:
                counts.update(frame_labels(utterance))
            else:
                counts.update(transcript(utterance, self.recipe.targets))
        return counts

    def prepare(self, model: Recogniser, fresh: bool) -> None:
        """Also give a new model its symbols and, where frames have labels, their priors."""
        if fresh:
            counts = self.symbol_counts()
            model.build(self.features.bins, tuple(sorted(counts)))
            model.standardise.set(*self.statistics())
            if self.is_framewise and isinstance(model, Acoustic):
                symbol_counts = [counts[symbol] for symbol in model.config.symbols]
                shares = torch.tensor(symbol_counts) / counts.total()
                model.log_priors.copy_(shares.log())
        if isinstance(model, Acoustic):
            model.carry(self.recipe.batch)
        self.number_labels(model.config.symbols)

    def resume(self, model: Recogniser) -> None:
        self.number_labels(model.config.symbols)

    def number_labels(self, symbols: tuple[str, ...]) -> None:
        """Let the labels of batches be the numbers that a model has for its symbols. Of CTC, 0 is
        the blank."""
        first = 0 if self.is_framewise else 1
        self.numbers = {symbol: number for number, symbol in enumerate(symbols, first)}

    def __call__(self, step: int) -> FrameBatch | TranscriptBatch:
        if not self.is_framewise:
            pass_number, group = divmod(step, self.steps_per_epoch)
            return self.transcript_batch(self.cached_groups(pass_number)[group])
        rows = [self.lane(lane, step) for lane in range(self.recipe.batch)]
        x, labels, is_first = zip(*rows, strict=True)
        is_first = torch.tensor(is_first, device=self.device)
        return FrameBatch(torch.stack(x), torch.stack(labels), is_first)

    def lane(self, lane: int, step: int) -> tuple[Tensor, Tensor, bool]:
        """Return what one lane reads in a step: features (frames, bins), labels (frames,), and
        whether an utterance begins."""
        pass_number, pass_step = divmod(step, int(self.lane_steps.sum()))
        order, ends = self.cached_lane_order(lane, pass_number)
        position = np.searchsorted(ends, pass_step, side="right")
        k = order[position]
        piece = pass_step - int(ends[position] - self.lane_steps[k])
        x, labels = self.cached_frames(k, self.lane_steps[k] * self.recipe.frames)
        frames = slice(piece * self.recipe.frames, (piece + 1) * self.recipe.frames)
        return x[frames], labels[frames], piece == 0

    def lane_order(self, lane: int, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the utterances in a pass of a lane, and the steps at which each
        ends."""
        random = np.random.default_rng((self.seed, pass_number, lane))
        order = random.permutation(len(self.lengths))
        return order, np.cumsum(self.lane_steps[order])

    def groups_of_pass(self, pass_number: int) -> list[np.ndarray]:
        """Return the utterances of each batch of a pass, of similar lengths."""
        random = np.random.default_rng((self.seed, pass_number))
        order = np.argsort(self.lengths * random.uniform(0.9, 1.1, len(self.lengths)))
        groups = np.array_split(order, self.steps_per_epoch)
        return [groups[k] for k in random.permutation(len(groups))]

    def labelled_frames(self, k: int, frames: int) -> tuple[Tensor, Tensor]:
        """Return utterance `used[k]`, made so many frames long: features (frames, bins) and labels
        (frames,)."""
        x = self.features[self.used[k]]
        utterance = self.corpus.utterances[self.used[k]]
        numbers = [self.numbers.get(symbol, -1) for symbol in frame_labels(utterance)]
        labels = torch.full((frames,), -1)
        labels[self.recipe.delay : self.recipe.delay + len(x)] = torch.tensor(numbers)
        x = torch.cat([x, x[-1:].expand(frames - len(x), -1)])
        return x, labels.to(self.device)

    def transcript_batch(self, chosen: np.ndarray) -> TranscriptBatch:
        x = []
        labels = []
        for k in chosen:
            symbols = transcript(self.corpus.utterances[self.used[k]], self.recipe.targets)
            numbers = [self.numbers[symbol] for symbol in symbols if symbol in self.numbers]
            labels.append(torch.tensor(numbers))
            x.append(self.features[self.used[k]])
        lengths = torch.from_numpy(self.lengths[chosen])
        counts = torch.tensor([len(row) for row in labels])
        return TranscriptBatch(
            pad_sequence(x, batch_first=True),
            lengths.to(self.device),
            pad_sequence(labels, batch_first=True).long().to(self.device),
            counts.to(self.device),
        )

    def development(self, model: Recogniser) -> Iterator[tuple[FrameBatch | TranscriptBatch, int]]:
        """Yield every utterance of the domain, whole."""
        self.number_labels(model.config.symbols)
        order = np.argsort(self.lengths, kind="stable")
        for first in range(0, len(order), self.recipe.batch):
            chosen = order[first : first + self.recipe.batch]
            if not self.is_framewise:
                yield self.transcript_batch(chosen), len(chosen)
                continue
            longest = int(self.lengths[chosen].max()) + self.recipe.delay
            rows = [self.labelled_frames(k, longest) for k in chosen]
            x, labels = zip(*rows, strict=True)
            is_first = torch.ones(len(chosen), dtype=torch.bool, device=self.device)
            batch = FrameBatch(torch.stack(x), torch.stack(labels), is_first)
            yield batch, max(1, int((batch.labels >= 0).sum()))

    @property
    def size(self) -> str:
        return super().size if self.is_framewise else f"{self.recipe.batch} utterances"

    @classmethod
    def derived_settings(cls, recipe: Recipe) -> dict:
        criterion = "frames" if recipe.targets == "frames" else "ctc"
        settings = {"delay": recipe.delay, "criterion": criterion}
        return super().derived_settings(recipe) | settings

    @classmethod
    def check(cls, name: str, recipe: Recipe, config: dict, overrides: dict[str, str]) -> None:
        super().check(name, recipe, config, overrides)
        if recipe.targets == "frames" and "criterion" not in config:
            raise SettingError(
                f"targets=frames: {name} learns from transcripts; expected phones or characters"
            )
        if recipe.targets != "frames":
            for setting in ("delay", "frames"):
                if setting in overrides:
                    raise SettingError(
                        f"{setting}={overrides[setting]}: is for targets=frames, "
                        f"not {recipe.targets}"
                    )

    @classmethod
    def check_lengths(cls, corpus: Corpus, recipe: Recipe) -> None:
        """Utterances of every length are read to their end."""

    @classmethod
    def recipe_for(
        cls, recipe: Recipe, model: Recogniser, stft: audio.STFT, former: dict
    ) -> Recipe:
        inherited = ("features", "extractor", "latent", "targets", "delay")
        return replace(recipe, **{name: former[name] for name in inherited})


def missing_labels(corpus: Corpus, indices: list[int], targets: str) -> str:
    """Return the message of an error: none of these utterances has labels for these targets."""
    possible = []
    for other in TARGETS:
        if any(transcript(corpus.utterances[i], other) for i in indices):
            possible.append(other)
    needed = "text" if targets == "characters" else "phone labels"
    remedy = "expected phone labels or text"
    if possible:
        remedy = f"try targets={' or '.join(possible)}"
    return f"{corpus.name}: has no {needed} for targets={targets}; {remedy}"


def in_domain(utterance: Utterance, domain: str) -> bool:
    """Return whether an utterance is in a domain: names of DOMAINS with commas between them. Names
    of one field (sex, condition) are alternatives; of both fields, one has to fit in each. An
    empty domain holds all."""
    allowed = {}
    for name in domain.split(",") if domain else ():
        field, values = DOMAIN_FIELDS[name]
        allowed.setdefault(field, set()).update(values)
    return all(getattr(utterance, field) in values for field, values in allowed.items())


def members(corpus: Corpus, domain: str) -> list[int]:
    """Return the indices of the utterances in a domain. Raises CorpusError where there are none."""
    indices = []
    for index, utterance in enumerate(corpus.utterances):
        if in_domain(utterance, domain):
            indices.append(index)
    if indices:
        return indices
    present = []
    for name in DOMAIN_FIELDS:
        if any(in_domain(utterance, name) for utterance in corpus.utterances):
            present.append(name)
    raise CorpusError(
        f"{corpus.name}: no utterance of {corpus.utterances[0].split} is in domain={domain}; "
        f"there is: {', '.join(present) or 'none of these'}"
    )


def transcript(utterance: Utterance, targets: str) -> list[str]:
    """Return the transcript as phones (targets "frames" or "phones") or as lower-case characters.
    It is empty where it is unknown."""
    if targets == "characters":
        return list(utterance.text.lower())
    return [label for _, _, label in utterance.phones]


def frame_labels(utterance: Utterance) -> list[str]:
    """Return the phone at the centre of each frame of `audio.FEATURE_STFT`: the last one that has
    begun. Frames after the last label belong to the last phone, frames before the first to the
    first."""
    starts = [start for start, *_ in utterance.phones]
    centres = np.arange(audio.FEATURE_STFT.frames(utterance.length)) * audio.FEATURE_STFT.hop
    num_begun = np.searchsorted(starts, centres, side="right")
    return [utterance.phones[index][2] for index in (num_begun - 1).clip(0)]
