"""The models that ship: made of a run, used by name wherever a run folder is, applied to a user's
recordings."""

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


def train(data, run, *arguments) -> int:
    """Return the exit code of train.py with the recipe `quick`."""
    command = ["--recipe", "quick", "--data", data, "--run", run]
    return call(train_script, *command, *arguments)


def train_fhvae(speech, steps: int) -> int:
    """Train a small FHVAE in the folder `run`; return the exit code."""
    settings = ["features=log_magnitude", "batch=8", "width=16", "report=2"]
    return train(speech, "run", "--model", "fhvae", "--steps", steps, "--set", *settings)


def test_a_shipped_model_is_the_run_in_half_precision(shipped):
    """Fails if a parameter is not that of the run, rounded to half precision where it is a matrix,
    or if the file tells the path of the folder that it was made in."""
    model, stft, content = minidvae.load_pretrained(shipped)
    trained, _, run_content = minidvae.load_run("run")
    for parameter, original in zip(model.parameters(), trained.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        expected = original.half().float() if original.ndim > 1 else original
        assert torch.equal(parameter, expected)
    assert content["plan"]["recipe"] == run_content["plan"]["recipe"]
    assert "data" not in content["plan"]
    file = checkpoint.PRETRAINED / f"{shipped}.pt"
    assert str(Path.cwd()).encode() not in file.read_bytes()


def test_a_shipped_name_stands_where_a_folder_does(shipped, speech, capsys):
    """Fails if the name cannot be evaluated or trained from as the run can that it was made of."""
    arguments = ["--data", speech, "--limit", 2, "--json", "all.json"]
    assert call(evaluate_script, shipped, "run", *arguments) == 0
    results = json.loads(Path("all.json").read_text())
    by_name, by_folder = [result["summary"]["si_sdr"]["mean"] for result in results]
    # The shipped model is in half precision.
    assert by_name == pytest.approx(by_folder, abs=0.05)
    assert by_name != by_folder
    assert (results_of(Path("runs", shipped), "resynthesis") / "results.json").is_file()
    settings = ["frames=20", "batch=4", "warmup=0", "learning_rate=1e-9"]
    assert train(speech, "next", "--init", shipped, "--steps", 2, "--set", *settings) == 0
    expected = log("run")[-1]["dev"]["loss"]
    assert log("next")[-1]["dev"]["loss"] == pytest.approx(expected, rel=0.05)


def test_an_existing_folder_goes_before_a_name(shipped):
    """Fails if the model that ships is loaded where there is a folder of the same name."""
    Path("run").rename(shipped)
    data_of_folder = torch.load(Path(shipped, "best.pt"))["plan"]["data"]
    _, _, content = minidvae.load_run(shipped)
    assert content["plan"]["data"] == data_of_folder


def test_an_unknown_name_lists_those_that_ship(shipped, capsys):
    """Fails if a misspelt name ends in an error that does not say what the names are."""
    assert call(evaluate_script, "vae-librispeach") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("evaluate.py: error: vae-librispeach: ")
    assert shipped in error
    assert "\n" not in error


def test_models_that_ship_load_and_have_a_card(capsys):
    """Fails if a model is larger than 4 MiB, has a parameter that is not finite, or has no card
    with its licence, its commands and its limits."""
    model_names = {name.partition("-")[0] for name in checkpoint.pretrained()}
    assert model_names >= {"light_dvae_local", "vae", "fhvae"}
    required_words = ("CC BY 4.0", "python train.py", "python evaluate.py", "Limits")
    for name in checkpoint.pretrained():
        model, stft, content = minidvae.load_pretrained(name)
        assert name.startswith(content["model"])
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert (checkpoint.PRETRAINED / f"{name}.pt").stat().st_size <= 4 * 2**20
        card = (checkpoint.PRETRAINED / f"{name}.md").read_text()
        for word in (name, *required_words):
            assert word in card
    assert minidvae_command("models") == 0
    assert "light_dvae_local-librispeech" in capsys.readouterr().out


def test_a_file_or_a_folder_without_splits_is_all_test(shipped, speech, capsys):
    """Fails if a part of a user's recordings is held back, or if the evaluation of the folder that
    a run was trained on uses more than its test split."""
    files = sorted(speech.rglob("*.wav"))
    Path("mine").mkdir()
    for number, file in enumerate(files[:3]):
        Path("mine", f"{number}.wav").write_bytes(file.read_bytes())
    for source, count in ((files[0], 1), ("mine", 3)):
        assert call(evaluate_script, shipped, "--data", source, "--json", "all.json") == 0
        (result,) = json.loads(Path("all.json").read_text())
        assert len(result["utterances"]) == count
    settings = ["--steps", 1, "--set", "frames=20", "batch=4"]
    assert train("mine", "trained_on_mine", "--model", "vae", *settings) == 0
    Path("link").symlink_to("mine")
    assert call(evaluate_script, "trained_on_mine", "--data", "link", "--json", "all.json") == 0
    (result,) = json.loads(Path("all.json").read_text())
    assert result["split"] == "test"
    assert len(result["utterances"]) == 1


# --------------------------------------------------------------------- python -m minidvae convert


def test_convert(speech, capsys):
    """Fails if the output is not as long and as loud as the source, if it is the same for another
    reference, or if a file that exists is replaced without --force."""
    assert train_fhvae(speech, steps=4) == 0
    source, reference, other = sorted(speech.rglob("*.wav"))[:5:2]
    flags = ("--model", "run", "--device", "cpu")
    assert minidvae_command("convert", source, reference, "-o", "a.wav", *flags) == 0
    assert minidvae_command("convert", source, other, "-o", "b.wav", *flags) == 0
    like_reference = audio.load("a.wav")
    like_other = audio.load("b.wav")
    original = audio.load(source)
    assert len(like_reference) == len(original)
    assert np.std(like_reference) == pytest.approx(np.std(original), rel=0.02)
    assert np.abs(like_reference - like_other).max() > 0.01
    capsys.readouterr()
    soundfile.write("silent.wav", np.zeros(16_000), 16_000)
    for arguments, expected in {
        (source, reference, "-o", "a.wav", *flags): "--force",
        (source, "nowhere.wav", "-o", "c.wav", *flags): "nowhere.wav",
        (source, "silent.wav", "-o", "c.wav", *flags): "silent",
        (source, reference, "-o", "c.wav", "--model", "nowhere"): "nowhere",
    }.items():
        assert minidvae_command("convert", *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error
        assert error.startswith("minidvae: error: ")
        assert "\n" not in error
    assert minidvae_command("convert", source, other, "-o", "a.wav", "--force", *flags) == 0
    assert np.array_equal(audio.load("a.wav"), like_other)
    assert not Path("c.wav").exists()


@pytest.mark.parametrize("shift", [1, 5, 20])
def test_joined_segments_are_the_features(shift):
    """Fails if cutting features into segments and joining these changes a frame."""
    features = torch.randn(63, 4)
    joined = join_segments(segments_of(features, 20, shift), shift)
    torch.testing.assert_close(joined[:63], features)


def random_recording(random: np.random.Generator) -> np.ndarray:
    """Return a second of brown noise without its lowest frequencies, float32."""
    brown_noise = np.cumsum(random.standard_normal(16_000)).astype(np.float32)
    moving_average = np.convolve(brown_noise, np.ones(400) / 400, "same").astype(np.float32)
    return brown_noise - moving_average


def test_convert_moves_z2_by_the_difference_of_the_s_vectors():
    """Fails if z2 moves where the source is its own reference, if z2 does not move by the
    difference of the s-vectors elsewhere, or if a decoder that returns the features of the source
    does not give the source."""
    torch.manual_seed(0)
    model = build_model("fhvae", bins=200, frames=20)
    random = np.random.default_rng(0)
    source = random_recording(random)
    reference = random_recording(random)
    inferred = []  # features and latents of each call of model.infer
    decoded_z2 = []
    infer = model.infer

    def infer_and_note(x):
        latents = infer(x)
        inferred.append((x, latents))
        return latents

    def return_features_of_source(z1, z2):
        decoded_z2.append(z2)
        return inferred[-2][0]

    model.infer = infer_and_note
    model.decode = return_features_of_source
    estimate = convert_speech(model, source, source)
    torch.testing.assert_close(decoded_z2[0], inferred[0][1].z2)
    peak = np.abs(source).max()
    source_features = audio.log_magnitude(torch.from_numpy(source / peak))
    estimate_features = audio.log_magnitude(torch.from_numpy(estimate.astype(np.float32) / peak))
    assert (source_features - estimate_features).abs().median() < 0.5
    convert_speech(model, source, reference)
    source_latents = inferred[2][1]
    reference_latents = inferred[3][1]
    source_s_vector = model.s_vector(source_latents.z2)
    reference_s_vector = model.s_vector(reference_latents.z2)
    expected = source_latents.z2 + reference_s_vector - source_s_vector
    torch.testing.assert_close(decoded_z2[1], expected)


def test_convert_from_python(speech):
    """Fails if the function gives another sound than the command, or anything but a ValueError for
    what is no waveform, silent or no FHVAE."""
    assert train_fhvae(speech, steps=2) == 0
    source_path, reference_path, _ = sorted(speech.rglob("*.wav"))[:5:2]
    source, _ = soundfile.read(source_path, dtype="float32")
    reference, _ = soundfile.read(reference_path, dtype="float32")
    converted = minidvae.convert(source, torch.from_numpy(reference), 16_000, "run")
    assert converted.shape == source.shape
    arguments = [source_path, reference_path, "-o", "a.wav", "--model", "run"]
    assert minidvae_command("convert", *arguments) == 0
    assert np.abs(audio.load("a.wav") - converted).max() < 1e-3  # The file has 16 bits.
    with pytest.raises(ValueError, match="shape"):
        minidvae.convert(source[None], reference, 16_000, "run")
    with pytest.raises(ValueError, match="reference: is silent"):
        minidvae.convert(source, 0 * reference, 16_000, "run")
    with pytest.raises(ValueError, match="expected an fhvae"):
        minidvae.convert(source, reference, 16_000, "vae-librispeech")


# ------------------------------------------------------------------------------- former versions


def test_former_names_of_shipped_models():
    """Fails if the name that a model had in a former version does not load it."""
    model, _, content = minidvae.load_pretrained("light_dvae-librispeech")
    assert content["model"] == "light_dvae_local"
    assert model.config.context == 50


def test_runs_of_former_versions_are_the_local_models(tmp_path):
    """Fails if a `light_dvae` of a former version, which had settings of this project, is not
    loaded as light_dvae_local where these settings are not the paper's."""
    sizes = {"width": 16, "feedforward": 16, "layers": 1, "w_embedding": 4, "w_hidden": 4}
    papers = {"context": 0, "phases": 1, "w_prior": "standard"}
    for name in ("light_dvae", "hit_dvae"):
        for changes in ({}, {"context": 5}, {"phases": 4}, {"w_prior": "aggregate"}):
            settings = papers | changes
            local = build_model(f"{name}_local", **sizes, **settings)
            checkpoint.save(tmp_path / "a.pt", name, local, audio.STFT(), plan={"model": name})
            model, _, content = checkpoint.restore(tmp_path / "a.pt")
            expected = f"{name}_local" if changes else name
            assert content["model"] == content["plan"]["model"] == expected
            assert type(model) is MODELS[expected][0]
            parameters = dict(model.named_parameters())
            for key, value in local.named_parameters():
                assert torch.equal(parameters[key], value)
