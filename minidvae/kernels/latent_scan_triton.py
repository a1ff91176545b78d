"""The loop of `latent_scan.py` in Triton, float32: one launch forward, one backward.

A program takes a few sequences through all frames. The weights of both MLPs are read once, before the loop, and held
(Triton keeps them in shared memory: 88 KB for DKF); the state stays in registers, and the next frame's inputs are on
their way while a step runs. W_ih and W_hh of an LSTM are too large to hold (384 KB): each step reads them from the L2
cache in tiles, against a_t and s_t, which the program has just written to memory so that they can be read in tiles
too; one barrier a step stands between. The same in backward with the gates' gradient. Weight gradients are products
over all frames after the launch, from the saved activations and the preactivations' gradients: accumulated inside
they do not fit the registers.

Per frame and sequence at the papers' sizes (latent 16, state 128), multiply-adds, and float32 moved to and from memory:

            forward             backward            weight gradients
    SRNN      4 096,   240        4 096,   320        4 096
    DKF      22 016,   448       22 016,   880       22 016
    RVAE    112 128, 1 088      112 128, 1 776      112 128
    VRNN    112 128, 1 600      112 128, 1 776      112 128

For VRNN forward at batch 32, T = 150 that is 1.1 GFLOP and 31 MB, tens of microseconds at the most: what a launch takes
is the latency of T steps, each a chain of 3 products for SRNN, 6 for DKF and RVAE or VRNN, which with its LSTM also
reads 384 KB of weights per step and program. Weight gradients are a product each and a sum for each bias.
"""

import torch
from torch import Tensor

from .common import dot, exact_products, launchable, tanh, tl, triton
from .lstm_scan import cell_backward, cell_forward

TILES, STAGES = (16, 32), 3  # depth of a tile of W_ih and W_hh, forward (four gates wide) and backward; in flight
WIDEST, DEEPEST = 128, 4  # width of a layer, its products kept in registers; layers of an MLP
SHARED = 160 * 1024  # bytes, of the 163 KiB that a program has on sm_80


def geometry(held: int, lstm: bool, precision: str) -> dict[str, int]:
    """Sequences per program, warps, and frames in flight in backward (without an LSTM); held: how many weights.

    Tensor cores (tf32) take 16 rows at the least: 190 registers per thread for VRNN, of 255. Exact products run on
    the ordinary units: 4 rows leave room in the registers, where 16 spill, and make four times as many programs. With
    them the frames of DKF are read at their turn: more in flight spill.
    """
    wide = lstm or held > 8192
    stages = 1 if precision == "ieee" and wide else 3
    return {"ROWS": 4 if precision == "ieee" else 16, "num_warps": 8 if wide else 4, "num_stages": stages}


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def plan(posterior: list[Tensor], transition: list[Tensor], lstm: list[Tensor]) -> dict:
    """Where everything lies, as constexpr arguments of both kernels.

    A layer is (inputs, outputs, both padded, place of W and of b in the packed weights, first column in `hidden`,
    first column in `d_layers`). `hidden`: the activations but z and s, layer after layer. `d_layers`: the gradients
    of all preactivations; the first are those of `inputs`.
    """
    place = column = gradient = 0

    def layer(weight: Tensor, bias: bool, saved: bool) -> tuple[int, ...]:
        nonlocal place, column, gradient
        outputs, inputs = weight.shape
        entry = (inputs, outputs, padded(inputs), padded(outputs), place, place + inputs * outputs, column, gradient)
        place += (inputs + bias) * outputs
        column += saved * outputs
        gradient += outputs
        return entry

    weights, moves = [posterior[0], *posterior[1::2]], transition[::2]
    *into, head = [layer(weight, k > 0, k + 1 < len(weights)) for k, weight in enumerate(weights)]
    transition = [layer(weight, True, bool(lstm) or k + 1 < len(moves)) for k, weight in enumerate(moves)]
    inputs, latent = head[0], head[1] // 2
    sizes = (inputs, latent, head[2], padded(latent))
    head = [(*sizes, head[4] + k * inputs * latent, head[5] + k * latent, 0, head[7] + k * latent) for k in (0, 1)]
    state, after = posterior[0].shape[1], len(moves[-1]) if moves else latent
    return {
        "POSTERIOR": tuple(into),
        "HEAD": tuple(head),
        "TRANSITION": tuple(transition),
        "LATENT": latent,
        "STATE": state,
        "STATE_PADDED": padded(state),
        "AFTER": after,  # width of the transition's output
        "LSTM": (place, place + 4 * state * after, place + 4 * state * (after + state)) if lstm else None,
        "HIDDEN": column,
        "GRADIENTS": gradient,
    }


