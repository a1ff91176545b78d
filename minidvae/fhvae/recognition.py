"""Recognition of phones, characters and words, by domain (FHVAE paper, section 4.3, Tables 2, 3).

Phones of a frame-wise model by Viterbi, symbols of a CTC model by prefix beam search, both with a
bigram; words through a lexicon with a bigram of words. The bigrams are estimated on the transcripts
that the recogniser was trained on, and the weights of the searches are those with the fewest errors
on the development utterances of its domain and corpus.

What counts: phones without silences. TIMIT's are folded to the usual 39 first, in which silences
and closures are one phone that counts, and q is none. Characters as they are written, in lower
case, spaces too. Words in lower case, without punctuation.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data import synthetic
from ..data.corpus import CONDITIONS_OF, Corpus, CorpusError, Utterance, load_corpus
from ..data.layouts import read_text
from ..evaluation import report
from ..evaluation.results import Evaluation, RunResult, Table
from ..evaluation.runs import Options, Run, group_by_corpus, in_order_of
from ..files import CheckpointError
from ..training.checkpoint import load_run
from ..training.config import DOMAINS, Recipe, SettingError
from ..training.features import utterance_features
from ..training.segment_batches import of_domain
from ..training.utterance_batches import in_domain, transcript
from .decoding import Bigram, Errors, Lexicon, align, ctc_beam, decode_words, fold, viterbi

MODELS = ["acoustic", "deepspeech2"]

BATCH = 16  # utterances at once
MIN_PHONE_FRAMES = 3
SILENCES = ("sil", "sp", "pau", "h#", "#h", "epi")
COLUMNS = ("male", "female", "clean", "noisy", "channel", "both", "all")
# Weights and penalties that are tried, and on how many development utterances at most.
FRAMES_GRID = tuple(itertools.product((0.5, 1.0, 2.0, 4.0), (-4.0, 0.0, 4.0)))
CTC_GRID = tuple(itertools.product((0.0, 0.4, 0.8, 1.2), (0.0, 1.0, 2.0)))
WORDS_GRID = tuple(itertools.product((1.0, 3.0, 6.0), (-8.0, 0.0, 8.0)))
CTC_WORDS_GRID = tuple(itertools.product((0.5, 1.0, 2.0), (0.0, 2.0, 4.0)))
MAX_TUNING_UTTERANCES = 80
MAX_TUNING_UTTERANCES_WORDS = 24


def scored(symbols: Sequence[str], recipe: Recipe, vocabulary: Sequence[str]) -> list[str]:
    """Return the symbols that count, of a model with this vocabulary or of a transcript. TIMIT's
    phones are known by the closures."""
    if recipe.targets == "characters":
        return list(symbols)
    if {"h#", "pcl", "tcl", "kcl"}.issubset(vocabulary):
        return fold(symbols)
    return [symbol for symbol in symbols if symbol not in SILENCES]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation: letters, digits, and
    apostrophes within a word."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*'?", text.lower().replace("’", "'"))


def read_lexicon(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Read (word, phones) from a file of lines `word phone phone …`, a line for each pronunciation,
    as in the CMU dictionary: WORD(2) is another pronunciation of WORD, lines that begin with ;;; or
    # are comments. Raises CorpusError where it cannot be read, SettingError where a line has no
    phones."""
    entries = []
    for line_number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith((";;;", "#")):
            continue
        word, *phones = line.split()
        if not phones:
            raise SettingError(
                f"{path}: line {line_number}: {word!r} has no phones; expected lines of a word and "
                "its phones: word ph ph …"
            )
        word = re.sub(r"\(\d+\)$", "", word).lower()
        entries.append((word, tuple(phones)))
    if not entries:
        raise SettingError(
            f"{path}: holds no words; expected lines of a word and its phones: word ph ph …"
        )
    return entries


