"""Convert every published layout of a CSM or Mimi checkpoint to ours and back; read .pt files; save models.

Layouts, recognized by their key names:
  sesame        sesame/csm-1b, MisoTTS, Marvis' .pt files: torchtune names (attn, mlp.w1, sa_norm.scale)
  mlx           senstella/csm-1b-mlx, the MLX community: the same tensors under MLX names. Our native layout
  transformers  CsmForConditionalGeneration: half-split RoPE, the tied audio embedding stored once, Mimi inside
  Mimi          kyutai's (interleaved RoPE, q|k|v fused), transformers' (half-split RoPE), and ours, for mimi.py

RoPE rotates pairs of rows of q and k: rows (2i, 2i + 1) of a head if interleaved, (i, i + head_dim / 2) if half-split.
Reordering rows converts one to the other. Sizes come from the tensors' shapes, since a config may lack or contradict
them. What shapes do not show (heads, RoPE) comes from the config if it agrees with them, else from a known flavor.

Arrays are lazy. The model checks names and shapes, so this file does not: it passes on a tensor that it does not know,
and the model refuses it. `weights` is {name: mx.array} everywhere. `csm_1b` is csm.CSMConfig's defaults as a dict, the
sizes of CSM-1B; they replace what a config leaves out.
"""

import glob
import json
import logging
import math
import mmap
import os
import pickle
import platform
import re
import secrets
import shutil
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

log = logging.getLogger("csm")

# ---- tables -----------------------------------------------------------------------------------------------------
# fmt: off

