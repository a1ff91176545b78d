"""The day with a GPU: what it does with time that is short, and what its page says. `.ci/run` has the whole, dry."""

import sys

import pytest
import torch
from cli import ROOT, call, surroundings  # noqa: F401


@pytest.fixture
def gpu_day(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu_day

    return gpu_day


def test_a_part_that_is_cut_off_goes_on_and_one_at_its_limit_does_not(gpu_day, tmp_path):
    """Fails where time of earlier calls is forgotten, or a part that hangs or fails is run in every call."""
    about = {"device": "none"}
    day = gpu_day.Day(tmp_path, about)
    hangs = gpu_day.Part("hangs", ["-c", "import time; time.sleep(60)"], 1.5 / 60)
    fails = gpu_day.Part("fails", ["-c", "print('so far'); raise SystemExit('broken')"], 1)
    works = gpu_day.Part("works", ["-c", "print('well')"], 1)
    day.work(hangs, 1.0)
    day = gpu_day.Day(tmp_path, about)
    assert day.of(hangs)["state"] == gpu_day.CUT and day.open(hangs) and 0.9 < day.of(hangs)["seconds"] < 1.4
    day.work(hangs, 60)
    for part in (fails, works):
        day.work(part, 60)
    states = [day.of(part)["state"] for part in (hangs, fails, works)]
    assert states == [gpu_day.STOPPED, gpu_day.FAILED, gpu_day.DONE]
    assert [day.of(part)["note"] for part in (fails, works)] == ["broken", "well"]
    assert not any(map(gpu_day.Day(tmp_path, about).open, (hangs, fails, works)))


def test_a_training_that_is_cut_off_is_resumed(gpu_day, tmp_path, monkeypatch):
    day, run = gpu_day.Day(tmp_path, {}), tmp_path / "vae"
    begun = []
    monkeypatch.setattr(gpu_day.subprocess, "Popen", lambda command, **_: begun.append(command) or FINISHED)
    monkeypatch.setattr(gpu_day, "end", lambda process: None)
    part = gpu_day.Part("train vae", ["train.py", "--run", run, "--model", "vae"], 1)
    day.work(part, 1)
    run.mkdir()
    (run / "last.pt").touch()
    day.work(part, 1)
    assert begun == [
        [sys.executable, "train.py", "--run", str(run), "--model", "vae"],
        [sys.executable, "train.py", "--run", str(run), "--resume"],
    ]


class FINISHED:
    @staticmethod
    def wait(seconds) -> int:
        return 0


def test_budgets_by_hand(gpu_day):
    """Ratios of rows that are written here: 21 and 4 times for VRNN, cuDNN faster at hidden 256."""
    step = {"batch": "32", "reference ms": "42.0", "shipped ms": "2.0", "reference graphed ms": "8.0"}
    steps = [step | {"model": name} for name in ("vrnn", "srnn", "dkf", "rvae")]
    cell = {"operation": "lstm_scan", "precision": "fp32", "pass": "forward + backward", "% of copy": "90"}
    kernels = [
        cell | {"shape": f"32 x 150, hidden {hidden}", "path": path, "ms": ms}
        for hidden, path, ms in [(128, "shipped", "1.0"), (128, "nn.LSTM", "1.5"), (256, "shipped", "3.0")]
    ]
    kernels += [cell | {"shape": "32 x 150, hidden 256", "path": "nn.LSTM", "ms": "1.5 eager"}]
    loss = cell | {"operation": "is_divergence", "path": "shipped", "ms": "1.0"}
    kernels += [loss | {"shape": "32 x 150 x 257", "% of copy": "50"}, loss | {"shape": "256 x 150 x 513"}]
    found = gpu_day.budgets(kernels, steps, {"light_dvae": (5_000, 25_000, 150.0)})
    met = {promise: (measured, verdict) for promise, measured, verdict in found}
    assert [verdict for _, verdict in met.values()] == ["met", "met", "met", "**not met**", "met"] + 3 * [
        "not measured"
    ] + ["**not met**", "not measured"]
    measured = [measured for measured, _ in met.values()]
    assert measured[0].startswith("vrnn 21.00, srnn 21.00") and measured[1].startswith("vrnn 4.00")
    assert measured[3] == "32 x 150, hidden 256 fp32 0.50" and measured[4] == "256 x 150 x 513 90.00"
    assert measured[-2] == "light_dvae 12.50"


def test_without_a_gpu_the_page_says_that_nothing_is_measured(gpu_day, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(gpu_day, "--folder", "day", "--page", "gpu.md") == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text == (tmp_path / "day" / "gpu.md").read_text()
    assert "no GPU was at hand" in text and "met |" not in text.replace("not met |", "")
    assert text.count("not measured") > 20
    assert call(gpu_day, "--folder", "day", "--data", "elsewhere") == 2
    assert "data built-in, now elsewhere" in capsys.readouterr().err
