"""The script that copies the hour of LibriSpeech, on a mock of the official download."""

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
    """Return a folder like that of LibriSpeech, with 0.2 s of noise for every utterance of the list
    and for two that are not in it."""
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
    """Fails if the list has other columns, speakers twice or in two splits, or not the numbers that
    the README gives."""
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
    assert len({speaker for speaker, _, _ in voices}) == 256
    assert {sex for _, sex, _ in voices} == {"F", "M"}
    assert all(utterance.split("-")[0] == speaker for utterance, _, speaker, _, _ in ROWS[1:])


def test_the_list_is_that_of_the_speech(shared):
    """Fails if an utterance that our tables use is not in the list, or has another speaker, sex or
    split there."""
    corpus = load_corpus(shared / "speech/LibriSpeech", progress=False, note=str)
    assert utterances_of(corpus) == utterances_of_list()


def utterances_of(corpus) -> set[tuple[str, str, str, str]]:
    """Return (name, speaker, sex, split) of every utterance."""
    return {(u.name, u.speaker, u.sex, u.split) for u in corpus.utterances}


def utterances_of_list() -> set[tuple[str, str, str, str]]:
    return {(utterance, speaker, sex, split) for utterance, _, speaker, sex, split in ROWS[1:]}


def test_hour(official, tmp_path, capsys):
    """Fails if utterances are missing, changed, too many or in another split, or the sex of a
    speaker is not known."""
    assert call(librispeech_hour, official, tmp_path / "new/hour") == 0
    expected = "201 utterances in train, 50 utterances in dev, 50 utterances in test"
    assert expected in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hour"]
    original = official / "test-other/367/130732/367-130732-0000.flac"
    copy = tmp_path / "new/hour/test/367/367-130732-0000.flac"
    assert copy.read_bytes() == original.read_bytes()
    notes = []
    corpus = load_corpus(tmp_path / "new/hour", progress=False, note=notes.append)
    assert corpus.layout == "LibriSpeech" and notes == []
    assert utterances_of(corpus) == utterances_of_list()


def test_bad_input(official, tmp_path, capsys):
    """Fails if the error is not one line that names the missing files, or a half-made folder
    remains."""
    target = tmp_path / "hour"
    (tmp_path / "empty").mkdir()
    shutil.copytree(official, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/test-other/367")
    for arguments, expected in (
        (
            [tmp_path / "nowhere", target],
            f"{tmp_path}/nowhere: no such folder; expected LibriSpeech",
        ),
        ([tmp_path / "empty", target], "empty: 301 of 301 utterances are missing (first: "),
        ([tmp_path / "part", target], "part: 10 of 301 utterances are missing"),
        ([tmp_path / "part", target], "test-other/367/130732/367-130732-0000.flac"),
        ([official, official], f"{official}: is there already"),
        ([official], "TARGET"),
    ):
        assert call(librispeech_hour, *arguments) == 2
        out, error = capsys.readouterr()
        assert not out and error.startswith("librispeech_hour.py: error: ")
        assert expected in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "part"]


def test_nothing_is_left_half_written(official, tmp_path, monkeypatch, capsys):
    """Fails if a full disk leaves a folder that looks complete, or ends in a traceback."""
    copies = []

    def fail_third(source, target):
        copies.append(target)
        if len(copies) == 3:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail_third)
    assert call(librispeech_hour, official, tmp_path / "new/hour") == 2
    assert "No space left on device\n" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []
