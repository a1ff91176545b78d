"""Corpora: layouts, manifests, bad input, the packed cache, random and consecutive crops."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import dataclass, replace
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
ROOT = Path(__file__).parents[2]


def noise(seconds=0.3, rate=RATE, seed=0):
    waveform = 0.3 * np.random.default_rng(seed).uniform(-1, 1, round(seconds * rate))
    return waveform.astype(np.float32)


def write(path, waveform=None, rate=RATE):
    """Write a waveform, by default 0.3 s of noise, in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if waveform is None:
        waveform = noise()
    suffix = path.suffix.lower()
    subtype = "VORBIS" if suffix == ".ogg" else "PCM_16"
    soundfile.write(path, waveform, rate, format=FORMATS[suffix], subtype=subtype)


class Loader:
    """`load_corpus` with a temporary cache.

    Attributes:
        notes: the notes of the last call.
    """

    def __init__(self, cache: Path):
        self.cache = cache
        self.notes = []

    def __call__(self, source) -> Corpus:
        self.notes = []
        return load_corpus(source, cache=self.cache, progress=False, note=self.notes.append)


@pytest.fixture
def load(tmp_path):
    return Loader(tmp_path / "cache")


def fields(utterances, *names):
    """Return some fields of each utterance, sorted."""
    rows = []
    for utterance in utterances:
        rows.append(tuple(getattr(utterance, name) for name in names))
    return sorted(rows)


def split_sizes(corpus) -> list[int]:
    return [len(corpus.split(split)) for split in ("train", "dev", "test")]


# ---------------------------------------------------------------------------------------- layouts


@dataclass
class LayoutCase:
    sounds: list[str]  # names of the sound files
    texts: dict[str, str]  # name of a text file → its content
    expected: list[tuple]  # speaker, split, sex, condition and text of each utterance


LAYOUTS = {
    "LibriSpeech": LayoutCase(
        sounds=[
            "train-clean-100/19/198/19-198-0000.flac",
            "dev-clean/84/121/84-121-0000.flac",
            "test-other/367/130/367-130-0001.flac",
        ],
        texts={
            "SPEAKERS.TXT": "; ID | SEX\n19 | F | train-clean-100\n84 | F | dev-clean\n"
            "367 | M | test-other\n",
            "train-clean-100/19/198/19-198.trans.txt": "19-198-0000 NORTHANGER ABBEY\n",
            "test-other/367/130/367-130.trans.txt": "367-130-0000 NO\n367-130-0001 YES  SIR\n",
        },
        expected=[
            ("19", "train", "F", "", "NORTHANGER ABBEY"),
            ("84", "dev", "F", "", ""),
            ("367", "test", "M", "", "YES SIR"),
        ],
    ),
    "LibriSpeech in plain splits": LayoutCase(
        sounds=[
            "train/19/19-198-0000.ogg",
            "dev/84/84-121-0000.ogg",
            "test/367/367-130-0001.flac",
        ],
        texts={"speakers.tsv": "speaker\tsex\tsplit\n19\tF\ttrain\n84\tM\tdev\n"},
        expected=[
            ("19", "train", "F", "", ""),
            ("84", "dev", "M", "", ""),
            ("367", "test", "", "", ""),
        ],
    ),
    "VoiceBank": LayoutCase(
        sounds=[
            "clean_trainset_28spk_wav/p227_001.wav",
            "clean_trainset_28spk_wav/p226_001.wav",
            "clean_trainset_28spk_wav/p287_003.wav",
            "clean_testset_wav/p232_001.wav",
            "noisy_testset_wav/p232_001.wav",
        ],
        texts={
            "trainset_28spk_txt/p227_001.txt": "Please call Stella.\n",
            "testset_txt/p232_001.txt": "No.\n",
        },
        expected=[
            ("p226", "dev", "", "", ""),
            ("p227", "train", "", "", "Please call Stella."),
            ("p287", "dev", "", "", ""),
            ("p232", "test", "", "", "No."),
        ],
    ),
    "WSJ0": LayoutCase(
        sounds=[
            "wsj0/si_tr_s/011/011c0201.wv1",
            "wsj0/si_dt_05/050/050c0101.wav",
            "wsj0/si_et_05/440/440c0201.wav",
            "wsj0/si_tr_l/012/012c0201.wav",
        ],
        texts={"wsj0/si_tr_s/011/011c0200.dot": "The words. (011c0201)\nOthers (011c0202)\n"},
        expected=[
            ("011", "train", "", "", "The words."),
            ("050", "dev", "", "", ""),
            ("440", "test", "", "", ""),
        ],
    ),
    "TIMIT": LayoutCase(
        sounds=[
            "TIMIT/TRAIN/DR1/FCJF0/SX127.WAV",
            "TIMIT/TRAIN/DR1/FCJF0/SA1.WAV",
            "TIMIT/TEST/DR1/MDAB0/SX139.WAV",
            "TIMIT/TEST/DR1/FAKS0/SX133.WAV",
            "TIMIT/TEST/DR1/FDRD1/SX33.WAV",
        ],
        texts={
            "TIMIT/TRAIN/DR1/FCJF0/SX127.TXT": "0 4800 The emperor had a mean temper.\n",
            "TIMIT/TRAIN/DR1/FCJF0/SX127.PHN": "0 1000 h#\n1000 2500 dh\n2500 4800 ix\n",
        },
        expected=[
            ("FCJF0", "train", "F", "", "The emperor had a mean temper."),
            ("MDAB0", "test", "M", "", ""),
            ("FAKS0", "dev", "F", "", ""),
        ],
    ),
    "timit in lower case": LayoutCase(
        sounds=[
            "train/dr1/fcjf0/sx127.wav",
            "test/dr1/mdab0/sx139.wav",
            "test/dr1/faks0/sx133.wav",
        ],
        texts={"test/dr1/mdab0/sx139.txt": "0 4800 Yes.\n"},
        expected=[
            ("fcjf0", "train", "F", "", ""),
            ("mdab0", "test", "M", "", "Yes."),
            ("faks0", "dev", "F", "", ""),
        ],
    ),
    "Aurora-4": LayoutCase(
        sounds=[
            "train/clean/011/011c0201.wv1",
            "dev/noisy/050/050c0101.wav",
            "test/channel/440c0201.wav",
            "test/both/440c0201.wav",
        ],
        texts={},
        expected=[
            ("011", "train", "", "clean", ""),
            ("050", "dev", "", "noisy", ""),
            ("440", "test", "", "both", ""),
            ("440", "test", "", "channel", ""),
        ],
    ),
    "split/speaker": LayoutCase(
        sounds=["train/anna/a.wav", "valid/anna/more/b.flac", "test/bob/c.ogg", "train/d.wav"],
        texts={"train/anna/a.txt": "1 2 three"},
        expected=[
            ("anna", "train", "", "", "1 2 three"),
            ("anna", "dev", "", "", ""),
            ("bob", "test", "", "", ""),
            ("train", "train", "", "", ""),
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path, load):
    """Fails if a folder in a known layout is read with other speakers, splits, sexes, conditions or
    words, if files are left out silently, or if two utterances have one name."""
    case = LAYOUTS[layout]
    for file in case.sounds:
        write(tmp_path / "speech" / file)
    for file, text in case.texts.items():
        path = tmp_path / "speech" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    corpus = load(tmp_path / "speech")
    rows = fields(corpus.utterances, "speaker", "split", "sex", "condition", "text")
    assert rows == sorted(case.expected)
    assert corpus.layout.lower() == layout.split(" in ")[0].lower()
    left_out = len(case.sounds) - len(case.expected)
    if left_out > 0:
        (note,) = load.notes
        assert f"left out {left_out} of {len(case.sounds)}" in note
    else:
        assert load.notes == []
    # The names become names of files.
    names = [u.name for u in corpus.utterances]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)


def test_phones(tmp_path, load):
    """Fails if phone labels are lost, or are not in samples of the waveform where it was
    resampled."""
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
        "500 1600 dh",  # starts before the label on the line above
        "-1 1600 dh",
        "1600 3201 dh",  # stops after the end
        f"1600 {'9' * 4000} dh",
        f"1600 {'9' * 5000} dh",  # more digits than Python converts to an integer
    ],
)
def test_phones_that_cannot_be(line, tmp_path, load):
    """Fails if an impossible phone label is taken, or if its error does not name the file, the line
    and what was expected."""
    labels = tmp_path / "speech/train/a/x.phn"
    write(tmp_path / "speech/train/a/x.wav", noise(0.4, 8000), 8000)
    labels.write_text(f"0 1000 h#\n\n1000 1600 dh\n{line}\n")
    message = r"x\.phn: line 4: .* start stop label.*3200 samples"
    with pytest.raises(CorpusError, match=message) as raised:
        load(tmp_path / "speech")
    assert len(str(raised.value)) < 300
    labels.write_text("0 1000 h#\n1000 3200 dh\n")
    assert load(tmp_path / "speech").utterances[0].phones[-1] == (2000, 6400, "dh")


