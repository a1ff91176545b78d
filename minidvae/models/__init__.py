"""The models by name. `build_model("light_dvae", latent=16)` builds one from its settings."""

import dataclasses

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..files import CheckpointError
from .acoustic import Acoustic, AcousticConfig
from .beta_vae import BetaVAE, BetaVAEConfig
from .deepspeech2 import DeepSpeech2, DeepSpeech2Config
from .dkf import DKF, DKFConfig
from .dsae import DSAE, DSAEConfig
from .fhvae import FHVAE, FHVAEConfig
from .hit_dvae import HiTDVAE
from .light_dvae import LigHTConfig, LigHTDVAE
from .rvae import RVAE, RVAEConfig
from .srnn import SRNN, SRNNConfig
from .storn import STORN, STORNConfig
from .vae import VAE, VAEConfig
from .vrnn import VRNN, VRNNConfig

MODELS = {
    "vae": (VAE, VAEConfig),
    "dkf": (DKF, DKFConfig),
    "storn": (STORN, STORNConfig),
    "vrnn": (VRNN, VRNNConfig),
    "srnn": (SRNN, SRNNConfig),
    "rvae": (RVAE, RVAEConfig),
    "dsae": (DSAE, DSAEConfig),
    "hit_dvae": (HiTDVAE, LigHTConfig),
    "light_dvae": (LigHTDVAE, LigHTConfig),
    "fhvae": (FHVAE, FHVAEConfig),
    "beta_vae": (BetaVAE, BetaVAEConfig),
    "acoustic": (Acoustic, AcousticConfig),
    "deepspeech2": (DeepSpeech2, DeepSpeech2Config),
}


def build_model(name: str, **config) -> nn.Module:
    """A model of MODELS with these settings, the others at their defaults. ValueError where a name is unknown."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    model, settings = MODELS[name]
    known = [field.name for field in dataclasses.fields(settings)]
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(
            f"{name} has no setting {unknown[0]!r}: its settings are {', '.join(known)}"
        )
    return model(settings(**config))


def outline(name: str, config: dict, most: int) -> nn.Module:
    """The model of a file's settings, its parameters without memory, to be compared with those in the file. Not many
    more are made than `most`, as many as the file has. CheckpointError where there is no such model."""
    made = []

    def count(*parameter) -> None:
        made.append(parameter[1])
        if len(made) > 2 * most + 10:
            raise CheckpointError(
                f"its settings describe a {name} of more parameters than the {most} in the file"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return build_model(name, **config)
    except Exception as error:  # torch raises anything for sizes that cannot be
        raise CheckpointError(str(error).partition("\n")[0]) from None
    finally:
        hook.remove()
