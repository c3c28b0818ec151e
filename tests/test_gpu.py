"""What a GPU would have to run, checked on a CPU: which operations, how many, in which shapes, and when.

Nothing here needs a GPU. On one, `python -m csm_tools.bench --doctor` checks the results.
"""

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import csm  # before mlx
import csm_batch
import mimi

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import clip, write_model
from csm_tools import bench, command, doctor, finetune, serve_engine, watermark
from test_watermark import by_hand

HERE = Path(__file__).parent.parent
# What the backends of MLX 0.32.4 lack: "has no CUDA implementation" in its libmlx.so; "NYI" in its Metal sources.
CUDA_LACKS = set("Cholesky Eig Eigh Inverse LUF QRF SVD Send Recv GatedDeltaUpdate GatedDeltaUpdateVJP".split())
METAL_LACKS = set("QRF SVD Inverse Cholesky Eig Eigh LUF AllReduce AllGather Send Recv ReduceScatter".split())
KNOWN = set(
    """
    Add AddMM And Arange ArgReduce ArgSort AsType BitwiseAnd BitwiseOr Broadcast Concatenate Contiguous Copy Cos
    CumSum CustomTransforms Divide Equal Erf Exp ExpandDims Flatten Full Gather GatherAxis GreaterEqual LeftShift
    Less LessEqual Load Log LogSumExp LogicalNot LogicalOr Matmul Max Maximum Min Minimum Multiply Negative NotEqual
    Pad Power Quantize QuantizedMatmul RandomBits Reshape RightShift Rsqrt Scatter ScatterAxis Select Sigmoid Sin
    Slice SliceUpdate Softmax Split Sqrt Square Squeeze StopGradient Subtract Sum Transpose Unflatten
    """.split()
)
REST = set(  # what else the whole suite uses: the other programs, other layouts, weights quantized by MLX on a CPU
    """
    Abs AsStrided Convolution Depends ErfInv Floor FloorDivide FromFP8 Greater Log2 LogAddExp LogicalAnd Round ToFP8
    View
    """.split()
)
FREE = set(  # views of their input, or arrays that are not made in each frame
    "Broadcast ExpandDims Flatten Full Reshape Slice Split Squeeze StopGradient Transpose Unflatten".split()
)
LAYERS = csm.CSMConfig(  # the number of operations depends on these
    csm.LlamaConfig(16, 64, 4, 1, 16, 128), csm.LlamaConfig(4, 32, 4, 1, 8, 64), 100
)  # fmt: skip


FAST = set(  # one for several others: mlx_cpu's on a Linux CPU, then MLX's on a GPU
    """
    Attention Dequantize Norm Rope
    CrossEntropy CrossEntropyVJP LayerNorm LayerNormVJP RMSNorm RMSNormVJP RoPE ScaledDotProductAttention
    ScaledDotProductAttentionVJP
    """.split()
)


def plain(calls):
    """The names of all primitives in `calls`, but for FAST and those that MLX compiles of others, for any device."""
    used = {name for _, _, found in calls for name in found if not name.startswith("Compiled")}
    return used - FAST


def primitives(*arrays):
    """Count the primitives in the graphs of these arrays or trees of arrays."""
    arrays = [x for _, x in tree_flatten(list(arrays)) if isinstance(x, mx.array)]
    text = io.StringIO()
    if arrays:
        mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ="(\w+)', text.getvalue()))


