"""Any published CSM or Mimi checkpoint -> one folder in our own layout, and back to the layouts others read.

Layouts, told apart by their key names:
  sesame        sesame/csm-1b: torchtune names (attn, mlp.w1, sa_norm.scale), interleaved RoPE, a config of five fields
  mlx           senstella/csm-1b-mlx: the same tensors under MLX names. Our native layout; may be quantized
  transformers  CsmForConditionalGeneration: half-split RoPE, the tied audio embedding stored once, Mimi inside
  Mimi          kyutai's, which is our native one (interleaved RoPE, q|k|v fused), and transformers' (half-split RoPE)

RoPE turns pairs of rows of q and k: rows (2i, 2i + 1) of a head if interleaved, (i, i + head_dim / 2) if half-split, so
one becomes the other by reordering rows. The maps between layouts are lazy, and do not check: a tensor that they do not
know keeps its name and shape, and the model, which knows its own, refuses it. `weights` is {name: mx.array} everywhere.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

# mimi puts a fast BLAS in place, which must come before mlx. Where mlx is loaded already it has done so, perhaps as the
# program itself: `python csm.py` and `python mimi.py` are named __main__ and not to be loaded again from here.
if "mlx.core" not in sys.modules:
    import mimi  # noqa: F401

import mlx.core as mx

# ---- tables -----------------------------------------------------------------------------------------------------
# fmt: off

# Pieces of names in that layout -> what they are in ours, from the first row to the last. Rows undo in falling order.
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
MIMI_TRANSFORMERS = (  # after the rows of mimi_table
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
TIED = ("backbone_model.embed_tokens.embed_audio_tokens.", "depth_decoder.model.embed_tokens.")  # one may be there
SPELLINGS = (  # moshi's newer names -> those of the published checkpoint
    (".in_projs.0.weight", ".in_proj_weight"), (".in_proj.weight", ".in_proj_weight"), (".out_projs.0.", ".out_proj."),
)
# buffers that some files carry and every loader computes anew
BUFFERS = r"(.*\.)?((original_)?inv_freq|audio_tokens_offsets|\w+_causal_mask|pos_embeddings\.(theta|cache))"

PART_FIELDS = (  # native field, transformers' field, its default in the backbone, in the depth decoder
    ("n_layers", "num_hidden_layers", 16, 4), ("dim", "hidden_size", 2048, 1024),
    ("n_heads", "num_attention_heads", 32, 8), ("n_kv_heads", "num_key_value_heads", 8, 2),
    ("head_dim", "head_dim", None, None), ("ffn_dim", "intermediate_size", 8192, 8192),
    ("norm_eps", "rms_norm_eps", 1e-5, 1e-5), ("max_positions", "max_position_embeddings", 2048, 33),
)
PART_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
FLAVORS = {  # the first six of PART_FIELDS
    "llama-1B": (16, 2048, 32, 8, 64, 8192), "llama-100M": (4, 1024, 8, 2, 128, 8192),
    "llama-8B": (32, 4096, 32, 8, 128, 14336), "llama-300M": (8, 1536, 24, 6, 64, 6912),
}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SIZES = (  # native field (Sesame's too), transformers' field, default
    ("text_vocab_size", "text_vocab_size", 128256), ("audio_vocab_size", "vocab_size", 2051),
    ("audio_num_codebooks", "num_codebooks", 32),
)
CARRIED = r"speaker_prefix_space|text_tokenizer|use_default_voice_prompt|voice_match|quantization|\w+_token_id"
MIMI_FIELDS = (  # native field, transformers' field
    *((field, field) for field in ("kernel_size", "residual_kernel_size", "last_kernel_size", "compress", "norm_eps")),
    ("codebook_size", "codebook_size"), ("codebook_dim", "codebook_dim"), ("sample_rate", "sampling_rate"),
    ("n_filters", "num_filters"), ("ratios", "upsampling_ratios"), ("dilation_base", "dilation_growth_rate"),
    ("n_residual_layers", "num_residual_layers"), ("dim", "hidden_size"), ("n_layers", "num_hidden_layers"),
    ("n_heads", "num_attention_heads"), ("ffn_dim", "intermediate_size"), ("context", "sliding_window"),
    ("n_codebooks", "num_quantizers"), ("n_semantic", "num_semantic_quantizers"),
)
CSM_FILES = ("model.safetensors", "model.safetensors.index.json", "ckpt.safetensors", "*.index.json", "*.safetensors",
             "ckpt.pt", "*.pt", "*.pth", "*.ckpt")  # tried in this order
MIMI_FILES = ("mimi.safetensors", "tokenizer-*.safetensors")  # a Mimi by itself: ours, kyutai's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# fmt: on

# ---- configs ----------------------------------------------------------------------------------------------------


def refuse_other(config, fixed):
    for field, value in fixed.items():
        if config.get(field) not in (None, value):
            raise ValueError(f"{field} = {config[field]!r} is not supported, only {value!r}")


def read_rope(config, theta):
    """transformers 4's rope_theta and rope_scaling, or 5's rope_parameters -> theta, and the scaling or None.

    Only the ratios of the original length to the factors count: here it is always 8192, as Sesame writes it.
    """
    rope = {"rope_theta": theta} | config | (config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and not (kind == "llama3" and LLAMA3.keys() <= rope.keys()):
        raise ValueError(f"rope_type {kind!r} is not supported, only default and llama3 with {', '.join(LLAMA3)}")
    if kind == "default":
        return float(rope["rope_theta"] or theta), None
    times = 8192 / rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"] * times, rope["high_freq_factor"] * times
    scaling = {"factor": rope["factor"], "low_freq_factor": low, "high_freq_factor": high}
    return float(rope["rope_theta"] or theta), LLAMA3 | scaling


def read_part(config, which):
    refuse_other(config, PART_FIXED)
    part = {ours: config.get(theirs, defaults[which]) for ours, theirs, *defaults in PART_FIELDS}
    part["n_kv_heads"] = part["n_kv_heads"] or part["n_heads"]
    part["head_dim"] = part["head_dim"] or part["dim"] // part["n_heads"]
    part["rope_theta"], part["rope_scaling"] = read_rope(config, 500000.0)
    return part


def write_part(part):
    scaling = part["rope_scaling"] and {**part["rope_scaling"], "rope_type": "llama3"}
    # transformers wants an original length below the maximum
    while scaling and scaling["original_max_position_embeddings"] >= part["max_positions"]:
        scaling |= {f: scaling[f] / 2 for f in ("low_freq_factor", "high_freq_factor")}
        scaling["original_max_position_embeddings"] //= 2
    rope = {"rope_theta": part["rope_theta"], "rope_scaling": scaling}  # transformers 4's fields, which 5 reads as well
    return PART_FIXED | rope | {theirs: part[ours] for ours, theirs, *_ in PART_FIELDS}


def flavor(name):
    if name not in FLAVORS:
        raise ValueError(f"unknown flavor {name!r}; known: {', '.join(FLAVORS)}")
    part = {field: size for (field, *_), size in zip(PART_FIELDS, FLAVORS[name])}
    return part | {"norm_eps": 1e-5, "max_positions": 2048, "rope_theta": 500000.0, "rope_scaling": dict(LLAMA3)}


def csm_config(config):
    """Any published config -> the native one; a native one passes through."""
    native = {"model_type": "csm", "layout": "native"}
    if isinstance(config.get("backbone"), dict):
        return config | native
    if "depth_decoder_config" in config or ("backbone_flavor" not in config and config.get("model_type") == "csm"):
        refuse_other(config, {"tie_codebooks_embeddings": True})
        parts = read_part(config, 0), read_part(config.get("depth_decoder_config") or {}, 1)
        native |= {ours: config.get(theirs, default) for ours, theirs, default in SIZES}
    elif "backbone_flavor" in config:
        parts = flavor(config["backbone_flavor"]), flavor(config.get("decoder_flavor", "llama-100M"))
        native |= {ours: config.get(ours, default) for ours, _, default in SIZES}
    else:
        raise ValueError(f"not the config.json of a CSM; its fields: {', '.join(list(config)[:8])}")
    native |= {"backbone": parts[0], "decoder": parts[1]}
    return native | {field: value for field, value in config.items() if re.fullmatch(CARRIED, field)}


def write_sesame_config(config):
    """The five fields; where no flavor has these sizes, our own fields instead."""
    rest = {field: value for field, value in config.items() if field not in ("layout", "model_type")}
    parts = {part: rest.pop(part) for part in ("backbone", "decoder")}
    flavors = {}
    for part, sizes in parts.items():
        same = [name for name in FLAVORS if flavor(name) | {"max_positions": sizes["max_positions"]} == sizes]
        flavors |= {f"{part}_flavor": name for name in same}
    return (flavors if len(flavors) == 2 else {"model_type": "csm", **parts}) | rest


def write_transformers_config(config, mimi, dtype):
    sizes = {theirs: config[ours] for ours, theirs, _ in SIZES}
    depth = write_part(config["decoder"]) | {f: sizes[f] for f in ("vocab_size", "num_codebooks")}
    depth |= {"model_type": "csm_depth_decoder_model", "backbone_hidden_size": config["backbone"]["dim"]}
    fields = {"model_type": "csm", "architectures": ["CsmForConditionalGeneration"], "dtype": dtype}
    fields |= {"tie_codebooks_embeddings": True, "codebook_pad_token_id": sizes["vocab_size"] - 1}
    fields |= {field: value for field, value in config.items() if re.fullmatch(CARRIED, field)}
    parts = {"depth_decoder_config": depth, "codec_config": write_mimi_config(mimi)}
    return fields | write_part(config["backbone"]) | sizes | parts


def mimi_config(config):
    """transformers' MimiConfig -> the native one."""
    import mimi as codec

    native = asdict(codec.MimiConfig())
    native |= {ours: config[theirs] for ours, theirs in MIMI_FIELDS if config.get(theirs) is not None}
    native["rope_theta"], scaling = read_rope(config, 10000.0)
    refuse_other(config | {"rope_scaling": scaling}, write_mimi_config(native) | {"rope_scaling": None})
    return native


