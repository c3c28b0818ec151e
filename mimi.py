"""Mimi, the neural audio codec of Moshi and CSM, on MLX: 24 kHz mono speech <-> 12.5 frames/s of integer codes.

Sources: Defossez et al., "Moshi" (arXiv:2410.00037); kyutai's PyTorch code (`moshi` 0.2.13) and Hugging Face
transformers' MimiModel (5.23), to both of which `test_mimi.py` holds this file.

    encode: waveform -> SEANet encoder (25 Hz) -> causal transformer -> stride-2 conv (12.5 Hz) -> split RVQ codes
    decode: codes -> sum of code vectors -> x2 upsampling (25 Hz) -> causal transformer -> SEANet decoder -> waveform

Every layer is causal and takes and returns its own past, so a stream is the same program as a whole clip: `encode` and
`decode` are `encode_step` and `decode_step` over a long clip, chunk by chunk. State is a value: a step never alters
the state that it was given.

Shapes: B batch, S samples, T positions at a layer's own rate, F frames, K codebooks, C/D channels, H heads.
Inside, activations are (B, T, C); at the door, audio is (B, 1, S) and codes are (B, K, F).
"""

import importlib
import io
import json
import logging
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

with suppress(ImportError):
    import mlx_cpu  # noqa: F401  before mlx, whose functions it makes fast on a Linux CPU; elsewhere it does nothing

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

DEFAULT_REPO = "kyutai/moshiko-pytorch-bf16"
DEFAULT_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"

log = logging.getLogger("csm")


class DownloadError(ValueError):
    """What is on the Hugging Face Hub, or should be, cannot be had."""


@dataclass(frozen=True)
class MimiConfig:
    sample_rate: int = 24_000
    n_filters: int = 64  # channels at the waveform's rate, doubled at each downsampling
    ratios: tuple = (8, 6, 5, 4)  # the decoder's upsampling, in order; the encoder's is the reverse
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2  # a residual branch is this much narrower
    n_residual_layers: int = 1
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    ffn_dim: int = 2048
    context: int = 250  # positions that attention sees, itself included: 10 s at 25 Hz
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    codebook_size: int = 2048
    codebook_dim: int = 256
    n_codebooks: int = 32
    n_semantic: int = 1  # codebooks of the first quantizer; the rest quantize the same input beside it

    @property
    def frame_size(self):
        return 2 * math.prod(self.ratios)  # samples a frame: 1920

    @property
    def frame_rate(self):
        return self.sample_rate / self.frame_size  # Hz: 12.5


# ---------------------------------------------------------------------------------------------------- convolutions


