"""Speech corpora: a folder, a manifest or the built-in speech, packed once into one memory-mapped file.

    corpus = load_corpus("~/LibriSpeech")            # or "built-in", or "my-corpus.tsv"
    train = corpus.split("train")
    cuts = Cuts(train, samples=38400, batch_size=32, seed=0)
    batch = cuts(step)                               # (32, 38400) float32, the same for the same (seed, step)

Every utterance is decoded once to 16 kHz mono, scaled to max |s| = 1 and packed as int16, whole; the bounds
of the speech inside it (leading and trailing silence left out) stand in the index, so that phone labels keep
their times and a model that wants untrimmed signals has them.

A manifest is a TSV file whose header names the columns path, speaker, split (train, dev or test) and, where
known, text, phones (a file of `start stop label` lines in samples of the audio file, as TIMIT's .PHN), sex
(F or M) and condition. Paths are relative to the manifest's folder.

"conditions:" before any of them ("conditions:built-in") lays noise and channels over a corpus that has none: every
utterance is there once, in one of CONDITIONS. Which one, and what noise and channel, depends on its name alone, and
on the other speakers' speech where the noise is babble.
"""
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minidvae import audio, synthetic

# Folders are recognised by the path of their audio files, ending left out, upper and lower case alike; the
# folders may lie below others (LibriSpeech/train-clean-100/…). The first layout that fits any file is taken.
# In every layout a transcript may lie beside a file as .txt, phone labels as .phn, and the speakers' sexes in
# a speakers.tsv with the columns speaker and sex.
LAYOUTS = {
    # TRAIN/DR1/FCJF0/SX127.WAV. The SA sentences, which all speakers read, are excluded as usual.
    "TIMIT": r"(?P<split>train|test)/dr[1-8]/(?P<speaker>[fm]\w{3}\d)/(?!sa\d)\w+",
    # si_tr_s/011/011c0201.wav
    "WSJ0": r"(?P<split>si_tr_s|si_dt_05|si_et_05)/(?:.+/)?(?P<speaker>\w{3})\w+",
    # clean_trainset_28spk_wav/p226_001.wav, clean_testset_wav/p232_001.wav
    "VoiceBank": r"(?:clean_)?(?P<split>train|test)set(?:_\d+spk)?_wav\w*/(?:.+/)?(?P<speaker>p\d+)_\w+",
    # test/both/440/440c0201.wv1: the corpus has no such folders; sort its 14 sets into its four conditions.
    "Aurora-4": r"(?P<split>train|dev|test)/(?P<condition>clean|noisy|channel|both)/"
                r"(?:.+/)?(?P<speaker>\w{3})\w+",
    # train-clean-100/19/198/19-198-0000.flac, test/367/367-130732-0000.flac, 19/198/19-198-0000.flac
    "LibriSpeech": r"(?:(?P<split>train|dev|test)[-\w]*/)?(?P<speaker>\d+)/(?:\d+/)?(?P=speaker)-\d+-\d+",
    # train/anna/hello.wav, or train/hello.wav without speakers
    "split/speaker": r"(?P<split>train|training|dev|val|valid|validation|test)/"
                     r"(?:(?P<speaker>[^/]+)/)?(?:.+/)?[^/]+",
    # anna/hello.wav, hello.wav: the folder is the speaker and splits are drawn
    "folder": r"(?:(?P<speaker>[^/]+)/)?[^/]+",
}
SPLITS = {"tr": "train", "si_tr": "train", "de": "dev", "va": "dev", "si_dt": "dev", "te": "test",
          "si_et": "test"}  # by how the folder's name starts
VOICEBANK_DEV = "p226 p287".split()
TIMIT_TEST = """mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 mbpm0 mklt0 fnlp0
    mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0""".split()  # the core test set
# The 50 development speakers of Halberstadt (1998). The other 94 speakers of TEST are left out.
TIMIT_DEV = """faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 fadg0 fdms0
    fedw0 mgjf0 mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0
    fmah0 fdrw0 mrcs0 mrjm4 fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 fmml0
    mrws1""".split()

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".sph", ".wv1")
LABELS = (".txt", ".phn", ".dot", ".lsn", "speakers.tsv")
SHORTEST = 0.1  # seconds; shorter files are skipped
CONDITIONS_OF = "conditions:"  # before the name of a corpus
# The names of Aurora-4 and those of `apply_condition`. "both": noise and channel.
CONDITIONS = {"clean": "clean", "noisy": "noise", "channel": "channel", "both": "both"}
CLEAN = ("", "clean")  # Utterance.condition where nothing is known to lie over the speech
BUILT_IN = {"seed": 0, "speakers": (32, 8, 8), "utterances": 10}
FORMAT = 1  # of the packed files: another number packs every corpus anew


