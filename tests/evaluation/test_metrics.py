"""Measures on cases whose answers are known; PESQ and STOI against what their papers promise."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pesq as itu_p862
import pystoi
import pytest

from minidvae.evaluation import metrics

NAMES = ["rmse", "si_sdr", "pesq", "pesq_lqo", "stoi", "estoi"]


def speechlike(seconds, seed=0):
    """Return harmonics of 120 Hz, loud and soft three times a second, with one moving formant."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(16_000 * seconds)) / 16_000
    formant = 700 + 400 * np.sin(2 * np.pi * (1.1 + 0.1 * rng.random()) * t)
    buzz = 0
    for k in range(1, 30):
        gain = 1 / (1 + ((120 * k - formant) / 200) ** 2)
        buzz = buzz + gain * np.sin(2 * np.pi * 120 * k * t)
    return 0.1 * buzz * np.maximum(0, np.sin(2 * np.pi * 3 * t + seed))


def noisy(waveform, level=0.01, seed=1):
    return waveform + level * np.random.default_rng(seed).standard_normal(len(waveform))


def orthogonal_pair():
    """Return x and n with xᵀn = 0, ‖x‖² = 4 · 25 = 100 and ‖n‖² = 4."""
    return np.array([5.0, 5.0, 5.0, 5.0]), np.array([1.0, -1.0, 1.0, -1.0])


# -------------------------------------------------------------------------------- RMSE and SI-SDR


def test_best_gain_by_hand():
    """Fails where the gain is that of the reference, or a silent estimate divides by zero."""
    x, n = orthogonal_pair()
    assert metrics.best_gain(2 * x, x) == 0.5
    assert metrics.best_gain(x + n, x) == pytest.approx(100 / 104, rel=1e-15)
    assert metrics.best_gain(0 * x, x) == 0


def test_rmse_by_hand():
    """Fails where the estimate is not scaled first.

    With x̂ = x + n the gain is g = 100/104, and the error (g − 1)x + g·n has the energy
    100·(4/104)² + 4·(100/104)² = 400/104.
    """
    x, n = orthogonal_pair()
    assert metrics.rmse(x + n, x) == pytest.approx(np.sqrt(400 / 104 / 4), rel=1e-14)
    assert metrics.rmse(-3 * x, x) == 0
    assert metrics.rmse(0 * x, x) == 5


def test_si_sdr_by_hand():
    """Fails where the estimate is scaled to the reference instead, which would give
    10 log₁₀(104/4).

    With x̂ = x + n, α = 1: 10 log₁₀(100/4). Any gain of the estimate cancels.
    """
    x, n = orthogonal_pair()
    for gain in (1, -1, 1e-3, 32_768):
        assert metrics.si_sdr(gain * (x + n), x) == pytest.approx(10 * np.log10(25), abs=1e-10)
    assert metrics.si_sdr(n, x) == -np.inf and metrics.si_sdr(2 * x, x) == np.inf


