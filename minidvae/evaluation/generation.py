"""Generation from the prior, and how far it is from real speech (LigHT-DVAE paper, Table 3 and
Figure 3).

Clips of 1.6 s: power spectrograms e^l drawn from a model, their phases found by Griffin-Lim. The
distance is the Fréchet distance between Gaussians fitted to features of generated and of real
clips; the features are a speech recogniser's, the mean over time of the last recurrent layer of a
DeepSpeech2 (FDSD; Bińkowski et al., High fidelity speech synthesis with adversarial networks,
2020). It depends on that network, and falls as the number of clips grows: only numbers of one
network and one number of clips compare. Real clips are cut at random places, the reference out of
the training split, those of the rows of real speech out of the split that is evaluated, which has
other utterances.

The w of HiT-DVAE, LigHT-DVAE and DSAE is drawn from its prior, or from a Gaussian fitted to its
posteriors. Every clip, real or generated, is scaled to max |s| = 1, as the utterances that
recognisers are trained on are.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus, CorpusError, load_corpus
from ..data.crops import Windows
from ..fhvae import decoding
from ..fhvae.recognition import outputs, scored
from ..files import CheckpointError
from ..models.base import bounded
from ..training.checkpoint import load_run
from ..training.config import SettingError
from ..training.features import FEATURE_EXTRACTORS
from ..training.utterance_batches import transcript
from . import figures, report, resynthesis
from .results import Evaluation, Figure, RunResult, Sound, Table
from .runs import Options, Run, generator_for, group_by_corpus, in_order_of

MODELS = resynthesis.MODELS

CLIP_SECONDS = 1.6
CLIP_SAMPLES = round(CLIP_SECONDS * audio.SAMPLE_RATE)
EXAMPLES = 4  # clips of which sound and picture are kept
# Clips on each side, and how often both are drawn anew.
DEFAULTS = {"cpu": (512, 3), "cuda": (10_240, 5)}
BATCH = {"cpu": 32, "cuda": 512}  # clips at once
W_CLIPS = 512  # clips of the training split to whose posteriors of w a Gaussian is fitted
W_SOURCES = ("prior", "posterior")
MAX_ERROR_UTTERANCES = 200  # utterances from which a recogniser's error rate is taken

EXACT_PHASE = "exact phase"
GRIFFIN_LIM = "Griffin-Lim"
PARTS = ("sampling", GRIFFIN_LIM, "features")  # what is timed


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return |μa − μb|² + tr(A + B − 2 (AB)^½), the squared Fréchet distance of two Gaussians
    (Dowson & Landau 1982) with the means and covariances of features a (n, width) and b (m, width).

    AB has the eigenvalues of A^½ B A^½ = (A^½ B^½)(A^½ B^½)ᵀ, so the trace of its square root is
    the sum of the singular values of A^½ B^½: covariances without full rank are no special case.
    """
    covariance_a = np.cov(a, rowvar=False, dtype=np.float64)
    covariance_b = np.cov(b, rowvar=False, dtype=np.float64)
    product = square_root(covariance_a) @ square_root(covariance_b)
    common = np.linalg.svd(product, compute_uv=False).sum()
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(difference @ difference + traces - 2 * common)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