class CorpusError(ValueError):
    """One line: the path, what is wrong with it and what would be right."""


@dataclass(frozen=True)
class Utterance:
    name: str  # unique in the corpus and fit for a file name
    speaker: str
    split: str  # train, dev, test
    start: int  # first sample in the packed file
    length: int  # samples
    trim: tuple[int, int]  # first sample of the speech and the one after its last, counted from `start`
    text: str = ""
    phones: tuple[tuple[int, int, str], ...] = ()  # (start, stop, label) in samples counted from `start`
    sex: str = ""  # F, M or unknown
    condition: str = ""  # clean, noisy, channel, both or unknown


@dataclass(frozen=True)
class Corpus:
    """Utterances and the memory-mapped samples they point into."""

    name: str
    layout: str  # a key of LAYOUTS, "manifest" or "built-in"; with conditions laid over it, CONDITIONS_OF before that
    utterances: tuple[Utterance, ...]
    packed: np.memmap  # int16, all utterances end to end
    clean: np.memmap | None = None  # where conditions were laid over it: the same before, in the same places

    def __len__(self) -> int:
        return len(self.utterances)

    def split(self, name: str) -> "Corpus":
        """The utterances of one split, on the same memory map. CorpusError where there are none."""
        chosen = tuple(u for u in self.utterances if u.split == name)
        if not chosen:
            there = ", ".join(sorted({u.split for u in self.utterances}))
            raise CorpusError(f"{self.name}: there is no split {name!r} (there is: {there})")
        return replace(self, utterances=chosen)

    def without_conditions(self) -> "Corpus":
        """The same utterances before conditions were laid over them; the corpus itself where none were."""
        if self.clean is None:
            return self
        utterances = tuple(replace(u, condition="clean") for u in self.utterances)
        name, layout = (text.removeprefix(CONDITIONS_OF) for text in (self.name, self.layout))
        return Corpus(name, layout, utterances, self.clean)

    def spread(self, limit: int) -> "Corpus":
        """At most `limit` utterances, evenly spread over the corpus."""
        count = min(limit, len(self))
        return replace(self, utterances=tuple(self.utterances[i * len(self) // count] for i in range(count)))

    @property
    def speakers(self) -> tuple[str, ...]:
        return tuple(sorted({u.speaker for u in self.utterances}))

    @property
    def fingerprint(self) -> str:
        """Changes with any utterance's name, split, place, length, trim or the condition laid over it: a resumed run
        must find the same."""
        rows = [(u.name, u.split, u.start, u.length, *u.trim) for u in self.utterances]
        if self.clean is not None:
            rows = [(*row, u.condition) for row, u in zip(rows, self.utterances, strict=True)]
        return _digest(rows)

    @property
    def labels_fingerprint(self) -> str:
        """Changes with what is known of any utterance: text, phones, speaker, sex, condition."""
        rows = [(u.speaker, u.text, u.phones, u.sex, u.condition) for u in self.utterances]
        return _digest(rows)

    @property
    def seconds(self) -> float:
        """Duration of the whole, untrimmed utterances."""
        return sum(u.length for u in self.utterances) / audio.SAMPLE_RATE

    def waveform(self, i: int, trim: bool = True) -> np.ndarray:
        """Utterance i, float32 (samples,), max |s| = 1 over the untrimmed utterance."""
        u = self.utterances[i]
        first, stop = u.trim if trim else (0, u.length)
        return _unpack(self.packed[u.start + first : u.start + stop])


def _digest(rows: list[tuple]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _unpack(samples: np.ndarray) -> np.ndarray:
    return np.asarray(samples) * np.float32(1 / 32767)


class Segments:
    """All cuts of `samples` samples, numbered utterance by utterance: their starts are `stride` samples apart,
    the first at the start of the utterance (of its trimmed part with `trim`). Nothing is copied: `segments[numbers]`
    reads the packed file.

    Utterances shorter than one cut are left out and counted in `skipped`; CorpusError when all are.
    """

    def __init__(self, corpus: Corpus, samples: int, stride: int = 1, trim: bool = True):
        bounds = [(u.start + u.trim[0], u.trim[1] - u.trim[0]) if trim else (u.start, u.length)
                  for u in corpus.utterances]
        starts, lengths = np.array(bounds, dtype=np.int64).T
        if lengths.max() < samples:
            raise CorpusError(f"{corpus.name}: no utterance is as long as one sequence of "
                              f"{samples / audio.SAMPLE_RATE:.2f} s; the longest of {len(corpus)} has "
                              f"{lengths.max() / audio.SAMPLE_RATE:.2f} s")
        self.corpus, self.samples, self.stride = corpus, samples, stride
        self.utterances = np.flatnonzero(lengths >= samples)  # index in the corpus of each that is used
        self.starts = starts[self.utterances]
        self.counts = (lengths[self.utterances] - samples) // stride + 1  # segments of each
        self.ends = np.cumsum(self.counts)
        self.skipped = len(corpus) - len(self.utterances)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Where in `utterances` each segment belongs."""
        return np.searchsorted(self.ends, numbers, side="right")

    def __getitem__(self, numbers: np.ndarray) -> torch.Tensor:
        """(n,) → (n, samples) float32 on the CPU, pinned where there is a GPU."""
        rows = self.rows(numbers)
        starts = self.starts[rows] + (numbers - (self.ends - self.counts)[rows]) * self.stride
        cuts = torch.empty(len(numbers), self.samples, pin_memory=torch.cuda.is_available())
        for cut, start in zip(cuts.numpy(), starts, strict=True):
            cut[:] = self.corpus.packed[start : start + self.samples]
        return cuts.mul_(1 / 32767)

    def in_order(self, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """All segments once: their numbers (≤ batch_size,) and cuts (≤ batch_size, samples)."""
        for first in range(0, len(self), batch_size):
            numbers = np.arange(first, min(first + batch_size, len(self)))
            yield numbers, self[numbers]


class Cuts:
    """Random training cuts: `cuts(step)` is a function of (seed, step) alone, so resuming needs no state.

    Every position at which `samples` samples fit into an utterance (its trimmed part with `trim`) is equally
    likely. Utterances that are shorter are left out and counted in `skipped`; CorpusError when all are.
    `sequences`: how many such cuts the corpus holds side by side, the length of an epoch.
    """

    def __init__(self, corpus: Corpus, samples: int, batch_size: int, seed: int = 0, trim: bool = True):
        self.segments = Segments(corpus, samples, trim=trim)
        self.batch_size, self.seed, self.skipped = batch_size, seed, self.segments.skipped
        self.sequences = int(((self.segments.counts - 1 + samples) // samples).sum())

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of a step: (batch, samples) float32 on the CPU, pinned where there is a GPU."""
        drawn = np.random.default_rng((self.seed, step)).integers(len(self.segments), size=self.batch_size)
        return self.segments[drawn]


def segments(corpus: Corpus, samples: int, batch_size: int, trim: bool = True) -> Iterator[torch.Tensor]:
    """The corpus once through, as a development set: consecutive cuts of each utterance that do not overlap.

    Yields (≤ batch_size, samples) float32, in order. What is left at an utterance's end is dropped. CorpusError,
    when called, where no utterance holds one.
    """
    cuts = Segments(corpus, samples, stride=samples, trim=trim)
    return (batch for _, batch in cuts.in_order(batch_size))


# ---- Finding a corpus ------------------------------------------------------------------------------------


def load_corpus(source: str | Path = "built-in", cache: str | Path | None = None, progress: bool = True,
                note: Callable[[str], None] = print) -> Corpus:
    """The corpus at `source`: "built-in", a folder in one of LAYOUTS, or a manifest; with CONDITIONS_OF before it,
    that corpus with conditions laid over it (see the module).

    The first time it is packed under `cache` (else $MINIDVAE_CACHE, else ~/.cache/minidvae; 115 MB an hour),
    with a progress bar; again when a file's path, size or time of change differs. `note` is given what the
    user should know, a line each: files skipped, files converted to 16 kHz mono, splits drawn.
    CorpusError: nothing at `source`, nothing that can be used in it, a wrong manifest, no room to pack, conditions
    to be laid over a corpus that has its own.
    """
    name, root, clean = str(source), Path(os.path.expanduser(source)), None
    cache = Path(cache or os.environ.get("MINIDVAE_CACHE") or "~/.cache/minidvae").expanduser()
    place = str(root.resolve())
    if name.startswith(CONDITIONS_OF):
        clean = load_corpus(name.removeprefix(CONDITIONS_OF), cache, progress, note)
        if own := sorted({u.condition for u in clean.utterances}.difference(CLEAN)):
            raise CorpusError(f"{name}: this corpus has conditions of its own ({', '.join(own)}); "
                              f"leave out {CONDITIONS_OF!r}")
        place, contents = CONDITIONS_OF, [synthetic.VERSION, Path(clean.packed.filename).parent.name]
    elif name == "built-in":
        place, contents = name, {"version": synthetic.VERSION, **BUILT_IN}
    elif os.path.isdir(root):
        contents = _scan(root)
    elif os.path.isfile(root):
        entries = _read_manifest(root)
        contents = [(entry, _stamp(entry["path"]), _stamp(entry["phones"])) for entry in entries]
    else:
        raise CorpusError(f"{name}: no such file or folder; looked for a folder of speech, a manifest "
                          f"(TSV: path, speaker, split), or the word built-in")
    key = json.dumps([FORMAT, place, contents])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    opened, damaged = _open(folder, name), folder.exists()
    if opened is None:
        notes = []
        if clean is not None:
            layout, clips = CONDITIONS_OF + clean.layout, _lay_conditions(clean, progress)
        elif name == "built-in":
            layout, clips = "built-in", _speak(progress)
        else:
            layout = "manifest"
            if os.path.isdir(root):
                layout, entries = _list_folder(root, contents, notes)
            clips = _decode(tqdm(entries, f"packing {name}", unit=" files", disable=None if progress else True), notes)
        try:
            if damaged:
                shutil.rmtree(folder, ignore_errors=True)
            _pack(folder, name, layout, clips, notes)
        except OSError as error:
            raise CorpusError(f"{cache}: the packed corpus cannot be written here ({error.strerror}); name "
                              f"another folder in MINIDVAE_CACHE (115 MB per hour of speech)") from None
        opened = _open(folder, name)
    corpus, notes = opened
    for line in notes:
        note(line)
    return replace(corpus, clean=clean.packed) if clean is not None else corpus


def absolute(source: str) -> str:
    """A source for `load_corpus` that means the same from every folder."""
    if source.startswith(CONDITIONS_OF):
        return CONDITIONS_OF + absolute(source.removeprefix(CONDITIONS_OF))
    return source if source == "built-in" else str(Path(source).expanduser().absolute())


def _scan(root: Path) -> dict[str, tuple[int, int]]:
    """All audio and label files below `root`, sorted: path relative to it → size, time of change.

    Hidden files and folders are left out, and so are folders met before (links that lead in a circle).
    """
    def refuse(error: OSError):
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})")

    files, seen = {}, set()
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and name.lower().endswith(AUDIO + LABELS):
                path = os.path.join(folder, name)
                files[Path(path).relative_to(root).as_posix()] = _stamp(path)
    if not any(file.lower().endswith(AUDIO) for file in files):
        raise CorpusError(f"{root}: no audio files here or below; looked for {' '.join(AUDIO)}")
    return dict(sorted(files.items()))


def _list_folder(root: Path, files: dict, notes: list[str]) -> tuple[str, list[dict]]:
    """The layout of a folder and its entries, as _read_manifest gives them."""
    sounds = [file for file in files if file.lower().endswith(AUDIO)]
    for layout in LAYOUTS:  # noqa: B007
        pattern = re.compile(rf"(?:^|/){LAYOUTS[layout]}\.\w+$", re.IGNORECASE)
        found = [(file, match.groupdict()) for file in sounds if (match := pattern.search(file))]
        if found:
            break
    labels = {file.lower(): root / file for file in files}  # TIMIT comes in upper case and in lower case
    transcripts, sexes = _read_lists(root, files, layout)
    entries = []
    for file, fields in found:
        speaker = fields["speaker"] or Path(root.resolve().name, file).parent.name
        stem = os.path.splitext(file.lower())[0]
        text = transcripts.get(os.path.basename(stem), "")
        if not text and f"{stem}.txt" in labels:
            text = _read_text(labels[f"{stem}.txt"])
            text = re.sub(r"^\d+ \d+ ", "", text) if layout == "TIMIT" else text  # first and last sample
        entries.append({"path": file, "speaker": speaker,
                        "split": _split(layout, fields.get("split"), speaker),
                        "text": " ".join(text.split()), "phones": str(labels.get(f"{stem}.phn", "")),
                        "sex": sexes.get(speaker) or (speaker[0].upper() if layout == "TIMIT" else ""),
                        "condition": (fields.get("condition") or "").lower()})
    if any(entry["split"] for entry in entries):
        entries = [entry for entry in entries if entry["split"]]
    if len(entries) < len(sounds):
        notes.append(f"{root}: read as {layout}; left out {len(sounds) - len(entries)} of {len(sounds)} "
                     f"audio files, which are in none of its splits")
    entries = _name(entries)
    return layout, [{**entry, "path": str(root / entry["path"])} for entry in entries]


def _split(layout: str, folder: str | None, speaker: str) -> str:
    """The split that the folder's name stands for; empty where there is none."""
    split = next((split for start, split in SPLITS.items() if (folder or "").lower().startswith(start)), "")
    if layout == "VoiceBank" and speaker.lower() in VOICEBANK_DEV:
        return "dev"
    if layout == "TIMIT" and split == "test":
        return "test" if speaker.lower() in TIMIT_TEST else "dev" if speaker.lower() in TIMIT_DEV else ""
    return split


def _read_lists(root: Path, files: dict, layout: str) -> tuple[dict[str, str], dict[str, str]]:
    """Transcripts by utterance (its file's name in lower case) and sexes by speaker, from lists of them."""
    transcripts, sexes = {}, {}
    for file in files:
        name = os.path.basename(file).lower()
        if name == "speakers.tsv":  # columns speaker, sex
            sexes.update((row.get("speaker"), row.get("sex")) for row in _read_table(root / file))
        elif name == "speakers.txt":  # LibriSpeech: 19 | F | train-clean-100 | …
            rows = (line.split("|") for line in _read_text(root / file).splitlines() if line[:1] != ";")
            sexes.update((row[0].strip(), row[1].strip()) for row in rows if len(row) > 1)
        elif name.endswith(".trans.txt"):  # LibriSpeech: 19-198-0000 NORTHANGER ABBEY
            rows = (line.partition(" ") for line in _read_text(root / file).splitlines())
            transcripts.update((row[0].lower(), row[2]) for row in rows)
        elif name.endswith((".dot", ".lsn")):  # WSJ0: The words. (011c0201)
            rows = re.findall(r"^(.*)\((\w+)\)\s*$", _read_text(root / file), re.MULTILINE)
            transcripts.update((utterance.lower(), text) for text, utterance in rows)
        elif name.endswith(".txt") and layout == "VoiceBank":  # trainset_28spk_txt/p226_001.txt
            transcripts[name.removesuffix(".txt")] = _read_text(root / file)
    return transcripts, sexes


def _read_manifest(manifest: Path) -> list[dict]:
    """The rows of a manifest as entries: fields of Utterance, `path`, and `phones` as a path or empty."""
    entries, lines, needed = [], {}, ("path", "speaker", "split")
    form = "a manifest has a header with the columns path, speaker, split, and tabs between them"
    for number, row in enumerate(_read_table(manifest), start=2):
        where = f"{manifest}: line {number}"
        if not all(row.get(column) for column in needed):
            raise CorpusError(f"{where}: no {' or '.join(c for c in needed if not row.get(c))}; {form}")
        if row["split"] not in ("train", "dev", "test"):
            raise CorpusError(f"{where}: unknown split {row['split']!r}; right are train, dev, test")
        for column in ("path", "phones"):
            if row.get(column) and not os.path.isfile(manifest.parent / row[column]):
                raise CorpusError(f"{where}: no such file: {manifest.parent / row[column]} "
                                  f"(paths start from the manifest's folder)")
        if (first := lines.setdefault(os.path.realpath(manifest.parent / row["path"]), number)) != number:
            raise CorpusError(f"{where}: {row['path']} stands in line {first} already; each file belongs to one split")
        entries.append({key: row.get(key) or "" for key in (*needed, "text", "phones", "sex", "condition")})
    if not entries:
        raise CorpusError(f"{manifest}: no rows; {form}")
    return [{**entry, "path": str(manifest.parent / entry["path"]),
             "phones": str(manifest.parent / entry["phones"]) if entry["phones"] else ""}
            for entry in _name(entries)]


def _name(entries: list[dict]) -> list[dict]:
    """Give the entries unique names: the file's; with the speaker where that is not unique; else the path."""
    stems = [Path(entry["path"]).stem for entry in entries]
    spoken = [f"{entry['speaker']}-{stem}" for entry, stem in zip(entries, stems, strict=True)]
    paths = [entry["path"] for entry in entries]
    numbered = [f"{k}-{stem}" for k, stem in enumerate(stems)]
    for names in (stems, spoken, paths, numbered):
        names = [re.sub(r"[^\w.-]", "_", name) for name in names]
        if len(set(names)) == len(entries):
            break
    return [{**entry, "name": name} for entry, name in zip(entries, names, strict=True)]


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV file by the names in its header; cells that a row lacks are missing in it."""
    header, *rows = [line.rstrip("\r").split("\t") for line in _read_text(path).rstrip().split("\n")]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from None


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


# ---- Packing it ------------------------------------------------------------------------------------------


def built_in_speakers() -> dict[str, synthetic.Speaker]:
    """The voices of the built-in corpus by name, in the true values that make them; no sound is made."""
    return {voice.name: voice for voice in synthetic.make_speakers(BUILT_IN["seed"], *BUILT_IN["speakers"])}


def _speak(progress: bool) -> Iterator[tuple[dict, np.ndarray]]:
    """The built-in corpus, as _decode gives it."""
    speakers = built_in_speakers()
    total = len(speakers) * BUILT_IN["utterances"]
    utterances = synthetic.generate(**BUILT_IN)
    for u in tqdm(utterances, "packing built-in", total, disable=None if progress else True):
        yield {"name": u.name, "speaker": u.speaker, "split": u.split, "text": u.text, "phones": u.phones,
               "sex": speakers[u.speaker].sex, "condition": u.condition}, u.waveform.astype(np.float32)


def _lay_conditions(clean: Corpus, progress: bool) -> Iterator[tuple[dict, np.ndarray]]:
    """A corpus, each utterance in a condition drawn for it, as _decode gives it. Babble is made of eight utterances by
    other speakers of the same split, where there are others."""
    bar = tqdm(clean.utterances, f"packing {CONDITIONS_OF}{clean.name}", unit=" utterances",
               disable=None if progress else True)
    places = np.array([u.split for u in clean.utterances])
    splits = {split: np.flatnonzero(places == split) for split in set(places)}
    alone = {split for split in splits if len({clean.utterances[i].speaker for i in splits[split]}) < 2}
    for i, u in enumerate(bar):

        def babble(n: int, random: np.random.Generator, u=u) -> np.ndarray:
            voices, count = np.zeros(n), 0
            while count < 8:
                j = random.choice(splits[u.split]).item()
                if clean.utterances[j].speaker != u.speaker or u.split in alone:
                    voice = clean.waveform(j)
                    start = random.integers(len(voice))
                    voices += np.resize(np.roll(voice, -start), n) / np.sqrt(np.mean(voice**2))
                    count += 1
            return voices

        random = np.random.default_rng(zlib.crc32(u.name.encode()))
        condition = random.choice(list(CONDITIONS)).item()
        fields = {key: value for key, value in vars(u).items() if key not in ("start", "length", "condition")}
        waveform = synthetic.apply_condition(clean.waveform(i, trim=False), CONDITIONS[condition], random, babble)
        yield fields | {"condition": condition}, waveform


def _decode(entries, notes: list[str]) -> Iterator[tuple[dict, np.ndarray]]:
    """Read the files of `entries`: (fields of Utterance, float32 waveform at 16 kHz) each."""
    skipped, converted = {}, Counter()
    for entry in entries:
        path, labels = entry["path"], entry["phones"]
        try:
            waveform, rate, channels = audio.read(path)
        except audio.AudioError as error:
            skipped.setdefault("cannot be read", []).append(error)
            continue
        if len(waveform) < SHORTEST * rate or not waveform.any():
            reason = "silent" if len(waveform) >= SHORTEST * rate else f"shorter than {SHORTEST} s"
            skipped.setdefault(reason, []).append(path)
            continue
        if (rate, channels) != (audio.SAMPLE_RATE, 1):
            converted[rate, channels] += 1
            waveform = audio.resample(waveform, rate, audio.SAMPLE_RATE)
        scale = audio.SAMPLE_RATE / rate
        phones = tuple((round(start * scale), round(stop * scale), label)
                       for start, stop, label in (_read_phones(labels) if labels else ()))
        yield {**{key: value for key, value in entry.items() if key != "path"}, "phones": phones}, waveform
    if skipped:
        count = sum(map(len, skipped.values()))
        reasons = [f"{len(files)} {reason} (first: {files[0]})" for reason, files in skipped.items()]
        notes.append(f"skipped {count} of {len(entries)} files: {', '.join(reasons)}")
    if converted:
        origins = [f"{n} files from {rate} Hz / {channels} channel{'s' * (channels > 1)}"
                   for (rate, channels), n in sorted(converted.items())]
        notes.append(f"converted to 16 kHz mono: {', '.join(origins)}")


def _read_phones(path: str) -> list[tuple[int, int, str]]:
    rows = [line.split() for line in _read_text(Path(path)).splitlines() if line.strip()]
    try:
        return [(int(start), int(stop), label) for start, stop, label in rows]
    except ValueError:
        raise CorpusError(f"{path}: wrong phone labels; each line should be: start stop label") from None


def _pack(folder: Path, name: str, layout: str, clips: Iterator[tuple[dict, np.ndarray]], notes: list[str]):
    """Stream clips, (fields of Utterance, float32 waveform) each, to `folder`, which appears only whole. What is not
    among the fields is found out here: the place, and the trim."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory("", "packing-", folder.parent, ignore_cleanup_errors=True) as beside:
        utterances, samples = [], 0
        packed = Path(beside, "corpus")
        packed.mkdir()
        with open(packed / "waveforms.int16", "wb") as file:
            for fields, waveform in clips:
                waveform = waveform / np.abs(waveform).max()
                file.write(np.round(waveform * 32767).astype("<i2").tobytes())
                trim = fields.pop("trim", None) or audio.trim_bounds(waveform)
                utterances.append(Utterance(start=samples, length=len(waveform), trim=trim, **fields))
                samples += len(waveform)
        if not utterances:
            raise CorpusError("; ".join([f"{name}: holds nothing that can be used as speech", *notes]))
        utterances = _complete_splits(utterances, name, notes)
        index = {"layout": layout, "notes": notes, "samples": samples,
                 "utterances": [vars(u) for u in utterances]}
        (packed / "index.json").write_text(json.dumps(index))
        try:
            packed.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same
                raise


def _complete_splits(utterances: list[Utterance], name: str, notes: list[str]) -> list[Utterance]:
    """Draw splits where there are none, or a development set from train where only that is missing."""
    there = {u.split for u in utterances}
    wanted = ("dev", "test") if there == {""} else ("dev",) if "train" in there and "dev" not in there else ()
    pool = [u for u in utterances if u.split in ("", "train")]
    if not wanted or len(pool) == 1:
        return [replace(u, split=u.split or "train") for u in utterances]
    by, units = ("speaker", "speakers") if len({u.speaker for u in pool}) >= 5 else ("name", "files")
    order = sorted({getattr(u, by) for u in pool}, key=lambda x: hashlib.sha256(os.fsencode(x)).digest())
    tenth = max(1, round(len(order) / 10))
    drawn = dict(zip(order[:-1], [split for split in wanted for _ in range(tenth)], strict=False))
    counts = Counter(drawn.values())
    notes.append(f"{name}: found no {'splits' if there == {''} else 'dev split'}; drew "
                 + "".join(f"{counts[split]} {units} for {split}, " for split in wanted if counts[split])
                 + f"{len(order) - len(drawn)} {units} for train")
    return [replace(u, split=drawn.get(getattr(u, by), "train")) if u.split in ("", "train") else u
            for u in utterances]


def _open(folder: Path, name: str) -> tuple[Corpus, list[str]] | None:
    """A packed corpus and its notes, or None where there is none or it is damaged."""
    try:
        index = json.loads((folder / "index.json").read_text())
        packed = np.memmap(folder / "waveforms.int16", dtype="<i2", mode="r", shape=(index["samples"],))
    except (OSError, ValueError):
        return None
    utterances = tuple(Utterance(**{**u, "trim": tuple(u["trim"]), "phones": tuple(map(tuple, u["phones"]))})
                       for u in index["utterances"])
    return Corpus(name, index["layout"], utterances, packed), index["notes"]
