"""Clips per second of the recurrent DVAEs, frame by frame: samples of the prior, and resynthesis from the own past.

    python bench/decoding.py                                    VRNN, SRNN and STORN, 62 frames (1 s) of 513 bins
    python bench/decoding.py --base ../earlier --clips 1 100    beside another revision, checked out in that folder

Settings are those of the recipe `quick`. Revisions take turns within each repeat; times are medians. The outputs of
both, from the same parameters and noise, are compared: `apart` is their largest difference relative to the largest
value.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Table, describe, median_seconds, parser, positive

from minidvae.models import MODELS, build_model
from minidvae.training.run import resolve

FAMILY = ("vrnn", "srnn", "storn")
COLUMNS = ("model", "what", "clips", "base, clips/s", "clips/s", "ratio", "apart")


def of_revision(folder: Path) -> Callable:
    """`build_model` of the package in another checkout."""
    ours = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] == "minidvae"
    }
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("minidvae.models").build_model
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "minidvae"]:
            del sys.modules[name]
        sys.modules.update(ours)


def settings(name: str, bins: int) -> dict:
    """Those of `quick`, which every revision has."""
    known = {field.name for field in dataclasses.fields(MODELS[name][1])}
    _, config = resolve(name, "quick", {})
    return {key: value for key, value in config.items() if key in known} | {"bins": bins}


def measure(
    builders: dict[str, Callable], name: str, clips: int, arguments, device: torch.device
) -> list[dict]:
    models = {}
    for revision, builder in builders.items():
        torch.manual_seed(0)
        models[revision] = builder(name, **settings(name, arguments.bins)).to(device).eval()
    for model in models.values():
        model.load_state_dict(
            models["ours"].state_dict(), strict=False
        )  # a revision may have further buffers
        model.fit_statistics(
            torch.rand(64, arguments.bins, generator=torch.Generator().manual_seed(1)).to(device)
        )
    x = torch.rand(clips, arguments.frames, arguments.bins, device=device)
    noise = models["ours"].draw_noise(clips, arguments.frames)

    def sample(model) -> torch.Tensor:
        return model.sample(clips, arguments.frames, torch.Generator().manual_seed(2))

    def resynthesise(model) -> torch.Tensor:
        return model.resynthesise(x, "generation", noise)

    rows = []
    for what, call in (("sample", sample), ("own past", resynthesise)):
        found = {revision: call(model) for revision, model in models.items()}
        calls = {
            revision: lambda model=model, call=call: call(model)
            for revision, model in models.items()
        }
        times = median_seconds(calls, device, arguments.repeats)
        row = {
            "model": name,
            "what": what,
            "clips": clips,
            "clips/s": f"{clips / times['ours']:.1f}",
        }
        if "base" in times:
            apart = (found["ours"] - found["base"]).abs().max() / found["base"].abs().max()
            row |= {
                "base, clips/s": f"{clips / times['base']:.1f}",
                "ratio": f"{times['base'] / times['ours']:.2f}",
            }
            row["apart"] = f"{apart.item():.0e}"
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=FAMILY, choices=MODELS, metavar="NAME")
    options.add_argument(
        "--clips",
        nargs="+",
        type=positive,
        default=[1, 16, 100],
        help="at once (default: 1 16 100)",
    )
    options.add_argument("--frames", type=positive, default=62)
    options.add_argument("--bins", type=positive, default=513)
    options.add_argument(
        "--base", type=Path, metavar="DIR", help="a checkout of another revision to compare with"
    )
    arguments = options.parse_args()
    if arguments.base and not (arguments.base / "minidvae" / "models").is_dir():
        options.error(f"argument --base: {arguments.base} is no checkout of this package")
    print(describe(arguments.device))
    builders = {"ours": build_model} | (
        {"base": of_revision(arguments.base.absolute())} if arguments.base else {}
    )
    table = Table(*COLUMNS)
    for name in arguments.models:
        for clips in arguments.clips:
            for row in measure(builders, name, clips, arguments, arguments.device):
                table.add(row)
            table.write(arguments.csv)


if __name__ == "__main__":
    main()
