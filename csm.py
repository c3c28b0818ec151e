"""CSM, Sesame's Conversational Speech Model, on MLX: text and earlier turns of a conversation in, 24 kHz speech out.

    python csm.py "Hello from Sesame." hello.wav

Sources: Sesame's PyTorch code (github.com/SesameAILabs/csm) and Hugging Face transformers' CsmForConditionalGeneration
(5.23), to which `test_csm.py` holds this file: same logits, same greedy codes, on the same weights.

The way of a sentence:
    "[speaker]text" -> token ids -> rows -> backbone (Llama, KV cache) -> last hidden h -> c0, the frame's first code
    -> depth decoder (a small Llama, 31 steps on [h, c0, c1, ...]) -> c1 .. c31 -> one frame of codes, which goes back
    into the backbone as the next row, and through Mimi as 80 ms of sound. A frame of zeros ends the speech.

A row is one position of the backbone: K audio codes and one text id, with a mask that says which of them count. A text
row has the text id alone, an audio row the K codes; its input is the sum of the embeddings that the mask keeps.

Shapes: B batch, T positions, F frames, K codebooks (32), V audio vocabulary (2051), D hidden size, H heads.
"""

import copy
import hashlib
import json
import logging
import math
import os
import re
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import mimi as codec  # before mlx: it puts a fast BLAS in place on Linux

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np

DEFAULT_MODEL = ("senstella/csm-1b-mlx", "ckpt.safetensors")
DEFAULT_TOKENIZER = "unsloth/Llama-3.2-1B"
DEFAULT_PROMPTS = "mlx-community/csm-1b"
DEFAULT_VOICES = ("conversational_a", "conversational_b", *(f"read_speech_{x}" for x in "abcd"))
NO_TEXT = -1  # in the text column of an audio row; the mask is told from it
# of a Hub repository, whatever its weights are called
BESIDE = ("*.json", "tokenizer.model", "mimi.safetensors", "tokenizer-*.safetensors", "prompts/*")
TWO_STREAMS = 2_000_000  # weights from which a matrix-vector product is worth two CPU streams, and a model compiling
PREFILL = 256  # rows per pass over a prompt: bounds the memory of long ones
CACHE_STEP = 256  # positions by which a KV cache grows

LLAMA3_ROPE = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
}  # fmt: skip

log = logging.getLogger("csm")

# ---------------------------------------------------------------------------------------------------- configuration


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

    def rope_periods(self):
        """(head_dim / 2,) float32: positions per radian of each rotated pair. Llama 3 slows the long waves down."""
        periods = self.rope_theta ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        if s := self.rope_scaling:
            turns = s["original_max_position_embeddings"] / (2 * math.pi * periods)  # over the original context
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: a short wave, kept; 0: a long one, slowed
            periods = periods / (keep + (1 - keep) / s["factor"])
        return mx.array(periods.astype(np.float32))


@dataclass(frozen=True)
class CSMConfig:
    """The sizes of a CSM; the defaults are CSM-1B's. `config.json` of a folder in our layout holds these fields."""

    backbone: LlamaConfig = LlamaConfig(16, 2048, 32, 8, 64, 8192)
    decoder: LlamaConfig = LlamaConfig(4, 1024, 8, 2, 128, 8192)
    text_vocab_size: int = 128_256
    audio_vocab_size: int = 2051  # Mimi's 2048 codes and three ids that are never spoken
    audio_num_codebooks: int = 32
    speaker_prefix_space: bool = False  # "[0] text" in place of "[0]text"
    text_tokenizer: str | None = None  # Hub repository of the tokenizer, where the folder has none
    use_default_voice_prompt: bool = True
    quantization: dict | None = None  # {"group_size", "bits"}

    @classmethod
    def from_dict(cls, d):
        d = {f.name: d[f.name] for f in fields(cls) if d.get(f.name) is not None}
        try:
            return cls(**d | {part: LlamaConfig(**d[part]) for part in ("backbone", "decoder") if part in d})
        except TypeError as e:
            raise ValueError(f"config.json is not one of ours: {e}") from None


# ---------------------------------------------------------------------------------------------------- model


