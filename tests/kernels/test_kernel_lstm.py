"""lstm_scan: the kernels against the definition and `nn.LSTM`, their code for two chips, autograd and torch.compile.

Without a GPU the kernels run in Triton's interpreter on the CPU; with one, all of this runs there.
"""

import re

import pytest
import torch
import triton_checks
from torch import nn

from minidvae.kernels import lstm_scan as scan
from minidvae.kernels.lstm_scan import lstm_scan, lstm_scan_reference
from minidvae.models.recurrent import LSTM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
MODES = {
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
}
# of the largest value: rounding of sums; 11 and 8 significant bits, a few times
TOLERANCE = {"ieee": 1e-5, "tf32": 1.5e-3, "bf16": 3e-2}


@pytest.fixture(autouse=True)
def matmul_precision():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def case(batch: int, frames: int, hidden: int, dtype=torch.float32) -> list[torch.Tensor]:
    """gates_x, w_hh, h0, c0 as in a network"""
    gates_x, w_hh = torch.randn(batch, frames, 4 * hidden), torch.empty(4 * hidden, hidden)
    nn.init.uniform_(w_hh, -(hidden**-0.5), hidden**-0.5)
    h0, c0 = torch.rand(batch, hidden) * 2 - 1, torch.randn(batch, hidden)
    return [tensor.to(DEVICE, dtype) for tensor in (gates_x, w_hh, h0, c0)]


def upstream(inputs, scale=1.0) -> list[torch.Tensor]:
    batch, frames, hidden = *inputs[0].shape[:2], inputs[2].shape[1]
    shapes = (batch, frames, hidden), (batch, hidden), (batch, hidden)
    return [torch.randn(shape).to(inputs[0]) * scale for shape in shapes]


def outputs_and_gradients(function, inputs, d_outputs, reverse, dtype=None) -> list[torch.Tensor]:
    inputs = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in inputs]
    outputs = function(*inputs, reverse)
    pairs = [
        (output, d.to(output.dtype))
        for output, d in zip(outputs, d_outputs, strict=True)
        if d is not None
    ]
    used, d_used = zip(*pairs, strict=True)
    return [*outputs, *torch.autograd.grad(used, inputs, d_used)]


