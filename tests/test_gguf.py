"""GGUF files of a CSM, as four programs write them, give the greedy codes of the same weights, dequantized."""

import json
import re
import shutil
import sys

import convert
import csm  # before mlx
import csm_layouts
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from conftest import random_mimi, random_weights
from csm_tools import checkpoints
from csm_tools import gguf as files
from test_layouts import CSM_1B, NATIVE, as_transformers, folder, half_split, sesame_names

gguf = pytest.importorskip("gguf")

GREEDY = {"voice": "none", "temperature": 0, "max_audio_length_ms": 400}
ROPE = {"rope_theta": 500000.0, "max_positions": 2048, "norm_eps": 1e-5,
        "rope_scaling": csm.LLAMA3_ROPE}  # fmt: skip
CONFIG = NATIVE | {
    "backbone": {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 512} | ROPE,
    "decoder": {"dim": 256, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "ffn_dim": 256} | ROPE,
}


def tokens():
    """A byte-level BPE as their files store it: (tokens, merges)."""
    from tokenizers import pre_tokenizers

    merges = ["h e", "l l", "he ll", "hell o", "r e", "t he", "the re", "Ġ the", "Ġthe re"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(merge.replace(" ", "") for merge in merges), "<|begin_of_text|>", "<|end_of_text|>"]
    return words, merges


def gguf_file(path, arch, tensors, fields=None, kind="F16", words=None, types=True):
    """Write tensors {name: array or (array, kind)}: matrices in `kind`, fewer dimensions in F32, more in F16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), arch)
    for name, w in tensors.items():
        w, own = w if isinstance(w, tuple) else (w, None)
        w = np.array(w.astype(mx.float32)) if isinstance(w, mx.array) else w
        of = own or ("F32" if w.ndim == 1 else kind if w.ndim == 2 else "F16")
        write(writer, name, w, gguf.GGMLQuantizationType[of])
    for name, value in (fields or {}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    if words:
        writer.add_token_list(words[0])
        writer.add_token_merges(words[1])
        if types:
            writer.add_token_types([3 if word.startswith("<|") else 1 for word in words[0]])
            writer.add_tokenizer_pre("llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(writer, name, w, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if w.shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
    if kind.name.endswith("_K"):  # the package cannot quantize to it: take any bytes with small scales
        data = np.random.default_rng(len(name)).integers(0, 256, (*w.shape[:-1], w.shape[-1] // block, size), np.uint8)
        at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
        for i in at:
            data[..., i : i + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        data = data.reshape(*w.shape[:-1], -1)
    else:
        data = gguf.quantize(np.ascontiguousarray(w), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def blocks(name):
    """Our name of a layer's tensor -> llama.cpp's."""
    name = re.sub(r"self_attn\.([qkv])_proj", r"attn_\1", name).replace("self_attn.o_proj", "attn_output")
    name = name.replace("mlp.", "ffn_").replace("_proj.", ".").replace("post_attention_layernorm", "ffn_norm")
    return name.replace("input_layernorm", "attn_norm").replace("layers.", "blk.").replace("norm.weight", "norm.weight")


def csm_rs(path, config, weights, kind):
    """Like cartesia/sesame-csm-1b-gguf: Sesame's names; embeddings in F16."""
    names = sesame_names(config)
    tensors = {names[n]: (w, "F16") if "embeddings" in n or w.ndim == 1 else w for n, w in weights.items()}
    fields = {"csm.embedding_length": 256, "csm.backbone.block_count": 2, "csm.audio_num_codebooks": 4}
    return gguf_file(path / "q.gguf", "csm", tensors, fields, kind)


