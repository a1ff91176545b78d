"""What the latents of an FHVAE know: linear probes, and what a change of z2 changes in the decoded speech.

Probes are trained on the training split; only those of the speaker on half of each test speaker's utterances, and
tested on the other half.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus, Utterance, built_in_speakers
from ..evaluation.runs import Run
from .encoding import EncodedUtterance, encode

UTTERANCES = 640  # of the training split, at most, spread over it
FRAMES = 20_000  # of the training split, for the phones of frames
CONTEXT = (-3, 0, 3)  # the frames that tell the phone of frame 0
PENALTY = {"latents": 1e-3, "features": 1e-2}  # on the squared weights of standardised inputs


def standardiser(x: Tensor) -> Callable[[Tensor], Tensor]:
    """The function of (n, inputs) that gives x zero mean and unit variance."""
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    return lambda x: (x - mean) / deviation


def regress(x: Tensor, y: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression of y (n,) on x (n, inputs): on the standardised inputs X and y without its mean, the w with the
    least ‖Xw − y‖²/n + penalty·‖w‖², (XᵀX/n + penalty·I)⁻¹ Xᵀy/n. Returns the function of (n, inputs) or (inputs,)."""
    standardise, mean = standardiser(x), y.mean().to(x)
    scaled = standardise(x)
    covariance = scaled.T @ scaled / len(x) + penalty * torch.eye(x.shape[1]).to(x)
    weight = torch.linalg.solve(covariance, scaled.T @ (y - y.mean()).to(x) / len(x))
    return lambda x: standardise(x) @ weight + mean


def classify(x: Tensor, labels: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
    """Multinomial logistic regression of labels (n,) on x (n, inputs), by L-BFGS: on the standardised inputs, the
    weights with the least cross-entropy (mean over n) + ½·penalty·‖W‖². Returns x (n, inputs) → classes (n,)."""
    classes, numbers = np.unique(labels, return_inverse=True)
    standardise, targets = standardiser(x), torch.from_numpy(numbers)
    scaled = standardise(x)
    weight = torch.zeros(x.shape[1], len(classes), dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (
            F.cross_entropy(scaled @ weight + bias, targets) + penalty / 2 * weight.square().sum()
        )
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return lambda x: classes[(standardise(x) @ weight.detach() + bias.detach()).argmax(1).numpy()]


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found == labels).mean())


def r_squared(found: Tensor, y: Tensor) -> float:
    """1 − Σ(y − ŷ)² / Σ(y − ȳ)²: 1 for a perfect regression, 0 for one that knows the mean and no more."""
    return float(1 - (y - found).square().sum() / (y - y.mean()).square().sum())


@dataclass
class ObservedUtterance:
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


def phones_at(utterance: Utterance, samples: np.ndarray) -> np.ndarray:
    """The phones at some samples (n,) of the untrimmed utterance; "" where there is no label."""
    if not utterance.phones:
        return np.full(len(samples), "")
    starts, stops, labels = (np.array(column) for column in zip(*utterance.phones, strict=True))
    row = np.searchsorted(starts, samples, side="right") - 1
    return np.where((row >= 0) & (samples < stops[row]), labels[row], "")


