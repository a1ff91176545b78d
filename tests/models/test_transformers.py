"""HiT-DVAE and LigHT-DVAE: batches, long utterances, local attention, torch.compile, bf16."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minidvae.models import build_model
from minidvae.models.base import past
from minidvae.models.light_dvae import Attention, sinusoids
from minidvae.models.light_dvae_local import (
    LigHTLocalConfig,
    LocalAttention,
    PhaseLinear,
    rotary_cos_sin,
    rotate,
)
from minidvae.models.segments import SegmentBatch

SMALL = {"bins": 9, "latent": 3, "w_latent": 4, "width": 16, "feedforward": 32, "layers": 2}
SMALL |= {"w_embedding": 8, "w_hidden": 8, "w_layers": 2}
LOCAL = {"context": 4, "phases": 2, "heads": 2}


def small(name="light_dvae", **config) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(name, **(SMALL | config)).eval()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vae", {"bins": 9, "latent": 3, "hidden": (8,)}),
        ("hit_dvae", SMALL),
        ("light_dvae", SMALL),
        ("hit_dvae_local", SMALL | LOCAL),
        ("light_dvae_local", SMALL | LOCAL),
    ],
)
@pytest.mark.parametrize("mode", ["generation", "teacher_forcing"])
def test_a_batch_of_utterances_is_each_by_itself(name, settings, mode):
    """Fails where padding reaches w, the encoder's attention or another utterance."""
    torch.manual_seed(0)
    model = build_model(name, **settings).eval()
    spectra = [torch.rand(length, 9) * 4 for length in (5, 12, 1, 9, 12)]
    noises = [model.draw_noise(1, len(x)) for x in spectra]
    together = list(model.resynthesise_each(spectra, mode, noises))
    for x, noise, log_variance in zip(spectra, noises, together, strict=True):
        alone = model.resynthesise(x[None], mode, noise)[0]
        assert log_variance.shape == x.shape and (log_variance - alone).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "settings"),
    [("light_dvae", {}), ("light_dvae_local", {"context": 50, "phases": 4, "heads": 8})],
)
def test_thirty_seconds_from_the_cache(name, settings):
    """1,875 frames, generated one at a time, must be what one pass over all of them gives."""
    model = small(name, layers=1, **settings).double()
    x = torch.rand(1, 1875, 9, dtype=torch.float64)
    noise = model.draw_noise(1, 1875)
    generated = model.resynthesise(x, "generation", noise)
    output = model(x, noise)
    x_past = past(model.feed_back(generated))
    in_one_pass = model.likelihood(output.z, output.w, x_past, model.positions(1875))
    assert (in_one_pass - generated).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("frames", [6, 10, 13])
def test_attention_within_the_context(causal, frames):
    """Attention by pieces must be what the full matrix of scores gives with a mask that leaves out
    frames beyond the context and padding."""
    config = LigHTLocalConfig(bins=9, width=16, heads=2, context=5)
    attention = LocalAttention(config, reads_embedding=False, is_causal=causal)
    queries, keys, values = torch.randn(3, 2, 2, frames, 8)
    frames_back = torch.arange(frames)[:, None] - torch.arange(frames)  # (queries, keys)
    is_near = frames_back.abs() < 5
    if causal:
        is_near &= frames_back >= 0
    lengths = torch.tensor([frames, frames - 4])
    is_present = torch.arange(frames) < lengths[:, None, None, None]
    for mask in (None, is_present):
        is_visible = is_near if mask is None else is_near & mask
        expected = F.scaled_dot_product_attention(queries, keys, values, is_visible)
        attended = attention.attend_locally(queries, keys, values, mask)
        torch.testing.assert_close(attended[0], expected[0])
        torch.testing.assert_close(attended[1, :, : frames - 4], expected[1, :, : frames - 4])


