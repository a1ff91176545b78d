"""The files of a folder or a manifest of speech, with speakers, splits and labels: one entry (a
dict) for each sound file.

An entry has the path of a sound file and a name and, as text that is empty where it is unknown,
speaker, split, text, phones (the path of a label file), sex and condition. docs/data.md describes
the layouts and the columns of a manifest.
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

# A layout is recognised by how the paths of its audio files end, in upper or lower case. The first
# layout that fits any file is taken. In every layout there may be a transcript beside a file as
# .txt, phone labels as .phn, and the speakers' sexes in a speakers.tsv.
LAYOUTS = {
    # TRAIN/DR1/FCJF0/SX127.WAV. The SA sentences, which all speakers read, are excluded as usual.
    "TIMIT": r"(?P<split>train|test)/dr[1-8]/(?P<speaker>[fm]\w{3}\d)/(?!sa\d)\w+",
    # si_tr_s/011/011c0201.wav
    "WSJ0": r"(?P<split>si_tr_s|si_dt_05|si_et_05)/(?:.+/)?(?P<speaker>\w{3})\w+",
    # clean_trainset_28spk_wav/p226_001.wav, clean_testset_wav/p232_001.wav
    "VoiceBank": r"(?:clean_)?(?P<split>train|test)set(?:_\d+spk)?_wav\w*/(?:.+/)?"
    r"(?P<speaker>p\d+)_\w+",
    # test/both/440/440c0201.wv1. The corpus has no such folders: sort its 14 sets into its four
    # conditions.
    "Aurora-4": r"(?P<split>train|dev|test)/(?P<condition>clean|noisy|channel|both)/(?:.+/)?"
    r"(?P<speaker>\w{3})\w+",
    # train-clean-100/19/198/19-198-0000.flac, test/367/367-130732-0000.flac
    "LibriSpeech": r"(?:(?P<split>train|dev|test)[-\w]*/)?(?P<speaker>\d+)/(?:\d+/)?"
    r"(?P=speaker)-\d+-\d+",
    # train/anna/hello.wav, or train/hello.wav without speakers
    "split/speaker": r"(?P<split>train|training|dev|val|valid|validation|test)/"
    r"(?:(?P<speaker>[^/]+)/)?(?:.+/)?[^/]+",
    # anna/hello.wav, hello.wav. The splits are drawn.
    "folder": r"(?:(?P<speaker>[^/]+)/)?[^/]+",
}
SPLITS = {  # beginning of the name of a folder → its split
    "tr": "train",
    "si_tr": "train",
    "de": "dev",
    "va": "dev",
    "si_dt": "dev",
    "te": "test",
    "si_et": "test",
}
# Licences of the sounds on an HTML page; unknown for manifests, recorded pairs and noise.
BOUGHT = "licensed to its buyer: not to be published"
LICENCES = {
    "LibriSpeech": "LibriSpeech (V. Panayotov, G. Chen, D. Povey, S. Khudanpur, 2015), CC BY 4.0",
    "VoiceBank": "VoiceBank-DEMAND (C. Valentini-Botinhao, 2017), CC BY 4.0",
    "TIMIT": BOUGHT,
    "WSJ0": BOUGHT,
    "Aurora-4": BOUGHT,
}
VOICEBANK_DEV = ("p226", "p287")
# The core test set.
TIMIT_TEST = """
    mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 mbpm0 mklt0 fnlp0
    mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0
""".split()
# The 50 development speakers of Halberstadt (1998). The other 94 speakers of TEST are left out.
TIMIT_DEV = """
    faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 fadg0 fdms0
    fedw0 mgjf0 mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0
    mdvc0 mers0 fmah0 fdrw0 mrcs0 mrjm4 fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0
    mteb0 mjfc0 mrjr0 fmml0 mrws1
