"""Reads config.json: the supported families, the plan and the settings of its tiers.

A plan is one letter per layer and the whole configuration of a conversion: S softmax attention, L
sliding-window linear attention, X a linear map or nothing. A converted folder has it in config.json
under "layerboost".
"""

from dataclasses import dataclass, field
from pathlib import Path

from attention import TIERS
from hub import InputError, read_json, require
from kernels import FEATURE_MAPS

REMOVED = ("linear", "nothing")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LONGEST = 2**20  # tokens of a window
NEEDED = object()  # the default of a field that must be there

# {field of config.json: (type, least, most, what stands for it where it is absent or null)}. The
# limits are far beyond any model: they stop a damaged file before it asks for memory.
FIELDS = {
    "vocab_size": (int, 1, 2**24, NEEDED),
    "hidden_size": (int, 1, 2**17, NEEDED),
    "intermediate_size": (int, 1, 2**20, NEEDED),
    "num_hidden_layers": (int, 1, 1000, NEEDED),
    "num_attention_heads": (int, 1, 2**12, NEEDED),
    "num_key_value_heads": (int, 1, 2**12, None),
    "head_dim": (int, 2, 2**12, None),
    "max_position_embeddings": (int, 1, 2**30, 2048),
    "rms_norm_eps": (float, 0, 1, NEEDED),
    "attention_bias": (bool, False, True, False),
    "mlp_bias": (bool, False, True, False),
    "tie_word_embeddings": (bool, False, True, False),
    "sliding_window": (int, 0, 2**30, 0),
    "use_sliding_window": (bool, False, True, False),
    "max_window_layers": (int, 0, 1000, None),
}
BOOSTED_FIELDS = {  # of its entry "layerboost"
    "base_model_type": (str, "", "~", None),
    "plan": (str, "", "~", None),
    "removed": (str, "", "~", "nothing"),
    "window": (int, 0, LONGEST, 64),
    "sinks": (int, 0, LONGEST, 4),
    "feature_map": (str, "", "~", "hedgehog"),
    "healed_context": (int, 1, 2**30, None),
}
TYPES = {  # what JSON may hold for each, and how an error calls it
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a text"),
}
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
    window: int = 64  # of an L layer
    sinks: int = 4
    feature_map: str = "hedgehog"
    healed_context: int | None = None  # the longest sequences that the tails were healed on
    raw: dict = field(default_factory=dict, repr=False)  # config.json as it was read


def read_config(folder: Path) -> Config:
    """config.json of a model folder. Raises InputError for what is missing, damaged or not
    supported."""
    path = folder / "config.json"
    raw = read_json(path)
    boosted = read_boosted(raw, path)
    family = boosted.pop("base_model_type") or raw.get("model_type")
    check_supported(path, raw, family)

    fields = read_fields(raw, FIELDS, path)
    layers, bias = fields["num_hidden_layers"], fields["attention_bias"]
    boosted["plan"] = "S" * layers if boosted["plan"] is None else boosted["plan"]
    config = Config(
        model_type=family,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=layers,
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=fields["rms_norm_eps"],
        rope=read_rope(raw, path),
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        mlp_bias=fields["mlp_bias"],
        qk_norm=family == "qwen3",
        tie_word_embeddings=fields["tie_word_embeddings"],
        sliding_windows=read_sliding_windows(raw, fields, family, path),
        eos_token_ids=read_eos(raw, fields["vocab_size"], path),
        raw=raw,
        **read_heads(fields, path),
        **boosted,
    )
    try:
        check_settings(config)
    except InputError as error:
        raise InputError(f'{path}: "layerboost": {error}') from None
    return config


def read_fields(raw: dict, table: dict, where) -> dict:
    """The fields of a table, each of its type and within its limits."""
    fields = {}
    for name, (kind, least, most, default) in table.items():
        value = default if raw.get(name) is None else raw[name]
        require(value is not NEEDED, f"{where}: {name!r} is missing")
        types, called = TYPES[kind]
        right = value is default or type(value) in types and least <= value <= most
        limits = "" if kind in (str, bool) else f" from {least:,} to {most:,}"
        require(right, f"{where}: {name} is {value!r:.40}; give {called}{limits}")
        fields[name] = value
    return fields