class Conv(nn.Module):
    """Causal 1-D convolution as matrix products: plain, strided and transposed are one thing.

    With `stride` s, s input rows are read as one row of s * C channels. With `upsample` u (a transposed convolution of
    stride u), a row of u * O channels is written as u rows. In between, every case is a stride-1 convolution of few
    taps, weight (taps, C_out, C_in). `pad` is what stands before the first input: "zeros" or "first", its first row.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, upsample=1, dilation=1, bias=True, pad="zeros"):
        super().__init__()
        assert kernel % (stride * upsample) == 0
        self.stride, self.upsample, self.dilation, self.pad = stride, upsample, dilation, pad
        taps = kernel // (stride * upsample)
        self.weight = mx.zeros((taps, c_out * upsample, c_in * stride))
        self.bias = mx.zeros((c_out * upsample,)) if bias else None

    def __call__(self, x, past):
        B, T, _ = x.shape
        taps, c_out, c_in = self.weight.shape
        n_past = (taps - 1) * self.dilation
        bias = mx.zeros((1,)) if self.bias is None else self.bias
        if past is None and n_past:
            past = mx.zeros((B, n_past, c_in)) if self.pad == "zeros" else mx.repeat(x[:, :1], n_past * self.stride, 1)
            past = past.reshape(B, n_past, c_in)
        x = x.reshape(B, T // self.stride, c_in)  # (B, T / s, s * C)
        T = x.shape[1]
        if n_past:
            x = mx.concatenate([past, x], axis=1)
            past = x[:, T:]
        windows = [x[:, i * self.dilation :][:, :T] for i in range(taps)]
        if c_in < taps:  # a waveform: one product in place of one a tap
            windows, weight = [mx.concatenate(windows, axis=-1)], self.weight.swapaxes(0, 1).reshape(1, c_out, -1)
        else:
            weight = self.weight
        y = bias
        for window, w in zip(windows, weight):
            y = mx.addmm(y, window, w.T)
        return y.reshape(B, T * self.upsample, c_out // self.upsample), past


class Upsample(nn.Module):
    """Depthwise transposed convolution, stride 2, kernel 4, no bias: 12.5 Hz -> 25 Hz. weight (taps, 2, D)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = mx.zeros((2, 2, dim))

    def __call__(self, x, past):
        B, T, D = x.shape
        past = mx.zeros((B, 1, D)) if past is None else past
        x = mx.concatenate([past, x], axis=1)[:, :, None]  # (B, 1 + T, 1, D)
        y = x[:, :-1] * self.weight[0] + x[:, 1:] * self.weight[1]  # (B, T, 2, D)
        return y.reshape(B, 2 * T, D), x[:, T:, 0]


def gelu(x):
    """x Phi(x), exactly. (nn.gelu and its like are compiled: on a Linux CPU they need g++ and a writable /tmp.)"""
    return x * (0.5 + 0.5 * mx.erf(x * math.sqrt(0.5)))


class ELU(nn.Module):
    def __call__(self, x, past):
        return mx.maximum(x, mx.exp(mx.minimum(x, 0)) - 1), None


def run(layers, x, past, *shared):
    """x through layers that each take (x, past, *shared) and return (x, past). Returns (x, list of pasts)."""
    past = past or [None] * len(layers)
    after = []
    for layer, p in zip(layers, past):
        x, p = layer(x, p, *shared)
        after.append(p)
    return x, after


class ResBlock(nn.Module):
    def __init__(self, dim, hidden, kernel, dilation):
        super().__init__()
        self.block = [ELU(), Conv(dim, hidden, kernel, dilation=dilation), ELU(), Conv(hidden, dim, 1)]

    def __call__(self, x, past):
        y, past = run(self.block, x, past)
        return x + y, past


def seanet_block(c, dim):
    hidden, kernel = dim // c.compress, c.residual_kernel_size
    return [ResBlock(dim, hidden, kernel, c.dilation_base**i) for i in range(c.n_residual_layers)]


def seanet_encoder(c):
    """Layers from waveform (B, S, 1) to (B, S / 960, D), numbered as in kyutai's checkpoint."""
    dim = c.n_filters
    layers = [Conv(1, dim, c.kernel_size)]
    for ratio in reversed(c.ratios):
        layers += [*seanet_block(c, dim), ELU(), Conv(dim, 2 * dim, 2 * ratio, stride=ratio)]
        dim *= 2
    return [*layers, ELU(), Conv(dim, c.dim, c.last_kernel_size)]


