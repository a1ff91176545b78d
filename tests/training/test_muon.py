"""Muon against its definition, a singular value decomposition, and against torch's own."""

import copy

import torch
from torch import nn

from minidvae.training.muon import ITERATIONS, Muon, orthogonal


def parameters(*shapes) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def step(optimiser, params, gradients) -> None:
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimiser.step()


def test_orthogonal_keeps_directions_and_evens_their_sizes():
    torch.manual_seed(0)
    for shape in ((2, 64, 96), (1, 96, 64), (3, 70, 140)):
        matrices = torch.randn(shape, dtype=torch.float64)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        sizes = torch.diagonal(left.mT @ orthogonal(matrices) @ right.mT, dim1=1, dim2=2)
        assert sizes.min() > 0.6 and sizes.max() < 1.2
        rest = orthogonal(matrices) - left @ torch.diag_embed(sizes) @ right
        assert rest.abs().max() < 1e-9  # the singular vectors are the gradient's


def test_matrices_move_as_by_torch_optim_muon():
    """torch's multiplies in bfloat16, so the two agree to its 8 bits."""
    shapes, settings = ((64, 80), (128, 64), (64, 80)), dict(lr=0.02, weight_decay=0.1)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    a = Muon(ours, **settings)
    b = torch.optim.Muon(
        theirs, momentum=0.95, ns_steps=ITERATIONS, adjust_lr_fn="match_rms_adamw", **settings
    )
    for seed in range(3):
        torch.manual_seed(seed)
        gradients = [torch.randn_like(parameter) for parameter in ours]
        step(a, ours, gradients), step(b, theirs, gradients)
    for mine, other, start in zip(ours, theirs, parameters(*shapes), strict=True):
        moved, expected = mine - start, other - start
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_all_else_moves_as_by_adamw():
    """Vectors, narrow matrices, and groups that ask for it."""
    shapes, settings = (
        ((64,), (63, 200), (70, 70)),
        dict(lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-9),
    )
    ours, theirs = parameters(*shapes), parameters(*shapes)
    a = Muon([{"params": ours[:2]}, {"params": ours[2:], "muon": False}], **settings)
    b = torch.optim.AdamW(theirs, **settings)
    for seed in range(3):
        torch.manual_seed(seed)
        gradients = [torch.randn_like(parameter) for parameter in ours]
        step(a, ours, gradients), step(b, theirs, gradients)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_its_state_comes_back_from_a_checkpoint():
    shapes = ((64, 80), (64,))
    ours = parameters(*shapes)
    first = Muon(ours, lr=0.02)
    torch.manual_seed(1)
    gradients = [[torch.randn_like(parameter) for parameter in ours] for _ in range(3)]
    step(first, ours, gradients[0])
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    second = Muon(copies, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for some in gradients[1:]:
        step(first, ours, some), step(second, copies, some)
    assert all(torch.equal(mine, copy) for mine, copy in zip(ours, copies, strict=True))
