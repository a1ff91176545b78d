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
from torch.nn import functional

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
TONES = {"aa": 400, "iy": 2300, "s": 5000}  # phone → Hz
SPEAKERS = {"f1": ("F", "clean"), "m1": ("M", "clean"), "m2": ("M", "noisy"), "f2": ("F", "both")}


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """Return a manifest of 14 utterances of 0.3 to 0.8 s whose phones are tones and whose
    characters are the first letters of the phones."""
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    rows = ["path\tspeaker\tsplit\ttext\tphones\tsex\tcondition"]
    for k in range(14):
        phones = [str(p) for p in random.choice(list(TONES), size=random.integers(2, 6))]
        ends = np.cumsum(random.integers(2000, 3000, len(phones)))
        hertz = np.repeat([TONES[p] for p in phones], np.diff(ends, prepend=0))
        tone = 0.5 * np.sin(2 * np.pi * np.cumsum(hertz) / 16_000)
        waveform = tone + random.normal(0, 0.01, len(hertz))
        soundfile.write(folder / f"u{k}.wav", waveform, 16_000)
        lines = []
        for start, end, phone in zip([0, *ends], ends, phones, strict=False):
            lines.append(f"{start} {end} {phone}\n")
        (folder / f"u{k}.phn").write_text("".join(lines))
        speaker = list(SPEAKERS)[k % 4]
        sex, condition = SPEAKERS[speaker]
        split = "dev" if k >= 9 else "train"
        text = "".join(phone[0].upper() for phone in phones)
        rows.append(f"u{k}.wav\t{speaker}\t{split}\t{text}\tu{k}.phn\t{sex}\t{condition}")
    manifest = folder / "tones.tsv"
    manifest.write_text("\n".join(rows))
    return manifest


@pytest.fixture
def corpus(tones):
    return load_corpus(tones, progress=False)


def quick_recipe(model="acoustic", **changes):
    recipe, _ = resolve(model, "quick", {})
    return replace(recipe, batch=3, frames=7, **changes)


def small_source_and_model(corpus, recipe, dtype=torch.float64, **config):
    """Return a source of batches and a model that fits it."""
    torch.manual_seed(0)
    sizes = {"width": 8, "projection": 3, "layers": 2, "delay": recipe.delay}
    sizes["criterion"] = "frames" if recipe.targets == "frames" else "ctc"
    model = build_model("acoustic", **(sizes | config))
    source = Utterances(corpus.split("train"), recipe, 0, CPU)
    source.prepare(model, fresh=True)
    return source, model.to(dtype)


def in_double_precision(batch):
    return batch._replace(x=batch.x.double())


# --------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("delay", [0, 2])
def test_layers_with_projection_step_by_step(projection, delay):
    """Fails if the layers are not equations 7 to 12 of Sak et al. 2014 without peepholes, or if the
    output of frame t is not the one `delay` frames after it, the last frame being repeated."""
    torch.manual_seed(0)
    sizes = {"width": 5, "projection": projection, "layers": 2, "delay": delay}
    model = build_model("acoustic", bins=4, symbols=("a", "b"), **sizes).double()
    model.standardise.set(torch.randn(4), torch.rand(4) + 0.5)
    x = torch.randn(2, 6, 4, dtype=torch.float64)  # (batch, frames, bins)
    standardised = (x - model.standardise.mean) / model.standardise.deviation
    steps = list(standardised.unbind(1))
    steps += steps[-1:] * delay
    for layer in range(2):
        weights = [getattr(model.lstm, name) for name in model.lstm._all_weights[layer]]
        w_ih, w_hh, b_ih, b_hh = weights[:4]
        h = torch.zeros(2, projection or 5, dtype=torch.float64)
        c = torch.zeros(2, 5, dtype=torch.float64)
        for t, inputs in enumerate(steps):
            gates = inputs @ w_ih.t() + h @ w_hh.t() + b_ih + b_hh
            i, f, g, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if projection:
                h = h @ weights[4].t()
            steps[t] = h
    expected = torch.stack([model.output(h) for h in steps[delay:]], dim=1)
    logits, lengths = model.logits(x, torch.tensor([6, 6]))
    torch.testing.assert_close(logits, expected)
    assert lengths.tolist() == [6, 6]


