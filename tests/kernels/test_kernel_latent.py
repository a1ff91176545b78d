"""latent_scan: the kernels against the definition, their code for two chips, autograd and torch.compile.

Without a GPU the kernels run in Triton's interpreter on the CPU; with one, all of this runs there.
"""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves
from triton_checks import Build, cross_compile

from minidvae.kernels import latent_scan as scan
from minidvae.kernels import latent_scan_triton
from minidvae.kernels.common import HAS_TRITON
from minidvae.kernels.latent_scan import ScanArguments, latent_scan, latent_scan_reference
from minidvae.kernels.lstm_scan import LSTMWeights
from minidvae.models import build_model
from minidvae.models.base import Noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# widths of the posterior and of the transition, latent, state, whether there is an LSTM, whether its gates are given
PAPERS = {
    "srnn": ((64, 32), (), 16, 16, False, False),
    "dkf": ((64, 32), (32, 64, 128), 16, 128, False, False),
    "dkf, 513 bins": ((32,), (32, 128), 16, 128, False, False),
    "rvae": ((64, 32), (32, 64), 16, 128, True, False),
    "rvae, no MLP": ((), (), 16, 128, True, False),
    "vrnn": ((64, 32), (32, 64), 16, 128, True, True),
}
ODD = {  # widths that need padding, more than one tile
    "srnn": ((20, 7), (), 3, 3, False, False),
    "srnn, no MLP": ((), (), 3, 3, False, False),
    "dkf": ((20,), (5, 9, 17), 3, 17, False, False),
    "rvae": ((9, 6), (5, 18), 3, 20, True, False),
    "rvae, no MLP": ((), (), 18, 17, True, False),
    "vrnn": ((9,), (7,), 1, 20, True, True),
}


@pytest.fixture
def precision(monkeypatch):
    """The tiles of tf32, larger and thus quicker in the interpreter, which computes in float32 all the same. A GPU
    computes exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if DEVICE == "cuda" else "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def case(sizes, batch: int, frames: int, activation: str = "tanh", dtype=torch.float32) -> dict:
    """Fresh arguments of `latent_scan`, as the models make them; weights about as at the start of a training."""
    posterior_widths, transition_widths, latent, state, has_lstm, has_gates = sizes

    def new(*shape: int, scale: float = 0.5) -> torch.Tensor:
        return (torch.randn(shape, device=DEVICE, dtype=dtype) * scale).requires_grad_()

    def layers(inputs: int, *widths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for width in widths:
            found.append((new(width, inputs, scale=0.5 * inputs**-0.5), new(width)))
            inputs = width
        return found

    (first, _), *posterior = layers(state, *posterior_widths, 2 * latent)
    transition, lstm = layers(latent, *transition_widths), []
    if has_lstm:
        ((w_ih, _),) = layers((latent, *transition_widths)[-1], 4 * state)
        lstm = [LSTMWeights(w_ih, *layers(state, 4 * state)[0])]
    arguments = {
        "inputs": new(frames, batch, len(first)).transpose(0, 1),
        "noise": torch.randn(batch, latent, frames, device=DEVICE, dtype=dtype).transpose(1, 2),
        "state": [(new(batch, state), new(batch, state))] if has_lstm else [new(batch, state)],
        "first": torch.cat([first, first], dim=1)[:, :state],  # a part of a wider matrix
        "posterior": posterior,
        "transition": transition,
        "lstm": lstm,
        "activation": activation,
    }
    if has_gates:
        arguments["gates"] = new(batch, 4 * state, frames).transpose(1, 2)
        arguments["lstm"] = [lstm[0]._replace(bias=None)]
    return arguments


def differentiable(arguments: dict) -> list[torch.Tensor]:
    return [
        x
        for x in tree_leaves(arguments)
        if isinstance(x, torch.Tensor) and x is not arguments["noise"]
    ]


def weighted(outputs, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sum((torch.randn(o.shape, generator=generator).to(o) * o).sum() for o in outputs)


def outputs_and_gradients(function, arguments: dict) -> list[torch.Tensor]:
    outputs = function(**arguments)
    inputs = differentiable(arguments)
    found = torch.autograd.grad(weighted(outputs), inputs, allow_unused=True)
    zeros = (
        torch.zeros_like(tensor) if d is None else d
        for d, tensor in zip(found, inputs, strict=True)
    )
    return [*outputs, *zeros]


def fused(activation: str = "tanh", **arguments) -> tuple:
    """`latent_scan` by the Triton kernel, whatever the device."""
    return scan.apply(latent_scan_triton, scan.ScanArguments(**arguments), activation)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """To a share of each tensor's largest value."""
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("batch, frames", [(33, 1), (17, 2), (1, 7)])
@pytest.mark.parametrize("name", ODD)
def test_kernels_equal_the_definition(name, batch, frames, precision):
    arguments = case(ODD[name], batch, frames, "relu" if frames == 2 else "tanh")
    expected = outputs_and_gradients(latent_scan_reference, arguments)
    assert_close(outputs_and_gradients(fused, arguments), expected)


