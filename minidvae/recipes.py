"""Every setting of the papers, as data."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field

from . import audio
from .audio import STFT
from .batches import DOMAINS, FEATURES, TARGETS
from .features import LATENTS
from .models import MODELS


class SettingError(ValueError):
    """One line: the setting, what is wrong, what would be right."""


def known(kind: str, name: str, names) -> str:
    """`name` if it is one of `names`, else SettingError with the nearest ones."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)
    raise SettingError(f"unknown {kind} {name!r}; did you mean {' or '.join(nearest)}?")


def check_numbers(settings: dict, positive=(), not_negative=()) -> None:
    """Raises SettingError for the first number, or number in a tuple, that is out of range or not finite."""
    for names, least, expected in ((positive, 1e-30, "greater than 0"), (not_negative, 0, "at least 0")):
        for name in names:
            values = settings[name] if isinstance(settings[name], tuple) else (settings[name],)
            if not all(math.isfinite(value) and value >= least for value in values):
                raise SettingError(f"{name}={settings[name]}: expected a number {expected}")


@dataclass(frozen=True)
class Recipe:
    features: str = "power"  # spectra; for other models fbank (80 bins) or log_magnitude (200), 25 ms every 10 ms
    extractor: str = ""  # recognisers: run folder of an FHVAE or β-VAE whose latent takes the place of `features`
    latent: str = "z1"  # and which one: z1 or z2 of an FHVAE, z of a β-VAE
    targets: str = "frames"  # recognisers: frames (aligned phone labels), or transcripts: phones, characters
    delay: int = 5  # of the outputs behind the frames, where targets are frames
    domain: str = ""  # learn from these utterances only: female, male, clean, noisy, channel, both
    window: int = 1024  # of power spectra: STFT window and hop, samples at 16 kHz
    hop: int = 256
    frames: int = 150  # T, length of a training sequence or segment; of the piece of an utterance at each step
    shift: int = 20  # from one segment to the next, frames
    trim: bool = True  # without leading and trailing silence
    batch: int = 32
    steps: int = 0  # length of training; 0: as many as `epochs` take
    epochs: int = 0
    report: int = 0  # steps between two reports (development loss, log line, checkpoint); 0: one epoch
    patience: int = 0  # stop after so many reports without a better development loss; 0: never
    optimiser: str = "adamw"  # or adam
    learning_rate: float = 1e-3
    warmup: int = 0  # steps of linear rise to it
    schedule: str = "constant"  # or cosine: down to final_learning_rate at the last step
    final_learning_rate: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0  # largest gradient norm; 0: no clipping
    own_past: tuple[float, ...] = (0.0, 0.0)  # autoregressive models: share of own past, from first to last step
    sequences: int = 0  # FHVAE, hierarchical sampling: rows of the table, sequences drawn at once; 0: all, no drawing
    redraw: int = 500  # and for how many steps
    table_rate: float = 1.0  # FHVAE: learning rate of the table of s-vectors, relative to that of all else
    models: dict[str, dict] = field(default_factory=dict)  # each model's settings, and its own values of the above

    def __post_init__(self):
        positive = ("window", "hop", "frames", "shift", "batch", "learning_rate", "epsilon", "redraw", "table_rate")
        not_negative = ("steps", "epochs", "report", "patience", "warmup", "weight_decay", "clip")
        not_negative += ("final_learning_rate", "sequences", "delay")
        check_numbers(vars(self), positive, not_negative)
        known("optimiser", self.optimiser, ("adam", "adamw"))
        known("schedule", self.schedule, ("constant", "cosine"))
        known("features", self.features, ("power", *FEATURES))
        known("targets", self.targets, TARGETS)
        known("latent", self.latent, [name for names in LATENTS.values() for name in names])
        for name in self.domain.split(",") if self.domain else ():
            known("domain", name, DOMAINS)
        for name, limits in (("betas", "[0, 1)"), ("own_past", "[0, 1]")):
            values = getattr(self, name)
            if len(values) != 2 or not all(0 <= v < 1 or (v == 1 and limits[-1] == "]") for v in values):
                raise SettingError(f"{name}={values}: expected two numbers in {limits}")
        if not self.steps and not self.epochs:
            raise SettingError("steps=0, epochs=0: one of them says how long to train")
        try:
            STFT(self.window, self.hop)
        except ValueError as error:
            raise SettingError(str(error)) from None

    @property
    def stft(self) -> STFT:
        return STFT(self.window, self.hop) if self.features == "power" else audio.FEATURES

    @property
    def bins(self) -> int:
        return self.stft.bins if self.features == "power" else FEATURES[self.features][0]

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        swing = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + swing * (1 + math.cos(math.pi * progress)) / 2

    def own_past_at(self, step: int) -> float:
        first, last = self.own_past
        return first + (last - first) * step / max(1, self.steps - 1)