class RecogniserFeatures:
    """The features of a trained DeepSpeech2, between which the distance is measured. `about` says
    what it is. Raises SettingError where the run is another model's, or has features that do not
    follow from the waveform alone."""

    def __init__(self, folder: Path, device: torch.device):
        model, stft, content = load_run(folder, device)
        if content["model"] != "deepspeech2":
            raise SettingError(f"{folder}: is a {content['model']}; expected a run of deepspeech2")
        data = content["plan"]["data"]
        self.run = Run(folder, "deepspeech2", model.eval(), stft, content, data, None, None)
        recipe = self.run.recipe
        if recipe.extractor:
            raise SettingError(
                f"{folder}: hears the {recipe.latent} of {recipe.extractor}; expected one with "
                f"features {' or '.join(FEATURE_EXTRACTORS)} and no extractor"
            )
        self.extract_frames = FEATURE_EXTRACTORS[recipe.features].extract
        self.about = {
            "run": str(folder),
            "trained_on": data,
            "step": content["progress"]["step"],
            "features": model.config.width,
            "symbols": recipe.targets,
            **recognition_errors(self.run),
        }

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> np.ndarray:
        """Return the features (n, width) of clips (n, samples). Raises CheckpointError where one is
        not finite."""
        features = self.run.model.features(self.extract_frames(clips)).cpu().numpy()
        if not np.isfinite(features).all():
            raise CheckpointError(
                f"{self.run.folder}: the recogniser's features are not finite; take another"
            )
        return features

    def describe(self) -> str:
        """Return a sentence about the recogniser and its error rate."""
        facts = self.about
        if facts["error_rate"] is None:
            rate = f"unknown ({facts['unknown']})"
        else:
            rate = (
                f"{100 * facts['error_rate']:.1f} %, on {facts['utterances']} test utterances of "
                "that corpus, greedy"
            )
        return (
            f"Features: {facts['features']} of {facts['run']}, a deepspeech2 trained on "
            f"{facts['trained_on']} for {facts['step']:,} steps. Its error rate in "
            f"{facts['symbols']}: {rate}."
        )


def recognition_errors(run: Run) -> dict:
    """Return {"error_rate", "errors", "utterances"} of a recogniser, decoded greedily on at most
    MAX_ERROR_UTTERANCES test utterances of the corpus that it was trained on; {"error_rate": None,
    "unknown": why} where that corpus is not available or has no transcripts."""
    recipe = run.recipe
    symbols = run.model.config.symbols
    try:
        test = load_corpus(run.data).split("test")
    except CorpusError as error:
        return {"error_rate": None, "unknown": str(error)}
    spoken = tuple(u for u in test.utterances if transcript(u, recipe.targets))
    if not spoken:
        return {"error_rate": None, "unknown": f"{run.data}: its test split has no transcripts"}
    test = replace(test, utterances=spoken).spread(MAX_ERROR_UTTERANCES)
    errors = decoding.Errors()
    for utterance, output in zip(test.utterances, outputs(run, test), strict=True):
        reference = transcript(utterance, recipe.targets)
        hypothesis = [symbols[k] for k in decoding.ctc_greedy(output)]
        errors += decoding.align(
            scored(reference, recipe, symbols), scored(hypothesis, recipe, symbols)
        )
    return {"error_rate": errors.rate, "errors": asdict(errors), "utterances": len(test)}