@pytest.fixture
def calls(monkeypatch):
    """Record everything evaluated from here on: [(function's name, arrays, their primitives)]."""
    out = []

    def watch(module, name):
        own = getattr(module, name)

        def watched(*args, **options):
            found = primitives(*args)
            out.append((name, args, found))
            return own(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(mx, "eval")
    watch(mx, "async_eval")
    watch(np, "array")  # evaluates its argument
    watch(mx.array, "item")
    watch(mx.array, "tolist")
    return out


@pytest.fixture(scope="module")
def tiny():
    return csm.load("tiny", dtype="float32")


# ------------------------------------------------------------------------------------ which operations


def speak(generator):
    """Use every way of sampling, and every change of a batch."""
    context = [csm.Segment(0, "Hello.", clip(0.5))]
    options = {"max_audio_length_ms": 240, "seed": 1}
    for kind in (
        {"temperature": 0}, {"top_p": 0.8, "min_p": 0.1}, {"sampler": lambda logp: mx.argmax(logp, axis=-1)},
        {"logits_processors": [lambda ids, logits: logits * 0.5]},
    ):  # fmt: skip
        generator.generate("Yes.", 0, context, **kind, **options)
    batch = csm_batch.Batch(generator)
    for i, text in enumerate(("Yes.", "Good morning, how are you?", "No.")):
        batch.insert(generator.text_rows(text, 0), 3 + i, i, csm.Sampling(temperature=i % 2))
        batch.next()
    while len(batch):
        batch.next()


def learn(model):
    """Make one update with AdamW."""
    K = model.config.audio_num_codebooks
    rows = mx.zeros((1, 9, K + 1), mx.int32)
    model.unfreeze()

    def loss(model):
        zero, rest = finetune.frame_losses(model, rows, mx.array([3, 4]), mx.array([3]))
        return zero.sum() + rest.sum()

    optimizer = optim.AdamW(1e-5)
    _, gradient = nn.value_and_grad(model, loss)(model)
    gradient, _ = optim.clip_grad_norm(gradient, 1.0)
    optimizer.update(model, gradient)
    mx.eval(model.parameters(), optimizer.state)


def test_every_operation_is_there_on_every_gpu(tmp_path, monkeypatch, calls):
    folder = write_model(tmp_path)
    for compiled in ("0", "1"):
        monkeypatch.setenv("CSM_COMPILE", compiled)
        generator = csm.load(folder)
        speak(generator)
    speak(csm.load(folder, quantize=4, group_size=32))
    generator.mimi.decode(generator.mimi.encode(mx.array(clip(0.5))[None, None]))
    learn(generator.model)
    used = plain(calls)
    assert {"Matmul", "QuantizedMatmul", "ArgSort", "RandomBits", "Scatter", "SliceUpdate"} <= used
    assert not used & (CUDA_LACKS | METAL_LACKS)
    assert used <= KNOWN, f"new: look whether CUDA and Metal have {sorted(used - KNOWN)}"
    assert not KNOWN & (CUDA_LACKS | METAL_LACKS)


def test_operations_of_the_other_programs(folder, monkeypatch, calls):
    """Preferences, DoRA, the watermark by both of its ways, and formats that MLX quantizes to."""
    args = SimpleNamespace(
        lora_rank=2, lora_alpha=4.0, lora_dropout=0.1, dora=True, target_modules=["attn"], train_embeddings=True,
        freeze_backbone=False, freeze_decoder=False, seed=0, beta=0.1, sft_weight=1.0, desirable_weight=1.0,
        undesirable_weight=1.0, first_codebook_weight_multiplier=1.0,
    )  # fmt: skip
    model = csm.load(folder).model
    for lora in finetune.add_lora(model, args):
        lora._key = mx.random.key(1)
    learn(model)
    losses, wanted = mx.array([[1.0, 2.0], [2.0, 3.0]]), mx.array([1, -1])
    for args.command in ("dpo", "kto"):
        mx.eval(mx.value_and_grad(lambda x: finetune.objective(args, x, x + 1, wanted, 0.5).sum())(losses))
    mark = watermark.Watermark(*({name: mx.array(w) for name, w in state.items()} for state in by_hand()))
    for device in (mx.cpu, mx.gpu):
        with monkeypatch.context() as patched:
            patched.setattr(mx, "default_device", lambda device=device: device)
            mark.embed(clip(0.5))
    for quantize in ("mxfp4", "nvfp4", "mxfp8"):
        csm.load(folder, quantize=quantize).generate("Yes.", max_audio_length_ms=160)
    used = plain(calls)
    assert {"Convolution", "LogAddExp", "Sigmoid"} <= used
    assert used <= KNOWN | REST, f"new: look whether CUDA and Metal have {sorted(used - KNOWN - REST)}"
    assert not REST & (CUDA_LACKS | METAL_LACKS)


def test_quantized_products_have_two_dimensions(folder, monkeypatch):
    """CUDA takes only the second-to-last dimension as the number of rows."""
    own, seen = mx.quantized_matmul, []
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **o: seen.append(x.shape) or own(x, *a, **o))
    q = csm.load(folder, quantize=4, group_size=32)
    rows = np.stack([q.text_rows("hello there", 0)] * 3)
    h = q.model(mx.array(rows))
    codes = q.model.next_frame(h[:, -1], lambda i, logits: mx.argmax(logits, axis=-1))
    assert h.shape == (*rows.shape[:2], 64) and codes.shape == (3, 8)
    assert q.model.head(0, h).shape == (*rows.shape[:2], 67)
    assert {len(shape) for shape in seen} == {2} and {n for n, _ in seen} == {3, rows.shape[0] * rows.shape[1], 6}


