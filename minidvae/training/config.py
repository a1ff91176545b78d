"""Settings of a training and their types, and the recipes: every setting of the papers, as data."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field, fields
from typing import get_args, get_origin

FEATURES = ("power", "fbank", "log_magnitude")
LATENTS = {
    "fhvae": ("z1", "z2"),
    "beta_vae": ("z",),
}  # of which a recogniser can be given the posterior
TARGETS = (
    "frames",
    "phones",
    "characters",
)  # the phone at each frame; transcripts in phones or characters
DOMAINS = ("female", "male", "clean", "noisy", "channel", "both")


class SettingError(ValueError):
    """One line: the setting, what is wrong, what would be right."""


def known(kind: str, name: str, names) -> str:
    """`name` if it is one of `names`, else SettingError with the nearest ones."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)
    raise SettingError(f"unknown {kind} {name!r}; did you mean {' or '.join(nearest)}?")


def overrides(pairs: list[str]) -> dict[str, str]:
    """["key=value", …] as a dict."""
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--set {pair[:40]}: expected key=value")
        if key in given:
            raise SettingError(f"--set {pair}: {key} is given twice")
        given[key] = value
    return given


LARGEST = 2**31  # of whole numbers


def check_numbers(settings: dict, positive=(), not_negative=(), finite=()) -> None:
    """Raises SettingError for the first number, or number in a tuple, that is out of range, not finite or huge."""
    ranges = (
        (positive, 1e-30, "greater than 0"),
        (not_negative, 0, "at least 0"),
        (finite, -1e300, "that is finite"),
    )
    for names, least, expected in ranges:
        for name in names:
            values = settings[name] if isinstance(settings[name], tuple) else (settings[name],)
            if not all(
                least <= value <= (LARGEST if isinstance(value, int) else 1e300) for value in values
            ):
                shown = str(settings[name])[:40]
                raise SettingError(
                    f"{name}={shown}: expected a number {expected}, whole ones at most {LARGEST}"
                )


def check_config(config: dict) -> None:
    """Raises SettingError for the first number of a model's settings that cannot be."""
    numbers = {name for name, value in config.items() if not isinstance(value, (str, bool))} - {
        "symbols"
    }
    may_be_zero = {
        *"beta_z beta_w beta alpha context projection delay sequences lanes".split()
    } & numbers
    any_sign = {"z_log_variance"} & numbers
    check_numbers(config, numbers - may_be_zero - any_sign, may_be_zero, any_sign)


def typed(settings: type, content: dict):
    """A dataclass of what a file says. KeyError, SettingError or TypeError where a field is unknown, missing or has
    another type."""

    def fits(value, expected) -> bool:
        if not (inner := get_args(expected)):
            return type(value) is expected or (expected is float and type(value) is int)
        items, inner = (value.values(), inner[1]) if isinstance(value, dict) else (value, inner[0])
        return type(value) is get_origin(expected) and all(fits(item, inner) for item in items)

    types = {field.name: field.type for field in fields(settings)}
    for name, value in content.items():
        if not fits(value, types[name]):
            raise SettingError(f"{name}={str(value)[:40]}: expected {types[name]}")
    return settings(**content)


