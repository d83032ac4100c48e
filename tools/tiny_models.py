"""A tiny random model of any family that transformers knows: four blocks, width 32, a vocabulary of 320, windows of 8 tokens.
The sizes, and what single families want besides, are in tiny_models.json."""

import inspect
import json
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
BLOCKS = DATA["text"]["num_hidden_layers"]
LARGEST = 30_000_000  # parameters; what has more is not tiny
TABLES = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def families():
    "Every (family, class) that transformers can load as a language model."
    return list(dict.fromkeys(one for table in TABLES for one in sorted(table.items())))


def variants():
    "Further (name, class): families with settings that change how they compute."
    return [(name, variant["class"]) for name, variant in DATA["variants"].items()]


def tiny_config(family):
    "The configuration of the tiny model of a family or variant."
    variant = DATA["variants"].get(family, dict(family=family, config={}))
    return shrunken(CONFIG_MAPPING[variant["family"]](), True, variant["config"])


def shrunken(config, holds_text, further=None):
    "A configuration of the same class with small sizes, its inner configurations included."
    inner = {name: part for name in type(config).sub_configs if hasattr(part := getattr(config, name, None), "to_dict")}
    text = config.get_text_config(decoder=True) if holds_text else None
    holds = {name: holds_text and part.get_text_config(decoder=True) is text for name, part in inner.items()}
    here = "encoder" if not holds_text else "tokens" if any(holds.values()) else "text"
    changed = {name: shrunken(part, holds[name]) for name, part in inner.items()}
    sizes = own_sizes(config, DATA["tokens"] | DATA[here]) | DATA["families"].get(config.model_type, {}) | (further or {})
    return type(config)(**changed | sizes)


def own_sizes(config, sizes):
    "Those of the sizes that this configuration has, and its lists of one entry per block, as long as there are blocks."
    default, aliases = config.to_dict(), getattr(config, "attribute_map", None) or {}
    known = default.keys() | set(aliases) | set(inspect.signature(type(config)).parameters)
    own = {name: size for name, size in sizes.items() if name in known and isinstance(default.get(name), list) == isinstance(size, list)}
    depth = next((name for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if isinstance(default.get(name), int)), None)
    for name, value in default.items():
        if depth and isinstance(value, list) and len(value) == default[depth] and name not in own:
            each = list(dict.fromkeys(value)) if "type" in name else value
            own[name] = [each[i % len(each)] for i in range(own.get(depth, BLOCKS))]
    if isinstance(default.get("sliding_window"), int):
        own["sliding_window"] = 8
    rope = default.get("rope_parameters") or {}
    if "mrope_section" in rope:
        pairs = int(own.get("head_dim", 8) * rope.get("partial_rotary_factor", 1)) // 2
        own["rope_parameters"] = rope | dict(mrope_section=[pairs - 2 * (pairs // 4), pairs // 4, pairs // 4])
    return own


def tiny_model(family, cls, seed=0, dtype=torch.float32):
    "A random model of the class, on the CPU; raises what transformers raises, or `ValueError` if it cannot be made small."
    model_class, config = getattr(transformers, cls), tiny_config(family)
    text = config.get_text_config(decoder=True)
    config = text if type(text) is model_class.config_class else config
    for part in (config, text):
        for name in ("initializer_range", "init_std", "initializer_std"):
            if hasattr(part, name):
                setattr(part, name, 0.2)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with the sizes of tiny_models.json")
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and gains too are other than 0 and 1
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter))
    return model.to(dtype).eval()
