"""csm.load gives the same greedy codes for every format of a checkpoint; tokenizers, adapters, codebooks."""

import json

import convert
import csm  # before mlx
import csm_layouts
from csm_tools import adapters

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from conftest import random_mimi, random_weights, write_model, write_tokenizer
from test_adapters import our_adapter
from test_layouts import CSM_1B, NATIVE, as_transformers, folder, same, sesame_names

GREEDY = {"voice": "none", "temperature": 0, "max_audio_length_ms": 400}
WIDE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 128}
DEEP = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "ffn_dim": 64}
REST = {field: CSM_1B["backbone"][field] for field in ("norm_eps", "rope_theta", "rope_scaling", "max_positions")}


def native(text_vocab):
    """A config whose sizes are divisible by the group size of every quantization."""
    return NATIVE | {"backbone": WIDE | REST, "decoder": DEEP | REST, "text_vocab_size": text_vocab}


def beside(path):
    """Write a model folder's tokenizer and Mimi. Returns the size of the vocabulary."""
    path.mkdir(parents=True, exist_ok=True)
    codec, sizes = random_mimi(4, 32)
    folder(path, codec, None, "mimi.safetensors", {"config": json.dumps(sizes)})
    return write_tokenizer(path)


def forms(config, weights):
    """{who writes this format: (config.json or None, {file name: tensors})}"""
    names = sesame_names(config)
    sesame = {names[name]: w for name, w in weights.items()}
    # transformers' fields beside Sesame's names and sizes, as Marvis' are; some of them wrong
    hybrid = {theirs: config["backbone"][ours] for ours, theirs in csm_layouts.PART_FIELDS}
    hybrid |= {"depth_decoder_config": {theirs: config["decoder"][ours] for ours, theirs in csm_layouts.PART_FIELDS}}
    rope = {"rope_theta": 500000.0, "rope_scaling": REST["rope_scaling"] | {"rope_type": "llama3"}}
    hybrid |= rope | {"vocab_size": 128_256, "audio_vocab_size": 35, "tie_codebooks_embeddings": False}
    hybrid["depth_decoder_config"] |= rope
    half = len(weights) // 2
    parts = dict(list(weights.items())[:half]), dict(list(weights.items())[half:])
    shards = {"weight_map": {name: f"x-{i}.safetensors" for i, part in enumerate(parts) for name in part}}
    return {
        "ours": (config, {"model.safetensors": weights}),
        "csm-mlx": (None, {"ckpt.safetensors": weights}),
        "mlx-audio": (hybrid, {"model.safetensors": {f"model.{name}": w for name, w in weights.items()}}),
        "sesame": ({"backbone_flavor": "made", "decoder_flavor": "small"}, {"model.safetensors": sesame}),
        "sesame, no config": (None, {"model.safetensors": sesame}),
        "sesame, of another": ({"backbone_flavor": "llama-1B"}, {"model.safetensors": sesame}),
        "hybrid": (hybrid, {"model.safetensors": sesame}),
        "transformers": (hybrid | {"vocab_size": 35}, {"model.safetensors": as_transformers(weights, config)}),
        "shards": (config, {f"x-{i}.safetensors": part for i, part in enumerate(parts)}, shards),
        "marvis": (None, {"checkpoint.pt": {"model_state": sesame, "optimizer_state": {"step": 3}}}),
        "module.": (None, {"ckpt.pt": {"state_dict": {f"module.{name}": w for name, w in sesame.items()}}}),
    }


@pytest.fixture
def made(monkeypatch):
    """Register our model as a known flavor, as Marvis' and MisoTTS's are."""
    for name, sizes in (("made", WIDE), ("small", DEEP)):
        monkeypatch.setitem(csm_layouts.FLAVORS, name, tuple(sizes[field] for field in csm_layouts.SIZES))


def write(path, config, files, index=None):
    beside(path)
    for name, content in files.items():
        if name.endswith(".pt"):
            torch = pytest.importorskip("torch")
            ((state, tensors), *others) = content.items()
            tensors = {key: torch.tensor(np.array(w)) for key, w in tensors.items()}
            torch.save({state: tensors, **dict(others)}, path / name)
        else:
            folder(path, content, None, name)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.slow
