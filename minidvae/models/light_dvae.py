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
    position_offset: int = 0  # while training, positions start anywhere in 0 … this: long utterances are no news


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

    def __init__(self, config: LigHTConfig, raw: bool):
        super().__init__()
        self.heads = config.heads
        self.fused = not (raw and config.input_scale == "power")
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, main: Tensor, source: Tensor, causal: bool, cache: KeysValues | None = None, mask=None) -> Tensor:
        """mask, of an attention that is not causal: which source frames there are, (batch, 1, 1, frames)."""
        queries, keys, values = self.project(main, source)
        if cache is not None:  # one new frame, which may see all frames before it
            keys, values, causal = *cache.append(keys, values), False
        fused = self.fused or not torch.is_grad_enabled()
        with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        return self.output(attended.transpose(1, 2).flatten(2))

    def project(self, main: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, frames, width of a head)."""
        queries = self.query(main).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return queries, *self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Transformer block (Vaswani et al. 2017), with `cross` a decoder block. first: the main stream is an embedding."""

    def __init__(self, config: LigHTConfig, first: bool, cross: bool):
        super().__init__()
        self.attention = Attention(config, raw=first)
        self.attention_norm = nn.LayerNorm(config.width)
        if cross:
            self.cross_attention = Attention(config, raw=True)  # the source is an embedding in every block
            self.cross_norm = nn.LayerNorm(config.width)
        hidden, output = nn.Linear(config.width, config.feedforward), nn.Linear(config.feedforward, config.width)
        self.feedforward = nn.Sequential(hidden, nn.ReLU(), output)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(self, main: Tensor, source=None, residual=True, caches=(None, None), mask=None) -> Tensor:
        """Without a source: an encoder block, every frame sees all in the mask. With one: a causal decoder block."""

        def add(main: Tensor, change: Tensor) -> Tensor:
            return main + change if residual else change

        main = self.attention_norm(add(main, self.attention(main, main, source is not None, caches[0], mask)))
        if source is not None:
            main = self.cross_norm(add(main, self.cross_attention(main, source, True, caches[1])))
        return self.feedforward_norm(add(main, self.feedforward(main)))


