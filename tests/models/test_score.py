"""`score`, which training, decoding from the model's own past and posterior inference share."""

import pytest
import torch

from minidvae.models import MODELS, build_model
from minidvae.models.base import DVAE, past
from minidvae.models.light_dvae import LigHTDVAE

DVAES = [name for name, (kind, _) in MODELS.items() if issubclass(kind, DVAE)]
SIZES = {"width": 8, "feedforward": 8, "layers": 1, "w_embedding": 4, "w_hidden": 4, "w_layers": 1}


def model_and_output(name: str, frames: int = 5):
    """Return a model in float64, a spectrum, and the model's output for it. Weights are doubled so
    that outputs depend visibly on all inputs."""
    torch.manual_seed(0)
    sizes = SIZES if issubclass(MODELS[name][0], LigHTDVAE) else {}
    if "local" in name:
        sizes = sizes | {"context": 3, "phases": 2, "heads": 2}
    model = build_model(name, bins=6, latent=3, input_scale="root", **sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    x = torch.rand(2, frames, 6, dtype=torch.float64) + 0.1
    noise = model.draw_noise(2, frames, torch.Generator().manual_seed(1))
    return model, x, model(x, noise)


@pytest.mark.parametrize("name", DVAES)
def test_score_is_what_training_computes(name):
    model, x, output = model_and_output(name)
    log_variance, p_z = model.score(past(model.input_scale(x)), output.z, output.w)
    torch.testing.assert_close(log_variance, output.log_variance)
    assert (p_z is None) == (output.p_z is None)
    if p_z is not None:
        torch.testing.assert_close(tuple(p_z), tuple(output.p_z))


@pytest.mark.parametrize("name", [name for name in DVAES if MODELS[name][0].autoregressive])
def test_score_is_what_decoding_from_the_own_past_computes(name):
    """A decoded utterance must be a fixed point: its own past gives it again."""
    model, x, output = model_and_output(name)
    noise = model.draw_noise(2, 5, torch.Generator().manual_seed(1))
    decoded = model.resynthesise(x, "generation", noise)
    scored, _ = model.score(past(model.feed_back(decoded)), output.z, output.w)
    torch.testing.assert_close(scored, decoded)


@pytest.mark.parametrize("name", DVAES)
def test_score_is_differentiable_in_past_and_latents(name):
    """Gradients must be those of finite differences. Posterior inference by gradients needs them,
    with the weights frozen."""
    model, x, output = model_and_output(name, frames=3)
    model.requires_grad_(False)
    inputs = [past(model.input_scale(x)), output.z]
    if output.w is not None:
        inputs.append(output.w)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]

    def score(*inputs):
        log_variance, p_z = model.score(*inputs)
        return log_variance, *(p_z or ())

    assert torch.autograd.gradcheck(score, inputs)
    log_variance, *_ = score(*inputs)
    gradients = torch.autograd.grad(log_variance.sum(), inputs, allow_unused=True)
    assert (gradients[0] is not None) == model.autoregressive
    assert all(gradient is not None for gradient in gradients[1:])
