"""How near a waveform comes to its reference, and how well scores tell targets from nontargets.

This file and the packages that it is in import no torch, so that its worker processes start fast.

Waveforms are numpy arrays (samples,) at 16 kHz. A measure that is not defined for a pair is nan: silence, or
too little speech for the measure. ValueError where the two waveforms differ in length.
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
PESQ_LIMIT = 20 * SAMPLE_RATE
FEW_PAIRS = 4  # Up to so many are computed faster than processes start.
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)  # of linear algebra, in the environment


def _pair(estimate: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    estimate, reference = np.asarray(estimate, np.float64), np.asarray(reference, np.float64)
    if estimate.ndim != 1 or estimate.shape != reference.shape:
        raise ValueError(
            f"estimate {estimate.shape} and reference {reference.shape}: expected one length, (samples,)"
        )
    return estimate, reference


def _audible(*waveforms: np.ndarray) -> bool:
    return all(np.isfinite(waveform).all() and waveform.any() for waveform in waveforms)


def best_gain(estimate: np.ndarray, reference: np.ndarray) -> float:
    """The g that makes Σ(g·x̂ − x)² smallest, Σx̂x / Σx̂²; 0 for a silent estimate."""
    energy = estimate @ estimate
    return float(estimate @ reference / energy) if energy > 0 else 0.0


def rmse(estimate: np.ndarray, reference: np.ndarray) -> float:
    """√mean (x̂ − x)², x̂ scaled by its best gain first, as in the published figures."""
    estimate, reference = _pair(estimate, reference)
    error = best_gain(estimate, reference) * estimate - reference
    return float(np.sqrt(np.mean(np.square(error)))) if len(reference) else np.nan


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, 10 log₁₀ ‖αx‖² / ‖αx − x̂‖² with α = x̂ᵀx / ‖x‖²; inf for an
    estimate without distortion. Le Roux et al., SDR – half-baked or well done?, 2019, eq. 3."""
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan
    target = best_gain(reference, estimate) * reference
    distortion = target - estimate
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10((target @ target) / (distortion @ distortion)))


def raw_pesq(lqo: float) -> float:
    """The raw P.862 score, −0.5 to 4.5, of MOS-LQO = 0.999 + 4/(1 + e^(4.6607 − 1.4945 raw)) (P.862.1)."""
    return float((4.6607 - np.log(4 / (lqo - 0.999) - 1)) / 1.4945)


def pesq(estimate: np.ndarray, reference: np.ndarray, band: str = "nb") -> tuple[float, float]:
    """Narrow-band PESQ (ITU-T P.862): the raw score, as the papers print it, and MOS-LQO (P.862.1); with band "wb" the
    second is that of wide-band PESQ (P.862.2), and the first nothing. Recordings longer than 20 s are scored in equal
    pieces no longer than that, and averaged: the reference implementation has room for 50 stretches of speech and
    writes past it beyond; one takes 0.4 s at least, so that 20 s are safe."""
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan, np.nan
    count, scores = -(-len(reference) // PESQ_LIMIT), []
    for x_hat, x in zip(
        np.array_split(estimate, count), np.array_split(reference, count), strict=True
    ):
        if _audible(x_hat, x):
            with suppress(
                itu_p862.PesqError, ValueError
            ):  # no speech found, or shorter than 0.25 s
                lqo = itu_p862.pesq(SAMPLE_RATE, x, x_hat, band)
                scores.append((raw_pesq(lqo), lqo))
    raw, lqo = np.mean(scores, axis=0) if scores else (np.nan, np.nan)
    return float(raw), float(lqo)


def stoi(estimate: np.ndarray, reference: np.ndarray, extended: bool = False) -> float:
    """Short-time objective intelligibility, Taal et al. 2011; extended: ESTOI, Jensen & Taal 2016."""
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan
    with (
        warnings.catch_warnings(),
        suppress(RuntimeWarning, ValueError),
    ):  # less than 30 frames of speech
        warnings.simplefilter("error", RuntimeWarning)
        return float(pystoi.stoi(reference, estimate, SAMPLE_RATE, extended=extended))
    return np.nan


def resynthesis_metrics(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """All measures of one utterance."""
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
    """`resynthesis_metrics`, the gain of SI-SDR over the noisy recording's, and wide-band PESQ, never to be mixed with
    the other two."""
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
    """A worker leaves Ctrl-C to its parent, and ends when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def summary(rows: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{measure: {mean, standard_error, count}} over the rows in which the measure is a finite number."""
    rows, table = list(rows), {}
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows])
        values = values[np.isfinite(values)]
        mean = float(values.mean()) if len(values) else np.nan
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
        table[name] = {"mean": mean, "standard_error": error, "count": len(values)}
    return table


