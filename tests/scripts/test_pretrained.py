"""The models that ship: made of a run, used by name wherever a run folder is, on recordings of one's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from run_scripts import (  # noqa: F401
    call,
    evaluate_script,
    log,
    minidvae_command,
    results_of,
    surroundings,
    train_script,
)

import minidvae
from minidvae.data import audio
from minidvae.inference.convert import convert_speech, join_segments, segments_of
from minidvae.models import MODELS, build_model
from minidvae.training import checkpoint


def test_a_shipped_model_is_the_run_in_half_precision(shipped):
    model, stft, content = minidvae.load_pretrained(shipped)
    trained, _, whole = minidvae.load_run("run")
    for mine, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.half().float() if theirs.ndim > 1 else theirs)
    assert content["plan"]["recipe"] == whole["plan"]["recipe"] and "data" not in content["plan"]
    assert str(Path.cwd()).encode() not in (checkpoint.PRETRAINED / f"{shipped}.pt").read_bytes()


def test_its_name_stands_where_a_folder_does(shipped, speech, capsys):
    assert (
        call(evaluate_script, shipped, "run", "--data", speech, "--limit", 2, "--json", "all.json")
        == 0
    )
    named, folder = (
        result["summary"]["si_sdr"]["mean"] for result in json.loads(Path("all.json").read_text())
    )
    assert named == pytest.approx(folder, abs=0.05) and named != folder  # half precision
    assert (results_of(Path("runs", shipped), "resynthesis") / "results.json").is_file()
    arguments = [
        "--init",
        shipped,
        "--recipe",
        "quick",
        "--data",
        speech,
        "--run",
        "next",
        "--steps",
        2,
    ]
    assert (
        call(
            train_script,
            *arguments,
            "--set",
            "frames=20",
            "batch=4",
            "warmup=0",
            "learning_rate=1e-9",
        )
        == 0
    )
    assert log("next")[-1]["dev"]["loss"] == pytest.approx(log("run")[-1]["dev"]["loss"], rel=0.05)


def test_an_existing_folder_goes_before_a_name(shipped):
    Path("run").rename(shipped)
    assert (
        torch.load(Path(shipped, "best.pt"))["plan"]["data"]
        == minidvae.load_run(shipped)[2]["plan"]["data"]
    )


def test_an_unknown_name_lists_those_that_ship(shipped, capsys):
    assert call(evaluate_script, "vae-librispeach") == 2
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("evaluate.py: error: vae-librispeach: ")
        and shipped in error
        and "\n" not in error
    )


def test_models_that_ship_load_and_have_a_card(capsys):
    """Every one is small, is described, and says where its numbers come from."""
    assert {name.partition("-")[0] for name in checkpoint.pretrained()} >= {
        "light_dvae_local",
        "vae",
        "fhvae",
    }
    for name in checkpoint.pretrained():
        model, stft, content = minidvae.load_pretrained(name)
        assert name.startswith(content["model"]) and all(
            p.isfinite().all() for p in model.parameters()
        )
        assert (checkpoint.PRETRAINED / f"{name}.pt").stat().st_size <= 4 * 2**20
        card = (checkpoint.PRETRAINED / f"{name}.md").read_text()
        assert all(
            word in card
            for word in (name, "CC BY 4.0", "python train.py", "python evaluate.py", "Limits")
        )
    assert minidvae_command("models") == 0
    assert "light_dvae_local-librispeech" in capsys.readouterr().out


def test_a_file_or_a_folder_without_splits_is_all_test(shipped, speech, capsys):
    """Of a recording of one's own nothing is held back; of the folder that a run was trained on, its test split is."""
    files = sorted(speech.rglob("*.wav"))
    Path("mine").mkdir()
    for number, file in enumerate(files[:3]):
        Path("mine", f"{number}.wav").write_bytes(file.read_bytes())
    for source, count in ((files[0], 1), ("mine", 3)):
        assert call(evaluate_script, shipped, "--data", source, "--json", "all.json") == 0
        assert len(json.loads(Path("all.json").read_text())[0]["utterances"]) == count
    arguments = ["--recipe", "quick", "--data", "mine", "--run", "own", "--steps", 1]
    assert call(train_script, "--model", "vae", *arguments, "--set", "frames=20", "batch=4") == 0
    Path("link").symlink_to("mine")
    assert call(evaluate_script, "own", "--data", "link", "--json", "all.json") == 0
    (result,) = json.loads(Path("all.json").read_text())
    assert (result["split"], len(result["utterances"])) == ("test", 1)


# ---- python -m minidvae convert ---------------------------------------------------------------------------


