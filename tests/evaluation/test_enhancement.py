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
    """log-MMSE takes white noise away, and the filter that knows both is ahead of it."""
    clean, _ = soundfile.read(min(speech.rglob("*.wav")), dtype="float32")
    noisy = clean + np.std(clean) * np.random.default_rng(0).standard_normal(len(clean)).astype(
        np.float32
    )
    classical, ceiling = (
        si_sdr(log_mmse(noisy), clean),
        si_sdr(oracle(Mixture("a", 0.0, clean, noisy)), clean),
    )
    assert 3 < classical < ceiling - 3


def test_task(speech, capsys):
    arguments = [
        "--recipe",
        "quick",
        "--data",
        speech,
        "--run",
        "run",
        "--steps",
        2,
        "--set",
        "frames=20",
        "batch=4",
    ]
    assert call(train_script, "--model", "vae", *arguments) == 0
    task = ["run", "--task", "enhancement", "--iterations", 2]
    assert call(evaluate_script, *task, "--limit", 2, "--snr", 0, 10, "--json", "all.json") == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("0 dB", "10 dB", "log-MMSE", "oracle Wiener", "RTF"))
    (result,) = json.loads(Path("all.json").read_text())
    assert len(result["utterances"]) == 4 and result["settings"]["iterations"] == 2
    rows = {name: rows[0] for name, rows in result["baselines"].items()}
    assert (
        rows["noisy"]["si_sdr"] == pytest.approx(0, abs=0.5) and rows["noisy"]["si_sdr_gain"] == 0
    )
    assert rows["oracle Wiener"]["si_sdr"] > rows["log-MMSE"]["si_sdr"]
    assert len(list(results_of("run", "enhancement").glob("*.wav"))) == 9

    Path("pairs").mkdir()
    Path("empty").mkdir()
    clean, rate = soundfile.read(next(speech.rglob("*.wav")))
    soundfile.write("pairs/clean-a.wav", clean, rate)
    soundfile.write(
        "pairs/noisy-a.wav",
        clean + 0.05 * np.random.default_rng(0).standard_normal(len(clean)),
        rate,
    )
    assert (
        call(evaluate_script, *task, "--pairs", "pairs") == 0
        and "Recorded pairs" in capsys.readouterr().out
    )
    assert call(evaluate_script, *task, "--limit", 1, "--noise", "pairs") == 0
    assert (
        call(evaluate_script, *task, "--noise", "empty") == 2
        and "no sound of noise" in capsys.readouterr().err
    )
    assert (
        call(evaluate_script, *task, "--pairs", "empty") == 2 and "clean" in capsys.readouterr().err
    )
    assert (
        call(evaluate_script, *task, "--pairs", "pairs", "--snr", 3) == 2
        and "--snr" in capsys.readouterr().err
    )
    assert call(evaluate_script, *task, "--snr", "nan") == 2 and "finite" in capsys.readouterr().err
    assert (
        call(evaluate_script, "run", "--snr", 3) == 2 and "enhancement" in capsys.readouterr().err
    )


def test_mixtures_have_the_ratio_that_was_asked_for(speech):
    test = load_corpus(speech).split("test")
    for clips in (None, [np.ones(100, np.float32)]):
        for snr in (-5.0, 7.0):
            mixture = mix(test, 1, snr, clips, seed=0)
            noise = mixture.noisy - mixture.clean
            assert 10 * np.log10(np.mean(mixture.clean**2) / np.mean(noise**2)) == pytest.approx(
                snr, abs=0.01
            )
            assert np.array_equal(mixture.noisy, mix(test, 1, snr, clips, seed=0).noisy)
