"""Speaker verification: do two utterances have one speaker? (FHVAE paper, section 4.2 and Table 1)

Every utterance is one vector, two of them are compared by their cosine. The vectors: μ2 and μ1 of FHVAE, the sequence
latents w of HiT-DVAE and LigHT-DVAE and v of DSAE, and the i-vectors of ivectors.py as the baseline.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from ..data.audio import SAMPLE_RATE
from ..data.corpus import Corpus, CorpusError
from ..data.layouts import read_text
from ..evaluation import figures, metrics, report
from ..evaluation.runs import Options, Run, encode
from . import ivectors

MODELS = ["fhvae", "light_dvae", "hit_dvae", "dsae"]

IVECTOR_DIMENSIONS = (48, 100, 200)
PIECES = 3  # of the only utterance of a speaker, for LDA
BLOCK = 2**14  # trials at a time

COLUMNS = {"raw": "Raw", "wccn": "WCCN", "lda_12": "LDA (12 dim)", "lda_24": "LDA (24 dim)"}


def read_trials(path: Path, corpus: Corpus) -> np.ndarray:
    """A file of lines `enrol test target|nontarget`, the first two being names of utterances of the corpus. Returns
    trials (n, 3): the indices of the two utterances, and 1 where they have one speaker, else 0. CorpusError: no such
    file, a line of another form, an unknown utterance, no trials of one kind."""
    form = "expected lines of three words: enrol test target|nontarget"
    index, trials = {utterance.name: i for i, utterance in enumerate(corpus.utterances)}, []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        *names, kind = line.split()
        if len(names) != 2 or kind not in ("target", "nontarget"):
            raise CorpusError(f"{path}: line {number}: {line.strip()[:60]!r}; {form}")
        if unknown := [name for name in names if name not in index]:
            there = f"among the {len(index)} evaluated; names are like {next(iter(index))!r}"
            raise CorpusError(f"{path}: line {number}: no utterance {unknown[0]!r} {there}")
        trials.append((*map(index.get, names), kind == "target"))
    trials = np.array(trials, np.int64).reshape(-1, 3)
    nontargets, targets = np.bincount(trials[:, 2], minlength=2)
    if not targets or not nontargets:
        raise CorpusError(
            f"{path}: {targets} target and {nontargets} nontarget trials; expected some of both"
        )
    return trials


def all_pairs(corpus: Corpus) -> np.ndarray:
    """All pairs of two utterances, as `read_trials` gives trials."""
    speakers = np.unique([u.speaker for u in corpus.utterances], return_inverse=True)[1]
    enrol, test = np.triu_indices(len(speakers), 1)
    return np.stack([enrol, test, speakers[enrol] == speakers[test]], axis=1)


def score(vectors: np.ndarray, trials: np.ndarray) -> metrics.DetectionErrors:
    """The errors at every threshold of telling one speaker from two by the cosine; vectors (utterances, d)."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
    parts = np.array_split(trials, -(-len(trials) // BLOCK))
    values = np.concatenate(
        [np.einsum("nd,nd->n", vectors[part[:, 0]], vectors[part[:, 1]]) for part in parts]
    )
    same = trials[:, 2] == 1
    return metrics.detection_errors(values[same], values[~same])


def scatter(vectors: np.ndarray, speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (d,), covariance within speakers and covariance of the speakers' means (d, d) of vectors (n, d). There must
    be two speakers, and one with two vectors."""
    _, speakers, counts = np.unique(speakers, return_inverse=True, return_counts=True)
    n, classes, mean = len(vectors), len(counts), vectors.mean(0)
    means = np.stack([vectors[speakers == k].mean(0) for k in range(classes)])
    deviations = vectors - means[speakers]
    within = deviations.T @ deviations / (n - classes)
    between = (means - mean).T * counts @ (means - mean) / n
    return mean, within + 1e-6 * np.trace(within) / len(within) * np.eye(len(within)), between


def lda(vectors: np.ndarray, speakers: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminant analysis: mean (d,) and projection (d, k), k = `dimension` or speakers − 1 where fewer. The k
    directions that make the covariance between speakers largest over the covariance within them, which the projection
    turns into the identity (so that no WCCN is left to do after it)."""
    mean, within, between = scatter(vectors, speakers)
    dimension = min(dimension, len(set(speakers)) - 1)
    return mean, scipy.linalg.eigh(between, within)[1][:, ::-1][:, :dimension]


def wccn(vectors: np.ndarray, speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Within-class covariance normalisation: mean (d,) and projection (d, d), after which it is the identity. Hatch,
    Kajarekar & Stolcke, Within-class covariance normalization for SVM-based speaker recognition, 2006."""
    mean, within, _ = scatter(vectors, speakers)
    return mean, np.linalg.cholesky(np.linalg.inv(within))


def pieces(corpus: Corpus) -> Corpus:
    """The corpus, the only utterance of any speaker cut into PIECES of a second or more. Without two vectors of a
    speaker nothing is known of how the vectors of one speaker differ."""
    counts, utterances = Counter(u.speaker for u in corpus.utterances), []
    for u in corpus.utterances:
        first, stop = u.trim
        number = min(PIECES, (stop - first) // SAMPLE_RATE)
        if counts[u.speaker] > 1 or number < 2:
            utterances.append(u)
            continue
        length = (stop - first) // number
        for k in range(number):
            place = {"start": u.start + first + k * length, "length": length, "trim": (0, length)}
            utterances.append(u._replace(name=f"{u.name}-{k}", text="", phones=(), **place))
    return replace(corpus, utterances=tuple(utterances))


@torch.no_grad()
def vectors_of(run: Run, corpus: Corpus) -> dict[str, np.ndarray]:
    """The vectors (utterances, d) that a model has for whole utterances, by name: μ2 and μ1, or w, or v.
    CheckpointError where one is not finite."""
    model, rows = run.model, []
    for index in tqdm(range(len(corpus)), desc=str(run.folder), unit=" utterances", disable=None):
        if run.name == "fhvae":
            speech = encode(run, corpus, index)
            rows.append({"μ2": speech.mu2, "μ1": speech.mu1})
            continue
        spectrum = run.stft.analyse(torch.from_numpy(corpus.waveform(index)).to(run.device))
        x = model.input_scale(spectrum.abs().square()[None])
        rows.append({model.sequence_latent: model.infer_w(x).mean[0]})
    vectors = {
        name: torch.stack([row[name] for row in rows]).double().cpu().numpy() for name in rows[0]
    }
    run.check_finite(np.concatenate(list(vectors.values()), axis=1))
    return vectors


def ivectors_of(training: Corpus, test: Corpus, device: torch.device, seed: int) -> Iterator[tuple]:
    """The i-vectors of the training and of the test utterances for each of IVECTOR_DIMENSIONS, less the mean of the
    training utterances'. `training` as `pieces` makes it: a matrix T that has seen an utterance whole leaves so little
    difference between the pieces of it that LDA learns nothing from them."""
    background = ivectors.train_background(training, seed=seed, device=device)
    statistics = [ivectors.collect_statistics(background, corpus) for corpus in (training, test)]
    for dimension in IVECTOR_DIMENSIONS:
        if dimension >= len(training):
            print(f"i-vectors: no {dimension} dimensions from {len(training)} training utterances")
            continue
        loading = ivectors.train_total_variability(
            statistics[0], dimension, seed=seed, device=device
        )
        known, vectors = (ivectors.extract(loading, part).numpy() for part in statistics)
        yield known - known.mean(0), vectors - known.mean(0)


def rows_of(
    runs: list[Run], training: Corpus, trials: np.ndarray, seed: int
) -> tuple[list[dict], dict]:
    """The rows of the table for runs on one corpus {run, features, alpha, dimension, raw, wccn, lda_12, lda_24}, the
    i-vectors first, and the DetectionErrors of their raw scores by title. i-vectors, WCCN and LDA learn from the
    training utterances: a cell is None where they say nothing of speakers, LDA's where the vectors have no more
    dimensions than it."""

    def measures(errors: metrics.DetectionErrors) -> dict[str, float]:
        return {
            measure.__name__: measure(errors)
            for measure in (metrics.eer, metrics.eer_crossing, metrics.min_dcf)
        }

    test, vectors = runs[0].test, []
    for run in runs:
        known, others = vectors_of(run, training), vectors_of(run, test)
        alpha = getattr(run.model.config, "alpha", None)
        vectors += [(str(run.folder), name, alpha, known[name], others[name]) for name in known]
    baseline = ivectors_of(training, test, runs[0].device, seed)
    vectors += [(None, "i-vector", None, *known_and_others) for known_and_others in baseline]
    speakers, rows, detectors = np.array([u.speaker for u in training.utterances]), [], {}
    for folder, name, alpha, known, others in vectors:
        dimension, errors = others.shape[1], score(others, trials)
        row = {
            "run": folder,
            "features": name,
            "alpha": alpha,
            "dimension": dimension,
        } | dict.fromkeys(COLUMNS)
        row["raw"], projections = measures(errors), {}
        if 1 < len(set(speakers)) < len(speakers):
            projections = {"wccn": wccn(known, speakers)}
            projections |= {f"lda_{k}": lda(known, speakers, k) for k in (12, 24) if k < dimension}
        for column, (mean, projection) in projections.items():
            projected = score((others - mean) @ projection, trials)
            row[column] = measures(projected) | {"dimension": projection.shape[1]}
        rows.append(row)
        detectors[f"{folder}: {name} {dimension}" if folder else f"{name} {dimension}"] = errors
    return sorted(rows, key=lambda row: row["run"] is not None), detectors


def table(rows: list[dict], layout: str | None = None) -> str:
    """The rows as text: equal error rates in percent, then minDCF of the raw scores. `layout` names their corpus where
    published rows may stand beside them."""
    lines = []
    for row in rows:
        rates = [report.number(row[name] and row[name]["eer"], ".2%") for name in COLUMNS]
        vectors = [
            row["run"] or "",
            row["features"],
            str(row["dimension"]),
            report.number(row["alpha"], "g"),
        ]
        lines.append([*vectors, *rates, report.number(row["raw"]["min_dcf"], ".3f")])
    known = {row["features"] for row in rows}
    lines += [
        ["(paper)", *cells]
        for cells in report.published("verification", layout)
        if cells[0] in known
    ]
    return report.table(["", "Features", "Dim", "α", *COLUMNS.values(), "minDCF"], lines, left=2)


@report.by_corpus
def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """A table for each corpus; its rows and a DET figure in the folder of every run."""
    data, test, train = runs[0].data, runs[0].test, runs[0].corpus.split("train")
    trials = read_trials(options.trials, test) if options.trials else all_pairs(test)
    nontargets, targets = np.bincount(trials[:, 2], minlength=2).tolist()
    if not targets or not nontargets:
        pairs = f"{targets} pairs of utterances by one speaker and {nontargets} by two"
        raise CorpusError(
            f"{data}: its {options.split} split has {pairs}; verification needs some of both"
        )
    pairs = (
        f"{targets + nontargets:,} pairs of {len(test)} utterances by {len(test.speakers)} speakers"
    )
    print(f"{data}: {pairs}, {targets:,} of one speaker")
    for run in runs:
        report.begin(run)
    training = pieces(train)
    rows, detectors = rows_of(runs, training, trials, options.seed)
    print(f"\n{table(rows, report.published_layout(runs, options))}\n")
    cut = ": their only utterances cut in pieces" if len(training) > len(train) else ""
    print("Equal error rates on the convex hull. WCCN and LDA, and i-vectors, learn from", end=" ")
    print(f"{len(training)} utterances of {len(train.speakers)} training speakers{cut}.")
    results, counts = (
        [],
        {"target": targets, "nontarget": nontargets, "training_vectors": len(training)},
    )
    for run in runs:
        figures.det_curves(detectors, run.target / "det.png")
        own = [row for row in rows if row["run"] in (None, str(run.folder))]
        results.append(report.write(run, options, counts | {"rows": own}, "det.png"))
    return results
