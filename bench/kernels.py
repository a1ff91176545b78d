"""Time of each kernel: definition, torch.compile of it, cuDNN, public fused LSTMs where installed, and ours.

    python bench/kernels.py                                        every operation; on a GPU the whole sweep of shapes
    python bench/kernels.py --operations lstm_scan --batch 32 256 --precision bf16 --csv kernels.csv --plot kernels.png
    TRITON_INTERPRET=1 python bench/kernels.py --check             no times; kernels against the definition

`reference` is the definition, `shipped` the public function, `loop` what that does on the CPU. `lstm_scan` is a whole
layer, the projection of an input as wide as the layer included, so that `nn.LSTM` (cuDNN on a GPU, oneDNN on the CPU)
does the same; `latent_scan` has the arguments with which that model calls it. Forward + backward makes the gradient of
every input that has one; the upstream gradient of a loss is that of its mean over frames.

GB/s count the fewest bytes: each input read once, each result written once; with backward each upstream gradient
read and each gradient written once as well. `% of copy` compares with a copy on the device, measured in the same run.
TFLOP/s count the matrix products; a backward pass has two for each. On a GPU each path is captured in a CUDA graph,
so the times are the device's (`eager` stands beside a path that cannot be). Paths take turns within each repeat; times
are medians. Before its times are taken, each path on a GPU is compared with the definition in float64; without a GPU
the kernels are, in Triton's interpreter.
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import describe, median_seconds, print_row, write_csv  # noqa: E402

from minidvae import kernels  # noqa: E402
from minidvae.files import whole  # noqa: E402
from minidvae.models import build_model  # noqa: E402

LOSSES = {"is_divergence": 2, "gaussian_kl": 4, "gaussian_kl standard": 2}  # how many inputs
SCANS = {f"latent_scan {name}": name for name in ("srnn", "dkf", "rvae", "vrnn")}
OPERATIONS = (*LOSSES, "lstm_scan", *SCANS)
STATE = {"latent_scan rvae": "gz_rnn", "latent_scan vrnn": "rnn"}  # what the model calls the width of a recurrent state
DECIDE = {"lstm_scan": "lstm_scan", "latent_scan": "latent_scan_triton"}  # the file that decides on a launch
LATENT = 16
PASSES = ("forward", "forward + backward")
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}  # of the largest value, over 150 frames
SWEEP = {
    "cuda": {"batch": (32, 128, 256), "frames": (20, 100, 150), "bins": (80, 257, 513), "hidden": (128, 256, 512)},
    "cpu": {"batch": (32,), "frames": (150,), "bins": (257,), "hidden": (128,)},
    "check": {"batch": (17,), "frames": (3,), "bins": (33,), "hidden": (32,)},
}
COLUMNS = ("operation", "precision", "shape", "pass", "path", "ms", "GB/s", "% of copy", "TFLOP/s", "speed-up")
WIDTHS = {"operation": 20, "shape": 26, "pass": 18, "path": 13, "ms": 12}
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

    @property
    def wanted(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs if tensor.requires_grad]


def fused(operation: str) -> Callable:
    return getattr(importlib.import_module(f"minidvae.kernels.{operation}"), f"{operation}_fused")


def ours(operation: str, mode: str) -> dict[str, Callable | None]:
    """`kernel` is what `shipped` takes on a GPU."""
    paths = {"reference": getattr(kernels, f"{operation}_reference")}
    if mode == "check":
        return paths | {"kernel": fused(operation)}
    paths["shipped"] = getattr(kernels, operation)
    if mode == "cpu":
        return paths | {"kernel": None}
    return paths | ({"loop": without_kernel(operation)} if operation in DECIDE else {})


def without_kernel(operation: str) -> Callable:
    """The public function where no kernel can be launched: the loop that the CPU runs."""
    module = importlib.import_module(f"minidvae.kernels.{DECIDE[operation]}")

    def loop(*arguments, **options):
        with mock.patch.object(module, "launchable", return_value=False):
            return getattr(kernels, operation)(*arguments, **options)

    return loop


# ---------------------------------------------------------------------------------------------------------- operations


def loss_case(operation: str, batch: int, frames: int, columns: int, precision: str, mode: str, device) -> Case:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    inputs = [torch.randn(batch, frames, columns, device=device).to(dtype) for _ in range(LOSSES[operation])]
    if operation == "is_divergence":
        inputs[0] = inputs[0].exp()
    for tensor in inputs[operation == "is_divergence" :]:
        tensor.requires_grad_()
    paths = ours(operation.split()[0], mode)
    if mode != "check":
        paths["torch.compile"] = torch.compile(paths["reference"], dynamic=False)
    return Case(operation, f"{batch} x {frames} x {columns}", precision, batch * frames, inputs, paths)


def lstm_case(operation: str, batch: int, frames: int, hidden: int, precision: str, mode: str, device) -> Case:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rnn = nn.LSTM(hidden, hidden, batch_first=True, device=device, dtype=dtype)
    x = torch.randn(batch, frames, hidden, device=device, dtype=dtype, requires_grad=True)
    zeros = x.new_zeros(batch, hidden)

    def layer(scan: Callable) -> Callable:
        def of_input(x, w_ih, w_hh, b_ih, b_hh):
            state = zeros.to(x.dtype)
            return scan(F.linear(x, w_ih, b_ih + b_hh), w_hh, state, state)[0]

        return of_input

    paths = {name: path and layer(path) for name, path in ours(operation, mode).items()}
    if mode != "check":
        paths |= {"nn.LSTM": lambda x, *weights: rnn(x)[0]} | unrolled(paths["reference"], batch, frames, mode)
    if mode == "cuda":
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
            return flashrnn(gates, w_hh.view(4, 1, hidden, hidden), bias, function="lstm", dtype=dtype)[0][0, :, :, 0]

        found["flashrnn"] = flash
    except ImportError:
        pass
    try:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        state = zeros[:, None].expand(-1, frames, -1).contiguous()
        first = torch.arange(frames, device=zeros.device).eq(0).expand(batch, -1).contiguous()
        found["torchrl"] = lambda x, *weights: lstm_triton(x, state, state, *weights, first, x.dtype)[0]
    except ImportError:
        pass
    return found


def latent_case(operation: str, batch: int, frames: int, hidden: int, precision: str, mode: str, device) -> Case:
    """The call that the model makes, at the model's own widths but for the state."""
    name = SCANS[operation]
    width = {STATE[operation]: hidden} if operation in STATE else {}
    model = build_model(name, bins=257, latent=LATENT, **width).to(device)
    module, calls = sys.modules[type(model).__module__], []

    def record(*arguments, **options):
        calls.append((arguments, options))
        return kernels.latent_scan(*arguments, **options)

    with mock.patch.object(module, "latent_scan", record), torch.no_grad():
        model(torch.rand(batch, frames, 257, device=device), model.draw_noise(batch, frames))
    leaves, form = tree_flatten(calls[0])
    noise = calls[0][0][1]
    inputs = [leaf.detach().requires_grad_(leaf is not noise) for leaf in leaves if isinstance(leaf, Tensor)]

    def call(scan: Callable) -> Callable:
        def with_tensors(*tensors):
            tensors = iter(tensors)
            filled = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            arguments, options = tree_unflatten(filled, form)
            return scan(*arguments, **options)

        return with_tensors

    paths = {path: scan and call(scan) for path, scan in ours("latent_scan", mode).items()}
    if mode != "check":
        paths |= unrolled(paths["reference"], batch, frames, mode)
    states = {id(state) for state in calls[0][0][2]}
    matrices = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 2 and id(leaf) not in states]
    weights = sum(matrix.numel() for matrix in matrices)
    shape = f"{batch} x {frames}" + (f", state {hidden}" if width else "")
    return Case(operation, shape, precision, batch * frames, inputs, paths, weights)