# ------------------------------------------------------------------------------------ how many, and when


def launches(compiled, greedy, monkeypatch):
    """The operations of a frame with CSM-1B's layers that move data; MLX's fused functions count as one."""
    monkeypatch.setattr(mx.fast, "rope", lambda x, *a, **o: mx.erf(x))
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *a, **o: mx.erf(x))
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda q, k, v, **o: mx.where(k[:, :1, :1], v[:, :1, :1], q)
    )
    model = csm.CSM(LAYERS)
    c, n_codes, cache = LAYERS.backbone, LAYERS.audio_vocab_size - 3, csm.KVCache(LAYERS.backbone)
    cache.keys = [mx.zeros((1, c.n_kv_heads, csm.CACHE_STEP, c.head_dim))] * c.n_layers
    cache.values, cache.offset = list(cache.keys), 100
    noise = None if greedy else mx.zeros((1, LAYERS.audio_num_codebooks, LAYERS.audio_vocab_size))
    draw, h = csm.Draw(noise, mx.zeros((1, 5)), n_codes), mx.zeros((1, c.dim))
    if compiled:
        weights = model.parameters()
        del weights["backbone"], weights["text_embeddings"]
        arrays = (h,) if greedy else (h, noise, draw.options)
        codes = csm.compile_next_frame(model, n_codes, LAYERS.audio_num_codebooks)(weights, *arrays)
    else:
        codes = model.next_frame(h, draw)
    h = model(csm.frame_row(codes, LAYERS.audio_num_codebooks), cache)[:, -1]
    found = primitives(codes, h)
    return sum(n for name, n in found.items() if name not in FREE)


@pytest.mark.parametrize("compiled, greedy, most", [(0, 0, 3850), (0, 1, 3100), (1, 0, 2950), (1, 1, 2600)])
def test_operations_of_a_frame(monkeypatch, compiled, greedy, most):
    if compiled and "mlx_cpu" in sys.modules and os.environ.get("CSM_PLAIN") != "1":
        pytest.skip("mlx_cpu lets MLX fuse nothing: CSM_PLAIN=1")
    n = launches(compiled, greedy, monkeypatch)
    assert most * 0.9 < n <= most, n  # if it is less, lower the bound


