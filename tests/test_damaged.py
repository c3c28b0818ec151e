"""Model folders with wrong JSON files: one ValueError that names the file, no traceback."""

import argparse
import copy
import json
import math
import random
import shutil
from pathlib import Path

import convert
import csm  # before mlx
import csm_batch

import mlx.core as mx  # isort: skip
import pytest
import soundfile

from conftest import clip, write_model
from csm_tools import adapters, checkpoints, command, finetune, speak
from test_adapters import our_adapter
from test_layouts import folder

WRONG = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7.5,
    1e300,
    -0.0,
    2**31,
    2**70,
    "",
    "x",
    "4",
    "../x",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
)


def places(value, path=()):
    """Yield the path of keys and indices to every place in a JSON value."""
    yield path
    if isinstance(value, dict | list) and len(value) < 100:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutated(value, chance):
    """A copy with one to three places replaced or left out."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        *path, last = chance.choice([place for place in places(value) if place] or [("new",)])
        part = value
        for key in path:
            part = part[key]
        if isinstance(part, dict) and chance.random() < 0.15:
            part.pop(last, None)
        else:
            part[last] = copy.deepcopy(chance.choice(WRONG))
    return value if chance.random() > 0.03 else chance.choice(WRONG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in our layout, in shards, in transformers' layout, and an adapter."""
    base = tmp_path_factory.mktemp("folders")
    write_model(base / "ours", voices=False)
    config = json.loads((base / "ours/config.json").read_text())
    weights = dict(mx.load(str(base / "ours/model.safetensors")))
    convert.convert(base / "ours", base / "transformers", to="transformers")
    convert.convert(base / "ours", base / "sesame", to="sesame")
    shards = {"weight_map": {}}
    for i, name in enumerate(weights):
        shards["weight_map"][name] = f"x-{i % 2}.safetensors"
    for i in range(2):
        part = {name: w for n, (name, w) in enumerate(weights.items()) if n % 2 == i}
        folder(base / "shards", part, config, f"x-{i}.safetensors")
    (base / "shards/model.safetensors.index.json").write_text(json.dumps(shards))
    for name in ("tokenizer.json", "tokenizer_config.json", "mimi.safetensors"):
        (base / "shards" / name).write_bytes((base / "ours" / name).read_bytes())
    settings, tensors = our_adapter(config, ("self_attn", "mlp"))
    folder(base / "adapter", tensors, None, "adapters.safetensors")
    (base / "adapter/adapter_config.json").write_text(json.dumps(settings))
    return base


def try_one(base, kind, name, content):
    """Load with one file's content replaced; returns the exception or None."""
    file = base / kind / name
    before = file.read_bytes()
    file.write_text(json.dumps(content))
    try:
        csm.load(
            base / ("ours" if kind == "adapter" else kind), adapter=base / "adapter" if kind == "adapter" else None
        )
    except Exception as e:
        return e
    finally:
        file.write_bytes(before)


FILES = (
    ("ours", "config.json"),
    ("ours", "config.json"),
    ("ours", "tokenizer.json"),
    ("ours", "tokenizer_config.json"),
    ("transformers", "config.json"),
    ("transformers", "config.json"),
    ("sesame", "config.json"),
    ("shards", "model.safetensors.index.json"),
    ("adapter", "adapter_config.json"),
)


@pytest.mark.slow
def test_500_damaged_folders(folders):
    chance, wrong, refused = random.Random(0), [], 0
    for i in range(500):
        kind, name = FILES[i % len(FILES)]
        content = mutated(json.loads((folders / kind / name).read_text()), chance)
        error = try_one(folders, kind, name, content)
        refused += error is not None
        if error is not None and not (isinstance(error, ValueError) and "\n" not in str(error)):
            wrong.append((kind, name, type(error).__name__, str(error)[:90], str(content)[:200]))
    assert not wrong, f"{len(wrong)} of {refused}: " + "\n".join(map(str, wrong[:100]))


# ---- other things that are wrong with a model's files, each told by its cause --------------------------------------


def refused(match, model, **options):
    with pytest.raises(ValueError, match=match) as e:
        csm.load(model, **options)
    assert "\n" not in str(e.value)


@pytest.fixture
def copied(folders, tmp_path):
    """A function that copies one of `folders`."""

    def copy(name):
        return Path(shutil.copytree(folders / name, tmp_path / name))

    return copy


