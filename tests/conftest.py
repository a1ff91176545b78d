"""Fixtures of all tests: a small corpus of synthetic speech, a small model that ships, and the
folder with real speech and published models."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# If there is no GPU, the fused paths are tested in Triton's interpreter. Triton reads this variable
# when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
# The tests of tests/fuzz use the same cases every time; --hypothesis-profile=long uses new ones.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=1_000, print_blob=True, **COMMON)
settings.load_profile("short")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real speech and published models: MINIDVAE_SHARED, by default the
    folder `shared` next to the checkout. Tests that need it are skipped where it does not exist."""
    folder = Path(os.environ.get("MINIDVAE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(
            f"{folder} is not there; MINIDVAE_SHARED names the folder with real speech and "
            "published models"
        )
    return folder


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    """Return a folder split/speaker/*.wav with at least two seconds of synthetic speech per
    file."""
    from speech_folder import write_speech

    return write_speech(tmp_path_factory.mktemp("speech"), (3, 1, 2), utterances=2)


@pytest.fixture
def shipped(speech, tmp_path, monkeypatch) -> str:
    """Return the name of a small VAE that ships, in a temporary folder that replaces the folder of
    the models that ship. It is made of the run `run`."""
    import pretrained as pretrained_script
    from run_scripts import call, train_script

    from minidvae.training import checkpoint

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr(pretrained_script, "PRETRAINED", tmp_path / "pretrained")
    arguments = ["--recipe", "quick", "--data", speech, "--run", "run", "--steps", 4]
    assert call(train_script, "--model", "vae", *arguments, "--set", "frames=20", "batch=4") == 0
    assert call(pretrained_script, "run", "vae-test") == 0
    return "vae-test"
