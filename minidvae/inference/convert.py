"""Voice conversion with an FHVAE: the words of one recording in the voice of another.

The latent z2 of every segment of the source is shifted by the difference of the two recordings'
s-vectors, z2 + (μ2 of the reference − μ2 of the source) (FHVAE paper, appendix E). Segments
overlap, and phases are found by Griffin-Lim.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import audio
from ..data.audio import SAMPLE_RATE
from ..files import CheckpointError
from ..models.fhvae import FHVAE, Latents
from ..training.checkpoint import load_run
from .enhance import as_waveform

DEFAULT_MODEL = "fhvae-librispeech"


def convert(
    source: np.ndarray | Tensor,
    reference: np.ndarray | Tensor,
    rate: int,
    model: str | Path = DEFAULT_MODEL,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> np.ndarray:
    """Return the words of `source` in the voice of `reference`.

    Args:
        source: (samples,).
        reference: (samples,), speech of the voice to take on.
        rate: of both, Hz.
        model: run folder of an FHVAE with features=log_magnitude, or the name of one that ships.
        seed: of the phases that Griffin-Lim starts from.

    Returns:
        the converted speech at 16 kHz, with as many samples as the source has at 16 kHz and its
        RMS.

    Raises:
        ValueError: a waveform has another shape, is not finite or silent, or there is no such
            model.
    """
    network = load_fhvae(model, device)
    waveforms = []
    for name, waveform in (("source", source), ("reference", reference)):
        waveform = audio.resample(as_waveform(waveform), rate, SAMPLE_RATE)
        if not waveform.any():
            raise ValueError(f"{name}: is silent; expected speech")
        waveforms.append(waveform)
    return convert_speech(network, *waveforms, seed)


def load_fhvae(folder: str | Path, device: str | torch.device) -> FHVAE:
    """Return the FHVAE of a run folder, or one that ships, in `eval()`. Raises CheckpointError
    where it is another model or has features that cannot be heard."""
    model, _, content = load_run(folder, device)
    features = content.get("plan", {}).get("recipe", {}).get("features", "power")
    if content["model"] != "fhvae" or features != "log_magnitude":
        raise CheckpointError(
            f"{folder}: holds a {content['model']} on {features}; expected an fhvae on "
            "log_magnitude, which can be heard"
        )
    return model.eval()


@torch.no_grad()
def convert_speech(
    model: FHVAE, source: np.ndarray, reference: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Convert waveforms at 16 kHz (samples,), neither of them silent. Return as many samples as the
    source has, with its RMS. `model` has the features log_magnitude."""
    num_frames = model.config.frames
    shift = max(1, num_frames // 4)

    def infer(waveform: np.ndarray) -> tuple[Latents, Tensor]:
        """Return the latents of the segments, and the s-vector."""
        scaled = torch.from_numpy(waveform / np.abs(waveform).max()).to(model.table)
        segments = segments_of(audio.log_magnitude(scaled), num_frames, shift)
        latents = model.infer(segments)
        return latents, model.s_vector(latents.z2)

    latents, source_s_vector = infer(source)
    _, reference_s_vector = infer(reference)
    z2 = latents.z2 + (reference_s_vector - source_s_vector)
    features = join_segments(model.decode(latents.z1, z2), shift).cpu()
    power = audio.log_magnitude_to_power(features[: audio.FEATURE_STFT.frames(len(source))])
    generator = torch.Generator().manual_seed(seed)
    waveform = audio.griffin_lim(
        power, audio.FEATURE_STFT, length=len(source), generator=generator
    ).numpy()
    return waveform * (np.linalg.norm(source) / np.linalg.norm(waveform))


def segments_of(features: Tensor, num_frames: int, shift: int) -> Tensor:
    """Return features (all frames, bins) as segments (N, num_frames, bins), `shift` frames apart.
    The last frame is repeated at the end until every frame is in a segment."""
    if len(features) > num_frames:
        missing = -(len(features) - num_frames) % shift
    else:
        missing = num_frames - len(features)
    padded = torch.cat([features, features[-1:].expand(missing, -1)])
    return padded.unfold(0, num_frames, shift).transpose(1, 2)


def join_segments(segments: Tensor, shift: int) -> Tensor:
    """Join segments (N, frames, bins) that are `shift` frames apart to (all frames, bins), the
    inverse of `segments_of`. Where segments overlap it is their mean with the weights of a Hann
    window."""
    count, num_frames, bins = segments.shape
    starts = torch.arange(count)[:, None] * shift
    frame_indices = (starts + torch.arange(num_frames)).flatten().to(segments.device)
    window = torch.hann_window(num_frames + 1, device=segments.device)[1:, None]
    weights = window.expand(count, -1, -1)
    weighted = torch.cat([segments * weights, weights], dim=-1)
    total = segments.new_zeros((count - 1) * shift + num_frames, bins + 1)
    total.index_add_(0, frame_indices, weighted.flatten(0, 1))
    return total[:, :-1] / total[:, -1:]
