"""Speech packed in one memory-mapped file with an index: from sound files, from the built-in
speech, or by adding conditions to packed speech.

Utterances are packed untrimmed, as int16 at 16 kHz, scaled to max |s| = 1. The bounds of the speech
in each, without leading and trailing silence, are in the index.
"""

import gc
import hashlib
import json
import mmap
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import audio, layouts, synthetic
from .layouts import CorpusError

FORMAT = 4  # version of the packed files; with another number every corpus is packed again
SHORTEST = 0.1  # seconds; shorter files are skipped
# Names of conditions (Aurora-4's) and those of `synthetic.apply_condition`. both: noise and
# channel.
CONDITIONS = {"clean": "clean", "noisy": "noise", "channel": "channel", "both": "both"}
TALKERS = 8  # number of voices in babble
PACKING = "packing-"  # beginning of the names of temporary folders
INT16_SCALE = 32767


class Utterance(NamedTuple):
    """A row of the index of a packed corpus. A thousand hours have 280,000 rows, which take 200
    MB."""

    name: str  # unique in the corpus, and usable as a file name
    speaker: str
    split: str  # train, dev, test
    start: int  # first sample in the packed file
    length: int  # samples
    trim: tuple[int, int]  # start and stop of the speech, in samples from `start` on
    text: str = ""
    phones: tuple[
        tuple[int, int, str], ...
    ] = ()  # (start, stop, label), in samples from `start` on
    sex: str = ""  # F, M or unknown
    condition: str = ""  # clean, noisy, channel, both or unknown


# The known fields of an Utterance, and its waveform (samples,) at 16 kHz.
Clip = tuple[dict, np.ndarray]


def unpack(packed: np.ndarray, utterance: Utterance, trim: bool) -> np.ndarray:
    """Return an utterance of a packed file, float32 (samples,), max |s| = 1 over the untrimmed
    one."""
    first, stop = utterance.trim if trim else (0, utterance.length)
    samples = np.asarray(packed[utterance.start + first : utterance.start + stop])
    return samples * np.float32(1 / INT16_SCALE)


def decode(entries: list[dict], notes: list[str]) -> Iterator[Clip]:
    """Yield the sound files of a folder or a manifest. Lines are added to `notes` for what is
    skipped or converted."""
    skipped = defaultdict(list)  # reason → files, or errors that name them
    converted = Counter()  # (sampling rate, channels) → number of files
    for entry in entries:
        path = entry["path"]
        try:
            waveform, rate, channels = audio.read(path, audio.SAMPLE_RATE)
        except audio.AudioError as error:
            skipped["cannot be read"].append(error)
            continue
        if len(waveform) < SHORTEST * audio.SAMPLE_RATE:
            skipped[f"shorter than {SHORTEST} s"].append(path)
            continue
        if not waveform.any():
            skipped["silent"].append(path)
            continue
        if (rate, channels) != (audio.SAMPLE_RATE, 1):
            converted[rate, channels] += 1
        fields = dict(entry, phones=read_phones(entry["phones"], len(waveform), rate))
        del fields["path"]
        yield fields, waveform
    if skipped:
        reasons = []
        for reason, files in skipped.items():
            reasons.append(f"{len(files)} {reason} (first: {files[0]})")
        count = sum(map(len, skipped.values()))
        notes.append(f"skipped {count} of {len(entries)} files: {', '.join(reasons)}")
    if converted:
        origins = []
        for (rate, channels), count in sorted(converted.items()):
            plural = "s" if channels > 1 else ""
            origins.append(f"{count} files from {rate} Hz / {channels} channel{plural}")
        notes.append(f"converted to 16 kHz mono: {', '.join(origins)}")


def read_phones(path: str, length: int, rate: int) -> tuple[tuple[int, int, str], ...]:
    """Return the phone labels of a file that had the sampling rate `rate` and has `length` samples
    at 16 kHz, in samples at 16 kHz. path: of the label file; empty: there is none."""
    if not path:
        return ()
    scale = audio.SAMPLE_RATE / rate
    samples = length * rate / audio.SAMPLE_RATE
    phones = []
    for start, stop, label in layouts.read_phones(path, samples):
        phones.append((round(start * scale), round(stop * scale), label))
    return tuple(phones)


def built_in(settings: dict) -> Iterator[Clip]:
    """Yield the built-in corpus. settings: the arguments of `synthetic.generate`."""
    for utterance in synthetic.generate(**settings):
        fields = utterance._asdict()
        waveform = fields.pop("waveform")
        yield fields, waveform.astype(np.float32)


def lay_conditions(utterances: tuple[Utterance, ...], packed: np.ndarray) -> Iterator[Clip]:
    """Yield utterances of a packed file, each in one of CONDITIONS. The condition, the noise and
    the channel depend on the utterance's name alone."""
    utterances_of_split = defaultdict(list)
    for utterance in utterances:
        utterances_of_split[utterance.split].append(utterance)
    for utterance in utterances:
        random = np.random.default_rng(zlib.crc32(utterance.name.encode()))
        condition = random.choice(list(CONDITIONS)).item()
        clean = unpack(packed, utterance, trim=False)
        babble = make_babble(utterance, utterances_of_split[utterance.split], packed)
        waveform = synthetic.apply_condition(clean, CONDITIONS[condition], random, babble)
        yield utterance._asdict() | {"condition": condition}, waveform


