"""Speech packed in one memory-mapped file with an index: made of sound files, of the built-in speech, or by laying
conditions over what is packed already. Every utterance is packed whole, as int16 at 16 kHz scaled to max |s| = 1; the
bounds of the speech inside it, without leading and trailing silence, stand in the index.
"""

import gc
import hashlib
import json
import mmap
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import audio, layouts, synthetic
from .layouts import CorpusError

FORMAT = 4  # of the packed files: another number packs every corpus anew
SHORTEST = 0.1  # seconds; shorter files are skipped
# Names of conditions (Aurora-4's) and the ones of `synthetic.apply_condition`. "both": noise and channel.
CONDITIONS = {"clean": "clean", "noisy": "noise", "channel": "channel", "both": "both"}
TALKERS = 8  # voices in babble
PACKING = "packing-"  # how the names of temporary folders begin


class Utterance(NamedTuple):
    """What the index of a packed corpus says of an utterance. A thousand hours have 280,000 in 200 MB."""

    name: str  # unique in the corpus and fit for a file name
    speaker: str
    split: str  # train, dev, test
    start: int  # first sample in the packed file
    length: int  # samples
    trim: tuple[
        int, int
    ]  # first sample of the speech and the one after its last, counted from `start`
    text: str = ""
    phones: tuple[
        tuple[int, int, str], ...
    ] = ()  # (start, stop, label) in samples counted from `start`
    sex: str = ""  # F, M or unknown
    condition: str = ""  # clean, noisy, channel, both or unknown


def unpack(packed: np.ndarray, utterance: Utterance, trim: bool) -> np.ndarray:
    """An utterance of a packed file, float32 (samples,), max |s| = 1 over the untrimmed utterance."""
    first, stop = utterance.trim if trim else (0, utterance.length)
    return np.asarray(packed[utterance.start + first : utterance.start + stop]) * np.float32(
        1 / 32767
    )


def decode(entries: list[dict], notes: list[str]) -> Iterator[tuple[dict, np.ndarray]]:
    """The sound files of a folder or a manifest: the fields of Utterance that are known of each, and its waveform,
    float32 at 16 kHz. Lines are added to `notes` for what is skipped or converted."""
    skipped, converted = defaultdict(list), Counter()
    for entry in entries:
        path = entry["path"]
        try:
            waveform, rate, channels = audio.read(path, audio.SAMPLE_RATE)
        except audio.AudioError as error:
            skipped["cannot be read"].append(error)
            continue
        if (short := len(waveform) < SHORTEST * audio.SAMPLE_RATE) or not waveform.any():
            skipped[f"shorter than {SHORTEST} s" if short else "silent"].append(path)
            continue
        if (rate, channels) != (audio.SAMPLE_RATE, 1):
            converted[rate, channels] += 1
        scale = audio.SAMPLE_RATE / rate
        samples = len(waveform) * rate / audio.SAMPLE_RATE
        phones = layouts.read_phones(entry["phones"], samples) if entry["phones"] else ()
        phones = tuple(
            (round(start * scale), round(stop * scale), label) for start, stop, label in phones
        )
        yield (
            {key: value for key, value in entry.items() if key != "path"} | {"phones": phones},
            waveform,
        )
    if skipped:
        count = sum(map(len, skipped.values()))
        reasons = [
            f"{len(files)} {reason} (first: {files[0]})" for reason, files in skipped.items()
        ]
        notes.append(f"skipped {count} of {len(entries)} files: {', '.join(reasons)}")
    if converted:
        counts = sorted(converted.items())
        origins = [
            f"{files} files from {rate} Hz / {n} channel{'s' * (n > 1)}"
            for (rate, n), files in counts
        ]
        notes.append(f"converted to 16 kHz mono: {', '.join(origins)}")


def built_in(settings: dict) -> Iterator[tuple[dict, np.ndarray]]:
    """The built-in corpus, as `decode` gives it; `settings` are the arguments of `synthetic.generate`."""
    for utterance in synthetic.generate(**settings):
        fields = utterance._asdict()
        yield fields, fields.pop("waveform").astype(np.float32)


