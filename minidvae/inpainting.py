"""Gaps in recorded speech filled by a DVAE: enhancement.py's E-steps, with missing frames in place of noise.

Frames that reach into a gap drop out of −log p(x, z) = Σ_{t known} Σ_f (|x_tf|²/v_tf + log v_tf) − log p(z). Their
power is the geometric mean of v_t(z) over samples of z; their phase that of Griffin & Lim's iteration in which every
sample outside of the gaps is held.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .data import audio
from .data.audio import SAMPLE_RATE, STFT
from .enhancement import E_STEPS, Settings, improve
from .models.base import DVAE
from .training.settings import SettingError

SETTINGS = Settings(iterations=10, rate=0.02, noise=0.02)
CONTEXT = SAMPLE_RATE  # samples that are looked at on either side of a gap
FADE = 0.004  # seconds beside a gap in which the recording and what fills the gap are faded into one another
PHASE_ITERATIONS = 50


class Gap:
    """|x|² (frames, bins) and which frames are known, (frames,), in place of an `Observation`."""

    def __init__(self, power: Tensor, known: Tensor):
        self.power, self.known = power, known

    def cost(self, speech: Tensor) -> Tensor:
        """Σ |x|²/v + log v of known frames, (chains,), for decoded variances (chains, frames, bins)."""
        return (self.power / speech + speech.log())[:, self.known].sum(dim=(1, 2))

    def update(self, speech: Tensor) -> None:
        """Nothing: there is no noise to learn."""

    def filled(self, other: Tensor) -> Tensor:
        """|x|² with the missing frames of another (frames, bins)."""
        return torch.where(self.known[:, None], self.power, other)

    def interpolated(self) -> Tensor:
        """|x|² with the missing frames on straight lines between the logarithms of the nearest known ones."""
        known, log_power = self.known.nonzero()[:, 0].cpu().numpy(), self.power[self.known].log().cpu().numpy()
        lines = [np.interp(np.arange(len(self.power)), known, column) for column in log_power.T]
        return torch.from_numpy(np.exp(lines).T).to(self.power)


def fill(model: DVAE, settings: Settings, gap: Gap, generator: torch.Generator) -> Tensor:
    """|x|² (frames, bins) with missing frames from the posterior, over chains and the last quarter of the steps."""
    estimate, kept = gap.interpolated(), []
    e_step = E_STEPS[settings.method](model, estimate, settings, generator)
    for _ in range(settings.iterations):
        kept.append(improve(e_step, gap, estimate)[0].log().mean(0))
        estimate = gap.filled(kept[-1].exp())
    return gap.filled(torch.stack(kept[-math.ceil(settings.iterations / 4) :]).mean(0).exp())


@torch.no_grad()
def inpaint(
    recording: np.ndarray, rate: int, gaps: list[tuple[float, float]], stft: STFT, fill: Callable, seed=0, device="cpu"
) -> np.ndarray:
    """A recording (samples,) at `rate` Hz with its gaps, from and to so many seconds, filled; samples farther than FADE
    from a gap are as they were. fill(gap, generator) → |x|² (frames, bins). SettingError where no frame is known."""
    seconds = np.arange(len(recording)) / rate
    beside = np.full(len(recording), np.inf)  # how far from the nearest gap
    for start, stop in gaps:
        beside = np.minimum(beside, np.maximum(start - seconds, seconds - stop))
    heard = np.where(beside > 0, recording, 0).astype(np.float32)
    waveform = torch.from_numpy(audio.resample(heard, rate, SAMPLE_RATE)).to(device)
    places = [(int(start * SAMPLE_RATE), math.ceil(stop * SAMPLE_RATE)) for start, stop in gaps]
    generator, lost = torch.Generator().manual_seed(seed), torch.zeros_like(waveform, dtype=torch.bool)
    for first, last in places:
        lost[first:last] = True
    peak = waveform.where(~lost, 0).abs().max().clamp_min(1e-5)
    noise = 1e-3 * torch.randn(len(waveform), generator=generator).to(waveform)  # in the gaps, for the first phases
    scaled, result = torch.where(lost, noise, waveform / peak), waveform.clone()
    for first, last in places:
        begin, near = max(0, first - CONTEXT), slice(max(0, first - stft.hop), last + stft.hop)
        held, inside = scaled[begin : last + CONTEXT], lost[begin : last + CONTEXT]
        known = ~stft.windowed(inside.to(held)).any(-1)
        if not known.any():
            raise SettingError(f"--missing: no {stft.window_length} samples beside {first / SAMPLE_RATE:g} s are known")
        gap = Gap(stft.analyse(held).abs().square().clamp_min(audio.POWER_FLOOR), known)
        with torch.backends.cudnn.flags(enabled=False):  # whose recurrent layers have no backward pass in eval()
            magnitude, latest = fill(gap, generator).sqrt(), held
        for _ in range(PHASE_ITERATIONS):
            spectrum = stft.analyse(torch.where(inside, latest, held))
            spectrum = torch.where(known[:, None], spectrum, torch.polar(magnitude, spectrum.angle()))
            latest = stft.synthesise(spectrum, len(held))
        result[near] = peak * latest[near.start - begin : near.stop - begin]
    filled = audio.resample(result.cpu().numpy(), SAMPLE_RATE, rate)[: len(recording)]
    weight = np.clip(1 - beside / FADE, 0, 1)
    return np.where(weight > 0, recording + weight * (filled - recording), recording).astype(np.float32)


def parse_gaps(text: str, duration: float) -> list[tuple[float, float]]:
    """ "1.20-1.28,3.4-3.5", in seconds, in order. SettingError where it reads otherwise, or gaps overlap or are outside
    of a file of this duration."""
    try:
        gaps = sorted((float(start), float(stop)) for start, stop in (part.split("-") for part in text.split(",")))
    except ValueError:
        raise SettingError(f"--missing {text}: expected seconds such as 1.20-1.28,3.4-3.5") from None
    before = [0.0, *(stop for _, stop in gaps)]
    if not all(last <= start < stop <= duration for last, (start, stop) in zip(before, gaps, strict=False)):
        raise SettingError(f"--missing {text}: expected gaps within 0-{duration:g} s that do not overlap")
    return gaps
