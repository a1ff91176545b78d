"""Settings of a training, their values, and the recipes: every setting of the papers, as data.

A recipe says how each model is trained and how large it is. `--set KEY=VALUE` of train.py changes
a field of `Recipe` or a setting of the model (the dataclass at the top of its file).
"""

import dataclasses
import difflib
import itertools
import math
from dataclasses import dataclass, field

FEATURES = ("power", "fbank", "log_magnitude")
LATENTS = {"fhvae": ("z1", "z2"), "beta_vae": ("z",)}  # latents that a recogniser can learn from
TARGETS = ("frames", "phones", "characters")  # the phone of each frame; transcripts
DOMAINS = ("female", "male", "clean", "noisy", "channel", "both")
OPTIMISERS = ("adam", "adamw", "muon")

# Former names of settings, in checkpoints of earlier versions and in --set.
RENAMED_SETTINGS = {"own_past": "scheduled_sampling", "redraw": "table_steps"}

MAX_INTEGER = 2**31


class SettingError(ValueError):
    """A setting that is unknown or has a wrong value. The message is one line: the setting, what
    is wrong, what was expected."""


def known(kind: str, name: str, names) -> str:
    """Return `name` if it is one of `names`. Raises SettingError with the nearest ones if not."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)
    raise SettingError(f"unknown {kind} {name!r}; did you mean {' or '.join(nearest)}?")


def overrides(pairs: list[str]) -> dict[str, str]:
    """Return ["key=value", …] as a dict."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--set {pair[:40]}: expected key=value")
        if key in settings:
            raise SettingError(f"--set {pair}: {key} is given twice")
        settings[key] = value
    return settings


def check_numbers(settings: dict, names, minimum: float, expected: str) -> None:
    """Raise SettingError for the first of these settings, a number or a tuple of numbers, that is
    below the minimum, infinite, not a number, or a huge integer. expected: for the message."""
    for name in names:
        values = settings[name] if isinstance(settings[name], tuple) else (settings[name],)
        for value in values:
            maximum = MAX_INTEGER if isinstance(value, int) else 1e300
            if not minimum <= value <= maximum:
                raise SettingError(
                    f"{name}={str(settings[name])[:40]}: expected a number {expected}, "
                    f"an integer at most {MAX_INTEGER}"
                )


def check_positive(settings: dict, names) -> None:
    check_numbers(settings, names, 1e-30, "greater than 0")


def check_not_negative(settings: dict, names) -> None:
    check_numbers(settings, names, 0, "at least 0")


CONFIG_MAY_BE_ZERO = (
    "beta_z",
    "beta_w",
    "beta",
    "alpha",
    "context",
    "projection",
    "delay",
    "sequences",
    "lanes",
)
CONFIG_ANY_SIGN = ("z_log_variance",)


def check_config(config: dict) -> None:
    """Raise SettingError for the first number of a model's settings that is out of range."""
    for name, value in config.items():
        if isinstance(value, str | bool) or name == "symbols":
            continue
        if name in CONFIG_ANY_SIGN:
            check_numbers(config, [name], -1e300, "that is finite")
        elif name in CONFIG_MAY_BE_ZERO:
            check_not_negative(config, [name])
        else:
            check_positive(config, [name])


def parse(key: str, text: str, expected_type: type):
    """Return the value of a `key=value` override, of the type that the setting has."""
    descriptions = {bool: "true or false", int: "an integer", float: "a number"}
    try:
        if expected_type is bool:
            return {"true": True, "false": False}[text.lower()]
        if expected_type in (int, float, str):
            return expected_type(text)
        item_type = expected_type.__args__[0]  # The type is tuple[item_type, ...].
        return tuple(item_type(part) for part in text.split(",")) if text else ()
    except (ValueError, KeyError):
        expected = descriptions.get(expected_type, "numbers like 64,32")
        raise SettingError(f"--set {key}={text[:40]}: expected {expected}") from None


