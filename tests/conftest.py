"""Small random models for all tests.

They compute in float32 on any device. With CSM_TEST_DTYPE=bfloat16 or float16 they use that type wherever a test names
none, as on a GPU. On a CPU in float32, codes must be identical and logits within 1e-4. Elsewhere (a GPU adds in another
order) the bounds are wider, and only most codes of the first frame must agree, because one different code changes all
that follow.
"""

import inspect
import json
import logging
import os
import re
import signal
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # otherwise GPUs round factors of float32 products to 10 bits
import csm  # before mlx
import csm_layouts

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it, and background jobs ignore it
DTYPE = os.environ.get("CSM_TEST_DTYPE", "float32")
EXACT = DTYPE == "float32" and mx.default_device() == mx.cpu
LOGITS = 1e-4 if EXACT else 0.02 if DTYPE == "float32" else 0.3  # allowed error; their spread is about 3

if DTYPE != "float32":
    csm.as_dtype = lambda dtype, own=csm.as_dtype: own(dtype or DTYPE)

# ------------------------------------------------------------------- what a bare `pytest` leaves out

left_out = {"files": 0, "tests": 0}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run also what is slow or needs other packages")


def runs_all(config):
    """Whether to run slow tests too: with --all, or if a file is named."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return config.getoption("--all") or (named and any(Path(arg.split("::")[0]).is_file() for arg in config.args))


def pytest_ignore_collect(collection_path, config):
    """Leave out a file that needs another package at import."""
    if collection_path.suffix != ".py" or runs_all(config):
        return None
    if not re.search(r"^\S.*importorskip\(", collection_path.read_text(encoding="utf-8"), re.M):
        return None
    left_out["files"] += 1
    return True


def needs_a_package(item):
    """Whether the test or one of its fixtures skips without a package."""
    fixtures = [f.func for fs in item._fixtureinfo.name2fixturedefs.values() for f in fs]
    return any("importorskip" in inspect.getsource(f) for f in (item.function, *fixtures))


def pytest_collection_modifyitems(config, items):
    if runs_all(config):
        return
    left = [item for item in items if item.get_closest_marker("slow") or needs_a_package(item)]
    left_out["tests"] = len(left)
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter):
    if any(left_out.values()):
        what = f"{left_out['tests']} tests and {left_out['files']} files that are slow or need other packages"
        terminalreporter.write_line(f"left out: {what}; `pytest --all` runs them (see CONTRIBUTING.md)")


# ------------------------------------------------------------------------------------ small models

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 1024,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
WORDS = "hello there , how are you today ? i am fine . yes no ä ö 你 0 1 2 3".split()

# name -> codebooks, code values, backbone and decoder (layers, dim, heads, kv heads, head dim, ffn, rope)
SHAPES = {
    "k8": (8, 64, (2, 64, 4, 2, 16, 128, PLAIN), (2, 32, 4, 1, 8, 64, PLAIN)),
    "k32": (32, 128, (2, 96, 6, 2, 32, 160, LLAMA3), (2, 48, 3, 3, 16, 96, LLAMA3)),
    "k4": (4, 32, (3, 128, 4, 4, 32, 128, PLAIN), (1, 64, 8, 2, 8, 128, LLAMA3)),
    "1b-wide": (32, 2048, (2, 2048, 32, 8, 64, 8192, LLAMA3), (1, 1024, 8, 2, 128, 8192, LLAMA3)),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|AUDIO|>", "<|audio_eos|>"]


def write_tokenizer(folder):
    """A word-level tokenizer.json with every character as fallback."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab = {w: i for i, w in enumerate([*SPECIAL, *dict.fromkeys([*WORDS, "[", "]", *map(chr, range(32, 127))])])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    t.normalizer = normalizers.Lowercase()
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|."), "isolated")
    t.add_special_tokens(SPECIAL)
    t.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return len(vocab)


def native_config(shape, text_vocab):
    """config.json in our layout for one of SHAPES."""
    K, n_codes, *parts = SHAPES[shape]
    names = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
    llamas = [
        dict(zip(names, p), rope_theta=p[6]["rope_theta"], max_positions=512,
             rope_scaling=None if p[6] is PLAIN else {k: v for k, v in LLAMA3.items() if not k.startswith("rope")})
        for p in parts
    ]  # fmt: skip
    return {"model_type": "csm", "layout": "native", "backbone": llamas[0], "decoder": llamas[1],
            "text_vocab_size": text_vocab, "audio_vocab_size": n_codes + 3, "audio_num_codebooks": K}  # fmt: skip


def random_weights(config, seed=0):
    """Random weights {name: array} in our layout."""
    from mlx.utils import tree_flatten

    model = csm.CSM(csm.CSMConfig.from_dict(config))
    key, out = mx.random.key(seed), {}
    for name, w in tree_flatten(model.parameters()):
        key, k = mx.random.split(key)
        scale = 1 if "embeddings" in name else 3 / w.shape[-1] ** 0.5 if "head" in name else 1 / w.shape[-1] ** 0.5
        out[name] = mx.random.normal(w.shape, key=k) * scale if w.ndim > 1 else mx.ones(w.shape)
    return csm_layouts.join_heads(out)


