"""mimi.py against moshi's PyTorch Mimi and transformers' MimiModel on the same random weights; streams; the command."""

import ctypes
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import mimi  # before mlx and torch: it puts a fast BLAS in place on Linux

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile
from mlx.utils import tree_flatten

SMALL = {"n_filters": 8, "ratios": (4, 3, 2), "dim": 48, "n_layers": 2, "n_heads": 4, "ffn_dim": 96, "context": 30}
SMALL |= {"codebook_size": 64, "codebook_dim": 20, "n_codebooks": 6}
DEEP = {"n_filters": 6, "ratios": (5, 2), "kernel_size": 5, "residual_kernel_size": 5, "last_kernel_size": 7, "dim": 32}
DEEP |= {"n_residual_layers": 2, "dilation_base": 3, "compress": 3, "n_layers": 1, "n_heads": 2, "ffn_dim": 80}
DEEP |= {"context": 9, "codebook_size": 128, "codebook_dim": 16, "n_codebooks": 5, "n_semantic": 2, "rope_theta": 1e3}
CONFIGS = {name: mimi.MimiConfig(**c) for name, c in {"full": {}, "small": SMALL, "deep": DEEP}.items()}
LONG = {"full": 263, "small": 300, "deep": 500}  # frames, at least twice the window: 21 s of `full`