def test_splits_drawn_by_speaker(tmp_path, load):
    """Fails if drawn splits share a speaker, if dev and test are not a tenth each, or if they
    change between runs."""
    for speaker in range(20):
        for k in range(2):
            write(tmp_path / f"speech/s{speaker}/{k}.wav")
    corpus = load(tmp_path / "speech")
    by_split = {split: set(corpus.split(split).speakers) for split in ("train", "dev", "test")}
    assert [len(speakers) for speakers in by_split.values()] == [16, 2, 2]
    assert len(set.union(*by_split.values())) == 20
    (note,) = load.notes
    assert "drew 2 speakers for dev, 2 speakers for test, 16 speakers for train" in note
    second = load_corpus(tmp_path / "speech", cache=tmp_path / "other", progress=False, note=str)
    assert second.utterances == corpus.utterances


@pytest.mark.parametrize(
    "count, splits", [(1, ["train"]), (2, ["dev", "train"]), (3, ["dev", "test", "train"])]
)
def test_splits_drawn_from_few_files(count, splits, tmp_path, load):
    """Fails if a flat folder of few files has an empty training set, or lacks a split that it could
    have."""
    for k in range(count):
        write(tmp_path / f"hello/{k}.wav")
    corpus = load(tmp_path / "hello")
    assert sorted(u.split for u in corpus.utterances) == splits
    assert corpus.speakers == ("hello",)


def test_missing_splits(tmp_path, load):
    """Fails if a missing dev split is not drawn from train alone, or if the error for a missing
    test split is unclear."""
    for speaker in range(10):
        write(tmp_path / f"a/train/s{speaker}/x.wav")
    write(tmp_path / "a/test/t/x.wav")
    corpus = load(tmp_path / "a")
    assert split_sizes(corpus) == [9, 1, 1]
    assert corpus.split("test").speakers == ("t",)
    assert "dev" in load.notes[0]
    (tmp_path / "a/test/t/x.wav").unlink()
    with pytest.raises(CorpusError, match=r"a: there is no split 'test' \(there is: dev, train\)"):
        load(tmp_path / "a").split("test")


# -------------------------------------------------------------------------------------- manifests


