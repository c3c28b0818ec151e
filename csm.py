"""CSM, Sesame's Conversational Speech Model, on MLX: text and earlier turns of a conversation in, 24 kHz speech out.

    python csm.py "Hello from Sesame." hello.wav

Sources: Sesame's PyTorch code (github.com/SesameAILabs/csm) and Hugging Face transformers' CsmForConditionalGeneration
(5.23), to which tests/test_model.py holds this file: same logits, same greedy codes, on the same weights.

The way of a sentence:
    "[speaker]text" -> token ids -> rows -> backbone (Llama, KV cache) -> last hidden h -> c0, the frame's first code
    -> depth decoder (a small Llama, 31 steps on [h, c0, c1, ...]) -> c1 .. c31 -> one frame of codes, which goes back
    into the backbone as the next row, and through Mimi as 80 ms of sound. A frame of zeros ends the speech.

A row is one position of the backbone: K audio codes and one text id, with a mask that says which of them count. A text
row has the text id alone, an audio row the K codes; its input is the sum of the embeddings that the mask keeps.

Shapes: B batch, T positions, F frames, K codebooks (32), V audio vocabulary (2051), D hidden size, H heads.
"""

import copy
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count, islice
from pathlib import Path

import mimi as codec  # before mlx, as mimi.py says

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

DEFAULT_MODEL = ("senstella/csm-1b-mlx", "ckpt.safetensors")
DEFAULT_TOKENIZER = "unsloth/Llama-3.2-1B"
DEFAULT_PROMPTS = "mlx-community/csm-1b"
DEFAULT_VOICES = ("conversational_a", "conversational_b", *(f"read_speech_{x}" for x in "abcd"))
NO_TEXT = -1  # in the text column of an audio row, and where it has no code; the mask is told from it
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "ckpt.safetensors", "*.index.json", "*.safetensors",
           "ckpt.pt", "*.pt", "*.pth", "*.gguf")  # of a folder, the first that there is  # fmt: skip
BESIDE = ("*.json", "tokenizer.model", *codec.FILES, "prompts/*")  # what else of a Hub repository is wanted
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
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
    voice_match: bool = False  # whether a voice is cloned by continuing its clip, not by answering it
    sampling: dict | None = None  # the model's own defaults, fields of Sampling
    quantization: dict | None = None  # MLX's note of how; what counts is told from the tensors' shapes

    @classmethod
    def from_dict(cls, d):
        d = {f.name: d[f.name] for f in fields(cls) if d.get(f.name) is not None}
        try:
            Sampling(**d.get("sampling", {}))
            return cls(**d | {part: LlamaConfig(**d[part]) for part in ("backbone", "decoder") if part in d})
        except TypeError as e:
            raise ValueError(f"config.json is not one of ours: {e}") from None


# ---------------------------------------------------------------------------------------------------- model


