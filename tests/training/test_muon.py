"""Muon against its definition, a singular value decomposition, and against torch's optimisers."""

import copy

import torch
from torch import nn

from minidvae.training.muon import ITERATIONS, Muon, orthogonal


def parameters(*shapes) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def random_gradients(params) -> list[torch.Tensor]:
    return [torch.randn_like(parameter) for parameter in params]


def step(optimiser, params, gradients) -> None:
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimiser.step()


def step_both(muon, muon_params, reference, reference_params) -> None:
    """Take three steps of two optimisers with the same random gradients."""
    for seed in range(3):
        torch.manual_seed(seed)
        gradients = random_gradients(muon_params)
        step(muon, muon_params, gradients)
        step(reference, reference_params, gradients)


def test_orthogonal_keeps_directions_and_evens_their_sizes():
    """Fails if the singular values are not near 1, or if the singular vectors are not those of the
    gradient."""
    torch.manual_seed(0)
    for shape in ((2, 64, 96), (1, 96, 64), (3, 70, 140)):
        matrices = torch.randn(shape, dtype=torch.float64)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        singular_values = torch.diagonal(left.mT @ orthogonal(matrices) @ right.mT, dim1=1, dim2=2)
        assert singular_values.min() > 0.6
        assert singular_values.max() < 1.2
        expected = left @ torch.diag_embed(singular_values) @ right
        assert (orthogonal(matrices) - expected).abs().max() < 1e-9


def test_matrices_move_as_by_torch_optim_muon():
    """Fails if a matrix moves by more than 2 % otherwise than by torch's Muon, which multiplies in
    bfloat16 and so has 8 bits."""
    shapes = ((64, 80), (128, 64), (64, 80))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours = parameters(*shapes)
    references = parameters(*shapes)
    muon = Muon(ours, **settings)
    reference = torch.optim.Muon(
        references, momentum=0.95, ns_steps=ITERATIONS, adjust_lr_fn="match_rms_adamw", **settings
    )
    step_both(muon, ours, reference, references)
    for value, reference_value, start in zip(ours, references, parameters(*shapes), strict=True):
        movement = value - start
        expected = reference_value - start
        assert (movement - expected).norm() < 0.02 * expected.norm()


def test_all_other_parameters_move_as_by_adamw():
    """Fails if vectors, narrow matrices or the groups with `muon=False` are not moved by AdamW."""
    shapes = ((64,), (63, 200), (70, 70))
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-9}
    ours = parameters(*shapes)
    references = parameters(*shapes)
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "muon": False}], **settings)
    reference = torch.optim.AdamW(references, **settings)
    step_both(muon, ours, reference, references)
    for value, expected in zip(ours, references, strict=True):
        assert torch.equal(value, expected)


def test_the_state_comes_back_from_a_checkpoint():
    """Fails if an optimiser with the state of another one takes other steps."""
    original = parameters((64, 80), (64,))
    first = Muon(original, lr=0.02)
    torch.manual_seed(1)
    gradients = [random_gradients(original) for _ in range(3)]
    step(first, original, gradients[0])
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in original]
    second = Muon(copies, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradients_of_step in gradients[1:]:
        step(first, original, gradients_of_step)
        step(second, copies, gradients_of_step)
    for expected, value in zip(original, copies, strict=True):
        assert torch.equal(expected, value)
