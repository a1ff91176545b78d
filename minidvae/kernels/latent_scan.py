"""The time loop that contains a draw of z: everything in a DVAE's posterior that depends on
z_{t−1}.

    u_t = inputs_t + W s_t                           first layer; `inputs_t` does not depend on z
    μ_t, λ_t = affine(act(… act(affine(act(u_t)))))  the rest of `posterior`
    z_t = μ_t + e^{λ_t/2} ⊙ ε_t
    a_t = act(affine(… act(affine(z_t))))            `transition`, an activation after each layer
    s_{t+1} = a_t,  or with `lstm`  s_{t+1} = LSTM step of (gates_t + W_ih a_t) from s_t

This is SRNN and DKF (no LSTM), RVAE (LSTM on z) and VRNN (the whole cell, gates_t = W φ(x_t)). An
MLP without layers is an empty list: a_t = z_t, and u_t itself is [μ_t, λ_t].

`latent_scan_triton.py` has the passes for a GPU, one launch each, `latent_scan_loop.py` those for
all else.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import latent_scan_loop, latent_scan_triton
from .common import differentiates_once, without_autocast
from .lstm_scan import LSTMWeights, lstm_cell


class ScanArguments(NamedTuple):
    inputs: Tensor  # (batch, frames, width of the first layer), its bias included
    noise: Tensor  # ε, (batch, frames, latent)
    state: Sequence  # [s_1], (batch, ·); with `lstm` the pair (h_1, c_1) of each layer
    first: Tensor  # W, (width of the first layer, state)
    posterior: Sequence[tuple[Tensor, Tensor]]  # weight and bias of each further layer
    transition: Sequence[tuple[Tensor, Tensor]] = ()  # of each layer
    lstm: Sequence[LSTMWeights] = ()
    gates: Tensor | None = (
        None  # (batch, frames, 4·hidden), in place of the first LSTM layer's bias
    )


def latent_scan_reference(
    inputs,
    noise,
    state,
    first,
    posterior,
    transition=(),
    lstm=(),
    gates=None,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments: as in `ScanArguments`; activation: "tanh" or "relu".

    Returns μ, λ, z (batch, frames, latent) and s (batch, frames, ·), s_t being the state that z_t
    was drawn with.
    """
    act, state, frames = getattr(torch, activation), list(state), []
    for t in range(inputs.shape[1]):
        s = state[-1][0] if lstm else state[0]
        u = inputs[:, t] + F.linear(s, first)
        for weight, bias in posterior:
            u = F.linear(act(u), weight, bias)
        mean, log_variance = u.chunk(2, dim=-1)
        z = mean + torch.exp(0.5 * log_variance) * noise[:, t]
        frames.append((mean, log_variance, z, s))
        a = z
        for weight, bias in transition:
            a = act(F.linear(a, weight, bias))
        if not lstm:
            state = [a]
        for layer, (w_ih, w_hh, bias) in enumerate(lstm):
            h, c = state[layer]
            known = gates[:, t] if bias is None else bias
            state[layer] = lstm_cell(known + F.linear(a, w_ih) + F.linear(h, w_hh), c)
            a = state[layer][0]
    return tuple(torch.stack(sequence, dim=1) for sequence in zip(*frames, strict=True))


class LatentScan(torch.autograd.Function):
    """By the passes of a module; `form` says which of the tensors is which argument."""

    @staticmethod
    def forward(ctx, passes, activation, form, *tensors):
        given = tree_unflatten(tensors, form)
        outputs, written = passes.forward(given, activation)
        saved, ctx.form = tree_flatten(
            (given._replace(inputs=None, noise=None, gates=None), outputs, written)
        )
        ctx.save_for_backward(*saved)
        ctx.passes, ctx.activation = passes, activation
        return outputs

    @staticmethod
    def backward(ctx, *d_outputs):
        differentiates_once("latent_scan")
        given, outputs, written = tree_unflatten(ctx.saved_tensors, ctx.form)
        with without_autocast(d_outputs[0].device):  # autograd may run inside of a region
            gradients = ctx.passes.backward(given, ctx.activation, outputs, written, d_outputs)
        return None, None, None, *tree_leaves(gradients)


def apply(
    passes, arguments: ScanArguments, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, form = tree_flatten(arguments)
    return LatentScan.apply(passes, activation, form, *tensors)


def latent_scan(
    inputs,
    noise,
    state,
    first,
    posterior,
    transition=(),
    lstm=(),
    gates=None,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`latent_scan_reference`, by the fastest path for these tensors; all are brought to the dtype
    of the noise. The gradient of its gradient is an error, except where the definition serves."""
    given = ScanArguments(inputs, noise, state, first, posterior, transition, lstm, gates)
    if torch.compiler.is_compiling():  # as it is, between two graphs
        return torch.compiler.disable(latent_scan)(*given, activation)
    given = tree_map(lambda tensor: None if tensor is None else tensor.to(noise.dtype), given)
    with without_autocast(noise.device):
        sequences = [sequence for sequence in (given.inputs, given.gates) if sequence is not None]
        fits = all(sequence.shape[:2] == noise.shape[:2] for sequence in sequences)
        fits = fits and all(len(part) == len(noise) for part in tree_leaves(given.state))
        if (
            not fits
            or noise.dtype not in (torch.float32, torch.float64)
            or len(lstm) > 1
            or noise.requires_grad
        ):
            return latent_scan_reference(*given, activation)
        fused = noise.is_cuda and latent_scan_triton.fusible(given)
        return apply(latent_scan_triton if fused else latent_scan_loop, given, activation)
