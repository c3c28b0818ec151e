"""Adapters: trained changes of a model's matrices, in the formats of our finetune, PEFT and csm-mlx.

LoRA adds (a @ b).T to a matrix (out, in). DoRA (Liu et al. 2402.09353) then scales the rows to norms m. Our format is
{name.lora_a (in, r), name.lora_b (r, out), name.lora_m (out,)}, or name.weight for a matrix that was trained whole.
PEFT's adapters are for transformers' CSM, with other names and half-split RoPE (csm_layouts).
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import csm  # before mlx
import csm_layouts
import mimi
from csm_tools import checkpoints

import mlx.core as mx  # isort: skip

FILES = (  # ours and csm-mlx's, PEFT's, a checkpoint of csm-mlx
    "adapters.safetensors", "adapter.safetensors", "adapter_model.safetensors", "latest.safetensors",
)  # fmt: skip
PEFT_PARTS = {  # the ending of PEFT's name -> ours; PEFT's shapes
    "lora_A.weight": "lora_a", "lora_B.weight": "lora_b",  # (r, in), (out, r)
    "lora_embedding_A": "lora_b", "lora_embedding_B": "lora_a",  # (r, out), (in, r) of an embedding (out, in)
    "lora_magnitude_vector": "lora_m", "weight": "weight",
}  # fmt: skip
PEFT_NAME = r"base_model\.model\.(.+?)\.(base_layer\.weight|lora_.+|weight)"
MATCH = """import json, re, sys
patterns, names = json.load(sys.stdin)
matches = ((p for p in patterns if re.fullmatch(rf"(.*\\.)?({p})", name)) for name in names)
json.dump([next(match, None) for match in matches], sys.stdout)
"""
PATIENCE = 10  # seconds for it


def adapted(config, weights, adapters):
    """Apply adapters to a model's config and weights {name: array}, where each head is a matrix. Raises ValueError.

    adapters: a folder or Hub repository, or a list of these or of (folder, factor); the factor scales the change.
    Quantized matrices that change are dequantized.
    """
    for adapter in adapters if isinstance(adapters, list) else [adapters]:
        folder, factor = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        settings, file = find_adapter(folder)
        if not settings or not file:
            raise ValueError(f"{folder} has no adapter_config.json and {FILES[0]} or {FILES[2]}")
        try:
            changes = adapter_to_native(asdict(config), settings, mimi.read_weights(file)[0])
            plain = dequantize_weights(config, weights, {name.rpartition(".")[0] for name in changes})
            weights = apply_adapter(plain, changes, factor)
            if "use_default_voice_prompt" in settings:  # if trained without a voice, speak without
                config = replace(config, use_default_voice_prompt=bool(settings["use_default_voice_prompt"]))
        except ValueError as e:
            raise ValueError(f"the adapter {folder}: {e}") from None
        except (TypeError, AttributeError, LookupError, ArithmeticError) as e:
            raise ValueError(f"the adapter {folder}: a field of adapter_config.json is wrong: {e}") from None
    return config, weights


def find_adapter(folder):
    """A folder or Hub repository -> (its adapter_config.json or {}, the path of its weights or None).

    csm-mlx's checkpoints, step_N/latest.safetensors, use the adapter_config.json of the parent folder.
    """
    place = checkpoints.find_or_download(folder, FILES, beside=("adapter_config.json",))
    file = checkpoints.first_match(place, *FILES)
    settings = mimi.read_json(place / "adapter_config.json")
    if not settings and file and file.name == "latest.safetensors":
        settings = mimi.read_json(place.absolute().parent / "adapter_config.json")
    return settings, file


def base_model(folder):
    """The base model that an adapter's config names, as csm.load takes it, or None. Raises ValueError.

    The config's path may be relative to the adapter's folder.
    """
    settings, _ = find_adapter(folder)
    base = settings.get("model") or settings.get("base_model_name_or_path")
    if not isinstance(base, str):
        return None
    if "bnb" in Path(base).name:
        plain = re.sub(r"(-unsloth)?-bnb-\dbit$", "", base)
        raise ValueError(f"the adapter {folder} is for {base}, quantized by bitsandbytes: give --model {plain}")
    beside = Path(folder, base)
    return os.path.normpath(beside) if base not in ("csm-1b", "tiny") and beside.exists() else base


def dequantize_weights(config, weights, names=None):
    """Dequantize the quantized matrices of {name: array}, or only those in `names`."""
    weights, plain = dict(weights), dict(csm.CSM(config).named_modules())
    for name, module in csm.blank_model(config, weights).named_modules():
        if "scales" in module and (names is None or name in names):
            parts = [weights.pop(f"{name}.{part}", None) for part in ("weight", "scales", "biases")]
            n_in = plain[name].weight.shape[1]
            weights[f"{name}.weight"] = mx.dequantize(*parts, **csm.packing(module, n_in))
    return weights


def apply_adapter(weights, changes, factor=1.0):
    """Add `factor` times the changes of adapter_to_native to a model's {name: array}, where each head is a matrix.

    The matrices that change must not be quantized. Raises ValueError if the changes do not fit the model.
    """
    weights, wrong = dict(weights), []
    for name in dict.fromkeys(key.rpartition(".")[0] for key in changes):
        a, b, m, new = (changes.get(f"{name}.{part}") for part in ("lora_a", "lora_b", "lora_m", "weight"))
        old = weights.get(f"{name}.weight", mx.zeros(0))
        if a is not None and b is not None and (b.shape[1], a.shape[0]) == old.shape:
            new = old + (a.astype(mx.float32) @ b.astype(mx.float32)).T
            if m is not None:
                new = new * (m / mx.linalg.norm(new, axis=1))[:, None]
        if new is None or new.shape != old.shape:
            wrong.append(name)
            continue
        if factor != 1:
            new = old + factor * (new - old)
        weights[f"{name}.weight"] = new.astype(old.dtype)
    if wrong:
        raise ValueError(f"it is for another model, or a quantized one: {', '.join(wrong[:4])} does not fit")
    return weights


# ---- any format -> ours -----------------------------------------------------------------------------------------


def adapter_to_native(config, settings, tensors):
    """An adapter of finetune, PEFT or csm-mlx -> {name: array} in our format, multiplied by its scale.

    config: the model's, in our layout. settings: the adapter_config.json of `tensors`. Raises ValueError.
    """
    if "r" in settings or "peft_type" in settings:
        return peft_to_native(config, settings, tensors)
    from_mlx = settings.get("lora_parameters")  # mlx-lm's format
    parameters = from_mlx or settings
    if "scale" in parameters or settings.get("fine_tune_type") == "full":
        scale = parameters.get("scale", 1.0)
    elif {"rank", "alpha"} <= parameters.keys():
        scale = parameters["alpha"] / parameters["rank"]
    else:
        raise ValueError("its adapter_config.json is not of finetune, PEFT or csm-mlx")
    native = {}
    for name, w in tensors.items():
        stem, _, part = name.rpartition(".")
        if stem.endswith((".linear", ".embedding")):
            continue  # the unchanged base matrix
        w = w * scale if part == "lora_b" else w
        if from_mlx and "embeddings" in stem and part in ("lora_a", "lora_b"):
            w, part = w.T, "lora_a" if part == "lora_b" else "lora_b"  # mlx-lm adds a @ b, not its transpose
        if part == "m":
            part = "lora_m"
        native |= split_heads(f"{stem}.{part}" if stem else name, w)
    return native


def split_heads(name, w):
    """Split an audio_head (K - 1, D, V) of our layout into the model's heads, `audio_head.i.weight` (V, D)."""
    if name != "audio_head":
        return {name: w}
    return {f"audio_head.{i}.weight": head.T for i, head in enumerate(w)}


