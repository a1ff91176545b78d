"""The published format "DVAE-speech": its settings and parameters beside ours.

A model there is a folder with a plain state dict and a `config.ini`. Its MLPs are `<part>.linear0, 1, …`, where ours
are `<part>.0, 2, …` (linear layers and activations in turn); its other parts differ in name only. "Backward" LSTMs
are there forward ones on the flipped sequence, the same as ours; RVAE's is, bidirectional or not.
"""

from typing import NamedTuple


class Format(NamedTuple):
    settings: dict[str, str]  # our setting → theirs
    parts: dict[str, str]  # our part → theirs


SHARED_SETTINGS = {"bins": "x_dim", "latent": "z_dim"}
SHARED_PARTS = {"posterior.mean": "inf_mean", "posterior.log_variance": "inf_logvar", "output": "gen_logvar"}
PRIOR = {"prior.mean": "prior_mean", "prior.log_variance": "prior_logvar"}
LATER_OUTPUT = "gen_out"  # the name of `gen_logvar` in later versions of the format

FORMATS = {
    "vae": Format({"hidden": "dense_x_z"}, {"encoder": "mlp_x_z", "decoder": "mlp_z_x"}),
    "dkf": Format(
        {
            "x_hidden": "dense_x_gx",
            "rnn": "dim_RNN_gx",
            "z_hidden": "dense_ztm1_g",
            "posterior_hidden": "dense_g_z",
            "decoder_hidden": "dense_z_x",
            "bidirectional": "bidir_gx",
        },
        {
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
    ),
    "storn": Format(
        {
            "x_hidden": "dense_x_g",
            "g_rnn": "dim_RNN_g",
            "posterior_hidden": "dense_g_z",
            "z_hidden": "dense_z_h",
            "past_hidden": "dense_xtm1_h",
            "h_rnn": "dim_RNN_h",
            "decoder_hidden": "dense_h_x",
        },
        {
            "mlp_x": "mlp_x_g",
            "lstm_g": "rnn_g",
            "mlp_g": "mlp_g_z",
            "mlp_z": "mlp_z_h",
            "mlp_past": "mlp_xtm1_h",
            "lstm_h": "rnn_h",
            "mlp_h": "mlp_h_x",
        },
    ),
    "vrnn": Format(
        {
            "x_hidden": "dense_x",
            "z_hidden": "dense_z",
            "rnn": "dim_RNN",
            "posterior_hidden": "dense_hx_z",
            "prior_hidden": "dense_h_z",
            "decoder_hidden": "dense_hz_x",
        },
        {
            "mlp_x": "feature_extractor_x",
            "mlp_z": "feature_extractor_z",
            "lstm": "rnn",
            "posterior_mlp": "mlp_hx_z",
            "prior_mlp": "mlp_h_z",
            **PRIOR,
            "decoder": "mlp_hz_x",
        },
    ),
    "srnn": Format(
        {
            "x_hidden": "dense_x_h",
            "h_rnn": "dim_RNN_h",
            "hx_hidden": "dense_hx_g",
            "g_rnn": "dim_RNN_g",
            "posterior_hidden": "dense_gz_z",
            "prior_hidden": "dense_hz_z",
            "decoder_hidden": "dense_hz_x",
        },
        {
            "mlp_x": "mlp_x_h",
            "lstm_h": "rnn_h",
            "mlp_hx": "mlp_hx_g",
            "lstm_g": "rnn_g",
            "posterior_mlp": "mlp_gz_z",
            "prior_mlp": "mlp_hz_z",
            **PRIOR,
            "decoder": "mlp_hz_x",
        },
    ),
    "rvae": Format(
        {
            "x_hidden": "dense_x_gx",
            "gx_rnn": "dim_RNN_g_x",
            "z_hidden": "dense_z_gz",
            "gz_rnn": "dim_RNN_g_z",
            "posterior_hidden": "dense_g_z",
            "decoder_z_hidden": "dense_z_h",
            "h_rnn": "dim_RNN_h",
            "decoder_hidden": "dense_h_x",
            "bidirectional": "bidir_g_x",
        },
        {
            "mlp_x": "mlp_x_gx",
            "lstm_gx": "rnn_g_x",
            "mlp_gz": "mlp_z_gz",
            "lstm_gz": "rnn_g_z",
            "posterior_mlp": "mlp_g_z",
            "mlp_h": "mlp_z_h",
            "lstm_h": "rnn_h",
            "decoder": "mlp_h_x",
        },
    ),
    "dsae": Format(
        {
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
        },
        {
            "mlp_x": "mlp_x",
            "lstm_v": "rnn_g_v",
            "mlp_v": "mlp_gv_v",
            "posterior_v.mean": "inf_v_mean",
            "posterior_v.log_variance": "inf_v_logvar",
            "mlp_xv": "mlp_xv_gxv",
            "lstm_xv": "rnn_g_xv",
            "mlp_z": "mlp_gxv_gz",
            "rnn_z": "rnn_g_z",
            "posterior.mean": "inf_z_mean",
            "posterior.log_variance": "inf_z_logvar",
            "lstm_prior": "rnn_prior",
            **PRIOR,
            "decoder": "mlp_vz_x",
        },
    ),
}


def read_settings(network: dict[str, str]) -> tuple[str, dict]:
    """A [Network] section → the model's name and its settings for `build_model`.

    Raises ValueError where something is missing or malformed, or describes a model that does not exist here.
    """
    name = str(network.get("name", "")).lower()
    if name not in FORMATS:
        raise ValueError(f"[Network] name={network.get('name')!r} is none of {', '.join(FORMATS).upper()}")
    config = {}
    for setting, key in (SHARED_SETTINGS | FORMATS[name].settings).items():
        if key not in network:
            raise ValueError(f"[Network] of a {name} lacks {key}")
        config[setting] = parse(setting, key, str(network[key]).strip())
    directions = {parse("bidirectional", key, str(value)) for key, value in network.items() if key.startswith("bidir")}
    layers = {parse("layers", key, str(value)) for key, value in network.items() if key.startswith("num_RNN")}
    activation = str(network.get("activation", "tanh"))
    if name == "vae":
        if activation != "tanh":
            raise ValueError(f"[Network] activation={activation}: a vae has tanh only")
        return name, config
    if len(directions) > 1 or len(layers) > 1:
        raise ValueError("[Network] has recurrent networks that differ in depth or direction; here they agree")
    return name, config | {"activation": activation, "layers": layers.pop() if layers else 1}


def parse(setting: str, key: str, text: str) -> int | bool | tuple[int, ...]:
    try:
        if setting.endswith("hidden"):
            return tuple(int(width) for width in text.split(",")) if text else ()
        if setting == "bidirectional":
            return {"true": True, "false": False}[text.lower()]
        if int(text) < 1:
            raise ValueError
        return int(text)
    except (KeyError, ValueError):
        raise ValueError(f"[Network] {key}={text!r} does not read") from None


def their_key(name: str, key: str, config: dict) -> str:
    """The name that our parameter `key` of model `name` has there."""
    parts = SHARED_PARTS | FORMATS[name].parts
    module, parameter = key.rsplit(".", 1)
    if module in parts:
        return f"{parts[module]}.{parameter}"
    part, index = module.rsplit(".", 1)
    layer = str(int(index) // 2)
    if name == "dkf" and part == "mlp_z" and int(layer) == len(config["z_hidden"]):
        layer = "_last"
    return f"{parts[part]}.linear{layer}.{parameter}"


def settled_key(key: str) -> str:
    """Their key as earlier versions of the format have it."""
    part, dot, parameter = key.partition(".")
    return f"{SHARED_PARTS['output']}{dot}{parameter}" if part == LATER_OUTPUT else key
