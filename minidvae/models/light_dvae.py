"""LigHT-DVAE: light hierarchical Transformer dynamical VAE (Lin et al., ICASSP 2023).

    p(w) = N(0, I)                                             one w per sequence
    q(w | x_{1:T})                                             bidirectional LSTM, final states
    q(z_t | x_{1:T}, w)                                        encoder: self-attention over the whole sequence
    p(z_t | x_{1:t−1}, z_{1:t−1}, w)                           decoder, as the prior
    p(x_t | x_{1:t−1}, z_{1:t}, w)                             decoder, as the likelihood

A decoder block is self-attention over the main stream, cross-attention from it to the source stream, and a
feed-forward layer, with post-norm residual connections. The main stream is [z, w] and the source is x: the residual
path carries z, which is to keep the model from leaning on its past output. It does where x is raw power, as in the
paper; a compressed past is read all the same, and needs training on a past that is wrong.

A causal mask alone does not give these dependencies, since the residual path at position t carries its own input. So
the inputs are shifted: x_{t−1} everywhere and z_{t−1} in the prior, zeros first. Every mask is then the causal one.

Two settings are not the paper's. With `context`, attention sees so many frames, by relative positions (Su et al. 2021,
RoFormer, section 3.2), and each head starts on one neighbour. With `phases`, the maps to and from z_t differ with
t mod phases. Frames that overlap by three quarters say nearly the same four times over, and a code of 16 numbers that
is the same for every frame cannot help repeating itself; one with a clock says something else each time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from .base import DVAE, DVAEConfig, DVAEOutput, Gaussian, GaussianHead, Generators, Score, past, per_frame

VARIANTS = ("plain", "inv_s", "inv_s_nr")
LOUDEST = 2.0  # on the model's scale, of a past that is wrong
FASTEST = 2.0  # radians per frame, of relative positions
CERTAINTY = 8.0  # the score of the neighbour on which a head starts; that of a mean one is near 0


@dataclass
class LigHTConfig(DVAEConfig):
    beta_z: float = 0.01
    beta_w: float = 0.01  # weight of KL(q(w) ‖ p(w)) in the loss
    w_latent: int = 32
    width: int = 256  # d_model
    heads: int = 1
    feedforward: int = 1024
    layers: int = 4  # of the encoder and of each decoder
    w_embedding: int = 256
    w_hidden: int = 512  # LSTM cells per direction
    w_layers: int = 2
    variant: str = "plain"  # ablation: inv_s swaps the streams of the likelihood; inv_s_nr has no residual there
    z_log_variance: float = 0.0  # where the log-variance of q(z) starts: below 0, z says more from the first step on
    context: int = 0  # frames back that attention sees, in the encoder ahead as well; 0: all, by sinusoidal positions
    phases: int = 1  # of the clock of z


class KeysValues:
    """Keys and values of the frames decoded so far, (batch, heads, frames, width of a head); one is added at a time."""

    def __init__(self, frames: int):
        self.capacity, self.frames = frames, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.frames == 0:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, self.frames], self.values[:, :, self.frames] = keys[:, :, 0], values[:, :, 0]
        self.frames += 1
        return self.keys[:, :, : self.frames], self.values[:, :, : self.frames]


class Attention(nn.Module):
    """Scaled dot-product attention from one stream (batch, frames, width) to another. Fused kernels compute the scores
    again in backward, and overflow in e^{difference} where large ones are rounded differently the second time. Power
    spectra that are fed as they are make scores of 10⁹ and more: where such a stream comes in `raw`, not out of a layer
    norm, the attention is unfused, which keeps its weights."""

    def __init__(self, config: LigHTConfig, raw: bool, causal: bool):
        super().__init__()
        self.heads, self.context, self.causal = config.heads, config.context, causal
        self.fused = not (raw and config.input_scale == "power")
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)
        if self.context:
            self.start_on_neighbours()

    def forward(
        self, main: Tensor, source: Tensor, times: Tensor, cache: KeysValues | None = None, mask=None
    ) -> Tensor:
        """times: numbers of the frames. mask: which source frames there are, (batch, 1, 1, frames); else all."""
        queries, keys, values = self.project(main, source, times)
        with nullcontext() if self.fused or not torch.is_grad_enabled() else sdpa_kernel(SDPBackend.MATH):
            if cache is not None:  # one new frame, which may see those before it
                keys, values = (seen[:, :, -self.context :] for seen in cache.append(keys, values))
                attended = F.scaled_dot_product_attention(queries, keys, values)
            elif self.context and len(times) > self.context:
                attended = self.attend_within_context(queries, keys, values, mask)
            else:
                attended = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=self.causal)
        return self.output(attended.transpose(1, 2).flatten(2))

    def project(self, main: Tensor, source: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, frames, width of a head)."""
        queries = self.query(main).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.context:
            angle = times[:, None] * self.rates(queries.shape[-1]).to(queries)
            queries, keys = rotate(queries, angle), rotate(keys, angle)
        return queries, keys, values

    def rates(self, width: int) -> Tensor:
        """Radians per frame by which the pairs of a query and a key turn: from neighbours apart to all in reach."""
        return FASTEST * self.context ** -torch.linspace(0, 1, width // 2)

    @torch.no_grad()
    def start_on_neighbours(self) -> None:
        """Each head attends to one place relative to its own, whatever the frames hold: to the frame itself and those
        before it, in the encoder to those around it."""
        width = len(self.query.bias) // self.heads
        pairs = self.key_value.bias[: len(self.query.bias)].view(self.heads, 2, -1)
        pairs[:, 0], pairs[:, 1] = math.sqrt(CERTAINTY * math.sqrt(width) / (width // 2)), 0
        back = torch.arange(self.heads) - (0 if self.causal else self.heads // 2)
        angle = -back[:, None, None] * self.rates(width)
        self.query.bias.copy_(rotate(pairs.flatten(1)[:, None], angle).flatten())
        self.query.weight.zero_()
        self.key_value.weight[: len(self.query.bias)].zero_()

    def attend_within_context(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """In time and memory that grow with the frames, not with their square: by pieces as long as the context, each
        with its keys and the piece before, and behind where it may look ahead."""
        frames, piece = queries.shape[2], self.context
        fill, ahead = -frames % piece, 0 if self.causal else piece
        there = queries.new_ones(1, 1, frames, dtype=torch.bool) if mask is None else mask[:, :, 0]
        there = F.pad(there, (piece, fill + ahead)).unfold(2, 2 * piece + ahead, piece)[:, :, :, None]
        keys, values = (
            F.pad(x, (0, 0, piece, fill + ahead)).unfold(2, 2 * piece + ahead, piece).mT for x in (keys, values)
        )
        back = torch.arange(piece)[:, None] - torch.arange(-piece, piece + ahead)
        near = ((back < piece) & (back > -max(ahead, 1))).to(queries.device)
        near = near & there | (back == 0).to(queries.device)  # a frame of the padding sees itself
        queries = F.pad(queries, (0, 0, 0, fill)).unflatten(2, (-1, piece))
        return F.scaled_dot_product_attention(queries, keys, values, near).flatten(2, 3)[:, :, :frames]


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """The pairs (x_k, x_{k + width/2}) of (…, frames, width), turned by (…, frames, width/2) radians."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def sinusoids(times: Tensor, width: int) -> Tensor:
    """Positions (frames, width) of Vaswani et al. 2017, section 3.5"""
    rate = torch.exp(torch.arange(0, width, 2, device=times.device) * (-math.log(10_000.0) / width))
    angle = times[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def of_phase(every: Tensor, times: Tensor, phases: int) -> Tensor:
    """(…, frames, phases · n) → (…, frames, n): of each frame, what belongs to its phase"""
    turn = F.one_hot(times % phases, phases).to(every)
    return (every.unflatten(-1, (phases, -1)) * turn[:, :, None]).sum(dim=-2)


def embed(layer: nn.Linear, frames: Tensor, times: Tensor, config: LigHTConfig) -> Tensor:
    """What frames hold, scaled by √width, and their positions, where attention does not see those by itself"""
    h = of_phase(layer(frames), times, layer.out_features // config.width) * math.sqrt(config.width)
    return h if config.context else h + sinusoids(times, config.width).to(h)


class Block(nn.Module):
    """Transformer block (Vaswani et al. 2017), with `cross` a decoder block. first: the main stream is an embedding."""

    def __init__(self, config: LigHTConfig, first: bool, cross: bool):
        super().__init__()
        self.attention = Attention(config, raw=first, causal=cross)
        self.attention_norm = nn.LayerNorm(config.width)
        if cross:
            self.cross_attention = Attention(config, raw=True, causal=True)  # the source is an embedding in every block
            self.cross_norm = nn.LayerNorm(config.width)
        hidden, output = nn.Linear(config.width, config.feedforward), nn.Linear(config.feedforward, config.width)
        self.feedforward = nn.Sequential(hidden, nn.ReLU(), output)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(self, main: Tensor, times, source=None, residual=True, caches=(None, None), mask=None) -> Tensor:
        """Without a source: an encoder block, every frame sees all in the mask. With one: a causal decoder block."""

        def add(main: Tensor, change: Tensor) -> Tensor:
            return main + change if residual else change

        main = self.attention_norm(add(main, self.attention(main, main, times, caches[0], mask)))
        if source is not None:
            main = self.cross_norm(add(main, self.cross_attention(main, source, times, caches[1])))
        return self.feedforward_norm(add(main, self.feedforward(main)))


class Decoder(nn.Module):
    """Causal blocks over two streams: the latents [z, w] and the scaled spectrum of the past."""

    def __init__(self, config: LigHTConfig):
        super().__init__()
        self.config = config
        self.embed_latents = nn.Linear(config.latent + config.w_latent, config.phases * config.width)
        self.embed_spectrum = nn.Linear(config.bins, config.width)
        self.blocks = nn.ModuleList(Block(config, layer == 0, cross=True) for layer in range(config.layers))

    def forward(self, z, w, spectrum, times: Tensor, shift: int, main: str, residual=True, caches=None) -> Tensor:
        """z, spectrum: (batch, frames, …) as this role may see them at each frame; w: (batch, w_latent). times: numbers
        of the frames, less `shift` those of z. main: which of "latents" and "spectrum" is the main stream."""
        latents = embed(self.embed_latents, torch.cat([z, per_frame(w, z)], dim=-1), times - shift, self.config)
        spectrum = embed(self.embed_spectrum, spectrum, times, self.config)
        h, source = (latents, spectrum) if main == "latents" else (spectrum, latents)
        for block, cache in zip(self.blocks, caches or [(None, None)] * len(self.blocks), strict=True):
            h = block(h, times, source, residual, cache)
        return h

    def caches(self, frames: int) -> list[tuple[KeysValues, KeysValues]]:
        return [(KeysValues(frames), KeysValues(frames)) for _ in self.blocks]


class LigHTDVAE(DVAE):
    """One decoder for both roles, with a head of its own for each."""

    autoregressive = True
    decoder_count = 1  # the first is the likelihood's, the last the prior's
    prior_main = "latents"  # the prior's main stream

    def __init__(self, config: LigHTConfig):
        super().__init__(config)
        if config.variant not in VARIANTS:
            raise ValueError(f"variant={config.variant!r} is none of {', '.join(VARIANTS)}")
        if config.width % 2 or config.width % config.heads:
            raise ValueError(f"width={config.width} is not even, or not divisible by heads={config.heads}")
        if config.context and config.width // config.heads % 2:
            raise ValueError(f"width={config.width} over heads={config.heads} is not even, as context asks for")
        self.w_embedding = nn.Linear(config.bins, config.w_embedding)
        self.w_rnn = nn.LSTM(config.w_embedding, config.w_hidden, config.w_layers, batch_first=True, bidirectional=True)
        self.w_posterior = GaussianHead(2 * config.w_hidden, config.w_latent)
        self.encoder_embedding = nn.Linear(config.bins + config.w_latent, config.width)
        self.encoder = nn.ModuleList(Block(config, layer == 0, cross=False) for layer in range(config.layers))
        self.z_posterior = GaussianHead(config.width, config.phases * config.latent)
        self.z_posterior.log_variance.bias.data += config.z_log_variance
        self.decoders = nn.ModuleList(Decoder(config) for _ in range(self.decoder_count))
        self.z_prior = GaussianHead(config.width, config.phases * config.latent)
        self.output = nn.Linear(config.width, config.bins)

    def times(self, frames: int) -> Tensor:
        return torch.arange(frames, device=self.output.weight.device)

    def pick(self, every: Gaussian, times: Tensor) -> Gaussian:
        """Of a Gaussian for each phase, the one of each frame's"""
        return Gaussian(*(of_phase(parameter, times, self.config.phases) for parameter in every))

    def infer_w(self, inputs: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """q(w | x_{1:T}) from the scaled spectrum."""
        sequences = [self.w_embedding(inputs)]
        if lengths is not None:
            sequences = [x[None, :length] for x, length in zip(sequences[0], lengths.tolist(), strict=True)]
        h = torch.cat([self.w_rnn(x)[1][0] for x in sequences], dim=1)
        return self.w_posterior(torch.cat([h[-2], h[-1]], dim=-1))  # of the last layer, forward and backward

    def infer_z(self, inputs: Tensor, w: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """q(z_t | x_{1:T}, w)"""
        mask, times = None, self.times(inputs.shape[1])
        if lengths is not None:
            mask = (times < lengths.to(times.device)[:, None])[:, None, None]
        h = embed(self.encoder_embedding, torch.cat([inputs, per_frame(w, inputs)], dim=-1), times, self.config)
        for block in self.encoder:
            h = block(h, times, mask=mask)
        return self.pick(self.z_posterior(h), times)

    def prior(self, z_past: Tensor, w: Tensor, x_past: Tensor, times: Tensor, caches=None) -> Gaussian:
        """p(z_t | x_{1:t−1}, z_{1:t−1}, w), from the shifted z and the shifted scaled spectrum"""
        h = self.decoders[-1](z_past, w, x_past, times, 1, self.prior_main, caches=caches)
        return self.pick(self.z_prior(h), times)

    def likelihood(self, z: Tensor, w: Tensor, x_past: Tensor, times: Tensor, caches=None) -> Tensor:
        """log-variance of p(x_t | x_{1:t−1}, z_{1:t}, w), from z and the shifted scaled spectrum"""
        variant = self.config.variant
        main = "latents" if variant == "plain" else "spectrum"
        return self.output(self.decoders[0](z, w, x_past, times, 0, main, variant != "inv_s_nr", caches))

    def infer(self, x: Tensor, noise: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None) -> tuple:
        """The scaled spectrum, q(w), w, q(z), z"""
        noise_z, noise_w = self.draw_noise(*x.shape[:2]) if noise is None else noise
        inputs = self.input_scale(x)
        q_w = self.infer_w(inputs, lengths)
        w = q_w.sample(noise_w)
        q_z = self.infer_z(inputs, w, lengths)
        return inputs, q_w, w, q_z, q_z.sample(noise_z)

    def forward(self, x: Tensor, noise=None, lengths: Tensor | None = None) -> DVAEOutput:
        """lengths (batch,), on the CPU: how many frames of each sequence are no padding. The output for them is what
        it is without the others: only the posteriors look ahead."""
        inputs, q_w, w, q_z, z = self.infer(x, noise, lengths)
        log_variance, p_z = self.score(self.replace_past(past(inputs), z, w), z, w)
        return DVAEOutput(log_variance, z, q_z, p_z, w, q_w)

    def score(self, x_past: Tensor, z: Tensor, w: Tensor | None = None) -> Score:
        times = self.times(z.shape[1])
        p_z = self.prior(past(z), w, x_past, times)
        return Score(self.likelihood(z, w, x_past, times), p_z)

    @torch.no_grad()
    def replace_past(self, x_past: Tensor, z: Tensor, w: Tensor) -> Tensor:
        """In a share `own_past` of the sequences, the first ones, a past that is wrong: that of the sequence before in
        the batch, between silent and LOUDEST times as loud; in every second of them, what the decoder makes of that.

        Only what went wrong in training is put right in decoding. With the own output of a true past, two passes on,
        the decoder still reads what only the true past knows, and never sees what it would have to find back from: some
        utterances then run away, each frame fed back larger than the one before."""
        if torch.compiler.is_compiling():  # not for every share anew
            return torch.compiler.disable(self.replace_past)(x_past, z, w)
        count = round(self.own_past * len(x_past))
        if count == 0:
            return x_past
        silence = self.input_scale(x_past.new_zeros(1, 1, x_past.shape[-1]))
        level = LOUDEST * torch.rand(count, 1, 1, device=x_past.device)
        wrong = silence + level * (x_past.roll(1, dims=0)[:count] - silence)
        wrong[:, 0] = 0  # nothing has passed yet
        own = past(self.feed_back(self.likelihood(z[:count:2], w[:count:2], wrong[::2], self.times(z.shape[1]))))
        torch.clear_autocast_cache()  # it now holds weights cast without gradient
        wrong[::2] = own.to(wrong)
        return torch.cat([wrong, x_past[count:]])

    def resynthesise_each(self, spectra: Sequence[Tensor], mode: str, noises: Sequence) -> Iterator[Tensor]:
        """Padded to the longest, in one batch."""
        noise = pad_sequence([z[0] for z, _ in noises], batch_first=True), torch.cat([w for _, w in noises])
        lengths = torch.tensor([len(x) for x in spectra])
        padded = self.resynthesise(pad_sequence(spectra, batch_first=True), mode, noise, lengths)
        for log_variance, x in zip(padded, spectra, strict=True):
            yield log_variance[: len(x)]

    def resynthesise_from_own_past(self, x: Tensor, noise=None, lengths: Tensor | None = None) -> Tensor:
        _, _, w, _, z = self.infer(x, noise, lengths)
        return self.decode(z, w)

    @torch.no_grad()
    def decode(self, z: Tensor, w: Tensor) -> Tensor:
        return self.unroll(w, z.shape[1], lambda t, *_: z[:, t : t + 1])

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise_z, noise_w = self.draw_noise(n, frames, generator)
        w = self.draw_w(noise_w)
        times, caches = self.times(frames), self.decoders[-1].caches(frames)

        def draw(t: int, z_past: Tensor, x_past: Tensor) -> Tensor:
            return self.prior(z_past, w, x_past, times[t : t + 1], caches).sample(noise_z[:, t : t + 1])

        return self.unroll(w, frames, draw)

    def unroll(self, w: Tensor, frames: int, draw_z: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """log-variance (batch, frames, bins), frame by frame from the own past, with cached keys and values.
        draw_z(t, z_{t−1}, scaled x_{t−1}) gives z_t (batch, 1, latent)."""
        caches = self.decoders[0].caches(frames)
        z, x_past = w.new_zeros(len(w), 1, self.config.latent), w.new_zeros(len(w), 1, self.config.bins)
        log_variance = []
        for t, time in enumerate(self.times(frames).split(1)):
            z = draw_z(t, z, x_past)
            log_variance.append(self.likelihood(z, w, x_past, time, caches))
            x_past = self.feed_back(log_variance[-1])
        return torch.cat(log_variance, dim=1)
