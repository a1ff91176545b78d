"""What an evaluation returns: its tables, and for each run its values, sounds and figures.

Nothing here prints, draws or writes; `report` turns an `Evaluation` into text, files, JSON and HTML.
"""

from dataclasses import dataclass, field

import numpy as np

from ..data.audio import SAMPLE_RATE


@dataclass
class Table:
    """A table as it is shown, its cells formatted."""

    heading: list[str]
    rows: list[list[str]]
    title: str = ""  # a line above it, such as "0 dB"
    left_columns: int = (
        1  # columns that are flush left; the others hold numbers and are flush right
    )


@dataclass
class Sound:
    """A sound to listen to. Sounds of one group are shown beside one another."""

    group: str  # what they have in common, usually the name of an utterance
    label: str  # what this one is: "original", "resynthesis", "noisy", …
    waveform: np.ndarray  # (samples,), or (samples, channels)
    sample_rate: int = SAMPLE_RATE


@dataclass
class Figure:
    """A picture, already drawn."""

    label: str  # the caption
    png: bytes  # the content of a PNG file
    group: str = ""  # of the sounds that it shows; empty: it stands by itself
    file_name: str = (
        ""  # its name in the folder of the run, without ".png"; empty: made from group and label
    )


@dataclass
class RunResult:
    """The result of one run (a trained model with the speech that it was evaluated on)."""

    run: str  # the folder, as the user named it, or the name of a shipped model
    model: str  # a key of `models.MODELS`
    data: str  # the corpus
    values: dict  # of numbers, strings, lists and dicts: everything that was measured, per utterance and in summary
    sounds: list[Sound] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


@dataclass
class Evaluation:
    """The result of one task for one or several runs."""

    task: str  # a key of `evaluate.TASKS`
    description: str  # one sentence: what was evaluated, after which paper
    settings: (
        dict  # what the results depend on beside the run: split, mode, limit, seed, snr, method, …
    )
    tables: list[Table]
    notes: list[str]  # sentences that explain the tables, one paragraph each
    results: list[RunResult]  # one for each run, in their order
