"""Corpora: layouts, manifests, bad input, the packed cache, random and consecutive crops."""

import errno
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.stats import chi2

from minidvae.data import audio, packing, synthetic
from minidvae.data.corpus import Corpus, CorpusError, Utterance, absolute, load_corpus
from minidvae.data.crops import Augmentation, RandomCrops, consecutive_crops
from minidvae.data.packing import CONDITIONS

RATE = 16000
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".wv1": "NIST"}


def noise(seconds=0.3, rate=RATE, channels=1, seed=0):
    waveform = 0.3 * np.random.default_rng(seed).uniform(-1, 1, (round(seconds * rate), channels))
    return waveform.astype(np.float32).squeeze()


def write(path, waveform=None, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = noise() if waveform is None else waveform
    subtype = "VORBIS" if path.suffix.lower() == ".ogg" else "PCM_16"
    soundfile.write(path, waveform, rate, format=FORMATS[path.suffix.lower()], subtype=subtype)


@pytest.fixture
def load(tmp_path):
    """load_corpus with a cache of its own; the notes of the last call are in load.notes."""

    def call(source):
        call.notes = []
        return load_corpus(source, cache=tmp_path / "cache", progress=False, note=call.notes.append)

    return call


def fields(corpus, *names):
    return sorted(tuple(getattr(u, name) for name in names) for u in corpus.utterances)


# ---- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {  # layout → files of audio, files of text, the expected (speaker, split, sex, condition, text)
    "LibriSpeech": (
        [
            "train-clean-100/19/198/19-198-0000.flac",
            "dev-clean/84/121/84-121-0000.flac",
            "test-other/367/130/367-130-0001.flac",
        ],
        {
            "SPEAKERS.TXT": "; ID | SEX\n19 | F | train-clean-100\n84 | F | dev-clean\n367 | M | test-other\n",
            "train-clean-100/19/198/19-198.trans.txt": "19-198-0000 NORTHANGER ABBEY\n",
            "test-other/367/130/367-130.trans.txt": "367-130-0000 NO\n367-130-0001 YES  SIR\n",
        },
        [
            ("19", "train", "F", "", "NORTHANGER ABBEY"),
            ("84", "dev", "F", "", ""),
            ("367", "test", "M", "", "YES SIR"),
        ],
    ),
    "LibriSpeech in plain splits": (
        ["train/19/19-198-0000.ogg", "dev/84/84-121-0000.ogg", "test/367/367-130-0001.flac"],
        {"speakers.tsv": "speaker\tsex\tsplit\n19\tF\ttrain\n84\tM\tdev\n"},
        [("19", "train", "F", "", ""), ("84", "dev", "M", "", ""), ("367", "test", "", "", "")],
    ),
    "VoiceBank": (
        [
            "clean_trainset_28spk_wav/p227_001.wav",
            "clean_trainset_28spk_wav/p226_001.wav",
            "clean_trainset_28spk_wav/p287_003.wav",
            "clean_testset_wav/p232_001.wav",
            "noisy_testset_wav/p232_001.wav",
        ],
        {
            "trainset_28spk_txt/p227_001.txt": "Please call Stella.\n",
            "testset_txt/p232_001.txt": "No.\n",
        },
        [
            ("p226", "dev", "", "", ""),
            ("p227", "train", "", "", "Please call Stella."),
            ("p287", "dev", "", "", ""),
            ("p232", "test", "", "", "No."),
        ],
    ),
    "WSJ0": (
        [
            "wsj0/si_tr_s/011/011c0201.wv1",
            "wsj0/si_dt_05/050/050c0101.wav",
            "wsj0/si_et_05/440/440c0201.wav",
            "wsj0/si_tr_l/012/012c0201.wav",
        ],
        {"wsj0/si_tr_s/011/011c0200.dot": "The words. (011c0201)\nOthers (011c0202)\n"},
        [
            ("011", "train", "", "", "The words."),
            ("050", "dev", "", "", ""),
            ("440", "test", "", "", ""),
        ],
    ),
    "TIMIT": (
        [
            "TIMIT/TRAIN/DR1/FCJF0/SX127.WAV",
            "TIMIT/TRAIN/DR1/FCJF0/SA1.WAV",
            "TIMIT/TEST/DR1/MDAB0/SX139.WAV",
            "TIMIT/TEST/DR1/FAKS0/SX133.WAV",
            "TIMIT/TEST/DR1/FDRD1/SX33.WAV",
        ],
        {
            "TIMIT/TRAIN/DR1/FCJF0/SX127.TXT": "0 4800 The emperor had a mean temper.\n",
            "TIMIT/TRAIN/DR1/FCJF0/SX127.PHN": "0 1000 h#\n1000 2500 dh\n2500 4800 ix\n",
        },
        [
            ("FCJF0", "train", "F", "", "The emperor had a mean temper."),
            ("MDAB0", "test", "M", "", ""),
            ("FAKS0", "dev", "F", "", ""),
        ],
    ),
    "timit in lower case": (
        ["train/dr1/fcjf0/sx127.wav", "test/dr1/mdab0/sx139.wav", "test/dr1/faks0/sx133.wav"],
        {"test/dr1/mdab0/sx139.txt": "0 4800 Yes.\n"},
        [
            ("fcjf0", "train", "F", "", ""),
            ("mdab0", "test", "M", "", "Yes."),
            ("faks0", "dev", "F", "", ""),
        ],
    ),
    "Aurora-4": (
        [
            "train/clean/011/011c0201.wv1",
            "dev/noisy/050/050c0101.wav",
            "test/channel/440c0201.wav",
            "test/both/440c0201.wav",
        ],
        {},
        [
            ("011", "train", "", "clean", ""),
            ("050", "dev", "", "noisy", ""),
            ("440", "test", "", "both", ""),
            ("440", "test", "", "channel", ""),
        ],
    ),
    "split/speaker": (
        ["train/anna/a.wav", "valid/anna/more/b.flac", "test/bob/c.ogg", "train/d.wav"],
        {"train/anna/a.txt": "1 2 three"},
        [
            ("anna", "train", "", "", "1 2 three"),
            ("anna", "dev", "", "", ""),
            ("bob", "test", "", "", ""),
            ("train", "train", "", "", ""),
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path, load):
    """A folder in a known layout is read with other speakers, splits, sexes, conditions or words."""
    sounds, texts, expected = LAYOUTS[layout]
    for file in sounds:
        write(tmp_path / "speech" / file)
    for file, text in texts.items():
        (tmp_path / "speech" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "speech" / file).write_text(text)
    corpus = load(tmp_path / "speech")
    assert fields(corpus, "speaker", "split", "sex", "condition", "text") == sorted(expected)
    assert corpus.layout.lower() == layout.split(" in ")[0].lower()
    left_out = len(sounds) - len(expected)
    assert len(load.notes) == (left_out > 0)
    assert left_out == 0 or f"left out {left_out} of {len(sounds)}" in load.notes[0]
    names = [u.name for u in corpus.utterances]
    assert len(set(names)) == len(names) and not any("/" in name for name in names)  # fit for files


def test_phones(tmp_path, load):
    """Phone labels are lost, or are not in samples of the waveform where it was resampled."""
    for rate, speaker in ((RATE, "FCJF0"), (8000, "FDAW0")):
        write(tmp_path / f"t/TRAIN/DR1/{speaker}/SX1.WAV", noise(0.2, rate), rate)
        (tmp_path / f"t/TRAIN/DR1/{speaker}/SX1.PHN").write_text("0 1000 h#\n1000 1600 dh\n")
    corpus = load(tmp_path / "t")
    assert {u.speaker: u.phones for u in corpus.utterances} == {
        "FCJF0": ((0, 1000, "h#"), (1000, 1600, "dh")),
        "FDAW0": ((0, 2000, "h#"), (2000, 3200, "dh")),
    }


@pytest.mark.parametrize(
    "line",
    [
        "h# 0 1000",  # another order of the columns
        "1200 1100 dh",  # stops before it starts
        "500 1600 dh",  # starts before the one above it
        "-1 1600 dh",
        "1600 3201 dh",  # beyond the end
        f"1600 {'9' * 4000} dh",
        f"1600 {'9' * 5000} dh",  # more digits than Python takes
    ],
)
def test_wrong_phones(line, tmp_path, load):
    """A phone label that cannot be is taken, or its error does not name the file, the line and what would be right."""
    write(tmp_path / "speech/train/a/x.wav", noise(0.4, 8000), 8000)
    (tmp_path / "speech/train/a/x.phn").write_text(f"0 1000 h#\n\n1000 1600 dh\n{line}\n")
    with pytest.raises(
        CorpusError, match=r"x\.phn: line 4: .* start stop label.*3200 samples"
    ) as raised:
        load(tmp_path / "speech")
    assert len(str(raised.value)) < 300
    (tmp_path / "speech/train/a/x.phn").write_text("0 1000 h#\n1000 3200 dh\n")
    assert load(tmp_path / "speech").utterances[0].phones[-1] == (2000, 6400, "dh")


def test_splits_drawn_by_speaker(tmp_path, load):
    """Drawn splits share a speaker, dev and test are not a tenth each, or they change between runs."""
    for speaker in range(20):
        for k in range(2):
            write(tmp_path / f"speech/s{speaker}/{k}.wav")
    corpus = load(tmp_path / "speech")
    by_split = {split: set(corpus.split(split).speakers) for split in ("train", "dev", "test")}
    assert [len(speakers) for speakers in by_split.values()] == [16, 2, 2]
    assert len(set.union(*by_split.values())) == 20
    assert len(load.notes) == 1
    assert "drew 2 speakers for dev, 2 speakers for test, 16 speakers for train" in load.notes[0]
    again = load_corpus(tmp_path / "speech", cache=tmp_path / "other", progress=False, note=str)
    assert again.utterances == corpus.utterances


@pytest.mark.parametrize(
    "count, splits", [(1, ["train"]), (2, ["dev", "train"]), (3, ["dev", "test", "train"])]
)
def test_splits_drawn_from_few_files(count, splits, tmp_path, load):
    """A flat folder of few files has an empty training set, or lacks a split that it could have."""
    for k in range(count):
        write(tmp_path / f"hello/{k}.wav")
    corpus = load(tmp_path / "hello")
    assert sorted(u.split for u in corpus.utterances) == splits
    assert corpus.speakers == ("hello",)


def test_missing_splits(tmp_path, load):
    """A missing dev split is not drawn from train alone, or the error for a missing test split is unclear."""
    for speaker in range(10):
        write(tmp_path / f"a/train/s{speaker}/x.wav")
    write(tmp_path / "a/test/t/x.wav")
    corpus = load(tmp_path / "a")
    assert [len(corpus.split(split)) for split in ("train", "dev", "test")] == [9, 1, 1]
    assert corpus.split("test").speakers == ("t",) and "dev" in load.notes[0]
    (tmp_path / "a/test/t/x.wav").unlink()
    with pytest.raises(CorpusError, match=r"a: there is no split 'test' \(there is: dev, train\)"):
        load(tmp_path / "a").split("test")


# ---- manifests --------------------------------------------------------------------------------------------


def manifest(tmp_path, *rows):
    write(tmp_path / "sounds/a.wav")
    write(tmp_path / "sounds/b.wav")
    (tmp_path / "sounds/a.phn").write_text("0 800 h#\n")
    path = tmp_path / "speech.tsv"
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


def test_manifest(tmp_path, load):
    """A column of a manifest is not read, or paths do not start from its folder."""
    corpus = load(
        manifest(
            tmp_path,
            ("speaker", "path", "split", "text", "phones", "sex", "condition"),
            ("anna", "sounds/a.wav", "train", "so it  is", "sounds/a.phn", "F", "noisy"),
            ("bob", str(tmp_path / "sounds/b.wav"), "dev"),
        )
    )
    assert fields(corpus, "name", "speaker", "split", "text", "phones", "sex", "condition") == [
        ("a", "anna", "train", "so it  is", ((0, 800, "h#"),), "F", "noisy"),
        ("b", "bob", "dev", "", (), "", ""),
    ]
    assert corpus.layout == "manifest"


HEADER = ("path", "speaker", "split")


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [HEADER, ("sounds/a.wav", "anna", "train"), ("c.wav", "b", "dev")],
            r"line 3: no such file: .*/c\.wav",
        ),
        (
            [(*HEADER, "phones"), ("sounds/a.wav", "anna", "train", "a.phn")],
            r"line 2: no such file: .*/a\.phn",
        ),
        (
            [HEADER, ("sounds/a.wav", "anna", "tr")],
            "line 2: unknown split 'tr'; right are train, dev, test",
        ),
        ([HEADER, ("sounds/a.wav", "anna")], "line 2: no split; .* columns path, speaker, split"),
        ([HEADER, (), ("sounds/a.wav", "anna", "train")], "line 2: no path or speaker or split"),
        (
            [("sounds/a.wav", "anna", "train"), ("b.wav", "bob", "dev")],
            "line 2: no path or speaker or split",
        ),
        ([HEADER], "no rows; a manifest has a header"),
    ],
)
def test_wrong_manifest(rows, message, tmp_path, load):
    """A wrong manifest is taken, or its error does not name the line and what would be right."""
    with pytest.raises(CorpusError, match=message) as raised:
        load(manifest(tmp_path, *rows))
    assert str(raised.value).startswith(str(tmp_path / "speech.tsv")) and "\n" not in str(
        raised.value
    )


