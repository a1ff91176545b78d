"""What the latents of an FHVAE know: linear probes, and what a change of z2 changes in the decoded speech.

Probes are trained on the training split; only those of the speaker on half of each test speaker's utterances, and
tested on the other half.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import audio, synthetic
from ..corpus import Corpus, Utterance, built_in_speakers
from . import Run
from .segments import encode, recipe_of

UTTERANCES = 640  # of the training split, at most, spread over it
UNDER_CONDITIONS = 160  # of either split, at most, each under every condition
FRAMES = 20_000  # of the training split, for the phones of frames
CONTEXT = (-3, 0, 3)  # the frames that tell the phone of frame 0
PENALTY = {"latents": 1e-3, "features": 1e-2}  # on the squared weights of standardised inputs


# ------------------------------------------------------------------------------------------------ linear models


@dataclass
class Linear:
    """x (n, inputs) → (n, outputs), the inputs standardised first."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor  # (inputs, outputs)
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation @ self.weight + self.bias


def regress(x: Tensor, y: Tensor, penalty: float) -> Linear:
    """Ridge regression of y (n,) on x (n, inputs): on the standardised inputs X and y without its mean,

    the w with the least ‖Xw − y‖²/n + penalty·‖w‖², (XᵀX/n + penalty·I)⁻¹ Xᵀy/n.
    """
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    scaled = (x - mean) / deviation
    covariance = scaled.T @ scaled / len(x) + penalty * torch.eye(x.shape[1]).to(x)
    weight = torch.linalg.solve(covariance, scaled.T @ (y - y.mean()).to(x) / len(x))
    return Linear(mean, deviation, weight, y.mean().to(x))


@dataclass
class Classifier:
    scores: Linear
    classes: np.ndarray  # (outputs,) of str

    def __call__(self, x: Tensor) -> np.ndarray:
        """(n, inputs) → the classes (n,)"""
        return self.classes[self.scores(x).argmax(1).numpy()]


def classify(x: Tensor, labels: np.ndarray, penalty: float, iterations: int = 60) -> Classifier:
    """Multinomial logistic regression of labels (n,) on x (n, inputs), by L-BFGS: on the standardised inputs, the
    weights with the least cross-entropy (mean over n) + ½·penalty·‖W‖²."""
    classes, numbers = np.unique(labels, return_inverse=True)
    mean, deviation, targets = x.mean(0), x.std(0, correction=0).clamp_min(1e-8), torch.from_numpy(numbers)
    scaled = (x - mean) / deviation
    weight = torch.zeros(x.shape[1], len(classes), dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(scaled @ weight + bias, targets) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return Classifier(Linear(mean, deviation, weight.detach(), bias.detach()), classes)


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found == labels).mean())


def chance(labels: np.ndarray) -> float:
    """The accuracy of always naming the most frequent class."""
    return max(Counter(labels).values()) / len(labels)


def r_squared(found: Tensor, y: Tensor) -> float:
    """1 − Σ(y − ŷ)² / Σ(y − ȳ)²: 1 for a perfect regression, 0 for one that knows the mean and no more."""
    return float(1 - (y - found).square().sum() / (y - y.mean()).square().sum())


# ------------------------------------------------------------------------------------------------- the utterances


@dataclass
class Encoded:
    """An utterance as the probes see it; everything on the CPU."""

    utterance: Utterance
    z1: Tensor  # (N, z1_latent) the means of q(z1) of its segments
    z2: Tensor
    mu1: Tensor  # (z1_latent,)
    mu2: Tensor
    phones: np.ndarray  # (N,) the phone in the middle of each segment, "" where there is no label
    log_f0: float  # ln Hz, the voice's where it is known, else the median over the frames; nan where there is none
    tract: float  # vocal-tract length in cm; nan where it is not known
    average: Tensor  # (bins,) mean of the standardised features over the frames with speech
    frames: Tensor  # (n, CONTEXT · bins) some frames with their context
    frame_phones: np.ndarray  # (n,)


def condition_generator(utterance: Utterance, condition: str, seed: int) -> np.random.Generator:
    """What `apply_condition` draws from for an utterance, the same in every run."""
    return np.random.default_rng((seed, zlib.crc32(f"{utterance.name} {condition}".encode())))


def phones_at(utterance: Utterance, samples: np.ndarray) -> np.ndarray:
    """The phones at some samples (n,) of the untrimmed utterance; "" where there is no label."""
    if not utterance.phones:
        return np.full(len(samples), "")
    starts, stops, labels = (np.array(column) for column in zip(*utterance.phones, strict=True))
    row = np.searchsorted(starts, samples, side="right") - 1
    return np.where((row >= 0) & (samples < stops[row]), labels[row], "")


def phones_of_frames(run: Run, utterance: Utterance, frames: int) -> np.ndarray:
    """The phone in the middle of each frame of its features, (frames,)."""
    first = utterance.trim[0] if recipe_of(run).trim else 0
    return phones_at(utterance, first + run.stft.hop * np.arange(frames))


def with_context(features: Tensor) -> Tensor:
    """(frames, bins) → (frames, CONTEXT · bins), the first and the last frame repeated beyond the ends"""
    numbers = torch.arange(len(features))
    return torch.cat([features[(numbers + k).clamp(0, len(features) - 1)] for k in CONTEXT], dim=1)


def median_log_f0(power: Tensor, speech: Tensor) -> float:
    """ln Hz: the median of the pitch over the frames with speech (frames,) of (frames, bins); nan under 10 frames."""
    hertz = audio.pitch(power, audio.FEATURES)[speech]
    hertz = hertz[~hertz.isnan()]
    return float(hertz.median().log()) if len(hertz) >= 10 else math.nan


def observe(run: Run, corpus: Corpus, what: str, keep: int = 0) -> list[Encoded]:
    """The utterances of a corpus through the model; `keep` of their frames, at most, all in all."""
    recipe, standardise = recipe_of(run), run.model.standardise
    voices = built_in_speakers() if corpus.without_conditions().layout == "built-in" else {}
    stride = max(1, round(corpus.seconds * audio.SAMPLE_RATE / run.stft.hop / keep)) if keep else None
    encoded = []
    for index, u in enumerate(tqdm(corpus.utterances, what, unit=" utterances", leave=False, disable=None)):
        waveform = corpus.waveform(index, trim=recipe.trim)
        x, z1, z2 = encode(run, waveform)
        mu1, mu2 = run.model.mu1(z1).cpu(), run.model.s_vector(z2).cpu()
        features, phones = standardise(x).cpu(), phones_of_frames(run, u, len(x))
        middles = np.arange(len(z1)) * recipe.shift + recipe.frames // 2
        speech = audio.voiced_frames(torch.from_numpy(waveform))
        if u.speaker in voices:
            log_f0, tract = math.log(voices[u.speaker].f0), voices[u.speaker].vocal_tract_length
        else:
            power = audio.log_magnitude_to_power(audio.log_magnitude(torch.from_numpy(waveform)))
            log_f0, tract = median_log_f0(power, speech), math.nan
        kept = np.flatnonzero(phones != "")[::stride] if keep else np.arange(0)
        encoded.append(Encoded(
            u, z1.cpu(), z2.cpu(), mu1, mu2, np.append(phones, [""] * recipe.frames)[middles], log_f0, tract,
            features[speech].mean(0), with_context(features)[kept], phones[kept],
        ))
    return encoded


def under_conditions(run: Run, corpus: Corpus, seed: int) -> list[tuple[str, Tensor, Tensor]]:
    """(condition, μ1, μ2) of utterances under every condition, laid over them."""
    trim, rows = recipe_of(run).trim, []
    corpus = corpus.spread(UNDER_CONDITIONS)
    for index, u in enumerate(tqdm(corpus.utterances, "conditions", unit=" utterances", leave=False, disable=None)):
        waveform = corpus.waveform(index, trim=trim)
        for condition in synthetic.CONDITIONS:
            generator = condition_generator(u, condition, seed)
            _, z1, z2 = encode(run, synthetic.apply_condition(waveform, condition, generator))
            rows.append((condition, run.model.mu1(z1).cpu(), run.model.s_vector(z2).cpu()))
    return rows


# -------------------------------------------------------------------------------------------------------- probes

Labelled = list[tuple[str | float, Tensor, Tensor]]  # label, z1 or μ1, z2 or μ2


def per_segment(encoded: Iterable[Encoded], label: Callable[[Encoded], Sequence[str]]) -> Labelled:
    return [row for e in encoded for row in zip(label(e), e.z1, e.z2, strict=True) if row[0] != ""]


def per_utterance(encoded: Iterable[Encoded], label: Callable[[Encoded], str | float]) -> Labelled:
    rows = [(label(e), e.mu1, e.mu2) for e in encoded]
    return [row for row in rows if row[0] != "" and row[0] == row[0]]  # known: neither "" nor nan


def probe(train: Labelled, test: Labelled) -> dict | None:
    """How well a linear probe of z1 (μ1) and one of z2 (μ2) does: {"measure", "chance", "z1", "z2", "train", "test"},
    of classes the accuracy, of numbers R². None where there is nothing to tell apart."""
    if min(len({label for label, *_ in rows}) for rows in (train, test)) < 2:
        return None
    labels, *inputs = zip(*train, strict=True)
    test_labels, *test_inputs = zip(*test, strict=True)
    result = {"train": len(train), "test": len(test)}
    if isinstance(labels[0], str):
        labels, test_labels = np.array(labels), np.array(test_labels)
        result |= {"measure": "accuracy", "chance": chance(test_labels)}
        fit, score = classify, accuracy
    else:
        labels, test_labels = torch.tensor(labels), torch.tensor(test_labels)
        result |= {"measure": "r_squared", "chance": 0.0}
        fit, score = regress, r_squared
    for name, x, other in zip(("z1", "z2"), inputs, test_inputs, strict=True):
        result[name] = score(fit(torch.stack(x), labels, PENALTY["latents"])(torch.stack(other)), test_labels)
    return result


def halves(encoded: list[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Every other utterance of each speaker, and the rest; speakers with one utterance are left out."""
    counts, seen = Counter(e.utterance.speaker for e in encoded), Counter()
    first, second = [], []
    for e in encoded:
        if counts[e.utterance.speaker] > 1:
            (first, second)[seen[e.utterance.speaker] % 2].append(e)
            seen[e.utterance.speaker] += 1
    return first, second


def crossed(rows: Callable[[list[Encoded]], Labelled], test: list[Encoded]) -> dict | None:
    """A probe trained on half of each speaker's utterances and tested on the other half, mean of both ways."""
    first, second = halves(test)
    found = [probe(rows(train), rows(test)) for train, test in ((first, second), (second, first))]
    if None in found:
        return None
    return found[0] | {name: (found[0][name] + found[1][name]) / 2 for name in ("chance", "z1", "z2")}


def probes(run: Run, train: list[Encoded], test: list[Encoded], corpus: Corpus, seed: int) -> dict[str, dict | None]:
    """Every probe by its column of the table; None where the corpus cannot tell. `corpus`: the utterances of `train`;
    conditions are laid over them, and over those of the run's test, where they have none of their own."""
    conditions = [per_utterance(e, lambda e: e.utterance.condition) for e in (train, test)]
    if min(len({label for label, *_ in rows}) for rows in conditions) < 2:
        conditions = [under_conditions(run, c, seed) for c in (corpus, run.test)]
    return {
        "phone": probe(*(per_segment(e, lambda e: e.phones) for e in (train, test))),
        "speaker": crossed(partial(per_segment, label=lambda e: [e.utterance.speaker] * len(e.z1)), test),
        "speaker μ": crossed(partial(per_utterance, label=lambda e: e.utterance.speaker), test),
        "sex μ": probe(*(per_utterance(e, lambda e: e.utterance.sex) for e in (train, test))),
        "condition μ": probe(*conditions),
        "F0 μ": probe(*(per_utterance(e, lambda e: e.log_f0) for e in (train, test))),
        "tract μ": probe(*(per_utterance(e, lambda e: e.tract) for e in (train, test))),
    }


# -------------------------------------------------------------------------------------------------- instruments


@dataclass
class Instruments:
    """What is read off features (frames, bins), real or decoded; made from the training split.

    F0: of log-magnitude features the median pitch, of filter banks a ridge regression on the average frame with
    speech. Vocal-tract length: such a regression. Phones: a linear classifier of frames with their context.
    """

    f0: Linear | None
    tract: Linear | None
    phones: Classifier | None

    @classmethod
    def fit(cls, run: Run, train: list[Encoded]) -> "Instruments":
        def regression(name: str) -> Linear | None:
            known = [e for e in train if not math.isnan(getattr(e, name))]
            values = torch.tensor([getattr(e, name) for e in known])
            if len(set(values.tolist())) < 2:
                return None
            return regress(torch.stack([e.average for e in known]), values, PENALTY["features"])

        audible = recipe_of(run).features == "log_magnitude"
        labels = np.concatenate([e.frame_phones for e in train])
        phones = None
        if len(set(labels)) > 1:
            phones = classify(torch.cat([e.frames for e in train]), labels, PENALTY["features"])
        return cls(None if audible else regression("log_f0"), regression("tract"), phones)

    def measure(self, run: Run, features: Tensor, utterance: Utterance, waveform: np.ndarray) -> dict[str, float]:
        """ln F0, vocal-tract length in cm, and the share of frames whose phone is recognised, of the features
        (frames, bins) of an utterance, real or decoded; nan where it cannot be told. waveform: the real one."""
        voiced = audio.voiced_frames(torch.from_numpy(waveform))
        phones = phones_of_frames(run, utterance, len(features))
        scaled, found = run.model.standardise(features).cpu(), {"phones": math.nan}
        average = scaled[voiced].mean(0)
        if recipe_of(run).features == "log_magnitude":
            found["log_f0"] = median_log_f0(audio.log_magnitude_to_power(features.cpu()), voiced)
        else:
            found["log_f0"] = float(self.f0(average)) if self.f0 else math.nan
        found["tract"] = float(self.tract(average)) if self.tract else math.nan
        labelled = phones != ""
        if self.phones and labelled.any():
            found["phones"] = accuracy(self.phones(with_context(scaled)[labelled]), phones[labelled])
        return found
