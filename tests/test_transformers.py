"""HiT-DVAE and LigHT-DVAE beyond the contract: batches of utterances, long ones, compiled, in bf16; exchange of w."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from doors import ROOT, surroundings  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from minidvae import metrics
from minidvae.audio import SAMPLE_RATE, STFT
from minidvae.corpus import CorpusError, load_corpus
from minidvae.experiments import Options, Run, exchange, resynthesis
from minidvae.models import build_model
from minidvae.models.base import past
from minidvae.models.hit_dvae import Attention
from minidvae.recipes import SettingError

SIZES = {"width": 16, "feedforward": 32, "layers": 2, "w_embedding": 8, "w_hidden": 8, "w_layers": 2}
SMALL = SIZES | {"bins": 9, "latent": 3, "w_latent": 4}


def small(name="light_dvae", **config) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(name, **(SMALL | config)).eval()


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae", "vae"])
@pytest.mark.parametrize("mode", ["generation", "teacher_forcing"])
def test_a_batch_of_utterances_is_each_by_itself(name, mode):
    """Fails where padding reaches w, the encoder's attention or another utterance."""
    settings = {"bins": 9, "latent": 3, "hidden": (8,)} if name == "vae" else SMALL
    torch.manual_seed(0)
    model = build_model(name, **settings).eval()
    spectra = [torch.rand(length, 9) * 4 for length in (5, 12, 1, 9, 12)]
    noises = [model.draw_noise(1, len(x)) for x in spectra]
    together = list(model.resynthesise_each(spectra, mode, noises))
    for x, noise, log_variance in zip(spectra, noises, together, strict=True):
        alone = model.resynthesise(x[None], mode, noise)[0]
        assert log_variance.shape == x.shape and (log_variance - alone).abs().max() < 1e-5


def test_batches_hold_every_utterance_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 900, size=200).tolist() + [5000]
    groups = resynthesis.batches(lengths, 4000)
    assert sorted(index for group in groups for index in group) == list(range(201))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 4000 for group in groups)
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded < 1.2 * sum(lengths) and len(groups) < 2 * sum(lengths) / 4000


def test_evaluation_in_batches_keeps_utterances_apart(speech, tmp_path, monkeypatch):
    """Batches go by length, results by the corpus: a row must hold the measures of the utterance that it names, made
    with that utterance's own noise."""
    test = load_corpus(speech, progress=False).split("test")
    model, stft = small(bins=513), STFT()
    scores = []

    def first_samples(pairs, progress):
        scores.extend({"first": float(estimate[1000]), "samples": len(original)} for original, estimate in pairs)
        return scores

    monkeypatch.setattr(metrics, "resynthesis_metrics_of", first_samples)
    rows = resynthesis.evaluate(model, stft, test, "generation", tmp_path / "eval")["utterances"]
    assert [row["name"] for row in rows] == [utterance.name for utterance in test.utterances]
    for index, row in enumerate(rows):
        waveform, seed = test.waveform(index), resynthesis.seed_of(0, row["name"])
        ((alone, _),) = resynthesis.resynthesise(model, stft, [waveform], "generation", [seed])
        assert row["samples"] == len(waveform) == round(row["seconds"] * SAMPLE_RATE)
        assert row["first"] == pytest.approx(alone[1000], abs=1e-4)
    assert (tmp_path / "eval" / f"{rows[0]['name']}.png").is_file()


def test_thirty_seconds_from_the_cache():
    """1,875 frames, one at a time, must be what one pass over all of them gives."""
    model, x = small(layers=1).double(), torch.rand(1, 1875, 9, dtype=torch.float64)
    noise = model.draw_noise(1, 1875)
    generated, output = model.resynthesise(x, "generation", noise), model(x, noise)
    own = past(model.feed_back(generated))
    again = model.likelihood(output.z, output.w, own, model.positions(1875))
    assert (again - generated).abs().max() < 1e-5


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
    assert all(module.fused for module in small(input_scale="root").modules() if isinstance(module, Attention))
    model = small(input_scale="power")
    unfused = {name for name, module in model.named_modules() if isinstance(module, Attention) and not module.fused}
    decoder = {f"decoders.0.blocks.{part}" for part in ("0.attention", "0.cross_attention", "1.cross_attention")}
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


