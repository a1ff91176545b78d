"""The evaluation of enhancement: mixtures, baselines, the task."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from run_scripts import call, evaluate_script, results_of, surroundings, train_script  # noqa: F401

from minidvae.data.corpus import load_corpus
from minidvae.evaluation.enhancement import Mixture, log_mmse, mix, oracle
from minidvae.evaluation.metrics import si_sdr


def test_baselines(speech):
    """log-MMSE must remove white noise, and the Wiener filter that knows speech and noise must be
    better by 3 dB at least."""
    clean, _ = soundfile.read(min(speech.rglob("*.wav")), dtype="float32")
    noise = np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    noisy = clean + np.std(clean) * noise
    log_mmse_ratio = si_sdr(log_mmse(noisy), clean)
    oracle_ratio = si_sdr(oracle(Mixture("a", 0.0, clean, noisy)), clean)
    assert 3 < log_mmse_ratio < oracle_ratio - 3


def test_task(speech, capsys):
    """Fails if the task's table, JSON or files lack a row, or a bad flag is accepted."""
    arguments = ["--model", "vae", "--recipe", "quick", "--data", speech, "--steps", 2]
    settings = ["--set", "frames=20", "batch=4"]
    assert call(train_script, *arguments, "--run", "run", *settings) == 0
    task = ["run", "--task", "enhancement", "--iterations", 2]
    assert call(evaluate_script, *task, "--limit", 2, "--snr", 0, 10, "--json", "all.json") == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("0 dB", "10 dB", "log-MMSE", "oracle Wiener", "RTF"))
    (result,) = json.loads(Path("all.json").read_text())
    assert len(result["utterances"]) == 4 and result["settings"]["iterations"] == 2
    rows = {name: rows[0] for name, rows in result["baselines"].items()}
    assert rows["noisy"]["si_sdr"] == pytest.approx(0, abs=0.5)
    assert rows["noisy"]["si_sdr_gain"] == 0
    assert rows["oracle Wiener"]["si_sdr"] > rows["log-MMSE"]["si_sdr"]
    assert len(list(results_of("run", "enhancement").glob("*.wav"))) == 9

    Path("pairs").mkdir()
    Path("empty").mkdir()
    clean, rate = soundfile.read(next(speech.rglob("*.wav")))
    noise = np.random.default_rng(0).standard_normal(len(clean))
    soundfile.write("pairs/clean-a.wav", clean, rate)
    soundfile.write("pairs/noisy-a.wav", clean + 0.05 * noise, rate)
    assert call(evaluate_script, *task, "--pairs", "pairs") == 0
    assert "Recorded pairs" in capsys.readouterr().out
    assert call(evaluate_script, *task, "--limit", 1, "--noise", "pairs") == 0
    capsys.readouterr()
    for arguments, message in (
        ([*task, "--noise", "empty"], "no sound of noise"),
        ([*task, "--pairs", "empty"], "clean"),
        ([*task, "--pairs", "pairs", "--snr", 3], "--snr"),
        ([*task, "--snr", "nan"], "finite"),
        (["run", "--snr", 3], "enhancement"),
    ):
        assert call(evaluate_script, *arguments) == 2
        assert message in capsys.readouterr().err


def test_mixtures_have_the_ratio_that_was_asked_for(speech):
    """Fails if noise is scaled wrongly, or drawn anew under the same seed."""
    test = load_corpus(speech).split("test")
    for clips in (None, [np.ones(100, np.float32)]):
        for snr in (-5.0, 7.0):
            mixture = mix(test, 1, snr, clips, seed=0)
            noise = mixture.noisy - mixture.clean
            ratio = np.mean(mixture.clean**2) / np.mean(noise**2)
            assert 10 * np.log10(ratio) == pytest.approx(snr, abs=0.01)
            assert np.array_equal(mixture.noisy, mix(test, 1, snr, clips, seed=0).noisy)
