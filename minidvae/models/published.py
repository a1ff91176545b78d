"""The published format "DVAE-speech": its settings and parameters beside ours.

A model there is a folder with a plain state dict and a `config.ini`. Its MLPs are `<part>.linear0,
1, …`, where ours are `<part>.0, 2, …` (linear layers and activations in turn); its other parts
differ in name only. "Backward" LSTMs are there forward ones on the flipped sequence, the same as
ours; RVAE's is, bidirectional or not.
"""

import configparser
import dataclasses
import re
from pathlib import Path

import torch
from torch import nn

from ..data.audio import SAMPLE_RATE, STFT
from ..files import CheckpointError, load_checkpoint
from . import MODELS, build_model

MAX_LAYERS = 100  # largest number of layers of an MLP; the authors' models have at most four
LATER_OUTPUT = re.compile(r"^gen_out\b")  # the name of `gen_logvar` in later versions of the format

# Our names of settings and parts that all models have: theirs.
SHARED_NAMES = {
    "bins": "x_dim",
    "latent": "z_dim",
    "posterior.mean": "inf_mean",
    "posterior.log_variance": "inf_logvar",
    "output": "gen_logvar",
}
# For each model, our names of settings and parts: theirs.
FORMATS = {
    "vae": SHARED_NAMES
    | {
        "hidden": "dense_x_z",
        "encoder": "mlp_x_z",
        "decoder": "mlp_z_x",
    },
    "dkf": SHARED_NAMES
    | {
        "x_hidden": "dense_x_gx",
        "rnn": "dim_RNN_gx",
        "z_hidden": "dense_ztm1_g",
        "posterior_hidden": "dense_g_z",
        "decoder_hidden": "dense_z_x",
        "bidirectional": "bidir_gx",
        "mlp_x": "mlp_x_gx",
        "lstm_g": "rnn_gx",
        "mlp_z": "mlp_ztm1_g",
        "posterior_mlp": "mlp_g_z",
        "prior.gate.0": "mlp_gate.linear1",
        "prior.gate.2": "mlp_gate.linear2",
        "prior.proposal.0": "mlp_z_prop.linear1",
        "prior.proposal.2": "mlp_z_prop.linear2",
        "prior.mean": "prior_mean",
        "prior.variance": "prior_logvar.1",
        "decoder": "mlp_z_x",
    },
    "storn": SHARED_NAMES
    | {
        "x_hidden": "dense_x_g",
        "g_rnn": "dim_RNN_g",
        "posterior_hidden": "dense_g_z",
        "z_hidden": "dense_z_h",
        "past_hidden": "dense_xtm1_h",
        "h_rnn": "dim_RNN_h",
        "decoder_hidden": "dense_h_x",
        "mlp_x": "mlp_x_g",
        "lstm_g": "rnn_g",
        "mlp_g": "mlp_g_z",
        "mlp_z": "mlp_z_h",
        "mlp_past": "mlp_xtm1_h",
        "lstm_h": "rnn_h",
        "mlp_h": "mlp_h_x",
    },
    "vrnn": SHARED_NAMES
    | {
        "x_hidden": "dense_x",
        "z_hidden": "dense_z",
        "rnn": "dim_RNN",
        "posterior_hidden": "dense_hx_z",
        "prior_hidden": "dense_h_z",
        "decoder_hidden": "dense_hz_x",
        "mlp_x": "feature_extractor_x",
        "mlp_z": "feature_extractor_z",
        "lstm": "rnn",
        "posterior_mlp": "mlp_hx_z",
        "prior_mlp": "mlp_h_z",
        "prior.mean": "prior_mean",
        "prior.log_variance": "prior_logvar",
        "decoder": "mlp_hz_x",
    },
    "srnn": SHARED_NAMES
    | {
        "x_hidden": "dense_x_h",
        "h_rnn": "dim_RNN_h",
        "hx_hidden": "dense_hx_g",
        "g_rnn": "dim_RNN_g",
        "posterior_hidden": "dense_gz_z",
        "prior_hidden": "dense_hz_z",
        "decoder_hidden": "dense_hz_x",
        "mlp_x": "mlp_x_h",
        "lstm_h": "rnn_h",
        "mlp_hx": "mlp_hx_g",
        "lstm_g": "rnn_g",
        "posterior_mlp": "mlp_gz_z",
        "prior_mlp": "mlp_hz_z",
        "prior.mean": "prior_mean",
        "prior.log_variance": "prior_logvar",
        "decoder": "mlp_hz_x",
    },
    "rvae": SHARED_NAMES
    | {
        "x_hidden": "dense_x_gx",
        "gx_rnn": "dim_RNN_g_x",
        "z_hidden": "dense_z_gz",
        "gz_rnn": "dim_RNN_g_z",
        "posterior_hidden": "dense_g_z",
        "decoder_z_hidden": "dense_z_h",
        "h_rnn": "dim_RNN_h",
        "decoder_hidden": "dense_h_x",
        "bidirectional": "bidir_g_x",
        "mlp_x": "mlp_x_gx",
        "lstm_gx": "rnn_g_x",
        "mlp_gz": "mlp_z_gz",
        "lstm_gz": "rnn_g_z",
        "posterior_mlp": "mlp_g_z",
        "mlp_h": "mlp_z_h",
        "lstm_h": "rnn_h",
        "decoder": "mlp_h_x",
    },
    "dsae": SHARED_NAMES
    | {
        "posterior.mean": "inf_z_mean",
        "posterior.log_variance": "inf_z_logvar",
        "w_latent": "v_dim",
        "x_hidden": "dense_x",
        "v_rnn": "dim_RNN_gv",
        "v_hidden": "dense_gv_v",
        "xv_hidden": "dense_xv_gxv",
        "xv_rnn": "dim_RNN_gxv",
        "z_hidden": "dense_gxv_gz",
        "z_rnn": "dim_RNN_gz",
        "prior_rnn": "dim_RNN_prior",
        "decoder_hidden": "dense_vz_x",
        "mlp_x": "mlp_x",
        "lstm_v": "rnn_g_v",
        "mlp_v": "mlp_gv_v",
        "posterior_v.mean": "inf_v_mean",
        "posterior_v.log_variance": "inf_v_logvar",
        "mlp_xv": "mlp_xv_gxv",
        "lstm_xv": "rnn_g_xv",
        "mlp_z": "mlp_gxv_gz",
        "rnn_z": "rnn_g_z",
        "lstm_prior": "rnn_prior",
        "prior.mean": "prior_mean",
        "prior.log_variance": "prior_logvar",
        "decoder": "mlp_vz_x",
    },
}


