"""train.py and evaluate.py as a user calls them: the files they write, resuming, and bad input."""

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
from run_scripts import (  # noqa: F401
    ROOT,
    call,
    evaluate_script,
    log,
    results_of,
    surroundings,
    train_script,
)

from minidvae import cli
from minidvae.data.audio import STFT
from minidvae.data.corpus import load_corpus
from minidvae.data.crops import consecutive_crops
from minidvae.files import CheckpointError
from minidvae.models import build_model
from minidvae.models.vae import VAE
from minidvae.training import checkpoint
from minidvae.training.batches import Spectra

# Settings of a LigHT-DVAE, and of any other model, with which a step takes milliseconds.
TINY_SIZES = ["width=16", "feedforward=32", "layers=1", "w_embedding=8", "w_hidden=8"]
TINY = [*TINY_SIZES, "frames=20", "batch=4", "report=4"]
SMALL_BATCHES = ["--set", "frames=20", "batch=4"]
SMALLEST_VAE = ["--set", "frames=10", "batch=2", "hidden=8"]


def train(speech, *arguments, run="run", model="light_dvae") -> int:
    """Return the exit code of train.py with the recipe `quick`."""
    command = ["--model", model, "--recipe", "quick", "--data", speech, "--run", run]
    return call(train_script, *command, *arguments)


def resume(run, *arguments) -> int:
    """Return the exit code of train.py --resume."""
    return call(train_script, "--resume", "--run", run, *arguments)


def start_training(*arguments) -> subprocess.Popen:
    """Start train.py in its own process."""
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


def load_parameters(file) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["parameters"]


def file_names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# ---------------------------------------------------------------------------- training, evaluating


@pytest.mark.parametrize("model", ["vae", "light_dvae"])
def test_train_then_evaluate(speech, model, capsys):
    """Fails if a file of a run or of an evaluation is missing, if the means are not those of the
    rows, or if only a part of an utterance is evaluated."""
    settings = TINY if model == "light_dvae" else ["frames=20", "batch=4", "report=4"]
    run = Path("runs") / model
    assert train(speech, "--steps", 8, "--set", *settings, model=model, run=str(run)) == 0
    assert file_names(run) == {"config.json", "log.jsonl", "curves.png", "last.pt", "best.pt"}
    assert [report["step"] for report in log(run)] == [4, 8]
    for mode in ("generation", "teacher_forcing"):
        assert call(evaluate_script, "--mode", mode, "--limit", 3, "--json", "all.json") == 0
        assert model in capsys.readouterr().out
    folders = {}  # settings that are not the default → folder of the results
    for path in (run / "eval" / "resynthesis").iterdir():
        folders[path.name.partition("-test-")[2]] = path
    assert set(folders) == {"limit=3", "limit=3-mode=teacher_forcing"}
    folder = folders["limit=3-mode=teacher_forcing"]
    result = json.loads((folder / "results.json").read_text())
    assert json.loads(Path("all.json").read_text()) == [result]
    assert len(result["utterances"]) == 3
    for measure, summary in result["summary"].items():
        values = [row[measure] for row in result["utterances"] if row[measure] is not None]
        assert summary["mean"] == pytest.approx(sum(values) / len(values))
    check_files_and_durations(result, folder, load_corpus(speech).split("test"))


def check_files_and_durations(result, folder, test_split) -> None:
    """Check that each evaluated utterance has a picture and a sound, and was evaluated at its full
    length, without the silence that is trimmed."""
    num_samples = {}
    for index, utterance in enumerate(test_split.utterances):
        num_samples[utterance.name] = len(test_split.waveform(index))
    for row in result["utterances"]:
        expected_files = {f"{row['name']}.png", f"{row['name']}-resynthesis.wav"}
        assert expected_files <= file_names(folder)
        assert row["seconds"] == num_samples[row["name"]] / 16_000


def test_arguments_of_evaluate_change_the_result(speech):
    """Fails if the mode, the seed or the limit does not reach the numbers, or if the evaluation of
    one run does not repeat its numbers."""
    assert train(speech, "--steps", 8, "--set", *TINY) == 0
    means = []
    for arguments in ((), (), ("--mode", "teacher_forcing"), ("--seed", 1), ("--limit", 1)):
        assert call(evaluate_script, "run", "--json", "all.json", *arguments) == 0
        (result,) = json.loads(Path("all.json").read_text())
        means.append(result["summary"]["si_sdr"]["mean"])
    assert means[0] == means[1]
    assert len(set(means)) == 4


