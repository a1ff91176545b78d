"""The list of the commands of every table (studies/all.sh)."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ablations
import pytest
import study
from run_scripts import ROOT, evaluate_script, surroundings, train_script  # noqa: F401

from minidvae.training.config import overrides
from minidvae.training.run import resolve

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def run_all(*tables: str, **variables) -> subprocess.CompletedProcess:
    """Run the script as `VARIABLE=… bash studies/all.sh TABLE…`."""
    variables = {name: str(value) for name, value in variables.items()}
    environment = os.environ | {"PYTHON": sys.executable} | variables
    command = ["bash", str(ROOT / "studies" / "all.sh"), *tables]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def commands_of(output: str) -> list[list[str]]:
    """Return script and flags of every command that the script printed."""
    lines = [line for line in output.splitlines() if line.startswith("+ ")]
    return [shlex.split(line)[2:] for line in lines]


def check_training(flags: list[str], monkeypatch) -> Path:
    """Parse flags of train.py, and make its recipe and the settings of its model. Return the run
    folder."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    args = train_script.parse_arguments()
    resolve(args.model, args.recipe, overrides(args.set))
    return args.run


def check_ablations(flags: list[str], monkeypatch) -> None:
    """Parse flags of the ablations, and those of each of their trainings."""
    monkeypatch.setattr(sys, "argv", ["ablations.py", *flags])
    _, common = study.parse_arguments(ablations.__doc__, "runs")
    for variant in ablations.make_variants().values():
        check_training([*common, *variant], monkeypatch)


@pytest.mark.parametrize("recipe", ["paper", "quick", "cpu_hour", "smoke"])
def test_every_command_is_right(recipe, monkeypatch, tmp_path):
    """Fails if a script does not know a flag, a recipe, a model or a setting, or a run is
    evaluated that was not trained before. A dry pass must write nothing."""
    variables = {"SMOKE": "1"} if recipe == "smoke" else {"RECIPE": recipe}
    done = run_all(DRY=1, RUNS=tmp_path / "runs", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()  # evaluate.py checks that it can write there
    commands = commands_of(done.stdout)
    trained = set()
    for script, *flags in commands:
        if script == "train.py":
            trained.add(check_training(flags, monkeypatch))
        elif script == "studies/ablations.py":
            check_ablations(flags, monkeypatch)
        else:
            monkeypatch.setattr(sys, "argv", [script, *flags])
            args = evaluate_script.parse_arguments()
            assert script == "evaluate.py" and set(args.runs) <= trained
            assert args.recogniser is None or args.recogniser in trained
    scripts = {script for script, *_ in commands}
    assert scripts == {"train.py", "evaluate.py", "studies/ablations.py"}


def test_a_table_is_made_once(speech, tmp_path):
    """Fails if the table is not written, a finished training is repeated, or an interrupted one is
    not resumed."""
    variables = {"SMOKE": "1", "DATA": speech, "RUNS": tmp_path / "runs", "DEVICE": "cpu"}
    first = run_all("fhvae-figures", **variables)
    assert first.returncode == 0, first.stderr
    text = (tmp_path / "runs" / "fhvae-figures.txt").read_text()
    assert "segment bound" in text and (tmp_path / "runs" / "fhvae-figures.json").is_file()
    assert [script for script, *_ in commands_of(first.stdout)] == ["train.py", "evaluate.py"]

    second = run_all("fhvae-figures", DRY=1, **variables)
    assert [script for script, *_ in commands_of(second.stdout)] == ["evaluate.py"]
    (tmp_path / "runs" / "fhvae" / "FHVAE-sound" / "finished").unlink()
    interrupted = run_all("fhvae-figures", DRY=1, **variables)
    assert commands_of(interrupted.stdout)[0][:2] == ["train.py", "--resume"]

    other = run_all("fhvae-figures", **(variables | {"SEED": 1}))
    assert other.returncode == 2 and "choose another folder" in other.stderr


def test_an_unknown_table(tmp_path):
    """Fails if the error comes only after the trainings of the tables before it."""
    done = run_all("light-1", "light-4", RUNS=tmp_path / "runs")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown table light-4; expected some of light-1 " in done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