def crispasr(path, config, weights, kind):
    """Like cstr/csm-1b-GGUF: everything in one file."""
    theirs = as_transformers(weights, config)
    tied = "backbone_model.embed_tokens.embed_audio_tokens.weight"
    theirs["depth_decoder.model.embed_tokens.weight"] = theirs[tied]
    renamed = {}
    for name, w in theirs.items():
        name = {
            tied: "backbone.audio_embd.weight", "embed_text_tokens.weight": "backbone.text_embd.weight",
            "lm_head.weight": "backbone.codebook0_head.weight",
            "backbone_model.norm.weight": "backbone.output_norm.weight",
            "depth_decoder.codebooks_head.weight": "depth.codebooks_head.weight",
            "depth_decoder.model.embed_tokens.weight": "depth.token_embd.weight",
            "depth_decoder.model.inputs_embeds_projector.weight": "depth.projection.weight",
            "depth_decoder.model.norm.weight": "depth.output_norm.weight",
        }.get(name, name)  # fmt: skip
        renamed[blocks(name).replace("backbone_model.", "backbone.").replace("depth_decoder.model.", "depth.")] = w
    codec = transformers_mimi(n_heads=2)
    for name, w in codec.items():
        name = name.replace("encoder_transformer", "enc_tfm").replace("decoder_transformer", "dec_tfm")
        name = re.sub(r"(en|de)coder\.layers\.(\d+)\.block\.(\d)\.conv", r"\1coder.model.\2.blk\3", name)
        name = re.sub(r"(en|de)coder\.layers\.(\d+)\.conv", r"\1coder.model.\2.conv2", name)
        name = name.replace("input_layernorm", "norm1").replace("post_attention_layernorm", "norm2")
        name = name.replace("self_attn_layer_scale.scale", "ls1").replace("mlp_layer_scale.scale", "ls2")
        name = name.replace("mlp.fc1.weight", "ffn_up_w").replace("mlp.fc2.weight", "ffn_down_w")
        name = name.replace("self_attn.o_proj.weight", "attn.out_w").replace("sample.conv", "sample.conv3")
        name = name.replace("semantic_residual_vector_quantizer.layers", "rvq_first.vq.layers")
        name = name.replace("acoustic_residual_vector_quantizer.layers", "rvq_rest.vq.layers")
        name = name.replace("semantic_residual_vector_quantizer", "rvq_first")
        name = name.replace("acoustic_residual_vector_quantizer", "rvq_rest")
        if name.endswith(".q_proj.weight"):
            parts = [codec[name.replace("enc_tfm", "encoder_transformer").replace("dec_tfm", "decoder_transformer")
                           .replace("q_proj", f"{x}_proj")] for x in "qkv"]  # fmt: skip
            renamed["mimi." + name.replace("self_attn.q_proj.weight", "attn.qkv_w")] = mx.concatenate(parts)
        elif name.endswith("embed_sum"):
            divided = w / mx.maximum(codec[full(name).replace("embed_sum", "cluster_usage")], 1e-5)[:, None]
            renamed["mimi." + name.replace("codebook.embed_sum", "_codebook.embedding")] = divided
        elif not name.endswith((".k_proj.weight", ".v_proj.weight", "cluster_usage", "initialized")):
            renamed["mimi." + name] = w
    fields = {f"csm.mimi.{k}": v for k, v in {"n_heads": 2, "dim": 32}.items()}
    for part, prefix in (("backbone", "csm.backbone."), ("decoder", "csm.depth.")):
        fields |= {prefix + k: config[part][k] for k in ("n_heads", "n_kv_heads", "head_dim")}
    fields |= {"csm.backbone.rope_theta": 500000.0, "csm.backbone.rms_norm_eps": 1e-5}
    return gguf_file(path / "csm.gguf", "csm-tts", renamed, fields, kind, tokens(), types=False)


def full(name):
    name = name.replace("rvq_first.vq.layers", "semantic_residual_vector_quantizer.layers")
    return name.replace("rvq_rest.vq.layers", "acoustic_residual_vector_quantizer.layers")


