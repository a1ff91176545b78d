"""Pairs of utterances by different speakers, to exchange latents between."""

import numpy as np

from ..data.corpus import Corpus


def conversion_pairs(test: Corpus, count: int, seed: int) -> list[tuple[int, int]]:
    """Return pairs (source, reference) of utterances: sources spread over the corpus, and for each
    a reference drawn from the other sex, or from another speaker where the sexes are unknown.
    Empty where there is only one speaker."""
    random = np.random.default_rng(seed)
    count = min(count, len(test))
    pairs = []
    for number in range(count):
        source = number * len(test) // count
        speaker = test.utterances[source].speaker
        sex = test.utterances[source].sex
        candidates = []
        other_sex = []
        for index, utterance in enumerate(test.utterances):
            if utterance.speaker != speaker:
                candidates.append(index)
                if {utterance.sex, sex} == {"F", "M"}:
                    other_sex.append(index)
        if candidates:
            pairs.append((source, int(random.choice(other_sex or candidates))))
    return pairs