def seanet_decoder(c):
    """Layers from (B, T, D) at 25 Hz to waveform (B, T * 960, 1)."""
    dim = c.n_filters * 2 ** len(c.ratios)
    layers = [Conv(c.dim, dim, c.kernel_size)]
    for ratio in c.ratios:
        layers += [ELU(), Conv(dim, dim // 2, 2 * ratio, upsample=ratio), *seanet_block(c, dim // 2)]
        dim //= 2
    return [*layers, ELU(), Conv(dim, 1, c.last_kernel_size)]


# ---------------------------------------------------------------------------------------------------- transformer


class TransformerLayer(nn.Module):
    """Pre-norm layer with layer scale. past: the keys and values held, (k, v)."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.context, self.theta = c.n_heads, c.context, c.rope_theta
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps), nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.in_proj, self.out_proj = mx.zeros((3 * c.dim, c.dim)), mx.zeros((c.dim, c.dim))
        self.linear1, self.linear2 = mx.zeros((c.ffn_dim, c.dim)), mx.zeros((c.dim, c.ffn_dim))
        self.scale1, self.scale2 = mx.zeros((c.dim,)), mx.zeros((c.dim,))

    def __call__(self, x, past, offset, mask):
        B, T, D = x.shape
        d = D // self.n_heads
        qkv = (self.norm1(x) @ self.in_proj.T).reshape(B, T, 3, self.n_heads, d)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, H, T, d)
        q, k = (mx.fast.rope(y, d, traditional=True, base=self.theta, scale=1.0, offset=offset) for y in (q, k))
        past = past or [mx.zeros((B, self.n_heads, self.context - 1, d))] * 2  # of one length, whatever a stream's age
        k, v = (mx.concatenate([held, new], axis=2) for held, new in zip(past, (k, v)))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=mask)  # (B, H, T, d)
        x = x + self.scale1 * (y.transpose(0, 2, 1, 3).reshape(B, T, D) @ self.out_proj.T)
        past = [x[:, :, T:] for x in (k, v)]
        return x + self.scale2 * (gelu(self.norm2(x) @ self.linear1.T) @ self.linear2.T), past


class Transformer(nn.Module):
    """(B, T, D) -> (B, T, D), causal over the last `context` positions. past: (each layer's, positions seen (B,))."""

    def __init__(self, c):
        super().__init__()
        self.layers, self.context = [TransformerLayer(c) for _ in range(c.n_layers)], c.context

    def __call__(self, x, past):
        B, T, _ = x.shape
        layers, seen = past or (None, mx.zeros((B,), mx.int32))
        position = seen[:, None, None, None] + mx.arange(T)[:, None]  # (B, 1, T, 1)
        age = self.context - 1 + mx.arange(T)[:, None] - mx.arange(self.context - 1 + T)  # (T, S): how old each key is
        mask = (age >= 0) & (age < self.context) & (age <= position)  # (B, 1, T, S)
        x, layers = run(self.layers, x, layers, seen, mask)
        return x, (layers, seen + T)


# ---------------------------------------------------------------------------------------------------- quantizer


class RVQ(nn.Module):
    """Residual vector quantizer: each codebook quantizes what the ones before it left over."""

    def __init__(self, c, n):
        super().__init__()
        self.input_proj, self.output_proj = mx.zeros((c.codebook_dim, c.dim)), mx.zeros((c.dim, c.codebook_dim))
        self.codebooks = mx.zeros((n, c.codebook_size, c.codebook_dim))
        self.norms = mx.zeros((n, c.codebook_size))  # |v|^2 of each code vector

    def encode(self, x):  # (B, F, D) -> (B, n, F)
        residual = x @ self.input_proj.T
        codes = []
        for vectors, norms in zip(self.codebooks, self.norms):  # nearest: |r - v|^2 less the constant |r|^2
            codes.append(mx.argmin(mx.addmm(norms, residual, vectors.T, alpha=-2), axis=-1))
            residual = residual - vectors[codes[-1]]
        return mx.stack(codes, axis=1)

    def decode(self, codes):  # (B, n, F) -> (B, F, D)
        n, size, dim = self.codebooks.shape
        index = codes + size * mx.arange(codes.shape[1])[:, None]
        return self.codebooks.reshape(n * size, dim)[index].sum(axis=1) @ self.output_proj.T


# ---------------------------------------------------------------------------------------------------- the codec


class State(NamedTuple):
    """What a stream has to remember, encoding and decoding apart. Made by `Mimi.init_state`; None: nothing yet."""

    rest: mx.array  # (B, s) samples that do not fill a frame yet
    encoder: list | None = None
    decoder: list | None = None


def join_states(states):
    """States of streams that decode, of any ages, as the state of all of them side by side."""
    begun = next((s.decoder for s in states if s.decoder), None)  # before its first frame a stream's past is zeros
    decoders = [s.decoder or tree_map(lambda x: x if x is None else mx.zeros_like(x[:1]), begun) for s in states]
    joined = begun and tree_map(lambda *x: None if x[0] is None else mx.concatenate(x), *decoders)
    return State(mx.concatenate([s.rest for s in states]), None, joined)


def split_state(state):
    """The other way: the state of each stream of the batch by itself."""
    rows = [lambda x, i=i: None if x is None else x[i : i + 1] for i in range(len(state.rest))]
    return [State(*(tree_map(row, part) for part in state)) for row in rows]


class Mimi(nn.Module):
    """The codec. Holds weights only: safe to share among streams and threads."""

    def __init__(self, config: MimiConfig = MimiConfig()):
        super().__init__()
        self.config = c = config
        self.sample_rate, self.frame_size, self.n_codebooks = c.sample_rate, c.frame_size, c.n_codebooks
        self.encoder = seanet_encoder(c)
        self.encoder_transformer = Transformer(c)
        self.downsample = Conv(c.dim, c.dim, 4, stride=2, bias=False, pad="first")
        self.first = RVQ(c, c.n_semantic)
        self.rest = RVQ(c, c.n_codebooks - c.n_semantic) if c.n_codebooks > c.n_semantic else None
        self.upsample = Upsample(c.dim)
        self.decoder_transformer = Transformer(c)
        self.decoder = seanet_decoder(c)

    def init_state(self, batch=1):
        """The state of `batch` streams that start now, side by side."""
        return State(mx.array(np.zeros((batch, 0), np.float32)))  # not lazy: any thread may take it on

    def encode_step(self, audio, state):
        """audio (B, 1, any number of samples), state -> codes (B, K, f) int32 of the frames now full, new state."""
        audio = mx.array(audio)
        if audio.ndim != 3 or audio.shape[1] != 1 or len(audio) != len(state.rest):
            raise ValueError(f"audio must be ({len(state.rest)}, 1, samples), not {audio.shape}")
        x = mx.concatenate([state.rest, audio[:, 0].astype(mx.float32)], axis=1)
        n_frames = x.shape[1] // self.frame_size
        x, rest = x[:, : n_frames * self.frame_size], x[:, n_frames * self.frame_size :]
        if n_frames == 0:
            mx.async_eval(rest)
            return mx.zeros((len(audio), self.n_codebooks, 0), mx.int32), state._replace(rest=rest)
        layers = [*self.encoder, self.encoder_transformer, self.downsample]
        x, past = run(layers, x[..., None], state.encoder)  # (B, F, D)
        codes = self.first.encode(x)
        if self.rest is not None:
            codes = mx.concatenate([codes, self.rest.encode(x)], axis=1)
        codes, state = codes.astype(mx.int32), state._replace(rest=rest, encoder=past)
        mx.async_eval(codes, state)  # under way, so that another thread may go on with them
        return codes, state

    def decode_step(self, codes, state):
        """codes (B, K, f), state -> audio (B, 1, f * 1920) float32, new state. K may be less than the codec has."""
        codes = mx.array(codes)
        B = len(state.rest)
        if codes.ndim != 3 or codes.shape[0] != B or not 1 <= codes.shape[1] <= self.n_codebooks:
            raise ValueError(f"codes must be ({B}, 1 to {self.n_codebooks}, frames), not {codes.shape}")
        if codes.shape[2] == 0:
            return mx.zeros((B, 1, 0)), state
        n = self.config.n_semantic
        x = self.first.decode(codes[:, :n])  # (B, F, D)
        if codes.shape[1] > n:
            x = x + self.rest.decode(codes[:, n:])
        layers = [self.upsample, self.decoder_transformer, *self.decoder]
        x, past = run(layers, x, state.decoder)  # (B, S, 1)
        audio, state = x.transpose(0, 2, 1), state._replace(decoder=past)
        mx.async_eval(audio, state)
        return audio, state

    def encode(self, audio):
        """audio (B, 1, S) -> codes (B, K, ceil(S / 1920)) int32. The last frame is filled up with zeros, as moshi does.

        Raises ValueError for another shape.
        """
        audio = mx.array(audio)
        if audio.ndim != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio must be (batch, 1, samples), not {audio.shape}")
        if not mx.isfinite(audio).all().item():
            raise ValueError("the audio contains NaN or infinite samples")
        audio = mx.pad(audio, [(0, 0), (0, 0), (0, -audio.shape[2] % self.frame_size)])
        return self._whole(self.encode_step, audio, self.frame_size)

    def decode(self, codes):
        """codes (B, K, F) -> audio (B, 1, F * 1920) float32. Raises ValueError for a code outside the codebook."""
        codes = mx.array(codes)
        if codes.ndim != 3:
            raise ValueError(f"codes must be (batch, codebooks, frames), not {codes.shape}")
        if codes.size and not 0 <= codes.min().item() <= codes.max().item() < self.config.codebook_size:
            raise ValueError(f"codes must lie in 0..{self.config.codebook_size - 1}")
        return self._whole(self.decode_step, codes, 1)

    def _whole(self, step, x, width):
        """x (B, channels, width a frame) through `step` in chunks."""
        chunk = width * (25 if mx.default_device() == mx.cpu else 125)  # frames: two seconds fit a CPU's cache
        state, out = self.init_state(x.shape[0]), []
        for i in range(0, max(x.shape[2], 1), chunk):
            y, state = step(x[:, :, i : i + chunk], state)
            mx.eval(y, state)  # else the graph of a long clip keeps every activation alive
            out.append(y)
        return mx.concatenate(out, axis=2)


# ---------------------------------------------------------------------------------------------------- loading


def from_weights(weights, config=None, n_codebooks=None):
    """A Mimi from the tensors {name: array} of our layout, computing in float32.

    config: dict of MimiConfig's fields, those that are left out at their defaults. n_codebooks: use only the first so
    many. Raises ValueError that names the tensors which are missing, unexpected or of a wrong shape.
    """
    c = MimiConfig(**{f: config[f] for f in MimiConfig.__dataclass_fields__ if f in (config or {})})
    if c.n_heads < 1 or c.dim % c.n_heads:
        raise ValueError(f"{c.n_heads} heads do not divide {c.dim} channels")
    K = c.n_codebooks if n_codebooks is None else n_codebooks
    if not c.n_semantic <= K <= c.n_codebooks:
        raise ValueError(f"this Mimi works with {c.n_semantic} to {c.n_codebooks} codebooks, not {K}")
    model = Mimi(replace(c, ratios=tuple(c.ratios), n_codebooks=K))
    weights = {name: mx.contiguous(w.astype(mx.float32)) for name, w in weights.items()}
    for part, n in (("first", c.n_semantic), ("rest", K - c.n_semantic)):
        # A code vector is stored as the sum of what was assigned to it in training, and how much that was.
        sums, usage = (weights.pop(f"{part}.{name}", None) for name in ("embedding_sum", "cluster_usage"))
        if sums is not None and usage is not None and n:
            vectors = sums[:n] / mx.maximum(usage[:n], 1e-5)[..., None]
            weights |= {f"{part}.codebooks": vectors, f"{part}.norms": (vectors**2).sum(-1)}
    if model.rest is None:
        weights = {name: w for name, w in weights.items() if not name.startswith("rest.")}
    fill(model, weights)
    return model


def check(model, weights):
    """Raise a ValueError that names what `weights` {name: array} has missing, unexpected or misshapen for `model`."""
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"missing {k}" for k in expected if k not in weights]
    problems += [f"unexpected {k}" for k in weights if k not in expected]
    shapes = {k: (weights[k].shape, w.shape) for k, w in expected.items() if k in weights}
    problems += [f"{k} is {ours}, not {wanted}" for k, (ours, wanted) in shapes.items() if ours != wanted]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:4])}{more}")


