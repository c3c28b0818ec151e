"""Mimi, the neural audio codec of Moshi and CSM, on MLX: 24 kHz speech <-> 12.5 Hz frames of codes.

Sources: Defossez et al., "Moshi" (arXiv:2410.00037); kyutai's PyTorch code (`moshi` 0.2.13); and
Hugging Face transformers' MimiModel (5.23). tests/test_mimi.py compares this file with both.

    encode: audio -> SEANet encoder (25 Hz) -> transformer -> stride-2 conv (12.5 Hz) -> RVQ codes
    decode: codes -> code vectors -> x2 upsampling (25 Hz) -> transformer -> SEANet decoder -> audio

Every layer is causal and takes and returns its past, what it remembers of earlier input. So
streams and clips share one code path: `encode` calls `encode_step` chunk by chunk, `decode` calls
`decode_step`. State is a value: a step never modifies the state that it is given.

Shapes: B batch, S samples, T positions at a layer's own rate, F frames, K codebooks, C, D channels,
H heads. Inside, activations are (B, T, C); public methods take audio (B, 1, S), codes (B, K, F).
"""

import io
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

# Read by MLX before its first operation on a GPU, where a frame is thousands of small ones.
os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "1000")  # launch them in fewer parts
if sys.platform == "darwin":
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "400")  # one gather would fill a part
os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")  # it makes a plan for each prompt length

with suppress(ImportError):
    import mlx_cpu  # noqa: F401  before mlx: makes some of MLX's functions fast on a Linux CPU

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


@dataclass(frozen=True)
class MimiConfig:
    sample_rate: int = 24_000
    n_filters: int = 64  # channels at the sample rate, doubled at each downsampling
    ratios: tuple = (8, 6, 5, 4)  # of the decoder's upsampling; the encoder's are in reverse
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2  # channels of a layer per channel of its residual branch
    n_residual_layers: int = 1
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    ffn_dim: int = 2048
    context: int = 250  # positions each one attends to, itself included: 10 s at 25 Hz
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    codebook_size: int = 2048
    codebook_dim: int = 256
    n_codebooks: int = 32
    n_semantic: int = 1  # codebooks of the first quantizer; a second one quantizes the same input

    @property
    def frame_size(self):
        return 2 * math.prod(self.ratios)  # samples per frame: 1920

    @property
    def frame_rate(self):
        return self.sample_rate / self.frame_size  # Hz: 12.5


# ------------------------------------------------------------------------------------ convolutions


class Conv(nn.Module):
    """Causal 1-D convolution by matrix products: plain, strided and transposed in one class.

    With `stride` s, s input rows are read as one row of s * C channels. With `upsample` u (stride
    of a transposed convolution), one row of u * O channels is written as u rows. What remains is a
    stride-1 convolution of few taps, weight (taps, C_out, C_in). The past before the first input
    is zeros or, with pad="first", copies of the first row.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, upsample=1, dilation=1, bias=True, pad=None):
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
        if past is None and n_past:
            past = x[:, :1] if self.pad == "first" else mx.zeros((B, 1, x.shape[2]))
            past = mx.repeat(past, n_past * self.stride, axis=1).reshape(B, n_past, c_in)
        x = x.reshape(B, T // self.stride, c_in)  # (B, T / s, s * C)
        T = x.shape[1]
        if n_past:
            x = mx.concatenate([past, x], axis=1)
            past = x[:, T:]
        windows, weight = [x[:, i * self.dilation :][:, :T] for i in range(taps)], self.weight
        if c_in < taps:  # a waveform: one product for all taps instead of one per tap
            windows = [mx.concatenate(windows, axis=-1)]
            weight = weight.swapaxes(0, 1).reshape(1, c_out, -1)
        y = mx.zeros((1,)) if self.bias is None else self.bias
        for window, w in zip(windows, weight):
            y = mx.addmm(y, window, w.T)
        return y.reshape(B, T * self.upsample, c_out // self.upsample), past


class Upsample(nn.Module):
    """Depthwise transposed convolution, 12.5 to 25 Hz: stride 2, kernel 4. weight (taps, 2, D)."""

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
    """Exact: x Phi(x). nn.gelu is compiled, and so needs g++ and a writable /tmp on a Linux CPU."""
    return x * (0.5 + 0.5 * mx.erf(x * math.sqrt(0.5)))


class ELU(nn.Module):
    def __call__(self, x, past):
        return mx.maximum(x, mx.exp(mx.minimum(x, 0)) - 1), None


def run_layers(layers, x, pasts, *shared):
    """Call layers (x, past, *shared) -> (x, past) in turn. Returns x and the list of new pasts."""
    new_pasts = []
    for layer, past in zip(layers, pasts or [None] * len(layers)):
        x, past = layer(x, past, *shared)
        new_pasts.append(past)
    return x, new_pasts


class ResBlock(nn.Module):
    def __init__(self, dim, mid, kernel, dilation):
        super().__init__()
        self.block = [ELU(), Conv(dim, mid, kernel, dilation=dilation), ELU(), Conv(mid, dim, 1)]

    def __call__(self, x, past):
        y, past = run_layers(self.block, x, past)
        return x + y, past


def seanet_block(c, dim):
    hidden, kernel = dim // c.compress, c.residual_kernel_size
    return [ResBlock(dim, hidden, kernel, c.dilation_base**i) for i in range(c.n_residual_layers)]


def seanet_encoder(c):
    """Layers from a waveform (B, S, 1) to (B, S / 960, D), numbered as in kyutai's checkpoint."""
    dim = c.n_filters
    layers = [Conv(1, dim, c.kernel_size)]
    for ratio in reversed(c.ratios):
        layers += [*seanet_block(c, dim), ELU(), Conv(dim, 2 * dim, 2 * ratio, stride=ratio)]
        dim *= 2
    return [*layers, ELU(), Conv(dim, c.dim, c.last_kernel_size)]