@pytest.mark.parametrize("name", PAPERS)
def test_kernels_equal_the_definition_at_the_papers_sizes(name, precision):
    arguments = case(PAPERS[name], 2, 2)
    expected = outputs_and_gradients(latent_scan_reference, arguments)
    assert_close(outputs_and_gradients(fused, arguments), expected)


@pytest.mark.parametrize("name", ["dkf", "vrnn"])
def test_results_do_not_depend_on_the_tiles(name, precision, monkeypatch):
    arguments = case(ODD[name], 9, 2)
    expected = outputs_and_gradients(fused, arguments)
    geometry = latent_scan_triton.geometry
    for rows, tiles in ((4, (32, 16)), (32, (64, 64))):
        monkeypatch.setattr(latent_scan_triton, "TILES", tiles)
        monkeypatch.setattr(
            latent_scan_triton, "geometry", lambda *a, rows=rows: geometry(*a) | {"ROWS": rows}
        )
        assert_close(outputs_and_gradients(fused, arguments), expected)


def test_a_nan_is_not_swallowed(precision):
    """A diverged loop must show: relu of NaN is NaN."""
    arguments = case(ODD["srnn"], 2, 3, "relu")
    with torch.no_grad():
        arguments["inputs"][1, 1] = torch.nan
        mean = fused(**arguments)[0]
    assert mean[0].isfinite().all() and mean[1, 0].isfinite().all() and mean[1, 1:].isnan().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("mode", ["ieee", "tf32"])
@pytest.mark.parametrize("name", PAPERS)
def test_no_race(name, mode):
    """The same input gives the same bits, and those of the definition to the precision of the products."""
    torch.backends.cuda.matmul.fp32_precision = mode
    try:
        arguments = case(PAPERS[name], 33, 50)
        first = outputs_and_gradients(fused, arguments)
        for _ in range(20):
            again = outputs_and_gradients(fused, arguments)
            assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    expected = outputs_and_gradients(latent_scan_reference, arguments)
    assert_close(first, expected, 1e-5 if mode == "ieee" else 5e-3)


# --------------------------------------------------------------------------------------------------- what is refused


def given(arguments: dict) -> ScanArguments:
    return ScanArguments(
        **{name: value for name, value in arguments.items() if name != "activation"}
    )


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_models_are_taken(name):
    assert latent_scan_triton.fusible(given(case(PAPERS[name], 2, 2)))


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        (ODD["srnn"], torch.float64),
        (ODD["srnn"], torch.bfloat16),
        (((64, 32), (), 16, 256, True, False), torch.float32),  # wider than the registers hold
        (((200,), (), 16, 16, False, False), torch.float32),
        (((16,) * 5, (), 16, 16, False, False), torch.float32),  # deeper
        (
            ((128, 128, 128), (), 16, 16, False, False),
            torch.float32,
        ),  # more weights than shared memory holds
    ],
)
def test_others_are_refused(sizes, dtype):
    assert not latent_scan_triton.fusible(given(case(sizes, 2, 2, dtype=dtype)))


def test_two_lstm_layers_and_empty_batches_are_refused():
    arguments = case(PAPERS["rvae, no MLP"], 2, 2)
    one = given(arguments)
    assert not latent_scan_triton.fusible(one._replace(state=one.state * 2, lstm=one.lstm * 2))
    assert not latent_scan_triton.fusible(one._replace(inputs=one.inputs[:0], noise=one.noise[:0]))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU")
def test_the_cpu_never_interprets_a_kernel(monkeypatch):
    monkeypatch.setattr(latent_scan_triton, "launch", None)
    arguments = case(ODD["vrnn"], 2, 3)
    assert_close(
        outputs_and_gradients(latent_scan, arguments),
        outputs_and_gradients(latent_scan_reference, arguments),
    )