def test_convert(speech, capsys):
    """The output is as long and as loud as the source, and another one for another reference; what is there stays."""
    settings = ["features=log_magnitude", "batch=8", "width=16", "report=2"]
    arguments = [
        "--recipe",
        "quick",
        "--data",
        speech,
        "--run",
        "run",
        "--steps",
        4,
        "--set",
        *settings,
    ]
    assert call(train_script, "--model", "fhvae", *arguments) == 0
    source, reference, other = sorted(speech.rglob("*.wav"))[:5:2]
    flags = ("--model", "run", "--device", "cpu")
    assert minidvae_command("convert", source, reference, "-o", "a.wav", *flags) == 0
    assert minidvae_command("convert", source, other, "-o", "b.wav", *flags) == 0
    a, b, original = (audio.load(path) for path in ("a.wav", "b.wav", source))
    assert len(a) == len(original) and np.std(a) == pytest.approx(np.std(original), rel=0.02)
    assert np.abs(a - b).max() > 0.01
    capsys.readouterr()
    soundfile.write("silent.wav", np.zeros(16_000), 16_000)
    for bad, expected in {
        (source, reference, "-o", "a.wav", *flags): "--force",
        (source, "nowhere.wav", "-o", "c.wav", *flags): "nowhere.wav",
        (source, "silent.wav", "-o", "c.wav", *flags): "silent",
        (source, reference, "-o", "c.wav", "--model", "nowhere"): "nowhere",
    }.items():
        assert minidvae_command("convert", *bad) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error and error.startswith("minidvae: error: ") and "\n" not in error
    assert minidvae_command("convert", source, other, "-o", "a.wav", "--force", *flags) == 0
    assert np.array_equal(audio.load("a.wav"), b) and not Path("c.wav").exists()


@pytest.mark.parametrize("shift", [1, 5, 20])
def test_joined_segments_are_the_whole(shift):
    features = torch.randn(63, 4)
    torch.testing.assert_close(
        join_segments(segments_of(features, 20, shift), shift)[:63], features
    )


def test_convert_moves_z2_by_the_difference_of_the_s_vectors():
    """To the source's own voice z2 is not moved. With a decoder that gives the features back, the source comes out."""
    torch.manual_seed(0)
    model, random = build_model("fhvae", bins=200, frames=20), np.random.default_rng(0)
    source, reference = (
        np.cumsum(random.standard_normal(16_000)).astype(np.float32) for _ in range(2)
    )
    source, reference = (
        x - np.convolve(x, np.ones(400) / 400, "same").astype(np.float32)
        for x in (source, reference)
    )
    seen, given, infer = [], [], model.infer
    model.infer = lambda x: seen.append((x, infer(x))) or seen[-1][1]
    model.decode = lambda z1, z2: given.append(z2) or seen[-2][0]
    estimate = convert_speech(model, source, source)
    torch.testing.assert_close(given[0], seen[0][1].z2)
    peak = np.abs(source).max()
    features = [
        audio.log_magnitude(torch.from_numpy(x / peak))
        for x in (source, estimate.astype(np.float32))
    ]
    assert (features[0] - features[1]).abs().median() < 0.5
    convert_speech(model, source, reference)
    s_vectors = [model.s_vector(latents.z2) for _, latents in seen[2:]]
    torch.testing.assert_close(given[1], seen[2][1].z2 + s_vectors[1] - s_vectors[0])


def test_convert_from_python(speech):
    """As the command does; what is no waveform, silent or no model is a ValueError."""
    settings = ["features=log_magnitude", "batch=8", "width=16", "report=2"]
    arguments = ["--recipe", "quick", "--data", speech, "--run", "run", "--steps", 2]
    assert call(train_script, "--model", "fhvae", *arguments, "--set", *settings) == 0
    paths = sorted(speech.rglob("*.wav"))[:5:2]
    source, reference = (soundfile.read(path, dtype="float32")[0] for path in paths[:2])
    found = minidvae.convert(source, torch.from_numpy(reference), 16_000, "run")
    assert found.shape == source.shape
    assert minidvae_command("convert", *paths[:2], "-o", "a.wav", "--model", "run") == 0
    assert np.abs(audio.load("a.wav") - found).max() < 1e-3  # 16 bits
    for wrong, message in (
        ((source[None], reference), "shape"),
        ((source, 0 * reference), "reference: is silent"),
    ):
        with pytest.raises(ValueError, match=message):
            minidvae.convert(*wrong, 16_000, "run")
    with pytest.raises(ValueError, match="expected an fhvae"):
        minidvae.convert(source, reference, 16_000, "vae-librispeech")


def test_former_names_of_shipped_models():
    model, _, content = minidvae.load_pretrained("light_dvae-librispeech")
    assert content["model"] == "light_dvae_local" and model.config.context == 50


def test_runs_of_former_versions_are_the_local_models(tmp_path):
    """`light_dvae` had settings of this project: where they are not those of the paper, it is light_dvae_local."""
    sizes = {"width": 16, "feedforward": 16, "layers": 1, "w_embedding": 4, "w_hidden": 4}
    papers = {"context": 0, "phases": 1, "w_prior": "standard"}
    for name in ("light_dvae", "hit_dvae"):
        for settings in (papers, {"context": 5}, {"phases": 4}, {"w_prior": "aggregate"}):
            settings = papers | settings
            local = build_model(f"{name}_local", **sizes, **settings)
            checkpoint.save(tmp_path / "a.pt", name, local, audio.STFT(), plan={"model": name})
            model, _, content = checkpoint.restore(tmp_path / "a.pt")
            expected = name if settings == papers else f"{name}_local"
            assert content["model"] == content["plan"]["model"] == expected
            assert type(model) is MODELS[expected][0]
            parameters = dict(model.named_parameters())
            for key, value in local.named_parameters():
                assert torch.equal(parameters[key], value)
