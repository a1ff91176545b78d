"""What the recurrent models share: LSTM layers, and decoding from the own past."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import processes
from ..kernels.lstm_scan import LSTMWeights, lstm_scan
from .base import DVAE, DVAEConfig, Gaussian, GaussianHead, Generators


def affine(layers: nn.Sequential, head: GaussianHead | None = None) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer of an MLP; those of a head, stacked to [mean, log-variance], at the end."""
    found = [(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)]
    if head is not None:
        found.append(tuple(map(torch.cat, zip(head.mean.parameters(), head.log_variance.parameters(), strict=True))))
    return found


class LSTM(nn.LSTM):
    """A stack of LSTM layers, (batch, frames, inputs) → (batch, frames, outputs), from a state of zeros. reverse: reads
    from the last frame to the first. bidirectional: reads the other way too, that output behind the first."""

    SCANNED_ON_GPU: tuple[int, ...] = ()  # widths for which lstm_scan was measured to be faster than cuDNN

    def __init__(self, inputs: int, width: int, layers: int = 1, reverse: bool = False, bidirectional: bool = False):
        super().__init__(inputs, width, layers, batch_first=True, bidirectional=bidirectional)
        self.reverse, self.outputs = reverse, width * (1 + bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.hidden_size in self.SCANNED_ON_GPU:
            return self.scan(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))  # PyTorch takes a kernel by the type before its own cast, and
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

    def scan(self, x: Tensor) -> Tensor:
        """`forward` by `lstm_scan`, after one product for all inputs of a layer and direction."""
        zeros = x.new_zeros(len(x), self.hidden_size)

        def layer(x: Tensor, reverse: bool, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
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
        if kind is nn.RNN:  # PyTorch's own has a spectral radius of 0.58: what it reads is gone after a few frames
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
    return torch.stack([function(*frames) for frames in zip(*(s.unbind(1) for s in sequences), strict=True)], dim=1)


def stack_frames(frames: Sequence):
    """The outputs for the frames (batch, …) of a sequence → (batch, frames, …), field by field where they are tuples"""
    if isinstance(frames[0], tuple):
        return type(frames[0])(*map(stack_frames, zip(*frames, strict=True)))
    return None if frames[0] is None else torch.stack(frames, dim=1)


@dataclass
class RecurrentConfig(DVAEConfig):
    layers: int = 1  # of each recurrent network
    activation: str = "tanh"  # or relu, in the MLPs


class AutoregressiveDVAE(DVAE):
    """A recurrent DVAE whose decoder sees x_{t−1}. Subclasses define `step`, the decoder and the prior of one frame.
    Decoding from the own past takes z from the pass over the true x, and a state that has seen e^{l_{t−1}} and z."""

    autoregressive = True

    def step(self, x_past: Tensor, z_past: Tensor, state, draw_z: Callable[[Gaussian | None], Tensor]):
        """l_t, z_t and the state after a frame, from the scaled x_{t−1}, z_{t−1} and the state before it (None at the
        first frame). draw_z turns the prior of z_t (None for N(0, I)) into z_t."""
        raise NotImplementedError

    @torch.no_grad()
    def unroll(self, first: Tensor, frames: int, draw_z, true: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Frame by frame from the own past → log-variance and the scaled past that was fed, (batch, frames, bins).
        first: z_0 (batch, latent); draw_z(t, prior) gives z_t. With `true` (the scaled spectrum) a past frame is
        the own output with probability `own_past`, for each sequence and frame by itself, and the true one else."""
        z, state, x_past = first, None, first.new_zeros(len(first), self.config.bins)
        outputs, fed = [], []
        if true is not None:
            draw = processes.drawn(lambda rows: torch.rand(frames, rows, 1, device=z.device), len(z), dim=1)
            own = draw < self.own_past
        for t in range(frames):
            log_variance, z, state = self.step(x_past, z, state, lambda prior, t=t: draw_z(t, prior))
            outputs.append(log_variance)
            fed.append(x_past)
            x_past = self.feed_back(log_variance)
            if true is not None:
                x_past = torch.where(own[t], x_past, true[:, t])
        torch.clear_autocast_cache()  # it now holds weights cast without gradient
        return torch.stack(outputs, dim=1), torch.stack(fed, dim=1)

    def mixed_past(self, inputs: Tensor, z: Tensor) -> Tensor | None:
        """The scaled past for scheduled sampling, in part true and in part own output, (batch, frames, bins); None
        where all is true. The own outputs carry no gradient, so that one pass over this past, all frames at once, has
        the same values and the same gradients as the loop that made it."""
        if torch.compiler.is_compiling():  # not for every probability anew
            return torch.compiler.disable(self.mixed_past)(inputs, z)
        if self.own_past == 0:
            return None
        return self.unroll(torch.zeros_like(z[:, 0]), z.shape[1], lambda t, _: z[:, t], inputs)[1]

    def resynthesise_from_own_past(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        z = self(x, noise).z
        return self.unroll(torch.zeros_like(z[:, 0]), z.shape[1], lambda t, _: z[:, t])[0]

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise = self.draw_noise(n, frames, generator)

        def draw_z(t: int, prior: Gaussian | None) -> Tensor:
            return noise[:, t] if prior is None else prior.sample(noise[:, t])

        return self.unroll(torch.zeros_like(noise[:, 0]), frames, draw_z)[0]
