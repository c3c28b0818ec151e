"""csm_layouts.py: round trips give the same bytes, tensors give the sizes, transformers loads our exports."""

import json
import logging
from dataclasses import asdict

import csm  # before mlx

import mlx.core as mx  # isort: skip
import pytest
from mlx.utils import tree_flatten

import csm_layouts
import mimi
from conftest import random_mimi

# fmt: off
PART = {"intermediate_size": 48, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
DEPTH = PART | {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1,
                "head_dim": 8, "vocab_size": 35, "num_codebooks": 4, "backbone_hidden_size": 32,
                "max_position_embeddings": 9}
MIMI = {"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "codebook_size": 32, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16,
        "num_quantizers": 4, "upsample_groups": 32, "model_type": "mimi", "sliding_window": 30,
        "upsampling_ratios": [4, 3]}
CONFIG = PART | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 16, "vocab_size": 35, "text_vocab_size": 40, "num_codebooks": 4, "pad_token_id": 0,
                 "model_type": "csm", "codebook_pad_token_id": 34, "audio_token_id": 3, "audio_eos_token_id": 4,
                 "bos_token_id": 1, "eos_token_id": 2, "depth_decoder_config": DEPTH, "codec_config": MIMI,
                 "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 0.125, "high_freq_factor": 0.5,
          "original_max_position_embeddings": 32}