@pytest.mark.parametrize("name", ["dkf", "vrnn"])
def test_the_gradient_of_a_gradient_is_an_error(name, precision):
    arguments = case(ODD[name], 2, 3)
    outputs = fused(**arguments)
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(weighted(outputs), differentiable(arguments)[:4], create_graph=True)


# ------------------------------------------------------------------------------------------------------- the code


def builds(name: str, precision: str, capability: int) -> list[Build]:
    """Forward and backward at the papers' sizes."""
    sizes = latent_scan_triton.plan(given(case(PAPERS[name], 1, 1)))
    tile = latent_scan_triton.geometry(sizes, precision)
    absent = [] if sizes.lstm else ["cell", "known", "gates", "cells", "d_gates", "d_cell"]
    absent += [] if PAPERS[name][5] else ["known"]
    found = []
    functions = ("forward_kernel", "backward_kernel")[
        : 1 if name == "vrnn" else 2
    ]  # backward: that of rvae
    for function, depth in zip(functions, latent_scan_triton.TILES, strict=False):
        kernel = getattr(latent_scan_triton, function)
        constants = {"PLAN": sizes, "RELU": False, "PRECISION": precision, "ROWS": tile["ROWS"]}
        constants |= {"TILE": depth, "STAGES": latent_scan_triton.STAGES} | dict.fromkeys(absent)
        constants = {
            argument: value for argument, value in constants.items() if argument in kernel.arg_names
        }
        types = {"batch": "i32", "frames": "i32"}
        pointers = [a for a in kernel.arg_names if a not in constants and a not in types]
        types |= dict.fromkeys(pointers, "*fp32")
        kernel = f"minidvae.kernels.latent_scan_triton:{function}"
        found.append(
            Build(
                kernel,
                types,
                constants,
                capability,
                tile["num_warps"],
                tile["num_stages"],
                pointers,
            )
        )
    return found


def test_no_spills_and_shared_memory_within_the_chip():
    """At the papers' sizes, on an A100 and an H100; and what `fusible` counts on is not exceeded."""
    named = [(name, "tf32", 90) for name in PAPERS] + [
        ("vrnn", "ieee", 90),
        ("dkf", "ieee", 80),
        ("rvae", "ieee", 80),
    ]
    named += [("dkf", "tf32", 80), ("vrnn", "tf32", 80)]
    jobs = [(*key, build) for key in named for build in builds(*key)]
    wrong = []
    compiled = cross_compile([build for *_, build in jobs])
    for (name, precision, chip, build), result in zip(jobs, compiled, strict=True):
        sizes = latent_scan_triton.plan(given(case(PAPERS[name], 1, 1)))
        if not result.fits(chip) or result.shared > latent_scan_triton.shared_memory(
            sizes, precision
        ):
            wrong.append(
                (
                    name,
                    build.kernel,
                    precision,
                    chip,
                    result.registers,
                    result.spills,
                    result.shared,
                )
            )
        if sizes.lstm is not None:
            assert not hoisted(result.ttgir), (name, build.kernel)
    assert not wrong


def hoisted(ttgir: str) -> list[str]:
    """Asynchronous copies of a step that start before its barrier: they may read what is not yet written."""
    lines = ttgir.splitlines()
    loop = next(
        k for k, line in enumerate(lines) if "scf.for" in line
    )  # over time, the first and outermost
    barriers = [
        k for k, line in enumerate(lines) if re.search(r"\b(ttg|gpu)\.(\w+_)?barrier", line)
    ]
    assert len(barriers) == 1 and barriers[0] > loop
    copies = [k for k, line in enumerate(lines) if "async_copy_global_to_local" in line]
    assert copies  # or this looks for the wrong thing
    return [lines[k] for k in copies if k < barriers[0]]


# ------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    "name, autocast",
    [("srnn", True), ("rvae", True), ("vrnn", False)],
)
def test_compiled_training_step(name, autocast):
    """The graph breaks at each scan and LSTM layer; loss and gradients are those without torch.compile."""
    torch.manual_seed(0)
    model = build_model(name, bins=6, latent=3).to(DEVICE)
    x = torch.rand(2, 3, 6, device=DEVICE)
    noise = Noise(torch.randn(2, 3, 3, device=DEVICE))

    def loss(x, noise):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return model.loss(x, noise)[0]

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        value = function(x, noise)
        found.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    torch._dynamo.reset()
    assert_close(*found, tolerance=0.05 if autocast else 1e-4)