@pytest.mark.parametrize("causal", [True, False])
def test_heads_start_on_neighbours(causal):
    """Whatever the frames hold, each head must give most of its weight to one frame relative to the
    query's."""
    config = LigHTLocalConfig(bins=9, width=64, heads=4, context=20)
    attention = LocalAttention(config, reads_embedding=False, is_causal=causal)
    queries, keys, _ = attention.project(*torch.randn(2, 3, 20, 64))
    cos_sin = rotary_cos_sin(torch.arange(20), 16, 20)
    scores = rotate(queries, cos_sin) @ rotate(keys, cos_sin).mT / 4
    if causal:
        scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    query = 10
    expected_keys = [10, 9, 8, 7] if causal else [12, 11, 10, 9]  # one for each head
    weights = scores.softmax(-1)[:, range(4), query, expected_keys]
    assert (weights > 0.85).all()


def test_relative_positions_in_bf16():
    """Angles of hundreds of radians must not be rounded to bf16: attention two minutes into a
    recording must be that at its start."""
    attention = small("light_dvae_local", **LOCAL).encoder[0].attention
    weights = []
    for first in (0, 7_200):
        cos_sin = rotary_cos_sin(torch.arange(first, first + 8), 8, 4)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            queries, keys, _ = attention.project(*torch.zeros(2, 1, 8, 16))
            scores = rotate(queries, cos_sin) @ rotate(keys, cos_sin).mT
            weights.append(scores.softmax(-1))
    assert (weights[0] - weights[1]).abs().max() < 0.03


def test_sinusoids():
    """The positional encoding must hold sines and cosines at rates from 1 down to 1/10000. The
    likelihood must depend on it, but for that of a model with a local context."""
    at_0 = [0.0, 1, 0, 1]
    at_3 = [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)]
    expected = torch.tensor([at_0, at_3], dtype=torch.float32)
    assert torch.allclose(sinusoids(torch.tensor([0, 3]), 4), expected)
    z = torch.randn(1, 8, 3)
    w = torch.randn(1, 4)
    x_past = torch.randn(1, 8, 9)
    for name, config, depends_on_positions in (
        ("light_dvae", {}, True),
        ("light_dvae_local", {"context": 0, "phases": 1}, True),
        ("light_dvae_local", {"context": 4, "phases": 1}, False),
    ):
        model = small(name, **config)
        positions = model.positions(9)
        first = model.likelihood(z, w, x_past, positions[0:8])
        second = model.likelihood(z, w, x_past, positions[1:9])
        assert torch.allclose(first, second, atol=1e-5) != depends_on_positions


def test_without_its_settings_the_local_model_is_the_papers():
    """The local model without context and phases must give the output of LigHT-DVAE if it has its
    weights, at once and frame by frame."""
    paper = small("light_dvae")
    local = small("light_dvae_local", context=0, phases=1, w_prior="standard")
    local.load_state_dict(paper.state_dict())
    x = torch.rand(2, 12, 9)
    noise = paper.draw_noise(2, 12)
    torch.testing.assert_close(local(x, noise), paper(x, noise))
    expected = paper.resynthesise(x, "generation", noise)
    torch.testing.assert_close(local.resynthesise(x, "generation", noise), expected)


def test_phase_dependent_projections_of_z():
    """The likelihood must read z_t, and the prior z_{t−1}, by the map of that frame's phase."""
    linear = PhaseLinear(2, 2, phases=2)
    outputs = linear(torch.randn(1, 3, 2), torch.tensor([0, 1, 2]))
    assert outputs.shape == (1, 3, 2)
    linear.weight.data.zero_()
    linear.bias.data = torch.tensor([1.0, 2, 3, 4])
    outputs = linear(torch.randn(1, 3, 2), torch.tensor([0, 1, 2]))
    assert outputs.tolist() == [[[1, 2], [3, 4], [1, 2]]]
    model = small("light_dvae_local", layers=1, context=0, phases=3)
    z = torch.randn(1, 9, 3)
    w = torch.randn(1, 4)
    x_past = torch.randn(1, 9, 9)
    positions = model.positions(9)

    likelihood = model.likelihood(z, w, x_past, positions)
    prior_mean = model.prior(past(z), w, x_past, positions).mean
    model.decoders[0].embed_latents.weight.data[16:32] += 1  # the map of the second phase
    likelihood_moved = model.likelihood(z, w, x_past, positions) != likelihood
    prior_moved = model.prior(past(z), w, x_past, positions).mean != prior_mean
    assert first_frame(likelihood_moved) == 1
    assert first_frame(prior_moved) == 2


