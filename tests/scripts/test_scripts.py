"""train.py and evaluate.py as a user calls them: what they leave behind, resuming, and bad input."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from run_scripts import ROOT, call, evaluate_script, log, results_of, surroundings, train_script  # noqa: F401

from minidvae import cli
from minidvae.data.audio import STFT
from minidvae.data.corpus import load_corpus
from minidvae.data.crops import consecutive_crops
from minidvae.files import CheckpointError
from minidvae.models import build_model
from minidvae.models.vae import VAE
from minidvae.training import checkpoint
from minidvae.training.batches import Spectra

TINY = [
    "width=16",
    "feedforward=32",
    "layers=1",
    "w_embedding=8",
    "w_hidden=8",
    "frames=20",
    "batch=4",
    "report=4",
]


def train(speech, *arguments, run="run", model="light_dvae") -> int:
    return call(
        train_script,
        "--model",
        model,
        "--recipe",
        "quick",
        "--data",
        speech,
        "--run",
        run,
        *arguments,
    )


@pytest.mark.parametrize("model", ["vae", "light_dvae"])
def test_train_then_evaluate(speech, model, capsys):
    settings = TINY if model == "light_dvae" else ["frames=20", "batch=4", "report=4"]
    assert train(speech, "--steps", 8, "--set", *settings, model=model, run=f"runs/{model}") == 0
    run = Path("runs") / model
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "log.jsonl",
        "curves.png",
        "last.pt",
        "best.pt",
    }
    assert [report["step"] for report in log(run)] == [4, 8]
    for mode in ("generation", "teacher_forcing"):
        assert call(evaluate_script, "--mode", mode, "--limit", 3, "--json", "all.json") == 0
        assert model in capsys.readouterr().out
    folders = {
        path.name.partition("-test-")[2]: path for path in (run / "eval" / "resynthesis").iterdir()
    }
    assert set(folders) == {"limit=3", "limit=3-mode=teacher_forcing"}
    folder = folders["limit=3-mode=teacher_forcing"]
    result = json.loads((folder / "results.json").read_text())
    assert json.loads(Path("all.json").read_text()) == [result]
    assert len(result["utterances"]) == 3
    for measure, summary in result["summary"].items():
        values = [row[measure] for row in result["utterances"] if row[measure] is not None]
        assert summary["mean"] == pytest.approx(sum(values) / len(values))
    test = load_corpus(speech).split("test")
    by_name = {
        utterance.name: test.waveform(index) for index, utterance in enumerate(test.utterances)
    }
    for row in result["utterances"]:
        assert {f"{row['name']}.png", f"{row['name']}-resynthesis.wav"} <= {
            path.name for path in folder.iterdir()
        }
        assert row["seconds"] == len(by_name[row["name"]]) / 16_000  # whole utterances, trimmed


def test_what_evaluate_is_told_changes_the_result(speech):
    """The mode, the seed and the limit must reach the numbers; a run by itself must repeat them."""
    assert train(speech, "--steps", 8, "--set", *TINY) == 0
    means = []
    for arguments in ((), (), ("--mode", "teacher_forcing"), ("--seed", 1), ("--limit", 1)):
        assert call(evaluate_script, "run", "--json", "all.json", *arguments) == 0
        means.append(json.loads(Path("all.json").read_text())[0]["summary"]["si_sdr"]["mean"])
    assert means[0] == means[1] and len(set(means)) == 4


def test_published_rows_stand_only_beside_their_like(speech, monkeypatch, capsys):
    """The paper's numbers on WSJ0 beside ours on other speech, another split or a part of it would mislead."""
    assert train(speech, "--steps", 1, "--set", "frames=20", "batch=4", model="vae") == 0
    monkeypatch.setattr(
        evaluate_script,
        "load_corpus",
        lambda data: dataclasses.replace(load_corpus(data), layout="WSJ0"),
    )
    for arguments, shown in (((), True), (("--limit", 1), False), (("--split", "dev"), False)):
        capsys.readouterr()
        assert call(evaluate_script, "run", *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[2:4] for line in lines if "(paper)" in line] == (
            [["0.0400", "7.40"]] if shown else []
        )