def fill(model, weights):
    """Give `model` exactly `weights` {name: array}. Raises ValueError as `check` does."""
    check(model, weights)
    for w in weights.values():  # one at a time: each is read, cast and done with before the next
        mx.eval(w)
    model.load_weights(list(weights.items()), strict=False)


def read_safetensors(path):
    """{name: array} (read from disk when first used) and the metadata of a .safetensors file. ValueError: damaged."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        return mx.load(str(path), format="safetensors", return_metadata=True)
    except RuntimeError:
        raise ValueError(f"{path} is truncated or not a safetensors file") from None


def read_json(path):
    """The fields of a JSON file, {} if there is none. Raises ValueError that names it."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8"))) if Path(path).is_file() else {}
    except (ValueError, TypeError, OSError):
        raise ValueError(f"{path} is not a JSON file of fields") from None


def download(repo, *patterns):
    """A Hugging Face repository's file -> its local path; or, of several patterns, the folder with what matches.

    Says on the logger "csm" what it fetches. Raises FileNotFoundError where the repository has no such file, and
    DownloadError, which says what to do, where it cannot be had.
    """
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

    known = {
        errors.GatedRepoError: "it is gated: accept its licence on huggingface.co and run `hf auth login`",
        errors.RepositoryNotFoundError: "no such folder, file or Hugging Face repository",
        errors.LocalEntryNotFoundError: "no network, or HF_HUB_OFFLINE is set, and it was not downloaded before",
    }

    def fetch(**how):
        if len(patterns) == 1:
            return Path(hf_hub_download(repo, *patterns, **how))
        return Path(snapshot_download(repo, allow_patterns=list(patterns), **how))

    try:
        held = None
        with suppress(errors.LocalEntryNotFoundError):
            held = fetch(local_files_only=True)
            if len(patterns) == 1:
                return held
        if not constants.HF_HUB_OFFLINE and not (held and find(held, patterns[0])):
            log.warning("fetching %s from %s", patterns[0], repo)
        return fetch()
    except Exception as e:  # of many kinds: connection, proxy, disk
        if isinstance(e, errors.EntryNotFoundError) and not isinstance(e, errors.LocalEntryNotFoundError):
            raise FileNotFoundError(f"{repo} has no {patterns[0]}") from None
        reason = next((text for kind, text in known.items() if isinstance(e, kind)), str(e) or type(e).__name__)
        reason = f"{reason.splitlines()[0]} (without: --model tiny)"
        raise DownloadError(f"cannot download {patterns[0]} from {repo}: {reason}") from None


