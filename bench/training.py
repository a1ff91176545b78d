"""Time of a training step (forward, loss, backward) and of decoding, for each model.

    python bench/training.py                                   all DVAEs at batch 32, T = 150
    python bench/training.py --models vrnn srnn --batch 32 256 --device cuda --csv training.csv
    python bench/training.py --passes decode --models light_dvae light_dvae_local --batch 1
    python bench/training.py --models fhvae acoustic --batch 256

Pass `step` of a recurrent model: `reference` is `forward_reference`, the equations one frame at a
time with autograd; `shipped` is `forward`. Pass `decode` is resynthesis from the model's own past,
without gradient, of autoregressive models. Models have the sizes of their dataclass, the papers',
and 257 bins, HiT-DVAE and LigHT-DVAE 513. FHVAE has --sequences rows in its table of s-vectors, and
the discriminative term over all of them. Paths take turns within each repeat; times are medians.
Peak memory is what a pass adds to what was held before it. On a GPU a step is timed as a CUDA graph
too (`graphed`), and products of matrices are in TF32, as in training. The table is printed as
Markdown; rows that are in the `--csv` file already are not measured again.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from timing import (
    MeasurementTable,
    captured,
    describe,
    median_seconds,
    parser,
    peak_mebibytes,
    positive,
)
from torch import Tensor, nn

from minidvae.cli import run
from minidvae.models import MODELS, build_model
from minidvae.models.base import DVAE
from minidvae.models.light_dvae import LigHTDVAE
from minidvae.models.recognisers import FrameBatch
from minidvae.models.segments import SegmentBatch

PASSES = ("step", "decode")
DVAES = tuple(name for name, (kind, _) in MODELS.items() if issubclass(kind, DVAE))
TIMED_MODELS = (*DVAES, "fhvae", "beta_vae", "acoustic")
SHORT_MODELS = ("fhvae", "beta_vae", "acoustic")  # trained on 20 frames at a time in their paper
SHORT_FRAMES = 20
NUM_PHONES = 61  # TIMIT's, for the acoustic model
COLUMNS = (
    "pass",
    "model",
    "batch",
    "frames",
    "reference ms",
    "shipped ms",
    "ratio",
    "frames/s",
    "reference graphed ms",
    "shipped graphed ms",
    "reference MiB",
    "shipped MiB",
)


def main() -> None:
    arguments = parse_arguments()
    torch.set_float32_matmul_precision("high")
    print(f"{describe(arguments.device)}\n")
    table = MeasurementTable(COLUMNS, arguments.csv, keep=not arguments.fresh)
    for batch_size in arguments.batch or default_batches(arguments.device):
        for name in arguments.models:
            for which in arguments.passes:
                if which == "decode" and not is_autoregressive(name):
                    continue
                frames = SHORT_FRAMES if name in SHORT_MODELS else arguments.frames
                shape = {"pass": which, "model": name, "batch": batch_size, "frames": frames}
                if not table.has(**shape):
                    table.add(shape | measure(shape, arguments))


def default_batches(device: torch.device) -> tuple[int, ...]:
    return (32, 128, 512) if device.type == "cuda" else (32,)


def is_autoregressive(name: str) -> bool:
    return name in DVAES and MODELS[name][0].autoregressive


def measure(shape: dict, arguments: argparse.Namespace) -> dict:
    """Return the measured cells of a row."""
    device = arguments.device
    calls = make_calls(shape, arguments.sequences, device)
    memory = {}  # also the warm-up
    for path, call in calls.items():
        memory[path] = peak_mebibytes(call, device)
    timed = dict(calls)
    if device.type == "cuda" and shape["pass"] == "step":
        for path, call in calls.items():
            replay, remark = captured(call, device)
            if not remark:
                timed[f"{path} graphed"] = replay
    medians = median_seconds(timed, device, arguments.repeats)
    frames = shape["batch"] * shape["frames"]
    row = {"frames/s": f"{frames / medians['shipped']:.0f}"}
    for path, seconds in medians.items():
        row[f"{path} ms"] = f"{1e3 * seconds:.2f}"
    for path, mebibytes in memory.items():
        row[f"{path} MiB"] = f"{mebibytes:.0f}"
    if "reference" in medians:
        row["ratio"] = f"{medians['reference'] / medians['shipped']:.2f}"
    return row


def make_calls(shape: dict, sequences: int, device: torch.device) -> dict[str, Callable]:
    """Return path → a call of the pass."""
    torch.manual_seed(0)
    model, batch = model_and_batch(shape, sequences, device)
    if shape["pass"] == "decode":
        noise = model.draw_noise(shape["batch"], shape["frames"])
        return {"shipped": partial(decode, model.eval(), batch, noise)}
    calls = {"shipped": partial(step, model, batch)}
    if hasattr(model, "forward_reference"):
        calls["reference"] = partial(step, with_reference_forward(model), batch)
    return calls


def step(model: nn.Module, batch) -> None:
    model.zero_grad(set_to_none=True)
    loss, _ = model.loss(batch)
    loss.backward()


@torch.no_grad()
def decode(model: DVAE, x: Tensor, noise) -> None:
    model.resynthesise(x, "generation", noise)


def with_reference_forward(model: DVAE) -> DVAE:
    """Return the same model, computed one frame at a time."""
    reference = copy.deepcopy(model)
    reference.forward = partial(reference_forward, reference)
    return reference


def reference_forward(model: DVAE, x: Tensor, noise=None, scheduled_sampling_prob: float = 0.0):
    if noise is None:
        noise = model.draw_noise(*x.shape[:2])
    return model.forward_reference(x, noise)


def model_and_batch(
    shape: dict, sequences: int, device: torch.device
) -> tuple[nn.Module, Tensor | SegmentBatch | FrameBatch]:
    """Return a new model, and a random batch for its loss."""
    name = shape["model"]
    settings = settings_of(name, sequences, shape["batch"])
    model = build_model(name, **settings).to(device)
    size = (shape["batch"], shape["frames"])
    x = torch.rand(*size, model.config.bins, device=device)
    if name in ("fhvae", "beta_vae"):
        segments_per_sequence = torch.full((shape["batch"],), 10.0, device=device)
        rows = torch.randint(sequences, (shape["batch"],), device=device)
        return model, SegmentBatch(x, segments_per_sequence, rows)
    if name == "acoustic":
        labels = torch.randint(NUM_PHONES, size, device=device)
        is_first = torch.zeros(shape["batch"], dtype=torch.bool, device=device)
        return model, FrameBatch(x, labels, is_first)
    return model, x


def settings_of(name: str, sequences: int, batch_size: int) -> dict:
    """Return the settings of a model that are not the defaults."""
    if name == "fhvae":
        return {"sequences": sequences}
    if name == "beta_vae":
        return {}
    if name == "acoustic":
        symbols = tuple(str(phone) for phone in range(NUM_PHONES))
        return {"symbols": symbols, "lanes": batch_size}
    return {"bins": 513 if issubclass(MODELS[name][0], LigHTDVAE) else 257}


def parse_arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--models",
        nargs="+",
        default=DVAES,
        choices=TIMED_MODELS,
        metavar="NAME",
        help=f"of {', '.join(TIMED_MODELS)} (default: the DVAEs)",
    )
    options.add_argument(
        "--passes",
        nargs="+",
        default=PASSES,
        choices=PASSES,
        help="what is timed (default: step decode)",
    )
    options.add_argument(
        "--batch", nargs="+", type=positive, help="(default: 32; on a GPU 32, 128 and 512)"
    )
    options.add_argument(
        "--frames", type=positive, default=150, help="T of a DVAE's sequence (default: 150)"
    )
    options.add_argument(
        "--sequences",
        type=positive,
        default=5_000,
        help="rows of FHVAE's table of s-vectors (default: 5000)",
    )
    return options.parse_args()


if __name__ == "__main__":
    run(main)
