"""The time loop that contains a draw of z: everything in a DVAE's posterior that depends on z_{t−1}.

    u_t = inputs_t + W s_t                                      first layer; the share of known inputs is `inputs_t`
    μ_t, λ_t = affine(act(… act(affine(act(u_t)))))             the rest of `posterior`, last to mean and log-variance
    z_t = μ_t + e^{λ_t/2} ⊙ ε_t
    a_t = act(affine(… act(affine(z_t))))                       `transition`, an activation after each layer
    s_{t+1} = a_t,  or with `lstm`  s_{t+1} = LSTM step of (gates_t + W_ih a_t) from s_t

This is SRNN and DKF (no LSTM), RVAE (LSTM on z) and VRNN (the whole cell, gates_t = W φ(x_t)). An MLP without
layers is an empty list: a_t = z_t, and u_t itself is [μ_t, λ_t].

On a GPU `latent_scan_triton.py` runs the loop in one launch. On the CPU it is bound by its matrix products from a batch
of 32 on; what was gained beside them: sequences allocated once, their frames taken by one `unbind`, one product for
all gates. Tried and left: copying the known inputs to (frames, batch) first (a pass over memory for nothing: the
product reads them where they are).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import latent_scan_triton
from .common import differentiable_gradient, without_autocast
from .lstm_scan import gate_views, lstm_cell, lstm_cell_backward, lstm_cell_forward

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
ACTIVATIONS_IN_PLACE = {"tanh": torch.tanh_, "relu": torch.relu_}
ACTIVATION_BACKWARD = {  # (gradient, output, where to write)
    "tanh": lambda d, y, out: torch.ops.aten.tanh_backward.grad_input(d, y, grad_input=out),
    "relu": lambda d, y, out: torch.ops.aten.threshold_backward.grad_input(d, y, 0, grad_input=out),
}


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
    transition: W, b of each layer; lstm: W_ih, W_hh, b of each layer. gates: (batch, frames, 4·hidden), which take
    the place of b in the first layer (its b is None then).

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
            known = gates[:, t] if bias is None else bias
            state[2 * layer : 2 * layer + 2] = lstm_cell(known + F.linear(a, w_ih) + F.linear(h, w_hh), c)
            a = state[2 * layer]
    return tuple(torch.stack(sequence, dim=1) for sequence in zip(*frames, strict=True))


def pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def unflatten(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    tensors = iter(tensors)
    return [[next(tensors) for _ in range(count)] for count in counts]


# ------------------------------------------------------------------------------------------------- plain PyTorch
# The loop with all that can be done once outside of it, for at most one LSTM layer. Sequences are (frames, batch, ·)
# inside, allocated once; `…_at[t]` are their frames. Backward goes to the preactivations only; weight gradients are
# products over all frames afterwards. With an LSTM, a_t and s_t stand side by side in memory, so that one product
# makes all gates. Its bias is left out of `lstm` where gates are given.


def loop_buffers(inputs, noise, posterior, transition, lstm) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """u_k after layer k of the posterior; z and the activations of the transition but the last; and with an LSTM
    [a, s], gates, c, tanh(c_{t+1}), without one s, a frame longer, which is a moved by a frame"""
    frames, latent = noise.shape[1:]

    def sequence(width: int, length: int = frames) -> Tensor:
        return inputs.new_empty(length, len(inputs), width)

    u = [sequence(inputs.shape[2])] + [sequence(len(bias)) for bias in posterior[2::2]]
    *inner, after = [latent] + [len(bias) for bias in transition[1::2]]
    hidden = posterior[0].shape[1]
    loop = [sequence(width) for width in (after + hidden, 4 * hidden, hidden, hidden)] if lstm else []
    return u, [sequence(width) for width in inner], loop or [sequence(after, frames + 1)]


def loop_sequences(a, loop, lstm) -> tuple[list[Tensor], Tensor]:
    """a_k after layer k of the transition, a_0 = z; the state s"""
    if lstm:
        after, s = loop[0].split([loop[0].shape[-1] - loop[2].shape[-1], loop[2].shape[-1]], dim=-1)
        return [*a, after], s
    return [*a, loop[0][1:]], loop[0][:-1]


def loop_forward(activation, inputs, noise, gates, state, posterior, transition, lstm) -> list[Tensor]:
    """μ, λ, z, s and the `loop_buffers`"""
    act_ = ACTIVATIONS_IN_PLACE[activation]
    frames, latent = noise.shape[1:]
    u, inner, loop = loop_buffers(inputs, noise, posterior, transition, lstm)
    a, s = loop_sequences(inner, loop, lstm)
    for sequence in (*inner[1:], *loop):
        sequence[-1] = 0  # the loop ends before: nothing is left unwritten
    if lstm:
        both, g, c, tanh_c = loop
        w_gates = torch.cat(lstm[:2], dim=1).t()
        known_at = lstm[2:] * frames if gates is None else gates.unbind(1)
        s[0], c[0] = state
        both_at, g_at, c_at, tanh_c_at = (values.unbind(0) for values in loop)
        gates_at = gate_views(g)
    else:
        loop[0][0] = state[0]

    first, rest, moves = posterior[0].t(), pairs(posterior[1:]), pairs(transition)
    rest, moves = [[(weight.t(), bias) for weight, bias in layers] for layers in (rest, moves)]
    mean, log_variance = u[-1].split(latent, dim=-1)
    u_at, a_at = [values.unbind(0) for values in u], [values.unbind(0) for values in a]
    s_at, mean_at, log_variance_at = s.unbind(0), mean.unbind(0), log_variance.unbind(0)
    inputs_at, noise_at = inputs.unbind(1), noise.unbind(1)
    for t in range(frames):
        if t > 0:
            for k, (weight, bias) in enumerate(moves):
                act_(torch.addmm(bias, a_at[k][t - 1], weight, out=a_at[k + 1][t - 1]))
            if lstm:
                torch.addmm(known_at[t - 1], both_at[t - 1], w_gates, out=g_at[t - 1])
                lstm_cell_forward(gates_at[t - 1], c_at[t - 1], c_at[t], tanh_c_at[t - 1], s_at[t])
        torch.addmm(inputs_at[t], s_at[t], first, out=u_at[0][t])
        for k, (weight, bias) in enumerate(rest):
            torch.addmm(bias, act_(u_at[k][t]), weight, out=u_at[k + 1][t])
        deviation = torch.mul(log_variance_at[t], 0.5).exp_()
        torch.addcmul(mean_at[t], deviation, noise_at[t], out=a_at[0][t])
    outputs = [exchange(sequence) for sequence in (mean, log_variance, a[0], s)]
    return [*outputs, *u, *inner, *loop]


def loop_backward(activation, noise, has_gates, state, posterior, transition, lstm, written, d_outputs) -> list[Tensor]:
    """The gradients of inputs, of gates where they are given, and of all tensors; written: by `loop_forward`."""
    u, inner, loop = unflatten(written[4:], (1 + len(posterior) // 2, len(transition) // 2, 4 if lstm else 1))
    a, s = loop_sequences(inner, loop, lstm)
    d_mean, d_log_variance, d_z, d_s = d_outputs
    act_backward = ACTIVATION_BACKWARD[activation]
    frames, latent = noise.shape[1:]
    d_u = [torch.empty_like(layer) for layer in u[:-1]]
    d_u.append(torch.cat([d_mean, d_log_variance], dim=-1).transpose(0, 1).contiguous())
    d_a = [exchange(d_z)] + [torch.empty_like(layer) for layer in a[1:]]
    half_spread = (a[0] - u[-1][..., :latent]).mul_(0.5)  # ∂z/∂λ = ½ σ ε
    u_at, d_u_at, a_at, d_a_at = [[values.unbind(0) for values in group] for group in (u, d_u, a, d_a)]
    d_mean_at, d_log_variance_at = (values.unbind(0) for values in d_u[-1].split(latent, dim=-1))
    d_s_at, half_spread_at = exchange(d_s).unbind(0), half_spread.unbind(0)
    if lstm:
        both, g, c, tanh_c = loop
        widths = [a[-1].shape[-1], c.shape[-1]]
        w_gates = torch.cat(lstm[:2], dim=1)
        d_g = torch.empty_like(g)
        d_g[-1] = 0
        dc = torch.zeros_like(c[0])
        c_at, tanh_c_at, d_g_at = c.unbind(0), tanh_c.unbind(0), d_g.unbind(0)
        gates_at, d_gates_at = gate_views(g), gate_views(d_g)

    for t in reversed(range(frames)):
        d_mean_at[t].add_(d_a_at[0][t])
        d_log_variance_at[t].addcmul_(d_a_at[0][t], half_spread_at[t])
        for k in reversed(range(1, len(u))):
            act_backward(d_u_at[k][t] @ posterior[2 * k - 1], u_at[k - 1][t], d_u_at[k - 1][t])
        da = d_s_at[t].addmm_(d_u_at[0][t], posterior[0])
        if t == 0:
            break
        if lstm:
            lstm_cell_backward(gates_at[t - 1], c_at[t - 1], tanh_c_at[t - 1], da, dc, d_gates_at[t - 1])
            da, dh = (d_g_at[t - 1] @ w_gates).split(widths, dim=-1)
            d_s_at[t - 1].add_(dh)
        for k in reversed(range(1, len(a))):
            act_backward(da, a_at[k][t - 1], d_a_at[k][t - 1])
            da = d_a_at[k][t - 1] @ transition[2 * k - 2]
        d_a_at[0][t - 1].add_(da)

    d_state, d_posterior, d_transition, d_lstm = [d_s_at[0]], [weight_gradient(d_u[0], s)], [], []
    for k in range(1, len(u)):
        d_posterior += [weight_gradient(d_u[k], u[k - 1]), d_u[k].sum((0, 1))]
    for k in range(1, len(a)):
        d_transition += [weight_gradient(d_a[k][:-1], a[k - 1][:-1]), d_a[k][:-1].sum((0, 1))]
    if lstm:
        d_state.append(dc)
        d_lstm = [d.contiguous() for d in weight_gradient(d_g[:-1], both[:-1]).split(widths, dim=1)]
        d_lstm += [] if has_gates else [d_g.sum((0, 1))]
    d_gates = [d_g.transpose(0, 1)] if has_gates else []
    return [d_u[0].transpose(0, 1), *d_gates, *d_state, *d_posterior, *d_transition, *d_lstm]


def exchange(sequence: Tensor) -> Tensor:
    """A copy with frames and batch exchanged"""
    return sequence.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def weight_gradient(d_output: Tensor, layer_input: Tensor) -> Tensor:
    return d_output.flatten(0, 1).t() @ layer_input.flatten(0, 1)


# ------------------------------------------------------------------------------------- autograd and torch.compile
# Without torch.compile by an autograd.Function, with it by two custom operators, of the same passes. `fused`: by the
# kernels. `counts`: how many of `tensors` are state, posterior, transition and lstm.


def forward_pass(fused, activation, counts, inputs, noise, gates, tensors) -> list[Tensor]:
    """μ, λ, z, s, and what backward needs"""
    forward = latent_scan_triton.forward if fused else loop_forward
    with without_autocast(noise.device):
        return forward(activation, inputs, noise, gates, *unflatten(tensors, counts))


def backward_pass(fused, activation, counts, noise, has_gates, tensors, written, d_outputs) -> list[Tensor]:
    """The gradients of inputs, of gates if they are given, and of tensors"""
    backward = latent_scan_triton.backward if fused else loop_backward
    with without_autocast(noise.device):  # autograd may run inside of a region
        return backward(activation, noise, has_gates, *unflatten(tensors, counts), written, d_outputs)


def gradients(ctx, apply, d_outputs) -> tuple[Tensor | None, ...]:
    """The gradients of inputs, noise (none), gates and all tensors, by `apply`: `backward_pass` or its operator."""
    (inputs, noise, gates), tensors, written = unflatten(ctx.saved_tensors, (3, sum(ctx.counts), ctx.written))
    d_outputs = [
        torch.zeros_like(output) if d is None else d for output, d in zip(written[:4], d_outputs, strict=True)
    ]
    if torch.is_grad_enabled():  # the gradient itself is to be differentiated

        def definition(inputs, noise, gates, *tensors):
            *parts, lstm = unflatten(tensors, ctx.counts)
            lstm = lstm if gates is None else [*lstm, None]
            return latent_scan_reference(inputs, noise, *parts, lstm, gates, ctx.activation)

        return differentiable_gradient(definition, (inputs, noise, gates, *tensors), d_outputs)
    d_inputs, *found = apply(
        ctx.fused, ctx.activation, ctx.counts, noise, gates is not None, tensors, written, d_outputs
    )
    d_gates = None if gates is None else found.pop(0)
    return d_inputs, None, d_gates, *found


def keep(ctx, inputs, output) -> None:
    ctx.fused, ctx.activation, ctx.counts, scan_inputs, noise, gates, tensors = inputs
    ctx.written = len(output)
    ctx.save_for_backward(scan_inputs, noise, gates, *tensors, *output)
    ctx.set_materialize_grads(False)


class LatentScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, activation, counts, inputs, noise, gates, *tensors):
        written = forward_pass(fused, activation, counts, inputs, noise, gates, tensors)
        keep(ctx, (fused, activation, counts, inputs, noise, gates, tensors), written)
        return tuple(written[:4])

    @staticmethod
    def backward(ctx, *d_outputs):
        return None, None, None, *gradients(ctx, backward_pass, d_outputs)


@torch.library.custom_op("minidvae::latent_scan", mutates_args=())
def latent_scan_op(
    fused: bool,
    activation: str,
    counts: Sequence[int],
    inputs: Tensor,
    noise: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    return forward_pass(fused, activation, counts, inputs, noise, gates, tensors)


@latent_scan_op.register_fake
def _(fused, activation, counts, inputs, noise, gates, tensors):
    state, *layers = unflatten(tensors, counts)
    if fused:
        return latent_scan_triton.buffers(noise, *layers)
    widths = [noise.shape[2]] * 3 + [state[0].shape[1]]
    outputs = [noise.new_empty(*noise.shape[:2], width) for width in widths]
    return outputs + [sequence for group in loop_buffers(inputs, noise, *layers) for sequence in group]


@torch.library.custom_op("minidvae::latent_scan_backward", mutates_args=())
def latent_scan_backward_op(
    fused: bool,
    activation: str,
    counts: Sequence[int],
    noise: Tensor,
    has_gates: bool,
    tensors: Sequence[Tensor],
    written: Sequence[Tensor],
    d_outputs: Sequence[Tensor],
) -> list[Tensor]:
    return backward_pass(fused, activation, counts, noise, has_gates, tensors, written, d_outputs)


@latent_scan_backward_op.register_fake
def _(fused, activation, counts, noise, has_gates, tensors, written, d_outputs):
    state, posterior, transition, lstm = unflatten(tensors, counts)
    if fused:
        d_layers, d_gates, *_ = latent_scan_triton.backward_buffers(noise, state, posterior, transition, lstm)
        d_inputs = d_layers[..., : len(posterior[0])]
    else:
        (batch, frames, _), width = noise.shape, 4 * state[0].shape[1]
        d_inputs = noise.new_empty(frames, batch, len(posterior[0])).transpose(0, 1)
        d_gates = noise.new_empty(frames, batch, width).transpose(0, 1)
    return [d_inputs, *([d_gates] if has_gates else []), *(tensor.new_empty(tensor.shape) for tensor in tensors)]


def op_gradients(ctx, d_outputs):
    d_inputs, d_noise, d_gates, *d_tensors = gradients(ctx, latent_scan_backward_op, d_outputs[:4])
    return None, None, None, d_inputs, d_noise, d_gates, d_tensors


latent_scan_op.register_autograd(op_gradients, setup_context=keep)


def flat(state, posterior, transition, lstm) -> tuple[list[int], list[Tensor]]:
    """`counts` and `tensors`"""
    parts = [list(state), list(posterior), list(transition), [tensor for tensor in lstm if tensor is not None]]
    return [len(part) for part in parts], [tensor for part in parts for tensor in part]


def latent_scan_fused(
    inputs: Tensor,
    noise: Tensor,
    state: Sequence[Tensor],
    posterior: Sequence[Tensor],
    transition: Sequence[Tensor] = (),
    lstm: Sequence[Tensor] = (),
    gates: Tensor | None = None,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`latent_scan_reference` in one launch, and one backward, of a Triton kernel, for what is `fusible`."""
    counts, tensors = flat(state, posterior, transition, lstm)
    return LatentScan.apply(True, activation, counts, inputs, noise, gates, *tensors)


