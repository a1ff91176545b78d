"""Evaluate trained models.

    python evaluate.py                                # the newest run, resynthesis of its corpus's test split
    python evaluate.py runs/A runs/B --data DIR       # one table, a row for each run
"""

from dataclasses import replace
from pathlib import Path

import torch

from minidvae import checkpoint
from minidvae.command_line import RUNS, Parser, as_json, check_seed, choose_device, newest_run, run, write
from minidvae.corpus import Corpus, load_corpus
from minidvae.experiments import resynthesis
from minidvae.recipes import SettingError, known

TASKS = ("resynthesis",)


def main() -> None:
    parser = Parser(description="Evaluate trained models.")
    runs = "run folders, or folders with a published model (default: the newest run)"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help=runs)
    parser.add_argument("--task", default="resynthesis", help=f"one of {', '.join(TASKS)} (default: resynthesis)")
    parser.add_argument("--data", help="built-in, a folder of speech, or a manifest (default: the run's own)")
    parser.add_argument("--split", default="test", help="which split to evaluate on (default: test)")
    past = "past of an autoregressive model: its own output, or the true one (default: generation)"
    parser.add_argument("--mode", choices=("generation", "teacher_forcing"), default="generation", help=past)
    parser.add_argument("--limit", type=int, help="only so many utterances, spread over the split (default: all)")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that z is drawn with (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.parse_args()
    known("task", args.task, TASKS)
    if args.limit is not None and args.limit < 1:
        raise SettingError(f"--limit {args.limit}: expected at least 1")
    check_seed(args.seed)
    device = choose_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the cores are busy with the metrics
    folders = args.runs or [newest_run()]
    if args.json and not args.json.absolute().parent.is_dir():
        raise SettingError(f"--json {args.json}: there is no folder {args.json.parent}")
    loaded = [(folder, *checkpoint.load_run(folder, device)) for folder in folders]
    sources = [args.data or content.get("plan", {}).get("data", "built-in") for *_, content in loaded]
    corpora = {data: choose(load_corpus(data).split(args.split), args.limit) for data in dict.fromkeys(sources)}

    results = {}
    for (folder, model, stft, content), data in zip(loaded, sources, strict=True):
        corpus, ours = corpora[data], "plan" in content
        trained = f"step {content['progress']['step']}" if ours else "published"
        print(f"{folder}: {content['model']}, {trained}; {len(corpus)} utterances of {data}")
        target = (folder if ours else RUNS / folder.resolve().name) / "eval" / args.task
        if args.mode == "teacher_forcing":
            target = target / args.mode
        result = resynthesis.evaluate(model.eval(), stft, corpus, args.mode, target, args.seed)
        result |= {"run": str(folder), "model": content["model"], "data": data, "split": args.split, "seed": args.seed}
        write(target / "results.json", as_json(result))
        mode = f" ({args.mode.replace('_', ' ')})" if model.autoregressive else ""
        results[f"{folder}{mode}" + (f" on {data}" if len(corpora) > 1 else "")] = result
        print(f"results.json, wav files and figures: {target}/")
    print()
    comparable = len(corpora) == 1 and args.split == "test" and not args.limit and args.mode == "generation"
    print(resynthesis.table(results, corpus.layout if comparable else None))
    print("\nMean ± standard error over utterances. RMSE after the best gain. PESQ: narrow band, raw (P.862) and LQO.")
    if args.json:
        write(args.json, as_json(list(results.values())))


def choose(corpus: Corpus, limit: int | None) -> Corpus:
    """The corpus, or `limit` utterances spread evenly over it."""
    if not limit or limit >= len(corpus):
        return corpus
    return replace(corpus, utterances=tuple(corpus.utterances[i * len(corpus) // limit] for i in range(limit)))


if __name__ == "__main__":
    run(main)