class KVCache:
    """Keys and values of the positions seen so far, one pair of (B, H_kv, capacity, head_dim) arrays a layer.

    The sequences of a batch end together and may differ in length: sequence b has gaps[b] empty positions from `prefix`
    on, which nothing attends to and RoPE does not count.
    """

    def __init__(self, config, batch=1, capacity=None, dtype=mx.float32):
        self.shape = (batch, config.n_kv_heads, capacity or 0, config.head_dim)
        self.dtype, self.limit = dtype, capacity or config.max_positions
        self.keys, self.values = [None] * config.n_layers, [None] * config.n_layers
        self.offset = 0  # positions held
        self.prefix, self.gaps = 0, None

    def update(self, layer, k, v):
        """Put k, v (B, H_kv, T, head_dim) behind what is held; return all held by then. The last layer moves on."""
        end = self.offset + k.shape[2]
        assert end <= self.limit, "KV cache is full"
        for held, new in ((self.keys, k), (self.values, v)):
            if held[layer] is None:
                held[layer] = mx.zeros((k.shape[0], *self.shape[1:]), self.dtype)
            short = end - held[layer].shape[2]
            if short > 0:
                room = -(-short // CACHE_STEP) * CACHE_STEP
                held[layer] = mx.pad(held[layer], [(0, 0), (0, 0), (0, room), (0, 0)])
            held[layer][:, :, self.offset : end] = new
        if layer == len(self.keys) - 1:
            self.offset = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def positions(self):
        """What RoPE counts from: an int, or (B,) where the sequences differ in length."""
        return self.offset if self.gaps is None else self.offset - self.gaps

    def mask(self, T):
        """What T new positions may attend to, as mx.fast.scaled_dot_product_attention takes it."""
        if self.gaps is None:
            return "causal" if T > 1 else None
        s, t = mx.arange(self.offset + T), self.offset + mx.arange(T)[:, None]
        empty = (s >= self.prefix) & (s < self.prefix + self.gaps[:, None, None])  # (B, 1, S)
        return ((s <= t) & (~empty | (s == t)))[:, None]  # itself at least: a softmax over nothing is NaN

    def trim(self, n):
        """Forget the last n positions."""
        self.offset -= max(0, min(n, self.offset))

    def copy(self):
        """A cache that goes on from here by itself."""
        other = copy.copy(self)
        # New arrays, of the same memory until one of them is written to: `x[...] = y` changes x for all who hold it.
        other.keys, other.values = ([x if x is None else x[:] for x in xs] for xs in (self.keys, self.values))
        return other

    def take(self, sequences):
        """Go on with these sequences of the batch alone, (b,) indices; an index may occur more than once."""
        self.keys, self.values = ([x if x is None else x[sequences] for x in xs] for xs in (self.keys, self.values))
        if self.gaps is not None:
            self.gaps = self.gaps[sequences]


class Linear(nn.Module):
    """(..., in) -> (..., out). weight (out, in), plain; or quantized, with `scales` and `biases` beside it."""

    second_stream = mx.new_thread_local_stream(mx.cpu)

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = mx.zeros((n_out, n_in))  # not nn.Linear, which draws from the global random generator

    def __call__(self, x):
        w, n = self.weight, x.shape[-1]
        if "scales" in self:  # whose shapes tell how it was packed
            packing = {"group_size": n // self.scales.shape[-1], "bits": 32 * w.shape[-1] // n}
            return mx.quantized_matmul(x, w, self.scales, self.biases, transpose=True, **packing)
        if x.size == n and w.size >= TWO_STREAMS and mx.default_device() == mx.cpu and codec.mkl_on_amd():
            half = len(w) // 2
            return mx.concatenate([x @ w[:half].T, mx.matmul(x, w[half:].T, stream=self.second_stream)], axis=-1)
        rows = x.size // n
        if rows > 1 and mx.default_device() == mx.cpu:  # BLAS is up to twice as fast this way round
            return (w @ x.reshape(rows, n).T).T.reshape(*x.shape[:-1], len(w))
        return x @ w.T


class Embedding(nn.Module):
    """weight (n, dim), plain or quantized."""

    def __init__(self, n, dim):
        super().__init__()
        self.dim = dim
        self.weight = mx.zeros((n, dim))

    def __call__(self, ids):
        if "scales" not in self:
            return self.weight[ids]
        w, s, b = self.weight[ids], self.scales[ids], self.biases[ids]
        return mx.dequantize(w, s, b, group_size=self.dim // s.shape[-1], bits=32 * w.shape[-1] // self.dim)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, c.n_heads, c.n_kv_heads, c.head_dim
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim)

    def __call__(self, x, B, turn, mask, cache):
        q = self.q_proj(x).reshape(B, -1, self.n_heads, self.head_dim).transpose(0, 2, 1, 3)  # (B, H, T, head_dim)
        k = self.k_proj(x).reshape(B, -1, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(B, -1, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        q, k = turn(q), turn(k)
        if cache:
            k, v = cache.update(self.layer, k, v)
        return self.o_proj(codec.attend(q, k, v, mask).transpose(0, 2, 1, 3).reshape(len(x), -1))


@mx.custom_function
def large_silu(x):  # on a CPU
    return x / (1 + codec.exp(-x))


@large_silu.vjp
def large_silu_vjp(x, cotangent, y):
    gate = 1 / (1 + codec.exp(-x))
    return cotangent * (gate + y * (1 - gate))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.dim, c.ffn_dim)
        self.up_proj = Linear(c.dim, c.ffn_dim)
        self.down_proj = Linear(c.ffn_dim, c.dim)

    def __call__(self, x):
        gate = self.gate_proj(x)
        silu = nn.silu if codec.vectorized(gate.size) else large_silu
        return self.down_proj(silu(gate) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x, *rest):
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The Llama-3 stack without embedding and head: (B, T, D) -> (B, T, D), causal."""

    def __init__(self, c):
        super().__init__()
        self.layers = [Layer(c, i) for i in range(c.n_layers)]
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self._periods = c.rope_periods()  # underscored: not a parameter
        mx.eval(self._periods)  # so that other threads may use it

    def __call__(self, x, cache=None):
        B, T, D = x.shape
        mask = cache.mask(T) if cache else "causal" if T > 1 else None
        # Interleaved pairs, as Sesame has them (transformers rotates halves, with the rows of q and k permuted).
        turn = codec.rope(self._periods, cache.positions() if cache else 0, T)
        x = x.reshape(B * T, D)  # products of matrices alone: fewer steps
        for layer in self.layers:
            x = layer(x, B, turn, mask, cache)
        return self.norm(x).reshape(B, T, D)


def row_mask(rows):
    """Which columns of rows (..., K + 1) count: the last of a text row, the others of an audio row."""
    return (rows[..., -1:] != NO_TEXT) == (mx.arange(rows.shape[-1]) == rows.shape[-1] - 1)


class CSM(nn.Module):
    """Backbone and depth decoder. Parameters are named as in senstella/csm-1b-mlx, our own layout."""

    def __init__(self, config: CSMConfig = CSMConfig()):
        super().__init__()
        self.config = c = config
        D, K, V = c.backbone.dim, c.audio_num_codebooks, c.audio_vocab_size
        self.backbone = Llama(c.backbone)
        self.decoder = Llama(c.decoder)
        self.text_embeddings = Embedding(c.text_vocab_size, D)
        self.audio_embeddings = Embedding(V * K, D)  # code i of codebook k is row i + V * k
        self._offsets = V * mx.arange(K)  # an array: each number by itself would be a kernel to compile
        mx.eval(self._offsets)
        self.projection = Linear(D, c.decoder.dim)
        self.codebook0_head = Linear(D, V)
        self.audio_head = [Linear(c.decoder.dim, V) for _ in range(K - 1)]

    @property
    def dtype(self):
        return self.backbone.norm.weight.dtype

    def embed(self, rows, mask):
        """rows (B, T, K + 1) int, mask alike bool -> (B, T, D), the sum of the embeddings kept."""
        K = self.config.audio_num_codebooks
        audio = self.audio_embeddings(rows[..., :K] + self._offsets)  # (B, T, K, D)
        text = self.text_embeddings(rows[..., K:])  # (B, T, 1, D)
        return (mx.concatenate([audio, text], axis=-2) * mask[..., None]).sum(axis=-2)

    def __call__(self, rows, mask, cache=None):
        """rows, mask (B, T, K + 1) -> hidden states (B, T, D) of the backbone."""
        return self.backbone(self.embed(rows, mask), cache)

    def head(self, i, h):
        """Logits (..., V) of codebook i from h: the backbone's hidden state for i = 0, else the depth decoder's."""
        return self.codebook0_head(h) if i == 0 else self.audio_head[i - 1](h)

    def embed_code(self, i, codes):
        """Codes (...) of codebook i -> (..., D)."""
        return self.audio_embeddings(codes + self._offsets[i])

    def depth_logits(self, h, codes):
        """Teacher-forced: h (N, D) hidden states, codes (N, K) of their frames -> logits (N, K - 1, V) of codes 1.."""
        K = self.config.audio_num_codebooks
        x = self.embed_code(mx.arange(K - 1), codes[:, :-1])
        y = self.decoder(self.projection(mx.concatenate([h[:, None], x], axis=1)))[:, 1:]
        return mx.stack([self.head(i, y[:, i - 1]) for i in range(1, K)], axis=1)

    def sample_rest(self, h, first, sample):
        """The depth decoder: h (B, D), the backbone's last, and codebook 0's codes (B,) -> the others (B, K - 1) int32.

        sample(i, logits (B, V)) -> ids (B,) is asked for each codebook i in turn.
        """
        K = self.config.audio_num_codebooks
        cache = KVCache(self.config.decoder, h.shape[0], K, self.dtype)  # a fresh one every frame
        codes, x = [], mx.stack([h, self.embed_code(0, first)], axis=1)  # (B, 2, D)
        for i in range(1, K):
            y = self.decoder(self.projection(x), cache)[:, -1]
            codes.append(sample(i, self.head(i, y)))
            x = self.embed_code(i, codes[-1])[:, None]
        return mx.stack(codes, axis=1).astype(mx.int32)


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits. The filters act on the untempered probabilities, in mlx-lm's order."""

    temperature: float = 0.9  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # relative to the likeliest; 0: off
    min_tokens_to_keep: int = 1  # that min_p spares
    sampler: Callable | None = None  # log-probabilities (B, V) -> ids (B,), in place of all the above
    logits_processors: tuple = ()  # of codebook 0: (ids so far (F,), logits (1, V)) -> logits

    def __post_init__(self):
        for name, good, range in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", (self.top_k or 0) >= 0, "0 (off) or more"),
            ("top_p", 0 <= self.top_p <= 1, "in 0..1"),
            ("min_p", 0 <= self.min_p <= 1, "in 0..1"),
            ("min_tokens_to_keep", self.min_tokens_to_keep >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"{name} must be {range}, not {getattr(self, name)}")

    def __call__(self, logits, key):
        """logits (B, V), -inf where forbidden -> ids (B,). key: one for all (2,), or one for each (B, 2)."""
        logits = logits.astype(mx.float32)
        if self.sampler is not None:
            return self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if self.temperature < 1e-6:  # dividing by less overflows
            return mx.argmax(logits, axis=-1)
        V = logits.shape[-1]
        k = min(self.top_k or V, V)
        nucleus = 0 < self.top_p < 1
        if k == V and not nucleus and not self.min_p:
            return draw(logits / self.temperature, key)
        # Each filter keeps a prefix of the ids in falling order, so together they keep the shortest.
        order = mx.argpartition(-logits, k - 1, axis=-1)[:, :k]  # sorting all of them is slow
        falling = mx.argsort(-mx.take_along_axis(logits, order, axis=-1), axis=-1)
        order = mx.take_along_axis(order, falling, axis=-1)
        kept = mx.take_along_axis(logits, order, axis=-1)
        if nucleus or self.min_p:
            logp, keep = kept - mx.logsumexp(logits, axis=-1, keepdims=True), mx.arange(k) >= 0
            if nucleus:  # as long as the likelier ones do not fill top_p already
                keep &= mx.cumsum(mx.exp(logp), axis=-1, inclusive=False) < self.top_p
            if self.min_p:
                keep &= (logp >= logp[:, :1] + math.log(self.min_p)) | (mx.arange(k) < self.min_tokens_to_keep)
            kept = mx.where(keep, logp, -mx.inf)
        choice = draw(kept / self.temperature, key)
        return mx.take_along_axis(order, choice[:, None], axis=-1)[:, 0]


def check_seed(seed):
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0..2^64 - 1, not {seed}")


def draw(logits, key):
    """Ids (B,) at random from logits (B, V), by one key for all or, so that a batch changes nothing, one for each."""
    if key.ndim == 1:
        return mx.random.categorical(logits, key=key)
    return mx.vmap(lambda row, k: mx.random.categorical(row, key=k))(logits, key)


# ---------------------------------------------------------------------------------------------------- prompt


@dataclass(eq=False)  # arrays have no one truth value
class Segment:
    """A finished turn of a conversation: who said what, and how it sounded.

    audio: (samples,) at 24 kHz, or the path of an audio file of any rate and channels. codes: (F, K), which generation
    gives; with codes the audio is not encoded again, and may be None.
    """

    speaker: int
    text: str
    audio: mx.array | np.ndarray | str | os.PathLike | None = None
    codes: mx.array | np.ndarray | None = None


class Tokenizer:
    """Text -> ids, from `tokenizer.json` (by `tokenizers`) or `tokenizer.model` (by `sentencepiece`)."""

    NAMES = {"bos_token": ("<|begin_of_text|>", "<bos>", "<s>"), "eos_token": ("<|end_of_text|>", "<eos>", "</s>")}

    def __init__(self, path):
        try:
            if Path(path).suffix == ".json":
                import tokenizers

                t = tokenizers.Tokenizer.from_file(str(path))
                t.encode_special_tokens = True  # "<|end_of_text|>" in a user's text is text
                self._encode = lambda text: t.encode(text, add_special_tokens=False).ids
                given = codec.read_json(Path(path).with_name("tokenizer_config.json"))
                self.bos, self.eos = (self._special(t, given.get(kind), kind) for kind in self.NAMES)
            else:
                import sentencepiece

                t = sentencepiece.SentencePieceProcessor(model_file=str(path))
                self._encode = t.encode
                self.bos, self.eos = (i if i >= 0 else None for i in (t.bos_id(), t.eos_id()))
        except Exception as e:  # both libraries raise bare Exceptions
            raise ValueError(f"{path} is not a tokenizer: {e}") from None

    def _special(self, t, given, kind):
        """The id of a special token: of the name that tokenizer_config.json gives, else of a usual one, else None."""
        names = [given["content"] if isinstance(given, dict) else given or "", *self.NAMES[kind]]
        return next((i for i in map(t.token_to_id, names) if i is not None), None)

    def encode(self, text):
        """text -> [bos, ..., eos]: CSM's template has both, once each."""
        return [i for i in (self.bos, *self._encode(text), self.eos) if i is not None]


def as_samples(audio):
    """Any form of Segment.audio -> (samples,) float32, checked."""
    if isinstance(audio, (str, os.PathLike)):
        return codec.read_audio(audio)
    if isinstance(audio, mx.array) and audio.dtype == mx.bfloat16:  # which NumPy lacks
        audio = audio.astype(mx.float32)
    audio = np.array(audio)
    if np.issubdtype(audio.dtype, np.integer):
        audio = audio / (np.iinfo(audio.dtype).max + 1)
    if audio.ndim == 2:  # (channels, samples) or (samples, channels)
        audio = audio.mean(axis=int(np.argmin(audio.shape)))
    if audio.ndim != 1 or not audio.size:
        raise ValueError(f"audio must be (samples,), not {audio.shape}")
    if not np.isfinite(audio).all():
        raise ValueError("the audio contains NaN or infinite samples")
    return audio.astype(np.float32)


# ---------------------------------------------------------------------------------------------------- generation


class Generator:
    """A loaded model: network, codec, tokenizer and voices. It never changes, so threads may share it.

    The arguments that generate, stream, generate_codes and Conversation.say share:
      text, speaker (0, 1, ...; the voice comes from the context, and a turn of the same speaker shares its voice)
      context: Segments said before; voice: a preset's name, used when there is no context ("none": no voice;
      None: the model's default); voice_match: continue the speaker's last clip in `context` in place of answering it
      max_audio_length_ms, and the fields of Sampling; seed: None draws one, and logs it on the logger "csm".
    All raise ValueError for what is wrong in them, and for a prompt beyond the model's positions.
    """

    def __init__(self, model, mimi, tokenizer, voices=None):
        self.model, self.mimi, self.tokenizer = model, mimi, tokenizer
        n_ids = mx.arange(model.config.audio_vocab_size)
        self._forbidden = mx.where(n_ids < mimi.config.codebook_size, 0, -mx.inf)  # ids that Mimi lacks
        mx.eval(self._forbidden)
        self.codec_stream = mx.new_thread_local_stream(mx.default_device())
        self._compiled = {}  # Sampling -> the depth decoder's loop
        self._held = None  # rows and KV cache of the context that was computed last
        self._prompts = {}  # the presets asked for so far, as Segments with codes
        self.voices = voices or {}  # name -> folder of its .wav and .txt; None: on the Hub
        self.sample_rate = mimi.sample_rate
        self.limit = model.config.backbone.max_positions  # positions that the model has
        if mimi.n_codebooks < model.config.audio_num_codebooks:
            raise ValueError(
                f"the model writes {model.config.audio_num_codebooks} codebooks, its Mimi has {mimi.n_codebooks}"
            )

    def conversation(self, context=(), *, voice=None):
        """A Conversation that starts with `context`, or without one with a preset voice for whoever speaks first."""
        context = list(context)
        return Conversation(self, context, [] if context else self.voice_prompt(voice))

    def stream(
        self, text, speaker=0, context=(), *, voice=None, voice_match=False, streaming_interval=0.5, **options
    ) -> Iterator[mx.array]:
        """Speech for `text` in pieces of `streaming_interval` seconds, (samples,) float32 each; joined, `generate`."""
        conversation, opening = self._open(speaker, context, voice, voice_match)
        return conversation.stream(text, speaker, streaming_interval=streaming_interval, opening=opening, **options)

    def generate(self, text, speaker=0, context=(), **options) -> mx.array:
        """Speech for `text`: (samples,) float32 at `sample_rate`; empty if the model ends at once."""
        return join(self.stream(text, speaker, context, streaming_interval=2.0, **options))

    def generate_codes(self, text, speaker=0, context=(), *, voice=None, voice_match=False, **options) -> mx.array:
        """The codes of the speech: (F, K) int32."""
        conversation, opening = self._open(speaker, context, voice, voice_match)
        for _ in conversation.frames(text, speaker, opening=opening, **options):
            pass
        return conversation.turns[-1].codes

    def generate_batch(
        self, texts, speaker=0, context=(), *, voice=None, voice_match=False, max_audio_length_ms=90_000, seed=None,
        **sampling,
    ) -> list[mx.array]:  # fmt: skip
        """Speech for each of `texts`, computed together: [(samples,) float32].

        speaker, max_audio_length_ms: one for all, or a list of one for each. context: Segments for all, or a list of a
        list for each. Text i sounds as `generate` with seed + i makes it.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, not one")
        texts, context = list(texts), list(context)
        own = bool(context) and not isinstance(context[0], Segment)
        try:
            speakers = [speaker] * len(texts) if isinstance(speaker, (int, np.integer)) else list(speaker)
            lengths = max_audio_length_ms
            lengths = [lengths] * len(texts) if isinstance(lengths, (int, float, np.number)) else list(lengths)
            contexts = [list(c) for c in context] if own else [context] * len(texts)
        except TypeError as e:
            raise ValueError(f"speaker, context or max_audio_length_ms: {e}") from None
        if not len(speakers) == len(lengths) == len(contexts) == len(texts):
            raise ValueError(f"{len(texts)} texts need as many speakers, contexts and lengths, or one for all")
        if not all(isinstance(s, Segment) for c in contexts for s in c):
            raise ValueError("a context is a list of Segments")
        if not texts:
            return []
        max_frames, (seed, sampling) = [self._max_frames(ms) for ms in lengths], self._options(seed, sampling)
        encoded = {id(s): s for c in contexts for s in c}
        encoded = {i: self.encode(s) for i, s in encoded.items()}  # each once
        prompts, n_context = [], []
        for text, speaker, context in zip(texts, speakers, contexts):
            conversation, opening = self._open(speaker, [encoded[id(s)] for s in context], voice, voice_match)
            rows = conversation.prompt(text, speaker, opening)
            prompts.append(np.concatenate([*conversation.blocks, rows]))
            n_context.append(len(prompts[-1]) - len(rows))
        shortest = min(n_context)
        same = np.array([p[:shortest] == prompts[0][:shortest] for p in prompts]).all(axis=(0, 2))
        n_shared = shortest if same.all() else int(np.argmin(same))
        codes = [[] for _ in texts]
        cache = KVCache(self.model.config.backbone, 1, dtype=self.model.dtype)
        seeds = [seed + i for i in range(len(texts))]
        for live, frame in self.frames(prompts, cache, max_frames, seeds, sampling, n_shared):
            for i, row in zip(live, frame):
                codes[i].append(row)
        return [self.decode(mx.stack(c) if c else mx.zeros((0, 1), mx.int32)) for c in codes]

    def decode(self, codes) -> mx.array:
        """Codes (F, K) -> (samples,) float32, in bounded memory."""
        return join([self.mimi.decode(codes.T[None])[0, 0]])

    def encode(self, segment):
        """The Segment with its codes."""
        if segment.codes is not None:
            return segment
        return replace(segment, codes=self.audio_rows(segment, end=False)[:, :-1])

    def _max_frames(self, max_audio_length_ms):
        frame_ms = 1000 / self.mimi.config.frame_rate
        if not frame_ms <= max_audio_length_ms < math.inf:
            raise ValueError(f"max_audio_length_ms must be {frame_ms:g} or more, one frame, not {max_audio_length_ms}")
        return int(max_audio_length_ms / frame_ms)

    def _options(self, seed, sampling):
        """The seed, drawn if it is None, and the Sampling; checked."""
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        check_seed(seed)
        processors = tuple(sampling.get("logits_processors") or ())
        return int(seed), Sampling(**sampling | {"logits_processors": processors})

    def frames(self, prompts, cache, max_frames, seeds, sampling, n_shared=0):
        """Speak after each of `prompts` [(T, K + 1)] until all have ended: yields (live, codes) for every frame, the
        indices of those that still speak and their codes (b, K).

        cache: of batch 1, of rows that all prompts begin with; left holding what was said, for one prompt. n_shared:
        rows of context that all begin with. max_frames, seeds: of each prompt. The next frame is under way before this
        one is looked at, so that the device never waits.
        """
        config, n_codes = self.model.config, self.mimi.config.codebook_size
        K, V = config.audio_num_codebooks, config.audio_vocab_size
        rest = self._depth(sampling)
        live, limits = list(range(len(prompts))), [min(n, self.limit - len(p)) for n, p in zip(max_frames, prompts)]
        keys = mx.stack([mx.random.key(seed % 2**64) for seed in seeds])
        split = mx.vmap(lambda key: mx.random.split(key, K + 1))
        h = self._prefill(prompts, cache, n_shared)
        said, n, before = mx.zeros((len(live), 0), mx.int32), 0, None
        while True:
            if n < max(limits[i] for i in live):
                codec.use_threads(for_small=len(live) == 1)
                now = split(keys)  # (b, K + 1, 2)
                keys = now[:, K]
                logits = self.model.head(0, h).astype(mx.float32)
                for process in sampling.logits_processors:
                    logits = mx.concatenate([process(said[i], logits[i : i + 1]) for i in range(len(live))])
                first = sampling(logits + self._forbidden, now[:, 0]).astype(mx.int32)
                codes = mx.concatenate([first[:, None], rest(h, first, now)], axis=1)
                if sampling.logits_processors:
                    said = mx.concatenate([said, first[:, None]], axis=1)
                if n + 1 < max(limits[i] for i in live):
                    row = mx.pad(mx.clip(codes, 0, V - 1), [(0, 0), (0, 1)], constant_values=NO_TEXT)
                    h = self._step(row[:, None], cache)
                mx.async_eval(codes, h, keys, said)
            if before is not None:
                ids = np.array(before)
                if (wrong := ids[(ids < 0) | (ids >= n_codes)]).size:
                    raise ValueError(f"the sampler gave {wrong[0]}, and Mimi has {n_codes} codes")
                speaking = np.flatnonzero(ids.any(axis=1)).tolist()
                if len(speaking):
                    yield [live[i] for i in speaking], before[mx.array(speaking)]
                for i in speaking:
                    if n == limits[live[i]] == self.limit - len(prompts[live[i]]):
                        log.warning("the speech was cut off at the model's %d positions", self.limit)
                stay = [i for i in speaking if n < limits[live[i]]]
                if not stay:
                    return codec.use_threads(for_small=False)
                if len(stay) < len(live):
                    live, stay = [live[i] for i in stay], mx.array(stay)
                    codes, h, keys, said = (x[stay] for x in (codes, h, keys, said))
                    cache.take(stay)
            before, n = codes, n + 1

    def _depth(self, sampling):
        """CSM.sample_rest as a function of arrays, h (B, D), first (B,), keys (B, K + 1, 2) -> (B, K - 1).

        Compiled, it has fewer of its thousands of small operations, and C++ builds them. The weights are inputs, and so
        may change.
        """

        def rest(h, first, keys):
            def sample(i, logits):
                return sampling(logits.astype(mx.float32) + self._forbidden, keys[:, i])

            return self.model.sample_rest(h, first, sample)

        if not compiles(self.model) or sampling.sampler is not None:
            return rest
        sampling = replace(sampling, logits_processors=())  # which are for the first codebook
        if sampling not in self._compiled and len(self._compiled) > 7:
            self._compiled.clear()  # each holds a trace for every size of batch
        return self._compiled.setdefault(sampling, mx.compile(rest, inputs=self.model.state))

    def _prefill(self, prompts, cache, n_shared=0):
        """Rows of the prompts (T, K + 1) that the cache lacks through the backbone; returns the last hidden (B, D).

        The first n_shared, which are alike, go through once for all, and are held for the next call with the same.
        """
        if n_shared > cache.offset:
            shared, held = prompts[0][:n_shared], self._held
            if cache.offset == 0 and held is not None and np.array_equal(held[0], shared):
                vars(cache).update(vars(held[1].copy()))
            else:
                self._prefill([shared], cache)
                self._held = shared, cache.copy()
        if len(prompts) > 1:
            cache.take(mx.zeros((len(prompts),), mx.int32))
            gaps = max(map(len, prompts)) - np.array(list(map(len, prompts)))
            if gaps.any():
                cache.prefix, cache.gaps = cache.offset, mx.array(gaps, mx.int32)
                cache.limit += int(gaps.max())  # which count for nobody's positions
        codec.use_threads(for_small=False)
        T, n = max(map(len, prompts)), cache.offset
        rows = np.stack([np.pad(p[n:], [(T - len(p), 0), (0, 0)], constant_values=NO_TEXT) for p in prompts])
        for i in range(0, rows.shape[1], PREFILL):
            h = self._step(mx.array(rows[:, i : i + PREFILL]), cache)
            mx.eval(h, cache.keys, cache.values)
        return h

    def _step(self, rows, cache):
        """rows (B, T, K + 1) through the backbone -> the last hidden state (B, D)."""
        return self.model(mx.maximum(rows, 0), row_mask(rows), cache)[:, -1]

    def _open(self, speaker, context, voice, voice_match):
        """A Conversation, and the Segment that the new turn continues, if any."""
        if not voice_match:
            return self.conversation(context, voice=voice), None
        context = list(context) or [replace(s, speaker=speaker) for s in self.voice_prompt(voice)]
        mine = [i for i, s in enumerate(context) if s.speaker == speaker]
        if not mine:
            raise ValueError(f"voice_match continues a clip of speaker {speaker}, and the context has none")
        clip = context.pop(mine[-1])
        return Conversation(self, context), clip

    def voice_prompt(self, voice=None):
        """The preset `voice` as a list of one Segment, or [] for none."""
        if voice == "none" or (voice is None and not (self.voices and self.model.config.use_default_voice_prompt)):
            return []
        name = voice or ("conversational_a" if "conversational_a" in self.voices else min(self.voices))
        if name not in self.voices:
            known = ", ".join(sorted(self.voices)) or "none at all"
            raise ValueError(f"unknown voice {name!r}; this model has: {known}")
        if name not in self._prompts:
            folder, files = self.voices[name], (f"{name}.wav", f"{name}.txt")
            try:
                wav, txt = (folder / f if folder else codec.download(DEFAULT_PROMPTS, f"prompts/{f}") for f in files)
                text = txt.read_text(encoding="utf-8").strip()
                self._prompts[name] = Segment(0, text, wav, self._kept_codes(wav))
            except FileNotFoundError as e:
                raise ValueError(f"voice {name} has no clip or no transcript: {e}") from None
        return [self._prompts[name]]

    def _kept_codes(self, wav):
        """The codes (F, K) of a preset's clip, from a file beside it if that was made of the same clip by this Mimi."""
        kept = wav.with_suffix(".npz")
        mark = hashlib.sha256(wav.read_bytes() + np.array(self.mimi.first.norms).tobytes()).hexdigest()
        with suppress(Exception), np.load(kept) as file:  # absent, or something else
            if file["mark"] == mark:
                return file["codes"]
        codes = self.encode(Segment(0, "", wav)).codes
        with suppress(OSError, ValueError), codec.replacing(kept) as part:  # the folder may be read-only
            np.savez(part, codes=codes, mark=mark)
        return codes

    def text_rows(self, text, speaker):
        """(T, K + 1) int32 for one turn's text."""
        if not isinstance(speaker, (int, np.integer)) or speaker < 0:
            raise ValueError(f"speaker must be 0 or more, not {speaker!r}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the text is empty" if isinstance(text, str) else f"text must be a str, not {text!r}")
        c = self.model.config
        ids = self.tokenizer.encode(f"[{speaker}]{' ' if c.speaker_prefix_space else ''}{text}")
        if max(ids) >= c.text_vocab_size:
            raise ValueError(f"the tokenizer gives id {max(ids)}, and the model knows {c.text_vocab_size}: not a pair")
        rows = np.zeros((len(ids), c.audio_num_codebooks + 1), np.int32)
        rows[:, -1] = ids
        return rows

    def audio_rows(self, segment, end=True):
        """(F + 1, K + 1) int32 for one turn's audio: its frames and, if `end`, the frame of zeros that ends it.

        The text column holds NO_TEXT.
        """
        K, V = self.model.config.audio_num_codebooks, self.model.config.audio_vocab_size
        codes = segment.codes
        if codes is None:
            if segment.audio is None:
                raise ValueError(f"a turn of the context has a text but no audio: {segment.text[:40]!r}")
            codes = self.mimi.encode(mx.array(as_samples(segment.audio))[None, None])[0, :K].T
        codes = np.array(codes)
        if codes.ndim != 2 or codes.shape[1] != K:
            raise ValueError(f"codes must be (frames, {K}), not {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < V:
            raise ValueError(f"codes must lie in 0..{V - 1}")
        rows = np.pad(codes.astype(np.int32), [(0, int(end)), (0, 1)])
        rows[:, K] = NO_TEXT
        return rows

    def segment_rows(self, segment):
        """(T, K + 1) int32 for a finished turn: its text, then its audio."""
        return np.concatenate([self.text_rows(segment.text, segment.speaker), self.audio_rows(segment)])


class Conversation:
    """Turns said so far and their KV cache, so that a new turn costs the backbone its own rows alone.

    Past the model's positions it forgets the oldest turns that came after its context, and warns on the logger "csm".
    A turn whose stream is abandoned, or fails, is not part of the conversation.
    """

    def __init__(self, generator, context=(), voice=()):
        self.generator, self.model = generator, generator.model
        self.voice = list(voice)  # Segments to put first, in the voice of whoever speaks first
        self.turns = list(context)  # Segments
        self.blocks = [generator.segment_rows(s) for s in self.turns]  # the rows of each turn
        self.n_kept = len(self.blocks)  # the context, or the voice prompt, is never forgotten
        self.limit = generator.limit
        self.cache = KVCache(self.model.config.backbone, dtype=self.model.dtype)
        self.prefilled = 0  # rows that went through the backbone as prompt, in all
        self.busy = False

    def say(self, text, speaker=0, **options) -> mx.array:
        """Say the next turn: (samples,) float32. Options: see Generator."""
        return join(self.stream(text, speaker, streaming_interval=2.0, **options))

    def stream(self, text, speaker=0, *, streaming_interval=0.5, **options) -> Iterator[mx.array]:
        """Say the next turn in pieces of `streaming_interval` seconds: (samples,) float32 each."""
        mimi = self.generator.mimi
        if not 0 < streaming_interval < math.inf:
            raise ValueError(f"streaming_interval must be above 0 seconds, not {streaming_interval}")
        size = max(1, round(streaming_interval * mimi.config.frame_rate))
        frames = self.frames(text, speaker, **options)

        def pieces():
            state, interrupt, more = mimi.init_state(1), None, True
            try:
                while more:
                    waiting = []
                    try:
                        waiting.extend(islice(frames, size))
                    except KeyboardInterrupt as e:  # what is finished is handed out before it goes on
                        interrupt = e
                    more = len(waiting) == size and not interrupt
                    if waiting:
                        with mx.stream(self.generator.codec_stream):  # beside the next frame, not behind it
                            audio, state = mimi.decode_step(mx.stack(waiting, axis=2), state)
                            piece = audio[0, 0]
                            mx.async_eval(piece)
                        codec.use_threads(for_small=more)  # the next frame's again, not the codec's
                        yield piece
            finally:
                frames.close()
                codec.use_threads(for_small=False)
            if interrupt:
                raise interrupt

        return pieces()

    def hear(self, segment):
        """Add a turn that somebody else spoke."""
        self._check_free()
        rows = self.generator.segment_rows(segment)
        self._check_length(len(rows))
        self.blocks.append(rows)
        self.turns.append(segment)

    def prompt(self, text, speaker=0, opening=None):
        """The rows (T, K + 1) of the next turn before its speech; `blocks` go before them. ValueError: too many."""
        rows = self.generator.text_rows(text if opening is None else f"{opening.text} {text}", speaker)
        if opening is not None:
            rows = np.concatenate([rows, self.generator.audio_rows(opening, end=False)])
        voice = [replace(s, speaker=speaker) for s in self.voice]
        blocks = [self.generator.segment_rows(s) for s in voice]
        self._check_length(sum(map(len, blocks)) + len(rows))
        self.turns, self.blocks, self.voice = voice + self.turns, blocks + self.blocks, []
        self.n_kept += len(voice)
        return rows

    def frames(self, text, speaker=0, *, opening=None, max_audio_length_ms=90_000, seed=None, **sampling):
        """Say the next turn as frames of codes, (1, K) int32 each. Arguments are checked at once, not at the first."""
        options = self.generator._max_frames(max_audio_length_ms), *self.generator._options(seed, sampling)
        return self._frames(Segment(speaker, text), self.prompt(text, speaker, opening), *options)

    def _check_free(self):
        if self.busy:
            raise ValueError("a turn is still being said: finish its stream, or close it")

    def _check_length(self, n_rows):
        n = sum(map(len, self.blocks[: self.n_kept])) + n_rows
        if n >= self.limit:
            raise ValueError(f"the prompt takes {n} positions, and the model has {self.limit}: shorten context or text")

    def _frames(self, turn, rows, max_frames, seed, sampling):
        self._check_free()
        self._make_room(len(rows), max_frames)
        prompt, start, said, self.busy = np.concatenate([*self.blocks, rows]), self.cache.offset, [], True
        try:
            self.prefilled += len(prompt) - start
            n_context = sum(map(len, self.blocks[: self.n_kept]))
            for _, codes in self.generator.frames([prompt], self.cache, [max_frames], [seed], sampling, n_context):
                said.append(codes)
                yield codes
            turn.codes = mx.concatenate(said) if said else mx.zeros((0, prompt.shape[1] - 1), mx.int32)
            mx.eval(turn.codes)
            block = np.concatenate([rows, self.generator.audio_rows(turn)])
        except BaseException:  # also GeneratorExit: the stream was closed
            self.cache.trim(self.cache.offset - start)
            raise
        finally:
            self.busy = False
        self.cache.trim(self.cache.offset - len(prompt) - len(said) - 1)  # the frame of zeros stays, what followed goes
        self.blocks.append(block)
        self.turns.append(turn)

    def _make_room(self, n_rows, max_frames):
        """Forget old turns until the prompt leaves room for the speech, or at least for a quarter of the positions."""
        n, need = len(self.blocks), n_rows + min(max_frames, self.limit // 4)
        while len(self.blocks) > self.n_kept and sum(map(len, self.blocks)) + need > self.limit:
            del self.blocks[self.n_kept], self.turns[self.n_kept]
        if n > len(self.blocks):
            log.warning("%d old turns forgotten: the model has %d positions", n - len(self.blocks), self.limit)
            self.cache.trim(self.cache.offset - sum(map(len, self.blocks[: self.n_kept])))


def compiles(model):
    """Whether mx.compile pays. On a CPU it takes 10 s once, by the C++ compiler, and saves a tenth of a large frame.

    Without a compiler it leaves functions as they are.
    """
    return mx.default_device() == mx.gpu or model.config.backbone.dim * model.config.decoder.dim >= TWO_STREAMS


def join(pieces):
    pieces = list(pieces)
    whole = mx.concatenate(pieces) if pieces else mx.zeros((0,))
    mx.eval(whole)
    return whole


# ---------------------------------------------------------------------------------------------------- loading


def split_heads(weights):
    """Our layout's one `audio_head` (K - 1, D, V) as the model's matrices, `audio_head.i.weight` (V, D)."""
    if "audio_head" not in weights or weights["audio_head"].ndim != 3:
        return weights
    heads = {f"audio_head.{i}.weight": mx.contiguous(w.T) for i, w in enumerate(weights["audio_head"])}
    return {k: w for k, w in weights.items() if k != "audio_head"} | heads


def join_heads(weights):
    """The other way: `audio_head.i.weight` as one `audio_head`."""
    names = sorted((k for k in weights if k.startswith("audio_head.")), key=lambda k: int(k.split(".")[1]))
    others = {k: w for k, w in weights.items() if k not in names}
    return others | {"audio_head": mx.stack([weights[k].T for k in names])}


def quantize_weights(weights, bits=4, group_size=64):
    """{name: array} of our layout with every matrix quantized, embeddings and audio_head too. ValueError: cannot be."""
    if bits not in (4, 8) or group_size not in (32, 64, 128):
        raise ValueError(f"quantize takes 4 or 8 bits in groups of 32, 64 or 128, not {bits} and {group_size}")
    if any(name.endswith(".scales") for name in weights):
        raise ValueError("the model is quantized already")
    out, weights = {}, split_heads(weights)
    for name, w in weights.items():
        if w.ndim < 2 or w.shape[-1] % group_size:
            out[name] = w
        else:
            base = name.removesuffix(".weight")
            out[name], out[f"{base}.scales"], out[f"{base}.biases"] = mx.quantize(w, group_size, bits)
    if len(out) == len(weights):
        raise ValueError(f"no matrix of the model can be cut into groups of {group_size}")
    return out


def apply_adapter(weights, folder):
    """{name: array} of the model, its heads split, with what finetune.py put in `folder` added. Raises ValueError."""
    config, file = codec.read_json(Path(folder) / "adapter_config.json"), Path(folder) / "adapters.safetensors"
    if not {"alpha", "rank"} <= config.keys() or not file.is_file():
        raise ValueError(f"{folder} has no adapter_config.json and adapters.safetensors")
    weights, adapters = dict(weights), codec.read_safetensors(file)[0]
    for name, a in adapters.items():
        if name.endswith(".lora_b"):
            continue
        base, b = name.replace(".lora_a", ".weight"), adapters.get(name[:-1] + "b")
        change = a if base == name else config["alpha"] / config["rank"] * (a @ b).T  # (out, in)
        if base not in weights or weights[base].shape != change.shape:
            raise ValueError(f"the adapter {folder} is for another model, or a quantized one: {base} does not fit")
        w = weights[base]
        weights[base] = change.astype(w.dtype) if base == name else (w + change).astype(w.dtype)
    return weights


def blank(config, weights):
    """A CSM of zeros to take `weights`: with quantized matrices where they are."""
    model = CSM(config)
    for name, m in model.named_modules():
        if {f"{name}.weight", f"{name}.scales"} <= weights.keys():
            packed, scales = (weights[f"{name}.{part}"].shape[-1] for part in ("weight", "scales"))
            n = len(m.weight)
            m.weight = mx.zeros((n, packed), mx.uint32)
            m.scales = m.biases = mx.zeros((n, scales))
    return model


def locate(model):
    """What `load` was given -> the path of a local folder or file, downloaded if need be."""
    if model == "csm-1b":
        return codec.download(*DEFAULT_MODEL)
    if model == "tiny":
        model = Path(__file__).resolve().with_name("tiny")
        if not (model / "config.json").is_file():
            raise ValueError("the model `tiny` is not in this checkout")
    if Path(model).exists():
        return Path(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        # A repository may hold its weights in several layouts: the MLX or Sesame ones first, in one file.
        for weights in (("model*.safetensors*", "ckpt.safetensors"), ("*.safetensors*",), ("*.pt",)):
            folder = codec.download(str(model), *weights, *BESIDE)
            if any(f.name not in BESIDE for pattern in weights for f in folder.glob(pattern)):
                break
        return folder
    raise ValueError(
        f"no such model: {model} (csm-1b, tiny, a folder, a .safetensors file or a Hugging Face repository)"
    )


def load(model="csm-1b", *, dtype=None, quantize=None, group_size=64, adapter=None):
    """A Generator.

    model: "csm-1b", "tiny", a folder, a weights file or a Hugging Face repository, in any layout that convert.py knows.
    dtype: of the computation, "float32", "bfloat16" or "float16"; None: bfloat16 on a GPU, float32 on the CPU, where
    the other types are slow. quantize: 4 or 8 bits, in groups of group_size. adapter: a folder that finetune.py wrote.
    What a folder lacks (Mimi, tokenizer) is taken from the default downloads. Raises ValueError.
    """
    path = locate(model)
    folder = path if path.is_dir() else path.parent
    native = codec.read_json(folder / "config.json")
    mimi = None
    if native.get("layout") == "native" or model == "csm-1b":  # whose repository has no config.json
        config = CSMConfig.from_dict(native)
        weights = codec.read_safetensors(path if path.is_file() else path / "model.safetensors")[0]
    else:
        config, weights, mimi = codec.read_foreign(path)
        if weights is None:
            raise ValueError(f"{path} holds a Mimi, and no CSM")
        config = CSMConfig.from_dict(config)
    if adapter:
        weights = apply_adapter(split_heads(weights), adapter)
    if quantize:
        weights = quantize_weights(weights, quantize, group_size)
        config = replace(config, quantization={"group_size": group_size, "bits": quantize})
    dtype = as_dtype(dtype)
    weights = {k: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for k, w in weights.items()}
    network = blank(config, weights)
    codec.fill(network, split_heads(weights))
    del weights
    beside = codec.locate(folder)  # a file, or the folder itself where it has none
    mimi = codec.from_weights(mimi[1], mimi[0]) if mimi else codec.load(beside if beside != folder else None)
    tokenizer = next((f for f in (folder / "tokenizer.json", folder / "tokenizer.model") if f.is_file()), None)
    if tokenizer is None:
        tokenizer = codec.download(config.text_tokenizer or DEFAULT_TOKENIZER, "tokenizer.json")
    voices = dict.fromkeys(DEFAULT_VOICES) if model == "csm-1b" else {}
    voices |= {f.stem: f.parent for f in (folder / "prompts").glob("*.wav")}
    return Generator(network, mimi, Tokenizer(tokenizer), voices)


def as_dtype(dtype):
    if dtype is None:
        return mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    name = str(dtype).removeprefix("mlx.core.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    return getattr(mx, name)


# ---------------------------------------------------------------------------------------------------- command


@contextmanager
def wav_writer(path, sample_rate):
    """A function that takes pieces of audio for a 16-bit WAV at `path`, put there when all is well; "-": to stdout."""
    if path == "-" or (Path(path).exists() and not Path(path).is_file()):  # a pipe or a device
        head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2**32 - 1, b"WAVE", b"fmt ", 16, 1, 1, sample_rate,
                           2 * sample_rate, 2, 16, b"data", 2**32 - 1)  # fmt: skip
        with nullcontext(sys.stdout.buffer) if path == "-" else open(path, "wb") as out:
            out.write(head)  # the length is not known yet: the largest there is

            def write(audio):
                out.write(codec.to_pcm16(audio).tobytes())
                out.flush()

            yield write
        return
    import soundfile

    with codec.replacing(path) as file, soundfile.SoundFile(file, "w", sample_rate, 1, "PCM_16", format="WAV") as wav:
        yield lambda audio: wav.write(codec.to_pcm16(audio))


def read_text(argument):
    """TEXT of the command: itself, "-" for standard input, "@file" for a file."""
    if argument != "-" and not argument.startswith("@"):
        return argument
    try:
        data = sys.stdin.buffer.read() if argument == "-" else Path(argument[1:]).read_bytes()
        return data.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {argument.removeprefix('@')}: {e}") from None


def read_dialogue(path):
    """Lines "0: Hello." -> [(speaker, text)]."""
    turns = []
    for n, line in enumerate(read_text(f"@{path}").splitlines(), 1):
        if not line.strip():
            continue
        m = re.match(r"\s*\[?(\d+)\]?\s*:\s*(\S.*)", line)
        if not m:
            raise ValueError(f"{path}, line {n}: expected `speaker: text`, such as `0: Hello.`")
        turns.append((int(m[1]), m[2].strip()))
    if not turns:
        raise ValueError(f"{path} holds no turns")
    return turns


def read_context(path):
    """JSON, a list of {"speaker", "text", "audio": path beside the JSON} -> Segments."""
    context = []
    try:
        for t in json.loads(read_text(f"@{path}")):
            speaker, audio = t["speaker"] if "speaker" in t else t["speaker_id"], t.get("audio") or t["audio_path"]
            context.append(Segment(int(speaker), t["text"], Path(path).parent / audio))
        return context
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, json.JSONDecodeError) as e:
        expected = '[{"speaker": 0, "text": "...", "audio": "file.wav"}, ...]'
        raise ValueError(f"{path}: expected {expected} ({type(e).__name__}: {e})") from None


def check_out(out):
    if out != "-" and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
        raise ValueError(f"cannot write {out}: it is a folder, or in none that exists")


def add_options(p):
    """The options of the command that narrate.py has as well."""
    p.add_argument("--model", default="csm-1b", help="csm-1b, tiny, a folder, a weights file or a Hugging Face repo")
    p.add_argument("--speaker", type=int, default=0, help="speaker id of the text (default 0)")
    p.add_argument("--voice", help="preset voice, or none (default: the model's own)")
    p.add_argument("--ref-audio", metavar="F", help="a clip of the voice to speak with")
    p.add_argument("--ref-text", metavar="T", help="what that clip says")
    p.add_argument("--temperature", type=float, default=0.9, help="0 is greedy (default 0.9)")
    p.add_argument("--top-k", type=int, default=50, help="0 is off (default 50)")
    p.add_argument("--top-p", type=float, default=1.0, help="1 is off (default)")
    p.add_argument("--min-p", type=float, default=0.0, help="0 is off (default)")
    p.add_argument("--seed", type=int, help="for the same speech again (default: drawn, and printed)")
    p.add_argument("--max-audio-length-ms", type=float, default=90_000, metavar="MS", help="a turn's (default 90000)")
    p.add_argument("--quantize", type=int, choices=(4, 8), help="bits of the weights")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what suits the device")
    p.add_argument("--adapter", metavar="DIR", help="what finetune.py trained")


def read_options(args):
    """What add_options took -> the context, and the arguments of `generate`, checked before a model is loaded."""
    if (args.ref_audio is None) != (args.ref_text is None):
        raise ValueError("--ref-audio and --ref-text go together: a clip needs its transcript")
    context = [] if args.ref_audio is None else [Segment(args.speaker, args.ref_text, as_samples(args.ref_audio))]
    options = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "min_p")}
    Sampling(**options)
    if args.seed is not None:
        check_seed(args.seed)
    return context, options | {"max_audio_length_ms": args.max_audio_length_ms}


def command(args):
    if args.dialogue and args.text is not None:
        raise ValueError("give a text or --dialogue, not both")
    if not args.dialogue and args.text is None:
        raise ValueError("give TEXT and OUT")
    check_out(args.out)
    turns = read_dialogue(args.dialogue) if args.dialogue else [(args.speaker, read_text(args.text))]
    if not all(text.strip() for _, text in turns):
        raise ValueError("the text is empty")
    if args.batch is not None and (args.dialogue or args.voice_match or args.batch < 1):
        raise ValueError("--batch is 1 or more, for a text; it goes with neither --dialogue nor --voice-match")
    context, options = read_options(args)
    if args.context:
        context += [replace(s, audio=as_samples(s.audio)) for s in read_context(args.context)]
    seed = secrets.randbits(32) if args.seed is None else args.seed
    generator = load(args.model, dtype=args.dtype, quantize=args.quantize, adapter=args.adapter)

    rate, n_samples, first, stopped = generator.sample_rate, 0, None, False
    start = time.perf_counter()
    pieces = spoken(generator, args, turns, context, options, seed)
    with wav_writer(args.out, rate) as write, player(rate, args.play) as play, progress() as bar:
        try:
            for audio in pieces:
                audio = np.array(audio)
                first = first or time.perf_counter() - start
                n_samples += len(audio)
                write(audio)
                play(audio)
                bar.update(len(audio) / rate)
        except KeyboardInterrupt:
            if args.out == "-" or not n_samples:
                raise
            stopped = True
    seconds, taken = n_samples / rate, time.perf_counter() - start
    if stopped:
        print(f"interrupted: the {seconds:.1f} s finished so far are in {args.out}", file=sys.stderr)
    elif not n_samples:
        print("the model ended the speech at once: there is no audio (try another seed)", file=sys.stderr)
    print(
        f"{seconds:.2f} s of audio in {taken:.2f} s, real-time factor {taken / seconds if seconds else math.inf:.2f}, "
        f"first audio after {first or 0:.2f} s, peak memory {peak_memory() / 1e9:.2f} GB, seed {seed}",
        file=sys.stderr,
    )
    return 130 if stopped else 0


def spoken(generator, args, turns, context, options, seed):
    """The pieces of sound that the command writes."""
    if args.batch is not None:
        try:
            import narrate
        except ImportError:
            raise ValueError("--batch needs narrate.py beside csm.py") from None
        (speaker, text), arguments = turns[0], options | {"voice": args.voice, "batch": args.batch, "seed": seed}
        return (audio for _, _, audio in narrate.narrate(generator, text, speaker, context, **arguments))
    talk, opening = generator._open(turns[0][0], context, args.voice, args.voice_match)
    live = args.stream or args.play or args.out == "-"
    options = options | {"streaming_interval": args.streaming_interval if live else 2.0}
    return (
        audio
        for i, (speaker, text) in enumerate(turns)
        for audio in talk.stream(text, speaker, opening=None if i else opening, seed=(seed + i) % 2**64, **options)
    )


@contextmanager
def player(rate, on):
    """A function that plays pieces of audio as they come, or does nothing."""
    if not on:
        yield lambda audio: None
        return
    try:
        import sounddevice

        speaker = sounddevice.OutputStream(samplerate=rate, channels=1, dtype="float32")
    except Exception as e:  # no package, no PortAudio, no device
        raise ValueError(f"--play needs `pip install sounddevice` and a sound card: {e or type(e).__name__}") from None
    with speaker:
        yield lambda audio: speaker.write(audio[:, None])


def progress():
    from tqdm import tqdm

    return tqdm(unit="s", bar_format="{n:.1f} s of speech, {elapsed}", disable=None, leave=False)


def peak_memory():
    """Bytes: the larger of MLX's own peak, which a GPU's is, and the process's."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return max(mx.get_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main(argv=None):
    import argparse

    p = argparse.ArgumentParser(prog="csm.py", description="Text to speech with CSM, Sesame's speech model, on MLX.")
    p.add_argument("text", nargs="?", metavar="TEXT", help="what to say; - reads standard input, @file a file")
    p.add_argument("out", metavar="OUT", help="WAV file; - writes to standard output while generating")
    add_options(p)
    p.add_argument("--context", metavar="JSON", help='earlier turns: [{"speaker", "text", "audio"}, ...]')
    p.add_argument("--voice-match", action="store_true", help="continue the last clip of the speaker")
    p.add_argument("--dialogue", metavar="F", help='speak a script: lines "0: Hello."')
    p.add_argument("--batch", type=int, metavar="N", help="split a long text into sentences, N at once")
    p.add_argument("--stream", action="store_true", help="write every --streaming-interval seconds")
    p.add_argument("--streaming-interval", type=float, default=0.5, metavar="S")
    p.add_argument("--play", action="store_true", help="play while generating")
    p.error = lambda message: p.exit(2, f"csm.py: error: {message}\n")  # one line, without the usage
    try:
        return command(p.parse_intermixed_args(argv))
    except BrokenPipeError:  # the player at the other end of OUT - has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as e:
        p.exit(2, f"csm.py: error: {' '.join(str(e).split())}\n")
    except KeyboardInterrupt:
        p.exit(130, "interrupted: no file was written\n")


if __name__ == "__main__":
    sys.exit(main())
