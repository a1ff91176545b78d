"""The loop of `latent_scan.py` in plain PyTorch, for at most one LSTM layer.

Everything is written into sequences (frames, batch, ·) allocated once, whose frames one `unbind`
takes: `…_at[t]`. Backward goes to the preactivations only; weight gradients are products over all
frames afterwards.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .lstm_scan import lstm_cell_forward

ACTIVATION_BACKWARD = {  # (gradient, output, where to write)
    "tanh": lambda d, y, out: torch.ops.aten.tanh_backward.grad_input(d, y, grad_input=out),
    "relu": lambda d, y, out: torch.ops.aten.threshold_backward.grad_input(d, y, 0, grad_input=out),
}
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Sequences(NamedTuple):
    """What the loop writes and backward reads, (frames, batch, ·)."""

    u: list[Tensor]  # after each layer of the posterior; the last is [μ, λ]
    a: list[Tensor]  # z, and after each layer of the transition
    s: Tensor
    a_and_s: Tensor | None = (
        None  # with an LSTM side by side in memory, so that one product makes all gates
    )
    gates: Tensor | None = None  # activated
    c: Tensor | None = None
    tanh_c: Tensor | None = None  # of c_{t+1}


def new_sequences(given) -> Sequences:
    batch, frames, latent = given.noise.shape

    def new(width: int, length: int = frames) -> Tensor:
        return given.noise.new_empty(length, batch, width)

    u = [new(len(weight)) for weight in (given.first, *(weight for weight, _ in given.posterior))]
    *inner, last = latent, *(len(bias) for _, bias in given.transition)
    a, hidden = [new(width) for width in inner], given.first.shape[1]
    if not given.lstm:  # the last a is s, a frame later
        states = new(last, frames + 1)
        return Sequences(u, [*a, states[1:]], states[:-1])
    a_and_s = new(last + hidden)
    after, s = a_and_s.split([last, hidden], dim=-1)
    return Sequences(u, [*a, after], s, a_and_s, new(4 * hidden), new(hidden), new(hidden))


def by_frame(*sequences: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(sequence.unbind(0) for sequence in sequences), strict=True))


def gate_views(gates: Tensor) -> list[tuple[Tensor, ...]]:
    """For each frame: i and f in one, i, f, g, o"""
    hidden = gates.shape[-1] // 4
    return by_frame(gates[..., : 2 * hidden], *gates.split(hidden, dim=-1))


def lstm_cell_backward(
    gates, c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, d_gates
) -> None:
    """The gradient of the gates before their activation, into d_gates; dc becomes the gradient of
    c_{t−1}."""
    i_and_f, i, f, g, o = gates
    di_and_df, di, df, dg, do = d_gates
    torch.mul(dh, tanh_c, out=do)
    dc += tanh_backward(torch.mul(dh, o, out=di), tanh_c, grad_input=di)
    torch.mul(dc, g, out=di)
    torch.mul(dc, c_before, out=df)
    torch.mul(dc, i, out=dg)
    sigmoid_backward(di_and_df, i_and_f, grad_input=di_and_df)
    tanh_backward(dg, g, grad_input=dg)
    sigmoid_backward(do, o, grad_input=do)
    dc *= f


def exchange(sequence: Tensor) -> Tensor:
    """A copy with frames and batch exchanged"""
    return sequence.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def forward(given, activation: str) -> tuple[tuple[Tensor, ...], Sequences]:
    """μ, λ, z, s, and what backward reads, of `ScanArguments`"""
    act_, (_, frames, latent) = getattr(torch, f"{activation}_"), given.noise.shape
    written = new_sequences(given)
    u_at, a_at, s_at = by_frame(*written.u), by_frame(*written.a), written.s.unbind(0)
    if given.lstm:
        w_ih, w_hh, bias = given.lstm[0]
        w_gates = torch.cat([w_ih, w_hh], dim=1).t()
        known_at = [bias] * frames if given.gates is None else given.gates.unbind(1)
        a_and_s_at, all_gates_at, c_at, tanh_c_at = (sequence.unbind(0) for sequence in written[3:])
        gates_at = gate_views(written.gates)
        s_at[0].copy_(given.state[0][0])
        c_at[0].copy_(given.state[0][1])
    else:
        s_at[0].copy_(given.state[0])

    first = given.first.t()
    posterior, transition = (
        [(w.t(), b) for w, b in layers] for layers in (given.posterior, given.transition)
    )
    mean, log_variance = written.u[-1].split(latent, dim=-1)
    drawn_at = by_frame(mean, log_variance, given.noise.transpose(0, 1))
    for t, inputs in enumerate(given.inputs.unbind(1)):
        torch.addmm(inputs, s_at[t], first, out=u_at[t][0])
        for k, (weight, bias) in enumerate(posterior):
            torch.addmm(bias, act_(u_at[t][k]), weight, out=u_at[t][k + 1])
        mean_t, log_variance_t, noise = drawn_at[t]
        torch.addcmul(mean_t, torch.mul(log_variance_t, 0.5).exp_(), noise, out=a_at[t][0])
        if t + 1 == frames:
            break
        for k, (weight, bias) in enumerate(transition):
            act_(torch.addmm(bias, a_at[t][k], weight, out=a_at[t][k + 1]))
        if given.lstm:
            torch.addmm(known_at[t], a_and_s_at[t], w_gates, out=all_gates_at[t])
            lstm_cell_forward(gates_at[t], c_at[t], c_at[t + 1], tanh_c_at[t], s_at[t + 1])
    return tuple(
        exchange(sequence) for sequence in (mean, log_variance, written.a[0], written.s)
    ), written


def backward(given, activation: str, outputs, written: Sequences, d_outputs):
    """The gradients of all arguments, as `ScanArguments`, from those of μ, λ, z and s"""
    act_backward = ACTIVATION_BACKWARD[activation]
    (d_mean, d_log_variance, d_z, d_s), latent = d_outputs, d_outputs[0].shape[2]
    u, a = written.u, written.a
    d_u = [torch.empty_like(layer) for layer in u[:-1]]
    d_u.append(torch.cat([d_mean, d_log_variance], dim=-1).transpose(0, 1).contiguous())
    d_a, d_s = [exchange(d_z)] + [torch.empty_like(layer) for layer in a[1:]], exchange(d_s)
    half_spread = (a[0] - u[-1][..., :latent]).mul_(0.5)  # ∂z/∂λ = ½ σ ε
    drawn_at = by_frame(*d_u[-1].split(latent, dim=-1), half_spread)
    u_at, d_u_at, a_at, d_a_at = (by_frame(*layers) for layers in (u, d_u, a, d_a))
    d_s_at = d_s.unbind(0)
    if given.lstm:
        w_gates = torch.cat(given.lstm[0][:2], dim=1)
        widths = [weight.shape[1] for weight in given.lstm[0][:2]]
        d_gates = torch.empty_like(written.gates)
        d_gates[-1] = 0
        dc = torch.zeros_like(written.c[0])
        c_at, tanh_c_at, d_all_gates_at = (
            sequence.unbind(0) for sequence in (written.c, written.tanh_c, d_gates)
        )
        gates_at, d_gates_at = gate_views(written.gates), gate_views(d_gates)

    for t in reversed(range(len(a_at))):
        d_mean_t, d_log_variance_t, half_spread_t = drawn_at[t]
        d_mean_t.add_(d_a_at[t][0])
        d_log_variance_t.addcmul_(d_a_at[t][0], half_spread_t)
        for k in reversed(range(1, len(u))):
            act_backward(d_u_at[t][k] @ given.posterior[k - 1][0], u_at[t][k - 1], d_u_at[t][k - 1])
        da = d_s_at[t].addmm_(d_u_at[t][0], given.first)
        if t == 0:
            break
        if given.lstm:
            lstm_cell_backward(
                gates_at[t - 1], c_at[t - 1], tanh_c_at[t - 1], da, dc, d_gates_at[t - 1]
            )
            da, dh = (d_all_gates_at[t - 1] @ w_gates).split(widths, dim=-1)
            d_s_at[t - 1].add_(dh)
        for k in reversed(range(1, len(a))):
            act_backward(da, a_at[t - 1][k], d_a_at[t - 1][k])
            da = d_a_at[t - 1][k] @ given.transition[k - 1][0]
        d_a_at[t - 1][0].add_(da)

    found = given._replace(
        inputs=d_u[0].transpose(0, 1),
        state=[d_s[0]],
        first=weight_gradient(d_u[0], written.s),
        posterior=layer_gradients(d_u, u),
        transition=layer_gradients([d[:-1] for d in d_a], [layer[:-1] for layer in a]),
    )
    if not given.lstm:
        return found
    d_w_ih, d_w_hh = weight_gradient(d_gates[:-1], written.a_and_s[:-1]).split(widths, dim=1)
    has_gates = given.lstm[0].bias is None
    lstm = d_w_ih, d_w_hh, None if has_gates else d_gates.sum((0, 1))
    return found._replace(
        state=[(d_s[0], dc)], lstm=[lstm], gates=d_gates.transpose(0, 1) if has_gates else None
    )


def weight_gradient(d_output: Tensor, layer_input: Tensor) -> Tensor:
    return d_output.flatten(0, 1).t() @ layer_input.flatten(0, 1)


def layer_gradients(d: list[Tensor], values: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of weight and bias of each layer that made one of the values from the one before"""
    return [(weight_gradient(d[k], values[k - 1]), d[k].sum((0, 1))) for k in range(1, len(d))]
