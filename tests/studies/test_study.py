"""What the studies share, and what a decoder reads (studies/ablations.py)."""

from functools import partial
from pathlib import Path

import ablations
import architectures
import benchmark
import numpy as np
import pytest
import recognition
import study
import torch
from run_scripts import call, surroundings  # noqa: F401

from minidvae.data.audio import STFT
from minidvae.data.corpus import load_corpus
from minidvae.models import build_model
from minidvae.training.config import SettingError


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A variant that has a checkpoint is resumed, never begun again; flags of another study are refused."""
    calls = []

    def trained(script, *flags):
        calls.append([script, *map(str, flags)])
        (Path(calls[-1][-1])).mkdir(exist_ok=True)
        if len(calls) == 2:
            raise KeyboardInterrupt
        (Path(calls[-1][-1]) / "last.pt").touch()

    monkeypatch.setattr(study, "call", trained)
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


def test_a_study_that_does_not_read(tmp_path, monkeypatch):
    """A study.json that was cut short ends in a traceback."""
    monkeypatch.setattr(study, "call", lambda *_: pytest.fail("a training began"))
    (tmp_path / "study.json").write_text('{"one": ["--mod')
    with pytest.raises(SettingError, match="study.json: truncated"):
        study.train_all({"one": ["--model", "vae"]}, tmp_path, [])


@pytest.mark.parametrize(
    "arguments",
    [
        (recognition, "2", "--extractor", "nowhere"),
        (recognition, "2", "--extractor", "light_dvae-librispeech"),
        (recognition, "2", "--recogniser-set", "widht=8"),
        (recognition, "2", "--recogniser-steps", "0"),
        (recognition, "2", "--recogniser-steps", "many"),
        (recognition, "2", "--lexicon", "nowhere"),
        (recognition, "2", "--limit", "0"),
        (benchmark, "--recogniser", "nowhere"),
        (benchmark, "--recogniser", "light_dvae-librispeech"),
        (benchmark, "--recogniser", "light_dvae-librispeech", "--clips", "1"),
        (benchmark, "--minutes", "0"),
        (benchmark, "--minutes", "nan"),
        (benchmark, "--seeds", "0"),
        (ablations, "--limit", "0"),
        (architectures, "--limit", "many"),
    ],
)
def test_flags_are_checked_before_the_first_training(arguments, monkeypatch, capsys):
    """Hours of training end in an error that was known before."""
    monkeypatch.setattr(study, "call", lambda *_: pytest.fail("a training began"))
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and (arguments[-1].partition("=")[0] in error), error
    assert not Path("runs").exists()


@pytest.mark.parametrize("shut", ["past", "z", "w"])
def test_what_a_decoder_reads(shut, speech, monkeypatch):
    """What the decoder cannot read must cost nothing when it is another's, and all else must. With keys of zeros all
    frames so far weigh the same."""
    sizes = {
        "width": 16,
        "feedforward": 32,
        "layers": 2,
        "w_embedding": 8,
        "w_hidden": 8,
        "latent": 3,
        "w_latent": 4,
    }
    torch.manual_seed(0)
    model = build_model("light_dvae", **sizes, w_layers=2, input_scale="root").eval()
    for block in model.decoders[0].blocks:
        block.cross_attention.output.weight.data *= 0 if shut == "past" else 5
        block.cross_attention.key_value.weight.data[: model.config.width] *= shut != "past"
    latent, weight = model.config.latent, model.decoders[0].embed_latents.weight.data
    weight[:, {"z": slice(latent), "w": slice(latent, None), "past": slice(0)}[shut]] = 0
    found = ablations.divergences(
        model, STFT(), 20, load_corpus(speech, progress=False).split("test")
    )
    weight = found.pop(ablations.FIRST)
    assert list(found) == list(ablations.GIVEN) and 0 < weight < 1
    assert shut != "past" or weight == pytest.approx(np.mean([1 / (t + 1) for t in range(10, 20)]))
    same = {
        name
        for name, value in found.items()
        if value == pytest.approx(found["all its own"], rel=1e-5)
    }
    free = {
        "past": {"generated past", "past of another"},
        "z": {"z of another"},
        "w": {"w of another"},
    }
    assert same == {"all its own"} | free[shut]
