"""Generation from the prior, and its distance to real speech."""

import itertools
import json
import shutil
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import benchmark as study
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import soundfile
import torch
from matplotlib.figure import Figure
from run_scripts import call, evaluate_script, results_of, surroundings  # noqa: F401
from tqdm import tqdm

from minidvae.data.audio import STFT, griffin_lim, log_magnitude
from minidvae.data.corpus import load_corpus
from minidvae.evaluation import figures, generation
from minidvae.evaluation.generation import (
    CLIP_SAMPLES,
    ClipSource,
    Stopwatch,
    extract_features,
    frechet_distance,
    recorded_source,
    scale_to_peak,
)
from minidvae.evaluation.report import render_table
from minidvae.evaluation.runs import Run
from minidvae.models import build_model
from minidvae.training import checkpoint
from minidvae.training.run import Plan, resolve

COARSE = STFT(1024, 512)
TRANSFORMER = {"width": 16, "feedforward": 16, "layers": 1}
TRANSFORMER |= {"w_hidden": 8, "w_embedding": 8, "w_layers": 1}
SMALL = {
    "vae": {"hidden": (8,)},
    "dkf": {"rnn": 8, "x_hidden": (8,)},
    "storn": {"h_rnn": 8, "g_rnn": 8},
    "vrnn": {"rnn": 8},
    "srnn": {"h_rnn": 8, "g_rnn": 8},
    "rvae": {"h_rnn": 8, "gx_rnn": 8, "gz_rnn": 8, "bidirectional": True},
    "dsae": {"v_rnn": 8, "xv_rnn": 8},
    "hit_dvae": TRANSFORMER,
    "light_dvae_local": TRANSFORMER | {"context": 5, "heads": 2},
    "light_dvae": TRANSFORMER,
}


def small(name):
    torch.manual_seed(0)
    model = build_model(name, input_scale="root", **SMALL[name]).eval()
    return Run(name, name, model, COARSE, {}, "speech", None, None)


def gaussian(mean, covariance) -> np.ndarray:
    """Return features whose sample mean and covariance are these: for each column of the
    covariance's square root two features, one on either side of the mean."""
    values, vectors = np.linalg.eigh(covariance)
    deviations = np.sqrt((len(mean) - 0.5) * values.clip(min=0))[:, None] * vectors.T
    return np.asarray(mean) + np.concatenate([deviations, -deviations])


def covariance(width, seed):
    factor = np.random.default_rng(seed).normal(size=(width, width + 2))
    return factor @ factor.T


# -------------------------------------------------------------------------------- Fréchet distance


def test_diagonal_gaussians():
    """The distance must be |μa − μb|² + Σ (σa − σb)²."""
    a = gaussian([1, 2, 3], np.diag([4.0, 9.0, 0.0]))
    b = gaussian([0, 4, 3], np.diag([1.0, 25.0, 16.0]))
    expected = 1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2 + (0 - 4) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_full_covariances_in_two_dimensions():
    """The trace of the matrix square root must be tr (AB)^½ = √(tr AB + 2 √det AB)."""
    a = covariance(2, 0)
    b = covariance(2, 1)
    trace_of_root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * trace_of_root
    distance = frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b))
    assert distance == pytest.approx(expected, rel=1e-10)


def test_full_covariances():
    """The matrix square root must be that of scipy."""
    a = covariance(30, 2)
    b = covariance(30, 3)
    expected = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    zeros = np.zeros(30)
    distance = frechet_distance(gaussian(zeros, a), gaussian(zeros, b))
    assert distance == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("count", (500, 20))
def test_distance_of_a_set_to_itself(count):
    """The distance must be zero, whatever the order of the clips and also with fewer clips than
    features. A shift of the mean must add its square."""
    features = np.random.default_rng(0).normal(size=(count, 40)) @ covariance(40, 1) + 100
    scale = np.trace(np.cov(features, rowvar=False))
    assert abs(frechet_distance(features, features)) < 1e-12 * scale
    assert abs(frechet_distance(features, features[::-1])) < 1e-9 * scale
    assert frechet_distance(features, features + 3) == pytest.approx(40 * 9, abs=1e-9 * scale)


