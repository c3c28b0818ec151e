"""mimi.py against moshi's PyTorch Mimi and transformers' MimiModel on the same random weights; streams; the command."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import mimi  # before mlx and torch

import csm_layouts  # isort: skip
from csm_tools.audio import audio_writer, wav_head  # isort: skip
from csm_tools.serve_engine import join_states, split_state  # isort: skip

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
UNTOLD = ("n_heads", "context", "rope_theta", "norm_eps", "dilation_base", "sample_rate")  # not in the shapes
LONG = {"full": 263, "small": 300, "deep": 500}  # frames, at least twice the window: 21 s of `full`


def draw(shapes, gain=1.3):
    """Random tensors that keep every layer and codebook in play, under kyutai's names, transformers' or ours."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        w = rng.standard_normal(shape)
        if "cluster_usage" in name:
            w = 0.7 + rng.random(shape)
            w[0] = 0  # an unused code: the division is clamped
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


def from_layout(weights, config=None, n_codebooks=None):
    """A Mimi from tensors in any layout."""
    config, weights = csm_layouts.mimi_to_native(config or {}, weights)
    return mimi.from_weights(weights, config, n_codebooks)


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
    """A reference with NumPy arrays as input and output, and our Mimi with its weights."""
    (which, name), torch = request.param.split("-"), pytest.importorskip("torch")
    p, c = SimpleNamespace(which=which, name=name, config=CONFIGS[name]), CONFIGS[name]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if which == "moshi":
            model = moshi_mimi(c)
            p.weights = {name: mx.array(w.numpy()) for name, w in model.state_dict().items()}
            known = None if name == "full" else asdict(c)  # the published file has no config
            p.load = lambda k=None: from_layout(p.weights, known, k)
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
    """Count the frames whose codes (B, K, F) differ. They may only where two code vectors are equally far from the
    residual of the latent (B, D, F), within 1e-5; the frame's later codes may then differ, too."""
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
        # transformers pads every convolution's input; moshi and we pad the waveform. So the last frame of an odd clip
        # differs, and with those zeros in the clip all frames are equal.
        assert count_ties(pair.ours, pair.latent, ours[..., :-1], theirs[..., :-1]) == 0
        theirs = pair.encode(np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size))), K)
    ties = count_ties(pair.ours, pair.latent, ours, theirs)
    print(f"{ties} ties in {ours.shape[2]} frames of {K} codes")
    assert ties <= 0.05 * ours.shape[2]
    if clip in ("long", "speech"):
        assert min(len(np.unique(codes)) for codes in theirs[0]) > 5  # many different codes
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
    for m in (codec, pair.ours):  # a model with more codebooks takes fewer codes, too
        close(m.decode(mx.array(theirs)), pair.decode(theirs), 1e-4)
    if pair.which == "moshi":  # the shapes give the sizes, and the way back gives the same bytes
        config, weights = csm_layouts.mimi_to_native({}, pair.weights)
        assert mimi.MimiConfig(**config | {"ratios": tuple(config["ratios"])}) == replace(
            pair.config, **{f: getattr(mimi.MimiConfig(), f) for f in UNTOLD}
        )
        back = csm_layouts.to_kyutai(config, weights)
        spelled = csm_layouts.rename(pair.weights, csm_layouts.SPELLINGS)
        assert back.keys() == spelled.keys()
        assert all(mx.array_equal(back[n], w) for n, w in spelled.items() if not n.endswith("_initialized"))


# ---------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module", params=["small", "deep"])
def codec(request):
    model = mimi.Mimi(CONFIGS[request.param])
    weights = draw({name: w.shape for name, w in tree_flatten(model.parameters())}, gain=0.9)
    return model.load_weights([(name, mx.array(w)) for name, w in weights.items()])