# Pieces of names in that layout -> ours, replaced row by row. To convert back, apply the rows from last to first.
SESAME = (
    (".attn.output_proj.", ".attn.o_proj."), (".attn.", ".self_attn."),
    (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
    (".sa_norm.scale", ".input_layernorm.weight"), (".mlp_norm.scale", ".post_attention_layernorm.weight"),
    (".norm.scale", ".norm.weight"),
)
TRANSFORMERS = (
    ("depth_decoder.codebooks_head.weight", "audio_head"), ("depth_decoder.model.embed_tokens.", "audio_embeddings."),
    ("depth_decoder.model.inputs_embeds_projector.", "projection."), ("depth_decoder.model.", "decoder."),
    ("backbone_model.", "backbone."), ("embed_text_tokens.", "text_embeddings."), ("lm_head.", "codebook0_head."),
)
MIMI_TRANSFORMERS = (  # mimi_table puts more rows before these
    (".embed_sum", ".embedding_sum"), (".codebook.initialized", ".codebook._initialized"),
    (".codebook.", "._codebook."), ("_quantizer.layers.", "_quantizer.vq.layers."),
    ("semantic_residual_vector_quantizer.", "rvq_first."), ("acoustic_residual_vector_quantizer.", "rvq_rest."),
    (".self_attn_layer_scale.", ".layer_scale_1."), (".mlp_layer_scale.", ".layer_scale_2."),
    (".mlp.fc1.", ".linear1."), (".mlp.fc2.", ".linear2."),
    (".input_layernorm.", ".norm1."), (".post_attention_layernorm.", ".norm2."),
    (".o_proj.", ".out_proj."), ("_transformer.", "_transformer.transformer."),
    ("downsample.conv.", "downsample.conv.conv."), ("upsample.conv.", "upsample.convtr.convtr."),
    (".convtr.", ".convtr.convtr."), (".conv.", ".conv.conv."),
    ("encoder.layers.", "encoder.model."), ("decoder.layers.", "decoder.model."),
)
KYUTAI = (  # regular expressions: kyutai's names of Mimi's tensors -> ours
    (r"^(en|de)coder\.model\.", r"\1coder."), (r"\.conv\.conv\.(conv\.)?|\.convtr\.convtr\.(convtr\.)?", "."),
    (r"_transformer\.transformer\.", "_transformer."), (r"\.self_attn\.in_proj_weight$", ".in_proj"),
    (r"\.self_attn\.out_proj\.weight$", ".out_proj"), (r"\.(linear[12]|input_proj|output_proj)\.weight$", r".\1"),
    (r"\.layer_scale_([12])\.scale$", r".scale\1"), (r"^quantizer\.rvq_(first|rest)\.", r"\1."),
)
# The audio embedding: a file has one of these, or both, which are then equal.
TIED = ("backbone_model.embed_tokens.embed_audio_tokens.", "depth_decoder.model.embed_tokens.")
SPELLINGS = (  # newer names of moshi -> names of the published checkpoint
    (".in_projs.0.weight", ".in_proj_weight"), (".in_proj.weight", ".in_proj_weight"), (".out_projs.0.", ".out_proj."),
)
PREFIXES = r"((model|module|_orig_mod)\.)*"  # before every name, by mlx-audio, PyTorch's DataParallel, torch.compile
# Buffers that some files contain; loaders compute them.
BUFFERS = r"(.*\.)?((original_)?inv_freq|audio_tokens_offsets|\w+_causal_mask|pos_embeddings\.(theta|cache))"

SIZES = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
FLAVORS = {  # the SIZES of a backbone or depth decoder; function `flavors` adds CSM-1B's, llama-1B and llama-100M
    "llama-8B": (32, 4096, 32, 8, 128, 14336), "llama-300M": (8, 1536, 24, 6, 64, 6912),  # MisoTTS
    "llama-250M": (6, 1536, 12, 3, 128, 8192), "llama-60M": (4, 1024, 8, 2, 128, 4096),  # Marvis
}
KINDS = {  # a backbone, or size of the text vocabulary, that identifies a model -> settings that its config may lack
    FLAVORS["llama-8B"]: {"speaker_prefix_space": True},  # MisoTTS
    49_152: {"voice_match": True, "text_tokenizer": "HuggingFaceTB/SmolLM2-135M"},  # Marvis has SmolLM2's vocabulary
}
PART_FIELDS = (  # native field, transformers' field
    ("n_layers", "num_hidden_layers"), ("dim", "hidden_size"), ("n_heads", "num_attention_heads"),
    ("n_kv_heads", "num_key_value_heads"), ("head_dim", "head_dim"), ("ffn_dim", "intermediate_size"),
    ("norm_eps", "rms_norm_eps"), ("max_positions", "max_position_embeddings"),
)
PART_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
CARRIED = (
    r"max_part_characters|sampling|speaker_prefix_space|text_tokenizer|use_default_voice_prompt|voice_match"
    r"|quantization|\w+_token_id"
)
MIMI_FIELDS = (  # native field, transformers' field; shapes do not show the first five
    ("n_heads", "num_attention_heads"), ("context", "sliding_window"), ("norm_eps", "norm_eps"),
    ("dilation_base", "dilation_growth_rate"), ("sample_rate", "sampling_rate"),
    *((field, field) for field in ("kernel_size", "residual_kernel_size", "last_kernel_size", "compress")),
    ("codebook_size", "codebook_size"), ("codebook_dim", "codebook_dim"), ("n_filters", "num_filters"),
    ("ratios", "upsampling_ratios"), ("n_residual_layers", "num_residual_layers"), ("dim", "hidden_size"),
    ("n_layers", "num_hidden_layers"), ("ffn_dim", "intermediate_size"), ("n_codebooks", "num_quantizers"),
    ("n_semantic", "num_semantic_quantizers"),
)
MIMI_FIXED = {"hidden_act": "gelu", "use_causal_conv": True, "pad_mode": "constant", "use_conv_shortcut": False,
              "trim_right_ratio": 1.0, "audio_channels": 1, "attention_bias": False}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- for item in message["content"] -%}
        {%- if item["type"] == "text" -%}
            {{- bos_token + "[" + message["role"] + "]SPACE" + item["text"] + eos_token -}}
        {%- elif item["type"] == "audio" -%}
            {{- "<|AUDIO|><|audio_eos|>" -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
"""  # a turn is its text between the tokenizer's marks, then its audio and an end frame
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# Files that hold a Mimi alone, in our layout or kyutai's; and files that may contain one: a Mimi in transformers'
# layout, or a whole CSM with a Mimi inside.
MIMI_FILES = ("mimi.safetensors", "tokenizer-*.safetensors")
CONTAINER_FILES = ("model.safetensors", "*.index.json", "*.safetensors")
ADAPTER_FILES = "adapter*.safetensors"
DEFAULT_MODEL = ("senstella/csm-1b-mlx", "ckpt.safetensors")
DEFAULT_MIMI = ("kyutai/moshiko-pytorch-bf16", "tokenizer-e351c8d8-checkpoint125.safetensors")
DEFAULT_TOKENIZER = "unsloth/Llama-3.2-1B"
DEFAULT_PROMPTS = "mlx-community/csm-1b"
DEFAULT_VOICES = ("conversational_a", "conversational_b", *(f"read_speech_{x}" for x in "abcd"))
TRANSCRIPTS = {  # of the clips that Sesame published beside CSM-1B, from its run_csm.py
    "conversational_a": "like revising for an exam I'd have to try and like keep up the momentum because I'd start "
    "really early I'd be like okay I'm gonna start revising now and then like you're revising for ages and then I just "
    "like start losing steam I didn't do that for the exam we had recently to be fair that was a more of a last minute "
    "scenario but like yeah I'm trying to like yeah I noticed this yesterday that like Mondays I sort of start the day "
    "with this not like a panic but like a",
    "conversational_b": "like a super Mario level. Like it's very like high detail. And like, once you get into the "
    "park, it just like, everything looks like a computer game and they have all these, like, you know, if, if there's "
    "like a, you know, like in a Mario game, they will have like a question block. And if you like, you know, punch "
    "it, a coin will come out. So like everyone, when they come into the park, they get like this little bracelet and "
    "then you can go punching question blocks around.",
}
# fmt: on

# ---- configs ----------------------------------------------------------------------------------------------------


def refuse_other(config, fixed):
    for field, value in fixed.items():
        if config.get(field) not in (None, value):
            raise ValueError(f"{field} = {config[field]!r} is not supported, only {value!r}")


def refuse_impossible(config, sizes):
    for field in sizes:
        if field in config and not (type(config[field]) is int and 0 < config[field] < 2**31):
            raise ValueError(f"config.json says {field} = {config[field]!r:.40}")


def read_rope(config, llama3):
    """transformers 4's rope_theta and rope_scaling, or 5's rope_parameters -> our two fields, or those it has.

    Llama 3's scaling depends only on the ratios of the original length to the factors. transformers and Sesame write
    different lengths; scale the factors so that the length is always that of `llama3`, CSM-1B's.
    """
    rope = config | (config.get("rope_parameters") or config.get("rope_scaling") or {})
    fields = {"rope_theta": float(rope["rope_theta"])} if rope.get("rope_theta") else {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "llama3" and llama3.keys() <= rope.keys():
        length = "original_max_position_embeddings"
        times = llama3[length] / rope[length]
        scaled = {field: rope[field] * times for field in ("low_freq_factor", "high_freq_factor")}
        return fields | {"rope_scaling": llama3 | scaled | {"factor": rope["factor"]}}
    if kind not in (None, "default"):
        raise ValueError(f"rope_type {kind!r} is not supported, only default and llama3 with {', '.join(llama3)}")
    return fields | ({"rope_scaling": None} if kind or fields else {})


def read_part(config, part, csm_1b):
    """The fields of the backbone or the decoder that a config has, under our names."""
    if isinstance(config.get(part), dict):
        refuse_impossible(config[part], SIZES)
        return {field: value for field, value in csm_1b[part].items() if field not in SIZES} | config[part]
    config = config if part == "backbone" else config.get("depth_decoder_config") or {}
    refuse_other(config, PART_FIXED)
    fields = {ours: config[theirs] for ours, theirs in PART_FIELDS if config.get(theirs) is not None}
    refuse_impossible(fields, SIZES)
    return fields | read_rope(config, csm_1b[part]["rope_scaling"])


def flavors(csm_1b):
    """{name: all fields of a backbone or decoder}"""
    other = {name: csm_1b["backbone"] | dict(zip(SIZES, sizes)) for name, sizes in FLAVORS.items()}
    return {"llama-1B": csm_1b["backbone"], "llama-100M": csm_1b["decoder"], **other}


def n_rows(weights, name):
    if name not in weights:
        raise ValueError(f"the checkpoint does not fit the model: missing {name}")
    return weights[name].shape[0]


def measure(weights, part):
    """The sizes of a backbone or decoder, from the shapes of its tensors, quantized or not.

    n_layers, dim, ffn_dim; and the number of rows of q and k, which is heads * head_dim.
    """

    def rows(name):
        return n_rows(weights, f"{part}.{name}.weight")

    layers = {m[1] for name in weights if (m := re.match(rf"{part}\.layers\.(\d+)\.", name))}
    first = {x: rows(f"layers.0.{name}_proj") for x, name in (("q", "self_attn.q"), ("k", "self_attn.k"))}
    return first | {"n_layers": len(layers), "dim": rows("norm"), "ffn_dim": rows("layers.0.mlp.gate_proj")}


def heads(fields, found):
    """The heads in `fields` of a config, or None if they do not fit the rows of q and k that were found."""
    head_dim = fields.get("head_dim") or ("n_heads" in fields and found["q"] // fields["n_heads"])
    if not head_dim or found["q"] % head_dim or found["k"] % head_dim:
        return None
    made = {"n_heads": found["q"] // head_dim, "n_kv_heads": found["k"] // head_dim, "head_dim": head_dim}
    return made if all(fields.get(field) in (None, n) for field, n in made.items()) else None


def part_config(config, weights, part, csm_1b):
    """The native fields of the backbone or decoder, and the flavor that supplied missing ones, or None."""
    found, known = measure(weights, part), flavors(csm_1b)
    sizes = {field: n for field, n in found.items() if field not in "qk"}
    given, named = read_part(config, part, csm_1b), config.get(f"{part}_flavor")
    told = heads(given, found)
    agrees = told and all(given.get(field) in (None, n) for field, n in sizes.items())
    fitting = [name for name, fields in known.items() if heads(fields, found) and fields | sizes == fields]
    if fitting and not (agrees and "rope_theta" in given):
        name = named if named in fitting else fitting[0]
        return known[name] | (given | told if agrees else {}), None if name == named else name
    if not told:
        raise ValueError(
            f"config.json does not say what heads the {part} has, and no known model is like it: {found['n_layers']} "
            f"layers of {found['dim']} with MLPs of {found['ffn_dim']}, q of {found['q']} and k of {found['k']} rows "
            f"(known: {', '.join(known)})"
        )
    rest = {field: value for field, value in csm_1b[part].items() if field not in SIZES}
    return rest | {"rope_scaling": None} | given | sizes | told, None


def csm_config(config, weights, csm_1b):
    """The config of any layout, or {}, and the weights under native names -> the native config."""
    parts = {part: part_config(config, weights, part, csm_1b) for part in ("backbone", "decoder")}
    if filled := [name for _, name in parts.values() if name]:
        level = logging.WARNING if config else logging.INFO
        log.log(level, "sizes come from the tensors; heads and RoPE are those of %s", " and ".join(filled))
    native = {"model_type": "csm", "layout": "native", **{part: fields for part, (fields, _) in parts.items()}}
    rows = [n_rows(weights, f"{x}.weight") for x in ("text_embeddings", "codebook0_head", "audio_embeddings")]
    native |= {"text_vocab_size": rows[0], "audio_vocab_size": rows[1], "audio_num_codebooks": rows[2] // rows[1]}
    for told in (tuple(native["backbone"][field] for field in SIZES), native["text_vocab_size"]):
        native |= KINDS.get(told, {})
    return native | {field: value for field, value in config.items() if re.fullmatch(CARRIED, field)}


def sesame_config(config, csm_1b):
    """The native config -> Sesame's five fields, or our own fields if no flavor has these sizes."""
    rest = {field: value for field, value in config.items() if field not in ("layout", "model_type")}
    parts = {part: rest.pop(part) for part in ("backbone", "decoder")}
    names = {}
    for part, fields in parts.items():
        same = [name for name, f in flavors(csm_1b).items() if f | {"max_positions": fields["max_positions"]} == fields]
        names |= {f"{part}_flavor": name for name in same}
    return (names if len(names) == 2 else {"model_type": "csm", **parts}) | rest


def write_part(part):
    scaling = part["rope_scaling"] and {**part["rope_scaling"], "rope_type": "llama3"}
    # transformers requires an original length below the maximum
    while scaling and scaling["original_max_position_embeddings"] >= part["max_positions"]:
        scaling |= {f: scaling[f] / 2 for f in ("low_freq_factor", "high_freq_factor")}
        scaling["original_max_position_embeddings"] //= 2
    rope = {"rope_theta": part["rope_theta"], "rope_scaling": scaling}  # transformers 4's fields; 5 reads them, too
    return PART_FIXED | rope | {theirs: part[ours] for ours, theirs in PART_FIELDS}


def transformers_config(config, mimi, dtype):
    """The native configs of a CSM and its Mimi, with all fields -> that of CsmForConditionalGeneration."""
    sizes = {"vocab_size": config["audio_vocab_size"], "num_codebooks": config["audio_num_codebooks"]}
    depth = write_part(config["decoder"]) | sizes
    depth |= {"model_type": "csm_depth_decoder_model", "backbone_hidden_size": config["backbone"]["dim"]}
    depth["max_position_embeddings"] = sizes["num_codebooks"] + 1
    fields = {"model_type": "csm", "architectures": ["CsmForConditionalGeneration"], "dtype": dtype}
    fields |= {"tie_codebooks_embeddings": True, "codebook_pad_token_id": sizes["vocab_size"] - 1}
    fields |= {field: value for field, value in config.items() if re.fullmatch(CARRIED, field)}
    parts = {"depth_decoder_config": depth, "codec_config": transformers_mimi_config(mimi)}
    return fields | write_part(config["backbone"]) | sizes | {"text_vocab_size": config["text_vocab_size"]} | parts


def transformers_mimi_config(config):
    """Mimi's native config, with all fields -> transformers' MimiConfig."""
    rate = config["sample_rate"] / math.prod(config["ratios"]) / 2
    return MIMI_FIXED | {theirs: config[ours] for ours, theirs in MIMI_FIELDS} | {
        "model_type": "mimi", "rope_theta": config["rope_theta"], "num_key_value_heads": config["n_heads"],
        "head_dim": config["dim"] // config["n_heads"], "upsample_groups": config["dim"], "frame_rate": rate,
        "_frame_rate": rate, "vector_quantization_hidden_dimension": config["codebook_dim"],
    }  # fmt: skip


# ---- weights ----------------------------------------------------------------------------------------------------


def rename(weights, table, undo=False):
    for old, new in [(ours, theirs) for theirs, ours in reversed(table)] if undo else table:
        weights = {name.replace(old, new): w for name, w in weights.items()}
    return weights


def bare(weights):
    """Remove the prefixes that some files put before every name, and buffers."""
    weights = {re.sub(f"^{PREFIXES}", "", name): w for name, w in weights.items()}
    return {name: w for name, w in weights.items() if not re.fullmatch(BUFFERS, name)}


def reorder(w, heads, split):
    """Rows of q or k (H * head_dim, D): from interleaved to half-split if `split`, else back."""
    return w.reshape(heads, *((-1, 2) if split else (2, -1)), w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def rope_heads(name, config):
    """The number of heads in a native q_proj or k_proj, whose rows RoPE rotates; None for other names."""
    if m := re.match(r"(backbone|decoder)\.layers\.\d+\.self_attn\.([qk])_proj\.", name):
        return config[m[1]]["n_heads" if m[2] == "q" else "n_kv_heads"]


def reorder_csm(weights, config, split):
    for name, w in weights.items():
        heads = rope_heads(name, config)
        if heads and w.ndim == 2 and w.shape[0] % (2 * heads) == 0:  # else the model refuses it
            weights[name] = reorder(w, heads, split)
    return weights


def csm_to_native(config, weights, csm_1b):
    """A CSM in any layout -> config, weights, and the Mimi inside, (config, weights) or None; all in ours.

    config: config.json as a dict, {} if there is none. Raises ValueError if the sizes are ambiguous, or if the config
    requires something that the model does not support.
    """
    weights = bare(weights)
    if any(".absmax" in name or "bitsandbytes" in name for name in weights):
        raise ValueError("bitsandbytes quantized this checkpoint: give the plain model, such as unsloth/csm-1b")
    inside = {name: w for name, w in weights.items() if name.startswith("codec_model.")}
    mimi = mimi_to_native(config, inside) if inside else None
    weights = {name: w for name, w in weights.items() if name not in inside}
    theirs = any(name.startswith("backbone_model.") for name in weights)
    if theirs:
        one, other = (weights.get(f"{stem}weight") for stem in TIED)
        untied = not config.get("tie_codebooks_embeddings", True) and one is not None and other is not None
        if untied and not mx.array_equal(one, other).item():
            raise ValueError("tie_codebooks_embeddings = False is not supported: two different audio embeddings")
        weights = rename(weights, (TIED, *TRANSFORMERS))
    elif any(".attn." in name for name in weights):
        weights = rename(weights, SESAME)
    if not any(name.startswith("backbone.") for name in weights):
        raise ValueError(f"not a checkpoint of a known layout; it has {len(weights)} keys: {', '.join([*weights][:4])}")
    config = csm_config(config, weights, csm_1b)
    return config, reorder_csm(weights, config, split=False) if theirs else weights, mimi


def to_sesame(config, weights, csm_1b):
    """A CSM in our layout, its config with all fields -> config, weights in Sesame's layout."""
    return sesame_config(config, csm_1b), rename(weights, SESAME, undo=True)


def to_transformers(config, weights, mimi_config, mimi_weights):
    """A CSM in our layout and its Mimi, their configs with all fields -> the files of transformers' layout.

    {file name: dict for JSON, text, or (weights, metadata)}, as write_folder takes them, AutoProcessor's included; the
    tokenizer's files go beside them. config and weights None: the Mimi alone.
    """
    codec, form = mimi_to_transformers(mimi_config, mimi_weights), {"format": "pt"}
    if config is None:
        return {"config.json": transformers_mimi_config(mimi_config), "model.safetensors": (codec, form)}
    dtype = str(weights["codebook0_head.weight"].dtype).removeprefix("mlx.core.")
    weights = rename(reorder_csm(dict(weights), config, split=True), TRANSFORMERS, undo=True)
    weights |= {f"codec_model.{name}": w for name, w in codec.items()}
    return {
        "config.json": transformers_config(config, mimi_config, dtype),
        "model.safetensors": (weights, form),
        "preprocessor_config.json": {
            "feature_extractor_type": "EncodecFeatureExtractor", "processor_class": "CsmProcessor",
            "sampling_rate": mimi_config["sample_rate"], "feature_size": 1, "padding_value": 0.0,
            "padding_side": "right", "return_attention_mask": True,
        },
        "chat_template.jinja": CHAT_TEMPLATE.replace("SPACE", " " if config.get("speaker_prefix_space") else ""),
    }  # fmt: skip


def to_transformers_tokenizer(tokenizer, settings, bos, eos):
    """tokenizer.json and tokenizer_config.json -> both as CsmProcessor needs them, and their ids for config.json.

    bos, eos: the ids before and after a text, or None. CsmProcessor has two tokens for audio. As in sesame/csm-1b they
    replace the first reserved tokens of the Llama tokenizer; a tokenizer without reserved tokens gets none.
    """
    tokens = {token["content"]: token for token in tokenizer.get("added_tokens", ())}
    ids = {"bos_token_id": bos, "eos_token_id": None}  # in CsmConfig it means the end of the audio
    for i, (field, name) in enumerate((("audio_token", "<|AUDIO|>"), ("audio_eos_token", "<|audio_eos|>"))):
        if token := tokens.get(name) or tokens.get(f"<|reserved_special_token_{i}|>"):
            token["content"], ids[f"{field}_id"] = name, token["id"]
    ids["pad_token_id"] = ids.get("audio_token_id")
    names = {token["id"]: token["content"] for token in tokens.values()}
    marks = {"bos_token": names.get(bos), "eos_token": names.get(eos)}
    if not settings.get("pad_token"):  # CsmProcessor pads; Llama's own settings name no token for it
        padding = [name for name in ("<|finetune_right_pad_id|>", "<pad>") if name in names.values()]
        marks["pad_token"] = padding[0] if padding else marks["eos_token"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings | {k: v for k, v in marks.items() if v}
    settings.pop("added_tokens_decoder", None)  # repeats added_tokens, under the old names
    if not {bos, eos} <= names.keys():
        return tokenizer, settings, ids
    text, other = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    before, after = ({"SpecialToken": {"id": names[i], "type_id": 0}} for i in (bos, eos))
    special = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (bos, eos)}
    template = {"single": [before, text, after], "pair": [before, text, other, after], "special_tokens": special}
    return tokenizer | {"post_processor": {"type": "TemplateProcessing"} | template}, settings, ids


def mimi_table(layers):
    """MIMI_TRANSFORMERS for a decoder whose transposed convolutions have these numbers."""
    stems = [f"decoder.layers.{i}." for i in layers]
    return *((f"{stem}conv.", f"{stem}convtr.") for stem in stems), *MIMI_TRANSFORMERS


def numbers(weights, pattern):
    return sorted({int(m[1]) for name in weights if (m := re.match(pattern, name))})


def mimi_to_native(config, weights):
    """A Mimi in transformers' layout or kyutai's, perhaps inside a CSM -> config, weights in ours.

    config: transformers' MimiConfig, the config.json of a whole CSM, our own fields, or {}; sizes come from the shapes.
    Raises ValueError if these are not the tensors of a Mimi, or if the config requires something unsupported.
    """
    config = config.get("codec_config") or config
    weights = {name.removeprefix("codec_model."): w for name, w in rename(bare(weights), SPELLINGS).items()}
    ours = [f for f, _ in MIMI_FIELDS] + ["rope_theta"] if "n_filters" in config else []
    native = {f: config[f] for f in ours if f in config}
    if numbers(weights, r"decoder\.layers\.(\d+)\."):
        native, weights = from_transformers_mimi(config, weights)
    sizes = mimi_sizes(weights)
    return native | sizes, from_kyutai(sizes, weights)


def from_transformers_mimi(config, weights):
    """transformers' layout -> the config's fields that shapes do not show, and the weights in kyutai's layout."""
    layers = numbers(weights, r"decoder\.layers\.(\d+)\.conv\.")[1:-1]  # the first and the last are not transposed
    rope = config | (config.get("rope_parameters") or {})
    refuse_other(rope, MIMI_FIXED | {"rope_scaling": None, "rope_type": "default"})
    native = {ours: config[theirs] for ours, theirs in MIMI_FIELDS[:5] if config.get(theirs) is not None}
    native |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    refuse_impossible(native, ("n_heads",))
    weights, heads = rename(weights, mimi_table(layers)), native.setdefault("n_heads", 8)  # transformers' default
    for stem in [name.removesuffix("q_proj.weight") for name in weights if name.endswith(".q_proj.weight")]:
        parts = [weights.get(f"{stem}{x}_proj.weight") for x in "qkv"]
        # The model refuses parts that are missing or of another shape.
        if all(w is not None and w.ndim == 2 and w.shape == (w.shape[1], w.shape[1]) for w in parts):
            for x in "qkv":
                del weights[f"{stem}{x}_proj.weight"]
            q, k = (reorder(w, heads, split=False) for w in parts[:2])
            weights[f"{stem}in_proj_weight"] = mx.concatenate([q, k, parts[2]])
    return native, weights


def mimi_sizes(weights):
    """The sizes of a Mimi, from the shapes of kyutai's layout, as fields of its config. Raises ValueError."""

    def shapes(pattern):  # of the tensors that match, ordered by the number in their names
        found = ((re.fullmatch(pattern, k), w.shape) for k, w in weights.items())
        return [shape for _, shape in sorted((int(m[1]), shape) for m, shape in found if m)]

    convs = shapes(r"encoder\.model\.(\d+)\.conv\.conv\.weight")  # (out, in, kernel)
    residual = shapes(r"encoder\.model\.(\d+)\.block\.1\.conv\.conv\.weight")
    convtrs = shapes(r"decoder\.model\.(\d+)\.convtr\.convtr\.weight")
    linears = shapes(r"encoder_transformer\.transformer\.layers\.(\d+)\.linear1\.weight")
    first, rest = (
        shapes(rf"quantizer\.rvq_{part}\.vq\.layers\.(\d+)\._codebook\.embedding_sum") for part in ("first", "rest")
    )
    if not (convs and residual and convtrs and linears and first):
        raise ValueError(f"not a Mimi: the checkpoint has {', '.join(sorted(weights)[:3]) or 'nothing'} ...")
    return {
        "n_filters": convs[0][0], "ratios": [kernel // 2 for _, _, kernel in convtrs], "kernel_size": convs[0][2],
        "residual_kernel_size": residual[0][2], "last_kernel_size": convs[-1][2],
        "compress": residual[0][1] // residual[0][0], "n_residual_layers": len(residual) // len(convtrs),
        "dim": linears[0][1], "n_layers": len(linears), "ffn_dim": linears[0][0], "codebook_size": first[0][0],
        "codebook_dim": first[0][1], "n_codebooks": len(first) + len(rest), "n_semantic": len(first),
    }  # fmt: skip


def strides(config):
    """{our name of a strided convolution: its stride, negative if it is transposed}"""
    step = 2 + config["n_residual_layers"]
    down = {f"encoder.{step * (i + 1)}": r for i, r in enumerate(reversed(config["ratios"]))}
    return down | {f"decoder.{2 + step * i}": -r for i, r in enumerate(config["ratios"])} | {"downsample": 2}


def from_kyutai(config, weights):
    """kyutai's names and shapes -> ours: matrices as mimi.py multiplies them, all codebooks in one array."""
    stride, books, out = strides(config), {}, {}
    for name, w in weights.items():
        key = name
        for pattern, new in KYUTAI:
            key = re.sub(pattern, new, key)
        stem, kind = key.rpartition(".")[::2]
        s = stride.get(stem, 1)
        if m := re.fullmatch(r"(first|rest)\.vq\.layers\.(\d+)\._codebook\.(\w+)", key):
            if m[3] != "_initialized":
                books.setdefault(f"{m[1]}.{m[3]}", {})[int(m[2])] = w
            continue
        if kind == "bias" and s < 0:
            w = mx.tile(w, -s)
        elif w.ndim == 3 and stem == "upsample":  # (D, 1, 4) -> (taps, 2, D)
            w = w[:, 0].T.reshape(2, 2, -1)[::-1]
        elif w.ndim == 3 and s < 0:  # (C, O, kernel) -> (taps, u * O, C), the newest input's tap last
            C, O, _ = w.shape
            w = w.transpose(2, 1, 0).reshape(-1, -s * O, C)[::-1]
        elif w.ndim == 3 and kind.endswith("proj"):  # a convolution of kernel 1
            w = w[..., 0]
        elif w.ndim == 3:  # (O, C, kernel) -> (taps, O, s * C)
            O, C, _ = w.shape
            w = w.reshape(O, C, -1, s).transpose(2, 0, 3, 1).reshape(-1, O, s * C)
        out[key] = w
    for key, each in books.items():
        if sorted(each) != list(range(len(each))) or len({w.shape for w in each.values()}) > 1:
            raise ValueError(f"the checkpoint does not fit the model: {key} exists for codebooks {sorted(each)}")
        out[key] = mx.stack([each[i] for i in range(len(each))])
    return out


def to_kyutai(config, weights):
    """The inverse. config: with all fields."""
    stride, out = strides(config), {}

    def kernel(w, s):  # (taps, O, s * C) -> (O, C, kernel)
        taps, O, _ = w.shape
        return w.reshape(taps, O, s, -1).transpose(1, 3, 0, 2).flatten(2)

    for key, w in weights.items():
        stem, kind = key.rpartition(".")[::2]
        s = stride.get(stem, 1)
        conv = "convtr.convtr" if s < 0 else "conv.conv"
        if stem in ("first", "rest") and not kind.endswith("proj"):
            for i, book in enumerate(w):
                out[f"quantizer.rvq_{stem}.vq.layers.{i}._codebook.{kind}"] = book
                out[f"quantizer.rvq_{stem}.vq.layers.{i}._codebook._initialized"] = mx.ones((1,), book.dtype)
        elif stem in ("first", "rest"):
            out[f"quantizer.rvq_{stem}.{kind}.weight"] = w[..., None]
        elif stem == "upsample":
            out["upsample.convtr.convtr.convtr.weight"] = w[::-1].reshape(4, -1).T[:, None]
        elif stem == "downsample":
            out["downsample.conv.conv.conv.weight"] = kernel(w, s)
        elif "_transformer." in key:
            names = {"in_proj": "self_attn.in_proj_weight", "out_proj": "self_attn.out_proj.weight",
                     "linear1": "linear1.weight", "linear2": "linear2.weight",
                     "scale1": "layer_scale_1.scale", "scale2": "layer_scale_2.scale"}  # fmt: skip
            out[f"{stem}.{names.get(kind, kind)}".replace("_transformer.", "_transformer.transformer.")] = w
        else:
            if kind == "bias" and s < 0:
                w = w[: len(w) // -s]
            elif s < 0:
                taps, _, C = w.shape
                w = w[::-1].reshape(taps * -s, -1, C).transpose(2, 1, 0)
            elif kind == "weight":
                w = kernel(w, s)
            part, rest = stem.split(".", 1)
            out[f"{part}.model.{rest}.{conv}.{kind}"] = w
    return out


def mimi_to_transformers(config, weights):
    """Our layout -> transformers' names, shapes and RoPE."""
    weights, heads = to_kyutai(config, weights), config["n_heads"]
    for fused in [name for name in weights if name.endswith(".in_proj_weight")]:
        q, k, v = mx.split(weights.pop(fused), 3)
        rows = {"q": reorder(q, heads, split=True), "k": reorder(k, heads, split=True), "v": v}
        weights |= {fused.replace("in_proj_weight", f"{x}_proj.weight"): w for x, w in rows.items()}
    layers = numbers(weights, r"decoder\.model\.(\d+)\.convtr\.")
    return rename(weights, mimi_table(layers), undo=True)


# ---- quantization -----------------------------------------------------------------------------------------------

MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}  # MLX's modes besides "affine": group size, bits


def quantize(weights, how=4, group_size=64):
    """{name: array} of a model, each head a matrix -> every matrix quantized, and the note for the config.

    how: 4, 6 or 8 bits, in groups of group_size, or one of MODES, which have their own. Raises ValueError.
    """
    if how not in (4, 6, 8, *MODES) or group_size not in (32, 64, 128):
        raise ValueError(f"quantize takes 4, 6, 8 or {', '.join(MODES)}, in groups of 32, 64 or 128, not {how}")
    if any(name.endswith(".scales") for name in weights):
        raise ValueError("the model is quantized already")
    group_size, bits = MODES.get(how, (group_size, how))
    kind, out = {"group_size": group_size, "bits": bits, "mode": how if how in MODES else "affine"}, {}
    for name, w in weights.items():
        if w.ndim < 2 or w.shape[-1] % group_size:
            out[name] = w
        else:
            base = name.removesuffix(".weight")
            out |= zip((name, f"{base}.scales", f"{base}.biases"), mx.quantize(w, **kind))
    if len(out) == len(weights):
        raise ValueError(f"no matrix of the model can be cut into groups of {group_size}")
    return out, kind


# ---- PyTorch's checkpoints --------------------------------------------------------------------------------------

STATES = ("model_state", "model_state_dict", "model", "state_dict")  # where trainers keep the weights in a checkpoint
MAX_PICKLE = 16 << 20  # bytes. CSM-1B's pickle has 40 kB; a byte can make an object of a hundred
STORAGES = {  # torch.XStorage -> what is in it. MLX has float64 on the CPU alone: it becomes float32 on the way
    "Float": mx.float32, "Double": mx.float64, "Half": mx.float16, "BFloat16": mx.bfloat16, "Bool": mx.bool_,
    "Long": mx.int64, "Int": mx.int32, "Short": mx.int16, "Char": mx.int8, "Byte": mx.uint8,
    "ComplexFloat": mx.complex64,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor that is still in the file."""

    data: memoryview  # from its first element to its last
    dtype: mx.Dtype
    shape: tuple
    strides: tuple  # in elements

    def read(self):
        flat = mx.array(self.data.cast("BHIQ"[self.dtype.size.bit_length() - 1]))  # MLX counts in 32 bits
        flat = flat.view(self.dtype, stream=mx.cpu)
        if self.dtype == mx.float64:
            flat = flat.astype(mx.float32, stream=mx.cpu)
        return mx.as_strided(flat, self.shape, self.strides) if flat.size else mx.zeros(self.shape, flat.dtype)


def rebuild(storage, offset, shape, strides, *_):
    """torch._utils._rebuild_tensor_v2 -> Stored, within its storage. storage: the bytes of it and their type."""
    data, dtype = storage
    sizes = (offset, *shape, *strides)
    whole = isinstance(data, memoryview) and isinstance(dtype, mx.Dtype) and len(shape) == len(strides) <= 8
    if not whole or not all(type(n) is int and 0 <= n < 2**31 for n in sizes) or math.prod(shape) >= 2**31:
        raise ValueError("a tensor of no possible shape")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides)) if math.prod(shape) else offset
    if end * dtype.size > len(data):
        raise ValueError("a tensor is larger than what holds it")
    return Stored(data[offset * dtype.size : end * dtype.size], dtype, tuple(shape), tuple(strides))


class Unpickler(pickle._Unpickler):  # the one written in C can be made to fill the memory
    """Builds what a state dict is made of, tensors and plain containers, and calls nothing else that a pickle names.

    Keys of a dict are strings and numbers: computing the hash of deeply nested tuples overflows the stack.
    """

    storages: dict  # name -> memoryview

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage") and name[:-7] in STORAGES:
            return STORAGES[name[:-7]]
        allowed = {
            "torch._utils._rebuild_tensor_v2": rebuild,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.Size": lambda shape: shape,
            "collections.OrderedDict": lambda: OrderedDict(),
        }
        if f"{module}.{name}" not in allowed:
            raise ValueError(f"it holds a {module}.{name}, and nothing but tensors and plain containers is read")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid):
        _, dtype, key, _, n = pid
        return self.storages[key][: n * dtype.size], dtype

    def load_setitems(self, items=None):
        items = self.pop_mark() if items is None else items
        if not all(isinstance(key, (str, int, float)) for key in items[::2]):
            raise ValueError("a dict of it has a key that is no string and no number")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.load_setitems([key, value])

    def load_build(self):
        self.stack.pop()  # attributes, such as _metadata of a state dict

    def refuse(self):
        raise ValueError("its pickle is not as torch.save writes them")

    dispatch = pickle._Unpickler.dispatch | {
        pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem, pickle.BUILD[0]: load_build,
        pickle.DICT[0]: refuse, pickle.EMPTY_SET[0]: refuse, pickle.ADDITEMS[0]: refuse, pickle.FROZENSET[0]: refuse,
        pickle.BYTEARRAY8[0]: refuse,  # it takes the memory before it looks for the bytes
    }  # fmt: skip


def read_pt(path):
    """A PyTorch checkpoint (.pt, .pth, .ckpt, .bin), as torch.save writes it -> {name: mx.array}, without torch.

    The file is a zip archive: a pickle, which names and shapes the tensors, and each tensor's bytes, uncompressed;
    they are mapped, so that no more is read than is returned. The weights may lie under one of STATES, and their
    names begin with "module." (DataParallel's). A pickle can run any code: this one is held to tensors and plain
    containers. float64 is returned as float32. Raises ValueError.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if file_bytes[:1] == b"\x80":  # a pickle; a zip begins with PK
                raise ValueError("of the format before PyTorch 1.6; torch.load it and torch.save it again")
            with zipfile.ZipFile(file) as archive:
                members = {m.filename: m for m in archive.infolist()}
                pickled = next(name for name in members if name.endswith("data.pkl"))
                root = pickled.removesuffix("data.pkl")
                storages = {}
                for name, m in members.items():
                    if name != pickled and not name.startswith(f"{root}data/"):
                        continue
                    if m.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("compressed, which torch.save never does")
                    local = file_bytes[m.header_offset : m.header_offset + 30]  # its last: lengths of what follows
                    start = m.header_offset + 30 + sum(local[26:30].cast("H"))
                    storages[name.removeprefix(f"{root}data/")] = file_bytes[start : start + m.file_size]
                if members[pickled].file_size > MAX_PICKLE:
                    raise ValueError(f"its {pickled} has more than {MAX_PICKLE >> 20} MB")
                unpickler = Unpickler(archive.open(pickled))
                unpickler.storages = storages
                state = unpickler.load()
        state = next((state[name] for name in STATES if isinstance(state.get(name), dict)), state)
        for name, tensor in state.items():
            if not (isinstance(name, str) and isinstance(tensor, Stored)):
                raise ValueError(f"its {name!r:.80} is not a tensor, and it has none of {', '.join(STATES)}")
        if sum(math.prod(w.shape) * w.dtype.size for w in state.values()) > 4 * len(file_bytes) + 2**26:
            raise ValueError("its tensors are far larger than the file")
        return {name.removeprefix("module."): tensor.read() for name, tensor in state.items()}
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except Exception as error:  # of many kinds: a damaged zip, a damaged pickle
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint ({type(error).__name__})") from None


# ---- saving -----------------------------------------------------------------------------------------------------

UNFINISHED = "This folder was being written, and that was interrupted: its files may be of two models.\n"


def join_heads(weights):
    """The model's heads, `audio_head.i.weight` (V, D), as our layout's one `audio_head` (K - 1, D, V).

    Quantized heads stay as they are.
    """
    names = [name for name in weights if name.startswith("audio_head.")]
    if not names or any(not name.endswith(".weight") for name in names):
        return weights
    names.sort(key=lambda name: int(name.split(".")[1]))
    others = {name: w for name, w in weights.items() if name not in names}
    return others | {"audio_head": mx.stack([weights[name].T for name in names])}


def native_files(config, weights, mimi_config, mimi_weights):
    """A CSM and its Mimi, in our layout or as csm.py and mimi.py compute -> the files for write_folder.

    config and weights None: the Mimi alone; mimi_weights None: the CSM alone.
    """
    files = {}
    if weights is not None:
        config = config | {"model_type": "csm", "layout": "native"}
        files |= {"config.json": config, "model.safetensors": (join_heads(weights), {"format": "mlx"})}
    if mimi_weights is not None:
        weights = {name: w for name, w in mimi_weights.items() if not name.endswith(".norms")}
        for part in ("first", "rest"):
            if (vectors := weights.pop(f"{part}.codebooks", None)) is not None:
                weights[f"{part}.embedding_sum"] = vectors
                weights[f"{part}.cluster_usage"] = mx.ones(vectors.shape[:2])
        # The config is stored in the file, since shapes do not tell the number of heads.
        files["mimi.safetensors"] = weights, {"format": "mlx", "config": json.dumps(mimi_config)}
    return files


def write_folder(folder, files, alternatives=()):
    """Write {name: a path to copy, a dict for JSON, a text, or (weights, metadata)}, all or none.

    Killed in between, it leaves UNFINISHED in the configs, which nothing loads. Folders are not swapped: one may be a
    mount, and has files that are not ours.
    alternatives: tuples of file patterns. Where one of `files` matches, the folder's other files that match the same
    tuple belong to another model, and are deleted. Raises ValueError.
    """
    folder = Path(os.path.realpath(folder))
    staging = unfinished(folder)
    configs = [name for name in files if name.endswith("config.json")]
    configs.sort(key=lambda name: name == "config.json")  # the last in place

    def place(staged, name):
        """Move a file from `staging`; moves on one disk hardly fail."""
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_file():
            shutil.copymode(folder / name, staging / staged)
        (staging / staged).replace(folder / name)

    try:
        for name, content in files.items():
            write_file(staging / name, content)
        if not folder.exists():
            staging.rename(folder)
            return
        for name in configs:
            write_file(staging / "unfinished", UNFINISHED)
            place("unfinished", name)
        written = {folder / name for name in files}
        for patterns in alternatives:
            found = {file for pattern in patterns for file in folder.glob(pattern)}
            if any(Path(name).match(pattern) for name in files for pattern in patterns):
                for file in found - written:
                    file.unlink()
        for name in [*(name for name in files if name not in configs), *configs]:
            place(name, name)
    except (OSError, RuntimeError) as e:  # RuntimeError: MLX, if the disk is full
        raise ValueError(f"cannot write {folder}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def unfinished(path):
    """A name beside `path` for what is being written, no other process's; what dead ones left there is removed."""
    name = os.fsencode(path.name)[:150].decode(errors="ignore")
    stem = f".{name}.{platform.node()[:30]}-"
    for old in path.parent.glob(f"{glob.escape(stem)}*.part"):
        try:
            os.kill(int(old.name.removeprefix(stem).partition("-")[0]), 0)
        except ProcessLookupError:
            with suppress(OSError):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        except (ValueError, OSError):  # of another form, or of another user
            pass
    return path.with_name(f"{stem}{os.getpid()}-{secrets.token_hex(4)}.part")


def write_file(path, content):
    """Write one of the kinds of content that `write_folder` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    elif isinstance(content, tuple):
        mx.save_safetensors(str(path), *content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
