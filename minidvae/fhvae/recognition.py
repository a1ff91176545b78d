"""Recognition of phones, characters and words, by domain (FHVAE paper, section 4.3, Tables 2 and 3).

Phones of a frame-wise model by Viterbi, symbols of a CTC model by prefix beam search, both with a bigram; words through
a lexicon with a bigram of words. The bigrams know the transcripts that the recogniser was trained on, and the weights
of the searches are those with the fewest errors on the development utterances of its domain and corpus.

What counts: phones without silences. TIMIT's are folded to the usual 39 first, in which silences and closures are one
phone that counts, and q is none. Characters as they are written, in lower case, spaces too. Words in lower case,
without punctuation.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data import synthetic
from ..data.corpus import CONDITIONS_OF, Corpus, CorpusError, Utterance, load_corpus
from ..data.layouts import read_text
from ..evaluation import report
from ..evaluation.runs import Options, Run
from ..files import CheckpointError, write_text
from ..training.checkpoint import load_run
from ..training.config import DOMAINS, Recipe, SettingError
from ..training.features import utterance_features
from ..training.segment_batches import of_domain
from ..training.utterance_batches import in_domain, transcript
from .decoding import Bigram, Errors, Lexicon, align, ctc_beam, decode_words, fold, viterbi

MODELS = ["acoustic", "deepspeech2"]

BATCH = 16  # utterances at once
MINIMUM = 3  # frames of a phone
SILENCES = ("sil", "sp", "pau", "h#", "#h", "epi")
COLUMNS = ("male", "female", "clean", "noisy", "channel", "both", "all")
# Weights and penalties that are tried, and on how many development utterances at most
FRAMES_GRID = tuple(itertools.product((0.5, 1.0, 2.0, 4.0), (-4.0, 0.0, 4.0)))
CTC_GRID = tuple(itertools.product((0.0, 0.4, 0.8, 1.2), (0.0, 1.0, 2.0)))
WORDS_GRID = tuple(itertools.product((1.0, 3.0, 6.0), (-8.0, 0.0, 8.0)))
CTC_WORDS_GRID = tuple(itertools.product((0.5, 1.0, 2.0), (0.0, 2.0, 4.0)))
TUNED, TUNED_WORDS = 80, 24


def scored(symbols: Sequence[str], recipe: Recipe, vocabulary: Sequence[str]) -> list[str]:
    """What counts of symbols, those of a model with this vocabulary, or of a transcript in them. TIMIT's phones are
    known by the closures."""
    if recipe.targets == "characters":
        return list(symbols)
    if {"h#", "pcl", "tcl", "kcl"}.issubset(vocabulary):
        return fold(symbols)
    return [symbol for symbol in symbols if symbol not in SILENCES]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation: letters, digits, and apostrophes within a word."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*'?", text.lower().replace("’", "'"))


def read_lexicon(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(word, phones) of a file of lines `word phone phone …`, a line for each pronunciation, as the CMU dictionary has
    them: WORD(2) is another one of WORD, lines that begin with ;;; or # are comments. Raises CorpusError where it
    cannot be read, SettingError where a line has no phones."""
    form, entries = "expected lines of a word and its phones: word ph ph …", []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip() and not line.startswith((";;;", "#")):
            word, *phones = line.split()
            if not phones:
                raise SettingError(
                    f"--lexicon {path}: line {number}: {word!r} has no phones; {form}"
                )
            entries.append((re.sub(r"\(\d+\)$", "", word).lower(), tuple(phones)))
    if not entries:
        raise SettingError(f"--lexicon {path}: holds no words; {form}")
    return entries


def pronunciations(
    run: Run, training: Corpus, lexicon: Path | None
) -> list[tuple[str, tuple[str, ...]]]:
    """(word, its symbols) that the model of a run can recognise; empty where no words are known. Those of the lexicon,
    a file or the built-in corpus's own, whose phones the model has, as they stand there or in lower case and without
    stress. Of a model of characters the same words as they are spelled, and those of the training transcripts. Raises
    SettingError where it has the symbols of no word."""
    symbols, entries, known = set(run.model.config.symbols), [], set()
    if lexicon:
        entries = read_lexicon(lexicon)
    elif run.corpus.without_conditions().layout == "built-in":
        entries = list(synthetic.LEXICON.items())
    if run.recipe.targets == "characters":
        words = {word for word, _ in entries}.union(
            *(words_of(u.text) for u in training.utterances)
        )
        entries = [(word, tuple(word)) for word in words]
    for word, spelled in entries:
        plain = tuple(
            symbol if symbol in symbols else re.sub(r"\d", "", symbol.lower()) for symbol in spelled
        )
        if symbols.issuperset(plain):
            known.add((word, plain))
    if lexicon and not known:
        some = " ".join(sorted(symbols)[:8])
        raise SettingError(
            f"--lexicon {lexicon}: {run.folder} has the symbols of none of its words; it has {some} …"
        )
    return sorted(known)


