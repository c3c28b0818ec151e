"""Wrong data and checkpoints: the command ends with status 2 and one line that names the cause, and writes no file.

Each case writes files into the folder `here` and returns the command's argument; `model` is a model folder to change.
"""

import json
import math
import re
import shutil
from pathlib import Path

from csm_tools import finetune, speak

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile

from conftest import clip
from test_adapters import our_adapter

GOOD = {"text": "hello there", "audio_path": "c.wav", "speaker": 0}


def one_line(program, args, expected, capfd):
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        program(list(map(str, args)))
    err = capfd.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and re.match(r"\S+: error: ", err), err
    assert re.search(expected, err) and "Traceback" not in err, err


# ---- data -------------------------------------------------------------------------------------------------------


def item(**changed):
    """A data file of one item with changed fields; None removes a field."""

    def write(here):
        turn = {name: value for name, value in (GOOD | changed).items() if value is not None}
        (here / "d.json").write_text(json.dumps([turn]))
        return here / "d.json"

    return write


def content(name, text):
    """A data file with this content, text or bytes."""

    def write(here):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return here / name if "/" not in name else here / Path(name).parent

    return write


def folder_of(*names):
    """A folder with copies of a clip, and texts."""

    def write(here):
        for name in names:
            file = here / "f" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("hello") if name.endswith(".txt") else shutil.copy(here / "c.wav", file)
        return here / "f"

    return write


DATA = {
    "no such file": (lambda here: here / "none.json", "no such file or folder"),
    "an empty list": (content("d.json", "[]"), "holds no conversations"),
    "an empty file": (content("d.json", ""), "holds no conversations"),
    "half a list": (content("d.json", '[{"text": "a"'), "neither a JSON list .* nor JSON lines"),
    "a list in lines, half": (content("d.jsonl", json.dumps(GOOD) + '\n{"text": "ha'), "d.jsonl, line 2"),
    "another encoding": (content("d.json", '[{"text": "é"}]'.encode("latin-1")), "cannot read .*d.json: 'utf-8'"),
    "a string": (content("d.json", '["hello"]'), "item 1: expected"),
    "too deep": (content("d.json", json.dumps([[[GOOD]]])), "item 1: expected"),
    "no text": (item(text=None), "'text' is missing: expected"),
    "an empty text": (item(text=" \n"), "its text is empty"),
    "a number as text": (item(text=3), "its text is empty or not a string"),
    "no clip": (item(audio_path=None), "'audio_path' is missing: expected"),
    "a clip that is not there": (item(audio_path="none.wav"), "no such file: .*none.wav"),
    "a folder as clip": (item(audio_path="."), "no such file"),
    "half a speaker": (item(speaker=1.7), "speaker must be .* not '1.7'"),
    "a speaker below 0": (item(speaker=-1), "speaker must be .* not '-1'"),
    "a huge speaker": (item(speaker=10**30), "speaker must be"),
    "a speaker true": (item(speaker=True), "speaker must be .* 'True'"),
    "a list of speakers": (item(speaker=[0]), r"speaker must be .*\[0\]"),
    "a table of another kind": (content("d.csv", "a;b\n1;2\n"), r"expected id\|text"),
    "a table without clips": (content("d.csv", "text,speaker\nhello,0\n"), "row 2: 'audio_path' is missing"),
    "a comma in a text": (content("d.csv", "audio_path,text,speaker\nc.wav,Hi, you,0\n"), "row 2: more columns"),
    "an endless field": (content("d.csv", "audio_path,text\nc.wav," + "a" * 200_000), "cannot read .*field limit"),
    "a row without text": (content("d.csv", "c|hello\nc\n"), r"row 2: expected id\|text"),
    "a row without its clip": (content("lj/metadata.csv", "x|hello|hello\n"), "row 1: no such file: .*x.wav"),
    "an empty folder": (lambda here: (here / "f").mkdir() or here / "f", "has no clips, and no folders of clips"),
    "a clip without text": (folder_of("a.wav"), "a.wav has no .txt beside it"),
    "a conversation without speakers": (folder_of("talk/a.wav", "talk/a.txt"), "no speaker0, speaker1"),
    "preferences": (
        content("d.json", json.dumps([{"chosen": [GOOD], "rejected": [GOOD]}])),
        "item 1: 'text' is missing",
    ),
}


@pytest.fixture
def here(tmp_path):
    soundfile.write(tmp_path / "c.wav", clip(1.0) + np.float32(0.01), 24000)
    return tmp_path


