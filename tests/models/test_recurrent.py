"""The recurrent models and their scans: sizes, the two paths, who depends on whom, own past, sampling."""

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
from minidvae.models.published import FORMATS, import_dvae_speech, load_dvae_speech

RECURRENT = ("dkf", "storn", "vrnn", "srnn", "rvae", "dsae")
AUTOREGRESSIVE = ("storn", "vrnn", "srnn")
ORIGINAL = {
    name: ()
    for name in ("x_hidden", "z_hidden", "posterior_hidden", "decoder_z_hidden", "decoder_hidden")
}
BATCH, FRAMES, BINS, LATENT = 2, 5, 6, 3


def small(name: str, **config) -> nn.Module:
    """A model in float64 with outputs that move visibly with everything they depend on."""
    torch.manual_seed(1)
    model = build_model(name, bins=BINS, latent=LATENT, **config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def spectrum(seed: int = 0, frames: int = FRAMES) -> torch.Tensor:
    return torch.rand(
        BATCH, frames, BINS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def draw(model: nn.Module, frames: int = FRAMES):
    return model.draw_noise(BATCH, frames, torch.Generator().manual_seed(2))


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same(actual, expected, tolerance=1e-10):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- sizes


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
        ("rvae", ORIGINAL, 389_025),
        ("dsae", {}, 1_084_705),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(name, config, count):
    assert (
        sum(parameter.numel() for parameter in build_model(name, bins=257, **config).parameters())
        == count
    )


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="tanh, relu"):
        build_model("srnn", activation="gelu")


# ---------------------------------------------------------------------------------------------------------- scans


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch, frames, hidden", [(1, 1, 3), (17, 2, 5), (3, 7, 32)])
def test_lstm_scan_is_an_lstm(batch, frames, hidden, reverse):
    torch.manual_seed(0)
    rnn = nn.LSTM(4, hidden, batch_first=True).double()
    x, upstream = (
        torch.randn(batch, frames, 4).double(),
        torch.randn(batch, frames, hidden).double(),
    )
    h0, c0 = torch.randn(2, 1, batch, hidden).double().requires_grad_().unbind(0)
    found = []
    for scan in (lstm_scan, lstm_scan_reference):
        gates = x @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0 + rnn.bias_hh_l0
        found.append(scan(gates, rnn.weight_hh_l0, h0[0], c0[0], reverse))
    outputs, (h, c) = rnn(x.flip(1) if reverse else x, (h0, c0))
    found.append((outputs.flip(1) if reverse else outputs, h[0], c[0]))
    inputs = [*rnn.parameters(), h0, c0]
    grads = [
        torch.autograd.grad((o * upstream).sum() + h.sum() + (2 * c).sum(), inputs)
        for o, h, c in found
    ]
    for k in range(2):
        assert_same(found[k], found[2])
        assert_same(grads[k], grads[2])


def test_lstm_scan_differentiates_twice():
    torch.manual_seed(0)
    shapes = [(2, 3, 8), (8, 2), (2, 2), (2, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lstm_scan, inputs)
    assert torch.autograd.gradgradcheck(lstm_scan, inputs)


def scan_case(case: str, batch: int, frames: int, dtype=torch.float64) -> dict:
    """Arguments of `latent_scan` as the models make them."""
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(shape, dtype=dtype).mul(0.5).requires_grad_()

    lstm_layers = {"rvae": 1, "vrnn": 1, "rvae, no MLP": 1, "two layers": 2}.get(case, 0)
    has_mlp = "no MLP" not in case
    a = 4 if has_mlp and case != "srnn" else LATENT  # width of the transition's output
    state = 5 if lstm_layers else a
    first, posterior = new(6, state), [(new(4, 6), new(4)), (new(2 * LATENT, 4), new(2 * LATENT))]
    arguments = {
        "inputs": new(frames, batch, 6 if has_mlp else 2 * LATENT).transpose(0, 1),
        "noise": torch.randn(batch, frames, LATENT, dtype=dtype),
        "state": [(new(batch, state), new(batch, state)) for _ in range(lstm_layers)]
        or [new(batch, state)],
        "first": first if has_mlp else new(2 * LATENT, state),
        "posterior": posterior if has_mlp else [],
        "transition": [(new(5, LATENT), new(5)), (new(a, 5), new(a))] if a != LATENT else [],
        "lstm": [
            LSTMWeights(new(20, 5 if k else a), new(20, 5), new(20)) for k in range(lstm_layers)
        ],
        "activation": "relu" if case == "dkf" else "tanh",
    }
    if case == "vrnn":
        arguments["gates"], arguments["lstm"][0] = (
            new(batch, frames, 20),
            arguments["lstm"][0]._replace(bias=None),
        )
    return arguments


SCANS = ("srnn", "srnn, no MLP", "dkf", "rvae", "rvae, no MLP", "vrnn", "two layers")


def scan_inputs(arguments: dict) -> list[torch.Tensor]:
    return [
        x
        for x in tree_leaves(arguments)
        if isinstance(x, torch.Tensor) and x is not arguments["noise"]
    ]


@pytest.mark.parametrize("batch, frames", [(1, 1), (3, 2), (17, 7)])
@pytest.mark.parametrize("case", SCANS)
def test_latent_scan_equals_its_reference(case, batch, frames):
    arguments = scan_case(case, batch, frames)
    found, grads = [], []
    for scan in (latent_scan, latent_scan_reference):
        found.append(scan(**arguments))
        total = sum(
            (torch.linspace(0.5, 2, output.numel()).view_as(output) * output).sum()
            for output in found[-1]
        )
        grads.append(torch.autograd.grad(total, scan_inputs(arguments), allow_unused=True))
    assert_same(*found)
    for one, other in zip(*grads, strict=True):  # what a single frame does not reach: None or zeros
        one, other = (
            torch.zeros(()) if gradient is None else gradient for gradient in (one, other)
        )
        torch.testing.assert_close(one + 0 * other, other + 0 * one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ("srnn", "dkf", "rvae", "vrnn"))
def test_latent_scan_differentiates_once(case):
    """The gradients are right; the gradient of a gradient is an error that says so, no silent zero."""
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
    """Under autocast the scans stay in float32: the loss is that of full precision to a per cent."""
    model = build_model(name, bins=BINS, latent=LATENT)
    x, noise = spectrum().float(), draw(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(x, noise)
    loss.backward()
    torch.testing.assert_close(loss.float(), model.loss(x, noise)[0], rtol=0.02, atol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(x, scheduled_sampling_prob=0.5)
    loss.backward()  # every parameter has a gradient, although the own past was made without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------- models

VARIANTS = [
    *((name, {}) for name in RECURRENT),
    *((name, {"layers": 2, "activation": "relu"}) for name in RECURRENT),
    ("rvae", {"bidirectional": True, "layers": 2}),
    ("rvae", ORIGINAL | {"bidirectional": True}),
    ("dkf", {"bidirectional": True}),
    ("dkf", {"x_hidden": (), "z_hidden": (), "posterior_hidden": (), "decoder_hidden": ()}),
    (
        "storn",
        {
            "x_hidden": (),
            "posterior_hidden": (),
            "z_hidden": (),
            "past_hidden": (),
            "decoder_hidden": (),
        },
    ),
    (
        "vrnn",
        {
            "x_hidden": (),
            "z_hidden": (),
            "posterior_hidden": (),
            "prior_hidden": (),
            "decoder_hidden": (),
        },
    ),
    (
        "srnn",
        {
            "x_hidden": (),
            "hx_hidden": (),
            "posterior_hidden": (),
            "prior_hidden": (),
            "decoder_hidden": (),
        },
    ),
    (
        "dsae",
        {"x_hidden": (), "v_hidden": (), "xv_hidden": (), "z_hidden": (), "decoder_hidden": ()},
    ),
]


@pytest.mark.parametrize("name, config", VARIANTS, ids=str)
def test_forward_is_the_reference(name, config):
    """All frames at once and one frame at a time: the same outputs, loss and gradients, whatever the settings."""
    model = small(name, **config)
    x, noise = spectrum(), draw(model)
    loss, terms = model.loss(x, noise)
    found = gradients(model, loss)
    model.forward = lambda x, noise, probability=0.0: model.forward_reference(x, noise)
    reference, reference_terms = model.loss(x, noise)
    assert_same(terms.values(), reference_terms.values())
    assert_same(found, gradients(model, reference), 1e-8)


@pytest.mark.parametrize("name", RECURRENT)
def test_silence_is_finite(name):
    model = build_model(name, bins=BINS)
    loss, _ = model.loss(torch.zeros(2, 4, BINS))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(model, loss))


def test_log_softplus_where_the_softplus_underflows():
    a = torch.tensor([-200.0, -30.0, -1.0, 0.0, 40.0], requires_grad=True)
    expected = torch.tensor(
        [-200.0, -30.0, math.log(math.log1p(math.exp(-1))), math.log(math.log(2)), math.log(40)]
    )
    torch.testing.assert_close(log_softplus(a), expected)
    assert torch.autograd.grad(log_softplus(a).sum(), a)[0].isfinite().all()


def test_dsae_counts_the_divergence_of_v_once_per_sequence():
    model = small("dsae")
    loss, terms = model.loss(spectrum(), draw(model))
    torch.testing.assert_close(
        loss.detach(), terms["reconstruction"] + terms["kl_z"] + terms["kl_w"]
    )


# --------------------------------------------------------------------------------------------------- dependencies

K = 2  # the frame that is changed
NONE, AT, NEXT, ALL = set(), {K}, {K + 1}, set(range(FRAMES))
BEFORE, FROM, AFTER = set(range(K + 1)), set(range(K, FRAMES)), set(range(K + 1, FRAMES))

# Which frames of the posterior, the prior and the output move, by the equations, with x_k and with z_k when all
# other x and z are held.
DEPENDENCIES = [
    ("vae", {}, (AT, NONE, NONE), (NONE, NONE, AT)),
    ("dkf", {}, (BEFORE, NONE, NONE), (NEXT, NEXT, AT)),
    ("dkf", {"bidirectional": True}, (ALL, NONE, NONE), (NEXT, NEXT, AT)),
    ("storn", {}, (FROM, NONE, AFTER), (NONE, NONE, FROM)),
    ("vrnn", {}, (FROM, AFTER, AFTER), (AFTER, AFTER, FROM)),
    ("srnn", {}, (ALL, AFTER, AFTER), (NEXT, NEXT, AT)),
    ("rvae", {}, (BEFORE, NONE, NONE), (AFTER, NONE, FROM)),
    ("rvae", {"bidirectional": True}, (ALL, NONE, NONE), (AFTER, NONE, ALL)),
    ("dsae", {}, (ALL, NONE, NONE), (NONE, AFTER, AT)),
]


def pass_through(model: nn.Module, x: torch.Tensor, z: torch.Tensor, v: torch.Tensor | None):
    """The forward pass whose samples are the given z (and v): the noise that makes them, frame after frame."""
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
    return (
        output.q_z.mean,
        output.p_z.mean if output.p_z else torch.zeros_like(z),
        output.log_variance,
    )


def moved(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    change = (after - before).abs().amax((0, 2))
    assert not ((change > 1e-11) & (change < 1e-9)).any(), "neither still nor moved"
    return set(change.gt(1e-9).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "name, config, with_x, with_z", DEPENDENCIES, ids=lambda value: value or None
)
@torch.no_grad()
def test_dependencies_are_those_of_the_equations(name, config, with_x, with_z):
    model = small(name, **config)
    x, noise = spectrum(), draw(model)
    output = model(x, noise)
    z, v = output.z, output.w
    before = pass_through(model, x, z, v)
    other_x, other_z = x.clone(), z.clone()
    other_x[:, K] *= 3
    other_z[:, K] += 0.5
    for after, expected in (
        (pass_through(model, other_x, z, v), with_x),
        (pass_through(model, x, other_z, v), with_z),
    ):
        assert tuple(map(moved, before, after)) == expected


# ------------------------------------------------------------------------------------------------------- own past


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_own_past_is_a_fixed_point(name):
    """Decoding from the own past gives what one pass over that very past gives; the true past gives another."""
    model = small(name)
    x, noise = spectrum(), draw(model)
    own = model.resynthesise(x, "generation", noise)
    z = model(x, noise).z
    torch.testing.assert_close(model.unroll(z)[0], own)
    draws = torch.rand(BATCH, FRAMES, 1)
    torch.testing.assert_close(model.mix_past(x, z, draws, 1.0), past(own.exp()))
    scheduled = model(x, noise._replace(past=draws), scheduled_sampling_prob=1.0)
    torch.testing.assert_close(scheduled.log_variance, own)
    assert (model.resynthesise(x, "teacher_forcing", noise) - own).abs()[:, 1:].max() > 1e-6


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_posterior_never_sees_the_own_past(name):
    model = small(name)
    x, noise = spectrum(), draw(model)
    true = model(x, noise)
    draws = torch.rand(BATCH, FRAMES, 1)
    fed = model(x, noise._replace(past=draws), scheduled_sampling_prob=1.0)
    assert_same((*fed.q_z, fed.z), (*true.q_z, true.z), 0.0)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_no_gradient_through_the_own_past(name):
    """The gradient is that of the frame-by-frame loop with every fed-back output detached."""
    model = small(name)
    x, noise = spectrum(), draw(model)
    weight = spectrum(seed=3)
    z = model(x, noise).z
    x_past, outputs = torch.zeros_like(x), []
    for t in range(FRAMES):
        outputs.append(model.score(x_past, z).log_variance[:, t])
        x_past = x_past.clone()
        x_past[:, t + 1 : t + 2] = model.feed_back(outputs[t].detach())[:, None]
    draws = torch.rand(BATCH, FRAMES, 1)
    output = model(x, noise._replace(past=draws), scheduled_sampling_prob=1.0)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(
        (torch.stack(outputs, 1) * weight).sum(), parameters, allow_unused=True
    )
    found = torch.autograd.grad((output.log_variance * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_scheduled_sampling_mixes_frame_by_frame(name):
    """Each frame of each sequence is own output with the given probability; given the noise, the whole pass is
    deterministic."""
    model = small(name)
    x = spectrum().repeat(60, 1, 1)
    noise = model.draw_noise(len(x), FRAMES, scheduled_sampling=True)
    z = model(x, noise).z
    fed = model.mix_past(x, z, noise.past, 0.3)
    own = (fed[:, 1:] != x[:, :-1]).any(-1).double()  # (sequences, frames after the first)
    assert (fed[:, 0] == 0).all() and abs(own.mean() - 0.3) < 0.1
    assert ((own.mean(1) > 0) & (own.mean(1) < 1)).any() and (
        (own.mean(0) > 0) & (own.mean(0) < 1)
    ).all()
    losses = [model.loss(x, noise, scheduled_sampling_prob=0.3)[0] for _ in range(2)]
    assert torch.equal(*losses) and losses[0] != model.loss(x, noise)[0]


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("scale", ["power", "log", "root"])
@pytest.mark.parametrize("name", ("vae", *RECURRENT))
def test_sample(name, scale):
    model = build_model(name, bins=BINS, latent=LATENT, input_scale=scale)
    model.fit_statistics(spectrum().float())
    first, again, other = (
        model.sample(3, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 4, BINS) and first.isfinite().all() and not first.requires_grad
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", ("dkf", "dsae", "vrnn", "srnn"))
def test_sample_follows_the_prior(name):
    """z drawn by `sample` is what the prior of a pass over that very sample says, given the same noise."""
    model = small(name)
    with torch.no_grad():
        log_variance = model.sample(BATCH, FRAMES, torch.Generator().manual_seed(2))
        noise = draw(model)
        noise_z = noise.z
        z = torch.zeros_like(noise_z)
        x = log_variance.exp()
        v = noise.w
        for t in range(FRAMES):  # the prior of z_t depends on frames before t only
            p_mean, p_log_variance = prior_given(model, x, z, v)
            z[:, t] = (p_mean + torch.exp(0.5 * p_log_variance) * noise_z)[:, t]
        torch.testing.assert_close(pass_through(model, x, z, v)[2], log_variance)


def prior_given(model: nn.Module, x: torch.Tensor, z: torch.Tensor, v: torch.Tensor | None):
    noise, noise_v = torch.zeros_like(z), None if v is None else torch.zeros_like(v)
    for t in range(FRAMES):
        output = model(x, Noise(noise, noise_v))
        noise[:, t] = ((z - output.q_z.mean) / torch.exp(0.5 * output.q_z.log_variance))[:, t]
    return model(x, Noise(noise, noise_v)).p_z


# ------------------------------------------------------------------------------------------------ published format

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
    from minidvae.models.published import their_key

    config = {
        "x_hidden": (4,),
        "z_hidden": (),
        "posterior_hidden": (5,),
        "prior_hidden": (5,),
        "decoder_hidden": (4,),
    }
    model = build_model("vrnn", bins=6, latent=3, rnn=4, **config)
    return {
        their_key("vrnn", key, config): value.detach() for key, value in model.named_parameters()
    }


def test_import_of_both_versions_of_the_format():
    state = vrnn_state()
    later = {key.replace("gen_logvar", "gen_out"): value for key, value in state.items()}
    assert torch.equal(import_dvae_speech(state, NETWORK).output.weight, state["gen_logvar.weight"])
    assert torch.equal(import_dvae_speech(later, NETWORK).output.weight, state["gen_logvar.weight"])


@pytest.mark.parametrize(
    "change, network, message",
    [
        (lambda s: s.pop("rnn.weight_hh_l0"), {}, 'Missing key.*"lstm.weight_hh_l0"'),
        (
            lambda s: s.update({"inf_mean.bias": torch.zeros(4)}),
            {},
            r"size mismatch for posterior.mean.bias.*\[4\].*\[3\]",
        ),
        (
            lambda s: s.update({"mlp_new.weight": torch.zeros(4)}),
            {},
            'Unexpected key.*"mlp_new.weight"',
        ),
        (lambda s: s.update({"epoch": 3}), {}, "not a plain state dict"),
        (lambda s: None, {"name": "KVAE"}, "name='KVAE' is none of"),
        (lambda s: None, {"dense_x": "four"}, "dense_x='four'"),
        (lambda s: None, {"dim_RNN": "-1"}, "dim_RNN='-1'"),
        (lambda s: None, {"activation": "gelu"}, "activation='gelu'"),
        (lambda s: None, {"dim_RNN": None}, "lacks dim_RNN"),
    ],
)
def test_import_refuses_and_names_the_first_mismatch(change, network, message):
    state = vrnn_state()
    change(state)
    network = {key: value for key, value in (NETWORK | network).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        import_dvae_speech(state, network)


def test_load_refuses_folders_that_are_no_published_model(tmp_path):
    def message() -> str:
        with pytest.raises(CheckpointError) as error:
            load_dvae_speech(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "expected one .pt file and config.ini" in message()
    (tmp_path / "config.ini").write_text("[Network]\nname = VRNN\n")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "model.pt")  # a pickled object, not tensors
    assert "STFT" in message()
    network = "\n".join(f"{key} = {value}" for key, value in NETWORK.items())
    stft = "[STFT]\nwlen_sec = 625e-6\nhop_percent = 0.2\nfs = {}\n[Network]\n" + network
    (tmp_path / "config.ini").write_text(stft.format(32000))
    assert "fs=32000" in message()
    (tmp_path / "config.ini").write_text(stft.format(16000))
    assert "not a checkpoint" in message()
    torch.save(vrnn_state(), tmp_path / "model.pt")
    model, stft = load_dvae_speech(tmp_path)
    assert (stft.window_length, stft.hop) == (10, 2) and model.config.rnn == 4
    (tmp_path / "config.ini").write_text(
        (tmp_path / "config.ini").read_text().replace("625e-6", "32e-3")
    )
    assert "a window of 512 samples does not have x_dim=6 bins" in message()


def test_every_part_of_every_model_has_a_name_in_the_published_format():
    from minidvae.models.published import their_key

    for name in FORMATS:
        model = build_model(name, bins=BINS)
        keys = [their_key(name, key, vars(model.config)) for key, _ in model.named_parameters()]
        assert len(set(keys)) == len(keys)
