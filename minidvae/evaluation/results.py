"""What an evaluation returns: text and tables, and for each run its values, sounds and figures.

Nothing here prints, draws or writes; `report` turns an `Evaluation` into text, files, JSON and
HTML.
"""

from dataclasses import dataclass, field

import numpy as np

from ..data.audio import SAMPLE_RATE


@dataclass
class Table:
    """A table as it is shown, its cells formatted."""

    heading: list[str]
    rows: list[list[str]]
    left_columns: int = 1  # number of columns that are flush left; the others are flush right


@dataclass
class Sound:
    """A sound to listen to. Sounds of one group are shown beside one another."""

    group: str  # usually the name of an utterance
    label: str  # "original", "resynthesis", "noisy", …
    waveform: np.ndarray  # (samples,)
    sample_rate: int = SAMPLE_RATE


@dataclass
class Figure:
    """A picture, already drawn."""

    label: str  # the caption
    png: bytes  # the content of a PNG file
    group: str = ""  # group of the sounds that it belongs to; empty: none


@dataclass
class Traversal:
    """Segments that are decoded while one latent after the other takes several values."""

    label: str
    png: bytes  # tiles of one size, see `figures.traversal_tiles`
    latents: list[str]  # a row of tiles for each
    values: list[float]  # a column for each, after that of the originals


@dataclass
class RunResult:
    """The result of one run: a trained model and the speech that it was evaluated on."""

    run: str  # the folder, as the user named it, or the name of a model that ships
    model: str  # a key of `models.MODELS`
    data: str  # the corpus
    values: dict  # everything that was measured, for each utterance and in summary
    sounds: list[Sound] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    traversals: list[Traversal] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # further text files, by name


@dataclass
class Evaluation:
    """The result of one task for one or several runs."""

    task: str  # a key of `evaluate.TASKS`
    description: str  # a sentence that names the evaluation and its paper
    settings: dict  # options that change the results: split, limit, seed, mode, …
    body: list[str | Table]  # paragraphs and tables, in the order in which they are shown
    results: list[RunResult]  # one for each run, in their order

    @property
    def tables(self) -> list[Table]:
        return [block for block in self.body if isinstance(block, Table)]
