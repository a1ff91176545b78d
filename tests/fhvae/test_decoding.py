"""Errors and searches against brute force: every alignment, every segmentation, every path of a small case."""

import itertools
import math

import numpy as np
import pytest

from minidvae.fhvae.decoding import (
    Bigram,
    Errors,
    Lexicon,
    align,
    ctc_beam,
    ctc_greedy,
    decode_words,
    fold,
    viterbi,
)

# ---------------------------------------------------------------------------------------------------------- errors


def alignments(reference, hypothesis):
    """(substitutions, deletions, insertions) of every alignment."""
    if not reference or not hypothesis:
        yield 0, len(reference), len(hypothesis)
        return
    for s, d, i in alignments(reference[1:], hypothesis[1:]):
        yield s + (reference[0] != hypothesis[0]), d, i
    for s, d, i in alignments(reference[1:], hypothesis):
        yield s, d + 1, i
    for s, d, i in alignments(reference, hypothesis[1:]):
        yield s, d, i + 1


def test_errors_against_every_alignment():
    """Fails where an edit is missed, or a deletion is called an insertion."""
    random = np.random.default_rng(0)
    for _ in range(150):
        reference, hypothesis = (
            random.choice(list("abc"), random.integers(6)).tolist() for _ in range(2)
        )
        best = min(
            alignments(reference, hypothesis),
            key=lambda counts: (sum(counts), counts[1] + counts[2]),
        )
        assert align(reference, hypothesis) == Errors(*best, len(reference)), (
            reference,
            hypothesis,
        )


def test_error_rates_add_up():
    """Fails where rates of utterances are averaged rather than their counts, or an empty reference is a crash."""
    total = align("abcd", "abd") + align("ab", "axb") + align("a", "z")
    assert total == Errors(1, 1, 1, 7) and total.rate == 3 / 7
    assert math.isnan(align("", "x").rate) and align("", "x").insertions == 1
    words = align("the old dog saw us".split(), "the cold dog saw".split())
    assert words == Errors(substitutions=1, deletions=1, insertions=0, length=5)


# ------------------------------------------------------------------------------------------------------------ bigram


def test_bigram_by_hand():
    """Witten-Bell, by the formula with the counts written out; fails where start or end are other than symbols."""
    bigram = Bigram.fit([[0, 1, 0], [0]], size=3)
    # next: 0 three times, 1 once, end twice: three kinds in six, and four possible ones
    unigram = [(3 + 3 / 4) / 9, (1 + 3 / 4) / 9, (3 / 4) / 9, (2 + 3 / 4) / 9]
    after_0 = [
        2 * unigram[0],
        1 + 2 * unigram[1],
        2 * unigram[2],
        2 + 2 * unigram[3],
    ]  # seen: 1 once, end twice
    expected = [
        [x / 5 for x in after_0],
        [(1 + unigram[0]) / 2, *(x / 2 for x in unigram[1:])],
        unigram,
    ]
    expected.append([(2 + unigram[0]) / 3, *(x / 3 for x in unigram[1:])])  # after the start
    np.testing.assert_allclose(np.exp(bigram.matrix()), expected, rtol=1e-12)


def test_bigram_sums_to_one_also_for_what_was_not_seen():
    """Fails where smoothing gives away more or less than there is, or log 0 comes back."""
    random = np.random.default_rng(0)
    some = Bigram.fit(
        [random.integers(7, size=random.integers(5)).tolist() for _ in range(20)], size=9
    )
    for bigram in (some, Bigram.fit([], size=9)):
        probabilities = np.exp(bigram.matrix())
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
        assert probabilities.min() > 0
    assert some.log_probability(np.array([9, 2]), 9).tolist() == some.matrix()[[9, 2], 9].tolist()


# ------------------------------------------------------------------------------------------------------------- viterbi


def some_bigram(size, seed=0):
    random = np.random.default_rng(seed)
    return Bigram.fit([random.integers(size, size=4).tolist() for _ in range(3)], size)


def language_score(sequence, bigram, weight, penalty):
    previous, following = [bigram.size, *sequence], [*sequence, bigram.size]
    return (
        penalty * len(sequence)
        + weight * bigram.log_probability(np.array(previous), np.array(following)).sum()
    )