@pytest.mark.parametrize("case", DATA)
def test_data(case, here, capfd):
    make, expected = DATA[case]
    one_line(finetune.main, ["dataset", make(here), here / "out.json"], expected, capfd)
    assert not (here / "out.json").exists()


def sound(name, samples, **options):
    def write(here):
        soundfile.write(here / name, samples, 24000, **options)
        return item(audio_path=name)(here)

    return write


def bytes_as_clip(name, data):
    return lambda here: content(name, data)(here) and item(audio_path=name)(here)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LFS = "is a Git LFS pointer, not the file: git lfs pull"
HOLE = np.where(np.arange(24000) == 9000, np.nan, clip(1.0))
CLIPS = {
    "no sound": (bytes_as_clip("x.wav", b"not a sound"), "x.wav"),
    "a pointer of Git LFS": (bytes_as_clip("x.wav", POINTER), f"x.wav {LFS}"),
    "an empty clip": (bytes_as_clip("x.flac", b""), "x.flac"),
    "a clip of no samples": (sound("x.wav", np.zeros(0)), "x.wav"),
    "a silent clip": (sound("x.wav", np.zeros(24000)), "x.wav: the clip is silent throughout"),
    "NaN in a WAV": (sound("x.wav", HOLE, subtype="FLOAT"), "x.wav.* NaN or infinite samples"),
    "NaN in a WAV of doubles": (sound("x.wav", HOLE, subtype="DOUBLE"), "x.wav.* NaN or infinite samples"),
    "NaN in an AIFF": (sound("x.aiff", HOLE, subtype="FLOAT"), "x.aiff.* NaN or infinite samples"),
    "codes that are no array": (
        lambda here: content("x.npy", b"x")(here) and item(codes_path="x.npy")(here),
        "x.npy is not an .npy",
    ),
    "codes of another model": (
        lambda here: np.save(here / "x.npy", np.full((3, 8), 2047)) or item(codes_path="x.npy")(here),
        r"x.npy is not an .npy of codes: codes must lie in 0\.\.66",
    ),
}


@pytest.mark.parametrize("case", CLIPS)
def test_clips(case, folder, here, capfd):
    make, expected = CLIPS[case]
    args = ["train", "--model", folder, "--data-path", make(here), "--output-dir", here / "o"]
    one_line(finetune.main, args, expected, capfd)
    assert not (here / "o/config.json").exists()


@pytest.mark.parametrize(
    "command, items, expected",
    [
        ("dpo", [[GOOD]], "'chosen' is missing|expected .*chosen"),
        ("dpo", [{"chosen": [GOOD], "rejected": [GOOD]}], "chosen and rejected are the same"),
        ("kto", [{"segments": [GOOD], "preference": 2}], "preference 2"),
        ("kto", [{"segments": [GOOD]}], "'preference'"),
    ],
)
def test_preferences(command, items, expected, folder, here, capfd):
    (here / "d.json").write_text(json.dumps(items))
    args = [command, "--model", folder, "--data-path", here / "d.json", "--output-dir", here / "o"]
    one_line(finetune.main, args, expected, capfd)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def tensors(change):
    """A model with changed tensors."""

    def make(model):
        weights = change(dict(mx.load(str(model / "model.safetensors"))))
        mx.save_safetensors(str(model / "model.safetensors"), weights)

    return make


def file(name, data):
    """A model with a file's content replaced by `data` or data(content)."""

    def make(model):
        before = (model / name).read_bytes() if (model / name).exists() else b""
        after = data(before) if callable(data) else data
        (model / name).write_bytes(after if isinstance(after, bytes) else after.encode())

    return make


def sharded(index=None, names=("x-0.safetensors", "x-1.safetensors")):
    """A model in two shards; index(weight_map) changes the index, None leaves it out."""

    def make(model):
        weights = dict(mx.load(str(model / "model.safetensors")))
        (model / "model.safetensors").unlink()
        placed = {name: names[i % 2] for i, name in enumerate(weights)}
        for shard in names:
            mx.save_safetensors(str(model / shard), {name: weights[name] for name in placed if placed[name] == shard})
        if index:
            (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index(placed)}))

    return make


def only(name, data=b""):
    """A model with this file instead of the weights."""

    def make(model):
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(data)

    return make


def without(part):
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