def pronunciations(
    run: Run, training: Corpus, lexicon: Path | None
) -> list[tuple[str, tuple[str, ...]]]:
    """Return (word, its symbols) for the words that the model of a run can recognise; none where no
    words are known.

    These are the words of the lexicon, a file or the built-in corpus's own, whose phones the model
    has, as they are or in lower case and without stress. For a model of characters, the same words
    as they are spelled, and those of the training transcripts. Raises SettingError where it has the
    symbols of no word.
    """
    symbols = set(run.model.config.symbols)
    entries = []
    if lexicon:
        entries = read_lexicon(lexicon)
    elif run.corpus.without_conditions().layout == "built-in":
        entries = list(synthetic.LEXICON.items())
    if run.recipe.targets == "characters":
        words = {word for word, _ in entries}
        for utterance in training.utterances:
            words.update(words_of(utterance.text))
        entries = [(word, tuple(word)) for word in words]
    usable = set()
    for word, phones in entries:
        spelled = []
        for phone in phones:
            spelled.append(phone if phone in symbols else re.sub(r"\d", "", phone.lower()))
        if symbols.issuperset(spelled):
            usable.add((word, tuple(spelled)))
    if lexicon and not usable:
        examples = " ".join(sorted(symbols)[:8])
        raise SettingError(
            f"{lexicon}: {run.folder} has the symbols of none of its words; it has {examples} …"
        )
    return sorted(usable)


@torch.no_grad()
def outputs(run: Run, corpus: Corpus) -> list[np.ndarray]:
    """Return for each utterance what the searches take, (frames, outputs) float32: log p(symbol |
    x), of a frame-wise model minus log p(symbol). Raises CheckpointError where one is not finite,
    or where the extractor is not the one that the model was trained with."""
    model = run.model
    features = utterance_features(corpus, run.recipe, run.device)
    if features.extractor != run.content["plan"].get("extractor", features.extractor):
        raise CheckpointError(
            f"{run.recipe.extractor}: not the model that {run.folder} was trained with"
        )
    order = sorted(range(len(corpus)), key=lambda i: corpus.utterances[i].length)
    scores_of = {}
    for first in tqdm(range(0, len(order), BATCH), str(run.folder), leave=False, disable=None):
        indices = order[first : first + BATCH]
        rows = [features[i] for i in indices]
        lengths = torch.tensor([len(row) for row in rows], device=run.device)
        logits, lengths = model.logits(pad_sequence(rows, batch_first=True), lengths)
        log_probabilities = logits.double().log_softmax(-1)
        if run.recipe.targets == "frames":
            log_probabilities = log_probabilities - model.log_priors
        log_probabilities = log_probabilities.float().cpu().numpy()
        for i, row, length in zip(indices, log_probabilities, lengths.tolist(), strict=True):
            run.check_finite(row[:length])
            scores_of[i] = row[:length].copy()
    return [scores_of[i] for i in range(len(corpus))]


@dataclass
class RecognitionTask:
    """Recognition of symbols or of words."""

    measure: str  # PER, CER or WER
    reference: Callable[[Utterance], list[str]]
    decode: Callable[[np.ndarray, float, float], list[str]]  # (outputs, weight, penalty) → symbols
    grid: tuple[tuple[float, float], ...]  # pairs (weight, penalty) to choose from
    max_tuning_utterances: int
    vocabulary: frozenset[str]  # symbols or words that can be recognised


def symbols_task(run: Run, training: Corpus) -> RecognitionTask:
    recipe = run.recipe
    symbols = run.model.config.symbols
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    sequences = []
    for utterance in training.utterances:
        spoken = transcript(utterance, recipe.targets)
        if spoken:
            sequences.append([numbers[symbol] for symbol in spoken if symbol in numbers])
    bigram = Bigram.fit(sequences, len(symbols))

    def decode(scores: np.ndarray, weight: float, penalty: float) -> list[str]:
        if recipe.targets == "frames":
            path = viterbi(scores, bigram, weight, penalty, MIN_PHONE_FRAMES)
        else:
            path = ctc_beam(scores, bigram=bigram, weight=weight, penalty=penalty)
        return scored([symbols[number] for number in path], recipe, symbols)

    def reference(utterance: Utterance) -> list[str]:
        return scored(transcript(utterance, recipe.targets), recipe, symbols)

    return RecognitionTask(
        measure="CER" if recipe.targets == "characters" else "PER",
        reference=reference,
        decode=decode,
        grid=FRAMES_GRID if recipe.targets == "frames" else CTC_GRID,
        max_tuning_utterances=MAX_TUNING_UTTERANCES,
        vocabulary=frozenset(scored(symbols, recipe, symbols)),
    )