def test_distance_grows_with_noise(speech):
    """The distance between speech and the same speech in white noise must rise as the
    signal-to-noise ratio falls."""
    torch.manual_seed(0)
    network = build_model("deepspeech2", channels=(4,), width=12, layers=1).eval()
    train = load_corpus(speech).split("train")
    clips = recorded_source(train, 24, (0,), torch.device("cpu")).make_clips(range(24))
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    noise *= clips.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)

    def features(waveforms):
        with torch.no_grad():
            return network.features(log_magnitude(scale_to_peak(waveforms))).numpy()

    clean = features(clips)
    distances = []
    for snr in (40, 30, 20, 10, 0):
        noisy = features(clips + 10 ** (-snr / 20) * noise)
        distances.append(frechet_distance(clean, noisy))
    assert distances[0] > 0 and (np.diff(distances) > 0).all()


# ------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("name", SMALL)
def test_samples_do_not_depend_on_the_batch(name):
    """A clip must be the same whatever else is in its batch, and another one under another number,
    draw or seed."""
    run = small(name)

    def sample(numbers, seed=0, draw=0):
        generators = generation.clip_generators("latents", seed, draw, numbers)
        return generation.sample_power(run, generators)

    together = sample(range(5))
    assert together.shape == (5, COARSE.frames(CLIP_SAMPLES), COARSE.bins)
    in_two_batches = torch.cat([sample(range(2)), sample(range(2, 5))])
    torch.testing.assert_close(in_two_batches, together, rtol=1e-3, atol=0)
    first = together[:1]
    for other in (together[1:2], sample(range(1), seed=1), sample(range(1), draw=1)):
        assert (other - first).abs().max() > 1e-3 * first.max()


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae", "light_dvae_local", "dsae"])
def test_w_of_the_posteriors(name):
    """After `fit_w`, w must have the mean and covariance of draws from q(w | x), and samples must
    be made with it. With the moments of N(0, I) the samples must be those of the prior."""
    model = small(name).model
    generator = torch.Generator().manual_seed(0)
    sampled = model.sample(2, 3, torch.Generator().manual_seed(1))
    power = torch.rand(70, 4, COARSE.bins, generator=generator)
    power = power * torch.rand(70, 1, 1, generator=generator)
    model.fit_w(power)
    draws = []
    with torch.no_grad():
        q_w = model(power).q_w
        for _ in range(500):
            draws.append(q_w.sample(torch.randn(q_w.mean.shape, generator=generator)))
    expected = torch.cat(draws).T
    width = model.config.w_latent
    w = model.draw_w(torch.randn(35_000, width, generator=generator)).T
    torch.testing.assert_close(w.mean(1), expected.mean(1), atol=0.03, rtol=0)
    torch.testing.assert_close(w.cov(), expected.cov(), atol=0.05, rtol=0)
    distance_from_prior = w.mean(1).abs() + (w.cov() - torch.eye(width)).abs().amax(1)
    assert distance_from_prior.max() > 0.1
    assert not torch.equal(model.sample(2, 3, torch.Generator().manual_seed(1)), sampled)
    model.w_moments = torch.cat([torch.zeros(1, width), torch.eye(width)])
    torch.testing.assert_close(model.sample(2, 3, torch.Generator().manual_seed(1)), sampled)


def test_phases():
    """Waveforms of the same power must differ between clips, and be the same whatever else is in
    the batch."""
    generator = torch.Generator().manual_seed(0)
    power = torch.rand(COARSE.frames(CLIP_SAMPLES), COARSE.bins, generator=generator)
    power = power.expand(3, -1, -1)
    generators = generation.clip_generators("phases", 0, 0, range(3))
    together = griffin_lim(power, COARSE, 5, length=CLIP_SAMPLES, generator=generators)
    assert (together[:2] - together[2]).std(1).min() > 0.5 * together.std()
    generators = generation.clip_generators("phases", 0, 0, range(2, 3))
    alone = griffin_lim(power[2:], COARSE, 5, length=CLIP_SAMPLES, generator=generators)
    torch.testing.assert_close(alone, together[2:], rtol=1e-3, atol=1e-5)


