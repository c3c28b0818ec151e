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

import ctypes
import glob
import json
import math
import os
import platform
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple


def load_fast_blas():
    """Load MKL, or else an OpenBLAS, ahead of MLX on x86-64 Linux; return the path loaded, or None.

    MLX's Linux CPU wheel calls plain `cblas_sgemm` and carries a one-thread reference BLAS for it; a library already
    in the process under that name takes its place, and float32 becomes 5 to 100 times faster. Does nothing elsewhere,
    or when mlx is imported already, or with CSM_FAST_BLAS=0 in the environment; never an error.
    """
    off = "mlx.core" in sys.modules or os.environ.get("CSM_FAST_BLAS", "1") == "0"
    if off or sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    roots = [sys.prefix, *(f"{p}/../../.." for p in map(str, sys.path) if p.endswith("site-packages"))]
    found = [f for root in roots for f in sorted(glob.glob(f"{root}/lib/libmkl_rt.so*"))]
    for library in [*found, "libmkl_rt.so", "libmkl_rt.so.2", "libopenblas.so.0"]:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return library
        except OSError:
            continue
    return None


BLAS = load_fast_blas()
with suppress(AttributeError, OSError, TypeError):  # glibc alone: keep what is freed, since new pages are slow
    for setting, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, the most it takes, and M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(setting, size)


@cache
def mkl_on_amd():
    """(MKL, its number of threads), if it is the BLAS of this process and the CPU AMD's; else None.

    There it multiplies one row with a matrix on one core, so that two such products at once are a third faster, and its
    threads make a small product up to forty times slower. Elsewhere it decides well by itself.
    """
    with suppress(OSError):
        if BLAS and "mkl" in BLAS and "AuthenticAMD" in Path("/proc/cpuinfo").read_text():
            mkl = ctypes.CDLL(BLAS)
            return mkl, mkl.MKL_Get_Max_Threads()


def use_threads(for_small):
    """Give the BLAS one thread, before the small products of a frame, or all of them."""
    if found := mkl_on_amd():
        mkl, n = found
        mkl.MKL_Set_Num_Threads(1 if for_small else n)


import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

DEFAULT_REPO = "kyutai/moshiko-pytorch-bf16"
DEFAULT_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
CHUNK = 12  # frames per pass over a whole clip on a CPU (1 s), whose cache holds them then; 10 times that on a GPU


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
    taps, weight (taps, C_in, C_out). `pad` is what stands before the first input: "zeros" or "first", its first row.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, upsample=1, dilation=1, bias=True, pad="zeros"):
        super().__init__()
        assert kernel % (stride * upsample) == 0
        self.stride, self.upsample, self.dilation, self.pad = stride, upsample, dilation, pad
        taps = kernel // (stride * upsample)
        self.weight = mx.zeros((taps, c_in * stride, c_out * upsample))
        self.bias = mx.zeros((c_out * upsample,)) if bias else None

    def __call__(self, x, past):
        B, T, _ = x.shape
        taps, c_in, c_out = self.weight.shape
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
        # One product over the unfolded input copies taps * C_in a position, one product a tap rereads C_out.
        if c_in < c_out and taps > 1:
            x = mx.concatenate([x[:, i * self.dilation :][:, :T] for i in range(taps)], axis=-1)
            y = mx.addmm(bias, x, self.weight.reshape(taps * c_in, c_out))
        else:
            y = bias
            for i in range(taps):
                y = mx.addmm(y, x[:, i * self.dilation :][:, :T], self.weight[i])
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


EXP2 = np.polynomial.Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef.tolist()


def vectorized(size):
    """Whether MLX's own exp, and what is built on it, is fast for so many elements. On a CPU it is for few alone."""
    return mx.default_device() == mx.gpu or size <= 2**14


@mx.custom_function
def exp(x):
    """e^x, where MLX's is slow by a polynomial within 2e-7 of it (x <= 0): it is most of Mimi's arithmetic."""
    if vectorized(x.size):
        return mx.exp(x)
    y = mx.clip(x.astype(mx.float32), -87, 88) * math.log2(math.e)
    shift = 1.5 * 2**23 + 127  # a float so large has its integer, 127 more than y's, in the lowest bits
    whole = y + shift
    part = y - (whole - shift)  # e^x = 2^whole * 2^part, -0.5 <= part <= 0.5
    p = part * EXP2[5]
    for c in EXP2[4:0:-1]:
        p = (p + c) * part
    return ((p + EXP2[0]) * (whole.view(mx.int32) << 23).view(mx.float32)).astype(x.dtype)


