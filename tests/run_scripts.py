"""How the tests call the command-line scripts: in this process, in a folder of their own."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

import evaluate as evaluate_script  # noqa: F401
import minidvae.__main__ as command
import train as train_script  # noqa: F401
from minidvae import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def surroundings(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIDVAE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(script, *arguments) -> int:
    """The exit code of a script, called as `python SCRIPT.py ARGUMENTS` would be."""
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, arguments)]
    try:
        cli.run(script.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def log(run) -> list[dict]:
    """The reports of a run without their times."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def minidvae_command(*arguments) -> int:
    before, sys.argv = sys.argv, ["minidvae", *map(str, arguments)]
    try:
        command.console()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def results_of(run, task: str) -> Path:
    """The folder with the results of the only evaluation of a run by a task."""
    (folder,) = (Path(run) / "eval" / task).iterdir()
    return folder