FILES = ("mimi.safetensors", "tokenizer-*.safetensors", "*mimi*.gguf")  # a Mimi alone: ours, kyutai's, llama.cpp's
INSIDE = ("model.safetensors", "*.index.json", "*.safetensors")  # in transformers' layout, or a CSM's with one inside


def locate(path_or_repo=None):
    """A Mimi's local file; downloaded if need be. Raises ValueError."""
    path = download(DEFAULT_REPO, DEFAULT_FILE) if path_or_repo is None else local(path_or_repo, FILES, INSIDE)
    file = find(path, *FILES, *INSIDE) if path.is_dir() else path
    if file is None:
        raise ValueError(f"no Mimi in {path}")
    return file


def local(source, *kinds, beside=("*.json",), known="no such file or folder"):
    """The path of a file or folder as it is; or a Hugging Face repository, downloaded: a folder. Raises ValueError.

    kinds: patterns of the files wanted; the first kind that there is will do. beside: of what else to bring.
    """
    if Path(source).exists():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"no such model: {source} ({known})")
    for patterns in kinds:
        folder = download(str(source), *patterns, *beside)
        if find(folder, *patterns):
            break
    return folder


def find(folder, *patterns):
    """The first file in `folder` that fits a pattern, of the first pattern that any fits; or None."""
    return next((f for pattern in patterns for f in sorted(Path(folder).glob(pattern))), None)