@torch.no_grad()
def outputs(run: Run, corpus: Corpus) -> list[np.ndarray]:
    """For each utterance what the searches take, (frames, outputs) float32: log p(symbol | x), of a frame-wise model
    less log p(symbol). CheckpointError where one is not finite, or where the extractor is not the one that the model
    was trained with."""
    model, features = run.model, utterance_features(corpus, run.recipe, run.device)
    if features.extractor != run.content["plan"].get("extractor", features.extractor):
        raise CheckpointError(
            f"{run.recipe.extractor}: not the model that {run.folder} was trained with"
        )
    order, found = sorted(range(len(corpus)), key=lambda i: corpus.utterances[i].length), {}
    for first in tqdm(range(0, len(order), BATCH), str(run.folder), leave=False, disable=None):
        some = order[first : first + BATCH]
        rows = [features[i] for i in some]
        frames = torch.tensor([len(row) for row in rows], device=run.device)
        logits, frames = model.logits(pad_sequence(rows, batch_first=True), frames)
        log_probabilities = logits.double().log_softmax(-1)
        if run.recipe.targets == "frames":
            log_probabilities = log_probabilities - model.log_priors
        for i, row, n in zip(
            some, log_probabilities.float().cpu().numpy(), frames.tolist(), strict=True
        ):
            run.check_finite(row[:n])
            found[i] = row[:n].copy()
    return [found[i] for i in range(len(corpus))]


@dataclass
class Task:
    """What is recognised, symbols or words, and how."""

    measure: str  # PER, CER or WER
    references: Callable[[Utterance], list[str]]
    decode: Callable[
        [np.ndarray, float, float], list[str]
    ]  # outputs, weight, penalty → what was said
    grid: tuple[tuple[float, float], ...]  # of (weight, penalty)
    tuned: int  # development utterances at most
    vocabulary: frozenset[str]  # what can be recognised


def symbols_task(run: Run, training: Corpus) -> Task:
    recipe, symbols = run.recipe, run.model.config.symbols
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    sequences = (transcript(u, recipe.targets) for u in training.utterances)
    bigram = Bigram.fit(
        ([numbers[s] for s in spoken if s in numbers] for spoken in sequences if spoken),
        len(symbols),
    )

    def decode(scores: np.ndarray, weight: float, penalty: float) -> list[str]:
        if recipe.targets == "frames":
            found = viterbi(scores, bigram, weight, penalty, MINIMUM)
        else:
            found = ctc_beam(scores, bigram=bigram, weight=weight, penalty=penalty)
        return scored([symbols[number] for number in found], recipe, symbols)

    def references(utterance: Utterance) -> list[str]:
        return scored(transcript(utterance, recipe.targets), recipe, symbols)

    measure = "CER" if recipe.targets == "characters" else "PER"
    grid = FRAMES_GRID if recipe.targets == "frames" else CTC_GRID
    return Task(
        measure, references, decode, grid, TUNED, frozenset(scored(symbols, recipe, symbols))
    )


def words_task(run: Run, training: Corpus, lexicon: Path | None) -> Task | None:
    """None where there are no words to be found, or no texts to compare them with."""
    texts = [words_of(utterance.text) for utterance in training.utterances]
    entries = pronunciations(run, training, lexicon) if any(texts) else []
    if not entries:
        return None
    ctc = run.recipe.targets != "frames"
    symbols = {symbol: number for number, symbol in enumerate(run.model.config.symbols, int(ctc))}
    words = sorted({word for word, _ in entries})
    numbers = {word: number for number, word in enumerate(words)}
    spelled = [(numbers[word], [symbols[symbol] for symbol in phones]) for word, phones in entries]
    pauses = (" ",) if run.recipe.targets == "characters" else SILENCES
    pause = next((symbols[symbol] for symbol in pauses if symbol in symbols), None)
    bigram = Bigram.fit(
        ([numbers[w] for w in text if w in numbers] for text in texts if text), len(words)
    )
    network = Lexicon.build(spelled, bigram, pause, MINIMUM, blank=0 if ctc else None)

    def decode(scores: np.ndarray, weight: float, penalty: float) -> list[str]:
        return [words[number] for number in decode_words(scores, network, weight, penalty)]

    grid = CTC_WORDS_GRID if ctc else WORDS_GRID
    return Task(
        "WER",
        lambda utterance: words_of(utterance.text),
        decode,
        grid,
        TUNED_WORDS,
        frozenset(words),
    )


