r"""Make a model that ships from a run: its weight matrices in half precision, without traces of the
machine.

    python train.py --model light_dvae_local --recipe cpu_hour --data ~/librispeech-hour \
        --run runs/light
    python studies/pretrained.py runs/light light_dvae_local-librispeech

Writes minidvae/pretrained/NAME.pt. Its card, NAME.md beside it, is written by hand: what it was
trained on, how, how well it does with which command, and what it does not do. A model larger than
4 MB is refused.
"""

import argparse
from pathlib import Path

import torch

from minidvae.cli import Parser, run
from minidvae.files import atomic_write
from minidvae.training.checkpoint import PRETRAINED, load_run
from minidvae.training.config import SettingError

MAX_BYTES = 4 * 2**20


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument("name", metavar="NAME", help="of the model: kind-corpus")
    args = parser.parse_args()
    model, _, content = load_run(args.run)
    if "plan" not in content or content["plan"]["extractor"] or content["plan"]["labels"]:
        raise SettingError(f"{args.run}: expected a run of a DVAE or an FHVAE that train.py wrote")
    shipped = shipped_content(model, content)
    PRETRAINED.mkdir(exist_ok=True)
    target = PRETRAINED / f"{args.name}.pt"
    with atomic_write(target) as temporary:
        torch.save(shipped, temporary)
        size = temporary.stat().st_size
        if size > MAX_BYTES:
            raise SettingError(
                f"{target}: not written, {size / 2**20:.1f} MB; "
                f"at most {MAX_BYTES / 2**20:.0f} MB ship"
            )
    progress = shipped["progress"]
    print(
        f"{target}: {size / 2**20:.1f} MB, step {progress['step']}, "
        f"{progress['seconds'] / 60:.0f} min of training"
    )


def shipped_content(model: torch.nn.Module, content: dict) -> dict:
    """Return the part of a checkpoint that ships: no optimiser, no paths, matrices in float16."""
    shipped = {name: content[name] for name in ("format", "model", "config", "stft")}
    matrices = {name for name, value in model.named_parameters() if value.ndim > 1}
    shipped["parameters"] = {}
    for name, value in content["parameters"].items():
        shipped["parameters"][name] = value.half() if name in matrices else value
    shipped["plan"] = dict(content["plan"])
    for path in ("data", "init"):
        del shipped["plan"][path]
    shipped["progress"] = {name: content["progress"][name] for name in ("step", "seconds", "best")}
    return shipped


if __name__ == "__main__":
    run(main)