def test_published_rows_only_with_comparable_settings(speech, monkeypatch, capsys):
    """Fails if the paper's numbers on the test split of WSJ0 stand in one table with ours on
    another split or on a part of it, which would mislead."""
    assert train(speech, "--steps", 1, *SMALL_BATCHES, model="vae") == 0

    def load_as_wsj0(data):
        return dataclasses.replace(load_corpus(data), layout="WSJ0")

    monkeypatch.setattr(evaluate_script, "load_corpus", load_as_wsj0)
    published_values = [["0.0400", "7.40"]]
    for arguments, expected in (
        ((), published_values),
        (("--limit", 1), []),
        (("--split", "dev"), []),
    ):
        capsys.readouterr()
        assert call(evaluate_script, "run", *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[2:4] for line in lines if "(paper)" in line] == expected


def test_several_runs_give_one_table(speech, capsys):
    """Fails if a run has no row, or stands in another table."""
    for run in ("one", "two"):
        assert train(speech, "--steps", 1, *SMALL_BATCHES, model="vae", run=run) == 0
    capsys.readouterr()
    assert call(evaluate_script, "one", "two", "--limit", 1) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["RMSE", "one", "two"]


def test_training_learns(speech):
    """Fails if 60 steps do not beat by a fifth the best constant spectrum, which is what the model
    is at the beginning."""
    settings = ["frames=20", "batch=8", "report=60", "warmup=5", "optimiser=adamw"]
    assert train(speech, "--steps", 60, "--set", *settings, model="vae") == 0
    corpus = load_corpus(speech)
    stft = STFT()
    train_crops = list(consecutive_crops(corpus.split("train"), stft.samples(20), 100))
    dev_crops = list(consecutive_crops(corpus.split("dev"), stft.samples(20), 100))
    constant = stft.power(torch.cat(train_crops)).mean((0, 1))  # (bins,)
    ratio = stft.power(torch.cat(dev_crops)) / constant  # (batch, frames, bins)
    divergence = (ratio - ratio.clamp_min(1e-12).log() - 1).sum(-1).mean().item()
    assert log("run")[-1]["dev"]["loss"] < 0.8 * divergence


def test_short_utterances_are_not_left_out_silently(speech, capsys):
    """Fails if, where most utterances are shorter than one sequence, training uses the others
    alone without being asked to by --set."""
    Path("digits/train/anna").mkdir(parents=True)
    Path("digits/dev/anna").mkdir(parents=True)
    waveform, rate = soundfile.read(min(speech.rglob("*.wav")))
    for seconds in (0.5, 0.45, 0.4, 1.5):
        path = f"digits/train/anna/{seconds}.wav"
        soundfile.write(path, waveform[: int(seconds * rate)], rate)
    soundfile.write("digits/dev/anna/1.5.wav", waveform[: int(1.5 * rate)], rate)
    arguments = ["--steps", 1, "--set", "trim=false", "batch=2"]
    assert train("digits", *arguments) == 2
    error = capsys.readouterr().err
    assert "3 of 4 utterances are shorter" in error
    assert "frames=50" in error
    assert "\n" not in error.strip()
    assert not Path("run").exists()
    suggestion = re.search(r"--set (frames=\d+)", error)[1]
    # The shortest file has 6,400 samples; a window has 1,024 and a hop 256.
    assert suggestion == f"frames={1 + (6_400 - 1_024) // 256}"
    assert train("digits", *arguments, suggestion) == 0
    assert "not used" not in capsys.readouterr().out
    assert train("digits", *arguments, "frames=50", run="asked") == 0
    assert "3 utterances are shorter" in capsys.readouterr().out


def test_early_stopping(speech):
    """Fails if training does not end after two reports without a better development loss, or if
    best.pt is not of the best report."""
    settings = [*TINY[:-1], "report=2", "patience=2", "learning_rate=1e-9"]
    assert train(speech, "--steps", 40, "--set", *settings) == 0
    losses = [report["dev"]["loss"] for report in log("run")]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert len(losses) < 20
    assert torch.load("run/best.pt", weights_only=True)["progress"]["step"] == 2 * (best + 1)


