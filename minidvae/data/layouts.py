"""What a folder or a manifest of speech holds: its files with speakers, splits and labels, an entry (a dict) each.

An entry has the path of a sound file and, as text that is empty where it is not known, speaker, split, text, phones
(a path), sex and condition; and a name. docs/data.md describes the layouts and the columns of a manifest.
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

# Layouts are told by the ends of their audio files' paths, upper and lower case alike. The first that fits any file is
# taken. In every layout a transcript may lie beside a file as .txt, phone labels as .phn, and sexes in a speakers.tsv.
LAYOUTS = {
    # TRAIN/DR1/FCJF0/SX127.WAV. The SA sentences, which all speakers read, are excluded as usual.
    "TIMIT": r"(?P<split>train|test)/dr[1-8]/(?P<speaker>[fm]\w{3}\d)/(?!sa\d)\w+",
    "WSJ0": r"(?P<split>si_tr_s|si_dt_05|si_et_05)/(?:.+/)?(?P<speaker>\w{3})\w+",  # si_tr_s/011/011c0201.wav
    # clean_trainset_28spk_wav/p226_001.wav, clean_testset_wav/p232_001.wav
    "VoiceBank": r"(?:clean_)?(?P<split>train|test)set(?:_\d+spk)?_wav\w*/(?:.+/)?(?P<speaker>p\d+)_\w+",
    # test/both/440/440c0201.wv1: the corpus has no such folders; sort its 14 sets into its four conditions.
    "Aurora-4": r"(?P<split>train|dev|test)/(?P<condition>clean|noisy|channel|both)/(?:.+/)?(?P<speaker>\w{3})\w+",
    # train-clean-100/19/198/19-198-0000.flac, test/367/367-130732-0000.flac, 19/198/19-198-0000.flac
    "LibriSpeech": r"(?:(?P<split>train|dev|test)[-\w]*/)?(?P<speaker>\d+)/(?:\d+/)?(?P=speaker)-\d+-\d+",
    # train/anna/hello.wav, or train/hello.wav without speakers
    "split/speaker": r"(?P<split>train|training|dev|val|valid|validation|test)/(?:(?P<speaker>[^/]+)/)?(?:.+/)?[^/]+",
    "folder": r"(?:(?P<speaker>[^/]+)/)?[^/]+",  # anna/hello.wav, hello.wav: splits are drawn
}
# Splits are told by how the name of their folder starts.
SPLITS = {
    "tr": "train",
    "si_tr": "train",
    "de": "dev",
    "va": "dev",
    "si_dt": "dev",
    "te": "test",
    "si_et": "test",
}
# Whose sounds a page passes on. Of manifests, pairs and noise it does not know.
LICENCES = {
    "LibriSpeech": "LibriSpeech (V. Panayotov, G. Chen, D. Povey, S. Khudanpur, 2015), CC BY 4.0",
    "VoiceBank": "VoiceBank-DEMAND (C. Valentini-Botinhao, 2017), CC BY 4.0",
} | dict.fromkeys(("TIMIT", "WSJ0", "Aurora-4"), "licensed to its buyer: not to be published")
VOICEBANK_DEV = ("p226", "p287")
TIMIT_TEST = """mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 mbpm0 mklt0 fnlp0 mcmj0 mjdh0
    fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0""".split()  # the core test set
# The 50 development speakers of Halberstadt (1998). The other 94 speakers of TEST are left out.
TIMIT_DEV = """faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 fadg0 fdms0 fedw0 mgjf0
    mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0 mrcs0 mrjm4
    fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 fmml0 mrws1""".split()

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".sph", ".wv1")
LABELS = (".txt", ".phn", ".dot", ".lsn", "speakers.tsv")


class CorpusError(ValueError):
    """One line: the path, what is wrong with it and what would be right."""


def sounds(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The sound files in a folder that fit a pattern, sorted; no corpus needs to be made of them."""
    return sorted(
        path for path in folder.glob(pattern) if path.suffix.lower() in AUDIO and path.is_file()
    )


def scan(root: Path) -> dict[str, tuple[int, int]]:
    """All audio and label files below `root`, sorted: path relative to it → size, time of change. Hidden files and
    folders are left out, and so are folders met before (links that lead in a circle). CorpusError where a folder cannot
    be read or there are no audio files."""

    def refuse(error: OSError):
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})")

    files, seen = {}, set()
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and name.lower().endswith(AUDIO + LABELS):
                path = os.path.join(folder, name)
                files[Path(path).relative_to(root).as_posix()] = stamp(path)
    if not any(file.lower().endswith(AUDIO) for file in files):
        raise CorpusError(f"{root}: no audio files here or below; looked for {' '.join(AUDIO)}")
    return dict(sorted(files.items()))


def stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in ns; −1 where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_folder(root: Path, files: dict, notes: list[str]) -> tuple[str, list[dict]]:
    """The layout of a folder whose `files` are as `scan` gives them, and its entries. A line is added to `notes` where
    files are left out."""
    sounds = [file for file in files if file.lower().endswith(AUDIO)]
    for layout, pattern in LAYOUTS.items():  # noqa: B007
        matches = (re.search(rf"(?:^|/){pattern}\.\w+$", file, re.IGNORECASE) for file in sounds)
        if found := [(match.string, match.groupdict()) for match in matches if match]:
            break
    labels = {
        file.lower(): root / file for file in files
    }  # TIMIT comes in upper case and in lower case
    transcripts, sexes = _read_lists(root, files, layout)
    entries = []
    for file, fields in found:
        speaker = fields["speaker"] or Path(root.resolve().name, file).parent.name
        folder, condition = ((fields.get(key) or "").lower() for key in ("split", "condition"))
        split = next((split for start, split in SPLITS.items() if folder.startswith(start)), "")
        if layout == "VoiceBank" and speaker.lower() in VOICEBANK_DEV:
            split = "dev"
        elif layout == "TIMIT" and split == "test":
            split = (
                "test"
                if speaker.lower() in TIMIT_TEST
                else "dev"
                if speaker.lower() in TIMIT_DEV
                else ""
            )
        stem = os.path.splitext(file.lower())[0]
        text = transcripts.get(os.path.basename(stem), "")
        if not text and f"{stem}.txt" in labels:
            text = read_text(labels[f"{stem}.txt"])
            text = (
                re.sub(r"^\d+ \d+ ", "", text) if layout == "TIMIT" else text
            )  # first and last sample
        sex = sexes.get(speaker) or (speaker[0].upper() if layout == "TIMIT" else "")
        known = {
            "path": file,
            "speaker": speaker,
            "split": split,
            "sex": sex,
            "condition": condition,
        }
        entries.append(
            known | {"text": " ".join(text.split()), "phones": str(labels.get(f"{stem}.phn", ""))}
        )
    entries = [entry for entry in entries if entry["split"]] or entries
    if left_out := len(sounds) - len(entries):
        what = f"{left_out} of {len(sounds)} audio files, which are in none of its splits"
        notes.append(f"{root}: read as {layout}; left out {what}")
    _name(entries, root)
    return layout, entries


def _read_lists(root: Path, files: dict, layout: str) -> tuple[dict[str, str], dict[str, str]]:
    """Transcripts by utterance (its file's name in lower case) and sexes by speaker, from lists of them."""
    transcripts, sexes = {}, {}
    for file in files:
        name = os.path.basename(file).lower()
        if name == "speakers.tsv":  # columns speaker, sex
            sexes.update((row.get("speaker"), row.get("sex")) for row in _read_table(root / file))
        elif name == "speakers.txt":  # LibriSpeech: 19 | F | train-clean-100 | …
            rows = (
                line.split("|") for line in read_text(root / file).splitlines() if line[:1] != ";"
            )
            sexes.update((row[0].strip(), row[1].strip()) for row in rows if len(row) > 1)
        elif name.endswith(".trans.txt"):  # LibriSpeech: 19-198-0000 NORTHANGER ABBEY
            rows = (line.partition(" ") for line in read_text(root / file).splitlines())
            transcripts.update((row[0].lower(), row[2]) for row in rows)
        elif name.endswith((".dot", ".lsn")):  # WSJ0: The words. (011c0201)
            rows = re.findall(r"^(.*)\((\w+)\)\s*$", read_text(root / file), re.MULTILINE)
            transcripts.update((utterance.lower(), text) for text, utterance in rows)
        elif name.endswith(".txt") and layout == "VoiceBank":  # trainset_28spk_txt/p226_001.txt
            transcripts[name.removesuffix(".txt")] = read_text(root / file)
    return transcripts, sexes


def read_file(file: Path) -> list[dict]:
    """The one entry of a sound file."""
    entry = dict.fromkeys(("split", "text", "phones", "sex", "condition"), "")
    entries = [entry | {"path": file.name, "speaker": file.resolve().parent.name}]
    _name(entries, file.parent)
    return entries