@dataclass(frozen=True)
class Recipe:
    features: str = "power"  # spectra; for other models fbank (80 bins) or log_magnitude (200), 25 ms every 10 ms
    extractor: str = ""  # recognisers: run folder of an FHVAE or β-VAE whose latent takes the place of `features`
    latent: str = "z1"  # and which one: z1 or z2 of an FHVAE, z of a β-VAE
    targets: str = (
        "frames"  # recognisers: frames (aligned phone labels), or transcripts: phones, characters
    )
    delay: int = 5  # of the outputs behind the frames, where targets are frames
    domain: str = ""  # learn from these utterances only: female, male, clean, noisy, channel, both
    window: int = 1024  # of power spectra: STFT window and hop, samples at 16 kHz
    hop: int = 256
    frames: int = 150  # T, length of a training sequence or segment; of the piece of an utterance at each step
    shift: int = 20  # from one segment to the next, frames
    trim: bool = True  # without leading and trailing silence
    speed: tuple[float, ...] = (
        1.0,
        1.0,
    )  # augmented crops of DVAEs: slowest and fastest, in multiples of 1/20
    gain: tuple[float, ...] = (0.0, 0.0)  # augmented crops of DVAEs: softest and loudest, dB
    equaliser: float = (
        0.0  # augmented crops of DVAEs: standard deviation of the cosines of a filter's curve, dB
    )
    batch: int = 32
    steps: int = 0  # length of training; 0: as many as `epochs` take
    epochs: int = 0
    report: int = (
        0  # steps between two reports (development loss, log line, checkpoint); 0: one epoch
    )
    patience: int = 0  # stop after so many reports without a better development loss; 0: never
    optimiser: str = "adamw"  # or adam, muon (training/muon.py)
    learning_rate: float = 1e-3
    warmup: int = 0  # steps of linear rise to it
    schedule: str = "constant"  # or cosine: down to final_learning_rate at the last step
    final_learning_rate: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0  # largest gradient norm; 0: no clipping
    own_past: tuple[float, ...] = (
        0.0,
        0.0,
    )  # autoregressive models: share of past that is not the true one, from first to last step
    sequences: int = 0  # FHVAE, hierarchical sampling: rows of the table, sequences drawn at once; 0: all, no drawing
    table_steps: int = 500  # optimiser steps between two draws of the table's sequences
    table_rate: float = (
        1.0  # FHVAE: learning rate of the table of s-vectors, relative to that of all else
    )
    models: dict[str, dict] = field(
        default_factory=dict
    )  # each model's settings, and its own values of the above

    def __post_init__(self):
        positive = (
            "window hop frames shift batch learning_rate epsilon table_steps table_rate".split()
        )
        not_negative = (
            "steps epochs report patience warmup final_learning_rate weight_decay clip".split()
            + ["sequences", "delay"]
        )
        check_numbers(vars(self), positive, [*not_negative, "equaliser"])
        known("optimiser", self.optimiser, ("adam", "adamw", "muon"))
        known("schedule", self.schedule, ("constant", "cosine"))
        known("features", self.features, FEATURES)
        known("targets", self.targets, TARGETS)
        known("latent", self.latent, [name for names in LATENTS.values() for name in names])
        for name in self.domain.split(",") if self.domain else ():
            known("domain", name, DOMAINS)
        for name, limits in (("betas", "[0, 1)"), ("own_past", "[0, 1]")):
            values = getattr(self, name)
            if len(values) != 2 or not all(
                0 <= v < 1 or (v == 1 and limits[-1] == "]") for v in values
            ):
                raise SettingError(f"{name}={values}: expected two numbers in {limits}")
        for name, (least, most) in {"speed": (0.5, 2.0), "gain": (-60.0, 60.0)}.items():
            values = getattr(self, name)
            if len(values) != 2 or not least <= values[0] <= values[1] <= most:
                raise SettingError(
                    f"{name}={values}: expected the lowest and the highest, from {least:g} to {most:g}"
                )
        if any(abs(20 * speed - round(20 * speed)) > 1e-9 for speed in self.speed):
            raise SettingError(f"speed={self.speed}: expected multiples of 0.05")
        if not self.steps and not self.epochs:
            raise SettingError("steps=0, epochs=0: one of them says how long to train")
        if self.window % 2 or self.hop > self.window // 2:
            wrong = f"a window of {self.window} with a hop of {self.hop} samples cannot be inverted"
            raise SettingError(f"{wrong}; expected an even window and a hop of at most half of it")

    @classmethod
    def of(cls, settings: dict) -> "Recipe":
        """From its fields as a checkpoint has them. TypeError or SettingError where they are not a recipe's."""
        names = {"redraw": "table_steps"}  # in runs of version 0.1
        return typed(cls, {names.get(name, name): value for name, value in settings.items()})

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


