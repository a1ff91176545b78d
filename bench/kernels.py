"""Time of each kernel: definition, torch.compile of it, cuDNN, public fused LSTMs where installed, and ours.

    python bench/kernels.py                                        every operation; on a GPU the whole sweep of shapes
    python bench/kernels.py --operations lstm_scan --batch 32 256 --precision bf16 --csv kernels.csv --plot kernels.png

`reference` is the definition, `shipped` the public function, `loop` the plain PyTorch that a CPU runs. `lstm_scan` is a
whole layer, the projection of an input as wide as the layer included, so that `nn.LSTM` (cuDNN on a GPU, oneDNN on the
CPU) does the same; `latent_scan` has the shapes with which that model calls it. Forward + backward makes the gradient
of every input that has one; the upstream gradient of a loss is that of its mean over frames.

GB/s count the fewest bytes: each input read once, each result written once; with backward each upstream gradient
read and each gradient written once as well. `% of copy` compares with a copy on the device, measured in the same run.
TFLOP/s count the matrix products; a backward pass has two for each. On a GPU each path is captured in a CUDA graph,
so the times are the device's (`eager` stands beside a path that cannot be). Paths take turns within each repeat; times
are medians. torch.compile would unroll a scan's loop for minutes: it is timed for the losses only. Before its times are
taken, each path on a GPU is compared with the definition in float64; without a GPU tests/kernels compares the kernels,
in Triton's interpreter. The table is printed as Markdown; shapes that are in the `--csv` file already are not measured
again.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from timing import Table, captured, describe, markdown, median_seconds, new_file, parser, positive
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from minidvae.files import atomic_write
from minidvae.kernels import gaussian_kl, is_divergence, latent_scan, latent_scan_loop, lstm_scan

LOSSES = {"is_divergence": 2, "gaussian_kl": 4, "gaussian_kl standard": 2}  # how many inputs
SCANS = {  # hidden widths of the posterior, widths of the transition, whether an LSTM follows, whether with known gates
    "latent_scan srnn": ((64, 32), (), False, False),
    "latent_scan dkf": ((64, 32), (32, 64, 128), False, False),
    "latent_scan rvae": ((64, 32), (32, 64), True, False),
    "latent_scan vrnn": ((64, 32), (32, 64), True, True),
}
OPERATIONS = (*LOSSES, "lstm_scan", *SCANS)
LATENT = 16
PASSES = ("forward", "forward + backward")
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}  # of the largest value, over 150 frames
SWEEP = {
    "cuda": {
        "batch": (32, 128, 256),
        "frames": (20, 100, 150),
        "bins": (80, 257, 513),
        "hidden": (128, 256, 512),
    },
    "cpu": {"batch": (32,), "frames": (150,), "bins": (257,), "hidden": (128,)},
}
COLUMNS = (
    "operation",
    "precision",
    "shape",
    "pass",
    "path",
    "ms",
    "GB/s",
    "% of copy",
    "TFLOP/s",
    "speed-up",
)
NOT_MEASURED = "not measured"


@dataclass
class Case:
    """paths: functions of all inputs; None is one that cannot be measured here. weights: elements of the matrices
    that every frame of every sequence is multiplied with."""

    operation: str
    shape: str
    precision: str
    frames: int  # of all sequences
    inputs: list[Tensor]
    paths: dict[str, Callable | None]
    weights: int = 0

    def outputs(self, path: str, inputs: list[Tensor]) -> list[Tensor]:
        outputs = self.paths[path](*inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def upstream(self, outputs: list[Tensor]) -> list[Tensor]:
        """Their gradients, the same in every dtype."""
        if self.operation in LOSSES:
            return [torch.tensor(1 / self.frames).to(o).expand(o.shape) for o in outputs]
        generator, dtype = torch.Generator(outputs[0].device).manual_seed(1), self.inputs[0].dtype
        return [
            torch.randn(o.shape, generator=generator, dtype=dtype, device=o.device).to(o)
            for o in outputs
        ]


def ours(module: ModuleType, device: torch.device) -> dict[str, Callable | None]:
    """On a GPU `shipped` takes the kernel."""
    name = module.__name__.rpartition(".")[2]
    paths = {"reference": getattr(module, f"{name}_reference"), "shipped": getattr(module, name)}
    return paths if device.type == "cuda" else paths | {"kernel": None}


# ---------------------------------------------------------------------------------------------------------- operations


def loss_case(
    operation: str, batch: int, frames: int, columns: int, precision: str, device
) -> Case:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    inputs = [
        torch.randn(batch, frames, columns, device=device).to(dtype)
        for _ in range(LOSSES[operation])
    ]
    if operation == "is_divergence":
        inputs[0] = inputs[0].exp()
    for tensor in inputs[operation == "is_divergence" :]:
        tensor.requires_grad_()
    paths = ours(is_divergence if operation == "is_divergence" else gaussian_kl, device)
    paths["torch.compile"] = torch.compile(paths["reference"], dynamic=False)
    return Case(
        operation, f"{batch} x {frames} x {columns}", precision, batch * frames, inputs, paths
    )


def lstm_case(operation: str, batch: int, frames: int, hidden: int, precision: str, device) -> Case:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rnn = nn.LSTM(hidden, hidden, batch_first=True, device=device, dtype=dtype)
    x = torch.randn(batch, frames, hidden, device=device, dtype=dtype, requires_grad=True)
    zeros = x.new_zeros(batch, hidden)

    def layer(scan: Callable) -> Callable:
        def of_input(x, w_ih, w_hh, b_ih, b_hh):
            state = zeros.to(x.dtype)
            return scan(F.linear(x, w_ih, b_ih + b_hh), w_hh, state, state)[0]

        return of_input

    paths = {name: path and layer(path) for name, path in ours(lstm_scan, device).items()}
    paths |= {"nn.LSTM": lambda x, *weights: rnn(x)[0]}
    if device.type == "cuda":
        paths |= public_lstms(zeros, frames)
    inputs = [x, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0]
    shape = f"{batch} x {frames}, hidden {hidden}"
    return Case(operation, shape, precision, batch * frames, inputs, paths, 8 * hidden**2)


def public_lstms(zeros: Tensor, frames: int) -> dict[str, Callable]:
    """Fused LSTMs of other packages, where they are installed."""
    batch, hidden = zeros.shape
    found = {}
    try:
        from flashrnn import flashrnn

        def flash(x, w_ih, w_hh, b_ih, b_hh):
            gates = F.linear(x, w_ih).view(batch, frames, 4, 1, hidden)
            bias, dtype = (b_ih + b_hh).view(4, 1, hidden), str(x.dtype).removeprefix("torch.")
            return flashrnn(
                gates, w_hh.view(4, 1, hidden, hidden), bias, function="lstm", dtype=dtype
            )[0][0, :, :, 0]

        found["flashrnn"] = flash
    except ImportError:
        pass
    try:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        state = zeros[:, None].expand(-1, frames, -1).contiguous()
        first = torch.arange(frames, device=zeros.device).eq(0).expand(batch, -1).contiguous()
        found["torchrl"] = lambda x, *weights: lstm_triton(
            x, state, state, *weights, first, x.dtype
        )[0]
    except ImportError:
        pass
    return found


def latent_arguments(
    operation: str, batch: int, frames: int, hidden: int, device
) -> latent_scan.ScanArguments:
    """As the model makes them; hidden: of an LSTM."""
    posterior_widths, transition_widths, has_lstm, has_gates = SCANS[operation]

    def layers(*widths: int) -> list[tuple[Tensor, Tensor]]:
        made = [
            nn.Linear(inputs, outputs, device=device)
            for inputs, outputs in zip(widths, widths[1:], strict=False)
        ]
        return [(layer.weight.detach(), layer.bias.detach()) for layer in made]

    def sequence(width: int) -> Tensor:
        return torch.randn(batch, frames, width, device=device)

    after = (LATENT, *transition_widths)[-1]
    size = hidden if has_lstm else after
    (first, _), *posterior = layers(size, *posterior_widths, 2 * LATENT)
    state, lstm = [torch.zeros(batch, size, device=device)], []
    if has_lstm:
        ((w_ih, _),), ((w_hh, bias),) = layers(after, 4 * size), layers(size, 4 * size)
        state, lstm = (
            [(state[0], state[0].clone())],
            [lstm_scan.LSTMWeights(w_ih, w_hh, None if has_gates else bias)],
        )
    transition, gates = (
        layers(LATENT, *transition_widths),
        sequence(4 * size) if has_gates else None,
    )
    inputs, noise = sequence(len(first)), sequence(LATENT)
    return latent_scan.ScanArguments(
        inputs, noise, state, first, posterior, transition, lstm, gates
    )


def latent_case(
    operation: str, batch: int, frames: int, hidden: int, precision: str, device
) -> Case:
    given = latent_arguments(operation, batch, frames, hidden, device)
    leaves, form = tree_flatten(given)
    inputs = [leaf.requires_grad_(leaf is not given.noise) for leaf in leaves if leaf is not None]

    def call(scan: Callable) -> Callable:
        def of_tensors(*tensors):
            tensors = iter(tensors)
            return scan(
                *tree_unflatten([None if leaf is None else next(tensors) for leaf in leaves], form)
            )

        return of_tensors

    def loop(*arguments):
        return latent_scan.apply(latent_scan_loop, latent_scan.ScanArguments(*arguments), "tanh")

    paths = ours(latent_scan, device) | ({"loop": loop} if device.type == "cuda" else {})
    paths = {path: scan and call(scan) for path, scan in paths.items()}
    matrices, _ = tree_flatten((given.first, given.posterior, given.transition, given.lstm))
    weights = sum(matrix.numel() for matrix in matrices if matrix is not None and matrix.dim() == 2)
    shape = f"{batch} x {frames}" + (f", state {hidden}" if given.lstm else "")
    return Case(operation, shape, precision, batch * frames, inputs, paths, weights)


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    sweep = {
        name: getattr(arguments, name) or default for name, default in SWEEP[device.type].items()
    }
    for operation in arguments.operations:
        if operation in LOSSES:
            builder, columns = (
                loss_case,
                sweep["bins"] if operation == "is_divergence" else (LATENT,),
            )
        elif operation == "lstm_scan":
            builder, columns = lstm_case, sweep["hidden"]
        else:
            builder, columns = (
                latent_case,
                sweep["hidden"] if SCANS[operation][2] else sweep["hidden"][:1],
            )
        for precision in arguments.precision or (TOLERANCE if device.type == "cuda" else ("fp32",)):
            if (
                precision == "tf32"
                and operation in LOSSES
                or precision == "bf16"
                and operation in SCANS
            ):
                continue  # no matrix products; latent scans are in float32
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            for batch in sweep["batch"]:
                for frames in sweep["frames"]:
                    for column in columns:
                        torch.manual_seed(0)
                        torch.compiler.reset()
                        yield builder(operation, batch, frames, column, precision, device)


# -------------------------------------------------------------------------------------------------------------- checks


def wanted(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor.requires_grad]


def results(case: Case, path: str, inputs: list[Tensor]) -> list[Tensor]:
    """What a path returns, and the gradients"""
    outputs = case.outputs(path, inputs)
    return outputs + list(
        torch.autograd.grad(outputs, wanted(inputs), case.upstream(outputs), allow_unused=True)
    )


def wrong(case: Case, path: str, exact: list[Tensor]) -> str:
    """What is wrong with the results of a path, or nothing."""
    for one, other in zip(results(case, path, case.inputs), exact, strict=True):
        if (one is None) != (other is None):
            return "a gradient is missing"
        if other is not None:
            error = ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()
            if not error <= TOLERANCE[case.precision]:
                return f"off by {error:.1e} of the largest value"
    return ""


# -------------------------------------------------------------------------------------------------------------- timing


def device_copy(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    source = torch.empty(
        2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device
    )
    target = source.clone()
    call, _ = captured(lambda: target.copy_(source), device)
    return 2 * source.numel() / median_seconds({"copy": call}, device, repeats, 0.01)["copy"]


def measure(case: Case, copy: float, repeats: int, device: torch.device) -> Iterator[dict]:
    """A row for each pass and path."""
    status = {path: "" if function else NOT_MEASURED for path, function in case.paths.items()}
    if device.type == "cuda":
        double = [
            tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in case.inputs
        ]
        exact = results(case, "reference", double)
        for path in [path for path, remark in status.items() if not remark]:
            try:
                problem = wrong(case, path, exact)
            except (
                Exception
            ) as error:  # another package may fail in any way, and the rest is still of use
                problem = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
            if problem:
                print(
                    f"{case.operation} {case.shape} {case.precision}, {path}: {problem}",
                    file=sys.stderr,
                )
                status[path] = "wrong"
        del exact, double
    with torch.no_grad():
        outputs = case.outputs("reference", case.inputs)
    given, differentiated = case.upstream(outputs), wanted(case.inputs)

    def forward(path: str) -> None:
        with torch.no_grad():
            case.outputs(path, case.inputs)

    def both(path: str) -> None:
        torch.autograd.grad(
            case.outputs(path, case.inputs), differentiated, given, allow_unused=True
        )

    moved = [
        sum(tensor.nbytes for tensor in tensors)
        for tensors in (case.inputs + outputs, differentiated + given)
    ]
    products = 2 * case.frames * case.weights
    passes = (forward, moved[0], products), (both, sum(moved), 3 * products)
    for name, (run, size, flops) in zip(PASSES, passes, strict=True):
        calls, remarks = {}, {}
        for path in [path for path, remark in status.items() if not remark]:
            calls[path], remarks[path] = captured(lambda run=run, path=path: run(path), device)
        medians = median_seconds(calls, device, repeats, 0.005)
        for path in case.paths:
            row = {"operation": case.operation, "precision": case.precision, "shape": case.shape}
            row |= {"pass": name, "path": path, "ms": status[path]}
            if path in medians:
                rate = size / medians[path]
                row |= {
                    "ms": f"{1e3 * medians[path]:.3f}{remarks[path]}",
                    "GB/s": f"{rate / 1e9:.1f}",
                }
                row |= {"% of copy": f"{100 * rate / copy:.0f}"}
                if "reference" in medians:
                    row["speed-up"] = f"{medians['reference'] / medians[path]:.2f}"
                if case.weights:
                    row["TFLOP/s"] = f"{flops / medians[path] / 1e12:.3f}"
            yield row


def milliseconds(cell: str) -> float | None:
    number = (cell or "-").split()[0]
    return float(number) if number.replace(".", "").isdigit() else None


def summary(rows: list[dict]) -> str:
    """A Markdown table of milliseconds, a column for each path; bold is what beats `shipped`."""
    paths = list(dict.fromkeys(row["path"] for row in rows))
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in COLUMNS[:4]), {})[row["path"]] = row["ms"]

    def cell(times: dict[str, str], path: str) -> str:
        time, shipped = (milliseconds(times.get(name, NOT_MEASURED)) for name in (path, "shipped"))
        wins = time is not None and shipped is not None and time < shipped
        return f"**{times[path]}**" if wins else times.get(path, "")

    lines = [(*case, *(cell(times, path) for path in paths)) for case, times in found.items()]
    return markdown((*COLUMNS[:4], *paths), lines)


def plot(rows: list[dict], path: Path) -> None:
    """Forward + backward: a panel for each operation and precision, milliseconds over shapes, a line for each path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["pass"] == PASSES[1] and milliseconds(row["ms"]) is not None]
    panels = list(dict.fromkeys((row["operation"], row["precision"]) for row in rows))
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, layout="constrained", figsize=(9, 3 * len(panels))
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        mine = [row for row in rows if (row["operation"], row["precision"]) == panel]
        shapes = list(dict.fromkeys(row["shape"] for row in mine))
        for name in dict.fromkeys(row["path"] for row in mine):
            found = {row["shape"]: milliseconds(row["ms"]) for row in mine if row["path"] == name}
            axis.plot(
                [shapes.index(shape) for shape in found],
                list(found.values()),
                "o-",
                label=name,
                markersize=4,
            )
        axis.set(title=", ".join(panel), ylabel="ms", yscale="log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=6)
        axis.legend(fontsize=7)
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=120)


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS, metavar="NAME"
    )
    for name, default in SWEEP["cpu"].items():
        text = f"default: {default[0]}; on a GPU {', '.join(map(str, SWEEP['cuda'][name]))}"
        options.add_argument(f"--{name}", nargs="+", type=positive, help=text)
    text = "default: fp32; on a GPU all that an operation has"
    options.add_argument("--precision", nargs="+", choices=TOLERANCE, help=text)
    options.add_argument(
        "--markdown", type=new_file, help="write a table of milliseconds to this file"
    )
    options.add_argument("--plot", type=new_file, help="draw forward + backward to this file")
    arguments = options.parse_args()
    device = arguments.device
    print(describe(device))
    copy = device_copy(device, arguments.repeats)
    print(f"copy on the device: {copy / 1e9:.1f} GB/s")
    table = Table(COLUMNS, arguments.csv, keep=not arguments.fresh)
    for case in cases(arguments, device):
        if not table.has(operation=case.operation, precision=case.precision, shape=case.shape):
            for row in measure(case, copy, arguments.repeats, device):
                table.add(row)
    if arguments.markdown:
        with atomic_write(arguments.markdown) as beside:
            beside.write_text(f"{summary(table.rows)}\n")
    if arguments.plot:
        plot(table.rows, arguments.plot)
    sys.exit(any(row["ms"] == "wrong" for row in table.rows))


if __name__ == "__main__":
    main()
