"""LigHT-DVAE: light hierarchical Transformer dynamical VAE (Lin et al., ICASSP 2023).

    p(w) = N(0, I)                                             one w per sequence
    q(w | x_{1:T})                                             bidirectional LSTM, final states
    q(z_t | x_{1:T}, w)                                        encoder: self-attention
    p(z_t | x_{1:t−1}, z_{1:t−1}, w)                           decoder, as the prior
    p(x_t | x_{1:t−1}, z_{1:t}, w)                             decoder, as the likelihood

A decoder block is self-attention over the main stream, cross-attention from it to the source
stream, and a feed-forward layer, with post-norm residual connections. The main stream is [z, w]
and the source is x (section 2.3): the residual connections carry z, which is to keep the model
from relying on its past output.

A causal mask alone does not give these dependencies, since the residual connection at position t
carries its own input. So the inputs are shifted: x_{t−1} everywhere and z_{t−1} in the prior, with
zeros in the first frame. Every mask is then the causal one.
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

from .base import (
    DVAE,
    DVAEConfig,
    DVAEOutput,
    Gaussian,
    GaussianHead,
    Generators,
    Noise,
    Score,
    past,
    per_frame,
)

VARIANTS = ("plain", "inv_s", "inv_s_nr")
MAX_CORRUPTION_GAIN = 2.0  # largest gain of the corrupted past in scheduled sampling


@dataclass
class LigHTConfig(DVAEConfig):
    beta_z: float = 0.01
    beta_w: float = 0.01  # weight of KL(q(w) ‖ p(w)) in the loss
    w_latent: int = 32
    width: int = 256  # d_model
    heads: int = 1
    feedforward: int = 1024
    layers: int = 4  # layers of the encoder and of each decoder
    w_embedding: int = 256
    w_hidden: int = 512  # LSTM cells per direction
    w_layers: int = 2
    variant: str = "plain"  # ablation: inv_s swaps the streams of the likelihood, inv_s_nr also
    # drops its residual connections
    z_log_variance: float = 0.0  # initial log-variance of q(z); below 0, z says more from the start


class KVCache:
    """Keys and values of the frames decoded so far, (batch, heads, frames, head width); one frame
    is added at a time."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_frames = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one frame. Return the keys and values of all frames so far."""
        if self.num_frames == 0:
            batch, heads, _, head_width = keys.shape
            self.keys = keys.new_empty(batch, heads, self.capacity, head_width)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, self.num_frames] = keys[:, :, 0]
        self.values[:, :, self.num_frames] = values[:, :, 0]
        self.num_frames += 1
        return self.keys[:, :, : self.num_frames], self.values[:, :, : self.num_frames]