def draw(shapes, gain=1.3):
    """Random tensors that keep every layer and codebook in play, under kyutai's names, transformers' or ours."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        w = rng.standard_normal(shape)
        if "cluster_usage" in name:
            w = 0.7 + rng.random(shape)
            w[0] = 0  # a code that was never used: the division is clamped
        elif "embed" in name:
            w *= 0.3 * 0.97 ** int(re.search(r"layers\.(\d+)", name)[1])
            w[0] *= 1e-5
        elif "scale" in name:
            w = 0.1 + 0.05 * w
        elif "norm" in name or "nitialized" in name:
            w = 0.2 * w + (not name.endswith("bias"))
        else:
            w *= 0.1 if len(shape) == 1 else gain * math.sqrt(max(shape[0], shape[-1]) / w.size)
        tensors[name] = w.astype(np.float32)
    return tensors


def moshi_mimi(c):
    torch, loaders = pytest.importorskip("torch"), pytest.importorskip("moshi.models.loaders")
    sizes = ("n_filters", "ratios", "kernel_size", "residual_kernel_size", "last_kernel_size", "dilation_base")
    seanet = {f: getattr(c, f) for f in (*sizes, "compress", "n_residual_layers")} | {"dimension": c.dim}
    quantizer = {"n_q": c.n_codebooks, "n_q_semantic": c.n_semantic, "bins": c.codebook_size}
    quantizer |= {"dimension": c.codebook_dim, "input_dimension": c.dim, "output_dimension": c.dim}
    layers = {"d_model": c.dim, "num_heads": c.n_heads, "num_layers": c.n_layers, "context": c.context}
    layers |= {"max_period": c.rope_theta, "dim_feedforward": c.ffn_dim}
    layers |= {"input_dimension": c.dim, "output_dimensions": [c.dim]}
    config = {"sample_rate": c.sample_rate, "frame_rate": c.frame_rate, "channels": 1, "quantizer": quantizer}
    config |= {"seanet": loaders._seanet_kwargs | seanet, "transformer": loaders._transformer_kwargs | layers}
    model = loaders.get_mimi(None, config, num_codebooks=c.n_codebooks)
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(w) for name, w in draw(shapes).items()})
    return model


def transformers_mimi(c):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    names = {"n_filters": "num_filters", "ratios": "upsampling_ratios", "dilation_base": "dilation_growth_rate"}
    names |= {"n_residual_layers": "num_residual_layers", "dim": "hidden_size", "n_layers": "num_hidden_layers"}
    names |= {"n_heads": "num_attention_heads", "ffn_dim": "intermediate_size", "context": "sliding_window"}
    names |= {"n_codebooks": "num_quantizers", "n_semantic": "num_semantic_quantizers", "sample_rate": "sampling_rate"}
    config = {names.get(f, f): v for f, v in asdict(c).items()} | {"upsampling_ratios": list(c.ratios)}
    config |= {"num_key_value_heads": c.n_heads, "vector_quantization_hidden_dimension": c.codebook_dim}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
    model = hf.MimiModel(hf.MimiConfig(upsample_groups=c.dim, **config)).eval()
    theirs = model.state_dict()
    for name, w in draw({name: tuple(w.shape) for name, w in theirs.items()}).items():
        theirs[name].copy_(torch.from_numpy(w))
    return model


@pytest.fixture(scope="module", params=[f"{r}-{c}" for r in ("moshi", "transformers") for c in CONFIGS])
def pair(request):
    """A reference that takes and gives numpy arrays, and our Mimi with its weights."""
    (which, name), torch = request.param.split("-"), pytest.importorskip("torch")
    p, c = SimpleNamespace(which=which, name=name, config=CONFIGS[name]), CONFIGS[name]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if which == "moshi":
            model = moshi_mimi(c)
            p.weights = {name: mx.array(w.numpy()) for name, w in model.state_dict().items()}
            known = None if name == "full" else asdict(c)  # the published file says nothing of itself
            p.load = lambda k=None: mimi.from_weights(p.weights, known, n_codebooks=k)
            p.encode = lambda x, k: model.set_num_codebooks(k) or model.encode(torch.from_numpy(x)).numpy()
            p.decode = lambda codes: model.decode(torch.from_numpy(codes)).numpy()
        else:
            model = transformers_mimi(c)
            model.save_pretrained(folder)
            p.load = lambda k=None: mimi.load(folder, n_codebooks=k)
            p.encode = lambda x, k: model.encode(torch.from_numpy(x), num_quantizers=k).audio_codes.numpy()
            p.decode = lambda codes: model.decode(torch.from_numpy(codes)).audio_values.numpy()
        downsample = model.downsample if which == "moshi" else model.encoder.downsample
        downsample.register_forward_hook(lambda module, args, out: setattr(p, "latent", out.numpy()))
        p.ours = p.load()
        yield p


def count_ties(codec, latent, ours, theirs):
    """In how many frames the codes (B, K, F) part. They may only where two code vectors lie equally far from what is
    left of the latent (B, D, F), within 1e-5; after that the frame's codes are free."""
    ties, n = 0, codec.config.n_semantic
    for rvq, a, b in ((codec.first, ours[:, :n], theirs[:, :n]), (codec.rest, ours[:, n:], theirs[:, n:])):
        for row, f in np.argwhere((a != b).any(axis=1)):
            books, proj = (np.array(w).astype(np.float64) for w in (rvq.codebooks, rvq.input_proj))
            k = np.argmax(a[row, :, f] != b[row, :, f])
            left = proj @ latent[row, :, f] - sum(books[i, a[row, i, f]] for i in range(k))
            near, far = sorted(np.linalg.norm(left - books[k, x[row, k, f]]) for x in (a, b))
            assert far - near <= 1e-5 * near, f"frame {f}, codebook {k} of these {len(books)}: {near} and {far}"
            ties += 1
    return ties


def close(ours, theirs, atol):
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=atol)


