"""Every setting of the papers, as data."""

import dataclasses

from ..models import MODELS
from .kinds import kind_of
from .settings import Recipe, SettingError, check_config, known, parse

OF_SOME_KINDS = {name for model, _ in MODELS.values() for name in kind_of(model).settings}  # fields of Recipe

RECURRENT = ("dkf", "storn", "vrnn", "srnn", "rvae", "dsae")

# The RVAE of its own paper, without MLPs
RVAE_ORIGINAL = dict(x_hidden=(), z_hidden=(), posterior_hidden=(), decoder_z_hidden=(), decoder_hidden=())

# The recurrent family in `quick`
RECURRENT_SMALL = dict(beta_z=0.01, input_scale="root", optimiser="muon", learning_rate=1e-2)

# HiT-DVAE and LigHT-DVAE in `light2023`; the size of the network for w is not given in the paper, it follows from
# the number of parameters that is.
HIT2023 = dict(latent=16, w_latent=32, beta_z=0.01, beta_w=0.01, input_scale="power")
HIT2023 |= dict(width=256, heads=1, feedforward=1024, layers=4, w_embedding=256, w_hidden=512, w_layers=2)

# and in `quick`. Frames overlap by three quarters: the clock of z has 4 phases.
SMALL = dict(input_scale="root", context=50, phases=4, width=128, heads=8, feedforward=512, layers=1)
SMALL |= dict(w_embedding=32, w_hidden=32, w_layers=1, w_prior="aggregate", z_log_variance=-5.0)
AUGMENTED = dict(speed=(0.85, 1.2), gain=(-6.0, 0.0))
SMALL |= dict(optimiser="muon", learning_rate=3e-3, warmup=100, steps=2_300, report=230, equaliser=4.0) | AUGMENTED

# FHVAE and β-VAE in `quick`
SEGMENTS = dict(features="fbank", frames=20, trim=False, batch=64, betas=(0.95, 0.999), own_past=(0.0, 0.0))
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
        **dict(features="fbank", frames=20, shift=20, trim=False, batch=256, epochs=500, patience=50),
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
        **dict(window=1024, hop=256, frames=50, batch=16, steps=4_500, report=450, own_past=(0.5, 1.0)),
        **dict(optimiser="adamw", betas=(0.9, 0.99), weight_decay=1e-5, clip=100.0),
        **dict(learning_rate=2e-3, warmup=300, schedule="cosine", final_learning_rate=1e-5),
        models={name: RECURRENT_SMALL for name in RECURRENT}
        | {
            "vae": dict(hidden=(128,), beta_z=0.01, input_scale="root", optimiser="muon") | AUGMENTED,
            "hit_dvae": SMALL,
            "light_dvae": SMALL,
            "fhvae": SEGMENTS,
            "beta_vae": SEGMENTS | dict(encoder_width=256, width=128),
            "acoustic": ACOUSTIC
            | dict(width=256, projection=128, layers=2)
            | dict(steps=1_500, report=150, learning_rate=4e-3, warmup=100, clip=5.0),
            "deepspeech2": DEEPSPEECH2
            | dict(features="fbank", targets="phones", width=128, layers=2, channels=(8, 8), batch=8)
            | dict(steps=600, report=60, warmup=50, clip=5.0),
        },
    ),
}

# `quick` with more steps, for an hour of two CPU cores at most; all models learn from more voices and microphones.
HOUR = {name: dict(steps=16_000) for name in RECURRENT}
HOUR |= {"vae": dict(steps=20_000), "fhvae": dict(steps=6_000, z1_latent=32, z2_latent=32, features="log_magnitude")}
HOUR |= {name: dict(steps=24_000, report=1_000, warmup=200) for name in ("hit_dvae", "light_dvae")}
RECIPES["cpu_hour"] = dataclasses.replace(
    RECIPES["quick"],
    **dict(report=1_000, equaliser=4.0) | AUGMENTED,
    models={name: settings | HOUR.get(name, {}) for name, settings in RECIPES["quick"].models.items()},
)

# `quick` with hardly a step, to see that everything runs: the numbers that come of it mean nothing.
RECIPES["smoke"] = dataclasses.replace(
    RECIPES["quick"],
    models={
        name: settings | dict(steps=40, report=40, warmup=10) for name, settings in RECIPES["quick"].models.items()
    },
)


def resolve(model: str, recipe: str, overrides: dict[str, str]) -> tuple[Recipe, dict]:
    """A recipe and the settings of a model under it, with `key=value` overrides of either. Raises SettingError naming
    the nearest right name or the expected type."""
    settings = RECIPES[known("recipe", recipe, RECIPES)]
    model_type, config_type = MODELS[known("model", model, MODELS)]
    kind = kind_of(model_type)
    if model not in settings.models:
        offered = ", ".join(name for name, other in RECIPES.items() if model in other.models)
        raise SettingError(f"recipe {recipe} has no settings for {model}; recipes that have: {offered}")
    foreign = OF_SOME_KINDS.difference(kind.settings) | {"models"}
    derived = kind.derived(settings).keys() | {"frames", "sequences", "symbols", "lanes"}  # from recipe and corpus
    recipe_fields = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in foreign}
    config_fields = {f.name: f.type for f in dataclasses.fields(config_type) if f.name not in derived}
    types = recipe_fields | config_fields
    given = {key: parse(key, text, types[known("setting", key, types)]) for key, text in overrides.items()}
    if {"steps", "epochs"} <= set(given):
        raise SettingError("--set steps and epochs: one of them says how long to train")
    if "epochs" in given:
        given["steps"] = 0
    given = settings.models[model] | given
    own = set(vars(settings)).difference(config_fields)  # the latent of a DVAE is a number, that of a recipe a name
    settings = dataclasses.replace(settings, **{k: v for k, v in given.items() if k in own})
    config = dataclasses.asdict(config_type(**{k: v for k, v in given.items() if k in config_fields}))
    kind.check(model, settings, config, overrides)
    config |= {name: value for name, value in kind.derived(settings).items() if name in config}
    check_config(config)
    return settings, config