@pytest.mark.parametrize(
    ("scale", "backend", "shares"), [("root", "aot_eager", [0.5]), ("power", "eager", [0.0, 0.5, 0.75])]
)
def test_a_training_step_compiles_whole(scale, backend, shares):
    """fullgraph raises at a graph break. Position offsets, own past, the LSTM and unfused attention are all inside, and
    the share of own past may change from step to step."""
    model, x = small(input_scale=scale, layers=1, w_layers=1, position_offset=50).train(), torch.rand(4, 5, 9)
    compiled = torch.compile(model.loss, fullgraph=True, backend=backend)
    for model.own_past in shares:
        found = []
        for loss in (model.loss, compiled):
            torch.manual_seed(1)
            model.zero_grad()
            value, _ = loss(x)
            value.backward()
            found.append([value.detach(), *(p.grad for p in model.parameters())])
        for plain, whole in zip(*found, strict=True):
            assert (plain - whole).abs().max() <= 1e-4 * plain.abs().max()


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


# ------------------------------------------------------------------------------------------------------ exchange


def voice(f0: float, formant: float, frames: int = 20) -> torch.Tensor:
    """The log-power of a buzz of so many Hz with one resonance, (frames, 513)."""
    time = torch.arange(STFT().samples(frames), dtype=torch.float64) / SAMPLE_RATE
    harmonics = torch.arange(1, int(4000 / f0) + 1) * f0
    gains = torch.exp(-(((harmonics - formant) / 400) ** 2)) + 0.1
    waveform = (gains[:, None] * torch.cos(2 * torch.pi * harmonics[:, None] * time)).sum(0)
    return STFT().power(waveform).log()


def test_how_far_an_exchange_follows_w():
    """0 where it stays with z's utterance, 1 where it goes to w's, between them for a voice between them."""
    low, high, middle = voice(110, 500), voice(210, 1500), voice(150, 900)
    stays, goes, between = (exchange.compare(low, high, here, low, STFT()) for here in (low, high, middle))
    for measure in ("spectrum", "f0"):
        assert stays[f"{measure}_follows_w"] == 0 and goes[f"{measure}_follows_w"] == 1
        assert 0.2 < between[f"{measure}_follows_w"] < 0.8
        assert between[f"{measure}_own_speaker"] == 0
        moved = exchange.compare(low, high, low, middle, STFT())
        assert moved[f"{measure}_own_speaker"] == between[f"{measure}_from_z"] > 0
    assert stays["f0_between"] == pytest.approx(np.log(210 / 110), abs=0.01)
    assert between["f0_follows_w"] == pytest.approx(np.log(150 / 110) / np.log(210 / 110), abs=0.02)
    near = voice(112, 1500)
    assert np.isnan(exchange.compare(low, near, high, low, STFT())["f0_follows_w"])  # too near to tell
    louder = exchange.compare(low, high + 3.0, low - 2.0, low, STFT())
    assert louder["spectrum_follows_w"] < 1e-3  # loudness is no speaker


@pytest.mark.parametrize("name", ["light_dvae", "dsae"])
def test_exchange(name, speech, tmp_path, monkeypatch):
    """A's z with A's w must be A's resynthesis, each exchange must have its own z and the other's w, and everything
    must be written."""
    monkeypatch.setattr(exchange, "EXAMPLES", 1)
    torch.manual_seed(0)
    model = build_model(name, **(SIZES | {"layers": 1} if name != "dsae" else {}), input_scale="root").eval()
    corpus = load_corpus(speech, progress=False)
    test = corpus.split("test")
    run = Run(tmp_path, name, model, STFT(), {"model": name}, str(speech), corpus, test, tmp_path / "eval")

    with torch.no_grad():
        a, b = (exchange.analyse(run, index, 0) for index in (0, len(test) - 1))
        own_a, own_b, a_with_b, b_with_a = exchange.decode(model, [(a, a), (b, b), (a, b), (b, a)])
        for speech_of, own in ((a, own_a), (b, own_b)):
            seed = resynthesis.seed_of(0, speech_of.utterance.name)
            ((_, expected),) = resynthesis.resynthesise(model, STFT(), [speech_of.waveform], "generation", [seed])
            assert np.abs(own.numpy() - expected).max() < 1e-4
        assert (a_with_b - model.decode(a.z, b.w)[0]).abs().max() < 1e-4
        assert (b_with_a - model.decode(b.z, a.w)[0]).abs().max() < 1e-4

    with torch.no_grad():
        again = exchange.analyse(run, exchange.another(test, 0), 0)
        near = exchange.mean_log_spectrum(exchange.decode(model, [(a, again)])[0])
    expected = (near - exchange.mean_log_spectrum(own_a)).square().mean().sqrt()

    (result,) = exchange.run([run], Options())
    assert result["exchanges"][0]["z"] == a.utterance.name
    assert result["exchanges"][0]["spectrum_own_speaker"] == pytest.approx(float(expected), abs=1e-4)
    kept = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert len(kept["exchanges"]) == 2 * len(exchange.conversion_pairs(test, exchange.PAIRS, 0))
    for row in result["exchanges"]:
        speakers = {u.name: u.speaker for u in test.utterances}
        assert speakers[row["z"]] != speakers[row["w"]] and 0 <= row["spectrum_follows_w"] <= 1
    first = result["exchanges"][0]
    exchanged = f"z-{first['z']}--w-{first['w']}"
    files = {path.name for path in (tmp_path / "eval").iterdir()}
    assert {f"{first['z']}--{first['w']}.png", f"{exchanged}.wav", f"{exchanged}-griffin-lim.wav"} <= files


