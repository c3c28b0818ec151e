"""CSM, Sesame's Conversational Speech Model, on MLX: text and earlier turns in, 24 kHz speech out.

    python csm.py "Hello from Sesame." hello.wav

Sources: Sesame's PyTorch code (github.com/SesameAILabs/csm) and Hugging Face transformers'
CsmForConditionalGeneration (5.23). tests/test_model.py compares this file with transformers: same
logits, same greedy codes, on the same weights.

How a sentence becomes speech:
    "[speaker]text" -> token ids -> rows -> backbone (Llama, KV cache) -> last hidden state h
    -> CSM.next_frame: h -> code 0 of the frame -> depth decoder, a small Llama -> codes 1 .. 31
    -> the frame goes back into the backbone as one row, and through Mimi as 80 ms of sound.
    A frame of zeros ends the speech. The loop is `frames`, below CSM.

A row is one position of the backbone: K audio codes and one text id. A text row holds a text id
only, an audio row holds codes only. The input is the sum of the embeddings of what a row holds.

Shapes: B batch, T positions, F frames, K codebooks (32), V audio vocabulary (2051), D hidden size,
H heads.
"""

import copy
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import mimi  # before mlx, see the top of mimi.py

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

__version__ = "0.1.0"
NO_TEXT = -1  # an empty cell of an audio row: its text id, and codebooks that its frame lacks
PREFILL_ROWS = 256  # rows of a prompt that pass the backbone at once; bounds memory
CACHE_STEP = 256  # positions that a KV cache grows by
LLAMA3_ROPE = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

log = logging.getLogger("csm")

# ------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class LlamaConfig:
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: dict | None = field(default_factory=LLAMA3_ROPE.copy)  # None: plain RoPE
    max_positions: int = 2048

    def __post_init__(self):
        if s := self.rope_scaling:
            numbers = [s.get(name) for name in LLAMA3_ROPE]
            if not all(type(n) in (int, float) and 0 < n < 1e12 for n in numbers):
                raise ValueError(f"rope_scaling must have positive {', '.join(LLAMA3_ROPE)}")
            if s["low_freq_factor"] >= s["high_freq_factor"]:
                raise ValueError("low_freq_factor must be below high_freq_factor")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError("n_kv_heads must divide n_heads, and head_dim must be even")

    def rope_periods(self):
        """(head_dim / 2,) float32: 1 / RoPE frequencies. Llama 3 lowers the low frequencies."""
        periods = self.rope_theta ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        if s := self.rope_scaling:
            turns = s["original_max_position_embeddings"] / (2 * math.pi * periods)
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            keep = np.clip((turns - low) / (high - low), 0, 1)  # 1 keeps a frequency, 0 lowers it
            periods = periods / (keep + (1 - keep) / s["factor"])
        return mx.array(periods.astype(np.float32))


@dataclass(frozen=True)
class CSMConfig:
    """The sizes of a CSM; the defaults are CSM-1B's. `save` writes them to config.json."""

    backbone: LlamaConfig = LlamaConfig(16, 2048, 32, 8, 64, 8192)
    decoder: LlamaConfig = LlamaConfig(4, 1024, 8, 2, 128, 8192)
    text_vocab_size: int = 128_256
    audio_vocab_size: int = 2051  # Mimi's 2048 codes, and three ids that are never drawn
    audio_num_codebooks: int = 32
    speaker_prefix_space: bool = False  # "[0] text" instead of "[0]text"
    text_tokenizer: str | None = None  # Hub repository to use if the folder has no tokenizer
    use_default_voice_prompt: bool = True
    voice_match: bool = False  # put a voice's clip inside the new turn, not in one before it
    max_part_characters: int = 240  # programs split longer texts, which would sound worse
    sampling: dict | None = None  # this model's own defaults for the fields of Sampling
    quantization: dict | None = None  # MLX's record; loading uses the tensors' shapes instead

    @classmethod
    def from_dict(cls, d):
        d = {f.name: d[f.name] for f in fields(cls) if d.get(f.name) is not None}
        try:
            for part in {"backbone", "decoder"} & d.keys():
                mimi.check_fields(LlamaConfig, d[part])
                d[part] = LlamaConfig(**d[part])
            mimi.check_fields(cls, d)
            sampling = d.get("sampling", {})
            if not all(type(number) in (int, float) for number in sampling.values()):
                raise ValueError("sampling must have numbers")
            Sampling(**sampling)
            return cls(**d)
        except (TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"config.json is not in our layout: {e}".replace("\n", " ")) from None


# ----------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. The filters act before the temperature, as in mlx-lm."""

    temperature: float = 0.9  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 1.0  # 0 or 1: off
    min_p: float = 0.0  # relative to the likeliest code; 0: off
    min_tokens_to_keep: int = 1  # codes that min_p never removes
    sampler: Callable | None = None  # log-probabilities (1, V) -> ids (1,), instead of the above
    logits_processors: tuple = ()  # codebook 0: (codes so far (F,), logits (1, V)) -> logits

    def __post_init__(self):
        limits = {"temperature": (0, 1e9), "top_p": (0, 1), "min_p": (0, 1)}
        limits |= {"top_k": (0, math.inf), "min_tokens_to_keep": (1, math.inf)}
        for name, (low, high) in limits.items():
            if not low <= (getattr(self, name) or 0) <= high:
                raise ValueError(f"{name} must lie in {low:g}..{high:g}, not {getattr(self, name)}")

    @property
    def greedy(self):
        return self.temperature < 1e-6  # dividing by less would overflow

    def as_row(self):
        """The options of `sample`: 1 / temperature, top-k, top-p, log min-p, codes to keep."""
        if self.greedy:
            return [1.0, 1, 2.0, -math.inf, 1]
        top_p = self.top_p if 0 < self.top_p < 1 else 2.0
        min_p = math.log(self.min_p) if self.min_p else -math.inf
        top_k = min(self.top_k or 2**20, 2**20)  # 2**20 is all codes, and exact in float32
        return [1 / self.temperature, top_k, top_p, min_p, min(self.min_tokens_to_keep, 2**20)]


def sample(logits, noise, options):
    """Logits, Gumbel noise (B, V) and options (B, 5), rows of Sampling.as_row -> ids (B,).

    The ids are sorted by probability. Each filter keeps the first few; the smallest number counts.
    Gumbel-max: the kept id with the largest logp / temperature + noise is the sample.
    """
    scale, top_k, top_p, min_p, n_keep = (options[:, i : i + 1] for i in range(5))
    order, rank = mx.argsort(-logits, axis=-1), mx.arange(logits.shape[-1])
    logp = mx.take_along_axis(logits, order, axis=-1)
    logp = logp - mx.logsumexp(logp, axis=-1, keepdims=True)
    p_likelier = mx.cumsum(mx.exp(logp), axis=-1, inclusive=False)
    keep = (rank < top_k) & (p_likelier < top_p) & ((logp >= logp[:, :1] + min_p) | (rank < n_keep))
    score = mx.where(keep, logp * scale, -mx.inf) + mx.take_along_axis(noise, order, axis=-1)
    best = mx.argmax(score, axis=-1, keepdims=True)
    return mx.take_along_axis(order, best, axis=-1)[:, 0].astype(mx.int32)


