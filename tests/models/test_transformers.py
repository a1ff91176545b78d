"""HiT-DVAE and LigHT-DVAE beyond the contract: batches of utterances, long ones, compiled, in bf16."""

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

SIZES = {
    "width": 16,
    "feedforward": 32,
    "layers": 2,
    "w_embedding": 8,
    "w_hidden": 8,
    "w_layers": 2,
}
SMALL = SIZES | {"bins": 9, "latent": 3, "w_latent": 4}


def small(name="light_dvae", **config) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(name, **(SMALL | config)).eval()


LOCAL = {"context": 4, "phases": 2, "heads": 2}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("vae", {"bins": 9, "latent": 3, "hidden": (8,)})]
    + [(name, SMALL) for name in ("hit_dvae", "light_dvae")]
    + [(name, SMALL | LOCAL) for name in ("hit_dvae_local", "light_dvae_local")],
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
    """1,875 frames, one at a time, must be what one pass over all of them gives."""
    model, x = (
        small(name, layers=1, **settings).double(),
        torch.rand(1, 1875, 9, dtype=torch.float64),
    )
    noise = model.draw_noise(1, 1875)
    generated, output = model.resynthesise(x, "generation", noise), model(x, noise)
    own = past(model.feed_back(generated))
    again = model.likelihood(output.z, output.w, own, model.positions(1875))
    assert (again - generated).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("frames", [6, 10, 13])
def test_attention_within_the_context(causal, frames):
    """In pieces it must be what the whole matrix of scores gives with all out of reach, or not there, left out."""
    config = LigHTLocalConfig(bins=9, width=16, heads=2, context=5)
    attention = LocalAttention(config, reads_embedding=False, is_causal=causal)
    queries, keys, values = torch.randn(3, 2, 2, frames, 8)
    back = torch.arange(frames)[:, None] - torch.arange(frames)
    near = (back < 5) & (back >= 0) if causal else back.abs() < 5
    there = torch.arange(frames) < torch.tensor([frames, frames - 4])[:, None, None, None]
    for mask in (None, there):
        allowed = near if mask is None else near & mask
        expected = F.scaled_dot_product_attention(queries, keys, values, allowed)
        found = attention.attend_locally(queries, keys, values, mask)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1, :, : frames - 4], expected[1, :, : frames - 4])


@pytest.mark.parametrize("causal", [True, False])
def test_heads_start_on_neighbours(causal):
    """Whatever the frames hold, each head gives most of its weight to one place relative to its own."""
    config = LigHTLocalConfig(bins=9, width=64, heads=4, context=20)
    attention = LocalAttention(config, reads_embedding=False, is_causal=causal)
    queries, keys, _ = attention.project(*torch.randn(2, 3, 20, 64))
    cos_sin = rotary_cos_sin(torch.arange(20), 16, 20)
    queries, keys = rotate(queries, cos_sin), rotate(keys, cos_sin)
    scores = queries @ keys.mT / 4
    if causal:
        scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    back = [0, 1, 2, 3] if causal else [-2, -1, 0, 1]
    assert (scores.softmax(-1)[:, range(4), 10, [10 - b for b in back]] > 0.85).all()


def test_relative_positions_in_bf16():
    """Angles of hundreds of radians must not be rounded to bf16: two minutes into a recording as at its start."""
    attention, weights = small("light_dvae_local", **LOCAL).encoder[0].attention, []
    for first in (0, 7_200):
        cos_sin = rotary_cos_sin(torch.arange(first, first + 8), 8, 4)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            queries, keys, _ = attention.project(*torch.zeros(2, 1, 8, 16))
            scores = rotate(queries, cos_sin) @ rotate(keys, cos_sin).mT
            weights.append(scores.softmax(-1))
    assert (weights[0] - weights[1]).abs().max() < 0.03