def noise(n, seed=0):
    """Noise that swells and fades, (1, 1, n)."""
    x = np.random.default_rng(seed).standard_normal(n) * 0.2 * (1.1 + np.sin(np.arange(n) * 40 / (n + 1)))
    return x.astype(np.float32)[None, None]


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("clip", ["long", "speech", "silence", (0, 1), (1, -1), (1, 1), (7, 17)], ids=str)
def test_codes_and_waveform_are_the_references(pair, clip, tmp_path):
    size, K, long = pair.config.frame_size, pair.config.n_codebooks, pair.config.frame_size * LONG[pair.name]
    if clip == "speech":
        if not shutil.which("espeak-ng"):
            pytest.skip("espeak-ng is not installed")
        subprocess.run(["espeak-ng", "-w", tmp_path / "a.wav", "In the end the boy who cried wolf told the truth."])
        x = mimi.read_audio(tmp_path / "a.wav")[None, None, 4000 : 4000 + long]
    else:
        x = noise({"long": long, "silence": 9 * size}.get(clip) or clip[0] * size + clip[1]) * (clip != "silence")
    ours, theirs = np.array(pair.ours.encode(mx.array(x))), pair.encode(x, K)
    assert ours.shape == theirs.shape == (1, K, math.ceil(x.shape[2] / size))
    if pair.which == "transformers" and x.shape[2] % size:
        # It fills up the odd end of every convolution's input in turn, while moshi, and we, do so to the waveform. So
        # the last frame of an odd clip is another one; and with those zeros in the clip all frames are the same.
        assert count_ties(pair.ours, pair.latent, ours[..., :-1], theirs[..., :-1]) == 0
        theirs = pair.encode(np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size))), K)
    ties = count_ties(pair.ours, pair.latent, ours, theirs)
    print(f"{ties} ties in {ours.shape[2]} frames of {K} codes")
    assert ties <= 0.05 * ours.shape[2]
    if clip in ("long", "speech"):
        assert min(len(np.unique(codes)) for codes in theirs[0]) > 5  # not the same few codes all along
    wave = pair.decode(theirs)
    assert np.abs(wave).max() > 0.1
    close(pair.ours.decode(mx.array(theirs)), wave, 1e-4)


def test_fewer_codebooks_and_a_batch_are_the_references(pair):
    k, size = {"full": 8, "small": 2, "deep": 3}[pair.name], pair.config.frame_size
    codec, x = pair.load(k), np.concatenate([noise(9 * size, seed) for seed in (1, 2)])
    ours, theirs = np.array(codec.encode(mx.array(x))), pair.encode(x, k)
    assert codec.n_codebooks == k and ours.shape == theirs.shape == (2, k, 9)
    assert count_ties(codec, pair.latent, ours, theirs) <= 1
    assert np.array_equal(ours, np.array(pair.ours.encode(mx.array(x)))[:, :k])
    for m in (codec, pair.ours):  # one with more codebooks takes fewer codes too
        close(m.decode(mx.array(theirs)), pair.decode(theirs), 1e-4)
    told = mimi.infer_config(pair.weights) if pair.which == "moshi" else {}
    assert told.items() <= asdict(pair.config).items()


# ---------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module", params=["small", "deep"])
def codec(request):
    model = mimi.Mimi(CONFIGS[request.param])
    weights = draw({name: w.shape for name, w in tree_flatten(model.parameters())}, gain=0.9)
    return model.load_weights([(name, mx.array(w)) for name, w in weights.items()])


def clip_for(codec, what, frames, seed=0):
    """Random codes to decode, or noise to encode, and the length of a frame in it."""
    rng, c = np.random.default_rng(seed), codec.config
    if what == "decode":
        return mx.array(rng.integers(0, c.codebook_size, (1, c.n_codebooks, frames))), 1
    return mx.array(noise(frames * c.frame_size, seed)), c.frame_size


def stream(step, x, sizes, state):
    """x through the steps in chunks of the sizes, over and over -> (all that came out, the state after)"""
    out, i = [], 0
    while i < x.shape[2]:
        size = sizes[len(out) % len(sizes)]
        y, state = step(x[:, :, i : i + size], state)
        out, i = [*out, y], i + size
    return mx.concatenate(out, axis=2), state


STREAMS = [("decode", s) for s in ([1], [2], [5], [3, 1, 0, 7, 2], [90])]
STREAMS += [("encode", s) for s in ([1], [2], [5], [0.3], [1.7, 0.05, 3, 0.9, 0], [90])]