""".split()

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".sph", ".wv1")
LABELS = (".txt", ".phn", ".dot", ".lsn", "speakers.tsv")

MIN_SPEAKERS = 5  # Splits are drawn from files where a corpus has fewer speakers.
MANIFEST_COLUMNS = ("path", "speaker", "split")  # columns that a manifest must have
OPTIONAL_COLUMNS = ("text", "phones", "sex", "condition")


class CorpusError(ValueError):
    """Speech that cannot be used. The message is one line: the path, what is wrong, what was
    expected."""


def sounds(folder: Path, pattern: str = "**/*") -> list[Path]:
    """Return the sound files of a folder that fit a pattern, sorted."""
    files = []
    for path in folder.glob(pattern):
        if path.suffix.lower() in AUDIO and path.is_file():
            files.append(path)
    return sorted(files)


def scan(root: Path) -> dict[str, tuple[int, int]]:
    """Return all audio and label files below `root`, sorted: relative path → size, time of change.

    Hidden files and folders are left out, and so are folders that were visited before (links may
    lead in a circle). Raises CorpusError where a folder cannot be read or there are no audio files.
    """

    def refuse(error: OSError):
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})")

    files = {}
    visited = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and name.lower().endswith(AUDIO + LABELS):
                path = os.path.join(folder, name)
                files[Path(path).relative_to(root).as_posix()] = stamp(path)
    if not any(file.lower().endswith(AUDIO) for file in files):
        raise CorpusError(f"{root}: no audio files here or below; looked for {' '.join(AUDIO)}")
    return dict(sorted(files.items()))


def stamp(path: str) -> tuple[int, int]:
    """Return the size in bytes and the time of change in ns of a file; −1 where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_folder(root: Path, files: dict, notes: list[str]) -> tuple[str, list[dict]]:
    """Return the layout of a folder and its entries. files: as `scan` returns them. A line is added
    to `notes` where files are left out."""
    audio_files = [file for file in files if file.lower().endswith(AUDIO)]
    layout, matches = recognise_layout(audio_files)
    labels = {file.lower(): root / file for file in files}  # TIMIT may be in upper or lower case.
    transcripts, sexes = read_lists(root, files, layout)
    entries = []
    for file, fields in matches:
        speaker = fields["speaker"] or Path(root.resolve().name, file).parent.name
        sex = sexes.get(speaker, "")
        if not sex and layout == "TIMIT":
            sex = speaker[0].upper()
        stem = os.path.splitext(file.lower())[0]
        text = transcripts.get(os.path.basename(stem), "")
        if not text and f"{stem}.txt" in labels:
            text = read_text(labels[f"{stem}.txt"])
            if layout == "TIMIT":
                text = re.sub(r"^\d+ \d+ ", "", text)  # the first and the last sample
        entries.append(
            {
                "path": file,
                "speaker": speaker,
                "split": split_of(layout, fields, speaker),
                "sex": sex,
                "condition": (fields.get("condition") or "").lower(),
                "text": " ".join(text.split()),
                "phones": str(labels.get(f"{stem}.phn", "")),
            }
        )
    with_split = [entry for entry in entries if entry["split"]]
    if with_split:
        entries = with_split
    num_left_out = len(audio_files) - len(entries)
    if num_left_out:
        notes.append(
            f"{root}: read as {layout}; left out {num_left_out} of {len(audio_files)} audio files, "
            "which are in none of its splits"
        )
    set_names(entries, root)
    return layout, entries