def write_manifest(tmp_path, *rows):
    """Write a manifest, two sound files and a file of phone labels; return the manifest."""
    write(tmp_path / "sounds/a.wav")
    write(tmp_path / "sounds/b.wav")
    (tmp_path / "sounds/a.phn").write_text("0 800 h#\n")
    path = tmp_path / "speech.tsv"
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


def test_manifest(tmp_path, load):
    """Fails if a column of a manifest is not read, or if paths do not start from its folder."""
    columns = ("speaker", "path", "split", "text", "phones", "sex", "condition")
    manifest = write_manifest(
        tmp_path,
        columns,
        ("anna", "sounds/a.wav", "train", "so it  is", "sounds/a.phn", "F", "noisy"),
        ("bob", str(tmp_path / "sounds/b.wav"), "dev"),
    )
    corpus = load(manifest)
    names = ("name", "speaker", "split", "text", "phones", "sex", "condition")
    assert fields(corpus.utterances, *names) == [
        ("a", "anna", "train", "so it  is", ((0, 800, "h#"),), "F", "noisy"),
        ("b", "bob", "dev", "", (), "", ""),
    ]
    assert corpus.layout == "manifest"


HEADER = ("path", "speaker", "split")
A_WAV = ("sounds/a.wav", "anna", "train")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([HEADER, A_WAV, ("c.wav", "b", "dev")], r"line 3: no such file: .*/c\.wav"),
        ([(*HEADER, "phones"), (*A_WAV, "a.phn")], r"line 2: no such file: .*/a\.phn"),
        (
            [HEADER, ("sounds/a.wav", "anna", "tr")],
            "line 2: unknown split 'tr'; right are train, dev, test",
        ),
        ([HEADER, ("sounds/a.wav", "anna")], "line 2: no split; .* columns path, speaker, split"),
        ([HEADER, (), A_WAV], "line 2: no path or speaker or split"),
        ([A_WAV, ("b.wav", "bob", "dev")], "line 2: no path or speaker or split"),
        ([HEADER], "no rows; a manifest has a header"),
    ],
)
def test_faulty_manifest(rows, message, tmp_path, load):
    """Fails if a faulty manifest is taken, or if its error does not name the line and what was
    expected."""
    with pytest.raises(CorpusError, match=message) as raised:
        load(write_manifest(tmp_path, *rows))
    assert str(raised.value).startswith(str(tmp_path / "speech.tsv"))
    assert "\n" not in str(raised.value)


def test_a_sound_file_is_a_corpus(tmp_path, load):
    """Fails if a sound file is not a corpus of one utterance with the name of the file, whose
    speaker is the folder, or if a part is held back silently."""
    write(tmp_path / "anna" / "a.WAV")
    corpus = load(tmp_path / "anna" / "a.WAV")
    assert [(u.name, u.speaker) for u in corpus.utterances] == [("a", "anna")]
    assert corpus.drawn


# ------------------------------------------------------------------------- waveforms and bad input


def test_waveforms(tmp_path, load):
    """Fails if samples, level or bounds of the speech differ from those of the file, or if the
    packed waveform is trimmed."""
    samples = np.concatenate([np.zeros(8000), 9000 * noise(1.0), np.zeros(16000)])
    speech = np.round(samples).astype(np.int16)
    write(tmp_path / "speech/train/a/a.wav", speech)
    corpus = load(tmp_path / "speech")
    untrimmed = corpus.waveform(0, trim=False)
    trimmed = corpus.waveform(0)
    assert isinstance(corpus.packed, np.memmap)
    assert corpus.packed.dtype == np.int16
    assert untrimmed.dtype == np.float32
    half_a_step = 0.501 / 32767
    np.testing.assert_allclose(untrimmed, speech / np.abs(speech).max(), atol=half_a_step)
    assert np.abs(untrimmed).max() == pytest.approx(1, abs=1e-6)
    start, stop = corpus.utterances[0].trim
    np.testing.assert_array_equal(trimmed, untrimmed[start:stop])
    # The bounds are at most one analysis frame (2048) too wide, and no speech is lost.
    assert 8000 - 2048 <= start <= 8000
    assert 24000 <= stop <= 24000 + 2048
    assert corpus.seconds == 2.5
    assert len(corpus) == 1


def test_other_rates_and_channels(tmp_path, load):
    """Fails if a stereo file at 8 kHz does not become 16 kHz mono at its pitch, or if more than one
    note says so."""
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    for k in range(3):
        write(tmp_path / f"speech/{k}.wav", np.stack([tone, tone], 1), 8000)
    write(tmp_path / "speech/3.wav", tone, 44100)
    write(tmp_path / "speech/4.wav")
    corpus = load(tmp_path / "speech")
    waveform = corpus.waveform(0, trim=False)
    assert len(waveform) == 16000
    assert np.abs(np.fft.rfft(waveform)).argmax() == 440
    origins = "3 files from 8000 Hz / 2 channels, 1 files from 44100 Hz / 1 channel"
    assert load.notes[0] == f"converted to 16 kHz mono: {origins}"


def test_samples_at_the_ends_of_float32(tmp_path, load):
    """Fails if samples so large or small that resampling makes infinity or silence of them stop the
    corpus, or get into it."""
    folder = tmp_path / "speech/train/a"
    write(folder / "good.wav")
    loud = 3.4e38 * np.sign(np.sin(np.arange(8000)))
    soundfile.write(folder / "loud.wav", loud, 8000, subtype="FLOAT")
    soundfile.write(folder / "stereo.wav", np.stack([loud, loud], 1), RATE, subtype="FLOAT")
    soundfile.write(folder / "faint.wav", np.full(44100, 1e-45), 44100, subtype="FLOAT")
    corpus = load(tmp_path / "speech")
    assert [u.name for u in corpus.utterances] == ["good"]
    assert np.abs(corpus.waveform(0)).max() == 1
    assert load.notes[0].startswith("skipped 3 of 4 files: 1 silent")
    assert "2 cannot be read" in load.notes[0]