@pytest.mark.parametrize("what, frames", STREAMS, ids=str)
def test_in_chunks_is_whole(codec, what, frames):
    x, unit = clip_for(codec, what, 90)  # longer than the window
    step, whole = getattr(codec, f"{what}_step"), getattr(codec, what)(x)
    assert whole.shape == ((1, 1, x.shape[2] * codec.frame_size) if unit == 1 else (1, codec.n_codebooks, 90))
    assert len(np.unique(np.array(whole))) > 10 and (unit > 1 or 0.1 < mx.abs(whole).max() < 5)
    y, state = stream(step, x, [int(f * unit) for f in frames], codec.init_state())
    close(y, whole, 1e-5 if what == "decode" else 0)
    if what == "encode":  # what fills no frame yet waits in the state
        y, state = codec.encode_step(mx.ones((1, 1, 11)), state)
        assert y.shape == (1, codec.n_codebooks, 0) and state.rest.shape == (1, 11)


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_streams_do_not_meet(codec, what):
    """Two interleaved; one after another; one after one that was left half-way; and one state used twice."""
    (a, unit), (b, _) = (clip_for(codec, what, 40, seed) for seed in (1, 2))
    step, whole, atol = getattr(codec, f"{what}_step"), getattr(codec, what), 1e-5 if what == "decode" else 0
    alone, states, out = (whole(a), whole(b)), [codec.init_state()] * 2, ([], [])
    for i in range(0, 40, 5):
        for j, x in enumerate((a, b)):
            y, states[j] = step(x[..., i * unit : (i + 5) * unit], states[j])
            out[j].append(y)
    for j in (0, 1):
        close(mx.concatenate(out[j], axis=2), alone[j], atol)
    at = 26 * unit - unit // 2  # inside a frame, of audio
    half = stream(step, a[..., :at], [3 * unit], codec.init_state())[1]
    assert mx.array_equal(whole(b), alone[1])
    close(stream(step, b, [4 * unit], codec.init_state())[0], alone[1], atol)
    once, again = (stream(step, a[..., at:], [2 * unit], half)[0] for _ in range(2))
    assert mx.array_equal(once, again)
    close(once, alone[0][..., -once.shape[2] :], atol)


def test_a_batch_is_each_alone(codec):
    audio = mx.concatenate([clip_for(codec, "encode", 50, seed)[0] for seed in (3, 4)])[..., 5:]
    codes = codec.encode(audio)
    wave, steps = codec.decode(codes), stream(codec.decode_step, codes, [3], codec.init_state(2))[0]
    for one in (slice(0, 1), slice(1, 2)):
        assert mx.array_equal(codes[one], codec.encode(audio[one]))
        close(wave[one], codec.decode(codes[one]), 1e-5)
        close(steps[one], wave[one], 1e-5)


def test_two_threads_share_a_codec(codec):
    clips = [clip_for(codec, "decode", 60, seed)[0] for seed in (5, 6)]
    alone = [np.array(codec.decode(x)) for x in clips]
    with ThreadPoolExecutor(2) as pool:
        for j, wave in enumerate(pool.map(lambda x: np.array(codec.decode(x)), clips * 5)):
            close(wave, alone[j % 2], 1e-5)


# ---------------------------------------------------------------------------------------------------- errors


