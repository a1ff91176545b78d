"""Checkpoints are whole, safe to read, and refused where they do not fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidvae.data.audio import STFT
from minidvae.files import CheckpointError
from minidvae.models import build_model
from minidvae.training import checkpoint


def test_round_trip(tmp_path):
    model = build_model("vae", bins=257, hidden=(8, 4), input_scale="root")
    model.fit_statistics(torch.rand(2, 5, 257))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT(512, 128), step=7)
    again, stft, content = checkpoint.restore(tmp_path / "x.pt")
    assert stft == STFT(512, 128) and content["step"] == 7 and again.config == model.config
    for name, value in model.state_dict().items():  # the input scale's statistics among them
        assert torch.equal(value, again.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_checkpoints_of_version_0_2(tmp_path):
    """They have a setting that moved positions in training, and only there."""
    model = build_model("light_dvae", width=16, feedforward=8, layers=1, w_embedding=8, w_hidden=8)
    checkpoint.save(tmp_path / "x.pt", "light_dvae", model, STFT())
    content = torch.load(tmp_path / "x.pt")
    content["config"] = {
        name: content["config"][name] for name in ("width", "feedforward", "layers", "bins")
    }
    content["config"] |= {"w_embedding": 8, "w_hidden": 8, "position_offset": 2000}
    torch.save(content, tmp_path / "x.pt")
    assert checkpoint.restore(tmp_path / "x.pt")[0].config == model.config


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    model = build_model("vae", hidden=(8,))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT(), step=1)

    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "x.pt", "vae", model, STFT(), step=2)
    assert checkpoint.restore(tmp_path / "x.pt")[2]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


class Mischief:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"format": "minidvae", "model": Mischief()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.restore(tmp_path / "x.pt")


def test_a_parameter_that_does_not_fit_is_named(tmp_path):
    model = build_model("vae", hidden=(8,))
    parameters = model.state_dict()
    key = next(iter(parameters))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT())
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    for wrong, named in (
        ({k: v for k, v in parameters.items() if k != key}, key),
        (parameters | {key: torch.zeros(3)}, key),
        (parameters | {"more": torch.zeros(3)}, "more"),
    ):
        torch.save(content | {"parameters": wrong}, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match=f"y.pt: .*{named}") as error:
            checkpoint.restore(tmp_path / "y.pt")
        assert "\n" not in str(error.value)


def test_unknown_content_is_refused(tmp_path):
    model = build_model("vae", hidden=(8,))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT())
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    for change in (
        {"model": "rnn"},
        {"config": {"depth": 3}},
        {"stft": {"hop": 700}},
        {"parameters": {}},
    ):
        torch.save(content | change, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match="y.pt"):
            checkpoint.restore(tmp_path / "y.pt")


@pytest.mark.parametrize(
    "settings",
    [{"hidden": (2**16, 2**16)}, {"bins": 2**24}, {"hidden": (-1,)}],
)
def test_no_model_of_sizes_that_the_file_has_not(settings, tmp_path):
    """A file of some kB makes a model of gigabytes before it is refused."""
    checkpoint.save(tmp_path / "x.pt", "vae", build_model("vae", hidden=(8,)), STFT())
    content = torch.load(tmp_path / "x.pt")
    content["config"] |= settings
    torch.save(content, tmp_path / "x.pt")
    script = f"""
import resource, sys
from minidvae.training import checkpoint
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    checkpoint.restore({str(tmp_path / "x.pt")!r})
except checkpoint.CheckpointError:
    sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit > 200_000)  # kB
sys.exit("not refused")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_parameters_of_another_kind_of_number(dtype, tmp_path):
    """They are converted, unsaid."""
    model = build_model("vae", hidden=(8,))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT())
    content = torch.load(tmp_path / "x.pt")
    content["parameters"]["output.bias"] = content["parameters"]["output.bias"].to(dtype)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt"):
        checkpoint.restore(tmp_path / "x.pt")


def test_terms_of_several_steps_name_the_first_that_is_not_finite(tmp_path):
    """On a GPU the terms are read at reports. Fails where the step, or the cause before the sum, is lost."""
    from types import SimpleNamespace

    import train as script

    run = SimpleNamespace(folder=tmp_path)
    steps = [
        {"loss": torch.tensor(a), "kl_z": torch.tensor(b)}
        for a, b in ((1.0, 0.5), (2.0, 0.25), (3.0, 0.125))
    ]
    assert script.read_terms(steps, run, 6) == [
        {"loss": a["loss"], "kl_z": a["kl_z"]} for a in steps
    ]
    steps[1] = {"loss": torch.tensor(torch.nan), "kl_z": torch.tensor(torch.inf)}
    with pytest.raises(CheckpointError, match="step 5: kl_z is inf"):
        script.read_terms(steps, run, 6)