@dataclass(frozen=True)
class Recipe:
    # Input of the model.
    features: str = "power"  # power spectra (DVAEs); other models: fbank (80 bins) or log_magnitude
    # (200 bins), windows of 25 ms every 10 ms
    extractor: str = ""  # recognisers: run folder of an FHVAE or β-VAE; its latent is the input
    latent: str = "z1"  # the latent of the extractor: z1 or z2 of an FHVAE, z of a β-VAE
    targets: str = "frames"  # recognisers: frames (aligned phone labels), or phones or characters
    # (transcripts)
    delay: int = 5  # recognisers with targets=frames: frames by which outputs come late
    domain: str = ""  # learn only from female, male, clean, noisy, channel or both utterances
    window: int = 1024  # window length of the STFT of power spectra, samples at 16 kHz
    hop: int = 256  # hop length, samples
    frames: int = 150  # T, length of a training sequence, a segment, or a piece of an utterance
    shift: int = 20  # frames from one segment to the next
    trim: bool = True  # leave out leading and trailing silence

    # Augmentation of the crops of DVAEs.
    speed: tuple[float, ...] = (1.0, 1.0)  # lowest and highest, multiples of 0.05
    gain: tuple[float, ...] = (0.0, 0.0)  # lowest and highest, dB
    equaliser: float = 0.0  # standard deviation of the cosines of a random filter, dB

    # Length of training.
    batch: int = 32
    steps: int = 0  # 0: as many as `epochs` take
    epochs: int = 0
    report: int = 0  # steps between reports (development loss, log, checkpoint); 0: an epoch
    patience: int = 0  # stop after so many reports without a better development loss; 0: never

    # Optimisation.
    optimiser: str = "adamw"  # or adam, muon (training/muon.py)
    learning_rate: float = 1e-3
    warmup: int = 0  # steps in which the learning rate rises linearly
    schedule: str = "constant"  # or cosine, down to final_learning_rate at the last step
    final_learning_rate: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0  # largest gradient norm; 0: no clipping

    # Autoregressive models: probability at the first and at the last step. In the Transformers the
    # past is not the model's own output, but a corrupted one (`LigHTDVAE.corrupt_past`).
    scheduled_sampling: tuple[float, ...] = (0.0, 0.0)

    # FHVAE: hierarchical sampling, and the table of s-vectors.
    sequences: int = 0  # rows of the table, sequences that are drawn at a time; 0: all, no drawing
    table_steps: int = 500  # steps between two draws of sequences
    table_rate: float = 1.0  # learning rate of the table, relative to that of all else

    models: dict[str, dict] = field(default_factory=dict)  # settings of each model, and its own
    # values of the above

    def __post_init__(self):
        settings = vars(self)
        check_positive(settings, ["window", "hop", "frames", "shift", "batch"])
        check_positive(settings, ["learning_rate", "epsilon", "table_steps", "table_rate"])
        check_not_negative(settings, ["steps", "epochs", "report", "patience", "warmup", "clip"])
        check_not_negative(settings, ["final_learning_rate", "weight_decay"])
        check_not_negative(settings, ["sequences", "delay", "equaliser"])
        known("optimiser", self.optimiser, OPTIMISERS)
        known("schedule", self.schedule, ("constant", "cosine"))
        known("features", self.features, FEATURES)
        known("targets", self.targets, TARGETS)
        known("latent", self.latent, tuple(itertools.chain(*LATENTS.values())))
        for name in self.domain.split(",") if self.domain else ():
            known("domain", name, DOMAINS)
        check_pair("betas", self.betas, "two numbers in [0, 1)", lambda value: 0 <= value < 1)
        check_pair(
            "scheduled_sampling",
            self.scheduled_sampling,
            "two numbers in [0, 1]",
            lambda value: 0 <= value <= 1,
        )
        check_range("speed", self.speed, 0.5, 2.0)
        check_range("gain", self.gain, -60.0, 60.0)
        for speed in self.speed:
            if abs(20 * speed - round(20 * speed)) > 1e-9:
                raise SettingError(f"speed={self.speed}: expected multiples of 0.05")
        if not self.steps and not self.epochs:
            raise SettingError("steps=0, epochs=0: one of them says how long to train")
        if self.window % 2 or self.hop > self.window // 2:
            raise SettingError(
                f"a window of {self.window} with a hop of {self.hop} samples cannot be inverted; "
                "expected an even window and a hop of at most half of it"
            )

    @classmethod
    def from_dict(cls, settings: dict) -> "Recipe":
        """Return the recipe that a checkpoint describes. Raises TypeError or SettingError where
        the settings are not a recipe's."""
        return cls(**{RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()})

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        swing = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + swing * (1 + math.cos(math.pi * progress)) / 2

    def scheduled_sampling_at(self, step: int) -> float:
        first, last = self.scheduled_sampling
        return first + (last - first) * step / max(1, self.steps - 1)


def check_pair(name: str, values: tuple, expected: str, is_valid) -> None:
    if len(values) != 2 or not all(is_valid(value) for value in values):
        raise SettingError(f"{name}={values}: expected {expected}")