def tuning_set(task: Task, development: Corpus) -> Corpus:
    """The development utterances that the weights are chosen with: CorpusError where nothing is known of them."""
    spoken = tuple(u for u in development.utterances if task.references(u))
    if not spoken:
        raise CorpusError(
            f"{development.name}: its dev split has nothing to choose the weights of the search with"
        )
    return replace(development, utterances=spoken).spread(task.tuned)


def tune(task: Task, tuning: Corpus, heard: list[np.ndarray]) -> dict[str, float]:
    """The weight and penalty with the fewest errors on utterances, given the outputs for them, and their rate there."""
    references, found = [task.references(utterance) for utterance in tuning.utterances], []
    for weight, penalty in tqdm(
        task.grid, f"weights for {task.measure}", leave=False, disable=None
    ):
        rate = sum(
            map(align, references, (task.decode(scores, weight, penalty) for scores in heard)),
            Errors(),
        ).rate
        found.append(
            {"weight": weight, "penalty": penalty, "development": rate, "utterances": len(tuning)}
        )
    return min(found, key=lambda choice: choice["development"])


def columns_of(test: Corpus) -> list[str]:
    """The domains that some of the utterances are in and others are not, and all."""
    counts = {name: sum(in_domain(u, name) for u in test.utterances) for name in DOMAINS}
    return [name for name in COLUMNS if name == "all" or 0 < counts[name] < len(test)]


def summary(errors: Sequence[Errors]) -> dict:
    """Of utterances together: {substitutions, deletions, insertions, length, rate, standard_error}. The standard error
    is that of a ratio of two sums (Cochran, Sampling techniques, 1977, chapter 6); None for fewer than two."""
    total, n, error = sum(errors, Errors()), len(errors), None
    if n > 1 and total.length:
        squares = sum((e.count - total.rate * e.length) ** 2 for e in errors)
        error = float(np.sqrt(squares * n / (n - 1)) / total.length)
    return vars(total) | {"rate": total.rate, "standard_error": error}


def trained_on(run: Run) -> dict[str, str]:
    """The domains that the recogniser and the extractor of its features were trained on, and these features."""
    recipe = run.recipe
    before_conditions = run.data == CONDITIONS_OF + run.content["plan"]["data"]
    names = {
        "recogniser": recipe.domain or ("clean" if before_conditions else "all"),
        "extractor": "",
    }
    names["features"] = {"fbank": "FBank", "log_magnitude": "log magnitude"}[recipe.features]
    if recipe.extractor:
        model, _, content = load_run(recipe.extractor, torch.device("cpu"))
        names["extractor"] = content["plan"]["recipe"].get("domain") or "all"
        beta_vae = content["model"] == "beta_vae"
        names["features"] = f"β-VAE z, β={model.config.beta:g}" if beta_vae else recipe.latent
    return names


