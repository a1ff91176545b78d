"""The time loop of an LSTM layer, its input projection done outside as one matrix product.

Forward is B·T·8·H² FLOPs in T dependent steps of (B, H)·(H, 4H); backward is as many for the state and as many for
W_hh. It must move at least 10·H values a frame forward (gates in and out, h, c), 10·H backward and 5·H for the
gradient of W_hh: for H = 256, B = 256, T = 150 in float32, 60 GFLOP and 0.98 GB, a floor of 0.2 ms on an H200.
What is paid above it is the chain of steps. A program takes 16 sequences through all of them in one launch:

- held: W_hh stays in shared memory, h and c in registers, up to 128 KiB (H = 128 with operands of 16 bits);
- tiled: W_hh comes from the L2 cache each step, 0.5 MB at H = 256. At 64 bytes a cycle that is 4.7 µs a step on an
  H200, 0.7 ms for T = 150, whatever the batch up to 16 sequences per multiprocessor.

These are counts; on hardware nothing of it has been measured yet.

Backward goes to the gates' preactivations only; the gradient of W_hh is one matrix product afterwards.

Precision of float32 follows PyTorch's own setting for matrix products (`torch.set_float32_matmul_precision`).
"highest": products in float32. Otherwise the operands are rounded to the 11 significant bits of TF32, in the format
float16 (|W_hh|, |h_0| < 65504), half the bytes to hold or to read; gradients, whose range is another, are scaled by
the largest of their frame. In bfloat16 the operands, h and the saved gates are bfloat16. Always: sums, c and its
gradient in float32.

On the CPU: one matrix product and nine elementwise operations a step, on sequences allocated once; backward goes to
the gates' preactivations only, the weight gradient is one product over all frames afterwards. Tried and left:
elementwise factors of the backward pass for all frames before the loop (sequences of that size leave the caches:
slower), one sigmoid over reordered gates (the same), oneDNN's linear (slower at these sizes).
For whole layers on known inputs `nn.LSTM`, oneDNN's fused layer, is a fifth faster yet: `models/base.py` takes it.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .common import differentiable_gradient, dot, exact_products, launchable, tanh, tl, triton, without_autocast

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


# ------------------------------------------------------------------------------------------------- plain PyTorch


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


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: of sums and of c"""
    return torch.promote_types(dtype, torch.float32)