def words_task(run: Run, training: Corpus, lexicon: Path | None) -> RecognitionTask | None:
    """Return None where there are no words to be found, or no texts to compare them with."""
    texts = [words_of(utterance.text) for utterance in training.utterances]
    entries = pronunciations(run, training, lexicon) if any(texts) else []
    if not entries:
        return None
    is_ctc = run.recipe.targets != "frames"
    first = 1 if is_ctc else 0  # output 0 of CTC is the blank
    symbols = {symbol: number for number, symbol in enumerate(run.model.config.symbols, first)}
    words = sorted({word for word, _ in entries})
    numbers = {word: number for number, word in enumerate(words)}
    spelled = []
    for word, phones in entries:
        spelled.append((numbers[word], [symbols[phone] for phone in phones]))
    pauses = (" ",) if run.recipe.targets == "characters" else SILENCES
    pause = next((symbols[symbol] for symbol in pauses if symbol in symbols), None)
    sequences = []
    for text in texts:
        if text:
            sequences.append([numbers[word] for word in text if word in numbers])
    bigram = Bigram.fit(sequences, len(words))
    blank = 0 if is_ctc else None
    network = Lexicon.build(spelled, bigram, pause, MIN_PHONE_FRAMES, blank=blank)

    def decode(scores: np.ndarray, weight: float, penalty: float) -> list[str]:
        return [words[number] for number in decode_words(scores, network, weight, penalty)]

    def reference(utterance: Utterance) -> list[str]:
        return words_of(utterance.text)

    return RecognitionTask(
        measure="WER",
        reference=reference,
        decode=decode,
        grid=CTC_WORDS_GRID if is_ctc else WORDS_GRID,
        max_tuning_utterances=MAX_TUNING_UTTERANCES_WORDS,
        vocabulary=frozenset(words),
    )


def tuning_set(task: RecognitionTask, development: Corpus) -> Corpus:
    """Return the development utterances that the weights are chosen with. Raises CorpusError where
    nothing is known of them."""
    spoken = tuple(u for u in development.utterances if task.reference(u))
    if not spoken:
        raise CorpusError(
            f"{development.name}: its dev split has nothing to choose the weights of the search "
            "with"
        )
    return replace(development, utterances=spoken).spread(task.max_tuning_utterances)


def tune(task: RecognitionTask, tuning: Corpus, scores: list[np.ndarray]) -> dict[str, float]:
    """Return the weight and penalty with the fewest errors on utterances, given the outputs for
    them, and their error rate there."""
    references = [task.reference(utterance) for utterance in tuning.utterances]
    choices = []
    for weight, penalty in tqdm(
        task.grid, f"weights for {task.measure}", leave=False, disable=None
    ):
        errors = Errors()
        for reference, score in zip(references, scores, strict=True):
            errors += align(reference, task.decode(score, weight, penalty))
        choices.append(
            {
                "weight": weight,
                "penalty": penalty,
                "development": errors.rate,
                "utterances": len(tuning),
            }
        )
    return min(choices, key=lambda choice: choice["development"])


def columns_of(test: Corpus) -> list[str]:
    """Return the domains that some of the utterances are in and others are not, and "all"."""
    counts = {}
    for name in DOMAINS:
        counts[name] = len([u for u in test.utterances if in_domain(u, name)])
    return [name for name in COLUMNS if name == "all" or 0 < counts[name] < len(test)]