def test_sinusoids():
    """Rows of sines and cosines at rates from 1 down to 1/10000, and a likelihood that follows them."""
    expected = torch.tensor(
        [[0.0, 1, 0, 1], [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)]], dtype=torch.float32
    )
    assert torch.allclose(sinusoids(torch.tensor([0, 3]), 4), expected)
    streams = torch.randn(1, 8, 3), torch.randn(1, 4), torch.randn(1, 8, 9)
    for name, config, moves in (
        ("light_dvae", {}, True),
        ("light_dvae_local", {"context": 0, "phases": 1}, True),
        ("light_dvae_local", {"context": 4, "phases": 1}, False),
    ):
        model = small(name, **config)
        positions = model.positions(9)
        first, second = (model.likelihood(*streams, positions[k : k + 8]) for k in (0, 1))
        assert torch.allclose(first, second, atol=1e-5) != moves


def test_without_its_settings_the_local_model_is_the_papers():
    """Weights of the one in the other: the same output, whole and frame by frame."""
    paper = small("light_dvae")
    local = small("light_dvae_local", context=0, phases=1, w_prior="standard")
    local.load_state_dict(paper.state_dict())
    x = torch.rand(2, 12, 9)
    noise = paper.draw_noise(2, 12)
    torch.testing.assert_close(local(x, noise), paper(x, noise))
    own = (model.resynthesise(x, "generation", noise) for model in (local, paper))
    torch.testing.assert_close(*own)


def test_phase_dependent_projections_of_z():
    """The likelihood reads z_t, and the prior z_{t−1}, by the map of that frame's phase."""
    linear = PhaseLinear(2, 2, phases=2)
    outputs = linear(torch.randn(1, 3, 2), torch.tensor([0, 1, 2]))
    assert outputs.shape == (1, 3, 2)
    linear.weight.data.zero_()
    linear.bias.data = torch.tensor([1.0, 2, 3, 4])
    outputs = linear(torch.randn(1, 3, 2), torch.tensor([0, 1, 2]))
    assert outputs.tolist() == [[[1, 2], [3, 4], [1, 2]]]
    model = small("light_dvae_local", layers=1, context=0, phases=3)
    z, w, x_past = torch.randn(1, 9, 3), torch.randn(1, 4), torch.randn(1, 9, 9)
    positions = model.positions(9)

    def roles() -> tuple[torch.Tensor, torch.Tensor]:
        likelihood = model.likelihood(z, w, x_past, positions)
        return likelihood, model.prior(past(z), w, x_past, positions).mean

    before = roles()
    model.decoders[0].embed_latents.weight.data[16:32] += 1  # of the second phase
    moved = [(a != b).any(-1)[0].nonzero()[0].item() for a, b in zip(before, roles(), strict=True)]
    assert moved == [1, 2]


def test_positions_are_relative():
    """Frames far from both ends have the same posterior wherever the utterance was cut, but for the phase of z."""
    model = small("light_dvae_local", **LOCAL).double()
    x = torch.rand(1, 40, 9, dtype=torch.float64)
    w = torch.randn(1, 4, dtype=torch.float64)
    whole = model.infer_z(x, w).mean
    for cut in (1, 2):
        same = torch.isclose(model.infer_z(x[:, cut:], w).mean[:, 10:-10], whole[:, 10 + cut : -10])
        assert same.all() if cut == 2 else not same.any()


def test_work_per_frame_does_not_grow_with_the_length():
    """Matrix products but attention's: two operations for each weight that a frame passes, of 10 frames as of 80.
    Recomputing the past would make them grow with the frame's number."""
    model = small()
    decoder = [*model.decoders[0].parameters(), *model.output.parameters()]
    weights = sum(weight.numel() for weight in decoder if weight.dim() == 2)
    for frames in (10, 80):
        with FlopCounterMode(display=False) as counter:
            model.decode(torch.randn(2, frames, 3), torch.randn(2, 4))
        assert counter.get_flop_counts()["Global"][torch.ops.aten.addmm] == 2 * frames * 2 * weights


