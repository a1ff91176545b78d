"""Generation from the prior, and its distance to real speech."""

import json
import shutil
import sys
import weakref
from dataclasses import asdict, replace

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
SMALL = {
    "vae": {"hidden": (8,)},
    "dkf": {"rnn": 8, "x_hidden": (8,)},
    "storn": {"h_rnn": 8, "g_rnn": 8},
    "vrnn": {"rnn": 8},
    "srnn": {"h_rnn": 8, "g_rnn": 8},
    "rvae": {"h_rnn": 8, "gx_rnn": 8, "gz_rnn": 8, "bidirectional": True},
    "dsae": {"v_rnn": 8, "xv_rnn": 8},
    "hit_dvae": {
        "width": 16,
        "feedforward": 16,
        "layers": 1,
        "w_hidden": 8,
        "w_embedding": 8,
        "w_layers": 1,
    },
    "light_dvae_local": {
        "width": 16,
        "context": 5,
        "heads": 2,
        "feedforward": 16,
        "layers": 1,
        "w_hidden": 8,
        "w_embedding": 8,
        "w_layers": 1,
    },
    "light_dvae": {
        "width": 16,
        "feedforward": 16,
        "layers": 1,
        "w_hidden": 8,
        "w_embedding": 8,
        "w_layers": 1,
    },
}


def small(name):
    torch.manual_seed(0)
    model = build_model(name, input_scale="root", **SMALL[name]).eval()
    return Run(name, name, model, COARSE, {}, "speech", None, None)


def gaussian(mean, covariance) -> np.ndarray:
    """Features with this mean and this covariance: for each column of its root two that deviate by it."""
    values, vectors = np.linalg.eigh(covariance)
    deviations = np.sqrt((len(mean) - 0.5) * values.clip(min=0))[:, None] * vectors.T
    return np.asarray(mean) + np.concatenate([deviations, -deviations])


def covariance(width, seed):
    factor = np.random.default_rng(seed).normal(size=(width, width + 2))
    return factor @ factor.T


# ---- Fréchet distance ----------------------------------------------------------------------------------------


def test_diagonal_gaussians():
    """|μa − μb|² + Σ (σa − σb)², known in closed form."""
    a, b = (
        gaussian([1, 2, 3], np.diag([4.0, 9.0, 0.0])),
        gaussian([0, 4, 3], np.diag([1.0, 25.0, 16.0])),
    )
    assert frechet_distance(a, b) == pytest.approx(
        1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2 + (0 - 4) ** 2, rel=1e-12
    )


def test_full_covariances():
    """Fails where the matrix square root is wrong: in two dimensions tr (AB)^½ = √(tr AB + 2 √det AB), in more it is
    what scipy's own root of the product gives."""
    a, b = covariance(2, 0), covariance(2, 1)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(
        expected, rel=1e-10
    )
    a, b = covariance(30, 2), covariance(30, 3)
    expected = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    zeros = np.zeros(30)
    assert frechet_distance(gaussian(zeros, a), gaussian(zeros, b)) == pytest.approx(
        expected, rel=1e-8
    )


@pytest.mark.parametrize("count", (500, 20))
def test_distance_of_a_set_to_itself(count):
    """Zero, in any order, also with fewer clips than features, and it grows by the square of a shift of the mean."""
    features = np.random.default_rng(0).normal(size=(count, 40)) @ covariance(40, 1) + 100
    a, b = features, features[::-1]
    scale = np.trace(np.cov(features, rowvar=False))
    assert abs(frechet_distance(a, a)) < 1e-12 * scale
    assert abs(frechet_distance(a, b)) < 1e-9 * scale
    assert frechet_distance(a, features + 3) == pytest.approx(40 * 9, abs=1e-9 * scale)


def test_distance_grows_with_noise(speech):
    """Speech against itself in white noise: the distance must rise as the signal-to-noise ratio falls."""
    torch.manual_seed(0)
    network = build_model("deepspeech2", channels=(4,), width=12, layers=1).eval()
    train = load_corpus(speech).split("train")
    clips = recorded_source(train, 24, (0,), torch.device("cpu")).make_clips(range(24))
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    noise *= clips.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)

    def features(waveforms):
        with torch.no_grad():
            return network.features(log_magnitude(scale_to_peak(waveforms))).numpy()

    clean, snrs = features(clips), (40, 30, 20, 10, 0)
    distances = [
        frechet_distance(clean, features(clips + 10 ** (-snr / 20) * noise)) for snr in snrs
    ]
    assert distances[0] > 0 and (np.diff(distances) > 0).all()