def summarise(errors: Sequence[Errors]) -> dict:
    """Return {substitutions, deletions, insertions, length, rate, standard_error} of utterances
    together. The standard error is that of a ratio of two sums (Cochran, Sampling techniques, 1977,
    chapter 6); None for fewer than two."""
    total = sum(errors, Errors())
    n = len(errors)
    standard_error = None
    if n > 1 and total.length:
        squares = sum((e.count - total.rate * e.length) ** 2 for e in errors)
        standard_error = float(np.sqrt(squares * n / (n - 1)) / total.length)
    return asdict(total) | {"rate": total.rate, "standard_error": standard_error}


def trained_on(run: Run) -> dict[str, str]:
    """Return the domains that the recogniser and the extractor of its features were trained on, and
    the name of these features."""
    recipe = run.recipe
    knows_no_conditions = run.data == CONDITIONS_OF + run.content["plan"]["data"]
    names = {
        "recogniser": recipe.domain or ("clean" if knows_no_conditions else "all"),
        "extractor": "",
        "features": {"fbank": "FBank", "log_magnitude": "log magnitude"}[recipe.features],
    }
    if recipe.extractor:
        model, _, content = load_run(recipe.extractor, torch.device("cpu"))
        names["extractor"] = content["plan"]["recipe"].get("domain") or "all"
        if content["model"] == "beta_vae":
            names["features"] = f"β-VAE z, β={model.config.beta:g}"
        else:
            names["features"] = recipe.latent
    return names


def evaluate_run(run: Run, options: Options) -> RunResult:
    """Return the errors of one run, and a table of references and hypotheses, hypotheses.tsv."""
    recipe = run.recipe
    plan = run.content["plan"]
    corpus = run.corpus if plan["data"] == run.data else load_corpus(plan["data"])
    training = of_domain(corpus.split("train"), recipe)
    development = of_domain(corpus.split("dev"), recipe)
    tasks = tasks_of(run, training, options.lexicon)
    tuning_sets = [tuning_set(task, development) for task in tasks]
    scores = outputs(run, run.test)
    utterances = run.test.utterances
    texts = {
        "utterance": [u.name for u in utterances],
        "sex": [u.sex for u in utterances],
        "condition": [u.condition for u in utterances],
    }
    measures = {}
    for task, tuning in zip(tasks, tuning_sets, strict=True):
        search = tune(task, tuning, outputs(run, tuning))
        hypotheses = []
        for score in tqdm(scores, task.measure, leave=False, disable=None):
            hypotheses.append(task.decode(score, search["weight"], search["penalty"]))
        references = [task.reference(utterance) for utterance in utterances]
        measures[task.measure] = {"search": search} | measure_task(
            task, run.test, references, hypotheses
        )
        separator = "" if task.measure == "CER" else " "
        texts[f"{task.measure} reference"] = [separator.join(words) for words in references]
        texts[f"{task.measure} hypothesis"] = [separator.join(words) for words in hypotheses]
    lines = ["\t".join(texts)]
    for row in zip(*texts.values(), strict=True):
        lines.append("\t".join(row))
    values = trained_on(run) | {
        "targets": recipe.targets,
        "trained": run.trained,
        "utterances": len(utterances),
        "training_utterances": len(training),
        "measures": measures,
    }
    return run.result(values, texts={"hypotheses.tsv": "\n".join(lines) + "\n"})


def tasks_of(run: Run, training: Corpus, lexicon: Path | None) -> list[RecognitionTask]:
    """Return the tasks for which there is something to compare with. Raises CorpusError where there
    is none."""
    tasks = []
    for task in (symbols_task(run, training), words_task(run, training, lexicon)):
        if task is not None and any(task.reference(u) for u in run.test.utterances):
            tasks.append(task)
    if not tasks:
        needed = "phone labels, or text and a lexicon (--lexicon FILE)"
        if run.recipe.targets == "characters":
            needed = "text"
        split = run.test.utterances[0].split
        raise CorpusError(
            f"{run.data}: its {split} split has nothing to compare with; expected {needed}"
        )
    return tasks