def unrolled(reference: Callable, batch: int, frames: int, mode: str) -> dict[str, Callable | None]:
    """torch.compile unrolls the loop and takes minutes for it: the shortest, at one batch size, on a GPU only."""
    few = mode == "cuda" and frames <= 20 and batch <= 32
    return {"torch.compile": torch.compile(reference, dynamic=False) if few else None}


def cases(arguments: argparse.Namespace, mode: str, device: torch.device) -> Iterator[Case]:
    sweep = {name: getattr(arguments, name) or default for name, default in SWEEP[mode].items()}
    for operation in arguments.operations:
        if operation in LOSSES:
            builder, columns = loss_case, sweep["bins"] if operation == "is_divergence" else (LATENT,)
        elif operation == "lstm_scan":
            builder, columns = lstm_case, sweep["hidden"]
        else:
            builder, columns = latent_case, sweep["hidden"] if operation in STATE else sweep["hidden"][:1]
        for precision in arguments.precision or (("fp32", "tf32", "bf16") if mode == "cuda" else ("fp32",)):
            if precision == "tf32" and operation in LOSSES or precision == "bf16" and operation in SCANS:
                continue  # no matrix products; latent scans are in float32
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            for batch in sweep["batch"]:
                for frames in sweep["frames"]:
                    for column in columns:
                        torch.manual_seed(0)
                        torch.compiler.reset()
                        yield builder(operation, batch, frames, column, precision, mode, device)


