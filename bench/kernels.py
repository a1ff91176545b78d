"""Time of each kernel: definition, torch.compile of it, cuDNN, public fused LSTMs where installed,
and ours.

    python bench/kernels.py                        all operations; on a GPU at a sweep of shapes
    python bench/kernels.py --operations lstm_scan --batch 32 256 --precision bf16 --csv kernels.csv

`reference` is the definition, `shipped` the public function, `loop` the plain PyTorch that a CPU
runs. `lstm_scan` is a whole layer, the projection of an input as wide as the layer included, so
that `nn.LSTM` (cuDNN on a GPU, oneDNN on the CPU) does the same; `latent_scan` has the shapes with
which that model calls it. Forward + backward computes the gradient of every input that has one; the
upstream gradient of a loss is that of its mean over frames.

GB/s count the fewest bytes: each input read once, each result written once; with backward each
upstream gradient read and each gradient written once as well. `% of copy` compares with a copy on
the device, measured in the same run. TFLOP/s count the matrix products; a backward pass has two for
each. On a GPU each path is captured in a CUDA graph, so the times are the device's (`eager` stands
beside a path that cannot be). Paths take turns within each repeat; times are medians. torch.compile
would unroll a scan's loop for minutes: it is timed for the losses only. Before its times are taken,
each path on a GPU is compared with the definition in float64; without a GPU tests/kernels compares
the kernels, in Triton's interpreter. The table is printed as Markdown; shapes that are in the
`--csv` file already are not measured again.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from timing import (
    MeasurementTable,
    captured,
    describe,
    markdown,
    median_seconds,
    new_file,
    parser,
    positive,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from minidvae.cli import run
from minidvae.files import atomic_write
from minidvae.kernels import gaussian_kl, is_divergence, latent_scan, latent_scan_loop, lstm_scan


class ScanShape(NamedTuple):
    """The network that a model has in its latent scan."""

    posterior: tuple[int, ...]  # hidden widths
    transition: tuple[int, ...]  # widths of its layers
    has_lstm: bool = False  # after the transition
    has_gates: bool = False  # known inputs of the LSTM


# Number of inputs of each loss.
LOSSES = {"is_divergence": 2, "gaussian_kl": 4, "gaussian_kl standard": 2}
SCANS = {
    "latent_scan srnn": ScanShape((64, 32), ()),
    "latent_scan dkf": ScanShape((64, 32), (32, 64, 128)),
    "latent_scan rvae": ScanShape((64, 32), (32, 64), has_lstm=True),
    "latent_scan vrnn": ScanShape((64, 32), (32, 64), has_lstm=True, has_gates=True),
}
OPERATIONS = (*LOSSES, "lstm_scan", *SCANS)
LATENT = 16
PASSES = ("forward", "forward + backward")
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}  # error as a share of the largest value
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


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    print(describe(device))
    copy_rate = copy_bytes_per_second(device, arguments.repeats)
    print(f"copy on the device: {copy_rate / 1e9:.1f} GB/s\n")
    table = MeasurementTable(COLUMNS, arguments.csv, keep=not arguments.fresh)
    for case in make_cases(arguments, device):
        if not table.has(**case.cells()):
            table.add(*measure(case, copy_rate, arguments.repeats, device))
    if arguments.markdown:
        with atomic_write(arguments.markdown) as temporary:
            temporary.write_text(f"{summary(table.rows)}\n")
    if arguments.plot:
        plot(table.rows, arguments.plot)
    sys.exit(any(row["ms"] == "wrong" for row in table.rows))


def parse_arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--operations",
        nargs="+",
        default=OPERATIONS,
        choices=OPERATIONS,
        metavar="NAME",
        help=f"of {', '.join(OPERATIONS)} (default: all)",
    )
    for name, (default,) in SWEEP["cpu"].items():
        on_gpu = ", ".join(str(value) for value in SWEEP["cuda"][name])
        options.add_argument(
            f"--{name}",
            nargs="+",
            type=positive,
            help=f"(default: {default}; on a GPU {on_gpu})",
        )
    options.add_argument(
        "--precision",
        nargs="+",
        choices=TOLERANCE,
        help="(default: fp32; on a GPU all that an operation has)",
    )
    options.add_argument(
        "--markdown",
        type=new_file,
        help="also write a table of milliseconds to this file (default: none)",
    )
    options.add_argument(
        "--plot",
        type=new_file,
        help="also draw forward + backward to this file (default: none)",
    )
    return options.parse_args()


# ------------------------------------------------------------------------------------------ cases


@dataclass
class Case:
    """An operation at one shape and precision."""

    operation: str
    shape: str
    precision: str
    num_frames: int  # sum over all sequences
    inputs: list[Tensor]
    paths: dict[str, Callable | None]  # functions of all inputs; None: cannot be measured here
    num_weights: int = 0  # elements of the matrices that every frame is multiplied with

    def cells(self) -> dict[str, str]:
        return {"operation": self.operation, "precision": self.precision, "shape": self.shape}

    def outputs(self, path: str, inputs: list[Tensor]) -> list[Tensor]:
        outputs = self.paths[path](*inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def upstream_gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """Return the gradients of the outputs, the same in every dtype."""
        if self.operation in LOSSES:
            return [torch.tensor(1 / self.num_frames).to(o).expand(o.shape) for o in outputs]
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        dtype = self.inputs[0].dtype
        gradients = []
        for output in outputs:
            gradient = torch.randn(
                output.shape, generator=generator, dtype=dtype, device=output.device
            )
            gradients.append(gradient.to(output))
        return gradients

    def results(self, path: str, inputs: list[Tensor]) -> list[Tensor | None]:
        """Return the outputs of a path, and the gradients of its inputs."""
        outputs = self.outputs(path, inputs)
        upstream = self.upstream_gradients(outputs)
        return outputs + gradients(outputs, inputs, upstream)


def differentiable(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor.requires_grad]


def gradients(
    outputs: list[Tensor], inputs: list[Tensor], upstream: list[Tensor]
) -> list[Tensor | None]:
    return list(torch.autograd.grad(outputs, differentiable(inputs), upstream, allow_unused=True))


def make_cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    sweep = {}
    for name, default in SWEEP[device.type].items():
        sweep[name] = getattr(arguments, name) or default
    default_precisions = TOLERANCE if device.type == "cuda" else ("fp32",)
    for operation in arguments.operations:
        make_case, widths = case_and_widths(operation, sweep)
        for precision in arguments.precision or default_precisions:
            if not has_precision(operation, precision):
                continue
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            for batch in sweep["batch"]:
                for frames in sweep["frames"]:
                    for width in widths:
                        torch.manual_seed(0)
                        torch.compiler.reset()
                        yield make_case(operation, batch, frames, width, precision, device)


def case_and_widths(operation: str, sweep: dict) -> tuple[Callable, tuple[int, ...]]:
    """Return the function that makes a case of an operation, and the widths to make it with."""
    if operation == "is_divergence":
        return loss_case, sweep["bins"]
    if operation in LOSSES:
        return loss_case, (LATENT,)
    if operation == "lstm_scan":
        return lstm_case, sweep["hidden"]
    if SCANS[operation].has_lstm:
        return latent_case, sweep["hidden"]
    return latent_case, sweep["hidden"][:1]  # has no effect there


def has_precision(operation: str, precision: str) -> bool:
    """Losses have no matrix products; latent scans are in float32."""
    if precision == "tf32":
        return operation not in LOSSES
    return precision != "bf16" or operation not in SCANS


def our_paths(module: ModuleType, device: torch.device) -> dict[str, Callable | None]:
    """Return the paths of one of our kernels. On a GPU `shipped` is the kernel."""
    name = module.__name__.rpartition(".")[2]
    paths = {"reference": getattr(module, f"{name}_reference"), "shipped": getattr(module, name)}
    if device.type != "cuda":
        paths["kernel"] = None
    return paths


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def loss_case(
    operation: str, batch: int, frames: int, width: int, precision: str, device: torch.device
) -> Case:
    inputs = []
    for _ in range(LOSSES[operation]):
        tensor = torch.randn(batch, frames, width, device=device)
        inputs.append(tensor.to(dtype_of(precision)).requires_grad_())
    module = gaussian_kl
    if operation == "is_divergence":
        module = is_divergence
        inputs[0] = inputs[0].detach().exp()  # power spectra, which have no gradient
    paths = our_paths(module, device)
    paths["torch.compile"] = torch.compile(paths["reference"], dynamic=False)
    shape = f"{batch} x {frames} x {width}"
    return Case(operation, shape, precision, batch * frames, inputs, paths)


# ------------------------------------------------------------------------------------ LSTM layers


def lstm_case(
    operation: str, batch: int, frames: int, hidden: int, precision: str, device: torch.device
) -> Case:
    dtype = dtype_of(precision)
    rnn = nn.LSTM(hidden, hidden, batch_first=True, device=device, dtype=dtype)
    x = torch.randn(batch, frames, hidden, device=device, dtype=dtype, requires_grad=True)
    zeros = x.new_zeros(batch, hidden)
    paths = our_paths(lstm_scan, device)
    for name, scan in paths.items():
        if scan is not None:
            paths[name] = partial(scanned_layer, scan, zeros)
    paths["nn.LSTM"] = partial(library_layer, rnn)
    if device.type == "cuda":
        paths |= public_layers(zeros, frames)
    inputs = [x, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0]
    shape = f"{batch} x {frames}, hidden {hidden}"
    return Case(operation, shape, precision, batch * frames, inputs, paths, 8 * hidden**2)


def scanned_layer(scan: Callable, zeros: Tensor, x, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    state = zeros.to(x.dtype)
    h, _, _ = scan(F.linear(x, w_ih, b_ih + b_hh), w_hh, state, state)
    return h


def library_layer(rnn: nn.LSTM, x: Tensor, *weights: Tensor) -> Tensor:
    return rnn(x)[0]


def public_layers(zeros: Tensor, frames: int) -> dict[str, Callable]:
    """Return the fused LSTMs of other packages that are installed."""
    paths = {}
    try:
        from flashrnn import flashrnn

        paths["flashrnn"] = partial(flashrnn_layer, flashrnn)
    except ImportError:
        pass
    try:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        states = zeros[:, None].expand(-1, frames, -1).contiguous()
        is_first = torch.arange(frames, device=zeros.device).eq(0)
        is_first = is_first.expand(len(zeros), -1).contiguous()
        paths["torchrl"] = partial(torchrl_layer, lstm_triton, states, is_first)
    except ImportError:
        pass
    return paths


def flashrnn_layer(flashrnn: Callable, x, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    batch, frames, hidden = x.shape
    gates = F.linear(x, w_ih).view(batch, frames, 4, 1, hidden)
    weights = w_hh.view(4, 1, hidden, hidden)
    bias = (b_ih + b_hh).view(4, 1, hidden)
    dtype = str(x.dtype).removeprefix("torch.")
    states, _ = flashrnn(gates, weights, bias, function="lstm", dtype=dtype)
    return states[0, :, :, 0]


def torchrl_layer(lstm_triton: Callable, states, is_first, x, *weights) -> Tensor:
    return lstm_triton(x, states, states, *weights, is_first, x.dtype)[0]


# ----------------------------------------------------------------------------------- latent scans


def latent_case(
    operation: str, batch: int, frames: int, hidden: int, precision: str, device: torch.device
) -> Case:
    """hidden: width of the LSTM, if there is one."""
    arguments = latent_arguments(SCANS[operation], batch, frames, hidden, device)
    leaves, structure = tree_flatten(arguments)
    inputs = []
    for leaf in leaves:
        if leaf is not None:
            inputs.append(leaf.requires_grad_(leaf is not arguments.noise))
    is_present = [leaf is not None for leaf in leaves]
    paths = our_paths(latent_scan, device)
    if device.type == "cuda":
        paths["loop"] = loop_scan
    for name, scan in paths.items():
        if scan is not None:
            paths[name] = partial(scan_of_tensors, scan, structure, is_present)
    networks = (arguments.first, arguments.posterior, arguments.transition, arguments.lstm)
    num_weights = 0
    for tensor in tree_flatten(networks)[0]:
        if tensor is not None and tensor.dim() == 2:
            num_weights += tensor.numel()
    shape = f"{batch} x {frames}"
    if arguments.lstm:
        shape += f", state {hidden}"
    return Case(operation, shape, precision, batch * frames, inputs, paths, num_weights)


def scan_of_tensors(scan: Callable, structure, is_present: list[bool], *tensors: Tensor):
    """Call a scan with its arguments as one flat list."""
    remaining = iter(tensors)
    leaves = [next(remaining) if present else None for present in is_present]
    return scan(*tree_unflatten(leaves, structure))


def loop_scan(*arguments):
    arguments = latent_scan.ScanArguments(*arguments)
    return latent_scan.apply(latent_scan_loop, arguments, "tanh")


def latent_arguments(
    scan: ScanShape, batch: int, frames: int, hidden: int, device: torch.device
) -> latent_scan.ScanArguments:
    """Return arguments of a latent scan as its model makes them."""
    transition_width = (LATENT, *scan.transition)[-1]
    state_width = hidden if scan.has_lstm else transition_width
    state = torch.zeros(batch, state_width, device=device)
    posterior = linear_layers(device, state_width, *scan.posterior, 2 * LATENT)
    first, _ = posterior.pop(0)
    states = [state]
    lstm = []
    gates = None
    if scan.has_lstm:
        ((w_ih, _),) = linear_layers(device, transition_width, 4 * state_width)
        ((w_hh, bias),) = linear_layers(device, state_width, 4 * state_width)
        states = [(state, state.clone())]
        lstm = [lstm_scan.LSTMWeights(w_ih, w_hh, None if scan.has_gates else bias)]
    transition = linear_layers(device, LATENT, *scan.transition)
    if scan.has_gates:
        gates = torch.randn(batch, frames, 4 * state_width, device=device)
    inputs = torch.randn(batch, frames, len(first), device=device)
    noise = torch.randn(batch, frames, LATENT, device=device)
    return latent_scan.ScanArguments(
        inputs, noise, states, first, posterior, transition, lstm, gates
    )


def linear_layers(device: torch.device, *widths: int) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each layer of an MLP."""
    layers = []
    for num_inputs, num_outputs in zip(widths, widths[1:], strict=False):
        layer = nn.Linear(num_inputs, num_outputs, device=device)
        layers.append((layer.weight.detach(), layer.bias.detach()))
    return layers