def read_weights(path):
    """A weights file (.safetensors, .pt, .gguf), or the index of its shards -> ({name: array}, metadata), lazily."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return layouts(path).read_pt(path), {}
    if path.suffix == ".gguf":
        weights, config = layouts(path, "csm_gguf").read_gguf(path)
        return weights, {"config": json.dumps(config)} if config else {}
    if path.suffix == ".json":
        shards = sorted({path.parent / shard for shard in read_json(path).get("weight_map", {}).values()})
        return {name: w for shard in shards for name, w in read_safetensors(shard)[0].items()}, {}
    return read_safetensors(path)


def layouts(path, name="csm_layouts"):
    """csm_layouts or csm_gguf, which read what is not in our own layout. ValueError: it is not beside this file."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(f"{path} is not in our own layout: reading it takes {name}.py") from None


def load(path_or_repo=None, n_codebooks=None):
    """A Mimi from a folder, a weights file or a Hugging Face repository, in our layout, kyutai's or transformers'.

    None: kyutai's own weights (kyutai/moshiko-pytorch-bf16). n_codebooks: use the first so many, None for all there
    are. Raises ValueError.
    """
    return from_weights(*read_mimi(locate(path_or_repo)), n_codebooks)


def read_mimi(path):
    """A Mimi's file, or a CSM's that has one inside -> ({name: array} of our layout, its config), lazily."""
    weights, metadata = read_weights(path)
    config = json.loads(metadata["config"]) if "config" in metadata else read_json(path.with_name("config.json"))
    if "first.input_proj" not in weights:
        config, weights = layouts(path).mimi_to_native(config, weights)
    return weights, config