def test_a_sound_file_is_a_corpus(tmp_path, load):
    """One utterance, named after the file, whose speaker is its folder; none is held back unsaid."""
    write(tmp_path / "anna" / "a.WAV")
    corpus = load(tmp_path / "anna" / "a.WAV")
    assert [(u.name, u.speaker) for u in corpus.utterances] == [("a", "anna")] and corpus.drawn


# ---- what waveforms are, and bad input --------------------------------------------------------------------


def test_waveforms(tmp_path, load):
    """Samples, level or bounds of the speech differ from the file's, or it was packed trimmed."""
    speech = np.round(np.concatenate([np.zeros(8000), 9000 * noise(1.0), np.zeros(16000)])).astype(
        np.int16
    )
    write(tmp_path / "speech/train/a/a.wav", speech)
    corpus = load(tmp_path / "speech")
    whole, trimmed = corpus.waveform(0, trim=False), corpus.waveform(0)
    assert isinstance(corpus.packed, np.memmap) and corpus.packed.dtype == np.int16
    assert whole.dtype == np.float32
    np.testing.assert_allclose(
        whole, speech / np.abs(speech).max(), atol=0.501 / 32767
    )  # half a step
    assert np.abs(whole).max() == pytest.approx(1, abs=1e-6)
    start, stop = corpus.utterances[0].trim
    np.testing.assert_array_equal(trimmed, whole[start:stop])
    # within one analysis frame (2048) of the truth, and no speech is lost
    assert 8000 - 2048 <= start <= 8000 and 24000 <= stop <= 24000 + 2048
    assert corpus.seconds == 2.5 and len(corpus) == 1