def first_frame(has_moved: torch.Tensor) -> int:
    """Return the first frame at which has_moved (1, frames, bins) is true for any bin."""
    return has_moved.any(-1)[0].nonzero()[0].item()


def test_positions_are_relative():
    """Frames far from both ends must have the same posterior wherever the utterance was cut, if the
    cut keeps the phases of the frames."""
    model = small("light_dvae_local", **LOCAL).double()
    x = torch.rand(1, 40, 9, dtype=torch.float64)
    w = torch.randn(1, 4, dtype=torch.float64)
    uncut = model.infer_z(x, w).mean
    cut_by_1 = model.infer_z(x[:, 1:], w).mean
    cut_by_2 = model.infer_z(x[:, 2:], w).mean  # There are two phases.
    assert not torch.isclose(cut_by_1[:, 10:-10], uncut[:, 11:-10]).any()
    assert torch.isclose(cut_by_2[:, 10:-10], uncut[:, 12:-10]).all()


def test_work_per_frame_does_not_grow_with_the_length():
    """Matrix products, other than those of attention, must take two operations for each weight that
    a frame passes, with 10 frames as with 80. Recomputing the past would make them grow."""
    model = small()
    decoder = [*model.decoders[0].parameters(), *model.output.parameters()]
    weights = sum(weight.numel() for weight in decoder if weight.dim() == 2)
    for frames in (10, 80):
        with FlopCounterMode(display=False) as counter:
            model.decode(torch.randn(2, frames, 3), torch.randn(2, 4))
        assert counter.get_flop_counts()["Global"][torch.ops.aten.addmm] == 2 * frames * 2 * weights


def test_fused_attention_but_where_raw_power_comes_in():
    """Only attention that an embedding of raw power goes into must be unfused in training, and none
    with other input scales."""
    assert unfused_attention(small(input_scale="root")) == set()
    assert unfused_attention(small(input_scale="power")) == {
        "encoder.0.attention",
        "decoders.0.blocks.0.attention",
        "decoders.0.blocks.0.cross_attention",
        "decoders.0.blocks.1.cross_attention",
    }