def read_settings(network: dict[str, str]) -> tuple[str, dict]:
    """Return the model's name and its settings for `build_model` from a [Network] section. Raises
    ValueError where something is missing or malformed, or describes a model that does not exist
    here."""
    name = str(network.get("name", "")).lower()
    if name not in FORMATS:
        names = ", ".join(FORMATS).upper()
        raise ValueError(f"[Network] name={network.get('name')!r} is none of {names}")
    fields = {field.name for field in dataclasses.fields(MODELS[name][1])}
    config = {}
    for setting, key in FORMATS[name].items():
        if setting not in fields:
            continue
        if key not in network:
            raise ValueError(f"[Network] of a {name} lacks {key}")
        config[setting] = parse(setting, key, str(network[key]).strip())
    activation = str(network.get("activation", "tanh"))
    if name == "vae":
        if activation != "tanh":
            raise ValueError(f"[Network] activation={activation}: a vae has tanh only")
        return name, config
    directions = set()
    layers = set()
    for key, value in network.items():
        if key.startswith("bidir"):
            directions.add(parse("bidirectional", key, str(value)))
        if key.startswith("num_RNN"):
            layers.add(parse("layers", key, str(value)))
    if len(directions) > 1 or len(layers) > 1:
        raise ValueError(
            "[Network] has recurrent networks that differ in depth or direction; here they agree"
        )
    config["activation"] = activation
    config["layers"] = layers.pop() if layers else 1
    return name, config