def test_several_runs_give_one_table(speech, capsys):
    for run in ("one", "two"):
        assert (
            train(speech, "--steps", 1, "--set", "frames=20", "batch=4", model="vae", run=run) == 0
        )
    capsys.readouterr()
    assert call(evaluate_script, "one", "two", "--limit", 1) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["RMSE", "one", "two"]


def test_training_learns(speech):
    """A few steps must beat by a fifth the best constant spectrum, which is what the model starts as."""
    settings = ["frames=20", "batch=8", "report=60", "warmup=5", "optimiser=adamw"]
    assert train(speech, "--steps", 60, "--set", *settings, model="vae") == 0
    corpus, stft = load_corpus(speech), STFT()
    x, dev = (
        torch.cat(list(consecutive_crops(corpus.split(split), stft.samples(20), 100)))
        for split in ("train", "dev")
    )
    constant, x = stft.power(x).mean((0, 1)), stft.power(dev)
    divergence = (x / constant - (x / constant).clamp_min(1e-12).log() - 1).sum(-1).mean().item()
    assert log("run")[-1]["dev"]["loss"] < 0.8 * divergence


def test_interrupted_run_resumes_bit_for_bit(speech):
    """Killed in the middle of a report and resumed, a run must log what an uninterrupted one logs: with both states of
    the optimiser and augmented crops."""
    settings = ["--steps", "24", "--set", *TINY[1:], "width=64", "optimiser=muon"]
    settings += ["speed=0.85,1.2", "gain=-6,0"]
    assert train(speech, *settings, run="whole") == 0
    command = [
        sys.executable,
        ROOT / "train.py",
        "--model",
        "light_dvae",
        "--recipe",
        "quick",
        "--run",
        "cut",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(
        [*map(str, command), "--data", str(speech), *settings], env=environment
    )
    while process.poll() is None and not (Path("cut/log.jsonl").exists() and len(log("cut")) >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert len(log("cut")) < 6, "the run ended before it could be interrupted"
    assert call(train_script, "--resume", "--run", "cut") == 0
    assert log("cut") == log("whole")
    whole, cut = (
        torch.load(f"{run}/last.pt", weights_only=True)["parameters"] for run in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("model", ["vae", "fhvae"])
def test_batches_prepared_ahead_are_the_same(model, speech, monkeypatch):
    """As on a GPU, where a thread prepares them while a step runs."""
    settings = [
        "frames=20",
        "report=4",
        "batch=4",
        *(["width=8", "shift=5"] if model == "fhvae" else []),
    ]
    for run, devices in (("one", ()), ("two", ("cpu",))):
        monkeypatch.setattr(train_script, "DEVICES_WITH_LOADER_THREAD", devices)
        assert train(speech, "--steps", 8, "--set", *settings, model=model, run=run) == 0
    assert log("one") == log("two")


def test_resuming_after_a_kill_between_reports(speech):
    """kill -9 loses what came after the last report; the log must not hold any of it twice."""
    assert train(speech, "--steps", 8, "--set", *TINY, "schedule=constant") == 0
    kept = Path("run/last.pt").read_bytes()
    assert call(train_script, "--resume", "--run", "run", "--steps", 12) == 0
    whole = log("run")
    assert [report["step"] for report in whole] == [4, 8, 12]
    Path("run/last.pt").write_bytes(
        kept
    )  # killed after the log was written and before the checkpoint was
    assert call(train_script, "--resume", "--run", "run", "--steps", 12) == 0
    assert log("run") == whole


def started(*arguments) -> subprocess.Popen:
    """train.py in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, ROOT / "train.py", *arguments]
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)


def wait_for(condition) -> None:
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_a_training_that_never_came_to_a_checkpoint_starts_anew(speech, monkeypatch, capsys):
    """Its folder neither trains anew nor resumes, or what it left is mixed with what comes after."""
    arguments, save = ["--steps", 4, "--set", "frames=20", "batch=4", "report=2"], checkpoint.save

    def full_disk(path, *rest, **state):
        if path.name == "last.pt":  # the largest of the files, after the first line of the log
            raise CheckpointError(f"{path}: could not be written")
        save(path, *rest, **state)

    with monkeypatch.context() as patched:
        patched.setattr(
            Spectra, "before_step", lambda self, model, *_: model.output.bias.data.fill_(torch.nan)
        )
        assert train(speech, *arguments, model="vae") == 2
    assert {path.name for path in Path("run").iterdir()} == {"config.json", "log.jsonl"}
    assert train(speech, *arguments, model="vae") == 0
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full_disk)
        assert train(speech, *arguments, model="vae", run="full") == 2
    assert len(log("full")) == 1 and Path("full/best.pt").exists()
    assert train(speech, *arguments, model="vae", run="full") == 0
    assert log("full") == log("run")
    Path("full/last.pt").unlink()  # by the user, to save room
    capsys.readouterr()
    assert train(speech, *arguments, model="vae", run="full") == 2
    assert "already holds a run" in capsys.readouterr().err and Path("full/best.pt").exists()


def test_two_trainings_on_one_folder(speech, capsys):
    """Both go on and mix their files; or a lock outlives a training that was killed."""
    arguments = ["--model", "vae", "--recipe", "quick", "--data", speech, "--run", "run"]
    arguments += ["--set", "frames=20", "batch=4"]
    for again, report, sign in (
        (arguments, 100_000, "config.json"),
        (["--resume", "--run", "run"], 1, "last.pt"),
    ):
        first = started(*arguments, f"report={report}", "steps=100000")
        try:
            wait_for(Path("run", sign).exists)
            assert call(train_script, *again) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert (
                error
                == "train.py: error: run: another training writes to it now; choose another --run"
            )
        finally:
            first.kill()
            first.wait()
    step = torch.load("run/last.pt")["progress"]["step"]
    assert call(train_script, *again, "--steps", step + 2) == 0
    assert [report["step"] for report in log("run")] == list(range(1, step + 3))


def test_the_log_is_appended(speech, monkeypatch):
    """The whole log is written anew at every report, or a picture is drawn at every one: hours of a long run."""
    states, pictures = [], []
    save = checkpoint.save

    def note(path, *rest, **state):
        if path.name == "last.pt":
            states.append((os.stat("run/log.jsonl").st_ino, len(log("run"))))
        save(path, *rest, **state)

    monkeypatch.setattr(checkpoint, "save", note)
    monkeypatch.setattr(
        train_script.figures, "curves", lambda reports, path: pictures.append(len(reports))
    )
    arguments = ["--steps", 6, "--set", "frames=10", "batch=2", "report=1", "hidden=8"]
    assert train(speech, *arguments, model="vae") == 0
    assert states == [(states[0][0], count) for count in range(1, 7)] and pictures == [6]
    whole = Path("run/log.jsonl").read_bytes()
    Path("run/log.jsonl").write_bytes(
        whole + b'{"step": 6, "train": {"lo'
    )  # the machine stopped while it was written
    assert call(train_script, "--resume", "--run", "run", "--steps", 7) == 0
    assert Path("run/log.jsonl").read_bytes().startswith(whole) and len(log("run")) == 7


@pytest.mark.parametrize(
    "line", ["{}", "[]", "no json", '{"step": "x"}', '{"step": 2, "train": {"l": ""}, "dev": {}}']
)
def test_a_line_of_the_log_that_is_no_report(line, speech, capsys):
    """A line that a user appended ends in a traceback."""
    arguments = ["--steps", 2, "--set", "frames=10", "batch=2", "report=1", "hidden=8"]
    assert train(speech, *arguments, model="vae") == 0
    with open("run/log.jsonl", "a") as file:
        file.write(f"{line}\n")
    content = Path("run/log.jsonl").read_bytes()
    capsys.readouterr()
    assert call(train_script, "--resume", "--run", "run", "--steps", 4) == 2
    error = capsys.readouterr().err
    assert "run/log.jsonl: line 3 is no report" in error and error.strip().count("\n") == 0
    assert Path("run/log.jsonl").read_bytes() == content


def test_short_utterances_are_not_left_out_unsaid(speech, capsys):
    """Where most utterances are shorter than one sequence, training on the rest is no default: --set says so."""
    Path("digits/train/anna").mkdir(parents=True)
    Path("digits/dev/anna").mkdir(parents=True)
    waveform, rate = soundfile.read(min(speech.rglob("*.wav")))
    for split, seconds in (
        ("train", 0.5),
        ("train", 0.45),
        ("train", 0.4),
        ("train", 1.5),
        ("dev", 1.5),
    ):
        soundfile.write(f"digits/{split}/anna/{seconds}.wav", waveform[: int(seconds * rate)], rate)
    arguments = ["--steps", 1, "--set", "trim=false", "batch=2"]
    assert train("digits", *arguments) == 2
    error = capsys.readouterr().err
    assert (
        "3 of 4 utterances are shorter" in error
        and "frames=50" in error
        and "\n" not in error.strip()
    )
    fitting = re.search(r"--set (frames=\d+)", error)[1]
    assert not Path("run").exists()
    assert fitting == f"frames={1 + (6_400 - 1_024) // 256}"
    assert train("digits", *arguments, fitting) == 0 and "not used" not in capsys.readouterr().out
    assert train("digits", *arguments, "frames=50", run="asked") == 0
    assert "3 utterances are shorter" in capsys.readouterr().out


def test_automatic_precision_is_resolved_once(speech, monkeypatch):
    """A run that began in bfloat16 goes on in it, whatever the chip that it goes on on has instructions for."""
    for there, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(cli, "has_bf16", lambda _, there=there: there)
        arguments = ["--steps", 1, "--precision", "auto", "--set", "frames=20", "batch=2"]
        assert train(speech, *arguments, run=expected, model="vae") == 0
        assert json.loads(Path(expected, "config.json").read_text())["precision"] == expected
    assert call(train_script, "--resume", "--run", "bf16", "--steps", 2) == 0
    assert torch.load("bf16/last.pt")["plan"]["precision"] == "bf16"


def test_early_stopping(speech):
    assert (
        train(
            speech,
            "--steps",
            40,
            "--set",
            *TINY[:-1],
            "report=2",
            "patience=2",
            "learning_rate=1e-9",
        )
        == 0
    )
    reports = [report["dev"]["loss"] for report in log("run")]
    best = min(range(len(reports)), key=reports.__getitem__)
    assert len(reports) == best + 3 < 20
    assert torch.load("run/best.pt", weights_only=True)["progress"]["step"] == 2 * (best + 1)


def test_every_setting_of_the_loop_changes_the_training(speech, monkeypatch):
    """A flag or setting of the loop that does nothing shows as two equal logs; bf16 must stay near fp32."""
    monkeypatch.setattr(train_script.figures, "curves", lambda *_: None)  # It takes a second.
    base = ["--steps", 4, "--set", *TINY]
    changes = [
        [],
        ["optimiser=adam"],
        ["clip=1"],
        ["weight_decay=0.5"],
        ["scheduled_sampling=0,0"],
        ["warmup=0"],
        ["beta_z=1"],
    ]
    changes += [["schedule=constant", "warmup=2"], ["warmup=2"], ["heads=2"], ["trim=false"]]
    runs = {f"run{number}": [*base, *change] for number, change in enumerate(changes)}
    runs |= {"bf16": ["--precision", "bf16", *base], "seed": ["--seed", 1, *base]}
    results = {}
    for run, arguments in runs.items():
        assert train(speech, *arguments, run=run) == 0
        parameters = torch.load(f"{run}/last.pt", weights_only=True)["parameters"].values()
        results[tuple(parameter.double().sum().item() for parameter in parameters)] = arguments
    assert len(results) == len(runs), results.values()
    assert log("bf16")[-1]["dev"]["loss"] == pytest.approx(log("run0")[-1]["dev"]["loss"], rel=0.01)


def test_non_finite_loss_stops_and_is_named(speech, capsys):
    """The step and the term are named, the last good checkpoint stays whole, and no NaN is trained on."""
    assert train(speech, "--steps", 4, "--set", "frames=20", "report=2", model="vae") == 0
    parameters = torch.load("run/last.pt", weights_only=True)["parameters"]
    content = torch.load("run/last.pt", weights_only=True)
    content["plan"]["recipe"] |= {
        "learning_rate": 1e30,
        "schedule": "constant",
        "warmup": 0,
        "clip": 0.0,
    }
    torch.save(content, "run/last.pt")
    capsys.readouterr()
    assert call(train_script, "--resume", "--run", "run", "--steps", 40) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "step " in error
        and "run/last.pt" in error
        and ("reconstruction" in error or "kl_z" in error)
    )
    kept = torch.load("run/last.pt", weights_only=True)["parameters"]
    assert (
        all(value.isfinite().all() for value in kept.values()) and kept.keys() == parameters.keys()
    )


def test_gradient_that_is_not_finite_is_not_taken(speech, monkeypatch, capsys):
    """A finite loss with such a gradient must not reach the parameters, nor a checkpoint."""
    forward = VAE.loss

    def loss(self, batch, noise=None, scheduled_sampling_prob=0.0):
        value, terms = forward(self, batch, noise)
        return value + (self.output.bias - self.output.bias.detach()).sqrt().sum(), terms

    monkeypatch.setattr(VAE, "loss", loss)
    assert train(speech, "--steps", 4, "--set", "frames=20", "report=1", model="vae") == 2
    assert "step 0: gradient norm" in capsys.readouterr().err and not Path("run/last.pt").exists()


def test_digital_silence_in_training(tmp_path, speech):
    """Zeros have no lower bound of the divergence unless floored: training must end near where noise would take it."""
    for path in speech.rglob("*.wav"):
        waveform, rate = soundfile.read(path, dtype="int16")
        waveform[len(waveform) // 3 : len(waveform) // 2] = 0
        quiet = tmp_path / "quiet" / path.relative_to(speech)
        quiet.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(quiet, waveform, rate)
    settings = [
        "frames=20",
        "batch=8",
        "report=100",
        "warmup=20",
        "learning_rate=5e-3",
        "optimiser=adamw",
    ]
    assert train(tmp_path / "quiet", "--steps", 300, "--set", *settings, model="vae") == 0
    losses = [report["train"]["loss"] for report in log("run")]
    assert losses[-1] < losses[0] and losses[-1] < 1000


def test_resume_needs_the_same_speech(tmp_path, speech, capsys):
    shutil.copytree(speech, tmp_path / "copy")
    assert (
        train(tmp_path / "copy", "--steps", 4, "--set", "frames=20", "report=2", model="vae") == 0
    )
    next((tmp_path / "copy" / "train").rglob("*.wav")).unlink()
    assert call(train_script, "--resume", "--run", "run", "--steps", 6) == 2
    assert "copy" in capsys.readouterr().err


def test_resume_refuses_what_it_cannot_go_on_with(speech, capsys):
    assert train(speech, "--steps", 4, "--set", "frames=20", "report=2", model="vae") == 0
    assert call(train_script, "--resume", "--run", "run", "--steps", 2) == 2
    assert "4 steps already" in capsys.readouterr().err
    Path("run/last.pt").write_bytes(Path("run/best.pt").read_bytes())
    assert call(train_script, "--resume", "--run", "run", "--steps", 6) == 2
    assert "optimiser" in capsys.readouterr().err


TAMPERED = {  # part of a checkpoint: what is written over it
    "plan": ["text", {}, {"more": 1}],
    "plan.recipe": ["text", {}, {"frames": "x"}, {"hop": 128}, {"batch": 0}, {"window": 512}],
    "progress": ["text", {"more": 1}],
    "optimiser": ["text", {"state": 7}],
    "stft": ["text", {"hop": 128}, {"hop": "x"}, {"window": "round"}, {"window_length": 512}],
    "config": [
        "text",
        {"beta_z": -1.0},
        {"hidden": 8},
        {"input_scale": "mel"},
    ],
}


def test_a_tampered_run_is_one_line(speech, capsys):
    """A part of a checkpoint that is not what training wrote ends in a traceback, or training goes on with it."""
    arguments = [
        "--steps",
        2,
        "--set",
        "frames=10",
        "batch=2",
        "report=1",
        "hidden=64",
        "optimiser=adamw",
    ]
    assert train(speech, *arguments, model="vae") == 0
    for part, changes in TAMPERED.items():
        for change in changes:
            content = torch.load("run/last.pt")
            *outer, name = part.split(".")
            inside = content[outer[0]] if outer else content
            whole = inside[name]
            inside[name] = (
                whole | change
                if change and isinstance(change, dict) and isinstance(whole, dict)
                else change
            )
            Path("changed").mkdir(exist_ok=True)
            torch.save(content, "changed/last.pt")
            capsys.readouterr()
            assert call(train_script, "--resume", "--run", "changed", "--steps", 3) == 2, (
                part,
                change,
            )
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith("train.py: error: changed"), (part, change, error)


BAD = {  # arguments of train.py: what the one line must say
    ("--model", "light_dave"): "light_dvae",
    ("--model", "vae", "--recipe", "quik"): "quick",
    ("--model", "hit_dvae", "--recipe", "benchmark2021"): "light2023",
    ("--model", "vae", "--set", "latents=3"): "latent",
    ("--model", "vae", "--set", f"latent={10**20}"): "at most",
    ("--model", "vae", "--set", f"learning_rate={10**400}"): "greater than 0",
    ("--mod", "vae"): "unrecognized",
    ("--model", "vae", "--device", "meta"): "not on this machine",
    ("--model", "vae", "--data", "~nouser/speech"): "no such file or folder",
    ("--model", "vae", "--set", "latent=three"): "an integer",
    ("--model", "vae", "--set", "learning_rate=fast"): "a number",
    ("--model", "vae", "--set", "hidden=a,b"): "64,32",
    ("--model", "vae", "--set", "trim=maybe"): "true or false",
    ("--model", "vae", "--set", "latent"): "key=value",
    ("--model", "vae", "--set", "input_scale=mel"): "root",
    ("--model", "light_dvae", "--set", "variant=inv"): "inv_s",
    ("--model", "light_dvae", "--set", "heads=3"): "divisible",
    ("--model", "vae", "--set", "optimiser=sgd"): "adamw",
    ("--model", "vae", "--set", "batch=0"): "greater than 0",
    ("--model", "vae", "--set", "window=1023"): "even",
    ("--model", "vae", "--set", "own_past=2,3"): "[0, 1]",
    ("--model", "vae", "--set", "speed=1.2,0.8"): "lowest",
    ("--model", "vae", "--set", "gain=nan,0"): "lowest",
    ("--model", "light_dvae", "--set", "z_log_variance=inf"): "finite",
    ("--model", "vae", "--set", "epochs=2", "steps=3"): "epochs",
    ("--model", "vae", "--set", "batch=2", "--set", "batch=3"): "twice",
    ("--model", "vae", "--set", "hidden=8,,4"): "64,32",
    ("--model", "vae", "--set", "beta_z=nan"): "beta_z",
    ("--model", "vae", "--set", "latent=0"): "latent",
    ("--model", "light_dvae_local", "--set", "context=-1"): "context",
    ("--model", "vae", "--seed", "-1"): "--seed -1",
    ("--model", "vae", "--steps", "0"): "at least 1",
    ("--model", "vae", "--steps", "many"): "many",
    ("--model", "vae", "--precision", "fp8"): "bf16",
    ("--model", "vae", "--device", "tpu0"): "cpu",
    ("--model", "vae", "--data", "nowhere"): "nowhere",
    ("--modle", "vae"): "--modle",
    (): "light_dvae",
    ("--resume",): "runs/",
    ("--resume", "--run", "nowhere"): "nowhere/last.pt",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line(arguments, capsys):
    assert call(train_script, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert BAD[arguments] in error and error.startswith("train.py: error: ") and "\n" not in error
    assert list(Path().iterdir()) == []


def test_names_that_standard_output_cannot_encode(monkeypatch):
    """A speaker whose folder is not named in UTF-8 ends a script that prints the name in a traceback."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "utf-8"))
    cli.run(lambda: print(os.fsdecode(b"anna\xff"), flush=True))
    assert output.getvalue() == b"anna\\udcff\n"


def test_evaluate_refuses_what_is_not_a_run(speech, tmp_path, capsys):
    Path("empty").mkdir()
    Path("text").mkdir()
    Path("text/best.pt").write_text("not a checkpoint")
    Path("other").mkdir()
    torch.save({"weights": torch.zeros(3)}, "other/best.pt")
    Path("cut").mkdir()
    checkpoint.save("cut/best.pt", "vae", build_model("vae"), STFT())
    Path("cut/best.pt").write_bytes(Path("cut/best.pt").read_bytes()[:-5000])
    for arguments, expected in {
        (): "train one first",
        ("nowhere",): "nowhere",
        ("empty",): "no such checkpoint",
        ("text",): "not a checkpoint",
        ("other",): "not a checkpoint of minidvae",
        ("cut",): "truncated",
        ("empty", "--task", "resynthesise"): "resynthesis",
        ("empty", "--limit", "0"): "at least 1",
        ("empty", "--mode", "free"): "generation",
        ("empty", "--json", "nofolder/x.json"): "nofolder",
        ("empty", "--json", ""): "--json .: is a folder",
    }.items():
        assert call(evaluate_script, *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error and error.startswith("evaluate.py: error: ") and "\n" not in error
    assert train(speech, "--steps", 1, "--set", "frames=20", "batch=4", model="vae") == 0
    capsys.readouterr()
    assert call(evaluate_script, "run", "--split", "tset") == 2
    assert "test" in capsys.readouterr().err


def test_an_output_that_is_nothing_is_no_table(speech, capsys):
    """Weights that are finite and huge, whose output e^l is 0, give a table of `nan (0)` and exit code 0."""
    assert (
        train(speech, "--steps", 1, "--set", "frames=10", "batch=2", "hidden=8", model="vae") == 0
    )
    content = torch.load("run/best.pt")
    content["parameters"]["output.bias"].fill_(-3e38)
    torch.save(content, "run/best.pt")
    capsys.readouterr()
    assert call(evaluate_script, "run", "--limit", 2) == 2
    assert "run: " in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_not_overwritten(speech, capsys):
    assert train(speech, "--steps", 1, "--set", "frames=20", "batch=4", model="vae") == 0
    before = Path("run/last.pt").read_bytes()
    assert train(speech, "--steps", 1, model="vae") == 2
    assert "--resume" in capsys.readouterr().err and Path("run/last.pt").read_bytes() == before
    assert call(train_script, "--resume", "--run", "run", "--model", "light_dvae") == 2
    assert "--model" in capsys.readouterr().err


def test_init_starts_from_another_run(speech, capsys):
    """The first loss of a run that starts from another must be where that one ended, not where chance begins."""
    arguments = ["--steps", 40, "--set", "frames=20", "report=20", "warmup=5"]
    assert train(speech, *arguments, model="vae", run="first") == 0
    assert (
        call(
            train_script,
            "--init",
            "first",
            "--data",
            speech,
            "--run",
            "second",
            "--steps",
            2,
            "--set",
            "frames=20",
            "learning_rate=1e-9",
        )
        == 0
    )
    assert log("second")[0]["dev"]["loss"] == pytest.approx(
        log("first")[-1]["dev"]["loss"], rel=1e-4
    )
    capsys.readouterr()
    for arguments in (("--model", "dkf"), ("--set", "latent=3"), ("--set", "hop=128")):
        assert call(train_script, "--init", "first", *arguments) == 2
        assert arguments[1].split("=")[0] in capsys.readouterr().err


def test_published_model_is_evaluated_and_tuned(speech, shared, capsys):
    """A folder of the published format is a run to evaluate (results beside our own runs), and one to start from."""
    folder = shared / "checkpoints" / "vrnn"
    assert (
        call(evaluate_script, folder, "--data", speech, "--limit", 1, "--mode", "teacher_forcing")
        == 0
    )
    assert (
        json.loads((results_of("runs/vrnn", "resynthesis") / "results.json").read_text())["model"]
        == "vrnn"
    )
    assert (
        call(
            train_script,
            "--init",
            folder,
            "--recipe",
            "benchmark2021",
            "--data",
            speech,
            "--run",
            "tuned",
            "--steps",
            2,
            "--set",
            "frames=20",
            "batch=4",
        )
        == 0
    )
    tuned, stft, _ = checkpoint.load_run("tuned")
    assert stft == STFT(512, 256)
    published, _, _ = checkpoint.load_run(folder)
    for before, after in zip(published.parameters(), tuned.parameters(), strict=True):
        assert (before - after).abs().max() < 1e-3  # two steps of 1e-4


def test_out_of_memory_is_one_line(capsys):
    """On a CPU as on a GPU; any other error of torch stays what it is."""
    assert call(SimpleNamespace(__name__="hungry", main=lambda: torch.empty(2**58))) == 2
    error = capsys.readouterr().err
    assert "out of memory" in error and error.count("\n") == 1
    with pytest.raises(RuntimeError, match="shape"):
        call(SimpleNamespace(__name__="wrong", main=lambda: torch.ones(2, 3) @ torch.ones(2, 3)))


def test_help_shows_the_defaults(capsys):
    for script, flags in ((train_script, 11), (evaluate_script, 21)):
        assert call(script, "--help") == 0
        assert " ".join(capsys.readouterr().out.split()).count("(default: ") == flags


def test_a_compiled_training(speech, capsys):
    """--compile changes how a step is computed, not what; the first report says what compiling cost."""
    arguments = ["--steps", 4, "--set", "frames=10", "batch=2", "report=2", "hidden=8"]
    assert train(speech, *arguments, model="vae", run="eager") == 0
    assert "compiling" not in capsys.readouterr().out
    assert train(speech, *arguments, "--compile", model="vae", run="compiled") == 0
    assert re.search(r"The first step took \d+\.\d s, compiling included", capsys.readouterr().out)
    for eager, compiled in zip(log("eager"), log("compiled"), strict=True):
        assert compiled["train"] == pytest.approx(eager["train"], rel=1e-4)
        assert compiled["dev"] == pytest.approx(eager["dev"], rel=1e-4)


def test_reports_say_how_fast_it_is(speech, capsys):
    assert (
        train(
            speech,
            "--steps",
            2,
            "--set",
            "frames=10",
            "batch=2",
            "report=1",
            "hidden=8",
            model="vae",
        )
        == 0
    )
    assert len(re.findall(r"[\d,]+ frames/s$", capsys.readouterr().out, re.MULTILINE)) == 2