def test_indexes(copied):
    shards = copied("shards")
    index = shards / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    (name, shard), *_ = names.items()
    for wrong in ({"weight_map": []}, {"weight_map": {}}, {}, {"weight_map": {name: 3}}):
        index.write_text(json.dumps(wrong))
        refused("no weight_map", shards)
    (shards.parent / "other.safetensors").write_bytes((shards / shard).read_bytes())
    for elsewhere in ("../other.safetensors", str(shards.parent / "other.safetensors"), index.name, "x.pt"):
        index.write_text(json.dumps({"weight_map": names | {name: elsewhere}}))
        refused("which is no .safetensors file in its folder", shards)
    # A tensor that two shards have is taken from the one that the index names.
    weights = {shard: dict(mx.load(str(shards / shard))) for shard in set(names.values())}
    expected = weights[shard][name]
    other = next(x for x in weights if x != shard)
    mx.save_safetensors(str(shards / other), weights[other] | {name: expected + 1}, {"format": "pt"})
    for first in (shard, other):
        index.write_text(json.dumps({"weight_map": names | {name: first}}))
        read = checkpoints.read_csm(shards)[1][name]
        assert mx.array_equal(read, expected + (first == other))
    index.unlink()
    for i in (0, 1):
        (shards / f"x-{i}.safetensors").rename(shards / f"model-0000{i + 1}-of-00002.safetensors")
    refused("one of several shards: their index", shards)


def test_names_that_are_not_utf8(copied):
    model = copied("ours")
    for name in ("mimi.safetensors", "model.safetensors"):
        data = (model / name).read_bytes()
        (model / name).write_bytes(data.replace(b"weight", b"we\xffght", 1))
        refused(f"{name} is truncated or not a safetensors file", model)
        (model / name).write_bytes(data)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"backbone": config["backbone"] | {"a\nb": 1}}))
    refused("config.json is not in our layout: .*unexpected keyword argument", model)


def test_names_reach_no_terminal(copied, tmp_path, capfd):
    """Escape sequences in a file do nothing to the terminal that shows the error."""
    model = copied("ours")
    weights = dict(mx.load(str(model / "model.safetensors")))
    mx.save_safetensors(str(model / "model.safetensors"), weights | {"\x1b]0;title\x07": mx.zeros(1)})
    with pytest.raises(SystemExit):
        speak.main(["hello", str(tmp_path / "o.wav"), "--model", str(model)])
    err = capfd.readouterr().err
    assert "unexpected ]0;title" in err and err.rstrip("\n").isprintable()


@pytest.mark.parametrize("text, why", [("", "the text is empty"), ("are " * 600, "positions of 512")])
def test_a_default_voice_that_cannot_be_said(text, why, copied, caplog):
    """It is a warning and no voice; asked for by its name, it is an error."""
    model = copied("ours")
    (model / "prompts").mkdir()
    soundfile.write(model / "prompts/me.wav", clip(1), 24_000)
    (model / "prompts/me.txt").write_text(text)
    generator = csm.load(model)
    options = {"max_audio_length_ms": 400, "seed": 1}
    plain = generator.generate("hello", voice="none", **options)
    assert mx.array_equal(generator.generate("hello", **options), plain)
    assert "speaking without the default voice me: " in caplog.text and why in caplog.text
    with pytest.raises(ValueError, match=why):
        generator.generate("hello", voice="me", **options)