def test_wrong_shapes_and_codes(codec):
    K, size, state = codec.n_codebooks, codec.config.codebook_size, codec.init_state(2)
    encode, decode = (lambda x: codec.encode_step(x, state)), (lambda x: codec.decode_step(x, state))
    wrong = [(codec.encode, (48,)), (codec.encode, (1, 48)), (codec.encode, (1, 2, 96)), (codec.encode, (1, 1, 9, 1))]
    wrong += [(encode, (1, 1, 96)), (decode, (1, K, 3)), (decode, (2, K + 1, 3)), (decode, (2, 0, 3))]
    wrong += [(codec.decode, (1, K + 1, 3)), (codec.decode, (1, 0, 3)), (codec.decode, (K, 3))]
    for call, shape in wrong:
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            call(mx.zeros(shape, mx.int32))
    for code in (-1, size):
        with pytest.raises(ValueError, match=rf"0\.\.{size - 1}"):
            codec.decode(mx.full((1, K, 3), code))
    assert codec.encode(mx.zeros((1, 1, 0))).shape == (1, K, 0)
    assert codec.decode(mx.zeros((1, K, 0), mx.int32)).shape == (1, 1, 0)


@pytest.fixture(scope="module")
def published():
    """A small Mimi under the names of kyutai's published file, which are older than moshi's own."""
    weights = {name: mx.array(w.numpy()) for name, w in moshi_mimi(CONFIGS["small"]).state_dict().items()}
    return {n.replace("projs.0.", "proj.").replace("in_proj.", "in_proj_"): w for n, w in weights.items()}


BOOK = "quantizer.rvq_rest.vq.layers.3._codebook"
MISFITS = [  # a tensor, its shape or None to leave it out, what the error says
    ("decoder.model.0.conv.conv.bias", None, "missing decoder.model.0.bias"),
    (f"{BOOK}.cluster_usage", None, "rest"),
    ("backbone.norm.weight", (4,), "unexpected backbone.norm.weight"),
    ("decoder_transformer.transformer.layers.1.linear2.weight", (48, 95), "(48, 95), not (48, 96)"),
    ("encoder.model.3.conv.conv.weight", (16, 9, 4), "encoder.model.3.weight is (2, 18, 16), not (2, 16, 16)"),
    (f"{BOOK}.embedding_sum", (64, 19), "rest"),
    (f"{BOOK}.cluster_usage", (63,), "rest"),
]


@pytest.mark.parametrize("name, shape, message", MISFITS)
def test_tensors_that_do_not_fit_are_named(published, name, shape, message):
    weights = {n: w for n, w in published.items() if n != name} | ({name: mx.zeros(shape)} if shape else {})
    with pytest.raises(ValueError, match=re.escape(message)):
        mimi.from_weights(weights, asdict(CONFIGS["small"]))


def test_loading(published):
    known, before = asdict(CONFIGS["small"]), np.array(mx.random.state[0])
    mimi.from_weights(published, known)
    mimi.Mimi(CONFIGS["deep"])
    assert np.array_equal(before, np.array(mx.random.state[0]))  # the caller's random numbers are left alone
    for k in (-1, 0, 7):
        with pytest.raises(ValueError, match=f"6 codebooks, not {k}"):
            mimi.from_weights(published, known, n_codebooks=k)
    with pytest.raises(ValueError, match=r"not a Mimi.*lm_head"):
        mimi.from_weights({"lm_head.weight": mx.zeros((4, 4))})


# ---------------------------------------------------------------------------------------------------- the command


def python(*args, **env):
    env = {k: v for k, v in os.environ.items() if k != "CSM_FAST_BLAS"} | {"HF_HUB_OFFLINE": "1"} | env
    args, here = [sys.executable, *map(str, args)], Path(__file__).parent
    return subprocess.run(args, cwd=here, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory, published):
    """A model, a clip, and what one may wrongly give instead."""
    folder, config = tmp_path_factory.mktemp("files"), {"config": json.dumps(asdict(CONFIGS["small"]))}
    mx.save_safetensors(str(folder / "mimi.safetensors"), published, config)
    whole = (folder / "mimi.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.txt").write_text("neither sound\nnor a model\n")
    (folder / "hollow").mkdir()
    lacking = {n: w for n, w in published.items() if n != "decoder.model.0.conv.conv.bias"}
    mx.save_safetensors(str(folder / "lacking.safetensors"), lacking, config)
    stereo = np.stack([noise(50_000, seed)[0, 0] for seed in (8, 9)], axis=1)
    soundfile.write(folder / "in.wav", stereo, 44_100, subtype="FLOAT")
    soundfile.write(folder / "empty.wav", stereo[:0], 44_100)
    stereo[1000, 1] = np.nan
    soundfile.write(folder / "nan.wav", stereo, 44_100, subtype="FLOAT")
    return folder