class Stopwatch:
    """Seconds spent on each of PARTS, with the device's work finished."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = Counter()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self.synchronise()
        start = time.perf_counter()
        yield
        self.synchronise()
        self.seconds[part] += time.perf_counter() - start


@dataclass
class ClipSource:
    """A model, or real speech, that makes the clips of a row."""

    title: str
    make_clips: Callable[[range], Tensor]  # numbers of clips → waveforms (n, CLIP_SAMPLES)
    stopwatch: Stopwatch


def clip_generators(
    purpose: str, seed: int, draw: int, numbers: range, device="cpu"
) -> list[torch.Generator]:
    """Return the random numbers of each clip, for "latents" or "phases": the same whatever other
    clips are drawn with it."""
    return [
        generator_for(seed, f"{purpose}, draw {draw}, clip {number}", device) for number in numbers
    ]


@torch.no_grad()
def sample_power(run: Run, generators: list[torch.Generator]) -> Tensor:
    """Draw a clip from the model for each generator: power (n, frames, bins). Raises
    CheckpointError where the output is not finite."""
    log_variance = run.model.sample(len(generators), run.stft.frames(CLIP_SAMPLES), generators)
    run.check_finite(log_variance, "what the model generates")
    return bounded(log_variance).exp()


def scale_to_peak(waveforms: Tensor) -> Tensor:
    """Scale each of (n, samples) to max |s| = 1; silence stays silence."""
    return waveforms / waveforms.abs().amax(-1, keepdim=True).clamp_min(1e-6)


def find_phases(
    power: Tensor, stft: audio.STFT, seed: int, draw: int, numbers: range, stopwatch: Stopwatch
) -> Tensor:
    """Return clips of this power (n, frames, bins), with phases found by Griffin-Lim. Those that it
    starts from are drawn on the device: they differ between a GPU and a CPU."""
    with stopwatch.measure(GRIFFIN_LIM):
        generators = clip_generators("phases", seed, draw, numbers, power.device)
        return audio.griffin_lim(power, stft, length=CLIP_SAMPLES, generator=generators)


def model_source(run: Run, seed: int, draw: int, stopwatch: Stopwatch) -> ClipSource:
    """Return clips drawn from a model."""

    def make_clips(numbers: range) -> Tensor:
        with stopwatch.measure("sampling"):
            power = sample_power(run, clip_generators("latents", seed, draw, numbers))
        return find_phases(power, run.stft, seed, draw, numbers, stopwatch)

    return ClipSource(str(run.folder), make_clips, stopwatch)


def recorded_source(
    corpus: Corpus, count: int, seed: tuple[int, ...], device: torch.device, title: str = ""
) -> ClipSource:
    """Return `count` real clips, every place in the trimmed utterances equally likely."""
    windows = Windows(corpus, CLIP_SAMPLES)
    drawn = np.random.default_rng(seed).integers(len(windows), size=count)

    def make_clips(numbers: range) -> Tensor:
        return windows[drawn[numbers.start : numbers.stop]].to(device)

    return ClipSource(title, make_clips, Stopwatch(device))


def griffin_lim_source(
    recorded: ClipSource,
    stft: audio.STFT,
    seed: int,
    draw: int,
    stopwatch: Stopwatch,
    title: str = "",
) -> ClipSource:
    """Return the same clips, with their phases replaced by those that Griffin-Lim finds."""

    def make_clips(numbers: range) -> Tensor:
        power = stft.analyse(recorded.make_clips(numbers)).abs().square()
        return find_phases(power, stft, seed, draw, numbers, stopwatch)

    return ClipSource(title, make_clips, stopwatch)


@torch.no_grad()
def extract_features(
    source: ClipSource,
    count: int,
    extract: Callable[[Tensor], np.ndarray],
    batch: int,
    bar: tqdm,
) -> np.ndarray:
    """Return the features (count, width) of clips 0 … count − 1 of a source, `batch` of them at
    once."""
    features = []
    for first in range(0, count, batch):
        numbers = range(first, min(first + batch, count))
        clips = scale_to_peak(source.make_clips(numbers))
        with source.stopwatch.measure("features"):
            features.append(extract(clips))
        bar.update(len(numbers))
    return np.concatenate(features)


def choose_w(runs: list[Run], w: str | None, seed: int) -> list[str]:
    """Let every run with a sequence latent draw it from one of W_SOURCES; None: as it was trained.
    Return sentences about it. Raises SettingError where there is no sequence latent,
    CheckpointError where posteriors are not finite."""
    with_w = [run for run in runs if hasattr(run.model.config, "w_latent")]
    if w and not with_w:
        raise SettingError(f"w={w}: is for models with a sequence latent, not {runs[0].name}")
    notes = []
    for run in with_w:
        if w == "prior":
            run.model.w_moments = None
        elif w == "posterior":
            train = run.corpus.split("train")
            clips = recorded_source(train, W_CLIPS, (seed,), run.device)
            run.model.fit_w(run.stft.power(clips.make_clips(range(W_CLIPS))))
        if run.model.w_moments is not None:
            run.check_finite(run.model.w_moments, "the posterior of w")
            notes.append(
                f"{run.folder}: w is drawn from a Gaussian with the moments of its posteriors."
            )
    return notes


def measure(
    runs: list[Run], extract: Callable[[Tensor], np.ndarray], clips: int, repeats: int, seed: int
) -> dict[str, dict]:
    """Measure Fréchet distances from training clips: of runs on one corpus, and of clips of the
    evaluated split with exact phase and with Griffin-Lim's (under the STFT of each run), all drawn
    anew `repeats` times.

    Returns:
        title → {"fdsd": {"mean", "standard_deviation", "values"}, "clips_per_second": {part: …}}.
    """
    device = runs[0].device
    batch = BATCH[device.type]
    train = runs[0].corpus.split("train")
    distances = {}
    seconds = {}
    num_stfts = len({run.stft for run in runs})
    total = repeats * clips * (1 + len(runs) + 1 + num_stfts)
    with tqdm(total=total, desc="generation", unit="clip", disable=None) as bar:
        for draw in range(repeats):
            reference = recorded_source(train, clips, (seed, draw, 0), device)
            reference_features = extract_features(reference, clips, extract, batch, bar)
            for source in sources_of_draw(runs, clips, seed, draw):
                features = extract_features(source, clips, extract, batch, bar)
                distance = frechet_distance(features, reference_features)
                distances.setdefault(source.title, []).append(distance)
                seconds.setdefault(source.title, Counter()).update(source.stopwatch.seconds)
    rows = {}
    for title, values in distances.items():
        deviation = float(np.std(values, ddof=1)) if repeats > 1 else float("nan")
        rates = {part: repeats * clips / spent for part, spent in seconds[title].items()}
        rows[title] = {
            "fdsd": {
                "mean": float(np.mean(values)),
                "standard_deviation": deviation,
                "values": values,
            },
            "clips_per_second": rates,
        }
    return rows


def sources_of_draw(runs: list[Run], clips: int, seed: int, draw: int) -> list[ClipSource]:
    """Return the sources of all rows, the models first, then real speech."""
    device = runs[0].device
    split = runs[0].test.utterances[0].split
    sources = [model_source(run, seed, draw, Stopwatch(device)) for run in runs]
    recorded = recorded_source(
        runs[0].test, clips, (seed, draw, 1), device, f"{split} ({EXACT_PHASE})"
    )
    sources.append(recorded)
    stfts = list(dict.fromkeys(run.stft for run in runs))
    for stft in stfts:
        window = f", window {stft.window_length}" if len(stfts) > 1 else ""
        title = f"{split} ({GRIFFIN_LIM}{window})"
        sources.append(griffin_lim_source(recorded, stft, seed, draw, Stopwatch(device), title))
    return sources


def make_examples(runs: list[Run], seed: int) -> dict[Path, tuple[list[Sound], Figure]]:
    """Return for each run a few of its clips and of real ones as sounds, and a contact sheet of all
    runs."""
    numbers = range(EXAMPLES)
    device = runs[0].device
    stopwatch = Stopwatch(device)
    split = runs[0].test.utterances[0].split
    recorded = recorded_source(runs[0].test, EXAMPLES, (seed, 0, 1), device)
    stft = runs[0].stft
    recorded_power = stft.analyse(recorded.make_clips(numbers)).abs().square()
    rows = [(split, recorded_power.cpu().numpy(), stft)]
    sounds = {}
    for run in runs:
        power = sample_power(run, clip_generators("latents", seed, 0, numbers))
        rows.append((run.folder.resolve().name, power.cpu().numpy(), run.stft))
        without_phase = griffin_lim_source(recorded, run.stft, seed, 0, stopwatch)
        clips = {
            "sample": find_phases(power, run.stft, seed, 0, numbers, stopwatch),
            split: recorded.make_clips(numbers),
            f"{split}, Griffin-Lim": without_phase.make_clips(numbers),
        }
        sounds[run.folder] = []
        for label, waveforms in clips.items():
            for number, waveform in enumerate(scale_to_peak(waveforms).cpu().numpy()):
                sounds[run.folder].append(Sound(f"clip {number}", label, waveform))
    sheet = Figure("contact sheet", figures.contact_sheet(rows))
    return {folder: (of_run, sheet) for folder, of_run in sounds.items()}


def table(rows: dict[str, dict], published: Sequence[tuple[str, str]] = ()) -> Table:
    """Return distance and clips per second by title, then published distances, (title, distance)
    each."""
    lines = []
    for title, row in rows.items():
        fdsd = report.mean_and_error(row["fdsd"]["mean"], row["fdsd"]["standard_deviation"], 2)
        rates = [format_rate(row["clips_per_second"].get(part)) for part in PARTS]
        lines.append([title, fdsd, *rates])
    for title, distance in published:
        lines.append([f"{title} (paper)", distance, "", "", ""])
    return Table(["", "FDSD", *(f"{part}, clips/s" for part in PARTS)], lines)


def format_rate(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def load_recogniser(options: Options, device: torch.device) -> RecogniserFeatures | None:
    """Return what the distance is measured with, if it is to be. Raises SettingError for options
    that do not go together."""
    for flag, value, minimum in (("clips", options.clips, 2), ("repeats", options.repeats, 1)):
        if value is not None and options.recogniser is None:
            raise SettingError(
                f"--{flag} {value}: is for the distance, which needs --recogniser RUN"
            )
        if value is not None and value < minimum:
            raise SettingError(f"--{flag} {value}: expected at least {minimum}")
    if options.recogniser is None:
        return None
    if options.split == "train":
        raise SettingError(
            "--split train: the clips of the reference are of that split; expected dev or test"
        )
    return RecogniserFeatures(options.recogniser, device)


def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return sounds and a contact sheet for each run; with a recogniser, a table for each
    corpus."""
    recogniser = load_recogniser(options, runs[0].device)
    body = list(choose_w(runs, options.w, options.seed))
    if recogniser is None:
        body.append(
            "For the distance to real speech: --recogniser RUN, a run of train.py --model "
            "deepspeech2."
        )
    else:
        body.append(recogniser.describe())
    results = []
    for group in group_by_corpus(runs):
        group_body, group_results = evaluate_corpus(group, options, recogniser)
        body += group_body
        results += group_results
    return Evaluation(
        task="generation",
        description="Generation from the prior, and how far it is from real speech (LigHT-DVAE "
        "paper, Table 3 and Figure 3).",
        settings=options.select("recogniser", "clips", "repeats", "w"),
        body=body,
        results=in_order_of(runs, results),
    )