def clip_for(codec, what, frames, seed=0):
    """(random codes to decode or noise to encode, its length per frame)."""
    rng, c = np.random.default_rng(seed), codec.config
    if what == "decode":
        return mx.array(rng.integers(0, c.codebook_size, (1, c.n_codebooks, frames))), 1
    return mx.array(noise(frames * c.frame_size, seed)), c.frame_size


def stream(step, x, sizes, state):
    """Stream x in chunks of these sizes, repeated; returns (the whole output, the state after)."""
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
    if what == "encode":  # an incomplete frame waits in the state
        y, state = codec.encode_step(mx.ones((1, 1, 11)), state)
        assert y.shape == (1, codec.n_codebooks, 0) and state.rest.shape == (1, 11)


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_streams_do_not_meet(codec, what):
    """Two interleaved, one after another, one after an abandoned one, and one state used twice."""
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


def test_streams_of_different_ages_side_by_side(codec):
    """Joined streams, also new ones, continue as alone, and so do split ones."""
    ages = (0, 3, 25, 45)  # the last beyond the window of `deep` and `small`
    clips = [clip_for(codec, "decode", 60, seed)[0] for seed in range(4)]
    alone = [codec.decode(x) for x in clips]
    states = [
        stream(codec.decode_step, x[..., :n], [4], codec.init_state())[1] if n else codec.init_state()
        for x, n in zip(clips, ages)
    ]
    joined, out = join_states(states), [[] for _ in ages]
    for i in range(5):
        y, joined = codec.decode_step(
            mx.concatenate([x[..., n + 2 * i : n + 2 * i + 2] for x, n in zip(clips, ages)]), joined
        )
        [o.append(y[b : b + 1]) for b, o in enumerate(out)]
    states = split_state(joined)
    for b in (2, 0):  # split off, in another order
        y, states[b] = codec.decode_step(clips[b][..., ages[b] + 10 : ages[b] + 13], states[b])
        out[b].append(y)
    rest = join_states([states[3], states[1]])
    y, rest = codec.decode_step(mx.concatenate([clips[b][..., ages[b] + 10 : ages[b] + 13] for b in (3, 1)]), rest)
    out[3].append(y[:1]), out[1].append(y[1:])
    size = codec.frame_size
    for o, whole, n in zip(out, alone, ages):
        close(mx.concatenate(o, axis=2), whole[..., n * size : (n + 13) * size], 1e-5)
    fresh = join_states([codec.init_state(), codec.init_state()])
    close(
        codec.decode_step(mx.concatenate(clips[:2])[..., :5], fresh)[0],
        mx.concatenate(alone[:2])[..., : 5 * size],
        1e-5,
    )


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
        with pytest.raises(ValueError, match=rf"0\.\.{size - 1}"):  # out of bounds, which MLX does not check
            codec.decode_step(mx.zeros((2, K, 3), mx.int32).at[1, K - 1, 2].add(code), state)
    assert codec.encode(mx.zeros((1, 1, 0))).shape == (1, K, 0)
    assert codec.decode(mx.zeros((1, K, 0), mx.int32)).shape == (1, 1, 0)


@pytest.fixture(scope="module")
def published():
    """A small Mimi with the names of kyutai's published file, which are older than moshi's."""
    weights = {name: mx.array(w.numpy()) for name, w in moshi_mimi(CONFIGS["small"]).state_dict().items()}
    return {n.replace("projs.0.", "proj.").replace("in_proj.", "in_proj_"): w for n, w in weights.items()}


BOOK = "quantizer.rvq_rest.vq.layers.3._codebook"
MISFITS = [  # a tensor, its shape (None: missing), words of the error
    ("decoder.model.0.conv.conv.bias", None, "missing decoder.0.bias"),
    (f"{BOOK}.cluster_usage", None, "rest"),
    ("backbone.norm.weight", (4,), "unexpected backbone.norm.weight"),
    ("decoder_transformer.transformer.layers.1.linear2.weight", (48, 95), "(48, 95), not (48, 96)"),
    ("encoder.model.3.conv.conv.weight", (16, 9, 4), "encoder.3.weight is (2, 16, 18), not (2, 16, 16)"),
    (f"{BOOK}.embedding_sum", (64, 19), "rest"),
    (f"{BOOK}.cluster_usage", (63,), "rest"),
]


