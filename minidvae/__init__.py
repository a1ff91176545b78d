"""Dynamical variational autoencoders for speech.

    build_model(name, **settings)             a model of `minidvae.models.MODELS`
    load_run(folder)                          a trained model, its STFT, its checkpoint's content
    load_pretrained(name)                     the same of a model that ships
    enhance(waveform, rate)                   speech enhancement
    convert(source, reference, rate)          voice conversion
    load_dvae_speech(folder)                  a model in the published format, and its STFT
    import_dvae_speech(state_dict, network)   the model of a state dict and its [Network] settings

These are imported when they are first used, so that `import minidvae` itself is fast.
"""

from importlib import import_module

__version__ = "0.2.0"

MODULES_OF_FUNCTIONS = {
    "build_model": "minidvae.models",
    "load_run": "minidvae.training.checkpoint",
    "load_pretrained": "minidvae.training.checkpoint",
    "enhance": "minidvae.inference.enhance",
    "convert": "minidvae.inference.convert",
    "load_dvae_speech": "minidvae.models.published",
    "import_dvae_speech": "minidvae.models.published",
}
__all__ = [*MODULES_OF_FUNCTIONS, "__version__"]


def __getattr__(name: str):
    if name not in MODULES_OF_FUNCTIONS:
        raise AttributeError(f"module 'minidvae' has no attribute {name!r}")
    return getattr(import_module(MODULES_OF_FUNCTIONS[name]), name)