@pytest.mark.parametrize("targets", ["frames", "phones"])
def test_padding_leaks_nothing(corpus, targets):
    """Fails if the outputs for an utterance change when it is in a batch with a longer one, or with
    the padding after its end."""
    _, model = small_source_and_model(corpus, quick_recipe(targets=targets))
    x = torch.randn(2, 9, 80, dtype=torch.float64)  # (batch, frames, bins)
    lengths = torch.tensor([5, 9])
    alone, _ = model.logits(x[:1, :5], lengths[:1])
    x[0, 5:] = float("inf")
    together, _ = model.logits(x, lengths)
    torch.testing.assert_close(together[:1, :5], alone)


def test_carried_state_makes_pieces_one_utterance(corpus):
    """Fails if the state is not carried from one piece of an utterance to the next, or is carried
    into the next utterance: then the loss of all pieces, in one pass of all lanes, is not that of
    the complete utterances, frame by frame. The same holds for a development set."""
    source, model = small_source_and_model(corpus, quick_recipe())
    loss_of_pieces = 0.0
    frames_of_pieces = 0
    for step in range(int(source.lane_steps.sum())):
        batch = source(step)
        loss, _ = model.loss(in_double_precision(batch))
        loss.backward()  # This is an error if the graph of the step before is still connected.
        num_labelled = int((batch.labels >= 0).sum())
        loss_of_pieces += loss.item() * num_labelled
        frames_of_pieces += num_labelled
    expected_loss = 0.0
    expected_frames = 0
    for i, utterance in enumerate(source.corpus.utterances):
        x = source.features[i][None].double()
        logits, _ = model.logits(x, torch.tensor([x.shape[1]]))
        labels = torch.tensor([model.config.symbols.index(p) for p in frame_labels(utterance)])
        expected_loss += functional.cross_entropy(logits[0], labels, reduction="sum").item()
        expected_frames += len(labels)
    # Each of the 3 lanes reads every utterance.
    assert frames_of_pieces == 3 * expected_frames
    assert loss_of_pieces == pytest.approx(3 * expected_loss, rel=1e-6)

    model.eval()
    development_loss = 0.0
    development_frames = 0
    for batch, size in source.development(model):
        loss, _ = model.loss(in_double_precision(batch))
        development_loss += size * loss.item()
        development_frames += size
    assert development_frames == expected_frames
    assert development_loss == pytest.approx(expected_loss, rel=1e-6)


def test_evaluation_between_two_steps_changes_nothing(corpus):
    """Fails if a development set between two steps changes the state that is carried."""
    source, model = small_source_and_model(corpus, quick_recipe(), torch.float32)
    losses = []
    held_out = Utterances(corpus.split("dev"), quick_recipe(), 0, CPU)
    for evaluates_between in (False, True):
        model.carry(3)
        for step in range(4):
            loss, _ = model.train().loss(source(step))
            if evaluates_between:
                for batch, _ in held_out.development(model):
                    model.eval().loss(batch)
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_errors_are_the_share_of_misclassified_frames():
    """Fails if `errors` is not 3 of 10 where 3 labels were changed and 2 frames have no label."""
    torch.manual_seed(0)
    sizes = {"width": 5, "projection": 0, "layers": 1, "delay": 0}
    model = build_model("acoustic", bins=4, symbols=("a", "b", "c"), **sizes).eval()
    x = torch.randn(2, 6, 4)
    logits, _ = model.logits(x, torch.tensor([6, 6]))
    labels = logits.argmax(-1)
    labels[0, :3] = (labels[0, :3] + 1) % 3
    labels[1, 4:] = -1
    _, terms = model.loss(FrameBatch(x, labels, torch.ones(2, dtype=torch.bool)))
    assert terms["errors"].item() == pytest.approx(3 / 10)


# -------------------------------------------------------------------------------------- the batches


def phone_at(utterance, sample: int) -> str:
    """Return the phone at a sample; the last phone for a sample after the end."""
    for start, stop, phone in utterance.phones:
        if start <= sample < stop:
            return phone
    return utterance.phones[-1][2]