def test_every_setting_of_the_loop_changes_the_training(speech, monkeypatch):
    """Fails if a flag or a setting of the training loop has no effect, so that two runs have equal
    parameters, or if bf16 is far from fp32."""
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
        ["schedule=constant", "warmup=2"],
        ["warmup=2"],
        ["heads=2"],
        ["trim=false"],
    ]
    runs = {}
    for number, change in enumerate(changes):
        runs[f"run{number}"] = [*base, *change]
    runs["bf16"] = ["--precision", "bf16", *base]
    runs["seed"] = ["--seed", 1, *base]
    results = {}  # sum of each parameter → arguments
    for run, arguments in runs.items():
        assert train(speech, *arguments, run=run) == 0
        parameters = load_parameters(f"{run}/last.pt").values()
        sums = tuple(parameter.double().sum().item() for parameter in parameters)
        results[sums] = arguments
    assert len(results) == len(runs), results.values()
    expected = log("run0")[-1]["dev"]["loss"]
    assert log("bf16")[-1]["dev"]["loss"] == pytest.approx(expected, rel=0.01)


def test_a_compiled_training(speech, capsys):
    """Fails if --compile changes the losses, or if the output does not say that the first step
    includes compiling."""
    arguments = ["--steps", 4, *SMALLEST_VAE, "report=2"]
    assert train(speech, *arguments, model="vae", run="eager") == 0
    assert "compiling" not in capsys.readouterr().out
    assert train(speech, *arguments, "--compile", model="vae", run="compiled") == 0
    assert re.search(r"The first step took \d+\.\d s, compiling included", capsys.readouterr().out)
    for eager, compiled in zip(log("eager"), log("compiled"), strict=True):
        assert compiled["train"] == pytest.approx(eager["train"], rel=1e-4)
        assert compiled["dev"] == pytest.approx(eager["dev"], rel=1e-4)


def test_reports_say_how_fast_it_is(speech, capsys):
    """Fails if a report does not end with the frames per second."""
    assert train(speech, "--steps", 2, *SMALLEST_VAE, "report=1", model="vae") == 0
    assert len(re.findall(r"[\d,]+ frames/s$", capsys.readouterr().out, re.MULTILINE)) == 2


@pytest.mark.parametrize("model", ["vae", "fhvae"])
def test_batches_prepared_ahead_are_the_same(model, speech, monkeypatch):
    """Fails if training differs where a thread prepares batches while a step runs, as it does for
    a GPU."""
    settings = ["frames=20", "report=4", "batch=4"]
    if model == "fhvae":
        settings += ["width=8", "shift=5"]
    for run, devices in (("one", ()), ("two", ("cpu",))):
        monkeypatch.setattr(train_script, "DEVICES_WITH_LOADER_THREAD", devices)
        assert train(speech, "--steps", 8, "--set", *settings, model=model, run=run) == 0
    assert log("one") == log("two")


# --------------------------------------------------------------------------------------- resuming


def test_interrupted_run_resumes_bit_for_bit(speech):
    """Fails if a run that was stopped between two reports and resumed does not log what an
    uninterrupted run logs. It has both states of Muon, and augmented crops."""
    settings = ["--steps", "24", "--set", *TINY[1:], "width=64", "optimiser=muon"]
    settings += ["speed=0.85,1.2", "gain=-6,0"]
    assert train(speech, *settings, run="uninterrupted") == 0
    command = ["--model", "light_dvae", "--recipe", "quick", "--run", "interrupted"]
    process = start_training(*command, "--data", speech, *settings)
    while process.poll() is None and number_of_reports("interrupted") < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert number_of_reports("interrupted") < 6, "the run ended before it could be interrupted"
    assert resume("interrupted") == 0
    assert log("interrupted") == log("uninterrupted")
    parameters = load_parameters("interrupted/last.pt")
    for name, value in load_parameters("uninterrupted/last.pt").items():
        assert torch.equal(value, parameters[name])


def number_of_reports(run) -> int:
    if not Path(run, "log.jsonl").exists():
        return 0
    return len(log(run))