# Fields that not all kinds of batch have a use for
ONLY = {
    "spectra": ("window", "hop", "own_past", "trim"),
    "segments": ("features", "shift", "sequences", "redraw", "table_rate", "trim", "domain"),
    "utterances": ("features", "extractor", "latent", "targets", "delay", "domain"),
}

RECURRENT = ("dkf", "storn", "vrnn", "srnn", "rvae", "dsae")

# The RVAE of its own paper, without MLPs
RVAE_ORIGINAL = {"x_hidden": (), "z_hidden": (), "posterior_hidden": (), "decoder_z_hidden": (), "decoder_hidden": ()}

# HiT-DVAE and LigHT-DVAE in `light2023`; the size of the network for w is not given in the paper, it follows from
# the number of parameters that is.
HIT2023 = {"latent": 16, "w_latent": 32, "beta_z": 0.01, "beta_w": 0.01} | {
    "input_scale": "power",
    "position_offset": 0,
    "width": 256,
    "heads": 1,
    "feedforward": 1024,
    "layers": 4,
    "w_embedding": 256,
    "w_hidden": 512,
    "w_layers": 2,
}

# and in `quick`
SMALL = {"input_scale": "root", "width": 128, "feedforward": 512, "layers": 1, "position_offset": 2000} | {
    "w_embedding": 32,
    "w_hidden": 32,
    "w_layers": 1,
}

# FHVAE and β-VAE in `quick`
SEGMENTS = {"features": "fbank", "frames": 20, "trim": False, "batch": 64, "betas": (0.95, 0.999)} | {
    "table_rate": 10.0,
    "own_past": (0.0, 0.0),
}

# Recognisers: the acoustic model of the FHVAE paper, and DeepSpeech2
ACOUSTIC = {"features": "fbank", "targets": "frames", "frames": 20, "batch": 40, "own_past": (0.0, 0.0)}
DEEPSPEECH2 = {"features": "log_magnitude", "targets": "characters", "batch": 16, "own_past": (0.0, 0.0)}

RECIPES = {
    # Lin et al., ICASSP 2023, sections 3.2 and 3.3; T = 150 is WSJ0's, 100 VoiceBank's. The batch size is not given
    # there, nor are input scale and first output bias: the power as it is, and the log of its mean. The SRNN is
    # trained with teacher forcing; with scheduled sampling it is --set own_past=0.1,1.
    "light2023": Recipe(
        window=1024,
        hop=256,
        frames=150,
        batch=32,
        steps=25_000,
        report=500,
        optimiser="adamw",
        learning_rate=5e-5,
        warmup=5_000,
        schedule="cosine",
        final_learning_rate=1e-8,
        betas=(0.9, 0.99),
        epsilon=1e-9,
        weight_decay=1e-5,
        models={
            "vae": {"hidden": (128,), "beta_z": 0.01},
            "dkf": {"z_hidden": (32,), "posterior_hidden": (32,), "beta_z": 0.01},
            "rvae": RVAE_ORIGINAL | {"beta_z": 0.01},
            "srnn": {"beta_z": 0.01},
            "hit_dvae": HIT2023,
            "light_dvae": HIT2023,
        },
    ),
    # Bie et al., Interspeech 2021, section 4.
    "benchmark2021": Recipe(
        window=512,
        hop=256,
        frames=150,
        batch=32,
        epochs=500,
        patience=20,
        optimiser="adam",
        learning_rate=1e-4,
        models={name: {} for name in ("vae", *RECURRENT)},
    ),
    # Hsu, Zhang & Glass, NIPS 2017, section 4 and appendix C; 32 dimensions and α = 10 are their best. How far apart
    # segments are is not given there: side by side. Of the recogniser's training (appendix G), rate and length are not.
    "fhvae2017": Recipe(
        features="fbank",
        frames=20,
        shift=20,
        trim=False,
        batch=256,
        epochs=500,
        patience=50,
        optimiser="adam",
        learning_rate=1e-3,
        betas=(0.95, 0.999),
        weight_decay=1e-4,
        models={"fhvae": {"z1_latent": 32, "z2_latent": 32, "alpha": 10.0}, "beta_vae": {}}
        | {
            "acoustic": ACOUSTIC | {"betas": (0.9, 0.999), "weight_decay": 0.0, "clip": 5.0, "epochs": 50}
            | {"patience": 5},
            "deepspeech2": DEEPSPEECH2 | {"betas": (0.9, 0.999), "weight_decay": 0.0, "clip": 5.0, "epochs": 50}
            | {"patience": 5, "learning_rate": 3e-4},
        },
    ),
    # The same, small enough for two CPU cores and five minutes.
    "quick": Recipe(
        window=1024,
        hop=256,
        frames=50,
        batch=16,
        steps=4_500,
        report=450,
        optimiser="adamw",
        learning_rate=2e-3,
        warmup=300,
        schedule="cosine",
        final_learning_rate=1e-5,
        betas=(0.9, 0.99),
        weight_decay=1e-5,
        clip=100.0,
        own_past=(0.5, 1.0),
        models={
            **{name: {"beta_z": 0.01, "input_scale": "root"} for name in RECURRENT},
            "vae": {"hidden": (128,), "beta_z": 0.01, "input_scale": "root"},
            "hit_dvae": SMALL,
            "light_dvae": SMALL,
            "fhvae": SEGMENTS,
            "beta_vae": SEGMENTS | {"encoder_width": 256, "width": 128},
            "acoustic": ACOUSTIC | {"width": 256, "projection": 128, "layers": 2, "steps": 1_500, "report": 150}
            | {"learning_rate": 4e-3, "warmup": 100, "clip": 5.0},
            "deepspeech2": DEEPSPEECH2 | {"features": "fbank", "targets": "phones", "width": 128, "layers": 2}
            | {"channels": (8, 8), "batch": 8, "steps": 600, "report": 60, "warmup": 50, "clip": 5.0},
        },
    ),
}


