"""Resynthesis of a corpus in batches."""

import numpy as np
import pytest
import torch

from minidvae.data.audio import SAMPLE_RATE, STFT
from minidvae.data.corpus import load_corpus
from minidvae.evaluation import metrics, resynthesis
from minidvae.evaluation.runs import Options, Run, generator_for
from minidvae.models import build_model

SIZES = {"width": 16, "feedforward": 32, "layers": 1, "latent": 3, "w_latent": 4}
SIZES |= {"w_embedding": 8, "w_hidden": 8, "w_layers": 2}


def test_batches_hold_every_utterance_once_and_little_padding():
    """Fails if an utterance is lost, a batch has more than 4,000 frames, or batches are so small
    or so mixed in length that time is lost."""
    lengths = np.random.default_rng(0).integers(1, 900, size=200).tolist() + [5000]
    batches = resynthesis.batches(lengths, 4000)
    indices = []
    num_frames = 0
    for batch in batches:
        indices += batch
        frames_of_batch = len(batch) * max(lengths[i] for i in batch)
        assert len(batch) == 1 or frames_of_batch <= 4000
        num_frames += frames_of_batch
    assert sorted(indices) == list(range(201))
    assert num_frames < 1.2 * sum(lengths) and len(batches) < 2 * sum(lengths) / 4000


def sample_1000_as_metrics(pairs) -> list[dict]:
    """Return, instead of metrics, what identifies an original and its resynthesis."""
    rows = []
    for original, estimate in pairs:
        rows.append({"sample_1000": float(estimate[1000]), "samples": len(original)})
    return rows


def test_evaluation_in_batches_keeps_utterances_apart(speech, tmp_path, monkeypatch):
    """Batches are ordered by length, rows as in the corpus. A row must hold the measures of the
    utterance that it names, resynthesised with the noise of that utterance."""
    corpus = load_corpus(speech, progress=False)
    torch.manual_seed(0)
    model = build_model("light_dvae", **SIZES).eval()
    stft = STFT()
    test = corpus.split("test")
    run = Run(tmp_path, "light_dvae", model, stft, {}, str(speech), corpus, test)
    monkeypatch.setattr(metrics, "metrics_of", sample_1000_as_metrics)
    result = resynthesis.evaluate_run(run, Options())
    rows = result.values["utterances"]
    assert [row["name"] for row in rows] == [utterance.name for utterance in test.utterances]
    for index, row in enumerate(rows):
        waveform = test.waveform(index)
        noise = generator_for(0, row["name"])
        ((alone, _),) = resynthesis.resynthesise(model, stft, [waveform], "generation", [noise])
        assert row["samples"] == len(waveform) == round(row["seconds"] * SAMPLE_RATE)
        assert row["sample_1000"] == pytest.approx(alone[1000], abs=1e-4)
    shown = [utterance.name for utterance in test.utterances[: resynthesis.EXAMPLES]]
    assert sorted(figure.group for figure in result.figures) == sorted(shown)
    for name in shown:
        sounds = [sound for sound in result.sounds if sound.group == name]
        assert [sound.label for sound in sounds] == ["original", "resynthesis"]