def test_resuming_after_a_kill_between_reports(speech):
    """Fails if a run that was killed after a report was logged, and before its checkpoint was
    written, has this report twice in its log when it is resumed."""
    assert train(speech, "--steps", 8, "--set", *TINY, "schedule=constant") == 0
    checkpoint_of_step_8 = Path("run/last.pt").read_bytes()
    assert resume("run", "--steps", 12) == 0
    reports = log("run")
    assert [report["step"] for report in reports] == [4, 8, 12]
    Path("run/last.pt").write_bytes(checkpoint_of_step_8)
    assert resume("run", "--steps", 12) == 0
    assert log("run") == reports


def test_a_training_without_a_checkpoint_starts_anew(speech, monkeypatch, capsys):
    """Fails if a folder in which training failed before its first checkpoint can neither be
    trained in nor resumed, or if its files are mixed with those of the next training."""
    arguments = ["--steps", 4, *SMALL_BATCHES, "report=2"]
    save = checkpoint.save

    def set_bias_to_nan(batches, model, *_):
        model.output.bias.data.fill_(torch.nan)

    def save_on_a_full_disk(path, *args, **state):
        # last.pt is the largest file, and is written after the first line of the log.
        if path.name == "last.pt":
            raise CheckpointError(f"{path}: could not be written")
        save(path, *args, **state)

    with monkeypatch.context() as patched:
        patched.setattr(Spectra, "before_step", set_bias_to_nan)
        assert train(speech, *arguments, model="vae") == 2
    assert file_names("run") == {"config.json", "log.jsonl"}
    assert train(speech, *arguments, model="vae") == 0

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_on_a_full_disk)
        assert train(speech, *arguments, model="vae", run="full") == 2
    assert len(log("full")) == 1
    assert Path("full/best.pt").exists()
    assert train(speech, *arguments, model="vae", run="full") == 0
    assert log("full") == log("run")

    Path("full/last.pt").unlink()  # A user may do this to save disk space.
    capsys.readouterr()
    assert train(speech, *arguments, model="vae", run="full") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert Path("full/best.pt").exists()


def test_two_trainings_on_one_folder(speech, capsys):
    """Fails if both run and mix their files, or if the lock of a training that was killed
    remains."""
    new = ["--model", "vae", "--recipe", "quick", "--data", speech, "--run", "run"]
    new += SMALL_BATCHES
    resumed = ["--resume", "--run", "run"]
    for second_command, report, first_file in (
        (new, 100_000, "config.json"),
        (resumed, 1, "last.pt"),
    ):
        first = start_training(*new, f"report={report}", "steps=100000")
        try:
            wait_for(Path("run", first_file).exists)
            assert call(train_script, *second_command) == 2
            assert capsys.readouterr().err.strip().splitlines()[-1] == (
                "train.py: error: run: another training writes to it now; choose another --run"
            )
        finally:
            first.kill()
            first.wait()
    step = torch.load("run/last.pt")["progress"]["step"]
    assert resume("run", "--steps", step + 2) == 0
    assert [report["step"] for report in log("run")] == list(range(1, step + 3))


def test_the_log_is_appended(speech, monkeypatch):
    """Fails if every report writes the log anew or draws the curves, which would take hours of a
    long run, or if resuming keeps a line that was cut off when the machine stopped."""
    log_states = []  # inode and number of reports, whenever a checkpoint is written
    pictures = []
    save = checkpoint.save

    def save_and_note_log(path, *args, **state):
        if path.name == "last.pt":
            log_states.append((os.stat("run/log.jsonl").st_ino, len(log("run"))))
        save(path, *args, **state)

    def note_picture(reports, path):
        pictures.append(len(reports))

    monkeypatch.setattr(checkpoint, "save", save_and_note_log)
    monkeypatch.setattr(train_script.figures, "curves", note_picture)
    assert train(speech, "--steps", 6, *SMALLEST_VAE, "report=1", model="vae") == 0
    inode = log_states[0][0]
    assert log_states == [(inode, count) for count in range(1, 7)]
    assert pictures == [6]
    complete_lines = Path("run/log.jsonl").read_bytes()
    Path("run/log.jsonl").write_bytes(complete_lines + b'{"step": 6, "train": {"lo')
    assert resume("run", "--steps", 7) == 0
    assert Path("run/log.jsonl").read_bytes().startswith(complete_lines)
    assert len(log("run")) == 7