def resolve(model: str, recipe: str, overrides: dict[str, str]) -> tuple[Recipe, dict]:
    """A recipe and the settings of a model under it, with `key=value` overrides of either.

    Raises SettingError naming the nearest right name or the expected type.
    """
    settings = RECIPES[known("recipe", recipe, RECIPES)]
    config_type = MODELS[known("model", model, MODELS)][1]
    if model not in settings.models:
        offered = ", ".join(name for name, other in RECIPES.items() if model in other.models)
        raise SettingError(f"recipe {recipe} has no settings for {model}; recipes that have: {offered}")
    kind = MODELS[model][0].batches
    foreign = {name for names in ONLY.values() for name in names}.difference(ONLY[kind]) | {"models"}
    from_recipe = ("bins", "frames", "sequences", "delay", "criterion", "symbols", "lanes")  # and from the corpus
    recipe_fields = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in foreign}
    config_fields = {f.name: f.type for f in dataclasses.fields(config_type) if f.name not in from_recipe}
    types = recipe_fields | config_fields
    given = {key: parse(key, text, types[known("setting", key, types)]) for key, text in overrides.items()}
    if {"steps", "epochs"} <= set(given):
        raise SettingError("--set steps and epochs: one of them says how long to train")
    if "epochs" in given:
        given["steps"] = 0
    given = settings.models[model] | given
    own = set(vars(settings)).difference(config_fields)  # the latent of a DVAE is a number, that of a recipe a name
    settings = dataclasses.replace(settings, **{k: v for k, v in given.items() if k in own})
    if kind != "spectra" and settings.features == "power":
        raise SettingError(f"features=power: {model} takes {' or '.join(FEATURES)}")
    if kind == "segments" and settings.shift > settings.frames:
        raise SettingError(f"shift={settings.shift}: expected at most frames={settings.frames}, else frames are lost")
    config = config_type(**{k: v for k, v in given.items() if k in config_fields})
    config = dataclasses.asdict(config)
    if kind == "utterances" and settings.targets == "frames" and "criterion" not in config:
        raise SettingError(f"targets=frames: {model} learns from transcripts; expected phones or characters")
    if kind == "utterances" and settings.targets != "frames":
        if idle := {"frames", "delay"} & set(overrides):
            raise SettingError(f"{min(idle)}={overrides[min(idle)]}: is for targets=frames, not {settings.targets}")
    config |= {name: getattr(settings, name) for name in ("bins", "frames", "delay") if name in config}
    config |= {"criterion": "frames" if settings.targets == "frames" else "ctc"} if "criterion" in config else {}
    numbers = {name for name, kind in config_fields.items() if kind not in (str, bool)}
    may_be_zero = {"beta_z", "beta_w", "beta", "alpha", "position_offset", "projection"}
    check_numbers(config, numbers - may_be_zero, numbers & may_be_zero)
    return settings, config


def parse(key: str, text: str, expected: type):
    """The value of a `key=value` override, of the type that the setting has."""
    try:
        if expected is bool:
            return {"true": True, "false": False}[text.lower()]
        if expected in (int, float, str):
            return expected(text)
        return tuple(expected.__args__[0](part) for part in text.split(",")) if text else ()
    except (ValueError, KeyError):
        name = {bool: "true or false", int: "an integer", float: "a number"}.get(expected, "numbers like 64,32")
        raise SettingError(f"--set {key}={text}: expected {name}") from None
