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
t mod phases: frames that overlap by three quarters say nearly the same, and z need not.
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

from ..training import distributed
from .base import (
    DVAE,
    DVAEConfig,
    DVAEOutput,
    Gaussian,
    GaussianHead,
    Generators,
    Score,
    past,
    per_frame,
)

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
    z_log_variance: float = (
        0.0  # where the log-variance of q(z) starts: below 0, z says more from the first step on
    )
    context: int = (
        0  # frames in sight: itself and those before, in the encoder as many behind; 0: all
    )
    phases: int = 1  # of the clock of z
    w_prior: str = "standard"  # what samples draw w from: standard, N(0, I); aggregate, the moments of q(w) in training


class KeysValues:
    """Keys and values of the frames decoded so far, (batch, heads, frames, width of a head); one is added at a time."""

    def __init__(self, frames: int):
        self.capacity, self.frames = frames, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.frames == 0:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, self.frames], self.values[:, :, self.frames] = (
            keys[:, :, 0],
            values[:, :, 0],
        )
        self.frames += 1
        return self.keys[:, :, : self.frames], self.values[:, :, : self.frames]


@dataclass
class Places:
    """Numbers of frames (frames,) and what tells a network of them: sinusoids (frames, width), added to embeddings, or
    turns (2, frames, half the width of a head), by which queries and keys are rotated."""

    times: Tensor
    sinusoids: Tensor | None = None
    turns: Tensor | None = None

    def each(self) -> Iterator["Places"]:
        """Frame by frame."""
        for t in range(len(self.times)):
            positions = (
                x if x is None else x[..., t : t + 1, :] for x in (self.sinusoids, self.turns)
            )
            yield Places(self.times[t : t + 1], *positions)


