"""The hour of LibriSpeech out of a mock of the official download."""

import shutil
from collections import Counter

import librispeech_hour
import numpy as np
import pytest
import soundfile
from run_scripts import call, surroundings  # noqa: F401

from minidvae.data.corpus import load_corpus

ROWS = [line.split("\t") for line in librispeech_hour.LIST.read_text().splitlines()]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """LibriSpeech as it is published: every utterance of the list, 0.2 s of noise, and some that are not in it."""
    folder = tmp_path_factory.mktemp("official") / "LibriSpeech"
    random = np.random.default_rng(0)
    others = [("19-198-0099", "train-clean-100"), ("84-121123-0000", "dev-clean")]
    for utterance, subset, *_ in ROWS[1:] + others:
        speaker, chapter, _ = utterance.split("-")
        path = folder / subset / speaker / chapter / f"{utterance}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, random.uniform(-0.5, 0.5, 3200), 16_000)
    return folder


def test_the_list_is_that_of_the_tables():
    """The list has other columns, speakers twice or in two splits, or not the numbers that the README gives."""
    assert ROWS[0] == ["utterance", "subset", "speaker", "sex", "split"]
    assert len({utterance for utterance, *_ in ROWS[1:]}) == 301
    splits = Counter((split, subset) for _, subset, _, _, split in ROWS[1:])
    assert splits == {
        ("train", "train-clean-100"): 201,
        ("dev", "train-clean-100"): 50,
        ("test", "test-other"): 50,
    }
    voices = {(speaker, sex, split) for _, _, speaker, sex, split in ROWS[1:]}
    assert Counter(split for _, _, split in voices) == {"train": 201, "dev": 50, "test": 5}
    assert len({speaker for speaker, _, _ in voices}) == 256 and {sex for _, sex, _ in voices} == {
        "F",
        "M",
    }
    assert all(utterance.split("-")[0] == speaker for utterance, _, speaker, _, _ in ROWS[1:])


def test_the_list_is_that_of_the_speech(shared):
    """An utterance that our tables use is not in the list, or stands in it with another speaker, sex or split."""
    corpus = load_corpus(shared / "speech/LibriSpeech", progress=False, note=str)
    used = {(u.name, u.speaker, u.sex, u.split) for u in corpus.utterances}
    assert used == {
        (utterance, speaker, sex, split) for utterance, _, speaker, sex, split in ROWS[1:]
    }


def test_hour(official, tmp_path, capsys):
    """Utterances are missing, changed, too many or in another split, or a speaker's sex is not known."""
    assert call(librispeech_hour, official, tmp_path / "new/hour") == 0
    assert (
        "201 utterances in train, 50 utterances in dev, 50 utterances in test"
        in capsys.readouterr().out
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hour"]
    copy = tmp_path / "new/hour/test/367/367-130732-0000.flac"
    assert (
        copy.read_bytes() == (official / "test-other/367/130732/367-130732-0000.flac").read_bytes()
    )
    notes = []
    corpus = load_corpus(tmp_path / "new/hour", progress=False, note=notes.append)
    assert corpus.layout == "LibriSpeech" and notes == []
    found = {(u.name, u.speaker, u.sex, u.split) for u in corpus.utterances}
    assert found == {
        (utterance, speaker, sex, split) for utterance, _, speaker, sex, split in ROWS[1:]
    }


def test_bad_input(official, tmp_path, capsys):
    """What is missing does not give one line with its name, or leaves a half-made folder."""

    def line(*arguments):
        assert call(librispeech_hour, *arguments) == 2
        out, error = capsys.readouterr()
        assert (
            not out and error.startswith("librispeech_hour.py: error: ") and error.count("\n") == 1
        )
        return error

    target = tmp_path / "hour"
    assert f"{tmp_path}/nowhere: no such folder; expected LibriSpeech" in line(
        tmp_path / "nowhere", target
    )
    (tmp_path / "empty").mkdir()
    assert "empty: 301 of 301 utterances are missing (first: " in line(tmp_path / "empty", target)
    shutil.copytree(official, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/test-other/367")
    error = line(tmp_path / "part", target)
    assert (
        "part: 10 of 301 utterances are missing" in error
        and "test-other/367/130732/367-130732-0000.flac" in error
    )
    assert f"{official}: is there already" in line(official, official)
    assert "TARGET" in line(official)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "part"]


def test_nothing_is_left_half_written(official, tmp_path, monkeypatch, capsys):
    """A full disk leaves a folder that looks like the hour, or gives a traceback."""
    copies = []

    def fail_third(source, target):
        copies.append(target)
        if len(copies) == 3:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail_third)
    assert call(librispeech_hour, official, tmp_path / "new/hour") == 2
    assert "No space left on device\n" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []
