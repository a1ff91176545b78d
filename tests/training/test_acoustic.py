"""The acoustic model, and the utterances, labels and features that recognisers are trained on."""

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from run_scripts import call, evaluate_script, log, surroundings, train_script  # noqa: F401

from minidvae.data import audio
from minidvae.data.corpus import CorpusError, load_corpus
from minidvae.models import build_model
from minidvae.models.recognisers import FrameBatch
from minidvae.training import checkpoint, features
from minidvae.training.checkpoint import Plan, Progress
from minidvae.training.config import SettingError
from minidvae.training.features import utterance_features
from minidvae.training.run import resolve
from minidvae.training.utterance_batches import Utterances, frame_labels, in_domain, transcript

CPU = torch.device("cpu")
TONES = {"aa": 400, "iy": 2300, "s": 5000}  # phone: Hz
SPEAKERS = {"f1": ("F", "clean"), "m1": ("M", "clean"), "m2": ("M", "noisy"), "f2": ("F", "both")}


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """A manifest of utterances of 0.3 to 0.8 s whose phones are tones and whose characters are their first letters."""
    folder, random = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    rows = ["path\tspeaker\tsplit\ttext\tphones\tsex\tcondition"]
    for k in range(14):
        phones = [str(p) for p in random.choice(list(TONES), size=random.integers(2, 6))]
        ends = np.cumsum(random.integers(2000, 3000, len(phones)))
        hertz = np.repeat([TONES[p] for p in phones], np.diff(ends, prepend=0))
        waveform = 0.5 * np.sin(2 * np.pi * np.cumsum(hertz) / 16_000) + random.normal(
            0, 0.01, len(hertz)
        )
        soundfile.write(folder / f"u{k}.wav", waveform, 16_000)
        spans = zip([0, *ends], ends, phones, strict=False)
        (folder / f"u{k}.phn").write_text("".join(f"{a} {b} {p}\n" for a, b, p in spans))
        speaker = list(SPEAKERS)[k % 4]
        sex, condition = SPEAKERS[speaker]
        split, text = ("train", "dev")[k >= 9], "".join(p[0].upper() for p in phones)
        rows.append(f"u{k}.wav\t{speaker}\t{split}\t{text}\tu{k}.phn\t{sex}\t{condition}")
    manifest = folder / "tones.tsv"
    manifest.write_text("\n".join(rows))
    return manifest


@pytest.fixture
def corpus(tones):
    return load_corpus(tones, progress=False)


def recipe(model="acoustic", **changes):
    return replace(resolve(model, "quick", {})[0], batch=3, frames=7, **changes)


def small(corpus, settings, dtype=torch.float64, **config):
    """A source of batches and a model that fits it"""
    torch.manual_seed(0)
    criterion = "frames" if settings.targets == "frames" else "ctc"
    sizes = {
        "width": 8,
        "projection": 3,
        "layers": 2,
        "delay": settings.delay,
        "criterion": criterion,
    }
    model, source = (
        build_model("acoustic", **(sizes | config)),
        Utterances(corpus.split("train"), settings, 0, CPU),
    )
    source.prepare(model, fresh=True)
    return source, model.to(dtype)


# ------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("delay", [0, 2])
def test_layers_with_projection_step_by_step(projection, delay):
    """Sak et al. 2014, equations 7 to 12 without peepholes, against the layers of PyTorch that the model is made of;
    the output of frame t is the one `delay` frames after it, the last frame being repeated."""
    torch.manual_seed(0)
    sizes = {"width": 5, "projection": projection, "layers": 2, "delay": delay}
    model = build_model("acoustic", bins=4, symbols=("a", "b"), **sizes).double()
    model.standardise.set(torch.randn(4), torch.rand(4) + 0.5)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    steps = [
        (frame - model.standardise.mean) / model.standardise.deviation for frame in x.unbind(1)
    ]
    steps += steps[-1:] * delay
    for layer in range(2):
        w_ih, w_hh, b_ih, b_hh, *w_hr = (
            getattr(model.lstm, name) for name in model.lstm._all_weights[layer]
        )
        h, c = (
            torch.zeros(2, projection or 5, dtype=torch.float64),
            torch.zeros(2, 5, dtype=torch.float64),
        )
        for t, inputs in enumerate(steps):
            i, f, g, o = (inputs @ w_ih.t() + h @ w_hh.t() + b_ih + b_hh).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            h = h @ w_hr[0].t() if w_hr else h
            steps[t] = h
    expected = torch.stack([model.output(h) for h in steps[delay:]], dim=1)
    logits, lengths = model.logits(x, torch.tensor([6, 6]))
    torch.testing.assert_close(logits, expected)
    assert lengths.tolist() == [6, 6]