def test_integers_and_single_precision_do_not_spoil_sums():
    """Fails where int16 overflows or float32 loses the sums of a long recording."""
    samples = np.full(100_000, 20_000, np.int16)
    assert metrics.rmse(samples // 2, samples) == 0 and metrics.rmse(0 * samples, samples) == 20_000
    reference = speechlike(20).astype(np.float32)
    estimate = noisy(speechlike(20)).astype(np.float32)
    expected = metrics.si_sdr(estimate.astype(np.float64), reference.astype(np.float64))
    assert metrics.si_sdr(estimate, reference) == expected


# ---------------------------------------------------------------------------------- PESQ and STOI


def test_raw_pesq_inverts_the_map_of_p862_1():
    """Fails where raw scores are not those whose MOS-LQO was given."""
    exponent_is_0 = 4.6607 / 1.4945
    assert metrics.raw_pesq(0.999 + 4 / 2) == pytest.approx(exponent_is_0, abs=1e-12)
    for raw, four_digits in ((-0.5, 1.0168), (1.0, 1.1608), (4.5, 4.5486)):
        lqo = 0.999 + 4 / (1 + np.exp(-1.4945 * raw + 4.6607))
        assert lqo == pytest.approx(four_digits, abs=5e-5)
        assert metrics.raw_pesq(lqo) == pytest.approx(raw, abs=1e-10)


def test_pesq_of_a_perfect_copy_is_the_top_of_the_scale():
    """Fails where identical signals score below 4.5 raw, as P.862 defines the top."""
    raw, lqo = metrics.pesq(speechlike(3), speechlike(3))
    assert raw == pytest.approx(4.5, abs=1e-5) and lqo == pytest.approx(4.5486, abs=1e-4)


def test_pesq_is_narrow_band_and_knows_which_is_the_reference():
    """Fails where estimate and reference are exchanged, or wide-band P.862.2 is computed."""
    x = speechlike(3)
    x_hat = noisy(speechlike(3))
    _, lqo = metrics.pesq(x_hat, x)
    assert lqo == itu_p862.pesq(16_000, x, x_hat, "nb")
    assert abs(lqo - itu_p862.pesq(16_000, x_hat, x, "nb")) > 0.01


def test_long_recordings_are_scored_in_pieces():
    """Fails where a recording has more than the 50 stretches of speech that P.862's code can hold
    (a crash), or the scores of the pieces are not averaged."""
    burst = np.concatenate([noisy(np.zeros(4000), 0.1), np.zeros(4000)])
    x = np.tile(burst, 90)  # 45 s, so three pieces
    x_hat = noisy(x, 1e-3)
    pieces = zip(np.split(x_hat, 3), np.split(x, 3), strict=True)
    scores = [metrics.pesq(estimate, reference) for estimate, reference in pieces]
    assert metrics.pesq(x_hat, x) == pytest.approx(tuple(np.mean(scores, axis=0)), abs=1e-12)


def test_stoi_and_estoi_of_copies_and_noise():
    """Fails where copies are not intelligible, more noise is not worse, or the arguments are
    exchanged."""
    x = speechlike(3)
    for extended in (False, True):
        assert metrics.stoi(0.1 * x, x, extended) == pytest.approx(1, abs=1e-6)
        scores = [metrics.stoi(noisy(x, level), x, extended) for level in (0.001, 0.01, 0.1, 1)]
        assert scores == sorted(scores, reverse=True) and scores[0] > 0.6 and scores[-1] < 0.5
        # Nothing is measured where the reference is silent, so noise in its pauses costs nothing.
        reference = np.concatenate([x, np.zeros(16_000), x])
        estimate = np.concatenate([x, noisy(np.zeros(16_000), 0.05), x])
        assert metrics.stoi(estimate, reference, extended) > 0.98
        assert metrics.stoi(reference, estimate, extended) < 0.95
    assert metrics.stoi(noisy(x), x) == pystoi.stoi(x, noisy(x), 16_000)
    assert metrics.stoi(noisy(x), x) != metrics.stoi(noisy(x), x, extended=True)


# ------------------------------------------------------------------------------ rows and summaries


@pytest.mark.parametrize(
    ("reference", "estimate", "defined"),
    [
        (speechlike(1), np.zeros(16_000), {"rmse"}),
        (np.zeros(16_000), speechlike(1), {"rmse"}),
        (speechlike(0.2), noisy(speechlike(0.2)), {"rmse", "si_sdr"}),
        (speechlike(1), np.full(16_000, np.nan), set()),
        (np.zeros(0), np.zeros(0), set()),
    ],
    ids=["silent estimate", "silent reference", "too short", "not finite", "empty"],
)
def test_what_is_not_defined_is_nan(reference, estimate, defined):
    """Fails where silence, too little speech or a broken estimate ends the evaluation, or gets a
    number."""
    row = metrics.resynthesis_metrics(reference, estimate)
    assert list(row) == NAMES
    assert {name for name, value in row.items() if np.isfinite(value)} == defined


def test_a_row_is_its_measures():
    """Fails where a row mixes up estimate and reference, scaled and unscaled, or two of the
    measures."""
    x = speechlike(2)
    x_hat = 0.7 * noisy(speechlike(2))
    row = metrics.resynthesis_metrics(reference=x, estimate=x_hat)
    expected = [metrics.rmse(x_hat, x), metrics.si_sdr(x_hat, x), *metrics.pesq(x_hat, x)]
    expected += [metrics.stoi(x_hat, x), metrics.stoi(x_hat, x, extended=True)]
    assert list(row.values()) == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) == 6