# ---------------------------------------------------------------------------------------------------- audio files


FORMATS = {  # what a file's suffix says: libsndfile's format and subtype
    ".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"),
}  # fmt: skip


def read_audio(path, sample_rate=24_000):
    """An audio file of any kind, rate and number of channels -> (samples,) float32 mono. Raises ValueError.

    What libsndfile does not know (m4a, aac, webm, video) is read by `ffmpeg`, where that is installed.
    """
    import soundfile
    import soxr

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
        audio = audio.mean(axis=1)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a .raw file
        audio, rate = read_by_ffmpeg(path, sample_rate), sample_rate
    if not np.isfinite(audio).all():
        raise ValueError(f"{path} contains NaN or infinite samples")
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate).astype(np.float32)
    if not len(audio):
        raise ValueError(f"{path} holds no sound")
    return audio


def read_by_ffmpeg(path, sample_rate):
    if not shutil.which("ffmpeg"):
        raise ValueError(f"{path} is not an audio file that can be read here (m4a, aac, webm and video need ffmpeg)")
    command = ["ffmpeg", "-v", "error", "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-f", "f32le", "-ac", "1", "-ar", str(sample_rate), "-"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{path} is not an audio file that can be read")
    return np.frombuffer(done.stdout, "<f4")


def to_pcm16(audio):
    """(samples,) float, 1 is full scale -> (samples,) int16, clipped."""
    return (np.clip(np.array(audio, dtype=np.float32), -1, 1) * 32767).round().astype("<i2")


@contextmanager
def replacing(path):
    """An open binary file beside `path`, which takes its place if all goes well. Raises ValueError."""
    path = Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)


