"""The recurrent models and their scans: sizes, fused and reference path, dependencies between
frames, decoding from the model's own past, sampling, published format."""

import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from minidvae.files import CheckpointError
from minidvae.kernels.latent_scan import latent_scan, latent_scan_reference
from minidvae.kernels.lstm_scan import LSTMWeights, lstm_scan, lstm_scan_reference
from minidvae.models import build_model
from minidvae.models.base import Noise, past
from minidvae.models.dkf import log_softplus
from minidvae.models.published import FORMATS, import_dvae_speech, load_dvae_speech, their_key

RECURRENT = ("dkf", "storn", "vrnn", "srnn", "rvae", "dsae")
AUTOREGRESSIVE = ("storn", "vrnn", "srnn")
# Settings of the original RVAE, which has no dense layers around its LSTMs.
RVAE_ORIGINAL = {"x_hidden": (), "z_hidden": (), "posterior_hidden": ()}
RVAE_ORIGINAL |= {"decoder_z_hidden": (), "decoder_hidden": ()}
BATCH, FRAMES, BINS, LATENT = 2, 5, 6, 3


def small(name: str, **config) -> nn.Module:
    """Return a model in float64 whose outputs depend visibly on all their inputs."""
    torch.manual_seed(1)
    model = build_model(name, bins=BINS, latent=LATENT, **config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def spectrum(seed: int = 0, frames: int = FRAMES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(BATCH, frames, BINS, generator=generator, dtype=torch.float64)


def draw(model: nn.Module, frames: int = FRAMES):
    return model.draw_noise(BATCH, frames, torch.Generator().manual_seed(2))


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same(actual, expected, tolerance=1e-10):
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "name, config, count",
    [
        ("vae", {}, 220_385),
        ("dkf", {}, 397_729),
        ("storn", {}, 673_249),
        ("vrnn", {}, 453_729),
        ("srnn", {}, 688_129),
        ("rvae", {}, 586_305),
        ("rvae", {"bidirectional": True}, 924_225),
        ("rvae", RVAE_ORIGINAL, 389_025),
        ("dsae", {}, 1_084_705),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(name, config, count):
    model = build_model(name, bins=257, **config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="tanh, relu"):
        build_model("srnn", activation="gelu")


# ------------------------------------------------------------------------------------------- scans


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch, frames, hidden", [(1, 1, 3), (17, 2, 5), (3, 7, 32)])
def test_lstm_scan_is_an_lstm(batch, frames, hidden, reverse):
    """Outputs, last state and gradients must be those of nn.LSTM on both paths."""
    torch.manual_seed(0)
    rnn = nn.LSTM(4, hidden, batch_first=True).double()
    x = torch.randn(batch, frames, 4).double()
    upstream = torch.randn(batch, frames, hidden).double()
    h0, c0 = torch.randn(2, 1, batch, hidden).double().requires_grad_().unbind(0)
    inputs = [*rnn.parameters(), h0, c0]

    def input_gradients(outputs, h, c):
        total = (outputs * upstream).sum() + h.sum() + (2 * c).sum()
        return torch.autograd.grad(total, inputs)

    if reverse:
        outputs, (h, c) = rnn(x.flip(1), (h0, c0))
        outputs = outputs.flip(1)
    else:
        outputs, (h, c) = rnn(x, (h0, c0))
    expected = (outputs, h[0], c[0])
    expected_gradients = input_gradients(*expected)
    for scan in (lstm_scan, lstm_scan_reference):
        gates = x @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0 + rnn.bias_hh_l0
        actual = scan(gates, rnn.weight_hh_l0, h0[0], c0[0], reverse)
        assert_same(actual, expected)
        assert_same(input_gradients(*actual), expected_gradients)


def test_lstm_scan_differentiates_twice():
    torch.manual_seed(0)
    shapes = [(2, 3, 8), (8, 2), (2, 2), (2, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lstm_scan, inputs)
    assert torch.autograd.gradgradcheck(lstm_scan, inputs)


def scan_case(case: str, batch: int, frames: int, dtype=torch.float64) -> dict:
    """Return arguments of `latent_scan` as the models make them."""
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(shape, dtype=dtype).mul(0.5).requires_grad_()

    lstm_layers = {"rvae": 1, "vrnn": 1, "rvae, no MLP": 1, "two layers": 2}.get(case, 0)
    has_mlp = "no MLP" not in case
    has_transition = has_mlp and case != "srnn"
    transition_width = 4 if has_transition else LATENT
    state_width = 5 if lstm_layers else transition_width
    input_width = 6 if has_mlp else 2 * LATENT
    arguments = {
        "first": new(6, state_width),
        "posterior": [(new(4, 6), new(4)), (new(2 * LATENT, 4), new(2 * LATENT))],
        "inputs": new(frames, batch, input_width).transpose(0, 1),
        "noise": torch.randn(batch, frames, LATENT, dtype=dtype),
        "transition": [],
        "lstm": [],
        "activation": "relu" if case == "dkf" else "tanh",
    }
    if lstm_layers:
        arguments["state"] = [(new(batch, 5), new(batch, 5)) for _ in range(lstm_layers)]
    else:
        arguments["state"] = [new(batch, state_width)]
    if not has_mlp:
        arguments["first"] = new(input_width, state_width)
        arguments["posterior"] = []
    if has_transition:
        hidden_layer = (new(5, LATENT), new(5))
        arguments["transition"] = [hidden_layer, (new(transition_width, 5), new(transition_width))]
    if lstm_layers:
        widths = [transition_width, 5][:lstm_layers]
        arguments["lstm"] = [LSTMWeights(new(20, n), new(20, 5), new(20)) for n in widths]
    if case == "vrnn":
        arguments["gates"] = new(batch, frames, 20)
        arguments["lstm"][0] = arguments["lstm"][0]._replace(bias=None)
    return arguments


SCANS = ("srnn", "srnn, no MLP", "dkf", "rvae", "rvae, no MLP", "vrnn", "two layers")


def scan_inputs(arguments: dict) -> list[torch.Tensor]:
    """Return the arguments that have a gradient."""
    leaves = tree_leaves(arguments)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize("batch, frames", [(1, 1), (3, 2), (17, 7)])
@pytest.mark.parametrize("case", SCANS)
def test_latent_scan_equals_its_reference(case, batch, frames):
    """Outputs and gradients of the fused path must be those of the frame-by-frame reference."""
    arguments = scan_case(case, batch, frames)
    inputs = scan_inputs(arguments)
    outputs = latent_scan(**arguments)
    expected = latent_scan_reference(**arguments)
    assert_same(outputs, expected)
    assert_same(weighted_gradients(outputs, inputs), weighted_gradients(expected, inputs))


def weighted_gradients(outputs, inputs) -> list[torch.Tensor]:
    """Return the gradients of a weighted sum of all outputs. Inputs that a single frame does not
    reach have the gradient zero or none at all, which is returned as zeros."""
    total = 0
    for output in outputs:
        weights = torch.linspace(0.5, 2, output.numel()).view_as(output)
        total = total + (weights * output).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    results = []
    for x, gradient in zip(inputs, gradients, strict=True):
        results.append(torch.zeros_like(x) if gradient is None else gradient)
    return results


@pytest.mark.parametrize("case", ("srnn", "dkf", "rvae", "vrnn"))
def test_latent_scan_differentiates_once(case):
    """Gradients must be those of finite differences. The gradient of a gradient must be an error
    that says so, not silently zero."""
    arguments = scan_case(case, 1, 2)
    arguments["activation"] = "tanh"

    def outputs(inputs, first):
        return latent_scan(**arguments | {"inputs": inputs, "first": first})

    inputs = arguments["inputs"], arguments["first"]
    assert torch.autograd.gradcheck(outputs, inputs)
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(outputs(*inputs)[2].sum(), inputs, create_graph=True)


def test_latent_scan_in_half_precision_follows_the_reference():
    arguments = scan_case("vrnn", 3, 4, torch.bfloat16)
    assert_same(latent_scan(**arguments), latent_scan_reference(**arguments), 0.0)


@pytest.mark.parametrize("name", RECURRENT)
def test_mixed_precision_step(name):
    """Under autocast the scans must stay in float32, so that the loss is within 2 % of that in full
    precision and every parameter has a finite gradient."""
    model = build_model(name, bins=BINS, latent=LATENT)
    x = spectrum().float()
    noise = draw(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(x, noise)
    loss.backward()
    torch.testing.assert_close(loss.float(), model.loss(x, noise)[0], rtol=0.02, atol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(x, scheduled_sampling_prob=0.5)
    loss.backward()
    # Every parameter has a gradient, although the model's own past is decoded without.
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------ models

MLPS = {
    "dkf": ("x_hidden", "z_hidden", "posterior_hidden", "decoder_hidden"),
    "storn": ("x_hidden", "posterior_hidden", "z_hidden", "past_hidden", "decoder_hidden"),
    "vrnn": ("x_hidden", "z_hidden", "posterior_hidden", "prior_hidden", "decoder_hidden"),
    "srnn": ("x_hidden", "hx_hidden", "posterior_hidden", "prior_hidden", "decoder_hidden"),
    "dsae": ("x_hidden", "v_hidden", "xv_hidden", "z_hidden", "decoder_hidden"),
}
VARIANTS = [(name, {}) for name in RECURRENT]
VARIANTS += [(name, {"layers": 2, "activation": "relu"}) for name in RECURRENT]
VARIANTS += [(name, dict.fromkeys(mlps, ())) for name, mlps in MLPS.items()]
VARIANTS += [
    ("rvae", {"bidirectional": True, "layers": 2}),
    ("rvae", RVAE_ORIGINAL | {"bidirectional": True}),
    ("dkf", {"bidirectional": True}),
]


@pytest.mark.parametrize("name, config", VARIANTS, ids=str)
def test_forward_is_the_reference(name, config):
    """All frames at once must give the loss and the gradients of one frame at a time, whatever the
    settings."""
    model = small(name, **config)
    x = spectrum()
    noise = draw(model)
    loss, terms = model.loss(x, noise)
    loss_gradients = gradients(model, loss)
    model.forward = lambda x, noise, probability=0.0: model.forward_reference(x, noise)
    reference_loss, reference_terms = model.loss(x, noise)
    assert_same(terms.values(), reference_terms.values())
    assert_same(loss_gradients, gradients(model, reference_loss), 1e-8)


@pytest.mark.parametrize("name", RECURRENT)
def test_silence_is_finite(name):
    model = build_model(name, bins=BINS)
    loss, _ = model.loss(torch.zeros(2, 4, BINS))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss))


def test_log_softplus_where_the_softplus_underflows():
    a = torch.tensor([-200.0, -30.0, -1.0, 0.0, 40.0], requires_grad=True)
    at_minus_1 = math.log(math.log1p(math.exp(-1)))
    at_0 = math.log(math.log(2))
    expected = torch.tensor([-200.0, -30.0, at_minus_1, at_0, math.log(40)])
    torch.testing.assert_close(log_softplus(a), expected)
    assert torch.autograd.grad(log_softplus(a).sum(), a)[0].isfinite().all()


def test_dsae_counts_the_divergence_of_v_once_per_sequence():
    model = small("dsae")
    loss, terms = model.loss(spectrum(), draw(model))
    expected = terms["reconstruction"] + terms["kl_z"] + terms["kl_w"]
    torch.testing.assert_close(loss.detach(), expected)


# ------------------------------------------------------------------------------------ dependencies

K = 2  # the frame that is changed
NONE = set()
AT = {K}
NEXT = {K + 1}
UNTIL = set(range(K + 1))
FROM = set(range(K, FRAMES))
AFTER = set(range(K + 1, FRAMES))
ALL = set(range(FRAMES))

# The equations say which frames of the posterior, the prior and the output change with x_k (first
# triple) and with z_k (second triple), while all other x and z stay.
DEPENDENCIES = [
    ("vae", {}, (AT, NONE, NONE), (NONE, NONE, AT)),
    ("dkf", {}, (UNTIL, NONE, NONE), (NEXT, NEXT, AT)),
    ("dkf", {"bidirectional": True}, (ALL, NONE, NONE), (NEXT, NEXT, AT)),
    ("storn", {}, (FROM, NONE, AFTER), (NONE, NONE, FROM)),
    ("vrnn", {}, (FROM, AFTER, AFTER), (AFTER, AFTER, FROM)),
    ("srnn", {}, (ALL, AFTER, AFTER), (NEXT, NEXT, AT)),
    ("rvae", {}, (UNTIL, NONE, NONE), (AFTER, NONE, FROM)),
    ("rvae", {"bidirectional": True}, (ALL, NONE, NONE), (AFTER, NONE, ALL)),
    ("dsae", {}, (ALL, NONE, NONE), (NONE, AFTER, AT)),
]


def pass_through(model: nn.Module, x: torch.Tensor, z: torch.Tensor, v: torch.Tensor | None):
    """Return the means of posterior and prior and the output of a forward pass that samples just z
    (and v). The noise that leads to them is computed frame after frame."""
    noise = torch.zeros_like(z)
    noise_v = None if v is None else torch.zeros_like(v)
    for t in range(FRAMES + 1):
        output = model(x, Noise(noise, noise_v))
        if v is not None and t == 0:
            noise_v = (v - output.q_w.mean) / torch.exp(0.5 * output.q_w.log_variance)
            output = model(x, Noise(noise, noise_v))
        if t < FRAMES:
            noise[:, t] = ((z - output.q_z.mean) / torch.exp(0.5 * output.q_z.log_variance))[:, t]
    torch.testing.assert_close(output.z, z)
    prior_mean = output.p_z.mean if output.p_z else torch.zeros_like(z)
    return output.q_z.mean, prior_mean, output.log_variance


def moved(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    """Return the frames that differ by more than rounding."""
    change = (after - before).abs().amax((0, 2))
    assert not ((change > 1e-11) & (change < 1e-9)).any(), "neither still nor moved"
    return set(change.gt(1e-9).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "name, config, with_x, with_z", DEPENDENCIES, ids=lambda value: value or None
)
@torch.no_grad()
def test_dependencies_are_those_of_the_equations(name, config, with_x, with_z):
    model = small(name, **config)
    x = spectrum()
    output = model(x, draw(model))
    z, v = output.z, output.w
    before = pass_through(model, x, z, v)
    other_x = x.clone()
    other_x[:, K] *= 3
    after = pass_through(model, other_x, z, v)
    assert tuple(map(moved, before, after)) == with_x
    other_z = z.clone()
    other_z[:, K] += 0.5
    after = pass_through(model, x, other_z, v)
    assert tuple(map(moved, before, after)) == with_z


# ---------------------------------------------------------------------------------------- own past


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_own_past_is_a_fixed_point(name):
    """Decoding from the model's own past must give what one pass over that past gives. The true
    past must give something else."""
    model = small(name)
    x = spectrum()
    noise = draw(model)
    generated = model.resynthesise(x, "generation", noise)
    z = model(x, noise).z
    torch.testing.assert_close(model.unroll(z)[0], generated)
    draws = torch.rand(BATCH, FRAMES, 1)
    torch.testing.assert_close(model.mix_past(x, z, draws, 1.0), past(generated.exp()))
    scheduled = model(x, noise._replace(past=draws), scheduled_sampling_prob=1.0)
    torch.testing.assert_close(scheduled.log_variance, generated)
    teacher_forced = model.resynthesise(x, "teacher_forcing", noise)
    assert (teacher_forced - generated).abs()[:, 1:].max() > 1e-6


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_posterior_never_sees_the_own_past(name):
    """Fails if scheduled sampling changes q(z), which must see the true x alone."""
    model = small(name)
    x = spectrum()
    noise = draw(model)
    teacher_forced = model(x, noise)
    draws = torch.rand(BATCH, FRAMES, 1)
    scheduled = model(x, noise._replace(past=draws), scheduled_sampling_prob=1.0)
    assert_same(scheduled.q_z, teacher_forced.q_z, 0.0)
    assert_same([scheduled.z], [teacher_forced.z], 0.0)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_no_gradient_through_the_own_past(name):
    """The gradient must be that of the frame-by-frame loop with every fed-back output detached."""
    model = small(name)
    x = spectrum()
    noise = draw(model)
    weight = spectrum(seed=3)
    z = model(x, noise).z
    x_past = torch.zeros_like(x)
    outputs = []
    for t in range(FRAMES):
        outputs.append(model.score(x_past, z).log_variance[:, t])
        x_past = x_past.clone()
        x_past[:, t + 1 : t + 2] = model.feed_back(outputs[t].detach())[:, None]
    draws = torch.rand(BATCH, FRAMES, 1)
    output = model(x, noise._replace(past=draws), scheduled_sampling_prob=1.0)
    parameters = list(model.parameters())
    expected_total = (torch.stack(outputs, 1) * weight).sum()
    expected = torch.autograd.grad(expected_total, parameters, allow_unused=True)
    total = (output.log_variance * weight).sum()
    actual = torch.autograd.grad(total, parameters, allow_unused=True)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_scheduled_sampling_mixes_frame_by_frame(name):
    """Each frame of each sequence must be the model's output with the probability of scheduled
    sampling, independently. With the same noise the loss must be the same."""
    model = small(name)
    x = spectrum().repeat(60, 1, 1)
    noise = model.draw_noise(len(x), FRAMES, scheduled_sampling=True)
    z = model(x, noise).z
    mixed_past = model.mix_past(x, z, noise.past, 0.3)
    is_decoded = (mixed_past[:, 1:] != x[:, :-1]).any(-1).double()  # (sequences, frames − 1)
    share_of_sequence = is_decoded.mean(1)
    share_of_frame = is_decoded.mean(0)
    assert (mixed_past[:, 0] == 0).all() and abs(is_decoded.mean() - 0.3) < 0.1
    assert ((share_of_sequence > 0) & (share_of_sequence < 1)).any()
    assert ((share_of_frame > 0) & (share_of_frame < 1)).all()
    first, _ = model.loss(x, noise, scheduled_sampling_prob=0.3)
    second, _ = model.loss(x, noise, scheduled_sampling_prob=0.3)
    assert torch.equal(first, second) and first != model.loss(x, noise)[0]


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("scale", ["power", "log", "root"])
@pytest.mark.parametrize("name", ("vae", *RECURRENT))
def test_sample(name, scale):
    model = build_model(name, bins=BINS, latent=LATENT, input_scale=scale)
    model.fit_statistics(spectrum().float())
    first = model.sample(3, 4, torch.Generator().manual_seed(0))
    second = model.sample(3, 4, torch.Generator().manual_seed(0))
    with_other_seed = model.sample(3, 4, torch.Generator().manual_seed(1))
    assert first.shape == (3, 4, BINS) and first.isfinite().all() and not first.requires_grad
    assert torch.equal(first, second) and not torch.equal(first, with_other_seed)


@pytest.mark.parametrize("name", ("dkf", "dsae", "vrnn", "srnn"))
def test_sample_follows_the_prior(name):
    """A sample's z must be drawn from the prior of a forward pass over that sample, with the same
    noise."""
    model = small(name)
    with torch.no_grad():
        log_variance = model.sample(BATCH, FRAMES, torch.Generator().manual_seed(2))
        noise = draw(model)
        z = torch.zeros_like(noise.z)
        x = log_variance.exp()
        v = noise.w
        for t in range(FRAMES):  # The prior of z_t depends on frames before t only.
            p_mean, p_log_variance = prior_of(model, x, z, v)
            z[:, t] = (p_mean + torch.exp(0.5 * p_log_variance) * noise.z)[:, t]
        torch.testing.assert_close(pass_through(model, x, z, v)[2], log_variance)


def prior_of(model: nn.Module, x: torch.Tensor, z: torch.Tensor, v: torch.Tensor | None):
    """Return the prior of a forward pass that samples just z."""
    noise = torch.zeros_like(z)
    noise_v = None if v is None else torch.zeros_like(v)
    for t in range(FRAMES):
        output = model(x, Noise(noise, noise_v))
        noise[:, t] = ((z - output.q_z.mean) / torch.exp(0.5 * output.q_z.log_variance))[:, t]
    return model(x, Noise(noise, noise_v)).p_z


# -------------------------------------------------------------------------------- published format

NETWORK = {
    "name": "VRNN",
    "x_dim": "6",
    "z_dim": "3",
    "activation": "tanh",
    "dense_x": "4",
    "dense_z": "",
    "dense_hx_z": "5",
    "dense_hz_x": "4",
    "dense_h_z": "5",
    "dim_RNN": "4",
    "num_RNN": "1",
    "dropout_p": "0",
    "tag": "VRNN",
}


def vrnn_state() -> dict[str, torch.Tensor]:
    """Return the state dict of a small VRNN under the published names."""
    config = {"x_hidden": (4,), "z_hidden": (), "posterior_hidden": (5,), "prior_hidden": (5,)}
    config["decoder_hidden"] = (4,)
    model = build_model("vrnn", bins=6, latent=3, rnn=4, **config)
    return {
        their_key("vrnn", key, config): value.detach() for key, value in model.named_parameters()
    }


def without_none(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def test_import_of_both_versions_of_the_format():
    """The output layer is called gen_logvar in earlier checkpoints and gen_out in later ones."""
    state = vrnn_state()
    later_state = {key.replace("gen_logvar", "gen_out"): value for key, value in state.items()}
    for version in (state, later_state):
        model = import_dvae_speech(version, NETWORK)
        assert torch.equal(model.output.weight, state["gen_logvar.weight"])


@pytest.mark.parametrize(
    "state_changes, network_changes, message",
    [
        ({"rnn.weight_hh_l0": None}, {}, 'Missing key.*"lstm.weight_hh_l0"'),
        (
            {"inf_mean.bias": torch.zeros(4)},
            {},
            r"size mismatch for posterior.mean.bias.*\[4\].*\[3\]",
        ),
        ({"mlp_new.weight": torch.zeros(4)}, {}, 'Unexpected key.*"mlp_new.weight"'),
        ({"epoch": 3}, {}, "not a plain state dict"),
        ({}, {"name": "KVAE"}, "name='KVAE' is none of"),
        ({}, {"dense_x": "four"}, "dense_x='four'"),
        ({}, {"dim_RNN": "-1"}, "dim_RNN='-1'"),
        ({}, {"activation": "gelu"}, "activation='gelu'"),
        ({}, {"dim_RNN": None}, "lacks dim_RNN"),
    ],
)
def test_import_refuses_and_names_the_first_mismatch(state_changes, network_changes, message):
    """A key that is changed to None is left out."""
    state = without_none(vrnn_state() | state_changes)
    network = without_none(NETWORK | network_changes)
    with pytest.raises(CheckpointError, match=message):
        import_dvae_speech(state, network)


def message_of_loading(folder) -> str:
    """Return the error message of loading a folder, one line that names the folder."""
    with pytest.raises(CheckpointError) as error:
        load_dvae_speech(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


def test_load_refuses_folders_that_are_no_published_model(tmp_path):
    config_file = tmp_path / "config.ini"
    assert "expected one .pt file and config.ini" in message_of_loading(tmp_path)
    config_file.write_text("[Network]\nname = VRNN\n")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "model.pt")  # a pickled object, not tensors
    assert "STFT" in message_of_loading(tmp_path)
    network = "\n".join(f"{key} = {value}" for key, value in NETWORK.items())
    config = f"[STFT]\nwlen_sec = 625e-6\nhop_percent = 0.2\nfs = 16000\n[Network]\n{network}"
    config_file.write_text(config.replace("16000", "32000"))
    assert "fs=32000" in message_of_loading(tmp_path)
    config_file.write_text(config)
    assert "not a checkpoint" in message_of_loading(tmp_path)
    torch.save(vrnn_state(), tmp_path / "model.pt")
    model, stft = load_dvae_speech(tmp_path)
    assert (stft.window_length, stft.hop) == (10, 2) and model.config.rnn == 4
    config_file.write_text(config.replace("625e-6", "32e-3"))
    expected = "a window of 512 samples does not have x_dim=6 bins"
    assert expected in message_of_loading(tmp_path)


def test_every_part_of_every_model_has_a_name_in_the_published_format():
    for name in FORMATS:
        model = build_model(name, bins=BINS)
        keys = [their_key(name, key, vars(model.config)) for key, _ in model.named_parameters()]
        assert len(set(keys)) == len(keys)