def random_mimi(K, n_codes, seed=0):
    """A small Mimi: ({name: array} with kyutai's names, which are ours, its config)."""
    c = {"n_filters": 4, "dim": 32, "n_layers": 1, "n_heads": 2, "ffn_dim": 64, "codebook_size": n_codes,
         "codebook_dim": 16, "n_codebooks": K, "kernel_size": 7, "ratios": [8, 6, 5, 4]}  # fmt: skip
    key, w = mx.random.key(seed), {}

    def add(name, *shape, scale=None):
        nonlocal key
        key, k = mx.random.split(key)
        w[name] = mx.random.normal(shape, key=k) * (scale or 1 / np.prod(shape[1:]) ** 0.5)

    def conv(name, kind, *shape):
        add(f"{name}.{kind}.{kind}.weight", *shape)
        add(f"{name}.{kind}.{kind}.bias", shape[1] if kind == "convtr" else shape[0], scale=0.1)

    conv("encoder.model.0", "conv", 4, 1, 7)
    conv("decoder.model.0", "conv", 64, 32, 7)
    for i, ratio in enumerate([8, 6, 5, 4]):
        dim = 4 * 2 ** (3 - i)  # narrower side, decoder order
        for part, block, strided in (("encoder", 10 - 3 * i, 12 - 3 * i), ("decoder", 3 + 3 * i, 2 + 3 * i)):
            conv(f"{part}.model.{block}.block.1", "conv", dim // 2, dim, 3)
            conv(f"{part}.model.{block}.block.3", "conv", dim, dim // 2, 1)
            if part == "encoder":
                conv(f"{part}.model.{strided}", "conv", 2 * dim, dim, 2 * ratio)
            else:
                conv(f"{part}.model.{strided}", "convtr", 2 * dim, dim, 2 * ratio)
    conv("encoder.model.14", "conv", 32, 64, 3)
    conv("decoder.model.14", "conv", 1, 4, 3)
    for part in ("encoder", "decoder"):
        layer = f"{part}_transformer.transformer.layers.0"
        add(f"{layer}.self_attn.in_proj_weight", 96, 32)
        add(f"{layer}.self_attn.out_proj.weight", 32, 32)
        add(f"{layer}.linear1.weight", 64, 32)
        add(f"{layer}.linear2.weight", 32, 64)
        for n in (1, 2):
            w[f"{layer}.norm{n}.weight"], w[f"{layer}.norm{n}.bias"] = mx.ones((32,)), mx.zeros((32,))
            w[f"{layer}.layer_scale_{n}.scale"] = mx.full((32,), 0.1)
    for part, n in (("first", 1), ("rest", K - 1)):
        add(f"quantizer.rvq_{part}.input_proj.weight", 16, 32, 1)
        add(f"quantizer.rvq_{part}.output_proj.weight", 32, 16, 1)
        for i in range(n):
            add(f"quantizer.rvq_{part}.vq.layers.{i}._codebook.embedding_sum", n_codes, 16, scale=0.5)
            w[f"quantizer.rvq_{part}.vq.layers.{i}._codebook.cluster_usage"] = mx.ones((n_codes,))
    add("downsample.conv.conv.conv.weight", 32, 32, 4)
    add("upsample.convtr.convtr.convtr.weight", 32, 1, 4, scale=0.5)
    return w, c


def write_model(folder, shape="k8", weights=None, voices=True):
    """Write a complete model folder in our layout, with two voices."""
    folder.mkdir(parents=True, exist_ok=True)
    config = native_config(shape, write_tokenizer(folder))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights or random_weights(config))
    tensors, c = random_mimi(SHAPES[shape][0], SHAPES[shape][1])
    mx.save_safetensors(str(folder / "mimi.safetensors"), tensors, {"format": "mlx", "config": json.dumps(c)})
    if voices:
        (folder / "prompts").mkdir(exist_ok=True)
        for i, voice in enumerate(("conversational_a", "other")):
            soundfile.write(folder / "prompts" / f"{voice}.wav", clip(0.5, seed=i), 24000)
            (folder / "prompts" / f"{voice}.txt").write_text("how are you today?\n")
    return folder


def clip(seconds, seed=0):
    """Noise with a slow envelope, (samples,) float32."""
    n = int(seconds * 24000)
    noise = np.random.default_rng(seed).standard_normal(n) * 0.2
    return (noise * np.sin(np.arange(n) / 2000)).astype(np.float32)


@pytest.fixture(autouse=True)
def loggers():
    """Reset the log level, which programs inside a test may set."""
    yield
    logging.getLogger("csm").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def generator(folder):
    return csm.load(folder, dtype=DTYPE)


@pytest.fixture(scope="session")
def tiny():
    return csm.load("tiny")


def same_codes(ours, theirs):
    """Assert that codes (F, K) agree, exactly where the device allows it."""
    ours, theirs = np.array(ours), np.array(theirs)
    if EXACT:
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert len(ours) and len(theirs) and (ours[0] == theirs[0]).mean() >= 0.5, (ours[0], theirs[0])


def stand_in_hub(cache):
    """Make a Hugging Face cache with small random models for the default downloads; returns its environment."""
    write_model(cache / "made")
    repos = {
        "senstella/csm-1b-mlx": {"ckpt.safetensors": "model.safetensors", "config.json": "config.json"},
        csm_layouts.DEFAULT_MIMI[0]: {csm_layouts.DEFAULT_MIMI[1]: "mimi.safetensors"},
        csm_layouts.DEFAULT_TOKENIZER: {"tokenizer.json": "tokenizer.json"},
        csm_layouts.DEFAULT_PROMPTS: {
            f"prompts/conversational_a.{x}": f"prompts/conversational_a.{x}" for x in ("wav", "txt")
        },
        "unsloth/csm-1b": {name: name for name in ("config.json", "model.safetensors", "mimi.safetensors", *TOKENIZER)},
    }
    for repo, files in repos.items():
        place = cache / "hub" / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("0" * 40)
        for name, made in files.items():
            (place / "snapshots" / ("0" * 40) / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "snapshots" / ("0" * 40) / name).write_bytes((cache / "made" / made).read_bytes())
    return {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    return stand_in_hub(tmp_path_factory.mktemp("hub"))
