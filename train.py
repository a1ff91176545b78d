"""Train a model.

    python train.py --model light_dvae                          # built-in corpus; no GPU needed
    python train.py --model vae --data ~/LibriSpeech --recipe light2023

A step is a pure function of (seed, step) and the state before it, so an interrupted run that is resumed goes on
exactly as if it had not been interrupted.
"""

import json
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minidvae import checkpoint, figures
from minidvae.batches import SOURCES
from minidvae.checkpoint import CheckpointError
from minidvae.command_line import (
    RUNS,
    SOURCES_OF_SPEECH,
    Parser,
    as_json,
    check_seed,
    choose_device,
    newest_run,
    overrides,
    run,
    write,
)
from minidvae.corpus import absolute, load_corpus
from minidvae.models import MODELS, build_model
from minidvae.recipes import RECIPES, Recipe, SettingError, known, resolve

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = Parser(description="Train a model.", epilog="Settings for --set: see minidvae/recipes.py and the models.")
    parser.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default: the paper's on a GPU, else quick)")
    parser.add_argument("--data", help=f"{SOURCES_OF_SPEECH} (default: built-in)")
    parser.add_argument("--run", type=Path, help="folder for the results (default: a new one in runs/)")
    parser.add_argument("--steps", type=int, help="length of training (default: the recipe's)")
    parser.add_argument("--init", type=Path, help="start from the model in this run folder, ours or published")
    parser.add_argument("--seed", type=int, help="of the parameters, the batches and the noise (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of matrix products (default: fp32, on a GPU TF32)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run (default: the newest)")
    settings = {"action": "extend", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--set", nargs="+", **settings, help="settings of recipe or model")
    args = parser.parse_args()

    if args.steps is not None and args.steps < 1:
        raise SettingError(f"--steps {args.steps}: expected at least 1")
    check_seed(args.seed or 0)
    device = choose_device(args.device)
    model, recipe, plan, folder, state = (resume if args.resume else begin)(args, device)

    corpus = load_corpus(plan["data"])
    same = {"fingerprint": corpus.fingerprint}
    if model.batches == "utterances" or recipe.domain:
        same["labels"] = corpus.labels_fingerprint
    if any(plan.setdefault(name, value) != value for name, value in same.items()):
        raise SettingError(f"{plan['data']}: not the speech that this run began with; it can only go on with the same")
    training, development = corpus.split("train"), corpus.split("dev")
    source = SOURCES[model.batches]
    batches = source(training, recipe, plan["seed"], device)
    source(development, recipe, plan["seed"], device)  # CorpusError now rather than at the first report
    if recipe.extractor and plan.setdefault("extractor", batches.features.extractor) != batches.features.extractor:
        raise SettingError(f"{recipe.extractor}: holds another model than the one whose features this run began with")
    steps, report = recipe.steps or recipe.epochs * batches.per_epoch, recipe.report or batches.per_epoch
    recipe = replace(recipe, steps=steps, report=report)
    if state is None:
        batches.fit(model, fresh=not plan["init"])
    plan["recipe"] = asdict(replace(recipe, models={}))
    folder = make(folder, exist_ok=bool(args.run or args.resume))
    write(folder / "config.json", as_json(plan | {"model_settings": asdict(model.config)}))

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{plan['model']}, {parameters:.2f} M parameters, recipe {plan['recipe_name']}: {recipe.steps} steps of")
    whole = model.batches == "utterances" and recipe.targets != "frames"
    size = f"{recipe.batch} utterances" if whole else f"{recipe.batch} × {recipe.frames} frames"
    print(f"{size} out of {training.seconds / 60:.1f} minutes. Results: {folder}/")
    if plan["precision"] == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("bf16 is many times slower than fp32 on this CPU, which has no instructions for it.")
    if batches.skipped:
        print(f"{batches.skipped} utterances are {batches.unused} and are not used.")
    train(model, recipe, plan, batches, development, device, folder, state)
    print(f"Finished: {folder}/ (curves.png shows the training). Next: python evaluate.py {folder}")


def begin(args, device):
    """A new run: its model, recipe, plan (what the checkpoints say of it) and folder; no state."""
    model = None
    if args.init:
        model, stft, content = checkpoint.load_run(args.init, device)
        if args.model not in (None, content["model"]):
            raise CheckpointError(f"{args.init}: holds a {content['model']}, not a {args.model}")
        args.model = content["model"]
    if args.model is None:
        raise SettingError(f"--model: missing; choose one of {', '.join(MODELS)}")
    known("model", args.model, MODELS)
    papers = [name for name in RECIPES if name != "quick" and args.model in RECIPES[name].models]
    name, other = (papers[0], "quick") if device.type == "cuda" else ("quick", papers[0])
    if args.recipe is None:
        found = "a GPU" if device.type == "cuda" else "no GPU"
        print(f"Recipe {name}, since there is {found}; choose the other with --recipe {other}.")
    name = args.recipe or name
    given = overrides(args.set)
    recipe, config = resolve(args.model, name, given)
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    if model is None:
        torch.manual_seed(args.seed or 0)
        try:
            model = build_model(args.model, **config).to(device)
        except (RuntimeError, ValueError) as error:
            raise SettingError(f"--set {' '.join(args.set)}: no such {args.model} can be built ({error})") from None
    else:
        models = {"window", "hop", "features", "extractor", "latent", "targets", *config} - {"sequences"}
        if fixed := [key for key in given if key in models]:
            raise SettingError(f"--set {fixed[0]}: comes with the model of --init; leave it out")
        before = content.get("plan", {}).get("recipe")
        if model.batches == "spectra":
            recipe = replace(recipe, window=stft.window_length, hop=stft.hop)
        elif model.batches == "segments":
            recipe = replace(recipe, features=before["features"], frames=model.config.frames)
        else:
            kept = ("features", "extractor", "latent", "targets", "delay")
            recipe = replace(recipe, **{name: before[name] for name in kept})
    if recipe.extractor:
        recipe = replace(recipe, extractor=str(Path(recipe.extractor).expanduser().absolute()))
    folder = args.run or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{name}"
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: already holds a run; go on with --resume, or choose another --run")
    data = absolute("built-in" if args.data is None else args.data)
    plan = {"model": args.model, "recipe_name": name, "init": str(args.init or ""), "data": data}
    return model, recipe, plan | {"seed": args.seed or 0, "precision": args.precision or "fp32"}, folder, None


def resume(args, device):
    """A run that was interrupted, or is to be longer: what `begin` returns, and the content of its last checkpoint."""
    for flag in ("model", "recipe", "data", "init", "seed", "precision", "set"):
        if getattr(args, flag) not in (None, []):
            raise SettingError(f"--{flag}: cannot change in a run that is resumed; leave it out")
    folder = args.run or newest_run()
    model, _, state = checkpoint.restore(folder / "last.pt", device)
    try:
        recipe, done = Recipe(**state["plan"]["recipe"]), state["progress"]["step"]
        log = folder / "log.jsonl"
        state["reports"] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        state["optimiser"]  # noqa: B018
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a run that this version can go on with ({error})") from None
    if args.steps and args.steps < done:
        raise SettingError(f"--steps {args.steps}: the run has {done} steps already")
    if recipe.patience and state["progress"]["waited"] >= recipe.patience:
        print(f"This run stopped early, after {recipe.patience} reports without a better development loss.")
    return model, replace(recipe, steps=args.steps or recipe.steps), state["plan"], folder, state


def make(folder: Path, exist_ok: bool) -> Path:
    """Make the folder, or one of a longer name where a run that began in the same second has this one."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
            return folder
        except FileExistsError:
            if exist_ok:  # it is a file
                raise
            folder = folder.with_name(f"{folder.name}+")


def train(model, recipe, plan, batches, development, device, folder, state) -> None:
    stft = recipe.stft
    optimiser = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimiser](
        batches.groups(model, recipe), betas=recipe.betas, eps=recipe.epsilon, weight_decay=recipe.weight_decay
    )
    progress = {"step": 0, "best": float("inf"), "waited": 0, "seconds": 0.0, "sums": {}, "count": 0}
    reports = []
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        progress = state["progress"]
        reports = [report for report in state["reports"] if report["step"] <= progress["step"]]

    def save(name: str) -> None:
        optimiser_state = {"optimiser": optimiser.state_dict()} if name == "last.pt" else {}
        checkpoint.save(folder / name, plan["model"], model, stft, plan=plan, progress=progress, **optimiser_state)

    stop = StopRequest()
    started = time.perf_counter() - progress["seconds"]
    bar = tqdm(total=recipe.steps, initial=progress["step"], desc=plan["model"], unit="step", disable=None)
    model.train()
    while progress["step"] < recipe.steps and not (recipe.patience and progress["waited"] >= recipe.patience):
        step = progress["step"]
        torch.manual_seed(seed_of(plan["seed"], step))
        batches.prepare(model, optimiser, recipe, step)
        batch = batches(step)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate_at(step) * group.get("rate", 1.0)

        with autocast(device, plan["precision"]):
            loss, terms = model.loss(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
        terms = read_terms(terms | {"gradient norm": norm}, folder, step)
        del terms["gradient norm"]
        optimiser.step()

        progress["step"] = step + 1
        progress["sums"] = {name: progress["sums"].get(name, 0.0) + value for name, value in terms.items()}
        progress["count"] += 1
        bar.update()
        if (step + 1) % recipe.report == 0 or step + 1 == recipe.steps:
            dev = development_loss(model, recipe, plan, batches, development, device, folder, step)
            progress["waited"] = 0 if dev["loss"] < progress["best"] else progress["waited"] + 1
            progress["seconds"] = time.perf_counter() - started
            report = {
                "step": step + 1,
                "train": {name: total / progress["count"] for name, total in progress["sums"].items()},
                "dev": dev,
                "learning_rate": recipe.learning_rate_at(step),
                "own_past": recipe.own_past_at(step),
                "seconds": round(progress["seconds"], 1),
            }
            progress["sums"], progress["count"] = {}, 0
            if dev["loss"] < progress["best"]:
                progress["best"] = dev["loss"]
                save("best.pt")
            reports.append(report)
            write(folder / "log.jsonl", "".join(json.dumps(report) + "\n" for report in reports))
            save("last.pt")
            figures.curves(reports, folder / "curves.png")
            bar.write(describe(report, recipe.steps))
        elif stop.requested:
            progress["seconds"] = time.perf_counter() - started
            save("last.pt")
        if stop.requested:
            bar.close()
            print(f"Stopped after step {step + 1}. Go on with: python train.py --resume --run {folder}")
            raise SystemExit(130)
    bar.close()


@torch.no_grad()
def development_loss(model, recipe, plan, batches, development, device, folder, step) -> dict[str, float]:
    """The terms of the loss over the development split, the same noise every time."""
    model.eval()
    torch.manual_seed(seed_of(plan["seed"], -1))
    sums, count = {}, 0
    for batch, size in batches.development(development, model, recipe):
        with autocast(device, plan["precision"]):
            _, terms = model.loss(batch)
        for name, value in read_terms(terms, folder, step).items():
            sums[name] = sums.get(name, 0.0) + value * size
        count += size
    model.train()
    return {name: total / count for name, total in sums.items()}


def read_terms(terms: dict[str, torch.Tensor], folder: Path, step: int) -> dict[str, float]:
    """The terms as numbers. Raises CheckpointError at the first that is not finite."""
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    for name in sorted(values, key=lambda name: name == "loss"):  # a cause before the sum
        if not abs(values[name]) < float("inf"):
            kept = folder / "last.pt" if (folder / "last.pt").exists() else "none yet"
            raise CheckpointError(f"step {step}: {name} is {values[name]}; stopped. Last good checkpoint: {kept}")
    return values


def seed_of(seed: int, step: int) -> int:
    """One seed per (seed, step); step −1 is the development set's."""
    return (seed * 2_654_435_761 + step + 1) % 2**63


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def describe(report: dict, steps: int) -> str:
    parts = [f"step {report['step']:>6}/{steps}", f"{report['seconds']:7.1f} s"]
    for part in ("train", "dev"):
        parts.append(f"{part} " + "  ".join(f"{name} {value:.4g}" for name, value in report[part].items()))
    return "   ".join(parts)


class StopRequest:
    """Ctrl-C and SIGTERM take effect between two steps; a second Ctrl-C at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    run(main)