def peft_to_native(config, settings, tensors):
    """adapter_to_native for PEFT's format."""
    native, kind = {}, settings.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"peft_type = {kind}: only PEFT's LORA is supported")
    how = str(settings.get("init_lora_weights")).lower()
    if how.startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(f"init_lora_weights = {how} changes the base too: merge or convert it to a LoRA with PEFT")
    modules = list({m[1] for key in tensors if (m := re.fullmatch(PEFT_NAME, key))})
    ranks = peft_settings(settings, modules, "rank_pattern", "r")
    alphas = peft_settings(settings, modules, "alpha_pattern", "lora_alpha")
    for key, w in tensors.items():
        m = re.fullmatch(PEFT_NAME, key)
        module, ending = m.groups() if m else ("", "")
        if ending == "base_layer.weight" or module.startswith("codec_model."):
            continue  # unchanged: the base matrix, and Mimi, which gets no gradient
        if ending not in PEFT_PARTS:
            raise ValueError(f"{key} is of an unknown kind")
        part = PEFT_PARTS[ending]
        if ending in ("lora_B.weight", "lora_embedding_B"):
            r = ranks[module]
            w = w * (alphas[module] / (math.sqrt(r) if settings.get("use_rslora") else r))
        if module.endswith("codebooks_head") and part != "weight":
            native |= peft_heads(config, w, is_a=ending == "lora_A.weight")
            continue
        table = (csm_layouts.TIED, *csm_layouts.TRANSFORMERS)
        ((name, w),) = csm_layouts.rename({f"{module}.{part}": w}, table).items()
        n_heads = csm_layouts.rope_heads(name, config)
        if n_heads and part != "lora_a":  # rows (out, ...)
            w = csm_layouts.reorder(w.reshape(len(w), -1), n_heads, split=False).reshape(w.shape)
        new = split_heads(name, w.T if ending in ("lora_A.weight", "lora_B.weight") else w)
        for name in new.keys() & native.keys():
            if new[name].shape != native[name].shape or not mx.array_equal(new[name], native[name]):
                raise ValueError(f"it has two different {name}, which a CSM's backbone and decoder share")
        native |= new
    return native


