"""Checkpoints are whole, safe to read, and refused where they do not fit."""

import pytest
import torch

from minidvae.data.audio import STFT
from minidvae.models import build_model
from minidvae.models.parameters import CheckpointError, check_parameters
from minidvae.training import checkpoint


def test_round_trip(tmp_path):
    model = build_model("vae", hidden=(8, 4), input_scale="root")
    model.fit_statistics(torch.rand(2, 5, 513))
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
    content["config"] = {name: content["config"][name] for name in ("width", "feedforward", "layers", "bins")}
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


def test_first_mismatch_is_named():
    model = build_model("vae", hidden=(8,))
    parameters = model.state_dict()
    key = next(iter(parameters))
    for wrong, expected in (
        ({k: v for k, v in parameters.items() if k != key}, f"'{key}' is missing"),
        (parameters | {key: torch.zeros(3)}, r"shape \(3,\)"),
        (parameters | {"more": torch.zeros(3)}, "'more'"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            check_parameters(parameters, wrong, "x.pt: ")


def test_unknown_content_is_refused(tmp_path):
    model = build_model("vae", hidden=(8,))
    checkpoint.save(tmp_path / "x.pt", "vae", model, STFT())
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    for change in ({"model": "rnn"}, {"config": {"depth": 3}}, {"stft": {"hop": 700}}, {"parameters": {}}):
        torch.save(content | change, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match="y.pt"):
            checkpoint.restore(tmp_path / "y.pt")
