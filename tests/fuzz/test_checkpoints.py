"""Checkpoints and published models whose fields someone has changed."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from endings import end_of
from hypothesis import given
from hypothesis import strategies as st
from run_scripts import call, surroundings, train_script  # noqa: F401
from test_text import NUMBERS

from minidvae.models import build_model
from minidvae.models.published import load_dvae_speech, their_key
from minidvae.training import checkpoint

INI = {
    "STFT": {"fs": "16000", "wlen_sec": "64e-3", "hop_percent": "0.25"},
    "Network": {
        "name": "VAE",
        "x_dim": "513",
        "z_dim": "16",
        "activation": "tanh",
        "dense_x_z": "8",
    },
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    theirs = {
        their_key("vae", key, {}): p
        for key, p in build_model("vae", hidden=(8,)).named_parameters()
    }
    torch.save(theirs, folder / "model.pt")
    return folder


PLACES = st.sampled_from([(section, key) for section, values in INI.items() for key in values])
VALUES = NUMBERS | st.lists(NUMBERS, max_size=3).map(",".join) | st.text(max_size=8)


@given(st.dictionaries(PLACES, VALUES, max_size=2), st.text(max_size=12))
def test_config_ini(published, changes, more):
    ini = copy.deepcopy(INI)
    for (section, key), value in changes.items():
        ini[section][key] = value
    lines = [
        line
        for section, values in ini.items()
        for line in (f"[{section}]", *map(" = ".join, values.items()))
    ]
    (published / "config.ini").write_bytes("\n".join([*lines, more]).encode(errors="surrogatepass"))
    found = end_of(lambda: load_dvae_speech(published))
    assert found is None or found[0].sample(1, 2).isfinite().all()


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory) -> dict[str, Path]:
    """A run of each kind of model."""
    folder = tmp_path_factory.mktemp("trained")
    for name, pairs in (
        ("vae", ["hidden=8"]),
        ("fhvae", ["width=8", "z1_latent=2", "z2_latent=2", "shift=5"]),
    ):
        arguments = ["--recipe", "quick", "--data", speech, "--run", folder / name, "--steps", 1]
        assert (
            call(train_script, "--model", name, *arguments, "--set", "frames=10", "batch=2", *pairs)
            == 0
        )
    return {name: folder / name for name in ("vae", "fhvae")}


# What only `train.py --resume` reads.
UNREAD = ("plan", "progress", "optimiser")


def leaves(content, path=()):
    """The paths of all that stands in nested dicts."""
    yield path
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from leaves(value, (*path, key))


JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        2**31,
        2**70,
        -0.5,
        0.5,
        math.nan,
        math.inf,
        "",
        "x",
        "\0",
        (),
        (1,),
    ]
)
JUNK |= st.sampled_from(
    [{}, {"x": 1}, [], [1], ("x", 2.0), (0.0, 1.0), "fp32", "vae", "muon", "fbank", "power"]
)
JUNK |= st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(3),
        torch.full((8,), torch.nan),
        torch.zeros(2, dtype=torch.int64),
    ]
)


@given(st.data())
def test_checkpoints(trained, data):
    """A model is read from the checkpoint, or the error is one line that names it."""
    name = data.draw(st.sampled_from(sorted(trained)))
    content = torch.load(trained[name] / "last.pt")
    for _ in range(data.draw(st.integers(1, 2))):
        paths = [path for path in leaves(content) if path and path[0] not in UNREAD]
        path = data.draw(st.sampled_from(paths))
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        change = data.draw(JUNK | st.just("removed"))
        if isinstance(change, str) and change == "removed":
            del inside[path[-1]]
        else:
            inside[path[-1]] = change
    Path("changed").mkdir(exist_ok=True)
    torch.save(content, "changed/best.pt")
    end_of(lambda: checkpoint.load_run("changed"))


@pytest.mark.parametrize("part", ["plan", "progress", "optimiser"])
@pytest.mark.parametrize("change", ["removed", None, {}, 7])
def test_a_run_that_cannot_be_resumed(trained, part, change, capsys):
    """A part of the training's state that is missing or of another type is one line."""
    content = torch.load(trained["vae"] / "last.pt")
    del content[part]
    if change != "removed":
        content[part] = change
    shutil.copytree(trained["vae"], "changed")
    torch.save(content, "changed/last.pt")
    capsys.readouterr()
    code = call(train_script, "--resume", "--run", "changed", "--steps", 2)
    error = capsys.readouterr().err
    if (part, change) == ("progress", {}):
        assert code == 0  # every field has a default: the training starts again
    else:
        assert code == 2 and error.count("\n") == 1 and "changed" in error