def parse(key: str, text: str, expected: type):
    """The value of a `key=value` override, of the type that the setting has."""
    try:
        if expected is bool:
            return {"true": True, "false": False}[text.lower()]
        if expected in (int, float, str):
            return expected(text)
        return tuple(expected.__args__[0](part) for part in text.split(",")) if text else ()
    except (ValueError, KeyError):
        name = {bool: "true or false", int: "an integer", float: "a number"}.get(
            expected, "numbers like 64,32"
        )
        raise SettingError(f"--set {key}={text[:40]}: expected {name}") from None


RECURRENT = ("dkf", "storn", "vrnn", "srnn", "rvae", "dsae")

# The RVAE of its own paper, without MLPs
RVAE_ORIGINAL = dict(
    x_hidden=(), z_hidden=(), posterior_hidden=(), decoder_z_hidden=(), decoder_hidden=()
)

# The recurrent family in `quick`
RECURRENT_SMALL = dict(beta_z=0.01, input_scale="root", optimiser="muon", learning_rate=1e-2)

# HiT-DVAE and LigHT-DVAE in `light2023`; the size of the network for w is not given in the paper, it follows from
# the number of parameters that is.
HIT2023 = dict(latent=16, w_latent=32, beta_z=0.01, beta_w=0.01, input_scale="power")
HIT2023 |= dict(
    width=256, heads=1, feedforward=1024, layers=4, w_embedding=256, w_hidden=512, w_layers=2
)

# and in `quick`. Frames overlap by three quarters: the clock of z has 4 phases.
SMALL = dict(
    input_scale="root", context=50, phases=4, width=128, heads=8, feedforward=512, layers=1
)
SMALL |= dict(w_embedding=32, w_hidden=32, w_layers=1, w_prior="aggregate", z_log_variance=-5.0)
AUGMENTED = dict(speed=(0.85, 1.2), gain=(-6.0, 0.0))
SMALL |= (
    dict(optimiser="muon", learning_rate=3e-3, warmup=100, steps=2_300, report=230, equaliser=4.0)
    | AUGMENTED
)

# FHVAE and β-VAE in `quick`
SEGMENTS = dict(
    features="fbank", frames=20, trim=False, batch=64, betas=(0.95, 0.999), own_past=(0.0, 0.0)
)
SEGMENTS |= dict(table_rate=10.0)

# Recognisers: the acoustic model of the FHVAE paper, and DeepSpeech2. Then both in `fhvae2017`
ACOUSTIC = dict(features="fbank", targets="frames", frames=20, batch=40, own_past=(0.0, 0.0))
DEEPSPEECH2 = dict(features="log_magnitude", targets="characters", batch=16, own_past=(0.0, 0.0))
RECOGNISER2017 = dict(betas=(0.9, 0.999), weight_decay=0.0, clip=5.0, epochs=50, patience=5)