def llama_fields(part, arch):
    return {
        f"{arch}.attention.head_count": part["n_heads"], f"{arch}.attention.head_count_kv": part["n_kv_heads"],
        f"{arch}.attention.key_length": part["head_dim"], f"{arch}.rope.freq_base": part["rope_theta"],
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.context_length": 2048,
    }  # fmt: skip


def llama_cpp(path, config, weights, kind):
    """Like ggml-org/sesame-csm-1b-GGUF: one file each for backbone, decoder and Mimi."""
    backbone, decoder = {}, {}
    for name, w in weights.items():
        part = decoder if name.startswith(("decoder", "audio_")) else backbone
        name = blocks(name.replace("backbone.norm", "output_norm").replace("decoder.norm", "output_norm"))
        name = re.sub(r"^(backbone|decoder)\.", "", name)
        part[name.replace("text_embeddings", "token_embd").replace("audio_embeddings", "audio_embd")] = w
    backbone["csm_proj.weight"] = backbone.pop("projection.weight")
    decoder["csm_proj.weight"] = (weights["projection.weight"], "F16")
    heads = decoder.pop("audio_head")
    decoder["audio_head.weight"] = mx.concatenate([mx.zeros_like(heads[:1]), heads]).swapaxes(1, 2)
    codec = transformers_mimi(n_heads=8)
    theirs = {}
    for name, w in codec.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.reshape(8, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        if name.endswith(".conv.bias"):
            w = w[:, None]
        if name.endswith("_proj.weight") and w.ndim == 3:
            w = w[..., 0]
        if name.endswith("embed_sum"):
            name, w = name.replace(".embed_sum", ""), w / codec[name.replace("embed_sum", "cluster_usage")][:, None]
        elif name.endswith(("cluster_usage", "initialized")):
            continue
        theirs[name.replace("_residual_vector_quantizer", "_rvq")] = (w, "F16") if w.ndim == 3 else w
    gguf_file(path / "kyutai-mimi.gguf", "if you see this, you are using the wrong file", theirs, kind="F32")
    fields = llama_fields(config["decoder"], "llama-csm")
    gguf_file(path / "sesame-csm-decoder.gguf", "llama-csm", decoder, fields, kind, tokens())
    fields = llama_fields(config["backbone"], "llama-csm")
    return gguf_file(path / "sesame-csm-backbone.gguf", "llama-csm", backbone, fields, kind, tokens())


def codec_cpp(path, config, weights, kind):
    """Like hans00/CSM-1B-GGUF: a Llama for llama.cpp, and a codec with the rest."""
    backbone, other = {"rope_freqs.weight": mx.ones(32)}, {"lm.depth.rope_freq_factors": mx.ones(64)}
    K, V = config["audio_num_codebooks"], config["audio_vocab_size"]
    for name, w in weights.items():
        if name.startswith("backbone."):
            backbone[blocks(name.replace("backbone.norm", "output_norm").replace("backbone.", ""))] = w
        elif name == "text_embeddings.weight":
            backbone["token_embd.weight"] = w
        elif name == "audio_embeddings.weight":
            other |= {f"lm.audio_embd_{i}.weight": (w[i * V : (i + 1) * V], "F16") for i in range(K)}
        elif name == "audio_head":
            other |= {f"lm.depth.heads_{i}.weight": head.T for i, head in enumerate(w)}
        elif name.startswith("decoder."):
            if m := re.search(r"\.([qk])_proj", name):
                w = half_split(w, config["decoder"]["n_heads" if m[1] == "q" else "n_kv_heads"])
            name = blocks(name.replace("decoder.norm", "output_norm").replace("decoder.", "")).replace("blk.", "blk_")
            name = re.sub(r"attn_([qkv])\.", r"\1.", name).replace("attn_output.", "o.")
            other[f"lm.depth.{name}"] = w
        else:
            other[{"projection.weight": "lm.depth.in_proj.weight"}.get(name, "lm.c0_head.weight")] = w
    codec = transformers_mimi(n_heads=2)
    for name, w in codec.items():
        if name == "upsample.conv.weight":
            dense = np.zeros((32, 32, w.shape[2]), np.float32)
            dense[np.arange(32), np.arange(32)] = np.array(w[:, 0])
            w = mx.array(dense)
        if name.endswith("_proj.weight") and w.ndim == 3:
            w = w[..., 0]
        short = name
        for old, new in (
            ("decoder_transformer.layers.", "dtr.l"), ("encoder_transformer.layers.", "etr.l"),
            ("decoder.layers.", "dec.l"), ("encoder.layers.", "enc.l"),
            ("quantizer.acoustic_residual_vector_quantizer.", "q.a."),
            ("quantizer.semantic_residual_vector_quantizer.", "q.s."), ("codebook.embed_sum", "cb.es"),
            ("codebook.cluster_usage", "cb.cu"), ("codebook.initialized", "cb.init"), ("input_layernorm.", "inln."),
            ("post_attention_layernorm.", "paln."), ("self_attn_layer_scale.", "sa_ls."),
            ("mlp_layer_scale.", "mlp_ls."), ("self_attn.", "attn."), ("input_proj.weight", "ip.w"),
            ("output_proj.weight", "op.w"), ("downsample.conv.weight", "dn.cv.w"), ("upsample.conv.weight", "up.cv.w"),
            (".weight", ".w"), (".bias", ".b"),
        ):  # fmt: skip
            short = short.replace(old, new)
        other[short] = (w, "F16") if w.ndim == 3 else w if short.endswith(".w") else (w, "F32")
        if m := re.fullmatch(r"decoder\.layers\.3\.block\.([13])\.conv\.weight", name):
            other[f"up.r0.c{m[1]}.w"] = (w, "F16")
        if name.startswith("decoder_transformer"):
            other[name.replace("decoder_transformer.layers.", "dec.transformer.blocks.")] = (w, "F32")
        if name.endswith("embed_sum"):
            other[short.replace("cb.es", "codebook.embed")] = (w, "F32")
    other["mimi.decode.kernel"] = (mx.ones((1920, 1, 1)), "F16")
    names = ("n_heads", "n_kv_heads", "head_dim")
    fields = {f"codec.lm.residual.depth_{k}": config["decoder"][k] for k in names} | {"codec.num_attention_heads": 2}
    fields |= {"codec.lm.residual.depth_rope_theta": 500000.0}
    gguf_file(path / "codec.gguf", "mimi", other, fields, kind)
    fields = llama_fields(config["backbone"], "llama")
    return gguf_file(path / "csm-1b.gguf", "llama", backbone, fields, kind, tokens())


def transformers_mimi(n_heads):
    """A small Mimi in transformers' layout, with values that float16 can hold."""
    codec = {name: w.astype(mx.float16).astype(mx.float32) for name, w in random_mimi(4, 32)[0].items()}
    config, ours = csm_layouts.mimi_to_native({}, codec)
    return csm_layouts.mimi_to_transformers(config | {"n_heads": n_heads}, ours)


WRITERS = {f.__name__: f for f in (csm_rs, crispasr, llama_cpp, codec_cpp)}
HEADS = {"crispasr": 2, "llama_cpp": 8, "codec_cpp": 2}  # of the model's Mimi


@pytest.fixture
def made(monkeypatch):
    """csm.rs stores no number of heads: register our model as a known flavor, as CSM-1B is."""
    for name, part in (("made", "backbone"), ("small", "decoder")):
        monkeypatch.setitem(csm_layouts.FLAVORS, name, tuple(CONFIG[part][field] for field in csm_layouts.SIZES))


def dequantized(w, kind):
    """A matrix after quantization by ggml's rules."""
    of = gguf.GGMLQuantizationType[kind]
    if w.shape[-1] % gguf.GGML_QUANT_SIZES[of][0]:
        of = gguf.GGMLQuantizationType.F16
    return mx.array(gguf.dequantize(gguf.quantize(np.array(w), of), of))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0"])
@pytest.mark.parametrize("program", WRITERS)
def test_greedy_codes(program, kind, tmp_path, made):
    config = CONFIG | {"text_vocab_size": len(tokens()[0])}
    weights = random_weights(config)
    file = WRITERS[program](tmp_path / "theirs", config, weights, kind)
    if program == "csm_rs":  # without a Mimi
        beside(tmp_path / "theirs")
    generator = csm.load(file)
    plain = {}
    for name, w in weights.items():
        f16 = w.ndim == 3 or (program == "csm_rs" and "embeddings" in name)
        f16 |= (program, name) in (("llama_cpp", "projection.weight"), ("codec_cpp", "audio_embeddings.weight"))
        if program == "codec_cpp" and name == "audio_head":  # one matrix per head
            plain[name] = mx.stack([dequantized(head.T, kind).T for head in w])
        else:
            plain[name] = dequantized(w, "F16" if f16 else kind) if w.ndim > 1 else w
    folder(tmp_path / "ours", plain, config)
    beside(tmp_path / "ours")
    ours = csm.load(tmp_path / "ours")
    codes = generator.generate_codes("hello there", **GREEDY)
    assert len(codes) == 5 and codes.tolist() == ours.generate_codes("hello there", **GREEDY).tolist()
    quantized = "scales" in generator.model.backbone.layers[0].mlp.up_proj
    assert quantized == (kind in ("Q4_0", "Q4_1", "Q8_0"))
    for text in ("hello there", "Hello, there's 12345  ha!\n\n"):
        assert generator.tokenizer.encode(text) == ours.tokenizer.encode(text)
    if program in HEADS:  # the file has a Mimi, too
        sizes, sound = csm_layouts.mimi_to_native(
            {"num_attention_heads": HEADS[program]}, transformers_mimi(HEADS[program])
        )
        sound = mimi.from_weights(sound, sizes).decode(codes.T[None])
        error = mx.abs(generator.mimi.decode(codes.T[None]) - sound).max() / mx.abs(sound).max()
        assert error < {"F32": 1e-6, "F16": 1e-6, "BF16": 0.02, "Q8_0": 0.03}.get(kind, 0.3)


def beside(path):
    """Write a Mimi and a tokenizer beside the model."""
    codec, sizes = random_mimi(4, 32)
    folder(path, codec, None, "mimi.safetensors", {"config": json.dumps(sizes)})
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words, merges = tokens()
    t = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [tuple(m.split()) for m in merges], ignore_merges=True)
    )
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(files.LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    t.add_special_tokens(words[-2:])
    t.save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(kind, tmp_path):
    """They are dequantized by ggml's rules."""
    config = CONFIG | {"text_vocab_size": len(tokens()[0])}
    file = csm_rs(tmp_path, config, random_weights(config), kind)
    weights, _ = files.read_gguf(file)
    reader = gguf.GGUFReader(file)
    assert {t.tensor_type.name for t in reader.tensors} == {"F16", kind}
    for t in reader.tensors:
        expected = gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        assert mx.array_equal(weights[t.name].astype(mx.float32), mx.array(expected)), t.name


def test_a_folder_of_gguf_files_and_convert(tmp_path):
    config = CONFIG | {"text_vocab_size": len(tokens()[0])}
    crispasr(tmp_path / "a", config, random_weights(config), "Q8_0")
    loaded = csm.load(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b")
    converted = csm.load(tmp_path / "b")
    text = "hello there"
    assert loaded.tokenizer.encode(text) == converted.tokenizer.encode(text)
    codes = loaded.generate_codes(text, **GREEDY)
    assert codes.tolist() == converted.generate_codes(text, **GREEDY).tolist()
    assert mx.array_equal(loaded.mimi.decode(codes.T[None]), converted.mimi.decode(codes.T[None]))


def test_refusals(tmp_path, monkeypatch):
    def refused(match, path):
        with pytest.raises(ValueError, match=match) as e:
            csm.load(path)
        assert "\n" not in str(e.value)

    config = CONFIG | {"text_vocab_size": len(tokens()[0])}
    weights = random_weights(config)
    refused("no such", tmp_path / "x.gguf")
    refused("cannot read .* does not begin with GGUF", folder_of(tmp_path / "no.gguf", b"GGML" + bytes(100)))
    refused("cannot read .*truncated", folder_of(tmp_path / "no.gguf", b"GGUF\3\0\0\0"))
    refused(
        "known layout.*blk.0.ffn_down",
        gguf_file(tmp_path / "llm.gguf", "x", {"blk.0.ffn_down.weight": mx.ones((32, 32))}),
    )
    file = codec_cpp(tmp_path / "half", config, weights, "F16")
    (tmp_path / "half/codec.gguf").rename(tmp_path / "half/codec.other")
    refused("needs one file with lm.c0_head.weight beside it, but there is none", file)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "half" / name).write_bytes((tmp_path / "half/codec.other").read_bytes())
    refused("there are a.gguf, b.gguf", file)
    whole = csm_rs(tmp_path / "whole", config, weights, "Q8_0").read_bytes()
    refused("is truncated", folder_of(tmp_path / "short.gguf", whole[: len(whole) // 2]))
    # csm.rs' q4_k has one minimum for all groups; it is negative, as ggml's never are
    kind = gguf.GGMLQuantizationType.Q4_K
    data = np.zeros((256, 144), np.uint8)
    data[:, 3] = 0xB0
    writer = gguf.GGUFWriter(str(tmp_path / "rs.gguf"), "csm")
    writer.add_tensor("backbone.layers.0.attn.q_proj.weight", data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    refused("Q4_K is not ggml's", tmp_path / "rs.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("pip install gguf", csm_rs(tmp_path / "k", config, weights, "Q5_0"))


def folder_of(path, data):
    path.write_bytes(data)
    return path


def test_damaged(tmp_path):
    """Damage raises one ValueError, or at worst gives a different model."""
    config = CONFIG | {"text_vocab_size": len(tokens()[0])}
    path, random = crispasr(tmp_path, config, random_weights(config), "Q8_0"), np.random.default_rng(0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(120):
        data = bytearray(whole)
        for at in random.integers(0, 6000, random.integers(1, 4)):  # of fields and names
            data[at] = random.integers(256)
        path.write_bytes(data[: random.integers(len(data))] if random.random() < 0.1 else data)
        try:
            files.read_tokenizer(path)
            csm_layouts.csm_to_native(*files.read_gguf(path)[::-1], CSM_1B)
        except ValueError as e:
            assert "\n" not in str(e)
            refused += 1
    assert 40 < refused < 120


@pytest.mark.parametrize("program, wanted", [("llama_cpp", "*.gguf"), ("crispasr", "csm-q8_0.gguf")])
def test_a_hub_repository_of_gguf_files(program, wanted, tmp_path, monkeypatch):
    """Only its 8-bit files are downloaded, or llama.cpp's three."""
    config = CONFIG | {"text_vocab_size": len(tokens()[0])}
    file = WRITERS[program](tmp_path / "hub", config, random_weights(config), "Q8_0")
    if program == "crispasr":
        file.rename(file.with_name("csm-q8_0.gguf"))
        (tmp_path / "hub/csm-f16.gguf").write_bytes(b"larger")

    def download(repo, *patterns):
        (tmp_path / "cache").mkdir(exist_ok=True)
        for path in {path for pattern in patterns for path in (tmp_path / "hub").glob(pattern)}:
            shutil.copy(path, tmp_path / "cache")
        return tmp_path / "cache"

    monkeypatch.setattr(checkpoints, "download", download)
    assert len(csm.load("some/csm-GGUF").generate_codes("hello there", **GREEDY)) == 5
    assert sorted((tmp_path / "cache").iterdir()) == sorted((tmp_path / "cache").glob(wanted))