def evaluate_corpus(
    runs: list[Run], options: Options, recogniser: RecogniserFeatures | None
) -> tuple[list[str | Table], list[RunResult]]:
    examples = make_examples(runs, options.seed)
    body = []
    rows = {}
    settings = {}
    if recogniser is not None:
        clips, repeats = DEFAULTS[runs[0].device.type]
        clips = options.clips or clips
        repeats = options.repeats or repeats
        body.append(describe_clips(runs[0], clips, repeats, recogniser.about["features"]))
        rows = measure(runs, recogniser, clips, repeats, options.seed)
        published = published_rows(runs, options)
        body.append(table(rows, published))
        if published:
            body.append(
                "(paper): the features of another network; compare the order, not the values."
            )
        settings = {"clips": clips, "repeats": repeats, "recogniser": recogniser.about}
    titles_of_runs = {str(run.folder) for run in runs}
    real = {title: row for title, row in rows.items() if title not in titles_of_runs}
    results = []
    for run in runs:
        values = dict(settings)
        if hasattr(run.model.config, "w_latent"):
            values["w"] = "prior" if run.model.w_moments is None else "posterior"
        if rows:
            values |= rows[str(run.folder)] | {"real": real}
        sounds, sheet = examples[run.folder]
        results.append(run.result(values, sounds=sounds, figures=[sheet]))
    return body, results


