"""convert.py: every layout in, the same bytes back out; the references load what it writes; errors are one line."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import csm  # first: it puts a fast BLAS in place before mlx is imported

import mlx.core as mx  # isort: skip
import pytest
from mlx.utils import tree_flatten

import convert
import mimi
from conftest import random_mimi, write_tokenizer

HERE = Path(__file__).parent
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
# fmt: on
GREEDY = {"voice": "none", "temperature": 0, "max_audio_length_ms": 800}


def same(a, b):
    """The same names, types, shapes and bytes."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:4]
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert bytes(memoryview(a[name].view(mx.uint8))) == bytes(memoryview(b[name].view(mx.uint8))), name


def random_weights(config, dtype=mx.float32):
    """{name: array} of our layout, no two alike."""
    shapes = {n: w.shape for n, w in tree_flatten(csm.CSM(csm.CSMConfig.from_dict(config)).parameters())}
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return csm.join_heads({n: mx.random.normal(s, key=k).astype(dtype) for (n, s), k in zip(shapes.items(), keys)})


def folder(path, weights, config=None, name="model.safetensors", metadata=None):
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / name), weights, metadata or {"format": "pt"})
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def sesame_names(config):
    """The torchtune layout, written out by hand."""
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
    """Row by row, on purpose not as convert.py does it."""
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
    config = convert.csm_config(CONFIG)
    return config, random_weights(config, mx.bfloat16)