def assert_close(found, expected, tolerance):
    """Each tensor within a share of the largest value of the expected one."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        assert (one.double() - other.double()).abs().max() <= tolerance * other.abs().max()


def check(inputs, mode="ieee", reverse=False, d_outputs=None):
    d_outputs = upstream(inputs) if d_outputs is None else d_outputs
    expected = outputs_and_gradients(lstm_scan_reference, inputs, d_outputs, reverse, torch.float64)
    assert_close(
        outputs_and_gradients(scan.lstm_scan_fused, inputs, d_outputs, reverse),
        expected,
        TOLERANCE[mode],
    )


# ------------------------------------------------------------------------------------------------- against definitions

HELD = [(batch, frames, 32, "ieee") for batch in (1, 17, 33) for frames in (1, 2, 7)]
TILED = [(33, 1, 192, "ieee"), (2, 2, 100, "ieee"), (1, 2, 5, "ieee")]
BOTH = [
    (*shape, mode)
    for shape in ((17, 3, 32), (3, 2, 128), (18, 3, 33), (3, 2, 256))
    for mode in MODES
]


@pytest.mark.parametrize("batch, frames, hidden, mode", [*HELD, *TILED, *BOTH])
def test_fused_is_the_reference(batch, frames, hidden, mode):
    """Whole tiles and remainders of them, in both directions of time."""
    dtype, torch.backends.cuda.matmul.fp32_precision = MODES[mode]
    for reverse in (False, True) if hidden < 128 else (True,):
        check(case(batch, frames, hidden, dtype), mode, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("hidden", [32, 48])
def test_scans_are_an_lstm(hidden, reverse):
    rnn = nn.LSTM(7, hidden, batch_first=True).to(DEVICE)
    x, h0, c0 = torch.randn(3, 4, 7), torch.randn(1, 3, hidden), torch.randn(1, 3, hidden)
    x, h0, c0 = (tensor.to(DEVICE).requires_grad_() for tensor in (x, h0, c0))

    def library():
        outputs, (h, c) = rnn(x.flip(1) if reverse else x, (h0, c0))
        return outputs.flip(1) if reverse else outputs, h[0], c[0]

    def ours(function):
        gates_x = nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0)
        return function(gates_x, rnn.weight_hh_l0, h0[0], c0[0], reverse)

    inputs = [x, h0, c0, *rnn.parameters()]
    weights = [torch.randn_like(output) for output in library()]
    results = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for outputs in (library(), ours(lstm_scan), ours(scan.lstm_scan_fused)):
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, weights)])
    for result in results[1:]:
        assert_close(result, results[0], 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", [32, 40])
def test_gradients_of_any_size_and_of_some_outputs(hidden, mode):
    """An output that is not used has no gradient. Tiny gradients keep their digits, also where operands are float16."""
    dtype, torch.backends.cuda.matmul.fp32_precision = MODES[mode]
    inputs = case(3, 3, hidden, dtype)
    for used, scale in (((0,), 1e-12), ((1,), 1e12), ((2,), 1e-12), ((0, 2), 1.0)):
        d_outputs = [d if k in used else None for k, d in enumerate(upstream(inputs, scale))]
        check(inputs, mode, True, d_outputs)
    d_h = upstream(inputs)[0]
    d_h[:, :2] = 0  # frames that matter to nobody: no 0/0
    check(inputs, mode, True, [d_h, None, None])


@pytest.mark.parametrize("hidden", [32, 40])
def test_layouts(hidden):
    """Frames first in memory, every second value, one sequence or gradient for all."""
    gates_x, w_hh, h0, c0 = case(4, 3, hidden)
    check([gates_x.transpose(0, 1).contiguous().transpose(0, 1), w_hh.t().contiguous().t(), h0, c0])
    wide = torch.randn(4, 5, 8 * hidden).to(DEVICE)
    check([wide[:, 1:4, ::2], w_hh, h0.t().contiguous().t(), c0])
    check([wide[:, 1:4, 3 : 3 + 4 * hidden], w_hh, h0, c0], reverse=True)
    check([gates_x[:1].expand(4, -1, -1), w_hh, h0[:1].expand(4, -1), c0[:1].expand(4, -1)])
    inputs = [gates_x, w_hh, h0, c0]
    for d_h in (torch.ones(()).expand(4, 3, hidden), torch.randn(4, 1, hidden).expand(-1, 3, -1)):
        check(inputs, d_outputs=[d_h.to(DEVICE), *upstream(inputs)[1:]])
        check(
            inputs,
            d_outputs=[d_h.to(DEVICE), None, torch.ones(()).to(DEVICE).expand(4, hidden)],
            reverse=True,
        )


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_tiles(mode, monkeypatch):
    dtype, torch.backends.cuda.matmul.fp32_precision = MODES[mode]
    inputs = case(19, 2, 64, dtype)
    d_outputs, results = upstream(inputs), []
    for rows, stages, *columns_and_depth in ((16, 1), (32, 2), (16, 3, 64, 64), (32, 2, 32, 16)):
        tile = {"ROWS": rows, "STAGES": stages, "num_warps": 8}
        tile |= dict(zip(("COLUMNS", "DEPTH"), columns_and_depth, strict=False))
        monkeypatch.setattr(scan, "tiles", lambda *_, tile=tile: tile)
        results.append(outputs_and_gradients(scan.lstm_scan_fused, inputs, d_outputs, False))
    for result in results[1:]:  # in sums only, and where they are at the edge of two rounded values
        assert_close(result, results[0], TOLERANCE[mode])


@GPU
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", [64, 128, 256, 512])
def test_no_race(hidden, mode):
    """A barrier that is missing shows as results that differ from run to run."""
    dtype, torch.backends.cuda.matmul.fp32_precision = MODES[mode]
    inputs = case(200, 50, hidden, dtype)
    d_outputs = upstream(inputs)
    check(inputs, mode, False, d_outputs)
    results = [
        outputs_and_gradients(scan.lstm_scan_fused, inputs, d_outputs, False) for _ in range(20)
    ]
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


# ---------------------------------------------------------------------------------------------------------- dispatch


def test_float32_precision_is_that_of_matrix_products():
    torch.set_float32_matmul_precision("highest")
    try:
        assert scan.operand_dtype(torch.float32) == torch.float32
        torch.set_float32_matmul_precision("high")
        assert scan.operand_dtype(torch.float32) == torch.float16
        torch.backends.cuda.matmul.allow_tf32 = False
        assert scan.operand_dtype(torch.float32) == torch.float32
        assert scan.operand_dtype(torch.bfloat16) == torch.bfloat16
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_kernel_for_what_it_cannot_take(monkeypatch):
    """On the CPU, in other dtypes, too wide: the public function is right without a kernel."""
    assert not scan.fusible(*case(2, 2, 513)) and not scan.fusible(*case(2, 2, 8, torch.float64))
    assert not scan.fusible(*case(0, 2, 8))
    monkeypatch.setattr(scan, "launch", None)
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 2e-6),
        (torch.bfloat16, 3e-2),
        (torch.half, 5e-3),
    ):
        inputs = [tensor.cpu() for tensor in case(3, 4, 8, dtype)]
        d_outputs = upstream(inputs)
        expected = outputs_and_gradients(
            lstm_scan_reference, inputs, d_outputs, True, torch.float64
        )
        found = outputs_and_gradients(lstm_scan, inputs, d_outputs, True)
        assert all(tensor.dtype == dtype for tensor in found)
        assert_close(found, expected, tolerance)


def test_the_gradient_of_a_gradient_is_an_error():
    inputs = [tensor.requires_grad_() for tensor in case(2, 3, 16)]
    h = scan.lstm_scan_fused(*inputs)[0]
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(h.square().sum(), inputs, create_graph=True)


def test_without_a_kernel_the_gradients_are_right():
    inputs = [tensor.double().requires_grad_() for tensor in case(2, 3, 2)]
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *inputs, reverse=reverse: lstm_scan(*inputs, reverse), inputs
        )


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_scan(autocast):
    inputs = [tensor.requires_grad_() for tensor in case(3, 4, 16)]
    compiled = torch.compile(lstm_scan, backend="aot_eager", dynamic=False)
    d_outputs = upstream(inputs)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        results = [
            outputs_and_gradients(function, inputs, d_outputs, True)
            for function in (lstm_scan, compiled)
        ]
    assert_close(results[1], results[0], 1e-6)


KINDS = [
    {},
    {"reverse": True},
    {"layers": 2, "bidirectional": True},
    {"reverse": True, "bidirectional": True},
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_layers(kind, autocast):
    """The graph breaks at a layer, which gives what it gives without torch.compile, in the same dtype."""
    rnn, x = LSTM(5, 16, **kind).to(DEVICE), torch.randn(3, 4, 5).to(DEVICE).requires_grad_()
    results = []
    for layer in (rnn, torch.compile(rnn, backend="aot_eager", dynamic=False)):
        with (
            torch.autocast(DEVICE, torch.bfloat16, enabled=autocast),
            torch.backends.cudnn.flags(allow_tf32=False),
        ):
            h = layer(x)
        assert h.dtype == (torch.bfloat16 if autocast else torch.float32)
        results.append([h, *torch.autograd.grad(h.float().square().sum(), [x, *rnn.parameters()])])
    assert_close(results[1], results[0], 3e-2 if autocast else 1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layers_are_those_of_the_library(kind):
    """Parameters by name, and outputs, by all three ways to compute them."""
    rnn = LSTM(5, 8, **kind).double()
    library = nn.LSTM(
        5, 8, kind.get("layers", 1), batch_first=True, bidirectional="bidirectional" in kind
    ).double()
    library.load_state_dict(rnn.state_dict())
    x = torch.randn(3, 4, 5).double()
    outputs, _ = library(x.flip(1) if rnn.reverse else x)
    outputs = outputs.flip(1) if rnn.reverse else outputs
    assert outputs.shape[2] == rnn.outputs
    assert_close([rnn(x), rnn.scan(x), rnn.forward_reference(x)], [outputs] * 3, 1e-12)


# ----------------------------------------------------------------------------------------------------- compiled code

NAMED = [  # hidden, mode, chip: the widths of the recipes, and the widest
    *(
        (hidden, mode, chip)
        for hidden in (128, 256)
        for mode in ("tf32", "bf16")
        for chip in (80, 90)
    ),
    (256, "ieee", 90),
    (512, "tf32", 90),
]


@pytest.fixture(scope="module")
def compiled() -> dict:
    """(hidden, mode, chip, "forward" or "backward") → its kernel's name and code"""
    builds, before = {}, torch.backends.cuda.matmul.fp32_precision
    for hidden, mode, chip in NAMED:
        for direction in ("forward", "backward"):
            builds[hidden, mode, chip, direction] = build(hidden, mode, chip, direction)
    torch.backends.cuda.matmul.fp32_precision = before
    codes = triton_checks.cross_compile(list(builds.values()))
    return {
        key: (builds[key].kernel.split(":")[1], code)
        for key, code in zip(builds, codes, strict=True)
    }


