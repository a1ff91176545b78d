"""Encode a sound file with a trained model and write its reconstruction.

    python examples/resynthesise.py runs/NAME speech.wav out.wav           # a run folder that train.py wrote
    python examples/resynthesise.py checkpoints/vrnn speech.wav out.wav    # a published model, format DVAE-speech
    python examples/resynthesise.py light_dvae_local-librispeech in.wav out.wav    # ships

The reconstruction has the model's variance and the phase of the input. Output: 16 kHz mono, as loud as the input.
"""

import argparse

import numpy as np
import torch

import minidvae
from minidvae.cli import run
from minidvae.data import audio
from minidvae.files import CheckpointError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a DVAE, or the name of one that ships")
    parser.add_argument("source", help="sound file, any rate and number of channels")
    parser.add_argument("target", help="wav file to write")
    args = parser.parse_args()

    model, stft, _ = minidvae.load_run(args.model)
    if not hasattr(model, "resynthesise"):
        raise CheckpointError(f"{args.model}: not a DVAE; choose a run of vae, vrnn, light_dvae, …")
    model.eval()
    waveform = audio.load(args.source)  # (samples,)
    peak = max(np.abs(waveform).max(), 1e-6)  # models are trained on max |s| = 1
    spectrum = stft.analyse(torch.from_numpy(waveform / peak))[None]  # complex, (1, frames, bins)
    log_variance = model.resynthesise(
        spectrum.abs().square()
    )  # (1, frames, bins), decoded from its own past
    estimate = audio.resynthesise(log_variance, spectrum, stft, len(waveform))[0]
    audio.write(args.target, peak * estimate.numpy())


if __name__ == "__main__":
    run(main)  # bad input becomes one line