def test_labels_are_the_phones_at_the_centres_of_frames(corpus):
    """Fails if the label of frame t is not the phone at sample 160 t, on which frame t of
    `audio.FEATURE_STFT` is centred, or if there are more or fewer labels than frames."""
    for utterance in corpus.utterances:
        centres = range(0, utterance.length + 160, 160)
        expected = [phone_at(utterance, centre) for centre in centres]
        assert frame_labels(utterance) == expected[: audio.FEATURE_STFT.frames(utterance.length)]
        assert len(frame_labels(utterance)) == len(audio.fbank(torch.zeros(utterance.length)))


def test_tones_stand_at_their_labels(corpus):
    """Fails if features and labels are shifted by a frame: the loudest bin of a frame must be that
    of its label's tone."""
    utterances = corpus.split("train")
    radians = torch.arange(4000) * 2 * math.pi / 16_000
    bins = [audio.fbank(torch.sin(hertz * radians))[10].argmax() for hertz in TONES.values()]
    num_correct = 0
    num_frames = 0
    for i, utterance in enumerate(utterances.utterances):
        x = audio.fbank(torch.from_numpy(utterances.waveform(i, trim=False)))
        loudest = torch.stack([x[:, b] for b in bins]).argmax(0)
        labels = torch.tensor([list(TONES).index(p) for p in frame_labels(utterance)])
        num_correct += int((loudest == labels).sum())
        num_frames += len(labels)
    assert num_correct >= 0.99 * num_frames