def write_mimi_config(config):
    rate = config["sample_rate"] / math.prod(config["ratios"]) / 2
    return {theirs: config[ours] for ours, theirs in MIMI_FIELDS} | {
        "model_type": "mimi", "rope_theta": config["rope_theta"], "hidden_act": "gelu", "attention_bias": False,
        "num_key_value_heads": config["n_heads"], "head_dim": config["dim"] // config["n_heads"],
        "use_causal_conv": True, "pad_mode": "constant", "use_conv_shortcut": False, "trim_right_ratio": 1.0,
        "upsample_groups": config["dim"], "audio_channels": 1, "frame_rate": rate, "_frame_rate": rate,
        "vector_quantization_hidden_dimension": config["codebook_dim"],
    }  # fmt: skip


# ---- weights ----------------------------------------------------------------------------------------------------


def rename(weights, table, undo=False):
    for old, new in [(ours, theirs) for theirs, ours in reversed(table)] if undo else table:
        weights = {name.replace(old, new): w for name, w in weights.items()}
    return weights


def reorder(w, heads, split):
    """Rows of q or k (H * head_dim, D): interleaved -> half-split if `split`, else back."""
    return w.reshape(heads, *((-1, 2) if split else (2, -1)), w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def reorder_csm(weights, config, split):
    for name, w in weights.items():
        if m := re.fullmatch(r"(backbone|decoder)\.layers\.\d+\.self_attn\.([qk])_proj\.weight", name):
            part = config[m[1]]
            heads = part["n_heads" if m[2] == "q" else "n_kv_heads"]
            if w.shape == (heads * part["head_dim"], part["dim"]):  # else it is left for the model to refuse
                weights[name] = reorder(w, heads, split)
    return weights


def csm_weights(weights, config):
    """Any layout -> native names, shapes and RoPE. `config` is the native one."""
    if any(name.startswith("backbone_model.") for name in weights):
        return reorder_csm(rename(weights, (TIED, *TRANSFORMERS)), config, split=False)
    if not any(name.startswith("backbone.") for name in weights):
        raise ValueError(f"not a checkpoint of a known layout; it has {len(weights)} keys: {', '.join([*weights][:4])}")
    return rename(weights, SESAME if any(".attn." in name for name in weights) else ())


def mimi_table(config):
    step = 2 + config["n_residual_layers"]  # the first layer of each step of the decoder is the transposed one
    layers = [f"decoder.layers.{2 + step * i}." for i in range(len(config["ratios"]))]
    return *((f"{layer}conv.", f"{layer}convtr.") for layer in layers), *MIMI_TRANSFORMERS


def mimi_weights(weights, config):
    """transformers' layout -> native names, shapes and RoPE. `config` is the native one."""
    weights, heads, square = rename(weights, mimi_table(config)), config["n_heads"], (config["dim"], config["dim"])
    for stem in [name.removesuffix("q_proj.weight") for name in weights if name.endswith(".q_proj.weight")]:
        names = [f"{stem}{x}_proj.weight" for x in "qkv"]
        if all(name in weights and weights[name].shape == square for name in names):  # else the model refuses them
            q, k, v = (weights.pop(name) for name in names)
            fused = reorder(q, heads, split=False), reorder(k, heads, split=False), v
            weights[f"{stem}in_proj_weight"] = mx.concatenate(fused)
    return weights


def transformers_mimi(weights, config):
    """Native -> transformers' names, shapes and RoPE."""
    weights, heads = dict(weights), config["n_heads"]
    for fused in [name for name in weights if name.endswith(".in_proj_weight")]:
        q, k, v = mx.split(weights.pop(fused), 3)
        rows = {"q": reorder(q, heads, split=True), "k": reorder(k, heads, split=True), "v": v}
        weights |= {fused.replace("in_proj_weight", f"{x}_proj.weight"): w for x, w in rows.items()}
    return rename(weights, mimi_table(config), undo=True)


# ---- reading ----------------------------------------------------------------------------------------------------


def read_torch(path):
    try:
        import torch

        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        weights = weights.get("model", weights.get("state_dict", weights))
        types = {name: getattr(mx, str(w.dtype).removeprefix("torch.")) for name, w in weights.items()}
        # by way of float32, since numpy has no bfloat16
        return {name: mx.array(w.detach().float().numpy()).astype(types[name]) for name, w in weights.items()}
    except Exception as error:  # of many kinds
        hint = "is torch installed, and the file whole?"
        raise ValueError(f"cannot read {path} as a PyTorch state dict ({type(error).__name__}): {hint}") from None


def read_file(path):
    """One checkpoint file, or the index of its shards -> (weights, metadata)"""
    import mimi as codec

    metadata = {}
    if path.suffix in (".pt", ".pth", ".ckpt"):
        weights = read_torch(path)
    elif path.suffix == ".json":
        shards = {path.parent / shard for shard in codec.read_json(path).get("weight_map", {}).values()}
        weights = {name: w for shard in sorted(shards) for name, w in codec.read_safetensors(shard)[0].items()}
    else:
        weights, metadata = codec.read_safetensors(path)
    weights = {name.removeprefix("model."): w for name, w in weights.items() if not re.fullmatch(BUFFERS, name)}
    return rename(weights, SPELLINGS), metadata  # mlx-audio puts "model." before every name


def find(folder, patterns):
    for pattern in patterns:
        files = sorted(f for f in folder.glob(pattern) if patterns == MIMI_FILES or not any(map(f.match, MIMI_FILES)))
        if len(files) > 1:
            raise ValueError(f"{folder} has several checkpoints, name one: {', '.join(f.name for f in files)}")
        if files:
            return files[0]


def read(source):
    """A folder, weights file or index -> (native config, native weights, (Mimi's config, its weights) or None), lazily.

    The config of a file lies beside it. Of a Mimi alone the first two are None; what its config lacks, mimi.py infers.
    """
    from mimi import read_json

    source = Path(source)
    folder = source if source.is_dir() else source.parent
    file = (find(folder, CSM_FILES) or find(folder, MIMI_FILES)) if source.is_dir() else source
    if file is None:
        raise ValueError(f"{source} has no checkpoint: no .safetensors, no index of shards, no .pt")
    weights, metadata = read_file(file)
    config = read_json(folder / "config.json")

    mimi, alone, prefix = None, any(name.startswith("quantizer.") for name in weights), "codec_model."
    codec = {name.removeprefix(prefix): w for name, w in weights.items() if alone or name.startswith(prefix)}
    if any(name.startswith("encoder.layers.") for name in codec):  # transformers'
        sizes = mimi_config(config if config.get("model_type") == "mimi" else config.get("codec_config") or {})
        mimi = sizes, mimi_weights(codec, sizes)
    elif codec:
        mimi = json.loads(metadata.get("config", "{}")), codec
    elif beside := find(folder, MIMI_FILES):
        mimi = read(beside)[2]
    if alone:
        return None, None, mimi

    native = csm_config(config or {"backbone_flavor": "llama-1B"})
    weights = csm_weights({name: w for name, w in weights.items() if not name.startswith(prefix)}, native)
    if not config and weights.get("text_embeddings.weight", mx.array(0)).shape != (128256, 2048):
        raise ValueError(f"{file} is not CSM-1B, and has no config.json beside it to say what it is")
    return native, weights, mimi


# ---- writing ----------------------------------------------------------------------------------------------------


def text_files(folder, tokenizer):
    """The tokenizer and the voices: {name in the destination: path}"""
    import mimi as codec

    place = Path(tokenizer) if tokenizer else folder
    if not place.exists():
        place = codec.download(str(tokenizer), *TOKENIZER_FILES)
    if place.is_file():
        files = {"tokenizer.model" if place.suffix == ".model" else "tokenizer.json": place}
    else:
        files = {name: place / name for name in TOKENIZER_FILES if (place / name).is_file()}
    if tokenizer and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise ValueError(f"{tokenizer} has no tokenizer.json and no tokenizer.model")
    return files | {f"prompts/{f.name}": f for f in (folder / "prompts").glob("*") if f.is_file()}


def write_folder(destination, files):
    """files: {name: a path to copy, a dict for JSON, or (weights, metadata)}. All of them are written, or none."""
    staging = destination.parent / f".{destination.name}.{os.getpid()}"
    try:
        for name, content in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            elif isinstance(content, dict):
                path.write_text(json.dumps(content, indent=2) + "\n")
            else:
                mx.save_safetensors(str(path), *content)
        for name in files:
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(destination / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert(source, destination, *, mimi=None, tokenizer=None, quantize=None, group_size=64, dtype=None, to=None):
    """Write `source` (folder, file or Hub repo) as the folder `destination`; the names of its files come back.

    mimi, tokenizer: sources of these where `source` has none, or others are wanted. quantize: 4 or 8 bits. dtype: cast
    CSM's tensors (None: as stored). to: None for our layout, "sesame" or "transformers" for theirs. Raises ValueError.
    """
    import csm
    import mimi as codec

    source, destination = csm.locate(source), Path(destination).resolve()
    folder = source if source.is_dir() else source.parent
    if destination == folder.resolve() or destination.is_file():
        raise ValueError(f"{destination} is where the source is, or a file: the destination must be another folder")
    config, weights, sound = read(source)
    if mimi:
        sound = read(codec.locate(mimi))[2]
        if sound is None:
            raise ValueError(f"{mimi} has no Mimi")
    if to not in (None, "sesame", "transformers"):
        raise ValueError(f"to is sesame or transformers, not {to}")
    if to == "transformers" and sound is None:
        raise ValueError("transformers keeps the Mimi inside, and this source has none: give one with --mimi")
    if weights is None and (quantize or dtype or tokenizer):
        raise ValueError(f"{source} is a Mimi alone: quantize, dtype and tokenizer are for a CSM")

    files = {}  # name: what to write there
    if sound:
        sound_config, sound = asdict(codec.from_weights(sound[1], sound[0]).config), sound[1]  # checks them, too
    if weights:
        files = text_files(folder, tokenizer)
        model_config = csm.CSMConfig.from_dict(config)
        codec.check(csm.blank(model_config, weights), csm.split_heads(weights))
        config |= {part: asdict(getattr(model_config, part)) for part in ("backbone", "decoder")}
        if to and (quantize or model_config.quantization):
            raise ValueError("a quantized CSM can be written in our own layout only")
        if dtype:
            kind = csm.as_dtype(dtype)
            plain = [name for name in weights if not name.endswith((".scales", ".biases"))]
            weights |= {name: weights[name].astype(kind) for name in plain if weights[name].dtype != mx.uint32}
        if quantize:
            weights = csm.quantize_weights(weights, quantize, group_size)
            config |= {"quantization": {"group_size": group_size, "bits": quantize}}

    form = {"format": "pt" if to else "mlx"}
    if to == "transformers":
        inside, files["config.json"] = transformers_mimi(sound, sound_config), write_mimi_config(sound_config)
        if weights:
            stored = str(weights["codebook0_head.weight"].dtype).removeprefix("mlx.core.")
            files["config.json"] = write_transformers_config(config, sound_config, stored)
            inside = {f"codec_model.{name}": w for name, w in inside.items()}
            inside |= rename(reorder_csm(weights, config, split=True), TRANSFORMERS, undo=True)
        files["model.safetensors"] = inside, form
    elif weights:
        files["config.json"] = write_sesame_config(config) if to else config
        files["model.safetensors"] = rename(weights, SESAME if to else (), undo=True), form
    if sound and to != "transformers":
        metadata = {"format": "mlx", "config": json.dumps(sound_config)}
        files[codec.DEFAULT_FILE if to else "mimi.safetensors"] = sound, metadata
    write_folder(destination, files)
    return sorted(files)


# ---- the command ------------------------------------------------------------------------------------------------


def main(argv=None):
    p = argparse.ArgumentParser(description="Any published CSM or Mimi checkpoint -> a folder that csm.py loads.")
    p.add_argument("source", help="csm-1b, a folder, .safetensors, .index.json or .pt file, or a Hub repo")
    p.add_argument("destination", help="the folder to write")
    p.add_argument("--mimi", help="where the Mimi comes from, if not from SOURCE")
    p.add_argument("--tokenizer", help="where the text tokenizer comes from, if not from SOURCE")
    p.add_argument("--quantize", type=int, choices=(4, 8), help="bits")
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64, help="of --quantize")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the CSM; as stored if not given")
    p.add_argument("--to", choices=("sesame", "transformers"), help="write another layout than ours")
    p.error = lambda message: p.exit(2, f"convert.py: error: {message}\n")  # one line, without the usage
    args = p.parse_args(argv)
    try:
        print(f"{args.destination}: {', '.join(convert(**vars(args)))}")
    except (ValueError, OSError, RuntimeError) as error:
        p.exit(2, f"convert.py: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        p.exit(130, "interrupted: nothing was written\n")


if __name__ == "__main__":
    main()
