"""LigHT-DVAE and HiT-DVAE with additions of this project, which are in none of the papers.

- Local attention (`context`): a frame sees so many frames, by relative positions (rotary position
  embedding, Su et al. 2021, section 3.2), and each head starts on one frame relative to its own.
- Phase-dependent projections of z (`phases`): the linear maps to and from z_t differ with
  t mod `phases`. STFT frames overlap by three quarters, so one map for all frames would make
  neighbouring z say nearly the same.
- Aggregate prior of w (`w_prior=aggregate`): samples draw w from a Gaussian with the moments that
  q(w) had in training, since with a small β_w the posteriors lie far from N(0, I).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Gaussian, Noise, per_frame
from .hit_dvae import HiTDVAE
from .light_dvae import (
    Attention,
    Block,
    KVCache,
    LigHTConfig,
    LigHTDVAE,
    padding_mask,
    run_blocks,
    sinusoids,
)

W_MOMENTS_RATE = 0.01  # rate at which the moments of w follow those of a batch
MAX_ROTATION_RATE = 2.0  # largest rate of the rotary position embedding, radians per frame
INITIAL_SCORE = 8.0  # score of the frame on which a head starts; the mean score is near 0


@dataclass
class LigHTLocalConfig(LigHTConfig):
    context: int = 50  # frames that attention sees: the present one and those before it, in the
    # encoder also as many after it. 0: all frames, with the paper's positional encoding
    phases: int = 4  # number of different maps to and from z
    w_prior: str = "aggregate"  # prior of w in `sample`: aggregate, or standard (N(0, I))


def rotary_cos_sin(frame_indices: Tensor, head_width: int, context: int) -> Tensor:
    """Return cosines and sines (2, frames, head_width/2) of the angles by which the pairs of a
    query and a key turn, at rates that tell neighbouring frames apart down to rates that tell all
    frames of the context apart."""
    exponents = -torch.linspace(0, 1, head_width // 2, device=frame_indices.device)
    rates = MAX_ROTATION_RATE * context**exponents
    angles = frame_indices[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (x_k, x_{k + width/2}) of x (…, frames, width)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos_sin.to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class LocalKVCache(KVCache):
    """A cache of which a frame sees the last `context` frames only."""

    def __init__(self, capacity: int, context: int):
        super().__init__(capacity)
        self.context = context
        self.cos_sin: Tensor | None = None  # rotations of all frames, made with the first one

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().append(keys, values)
        return keys[:, :, -self.context :], values[:, :, -self.context :]


class LocalAttention(Attention):
    """Attention within a local context, by relative positions; with context=0 that of the paper."""

    def __init__(self, config: LigHTLocalConfig, reads_embedding: bool, is_causal: bool):
        super().__init__(config, reads_embedding, is_causal)
        self.context = config.context
        self.head_width = config.width // config.heads
        if self.context:
            self.start_on_neighbours()

    @torch.no_grad()
    def start_on_neighbours(self) -> None:
        """Let each head attend to one frame relative to its own, whatever the frames hold: the
        frame itself and those before it; in the encoder those around it."""
        width = len(self.query.bias)
        pairs = self.key_value.bias[:width].view(self.heads, 2, -1)
        num_pairs = pairs.shape[2]
        pairs[:, 0] = math.sqrt(INITIAL_SCORE * math.sqrt(2 * num_pairs) / num_pairs)
        pairs[:, 1] = 0
        frames_back = torch.arange(self.heads)
        if not self.is_causal:
            frames_back = frames_back - self.heads // 2
        cos_sin = rotary_cos_sin(-frames_back, 2 * num_pairs, self.context)
        self.query.bias.copy_(rotate(pairs.flatten(1), cos_sin).flatten())
        self.query.weight.zero_()
        self.key_value.weight[:width].zero_()

    def new_kv_cache(self, num_frames: int) -> KVCache:
        if not self.context:
            return KVCache(num_frames)
        return LocalKVCache(num_frames, self.context)

    def add_to_cache(
        self, queries: Tensor, keys: Tensor, values: Tensor, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.context:
            if kv_cache.cos_sin is None:
                frame_indices = torch.arange(kv_cache.capacity, device=keys.device)
                kv_cache.cos_sin = rotary_cos_sin(frame_indices, self.head_width, self.context)
            t = kv_cache.num_frames
            queries = rotate(queries, kv_cache.cos_sin[:, t : t + 1])
            keys = rotate(keys, kv_cache.cos_sin[:, t : t + 1])
        return super().add_to_cache(queries, keys, values, kv_cache)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.context:
            num_frames = queries.shape[2]
            frame_indices = torch.arange(num_frames, device=queries.device)
            cos_sin = rotary_cos_sin(frame_indices, self.head_width, self.context)
            queries = rotate(queries, cos_sin)
            keys = rotate(keys, cos_sin)
            if num_frames > self.context:
                return self.attend_locally(queries, keys, values, mask)
        return super().attend(queries, keys, values, mask)

    def attend_locally(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend within the context, in time and memory that grow with the number of frames, not
        with its square: by pieces as long as the context, each with its own keys and those of the
        piece before it, in the encoder also of the piece behind it. SDPA's fused kernels have no
        such pattern."""
        num_frames = queries.shape[2]
        piece = self.context
        padding = -num_frames % piece
        ahead = 0 if self.is_causal else piece
        window = 2 * piece + ahead  # frames that a piece may see

        def windows(frames: Tensor) -> Tensor:
            """(batch, heads, frames, width) → (batch, heads, pieces, window, width)"""
            padded = F.pad(frames, (0, 0, piece, padding + ahead))
            return padded.unfold(2, window, piece).mT

        if mask is None:
            is_present = queries.new_ones(1, 1, num_frames, dtype=torch.bool)
        else:
            is_present = mask[:, :, 0]
        is_present = F.pad(is_present, (piece, padding + ahead))
        is_present = is_present.unfold(2, window, piece)[:, :, :, None]
        offsets = torch.arange(-piece, piece + ahead, device=queries.device)
        frames_back = offsets[piece : 2 * piece, None] - offsets  # (query, key)
        is_visible = (frames_back < piece) & (frames_back > -max(ahead, 1)) & is_present
        queries = F.pad(queries, (0, 0, 0, padding)).unflatten(2, (-1, piece))
        attended = F.scaled_dot_product_attention(
            queries, windows(keys), windows(values), is_visible
        )
        return attended.flatten(2, 3)[:, :, :num_frames]