def test_latents_and_phases_are_drawn_apart():
    """Fails if two clips, or latents and phases of a clip, have the same random numbers."""
    generators = [
        *generation.clip_generators("latents", 0, 0, range(9)),
        *generation.clip_generators("phases", 0, 0, range(9)),
    ]
    assert len({generator.initial_seed() for generator in generators}) == 18


def test_a_generator_for_each():
    """Fails if generators are repeated where there are too few, or left out."""
    latents = generation.clip_generators("latents", 0, 0, range(2))
    for name in ("vae", "light_dvae"):
        with pytest.raises(ValueError, match="2 generators for 3 sequences"):
            small(name).model.sample(3, 4, latents)
    phases = generation.clip_generators("phases", 0, 0, range(3))
    with pytest.raises(ValueError, match="3 generators for 2 spectra"):
        griffin_lim(torch.ones(2, 4, COARSE.bins), COARSE, generator=phases)


@pytest.mark.parametrize("name", ("noise", "vae"))
def test_memory_does_not_grow_with_the_clips(name):
    """Fails if clips of earlier batches stay in memory."""
    stopwatch = Stopwatch(torch.device("cpu"))
    references = []  # weak references to all clips, before and after they are scaled

    def make_noise(numbers):
        return torch.rand(len(numbers), 100)

    if name == "noise":
        count = 40
        source = make_noise
    else:
        count = 6
        source = generation.model_source(small(name), 0, 0, stopwatch).make_clips

    def make_clips(numbers):
        clips = source(numbers)
        references.append(weakref.ref(clips))
        return clips

    def features(clips):
        # Neither clips of earlier batches nor those of this one before scaling are in memory.
        assert all(reference() is None for reference in references)
        references.append(weakref.ref(clips))
        return clips[:, :3].numpy().copy()

    clip_source = ClipSource("", make_clips, stopwatch)
    rows = extract_features(clip_source, count, features, 2, tqdm(disable=True))
    assert rows.shape == (count, 3) and len(references) == count


