"""HiT-DVAE and LigHT-DVAE at the paper's size, 513 bins: a training step, and resynthesis from the own past.

    python bench/transformer.py                                     # fp32 and bf16
    python bench/transformer.py --precisions fp32                   # for CPUs without instructions for bf16
    python bench/transformer.py --compile --csv transformer.csv     # also through torch.compile

A step is forward, loss and backward. Its FLOPs are those that its matrix products need, counted layer by layer, causal
attention by half; `share` is their rate over that of a square matrix product in the same precision. All calls take
turns, times are medians. On a GPU fp32 means TF32.

Resynthesis: speech per time for whole utterances of 2 to 20 s in batches, as evaluate.py runs them; and the time of one
frame of one utterance, at its start and after 30 s.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from timing import Table, describe, median_seconds, parser, positive, seconds, synchronise
from torch import nn

from minidvae.cli import choose_device
from minidvae.data.audio import SAMPLE_RATE, STFT
from minidvae.evaluation.resynthesis import batches
from minidvae.models import build_model
from minidvae.models.light_dvae import Attention, LigHTDVAE

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP = ("model", "precision", "ms", "GFLOP", "GFLOP/s", "product GFLOP/s", "share", "compiled ms")
RESYNTHESIS = ("model", "utterances", "× real time", "first frames, ms", "after 30 s, ms")


def flops(model: LigHTDVAE, x: torch.Tensor) -> float:
    """Of the matrix products in a forward and a backward pass: two more in backward for each in forward, one where the
    input needs no gradient."""
    total = 0

    def linear(layer: nn.Linear, inputs: tuple[torch.Tensor], _) -> None:
        nonlocal total
        total += (2 + inputs[0].requires_grad) * 2 * inputs[0].numel() * layer.out_features

    def attention(layer: Attention, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += 3 * 2 * 2 * output.numel() * inputs[1].shape[1] // (1 + layer.causal)

    hooks = [
        layer.register_forward_hook(linear)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    hooks += [
        layer.register_forward_hook(attention)
        for layer in model.modules()
        if isinstance(layer, Attention)
    ]
    model.loss(x)
    for hook in hooks:
        hook.remove()
    recurrent = sum(weight.numel() for weight in model.w_rnn.parameters() if weight.dim() == 2)
    return total + 3 * 2 * recurrent * x.shape[0] * x.shape[1]


def step(model: LigHTDVAE, loss: Callable, x: torch.Tensor, dtype: torch.dtype) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        value = loss(x)[0]
    value.backward()


def training_step(name: str, arguments: argparse.Namespace, device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    model = build_model(name, input_scale="root").to(device)
    x = torch.rand(arguments.batch, arguments.frames, model.config.bins, device=device)
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device)
    count, calls = flops(model, x), {}
    for precision in arguments.precisions:
        dtype = PRECISIONS[precision]
        calls[precision] = partial(step, model, model.loss, x, dtype)
        if arguments.compile:
            calls[f"{precision} compiled"] = partial(
                step, model, torch.compile(model.loss), x, dtype
            )
        calls[f"{precision} product"] = partial(torch.matmul, a.to(dtype), b.to(dtype))
    medians = median_seconds(calls, device, arguments.repeats)
    rows = []
    for precision in arguments.precisions:
        rate, best = count / medians[precision], 2 * size**3 / medians[f"{precision} product"]
        row = {"model": name, "precision": precision, "ms": f"{1e3 * medians[precision]:.0f}"}
        row |= {"GFLOP": f"{count / 1e9:.0f}", "GFLOP/s": f"{rate / 1e9:.0f}"}
        row |= {"product GFLOP/s": f"{best / 1e9:.0f}", "share": f"{rate / best:.0%}"}
        if arguments.compile:
            row["compiled ms"] = f"{1e3 * medians[f'{precision} compiled']:.0f}"
        rows.append(row)
    return rows


def resynthesis(name: str, device: torch.device) -> dict:
    torch.manual_seed(0)
    model = build_model(name, input_scale="root").to(device).eval()
    frame = STFT().hop / SAMPLE_RATE  # seconds
    lengths = torch.linspace(2 / frame, 20 / frame, 25).round().int().tolist()
    noises = [model.draw_noise(1, length) for length in lengths]

    def decode_all() -> None:
        for group in batches(lengths):
            spectra = [torch.rand(lengths[i], model.config.bins, device=device) for i in group]
            list(model.resynthesise_each(spectra, "generation", [noises[i] for i in group]))

    at_thirty, more, times = math.ceil(30 / frame), 100, []
    z, w = model.draw_noise(1, at_thirty + more)

    def draw(t: int, *_) -> torch.Tensor:
        synchronise(device)
        times.append(time.perf_counter())
        return z[:, t : t + 1]

    with torch.no_grad():
        model.unroll(w, z.shape[1], draw)
    steps = torch.tensor(times, dtype=torch.float64).diff()
    row = {"model": name, "utterances": len(lengths)}
    row["× real time"] = f"{sum(lengths) * frame / seconds(decode_all, device):.1f}"
    return row | {
        "first frames, ms": f"{1e3 * steps[:more].median():.2f}",
        "after 30 s, ms": f"{1e3 * steps[-more:].median():.2f}",
    }


def main() -> None:
    options = parser(__doc__)
    models = ("light_dvae", "hit_dvae")
    options.add_argument("--models", nargs="+", default=models, choices=models, metavar="NAME")
    options.add_argument("--batch", type=positive, default=32)
    options.add_argument("--frames", type=positive, default=100)
    options.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, metavar="NAME"
    )
    options.add_argument(
        "--compile", action="store_true", help="time the step through torch.compile as well"
    )
    arguments = options.parse_args()
    device = choose_device(arguments.device)
    print(f"{describe(device)}; a step takes {arguments.batch} × {arguments.frames} frames\n")
    table = Table(*STEP, model=10)
    for name in arguments.models:
        for row in training_step(name, arguments, device):
            table.add(row)
    table.write(arguments.csv)
    print()
    table = Table(*RESYNTHESIS, model=10)
    for name in arguments.models:
        table.add(resynthesis(name, device))


if __name__ == "__main__":
    main()