def held_weights(sizes: dict) -> int:
    return sum(layer[2] * layer[3] for name in ("POSTERIOR", "HEAD", "TRANSITION") for layer in sizes[name])


def shared_memory(sizes: dict, precision: str) -> int:
    """Bytes that the larger kernel takes at the most: weights held, tiles or frames in flight, two operands."""
    held, state = held_weights(sizes), sizes["STATE_PADDED"]
    tile = geometry(held, sizes["LSTM"] is not None, precision)
    if sizes["LSTM"] is not None:
        forward, backward = 4 * state, state + padded(sizes["AFTER"])
        in_flight = (STAGES - 1) * max(
            depth * (width + tile["ROWS"]) for depth, width in zip(TILES, (forward, backward), strict=True)
        )
    else:
        layers = sizes["POSTERIOR"] + sizes["TRANSITION"]
        columns = sum(layer[3] for layer in layers) + 5 * sizes["HEAD"][0][3]
        in_flight = (tile["num_stages"] - 1) * tile["ROWS"] * columns
    return 4 * (held + in_flight + 2 * tile["ROWS"] * WIDEST)


def fusible(inputs, noise, gates, state, posterior, transition, lstm) -> bool:
    """Whether the kernels take these tensors: float32, at most one LSTM layer, no layer and no memory too large."""
    tensors = (inputs, noise, gates, *state, *posterior, *transition, *lstm)
    if not launchable(*tensors) or any(t is not None and t.dtype != torch.float32 for t in tensors):
        return False
    sizes = plan(posterior, transition, lstm)
    layers = sizes["POSTERIOR"] + sizes["HEAD"] + sizes["TRANSITION"]
    row = max(sizes["HIDDEN"], sizes["GRADIENTS"], 4 * sizes["STATE"])
    return (
        len(lstm) <= 3
        and max(sizes["STATE"], *(max(layer[:2]) for layer in layers)) <= WIDEST
        and max(len(sizes["POSTERIOR"]), len(sizes["TRANSITION"])) <= DEEPEST
        and shared_memory(sizes, "tf32") <= SHARED
        and 16 * noise.shape[1] * row < 2**31  # places within the sequences of a program
    )


# -------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def read(pointer, rows, inside, first, WIDTH: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr):
    """Columns first … first + WIDTH of some rows of a matrix, zeros in the padding"""
    columns = tl.arange(0, PADDED)
    mask = inside[:, None] if WIDTH == PADDED else inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * STRIDE + (first + columns)[None, :], mask=mask, other=0.0)


@triton.jit
def write(pointer, rows, inside, first, values, WIDTH: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = inside[:, None] if WIDTH == PADDED else inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] * STRIDE + (first + columns)[None, :], values, mask=mask)


@triton.jit
def read_tile(pointer, rows, inside, first, WIDTH: tl.constexpr, TILE: tl.constexpr, STRIDE: tl.constexpr):
    """Columns first … first + TILE of a part of WIDTH columns"""
    columns = first + tl.arange(0, TILE)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0)