def wav_head(sample_rate, n_bytes=None):
    """The 44 bytes before 16-bit mono samples; None: their number is not known yet, the largest there is."""
    sizes = (2**32 - 1, 2**32 - 1) if n_bytes is None or n_bytes + 36 >= 2**32 else (n_bytes + 36, n_bytes)
    form = (b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)  # PCM, mono
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", sizes[0], *form, b"data", sizes[1])


@contextmanager
def audio_writer(path, sample_rate=24_000):
    """A function that takes pieces of audio, (samples,) float, for a file in the format that its suffix names.

    The file is put in place when all is well. "-" (standard output), a pipe and a device get a WAV as it comes. Raises
    ValueError for another suffix, and where the file cannot be written.
    """
    live = path == "-" or (Path(path).exists() and not Path(path).is_file())
    suffix = ".wav" if live else Path(path).suffix.lower()
    if suffix not in FORMATS or Path(path).is_dir():
        raise ValueError(f"cannot write {path}: the suffix must be one of {' '.join(FORMATS)}")
    file = nullcontext(sys.stdout.buffer) if path == "-" else open(path, "wb") if live else replacing(path)
    with file as out:
        if suffix == ".wav":
            head = [wav_head(sample_rate)]  # before the first piece, since until then something may go wrong

            def write(audio):
                out.write((head.pop() if head else b"") + to_pcm16(audio).tobytes())
                out.flush()

            yield write
            write([])
            if not live:
                n = out.tell() - 44
                out.seek(0)
                out.write(wav_head(sample_rate, n))
        else:
            import soundfile

            held = io.BytesIO()  # libsndfile swallows the errors of a file that it writes to
            kind, subtype = FORMATS[suffix]
            try:
                sound = soundfile.SoundFile(held, "w", sample_rate, 1, subtype, format=kind)
            except soundfile.LibsndfileError as e:  # of the rate: Opus has five, MP3 nine
                raise ValueError(f"cannot write {path} at {sample_rate} Hz: {e.error_string}") from None
            with sound:
                # in parts, since a long one overflows the stack of libvorbis
                yield lambda audio: [sound.write(x) for x in np.array_split(to_pcm16(audio), len(audio) // 2**16 + 1)]
            out.write(held.getbuffer())


def write_audio(path, audio, sample_rate=24_000):
    """(samples,) float -> a file in the format of its suffix: .wav .flac .mp3 .ogg .opus; whole or not at all.

    Raises ValueError.
    """
    with audio_writer(path, sample_rate) as write:
        write(audio)


def main(argv=None):
    import argparse

    parser = argparse.ArgumentParser(prog="mimi.py", description="Pass speech through the Mimi codec and back.")
    parser.add_argument("input", help="audio file, any rate and channels")
    parser.add_argument("output", help="WAV file, 24 kHz mono")
    parser.add_argument("--model", help="folder, file or Hugging Face repo (default: kyutai's weights)")
    parser.add_argument("--codes", metavar="F.npz", help="also save the codes (K, F) as `codes`")
    parser.add_argument("--n-codebooks", type=int, metavar="K", help="use only the first K codebooks")
    parser.error = lambda message: parser.exit(2, f"mimi.py: error: {message}\n")  # one line, without the usage
    args = parser.parse_args(argv)
    try:
        audio = mx.array(read_audio(args.input))
        codec = load(args.model, args.n_codebooks)
        with audio_writer(args.output, codec.sample_rate) as write:  # which checks OUT
            codes = codec.encode(audio[None, None])
            write(codec.decode(codes)[0, 0, : audio.size])
            if args.codes:
                with replacing(args.codes) as file:
                    np.savez(file, codes=np.array(codes[0]), sample_rate=codec.sample_rate)
    except (ValueError, OSError) as e:
        parser.exit(2, f"mimi.py: error: {' '.join(str(e).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: nothing was written\n")
    print(f"{codes.shape[2]} frames of {codes.shape[1]} codes", file=sys.stderr)


if __name__ == "__main__":
    main()
