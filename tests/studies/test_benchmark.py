"""All DVAEs at one budget (studies/benchmark.py)."""

import json
import sys
from pathlib import Path

import benchmark
import pytest
import study
from run_scripts import call, evaluate_script, surroundings, train_script  # noqa: F401

from minidvae.training.config import SettingError

SCRIPTS = {"train.py": train_script, "evaluate.py": evaluate_script}


def run_benchmark(monkeypatch, speech, minutes: float) -> dict[str, dict[str, float]]:
    """Run the study on small models. Return mode → title → SI-SDR."""
    flags = ["--data", str(speech), "--recipe", "quick", "--set", "frames=20", "batch=2"]
    flags += ["--limit", "1", "--seeds", "2", "--minutes", str(minutes)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    benchmark.main()
    results = json.loads(Path("runs/benchmark/results.json").read_text())
    ratios = {}
    for mode, rows in results.items():
        ratios[mode] = {title: row["summary"]["si_sdr"]["mean"] for title, row in rows.items()}
    return ratios


def test_budget_of_time(speech, monkeypatch):
    """Fails if a study that continues counts anew the steps that fit into the time, a model without
    a past has a row in mode GT, or a seed has no row."""

    def call_in_this_process(script, *flags):
        assert call(SCRIPTS[script], *flags) == 0

    monkeypatch.setattr(study, "call", call_in_this_process)
    monkeypatch.setattr(benchmark, "call", call_in_this_process)
    small_transformer = ["--model", "light_dvae", "--set", "width=16", "feedforward=16"]
    models = {"VAE": ["--model", "vae"], "LigHT-DVAE": small_transformer}
    monkeypatch.setattr(benchmark, "MODELS", models)
    monkeypatch.setattr(benchmark, "SEEDED", ("VAE",))

    results = run_benchmark(monkeypatch, speech, 0.02)
    assert list(results["GEN"]) == ["VAE", "LigHT-DVAE", "VAE-1"]
    assert list(results["GT"]) == ["LigHT-DVAE"]
    for mode, ratios in run_benchmark(monkeypatch, speech, 0.02).items():
        assert ratios == pytest.approx(results[mode])
    with pytest.raises(SettingError, match="--minutes 2: the runs in .* have 0.02"):
        run_benchmark(monkeypatch, speech, 2)
