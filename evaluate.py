"""Evaluate trained models.

    python evaluate.py                                # the newest run, resynthesis of its corpus's test split
    python evaluate.py runs/A runs/B --data DIR       # one table, a row for each run
    python evaluate.py runs/A --task verification     # or generation, exchange, transformation, recognition
"""

from dataclasses import fields
from pathlib import Path

import torch

from minidvae import checkpoint
from minidvae.command_line import (
    RUNS,
    SOURCES_OF_SPEECH,
    Parser,
    as_json,
    check_seed,
    choose_device,
    newest_run,
    run,
    write,
)
from minidvae.corpus import load_corpus
from minidvae.experiments import (
    Options,
    Run,
    exchange,
    generation,
    recognition,
    resynthesis,
    transformation,
    verification,
)
from minidvae.recipes import SettingError, known

TASKS = {
    "resynthesis": resynthesis,
    "generation": generation,
    "exchange": exchange,
    "transformation": transformation,
    "verification": verification,
    "recognition": recognition,
}


def main() -> None:
    parser = Parser(description="Evaluate trained models.")
    runs = "run folders, or folders with a published model (default: the newest run)"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help=runs)
    tasks = f"one of {', '.join(TASKS)} (default: the first of these that the model is for)"
    parser.add_argument("--task", help=tasks)
    parser.add_argument("--data", help=f"{SOURCES_OF_SPEECH} (default: the run's own)")
    parser.add_argument("--split", default="test", help="which split to evaluate on (default: test)")
    past = "past of an autoregressive model: its own output, or the true one (default: generation)"
    parser.add_argument("--mode", choices=("generation", "teacher_forcing"), default="generation", help=past)
    parser.add_argument("--limit", type=int, help="only so many utterances, spread over the split (default: all)")
    trials = "verification: file of lines `enrol test target|nontarget` (default: all pairs of test utterances)"
    parser.add_argument("--trials", type=Path, help=trials)
    recogniser = "generation: run folder of a deepspeech2, whose features the distance to real speech is measured on"
    parser.add_argument("--recogniser", type=Path, metavar="RUN", help=recogniser)
    (clips, repeats), (more_clips, more_repeats) = generation.DEFAULTS["cpu"], generation.DEFAULTS["cuda"]
    clips = f"generation: clips on each side of the distance (default: {clips:,}, on a GPU {more_clips:,})"
    parser.add_argument("--clips", type=int, help=clips)
    repeats = f"generation: how often all clips are drawn (default: {repeats}, on a GPU {more_repeats})"
    parser.add_argument("--repeats", type=int, help=repeats)
    w = "generation: what a sequence latent is drawn from, N(0, I) or a Gaussian fitted to posteriors (default: prior)"
    parser.add_argument("--w", choices=generation.W, help=w)
    lexicon = "recognition: file of lines `word phone phone …` (default: the built-in corpus's own; else no words)"
    parser.add_argument("--lexicon", type=Path, help=lexicon)
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that z is drawn with (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.parse_args()
    known("task", args.task or "resynthesis", TASKS)
    if args.limit is not None and args.limit < 1:
        raise SettingError(f"--limit {args.limit}: expected at least 1")
    check_seed(args.seed)
    device = choose_device(args.device)
    folders = args.runs or [newest_run()]
    if args.json and not args.json.absolute().parent.is_dir():
        raise SettingError(f"--json {args.json}: there is no folder {args.json.parent}")
    loaded = [(folder, *checkpoint.load_run(folder, device)) for folder in folders]
    for folder, *_, content in loaded:
        if not any(content["model"] in module.MODELS for module in TASKS.values()):
            raise SettingError(f"{folder}: no task is for a {content['model']}; its z are features for another model")
    task = args.task or next(name for name, module in TASKS.items() if loaded[0][-1]["model"] in module.MODELS)
    only_for = {"trials": "verification", "lexicon": "recognition"}
    for flag, only in (only_for | dict.fromkeys(("recogniser", "clips", "repeats", "w"), "generation")).items():
        if getattr(args, flag) is not None and task != only:
            raise SettingError(f"--{flag}: is for --task {only}, not {task}")
    if args.mode != "generation" and task != "resynthesis":
        raise SettingError(f"--mode {args.mode}: is for --task resynthesis, not {task}")
    if device.type == "cpu" and task == "resynthesis":
        torch.set_num_threads(1)  # the cores are busy with the metrics
    for folder, *_, content in loaded:
        if content["model"] not in TASKS[task].MODELS:
            fitting = [name for name, module in TASKS.items() if content["model"] in module.MODELS]
            raise SettingError(f"--task {task}: is not for {folder}, a {content['model']}; try {' or '.join(fitting)}")
    sources = [args.data or content.get("plan", {}).get("data", "built-in") for *_, content in loaded]
    corpora = {data: load_corpus(data) for data in dict.fromkeys(sources)}
    tests = {data: corpus.split(args.split) for data, corpus in corpora.items()}
    if args.limit:
        tests = {data: test.spread(args.limit) for data, test in tests.items()}

    runs = []
    for (folder, model, stft, content), data in zip(loaded, sources, strict=True):
        target = (folder if "plan" in content else RUNS / folder.resolve().name) / "eval" / task
        names = (folder, content["model"], model.eval(), stft, content, data)
        runs.append(Run(*names, corpora[data], tests[data], target))
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    results = TASKS[task].run(runs, options)
    if args.json:
        write(args.json, as_json(results))


if __name__ == "__main__":
    run(main)