def test_windows_share_a_scale(monkeypatch):
    """The same noise must have the same colour in a contact sheet, whatever the STFT's window. Its
    power grows with the window, by a factor of 4 from 512 to 2,048 samples."""
    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    noise = torch.randn(2, CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    stfts = (STFT(512, 256), STFT(2048, 1024))
    rows = [("", stft.analyse(noise).abs().square().numpy(), stft) for stft in stfts]
    figures.contact_sheet(rows)
    images = [axis.images[0] for axis in axes[:4]]
    levels = []  # mean power of each image in dB
    for image in images:
        decibels = image.get_array()[1:-1, 1:-1]
        levels.append(10 * np.log10((10 ** (decibels / 10)).mean()))
    assert np.abs(np.array(levels) - levels[0]).max() < 0.3
    assert len({image.get_clim() for image in images}) == 1


def test_real_clips_are_of_their_splits(speech):
    """The reference clips must come from the training split and those of the test rows from the
    test split, all with the same peak."""
    corpus = load_corpus(speech)
    batches = []

    def features(clips):
        batches.append(clips.clone())
        return clips[:, :4].numpy()

    run = replace(small("vae"), corpus=corpus, test=corpus.split("test"))
    rows = generation.measure([run], features, clips=3, repeats=2, seed=0)
    assert list(rows) == ["vae", "test (exact phase)", "test (Griffin-Lim)"]
    reference, generated, exact_phase, estimated_phase = batches[:4]
    for first, second in zip(batches[:4], batches[4:], strict=True):
        assert not torch.equal(first, second)  # Each repeat has new clips.
    for clips in batches:
        assert clips.shape == (3, CLIP_SAMPLES)
        np.testing.assert_allclose(clips.abs().amax(1), 1, rtol=1e-6)
    train = corpus.split("train")
    test = corpus.split("test")
    assert is_excerpt(reference, train) and not is_excerpt(reference, test)
    assert is_excerpt(exact_phase, test) and not is_excerpt(exact_phase, train)
    assert not is_excerpt(estimated_phase, test) and not is_excerpt(generated, train)
    text = generation.describe_clips(run, 8, 1, features=4)
    assert "train holds 9 side by side; test holds 7 side by side, so clips overlap" in text
    last = corpus.utterances[-1]
    too_short = last._replace(trim=(0, CLIP_SAMPLES - 1))
    run = replace(run, test=replace(test, utterances=(last, too_short)))
    text = generation.describe_clips(run, 2, 1, features=4)
    assert "(1 of 2 utterances are too short)" in text
    values = rows["test (exact phase)"]["fdsd"]["values"]
    assert values[0] == frechet_distance(exact_phase[:, :4].numpy(), reference[:, :4].numpy())


def is_excerpt(clips, corpus) -> bool:
    """Return whether every clip is, but for its level, an excerpt of one of the utterances."""
    waveforms = [corpus.waveform(i).astype(float) for i in range(len(corpus))]
    return all(largest_correlation(clip, waveforms) >= 0.9999 for clip in clips.double().numpy())


def largest_correlation(clip, waveforms) -> float:
    """Return the largest normalised correlation of a clip with excerpts of the waveforms."""
    largest = 0.0
    for waveform in waveforms:
        products = scipy.signal.correlate(waveform, clip, "valid", method="fft")
        window = np.ones(CLIP_SAMPLES)
        energies = scipy.signal.correlate(waveform**2, window, "valid", method="fft")
        correlations = products / np.sqrt(energies.clip(min=1e-9) * (clip @ clip))
        largest = max(largest, float(correlations.max()))
    return largest


# ------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def runs(speech, tmp_path_factory):
    """Return a folder with runs of untrained models on speech that says `ab` in every file."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(speech, folder / "speech")
    for file in (folder / "speech").rglob("*.wav"):
        file.with_suffix(".txt").write_text("ab\n")
    recogniser = {"bins": 80, "channels": (2,), "width": 6, "layers": 1, "symbols": ("a", "b")}
    broken = build_model("vae", **SMALL["vae"])
    broken.output.bias.data.fill_(float("nan"))
    models = {name: small(name).model for name in ("vae", "srnn", "dsae")} | {"broken": broken}
    models["broken-w"] = small("dsae").model
    models["broken-w"].posterior_v.mean.bias.data.fill_(float("nan"))
    models["recogniser"] = build_model("deepspeech2", **recogniser)
    models["elsewhere"] = models["recogniser"]  # Its corpus does not exist any more.
    models["deaf"] = build_model("deepspeech2", **recogniser)
    models["deaf"].convolutions[0].convolution.weight.data.fill_(float("nan"))
    model_names = dict.fromkeys(("recogniser", "elsewhere", "deaf"), "deepspeech2")
    model_names |= {"broken": "vae", "broken-w": "dsae"}
    for title, model in models.items():
        name = model_names.get(title, title)
        settings = {"features": "fbank", "targets": "characters"} if name == "deepspeech2" else {}
        recipe = replace(resolve(name, "quick", settings)[0], models={})
        data = "gone" if title in ("elsewhere", "deaf") else str(folder / "speech")
        plan = asdict(Plan(name, "quick", data, 0, "fp32", recipe=asdict(recipe)))
        file = folder / title / "best.pt"
        file.parent.mkdir()
        checkpoint.save(file, name, model, COARSE, plan=plan, progress={"step": 1})
    return folder


def test_table_and_files(runs, monkeypatch, capsys):
    """Fails if the table lacks a row, a number is of other clips than it says, or the output does
    not say with which network it was measured and how well that network recognises."""
    arguments = [runs / "vae", runs / "srnn", "--task", "generation", "--json", "results.json"]
    arguments += ["--recogniser", runs / "recogniser", "--clips", 4, "--repeats", 2]
    assert call(evaluate_script, *arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    results = json.loads(Path("results.json").read_text())
    assert [result["model"] for result in results] == ["vae", "srnn"]
    for result in results:
        first, second = result["fdsd"]["values"]
        assert min(first, second) > 0
        assert result["fdsd"]["mean"] == pytest.approx(np.mean([first, second]))
        expected_deviation = abs(first - second) / np.sqrt(2)
        assert result["fdsd"]["standard_deviation"] == pytest.approx(expected_deviation)
        assert result["clips"] == 4
        assert set(result["real"]) == {"test (exact phase)", "test (Griffin-Lim)"}
        for row in (result, *result["real"].values()):
            first, second = row["fdsd"]["values"]
            assert first != second  # Each repeat has new clips.
        assert set(result["clips_per_second"]) == {"sampling", "Griffin-Lim", "features"}
        errors = result["recogniser"]["errors"]
        assert errors["length"] == 2 * 4  # `ab` in each of the four test files
        edits = errors["substitutions"] + errors["deletions"] + errors["insertions"]
        assert result["recogniser"]["error_rate"] == edits / 8
        folder = results_of(runs / result["model"], "generation")
        assert json.loads((folder / "results.json").read_text()) == result
        for label in ("sample", "test", "test-Griffin-Lim"):
            for number in range(generation.EXAMPLES):
                samples, rate = soundfile.read(folder / f"clip-{number}-{label}.wav")
                assert samples.shape == (CLIP_SAMPLES,) and rate == 16_000
                assert np.abs(samples).max() > 0.99
        assert (folder / "contact-sheet.png").stat().st_size > 10_000
    error_rate = 100 * results[0]["recogniser"]["error_rate"]
    assert str(runs / "recogniser") in printed
    assert str(runs / "speech") in printed
    assert "4 clips of 1.6 s" in printed
    assert f"error rate in characters: {error_rate:.1f} %, on 4 test utterances" in printed
    assert "take more than --clips 6" in printed
    # Published numbers are shown for the paper's corpus only.
    assert "paper)" not in printed.replace("in the paper)", "")

    monkeypatch.setitem(generation.BATCH, "cpu", 3)
    monkeypatch.setattr(generation, "EXAMPLES", 1)
    assert call(evaluate_script, *arguments) == 0
    results_with_other_batches = json.loads(Path("results.json").read_text())
    for result, other in zip(results, results_with_other_batches, strict=True):
        assert result["fdsd"]["values"] == pytest.approx(other["fdsd"]["values"], rel=0.02)
        assert result["recogniser"] == other["recogniser"]


def test_another_split_and_a_recogniser_whose_corpus_is_gone(runs, capsys):
    """Fails if rows and files have the name of another split, or if the distance needs the speech
    that the recogniser was trained on."""
    arguments = [runs / "vae", "--task", "generation", "--split", "dev", "--json", "results.json"]
    arguments += ["--recogniser", runs / "elsewhere", "--clips", 7, "--repeats", 1]
    assert call(evaluate_script, *arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "error rate in characters: unknown (gone: no such file or folder" in printed
    assert "take more than --clips" not in printed
    (result,) = json.loads(Path("results.json").read_text())
    assert set(result["real"]) == {"dev (exact phase)", "dev (Griffin-Lim)"}
    assert result["fdsd"]["mean"] > 0
    assert result["recogniser"]["error_rate"] is None
    (folder,) = (runs / "vae" / "eval" / "generation").glob("*-dev-*")
    labels = {file.stem.split("-", 2)[2] for file in folder.glob("clip-*.wav")}
    assert labels == {"sample", "dev", "dev-Griffin-Lim"}


def test_study(runs, monkeypatch, capsys):
    """Device and seed must reach the trainings and the evaluations, --w the evaluation of
    generation alone. A wrong recogniser must be an error before the first training."""
    flags_of_calls = []

    def train_all(variants, folder, flags):
        flags_of_calls.append(flags)
        return {"SRNN-SS": runs / "srnn"}

    def evaluate_all(runs, flags):
        flags_of_calls.append(flags)
        if "generation" in flags:
            sys.exit(0)
        return {}

    monkeypatch.setattr(study, "train_all", train_all)
    monkeypatch.setattr(study, "evaluate_all", evaluate_all)
    arguments = ["--recogniser", runs / "recogniser", "--recipe", "quick"]
    arguments += ["--seed", "3", "--device", "cpu", "--w", "posterior"]
    assert call(study, *arguments) == 0
    has_w = [{"--w", "posterior"} <= set(flags) for flags in flags_of_calls]
    assert has_w == [False, False, False, True]
    for flags in flags_of_calls:
        assert {("--seed", "3"), ("--device", "cpu")} <= set(itertools.pairwise(flags))
    assert ["--recipe" in flags for flags in flags_of_calls] == [True, False, False, False]
    assert call(study, "--recogniser", runs / "vae") == 2 and len(flags_of_calls) == 4
    assert "expected a run of deepspeech2" in capsys.readouterr().err


def test_without_recogniser(runs, capsys):
    assert call(evaluate_script, runs / "vae", "--task", "generation") == 0
    printed = capsys.readouterr().out
    assert "--recogniser RUN" in printed and "FDSD" not in printed
    (folder,) = (runs / "vae" / "eval" / "generation").glob("*-test")
    assert (folder / "contact-sheet.png").exists()
    assert len(list(folder.glob("clip-*-sample.wav"))) == generation.EXAMPLES


def test_samples_with_a_fitted_w(runs):
    """--w posterior must change the clips of a model with a sequence latent and leave those of
    another model as they were."""
    clips = {}
    for w, flags, pattern in (
        ("prior", [], "*-test"),
        ("posterior", ["--w", "posterior"], "*-test-w=posterior"),
    ):
        arguments = [runs / "vae", runs / "dsae", "--task", "generation", *flags]
        assert call(evaluate_script, *arguments) == 0
        for name in ("vae", "dsae"):
            (folder,) = (runs / name / "eval" / "generation").glob(pattern)
            result = json.loads((folder / "results.json").read_text())
            assert result.get("w") == (None if name == "vae" else w)
            clips[name, w], _ = soundfile.read(folder / "clip-0-sample.wav")
    assert np.array_equal(clips["vae", "prior"], clips["vae", "posterior"])
    assert not np.allclose(clips["dsae", "prior"], clips["dsae", "posterior"])


def test_published_rows_only_where_given():
    distance = {"mean": 1.0, "standard_deviation": 0.5}
    rows = {"runs/a": {"fdsd": distance, "clips_per_second": {"sampling": 1234.5}}}
    assert "70.92 ± 0.44" in render_table(generation.table(rows, [("VAE", "70.92 ± 0.44")]))
    lines = render_table(generation.table(rows)).splitlines()
    assert len(lines) == 2 and lines[-1].split() == ["runs/a", "1.00", "±", "0.50", "1,234"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vae --recogniser vae", "is a vae; expected a run of deepspeech2"),
        ("vae --recogniser nothing", "no such run folder"),
        ("vae --recogniser recogniser --clips 1", "--clips 1: expected at least 2"),
        ("vae --recogniser recogniser --repeats 0", "--repeats 0: expected at least 1"),
        ("vae --clips 100", "needs --recogniser"),
        ("vae --w posterior", "w=posterior: is for models with a sequence latent, not vae"),
        ("vae --w posterior --task resynthesis", "--w: is for --task generation"),
        ("vae --recogniser recogniser --split train", "--split train: the clips of the reference"),
        (
            "vae --recogniser deaf --clips 2 --repeats 1",
            "deaf: the recogniser's features are not",
        ),
        ("vae --task resynthesis --repeats 2", "--repeats: is for --task generation"),
        ("recogniser", "deepspeech2"),
        ("broken", "not finite"),
        ("broken-w --w posterior", "broken-w: the posterior of w is not finite"),
        ("vae --data short", "no utterance is as long as one sequence of 1.60 s"),
    ],
)
def test_bad_input(runs, monkeypatch, capsys, arguments, message):
    """Fails if bad input is accepted, or its error is a traceback or does not help."""
    monkeypatch.chdir(runs)
    arguments = arguments.split()
    if "short" in arguments:
        for split in ("train", "dev", "test"):
            path = runs / "short" / split / "anna" / "a.wav"
            path.parent.mkdir(parents=True)
            soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    if "--task" not in arguments:
        arguments += ["--task", "generation"]
    assert call(evaluate_script, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