def test_one_model_under_three_namings(native, tmp_path):
    config, weights = native
    same(convert.csm_weights(weights, config), weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {f"model.{name}": w for name, w in weights.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(convert.read(tmp_path)[1], weights)  # as mlx-audio saves
    names = sesame_names(config)
    same(convert.csm_weights({names[name]: w for name, w in weights.items()}, config), weights)
    same(convert.csm_weights(as_transformers(weights, config), config), weights)


def test_tied_embedding_and_buffers(tmp_path, native):
    config, weights = native
    theirs = as_transformers(weights, config)
    theirs["depth_decoder.model.embed_tokens.weight"] = theirs["backbone_model.embed_tokens.embed_audio_tokens.weight"]
    theirs["backbone_model.rotary_emb.inv_freq"] = mx.zeros((4,))
    same(convert.read(folder(tmp_path, theirs, CONFIG))[1], weights)


def test_every_layout_says_the_same(tmp_path):
    theirs = CONFIG | {"text_vocab_size": (n := write_tokenizer(tmp_path)), "max_position_embeddings": 256}
    config = convert.csm_config(theirs)
    weights, names = random_weights(config), sesame_names(config)
    codec, sizes = random_mimi(4, 32)
    layouts = {
        "transformers": (as_transformers(weights, config), theirs),
        "sesame": ({names[n]: w for n, w in weights.items()}, {f: v for f, v in config.items() if f != "layout"}),
        "native": (weights, config),
    }
    for name, content in layouts.items():
        folder(tmp_path / name, *content)
        folder(tmp_path / name, codec, None, "mimi.safetensors", {"config": json.dumps(sizes)})
        write_tokenizer(tmp_path / name)
    convert.convert(tmp_path / "transformers", tmp_path / "converted")
    said = [csm.load(tmp_path / name).generate_codes("hello", **GREEDY) for name in (*layouts, "converted")]
    assert n > 100 and said[0].shape == (10, 4)
    assert all(mx.array_equal(said[0], other) for other in said[1:])
    for bits in (4, 8):
        convert.convert(tmp_path / "native", tmp_path / f"q{bits}", quantize=bits, group_size=32)
        model = csm.load(tmp_path / f"q{bits}")
        assert model.model.text_embeddings.weight.dtype == mx.uint32
        at_load = csm.load(tmp_path / "native", quantize=bits, group_size=32)
        codes = model.generate_codes("hello", **GREEDY)
        assert codes.shape == (10, 4) and mx.array_equal(codes, at_load.generate_codes("hello", **GREEDY))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("how", ["file", "shards", "torch"])
def test_sesame_there_and_back(tmp_path, native, dtype, how):
    config, weights = native
    names = sesame_names(config)
    stored = {names[n]: w.astype(getattr(mx, dtype)) for n, w in weights.items()}
    source = folder(tmp_path / "a", stored, {f: v for f, v in config.items() if f != "layout"})
    if how == "shards":
        half = len(stored) // 2
        shards = {"x-1.safetensors": list(stored)[:half], "x-2.safetensors": list(stored)[half:]}
        for shard, keys in shards.items():
            folder(source, {name: stored[name] for name in keys}, name=shard)
        index = {"weight_map": {name: shard for shard, keys in shards.items() for name in keys}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    if how == "torch":
        torch, st = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
        torch.save({"model": st.load_file(source / "model.safetensors")}, source / "ckpt.pt")
    if how != "file":
        (source / "model.safetensors").unlink()
    convert.convert(source, tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text()) == config
    convert.convert(tmp_path / "b", tmp_path / "c", to="sesame")
    same(mx.load(str(tmp_path / "c/model.safetensors")), stored)
    same(convert.read(tmp_path / "c")[1], convert.read(tmp_path / "b")[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rope", [{"rope_theta": 7000.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3 | {"rope_theta": 9e3}}]
)
def test_transformers_loads_what_we_write_back(tmp_path, dtype, rope):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CsmConfig(**copy.deepcopy(CONFIG | rope))  # it changes what it is given
    model = transformers.CsmForConditionalGeneration(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB" if dtype == "float32" else "1GB")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    assert (tmp_path / "a/model.safetensors").exists() == (dtype == "bfloat16")  # else it is in shards
    convert.convert(tmp_path / "a", tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c", to="transformers")
    assert (tmp_path / "c/tokenizer.json").read_text() == "{}"
    stored = {}
    for shard in (tmp_path / "a").glob("*.safetensors"):
        stored |= mx.load(str(shard))
    same(mx.load(str(tmp_path / "c/model.safetensors")), stored)
    load = transformers.CsmForConditionalGeneration.from_pretrained
    back, info = load(tmp_path / "c", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for ours, theirs in ((back.config, config), (back.config.depth_decoder_config, config.depth_decoder_config)):
        assert {**ours.rope_parameters} == {**theirs.rope_parameters}
    assert back.config.codec_config.rope_parameters == config.codec_config.rope_parameters
    original = load(tmp_path / "a")
    assert back.dtype == original.dtype
    ids = torch.randint(0, 30, (1, 6, 4))
    with torch.no_grad():
        for call in (lambda m: m(input_ids=ids).logits, lambda m: m(input_ids=torch.arange(5)[None] + 5).logits):
            assert torch.equal(call(original), call(back))
        codes = torch.randint(0, 32, (1, 4, 9))
        assert torch.equal(*(m.codec_model.decode(codes).audio_values for m in (original, back)))


def test_mimi_of_transformers_there_and_back(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.MimiModel(transformers.MimiConfig(**MIMI, num_residual_layers=2)).eval()
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["mimi.safetensors"]
    convert.convert(tmp_path / "b", tmp_path / "c", to="transformers")
    same(*(mx.load(str(tmp_path / f"{x}/model.safetensors")) for x in "ac"))
    back, info = transformers.MimiModel.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    audio = torch.randn(1, 1, 24 * 40)
    with torch.no_grad():
        assert torch.equal(model.encode(audio).audio_codes, back.encode(audio).audio_codes)
        assert torch.equal(model(audio).audio_values, back(audio).audio_values)


def test_mimi_of_kyutai_there_and_back(tmp_path):
    loaders = pytest.importorskip("moshi.models.loaders")
    st, torch = pytest.importorskip("safetensors.torch"), pytest.importorskip("torch")
    sizes = {"seanet": {"n_filters": 4, "dimension": 32}, "quantizer": {"dimension": 16, "n_q": 4, "bins": 32}}
    sizes["quantizer"] |= {"input_dimension": 32, "output_dimension": 32}
    sizes["transformer"] = {"d_model": 32, "num_layers": 2, "dim_feedforward": 64, "input_dimension": 32}
    sizes["transformer"]["output_dimensions"] = [32]
    config = {k: v | sizes.get(k, {}) if isinstance(v, dict) else v for k, v in loaders._mimi_config.items()}
    model = loaders.get_mimi(None, config, num_codebooks=4)
    (tmp_path / "a").mkdir()
    st.save_file(model.state_dict(), tmp_path / "a/tokenizer-x.safetensors")  # with moshi's newer names
    convert.convert(tmp_path / "a/tokenizer-x.safetensors", tmp_path / "b")
    native, metadata = mx.load(str(tmp_path / "b/mimi.safetensors"), return_metadata=True)
    sizes = json.loads(metadata["config"])
    assert sizes["n_codebooks"] == 4 and sizes["ratios"] == [8, 6, 5, 4]
    assert "encoder_transformer.transformer.layers.1.self_attn.in_proj_weight" in native
    convert.convert(tmp_path / "b", tmp_path / "c", to="sesame")
    (file,) = (tmp_path / "c").iterdir()
    same(mx.load(str(file)), native)
    same(convert.read(file)[2][1], native)
    back = loaders.get_mimi(file, config, num_codebooks=4)  # strict
    assert all(torch.equal(w, back.state_dict()[name]) for name, w in model.state_dict().items())
    convert.convert(tmp_path / "b", tmp_path / "d", to="transformers")
    same(convert.read(tmp_path / "d")[2][1], native)


def test_broken_mimi_of_transformers(tmp_path):
    native, sizes = random_mimi(4, 32)
    config = asdict(mimi.from_weights(native, sizes).config)
    theirs, fields = convert.transformers_mimi(native, config), convert.write_mimi_config(config)
    same(convert.read(folder(tmp_path / "a", theirs, fields))[2][1], native)
    layer = "encoder_transformer.layers.0.self_attn."
    for x in "qkv":
        part = {name: w for name, w in theirs.items() if name != f"{layer}{x}_proj.weight"}
        with pytest.raises(ValueError, match=r"missing encoder_transformer\.layers\.0\.in_proj"):
            convert.convert(folder(tmp_path / x, part, fields), tmp_path / "out")
    for name, expected in ((f"{layer}q_proj.weight", "q_proj"), ("encoder.layers.0.conv.weight", r"\(3, 3, 3\), not")):
        with pytest.raises(ValueError, match=expected):
            convert.convert(folder(tmp_path / "b", theirs | {name: mx.zeros((3, 3, 3))}, fields), tmp_path / "out")
    with pytest.raises(ValueError, match=r"unexpected some\.key"):
        convert.convert(folder(tmp_path / "c", theirs | {"some.key": mx.zeros((1,))}, fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupt_leaves_nothing(tmp_path, native, monkeypatch):
    def stop(path, *content):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    source = folder(tmp_path / "a", native[1], native[0])
    monkeypatch.setattr(mx, "save_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, tmp_path / "b")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_configs():
    five = {"backbone_flavor": "llama-8B", "decoder_flavor": "llama-300M", "audio_num_codebooks": 16}
    five["voice_match"] = True
    config = convert.csm_config(five | {"text_vocab_size": 7, "audio_vocab_size": 9, "unknown": 1})
    assert config["backbone"]["head_dim"] == 128 and config["decoder"]["n_kv_heads"] == 6 and "unknown" not in config
    assert config["audio_num_codebooks"] == 16 and config["voice_match"] and convert.csm_config(config) == config
    assert {f: convert.write_sesame_config(config)[f] for f in five} == five
    real = convert.csm_config({"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"})
    parameters = tree_flatten(csm.CSM(csm.CSMConfig.from_dict(real)).parameters())
    assert len(parameters) - 31 + 1 == 187 and sum(w.size for _, w in parameters) == 1_552_791_552
    theirs = convert.write_transformers_config(real, convert.mimi_config({}), "bfloat16")
    assert theirs["rope_scaling"] == LLAMA3 | {"original_max_position_embeddings": 1024}  # the other notation
    again = convert.csm_config(theirs | five)  # transformers' fields before the flavors
    assert again["backbone"]["dim"] == 2048 and convert.write_sesame_config(again)["backbone_flavor"] == "llama-1B"
    assert convert.csm_config({"model_type": "csm"})["backbone"]["rope_theta"] == 500000.0
    other = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "tie_codebooks_embeddings": False}
    for field, value in (other | {"rope_parameters": {"rope_type": "yarn"}}).items():
        with pytest.raises(ValueError, match="yarn" if "rope" in field else field):
            convert.csm_config(CONFIG | {field: value})
    with pytest.raises(ValueError, match="llama-300M"):
        convert.csm_config({"backbone_flavor": "llama-2B"})
    for field, value in {"pad_mode": "replicate", "upsample_groups": 1, "frame_rate": 50.0, "head_dim": 4}.items():
        with pytest.raises(ValueError, match=field):
            convert.mimi_config(MIMI | {field: value})


def run(*arguments):
    command = [sys.executable, str(HERE / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_command_and_its_errors(tmp_path, native):
    config, weights = native
    source = folder(tmp_path / "a", weights, config)
    folder(tmp_path / "m", random_mimi(4, 32)[0], None, "mimi.safetensors")
    (source / "prompts").mkdir()
    (source / "prompts/v.txt").write_text("hello")
    (source / "tokenizer.json").write_text("{}")
    done = run(source, tmp_path / "b", "--mimi", tmp_path / "m", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "mimi.safetensors" in done.stdout and (tmp_path / "b/prompts/v.txt").read_text() == "hello"
    before = {f.name: f.read_bytes() for f in (tmp_path / "b").glob("*.*")}
    assert {w.dtype for w in convert.read(tmp_path / "b")[1].values()} == {mx.float32}

    def bad(name, expected, weights=weights, config=config, break_it=lambda path: None, options=()):
        path = folder(tmp_path / name, weights, config)
        break_it(path)
        done = run(path, tmp_path / "b", *options)
        assert done.returncode == 2 and done.stderr.startswith("convert.py: error: "), done.stderr
        assert done.stderr.count("\n") == 1 and all(word in done.stderr for word in expected), done.stderr
        assert {f.name: f.read_bytes() for f in (tmp_path / "b").glob("*.*")} == before
        assert not list(tmp_path.glob(".b*"))

    def truncate(path):
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])

    def shard(path):
        (path / "model.safetensors").unlink()
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone-1.safetensors"}}')

    norm, q = "backbone.norm.weight", "backbone.layers.1.self_attn.q_proj.weight"
    bad("1", ["missing " + norm], {name: w for name, w in weights.items() if name != norm})
    bad("2", ["unexpected lora.x"], weights | {"lora.x": mx.zeros((1,))})
    bad("3", [f"{q} is (3, 3), not (64, 32)"], weights | {q: mx.zeros((3, 3))})
    bad("4", ["truncated"], break_it=truncate)
    bad("5", ["gone-1.safetensors"], break_it=shard)
    bad("6", ["known layout", "some.key"], {"some.key": mx.zeros((1,))})
    bad("7", ["config.json"], config=None)
    bad("8", ["--mimi"], options=("--to", "transformers"))
    bad("9", ["no checkpoint"], break_it=lambda path: (path / "model.safetensors").unlink())
    bad("10", ["not a JSON"], break_it=lambda path: (path / "config.json").write_text("{"))
    assert "another folder" in run(source, source).stderr
    assert "no such" in run(tmp_path / "none", tmp_path / "z").stderr and not (tmp_path / "z").exists()


def test_quantized(tmp_path):
    config = convert.csm_config(CONFIG | {"depth_decoder_config": DEPTH | {"hidden_size": 32}})
    pack = csm.quantize_weights(random_weights(config, mx.bfloat16), 4, 32)
    assert pack["audio_head.2.weight"].shape == (35, 4) and pack["audio_head.2.scales"].shape == (35, 1)
    config = config | {"quantization": {"group_size": 32, "bits": 4}}
    same(convert.csm_weights(pack, config), pack)
    source = folder(tmp_path / "a", pack, config)
    convert.convert(source, tmp_path / "b", dtype="float32")
    there = mx.load(str(tmp_path / "b/model.safetensors"))
    assert there["backbone.norm.weight"].dtype == mx.float32 and there["projection.scales"].dtype == mx.bfloat16
    for options in ({"to": "sesame"}, {"quantize": 8}):
        with pytest.raises(ValueError, match="quantized"):
            convert.convert(source, tmp_path / "c", **options)
