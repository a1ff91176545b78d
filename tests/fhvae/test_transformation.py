"""Exchange, shift and traversal of an FHVAE's latents, and the probes, on cases whose answer is
known."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from speech_folder import write_speech

from minidvae.data import audio, synthetic
from minidvae.data.audio import FEATURE_STFT, SAMPLE_RATE
from minidvae.data.corpus import BUILT_IN, Corpus, Utterance, built_in_speakers, load_corpus
from minidvae.evaluation import figures, report
from minidvae.evaluation.pairs import conversion_pairs
from minidvae.evaluation.runs import Options, Run
from minidvae.fhvae import probes
from minidvae.fhvae import transformation as T
from minidvae.fhvae.encoding import features_of
from minidvae.inference.convert import segments_of
from minidvae.models import build_model
from minidvae.models.fhvae import Latents, SegmentBatch
from minidvae.training.run import resolve
from minidvae.training.segment_batches import FeatureSegments, feature_segments


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Corpus:
    """Return a corpus of three training and two test speakers (a woman and a man), with phones and
    sexes."""
    folder = write_speech(tmp_path_factory.mktemp("labelled"), (3, 1, 2), utterances=2, phones=True)
    cache = tmp_path_factory.mktemp("cache")
    return load_corpus(folder, cache=cache, progress=False, note=lambda _: None)


def tiny_run(corpus: Corpus, folder: Path, architecture: str = "lstm", **settings) -> Run:
    """Return a run of an untrained FHVAE with 4 dimensions of z1 and 3 of z2."""
    recipe, config = resolve("fhvae", "quick", {key: str(value) for key, value in settings.items()})
    torch.manual_seed(0)
    config |= {"architecture": architecture, "z1_latent": 4, "z2_latent": 3, "width": 16}
    model = build_model("fhvae", **config).eval()
    source = FeatureSegments(corpus.split("train"), recipe, 0, torch.device("cpu"))
    model.standardise.set(*source.statistics())
    plan = {"recipe": dataclasses.asdict(recipe)}
    content = {"model": "fhvae", "plan": plan, "progress": {"step": 0}}
    test = corpus.split("test")
    return Run(folder, "fhvae", model, FEATURE_STFT, content, corpus.name, corpus, test)


@pytest.fixture(scope="module")
def tiny(labelled, tmp_path_factory) -> Run:
    return tiny_run(labelled, tmp_path_factory.mktemp("run"))


# ------------------------------------------------------------------------------------------- pitch


def harmonics(hertz: float, count: int, seconds: float = 0.5) -> torch.Tensor:
    """Return a waveform of so many harmonics of a fundamental frequency."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return 0.1 * sum(torch.cos(2 * math.pi * hertz * k * time + k * k) for k in range(1, count + 1))