@pytest.mark.parametrize("targets", ["frames", "phones"])
def test_padding_leaks_nothing(corpus, targets):
    """The outputs for an utterance are the same alone and beside a longer one, whatever stands after its end."""
    _, model = small(corpus, recipe(targets=targets))
    x, lengths = torch.randn(2, 9, 80, dtype=torch.float64), torch.tensor([5, 9])
    alone, _ = model.logits(x[:1, :5], lengths[:1])
    x[0, 5:] = float("inf")
    together, _ = model.logits(x, lengths)
    torch.testing.assert_close(together[:1, :5], alone)


def test_carried_state_makes_pieces_one_utterance(corpus):
    """Over one pass of all lanes, the loss of the pieces is that of the whole utterances, frame by frame; a state that
    is not carried, or is carried into the next utterance, makes another one. So is that of a development set."""
    source, model = small(corpus, recipe())
    total, frames = 0.0, 0
    for step in range(int(source.lane_steps.sum())):
        batch = source(step)
        loss, _ = model.loss(batch._replace(x=batch.x.double()))
        loss.backward()  # an error where the graph of the step before is still there
        labelled = int((batch.labels >= 0).sum())
        total, frames = total + loss.item() * labelled, frames + labelled
    expected = Counter()
    for i, utterance in enumerate(source.corpus.utterances):
        x = source.features[i][None].double()
        logits, _ = model.logits(x, torch.tensor([x.shape[1]]))
        labels = torch.tensor([model.config.symbols.index(p) for p in frame_labels(utterance)])
        expected["loss"] += (
            3 * torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum").item()
        )
        expected["frames"] += 3 * len(labels)
    assert frames == expected["frames"]
    assert total == pytest.approx(expected["loss"], rel=1e-6)

    model.eval()
    held_out, frames = 0.0, 0
    for batch, size in source.development(model):
        loss = model.loss(batch._replace(x=batch.x.double()))[0]
        held_out, frames = held_out + size * loss.item(), frames + size
    assert 3 * frames == expected["frames"]
    assert 3 * held_out == pytest.approx(expected["loss"], rel=1e-6)


def test_evaluation_between_two_steps_changes_nothing(corpus):
    source, model = small(corpus, recipe(), torch.float32)
    losses = []
    held_out = Utterances(corpus.split("dev"), recipe(), 0, CPU)
    for between in (False, True):
        model.carry(3)
        for step in range(4):
            loss, _ = model.train().loss(source(step))
            if between:
                for batch, _ in held_out.development(model):
                    model.eval().loss(batch)
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_errors_are_the_share_of_wrong_frames():
    torch.manual_seed(0)
    model = build_model(
        "acoustic", bins=4, symbols=("a", "b", "c"), width=5, projection=0, layers=1, delay=0
    ).eval()
    x = torch.randn(2, 6, 4)
    best = model.logits(x, torch.tensor([6, 6]))[0].argmax(-1)
    labels = best.clone()
    labels[0, :3] = (labels[0, :3] + 1) % 3
    labels[1, 4:] = -1
    _, terms = model.loss(FrameBatch(x, labels, torch.ones(2, dtype=torch.bool)))
    assert terms["errors"].item() == pytest.approx(3 / 10)


# -------------------------------------------------------------------------------------------------- the data path


def test_labels_are_the_phones_at_the_centres_of_frames(corpus):
    """Frame t of `audio.FEATURE_STFT` is centred on sample 160 t."""
    for utterance in corpus.utterances:
        expected = []
        for centre in range(0, utterance.length + 160, 160):
            inside = [p for start, stop, p in utterance.phones if start <= centre < stop]
            expected.append(inside[0] if inside else utterance.phones[-1][2])
        assert frame_labels(utterance) == expected[: audio.FEATURE_STFT.frames(utterance.length)]
        whole = torch.zeros(utterance.length)
        assert len(frame_labels(utterance)) == len(audio.fbank(whole))