@pytest.mark.parametrize(
    "line", ["{}", "[]", "no json", '{"step": "x"}', '{"step": 2, "train": {"l": ""}, "dev": {}}']
)
def test_a_line_of_the_log_that_is_no_report(line, speech, capsys):
    """Fails if a line that a user appended to the log ends in a traceback or changes the log."""
    assert train(speech, "--steps", 2, *SMALLEST_VAE, "report=1", model="vae") == 0
    with open("run/log.jsonl", "a") as file:
        file.write(f"{line}\n")
    content = Path("run/log.jsonl").read_bytes()
    capsys.readouterr()
    assert resume("run", "--steps", 4) == 2
    error = capsys.readouterr().err
    assert "run/log.jsonl: line 3 is no report" in error
    assert error.strip().count("\n") == 0
    assert Path("run/log.jsonl").read_bytes() == content


def test_automatic_precision_is_resolved_once(speech, monkeypatch):
    """Fails if a run that began in bfloat16 is resumed in another precision because the chip has
    no instructions for bfloat16."""
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(cli, "has_bf16", lambda _, value=has_bf16: value)
        arguments = ["--steps", 1, "--precision", "auto", "--set", "frames=20", "batch=2"]
        assert train(speech, *arguments, run=expected, model="vae") == 0
        assert json.loads(Path(expected, "config.json").read_text())["precision"] == expected
    assert resume("bf16", "--steps", 2) == 0
    assert torch.load("bf16/last.pt")["plan"]["precision"] == "bf16"


def test_resume_needs_the_same_speech(tmp_path, speech, capsys):
    """Fails if a run goes on although a file of its corpus was removed."""
    shutil.copytree(speech, tmp_path / "copy")
    arguments = ["--steps", 4, "--set", "frames=20", "report=2"]
    assert train(tmp_path / "copy", *arguments, model="vae") == 0
    next((tmp_path / "copy" / "train").rglob("*.wav")).unlink()
    assert resume("run", "--steps", 6) == 2
    assert "copy" in capsys.readouterr().err


def test_resume_refuses_finished_runs_and_checkpoints_without_optimiser(speech, capsys):
    """Fails if --steps may be less than what is trained, or if a training continues from best.pt,
    which has no state of the optimiser."""
    assert train(speech, "--steps", 4, "--set", "frames=20", "report=2", model="vae") == 0
    assert resume("run", "--steps", 2) == 2
    assert "4 steps already" in capsys.readouterr().err
    Path("run/last.pt").write_bytes(Path("run/best.pt").read_bytes())
    assert resume("run", "--steps", 6) == 2
    assert "optimiser" in capsys.readouterr().err


TAMPERED_PARTS = {  # part of a checkpoint → what is written over it
    "plan": ["text", {}, {"more": 1}],
    "plan.recipe": ["text", {}, {"frames": "x"}, {"hop": 128}, {"batch": 0}, {"window": 512}],
    "progress": ["text", {"more": 1}],
    "optimiser": ["text", {"state": 7}],
    "stft": ["text", {"hop": 128}, {"hop": "x"}, {"window": "round"}, {"window_length": 512}],
    "config": ["text", {"beta_z": -1.0}, {"hidden": 8}, {"input_scale": "mel"}],
}


def test_a_tampered_run_is_one_line(speech, capsys):
    """Fails if a part of a checkpoint that training did not write ends in a traceback, or if
    training goes on with it."""
    arguments = ["--steps", 2, "--set", "frames=10", "batch=2", "report=1", "hidden=64"]
    assert train(speech, *arguments, "optimiser=adamw", model="vae") == 0
    Path("changed").mkdir()
    for part, changes in TAMPERED_PARTS.items():
        for change in changes:
            torch.save(tampered_checkpoint(part, change), "changed/last.pt")
            capsys.readouterr()
            assert resume("changed", "--steps", 3) == 2, (part, change)
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith("train.py: error: changed"), (part, change, error)


