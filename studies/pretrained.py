"""Make one of the models that ship out of a run: the weight matrices in half precision, and no trace of the machine.

    python train.py --model light_dvae --recipe cpu_hour --data ~/librispeech-hour --run runs/light
    python studies/pretrained.py runs/light light_dvae-librispeech

Writes minidvae/pretrained/NAME.pt. Its card, NAME.md beside it, is written by hand: what it was trained on, how, how
well it does with which command, and what it does not do. A model larger than 4 MB is refused.
"""

import argparse
from pathlib import Path

import torch

from minidvae.cli import Parser, run
from minidvae.files import atomic_write
from minidvae.training.checkpoint import PRETRAINED, load_run
from minidvae.training.config import SettingError

LARGEST = 4 * 2**20  # bytes


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument("name", metavar="NAME", help="of the model: kind-corpus")
    args = parser.parse_args()
    model, _, content = load_run(args.run)
    if "plan" not in content or content["plan"]["extractor"] or content["plan"]["labels"]:
        raise SettingError(f"{args.run}: expected a run of a DVAE or an FHVAE that train.py wrote")
    kept = {name: content[name] for name in ("format", "model", "config", "stft")}
    halved = {name for name, value in model.named_parameters() if value.ndim > 1}
    parameters = {
        name: value.half() if name in halved else value
        for name, value in content["parameters"].items()
    }
    plan = {name: value for name, value in content["plan"].items() if name not in ("data", "init")}
    progress = {name: content["progress"][name] for name in ("step", "seconds", "best")}
    PRETRAINED.mkdir(exist_ok=True)
    target = PRETRAINED / f"{args.name}.pt"
    with atomic_write(target) as beside:
        torch.save(kept | {"parameters": parameters, "plan": plan, "progress": progress}, beside)
        if (size := beside.stat().st_size) > LARGEST:
            raise SettingError(
                f"{target}: not written, {size / 2**20:.1f} MB; at most {LARGEST / 2**20:.0f} MB ship"
            )
    print(
        f"{target}: {size / 2**20:.1f} MB, step {progress['step']}, {progress['seconds'] / 60:.0f} min of training"
    )


if __name__ == "__main__":
    run(main)
