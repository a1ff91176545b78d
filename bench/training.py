"""Time of a training step (forward, loss, backward) of each model, 257 bins: one frame at a time against shipped.

    python bench/training.py                                   the recurrent family at batch 32, T = 150
    python bench/training.py --models vrnn srnn --batch 32 256 --device cuda --csv training.csv

`reference` is `forward_reference`, the equations one frame at a time with autograd; `shipped` is `forward`. The two
take turns within each repeat; times are medians. Peak memory is what a step adds to what was held before it. On a GPU
both are timed as a CUDA graph as well (`graphed`), and products of matrices are in TF32, as in training. `--csv` is
written after every model; with `--resume` the models in it are not measured anew.

    python bench/training.py --models acoustic --batch 40 --frames 20   3 × 1024 → 512 on 80 bins, carried state
"""

import torch
from timing import Table, captured, describe, median_seconds, parser, peak_mebibytes, positive

from minidvae.models import MODELS, build_model
from minidvae.models.recognisers import FrameBatch

PHONES = 61  # of TIMIT
FAMILY = ("vae", "dkf", "storn", "vrnn", "srnn", "rvae", "dsae")
BINS = 257
COLUMNS = ("model", "batch", "frames", "reference ms", "shipped ms", "ratio", "frames/s")
COLUMNS += ("reference graphed ms", "shipped graphed ms", "reference MiB", "shipped MiB")


def step(model: torch.nn.Module, *arguments) -> None:
    model.zero_grad(set_to_none=True)
    model.loss(*arguments)[0].backward()


def one_frame_at_a_time(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, computed by its equations."""
    kind = type(model)
    found = type(kind.__name__, (kind,), {"forward": kind.forward_reference})(model.config)
    found.load_state_dict(model.state_dict())
    return found.to(next(model.parameters()).device)


def measure(name: str, batch: int, frames: int, repeats: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    if name == "acoustic":
        model = build_model(name, symbols=tuple(map(str, range(PHONES))), lanes=batch).to(device)
        x = torch.rand(batch, frames, model.config.bins, device=device)
        labels = torch.randint(PHONES, (batch, frames), device=device)
        arguments = (FrameBatch(x, labels, torch.zeros(batch, dtype=torch.bool, device=device)),)
    else:
        model = build_model(name, bins=BINS).to(device)
        arguments = (
            torch.rand(batch, frames, BINS, device=device),
            model.draw_noise(batch, frames),
        )
    paths = {"shipped": model}
    if hasattr(model, "forward_reference"):
        paths["reference"] = one_frame_at_a_time(model)
    calls = {path: lambda model=model: step(model, *arguments) for path, model in paths.items()}
    memory = {path: peak_mebibytes(call, device) for path, call in calls.items()}  # and the warm-up
    if device.type == "cuda":
        graphs = {path: captured(call, device) for path, call in calls.items()}
        calls |= {
            f"{path} graphed": replay for path, (replay, remark) in graphs.items() if not remark
        }
    medians = median_seconds(calls, device, repeats)
    row = {
        "model": name,
        "batch": batch,
        "frames": frames,
        "frames/s": f"{batch * frames / medians['shipped']:.0f}",
    }
    row |= {f"{path} ms": f"{1e3 * seconds:.2f}" for path, seconds in medians.items()}
    row |= {f"{path} MiB": f"{peak:.0f}" for path, peak in memory.items()}
    if "reference" in medians:
        row["ratio"] = f"{medians['reference'] / medians['shipped']:.2f}"
    return row


def main() -> None:
    options = parser(__doc__, resumable=True)
    options.add_argument("--models", nargs="+", default=FAMILY, choices=MODELS, metavar="NAME")
    options.add_argument(
        "--batch", nargs="+", type=positive, help="default: 32; on a GPU 32, 128 and 512"
    )
    options.add_argument("--frames", type=positive, default=150)
    arguments = options.parse_args()
    device = arguments.device
    torch.set_float32_matmul_precision("high")
    print(describe(device))
    table = Table(*COLUMNS)
    if arguments.resume:
        table.resume(arguments.csv)
    for batch in arguments.batch or ((32, 128, 512) if device.type == "cuda" else (32,)):
        for name in arguments.models:
            if not table.has(model=name, batch=batch, frames=arguments.frames):
                table.add(measure(name, batch, arguments.frames, arguments.repeats, device))
                table.write(arguments.csv)


if __name__ == "__main__":
    main()