def test_tones_stand_at_their_labels(corpus):
    """The loudest bin of a frame is that of its label's tone: features and labels are not shifted by a frame."""
    utterances = corpus.split("train")
    right, frames = 0, 0
    radians = torch.arange(4000) * 2 * math.pi / 16_000
    bins = {
        phone: audio.fbank(torch.sin(hertz * radians))[10].argmax()
        for phone, hertz in TONES.items()
    }
    for i, utterance in enumerate(utterances.utterances):
        x = audio.fbank(torch.from_numpy(utterances.waveform(i, trim=False)))
        loudest = torch.stack([x[:, b] for b in bins.values()]).argmax(0)
        labels = torch.tensor([list(TONES).index(p) for p in frame_labels(utterance)])
        right, frames = right + int((loudest == labels).sum()), frames + len(labels)
    assert right >= 0.99 * frames


def test_every_lane_reads_every_utterance_once(corpus):
    """In one pass, from the first to the last frame, its labels `delay` frames behind; no two lanes alike."""
    source, model = small(corpus, recipe(delay=2))
    steps, number = int(source.lane_steps.sum()), model.config.symbols.index
    read = [[] for _ in range(3)]
    for step in range(steps):
        batch = source(step)
        for lane in range(3):
            if batch.first[lane]:
                read[lane].append(([], []))
            read[lane][-1][0].append(batch.x[lane])
            read[lane][-1][1].append(batch.labels[lane])
    orders = []
    for lane in range(3):
        order = []
        for x, labels in read[lane]:
            x, labels = torch.cat(x), torch.cat(labels)
            found = [
                i for i in range(9) if torch.equal(source.features[i], x[: len(source.features[i])])
            ]
            utterance = source.corpus.utterances[found[0]]
            expected = [-1, -1] + [number(p) for p in frame_labels(utterance)]
            assert labels.tolist() == expected + [-1] * (len(labels) - len(expected))
            assert torch.equal(x[-1], source.features[found[0]][-1])
            order += found
        assert sorted(order) == list(range(9))
        orders.append(tuple(order))
    assert len(set(orders)) == 3
    assert source(steps).first.all() and not torch.equal(source(steps).x, source(0).x)


@pytest.mark.parametrize("targets", ["frames", "characters"])
def test_batches_follow_from_seed_and_step(corpus, targets):
    source, _ = small(corpus, recipe(targets=targets))
    for step in range(40):
        batch = source(step)
    again, _ = small(corpus, recipe(targets=targets))
    assert all(torch.equal(a, b) for a, b in zip(again(39), batch, strict=True))
    other = Utterances(corpus.split("train"), recipe(targets=targets), 1, CPU)
    other.numbers = source.numbers
    assert any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(other(39), batch, strict=True)
    )


@pytest.mark.parametrize("targets", ["phones", "characters"])
def test_transcripts_are_those_of_their_utterances(corpus, targets):
    """One pass holds every utterance once, beside others of about its length, with zeros after its end."""
    source, model = small(corpus, recipe(targets=targets))
    assert model.config.symbols == (("aa", "iy", "s") if targets == "phones" else ("a", "i", "s"))
    assert source.steps_per_epoch == 3
    seen, spreads = [], []
    for step in range(3):
        batch = source(step)
        spreads.append(float(batch.lengths.double().std()))
        for x, length, labels, count in zip(*batch, strict=True):
            found = [i for i in range(9) if torch.equal(source.features[i], x[:length])]
            symbols = [model.config.symbols[k - 1] for k in labels[:count]]
            assert symbols == transcript(source.corpus.utterances[found[0]], targets)
            assert not x[length:].any()
            seen += found
    assert sorted(seen) == list(range(9))
    assert np.mean(spreads) < 0.5 * np.std(source.lengths)
    orders = [np.concatenate(source.groups_of_pass(number)).tolist() for number in range(2)]
    assert orders[0] != orders[1]


def test_statistics_and_priors_are_those_of_the_domain(corpus):
    source, model = small(corpus, recipe(domain="male"), torch.float32)
    chosen = [i for i, u in enumerate(source.corpus.utterances) if u.sex == "M"]
    x = torch.cat([source.features[i] for i in chosen])
    torch.testing.assert_close(model.standardise.mean, x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.standardise.deviation, x.std(0), rtol=1e-2, atol=1e-3)
    labels = Counter(p for i in chosen for p in frame_labels(source.corpus.utterances[i]))
    shares = [labels[p] / labels.total() for p in model.config.symbols]
    assert model.log_priors.exp().tolist() == pytest.approx(shares)