# -------------------------------------------------------------------------------------------------------------- checks


def results(function: Callable, case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """What a path returns, and the gradients"""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, wanted, upstream(case, outputs), allow_unused=True))


def upstream(case: Case, outputs: list[Tensor]) -> list[Tensor]:
    if case.operation in LOSSES:
        return [torch.tensor(1 / case.frames, device=outputs[0].device).expand(outputs[0].shape)]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=o.dtype, device=o.device) for o in outputs]


def wrong(case: Case, path: str, exact: list[Tensor]) -> str:
    """What is wrong with the results of a path, or nothing."""
    found = results(case.paths[path], case, case.inputs)
    for one, other in zip(found, exact, strict=True):
        if (one is None) != (other is None):
            return "a gradient is missing"
        if other is not None:
            error = ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()
            if not error <= TOLERANCE[case.precision]:
                return f"off by {error:.1e} of the largest value"
    return ""


def exact_results(case: Case) -> list[Tensor]:
    """By the definition in float64, with the upstream gradients as the inputs' type has them."""
    double = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in case.inputs]
    outputs = case.paths["reference"](*double)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    dtype = torch.float32 if case.operation in LOSSES else case.inputs[0].dtype
    given = [gradient.double() for gradient in upstream(case, [output.to(dtype) for output in outputs])]
    wanted = [tensor for tensor in double if tensor.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, wanted, given, allow_unused=True))


def check(arguments: argparse.Namespace, device: torch.device) -> bool:
    """Whether every kernel agrees with the definition on small shapes."""
    right = True
    for case in cases(arguments, "check", device):
        problem = wrong(case, "kernel", exact_results(case))
        print(f"{case.operation:>20}  {case.shape:>26}  {problem or 'agrees with the definition'}", flush=True)
        right &= not problem
    return right


def check_interpreted(operations: list[str]) -> bool:
    print("kernels in Triton's interpreter, against the definition:", flush=True)
    command = [sys.executable, __file__, "--check", "--device", "cpu", "--operations", *operations]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode == 0


# -------------------------------------------------------------------------------------------------------------- timing


def captured(call: Callable, device: torch.device) -> tuple[Callable, str]:
    """The call as a replay of its CUDA graph, or itself and a remark."""
    if device.type != "cuda":
        return call, ""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return call, " eager"
    return graph.replay, ""