@pytest.mark.parametrize("name, shape, message", MISFITS)
def test_tensors_that_do_not_fit_are_named(published, name, shape, message):
    weights = {n: w for n, w in published.items() if n != name} | ({name: mx.zeros(shape)} if shape else {})
    with pytest.raises(ValueError, match=re.escape(message)):
        from_layout(weights, asdict(CONFIGS["small"]))


def test_loading(published):
    known, before = asdict(CONFIGS["small"]), np.array(mx.random.state[0])
    from_layout(published, known)
    mimi.Mimi(CONFIGS["deep"])
    assert np.array_equal(before, np.array(mx.random.state[0]))  # the caller's random numbers are left alone
    for k in (-1, 0, 7):
        with pytest.raises(ValueError, match=f"6 codebooks, not {k}"):
            from_layout(published, known, k)
    with pytest.raises(ValueError, match=r"not a Mimi.*lm_head"):
        from_layout({"lm_head.weight": mx.zeros((4, 4))})


# ---------------------------------------------------------------------------------------------------- audio files


@pytest.mark.parametrize("suffix", mimi.FORMATS)
def test_written_in_pieces_and_read_back(tmp_path, suffix):
    x = np.sin(np.arange(70_000) * 2 * np.pi * 440 / 24_000).astype(np.float32) * 0.5
    with audio_writer(tmp_path / f"pieces{suffix}") as write:
        for i in range(0, len(x), 9_999):
            write(x[i : i + 9_999])
    mimi.write_audio(tmp_path / f"whole{suffix}", mx.array(x))
    for name in ("pieces", "whole"):
        y = mimi.read_audio(tmp_path / f"{name}{suffix}")
        assert abs(len(y) - len(x)) < 3_000 and 0.4 < np.abs(y[10_000:60_000]).max() < 0.6
        spectrum = np.abs(np.fft.rfft(y[10_000:34_000]))  # a second: bins of 1 Hz
        assert np.argmax(spectrum) == 440
        if suffix in (".wav", ".flac"):
            np.testing.assert_allclose(y, x, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix, claimed", [("flac", 0), ("wav", 0), ("wav", 2**32 - 1)])
def test_a_length_that_a_header_claims_is_not_believed(tmp_path, suffix, claimed):
    """A streamed FLAC has none; a killed recorder leaves 0 or the maximum in a WAV."""
    file, audio = tmp_path / f"a.{suffix}", np.random.default_rng(0).standard_normal(24_000) * 0.1
    soundfile.write(file, audio, 24_000)
    data, length = bytearray(file.read_bytes()), claimed.to_bytes(4, "little")
    if suffix == "flac":
        data[21] &= 0xF0  # of 36 bits in STREAMINFO
        data[22:26] = length
    else:
        at = data.index(b"data") + 4
        data[4:8], data[at : at + 4] = length, length
    file.write_bytes(data)
    if claimed or suffix == "flac" or shutil.which("ffmpeg"):
        np.testing.assert_allclose(mimi.read_audio(file), audio, atol=2**-15)
    else:
        with pytest.raises(ValueError, match="no sound"):
            mimi.read_audio(file)


def test_what_libsndfile_does_not_know_is_read_by_ffmpeg(tmp_path, monkeypatch):
    x = np.sin(np.arange(48_000) * 2 * np.pi * 440 / 48_000).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.wav", x, 48_000)
    for name in ("a.m4a", "a.aac", "-b c.webm", "video.mp4"):
        picture = ["-f", "lavfi", "-i", "color=s=64x64:d=1"] if name == "video.mp4" else []
        if not shutil.which("ffmpeg"):
            pytest.skip("ffmpeg is not installed")
        command = ["ffmpeg", "-v", "error", "-y", "-i", tmp_path / "a.wav", *picture, f"file:{tmp_path / name}"]
        subprocess.run(command, check=True)
        y = mimi.read_audio(tmp_path / name)
        assert abs(len(y) - 24_000) < 3_000 and np.argmax(np.abs(np.fft.rfft(y[:24_000], 24_000))) == 440
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"a\.m4a .*ffmpeg"):
        mimi.read_audio(tmp_path / "a.m4a")


