r"""Ablations of HiT-DVAE and LigHT-DVAE (LigHT-DVAE paper, Table 2): six trainings with one budget,
then two tables. The models are the paper's; the second command is as in the paper.

    python studies/ablations.py --recipe quick \
        --set scheduled_sampling=0,0 input_scale=power z_log_variance=0
    python studies/ablations.py --data ~/VoiceBank --recipe light2023 --set frames=100

Inv-s: x makes the queries of the likelihood's decoder, and z the keys and values. Inv-s-NR: the
same without residual connections. GEN: each frame is decoded from the model's own past, GT: from
the true one. The second table says why the two differ or not: what the decoder makes of a piece of
speech when it is given the past, the z or the w of another one. Started again, the study continues
where it was interrupted.
"""

import math

import numpy as np
import study
import torch
from torch import Tensor

from minidvae.cli import choose_device, run
from minidvae.data.audio import STFT
from minidvae.data.corpus import Corpus, load_corpus
from minidvae.data.crops import Windows
from minidvae.evaluation import figures, resynthesis
from minidvae.evaluation.report import render_table
from minidvae.evaluation.results import Table
from minidvae.files import atomic_write, write_json
from minidvae.kernels.is_divergence import is_divergence
from minidvae.models.base import past
from minidvae.models.light_dvae import Attention, LigHTDVAE
from minidvae.training.checkpoint import load_run

MODELS = {"hit_dvae": "HiT-DVAE", "light_dvae": "LigHT-DVAE"}
VARIANTS = {"plain": "", "inv_s": "-Inv-s", "inv_s_nr": "-Inv-s-NR"}
MODES = {"GEN": "generation", "GT": "teacher_forcing"}

# SI-SDR on VoiceBank as printed: LigHT-DVAE paper, Table 2, GEN and GT.
PUBLISHED = {
    "HiT-DVAE": (11.4, 11.5),
    "HiT-DVAE-Inv-s": (3.8, 11.4),
    "HiT-DVAE-Inv-s-NR": (5.8, 5.8),
    "LigHT-DVAE": (11.6, 11.7),
    "LigHT-DVAE-Inv-s": (3.9, 10.9),
    "LigHT-DVAE-Inv-s-NR": (5.7, 5.7),
}

MAX_PIECES = 256
SHOWN_FRAMES = 150  # length of the picture
# Conditions of the second table, and its last column.
CONDITIONS = ("its own", "generated past", "past of another", "z of another", "w of another")
WEIGHT_ON_FIRST = "weight on first frame"
DIVERGENCE_NOTE = """\
The Itakura-Saito divergence of a frame, median over test frames. Where the past, z or w of another
piece costs nothing, the decoder does not read it, and a past that it does not read cannot lead it
astray. Last, the weight of the cross-attention on the first frame; of the past, that is zeros."""


def main() -> None:
    args, common = study.parse_arguments(__doc__, "runs/ablations")
    device = choose_device(args.device or "auto")
    runs = study.train_all(make_variants(), args.runs, common)
    results = {}
    rows = {}
    for mode, flag in MODES.items():
        flags = ["--mode", flag, *study.evaluation_flags(args)]
        results[mode] = study.evaluate_all(runs, flags)
        for title, result in results[mode].items():
            rows[f"{mode} {title}"] = result
    print("\nPast frames: GEN the model's own, GT the true ones.\n")
    print(render_table(resynthesis.table(rows)))
    print("\nThe paper's SI-SDR on VoiceBank, GEN and GT (values compare on that corpus only):")
    published = [[title, str(gen), str(gt)] for title, (gen, gt) in PUBLISHED.items()]
    print(render_table(Table(["", *MODES], published)))

    models = {}
    for title, folder in runs.items():
        model, stft, content = load_run(folder, device)
        models[title] = model.eval()
    # All runs have one corpus, STFT and length of sequences: they have the same flags.
    test = load_corpus(content["plan"]["data"], progress=False, note=lambda _: None).split("test")
    test = test.spread(args.limit or len(test))
    num_frames = content["plan"]["recipe"]["frames"]
    read = {title: divergences(model, stft, num_frames, test) for title, model in models.items()}
    print(f"\n{render_table(divergence_table(read))}")
    print(f"\n{DIVERGENCE_NOTE}")
    values = {}
    for mode, of_mode in results.items():
        values[mode] = {title: result.values for title, result in of_mode.items()}
    write_json(args.runs / "results.json", values | {"divergence": read})
    with atomic_write(args.runs / "ablations.png") as temporary:
        temporary.write_bytes(draw(models, stft, test))
    print(
        f"\nAll numbers: {args.runs}/results.json. The start of a test utterance, on the left GEN, "
        f"on the right GT: {args.runs}/ablations.png"
    )


