"""Checkpoints: written completely or not at all, safe to read, refused where they do not fit."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train as train_script
from minidvae.data.audio import STFT
from minidvae.files import CheckpointError
from minidvae.models import build_model
from minidvae.training import checkpoint


def save_vae(path) -> dict:
    """Write the checkpoint of a small VAE; return its content."""
    checkpoint.save(path, "vae", build_model("vae", hidden=(8,)), STFT())
    return torch.load(path, weights_only=True)


def test_round_trip(tmp_path):
    """Fails if settings, parameters, the statistics of the input scale or the STFT change, or if a
    second file is left behind."""
    model = build_model("vae", bins=257, hidden=(8, 4), input_scale="root")
    model.fit_statistics(torch.rand(2, 5, 257))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT(512, 128), step=7)
    restored, stft, content = checkpoint.restore(tmp_path / "x.pt")
    assert stft == STFT(512, 128)
    assert content["step"] == 7
    assert restored.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_checkpoints_of_version_0_2(tmp_path):
    """Fails if a checkpoint of version 0.2 is refused because of `position_offset`, a setting that
    moved positions in training only."""
    model = build_model("light_dvae", width=16, feedforward=8, layers=1, w_embedding=8, w_hidden=8)
    checkpoint.save(tmp_path / "x.pt", "light_dvae", model, STFT())
    content = torch.load(tmp_path / "x.pt")
    config = {name: content["config"][name] for name in ("width", "feedforward", "layers", "bins")}
    config |= {"w_embedding": 8, "w_hidden": 8, "position_offset": 2000}
    torch.save(content | {"config": config}, tmp_path / "x.pt")
    restored, _, _ = checkpoint.restore(tmp_path / "x.pt")
    assert restored.config == model.config


def test_a_full_disk_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    """Fails if a checkpoint that does not fit on the disk replaces the one before, or leaves half a
    file."""
    model = build_model("vae", hidden=(8,))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT(), step=1)

    def save_half(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "x.pt", "vae", model, STFT(), step=2)
    _, _, content = checkpoint.restore(tmp_path / "x.pt")
    assert content["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


class RunsCodeWhenUnpickled:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """Fails if reading a checkpoint runs code that is pickled in it."""
    torch.save({"format": "minidvae", "model": RunsCodeWhenUnpickled()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.restore(tmp_path / "x.pt")


def test_a_parameter_that_does_not_fit_is_named(tmp_path):
    """Fails if a parameter that is missing, of another shape or unknown is taken, or if the error
    does not name it."""
    content = save_vae(tmp_path / "x.pt")
    parameters = content["parameters"]
    key = next(iter(parameters))
    all_but_one = {name: value for name, value in parameters.items() if name != key}
    for changed, expected in (
        (all_but_one, key),
        (parameters | {key: torch.zeros(3)}, key),
        (parameters | {"more": torch.zeros(3)}, "more"),
    ):
        torch.save(content | {"parameters": changed}, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match=f"y.pt: .*{expected}") as error:
            checkpoint.restore(tmp_path / "y.pt")
        assert "\n" not in str(error.value)


def test_unknown_content_is_refused(tmp_path):
    """Fails if an unknown model or setting, an STFT that cannot be, or no parameters are taken."""
    content = save_vae(tmp_path / "x.pt")
    for change in (
        {"model": "rnn"},
        {"config": {"depth": 3}},
        {"stft": {"hop": 700}},
        {"parameters": {}},
    ):
        torch.save(content | change, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match="y.pt"):
            checkpoint.restore(tmp_path / "y.pt")


MEASURE_MEMORY = """
import resource, sys
from minidvae.training import checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    checkpoint.restore(sys.argv[1])
except checkpoint.CheckpointError:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.exit(kilobytes > 200_000)
sys.exit("not refused")
"""


@pytest.mark.parametrize(
    "settings", [{"hidden": (2**16, 2**16)}, {"bins": 2**24}, {"hidden": (-1,)}]
)
def test_no_model_of_sizes_that_the_file_does_not_have(settings, tmp_path):
    """Fails if a file of some kB makes a model of gigabytes before it is refused."""
    content = save_vae(tmp_path / "x.pt")
    content["config"] |= settings
    torch.save(content, tmp_path / "x.pt")
    command = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path / "x.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_parameters_of_another_data_type(dtype, tmp_path):
    """Fails if integers or booleans are converted to parameters without an error."""
    content = save_vae(tmp_path / "x.pt")
    content["parameters"]["output.bias"] = content["parameters"]["output.bias"].to(dtype)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt"):
        checkpoint.restore(tmp_path / "x.pt")


def test_terms_of_several_steps_name_the_first_that_is_not_finite(tmp_path):
    """Fails if the error, where the terms of several steps are read at once (on a GPU), does not
    name the first step that is not finite, or names the sum instead of its term."""
    run = SimpleNamespace(folder=tmp_path)
    values = [
        {"loss": 1.0, "kl_z": 0.5},
        {"loss": 2.0, "kl_z": 0.25},
        {"loss": 3.0, "kl_z": 0.125},
    ]
    steps = []
    for terms in values:
        steps.append({name: torch.tensor(value) for name, value in terms.items()})
    assert train_script.read_terms(steps, run, 6) == values
    steps[1] = {"loss": torch.tensor(torch.nan), "kl_z": torch.tensor(torch.inf)}
    with pytest.raises(CheckpointError, match="step 5: kl_z is inf"):
        train_script.read_terms(steps, run, 6)