def read_boosted(raw: dict, path: Path) -> dict:
    """The entry "layerboost", which a converted folder has."""
    boosted = raw.get("layerboost") or {}
    require(isinstance(boosted, dict), f'{path}: "layerboost" is {boosted!r:.40}; convert it again')
    return read_fields(boosted, BOOSTED_FIELDS, f'{path}: "layerboost"')


def read_heads(fields: dict, path: Path) -> dict[str, int]:
    """Number and size of the heads, checked for consistency."""
    size, heads = fields["hidden_size"], fields["num_attention_heads"]
    groups = fields["num_key_value_heads"] or heads
    head_dim = fields["head_dim"] or size // heads
    require(
        fields["head_dim"] or size % heads == 0,
        f"{path}: hidden_size {size} is no multiple of num_attention_heads {heads}; give head_dim",
    )
    require(
        heads % groups == 0,
        f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}",
    )
    require(
        head_dim % 2 == 0, f"{path}: head_dim is {head_dim}; rotary embeddings need an even number"
    )
    return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim}


def check_supported(path: Path, raw: dict, family: str | None) -> None:
    families = ", ".join(FAMILIES)
    require(
        family in FAMILIES, f"{path}: model_type {family!r:.40} is not supported; use {families}"
    )
    activation = raw.get("hidden_act") or "silu"
    require(
        activation in ("silu", "swish"),  # two names of one function
        f"{path}: hidden_act {activation!r:.40} is not supported; these families use silu",
    )
    require(
        raw.get("quantization_config") is None,
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
        rope[key] = float(rope[key])  # torch takes no whole number beyond 2^63
    return rope


def read_sliding_windows(
    raw: dict, fields: dict, family: str, path: Path
) -> tuple[int | None, ...]:
    window, layers = fields["sliding_window"], fields["num_hidden_layers"]
    in_use = family == "mistral" or family != "llama" and fields["use_sliding_window"]
    if not window or not in_use:
        return (None,) * layers

    first = layers if fields["max_window_layers"] is None else fields["max_window_layers"]
    first = 0 if family == "mistral" else first
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        kinds = kinds[:layers]
    known = ("full_attention", "sliding_attention")
    right = isinstance(kinds, list) and len(kinds) == layers and all(x in known for x in kinds)
    require(right, f"{path}: layer_types: give {layers} of {' and '.join(known)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_eos(raw: dict, vocab_size: int, path: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's where it has them, since chat models name
    several there, or config.json's."""
    eos = raw.get("eos_token_id")
    chat = path.with_name("generation_config.json")
    if chat.exists():
        chat_eos = read_json(chat).get("eos_token_id")
        path, eos = (path, eos) if chat_eos is None else (chat, chat_eos)
    if eos is None:
        return ()
    ids = eos if isinstance(eos, list) else [eos]
    right = all(type(id) is int and 0 <= id < vocab_size for id in ids)
    require(right, f"{path}: eos_token_id is {eos!r:.40}; give ids below vocab_size {vocab_size}")
    return tuple(ids)


def default_window(config: Config) -> int:
    """Four times the head size: at D numbers of 2 bytes in each key and value, and a state of D / 2
    features in float32 that is read and written, window and state cost a step about as much as
    5 D tokens do (results/healing.md, "What L should be")."""
    return 4 * config.head_dim


def parse_plan(text: str, layers: int) -> str:
    """`SSLX...`, one letter per layer, or `uniform:L` for all layers alike."""
    plan = text
    if text.startswith("uniform:"):
        plan = text.removeprefix("uniform:") * layers
    require(
        len(plan) == layers and set(plan) <= set(TIERS),
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
        0 <= config.window <= LONGEST and 0 <= config.sinks <= LONGEST,
        f"--window and --sinks: give numbers of tokens, 0 to {LONGEST:,}",
    )
    require(
        config.feature_map != "none" or config.window > 0,
        "--feature-map none --window 0: an L layer would see nothing; "
        "give it a window or a feature map",
    )