def lay_conditions(
    utterances: tuple[Utterance, ...], packed: np.ndarray
) -> Iterator[tuple[dict, np.ndarray]]:
    """Utterances of a packed file, each in one of CONDITIONS; as `decode` gives them. Which one, and what noise and
    channel, is drawn for its name alone. Babble is speech of the same split, by other speakers where there are any."""
    splits = {
        split: [u for u in utterances if u.split == split]
        for split in {u.split for u in utterances}
    }
    alone = {split for split, members in splits.items() if len({u.speaker for u in members}) < 2}
    for u in utterances:

        def babble(samples: int, random: np.random.Generator, u=u) -> np.ndarray:
            voices, count = np.zeros(samples), 0
            while count < TALKERS:
                other = splits[u.split][random.integers(len(splits[u.split]))]
                if other.speaker != u.speaker or u.split in alone:
                    voice = unpack(packed, other, trim=True)
                    start = random.integers(len(voice))
                    voices += np.resize(np.roll(voice, -start), samples) / np.sqrt(
                        np.mean(voice**2)
                    )
                    count += 1
            return voices

        random = np.random.default_rng(zlib.crc32(u.name.encode()))
        condition = random.choice(list(CONDITIONS)).item()
        clean = unpack(packed, u, trim=False)
        yield (
            u._asdict() | {"condition": condition},
            synthetic.apply_condition(clean, CONDITIONS[condition], random, babble),
        )


def write(
    folder: Path, name: str, layout: str, clips: Iterable[tuple[dict, np.ndarray]], notes: list[str]
) -> None:
    """Pack speech into `folder`, which appears only when it is whole; where it is there and damaged, its files are
    replaced. What is not among the fields is found out here: where an utterance begins, its length and its trim, and
    its split where there are none. CorpusError where there are no clips; OSError where `folder` cannot be written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    directory = tempfile.TemporaryDirectory("", PACKING, folder.parent, ignore_cleanup_errors=True)
    with directory as temporary:
        rows, samples = [], 0
        packed = Path(temporary, "corpus")
        packed.mkdir()
        with open(packed / "waveforms.int16", "wb") as file:
            for fields, clip in clips:
                clip = clip / np.abs(clip).max()
                file.write(np.round(clip * 32767).astype("<i2").tobytes())
                trim = fields.get("trim") or audio.trim_bounds(clip)
                rows.append(fields | {"start": samples, "length": len(clip), "trim": trim})
                samples += len(clip)
        if not rows:
            raise CorpusError(
                "; ".join([f"{name}: holds nothing that can be used as speech", *notes])
            )
        drawn = layouts.draw_splits(rows, name, notes)
        about = {"layout": layout, "notes": notes, "drawn": drawn, "samples": samples}
        write_index(packed, about, (Utterance(**row) for row in rows))
        try:
            packed.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            if read(folder) is None:  # else another process was first, with the same
                for file in (
                    packed.iterdir()
                ):  # not the folder: another process may be about to open its files
                    file.replace(folder / file.name)


def write_index(folder: Path, about: dict, utterances: Iterable[Utterance]) -> None:
    """A line of JSON for each field of utterances, after one of the others of `Packed`; and its checksum."""
    lines = [about, *zip(*utterances, strict=True)]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    (folder / "index.jsonl").write_bytes(content)
    (folder / "index.sha256").write_text(hashlib.sha256(content).hexdigest())


class Packed(NamedTuple):
    layout: str
    utterances: tuple[Utterance, ...]
    samples: np.memmap  # int16, all utterances end to end
    notes: list[str]
    drawn: bool  # whether splits were drawn, since there were none


def read(folder: Path) -> Packed | None:
    """What is in a packed folder; None where there is none or it is damaged. Samples have no checksum, which would read
    them all: they are written before the index, and what cuts a file short shows in its size."""
    columns, digest = {}, hashlib.sha256()
    gc.disable()  # it would look through all utterances made so far, over and over
    try:
        with open(folder / "index.jsonl", "rb") as file:
            for name, line in zip(("about", *Utterance._fields), file, strict=True):
                digest.update(line)
                columns[name] = read_column(name, json.loads(line))
        if digest.hexdigest() != (folder / "index.sha256").read_text():
            return None
        about = columns.pop("about")
        packed = np.memmap(
            folder / "waveforms.int16", dtype="<i2", mode="r", shape=(about.pop("samples"),)
        )
        utterances = tuple(map(Utterance._make, zip(*columns.values(), strict=True)))
        return Packed(utterances=utterances, samples=packed, **about)
    except (OSError, TypeError, ValueError):
        return None
    finally:
        gc.enable()


def read_column(name: str, values: list) -> list:
    if name in ("speaker", "split", "sex", "condition"):
        return list(map(sys.intern, values))  # one text for all that have it
    if name == "phones":
        return [tuple(map(tuple, phones)) for phones in values]
    return list(map(tuple, values)) if name == "trim" else values


def prefetch(packed: np.ndarray, starts: np.ndarray, samples: int) -> None:
    """Have pieces of a packed file read all at once, which takes a tenth of the time of one page after the other."""
    mapped = getattr(packed, "_mmap", None)
    if hasattr(mapped, "madvise"):  # not on Windows
        for start in (2 * starts).tolist():
            page = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, start - page + 2 * samples)
