"""Speech corpora: a folder, a manifest or the built-in speech, packed once into one memory-mapped file. `layouts` finds
the files and what is known of them, `packing` decodes and packs them; docs/data.md describes both, with an example."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..files import remove_abandoned
from . import audio, layouts, packing, synthetic
from .layouts import CorpusError
from .packing import Utterance

CONDITIONS_OF = "conditions:"  # before the name of a corpus: conditions are laid over it
CLEAN = ("", "clean")  # Utterance.condition where nothing is known to lie over the speech
BUILT_IN = {"seed": 0, "speakers": (32, 8, 8), "utterances": 10}


@dataclass(frozen=True)
class Corpus:
    """Utterances and the memory-mapped samples they point into."""

    name: str
    layout: str  # a key of LAYOUTS, "manifest" or "built-in"; with conditions laid over it, CONDITIONS_OF before that
    utterances: tuple[Utterance, ...]
    packed: np.memmap  # int16, all utterances end to end
    drawn: bool = False  # whether its splits were drawn, since it has none of its own
    clean: np.memmap | None = (
        None  # where conditions were laid over it: the same before, in the same places
    )

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
        utterances = tuple(u._replace(condition="clean") for u in self.utterances)
        name, layout = (text.removeprefix(CONDITIONS_OF) for text in (self.name, self.layout))
        return Corpus(name, layout, utterances, self.clean, self.drawn)

    def spread(self, limit: int) -> "Corpus":
        """At most `limit` utterances, evenly spread over the corpus."""
        count = min(limit, len(self))
        return replace(
            self, utterances=tuple(self.utterances[i * len(self) // count] for i in range(count))
        )

    @property
    def speakers(self) -> tuple[str, ...]:
        return tuple(sorted({u.speaker for u in self.utterances}))

    @property
    def fingerprint(self) -> str:
        """Changes with any utterance's name, split, place, length, trim or the condition laid over it."""
        rows = [(u.name, u.split, u.start, u.length, *u.trim) for u in self.utterances]
        if self.clean is not None:
            rows = [(*row, u.condition) for row, u in zip(rows, self.utterances, strict=True)]
        return _digest(rows)[:16]

    @property
    def labels_fingerprint(self) -> str:
        """Changes with what is known of any utterance: text, phones, speaker, sex, condition."""
        return _digest(
            [(u.speaker, u.text, u.phones, u.sex, u.condition) for u in self.utterances]
        )[:16]

    @property
    def seconds(self) -> float:
        """Duration of the whole, untrimmed utterances."""
        return sum(u.length for u in self.utterances) / audio.SAMPLE_RATE

    def waveform(self, i: int, trim: bool = True) -> np.ndarray:
        """Utterance i, float32 (samples,), max |s| = 1 over the untrimmed utterance."""
        return packing.unpack(self.packed, self.utterances[i], trim)


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_corpus(
    source: str | Path = "built-in", cache=None, progress=True, note: Callable = print
) -> Corpus:
    """The corpus at `source`: "built-in", a folder in one of `layouts.LAYOUTS`, a manifest or a sound file. With
    CONDITIONS_OF before it, every utterance is there once, in one of `packing.CONDITIONS`, as `packing.lay_conditions`
    draws them.

    The first time it is packed under the folder `cache` (else $MINIDVAE_CACHE, else ~/.cache/minidvae; 115 MB an hour),
    with a progress bar; again when a file's path, size or time of change differs. `note` is called with what the user
    should know, a line each: files skipped, files converted to 16 kHz mono, splits drawn. CorpusError: nothing at
    `source`, nothing that can be used in it, a wrong manifest, no room to pack, conditions over conditions."""
    name, root, clean = str(source), Path(os.path.expanduser(source)), None
    cache = Path(
        os.path.expanduser(cache or os.environ.get("MINIDVAE_CACHE") or "~/.cache/minidvae")
    )
    place = str(root.resolve())
    if name.startswith(CONDITIONS_OF):
        clean = load_corpus(name.removeprefix(CONDITIONS_OF), cache, progress, note)
        if own := ", ".join(sorted({u.condition for u in clean.utterances}.difference(CLEAN))):
            raise CorpusError(
                f"{name}: this corpus has conditions of its own ({own}); leave out {CONDITIONS_OF!r}"
            )
        place, contents = (
            CONDITIONS_OF,
            [synthetic.VERSION, Path(clean.packed.filename).parent.name],
        )
    elif name == "built-in":
        place, contents = name, {"version": synthetic.VERSION, **BUILT_IN}
    elif os.path.isdir(root):
        contents = layouts.scan(root)
    elif os.path.isfile(root):
        entries = (
            layouts.read_file if name.lower().endswith(layouts.AUDIO) else layouts.read_manifest
        )(root)
        contents = [
            (entry, layouts.stamp(entry["path"]), layouts.stamp(entry["phones"]))
            for entry in entries
        ]
    else:
        looked_for = "a folder of speech, a sound file, a manifest (TSV: path, speaker, split), or the word built-in"
        raise CorpusError(f"{name}: no such file or folder; looked for {looked_for}")
    folder = cache / _digest([packing.FORMAT, place, contents])[:24]
    remove_abandoned(cache, f"{packing.PACKING}*")
    if (found := packing.read(folder)) is None:
        notes = []
        if clean is not None:
            layout, total = CONDITIONS_OF + clean.layout, len(clean)
            clips = packing.lay_conditions(clean.utterances, clean.packed)
        elif name == "built-in":
            layout, total = name, sum(BUILT_IN["speakers"]) * BUILT_IN["utterances"]
            clips = packing.built_in(BUILT_IN)
        else:
            layout = "manifest"
            if os.path.isdir(root):
                layout, entries = layouts.read_folder(root, contents, notes)
            total, clips = len(entries), packing.decode(entries, notes)
        clips = tqdm(
            clips, f"packing {name}", total, unit=" utterances", disable=None if progress else True
        )
        try:
            packing.write(folder, name, layout, clips, notes)
        except OSError as error:
            line = f"{cache}: the packed corpus cannot be written here ({error.strerror}); name another folder in"
            raise CorpusError(f"{line} MINIDVAE_CACHE (115 MB per hour of speech)") from None
        found = packing.read(folder)
    for line in found.notes:
        note(line.encode(errors="backslashreplace").decode())  # names of files need not be text
    drawn, before = (found.drawn, None) if clean is None else (clean.drawn, clean.packed)
    return Corpus(name, found.layout, found.utterances, found.samples, drawn, before)


def absolute(source: str) -> str:
    """A source for `load_corpus` that means the same from every folder."""
    if source.startswith(CONDITIONS_OF):
        return CONDITIONS_OF + absolute(source.removeprefix(CONDITIONS_OF))
    return source if source == "built-in" else str(Path(os.path.expanduser(source)).absolute())


def built_in_speakers() -> dict[str, synthetic.Speaker]:
    """The voices of the built-in corpus by name, in the true values that make them; no sound is made."""
    return {
        voice.name: voice
        for voice in synthetic.make_speakers(BUILT_IN["seed"], *BUILT_IN["speakers"])
    }