def check_range(name: str, values: tuple, minimum: float, maximum: float) -> None:
    if len(values) != 2 or not minimum <= values[0] <= values[1] <= maximum:
        raise SettingError(
            f"{name}={values}: expected the lowest and the highest, from {minimum:g} to {maximum:g}"
        )


RECURRENT_MODELS = ("dkf", "storn", "vrnn", "srnn", "rvae", "dsae")

# The RVAE of its own paper has no MLPs.
RVAE_WITHOUT_MLPS = {
    "x_hidden": (),
    "z_hidden": (),
    "posterior_hidden": (),
    "decoder_z_hidden": (),
    "decoder_hidden": (),
}

# HiT-DVAE and LigHT-DVAE at the paper's size (section 3.2). The paper does not give the size of
# the network for w; it follows from the number of parameters.
TRANSFORMER_PAPER = {
    "latent": 16,
    "w_latent": 32,
    "beta_z": 0.01,
    "beta_w": 0.01,
    "input_scale": "power",
    "width": 256,
    "heads": 1,
    "feedforward": 1024,
    "layers": 4,
    "w_embedding": 256,
    "w_hidden": 512,
    "w_layers": 2,
}

# Random speed and gain of crops: VAE and Transformers in `quick`, every DVAE in `cpu_hour`.
AUGMENTATION = {"speed": (0.85, 1.2), "gain": (-6.0, 0.0)}

# HiT-DVAE and LigHT-DVAE in `quick`.
TRANSFORMER_QUICK = {
    "input_scale": "root",
    "width": 128,
    "heads": 1,
    "feedforward": 512,
    "layers": 1,
    "w_embedding": 32,
    "w_hidden": 32,
    "w_layers": 1,
    "z_log_variance": -5.0,
    "optimiser": "muon",
    "learning_rate": 3e-3,
    "warmup": 100,
    "steps": 2_300,
    "report": 230,
    **AUGMENTATION,
}

# The same with this project's additions (models/light_dvae_local.py). STFT frames overlap by three
# quarters: hence four phases.
TRANSFORMER_LOCAL_QUICK = {
    **TRANSFORMER_QUICK,
    "context": 50,
    "phases": 4,
    "heads": 8,
    "w_prior": "aggregate",
    "equaliser": 4.0,
}

RECURRENT_QUICK = {
    "beta_z": 0.01,
    "input_scale": "root",
    "optimiser": "muon",
    "learning_rate": 1e-2,
}

# FHVAE and β-VAE in `quick`.
SEGMENTS_QUICK = {
    "features": "fbank",
    "frames": 20,
    "trim": False,
    "batch": 64,
    "betas": (0.95, 0.999),
    "scheduled_sampling": (0.0, 0.0),
    "table_rate": 10.0,
}

# Recognisers: the acoustic model of the FHVAE paper (appendix G), and DeepSpeech2.
ACOUSTIC = {
    "features": "fbank",
    "targets": "frames",
    "frames": 20,
    "batch": 40,
    "scheduled_sampling": (0.0, 0.0),
}
DEEPSPEECH2 = {
    "features": "log_magnitude",
    "targets": "characters",
    "batch": 16,
    "scheduled_sampling": (0.0, 0.0),
}
RECOGNISERS_PAPER = {
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "clip": 5.0,
    "epochs": 50,
    "patience": 5,
}

# Lin et al., ICASSP 2023, sections 3.2 and 3.3; T = 150 is WSJ0's, 100 VoiceBank's. The batch size
# is not given there, nor are input scale and first output bias: the power as it is, and the log of
# its mean. The SRNN is trained with teacher forcing; with scheduled sampling it is
# --set scheduled_sampling=0.1,1.
LIGHT2023 = Recipe(
    window=1024,
    hop=256,
    frames=150,
    batch=32,
    steps=25_000,
    report=500,
    optimiser="adamw",
    betas=(0.9, 0.99),
    epsilon=1e-9,
    weight_decay=1e-5,
    learning_rate=5e-5,
    warmup=5_000,
    schedule="cosine",
    final_learning_rate=1e-8,
    models={
        "vae": {"hidden": (128,), "beta_z": 0.01},
        "dkf": {"z_hidden": (32,), "posterior_hidden": (32,), "beta_z": 0.01},
        "rvae": {**RVAE_WITHOUT_MLPS, "beta_z": 0.01},
        "srnn": {"beta_z": 0.01},
        "hit_dvae": TRANSFORMER_PAPER,
        "light_dvae": TRANSFORMER_PAPER,
    },
)

