"""What the latents of an FHVAE hold: linear probes, and what a change of z2 changes in the decoded
speech.

Probes are trained on the training split and tested on the test split. Those of the speaker are
trained on half of each test speaker's utterances and tested on the other half.
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

UTTERANCES = 640  # largest number of training utterances, spread over the training split
FRAMES = 20_000  # number of training frames for the classifier of phones
CONTEXT = (-3, 0, 3)  # offsets of the frames from which the phone of a frame is classified
PENALTY = {"latents": 1e-3, "features": 1e-2}  # on the squared weights of standardised inputs
MIN_PITCH_FRAMES = 10  # frames with a pitch that a median needs
LBFGS_ITERATIONS = 60


def standardiser(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function of (n, inputs) that gives x zero mean and unit variance."""
    mean = x.mean(0)
    deviation = x.std(0, correction=0).clamp_min(1e-8)
    return lambda x: (x - mean) / deviation


def regress(x: Tensor, y: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Return the ridge regression of y (n,) on x (n, inputs): a function of (…, inputs).

    On the standardised inputs X, and y without its mean, it minimises ‖Xw − y‖²/n + penalty·‖w‖²:
    w = (XᵀX/n + penalty·I)⁻¹ Xᵀy/n.
    """
    standardise = standardiser(x)
    mean = y.mean().to(x)
    scaled = standardise(x)
    covariance = scaled.T @ scaled / len(x) + penalty * torch.eye(x.shape[1]).to(x)
    weight = torch.linalg.solve(covariance, scaled.T @ (y - y.mean()).to(x) / len(x))
    return lambda x: standardise(x) @ weight + mean


def classify(x: Tensor, labels: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
    """Return the multinomial logistic regression of labels (n,) on x (n, inputs), a function of
    (n, inputs) that returns labels (n,).

    On the standardised inputs it minimises cross-entropy (mean over n) + ½·penalty·‖W‖², by L-BFGS.
    """
    classes, class_indices = np.unique(labels, return_inverse=True)
    standardise = standardiser(x)
    targets = torch.from_numpy(class_indices)
    scaled = standardise(x)
    weight = torch.zeros(x.shape[1], len(classes), dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=LBFGS_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = F.cross_entropy(scaled @ weight + bias, targets)
        value = cross_entropy + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    weight = weight.detach()
    bias = bias.detach()
    return lambda x: classes[(standardise(x) @ weight + bias).argmax(1).numpy()]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def r_squared(predictions: Tensor, y: Tensor) -> float:
    """Return 1 − Σ(y − ŷ)² / Σ(y − ȳ)²: 1 for a perfect regression, 0 for predicting the mean."""
    return float(1 - (y - predictions).square().sum() / (y - y.mean()).square().sum())


@dataclass
class ObservedUtterance:
    """The latents, features and labels of an utterance. All tensors are on the CPU."""

    utterance: Utterance
    z1: Tensor  # (N, z1_latent), means of q(z1) of its segments
    z2: Tensor  # (N, z2_latent), means of q(z2)
    mu1: Tensor  # (z1_latent,)
    mu2: Tensor  # (z2_latent,)
    phones: np.ndarray  # (N,), the phone in the middle of each segment; "" where it is unknown
    log_f0: float  # ln Hz: of the voice where it is known, else the median over the frames, or nan
    tract: float  # vocal-tract length, cm; nan where it is unknown
    average: Tensor  # (bins,), mean of the standardised features over the frames with speech
    frames: Tensor  # (n, len(CONTEXT) * bins), some frames with their context
    frame_phones: np.ndarray  # (n,)


def phones_at(utterance: Utterance, samples: np.ndarray) -> np.ndarray:
    """Return the phones at some samples (n,) of the untrimmed utterance; "" where there is no
    label."""
    if not utterance.phones:
        return np.full(len(samples), "")
    starts = np.array([start for start, _, _ in utterance.phones])
    stops = np.array([stop for _, stop, _ in utterance.phones])
    labels = np.array([label for _, _, label in utterance.phones])
    rows = np.searchsorted(starts, samples, side="right") - 1
    is_labelled = (rows >= 0) & (samples < stops[rows])
    return np.where(is_labelled, labels[rows], "")


def frames_of(
    run: Run, speech: EncodedUtterance, features: Tensor
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Describe the frames of an utterance, of its features or of decoded ones (frames, bins).

    Returns:
        the standardised features (frames, bins) on the CPU, the phone in the middle of each frame
        (frames,), and which frames have speech (frames,).
    """
    first_sample = speech.utterance.trim[0] if run.recipe.trim else 0
    phones = phones_at(speech.utterance, first_sample + run.stft.hop * np.arange(len(features)))
    standardised = run.model.standardise(features).cpu()
    has_speech = audio.voiced_frames(torch.from_numpy(speech.waveform))
    return standardised, phones, has_speech


def with_context(features: Tensor) -> Tensor:
    """Join the frames of CONTEXT: (frames, bins) → (frames, len(CONTEXT) * bins). The first and the
    last frame are repeated beyond the ends."""
    frame_indices = torch.arange(len(features))
    shifted = []
    for offset in CONTEXT:
        shifted.append(features[(frame_indices + offset).clamp(0, len(features) - 1)])
    return torch.cat(shifted, dim=1)


def median_log_f0(log_magnitude: Tensor, has_speech: Tensor) -> float:
    """Return the median pitch, ln Hz, over the frames with speech (frames,) of (frames, bins); nan
    where fewer than MIN_PITCH_FRAMES have a pitch."""
    power = audio.log_magnitude_to_power(log_magnitude)
    hertz = audio.pitch(power, audio.FEATURE_STFT)[has_speech]
    hertz = hertz[~hertz.isnan()]
    if len(hertz) < MIN_PITCH_FRAMES:
        return math.nan
    return float(hertz.median().log())


def observe(run: Run, corpus: Corpus, description: str, keep: int = 0) -> list[ObservedUtterance]:
    """Encode the utterances of a corpus. keep: at most so many of all frames are kept. description:
    for the progress bar."""
    voices = {}
    if corpus.without_conditions().layout == "built-in":
        voices = built_in_speakers()
    stride = None
    if keep:
        num_frames = corpus.seconds * audio.SAMPLE_RATE / run.stft.hop
        stride = max(1, round(num_frames / keep))
    observed = []
    utterances = tqdm(corpus.utterances, description, unit=" utterances", leave=False, disable=None)
    for index, _ in enumerate(utterances):
        observed.append(observe_utterance(run, encode(run, corpus, index), voices, stride))
    return observed


def observe_utterance(
    run: Run, speech: EncodedUtterance, voices: dict, stride: int | None
) -> ObservedUtterance:
    """Return the latents, features and labels of an utterance.

    voices: speaker → true F0 and vocal-tract length, where they are known. stride: keep every so
    many labelled frames; None: keep none.
    """
    recipe = run.recipe
    utterance = speech.utterance
    standardised, phones, has_speech = frames_of(run, speech, speech.features)
    if utterance.speaker in voices:
        voice = voices[utterance.speaker]
        log_f0 = math.log(voice.f0)
        tract = voice.vocal_tract_length
    else:
        log_magnitude = audio.log_magnitude(torch.from_numpy(speech.waveform))
        log_f0 = median_log_f0(log_magnitude, has_speech)
        tract = math.nan
    kept_frames = np.arange(0)
    if stride:
        kept_frames = np.flatnonzero(phones != "")[::stride]
    middles = np.arange(len(speech.z1)) * recipe.shift + recipe.frames // 2
    padded_phones = np.append(phones, [""] * recipe.frames)
    return ObservedUtterance(
        utterance,
        z1=speech.z1.cpu(),
        z2=speech.z2.cpu(),
        mu1=speech.mu1.cpu(),
        mu2=speech.mu2.cpu(),
        phones=padded_phones[middles],
        log_f0=log_f0,
        tract=tract,
        average=standardised[has_speech].mean(0),
        frames=with_context(standardised)[kept_frames],
        frame_phones=phones[kept_frames],
    )


# Rows of a probe: the label, a class or a number; z1 or μ1; z2 or μ2.
Labelled = list[tuple[str | float, Tensor, Tensor]]


def per_segment(
    observed: Iterable[ObservedUtterance], labels_of: Callable[[ObservedUtterance], Sequence[str]]
) -> Labelled:
    """Return a row for each segment that has a label."""
    rows = []
    for utterance in observed:
        for row in zip(labels_of(utterance), utterance.z1, utterance.z2, strict=True):
            if row[0] != "":
                rows.append(row)
    return rows


def per_utterance(
    observed: Iterable[ObservedUtterance], label_of: Callable[[ObservedUtterance], str | float]
) -> Labelled:
    """Return a row for each utterance that has a label: neither "" nor nan."""
    rows = []
    for utterance in observed:
        label = label_of(utterance)
        is_nan = label != label
        if label != "" and not is_nan:
            rows.append((label, utterance.mu1, utterance.mu2))
    return rows


def probe(train: Labelled, test: Labelled) -> dict | None:
    """Measure a linear probe of z1 (or μ1) and one of z2 (or μ2).

    Returns:
        {"measure", "chance", "z1", "z2", "train", "test"}: of classes the accuracy, and as chance
        that of the most frequent class; of numbers R². The last two are numbers of rows. None where
        all labels are the same.
    """
    for rows in (train, test):
        if len({label for label, *_ in rows}) < 2:
            return None
    train_labels, *train_inputs = zip(*train, strict=True)
    test_labels, *test_inputs = zip(*test, strict=True)
    result = {"train": len(train), "test": len(test)}
    if isinstance(train_labels[0], str):
        train_labels = np.array(train_labels)
        test_labels = np.array(test_labels)
        most_frequent = max(Counter(test_labels).values())
        result |= {"measure": "accuracy", "chance": most_frequent / len(test_labels)}
        fit = classify
        score = accuracy
    else:
        train_labels = torch.tensor(train_labels)
        test_labels = torch.tensor(test_labels)
        result |= {"measure": "r_squared", "chance": 0.0}
        fit = regress
        score = r_squared
    for name, x, test_x in zip(("z1", "z2"), train_inputs, test_inputs, strict=True):
        predict = fit(torch.stack(x), train_labels, PENALTY["latents"])
        result[name] = score(predict(torch.stack(test_x)), test_labels)
    return result


def halves(
    observed: list[ObservedUtterance],
) -> tuple[list[ObservedUtterance], list[ObservedUtterance]]:
    """Return every other utterance of each speaker, and the rest. Speakers with one utterance are
    left out."""
    counts = Counter(o.utterance.speaker for o in observed)
    num_seen = Counter()
    parts = ([], [])
    for utterance in observed:
        speaker = utterance.utterance.speaker
        if counts[speaker] > 1:
            parts[num_seen[speaker] % 2].append(utterance)
            num_seen[speaker] += 1
    return parts


def crossed(first: Labelled, second: Labelled) -> dict | None:
    """Return the mean of two probes: trained on `first` and tested on `second`, and the reverse."""
    forward = probe(first, second)
    backward = probe(second, first)
    if forward is None or backward is None:
        return None
    means = {name: (forward[name] + backward[name]) / 2 for name in ("chance", "z1", "z2")}
    return forward | means


def probes(train: list[ObservedUtterance], test: list[ObservedUtterance]) -> dict[str, dict | None]:
    """Return every probe by its column of the table; None where the corpus has no such labels."""

    def probe_utterances(label_of: Callable[[ObservedUtterance], str | float]) -> dict | None:
        return probe(per_utterance(train, label_of), per_utterance(test, label_of))

    first, second = halves(test)
    speakers_of = lambda o: [o.utterance.speaker] * len(o.z1)  # noqa: E731
    speaker_of = lambda o: o.utterance.speaker  # noqa: E731
    return {
        "phone": probe(
            per_segment(train, lambda o: o.phones), per_segment(test, lambda o: o.phones)
        ),
        "speaker": crossed(per_segment(first, speakers_of), per_segment(second, speakers_of)),
        "speaker μ": crossed(per_utterance(first, speaker_of), per_utterance(second, speaker_of)),
        "sex μ": probe_utterances(lambda o: o.utterance.sex),
        "condition μ": probe_utterances(lambda o: o.utterance.condition),
        "F0 μ": probe_utterances(lambda o: o.log_f0),
        "tract μ": probe_utterances(lambda o: o.tract),
    }


Measure = Callable[[Run, EncodedUtterance, Tensor], dict[str, float]]


def fit_instruments(train: list[ObservedUtterance]) -> Measure:
    """Return a function that measures features, fitted to the training split.

    It takes a run, an utterance and features (frames, bins), the utterance's or decoded ones, and
    returns a dict, nan where a value is unknown:

    - "log_f0", ln Hz: of log-magnitude features the median pitch, of filter banks a ridge
      regression on the mean frame with speech;
    - "tract", vocal-tract length in cm: such a regression;
    - "phones": the share of frames whose phone a linear classifier of frames with their context
      recognises.
    """
    labels = np.concatenate([o.frame_phones for o in train])
    recognise = None
    if len(set(labels)) > 1:
        recognise = classify(torch.cat([o.frames for o in train]), labels, PENALTY["features"])
    predict_log_f0 = fit_regression(train, "log_f0")
    predict_tract = fit_regression(train, "tract")

    def measure(run: Run, speech: EncodedUtterance, features: Tensor) -> dict[str, float]:
        standardised, phones, has_speech = frames_of(run, speech, features)
        average = standardised[has_speech].mean(0)
        is_labelled = phones != ""
        share = math.nan
        if recognise is not None and is_labelled.any():
            recognised = recognise(with_context(standardised)[is_labelled])
            share = accuracy(recognised, phones[is_labelled])
        if run.recipe.features == "log_magnitude":
            log_f0 = median_log_f0(features.cpu(), has_speech)
        else:
            log_f0 = float(predict_log_f0(average))
        return {"phones": share, "log_f0": log_f0, "tract": float(predict_tract(average))}

    return measure


def fit_regression(train: list[ObservedUtterance], name: str) -> Callable[[Tensor], Tensor | float]:
    """Return the regression of a field of ObservedUtterance on the mean frame (bins,), over the
    utterances where it is known; a function that returns nan where these have only one value."""
    labelled = [o for o in train if not math.isnan(getattr(o, name))]
    values = torch.tensor([getattr(o, name) for o in labelled])
    if len(values.unique()) < 2:
        return lambda average: math.nan
    return regress(torch.stack([o.average for o in labelled]), values, PENALTY["features"])