class LocalBlock(Block):
    attention_type = LocalAttention


class PhaseLinear(nn.Linear):
    """One linear map for each phase t mod `phases`."""

    def __init__(self, inputs: int, outputs: int, phases: int):
        super().__init__(inputs, phases * outputs)
        self.phases = phases

    def forward(self, x: Tensor, frame_indices: Tensor) -> Tensor:
        """x: (batch, frames, inputs); frame_indices: (frames,) int64 → (batch, frames, outputs)."""
        outputs = super().forward(x)
        if self.phases == 1:
            return outputs
        one_hot = F.one_hot(frame_indices % self.phases, self.phases).to(outputs)
        outputs = outputs.unflatten(-1, (self.phases, -1))  # (batch, frames, phases, outputs)
        return (outputs * one_hot[:, :, None]).sum(dim=-2)


class PhaseGaussianHead(nn.Module):
    """Mean and log-variance, each by a `PhaseLinear`."""

    def __init__(self, inputs: int, outputs: int, phases: int):
        super().__init__()
        self.mean = PhaseLinear(inputs, outputs, phases)
        self.log_variance = PhaseLinear(inputs, outputs, phases)

    def forward(self, h: Tensor, frame_indices: Tensor) -> Gaussian:
        return Gaussian(self.mean(h, frame_indices), self.log_variance(h, frame_indices))


def positional_encoding(frame_indices: Tensor, config: LigHTLocalConfig) -> Tensor | float:
    """Return what is added to embeddings: nothing where attention has relative positions."""
    return 0.0 if config.context else sinusoids(frame_indices, config.width)


class LocalDecoder(nn.Module):
    """The decoder of LigHT-DVAE with local attention and a phase-dependent embedding of z."""

    def __init__(self, config: LigHTLocalConfig):
        super().__init__()
        self.config = config
        inputs = config.latent + config.w_latent
        self.embed_latents = PhaseLinear(inputs, config.width, config.phases)
        self.embed_spectrum = nn.Linear(config.bins, config.width)
        self.blocks = nn.ModuleList(
            LocalBlock(config, is_first=layer == 0, is_decoder=True)
            for layer in range(config.layers)
        )

    def forward(
        self,
        z: Tensor,
        w: Tensor,
        spectrum: Tensor,
        frame_indices: Tensor,
        main_stream: str,
        use_residual: bool = True,
        kv_caches: list | None = None,
        z_lag: int = 0,
    ) -> Tensor:
        """Compute `Decoder.forward` at frame indices (frames,). z_lag: delay of z, frames."""
        scale = math.sqrt(self.config.width)
        encoding = positional_encoding(frame_indices, self.config)
        latents = torch.cat([z, per_frame(w, z)], dim=-1)
        latents = self.embed_latents(latents, frame_indices - z_lag) * scale + encoding
        spectrum = self.embed_spectrum(spectrum) * scale + encoding
        return run_blocks(self.blocks, latents, spectrum, main_stream, use_residual, kv_caches)

    def new_kv_caches(self, num_frames: int) -> list[tuple[KVCache, KVCache]]:
        return [block.new_kv_caches(num_frames) for block in self.blocks]