@dataclass
class Draw:
    """The `draw` of CSM.next_frame: (i, logits (B, V)) -> ids (B,) below n_codes."""

    noise: mx.array | None  # Gumbel, (B, K, V); None draws the likeliest
    options: mx.array  # (B, 5), a Sampling.as_row each
    n_codes: int  # codes that Mimi has; higher ids are not audio

    def __call__(self, i, logits):
        logits = logits[:, : self.n_codes].astype(mx.float32)
        if self.noise is None:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        return sample(logits, self.noise[:, i, : self.n_codes], self.options)


def add_functions(draw, sampling, said):
    """Wrap `draw` in the user's functions, for B = 1. said: codebook 0's codes so far."""

    def draw_one(i, logits):
        for process in sampling.logits_processors if i == 0 else ():
            logits = process(mx.array(said, mx.int32), logits)
        if sampling.sampler is None:
            return draw(i, logits)
        is_code = mx.arange(logits.shape[-1]) < draw.n_codes
        logits = mx.where(is_code, logits.astype(mx.float32), -mx.inf)
        ids = sampling.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if not 0 <= ids.item() < draw.n_codes:  # else its embedding is out of bounds
            raise ValueError(f"the sampler gave {ids.item()}, and Mimi has {draw.n_codes} codes")
        return ids.astype(mx.int32)

    return draw_one


# -------------------------------------------------------------------------------------------- model


class KVCache:
    """Keys and values of the positions so far: (B, H_kv, capacity, head_dim) arrays, by layer."""

    def __init__(self, config, dtype=mx.float32, step=CACHE_STEP):
        self.dtype, self.step = dtype, step
        self.keys, self.values = [None] * config.n_layers, [None] * config.n_layers
        self.offset = 0  # positions held

    def update(self, layer, k, v):
        """Append k, v (B, H_kv, T, head_dim); return this layer's keys and values so far.

        The last layer advances `offset`.
        """
        end = self.offset + k.shape[2]
        for arrays, new in ((self.keys, k), (self.values, v)):
            old = new[:, :, :0] if arrays[layer] is None else arrays[layer]
            if (missing := end - old.shape[2]) > 0:
                room = math.ceil(missing / self.step) * self.step
                arrays[layer] = mx.pad(old.astype(self.dtype), [(0, 0), (0, 0), (0, room), (0, 0)])
            arrays[layer][:, :, self.offset : end] = new
        if layer == len(self.keys) - 1:
            self.offset = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def positions(self):
        """Where RoPE starts to count for the next row."""
        return self.offset

    def mask(self, T):
        """What T new positions may attend to, for mx.fast.scaled_dot_product_attention."""
        return "causal" if T > 1 else None

    def trim(self, n):
        """Forget the last n positions."""
        self.offset -= max(0, min(n, self.offset))

    def copy(self):
        """An independent cache with the same content."""
        other = copy.copy(self)
        other.keys = [k if k is None else k[:, :, : self.offset] for k in self.keys]
        other.values = [v if v is None else v[:, :, : self.offset] for v in self.values]
        mx.eval(other.keys, other.values)  # so that other threads can use it
        return other


class Linear(nn.Module):
    """(..., in) -> (..., out). weight (out, in); quantized if `scales` lies beside it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = mx.zeros((n_out, n_in))  # nn.Linear would use the global random state

    def __call__(self, x):
        if "scales" not in self:
            return x @ self.weight.T
        how, biases = packing(self, x.shape[-1]), self.get("biases")
        rows = x if len(x) == 1 else x.reshape(-1, x.shape[-1])  # or CUDA reads the weights B times
        y = mx.quantized_matmul(rows, self.weight, self.scales, biases, transpose=True, **how)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Embedding(nn.Module):
    """ids (...) -> (..., dim). weight (n, dim), plain or quantized as Linear's."""

    def __init__(self, n, dim):
        super().__init__()
        self.dim = dim
        self.weight = mx.zeros((n, dim))

    def __call__(self, ids):
        if "scales" not in self:
            return self.weight[ids]
        biases = self.biases[ids] if "biases" in self else None
        return mx.dequantize(self.weight[ids], self.scales[ids], biases, **packing(self, self.dim))


