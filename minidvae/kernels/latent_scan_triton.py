"""The loop of `latent_scan.py` in Triton, float32: one launch forward, one backward.

A program takes a few sequences through all frames. It holds the weights of both MLPs in shared
memory and the state in registers. W_ih and W_hh of an LSTM are too large to hold: each step reads
them from the L2 cache in tiles, against a_t and s_t, or backward the gates' gradient, which the
program has just written to memory so that they can be read in tiles too; one barrier a step stands
between. Weight gradients are products over all frames after the launch.

What is where, a row for each frame of each sequence:

    weights     the matrices and biases of `posterior`, `transition` and `lstm`, one after another
    d_layers    the gradients of all preactivations: of `posterior`, the first being those of `inputs`, of `transition`
    layers      in the same columns the activations; of the last layer of `posterior`, which has none, nothing
    gates       after their activation, i, f, g, o
    cells       c before each step
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .common import dot, exact_products, launchable, tanh, tl, triton
from .lstm_scan import (
    add_products,
    cell_backward,
    cell_forward,
    load_gates,
    product,
    sequences,
    store_gates,
)

TILES, STAGES = (
    (16, 32),
    3,
)  # depth of a tile of W_ih and W_hh, forward (four gates wide) and backward; in flight
WIDEST, DEEPEST = 128, 4  # width of a layer, its products kept in registers; layers of an MLP
SHARED = 160 * 1024  # bytes, of the 163 KiB that a program has on sm_80


class KernelSizes(NamedTuple):
    """What is known when the kernels are compiled. Layers are those of the posterior, the last as
    two, to the mean and to the log-variance; then those of the transition."""

    inputs: tuple[int, ...]  # of each layer
    outputs: tuple[int, ...]
    weight: tuple[int, ...]  # where it begins in `weights`
    bias: tuple[int, ...]
    column: tuple[int, ...]  # its first in `layers` and `d_layers`
    head: int  # which layer leads to the mean
    lstm: int | None  # where W_ih begins in `weights`; W_hh and b follow
    latent: int
    state: int
    after: int  # width of the transition's output
    columns: int  # of `layers` and `d_layers`


def matrices(given) -> list[Tensor]:
    """Of the layers of posterior and transition"""
    return [given.first, *(weight for weight, _ in (*given.posterior, *given.transition))]


def plan(given) -> KernelSizes:
    """Of `ScanArguments`"""
    layers, place, column, head = [], 0, 0, len(given.posterior)
    for k, weight in enumerate(matrices(given)):
        parts = 2 if k == head else 1
        (outputs, inputs), bias = weight.shape, place + weight.numel()
        height = outputs // parts
        for part in range(0, outputs, height):
            layers.append((inputs, height, place + part * inputs, bias + part, column + part))
        place, column = bias + (outputs if k > 0 else 0), column + outputs  # the first has no bias
    latent = layers[head][1]
    after = layers[-1][1] if given.transition else latent
    lstm = place if given.lstm else None
    return KernelSizes(
        *zip(*layers, strict=True), head, lstm, latent, given.first.shape[1], after, column
    )


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def held_weights(sizes: KernelSizes) -> int:
    return sum(padded(a) * padded(b) for a, b in zip(sizes.inputs, sizes.outputs, strict=True))


def geometry(sizes: KernelSizes, precision: str) -> dict[str, int]:
    """Sequences per program, warps, and frames in flight in backward (without an LSTM).

    Tensor cores (tf32) take 16 rows at the least: 190 registers per thread for VRNN, of 255. Exact
    products run on the ordinary units: 4 rows leave room in the registers, where 16 spill, and make
    four times as many programs. With them the frames of DKF are read at their turn: more in flight
    spill.
    """
    wide = sizes.lstm is not None or held_weights(sizes) > 8192
    stages = 1 if precision == "ieee" and wide else 3
    return {
        "ROWS": 4 if precision == "ieee" else 16,
        "num_warps": 8 if wide else 4,
        "num_stages": stages,
    }


def shared_memory(sizes: KernelSizes, precision: str) -> int:
    """Bytes that the larger kernel takes at the most: weights held, tiles or frames in flight, two
    operands."""
    tile = geometry(sizes, precision)
    if sizes.lstm is not None:
        state = padded(sizes.state)
        widths = 4 * state, state + padded(sizes.after)  # forward, backward
        elements = max(
            depth * (width + tile["ROWS"]) for depth, width in zip(TILES, widths, strict=True)
        )
        in_flight = (STAGES - 1) * elements
    else:
        columns = sum(map(padded, sizes.outputs)) + 3 * padded(sizes.latent)
        in_flight = (tile["num_stages"] - 1) * tile["ROWS"] * columns
    return 4 * (held_weights(sizes) + in_flight + 2 * tile["ROWS"] * WIDEST)


def fusible(given) -> bool:
    """Whether the kernels take these `ScanArguments`: float32, at most one LSTM layer, no layer or
    memory too large."""
    tensors = [tensor for tensor in tree_leaves(given) if tensor is not None]
    if (
        not launchable(*tensors)
        or any(tensor.dtype != torch.float32 for tensor in tensors)
        or len(given.lstm) > 1
    ):
        return False
    sizes, depth = plan(given), max(len(given.posterior), len(given.transition))
    widest = max(sizes.state, *sizes.inputs, *sizes.outputs)
    return widest <= WIDEST and depth <= DEEPEST and shared_memory(sizes, "tf32") <= SHARED


# ------------------------------------------------------------------------------------------ kernels
# Sequences are (batch, frames, ·); `now` are the rows of a frame in them, (ROWS, 1).


@triton.jit
def units_of(WIDTH: tl.constexpr):
    """As many as a product takes: a power of two, 16 at the least"""
    return tl.arange(0, 16 if WIDTH < 16 else triton.next_power_of_2(WIDTH))


@triton.jit
def mask_of(inside, columns, WIDTH: tl.constexpr):
    return inside if WIDTH == columns.shape[1] else inside & (columns < WIDTH)


@triton.jit
def read(pointer, rows, inside, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """WIDTH columns of some rows of a matrix, zeros in the padding"""
    columns = units_of(WIDTH)[None, :]
    return tl.load(
        pointer + rows * STRIDE + columns, mask=mask_of(inside, columns, WIDTH), other=0.0
    )


@triton.jit
def write(pointer, rows, inside, values, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    columns = units_of(WIDTH)[None, :]
    tl.store(pointer + rows * STRIDE + columns, values, mask=mask_of(inside, columns, WIDTH))


@triton.jit
def read_weight(pointer, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Some rows and columns of a matrix (HEIGHT, WIDTH); of its transpose where rows lie in
    columns"""
    return tl.load(
        pointer + rows * WIDTH + columns, mask=(rows < HEIGHT) & (columns < WIDTH), other=0.0
    )