def test_a_frame_is_launched_in_two_parts_and_looked_at_once(generator, calls):
    """First the codes, then the backbone's next step; reading the codes while that runs adds no operation."""
    K, n = generator.model.config.audio_num_codebooks, 5
    rows, sampling = generator.text_rows("hello", 0), csm.Sampling()

    def one():
        cache = csm.KVCache(generator.model.config.backbone, generator.model.dtype)
        return csm.frames(generator.model, rows, cache, n + 1, 1, sampling)

    def many():
        batch = csm_batch.Batch(generator)
        for seed in range(3):
            batch.insert(rows, n + 1, seed, sampling)
        while len(batch):
            yield batch.next()

    for stream, B in ((one(), 1), (many(), 3)):
        next(stream)  # with the prompt
        calls.clear()
        for _ in range(n - 1):
            next(stream)
        seen = [(name, args) for name, args, _ in calls if any(isinstance(x, mx.array) for x in args)]
        assert [name for name, _ in seen] == ["async_eval", "async_eval", "array"] * (n - 1)
        for (_, codes), (_, ahead), (_, read) in zip(seen[::3], seen[1::3], seen[2::3]):
            assert [x.shape for x in codes] == [x.shape for x in read] == [(B, K)] and ahead[0].shape[0] == B
        assert not any(found for name, _, found in calls if name == "array")


# ------------------------------------------------------------------------------------ in which shapes