def recognise_layout(audio_files: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    """Return the layout of a folder, and the files that are in it with the fields in their
    paths."""
    for layout, pattern in LAYOUTS.items():
        expression = re.compile(rf"(?:^|/){pattern}\.\w+$", re.IGNORECASE)
        matches = []
        for file in audio_files:
            match = expression.search(file)
            if match:
                matches.append((file, match.groupdict()))
        if matches:
            return layout, matches
    return "folder", []


def split_of(layout: str, fields: dict, speaker: str) -> str:
    """Return the split of a file; "" where it has none."""
    folder = (fields.get("split") or "").lower()
    split = ""
    for beginning, name in SPLITS.items():
        if folder.startswith(beginning):
            split = name
            break
    if layout == "VoiceBank" and speaker.lower() in VOICEBANK_DEV:
        return "dev"
    if layout == "TIMIT" and split == "test":
        if speaker.lower() in TIMIT_TEST:
            return "test"
        return "dev" if speaker.lower() in TIMIT_DEV else ""
    return split


def read_lists(root: Path, files: dict, layout: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the transcripts by utterance (the name of its file in lower case) and the sexes by
    speaker that the lists of a corpus have."""
    transcripts = {}
    sexes = {}
    for file in files:
        name = os.path.basename(file).lower()
        if name == "speakers.tsv":  # columns speaker, sex
            for row in read_table(root / file):
                sexes[row.get("speaker")] = row.get("sex")
        elif name == "speakers.txt":  # LibriSpeech: 19 | F | train-clean-100 | …
            for line in read_text(root / file).splitlines():
                cells = line.split("|")
                if not line.startswith(";") and len(cells) > 1:
                    sexes[cells[0].strip()] = cells[1].strip()
        elif name.endswith(".trans.txt"):  # LibriSpeech: 19-198-0000 NORTHANGER ABBEY
            for line in read_text(root / file).splitlines():
                utterance, _, text = line.partition(" ")
                transcripts[utterance.lower()] = text
        elif name.endswith((".dot", ".lsn")):  # WSJ0: The words. (011c0201)
            lines = read_text(root / file)
            for text, utterance in re.findall(r"^(.*)\((\w+)\)\s*$", lines, re.MULTILINE):
                transcripts[utterance.lower()] = text
        elif name.endswith(".txt") and layout == "VoiceBank":  # trainset_28spk_txt/p226_001.txt
            transcripts[name.removesuffix(".txt")] = read_text(root / file)
    return transcripts, sexes


def read_file(file: Path) -> list[dict]:
    """Return the one entry of a sound file."""
    entry = dict.fromkeys(("split", *OPTIONAL_COLUMNS), "")
    entry |= {"path": file.name, "speaker": file.resolve().parent.name}
    entries = [entry]
    set_names(entries, file.parent)
    return entries


def read_manifest(manifest: Path) -> list[dict]:
    """Return the entries of a manifest. Raises CorpusError naming the line where a column is
    missing or empty, a split is unknown, a file does not exist or a path is there twice."""
    form = "a manifest has a header with the columns path, speaker, split, and tabs between them"
    entries = []
    line_of_path = {}
    for number, row in enumerate(read_table(manifest), start=2):
        line = f"{manifest}: line {number}"
        missing = [column for column in MANIFEST_COLUMNS if not row.get(column)]
        if missing:
            raise CorpusError(f"{line}: no {' or '.join(missing)}; {form}")
        if row["split"] not in ("train", "dev", "test"):
            raise CorpusError(f"{line}: unknown split {row['split']!r}; right are train, dev, test")
        for column in ("path", "phones"):
            path = manifest.parent / row.get(column, "")
            if row.get(column) and not os.path.isfile(path):
                raise CorpusError(
                    f"{line}: no such file: {path} (paths start from the manifest's folder)"
                )
        real_path = os.path.realpath(manifest.parent / row["path"])
        if real_path in line_of_path:
            raise CorpusError(
                f"{line}: {row['path']} stands in line {line_of_path[real_path]} already; "
                "each file belongs to one split"
            )
        line_of_path[real_path] = number
        entry = {}
        for column in (*MANIFEST_COLUMNS, *OPTIONAL_COLUMNS):
            entry[column] = row.get(column) or ""
        if entry["phones"]:
            entry["phones"] = str(manifest.parent / entry["phones"])
        entries.append(entry)
    if not entries:
        raise CorpusError(f"{manifest}: no rows; {form}")
    set_names(entries, manifest.parent)
    return entries


def set_names(entries: list[dict], root: Path) -> None:
    """Give the entries unique names: that of the file, with the speaker where it is not unique,
    else the path. Put `root` before their paths."""
    for form in ("{stem}", "{speaker}-{stem}", "{path}", "{number}-{stem}"):
        names = []
        for number, entry in enumerate(entries):
            name = form.format(number=number, stem=Path(entry["path"]).stem, **entry)
            names.append(re.sub(r"[^\w.-]", "_", name))
        if len(set(names)) == len(entries):
            break
    for entry, name in zip(entries, names, strict=True):
        entry.update(name=name, path=str(root / entry["path"]))


def draw_splits(entries: list[dict], name: str, notes: list[str]) -> bool:
    """Draw splits where there are none, or a development set from the training set where only that
    is missing. Return whether there were none.

    Each gets a tenth of the speakers, or of the files where there are fewer than MIN_SPEAKERS
    speakers. The draw depends on their names alone. A line is added to `notes` where splits are
    drawn.
    """
    splits = {entry["split"] for entry in entries}
    has_none = splits == {""}
    if has_none:
        wanted = ("dev", "test")
    elif "train" in splits and "dev" not in splits:
        wanted = ("dev",)
    else:
        wanted = ()
    pool = [entry for entry in entries if entry["split"] in ("", "train")]
    if len({entry["speaker"] for entry in pool}) >= MIN_SPEAKERS:
        key = "speaker"
        unit_name = "speakers"
    else:
        key = "name"
        unit_name = "files"
    units = {entry[key] for entry in pool}
    shuffled = sorted(units, key=lambda unit: hashlib.sha256(os.fsencode(unit)).digest())
    tenth = max(1, round(len(shuffled) / 10))
    split_of_unit = {}
    for index, unit in enumerate(shuffled[:-1]):  # One is left to train on.
        if index < tenth * len(wanted):
            split_of_unit[unit] = wanted[index // tenth]
    for entry in pool:
        entry["split"] = split_of_unit.get(entry[key], "train")
    if split_of_unit:
        counts = Counter(split_of_unit.get(unit, "train") for unit in shuffled)
        shares = []
        for split in (*wanted, "train"):
            if counts[split]:
                shares.append(f"{counts[split]} {unit_name} for {split}")
        missing = "splits" if has_none else "dev split"
        notes.append(f"{name}: found no {missing}; drew {', '.join(shares)}")
    return has_none


def read_phones(path: str, end: float) -> list[tuple[int, int, str]]:
    """Return (start, stop, label) of each line of a file of phone labels, in samples of the audio
    file, which has `end` samples.

    Raises CorpusError naming the line that has another form, stops before it starts, starts before
    the one above it or stops after `end`.
    """
    phones = []
    previous_start = 0
    for number, line in enumerate(read_text(Path(path)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            start, stop, label = line.split()
            start = int(start)
            stop = int(stop)
            if not previous_start <= start <= stop <= end:
                raise ValueError
        except ValueError:
            form = f"start stop label, in order and within the sound file's {end:.0f} samples"
            raise CorpusError(
                f"{path}: line {number}: wrong phone label; each line should be: {form}"
            ) from None
        phones.append((start, stop, label))
        previous_start = start
    return phones


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a TSV file, cells by the names in its header. Cells that a row lacks are
    missing in its dict."""
    lines = read_text(path).rstrip().split("\n")
    header, *rows = [line.rstrip("\r").split("\t") for line in lines]
    return [dict(zip(header, row, strict=False)) for row in rows]


def read_text(path: Path) -> str:
    """Return the content of a text file. Raises CorpusError where it cannot be read or is no
    file."""
    if path.exists() and not path.is_file():  # A pipe or a device may never end.
        raise CorpusError(f"{path}: not a regular file; expected a text file")
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from None
