"""Manifests, files of phone labels and settings, as no one should write them."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from endings import end_of
from hypothesis import given
from hypothesis import strategies as st

from minidvae.data.corpus import load_corpus
from minidvae.models import MODELS, build_model
from minidvae.training.config import RECIPES, SettingError, overrides
from minidvae.training.run import resolve

SAMPLES = 3_200
NUMBERS = st.sampled_from(
    [
        "0",
        "-1",
        "1",
        "2",
        "3.5",
        "nan",
        "inf",
        "-inf",
        "1e300",
        "1e-300",
        "1_000",
        "٣",
        "",
        "9" * 400,
        "9" * 5000,
    ]
) | st.integers(-(2**65), 2**65).map(str)


@pytest.fixture(scope="module")
def folder() -> Path:
    """Two sound files."""
    place = Path(tempfile.mkdtemp())
    for number, name in enumerate("ab"):
        soundfile.write(
            place / f"{name}.wav", np.random.default_rng(number).normal(0, 0.1, SAMPLES), 16_000
        )
    yield place
    shutil.rmtree(place)


def check(corpus) -> None:
    """What a corpus says of itself fits in with its samples."""
    for number, u in enumerate(corpus.utterances if corpus else ()):
        waveform = corpus.waveform(number)
        assert len(waveform) and np.isfinite(waveform).all() and np.abs(waveform).max() <= 1
        assert u.split in ("train", "dev", "test") and 0 <= u.trim[0] < u.trim[1] <= u.length
        assert all(0 <= start <= stop <= u.length for start, stop, _ in u.phones)


def load(folder: Path, source: Path):
    with tempfile.TemporaryDirectory() as cache:
        check(end_of(lambda: load_corpus(source, cache, progress=False, note=str)))


CELLS = st.sampled_from(
    ["a.wav", "b.wav", "c.wav", ".", "/", "a.wav/", "anna", "train", "dev", "test", "TRAIN", ""]
)
CELLS |= st.sampled_from(
    ["path", "speaker", "split", "text", "phones", "sex", "condition"]
) | st.text(max_size=8)
ROWS = st.tuples(
    st.sampled_from(["a.wav", "b.wav"]), CELLS, st.sampled_from(["train", "dev", "test"])
) | st.lists(CELLS)
HEADERS = st.permutations(["path", "speaker", "split", "text", "phones"]) | st.just(
    ["path", "speaker", "split"]
)


@given(
    HEADERS | st.lists(CELLS),
    st.lists(ROWS, max_size=4),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
)
def test_manifests(folder, header, rows, end):
    lines = ["\t".join(row) for row in (header, *rows)]
    (folder / "manifest.tsv").write_bytes(end.join(lines).encode(errors="surrogatepass"))
    load(folder, folder / "manifest.tsv")


@given(st.binary(max_size=200))
def test_files_that_are_no_manifests(folder, content):
    (folder / "manifest.tsv").write_bytes(content)
    load(folder, folder / "manifest.tsv")


TIMES = st.integers(0, SAMPLES).map(str) | NUMBERS


@given(
    st.lists(
        st.tuples(TIMES, TIMES, st.sampled_from(["sil", "aa", "", "a b"]) | st.text(max_size=3)),
        max_size=5,
    )
)
def test_phone_labels(folder, lines):
    (folder / "a.phn").write_bytes("\n".join(map(" ".join, lines)).encode(errors="surrogatepass"))
    (folder / "manifest.tsv").write_text(
        "path\tspeaker\tsplit\tphones\na.wav\tanna\ttrain\ta.phn\n"
    )
    load(folder, folder / "manifest.tsv")


NAMES = sorted(
    {field for model in MODELS.values() for field in vars(model[1]())} | set(vars(RECIPES["quick"]))
)
SETTINGS = st.tuples(
    st.sampled_from(NAMES) | st.text(max_size=5),
    st.sampled_from(["=", "", "=="]),
    NUMBERS | st.lists(NUMBERS, max_size=3).map(",".join) | st.text(max_size=5),
)


def build_on_meta(name: str, config: dict) -> None:
    """Build a model without memory, as reading a checkpoint does. Layers are counted, not made by the thousand."""
    lengths = [value for key, value in config.items() if key == "layers"]
    lengths += [len(value) for value in config.values() if isinstance(value, tuple)]
    if max(lengths, default=0) > 100:
        return
    try:
        with torch.device("meta"):
            build_model(name, **config)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise SettingError(str(error)[:200]) from None  # as a new run says


@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(RECIPES)),
    st.lists(SETTINGS.map("".join), max_size=3),
)
def test_settings(name, recipe, pairs):
    """What is taken is a recipe of finite numbers and a model that can be built."""
    found = end_of(lambda: resolve(name, recipe, overrides(pairs)))
    if found is not None:
        numbers = [value for part in (vars(found[0]), found[1]) for value in part.values()]
        numbers = [
            item for value in numbers for item in (value if isinstance(value, tuple) else (value,))
        ]
        assert all(np.isfinite(number) for number in numbers if isinstance(number, int | float))
        end_of(lambda: build_on_meta(name, found[1]))