# ---- Clips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_samples_do_not_depend_on_the_batch(name):
    """A clip must be the same whatever it is drawn with, and another one under another number, draw or seed."""
    run = small(name)

    def draw(numbers, seed=0, number=0):
        generators = generation.clip_generators("latents", seed, number, numbers)
        return generation.sample_power(run, generators)

    together = draw(range(5))
    assert together.shape == (5, COARSE.frames(CLIP_SAMPLES), COARSE.bins)
    torch.testing.assert_close(
        torch.cat([draw(range(2)), draw(range(2, 5))]), together, rtol=1e-3, atol=0
    )
    others = [together[1:2], draw(range(1), seed=1), draw(range(1), number=1)]
    assert all((other - together[:1]).abs().max() > 1e-3 * together[:1].max() for other in others)


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae", "light_dvae_local", "dsae"])
def test_w_of_the_posteriors(name):
    """Fitted, w must have the mean and covariance of all draws of q(w | x), and the samples must be made with it."""
    model, draws = small(name).model, torch.Generator().manual_seed(0)
    sampled = model.sample(2, 3, torch.Generator().manual_seed(1))
    power = torch.rand(70, 4, COARSE.bins, generator=draws) * torch.rand(70, 1, 1, generator=draws)
    model.fit_w(power)
    with torch.no_grad():
        q_w = model(power).q_w
        expected = torch.cat(
            [q_w.sample(torch.randn(q_w.mean.shape, generator=draws)) for _ in range(500)]
        ).T
    found = model.draw_w(torch.randn(35_000, model.config.w_latent, generator=draws)).T
    torch.testing.assert_close(found.mean(1), expected.mean(1), atol=0.03, rtol=0)
    torch.testing.assert_close(found.cov(), expected.cov(), atol=0.05, rtol=0)
    assert (
        found.mean(1).abs() + (found.cov() - torch.eye(len(found))).abs().amax(1)
    ).max() > 0.1  # not the prior
    assert not torch.equal(model.sample(2, 3, torch.Generator().manual_seed(1)), sampled)
    model.w_moments = torch.cat([torch.zeros(1, len(found)), torch.eye(len(found))])
    torch.testing.assert_close(model.sample(2, 3, torch.Generator().manual_seed(1)), sampled)


def test_phases():
    """Of one power, waveforms must differ between clips, and be the same whatever else is in the batch."""
    power = torch.rand(
        COARSE.frames(CLIP_SAMPLES), COARSE.bins, generator=torch.Generator().manual_seed(0)
    )
    power = power.expand(3, -1, -1)
    phases = lambda numbers: generation.clip_generators("phases", 0, 0, numbers)  # noqa: E731
    together = griffin_lim(power, COARSE, 5, length=CLIP_SAMPLES, generator=phases(range(3)))
    assert (together[:2] - together[2]).std(1).min() > 0.5 * together.std()
    alone = griffin_lim(power[2:], COARSE, 5, length=CLIP_SAMPLES, generator=phases(range(2, 3)))
    torch.testing.assert_close(alone, together[2:], rtol=1e-3, atol=1e-5)


def test_latents_and_phases_are_drawn_apart():
    draws = [
        one
        for what in ("latents", "phases")
        for one in generation.clip_generators(what, 0, 0, range(9))
    ]
    assert len({one.initial_seed() for one in draws}) == 18


def test_a_generator_for_each():
    """Too few or too many must not be repeated or left out."""
    for name in ("vae", "light_dvae"):
        with pytest.raises(ValueError, match="2 generators for 3 sequences"):
            small(name).model.sample(3, 4, generation.clip_generators("latents", 0, 0, range(2)))
    with pytest.raises(ValueError, match="3 generators for 2 spectra"):
        griffin_lim(
            torch.ones(2, 4, COARSE.bins),
            COARSE,
            generator=generation.clip_generators("phases", 0, 0, range(3)),
        )


