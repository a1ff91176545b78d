"""Ablations of HiT-DVAE and LigHT-DVAE (LigHT-DVAE paper, Table 2): six trainings with one budget, then two tables.

    python studies/ablations.py --recipe quick --steps 1500 --set own_past=0,0 input_scale=power    # built-in corpus
    python studies/ablations.py --data ~/VoiceBank --recipe light2023 --set frames=100              # as in the paper

Inv-s: x makes the queries of the likelihood's decoder, and z the keys and values. Inv-s-NR: the same without residual
connections. GEN: each frame is decoded from the model's own past, GT: from the true one. The second table says why the
two differ or not: what the decoder makes of a piece of speech when it is given the past, the z or the w of another one.
Started again, the study goes on where it was interrupted.
"""

import math
from pathlib import Path

import numpy as np
import study
import torch

from minidvae.cli import choose_device, run
from minidvae.data.audio import STFT
from minidvae.data.corpus import Corpus, load_corpus
from minidvae.data.crops import Windows
from minidvae.evaluation import figures, report, resynthesis
from minidvae.files import write_json
from minidvae.kernels.is_divergence import is_divergence
from minidvae.models.base import past
from minidvae.models.light_dvae import Attention, LigHTDVAE
from minidvae.training.checkpoint import load_run

NAMES = {"hit_dvae": "HiT-DVAE", "light_dvae": "LigHT-DVAE"}
VARIANTS = {"plain": "", "inv_s": "-Inv-s", "inv_s_nr": "-Inv-s-NR"}
MODES = {"GEN": "generation", "GT": "teacher_forcing"}

# SI-SDR on VoiceBank as printed: LigHT-DVAE paper, Table 2, GEN and GT
PUBLISHED = {
    "HiT-DVAE": (11.4, 11.5),
    "HiT-DVAE-Inv-s": (3.8, 11.4),
    "HiT-DVAE-Inv-s-NR": (5.8, 5.8),
    "LigHT-DVAE": (11.6, 11.7),
    "LigHT-DVAE-Inv-s": (3.9, 10.9),
    "LigHT-DVAE-Inv-s-NR": (5.7, 5.7),
}


GIVEN = ("all its own", "generated past", "past of another", "z of another", "w of another")
FIRST = "on first frame"
PIECES = 256
SHOWN = 150  # frames of the picture


@torch.no_grad()
def divergences(model: LigHTDVAE, stft: STFT, frames: int, test: Corpus) -> dict[str, float]:
    """The Itakura-Saito divergence of a frame of test speech, the median, when pieces of so many frames are decoded
    from what GIVEN says; all else is their own. The other piece is of another speaker where there is one. And FIRST:
    see `weight_on_first`. Raises CorpusError where no test utterance is as long as a piece."""
    samples, random = stft.samples(frames), np.random.default_rng(0)
    pieces = Windows(test, samples, stride=samples)
    numbers = np.linspace(0, len(pieces) - 1, min(len(pieces), PIECES)).astype(int)
    speakers = np.array(
        [test.utterances[pieces.utterances[row]].speaker for row in pieces.rows(numbers)]
    )
    others = [np.flatnonzero(speakers != speaker) for speaker in speakers]
    other = [random.choice(some if len(some) else len(speakers)) for some in others]
    x = stft.power(pieces[numbers].to(model.output.weight.device))
    torch.manual_seed(0)
    inputs, _, w, _, z = model.infer(x, None)
    x_past, places = past(inputs), model.places(frames)
    log_variances = (
        model.likelihood(z, w, x_past, places),
        model.decode(z, w),
        model.likelihood(z, w, x_past[other], places),
        model.likelihood(z[other], w, x_past, places),
        model.likelihood(z, w[other], x_past, places),
    )
    medians = [is_divergence(x, log_variance).median().item() for log_variance in log_variances]
    return dict(zip(GIVEN, medians, strict=True)) | {
        FIRST: weight_on_first(model, z, w, x_past, places)
    }