@pytest.mark.parametrize(
    ("domain", "speakers"),
    [("", "f1 m1 m2 f2"), ("female", "f1 f2"), ("clean", "f1 m1"), ("clean,noisy", "f1 m1 m2")]
    + [("male,both,noisy", "m2"), ("female,male", "f1 m1 m2 f2")],
)
def test_domains(corpus, domain, speakers):
    """Names of one kind are alternatives, sex and condition have both to fit."""
    inside = {u.speaker for u in corpus.utterances if in_domain(u, domain)}
    assert inside == set(speakers.split())
    source = Utterances(corpus.split("train"), recipe(domain=domain), 0, CPU)
    assert {source.corpus.utterances[i].speaker for i in source.used} == inside
    assert source.skipped == 0


def test_what_cannot_be_learned_is_one_line(corpus):
    def without(*fields):
        return replace(
            train,
            utterances=tuple(u._replace(**dict.fromkeys(fields, "")) for u in train.utterances),
        )

    train = corpus.split("train")
    for speech, changes, expected in (
        (train, {"domain": "channel"}, "female, male, clean, noisy, both"),
        (without("phones"), {}, "targets=characters"),
        (without("text"), {"targets": "characters"}, "targets=frames or phones"),
        (without("phones", "text"), {}, "expected phone labels or text"),
    ):
        with pytest.raises(CorpusError) as error:
            Utterances(speech, recipe(**changes), 0, CPU)
        assert expected in str(error.value) and "\n" not in str(error.value)
    some = replace(
        train, utterances=(train.utterances[0]._replace(phones=()), *train.utterances[1:])
    )
    source = Utterances(some, recipe(), 0, CPU)
    assert source.skipped == 1 and 0 not in source.used


def test_symbols_that_were_not_trained_are_left_out(corpus):
    train = corpus.split("train")
    source, model = small(corpus, recipe(targets="phones"))
    model.config.symbols = ("aa", "s")
    source.resume(model)
    batch = source.transcript_batch(np.arange(9))
    for utterance, labels, count in zip(train.utterances, batch.labels, batch.counts, strict=True):
        kept = [p for p in transcript(utterance, "phones") if p != "iy"]
        assert [model.config.symbols[k - 1] for k in labels[:count]] == kept


# ------------------------------------------------------------------------------------------- features of a model


