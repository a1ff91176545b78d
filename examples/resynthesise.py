"""Encode a sound file with a trained model and write its reconstruction.

    python examples/resynthesise.py runs/NAME in.wav out.wav           # a run folder of train.py
    python examples/resynthesise.py checkpoints/vrnn in.wav out.wav    # a published model
    python examples/resynthesise.py vae-librispeech in.wav out.wav     # a model that ships

The reconstruction has the model's variance and the phase of the input. The output is 16 kHz mono.
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
    power = spectrum.abs().square()
    log_variance = model.resynthesise(
        power
    )  # (1, frames, bins), decoded from the model's own output
    estimate = audio.resynthesise(log_variance, spectrum, stft, len(waveform))[0]
    audio.write(args.target, peak * estimate.numpy())


if __name__ == "__main__":
    run(main)  # bad input becomes one line
