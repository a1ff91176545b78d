"""The time loop that contains a draw of z: everything in a DVAE's posterior that depends on z_{t−1}.

    u_t = inputs_t + W s_t                                      first layer; the share of known inputs is `inputs_t`
    μ_t, λ_t = affine(act(… act(affine(act(u_t)))))             the rest of `posterior`, last to mean and log-variance
    z_t = μ_t + e^{λ_t/2} ⊙ ε_t
    a_t = act(affine(… act(affine(z_t))))                       `transition`, an activation after each layer
    s_{t+1} = a_t,  or with `lstm`  s_{t+1} = LSTM step of (gates_t + W_ih a_t) from s_t

This is SRNN and DKF (no LSTM), RVAE (LSTM on z) and VRNN (the whole cell, gates_t = W φ(x_t)). An MLP without
layers is an empty list: a_t = z_t, and u_t itself is [μ_t, λ_t].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lstm_scan import lstm_cell

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def latent_scan_reference(
    inputs: Tensor,
    noise: Tensor,
    state: Sequence[Tensor],
    posterior: Sequence[Tensor],
    transition: Sequence[Tensor] = (),
    lstm: Sequence[Tensor] = (),
    gates: Tensor | None = None,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inputs: (batch, frames, width of the first layer), with its bias. noise: ε, (batch, frames, latent).
    state: [s_1], (batch, ·); with `lstm` h_1, c_1 of each layer. posterior: W, then W, b of each further layer;
    transition: W, b of each layer; lstm: W_ih, W_hh, b of each layer. gates: (batch, frames, 4·hidden) or None.

    Returns μ, λ, z (batch, frames, latent) and s (batch, frames, ·), s_t being the state that z_t was drawn with.
    """
    act = ACTIVATIONS[activation]
    state, frames = list(state), []
    for t in range(inputs.shape[1]):
        s = state[-2] if lstm else state[0]
        u = inputs[:, t] + F.linear(s, posterior[0])
        for weight, bias in pairs(posterior[1:]):
            u = F.linear(act(u), weight, bias)
        mean, log_variance = u.chunk(2, dim=-1)
        z = mean + torch.exp(0.5 * log_variance) * noise[:, t]
        frames.append((mean, log_variance, z, s))
        a = z
        for weight, bias in pairs(transition):
            a = act(F.linear(a, weight, bias))
        if not lstm:
            state = [a]
        for layer in range(len(lstm) // 3):
            w_ih, w_hh, bias = lstm[3 * layer : 3 * layer + 3]
            h, c = state[2 * layer : 2 * layer + 2]
            preactivation = F.linear(a, w_ih, bias) + F.linear(h, w_hh)
            if gates is not None and layer == 0:
                preactivation = preactivation + gates[:, t]
            state[2 * layer : 2 * layer + 2] = lstm_cell(preactivation, c)
            a = state[2 * layer]
    return tuple(torch.stack(sequence, dim=1) for sequence in zip(*frames, strict=True))


def pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


latent_scan = latent_scan_reference