def weight_on_first(model: LigHTDVAE, *given: torch.Tensor) -> float:
    """What the likelihood's cross-attention gives to the first frame of its source, mean over the later half of the
    frames. Where the source is the past that frame is zeros: attention that rests there reads nothing."""
    weights = []

    def weigh(attention: Attention, streams: tuple, _) -> None:
        queries, keys, _ = attention.project(*streams[:3])
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        frames = torch.ones_like(scores[0, 0], dtype=torch.bool)
        unseen = frames.triu(1) | frames.tril(-(attention.context or len(frames)))
        first = scores.masked_fill(unseen, -math.inf).softmax(-1)[..., 0]
        weights.append(first[..., first.shape[-1] // 2 :].mean().item())

    hooks = [
        block.cross_attention.register_forward_hook(weigh) for block in model.decoders[0].blocks
    ]
    model.likelihood(*given)
    for hook in hooks:
        hook.remove()
    return sum(weights) / len(weights)


def picture(models: dict[str, LigHTDVAE], stft: STFT, test: Corpus, file: Path) -> None:
    """The start of a test utterance, and what each model makes of it in each of MODES."""
    waveform = test.waveform(0)[: stft.samples(SHOWN)]
    original = stft.analyse(torch.from_numpy(waveform)).abs().square().numpy()
    rows = [("original", np.stack([original] * len(MODES)), stft)]
    for title, model in models.items():
        made = []
        for mode in MODES.values():
            noise = torch.Generator().manual_seed(0)
            ((_, log_variance),) = resynthesis.resynthesise(model, stft, [waveform], mode, [noise])
            made.append(np.exp(log_variance))
        rows.append((title, np.stack(made), stft))
    figures.contact_sheet(rows, file)


def main() -> None:
    args, common = study.arguments(__doc__, "runs/ablations")
    device = choose_device(args.device or "auto")
    variants = {
        name + suffix: ["--model", model, "--set", f"variant={variant}"]
        for model, name in NAMES.items()
        for variant, suffix in VARIANTS.items()
    }
    runs = study.train_all(variants, args.runs, common)
    flags = study.evaluated(args)
    results = {
        mode: study.evaluate_all(runs, ["--mode", flag, *flags]) for mode, flag in MODES.items()
    }
    write_json(args.runs / "results.json", results)
    print(
        f"\nAll numbers: {args.runs}/results.json. Past frames: GEN the model's own, GT the true ones.\n"
    )
    print(
        resynthesis.table(
            {
                f"{mode} {title}": row
                for mode, rows in results.items()
                for title, row in rows.items()
            }
        )
    )
    print("\nThe paper's SI-SDR on VoiceBank, GEN and GT (values compare on that corpus only):")
    print(
        report.table(["", *MODES], [[title, *map(str, pair)] for title, pair in PUBLISHED.items()])
    )

    loaded = {title: load_run(folder, device) for title, folder in runs.items()}
    models = {title: model.eval() for title, (model, *_) in loaded.items()}
    _, stft, content = next(iter(loaded.values()))  # of all: they are trained with the same flags
    test = load_corpus(content["plan"]["data"], progress=False, note=lambda _: None).split("test")
    test, frames = (
        test.spread(args.limit) if args.limit else test,
        content["plan"]["recipe"]["frames"],
    )
    read = {title: divergences(model, stft, frames, test) for title, model in models.items()}
    write_json(args.runs / "results.json", results | {"divergence": read})
    rows = [
        [title, *(f"{row[name]:.0f}" for name in GIVEN), f"{row[FIRST]:.2f}"]
        for title, row in read.items()
    ]
    print(f"\n{report.table(['Itakura-Saito divergence of a frame', *GIVEN, FIRST], rows)}")
    print(
        "\nThe median over test frames. Where that of another costs nothing, the decoder does not read it, and a"
    )
    print(
        "past that it does not read cannot lead it astray. Last, the weight of the cross-attention on the first"
    )
    print("frame, which of the past is zeros.")
    picture(models, stft, test, args.runs / "ablations.png")
    print(
        f"\nThe start of a test utterance, on the left GEN, on the right GT: {args.runs}/ablations.png"
    )


if __name__ == "__main__":
    run(main)
