"""Dynamical variational autoencoders for speech.

    build_model(name, **settings)                      a model of `minidvae.models.MODELS`
    load_run(folder)                                   the model of a run folder, its STFT, what its checkpoint holds
    load_pretrained("light_dvae-librispeech")          the same of a model that ships
    enhance(waveform, rate)                            a noisy recording → a clean one
    load_dvae_speech(folder)                           a model in the published format "DVAE-speech", and its STFT
    import_dvae_speech(state_dict, network)            the same from a state dict and the settings in [Network]

They are imported when first asked for, so that `import minidvae` itself is light.
"""

from importlib import import_module

_PLACES = {
    "build_model": "minidvae.models",
    "load_run": "minidvae.training.checkpoint",
    "load_pretrained": "minidvae.training.checkpoint",
    "enhance": "minidvae.inference.enhance",
    "load_dvae_speech": "minidvae.models.published",
    "import_dvae_speech": "minidvae.models.published",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'minidvae' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