def test_quantized_matrices_of_a_wrong_shape(folders, copied, tmp_path):
    """They are refused when the model is loaded: MLX divides by the bits, which would be 0."""
    convert.convert(folders / "ours", tmp_path / "q8", quantize=8, group_size=32)
    file, name = tmp_path / "q8/model.safetensors", "backbone.layers.0.mlp.gate_proj"
    weights = dict(mx.load(str(file)))
    w, scales, biases = (weights[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    for new, match in (
        ((w[:, :1], scales, biases), "not quantized as MLX does it: .*bits 0"),
        ((w[:, :15], scales, biases), "not quantized as MLX does it: .*bits 7"),
        ((w, scales[:, :0], biases[:, :0]), "not quantized as MLX does it: .*zero"),
        ((w, scales, biases[:, :1]), f"{name}.biases is"),
        ((w[:5], scales, biases), f"{name}.weight is"),
        ((None, scales, biases), "not quantized as MLX does it"),
    ):
        changed = {f"{name}.{part}": x for part, x in zip(("weight", "scales", "biases"), new)}
        changed = {key: x for key, x in (weights | changed).items() if x is not None}
        mx.save_safetensors(str(file), changed)
        refused(match, tmp_path / "q8")
    norm = "backbone.norm"
    mx.save_safetensors(str(file), weights | {f"{norm}.scales": weights[f"{norm}.weight"]})
    refused(f"unexpected {norm}.scales", tmp_path / "q8")


def test_numbers_that_are_not_finite(copied):
    model = copied("ours")
    weights = dict(mx.load(str(model / "model.safetensors")))
    for name, wrong in (("backbone.norm.weight", math.nan), ("audio_head", math.inf), ("decoder.norm.weight", 1e6)):
        changed = weights | {name: mx.where(mx.arange(weights[name].shape[-1]) == 3, wrong, weights[name])}
        mx.save_safetensors(str(model / "model.safetensors"), changed)
        if wrong == 1e6:
            refused("infinite weights: decoder.norm.weight: load it as bfloat16", model, dtype="float16")
            csm.load(model)
        else:
            refused(f"ours has NaN or infinite weights: {name}", model)
    name = "backbone.layers.0.mlp.up_proj.weight"
    mx.save_safetensors(str(model / "model.safetensors"), weights | {name: weights[name] * math.nan})
    generator = csm.load(model)  # checks norms and heads only
    for temperature in (0, 0.9):
        with pytest.raises(ValueError, match="computes NaN or infinite numbers in"):
            generator.generate("hello", voice="none", temperature=temperature, seed=1)
        with pytest.raises(ValueError, match="computes NaN or infinite numbers in"):
            csm_batch.generate(generator, ["hello", "there"], voice="none", temperature=temperature, seed=1)


def test_all_weights_are_checked_if_asked(copied, capfd):
    """--check also names other weights of network and codec; training always checks all."""
    model = copied("ours")
    weights = dict(mx.load(str(model / "model.safetensors")))
    name, codec = "backbone.layers.0.mlp.up_proj.weight", dict(mx.load(str(model / "mimi.safetensors")))
    args = ["hello", str(model.parent / "o.wav"), "--model", str(model), "--voice", "none", "--check"]
    args += ["--max-audio-length-ms", "400"]
    assert speak.main(args) == 0
    mx.save_safetensors(str(model / "model.safetensors"), weights | {name: weights[name] + math.inf})
    (model.parent / "d.json").write_text('[{"text": "hello", "audio_path": "o.wav"}]')
    train = ["train", "--model", str(model), "--data-path", str(model.parent / "d.json"), "--output-dir"]
    for program, given in ((speak, args), (finetune, [*train, str(model.parent / "run")])):
        capfd.readouterr()
        with pytest.raises(SystemExit):
            program.main(given)
        assert f"{model} has NaN or infinite weights: {name}" in capfd.readouterr().err
    mx.save_safetensors(str(model / "model.safetensors"), weights | {name: weights[name] * 1e6})
    with pytest.raises(SystemExit):
        speak.main([*args, "--dtype", "float16"])
    assert f"{name}: load it as bfloat16" in capfd.readouterr().err
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    _, metadata = mx.load(str(model / "mimi.safetensors"), return_metadata=True)
    wrong = {key: w * math.nan if key == "downsample.conv.conv.conv.weight" else w for key, w in codec.items()}
    mx.save_safetensors(str(model / "mimi.safetensors"), wrong, metadata)
    with pytest.raises(SystemExit):
        speak.main(args)
    assert "NaN or infinite weights: downsample" in capfd.readouterr().err


def test_an_old_package_tokenizers(copied, monkeypatch):
    import tokenizers

    model = copied("ours")
    text = json.loads((model / "tokenizer.json").read_text())
    text["model"]["type"] = "Newer"
    (model / "tokenizer.json").write_text(json.dumps(text))
    refused(r"untagged enum \w+ at line 1 column \d+$", model)
    monkeypatch.setattr(tokenizers, "__version__", "0.19.1")
    refused("pip install -U tokenizers", model)


def test_an_adapter_as_a_model(copied, caplog):
    adapter, model = copied("adapter"), copied("ours")
    refused("adapter is an adapter: give it with --adapter", adapter)
    refused("is an adapter: give it with --adapter", adapter / "adapters.safetensors")
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(adapter / name, model)
    (model / "model.safetensors").rename(model / "z.safetensors")
    csm.load(model)
    assert "also has an adapter, which is not applied without --adapter" in caplog.text
    plain, changed = (csm.load(model, adapter=x).model.backbone.layers[0].mlp.up_proj for x in (None, model))
    assert not mx.array_equal(plain.weight, changed.weight)
    # a checkpoint of csm-mlx: step_3/latest.safetensors, and the config above it
    (adapter / "step_3").mkdir()
    (adapter / "adapters.safetensors").rename(adapter / "step_3/latest.safetensors")
    again = csm.load(model, adapter=adapter / "step_3").model.backbone.layers[0].mlp.up_proj
    assert mx.array_equal(changed.weight, again.weight)
    (adapter / "step_3/latest.safetensors").rename(adapter / "latest.safetensors")
    refused("is an adapter: give it with --adapter", adapter)


def test_bitsandbytes(copied):
    model = copied("ours")
    weights = dict(mx.load(str(model / "model.safetensors")))
    name = "backbone_model.layers.0.self_attn.q_proj.weight"
    packed = {f"{name}.absmax": mx.zeros(4), f"{name}.quant_state.bitsandbytes__nf4": mx.zeros(4, mx.uint8)}
    (model / "config.json").unlink()
    mx.save_safetensors(str(model / "model.safetensors"), weights | packed)
    refused("bitsandbytes quantized this checkpoint", model)


def test_the_base_of_an_adapter(copied):
    """Without --model, --adapter loads the base in its config: a path from the adapter's folder or from here."""
    adapter, model = copied("adapter"), copied("ours")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    given = {"model": None, "adapter": [(str(adapter), 1.0)], "dtype": None, "quantize": None, "codebooks": None}
    expected = csm.load(model, adapter=adapter).model.backbone.layers[0].mlp.up_proj.weight
    for base in ({"model": str(model)}, {"model": "../ours"}, {"base_model_name_or_path": "../ours", "model": None}):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | base))
        assert mx.array_equal(
            command.load_for(argparse.Namespace(**given)).model.backbone.layers[0].mlp.up_proj.weight, expected
        )
    for base, plain in (
        ("unsloth/csm-1b-bnb-4bit", "unsloth/csm-1b"),
        ("unsloth/csm-1b-unsloth-bnb-4bit", "unsloth/csm-1b"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"model": base}))
        with pytest.raises(ValueError, match=f"bitsandbytes: give --model {plain}$"):
            command.load_for(argparse.Namespace(**given))


