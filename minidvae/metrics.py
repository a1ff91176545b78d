"""How near a waveform comes to its reference, and how well scores tell targets from nontargets.

Knows no model, and no torch: its worker processes start fast.

Waveforms are numpy arrays (samples,) at 16 kHz. A measure that is not defined for a pair is nan: silence, or
too little speech for the measure. ValueError where the two waveforms differ in length.
"""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import pesq as itu_p862
import pystoi

SAMPLE_RATE = 16_000
PESQ_LIMIT = 20 * SAMPLE_RATE


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
    estimate, reference = _pair(estimate, reference)
    energy = estimate @ estimate
    return float(estimate @ reference / energy) if energy > 0 else 0.0


def rmse(estimate: np.ndarray, reference: np.ndarray, scale: bool = True) -> float:
    """√mean (x̂ − x)², x̂ scaled by its best gain first (as in the published figures) or as it is."""
    estimate, reference = _pair(estimate, reference)
    gain = best_gain(estimate, reference) if scale else 1.0
    return float(np.sqrt(np.mean(np.square(gain * estimate - reference)))) if len(reference) else np.nan


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, the reference scaled to the estimate:

        10 log₁₀ ‖αx‖² / ‖αx − x̂‖²,    α = x̂ᵀx / ‖x‖².

    Le Roux et al., SDR – half-baked or well done?, 2019, eq. 3. inf for an estimate without distortion.
    """
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


def pesq(estimate: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Narrow-band PESQ (ITU-T P.862): the raw score, as the papers print it, and MOS-LQO (P.862.1).

    Recordings longer than 20 s are scored in equal pieces no longer than that, and averaged: the reference
    implementation has room for 50 stretches of speech and writes past it beyond; 0.2 s of speech and 0.2 s of
    pause is the least that it counts as one, so that 20 s are safe.
    """
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan, np.nan
    count = -(-len(reference) // PESQ_LIMIT)
    scores = []
    for x_hat, x in zip(np.array_split(estimate, count), np.array_split(reference, count), strict=True):
        if not _audible(x_hat, x):
            continue
        try:
            lqo = itu_p862.pesq(SAMPLE_RATE, x, x_hat, "nb")
        except (itu_p862.PesqError, ValueError):  # no speech found, or shorter than 0.25 s
            continue
        scores.append((raw_pesq(lqo), lqo))
    raw, lqo = np.mean(scores, axis=0) if scores else (np.nan, np.nan)
    return float(raw), float(lqo)


def stoi(estimate: np.ndarray, reference: np.ndarray, extended: bool = False) -> float:
    """Short-time objective intelligibility, Taal et al. 2011; extended: ESTOI, Jensen & Taal 2016."""
    estimate, reference = _pair(estimate, reference)
    if not _audible(estimate, reference):
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(reference, estimate, SAMPLE_RATE, extended=extended))
        except (RuntimeWarning, ValueError):  # less than 30 frames of speech
            return np.nan


def resynthesis_metrics(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """All measures of one utterance."""
    raw, lqo = pesq(estimate, reference)
    return {
        "rmse": rmse(estimate, reference),
        "rmse_unscaled": rmse(estimate, reference, scale=False),
        "si_sdr": si_sdr(estimate, reference),
        "pesq": raw,
        "pesq_lqo": lqo,
        "stoi": stoi(estimate, reference),
        "estoi": stoi(estimate, reference, extended=True),
    }


def resynthesis_metrics_of(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    workers: int | None = None,
    progress: Callable[[], object] | None = None,
) -> list[dict[str, float]]:
    """`resynthesis_metrics` of every (reference, estimate), in order, on so many processes (None: all cores).

    Each worker is a fresh Python that runs this file alone, with one thread, and is fed by a thread of ours:
    safe whatever torch has been doing here, and no `if __name__ == "__main__"` needed in the calling script.
    Pairs are taken from the iterable as workers get free, so that few are in memory at a time. `progress()`
    is called after each pair; tqdm's `bar.update` will do. ChildProcessError where a worker is killed.
    """
    rows = []

    def keep(row):
        rows.append(row)
        if progress:
            progress()

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers == 1:
        for reference, estimate in pairs:
            keep(resynthesis_metrics(reference, estimate))
        return rows

    mine = threading.local()  # of each thread: the connection to its worker
    with ExitStack() as processes:
        threads = ThreadPoolExecutor(workers, initializer=lambda: _start_worker(mine, processes))
        waiting = deque()
        try:
            for pair in pairs:
                waiting.append(threads.submit(_ask_worker, mine, pair))
                if len(waiting) == 2 * workers:
                    keep(waiting.popleft().result())
            while waiting:
                keep(waiting.popleft().result())
        finally:
            threads.shutdown(cancel_futures=True)
    return rows


def _start_worker(mine: threading.local, processes: ExitStack) -> None:
    mine.worker, its_end = Pipe()
    with its_end:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=its_end.fileno(),
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
    processes.enter_context(process)
    processes.enter_context(mine.worker)  # closed first: the worker sees the end of its input and ends


def _ask_worker(mine: threading.local, pair: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    try:
        mine.worker.send(pair)
        answer = mine.worker.recv()
    except (EOFError, OSError):
        raise ChildProcessError("a process that computed metrics was killed; is there enough memory?") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work() -> None:
    """A worker: pairs come in and rows go out over standard input, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the one who asks
    client = Connection(sys.stdin.fileno())
    while True:
        try:
            pair = client.recv()
        except (EOFError, OSError):
            return
        try:
            client.send(resynthesis_metrics(*pair))
        except Exception as error:
            client.send(error)


def summary(rows: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{measure: {mean, standard_error, count}} over the rows in which the measure is a finite number."""
    table = {}
    rows = list(rows)
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows])
        values = values[np.isfinite(values)]
        n = len(values)
        table[name] = {
            "mean": float(values.mean()) if n else np.nan,
            "standard_error": float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan,
            "count": n,
        }
    return table


