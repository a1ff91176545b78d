"""What the studies share, and what a decoder reads (studies/ablations.py)."""

from functools import partial
from pathlib import Path

import ablations
import benchmark
import numpy as np
import pytest
import study
import torch
from run_scripts import call, surroundings  # noqa: F401

from minidvae.data.audio import STFT
from minidvae.data.corpus import load_corpus
from minidvae.models import build_model
from minidvae.models.light_dvae import LigHTDVAE
from minidvae.training.config import SettingError


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A variant that has a checkpoint is not resumed, or is begun again; runs with other flags are
    mixed."""
    calls = []

    def train_once(script, *flags):
        calls.append([script, *map(str, flags)])
        folder = Path(flags[-1])
        folder.mkdir(exist_ok=True)
        if len(calls) == 2:
            raise KeyboardInterrupt
        (folder / "last.pt").touch()

    monkeypatch.setattr(study, "call", train_once)
    variants = {"one": ["--model", "vae"], "two": ["--model", "dkf"]}
    train = partial(study.train_all, variants, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(["--steps", "8"])
    assert train(["--steps", "8"]) == {title: tmp_path / title for title in variants}
    begin = ["train.py", "--steps", "8", "--model"]
    one = ["--run", str(tmp_path / "one")]
    two = ["--run", str(tmp_path / "two")]
    resumed = ["train.py", "--resume", *one]
    assert calls == [[*begin, "vae", *one], [*begin, "dkf", *two], resumed, [*begin, "dkf", *two]]
    with pytest.raises(SettingError, match="other flags"):
        train(["--steps", "9"])


def test_a_study_that_does_not_read(tmp_path, monkeypatch):
    """A study.json that was cut short ends in a traceback."""
    monkeypatch.setattr(study, "call", lambda *_: pytest.fail("a training began"))
    (tmp_path / "study.json").write_text('{"one": ["--mod')
    with pytest.raises(SettingError, match="study.json: truncated"):
        study.train_all({"one": ["--model", "vae"]}, tmp_path, [])


@pytest.mark.parametrize(
    "arguments",
    [
        (benchmark, "--recogniser", "nowhere"),
        (benchmark, "--recogniser", "light_dvae-librispeech"),
        (benchmark, "--recogniser", "light_dvae-librispeech", "--clips", "1"),
        (benchmark, "--minutes", "0"),
        (benchmark, "--minutes", "nan"),
        (benchmark, "--seeds", "0"),
        (ablations, "--limit", "0"),
        (ablations, "--limit", "many"),
    ],
)
def test_flags_are_checked_before_the_first_training(arguments, monkeypatch, capsys):
    """Hours of training end in an error that was known before."""
    monkeypatch.setattr(study, "call", lambda *_: pytest.fail("a training began"))
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and (arguments[-1].partition("=")[0] in error), error
    assert not Path("runs").exists()


def model_that_does_not_read(unread: str) -> LigHTDVAE:
    """Return a small LigHT-DVAE whose decoder does not read the past, z or w."""
    torch.manual_seed(0)
    model = build_model(
        "light_dvae",
        width=16,
        feedforward=32,
        layers=2,
        w_embedding=8,
        w_hidden=8,
        w_layers=2,
        latent=3,
        w_latent=4,
        input_scale="root",
    )
    for block in model.decoders[0].blocks:
        attention = block.cross_attention
        if unread == "past":
            attention.output.weight.data.zero_()
            attention.key_value.weight.data[: model.config.width] = 0  # keys
        else:
            attention.output.weight.data *= 5
    embedding = model.decoders[0].embed_latents.weight.data
    if unread == "z":
        embedding[:, : model.config.latent] = 0
    if unread == "w":
        embedding[:, model.config.latent :] = 0
    return model.eval()


@pytest.mark.parametrize(
    "unread, free",
    [
        ("past", {"generated past", "past of another"}),
        ("z", {"z of another"}),
        ("w", {"w of another"}),
    ],
)
def test_what_a_decoder_reads(unread, free, speech):
    """What the decoder cannot read must cost nothing when it is another's, and all else must. Where
    all keys are zeros, the weight on the first frame is 1 / (frames so far)."""
    model = model_that_does_not_read(unread)
    test = load_corpus(speech, progress=False).split("test")
    medians = ablations.divergences(model, STFT(), 20, test)
    weight = medians.pop(ablations.WEIGHT_ON_FIRST)
    assert tuple(medians) == ablations.CONDITIONS and 0 < weight < 1
    if unread == "past":
        assert weight == pytest.approx(np.mean([1 / (t + 1) for t in range(10, 20)]))
    for condition in ablations.CONDITIONS[1:]:
        costs_nothing = medians[condition] == pytest.approx(medians["its own"], rel=1e-5)
        assert costs_nothing == (condition in free), condition


def test_divergences_of_conditions_are_a_table():
    """A column is missing or stands under another's heading."""
    divergences = dict(zip(ablations.CONDITIONS, (1.4, 2.4, 3.4, 4.4, 5.4), strict=True))
    table = ablations.divergence_table({"one": divergences | {ablations.WEIGHT_ON_FIRST: 0.125}})
    assert table.heading == ["", *ablations.CONDITIONS, ablations.WEIGHT_ON_FIRST]
    assert table.rows == [["one", "1", "2", "3", "4", "5", "0.12"]]