def read_lanes(source) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the features and labels of each utterance that each lane reads in one pass."""
    pieces = [[] for _ in range(3)]
    for step in range(int(source.lane_steps.sum())):
        batch = source(step)
        for lane in range(3):
            if batch.first[lane]:
                pieces[lane].append(([], []))
            features_of_utterance, labels_of_utterance = pieces[lane][-1]
            features_of_utterance.append(batch.x[lane])
            labels_of_utterance.append(batch.labels[lane])
    lanes = []
    for pieces_of_lane in pieces:
        lanes.append([(torch.cat(x), torch.cat(labels)) for x, labels in pieces_of_lane])
    return lanes


def indices_of(source, x) -> list[int]:
    """Return the utterances with whose features x begins."""
    indices = []
    for i in range(9):
        utterance = source.features[i]
        if torch.equal(utterance, x[: len(utterance)]):
            indices.append(i)
    return indices


def test_every_lane_reads_every_utterance_once(corpus):
    """Fails if a lane leaves out or repeats an utterance or a frame in one pass, if the labels are
    not `delay` frames behind, or if two lanes have the same order."""
    source, model = small_source_and_model(corpus, quick_recipe(delay=2))
    orders = []
    for lane in read_lanes(source):
        order = []
        for x, labels in lane:
            indices = indices_of(source, x)
            utterance = source.corpus.utterances[indices[0]]
            expected = [-1, -1]
            expected += [model.config.symbols.index(p) for p in frame_labels(utterance)]
            assert labels.tolist() == expected + [-1] * (len(labels) - len(expected))
            assert torch.equal(x[-1], source.features[indices[0]][-1])
            order += indices
        assert sorted(order) == list(range(9))
        orders.append(tuple(order))
    assert len(set(orders)) == 3
    first_of_second_pass = source(int(source.lane_steps.sum()))
    assert first_of_second_pass.first.all()
    assert not torch.equal(first_of_second_pass.x, source(0).x)


@pytest.mark.parametrize("targets", ["frames", "characters"])
def test_batches_follow_from_seed_and_step(corpus, targets):
    """Fails if a batch depends on the batches that were drawn before, or not on the seed."""
    recipe = quick_recipe(targets=targets)
    source, _ = small_source_and_model(corpus, recipe)
    for step in range(40):
        batch = source(step)
    resumed, _ = small_source_and_model(corpus, recipe)
    for value, expected in zip(resumed(39), batch, strict=True):
        assert torch.equal(value, expected)
    other_seed = Utterances(corpus.split("train"), recipe, 1, CPU)
    other_seed.numbers = source.numbers
    differences = []
    for value, other in zip(other_seed(39), batch, strict=True):
        differences.append(value.shape != other.shape or not torch.equal(value, other))
    assert any(differences)


@pytest.mark.parametrize(
    ("targets", "symbols"), [("phones", ("aa", "iy", "s")), ("characters", ("a", "i", "s"))]
)
def test_transcripts_are_those_of_their_utterances(corpus, targets, symbols):
    """Fails if one pass leaves out or repeats an utterance, if a transcript is not that of its
    utterance, if padding is not zero, or if batches mix short and long utterances."""
    source, model = small_source_and_model(corpus, quick_recipe(targets=targets))
    assert model.config.symbols == symbols
    assert source.steps_per_epoch == 3
    order = []
    spreads = []  # standard deviation of the lengths in each batch
    for step in range(3):
        batch = source(step)
        spreads.append(float(batch.lengths.double().std()))
        for x, length, labels, count in zip(*batch, strict=True):
            indices = [i for i in range(9) if torch.equal(source.features[i], x[:length])]
            symbols_of_utterance = [model.config.symbols[k - 1] for k in labels[:count]]
            utterance = source.corpus.utterances[indices[0]]
            assert symbols_of_utterance == transcript(utterance, targets)
            assert not x[length:].any()
            order += indices
    assert sorted(order) == list(range(9))
    assert np.mean(spreads) < 0.5 * np.std(source.lengths)
    first_pass = np.concatenate(source.groups_of_pass(0)).tolist()
    second_pass = np.concatenate(source.groups_of_pass(1)).tolist()
    assert first_pass != second_pass


def test_statistics_and_priors_are_those_of_the_domain(corpus):
    """Fails if the mean, the deviation or the priors of the labels are not those of the utterances
    that training uses."""
    source, model = small_source_and_model(corpus, quick_recipe(domain="male"), torch.float32)
    used = [i for i, u in enumerate(source.corpus.utterances) if u.sex == "M"]
    x = torch.cat([source.features[i] for i in used])
    torch.testing.assert_close(model.standardise.mean, x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.standardise.deviation, x.std(0), rtol=1e-2, atol=1e-3)
    labels = Counter()
    for i in used:
        labels.update(frame_labels(source.corpus.utterances[i]))
    shares = [labels[p] / labels.total() for p in model.config.symbols]
    assert model.log_priors.exp().tolist() == pytest.approx(shares)


@pytest.mark.parametrize(
    ("domain", "speakers"),
    [
        ("", "f1 m1 m2 f2"),
        ("female", "f1 f2"),
        ("clean", "f1 m1"),
        ("clean,noisy", "f1 m1 m2"),
        ("male,both,noisy", "m2"),
        ("female,male", "f1 m1 m2 f2"),
    ],
)
def test_domains(corpus, domain, speakers):
    """Fails if two sexes or two conditions are not alternatives, or if an utterance is used whose
    sex fits and whose condition does not."""
    selected = {u.speaker for u in corpus.utterances if in_domain(u, domain)}
    assert selected == set(speakers.split())
    source = Utterances(corpus.split("train"), quick_recipe(domain=domain), 0, CPU)
    assert {source.corpus.utterances[i].speaker for i in source.used} == selected
    assert source.skipped == 0


def without(corpus, *fields):
    """Return a corpus whose utterances lack some fields."""
    empty = dict.fromkeys(fields, "")
    return replace(corpus, utterances=tuple(u._replace(**empty) for u in corpus.utterances))


def test_what_cannot_be_learned_is_one_line(corpus):
    """Fails if a corpus without the domain or the labels ends in an unclear error, or if an
    utterance without labels is used or not counted."""
    train_split = corpus.split("train")
    for speech, changes, expected in (
        (train_split, {"domain": "channel"}, "female, male, clean, noisy, both"),
        (without(train_split, "phones"), {}, "targets=characters"),
        (without(train_split, "text"), {"targets": "characters"}, "targets=frames or phones"),
        (without(train_split, "phones", "text"), {}, "expected phone labels or text"),
    ):
        with pytest.raises(CorpusError) as error:
            Utterances(speech, quick_recipe(**changes), 0, CPU)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
    utterances = list(train_split.utterances)
    utterances[0] = utterances[0]._replace(phones=())
    partly_labelled = replace(train_split, utterances=tuple(utterances))
    source = Utterances(partly_labelled, quick_recipe(), 0, CPU)
    assert source.skipped == 1
    assert 0 not in source.used


def test_symbols_that_were_not_trained_are_left_out(corpus):
    """Fails if a label that a trained model does not have changes the numbers of the others."""
    source, model = small_source_and_model(corpus, quick_recipe(targets="phones"))
    model.config.symbols = ("aa", "s")
    source.resume(model)
    batch = source.transcript_batch(np.arange(9))
    utterances = corpus.split("train").utterances
    for utterance, labels, count in zip(utterances, batch.labels, batch.counts, strict=True):
        expected = [p for p in transcript(utterance, "phones") if p != "iy"]
        assert [model.config.symbols[k - 1] for k in labels[:count]] == expected


# ----------------------------------------------------------------------------- features of a model

EXTRACTOR_SIZES = {
    "fhvae": {"z1_latent": 2, "z2_latent": 3, "width": 4},
    "beta_vae": {"latent": 5, "encoder_width": 4},
}


def write_extractor(folder, name="fhvae", seed=0, **config) -> str:
    """Write a run of an untrained FHVAE or β-VAE; return its folder."""
    torch.manual_seed(seed)
    model = build_model(name, frames=6, **EXTRACTOR_SIZES[name], **config)
    model.standardise.set(torch.full((80,), -5.0), torch.full((80,), 3.0))
    folder.mkdir(exist_ok=True)
    recipe = asdict(replace(quick_recipe(), models={}))
    plan = Plan(name, "quick", "built-in", seed, "fp32", recipe=recipe)
    state = {"plan": asdict(plan), "progress": asdict(Progress())}
    checkpoint.save(folder / "best.pt", name, model, audio.FEATURE_STFT, **state)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "latent", "size"), [("fhvae", "z1", 2), ("fhvae", "z2", 3), ("beta_vae", "z", 5)]
)
def test_latents_are_those_of_the_segment_around_each_frame(corpus, tmp_path, name, latent, size):
    """Fails if the features of frame t are not mean and log-variance of the posterior of frames
    t - 3 to t + 2, the first and the last frame being repeated beyond the ends."""
    recipe = quick_recipe(extractor=write_extractor(tmp_path / "run", name), latent=latent)
    held_out = corpus.split("dev")
    latents = utterance_features(held_out, recipe, CPU)
    model, _, _ = checkpoint.load_run(tmp_path / "run")
    assert latents.bins == 2 * size
    for i in (0, len(held_out) - 1):
        x = audio.fbank(torch.from_numpy(held_out.waveform(i, trim=False)))
        assert len(latents[i]) == len(x)
        for t in (0, 1, 2, 3, len(x) // 2, len(x) - 3, len(x) - 2, len(x) - 1):
            segment = [x[min(max(t + k, 0), len(x) - 1)] for k in range(-3, 3)]
            posterior = model.infer(torch.stack(segment)[None])
            if latent == "z1":
                posterior = posterior[0]
            elif latent == "z2":
                posterior = posterior[2]
            expected = torch.cat(posterior, dim=-1)[0]
            torch.testing.assert_close(latents[i][t], expected, rtol=1e-4, atol=1e-5)
    source, recogniser = small_source_and_model(corpus, recipe, torch.float32)
    assert recogniser.config.bins == 2 * size
    assert source(0).x.shape == (3, 7, 2 * size)


def test_latents_are_made_once(corpus, tmp_path, monkeypatch):
    """Fails if latents are encoded again though they are in the cache, or are taken from the cache
    for another model, other settings, another latent or another split."""
    train_split = corpus.split("train")
    encode = features.encode
    calls = []

    def count_and_encode(*arguments):
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(features, "encode", count_and_encode)
    recipe = quick_recipe(extractor=write_extractor(tmp_path / "first", seed=7))
    first = utterance_features(train_split, recipe, CPU)[3]
    assert len(calls) == 9
    assert torch.equal(utterance_features(train_split, recipe, CPU)[3], first)
    assert len(calls) == 9

    folder = write_extractor(tmp_path / "other_parameters", seed=8)
    other = utterance_features(train_split, quick_recipe(extractor=folder), CPU)
    assert len(calls) == 18
    assert not torch.equal(other[3], first)
    # This setting does not change the posterior.
    folder = write_extractor(tmp_path / "other_settings", seed=7, z1_variance=2.0)
    other = utterance_features(train_split, quick_recipe(extractor=folder), CPU)
    assert len(calls) == 27
    assert torch.equal(other[3], first)

    utterance_features(train_split, replace(recipe, latent="z2"), CPU)
    utterance_features(corpus.split("dev"), recipe, CPU)
    assert len(calls) == 27 + 9 + 5


# ------------------------------------------------------------------------------------- the scripts

TINY = ["width=8", "projection=4", "layers=1", "batch=3", "report=4", "schedule=constant"]
TINY += ["warmup=0"]


def train(data, *arguments) -> int:
    """Return the exit code of train.py for an acoustic model with the recipe `quick`."""
    command = ("--model", "acoustic", "--recipe", "quick", "--data", data)
    return call(train_script, *command, *arguments)


def train_tiny(data, *arguments, settings=()) -> int:
    return train(data, *arguments, "--set", *TINY, *settings)


@pytest.mark.parametrize("targets", ["frames", "characters"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tones, targets):
    """Fails if eight steps, which end in the middle of utterances, and then four do not give what
    twelve steps at once give."""
    settings = [f"targets={targets}"]
    assert train_tiny(tones, "--run", "at_once", "--steps", 12, settings=settings) == 0
    assert train_tiny(tones, "--run", "resumed", "--steps", 8, settings=settings) == 0
    assert call(train_script, "--run", "resumed", "--steps", 12, "--resume") == 0
    assert log("resumed") == log("at_once")
    expected = torch.load("at_once/last.pt", weights_only=True)["parameters"]
    parameters = torch.load("resumed/last.pt", weights_only=True)["parameters"]
    assert all(torch.equal(expected[name], parameters[name]) for name in expected)
    if targets == "frames":
        assert expected["h"].any()
        assert expected["h"].shape == (1, 3, 4)


def test_training_learns_to_tell_tones_apart(tones):
    """Fails if more than 5 % of the frames are misclassified after 60 steps."""
    settings = ["layers=1", "batch=4", "warmup=0", "width=32", "projection=0"]
    settings += ["learning_rate=2e-2", "delay=1", "report=60"]
    assert train(tones, "--steps", 60, "--run", "run", "--set", *settings) == 0
    assert log("run")[-1]["dev"]["errors"] < 0.05
    config = json.loads(Path("run/config.json").read_text())
    assert config["model_settings"]["symbols"] == ["aa", "iy", "s"]


def test_training_can_start_from_another_model(tones, tmp_path):
    """Fails if --init does not keep symbols, statistics and features of the first model, or if the
    number of utterances in parallel or the domain cannot change."""
    extractor = write_extractor(tmp_path / "extractor")
    settings = ["domain=female", f"extractor={extractor}", "latent=z2"]
    assert train_tiny(tones, "--run", "first", "--steps", 4, settings=settings) == 0
    command = ["--init", "first", "--recipe", "quick", "--data", tones]
    arguments = ["--run", "second", "--steps", 2, "--set", "batch=2"]
    assert call(train_script, *command, *arguments) == 0
    first, _, _ = checkpoint.load_run("first")
    second, _, _ = checkpoint.load_run("second")
    assert first.config.symbols == second.config.symbols
    assert second.config.lanes == 2
    assert torch.equal(first.standardise.mean, second.standardise.mean)
    assert first.config.bins == 6
    recipe = json.loads(Path("second/config.json").read_text())["recipe"]
    assert recipe["extractor"] == extractor
    assert recipe["latent"] == "z2"
    assert recipe["domain"] == ""
    assert call(train_script, *command, "--set", "latent=z1") == 2


def test_bf16_trains_too(tones):
    """Fails if --precision bf16 changes nothing, or the loss by more than 2 %."""
    assert train_tiny(tones, "--run", "fp32", "--steps", 4) == 0
    assert train_tiny(tones, "--run", "bf16", "--steps", 4, "--precision", "bf16") == 0
    fp32_loss = log("fp32")[-1]["dev"]["loss"]
    bf16_loss = log("bf16")[-1]["dev"]["loss"]
    assert fp32_loss != bf16_loss
    assert bf16_loss == pytest.approx(fp32_loss, rel=0.02)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("targets=words", "frames"),
        ("domain=male,quiet", "noisy"),
        ("features=power", "fbank"),
        ("width=0", "width"),
        ("projection=1024", "less than width"),
        ("extractor=nowhere", "nowhere"),
        ("latent=z3", "z1"),
        ("delay=-1", "delay"),
        ("lanes=3", "lanes"),
        ("trim=true", "trim"),
        ("domain=channel", "domain=channel"),
        ("extractor=vae", "expected fhvae or beta_vae"),
        ("extractor=beta", "has no z1; expected latent=z"),
    ],
)
def test_bad_settings_are_one_line(tones, tmp_path, setting, expected, capsys):
    """Fails if a bad setting ends in a traceback or an unclear error, or leaves a run folder."""
    if setting == "extractor=vae":
        (tmp_path / "vae").mkdir()
        checkpoint.save(tmp_path / "vae" / "best.pt", "vae", build_model("vae"), audio.STFT())
    if setting == "extractor=beta":
        write_extractor(tmp_path / "beta", "beta_vae")
    assert train(tones, "--set", setting) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not Path("runs").exists()


def test_settings_of_one_type_of_target_or_model():
    """Fails if a setting is taken that the target or the model does not use."""
    for model, settings, expected in (
        ("acoustic", {"targets": "phones", "delay": "3"}, "delay"),
        ("acoustic", {"targets": "phones", "frames": "3"}, "frames"),
        ("deepspeech2", {"targets": "frames"}, "phones or characters"),
        ("vae", {"domain": "male"}, "domain"),
        ("vae", {"extractor": "run"}, "extractor"),
    ):
        with pytest.raises(SettingError, match=expected):
            resolve(model, "quick", settings)


def test_the_papers_recipe_is_to_the_letter():
    """Fails if the settings are not those of appendix G of the FHVAE paper."""
    recipe, config = resolve("acoustic", "fhvae2017", {})
    assert config["layers"] == 3
    assert config["width"] == 1024
    assert config["projection"] == 512
    assert config["criterion"] == "frames"
    assert config["bins"] == 80
    assert recipe.frames == 20
    assert recipe.batch == 40
    assert recipe.features == "fbank"


def test_a_run_goes_on_with_the_same_labels_and_the_same_extractor_only(tones, tmp_path, capsys):
    """Fails if a run that began with other phones, or with features of another model, is resumed or
    evaluated."""
    speech = shutil.copytree(tones.parent, tmp_path / "speech")
    extractor = write_extractor(tmp_path / "extractor")
    command = ["--model", "acoustic", "--data", speech / tones.name, "--steps", 1, "--run", "A"]
    settings = ["batch=2", "width=8", "layers=1", "projection=4", "report=1"]
    assert call(train_script, *command, "--set", *settings, f"extractor={extractor}") == 0

    resume = ("--resume", "--run", "A", "--steps", 2)
    write_extractor(tmp_path / "extractor", seed=3)
    assert call(train_script, *resume) == 2
    assert "holds another model" in capsys.readouterr().err
    assert call(evaluate_script, "A", "--split", "dev") == 2
    assert f"{extractor}: not the model that A was trained with" in capsys.readouterr().err

    write_extractor(tmp_path / "extractor")
    labels = speech / "u0.phn"
    text = labels.read_text()
    labels.write_text(text.replace("aa", "s").replace("iy", "aa"))
    assert labels.read_text() != text
    assert call(train_script, *resume) == 2
    assert "not the speech that this run began with" in capsys.readouterr().err
    labels.write_text(text)
    assert call(train_script, *resume) == 0