def unfused_attention(model: torch.nn.Module) -> set[str]:
    """Return the names of the attention modules that are unfused in training."""
    modules = model.named_modules()
    attentions = {name: module for name, module in modules if isinstance(module, Attention)}
    return {name for name, module in attentions.items() if module.unfused_in_training}


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae"])
@pytest.mark.parametrize("variant", ["plain", "inv_s", "inv_s_nr"])
def test_raw_power_has_finite_gradients_in_deep_stacks(name, variant):
    """Gradients would overflow if raw power reached fused attention behind a layer norm."""
    model = small(name, variant=variant, input_scale="power", width=128, bins=513)
    x = 30 * torch.exp(3 * torch.randn(4, 50, 513))
    model.fit_statistics(x)
    loss, _ = model.loss(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scale", ["root", "power"])
def test_a_compiled_training_step(scale):
    """A compiled step must compute the same as an eager one, LSTM and unfused attention included.
    It must be recompiled at most once when the probability of scheduled sampling changes, which it
    does at every step."""
    sizes = {"input_scale": scale, "layers": 1, "w_layers": 1}
    model = small("light_dvae_local", **sizes, **LOCAL).train()
    x = torch.rand(4, 5, 9)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled_loss = torch.compile(model.loss, backend=counter)
    compilations = []  # number of compiled graphs after each probability
    for probability in (0.5, 0.75, 1.0):
        results = []
        for loss_function in (model.loss, compiled_loss):
            torch.manual_seed(1)
            model.zero_grad()
            loss, _ = loss_function(x, scheduled_sampling_prob=probability)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
        for eager, compiled in zip(*results, strict=True):
            assert (eager - compiled).abs().max() <= 1e-4 * eager.abs().max()
        compilations.append(counter.frame_count)
    assert compilations[0] > 1
    if torch.__version__ >= (2, 10):  # PyTorch 2.9 recompiles one graph at every probability.
        assert compilations[1] == compilations[2]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vae", {"bins": 4, "hidden": (8,)}),
        ("light_dvae", SMALL | {"bins": 4, "layers": 1, "w_layers": 1}),
        ("fhvae", {"bins": 4, "frames": 5, "width": 8, "sequences": 2}),
    ],
)
def test_compiled_for_batches_of_any_size(name, config):
    """Fails if the way to draw noise does not work with symbolic sizes, which torch.compile uses
    from the second size on."""
    torch.manual_seed(0)
    model = build_model(name, **config)
    torch._dynamo.reset()
    compiled_loss = torch.compile(model.loss, backend="aot_eager")
    for size in (4, 3, 2):
        batch = torch.rand(size, 5, 4)
        if name == "fhvae":
            batch = SegmentBatch(batch, torch.ones(size), torch.arange(size) % 2)
        torch.manual_seed(1)
        expected, _ = model.loss(batch)
        torch.manual_seed(1)
        loss, _ = compiled_loss(batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae"])
def test_bf16_learns_as_fp32_does(name):
    """Ten steps from the same start with the same noise must give the same losses in bf16. Fails if
    weights are kept in bf16, which rounds small changes away."""
    x = torch.rand(8, 20, 9) * 4
    losses_of = {}
    for bf16 in (False, True):
        model = small(name, input_scale="root").train()
        model.fit_statistics(x)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
        losses = []
        for step in range(10):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = model.loss(x)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        losses_of[bf16] = losses
    assert losses_of[False][-1] < 0.9 * losses_of[False][0]
    assert np.allclose(losses_of[True], losses_of[False], rtol=0.01)


def test_moments_of_w_follow_training():
    """Moments of w (w_prior=aggregate) must be those of q(w) in training. They must not change the
    loss, must stay as they are in evaluation, and must be part of a checkpoint."""
    standard_model = build_model("light_dvae_local", **SMALL, w_prior="standard")
    model = build_model("light_dvae_local", **SMALL, w_prior="aggregate")
    model.load_state_dict(standard_model.state_dict(), strict=False)
    x = torch.rand(64, 6, 9, generator=torch.Generator().manual_seed(0))
    noise = standard_model.draw_noise(64, 6, torch.Generator().manual_seed(1))
    assert torch.equal(standard_model.loss(x, noise)[0], model.loss(x, noise)[0])
    q_w = model(x, noise).q_w
    for _ in range(1_500):
        model.update_w_moments(q_w)
    mean = model.w_moments[0]
    covariance = model.w_moments[1:]
    torch.testing.assert_close(mean, q_w.mean.mean(0), atol=1e-4, rtol=0)
    expected = q_w.mean.T.cov(correction=0) + q_w.log_variance.exp().mean(0).diag()
    torch.testing.assert_close(covariance, expected, atol=1e-4, rtol=0)
    standard = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(2))
    draws = model.draw_w(standard)
    torch.testing.assert_close(model.whiten_w(draws), standard, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(draws.T.cov(), covariance, atol=0.05, rtol=0)
    before = model.w_moments.clone()
    model.eval().loss(x, noise)
    assert torch.equal(model.w_moments, before) and "w_moments" in model.state_dict()