def test_bad_files_are_skipped_and_counted(tmp_path, load):
    """Fails if a bad file stops the loading of the others, gets into the corpus, or is not counted
    in one line."""
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
    (skipped,) = [line for line in load.notes if line.startswith("skipped")]
    assert skipped.startswith("skipped 6 of 8 files: ")
    for part in ("4 cannot be read", "1 silent", "1 shorter than 0.1 s"):
        assert part in skipped
    for good in folder.glob("good*.wav"):
        good.unlink()
    message = "speech: holds nothing that can be used.*skipped 6 of 6"
    with pytest.raises(CorpusError, match=message) as raised:
        load(tmp_path / "speech")
    assert "\n" not in str(raised.value)


def test_names_that_are_not_utf_8(tmp_path, load):
    """Fails if a file whose name is not UTF-8 is lost, or if a note cannot be printed because of
    it."""
    folder = tmp_path / "speech/train/a"
    write(folder / "good.wav")
    (folder / "good.wav").rename(folder / os.fsdecode(b"good\xe9.wav"))
    (folder / os.fsdecode(b"bad\xff.wav")).write_text("not a sound")
    assert [u.name for u in load(tmp_path / "speech").utterances] == ["good_"]
    assert r"bad\udcff.wav: does not decode" in load.notes[0]
    assert "\n".join(load.notes).encode()


def test_a_source_without_audio(tmp_path, load, monkeypatch):
    """Fails if a missing, empty or unreadable folder gives a traceback, or an error that does not
    say what was looked for."""
    with pytest.raises(CorpusError, match="nowhere: no such file or folder; looked for"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty/.hidden").mkdir(parents=True)
    write(tmp_path / "empty/.hidden/a.wav")
    write(tmp_path / "empty/._b.wav")
    message = "empty: no audio files here or below; looked for .wav .flac"
    with pytest.raises(CorpusError, match=message):
        load(tmp_path / "empty")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"empty: cannot be read \(Permission denied\)"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.txt", "a.phn", "speakers.tsv", "b.dot", "b.trans.txt"])
def test_labels_that_are_no_regular_files(name, tmp_path, load):
    """Fails if a pipe or a device among the labels is read, which hangs or fills the memory."""
    write(tmp_path / "speech/train/anna/a.wav")
    # The null device does not hang where this test fails.
    (tmp_path / "speech/train/anna" / name).symlink_to(os.devnull)
    with pytest.raises(CorpusError, match=f"{name}: not a regular file; expected a text file"):
        load(tmp_path / "speech")


def test_links(tmp_path, load):
    """Fails if links in a circle hang or repeat files, or if linked folders are not followed."""
    write(tmp_path / "speech/anna/a.wav")
    write(tmp_path / "elsewhere/b.wav")
    (tmp_path / "speech/anna/loop").symlink_to(tmp_path / "speech")
    (tmp_path / "speech/bob").symlink_to(tmp_path / "elsewhere")
    corpus = load(tmp_path / "speech")
    assert fields(corpus.utterances, "name", "speaker") == [("a", "anna"), ("b", "bob")]


# -------------------------------------------------------------------------------------- the cache


@pytest.fixture
def folder(tmp_path):
    for k in range(5):
        write(tmp_path / f"speech/train/s{k}/x.wav", noise(seed=k))
    return tmp_path / "speech"


def forbid(*_):
    raise AssertionError("audio was read")


def test_second_load_reads_no_audio(folder, load, monkeypatch):
    """Fails if audio is decoded again though nothing changed, or if the cache gives another corpus
    or other notes."""
    first = load(folder)
    first_notes = load.notes
    monkeypatch.setattr(audio, "read", forbid)
    second = load(folder)
    assert second.utterances == first.utterances
    assert load.notes == first_notes
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
    """Fails if the packed corpus is used after a file changed, was removed or added, or was given a
    transcript."""
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
    """Fails if a full disk or an interrupt while packing leaves files, or if a full disk gives a
    traceback."""
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
        assert str(error.value).startswith(str(tmp_path / "cache"))
        assert "No space left" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(folder)) == 5


def test_two_processes_pack_at_once(folder, load, monkeypatch):
    """Fails if the second of two processes to finish packing fails, or harms what the first has
    opened."""
    read = audio.read
    packed_first = []

    def pack_first_and_read(*arguments):
        monkeypatch.setattr(audio, "read", read)
        packed_first.append(load(folder))
        return read(*arguments)

    monkeypatch.setattr(audio, "read", pack_first_and_read)
    packed_second = load(folder)
    np.testing.assert_array_equal(packed_second.packed, packed_first[0].packed)


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
    """Fails if a damaged file in the cache ends in a traceback or in another corpus."""
    first = load(folder)
    samples = np.array(first.packed)
    damaged = next((tmp_path / "cache").glob(f"*/{file}"))
    content = damaged.read_bytes()
    assert change(content) != content
    damaged.write_bytes(change(content))
    second = load(folder)
    np.testing.assert_array_equal(second.packed, samples)
    assert second.utterances == first.utterances
    assert damaged.read_bytes() == content
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_processes_repair_a_damaged_cache(folder, tmp_path, load, monkeypatch):
    """Fails if the second of two processes that find the cache damaged deletes what the first has
    packed anew."""
    load(folder)
    packed = next((tmp_path / "cache").glob("*/waveforms.int16"))
    packed.write_bytes(b"")
    read = packing.read
    repaired_first = []  # corpus and inode; the inode is not free while the corpus maps it

    def read_and_repair_first(path):
        damaged = read(path)
        monkeypatch.setattr(packing, "read", read)
        repaired_first.append((load(folder), packed.stat().st_ino))
        return damaged

    monkeypatch.setattr(packing, "read", read_and_repair_first)
    second = load(folder)
    first, inode = repaired_first[0]
    np.testing.assert_array_equal(second.packed, first.packed)
    assert packed.stat().st_ino == inode


