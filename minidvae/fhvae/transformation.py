"""What z1 and z2 of an FHVAE hold: exchange, shift and traversal (FHVAE paper, section 4.1,
appendices D, E and H).

Pictures and sound: the A/B/C grid (Figure 4), utterances whose z2 is shifted toward a reference's
(Figures 1 and 5), traversal of each latent (Figures 11 to 14), reconstructions of several models
side by side (Figure 6). Numbers for them: the segment bound, linear probes, and what a change of z2
moves and what it keeps.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..data import audio
from ..data.corpus import CLEAN, Corpus
from ..evaluation import figures, report
from ..evaluation.pairs import conversion_pairs
from ..evaluation.results import Evaluation, Figure, RunResult, Sound, Table, Traversal
from ..evaluation.runs import Options, Run
from ..inference.convert import segments_of
from ..training.segment_batches import FeatureSegments
from . import probes
from .encoding import EncodedUtterance, encode, features_of

MODELS = ["fhvae"]

GRID_ROWS = 4  # rows of block A in Figure 4
GRID_COLUMNS = 10  # columns of block B
TRAVERSAL_SEEDS = 5
TRAVERSAL_VALUES = np.linspace(-3, 3, 7)
TILED_LATENTS = 8  # latents whose traversal an HTML page shows with a slider
RECONSTRUCTED_SEGMENTS = 3
SHOWN_FRAMES = 400  # frames of an utterance in a picture
PAIRS = 32  # pairs of utterances that are measured after a swap and a shift
NOISY_UTTERANCES = 16  # utterances that are measured after denoising
# Pairs of utterances that are nearer, in ln Hz and cm, cannot show a movement.
MIN_DISTANCES = {"log_f0": 0.1, "tract": 0.5}


@torch.no_grad()
def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return four tables, and for each run its numbers, figures and sounds."""
    results = [evaluate_run(run, options, runs) for run in runs]
    values = {}
    for title, result in zip(report.titles(runs), results, strict=True):
        values[title] = result.values
    notes = []
    for run in runs:
        notes += notes_of(run)
    return Evaluation(
        task="transformation",
        description="What z1 and z2 of an FHVAE hold: exchange, shift and traversal (FHVAE paper, "
        "section 4.1, appendices D, E and H).",
        settings=options.select(),
        body=[
            *dict.fromkeys(notes),
            bounds_table(values, report.published_layout(runs, options)),
            probes_table(values),
            "Linear probes. phone, speaker: of each segment from z1 and z2; with μ: of each "
            "utterance from μ1 and μ2. Accuracy beside the most frequent class; of ln F0 and "
            "vocal-tract length R². Trained on the training split; speaker: on half of each test "
            "speaker's utterances. –: this corpus cannot tell.",
            movement_table(values),
            "F0, tract: the way from source, 0%, to reference, 100%; medians over up to "
            f"{PAIRS} pairs of opposite sex (different speakers where it is unknown). swap: z2 of "
            "each segment from the reference; shift: z2 + Δμ2. phones: frames whose phone a linear "
            "classifier recognises that was trained on real features.",
            denoising_table(values),
            "Distance to the clean features, RMS in deviations of a bin; clean: of the clean one's "
            "own reconstruction.",
        ],
        results=results,
    )


def notes_of(run: Run) -> list[str]:
    """Say what a corpus or a model cannot give."""
    notes = []
    if len(run.test.speakers) < 2:
        notes.append("No voice conversion: the test utterances are all of one speaker.")
    if not noisy_utterances(run.test):
        notes.append(
            "No denoising: it needs noisy and clean test utterances; try --data conditions:CORPUS."
        )
    if run.recipe.features != "log_magnitude":
        notes.append(
            "No sounds: filter banks cannot be turned to sound; train with --set "
            "features=log_magnitude."
        )
    return notes


