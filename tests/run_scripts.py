"""Calls of the command-line scripts in the process of the tests, in a temporary folder."""

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
    """Change to a temporary folder, with a cache that all tests share; restore afterwards the
    signal handlers and the number of threads, which the scripts change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIDVAE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(script, *arguments) -> int:
    """Return the exit code of a script, called as `python SCRIPT.py ARGUMENTS` would."""
    return exit_code(lambda: cli.run(script.main), f"{script.__name__}.py", arguments)


def minidvae_command(*arguments) -> int:
    """Return the exit code of the command `minidvae ARGUMENTS`."""
    return exit_code(command.console, "minidvae", arguments)


def exit_code(main, program: str, arguments) -> int:
    """Return the exit code of a function that reads its arguments from sys.argv."""
    argv_before = sys.argv
    sys.argv = [program, *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv_before
    return 0


def log(run) -> list[dict]:
    """Return the reports of a run without their times."""
    reports = []
    for line in (Path(run) / "log.jsonl").read_text().splitlines():
        report = json.loads(line)
        report.pop("seconds", None)
        reports.append(report)
    return reports


def results_of(run, task: str) -> Path:
    """Return the folder with the results of the only evaluation of a run by a task."""
    (folder,) = (Path(run) / "eval" / task).iterdir()
    return folder
