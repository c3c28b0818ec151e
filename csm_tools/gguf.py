"""Read a CSM's GGUF files, as four programs write them, into names and arrays that csm_layouts.py converts.

  csm.rs     cartesia/sesame-csm-1b-gguf: Sesame's names and row order
  CrispASR   cstr/csm-1b-GGUF: transformers' row order; Mimi and the tokenizer inside
  llama.cpp  ggml-org/sesame-csm-1b-GGUF (pull request 12648): one file each for backbone, decoder, Mimi; Sesame's order
  codec.cpp  hans00/CSM-1B-GGUF: the backbone as llama.cpp's file of a Llama, everything else in a second file, in
             transformers' order

The tensors' names tell them apart. Matrices in Q4_0, Q4_1 and Q8_0 stay quantized, since MLX has the same numbers in
groups of 32. The package gguf dequantizes other types. Our own code reads the header, because that package takes a
minute for Llama's vocabulary.
"""

import json
import math
import mmap
import re
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import mimi  # before mlx
from csm_layouts import numbers, reorder, reorder_csm

import mlx.core as mx  # isort: skip
import numpy as np

# ---- tables -----------------------------------------------------------------------------------------------------
# fmt: off

# Regular expressions on names, applied in turn. A name that becomes empty is skipped: its tensor duplicates another.
LAYER = (
    (r"\.(?:attn_)?([qkv])\.", r".self_attn.\1_proj."), (r"\.(?:attn_output|o)\.", ".self_attn.o_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."), (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
CRISPASR = (
    *LAYER, (r"^backbone\.(blk|output_norm)", r"backbone_model.\1"),
    (r"^depth\.(blk|output_norm)", r"depth_decoder.model.\1"), (r"\.blk\.", ".layers."), (r"\.output_norm", ".norm"),
    (r"^backbone\.audio_embd", "backbone_model.embed_tokens.embed_audio_tokens"),
    (r"^backbone\.text_embd", "embed_text_tokens"), (r"^backbone\.codebook0_head", "lm_head"),
    (r"^depth\.token_embd", "depth_decoder.model.embed_tokens"), (r"^depth\.codebooks", "depth_decoder.codebooks"),
    (r"^depth\.projection", "depth_decoder.model.inputs_embeds_projector"),
    (r"^mimi\.", "codec_model."), (r"\.(en|de)coder\.model\.(\d+)\.", r".\1coder.layers.\2."),
    (r"\.blk(\d)\.", r".block.\1.conv."), (r"\.conv[23]\.", ".conv."), (r"\.(en|de)c_tfm\.", r".\1coder_transformer."),
    (r"\.norm1\.", ".input_layernorm."), (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.attn\.qkv_w$", ".self_attn.qkv_proj.weight"), (r"\.attn\.out_w$", ".self_attn.o_proj.weight"),
    (r"\.ffn_up_w$", ".mlp.fc1.weight"), (r"\.ffn_down_w$", ".mlp.fc2.weight"),
    (r"\.ls1$", ".self_attn_layer_scale.scale"), (r"\.ls2$", ".mlp_layer_scale.scale"),
    (r"\.rvq_first\.(vq\.)?", ".semantic_residual_vector_quantizer."),
    (r"\.rvq_rest\.(vq\.)?", ".acoustic_residual_vector_quantizer."),
    (r"\._codebook\.embedding$", ".codebook.embed_sum"),
)
LLAMA_BACKBONE = (
    *LAYER, (r"^blk\.", "backbone.layers."), (r"^output_norm", "backbone.norm"), (r"^token_embd", "text_embeddings"),
    (r"^(csm_proj|rope_freqs|output)\.weight$", ""),
)
LLAMA_DECODER = (
    *LAYER, (r"^blk\.", "decoder.layers."), (r"^output_norm", "decoder.norm"), (r"^audio_embd", "audio_embeddings"),
    (r"^audio_head", "audio_heads"), (r"^csm_proj", "projection"),
)
LLAMA_MIMI = (
    (r"^", "codec_model."), (r"_rvq\.", "_residual_vector_quantizer."), (r"\.codebook$", ".codebook.embed_sum"),
)
CODEC_CPP = (
    (r"^(lm\.depth\.rope|mimi\.\w+\.kernel|dec\.transformer\.|up\.r\d|q\..*\.codebook\.embed).*", ""),
    (r"^lm\.depth\.(blk_|output_norm)", r"decoder.\1"), (r"\.blk_", ".layers."), (r"\.output_norm", ".norm"), *LAYER,
    (r"^lm\.audio_embd_", "audio_embeddings."), (r"^lm\.c0_head", "codebook0_head"),
    (r"^lm\.depth\.heads_", "audio_head."), (r"^lm\.depth\.in_proj", "projection"),
    (r"^(dec|enc)\.l", r"codec_model.\1oder.layers."), (r"^dtr\.l", "codec_model.decoder_transformer.layers."),
    (r"^etr\.l", "codec_model.encoder_transformer.layers."), (r"^dn\.cv", "codec_model.downsample.conv"),
    (r"^up\.cv", "codec_model.upsample.conv"), (r"^q\.([as])\.", r"codec_model.quantizer.\1."),
    (r"\.quantizer\.a\.", ".quantizer.acoustic_residual_vector_quantizer."),
    (r"\.quantizer\.s\.", ".quantizer.semantic_residual_vector_quantizer."),
    (r"\.inln\.", ".input_layernorm."), (r"\.paln\.", ".post_attention_layernorm."), (r"\.attn\.", ".self_attn."),
    (r"\.sa_ls\.", ".self_attn_layer_scale."), (r"\.mlp_ls\.", ".mlp_layer_scale."),
    (r"\.cb\.es$", ".codebook.embed_sum"), (r"\.cb\.cu$", ".codebook.cluster_usage"),
    (r"\.cb\.init$", ".codebook.initialized"), (r"\.ip\.w$", ".input_proj.weight"),
    (r"\.op\.w$", ".output_proj.weight"), (r"\.w$", ".weight"), (r"\.b$", ".bias"),
)
TABLES = (  # a tensor that identifies the files, and their table. Other names, such as csm.rs', stay as they are
    ("backbone.blk.0.attn_q.weight", CRISPASR), ("audio_head.weight", LLAMA_DECODER),
    ("token_embd.weight", LLAMA_BACKBONE), ("enc.l0.conv.w", CODEC_CPP),
    (MIMI_NAME := "quantizer.semantic_rvq.layers.0.codebook", LLAMA_MIMI),
)
FIELDS = (  # field of our config; its name in CrispASR and codec.cpp; in llama.cpp
    ("n_heads", "n_heads", "attention.head_count"), ("n_kv_heads", "n_kv_heads", "attention.head_count_kv"),
    ("head_dim", "head_dim", "attention.key_length"), ("rope_theta", "rope_theta", "rope.freq_base"),
    ("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("max_positions", "max_pos", "context_length"),
)
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # types of a field's value, for struct
STRING, ARRAY = 8, 9
PLAIN = {0: mx.float32, 1: mx.float16, 30: mx.bfloat16}  # types of a tensor
Q4_0, Q4_1, Q8_0 = 2, 3, 8
TEMPORARY = []  # folders
BLOCK_BYTES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}  # per 32 weights
LLAMA3_WORDS = (  # how Llama 3's tokenizer splits a text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# fmt: on

# ---- the file format --------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor in the file, not read yet."""

    kind: int
    shape: tuple
    data: memoryview  # from the tensor's first byte to the end of the file

    def blocks(self, n, size):
        """The data as blocks of n weights: (..., blocks, size) bytes."""
        n_bytes = math.prod(self.shape) // n * size
        if not self.shape or self.shape[-1] % n or n_bytes > len(self.data):
            raise ValueError("the file is truncated, or the tensor's shape is wrong")
        return np.frombuffer(self.data[:n_bytes], np.uint8).reshape(*self.shape[:-1], -1, size)

    def packed(self):
        """Q4_0, Q4_1 or Q8_0 -> MLX's weight, scales and biases."""
        blocks = self.blocks(32, BLOCK_BYTES[self.kind])
        scales = mx.array(blocks[..., :2].copy().view(np.float16)[..., 0])
        if self.kind == Q8_0:
            q, biases = blocks[..., 2:] ^ 128, scales * -128  # -128 .. 127 becomes 0 .. 255
        else:  # the low halves of 16 bytes hold the first 16 weights, the high halves the others
            q = np.concatenate([blocks[..., -16:] & 15, blocks[..., -16:] >> 4], axis=-1)
            q = q[..., ::2] | (q[..., 1::2] << 4)
            biases = scales * -8 if self.kind == Q4_0 else mx.array(blocks[..., 2:4].copy().view(np.float16)[..., 0])
        return mx.array(q.reshape(*self.shape[:-1], -1).view(np.uint32)), scales, biases

    def read(self):
        """The weights as one dequantized array."""
        if dtype := PLAIN.get(self.kind):
            flat = self.blocks(1, dtype.size).reshape(-1).view(f"u{dtype.size}")
            return mx.array(flat).view(dtype).reshape(self.shape)
        if self.kind in BLOCK_BYTES:
            q, scales, biases = self.packed()
            bits = 32 * q.shape[-1] // self.shape[-1]
            return mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), 32, bits)
        try:
            import gguf
        except ImportError:
            raise ValueError("this kind of quantization needs the package gguf: pip install gguf") from None
        kind = gguf.GGMLQuantizationType(self.kind)
        blocks = self.blocks(*gguf.GGML_QUANT_SIZES[kind])
        if kind.name == "Q4_K" and (blocks[..., 3] & 128).any():  # the sign bit of a number that is positive in ggml
            raise ValueError("its Q4_K is not ggml's: csm.rs' script loses the groups' minima. Use the Q8_0 file")
        return mx.array(gguf.dequantize(blocks.reshape(*self.shape[:-1], -1), kind))


def read_header(data):
    """A file's bytes -> (fields {name: value}, tensors {name: Tensor}). Arrays of numbers stay bytes."""
    position = 0

    def take(n):
        nonlocal position
        position += n
        if position > len(data):
            raise ValueError("it is truncated")
        return data[position - n : position]

    def unpack(form):
        return struct.unpack(f"<{form}", take(struct.calcsize(f"<{form}")))

    def text():
        return str(take(int.from_bytes(take(8), "little")), "utf-8", "replace")

    def value(kind):
        if kind == STRING:
            return text()
        if kind != ARRAY:
            return unpack(NUMBERS[kind])[0]
        kind, n = unpack("IQ")
        return [text() for _ in range(n)] if kind == STRING else take(n * struct.calcsize(NUMBERS[kind]))

    def described():  # a tensor's shape, kind and offset
        (n_dims,) = unpack("I")
        return unpack(f"{min(n_dims, 4)}Q")[::-1], *unpack("IQ")

    magic, version, n_tensors, n_fields = unpack("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin with GGUF and version 2 or 3")
    fields = {text(): value(*unpack("I")) for _ in range(n_fields)}
    found = {text(): described() for _ in range(n_tensors)}
    start = position + -position % fields.get("general.alignment", 32)
    return fields, {name: Tensor(kind, shape, data[start + place :]) for name, (shape, kind, place) in found.items()}


def open_file(path):
    """read_header of a memory-mapped file. Raises ValueError."""
    mimi.check_file(path)
    try:
        with open(path, "rb") as file:
            return read_header(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (ValueError, OSError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"cannot read {path} as GGUF: {error}") from None


# ---- models -----------------------------------------------------------------------------------------------------


def open_model(path):
    """Open a file and its model's other files in the same folder: {path: (fields, tensors)}. Raises ValueError."""
    path = Path(path)
    files = {path: open_file(path)}
    names = files[path][1]
    if "token_embd.weight" in names:  # llama.cpp's backbone, or codec.cpp's
        other = "audio_head.weight" if "codebook0_head.weight" in names else "lm.c0_head.weight"
    elif "audio_head.weight" in names or "lm.c0_head.weight" in names:
        other = "token_embd.weight"
    else:
        return files
    beside = {file: open_file(file) for file in sorted(path.parent.glob("*.gguf")) if file != path}
    halves = {file: parts for file, parts in beside.items() if other in parts[1]}
    if len(halves) != 1:
        there = f"there are {', '.join(file.name for file in halves)}" if halves else "there is none"
        raise ValueError(f"{path} is half of a CSM and needs one file with {other} beside it, but {there}")
    mimis = {file: parts for file, parts in beside.items() if MIMI_NAME in parts[1]}
    return files | halves | (mimis if len(mimis) == 1 else {})


def read_gguf(path):
    """A file of a CSM or of half a CSM -> ({name: mx.array}, fields of config.json). Raises ValueError."""
    weights, config = {}, {}
    for file, (fields, tensors) in open_model(path).items():
        table = next((table for name, table in TABLES if name in tensors), ())
        part = {}
        for name, tensor in tensors.items():
            new = name
            for pattern, replacement in table:
                new = re.sub(pattern, replacement, new)
            matrix = len(tensor.shape) == 2 and re.fullmatch(r"(?!codec_model\.).+\.weight", new)
            try:
                if matrix and tensor.kind in BLOCK_BYTES:
                    stem = new.removesuffix("weight")
                    part |= zip((new, f"{stem}scales", f"{stem}biases"), tensor.packed())
                elif new:
                    part[new] = tensor.read()
            except ValueError as error:
                raise ValueError(f"cannot read {name} in {file}: {error}") from None
        config |= read_fields(fields, "decoder" if table is LLAMA_DECODER else "backbone")
        if table is CODEC_CPP and "decoder" in config:
            part = reorder_csm(part, config, split=False)
        if table is LLAMA_MIMI:  # interleaved rows of Mimi's 8 heads; transformers has them half-split
            part = {k: reorder(w, 8, split=True) if re.search(r"\.[qk]_proj\.", k) else w for k, w in part.items()}
        weights |= part
    return as_layout(weights), config


def read_fields(fields, part):
    """A file's fields about heads and RoPE, as fields of our config or of transformers' codec_config.

    part: "backbone" or "decoder", whichever llama.cpp's fields describe.
    """
    config = {}
    for prefix, of, column in (
        ("csm.backbone.", "backbone", 1), ("csm.depth.", "decoder", 1), ("codec.lm.residual.depth_", "decoder", 1),
        (f"{fields.get('general.architecture')}.", part, 2),
    ):  # fmt: skip
        for row in FIELDS:
            told = fields.get(prefix + row[column])
            if isinstance(told, (int, float)):
                told = float(f"{told:.7g}") if isinstance(told, float) else told  # undo float32's rounding
                config.setdefault(of, {})[row[0]] = told
    heads = fields.get("csm.mimi.n_heads", fields.get("codec.num_attention_heads"))
    return config | ({"codec_config": {"num_attention_heads": heads}} if isinstance(heads, int) else {})


def as_layout(weights):
    """Give the arrays of all four programs the layouts' shapes."""
    out = {}
    for name, w in weights.items():
        stem, _, kind = name.rpartition(".")
        if name == "audio_heads.weight":  # (K, V, D), the first of zeros
            out |= {f"audio_head.{i}.weight": head for i, head in enumerate(w[1:])}
        elif stem.endswith(".qkv_proj"):
            out |= zip((f"{stem[:-8]}{x}_proj.weight" for x in "qkv"), mx.split(w, 3))
        elif name == "codec_model.upsample.conv.weight" and w.ndim == 3 and w.shape[1] > 1:  # depthwise
            out[name] = mx.diagonal(w).T[:, None]  # (D, D, taps) -> (D, 1, taps)
        else:
            out[name] = w.reshape(-1) if stem.endswith(".conv") and kind == "bias" else w
    books = numbers(out, r"audio_embeddings\.(\d+)\.")
    for kind in ("weight", "scales", "biases"):
        if each := [out.pop(f"audio_embeddings.{i}.{kind}") for i in books if f"audio_embeddings.{i}.{kind}" in out]:
            out[f"audio_embeddings.{kind}"] = mx.concatenate(each)
    for name in [name for name in out if name.endswith(".embed_sum")]:  # without it, embed_sum is the codebook
        out.setdefault(name.replace("embed_sum", "cluster_usage"), mx.ones(out[name].shape[:1]))
    return out


def extract_tokenizer(path):
    """Write the tokenizer in a model's files to a temporary tokenizer.json; returns its path or None.

    Raises ValueError.
    """
    if (tokenizer := read_tokenizer(path)) is None:
        return None
    TEMPORARY.append(tempfile.TemporaryDirectory(prefix="csm-"))  # deleted when the process ends
    file = Path(TEMPORARY[-1].name, "tokenizer.json")
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return file


def read_tokenizer(path):
    """The content of a tokenizer.json from the files' fields, or None if they have no tokenizer like Llama 3's."""
    for fields, _ in open_model(path).values():
        tokens, merges, kinds = (fields.get(f"tokenizer.ggml.{x}") for x in ("tokens", "merges", "token_type"))
        if not (isinstance(tokens, list) and isinstance(merges, list)):
            continue
        if fields.get("tokenizer.ggml.pre", "llama-bpe") not in ("llama-bpe", "llama3"):
            continue
        marked = [bool(re.fullmatch(r"<\|.*\|>", token)) for token in tokens]
        if isinstance(kinds, memoryview) and len(kinds) == 4 * len(tokens):
            marked = [kind == 3 for kind in kinds.cast("i")]
        same = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        added = [{"id": i, "content": token} | same for i, token in enumerate(tokens) if token and marked[i]]
        cut = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = {token: i for i, token in enumerate(tokens) if token}
        return {
            "version": "1.0", "added_tokens": added, "decoder": to_bytes,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, to_bytes]},
            "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
        }  # fmt: skip
    return None