def make_variants() -> dict[str, list[str]]:
    """Return title → flags of every training."""
    variants = {}
    for model, name in MODELS.items():
        for variant, suffix in VARIANTS.items():
            variants[name + suffix] = ["--model", model, "--set", f"variant={variant}"]
    return variants


@torch.no_grad()
def divergences(model: LigHTDVAE, stft: STFT, num_frames: int, test: Corpus) -> dict[str, float]:
    """Return the median Itakura-Saito divergence of a frame of test speech under CONDITIONS, when
    pieces of so many frames are decoded from what a condition names of another piece, and all else
    of their own; and WEIGHT_ON_FIRST. The other piece is of another speaker where there is one.
    Raises CorpusError where no test utterance is as long as a piece."""
    samples = stft.samples(num_frames)
    windows = Windows(test, samples, stride=samples)
    numbers = np.linspace(0, len(windows) - 1, min(len(windows), MAX_PIECES)).astype(int)
    other = other_pieces(test, windows, numbers)
    x = stft.power(windows[numbers].to(model.output.weight.device))
    torch.manual_seed(0)
    inputs, _, w, _, z = model.infer(x, model.draw_noise(*x.shape[:2]))
    x_past = past(inputs)
    positions = model.positions(num_frames)
    log_variances = {
        "its own": model.likelihood(z, w, x_past, positions),
        "generated past": model.decode(z, w),
        "past of another": model.likelihood(z, w, x_past[other], positions),
        "z of another": model.likelihood(z[other], w, x_past, positions),
        "w of another": model.likelihood(z, w[other], x_past, positions),
    }
    medians = {}
    for condition, log_variance in log_variances.items():
        medians[condition] = is_divergence(x, log_variance).median().item()
    medians[WEIGHT_ON_FIRST] = weight_on_first(model, z, w, x_past, positions)
    return medians


def other_pieces(test: Corpus, windows: Windows, numbers: np.ndarray) -> list[int]:
    """Return for each piece another one, of another speaker where there is one."""
    random = np.random.default_rng(0)
    speakers = []
    for row in windows.rows(numbers):
        speakers.append(test.utterances[windows.utterances[row]].speaker)
    speakers = np.array(speakers)
    other = []
    for speaker in speakers:
        candidates = np.flatnonzero(speakers != speaker)
        other.append(random.choice(candidates if len(candidates) else len(speakers)))
    return other


def weight_on_first(
    model: LigHTDVAE, z: Tensor, w: Tensor, x_past: Tensor, positions: Tensor
) -> float:
    """Return the weight that the likelihood's cross-attention gives to the first frame of its
    source, mean over the later half of the frames. Where the source is the past, that frame is
    zeros: attention that rests there reads nothing."""
    weights = []

    def measure(attention: Attention, streams: tuple, _) -> None:
        queries, keys, _ = attention.project(*streams[:2])
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        is_future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        on_first = scores.masked_fill(is_future, -math.inf).softmax(-1)[..., 0]
        weights.append(on_first[..., on_first.shape[-1] // 2 :].mean().item())

    hooks = []
    for block in model.decoders[0].blocks:
        hooks.append(block.cross_attention.register_forward_hook(measure))
    model.likelihood(z, w, x_past, positions)
    for hook in hooks:
        hook.remove()
    return sum(weights) / len(weights)


def divergence_table(divergences_of_models: dict[str, dict[str, float]]) -> Table:
    rows = []
    for title, row in divergences_of_models.items():
        cells = [f"{row[condition]:.0f}" for condition in CONDITIONS]
        rows.append([title, *cells, f"{row[WEIGHT_ON_FIRST]:.2f}"])
    return Table(["", *CONDITIONS, WEIGHT_ON_FIRST], rows)


def draw(models: dict[str, LigHTDVAE], stft: STFT, test: Corpus) -> bytes:
    """Draw the start of a test utterance, and what each model makes of it in each of MODES."""
    waveform = test.waveform(0)[: stft.samples(SHOWN_FRAMES)]
    original = stft.analyse(torch.from_numpy(waveform)).abs().square().numpy()
    rows = [("original", np.stack([original] * len(MODES)), stft)]
    for title, model in models.items():
        powers = []
        for mode in MODES.values():
            generators = [torch.Generator().manual_seed(0)]
            outputs = resynthesis.resynthesise(model, stft, [waveform], mode, generators)
            _, log_variance = next(outputs)
            powers.append(np.exp(log_variance))
        rows.append((title, np.stack(powers), stft))
    return figures.contact_sheet(rows)


if __name__ == "__main__":
    run(main)
