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


def test_budget_of_time(speech, monkeypatch):
    """Each model gets the steps that fit, once and for all; GT is for models that have a past; a seed is a row."""

    def call_here(script, *flags):
        assert call(SCRIPTS[script], *flags) == 0

    monkeypatch.setattr(study, "call", call_here)
    monkeypatch.setattr(benchmark, "call", call_here)
    small = ["--set", "width=16", "feedforward=16"]
    monkeypatch.setattr(
        benchmark,
        "MODELS",
        {"VAE": ["--model", "vae"], "LigHT-DVAE": ["--model", "light_dvae", *small]},
    )
    monkeypatch.setattr(benchmark, "SEEDED", ("VAE",))
    flags = [
        "--data",
        speech,
        "--recipe",
        "quick",
        "--set",
        "frames=20",
        "batch=2",
        "--limit",
        1,
        "--seeds",
        2,
    ]

    def run(minutes: float) -> dict:
        monkeypatch.setattr(
            sys, "argv", ["benchmark.py", *map(str, flags), "--minutes", str(minutes)]
        )
        benchmark.main()
        results = json.loads(Path("runs/benchmark/results.json").read_text())
        return {
            mode: {title: row["summary"]["si_sdr"]["mean"] for title, row in rows.items()}
            for mode, rows in results.items()
        }

    results = run(0.02)
    assert list(results["GEN"]) == ["VAE", "LigHT-DVAE", "VAE-1"] and list(results["GT"]) == [
        "LigHT-DVAE"
    ]
    for mode, again in run(0.02).items():
        assert again == pytest.approx(results[mode])
    with pytest.raises(SettingError, match="--minutes 2: the runs in .* have 0.02"):
        run(2)
