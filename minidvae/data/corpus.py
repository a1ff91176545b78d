"""Speech corpora: a folder, a manifest or the built-in speech, packed once into one memory-mapped
file.

`layouts` finds the files with their speakers, splits and labels; `packing` decodes and packs them.
docs/data.md describes both, with an example.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..files import remove_abandoned
from . import audio, layouts, packing, synthetic
from .layouts import CorpusError
from .packing import Utterance

CONDITIONS_OF = "conditions:"  # before the name of a corpus: with noise and channels added to it
CLEAN = ("", "clean")  # values of Utterance.condition without a known noise or channel
BUILT_IN = {"seed": 0, "speakers": (32, 8, 8), "utterances": 10}
CACHE = "~/.cache/minidvae"


@dataclass(frozen=True)
class Corpus:
    """Utterances, and the memory-mapped samples that they are parts of."""

    name: str
    layout: str  # a key of LAYOUTS, manifest or built-in; after CONDITIONS_OF with conditions added
    utterances: tuple[Utterance, ...]
    packed: np.memmap  # int16, all utterances one after the other
    drawn: bool = False  # Splits were drawn, since the corpus has none of its own.
    clean: np.memmap | None = None  # the same samples without conditions, if any were added

    def __len__(self) -> int:
        return len(self.utterances)

    def split(self, name: str) -> "Corpus":
        """Return the utterances of one split. Raises CorpusError where there are none."""
        utterances = tuple(u for u in self.utterances if u.split == name)
        if not utterances:
            splits = ", ".join(sorted({u.split for u in self.utterances}))
            raise CorpusError(f"{self.name}: there is no split {name!r} (there is: {splits})")
        return replace(self, utterances=utterances)

    def without_conditions(self) -> "Corpus":
        """Return the utterances as they were before conditions were added; the corpus itself where
        none were."""
        if self.clean is None:
            return self
        utterances = tuple(u._replace(condition="clean") for u in self.utterances)
        name = self.name.removeprefix(CONDITIONS_OF)
        layout = self.layout.removeprefix(CONDITIONS_OF)
        return Corpus(name, layout, utterances, self.clean, self.drawn)

    def spread(self, limit: int) -> "Corpus":
        """Return at most `limit` utterances, evenly spread over the corpus."""
        count = min(limit, len(self))
        indices = [i * len(self) // count for i in range(count)]
        return replace(self, utterances=tuple(self.utterances[i] for i in indices))

    @property
    def speakers(self) -> tuple[str, ...]:
        return tuple(sorted({u.speaker for u in self.utterances}))

    @property
    def fingerprint(self) -> str:
        """A text that changes with any utterance's name, split, position, length, trim or added
        condition."""
        rows = []
        for u in self.utterances:
            row = (u.name, u.split, u.start, u.length, *u.trim)
            rows.append(row if self.clean is None else (*row, u.condition))
        return digest(rows)[:16]

    @property
    def labels_fingerprint(self) -> str:
        """A text that changes with any utterance's text, phones, speaker, sex or condition."""
        rows = [(u.speaker, u.text, u.phones, u.sex, u.condition) for u in self.utterances]
        return digest(rows)[:16]

    @property
    def seconds(self) -> float:
        """Duration of the untrimmed utterances."""
        return sum(u.length for u in self.utterances) / audio.SAMPLE_RATE

    def waveform(self, i: int, trim: bool = True) -> np.ndarray:
        """Return utterance i, float32 (samples,), max |s| = 1 over the untrimmed utterance."""
        return packing.unpack(self.packed, self.utterances[i], trim)


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_corpus(
    source: str | Path = "built-in", cache=None, progress=True, note: Callable = print
) -> Corpus:
    """Return the corpus at `source`.

    The first time it is packed under the folder `cache`, with a progress bar, and again when a
    file's path, size or time of change differs.

    Args:
        source: "built-in", a folder in one of `layouts.LAYOUTS`, a manifest or a sound file. With
            CONDITIONS_OF before it, every utterance is once in the corpus, in one of
            `packing.CONDITIONS`, which `packing.lay_conditions` draws.
        cache: else $MINIDVAE_CACHE, else ~/.cache/minidvae; it takes 115 MB per hour of speech.
        progress: show a progress bar.
        note: called with each line that the user should read: files skipped, files converted to
            16 kHz mono, splits drawn.

    Raises:
        CorpusError: there is nothing at `source`, or nothing in it that can be used; a wrong
            manifest; no space to pack; conditions for a corpus that has its own.
    """
    name = str(source)
    cache = Path(os.path.expanduser(cache or os.environ.get("MINIDVAE_CACHE") or CACHE))
    clean = None
    if name.startswith(CONDITIONS_OF):
        clean = load_corpus(name.removeprefix(CONDITIONS_OF), cache, progress, note)
    location, contents = identify(name, clean)
    folder = cache / digest([packing.FORMAT, location, contents])[:24]
    remove_abandoned(cache, f"{packing.PACKING}*")
    content = packing.read(folder)
    if content is None:
        pack(folder, name, clean, contents, progress)
        content = packing.read(folder)
    for line in content.notes:
        note(line.encode(errors="backslashreplace").decode())  # File names may be no text.
    if clean is None:
        return Corpus(name, content.layout, content.utterances, content.samples, content.drawn)
    return Corpus(
        name, content.layout, content.utterances, content.samples, clean.drawn, clean=clean.packed
    )