def sinusoids(frame_indices: Tensor, width: int) -> Tensor:
    """Return the positional encoding (frames, width) of Vaswani et al. 2017, section 3.5."""
    exponents = torch.arange(0, width, 2, device=frame_indices.device)
    rates = torch.exp(exponents * (-math.log(10_000.0) / width))
    angles = frame_indices[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def embed(layer: nn.Linear, frames: Tensor, positional_encoding: Tensor) -> Tensor:
    """Embed frames (batch, frames, …), scaled by √width, and add their positional encoding."""
    return layer(frames) * math.sqrt(layer.out_features) + positional_encoding


class Attention(nn.Module):
    """Scaled dot-product attention from one stream (batch, frames, width) to another.

    Fused kernels compute the scores again in the backward pass, and overflow in e^{difference}
    where large scores are rounded differently the second time. Power spectra that enter without
    scaling make scores of 10⁹ and more. So attention that reads such a stream as it is, not the
    output of a layer norm, is unfused in training: it keeps its weights for the backward pass.

    Args:
        reads_embedding: one of its streams is an embedding, not the output of a layer norm.
    """

    def __init__(self, config: LigHTConfig, reads_embedding: bool, is_causal: bool):
        super().__init__()
        self.heads = config.heads
        self.is_causal = is_causal
        self.unfused_in_training = reads_embedding and config.input_scale == "power"
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(
        self,
        main: Tensor,
        source: Tensor,
        kv_cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from the main stream to the source stream.

        Args:
            kv_cache: of the frames before, if `main` and `source` are a single new frame.
            mask: which source frames are no padding, (batch, 1, 1, frames) bool; None: all.
        """
        queries, keys, values = self.project(main, source)
        if kv_cache is not None:
            queries, keys, values = self.add_to_cache(queries, keys, values, kv_cache)
            attended = F.scaled_dot_product_attention(queries, keys, values)
        else:
            unfused = self.unfused_in_training and torch.is_grad_enabled()
            with sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext():
                attended = self.attend(queries, keys, values, mask)
        return self.output(attended.transpose(1, 2).flatten(2))

    def project(self, main: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (batch, heads, frames, head width) each."""
        queries = self.query(main).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys_values = self.key_value(source).unflatten(-1, (2, self.heads, -1))
        keys, values = keys_values.permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within a whole sequence, (batch, heads, frames, head width)."""
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=self.is_causal)

    def new_kv_cache(self, num_frames: int) -> KVCache:
        return KVCache(num_frames)

    def add_to_cache(
        self, queries: Tensor, keys: Tensor, values: Tensor, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a frame to the cache. Return its queries, and the keys and values it may see."""
        keys, values = kv_cache.append(keys, values)
        return queries, keys, values


class Block(nn.Module):
    """A Transformer block (Vaswani et al. 2017): of the encoder, in which every frame sees all
    frames, or of a decoder, which is causal and has cross-attention to a source stream.

    Args:
        is_first: its main stream is an embedding.
    """

    attention_type = Attention

    def __init__(self, config: LigHTConfig, is_first: bool, is_decoder: bool):
        super().__init__()
        self.attention = self.attention_type(config, is_first, is_causal=is_decoder)
        self.attention_norm = nn.LayerNorm(config.width)
        if is_decoder:
            # The source is an embedding in every block.
            self.cross_attention = self.attention_type(config, True, is_causal=True)
            self.cross_norm = nn.LayerNorm(config.width)
        self.feedforward = nn.Sequential(
            nn.Linear(config.width, config.feedforward),
            nn.ReLU(),
            nn.Linear(config.feedforward, config.width),
        )
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(
        self,
        main: Tensor,
        source: Tensor | None = None,
        use_residual: bool = True,
        kv_caches: tuple[KVCache | None, KVCache | None] = (None, None),
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the main stream (batch, frames, width) after this block.

        Args:
            source: the other stream, of a decoder.
            kv_caches: of self-attention and cross-attention, to decode frame by frame.
            mask: which frames are no padding, (batch, 1, 1, frames) bool; None: all.
        """
        change = self.attention(main, main, kv_caches[0], mask)
        main = self.attention_norm(main + change if use_residual else change)
        if source is not None:
            change = self.cross_attention(main, source, kv_caches[1])
            main = self.cross_norm(main + change if use_residual else change)
        change = self.feedforward(main)
        return self.feedforward_norm(main + change if use_residual else change)

    def new_kv_caches(self, num_frames: int) -> tuple[KVCache, KVCache]:
        """Return empty caches of self-attention and cross-attention."""
        return (
            self.attention.new_kv_cache(num_frames),
            self.cross_attention.new_kv_cache(num_frames),
        )


class Decoder(nn.Module):
    """Causal blocks over two streams: the latents [z, w] and the scaled spectrum of the past."""

    def __init__(self, config: LigHTConfig):
        super().__init__()
        self.embed_latents = nn.Linear(config.latent + config.w_latent, config.width)
        self.embed_spectrum = nn.Linear(config.bins, config.width)
        self.blocks = nn.ModuleList(
            Block(config, is_first=layer == 0, is_decoder=True) for layer in range(config.layers)
        )

    def forward(
        self,
        z: Tensor,
        w: Tensor,
        spectrum: Tensor,
        positions: Tensor,
        main_stream: str,
        use_residual: bool = True,
        kv_caches: list | None = None,
    ) -> Tensor:
        """Return the main stream after the last block, (batch, frames, width).

        Args:
            z: (batch, frames, latent), as this role may see it at each frame.
            w: (batch, w_latent).
            spectrum: (batch, frames, bins), as this role may see it at each frame.
            positions: positional encoding of the frames, (frames, width).
            main_stream: "latents" or "spectrum"; the other one is the source.
            kv_caches: from `new_kv_caches`, to decode frame by frame.
        """
        latents = embed(self.embed_latents, torch.cat([z, per_frame(w, z)], dim=-1), positions)
        spectrum = embed(self.embed_spectrum, spectrum, positions)
        return run_blocks(self.blocks, latents, spectrum, main_stream, use_residual, kv_caches)

    def new_kv_caches(self, num_frames: int) -> list[tuple[KVCache, KVCache]]:
        return [block.new_kv_caches(num_frames) for block in self.blocks]


def run_blocks(
    blocks: nn.ModuleList,
    latents: Tensor,
    spectrum: Tensor,
    main_stream: str,
    use_residual: bool,
    kv_caches: list | None,
) -> Tensor:
    """Return the main stream after all blocks, from the embedded streams."""
    main, source = (latents, spectrum) if main_stream == "latents" else (spectrum, latents)
    if kv_caches is None:
        kv_caches = [(None, None)] * len(blocks)
    for block, block_caches in zip(blocks, kv_caches, strict=True):
        main = block(main, source, use_residual, block_caches)
    return main


class LigHTDVAE(DVAE):
    """One decoder for both roles, prior and likelihood, with an output layer for each."""

    autoregressive = True
    num_decoders = 1  # The first is the likelihood's, the last the prior's.
    prior_main_stream = "latents"

    def __init__(self, config: LigHTConfig):
        super().__init__(config)
        if config.variant not in VARIANTS:
            raise ValueError(f"variant={config.variant!r} is none of {', '.join(VARIANTS)}")
        if config.width % 2 or config.width % config.heads:
            raise ValueError(
                f"width={config.width} is not even, or not divisible by heads={config.heads}"
            )
        self.build_w_encoder(config)
        self.build(config)

    def build_w_encoder(self, config: LigHTConfig) -> None:
        """Make the layers of q(w | x_{1:T})."""
        self.w_embedding = nn.Linear(config.bins, config.w_embedding)
        self.w_rnn = nn.LSTM(
            config.w_embedding,
            config.w_hidden,
            config.w_layers,
            batch_first=True,
            bidirectional=True,
        )
        self.w_posterior = GaussianHead(2 * config.w_hidden, config.w_latent)

    def build(self, config: LigHTConfig) -> None:
        """Make the layers of q(z_t | x_{1:T}, w), of the prior of z and of the likelihood."""
        self.encoder_embedding = nn.Linear(config.bins + config.w_latent, config.width)
        self.encoder = nn.ModuleList(
            Block(config, is_first=layer == 0, is_decoder=False) for layer in range(config.layers)
        )
        self.z_posterior = GaussianHead(config.width, config.latent)
        self.z_posterior.log_variance.bias.data += config.z_log_variance
        self.decoders = nn.ModuleList(Decoder(config) for _ in range(self.num_decoders))
        self.z_prior = GaussianHead(config.width, config.latent)
        self.output = nn.Linear(config.width, config.bins)

    def positions(self, num_frames: int) -> Tensor:
        """Return the positional encoding (frames, width)."""
        weight = self.output.weight
        frame_indices = torch.arange(num_frames, device=weight.device)
        return sinusoids(frame_indices, self.config.width).to(weight)

    def infer_w(self, inputs: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """Return q(w | x_{1:T}) from the scaled spectrum."""
        embedded = self.w_embedding(inputs)
        if lengths is None:
            sequences = [embedded]
        else:
            pairs = zip(embedded, lengths.tolist(), strict=True)
            sequences = [sequence[None, :length] for sequence, length in pairs]
        final_states = []
        for sequence in sequences:
            _, (h, _) = self.w_rnn(sequence)
            final_states.append(h)
        h = torch.cat(final_states, dim=1)
        return self.w_posterior(torch.cat([h[-2], h[-1]], dim=-1))  # last layer, both directions

    def infer_z(self, inputs: Tensor, w: Tensor, lengths: Tensor | None = None) -> Gaussian:
        """Return q(z_t | x_{1:T}, w) from the scaled spectrum."""
        positions = self.positions(inputs.shape[1])
        inputs_w = torch.cat([inputs, per_frame(w, inputs)], dim=-1)
        h = embed(self.encoder_embedding, inputs_w, positions)
        mask = padding_mask(lengths, inputs)
        for block in self.encoder:
            h = block(h, mask=mask)
        return self.z_posterior(h)

    def prior(
        self,
        z_past: Tensor,
        w: Tensor,
        x_past: Tensor,
        positions: Tensor,
        kv_caches: list | None = None,
    ) -> Gaussian:
        """Return p(z_t | x_{1:t−1}, z_{1:t−1}, w), from the shifted z and scaled spectrum."""
        decoder = self.decoders[-1]
        h = decoder(z_past, w, x_past, positions, self.prior_main_stream, kv_caches=kv_caches)
        return self.z_prior(h)

    def likelihood(
        self,
        z: Tensor,
        w: Tensor,
        x_past: Tensor,
        positions: Tensor,
        kv_caches: list | None = None,
    ) -> Tensor:
        """Return the log-variance of p(x_t | x_{1:t−1}, z_{1:t}, w), from z and the shifted scaled
        spectrum."""
        main_stream = "latents" if self.config.variant == "plain" else "spectrum"
        use_residual = self.config.variant != "inv_s_nr"
        h = self.decoders[0](z, w, x_past, positions, main_stream, use_residual, kv_caches)
        return self.output(h)

    def infer(
        self, x: Tensor, noise: Noise, lengths: Tensor | None = None
    ) -> tuple[Tensor, Gaussian, Tensor, Gaussian, Tensor]:
        """Return the scaled spectrum, q(w), w, q(z), z."""
        inputs = self.input_scale(x)
        q_w = self.infer_w(inputs, lengths)
        w = q_w.sample(noise.w)
        q_z = self.infer_z(inputs, w, lengths)
        return inputs, q_w, w, q_z, q_z.sample(noise.z)

    def forward(
        self,
        x: Tensor,
        noise: Noise | None = None,
        scheduled_sampling_prob: float = 0.0,
        lengths: Tensor | None = None,
    ) -> DVAEOutput:
        """Return posteriors, their samples and the Score of these.

        Args:
            x: power spectra (batch, frames, bins).
            noise: every random draw of the pass; drawn here if None.
            scheduled_sampling_prob: share of the sequences whose past is corrupted.
            lengths: (batch,), on the CPU: how many frames of each sequence are no padding. The
                output for them is what it is without padding: only the posteriors look ahead.
        """
        if noise is None:
            noise = self.draw_noise(*x.shape[:2], scheduled_sampling=scheduled_sampling_prob > 0)
        inputs, q_w, w, q_z, z = self.infer(x, noise, lengths)
        x_past = past(inputs)
        if scheduled_sampling_prob > 0:
            x_past = self.corrupt_past(x_past, z, w, noise.past, scheduled_sampling_prob)
        log_variance, p_z = self.score(x_past, z, w)
        return DVAEOutput(log_variance, z, q_z, p_z, w, q_w)

    def score(self, x_past: Tensor, z: Tensor, w: Tensor | None = None) -> Score:
        positions = self.positions(z.shape[1])
        p_z = self.prior(past(z), w, x_past, positions)
        return Score(self.likelihood(z, w, x_past, positions), p_z)

    def draw_past_noise(
        self, batch: int, frames: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return uniform draws (batch,), from which `corrupt_past` takes its gains."""
        device = self.output.weight.device if generator is None else generator.device
        return torch.rand(batch, device=device, generator=generator)

    @torch.compiler.disable  # The share changes in every step, and each would be compiled anew.
    @torch.no_grad()
    def corrupt_past(
        self, x_past: Tensor, z: Tensor, w: Tensor, draws: Tensor, probability: float
    ) -> Tensor:
        """Return the past (batch, frames, bins) for scheduled sampling: in this share of the
        sequences, the first ones, a corrupted one. The paper trains without.

        The corrupted past is that of the sequence before in the batch, with a gain between 0 and
        MAX_CORRUPTION_GAIN; in every second of them, the output of the decoder for that. The
        model's output for a true past is not enough: the decoder still relies on what only the
        true past contains, and never learns to recover. In decoding some utterances then diverge,
        each frame that is fed back larger than the one before.
        """
        count = round(probability * len(x_past))
        if count == 0:
            return x_past
        silence = self.input_scale(x_past.new_zeros(1, 1, x_past.shape[-1]))
        gains = MAX_CORRUPTION_GAIN * draws[:count, None, None]
        corrupted = silence + gains * (x_past.roll(1, dims=0)[:count] - silence)
        corrupted[:, 0] = 0  # The first frame has no past.
        positions = self.positions(z.shape[1])
        output = self.likelihood(z[:count:2], w[:count:2], corrupted[::2], positions)
        corrupted[::2] = past(self.feed_back(output)).to(corrupted)
        torch.clear_autocast_cache()  # It now holds weights that were cast without gradient.
        return torch.cat([corrupted, x_past[count:]])

    def resynthesise_each(
        self, spectra: Sequence[Tensor], mode: str, noises: Sequence[Noise]
    ) -> Iterator[Tensor]:
        """Padded to the longest, in one batch."""
        noise_z = pad_sequence([noise.z[0] for noise in noises], batch_first=True)
        noise = Noise(noise_z, torch.cat([noise.w for noise in noises]))
        lengths = torch.tensor([len(x) for x in spectra])
        padded = self.resynthesise(pad_sequence(spectra, batch_first=True), mode, noise, lengths)
        for log_variance, x in zip(padded, spectra, strict=True):
            yield log_variance[: len(x)]

    def resynthesise_from_own_past(
        self, x: Tensor, noise: Noise | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        _, _, w, _, z = self.infer(x, noise, lengths)
        return self.decode(z, w)

    @torch.no_grad()
    def decode(self, z: Tensor, w: Tensor) -> Tensor:
        """Return the log-variance (batch, frames, bins) of given latents, decoded from the own
        past."""

        def given_z(t: int, z_past: Tensor, x_past: Tensor) -> Tensor:
            return z[:, t : t + 1]

        return self.unroll(w, z.shape[1], given_z)

    @torch.no_grad()
    def sample(self, n: int, frames: int, generator: Generators = None) -> Tensor:
        noise = self.draw_noise(n, frames, generator)
        w = self.draw_w(noise.w)
        positions = self.positions(frames)
        kv_caches = self.decoders[-1].new_kv_caches(frames)

        def draw_z(t: int, z_past: Tensor, x_past: Tensor) -> Tensor:
            p_z = self.prior(z_past, w, x_past, positions[t : t + 1], kv_caches)
            return p_z.sample(noise.z[:, t : t + 1])

        return self.unroll(w, frames, draw_z)

    def unroll(
        self, w: Tensor, num_frames: int, next_z: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Decode frame by frame from the own past, with cached keys and values.

        Args:
            w: (batch, w_latent).
            next_z: function of t, z_{t−1} and the scaled x_{t−1} that returns z_t,
                (batch, 1, latent).

        Returns:
            log-variance (batch, frames, bins).
        """
        positions = self.positions(num_frames)
        kv_caches = self.decoders[0].new_kv_caches(num_frames)
        z = w.new_zeros(len(w), 1, self.config.latent)
        x_past = w.new_zeros(len(w), 1, self.config.bins)
        log_variances = []
        for t in range(num_frames):
            z = next_z(t, z, x_past)
            log_variance = self.likelihood(z, w, x_past, positions[t : t + 1], kv_caches)
            x_past = self.feed_back(log_variance)
            log_variances.append(log_variance)
        return torch.cat(log_variances, dim=1)


def padding_mask(lengths: Tensor | None, inputs: Tensor) -> Tensor | None:
    """Return which frames of inputs (batch, frames, …) are no padding, (batch, 1, 1, frames) bool;
    None without lengths."""
    if lengths is None:
        return None
    frame_indices = torch.arange(inputs.shape[1], device=inputs.device)
    return (frame_indices < lengths.to(inputs.device)[:, None])[:, None, None]
