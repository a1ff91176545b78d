"""The time loop of an LSTM layer, whose input projection is one matrix product before it.

    i, f, g, o = gates_x_t + W_hh h_{t−1}
    c_t = σ(f)⊙c_{t−1} + σ(i)⊙tanh(g),   h_t = σ(o)⊙tanh(c_t)

On a GPU a program of the kernels takes 16 sequences through all frames, one launch forward and one
backward. `held_*` keeps W_hh in shared memory and the state in registers, `tiled_*` reads W_hh from
the L2 cache at each step and the state from memory. Backward goes to the gates; the gradient of
W_hh is one matrix product afterwards.

With `torch.set_float32_matmul_precision("highest")` products of float32 are exact. Otherwise their
operands are rounded to float16 (|W_hh|, |h_0| < 65504), gradients after a division by the largest
of their frame. In bfloat16 the operands, h and the saved gates are bfloat16. Sums, c and its
gradient are always float32. docs/kernels.md says why.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    differentiates_once,
    dot,
    exact_products,
    launchable,
    tanh,
    tl,
    triton,
    without_autocast,
)


class LSTMWeights(NamedTuple):
    """Of one layer: (4·hidden, inputs), (4·hidden, hidden), and the sum of both biases, None where
    gates are given."""

    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h_t, c_t from the gates before their activation (…, 4·hidden), in PyTorch's order i, f, g, o,
    and c_{t−1}."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_cell_forward(gates, c_before: Tensor, c: Tensor, tanh_c: Tensor, h: Tensor) -> None:
    """`lstm_cell` into given tensors: gates become their activations; c, tanh(c) and h are
    written."""
    i_and_f, i, f, g, o = gates
    i_and_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    torch.mul(f, c_before, out=c).addcmul_(i, g)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


def lstm_scan_reference(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """h_t, c_t = LSTM cell of (gates_x_t + W_hh h_{t−1}, c_{t−1}); with `reverse`, from the last
    frame to the first.

    gates_x: (batch, frames, 4·hidden), W_ih x_t + b_ih + b_hh. w_hh: (4·hidden, hidden). h0, c0:
    (batch, hidden). Returns h (batch, frames, hidden), each in the place of its frame, and h, c
    after the last step.
    """
    h, c, outputs = h0, c0, []
    frames = gates_x.unbind(1)
    for gates in reversed(frames) if reverse else frames:
        h, c = lstm_cell(gates + h @ w_hh.t(), c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), h, c


# ------------------------------------------------------------------------------------------ kernels
# gates_x, h, the activated gates and gradients are (batch, frames, ·); c, from c_0 on, is (batch,
# frames + 1, hidden) in float32. All are in the order of the frames: c before and after a frame
# change places with REVERSE, 0 or 1.


@triton.jit
def load(pointer, mask):
    return tl.load(pointer) if mask is None else tl.load(pointer, mask, 0)


@triton.jit
def load_gates(pointer, mask, STRIDE: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """What belongs to each of the gates i, f, g and o, STRIDE elements apart"""
    found = ()
    for k in tl.static_range(4):
        found += (load(pointer + k * STRIDE, mask).to(DTYPE),)
    return found


@triton.jit
def store_gates(pointer, values, mask, STRIDE: tl.constexpr):
    for k in tl.static_range(4):
        tl.store(pointer + k * STRIDE, values[k].to(pointer.dtype.element_ty), mask)


@triton.jit
def product(x, weight, PRECISION: tl.constexpr):
    return dot(x, weight, tl.zeros((x.shape[0], weight.shape[1]), tl.float32), PRECISION)


@triton.jit
def add_products(
    gates, x, inside, weight, units, PRECISION: tl.constexpr,
    INPUTS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x·Wᵀ added to some units of each gate, DEPTH terms at a time, from memory: rows of x (·,
    INPUTS), W of all gates (4·HIDDEN, INPUTS)."""
    WHOLE: tl.constexpr = INPUTS % DEPTH == 0 and tl.constexpr(HIDDEN) % units.shape[1] == 0
    DTYPE: tl.constexpr = weight.dtype.element_ty
    for k in tl.range(0, INPUTS, DEPTH, num_stages=STAGES):
        of_x, of_w = k + tl.arange(0, DEPTH)[None, :], k + tl.arange(0, DEPTH)[:, None]
        operand = tl.load(x + of_x, inside & (of_x < INPUTS), 0).to(DTYPE)
        mask = None if WHOLE else (units < HIDDEN) & (of_w < INPUTS)
        w = load_gates(weight + units * INPUTS + of_w, mask, HIDDEN * INPUTS, DTYPE)
        i, f = dot(operand, w[0], gates[0], PRECISION), dot(operand, w[1], gates[1], PRECISION)
        g, o = dot(operand, w[2], gates[2], PRECISION), dot(operand, w[3], gates[3], PRECISION)
        gates = i, f, g, o
    return gates