@dataclass(frozen=True)
class DetectionErrors:
    """Errors of a detector that accepts scores at or above a threshold, at every threshold that matters. misses,
    false_alarms: whole numbers (thresholds,), from the threshold that accepts everything to the one that rejects
    everything. targets, nontargets: how many scores of each kind there are."""

    misses: np.ndarray
    false_alarms: np.ndarray

    targets = property(lambda self: int(self.misses[-1]))
    nontargets = property(lambda self: int(self.false_alarms[0]))
    miss_rates = property(lambda self: self.misses / self.targets)
    false_alarm_rates = property(lambda self: self.false_alarms / self.nontargets)


def detection_errors(target: np.ndarray, nontarget: np.ndarray) -> DetectionErrors:
    """From the scores of target trials (n,) and of nontarget trials (m,). Equal scores are accepted together.
    ValueError where there are none of one kind, or a score is not a number."""
    if not len(target) or not len(nontarget):
        raise ValueError(
            f"{len(target)} target and {len(nontarget)} nontarget scores: expected some of both"
        )
    thresholds = np.unique(np.concatenate([target, nontarget]))
    if np.isnan(thresholds[-1]):
        raise ValueError("a score is not a number")
    misses, rejected = (np.searchsorted(np.sort(part), thresholds) for part in (target, nontarget))
    return DetectionErrors(
        np.append(misses, len(target)), len(nontarget) - np.append(rejected, len(nontarget))
    )


def eer_crossing(errors: DetectionErrors) -> float:
    """Equal error rate, 0 to 1: where straight lines through all operating points have equal rates."""
    misses = errors.miss_rates
    lead = (
        errors.false_alarms * errors.targets - errors.misses * errors.nontargets
    )  # whole numbers, which only fall
    low = np.flatnonzero(lead >= 0)[-1]
    share = lead[low] / (lead[low] - lead[low + 1])
    return float(misses[low] + share * (misses[low + 1] - misses[low]))


def eer(errors: DetectionErrors) -> float:
    """Equal error rate, 0 to 0.5: where the lower convex hull of the operating points has equal rates. The hull is the
    best that choosing between thresholds at random can reach. Its corners are where the isotonic regression of "is a
    target" on the score steps up (Brümmer & de Villiers, The BOSARIS toolkit: theory, algorithms and code for surviving
    the new DCF, 2013)."""
    targets, nontargets = np.diff(errors.misses), -np.diff(errors.false_alarms)
    corners = isotonic_regression(
        targets / (targets + nontargets), weights=targets + nontargets
    ).blocks
    return eer_crossing(DetectionErrors(errors.misses[corners], errors.false_alarms[corners]))


def min_dcf(errors: DetectionErrors, target_prior: float = 0.01) -> float:
    """The least detection cost over all thresholds, p·P(miss) + (1 − p)·P(false alarm) with p = `target_prior`, over
    min(p, 1 − p), the cost of a detector that accepts or rejects everything: as NIST normalises it."""
    cost = target_prior * errors.miss_rates + (1 - target_prior) * errors.false_alarm_rates
    return float(cost.min() / min(target_prior, 1 - target_prior))