NORM, UP = "backbone.norm.weight", "backbone.layers.0.mlp.up_proj.weight"
PACKED = {f"{UP}.absmax": mx.zeros(4), f"{UP}.quant_state.bitsandbytes__nf4": mx.zeros(4, mx.uint8)}
ELSEWHERE = "names '../other.safetensors', which is no .safetensors file in its folder"
CHECKPOINTS = {
    "an empty folder": (lambda model: shutil.rmtree(model) or model.mkdir(), "no weights of a CSM"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no weights of a CSM"),
    "an index of nothing": (sharded(lambda placed: []), "no weight_map"),
    "an index of one string": (sharded(lambda placed: "x-0.safetensors"), "no weight_map"),
    "an index of numbers": (sharded(lambda placed: dict.fromkeys(placed, 1)), "no weight_map"),
    "an index outside": (sharded(lambda placed: placed | {NORM: "../other.safetensors"}), ELSEWHERE),
    "an index of a shard that is gone": (sharded(lambda placed: placed | {NORM: "x-9.safetensors"}), "x-9.safetensors"),
    "a shard without its index": (
        sharded(names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")),
        "one of several shards: their index",
    ),
    "half a file": (file("model.safetensors", lambda x: x[: len(x) // 2]), "model.safetensors.*(truncated|incomplete)"),
    "an empty file": (file("model.safetensors", b""), "model.safetensors"),
    "a header of 8 EB": (file("model.safetensors", b"\xff" * 7 + b"\x7f{}"), "model.safetensors"),
    "a page of HTML": (file("model.safetensors", "<html>Sign in</html>" * 9), "model.safetensors"),
    "a pointer to the weights": (file("model.safetensors", POINTER), f"model.safetensors {LFS}"),
    "a pointer to the codec": (file("mimi.safetensors", POINTER), f"mimi.safetensors {LFS}"),
    "a pointer to the tokenizer": (file("tokenizer.json", POINTER), f"tokenizer.json {LFS}"),
    "a .pt that is a pointer": (only("ckpt.pt", POINTER), f"ckpt.pt {LFS}"),
    "a .gguf that is a pointer": (only("q.gguf", POINTER), f"q.gguf {LFS}"),
    "a pointer to a shard": (
        lambda model: sharded(lambda placed: placed)(model) or (model / "x-1.safetensors").write_bytes(POINTER),
        f"x-1.safetensors {LFS}",
    ),
    "a tensor that is missing": (tensors(without("decoder.norm")), "missing decoder.norm.weight"),
    "a tensor too many": (tensors(lambda w: w | {"more": mx.zeros(1)}), "unexpected more"),
    "a tensor of another shape": (tensors(lambda w: w | {NORM: mx.zeros(3)}), rf"{NORM} is \(3,\), not \(64,\)"),
    "whole numbers": (tensors(lambda w: w | {NORM: w[NORM].astype(mx.int8)}), f"no floats: {NORM} is"),
    "NaN in a norm": (tensors(lambda w: w | {NORM: w[NORM] * math.nan}), f"NaN or infinite weights: {NORM}"),
    "infinite heads": (tensors(lambda w: w | {"audio_head": w["audio_head"] + math.inf}), "infinite weights: audio"),
    "bitsandbytes": (
        lambda model: tensors(lambda w: w | PACKED)(model) or (model / "config.json").unlink(),
        "bitsandbytes quantized this checkpoint",
    ),
    "another model": (
        lambda model: only("model.safetensors")(model) or mx.save_safetensors(
            str(model / "model.safetensors"), {"transformer.wte.weight": mx.zeros((3, 3))}),
        "transformer.wte|missing|config",
    ),
    "a config that is no JSON": (file("config.json", "{"), "config.json is not a JSON"),
    "a config that is a list": (file("config.json", "[]"), "config.json"),
    "a config of another size": (file("config.json", lambda x: x.replace(b'layers": 2', b'layers": 3')), "missing"),
    "a config of a wrong type": (file("config.json", lambda x: x.replace(b'heads": 4', b'heads": "4"')), "config"),
    "a tokenizer that is no JSON": (file("tokenizer.json", "{"), "tokenizer.json is not a tokenizer"),
    "a tokenizer of more texts": (
        tensors(lambda w: w | {"text_embeddings.weight": w["text_embeddings.weight"][:20]}), "text_embeddings"),
    "a codec that is cut off": (file("mimi.safetensors", lambda x: x[:5000]), "mimi.safetensors"),
    "a .pt of text": (only("ckpt.pt", b"hello"), "ckpt.pt is truncated or not a PyTorch checkpoint"),
    "a .gguf of text": (only("q.gguf", b"hello" * 9), "q.gguf.*does not begin with GGUF"),
    "a .gguf that is cut off": (only("q.gguf", b"GGUF\3\0\0\0"), "q.gguf.*truncated"),
}  # fmt: skip


@pytest.fixture
def model(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


def speaks_not(model, expected, capfd, *options):
    out = model.parent / "out.wav"
    one_line(speak.main, ["hello", out, "--model", model, "--voice", "none", *options], expected, capfd)
    assert not out.exists()


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case, model, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, expected = CHECKPOINTS[case]
    make(model)
    speaks_not(model, expected, capfd)


def settings(**changed):
    """An adapter with a changed config."""

    def make(adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | changed))

    return make


def peft(**changed):
    """PEFT's adapter."""

    def make(adapter):
        (adapter / "adapters.safetensors").unlink()
        stem = "base_model.model.backbone_model.layers.0.self_attn.o_proj"
        both = {f"{stem}.lora_A.weight": mx.ones((2, 64)), f"{stem}.lora_B.weight": mx.ones((64, 2))}
        mx.save_safetensors(str(adapter / "adapter_model.safetensors"), both)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | changed
        (adapter / "adapter_config.json").write_text(json.dumps(config))

    return make


def moved(adapter):
    (adapter / "step_3").mkdir()
    (adapter / "adapters.safetensors").rename(adapter / "step_3/latest.safetensors")
    (adapter / "adapter_config.json").unlink()


ADAPTERS = {
    "no such folder": (shutil.rmtree, "adapter"),
    "an adapter without its config": (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "an adapter without weights": (lambda a: (a / "adapters.safetensors").unlink(), "has no adapter_config.json and"),
    "a config of nothing": (file("adapter_config.json", "{}"), "adapter_config.json"),
    "a config that is no JSON": (file("adapter_config.json", "{"), "adapter_config.json is not a JSON"),
    "a rank of text": (settings(rank="x"), "a field of adapter_config.json is wrong"),
    "a rank of 0": (settings(rank=0), "a field of adapter_config.json is wrong"),
    "an adapter that is cut off": (file("adapters.safetensors", lambda x: x[:900]), "adapters.safetensors"),
    "an adapter for another size": (
        lambda a: mx.save_safetensors(str(a / "adapters.safetensors"), {
            "backbone.layers.0.self_attn.q_proj.lora_a": mx.ones((99, 2)),
            "backbone.layers.0.self_attn.q_proj.lora_b": mx.ones((2, 64))}),
        "for another model, or a quantized one"),
    "a step of csm-mlx alone": (moved, "adapter_config.json"),
    "PiSSA": (peft(init_lora_weights="pissa"), "init_lora_weights = pissa changes the base"),
    "PiSSA in steps": (peft(init_lora_weights="pissa_niter_16"), "pissa_niter_16 changes the base"),
    "OLoRA": (peft(init_lora_weights="olora"), "init_lora_weights = olora changes the base"),
    "an endless pattern": (peft(rank_pattern={r"([\w.]+)+!": 2}), "may take for ever"),
    "another method of PEFT": (peft(peft_type="ADALORA"), "peft_type = ADALORA: only PEFT's LORA"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, model, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, expected = ADAPTERS[case]
    adapter = model.parent / "adapter"
    adapter.mkdir()
    config, trained = our_adapter(json.loads((model / "config.json").read_text()), ("self_attn", "mlp"))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), trained)
    make(adapter)
    place = adapter / "step_3" if case == "a step of csm-mlx alone" else adapter
    speaks_not(model, expected, capfd, "--adapter", place)


def test_an_adapter_is_no_model_and_names_its_base(model, capfd, monkeypatch):
    adapter = model.parent / "adapter"
    adapter.mkdir()
    peft_files = {"peft_type": "LORA", "base_model_name_or_path": "unsloth/csm-1b-bnb-4bit", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(peft_files))
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), {"x.lora_A.weight": mx.ones((2, 64))})
    speaks_not(adapter, "is an adapter: give it with --adapter", capfd)
    args = ["hello", model.parent / "out.wav", "--adapter", adapter]
    monkeypatch.delenv("CSM_MODEL", raising=False)
    one_line(speak.main, args, "quantized by bitsandbytes: give --model unsloth/csm-1b$", capfd)


def test_an_old_package_tokenizers(model, capfd, monkeypatch):
    import tokenizers

    text = json.loads((model / "tokenizer.json").read_text())
    text["model"]["type"] = "Newer"
    (model / "tokenizer.json").write_text(json.dumps(text))
    monkeypatch.setattr(tokenizers, "__version__", "0.19.1")
    speaks_not(model, r"newer than the package tokenizers: pip install -U tokenizers", capfd)


def test_there_are_more_than_forty():
    assert len(DATA) + len(CLIPS) >= 36 and len(CHECKPOINTS) + len(ADAPTERS) >= 45