# --------------------------------------------------------------------------------------------------- detection


@dataclass(frozen=True)
class DetectionErrors:
    """Errors of a detector that accepts scores at or above a threshold, at every threshold that matters.

    misses, false_alarms: whole numbers (thresholds,), from the threshold that accepts everything to the one that
    rejects everything; targets, nontargets: how many scores of each kind there are.
    """

    misses: np.ndarray
    false_alarms: np.ndarray
    targets: int
    nontargets: int

    def __post_init__(self):
        if not self.targets or not self.nontargets:
            raise ValueError(f"{self.targets} target and {self.nontargets} nontarget scores: expected some of both")

    @property
    def miss_rates(self) -> np.ndarray:
        return self.misses / self.targets

    @property
    def false_alarm_rates(self) -> np.ndarray:
        return self.false_alarms / self.nontargets


def detection_errors(target: np.ndarray, nontarget: np.ndarray) -> DetectionErrors:
    """From the scores of target trials (n,) and of nontarget trials (m,). Equal scores are accepted together.

    ValueError where there are none of one kind, or a score is not a number.
    """
    target, nontarget = np.sort(np.asarray(target, np.float64)), np.sort(np.asarray(nontarget, np.float64))
    if np.isnan(target).any() or np.isnan(nontarget).any():
        raise ValueError("a score is not a number")
    thresholds = np.unique(np.concatenate([target, nontarget]))
    misses = np.append(np.searchsorted(target, thresholds), len(target))  # scores below each threshold; at last, all
    rejected = np.append(np.searchsorted(nontarget, thresholds), len(nontarget))
    return DetectionErrors(misses, len(nontarget) - rejected, len(target), len(nontarget))


def detection_errors_of_histogram(target: np.ndarray, nontarget: np.ndarray) -> DetectionErrors:
    """From the counts (bins,) of target and nontarget scores in the same bins, the lowest scores first.

    What falls into one bin is accepted together. ValueError where there are no scores of one kind.
    """
    occupied = (target + nontarget) > 0
    misses, rejected = (np.append(0, np.cumsum(counts[occupied], dtype=np.int64)) for counts in (target, nontarget))
    return DetectionErrors(misses, rejected[-1] - rejected, int(misses[-1]), int(rejected[-1]))


def _equal_rates(errors: DetectionErrors, low: int, high: int) -> float:
    """Where the line between two operating points has as large a rate of misses as of false alarms."""
    misses = errors.miss_rates[[low, high]]
    before, after = errors.false_alarm_rates[[low, high]] - misses
    share = before / (before - after) if before != after else 0.0
    return float(misses[0] + share * (misses[1] - misses[0]))


def _lead(errors: DetectionErrors) -> np.ndarray:
    """How far false alarms lead over misses, (rate of false alarms − rate of misses) · targets · nontargets."""
    return errors.false_alarms * errors.targets - errors.misses * errors.nontargets


def eer_crossing(errors: DetectionErrors) -> float:
    """Equal error rate, 0 to 1: where the curve through all operating points has equal rates.

    Neighbouring points are joined by straight lines.
    """
    low = np.flatnonzero(_lead(errors) >= 0)[-1]  # false alarms fall and misses rise, so the lead only falls
    return _equal_rates(errors, low, low + 1)


def eer(errors: DetectionErrors) -> float:
    """Equal error rate, 0 to 0.5: where the lower convex hull of the operating points has equal rates.

    Brümmer & de Villiers, The BOSARIS toolkit: theory, algorithms and code for surviving the new DCF, 2013. The hull
    is the best that choosing between thresholds at random can reach. Only its edge that crosses the diagonal is
    looked for, in whole numbers: of two hull points on either side of the diagonal, the one on its side is replaced
    by the point farthest below the line through them, until there is none.
    """
    lead, low, high = _lead(errors), 0, len(errors.misses) - 1
    while True:
        rise = errors.misses[high] - errors.misses[low]
        fall = errors.false_alarms[low] - errors.false_alarms[high]
        height = errors.misses * fall + errors.false_alarms * rise
        lowest = int(height.argmin())
        if height[lowest] == height[low]:
            return _equal_rates(errors, low, high)
        low, high = (lowest, high) if lead[lowest] >= 0 else (low, lowest)


def min_dcf(errors: DetectionErrors, target_prior: float = 0.01) -> float:
    """The least detection cost over all thresholds, p·P(miss) + (1 − p)·P(false alarm) with p = `target_prior`,

    over min(p, 1 − p), the cost of a detector that accepts or rejects everything, as the speaker recognition
    evaluations of NIST normalise it; both errors cost 1.
    """
    cost = target_prior * errors.miss_rates + (1 - target_prior) * errors.false_alarm_rates
    return float(cost.min() / min(target_prior, 1 - target_prior))


if __name__ == "__main__":
    _work()
