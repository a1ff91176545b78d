"""Speaker verification: do two utterances have one speaker? (FHVAE paper, section 4.2 and Table 1)

Every utterance is one vector, and two of them are compared by their cosine. The vectors: μ2 and μ1
of FHVAE, the sequence latents w of HiT-DVAE and LigHT-DVAE and v of DSAE, and as the baseline the
i-vectors of ivectors.py.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from ..data.audio import SAMPLE_RATE
from ..data.corpus import Corpus, CorpusError
from ..data.layouts import read_text
from ..evaluation import figures, metrics, report
from ..evaluation.exchange import MODELS as MODELS_WITH_SEQUENCE_LATENT
from ..evaluation.results import Evaluation, Figure, RunResult, Table
from ..evaluation.runs import Options, Run, group_by_corpus, in_order_of
from . import ivectors
from .encoding import encode

MODELS = ["fhvae", *MODELS_WITH_SEQUENCE_LATENT]

IVECTOR_DIMENSIONS = (48, 100, 200)
LDA_DIMENSIONS = (12, 24)
PIECES = 3  # pieces that the only utterance of a speaker is cut into, for LDA
TRIALS_AT_ONCE = 2**14

COLUMNS = {"raw": "Raw", "wccn": "WCCN", "lda_12": "LDA (12 dim)", "lda_24": "LDA (24 dim)"}


def read_trials(path: Path, corpus: Corpus) -> np.ndarray:
    """Read a file of lines `enrol test target|nontarget`, the first two names of utterances of the
    corpus.

    Returns:
        trials (n, 3): the indices of the two utterances, and 1 where they have one speaker, else 0.

    Raises:
        CorpusError: no such file, a line of another form, an unknown utterance, no trials of one
            kind.
    """
    index = {utterance.name: i for i, utterance in enumerate(corpus.utterances)}
    trials = []
    for line_number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 3 or words[2] not in ("target", "nontarget"):
            raise CorpusError(
                f"{path}: line {line_number}: {line.strip()[:60]!r}; expected lines of three "
                "words: enrol test target|nontarget"
            )
        for name in words[:2]:
            if name not in index:
                raise CorpusError(
                    f"{path}: line {line_number}: no utterance {name!r} among the {len(index)} "
                    f"evaluated; names are like {next(iter(index))!r}"
                )
        trials.append((index[words[0]], index[words[1]], words[2] == "target"))
    trials = np.array(trials, np.int64).reshape(-1, 3)
    nontargets, targets = np.bincount(trials[:, 2], minlength=2)
    if not targets or not nontargets:
        raise CorpusError(
            f"{path}: {targets} target and {nontargets} nontarget trials; expected some of both"
        )
    return trials


def all_pairs(corpus: Corpus) -> np.ndarray:
    """Return all pairs of two utterances, as `read_trials` returns trials."""
    names = [utterance.speaker for utterance in corpus.utterances]
    _, speakers = np.unique(names, return_inverse=True)
    enrol, test = np.triu_indices(len(speakers), 1)
    return np.stack([enrol, test, speakers[enrol] == speakers[test]], axis=1)


def score(vectors: np.ndarray, trials: np.ndarray) -> metrics.DetectionErrors:
    """Return the errors at every threshold of telling one speaker from two by the cosine; vectors
    (utterances, d)."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
    cosines = []
    for part in np.array_split(trials, -(-len(trials) // TRIALS_AT_ONCE)):
        enrol = vectors[part[:, 0]]
        test = vectors[part[:, 1]]
        cosines.append(np.einsum("nd,nd->n", enrol, test))
    cosines = np.concatenate(cosines)
    is_target = trials[:, 2] == 1
    return metrics.detection_errors(cosines[is_target], cosines[~is_target])


def scatter(vectors: np.ndarray, speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean (d,), covariance within speakers and covariance of the speakers' means (d, d) of
    vectors (n, d). There must be two speakers, and one with two vectors."""
    _, speakers, counts = np.unique(speakers, return_inverse=True, return_counts=True)
    n = len(vectors)
    classes = len(counts)
    mean = vectors.mean(0)
    means = np.stack([vectors[speakers == k].mean(0) for k in range(classes)])
    deviations = vectors - means[speakers]
    within = deviations.T @ deviations / (n - classes)
    between = (means - mean).T * counts @ (means - mean) / n
    regularisation = 1e-6 * np.trace(within) / len(within) * np.eye(len(within))
    return mean, within + regularisation, between


def lda(vectors: np.ndarray, speakers: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminant analysis. Return mean (d,) and projection (d, k), k = `dimension` or
    speakers − 1 where fewer: the k directions that make the covariance between speakers largest
    over the covariance within them, which the projection turns into the identity (so that no WCCN
    is left to do after it)."""
    mean, within, between = scatter(vectors, speakers)
    dimension = min(dimension, len(set(speakers)) - 1)
    _, directions = scipy.linalg.eigh(between, within)
    return mean, directions[:, ::-1][:, :dimension]


def wccn(vectors: np.ndarray, speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Within-class covariance normalisation. Return mean (d,) and projection (d, d), after which
    that covariance is the identity (Hatch, Kajarekar & Stolcke, Within-class covariance
    normalization for SVM-based speaker recognition, 2006)."""
    mean, within, _ = scatter(vectors, speakers)
    return mean, np.linalg.cholesky(np.linalg.inv(within))


def cut_single_utterances(corpus: Corpus) -> Corpus:
    """Cut the utterance of any speaker who has only one into PIECES of a second or more. Without
    two vectors of a speaker nothing is known of how the vectors of one speaker differ."""
    counts = Counter(utterance.speaker for utterance in corpus.utterances)
    utterances = []
    for utterance in corpus.utterances:
        start, stop = utterance.trim
        number = min(PIECES, (stop - start) // SAMPLE_RATE)
        if counts[utterance.speaker] > 1 or number < 2:
            utterances.append(utterance)
            continue
        length = (stop - start) // number
        for k in range(number):
            piece = utterance._replace(
                name=f"{utterance.name}-{k}",
                text="",
                phones=(),
                start=utterance.start + start + k * length,
                length=length,
                trim=(0, length),
            )
            utterances.append(piece)
    return replace(corpus, utterances=tuple(utterances))


@torch.no_grad()
def vectors_of(run: Run, corpus: Corpus) -> dict[str, np.ndarray]:
    """Return the vectors (utterances, d) that a model has for whole utterances, by name: μ2 and μ1,
    or w, or v. Raises CheckpointError where one is not finite."""
    model = run.model
    rows = []
    for index in tqdm(range(len(corpus)), desc=str(run.folder), unit=" utterances", disable=None):
        if run.name == "fhvae":
            encoded = encode(run, corpus, index)
            rows.append({"μ2": encoded.mu2, "μ1": encoded.mu1})
        else:
            waveform = torch.from_numpy(corpus.waveform(index)).to(run.device)
            power = run.stft.analyse(waveform).abs().square()
            q_w = model.infer_w(model.input_scale(power[None]))
            rows.append({model.sequence_latent: q_w.mean[0]})
    vectors = {}
    for name in rows[0]:
        vectors[name] = torch.stack([row[name] for row in rows]).double().cpu().numpy()
    run.check_finite(np.concatenate(list(vectors.values()), axis=1))
    return vectors


@dataclass
class SpeakerVectors:
    """The vectors of the training and of the test utterances, (utterances, d) each."""

    run: str | None  # the folder of the model; None: i-vectors
    features: str  # "μ2", "w", "i-vector", …
    alpha: float | None  # α of the FHVAE
    training: np.ndarray
    test: np.ndarray

    @property
    def title(self) -> str:
        name = f"{self.features} {self.test.shape[1]}"
        return f"{self.run}: {name}" if self.run else name


def compute_ivectors(
    training: Corpus, test: Corpus, device: torch.device, seed: int
) -> list[SpeakerVectors]:
    """Return i-vectors of each of IVECTOR_DIMENSIONS that there are enough training utterances for,
    less the mean of the training utterances'.

    training: as `cut_single_utterances` makes it. A matrix T that has seen an utterance whole
    leaves so little difference between the pieces of it that LDA learns nothing from them.
    """
    background = ivectors.train_background(training, seed=seed, device=device)
    training_statistics = ivectors.collect_statistics(background, training)
    test_statistics = ivectors.collect_statistics(background, test)
    vectors = []
    for dimension in IVECTOR_DIMENSIONS:
        if dimension < len(training):
            loading = ivectors.train_total_variability(
                training_statistics, dimension, seed=seed, device=device
            )
            of_training = ivectors.extract(loading, training_statistics).numpy()
            of_test = ivectors.extract(loading, test_statistics).numpy()
            mean = of_training.mean(0)
            vectors.append(
                SpeakerVectors(None, "i-vector", None, of_training - mean, of_test - mean)
            )
    return vectors


def error_measures(errors: metrics.DetectionErrors) -> dict[str, float]:
    return {
        "eer": metrics.eer(errors),
        "eer_crossing": metrics.eer_crossing(errors),
        "min_dcf": metrics.min_dcf(errors),
    }


def evaluate_vectors(
    vectors: SpeakerVectors, speakers: np.ndarray, trials: np.ndarray
) -> tuple[dict, metrics.DetectionErrors]:
    """Return a row of the table, {run, features, alpha, dimension, raw, wccn, lda_12, lda_24}, and
    the errors of the raw scores. WCCN and LDA learn from the training utterances, of these
    `speakers`: their cells are None where these say nothing of speakers, LDA's where the vectors
    have no more dimensions than it."""
    dimension = vectors.test.shape[1]
    errors = score(vectors.test, trials)
    row = {
        "run": vectors.run,
        "features": vectors.features,
        "alpha": vectors.alpha,
        "dimension": dimension,
        **dict.fromkeys(COLUMNS),
    }
    row["raw"] = error_measures(errors)
    projections = {}
    if 1 < len(set(speakers)) < len(speakers):
        projections["wccn"] = wccn(vectors.training, speakers)
        for lda_dimension in LDA_DIMENSIONS:
            if lda_dimension < dimension:
                projections[f"lda_{lda_dimension}"] = lda(vectors.training, speakers, lda_dimension)
    for column, (mean, projection) in projections.items():
        projected = score((vectors.test - mean) @ projection, trials)
        row[column] = error_measures(projected) | {"dimension": projection.shape[1]}
    return row, errors


def table(rows: list[dict], layout: str | None = None) -> Table:
    """Return the rows: equal error rates in percent, then minDCF of the raw scores. layout: of
    their corpus if published rows may stand beside them."""
    lines = []
    for row in rows:
        rates = []
        for name in COLUMNS:
            rate = None if row[name] is None else row[name]["eer"]
            rates.append(report.number(rate, ".2%"))
        vectors = [row["run"] or "", row["features"], str(row["dimension"])]
        alpha = report.number(row["alpha"], "g")
        lines.append([*vectors, alpha, *rates, report.number(row["raw"]["min_dcf"], ".3f")])
    features = {row["features"] for row in rows}
    for cells in report.published("verification", layout):
        if cells[0] in features:
            lines.append(["(paper)", *cells])
    heading = ["", "Features", "Dim", "α", *COLUMNS.values(), "minDCF"]
    return Table(heading, lines, left_columns=2)


def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return a table for each corpus, and for each run its rows and a DET figure."""
    body = []
    results = []
    for group in group_by_corpus(runs):
        group_body, group_results = evaluate_corpus(group, options)
        body += group_body
        results += group_results
    return Evaluation(
        task="verification",
        description="Speaker verification: do two utterances have one speaker? (FHVAE paper, "
        "section 4.2 and Table 1)",
        settings=options.select("trials"),
        body=body,
        results=in_order_of(runs, results),
    )


def evaluate_corpus(runs: list[Run], options: Options) -> tuple[list[str | Table], list[RunResult]]:
    data = runs[0].data
    test = runs[0].test
    train = runs[0].corpus.split("train")
    trials = read_trials(options.trials, test) if options.trials else all_pairs(test)
    nontargets, targets = np.bincount(trials[:, 2], minlength=2).tolist()
    if not targets or not nontargets:
        raise CorpusError(
            f"{data}: its {options.split} split has {targets} pairs of utterances by one speaker "
            f"and {nontargets} by two; verification needs some of both"
        )
    training = cut_single_utterances(train)
    vectors = compute_ivectors(training, test, runs[0].device, options.seed)
    missing = set(IVECTOR_DIMENSIONS) - {v.test.shape[1] for v in vectors}
    for run in runs:
        of_training = vectors_of(run, training)
        of_test = vectors_of(run, test)
        alpha = getattr(run.model.config, "alpha", None)
        for name in of_training:
            vectors.append(
                SpeakerVectors(str(run.folder), name, alpha, of_training[name], of_test[name])
            )
    speakers = np.array([utterance.speaker for utterance in training.utterances])
    rows = []
    detectors = {}
    for speaker_vectors in vectors:
        row, errors = evaluate_vectors(speaker_vectors, speakers, trials)
        rows.append(row)
        detectors[speaker_vectors.title] = errors
    body = [
        f"{data}: {targets + nontargets:,} pairs of {len(test)} utterances by "
        f"{len(test.speakers)} speakers, {targets:,} of one speaker.",
        table(rows, report.published_layout(runs, options)),
        describe_training(training, train, sorted(missing)),
    ]
    det = Figure("DET", figures.det_curves(detectors))
    results = []
    for run in runs:
        values = {
            "target": targets,
            "nontarget": nontargets,
            "training_vectors": len(training),
            "rows": [row for row in rows if row["run"] in (None, str(run.folder))],
        }
        results.append(run.result(values, figures=[det]))
    return body, results


def describe_training(training: Corpus, train: Corpus, missing: list[int]) -> str:
    """Say what the projections and the i-vectors were trained on. missing: dimensions of i-vectors
    that there were too few utterances for."""
    text = (
        "Equal error rates on the convex hull. WCCN and LDA, and i-vectors, learn from "
        f"{len(training)} utterances of {len(train.speakers)} training speakers"
    )
    if len(training) > len(train):
        text += ": their only utterances cut in pieces"
    text += "."
    for dimension in missing:
        text += f" There are no i-vectors of {dimension} dimensions from so few utterances."
    return text