@pytest.mark.parametrize("hertz", [85, 110, 147, 196, 262, 349])
def test_pitch_of_harmonics(hertz):
    """Fails where the lag of the peak, the rate or the correlation of the window is wrong, or the
    pitch is an octave off."""
    pitch = audio.pitch(FEATURE_STFT.power(harmonics(hertz, 3500 // hertz)), FEATURE_STFT)
    assert pitch.shape == (FEATURE_STFT.frames(8000) - 3,)
    assert (pitch / hertz - 1).abs().max() < 0.02


@pytest.mark.parametrize("hertz", [150, 220, 380])
def test_pitch_of_tones(hertz):
    pitch = audio.pitch(FEATURE_STFT.power(harmonics(hertz, 1)), FEATURE_STFT)
    assert (pitch / hertz - 1).abs().max() < 0.02


def test_pitch_of_what_has_none():
    """Fails where noise, silence, or a period too long to be seen is given a frequency."""
    noise = torch.randn(3, 16_000, generator=torch.Generator().manual_seed(0))
    assert audio.pitch(FEATURE_STFT.power(noise), FEATURE_STFT).isnan().float().mean() > 0.95
    assert audio.pitch(torch.zeros(2, 5, FEATURE_STFT.bins), FEATURE_STFT).isnan().all()


def test_pitch_of_voices_is_the_truth(labelled):
    """Fails where the median over frames with speech is not near the F0 of the synthesiser."""
    voices = {speaker.name: speaker for speaker in synthetic.make_speakers(0, 3, 1, 2)}
    for index, u in enumerate(labelled.utterances):
        waveform = torch.from_numpy(labelled.waveform(index, trim=False))
        is_voiced = audio.voiced_frames(waveform)
        log_f0 = probes.median_log_f0(audio.log_magnitude(waveform), is_voiced)
        assert abs(log_f0 - math.log(voices[u.speaker].f0)) < 0.2, u.name


def test_built_in_speakers_are_those_of_the_corpus():
    """Fails where ground truth would be read for other voices than those that speak."""
    voices = built_in_speakers()
    assert len(voices) == sum(BUILT_IN["speakers"])
    first = next(synthetic.generate(**BUILT_IN))
    rng = np.random.default_rng([0, 0, 0, 0, 0])
    words = synthetic.make_sentence("train", rng)
    voice = voices[first.speaker]
    waveform = synthetic.render(voice, synthetic.articulate(voice, words, rng), rng)
    assert np.array_equal(first.waveform, np.rint(0.99 * 32767 * waveform).astype(np.int16))


# ----------------------------------------------------------------------------------- linear models


def test_regression_explains_what_can_be_explained():
    """For y = x₁ + e, R² on new data must be 1/(1 + Var e), and the weight of a standardised input
    1/(1 + penalty)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 3, generator=generator)
    noise = 0.5 * torch.randn(40_000, generator=generator)
    y = 7 + x[:, 0] + noise
    model = probes.regress(5 + 3 * x[:20_000], y[:20_000], 1e-6)
    r_squared = probes.r_squared(model(5 + 3 * x[20_000:]), y[20_000:])
    assert r_squared == pytest.approx(1 / 1.25, abs=0.01)
    shrunk = probes.regress(x, y, 1.0)
    assert shrunk(torch.eye(3)[0]) - shrunk(torch.zeros(3)) == pytest.approx(0.5, abs=0.01)
    assert probes.r_squared(torch.full_like(y, float(y.mean())), y) == pytest.approx(0, abs=1e-6)


def test_classifier_reaches_the_best_accuracy():
    """The accuracy for two Gaussian classes at a distance d must be the best one, Φ(d/2), and that
    for labels independent of x must be chance."""
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    labels = np.array(["a", "b"] * 10_000)
    x[1::2, 0] += 2.0
    train = slice(0, 10_000)
    test = slice(10_000, None)
    predicted = probes.classify(x[train], labels[train], 1e-4)(x[test])
    best_accuracy = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert probes.accuracy(predicted, labels[test]) == pytest.approx(best_accuracy, abs=0.01)
    independent = np.random.default_rng(0).choice(["a", "b", "b", "b"], 20_000)
    predicted = probes.classify(x[train], independent[train], 1e-4)(x[test])
    chance = (independent[test] == "b").mean()
    assert probes.accuracy(predicted, independent[test]) == pytest.approx(chance, abs=0.01)


def test_probe_keeps_the_two_latents_apart():
    """Fails where z1 and z2 are exchanged, or an accuracy is of the training data."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(400, generator=random).tolist()
    rows = [(y, torch.randn(2, generator=random), torch.tensor([y, 0.0])) for y in numbers]
    result = probes.probe(rows[:200], rows[200:])
    assert result["measure"] == "r_squared"
    assert result["z2"] > 0.99 and result["z1"] < 0.1
    labelled_rows = [("low" if y < 0 else "high", z1, z2) for y, z1, z2 in rows]
    result = probes.probe(labelled_rows[:200], labelled_rows[200:])
    assert result["measure"] == "accuracy"
    assert result["z2"] > 0.97 and abs(result["z1"] - result["chance"]) < 0.12
    assert probes.probe(rows[:200], rows[200:201]) is None


def test_halves_share_speakers_and_no_utterance():
    utterances = [SimpleNamespace(speaker=speaker) for speaker in "aaaabbacaab"]
    encoded = [SimpleNamespace(utterance=utterance) for utterance in utterances]
    first, second = probes.halves(encoded)
    assert Counter(e.utterance.speaker for e in first) == {"a": 4, "b": 2}
    assert Counter(e.utterance.speaker for e in second) == {"a": 3, "b": 1}
    assert not {id(e) for e in first} & {id(e) for e in second}


def test_phones_at_samples():
    """Fails at the edges of phones, between labels with a gap and beyond the last."""
    phones = ((0, 10, "a"), (10, 30, "b"), (40, 50, "c"))
    utterance = Utterance("u", "s", "test", 0, 100, (0, 100), phones=phones)
    samples = np.array([0, 9, 10, 29, 30, 39, 40, 49, 50, 99])
    expected = ["a"] * 2 + ["b"] * 2 + [""] * 2 + ["c"] * 2 + [""] * 2
    assert probes.phones_at(utterance, samples).tolist() == expected
    unlabelled = utterance._replace(phones=())
    assert probes.phones_at(unlabelled, samples).tolist() == [""] * 10


def test_observed_phones_are_those_that_sound(tiny):
    """Fails where a segment does not have the phone at its middle, or frames are labelled at other
    times."""
    for e in probes.observe(tiny, tiny.test, "", keep=10**6):
        middles = [(20 * n + 10) * 160 for n in range(len(e.z1))]
        assert e.phones.tolist() == [phone_at(e.utterance, sample) for sample in middles]
        end_of_phones = e.utterance.phones[-1][1]
        frames = range(0, min(e.utterance.length + 1, end_of_phones), 160)
        assert len(e.frame_phones) == len(e.frames) == len(frames)
    trimmed = tiny_run(tiny.corpus, tiny.folder, trim=True)
    for e in probes.observe(trimmed, tiny.test, ""):
        assert e.phones[0] == phone_at(e.utterance, e.utterance.trim[0] + 1600) != ""


def phone_at(utterance: Utterance, sample: int) -> str:
    """Return the phone that sounds at a sample; nothing where there is none."""
    for start, stop, label in utterance.phones:
        if start <= sample < stop:
            return label
    return ""


def test_context_is_of_the_same_utterance():
    x = torch.arange(6.0)[:, None]
    rows = [[max(0, t - 3), t, min(5, t + 3)] for t in range(6)]
    assert probes.with_context(x).tolist() == rows


# ---------------------------------------------------------------------------------- transformation


def test_exchange_with_oneself_is_the_reconstruction(tiny):
    """Fails where a swap or a shift with the same utterance changes z2, a shift is not by the
    difference of the s-vectors, or segments are joined in a wrong order."""
    source = T.encode_side_by_side(tiny, tiny.test, 0)
    reference = T.encode_side_by_side(tiny, tiny.test, 2)
    assert T.swapped_z2(source, source).equal(source.z2)
    assert T.shifted_z2(source, source).equal(source.z2)
    x = features_of(tiny, tiny.test.waveform(0, trim=False))
    reconstruction = T.decode(tiny, source, source.z2)
    shifted = T.decode(tiny, source, T.shifted_z2(source, reference))
    source_s_vector = source.z2.sum(0) / (len(source.z2) + 0.25)
    reference_s_vector = reference.z2.sum(0) / (len(reference.z2) + 0.25)
    shift = reference_s_vector - source_s_vector
    assert reconstruction.shape == x.shape == source.features.shape
    for n in range(len(x) // 20):
        frames = slice(20 * n, 20 * n + 20)
        _, z1, _, z2 = tiny.model.infer(x[frames][None])
        expected = tiny.model.decode(z1, z2)[0]
        torch.testing.assert_close(reconstruction[frames], expected, atol=1e-4, rtol=1e-4)
        expected = tiny.model.decode(z1, z2 + shift)[0]
        torch.testing.assert_close(shifted[frames], expected, atol=1e-4, rtol=1e-4)


def test_swap_begins_again_where_the_reference_is_shorter(tiny):
    source = T.encode_side_by_side(tiny, tiny.test, 0)
    reference = T.encode_side_by_side(tiny, tiny.test, 1)
    reference.z2 = reference.z2[:3]
    expected = torch.stack([reference.z2[n % 3] for n in range(len(source.z2))])
    assert T.swapped_z2(source, reference).equal(expected)


class Level(torch.nn.Module):
    """A model whose z2 is the mean level of a segment and whose z1 is the rest. Its s-vector is the
    mean over all segments but the last one, which may be padded."""

    def __init__(self, bins):
        super().__init__()
        self.standardise = SimpleNamespace(deviation=torch.ones(bins))
        self.unused = torch.nn.Parameter(torch.zeros(()))  # says on which device the model is

    def infer(self, x):
        level = x.mean((1, 2))[:, None]
        return Latents(None, x - level[..., None], None, level)

    def decode(self, z1, z2):
        return z1 + z2[..., None]

    def s_vector(self, z2):
        return z2[:-1].mean(0)

    mu1 = s_vector


def test_movement_of_a_model_that_does_what_it_should(tiny):
    """The measure is the level of the features. A reconstruction must keep it, and a shift must
    bring it to that of the reference."""
    run = dataclasses.replace(tiny, model=Level(80))

    def level(features):
        return float(features[: 20 * ((len(features) - 1) // 20)].mean())

    def measure(run, speech, features):
        return {"log_f0": level(features), "tract": math.nan, "phones": math.nan}

    test = []
    for i in range(4):
        features = T.encode_side_by_side(run, run.test, i).features
        test.append(SimpleNamespace(log_f0=level(features), tract=math.nan))
    movement = T.movement(run, measure, test, seed=0)
    assert movement["pairs"] == 4
    assert movement["instruments"] == {"log_f0": pytest.approx(1, abs=1e-6)}
    assert movement["reconstruction"]["log_f0"] == pytest.approx(0, abs=1e-3)
    assert movement["shift"]["log_f0"] == pytest.approx(1, abs=1e-3)
    assert "tract" not in movement["shift"] and "phones" not in movement["original"]
    assert T.denoising(run) == {}  # This corpus has no noisy utterances.


def test_denoising_of_a_corpus_with_noise(labelled, tiny, tmp_path):
    """Fails where noisy utterances of a corpus are not used, or the distance is not that to the
    same utterance without noise."""
    name = f"conditions:{labelled.name}"
    laid = load_corpus(name, cache=tmp_path, progress=False, note=lambda _: None)
    noisy = [i for i, u in enumerate(laid.utterances) if u.condition == "noisy"]
    clean = [i for i, u in enumerate(laid.utterances) if u.condition == "clean"]
    assert noisy and clean and len(noisy) + len(clean) < len(laid)
    level = Level(80)
    level.standardise.deviation = tiny.model.standardise.deviation
    run = dataclasses.replace(tiny, model=level, test=laid)
    distances = []
    for i in noisy:
        clean_features = features_of(tiny, labelled.waveform(i, trim=False))
        noisy_features = features_of(tiny, laid.waveform(i, trim=False))
        difference = (noisy_features - clean_features) / level.standardise.deviation
        distances.append(float(difference.square().mean().sqrt()))
    result = T.denoising(run)
    assert result["noisy"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert result["reconstruction"] == pytest.approx(result["noisy"], abs=1e-4)
    assert result["clean"] < 1e-4
    assert result["denoised"] < result["noisy"]  # Noise raises the level.

    # The clean speech of a corpus with recorded noise is not known.
    recorded = dataclasses.replace(laid, clean=None)
    assert T.noisy_utterances(laid) == T.noisy_utterances(recorded) == noisy
    assert all(T.clean_reference(recorded, i) in clean for i in range(len(laid)))
    result = T.denoising(dataclasses.replace(run, test=recorded))
    assert result == {}
    assert T.denoising_table({"run": {"denoising": result}}).rows == [["run", *"––––"]]
    noisy_utterances = tuple(laid.utterances[i] for i in noisy)
    without_clean = dataclasses.replace(recorded, utterances=noisy_utterances)
    assert T.noisy_utterances(without_clean) == []


def test_pairs_of_conversion(labelled, speech, tmp_path):
    """Fails where a voice would be converted to its own sex, or to itself."""
    test = labelled.split("test")
    for source, reference in conversion_pairs(test, 4, seed=0):
        assert {test.utterances[source].sex, test.utterances[reference].sex} == {"F", "M"}
    utterances = tuple(u._replace(sex="") for u in labelled.split("train").utterances)
    unknown = dataclasses.replace(labelled, utterances=utterances)
    pairs = conversion_pairs(unknown, 100, seed=0)
    assert [source for source, _ in pairs] == list(range(6))
    assert all(utterances[i].speaker != utterances[k].speaker for i, k in pairs)
    one_speaker = dataclasses.replace(labelled, utterances=utterances[:2])
    assert conversion_pairs(one_speaker, 4, seed=0) == []
    assert T.clean_reference(test, 0) == 1 and T.clean_reference(test, 3) == 2


def test_segment_bound_is_the_models(tiny, monkeypatch):
    """The bound must be the mean over segments of minus the loss, each with the s-vector and the
    number of segments of its utterance."""

    def draw_zeros(n, generator=None):
        return torch.zeros(n, 4), torch.zeros(n, 3)

    monkeypatch.setattr(tiny.model, "draw_noise", draw_zeros)
    index = feature_segments(tiny.test, tiny.recipe)
    total = 0.0
    with torch.no_grad():
        for count, end in zip(index.counts, index.ends, strict=True):
            x = audio.fbank(index[np.arange(end - count, end)], centred=False)
            s_vector = tiny.model.encoder_z2(tiny.model.standardise(x)).mean.sum(0) / (count + 0.25)
            counts = torch.full((count,), float(count))
            batch = SegmentBatch(x, counts, None, s_vector.expand(count, -1))
            total -= count * float(tiny.model.loss(batch)[0])
        assert T.segment_bound(tiny, seed=0) == pytest.approx(total / len(index), rel=1e-5)


# ---------------------------------------------------------------------------------------- pictures


def test_tiles_are_in_reading_order():
    """Fails where rows and columns are exchanged, time runs to the left, or low frequencies are on
    top."""
    segments = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(float)
    image = figures._tiles(segments, gap=1)
    assert image.shape == (2 * 5 + 1, 3 * 4 + 2)
    assert image[4, 0] == segments[0, 0, 0, 0] and image[0, 0] == segments[0, 0, 0, 4]
    assert image[4, 3] == segments[0, 0, 3, 0] and image[4, 5] == segments[0, 1, 0, 0]
    assert image[-1, 0] == segments[1, 0, 0, 0]
    assert np.isnan(image[5]).all() and np.isnan(image[:, 4]).all()


def test_segments_are_the_same_for_every_model(tiny):
    """Fails where models would be compared on different segments, or the men are not in the first
    half."""
    other = tiny_run(tiny.corpus, tiny.folder, "fc")
    segments = T.choose_segments(tiny, 4, seed=1)
    assert segments.shape == (4, 20, 80) and segments.equal(T.choose_segments(other, 4, seed=1))
    sex_of_segment = {}
    for index, u in enumerate(tiny.test.utterances):
        x = features_of(tiny, tiny.test.waveform(index, trim=False))
        for segment in segments_of(x, 20, 20):
            sex_of_segment[segment.numpy().tobytes()] = u.sex
    sexes = [sex_of_segment[segment.numpy().tobytes()] for segment in segments]
    assert sexes == ["M", "M", "F", "F"]


PICTURES = ["swap", "traversal-z1", "traversal-z2", "reconstructions"]
SOUNDS = ["source", "reference", "reconstruction, phase of the source"]
SOUNDS += ["transformed, phase of the source", "transformed, Griffin-Lim"]


def test_the_whole_task_with_sound(labelled, tmp_path):
    """Fails where a picture, a sound or a measure that this corpus allows is missing, or a sound is
    silent or of another length."""
    name = f"conditions:{labelled.name}"
    corpus = load_corpus(name, cache=tmp_path, progress=False, note=lambda _: None)
    noisy_test_utterance = corpus.utterances[-1]._replace(condition="noisy")
    utterances = (*corpus.utterances[:-1], noisy_test_utterance)
    corpus = dataclasses.replace(corpus, utterances=utterances)
    runs = []
    for architecture in ("lstm", "fc"):
        folder = tmp_path / architecture
        runs.append(tiny_run(corpus, folder, architecture, features="log_magnitude"))
    evaluation = T.evaluate(runs, Options())
    names = ["conversion-male-to-female", "conversion-female-to-male", "denoising"]
    for run, result in zip(runs, evaluation.results, strict=True):
        assert sorted(figure.label for figure in result.figures) == sorted(PICTURES + names)
        pngs = [part.png for part in (*result.figures, *result.traversals)]
        assert all(png.startswith(b"\x89PNG") for png in pngs)
        sounds = {(sound.group, sound.label): sound.waveform for sound in result.sounds}
        assert set(sounds) == set(itertools.product(names, SOUNDS))
        z2 = result.traversals[1]
        assert z2.label == "traversal-z2" and z2.values == T.TRAVERSAL_VALUES.tolist()
        assert len(z2.latents) == min(T.TILED_LATENTS, run.model.config.z2_latent)
        for name in names:
            for label in SOUNDS[2:]:
                assert len(sounds[name, label]) == len(sounds[name, "source"])
                assert sounds[name, label].std() > 1e-4
        values = json.loads(json.dumps(result.values))
        assert math.isfinite(values["bound"])
        measured = {name for name, probe in values["probes"].items() if probe}
        assert measured == {"phone", "speaker", "speaker μ", "sex μ", "condition μ", "F0 μ"}
        for probe in values["probes"].values():
            if probe and probe["measure"] == "accuracy":
                assert 0 < probe["chance"] < 1
                assert 0 <= probe["z1"] <= 1 and 0 <= probe["z2"] <= 1
        # Chance is 1/40: there are 40 phones.
        assert values["movement"]["original"]["phones"] > 0.3
    text = report.render_text(evaluation)
    assert "paper" not in text and "No sounds" not in text


def test_the_whole_task_without_labels(speech, tmp_path):
    """With filter banks, and without phones and sexes, there must be pictures but no sounds, and
    dashes for unknown measures."""
    corpus = load_corpus(speech, cache=tmp_path / "cache", progress=False, note=lambda _: None)
    run = tiny_run(corpus, tmp_path / "run")
    evaluation = T.evaluate([run], Options())
    (result,) = evaluation.results
    labels = [figure.label for figure in result.figures]
    assert sorted(labels) == sorted([*PICTURES, "conversion-1", "conversion-2"])
    assert result.sounds == []
    unknown = {name for name, probe in result.values["probes"].items() if probe is None}
    assert unknown == {"phone", "sex μ", "condition μ", "tract μ"}
    movement = result.values["movement"]
    assert "phones" not in movement["original"] and "tract" not in movement["shift"]
    text = report.render_text(evaluation)
    assert "features=log_magnitude" in text and "--data conditions:" in text and "–" in text


def test_published_bounds_only_beside_their_corpus():
    rows = {"run": {"architecture": "fc", "features": "fbank", "alpha": 0.0, "bound": -1.0}}
    table = report.render_table(T.bounds_table(rows, "TIMIT"))
    assert "-348.63" in table and "-143.80" not in table
    assert "paper" not in report.render_table(T.bounds_table(rows, "built-in"))