class Decoder(nn.Module):
    """Causal blocks over two streams: the latents [z, w] and the scaled spectrum of the past."""

    def __init__(self, config: LigHTConfig):
        super().__init__()
        self.scale = math.sqrt(config.width)
        self.embed_latents = nn.Linear(config.latent + config.w_latent, config.width)
        self.embed_spectrum = nn.Linear(config.bins, config.width)
        self.blocks = nn.ModuleList(Block(config, layer == 0, cross=True) for layer in range(config.layers))

    def forward(self, z, w, spectrum, positions: Tensor, main: str, residual=True, caches=None) -> Tensor:
        """z, spectrum: (batch, frames, …) as this role may see them at each frame; w: (batch, w_latent). main: which of
        "latents" and "spectrum" is the main stream."""
        latents = self.embed_latents(torch.cat([z, per_frame(w, z)], dim=-1)) * self.scale + positions
        spectrum = self.embed_spectrum(spectrum) * self.scale + positions
        h, source = (latents, spectrum) if main == "latents" else (spectrum, latents)
        for block, cache in zip(self.blocks, caches or [(None, None)] * len(self.blocks), strict=True):
            h = block(h, source, residual, cache)
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
        self.w_embedding = nn.Linear(config.bins, config.w_embedding)
        self.w_rnn = nn.LSTM(config.w_embedding, config.w_hidden, config.w_layers, batch_first=True, bidirectional=True)
        self.w_posterior = GaussianHead(2 * config.w_hidden, config.w_latent)
        self.encoder_embedding = nn.Linear(config.bins + config.w_latent, config.width)
        self.encoder = nn.ModuleList(Block(config, layer == 0, cross=False) for layer in range(config.layers))
        self.z_posterior = GaussianHead(config.width, config.latent)
        self.z_posterior.log_variance.bias.data += config.z_log_variance
        self.decoders = nn.ModuleList(Decoder(config) for _ in range(self.decoder_count))
        self.z_prior = GaussianHead(config.width, config.latent)
        self.output = nn.Linear(config.width, config.bins)

    def positions(self, frames: int) -> Tensor:
        """Sinusoidal positions (frames, width), from a random first one while training."""
        width, weight = self.config.width, self.output.weight
        offset = torch.randint(self.config.position_offset * self.training + 1, (1,), device=weight.device)
        time = offset + torch.arange(frames, device=weight.device)
        rate = torch.exp(torch.arange(0, width, 2, device=weight.device) * (-math.log(10_000.0) / width))
        angle = time[:, None].to(rate) * rate
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(weight.dtype)

    def infer_w(self, inputs: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """q(w | x_{1:T}) from the scaled spectrum."""
        sequences = [self.w_embedding(inputs)]
        if lengths is not None:
            sequences = [x[None, :length] for x, length in zip(sequences[0], lengths.tolist(), strict=True)]
        h = torch.cat([self.w_rnn(x)[1][0] for x in sequences], dim=1)
        return self.w_posterior(torch.cat([h[-2], h[-1]], dim=-1))  # of the last layer, forward and backward

    def infer_z(self, inputs: Tensor, w: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """q(z_t | x_{1:T}, w)"""
        mask = None
        if lengths is not None:
            mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).to(inputs.device)[:, None, None]
        h = self.encoder_embedding(torch.cat([inputs, per_frame(w, inputs)], dim=-1))
        h = h * math.sqrt(self.config.width) + positions
        for block in self.encoder:
            h = block(h, mask=mask)
        return self.z_posterior(h)

    def prior(self, z_past: Tensor, w: Tensor, x_past: Tensor, positions: Tensor, caches=None) -> Gaussian:
        """p(z_t | x_{1:t−1}, z_{1:t−1}, w), from the shifted z and the shifted scaled spectrum"""
        return self.z_prior(self.decoders[-1](z_past, w, x_past, positions, self.prior_main, caches=caches))

    def likelihood(self, z: Tensor, w: Tensor, x_past: Tensor, positions: Tensor, caches=None) -> Tensor:
        """log-variance of p(x_t | x_{1:t−1}, z_{1:t}, w), from z and the shifted scaled spectrum"""
        variant = self.config.variant
        main = "latents" if variant == "plain" else "spectrum"
        return self.output(self.decoders[0](z, w, x_past, positions, main, variant != "inv_s_nr", caches))

    def infer(self, x: Tensor, noise: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None) -> tuple:
        """The scaled spectrum, the positions, q(w), w, q(z), z"""
        noise_z, noise_w = self.draw_noise(*x.shape[:2]) if noise is None else noise
        inputs, positions = self.input_scale(x), self.positions(x.shape[1])
        q_w = self.infer_w(inputs, lengths)
        w = q_w.sample(noise_w)
        q_z = self.infer_z(inputs, w, positions, lengths)
        return inputs, positions, q_w, w, q_z, q_z.sample(noise_z)

    def forward(self, x: Tensor, noise=None, lengths: Tensor | None = None) -> DVAEOutput:
        """lengths (batch,), on the CPU: how many frames of each sequence are no padding. The output for them is what
        it is without the others: only the posteriors look ahead."""
        inputs, positions, q_w, w, q_z, z = self.infer(x, noise, lengths)
        x_past = self.replace_past(past(inputs), z, w, positions)
        log_variance, p_z = self.score(x_past, z, w, positions)
        return DVAEOutput(log_variance, z, q_z, p_z, w, q_w)

    def score(self, x_past: Tensor, z: Tensor, w: Tensor | None = None, positions: Tensor | None = None) -> Score:
        positions = self.positions(z.shape[1]) if positions is None else positions
        p_z = self.prior(past(z), w, x_past, positions)
        return Score(self.likelihood(z, w, x_past, positions), p_z)

    @torch.no_grad()
    def replace_past(self, x_past: Tensor, z: Tensor, w: Tensor, positions: Tensor) -> Tensor:
        """In a share `own_past` of the sequences, the first ones, a past that is wrong: that of the sequence before in
        the batch, between silent and LOUDEST times as loud; in every second of them, what the decoder makes of that.

        Only what went wrong in training is put right in decoding. With the own output of a true past, two passes on,
        the decoder still reads what only the true past knows, and never sees what it would have to find back from: some
        utterances then run away, each frame fed back larger than the one before."""
        if torch.compiler.is_compiling():  # not for every share anew
            return torch.compiler.disable(self.replace_past)(x_past, z, w, positions)
        count = round(self.own_past * len(x_past))
        if count == 0:
            return x_past
        silence = self.input_scale(x_past.new_zeros(1, 1, x_past.shape[-1]))
        level = LOUDEST * torch.rand(count, 1, 1, device=x_past.device)
        wrong = silence + level * (x_past.roll(1, dims=0)[:count] - silence)
        wrong[:, 0] = 0  # nothing has passed yet
        own = past(self.feed_back(self.likelihood(z[:count:2], w[:count:2], wrong[::2], positions)))
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
        _, positions, _, w, _, z = self.infer(x, noise, lengths)
        return self.decode(z, w, positions)

    @torch.no_grad()
    def decode(self, z: Tensor, w: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = self.positions(z.shape[1]) if positions is None else positions
        return self.unroll(w, positions, lambda t, *_: z[:, t : t + 1])

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise_z, noise_w = self.draw_noise(n, frames, generator)
        w = self.draw_w(noise_w)
        positions, caches = self.positions(frames), self.decoders[-1].caches(frames)

        def draw(t: int, z_past: Tensor, x_past: Tensor) -> Tensor:
            return self.prior(z_past, w, x_past, positions[t : t + 1], caches).sample(noise_z[:, t : t + 1])

        return self.unroll(w, positions, draw)

    def unroll(self, w: Tensor, positions: Tensor, draw_z: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """log-variance (batch, frames, bins), frame by frame from the own past, with cached keys and values.
        draw_z(t, z_{t−1}, scaled x_{t−1}) gives z_t (batch, 1, latent)."""
        caches = self.decoders[0].caches(len(positions))
        z, x_past = w.new_zeros(len(w), 1, self.config.latent), w.new_zeros(len(w), 1, self.config.bins)
        log_variance = []
        for t, position in enumerate(positions.split(1)):
            z = draw_z(t, z, x_past)
            log_variance.append(self.likelihood(z, w, x_past, position, caches))
            x_past = self.feed_back(log_variance[-1])
        return torch.cat(log_variance, dim=1)
