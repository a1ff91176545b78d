"""What the recurrent models share: LSTM layers, and decoding from the own past."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import without_autocast
from ..kernels.lstm_scan import LSTMWeights, lstm_cell_forward, lstm_scan
from ..training import distributed
from .base import DVAE, DVAEConfig, DVAEOutput, GaussianHead, Generators, Score, past


def affine(layers: nn.Sequential, head: GaussianHead | None = None) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer of an MLP; those of a head, stacked to [mean, log-variance], at the end."""
    found = [(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)]
    if head is not None:
        found.append(
            tuple(
                map(
                    torch.cat,
                    zip(head.mean.parameters(), head.log_variance.parameters(), strict=True),
                )
            )
        )
    return found


class LSTM(nn.LSTM):
    """A stack of LSTM layers, (batch, frames, inputs) → (batch, frames, outputs), from a state of zeros. reverse: reads
    from the last frame to the first. bidirectional: reads the other way too, that output behind the first."""

    SCANNED_ON_GPU: tuple[
        int, ...
    ] = ()  # widths for which lstm_scan was measured to be faster than cuDNN

    def __init__(
        self,
        inputs: int,
        width: int,
        layers: int = 1,
        reverse: bool = False,
        bidirectional: bool = False,
    ):
        super().__init__(inputs, width, layers, batch_first=True, bidirectional=bidirectional)
        self.reverse, self.outputs = reverse, width * (1 + bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.hidden_size in self.SCANNED_ON_GPU:
            return self.scan(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
            x = x.to(
                torch.get_autocast_dtype("cpu")
            )  # PyTorch takes a kernel by the type before its own cast, and
            # fails on CPUs where there is none for bf16
        return super().forward(x.flip(1))[0].flip(1) if self.reverse else super().forward(x)[0]

    def weights(self) -> list[LSTMWeights]:
        """Of each layer, without a second direction"""
        return [LSTMWeights(w_ih, w_hh, b_ih + b_hh) for w_ih, w_hh, b_ih, b_hh in self.all_weights]

    def step(self, x: Tensor, state: list[tuple[Tensor, Tensor]] | None = None):
        """One frame (batch, inputs) → the output for it and the state after it, (h, c) per layer."""
        state = state or [(x.new_zeros(len(x), self.hidden_size),) * 2] * self.num_layers
        after = []
        for weights, before in zip(self.all_weights, state, strict=True):
            after.append(torch.lstm_cell(x, before, *weights))
            x = after[-1][0]
        return x, after

    def step_in(self, memory: Tensor) -> Callable[[], None]:
        """A step without gradient: memory holds the inputs of a frame and beside them the output of the one before,
        (batch, inputs + width), zeros at first, which it replaces."""
        inputs, h = memory.split([self.input_size, self.hidden_size], dim=1)
        (w_ih, w_hh, bias), *upper = self.weights()
        weight, state, gates, c = (
            torch.cat([w_ih, w_hh], 1).t(),
            None,
            h.new_empty(len(h), 4 * h.shape[1]),
            h.clone(),
        )
        cell = (gates[:, : 2 * h.shape[1]], *gates.chunk(4, dim=1)), c, c, torch.empty_like(c), h

        def step() -> None:
            nonlocal state
            if upper or h.is_cuda:  # a GPU has a kernel for the cell
                output, state = self.step(inputs, state)
                h.copy_(output)
            else:
                torch.addmm(bias, memory, weight, out=gates)
                lstm_cell_forward(*cell)

        return step

    def scan(self, x: Tensor) -> Tensor:
        """`forward` by `lstm_scan`, after one product for all inputs of a layer and direction."""
        zeros = x.new_zeros(len(x), self.hidden_size)

        def layer(
            x: Tensor, reverse: bool, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
        ) -> Tensor:
            return lstm_scan(F.linear(x, w_ih, b_ih + b_hh), w_hh, zeros, zeros, reverse)[0]

        return self.by_layer(layer, x)

    def forward_reference(self, x: Tensor) -> Tensor:
        """`forward`, one frame at a time."""

        def layer(x: Tensor, reverse: bool, *weights: Tensor) -> Tensor:
            h, state = [], (x.new_zeros(len(x), self.hidden_size),) * 2
            for frame in x.flip(1).unbind(1) if reverse else x.unbind(1):
                state = torch.lstm_cell(frame, state, *weights)
                h.append(state[0])
            return torch.stack(h[::-1] if reverse else h, dim=1)

        return self.by_layer(layer, x)

    def by_layer(self, layer: Callable, x: Tensor) -> Tensor:
        weights = iter(self.all_weights)
        directions = (self.reverse, not self.reverse)[: 1 + self.bidirectional]
        for _ in range(self.num_layers):
            x = torch.cat([layer(x, reverse, *next(weights)) for reverse in directions], dim=-1)
        return x


class RecurrentOutputs(nn.Module):
    """A GRU or a plain tanh RNN, (batch, frames, inputs) → (batch, frames, width), from a state of zeros."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, width: int, layers: int):
        super().__init__()
        self.network = kind(inputs, width, layers, batch_first=True)
        if (
            kind is nn.RNN
        ):  # PyTorch's own has a spectral radius of 0.58: what it reads is gone after a few frames
            for _, w_hh, *_ in self.network.all_weights:
                nn.init.orthogonal_(w_hh)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def recurrent(architecture: str, inputs: int, width: int, layers: int = 1) -> nn.Module:
    """An lstm, a gru or an rnn, (batch, frames, inputs) → (batch, frames, width)."""
    if architecture == "lstm":
        return LSTM(inputs, width, layers)
    return RecurrentOutputs({"gru": nn.GRU, "rnn": nn.RNN}[architecture], inputs, width, layers)


def framewise(function: Callable, *sequences: Tensor) -> Tensor:
    """A function of one frame applied to sequences (batch, frames, …) frame by frame, as `*_reference` paths do."""
    return torch.stack(
        [function(*frames) for frames in zip(*(s.unbind(1) for s in sequences), strict=True)], dim=1
    )


def stack_frames(frames: Sequence):
    """The outputs for the frames (batch, …) of a sequence → (batch, frames, …), field by field where they are tuples"""
    if isinstance(frames[0], tuple):
        return type(frames[0])(*map(stack_frames, zip(*frames, strict=True)))
    return None if frames[0] is None else torch.stack(frames, dim=1)


@dataclass
class RecurrentConfig(DVAEConfig):
    layers: int = 1  # of each recurrent network
    activation: str = "tanh"  # or relu, in the MLPs


def in_place(
    activation: str, layers: nn.Sequential, last: tuple[Tensor, Tensor] | None = None
) -> Callable:
    """An MLP, and `last`, an affine layer, as a function of its input and of where to write, without gradient."""
    act_, transposed = (
        getattr(torch, f"{activation}_"),
        [(weight.t(), bias) for weight, bias in affine(layers)],
    )

    def apply(x: Tensor, out: Tensor) -> None:
        for weight, bias in transposed:
            x = act_(torch.addmm(bias, x, weight))
        out.copy_(x) if last is None else torch.addmm(last[1], x, last[0].t(), out=out)

    return apply


class AutoregressiveDVAE(DVAE):
    """A recurrent DVAE whose decoder sees x_{t−1}. Subclasses define `infer(inputs, noise)`, from the scaled spectrum
    q(z), its sample, and `hidden` of the true past or None; `hidden(x_past, z)`, the outputs h of the decoder's LSTM;
    `score_of(h, z)`; and `frame_modules`. Decoding from the own past takes a z inferred from the true x."""

    autoregressive = True

    def frame_modules(self) -> tuple:
        """What makes a frame: an order, the MLPs on x_{t−1} and on z, the LSTM, the MLPs of the prior (None for
        N(0, I)) and the decoder. In this order the features of x and z and the LSTM's output h lie side by side: the
        LSTM reads all up to h, the decoder all after x, the prior all from h on."""
        raise NotImplementedError

    def forward(self, x: Tensor, noise: Tensor | None = None) -> DVAEOutput:
        noise, inputs = (
            self.draw_noise(*x.shape[:2]) if noise is None else noise,
            self.input_scale(x),
        )
        q_z, z, h = self.infer(inputs, noise)
        x_past = self.mixed_past(inputs, z)
        if h is None or x_past is not None:
            h = self.hidden(past(inputs) if x_past is None else x_past, z)
        log_variance, p_z = self.score_of(h, z)
        return DVAEOutput(log_variance, z, q_z, p_z)

    def score(self, x_past: Tensor, z: Tensor, w: None = None) -> Score:
        return self.score_of(self.hidden(x_past, z), z)

    @torch.no_grad()
    def unroll(self, z: Tensor, draw: bool = False, true: Tensor | None = None) -> Tensor:
        """Frame by frame from the own past → log-variance (batch, frames, bins). z: (batch, frames, latent), with
        `draw` the noise that z_t is drawn with. With `true` (the scaled spectrum) a past frame is the own output with
        probability `own_past`, for each sequence and frame by itself, else the true one, and this past is returned."""
        order, mlp_x, mlp_z, lstm, mlp_prior, decoder = self.frame_modules()
        act, draw = self.config.activation, draw and mlp_prior is not None
        widths = {"x": mlp_x.outputs, "z": mlp_z.outputs, "h": lstm.hidden_size}
        memory = z.new_zeros(len(z), sum(widths.values()))
        part = dict(zip(order, memory.split([widths[name] for name in order], dim=1), strict=True))
        after_x, up_to_h = (
            sum(widths[name] for name in order.partition(last)[0] + last) for last in "xh"
        )
        if true is not None:
            draws = distributed.drawn(
                lambda rows: torch.rand(z.shape[1], rows, 1, device=z.device), len(z), dim=1
            )
        x_past, moments = (
            z.new_zeros(len(z), self.config.bins),
            z.new_empty(len(z), 2 * self.config.latent),
        )
        outputs, fed, (mean, log_variance) = (
            z.new_empty(*z.shape[:2], self.config.bins),
            [x_past],
            moments.chunk(2, 1),
        )
        with without_autocast(z.device):
            features = (z if draw else mlp_z(z)).unbind(1)
            write_x, write_z, step = (
                in_place(act, mlp_x),
                in_place(act, mlp_z),
                lstm.step_in(memory[:, :up_to_h]),
            )
            write_output = in_place(act, decoder, (self.output.weight, self.output.bias))
            write_prior = (
                in_place(act, mlp_prior, *affine(nn.Sequential(), self.prior)) if draw else None
            )
            for t, output in enumerate(outputs.unbind(1)):
                if order == "zxh":
                    part["z"].copy_(features[t])
                if t > 0:
                    x_past = self.feed_back(outputs[:, t - 1])
                    if true is not None:
                        fed.append(
                            x_past := torch.where(draws[t] < self.own_past, x_past, true[:, t - 1])
                        )
                write_x(x_past, part["x"])
                if t > 0 or order != "xzh":  # that LSTM reads z of the frame before
                    step()
                if draw:
                    write_prior(memory[:, up_to_h - widths["h"] :], moments)
                    write_z(
                        torch.addcmul(mean, log_variance.mul_(0.5).exp_(), features[t]), part["z"]
                    )
                else:
                    part["z"].copy_(features[t])
                write_output(memory[:, after_x:], output)
        return outputs if true is None else torch.stack(fed, dim=1)

    def mixed_past(self, inputs: Tensor, z: Tensor) -> Tensor | None:
        """The scaled past for scheduled sampling, in part true and in part own output, (batch, frames, bins); None
        where all is true. The own outputs carry no gradient, so that one pass over this past, all frames at once, has
        the same values and the same gradients as the loop that made it."""
        if torch.compiler.is_compiling():  # not for every probability anew
            return torch.compiler.disable(self.mixed_past)(inputs, z)
        return self.unroll(z, true=inputs) if self.own_past > 0 else None

    @torch.no_grad()
    def resynthesise_from_own_past(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = self.draw_noise(*x.shape[:2]) if noise is None else noise
        return self.unroll(self.infer(self.input_scale(x), noise)[1])

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        return self.unroll(self.draw_noise(n, frames, generator), draw=True)
