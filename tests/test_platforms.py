"""The package and its scripts work without the modules of Python that only Unix has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")

# Python imports `sitecustomize` at its start. A module that is None in `sys.modules` cannot be
# imported: the attempt raises ImportError.
SITECUSTOMIZE = f"""
import sys
for name in {UNIX_MODULES}:
    sys.modules[name] = None
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import minidvae, train, evaluate

for module in pkgutil.walk_packages(minidvae.__path__, "minidvae."):
    importlib.import_module(module.name)
for name in minidvae.__all__:
    getattr(minidvae, name)
assert sys.modules["fcntl"] is None
"""


@pytest.fixture
def python_without_unix(tmp_path):
    """Return a function that runs Python with these arguments, in an empty folder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "work").mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "MINIDVAE_CACHE": str(tmp_path / "cache"),
    }

    def run(*arguments) -> str:
        finished = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


def test_every_module_is_imported_without_unix_modules(python_without_unix):
    python_without_unix("-c", IMPORT_EVERYTHING)


def test_scripts_run_without_unix_modules(python_without_unix, speech, tmp_path):
    """Training locks its run folder, packing its cache; both must work on Windows."""
    settings = ["--recipe", "quick", "--set", "frames=20", "batch=4"]
    python_without_unix(
        ROOT / "train.py",
        *["--model", "vae", "--data", speech, "--run", "run", "--steps", 2],
        *settings,
    )
    assert not (tmp_path / "work" / "run" / ".lock").exists()
    printed = python_without_unix(ROOT / "evaluate.py", "run", "--limit", 1)
    assert "SI-SDR" in printed
    assert "vae-librispeech" in python_without_unix("-m", "minidvae", "models")
