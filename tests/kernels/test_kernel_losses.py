"""is_divergence and gaussian_kl: kernel, closed form and definition hold together.

Without a GPU the kernels run in Triton's interpreter (conftest.py), and are compiled for two GPUs.
"""

import math
import sys

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from triton_checks import Build, cross_compile

from minidvae.kernels.common import HAS_TRITON, launchable, row_tiles
from minidvae.kernels.gaussian_kl import gaussian_kl, gaussian_kl_fused, gaussian_kl_reference
from minidvae.kernels.is_divergence import (
    FLOOR,
    is_divergence,
    is_divergence_fused,
    is_divergence_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSSES = {  # public function, by the kernel, definition, how many inputs
    "is": (is_divergence, is_divergence_fused, is_divergence_reference, 2),
    "kl": (gaussian_kl, gaussian_kl_fused, gaussian_kl_reference, 4),
    "standard": (gaussian_kl, gaussian_kl_fused, gaussian_kl_reference, 2),
}
SHAPES = [
    *(((2, 3, 80), layout) for layout in ("contiguous", "transposed", "part", "strided")),
    *((shape, "contiguous") for shape in ((1, 1, 1), (17, 2, 257), (33, 7, 16), (1, 7, 513))),
]
MODULES = [sys.modules[f"minidvae.kernels.{name}"] for name in ("is_divergence", "gaussian_kl")]
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def draw(loss: str, shape, dtype=torch.float32, layout: str = "contiguous") -> list[torch.Tensor]:
    """Fresh inputs; those of `is` are a power spectrum with exact zeros, and a log-variance."""
    batch, frames, columns = shape
    inputs = []
    for k in range(LOSSES[loss][3]):
        values = torch.randn(batch, frames, columns, device=DEVICE)
        if loss == "is" and k == 0:
            values = torch.where(values > 1, 0, values.exp())
        if layout == "transposed":
            values = values.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "part":
            values = torch.cat([values, values + 1], dim=-1)[..., :columns]
        elif layout == "strided":
            values = torch.stack([values, values + 1], dim=-1)[..., 0]
        inputs.append(values.to(dtype).requires_grad_(not (loss == "is" and k == 0)))
    return inputs


def differentiate(function, inputs, upstream) -> list[torch.Tensor]:
    """The values and the gradients of the inputs that have one."""
    value = function(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [value, *torch.autograd.grad(value, wanted, upstream.to(value.dtype))]


def exact(function, inputs, upstream) -> list[torch.Tensor]:
    inputs = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    return differentiate(function, inputs, upstream)


def assert_near(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1e-3)


# --------------------------------------------------------------------------------------------------- the definitions


def test_itakura_saito_by_hand():
    x, log_variance = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(is_divergence(x, log_variance), torch.tensor([1 - math.log(2)]))


def test_gaussian_kl_is_that_of_torch_distributions():
    qm, ql, pm, pl = torch.randn(4, 5, 7, dtype=torch.float64)
    q, p = Normal(qm, (ql / 2).exp()), Normal(pm, (pl / 2).exp())
    torch.testing.assert_close(gaussian_kl(qm, ql, pm, pl), kl_divergence(q, p).sum(-1))
    torch.testing.assert_close(gaussian_kl(qm, ql), kl_divergence(q, Normal(0.0, 1.0)).sum(-1))


@pytest.mark.parametrize("function", LOSSES["is"][:3])
def test_silence_is_finite_with_a_minimum_at_the_floor(function):
    x = torch.zeros(1, 3, device=DEVICE)
    log_variance = torch.tensor([[-40.0, math.log(FLOOR), 0.0]], device=DEVICE, requires_grad=True)
    value, gradient = differentiate(function, [x, log_variance], torch.ones(1, device=DEVICE))
    assert value.isfinite().all()
    assert gradient[0, 0] < 0 and abs(gradient[0, 1]) < 1e-5 and gradient[0, 2] == 1


# -------------------------------------------------------------------------------------------------------- the paths


@pytest.mark.parametrize("path", ["public", "kernel"])
@pytest.mark.parametrize("shape, layout", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss, shape, layout, path):
    public, fused, reference, _ = LOSSES[loss]
    inputs = draw(loss, shape, layout=layout)
    frames = math.prod(shape[:2])
    for upstream in (torch.randn(shape[:2]), torch.tensor(1 / frames).expand(shape[:2])):
        upstream = upstream.to(DEVICE)
        found = differentiate(public if path == "public" else fused, inputs, upstream)
        assert_near(found, exact(reference, inputs, upstream))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_frame_without_a_batch(loss):
    inputs = [
        tensor[0, 0].detach().requires_grad_(tensor.requires_grad)
        for tensor in draw(loss, (1, 1, 5))
    ]
    upstream = torch.tensor(2.0, device=DEVICE)
    assert_near(
        differentiate(LOSSES[loss][1], inputs, upstream), exact(LOSSES[loss][2], inputs, upstream)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16(loss):
    """Values accumulate in float32; a gradient is rounded when it is made and again when it is scaled, by the
    interpreter always down: 2^−7 each."""
    inputs = draw(loss, (3, 5, 33), torch.bfloat16)
    upstream = torch.randn(3, 5, device=DEVICE)
    found = differentiate(LOSSES[loss][1], inputs, upstream)
    expected = exact(LOSSES[loss][2], inputs, upstream)
    assert found[0].dtype == torch.float32 and {gradient.dtype for gradient in found[1:]} == {
        torch.bfloat16
    }
    assert_near(found[:1], expected[:1])
    assert_near(found[1:], expected[1:], 2**-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_tile_sizes_do_not_matter(loss, monkeypatch):
    inputs, upstream = draw(loss, (2, 3, 65)), torch.randn(2, 3, device=DEVICE)
    found = []
    for height, width in ((1, 16), (4, 128), (32, 32)):
        tiles = (-(-6 // height),), {"ROWS": height, "COLUMNS": width, "num_warps": 4}
        for module in MODULES:
            monkeypatch.setattr(module, "row_tiles", lambda _, tiles=tiles: tiles)
        found.append(differentiate(LOSSES[loss][1], inputs, upstream))
    assert_near(found[0], found[1], 1e-6)
    assert_near(found[0], found[2], 1e-6)


@pytest.mark.parametrize("path", [0, 1], ids=["public", "kernel"])
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice_through_one_graph(loss, path):
    """The first backward pass gives its gradients away; a second, with another upstream gradient, makes its own."""
    inputs = draw(loss, (3, 2, 5))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    value = LOSSES[loss][path](*inputs)
    upstream = torch.randn(2, 3, 2, device=DEVICE)
    first = torch.autograd.grad(value, wanted, upstream[0], retain_graph=True)
    second = torch.autograd.grad(value, wanted, upstream[1])
    assert_near(first, exact(LOSSES[loss][2], inputs, upstream[0])[1:])
    assert_near(second, exact(LOSSES[loss][2], inputs, upstream[1])[1:])


@pytest.mark.parametrize("path", [0, 1], ids=["public", "kernel"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_gradients_are_refused(loss, path):
    """A penalty on gradients that came out as zero, in silence, would be worse than none; of a mean as of a square."""
    for reduce in (torch.mean, lambda values: values.square().sum()):
        inputs = draw(loss, (2, 3, 5))
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        with pytest.raises(RuntimeError, match="differentiates once"):
            torch.autograd.grad(reduce(LOSSES[loss][path](*inputs)), wanted, create_graph=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    public, _, _, count = LOSSES[loss]
    inputs = [torch.rand(2, 3, dtype=torch.float64).add(0.1) for _ in range(count)]
    for k, tensor in enumerate(inputs):
        tensor.requires_grad_(not (loss == "is" and k == 0))
    assert torch.autograd.gradcheck(public, inputs)


def test_gradients_that_nobody_wants_are_not_made():
    inputs = draw("kl", (2, 3, 5))
    expected = exact(gaussian_kl_reference, inputs, torch.ones(2, 3, device=DEVICE))
    inputs[2].requires_grad_(False)
    for function in (gaussian_kl, gaussian_kl_fused):
        found = differentiate(function, inputs, torch.ones(2, 3, device=DEVICE))
        assert_near(found, [expected[k] for k in (0, 1, 2, 4)])
        with torch.no_grad():
            assert function(*inputs).grad_fn is None


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("loss", LOSSES)
def test_no_race(loss):
    inputs, upstream = draw(loss, (128, 100, 257)), torch.randn(128, 100, device=DEVICE)
    first = differentiate(LOSSES[loss][1], inputs, upstream)
    for _ in range(20):
        assert all(map(torch.equal, differentiate(LOSSES[loss][1], inputs, upstream), first))


# ----------------------------------------------------------------------------------------- what a kernel cannot take


def test_launchable():
    def new(**options):
        return torch.zeros(2, 3, **({"device": DEVICE} | options))

    assert launchable(new(), None, new(dtype=torch.bfloat16), new().t())
    for dtype in (torch.float16, torch.float64, torch.int32, torch.complex64):
        assert not launchable(new(), new(dtype=dtype))
    assert not launchable(new(device="meta")) and not launchable(new(), new(device="meta"))
    assert not launchable(new().to_sparse()) and not launchable(new()[:0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_public_functions_take_every_floating_type(loss, dtype):
    inputs, upstream = draw(loss, (2, 3, 5), dtype), torch.ones(2, 3, device=DEVICE)
    public, _, reference, _ = LOSSES[loss]
    assert_near(
        differentiate(public, inputs, upstream),
        exact(reference, inputs, upstream),
        torch.finfo(dtype).eps * 4,
    )


def test_other_requests_go_to_the_definition():
    x, log_variance = draw("is", (2, 3, 5))
    x.requires_grad_()  # a gradient of the power
    upstream = torch.ones(2, 3, device=DEVICE)
    positive = x.detach().clamp_min(0.1).requires_grad_()
    found = differentiate(is_divergence, [positive, log_variance], upstream)
    assert_near(found, exact(is_divergence_reference, [positive, log_variance], upstream))
    row = torch.randn(5, device=DEVICE, requires_grad=True)  # one row for all frames
    found = differentiate(is_divergence, [x.detach(), row], upstream)
    assert_near(found, exact(is_divergence_reference, [x.detach(), row], upstream))
    assert is_divergence(x[:0], log_variance[:0]).shape == (0, 3)
    mixed = [x.detach().double(), log_variance]
    assert_near(
        differentiate(is_divergence, mixed, upstream),
        exact(is_divergence_reference, mixed, upstream),
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a question of tensors on the CPU")
def test_interpreter_is_never_the_public_path(monkeypatch):
    for module, kernel in zip(MODULES, ("is_divergence", "gaussian_kl"), strict=True):
        monkeypatch.delattr(module, f"{kernel}_kernel")
    for public, fused, _, count in LOSSES.values():
        inputs = [torch.ones(2, 3, requires_grad=k > 0) for k in range(count)]
        public(*inputs).sum().backward()
        with pytest.raises(NameError):
            fused(*inputs)


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_graph_break(loss, autocast):
    """The public function traces its definition."""
    function, reference = LOSSES[loss][0], LOSSES[loss][2]
    inputs = draw(loss, (1, 3, 5))
    weight = torch.randn(5, 5, device=DEVICE, requires_grad=True)

    def mean_of(loss_function):
        return lambda weight, *inputs: loss_function(*inputs[:-1], inputs[-1] @ weight).mean()

    torch._dynamo.reset()
    found = []
    for one in (
        torch.compile(mean_of(function), fullgraph=True, backend="aot_eager"),
        mean_of(reference),
    ):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            value = one(weight, *inputs)
        found.append([value, *torch.autograd.grad(value, [weight, *inputs[1:]])])
    assert_near(*found, 2**-5 if autocast else 1e-5)


# --------------------------------------------------------------------------------------------- compiled without a GPU


def build(
    kernel: str,
    pointers: dict[str, str],
    numbers,
    columns: int,
    backward: bool,
    capability: int,
    **constants,
):
    _, tile = row_tiles(torch.empty(1, columns))
    types = pointers | dict.fromkeys((*numbers, "rows", "columns"), "i32")
    divisible = (*pointers, *([*numbers, "columns"] if columns % 16 == 0 else []))
    if backward:
        types |= {"upstream_ptr": "*fp32", "upstream_stride": "i32"}
        constants["value_ptr"] = None
    else:
        types |= {"value_ptr": "*fp32", "upstream_stride": "i32"}
        constants["upstream_ptr"] = None
    constants |= {key: tile[key] for key in ("ROWS", "COLUMNS")}
    return Build(
        f"minidvae.kernels.{kernel}",
        types,
        constants,
        capability,
        tile["num_warps"],
        divisible=divisible,
    )


def is_divergence_build(bins: int, type: str, backward: bool, capability: int) -> Build:
    pointers = dict.fromkeys(
        ("x_ptr", "l_ptr", *(["gradient_ptr"] if backward else [])), f"*{type}"
    )
    constants = {"FLOOR": FLOOR} | ({} if backward else {"gradient_ptr": None})
    kernel, strides = "is_divergence:is_divergence_kernel", ("x_stride", "l_stride")
    return build(kernel, pointers, strides, bins, backward, capability, **constants)


def gaussian_kl_build(latent: int, type: str, backward: bool, capability: int) -> Build:
    inputs = ("qm", "ql", "pm", "pl")
    pointers = {f"{name}_ptr": f"*{type}" for name in inputs}
    gradients = {f"d_{name}_ptr": f"*{type}" for name in inputs}
    constants = {} if backward else dict.fromkeys(gradients)
    strides = [f"{name}_stride" for name in inputs]
    pointers |= gradients if backward else {}
    return build(
        "gaussian_kl:gaussian_kl_kernel",
        pointers,
        strides,
        latent,
        backward,
        capability,
        **constants,
    )


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_code(capability):
    """No spills, shared memory within the chip; a tensor is read or written at one place."""
    cases = [
        (is_divergence_build(257, "fp32", False, capability), 2, 1),
        (is_divergence_build(513, "bf16", True, capability), 3, 1),
        (gaussian_kl_build(16, "fp32", False, capability), 4, 1),
        (gaussian_kl_build(16, "fp32", True, capability), 5, 4),
    ]
    for (case, *accesses), found in zip(
        cases, cross_compile([case[0] for case in cases]), strict=True
    ):
        assert found.fits(capability) and found.registers <= 64, (
            case,
            found.registers,
            found.spills,
            found.shared,
        )
        assert accesses == [found.ttgir.count("tt.load "), found.ttgir.count("tt.store ")], case