def parse(setting: str, key: str, text: str) -> int | bool | tuple[int, ...]:
    """Return the value of a setting, by its name: widths, a direction or a number."""
    try:
        if setting.endswith("hidden"):
            widths = text.split(",") if text else []
            if len(widths) > MAX_LAYERS:
                raise ValueError
            return tuple(parse("width", key, width) for width in widths)
        if setting == "bidirectional":
            return {"true": True, "false": False}[text.lower()]
        number = int(text)
        if not 1 <= number < 2**31:
            raise ValueError
        return number
    except (KeyError, ValueError):
        raise ValueError(f"[Network] {key}={text[:40]!r} cannot be read") from None


def their_key(name: str, key: str, config: dict) -> str:
    """Return the name that our parameter `key` of model `name` has there."""
    parts = FORMATS[name]
    module, parameter = key.rsplit(".", 1)
    if module in parts:
        return f"{parts[module]}.{parameter}"
    part, index = module.rsplit(".", 1)
    layer = str(int(index) // 2)
    if name == "dkf" and part == "mlp_z" and int(layer) == len(config["z_hidden"]):
        layer = "_last"
    return f"{parts[part]}.linear{layer}.{parameter}"


def import_dvae_speech(state_dict: dict[str, torch.Tensor], network: dict[str, str]) -> nn.Module:
    """Return the model of a state dict in the published format "DVAE-speech".

    Args:
        state_dict: of the authors' model.
        network: the [Network] section of its config.ini.

    Raises:
        CheckpointError: a setting, a parameter or a shape does not fit.
    """
    if not isinstance(state_dict, dict):
        raise CheckpointError("not a plain state dict of tensors")
    for value in state_dict.values():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError("not a plain state dict of tensors")
    try:
        name, config = read_settings(network)
        with torch.device("meta"):  # Sizes are checked before memory is allocated.
            sketch = build_model(name, **config)
        our_keys = {their_key(name, key, config): key for key, _ in sketch.named_parameters()}
        renamed = {}
        for key, value in state_dict.items():
            key = LATER_OUTPUT.sub("gen_logvar", str(key))
            renamed[our_keys.get(key, key)] = value
        buffers = dict(sketch.named_buffers())  # statistics of the input, which theirs have not
        sketch.load_state_dict(renamed | buffers, strict=True, assign=True)
        model = build_model(name, **config)
        model.load_state_dict(renamed, strict=False)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"does not fit its [Network] section: {reason}") from None
    return model


def load_dvae_speech(folder: str | Path) -> tuple[nn.Module, STFT]:
    """Return the model of a folder with a state dict (one .pt file) and its `config.ini`, and the
    STFT that it was trained on. Raises CheckpointError naming the file where something is missing
    or does not fit."""
    folder = Path(folder)
    configuration = folder / "config.ini"
    files = sorted(folder.glob("*.pt"))
    if not configuration.is_file() or len(files) != 1:
        raise CheckpointError(
            f"{folder}: expected one .pt file and config.ini, found {len(files)} .pt file(s)"
        )
    stft, network = read_configuration(configuration)
    try:
        model = import_dvae_speech(load_checkpoint(files[0]), network)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if stft.bins != model.config.bins:
        raise CheckpointError(
            f"{folder}: a window of {stft.window_length} samples does not have "
            f"x_dim={model.config.bins} bins"
        )
    return model, stft


def read_configuration(path: Path) -> tuple[STFT, dict[str, str]]:
    """Return the STFT and the [Network] section of a config.ini."""
    ini = configparser.ConfigParser(interpolation=None)
    ini.optionxform = str
    try:
        ini.read_string(path.read_text())
        rate = ini.getint("STFT", "fs")
        window_length = round(rate * ini.getfloat("STFT", "wlen_sec"))
        hop = round(window_length * ini.getfloat("STFT", "hop_percent"))
        stft = STFT(window_length, hop)
        network = dict(ini["Network"])
    except (configparser.Error, KeyError, OSError, OverflowError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None
    if rate != SAMPLE_RATE:
        raise CheckpointError(f"{path}: fs={rate}; expected {SAMPLE_RATE}")
    return stft, network
