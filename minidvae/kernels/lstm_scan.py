"""The time loop of an LSTM layer, its input projection done outside as one matrix product."""

import torch
from torch import Tensor


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step: gates before their activation (…, 4·hidden), in PyTorch's order i, f, g, o; c_{t−1} → h_t, c_t

    c_t = σ(f)⊙c_{t−1} + σ(i)⊙tanh(g),   h_t = σ(o)⊙tanh(c_t)
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_scan_reference(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """h_t, c_t = LSTM cell of (gates_x_t + W_hh h_{t−1}, c_{t−1}); with `reverse`, from the last frame to the first.

    gates_x: (batch, frames, 4·hidden), W_ih x_t + b_ih + b_hh. w_hh: (4·hidden, hidden). h0, c0: (batch, hidden).
    Returns h (batch, frames, hidden), each in the place of its frame, and the state after the last step.
    """
    h, c, outputs = h0, c0, []
    frames = gates_x.unbind(1)
    for gates in reversed(frames) if reverse else frames:
        h, c = lstm_cell(gates + h @ w_hh.t(), c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), (h, c)


def lstm_cell_forward(gates: Tensor, c_before: Tensor, c: Tensor, tanh_c: Tensor, h: Tensor) -> None:
    """`lstm_cell` into given tensors: gates become their activations, c, tanh(c) and h are written."""
    hidden = c.shape[-1]
    i, f, g, o = gates.split(hidden, dim=-1)
    gates[:, : 2 * hidden].sigmoid_(), g.tanh_(), o.sigmoid_()
    torch.mul(f, c_before, out=c).addcmul_(i, g)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


def lstm_cell_backward(gates: Tensor, c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, out: Tensor) -> None:
    """The gradient of the gates before their activation, into `out`; dc becomes the gradient of c_{t−1}."""
    hidden = dh.shape[-1]
    i, f, g, o = gates.split(hidden, dim=-1)
    di, df, dg, do = out.split(hidden, dim=-1)
    dc += torch.ops.aten.tanh_backward(dh * o, tanh_c)
    torch.mul(dc, g, out=di), torch.mul(dc, c_before, out=df), torch.mul(dc, i, out=dg), torch.mul(dh, tanh_c, out=do)
    sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input
    sigmoid_backward(out[:, : 2 * hidden], gates[:, : 2 * hidden], grad_input=out[:, : 2 * hidden])
    tanh_backward(dg, g, grad_input=dg), sigmoid_backward(do, o, grad_input=do)
    dc *= f


lstm_scan = lstm_scan_reference
