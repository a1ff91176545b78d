"""Exchange of the sequence latent, and the measures that tell which utterance it follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minidvae.data.audio import SAMPLE_RATE, STFT
from minidvae.data.corpus import CorpusError, load_corpus
from minidvae.evaluation import exchange, report, resynthesis
from minidvae.evaluation.runs import Options, Run, generator_for
from minidvae.models import build_model

SIZES = {
    "width": 16,
    "feedforward": 32,
    "layers": 1,
    "w_embedding": 8,
    "w_hidden": 8,
    "w_layers": 2,
}


def small(**config) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("light_dvae", **(SIZES | {"latent": 3, "w_latent": 4} | config)).eval()


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
    stays, goes, between = (
        exchange.compare(low, high, here, low, STFT()) for here in (low, high, middle)
    )
    for measure in ("spectrum", "f0"):
        assert stays[f"{measure}_follows_w"] == 0 and goes[f"{measure}_follows_w"] == 1
        assert 0.2 < between[f"{measure}_follows_w"] < 0.8
        assert between[f"{measure}_own_speaker"] == 0
        moved = exchange.compare(low, high, low, middle, STFT())
        assert moved[f"{measure}_own_speaker"] == between[f"{measure}_from_z"] > 0
    assert stays["f0_between"] == pytest.approx(np.log(210 / 110), abs=0.01)
    assert between["f0_follows_w"] == pytest.approx(np.log(150 / 110) / np.log(210 / 110), abs=0.02)
    near = voice(112, 1500)
    assert np.isnan(
        exchange.compare(low, near, high, low, STFT())["f0_follows_w"]
    )  # too near to tell
    louder = exchange.compare(low, high + 3.0, low - 2.0, low, STFT())
    assert louder["spectrum_follows_w"] < 1e-3  # loudness is no speaker


@pytest.mark.parametrize("name", ["light_dvae", "dsae"])
def test_exchange(name, speech, tmp_path, monkeypatch):
    """A's z with A's w must be A's resynthesis, each exchange must have its own z and the other's w, and everything
    must be written."""
    monkeypatch.setattr(exchange, "EXAMPLES", 1)
    torch.manual_seed(0)
    model = build_model(name, **(SIZES if name != "dsae" else {}), input_scale="root").eval()
    corpus = load_corpus(speech, progress=False)
    test = corpus.split("test")
    run = Run(tmp_path, name, model, STFT(), {"model": name}, str(speech), corpus, test)

    with torch.no_grad():
        a, b = (exchange.analyse(run, index, 0) for index in (0, len(test) - 1))
        latents = ((a, a), (b, b), (a, b), (b, a))
        own_a, own_b, a_with_b, b_with_a = (exchange.decode(model, z, w) for z, w in latents)
        for speech_of, own in ((a, own_a), (b, own_b)):
            noise = generator_for(0, speech_of.utterance.name)
            ((_, expected),) = resynthesis.resynthesise(
                model, STFT(), [speech_of.waveform], "generation", [noise]
            )
            assert np.abs(own.numpy() - expected).max() < 1e-4
        assert (a_with_b - model.decode(a.z, b.w)[0]).abs().max() < 1e-4
        assert (b_with_a - model.decode(b.z, a.w)[0]).abs().max() < 1e-4

    with torch.no_grad():
        again = exchange.analyse(run, exchange.another_of_speaker(test, 0), 0)
        near = exchange.mean_log_spectrum(exchange.decode(model, a, again))
    expected = (near - exchange.mean_log_spectrum(own_a)).square().mean().sqrt()

    (result,) = exchange.evaluate([run], Options()).results
    rows = result.values["exchanges"]
    assert rows[0]["z"] == a.utterance.name
    assert rows[0]["spectrum_own_speaker"] == pytest.approx(float(expected), abs=1e-4)
    assert len(rows) == 2 * len(exchange.conversion_pairs(test, exchange.PAIRS, 0))
    for row in rows:
        speakers = {u.name: u.speaker for u in test.utterances}
        assert speakers[row["z"]] != speakers[row["w"]] and 0 <= row["spectrum_follows_w"] <= 1
    first = rows[0]["z"]
    second = rows[0]["w"]
    group = f"{first}--{second}"
    exchanged = [f"z of {first}, w of {second}", f"z of {second}, w of {first}"]
    labels = [first, second]
    for label in exchanged:
        labels += [label, f"{label}, Griffin-Lim"]
    assert [(sound.group, sound.label) for sound in result.sounds] == [(group, x) for x in labels]
    assert [figure.group for figure in result.figures] == [group]


def test_exchange_of_speakers_with_one_utterance(speech, tmp_path):
    """There is no other w of the same speaker, which must not count as one that changes nothing."""
    corpus = load_corpus(speech, progress=False)
    test = corpus.split("test")
    one_each = {utterance.speaker: utterance for utterance in test.utterances}.values()
    test = replace(test, utterances=tuple(one_each))
    model = small(input_scale="root")
    run = Run(tmp_path, "light_dvae", model, STFT(), {}, str(speech), corpus, test)
    (result,) = exchange.evaluate([run], Options()).results
    assert all(np.isnan(row["spectrum_own_speaker"]) for row in result.values["exchanges"])
    cells = dict(
        zip(
            exchange.COLUMNS,
            report.summary_cells(result.values["summary"], exchange.COLUMNS),
            strict=True,
        )
    )
    assert (
        cells["spectrum_own_speaker"] == cells["f0_own_speaker"] == "–" != cells["spectrum_from_z"]
    )


def test_exchange_needs_two_speakers(speech, tmp_path):
    corpus = load_corpus(speech, progress=False)
    one = corpus.split("dev")  # of one speaker
    first = replace(one, utterances=one.utterances[:1])
    assert [
        exchange.another_of_speaker(one, 0),
        exchange.another_of_speaker(one, 1),
        exchange.another_of_speaker(first, 0),
    ] == [
        1,
        0,
        0,
    ]
    run = Run(tmp_path, "light_dvae", small(), STFT(), {}, str(speech), corpus, one)
    with pytest.raises(CorpusError, match="one speaker"):
        exchange.evaluate_run(run, Options())
