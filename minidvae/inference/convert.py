"""Voice conversion with an FHVAE: the words of one recording in the voice of another."""

import numpy as np
import torch
from torch import Tensor

from ..data import audio
from ..models.fhvae import FHVAE, Latents


@torch.no_grad()
def convert(model: FHVAE, source: np.ndarray, reference: np.ndarray, seed: int = 0) -> np.ndarray:
    """The words of `source` in the voice of `reference`: waveforms at 16 kHz (samples,), neither of them silent → one
    with as many samples as the source and its RMS. `model` has the features log_magnitude. z2 is shifted as in
    `shifted`; segments overlap; phases are found by Griffin-Lim."""
    frames = model.config.frames
    shift = max(1, frames // 4)

    def infer(waveform: np.ndarray) -> tuple[Latents, Tensor]:
        scaled = torch.from_numpy(waveform / np.abs(waveform).max()).to(model.table)
        latents = model.infer(segments_of(audio.log_magnitude(scaled), frames, shift))
        return latents, model.s_vector(latents.z2)

    (latents, here), (_, there) = infer(source), infer(reference)
    features = join_segments(model.decode(latents.z1, latents.z2 + (there - here)), shift).cpu()
    power = audio.log_magnitude_to_power(features[: audio.FEATURE_STFT.frames(len(source))])
    generator = torch.Generator().manual_seed(seed)
    waveform = audio.griffin_lim(
        power, audio.FEATURE_STFT, length=len(source), generator=generator
    ).numpy()
    return waveform * (np.linalg.norm(source) / np.linalg.norm(waveform))


def segments_of(features: Tensor, frames: int, shift: int) -> Tensor:
    """(all frames, bins) → segments (N, frames, bins), `shift` frames apart, the last frame repeated at the end until
    every frame is in one."""
    missing = (
        -(len(features) - frames) % shift if len(features) > frames else frames - len(features)
    )
    padded = torch.cat([features, features[-1:].expand(missing, -1)])
    return padded.unfold(0, frames, shift).transpose(1, 2)


def join_segments(segments: Tensor, shift: int) -> Tensor:
    """Segments (N, frames, bins) that are `shift` frames apart → (all frames, bins), where they overlap their mean with
    the weights of a Hann window: `segments_of` backwards."""
    count, frames, bins = segments.shape
    places = (
        (torch.arange(count)[:, None] * shift + torch.arange(frames)).flatten().to(segments.device)
    )
    weights = torch.hann_window(frames + 1, device=segments.device)[1:, None].expand(count, -1, -1)
    joined = segments.new_zeros((count - 1) * shift + frames, bins + 1)
    joined.index_add_(0, places, torch.cat([segments * weights, weights], dim=-1).flatten(0, 1))
    return joined[:, :-1] / joined[:, -1:]