# ----------------------------------------------------------------------------------------- checks


def check_paths(case: Case, device: torch.device) -> dict[str, str]:
    """Compare the paths on a GPU with the definition in float64. Return path → "", "wrong" or
    NOT_MEASURED; print what is wrong."""
    remarks = {}
    for path, function in case.paths.items():
        remarks[path] = NOT_MEASURED if function is None else ""
    if device.type != "cuda":
        return remarks
    double = []
    for tensor in case.inputs:
        double.append(tensor.detach().double().requires_grad_(tensor.requires_grad))
    exact = case.results("reference", double)
    for path, function in case.paths.items():
        error = "" if function is None else error_of(case, path, exact)
        if error:
            print(
                f"{case.operation} {case.shape} {case.precision}, {path}: {error}",
                file=sys.stderr,
            )
            remarks[path] = "wrong"
    return remarks


def error_of(case: Case, path: str, exact: list[Tensor]) -> str:
    """Return what is wrong with the results of a path, or an empty string."""
    try:
        results = case.results(path, case.inputs)
    except Exception as error:  # another package may fail in any way; the others are still of use
        message = str(error).splitlines()
        return f"{type(error).__name__}: {message[0] if message else ''}"
    for result, expected in zip(results, exact, strict=True):
        if (result is None) != (expected is None):
            return "a gradient is missing"
        if expected is not None:
            largest = expected.abs().max().clamp_min(1e-12)
            error = ((result - expected).abs().max() / largest).item()
            if not error <= TOLERANCE[case.precision]:
                return f"off by {error:.1e} of the largest value"
    return ""