class LigHTDVAELocal(LigHTDVAE):
    """LigHT-DVAE with local attention, phase-dependent projections of z and an aggregate prior of
    w."""

    def __init__(self, config: LigHTLocalConfig):
        super().__init__(config)
        if config.w_prior not in ("standard", "aggregate"):
            raise ValueError(f"w_prior={config.w_prior!r} is neither standard nor aggregate")
        if config.w_prior == "aggregate":
            standard = [torch.zeros(1, config.w_latent), torch.eye(config.w_latent)]
            self.w_moments = torch.cat(standard)

    def build(self, config: LigHTLocalConfig) -> None:
        head_width = config.width // config.heads
        if config.context and head_width % 2:
            raise ValueError(
                f"width={config.width} over heads={config.heads} is {head_width}; local attention "
                "expects an even width of a head"
            )
        self.encoder_embedding = nn.Linear(config.bins + config.w_latent, config.width)
        self.encoder = nn.ModuleList(
            LocalBlock(config, is_first=layer == 0, is_decoder=False)
            for layer in range(config.layers)
        )
        self.z_posterior = PhaseGaussianHead(config.width, config.latent, config.phases)
        self.z_posterior.log_variance.bias.data += config.z_log_variance
        self.decoders = nn.ModuleList(LocalDecoder(config) for _ in range(self.num_decoders))
        self.z_prior = PhaseGaussianHead(config.width, config.latent, config.phases)
        self.output = nn.Linear(config.width, config.bins)

    def positions(self, num_frames: int) -> Tensor:
        """Return the frame indices (frames,)."""
        return torch.arange(num_frames, device=self.output.weight.device)

    def infer_z(self, inputs: Tensor, w: Tensor, lengths: Tensor | None = None) -> Gaussian:
        frame_indices = self.positions(inputs.shape[1])
        inputs_w = torch.cat([inputs, per_frame(w, inputs)], dim=-1)
        h = self.encoder_embedding(inputs_w) * math.sqrt(self.config.width)
        h = h + positional_encoding(frame_indices, self.config)
        mask = padding_mask(lengths, inputs)
        for block in self.encoder:
            h = block(h, mask=mask)
        return self.z_posterior(h, frame_indices)

    def prior(
        self,
        z_past: Tensor,
        w: Tensor,
        x_past: Tensor,
        positions: Tensor,
        kv_caches: list | None = None,
    ) -> Gaussian:
        h = self.decoders[-1](
            z_past, w, x_past, positions, self.prior_main_stream, kv_caches=kv_caches, z_lag=1
        )
        return self.z_prior(h, positions)

    def loss(
        self, batch: Tensor, noise: Noise | None = None, scheduled_sampling_prob: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `DVAE.loss` does. In training the aggregate prior of w follows q(w) of the
        batch."""
        output = self(batch, noise, scheduled_sampling_prob)
        if self.training and self.config.w_prior == "aggregate":
            self.update_w_moments(output.q_w)
        return self.negative_elbo(batch, output)

    @torch.no_grad()
    def update_w_moments(self, q_w: Gaussian) -> None:
        """Move mean and covariance of w towards those of q(w) over a batch, by W_MOMENTS_RATE."""
        batch_mean = q_w.mean.float()
        batch_variance = q_w.log_variance.exp().float()
        mean = self.w_moments[0].lerp(batch_mean.mean(0), W_MOMENTS_RATE)
        deviations = batch_mean - mean
        squares = (deviations[:, :, None] * deviations[:, None]).mean(0)
        covariance = squares + batch_variance.mean(0).diag()
        covariance = self.w_moments[1:].lerp(covariance, W_MOMENTS_RATE)
        self.w_moments.copy_(torch.cat([mean[None], covariance]))


class HiTDVAELocal(LigHTDVAELocal, HiTDVAE):
    """HiT-DVAE, which has two decoders, with the same additions."""
