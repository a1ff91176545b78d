"""A training in two processes: the same losses as in one, faults of either, going on in another number."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_scripts import ROOT, call, log, surroundings, train_script  # noqa: F401

KILLS = int(os.environ.get("MINIDVAE_KILLS", 2))
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
        ("vae", []),
        ("srnn", []),  # scheduled sampling: each process replaces its rows of the past
        (
            "light_dvae",
            ["own_past=0.5,1", "width=16", "feedforward=16"],
        ),  # the past of one row is that of another
        ("fhvae", ["sequences=4", "table_steps=5", "width=16"]),  # rows of the table are drawn anew
    ],
)
def test_two_processes_give_the_losses_of_one(speech, model, settings):
    """Half the batch each, with the noise of the whole: 50 steps to 1e-4. Fails where a process draws its own noise,
    gradients are not averaged, or both write the log."""
    arguments = [
        "--model",
        model,
        "--recipe",
        "quick",
        "--data",
        speech,
        "--steps",
        50,
        "--device",
        "cpu",
    ]
    settings = ["--set", *TINY, *settings]
    process = start(*arguments, "--run", "two", *settings)
    assert call(train_script, *arguments, "--run", "one", *settings) == 0
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.count("Finished") == 1
    assert len(log("one")) == len(log("two")) == 5
    for one, two in zip(log("one"), log("two"), strict=True):
        assert numbers(two) == pytest.approx(
            numbers(one), rel=1e-4, abs=1e-3
        )  # Muon makes more of rounding


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error


def kill_a_worker(process: subprocess.Popen, file: Path, random: np.random.Generator) -> None:
    """Kills one of the two, within half a second after the next report in `file`."""
    before = file.read_bytes().count(b"\n") if file.exists() else 0
    while process.poll() is None and not (
        file.exists() and file.read_bytes().count(b"\n") > before
    ):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[random.integers(2)]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "train.py: error: another process of this training has ended" in error, error


def test_a_training_killed_at_random_moments_ends_as_one_that_nothing_happened_to(speech):
    """To the last bit. Fails where a killed process leaves the other waiting, a checkpoint is torn, or what is resumed
    differs from what was left."""
    common = [
        "--model",
        "vae",
        "--recipe",
        "quick",
        "--data",
        speech,
        "--steps",
        200 * KILLS,
        "--device",
        "cpu",
    ]
    settings = ["--set", *TINY]
    finish(start(*common, "--run", "whole", *settings))
    arguments, random = [*common, "--run", "cut", *settings], np.random.default_rng(0)
    for _ in range(KILLS):
        kill_a_worker(start(*arguments), Path("cut/log.jsonl"), random)
        assert len(log("cut")) < 20 * KILLS, "the run ended before it could be interrupted"
        arguments = ["--resume", "--run", "cut", "--device", "cpu"]
    finish(start(*arguments))
    assert [numbers(report) for report in log("cut")] == [
        numbers(report) for report in log("whole")
    ]


def test_one_process_goes_on_where_two_were(speech):
    common = [
        "--model",
        "vae",
        "--recipe",
        "quick",
        "--data",
        speech,
        "--steps",
        200,
        "--device",
        "cpu",
    ]
    assert call(train_script, *common, "--run", "whole", "--set", *TINY) == 0
    process = start(*common, "--run", "cut", "--set", *TINY)
    kill_a_worker(process, Path("cut/log.jsonl"), np.random.default_rng(0))
    assert call(train_script, "--resume", "--run", "cut", "--device", "cpu") == 0
    for whole, cut in zip(log("whole"), log("cut"), strict=True):
        assert numbers(cut) == pytest.approx(numbers(whole), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "setting", "message"),
    [
        ("vae", "batch=5", "batch=5: expected a multiple of"),
        ("acoustic", "batch=4", "is trained in one process"),
    ],
)
def test_what_cannot_be_shared_is_one_line(speech, model, setting, message):
    process = start("--model", model, "--recipe", "quick", "--data", speech, "--set", setting)
    _, error = process.communicate()
    assert process.returncode != 0
    assert f"train.py: error: {message}" in error or message in error
    assert not list(Path("runs").glob("*"))