RECIPES = {
    # Lin et al., ICASSP 2023, sections 3.2 and 3.3; T = 150 is WSJ0's, 100 VoiceBank's. The batch size is not given
    # there, nor are input scale and first output bias: the power as it is, and the log of its mean. The SRNN is
    # trained with teacher forcing; with scheduled sampling it is --set own_past=0.1,1.
    "light2023": Recipe(
        **dict(window=1024, hop=256, frames=150, batch=32, steps=25_000, report=500),
        **dict(optimiser="adamw", betas=(0.9, 0.99), epsilon=1e-9, weight_decay=1e-5),
        **dict(learning_rate=5e-5, warmup=5_000, schedule="cosine", final_learning_rate=1e-8),
        models={
            "vae": dict(hidden=(128,), beta_z=0.01),
            "dkf": dict(z_hidden=(32,), posterior_hidden=(32,), beta_z=0.01),
            "rvae": RVAE_ORIGINAL | dict(beta_z=0.01),
            "srnn": dict(beta_z=0.01),
            "hit_dvae": HIT2023,
            "light_dvae": HIT2023,
        },
    ),
    # Bie et al., Interspeech 2021, section 4.
    "benchmark2021": Recipe(
        **dict(window=512, hop=256, frames=150, batch=32, epochs=500, patience=20),
        **dict(optimiser="adam", learning_rate=1e-4),
        models={name: {} for name in ("vae", *RECURRENT)},
    ),
    # Hsu, Zhang & Glass, NIPS 2017, section 4 and appendix C; 32 dimensions and α = 10 are their best. How far apart
    # segments are is not given there: side by side. Of the recogniser's training (appendix G), rate and length are not.
    "fhvae2017": Recipe(
        **dict(
            features="fbank", frames=20, shift=20, trim=False, batch=256, epochs=500, patience=50
        ),
        **dict(optimiser="adam", learning_rate=1e-3, betas=(0.95, 0.999), weight_decay=1e-4),
        models={
            "fhvae": dict(z1_latent=32, z2_latent=32, alpha=10.0),
            "beta_vae": {},
            "acoustic": ACOUSTIC | RECOGNISER2017,
            "deepspeech2": DEEPSPEECH2 | RECOGNISER2017 | dict(learning_rate=3e-4),
        },
    ),
    # The same, small enough for two CPU cores and five minutes.
    "quick": Recipe(
        **dict(
            window=1024, hop=256, frames=50, batch=16, steps=4_500, report=450, own_past=(0.5, 1.0)
        ),
        **dict(optimiser="adamw", betas=(0.9, 0.99), weight_decay=1e-5, clip=100.0),
        **dict(learning_rate=2e-3, warmup=300, schedule="cosine", final_learning_rate=1e-5),
        models={name: RECURRENT_SMALL for name in RECURRENT}
        | {
            "vae": dict(hidden=(128,), beta_z=0.01, input_scale="root", optimiser="muon")
            | AUGMENTED,
            "hit_dvae": SMALL,
            "light_dvae": SMALL,
            "fhvae": SEGMENTS,
            "beta_vae": SEGMENTS | dict(encoder_width=256, width=128),
            "acoustic": ACOUSTIC
            | dict(width=256, projection=128, layers=2)
            | dict(steps=1_500, report=150, learning_rate=4e-3, warmup=100, clip=5.0),
            "deepspeech2": DEEPSPEECH2
            | dict(
                features="fbank", targets="phones", width=128, layers=2, channels=(8, 8), batch=8
            )
            | dict(steps=600, report=60, warmup=50, clip=5.0),
        },
    ),
}

# `quick` with more steps, for an hour of two CPU cores at most; all models learn from more voices and microphones.
HOUR = {name: dict(steps=16_000) for name in RECURRENT}
HOUR |= {
    "vae": dict(steps=20_000),
    "fhvae": dict(steps=6_000, z1_latent=32, z2_latent=32, features="log_magnitude"),
}
HOUR |= {name: dict(steps=24_000, report=1_000, warmup=200) for name in ("hit_dvae", "light_dvae")}
RECIPES["cpu_hour"] = dataclasses.replace(
    RECIPES["quick"],
    **dict(report=1_000, equaliser=4.0) | AUGMENTED,
    models={
        name: settings | HOUR.get(name, {}) for name, settings in RECIPES["quick"].models.items()
    },
)

# `quick` with hardly a step, to see that everything runs: the numbers that come of it mean nothing.
RECIPES["smoke"] = dataclasses.replace(
    RECIPES["quick"],
    models={
        name: settings | dict(steps=40, report=40, warmup=10)
        for name, settings in RECIPES["quick"].models.items()
    },
)
