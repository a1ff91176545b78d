"""Measures of the quality of a waveform beside its reference, and of the errors of a detector.

This file and its packages import no torch, so that worker processes start fast.

Waveforms are numpy arrays (samples,) at 16 kHz. A measure that is not defined for a pair is nan:
silence, or too little speech for the measure. All raise ValueError where the two waveforms differ
in length.
"""

import itertools
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

import numpy as np
import pesq as itu_p862
import pystoi
from scipy.optimize import isotonic_regression

SAMPLE_RATE = 16_000
PESQ_LIMIT = 20 * SAMPLE_RATE  # longest piece for PESQ, samples
FEW_PAIRS = 4  # Up to so many are computed faster than processes start.
# Environment variables with the number of threads of linear algebra.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _pair(estimate: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both in float64. Raises ValueError where their shapes are not (samples,)."""
    estimate = np.asarray(estimate, np.float64)
    reference = np.asarray(reference, np.float64)
    if estimate.ndim != 1 or estimate.shape != reference.shape:
        raise ValueError(
            f"estimate {estimate.shape} and reference {reference.shape}: "
            "expected one length, (samples,)"
        )
    return estimate, reference


def _audible(*waveforms: np.ndarray) -> bool:
    """Return whether all waveforms are finite and none is silent."""
    for waveform in waveforms:
        if not np.isfinite(waveform).all() or not waveform.any():
            return False
    return True


def best_gain(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return the gain g that minimises Σ(g·x̂ − x)², Σx̂x / Σx̂²; 0 for a silent estimate."""
    energy = estimate @ estimate
    return float(estimate @ reference / energy) if energy > 0 else 0.0


def rmse(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return √mean (g·x̂ − x)² with the best gain g, as in the published figures."""
    estimate, reference = _pair(estimate, reference)
    if not len(reference):
        return np.nan
    error = best_gain(estimate, reference) * estimate - reference
    return float(np.sqrt(np.mean(np.square(error))))


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return the scale-invariant signal-to-distortion ratio, dB: 10 log₁₀ ‖αx‖² / ‖αx − x̂‖² with α
    = x̂ᵀx / ‖x‖²; inf for an estimate without distortion. Le Roux et al., SDR – half-baked or well
    done?, 2019, eq. 3."""
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan
    target = best_gain(reference, estimate) * reference
    distortion = target - estimate
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10((target @ target) / (distortion @ distortion)))


def raw_pesq(lqo: float) -> float:
    """Return the raw P.862 score, −0.5 to 4.5, of a MOS-LQO (P.862.1):
    LQO = 0.999 + 4/(1 + e^(4.6607 − 1.4945 raw))."""
    return float((4.6607 - np.log(4 / (lqo - 0.999) - 1)) / 1.4945)


def pesq(estimate: np.ndarray, reference: np.ndarray, band: str = "nb") -> tuple[float, float]:
    """Return narrow-band PESQ (ITU-T P.862): the raw score, as the papers print it, and MOS-LQO
    (P.862.1). With band "wb" the second is that of wide-band PESQ (P.862.2), and the first has no
    meaning.

    Recordings longer than 20 s are scored in equal pieces and averaged: the reference
    implementation has memory for 50 utterances of at least 0.4 s, and writes beyond it where there
    are more.
    """
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan, np.nan
    num_pieces = -(-len(reference) // PESQ_LIMIT)
    estimates = np.array_split(estimate, num_pieces)
    references = np.array_split(reference, num_pieces)
    scores = []
    for x_hat, x in zip(estimates, references, strict=True):
        if not _audible(x_hat, x):
            continue
        # A piece without an utterance, or under 0.25 s, has no score.
        with suppress(itu_p862.PesqError, ValueError):
            lqo = itu_p862.pesq(SAMPLE_RATE, x, x_hat, band)
            scores.append((raw_pesq(lqo), lqo))
    if not scores:
        return np.nan, np.nan
    raw, lqo = np.mean(scores, axis=0)
    return float(raw), float(lqo)


def stoi(estimate: np.ndarray, reference: np.ndarray, extended: bool = False) -> float:
    """Return the short-time objective intelligibility (Taal et al. 2011); extended: ESTOI (Jensen &
    Taal 2016)."""
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan
    # A waveform with less than 30 frames of speech has no score.
    with warnings.catch_warnings(), suppress(RuntimeWarning, ValueError):
        warnings.simplefilter("error", RuntimeWarning)
        return float(pystoi.stoi(reference, estimate, SAMPLE_RATE, extended=extended))
    return np.nan


def resynthesis_metrics(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """Return all measures of the resynthesis of one utterance."""
    raw, lqo = pesq(estimate, reference)
    return {
        "rmse": rmse(estimate, reference),
        "si_sdr": si_sdr(estimate, reference),
        "pesq": raw,
        "pesq_lqo": lqo,
        "stoi": stoi(estimate, reference),
        "estoi": stoi(estimate, reference, extended=True),
    }


def enhancement_metrics(
    clean: np.ndarray, noisy: np.ndarray, estimate: np.ndarray
) -> dict[str, float]:
    """Return `resynthesis_metrics`, the gain in SI-SDR over the noisy recording, and wide-band
    PESQ, which does not compare with narrow-band PESQ."""
    row = resynthesis_metrics(clean, estimate)
    return row | {
        "si_sdr_gain": row["si_sdr"] - si_sdr(noisy, clean),
        "pesq_wb": pesq(estimate, clean, "wb")[1],
    }


def metrics_of(
    pairs: Iterable[tuple], measure: Callable = resynthesis_metrics, workers: int | None = None
) -> Iterator[dict[str, float]]:
    """Yield `measure(*pair)` for every pair, in order, computed by several processes.

    Args:
        pairs: tuples (reference, …, estimate). They are taken as workers get free: at most two for
            each worker are in memory.
        measure: a function of a pair.
        workers: number of processes, of one thread each. None: one for each core, or none at all
            where there are so few pairs that starting processes would take longer.

    Raises:
        ChildProcessError: a worker was killed.

    Workers import the script that calls this, which therefore needs the usual
    `if __name__ == "__main__":`.
    """
    pairs = iter(pairs)
    if workers is None:
        first_pairs = list(itertools.islice(pairs, FEW_PAIRS + 1))
        if len(first_pairs) <= FEW_PAIRS:
            for pair in first_pairs:
                yield measure(*pair)
            return
        pairs = itertools.chain(first_pairs, pairs)
        workers = number_of_cores()
    environment_before = {name: os.environ[name] for name in THREADS if name in os.environ}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)
    pending = deque()
    try:
        for pair in pairs:
            pending.append(pool.submit(measure, *pair))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that computed metrics was killed; is there enough memory?"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        for name in THREADS:
            del os.environ[name]
        os.environ.update(environment_before)


def number_of_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS and Windows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent process handles, and end when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def summary(rows: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return measure → {mean, standard_error, count} over the rows in which it is finite."""
    rows = list(rows)
    table = {}
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows])
        values = values[np.isfinite(values)]
        count = len(values)
        mean = float(values.mean()) if count else np.nan
        error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else np.nan
        table[name] = {"mean": mean, "standard_error": error, "count": count}
    return table


