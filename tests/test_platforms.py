"""The package and its scripts work without the modules of Python that only Unix has."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")

SCRIPT = f"""
import importlib, pkgutil, runpy, sys

for name in {UNIX_MODULES}:
    sys.modules[name] = None  # The attempt to import it raises ImportError.

import minidvae

for module in pkgutil.walk_packages(minidvae.__path__, "minidvae."):
    importlib.import_module(module.name)
for name in minidvae.__all__:
    getattr(minidvae, name)

def run(script, *arguments):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

speech, train, evaluate = sys.argv[1:]
data = ["--data", speech, "--device", "cpu"]
small = ["--recipe", "quick", "--steps", "2", "--set", "frames=20", "batch=4"]
run(train, "--model", "vae", "--run", "run", *data, *small)
run(evaluate, "run", "--limit", "1")
sys.argv = ["minidvae", "models"]
runpy.run_module("minidvae", run_name="__main__")
assert sys.modules["fcntl"] is None
"""


def test_package_and_scripts_without_unix_modules(speech, tmp_path):
    """Every module is imported, a model is trained and evaluated. Training locks its run folder, and
    packing its cache; both must work on Windows."""
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, speech, ROOT / "train.py", ROOT / "evaluate.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MINIDVAE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "SI-SDR" in finished.stdout and "vae-librispeech" in finished.stdout
    assert not (tmp_path / "run" / ".lock").exists()