def evaluate_run(run: Run, options: Options, runs: list[Run]) -> RunResult:
    """Return numbers, pictures and sounds of one run. Those of `runs` that can stand beside it are
    in its picture of reconstructions."""
    config = run.model.config
    seed = options.seed
    train_corpus = run.corpus.split("train").spread(probes.UTTERANCES)
    train = probes.observe(run, train_corpus, "training split", keep=probes.FRAMES)
    test = probes.observe(run, run.test, "test split")
    parameters = [p.numel() for name, p in run.model.named_parameters() if name != "table"]
    values = {
        "features": run.recipe.features,
        "architecture": config.architecture,
        "alpha": config.alpha,
        "parameters": sum(parameters),
        "bound": segment_bound(run, seed),
        "probes": probes.probes(train, test),
        "movement": movement(run, probes.fit_instruments(train), test, seed),
        "denoising": denoising(run),
    }
    traversal_figures, traversals = draw_traversals(run, test, seed)
    pictures = [draw_swap_grid(run, seed), *traversal_figures]
    pictures.append(draw_reconstructions(run, runs, seed))
    utterance_figures, sounds = transform_utterances(run, seed)
    pictures += utterance_figures
    return run.result(values, sounds=sounds, figures=pictures, traversals=traversals)


def encode_side_by_side(run: Run, test: Corpus, index: int) -> EncodedUtterance:
    """Encode an utterance in segments that do not overlap."""
    return encode(run, test, index, shift=run.recipe.frames)


def decode(run: Run, encoded: EncodedUtterance, z2: Tensor) -> Tensor:
    """Decode each segment from its own z1 and a given z2 (N, z2_latent), one after the other:
    features (frames, bins)."""
    decoded = run.model.decode(encoded.z1, z2).flatten(0, 1)
    return decoded[: len(encoded.features)]


def swapped_z2(source: EncodedUtterance, reference: EncodedUtterance) -> Tensor:
    """Return for segment n of the source the z2 of segment n of the reference, repeated where that
    is shorter."""
    return reference.z2[torch.arange(len(source.z2)) % len(reference.z2)]


def shifted_z2(source: EncodedUtterance, reference: EncodedUtterance) -> Tensor:
    """Return z2 + Δμ2, where Δμ2 = μ2 of the reference − μ2 of the source; the paper calls the
    reference the target (appendix E)."""
    return source.z2 + (reference.mu2 - source.mu2)


def clean_reference(test: Corpus, index: int) -> int:
    """Return another clean utterance of the same speaker; of any speaker where there is none;
    `index` where there is no other."""
    later = range(index + 1, len(test))
    earlier = range(index)
    candidates = []
    for other in [*later, *earlier]:
        if test.utterances[other].condition in CLEAN:
            candidates.append(other)
    speaker = test.utterances[index].speaker
    of_speaker = []
    for other in sorted(candidates):
        if test.utterances[other].speaker == speaker:
            of_speaker.append(other)
    return (of_speaker or candidates or [index])[0]


def noisy_utterances(test: Corpus) -> list[int]:
    """Return the utterances with noise, of a corpus that has clean speech too; else none."""
    without_conditions = test.without_conditions()
    if not any(u.condition in CLEAN for u in without_conditions.utterances):
        return []
    return [i for i, u in enumerate(test.utterances) if u.condition == "noisy"]


def noisy_and_reference(run: Run, index: int) -> tuple[EncodedUtterance, EncodedUtterance]:
    """Return a noisy test utterance, and the clean one that its z2 is shifted to."""
    without_conditions = run.test.without_conditions()
    noisy = encode_side_by_side(run, run.test, index)
    reference = clean_reference(without_conditions, index)
    return noisy, encode_side_by_side(run, without_conditions, reference)


@torch.no_grad()
def segment_bound(run: Run, seed: int) -> float:
    """Return the segment variational lower bound (eq. 1), mean over all segments of the test
    utterances, in nats: s-vectors in closed form, one draw of z1 and z2."""
    recipe = replace(run.recipe, domain="")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    count = 0
    segments = FeatureSegments(run.test, recipe, seed, run.device)
    for batch, size in segments.development(run.model):
        loss, _ = run.model.loss(batch, run.model.draw_noise(size, generator))
        total = total - size * float(loss)
        count += size
    return total / count