# ----------------------------------------------------------------------------------------- timing


def copy_bytes_per_second(device: torch.device, repeats: int) -> float:
    """Return the bytes per second, read and written, of a copy larger than any cache."""
    size = 2**28 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = source.clone()
    call, _ = captured(lambda: target.copy_(source), device)
    medians = median_seconds({"copy": call}, device, repeats, turn_seconds=0.01)
    return 2 * size / medians["copy"]


@dataclass
class Pass:
    name: str  # one of PASSES
    call: Callable[[str], None]  # runs a path
    num_bytes: int
    flops: int


def make_passes(case: Case) -> tuple[Pass, Pass]:
    with torch.no_grad():
        outputs = case.outputs("reference", case.inputs)
    upstream = case.upstream_gradients(outputs)
    forward_bytes = num_bytes(case.inputs + outputs)
    backward_bytes = num_bytes(differentiable(case.inputs) + upstream)
    flops = 2 * case.num_frames * case.num_weights
    return (
        Pass(PASSES[0], partial(forward, case), forward_bytes, flops),
        Pass(
            PASSES[1],
            partial(forward_and_backward, case, upstream),
            forward_bytes + backward_bytes,
            3 * flops,
        ),
    )


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def forward(case: Case, path: str) -> None:
    case.outputs(path, case.inputs)