def device_copy(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = source.clone()
    call, _ = captured(lambda: target.copy_(source), device)
    return 2 * source.numel() / median_seconds({"copy": call}, device, repeats, 0.01)["copy"]


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure(case: Case, copy: float, repeats: int, device: torch.device) -> Iterator[dict]:
    """A row for each pass and path."""
    status = {path: "" if function else NOT_MEASURED for path, function in case.paths.items()}
    if device.type == "cuda":
        exact = exact_results(case)
        for path in [path for path, remark in status.items() if not remark]:
            try:
                problem = wrong(case, path, exact)
            except Exception as error:  # another package may fail in any way, and the rest is still of use
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if problem:
                print(f"{case.operation} {case.shape} {case.precision}, {path}: {problem}", file=sys.stderr)
                status[path] = "wrong"
        del exact
    with torch.no_grad():
        outputs = case.paths["reference"](*case.inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    given = upstream(case, outputs)

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(*case.inputs)

    def both(function: Callable) -> None:
        found = function(*case.inputs)
        torch.autograd.grad([found] if isinstance(found, Tensor) else found, case.wanted, given, allow_unused=True)

    moved = {"forward": size(case.inputs) + size(outputs)}
    moved["forward + backward"] = moved["forward"] + size(case.wanted) + size(given)
    products = {"forward": 2 * case.frames * case.weights, "forward + backward": 6 * case.frames * case.weights}
    for name, run in zip(PASSES, (forward, both), strict=True):
        calls, remarks = {}, {}
        for path in [path for path, remark in status.items() if not remark]:
            calls[path], remarks[path] = captured(lambda run=run, path=path: run(case.paths[path]), device)
        medians = median_seconds(calls, device, repeats, 0.005)
        for path in case.paths:
            row = {"operation": case.operation, "precision": case.precision, "shape": case.shape}
            row |= {"pass": name, "path": path, "ms": status[path]}
            if path in medians:
                rate = moved[name] / medians[path]
                row |= {"ms": f"{1e3 * medians[path]:.3f}{remarks[path]}", "GB/s": f"{rate / 1e9:.1f}"}
                row |= {"% of copy": f"{100 * rate / copy:.0f}"}
                if "reference" in medians:
                    row["speed-up"] = f"{medians['reference'] / medians[path]:.2f}"
                if case.weights:
                    row["TFLOP/s"] = f"{products[name] / medians[path] / 1e12:.3f}"
            yield row


def plot(rows: list[dict], path: Path) -> None:
    """Forward + backward: a panel for each operation and precision, milliseconds over shapes, a line for each path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["pass"] == PASSES[1] and row["ms"].split()[0].replace(".", "").isdigit()]
    panels = list(dict.fromkeys((row["operation"], row["precision"]) for row in rows))
    figure, axes = plt.subplots(len(panels), 1, squeeze=False, layout="constrained", figsize=(9, 3 * len(panels)))
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        mine = [row for row in rows if (row["operation"], row["precision"]) == panel]
        shapes = list(dict.fromkeys(row["shape"] for row in mine))
        for name in dict.fromkeys(row["path"] for row in mine):
            found = {row["shape"]: float(row["ms"].split()[0]) for row in mine if row["path"] == name}
            axis.plot([shapes.index(shape) for shape in found], list(found.values()), "o-", label=name, markersize=4)
        axis.set(title=", ".join(panel), ylabel="ms", yscale="log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=6)
        axis.legend(fontsize=7)
    with whole(path) as beside:
        figure.savefig(beside, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS, metavar="NAME")
    defaults = {name: (*SWEEP["cpu"][name], *SWEEP["cuda"][name]) for name in SWEEP["cpu"]}
    for name, (default, *on_gpu) in defaults.items():
        text = f"default: {default}; on a GPU {', '.join(map(str, on_gpu))}"
        parser.add_argument(f"--{name}", nargs="+", type=int, help=text)
    help_precision = "default: fp32; on a GPU all that an operation has"
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, help=help_precision)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="no times; kernels against the definition, small shapes")
    parser.add_argument("--csv", type=Path, help="write the table to this file as well")
    parser.add_argument("--plot", type=Path, help="draw forward + backward to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.check:
        sys.exit(not check(arguments, device))

    print(describe(device))
    right = True
    if device.type != "cuda":
        right = check_interpreted(arguments.operations)
    copy = device_copy(device, arguments.repeats)
    print(f"copy on the device: {copy / 1e9:.1f} GB/s")
    print_row(COLUMNS, dict(zip(COLUMNS, COLUMNS, strict=True)), WIDTHS)
    rows = []
    for case in cases(arguments, device.type, device):
        for row in measure(case, copy, arguments.repeats, device):
            rows.append(row)
            right &= row["ms"] != "wrong"
            print_row(COLUMNS, row, WIDTHS)
    if arguments.csv:
        write_csv(arguments.csv, COLUMNS, rows)
    if arguments.plot:
        plot(rows, arguments.plot)
    sys.exit(not right)


if __name__ == "__main__":
    main()