def plain_forward(gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    """h, h_T and c_T as in the reference, and what backward needs, in the order of the loop: the activated gates
    (frames, batch, 4·hidden); c from c_0 on (frames + 1, batch, hidden), float32 at least; tanh(c_t)."""
    dtype, (batch, hidden) = gates_x.dtype, h0.shape
    order = (gates_x.flip(1) if reverse else gates_x).transpose(0, 1)
    gates = order.to(wide(gates_x.dtype), copy=True, memory_format=torch.contiguous_format)
    h, c = gates.new_empty(len(gates) + 1, batch, hidden), gates.new_empty(len(gates) + 1, batch, hidden)
    tanh_c = gates.new_empty(len(gates), batch, hidden)
    h[0], c[0] = h0, c0
    weight, gates_at, h_at, c_at = w_hh.to(gates.dtype).t(), gate_views(gates), h.unbind(0), c.unbind(0)
    for t, (all_gates, tanh_c_t) in enumerate(zip(gates.unbind(0), tanh_c.unbind(0), strict=True)):
        all_gates.addmm_(h_at[t], weight)
        lstm_cell_forward(gates_at[t], c_at[t], c_at[t + 1], tanh_c_t, h_at[t + 1])
    outputs = (h[1:].flip(0) if reverse else h[1:]).transpose(0, 1)
    outputs = outputs.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return outputs, h[-1].to(dtype, copy=True), c[-1].to(dtype, copy=True), gates.to(dtype), c, tanh_c


def plain_backward(
    d_h: Tensor | None,
    d_h_last: Tensor | None,
    d_c_last: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    reverse: bool,
    h: Tensor,
    gates: Tensor,
    c: Tensor,
    tanh_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gates_x, w_hh, h0 and c0. A gradient that is None is zero."""
    dtype = gates.dtype
    gates, w_hh = gates.to(c.dtype), w_hh.to(c.dtype)
    d_h, d_h_last, d_c_last = (
        like.new_zeros(()).expand(like.shape) if gradient is None else gradient.to(c.dtype)
        for gradient, like in ((d_h, h), (d_h_last, h0), (d_c_last, h0))
    )
    d_h_at, dh, dc = (d_h.flip(1) if reverse else d_h).unbind(1), d_h_last, d_c_last.to(c.dtype, copy=True)
    d_gates, tanh_c_at = torch.empty_like(gates), (torch.tanh(c[1:]) if tanh_c is None else tanh_c).unbind(0)
    gates_at, d_gates_at, c_at = gate_views(gates), gate_views(d_gates), c.unbind(0)
    for t in reversed(range(len(gates))):
        lstm_cell_backward(gates_at[t], c_at[t], tanh_c_at[t], dh + d_h_at[t], dc, d_gates_at[t])
        dh = d_gates[t] @ w_hh
    before = torch.cat([h0[None], (h.flip(1) if reverse else h).transpose(0, 1)[:-1]]).to(c.dtype)
    d_w_hh = d_gates.flatten(0, 1).t() @ before.flatten(0, 1)
    d_gates_x = (d_gates.flip(0) if reverse else d_gates).transpose(0, 1)
    return d_gates_x.to(dtype), d_w_hh.to(dtype), dh.to(dtype), dc.to(dtype)


# -------------------------------------------------------------------------------------------------------- kernels
# Sequences saved for backward are (frames, batch, ·) in the order of the loop; `…_row` is the stride of a sequence in
# the batch, `…_step` that of a step of the loop, negative where it runs from the last frame to the first.


@triton.jit
def load_gates(start, inside, HIDDEN: tl.constexpr):
    i = tl.load(start, inside, 0).to(tl.float32)
    f = tl.load(start + HIDDEN, inside, 0).to(tl.float32)
    g = tl.load(start + 2 * HIDDEN, inside, 0).to(tl.float32)
    o = tl.load(start + 3 * HIDDEN, inside, 0).to(tl.float32)
    return i, f, g, o


@triton.jit
def store_gates(start, i, f, g, o, inside, HIDDEN: tl.constexpr):
    tl.store(start, i.to(start.dtype.element_ty), inside)
    tl.store(start + HIDDEN, f.to(start.dtype.element_ty), inside)
    tl.store(start + 2 * HIDDEN, g.to(start.dtype.element_ty), inside)
    tl.store(start + 3 * HIDDEN, o.to(start.dtype.element_ty), inside)


@triton.jit
def load_weights(start, inside, WHOLE: tl.constexpr):
    """a tile of W_hh, nothing of it outside where all are WHOLE"""
    if WHOLE:
        tile = tl.load(start)
    else:
        tile = tl.load(start, inside, 0)
    return tile


@triton.jit
def cell_forward(i, f, g, o, c):
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), tanh(g), tl.sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def cell_backward(i, f, g, o, c_before, c, dh, dc):
    tanh_c = tanh(c)
    dc += dh * o * (1 - tanh_c * tanh_c)
    di, df, dg = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g)
    return di, df, dg, dh * tanh_c * o * (1 - o), dc * f


@triton.jit
def largest(i, f, g, o):
    """of each row, away from zero: what float16 operands are divided by"""
    of_gates = tl.maximum(tl.maximum(tl.abs(i), tl.abs(f)), tl.maximum(tl.abs(g), tl.abs(o)))
    return tl.maximum(tl.max(of_gates, axis=1, keep_dims=True), 1e-30)


@triton.jit(do_not_specialize=["batch", "frames"])
def held_forward(
    gates_x, w_hh, h0, c0, h, h_last, c_last, gates, c, gates_x_row, gates_x_step, h_row, h_step, batch, frames,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = rows < batch
    rows = rows.to(tl.int64)
    frame = batch.to(tl.int64) * HIDDEN
    columns = tl.arange(0, HIDDEN)[None, :]
    at = rows * HIDDEN + columns
    weight = w_hh + columns * HIDDEN + tl.arange(0, HIDDEN)[:, None]
    w_i = tl.load(weight)
    w_f = tl.load(weight + HIDDEN * HIDDEN)
    w_g = tl.load(weight + 2 * HIDDEN * HIDDEN)
    w_o = tl.load(weight + 3 * HIDDEN * HIDDEN)
    h_t = tl.load(h0 + at, inside, 0).to(tl.float32)
    c_t = tl.load(c0 + at, inside, 0).to(tl.float32)
    tl.store(c + at, c_t, inside)
    zero = tl.zeros((ROWS, HIDDEN), tl.float32)
    for _ in tl.range(frames, num_stages=STAGES):
        x_i, x_f, x_g, x_o = load_gates(gates_x + rows * gates_x_row + columns, inside, HIDDEN)
        operand = h_t.to(w_hh.dtype.element_ty)
        i = x_i + dot(operand, w_i, zero, "ieee")
        f = x_f + dot(operand, w_f, zero, "ieee")
        g = x_g + dot(operand, w_g, zero, "ieee")
        o = x_o + dot(operand, w_o, zero, "ieee")
        i, f, g, o, c_t, h_t = cell_forward(i, f, g, o, c_t)
        c += frame
        store_gates(gates + 4 * rows * HIDDEN + columns, i, f, g, o, inside, HIDDEN)
        tl.store(c + at, c_t, inside)
        tl.store(h + rows * h_row + columns, h_t.to(h.dtype.element_ty), inside)
        gates_x += gates_x_step
        gates += 4 * frame
        h += h_step
    tl.store(h_last + at, h_t.to(h.dtype.element_ty), inside)
    tl.store(c_last + at, c_t.to(h.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["batch", "frames"])
def held_backward(
    d_h, d_h_last, d_c_last, w_hh, gates, c, d_gates, d_h0, d_c0, d_h_row, d_h_step, d_gates_row,
    d_gates_step, batch, frames, HIDDEN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = rows < batch
    rows = rows.to(tl.int64)
    frame = batch.to(tl.int64) * HIDDEN
    columns = tl.arange(0, HIDDEN)[None, :]
    at = rows * HIDDEN + columns
    weight = w_hh + tl.arange(0, HIDDEN)[:, None] * HIDDEN + columns
    w_i = tl.load(weight)
    w_f = tl.load(weight + HIDDEN * HIDDEN)
    w_g = tl.load(weight + 2 * HIDDEN * HIDDEN)
    w_o = tl.load(weight + 3 * HIDDEN * HIDDEN)
    dh, dc = tl.zeros((ROWS, HIDDEN), tl.float32), tl.zeros((ROWS, HIDDEN), tl.float32)
    if d_h_last is not None:
        dh = tl.load(d_h_last + at, inside, 0).to(tl.float32)
    if d_c_last is not None:
        dc = tl.load(d_c_last + at, inside, 0).to(tl.float32)
    gates += (frames - 1) * 4 * frame
    c += frames * frame
    c_t = tl.load(c + at, inside, 0)
    for _ in tl.range(frames, num_stages=STAGES):
        c -= frame
        i, f, g, o = load_gates(gates + 4 * rows * HIDDEN + columns, inside, HIDDEN)
        c_before = tl.load(c + at, inside, 0)
        if d_h is not None:
            dh += tl.load(d_h + rows * d_h_row + columns, inside, 0).to(tl.float32)
        di, df, dg, do, dc = cell_backward(i, f, g, o, c_before, c_t, dh, dc)
        c_t = c_before
        store_gates(d_gates + rows * d_gates_row + columns, di, df, dg, do, inside, HIDDEN)
        if w_hh.dtype.element_ty == tl.float16:
            scale = largest(di, df, dg, do)
            di, df, dg, do = di * (1 / scale), df * (1 / scale), dg * (1 / scale), do * (1 / scale)
        dh = tl.zeros((ROWS, HIDDEN), tl.float32)
        dh = dot(di.to(w_hh.dtype.element_ty), w_i, dh, "ieee")
        dh = dot(df.to(w_hh.dtype.element_ty), w_f, dh, "ieee")
        dh = dot(dg.to(w_hh.dtype.element_ty), w_g, dh, "ieee")
        dh = dot(do.to(w_hh.dtype.element_ty), w_o, dh, "ieee")
        if w_hh.dtype.element_ty == tl.float16:
            dh *= scale
        gates -= 4 * frame
        if d_h is not None:
            d_h += d_h_step
        d_gates += d_gates_step
    tl.store(d_h0 + at, dh.to(d_h0.dtype.element_ty), inside)
    tl.store(d_c0 + at, dc, inside)


@triton.jit(do_not_specialize=["batch", "frames"])
def tiled_forward(
    gates_x, w_hh, h0, c0, h, h_last, c_last, gates, c, gates_x_row, gates_x_step, h_row, h_step, batch, frames,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = rows < batch
    rows = rows.to(tl.int64)
    frame = batch.to(tl.int64) * HIDDEN
    for first in range(0, HIDDEN, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        here = inside & (columns < HIDDEN)
        tl.store(c + rows * HIDDEN + columns, tl.load(c0 + rows * HIDDEN + columns, here, 0).to(tl.float32), here)
    WHOLE: tl.constexpr = HIDDEN % COLUMNS == 0 and HIDDEN % DEPTH == 0
    before = h0 + rows * HIDDEN
    for _ in range(frames):
        tl.debug_barrier()  # h and c of the step before are in memory
        for first in range(0, HIDDEN, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)[None, :]
            here = inside & (columns < HIDDEN)
            at = rows * HIDDEN + columns
            i, f, g, o = load_gates(gates_x + rows * gates_x_row + columns, here, HIDDEN)
            c_t = tl.load(c + at, here, 0)
            for k in tl.range(0, HIDDEN, DEPTH, num_stages=STAGES):
                of_h, of_w = k + tl.arange(0, DEPTH)[None, :], k + tl.arange(0, DEPTH)[:, None]
                operand = tl.load(before + of_h, inside & (of_h < HIDDEN), 0).to(w_hh.dtype.element_ty)
                weight = w_hh + columns * HIDDEN + of_w
                there = (columns < HIDDEN) & (of_w < HIDDEN)
                i = dot(operand, load_weights(weight, there, WHOLE), i, "ieee")
                f = dot(operand, load_weights(weight + HIDDEN * HIDDEN, there, WHOLE), f, "ieee")
                g = dot(operand, load_weights(weight + 2 * HIDDEN * HIDDEN, there, WHOLE), g, "ieee")
                o = dot(operand, load_weights(weight + 3 * HIDDEN * HIDDEN, there, WHOLE), o, "ieee")
            i, f, g, o, c_t, h_t = cell_forward(i, f, g, o, c_t)
            store_gates(gates + 4 * rows * HIDDEN + columns, i, f, g, o, here, HIDDEN)
            tl.store(c + frame + at, c_t, here)
            tl.store(h + rows * h_row + columns, h_t.to(h.dtype.element_ty), here)
        before = h + rows * h_row
        gates_x += gates_x_step
        gates += 4 * frame
        h += h_step
        c += frame
    tl.debug_barrier()
    for first in range(0, HIDDEN, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        here = inside & (columns < HIDDEN)
        at = rows * HIDDEN + columns
        tl.store(h_last + at, tl.load(before + columns, here, 0), here)
        tl.store(c_last + at, tl.load(c + at, here, 0).to(c_last.dtype.element_ty), here)


@triton.jit
def recurrent_gradient(
    d_gates, w_hh, scale, inside, columns, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_gates · W_hh, the given columns of it; d_gates: pointers to its rows"""
    WHOLE: tl.constexpr = HIDDEN % COLUMNS == 0 and 4 * HIDDEN % DEPTH == 0
    dh, inverse = tl.zeros((ROWS, COLUMNS), tl.float32), 1 / scale
    for k in tl.range(0, 4 * HIDDEN, DEPTH, num_stages=STAGES):
        of_d, of_w = k + tl.arange(0, DEPTH)[None, :], k + tl.arange(0, DEPTH)[:, None]
        operand = tl.load(d_gates + of_d, inside & (of_d < 4 * HIDDEN), 0)
        if w_hh.dtype.element_ty == tl.float16:
            operand = (operand * inverse).to(tl.float16)
        there = (columns < HIDDEN) & (of_w < 4 * HIDDEN)
        dh = dot(operand, load_weights(w_hh + of_w * HIDDEN + columns, there, WHOLE), dh, "ieee")
    return dh * scale


@triton.jit(do_not_specialize=["batch", "frames"])
def tiled_backward(
    d_h, d_h_last, d_c_last, w_hh, gates, c, d_gates, d_h0, d_c0, d_h_row, d_h_step, d_gates_row,
    d_gates_step, batch, frames, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = rows < batch
    rows = rows.to(tl.int64)
    frame = batch.to(tl.int64) * HIDDEN
    gates += (frames - 1) * 4 * frame
    c += (frames - 1) * frame
    scale = tl.full((ROWS, 1), 1.0, tl.float32)
    for step in range(frames):
        tl.debug_barrier()  # d_gates and dc of the step before are in memory
        scale_after = tl.full((ROWS, 1), 0.0 if w_hh.dtype.element_ty == tl.float16 else 1.0, tl.float32)
        for first in range(0, HIDDEN, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)[None, :]
            here = inside & (columns < HIDDEN)
            at = rows * HIDDEN + columns
            i, f, g, o = load_gates(gates + 4 * rows * HIDDEN + columns, here, HIDDEN)
            c_before = tl.load(c + at, here, 0)
            c_t = tl.load(c + frame + at, here, 0)
            dh, dc = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
            if step > 0:
                after = d_gates - d_gates_step + rows * d_gates_row
                dc = tl.load(d_c0 + at, here, 0)
                dh = recurrent_gradient(after, w_hh, scale, inside, columns, HIDDEN, ROWS, COLUMNS, DEPTH, STAGES)
            else:
                if d_h_last is not None:
                    dh = tl.load(d_h_last + at, here, 0).to(tl.float32)
                if d_c_last is not None:
                    dc = tl.load(d_c_last + at, here, 0).to(tl.float32)
            if d_h is not None:
                dh += tl.load(d_h + rows * d_h_row + columns, here, 0).to(tl.float32)
            di, df, dg, do, dc = cell_backward(i, f, g, o, c_before, c_t, dh, dc)
            store_gates(d_gates + rows * d_gates_row + columns, di, df, dg, do, here, HIDDEN)
            tl.store(d_c0 + at, dc, here)
            if w_hh.dtype.element_ty == tl.float16:
                scale_after = tl.maximum(scale_after, largest(di, df, dg, do))
        scale = scale_after
        gates -= 4 * frame
        c -= frame
        if d_h is not None:
            d_h += d_h_step
        d_gates += d_gates_step
    tl.debug_barrier()
    after = d_gates - d_gates_step + rows * d_gates_row
    for first in range(0, HIDDEN, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        dh = recurrent_gradient(after, w_hh, scale, inside, columns, HIDDEN, ROWS, COLUMNS, DEPTH, STAGES)
        tl.store(d_h0 + rows * HIDDEN + columns, dh.to(d_h0.dtype.element_ty), inside & (columns < HIDDEN))


class Tiles(NamedTuple):
    """What one program works on: sequences; columns and rows of W_hh at a time (None: it holds all of W_hh); frames,
    or tiles of W_hh, on their way from memory at a time; warps."""

    rows: int
    columns: int | None
    depth: int | None
    stages: int
    warps: int


def tiles(hidden: int, operand: torch.dtype, shared: int, backward: bool) -> Tiles:
    """`shared`: bytes of shared memory that a program may have.

    16 sequences are the least that a tensor core takes, and a step takes no longer for many programs than for one.
    Held: beside W_hh up to 8 bytes per unit and sequence to change layouts, with a frame on its way up to 28.
    Tiled: 64 columns of four gates, or of one product backward, are the most whose accumulators and factors stay in
    registers; to keep an L2 cache busy at its latency some 40 KiB of W_hh have to be on their way. Products in
    float32 wait for arithmetic instead, and spill in deep tiles.
    """
    for stages, beside in ((2, 28), (1, 8)):
        if hidden in (16, 32, 64, 128) and 4 * hidden**2 * operand.itemsize + 16 * hidden * beside <= shared:
            return Tiles(16, None, None, stages, 4 if hidden < 64 else 8)
    exact = operand == torch.float32
    return Tiles(16, 64, 64 if exact else 128, 4, 8) if backward else Tiles(16, 64, 16 if exact else 64, 3, 8)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of W_hh and of what it is multiplied with, for sequences of this dtype"""
    if dtype != torch.float32:
        return dtype
    return torch.float32 if exact_products() else torch.float16


def loop_order(sequence: Tensor, reverse: bool) -> tuple[Tensor, int, int]:
    """(batch, frames, ·) → the frame that a loop starts from, the strides of a sequence in the batch and of a step"""
    step = sequence.stride(1)
    return sequence[:, -1 if reverse else 0], sequence.stride(0), -step if reverse else step


def rows_of(sequence: Tensor) -> Tensor:
    """the values of a frame side by side in memory; frames and sequences may lie anywhere"""
    return sequence if sequence.stride(-1) == 1 else sequence.contiguous()


def launch(held, tiled, tile: Tiles, like: Tensor, *arguments) -> None:
    """The kernel for sequences `like` these, (batch, frames, hidden)"""
    kernel, constants = (held, {}) if tile.columns is None else (tiled, {"COLUMNS": tile.columns, "DEPTH": tile.depth})
    constants |= {"HIDDEN": like.shape[2], "ROWS": tile.rows, "STAGES": tile.stages}
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(len(like), tile.rows),)](*arguments, *like.shape[:2], num_warps=tile.warps, **constants)


def shared_memory(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fused_forward(gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    """`plain_forward` in one launch"""
    (batch, frames, _), hidden = gates_x.shape, h0.shape[1]
    weight = w_hh.to(operand_dtype(gates_x.dtype)).contiguous()
    h, h_last, c_last = (gates_x.new_empty(shape) for shape in ((batch, frames, hidden), h0.shape, h0.shape))
    gates = gates_x.new_empty(frames, batch, 4 * hidden)
    c = gates_x.new_empty(frames + 1, batch, hidden, dtype=torch.float32)
    first_x, *strides_x = loop_order(rows_of(gates_x), reverse)
    first_h, *strides_h = loop_order(h, reverse)
    tile = tiles(hidden, weight.dtype, shared_memory(h.device), backward=False)
    launch(
        held_forward, tiled_forward, tile, h, first_x, weight, h0.contiguous(), c0.contiguous(), first_h, h_last,
        c_last, gates, c, *strides_x, *strides_h,
    )  # fmt: skip
    return h, h_last, c_last, gates, c


def fused_backward(
    d_h: Tensor | None,
    d_h_last: Tensor | None,
    d_c_last: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    reverse: bool,
    h: Tensor,
    gates: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plain_backward` in one launch and the products for W_hh"""
    batch, frames, hidden = h.shape
    weight = w_hh.to(operand_dtype(h.dtype)).contiguous()
    d_gates_x = h.new_empty(batch, frames, 4 * hidden)
    d_h0, d_c0 = h0.new_empty(h0.shape), h0.new_empty(h0.shape, dtype=torch.float32)
    first_d, *strides_d = loop_order(d_gates_x, not reverse)
    first_h, *strides_h = (None, 0, 0) if d_h is None else loop_order(rows_of(d_h), not reverse)
    last = (gradient if gradient is None else gradient.contiguous() for gradient in (d_h_last, d_c_last))
    tile = tiles(hidden, weight.dtype, shared_memory(h.device), backward=True)
    launch(
        held_backward, tiled_backward, tile, h, first_h, *last, weight, gates, c, first_d, d_h0, d_c0,
        *strides_h, *strides_d,
    )  # fmt: skip
    return d_gates_x, state_weight_gradient(d_gates_x, h, h0, reverse), d_h0, d_c0.to(h0.dtype)


def state_weight_gradient(d_gates: Tensor, h: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """Σ_t d_gates_t h_{t−1}ᵀ without a copy of either sequence, both (batch, frames, ·).

    All sequences one after another are one long sequence of which the states are the same shifted by a frame. Wrong
    in that are only the first steps, whose state before is another sequence's last, or none: made good in the second,
    small product.
    """
    first, last = (-1, 0) if reverse else (0, -1)
    one_after_another, states = d_gates.flatten(0, 1), h.flatten(0, 1)
    neighbour = h0.new_zeros(h0.shape)
    if reverse:
        one_after_another, states = one_after_another[:-1], states[1:]
        neighbour[:-1] = h[1:, last]
    else:
        one_after_another, states = one_after_another[1:], states[:-1]
        neighbour[1:] = h[:-1, last]
    return torch.addmm(d_gates[:, first].t() @ (h0 - neighbour), one_after_another.t(), states)


# ---------------------------------------------------------------------------------------- autograd and torch.compile


def fusible(*tensors: Tensor) -> bool:
    """Whether the kernels take them; w_hh the second. Wider layers are too much to read from the cache each step."""
    return launchable(*tensors) and tensors[1].shape[1] <= 512


def forward_pass(fused: bool, gates_x: Tensor, *inputs) -> tuple[Tensor, ...]:
    with without_autocast(gates_x.device):
        return (fused_forward if fused else plain_forward)(gates_x, *inputs)


def backward_pass(fused: bool, *gradients_and_saved) -> tuple[Tensor, ...]:
    with without_autocast(gradients_and_saved[-1].device):  # autograd may run inside of a region
        return (fused_backward if fused else plain_backward)(*gradients_and_saved)


class LSTMScan(torch.autograd.Function):
    """A forward and a backward pass, both plain or both fused; `fused` says which."""

    @staticmethod
    def forward(ctx, gates_x, w_hh, h0, c0, reverse, fused):
        outputs = forward_pass(fused, gates_x, w_hh, h0, c0, reverse)
        keep(ctx, (gates_x, w_hh, h0, c0, reverse), outputs)
        ctx.fused = fused
        return outputs

    @staticmethod
    def backward(ctx, *d_outputs):
        return *gradients(ctx, partial(backward_pass, ctx.fused), d_outputs[:3]), None, None


def keep(ctx, inputs, output) -> None:
    gates_x, w_hh, h0, c0, ctx.reverse = inputs
    h, _, _, *kept = output
    ctx.save_for_backward(gates_x, w_hh, h0, c0, h, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def gradients(ctx, backward, d_outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    gates_x, w_hh, h0, c0, *kept = ctx.saved_tensors
    given = [k for k, gradient in enumerate(d_outputs) if gradient is not None]
    if not given:
        return (None,) * 4
    if torch.is_grad_enabled():  # the gradient itself is to be differentiated

        def definition(*inputs):
            outputs = lstm_scan_reference(*inputs, ctx.reverse)
            return [outputs[k] for k in given]

        return differentiable_gradient(definition, (gates_x, w_hh, h0, c0), [d_outputs[k] for k in given])
    return backward(*d_outputs, w_hh, h0, ctx.reverse, *kept)


@torch.library.custom_op("minidvae::lstm_scan", mutates_args=())
def lstm_scan_op(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass as torch.compile sees it: one operation."""
    fused = gates_x.is_cuda and fusible(gates_x, w_hh, h0, c0)
    return forward_pass(fused, gates_x, w_hh, h0, c0, reverse)[:5]


@lstm_scan_op.register_fake
def _(gates_x, w_hh, h0, c0, reverse):
    (batch, frames, _), hidden = gates_x.shape, h0.shape[1]
    h, h_last, c_last = (gates_x.new_empty(shape) for shape in ((batch, frames, hidden), h0.shape, h0.shape))
    gates = gates_x.new_empty(frames, batch, 4 * hidden)
    return h, h_last, c_last, gates, gates_x.new_empty(frames + 1, batch, hidden, dtype=wide(gates_x.dtype))


@torch.library.custom_op("minidvae::lstm_scan_backward", mutates_args=())
def lstm_scan_backward_op(
    d_h: Tensor | None,
    d_h_last: Tensor | None,
    d_c_last: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    reverse: bool,
    h: Tensor,
    gates: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fused = h.is_cuda and fusible(h, w_hh, h0)
    gradients = backward_pass(fused, d_h, d_h_last, d_c_last, w_hh, h0, reverse, h, gates, c)
    return tuple(gradient.contiguous() for gradient in gradients)


@lstm_scan_backward_op.register_fake
def _(d_h, d_h_last, d_c_last, w_hh, h0, reverse, h, gates, c):
    d_gates_x = h.new_empty(*h.shape[:2], 4 * h.shape[2])
    return d_gates_x, w_hh.new_empty(w_hh.shape), h0.new_empty(h0.shape), h0.new_empty(h0.shape)


lstm_scan_op.register_autograd(
    lambda ctx, *d_outputs: (*gradients(ctx, lstm_scan_backward_op, d_outputs[:3]), None), setup_context=keep
)


def lstm_scan_fused(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_scan_reference` in one launch, and one backward, of a Triton kernel, for what is `fusible`."""
    return LSTMScan.apply(gates_x, w_hh, h0, c0, reverse, True)[:3]


def lstm_scan(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_scan_reference`, by the fastest path for these tensors; all are brought to the dtype of gates_x."""
    inputs = gates_x, *(tensor.to(gates_x.dtype) for tensor in (w_hh, h0, c0))
    state = (len(gates_x), w_hh.shape[1])
    broadcast = not h0.shape == c0.shape == state or gates_x.shape[2] != len(w_hh)
    if broadcast or gates_x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        with without_autocast(gates_x.device):
            return lstm_scan_reference(*inputs, reverse)
    if torch.compiler.is_compiling():
        return lstm_scan_op(*inputs, reverse)[:3]
    return LSTMScan.apply(*inputs, reverse, gates_x.is_cuda and fusible(*inputs))[:3]