def forward_and_backward(case: Case, upstream: list[Tensor], path: str) -> None:
    gradients(case.outputs(path, case.inputs), case.inputs, upstream)


def measure(case: Case, copy_rate: float, repeats: int, device: torch.device) -> list[dict]:
    """Return a row for each pass and path. copy_rate: bytes per second of a copy."""
    rows = []
    remarks = check_paths(case, device)
    for timed_pass in make_passes(case):
        calls = {}
        graph_remarks = {}
        for path, remark in remarks.items():
            if not remark:
                call = partial(timed_pass.call, path)
                calls[path], graph_remarks[path] = captured(call, device)
        medians = median_seconds(calls, device, repeats, turn_seconds=0.005)
        for path, remark in remarks.items():
            row = case.cells() | {"pass": timed_pass.name, "path": path, "ms": remark}
            if path in medians:
                seconds = medians[path]
                bytes_per_second = timed_pass.num_bytes / seconds
                row["ms"] = f"{1e3 * seconds:.3f}{graph_remarks[path]}"
                row["GB/s"] = f"{bytes_per_second / 1e9:.1f}"
                row["% of copy"] = f"{100 * bytes_per_second / copy_rate:.0f}"
                if "reference" in medians:
                    row["speed-up"] = f"{medians['reference'] / seconds:.2f}"
                if case.num_weights:
                    row["TFLOP/s"] = f"{timed_pass.flops / seconds / 1e12:.3f}"
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------- summaries