def test_shapes_that_reach_attention(generator, monkeypatch):
    """100 prompts: each prefilled alone, without an array as mask, in few row counts; one depth decoder for all."""
    own, seen = mx.fast.scaled_dot_product_attention, Counter()

    def watched(q, k, v, *, scale, mask):
        kind = mask if mask is None or isinstance(mask, str) else "array"
        seen[q.shape[-1], q.shape[0], q.shape[2], k.shape[2], kind] += 1
        return own(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    rng, text = np.random.default_rng(0), generator.text_rows("hello there", 0)
    batch, lengths = csm_batch.Batch(generator), rng.integers(3, 400, 100)
    for i, n in enumerate(lengths):
        batch.insert(np.resize(text, (n, text.shape[1])), 2, i)
        if i % 4 == 3:
            while len(batch):
                batch.next()
    model = generator.model.config
    assert {kind for dim, _, T, _, kind in seen if T > 1} == {"causal"}
    depth = {shape for shape in seen if shape[0] == model.decoder.head_dim and shape[2] > 1}
    prompts = {shape for shape in seen if shape[0] == model.backbone.head_dim and shape[2] > 1}
    assert {shape[2:4] for shape in depth} == {(2, 2)} and len(depth) <= len(csm_batch.SIZES)
    assert {B for _, B, *_ in prompts} == {1} and max(T for _, _, T, _, _ in prompts) == csm.PREFILL_ROWS
    assert len(prompts) <= 1 + len(set(lengths))


@pytest.mark.parametrize("quantize", [None, 8, "mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_product_is_of_another_type(folder, monkeypatch, dtype, quantize):
    """float32 leaking into a 16-bit model would double memory traffic and compute."""
    linear, attention, seen = csm.Linear.__call__, mx.fast.scaled_dot_product_attention, set()

    def watched_linear(self, x):
        y = linear(self, x)
        seen.update({("in", x.dtype), ("out", y.dtype)})
        return y

    def watched_attention(q, k, v, **options):
        y = attention(q, k, v, **options)
        seen.update(("attention", x.dtype) for x in (q, k, v, y))
        return y

    monkeypatch.setattr(csm.Linear, "__call__", watched_linear)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched_attention)
    generator = csm.load(folder, dtype=dtype, quantize=quantize, group_size=32)
    one, kind = csm.KVCache(generator.model.config.backbone, generator.model.dtype), getattr(mx, dtype)
    batch, rows = csm_batch.Batch(generator), generator.text_rows("hello there", 0)
    next(generator.speak(rows, one, 3, 0, csm.Sampling()))
    for seed in range(3):
        batch.insert(rows[seed:], 3, seed)
    batch.next()
    model = generator.model
    model.depth_logits(batch.h, mx.zeros((3, 8), mx.int32))
    assert seen == {("in", kind), ("out", kind), ("attention", kind)}
    for x in (
        batch.h,
        model.embed(mx.array(rows[None])),
        *one.keys,
        *one.values,
        *batch.cache.keys,
        *batch.cache.values,
    ):
        assert x.dtype == kind


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_only_codes_of_mimi_are_drawn(monkeypatch, temperature):
    """The vocabulary's last ids are no codes: they are neither drawn nor sorted."""
    own, widths = csm.sample, []
    monkeypatch.setattr(csm, "sample", lambda logits, *rest: widths.append(logits.shape[-1]) or own(logits, *rest))
    logits = mx.where(mx.arange(2051) >= 2048, 100.0, mx.random.normal((5, 2051), key=mx.random.key(0)))
    noise = mx.random.gumbel((5, 2, 2051), key=mx.random.key(1)) if temperature else None
    draw = csm.Draw(noise, mx.array([csm.Sampling(temperature=temperature).as_row()] * 5), 2048)
    ids = draw(1, logits)
    assert ids.shape == (5,) and 0 <= ids.min() and ids.max() < 2048 and widths == ([2048] if temperature else [])


@pytest.mark.parametrize("wrong", [-1, 64, 2**31 - 1])
def test_a_samplers_wrong_id_is_never_looked_up(generator, monkeypatch, wrong):
    """On a GPU, the embedding of an invalid id would end the process."""
    own, seen = csm.CSM.embed_code, []
    monkeypatch.setattr(csm.CSM, "embed_code", lambda self, i, ids: seen.append(ids.tolist()) or own(self, i, ids))
    bad = csm.Sampling(sampler=lambda logp: mx.array([wrong if len(seen) == 3 else 5]))
    batch = csm_batch.Batch(generator)
    batch.insert(generator.text_rows("hello", 0), 4, 0, bad)
    with pytest.raises(ValueError, match=f"the sampler gave {wrong}"):
        generator.generate_codes("hello", sampler=bad.sampler, voice="none")
    assert seen == [[5]] * 3
    seen.clear()
    with pytest.raises(ValueError, match=f"the sampler gave {wrong}"):
        batch.next()
    assert all(0 <= i < 64 for ids in seen for i in np.ravel(ids))


# ------------------------------------------------------------------------------------ what MLX is told

LOOK = """
import os, sys

class Look:
    def find_spec(self, name, *_):
        if name == "mlx.core":
            print(" ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MLX_")), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Look())
sys.platform = sys.argv[1]
import MODULE
"""
PROGRAMS = ("speak", "narrate", "serve", "finetune", "bench", "doctor")


@pytest.mark.parametrize("module", ["csm", "mimi", "csm_batch", *(f"csm_tools.{name}" for name in PROGRAMS)])
def test_mlx_is_told_before_it_is_imported(module, tmp_path):
    for platform, own, expected in (
        ("linux", {}, "MLX_CUDA_USE_CUDNN_SDPA=0 MLX_MAX_OPS_PER_BUFFER=1000"),
        ("darwin", {}, "MLX_CUDA_USE_CUDNN_SDPA=0 MLX_MAX_MB_PER_BUFFER=400 MLX_MAX_OPS_PER_BUFFER=1000"),
        ("linux", {"MLX_MAX_OPS_PER_BUFFER": "7"}, "MLX_CUDA_USE_CUDNN_SDPA=0 MLX_MAX_OPS_PER_BUFFER=7"),
    ):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLX_")} | own
        env |= {"PYTHONPATH": str(HERE), "CSM_PLAIN": "1"}
        program = [sys.executable, "-c", LOOK.replace("MODULE", module), platform]
        done = subprocess.run(program, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip() == expected, done.stderr


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be a Mac; records what is set there."""
    said = {}
    monkeypatch.setattr(csm, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    for name in ("set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda n, name=name: said.update({name: n}))
    return said


def test_memory_of_a_mac(gpu):
    args = command.parser_for("test")
    command.add_model_options(args)
    generator = command.load_for(args.parse_args(["--model", "tiny", "--dtype", "float32"]))
    assert gpu == {"set_wired_limit": 12 << 30}
    engine = serve_engine.Engine(generator, 2, 2)
    engine.thread.shutdown()
    assert gpu["set_cache_limit"] == 2 << 30


@pytest.mark.parametrize("compiled, sizes", [("1", [1, 2, 3, 4, 6]), ("0", [1])])
def test_a_server_compiles_before_it_listens(generator, monkeypatch, caplog, compiled, sizes):
    seen = []
    monkeypatch.setenv("CSM_COMPILE", compiled)
    monkeypatch.setattr(
        csm, "fast_next_frame", lambda model, h, *rest: seen.append(len(h)) or model.next_frame(h, *rest)
    )
    engine = serve_engine.Engine(generator, 5, 2)
    engine.warm_up()
    engine.thread.shutdown()
    assert seen == sizes and not caplog.records


@pytest.mark.parametrize("options, dtype", [
    ([], "float32"), (["--lora-rank", "8"], None), (["--lora-rank", "8", "--train-embeddings"], "float32"),
    (["--dtype", "bfloat16"], "bfloat16"),
])  # fmt: skip
def test_weights_that_learn_are_float32(gpu, monkeypatch, tmp_path, options, dtype):
    loaded = []

    def load(model, dtype, **_):
        loaded.append(dtype)
        raise ValueError("far enough")

    monkeypatch.setattr(csm, "load", load)
    monkeypatch.setattr(finetune.tuning_data, "read_data", lambda *_: [])
    with pytest.raises(SystemExit):
        finetune.main(["train", "--data-path", "none.json", "--output-dir", str(tmp_path / "run"), *options])
    assert loaded == [dtype]


# ------------------------------------------------------------------------------------ the doctor


@pytest.mark.slow
def test_the_doctor_finds_nothing_here(tmp_path, capsys):
    """All quick checks, under the name of bench."""
    checks = [name for name in doctor.CHECKS if name not in ("timings", "engine", "memory")]
    assert bench.main(["--doctor", "--json", str(tmp_path / "d.json"), "--only", *checks]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "d.json").read_text())
    assert [name for name in checks if f"| {name} | good |" in out] == checks
    assert "- Nothing fell short." in out and json.loads(out.split("```")[1].removeprefix("json")) == report
    assert report["checks"]["golden"]["figures"] == {"frames": 36, "the same until frame": 36}
    assert report["settings"]["MLX_MAX_OPS_PER_BUFFER"] == "1000" and report["checks"]["installation"]["figures"]["mlx"]


def test_the_doctor_sees_what_is_wrong(monkeypatch, capsys):
    own = mx.fast.scaled_dot_product_attention

    def wrong(q, k, v, **options):  # as M3 Max is said to have it: beyond 1024 keys
        y = own(q, k, v, **options)
        return y * 1.1 if k.shape[2] > 1024 else y

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", wrong)
    monkeypatch.setattr(mimi.Mimi, "init_state", lambda self, batch: 1 / 0)
    assert doctor.main(["--only", "attention", "codec"]) == 1
    out = capsys.readouterr().out
    assert "| attention | fell short |" in out and "- attention of 1 over 1500 positions is off by" in out
    assert "1 over 300 positions" not in out and "- codec failed: ZeroDivisionError" in out


def test_the_doctor_first_looks_where_it_writes(tmp_path, capsys):
    for place in (tmp_path / "none/d.json", tmp_path):
        with pytest.raises(SystemExit) as e:
            doctor.main(["--only", "installation", "--json", str(place)])
        out, err = capsys.readouterr()
        assert e.value.code == 2 and not out and "cannot write" in err and err.count("\n") == 1


def test_the_doctor_compares_codes():
    a, b = np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4)
    assert doctor.compared(a, b, "its", True) == ({"frames": 3, "the same until frame": 3}, [])
    b[1, 0] = 99
    assert doctor.compared(a, b, "its", True) == (
        {"frames": 3, "the same until frame": 1}, ["its codes are others from frame 1 on"],
    )  # fmt: skip
    assert doctor.compared(a, b, "its", False)[1] == doctor.compared(a[:2], a, "its", False)[1] == []
    assert doctor.compared(a + 50, a, "its", False)[1] and doctor.compared(a[:2], a, "its", True)[1]
    assert doctor.compared(a[:0], a[:0], "its", True)[1] == []
