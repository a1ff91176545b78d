"""Speaker verification: do two utterances have one speaker? (FHVAE paper, section 4.2 and Table 1)

Every utterance is one vector, two of them are compared by their cosine. The vectors: μ2 and μ1 of FHVAE, the sequence
latents w of HiT-DVAE and LigHT-DVAE and v of DSAE, and the i-vectors of ivectors.py as the baseline.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from .. import figures, metrics
from ..audio import SAMPLE_RATE
from ..checkpoint import CheckpointError
from ..command_line import as_json, write
from ..corpus import Corpus, CorpusError
from . import Options, Run, ivectors
from .segments import latent_means

MODELS = ["fhvae", "light_dvae", "hit_dvae", "dsae"]

IVECTOR_DIMENSIONS = (48, 100, 200)
PIECES = 3  # of the only utterance of a speaker, for LDA
EXACT_PAIRS = 10**7  # more are counted in a histogram
HISTOGRAM_BINS = 2**20  # of cosines, from −1 to 1
BLOCK = 2**22  # scores at a time

COLUMNS = {"raw": "Raw", "wccn": "WCCN", "lda_12": "LDA (12 dim)", "lda_24": "LDA (24 dim)"}

# FHVAE paper, Table 1: features, dimension, α, EER in percent, raw and with LDA of 12 and 24 dimensions
PUBLISHED = {
    "TIMIT": [
        ("i-vector", 48, None, 10.12, 6.25, 5.95),
        ("i-vector", 100, None, 9.52, 6.10, 5.50),
        ("i-vector", 200, None, 9.82, 6.54, 6.10),
        ("μ2", 16, 0, 5.06, 4.02, None),
        ("μ2", 16, 0.1, 4.91, 4.61, None),
        ("μ2", 16, 1, 3.87, 3.86, None),
        ("μ2", 16, 10, 2.38, 2.08, None),
        ("μ2", 32, 10, 2.38, 2.08, 1.34),
        ("μ1", 16, 1, 22.77, 15.62, None),
        ("μ1", 16, 10, 27.68, 22.17, None),
        ("μ1", 32, 10, 22.47, 16.82, 17.26),
    ]
}


# --------------------------------------------------------------------------------------------------- trials


@dataclass(frozen=True)
class Trials:
    """Pairs of utterances, by their indices: enrol, test (n,); target (n,): whether they have one speaker."""

    enrol: np.ndarray
    test: np.ndarray
    target: np.ndarray


def read_trials(path: Path, corpus: Corpus) -> Trials:
    """A file of lines `enrol test target|nontarget`, the first two being names of utterances of the corpus.

    CorpusError: no such file, a line of another form, an unknown utterance, no trials of one kind.
    """
    form = "expected lines of three words: enrol test target|nontarget"
    index = {utterance.name: i for i, utterance in enumerate(corpus.utterances)}
    try:
        with path.open(encoding="utf-8") as lines:
            numbers = np.frombuffer(_parse_trials(path, lines, index, form), np.int64)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({getattr(error, 'strerror', 'not text')}); {form}") from None
    enrol, test, target = numbers.reshape(-1, 3).T
    if not 0 < target.sum() < len(target):
        raise CorpusError(f"{path}: {target.sum()} target and {len(target) - target.sum()} nontarget trials; expected "
                          "some of both")
    return Trials(enrol, test, target.astype(bool))


def _parse_trials(path: Path, lines: Iterable[str], index: dict[str, int], form: str) -> array:
    """enrol, test, target of every line, one after another: 24 bytes a trial."""
    numbers = array("q")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        *names, kind = line.split()
        if len(names) != 2 or kind not in ("target", "nontarget"):
            raise CorpusError(f"{path}: line {number}: {line.strip()[:60]!r}; {form}")
        for name in names:
            if name not in index:
                raise CorpusError(f"{path}: line {number}: no utterance {name!r} among the {len(index)} evaluated; "
                                  f"names are like {next(iter(index))!r}")
        numbers.extend((*map(index.get, names), kind == "target"))
    return numbers


def count_pairs(speakers: np.ndarray) -> tuple[int, int]:
    """How many pairs of utterances have one speaker, and how many two; speakers (utterances,)."""
    counts = np.unique(speakers, return_counts=True)[1]
    targets = int((counts * (counts - 1) // 2).sum())
    return targets, len(speakers) * (len(speakers) - 1) // 2 - targets


def scores(vectors: np.ndarray, speakers: np.ndarray, trials: Trials | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cosines of vectors (utterances, d) in blocks: scores (n,), and whether they are of one speaker.

    Of the trials; without them, of all pairs of two utterances.
    """
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
    if trials is not None:
        step = max(1, BLOCK // vectors.shape[1])
        for start in range(0, len(trials.target), step):
            part = slice(start, start + step)
            enrol, test = vectors[trials.enrol[part]], vectors[trials.test[part]]
            yield np.einsum("nd,nd->n", enrol, test), trials.target[part]
        return
    n = len(vectors)
    step = max(1, BLOCK // n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        later = np.arange(start, n) > np.arange(start, stop)[:, None]
        same = speakers[start:stop, None] == speakers[start:]
        yield (vectors[start:stop] @ vectors[start:].T)[later], same[later]


def score(vectors: np.ndarray, speakers: np.ndarray, trials: Trials | None = None, exact_pairs: int = EXACT_PAIRS):
    """The errors at every threshold (metrics.DetectionErrors) of telling one speaker from two by the cosine.

    vectors (utterances, d), speakers (utterances,) any labels. All pairs of two utterances, or the trials. Above
    `exact_pairs` of them, scores are counted in a histogram, so that memory does not grow with their number; its
    bins are 2·10⁻⁶ wide.
    """
    speakers = np.unique(speakers, return_inverse=True)[1]
    pairs = len(trials.target) if trials else len(vectors) * (len(vectors) - 1) // 2
    blocks = scores(np.asarray(vectors, np.float64), speakers, trials)
    if pairs <= exact_pairs:
        values, same = map(np.concatenate, zip(*blocks, strict=True))
        return metrics.detection_errors(values[same], values[~same])
    counts = np.zeros((2, HISTOGRAM_BINS), np.int64)
    for values, same in blocks:
        bins = ((values + 1) * (HISTOGRAM_BINS / 2)).astype(np.int64).clip(0, HISTOGRAM_BINS - 1)
        for kind in (0, 1):
            counts[kind] += np.bincount(bins[same == kind], minlength=HISTOGRAM_BINS)
    return metrics.detection_errors_of_histogram(counts[1], counts[0])


def measures(errors: metrics.DetectionErrors) -> dict[str, float]:
    rates = {"eer": metrics.eer(errors), "eer_crossing": metrics.eer_crossing(errors)}
    return rates | {"min_dcf": metrics.min_dcf(errors)}


# --------------------------------------------------------------------------------------- projections by speaker


def scatter(vectors: np.ndarray, speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (d,), covariance within speakers and covariance of the speakers' means (d, d) of vectors (n, d).

    ValueError where no speaker has two vectors, or there is only one speaker.
    """
    names, speakers, counts = np.unique(speakers, return_inverse=True, return_counts=True)
    n, classes = len(vectors), len(names)
    if classes < 2 or n == classes:
        raise ValueError(f"{n} vectors of {classes} speakers; expected two speakers and one with two vectors at least")
    mean = vectors.mean(0)
    means = np.zeros((classes, vectors.shape[1]))
    np.add.at(means, speakers, vectors)
    means /= counts[:, None]
    deviations = vectors - means[speakers]
    within = deviations.T @ deviations / (n - classes)
    between = (means - mean).T * counts @ (means - mean) / n
    return mean, within + 1e-6 * np.trace(within) / len(within) * np.eye(len(within)), between


def lda(vectors: np.ndarray, speakers: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminant analysis: mean (d,) and projection (d, k), k = `dimension` or speakers − 1 where fewer.

    The k directions that make the covariance between speakers largest over the covariance within them, which the
    projection turns into the identity (so that no WCCN is left to do after it).
    """
    mean, within, between = scatter(vectors, speakers)
    dimension = min(dimension, len(set(speakers)) - 1)
    return mean, scipy.linalg.eigh(between, within)[1][:, ::-1][:, :dimension]


def wccn(vectors: np.ndarray, speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Within-class covariance normalisation: mean (d,) and projection (d, d), after which it is the identity.

    Hatch, Kajarekar & Stolcke, Within-class covariance normalization for SVM-based speaker recognition, 2006.
    """
    mean, within, _ = scatter(vectors, speakers)
    return mean, np.linalg.cholesky(np.linalg.inv(within))


def pieces(corpus: Corpus) -> Corpus:
    """The corpus, the only utterance of any speaker cut into PIECES of a second or more.

    Without two vectors of a speaker nothing is known of how the vectors of one speaker differ.
    """
    counts = Counter(utterance.speaker for utterance in corpus.utterances)
    utterances = []
    for utterance in corpus.utterances:
        first, stop = utterance.trim
        number = min(PIECES, (stop - first) // SAMPLE_RATE)
        if counts[utterance.speaker] > 1 or number < 2:
            utterances.append(utterance)
            continue
        length = (stop - first) // number
        for k in range(number):
            place = {"start": utterance.start + first + k * length, "length": length, "trim": (0, length)}
            utterances.append(replace(utterance, name=f"{utterance.name}-{k}", text="", phones=(), **place))
    return replace(corpus, utterances=tuple(utterances))


# -------------------------------------------------------------------------------------------------- vectors


@torch.no_grad()
def utterance_vectors(run: Run, corpus: Corpus) -> dict[str, np.ndarray]:
    """The vectors (utterances, d) that a model has for whole utterances, by name: μ2 and μ1, or w, or v.

    CheckpointError where one is not finite.
    """
    model, rows = run.model, []
    bar = tqdm(total=len(corpus), desc=str(run.folder), unit=" utterances", disable=None)
    with bar:
        if run.name == "fhvae":
            for z1, z2 in latent_means(run, corpus):
                rows.append({"μ2": model.s_vector(z2), "μ1": model.mu1(z1)})
                bar.update()
        else:
            device = next(model.parameters()).device
            for index in range(len(corpus)):
                spectrum = run.stft.analyse(torch.from_numpy(corpus.waveform(index)).to(device))
                inputs = model.input_scale(spectrum.abs().square()[None])
                if run.name == "dsae":
                    rows.append({"v": model.infer_v(model.lstm_v(model.mlp_x(inputs))).mean[0]})
                else:
                    rows.append({"w": model.infer_w(inputs).mean[0]})
                bar.update()
    vectors = {name: torch.stack([row[name] for row in rows]).double().cpu().numpy() for name in rows[0]}
    if not all(np.isfinite(values).all() for values in vectors.values()):
        raise CheckpointError(f"{run.folder}: the model's output is not finite; it cannot be evaluated")
    return vectors


def ivector_baseline(training: Corpus, test: Corpus, device: torch.device, seed: int) -> Iterator:
    """(i-vectors of the training utterances, of the test utterances), for each dimension in turn.

    Both are centred on the mean of the training utterances'. `training` as `pieces` makes it: a matrix T that has
    seen an utterance whole leaves so little difference between the pieces of it that LDA learns nothing from them.
    """
    background, _ = ivectors.train_background(training, seed=seed, device=device)
    statistics = [ivectors.collect_statistics(background, corpus) for corpus in (training, test)]
    for dimension in IVECTOR_DIMENSIONS:
        if dimension >= len(training):
            print(f"i-vectors: no {dimension} dimensions from {len(training)} training utterances")
            continue
        loading, _ = ivectors.train_total_variability(statistics[0], dimension, seed=seed, device=device)
        known, vectors = (ivectors.extract(loading, part).numpy() for part in statistics)
        yield known - known.mean(0), vectors - known.mean(0)


# -------------------------------------------------------------------------------------------------- the table


def row(features: str, training: tuple, test: tuple, trials: Trials | None, alpha: float | None = None) -> tuple:
    """One row of the table, {features, dimension, alpha, raw, wccn, lda_12, lda_24}, and the errors of the raw scores.

    training, test: vectors (utterances, d) and their speakers. A cell is as `measures` has it; LDA's are None where d
    is not larger than its dimension, and all but raw where the training vectors say nothing of speakers.
    """
    (known, their_speakers), (vectors, speakers) = training, test
    dimension, errors = vectors.shape[1], score(vectors, speakers, trials)
    cells = {"features": features, "dimension": dimension, "alpha": alpha, "raw": measures(errors)}
    cells |= {"wccn": None, "lda_12": None, "lda_24": None}
    if 1 < len(set(their_speakers)) < len(their_speakers):
        projections = {"wccn": wccn(known, their_speakers)}
        projections |= {f"lda_{k}": lda(known, their_speakers, k) for k in (12, 24) if k < dimension}
        for name, (mean, projection) in projections.items():
            cells[name] = measures(score((vectors - mean) @ projection, speakers, trials))
            cells[name]["dimension"] = projection.shape[1]
    return cells, errors


def evaluate(runs: list[Run], test: Corpus, trials: Trials | None, seed: int) -> tuple[list[dict], dict]:
    """The rows of the table for runs on one corpus, the i-vectors first, and the errors behind each by its title.

    The corpus's training split trains the i-vectors, WCCN and LDA. A row has, beside what `row` makes, its `run`.
    """
    training = pieces(runs[0].corpus.split("train"))
    labels = [np.array([u.speaker for u in corpus.utterances]) for corpus in (training, test)]
    rows, detectors = [], {}

    def add(folder: str | None, features: str, known: np.ndarray, vectors: np.ndarray, alpha: float | None = None):
        cells, errors = row(features, (known, labels[0]), (vectors, labels[1]), trials, alpha)
        rows.append({"run": folder} | cells)
        title = f"{features} {vectors.shape[1]}"
        detectors[f"{folder}: {title}" if folder else title] = errors

    for run in runs:
        known, vectors = utterance_vectors(run, training), utterance_vectors(run, test)
        for name in vectors:
            alpha = run.model.config.alpha if run.name == "fhvae" else None
            add(str(run.folder), name, known[name], vectors[name], alpha)
    device = next(runs[0].model.parameters()).device
    for known, vectors in ivector_baseline(training, test, device, seed):
        add(None, "i-vector", known, vectors)
    rows.sort(key=lambda cells: cells["run"] is not None)
    return rows, detectors


def table(rows: list[dict], layout: str | None = None) -> str:
    """The table of `evaluate`'s rows: equal error rates in percent, then minDCF of the raw scores.

    `layout` names the corpus where published rows may stand beside them: its whole test split, all pairs.
    """
    there = {cells["features"] for cells in rows}
    width = max(len("(paper)"), *(len(cells["run"] or "") for cells in rows))
    head = f"{'':<{width}}  {'Features':<10}{'Dim':>5}{'α':>6}"
    lines = [head + "".join(f"{heading:>14}" for heading in COLUMNS.values()) + f"{'minDCF':>9}"]

    def line(title, features, dimension, alpha, rates, cost):
        start = f"{title:<{width}}  {features:<10}{dimension:>5}{'-' if alpha is None else f'{alpha:g}':>6}"
        return start + "".join(f"{'-' if rate is None else f'{rate:.2f}%':>14}" for rate in rates) + f"{cost:>9}"

    for cells in rows:
        rates = [cells[name] and 100 * cells[name]["eer"] for name in COLUMNS]
        start = (cells["run"] or "", cells["features"], cells["dimension"], cells["alpha"])
        lines.append(line(*start, rates, f"{cells['raw']['min_dcf']:.3f}"))
    for features, dimension, alpha, raw, *with_lda in PUBLISHED.get(layout, []):
        if features in there:
            lines.append(line("(paper)", features, dimension, alpha, [raw, None, *with_lda], ""))
    return "\n".join(lines)


def run(runs: list[Run], options: Options) -> list[dict]:
    """A table for each corpus, its rows and a DET figure in the folder of every run, and the results by run."""
    results = []
    for data in dict.fromkeys(run.data for run in runs):
        group = [run for run in runs if run.data == data]
        corpus, test = group[0].corpus, group[0].test
        trials = read_trials(options.trials, test) if options.trials else None
        speakers = np.array([utterance.speaker for utterance in test.utterances])
        pairs = (trials.target.sum(), (~trials.target).sum()) if trials else count_pairs(speakers)
        if not all(pairs):
            raise CorpusError(f"{data}: its {options.split} split has {pairs[0]} pairs of utterances by one speaker "
                              f"and {pairs[1]} by two; verification needs some of both")
        print(f"{data}: {sum(pairs):,} pairs of {len(test)} utterances by {len(test.speakers)} speakers, "
              f"{pairs[0]:,} of one speaker")
        rows, detectors = evaluate(group, test, trials, options.seed)
        comparable = options == Options(seed=options.seed)  # the whole test split, all pairs
        print(f"\n{table(rows, corpus.layout if comparable else None)}\n")
        train = corpus.split("train")
        vectors = len(pieces(train))
        cut = ": their only utterances cut in pieces" if vectors > len(train) else ""
        print(f"Equal error rates on the convex hull. WCCN and LDA, and i-vectors, learn from {vectors} utterances of "
              f"{len(train.speakers)} training speakers{cut}.")
        for one in group:
            one.target.mkdir(parents=True, exist_ok=True)
            own = [cells for cells in rows if cells["run"] in (None, str(one.folder))]
            settings = {"data": data, "split": options.split, "seed": options.seed}
            counts = {"target": int(pairs[0]), "nontarget": int(pairs[1]), "training_vectors": vectors}
            results.append({"run": str(one.folder), "model": one.name} | settings | counts | {"rows": own})
            write(one.target / "results.json", as_json(results[-1]))
            figures.det_curves(detectors, one.target / "det.png")
            print(f"results.json, det.png: {one.target}/")
    return results
