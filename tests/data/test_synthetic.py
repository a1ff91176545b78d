"""The built-in corpus sounds as its tables and its ground truth say."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import solve_toeplitz
from scipy.signal import resample_poly
from scipy.stats import kurtosis

from minidvae.data import synthetic
from minidvae.data.synthetic import SAMPLE_RATE

FEMALE, MALE = synthetic.make_speakers(seed=0, train=2, dev=0, test=0)
# Peterson and Barney 1952, men: F1 and F2 in Hz, and a word of the lexicon with the vowel.
PETERSON_BARNEY = {
    "iy": (270, 2290, "cheese"),
    "eh": (530, 1840, "bread"),
    "ae": (660, 1720, "hat"),
    "aa": (730, 1090, "clock"),
    "uw": (300, 870, "goose"),
    "uh": (440, 1020, "book"),
}


@pytest.fixture(scope="module")
def corpus():
    return list(synthetic.generate(seed=0, speakers=(6, 2, 2), utterances=6))


def say(speaker, words, seed=0):
    """(control tracks, waveform) of a sentence."""
    rng = np.random.default_rng(seed)
    tracks = synthetic.articulate(speaker, words.split(), rng)
    return tracks, synthetic.render(speaker, tracks, rng)


def cut(waveform, start, stop):
    """Part of a waveform, times in ms."""
    return waveform[start * SAMPLE_RATE // 1000 : stop * SAMPLE_RATE // 1000]


def f0_by_autocorrelation(x):
    """Hz, between 60 and 400."""
    power = np.abs(np.fft.rfft((x - x.mean()) * np.hanning(len(x)), 2 * len(x))) ** 2
    window = np.abs(np.fft.rfft(np.hanning(len(x)), 2 * len(x))) ** 2
    correlation = (np.fft.irfft(power) / np.fft.irfft(window))[: SAMPLE_RATE // 60]
    lags = np.arange(SAMPLE_RATE // 400, len(correlation) - 1)
    here, left, right = correlation[lags], correlation[lags - 1], correlation[lags + 1]
    peaks = lags[(here >= left) & (here > right)]
    return SAMPLE_RATE / peaks[correlation[peaks] > 0.9 * correlation[peaks].max()][0]


def formants_by_lpc(x):
    """Formants in Hz up to 5 kHz, by linear prediction of order 12 at 10 kHz."""
    x = resample_poly(x, 5, 8)
    x = np.append(x[0], x[1:] - 0.97 * x[:-1]) * np.hamming(len(x))
    correlation = np.correlate(x, x, "full")[len(x) - 1 :][:13]
    roots = np.roots(np.append(1, -solve_toeplitz(correlation[:-1], correlation[1:])))
    frequency, bandwidth = np.angle(roots) * 5000 / np.pi, -np.log(np.abs(roots)) * 10000 / np.pi
    return np.sort(frequency[(frequency > 150) & (bandwidth < 500)])


def spectrum(x):
    return np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE), np.abs(np.fft.rfft(x)) ** 2


def pooled(corpus, measure):
    """{phone: median of measure(samples, utterance)} over all its tokens."""
    values = {}
    for utterance in corpus:
        waveform = utterance.waveform / 32768
        for start, stop, label in utterance.phones:
            values.setdefault(label, []).append(measure(waveform[start:stop], utterance))
    return {label: np.median(tokens) for label, tokens in values.items()}


# ---- The waveform ----------------------------------------------------------------------------------------


def test_f0_follows_the_contour():
    errors = []
    for speaker in synthetic.make_speakers(seed=1, train=6, dev=0, test=0):
        tracks, waveform = say(speaker, "now , the judge found my yellow window")
        for segment in tracks.segments:
            if segment.stress == "1" and segment.stop - segment.start > 60:
                middle = (segment.start + segment.stop) // 2
                measured = f0_by_autocorrelation(cut(waveform, middle - 25, middle + 25))
                errors.append(measured / tracks.f0[middle] - 1)
    assert np.median(np.abs(errors)) < 0.01
    assert np.mean(np.abs(errors) < 0.05) > 0.9


def test_mean_f0_is_that_of_the_speaker():
    for speaker in (FEMALE, MALE):
        means = []
        for seed in range(5):
            tracks, _ = say(speaker, "the boy saw a green tree", seed)
            means.append(
                np.mean([tracks.f0[s.start : s.stop].mean() for s in tracks.segments if s.stress])
            )
        assert np.mean(means) == pytest.approx(speaker.f0, rel=0.06)


@pytest.mark.parametrize("length", [17.5, 15.0])
@pytest.mark.parametrize("vowel", PETERSON_BARNEY)
def test_formants_are_those_of_the_table_scaled_by_the_tract(vowel, length):
    *table, word = PETERSON_BARNEY[vowel]
    speaker = replace(
        MALE, f0=100.0, vocal_tract_length=length, formant_factors=(1.0,) * 8, rate=0.7
    )
    measured = []
    for seed in range(5):
        tracks, waveform = say(speaker, word, seed)
        segment = next(s for s in tracks.segments if s.label == vowel)
        middle = (segment.start + segment.stop) // 2
        measured.append(formants_by_lpc(cut(waveform, middle - 30, middle + 30))[:2])
    np.testing.assert_allclose(
        np.median(measured, axis=0), np.array(table) * 17.5 / length, rtol=0.09
    )


def test_second_formant_moves_through_diphthongs_and_glides():
    """Klatt 1980: "oy" rises from 960 to 1820 Hz, "w" starts at 610 Hz; measured on the waveform."""
    speaker = replace(MALE, f0=90.0, vocal_tract_length=17.5, formant_factors=(1.0,) * 8, rate=0.7)
    tracks, waveform = say(speaker, "boy , we")
    oy, w, iy = (
        next(s for s in tracks.segments if s.label == label) for label in ("oy", "w", "iy")
    )

    def second_formant(time):
        return formants_by_lpc(cut(waveform, time - 20, time + 20))[1]

    assert second_formant(oy.stop - 45) > 1.5 * second_formant(oy.start + 75)
    assert second_formant((iy.start + iy.stop) // 2) > 2 * second_formant((w.start + w.stop) // 2)


def test_fricatives_have_the_spectrum_of_their_place(corpus):
    def centroid(x, utterance):
        frequency, power = spectrum(x)
        return (frequency * power).sum() / power.sum()

    centre = pooled(corpus, centroid)
    assert max(centre[label] for label in PETERSON_BARNEY if label in centre) < 1500
    assert min(centre[label] for label in ("f", "s", "sh", "ch", "t")) > 2500
    assert centre["s"] > 1.2 * centre["sh"]  # Jongman et al. 2000: 6133 against 4229 Hz


def test_high_frequencies_of_s_and_low_frequencies_of_voicing(corpus):
    def balance(x, utterance):
        frequency, power = spectrum(x)
        return 10 * np.log10(power[frequency > 4000].sum() / power[frequency < 1000].sum())

    ratio = pooled(corpus, balance)
    assert ratio["s"] > 10  # noise only
    assert -10 < ratio["z"] < ratio["s"] - 5  # both sources
    assert ratio["iy"] < -10 and ratio["n"] < -10


@pytest.mark.parametrize("word, stop", [("water", "t"), ("happy", "p"), ("noticed", "t")])
def test_stops_have_a_closure_and_a_burst(word, stop):
    def level(x):
        return 10 * np.log10(np.mean(x**2))

    for speaker in (FEMALE, MALE):
        tracks, waveform = say(speaker, f"the {word}")
        i = next(i for i, s in enumerate(tracks.segments) if s.label == stop)
        segment, before = tracks.segments[i], tracks.segments[i - 1]
        burst = segment.stop - segment.release
        closure = level(cut(waveform, segment.start + 15, burst - 5))
        assert level(cut(waveform, before.start, before.stop)) - closure > 25
        assert level(cut(waveform, burst, burst + 8)) - closure > 10


def test_voiced_stops_have_a_voice_bar():
    """Between vowels "d" keeps voicing in its closure, at low frequencies only; "t" does not."""
    level = {}
    for stop, words in (("d", "every doctor"), ("t", "every toy")):
        tracks, waveform = say(replace(MALE, f0=110.0), words)
        segment = next(s for s in tracks.segments if s.label == stop)
        frequency, power = spectrum(
            cut(waveform, segment.start + 15, segment.stop - segment.release - 5)
        )
        level[stop] = 10 * np.log10([power[frequency < 500].sum(), power[frequency > 1500].sum()])
    assert level["d"][0] - level["t"][0] > 15
    assert level["d"][0] - level["d"][1] > 20


def test_breathiness_is_noise_between_the_harmonics():
    """The level between harmonics rises with the aspiration noise, by about the difference in breathiness."""
    floor = []
    for breathiness in (-36.0, -16.0):
        speaker = replace(
            MALE, f0=120.0, f0_range=0.0, jitter=0.0, shimmer=0.0, breathiness=breathiness
        )
        tracks, waveform = say(speaker, "saw")
        segment = next(s for s in tracks.segments if s.label == "ao")
        x = cut(waveform, segment.start + 60, segment.stop - 60)
        frequency, power = spectrum(x * np.blackman(len(x)))
        cycle = frequency / tracks.f0[(segment.start + segment.stop) // 2] % 1
        between = (np.abs(cycle - 0.5) < 0.1) & (frequency > 400) & (frequency < 2500)
        floor.append(10 * np.log10(power[between].mean() / power.mean()))
    assert 14 < floor[1] - floor[0] < 24


def test_no_aliasing_of_the_glottal_pulses():
    """Energy between the harmonics of a steady vowel without noise stays 60 dB below the harmonics."""
    speaker = replace(
        FEMALE, f0=250.0, f0_range=0.0, jitter=0.0, shimmer=0.0, tilt=0.5, breathiness=-200.0
    )
    rng = np.random.default_rng(0)
    tracks = synthetic.articulate(speaker, ["saw"], rng)
    ao = next(s for s in tracks.segments if s.label == "ao")
    n = len(tracks.f0)
    middle = np.full(n, (ao.start + ao.stop) // 2)
    held = {name: getattr(tracks, name)[middle] for name in ("formants", "bandwidths", "tilt")}
    steady = tracks._replace(f0=np.full(n, 250.0), voicing=np.ones(n), **held)
    phase = np.cumsum(np.repeat(steady.f0, 16)) / SAMPLE_RATE
    x = synthetic._voiced(speaker, steady, phase, rng)[
        3200 : 3200 + 6400
    ]  # 100 periods of 64 samples
    power = np.abs(np.fft.rfft(x)) ** 2
    between = np.arange(len(power)) % 100 > 0
    assert power[between].sum() / power.sum() < 1e-6


def test_female_and_male_voices_differ():
    speakers = synthetic.make_speakers(seed=0)
    women, men = (
        np.array([(s.f0, s.vocal_tract_length) for s in speakers if s.sex == sex]).T for sex in "FM"
    )
    assert women[0].min() > men[0].max()
    assert women[1].mean() < men[1].mean() - 1.5
    assert len({s.f0 for s in speakers}) == len(speakers)
    for split, count in (("train", 32), ("dev", 8), ("test", 8)):
        sexes = [s.sex for s in speakers if s.split == split]
        assert len(sexes) == count and sexes.count("F") == count // 2
    assert len({s.name for s in speakers}) == 48


def test_waveforms_are_whole(corpus):
    for u in corpus:
        assert u.waveform.dtype == np.int16
        assert (
            abs(np.abs(u.waveform.astype(int)).max() - 0.99 * 32767) <= 1
        )  # the peak, not clipped
        assert 1.5 < len(u.waveform) / SAMPLE_RATE < 6
        assert abs(u.waveform.mean()) < 0.01 * u.waveform.std()  # no offset
        frames = u.waveform[: len(u.waveform) // 160 * 160].reshape(-1, 160).astype(float)
        level = 20 * np.log10(frames.std(axis=1).min() / 32767)
        assert -70 < level < -45  # a noise floor, never digital silence


# ---- Labels, text, reproducibility -----------------------------------------------------------------------


def test_labels_cover_the_waveform_and_spell_the_text(corpus):
    for u in corpus:
        starts, stops, labels = zip(*u.phones, strict=True)
        assert starts[0] == 0 and stops[-1] == len(u.waveform) and starts[1:] == stops[:-1]
        assert all(stop > start for start, stop, _ in u.phones)
        assert labels[0] == labels[-1] == "sil"
        spelled = [
            symbol.rstrip("01") for word in u.text.split() for symbol in synthetic.LEXICON[word]
        ]
        assert [label for label in labels if label != "sil"] == spelled


def test_lexicon_uses_every_phone():
    used = {
        symbol.rstrip("01")
        for pronunciation in synthetic.LEXICON.values()
        for symbol in pronunciation
    }
    assert set(synthetic.TABLE) == used
    assert len(synthetic.TABLE) == 39  # ARPAbet as CMUdict uses it
    assert 100 <= len(synthetic.LEXICON) <= 150


def test_sentences_of_every_split_use_every_phone():
    rng = np.random.default_rng(0)
    for split in synthetic.SPLITS:
        sentences = [synthetic.make_sentence(split, rng) for _ in range(80)]
        words = set(itertools.chain(*sentences)) - {","}
        assert {s.rstrip("01") for word in words for s in synthetic.LEXICON[word]} == set(
            synthetic.TABLE
        )
        assert len(set(map(tuple, sentences))) > 70


def test_no_sentence_occurs_in_two_splits(monkeypatch):
    """A grammar of 108 sentences, drawn 200 times for each split: chance alone would repeat many."""
    monkeypatch.setattr(synthetic, "SENTENCES", ("pronoun verb",))
    rng = np.random.default_rng(0)
    train, dev, test = (
        {" ".join(synthetic.make_sentence(split, rng)) for _ in range(200)}
        for split in synthetic.SPLITS
    )
    assert dev and test and not (train & dev or train & test or dev & test)


def test_same_seed_same_samples(corpus):
    once_more = itertools.islice(synthetic.generate(seed=0, speakers=(6, 2, 2), utterances=6), 8)
    for u, again in zip(corpus[:8], once_more, strict=True):
        assert np.array_equal(u.waveform, again.waveform)
        assert (u.phones, u.text) == (again.phones, again.text)
    other = next(synthetic.generate(seed=1, speakers=(1, 0, 0), utterances=1))
    assert other.text != corpus[0].text


def test_an_utterance_does_not_depend_on_the_size_of_the_corpus(corpus):
    by_name = {u.name: u for u in corpus}
    for u in synthetic.generate(seed=0, speakers=(3, 0, 2), utterances=2):
        assert np.array_equal(u.waveform, by_name[u.name].waveform)


def test_generation_is_fast():
    """The default corpus has 480 utterances: at half a second each it would take four minutes."""
    start = time.perf_counter()
    assert len(list(synthetic.generate(seed=3, speakers=(2, 0, 0), utterances=5))) == 10
    assert time.perf_counter() - start < 5


# ---- Conditions ------------------------------------------------------------------------------------------


@pytest.fixture
def clean():
    return say(MALE, "the old king saw a green bird")[1]


def test_noise_is_added_between_5_and_15_db(clean):
    for seed in range(10):
        noisy = synthetic.apply_condition(clean, "noise", np.random.default_rng(seed))
        gain = np.linalg.lstsq(clean[:, None], noisy, rcond=None)[0]
        ratio = 20 * np.log10(np.std(gain * clean) / np.std(noisy - gain * clean))
        assert 4.5 < ratio < 15.5
        assert np.abs(noisy).max() == pytest.approx(1)


def test_channel_is_a_linear_filter_that_differs_by_draw(clean):
    """The spectrum of the speech is multiplied by the response to an impulse; draws differ in colour."""

    def channel(x, seed):
        y = synthetic.apply_condition(x, "channel", np.random.default_rng(seed))
        return y / np.linalg.norm(y)

    impulse = np.zeros(len(clean))
    impulse[len(clean) // 2] = 1.0
    responses = [
        20 * np.log10(np.abs(np.fft.rfft(channel(impulse, seed))[200:-200])) for seed in range(5)
    ]
    for seed, response in enumerate(responses):
        assert np.ptp(response) > 6
        expected = np.abs(np.fft.rfft(clean))[200:-200] * 10 ** (response / 20)
        measured = np.abs(np.fft.rfft(channel(clean, seed)))[200:-200]
        assert np.corrcoef(expected, measured)[0, 1] > 0.99
    assert max(np.std(responses[0] - response) for response in responses[1:]) > 3


@pytest.mark.parametrize("condition", synthetic.CONDITIONS)
def test_conditions_keep_type_and_peak_and_repeat(condition, clean):
    integers = np.rint(32000 * clean).astype(np.int16)
    once, again = (
        synthetic.apply_condition(integers, condition, np.random.default_rng(7)) for _ in range(2)
    )
    assert once.dtype == np.int16 and np.abs(once.astype(int)).max() == 32000
    assert np.array_equal(once, again)
    assert np.array_equal(once, integers) == (condition == "clean")


def test_conditions_lie_over_the_same_speech(corpus):
    noisy = synthetic.apply_condition(corpus[0].waveform, "noise", np.random.default_rng(0))
    assert np.corrcoef(noisy, corpus[0].waveform)[0, 1] > 0.8


def test_unknown_condition_names_the_right_ones(clean):
    with pytest.raises(ValueError, match="clean, noise, channel, both"):
        synthetic.apply_condition(clean, "reverb", np.random.default_rng(0))


def test_noises_sound_like_their_names(clean, monkeypatch):
    """White noise has no flat spectrum, a car no more below 500 Hz than above, a restaurant no blows; or babble is not
    made of the voices given."""

    def noise(kind, babble=lambda n, rng: rng.standard_normal(n)):
        monkeypatch.setattr(synthetic, "NOISES", (kind,))
        silence = np.full(10 * SAMPLE_RATE, 1e-9)
        silence[0] = 1e-3  # what is left beside the noise
        return synthetic.apply_condition(silence, "noise", np.random.default_rng(0), babble)[1:]

    def low(x):
        power = np.abs(np.fft.rfft(x)) ** 2
        return power[: len(power) // 16].sum() / power.sum()

    assert low(noise("white")) == pytest.approx(1 / 16, rel=0.1)
    assert low(noise("car")) > 0.5
    tone = np.sin(0.3 * np.arange(10 * SAMPLE_RATE))
    assert abs(np.corrcoef(noise("babble", lambda n, rng: tone[:n]), tone[1:])[0, 1]) > 0.999
    assert kurtosis(noise("restaurant")) > 5 > 0.1 > abs(kurtosis(noise("white")))