def published_rows(runs: list[Run], options: Options) -> list[list[str]]:
    """Return published distances (title, distance) of the models of these runs, and of real
    speech."""
    names = {"", *(run.name for run in runs)}
    rows = []
    for name, *row in report.published("generation", report.published_layout(runs, options)):
        if name in names:
            rows.append(row)
    return rows


def describe_clips(run: Run, clips: int, repeats: int, features: int) -> str:
    """Say what is compared with what."""
    splits = []
    for corpus in (run.corpus.split("train"), run.test):
        windows = Windows(corpus, CLIP_SAMPLES, stride=CLIP_SAMPLES)
        text = f"{corpus.utterances[0].split} holds {len(windows):,} side by side"
        if clips > len(windows):
            text += ", so clips overlap"
        if windows.skipped:
            text += f" ({windows.skipped:,} of {len(corpus):,} utterances are too short)"
        splits.append(text)
    drawn = f"drawn {repeats} times: mean ± standard deviation" if repeats > 1 else "drawn once"
    text = (
        f"{run.data}: {clips:,} clips of {CLIP_SECONDS} s on each side (10,240 in the paper), "
        f"{drawn}. Real clips are cut at random places: {'; '.join(splits)}."
    )
    if clips <= features:
        text += (
            f" {clips:,} clips have no covariance of full rank in {features:,} features, and "
            f"distances come out much too large: take more than --clips {features}."
        )
    return text
