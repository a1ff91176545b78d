"""The models by name. `build_model("light_dvae", latent=16)` builds one from its settings."""

import dataclasses

from torch import nn

from .acoustic import Acoustic, AcousticConfig
from .beta_vae import BetaVAE, BetaVAEConfig
from .deepspeech2 import DeepSpeech2, DeepSpeech2Config
from .dkf import DKF, DKFConfig
from .dsae import DSAE, DSAEConfig
from .fhvae import FHVAE, FHVAEConfig
from .hit_dvae import HiTDVAE
from .light_dvae import LigHTConfig, LigHTDVAE
from .light_dvae_local import HiTDVAELocal, LigHTDVAELocal, LigHTLocalConfig
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
    "hit_dvae_local": (HiTDVAELocal, LigHTLocalConfig),
    "light_dvae_local": (LigHTDVAELocal, LigHTLocalConfig),
    "fhvae": (FHVAE, FHVAEConfig),
    "beta_vae": (BetaVAE, BetaVAEConfig),
    "acoustic": (Acoustic, AcousticConfig),
    "deepspeech2": (DeepSpeech2, DeepSpeech2Config),
}


def build_model(name: str, **settings) -> nn.Module:
    """Return a new model.

    Args:
        name: a key of `MODELS`.
        settings: fields of the dataclass at the top of the model's file; others keep their
            defaults.

    Raises:
        ValueError: the name, a setting or its value is unknown.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    model_type, config_type = MODELS[name]
    setting_names = [field.name for field in dataclasses.fields(config_type)]
    unknown = sorted(set(settings) - set(setting_names))
    if unknown:
        raise ValueError(
            f"{name} has no setting {unknown[0]!r}: its settings are {', '.join(setting_names)}"
        )
    return model_type(config_type(**settings))