def read_manifest(manifest: Path) -> list[dict]:
    """The entries of a manifest. CorpusError names the line where a column is missing or empty, a split is unknown, a
    file is not there or a path stands twice."""
    entries, lines, needed = [], {}, ("path", "speaker", "split")
    form = "a manifest has a header with the columns path, speaker, split, and tabs between them"
    for number, row in enumerate(_read_table(manifest), start=2):
        where = f"{manifest}: line {number}"
        if missing := [column for column in needed if not row.get(column)]:
            raise CorpusError(f"{where}: no {' or '.join(missing)}; {form}")
        if row["split"] not in ("train", "dev", "test"):
            raise CorpusError(
                f"{where}: unknown split {row['split']!r}; right are train, dev, test"
            )
        for column in ("path", "phones"):
            if row.get(column) and not os.path.isfile(path := manifest.parent / row[column]):
                raise CorpusError(
                    f"{where}: no such file: {path} (paths start from the manifest's folder)"
                )
        if (
            first := lines.setdefault(os.path.realpath(manifest.parent / row["path"]), number)
        ) != number:
            raise CorpusError(
                f"{where}: {row['path']} stands in line {first} already; each file belongs to one split"
            )
        entries.append(
            {key: row.get(key) or "" for key in (*needed, "text", "phones", "sex", "condition")}
        )
        entries[-1]["phones"] = str(manifest.parent / row["phones"]) if row.get("phones") else ""
    if not entries:
        raise CorpusError(f"{manifest}: no rows; {form}")
    _name(entries, manifest.parent)
    return entries


def _name(entries: list[dict], root: Path) -> None:
    """Give the entries, whose paths start from `root`, unique names: the file's, with the speaker where that is not
    unique, else the path. Puts `root` before their paths."""
    for form in ("{stem}", "{speaker}-{stem}", "{path}", "{number}-{stem}"):
        names = [
            form.format(number=k, stem=Path(e["path"]).stem, **e) for k, e in enumerate(entries)
        ]
        names = [re.sub(r"[^\w.-]", "_", name) for name in names]
        if len(set(names)) == len(entries):
            break
    for entry, name in zip(entries, names, strict=True):
        entry.update(name=name, path=str(root / entry["path"]))


def draw_splits(entries: list[dict], name: str, notes: list[str]) -> bool:
    """Draw splits where there are none, or a development set from train where only that is missing: a tenth of the
    speakers each, of the files where speakers are fewer than 5. A line is added to `notes` where splits are drawn.
    Returns whether there were none."""
    known = {entry["split"] for entry in entries}
    wanted = (
        ("dev", "test")
        if known == {""}
        else ("dev",)
        if "train" in known and "dev" not in known
        else ()
    )
    pool = [entry for entry in entries if entry["split"] in ("", "train")]
    by, units = (
        ("speaker", "speakers")
        if len({entry["speaker"] for entry in pool}) >= 5
        else ("name", "files")
    )
    order = sorted(
        {entry[by] for entry in pool}, key=lambda x: hashlib.sha256(os.fsencode(x)).digest()
    )
    tenth = max(1, round(len(order) / 10))
    drawn = dict(zip(order[:-1], [split for split in wanted for _ in range(tenth)], strict=False))
    for entry in pool:
        entry["split"] = drawn.get(entry[by], "train")
    if drawn:
        counts = Counter(drawn.get(unit, "train") for unit in order)
        shares = ", ".join(
            f"{counts[split]} {units} for {split}" for split in (*wanted, "train") if counts[split]
        )
        notes.append(
            f"{name}: found no {'splits' if known == {''} else 'dev split'}; drew {shares}"
        )
    return known == {""}


def read_phones(path: str, end: float) -> list[tuple[int, int, str]]:
    """(start, stop, label) of each line of a file of phone labels, in samples of the audio file, which has `end`.
    CorpusError names the line that is none, stops before it starts, starts before the last one or stops after `end`."""
    phones, earliest = [], 0
    for number, line in enumerate(read_text(Path(path)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            start, stop, label = line.split()
            if not earliest <= (start := int(start)) <= (stop := int(stop)) <= end:
                raise ValueError
        except ValueError:
            form = f"start stop label, in order and within the sound file's {end:.0f} samples"
            raise CorpusError(
                f"{path}: line {number}: wrong phone label; each line should be: {form}"
            ) from None
        phones.append((start, stop, label))
        earliest = start
    return phones


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV file by the names in its header; cells that a row lacks are missing in it."""
    header, *rows = [line.rstrip("\r").split("\t") for line in read_text(path).rstrip().split("\n")]
    return [dict(zip(header, row, strict=False)) for row in rows]


def read_text(path: Path) -> str:
    """What is in a text file. CorpusError where it cannot be read or is no file."""
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise CorpusError(f"{path}: not a regular file; expected a text file")
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from None