@triton.jit
def layer_weights(weights, PLAN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Of all layers; transposed, as the product x Wᵀ takes them"""
    found = ()
    for k in tl.static_range(len(PLAN.outputs)):
        rows, columns = units_of(PLAN.outputs[k]), units_of(PLAN.inputs[k])
        rows = rows[None, :] if TRANSPOSED else rows[:, None]
        columns = columns[:, None] if TRANSPOSED else columns[None, :]
        found += (
            read_weight(weights + PLAN.weight[k], rows, columns, PLAN.outputs[k], PLAN.inputs[k]),
        )
    return found


@triton.jit
def layer_biases(weights, PLAN: tl.constexpr):
    found = (0.0,)  # the first layer's is in `inputs`
    for k in tl.static_range(1, len(PLAN.outputs)):
        columns = units_of(PLAN.outputs[k])[None, :]
        found += (
            tl.load(weights + PLAN.bias[k] + columns, mask=columns < PLAN.outputs[k], other=0.0),
        )
    return found


@triton.jit
def activate(u, RELU: tl.constexpr):
    return tl.where(u < 0, 0.0, u) if RELU else tanh(u)


@triton.jit
def activate_backward(d, y, RELU: tl.constexpr):
    """The gradient of the preactivation from that of the output y"""
    return tl.where(y > 0, d, 0.0) if RELU else d * (1 - y * y)


@triton.jit
def read_inputs(inputs, noise, rows, inside, PLAN: tl.constexpr):
    """What a frame of the forward loop is given: ε, and the known share of the first layer (of μ
    and of λ)"""
    WIDTH: tl.constexpr = PLAN.outputs[0]
    STRIDE: tl.constexpr = WIDTH if PLAN.head > 0 else 2 * WIDTH
    found = (
        read(noise, rows, inside, PLAN.latent, PLAN.latent),
        read(inputs, rows, inside, WIDTH, STRIDE),
    )
    if PLAN.head == 0:
        found += (read(inputs + WIDTH, rows, inside, WIDTH, STRIDE),)
    return found


@triton.jit(do_not_specialize=["batch", "frames"])
def forward_kernel(
    inputs, noise, state, cell, weights, known,  # known: `gates` of `latent_scan`
    mean, log_variance, z, states, layers, gates, cells,  # written
    batch, frames, PLAN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HEAD: tl.constexpr = PLAN.head
    LATENT: tl.constexpr = PLAN.latent
    STATE: tl.constexpr = PLAN.state
    LAST: tl.constexpr = len(PLAN.outputs) - 1
    rows, inside = sequences(batch, ROWS)

    weight, bias = layer_weights(weights, PLAN, True), layer_biases(weights, PLAN)
    s = read(state, rows, inside, STATE, STATE)
    if PLAN.lstm is not None:
        c = read(cell, rows, inside, STATE, STATE)
        units = units_of(STATE)[None, :]
        of_state = mask_of(inside, units, STATE)
        w_ih, w_hh = weights + PLAN.lstm, weights + PLAN.lstm + 4 * STATE * PLAN.after
        KNOWN_STRIDE: tl.constexpr = (
            0 if known is None else 4 * STATE
        )  # all frames have the same bias
        if known is None:
            known = w_hh + 4 * STATE * STATE

    given = read_inputs(inputs, noise, rows * frames, inside, PLAN)
    for t in tl.range(0, frames, disable_licm=PLAN.lstm is not None):
        now = rows * frames + t
        if PLAN.lstm is not None:
            given = read_inputs(inputs, noise, now, inside, PLAN)
        write(states, now, inside, s, STATE, STATE)
        u = s
        for k in tl.static_range(HEAD):
            u = activate(product(u, weight[k], PRECISION) + (bias[k] if k > 0 else given[1]), RELU)
            write(layers + PLAN.column[k], now, inside, u, PLAN.outputs[k], PLAN.columns)
        m = product(u, weight[HEAD], PRECISION) + (bias[HEAD] if HEAD > 0 else given[1])
        v = product(u, weight[HEAD + 1], PRECISION) + (bias[HEAD + 1] if HEAD > 0 else given[2])
        a = m + tl.exp(0.5 * v) * given[0]
        if (
            PLAN.lstm is None
        ):  # the next frame's, on their way while this step runs; an LSTM needs the registers
            given = read_inputs(
                inputs, noise, rows * frames + tl.minimum(t + 1, frames - 1), inside, PLAN
            )
        write(mean, now, inside, m, LATENT, LATENT)
        write(log_variance, now, inside, v, LATENT, LATENT)
        write(z, now, inside, a, LATENT, LATENT)
        for k in tl.static_range(HEAD + 2, LAST + 1):
            a = activate(product(a, weight[k], PRECISION) + bias[k], RELU)
            write(layers + PLAN.column[k], now, inside, a, PLAN.outputs[k], PLAN.columns)
        if PLAN.lstm is None:
            s = a
        else:
            values = load_gates(known + now * KNOWN_STRIDE + units, of_state, STATE)
            a_t = (
                z + now * LATENT
                if LAST == HEAD + 1
                else layers + PLAN.column[LAST] + now * PLAN.columns
            )
            tl.debug_barrier()  # a_t and s_t, which other threads have written, are read from here on
            values = add_products(
                values, a_t, inside, w_ih, units, PRECISION, PLAN.after, STATE, TILE, STAGES
            )
            s_t = states + now * STATE
            values = add_products(
                values, s_t, inside, w_hh, units, PRECISION, STATE, STATE, TILE, STAGES
            )
            write(cells, now, inside, c, STATE, STATE)
            values, c, s = cell_forward(values, c)
            store_gates(gates + now * 4 * STATE + units, values, of_state, STATE)


@triton.jit(do_not_specialize=["batch", "frames"])
def backward_kernel(
    d_mean, d_log_variance, d_z, d_states, mean, z, layers, gates, cells, weights,
    d_layers, d_gates, d_state, d_cell,  # written
    batch, frames, PLAN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HEAD: tl.constexpr = PLAN.head
    LATENT: tl.constexpr = PLAN.latent
    STATE: tl.constexpr = PLAN.state
    LAST: tl.constexpr = len(PLAN.outputs) - 1
    rows, inside = sequences(batch, ROWS)

    weight = layer_weights(weights, PLAN, False)
    ds = tl.zeros((ROWS, units_of(STATE).shape[0]), tl.float32)  # of the state after the frame
    if PLAN.lstm is not None:
        units, of_after = units_of(STATE)[None, :], units_of(PLAN.after)[None, :]
        of_state = mask_of(inside, units, STATE)
        w_ih, w_hh = weights + PLAN.lstm, weights + PLAN.lstm + 4 * STATE * PLAN.after
        dc = tl.zeros_like(ds)

    for step in tl.range(0, frames, disable_licm=PLAN.lstm is not None):
        now = rows * frames + (frames - 1 - step)
        if PLAN.lstm is not None:
            values = load_gates(gates + now * 4 * STATE + units, of_state, STATE)
            c = read(cells, now, inside, STATE, STATE)
        dz = read(d_z, now, inside, LATENT, LATENT)
        dm = read(d_mean, now, inside, LATENT, LATENT)
        dl = read(d_log_variance, now, inside, LATENT, LATENT)
        spread = read(z, now, inside, LATENT, LATENT) - read(mean, now, inside, LATENT, LATENT)
        upstream = read(d_states, now, inside, STATE, STATE)
        y = ()
        for k in tl.static_range(
            LAST + 1
        ):  # the head has none: the compiler removes these reads, which nothing uses
            y += (read(layers + PLAN.column[k], now, inside, PLAN.outputs[k], PLAN.columns),)

        d = ds
        ds = upstream
        if PLAN.lstm is not None:
            d_values, dc = cell_backward(values, c, values[1] * c + values[0] * values[2], d, dc)
            store_gates(d_gates + now * 4 * STATE + units, d_values, of_state, STATE)
            d = tl.zeros((ROWS, of_after.shape[1]), tl.float32)
            tl.debug_barrier()  # the gates' gradient, which other threads have written, is read from here on
            for first in tl.range(0, 4 * STATE, TILE, num_stages=STAGES):
                column, row = (
                    first + tl.arange(0, TILE)[None, :],
                    first + tl.arange(0, TILE)[:, None],
                )
                part = tl.load(
                    d_gates + now * 4 * STATE + column,
                    mask=inside & (column < 4 * STATE),
                    other=0.0,
                )
                d = dot(part, read_weight(w_ih, row, of_after, 4 * STATE, PLAN.after), d, PRECISION)
                ds = dot(part, read_weight(w_hh, row, units, 4 * STATE, STATE), ds, PRECISION)
        for k in tl.static_range(LAST, HEAD + 1, -1):
            d = activate_backward(d, y[k], RELU)
            write(d_layers + PLAN.column[k], now, inside, d, PLAN.outputs[k], PLAN.columns)
            d = product(d, weight[k], PRECISION)
        dz += d
        dm += dz
        dl += dz * 0.5 * spread  # ∂z/∂λ = ½ σ ε = ½ (z − μ)
        write(d_layers + PLAN.column[HEAD], now, inside, dm, LATENT, PLAN.columns)
        write(d_layers + PLAN.column[HEAD + 1], now, inside, dl, LATENT, PLAN.columns)
        d = dot(dl, weight[HEAD + 1], product(dm, weight[HEAD], PRECISION), PRECISION)
        for k in tl.static_range(HEAD - 1, -1, -1):
            d = activate_backward(d, y[k], RELU)
            write(d_layers + PLAN.column[k], now, inside, d, PLAN.outputs[k], PLAN.columns)
            d = product(d, weight[k], PRECISION)
        ds += d
    write(d_state, rows, inside, ds, STATE, STATE)
    if PLAN.lstm is not None:
        write(d_cell, rows, inside, dc, STATE, STATE)


# ------------------------------------------------------------------------------------------- launch


def packed_weights(given) -> Tensor:
    tensors = tree_leaves((given.first, given.posterior, given.transition, given.lstm))
    return torch.cat([tensor.reshape(-1) for tensor in tensors if tensor is not None])


def launch(kernel, tensors, sizes: KernelSizes, activation: str, like: Tensor) -> None:
    """For sequences `like` these, (batch, frames, ·); of tensors that are not there the arguments
    are None."""
    precision = "ieee" if exact_products() else "tf32"
    constants = {
        "PLAN": sizes,
        "RELU": activation == "relu",
        "PRECISION": precision,
        "STAGES": STAGES,
    }
    constants |= geometry(sizes, precision) | {"TILE": TILES[kernel is backward_kernel]}
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    with torch.cuda.device_of(like):
        kernel[triton.cdiv(len(like), constants["ROWS"]),](*tensors, *like.shape[:2], **constants)


def state_and_cell(given) -> tuple[Tensor, Tensor | None]:
    return given.state[0] if given.lstm else (given.state[0], None)


def forward(given, activation: str) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """μ, λ, z, s, and what backward reads, of `ScanArguments`"""
    sizes, noise = plan(given), given.noise

    def new(width: int) -> Tensor:
        return noise.new_empty(*noise.shape[:2], width)

    outputs = new(sizes.latent), new(sizes.latent), new(sizes.latent), new(sizes.state)
    gates_and_cells = (new(4 * sizes.state), new(sizes.state)) if given.lstm else (None, None)
    written = new(sizes.columns), *gates_and_cells
    read = given.inputs, noise, *state_and_cell(given), packed_weights(given), given.gates
    launch(forward_kernel, (*read, *outputs, *written), sizes, activation, noise)
    return outputs, written


def backward(given, activation: str, outputs, written, d_outputs):
    """The gradients of all arguments, as `ScanArguments`, from those of μ, λ, z and s"""
    sizes, (mean, _, z, states) = plan(given), outputs
    d_layers, d_gates = (None if part is None else torch.empty_like(part) for part in written[:2])
    d_state = [
        None if part is None else part.new_empty(part.shape) for part in state_and_cell(given)
    ]
    read = *d_outputs, mean, z, *written, packed_weights(given)
    launch(backward_kernel, (*read, d_layers, d_gates, *d_state), sizes, activation, z)

    widths, count = (
        [len(weight) for weight in matrices(given)],
        1 + len(given.posterior),
    )  # of the posterior's layers
    d, y = (sequence.flatten(0, 1).split(widths, dim=1) for sequence in (d_layers, written[0]))
    z, states = z.flatten(0, 1), states.flatten(0, 1)
    *layer_inputs, after = states, *y[: count - 1], z, *y[count:]
    layers = [(d_k.t() @ x, d_k.sum(0)) for d_k, x in zip(d, layer_inputs, strict=True)]
    found = given._replace(
        inputs=d_layers[..., : widths[0]],
        state=d_state[:1],
        first=layers[0][0],
        posterior=layers[1:count],
        transition=layers[count:],
    )
    if not given.lstm:
        return found
    d, has_gates = d_gates.flatten(0, 1), given.lstm[0].bias is None
    lstm = d.t() @ after, d.t() @ states, None if has_gates else d.sum(0)
    return found._replace(state=[d_state], lstm=[lstm], gates=d_gates if has_gates else None)