def sinusoids(times: Tensor, width: int) -> Tensor:
    """Positions (frames, width) of Vaswani et al. 2017, section 3.5"""
    rate = torch.exp(torch.arange(0, width, 2, device=times.device) * (-math.log(10_000.0) / width))
    angle = times[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def turns(times: Tensor, width: int, context: int) -> Tensor:
    """Cosines and sines (2, frames, width/2) of the angles by which the pairs of a query and a key turn from frame to
    frame, at rates that tell neighbours apart down to ones that tell all in the context apart."""
    rate = FASTEST * context ** -torch.linspace(0, 1, width // 2, device=times.device)
    angle = times[:, None] * rate
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """The pairs (x_k, x_{k + width/2}) of (…, frames, width), turned"""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), turns.to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


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
        self, main: Tensor, source: Tensor, places: Places, cache=None, mask=None
    ) -> Tensor:
        """cache: `KeysValues` of the frames before a single new one. mask: which source frames there are, (batch,
        1, 1, frames); else all."""
        queries, keys, values = self.project(main, source, places)
        with (
            nullcontext()
            if self.fused or not torch.is_grad_enabled()
            else sdpa_kernel(SDPBackend.MATH)
        ):
            if cache is not None:  # one new frame, which may see those before it
                keys, values = (
                    seen[:, :, -self.context :] for seen in cache.append(keys, values)
                )  # of 0: all
                attended = F.scaled_dot_product_attention(queries, keys, values)
            elif self.context and main.shape[1] > self.context:
                attended = self.attend_within_context(queries, keys, values, mask)
            else:
                attended = F.scaled_dot_product_attention(
                    queries, keys, values, mask, is_causal=self.causal
                )
        return self.output(attended.transpose(1, 2).flatten(2))

    def project(
        self, main: Tensor, source: Tensor, places: Places
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, frames, width of a head)."""
        queries = self.query(main).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = (
            self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        if places.turns is not None:
            queries, keys = rotate(queries, places.turns), rotate(keys, places.turns)
        return queries, keys, values

    @torch.no_grad()
    def start_on_neighbours(self) -> None:
        """Each head attends to one place relative to its own, whatever the frames hold: to the frame itself and those
        before it, in the encoder to those around it."""
        width = len(self.query.bias)
        pairs = self.key_value.bias[:width].view(self.heads, 2, -1)
        pairs[:, 0], pairs[:, 1] = (
            math.sqrt(CERTAINTY * math.sqrt(2 * pairs.shape[2]) / pairs.shape[2]),
            0,
        )
        back = torch.arange(self.heads) - (0 if self.causal else self.heads // 2)
        self.query.bias.copy_(
            rotate(pairs.flatten(1), turns(-back, 2 * pairs.shape[2], self.context)).flatten()
        )
        self.query.weight.zero_()
        self.key_value.weight[:width].zero_()

    def attend_within_context(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """In time and memory that grow with the frames, not with their square: by pieces as long as the context, each
        with its keys and those of the piece before it, and of the one behind where it may look ahead. SDPA's fused
        kernels do not take pieces."""
        frames, piece = queries.shape[2], self.context
        fill, ahead = -frames % piece, 0 if self.causal else piece
        present = (
            queries.new_ones(1, 1, frames, dtype=torch.bool) if mask is None else mask[:, :, 0]
        )
        present = F.pad(present, (piece, fill + ahead)).unfold(2, 2 * piece + ahead, piece)[
            :, :, :, None
        ]
        keys, values = (
            F.pad(x, (0, 0, piece, fill + ahead)).unfold(2, 2 * piece + ahead, piece).mT
            for x in (keys, values)
        )
        place = torch.arange(-piece, piece + ahead, device=queries.device)
        back = place[piece : 2 * piece, None] - place
        seen = (back < piece) & (back > -max(ahead, 1)) & present
        queries = F.pad(queries, (0, 0, 0, fill)).unflatten(2, (-1, piece))
        return F.scaled_dot_product_attention(queries, keys, values, seen).flatten(2, 3)[
            :, :, :frames
        ]


def embed(
    layer: nn.Linear, frames: Tensor, places: Places, config: LigHTConfig, lag: int = 0
) -> Tensor:
    """What frames hold, scaled by √width, and their positions. lag: by how many frames they are late, for the clock"""
    h = of_phase(layer(frames), places.times - lag, layer.out_features // config.width) * math.sqrt(
        config.width
    )
    return h if places.sinusoids is None else h + places.sinusoids


def of_phase(all_phases: Tensor, times: Tensor, phases: int) -> Tensor:
    """(…, frames, phases · n) → (…, frames, n): of each frame, what belongs to its phase"""
    if phases == 1:
        return all_phases
    own = F.one_hot(times % phases, phases).to(all_phases)
    return (all_phases.unflatten(-1, (phases, -1)) * own[:, :, None]).sum(dim=-2)


class Block(nn.Module):
    """Transformer block (Vaswani et al. 2017), with `cross` a decoder block. first: the main stream is an embedding."""

    def __init__(self, config: LigHTConfig, first: bool, cross: bool):
        super().__init__()
        self.attention = Attention(config, raw=first, causal=cross)
        self.attention_norm = nn.LayerNorm(config.width)
        if cross:
            self.cross_attention = Attention(
                config, raw=True, causal=True
            )  # the source is an embedding in every block
            self.cross_norm = nn.LayerNorm(config.width)
        hidden, output = (
            nn.Linear(config.width, config.feedforward),
            nn.Linear(config.feedforward, config.width),
        )
        self.feedforward = nn.Sequential(hidden, nn.ReLU(), output)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(
        self, main: Tensor, places, source=None, residual=True, caches=(None, None), mask=None
    ) -> Tensor:
        """Without a source: an encoder block, every frame sees all in the mask. With one: a causal decoder block."""

        def add(main: Tensor, change: Tensor) -> Tensor:
            return main + change if residual else change

        main = self.attention_norm(add(main, self.attention(main, main, places, caches[0], mask)))
        if source is not None:
            main = self.cross_norm(add(main, self.cross_attention(main, source, places, caches[1])))
        return self.feedforward_norm(add(main, self.feedforward(main)))


class Decoder(nn.Module):
    """Causal blocks over two streams: the latents [z, w] and the scaled spectrum of the past."""

    def __init__(self, config: LigHTConfig):
        super().__init__()
        self.config = config
        self.embed_latents = nn.Linear(
            config.latent + config.w_latent, config.phases * config.width
        )
        self.embed_spectrum = nn.Linear(config.bins, config.width)
        self.blocks = nn.ModuleList(
            Block(config, layer == 0, cross=True) for layer in range(config.layers)
        )

    def forward(
        self, z, w, spectrum, places: Places, main: str, z_lag=0, residual=True, caches=None
    ) -> Tensor:
        """z, spectrum: (batch, frames, …) as this role may see them at each frame; w: (batch, w_latent). main: which of
        "latents" and "spectrum" is the main stream. z_lag: by how many frames z is late, for its clock."""
        latents = embed(
            self.embed_latents, torch.cat([z, per_frame(w, z)], dim=-1), places, self.config, z_lag
        )
        spectrum = embed(self.embed_spectrum, spectrum, places, self.config)
        h, source = (latents, spectrum) if main == "latents" else (spectrum, latents)
        for block, cache in zip(
            self.blocks, caches or [(None, None)] * len(self.blocks), strict=True
        ):
            h = block(h, places, source, residual, cache)
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
        if config.w_prior not in ("standard", "aggregate"):
            raise ValueError(f"w_prior={config.w_prior!r} is neither standard nor aggregate")
        if config.width % 2 or config.width % config.heads:
            raise ValueError(
                f"width={config.width} is not even, or not divisible by heads={config.heads}"
            )
        if config.context and config.width // config.heads % 2:
            raise ValueError(
                f"width={config.width} over heads={config.heads} is not even, as context asks for"
            )
        self.w_embedding = nn.Linear(config.bins, config.w_embedding)
        self.w_rnn = nn.LSTM(
            config.w_embedding,
            config.w_hidden,
            config.w_layers,
            batch_first=True,
            bidirectional=True,
        )
        self.w_posterior = GaussianHead(2 * config.w_hidden, config.w_latent)
        self.encoder_embedding = nn.Linear(config.bins + config.w_latent, config.width)
        self.encoder = nn.ModuleList(
            Block(config, layer == 0, cross=False) for layer in range(config.layers)
        )
        self.z_posterior = GaussianHead(config.width, config.phases * config.latent)
        self.z_posterior.log_variance.bias.data += config.z_log_variance
        self.decoders = nn.ModuleList(Decoder(config) for _ in range(self.decoder_count))
        self.z_prior = GaussianHead(config.width, config.phases * config.latent)
        self.output = nn.Linear(config.width, config.bins)
        if config.w_prior == "aggregate":
            self.w_moments = torch.cat(
                [torch.zeros(1, config.w_latent), torch.eye(config.w_latent)]
            )

    def places(self, frames: int) -> Places:
        times, weight, config = (
            torch.arange(frames, device=self.output.weight.device),
            self.output.weight,
            self.config,
        )
        if config.context:
            return Places(times, turns=turns(times, config.width // config.heads, config.context))
        return Places(times, sinusoids(times, config.width).to(weight))

    def of_phase(self, all_phases: Gaussian, places: Places) -> Gaussian:
        return Gaussian(*(of_phase(part, places.times, self.config.phases) for part in all_phases))

    def infer_w(self, inputs: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """q(w | x_{1:T}) from the scaled spectrum."""
        sequences = [self.w_embedding(inputs)]
        if lengths is not None:
            sequences = [
                x[None, :length] for x, length in zip(sequences[0], lengths.tolist(), strict=True)
            ]
        h = torch.cat([self.w_rnn(x)[1][0] for x in sequences], dim=1)
        return self.w_posterior(
            torch.cat([h[-2], h[-1]], dim=-1)
        )  # of the last layer, forward and backward

    def infer_z(self, inputs: Tensor, w: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """q(z_t | x_{1:T}, w)"""
        mask, places = None, self.places(inputs.shape[1])
        if lengths is not None:
            mask = (places.times < lengths.to(places.times.device)[:, None])[:, None, None]
        h = embed(
            self.encoder_embedding,
            torch.cat([inputs, per_frame(w, inputs)], dim=-1),
            places,
            self.config,
        )
        for block in self.encoder:
            h = block(h, places, mask=mask)
        return self.of_phase(self.z_posterior(h), places)

    def prior(
        self, z_past: Tensor, w: Tensor, x_past: Tensor, places: Places, caches=None
    ) -> Gaussian:
        """p(z_t | x_{1:t−1}, z_{1:t−1}, w), from the shifted z and the shifted scaled spectrum"""
        h = self.decoders[-1](z_past, w, x_past, places, self.prior_main, z_lag=1, caches=caches)
        return self.of_phase(self.z_prior(h), places)

    def likelihood(
        self, z: Tensor, w: Tensor, x_past: Tensor, places: Places, caches=None
    ) -> Tensor:
        """log-variance of p(x_t | x_{1:t−1}, z_{1:t}, w), from z and the shifted scaled spectrum"""
        variant = self.config.variant
        main = "latents" if variant == "plain" else "spectrum"
        residual = variant != "inv_s_nr"
        return self.output(
            self.decoders[0](z, w, x_past, places, main, residual=residual, caches=caches)
        )

    def infer(
        self, x: Tensor, noise: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None
    ) -> tuple:
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
        places = self.places(z.shape[1])
        p_z = self.prior(past(z), w, x_past, places)
        return Score(self.likelihood(z, w, x_past, places), p_z)

    @torch.no_grad()
    def replace_past(self, x_past: Tensor, z: Tensor, w: Tensor) -> Tensor:
        """In a share `own_past` of the sequences, the first ones, a past that is wrong: that of the sequence before in
        the batch, between silent and LOUDEST times as loud; in every second of them, what the decoder makes of that.

        Only what went wrong in training is put right in decoding. With the own output of a true past, two passes on,
        the decoder still reads what only the true past knows, and never sees what it would have to find back from: some
        utterances then run away, each frame fed back larger than the one before."""
        if torch.compiler.is_compiling():  # not for every share anew
            return torch.compiler.disable(self.replace_past)(x_past, z, w)
        everyone = distributed.count() * len(x_past)
        count = round(self.own_past * everyone)
        if count == 0:
            return x_past
        rows = torch.arange(everyone)[distributed.own(everyone)]
        silence = self.input_scale(x_past.new_zeros(1, 1, x_past.shape[-1]))
        level = LOUDEST * torch.rand(count, 1, 1, device=x_past.device)
        wrong = silence + level * (distributed.whole(x_past).roll(1, dims=0)[:count] - silence)
        wrong[:, 0] = 0  # nothing has passed yet
        wrong = torch.cat([wrong[rows[rows < count]], x_past[rows >= count]])
        again = (rows < count) & (rows % 2 == 0)
        if again.any():
            own = self.likelihood(z[again], w[again], wrong[again], self.places(z.shape[1]))
            wrong[again] = past(self.feed_back(own)).to(wrong)
        torch.clear_autocast_cache()  # it now holds weights cast without gradient
        return wrong

    def resynthesise_each(
        self, spectra: Sequence[Tensor], mode: str, noises: Sequence
    ) -> Iterator[Tensor]:
        """Padded to the longest, in one batch."""
        noise = (
            pad_sequence([z[0] for z, _ in noises], batch_first=True),
            torch.cat([w for _, w in noises]),
        )
        lengths = torch.tensor([len(x) for x in spectra])
        padded = self.resynthesise(pad_sequence(spectra, batch_first=True), mode, noise, lengths)
        for log_variance, x in zip(padded, spectra, strict=True):
            yield log_variance[: len(x)]

    def resynthesise_from_own_past(
        self, x: Tensor, noise=None, lengths: Tensor | None = None
    ) -> Tensor:
        _, _, w, _, z = self.infer(x, noise, lengths)
        return self.decode(z, w)

    @torch.no_grad()
    def decode(self, z: Tensor, w: Tensor) -> Tensor:
        return self.unroll(w, z.shape[1], lambda t, *_: z[:, t : t + 1])

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise_z, noise_w = self.draw_noise(n, frames, generator)
        w, places, caches = (
            self.draw_w(noise_w),
            list(self.places(frames).each()),
            self.decoders[-1].caches(frames),
        )

        def draw(t: int, z_past: Tensor, x_past: Tensor) -> Tensor:
            return self.prior(z_past, w, x_past, places[t], caches).sample(noise_z[:, t : t + 1])

        return self.unroll(w, frames, draw)

    def unroll(
        self, w: Tensor, frames: int, draw_z: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """log-variance (batch, frames, bins), frame by frame from the own past, with cached keys and values.
        draw_z(t, z_{t−1}, scaled x_{t−1}) gives z_t (batch, 1, latent)."""
        caches = self.decoders[0].caches(frames)
        z, x_past = (
            w.new_zeros(len(w), 1, self.config.latent),
            w.new_zeros(len(w), 1, self.config.bins),
        )
        log_variance = []
        for t, place in enumerate(self.places(frames).each()):
            z = draw_z(t, z, x_past)
            log_variance.append(self.likelihood(z, w, x_past, place, caches))
            x_past = self.feed_back(log_variance[-1])
        return torch.cat(log_variance, dim=1)