def test_fused_attention_but_where_raw_power_comes_in():
    """Of raw power, only what an embedding goes into is unfused; of other scales nothing; without gradient nothing."""
    assert not any(
        module.unfused_in_training
        for module in small(input_scale="root").modules()
        if isinstance(module, Attention)
    )
    model = small(input_scale="power")
    unfused = {
        name
        for name, module in model.named_modules()
        if isinstance(module, Attention) and module.unfused_in_training
    }
    decoder = {
        f"decoders.0.blocks.{part}"
        for part in ("0.attention", "0.cross_attention", "1.cross_attention")
    }
    assert unfused == {"encoder.0.attention"} | decoder


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae"])
@pytest.mark.parametrize("variant", ["plain", "inv_s", "inv_s_nr"])
def test_raw_power_has_finite_gradients_in_deep_stacks(name, variant):
    """Where attention behind a layer norm met raw power all the same, its gradients would overflow."""
    model = small(name, variant=variant, input_scale="power", width=128, bins=513)
    x = 30 * torch.exp(3 * torch.randn(4, 50, 513))
    model.fit_statistics(x)
    loss, _ = model.loss(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scale", ["root", "power"])
def test_a_compiled_training_step(scale):
    """What torch.compile makes of a step computes the same, the LSTM and unfused attention among it, and is made
    anew at most once where the probability of scheduled sampling changes, as it does at every step."""
    sizes = {"input_scale": scale, "layers": 1, "w_layers": 1}
    model = small("light_dvae_local", **sizes, **LOCAL).train()
    x = torch.rand(4, 5, 9)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled, frames = torch.compile(model.loss, backend=counter), []
    for probability in (0.5, 0.75, 1.0):
        found = []
        for loss in (model.loss, compiled):
            torch.manual_seed(1)
            model.zero_grad()
            value, _ = loss(x, scheduled_sampling_prob=probability)
            value.backward()
            found.append([value.detach(), *(p.grad for p in model.parameters())])
        for plain, whole in zip(*found, strict=True):
            assert (plain - whole).abs().max() <= 1e-4 * plain.abs().max()
        frames.append(counter.frame_count)
    assert frames[0] > 1
    if torch.__version__ >= (2, 10):  # 2.9 compiles one graph anew at every probability
        assert frames[1] == frames[2]


@pytest.mark.parametrize(
    "name, config, batches",
    [
        ("vae", {"bins": 9, "hidden": (8,)}, [torch.rand(n, 5, 9) for n in (4, 3, 2)]),
        (
            "light_dvae",
            SMALL | {"layers": 1, "w_layers": 1},
            [torch.rand(n, 5, 9) for n in (4, 3, 2)],
        ),
        (
            "fhvae",
            {"bins": 4, "frames": 5, "width": 8, "sequences": 2},
            [
                SegmentBatch(torch.rand(n, 5, 4), torch.ones(n), torch.arange(n) % 2)
                for n in (4, 3, 2)
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiled_for_batches_of_any_size(name, config, batches):
    """From the second size on, sizes are symbols to torch.compile, with which not every way to draw noise works."""
    torch.manual_seed(0)
    model = build_model(name, **config)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="aot_eager")
    for batch in batches:
        found = []
        for loss in (model.loss, compiled):
            torch.manual_seed(1)
            found.append(loss(batch)[0].item())
        assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae"])
def test_bf16_learns_as_fp32_does(name):
    """Ten steps from the same start with the same noise: a bf16 that lost the small changes would fall behind."""
    x, final = torch.rand(8, 20, 9) * 4, {}
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
        final[bf16] = losses
    assert final[False][-1] < 0.9 * final[False][0]
    assert np.allclose(final[True], final[False], rtol=0.01)


def test_moments_of_w_follow_training():
    """With w_prior=aggregate, samples draw w from the moments of q(w) in training, which change nothing else;
    evaluating leaves them as they are. Fails where they are not the posteriors' or are lost with a checkpoint."""
    plain, model = (
        build_model("light_dvae_local", **SMALL, w_prior=prior)
        for prior in ("standard", "aggregate")
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(64, 6, 9, generator=torch.Generator().manual_seed(0))
    noise = plain.draw_noise(64, 6, torch.Generator().manual_seed(1))
    assert torch.equal(plain.loss(x, noise)[0], model.loss(x, noise)[0])
    q_w = model(x, noise).q_w
    for _ in range(1_500):
        model.update_w_moments(q_w)
    mean, covariance = model.w_moments[0], model.w_moments[1:]
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