def peft_settings(settings, modules, field, default):
    """{module: its rank or alpha}, by the first of the field's patterns that matches its name, or the default.

    The patterns are regular expressions from a file, and some never end: another process tries them.
    """
    patterns = settings.get(field) or {}
    if not patterns:
        return dict.fromkeys(modules, settings[default])
    command, told = [sys.executable, "-I", "-c", MATCH], json.dumps([[*patterns.keys()], modules])
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{field} has regular expressions that may take for ever") from None
    if done.returncode:
        raise ValueError(f"{field}: {done.stderr.strip().rpartition(chr(10))[2]:.200}")
    return {module: patterns.get(match, settings[default]) for module, match in zip(modules, json.loads(done.stdout))}


def peft_heads(config, w, is_a):
    """Split lora_A or lora_B of PEFT's target_parameters, which joins all heads, into the heads' lora_a or lora_b.

    A stacks the heads' rows, ((K - 1) r, ...). B interleaves the heads' columns, (out, r (K - 1)). PEFT's versions
    differ in which of the two is the input side, so the sizes decide.
    """
    n = config["audio_num_codebooks"] - 1
    heads = w.reshape(n, -1, w.shape[1]) if is_a else w.reshape(len(w), -1, n).transpose(2, 0, 1)
    part = "lora_a" if w.shape[int(is_a)] == config["decoder"]["dim"] else "lora_b"
    return {f"audio_head.{i}.{part}": x.T if (part == "lora_a") == is_a else x for i, x in enumerate(heads)}


# ---- ours -> PEFT -----------------------------------------------------------------------------------------------


def adapter_to_peft(config, settings, tensors):
    """Our adapter -> PEFT's (adapter_config.json, tensors of adapter_model.safetensors) for transformers' CSM.

    config: the model's, in our layout. A LoRA of audio_head uses target_parameters, which needs PEFT 0.18 or later.
    """
    theirs, modules, saved, heads = {}, set(), set(), {}
    endings = {ours: ending for ending, ours in PEFT_PARTS.items() if "embedding" not in ending}
    for key, w in tensors.items():
        stem, _, part = key.rpartition(".")
        if stem.startswith("audio_head."):
            heads[int(stem.split(".")[1]), part] = w
            continue
        w = w.T if part in ("lora_a", "lora_b") else w
        if part != "lora_a" and (n_heads := csm_layouts.rope_heads(key, config)):
            w = csm_layouts.reorder(w.reshape(len(w), -1), n_heads, split=True).reshape(w.shape)
        ((name, w),) = csm_layouts.rename({f"{stem}.": w}, csm_layouts.TRANSFORMERS, undo=True).items()
        (saved if part == "weight" else modules).add(name[:-1])
        theirs[f"base_model.model.{name}{endings[part]}"] = w
    if heads:
        n = config["audio_num_codebooks"] - 1
        if heads.keys() != {(i, part) for i in range(n) for part in ("lora_a", "lora_b")}:
            raise ValueError("PEFT has no format for an audio_head that was trained in part, or by DoRA")
        stem = "base_model.model.depth_decoder.codebooks_head"
        theirs[f"{stem}.lora_A.weight"] = mx.concatenate([heads[i, "lora_b"] for i in range(n)])
        both = mx.stack([heads[i, "lora_a"] for i in range(n)], axis=2)  # (D, r, K - 1)
        theirs[f"{stem}.lora_B.weight"] = both.reshape(len(both), -1)
    tied = "backbone_model.embed_tokens.embed_audio_tokens", "depth_decoder.model.embed_tokens"
    if tied[1] in saved:  # transformers has the audio embedding twice
        saved.add(tied[0])
        theirs[f"base_model.model.{tied[0]}.weight"] = theirs[f"base_model.model.{tied[1]}.weight"]
    return {
        "peft_type": "LORA", "base_model_name_or_path": settings.get("model"), "inference_mode": True, "bias": "none",
        "r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": 0.0, "target_modules": sorted(modules),
        "target_parameters": ["depth_decoder.codebooks_head.weight"] if heads else None,
        "modules_to_save": sorted(saved) or None, "use_dora": any(key.endswith("lora_m") for key in tensors),
    }, {name: mx.contiguous(w) for name, w in theirs.items()}  # fmt: skip