# Bie et al., Interspeech 2021, section 4.
BENCHMARK2021 = Recipe(
    window=512,
    hop=256,
    frames=150,
    batch=32,
    epochs=500,
    patience=20,
    optimiser="adam",
    learning_rate=1e-4,
    models={name: {} for name in ("vae", *RECURRENT_MODELS)},
)

# Hsu, Zhang & Glass, NIPS 2017, section 4 and appendix C; 32 dimensions and α = 10 are their best.
# The paper does not say how far apart segments are; here they do not overlap. Nor does it give the
# learning rate and the length of the training of the recogniser (appendix G).
FHVAE2017 = Recipe(
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
    models={
        "fhvae": {"z1_latent": 32, "z2_latent": 32, "alpha": 10.0},
        "beta_vae": {},
        "acoustic": {**ACOUSTIC, **RECOGNISERS_PAPER},
        "deepspeech2": {**DEEPSPEECH2, **RECOGNISERS_PAPER, "learning_rate": 3e-4},
    },
)

# Small enough for two CPU cores and five minutes.
QUICK = Recipe(
    window=1024,
    hop=256,
    frames=50,
    batch=16,
    steps=4_500,
    report=450,
    scheduled_sampling=(0.5, 1.0),
    optimiser="adamw",
    betas=(0.9, 0.99),
    weight_decay=1e-5,
    clip=100.0,
    learning_rate=2e-3,
    warmup=300,
    schedule="cosine",
    final_learning_rate=1e-5,
    models={
        "vae": {
            "hidden": (128,),
            "beta_z": 0.01,
            "input_scale": "root",
            "optimiser": "muon",
            **AUGMENTATION,
        },
        **{name: RECURRENT_QUICK for name in RECURRENT_MODELS},
        "hit_dvae": TRANSFORMER_QUICK,
        "light_dvae": TRANSFORMER_QUICK,
        "hit_dvae_local": TRANSFORMER_LOCAL_QUICK,
        "light_dvae_local": TRANSFORMER_LOCAL_QUICK,
        "fhvae": SEGMENTS_QUICK,
        "beta_vae": {**SEGMENTS_QUICK, "encoder_width": 256, "width": 128},
        "acoustic": {
            **ACOUSTIC,
            "width": 256,
            "projection": 128,
            "layers": 2,
            "steps": 1_500,
            "report": 150,
            "learning_rate": 4e-3,
            "warmup": 100,
            "clip": 5.0,
        },
        "deepspeech2": {
            **DEEPSPEECH2,
            "features": "fbank",
            "targets": "phones",
            "width": 128,
            "layers": 2,
            "channels": (8, 8),
            "batch": 8,
            "steps": 600,
            "report": 60,
            "warmup": 50,
            "clip": 5.0,
        },
    },
)

TRANSFORMER_HOUR = {"steps": 24_000, "report": 1_000, "warmup": 200}
HOUR_CHANGES = {
    "vae": {"steps": 20_000},
    **{name: {"steps": 16_000} for name in RECURRENT_MODELS},
    "hit_dvae": TRANSFORMER_HOUR,
    "light_dvae": TRANSFORMER_HOUR,
    "hit_dvae_local": TRANSFORMER_HOUR,
    "light_dvae_local": TRANSFORMER_HOUR,
    "fhvae": {"steps": 6_000, "z1_latent": 32, "z2_latent": 32, "features": "log_magnitude"},
}

# `quick` with more steps for the DVAEs and FHVAE, at most an hour of two CPU cores; every DVAE is
# trained with augmentation.
CPU_HOUR = dataclasses.replace(
    QUICK,
    report=1_000,
    equaliser=4.0,
    **AUGMENTATION,
    models={
        name: {**settings, **HOUR_CHANGES.get(name, {})} for name, settings in QUICK.models.items()
    },
)

# `quick` with very few steps, to see that everything runs: its results mean nothing.
SMOKE = dataclasses.replace(
    QUICK,
    models={
        name: {**settings, "steps": 40, "report": 40, "warmup": 10}
        for name, settings in QUICK.models.items()
    },
)

PAPER_RECIPES = ("light2023", "benchmark2021", "fhvae2017")
RECIPES = {
    "light2023": LIGHT2023,
    "benchmark2021": BENCHMARK2021,
    "fhvae2017": FHVAE2017,
    "quick": QUICK,
    "cpu_hour": CPU_HOUR,
    "smoke": SMOKE,
}