def segmentations(frames, minimum):
    """Every way to cut frames into parts of `minimum` at least: lists of (start, stop)."""
    for cuts in range(frames // minimum):
        for bounds in itertools.combinations(range(1, frames), cuts):
            parts = list(itertools.pairwise((0, *bounds, frames)))
            if all(stop - start >= minimum for start, stop in parts):
                yield parts


@pytest.mark.parametrize("minimum", [1, 2, 3])
@pytest.mark.parametrize(("weight", "penalty"), [(1.0, 0.0), (0.5, -1.5), (2.0, 3.0), (0.0, -40.0)])
def test_viterbi_against_every_segmentation(minimum, weight, penalty):
    """Fails where a duration, the start, the end, a weight or a penalty is left out or counted twice."""
    frames, phones, bigram = 4 + minimum, 3, some_bigram(3)
    for seed in range(4):
        scores = 2 * np.random.default_rng(seed).standard_normal((frames, phones))

        def score(sequence, parts, scores=scores):
            acoustic = sum(
                scores[start:stop, p].sum()
                for p, (start, stop) in zip(sequence, parts, strict=True)
            )
            return acoustic + language_score(sequence, bigram, weight, penalty)

        ways = list(segmentations(frames, minimum))
        best = max(
            score(s, parts)
            for parts in ways
            for s in itertools.product(range(phones), repeat=len(parts))
        )
        found = viterbi(scores, bigram, weight, penalty, minimum)
        reached = max(score(found, parts) for parts in ways if len(parts) == len(found))
        assert reached == pytest.approx(best, abs=1e-9), seed


def test_viterbi_of_almost_nothing():
    """Fails where an utterance shorter than a phone has no path."""
    scores = np.log([[0.1, 0.9], [0.1, 0.9]])
    assert viterbi(scores, some_bigram(2), 0.0, minimum=3) == [1]
    assert viterbi(scores[:0], some_bigram(2)) == []


# ----------------------------------------------------------------------------------------------------------------- CTC


def collapse(path):
    return tuple(k - 1 for k, _ in itertools.groupby(path) if k)


def test_greedy_ctc():
    """Fails where repetitions are not merged, or merged across a blank."""
    for path in ([0, 1, 1, 0, 1, 2, 2, 0], [2, 2, 1, 0], [0, 0], []):
        assert ctc_greedy(np.eye(3)[path].reshape(-1, 3)) == list(collapse(path))


@pytest.mark.parametrize(
    ("weight", "penalty"), [(None, 0.0), (None, 1.0), (1.0, 0.0), (0.6, 1.2), (3.0, -1.0)]
)
def test_ctc_beam_against_every_path(weight, penalty):
    """Fails where alignments of one string are not summed, the two ways to a repetition are mixed up, or the language
    counts other than once per symbol; a beam that holds every prefix must find the best string of all."""
    bigram = None if weight is None else some_bigram(2)
    for seed in range(8):
        scores = 1.5 * np.random.default_rng(seed).standard_normal((6, 3))
        scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
        strings = {}
        for path in itertools.product(range(3), repeat=6):
            score = scores[range(6), path].sum()
            string = collapse(path)
            strings[string] = np.logaddexp(strings.get(string, -np.inf), score)
        for string in strings:
            strings[string] += penalty * len(string) if bigram is None else 0.0
            strings[string] += language_score(string, bigram, weight, penalty) if bigram else 0.0
        expected = max(strings, key=strings.get)
        assert ctc_beam(scores, 1000, bigram, weight or 0.0, penalty) == list(expected), seed


def test_a_narrow_beam_is_not_worse_than_the_best_path():
    """A sum over alignments finds what the best path does not: 'a' in two frames of .4 against blank twice of .6."""
    scores = np.log([[0.6, 0.4], [0.6, 0.4]])
    assert ctc_greedy(scores) == [] and ctc_beam(scores, 2) == [0]  # .36 against .64
    assert ctc_beam(scores[:0]) == []


def plain_beam(scores, beam):
    """Prefix beam search with prefixes as tuples in a dict: log probability that they end in a blank, and that not."""
    prefixes = {(): (0.0, -np.inf)}
    for frame in scores:
        grown = {}

        def add(prefix, which, score, grown=grown):
            pair = list(grown.get(prefix, (-np.inf, -np.inf)))
            pair[which] = np.logaddexp(pair[which], score)
            grown[prefix] = tuple(pair)

        for prefix, (in_blank, in_label) in prefixes.items():
            add(prefix, 0, np.logaddexp(in_blank, in_label) + frame[0])
            for symbol, score in enumerate(frame[1:]):
                if prefix[-1:] == (symbol,):
                    add(prefix, 1, in_label + score)
                    add((*prefix, symbol), 1, in_blank + score)
                else:
                    add((*prefix, symbol), 1, np.logaddexp(in_blank, in_label) + score)
        kept = sorted(grown, key=lambda prefix: -np.logaddexp(*grown[prefix]))[:beam]
        prefixes = {prefix: grown[prefix] for prefix in kept}
    return max(prefixes, key=lambda prefix: np.logaddexp(*prefixes[prefix]))


def test_narrow_beams_against_plain_python():
    """Fails where a prefix that left the beam and came back is taken for another than the one that its extensions
    know: the same string would then be in the beam twice, each with a part of its probability."""
    random = np.random.default_rng(3)
    for beam in (2, 5, 12, 12, 12, 12):
        scores = np.log(random.dirichlet(np.full(4, 0.4), 20) + 1e-9)
        assert ctc_beam(scores, beam) == list(plain_beam(scores, beam))


# --------------------------------------------------------------------------------------------------------------- words

# Words of phones 0 to 2, 3 is silence. 0 and 1 sound the same, 2 begins another word, 4 has two pronunciations.
PRONUNCIATIONS = [(0, (0, 1)), (1, (0, 1)), (2, (0,)), (3, (2, 2)), (4, (1,)), (4, (2, 0))]
WORDS, SILENCE = 5, 3


def word_sequences(longest, silence):
    """(words, phones) of every sequence of pronunciations, with and without silences."""
    units = [((word,), phones) for word, phones in PRONUNCIATIONS] + (
        [((), (SILENCE,))] if silence else []
    )
    for count in range(1, longest + 1):
        for chosen in itertools.product(units, repeat=count):
            words = tuple(w for unit, _ in chosen for w in unit)
            yield words, tuple(p for _, phones in chosen for p in phones)


@pytest.mark.parametrize(
    ("weight", "penalty", "minimum"), [(1.0, 0.0, 1), (2.0, 1.0, 2), (0.3, 4.0, 1)]
)
def test_words_against_every_segmentation(weight, penalty, minimum):
    """Fails where a word is lost that shares its beginning or its sound, a silence counts as a word, or the language
    forgets the word before a silence. `longest` units is as many as fit into the frames."""
    frames, bigram = 5 if minimum == 1 else 7, some_bigram(WORDS)
    longest = frames // minimum
    candidates = {}
    for words, phones in word_sequences(longest, True):
        if len(phones) <= longest:
            candidates.setdefault(phones, set()).add(words)
    lexicon = Lexicon.build(PRONUNCIATIONS, bigram, SILENCE, minimum)
    for seed in range(2):
        scores = 2 * np.random.default_rng(seed).standard_normal((frames, 4))
        results = {}
        for phones, sequences in candidates.items():
            acoustic = max(
                sum(
                    scores[start:stop, p].sum()
                    for p, (start, stop) in zip(phones, parts, strict=True)
                )
                for parts in segmentations(frames, minimum)
                if len(parts) == len(phones)
            )
            for words in sequences:
                score = acoustic + language_score(words, bigram, weight, penalty)
                results[words] = max(score, results.get(words, -np.inf))
        expected = max(results, key=results.get)
        assert decode_words(scores, lexicon, weight, penalty, 10**6, 10**6) == list(expected), seed


@pytest.mark.parametrize("silence", [None, SILENCE])
def test_words_of_ctc_against_every_path(silence):
    """Fails where a blank is asked for, or left out between two labels that are the same, inside words or between."""
    frames, bigram, weight, penalty = 5, some_bigram(WORDS, 1), 0.7, 1.0
    outputs = [(word, tuple(p + 1 for p in phones)) for word, phones in PRONUNCIATIONS]
    lexicon = Lexicon.build(outputs, bigram, None if silence is None else silence + 1, blank=0)
    readings = {}
    for words, phones in word_sequences(frames, silence is not None):
        if len(phones) <= frames:
            readings.setdefault(phones, set()).add(words)
    readings[()] = {()}
    for seed in range(3):
        scores = 2 * np.random.default_rng(seed).standard_normal((frames, 5 if silence else 4))
        results = {}
        for path in itertools.product(range(scores.shape[1]), repeat=frames):
            for words in readings.get(collapse(path), ()):
                score = scores[range(frames), path].sum() + language_score(
                    words, bigram, weight, penalty
                )
                results[words] = max(score, results.get(words, -np.inf))
        expected = max(results, key=results.get)
        assert decode_words(scores, lexicon, weight, penalty, 10**6, 10**6) == list(expected), seed


def test_a_narrow_word_beam_still_finds_clear_speech():
    """Fails where pruning drops the best token, or an utterance that stops within a word is lost whole."""
    phones = [0, 1, 3, 2, 2, 1, 0]
    scores = np.full((28, 4), -6.0)
    scores[np.arange(28), np.repeat(phones, 4)] = -0.1
    lexicon = Lexicon.build(PRONUNCIATIONS, Bigram.fit([[0, 3, 4, 2]], WORDS), SILENCE, 3)
    assert decode_words(scores, lexicon, tokens=8, word_ends=4) == [0, 3, 4, 2]
    only = Lexicon.build([(0, (0, 1))], Bigram.fit([[0]], 1), minimum=3)
    assert decode_words(scores[:12], only, tokens=1, word_ends=1) in ([0], [0, 0])
    assert decode_words(scores[:2], only) == []


# ---------------------------------------------------------------------------------------------------------------- TIMIT


def test_timit_folding():
    """Fails where the 61 labels do not become the 39 of Lee and Hon."""
    labels = """iy ih eh ey ae aa aw ay ah ao oy ow uh uw ux er ax ix axr ax-h jh ch b d g p t k dx q s sh z zh f th v
        dh m n ng em en eng nx hh hv l r w y el bcl dcl gcl pcl tcl kcl epi pau h#""".split()
    assert len(labels) == 61 and len(set(fold(labels))) == 39 and len(fold(labels)) == 60
    assert (
        fold("h# sh ix hv eh dcl jh q ih kcl zh h#".split())
        == "sil sh ih hh eh sil jh ih sil sh sil".split()
    )