class KVCache:
    """Keys and values of the positions seen so far, one pair of (B, H_kv, capacity, head_dim) arrays a layer.

    The sequences of a batch end together, at `offset`; sequence b begins at position pad[b] of the arrays, from which
    RoPE counts. What lies before is never attended to.
    """

    def __init__(self, config, dtype=mx.float32, step=CACHE_STEP):
        self.dtype, self.step = dtype, step
        self.keys, self.values = [None] * config.n_layers, [None] * config.n_layers
        self.offset, self.pad = 0, np.zeros(1, np.int32)

    def update(self, layer, k, v):
        """Put k, v (B, H_kv, T, head_dim) behind what is held; return all held by then. The last layer moves on."""
        end = self.offset + k.shape[2]
        for held, new in ((self.keys, k), (self.values, v)):
            old = new[:, :, :0] if held[layer] is None else held[layer]
            if (short := end - old.shape[2]) > 0:
                room = -(-short // self.step) * self.step
                held[layer] = mx.pad(old.astype(self.dtype), [(0, 0), (0, 0), (0, room), (0, 0)])
            held[layer][:, :, self.offset : end] = new
        if layer == len(self.keys) - 1:
            self.offset = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def positions(self):
        """What RoPE counts from: an int, or (B,) where the sequences differ in length."""
        return mx.array(self.offset - self.pad) if self.pad.any() else self.offset

    def mask(self, T):
        """What T new positions may attend to, as mx.fast.scaled_dot_product_attention takes it."""
        if not self.pad.any():
            return "causal" if T > 1 else None
        s, t = mx.arange(self.offset + T), self.offset + mx.arange(T)[:, None]
        return ((s >= mx.array(self.pad)[:, None, None]) & (s <= t))[:, None]  # (B, 1, T, S)

    def trim(self, n):
        """Forget the last n positions."""
        self.offset -= max(0, min(n, self.offset))

    def filter(self, rows):
        """A new cache of these sequences alone, a list of indices; one may occur more than once."""
        other, start, at = copy.copy(self), int(self.pad[rows].min()), mx.array(rows)  # what lies before all goes
        other.offset, other.pad = self.offset - start, self.pad[rows] - start
        held = (self.keys, self.values)
        other.keys, other.values = ([x[at, :, start : self.offset] for x in layers] for layers in held)
        return other

    @staticmethod
    def join(caches):
        """A new cache of all their sequences side by side, the shorter moved to end where the longest do."""
        whole, end = copy.copy(caches[0]), max(c.offset for c in caches)
        left = [end - c.offset for c in caches]
        whole.offset, whole.pad = end, np.concatenate([c.pad + n for c, n in zip(caches, left)])

        def joined(arrays):  # of one layer
            ends = [mx.pad(x[:, :, : end - n], [(0, 0), (0, 0), (n, 0), (0, 0)]) for x, n in zip(arrays, left)]
            return mx.concatenate(ends)

        whole.keys = [joined(arrays) for arrays in zip(*(c.keys for c in caches))]
        whole.values = [joined(arrays) for arrays in zip(*(c.values for c in caches))]
        return whole


class Linear(nn.Module):
    """(..., in) -> (..., out). weight (out, in), plain; or quantized, with `scales` and perhaps `biases` beside it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = mx.zeros((n_out, n_in))  # not nn.Linear, which draws from the global random generator

    def __call__(self, x):
        if "scales" not in self:
            return x @ self.weight.T
        how = packing(self, x.shape[-1])
        return mx.quantized_matmul(x, self.weight, self.scales, self.get("biases"), transpose=True, **how)


class Embedding(nn.Module):
    """weight (n, dim), plain or quantized as Linear's."""

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
    """How a matrix with rows of n_in numbers was quantized, told from its shapes: arguments of mx.quantized_matmul."""
    bits, group_size = 32 * module.weight.shape[-1] // n_in, n_in // module.scales.shape[-1]
    mode = "affine" if "biases" in module else "nvfp4" if group_size == 16 else f"mxfp{bits}"
    return {"group_size": group_size, "bits": bits, "mode": mode}


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, c.n_heads, c.n_kv_heads, c.head_dim
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim)

    def __call__(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.n_heads, self.head_dim).transpose(0, 2, 1, 3)  # (B, H, T, head_dim)
        k = self.k_proj(x).reshape(B, T, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(B, T, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        # Interleaved pairs, as Sesame has them (transformers rotates halves, with the rows of q and k permuted).
        q, k = (mx.fast.rope(y, self.head_dim, traditional=True, base=None, scale=1.0, **rope) for y in (q, k))
        if cache:
            k, v = cache.update(self.layer, k, v)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(B, T, -1))


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
        T = x.shape[1]
        mask = cache.mask(T) if cache else "causal" if T > 1 else None
        rope = {"freqs": self._periods, "offset": cache.positions() if cache else 0}
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        return self.norm(x)


def row_mask(rows):
    """Which columns of rows (..., K + 1) count: the last of a text row, the others of an audio row."""
    is_text = rows[..., -1:] != NO_TEXT
    return (is_text == (mx.arange(rows.shape[-1]) == rows.shape[-1] - 1)) & (rows != NO_TEXT)


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
        self._offsets = V * mx.arange(K)
        mx.eval(self._offsets)
        self.projection = Linear(D, c.decoder.dim)
        self.codebook0_head = Linear(D, V)
        self.audio_head = [Linear(c.decoder.dim, V) for _ in range(K - 1)]

    @property
    def dtype(self):
        return self.backbone.norm.weight.dtype

    def embed(self, rows, mask):
        """rows (B, T, K + 1) int, mask alike bool -> (B, T, D), the sum of the embeddings kept, added up in float32."""
        K = self.config.audio_num_codebooks
        audio = self.audio_embeddings(rows[..., :K] + self._offsets)  # (B, T, K, D)
        text = self.text_embeddings(rows[..., K:])  # (B, T, 1, D)
        kept = mx.concatenate([audio, text], axis=-2) * mask[..., None]
        return kept.astype(mx.float32).sum(axis=-2).astype(self.dtype)

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

    def sample_rest(self, h, first, sample, n=None):
        """The depth decoder: h (B, D), the backbone's last, and codebook 0's codes (B,) -> the others (B, K - 1) int32.

        sample(i, logits (B, V)) -> ids (B,) is asked for each codebook i in turn. n: stop after the first n codebooks.
        """
        K = n or self.config.audio_num_codebooks
        cache = KVCache(self.config.decoder, self.dtype, step=K)  # a fresh one every frame
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
    top_p: float = 1.0  # 0 or 1: off
    min_p: float = 0.0  # relative to the likeliest; 0: off
    min_tokens_to_keep: int = 1  # that min_p spares
    sampler: Callable | None = None  # log-probabilities (B, V) -> ids (B,), in place of all the above
    logits_processors: tuple = ()  # of codebook 0: (ids so far (F,), logits (1, V)) -> logits

    def __post_init__(self):
        limits = {"temperature": (0, 1e9), "top_p": (0, 1), "min_p": (0, 1)}
        limits |= {"top_k": (0, math.inf), "min_tokens_to_keep": (1, math.inf)}
        for name, (low, high) in limits.items():
            if not low <= (getattr(self, name) or 0) <= high:
                raise ValueError(f"{name} must lie in {low:g}..{high:g}, not {getattr(self, name)}")

    @property
    def greedy(self):
        return self.temperature < 1e-6  # dividing by less overflows

    def numbers(self):
        """The options as a row (5,) for `sample`: 1 / temperature, top-k, top-p, log min-p, how many min-p spares."""
        if self.greedy:
            return [1.0, 1, 2.0, -math.inf, 1]
        top_p, min_p = self.top_p if 0 < self.top_p < 1 else 2.0, math.log(self.min_p) if self.min_p else -math.inf
        top_k, spared = (min(n, 2**20) for n in (self.top_k or 2**20, self.min_tokens_to_keep))  # they become floats
        return [1 / self.temperature, top_k, top_p, min_p, spared]


def sample(logits, noise, options):
    """Ids (B,) from logits (B, V), -inf where forbidden, by Gumbel noise (B, V); options (B, 5): Sampling.numbers.

    Each filter keeps a prefix of the ids in falling order, so together they keep the shortest. The noise is the id's
    own, and the id drawn is the one whose tempered log-probability and noise add up to most (Gumbel-max).
    """
    scale, top_k, top_p, min_p, spared = (options[:, i : i + 1] for i in range(5))
    order, rank = mx.argsort(-logits, axis=-1), mx.arange(logits.shape[-1])
    logp = mx.take_along_axis(logits, order, axis=-1)
    logp = logp - mx.logsumexp(logp, axis=-1, keepdims=True)
    likelier = mx.cumsum(mx.exp(logp), axis=-1, inclusive=False)  # as long as these do not fill top_p already
    keep = (rank < top_k) & (likelier < top_p) & ((logp >= logp[:, :1] + min_p) | (rank < spared))
    score = mx.where(keep, logp * scale, -mx.inf) + mx.take_along_axis(noise, order, axis=-1)
    return mx.take_along_axis(order, mx.argmax(score, axis=-1, keepdims=True), axis=-1)[:, 0].astype(mx.int32)


def check_seed(seed):
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0..2^64 - 1, not {seed}")


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

    # Usual names of what stands before and after a text.
    MARKS = ("<|begin_of_text|> <|end_of_text|>", "<bos> <eos>", "<s> </s>", "<|im_start|> <|im_end|>")

    def __init__(self, path):
        self.path = Path(path)
        try:
            if self.path.suffix in (".json", ".gguf"):
                import tokenizers

                if self.path.suffix == ".json":
                    t = tokenizers.Tokenizer.from_file(str(path))
                else:
                    t = tokenizers.Tokenizer.from_str(json.dumps(codec.layouts(path, "csm_gguf").read_tokenizer(path)))
                self.bos, self.eos = self._marks(t)
                t.encode_special_tokens = True  # "<|end_of_text|>" in a user's text is text
                self._encode = lambda text: t.encode(text, add_special_tokens=False).ids
            else:
                import sentencepiece

                t = sentencepiece.SentencePieceProcessor(model_file=str(path))
                self._encode = t.encode
                self.bos, self.eos = (i if i >= 0 else None for i in (t.bos_id(), t.eos_id()))
        except Exception as e:  # both libraries raise bare Exceptions
            raise ValueError(f"{path} is not a tokenizer: {e}") from None
        if None in (self.bos, self.eos):
            log.warning("%s has no tokens for the beginning and the end of a text, which CSM was trained with", path)

    def _marks(self, t):
        """The ids before and after a text: of the tokenizer's own template, if that has both, or else by their names.

        Llama's own adds the first alone, and CSM was trained with both.
        """
        whole, text = t.encode("a").ids, t.encode("a", add_special_tokens=False).ids
        if len(whole) == len(text) + 2 and whole[1:-1] == text:
            return whole[0], whole[-1]
        own = codec.read_json(self.path.with_name("tokenizer_config.json"))
        own = [own.get(name) or "" for name in ("bos_token", "eos_token")]
        own = [token["content"] if isinstance(token, dict) else token for token in own]
        pairs = [[t.token_to_id(name) for name in pair] for pair in (own, *(marks.split() for marks in self.MARKS))]
        # The first that there is whole. Where both are one token, that ends documents.
        return max(pairs, key=lambda pair: (None not in pair and pair[0] != pair[1], -pair.count(None)))

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
        low, high = np.iinfo(audio.dtype).min, np.iinfo(audio.dtype).max + 1
        audio = (audio - (low + high) / 2) / ((high - low) / 2)
    if audio.ndim == 2:  # (channels, samples) or (samples, channels)
        audio = audio.mean(axis=int(np.argmin(audio.shape)))
    if audio.ndim != 1 or not audio.size:
        raise ValueError(f"audio must be (samples,), not {audio.shape}")
    if not np.isfinite(audio).all():
        raise ValueError("the audio contains NaN or infinite samples")
    return audio.astype(np.float32)


# ---------------------------------------------------------------------------------------------------- the engine


@dataclass(eq=False)
class Utterance:
    """What a Batch knows of one of its sequences."""

    uid: int
    rows: np.ndarray  # (T, K + 1), its prompt after what `cache` holds
    limit: int  # frames at most
    seed: int
    sampling: Sampling
    cache: KVCache | None  # of what goes before
    keep: bool  # whether its own cache is wanted when it leaves
    launched: int = 0  # frames
    seen: int = 0  # frames
    over: bool = False  # whether it has ended, or was removed
    said: list = field(default_factory=list)  # codes of codebook 0, for logits processors


def prefill(model, rows, cache=None):
    """Rows (T, K + 1) behind those that `cache`, which is not altered, holds -> last hidden (1, D), KVCache of all."""
    cache = cache.filter([0]) if cache else KVCache(model.config.backbone, model.dtype)
    for i in range(0, len(rows), PREFILL):
        part = mx.array(rows[None, i : i + PREFILL])
        h = model(mx.maximum(part, 0), row_mask(part), cache)[:, -1]
        mx.eval(h, cache.keys, cache.values)
    return h, cache


class Batch:
    """Utterances spoken side by side, a frame of all at a time. They join and leave between frames.

    Each gives the codes that it would give alone. For one thread at a time; several batches may share a Generator.
    """

    def __init__(self, generator):
        self.generator, self.model = generator, generator.model
        self.ids = count()
        self.waiting, self.live = [], []  # Utterances; the live ones in the order of the arrays' rows
        self.kept = {}  # uid -> the KVCache of one that was inserted with keep, once it has ended
        self.cache = None  # KVCache of the live ones
        self.h = mx.zeros((0, self.model.config.backbone.dim), self.model.dtype)  # (B, D) last hidden
        self.keys = mx.zeros((0, 2), mx.uint32)  # (B, 2) randomness
        mx.eval(self.h, self.keys)  # so that another thread may go on with them
        self.flying = None  # the frame under way: its Utterances and codes (B, K)

    def __len__(self):
        """How many speak or wait to."""
        return len({u.uid for u in self._present() if not u.over})

    def insert(self, prompt_rows, max_frames, seed, sampling=Sampling(), cache=None, keep=False):
        """Let an utterance join before the next frame; returns its uid.

        prompt_rows: (T, K + 1), see Generator.prompt. cache: KVCache of a batch of one, of rows that go before them; it
        is not altered. keep: `remove` shall return a KVCache of all that was said. ValueError: a prompt too long.
        """
        check_seed(seed)
        if max_frames < 1:
            raise ValueError(f"max_frames must be 1 or more, not {max_frames}")
        rows = np.array(prompt_rows, np.int32)
        n = len(rows) + (cache.offset if cache else 0)
        room = self.generator.limit - n
        if not len(rows) or room < 1:
            raise ValueError(f"the prompt takes {n} positions, and the model has {self.generator.limit}")
        uid = next(self.ids)
        self.waiting.append(Utterance(uid, rows, min(max_frames, room), seed, sampling, cache, keep))
        return uid

    def next(self):
        """One frame: [(uid, codes (K,) int32)] of all that speak; codes None, behind the last frame: it has ended.

        The frame after it is under way before this one is looked at, so that the device never waits.
        """
        while True:
            landed = self.flying
            self._leave()
            self._join()
            self.flying = self._launch() if self.live else None
            if landed or not self.flying:
                return self._look(*landed) if landed else []

    def remove(self, uid):
        """Let an utterance leave at once. Returns its KVCache if it was inserted with `keep`, else None."""
        for u in self._present():
            u.over |= u.uid == uid
        self._leave()
        return self.kept.pop(uid, None)

    def _present(self):
        """The Utterances that wait, that live, and whose frame is under way, which may have left `live` with it."""
        return [*self.waiting, *self.live, *(self.flying[0] if self.flying else [])]

    def _leave(self):
        """The arrays without those that are over, or have all their frames under way."""
        self.waiting = [u for u in self.waiting if not u.over]
        rows = [i for i, u in enumerate(self.live) if not u.over and u.launched < u.limit]
        if len(rows) == len(self.live):
            return
        for i, u in enumerate(self.live):
            if u.keep and i not in rows:
                self.kept[u.uid] = kept = self.cache.filter([i])
                mx.async_eval(kept.keys, kept.values)  # so that another thread may go on with them
        at, self.live = mx.array(rows, mx.int32), [self.live[i] for i in rows]
        self.h, self.keys, self.cache = self.h[at], self.keys[at], self.cache.filter(rows) if rows else None

    def _join(self):
        """Those that wait into the arrays. A prompt that several have is computed once."""
        done, starts = {}, []
        for u in self.waiting:
            what = u.rows.tobytes(), id(u.cache)
            done[what] = done.get(what) or prefill(self.model, u.rows, u.cache)
            starts.append(done[what])
        if starts:
            self.h = mx.concatenate([self.h, *(h for h, _ in starts)])
            self.keys = mx.concatenate([self.keys, *(mx.random.key(u.seed)[None] for u in self.waiting)])
            self.cache = KVCache.join([self.cache] * bool(self.live) + [cache for _, cache in starts])
            self.live, self.waiting = self.live + self.waiting, []

    def _launch(self):
        """The next frame of all under way -> (Utterances, codes (B, K))."""
        c, live = self.model.config, list(self.live)
        K, V, B = self.generator.codebooks, c.audio_vocab_size, len(live)
        if all(u.sampling.greedy for u in live):
            noise = mx.zeros((B, K, V))
        else:
            now, self.keys = mx.vmap(mx.random.split)(self.keys).swapaxes(0, 1)  # (B, 2) each
            noise = mx.vmap(lambda key: mx.random.gumbel((K, V), key=key))(now)
        logits = self.model.head(0, self.h).astype(mx.float32)
        for i, u in enumerate(live):
            for process in u.sampling.logits_processors:
                row = process(mx.array(u.said, mx.int32), logits[i : i + 1])
                logits = mx.concatenate([logits[:i], row, logits[i + 1 :]])
        logits = logits + self.generator.forbidden
        own = [(i, u.sampling.sampler) for i, u in enumerate(live) if u.sampling.sampler]
        options = mx.array([u.sampling.numbers() for u in live])  # (B, 5)
        first = by_samplers(own, logits, sample(logits, noise[:, 0], options))
        codes = self.generator.depth(self.h, first, noise[:, 1:], options, own)
        codes = mx.concatenate([first[:, None], codes], axis=1)
        for u in live:
            u.launched += 1
        if any(u.launched < u.limit for u in live):
            empty = c.audio_num_codebooks + 1 - K
            row = mx.pad(mx.clip(codes, 0, V - 1), [(0, 0), (0, empty)], constant_values=NO_TEXT)[:, None]
            self.h = self.model(mx.maximum(row, 0), row_mask(row), self.cache)[:, -1]
        mx.async_eval(codes, self.h, self.keys)
        if any(u.sampling.logits_processors for u in live):  # which are asked with the codes so far
            for u, code in zip(live, first.tolist()):
                u.said.append(code)
        return live, codes

    def _look(self, utterances, codes):
        """A frame that was launched -> what `next` returns of it."""
        n_codes, out = self.generator.mimi.config.codebook_size, []
        for u, ids in zip(utterances, np.array(codes)):
            if u.over:
                continue
            wrong = ids[(ids < 0) | (ids >= n_codes)]
            if len(wrong):
                self.remove(u.uid)
                raise ValueError(f"the sampler gave {wrong[0]}, and Mimi has {n_codes} codes")
            u.seen += 1
            u.over = u.seen == u.limit or not ids.any()
            if ids.any():
                out.append((u.uid, ids))
                if u.over:
                    log.warning("the speech was cut off at %d frames", u.limit)
            if u.over:
                out.append((u.uid, None))
        return out


def by_samplers(own, logits, ids):
    """ids (B,), but those of `own` [(row, sampler)] drawn by their samplers from the log-probabilities."""
    for i, sampler in own:
        row = logits[i : i + 1] - mx.logsumexp(logits[i : i + 1], axis=-1, keepdims=True)
        ids = mx.concatenate([ids[:i], sampler(row).astype(mx.int32), ids[i + 1 :]])
    return ids


# ---------------------------------------------------------------------------------------------------- generation


class Generator:
    """A loaded model: network, codec, tokenizer and voices. It never changes, so threads may share it.

    The arguments that generate, stream, generate_codes and Conversation.say share:
      text, speaker (0, 1, ...; the voice comes from the context, and a turn of the same speaker shares its voice)
      context: Segments said before; voice, used when there is no context: a preset's name, the path of a clip with its
      transcript beside it (me.wav, me.txt), "none"; None: the model's default
      voice_match: continue the speaker's last clip in `context` in place of answering it (None: as the model's config)
      max_audio_length_ms (None: 3 s and 200 ms a character, at most 90 s), and the fields of Sampling, by default the
      model's own; seed: None draws one, and logs it on the logger "csm".
    All raise ValueError for what is wrong in them, and for a prompt beyond the model's positions.
    """

    def __init__(self, model, mimi, tokenizer, voices=None, fields=None, codebooks=None):
        self.model, self.mimi, self.tokenizer = model, mimi, tokenizer
        self.voices = voices or {}  # name -> folder of its .wav and .txt; None: on the Hub
        self.fields = fields or {}  # of config.json, for `save`
        self.sample_rate = mimi.sample_rate
        self.limit = model.config.backbone.max_positions  # positions that the model has
        K = model.config.audio_num_codebooks
        self.codebooks = K if codebooks is None else codebooks  # that are spoken, the first ones
        if not 2 <= self.codebooks <= K:
            raise ValueError(f"codebooks must be 2 to {K}, not {codebooks}")
        if mimi.n_codebooks < self.codebooks:
            n = mimi.n_codebooks
            raise ValueError(f"the model writes {self.codebooks} codebooks, its Mimi has {n} (--codebooks: fewer)")
        n_ids = mx.arange(model.config.audio_vocab_size)
        self.forbidden = mx.where(n_ids < mimi.config.codebook_size, 0, -mx.inf)  # ids that Mimi lacks
        mx.eval(self.forbidden)
        self.codec_stream = mx.new_thread_local_stream(mx.default_device())
        self._compiled, self._lock = None, threading.Lock()  # the depth decoder's loop
        self.contexts, self.kept = {}, 4  # rows, as bytes -> KVCache of the contexts used last; how many of them
        self._prompts = {}  # the voices asked for so far, as Segments with codes

    def batch(self):
        """A Batch, empty."""
        return Batch(self)

    def conversation(self, context=(), *, voice=None, voice_match=False):
        """A Conversation that starts with `context`, or without one with a voice for whoever speaks first.

        voice_match: whether its first turn continues a clip, as `generate` has it.
        """
        context = list(context)
        return Conversation(self, context, [] if context else self.voice_prompt(voice), voice_match)

    def stream(self, text, speaker=0, context=(), *, voice=None, voice_match=None, **options) -> Iterator[mx.array]:
        """What `generate` gives, in pieces of streaming_interval=0.5 seconds: (samples,) float32 each."""
        return self.conversation(context, voice=voice, voice_match=voice_match).stream(text, speaker, **options)

    def generate(self, text, speaker=0, context=(), **options) -> mx.array:
        """Speech for `text`: (samples,) float32 at `sample_rate`; empty if the model ends at once."""
        return join(self.stream(text, speaker, context, streaming_interval=2.0, **options))

    def generate_codes(self, text, speaker=0, context=(), *, voice=None, voice_match=None, **options) -> mx.array:
        """The codes of the speech: (F, K) int32."""
        talk = self.conversation(context, voice=voice, voice_match=voice_match)
        for _ in talk.frames(text, speaker, **options):
            pass
        return talk.turns[-1].codes

    def generate_batch(
        self, texts, speaker=0, context=(), *, voice=None, voice_match=None, max_audio_length_ms=None, seed=None,
        **sampling,
    ) -> list[mx.array]:  # fmt: skip
        """Speech for each of `texts`, computed together: [(samples,) float32].

        speaker, max_audio_length_ms: one for all, or a list of one for each. context: Segments for all, or a list of a
        list for each. Text i sounds as `generate` with seed + i makes it.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, not one")
        texts, context = list(texts), list(context)
        speakers, lengths = ([x] * len(texts) if np.ndim(x) == 0 else x for x in (speaker, max_audio_length_ms))
        own = context and not isinstance(context[0], Segment)
        contexts = [list(c) for c in context] if own else [context] * len(texts)
        encoded = {i: self.encode(s) for i, s in {id(s): s for c in contexts for s in c}.items()}  # each once
        contexts = [[encoded[id(s)] for s in c] for c in contexts]
        if not len(speakers) == len(lengths) == len(contexts) == len(texts):
            raise ValueError(f"{len(texts)} texts need as many speakers, contexts and lengths, or one for all")
        seed, sampling = self.options(seed, sampling)
        batch, codes = self.batch(), {}
        for i, (text, speaker, context, ms) in enumerate(zip(texts, speakers, contexts, lengths)):
            before, rows = self.prompt(text, speaker, context, voice, voice_match)
            frames = self.max_frames(ms, text)
            codes[batch.insert(rows, frames, (seed + i) % 2**64, sampling, self.prefill(before))] = []
        while len(batch):
            for uid, frame in batch.next():
                codes[uid] += [] if frame is None else [frame]
        return [self.decode(mx.array(np.array(c, np.int32).reshape(-1, self.codebooks))) for c in codes.values()]

    def decode(self, codes) -> mx.array:
        """Codes (F, K) -> (samples,) float32, in bounded memory."""
        return join([self.mimi.decode(codes.T[None])[0, 0]])

    def encode(self, segment):
        """The Segment with its codes."""
        if isinstance(segment, Segment) and segment.codes is not None:
            return segment
        n = min(self.mimi.n_codebooks, self.model.config.audio_num_codebooks)
        return replace(segment, codes=self.audio_rows(segment)[:-1, :n])

    def save(self, folder):
        """Write the model as a folder in our own layout, which needs nothing else; whole or not at all. ValueError."""
        sound, place = dict(tree_flatten(self.mimi.parameters())), self.tokenizer.path.parent
        for part in ("first", "rest") if self.mimi.rest is not None else ("first",):
            del sound[f"{part}.norms"]
            vectors = sound[f"{part}.embedding_sum"] = sound.pop(f"{part}.codebooks")
            sound[f"{part}.cluster_usage"] = mx.ones(vectors.shape[:2])
        kind = json.dumps(asdict(self.mimi.config))
        files = {
            "config.json": self.fields | asdict(self.model.config) | {"model_type": "csm", "layout": "native"},
            "model.safetensors": (join_heads(dict(tree_flatten(self.model.parameters()))), {"format": "mlx"}),
            "mimi.safetensors": (sound, {"format": "mlx", "config": kind}),
        }
        files |= {f.name: f for f in (place / name for name in TOKENIZER) if f.is_file() and f.suffix == ".json"}
        files[self.tokenizer.path.name] = self.tokenizer.path
        clips = [v / f"{name}{x}" for name, v in self.voices.items() if v for x in (".wav", ".txt")]
        write_folder(folder, files | {f"prompts/{f.name}": f for f in clips if f.is_file()})

    def max_frames(self, max_audio_length_ms, text=""):
        """The frames that a length in ms, or None, allows for a text."""
        frame_ms = 1000 / self.mimi.config.frame_rate
        ms = min(90_000, 3_000 + 200 * len(text)) if max_audio_length_ms is None else max_audio_length_ms
        if not frame_ms <= ms < math.inf:
            raise ValueError(f"max_audio_length_ms must be {frame_ms:g} or more, one frame, not {ms}")
        return int(ms / frame_ms)

    def options(self, seed=None, sampling=()):
        """The seed, drawn if it is None, and the Sampling of these fields or else of the model's own; checked."""
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        check_seed(seed)
        given = {name: value for name, value in dict(sampling).items() if value is not None}
        given["logits_processors"] = tuple(given.get("logits_processors", ()))
        return int(seed), Sampling(**(self.model.config.sampling or {}) | given)

    def depth(self, h, first, noise, options, own=()):
        """CSM.sample_rest by `sample`: h (B, D), first (B,), noise (B, K - 1, V), options (B, 5) -> codes (B, K - 1).

        Compiled, where that pays, it has fewer of its thousands of small operations, and C++ builds them. The weights
        are inputs, and so may change. own: as of `by_samplers`.
        """
        if own or not compiles(self.model):
            return self._rest(self.model, h, first, noise, options, own)
        B, m = len(first), self.model
        size = next(n for i in count() for n in (2**i, 3 * 2**i // 2) if n >= B)  # so that few sizes are compiled
        arrays = [mx.pad(x, [(0, size - B)] + [(0, 0)] * (x.ndim - 1)) for x in (h, first, noise, options)]
        weights = {part: m[part].parameters() for part in ("decoder", "projection", "audio_embeddings")}
        weights["audio_head"] = [head.parameters() for head in m.audio_head]
        with self._lock:  # for any call may trace: each thread and size does once
            try:
                self._compiled = self._compiled or compiled(self)
                return self._compiled(weights, *arrays)[:B]
            except BaseException:  # also Ctrl-C: MLX keeps the half of a trace
                self._compiled = None
                raise

    def _rest(self, model, h, first, noise, options, own=()):
        def draw(i, logits):
            logits = logits.astype(mx.float32) + self.forbidden
            return by_samplers(own, logits, sample(logits, noise[:, i - 1], options))

        return model.sample_rest(h, first, draw, noise.shape[1] + 1)

    def prefill(self, rows):
        """The KVCache of a context's rows (T, K + 1), None for none; those of the last few are kept."""
        if not len(rows):
            return None
        key = rows.tobytes()
        cache = self.contexts.pop(key, None) or prefill(self.model, rows)[1]
        self.contexts[key] = cache  # the last of them
        for old in list(self.contexts)[: -self.kept]:
            self.contexts.pop(old, None)
        return cache

    def prompt(self, text, speaker=0, context=(), voice=None, voice_match=None):
        """The rows of the context, to be prefilled, and the rows (T, K + 1) after them: what Batch.insert takes."""
        talk = self.conversation(context, voice=voice, voice_match=voice_match)
        rows = talk.prompt(text, speaker)
        return np.concatenate([rows[:0], *talk.blocks]), rows

    def voice_prompt(self, voice=None):
        """A voice as a list of one Segment with codes, or [] for none."""
        if voice == "none" or (voice is None and not (self.voices and self.model.config.use_default_voice_prompt)):
            return []
        name = str(voice or ("conversational_a" if "conversational_a" in self.voices else min(self.voices)))
        try:
            self._prompts[name] = self._prompts.get(name) or self.encode(self._clip(name))
            return [self._prompts[name]]
        except (ValueError, FileNotFoundError) as e:
            if voice:
                raise ValueError(str(e)) from None
            log.warning("speaking without the default voice %s: %s", name, e)
            return []

    def _clip(self, name):
        """A voice's clip and what it says, as a Segment."""
        if name in self.voices and self.voices[name] is None:
            wav = codec.download(DEFAULT_PROMPTS, f"prompts/{name}.wav")
            text = codec.layouts("the Hub's voices").TRANSCRIPTS.get(name)
            return Segment(0, text or read_text(f"@{codec.download(DEFAULT_PROMPTS, f'prompts/{name}.txt')}"), wav)
        wav = self.voices[name] / f"{name}.wav" if name in self.voices else Path(name)
        if not wav.is_file():
            known = ", ".join(sorted(self.voices)) or "none at all"
            raise ValueError(f"unknown voice {name!r}; this model has: {known}; or name a clip, with a .txt beside it")
        return Segment(0, read_text(f"@{wav.with_suffix('.txt')}"), wav)

    def text_rows(self, text, speaker):
        """(T, K + 1) int32 for one turn's text."""
        if not isinstance(speaker, (int, np.integer)) or speaker < 0:
            raise ValueError(f"speaker must be 0 or more, not {speaker!r}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the text is empty" if isinstance(text, str) else f"text must be a str, not {text!r}")
        c = self.model.config
        mark = f"[{speaker}] {text.lstrip()}" if c.speaker_prefix_space else f"[{speaker}]{text}"
        try:
            ids = self.tokenizer.encode(mark)
        except (UnicodeError, TypeError):  # lone surrogates, which is what Python makes of a wrong byte
            raise ValueError("the text is not UTF-8") from None
        if max(ids) >= c.text_vocab_size:
            raise ValueError(f"the tokenizer gives id {max(ids)}, and the model knows {c.text_vocab_size}: not a pair")
        rows = np.zeros((len(ids), c.audio_num_codebooks + 1), np.int32)
        rows[:, -1] = ids
        return rows

    def audio_rows(self, segment):
        """(F + 1, K + 1) int32 for one turn's audio: its frames and the frame of zeros that ends it.

        The text column holds NO_TEXT, and so do those of codebooks that the codes, (F, 1 to K), do not have.
        """
        K, V = self.model.config.audio_num_codebooks, self.model.config.audio_vocab_size
        if not isinstance(segment, Segment):
            raise ValueError(f"a context is a list of Segments, not of {segment!r}")
        if segment.codes is None and segment.audio is None:
            raise ValueError(f"a turn of the context has a text but no audio: {segment.text[:40]!r}")
        if (codes := segment.codes) is None:
            codes = self.mimi.encode(mx.array(as_samples(segment.audio))[None, None])[0, :K].T
        codes = np.array(codes)
        if codes.ndim != 2 or not self.codebooks <= codes.shape[1] <= K:
            raise ValueError(f"codes must be (frames, {K}), not {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < V:
            raise ValueError(f"codes must lie in 0..{V - 1}")
        rows = np.pad(codes.astype(np.int32), [(0, 1), (0, 0)])
        return np.pad(rows, [(0, 0), (0, K + 1 - rows.shape[1])], constant_values=NO_TEXT)

    def segment_rows(self, segment):
        """(T, K + 1) int32 for a finished turn: its text, then its audio."""
        audio = self.audio_rows(segment)  # first, since it says what is no Segment
        return np.concatenate([self.text_rows(segment.text, segment.speaker), audio])


class Conversation:
    """Turns said so far and their KV cache, so that a new turn costs the backbone its own rows alone.

    Past the model's positions it forgets the oldest turns that came after its context, down to half of the positions,
    and warns on the logger "csm". A turn whose stream is abandoned, or fails, is not part of the conversation.
    """

    def __init__(self, generator, context=(), voice=(), voice_match=False):
        self.generator = generator
        self.turns = list(context)  # Segments
        self.blocks = [generator.segment_rows(s) for s in self.turns]  # the rows of each turn
        self.n_kept = len(self.blocks)  # the context, or the voice prompt, is never forgotten
        self.voice, self.voice_match = list(voice), voice_match  # Segments to put first; both of who speaks first
        self.opening = None  # what the first turn continues: its text, and its frames as rows
        self.cache = None  # of the rows that went through the backbone
        self.prefilled = 0  # rows that went through it as prompt, in all
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
            state, interrupt = mimi.init_state(1), None
            with closing(frames):
                while not interrupt:
                    waiting = []
                    try:
                        waiting.extend(islice(frames, size))
                    except KeyboardInterrupt as e:  # what is finished is handed out before it goes on
                        interrupt = e
                    if not waiting:
                        break
                    with mx.stream(self.generator.codec_stream):  # beside the next frame, not behind it
                        audio, state = mimi.decode_step(mx.array(np.stack(waiting, axis=-1)[None]), state)
                        piece = audio[0, 0]
                        mx.async_eval(piece)
                    yield piece
            if interrupt:
                raise interrupt

        return pieces()

    def hear(self, segment):
        """Add a turn that somebody else spoke."""
        self._check_free()
        rows = self.generator.segment_rows(segment)
        self._check_length(len(rows), self.blocks[: self.n_kept])
        self.blocks.append(rows)
        self.turns.append(segment)

    def prompt(self, text, speaker=0):
        """The rows (T, K + 1) of the next turn before its speech; `blocks` go before them. ValueError: too many."""
        rows, bound = self._prompt(text, speaker)
        vars(self).update(bound)  # only now, since a prompt that is refused binds nobody to the voice
        return rows

    def _prompt(self, text, speaker):
        """These rows, and what the conversation's fields become with them."""
        g, opening = self.generator, self.opening
        voice = [replace(s, speaker=speaker) for s in self.voice]
        turns, blocks = voice + self.turns, [*map(g.segment_rows, voice), *self.blocks]
        n_kept = self.n_kept + len(voice)
        if g.model.config.voice_match if self.voice_match is None else self.voice_match:
            mine = [i for i, s in enumerate(turns[:n_kept]) if s.speaker == speaker]
            if mine:
                clip, block = turns.pop(mine[-1]), blocks.pop(mine[-1])
                opening, n_kept = (clip.text, block[block[:, -1] == NO_TEXT][:-1]), n_kept - 1
            elif self.voice_match:
                raise ValueError(f"voice_match continues a clip of speaker {speaker}, and the context has none")
        rows = g.text_rows(text, speaker)
        if opening:
            said, frames = opening
            rows = np.concatenate([g.text_rows(f"{said} {text}", speaker), frames])
        self._check_length(len(rows), blocks[:n_kept])
        bound = {"turns": turns, "blocks": blocks, "n_kept": n_kept, "opening": opening}
        return rows, bound | {"voice": [], "voice_match": False}

    def frames(self, text, speaker=0, *, max_audio_length_ms=None, seed=None, **sampling):
        """Say the next turn as frames of codes, (K,) int32 each. Arguments are checked at once, not at the first."""
        seed, sampling = self.generator.options(seed, sampling)
        max_frames = self.generator.max_frames(max_audio_length_ms, str(text))
        self._prompt(text, speaker)  # for its errors alone; bound is who speaks, not who asked to
        return self._frames(Segment(speaker, text), max_frames, seed, sampling)

    def _check_free(self):
        if self.busy:
            raise ValueError("a turn is still being said: finish its stream, or close it")

    def _check_length(self, n_rows, kept):
        n, limit = sum(map(len, kept)) + n_rows, self.generator.limit
        if n >= limit:
            hint = "shorten context or text (a long text: python -m csm_tools.narrate)"
            raise ValueError(f"the prompt takes {n} positions, and the model has {limit}: {hint}")

    def _frames(self, turn, max_frames, seed, sampling):
        self._check_free()
        rows, bound = self._prompt(turn.text, turn.speaker)
        held = {name: getattr(self, name) for name in bound}
        vars(self).update(bound)
        self._make_room(len(rows), max_frames)
        prompt, said, self.busy = np.concatenate([*self.blocks, rows]), [], True
        try:
            context = np.concatenate([rows[:0], *self.blocks[: self.n_kept]])
            cache = self.cache or self.generator.prefill(context)
            start = cache.offset if cache else 0
            self.prefilled += len(prompt) - start
            batch = self.generator.batch()
            uid = batch.insert(prompt[start:], max_frames, seed, sampling, cache, keep=True)
            while len(batch):
                for _, codes in batch.next():
                    if codes is not None:
                        said.append(codes)
                        yield codes
            turn.codes = mx.array(np.stack(said)) if said else mx.zeros((0, self.generator.codebooks), mx.int32)
            mx.eval(turn.codes)
            block = np.concatenate([rows, self.generator.audio_rows(turn)])
            cache = batch.remove(uid)
        except BaseException:  # abandoned, or failed
            vars(self).update(held)
            raise
        finally:
            self.busy = False
        cache.trim(cache.offset - len(prompt) - len(said) - 1)  # the frame of zeros stays, what followed goes
        self.cache = cache
        self.opening = None
        self.blocks.append(block)
        self.turns.append(turn)

    def _make_room(self, n_rows, max_frames):
        """Forget old turns where the prompt leaves no room for the speech, or a quarter of the positions."""
        limit, n = self.generator.limit, 0
        if sum(map(len, self.blocks)) + n_rows + min(max_frames, limit // 4) <= limit:
            return
        # Down to half of them at once, so that the next turns find their cache again.
        while len(self.blocks) > self.n_kept and sum(map(len, self.blocks)) + n_rows > limit // 2:
            del self.blocks[self.n_kept], self.turns[self.n_kept]
            n += 1
        if n:
            log.warning("%d old turns forgotten: the model has %d positions", n, limit)
            self.cache = None


def on_gpu():
    return mx.default_device() == mx.gpu


def compiles(model):
    """Whether to compile the depth decoder's loop: CSM_COMPILE=0 or 1, or else where it pays.

    On a CPU it takes 10 s once, by the C++ compiler, and saves a tenth of a large model's frame. Without a compiler MLX
    leaves functions as they are.
    """
    asked = os.environ.get("CSM_COMPILE", "")
    return asked == "1" if asked else on_gpu() or model.config.backbone.dim * model.config.decoder.dim >= 2e6


COMPILED = []  # MLX knows a function by its address, and another's may be the same once it is freed: none ever is


def compiled(generator):
    """The depth decoder's loop of a Generator, compiled: a function of its weights and `depth`'s arrays."""
    generator = weakref.ref(generator)

    def traced(weights, *arrays):
        # A copy, of the same arrays: it holds tracers afterwards, the shared model never.
        model = copy.deepcopy(generator().model)
        model.update(weights)
        return generator()._rest(model, *arrays)

    COMPILED.append(mx.compile(traced))
    return COMPILED[-1]


def join(pieces):
    whole = mx.concatenate([mx.zeros((0,)), *pieces])
    mx.eval(whole)
    return whole


# ---------------------------------------------------------------------------------------------------- loading, saving


def split_heads(weights):
    """Our layout's one `audio_head` (K - 1, D, V) as the model's matrices, `audio_head.i.weight` (V, D)."""
    if "audio_head" not in weights or weights["audio_head"].ndim != 3:
        return weights
    heads = {f"audio_head.{i}.weight": mx.contiguous(w.T) for i, w in enumerate(weights["audio_head"])}
    return {k: w for k, w in weights.items() if k != "audio_head"} | heads


def join_heads(weights):
    """The other way: `audio_head.i.weight` as one `audio_head`; quantized ones stay as they are."""
    names = sorted((k for k in weights if k.startswith("audio_head.")), key=lambda k: int(k.split(".")[1]))
    if not names or any(not k.endswith(".weight") for k in names):
        return weights
    others = {k: w for k, w in weights.items() if k not in names}
    return others | {"audio_head": mx.stack([weights[k].T for k in names])}


def dequantize_weights(config, weights, names=None):
    """{name: array} with the quantized matrices, or those of them in `names`, plain again."""
    weights, plain = dict(weights), dict(CSM(config).named_modules())
    for name, m in blank(config, weights).named_modules():
        if "scales" in m and (names is None or name in names):
            parts = [weights.pop(f"{name}.{part}", None) for part in ("weight", "scales", "biases")]
            weights[f"{name}.weight"] = mx.dequantize(*parts, **packing(m, plain[name].weight.shape[1]))
    return weights


def blank(config, weights):
    """A CSM of zeros to take `weights`: with quantized matrices where they are."""
    model = CSM(config)
    for name, m in model.named_modules():
        if f"{name}.scales" in weights:
            for part in ("weight", "scales", "biases"):
                if (w := weights.get(f"{name}.{part}")) is not None:
                    m[part] = mx.zeros((len(m.weight), *w.shape[1:]), w.dtype)
    return model


def locate(model):
    """What `load` was given -> the path of a local folder or file, downloaded if need be. Raises ValueError."""
    if model == "csm-1b":
        return codec.download(*DEFAULT_MODEL)
    if model == "tiny":  # beside csm.py, or, installed, in the package
        here = Path(__file__).resolve().parent
        places = [place for place in (here / "tiny", here / "csm_tools/tiny") if (place / "config.json").is_file()]
        return places[0] if places else here / "tiny"
    # A repository may hold its weights in several layouts: the MLX or Sesame ones first, in one file.
    kinds = ("model*.safetensors*", "ckpt.safetensors"), ("*.pt",), ("*.safetensors*",)
    known = "csm-1b, tiny, a folder, a .safetensors file or a Hugging Face repository"
    return codec.local(model, *kinds, beside=BESIDE, known=known)


def weights_file(path):
    """The file of a folder that holds a CSM's weights, or an index of such; None: there is none. A file is itself."""
    files = [f for pattern in WEIGHTS for f in sorted(path.glob(pattern))] if path.is_dir() else [path]
    return next((f for f in files if not any(map(f.match, codec.FILES))), None)


def read(path):
    """A folder or weights file in any layout -> (config, weights, (Mimi's config, weights) or None) in ours, lazily."""
    file = weights_file(path)
    if file is None:
        raise ValueError(f"{path} has no weights of a CSM: no .safetensors, no index of shards, no .pt")
    weights, metadata = codec.read_weights(file)
    config = json.loads(metadata.get("config", "{}")) | codec.read_json(file.with_name("config.json"))
    if config.get("layout") == "native" and file.suffix != ".gguf":
        return config, weights, None
    return codec.layouts(path).csm_to_native(config, weights, asdict(CSMConfig()))


def adapted(config, weights, folder, factor=1.0):
    """{name: array} with `factor` times what the adapter in a folder or Hub repository changes. Raises ValueError.

    Quantized matrices that are changed become plain.
    """
    files = "adapters.safetensors", "adapter.safetensors", "adapter_model.safetensors"  # csm-mlx's, ours; PEFT's
    place, layouts = codec.local(folder, files, beside=("adapter_config.json",)), codec.layouts(folder)
    kind, file = codec.read_json(place / "adapter_config.json"), codec.find(place, *files)
    if not kind or not file:
        raise ValueError(f"{folder} has no adapter_config.json and {files[0]} or {files[2]}")
    try:
        changes = layouts.adapter_to_native(asdict(config), kind, codec.read_safetensors(file)[0])
        names = {name.rpartition(".")[0] for name in changes}
        return layouts.apply_adapter(dequantize_weights(config, weights, names), changes, factor)
    except ValueError as e:
        raise ValueError(f"the adapter {folder}: {e}") from None


def load(model="csm-1b", *, dtype=None, quantize=None, group_size=64, adapter=None, codebooks=None):
    """A Generator.

    model: "csm-1b", "tiny", a folder, a weights file or a Hugging Face repository, in our layout or any that
    csm_layouts.py knows. dtype: of the computation, "float32", "bfloat16" or "float16"; None: bfloat16 on a GPU,
    float32 on the CPU, where the other types are slow. quantize: 4, 6 or 8 bits, mxfp4, nvfp4 or mxfp8. adapter: a
    folder or repository that finetune, PEFT or csm-mlx wrote, or a list of them and of (folder, factor). codebooks:
    speak the first so many, None for all; fewer are quicker and sound worse. What a folder lacks (Mimi, tokenizer) is
    taken from the default downloads. Raises ValueError.
    """
    path = locate(model)
    folder = path if path.is_dir() else path.parent
    fields, weights, mimi = read(path)
    config, weights = CSMConfig.from_dict(fields), split_heads(weights)
    for one in adapter if isinstance(adapter, list) else [adapter] if adapter else []:
        weights = adapted(config, weights, *(one if isinstance(one, tuple) else (one,)))
    if quantize:
        weights, kind = codec.layouts("what is quantized here").quantize(weights, quantize, group_size)
        config = replace(config, quantization=kind)
    dtype = as_dtype(dtype)
    weights = {k: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for k, w in weights.items()}
    network = blank(config, weights)
    codec.fill(network, weights)
    del weights
    beside = codec.find(folder, *codec.FILES)
    mimi = codec.load(beside) if beside else codec.from_weights(mimi[1], mimi[0]) if mimi else codec.load()
    elsewhere, names = config.text_tokenizer or DEFAULT_TOKENIZER, TOKENIZER[:2]
    tokenizer, file = codec.find(folder, *names), weights_file(path)
    if not tokenizer and file.suffix == ".gguf" and codec.layouts(file, "csm_gguf").read_tokenizer(file):
        tokenizer = file
    tokenizer = tokenizer or codec.find(codec.download(elsewhere, *TOKENIZER), *names)
    if tokenizer is None:
        raise ValueError(f"{elsewhere} has no {' or '.join(names)}")
    voices = dict.fromkeys(DEFAULT_VOICES) if model == "csm-1b" else {}
    voices |= {f.stem: f.parent for f in (folder / "prompts").glob("*.wav")}
    return Generator(network, mimi, Tokenizer(tokenizer), voices, fields, codebooks)


def as_dtype(dtype):
    if dtype is None:
        return mx.bfloat16 if on_gpu() else mx.float32
    name = str(dtype).removeprefix("mlx.core.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    return getattr(mx, name)


def write_folder(folder, files):
    """files: {name: a path to copy, a dict for JSON, a text, or (weights, metadata)}. All are written, or none."""
    folder = Path(os.path.realpath(folder))
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for name, content in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            elif isinstance(content, tuple):
                mx.save_safetensors(str(path), *content)
            else:
                text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                path.write_text(text, encoding="utf-8")
        if not folder.exists():
            staging.rename(folder)
            return
        for name in files:  # all are whole by now, and on the same disk
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(folder / name)
        for kind in (TOKENIZER, codec.FILES):  # of another model, which `load` might take in their place
            there = {f for pattern in kind for f in folder.glob(pattern)}
            if ours := there & {folder / name for name in files}:
                for f in there - ours:
                    f.unlink()
    except (OSError, RuntimeError) as e:  # RuntimeError: MLX, of a full disk
        raise ValueError(f"cannot write {folder}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- command


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
        if m := re.match(r"\s*\[?(\d+)\]?\s*:\s*(\S.*)", line):
            turns.append((int(m[1]), m[2].strip()))
        elif line.strip():
            raise ValueError(f"{path}, line {n}: expected `speaker: text`, such as `0: Hello.`")
    if not turns:
        raise ValueError(f"{path} holds no turns")
    return turns


def read_context(path):
    """JSON, a list of {"speaker", "text", "audio": path beside the JSON} -> Segments."""
    context = []
    try:
        for t in json.loads(read_text(f"@{path}")):
            speaker, audio = t["speaker"] if "speaker" in t else t["speaker_id"], t.get("audio") or t["audio_path"]
            context.append(Segment(int(speaker), t["text"], as_samples(Path(path).parent / audio)))
        return context
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, json.JSONDecodeError) as e:
        expected = '[{"speaker": 0, "text": "...", "audio": "file.wav"}, ...]'
        raise ValueError(f"{path}: expected {expected} ({type(e).__name__}: {e})") from None


QUANTIZE = {  # the option of that name
    "type": lambda x: int(x) if x.isdigit() else x,
    "choices": (4, 6, 8, "mxfp4", "nvfp4", "mxfp8"),
    "help": "bits of the weights, or another of MLX's ways",
}


def adapter(argument):
    """DIR or DIR=FACTOR -> (folder, factor)."""
    folder, _, factor = argument.rpartition("=")
    return (folder, float(factor)) if folder and not Path(argument).exists() else (argument, 1.0)


def add_model_options(p):
    """What `load_for` reads."""
    p.add_argument("--model", help="csm-1b, tiny, a folder, a weights file or a Hugging Face repo (default: csm-1b)")
    p.add_argument("--quantize", **QUANTIZE)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what suits the device")
    how = {"metavar": "DIR[=FACTOR]", "action": "append", "type": adapter}
    p.add_argument("--adapter", **how, help="of finetune, PEFT or csm-mlx; repeatable")
    p.add_argument("--codebooks", type=int, metavar="N", help="speak the first N only: quicker, and sounds worse")


def add_options(p):
    """The options of the command that other programs have as well."""
    add_model_options(p)
    p.add_argument("--speaker", type=int, default=0, help="speaker id of the text (default 0)")
    p.add_argument("--voice", help="preset, clip.wav with clip.txt beside it, or none (default: the model's own)")
    p.add_argument("--ref-audio", metavar="F", help="a clip of the voice to speak with")
    p.add_argument("--ref-text", metavar="T", help="what that clip says")
    p.add_argument("--temperature", type=float, help="0 is greedy (default 0.9)")
    p.add_argument("--top-k", type=int, help="0 is off (default 50)")
    p.add_argument("--top-p", type=float, help="1 is off (default)")
    p.add_argument("--min-p", type=float, help="0 is off (default)")
    p.add_argument("--seed", type=int, help="for the same speech again (default: drawn, and printed)")
    p.add_argument("--max-audio-length-ms", type=float, metavar="MS", help="a turn's (default: what its text can take)")
    p.add_argument("--watermark", action="store_true", help="mark the sound as generated (csm_tools.watermark)")


def read_options(args):
    """What add_options took -> the context, and the arguments of `generate`, checked before a model is loaded."""
    if (args.ref_audio is None) != (args.ref_text is None):
        raise ValueError("--ref-audio and --ref-text go together: a clip needs its transcript")
    context = [] if args.ref_audio is None else [Segment(args.speaker, args.ref_text, as_samples(args.ref_audio))]
    options = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "min_p")}
    Sampling(**{k: v for k, v in options.items() if v is not None})
    check_seed(args.seed or 0)
    return context, options | {"max_audio_length_ms": args.max_audio_length_ms}


def load_for(args):
    """The Generator that the options name; without --model CSM-1B, or, where it cannot be had, the one in the box."""
    how = {name: getattr(args, name) for name in ("dtype", "quantize", "adapter", "codebooks")}
    try:
        return load(args.model or "csm-1b", **how)
    except codec.DownloadError as e:
        if args.model:
            raise
        print(f"speaking with the small model in the box, tiny, since: {e}", file=sys.stderr)
        return load("tiny", **how)


def watermark():
    """A Watermark, by the program of that name, which this file does not depend on. ValueError: it cannot be had."""
    import importlib

    try:
        return importlib.import_module("csm_tools.watermark").load()
    except ImportError as e:
        raise ValueError(f"--watermark takes the folder csm_tools beside csm.py ({e})") from None


def command(args):
    from tqdm import tqdm

    if (args.dialogue is None) == (args.text is None):
        raise ValueError("give TEXT and OUT, or --dialogue and OUT, and not both")
    turns = read_dialogue(args.dialogue) if args.dialogue else [(args.speaker, read_text(args.text))]
    context, options = read_options(args)
    context += read_context(args.context) if args.context else []
    seed = secrets.randbits(32) if args.seed is None else args.seed
    live = args.stream or args.play or args.out == "-"
    options["streaming_interval"] = args.streaming_interval if live else 2.0

    bar = tqdm(unit="s", bar_format="{n:.1f} s of speech, {elapsed}", disable=None, leave=False, delay=0.1)
    n_samples, first, stopped, speaker = 0, 0.0, False, player() if args.play else nullcontext(lambda audio: None)
    with codec.audio_writer(args.out) as write, speaker as play, bar:  # which check OUT
        generator = load_for(args)
        rate, start = generator.sample_rate, time.perf_counter()
        talk = generator.conversation(context, voice=args.voice, voice_match=args.voice_match)
        pieces = (
            audio
            for i, (speaker, text) in enumerate(turns)
            for audio in talk.stream(text, speaker, seed=(seed + i) % 2**64, **options)
        )
        try:
            for audio in map(np.array, watermark().embed_stream(pieces, rate) if args.watermark else pieces):
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
        f"first audio after {first:.2f} s, peak memory {peak_memory() / 1e9:.2f} GB, seed {seed}",
        file=sys.stderr,
    )
    return 130 if stopped else 0


@contextmanager
def player():
    """A function that plays pieces of audio, 24 kHz, as they come."""
    try:
        import sounddevice

        speaker = sounddevice.OutputStream(samplerate=24_000, channels=1, dtype="float32")
    except Exception as e:  # no package, no PortAudio, no device
        raise ValueError(f"--play needs `pip install sounddevice` and a sound card: {e or type(e).__name__}") from None
    with speaker:
        yield lambda audio: speaker.write(audio[:, None])


def peak_memory():
    """Bytes: the larger of MLX's own peak, which a GPU's is, and the process's."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return max(mx.get_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def parser_for(name, **kind):
    """An ArgumentParser that calls itself as it was called, and says a mistake in one line."""
    import argparse

    called = Path(sys.argv[0]).name.removesuffix(".exe")
    p = argparse.ArgumentParser(prog=called if called == "csm" or called.startswith("csm-") else name, **kind)
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    return p


def run(p, function, args, interrupted="interrupted: no file was written"):
    """function(args) as the program of the parser `p`: what is wrong ends in one line and exit status 2."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that nothing half-made stays
    try:
        return function(args)
    except BrokenPipeError:  # the player at the other end of OUT - has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as e:
        p.exit(2, f"{p.prog}: error: {' '.join(str(e).split())}\n")
    except KeyboardInterrupt:
        p.exit(130, f"{interrupted}\n")


def main(argv=None):
    import argparse

    p = parser_for("csm.py", description="Text to speech with CSM, Sesame's speech model, on MLX.")
    p.add_argument("text", nargs="?", metavar="TEXT", help="what to say; - reads standard input, @file a file")
    p.add_argument("out", metavar="OUT", help="a .wav, .flac, .mp3, .ogg or .opus file; - is standard output, as WAV")
    add_options(p)
    p.add_argument("--context", metavar="JSON", help='earlier turns: [{"speaker", "text", "audio"}, ...]')
    how = {"action": argparse.BooleanOptionalAction}
    p.add_argument("--voice-match", **how, help="continue the speaker's last clip (default: as the model's config)")
    p.add_argument("--dialogue", metavar="F", help='speak a script: lines "0: Hello."')
    p.add_argument("--stream", action="store_true", help="write every --streaming-interval seconds")
    p.add_argument("--streaming-interval", type=float, default=0.5, metavar="S")
    p.add_argument("--play", action="store_true", help="play while generating")
    return run(p, command, p.parse_intermixed_args(argv))


if __name__ == "__main__":
    sys.exit(main())