def latent_scan(
    inputs: Tensor,
    noise: Tensor,
    state: Sequence[Tensor],
    posterior: Sequence[Tensor],
    transition: Sequence[Tensor] = (),
    lstm: Sequence[Tensor] = (),
    gates: Tensor | None = None,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`latent_scan_reference`, by the fastest path for these tensors; all are brought to the dtype of the noise."""
    dtype, parts = noise.dtype, (state, posterior, transition, lstm)
    inputs, gates = inputs.to(dtype), None if gates is None else gates.to(dtype)
    parts = [[tensor if tensor is None else tensor.to(dtype) for tensor in part] for part in parts]
    with without_autocast(inputs.device):
        rows = noise.shape[:2]
        fits = inputs.shape[:2] == rows and (gates is None or gates.shape[:2] == rows)
        fits = fits and all(len(s) == len(noise) for s in state)
        if not fits or dtype not in (torch.float32, torch.float64) or len(lstm) > 3 or noise.requires_grad:
            return latent_scan_reference(inputs, noise, *parts, gates, activation)
        counts, tensors = flat(*parts)
        fused = inputs.is_cuda and latent_scan_triton.fusible(inputs, noise, gates, *unflatten(tensors, counts))
        if torch.compiler.is_compiling():
            return tuple(latent_scan_op(fused, activation, counts, inputs, noise, gates, tensors)[:4])
        return LatentScan.apply(fused, activation, counts, inputs, noise, gates, *tensors)