def identify(name: str, clean: Corpus | None) -> tuple[str, list | dict]:
    """Return the location of a corpus and its contents: with both unchanged, it is not packed
    again."""
    root = Path(os.path.expanduser(name))
    if clean is not None:
        conditions = {u.condition for u in clean.utterances}.difference(CLEAN)
        if conditions:
            raise CorpusError(
                f"{name}: this corpus has conditions of its own ({', '.join(sorted(conditions))}); "
                f"leave out {CONDITIONS_OF!r}"
            )
        return CONDITIONS_OF, [synthetic.VERSION, Path(clean.packed.filename).parent.name]
    if name == "built-in":
        return name, {"version": synthetic.VERSION, **BUILT_IN}
    location = str(root.resolve())
    if os.path.isdir(root):
        return location, layouts.scan(root)
    if os.path.isfile(root):
        contents = []
        for entry in entries_of_file(root):
            contents.append((entry, layouts.stamp(entry["path"]), layouts.stamp(entry["phones"])))
        return location, contents
    raise CorpusError(
        f"{name}: no such file or folder; looked for a folder of speech, a sound file, a manifest "
        "(TSV: path, speaker, split), or the word built-in"
    )


def entries_of_file(file: Path) -> list[dict]:
    """Return the entries of a sound file or of a manifest."""
    if file.name.lower().endswith(layouts.AUDIO):
        return layouts.read_file(file)
    return layouts.read_manifest(file)


def pack(
    folder: Path, name: str, clean: Corpus | None, contents: list | dict, progress: bool
) -> None:
    """Pack a corpus into `folder`. contents: as `identify` returns them."""
    notes = []
    layout, total, clips = clips_of(name, clean, contents, notes)
    clips = tqdm(
        clips, f"packing {name}", total, unit=" utterances", disable=None if progress else True
    )
    try:
        packing.write(folder, name, layout, clips, notes)
    except OSError as error:
        raise CorpusError(
            f"{folder.parent}: the packed corpus cannot be written here ({error.strerror}); name "
            "another folder in MINIDVAE_CACHE (115 MB per hour of speech)"
        ) from None


def clips_of(
    name: str, clean: Corpus | None, contents: list | dict, notes: list[str]
) -> tuple[str, int, Iterator[tuple[dict, np.ndarray]]]:
    """Return the layout of a corpus, the number of its utterances, and the utterances as
    `packing.decode` yields them. Lines are added to `notes`."""
    if clean is not None:
        clips = packing.lay_conditions(clean.utterances, clean.packed)
        return CONDITIONS_OF + clean.layout, len(clean), clips
    if name == "built-in":
        total = sum(BUILT_IN["speakers"]) * BUILT_IN["utterances"]
        return name, total, packing.built_in(BUILT_IN)
    root = Path(os.path.expanduser(name))
    if os.path.isdir(root):
        layout, entries = layouts.read_folder(root, contents, notes)
    else:
        layout = "manifest"
        entries = [entry for entry, _, _ in contents]
    return layout, len(entries), packing.decode(entries, notes)


def absolute(source: str) -> str:
    """Return a source for `load_corpus` that means the same in every working directory."""
    if source.startswith(CONDITIONS_OF):
        return CONDITIONS_OF + absolute(source.removeprefix(CONDITIONS_OF))
    if source == "built-in":
        return source
    return str(Path(os.path.expanduser(source)).absolute())


def built_in_speakers() -> dict[str, synthetic.Speaker]:
    """Return the voices of the built-in corpus by name, with the true values that they are made
    of."""
    voices = synthetic.make_speakers(BUILT_IN["seed"], *BUILT_IN["speakers"])
    return {voice.name: voice for voice in voices}