@pytest.mark.parametrize("k", [None, 3])
def test_the_command(files, tmp_path, k):
    model, npz = files / "mimi.safetensors", tmp_path / "codes.npz"
    args = ["--model", model, "--codes", npz, *(["--n-codebooks", k] if k else [])]
    done = python("mimi.py", files / "in.wav", tmp_path / "out.wav", *args)
    assert done.returncode == 0, done.stderr
    info, saved = soundfile.info(tmp_path / "out.wav"), np.load(npz)
    assert (info.samplerate, info.channels, info.subtype, info.format) == (24_000, 1, "PCM_16", "WAV")
    assert abs(info.frames - 50_000 * 24_000 / 44_100) <= 1
    codec, audio = mimi.load(model, k), mimi.read_audio(files / "in.wav")
    codes = codec.encode(mx.array(audio)[None, None])
    assert saved["codes"].shape == (k or 6, math.ceil(len(audio) / codec.frame_size))
    assert saved["sample_rate"] == 24_000 and np.array_equal(saved["codes"], np.array(codes[0]))
    wave = np.clip(np.array(codec.decode(codes))[0, 0, : len(audio)], -1, 1)
    close(soundfile.read(tmp_path / "out.wav")[0], wave, 2 / 32768)
    assert sorted(os.listdir(tmp_path)) == ["codes.npz", "out.wav"]


MISTAKES = """none.wav mimi.safetensors out.wav | no such file
text.txt mimi.safetensors out.wav | not an audio file
nan.wav mimi.safetensors out.wav | NaN
empty.wav mimi.safetensors out.wav | no sound
in.wav none.safetensors out.wav | no such file
in.wav half.safetensors out.wav | truncated
in.wav text.txt out.wav | text.txt
in.wav hollow out.wav | hollow
in.wav lacking.safetensors out.wav | missing decoder.model.0.bias
in.wav mimi.safetensors none/out.wav | cannot write
in.wav mimi.safetensors . | cannot write
in.wav mimi.safetensors out.wav --n-codebooks 7 | 6 codebooks
in.wav mimi.safetensors out.wav --codes none/codes.npz | none/codes.npz"""


@pytest.mark.parametrize("mistake", MISTAKES.split("\n"))
def test_mistakes_end_in_one_line(files, tmp_path, mistake):
    args, message = mistake.split(" | ")
    source, model, out, *more = args.split()
    (tmp_path / "out.wav").write_text("what was there")
    done = python("mimi.py", files / source, tmp_path / out, "--model", files / model, *more)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("mimi.py: error: ") and message in done.stderr
    assert (tmp_path / "out.wav").read_text() == "what was there" and os.listdir(tmp_path) == ["out.wav"]


# ---------------------------------------------------------------------------------------------------- a fast BLAS