def movement(
    run: Run, measure: probes.Measure, test: list[probes.ObservedUtterance], seed: int
) -> dict:
    """Measure what becomes of F0, vocal-tract length and phones when z2 changes, over pairs of
    utterances.

    Returns:
        For each of reconstruction, swap and shift: the median over pairs of (decoded − source) /
        (reference − source), of ln F0 ("log_f0") and of vocal-tract length ("tract"), source and
        reference measured on their real features; and the mean share of frames whose phone is
        recognised ("phones"). "instruments": R² of what is measured on real features against what
        is known. What cannot be measured is left out.
    """
    pairs = conversion_pairs(run.test, PAIRS, seed)
    measured = {}  # on real features, by utterance
    phones = {"original": [], "reconstruction": [], "swap": [], "shift": []}
    moved = {}
    for source_index, reference_index in pairs:
        source = encode_side_by_side(run, run.test, source_index)
        reference = encode_side_by_side(run, run.test, reference_index)
        of_source = measure(run, source, source.features)
        of_reference = measure(run, reference, reference.features)
        measured[source_index] = of_source
        measured[reference_index] = of_reference
        z2_by_way = {
            "reconstruction": source.z2,
            "swap": swapped_z2(source, reference),
            "shift": shifted_z2(source, reference),
        }
        phones["original"].append(of_source["phones"])
        for way, z2 in z2_by_way.items():
            values = measure(run, source, decode(run, source, z2))
            phones[way].append(values["phones"])
            for name, min_distance in MIN_DISTANCES.items():
                distance = of_reference[name] - of_source[name]
                if abs(distance) >= min_distance and not math.isnan(values[name]):
                    share = (values[name] - of_source[name]) / distance
                    moved.setdefault((way, name), []).append(share)
    result = {"pairs": len(pairs)}
    if pairs:
        for way, shares in phones.items():
            finite = [share for share in shares if not math.isnan(share)]
            result[way] = {"phones": float(np.mean(finite))} if finite else {}
    for (way, name), shares in moved.items():
        result[way] |= {name: float(np.median(shares)), f"{name}_pairs": len(shares)}
    result["instruments"] = instrument_quality(test, measured)
    return result


def instrument_quality(
    test: list[probes.ObservedUtterance], measured: dict[int, dict[str, float]]
) -> dict[str, float]:
    """Return R² of the values measured on real features against the true ones."""
    quality = {}
    for name in MIN_DISTANCES:
        rows = [[getattr(test[i], name), values[name]] for i, values in measured.items()]
        pairs = torch.tensor(rows).view(-1, 2)
        pairs = pairs[~pairs.isnan().any(1)]
        if len(pairs) > 1:
            quality[name] = probes.r_squared(pairs[:, 1], pairs[:, 0])
    return quality


