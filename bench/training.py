"""Time of a training step (forward, loss, backward) and of decoding from the own past, for each model.

    python bench/training.py                                   at batch 32, T = 150
    python bench/training.py --models vrnn srnn --batch 32 256 --device cuda --csv training.csv
    python bench/training.py --passes decode --models light_dvae light_dvae_local --batch 1

Pass `step` of a recurrent model: `reference` is `forward_reference`, the equations one frame at a
time with autograd, which no code base of the field does for its LSTMs; `shipped` is `forward`. Pass
`decode` is resynthesis from the own past, without gradient, of autoregressive models. Models have
the sizes of their dataclass, the papers', and 257 bins; HiT-DVAE and LigHT-DVAE 513. FHVAE has
--sequences rows in its table of s-vectors. Paths take turns within each repeat; times are medians.
Peak memory is what a pass adds to what was held before it. On a GPU a step is timed as a CUDA graph
too (`graphed`), and products of matrices are in TF32, as in training. The table is printed as
Markdown; rows that are in the `--csv` file already are not measured again.
"""

import argparse
from collections.abc import Callable

import torch
from timing import Table, captured, describe, median_seconds, parser, peak_mebibytes, positive
from torch import nn

from minidvae.models import MODELS, build_model
from minidvae.models.base import DVAE
from minidvae.models.light_dvae import LigHTDVAE
from minidvae.models.recognisers import FrameBatch
from minidvae.models.segments import SegmentBatch

PASSES = ("step", "decode")
DVAES = [name for name, (model_type, _) in MODELS.items() if issubclass(model_type, DVAE)]
PHONES = 61  # of TIMIT, for the acoustic model
ACOUSTIC_FRAMES = 20  # of a piece in truncated back-propagation through time
SEGMENT_FRAMES = 20  # of FHVAE and β-VAE
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
    device = arguments.device
    torch.set_float32_matmul_precision("high")
    print(f"{describe(device)}\n")
    table = Table(COLUMNS, arguments.csv, keep=not arguments.fresh)
    batches = arguments.batch or ((32, 128, 512) if device.type == "cuda" else (32,))
    for batch in batches:
        for name in arguments.models:
            for which in arguments.passes:
                if which == "decode" and not getattr(MODELS[name][0], "autoregressive", False):
                    continue
                frames = frames_of(name, arguments.frames)
                shape = {"pass": which, "model": name, "batch": batch, "frames": frames}
                if not table.has(**shape):
                    table.add(shape | measure(shape, arguments))


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
    """Return what is timed of a row, by path."""
    torch.manual_seed(0)
    model, batch = model_and_batch(shape, sequences)
    model.to(device)
    if isinstance(batch, torch.Tensor):
        batch = batch.to(device)
    else:
        fields = (field if field is None else field.to(device) for field in batch)
        batch = type(batch)(*fields)
    if shape["pass"] == "decode":
        noise = model.draw_noise(shape["batch"], shape["frames"])
        return {"shipped": lambda: model.eval().resynthesise(batch, "generation", noise)}
    calls = {"shipped": lambda: step(model, batch)}
    if hasattr(model, "forward_reference"):
        reference = with_reference_forward(model)
        calls["reference"] = lambda: step(reference, batch)
    return calls


def step(model: nn.Module, batch) -> None:
    model.zero_grad(set_to_none=True)
    loss, _ = model.loss(batch)
    loss.backward()


def with_reference_forward(model: DVAE) -> DVAE:
    """Return the same model, computed one frame at a time."""
    model_type = type(model)

    def forward(self, x, noise=None, scheduled_sampling_prob=0.0):
        if noise is None:
            noise = self.draw_noise(*x.shape[:2])
        return self.forward_reference(x, noise)

    reference_type = type(model_type.__name__, (model_type,), {"forward": forward})
    reference = reference_type(model.config)
    reference.load_state_dict(model.state_dict())
    return reference.to(next(model.parameters()).device)


def frames_of(name: str, frames: int) -> int:
    """Return the length of a sequence of a model."""
    if name in ("fhvae", "beta_vae"):
        return SEGMENT_FRAMES
    return ACOUSTIC_FRAMES if name == "acoustic" else frames


def model_and_batch(shape: dict, sequences: int) -> tuple[nn.Module, object]:
    name = shape["model"]
    batch = shape["batch"]
    frames = shape["frames"]
    if name in ("fhvae", "beta_vae"):
        model = build_model(name, **({"sequences": sequences} if name == "fhvae" else {}))
        x = torch.randn(batch, frames, model.config.bins)
        return model, SegmentBatch(
            x, torch.full((batch,), 10.0), torch.randint(sequences, (batch,))
        )
    if name == "acoustic":
        symbols = tuple(str(phone) for phone in range(PHONES))
        model = build_model(name, symbols=symbols, lanes=batch)
        x = torch.rand(batch, frames, model.config.bins)
        labels = torch.randint(PHONES, (batch, frames))
        return model, FrameBatch(x, labels, torch.zeros(batch, dtype=torch.bool))
    bins = 513 if issubclass(MODELS[name][0], LigHTDVAE) else 257
    return build_model(name, bins=bins), torch.rand(batch, frames, bins)


def parse_arguments() -> argparse.Namespace:
    options = parser(__doc__)
    timed = [*DVAES, "fhvae", "beta_vae", "acoustic"]
    options.add_argument(
        "--models",
        nargs="+",
        default=DVAES,
        choices=timed,
        metavar="NAME",
        help=f"of {', '.join(timed)} (default: the DVAEs)",
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
    main()
