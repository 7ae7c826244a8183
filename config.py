"""What config.json says of a model: the families that are supported, the plan, and the tiers'
settings.

A plan is one letter per layer and the whole configuration of a conversion: S softmax attention, L
sliding-window linear attention, X a linear map or nothing. A converted folder has it in config.json
under "layerboost".
"""

from dataclasses import dataclass, field
from pathlib import Path

from hub import InputError, read_json, require
from kernels import FEATURE_MAPS

REMOVED = ("linear", "nothing")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass
class Config:
    """What config.json says, under its own names, and the plan with its tier settings."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta, and what ROPE_FIELDS has for the type
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_windows: tuple  # per layer: how far softmax attention sees, None for all
    eos_token_ids: tuple[int, ...]
    plan: str  # one letter per layer: S softmax, L sliding-window linear, X removed
    removed: str = "nothing"  # what stands where attention is removed, or "linear"
    window: int = 64
    sinks: int = 4
    feature_map: str = "hedgehog"
    healed_context: int | None = None  # the longest sequences that the tails were healed on
    raw: dict = field(default_factory=dict, repr=False)  # config.json as it was read


def read_config(folder: Path) -> Config:
    """config.json of a model folder. Raises InputError for what is missing or not supported."""
    path = folder / "config.json"
    raw = read_json(path)
    boosted = raw.get("layerboost", {})
    family = boosted.get("base_model_type", raw.get("model_type"))
    check_supported(path, raw, family)

    try:
        layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
        bias = raw.get("attention_bias", False)
        config = Config(
            model_type=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw["rms_norm_eps"],
            rope=read_rope(raw, path),
            qkv_bias=family == "qwen2" or bias,
            o_bias=family != "qwen2" and bias,
            mlp_bias=raw.get("mlp_bias", False),
            qk_norm=family == "qwen3",
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            sliding_windows=read_sliding_windows(raw, family, layers),
            eos_token_ids=read_eos(raw, folder),
            plan=boosted.get("plan", "S" * layers),
            raw=raw,
        )
    except KeyError as missing:
        raise InputError(f"{path}: {missing} is missing") from None

    for name in ("removed", "window", "sinks", "feature_map", "healed_context"):
        setattr(config, name, boosted.get(name, getattr(config, name)))
    check_settings(config)
    return config


def check_supported(path: Path, raw: dict, family: str | None) -> None:
    families = ", ".join(FAMILIES)
    require(family in FAMILIES, f"{path}: model_type {family!r} is not supported; use {families}")
    activation = raw.get("hidden_act", "silu")
    require(
        activation == "silu",
        f"{path}: hidden_act {activation!r} is not supported; these families use silu",
    )
    require(
        "quantization_config" not in raw,
        f"{path}: quantised weights are not supported; use the float checkpoint of this model",
    )


def read_rope(raw: dict, path: Path) -> dict:
    """Both spellings: rope_theta with rope_scaling, and rope_parameters that holds all. Of the two
    rope_scaling counts, as in transformers."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(name) or {}
    require(isinstance(given, dict), f"{path}: {name} is {given!r:.40}; give an object")
    rope = {
        "rope_theta": raw.get("rope_theta") or 10000.0,
        "original_max_position_embeddings": raw.get("max_position_embeddings") or 2048,
    }
    rope |= {key: value for key, value in given.items() if value is not None}

    kind = rope["rope_type"] = str(rope.get("rope_type") or rope.get("type", "default"))
    kinds = ", ".join(ROPE_FIELDS)
    require(kind in ROPE_FIELDS, f"{path}: rope type {kind!r} is not supported; use {kinds}")
    partial = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor", 1.0)
    require(partial == 1.0, f"{path}: partial_rotary_factor is not supported")
    needed = ("rope_theta", *ROPE_FIELDS[kind])
    for key in needed:
        require(key in rope, f"{path}: rope type {kind!r} needs {key!r}")
    for key in rope.keys() & {*needed, *YARN_OPTIONS}:
        least = 1.0001 if key == "rope_theta" else 1e-9 if key in needed else 0
        right = type(rope[key]) in (int, float) and least <= rope[key] < 1e30
        require(right, f"{path}: {key} is {rope[key]!r:.40}; give a number above {least:.0f}")
    return rope


def read_sliding_windows(raw: dict, family: str, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    in_use = family == "mistral" or family != "llama" and raw.get("use_sliding_window", False)
    if not window or not in_use:
        return (None,) * layers

    first = 0 if family == "mistral" else raw.get("max_window_layers", layers)
    kinds = raw.get("layer_types")
    if not kinds:
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_eos(raw: dict, folder: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's where it has them, since chat models name
    several there, or config.json's."""
    eos = raw.get("eos_token_id")
    path = folder / "generation_config.json"
    if path.exists():
        chat_eos = read_json(path).get("eos_token_id")
        eos = eos if chat_eos is None else chat_eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def parse_plan(text: str, layers: int) -> str:
    """`SSLX...`, one letter per layer, or `uniform:L` for all layers alike."""
    plan = text
    if text.startswith("uniform:"):
        plan = text.removeprefix("uniform:") * layers
    require(
        len(plan) == layers and set(plan) <= set("SLX"),
        f"--plan {text!r}: give {layers} letters out of S (softmax), L (sliding-window linear) "
        "and X (removed), or uniform:S, uniform:L, uniform:X",
    )
    return plan


def check_settings(config: Config) -> None:
    parse_plan(config.plan, config.num_hidden_layers)
    require(config.removed in REMOVED, f"--removed {config.removed!r}: use linear or nothing")
    name, known = config.feature_map, ", ".join(FEATURE_MAPS)
    require(name in FEATURE_MAPS, f"--feature-map {name!r}: use one of {known}")
    require(
        config.window >= 0 and config.sinks >= 0,
        "--window and --sinks: give numbers of tokens, 0 or more",
    )
    require(
        config.feature_map != "none" or config.window > 0,
        "--feature-map none --window 0: an L layer would see nothing; "
        "give it a window or a feature map",
    )
