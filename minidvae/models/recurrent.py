"""What the recurrent models share: LSTM layers, and decoding from the own past."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import without_autocast
from ..kernels.lstm_scan import LSTMWeights, lstm_scan
from .base import DVAE, DVAEConfig, DVAEOutput, GaussianHead, Generators, Noise, Score, past

LSTMState = list[tuple[Tensor, Tensor]]  # (h, c) of each layer, (batch, width) each


def affine(layers: nn.Sequential, head: GaussianHead | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return (weight, bias) of each linear layer of an MLP, and at the end those of a head, mean
    and log-variance stacked."""
    weights = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weights.append((layer.weight, layer.bias))
    if head is not None:
        weight = torch.cat([head.mean.weight, head.log_variance.weight])
        bias = torch.cat([head.mean.bias, head.log_variance.bias])
        weights.append((weight, bias))
    return weights


class LSTM(nn.LSTM):
    """A stack of LSTM layers, (batch, frames, inputs) → (batch, frames, outputs), from a state of
    zeros.

    Args:
        reverse: read from the last frame to the first.
        bidirectional: read the other way too; that output stands behind the first.
    """

    SCANNED_ON_GPU: tuple[int, ...] = ()  # widths at which lstm_scan was measured to beat cuDNN

    def __init__(
        self,
        inputs: int,
        width: int,
        layers: int = 1,
        reverse: bool = False,
        bidirectional: bool = False,
    ):
        super().__init__(inputs, width, layers, batch_first=True, bidirectional=bidirectional)
        self.reverse = reverse
        self.outputs = 2 * width if bidirectional else width

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.hidden_size in self.SCANNED_ON_GPU:
            return self.scan(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
            # PyTorch chooses a kernel by the dtype before its own cast, and fails on CPUs that
            # have none for bf16.
            x = x.to(torch.get_autocast_dtype("cpu"))
        if self.reverse:
            return super().forward(x.flip(1))[0].flip(1)
        return super().forward(x)[0]

    def weights(self) -> list[LSTMWeights]:
        """Return the weights of each layer, without those of a second direction."""
        return [LSTMWeights(w_ih, w_hh, b_ih + b_hh) for w_ih, w_hh, b_ih, b_hh in self.all_weights]

    def step(self, x: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Advance by one frame x (batch, inputs). Return the output and the state after it."""
        if state is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            state = [(zeros, zeros)] * self.num_layers
        new_state = []
        for weights, layer_state in zip(self.all_weights, state, strict=True):
            h, c = torch.lstm_cell(x, layer_state, *weights)
            new_state.append((h, c))
            x = h
        return x, new_state

    def scan(self, x: Tensor) -> Tensor:
        """Compute `forward` by `lstm_scan`, after one product for all inputs of a layer and
        direction."""
        zeros = x.new_zeros(len(x), self.hidden_size)

        def layer(x: Tensor, reverse: bool, w_ih, w_hh, b_ih, b_hh) -> Tensor:
            gates = F.linear(x, w_ih, b_ih + b_hh)
            return lstm_scan(gates, w_hh, zeros, zeros, reverse)[0]

        return self.by_layer(layer, x)

    def forward_reference(self, x: Tensor) -> Tensor:
        """Compute `forward` one frame at a time."""

        def layer(x: Tensor, reverse: bool, *weights: Tensor) -> Tensor:
            zeros = x.new_zeros(len(x), self.hidden_size)
            state = (zeros, zeros)
            outputs = []
            for frame in x.flip(1).unbind(1) if reverse else x.unbind(1):
                state = torch.lstm_cell(frame, state, *weights)
                outputs.append(state[0])
            if reverse:
                outputs.reverse()
            return torch.stack(outputs, dim=1)

        return self.by_layer(layer, x)

    def by_layer(self, layer: Callable, x: Tensor) -> Tensor:
        """Apply `layer(x, reverse, *weights)` to each layer and direction in turn."""
        weights = iter(self.all_weights)
        directions = [self.reverse]
        if self.bidirectional:
            directions.append(not self.reverse)
        for _ in range(self.num_layers):
            outputs = [layer(x, reverse, *next(weights)) for reverse in directions]
            x = torch.cat(outputs, dim=-1)
        return x


class RecurrentOutputs(nn.Module):
    """A GRU or a plain tanh RNN, (batch, frames, inputs) → (batch, frames, width), from a state of
    zeros."""

    def __init__(self, network_type: type[nn.RNNBase], inputs: int, width: int, layers: int):
        super().__init__()
        self.network = network_type(inputs, width, layers, batch_first=True)
        if network_type is nn.RNN:
            # PyTorch's own initialisation has a spectral radius of 0.58: what the network reads
            # is forgotten after a few frames.
            for _, w_hh, *_ in self.network.all_weights:
                nn.init.orthogonal_(w_hh)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def recurrent(architecture: str, inputs: int, width: int, layers: int = 1) -> nn.Module:
    """Return an lstm, a gru or an rnn, (batch, frames, inputs) → (batch, frames, width)."""
    if architecture == "lstm":
        return LSTM(inputs, width, layers)
    network_type = {"gru": nn.GRU, "rnn": nn.RNN}[architecture]
    return RecurrentOutputs(network_type, inputs, width, layers)


def framewise(function: Callable, *sequences: Tensor) -> Tensor:
    """Apply a function of one frame to sequences (batch, frames, …) frame by frame, as the
    `*_reference` paths do."""
    frames = zip(*(sequence.unbind(1) for sequence in sequences), strict=True)
    return torch.stack([function(*frame) for frame in frames], dim=1)


def stack_frames(frames: Sequence):
    """Stack outputs for single frames (batch, …) to (batch, frames, …), field by field where they
    are tuples; None stays None."""
    if isinstance(frames[0], tuple):
        fields = zip(*frames, strict=True)
        return type(frames[0])(*(stack_frames(field) for field in fields))
    return None if frames[0] is None else torch.stack(frames, dim=1)


@dataclass
class RecurrentConfig(DVAEConfig):
    layers: int = 1  # layers of each recurrent network
    activation: str = "tanh"  # activation of the MLPs; or relu


class DecodedFrame(NamedTuple):
    """One frame of decoding from the own past."""

    log_variance: Tensor  # (batch, bins)
    z: Tensor  # (batch, latent)
    state: LSTMState


class AutoregressiveDVAE(DVAE):
    """A recurrent DVAE whose decoder sees x_{t−1}.

    Subclasses define:
        infer(inputs, noise_z): from the scaled spectrum, q(z), its sample, and the decoder's
            hidden states `hidden(past(inputs), z)`, or None where these are not at hand;
        hidden(x_past, z): the outputs h (batch, frames, ·) of the decoder's LSTM;
        score_of(h, z): the Score;
        decode_frame(x_past, z_past, state, z, noise): the same for one frame, for decoding.
    """

    autoregressive = True

    def forward(
        self, x: Tensor, noise: Noise | None = None, scheduled_sampling_prob: float = 0.0
    ) -> DVAEOutput:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2], scheduled_sampling=scheduled_sampling_prob > 0)
        inputs = self.input_scale(x)
        q_z, z, h = self.infer(inputs, noise.z)
        if scheduled_sampling_prob > 0:
            x_past = self.mix_past(inputs, z, noise.past, scheduled_sampling_prob)
            h = self.hidden(x_past, z)
        elif h is None:
            h = self.hidden(past(inputs), z)
        log_variance, p_z = self.score_of(h, z)
        return DVAEOutput(log_variance, z, q_z, p_z)

    def score(self, x_past: Tensor, z: Tensor, w: None = None) -> Score:
        return self.score_of(self.hidden(x_past, z), z)

    def decode_frame(
        self,
        x_past: Tensor,
        z_past: Tensor,
        state: LSTMState | None,
        z: Tensor | None,
        noise: Tensor | None,
    ) -> DecodedFrame:
        """Decode frame t.

        Args:
            x_past: x_{t−1} on the scale of the input, (batch, bins); zeros in the first frame.
            z_past: z_{t−1}, (batch, latent); zeros in the first frame.
            state: of the decoder's LSTM after the frame before; None in the first frame.
            z: z_t, (batch, latent). None: it is drawn from the prior with
            noise: standard-normal draws, (batch, latent).
        """
        raise NotImplementedError

    @torch.no_grad()
    def unroll(
        self,
        z: Tensor | None = None,
        noise: Tensor | None = None,
        true_inputs: Tensor | None = None,
        use_own_output: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode frame by frame from the own past.

        Args:
            z: (batch, frames, latent). None: z is drawn from the prior with
            noise: standard-normal draws, (batch, frames, latent).
            true_inputs: the scaled spectrum (batch, frames, bins), which takes the place of the
                own output as the past of frame t where
            use_own_output: (batch, frames, 1) bool, is false at t.

        Returns:
            log-variance (batch, frames, bins), and the past that was used, on the scale of the
            input, same shape.
        """
        batch, num_frames = noise.shape[:2] if z is None else z.shape[:2]
        like = noise if z is None else z
        x_past = like.new_zeros(batch, self.config.bins)
        z_past = like.new_zeros(batch, self.config.latent)
        state = None
        log_variances = []
        pasts = []
        with without_autocast(like.device):
            for t in range(num_frames):
                if t > 0:
                    x_past = self.feed_back(log_variances[-1])
                    if true_inputs is not None:
                        x_past = torch.where(use_own_output[:, t], x_past, true_inputs[:, t - 1])
                frame = self.decode_frame(
                    x_past,
                    z_past,
                    state,
                    z=None if z is None else z[:, t],
                    noise=None if noise is None else noise[:, t],
                )
                z_past = frame.z
                state = frame.state
                log_variances.append(frame.log_variance)
                pasts.append(x_past)
        return torch.stack(log_variances, dim=1), torch.stack(pasts, dim=1)

    def draw_past_noise(
        self, batch: int, frames: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return uniform draws (batch, frames, 1): the past of a frame is the own output where
        they are below the scheduled-sampling probability."""
        device = self.output.weight.device if generator is None else generator.device
        draws = torch.rand(frames, batch, 1, device=device, generator=generator)
        return draws.transpose(0, 1)

    @torch.compiler.disable  # a loop over frames; and the probability changes in every step
    def mix_past(self, inputs: Tensor, z: Tensor, draws: Tensor, probability: float) -> Tensor:
        """Return the scaled past (batch, frames, bins) of scheduled sampling: the own output with
        this probability, for each sequence and frame by itself, else the true one.

        The own outputs carry no gradient, so that one pass over this past, all frames at once, has
        the same values and the same gradients as the loop that made it.
        """
        return self.unroll(z, true_inputs=inputs, use_own_output=draws < probability)[1]

    @torch.no_grad()
    def resynthesise_from_own_past(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        _, z, _ = self.infer(self.input_scale(x), noise.z)
        return self.unroll(z)[0]

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        return self.unroll(noise=self.draw_noise(n, frames, generator).z)[0]
