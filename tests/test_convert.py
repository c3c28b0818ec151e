"""convert.py: round trips give the same bytes, the references load its output, errors are one line."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import csm  # before mlx

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

import convert
import csm_layouts
import mimi
from conftest import clip, random_mimi, write_model, write_tokenizer
from test_layouts import (
    CONFIG,
    CSM_1B,
    GREEDY,
    LLAMA3,
    MIMI,
    NATIVE,
    as_transformers,
    folder,
    random_weights,
    same,
    sesame_names,
)

HERE = Path(__file__).parents[1]


@pytest.fixture
def native():
    return NATIVE, random_weights(NATIVE, mx.bfloat16)


def test_every_layout_says_the_same(tmp_path):
    theirs = CONFIG | {"text_vocab_size": (n := write_tokenizer(tmp_path)), "max_position_embeddings": 256}
    config = NATIVE | {"text_vocab_size": n, "backbone": NATIVE["backbone"] | {"max_positions": 256}}
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
    config = transformers.CsmConfig(**copy.deepcopy(CONFIG | rope))  # it changes its argument
    model = transformers.CsmForConditionalGeneration(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB" if dtype == "float32" else "1GB")
    write_tokenizer(tmp_path / "a")
    assert (tmp_path / "a/model.safetensors").exists() == (dtype == "bfloat16")  # otherwise in shards
    convert.convert(tmp_path / "a", tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c", to="transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "c").bos_token == "<bos>"
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


def test_transformers_processor_of_what_we_write_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = write_model(tmp_path / "a", "k8", voices=False)
    for options in ({}, {"speaker_prefix_space": True}):
        config = json.loads((source / "config.json").read_text()) | options
        (source / "config.json").write_text(json.dumps(config))
        convert.convert(source, tmp_path / "b", to="transformers")
        ours, audio = csm.load(source), clip(0.8)
        turn = csm.Segment(3, "how are you today?", audio)
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "b")
        talk = [{"type": "text", "text": turn.text}, {"type": "audio", "audio": audio}]
        talk = {"role": "3", "content": talk}, {"role": "0", "content": [{"type": "text", "text": "i am fine."}]}
        inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
        ids = [*ours.segment_rows(turn)[:, -1], *ours.text_rows("i am fine.", 0)[:, -1]]
        audio_ids = [processor.audio_token_id] * 10 + [processor.audio_eos_token_id]
        n = ids.index(csm.NO_TEXT)
        # Two texts of different lengths, by a tokenizer whose settings name no padding.
        (source / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
        convert.convert(source, tmp_path / "c", to="transformers")
        two = [[turn] for turn in talk[1:] * 2]
        two[1] = [{"role": "0", "content": [{"type": "text", "text": "yes."}]}]
        padded = transformers.AutoProcessor.from_pretrained(tmp_path / "c").apply_chat_template(
            two, tokenize=True, return_dict=True
        )
        assert padded["attention_mask"].sum(1).tolist() == [len(ours.text_rows(t, 0)) for t in ("i am fine.", "yes.")]
        assert inputs["input_ids"][0].tolist() == [*ids[:n], *audio_ids, *ids[n + 11 :]]
        text = f"[0]{' ' if options else ''}i am fine."
        assert processor(text, add_special_tokens=True)["input_ids"][0].tolist() == ids[n + 11 :]
        model = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path / "b").eval()
        said = model.generate(**inputs, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=1)
        codes = ours.generate_codes("i am fine.", 0, [turn], temperature=0, max_audio_length_ms=80)
        assert said[0].tolist() == codes.tolist()


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
    assert "encoder_transformer.layers.1.in_proj" in native
    convert.convert(tmp_path / "b", tmp_path / "c", to="sesame")
    (file,) = (tmp_path / "c").iterdir()
    same(convert.read(file)[2][1], native)
    back = loaders.get_mimi(file, config, num_codebooks=4)  # strict
    for name, w in model.state_dict().items():
        assert torch.equal(w, back.state_dict()[name]) or name.endswith("_initialized")  # the published file has these
    convert.convert(tmp_path / "b", tmp_path / "d", to="transformers")
    same(convert.read(tmp_path / "d")[2][1], native)


def test_sesame_keeps_what_shapes_do_not_tell_of_mimi(tmp_path):
    """The number of heads."""
    codes = mx.array(np.random.default_rng(0).integers(0, 400, (1, 8, 20)))
    convert.convert(HERE / "tiny/mimi.safetensors", tmp_path / "s", to="sesame")
    theirs, ours = mimi.load(tmp_path / "s"), mimi.load(HERE / "tiny")
    assert theirs.config == ours.config and mx.array_equal(theirs.decode(codes), ours.decode(codes))


def test_no_tokenizer_of_another_model_stays(tmp_path):
    write_model(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    tiny = csm.load("tiny")
    tiny.save(tmp_path)
    assert csm.load(tmp_path).tokenizer.encode("[0]hello") == tiny.tokenizer.encode("[0]hello")


def test_broken_mimi_of_transformers(tmp_path):
    known, native = csm_layouts.mimi_to_native(*random_mimi(4, 32)[::-1])
    config = asdict(mimi.from_weights(native, known).config)
    theirs = csm_layouts.mimi_to_transformers(config, native)
    fields = csm_layouts.transformers_mimi_config(config)
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
    bad("6", ["known layout", "some.key"], {"some.key": mx.zeros((1,))}, config=None)
    bad("7", ["config.json"], config=None)
    bad("8", ["--mimi"], options=("--to", "transformers"))
    bad("9", ["no weights of a CSM"], break_it=lambda path: (path / "model.safetensors").unlink())
    bad("10", ["not a JSON"], break_it=lambda path: (path / "config.json").write_text("{"))
    assert "another folder" in run(source, source).stderr
    assert "no such" in run(tmp_path / "none", tmp_path / "z").stderr and not (tmp_path / "z").exists()


def test_quantized(tmp_path):
    config = NATIVE | {"decoder": NATIVE["decoder"] | {"dim": 32}}
    pack = csm_layouts.quantize(csm.split_heads(random_weights(config, mx.bfloat16)), 4, 32)[0]
    assert pack["audio_head.2.weight"].shape == (35, 4) and pack["audio_head.2.scales"].shape == (35, 1)
    config = config | {"quantization": {"group_size": 32, "bits": 4}}
    same(csm_layouts.csm_to_native(config, pack, CSM_1B)[1], pack)
    source = folder(tmp_path / "a", pack, config)
    convert.convert(source, tmp_path / "b", dtype="float32")
    there = mx.load(str(tmp_path / "b/model.safetensors"))
    assert there["backbone.norm.weight"].dtype == mx.float32 and there["projection.scales"].dtype == mx.bfloat16
    for options in ({"to": "sesame"}, {"quantize": 8}):
        with pytest.raises(ValueError, match="quantized"):
            convert.convert(source, tmp_path / "c", **options)


def test_loading_frees_each_weight_once_it_is_quantized(tmp_path):
    folder = write_model(tmp_path, voices=False)
    config = json.loads((folder / "config.json").read_text()) | {"text_vocab_size": 2_000}
    config["backbone"] |= {"n_layers": 12, "dim": 256}
    weights = random_weights(config, mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    stored = sum(w.nbytes for w in weights.values())
    del weights
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    generator = csm.load(folder, quantize=4)
    needed = mx.get_peak_memory() - before
    assert needed < 0.75 * stored, (needed, stored, generator)