def test_waveforms_of_two_lengths_are_refused():
    """Fails where a longer estimate is cut or padded without a word, also in a worker."""
    with pytest.raises(ValueError, match="expected one length"):
        metrics.rmse(np.zeros(5), np.zeros(4))
    with pytest.raises(ValueError, match="expected one length"):
        metrics.si_sdr(np.zeros((1, 4)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="expected one length"):
        list(metrics.metrics_of([(np.zeros(5), np.zeros(4))] * 3, workers=2))


def test_summary_by_hand():
    """Fails where nan spoils a mean, or the standard error is not s/√n with n − 1 in s."""
    rows = [
        {"a": 1.0, "b": np.nan},
        {"a": 2.0, "b": 5.0},
        {"a": 6.0, "b": np.inf},
        {"a": np.nan, "b": np.nan},
    ]
    table = metrics.summary(row for row in rows)
    assert table["a"] == {"mean": 3.0, "standard_error": pytest.approx(np.sqrt(7 / 3)), "count": 3}
    unknown = pytest.approx(np.nan, nan_ok=True)
    assert table["b"] == {"mean": 5.0, "standard_error": unknown, "count": 1}
    assert metrics.summary([{"c": np.nan}])["c"]["count"] == 0
    assert metrics.summary([]) == {}


# ------------------------------------------------------------------------------------- in parallel


def pairs(count):
    for seed in range(count):
        waveform = speechlike(1 + 0.5 * (seed % 3), seed).astype(np.float32)
        yield waveform, noisy(waveform, 0.003 * (1 + seed)).astype(np.float32)


def test_workers_give_what_one_process_gives():
    """Fails where workers compute other numbers, or rows lose their order."""
    expected = [metrics.resynthesis_metrics(*pair) for pair in pairs(7)]
    parallel = list(metrics.metrics_of(pairs(7), workers=3))
    ratios = [row["si_sdr"] for row in expected]
    assert ratios == sorted(ratios, reverse=True)
    for row, expected_row in zip(parallel, expected, strict=True):
        assert list(row) == list(expected_row) == NAMES
        assert list(row.values()) == pytest.approx(list(expected_row.values()), abs=1e-9)


def test_pairs_are_taken_as_they_are_needed():
    """Fails where a corpus of any size is held in memory at once."""
    rows = []
    num_ahead = []  # pairs taken for which there is no row yet

    def counted_pairs():
        for num_taken, pair in enumerate(pairs(12), start=1):
            num_ahead.append(num_taken - len(rows))
            yield pair

    for row in metrics.metrics_of(counted_pairs(), workers=2):
        rows.append(row)
    assert len(rows) == 12 and max(num_ahead) <= 4


def pairs_and_killed_workers():
    """Yield two pairs, kill both workers, and yield four more pairs."""
    yield from pairs(2)
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    for process in multiprocessing.active_children():
        process.kill()
    yield from pairs(4)


def test_a_killed_worker_is_an_error_and_none_is_left():
    """Fails where the evaluation hangs, goes on without a row, or leaves a process after a worker
    was killed."""
    with pytest.raises(ChildProcessError, match="was killed"):
        list(metrics.metrics_of(pairs_and_killed_workers(), workers=2))
    assert not multiprocessing.active_children()


def test_the_environment_stays_as_it_was(monkeypatch):
    """Fails where the limit of one thread, which is meant for the workers, stays in the environment
    of this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    limits = []

    def pairs_and_limits():
        limits.append((os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]))
        yield from pairs(1)

    list(metrics.metrics_of(pairs_and_limits(), workers=1))
    assert limits == [("1", "1")]
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


def test_workers_start_whatever_torch_has_done(tmp_path):
    """Fails where workers deadlock after torch used threads, run the caller's script again, or load
    torch."""
    script = tmp_path / "script.py"
    script.write_text("""
import sys
import numpy as np
from minidvae.evaluation import metrics
assert "torch" not in sys.modules
if __name__ == "__main__":
    print("started")
    import torch
    torch.set_num_threads(2)
    matrix = torch.randn(600, 600, requires_grad=True)
    (matrix @ matrix).sum().backward()
    waveform = np.sin(0.3 * np.arange(16_000)) * np.sin(0.001 * np.arange(16_000))
    print(len(list(metrics.metrics_of([(waveform, 0.5 * waveform)] * 3, workers=2))))
""")
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(Path(metrics.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["started", "3"], result.stderr
