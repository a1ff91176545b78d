"""What keeps enhancement from its ceiling: parts of the answer are given, and the rest is inferred.

    python studies/enhancement_limits.py light_dvae-librispeech vae-librispeech --data LibriSpeech --noise DIR --limit 6

Given is the power of the noise in every bin, or its mean over time, or the latents that the encoder finds in the clean
speech; or the E-step starts from these latents. The last two rows of a model have the same objective, −log p(x, z) for
a bin of the spectrum: where the better start ends with more noise at a lower or an equal objective, it is the models of
speech and noise that take voices in the noise for speech, and not the search.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidvae.cli import Parser, run
from minidvae.data import audio
from minidvae.data.audio import STFT
from minidvae.data.corpus import load_corpus
from minidvae.evaluation import report
from minidvae.evaluation.enhancement import Mixture, clips_of, log_mmse, mix, oracle
from minidvae.evaluation.metrics import si_sdr
from minidvae.inference.enhance import Latents, Observation, Settings, improve, load_dvae

LEARNED, ITERATIONS = Settings(), 60
ROWS = {  # what is given: the noise, where z starts, the rate of z
    "latents of the clean speech, noise": ("known", "clean", 0.0),
    "noise": ("known", "noisy", 0.1),
    "latents of the clean speech": ("learned", "clean", 0.0),
    "mean of the noise over time": ("mean", "noisy", 0.1),
    "latents of the clean speech as the start": ("learned", "clean", 0.1),
    "nothing": ("learned", "noisy", 0.1),
}


class KnownNoise(Observation):
    """Whose noise is given, (frames, bins) or (1, bins); gains alone are learned."""

    given: Tensor

    @property
    def noise(self) -> Tensor:
        return self.given.expand_as(self.power)

    def update(self, speech: Tensor) -> None:
        spectra, levels = self.spectra, self.levels
        super().update(speech)
        self.spectra, self.levels = spectra, levels


@torch.no_grad()
def enhance(
    model, stft: STFT, mixture: Mixture, noise: str, start: str, rate: float, seed: int
) -> tuple[float, float]:
    """Gain of SI-SDR, dB, and the last objective of a bin."""
    peak = np.abs(mixture.noisy).max()
    spectrum, clean = (
        stft.analyse(torch.from_numpy(x / peak)) for x in (mixture.noisy, mixture.clean)
    )
    power, speech, true = (
        x.abs().square().clamp_min(audio.POWER_FLOOR) for x in (spectrum, clean, spectrum - clean)
    )
    generator = torch.Generator().manual_seed(zlib.crc32(mixture.name.encode()) + seed)
    kind = Observation if noise == "learned" else KnownNoise
    observation = kind(power, LEARNED.rank, LEARNED.hold, generator)
    if noise != "learned":
        observation.given = true if noise == "known" else true.mean(0, keepdim=True)
    estimate = speech if start == "clean" else observation.first_estimate()
    e_step = Latents(model, estimate, Settings("peem", chains=1, rate=rate), generator)
    for _ in range(ITERATIONS):
        variance, objective = improve(e_step, observation, estimate)
        gains = observation.wiener(variance)
        if rate:
            estimate = gains.square() * power
    found = stft.synthesise(gains * spectrum, len(mixture.noisy)).numpy()
    return si_sdr(found, mixture.clean) - si_sdr(
        mixture.noisy, mixture.clean
    ), objective / power.numel()


def subtraction(mixture: Mixture) -> np.ndarray:
    """Spectral subtraction with the mean power of the noise that is in the mixture."""
    stft = STFT()
    noisy, clean = (stft.analyse(torch.from_numpy(x)) for x in (mixture.noisy, mixture.clean))
    noise = (noisy - clean).abs().square().mean(0)
    speech = (noisy.abs().square() - noise).clamp_min(0.01 * noise)
    return stft.synthesise(speech / (speech + noise) * noisy, len(mixture.noisy)).numpy()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="RUN", help="run folders of DVAEs, or models that ship"
    )
    parser.add_argument("--data", default="built-in", help="corpus (default: built-in)")
    parser.add_argument(
        "--noise", type=Path, metavar="DIR", help="folder of sounds (default: built-in noises)"
    )
    parser.add_argument("--snr", type=float, default=0.0, help="dB (default: 0)")
    parser.add_argument("--split", default="dev", help="of the corpus (default: dev)")
    parser.add_argument(
        "--limit", type=int, default=6, help="utterances, spread over the split (default: 6)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn at random (default: 0)"
    )
    args = parser.parse_args()
    corpus, clips = (
        load_corpus(args.data).split(args.split).spread(args.limit),
        args.noise and clips_of(args.noise),
    )
    mixtures = [mix(corpus, index, args.snr, clips, args.seed) for index in range(len(corpus))]
    rows = []
    for title, method in (
        ("oracle Wiener", oracle),
        ("spectral subtraction of its mean", subtraction),
        ("log-MMSE", lambda m: log_mmse(m.noisy)),
    ):
        gains = [si_sdr(method(m), m.clean) - si_sdr(m.noisy, m.clean) for m in mixtures]
        rows.append([title, "", f"{np.mean(gains):.2f}", ""])
    for name in args.models:
        model, stft = load_dvae(name, "cpu")
        for title, settings in ROWS.items():
            gain, objective = np.mean(
                [enhance(model, stft, m, *settings, args.seed) for m in mixtures], axis=0
            )
            rows.append(
                [
                    str(name),
                    title,
                    f"{gain:.2f}",
                    f"{objective:.3f}" if settings[0] == "learned" else "",
                ]
            )
    print(report.table(["", "given", "gain of SI-SDR, dB", "objective"], rows, left=2))


if __name__ == "__main__":
    run(main)