def test_adapters_of_peft_that_are_refused(folders, monkeypatch):
    """Adapters that would give other codes than PEFT, and regular expressions that never end or are none."""
    config = checkpoints.read_csm(folders / "ours")[0]
    a, b = mx.ones((2, 64)), mx.ones((64, 2))
    stem = "base_model.model.backbone_model.layers.0.self_attn.o_proj"
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    settings = {"r": 2, "lora_alpha": 4}
    assert len(adapters.adapter_to_native(config, settings, tensors)) == 2
    for how in ("pissa", "pissa_niter_4", "olora", "loftq"):
        with pytest.raises(ValueError, match=f"init_lora_weights = {how} changes the base"):
            adapters.adapter_to_native(config, settings | {"init_lora_weights": how}, tensors)
    for pattern, match in (
        (r"([\w.]+)+!", "may take for ever"), (r"(?x: ([\w.]|[\w.]) *!)", "may take for ever"),
        (r"([\w.]|[\w.])" * 32 + "!", "may take for ever"), ("(", "unterminated"), ("a**", "multiple repeat"),
        ("(" * 3000 + ")" * 3000, "recursion"), ("a{1,99999999999}", "repetition number"),
    ):  # fmt: skip
        monkeypatch.setattr(adapters, "PATIENCE", 1 if "ever" in match else 60)
        for field in ("rank_pattern", "alpha_pattern"):
            with pytest.raises(ValueError, match=f"{field}.*{match}") as e:
                adapters.adapter_to_native(config, settings | {field: {pattern: 3}}, tensors)
            assert "\n" not in str(e.value)
    monkeypatch.undo()
    for pattern in (
        r"layers\.\d+\.self_attn\..*_proj",
        "o_proj",
        "(q|o)_proj",
        "backbone_model.layers.0.self_attn.o_proj",
    ):
        new = adapters.adapter_to_native(config, settings | {"alpha_pattern": {pattern: 8}}, tensors)
        assert mx.array_equal(new["backbone.layers.0.self_attn.o_proj.lora_b"], 4 * b.T)
    audio = "embed_tokens.embed_audio_tokens", "embed_tokens"
    stems = [
        f"base_model.model.{part}.{name}.weight" for part, name in zip(("backbone_model", "depth_decoder.model"), audio)
    ]
    whole = mx.ones((8 * 67, 64))
    same = adapters.adapter_to_native(config, settings, dict.fromkeys(stems, whole))
    assert list(same) == ["audio_embeddings.weight"]
    with pytest.raises(ValueError, match="two different audio_embeddings"):
        adapters.adapter_to_native(config, settings, dict(zip(stems, (whole, whole + 1))))
