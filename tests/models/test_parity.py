"""The models against vectors that the published code made: outputs, loss terms and every gradient.

`parity/` holds small random models. The published models and their vectors are read from the folder
of the fixture `shared`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minidvae.models import published
from minidvae.models.base import Noise, past
from minidvae.models.published import import_dvae_speech, load_dvae_speech

TINY = sorted((Path(__file__).parent / "parity").glob("*.npz"))
PUBLISHED = ["vae", "dkf", "storn", "vrnn", "srnn", "rvae-causal", "rvae-noncausal"]


def tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the arrays of a file whose names begin with `prefix`, under their names without it."""
    with np.load(path) as data:
        names = [name for name in data.files if name.startswith(prefix) and name != "config"]
        return {name.removeprefix(prefix): torch.from_numpy(data[name]) for name in names}


def tiny_model(path: Path, tensors_of: str = "param/") -> torch.nn.Module:
    with np.load(path) as data:
        network = json.loads(str(data["config"]))
    network["name"] = path.stem.split("-")[0].upper()
    return import_dvae_speech(tensors(path, tensors_of), network)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    scale = expected.abs().max().item() or 1.0
    error = (actual - expected).abs().max().item() / scale
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


def noise_of(expected: dict[str, torch.Tensor]) -> Noise:
    """Return the draws of a parity file. Those for scheduled sampling are zeros, so that with
    probability 1 no past is the true one."""
    batch, frames = expected["x"].shape[:2]
    return Noise(expected["eps"], expected.get("eps_v"), torch.zeros(batch, frames, 1))


def check_forward(
    model: torch.nn.Module, expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Assert that outputs and loss terms are the expected ones; leave the gradients of the loss in
    the model."""
    noise = noise_of(expected)
    output = model(expected["x"], noise)
    zeros = torch.zeros_like(output.z)
    p_z = output.p_z or (zeros, zeros)
    actual = {
        "variance": output.log_variance.exp(),
        "z": output.z,
        "z_mean": output.q_z.mean,
        "z_logvar": output.q_z.log_variance,
        "prior_mean": p_z[0],
        "prior_logvar": p_z[1],
    }
    loss, terms = model.loss(expected["x"], noise)
    actual |= {"recon": terms["reconstruction"], "kl": terms["kl_z"], "loss": loss}
    if output.q_w is not None:
        actual |= {
            "v": output.w,
            "v_mean": output.q_w.mean,
            "v_logvar": output.q_w.log_variance,
            "kl_v": terms["kl_w"],
        }  # The published code calls w v.
    for name, value in actual.items():
        assert_close(value, expected[name], tolerance, name)
    loss.backward()


def use_path(model: torch.nn.Module, path: str) -> None:
    if path == "reference":
        if not hasattr(model, "forward_reference"):
            pytest.skip("has no recurrence, and one path only")
        # The `forward` of autoregressive models also takes the scheduled-sampling probability.
        model.forward = lambda x, noise, probability=0.0: model.forward_reference(x, noise)


@pytest.mark.parametrize("path", ["shipped", "reference"])
@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_tiny(file, path):
    """Fails if an equation of a model differs from the published code."""
    model = tiny_model(file)
    use_path(model, path)
    check_forward(model, tensors(file), 1e-5)
    # A model that holds the expected gradients as its parameters has them under our names.
    model_of_gradients = tiny_model(file, tensors_of="grad/")
    expected = dict(model_of_gradients.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-5, name)


@pytest.mark.parametrize("name", ["srnn", "srnn-2layer"])
def test_tiny_own_past(name):
    """Decoding from the model's own past must give the published output, in resynthesis and as
    scheduled sampling with probability 1."""
    file = next(file for file in TINY if file.stem == name)
    model = tiny_model(file)
    expected = tensors(file)
    resynthesis = model.resynthesise(expected["x"], "generation", noise_of(expected))
    assert_close(resynthesis.exp(), expected["gen_variance"], 1e-5, "gen_variance")
    output = model(expected["x"], noise_of(expected), scheduled_sampling_prob=1.0)
    variance = output.log_variance.exp()
    assert_close(variance, expected["gen_variance"], 1e-5, "gen_variance, scheduled")
    assert_close(output.p_z.mean, expected["gen_prior_mean"], 1e-5, "gen_prior_mean")
    assert_close(output.p_z.log_variance, expected["gen_prior_logvar"], 1e-5, "gen_prior_logvar")


@pytest.mark.parametrize("path", ["shipped", "reference"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published(shared, name, path):
    """Fails if a published checkpoint does not give the published outputs and gradients."""
    model, stft = load_dvae_speech(shared / "checkpoints" / name)
    assert (stft.window_length, stft.hop) == (512, 256)
    use_path(model, path)
    file = shared / "parity" / "published" / f"{name}.npz"
    check_forward(model, tensors(file), 1e-4)
    norms = tensors(file, "gradnorm/")
    for key, parameter in model.named_parameters():
        theirs = published.their_key(name.split("-")[0], key, vars(model.config))
        assert_close(parameter.grad.norm(), norms.pop(theirs), 1e-4, theirs)
    assert not norms


def test_published_own_past(shared):
    """Generation from the model's own past amplifies rounding in SRNN. So it is compared one step
    at a time, from the expected past, and freely for the first 32 frames."""
    model, _ = load_dvae_speech(shared / "checkpoints" / "srnn")
    expected = tensors(shared / "parity" / "published" / "srnn.npz")
    with torch.no_grad():
        z = expected["z"]
        h = model.lstm_h(model.mlp_x(past(expected["gen_variance"])))
        prior = model.infer_prior(h, past(z))
        assert_close(model.likelihood(h, z).exp(), expected["gen_variance"], 1e-4, "gen_variance")
        assert_close(prior.mean, expected["gen_prior_mean"], 1e-4, "gen_prior_mean")
        assert_close(prior.log_variance, expected["gen_prior_logvar"], 1e-4, "gen_prior_logvar")
    free = model.resynthesise(expected["x"], "generation", noise_of(expected))[:, :32]
    assert_close(free.exp(), expected["gen_variance"][:, :32], 1e-3, "gen_variance, free")