def test_exp_is_mlx_s():
    x = mx.linspace(-86.9, 87, 50_000)
    assert not mimi.vectorized(x.size)  # else it is MLX's own
    y, expected = mimi.exp(x), mx.exp(x)
    assert mx.abs(mx.where(x <= 0, y - expected, 0)).max() < 2e-7 and mx.abs(y / expected - 1).max() < 5e-6
    assert 0 <= mimi.exp(mx.full(x.shape, -mx.inf)).max() < 1e-30
    slope = mx.grad(lambda x: mimi.exp(x).sum())(x)
    assert mx.abs(slope / expected - 1).max() < 5e-5
    assert mimi.exp(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_gelu_is_mlx_s():
    import mlx.nn as nn

    x = mx.linspace(-90, 90, 200_001)
    assert not mimi.vectorized(x.size)
    assert (mx.abs(mimi.gelu(x) - nn.gelu(x)) / mx.maximum(mx.abs(x), 1)).max() < 4e-7
    slopes = [mx.grad(lambda x, f=f: f(x).sum())(x) for f in (mimi.gelu, nn.gelu)]
    assert mx.abs(slopes[0] - slopes[1]).max() < 2e-6


@pytest.mark.parametrize("B, H, n, T, S, d", [(1, 8, 8, 24, 70, 16), (2, 6, 2, 40, 40, 8), (1, 32, 8, 256, 300, 4)])
def test_attention_is_mlx_s(B, H, n, T, S, d):
    keys = mx.random.split(mx.random.key(1), 3)
    q, k, v = (mx.random.normal((B, m, t, d), key=key) for m, t, key in zip((H, n, n), (T, S, S), keys))
    some = (mx.random.uniform(shape=(B, 1, T, S), key=mx.random.key(0)) < 0.5) | (mx.arange(S) == 0)
    for mask in (None, "causal", some):
        own = lambda *x, mask=mask: mimi.attend(*x, mask)  # noqa: E731
        theirs = lambda *x, mask=mask: mx.fast.scaled_dot_product_attention(*x, scale=d**-0.5, mask=mask)  # noqa: E731
        assert mx.abs(own(q, k, v) - theirs(q, k, v)).max() < 1e-5
        a, b = (mx.grad(lambda *x, f=f: (f(*x) * mx.arange(d)).sum(), (0, 1, 2))(q, k, v) for f in (own, theirs))
        for x, y in zip(a, b):
            assert mx.linalg.norm(x - y) < 1e-4 * mx.linalg.norm(y)


@pytest.mark.parametrize("offset, T", [(0, 5), (7, 1), (mx.array([3, 0]), 4)])
def test_rope_is_mlx_s(offset, T):
    x, periods = mx.random.normal((2, 3, T, 8), key=mx.random.key(0)), mx.array([1.0, 7.0, 50.0, 900.0])
    expected = mx.fast.rope(x, 8, traditional=True, base=None, scale=1.0, offset=offset, freqs=periods)
    assert mx.abs(mimi.rope(periods, offset, T)(x) - expected).max() < 1e-5


LINUX = (sys.platform, platform.machine()) == ("linux", "x86_64")


@pytest.mark.skipif(not (LINUX and list(Path(sys.prefix).glob("lib/libmkl_rt.so*"))), reason="no MKL here")
@pytest.mark.parametrize("first", ["mimi", "csm", "convert", "mlx.core"])
def test_mkl_is_loaded_whichever_comes_first_but_mlx(first):
    for wanted, env in ((first != "mlx.core", {}), (False, {"CSM_FAST_BLAS": "0"})):
        code = f"import {first}, mimi; mimi.load_fast_blas(); print('libmkl' in open('/proc/self/maps').read())"
        done = python("-c", code, **env)
        assert done.stdout.split() == [str(wanted)], done.stderr


@pytest.mark.parametrize("system, machine", [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "x86_64")])
def test_load_fast_blas_never_raises(monkeypatch, tmp_path, system, machine):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libmkl_rt.so.2").write_text("not a library")
    tried, paths = [], ["", "site-packages", "/site-packages", tmp_path]

    def refuse(name, mode):
        tried.append(name)
        raise OSError(name)

    monkeypatch.delenv("CSM_FAST_BLAS", raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    for module, name, value in ((sys, "prefix", str(tmp_path)), (sys, "path", paths), (sys, "platform", system)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert mimi.load_fast_blas() is None
    assert tried[:1] == ([f"{tmp_path}/lib/libmkl_rt.so.2"] if (system, machine) == ("linux", "x86_64") else [])
