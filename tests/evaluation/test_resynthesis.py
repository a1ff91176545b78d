"""Resynthesis of a corpus in batches: what a row holds must be its own utterance's."""

import numpy as np
import pytest
import torch

from minidvae.data.audio import SAMPLE_RATE, STFT
from minidvae.data.corpus import load_corpus
from minidvae.evaluation import metrics, resynthesis
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


def test_batches_hold_every_utterance_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 900, size=200).tolist() + [5000]
    groups = resynthesis.batches(lengths, 4000)
    assert sorted(index for group in groups for index in group) == list(range(201))
    assert all(
        len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 4000 for group in groups
    )
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded < 1.2 * sum(lengths) and len(groups) < 2 * sum(lengths) / 4000


def test_evaluation_in_batches_keeps_utterances_apart(speech, tmp_path, monkeypatch):
    """Batches go by length, results by the corpus: a row must hold the measures of the utterance that it names, made
    with that utterance's own noise."""
    corpus = load_corpus(speech, progress=False)
    model, stft, test = small(), STFT(), corpus.split("test")
    run = Run(tmp_path, "light_dvae", model, stft, {}, str(speech), corpus, test)
    scores = []

    def first_samples(pairs):
        scores.extend(
            {"first": float(estimate[1000]), "samples": len(original)}
            for original, estimate in pairs
        )
        return scores

    monkeypatch.setattr(metrics, "metrics_of", first_samples)
    result = resynthesis.evaluate_run(run, Options())
    rows = result.values["utterances"]
    assert [row["name"] for row in rows] == [utterance.name for utterance in test.utterances]
    for index, row in enumerate(rows):
        waveform, noise = test.waveform(index), generator_for(0, row["name"])
        ((alone, _),) = resynthesis.resynthesise(model, stft, [waveform], "generation", [noise])
        assert row["samples"] == len(waveform) == round(row["seconds"] * SAMPLE_RATE)
        assert row["first"] == pytest.approx(alone[1000], abs=1e-4)
    shown = [utterance.name for utterance in test.utterances[: resynthesis.EXAMPLES]]
    assert sorted(figure.group for figure in result.figures) == sorted(shown)
    for name in shown:
        sounds = [sound for sound in result.sounds if sound.group == name]
        assert [sound.label for sound in sounds] == ["original", "resynthesis"]
