"""How near a waveform comes to its reference. Knows no model, and no torch: its worker processes start fast.

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


if __name__ == "__main__":
    _work()
