"""Speech for the tests: a small corpus of our own, and, where they are at hand, real speech and published models."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if (
    not torch.cuda.is_available()
):  # before Triton is imported: fused paths are then tested in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
# Of tests/fuzz, the cases of each test: the same ones every time, or with --hypothesis-profile=long new ones.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=1_000, print_blob=True, **COMMON)
settings.load_profile("short")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real speech and published models: MINIDVAE_SHARED, else `shared` beside the checkout."""
    folder = Path(os.environ.get("MINIDVAE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(
            f"{folder} is not there; MINIDVAE_SHARED names the folder with real speech and published models"
        )
    return folder


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    """A folder split/speaker/*.wav with two seconds or more of synthetic speech per file."""
    from speech_folder import write_speech

    return write_speech(tmp_path_factory.mktemp("speech"), (3, 1, 2), utterances=2)


@pytest.fixture
def shipped(speech, tmp_path, monkeypatch) -> str:
    """A small VAE under the name of a model that ships, in the place of those that do."""
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
