"""Decoding of a recogniser's output to phones, characters or words, and the errors in the result.
This file knows no model and no corpus.

Symbols (phones, characters) and words are numbers; scores are natural logarithms. The searches
maximise

    Σ_t log-likelihood of frame t  +  weight · log P(sequence)  +  penalty · its length

with P from a `Bigram`, and the length in symbols or words. A positive penalty makes sequences
longer.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

# ------------------------------------------------------------------------------------------ errors


@dataclass(frozen=True)
class Errors:
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0  # number of symbols in the reference

    @property
    def count(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per symbol of the reference; nan where it has none."""
        return self.count / self.length if self.length else float("nan")

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.length + other.length,
        )


def align(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Errors:
    """Return the fewest edits that turn the reference into the hypothesis (Levenshtein 1966); among
    those, the ones with the fewest insertions and deletions.

    A substitution costs `edit`, an insertion or deletion `edit` + 1, where `edit` is larger than
    the largest possible number of insertions and deletions. The total cost then says how many
    there are of each, and no path needs to be traced back.
    """
    numbers = {}
    reference_ids = []
    for symbol in reference:
        reference_ids.append(numbers.setdefault(symbol, len(numbers)))
    hypothesis_ids = []
    for symbol in hypothesis:
        hypothesis_ids.append(numbers.setdefault(symbol, len(numbers)))
    hypothesis_ids = np.array(hypothesis_ids, int)
    edit = len(reference_ids) + len(hypothesis_ids) + 1
    insertions = np.arange(len(hypothesis_ids) + 1) * (edit + 1)
    costs = insertions  # costs of the prefixes of the hypothesis, for a prefix of the reference
    for symbol in reference_ids:
        deleted = costs[1:] + edit + 1
        substituted = costs[:-1] + edit * (hypothesis_ids != symbol)
        costs = np.append(costs[0] + edit + 1, np.minimum(deleted, substituted))
        costs = np.minimum.accumulate(costs - insertions) + insertions
    num_edits, num_indels = divmod(int(costs[-1]), edit)
    num_deletions = (num_indels + len(reference_ids) - len(hypothesis_ids)) // 2
    return Errors(
        substitutions=num_edits - num_indels,
        deletions=num_deletions,
        insertions=num_indels - num_deletions,
        length=len(reference_ids),
    )


# ------------------------------------------------------------------------------------------ bigram


@dataclass(frozen=True)
class Bigram:
    """P(next | previous) over symbols 0 … size − 1. As a previous symbol, `size` is the start of a
    sequence; as a next one, its end.

    Witten and Bell's smoothing (1991, method C), interpolated as in Chen and Goodman, An empirical
    study of smoothing techniques for language modeling, 1998, section 2.5:

        P(w | v) = (c(v, w) + T(v)·P(w)) / (c(v) + T(v))
        P(w) = (c(w) + T / (size + 1)) / (c + T)

    with T(v) the number of different symbols observed after v, and T of all that were observed.
    """

    size: int
    unigram: np.ndarray  # P(w), (size + 1,)
    backoff: np.ndarray  # T(v) / (c(v) + T(v)), 1 where v was not observed, (size + 1,)
    keys: np.ndarray  # v·(size + 1) + w of the observed pairs, sorted
    discounted: np.ndarray  # c(v, w) / (c(v) + T(v)) of each observed pair

    @classmethod
    def fit(cls, sequences: Iterable[Sequence[int]], size: int) -> "Bigram":
        """Return the bigram of sequences of numbers below `size`."""
        pairs = []
        for sequence in sequences:
            for previous, following in itertools.pairwise([size, *sequence, size]):
                pairs.append(previous * (size + 1) + following)
        keys, counts = np.unique(np.array(pairs, np.int64), return_counts=True)
        previous, following = np.divmod(keys, size + 1)
        unigram_counts = np.bincount(following, counts, minlength=size + 1)
        num_types = max(1, np.count_nonzero(unigram_counts))
        unigram = unigram_counts + num_types / (size + 1)
        unigram = unigram / (unigram_counts.sum() + num_types)
        types_after = np.bincount(previous, minlength=size + 1)
        totals = np.bincount(previous, counts, minlength=size + 1) + types_after
        backoff = np.divide(types_after, totals, out=np.ones(size + 1), where=totals > 0)
        return cls(size, unigram, backoff, keys, counts / totals[previous])

    def log_probability(self, previous, following) -> np.ndarray:
        """Return ln P(following | previous) of arrays whose shapes broadcast."""
        previous, following = np.broadcast_arrays(previous, following)
        probability = self.backoff[previous] * self.unigram[following]
        if len(self.keys):
            keys = previous * (self.size + 1) + following
            rows = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            is_observed = self.keys[rows] == keys
            probability = probability + np.where(is_observed, self.discounted[rows], 0.0)
        return np.log(probability)

    def matrix(self) -> np.ndarray:
        """Return ln P of all pairs (previous, next), (size + 1, size + 1)."""
        numbers = np.arange(self.size + 1)
        return self.log_probability(numbers[:, None], numbers)


# ---------------------------------------------------------------------- phones, frame-wise networks


def viterbi(
    log_likelihoods: np.ndarray, bigram: Bigram, weight=1.0, penalty=0.0, minimum=3
) -> list[int]:
    """Return the best sequence of phones, each of at least `minimum` frames.

    A phone is a left-to-right HMM of `minimum` states, of which the last repeats. The same phone
    may come twice in a row. Fewer frames than `minimum` are one phone.

    Args:
        log_likelihoods: (frames, phones). Of a network log p(phone | x) − log p(phone), which is
            log p(x | phone) up to a constant per frame (Bourlard and Morgan, Connectionist speech
            recognition, 1994).
    """
    num_frames, num_phones = log_likelihoods.shape
    minimum = max(1, min(minimum, num_frames))
    transitions = weight * bigram.matrix() + penalty
    between_phones = transitions[:-1, :-1].T.copy()  # (next, previous)
    to_end = transitions[:-1, -1] - penalty
    # The best phone before each phone that begins at a frame, and whether the last state of a
    # phone was reached from itself.
    previous_phone = np.zeros((num_frames + 1, num_phones), int)
    has_repeated = np.zeros((num_frames, num_phones), bool)
    states = np.full((minimum, num_phones), -np.inf)  # scores
    entering = transitions[-1, :-1]
    for t, likelihoods in enumerate(log_likelihoods):
        reached = np.concatenate([entering[None], states[:-1]])
        has_repeated[t] = states[-1] > reached[-1]
        np.maximum(reached[-1], states[-1], out=reached[-1])
        states = reached + likelihoods
        candidates = between_phones + states[-1]
        previous_phone[t + 1] = candidates.argmax(1)
        entering = candidates.max(1)

    # Trace the best path back.
    phone = int((states[-1] + to_end).argmax())
    stop = num_frames
    path = []
    while stop:
        t = stop - 1
        while has_repeated[t, phone]:
            t -= 1
        stop = t - minimum + 1
        path.append(phone)
        phone = int(previous_phone[stop, phone])
    return path[::-1]


# --------------------------------------------------------------------------------------------- CTC


def ctc_greedy(log_probabilities: np.ndarray) -> list[int]:
    """Return the symbols of the best path of CTC, from 0: repetitions merged, blanks left out.
    log_probabilities: (frames, 1 + symbols), of which output 0 is the blank."""
    best = log_probabilities.argmax(1)
    previous = np.append(0, best[:-1])
    is_new_symbol = (best != 0) & (best != previous)
    return (best[is_new_symbol] - 1).tolist()


def ctc_beam(
    log_probabilities: np.ndarray,
    beam: int = 16,
    bigram: Bigram | None = None,
    weight=1.0,
    penalty=0.0,
) -> list[int]:
    """Return the most probable sequence of symbols, summed over its alignments, among those that
    stay in the beam.

    Prefix beam search (Hannun et al., First-pass large vocabulary continuous speech recognition
    using bi-directional recurrent DNNs, 2014). log_probabilities: (frames, 1 + symbols), of which
    output 0 is the blank.
    """
    num_symbols = log_probabilities.shape[1] - 1
    if bigram is None:
        language = np.zeros((num_symbols + 1, num_symbols + 1))
    else:
        language = weight * bigram.matrix()
    prefixes = [()]
    # Log-probabilities that a prefix ended in a blank, or in its last symbol.
    in_blank = np.zeros(1)
    in_symbol = np.full(1, -np.inf)
    for frame in log_probabilities:
        last = last_symbols(prefixes, num_symbols)
        total = np.logaddexp(in_blank, in_symbol)
        # Each prefix extended by each symbol, (prefixes, symbols). The last symbol once more needs
        # a blank between the two.
        from_prefix = np.repeat(total[:, None], num_symbols, 1)
        not_empty = np.flatnonzero(last < num_symbols)
        from_prefix[not_empty, last[not_empty]] = in_blank[not_empty]
        extended = from_prefix + language[last, :-1] + penalty + frame[1:]
        in_symbol = in_symbol + np.append(frame[1:], 0.0)[last]

        # An extension may be a prefix that is in the beam already: add the two.
        rows = {prefix: row for row, prefix in enumerate(prefixes)}
        for row, prefix in enumerate(prefixes):
            parent = rows.get(prefix[:-1]) if prefix else None
            if parent is not None:
                in_symbol[row] = np.logaddexp(in_symbol[row], extended[parent, last[row]])
                extended[parent, last[row]] = -np.inf

        # Keep the best.
        in_blank = np.append(total + frame[0], np.full(extended.size, -np.inf))
        in_symbol = np.append(in_symbol, extended)
        scores = np.logaddexp(in_blank, in_symbol)
        best = np.argsort(-scores, kind="stable")[:beam]
        best = best[scores[best] > -np.inf]
        in_blank = in_blank[best]
        in_symbol = in_symbol[best]
        candidates = []
        for index in best.tolist():
            if index < len(prefixes):
                candidates.append(prefixes[index])
            else:
                row, symbol = divmod(index - len(prefixes), num_symbols)
                candidates.append((*prefixes[row], symbol))
        prefixes = candidates
    scores = np.logaddexp(in_blank, in_symbol) + language[last_symbols(prefixes, num_symbols), -1]
    return list(prefixes[scores.argmax()])


def last_symbols(prefixes: list[tuple[int, ...]], num_symbols: int) -> np.ndarray:
    """Return the last symbol of each prefix; of the empty one, the number of symbols."""
    symbols = []
    for prefix in prefixes:
        symbols.append(prefix[-1] if prefix else num_symbols)
    return np.array(symbols)


# ------------------------------------------------------------------------------------------- words


def follow(links: csr_array, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all entries in some rows (n,) of a sparse matrix: the index into `rows` of each, and
    its column."""
    starts = links.indptr[rows]
    counts = links.indptr[rows + 1] - starts
    indices = np.repeat(np.arange(len(rows)), counts)
    within_row = np.arange(len(indices)) - np.repeat(np.cumsum(counts) - counts, counts)
    return indices, links.indices[starts[indices] + within_row]


@dataclass(frozen=True)
class Lexicon:
    """The pronunciations of words as one network of states: a tree in which words share their
    beginnings.

    Every state stands for one output of the recogniser, and takes one frame or more. In a
    frame-wise recogniser a phone is `minimum` states in a row, of which only the last repeats. In
    CTC it is the label and a blank after it, which is optional except between two equal labels.
    """

    bigram: Bigram  # bigram of the words
    outputs: np.ndarray  # (states,), the output that each state stands for
    repeats: np.ndarray  # (states,), whether a state may follow itself
    lookahead: np.ndarray  # (states,), ln P of the most frequent word that can still follow
    arcs: csr_array  # (states, states), an entry where one may follow the other
    ends: csr_array  # (states, words + 1), an entry where a word may end; last column: a silence
    entries: np.ndarray  # states that a word, or a silence, begins with
    is_ctc: bool  # Two states of the same output then need another state between them.

    @classmethod
    def build(
        cls,
        pronunciations: Iterable[tuple[int, Sequence[int]]],
        bigram: Bigram,
        silence=None,
        minimum=3,
        blank=None,
    ) -> "Lexicon":
        """Return the network of these words.

        Args:
            pronunciations: (word, its outputs), once for each pronunciation of a word.
            bigram: of words.
            silence: an output that may come before and after any word.
            minimum: frames of an output, in a frame-wise network.
            blank: the output that is CTC's blank; None: a frame-wise network.
        """
        network = StateNetwork(blank)
        log_unigram = np.log(bigram.unigram).tolist()
        children = {}  # (states of the output before, output) → states of the output
        for word, pronunciation in pronunciations:
            states = range(0)
            previous_output = None
            for output in pronunciation:
                if (states, output) not in children:
                    # Two equal labels of CTC need the blank between them, the last state.
                    is_repetition = output == previous_output
                    before = states[-1:] if is_repetition else network.exits_of(states)
                    children[states, output] = network.add(output, minimum, before)
                states = children[states, output]
                previous_output = output
                for state in states:
                    network.lookahead[state] = max(network.lookahead[state], log_unigram[word])
            network.add_end(states, word)
        # After a silence, any word may follow.
        most_frequent = max(network.lookahead)
        for output in (silence, blank):
            if output is not None:
                states = network.add(output, 1, ())
                network.add_end(states, bigram.size)
                for state in states:
                    network.lookahead[state] = most_frequent
        return cls(
            bigram,
            np.array(network.outputs),
            np.array(network.repeats),
            np.array(network.lookahead),
            network.sparse_matrix(network.arcs, len(network.outputs)),
            network.sparse_matrix(network.ends, bigram.size + 1),
            np.array(network.entries),
            is_ctc=blank is not None,
        )


class StateNetwork:
    """The states of a Lexicon while it is built."""

    def __init__(self, blank: int | None):
        self.blank = blank
        self.outputs = []
        self.repeats = []
        self.lookahead = []
        self.arcs = []  # (state, following state)
        self.ends = []  # (state, word that may end there)
        self.entries = []

    def add(self, output: int, minimum: int, before: Sequence[int]) -> range:
        """Add the states of an output that takes at least `minimum` frames, and follows any of the
        states `before`; none: a word begins with it. Return the new states."""
        first = len(self.outputs)
        if self.blank is None:
            self.outputs += [output] * minimum
            self.repeats += [False] * (minimum - 1) + [True]
        elif output == self.blank:
            self.outputs.append(output)
            self.repeats.append(True)
        else:
            self.outputs += [output, self.blank]
            self.repeats += [True, True]
        states = range(first, len(self.outputs))
        self.lookahead += [-np.inf] * len(states)
        self.arcs += itertools.pairwise(states)
        self.arcs += [(state, first) for state in before]
        if not before:
            self.entries.append(first)
        return states

    def exits_of(self, states: range) -> range:
        """Return the states of an output from which the next one may be reached."""
        return states[-1:] if self.blank is None else states[-2:]

    def add_end(self, states: range, word: int) -> None:
        self.ends += [(state, word) for state in self.exits_of(states)]

    def sparse_matrix(self, pairs: list[tuple[int, int]], num_columns: int) -> csr_array:
        """Return a matrix (states, num_columns) with an entry for each pair (row, column)."""
        indices = np.array(sorted(set(pairs)), np.int64).reshape(-1, 2)
        shape = (len(self.outputs), num_columns)
        return csr_array((np.ones(len(indices)), (indices[:, 0], indices[:, 1])), shape)


def best_of_each(score: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the index of the highest score of each key."""
    order = np.argsort(-score, kind="stable")
    _, first_of_key = np.unique(key[order], return_index=True)
    return order[first_of_key]


class Tokens(NamedTuple):
    """Partial paths through a lexicon; each field is an array (n,)."""

    score: np.ndarray
    state: np.ndarray
    history: np.ndarray  # the last complete word; the number of words at the start
    trace: np.ndarray  # the row of that word in the list of traces

    def take(self, indices: np.ndarray) -> "Tokens":
        return Tokens(*(column[indices] for column in self))


def decode_words(
    log_likelihoods: np.ndarray, lexicon: Lexicon, weight=1.0, penalty=0.0, tokens=500, word_ends=50
) -> list[int]:
    """Return the best sequence of words, by a frame-synchronous search through the lexicon.

    At every frame the best `tokens` pairs of a state and the word before it are kept (Ney and
    Ortmanns, Progress in dynamic programming search for LVCSR, 2000), ranked with the best unigram
    among the words that can still follow, and the best `word_ends` of those in which a word ends.
    Where no word ends with the last frame, the result is the words before it.

    Args:
        log_likelihoods: (frames, outputs), scaled likelihoods as for `viterbi`, or CTC's
            log-probabilities, of which the best path counts, not their sum.
        lexicon: the words.
        weight, penalty: of the language model, and of a word.
    """
    no_word = lexicon.bigram.size
    traces = [(0, no_word)]  # (row of the word before, word)
    empty = np.zeros(0, int)
    active = Tokens(np.zeros(0), empty, empty, empty)
    num_entries = len(lexicon.entries)
    entering = Tokens(
        np.zeros(num_entries),
        lexicon.entries,
        np.full(num_entries, no_word),
        np.zeros(num_entries, int),
    )
    for likelihoods in log_likelihoods:
        active = advance(active, entering, likelihoods, lexicon, weight, tokens)
        ended = end_words(active, lexicon, weight, penalty)
        entering = begin_words(ended, active, lexicon, word_ends, traces)
    if not len(active.score):
        return []
    token = active.score.argmax()
    words = []
    if len(ended.score):
        to_end = weight * lexicon.bigram.log_probability(ended.last_word, no_word)
        best = (ended.score + to_end).argmax()
        token = ended.origin[best]
        words.append(int(ended.word[best]))
    row = active.trace[token]
    while row:
        row, word = traces[row]
        words.append(word)
    return [word for word in reversed(words) if word < no_word]


def advance(
    active: Tokens,
    entering: Tokens,
    likelihoods: np.ndarray,
    lexicon: Lexicon,
    weight: float,
    max_tokens: int,
) -> Tokens:
    """Return the tokens after one more frame with these likelihoods (outputs,)."""
    stayed = active.take(lexicon.repeats[active.state])
    origin, following = follow(lexicon.arcs, active.state)
    moved = active.take(origin)._replace(state=following)
    columns = zip(stayed, moved, entering, strict=True)
    reached = Tokens(*(np.concatenate(column) for column in columns))
    score = reached.score + likelihoods[lexicon.outputs[reached.state]]
    reached = reached._replace(score=score)
    best = best_of_each(score, reached.history * len(lexicon.outputs) + reached.state)
    if len(best) > max_tokens:
        ranked = score[best] + weight * lexicon.lookahead[reached.state[best]]
        best = best[np.argpartition(-ranked, max_tokens)[:max_tokens]]
    return reached.take(best)


class EndedWords(NamedTuple):
    """Tokens in which a word, or a silence, may end; each field is an array (n,)."""

    score: np.ndarray
    origin: np.ndarray  # index of the token
    word: np.ndarray  # the word that ends; the number of words for a silence
    last_word: np.ndarray  # the last word that is no silence
    label: np.ndarray  # CTC: the output of the last state; else −1


def end_words(active: Tokens, lexicon: Lexicon, weight: float, penalty: float) -> EndedWords:
    """Return the words that may end in the present frame."""
    origin, word = follow(lexicon.ends, active.state)
    score = active.score[origin]
    word_before = active.history[origin]
    is_word = word < lexicon.bigram.size
    log_probability = lexicon.bigram.log_probability(word_before[is_word], word[is_word])
    score[is_word] += weight * log_probability + penalty
    last_word = np.where(is_word, word, word_before)
    label = np.where(lexicon.is_ctc, lexicon.outputs[active.state[origin]], -1)
    return EndedWords(score, origin, word, last_word, label)


def begin_words(
    ended: EndedWords, active: Tokens, lexicon: Lexicon, max_words: int, traces: list
) -> Tokens:
    """Return the tokens at the beginning of the next word after the best ended ones, which are
    appended to the traces."""
    num_labels = int(lexicon.outputs.max()) + 2
    best = best_of_each(ended.score, ended.last_word * num_labels + ended.label)
    best = best[np.argsort(-ended.score[best])[:max_words]]
    # Two equal labels of CTC need a blank between them.
    can_follow = ended.label[best, None] != lexicon.outputs[lexicon.entries]
    row, entry = np.nonzero(can_follow)
    entering = Tokens(
        ended.score[best][row],
        lexicon.entries[entry],
        ended.last_word[best][row],
        len(traces) + row,
    )
    rows_before = active.trace[ended.origin[best]].tolist()
    traces.extend(zip(rows_before, ended.word[best].tolist(), strict=True))
    return entering


# ------------------------------------------------------------------------------------ TIMIT phones

# Lee and Hon, Speaker-independent phone recognition using hidden Markov models, 1989, Table II:
# 61 labels → 39. The glottal stop q is left out.
FOLDED = {
    **dict.fromkeys("pcl tcl kcl bcl dcl gcl h# #h pau epi".split(), "sil"),
    "ao": "aa",
    "ax": "ah",
    "ax-h": "ah",
    "axr": "er",
    "ix": "ih",
    "ux": "uw",
    "hv": "hh",
    "zh": "sh",
    "el": "l",
    "em": "m",
    "en": "n",
    "nx": "n",
    "eng": "ng",
}


def fold(phones: Iterable[str]) -> list[str]:
    """Return TIMIT's 61 phones as the 39 in which errors are counted."""
    return [FOLDED.get(phone, phone) for phone in phones if phone != "q"]