def build(hidden: int, mode: str, chip: int, direction: str) -> triton_checks.Build:
    """The launch as it would be on that chip, of aligned tensors."""
    dtype, precision = MODES[mode]
    torch.backends.cuda.matmul.fp32_precision = precision
    operand = scan.operand_dtype(dtype)
    tile = scan.tiles(hidden, operand, triton_checks.SHARED_MEMORY[chip], direction == "backward")
    constants = {"REVERSE": int(direction == "backward"), "HIDDEN": hidden} | tile
    warps, variant = constants.pop("num_warps"), "tiled" if "DEPTH" in tile else "held"
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    values = "gates_x h0 h gates" if direction == "forward" else "d_h gates d_gates"
    pointers = dict.fromkeys(values.split(), pointer[dtype]) | {
        "w_hh": pointer[operand],
        "c": "*fp32",
    }
    if direction == "backward":
        pointers |= {"d_h0": "*fp32", "d_c0": "*fp32"}
    types = pointers | {"batch": "i32", "frames": "i32"}
    name = f"minidvae.kernels.lstm_scan:{variant}_{direction}"
    return triton_checks.Build(name, types, constants, chip, warps, divisible=list(pointers))


def test_kernels_fit_their_chips(compiled):
    """No spills, and the shared memory that a program may have; W_hh of width 128 in 16 bits is held."""
    for (hidden, mode, chip, direction), (name, code) in compiled.items():
        assert code.fits(chip), (name, hidden, mode, chip, code.registers, code.spills, code.shared)
        held = hidden == 128 and mode != "ieee"
        assert name == f"{'held' if held else 'tiled'}_{direction}"


