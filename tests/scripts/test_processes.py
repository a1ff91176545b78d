"""A training in two processes: what each of them learns from, faults of either, continuing in another number."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from run_scripts import ROOT, call, log, surroundings, train_script  # noqa: F401

from minidvae.data.corpus import load_corpus
from minidvae.training import distributed
from minidvae.training.batches import Spectra
from minidvae.training.run import resolve
from minidvae.training.segment_batches import FeatureSegments

KILLS = int(os.environ.get("MINIDVAE_KILLS", 1))
TINY = ["frames=20", "batch=4", "report=10"]


def start(*arguments) -> subprocess.Popen:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*torchrun, ROOT / "train.py", *map(str, arguments)], env=environment, text=True, **pipes
    )


def numbers(report: dict) -> dict:
    return {
        f"{split} {name}": value
        for split in ("train", "dev")
        for name, value in report[split].items()
    }


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("srnn", []),  # with scheduled sampling
        ("fhvae", ["sequences=4", "table_steps=5", "width=16"]),  # rows of the table are drawn anew
    ],
)
def test_two_processes_learn_as_one_does(speech, model, settings):
    """Half the batch each, drawn by seeds of their own. Fails where the processes write over one another, gradients are
    summed instead of averaged, or statistics differ between them: the development loss is then another one."""
    arguments = ["--model", model, "--recipe", "quick", "--data", speech, "--steps", 50]
    arguments += ["--device", "cpu"]
    settings = ["--set", *TINY, *settings]
    process = start(*arguments, "--run", "two", *settings)
    assert call(train_script, *arguments, "--run", "one", *settings) == 0
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.count("Finished") == 1
    assert len(log("one")) == len(log("two")) == 5
    for one, two in zip(log("one"), log("two"), strict=True):
        assert two["dev"]["loss"] == pytest.approx(one["dev"]["loss"], rel=0.1)
        assert two["train"]["loss"] != one["train"]["loss"]


@pytest.mark.parametrize("kind", [Spectra, FeatureSegments])
def test_processes_draw_batches_of_their_own(speech, kind, monkeypatch):
    """Together as large as the recipe says."""
    name = "vae" if kind is Spectra else "fhvae"
    recipe, _ = resolve(name, "quick", {"frames": "20", "batch": "6"})
    corpus = load_corpus(speech, progress=False, note=lambda _: None).split("train")
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    batches = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batch = kind(corpus, recipe, 0, torch.device("cpu"))(3)
        batches.append(getattr(batch, "x", batch))
    assert [len(batch) for batch in batches] == [3, 3] and not torch.equal(*batches)


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error


def kill_a_worker(process: subprocess.Popen, file: Path, random: np.random.Generator) -> None:
    """Kill one of the two processes, within half a second after the next report in `file`."""

    def number_of_reports() -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    before = number_of_reports()
    while process.poll() is None and number_of_reports() == before:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[random.integers(2)]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "train.py: error: another process of this training has ended" in error, error


def test_a_killed_training_continues_as_if_it_had_not_been_killed(speech):
    """Fails where a killed process leaves the other waiting, a checkpoint is torn, or a resumed
    training differs from one that was not killed. One process can continue where two were."""
    steps = 200 * KILLS
    common = ["--model", "vae", "--recipe", "quick", "--data", speech, "--steps", steps]
    common += ["--device", "cpu"]
    settings = ["--set", *TINY]
    finish(start(*common, "--run", "whole", *settings))
    arguments = [*common, "--run", "cut", *settings]
    random = np.random.default_rng(0)
    for _ in range(KILLS):
        kill_a_worker(start(*arguments), Path("cut/log.jsonl"), random)
        assert len(log("cut")) < steps / 10, "the run ended before it could be interrupted"
        arguments = ["--resume", "--run", "cut", "--device", "cpu"]
    shutil.copytree("cut", "alone")
    finish(start(*arguments))
    for cut, whole in zip(log("cut"), log("whole"), strict=True):
        assert numbers(cut) == pytest.approx(numbers(whole), rel=1e-4)

    assert call(train_script, "--resume", "--run", "alone", "--device", "cpu") == 0
    losses = [report["dev"]["loss"] for report in log("alone")]
    assert len(losses) == steps / 10 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("model", "setting", "message"),
    [
        ("vae", "batch=5", "batch=5: expected a multiple of"),
        ("acoustic", "batch=4", "is trained in one process"),
    ],
)
def test_what_cannot_be_shared_is_one_line(speech, model, setting, message, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    arguments = ["--model", model, "--recipe", "quick", "--data", speech, "--set", setting]
    assert call(train_script, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("runs").glob("*"))