def test_exchange_of_speakers_with_one_utterance(speech, tmp_path):
    """There is no other w of the same speaker, which must not count as one that changes nothing."""
    corpus = load_corpus(speech, progress=False)
    test = corpus.split("test")
    one_each = {utterance.speaker: utterance for utterance in test.utterances}.values()
    test = replace(test, utterances=tuple(one_each))
    model = small(bins=513, input_scale="root")
    run = Run(tmp_path, "light_dvae", model, STFT(), {}, str(speech), corpus, test, tmp_path / "eval")
    result = exchange.evaluate(run)
    assert all(np.isnan(row["spectrum_own_speaker"]) for row in result["exchanges"])
    cells = dict(zip(exchange.COLUMNS, exchange.cells(result["summary"]), strict=True))
    assert cells["spectrum_own_speaker"] == cells["f0_own_speaker"] == "–" != cells["spectrum_from_z"]


def test_exchange_needs_two_speakers(speech, tmp_path):
    corpus = load_corpus(speech, progress=False)
    one = corpus.split("dev")  # of one speaker
    first = replace(one, utterances=one.utterances[:1])
    assert [exchange.another(one, 0), exchange.another(one, 1), exchange.another(first, 0)] == [1, 0, 0]
    run = Run(tmp_path, "light_dvae", small(bins=513), STFT(), {}, str(speech), corpus, one, tmp_path / "eval")
    with pytest.raises(CorpusError, match="one speaker"):
        exchange.evaluate(run)


# --------------------------------------------------------------------------------------------------------- study


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A variant that has a checkpoint is resumed, never begun again; flags of another study are refused."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import study

    calls = []

    def call(script, *flags):
        calls.append([script, *map(str, flags)])
        (Path(calls[-1][-1])).mkdir(exist_ok=True)
        if len(calls) == 2:
            raise KeyboardInterrupt
        (Path(calls[-1][-1]) / "last.pt").touch()

    monkeypatch.setattr(study, "call", call)
    variants = {"one": ["--model", "vae"], "two": ["--model", "dkf"]}
    train = partial(study.train_all, variants, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(["--steps", "8"])
    assert train(["--steps", "8"]) == {title: tmp_path / title for title in variants}
    begin = ["train.py", "--steps", "8", "--model"]
    one, two = ["--run", str(tmp_path / "one")], ["--run", str(tmp_path / "two")]
    resumed = ["train.py", "--resume", *one]
    assert calls == [[*begin, "vae", *one], [*begin, "dkf", *two], resumed, [*begin, "dkf", *two]]
    with pytest.raises(SettingError, match="other flags"):
        train(["--steps", "9"])


@pytest.mark.parametrize("shut", ["past", "z", "w"])
def test_what_a_decoder_reads(shut, speech, monkeypatch):
    """What the decoder cannot read must cost nothing when it is another's, and all else must. With keys of zeros all
    frames so far weigh the same."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import ablations

    model = small(bins=513, input_scale="root")
    for block in model.decoders[0].blocks:
        block.cross_attention.output.weight.data *= 0 if shut == "past" else 5
        block.cross_attention.key_value.weight.data[: model.config.width] *= shut != "past"
    latent, weight = model.config.latent, model.decoders[0].embed_latents.weight.data
    weight[:, {"z": slice(latent), "w": slice(latent, None), "past": slice(0)}[shut]] = 0
    found = ablations.divergences(model, STFT(), 20, load_corpus(speech, progress=False).split("test"))
    weight = found.pop(ablations.FIRST)
    assert list(found) == list(ablations.GIVEN) and 0 < weight < 1
    assert shut != "past" or weight == pytest.approx(np.mean([1 / (t + 1) for t in range(10, 20)]))
    same = {name for name, value in found.items() if value == pytest.approx(found["all its own"], rel=1e-5)}
    free = {"past": {"generated past", "past of another"}, "z": {"z of another"}, "w": {"w of another"}}
    assert same == {"all its own"} | free[shut]