@dataclass(frozen=True)
class DetectionErrors:
    """Numbers of errors of a detector that accepts scores at or above a threshold, from the
    threshold that accepts everything to the one that rejects everything."""

    misses: np.ndarray  # (thresholds,), int
    false_alarms: np.ndarray  # (thresholds,), int

    @property
    def targets(self) -> int:
        """Number of target scores."""
        return int(self.misses[-1])

    @property
    def nontargets(self) -> int:
        """Number of nontarget scores."""
        return int(self.false_alarms[0])

    @property
    def miss_rates(self) -> np.ndarray:
        return self.misses / self.targets

    @property
    def false_alarm_rates(self) -> np.ndarray:
        return self.false_alarms / self.nontargets


def detection_errors(target: np.ndarray, nontarget: np.ndarray) -> DetectionErrors:
    """Return the errors for the scores of target trials (n,) and of nontarget trials (m,). Equal
    scores are accepted together. Raises ValueError where there are no scores of one kind, or one is
    not a number."""
    if not len(target) or not len(nontarget):
        raise ValueError(
            f"{len(target)} target and {len(nontarget)} nontarget scores: expected some of both"
        )
    thresholds = np.unique(np.concatenate([target, nontarget]))
    if np.isnan(thresholds[-1]):
        raise ValueError("a score is not a number")
    misses = np.searchsorted(np.sort(target), thresholds)
    misses = np.append(misses, len(target))
    correct_rejections = np.searchsorted(np.sort(nontarget), thresholds)
    correct_rejections = np.append(correct_rejections, len(nontarget))
    return DetectionErrors(misses, len(nontarget) - correct_rejections)


def eer_crossing(errors: DetectionErrors) -> float:
    """Return the equal error rate, 0 to 1, where straight lines through all operating points have
    equal rates."""
    misses = errors.miss_rates
    # The difference of the two rates, in whole numbers. It never rises.
    difference = errors.false_alarms * errors.targets - errors.misses * errors.nontargets
    low = np.flatnonzero(difference >= 0)[-1]
    share = difference[low] / (difference[low] - difference[low + 1])
    return float(misses[low] + share * (misses[low + 1] - misses[low]))


def eer(errors: DetectionErrors) -> float:
    """Return the equal error rate, 0 to 0.5, where the lower convex hull of the operating points
    has equal rates.

    The hull is reached by choosing between two thresholds at random. Its corners are where the
    isotonic regression of "is a target" on the score rises (Brümmer & de Villiers, The BOSARIS
    toolkit: theory, algorithms and code for surviving the new DCF, 2013).
    """
    targets = np.diff(errors.misses)
    nontargets = -np.diff(errors.false_alarms)
    totals = targets + nontargets
    corners = isotonic_regression(targets / totals, weights=totals).blocks
    return eer_crossing(DetectionErrors(errors.misses[corners], errors.false_alarms[corners]))


def min_dcf(errors: DetectionErrors, target_prior: float = 0.01) -> float:
    """Return the smallest detection cost over all thresholds, p·P(miss) + (1 − p)·P(false alarm)
    with p = `target_prior`, divided by min(p, 1 − p), the cost of a detector that accepts or
    rejects everything: as NIST normalises it."""
    cost = target_prior * errors.miss_rates + (1 - target_prior) * errors.false_alarm_rates
    return float(cost.min() / min(target_prior, 1 - target_prior))