@triton.jit
def read_weight(pointer, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Some rows and columns of a matrix (HEIGHT, WIDTH); transposed, as the product x Wᵀ takes it"""
    if TRANSPOSED:
        rows, columns = rows[None, :], columns[:, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    return tl.load(pointer + rows * WIDTH + columns, mask=(rows < HEIGHT) & (columns < WIDTH), other=0.0)


@triton.jit
def layer_weight(weights, LAYERS: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    rows, columns = tl.arange(0, LAYERS[K][3]), tl.arange(0, LAYERS[K][2])
    return read_weight(weights + LAYERS[K][4], rows, columns, LAYERS[K][1], LAYERS[K][0], TRANSPOSED)


@triton.jit
def layer_bias(weights, LAYERS: tl.constexpr, K: tl.constexpr):
    columns = tl.arange(0, LAYERS[K][3])
    return tl.load(weights + LAYERS[K][5] + columns, mask=columns < LAYERS[K][1], other=0.0)[None, :]


@triton.jit
def product(x, weight, PRECISION: tl.constexpr):
    return dot(x, weight, tl.zeros((x.shape[0], weight.shape[1]), tl.float32), PRECISION)


@triton.jit
def activate(u, RELU: tl.constexpr):
    if RELU:
        return tl.where(u < 0, 0.0, u)
    else:
        return tanh(u)


@triton.jit
def activate_backward(d, y, RELU: tl.constexpr):
    """The gradient of the preactivation from that of the output y"""
    if RELU:
        return tl.where(y > 0, d, 0.0)
    else:
        return d * (1 - y * y)


@triton.jit
def read_gates(pointer, rows, inside, STATE: tl.constexpr, STATE_PADDED: tl.constexpr, STRIDE: tl.constexpr):
    i = read(pointer, rows, inside, 0, STATE, STATE_PADDED, STRIDE)
    f = read(pointer, rows, inside, STATE, STATE, STATE_PADDED, STRIDE)
    g = read(pointer, rows, inside, 2 * STATE, STATE, STATE_PADDED, STRIDE)
    o = read(pointer, rows, inside, 3 * STATE, STATE, STATE_PADDED, STRIDE)
    return i, f, g, o


@triton.jit
def read_biases(pointer, STATE: tl.constexpr, STATE_PADDED: tl.constexpr):
    columns = tl.arange(0, STATE_PADDED)
    i = tl.load(pointer + columns, mask=columns < STATE, other=0.0)[None, :]
    f = tl.load(pointer + STATE + columns, mask=columns < STATE, other=0.0)[None, :]
    g = tl.load(pointer + 2 * STATE + columns, mask=columns < STATE, other=0.0)[None, :]
    o = tl.load(pointer + 3 * STATE + columns, mask=columns < STATE, other=0.0)[None, :]
    return i, f, g, o


@triton.jit
def write_gates(pointer, rows, inside, i, f, g, o, STATE: tl.constexpr, STATE_PADDED: tl.constexpr):
    write(pointer, rows, inside, 0, i, STATE, STATE_PADDED, 4 * STATE)
    write(pointer, rows, inside, STATE, f, STATE, STATE_PADDED, 4 * STATE)
    write(pointer, rows, inside, 2 * STATE, g, STATE, STATE_PADDED, 4 * STATE)
    write(pointer, rows, inside, 3 * STATE, o, STATE, STATE_PADDED, 4 * STATE)


@triton.jit
def add_to_gates(
    i, f, g, o, part, weight, first,
    STATE: tl.constexpr, STATE_PADDED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product of one tile of a state with that of W (4·state, WIDTH), to the four gates"""
    units, columns = tl.arange(0, STATE_PADDED), first + tl.arange(0, TILE)
    i = dot(part, read_weight(weight, units, columns, STATE, WIDTH, True), i, PRECISION)
    weight += STATE * WIDTH
    f = dot(part, read_weight(weight, units, columns, STATE, WIDTH, True), f, PRECISION)
    weight += STATE * WIDTH
    g = dot(part, read_weight(weight, units, columns, STATE, WIDTH, True), g, PRECISION)
    weight += STATE * WIDTH
    o = dot(part, read_weight(weight, units, columns, STATE, WIDTH, True), o, PRECISION)
    return i, f, g, o


@triton.jit
def read_inputs(inputs, noise, rows, inside, POSTERIOR: tl.constexpr, HEAD: tl.constexpr):
    """What a frame of the forward loop is given: ε, and the known share of the first layer (of μ and of λ)"""
    L: tl.constexpr = HEAD[0][1]
    LP: tl.constexpr = HEAD[0][3]
    epsilon = read(noise, rows, inside, 0, L, LP, L)
    if len(POSTERIOR) > 0:
        return epsilon, read(inputs, rows, inside, 0, POSTERIOR[0][1], POSTERIOR[0][3], POSTERIOR[0][1])
    else:
        return epsilon, read(inputs, rows, inside, 0, L, LP, 2 * L), read(inputs, rows, inside, L, L, LP, 2 * L)


@triton.jit(do_not_specialize=["batch", "frames"])
def forward_kernel(
    inputs, noise, state, cell, weights, known,  # known: `gates` of `latent_scan`
    mean, log_variance, z, states, hidden, gates, cells,  # written; gates after their activation, cells before a step
    batch, frames,
    POSTERIOR: tl.constexpr, HEAD: tl.constexpr, TRANSITION: tl.constexpr, LATENT: tl.constexpr, STATE: tl.constexpr,
    STATE_PADDED: tl.constexpr, AFTER: tl.constexpr, LSTM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LP: tl.constexpr = HEAD[0][3]
    LAYERS: tl.constexpr = len(POSTERIOR)
    MOVES: tl.constexpr = len(TRANSITION)
    sequences = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = sequences < batch
    start = tl.program_id(0).to(tl.int64) * ROWS * frames
    inputs += start * (POSTERIOR[0][1] if LAYERS > 0 else 2 * LATENT)
    noise += start * LATENT
    mean += start * LATENT
    log_variance += start * LATENT
    z += start * LATENT
    states += start * STATE
    hidden += start * HIDDEN

    posterior, posterior_bias = (), ()
    for k in tl.static_range(LAYERS):
        posterior += (layer_weight(weights, POSTERIOR, k, True),)
        posterior_bias += (layer_bias(weights, POSTERIOR, k) if k > 0 else 0,)
    to_mean, to_log_variance = layer_weight(weights, HEAD, 0, True), layer_weight(weights, HEAD, 1, True)
    mean_bias, log_variance_bias = layer_bias(weights, HEAD, 0), layer_bias(weights, HEAD, 1)
    transition, transition_bias = (), ()
    for k in tl.static_range(MOVES):
        transition += (layer_weight(weights, TRANSITION, k, True),)
        transition_bias += (layer_bias(weights, TRANSITION, k),)

    s = read(state, sequences, inside, 0, STATE, STATE_PADDED, STATE)
    if LSTM is not None:
        gates += start * 4 * STATE
        cells += start * STATE
        if known is not None:
            known += start * 4 * STATE
        else:
            bias_i, bias_f, bias_g, bias_o = read_biases(weights + LSTM[2], STATE, STATE_PADDED)
        c = read(cell, sequences, inside, 0, STATE, STATE_PADDED, STATE)

    first_frame = tl.arange(0, ROWS) * frames
    given = read_inputs(inputs, noise, first_frame, inside, POSTERIOR, HEAD)
    for t in tl.range(0, frames, disable_licm=LSTM is not None):
        now = first_frame + t
        if LSTM is not None:
            given = read_inputs(inputs, noise, now, inside, POSTERIOR, HEAD)
        write(states, now, inside, 0, s, STATE, STATE_PADDED, STATE)
        u = s
        if LAYERS > 0:
            for k in tl.static_range(LAYERS):
                if k > 0:
                    u = product(u, posterior[k], PRECISION) + posterior_bias[k]
                else:
                    u = dot(u, posterior[0], given[1], PRECISION)
                u = activate(u, RELU)
                write(hidden, now, inside, POSTERIOR[k][6], u, POSTERIOR[k][1], POSTERIOR[k][3], HIDDEN)
            m = product(u, to_mean, PRECISION) + mean_bias
            v = product(u, to_log_variance, PRECISION) + log_variance_bias
        else:
            m = dot(u, to_mean, given[1], PRECISION)
            v = dot(u, to_log_variance, given[2], PRECISION)
        a = m + tl.exp(0.5 * v) * given[0]
        if LSTM is None:  # the next frame's, on their way while this step runs; an LSTM needs the registers
            given = read_inputs(inputs, noise, first_frame + tl.minimum(t + 1, frames - 1), inside, POSTERIOR, HEAD)
        write(mean, now, inside, 0, m, LATENT, LP, LATENT)
        write(log_variance, now, inside, 0, v, LATENT, LP, LATENT)
        write(z, now, inside, 0, a, LATENT, LP, LATENT)
        for k in tl.static_range(MOVES):
            a = activate(product(a, transition[k], PRECISION) + transition_bias[k], RELU)
            if LSTM is not None or k < MOVES - 1:
                write(hidden, now, inside, TRANSITION[k][6], a, TRANSITION[k][1], TRANSITION[k][3], HIDDEN)
        if LSTM is None:
            s = a
        else:
            if known is None:
                zero = tl.zeros((ROWS, STATE_PADDED), tl.float32)
                i, f, g, o = zero + bias_i, zero + bias_f, zero + bias_g, zero + bias_o
            else:
                i, f, g, o = read_gates(known, now, inside, STATE, STATE_PADDED, 4 * STATE)
            tl.debug_barrier()  # a_t and s_t, which other threads have written, are read from here on
            for column in tl.range(0, AFTER, TILE, num_stages=STAGES):
                if MOVES > 0:
                    part = read_tile(hidden + TRANSITION[MOVES - 1][6], now, inside, column, AFTER, TILE, HIDDEN)
                else:
                    part = read_tile(z, now, inside, column, AFTER, TILE, LATENT)
                i, f, g, o = add_to_gates(
                    i, f, g, o, part, weights + LSTM[0], column, STATE, STATE_PADDED, AFTER, TILE, PRECISION
                )
            for column in tl.range(0, STATE, TILE, num_stages=STAGES):
                part = read_tile(states, now, inside, column, STATE, TILE, STATE)
                i, f, g, o = add_to_gates(
                    i, f, g, o, part, weights + LSTM[1], column, STATE, STATE_PADDED, STATE, TILE, PRECISION
                )
            write(cells, now, inside, 0, c, STATE, STATE_PADDED, STATE)
            i, f, g, o, c, s = cell_forward(i, f, g, o, c)
            write_gates(gates, now, inside, i, f, g, o, STATE, STATE_PADDED)


@triton.jit(do_not_specialize=["batch", "frames"])
def backward_kernel(
    d_mean, d_log_variance, d_z, d_states, mean, z, states, hidden, gates, cells, weights,
    d_layers, d_gates, d_state, d_cell,  # written
    batch, frames,
    POSTERIOR: tl.constexpr, HEAD: tl.constexpr, TRANSITION: tl.constexpr, LATENT: tl.constexpr, STATE: tl.constexpr,
    STATE_PADDED: tl.constexpr, AFTER: tl.constexpr, LSTM: tl.constexpr, HIDDEN: tl.constexpr,
    GRADIENTS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LP: tl.constexpr = HEAD[0][3]
    LAYERS: tl.constexpr = len(POSTERIOR)
    MOVES: tl.constexpr = len(TRANSITION)
    AFTER_PADDED: tl.constexpr = TRANSITION[MOVES - 1][3] if MOVES > 0 else LP
    sequences = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = sequences < batch
    start = tl.program_id(0).to(tl.int64) * ROWS * frames
    d_mean += start * LATENT
    d_log_variance += start * LATENT
    d_z += start * LATENT
    d_states += start * STATE
    mean += start * LATENT
    z += start * LATENT
    states += start * STATE
    hidden += start * HIDDEN
    d_layers += start * GRADIENTS

    posterior, transition = (), ()
    for k in tl.static_range(LAYERS):
        posterior += (layer_weight(weights, POSTERIOR, k, False),)
    to_mean, to_log_variance = layer_weight(weights, HEAD, 0, False), layer_weight(weights, HEAD, 1, False)
    for k in tl.static_range(MOVES):
        transition += (layer_weight(weights, TRANSITION, k, False),)

    ds = tl.zeros((ROWS, STATE_PADDED), tl.float32)  # of the state after the frame
    if LSTM is not None:
        gates += start * 4 * STATE
        cells += start * STATE
        d_gates += start * 4 * STATE
        dc = tl.zeros((ROWS, STATE_PADDED), tl.float32)

    for step in tl.range(0, frames, disable_licm=LSTM is not None):
        t = frames - 1 - step
        now = tl.arange(0, ROWS) * frames + t
        after = tl.arange(0, ROWS) * frames + tl.minimum(t + 1, frames - 1)
        if LSTM is not None:
            i, f, g, o = read_gates(gates, now, inside, STATE, STATE_PADDED, 4 * STATE)
            c = read(cells, now, inside, 0, STATE, STATE_PADDED, STATE)
        dz = read(d_z, now, inside, 0, LATENT, LP, LATENT)
        dm = read(d_mean, now, inside, 0, LATENT, LP, LATENT)
        dl = read(d_log_variance, now, inside, 0, LATENT, LP, LATENT)
        spread = read(z, now, inside, 0, LATENT, LP, LATENT) - read(mean, now, inside, 0, LATENT, LP, LATENT)
        upstream = read(d_states, now, inside, 0, STATE, STATE_PADDED, STATE)
        y, y_moves = (), ()
        for k in tl.static_range(LAYERS):
            y += (read(hidden, now, inside, POSTERIOR[k][6], POSTERIOR[k][1], POSTERIOR[k][3], HIDDEN),)
        for k in tl.static_range(MOVES):
            if LSTM is not None or k < MOVES - 1:
                y_moves += (read(hidden, now, inside, TRANSITION[k][6], TRANSITION[k][1], TRANSITION[k][3], HIDDEN),)
            else:  # the state after the last frame is nowhere: any will do, its gradient is zero
                y_moves += (read(states, after, inside, 0, STATE, STATE_PADDED, STATE),)

        if LSTM is None:
            d = ds
            ds = upstream
        else:
            di, df, dg, do, dc = cell_backward(i, f, g, o, c, f * c + i * g, ds, dc)
            write_gates(d_gates, now, inside, di, df, dg, do, STATE, STATE_PADDED)
            d = tl.zeros((ROWS, AFTER_PADDED), tl.float32)
            ds = upstream
            tl.debug_barrier()  # the gates' gradient, which other threads have written, is read from here on
            for row in tl.range(0, 4 * STATE, TILE, num_stages=STAGES):
                part = read_tile(d_gates, now, inside, row, 4 * STATE, TILE, 4 * STATE)
                rows = row + tl.arange(0, TILE)
                w_ih = read_weight(weights + LSTM[0], rows, tl.arange(0, AFTER_PADDED), 4 * STATE, AFTER, False)
                w_hh = read_weight(weights + LSTM[1], rows, tl.arange(0, STATE_PADDED), 4 * STATE, STATE, False)
                d = dot(part, w_ih, d, PRECISION)
                ds = dot(part, w_hh, ds, PRECISION)
        for k in tl.static_range(MOVES - 1, -1, -1):
            d = activate_backward(d, y_moves[k], RELU)
            write(d_layers, now, inside, TRANSITION[k][7], d, TRANSITION[k][1], TRANSITION[k][3], GRADIENTS)
            d = product(d, transition[k], PRECISION)
        dz += d
        dm += dz
        dl += dz * 0.5 * spread  # ∂z/∂λ = ½ σ ε = ½ (z − μ)
        write(d_layers, now, inside, HEAD[0][7], dm, LATENT, LP, GRADIENTS)
        write(d_layers, now, inside, HEAD[1][7], dl, LATENT, LP, GRADIENTS)
        if LAYERS == 0:
            ds = dot(dm, to_mean, ds, PRECISION)
            ds = dot(dl, to_log_variance, ds, PRECISION)
        else:
            d = product(dm, to_mean, PRECISION)
            d = dot(dl, to_log_variance, d, PRECISION)
            for k in tl.static_range(LAYERS - 1, -1, -1):
                d = activate_backward(d, y[k], RELU)
                write(d_layers, now, inside, POSTERIOR[k][7], d, POSTERIOR[k][1], POSTERIOR[k][3], GRADIENTS)
                if k > 0:
                    d = product(d, posterior[k], PRECISION)
                else:
                    ds = dot(d, posterior[0], ds, PRECISION)
    write(d_state, sequences, inside, 0, ds, STATE, STATE_PADDED, STATE)
    if LSTM is not None:
        write(d_cell, sequences, inside, 0, dc, STATE, STATE_PADDED, STATE)


# --------------------------------------------------------------------------------------------------------- launch


def launch(kernel, tensors, like: Tensor, sizes: dict, activation: str, batch: int, frames: int) -> None:
    precision = "ieee" if exact_products() else "tf32"
    tile = geometry(held_weights(sizes), sizes["LSTM"] is not None, precision)
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    with torch.cuda.device_of(like):
        kernel[triton.cdiv(batch, tile["ROWS"]),](
            *tensors, batch, frames, RELU={"tanh": False, "relu": True}[activation], PRECISION=precision,
            TILE=TILES[kernel is backward_kernel], STAGES=STAGES,
            **constants, **tile,
        )  # fmt: skip


def buffers(noise, posterior, transition, lstm) -> list[Tensor]:
    """What forward writes: μ, λ, z, s, and for backward `hidden`; with an LSTM its gates and c before each step."""
    sizes = plan(posterior, transition, lstm)
    widths = [sizes["LATENT"]] * 3 + [sizes["STATE"], sizes["HIDDEN"]]
    if lstm:
        widths += [4 * sizes["STATE"], sizes["STATE"]]
    return [noise.new_empty(*noise.shape[:2], width) for width in widths]


def forward(activation, inputs, noise, gates, state, posterior, transition, lstm) -> list[Tensor]:
    """The filled `buffers`."""
    mean, log_variance, z, states, hidden, *loop = written = buffers(noise, posterior, transition, lstm)
    weights = torch.cat([tensor.reshape(-1) for tensor in (*posterior, *transition, *lstm)])
    given = [tensor.contiguous() for tensor in (inputs, noise, *state)] + ([] if lstm else [None])
    known = None if gates is None else gates.contiguous()
    tensors = *given, weights, known, mean, log_variance, z, states, hidden, *(loop or (None, None))
    launch(forward_kernel, tensors, noise, plan(posterior, transition, lstm), activation, *noise.shape[:2])
    return written


def backward_buffers(noise, state, posterior, transition, lstm) -> list[Tensor]:
    """What backward writes: `d_layers`, the gradient of the gates or nothing, those of the state"""
    sizes = plan(posterior, transition, lstm)
    widths = sizes["GRADIENTS"], 4 * sizes["STATE"] if lstm else 0
    return [noise.new_empty(*noise.shape[:2], width) for width in widths] + [s.new_empty(s.shape) for s in state]


def backward(activation, noise, has_gates, state, posterior, transition, lstm, written, d_outputs) -> list[Tensor]:
    """The gradients of inputs, of gates where they are given, and of all tensors; written: by `forward`."""
    mean, _, z, states, hidden, *loop = written
    sizes = plan(posterior, transition, lstm)
    d_layers, d_gates, *d_state = backward_buffers(noise, state, posterior, transition, lstm)
    weights = torch.cat([tensor.reshape(-1) for tensor in (*posterior, *transition, *lstm)])
    d_mean, d_log_variance, d_z, d_states = (d.contiguous() for d in d_outputs)
    tensors = [d_mean, d_log_variance, d_z, d_states, mean, z, states, hidden, *(loop or (None, None)), weights]
    tensors += [d_layers, d_gates if lstm else None, *d_state, *([] if lstm else [None])]
    launch(backward_kernel, tensors, noise, sizes, activation, *noise.shape[:2])

    def columns(sequence: Tensor, first: int, width: int) -> Tensor:
        return sequence.flatten(0, 1)[:, first : first + width]

    def gradients(layer: tuple, layer_input: Tensor, bias: bool) -> list[Tensor]:
        d = columns(d_layers, layer[7], layer[1])
        return [d.t() @ layer_input, d.sum(0)] if bias else [d.t() @ layer_input]

    z, states = z.flatten(0, 1), states.flatten(0, 1)
    head = (None, 2 * sizes["LATENT"], *[None] * 5, sizes["HEAD"][0][7])
    d_weights, layer_input = [], states
    for k, layer in enumerate((*sizes["POSTERIOR"], head)):
        d_weights += gradients(layer, layer_input, k > 0)
        layer_input = None if layer is head else columns(hidden, layer[6], layer[1])
    layer_input = z
    for layer in sizes["TRANSITION"]:
        d_weights += gradients(layer, layer_input, True)
        layer_input = columns(hidden, layer[6], layer[1])
    if lstm:
        d = d_gates.flatten(0, 1)
        d_weights += [d.t() @ layer_input, d.t() @ states, *([] if has_gates else [d.sum(0)])]
    d_inputs = d_layers[..., : len(posterior[0])]
    return [d_inputs, *([d_gates] if has_gates else []), *d_state, *d_weights]
