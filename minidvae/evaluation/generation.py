"""Generation from the prior, and how far it is from real speech (LigHT-DVAE paper, Table 3 and Figure 3).

Clips of 1.6 s: power spectrograms e^l drawn from a model, their phases found by Griffin-Lim. The distance is the
Fréchet distance between Gaussians fitted to features of generated and of real clips; the features are a speech
recogniser's, the mean over time of the last recurrent layer of a DeepSpeech2 (FDSD; Bińkowski et al., High fidelity
speech synthesis with adversarial networks, 2020). It depends on that network, and falls as the number of clips grows:
only numbers of one network and one number of clips compare. Real clips are cut at random places, the reference out of
the training split, those of the rows of real speech out of the split that is evaluated, which has other utterances.

The w of HiT-DVAE, LigHT-DVAE and DSAE is drawn from its prior, or from a Gaussian fitted to its posteriors. Every clip,
real or generated, is scaled to max |s| = 1, as the utterances that recognisers are trained on are.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
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
from .runs import Options, Run, noise_of

MODELS = resynthesis.MODELS

SECONDS = 1.6
SAMPLES = round(SECONDS * audio.SAMPLE_RATE)
EXAMPLES = 4  # clips of which sound and picture are kept
DEFAULTS = {
    "cpu": (512, 3),
    "cuda": (10_240, 5),
}  # clips on each side, and how often both are drawn anew
BATCH = {"cpu": 32, "cuda": 512}  # clips at once
W_CLIPS = 512  # of the training split, to whose posteriors of w a Gaussian is fitted
W = ("prior", "posterior")
UTTERANCES = 200  # at most, from which a recogniser's error rate is taken

SHEET = "contact_sheet.png"

EXACT, GRIFFIN_LIM = "exact phase", "Griffin-Lim"
PARTS = ("sampling", GRIFFIN_LIM, "features")  # of the time that a clip takes


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μa − μb|² + tr(A + B − 2 (AB)^½), the squared Fréchet distance of two Gaussians (Dowson & Landau 1982) with the
    means and covariances of features a (n, width) and b (m, width). AB has the eigenvalues of A^½ B A^½ =
    (A^½ B^½)(A^½ B^½)ᵀ, so the trace of its square root is the sum of the singular values of A^½ B^½: covariances
    without full rank are no special case."""
    covariances = [np.cov(features, rowvar=False, dtype=np.float64) for features in (a, b)]
    roots = []
    for values, vectors in map(np.linalg.eigh, covariances):
        roots.append((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
    common = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    return float(difference @ difference + sum(map(np.trace, covariances)) - 2 * common)


class Recogniser:
    """A trained DeepSpeech2, as the measure of the distance; `about` says what it is. Raises SettingError where the run
    is another model's, or takes features that are no function of the waveform alone."""

    def __init__(self, folder: Path, device: torch.device):
        model, stft, content = load_run(folder, device)
        if content["model"] != "deepspeech2":
            raise SettingError(
                f"--recogniser {folder}: is a {content['model']}; expected a run of deepspeech2"
            )
        data = content["plan"]["data"]
        self.run = Run(
            folder, "deepspeech2", model.eval(), stft, content, data, None, None, folder / "eval"
        )
        recipe = self.run.recipe
        if recipe.extractor:
            expected = (
                f"expected one with features {' or '.join(FEATURE_EXTRACTORS)} and no extractor"
            )
            raise SettingError(
                f"--recogniser {folder}: hears the {recipe.latent} of {recipe.extractor}; {expected}"
            )
        self.frames = FEATURE_EXTRACTORS[recipe.features].extract
        self.about = {"run": str(folder), "trained_on": data, "step": content["progress"]["step"]}
        self.about |= {"features": model.config.width, "symbols": recipe.targets}

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> np.ndarray:
        """(n, samples) → features (n, width). CheckpointError where one is not finite."""
        features = self.run.model.features(self.frames(clips)).cpu().numpy()
        if not np.isfinite(features).all():
            raise CheckpointError(
                f"{self.run.folder}: the recogniser's features are not finite; take another"
            )
        return features

    def describe(self) -> str:
        """What it is and how well it recognises, in sentences; `about` then has its errors too."""
        about = self.about = self.about | recognition_errors(self.run)
        rate = f"unknown ({about.get('unknown')})"
        if about["error_rate"] is not None:
            rate = f"{100 * about['error_rate']:.1f} %, on {about['utterances']} test utterances of that corpus, greedy"
        return (
            f"Features: {about['features']} of {about['run']}, a deepspeech2 trained on {about['trained_on']} for "
            f"{about['step']:,} steps.\nIts error rate in {about['symbols']}: {rate}."
        )


def recognition_errors(run: Run) -> dict:
    """{"error_rate", "errors", "utterances"} of a recogniser, decoded greedily on at most UTTERANCES test utterances of
    the corpus that it was trained on. Where that corpus is not to be had, or without transcripts, {"error_rate": None,
    "unknown": why}."""
    recipe, symbols, errors = run.recipe, run.model.config.symbols, decoding.Errors()
    try:
        test = load_corpus(run.data).split("test")
    except CorpusError as error:
        return {"error_rate": None, "unknown": str(error)}
    spoken = tuple(u for u in test.utterances if transcript(u, recipe.targets))
    if not spoken:
        return {"error_rate": None, "unknown": f"{run.data}: its test split has no transcripts"}
    test = replace(test, utterances=spoken).spread(UTTERANCES)
    for utterance, output in zip(test.utterances, outputs(run, test), strict=True):
        said, heard = (
            transcript(utterance, recipe.targets),
            [symbols[k] for k in decoding.ctc_greedy(output)],
        )
        errors += decoding.align(scored(said, recipe, symbols), scored(heard, recipe, symbols))
    return {"error_rate": errors.rate, "errors": asdict(errors), "utterances": len(test)}


Source = Callable[[range], Tensor]  # the numbers of some clips → their waveforms (n, SAMPLES)


class Stopwatch:
    """Seconds spent on each of PARTS, to the end of all that the device was given to do."""

    def __init__(self, device: torch.device):
        self.seconds = Counter()
        self.wait = (
            partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        )

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.wait()
        started = time.perf_counter()
        yield
        self.wait()
        self.seconds[part] += time.perf_counter() - started


def noise_of_clips(
    what: str, seed: int, draw: int, numbers: range, device="cpu"
) -> list[torch.Generator]:
    """For "latents" or "phases", the random numbers of each clip: the same whatever other clips are drawn with it."""
    return [noise_of(seed, f"{what}, draw {draw}, clip {number}", device) for number in numbers]


@torch.no_grad()
def sample(run: Run, noise: list[torch.Generator]) -> Tensor:
    """A clip from the model for each generator: power (n, frames, bins). Raises CheckpointError where the output is not
    finite."""
    log_variance = run.model.sample(len(noise), run.stft.frames(SAMPLES), noise)
    run.check_finite(log_variance, "what the model generates")
    return bounded(log_variance).exp()


def scaled(waveforms: Tensor) -> Tensor:
    """(n, samples) with max |s| = 1 each; silence stays silence."""
    return waveforms / waveforms.abs().amax(-1, keepdim=True).clamp_min(1e-6)


def with_phases(
    power: Tensor, stft: audio.STFT, seed: int, draw: int, numbers: range, watch: Stopwatch
) -> Tensor:
    """Clips of this power (n, frames, bins), their phases found by Griffin-Lim. Those it starts from are drawn on the
    device: they are others on a GPU than on a CPU."""
    with watch(GRIFFIN_LIM):
        noise = noise_of_clips("phases", seed, draw, numbers, power.device)
        return audio.griffin_lim(power, stft, length=SAMPLES, generator=noise)


def generated(run: Run, seed: int, draw: int, watch: Stopwatch, numbers: range) -> Tensor:
    """Clips of a model."""
    with watch("sampling"):
        power = sample(run, noise_of_clips("latents", seed, draw, numbers))
    return with_phases(power, run.stft, seed, draw, numbers, watch)


def recorded(corpus: Corpus, count: int, *seed: int, device: torch.device) -> Source:
    """Real clips, `count` of them, every place in the trimmed utterances equally likely."""
    windows = Windows(corpus, SAMPLES)
    drawn = np.random.default_rng(seed).integers(len(windows), size=count)
    return lambda numbers: windows[drawn[numbers.start : numbers.stop]].to(device)


def without_phase(
    source: Source, stft: audio.STFT, seed: int, draw: int, watch: Stopwatch, numbers: range
) -> Tensor:
    """The same clips, their phases forgotten and found again by Griffin-Lim."""
    return with_phases(
        stft.analyse(source(numbers)).abs().square(), stft, seed, draw, numbers, watch
    )


@torch.no_grad()
def features_of(
    source: Source,
    count: int,
    extract: Callable[[Tensor], np.ndarray],
    batch: int,
    watch: Stopwatch,
    progress=int,
) -> np.ndarray:
    """The features (count, width) of clips 0 … count − 1 of a source, of which `batch` are held at once."""
    features = []
    for first in range(0, count, batch):
        numbers = range(first, min(first + batch, count))
        clips = scaled(source(numbers))
        with watch("features"):
            features.append(extract(clips))
        progress(len(numbers))
    return np.concatenate(features)


def choose_w(runs: list[Run], w: str | None, seed: int) -> None:
    """Let every run with a sequence latent draw it from what is asked for, one of W, else as it was trained. Raises
    SettingError where there is none, CheckpointError where posteriors are not finite."""
    with_w = [run for run in runs if hasattr(run.model.config, "w_latent")]
    if w and not with_w:
        raise SettingError(f"--w {w}: is for models with a sequence latent, not {runs[0].name}")
    for run in with_w:
        if w == "prior":
            run.model.w_moments = None
        elif w == "posterior":
            clips = recorded(run.corpus.split("train"), W_CLIPS, seed, device=run.device)
            run.model.fit_w(run.stft.power(clips(range(W_CLIPS))))
        if run.model.w_moments is not None:
            run.check_finite(run.model.w_moments, "the posterior of w")
            print(f"{run.folder}: w is drawn from a Gaussian with the moments of its posteriors")


def measure(
    runs: list[Run], extract: Callable[[Tensor], np.ndarray], clips: int, repeats: int, seed: int
) -> dict:
    """Fréchet distances from training clips, of runs on one corpus and of clips of the evaluated split with exact phase
    and with Griffin-Lim's (under the STFT of each run), all drawn anew `repeats` times. Returns {title: {"fdsd":
    {"mean", "standard_deviation", "values"}, "clips_per_second": {part: …}}}."""
    device, train, test = runs[0].device, runs[0].corpus.split("train"), runs[0].test
    split, batch = test.utterances[0].split, BATCH[device.type]
    stfts = dict.fromkeys(run.stft for run in runs)
    windows = {stft: f", window {stft.window_length}" if len(stfts) > 1 else "" for stft in stfts}
    distances, watches = defaultdict(list), defaultdict(partial(Stopwatch, device))
    total = repeats * clips * (1 + len(runs) + 1 + len(stfts))
    with tqdm(total=total, desc="generation", unit="clip", disable=None) as bar:
        for draw in range(repeats):
            reference = recorded(train, clips, seed, draw, 0, device=device)
            reference = features_of(reference, clips, extract, batch, Stopwatch(device), bar.update)
            spoken = recorded(test, clips, seed, draw, 1, device=device)
            titles = {str(run.folder): run for run in runs}
            sources = {
                title: partial(generated, run, seed, draw, watches[title])
                for title, run in titles.items()
            }
            sources[f"{split} ({EXACT})"] = spoken
            for stft, window in windows.items():
                title = f"{split} ({GRIFFIN_LIM}{window})"
                sources[title] = partial(without_phase, spoken, stft, seed, draw, watches[title])
            for title, source in sources.items():
                found = features_of(source, clips, extract, batch, watches[title], bar.update)
                distances[title].append(frechet_distance(found, reference))
    rows = {}
    for title, values in distances.items():
        deviation = float(np.std(values, ddof=1)) if repeats > 1 else float("nan")
        fdsd = {"mean": float(np.mean(values)), "standard_deviation": deviation, "values": values}
        rates = {
            part: repeats * clips / seconds for part, seconds in watches[title].seconds.items()
        }
        rows[title] = {"fdsd": fdsd, "clips_per_second": rates}
    return rows


def keep_examples(runs: list[Run], seed: int) -> None:
    """Into the folder of each run: a few of its clips and of real ones as wav files, a contact sheet of all runs."""
    numbers, watch, test = range(EXAMPLES), Stopwatch(runs[0].device), runs[0].test
    split = test.utterances[0].split
    spoken = recorded(test, EXAMPLES, seed, 0, 1, device=runs[0].device)
    rows = [
        (split, runs[0].stft.analyse(spoken(numbers)).abs().square().cpu().numpy(), runs[0].stft)
    ]
    for run in runs:
        power = sample(run, noise_of_clips("latents", seed, 0, numbers))
        rows.append((run.folder.resolve().name, power.cpu().numpy(), run.stft))
        made = {
            "sample": with_phases(power, run.stft, seed, 0, numbers, watch),
            split: spoken(numbers),
        }
        made[f"{split}-griffin-lim"] = without_phase(spoken, run.stft, seed, 0, watch, numbers)
        for name, clips in made.items():
            for number, clip in enumerate(scaled(clips).cpu().numpy()):
                audio.write(run.target / f"{name}-{number}.wav", clip)
    for run in runs:
        figures.contact_sheet(rows, run.target / SHEET)


def table(rows: dict[str, dict], published: Sequence[tuple[str, str]] = ()) -> str:
    """Distance and clips per second by title, then published distances, (title, distance) each."""
    lines = []
    for title, row in rows.items():
        rates = [row["clips_per_second"].get(part) for part in PARTS]
        rates = [
            "" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
            for rate in rates
        ]
        lines.append(
            [
                title,
                report.mean_and_error(row["fdsd"]["mean"], row["fdsd"]["standard_deviation"], 2),
                *rates,
            ]
        )
    lines += [[f"{title} (paper)", distance, "", "", ""] for title, distance in published]
    return report.table(["", "FDSD", *(f"{part}, clips/s" for part in PARTS)], lines)


def recogniser_of(options: Options, device: torch.device) -> Recogniser | None:
    """What the distance is measured with, if it is to be. Raises SettingError for flags that do not go together."""
    for flag, value, least in (("clips", options.clips, 2), ("repeats", options.repeats, 1)):
        if value is not None and options.recogniser is None:
            raise SettingError(
                f"--{flag} {value}: is for the distance, which needs --recogniser RUN"
            )
        if value is not None and value < least:
            raise SettingError(f"--{flag} {value}: expected at least {least}")
    if options.recogniser is None:
        return None
    if options.split == "train":
        raise SettingError(
            "--split train: the clips of the reference are of that split; expected dev or test"
        )
    return Recogniser(options.recogniser, device)


def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """Examples in the folder of every run; with a recogniser, a table for each corpus."""
    recogniser = recogniser_of(options, runs[0].device)
    choose_w(runs, options.w, options.seed)
    ask = "For the distance to real speech: --recogniser RUN, a run of train.py --model deepspeech2"
    print(recogniser.describe() if recogniser else ask)
    return evaluate_corpus(runs, options, recogniser)


@report.by_corpus
def evaluate_corpus(runs: list[Run], options: Options, recogniser: Recogniser | None) -> list[dict]:
    for run in runs:
        report.begin(run)
    keep_examples(runs, options.seed)
    rows, settings = {}, {}
    if recogniser is not None:
        clips, repeats = DEFAULTS[runs[0].device.type]
        clips, repeats = options.clips or clips, options.repeats or repeats
        print(counts(runs[0], clips, repeats, recogniser.about["features"]))
        rows = measure(runs, recogniser, clips, repeats, options.seed)
        layout, models = report.published_layout(runs, options), {"", *(run.name for run in runs)}
        published = [
            row for model, *row in report.published("generation", layout) if model in models
        ]
        print(f"\n{table(rows, published)}\n")
        if published:
            print("(paper): the features of another network; compare the order, not the values.")
        settings = {"clips": clips, "repeats": repeats, "recogniser": recogniser.about}
    real, results = (
        {
            title: row
            for title, row in rows.items()
            if title not in {str(run.folder) for run in runs}
        },
        [],
    )
    for run in runs:
        drawn = (
            {"w": W[run.model.w_moments is not None]}
            if hasattr(run.model.config, "w_latent")
            else {}
        )
        result = settings | drawn
        result |= rows[str(run.folder)] | {"real": real} if rows else {}
        results.append(report.write(run, options, result, f"wav files, {SHEET}"))
    return results


def counts(run: Run, clips: int, repeats: int, features: int) -> str:
    """What is compared with what, in sentences."""
    parts = []
    for corpus in (run.corpus.split("train"), run.test):
        windows = Windows(corpus, SAMPLES, stride=SAMPLES)
        parts.append(f"{corpus.utterances[0].split} holds {len(windows):,} side by side")
        parts[-1] += ", so clips overlap" if clips > len(windows) else ""
        parts[-1] += (
            f" ({windows.skipped:,} of {len(corpus):,} utterances are too short)"
            if windows.skipped
            else ""
        )
    drawn = f"drawn {repeats} times: mean ± standard deviation" if repeats > 1 else "drawn once"
    text = (
        f"{run.data}: {clips:,} clips of {SECONDS} s on each side (10,240 in the paper), {drawn}.\n"
    )
    text += f"Real clips are cut at random places: {'; '.join(parts)}."
    if clips <= features:
        text += f"\n{clips:,} clips have no covariance of full rank in {features:,} features, and distances come out "
        text += f"much too large: take more than --clips {features}."
    return text