def milliseconds(cell: str) -> float | None:
    """Return the time in a cell such as "1.234 eager"; None where it holds no time."""
    if not cell:
        return None
    number = cell.split()[0]
    return float(number) if number.replace(".", "").isdigit() else None


def summary(rows: list[dict]) -> str:
    """Return a table of milliseconds in Markdown, a column for each path. Bold: faster than
    `shipped`."""
    paths = list(dict.fromkeys(row["path"] for row in rows))
    times_of_cases = {}
    for row in rows:
        case = tuple(row[column] for column in COLUMNS[:4])
        times_of_cases.setdefault(case, {})[row["path"]] = row["ms"]
    lines = []
    for case, times in times_of_cases.items():
        lines.append([*case, *(summary_cell(times, path) for path in paths)])
    return markdown([*COLUMNS[:4], *paths], lines)


def summary_cell(times: dict[str, str], path: str) -> str:
    cell = times.get(path, "")
    time = milliseconds(cell)
    shipped = milliseconds(times.get("shipped", ""))
    if time is not None and shipped is not None and time < shipped:
        return f"**{cell}**"
    return cell


def plot(rows: list[dict], path: Path) -> None:
    """Draw forward + backward: a panel for each operation and precision, milliseconds over shapes,
    a line for each path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}  # (operation, precision) → path → shape → milliseconds
    for row in rows:
        time = milliseconds(row["ms"])
        if row["pass"] == PASSES[1] and time is not None:
            lines = panels.setdefault((row["operation"], row["precision"]), {})
            lines.setdefault(row["path"], {})[row["shape"]] = time
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, layout="constrained", figsize=(9, 3 * len(panels))
    )
    for axis, (title, lines) in zip(axes[:, 0], panels.items(), strict=True):
        shapes = []
        for times in lines.values():
            shapes += [shape for shape in times if shape not in shapes]
        for name, times in lines.items():
            x = [shapes.index(shape) for shape in times]
            axis.plot(x, list(times.values()), "o-", label=name, markersize=4)
        axis.set(title=", ".join(title), ylabel="ms", yscale="log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=6)
        axis.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    run(main)