@triton.jit
def cell_forward(gates, c):
    """The activated gates, c_t and h_t, from the gates and c_{t−1}"""
    i, f, g, o = tl.sigmoid(gates[0]), tl.sigmoid(gates[1]), tanh(gates[2]), tl.sigmoid(gates[3])
    c = f * c + i * g
    return (i, f, g, o), c, o * tanh(c)


@triton.jit
def cell_backward(gates, c_before, c, dh, dc):
    """The gradients of the gates and of c_{t−1}, from the activated gates and the gradients of h_t
    and c_t"""
    i, f, g, o = gates
    tanh_c = tanh(c)
    dc += dh * o * (1 - tanh_c * tanh_c)
    di, df, dg = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g)
    return (di, df, dg, dh * tanh_c * o * (1 - o)), dc * f


@triton.jit
def largest(gates):
    """Of each row, away from zero: what float16 operands are divided by"""
    i_f, g_o = (
        tl.maximum(tl.abs(gates[0]), tl.abs(gates[1])),
        tl.maximum(tl.abs(gates[2]), tl.abs(gates[3])),
    )
    return tl.maximum(tl.max(tl.maximum(i_f, g_o), axis=1, keep_dims=True), 1e-30)


@triton.jit
def sequences(batch, ROWS: tl.constexpr):
    """The sequences of this program, and which of them there are, (ROWS, 1)"""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    return rows.to(tl.int64), rows < batch