def test_other_rates_and_channels(tmp_path, load):
    """A stereo file at 8 kHz does not become 16 kHz mono at its pitch, or it is said more than once."""
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    for k in range(3):
        write(tmp_path / f"speech/{k}.wav", np.stack([tone, tone], 1), 8000)
    write(tmp_path / "speech/3.wav", tone, 44100)
    write(tmp_path / "speech/4.wav")
    corpus = load(tmp_path / "speech")
    waveform = corpus.waveform(0, trim=False)
    assert len(waveform) == 16000 and np.abs(np.fft.rfft(waveform)).argmax() == 440
    origins = "3 files from 8000 Hz / 2 channels, 1 files from 44100 Hz / 1 channel"
    assert load.notes[0] == f"converted to 16 kHz mono: {origins}"


def test_samples_at_the_ends_of_float32(tmp_path, load):
    """Samples so large or small that resampling makes infinity or silence of them stop the corpus, or get into it."""
    folder = tmp_path / "speech/train/a"
    write(folder / "good.wav")
    loud = 3.4e38 * np.sign(np.sin(np.arange(8000)))
    soundfile.write(folder / "loud.wav", loud, 8000, subtype="FLOAT")
    soundfile.write(folder / "stereo.wav", np.stack([loud, loud], 1), RATE, subtype="FLOAT")
    soundfile.write(folder / "faint.wav", np.full(44100, 1e-45), 44100, subtype="FLOAT")
    corpus = load(tmp_path / "speech")
    assert [u.name for u in corpus.utterances] == ["good"] and np.abs(corpus.waveform(0)).max() == 1
    assert (
        load.notes[0].startswith("skipped 3 of 4 files: 1 silent")
        and "2 cannot be read" in load.notes[0]
    )


