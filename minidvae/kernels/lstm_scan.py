"""The time loop of an LSTM layer, its input projection done outside as one matrix product.

On the CPU: one matrix product and eight elementwise operations a step, written into sequences allocated once;
backward goes to the gates' preactivations only, the weight gradient is one product over all frames afterwards.
Tried and left: elementwise factors of the backward pass for all frames before the loop (sequences of that size
leave the caches: slower), one sigmoid over reordered gates (the same), oneDNN's linear (slower at these sizes).
For whole layers on known inputs `nn.LSTM`, oneDNN's fused layer, is a fifth faster yet: `models/base.py` takes it.
"""

import torch
from torch import Tensor

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step: gates before their activation (…, 4·hidden), in PyTorch's order i, f, g, o; c_{t−1} → h_t, c_t

    c_t = σ(f)⊙c_{t−1} + σ(i)⊙tanh(g),   h_t = σ(o)⊙tanh(c_t)
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_scan_reference(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """h_t, c_t = LSTM cell of (gates_x_t + W_hh h_{t−1}, c_{t−1}); with `reverse`, from the last frame to the first.

    gates_x: (batch, frames, 4·hidden), W_ih x_t + b_ih + b_hh. w_hh: (4·hidden, hidden). h0, c0: (batch, hidden).
    Returns h (batch, frames, hidden), each in the place of its frame, and h, c after the last step.
    """
    h, c, outputs = h0, c0, []
    frames = gates_x.unbind(1)
    for gates in reversed(frames) if reverse else frames:
        h, c = lstm_cell(gates + h @ w_hh.t(), c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), h, c


def gate_views(gates: Tensor) -> list[tuple[Tensor, ...]]:
    """(frames, batch, 4·hidden) → views for each frame: i and f in one, i, f, g, o"""
    hidden = gates.shape[-1] // 4
    parts = (gates[..., : 2 * hidden], *gates.split(hidden, dim=-1))
    return list(zip(*(part.unbind(0) for part in parts), strict=True))


def lstm_cell_forward(gates: tuple[Tensor, ...], c_before: Tensor, c: Tensor, tanh_c: Tensor, h: Tensor) -> None:
    """`lstm_cell` into given tensors: gates become their activations; c, tanh(c) and h are written."""
    i_and_f, i, f, g, o = gates
    i_and_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    torch.mul(f, c_before, out=c).addcmul_(i, g)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


def lstm_cell_backward(
    gates: tuple[Tensor, ...], c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, d_gates: tuple[Tensor, ...]
) -> None:
    """The gradient of the gates before their activation, into d_gates; dc becomes the gradient of c_{t−1}."""
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


class LSTMScan(torch.autograd.Function):
    """The loop as above; sequences are (frames, batch, ·) inside and in the order of the loop."""

    @staticmethod
    def forward(ctx, gates_x, w_hh, h0, c0, reverse):
        order = gates_x.flip(1) if reverse else gates_x
        gates = order.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        frames, batch, hidden = len(gates), len(h0), h0.shape[1]
        h, c = gates.new_empty(2, frames + 1, batch, hidden).unbind(0)
        tanh_c = gates.new_empty(frames, batch, hidden)
        h[0], c[0] = h0, c0
        weight, gates_at, h_at, c_at = w_hh.t(), gate_views(gates), h.unbind(0), c.unbind(0)
        for t, (all_gates, tanh_c_t) in enumerate(zip(gates.unbind(0), tanh_c.unbind(0), strict=True)):
            all_gates.addmm_(h_at[t], weight)
            lstm_cell_forward(gates_at[t], c_at[t], c_at[t + 1], tanh_c_t, h_at[t + 1])
        ctx.reverse = reverse
        ctx.save_for_backward(gates_x, w_hh, h0, c0, gates, h, c, tanh_c)
        outputs = h[1:].flip(0) if reverse else h[1:]
        return outputs.transpose(0, 1).contiguous(), h[-1].clone(), c[-1].clone()

    @staticmethod
    def backward(ctx, d_outputs, dh, dc):
        gates_x, w_hh, h0, c0, gates, h, c, tanh_c = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            return *differentiable_gradient(
                lambda *inputs: lstm_scan_reference(*inputs, ctx.reverse), (gates_x, w_hh, h0, c0), (d_outputs, dh, dc)
            ), None
        d_outputs = (d_outputs.flip(1) if ctx.reverse else d_outputs).unbind(1)
        d_gates, dc = torch.empty_like(gates), dc.clone()
        gates_at, d_gates_at, c_at, tanh_c_at = gate_views(gates), gate_views(d_gates), c.unbind(0), tanh_c.unbind(0)
        for t in reversed(range(len(gates))):
            lstm_cell_backward(gates_at[t], c_at[t], tanh_c_at[t], dh + d_outputs[t], dc, d_gates_at[t])
            dh = d_gates[t] @ w_hh
        d_w_hh = d_gates.flatten(0, 1).t() @ h[:-1].flatten(0, 1)
        d_gates_x = d_gates.transpose(0, 1)
        return d_gates_x.flip(1) if ctx.reverse else d_gates_x, d_w_hh, dh, dc, None


def differentiable_gradient(reference, inputs, d_outputs) -> tuple[Tensor | None, ...]:
    """The gradients of a function by autograd through its definition, so that they have gradients themselves."""
    aliases = [None if x is None else x.view_as(x) for x in inputs]  # one input may have been computed from another
    wanted = [x for x in aliases if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(reference(*aliases), wanted, d_outputs, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in aliases)


def lstm_scan(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_scan_reference`, by the fastest path for these tensors."""
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in (gates_x, w_hh, h0, c0)):
        return LSTMScan.apply(gates_x, w_hh, h0, c0, reverse)
    return lstm_scan_reference(gates_x, w_hh, h0, c0, reverse)
