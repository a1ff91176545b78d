"""Exchange of the sequence latent w, and the measures of which utterance the result follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minidvae.data.audio import SAMPLE_RATE, STFT
from minidvae.data.corpus import CorpusError, load_corpus
from minidvae.evaluation import exchange, report, resynthesis
from minidvae.evaluation.runs import Options, Run, generator_for
from minidvae.models import build_model

SIZES = {"width": 16, "feedforward": 32, "layers": 1}
SIZES |= {"w_embedding": 8, "w_hidden": 8, "w_layers": 2}


def small(**config) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("light_dvae", **(SIZES | {"latent": 3, "w_latent": 4} | config)).eval()


def voice(f0: float, formant: float, frames: int = 20) -> torch.Tensor:
    """Return the log-power (frames, 513) of harmonics of f0 with one resonance, both in Hz."""
    time = torch.arange(STFT().samples(frames), dtype=torch.float64) / SAMPLE_RATE
    harmonics = torch.arange(1, int(4000 / f0) + 1) * f0
    gains = torch.exp(-(((harmonics - formant) / 400) ** 2)) + 0.1
    waveform = (gains[:, None] * torch.cos(2 * torch.pi * harmonics[:, None] * time)).sum(0)
    return STFT().power(waveform).log()


def test_how_far_an_exchange_follows_w():
    """The measures must be 0 if the result is z's utterance, 1 if it is w's, and between 0 and 1
    for a voice between them."""
    low = voice(110, 500)
    middle = voice(150, 900)
    high = voice(210, 1500)
    like_z = exchange.compare(low, high, low, low, STFT())
    like_w = exchange.compare(low, high, high, low, STFT())
    between = exchange.compare(low, high, middle, low, STFT())
    moved_by_own_speaker = exchange.compare(low, high, low, middle, STFT())
    for measure in ("spectrum", "f0"):
        assert like_z[f"{measure}_follows_w"] == 0
        assert like_w[f"{measure}_follows_w"] == 1
        assert 0.2 < between[f"{measure}_follows_w"] < 0.8
        assert between[f"{measure}_own_speaker"] == 0
        distance = moved_by_own_speaker[f"{measure}_own_speaker"]
        assert distance == between[f"{measure}_from_z"] > 0
    assert like_z["f0_between"] == pytest.approx(np.log(210 / 110), abs=0.01)
    expected = np.log(150 / 110) / np.log(210 / 110)
    assert between["f0_follows_w"] == pytest.approx(expected, abs=0.02)
    # Two f0 that are nearly the same do not show which one the result follows.
    same_f0 = exchange.compare(low, voice(112, 1500), high, low, STFT())
    assert np.isnan(same_f0["f0_follows_w"])
    # Loudness does not count.
    louder = exchange.compare(low, high + 3.0, low - 2.0, low, STFT())
    assert louder["spectrum_follows_w"] < 1e-3


@pytest.mark.parametrize("name", ["light_dvae", "dsae"])
def test_exchange(name, speech, tmp_path, monkeypatch):
    """The z and w of one utterance must give its resynthesis. An exchange must be the z of one
    utterance with the w of the other. Every sound and figure must be in the result."""
    monkeypatch.setattr(exchange, "EXAMPLES", 1)
    torch.manual_seed(0)
    sizes = SIZES if name == "light_dvae" else {}
    model = build_model(name, **sizes, input_scale="root").eval()
    corpus = load_corpus(speech, progress=False)
    test = corpus.split("test")
    run = Run(tmp_path, name, model, STFT(), {"model": name}, str(speech), corpus, test)

    with torch.no_grad():
        a = exchange.analyse(run, 0, 0)
        b = exchange.analyse(run, len(test) - 1, 0)
        for analysis in (a, b):
            noise = generator_for(0, analysis.utterance.name)
            ((_, expected),) = resynthesis.resynthesise(
                model, STFT(), [analysis.waveform], "generation", [noise]
            )
            decoded = exchange.decode(model, analysis, analysis)
            assert np.abs(decoded.numpy() - expected).max() < 1e-4
        a_with_b = exchange.decode(model, a, b)
        assert (a_with_b - model.decode(a.z, b.w)[0]).abs().max() < 1e-4
        b_with_a = exchange.decode(model, b, a)
        assert (b_with_a - model.decode(b.z, a.w)[0]).abs().max() < 1e-4

        # The baseline is an exchange with another utterance of the same speaker.
        same_speaker = exchange.analyse(run, exchange.another_of_speaker(test, 0), 0)
        spectrum = exchange.mean_log_spectrum(exchange.decode(model, a, a))
        exchanged_spectrum = exchange.mean_log_spectrum(exchange.decode(model, a, same_speaker))
    expected = (exchanged_spectrum - spectrum).square().mean().sqrt()

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
    """Without another utterance of the same speaker, the measures of its w must be unknown, not
    zero."""
    corpus = load_corpus(speech, progress=False)
    test = corpus.split("test")
    one_each = {utterance.speaker: utterance for utterance in test.utterances}.values()
    test = replace(test, utterances=tuple(one_each))
    model = small(input_scale="root")
    run = Run(tmp_path, "light_dvae", model, STFT(), {}, str(speech), corpus, test)
    (result,) = exchange.evaluate([run], Options()).results
    assert all(np.isnan(row["spectrum_own_speaker"]) for row in result.values["exchanges"])
    cells = report.summary_cells(result.values["summary"], exchange.COLUMNS)
    cells = dict(zip(exchange.COLUMNS, cells, strict=True))
    assert cells["spectrum_own_speaker"] == cells["f0_own_speaker"] == "–"
    assert cells["spectrum_from_z"] != "–"


def test_exchange_needs_two_speakers(speech, tmp_path):
    corpus = load_corpus(speech, progress=False)
    one_speaker = corpus.split("dev")
    one_utterance = replace(one_speaker, utterances=one_speaker.utterances[:1])
    assert exchange.another_of_speaker(one_speaker, 0) == 1
    assert exchange.another_of_speaker(one_speaker, 1) == 0
    assert exchange.another_of_speaker(one_utterance, 0) == 0
    run = Run(tmp_path, "light_dvae", small(), STFT(), {}, str(speech), corpus, one_speaker)
    with pytest.raises(CorpusError, match="one speaker"):
        exchange.evaluate_run(run, Options())