def packing(module, n_in):
    """How a quantized weight with n_in inputs is packed, as arguments of mx.quantized_matmul."""
    bits, group_size = 32 * module.weight.shape[-1] // n_in, n_in // module.scales.shape[-1]
    mode = "affine" if "biases" in module else "nvfp4" if group_size == 16 else f"mxfp{bits}"
    return {"group_size": group_size, "bits": bits, "mode": mode}


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.n_heads, self.n_kv_heads = c.n_heads, c.n_kv_heads
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim)

    def __call__(self, x, rope, mask, cache, last):
        B, T, _ = x.shape
        q = self.q_proj(x[:, -1:] if last else x)
        q = q.reshape(B, -1, self.n_heads, self.head_dim).transpose(0, 2, 1, 3)
        k = self.k_proj(x).reshape(B, T, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(B, T, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        # q (B, H, T, head_dim), or one position if `last`. RoPE rotates neighbours, as Sesame's
        # weights expect; transformers rotates halves, with the rows of q and k permuted.
        k = mx.fast.rope(k, self.head_dim, traditional=True, base=None, scale=1.0, **rope)
        if last:
            rope = rope | {"offset": rope["offset"] + T - 1}
        q = mx.fast.rope(q, self.head_dim, traditional=True, base=None, scale=1.0, **rope)
        if cache:
            k, v = cache.update(self.layer, k, v)
        scale = self.head_dim**-0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(B, y.shape[2], -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.dim, c.ffn_dim)
        self.up_proj = Linear(c.dim, c.ffn_dim)
        self.down_proj = Linear(c.ffn_dim, c.dim)

    def __call__(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x, rope, mask, cache, last):
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache, last)
        x = (x[:, -1:] if last else x) + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama 3 without embedding and head: (B, T, D) -> (B, T, D), causal."""

    def __init__(self, c):
        super().__init__()
        self.layers = [Layer(c, i) for i in range(c.n_layers)]
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self._periods = c.rope_periods()  # the underscore keeps it out of the parameters
        mx.eval(self._periods)  # so that other threads can use it

    def __call__(self, x, cache=None, last=False):
        """last: only the last position's output, without most of the last layer's work."""
        T = x.shape[1]
        mask = cache.mask(T) if cache else "causal" if T > 1 else None
        rope = {"freqs": self._periods, "offset": cache.positions() if cache else 0}
        for layer in self.layers:
            x = layer(x, rope, mask, cache, last and layer is self.layers[-1])
        return self.norm(x)


def row_mask(rows):
    """Cells of rows (..., K + 1) to embed: the last of a text row, the codes of an audio row."""
    is_text = rows[..., -1:] != NO_TEXT
    in_text_column = mx.arange(rows.shape[-1]) == rows.shape[-1] - 1
    return (is_text == in_text_column) & (rows != NO_TEXT)


def frame_row(codes, K):
    """A frame's codes (B, n) as the row (B, 1, K + 1) that goes back into the backbone."""
    missing = K + 1 - codes.shape[1]  # the text id, and the codebooks that are not spoken
    return mx.pad(codes, [(0, 0), (0, missing)], constant_values=NO_TEXT)[:, None]


class CSM(nn.Module):
    """Backbone and depth decoder. Parameters have the names of senstella/csm-1b-mlx."""

    def __init__(self, config: CSMConfig = CSMConfig()):
        super().__init__()
        self.config = c = config
        D, K, V = c.backbone.dim, c.audio_num_codebooks, c.audio_vocab_size
        self.backbone = Llama(c.backbone)
        self.decoder = Llama(c.decoder)
        self.text_embeddings = Embedding(c.text_vocab_size, D)
        self.audio_embeddings = Embedding(V * K, D)  # code i of codebook k is row i + V * k
        self.projection = Linear(D, c.decoder.dim)
        self.codebook0_head = Linear(D, V)
        self.audio_head = [Linear(c.decoder.dim, V) for _ in range(K - 1)]

    @property
    def dtype(self):
        return self.backbone.norm.weight.dtype

    def embed(self, rows):
        """rows (B, T, K + 1) -> (B, T, D): the sum, in float32, of the embeddings that count."""
        K, ids = self.config.audio_num_codebooks, mx.maximum(rows, 0)  # NO_TEXT is no index
        first = self.config.audio_vocab_size * mx.arange(K)  # the row of each codebook's code 0
        audio = self.audio_embeddings(ids[..., :K] + first)  # (B, T, K, D)
        text = self.text_embeddings(ids[..., K:])  # (B, T, 1, D)
        cells = mx.concatenate([audio, text], axis=-2) * row_mask(rows)[..., None]
        return cells.astype(mx.float32).sum(axis=-2).astype(self.dtype)

    def __call__(self, rows: mx.array, cache: KVCache | None = None, last=False) -> mx.array:
        """rows (B, T, K + 1) -> the backbone's hidden states (B, T, D); last: (B, 1, D)."""
        return self.backbone(self.embed(rows), cache, last)

    def head(self, i, h):
        """Logits (..., V) of codebook i from h, the backbone's for i = 0, else the decoder's."""
        return self.codebook0_head(h) if i == 0 else self.audio_head[i - 1](h)

    def embed_code(self, i, codes):
        """Codes (...) of codebook i -> (..., D)."""
        x = self.audio_embeddings(codes + self.config.audio_vocab_size * i)
        return x.astype(self.dtype)  # MLX dequantizes mxfp4 and its like to bfloat16

    def depth_logits(self, h, codes):
        """Teacher-forced: h (N, D), their frames (N, K) -> logits (N, K - 1, V) of codes 1.."""
        K = self.config.audio_num_codebooks
        x = mx.concatenate([h[:, None], self.embed_code(mx.arange(K - 1), codes[:, :-1])], axis=1)
        y = self.decoder(self.projection(x))
        return mx.stack([self.head(i, y[:, i]) for i in range(1, K)], axis=1)

    def next_frame(self, h: mx.array, draw: Callable, n: int | None = None) -> mx.array:
        """Hidden state h (B, D) -> the codes (B, K) int32 of the frame that follows.

        draw(i, logits (B, V)) -> ids (B,) chooses the code of each codebook i in turn. n: stop
        after the first n codebooks.
        """
        n = n or self.config.audio_num_codebooks
        cache = KVCache(self.config.decoder, self.dtype, step=n)  # a fresh one every frame
        codes = [draw(0, self.head(0, h))]
        x = mx.stack([h, self.embed_code(0, codes[0])], axis=1)  # (B, 2, D)
        for i in range(1, n):
            y = self.decoder(self.projection(x), cache)[:, -1]
            codes.append(draw(i, self.head(i, y)))
            x = self.embed_code(i, codes[i])[:, None]  # (B, 1, D)
        return mx.stack(codes, axis=1).astype(mx.int32)


def frames(
    model: CSM, rows: np.ndarray, cache: KVCache, max_frames: int, seed: int,
    sampling: Sampling = Sampling(), n_codes: int | None = None, n_codebooks: int | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Speak a prompt's rows (T, K + 1) -> frames of codes (K,) int32, until one is all zeros.

    cache: earlier positions; the rows and the frames are appended. n_codes: Mimi's codebook size
    (None: V - 3). n_codebooks: speak only the first so many (None: all).
    """
    K, V = model.config.audio_num_codebooks, model.config.audio_vocab_size
    n, key, said = n_codebooks or K, mx.random.key(seed), []
    options = mx.array([sampling.as_row()])
    h = prefill(model, rows, cache)
    for _ in range(max_frames):
        now, key = mx.random.split(key)
        noise = None if sampling.greedy else mx.random.gumbel((1, n, V), key=now)
        draw = Draw(noise, options, n_codes or V - 3)
        if sampling.sampler or sampling.logits_processors:
            draw = add_functions(draw, sampling, said)
        codes = fast_next_frame(model, h, draw, n)  # (1, n)
        mx.async_eval(codes)  # separately, so that reading codes does not wait for h
        h = model(frame_row(codes, K), cache)[:, -1]  # (1, D): the frame goes back in
        mx.async_eval(h, key)  # queue the backbone's step before looking at the codes
        frame = np.array(codes)[0]
        if not frame.any():
            if not mx.isfinite(h).all():
                raise ValueError(f"the model computes NaN or infinite numbers in {model.dtype}")
            return
        said.append(int(frame[0]))
        yield frame
    log.warning("the speech was cut off at %d frames", max_frames)


def prefill(model, rows, cache):
    """Pass rows (T, K + 1) through the backbone -> the hidden state (1, D) of the last."""
    h = None
    for i in range(0, len(rows), PREFILL_ROWS):
        h = model(mx.array(rows[None, i : i + PREFILL_ROWS]), cache, last=True)[:, -1]
        mx.eval(h, cache.keys, cache.values)  # bounds memory
    return h


# ----------------------------------- compiling CSM.next_frame: skip this section on a first reading

COMPILED = {}  # what a trace depends on besides shapes -> compiled function
COMPILE_LOCK = threading.Lock()  # MLX traces anew in each thread, for each shape


def on_gpu():
    return mx.default_device() == mx.gpu


def compiles(model):
    """Whether to compile next_frame: as CSM_COMPILE=0 or 1 says, by default if it is faster.

    On a GPU it does: MLX fuses thousands of small operations and replays them without Python. On
    a CPU it saves a large model's frame some time, and MLX may call a C++ compiler, once.
    """
    asked = os.environ.get("CSM_COMPILE", "")
    widths = model.config.backbone.dim * model.config.decoder.dim
    return asked == "1" if asked else on_gpu() or widths >= 2e6


def fast_next_frame(model, h, draw, n):
    """model.next_frame(h, draw, n), compiled where that pays and `draw` is plain."""
    if not isinstance(draw, Draw) or not compiles(model):
        return model.next_frame(h, draw, n)
    weights = model.parameters()  # inputs of the function, so that they may change
    del weights["backbone"], weights["text_embeddings"]
    arrays = (h,) if draw.noise is None else (h, draw.noise, draw.options)
    key = repr(model.config), draw.n_codes, n, *(name for name, _ in tree_flatten(weights))
    with COMPILE_LOCK:
        try:
            if key not in COMPILED:
                COMPILED[key] = compile_next_frame(model, draw.n_codes, n)
                mx.eval(COMPILED[key](weights, *arrays))  # a CPU's C++ compiler may fail
            if COMPILED[key]:
                return COMPILED[key](weights, *arrays)
        except RuntimeError as e:
            reason = " ".join(str(e).split())
            log.warning("going on without mx.compile, which fails here: %s", reason)
            COMPILED[key] = None
        except BaseException:  # Ctrl-C breaks the trace: set it aside, but never free it
            COMPILED[key, len(COMPILED)] = COMPILED.pop(key, None)
            raise
    return model.next_frame(h, draw, n)


def compile_next_frame(model, n_codes, n):
    """next_frame as a compiled function of weights and arrays; it holds no weights of the model.

    Never free it: MLX finds traces by address, and a new function could reuse it.
    """
    skeleton = copy.deepcopy(model)
    skeleton.update(tree_map(lambda w: mx.zeros(()), skeleton.parameters()))

    def function(weights, h, noise=None, options=None):
        skeleton.update(weights)
        return skeleton.next_frame(h, Draw(noise, options, n_codes), n)

    return mx.compile(function)


# ------------------------------------------------------------------------------------------- prompt


@dataclass(eq=False)  # comparing arrays gives no single truth value
class Segment:
    """A finished turn of a conversation: who said what, and how it sounded.

    audio: (samples,) at the codec's rate, 24 kHz, or the path of an audio file of any rate and
    number of channels.
    codes: (F, K), as generation gives them; with codes, audio is not needed and not encoded.
    """

    speaker: int
    text: str
    audio: mx.array | np.ndarray | str | os.PathLike | None = None
    codes: mx.array | np.ndarray | None = None


class Tokenizer:
    """Text -> ids, by a `tokenizer.json` (tokenizers) or a `tokenizer.model` (sentencepiece)."""

    MARKS = (  # common names of the tokens before and after a text
        "<|begin_of_text|> <|end_of_text|>", "<bos> <eos>", "<s> </s>", "<|im_start|> <|im_end|>",
    )  # fmt: skip

    def __init__(self, path):
        self.path = Path(path)
        mimi.check_file(path)
        try:
            if self.path.suffix == ".json":
                import tokenizers

                t = tokenizers.Tokenizer.from_file(str(path))
                self.bos, self.eos = self._find_marks(t)
                t.encode_special_tokens = True  # "<|end_of_text|>" in a user's text is text
                self._encode = lambda text: t.encode(text, add_special_tokens=False).ids
            else:
                import sentencepiece

                t = sentencepiece.SentencePieceProcessor(model_file=str(path))
                self._encode = t.encode
                self.bos, self.eos = (i if i >= 0 else None for i in (t.bos_id(), t.eos_id()))
        except Exception as e:  # both libraries raise bare Exceptions
            hint = ""
            if "untagged enum" in str(e) and tokenizers.__version__ < "0.20":  # merges as pairs
                hint = " (newer than the package tokenizers: pip install -U tokenizers)"
            raise ValueError(f"{path} is not a tokenizer: {e}{hint}") from None
        if None in (self.bos, self.eos):
            log.warning("%s has no begin and end tokens, which CSM was trained with", path)

    def _find_marks(self, t):
        """The ids before and after a text: by the tokenizer's template if it has both, or by name.

        Llama's own template adds only the first; CSM was trained with both.
        """
        whole, text = t.encode("a").ids, t.encode("a", add_special_tokens=False).ids
        if len(whole) == len(text) + 2 and whole[1:-1] == text:
            return whole[0], whole[-1]
        config = mimi.read_json(self.path.with_name("tokenizer_config.json"))
        names = [config.get(name) or "" for name in ("bos_token", "eos_token")]
        names = [name["content"] if isinstance(name, dict) else name for name in names]
        pairs = [names, *(marks.split() for marks in self.MARKS)]
        pairs = [[t.token_to_id(name) for name in pair] for pair in pairs]
        # Prefer two different tokens; a single one only separates documents.
        return max(pairs, key=lambda p: (None not in p and p[0] != p[1], -p.count(None)))

    def encode(self, text):
        """text -> [bos, ..., eos]: CSM's template has both, once each."""
        return [i for i in (self.bos, *self._encode(text), self.eos) if i is not None]


def as_samples(audio, sample_rate=24_000):
    """Segment.audio in any form -> (samples,) float32. Raises ValueError."""
    if isinstance(audio, (str, os.PathLike)):
        return mimi.read_audio(audio, sample_rate)
    if isinstance(audio, mx.array) and audio.dtype == mx.bfloat16:  # which NumPy lacks
        audio = audio.astype(mx.float32)
    audio = np.array(audio)
    if np.issubdtype(audio.dtype, np.integer):
        low, high = np.iinfo(audio.dtype).min, np.iinfo(audio.dtype).max + 1
        audio = (audio - (low + high) / 2) / ((high - low) / 2)
    if audio.ndim == 2:  # (channels, samples) or (samples, channels)
        audio = audio.mean(axis=int(np.argmin(audio.shape)))
    if audio.ndim != 1 or not audio.size:
        raise ValueError(f"audio must be (samples,), not {audio.shape}")
    if not np.isfinite(audio).all():
        raise ValueError("the audio contains NaN or infinite samples")
    return audio.astype(np.float32)


def check_seed(seed):
    if not (isinstance(seed, (int, np.integer)) and 0 <= seed < 2**64):
        raise ValueError(f"seed must lie in 0..2^64 - 1, not {seed}")


# ---------------------------------------------------------------------------------------- generator


class Generator:
    """A loaded model: network, codec, tokenizer and voices. Threads may share it."""

    def __init__(self, model, codec, tokenizer, voices=None, config_json=None, codebooks=None):
        self.model, self.mimi, self.tokenizer = model, codec, tokenizer
        self.pid = os.getpid()
        self.voices = voices or {}  # name -> folder of its .wav and .txt; None: on the Hub
        self.config_json = config_json or {}  # all of config.json, for `save`
        self.sample_rate = codec.sample_rate
        self.max_positions = model.config.backbone.max_positions
        K, has = model.config.audio_num_codebooks, codec.n_codebooks
        self.codebooks = n = K if codebooks is None else codebooks  # how many are spoken
        if not 2 <= n <= K:
            raise ValueError(f"codebooks must be 2 to {K}, not {n}")
        if n > has:
            raise ValueError(f"the model writes {n} codebooks, its Mimi has {has} (use fewer)")
        self.codec_stream = mx.new_thread_local_stream(mx.default_device())
        self.context_caches = {}  # rows.tobytes() -> KVCache, the last used at the end
        self.n_context_caches = 4
        self._voice_prompts = {}  # name, times of its files -> Segment with codes

    def __repr__(self):
        c, voices = self.model.config.backbone, ", ".join(sorted(self.voices)) or "none"
        return f"<csm.Generator: {c.n_layers} layers of {c.dim}, voices: {voices}>"

    def generate(
        self, text: str, speaker: int = 0, context: Sequence[Segment] = (), *,
        voice: str | os.PathLike | None = None, max_audio_length_ms: float | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, min_tokens_to_keep: int | None = None, seed: int | None = None,
        sampler: Callable | None = None, logits_processors: Sequence[Callable] = (),
        voice_match: bool | None = None,
    ) -> mx.array:  # fmt: skip
        """Speech for `text`: (samples,) float32 at `sample_rate`; empty if the model ends at once.

        speaker: 0, 1, ...; the voice comes from the clips of the same speaker in the context
        context: Segments that were said before
        voice: used without a context: the name of a preset, or a clip with its transcript beside it
            (me.wav, me.txt), or "none"; None: the model's default
        max_audio_length_ms: None: 3 s and 200 ms a character, at most 90 s
        temperature ... logits_processors: see Sampling; None: the model's own default
        seed: for the same speech again; None draws one, and logs it on the logger "csm"
        voice_match: continue the speaker's last clip, not start a new turn; None: by config.json

        Raises ValueError for a wrong argument, and for a prompt that the model has no room for.
        """
        pieces = self.stream(
            text, speaker, context, voice=voice, voice_match=voice_match, streaming_interval=2.0,
            max_audio_length_ms=max_audio_length_ms, seed=seed, temperature=temperature,
            top_k=top_k, top_p=top_p, min_p=min_p, min_tokens_to_keep=min_tokens_to_keep,
            sampler=sampler, logits_processors=logits_processors,
        )  # fmt: skip
        return concatenate(pieces)

    def stream(
        self, text: str, speaker: int = 0, context: Sequence[Segment] = (), *, voice=None,
        voice_match: bool | None = None, streaming_interval: float = 0.5, **options,
    ) -> Iterator[mx.array]:  # fmt: skip
        """What `generate` gives, in pieces of `streaming_interval` seconds: (samples,) float32."""
        talk = Conversation(self, context, voice, speaker, voice_match)  # of one turn
        return talk.stream(text, speaker, streaming_interval=streaming_interval, **options)

    def generate_codes(
        self, text: str, speaker: int = 0, context: Sequence[Segment] = (), *, voice=None,
        voice_match: bool | None = None, **options,
    ) -> mx.array:  # fmt: skip
        """The codes of what `generate` gives: (F, K) int32."""
        talk = Conversation(self, context, voice, speaker, voice_match)
        return self.join_frames(talk.frames(text, speaker, **options))

    def conversation(
        self, context: Sequence[Segment] = (), *, voice: str | os.PathLike | None = None,
        speaker: int = 0, voice_match: bool | None = None,
    ) -> "Conversation":  # fmt: skip
        """A Conversation after `context`. Without context, `speaker` has the voice."""
        return Conversation(self, context, voice, speaker, voice_match)

    def save(self, folder):
        """Write all of the model as a folder in our own layout, atomically. Raises ValueError."""
        mimi.checkpoints("a model to save").save(self, folder)

    def speak(self, rows, cache, max_frames, seed, sampling):
        """csm.frames with this model's codes, codebooks and positions."""
        max_frames = min(max_frames, self.max_positions - cache.offset - len(rows))
        n_codes = self.mimi.config.codebook_size
        return frames(self.model, rows, cache, max_frames, seed, sampling, n_codes, self.codebooks)

    def decode_stream(self, frames, streaming_interval):
        """Frames (K,) -> pieces of sound (samples,), each as soon as its frames are there."""
        if not 0 < streaming_interval < math.inf:
            raise ValueError(f"streaming_interval must be above 0 s, not {streaming_interval}")
        size = max(1, round(streaming_interval * self.mimi.config.frame_rate))

        def pieces():
            state = self.mimi.init_state(1)
            with closing(frames):
                while some := list(islice(frames, size)):
                    with mx.stream(self.codec_stream):  # parallel to the next frames
                        codes = self.join_frames(some).T[None]  # (1, K, f)
                        audio, state = self.mimi.decode_step(codes, state)
                        piece = audio[0, 0]
                        mx.async_eval(piece)  # so that another thread can take it
                    yield piece

        return pieces()

    def join_frames(self, frames):
        """Frames (K,) -> codes (F, K) int32."""
        return mx.array(np.array(list(frames), np.int32).reshape(-1, self.codebooks))

    def decode(self, codes) -> mx.array:
        """Codes (F, K) -> (samples,) float32, in bounded memory."""
        return concatenate([self.mimi.decode(codes.T[None])[0, 0]])

    def encode(self, segment):
        """The Segment with its codes."""
        if isinstance(segment, Segment) and segment.codes is not None:
            return segment
        n = min(self.mimi.n_codebooks, self.model.config.audio_num_codebooks)
        return replace(segment, codes=self.audio_rows(segment)[:-1, :n])

    def max_frames(self, max_audio_length_ms, text=""):
        """How many frames a length in ms allows; None: as many as the text can take."""
        frame_ms = 1000 / self.mimi.config.frame_rate
        ms = max_audio_length_ms
        ms = min(90_000, 3_000 + 200 * len(str(text))) if ms is None else ms
        if not frame_ms <= ms < math.inf:
            raise ValueError(f"max_audio_length_ms must be {frame_ms:g} or more, not {ms}")
        return int(ms / frame_ms)

    def read_options(self, seed=None, sampling=()):
        """-> the seed, drawn if None, and a Sampling: the model's own, changed by `sampling`."""
        if os.getpid() != self.pid:  # MLX's threads are not there, and it would wait for them
            raise ValueError("the model was loaded before a fork: load it in the new process")
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        check_seed(seed)
        given = {name: value for name, value in dict(sampling).items() if value is not None}
        given["logits_processors"] = tuple(given.get("logits_processors", ()))
        return int(seed), Sampling(**(self.model.config.sampling or {}) | given)

    # Prompts: text and Segments -> rows.

    def opening(self, speaker, context=(), voice=None, voice_match=None):
        """-> the earlier turns, and the clip that voice_match continues, or None."""
        if isinstance(context, Segment):
            raise ValueError("a context is a list of Segments, not one Segment")
        turns = list(context or ()) or self.voice_prompt(voice, speaker)
        if not (self.model.config.voice_match if voice_match is None else voice_match):
            return turns, None
        for i in reversed(range(len(turns))):
            if isinstance(turns[i], Segment) and turns[i].speaker == speaker:
                return turns[:i] + turns[i + 1 :], turns[i]
        if voice_match:
            raise ValueError(f"voice_match continues a clip of speaker {speaker}: there is none")
        return turns, None

    def prompt(self, text, speaker=0, context=(), voice=None, voice_match=None):
        """-> the rows of the context, and the rows (T, K + 1) of the new turn up to its speech."""
        turns, clip = self.opening(speaker, context, voice, voice_match)
        before, rows = self.context_rows(turns), self.turn_rows(text, speaker, clip)
        self.check_length(len(before) + len(rows))
        return before, rows

    def context_rows(self, turns):
        """(T, K + 1) int32 for finished turns, perhaps none."""
        empty = np.zeros((0, self.model.config.audio_num_codebooks + 1), np.int32)
        return np.concatenate([empty, *map(self.segment_rows, turns)])

    def segment_rows(self, segment):
        """(T, K + 1) int32 for a finished turn: its text, then its audio."""
        audio = self.audio_rows(segment)  # first: it raises if this is no Segment
        return np.concatenate([self.text_rows(segment.text, segment.speaker), audio])

    def turn_rows(self, text, speaker, clip=None):
        """(T, K + 1) int32 for a turn to speak, which may continue a clip."""
        if clip is None:
            return self.text_rows(text, speaker)
        both = self.text_rows(f"{clip.text} {text}", speaker)
        return np.concatenate([both, self.audio_rows(clip)[:-1]])  # without its end

    def text_rows(self, text, speaker):
        """(T, K + 1) int32 for a turn's text."""
        if type(speaker) is bool or not isinstance(speaker, (int, np.integer)) or speaker < 0:
            raise ValueError(f"speaker must be 0 or more, not {speaker!r}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the text is empty, or no text: {text!r}")
        c = self.model.config
        spaced = f" {text.lstrip()}" if c.speaker_prefix_space else text
        try:
            ids = self.tokenizer.encode(f"[{speaker}]{spaced}")
        except (UnicodeError, TypeError):  # lone surrogates, which Python makes of invalid bytes
            raise ValueError("the text is not UTF-8") from None
        if max(ids) >= (n := c.text_vocab_size):
            raise ValueError(f"the tokenizer gives id {max(ids)}, the model knows {n}: not a pair")
        rows = np.zeros((len(ids), c.audio_num_codebooks + 1), np.int32)
        rows[:, -1] = ids
        return rows

    def audio_rows(self, segment):
        """(F + 1, K + 1) int32 for a turn's audio: its frames and the frame of zeros that ends it.

        NO_TEXT marks the text column, and the codebooks that the codes lack.
        """
        K, V = self.model.config.audio_num_codebooks, self.model.config.audio_vocab_size
        if not isinstance(segment, Segment):
            raise ValueError(f"a context is a list of Segments, not of {segment!r}")
        if segment.codes is None and segment.audio is None:
            raise ValueError(f"a turn of the context has no audio: {segment.text[:40]!r}")
        codes = segment.codes
        if codes is None:
            audio = mx.array(as_samples(segment.audio, self.sample_rate))[None, None]
            codes = self.mimi.encode(audio)[0, :K].T
        codes = np.array(codes)
        if codes.ndim != 2 or not self.codebooks <= codes.shape[1] <= K:
            raise ValueError(f"codes must be (frames, {self.codebooks} to {K}), not {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < V:
            raise ValueError(f"codes must lie in 0..{V - 1}")
        rows = np.pad(codes.astype(np.int32), [(0, 1), (0, 0)])
        return np.pad(rows, [(0, 0), (0, K + 1 - rows.shape[1])], constant_values=NO_TEXT)

    def check_length(self, n):
        """Raise ValueError if a prompt of n rows leaves no room for speech."""
        limit, rate = self.max_positions, self.mimi.config.frame_rate
        if n >= limit:
            raise ValueError(
                f"the prompt takes as much room as {n / rate:.0f} s of sound, and the model has "
                f"{limit / rate:.0f} s ({n} positions of {limit}); shorten context or text "
                "(a long text: python -m csm_tools.narrate)"
            )

    def context_cache(self, rows):
        """A KVCache of a context's rows (T, K + 1), shared: copy it before it grows."""
        cache = self.context_caches.pop(rows.tobytes(), None)
        if cache is None:
            cache = KVCache(self.model.config.backbone, self.model.dtype)
            prefill(self.model, rows, cache)
        self.context_caches[rows.tobytes()] = cache  # the last one now
        for old in list(self.context_caches)[: -self.n_context_caches]:
            self.context_caches.pop(old, None)
        return cache

    def voice_prompt(self, voice=None, speaker=0):
        """A voice as a context: a list of one Segment with codes, or [] for none."""
        default = bool(self.voices) and self.model.config.use_default_voice_prompt
        if voice == "none" or (not voice and not default):
            return []
        name = str(voice or min(self.voices, key=lambda name: (name != "conversational_a", name)))
        try:
            files = Path(name), Path(name).with_suffix(".txt")  # a clip that changes is read again
            key = name, *(file.stat().st_mtime_ns for file in files if file.is_file())
            if key not in self._voice_prompts:
                clip = self.encode(self._read_voice(name))
                self.check_length(len(self.segment_rows(clip)))  # also checks its text
                self._voice_prompts[key] = clip
        except (ValueError, FileNotFoundError) as e:
            if voice:
                raise ValueError(str(e)) from None
            log.warning("speaking without the default voice %s: %s", name, e)
            return []
        return [replace(self._voice_prompts[key], speaker=speaker)]

    def _read_voice(self, name):
        """A voice's clip and transcript, as a Segment."""
        if name in self.voices and self.voices[name] is None:
            wav, text = mimi.checkpoints("the Hub's voices").download_voice(name)
            return Segment(0, text, wav)
        wav = self.voices[name] / f"{name}.wav" if name in self.voices else Path(name)
        if not wav.is_file():
            known = ", ".join(sorted(self.voices)) or "none at all"
            hint = f"this model has: {known}; or name a clip, with a .txt beside it"
            raise ValueError(f"unknown voice {name!r}; {hint}")
        return Segment(0, read_text(f"@{wav.with_suffix('.txt')}"), wav)


def concatenate(pieces):
    whole = mx.concatenate([mx.zeros((0,)), *pieces])
    mx.eval(whole)
    return whole


class Conversation:
    """Turns said so far and their KV cache: a new turn computes only its own rows.

    The cache always holds a prefix of the turns' rows. A turn that is abandoned, or fails, leaves
    the others as they were. When the positions run out, the oldest turns after the context are
    forgotten, down to half of the positions, with a warning on the logger "csm".
    """

    def __init__(self, generator, context=(), voice=None, speaker=0, voice_match=None):
        self.generator, self.speaking, self.cache = generator, False, None
        # Segments, and the clip that the speaker's first turn continues, or None
        self.turns, self.clip = generator.opening(speaker, context, voice, voice_match)
        self.blocks = [generator.segment_rows(turn) for turn in self.turns]  # rows (T, K + 1) each
        self.n_context = len(self.blocks)  # these turns are never forgotten

    def say(self, text: str, speaker: int = 0, **options) -> mx.array:
        """Speak the next turn: (samples,) float32. Options: as Generator.generate's."""
        return concatenate(self.stream(text, speaker, streaming_interval=2.0, **options))

    def stream(
        self, text: str, speaker: int = 0, *, streaming_interval: float = 0.5, **options
    ) -> Iterator[mx.array]:
        """Speak the next turn in pieces of `streaming_interval` seconds: (samples,) float32."""
        return self.generator.decode_stream(
            self.frames(text, speaker, **options), streaming_interval
        )

    def hear(self, segment: Segment):
        """Add a turn that somebody else spoke."""
        self._check_free()
        rows = self.generator.segment_rows(segment)
        self.generator.check_length(self.length(self.n_context) + len(rows))
        self.blocks.append(rows)
        self.turns.append(segment)

    def frames(self, text, speaker=0, *, max_audio_length_ms=None, seed=None, **sampling):
        """Speak the next turn as frames of codes (K,). Checks the arguments before the first."""
        g = self.generator
        seed, sampling = g.read_options(seed, sampling)
        max_frames = g.max_frames(max_audio_length_ms, text)
        clip = self.clip if self.clip and self.clip.speaker == speaker else None
        rows = g.turn_rows(text, speaker, clip)
        g.check_length(self.length(self.n_context) + len(rows))

        def turn_frames():
            self._check_free()
            self.make_room(len(rows), max_frames)
            start, said, self.speaking = self.length(), [], True
            try:
                if self.cache is None:
                    context = [g.context_rows([]), *self.blocks[: self.n_context]]
                    self.cache = g.context_cache(np.concatenate(context)).copy()
                new = np.concatenate([*self.blocks, rows])[self.cache.offset :]
                for codes in g.speak(new, self.cache, max_frames, seed, sampling):
                    said.append(codes)
                    yield codes
                turn = Segment(speaker, text, codes=g.join_frames(said))
                block = np.concatenate([rows, g.audio_rows(turn)])
            except BaseException:  # also when the stream is closed: undo the turn
                if self.cache:
                    self.cache.trim(self.cache.offset - start)
                raise
            finally:
                self.speaking = False
            self.turns.append(turn)
            self.blocks.append(block)
            self.clip = None if clip else self.clip

        return turn_frames()

    def length(self, n=None):
        """Rows of the first n turns, or of all."""
        return sum(map(len, self.blocks[:n]))

    def _check_free(self):
        if self.speaking:
            raise ValueError("a turn is still being said: finish its stream, or close it")

    def make_room(self, n_rows, max_frames):
        """Forget old turns unless prompt and max_frames (at most a quarter of the limit) fit."""
        limit, before = self.generator.max_positions, len(self.turns)
        if self.length() + n_rows + min(max_frames, limit // 4) <= limit:
            return
        # Free half of the positions at once, because each forgetting also drops the cache.
        while len(self.blocks) > self.n_context and self.length() + n_rows > limit // 2:
            del self.blocks[self.n_context], self.turns[self.n_context]
        if forgotten := before - len(self.turns):
            log.warning("%d old turns forgotten: the model has %d positions", forgotten, limit)
            self.cache = None


# ------------------------------------------------------------------------------------------ loading

HERE = Path(__file__).resolve().parent
INSTALLED_TINY = HERE / "csm_tools/tiny"
TINY = INSTALLED_TINY if (INSTALLED_TINY / "config.json").is_file() else HERE / "tiny"


def load(
    model: str | Path = "csm-1b", *, dtype=None, quantize: int | str | None = None,
    group_size: int = 64, adapter=None, codebooks: int | None = None,
) -> Generator:  # fmt: skip
    """Load a model from a local folder or weights file, or from the Hugging Face Hub.

    model: "csm-1b", "tiny" (the small bundled model), a folder, a weights file or a Hub repository,
    in our layout or any other that csm_layouts.py reads. What a folder lacks (Mimi, the tokenizer)
    is downloaded from the defaults.
    dtype: "float32", "bfloat16" or "float16"; None: bfloat16 on a GPU, float32 on a CPU.
    quantize: 4, 6 or 8 bits, in groups of group_size; or "mxfp4", "nvfp4" or "mxfp8".
    adapter: a folder or Hub repository that finetune, PEFT or csm-mlx wrote; or a list of these and
    of (folder, factor).
    codebooks: use only the first so many; fewer are faster and sound worse.

    Raises ValueError.
    """
    path = TINY if model == "tiny" else Path(model)
    source = None if model == "csm-1b" else read_folder(path)  # even if there is such a folder
    source = source or mimi.checkpoints(model).read(model)
    fields, weights, find_mimi, find_tokenizer, voices = source
    del source  # so that each weight is freed once it is cast or quantized
    config, weights = CSMConfig.from_dict(fields), split_heads(weights)
    if adapter or quantize:
        change = mimi.checkpoints("an adapter" if adapter else "quantize").change
        config, weights = change(config, weights, adapter, quantize, group_size)
    dtype = as_dtype(dtype)
    for name, w in weights.items():
        if mx.issubdtype(w.dtype, mx.floating):
            weights[name] = cast(name, w, dtype)
        elif f"{name.rpartition('.')[0]}.scales" not in weights:
            raise ValueError(f"{model} has weights that are no floats: {name} is {w.dtype}")
    network = blank_model(config, weights)
    mimi.load_weights(network, weights)
    del weights  # the network holds them now
    some = [(k, w) for k, w in tree_flatten(network.parameters()) if "norm" in k or "head" in k]
    check_finite(some, model)  # `frames` notices others
    if not adapter and (path / "adapter_config.json").is_file():
        log.warning("%s also has an adapter, which is not applied without --adapter", path)
    return Generator(network, find_mimi(), Tokenizer(find_tokenizer()), voices, fields, codebooks)


def read_folder(folder):
    """A folder in our own layout -> config.json, weights {name: array}, read lazily, functions that
    give the Mimi and the tokenizer's file, and the voices. None if it is anything else.
    """
    config = mimi.read_json(folder / "config.json")
    weights, sound = folder / "model.safetensors", folder / "mimi.safetensors"
    tokenizers = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
    tokenizers = [file for file in tokenizers if file.is_file()]
    files = weights.is_file() and sound.is_file() and tokenizers
    if not files or config.get("layout") != "native":
        return None
    voices = {clip.stem: clip.parent for clip in (folder / "prompts").glob("*.wav")}
    weights, _ = mimi.read_weights(weights)
    return config, weights, lambda: mimi.load(sound), lambda: tokenizers[0], voices


def split_heads(weights):
    """Turn our layout's `audio_head` (K - 1, D, V) into the model's `audio_head.i.weight`."""
    weights = dict(weights)
    if "audio_head" in weights and weights["audio_head"].ndim == 3:
        for i, w in enumerate(weights.pop("audio_head")):
            weights[f"audio_head.{i}.weight"] = mx.contiguous(w.T)
    return weights


def cast(name, w, dtype):
    """w as dtype. A CPU's products read scales of 16 bits as they are, which saves bytes."""
    is_scale = name.endswith((".scales", ".biases")) and "embeddings" not in name
    if is_scale and w.dtype in (mx.bfloat16, mx.float16) and dtype == mx.float32 and not on_gpu():
        return w
    return w.astype(dtype)


def blank_model(config, weights):
    """A CSM of zeros, quantized where `weights` are, ready to be filled with them."""
    model = CSM(config)
    for name, module in model.named_modules():
        if f"{name}.scales" in weights and isinstance(module, (Linear, Embedding)):
            plain, names = module.weight, ("weight", "scales", "biases")
            dict.update(module, {p: weights[w] for p in names if (w := f"{name}.{p}") in weights})
            try:  # lazily, to know the right shapes: given wrong ones, MLX may end the process
                parts = mx.quantize(plain, **packing(module, plain.shape[1]))
            except (ValueError, ArithmeticError, LookupError) as e:
                raise ValueError(f"{name} is not quantized as MLX does it: {e}") from None
            dict.update(module, zip(names, parts))
    return model


def check_finite(weights, path):
    """Raise ValueError if any of [(name, array)] is NaN or infinite somewhere."""
    floats = [(name, w) for name, w in weights if mx.issubdtype(w.dtype, mx.floating)]
    wrong = [name for name, w in floats if not mx.isfinite(w).all()]
    if wrong:
        hint = ": load it as bfloat16" if any(w.dtype == mx.float16 for _, w in floats) else ""
        raise ValueError(f"{path} has NaN or infinite weights: {', '.join(wrong[:4])}{hint}")


def as_dtype(dtype):
    if dtype is None:
        return mx.bfloat16 if on_gpu() else mx.float32
    name = str(dtype).removeprefix("mlx.core.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    return getattr(mx, name)


# ------------------------------------------------------------------------------------------ command


def read_text(argument):
    """A TEXT argument: "-" is standard input, "@file" a file, anything else the text itself."""
    if argument != "-" and not argument.startswith("@"):
        return argument
    try:
        data = sys.stdin.buffer.read() if argument == "-" else Path(argument[1:]).read_bytes()
        return data.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {argument.removeprefix('@')}: {e}") from None


def main(argv=None):
    """The command of csm.py alone; with csm_tools beside it, csm_tools/speak.py has all options."""
    import argparse

    options = "[--model M] [--voice V] [--speaker N] [--temperature T] [--seed S]"
    p = argparse.ArgumentParser(prog="csm.py", usage=f"csm.py TEXT OUT {options}")
    p.error = lambda message: p.exit(2, f"csm.py: error: {message}\n")  # without the usage
    p.add_argument("text", metavar="TEXT", help="what to say; - is standard input, @file a file")
    p.add_argument("out", metavar="OUT", help="a .wav, .flac, .mp3, .ogg or .opus file")
    p.add_argument("--model", default="csm-1b", help="csm-1b, tiny, a folder, a file or a Hub repo")
    p.add_argument("--voice", help="a preset, clip.wav with clip.txt beside it, or none")
    p.add_argument("--speaker", type=int, default=0, help="speaker id of the text (default 0)")
    p.add_argument("--temperature", type=float, help="0 is greedy (default 0.9)")
    p.add_argument("--seed", type=int, help="for the same speech again (default: a random one)")
    if not (sys.argv[1:] if argv is None else argv):
        p.exit(2, p.format_usage())
    args, others = p.parse_known_args(argv)
    if others:
        where = "csm_tools/speak.py, which is not beside csm.py"
        p.error(f"{others[0]} is not an option of csm.py alone: more options are in {where}")
    try:
        with mimi.audio_file(args.out, inputs=[args.voice or ""]) as write:  # before loading
            text, generator = read_text(args.text), load(args.model)
            seed, start = secrets.randbits(32) if args.seed is None else args.seed, time.time()
            options = {"voice": args.voice, "temperature": args.temperature, "seed": seed}
            audio = generator.generate(text, args.speaker, **options)
            write(audio)
        seconds, taken = audio.size / generator.sample_rate, time.time() - start
        print(f"{seconds:.2f} s of audio in {taken:.2f} s, seed {seed}", file=sys.stderr)
    except (ValueError, OSError) as e:
        p.error(" ".join(str(e).split()))
    except KeyboardInterrupt:
        p.exit(130, "interrupted: no file was written\n")
    return 0


if __name__ == "__main__":
    if Path(__file__).resolve().with_name("csm_tools").joinpath("speak.py").is_file():
        sys.modules["csm"] = sys.modules["__main__"]  # csm_tools imports this module, not a copy
        from csm_tools.speak import main
    sys.exit(main())