@exp.vjp
def exp_vjp(x, cotangent, y):  # so that training keeps nothing but y
    return cotangent * y


def elu(x):
    return nn.elu(x) if mx.default_device() == mx.gpu else mx.maximum(x, exp(mx.minimum(x, 0)) - 1)


def gelu(x):
    """x Phi(x), where MLX's erf is slow by Abramowitz and Stegun's 7.1.26, which is as close."""
    if vectorized(x.size):
        return nn.gelu(x)
    a = mx.abs(x)
    t = 1 / (1 + 0.3275911 / math.sqrt(2) * a)
    p = t * 1.061405429
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = (p + c) * t
    return x * (0.5 + mx.sign(x) * (0.5 - 0.5 * p * exp(-0.5 * a * a)))


class ELU(nn.Module):
    def __call__(self, x, past):
        return elu(x), None


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
    return [
        ResBlock(dim, dim // c.compress, c.residual_kernel_size, c.dilation_base**i) for i in range(c.n_residual_layers)
    ]


class SEANetEncoder(nn.Module):
    """Waveform (B, S, 1) -> (B, S / 960, D). Layers are numbered as in kyutai's checkpoint."""

    def __init__(self, c):
        super().__init__()
        dim = c.n_filters
        self.model = [Conv(1, dim, c.kernel_size)]
        for ratio in reversed(c.ratios):
            self.model += [*seanet_block(c, dim), ELU(), Conv(dim, 2 * dim, 2 * ratio, stride=ratio)]
            dim *= 2
        self.model += [ELU(), Conv(dim, c.dim, c.last_kernel_size)]

    def __call__(self, x, past):
        return run(self.model, x, past)


class SEANetDecoder(nn.Module):
    """(B, T, D) at 25 Hz -> waveform (B, T * 960, 1)."""

    def __init__(self, c):
        super().__init__()
        dim = c.n_filters * 2 ** len(c.ratios)
        self.model = [Conv(c.dim, dim, c.kernel_size)]
        for ratio in c.ratios:
            self.model += [ELU(), Conv(dim, dim // 2, 2 * ratio, upsample=ratio), *seanet_block(c, dim // 2)]
            dim //= 2
        self.model += [ELU(), Conv(dim, 1, c.last_kernel_size)]

    def __call__(self, x, past):
        return run(self.model, x, past)


# ---------------------------------------------------------------------------------------------------- transformer


def rope(periods, offset, T):
    """A function that turns interleaved pairs of (B, H, T, head_dim) by position / periods (head_dim / 2,).

    offset: an int or (B,), the first of the T positions.
    """
    if mx.default_device() == mx.gpu:
        kind = {"traditional": True, "base": None, "scale": 1.0, "offset": offset, "freqs": periods}
        return lambda x: mx.fast.rope(x, x.shape[-1], **kind)
    angles = (mx.array(offset).reshape(-1, 1, 1, 1) + mx.arange(T)[:, None]) / periods  # (1 or B, 1, T, head_dim / 2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    cos, sin = mx.stack([cos, cos], axis=-1), mx.stack([-sin, sin], axis=-1)

    def turn(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return (pairs * cos + pairs[..., ::-1] * sin).reshape(x.shape).astype(x.dtype)

    return turn


def attend(q, k, v, mask=None):
    """mx.fast.scaled_dot_product_attention of q (B, H, T, d) to k, v (B, H_kv, S, d), on a CPU with our `exp`."""
    (B, H, T, d), (n, S) = q.shape, k.shape[1:3]
    if vectorized(B * H * T * S):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=mask)
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    bias = 0 if mask is None else mx.where(mask, 0, -mx.inf)[..., None, :, :]
    q, out = (q * d**-0.5).reshape(B, n, -1, d), []
    step = max(1, n * 2**20 // (B * H * T * S))  # heads at a time: what they need stays in the cache
    for i in range(0, n, step):
        part = slice(i, i + step)
        scores = (q[:, part] @ k[:, part].swapaxes(-1, -2)).reshape(B, -1, H // n, T, S) + bias
        weights = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = weights.reshape(B, -1, H // n * T, S) @ v[:, part]
        out.append(y.reshape(B, -1, T, d) / weights.sum(axis=-1, keepdims=True).reshape(B, -1, T, 1))
    return mx.concatenate(out, axis=1).astype(v.dtype)


class TransformerLayer(nn.Module):
    """Pre-norm layer with layer scale. past: the keys and values held, (k, v)."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.context = c.n_heads, c.context
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps), nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.in_proj, self.out_proj = mx.zeros((3 * c.dim, c.dim)), mx.zeros((c.dim, c.dim))
        self.linear1, self.linear2 = mx.zeros((c.ffn_dim, c.dim)), mx.zeros((c.dim, c.ffn_dim))
        self.scale1, self.scale2 = mx.zeros((c.dim,)), mx.zeros((c.dim,))

    def __call__(self, x, past, turn, mask):
        B, T, D = x.shape
        qkv = (self.norm1(x) @ self.in_proj.T).reshape(B, T, 3, self.n_heads, D // self.n_heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, H, T, head_dim)
        q, k = turn(q), turn(k)
        if past:
            k, v = (mx.concatenate([held, new], axis=2) for held, new in zip(past, (k, v)))
        y = attend(q, k, v, mask).transpose(0, 2, 1, 3).reshape(B, T, D)
        x = x + self.scale1 * (y @ self.out_proj.T)
        start = max(0, k.shape[2] - self.context + 1)
        past = k[:, :, start:], v[:, :, start:]
        return x + self.scale2 * (gelu(self.norm2(x) @ self.linear1.T) @ self.linear2.T), past


class Transformer(nn.Module):
    """(B, T, D) -> (B, T, D), causal over the last `context` positions. past: (each layer's, positions seen)."""

    def __init__(self, c):
        super().__init__()
        self.layers, self.context = [TransformerLayer(c) for _ in range(c.n_layers)], c.context
        head_dim = c.dim // c.n_heads
        self._periods = mx.array((c.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32))
        mx.eval(self._periods)  # so that other threads may use it

    def __call__(self, x, past):
        past, offset = past or (None, 0)
        T = x.shape[1]
        n = min(offset, self.context - 1) + T
        age = mx.arange(n - T, n)[:, None] - mx.arange(n)  # (T, n): how far back each key lies
        mask, turn = (age >= 0) & (age < self.context), rope(self._periods, offset, T)
        x, past = run(self.layers, x, past, turn, mask)
        return x, (past, offset + T)


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
            codes.append(mx.argmin(norms - 2 * (residual @ vectors.T), axis=-1))
            residual = residual - vectors[codes[-1]]
        return mx.stack(codes, axis=1)

    def decode(self, codes):  # (B, n, F) -> (B, F, D)
        n, size, dim = self.codebooks.shape
        index = codes + size * mx.arange(codes.shape[1])[:, None]
        return self.codebooks.reshape(n * size, dim)[index].sum(axis=1) @ self.output_proj.T


# ---------------------------------------------------------------------------------------------------- the codec


class State(NamedTuple):
    """What a stream has to remember, encoding and decoding apart. Made by `Mimi.init_state`; None: nothing yet."""

    batch: int
    rest: mx.array  # (B, s) samples that do not fill a frame yet
    encoder: list | None = None
    decoder: list | None = None


class Mimi(nn.Module):
    """The codec. Holds weights only: safe to share among streams and threads."""

    def __init__(self, config: MimiConfig = MimiConfig()):
        super().__init__()
        self.config = c = config
        self.sample_rate, self.frame_size, self.n_codebooks = c.sample_rate, c.frame_size, c.n_codebooks
        self.encoder = SEANetEncoder(c)
        self.encoder_transformer = Transformer(c)
        self.downsample = Conv(c.dim, c.dim, 4, stride=2, bias=False, pad="first")
        self.first = RVQ(c, c.n_semantic)
        self.rest = RVQ(c, c.n_codebooks - c.n_semantic) if c.n_codebooks > c.n_semantic else None
        self.upsample = Upsample(c.dim)
        self.decoder_transformer = Transformer(c)
        self.decoder = SEANetDecoder(c)

    def init_state(self, batch=1):
        """The state of `batch` streams that start now, side by side."""
        return State(batch, mx.array(np.zeros((batch, 0), np.float32)))  # not lazy: any thread may take it on

    def encode_step(self, audio, state):
        """audio (B, 1, any number of samples), state -> codes (B, K, f) int32 of the frames now full, new state."""
        audio = mx.array(audio)
        if audio.ndim != 3 or audio.shape[1] != 1 or audio.shape[0] != state.batch:
            raise ValueError(f"audio must be ({state.batch}, 1, samples), not {audio.shape}")
        x = mx.concatenate([state.rest, audio[:, 0].astype(mx.float32)], axis=1)
        n_frames = x.shape[1] // self.frame_size
        x, rest = x[:, : n_frames * self.frame_size], x[:, n_frames * self.frame_size :]
        if n_frames == 0:
            mx.async_eval(rest)
            return mx.zeros((state.batch, self.n_codebooks, 0), mx.int32), state._replace(rest=rest)
        use_threads(for_small=n_frames < 4)
        layers = [self.encoder, self.encoder_transformer, self.downsample]
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
        if codes.ndim != 3 or codes.shape[0] != state.batch or not 1 <= codes.shape[1] <= self.n_codebooks:
            raise ValueError(f"codes must be ({state.batch}, 1 to {self.n_codebooks}, frames), not {codes.shape}")
        if codes.shape[2] == 0:
            return mx.zeros((state.batch, 1, 0)), state
        use_threads(for_small=codes.shape[2] < 4)
        n = self.config.n_semantic
        x = self.first.decode(codes[:, :n])  # (B, F, D)
        if codes.shape[1] > n:
            x = x + self.rest.decode(codes[:, n:])
        layers = [self.upsample, self.decoder_transformer, self.decoder]
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
        chunk = width * (CHUNK if mx.default_device() == mx.cpu else 10 * CHUNK)
        state, out = self.init_state(x.shape[0]), []
        for i in range(0, max(x.shape[2], 1), chunk):
            y, state = step(x[:, :, i : i + chunk], state)
            mx.eval(y, state)  # else the graph of a long clip keeps every activation alive
            out.append(y)
        use_threads(for_small=False)
        return mx.concatenate(out, axis=2)


# ---------------------------------------------------------------------------------------------------- loading

# kyutai's tensor names -> ours
RENAME = [
    (r"\.conv\.conv\.(conv\.)?|\.convtr\.convtr\.(convtr\.)?", "."),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.self_attn\.(in|out)_proj(s\.0\.weight|[_.]weight)$", r".\1_proj"),
    (r"\.(linear[12]|input_proj|output_proj)\.weight$", r".\1"),
    (r"\.layer_scale_([12])\.scale$", r".scale\1"),
    (r"^quantizer\.rvq_(first|rest)\.", r"\1."),
]


def infer_config(weights):
    """The sizes of a Mimi from kyutai's tensors {name: array}, as a dict of MimiConfig fields.

    What shapes do not tell (n_heads, context, rope_theta, norm_eps, dilation_base, sample_rate) is left out, and so at
    its default. Raises ValueError where these are not a Mimi's tensors.
    """

    def shapes(pattern):  # of the tensors that match, in the order of their first numbers
        found = ((re.fullmatch(pattern, k), w.shape) for k, w in weights.items())
        return [shape for _, shape in sorted((int(m[1]), shape) for m, shape in found if m)]

    convs = shapes(r"encoder\.model\.(\d+)\.conv\.conv\.weight")  # (out, in, kernel)
    residual = shapes(r"encoder\.model\.(\d+)\.block\.1\.conv\.conv\.weight")
    convtrs = shapes(r"decoder\.model\.(\d+)\.convtr\.convtr\.weight")
    linears = shapes(r"encoder_transformer\.transformer\.layers\.(\d+)\.linear1\.weight")
    first, rest = (
        shapes(rf"quantizer\.rvq_{part}\.vq\.layers\.(\d+)\._codebook\.embedding_sum") for part in ("first", "rest")
    )
    if not (convs and residual and convtrs and linears and first):
        raise ValueError(f"not a Mimi: the checkpoint has {', '.join(sorted(weights)[:3]) or 'nothing'} ...")
    return {
        "n_filters": convs[0][0],
        "ratios": tuple(kernel // 2 for _, _, kernel in convtrs),
        "kernel_size": convs[0][2],
        "residual_kernel_size": residual[0][2],
        "last_kernel_size": convs[-1][2],
        "compress": residual[0][1] // residual[0][0],
        "n_residual_layers": len(residual) // len(convtrs),
        "dim": linears[0][1],
        "n_layers": len(linears),
        "ffn_dim": linears[0][0],
        "codebook_size": first[0][0],
        "codebook_dim": first[0][1],
        "n_codebooks": len(first) + len(rest),
        "n_semantic": len(first),
    }


def from_weights(weights, config=None, n_codebooks=None):
    """A Mimi from kyutai's tensors {name: array}, computing in float32.

    config: dict of MimiConfig fields, or None to infer the sizes. n_codebooks: use only the first so many. Raises
    ValueError that names the tensors which are missing, unexpected or of a wrong shape.
    """
    config = infer_config(weights) | (config or {})
    c = MimiConfig(**{f: config[f] for f in MimiConfig.__dataclass_fields__ if f in config})
    if c.n_heads < 1 or c.dim % c.n_heads:
        raise ValueError(f"{c.n_heads} heads do not divide {c.dim} channels")
    n_codebooks = c.n_codebooks if n_codebooks is None else n_codebooks
    if not c.n_semantic <= n_codebooks <= c.n_codebooks:
        raise ValueError(f"this Mimi works with {c.n_semantic} to {c.n_codebooks} codebooks, not {n_codebooks}")
    model = Mimi(replace(c, ratios=tuple(c.ratios), n_codebooks=n_codebooks))
    modules = dict(model.named_modules())
    ours, books = {}, {}
    for name, w in weights.items():
        key, w = name, w.astype(mx.float32)
        for pattern, new in RENAME:
            key = re.sub(pattern, new, key)
        if m := re.fullmatch(r"(first|rest)\.vq\.layers\.(\d+)\._codebook\.(\w+)", key):
            books[m[1], int(m[2]), m[3]] = w
            continue
        try:
            ours[key] = arrange(w, key, modules.get(key.rpartition(".")[0]))
        except (ValueError, IndexError):  # from MLX, which does not know the name
            raise ValueError(f"the checkpoint does not fit the model: {name} is {w.shape}") from None
    for part, total, n in (
        ("first", c.n_semantic, c.n_semantic),
        ("rest", c.n_codebooks - c.n_semantic, n_codebooks - c.n_semantic),
    ):
        shapes = {"embedding_sum": (c.codebook_size, c.codebook_dim), "cluster_usage": (c.codebook_size,)}
        found = {f: [books.pop((part, i, f), mx.zeros(0)) for i in range(total)] for f in shapes}
        for f, shape in shapes.items():
            if bad := [i for i, w in enumerate(found[f]) if w.shape != shape]:
                raise ValueError(
                    f"the checkpoint does not fit the model: missing or not {shape}: {f} of rvq_{part} {bad[:4]}"
                )
        if n:
            sums, usage = (mx.stack(found[f][:n]) for f in shapes)
            vectors = sums / mx.maximum(usage, 1e-5)[..., None]
            ours |= {f"{part}.codebooks": vectors, f"{part}.norms": (vectors**2).sum(-1)}
    # What is left is unexpected, and fill says so.
    ours |= {f"{part}.{i}.{field}": w for (part, i, field), w in books.items() if field != "_initialized"}
    if model.rest is None:
        ours = {k: w for k, w in ours.items() if k not in ("rest.input_proj", "rest.output_proj")}
    fill(model, ours)
    return model


def arrange(w, key, module):
    """A tensor as kyutai stores it -> as `module` reads it."""
    if isinstance(module, Conv) and key.endswith("bias"):
        return mx.tile(w, module.upsample)
    if isinstance(module, Conv) and module.upsample > 1:
        c_in, c_out, _ = w.shape  # (C, O, kernel) -> (taps, C, u * O), the newest input's tap last
        w = w.transpose(2, 0, 1).reshape(-1, module.upsample, c_in, c_out)[::-1]
        return w.swapaxes(1, 2).reshape(-1, c_in, module.upsample * c_out)
    if isinstance(module, Conv):  # (O, C, kernel) -> (taps, s * C, O)
        return w.transpose(2, 1, 0).reshape(-1, w.shape[1] * module.stride, w.shape[0])
    if isinstance(module, Upsample):  # (D, 1, 4) -> (taps, 2, D)
        return w[:, 0].T.reshape(2, 2, -1)[::-1]
    return w[..., 0] if isinstance(module, RVQ) else w  # RVQ: a convolution of kernel 1


def check(model, weights):
    """Raise a ValueError that names what `weights` {name: array} has missing, unexpected or misshapen for `model`."""
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"missing {k}" for k in expected if k not in weights]
    problems += [f"unexpected {k}" for k in weights if k not in expected]
    problems += [
        f"{k} is {weights[k].shape}, not {w.shape}" for k, w in expected.items() if weights.get(k, w).shape != w.shape
    ]
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

    Raises FileNotFoundError where the repository has no such file, and ValueError, which says what to do, where it
    cannot be had.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        if len(patterns) == 1:
            return Path(hf_hub_download(repo, *patterns))
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise ValueError(
            f"{repo} is gated: accept its licence on huggingface.co and run `hf auth login` (not gated: --model tiny)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"no such folder, file or Hugging Face repository: {repo}") from None
    except errors.LocalEntryNotFoundError:
        raise ValueError(
            f"cannot download {patterns[0]} from {repo}: no network, or HF_HUB_OFFLINE is set, and it was not "
            "downloaded before (a model that needs no download: --model tiny)"
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"{repo} has no {patterns[0]}") from None
    except Exception as e:  # of many kinds: connection, proxy, disk
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"cannot download from {repo}: {reason} (no download: --model tiny)") from None


def locate(path_or_repo=None):
    """A Mimi's local file, or folder of a transformers checkpoint; downloaded if need be. Raises ValueError."""
    alone = ("mimi.safetensors", "tokenizer-*.safetensors")
    path = download(DEFAULT_REPO, DEFAULT_FILE) if path_or_repo is None else Path(path_or_repo)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)):
            raise ValueError(f"no such file or folder: {path_or_repo}")
        for files in (alone, ("model.safetensors", "config.json")):
            path = download(str(path_or_repo), *files)
            if any(path.glob(files[0])) or any(path.glob(files[1])):
                break
    return next((f for pattern in alone for f in sorted(path.glob(pattern))), path) if path.is_dir() else path


def load(path_or_repo=None, n_codebooks=None):
    """A Mimi from a folder, a .safetensors file or a Hugging Face repository, in our layout, kyutai's or transformers'.

    None: kyutai's own weights (kyutai/moshiko-pytorch-bf16). n_codebooks: use the first so many, None for all there
    are. A transformers checkpoint, also a whole CSM's, is read through convert.py. Raises ValueError.
    """
    path = locate(path_or_repo)
    if path.suffix == ".safetensors":
        weights, metadata = read_safetensors(path)
        if "encoder.model.0.conv.conv.weight" in weights:
            if "config" in metadata:
                return from_weights(weights, json.loads(metadata["config"]), n_codebooks)
            beside = read_json(path.with_name("config.json"))  # kyutai's is of Moshi, with fields of the same names
            return from_weights(weights, beside if "n_filters" in beside else None, n_codebooks)
    mimi = read_foreign(path)[2]
    if mimi is None:
        raise ValueError(f"no Mimi in {path}")
    return from_weights(mimi[1], mimi[0], n_codebooks)


def read_foreign(path):
    """A checkpoint in another layout -> (config, weights, Mimi) in ours, by convert.py, which ours do without."""
    try:
        import convert
    except ModuleNotFoundError:
        raise ValueError(f"{path} is not in our own layout: reading it takes convert.py beside this file") from None
    return convert.read(path)


# ---------------------------------------------------------------------------------------------------- audio files


def read_audio(path, sample_rate=24_000):
    """An audio file of any kind, rate and number of channels -> (samples,) float32 mono. Raises ValueError."""
    import soundfile
    import soxr

    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a .raw file
        raise ValueError(f"{path} is not an audio file that can be read") from None
    audio = audio.mean(axis=1)
    if not np.isfinite(audio).all():
        raise ValueError(f"{path} contains NaN or infinite samples")
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate).astype(np.float32)
    if not len(audio):
        raise ValueError(f"{path} holds no sound")
    return audio


def to_pcm16(audio):
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
        raise ValueError(f"cannot write {path}: {e.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def write_audio(path, audio, sample_rate=24_000):
    """(samples,) float -> a 16-bit WAV file, whole or not at all. Raises ValueError."""
    import soundfile

    with replacing(path) as file:
        soundfile.write(file, to_pcm16(audio), sample_rate, subtype="PCM_16", format="WAV")


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
        codes = codec.encode(audio[None, None])
        decoded = codec.decode(codes)[0, 0, : audio.size]
        if args.codes:
            with replacing(args.codes) as file:
                np.savez(file, codes=np.array(codes[0]), sample_rate=codec.sample_rate)
        write_audio(args.output, decoded, codec.sample_rate)
    except (ValueError, OSError) as e:
        parser.exit(2, f"mimi.py: error: {' '.join(str(e).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: nothing was written\n")
    print(f"{codes.shape[2]} frames of {codes.shape[1]} codes", file=sys.stderr)


if __name__ == "__main__":
    main()