def tampered_checkpoint(part: str, change: str | dict) -> dict:
    """Return the content of run/last.pt with one part changed.

    Args:
        part: keys that lead to the part, with dots between them.
        change: values to update where it and the part are dicts and it is not empty; else what
            replaces the part.
    """
    content = torch.load("run/last.pt")
    *outer_keys, key = part.split(".")
    parent = content
    for outer_key in outer_keys:
        parent = parent[outer_key]
    if change and isinstance(change, dict) and isinstance(parent[key], dict):
        parent[key] = parent[key] | change
    else:
        parent[key] = change
    return content


def test_a_run_is_not_overwritten(speech, capsys):
    """Fails if a second training in a folder replaces the first, or if a run is resumed as another
    model."""
    assert train(speech, "--steps", 1, *SMALL_BATCHES, model="vae") == 0
    before = Path("run/last.pt").read_bytes()
    assert train(speech, "--steps", 1, model="vae") == 2
    assert "--resume" in capsys.readouterr().err
    assert Path("run/last.pt").read_bytes() == before
    assert resume("run", "--model", "light_dvae") == 2
    assert "--model" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- other models


def test_init_starts_from_another_run(speech, capsys):
    """Fails if the first loss of a run with --init is not the last loss of the run that it starts
    from, or if it may have another model, size or STFT."""
    arguments = ["--steps", 40, "--set", "frames=20", "report=20", "warmup=5"]
    assert train(speech, *arguments, model="vae", run="first") == 0
    arguments = ["--init", "first", "--data", speech, "--run", "second", "--steps", 2]
    assert call(train_script, *arguments, "--set", "frames=20", "learning_rate=1e-9") == 0
    expected = log("first")[-1]["dev"]["loss"]
    assert log("second")[0]["dev"]["loss"] == pytest.approx(expected, rel=1e-4)
    capsys.readouterr()
    for arguments in (("--model", "dkf"), ("--set", "latent=3"), ("--set", "hop=128")):
        assert call(train_script, "--init", "first", *arguments) == 2
        assert arguments[1].split("=")[0] in capsys.readouterr().err


def test_published_model_is_evaluated_and_tuned(speech, shared, capsys):
    """Fails if a folder in the published format cannot be evaluated as a run (with results in
    runs/), or if training cannot start from it."""
    folder = shared / "checkpoints" / "vrnn"
    arguments = ["--data", speech, "--limit", 1, "--mode", "teacher_forcing"]
    assert call(evaluate_script, folder, *arguments) == 0
    results = results_of("runs/vrnn", "resynthesis") / "results.json"
    assert json.loads(results.read_text())["model"] == "vrnn"
    arguments = ["--init", folder, "--recipe", "benchmark2021", "--data", speech]
    arguments += ["--run", "tuned", "--steps", 2]
    assert call(train_script, *arguments, *SMALL_BATCHES) == 0
    tuned, stft, _ = checkpoint.load_run("tuned")
    assert stft == STFT(512, 256)
    published, _, _ = checkpoint.load_run(folder)
    for before, after in zip(published.parameters(), tuned.parameters(), strict=True):
        assert (before - after).abs().max() < 1e-3  # Two steps of Adam move it by about 2e-4.


# ------------------------------------------------------------------------- losses that are no loss


def test_non_finite_loss_stops_and_is_named(speech, capsys):
    """Fails if the error does not name the step and the term, or if training goes on with NaN and
    replaces the last good checkpoint."""
    assert train(speech, "--steps", 4, "--set", "frames=20", "report=2", model="vae") == 0
    content = torch.load("run/last.pt", weights_only=True)
    content["plan"]["recipe"] |= {
        "learning_rate": 1e30,
        "schedule": "constant",
        "warmup": 0,
        "clip": 0.0,
    }
    torch.save(content, "run/last.pt")
    capsys.readouterr()
    assert resume("run", "--steps", 40) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step " in error
    assert "run/last.pt" in error
    assert "reconstruction" in error or "kl_z" in error
    parameters = load_parameters("run/last.pt")
    assert all(value.isfinite().all() for value in parameters.values())
    assert parameters.keys() == content["parameters"].keys()