def extractor(folder, name="fhvae", seed=0, **config) -> str:
    """A run folder with an untrained FHVAE or β-VAE"""
    torch.manual_seed(seed)
    sizes = {
        "fhvae": {"z1_latent": 2, "z2_latent": 3, "width": 4},
        "beta_vae": {"latent": 5, "encoder_width": 4},
    }
    model = build_model(name, frames=6, **sizes.get(name, {}), **config)
    if name in sizes:
        model.standardise.set(torch.full((80,), -5.0), torch.full((80,), 3.0))
    folder.mkdir(exist_ok=True)
    plan = asdict(
        Plan(name, "quick", "built-in", seed, "fp32", recipe=asdict(replace(recipe(), models={})))
    )
    state = {"plan": plan, "progress": asdict(Progress())}
    checkpoint.save(folder / "best.pt", name, model, audio.FEATURE_STFT, **state)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "latent", "numbers"), [("fhvae", "z1", 2), ("fhvae", "z2", 3), ("beta_vae", "z", 5)]
)
def test_latents_are_those_of_the_segment_around_each_frame(
    corpus, tmp_path, name, latent, numbers
):
    settings = recipe(extractor=extractor(tmp_path / "run", name), latent=latent)
    test = corpus.split("dev")
    found = utterance_features(test, settings, CPU)
    model, _, _ = checkpoint.load_run(tmp_path / "run")
    assert found.bins == 2 * numbers
    for i in (0, len(test) - 1):
        x = audio.fbank(torch.from_numpy(test.waveform(i, trim=False)))
        assert len(found[i]) == len(x)
        for t in (0, 1, 2, 3, len(x) // 2, len(x) - 3, len(x) - 2, len(x) - 1):
            frames = [x[min(max(t + k, 0), len(x) - 1)] for k in range(-3, 3)]
            posterior = model.infer(torch.stack(frames)[None])
            posterior = posterior if latent == "z" else posterior[0 if latent == "z1" else 2]
            torch.testing.assert_close(
                found[i][t], torch.cat(posterior, dim=-1)[0], rtol=1e-4, atol=1e-5
            )
    source, recogniser = small(corpus, settings, torch.float32)
    assert recogniser.config.bins == 2 * numbers and source(0).x.shape == (3, 7, 2 * numbers)


def test_latents_are_made_once(corpus, tmp_path, monkeypatch):
    train, calls = corpus.split("train"), []
    encode = features.encode
    monkeypatch.setattr(
        features, "encode", lambda *arguments: calls.append(1) or encode(*arguments)
    )
    settings = recipe(extractor=extractor(tmp_path / "first", seed=7))
    first = utterance_features(train, settings, CPU)[3]
    made = len(calls)
    assert (
        made == 9
        and torch.equal(utterance_features(train, settings, CPU)[3], first)
        and len(calls) == made
    )
    for number, changes in enumerate(({"seed": 8}, {"z1_variance": 2.0})):
        folder = extractor(tmp_path / f"other{number}", **({"seed": 7} | changes))
        other = utterance_features(train, recipe(extractor=folder), CPU)
        assert len(calls) == made + 9 * (number + 1)
        assert torch.equal(other[3], first) == (number == 1)
    utterance_features(train, replace(settings, latent="z2"), CPU)
    utterance_features(corpus.split("dev"), settings, CPU)
    assert len(calls) == made + 18 + 9 + 5


# ------------------------------------------------------------------------------------------------------ the scripts

TINY = [
    "width=8",
    "projection=4",
    "layers=1",
    "batch=3",
    "report=4",
    "schedule=constant",
    "warmup=0",
]


def train(data, *arguments, settings=()) -> int:
    command = ("--model", "acoustic", "--recipe", "quick", "--data", data, *arguments)
    return call(train_script, *command, "--set", *TINY, *settings)


@pytest.mark.parametrize("targets", ["frames", "characters"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tones, targets):
    """Twelve steps at once, or eight, in the middle of utterances, and then four."""
    settings = [f"targets={targets}"]
    assert train(tones, "--run", "whole", "--steps", 12, settings=settings) == 0
    assert train(tones, "--run", "parts", "--steps", 8, settings=settings) == 0
    assert call(train_script, "--run", "parts", "--steps", 12, "--resume") == 0
    assert log("parts") == log("whole")
    whole, parts = (
        torch.load(f"{run}/last.pt", weights_only=True)["parameters"] for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    if targets == "frames":
        assert whole["h"].any() and whole["h"].shape == (1, 3, 4)


def test_training_learns_to_tell_tones_apart(tones):
    settings = ["width=32", "projection=0", "learning_rate=2e-2", "delay=1", "report=60"]
    assert (
        call(
            train_script,
            "--model",
            "acoustic",
            "--recipe",
            "quick",
            "--data",
            tones,
            "--steps",
            60,
            "--run",
            "run",
            "--set",
            "layers=1",
            "batch=4",
            "warmup=0",
            *settings,
        )
        == 0
    )
    assert log("run")[-1]["dev"]["errors"] < 0.05
    assert json.loads(Path("run/config.json").read_text())["model_settings"]["symbols"] == [
        "aa",
        "iy",
        "s",
    ]


def test_training_can_start_from_another_model(tones, tmp_path):
    """With its symbols, statistics and features; another number of utterances in parallel."""
    run = extractor(tmp_path / "extractor")
    settings = ["domain=female", f"extractor={run}", "latent=z2"]
    assert train(tones, "--run", "first", "--steps", 4, settings=settings) == 0
    assert (
        call(
            train_script,
            "--init",
            "first",
            "--recipe",
            "quick",
            "--data",
            tones,
            "--run",
            "second",
            "--steps",
            2,
            "--set",
            "batch=2",
        )
        == 0
    )
    first, second = (checkpoint.load_run(run)[0] for run in ("first", "second"))
    assert first.config.symbols == second.config.symbols and second.config.lanes == 2
    assert torch.equal(first.standardise.mean, second.standardise.mean) and first.config.bins == 6
    recipe = json.loads(Path("second/config.json").read_text())["recipe"]
    assert (recipe["extractor"], recipe["latent"], recipe["domain"]) == (run, "z2", "")
    assert (
        call(
            train_script,
            "--init",
            "first",
            "--recipe",
            "quick",
            "--data",
            tones,
            "--set",
            "latent=z1",
        )
        == 2
    )


def test_bf16_trains_too(tones):
    assert train(tones, "--run", "fp32", "--steps", 4) == 0
    assert train(tones, "--run", "bf16", "--steps", 4, "--precision", "bf16") == 0
    losses = [log(run)[-1]["dev"]["loss"] for run in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("targets=words", "frames"),
        ("domain=male,quiet", "noisy"),
        ("features=power", "fbank"),
        ("width=0", "width"),
    ]
    + [
        ("projection=1024", "less than width"),
        ("extractor=nowhere", "nowhere"),
        ("latent=z3", "z1"),
    ]
    + [
        ("delay=-1", "delay"),
        ("lanes=3", "lanes"),
        ("trim=true", "trim"),
        ("domain=channel", "domain=channel"),
    ]
    + [
        ("extractor=vae", "expected fhvae or beta_vae"),
        ("extractor=beta", "has no z1; expected latent=z"),
    ],
)
def test_bad_settings_are_one_line(tones, tmp_path, setting, named, capsys):
    for folder, name in (("vae", "vae"), ("beta", "beta_vae")):
        if folder in setting:
            extractor(tmp_path / folder, name) if name != "vae" else dvae(tmp_path / folder)
    assert (
        call(
            train_script,
            "--model",
            "acoustic",
            "--recipe",
            "quick",
            "--data",
            tones,
            "--set",
            setting,
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
    assert not Path("runs").exists()


def dvae(folder: Path) -> None:
    folder.mkdir()
    checkpoint.save(folder / "best.pt", "vae", build_model("vae"), audio.STFT())


def test_settings_of_one_kind_of_target_or_model():
    for model, settings, named in (
        ("acoustic", {"targets": "phones", "delay": "3"}, "delay"),
        ("acoustic", {"targets": "phones", "frames": "3"}, "frames"),
        ("deepspeech2", {"targets": "frames"}, "phones or characters"),
        ("vae", {"domain": "male"}, "domain"),
        ("vae", {"extractor": "run"}, "extractor"),
    ):
        with pytest.raises(SettingError, match=named):
            resolve(model, "quick", settings)


def test_the_papers_recipe_is_to_the_letter():
    """Appendix G."""
    settings, config = resolve("acoustic", "fhvae2017", {})
    assert (config["layers"], config["width"], config["projection"], config["criterion"]) == (
        3,
        1024,
        512,
        "frames",
    )
    assert (settings.frames, settings.batch, settings.features, config["bins"]) == (
        20,
        40,
        "fbank",
        80,
    )


def test_a_run_goes_on_with_the_same_labels_and_the_same_extractor_only(tones, tmp_path, capsys):
    """Fails where a run that began with other phones, or with features of another model, is resumed or evaluated."""
    speech = shutil.copytree(tones.parent, tmp_path / "speech")
    first = extractor(tmp_path / "extractor")
    flags = (
        "--model",
        "acoustic",
        "--data",
        speech / tones.name,
        "--steps",
        1,
        "--run",
        "A",
        "--set",
        "batch=2",
    )
    assert (
        call(
            train_script,
            *flags,
            "width=8",
            "layers=1",
            "projection=4",
            "report=1",
            f"extractor={first}",
        )
        == 0
    )
    again = ("--resume", "--run", "A", "--steps", 2)
    extractor(tmp_path / "extractor", seed=3)
    assert call(train_script, *again) == 2
    assert "holds another model" in capsys.readouterr().err
    assert call(evaluate_script, "A", "--split", "dev") == 2
    assert f"{first}: not the model that A was trained with" in capsys.readouterr().err
    extractor(tmp_path / "extractor")
    labels = speech / "u0.phn"
    text = labels.read_text()
    labels.write_text(text.replace("aa", "s").replace("iy", "aa"))
    assert labels.read_text() != text and call(train_script, *again) == 2
    assert "not the speech that this run began with" in capsys.readouterr().err
    labels.write_text(text)
    assert call(train_script, *again) == 0