def denoising(run: Run) -> dict[str, float]:
    """Measure how far features are from those of the clean utterance: the root mean square over
    frames and bins, in standard deviations of each bin, mean over utterances with noise.

    Returns:
        "noisy": with the noise; "reconstruction": that reconstructed; "denoised": with z2 shifted
        toward another clean utterance; "clean": the reconstruction of the clean one, as near as it
        can come. Empty where the corpus does not know them without the noise.
    """
    sources = noisy_utterances(run.test) if run.test.clean is not None else []
    count = min(NOISY_UTTERANCES, len(sources))
    if not count:
        return {}
    deviation = run.model.standardise.deviation
    distances = {"noisy": [], "reconstruction": [], "denoised": [], "clean": []}
    for number in range(count):
        index = sources[number * len(sources) // count]
        clean = encode_side_by_side(run, run.test.without_conditions(), index)
        noisy, reference = noisy_and_reference(run, index)
        attempts = {
            "noisy": noisy.features,
            "reconstruction": decode(run, noisy, noisy.z2),
            "denoised": decode(run, noisy, shifted_z2(noisy, reference)),
            "clean": decode(run, clean, clean.z2),
        }
        for name, features in attempts.items():
            error = (features - clean.features) / deviation
            distances[name].append(float(error.square().mean().sqrt()))
    return {name: float(np.mean(values)) for name, values in distances.items()}


def choose_segments(run: Run, count: int, seed: int) -> Tensor:
    """Return segments full of speech (count, frames, bins) from utterances spread over the test,
    men's in the first half and women's in the other. Which ones depends on the waveforms only: they
    are the same for every model."""
    num_frames = run.recipe.frames
    random = np.random.default_rng(seed)
    groups = []
    for sex in "MF":
        groups.append([i for i, u in enumerate(run.test.utterances) if u.sex == sex])
    if not all(groups):
        groups = [range(len(run.test))] * 2
    chosen = []
    for group, number in zip(groups, (count // 2, count - count // 2), strict=True):
        for i in range(number):
            index = group[int((i + random.random()) * len(group) / number)]
            waveform = run.test.waveform(index, trim=run.recipe.trim)
            is_voiced = audio.voiced_frames(torch.from_numpy(waveform)).float()
            voiced = segments_of(is_voiced[:, None], num_frames, num_frames)
            share = voiced.mean((1, 2)).numpy()
            fullest = np.flatnonzero(share >= 0.9 * share.max())
            segments = segments_of(features_of(run, waveform), num_frames, num_frames)
            chosen.append(segments[random.choice(fullest)])
    return torch.stack(chosen)


def draw_swap_grid(run: Run, seed: int) -> Figure:
    """Draw the grid of Figure 4: z1 of the row with z2 of the column."""
    model = run.model
    rows = choose_segments(run, GRID_ROWS, seed)
    columns = choose_segments(run, GRID_COLUMNS, seed + 1)
    of_rows = model.infer(rows)
    of_columns = model.infer(columns)
    z1 = of_rows.z1.repeat_interleave(GRID_COLUMNS, 0)
    z2 = of_columns.z2.repeat(GRID_ROWS, 1)
    grid = model.decode(z1, z2).unflatten(0, (GRID_ROWS, GRID_COLUMNS))
    block_a = model.decode(of_rows.z1, of_rows.z2)[:, None]
    block_b = torch.stack([columns, model.decode(of_columns.z1, of_columns.z2)])
    png = figures.swap_grid(block_a.cpu().numpy(), block_b.cpu().numpy(), grid.cpu().numpy())
    return Figure("swap", png)


def draw_traversals(
    run: Run, test: list[probes.ObservedUtterance], seed: int
) -> tuple[list[Figure], list[Traversal]]:
    """Draw traversals of z1 and of z2, as Figures 11 to 14 but of every latent, those first whose
    posterior means vary most over the test segments; and the first TILED_LATENTS as tiles."""
    seeds = choose_segments(run, TRAVERSAL_SEEDS, seed + 2)
    means = run.model.infer(seeds)
    pictures = []
    traversals = []
    for which, name in enumerate(("z1", "z2")):
        deviations = torch.cat([getattr(e, name) for e in test]).std(0, correction=0)
        walks = []
        labels = []
        for j in deviations.argsort(descending=True).tolist():
            decoded = traverse(run, (means.z1, means.z2), which, j)
            walks.append((f"$z_{which + 1}$[{j}], deviation {deviations[j]:.2f}", decoded))
            labels.append(f"z{which + 1}[{j}], deviation {deviations[j]:.2f}")
        seed_pictures = seeds.cpu().numpy()
        label = f"traversal-{name}"
        pictures.append(Figure(label, figures.traversal(seed_pictures, walks, TRAVERSAL_VALUES)))
        tiles = figures.traversal_tiles(seed_pictures, walks[:TILED_LATENTS])
        traversals.append(
            Traversal(label, tiles, labels[:TILED_LATENTS], TRAVERSAL_VALUES.tolist())
        )
    return pictures, traversals


def traverse(run: Run, latents: tuple[Tensor, Tensor], which: int, dimension: int) -> np.ndarray:
    """Return what is decoded (seeds, values, frames, bins) while one dimension of z1 (`which` 0) or
    z2 (1) takes TRAVERSAL_VALUES."""
    num_values = len(TRAVERSAL_VALUES)
    z = [latent.repeat_interleave(num_values, 0) for latent in latents]
    z[which][:, dimension] = torch.from_numpy(TRAVERSAL_VALUES).to(z[which]).repeat(len(latents[0]))
    decoded = run.model.decode(*z)
    return decoded.unflatten(0, (len(latents[0]), num_values)).cpu().numpy()


def draw_reconstructions(run: Run, runs: list[Run], seed: int) -> Figure:
    """Draw Figure 6: reconstructions by this run and by all others of the same speech and
    features."""
    compared = [run]
    for other in runs:
        if other is not run and input_of(other) == input_of(run):
            compared.append(other)
    titles = [other.model.config.architecture.upper() for other in compared]
    if len(set(titles)) < len(titles):
        titles = [other.folder.name for other in compared]
    segments = choose_segments(run, RECONSTRUCTED_SEGMENTS, seed + 3)
    columns = [segments]
    for other in compared:
        latents = other.model.infer(segments)
        columns.append(other.model.decode(latents.z1, latents.z2))
    examples = torch.stack(columns, dim=1).cpu().numpy()
    return Figure("reconstructions", figures.reconstructions(examples, ["original", *titles]))


def input_of(run: Run) -> tuple:
    """Return what has to be equal for two runs to see the same segments."""
    return run.data, run.recipe.features, run.recipe.frames, run.recipe.trim


def transform_utterances(run: Run, seed: int) -> tuple[list[Figure], list[Sound]]:
    """Transform whole utterances, as in Figures 1 and 5: from a man to a woman, from a woman to a
    man, from noise to clean."""
    words = {"M": "male", "F": "female"}
    pictures = []
    sounds = []
    names = set()
    for pair in conversion_pairs(run.test, len(run.test), seed):
        sexes = [words.get(run.test.utterances[i].sex, "") for i in pair]
        if set(sexes) == {"male", "female"}:
            name = f"conversion-{sexes[0]}-to-{sexes[1]}"
            titles = [f"{sex} speaker" for sex in sexes]
        else:
            name = f"conversion-{len(names) + 1}"
            titles = ["a speaker", "another speaker"]
        if name in names or len(names) == 2:
            continue
        names.add(name)
        source = encode_side_by_side(run, run.test, pair[0])
        reference = encode_side_by_side(run, run.test, pair[1])
        pictures.append(draw_transformation(run, name, source, reference, titles))
        sounds += transformation_sounds(run, name, source, reference, seed)
    noisy = noisy_utterances(run.test)
    if noisy:
        source, reference = noisy_and_reference(run, noisy[len(noisy) // 2])
        titles = ["noisy", "clean"]
        pictures.append(draw_transformation(run, "denoising", source, reference, titles))
        sounds += transformation_sounds(run, "denoising", source, reference, seed)
    return pictures, sounds


def draw_transformation(
    run: Run,
    name: str,
    source: EncodedUtterance,
    reference: EncodedUtterance,
    titles: list[str],
) -> Figure:
    """Draw source and reference, their reconstructions, and the source with shifted z2."""
    transformed = decode(run, source, shifted_z2(source, reference))
    panels = {
        "source": (f"source: {titles[0]}, {source.utterance.name}", source.features),
        "reference": (f"reference: {titles[1]}, {reference.utterance.name}", reference.features),
        "reconstruction": ("reconstruction of the source", decode(run, source, source.z2)),
        "transformed": (f"$z_1$ of the source, $z_2$ shifted: {' to '.join(titles)}", transformed),
        "other": ("reconstruction of the reference", decode(run, reference, reference.z2)),
    }
    shown = {}
    for part, (title, features) in panels.items():
        shown[part] = (title, features[:SHOWN_FRAMES].cpu().numpy())
    return Figure(name, figures.transformation(shown), group=name)


def transformation_sounds(
    run: Run, name: str, source: EncodedUtterance, reference: EncodedUtterance, seed: int
) -> list[Sound]:
    """Return source, reference and reconstruction; and the transformed utterance with the phase of
    the source and with one found by Griffin-Lim. Only log-magnitude features can be heard."""
    if run.recipe.features != "log_magnitude":
        return []
    stft = audio.FEATURE_STFT
    spectrum = stft.analyse(torch.from_numpy(source.waveform))
    length = len(source.waveform)
    sounds = [
        Sound(name, "source", source.waveform),
        Sound(name, "reference", reference.waveform),
    ]
    power = None
    for label, z2 in (
        ("reconstruction", source.z2),
        ("transformed", shifted_z2(source, reference)),
    ):
        power = audio.log_magnitude_to_power(decode(run, source, z2).cpu())
        waveform = audio.resynthesise(power.log(), spectrum, stft, length)
        sounds.append(Sound(name, f"{label}, phase of the source", waveform.numpy()))
    generator = torch.Generator().manual_seed(seed)
    waveform = audio.griffin_lim(power, stft, length=length, generator=generator)
    sounds.append(Sound(name, "transformed, Griffin-Lim", waveform.numpy()))
    return sounds


def bounds_table(values: dict[str, dict], layout: str | None = None) -> Table:
    """layout: of the corpus if published rows may stand beside ours."""
    rows = []
    for title, v in values.items():
        numbers = [f"{v['alpha']:g}", f"{v['bound']:.2f}"]
        rows.append([title, v["architecture"], v["features"], *numbers])
    architectures = {v["architecture"] for v in values.values()}
    for name, bound in report.published("transformation", layout):
        if name in architectures:
            rows.append([f"{name.upper()} (paper)", name, "", "0", bound])
    return Table(["", "architecture", "features", "α", "segment bound"], rows)


def probes_table(values: dict[str, dict]) -> Table:
    """Accuracies in %, of F0 and vocal-tract length R². What a corpus cannot tell is a dash."""
    rows = []
    chance_before = None
    for title, v in values.items():
        chance = probe_cells(v["probes"], "chance")
        if chance != chance_before:
            rows.append(["chance", "", *chance])
        rows.append([title, "z1", *probe_cells(v["probes"], "z1")])
        rows.append(["", "z2", *probe_cells(v["probes"], "z2")])
        chance_before = chance
    names = next(iter(values.values()))["probes"]
    return Table(["", "", *names], rows, left_columns=2)


def probe_cells(results: dict[str, dict | None], which: str) -> list[str]:
    format_specs = {"accuracy": ".1%", "r_squared": ".2f"}
    cells = []
    for probe in results.values():
        cells.append(format(probe[which], format_specs[probe["measure"]]) if probe else "–")
    return cells


def movement_table(values: dict[str, dict]) -> Table:
    rows = []
    for title, v in values.items():
        for way in ("original", "reconstruction", "swap", "shift"):
            of_way = v["movement"].get(way, {})
            cells = [report.number(of_way.get(name), ".0%") for name in MIN_DISTANCES]
            phones = report.number(of_way.get("phones"), ".1%")
            rows.append([title if way == "original" else "", way, *cells, phones])
        quality = v["movement"]["instruments"]
        cells = [report.number(quality.get(name), ".2f") for name in MIN_DISTANCES]
        rows.append(["", "R² of the instrument", *cells, ""])
    return Table(["", "", "F0", "tract", "phones"], rows, left_columns=2)


def denoising_table(values: dict[str, dict]) -> Table:
    headings = {
        "noisy": "noisy",
        "reconstruction": "reconstructed",
        "denoised": "denoised",
        "clean": "clean",
    }
    rows = []
    for title, v in values.items():
        rows.append([title, *(report.number(v["denoising"].get(name), ".3f") for name in headings)])
    return Table(["", *headings.values()], rows)