def test_bad_files_are_skipped_and_counted(tmp_path, load):
    """A bad file stops the rest, gets into the corpus, or is not counted in one line."""
    folder = tmp_path / "speech/train/a"
    for k in range(2):
        write(folder / f"good{k}.wav")
    (folder / "text.wav").write_text("not a sound")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    write(folder / "silent.wav", np.zeros(RATE))
    write(folder / "short.wav", noise(0.09))
    corpus = load(tmp_path / "speech")
    assert sorted(u.name for u in corpus.utterances) == ["good0", "good1"]
    skipped = [line for line in load.notes if line.startswith("skipped")]
    assert len(skipped) == 1 and skipped[0].startswith("skipped 6 of 8 files: ")
    assert all(
        part in skipped[0] for part in ("4 cannot be read", "1 silent", "1 shorter than 0.1 s")
    )
    for good in folder.glob("good*.wav"):
        good.unlink()
    with pytest.raises(
        CorpusError, match="speech: holds nothing that can be used.*skipped 6 of 6"
    ) as raised:
        load(tmp_path / "speech")
    assert "\n" not in str(raised.value)


def test_names_that_are_not_utf_8(tmp_path, load):
    """A file whose name is not UTF-8 is lost, or cannot be told of on a terminal."""
    write(tmp_path / "speech/train/a/good.wav")
    (tmp_path / "speech/train/a/good.wav").rename(
        tmp_path / "speech/train/a" / os.fsdecode(b"good\xe9.wav")
    )
    (tmp_path / "speech/train/a" / os.fsdecode(b"bad\xff.wav")).write_text("not a sound")
    assert [u.name for u in load(tmp_path / "speech").utterances] == ["good_"]
    assert r"bad\udcff.wav: does not decode" in load.notes[0] and "\n".join(load.notes).encode()


def test_nothing_there(tmp_path, load, monkeypatch):
    """A missing, empty or unreadable folder gives a traceback, or does not say what was looked for."""
    with pytest.raises(CorpusError, match="nowhere: no such file or folder; looked for"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty/.hidden").mkdir(parents=True)
    write(tmp_path / "empty/.hidden/a.wav")
    write(tmp_path / "empty/._b.wav")
    with pytest.raises(
        CorpusError, match="empty: no audio files here or below; looked for .wav .flac"
    ):
        load(tmp_path / "empty")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"empty: cannot be read \(Permission denied\)"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.txt", "a.phn", "speakers.tsv", "b.dot", "b.trans.txt"])
def test_labels_that_are_no_regular_files(name, tmp_path, load):
    """A pipe or a device among the labels is read, which hangs or fills the memory."""
    write(tmp_path / "speech/train/anna/a.wav")
    (tmp_path / "speech/train/anna" / name).symlink_to(
        os.devnull
    )  # the one that does not hang where this fails
    with pytest.raises(CorpusError, match=f"{name}: not a regular file; expected a text file"):
        load(tmp_path / "speech")


def test_links(tmp_path, load):
    """Links in a circle hang or repeat files; linked folders elsewhere are not followed."""
    write(tmp_path / "speech/anna/a.wav")
    write(tmp_path / "elsewhere/b.wav")
    (tmp_path / "speech/anna/loop").symlink_to(tmp_path / "speech")
    (tmp_path / "speech/bob").symlink_to(tmp_path / "elsewhere")
    assert fields(load(tmp_path / "speech"), "name", "speaker") == [("a", "anna"), ("b", "bob")]


# ---- the cache --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for k in range(5):
        write(tmp_path / f"speech/train/s{k}/x.wav", noise(seed=k))
    return tmp_path / "speech"


def forbid(*_):
    raise AssertionError("audio was read")


def test_second_load_reads_no_audio(folder, load, monkeypatch):
    """Audio is decoded again though nothing changed, or the cache gives another corpus or other notes."""
    first, notes = load(folder), load.notes
    monkeypatch.setattr(audio, "read", forbid)
    second = load(folder)
    assert second.utterances == first.utterances and load.notes == notes
    np.testing.assert_array_equal(first.packed, second.packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write(folder / "train/s0/x.wav", noise(0.4)),
        lambda folder: os.utime(folder / "train/s0/x.wav", (1, 1)),
        lambda folder: (folder / "train/s0/x.wav").unlink(),
        lambda folder: write(folder / "train/s0/y.wav"),
        lambda folder: (folder / "train/s0/x.txt").write_text("hello"),
    ],
)
def test_changes_are_seen(change, folder, load, monkeypatch):
    """A stale corpus is used after a file changed, went, came, or was given a transcript."""
    load(folder)
    change(folder)
    monkeypatch.setattr(audio, "read", forbid)
    with pytest.raises(AssertionError, match="audio was read"):
        load(folder)