def frames_of(
    run: Run, speech: EncodedUtterance, features: Tensor
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Of an utterance's own or of decoded features (frames, bins): standardised (frames, bins), the phone in the middle
    of each frame (frames,), and which frames have speech (frames,). Tensors on the CPU."""
    first = speech.utterance.trim[0] if run.recipe.trim else 0
    phones = phones_at(speech.utterance, first + run.stft.hop * np.arange(len(features)))
    return (
        run.model.standardise(features).cpu(),
        phones,
        audio.voiced_frames(torch.from_numpy(speech.waveform)),
    )


def with_context(features: Tensor) -> Tensor:
    """(frames, bins) → (frames, CONTEXT · bins), the first and the last frame repeated beyond the ends"""
    numbers = torch.arange(len(features))
    return torch.cat([features[(numbers + k).clamp(0, len(features) - 1)] for k in CONTEXT], dim=1)


def median_log_f0(log_magnitude: Tensor, voiced: Tensor) -> float:
    """ln Hz: the median of the pitch over the frames with speech (frames,) of (frames, bins); nan under 10 frames."""
    hertz = audio.pitch(audio.log_magnitude_to_power(log_magnitude), audio.FEATURE_STFT)[voiced]
    hertz = hertz[~hertz.isnan()]
    return float(hertz.median().log()) if len(hertz) >= 10 else math.nan


def observe(run: Run, corpus: Corpus, what: str, keep: int = 0) -> list[ObservedUtterance]:
    """The utterances of a corpus through the model; `keep` of their frames, at most, all in all."""
    recipe, encoded = run.recipe, []
    voices = built_in_speakers() if corpus.without_conditions().layout == "built-in" else {}
    stride = (
        max(1, round(corpus.seconds * audio.SAMPLE_RATE / run.stft.hop / keep)) if keep else None
    )
    for index, u in enumerate(
        tqdm(corpus.utterances, what, unit=" utterances", leave=False, disable=None)
    ):
        speech = encode(run, corpus, index)
        scaled, phones, voiced = frames_of(run, speech, speech.features)
        middles = np.arange(len(speech.z1)) * recipe.shift + recipe.frames // 2
        if u.speaker in voices:
            log_f0, tract = math.log(voices[u.speaker].f0), voices[u.speaker].vocal_tract_length
        else:
            log_magnitude = audio.log_magnitude(torch.from_numpy(speech.waveform))
            log_f0, tract = median_log_f0(log_magnitude, voiced), math.nan
        kept = np.flatnonzero(phones != "")[::stride] if keep else np.arange(0)
        latents = (x.cpu() for x in (speech.z1, speech.z2, speech.mu1, speech.mu2))
        middle_phones = np.append(phones, [""] * recipe.frames)[middles]
        frames = scaled[voiced].mean(0), with_context(scaled)[kept], phones[kept]
        encoded.append(ObservedUtterance(u, *latents, middle_phones, log_f0, tract, *frames))
    return encoded


Labelled = list[tuple[str | float, Tensor, Tensor]]  # label, z1 or μ1, z2 or μ2


def per_segment(
    encoded: Iterable[ObservedUtterance], label: Callable[[ObservedUtterance], Sequence[str]]
) -> Labelled:
    return [row for e in encoded for row in zip(label(e), e.z1, e.z2, strict=True) if row[0] != ""]


def per_utterance(
    encoded: Iterable[ObservedUtterance], label: Callable[[ObservedUtterance], str | float]
) -> Labelled:
    rows = [(label(e), e.mu1, e.mu2) for e in encoded]
    return [row for row in rows if row[0] != "" and row[0] == row[0]]  # known: neither "" nor nan


def probe(train: Labelled, test: Labelled) -> dict | None:
    """How well a linear probe of z1 (μ1) and one of z2 (μ2) does: {"measure", "chance", "z1", "z2", "train", "test"},
    of classes the accuracy, beside that of always naming the most frequent one, of numbers R². None where there is
    nothing to tell apart."""
    if min(len({label for label, *_ in rows}) for rows in (train, test)) < 2:
        return None
    labels, *inputs = zip(*train, strict=True)
    test_labels, *test_inputs = zip(*test, strict=True)
    result = {"train": len(train), "test": len(test)}
    if isinstance(labels[0], str):
        labels, test_labels = np.array(labels), np.array(test_labels)
        result |= {
            "measure": "accuracy",
            "chance": max(Counter(test_labels).values()) / len(test_labels),
        }
        fit, score = classify, accuracy
    else:
        labels, test_labels = torch.tensor(labels), torch.tensor(test_labels)
        result |= {"measure": "r_squared", "chance": 0.0}
        fit, score = regress, r_squared
    for name, x, other in zip(("z1", "z2"), inputs, test_inputs, strict=True):
        result[name] = score(
            fit(torch.stack(x), labels, PENALTY["latents"])(torch.stack(other)), test_labels
        )
    return result


def halves(
    encoded: list[ObservedUtterance],
) -> tuple[list[ObservedUtterance], list[ObservedUtterance]]:
    """Every other utterance of each speaker, and the rest; speakers with one utterance are left out."""
    counts, seen, sides = Counter(e.utterance.speaker for e in encoded), Counter(), ([], [])
    for e in encoded:
        if counts[e.utterance.speaker] > 1:
            sides[seen[e.utterance.speaker] % 2].append(e)
            seen[e.utterance.speaker] += 1
    return sides


def crossed(first: Labelled, second: Labelled) -> dict | None:
    """A probe trained on half of each speaker's utterances and tested on the other half, mean of both ways."""
    found = [probe(first, second), probe(second, first)]
    if None in found:
        return None
    return found[0] | {
        name: (found[0][name] + found[1][name]) / 2 for name in ("chance", "z1", "z2")
    }


def probes(train: list[ObservedUtterance], test: list[ObservedUtterance]) -> dict[str, dict | None]:
    """Every probe by its column of the table; None where the corpus cannot tell."""
    return {
        "phone": probe(*(per_segment(e, lambda e: e.phones) for e in (train, test))),
        "speaker": crossed(
            *(per_segment(e, lambda e: [e.utterance.speaker] * len(e.z1)) for e in halves(test))
        ),
        "speaker μ": crossed(
            *(per_utterance(e, lambda e: e.utterance.speaker) for e in halves(test))
        ),
        "sex μ": probe(*(per_utterance(e, lambda e: e.utterance.sex) for e in (train, test))),
        "condition μ": probe(
            *(per_utterance(e, lambda e: e.utterance.condition) for e in (train, test))
        ),
        "F0 μ": probe(*(per_utterance(e, lambda e: e.log_f0) for e in (train, test))),
        "tract μ": probe(*(per_utterance(e, lambda e: e.tract) for e in (train, test))),
    }


Measure = Callable[[Run, EncodedUtterance, Tensor], dict[str, float]]


def fit_instruments(train: list[ObservedUtterance]) -> Measure:
    """What is read off features, made from the training split: the function of an utterance and its own or decoded
    features (frames, bins) that returns ln F0 ("log_f0"), vocal-tract length in cm ("tract") and the share of frames
    whose phone is recognised ("phones"); nan where it cannot be told. F0: of log-magnitude features the median pitch,
    of filter banks a ridge regression on the average frame with speech. Vocal-tract length: such a regression. Phones:
    a linear classifier of frames with their context."""

    def regression(name: str) -> Callable[[Tensor], Tensor | float]:
        known = [e for e in train if not math.isnan(getattr(e, name))]
        values = torch.tensor([getattr(e, name) for e in known])
        if len(values.unique()) < 2:
            return lambda average: math.nan
        return regress(torch.stack([e.average for e in known]), values, PENALTY["features"])

    frames, labels = (
        torch.cat([e.frames for e in train]),
        np.concatenate([e.frame_phones for e in train]),
    )
    recognise = classify(frames, labels, PENALTY["features"]) if len(set(labels)) > 1 else None
    f0, tract = regression("log_f0"), regression("tract")

    def measure(run: Run, speech: EncodedUtterance, features: Tensor) -> dict[str, float]:
        scaled, phones, voiced = frames_of(run, speech, features)
        average, labelled, share = scaled[voiced].mean(0), phones != "", math.nan
        if recognise and labelled.any():
            share = accuracy(recognise(with_context(scaled)[labelled]), phones[labelled])
        pitch_is_visible = run.recipe.features == "log_magnitude"
        log_f0 = median_log_f0(features.cpu(), voiced) if pitch_is_visible else float(f0(average))
        return {"phones": share, "log_f0": log_f0, "tract": float(tract(average))}

    return measure
