"""The papers' tables by one command (studies/tables.py)."""

import importlib
import json
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tables
from run_scripts import call, evaluate_script, surroundings, train_script  # noqa: F401

from minidvae.cli import Parser
from minidvae.training.config import overrides
from minidvae.training.run import resolve

SCRIPTS = {"train.py": train_script, "evaluate.py": evaluate_script}


class Parsed(Exception):
    pass


@pytest.fixture
def parse(monkeypatch):
    """The flags that a script makes of its arguments, and those that it does not know."""

    def parse(script: str, *arguments: str) -> tuple[Namespace, list[str]]:
        def stop(*given):
            raise Parsed(*original(*given))

        module = SCRIPTS.get(script) or importlib.import_module(Path(script).stem)
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            original = Parser.parse_known_args
            patch.setattr(Parser, "parse_known_args", stop)
            patch.setattr(sys, "argv", [script, *arguments])
            module.main()
        return parsed.value.args

    return parse


@pytest.mark.parametrize("recipe", ["paper", "smoke"])
def test_the_plan_has_every_table_and_its_commands_are_right(recipe, speech, parse, capsys):
    """A script does not know a flag, a recipe a model or a setting; a run is evaluated that was not trained."""
    assert (
        call(tables, "all", "--plan", "--recipe", recipe, "--data", speech, "--noise", speech) == 0
    )
    *commands, left = capsys.readouterr().out.splitlines()
    assert left.startswith(f"Left: {len(commands)} commands") and not Path("runs").exists()
    scripts, made = [], set()
    for _, script, *arguments in map(shlex.split, commands):
        scripts.append(script)
        args, others = parse(script, *arguments)
        if script.startswith("studies/"):
            args, unknown = parse("train.py", *others)
            assert not unknown
        elif script == "evaluate.py":
            assert not others and set(map(str, args.runs)) <= made
            assert args.recogniser is None or str(args.recogniser) in made
        if script == "train.py":
            resolve(args.model, args.recipe, overrides(args.set))
            made.add(str(args.run))
    assert len(made) == scripts.count("train.py") and len(scripts) - len(made) == len(tables.TABLES)


def test_a_table_is_made_once(speech, monkeypatch, capfd):
    """A training, an evaluation or a page is missing, wrong, or made again when all is there."""
    trainings = []

    def train(script, *arguments):
        trainings.append(arguments)
        assert call(SCRIPTS[script], *arguments) == 0

    published = ("resynthesis", "WSJ0", "|RMSE|SI-SDR|PESQ|PESQ-LQO|STOI|ESTOI")
    table = tables.Table(
        "Title", "Source", "light2023", "evaluate.py VAE A --task resynthesis", *published
    )
    monkeypatch.setattr(tables, "call", train)
    monkeypatch.setattr(tables, "TABLES", {"one": table})
    small = ["--model", "vae", "--set", "frames=20", "batch=2", "steps=3", "report=3"]
    monkeypatch.setattr(
        tables, "TRAININGS", {"VAE": [*small, "hidden=8"], "A": [*small, "hidden=4"]}
    )
    flags = ["one", "--recipe", "smoke", "--data", speech, "--limit", 2]
    assert call(tables, *flags) == 0
    assert len(trainings) == 2 and "VAE-smoke" in capfd.readouterr().out
    told = json.loads(Path("runs/tables/one.json").read_text())
    (found,) = told["tables"]
    assert found["columns"] == ["", "RMSE", "SI-SDR", "PESQ", "PESQ-LQO", "STOI", "ESTOI"]
    results = json.loads(
        Path("runs/tables/models/A-smoke/eval/resynthesis/results.json").read_text()
    )["summary"]
    title, rmse, (mean, error), *_ = found["rows"][1]
    assert title == "A-smoke" and mean == pytest.approx(results["si_sdr"]["mean"], abs=0.006)
    assert error == pytest.approx(results["si_sdr"]["standard_error"], abs=0.006) and len(rmse) == 2
    page = Path("runs/tables/one.md").read_text()
    assert page.startswith("# Title\n\nSource. Corpus: ") and page.count("    python ") == 3 == len(
        told["seconds"]
    )
    ours, theirs = page.split("## In the paper")
    assert (
        "| VAE-smoke | " in ours
        and "Mean ± standard error over utterances" in ours
        and "results.json" not in ours
    )
    assert "WSJ0, another corpus" in theirs and "| hit_dvae | 0.0310 | 10.00 |" in theirs
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(pictures) == 4 and all(
        Path("runs/tables", picture).is_file() for picture in pictures
    )

    monkeypatch.setattr(tables, "execute", lambda _: pytest.fail("a command ran again"))
    Path("runs/tables/one.md").unlink()
    assert call(tables, *flags) == 0 and Path("runs/tables/one.md").read_text() == page
    capfd.readouterr()
    assert call(tables, "--plan", *flags[:2], "quick", *flags[3:]) == 0
    assert re.search(r"Left: 3 commands, about \d h \d\d min$", capfd.readouterr().out.strip())
    assert (
        call(tables, *flags, "--seed", 1) == 2 and "choose another --runs" in capfd.readouterr().err
    )


def test_a_training_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tables, "call", lambda *words: calls.append(words))
    step = tables.Step("VAE", ("train.py", "--model", "vae"), "smoke", tmp_path)
    tables.execute(step)
    (tmp_path / "last.pt").touch()
    tables.execute(step)
    assert calls == [step.words, ("train.py", "--resume", "--run", tmp_path)]


def write_run(folder: Path, seconds: float, steps: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": "light_dvae"}))
    (folder / "log.jsonl").write_text(json.dumps({"step": steps, "seconds": seconds}) + "\n")


def test_how_long_it_takes(tmp_path):
    """2,300 steps of `quick` by the half second that a step of `smoke` took, those that were made taken off; an
    evaluation by its size; else the mean of what has the same recipe; nothing by a model of another size."""
    step = tables.Step("A", ("train.py",), "quick", tmp_path / "A-quick")
    assert tables.seconds_left(step, {}) is None
    write_run(tmp_path / "A-light2023", 900, 10)
    row = {"name": "B", "recipe": "quick", "size": 4, "seconds": 70, "evaluating": 20}
    assert tables.seconds_left(step, {}) is None and tables.seconds_left(step, {"b": row}) == 70
    write_run(tmp_path / "A-smoke", 20, 40)
    assert tables.seconds_left(step, {"b": row}) == 1150
    write_run(tmp_path / "A-quick", 230, 460)
    assert tables.seconds_left(step, {}) == 1150 - 230
    study = tables.Step("B", ("studies/b.py",), "quick", tmp_path / "B-quick", 80)
    assert tables.seconds_left(study, {"b": row}) == 400
    write_run(tmp_path / "B-smoke/one", 20, 40)
    write_run(tmp_path / "B-smoke/two", 40, 40)
    assert tables.seconds_left(study, {"b": row}) == 400 + 1150 + 2300


@pytest.mark.parametrize(
    "cell, value",
    [
        *(
            ("0.0427 ± 0.0018", [0.0427, 0.0018]),
            ("-1.20 ± 0.30", [-1.2, 0.3]),
            ("9.52%", 9.52),
            ("10,240", 10240),
        ),
        *(("–", None), ("", None), ("10.48 M", "10.48 M"), ("LDA 12", "LDA 12"), ("−0.1", -0.1)),
    ],
)
def test_what_a_cell_says(cell, value):
    assert tables.number(cell) == value


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["exchanges"], "did you mean exchange"),
        (["--recipe", "quik"], "did you mean quick"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--clips", "many"], "--clips"),
        (["--noise", "nowhere"], "nowhere: no such folder"),
        (["--data", "nowhere"], "nowhere"),
        (["--steps", "3"], "--steps"),
        (["--seed", "-1"], "--seed -1"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_input(arguments, named, capsys, monkeypatch):
    """It gives more than one line, or something is run."""
    monkeypatch.setattr(tables, "execute", lambda _: pytest.fail("a command ran"))
    assert call(tables, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tables.py: error: ") and error.count("\n") == 1 and named in error
    assert not Path("runs").exists()


def test_a_record_that_is_cut_short(speech, capsys):
    Path("runs/tables").mkdir(parents=True)
    Path("runs/tables/done.json").write_text('{"data": "built')
    assert call(tables, "--data", speech) == 2 and "done.json: truncated" in capsys.readouterr().err