@pytest.mark.parametrize(
    "failure, raised",
    [
        (OSError(errno.ENOSPC, "No space left on device"), CorpusError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_nothing_is_left_half_written(failure, raised, folder, tmp_path, load, monkeypatch):
    """A full disk or an interrupt while packing leaves files, or a full disk gives a traceback."""
    calls = []

    def fail_third(waveform):
        calls.append(len(waveform))
        if len(calls) == 3:
            raise failure
        return 0, len(waveform)

    with monkeypatch.context() as patched:
        patched.setattr(audio, "trim_bounds", fail_third)
        with pytest.raises(raised) as error:
            load(folder)
    if raised is CorpusError:
        assert str(error.value).startswith(str(tmp_path / "cache")) and "No space left" in str(
            error.value
        )
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(folder)) == 5


def test_two_processes_pack_at_once(folder, load, monkeypatch):
    """The second of two processes to finish fails, or harms what the first has opened."""
    read, others = audio.read, []

    def another_first(*arguments):
        if not others:
            others.append(None)
            others[0] = load(folder)
        return read(*arguments)

    monkeypatch.setattr(audio, "read", another_first)
    mine = load(folder)
    np.testing.assert_array_equal(mine.packed, others[0].packed)


@pytest.mark.parametrize(
    "file, change",
    [
        ("waveforms.int16", lambda content: content[:1000]),
        ("waveforms.int16", lambda content: b""),
        ("index.jsonl", lambda content: b"{}"),
        ("index.jsonl", lambda content: b"[1]"),
        ("index.jsonl", lambda content: content[: len(content) // 2]),
        ("index.jsonl", lambda content: content.replace(b"[0, 4800", b"[-9, 4800")),
        ("index.jsonl", lambda content: content.replace(b"[4800, 4800", b"[4900, 4800")),
        ("index.jsonl", lambda content: content.replace(b'"samples": 24000', b'"samples": 4800')),
        ("index.jsonl", lambda content: content.replace(b'["train"', b"[null")),
    ],
)
def test_damaged_cache_is_packed_again(file, change, folder, tmp_path, load):
    """A damaged file in the cache, whatever it still says, ends in a traceback or in another corpus."""
    first = load(folder)
    whole = np.array(first.packed)
    damaged = next((tmp_path / "cache").glob(f"*/{file}"))
    content = damaged.read_bytes()
    assert change(content) != content
    damaged.write_bytes(change(content))
    again = load(folder)
    np.testing.assert_array_equal(again.packed, whole)
    assert again.utterances == first.utterances and damaged.read_bytes() == content
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_processes_mend_a_damaged_cache(folder, tmp_path, load, monkeypatch):
    """The second of two processes that found the cache damaged deletes what the first has packed anew."""
    load(folder)
    packed = next((tmp_path / "cache").glob("*/waveforms.int16"))
    packed.write_bytes(b"")
    read, others = packing.read, []

    def another_after(place):
        found = read(place)
        if not others:
            others.append(None)
            others[:] = (
                load(folder),
                packed.stat().st_ino,
            )  # an inode that is not free while the first maps it
        return found

    monkeypatch.setattr(packing, "read", another_after)
    np.testing.assert_array_equal(load(folder).packed, others[0].packed)
    assert packed.stat().st_ino == others[1]


def test_cache_folder(folder, tmp_path, monkeypatch):
    """MINIDVAE_CACHE is not used, or a cache that cannot be written gives a traceback."""
    monkeypatch.setenv("MINIDVAE_CACHE", str(tmp_path / "mine"))
    load_corpus(folder, progress=False, note=str)
    assert len(list((tmp_path / "mine").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="file: the packed corpus cannot be written here"):
        load_corpus(folder, cache=tmp_path / "file", progress=False, note=str)


def test_packing_memory(tmp_path, load, monkeypatch):
    """Packing, or laying conditions over what is packed, holds the whole corpus in memory."""
    for k in range(100):
        write(tmp_path / f"speech/{k}.wav", noise(2.0))
    monkeypatch.setattr(
        synthetic, "apply_condition", lambda waveform, *_: waveform
    )  # babble is eight signals
    tracemalloc.start()
    corpus = load(f"conditions:{tmp_path / 'speech'}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.packed.nbytes == 100 * 2 * RATE * 2
    assert peak < corpus.packed.nbytes / 2


def test_built_in(load, monkeypatch, tmp_path):
    """The built-in corpus loses a field on its way, or is generated again though it is packed."""
    monkeypatch.setattr(
        "minidvae.data.corpus.BUILT_IN", {"seed": 0, "speakers": (2, 1, 1), "utterances": 1}
    )
    corpus = load("built-in")
    truth = list(synthetic.generate(0, (2, 1, 1), 1))
    names = "name", "speaker", "split", "text", "phones", "condition"
    assert fields(corpus, *names) == sorted(
        tuple(getattr(u, name) for name in names) for u in truth
    )
    assert [u.sex for u in corpus.utterances] == [
        s.sex for s in synthetic.make_speakers(0, 2, 1, 1)
    ]
    for k, u in enumerate(truth):
        expected = u.waveform / np.abs(u.waveform.astype(float)).max()
        np.testing.assert_allclose(corpus.waveform(k, trim=False), expected, atol=1 / 32767)
    assert load.notes == []
    monkeypatch.setattr(synthetic, "generate", forbid)
    assert load("built-in").utterances == corpus.utterances


# ---- conditions -------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(tmp_path):
    """120 files of 0.7 s with silence at their ends."""
    for k in range(120):
        speech = np.concatenate([np.zeros(4000), noise(0.2, seed=k), np.zeros(4000)])
        write(tmp_path / f"speech/{'train dev test'.split()[k % 3]}/s{k % 6}/u{k}.wav", speech)
    (tmp_path / "speech/train/s0/u0.phn").write_text("0 4000 h#\n4000 7200 dh\n")
    (tmp_path / "speech/train/s0/u0.txt").write_text("the")
    return tmp_path / "speech"


def test_conditions(quiet, load):
    """An utterance is missing or changes in more than its samples, the conditions are not a quarter each or not what
    their names say, or the clean samples cannot be had or be told from the others."""
    clean, laid = load(quiet), load(f"conditions:{quiet}")
    assert tuple(u._replace(condition="") for u in laid.utterances) == clean.utterances
    assert any(u.phones and u.text and u.trim[0] > 0 for u in laid.utterances)
    conditions = np.array([u.condition for u in laid.utterances])
    counts = np.array([(conditions == condition).sum() for condition in CONDITIONS])
    assert counts.sum() == 120 and ((counts - 30) ** 2 / 30).sum() < chi2.ppf(0.999, 3)
    residuals = {condition: [] for condition in CONDITIONS}
    for i, condition in enumerate(conditions):
        x, y = clean.waveform(i, trim=False), laid.waveform(i, trim=False)
        assert np.abs(y).max() == 1
        rest = y - y @ x / (x @ x) * x
        residuals[condition].append(10 * np.log10((y @ y - rest @ rest) / max(rest @ rest, 1e-9)))
        silence = np.abs(np.concatenate([y[:2000], y[-2000:]])).max()
        assert (silence > 0.01) == (condition in ("noisy", "both"))  # a channel is silent
    assert min(residuals["clean"]) > 100  # the same samples, to rounding
    assert 4.5 < min(residuals["noisy"]) < max(residuals["noisy"]) < 15.5  # dB; drawn from 5 to 15
    assert max(residuals["channel"]) < 40
    assert laid.fingerprint != clean.fingerprint and laid.layout not in ("", clean.layout)
    before = laid.split("test").without_conditions()
    np.testing.assert_array_equal(before.waveform(3), clean.split("test").waveform(3))
    assert before.fingerprint == clean.split("test").fingerprint
    assert {u.condition for u in before.utterances} == {"clean"}
    assert (before.name, before.layout) == (
        clean.name,
        clean.layout,
    ) and clean.without_conditions() is clean


def test_conditions_depend_on_the_utterance_alone(quiet, load, monkeypatch):
    """A condition or its channel changes with the other files or the order, its noise with the other splits, or its
    babble not with the other speakers; or it is laid again though it is packed."""
    laid = load(f"conditions:{quiet}")
    with monkeypatch.context() as patched:
        patched.setattr(synthetic, "apply_condition", forbid)
        assert load(f"conditions:{quiet}").utterances == laid.utterances
    shutil.rmtree(quiet / "dev")  # the first; another is drawn from train
    few = load(f"conditions:{quiet}")
    index = {u.name: i for i, u in enumerate(laid.utterances)}
    assert 0 < len(few) < len(laid)
    changed = 0
    for i, u in enumerate(few.utterances):
        assert laid.utterances[index[u.name]].condition == u.condition
        same = np.array_equal(few.waveform(i), laid.waveform(index[u.name]))
        assert same or (u.split != "test" and u.condition in ("noisy", "both"))
        changed += not same
    assert changed


def test_conditions_of_its_own(tmp_path, load):
    """Noise is laid over noise, or a corpus that says it is clean is refused."""
    rows = [
        (*HEADER, "condition"),
        ("sounds/a.wav", "anna", "train", "clean"),
        ("sounds/b.wav", "bob", "dev"),
    ]
    source = manifest(tmp_path, *rows)
    assert len(load(f"conditions:{source}")) == 2
    manifest(tmp_path, *rows[:2], (*rows[2], "noisy"))
    with pytest.raises(
        CorpusError, match=r"\.tsv: this corpus has conditions of its own \(noisy\);"
    ) as raised:
        load(f"conditions:{source}")
    assert "\n" not in str(raised.value)
    with pytest.raises(CorpusError, match="nowhere: no such file or folder"):
        load(f"conditions:{tmp_path / 'nowhere'}")


def test_absolute(tmp_path, monkeypatch):
    """A run that is resumed from another folder does not find its corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/anna")
    for source, expected in (
        ("built-in", "built-in"),
        ("speech", f"{tmp_path}/speech"),
        ("~/x", "/home/anna/x"),
    ):
        assert (
            absolute(source) == expected
            and absolute(f"conditions:{source}") == f"conditions:{expected}"
        )


# ---- crops ----------- ------------------------------------------------------------------------------------

LENGTHS = 40, 9, 30, 25
TRIMS = (5, 18), (0, 9), (0, 30), (7, 17)  # crops of 10 have 4, no, 21 and 1 positions in these


@pytest.fixture
def ramp(tmp_path):
    """A corpus whose n-th sample in the file is n, so that a crop shows where it was taken."""
    packed = np.memmap(tmp_path / "ramp", dtype=np.int16, mode="w+", shape=(sum(LENGTHS),))
    packed[:] = np.arange(sum(LENGTHS))
    places = zip(np.cumsum((0, *LENGTHS)).tolist(), LENGTHS, TRIMS, strict=False)
    utterances = tuple(Utterance(f"u{k}", "s", "train", *place) for k, place in enumerate(places))
    return Corpus("ramp", "folder", utterances, packed)


def numbers(batch):
    return torch.round(batch * 32767).long()


def allowed(trim):
    starts = np.cumsum((0, *LENGTHS))
    spans = [
        (s + a, s + b) if trim else (s, s + n)
        for s, n, (a, b) in zip(starts, LENGTHS, TRIMS, strict=False)
    ]
    return [p for start, stop in spans for p in range(start, stop - 10 + 1)]


@pytest.mark.parametrize("trim", [True, False])
def test_crops_are_uniform_and_inside(trim, ramp):
    """A crop leaves its utterance or its trimmed part, is not contiguous, or some positions are likelier."""
    crops = RandomCrops(ramp, 10, 100, seed=3, trim=trim)
    batches = torch.cat([numbers(crops(step)) for step in range(50)])
    assert torch.equal(batches, batches[:, :1] + torch.arange(10))
    positions = allowed(trim)
    counts = np.array([(batches[:, 0] == p).sum() for p in positions])
    assert counts.sum() == 5000
    expected = 5000 / len(positions)
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(positions) - 1)


def test_crops_are_counted(ramp):
    """Short utterances are not counted, or an epoch has the wrong number of sequences."""
    crops = RandomCrops(ramp, 10, 4)
    assert crops.skipped == 1 and crops.sequences == 1 + 0 + 3 + 1  # trimmed lengths 13, 9, 30, 10
    assert RandomCrops(ramp, 10, 4, trim=False).sequences == 4 + 0 + 3 + 2
    with pytest.raises(CorpusError, match="ramp: no utterance is as long"):
        RandomCrops(ramp, 31, 4)
    with pytest.raises(CorpusError, match="ramp: no utterance is as long"):
        consecutive_crops(ramp, 31, 4)


def test_crops_depend_on_seed_and_step_only(ramp):
    """A resumed run sees other batches, or two steps or two seeds the same ones."""
    straight = [RandomCrops(ramp, 10, 16, seed=1)(step) for step in range(20)]
    crops = RandomCrops(ramp, 10, 16, seed=1)
    crops(3)
    assert all(torch.equal(crops(step), straight[step]) for step in range(10, 20))
    assert len({tuple(batch.flatten().tolist()) for batch in straight}) == 20
    assert not torch.equal(RandomCrops(ramp, 10, 16, seed=2)(0), straight[0])
    assert straight[0].dtype == torch.float32 and straight[0].shape == (16, 10)


@pytest.fixture
def tone(tmp_path):
    """Two utterances: a second of 1 kHz with digital silence after it, and one of 0.2 s without."""
    wave = (
        16384 * np.sin(2 * np.pi * 1000 / RATE * np.arange(RATE)) * (np.arange(RATE) < 0.8 * RATE)
    )
    packed = np.memmap(tmp_path / "tone", dtype=np.int16, mode="w+", shape=(RATE + RATE // 5,))
    packed[:] = np.round(np.concatenate([wave, wave[: RATE // 5]]))
    utterances = (
        Utterance("a", "s", "train", 0, RATE, (0, RATE)),
        Utterance("b", "s", "train", RATE, 3200, (0, 3200)),
    )
    return Corpus("tone", "folder", utterances, packed)


@pytest.mark.parametrize("speed", [0.85, 1.0, 1.2])
def test_speed_moves_the_pitch_and_gain_the_level(speed, tone):
    """A crop that is played faster has another pitch than that, is no longer full, or is louder than it should be."""

    def pitch(crop: torch.Tensor) -> int:
        return int(torch.fft.rfft(crop * torch.hann_window(len(crop)), n=RATE).abs().argmax())

    augmentation = Augmentation((speed, speed), (-6.0, -6.0))
    crops = RandomCrops(tone, 3200, 64, augmentation=augmentation)(0)
    assert crops.shape == (64, 3200) and crops.dtype == torch.float32
    assert torch.equal(crops, torch.round(crops * 32767) / 32767)
    loud = [
        crop[320:2880] for crop in crops if crop[-400:].abs().max() > 0.2
    ]  # not those that end in the silence
    assert len(loud) > 32
    for crop in loud:
        assert abs(pitch(crop) - 1000 * speed) <= 1
        assert crop.abs().max() == pytest.approx(0.5 * 10 ** (-6 / 20), rel=0.02)
    assert not crops[:, -1600:][
        crops[:, -1700:].abs().amax(1) < 0.01
    ].any()  # what is silent is digitally silent
    short = RandomCrops(
        replace(tone, utterances=tone.utterances[1:]), 3200, 4, augmentation=augmentation
    )(0)
    assert pitch(short[0]) == pytest.approx(
        1000 * min(speed, 1), abs=4
    )  # there is no more of it to be played faster


def test_the_equaliser_is_four_cosines_over_log_frequency(tmp_path):
    """A crop's gain is not smooth in frequency, has another size than asked for, or moves the whole level."""
    packed = np.memmap(tmp_path / "clicks", dtype=np.int16, mode="w+", shape=(16_384,))
    packed[8_192] = 8_000  # its spectrum is flat
    corpus = Corpus(
        "click", "folder", (Utterance("a", "s", "train", 0, 16_384, (0, 16_384)),), packed
    )
    crops = torch.cat(
        [
            RandomCrops(corpus, 16_384, 64, augmentation=Augmentation(equaliser=3.0))(k)
            for k in range(4)
        ]
    )
    gains = 20 * torch.log10(torch.fft.rfft(crops).abs() * 32_767 / 8_000)  # dB, (256, frequencies)
    hertz = torch.linspace(0, RATE / 2, gains.shape[1])
    place = torch.log(1 + hertz / 100) / np.log(1 + RATE / 200)
    basis = torch.stack([torch.cos(k * torch.pi * place) for k in range(5)], dim=1)
    amplitudes = torch.linalg.lstsq(basis, gains.T).solution  # (5, 256), the first of the level
    assert (basis @ amplitudes - gains.T).abs().median() < 0.3  # what rounding to 16 bits leaves
    assert amplitudes[0].abs().median() < 0.1
    assert amplitudes[1:].std(1).numpy() == pytest.approx(4 * [3.0], rel=0.2)


def test_augmented_crops_depend_on_seed_and_step_only(tone):
    """A resumed run hears other voices, or all crops of a batch have one speed."""
    augmentation = Augmentation((0.8, 1.25), (-6.0, 6.0), equaliser=0.01)
    straight = [RandomCrops(tone, 3200, 8, 1, augmentation=augmentation)(step) for step in range(6)]
    crops = RandomCrops(tone, 3200, 8, 1, augmentation=augmentation)
    crops(2)
    assert all(torch.equal(crops(step), straight[step]) for step in (4, 5))
    alike = Augmentation((0.8, 1.25))
    pitches = [
        torch.fft.rfft(crop, n=RATE).abs().argmax()
        for crop in RandomCrops(tone, 3200, 32, 1, augmentation=alike)(0)
    ]
    assert len({int(pitch) // 40 for pitch in pitches}) > 5
    peaks = {
        round(20 * np.log10(crop.abs().max().item()), 1)
        for batch in straight
        for crop in batch
        if crop.any()
    }
    assert len(peaks) > 20 and min(peaks) > -12.2 and max(peaks) < 0.3


def test_consecutive_crops_cover(ramp):
    """Crops of a development set overlap, leave a gap, are out of order, or cross an utterance's end."""
    starts = np.cumsum((0, *LENGTHS))
    expected = [starts[0] + 5, starts[2], starts[2] + 10, starts[2] + 20, starts[3] + 7]
    batches = list(consecutive_crops(ramp, 10, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    found = numbers(torch.cat(batches))
    assert found[:, 0].tolist() == expected and torch.equal(found, found[:, :1] + torch.arange(10))


def test_split_shares_the_map(ramp):
    """A split copies the samples."""
    assert ramp.split("train").packed is ramp.packed


def test_drawing_from_ten_hours(tmp_path):
    """Drawing 32 × 2.4 s from ten hours reads the whole file, or takes 20 ms (it should be 2, unhurried)."""
    length = 10 * RATE
    utterances = tuple(
        Utterance(f"u{k}", "s", "train", k * length, length, (0, length)) for k in range(3600)
    )
    with open(tmp_path / "packed", "wb") as file:
        file.truncate(2 * 3600 * length)  # a hole, which takes no room on the disk
    packed = np.memmap(tmp_path / "packed", dtype=np.int16, mode="r", shape=(3600 * length,))
    crops = RandomCrops(
        Corpus("ten hours", "folder", utterances, packed), samples=38400, batch_size=32
    )
    tracemalloc.start()
    crops(0)
    assert tracemalloc.get_traced_memory()[1] < 2**20  # without the batch, which is torch's
    tracemalloc.stop()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        crops(0)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.02


OPEN = """
import resource, sys, time
from pathlib import Path
from minidvae.data import packing
from minidvae.data.corpus import Corpus
from minidvae.data.crops import RandomCrops

def timed(call, repeats):
    times = []
    for _ in range(repeats):
        begin = time.process_time(), time.perf_counter()
        call()
        times.append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    return [min(column) for column in zip(*times)]

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = packing.read(Path(sys.argv[1]))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
corpus = Corpus("speech", found.layout, found.utterances, found.samples)
crops, steps = RandomCrops(corpus.split("train"), 38400, 32), iter(range(100))
print(len(corpus), memory / 1024, timed(lambda: packing.read(Path(sys.argv[1])), 2)[0])
print(timed(lambda: corpus.split("train"), 3)[0], timed(lambda: corpus.fingerprint, 2)[0])
print(timed(lambda: crops(next(steps)), 10)[1])
"""


def test_a_thousand_hours(tmp_path):
    """The index of 280,000 utterances takes seconds to open, or more memory than a small machine has; a split or the
    fingerprint takes seconds; or a batch takes a second, since pages are read one after the other."""
    length, text = 13 * RATE, "AS LONG AS A LINE OF LIBRISPEECH IS " * 5
    names = [
        (f"{k % 2400}-{k:06d}", str(k % 2400), "train" if k % 50 else "dev") for k in range(280_000)
    ]
    utterances = (
        Utterance(*name, k * length, length, (512, length - 512), text, sex="F")
        for k, name in enumerate(names)
    )
    about = {"layout": "LibriSpeech", "notes": [], "drawn": False, "samples": len(names) * length}
    packing.write_index(tmp_path, about, utterances)
    with open(tmp_path / "waveforms.int16", "wb") as file:
        file.truncate(2 * about["samples"])  # a hole, which takes no room on the disk
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    count, megabytes, seconds, split, fingerprint, batch = map(float, found.stdout.split())
    assert count == len(names) and megabytes < 300 and seconds < 3
    assert split < 0.6 and fingerprint < 3 and batch < 0.3


# ---- real speech ------------------------------------------------------------------------------------------


def test_real_speech(load, shared):
    """Minutes, speakers or utterances of a split of real speech are wrong, or sexes are missing."""
    corpus = load(shared / "speech/LibriSpeech")
    assert corpus.layout == "LibriSpeech" and load.notes == []
    expected = {"train": (42.7, 201, 201), "dev": (9.6, 50, 50), "test": (6.7, 5, 50)}
    for split, figures in expected.items():
        part = corpus.split(split)
        assert (round(part.seconds / 60, 1), len(part.speakers), len(part)) == figures
    assert {u.sex for u in corpus.utterances} == {"F", "M"}
    kept = sum(u.trim[1] - u.trim[0] for u in corpus.utterances) / sum(
        u.length for u in corpus.utterances
    )
    assert 0.8 < kept < 1  # read speech has some silence at both ends, not much