def seanet_decoder(c):
    """Layers from (B, T, D) at 25 Hz to a waveform (B, T * 960, 1)."""
    dim = c.n_filters * 2 ** len(c.ratios)
    layers = [Conv(c.dim, dim, c.kernel_size)]
    for ratio in c.ratios:
        up, dim = Conv(dim, dim // 2, 2 * ratio, upsample=ratio), dim // 2
        layers += [ELU(), up, *seanet_block(c, dim)]
    return [*layers, ELU(), Conv(dim, 1, c.last_kernel_size)]


# ------------------------------------------------------------------------------------ transformer


class TransformerLayer(nn.Module):
    """Pre-norm layer with layer scale. past: the keys and values of earlier positions, (k, v)."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.context, self.theta = c.n_heads, c.context, c.rope_theta
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.in_proj, self.out_proj = mx.zeros((3 * c.dim, c.dim)), mx.zeros((c.dim, c.dim))
        self.linear1, self.linear2 = mx.zeros((c.ffn_dim, c.dim)), mx.zeros((c.dim, c.ffn_dim))
        self.scale1, self.scale2 = mx.zeros((c.dim,)), mx.zeros((c.dim,))

    def __call__(self, x, past, offset, mask):
        B, T, D = x.shape
        d = D // self.n_heads
        qkv = (self.norm1(x) @ self.in_proj.T).reshape(B, T, 3, self.n_heads, d)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, H, T, d)
        rope = {"traditional": True, "base": self.theta, "scale": 1.0, "offset": offset}
        q, k = mx.fast.rope(q, d, **rope), mx.fast.rope(k, d, **rope)
        if past is None:  # full length from the start, so that streams of any age can share a batch
            past = [mx.zeros((B, self.n_heads, self.context - 1, d))] * 2
        k, v = mx.concatenate([past[0], k], axis=2), mx.concatenate([past[1], v], axis=2)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=mask)  # (B, H, T, d)
        x = x + self.scale1 * (y.transpose(0, 2, 1, 3).reshape(B, T, D) @ self.out_proj.T)
        x = x + self.scale2 * (gelu(self.norm2(x) @ self.linear1.T) @ self.linear2.T)
        return x, [k[:, :, T:], v[:, :, T:]]


class Transformer(nn.Module):
    """(B, T, D) -> (B, T, D), causal. past: the layers' pasts, and each stream's length (B,)."""

    def __init__(self, c):
        super().__init__()
        self.layers, self.context = [TransformerLayer(c) for _ in range(c.n_layers)], c.context

    def __call__(self, x, past):
        B, T, _ = x.shape
        layers, seen = past or (None, mx.zeros((B,), mx.int32))
        position = seen[:, None, None, None] + mx.arange(T)[:, None]  # (B, 1, T, 1)
        key = mx.arange(1 - self.context, T)  # counted from the first new position
        age = mx.arange(T)[:, None] - key  # (T, context - 1 + T)
        mask = (age >= 0) & (age < self.context) & (age <= position)  # (B, 1, T, S)
        x, layers = run_layers(self.layers, x, layers, seen, mask)
        return x, (layers, seen + T)


# ------------------------------------------------------------------------------------ quantizer


class RVQ(nn.Module):
    """Residual vector quantizer: each codebook quantizes the error that the ones before it left."""

    def __init__(self, c, n):
        super().__init__()
        self.input_proj = mx.zeros((c.codebook_dim, c.dim))
        self.output_proj = mx.zeros((c.dim, c.codebook_dim))
        self.codebooks = mx.zeros((n, c.codebook_size, c.codebook_dim))
        self.norms = mx.zeros((n, c.codebook_size))  # |v|^2 of each code vector

    def encode(self, x):  # (B, F, D) -> (B, n, F)
        residual, codes = x @ self.input_proj.T, []
        for vectors, norms in zip(self.codebooks, self.norms):
            # The nearest vector minimizes |r - v|^2, or, without the constant |r|^2, |v|^2 - 2 r.v.
            codes.append(mx.argmin(mx.addmm(norms, residual, vectors.T, alpha=-2), axis=-1))
            residual = residual - vectors[codes[-1]]
        return mx.stack(codes, axis=1)

    def decode(self, codes):  # (B, n, F) -> (B, F, D)
        n, size, dim = self.codebooks.shape
        index = codes + size * mx.arange(codes.shape[1])[:, None]
        return self.codebooks.reshape(n * size, dim)[index].sum(axis=1) @ self.output_proj.T


# ------------------------------------------------------------------------------------ the codec


class State(NamedTuple):
    """What streams remember: the pasts of all layers. See `Mimi.init_state`."""

    rest: mx.array  # (B, s) samples that do not fill a frame yet
    encoder: list | None = None  # None before the first frame
    decoder: list | None = None


class Mimi(nn.Module):
    """The codec. It holds weights only, so streams and threads may share it."""

    def __init__(self, config: MimiConfig = MimiConfig()):
        super().__init__()
        self.config = c = config
        self.sample_rate, self.frame_size = c.sample_rate, c.frame_size
        self.n_codebooks = c.n_codebooks
        self.encoder = seanet_encoder(c)
        self.encoder_transformer = Transformer(c)
        self.downsample = Conv(c.dim, c.dim, 4, stride=2, bias=False, pad="first")
        self.first = RVQ(c, c.n_semantic)
        self.rest = RVQ(c, c.n_codebooks - c.n_semantic) if c.n_codebooks > c.n_semantic else None
        self.upsample = Upsample(c.dim)
        self.decoder_transformer = Transformer(c)
        self.decoder = seanet_decoder(c)

    def init_state(self, batch: int = 1) -> State:
        """The state of a batch of streams before their first frame."""
        return State(mx.array(np.zeros((batch, 0), np.float32)))  # not lazy: any thread may use it

    def encode_step(self, audio: mx.array, state: State) -> tuple[mx.array, State]:
        """audio (B, 1, any length) -> codes (B, K, f) int32 of the frames now full, new state."""
        audio = mx.array(audio)
        if audio.ndim != 3 or audio.shape[1] != 1 or len(audio) != len(state.rest):
            raise ValueError(f"audio must be ({len(state.rest)}, 1, samples), not {audio.shape}")
        x = mx.concatenate([state.rest, audio[:, 0].astype(mx.float32)], axis=1)
        n_frames = x.shape[1] // self.frame_size
        x, rest = mx.split(x, [n_frames * self.frame_size], axis=1)
        if n_frames == 0:
            mx.async_eval(rest)
            return mx.zeros((len(audio), self.n_codebooks, 0), mx.int32), state._replace(rest=rest)
        layers = [*self.encoder, self.encoder_transformer, self.downsample]
        x, pasts = run_layers(layers, x[..., None], state.encoder)  # (B, F, D)
        codes = self.first.encode(x)
        if self.rest is not None:
            codes = mx.concatenate([codes, self.rest.encode(x)], axis=1)
        codes, state = codes.astype(mx.int32), state._replace(rest=rest, encoder=pasts)
        mx.async_eval(codes, state)  # launched here, so that another thread may continue the stream
        return codes, state

    def decode_step(self, codes: mx.array, state: State) -> tuple[mx.array, State]:
        """codes (B, 1 to K, f) -> audio (B, 1, f * 1920) float32, new state."""
        codes, B, size = mx.array(codes), len(state.rest), self.config.codebook_size
        if codes.ndim != 3 or len(codes) != B or not 1 <= codes.shape[1] <= self.n_codebooks:
            raise ValueError(f"codes must be ({B}, 1 to {self.n_codebooks}, f), not {codes.shape}")
        if codes.shape[2] == 0:
            return mx.zeros((B, 1, 0)), state
        numbers = np.array(codes)  # checked here, since MLX would read out of bounds
        if not 0 <= numbers.min() <= numbers.max() < size:
            raise ValueError(f"codes must lie in 0..{size - 1}")
        n = self.config.n_semantic
        x = self.first.decode(codes[:, :n])  # (B, F, D)
        if codes.shape[1] > n:
            x = x + self.rest.decode(codes[:, n:])
        layers = [self.upsample, self.decoder_transformer, *self.decoder]
        x, pasts = run_layers(layers, x, state.decoder)  # (B, S, 1)
        audio, state = x.transpose(0, 2, 1), state._replace(decoder=pasts)
        mx.async_eval(audio, state)
        return audio, state

    def encode(self, audio: mx.array) -> mx.array:
        """audio (B, 1, S) -> codes (B, K, ceil(S / 1920)) int32; zeros fill up the last frame."""
        audio = mx.array(audio)
        if audio.ndim != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio must be (batch, 1, samples), not {audio.shape}")
        if not mx.isfinite(audio).all().item():
            raise ValueError("the audio contains NaN or infinite samples")
        audio = mx.pad(audio, [(0, 0), (0, 0), (0, -audio.shape[2] % self.frame_size)])
        return self._in_chunks(self.encode_step, audio, self.frame_size)

    def decode(self, codes: mx.array) -> mx.array:
        """codes (B, 1 to K, F) -> audio (B, 1, F * 1920) float32."""
        codes = mx.array(codes)
        if codes.ndim != 3:
            raise ValueError(f"codes must be (batch, codebooks, frames), not {codes.shape}")
        return self._in_chunks(self.decode_step, codes, 1)

    def _in_chunks(self, step, x, width):
        """Run x (B, channels, frames * width) through `step`, chunk by chunk."""
        n_frames = 25 if mx.default_device() == mx.cpu else 125  # two seconds fit a CPU's cache
        state, outputs = self.init_state(x.shape[0]), []
        for i in range(0, max(x.shape[2], 1), n_frames * width):
            y, state = step(x[:, :, i : i + n_frames * width], state)
            mx.eval(y, state)  # otherwise the graph keeps the activations of all chunks alive
            outputs.append(y)
        return mx.concatenate(outputs, axis=2)


# ------------------------------------------------------------------------------------ loading


def load(path_or_repo: str | Path | None = None, n_codebooks: int | None = None) -> Mimi:
    """A Mimi from a folder, a weights file or a Hugging Face repository, in any published layout.

    None: kyutai's own weights. n_codebooks: use only the first so many. Raises ValueError.
    """
    file = Path(path_or_repo or "")
    file = file / "mimi.safetensors" if file.is_dir() else file
    if path_or_repo and file.is_file() and file.suffix == ".safetensors":
        weights, metadata = read_weights(file)
        if "config" in metadata and "first.input_proj" in weights:  # our own layout
            return from_weights(weights, as_object(metadata["config"], file), n_codebooks)
    other = checkpoints(path_or_repo or "the default Mimi")
    return from_weights(*other.read_mimi(path_or_repo), n_codebooks)


def check_fields(kind, values):
    """Raise ValueError if JSON gives a field of a dataclass a wrong type or an absurd number.

    MLX ends the process where a size exceeds 32 bits.
    """
    for f in fields(kind):
        value = values.get(f.name, f.default)
        if f.type is int:
            largest = 1024 if f.name.startswith("n_") or f.name.endswith("codebooks") else 2**20
            fine = type(value) is int and 0 < value <= largest
        elif f.type is float:
            fine = type(value) in (int, float) and 0 < value < 1e12
        elif f.type is tuple:
            fine = isinstance(value, (list, tuple)) and 0 < len(value) <= 8
            fine = fine and all(type(n) is int and 0 < n <= 1024 for n in value)
        else:
            fine = isinstance(value, f.type)
        if f.name in values and not fine:
            raise ValueError(f"{kind.__name__}.{f.name} cannot be {value!r:.40}")


def from_weights(weights, config=None, n_codebooks=None):
    """A Mimi, in float32, from weights of our layout. config: fields of MimiConfig."""
    config = {f.name: config[f.name] for f in fields(MimiConfig) if f.name in (config or {})}
    check_fields(MimiConfig, config)
    c = MimiConfig(**config)
    if c.dim % c.n_heads:
        raise ValueError(f"{c.n_heads} heads do not divide {c.dim} channels")
    n, K = c.n_semantic, c.n_codebooks if n_codebooks is None else n_codebooks
    if not n <= K <= c.n_codebooks:
        raise ValueError(f"this Mimi works with {n} to {c.n_codebooks} codebooks, not {K}")
    model = Mimi(replace(c, ratios=tuple(c.ratios), n_codebooks=K))
    weights = {name: mx.contiguous(w.astype(mx.float32)) for name, w in weights.items()}
    if model.rest is None:
        weights = {name: w for name, w in weights.items() if not name.startswith("rest.")}
    for part, size in (("first", n), ("rest", K - n)):
        # Training leaves the sum of the inputs nearest to each code vector, and their number.
        sums = weights.pop(f"{part}.embedding_sum", None)
        counts = weights.pop(f"{part}.cluster_usage", None)
        if sums is not None and counts is not None:
            vectors = sums[:size] / mx.maximum(counts[:size], 1e-5)[..., None]
            weights |= {f"{part}.codebooks": vectors, f"{part}.norms": (vectors**2).sum(-1)}
    load_weights(model, weights)
    return model


def check_weights(model, weights):
    """Raise a ValueError that names the weights that are missing, unexpected or misshapen."""
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    for name in expected:
        if name in weights and weights[name].shape != expected[name].shape:
            problems.append(f"{name} is {weights[name].shape}, not {expected[name].shape}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:4])}{more}")


def load_weights(model, weights):
    """Check the weights and give them to the model."""
    check_weights(model, weights)
    for w in weights.values():  # one at a time, so that few are in memory before and after a cast
        mx.eval(w)
    model.load_weights(list(weights.items()), strict=False)


def check_file(path):
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    if os.path.getsize(path) < 1000 and b"https://git-lfs" in Path(path).read_bytes():
        raise ValueError(f"{path} is a Git LFS pointer, not the file: git lfs pull")


def read_weights(path):
    """A .safetensors file -> {name: array}, read lazily; metadata."""
    check_file(path)
    try:
        return mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is truncated or not a safetensors file: {e}") from None


def read_json(path):
    """The object in a JSON file, {} if there is no file. Raises ValueError."""
    return as_object(path.read_bytes() if path.is_file() else "{}", path)


def as_object(text, path):
    """The object {...} in a JSON text, which is from the file `path`. Raises ValueError."""
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise ValueError(f"{path} is not a JSON file with an object")


def checkpoints(what):
    """The module that finds, downloads and reads all other checkpoints. Raises ValueError."""
    try:
        from csm_tools import checkpoints
    except ModuleNotFoundError:
        raise ValueError(f"{what} needs csm_tools and csm_layouts.py beside mimi.py") from None
    return checkpoints


# ------------------------------------------------------------------------------------ audio files

FORMATS = {  # suffix -> libsndfile's format and subtype
    ".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"),
}  # fmt: skip


def read_audio(path: str | Path, sample_rate: int = 24_000) -> np.ndarray:
    """An audio file of any kind, rate and number of channels -> (samples,) float32, mono.

    Formats that libsndfile lacks (m4a, aac, webm, video) are read by `ffmpeg`. Raises ValueError.
    """
    import soundfile
    import soxr

    check_file(path)
    blocks = []  # a header may claim any length
    try:
        with soundfile.SoundFile(path) as file:
            while len(block := file.read(2**22 // file.channels, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))  # (samples, channels) -> (samples,)
        audio, rate = np.concatenate(blocks), file.samplerate
    except (soundfile.LibsndfileError, TypeError, ValueError):  # a .raw file; no blocks
        audio, rate = read_by_ffmpeg(path, sample_rate), sample_rate
    if not np.isfinite(audio).all():
        raise ValueError(f"{path} contains NaN or infinite samples")
    if len(audio) * sample_rate < rate or 24 * rate < sample_rate:  # a tiny rate means many hours
        raise ValueError(f"{path} contains no sound of use: {len(audio)} samples at {rate} Hz")
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate).astype(np.float32)
    return audio


def read_by_ffmpeg(path, sample_rate):
    if not shutil.which("ffmpeg"):
        raise ValueError(f"{path} is not an audio file, or needs ffmpeg (m4a, aac, webm, video)")
    command = ["ffmpeg", "-v", "error", "-i", f"file:{path}", "-map", "0:a:0", "-f", "f32le"]
    command += ["-ac", "1", "-ar", str(sample_rate), "-fs", "2G", "-"]  # the first 5 hours at most
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{path} is not an audio file that ffmpeg can read")
    return np.frombuffer(done.stdout, "<f4")


def write_audio(path: str | Path, audio, sample_rate: int = 24_000) -> None:
    """Write (samples,) float atomically, in the format of the suffix. Raises ValueError."""
    with audio_file(path, sample_rate) as write:
        write(audio)


@contextmanager
def audio_file(path, sample_rate=24_000, inputs=()):
    """A function that writes pieces of audio; atomically, in the format of the suffix."""
    import soundfile

    suffix, encoded = Path(path).suffix.lower(), io.BytesIO()  # libsndfile would hide a full disk
    if suffix not in FORMATS or (Path(path).exists() and not Path(path).is_file()):
        raise ValueError(f"cannot write {path}: the suffix must be one of {' '.join(FORMATS)}")
    container, subtype = FORMATS[suffix]
    try:
        sound = soundfile.SoundFile(encoded, "w", sample_rate, 1, subtype, format=container)
    except soundfile.LibsndfileError as e:  # Opus allows five sample rates, MP3 nine
        raise ValueError(f"cannot write {path} at {sample_rate} Hz: {e.error_string}") from None

    def write(audio):
        for part in np.array_split(to_pcm16(audio), len(audio) // 2**16 + 1):
            sound.write(part)  # a long one would overflow libvorbis's stack

    with replacing(path, inputs) as file:
        with sound:
            yield write
        file.write(encoded.getbuffer())


@contextmanager
def replacing(path, inputs=()):
    """A binary file that replaces the one at `path` once all is written. Raises ValueError."""
    path = Path(os.path.realpath(path))  # follow a link instead of replacing it
    if path.exists() and any(path.samefile(f) for f in inputs if os.path.exists(f)):
        raise ValueError(f"{path} is also an input: give another OUT")
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    with suppress(ValueError):  # mimi.py stands alone
        part = checkpoints(path).unfinished(path)  # it also removes what dead processes left
    try:
        with open(part, "wb") as file:
            yield file
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)


def to_pcm16(audio):
    """(samples,) float, full scale 1 -> (samples,) int16, clipped."""
    return (np.clip(np.array(audio, dtype=np.float32), -1, 1) * 32767).round().astype("<i2")


# ------------------------------------------------------------------------------------ command


def main(argv=None):
    import argparse

    p = argparse.ArgumentParser(prog="mimi.py", description="Speech through the codec and back.")
    p.add_argument("input", help="an audio file of any format, rate and number of channels")
    p.add_argument("output", help="a .wav, .flac, .mp3, .ogg or .opus file, 24 kHz mono")
    p.add_argument("--model", help="a folder, file or Hub repository (default: kyutai's weights)")
    p.add_argument("--codes", metavar="F.npz", help="also save the codes (K, F) as `codes`")
    p.add_argument("--n-codebooks", type=int, metavar="K", help="use only the first K codebooks")
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")  # without the usage
    args = p.parse_args(argv)
    try:
        check_file(args.input)  # before a download
        model = load(args.model, args.n_codebooks)
        audio = read_audio(args.input, model.sample_rate)
        with audio_file(args.output, model.sample_rate, [args.input]) as write:
            codes = model.encode(mx.array(audio)[None, None])
            write(model.decode(codes)[0, 0, : audio.size])
            if args.codes:
                with replacing(args.codes, [args.input, args.output]) as file:
                    np.savez(file, codes=np.array(codes[0]), sample_rate=model.sample_rate)
    except (ValueError, OSError) as e:
        p.error(" ".join(str(e).split()))
    except KeyboardInterrupt:
        p.exit(130, "interrupted: nothing was written\n")
    print(f"{codes.shape[2]} frames of {codes.shape[1]} codes", file=sys.stderr)


if __name__ == "__main__":
    main()