# ---------------------------------------------------------------------------------------------------- the command


def python(*args, **env):
    args, here, env = [sys.executable, *map(str, args)], Path(__file__).parent.parent, os.environ | env
    env = env | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(args, cwd=here, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory, published):
    """A model, a clip, and wrong inputs."""
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


def test_what_a_format_cannot_hold_is_said(files, tmp_path):
    for name, rate in (("a.opus", 44_100), ("a.mp3", 96_000)):
        with pytest.raises(ValueError, match=f"cannot write .* at {rate} Hz"):
            mimi.write_audio(tmp_path / name, np.zeros(1000), rate)
    assert list(tmp_path.iterdir()) == []
    assert wav_head(24_000, 2**32) == wav_head(24_000)  # a day of sound


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


def test_the_command_never_overwrites_what_it_reads(files, tmp_path):
    before = shutil.copy(files / "in.wav", tmp_path / "me.wav").read_bytes()
    os.link(tmp_path / "me.wav", tmp_path / "too.wav")
    model = ["--model", files / "mimi.safetensors"]
    for out in (["me.wav"], ["too.wav"], ["new.wav", "--codes", tmp_path / "too.wav"]):
        done = python("mimi.py", tmp_path / "me.wav", tmp_path / out[0], *out[1:], *model)
        assert done.returncode == 2 and "is also an input: give another OUT" in done.stderr, done.stderr
    assert (tmp_path / "me.wav").read_bytes() == before and len(os.listdir(tmp_path)) == 2


def test_the_bundled_codec_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mimi.load("tiny").config.codebook_size < mimi.MimiConfig.codebook_size


def test_the_command_with_a_codec_of_another_rate(published, tmp_path):
    config = {"config": json.dumps(asdict(CONFIGS["small"]) | {"sample_rate": 16_000})}
    mx.save_safetensors(str(tmp_path / "mimi.safetensors"), published, config)
    soundfile.write(tmp_path / "in.wav", noise(8000, 1)[0, 0], 16_000)
    done = python("mimi.py", tmp_path / "in.wav", tmp_path / "out.wav", "--model", tmp_path / "mimi.safetensors")
    assert done.returncode == 0, done.stderr
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.frames) == (16_000, 8000)


def test_a_rate_that_is_too_low(tmp_path):
    """A small file that claims 2 Hz would become hours of samples."""
    soundfile.write(tmp_path / "a.wav", np.zeros(200), 2)
    with pytest.raises(ValueError, match="no sound of use: 200 samples at 2 Hz"):
        mimi.read_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.zeros(200), 2000)
    assert len(mimi.read_audio(tmp_path / "b.wav")) == 2400


MISTAKES = """none.wav mimi.safetensors out.wav | no such file
text.txt mimi.safetensors out.wav | not an audio file
nan.wav mimi.safetensors out.wav | NaN
empty.wav mimi.safetensors out.wav | no sound
in.wav none.safetensors out.wav | no such file
in.wav half.safetensors out.wav | truncated
in.wav text.txt out.wav | text.txt
in.wav hollow out.wav | hollow
in.wav lacking.safetensors out.wav | missing decoder.0.bias
in.wav mimi.safetensors none/out.wav | cannot write
in.wav mimi.safetensors . | cannot write
in.wav mimi.safetensors out.wav --n-codebooks 7 | 6 codebooks
in.wav mimi.safetensors out.xyz --codes codes.npz | suffix
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