def measure_task(
    task: RecognitionTask,
    test: Corpus,
    references: list[list[str]],
    hypotheses: list[list[str]],
) -> dict:
    """Return the errors of one task by domain, and how much of the references can be recognised."""
    unknown = 0
    errors = []
    for utterance, reference, hypothesis in zip(
        test.utterances, references, hypotheses, strict=True
    ):
        unknown += sum(symbol not in task.vocabulary for symbol in reference)
        if reference:
            errors.append((utterance, align(reference, hypothesis)))
    by_domain = {}
    for name in columns_of(test):
        of_domain = []
        for utterance, utterance_errors in errors:
            if name == "all" or in_domain(utterance, name):
                of_domain.append(utterance_errors)
        by_domain[name] = summarise(of_domain)
    return {
        "utterances": len(errors),
        "vocabulary": len(task.vocabulary),
        "unknown": unknown,
        "errors": by_domain,
    }


def table(results: list[RunResult], measure: str, layout: str | None = None) -> Table:
    """Return errors in percent, a row for each run and a column for each domain. layout: of the
    corpus if published rows may stand below ours."""
    results = [result for result in results if measure in result.values["measures"]]
    errors = [result.values["measures"][measure]["errors"] for result in results]
    columns = []
    for name in COLUMNS:
        if any(name in domains for domains in errors):
            columns.append(name)
    lines = []
    trained = []
    for result, domains in zip(results, errors, strict=True):
        names = [result.values[key] for key in ("recogniser", "extractor", "features")]
        trained.append(names)
        rates = {name: f"{100 * e['rate']:.2f}" for name, e in domains.items()}
        lines.append(table_line(result.run, names, rates, columns))
    lengths = {name: str(e["length"]) for name, e in errors[0].items()}
    title = "(words)" if measure == "WER" else "(symbols)"
    lines.append([title, "", "", "", *(lengths.get(name, "–") for name in columns)])
    for *names, of_measure, rate_cells in published_lines(layout):
        if of_measure == measure and names in trained:
            lines.append(table_line("(paper)", names, rate_cells, columns))
    heading = ["", "recogniser", "extractor", "features", *columns]
    return Table(heading, lines, left_columns=4)


def table_line(
    title: str, names: list[str], cells: dict[str, str], columns: list[str]
) -> list[str]:
    recogniser, extractor, features = names
    rates = [cells.get(name, "–") for name in columns]
    return [title, recogniser, extractor or "–", features, *rates]


def published_lines(layout: str | None) -> list[tuple]:
    """Return (recogniser, extractor, features, measure, rates by domain) of published results."""
    lines = []
    for recogniser, extractor, features, measure, *rates in report.published("recognition", layout):
        cells = dict(zip(COLUMNS, rates, strict=True))
        lines.append((recogniser, extractor, features, measure, cells))
    return lines


def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return a table for each corpus and measure, and for each run its errors and hypotheses."""
    body = []
    results = []
    for group in group_by_corpus(runs):
        group_results = [evaluate_run(run, options) for run in group]
        body += describe_corpus(group, group_results, options)
        results += group_results
    body.append(
        "recogniser, extractor: the domain that each was trained on. Bigrams: of the recogniser's "
        "training transcripts; weights of the searches: chosen on development utterances of that "
        "domain."
    )
    return Evaluation(
        task="recognition",
        description="Recognition of phones, characters and words, by domain (FHVAE paper, section "
        "4.3, Tables 2 and 3).",
        settings=options.select("lexicon"),
        body=body,
        results=in_order_of(runs, results),
    )


def describe_corpus(
    runs: list[Run], results: list[RunResult], options: Options
) -> list[str | Table]:
    data = runs[0].data
    layout = report.published_layout(runs, options)
    body = []
    for measure in ("PER", "CER", "WER"):
        if any(measure in result.values["measures"] for result in results):
            body.append(f"{data}: {measure} in %")
            body.append(table(results, measure, layout))
    for result in results:
        for measure, values in result.values["measures"].items():
            if values["unknown"]:
                body.append(
                    f"{result.run}, {measure}: {values['unknown']} of the reference's are not "
                    f"among the {values['vocabulary']} that it knows."
                )
    if options.split != "test":
        body.append(
            f"{data}: on {options.split}, which had a part in the training; unseen speakers make "
            "for more errors."
        )
    return body
