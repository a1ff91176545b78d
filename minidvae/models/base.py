"""What the models share: Gaussian heads, MLPs, the input scale, and the DVAE contract.

A model file, this file and `kernels/` are all that a model needs: copy them into any project.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import gaussian_kl, is_divergence, lstm_scan

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of an output that is fed back as the past: e^l stays finite
LOG_FLOOR = 1e-6  # of the `log` input scale, on power, for waveforms with max|s| = 1
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}

Generators = torch.Generator | Sequence[torch.Generator] | None  # of random numbers: one, or one for each sequence


class Gaussian(NamedTuple):
    """Diagonal Gaussian, each field (…, dimensions)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """μ + σ·ε, the reparameterisation trick, with ε ~ N(0, I) given."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class GaussianHead(nn.Module):
    """Two linear layers: mean and log-variance."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.log_variance = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor) -> Gaussian:
        return Gaussian(self.mean(h), self.log_variance(h))


def mlp(inputs: int, widths: Sequence[int], activation: str = "tanh") -> nn.Sequential:
    """Linear layers of the given widths, an activation after each. No widths: the identity."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers)


def affine(layers: nn.Sequential, head: GaussianHead | None = None) -> list[Tensor]:
    """Weights and biases of an MLP, W, b, W, b, …; those of a head, stacked to [mean, log-variance], at the end."""
    tensors = [tensor for layer in layers if isinstance(layer, nn.Linear) for tensor in (layer.weight, layer.bias)]
    if head is not None:
        tensors.append(torch.cat([head.mean.weight, head.log_variance.weight]))
        tensors.append(torch.cat([head.mean.bias, head.log_variance.bias]))
    return tensors


class LSTM(nn.RNNBase):
    """A stack of LSTM layers, (batch, frames, inputs) → (batch, frames, width), from a state of zeros.

    reverse: the frames are read from the last to the first (the output for a frame stays in its place).
    bidirectional: the other direction as well, its output behind that of the first.

    The parameters are those of `nn.LSTM`, which torch.compile refuses, subclasses too. Without it `forward` is
    PyTorch's own layer, on the CPU the fastest of those tried (see `kernels/lstm_scan.py`), on a GPU cuDNN's.
    """

    SCANNED_ON_GPU: tuple[int, ...] = ()  # widths for which lstm_scan was measured to be faster than cuDNN

    def __init__(self, inputs: int, width: int, layers: int = 1, reverse: bool = False, bidirectional: bool = False):
        super().__init__("LSTM", inputs, width, layers, batch_first=True, bidirectional=bidirectional)
        self.reverse = reverse

    @property
    def outputs(self) -> int:
        return self.hidden_size * (1 + self.bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, and h after the last step of each layer and direction, (layers · directions, batch, width)."""
        if torch.compiler.is_compiling() or x.is_cuda and self.hidden_size in self.SCANNED_ON_GPU:
            return self.scan(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))  # PyTorch takes a kernel by the type before its own cast, and
            # fails on CPUs where there is none for bf16
        zeros = x.new_zeros(self.num_layers * (1 + self.bidirectional), len(x), self.hidden_size)
        weights = [tensor for cell in self.all_weights for tensor in cell]
        order = x.flip(1) if self.reverse else x
        outputs, h, _ = torch.lstm(
            order, (zeros, zeros), weights, True, self.num_layers, 0.0, self.training, self.bidirectional, True
        )
        return outputs.flip(1) if self.reverse else outputs, h

    def scan(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`run`, its time loops by `lstm_scan`, one product for all inputs of a layer and direction before each."""
        weights, last = iter(self.all_weights), []
        for _ in range(self.num_layers):
            outputs = []
            for reverse in (self.reverse, not self.reverse)[: 1 + self.bidirectional]:
                w_ih, w_hh, b_ih, b_hh = next(weights)
                zeros = x.new_zeros(len(x), self.hidden_size)
                h, h_last, _ = lstm_scan(F.linear(x, w_ih, b_ih + b_hh), w_hh, zeros, zeros, reverse)
                outputs.append(h)
                last.append(h_last)
            x = torch.cat(outputs, dim=-1) if self.bidirectional else h
        return x, torch.stack(last)

    def weights(self) -> list[Tensor]:
        """W_ih, W_hh and the sum of the two biases, of each layer"""
        return [tensor for w_ih, w_hh, b_ih, b_hh in self.all_weights for tensor in (w_ih, w_hh, b_ih + b_hh)]

    def step(self, x: Tensor, state: list[tuple[Tensor, Tensor]] | None = None):
        """One frame (batch, inputs) → the output for it and the state after it, (h, c) per layer."""
        state = state or [(x.new_zeros(len(x), self.hidden_size),) * 2] * self.num_layers
        after = []
        for weights, before in zip(self.all_weights, state, strict=True):
            after.append(torch.lstm_cell(x, before, *weights))
            x = after[-1][0]
        return x, after

    def forward_reference(self, x: Tensor) -> Tensor:
        """`forward`, one frame at a time."""
        directions = (self.reverse, not self.reverse)[: 1 + self.bidirectional]
        weights = iter(self.all_weights)
        for _ in range(self.num_layers):
            outputs = []
            for reverse in directions:
                cell, h = next(weights), []
                state = (x.new_zeros(len(x), self.hidden_size),) * 2
                for frame in x.flip(1).unbind(1) if reverse else x.unbind(1):
                    state = torch.lstm_cell(frame, state, *cell)
                    h.append(state[0])
                outputs.append(torch.stack(h[::-1] if reverse else h, dim=1))
            x = torch.cat(outputs, dim=-1)
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


class SegmentEncoder(nn.Module):
    """q(z | x, ·) of a segment x (batch, frames, bins): a recurrent network over the frames, its last output → Gaussian
    head. A second latent that z depends on is given to every frame. Architecture "fc": the segment as one vector."""

    def __init__(self, architecture: str, frames: int, bins: int, given: int, width: int, layers: int, latent: int):
        super().__init__()
        self.flat = architecture == "fc"
        if self.flat:
            self.network = mlp(frames * bins + given, (width,) * layers)
        else:
            self.network = recurrent(architecture, bins + given, width, layers)
        self.posterior = GaussianHead(width, latent)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Gaussian:
        if self.flat:
            x = x.flatten(1)
            return self.posterior(self.network(x if given is None else torch.cat([x, given], dim=-1)))
        x = x if given is None else torch.cat([x, per_frame(given, x)], dim=-1)
        return self.posterior(self.network(x)[:, -1])


class SegmentDecoder(nn.Module):
    """p(x | z) of a segment: a recurrent network fed z (batch, latent) at every frame → Gaussian head per frame,
    (batch, frames, bins). Architecture "fc": all frames at once."""

    def __init__(self, architecture: str, frames: int, bins: int, latent: int, width: int, layers: int):
        super().__init__()
        self.frames, self.flat = frames, architecture == "fc"
        self.network = mlp(latent, (width,) * layers) if self.flat else recurrent(architecture, latent, width, layers)
        self.output = GaussianHead(width, frames * bins if self.flat else bins)

    def forward(self, z: Tensor) -> Gaussian:
        if self.flat:
            return Gaussian(*(p.unflatten(-1, (self.frames, -1)) for p in self.output(self.network(z))))
        return self.output(self.network(z[:, None].expand(-1, self.frames, -1)))


def gaussian_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """log N(x; μ, diag e^λ) = −½ Σ ( log 2π + λ + (x − μ)²·e^{−λ} ), (batch, …) → (batch,), float32"""
    mean, log_variance = p.mean.float(), p.log_variance.float()
    squares = (x - mean).square() * torch.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squares).flatten(1).sum(-1)


class FrameBatch(NamedTuple):
    """Consecutive frames of many utterances, with a label each."""

    x: Tensor  # (batch, frames, bins), features as they are
    labels: Tensor  # (batch, frames) int64, −1 where there is no frame
    first: Tensor  # (batch,) bool: here an utterance begins, the state of the batch before is not carried over


class TranscriptBatch(NamedTuple):
    """Whole utterances with what is said in them."""

    x: Tensor  # (batch, frames, bins), features as they are, zeros after the end
    lengths: Tensor  # (batch,) int64, frames
    labels: Tensor  # (batch, longest) int64, symbols counted from 1, anything after the end
    counts: Tensor  # (batch,) int64, symbols


def ctc_loss(logits: Tensor, lengths: Tensor, batch: TranscriptBatch) -> Tensor:
    """−log p(labels | x), summed over all alignments (Graves et al. 2006), per symbol, mean over the batch. Output 0 is
    the blank. logits: (batch, frames, 1 + symbols), of which `lengths` count. Utterances with more symbols than
    frames, which have no alignment, count 0."""
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, batch.labels, lengths, batch.counts, zero_infinity=True)


def framewise(function: Callable, *sequences: Tensor) -> Tensor:
    """A function of one frame applied to sequences (batch, frames, …) frame by frame, as `*_reference` paths do."""
    return torch.stack([function(*frames) for frames in zip(*(s.unbind(1) for s in sequences), strict=True)], dim=1)


def past(sequence: Tensor) -> Tensor:
    """(batch, frames, …) → the same one frame later: zeros, then frames 0 … T−2."""
    return torch.cat([torch.zeros_like(sequence[:, :1]), sequence[:, :-1]], dim=1)


def per_frame(w: Tensor, frames: Tensor) -> Tensor:
    """w (batch, n) repeated along the frames of (batch, frames, …)"""
    return w[:, None].expand(-1, frames.shape[1], -1)


class Standardise(nn.Module):
    """Zero mean and unit variance per bin, with the statistics of the training set."""

    def __init__(self, bins: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(bins))
        self.register_buffer("deviation", torch.ones(bins))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.deviation + self.mean


class InputScale(Standardise):
    """The scale on which a network sees the power spectrum.

    power: as it is (what the papers do). log: log(x + 1e-6). root: x^¼. The last two are then standardised
    to zero mean and unit variance per bin with the statistics of the training set (`fit`).
    """

    SCALES = ("power", "log", "root")

    def __init__(self, bins: int, scale: str):
        super().__init__(bins)
        if scale not in self.SCALES:
            raise ValueError(f"input_scale={scale!r} is none of {', '.join(self.SCALES)}")
        self.scale = scale

    def compress(self, power: Tensor) -> Tensor:
        return torch.log(power + LOG_FLOOR) if self.scale == "log" else power.sqrt().sqrt()

    def fit(self, power: Tensor) -> None:
        if self.scale != "power":
            compressed = self.compress(power).flatten(0, -2)
            self.set(compressed.mean(0), compressed.std(0))

    def forward(self, power: Tensor) -> Tensor:
        return power if self.scale == "power" else super().forward(self.compress(power))


@dataclass
class DVAEOutput:
    """What a forward pass knows. p_z is None where the prior of z is N(0, I)."""

    log_variance: Tensor  # l, (batch, frames, bins): p(s_t | ·) = N_c(0, diag e^l)
    z: Tensor  # (batch, frames, latent)
    q_z: Gaussian
    p_z: Gaussian | None = None
    w: Tensor | None = None  # the sequence latent (w of HiT and LigHT, v of DSAE), (batch, sequence latent)
    q_w: Gaussian | None = None  # its posterior; its prior is N(0, I)

    @classmethod
    def stack(cls, frames: "list[DVAEOutput]") -> "DVAEOutput":
        """The frames (batch, …) of a sequence → (batch, frames, …)."""
        log_variance, z, q_z, p_z = zip(*((f.log_variance, f.z, f.q_z, f.p_z) for f in frames), strict=True)
        q_z = Gaussian(*(torch.stack(field, dim=1) for field in zip(*q_z, strict=True)))
        if p_z := [p for p in p_z if p is not None] or None:
            p_z = Gaussian(*(torch.stack(field, dim=1) for field in zip(*p_z, strict=True)))
        return cls(torch.stack(log_variance, dim=1), torch.stack(z, dim=1), q_z, p_z)


@dataclass
class DVAEConfig:
    """Settings that every DVAE has."""

    bins: int = 513
    latent: int = 16
    beta_z: float = 1.0  # weight of KL(q(z) ‖ p(z)) in the loss
    input_scale: str = "power"


class DVAE(nn.Module):
    """A dynamical VAE on power spectra x (batch, frames, bins). Subclasses define `forward` and `sample`."""

    batches = "spectra"  # what `loss` takes, see `minidvae/batches.py`
    autoregressive = False  # whether x_{t−1} feeds the decoder, so that the two modes of resynthesis differ
    kl_w_per_frame = True  # whether the KL of the sequence latent enters the loss divided by the number of frames
    output: nn.Linear  # the last layer, to log-variance

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.input_scale = InputScale(config.bins, config.input_scale)
        self.own_past = 0.0  # scheduled sampling: the probability that a past frame is the model's own output
        self.register_buffer("fitted_w", None, persistent=False)  # what `sample` draws w from, see `fit_w`

    def fit_statistics(self, power: Tensor) -> None:
        """Take the input scale from a sample of the training set (…, frames, bins), and start the output at
        its log mean power per bin, the best constant: a first loss orders of magnitude smaller."""
        with torch.no_grad():
            self.input_scale.fit(power)
            self.output.bias.copy_(power.flatten(0, -2).mean(0).clamp_min(1e-12).log())

    @torch.no_grad()
    def fit_w(self, power: Tensor) -> None:
        """Let `sample` draw w from the Gaussian with the moments of q(w | x) over these sequences (n, frames, bins), at
        least two, in place of N(0, I): ex-post density estimation (Ghosh et al., From variational to deterministic
        autoencoders, ICLR 2020). With a small β_w the posteriors lie where N(0, I) hardly ever draws. For models with a
        sequence latent, in `eval()`. Raises torch.linalg.LinAlgError where a posterior is not finite."""
        posteriors = [self(part).q_w for part in power.split(32)]
        mean, log_variance = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
        covariance = mean.T.cov() + log_variance.exp().mean(0).diag()
        self.fitted_w = torch.cat([mean.mean(0)[None], torch.linalg.cholesky(covariance)])

    def draw_w(self, noise: Tensor) -> Tensor:
        """w (batch, sequence latent) of a sample, from standard-normal draws of this shape."""
        if self.fitted_w is None:
            return noise
        return self.fitted_w[0] + noise @ self.fitted_w[1:].T

    def draw_noise(self, batch: int, frames: int, generator: Generators = None):
        """The standard-normal draws of one forward pass: (batch, frames, latent) for z; a pair of that and
        (batch, sequence latent) where there is a sequence latent. Drawn on the generator's device, so that
        a CPU generator gives the same draws on every device. With a generator for each sequence, its draws are
        the same in every batch; ValueError where there are not `batch` of them."""
        each = isinstance(generator, Sequence)
        if each and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} sequences; expected one for each, or one")
        parameter = next(self.parameters())

        def normal(*shape: int) -> Tensor:
            noises = []
            for one in generator if each else [generator]:
                device = parameter.device if one is None else one.device
                size = (1 if each else batch, *shape)
                noises.append(torch.randn(size, generator=one, device=device, dtype=parameter.dtype))
            return torch.cat(noises).to(parameter.device)

        noise_z = normal(frames, self.config.latent)
        return (noise_z, normal(self.config.w_latent)) if hasattr(self.config, "w_latent") else noise_z

    def forward(self, x: Tensor, noise=None) -> DVAEOutput:
        """One pass over the power spectrum. The past is the true one, or in a share `own_past` the model's own."""
        raise NotImplementedError

    def loss(self, batch: Tensor, noise=None) -> tuple[Tensor, dict[str, Tensor]]:
        """−ELBO per frame with weights β on its divergences, mean over the batch; and its terms, detached.

        reconstruction: Σ_f d_IS per frame; kl_z: per frame; kl_w: per sequence (it enters the loss divided
        by the number of frames, as the bound over a sequence is, unless the model says otherwise).
        """
        output = self(batch, noise)
        terms = {"reconstruction": is_divergence(batch, output.log_variance).mean()}
        terms["kl_z"] = gaussian_kl(*output.q_z, *(output.p_z or ())).mean()
        loss = terms["reconstruction"] + self.config.beta_z * terms["kl_z"]
        if output.q_w is not None:
            terms["kl_w"] = gaussian_kl(*output.q_w).mean()
            loss = loss + self.config.beta_w * terms["kl_w"] / (batch.shape[1] if self.kl_w_per_frame else 1)
        return loss, {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def resynthesise(self, x: Tensor, mode: str = "generation", noise=None, lengths: Tensor | None = None) -> Tensor:
        """Power spectrum (batch, frames, bins) → log-variance of its reconstruction, same shape.

        z (and w) come from the posterior given the true x. In mode "generation" the decoder's past is its
        own output e^{l_{t−1}}, in mode "teacher_forcing" the true x_{t−1}. Models that take padded batches (see
        `resynthesise_each`) are told the `lengths`.
        """
        if mode not in ("generation", "teacher_forcing"):
            raise ValueError(f'mode={mode!r} is neither "generation" nor "teacher_forcing"')
        arguments = (x, noise) if lengths is None else (x, noise, lengths)
        training, self.own_past = self.own_past, 0.0
        try:
            if mode == "generation" and self.autoregressive:
                return self.resynthesise_from_own_past(*arguments)
            return self(*arguments).log_variance
        finally:
            self.own_past = training

    def resynthesise_each(self, spectra: Sequence[Tensor], mode: str, noises: Sequence) -> Iterator[Tensor]:
        """`resynthesise` for utterances (frames, bins) of different length, with the noise of each."""
        for x, noise in zip(spectra, noises, strict=True):
            yield self.resynthesise(x[None], mode, noise)[0]

    def decode(self, z: Tensor, w: Tensor) -> Tensor:
        """The log-variance of given latents, (batch, frames, latent) and (batch, sequence latent), decoded from the own
        past. Only of models with a sequence latent."""
        raise NotImplementedError

    def feed_back(self, log_variance: Tensor) -> Tensor:
        """The model's own output on the scale of its input."""
        return self.input_scale(torch.exp(log_variance.clamp(*LOG_VARIANCE_RANGE)))

    def resynthesise_from_own_past(self, x: Tensor, noise=None) -> Tensor:
        raise NotImplementedError

    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        """n sequences drawn from the prior, but w from what `fit_w` found → log-variance (n, frames, bins)."""
        raise NotImplementedError


@dataclass
class RecurrentConfig(DVAEConfig):
    layers: int = 1  # of each recurrent network
    activation: str = "tanh"  # or relu, in the MLPs


class AutoregressiveDVAE(DVAE):
    """A recurrent DVAE whose decoder sees x_{t−1}. Subclasses define `step`, the decoder and the prior of one frame.

    Decoding from the own past is a stream of its own: z comes from the pass over the true x, then the decoder
    and the prior run on a state that has seen only e^{l_{t−1}} and z.
    """

    autoregressive = True

    def step(self, x_past: Tensor, z_past: Tensor, state, draw_z: Callable[[Gaussian | None], Tensor]):
        """One frame from the scaled x_{t−1}, z_{t−1} and the state before it (None at the first frame).

        draw_z turns the prior of z_t (None for N(0, I)) into z_t. Returns l_t, z_t and the state after.
        """
        raise NotImplementedError

    @torch.no_grad()
    def unroll(self, first: Tensor, frames: int, draw_z, true: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Frame by frame from the own past → log-variance and the scaled past that was fed, (batch, frames, bins).

        first: z_0 (batch, latent); draw_z(t, prior) gives z_t. With `true` (the scaled spectrum) a past frame is
        the own output with probability `own_past`, for each sequence and frame by itself, and the true one else.
        """
        z, state = first, None
        x_past = z.new_zeros(len(z), self.config.bins)
        outputs, fed = [], []
        own = None if true is None else torch.rand(frames, len(z), 1, device=z.device) < self.own_past
        for t in range(frames):
            log_variance, z, state = self.step(x_past, z, state, lambda prior, t=t: draw_z(t, prior))
            outputs.append(log_variance)
            fed.append(x_past)
            x_past = self.feed_back(log_variance)
            if true is not None:
                x_past = torch.where(own[t], x_past, true[:, t])
        torch.clear_autocast_cache()  # it now holds weights cast without gradient
        return torch.stack(outputs, dim=1), torch.stack(fed, dim=1)

    def mixed_past(self, inputs: Tensor, z: Tensor) -> Tensor:
        """The scaled past for scheduled sampling, in part true and in part own output, (batch, frames, bins).

        The own outputs carry no gradient, so that one pass over this past, all frames at once, has the same
        values and the same gradients as the loop that made it.
        """
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