HALF = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 48}
QUARTER = {"dim": 24, "n_layers": 1, "n_heads": 3, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 48}
PLAIN = {"norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None}
NATIVE = {"model_type": "csm", "layout": "native", "backbone": HALF | PLAIN | {"max_positions": 64},
          "decoder": QUARTER | PLAIN | {"max_positions": 9}, "text_vocab_size": 40, "audio_vocab_size": 35,
          "audio_num_codebooks": 4, "pad_token_id": 0, "codebook_pad_token_id": 34, "audio_token_id": 3,
          "audio_eos_token_id": 4, "bos_token_id": 1, "eos_token_id": 2}
# fmt: on
CSM_1B = asdict(csm.CSMConfig())
GREEDY = {"voice": "none", "temperature": 0, "max_audio_length_ms": 800}


def same(a, b):
    """Assert the same names, types, shapes and bytes."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:4]
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert bytes(memoryview(a[name].view(mx.uint8))) == bytes(memoryview(b[name].view(mx.uint8))), name


def random_weights(config, dtype=mx.float32):
    """Random weights {name: array} in our layout, all different."""
    shapes = {n: w.shape for n, w in tree_flatten(csm.CSM(csm.CSMConfig.from_dict(config)).parameters())}
    keys = mx.random.split(mx.random.key(0), len(shapes))
    weights = {n: mx.random.normal(s, key=k).astype(dtype) for (n, s), k in zip(shapes.items(), keys)}
    return csm_layouts.join_heads(weights)


def folder(path, weights, config=None, name="model.safetensors", metadata=None):
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / name), weights, metadata or {"format": "pt"})
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def sesame_names(config):
    """Sesame's torchtune layout, written by hand."""
    layer = {f"self_attn.{x}_proj.weight": f"attn.{x}_proj.weight" for x in "qkv"}
    layer |= {"self_attn.o_proj.weight": "attn.output_proj.weight", "mlp.gate_proj.weight": "mlp.w1.weight"}
    layer |= {"mlp.down_proj.weight": "mlp.w2.weight", "mlp.up_proj.weight": "mlp.w3.weight"}
    layer |= {"input_layernorm.weight": "sa_norm.scale", "post_attention_layernorm.weight": "mlp_norm.scale"}
    plain = ("text_embeddings", "audio_embeddings", "projection", "codebook0_head")
    names = {f"{name}.weight": f"{name}.weight" for name in plain} | {"audio_head": "audio_head"}
    for part in ("backbone", "decoder"):
        for n in range(config[part]["n_layers"]):
            names |= {f"{part}.layers.{n}.{ours}": f"{part}.layers.{n}.{theirs}" for ours, theirs in layer.items()}
        names[f"{part}.norm.weight"] = f"{part}.norm.scale"
    return names


def half_split(w, heads):
    """Row by row, deliberately unlike csm_layouts.py."""
    d = w.shape[0] // heads
    return mx.stack([w[h * d + j] for h in range(heads) for j in (*range(0, d, 2), *range(1, d, 2))])


def as_transformers(weights, config):
    theirs = {}
    for name, w in weights.items():
        for part in ("backbone", "decoder"):
            for x, heads in (("q", "n_heads"), ("k", "n_kv_heads")):
                if name.startswith(f"{part}.") and f".{x}_proj." in name:
                    w = half_split(w, config[part][heads])
        name = name.replace("backbone.", "backbone_model.").replace("decoder.", "depth_decoder.model.")
        theirs[name] = w
    for ours, other in (
        ("text_embeddings", "embed_text_tokens"),
        ("projection", "depth_decoder.model.inputs_embeds_projector"),
        ("codebook0_head", "lm_head"),
        ("audio_embeddings", "backbone_model.embed_tokens.embed_audio_tokens"),
    ):
        theirs[f"{other}.weight"] = theirs.pop(f"{ours}.weight")
    theirs["depth_decoder.codebooks_head.weight"] = theirs.pop("audio_head")
    return theirs


@pytest.fixture
def native():
    return NATIVE, random_weights(NATIVE, mx.bfloat16)


def read(config, weights):
    """Read (config, weights), without a Mimi."""
    config, weights, inside = csm_layouts.csm_to_native(config, weights, CSM_1B)
    assert inside is None
    return config, weights


def test_one_model_under_three_namings(native):
    config, weights = native
    names = sesame_names(config)
    for fields, theirs in (
        (config, weights),
        (config, {f"model.{name}": w for name, w in weights.items()}),  # as mlx-audio saves
        (config, {f"module._orig_mod.{name}": w for name, w in weights.items()}),  # as PyTorch does
        (config, {names[name]: w for name, w in weights.items()}),
        (CONFIG, as_transformers(weights, config)),
        (CONFIG, {names[name]: w for name, w in weights.items()}),  # a hybrid: transformers' fields, Sesame's names
    ):
        said, read_weights = read(fields, theirs)
        assert said == config
        same(read_weights, weights)


def test_tied_embedding_and_buffers(native):
    config, weights = native
    theirs = as_transformers(weights, config)
    one, other = "backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight"
    theirs |= {other: theirs[one], "backbone_model.rotary_emb.inv_freq": mx.zeros((4,))}
    for fields in (CONFIG, CONFIG | {"tie_codebooks_embeddings": False}):  # only their being equal counts
        same(read(fields, theirs)[1], weights)
    with pytest.raises(ValueError, match="two different audio embeddings"):
        read(CONFIG | {"tie_codebooks_embeddings": False}, theirs | {other: theirs[one] + 1})


def shapes(backbone, decoder, text=128_256, V=2051, K=32):
    """Unevaluated zeros with torchtune's names; both stacks: (n_layers, dim, rows of q, rows of k, MLP)."""
    found = {}
    for part, (n, dim, q, k, ffn) in (("backbone", backbone), ("decoder", decoder)):
        for i in range(n):
            for name, *shape in (
                ("attn.q_proj.weight", q, dim), ("attn.k_proj.weight", k, dim), ("attn.v_proj.weight", k, dim),
                ("attn.output_proj.weight", dim, q), ("mlp.w1.weight", ffn, dim), ("mlp.w2.weight", dim, ffn),
                ("mlp.w3.weight", ffn, dim), ("sa_norm.scale", dim), ("mlp_norm.scale", dim),
            ):  # fmt: skip
                found[f"{part}.layers.{i}.{name}"] = shape
        found[f"{part}.norm.scale"] = (dim,)
    D, d = backbone[1], decoder[1]
    found |= {"text_embeddings.weight": (text, D), "audio_embeddings.weight": (V * K, D), "projection.weight": (d, D)}
    found |= {"codebook0_head.weight": (V, D), "audio_head": (K - 1, d, V)}
    return {name: mx.zeros(shape) for name, shape in found.items()}


SESAME, MISO = (
    ((16, 2048, 2048, 512, 8192), (4, 1024, 1024, 256, 8192)),
    ((32, 4096, 4096, 1024, 14336), (8, 1536, 1536, 384, 6912)),
)
MARVIS = (6, 1536, 1536, 384, 8192), (4, 1024, 1024, 256, 4096)


@pytest.mark.parametrize(
    "sizes, text, flavors, heads, parameters, fields",
    [
        (SESAME, 128_256, ["llama-1B", "llama-100M"], [(32, 8), (8, 2)], (1.55, 0.97, 0.11), {}),
        (
            MISO,
            128_256,
            ["llama-8B", "llama-300M"],
            [(32, 8), (24, 6)],
            (8.19, 6.98, 0.30),
            {"speaker_prefix_space": True},
        ),
        (MARVIS, 49_152, ["llama-250M", "llama-60M"], [(12, 3), (8, 2)], (0.57, 0.26, 0.06), {"voice_match": True}),
    ],
)
def test_the_family_without_a_config(sizes, text, flavors, heads, parameters, fields, caplog):
    """Names and shapes from their code; published billions of weights, in all, in backbone and in decoder."""
    weights = shapes(*sizes, text)
    with caplog.at_level(logging.INFO, "csm"):
        config, native = read({}, weights)
    (line,) = caplog.messages
    assert all(name in line for name in flavors)
    model = csm.CSM(csm.CSMConfig.from_dict(config))
    mimi.check_weights(model, csm.split_heads(native))
    counts = [
        sum(w.size for _, w in tree_flatten(m.parameters())) / 1e9 for m in (model, model.backbone, model.decoder)
    ]
    assert [round(n, 2) for n in counts] == list(parameters)
    parts = config["backbone"], config["decoder"]
    assert [(p["n_heads"], p["n_kv_heads"]) for p in parts] == heads
    assert all(p["rope_scaling"] == csm.LLAMA3_ROPE and p["rope_theta"] == 500_000 for p in parts)
    assert config["audio_num_codebooks"] == 32 and fields.items() <= config.items()
    assert ("text_tokenizer" in config) == (text == 49_152)
    five, theirs = csm_layouts.to_sesame(config, native, CSM_1B)
    assert [five["backbone_flavor"], five["decoder_flavor"]] == flavors and theirs.keys() == weights.keys()
    caplog.clear()
    with caplog.at_level(logging.INFO, "csm"):
        assert read(five, weights)[0] == config and not caplog.messages
    assert read(five | {"speaker_prefix_space": False}, weights)[0]["speaker_prefix_space"] is False


def test_the_tensors_decide(native, caplog):
    config, weights = native
    wrong = {"vocab_size": 128_256, "text_vocab_size": 7, "audio_vocab_size": 9, "num_codebooks": 31}
    assert read(CONFIG | wrong, weights)[0] == config and not caplog.messages
    # of a Marvis: flavors of another model, transformers' sizes of another model, sizes and no heads, one part alone
    marvis = shapes(*MARVIS, 49_152)
    right = read({}, marvis)[0]
    for fields in (
        {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"},
        {"backbone_flavor": "llama-3B"},
        {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1e4},
        {"hidden_size": 1536, "num_hidden_layers": 6, "intermediate_size": 8192},
        {"depth_decoder_config": DEPTH},
    ):
        caplog.clear()
        assert read(fields, marvis)[0] == right
        (line,) = caplog.messages
        assert "llama-250M" in line and "llama-60M" in line
    # the config's values stay unless the tensors contradict them
    fields = {"num_attention_heads": 24, "hidden_size": 1536, "rope_theta": 1e4, "max_position_embeddings": 99}
    backbone = read(fields, marvis)[0]["backbone"]
    assert (backbone["n_heads"], backbone["n_kv_heads"], backbone["head_dim"]) == (24, 6, 64)
    assert (backbone["rope_theta"], backbone["rope_scaling"], backbone["max_positions"]) == (1e4, None, 99)
    # fewer layers than in the config, and no such flavor: heads and RoPE are still right
    fewer = {name: w for name, w in weights.items() if "backbone.layers.1" not in name}
    assert read(CONFIG, fewer)[0]["backbone"] == config["backbone"] | {"n_layers": 1}
    with pytest.raises(
        ValueError, match=r"2 layers of 32 with MLPs of 48, q of 64 and k of 32 rows \(known: llama-1B, "
    ):
        read({}, weights)
    for lost in ("backbone.norm.weight", "audio_embeddings.weight", "decoder.layers.0.mlp.gate_proj.weight"):
        with pytest.raises(ValueError, match=f"missing {lost}"):
            read(CONFIG, {name: w for name, w in weights.items() if name != lost})
    with pytest.raises(ValueError, match="known layout; it has 1 keys: some"):
        read(CONFIG, {"some.key": mx.zeros((1,))})


def test_configs(native):
    _, weights = native
    real = read({}, shapes(*SESAME))[0]
    assert {part: real[part] for part in ("backbone", "decoder")} == {p: CSM_1B[p] for p in ("backbone", "decoder")}
    sizes = asdict(mimi.MimiConfig())
    theirs = csm_layouts.transformers_config(CSM_1B, sizes, "bfloat16")
    assert theirs["rope_scaling"] == LLAMA3 | {"original_max_position_embeddings": 1024}  # the other notation
    assert theirs["depth_decoder_config"]["max_position_embeddings"] == 33
    five = {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M", "text_vocab_size": 128_256}
    five |= {"audio_vocab_size": 2051, "audio_num_codebooks": 32}
    for fields in (theirs, theirs | five, {"model_type": "csm"}):
        again, _ = csm_layouts.to_sesame(read(fields, shapes(*SESAME))[0], {}, CSM_1B)
        assert {field: again[field] for field in five} == five
    for field, value in {"hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn"}}.items():
        with pytest.raises(ValueError, match="yarn" if "rope" in field else field):
            read(CONFIG | {field: value}, weights)
    known, codec = csm_layouts.mimi_to_native(*random_mimi(4, 32)[::-1])
    theirs = csm_layouts.mimi_to_transformers(sizes | known, codec)
    for field, value in {"pad_mode": "replicate", "hidden_act": "relu", "rope_scaling": {"factor": 2}}.items():
        with pytest.raises(ValueError, match=field):
            csm_layouts.mimi_to_native(MIMI | {field: value}, theirs)


def test_mimi_of_transformers(native):
    """Its shapes give its sizes, also with a wrong config or none."""
    config, codec = csm_layouts.mimi_to_native(*random_mimi(4, 32)[::-1])
    sizes = json.loads(json.dumps(asdict(mimi.from_weights(codec, config).config)))
    theirs = csm_layouts.mimi_to_transformers(sizes, codec)
    for config in (csm_layouts.transformers_mimi_config(sizes), {"num_attention_heads": 2, "hidden_size": 512}):
        said, read_codec = csm_layouts.mimi_to_native(config, theirs)
        same(read_codec, codec)
        assert json.loads(json.dumps(asdict(mimi.from_weights(read_codec, said).config))) == sizes
    config, weights = native
    whole = {f"codec_model.{name}": w for name, w in theirs.items()} | as_transformers(weights, config)
    inside = csm_layouts.transformers_mimi_config(sizes)
    *_, (_, read_codec) = csm_layouts.csm_to_native(CONFIG | {"codec_config": inside}, whole, CSM_1B)
    same(read_codec, codec)


def test_the_tokenizer_of_an_export():
    """A stock Llama tokenizer: two reserved tokens become the audio tokens, and text gets both marks."""
    from tokenizers import Tokenizer, models

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    t = Tokenizer(models.WordLevel({"hello": 0}, unk_token="hello"))
    t.add_special_tokens(special)
    settings = {"bos_token": special[0], "added_tokens_decoder": {"3": {"content": special[2]}}, "clean": False}
    made, said, ids = csm_layouts.to_transformers_tokenizer(json.loads(t.to_str()), settings, 1, 2)
    t = Tokenizer.from_str(json.dumps(made))
    assert t.encode("hello").ids == [1, 0, 2] and t.token_to_id("<|AUDIO|>") == 3
    assert t.encode("<|audio_eos|>", add_special_tokens=False).ids == [4]
    marks = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
    assert said == {"tokenizer_class": "PreTrainedTokenizerFast", "clean": False} | marks
    assert ids == {"bos_token_id": 1, "eos_token_id": None, "audio_token_id": 3, "audio_eos_token_id": 4} | {
        "pad_token_id": 3
    }