def evaluate_run(run: Run, options: Options) -> dict:
    """The errors of one run. Writes what it heard beside what was said into its folder, hypotheses.tsv."""
    recipe, plan, test = run.recipe, run.content["plan"], run.test.utterances
    own = run.corpus if plan["data"] == run.data else load_corpus(plan["data"])
    training, development = (of_domain(own.split(name), recipe) for name in ("train", "dev"))
    tasks = [symbols_task(run, training), words_task(run, training, options.lexicon)]
    tasks = [task for task in tasks if task and any(map(task.references, test))]
    if not tasks:
        needed = (
            "text"
            if recipe.targets == "characters"
            else "phone labels, or text and a lexicon (--lexicon FILE)"
        )
        raise CorpusError(
            f"{run.data}: its {test[0].split} split has nothing to compare with; expected {needed}"
        )
    tuning = [tuning_set(task, development) for task in tasks]
    heard, columns, measures = outputs(run, run.test), columns_of(run.test), {}
    texts = {"utterance": [u.name for u in test]}
    texts |= {field: [getattr(u, field) for u in test] for field in ("sex", "condition")}
    for task, tuned in zip(tasks, tuning, strict=True):
        search = tune(task, tuned, outputs(run, tuned))
        bar = tqdm(heard, task.measure, leave=False, disable=None)
        hypotheses = [task.decode(scores, search["weight"], search["penalty"]) for scores in bar]
        references = [task.references(utterance) for utterance in test]
        said, known = sum(map(len, references)), len(task.vocabulary)
        unknown = sum(
            symbol not in task.vocabulary for reference in references for symbol in reference
        )
        if unknown:
            print(f"{task.measure}: {unknown} of {said} are not among the {known} known")
        rows = zip(test, references, hypotheses, strict=True)
        errors = [
            (utterance, align(reference, found))
            for utterance, reference, found in rows
            if reference
        ]
        counts = {"utterances": len(errors), "vocabulary": known, "unknown": unknown}
        inside = {
            name: [e for u, e in errors if name == "all" or in_domain(u, name)] for name in columns
        }
        by_domain = {name: summary(found) for name, found in inside.items()}
        measures[task.measure] = {"search": search} | counts | {"errors": by_domain}
        between = "" if task.measure == "CER" else " "
        texts[f"{task.measure} reference"] = map(between.join, references)
        texts[f"{task.measure} hypothesis"] = map(between.join, hypotheses)
    lines = ["\t".join(row) for row in (texts, *zip(*texts.values(), strict=True))]
    write_text(run.target / "hypotheses.tsv", "\n".join(lines) + "\n")
    result = {"targets": recipe.targets, "trained": run.trained, "utterances": len(test)}
    return trained_on(run) | result | {"training_utterances": len(training), "measures": measures}


def table(results: list[dict], measure: str, layout: str | None = None) -> str:
    """Errors in percent, a row for each run and a column for each domain. `layout` names the corpus where published
    rows may stand below ours."""
    there = [r for r in results if measure in r["measures"]]
    errors = [r["measures"][measure]["errors"] for r in there]
    columns = [name for name in COLUMNS if any(name in domains for domains in errors)]

    def line(
        title: str, recogniser: str, extractor: str, features: str, cells: dict[str, str]
    ) -> list[str]:
        return [
            title,
            recogniser,
            extractor or "–",
            features,
            *(cells.get(name, "–") for name in columns),
        ]

    ours, lines = [[r["recogniser"], r["extractor"], r["features"]] for r in there], []
    for r, trained, domains in zip(there, ours, errors, strict=True):
        lines.append(
            line(
                r["run"], *trained, {name: f"{100 * e['rate']:.2f}" for name, e in domains.items()}
            )
        )
    lengths = (str(errors[0][name]["length"]) if name in errors[0] else "–" for name in columns)
    lines.append(["(words)" if measure == "WER" else "(symbols)", "", "", "", *lengths])
    for recogniser, extractor, features, its_measure, *rates in report.published(
        "recognition", layout
    ):
        if its_measure == measure and [recogniser, extractor, features] in ours:
            lines.append(
                line(
                    "(paper)",
                    recogniser,
                    extractor,
                    features,
                    dict(zip(COLUMNS, rates, strict=True)),
                )
            )
    return report.table(["", "recogniser", "extractor", "features", *columns], lines, left=4)


@report.by_corpus
def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """A table for each corpus and measure; results.json and hypotheses.tsv in the folder of every run."""
    results, data = (
        report.evaluate_each(runs, options, evaluate_run, "hypotheses.tsv"),
        runs[0].data,
    )
    for measure in ("PER", "CER", "WER"):
        if any(measure in result["measures"] for result in results):
            layout = report.published_layout(runs, options)
            print(f"\n{data}: {measure} in %\n\n{table(results, measure, layout)}")
    if options.split != "test":
        print(
            f"\n{data}: on {options.split}, which had a part in the training: strangers make for more errors."
        )
    print(
        "\nrecogniser, extractor: the domain that each was trained on. Bigrams: of the recogniser's training"
    )
    print("transcripts; weights of the searches: chosen on development utterances of that domain.")
    return results