@triton.jit(do_not_specialize=["batch", "frames"])
def held_forward(
    gates_x, w_hh, h0, h, gates, c, batch, frames,
    REVERSE: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows, inside = sequences(batch, ROWS)
    DTYPE: tl.constexpr = w_hh.dtype.element_ty
    units = tl.arange(0, HIDDEN)[None, :]
    weights = load_gates(
        w_hh + units * HIDDEN + tl.arange(0, HIDDEN)[:, None], None, HIDDEN * HIDDEN, DTYPE
    )
    h_t = tl.load(h0 + rows * HIDDEN + units, inside, 0).to(tl.float32)
    c_t = tl.load(c + (rows * frames + rows + REVERSE * frames) * HIDDEN + units, inside, 0)
    for step in tl.range(frames, num_stages=STAGES):
        frame = rows * frames + (frames - 1 - step if REVERSE else step)
        x = load_gates(gates_x + 4 * frame * HIDDEN + units, inside, HIDDEN)
        values = ()
        for k in tl.static_range(4):
            values += (x[k] + product(h_t.to(DTYPE), weights[k], "ieee"),)
        values, c_t, h_t = cell_forward(values, c_t)
        tl.store(h + frame * HIDDEN + units, h_t.to(h.dtype.element_ty), inside)
        tl.store(c + (frame + rows + 1 - REVERSE) * HIDDEN + units, c_t, inside)
        store_gates(gates + 4 * frame * HIDDEN + units, values, inside, HIDDEN)


@triton.jit(do_not_specialize=["batch", "frames"])
def held_backward(
    d_h, w_hh, gates, c, d_gates, d_h0, d_c0, batch, frames,
    REVERSE: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_c0: on entry the gradient of c after the last step."""
    rows, inside = sequences(batch, ROWS)
    DTYPE: tl.constexpr = w_hh.dtype.element_ty
    units = tl.arange(0, HIDDEN)[None, :]
    weights = load_gates(
        w_hh + tl.arange(0, HIDDEN)[:, None] * HIDDEN + units, None, HIDDEN * HIDDEN, DTYPE
    )
    dh, dc = tl.zeros((ROWS, HIDDEN), tl.float32), tl.load(d_c0 + rows * HIDDEN + units, inside, 0)
    c_t = tl.load(c + (rows * frames + rows + (1 - REVERSE) * frames) * HIDDEN + units, inside, 0)
    for behind in tl.range(frames, num_stages=STAGES):
        frame = rows * frames + (behind if REVERSE else frames - 1 - behind)
        values = load_gates(gates + 4 * frame * HIDDEN + units, inside, HIDDEN)
        c_before = tl.load(c + (frame + rows + REVERSE) * HIDDEN + units, inside, 0)
        dh += tl.load(d_h + frame * HIDDEN + units, inside, 0).to(tl.float32)
        d, dc = cell_backward(values, c_before, c_t, dh, dc)
        c_t = c_before
        scale = largest(d) if DTYPE == tl.float16 else 1.0
        inverse = 1 / scale
        store_gates(d_gates + 4 * frame * HIDDEN + units, d, inside, HIDDEN)
        dh = tl.zeros((ROWS, HIDDEN), tl.float32)
        for k in tl.static_range(4):
            dh = dot((d[k] * inverse).to(DTYPE), weights[k], dh, "ieee")
        dh *= scale
    tl.store(d_h0 + rows * HIDDEN + units, dh, inside)
    tl.store(d_c0 + rows * HIDDEN + units, dc, inside)


@triton.jit(do_not_specialize=["batch", "frames"])
def tiled_forward(
    gates_x, w_hh, h0, h, gates, c, batch, frames, REVERSE: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """COLUMNS of each gate at a time, of which every product has DEPTH terms at a time"""
    rows, inside = sequences(batch, ROWS)
    h_before = h0 + rows * HIDDEN
    for step in range(frames):
        frame = rows * frames + (frames - 1 - step if REVERSE else step)
        tl.debug_barrier()  # h and c of the step before are in memory
        for first in range(0, HIDDEN, COLUMNS):
            units = first + tl.arange(0, COLUMNS)[None, :]
            here = inside & (units < HIDDEN)
            x = load_gates(gates_x + 4 * frame * HIDDEN + units, here, HIDDEN)
            c_t = tl.load(c + (frame + rows + REVERSE) * HIDDEN + units, here, 0)
            values = add_products(
                x, h_before, inside, w_hh, units, "ieee", HIDDEN, HIDDEN, DEPTH, STAGES
            )
            values, c_t, h_t = cell_forward(values, c_t)
            store_gates(gates + 4 * frame * HIDDEN + units, values, here, HIDDEN)
            tl.store(c + (frame + rows + 1 - REVERSE) * HIDDEN + units, c_t, here)
            tl.store(h + frame * HIDDEN + units, h_t.to(h.dtype.element_ty), here)
        h_before = h + frame * HIDDEN


@triton.jit(do_not_specialize=["batch", "frames"])
def tiled_backward(
    d_h, w_hh, gates, c, d_gates, d_h0, d_c0, batch, frames, REVERSE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_h0, d_c0: on entry zero and the gradient of c after the last step; between two steps those
    of h_t and c_t."""
    WHOLE: tl.constexpr = HIDDEN % COLUMNS == 0 and 4 * HIDDEN % DEPTH == 0
    rows, inside = sequences(batch, ROWS)
    for behind in range(frames):
        frame = rows * frames + (behind if REVERSE else frames - 1 - behind)
        scale = tl.full((ROWS, 1), 0.0 if w_hh.dtype.element_ty == tl.float16 else 1.0, tl.float32)
        tl.debug_barrier()  # the gradients of h_t and c_t are in memory
        for first in range(0, HIDDEN, COLUMNS):
            units = first + tl.arange(0, COLUMNS)[None, :]
            here = inside & (units < HIDDEN)
            values = load_gates(gates + 4 * frame * HIDDEN + units, here, HIDDEN)
            c_before = tl.load(c + (frame + rows + REVERSE) * HIDDEN + units, here, 0)
            c_t = tl.load(c + (frame + rows + 1 - REVERSE) * HIDDEN + units, here, 0)
            dh = tl.load(d_h0 + rows * HIDDEN + units, here, 0)
            dh += tl.load(d_h + frame * HIDDEN + units, here, 0).to(tl.float32)
            dc = tl.load(d_c0 + rows * HIDDEN + units, here, 0)
            d, dc = cell_backward(values, c_before, c_t, dh, dc)
            store_gates(d_gates + 4 * frame * HIDDEN + units, d, here, HIDDEN)
            tl.store(d_c0 + rows * HIDDEN + units, dc, here)
            if w_hh.dtype.element_ty == tl.float16:
                scale = tl.maximum(scale, largest(d))
        tl.debug_barrier()  # the gradients of this step's gates are in memory
        for first in range(0, HIDDEN, COLUMNS):
            units = first + tl.arange(0, COLUMNS)[None, :]
            dh = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in tl.range(0, 4 * HIDDEN, DEPTH, num_stages=STAGES):
                of_d, of_w = k + tl.arange(0, DEPTH)[None, :], k + tl.arange(0, DEPTH)[:, None]
                operand = tl.load(
                    d_gates + 4 * frame * HIDDEN + of_d, inside & (of_d < 4 * HIDDEN), 0
                )
                if w_hh.dtype.element_ty == tl.float16:
                    operand = (operand * (1 / scale)).to(tl.float16)
                there = None if WHOLE else (units < HIDDEN) & (of_w < 4 * HIDDEN)
                dh = dot(operand, load(w_hh + of_w * HIDDEN + units, there), dh, "ieee")
            tl.store(d_h0 + rows * HIDDEN + units, dh * scale, inside & (units < HIDDEN))


# ------------------------------------------------------------------------------------------- launch


def tiles(hidden: int, operand: torch.dtype, shared: int, backward: bool) -> dict[str, int]:
    """What one program works on: sequences; columns and rows of W_hh at a time (without them it
    holds all of W_hh); frames, or tiles of W_hh, on their way from memory. `shared`: bytes of
    shared memory that it may have.

    16 sequences are the least that a tensor core takes, and a step takes no longer for many
    programs than for one. Held: beside W_hh up to 8 bytes per unit and sequence to change layouts,
    with a frame on its way up to 28. Tiled: 64 columns of four gates, or of one product backward,
    are the most whose accumulators and factors stay in registers; to keep an L2 cache busy at its
    latency some 40 KiB of W_hh have to be on their way. Products in float32 wait for arithmetic
    instead, and spill in deep tiles.
    """
    for stages, beside in ((2, 28), (1, 8)):
        if (
            hidden in (16, 32, 64, 128)
            and 4 * hidden**2 * operand.itemsize + 16 * hidden * beside <= shared
        ):
            return {"ROWS": 16, "STAGES": stages, "num_warps": 4 if hidden < 64 else 8}
    exact = operand == torch.float32
    depth, stages = (64 if exact else 128, 4) if backward else (16 if exact else 64, 3)
    return {"ROWS": 16, "COLUMNS": 64, "DEPTH": depth, "STAGES": stages, "num_warps": 8}


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of W_hh and of what it is multiplied with, for sequences of this dtype"""
    if dtype != torch.float32:
        return dtype
    return torch.float32 if exact_products() else torch.float16


def launch(
    held, tiled, h: Tensor, w_hh: Tensor, reverse: bool, first: Tensor, *others: Tensor
) -> None:
    """One of two kernels for an output h (batch, frames, hidden); w_hh is its second argument."""
    weight = w_hh.to(operand_dtype(h.dtype)).contiguous()
    shared = (
        torch.cuda.get_device_properties(h.device).shared_memory_per_block_optin
        if h.is_cuda
        else 232_448
    )
    tile = tiles(h.shape[2], weight.dtype, shared, tiled is tiled_backward)
    kernel, grid = tiled if "DEPTH" in tile else held, (triton.cdiv(len(h), tile["ROWS"]),)
    with torch.cuda.device_of(h):
        kernel[grid](
            first.contiguous(),
            weight,
            *others,
            *h.shape[:2],
            REVERSE=int(reverse),
            HIDDEN=h.shape[2],
            **tile,
        )


def state_weight_gradient(d_gates: Tensor, h: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """Σ_t d_gates_t h_{t−1}ᵀ without a copy of either sequence, both (batch, frames, ·).

    All sequences one after another are one long sequence, whose states before each frame are h
    shifted by a frame. That gives the first step of a sequence the last state of its neighbour, or
    none: a second, small product puts h_0 in its place.
    """
    first, last, shift = (-1, 0, -1) if reverse else (0, -1, 1)
    d, states = d_gates.flatten(0, 1), h.flatten(0, 1)
    d, states = (d[:-1], states[1:]) if reverse else (d[1:], states[:-1])
    neighbour = h[:, last].roll(shift, 0)
    neighbour[first] = 0
    return torch.addmm(d_gates[:, first].t() @ (h0 - neighbour), d.t(), states)


class FusedLSTMScan(torch.autograd.Function):
    """h and the last c by the kernels."""

    @staticmethod
    def forward(ctx, gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool):
        batch, frames, hidden = len(h0), gates_x.shape[1], h0.shape[1]
        h, gates = gates_x.new_empty(batch, frames, hidden), gates_x.new_empty(gates_x.shape)
        c = gates_x.new_empty(batch, frames + 1, hidden, dtype=torch.float32)
        c[:, -1 if reverse else 0] = c0
        launch(held_forward, tiled_forward, h, w_hh, reverse, gates_x, h0.contiguous(), h, gates, c)
        ctx.save_for_backward(w_hh, h0, h, gates, c)
        ctx.reverse = reverse
        return h, c[:, 0 if reverse else -1].to(h.dtype, copy=True)

    @staticmethod
    def backward(ctx, d_h: Tensor, d_c_last: Tensor):
        differentiates_once("lstm_scan")
        w_hh, h0, h, gates, c = ctx.saved_tensors
        d_gates = torch.empty_like(gates)
        d_h0, d_c0 = torch.zeros_like(c[:, 0]), d_c_last.to(torch.float32, copy=True).contiguous()
        launch(
            held_backward, tiled_backward, h, w_hh, ctx.reverse, d_h, gates, c, d_gates, d_h0, d_c0
        )
        with without_autocast(h.device):  # autograd may run inside of a region
            d_w_hh = state_weight_gradient(d_gates, h, h0, ctx.reverse)
        return d_gates, d_w_hh, d_h0.to(h.dtype), d_c0.to(h.dtype), None


def fusible(gates_x: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor) -> bool:
    """Whether the kernels take these. Wider layers are too much to read from the cache each
    step."""
    fits = h0.shape == c0.shape == (len(gates_x), w_hh.shape[1]) and gates_x.shape[2] == len(w_hh)
    return fits and launchable(gates_x, w_hh, h0, c0) and w_hh.shape[1] <= 512


def lstm_scan_fused(gates_x, w_hh, h0, c0, reverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_scan_reference` in one launch, and one backward, of a Triton kernel, for what is
    `fusible`. The gradient of its gradient is an error."""
    h, c_last = FusedLSTMScan.apply(gates_x, w_hh, h0, c0, reverse)
    return h, h[:, 0 if reverse else -1], c_last


def lstm_scan(gates_x, w_hh, h0, c0, reverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_scan_reference`, by the kernels where they serve; all are brought to the dtype of
    gates_x."""
    if torch.compiler.is_compiling():  # as it is, between two graphs
        return torch.compiler.disable(lstm_scan)(gates_x, w_hh, h0, c0, reverse)
    inputs = gates_x, *(tensor.to(gates_x.dtype) for tensor in (w_hh, h0, c0))
    with without_autocast(gates_x.device):
        scan = lstm_scan_fused if gates_x.is_cuda and fusible(*inputs) else lstm_scan_reference
        return scan(*inputs, reverse)