@pytest.mark.parametrize("name", ("noise", "vae"))
def test_memory_does_not_grow_with_the_clips(name):
    """Fails where clips of earlier batches are kept."""
    watch, kept = Stopwatch(torch.device("cpu")), []

    def noise(numbers):
        return torch.rand(len(numbers), 100)

    made = (
        noise if name == "noise" else generation.model_source(small(name), 0, 0, watch).make_clips
    )

    def alive() -> int:
        return sum(one() is not None for one in kept)

    def make_clips(numbers):
        clips = made(numbers)
        kept.append(weakref.ref(clips))
        return clips

    def features(clips):
        assert alive() == 0  # the clips of all batches before, this one's before they were scaled
        kept.append(weakref.ref(clips))
        return clips[:, :3].numpy().copy()

    count = 40 if name == "noise" else 6
    found = extract_features(
        ClipSource("", make_clips, watch), count, features, 2, tqdm(disable=True)
    )
    assert found.shape == (count, 3) and len(kept) == count


def test_windows_share_a_scale(monkeypatch):
    """The same noise seen through two windows must have the same colour in a contact sheet: its power grows with the
    window, by a factor of 4 here."""
    drawn = []

    def savefig(figure, file, **options):
        drawn.extend(figure.axes)

    monkeypatch.setattr(Figure, "savefig", savefig)
    noise = torch.randn(2, CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    stfts = (STFT(512, 256), STFT(2048, 1024))
    rows = [("", stft.analyse(noise).abs().square().numpy(), stft) for stft in stfts]
    figures.contact_sheet(rows)
    images = [axis.images[0] for axis in drawn[:4]]
    levels = [
        10 * np.log10((10 ** (image.get_array()[1:-1, 1:-1] / 10)).mean()) for image in images
    ]
    assert np.abs(np.array(levels) - levels[0]).max() < 0.3
    assert len({image.get_clim() for image in images}) == 1


def test_real_clips_are_of_their_splits(speech):
    """The reference must come out of the training split, the test rows out of the split under test, at one level."""
    corpus, heard = load_corpus(speech), []

    def features(clips):
        heard.append(clips.clone())
        return clips[:, :4].numpy()

    run = replace(small("vae"), corpus=corpus, test=corpus.split("test"))
    rows = generation.measure([run], features, clips=3, repeats=2, seed=0)
    assert list(rows) == ["vae", "test (exact phase)", "test (Griffin-Lim)"]
    reference, made, exact, phaseless = heard[:4]
    assert not any(
        torch.equal(one, other) for one, other in zip(heard[:4], heard[4:], strict=True)
    )  # drawn anew
    for clips in heard:
        assert clips.shape == (3, CLIP_SAMPLES)
        np.testing.assert_allclose(clips.abs().amax(1), 1, rtol=1e-6)
    assert found_in(reference, corpus.split("train")) and not found_in(
        reference, corpus.split("test")
    )
    assert found_in(exact, corpus.split("test")) and not found_in(exact, corpus.split("train"))
    assert not found_in(phaseless, corpus.split("test")) and not found_in(
        made, corpus.split("train")
    )
    text = generation.describe_clips(run, 8, 1, features=4)
    assert "train holds 9 side by side; test holds 7 side by side, so clips overlap" in text
    last = corpus.utterances[-1]
    cropped = replace(
        corpus.split("test"), utterances=(last, last._replace(trim=(0, CLIP_SAMPLES - 1)))
    )
    text = generation.describe_clips(replace(run, test=cropped), 2, 1, features=4)
    assert "(1 of 2 utterances are too short)" in text
    values = rows["test (exact phase)"]["fdsd"]["values"]
    assert values[0] == frechet_distance(exact[:, :4].numpy(), reference[:, :4].numpy())


def found_in(clips, corpus) -> bool:
    """Whether every clip is, but for its level, a piece of one of the utterances."""
    waveforms = [corpus.waveform(i).astype(float) for i in range(len(corpus))]
    for clip in clips.double().numpy():
        best = 0.0
        for waveform in waveforms:
            products = scipy.signal.correlate(waveform, clip, "valid", method="fft")
            energies = scipy.signal.correlate(
                waveform**2, np.ones(CLIP_SAMPLES), "valid", method="fft"
            )
            best = max(
                best, float((products / np.sqrt(energies.clip(min=1e-9) * (clip @ clip))).max())
            )
        if best < 0.9999:
            return False
    return True


# ---- Through the script ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(speech, tmp_path_factory):
    """Runs of untrained models, vae, srnn, dsae and a recogniser, on speech that says `ab` in every file."""
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
    models["recogniser"] = models["elsewhere"] = build_model("deepspeech2", **recogniser)
    models["deaf"] = build_model("deepspeech2", **recogniser)
    models["deaf"].convolutions[0].convolution.weight.data.fill_(float("nan"))
    kinds = dict.fromkeys(("recogniser", "elsewhere", "deaf"), "deepspeech2") | {
        "broken": "vae",
        "broken-w": "dsae",
    }
    for title, model in models.items():
        name = kinds.get(title, title)
        settings = {"features": "fbank", "targets": "characters"} if name == "deepspeech2" else {}
        recipe = replace(resolve(name, "quick", settings)[0], models={})
        data = "gone" if title in ("elsewhere", "deaf") else str(folder / "speech")
        plan = asdict(Plan(name, "quick", data, 0, "fp32", recipe=asdict(recipe)))
        (folder / title).mkdir()
        checkpoint.save(
            folder / title / "best.pt", name, model, COARSE, plan=plan, progress={"step": 1}
        )
    return folder


def test_table_and_files(runs, monkeypatch, capsys):
    """Fails where the table lacks a row, a number is of other clips than it says, or the output does not say which
    network it was measured with and how well that recognises."""
    arguments = (evaluate_script, runs / "vae", runs / "srnn", "--task", "generation")
    arguments += (
        "--recogniser",
        runs / "recogniser",
        "--clips",
        4,
        "--repeats",
        2,
        "--json",
        "results.json",
    )
    assert call(*arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    results = json.loads(open("results.json").read())
    assert [result["model"] for result in results] == ["vae", "srnn"]
    for result in results:
        values = result["fdsd"]["values"]
        assert len(values) == 2 and min(values) > 0
        assert result["fdsd"]["mean"] == pytest.approx(np.mean(values))
        assert result["fdsd"]["standard_deviation"] == pytest.approx(
            abs(values[0] - values[1]) / np.sqrt(2)
        )
        assert result["clips"] == 4 and set(result["real"]) == {
            "test (exact phase)",
            "test (Griffin-Lim)",
        }
        for row in (result, *result["real"].values()):
            values = row["fdsd"]["values"]
            assert values[0] != values[1]  # clips are drawn anew
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
    rate = f"error rate in characters: {100 * results[0]['recogniser']['error_rate']:.1f} %, on 4 test utterances"
    for text in (
        str(runs / "recogniser"),
        str(runs / "speech"),
        "4 clips of 1.6 s",
        rate,
        "take more than --clips 6",
    ):
        assert text in printed
    assert "paper)" not in printed.replace(
        "in the paper)", ""
    )  # published numbers only beside the paper's corpus

    monkeypatch.setitem(generation.BATCH, "cpu", 3)
    monkeypatch.setattr(generation, "EXAMPLES", 1)
    assert call(*arguments) == 0
    for one, other in zip(results, json.loads(open("results.json").read()), strict=True):
        assert one["fdsd"]["values"] == pytest.approx(other["fdsd"]["values"], rel=0.02)
        assert one["recogniser"] == other["recogniser"]


def test_another_split_and_a_recogniser_whose_corpus_is_gone(runs, capsys):
    """Fails where rows and files have the name of a split that they are not of, or where the distance needs the speech
    that the recogniser was trained on."""
    arguments = (
        "--task",
        "generation",
        "--recogniser",
        runs / "elsewhere",
        "--clips",
        7,
        "--repeats",
        1,
    )
    assert (
        call(evaluate_script, runs / "vae", *arguments, "--split", "dev", "--json", "results.json")
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "error rate in characters: unknown (gone: no such file or folder" in printed
    assert "take more than --clips" not in printed
    (result,) = json.loads(open("results.json").read())
    assert (
        set(result["real"]) == {"dev (exact phase)", "dev (Griffin-Lim)"}
        and result["fdsd"]["mean"] > 0
    )
    assert result["recogniser"]["error_rate"] is None
    (folder,) = (runs / "vae" / "eval" / "generation").glob("*-dev-*")
    labels = {file.stem.split("-", 2)[2] for file in folder.glob("clip-*.wav")}
    assert labels == {"sample", "dev", "dev-Griffin-Lim"}


def test_study(runs, monkeypatch, capsys):
    """The device and the seed must reach trainings and evaluation, and a wrong recogniser must stop it before both."""
    called = []
    monkeypatch.setattr(
        study,
        "train_all",
        lambda variants, folder, common: called.append(common) or {"SRNN-SS": runs / "srnn"},
    )
    stop = lambda flags: sys.exit(0) if "generation" in flags else {}  # noqa: E731
    monkeypatch.setattr(
        study, "evaluate_all", lambda runs, flags: called.append(flags) or stop(flags)
    )
    flags = ("--seed", "3", "--device", "cpu")
    only_evaluated = ("--w", "posterior")
    assert (
        call(
            study, "--recogniser", runs / "recogniser", "--recipe", "quick", *flags, *only_evaluated
        )
        == 0
    )
    assert [set(only_evaluated) <= set(passed) for passed in called] == [False, False, False, True]
    for passed in called:
        assert {("--seed", "3"), ("--device", "cpu")} <= set(zip(passed, passed[1:], strict=False))
    assert ["--recipe" in passed for passed in called] == [True, False, False, False]
    assert call(study, "--recogniser", runs / "vae") == 2 and len(called) == 4
    assert "expected a run of deepspeech2" in capsys.readouterr().err


def test_without_recogniser(runs, capsys):
    assert call(evaluate_script, runs / "vae", "--task", "generation") == 0
    printed = capsys.readouterr().out
    assert "--recogniser RUN" in printed and "FDSD" not in printed
    (folder,) = (runs / "vae" / "eval" / "generation").glob("*-test")
    assert (folder / "contact-sheet.png").exists()
    assert len(list(folder.glob("clip-*-sample.wav"))) == generation.EXAMPLES


def test_samples_with_a_fitted_w(runs):
    """The flag must change the clips of a model with a sequence latent and leave those of another as they were."""
    made = {}
    for flags in ((), ("--w", "posterior")):
        assert (
            call(evaluate_script, runs / "vae", runs / "dsae", "--task", "generation", *flags) == 0
        )
        for name in ("vae", "dsae"):
            pattern = "*-test-w=posterior" if flags else "*-test"
            (folder,) = (runs / name / "eval" / "generation").glob(pattern)
            about = json.loads((folder / "results.json").read_text())
            assert about.get("w") == (None if name == "vae" else "posterior" if flags else "prior")
            made[name, flags] = soundfile.read(folder / "clip-0-sample.wav")[0]
    (vae, dsae), (vae_fitted, dsae_fitted) = (
        [made[name, flags] for name in ("vae", "dsae")] for flags in ((), flags)
    )
    assert np.array_equal(vae, vae_fitted) and not np.allclose(dsae, dsae_fitted)


def test_published_rows_only_where_given():
    rows = {
        "runs/a": {
            "fdsd": {"mean": 1.0, "standard_deviation": 0.5},
            "clips_per_second": {"sampling": 1234.5},
        }
    }
    assert "70.92 ± 0.44" in render_table(generation.table(rows, [("VAE", "70.92 ± 0.44")]))
    lines = render_table(generation.table(rows)).splitlines()
    assert len(lines) == 2 and lines[-1].split() == ["runs/a", "1.00", "±", "0.50", "1,234"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vae", "--recogniser", "vae"), "is a vae; expected a run of deepspeech2"),
        (("vae", "--recogniser", "nothing"), "no such run folder"),
        (("vae", "--recogniser", "recogniser", "--clips", "1"), "--clips 1: expected at least 2"),
        (
            ("vae", "--recogniser", "recogniser", "--repeats", "0"),
            "--repeats 0: expected at least 1",
        ),
        (("vae", "--clips", "100"), "needs --recogniser"),
        (
            ("vae", "--w", "posterior"),
            "w=posterior: is for models with a sequence latent, not vae",
        ),
        (("vae", "--w", "posterior", "--task", "resynthesis"), "--w: is for --task generation"),
        (
            ("vae", "--recogniser", "recogniser", "--split", "train"),
            "--split train: the clips of the reference",
        ),
        (
            ("vae", "--recogniser", "deaf", "--clips", "2", "--repeats", "1"),
            "deaf: the recogniser's features are not",
        ),
        (("vae", "--task", "resynthesis", "--repeats", "2"), "--repeats: is for --task generation"),
        (("recogniser",), "deepspeech2"),
        (("broken",), "not finite"),
        (("broken-w", "--w", "posterior"), "broken-w: the posterior of w is not finite"),
        (("vae", "--data", "short"), "no utterance is as long as one sequence of 1.60 s"),
    ],
)
def test_bad_input(runs, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(runs)
    if "short" in arguments:
        for split in ("train", "dev", "test"):
            path = runs / "short" / split / "anna" / "a.wav"
            path.parent.mkdir(parents=True)
            soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    task = () if "--task" in arguments else ("--task", "generation")
    assert call(evaluate_script, *arguments, *task) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