def test_gradient_that_is_not_finite_is_not_taken(speech, monkeypatch, capsys):
    """Fails if a finite loss whose gradient is not finite changes the parameters or reaches a
    checkpoint."""
    original_loss = VAE.loss

    def loss_with_infinite_gradient(self, batch, noise=None, scheduled_sampling_prob=0.0):
        value, terms = original_loss(self, batch, noise)
        zeros = self.output.bias - self.output.bias.detach()
        return value + zeros.sqrt().sum(), terms

    monkeypatch.setattr(VAE, "loss", loss_with_infinite_gradient)
    assert train(speech, "--steps", 4, "--set", "frames=20", "report=1", model="vae") == 2
    assert "step 0: gradient norm" in capsys.readouterr().err
    assert not Path("run/last.pt").exists()


def test_digital_silence_in_training(tmp_path, speech):
    """Fails if zeros in recordings, for which the divergence has no lower bound unless the power
    has a floor, make training diverge."""
    for path in speech.rglob("*.wav"):
        waveform, rate = soundfile.read(path, dtype="int16")
        waveform[len(waveform) // 3 : len(waveform) // 2] = 0
        quiet = tmp_path / "quiet" / path.relative_to(speech)
        quiet.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(quiet, waveform, rate)
    settings = ["frames=20", "batch=8", "report=100", "warmup=20", "learning_rate=5e-3"]
    settings += ["optimiser=adamw"]
    assert train(tmp_path / "quiet", "--steps", 300, "--set", *settings, model="vae") == 0
    losses = [report["train"]["loss"] for report in log("run")]
    assert losses[-1] < losses[0]
    assert losses[-1] < 1000


def test_an_output_of_zeros_is_no_table(speech, capsys):
    """Fails if finite, huge weights, whose output exp(log_variance) is 0, give a table of `nan (0)`
    and exit code 0."""
    assert train(speech, "--steps", 1, *SMALLEST_VAE, model="vae") == 0
    content = torch.load("run/best.pt")
    content["parameters"]["output.bias"].fill_(-3e38)
    torch.save(content, "run/best.pt")
    capsys.readouterr()
    assert call(evaluate_script, "run", "--limit", 2) == 2
    assert "run: " in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------- bad input

BAD_ARGUMENTS = {  # arguments of train.py → what the error must say
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


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=" ".join)
def test_bad_input_is_one_line(arguments, capsys):
    """Fails if bad arguments end in a traceback, in an unclear error, or leave a file behind."""
    assert call(train_script, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert BAD_ARGUMENTS[arguments] in error
    assert error.startswith("train.py: error: ")
    assert "\n" not in error
    assert list(Path().iterdir()) == []


def test_evaluate_refuses_what_is_not_a_run(speech, tmp_path, capsys):
    """Fails if a folder without a checkpoint, a damaged one, or a bad argument ends in a
    traceback or in an unclear error."""
    for folder in ("empty", "text", "other", "cut"):
        Path(folder).mkdir()
    Path("text/best.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, "other/best.pt")
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
        assert expected in error
        assert error.startswith("evaluate.py: error: ")
        assert "\n" not in error
    assert train(speech, "--steps", 1, *SMALL_BATCHES, model="vae") == 0
    capsys.readouterr()
    assert call(evaluate_script, "run", "--split", "tset") == 2
    assert "test" in capsys.readouterr().err


def test_names_that_standard_output_cannot_encode(monkeypatch):
    """Fails if a script ends in a traceback when it prints the name of a speaker whose folder's
    name is not UTF-8."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "utf-8"))
    cli.run(lambda: print(os.fsdecode(b"anna\xff"), flush=True))
    assert output.getvalue() == b"anna\\udcff\n"


def test_out_of_memory_is_one_line(capsys):
    """Fails if a lack of memory ends in a traceback, or if any other error of torch is reported
    as one."""
    too_large = SimpleNamespace(__name__="too_large", main=lambda: torch.empty(2**58))
    assert call(too_large) == 2
    error = capsys.readouterr().err
    assert "out of memory" in error
    assert error.count("\n") == 1
    mismatch = SimpleNamespace(
        __name__="mismatch", main=lambda: torch.ones(2, 3) @ torch.ones(2, 3)
    )
    with pytest.raises(RuntimeError, match="shape"):
        call(mismatch)


def test_help_shows_the_defaults(capsys):
    """Fails if a flag does not say in --help what holds without it."""
    for script, num_flags in ((train_script, 11), (evaluate_script, 21)):
        assert call(script, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text.count("(default: ") == num_flags
