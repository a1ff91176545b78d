"""How the tests call train.py and evaluate.py: in this process, in a folder of their own."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from minidvae import command_line

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import evaluate as evaluate_door  # noqa: E402, F401
import train as train_door  # noqa: E402, F401


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


def call(door, *arguments) -> int:
    """The door's exit code, called as `python door.py ARGUMENTS` would."""
    before, sys.argv = sys.argv, [f"{door.__name__}.py", *map(str, arguments)]
    try:
        command_line.run(door.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def log(run) -> list[dict]:
    """The reports of a run without their times."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