def test_every_form(tmp_path, made):
    config = native(beside(tmp_path / "first"))
    codes = {}
    for name, form in forms(config, random_weights(config)).items():
        generator = csm.load(write(tmp_path / name, *form))
        assert generator.model.config.audio_num_codebooks == 4
        codes[name] = generator.generate_codes("hello there", **GREEDY).tolist()
    assert len(codes["ours"]) == 5 and len({str(c) for c in codes.values()}) == 1, codes


def quantized(weights, how):
    """Quantize every matrix by how(name), a dict, as `mlx_lm.convert` does; None leaves it as it is."""
    out = {}
    for name, w in weights.items():
        kind = how(name) if w.ndim == 2 else None
        parts = mx.quantize(w, **kind) if kind else [w]
        out |= dict(zip((name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases")), parts))
    return out


AFFINE = {f"{bits} bits": {"group_size": 32 if bits == 3 else 64, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)}
MODES = {mode: {"mode": mode, "group_size": size, "bits": bits} for mode, (size, bits) in csm_layouts.MODES.items()}


@pytest.mark.parametrize("kind", [*AFFINE, *MODES, "mixed", "left out", "heads too"])
def test_quantized(kind, tmp_path):
    """A quantized folder gives the codes of its dequantized matrices; convert's --dequantize makes these."""
    config = native(beside(tmp_path / "a"))
    weights = random_weights(config)  # nn.quantize ignores audio_head, one array
    some = {"mlp": AFFINE["6 bits"], "attn": AFFINE["4 bits"], "embeddings": AFFINE["8 bits"]}
    by_name = {
        "mixed": lambda name: next((how for part, how in some.items() if part in name), MODES["mxfp4"]),
        "left out": lambda name: None if "codebook0_head" in name or "layers.0" in name else AFFINE["4 bits"],
        "heads too": lambda name: AFFINE["4 bits"],
    }
    how = by_name.get(kind, lambda name: (AFFINE | MODES)[kind])
    weights = csm.split_heads(weights) if kind == "heads too" else weights
    pack = quantized(weights, how)
    sizes = csm.CSMConfig.from_dict(config)
    plain = csm_layouts.join_heads(adapters.dequantize_weights(sizes, pack))
    for name, w in weights.items():
        if f"{name.removesuffix('.weight')}.scales" in pack:
            parts = [pack.get(name.replace(".weight", x)) for x in (".weight", ".scales", ".biases")]
            w = mx.dequantize(*parts, **how(name))
        expected = plain if name in plain else csm.split_heads(plain)
        assert mx.array_equal(expected[name], w), name
    said = {}
    for name, tensors in (("a", pack), ("b", plain)):
        write(tmp_path / name, config | {"quantization": {"group_size": 64, "bits": 4}}, {"model.safetensors": tensors})
        said[name] = csm.load(tmp_path / name).generate_codes("hello there", **GREEDY)
    convert.convert(tmp_path / "a", tmp_path / "c", dequantize=True)
    same(convert.read(tmp_path / "c")[1], plain)
    assert len(said["a"]) == 5 and mx.array_equal(said["a"], said["b"])


@pytest.mark.parametrize("how", [4, 6, 8, *csm_layouts.MODES])
def test_quantizing(how, tmp_path):
    """convert and load quantize alike; config.json gets MLX's record."""
    config = native(beside(tmp_path / "a"))
    write(tmp_path / "a", config, {"model.safetensors": random_weights(config)})
    convert.convert(tmp_path / "a", tmp_path / "b", quantize=how)
    note = json.loads((tmp_path / "b/config.json").read_text())["quantization"]
    assert note == MODES.get(how, {"group_size": 64, "bits": how, "mode": "affine"})
    converted, loaded = csm.load(tmp_path / "b"), csm.load(tmp_path / "a", quantize=how)
    codes = converted.generate_codes("hello there", **GREEDY)
    assert codes.shape == (5, 4) and mx.array_equal(codes, loaded.generate_codes("hello there", **GREEDY))
    convert.convert(tmp_path / "b", tmp_path / "c", dequantize=True, to="sesame")
    plain = csm.load(tmp_path / "c").generate_codes("hello there", **GREEDY)
    assert mx.array_equal(codes, plain)
    with pytest.raises(ValueError, match="--dequantize"):
        convert.convert(tmp_path / "b", tmp_path / "d", to="sesame")
    with pytest.raises(ValueError, match="quantized already"):
        convert.convert(tmp_path / "b", tmp_path / "d", quantize=8)


def test_adapters(tmp_path):
    """csm.load's adapter: one, several with factors, on a quantized model; misfits are errors."""
    config = native(beside(tmp_path / "model"))
    weights = random_weights(config)
    write(tmp_path / "model", config, {"model.safetensors": weights})
    changes = {}
    for name, parts in (("a", ("self_attn",)), ("b", ("mlp", "audio_head"))):
        settings, tensors = our_adapter(config, parts)
        folder(tmp_path / name, tensors, None, "adapters.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        changes[name] = adapters.adapter_to_native(config, settings, tensors)

    def codes(**options):
        return csm.load(tmp_path / "model", **options).generate_codes("hello there", **GREEDY).tolist()

    both = adapters.apply_adapter(csm.split_heads(weights), changes["a"])
    both = adapters.apply_adapter(both, changes["b"], 0.5)
    write(tmp_path / "fused", config, {"model.safetensors": csm_layouts.join_heads(both)})
    fused = csm.load(tmp_path / "fused").generate_codes("hello there", **GREEDY).tolist()
    a, b = tmp_path / "a", tmp_path / "b"
    assert codes(adapter=[a, (b, 0.5)]) == codes(adapter=[(str(a), 1.0), (b, 0.5)]) == fused
    assert len({str(c) for c in (fused, codes(), codes(adapter=a), codes(adapter=b), codes(adapter=(b, 0.5)))}) == 5
    # quantized: only changed matrices are dequantized
    pack = csm_layouts.quantize(csm.split_heads(weights), 4, 32)[0]
    write(tmp_path / "model", config, {"model.safetensors": pack})
    model = csm.load(tmp_path / "model", adapter=a).model
    assert (
        "scales" not in model.backbone.layers[0].self_attn.q_proj and "scales" in model.backbone.layers[0].mlp.up_proj
    )
    name = "backbone.layers.1.self_attn.k_proj"
    plain = mx.dequantize(*(pack[f"{name}.{part}"] for part in ("weight", "scales", "biases")), 32, 4)
    change = (changes["a"][f"{name}.lora_a"] @ changes["a"][f"{name}.lora_b"]).T
    assert mx.allclose(model.backbone.layers[1].self_attn.k_proj.weight, plain + change, atol=1e-5)
    (a / "adapter_config.json").write_text(json.dumps({"trained": "elsewhere"}))
    for wrong, match in (
        (a, "not of finetune, PEFT or csm-mlx"),
        (tmp_path / "model", "adapter_config.json and adapters.safetensors"),
    ):
        with pytest.raises(ValueError, match=match):
            codes(adapter=wrong)


def tokenizer(path, special, before=(), after=(), settings=None):
    """Write a word-level tokenizer.json with these special tokens and template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "[", "]", "0", "hello", "there"]
    t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()])
    t.add_special_tokens(list(special))
    if before or after:
        named = [(name, t.token_to_id(name)) for name in (*before, *after)]
        t.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=named)
    path.mkdir()
    t.save(str(path / "tokenizer.json"))
    if settings:
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
        )
    return path / "tokenizer.json"


LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
SMOL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS = {  # name: special tokens, template, tokenizer_config.json, the marks that the port of that model sets
    "llama": (LLAMA, LLAMA[:1], (), dict(zip(("bos_token", "eos_token"), LLAMA)), LLAMA[:2]),
    "llama, no settings": (LLAMA, LLAMA[:1], (), None, LLAMA[:2]),
    "csm of transformers": (LLAMA, LLAMA[:1], LLAMA[1:2], dict(zip(("bos_token", "eos_token"), LLAMA)), LLAMA[:2]),
    "smollm2": (SMOL, (), (), {"bos_token": SMOL[0], "eos_token": SMOL[0]}, SMOL[1:]),
    "smollm2 instruct": (
        SMOL,
        (),
        (),
        {"bos_token": {"content": SMOL[1], "__type": "AddedToken"}, "eos_token": SMOL[2]},
        SMOL[1:],
    ),
    "marvis": (SMOL, SMOL[1:2], SMOL[2:], {"bos_token": SMOL[0], "eos_token": SMOL[0]}, SMOL[1:]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_marks_of_a_text(kind, tmp_path):
    """Ids equal those of the ports (mlx-audio, csm-mlx, Marvis, MisoTTS): a template with these marks."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import processors

    special, before, after, settings, marks = KINDS[kind]
    file = tokenizer(tmp_path / "t", special, before, after, settings)
    port = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")
    named = [(name, port.convert_tokens_to_ids(name)) for name in marks]
    port._tokenizer.post_processor = processors.TemplateProcessing(
        single=[marks[0], "$A", marks[1]], special_tokens=named
    )
    ids = csm.Tokenizer(file).encode("[0]hello there")
    assert ids == port.encode("[0]hello there") == [named[0][1], 1, 3, 2, 4, 5, named[1][1]]
    if after:  # its own template gives the same
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "t").encode("[0]hello there") == ids


def test_a_tokenizer_without_marks(tmp_path, caplog):
    assert csm.Tokenizer(tokenizer(tmp_path / "t", ["<pad>"])).encode("hello there") == [4, 5]
    assert "no begin and end tokens" in caplog.text


def test_the_space_of_misotts(tmp_path):
    generator = csm.load(write_model(tmp_path / "a"))
    for options in ({}, {"speaker_prefix_space": True}):
        config = json.loads((tmp_path / "a/config.json").read_text()) | options
        (tmp_path / "a/config.json").write_text(json.dumps(config))
        rows = csm.load(tmp_path / "a").text_rows("  hello", 3)
        ids = generator.tokenizer.encode("[3] hello" if options else "[3]  hello")
        assert rows[:, -1].tolist() == ids


def test_fewer_codebooks(tmp_path):
    """The depth loop ends early. The backbone gets these codes, but all codes of the context."""
    path = write_model(tmp_path / "a")
    generator, fewer = csm.load(path), csm.load(path, codebooks=3)
    context = [csm.Segment(0, "how are you today?", np.sin(np.arange(24000) / 9).astype(np.float32))]
    codes = fewer.generate_codes("hello there", 0, context, temperature=0, max_audio_length_ms=480)
    # by hand: all 8 codes of the context, then 3 of every generated frame
    model, K = generator.model, 8
    rows = mx.array(np.concatenate([generator.segment_rows(context[0]), generator.text_rows("hello there", 0)]))[None]
    frames = []
    assert csm.row_mask(rows).sum(axis=2).max().item() == K
    for _ in range(6):
        h = model(rows)[:, -1]
        frames.append(model.next_frame(h, lambda i, logits: mx.argmax(logits[:, :64], axis=-1), 3))
        new = mx.pad(frames[-1][:, None], [(0, 0), (0, 0), (0, K - 2)], constant_values=csm.NO_TEXT)
        rows = mx.concatenate([rows, new], axis=1)
    assert codes.tolist() == mx.concatenate(frames).tolist()
    whole = generator.generate_codes("hello there", 0, context, temperature=0, max_audio_length_ms=80)
    assert whole[0, :3].tolist() == codes[0].tolist()  # the first frame's are the same
    audio = fewer.generate("hello there", 0, context, temperature=0, max_audio_length_ms=480)
    assert mx.allclose(audio, fewer.mimi.decode(codes.T[None])[0, 0], atol=1e-5)
    talk = fewer.conversation()
    first, again = (talk.say("hello there", seed=1, max_audio_length_ms=400) for _ in range(2))
    assert len(first) and len(again) and talk.turns[1].codes.shape[1] == 3
    for n in (1, 9):
        with pytest.raises(ValueError, match="codebooks must be 2 to 8"):
            csm.load(path, codebooks=n)
    codec, sizes = random_mimi(5, 64)  # a Mimi with fewer codebooks
    folder(path, codec, None, "mimi.safetensors", {"config": json.dumps(sizes)})
    with pytest.raises(ValueError, match="writes 8 codebooks, its Mimi has 5"):
        csm.load(path)
    short = csm.load(path, codebooks=5)
    assert short.generate_codes("hello", 0, context, seed=1, max_audio_length_ms=160).shape[1] == 5


def test_voice_match_of_a_kind(tmp_path):
    """A Marvis is recognized by its text vocabulary and continues clips, unless its config says no."""
    config = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4}
    config |= {"depth_decoder_config": {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 1e4}}
    for text, fields, match in ((49_152, {}, True), (49_152, {"voice_match": False}, False), (40, {}, False)):
        weights = random_weights(native(text))
        read = csm_layouts.csm_to_native(config | fields, weights, CSM_1B)[0]
        assert csm.CSMConfig.from_dict(read).voice_match == match