def test_no_state_is_fetched_before_it_is_there(compiled):
    """What a step reads of what it or the step before has written is read inside of the time loop, after its barrier.

    The software pipeliner does not see that a load depends on a store, and could fetch a step ahead.
    """
    for name, code in compiled.values():
        if name.startswith("held"):  # all that a step leaves to the next is in registers
            assert not reads_of(
                code.ttgir, ("h",) if name == "held_forward" else ("d_gates", "d_h0")
            )[0]
            continue
        # h_0 takes the place of the h before the first step: the two are read by one instruction
        written = (
            [("h0", "h", "c")] if name == "tiled_forward" else [("d_h0", "d_c0"), ("d_gates",)]
        )
        copied = False
        for number, arguments in enumerate(written):
            reads, barriers, loops = reads_of(code.ttgir, arguments)
            start, end = max(loops, key=lambda loop: loop[1] - loop[0])  # the time loop
            inside = [line for line in barriers if start < line < end]
            assert len(inside) == len(written) and reads
            next_barrier = [*inside, end][number + 1]
            assert all(inside[number] < line < next_barrier for line in reads)
            copied |= any("async_copy" in code.ttgir.splitlines()[line] for line in reads)
        assert copied  # or this looks for the wrong thing


def reads_of(ttgir: str, arguments) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Lines that read memory through a pointer made from one of the arguments; of barriers; first and last of loops."""
    made = {f"%{argument}" for argument in arguments}
    reads, barriers, loops, opened, depth = [], [], [], [], 0
    for number, line in enumerate(ttgir.splitlines()):
        result, _, operation = line.strip().partition(" = ")
        names = set(re.findall(r"%[\w$.]+", operation or line))
        if re.search(r"tt\.load|async_copy_global_to_local", line):
            if made & names:
                reads.append(number)
        elif "scf.for" in line:
            opened.append((number, depth))
            carried = re.findall(r"(%[\w$.]+) = (%[\w$.]+)", line.partition("iter_args")[2])
            made_outside = {inner for inner, outer in carried if outer in made}
            made = made - {inner for inner, _ in carried} | made_outside
            if made_outside:
                made.add(result.partition(":")[0])
        elif result.startswith("%"):  # a name may come again in another loop
            made.discard(result)
            if "!tt.ptr" in line and made & names:
                made.add(result)
        if "ttg.barrier" in line or "gpu.barrier" in line:
            barriers.append(number)
        depth += line.count("{") - line.count("}")
        if opened and depth <= opened[-1][1]:
            loops.append((opened.pop()[0], number))
    return reads, barriers, loops


def test_shapes_that_broadcast_go_to_the_definition():
    """One row of h0 for all sequences: the loops write a row for each, into memory that is not theirs."""
    gates_x, w_hh, h0, c0 = case(3, 4, 8)
    found = lstm_scan(gates_x, w_hh, h0[:1], c0)
    expected = lstm_scan_reference(gates_x, w_hh, h0[:1], c0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_device_without_autocast():
    shapes = [
        tensor.shape for tensor in lstm_scan(*(tensor.to("meta") for tensor in case(3, 4, 8)))
    ]
    assert shapes == [(3, 4, 8), (3, 8), (3, 8)]