def test_cache_folder(folder, tmp_path, monkeypatch):
    """Fails if MINIDVAE_CACHE is not used, or if a cache that cannot be written gives a
    traceback."""
    monkeypatch.setenv("MINIDVAE_CACHE", str(tmp_path / "mine"))
    load_corpus(folder, progress=False, note=str)
    assert len(list((tmp_path / "mine").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="file: the packed corpus cannot be written here"):
        load_corpus(folder, cache=tmp_path / "file", progress=False, note=str)


def test_packing_memory(tmp_path, load, monkeypatch):
    """Fails if packing, or applying conditions to what is packed, holds the complete corpus in
    memory."""
    for k in range(100):
        write(tmp_path / f"speech/{k}.wav", noise(2.0))
    # Babble holds eight signals, which would hide the memory of the packing.
    monkeypatch.setattr(synthetic, "apply_condition", lambda waveform, *_: waveform)
    tracemalloc.start()
    corpus = load(f"conditions:{tmp_path / 'speech'}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.packed.nbytes == 100 * 2 * RATE * 2
    assert peak < corpus.packed.nbytes / 2


def test_built_in(load, monkeypatch, tmp_path):
    """Fails if the built-in corpus loses a field when it is packed, or is generated again though it
    is packed."""
    settings = {"seed": 0, "speakers": (2, 1, 1), "utterances": 1}
    monkeypatch.setattr("minidvae.data.corpus.BUILT_IN", settings)
    corpus = load("built-in")
    generated = list(synthetic.generate(0, (2, 1, 1), 1))
    names = ("name", "speaker", "split", "text", "phones", "condition")
    assert fields(corpus.utterances, *names) == fields(generated, *names)
    speakers = synthetic.make_speakers(0, 2, 1, 1)
    assert [u.sex for u in corpus.utterances] == [speaker.sex for speaker in speakers]
    for k, utterance in enumerate(generated):
        expected = utterance.waveform / np.abs(utterance.waveform.astype(float)).max()
        np.testing.assert_allclose(corpus.waveform(k, trim=False), expected, atol=1 / 32767)
    assert load.notes == []
    monkeypatch.setattr(synthetic, "generate", forbid)
    assert load("built-in").utterances == corpus.utterances


# ------------------------------------------------------------------------------------- conditions


@pytest.fixture
def quiet(tmp_path):
    """Return a folder of 120 files of 0.7 s with silence at their ends."""
    folder = tmp_path / "speech"
    splits = ("train", "dev", "test")
    for k in range(120):
        speech = np.concatenate([np.zeros(4000), noise(0.2, seed=k), np.zeros(4000)])
        write(folder / splits[k % 3] / f"s{k % 6}" / f"u{k}.wav", speech)
    (folder / "train/s0/u0.phn").write_text("0 4000 h#\n4000 7200 dh\n")
    (folder / "train/s0/u0.txt").write_text("the")
    return folder


def signal_to_residual_ratio(clean, changed) -> float:
    """Return the ratio in dB of a scaled copy of the clean waveform to all else in the other."""
    residual = changed - changed @ clean / (clean @ clean) * clean
    signal_energy = changed @ changed - residual @ residual
    return 10 * np.log10(signal_energy / max(residual @ residual, 1e-9))


def test_conditions(quiet, load):
    """Fails if an utterance is missing or changes in more than its samples, if the conditions are
    not a quarter each or not what their names say, or if the clean samples cannot be restored or
    have the same fingerprint as the others."""
    clean = load(quiet)
    corrupted = load(f"conditions:{quiet}")
    assert tuple(u._replace(condition="") for u in corrupted.utterances) == clean.utterances
    assert any(u.phones and u.text and u.trim[0] > 0 for u in corrupted.utterances)
    conditions = np.array([u.condition for u in corrupted.utterances])
    counts = np.array([(conditions == condition).sum() for condition in CONDITIONS])
    assert counts.sum() == 120
    assert ((counts - 30) ** 2 / 30).sum() < chi2.ppf(0.999, 3)

    ratios = {condition: [] for condition in CONDITIONS}
    for i, condition in enumerate(conditions):
        waveform = corrupted.waveform(i, trim=False)
        assert np.abs(waveform).max() == 1
        clean_waveform = clean.waveform(i, trim=False)
        ratios[condition].append(signal_to_residual_ratio(clean_waveform, waveform))
        # A channel alone does not fill the silence at the ends.
        peak_at_ends = np.abs(np.concatenate([waveform[:2000], waveform[-2000:]])).max()
        assert (peak_at_ends > 0.01) == (condition in ("noisy", "both"))
    assert min(ratios["clean"]) > 100  # The samples are the same but for rounding.
    assert 4.5 < min(ratios["noisy"])  # The ratio is drawn from 5 to 15 dB.
    assert max(ratios["noisy"]) < 15.5
    assert min(ratios["noisy"]) < max(ratios["noisy"])
    assert max(ratios["channel"]) < 40

    assert corrupted.fingerprint != clean.fingerprint
    assert corrupted.layout not in ("", clean.layout)
    test_split = corrupted.split("test").without_conditions()
    np.testing.assert_array_equal(test_split.waveform(3), clean.split("test").waveform(3))
    assert test_split.fingerprint == clean.split("test").fingerprint
    assert {u.condition for u in test_split.utterances} == {"clean"}
    assert test_split.name == clean.name
    assert test_split.layout == clean.layout
    assert clean.without_conditions() is clean


def test_conditions_depend_on_the_utterance_alone(quiet, load, monkeypatch):
    """Fails if a condition or its channel changes with the other files or their order, its noise
    with the other splits, or its babble not with the other speakers; or if conditions are applied
    again though the result is packed."""
    corrupted = load(f"conditions:{quiet}")
    with monkeypatch.context() as patched:
        patched.setattr(synthetic, "apply_condition", forbid)
        assert load(f"conditions:{quiet}").utterances == corrupted.utterances
    # The files of dev come first. Another dev split is then drawn from train.
    shutil.rmtree(quiet / "dev")
    fewer = load(f"conditions:{quiet}")
    index = {u.name: i for i, u in enumerate(corrupted.utterances)}
    assert 0 < len(fewer) < len(corrupted)
    num_changed = 0
    for i, utterance in enumerate(fewer.utterances):
        before = index[utterance.name]
        assert corrupted.utterances[before].condition == utterance.condition
        if not np.array_equal(fewer.waveform(i), corrupted.waveform(before)):
            assert utterance.split != "test"
            assert utterance.condition in ("noisy", "both")
            num_changed += 1
    assert num_changed > 0


def test_corpora_that_have_conditions(tmp_path, load):
    """Fails if noise is added to a noisy corpus, or if a corpus that says it is clean is
    refused."""
    header = (*HEADER, "condition")
    first_row = ("sounds/a.wav", "anna", "train", "clean")
    second_row = ("sounds/b.wav", "bob", "dev")
    manifest = write_manifest(tmp_path, header, first_row, second_row)
    assert len(load(f"conditions:{manifest}")) == 2
    write_manifest(tmp_path, header, first_row, (*second_row, "noisy"))
    message = r"\.tsv: this corpus has conditions of its own \(noisy\);"
    with pytest.raises(CorpusError, match=message) as raised:
        load(f"conditions:{manifest}")
    assert "\n" not in str(raised.value)
    with pytest.raises(CorpusError, match="nowhere: no such file or folder"):
        load(f"conditions:{tmp_path / 'nowhere'}")


def test_absolute(tmp_path, monkeypatch):
    """Fails if a run that is resumed from another folder does not find its corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/anna")
    for source, expected in (
        ("built-in", "built-in"),
        ("speech", f"{tmp_path}/speech"),
        ("~/x", "/home/anna/x"),
    ):
        assert absolute(source) == expected
        assert absolute(f"conditions:{source}") == f"conditions:{expected}"


# ------------------------------------------------------------------------------------------ crops

# Utterances of the corpus `ramp`: crops of 10 samples have 4, 0, 21 and 1 positions in the trimmed
# parts.
LENGTHS = (40, 9, 30, 25)
TRIMS = ((5, 18), (0, 9), (0, 30), (7, 17))


def offsets() -> list[int]:
    """Return the sample of the packed file with which each utterance of `ramp` begins."""
    return np.cumsum((0, *LENGTHS))[:-1].tolist()


@pytest.fixture
def ramp(tmp_path):
    """Return a corpus whose n-th sample in the file is n, which shows from where a crop was
    taken."""
    packed = np.memmap(tmp_path / "ramp", dtype=np.int16, mode="w+", shape=(sum(LENGTHS),))
    packed[:] = np.arange(sum(LENGTHS))
    utterances = []
    for k, (offset, length, trim) in enumerate(zip(offsets(), LENGTHS, TRIMS, strict=True)):
        utterances.append(Utterance(f"u{k}", "s", "train", offset, length, trim))
    return Corpus("ramp", "folder", tuple(utterances), packed)


def sample_numbers(batch):
    """Return the numbers of the samples in crops of `ramp`."""
    return torch.round(batch * 32767).long()


def positions_of_crops(trim: bool) -> list[int]:
    """Return all samples at which a crop of 10 samples can begin."""
    positions = []
    for offset, length, (start, stop) in zip(offsets(), LENGTHS, TRIMS, strict=True):
        if trim:
            positions += range(offset + start, offset + stop - 10 + 1)
        else:
            positions += range(offset, offset + length - 10 + 1)
    return positions


@pytest.mark.parametrize("trim", [True, False])
def test_crops_are_uniform_and_in_utterances(trim, ramp):
    """Fails if a crop leaves its utterance or the trimmed part, is not contiguous, or if some
    positions are likelier than others."""
    crops = RandomCrops(ramp, 10, 100, seed=3, trim=trim)
    batches = torch.cat([sample_numbers(crops(step)) for step in range(50)])
    assert torch.equal(batches, batches[:, :1] + torch.arange(10))
    positions = positions_of_crops(trim)
    counts = np.array([(batches[:, 0] == p).sum() for p in positions])
    assert counts.sum() == 5000
    expected = 5000 / len(positions)
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(positions) - 1)


def test_crops_are_counted(ramp):
    """Fails if short utterances are not counted, or if an epoch has another number of sequences
    than fit into the utterances without overlap."""
    crops = RandomCrops(ramp, 10, 4)
    assert crops.skipped == 1
    assert crops.sequences == 1 + 0 + 3 + 1  # The trimmed lengths are 13, 9, 30 and 10.
    assert RandomCrops(ramp, 10, 4, trim=False).sequences == 4 + 0 + 3 + 2
    with pytest.raises(CorpusError, match="ramp: no utterance is as long"):
        RandomCrops(ramp, 31, 4)
    with pytest.raises(CorpusError, match="ramp: no utterance is as long"):
        consecutive_crops(ramp, 31, 4)


def test_crops_depend_on_seed_and_step_only(ramp):
    """Fails if a resumed run gets other batches, or if two steps or two seeds get the same ones."""
    batches = [RandomCrops(ramp, 10, 16, seed=1)(step) for step in range(20)]
    crops = RandomCrops(ramp, 10, 16, seed=1)
    crops(3)
    assert all(torch.equal(crops(step), batches[step]) for step in range(10, 20))
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 20
    assert not torch.equal(RandomCrops(ramp, 10, 16, seed=2)(0), batches[0])
    assert batches[0].dtype == torch.float32
    assert batches[0].shape == (16, 10)


@pytest.fixture
def tone(tmp_path):
    """Return a corpus of two utterances: a second of 1 kHz whose last 0.2 s are digital silence,
    and 0.2 s of 1 kHz."""
    time_in_samples = np.arange(RATE)
    wave = 16384 * np.sin(2 * np.pi * 1000 / RATE * time_in_samples)
    wave = wave * (time_in_samples < 0.8 * RATE)
    packed = np.memmap(tmp_path / "tone", dtype=np.int16, mode="w+", shape=(RATE + RATE // 5,))
    packed[:] = np.round(np.concatenate([wave, wave[: RATE // 5]]))
    utterances = (
        Utterance("a", "s", "train", 0, RATE, (0, RATE)),
        Utterance("b", "s", "train", RATE, 3200, (0, 3200)),
    )
    return Corpus("tone", "folder", utterances, packed)


def pitch(crop: torch.Tensor) -> int:
    """Return the frequency in Hz with the most energy."""
    return int(torch.fft.rfft(crop * torch.hann_window(len(crop)), n=RATE).abs().argmax())


@pytest.mark.parametrize("speed", [0.85, 1.0, 1.2])
def test_speed_moves_the_pitch_and_gain_the_level(speed, tone):
    """Fails if a crop that is played faster does not have the pitch of that, is not full, or is
    not as loud as the gain says."""
    augmentation = Augmentation((speed, speed), (-6.0, -6.0))
    crops = RandomCrops(tone, 3200, 64, augmentation=augmentation)(0)
    assert crops.shape == (64, 3200)
    assert crops.dtype == torch.float32
    assert torch.equal(crops, torch.round(crops * 32767) / 32767)
    # Crops that end in the silence are left out.
    loud = [crop[320:2880] for crop in crops if crop[-400:].abs().max() > 0.2]
    assert len(loud) > 32
    for crop in loud:
        assert abs(pitch(crop) - 1000 * speed) <= 1
        assert crop.abs().max() == pytest.approx(0.5 * 10 ** (-6 / 20), rel=0.02)
    # The silence stays digital silence.
    ends_in_silence = crops[:, -1700:].abs().amax(1) < 0.01
    assert not crops[:, -1600:][ends_in_silence].any()
    # The second utterance is too short to be played faster.
    short_corpus = replace(tone, utterances=tone.utterances[1:])
    short = RandomCrops(short_corpus, 3200, 4, augmentation=augmentation)(0)
    assert pitch(short[0]) == pytest.approx(1000 * min(speed, 1), abs=4)


def test_the_equaliser_is_four_cosines_over_log_frequency(tmp_path):
    """Fails if the gain of a crop is not smooth in frequency, does not have the size that was asked
    for, or changes the level of all frequencies."""
    packed = np.memmap(tmp_path / "clicks", dtype=np.int16, mode="w+", shape=(16_384,))
    packed[8_192] = 8_000  # The spectrum of a click is flat.
    utterances = (Utterance("a", "s", "train", 0, 16_384, (0, 16_384)),)
    corpus = Corpus("click", "folder", utterances, packed)
    augmentation = Augmentation(equaliser=3.0)
    batches = [RandomCrops(corpus, 16_384, 64, augmentation=augmentation)(k) for k in range(4)]
    crops = torch.cat(batches)
    gains = 20 * torch.log10(torch.fft.rfft(crops).abs() * 32_767 / 8_000)  # dB (256, frequencies)
    hertz = torch.linspace(0, RATE / 2, gains.shape[1])
    warped = torch.log(1 + hertz / 100) / np.log(1 + RATE / 200)  # 0 at 0 Hz, 1 at 8 kHz
    basis = torch.stack([torch.cos(k * torch.pi * warped) for k in range(5)], dim=1)
    amplitudes = torch.linalg.lstsq(basis, gains.T).solution  # (5, 256), the first of the level
    # Rounding to 16 bits leaves an error of less than 0.3 dB.
    assert (basis @ amplitudes - gains.T).abs().median() < 0.3
    assert amplitudes[0].abs().median() < 0.1
    assert amplitudes[1:].std(1).numpy() == pytest.approx(4 * [3.0], rel=0.2)


def test_augmented_crops_depend_on_seed_and_step_only(tone):
    """Fails if a resumed run gets other voices, or if all crops of a batch have one speed or one
    gain."""
    augmentation = Augmentation((0.8, 1.25), (-6.0, 6.0), equaliser=0.01)
    batches = [RandomCrops(tone, 3200, 8, 1, augmentation=augmentation)(step) for step in range(6)]
    crops = RandomCrops(tone, 3200, 8, 1, augmentation=augmentation)
    crops(2)
    assert all(torch.equal(crops(step), batches[step]) for step in (4, 5))
    speed_only = RandomCrops(tone, 3200, 32, 1, augmentation=Augmentation((0.8, 1.25)))
    pitches = [torch.fft.rfft(crop, n=RATE).abs().argmax() for crop in speed_only(0)]
    assert len({int(frequency) // 40 for frequency in pitches}) > 5
    peaks = set()  # dB
    for crop in torch.cat(batches):
        if crop.any():
            peaks.add(round(20 * np.log10(crop.abs().max().item()), 1))
    assert len(peaks) > 20
    assert min(peaks) > -12.2
    assert max(peaks) < 0.3


def test_consecutive_crops_cover(ramp):
    """Fails if crops of a development set overlap, leave a gap, are out of order, or cross the end
    of an utterance."""
    first, _, third, fourth = offsets()
    expected = [first + 5, third, third + 10, third + 20, fourth + 7]
    batches = list(consecutive_crops(ramp, 10, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    samples = sample_numbers(torch.cat(batches))
    assert samples[:, 0].tolist() == expected
    assert torch.equal(samples, samples[:, :1] + torch.arange(10))


def test_split_shares_the_map(ramp):
    """Fails if a split copies the samples."""
    assert ramp.split("train").packed is ramp.packed


def write_sparse_file(path, size: int) -> None:
    """Write a file of zeros that takes no space on the disk."""
    with open(path, "wb") as file:
        file.truncate(size)


def test_drawing_from_ten_hours(tmp_path):
    """Fails if drawing 32 × 2.4 s from ten hours reads the complete file, or takes 20 ms (it should
    take about 2)."""
    length = 10 * RATE
    utterances = []
    for k in range(3600):
        utterances.append(Utterance(f"u{k}", "s", "train", k * length, length, (0, length)))
    write_sparse_file(tmp_path / "packed", 2 * 3600 * length)
    packed = np.memmap(tmp_path / "packed", dtype=np.int16, mode="r", shape=(3600 * length,))
    corpus = Corpus("ten hours", "folder", tuple(utterances), packed)
    crops = RandomCrops(corpus, samples=38400, batch_size=32)
    tracemalloc.start()
    crops(0)
    # The memory of the batch is torch's, which is not traced.
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 2**20
    tracemalloc.stop()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        crops(0)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.02


MEASURE_LARGE_CORPUS = """
import json, resource, sys, time
from pathlib import Path
from minidvae.data import packing
from minidvae.data.corpus import Corpus
from minidvae.data.crops import RandomCrops

def shortest(clock, call, repeats):
    times = []
    for _ in range(repeats):
        begin = clock()
        call()
        times.append(clock() - begin)
    return min(times)

folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
packed = packing.read(folder)
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
corpus = Corpus("speech", packed.layout, packed.utterances, packed.samples)
crops = RandomCrops(corpus.split("train"), 38400, 32)
steps = iter(range(100))
print(json.dumps({
    "utterances": len(corpus),
    "megabytes": kilobytes / 1024,
    "read": shortest(time.process_time, lambda: packing.read(folder), 2),
    "split": shortest(time.process_time, lambda: corpus.split("train"), 3),
    "fingerprint": shortest(time.process_time, lambda: corpus.fingerprint, 2),
    "batch": shortest(time.perf_counter, lambda: crops(next(steps)), 10),
}))
"""


def test_a_thousand_hours(tmp_path):
    """Fails if the index of 280,000 utterances takes seconds to open, or more memory than a small
    machine has; if a split or the fingerprint takes seconds; or if a batch takes a second because
    pages are read one after the other."""
    num_utterances = 280_000
    length = 13 * RATE
    text = "AS LONG AS A LINE OF LIBRISPEECH IS " * 5
    utterances = []
    for k in range(num_utterances):
        speaker = str(k % 2400)
        split = "dev" if k % 50 == 0 else "train"
        trim = (512, length - 512)
        name = f"{speaker}-{k:06d}"
        utterance = Utterance(name, speaker, split, k * length, length, trim, text, sex="F")
        utterances.append(utterance)
    num_samples = num_utterances * length
    header = {"layout": "LibriSpeech", "notes": [], "drawn": False, "samples": num_samples}
    packing.write_index(tmp_path, header, utterances)
    write_sparse_file(tmp_path / "waveforms.int16", 2 * num_samples)
    command = [sys.executable, "-c", MEASURE_LARGE_CORPUS, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    measured = json.loads(process.stdout)
    assert measured["utterances"] == num_utterances
    assert measured["megabytes"] < 300
    assert measured["read"] < 3  # seconds, as all that follow
    assert measured["split"] < 0.6
    assert measured["fingerprint"] < 3
    assert measured["batch"] < 0.3


# ------------------------------------------------------------------------------------ real speech


def test_real_speech(load, shared):
    """Fails if minutes, speakers or utterances of a split of real speech are not those of the
    corpus, if sexes are missing, or if trimming takes more than the silence at the ends."""
    corpus = load(shared / "speech/LibriSpeech")
    assert corpus.layout == "LibriSpeech"
    assert load.notes == []
    expected = {"train": (42.7, 201, 201), "dev": (9.6, 50, 50), "test": (6.7, 5, 50)}
    for name, (minutes, num_speakers, num_utterances) in expected.items():
        split = corpus.split(name)
        assert round(split.seconds / 60, 1) == minutes
        assert len(split.speakers) == num_speakers
        assert len(split) == num_utterances
    assert {u.sex for u in corpus.utterances} == {"F", "M"}
    trimmed = sum(u.trim[1] - u.trim[0] for u in corpus.utterances)
    total = sum(u.length for u in corpus.utterances)
    assert 0.8 < trimmed / total < 1  # Read speech has a little silence at both ends.