def make_babble(
    utterance: Utterance, candidates: list[Utterance], packed: np.ndarray
) -> Callable[[int, np.random.Generator], np.ndarray]:
    """Return a function of a number of samples and a random generator that returns babble: the sum
    of TALKERS utterances of the same split, by other speakers if there are any."""
    has_other_speakers = len({other.speaker for other in candidates}) > 1

    def babble(samples: int, random: np.random.Generator) -> np.ndarray:
        voices = np.zeros(samples)
        count = 0
        while count < TALKERS:
            other = candidates[random.integers(len(candidates))]
            if has_other_speakers and other.speaker == utterance.speaker:
                continue
            voice = unpack(packed, other, trim=True)
            start = random.integers(len(voice))
            rms = np.sqrt(np.mean(voice**2))
            voices += np.resize(np.roll(voice, -start), samples) / rms
            count += 1
        return voices

    return babble


def write(folder: Path, name: str, layout: str, clips: Iterable[Clip], notes: list[str]) -> None:
    """Pack speech into `folder`, which appears only when it is complete.

    Where it exists and is damaged, its files are replaced. The start of each utterance, its length
    and its trim are added to the fields, and splits where there are none. Raises CorpusError where
    there are no clips, OSError where `folder` cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    directory = tempfile.TemporaryDirectory("", PACKING, folder.parent, ignore_cleanup_errors=True)
    with directory as temporary:
        packed = Path(temporary, "corpus")
        packed.mkdir()
        rows, num_samples = write_waveforms(packed / "waveforms.int16", clips)
        if not rows:
            reasons = [f"{name}: holds nothing that can be used as speech", *notes]
            raise CorpusError("; ".join(reasons))
        drawn = layouts.draw_splits(rows, name, notes)
        header = {"layout": layout, "notes": notes, "drawn": drawn, "samples": num_samples}
        write_index(packed, header, (Utterance(**row) for row in rows))
        try:
            packed.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process may have packed the same corpus meanwhile. The folder itself is not
            # replaced: another process may be about to open its files.
            if read(folder) is None:
                for file in packed.iterdir():
                    file.replace(folder / file.name)


def write_waveforms(path: Path, clips: Iterable[Clip]) -> tuple[list[dict], int]:
    """Write waveforms one after the other. Return the fields of each, with its start, length and
    trim, and the number of all samples."""
    rows = []
    num_samples = 0
    with open(path, "wb") as file:
        for fields, waveform in clips:
            waveform = waveform / np.abs(waveform).max()
            file.write(np.round(waveform * INT16_SCALE).astype("<i2").tobytes())
            trim = fields.get("trim") or audio.trim_bounds(waveform)
            rows.append(fields | {"start": num_samples, "length": len(waveform), "trim": trim})
            num_samples += len(waveform)
    return rows, num_samples


def write_index(folder: Path, header: dict, utterances: Iterable[Utterance]) -> None:
    """Write the index: a line of JSON with the other fields of `Packed`, then one for each field of
    all utterances; and its checksum."""
    lines = [header, *zip(*utterances, strict=True)]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    (folder / "index.jsonl").write_bytes(content)
    (folder / "index.sha256").write_text(hashlib.sha256(content).hexdigest())


class Packed(NamedTuple):
    layout: str
    utterances: tuple[Utterance, ...]
    samples: np.memmap  # int16, all utterances one after the other
    notes: list[str]
    drawn: bool  # Splits were drawn, since there were none.


def read(folder: Path) -> Packed | None:
    """Return the content of a packed folder; None where there is none or it is damaged.

    The samples have no checksum, for which all of them would be read: they are written before the
    index, and a truncated file has another size.
    """
    columns = {}
    digest = hashlib.sha256()
    gc.disable()  # It would scan all utterances made so far, over and over.
    try:
        with open(folder / "index.jsonl", "rb") as file:
            for name, line in zip(("header", *Utterance._fields), file, strict=True):
                digest.update(line)
                columns[name] = read_column(name, json.loads(line))
        if digest.hexdigest() != (folder / "index.sha256").read_text():
            return None
        header = columns.pop("header")
        shape = (header.pop("samples"),)
        packed = np.memmap(folder / "waveforms.int16", dtype="<i2", mode="r", shape=shape)
        utterances = tuple(map(Utterance._make, zip(*columns.values(), strict=True)))
        return Packed(utterances=utterances, samples=packed, **header)
    except (OSError, TypeError, ValueError):
        return None
    finally:
        gc.enable()


def read_column(name: str, values: list) -> list:
    """Return a column of the index, from its JSON."""
    if name in ("speaker", "split", "sex", "condition"):
        return list(map(sys.intern, values))  # one string for all that have the same
    if name == "phones":
        return [tuple(map(tuple, phones)) for phones in values]
    if name == "trim":
        return list(map(tuple, values))
    return values


def prefetch(packed: np.ndarray, starts: np.ndarray, samples: int) -> None:
    """Ask the system to read pieces of a packed file all at once, which takes a tenth of the time
    of reading one page after the other."""
    mapped = getattr(packed, "_mmap", None)
    if not hasattr(mapped, "madvise"):  # It is missing on Windows.
        return
    for start in (2 * starts).tolist():
        page = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, start - page + 2 * samples)
