"""CSM in NumPy's float64, without a cache and independent of csm.py: the reference of tests/test_fuzz.py.

Written from the model's definition (summed embeddings, two Llamas with RoPE on neighbours, 1 + (K - 1) heads) and that
of sampling (filters on the untempered probabilities, then Gumbel-max with the seed's noise).

It does not generate speech but judges it: one pass over the prompt and all frames gives the logits of every code, and
each code must be the one that its logits and noise choose. So a tie cannot hide later errors.
"""

from collections import Counter
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

TIE = 3e-5  # allowed float32 error in the scores of two codes
counts = Counter()  # judged codes, and those decided by a tie


@dataclass
class Options:
    """Sampling options. functions: (said (F,), logits (V,)) -> logits. rank: a sampler that takes the rank-th code."""

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    functions: list = field(default_factory=list)
    rank: int | None = None
    frames: int = 2**30  # the sampler gives zeros after so many frames


class Reference:
    def __init__(self, config, weights, tokenizer, n_codes, codebooks, tie=TIE):
        """config: config.json in our layout. weights: {name: array}, unquantized, `audio_head` (K - 1, D, V)."""
        self.config, self.tokenizer, self.n_codes, self.n = config, tokenizer, n_codes, codebooks
        self.limit, self.tie = config["backbone"]["max_positions"], tie
        self.K, self.V = config["audio_num_codebooks"], config["audio_vocab_size"]
        self.w = {name: np.array(w, np.float64) for name, w in weights.items()}

    # ---- the network

    def llama(self, part, x):
        """(B, T, D) -> (B, T, D)."""
        c, (_, T, _) = self.config[part], x.shape
        H, H_kv, d = c["n_heads"], c["n_kv_heads"], c["head_dim"]
        angles = np.arange(T)[:, None] * frequencies(c)
        future = np.triu(np.full((T, T), -np.inf), 1)
        for i in range(c["n_layers"]):
            w = {name: self.w[f"{part}.layers.{i}.{name}.weight"] for name in NAMES}
            y = norm(x, w["input_layernorm"], c)
            q, k, v = (
                (y @ w[f"self_attn.{name}_proj"].T).reshape(*y.shape[:2], n, d).swapaxes(1, 2)
                for name, n in (("q", H), ("k", H_kv), ("v", H_kv))
            )
            q, k = rotated(q, angles), rotated(k, angles)
            k, v = (z.repeat(H // H_kv, axis=1) for z in (k, v))
            scores = q @ k.swapaxes(2, 3) / np.sqrt(d) + future
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            y = (p / p.sum(axis=-1, keepdims=True)) @ v
            x = x + y.swapaxes(1, 2).reshape(*x.shape[:2], H * d) @ w["self_attn.o_proj"].T
            y = norm(x, w["post_attention_layernorm"], c)
            gate = y @ w["mlp.gate_proj"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
        return norm(x, self.w[f"{part}.norm.weight"], c)

    def embed(self, rows):
        """Rows (T, K + 1), -1: empty -> (T, D)."""
        audio, text = self.w["audio_embeddings.weight"], self.w["text_embeddings.weight"]
        x = [[audio[code + self.V * k] for k, code in enumerate(row[:-1]) if code >= 0] for row in rows]
        return np.array([sum(cells, text[row[-1]] if row[-1] >= 0 else 0) for row, cells in zip(rows, x)])

    def logits(self, rows, frames):
        """A prompt's rows and the frames (F, n) that follow -> each code's logits given all earlier ones (F, n, V)."""
        F, n = frames.shape
        h = self.llama("backbone", self.embed(np.concatenate([rows, self.audio(frames)]))[None])
        h = h[0, len(rows) - 1 : len(rows) - 1 + F]
        codes = self.w["audio_embeddings.weight"][frames + self.V * np.arange(n)]  # (F, n, D)
        x = np.concatenate([h[:, None], codes[:, :-1]], axis=1) @ self.w["projection.weight"].T
        y = self.llama("decoder", x)
        first = h @ self.w["codebook0_head.weight"].T
        return np.stack([first, *(y[:, i] @ self.w["audio_head"][i - 1] for i in range(1, n))], axis=1)

    # ---- prompts

    def text(self, text, speaker):
        spaced = f"[{speaker}] {text.lstrip()}" if self.config.get("speaker_prefix_space") else f"[{speaker}]{text}"
        ids = self.tokenizer.encode(spaced, add_special_tokens=False).ids
        ids = [self.tokenizer.token_to_id("<bos>"), *ids, self.tokenizer.token_to_id("<eos>")]
        return np.array([[-1] * self.K + [i] for i in ids])

    def audio(self, codes):
        """Frames (F, n) -> rows (F, K + 1)."""
        codes = np.array(codes, int)
        codes = codes if codes.size else np.zeros((0, self.n), int)
        return np.pad(codes, [(0, 0), (0, self.K + 1 - codes.shape[1])], constant_values=-1)

    def turn(self, speaker, text, codes):
        """A finished turn's rows: its text, its frames, and a frame of zeros."""
        frames = self.audio(codes)
        end = np.where(frames[:1] < 0, -1, 0) if len(frames) else self.audio(np.zeros((1, self.n)))
        return np.concatenate([self.text(text, speaker), frames, end])

    def new_turn(self, speaker, text, clip=None):
        """A turn to be spoken. clip: (speaker, text, codes) that it continues, without a frame of zeros in between."""
        if not clip:
            return self.text(text, speaker)
        return np.concatenate([self.text(f"{clip[1]} {text}", speaker), self.audio(clip[2])])

    # ---- the judge

    def judge(self, rows, frames, max_frames, seed, options, ended=True):
        """Assert that the prompt's speech consists of these frames or, if it has not ended, begins with them."""
        frames = np.array(frames, int).reshape(-1, self.n)
        max_frames = min(max_frames, self.limit - len(rows))
        assert len(frames) <= max_frames and frames.any(axis=1).all(), "too many frames, or one of zeros"
        if ended and len(frames) < max_frames:
            frames = np.pad(frames, [(0, 1), (0, 0)])  # which ended it
        if not len(frames):
            return
        logits, key = self.logits(rows, frames), mx.random.key(seed)
        for f, frame in enumerate(frames):
            now, key = mx.random.split(key)
            noise = np.array(mx.random.gumbel((1, self.n, self.V), key=now))[0]
            for k, code in enumerate(frame):
                wrong = self.misses(logits[f, k], noise[k], code, options, f, frames[:f, 0] if k == 0 else None)
                assert not wrong, f"frame {f} of {len(frames)}, codebook {k}: {wrong}"

    def misses(self, logits, noise, code, options, f, said):
        """What is wrong with `code`, or "" if it is the drawn code or tied with it. said: only for codebook 0."""
        for function in options.functions if said is not None else ():
            logits = function(said, logits)
        counts["codes"] += 1
        if not 0 <= code < self.n_codes:
            return f"{code} is no code"
        logits = logits[: self.n_codes]
        if options.rank is not None:
            if f >= options.frames:
                return "" if code == 0 else f"{code}, and the sampler gave 0"
            return near(-abs(logits - np.sort(logits)[-1 - options.rank]), code, self.tie)
        if options.temperature < 1e-6:
            return near(logits, code, self.tie)
        logp = logits - logits.max()
        logp = logp - np.log(np.exp(logp).sum())
        sure, perhaps = (self.kept(logp, options, sign * self.tie) for sign in (-1, 1))
        score = logp / options.temperature + noise[: self.n_codes]
        if not perhaps[code]:
            return f"{code}, which a filter leaves out"
        score[~sure & (np.arange(len(score)) != code)] = -np.inf
        return near(score, code, self.tie * (1 + 1 / options.temperature))

    def kept(self, logp, options, slack):
        """The ids that pass the filters; with slack > 0 those that may pass, with slack < 0 those that surely do."""
        likelier = logp[None] > logp[:, None] + slack  # [i, j]: whether j is likelier than i
        np.fill_diagonal(likelier, False)
        rank, mass = likelier.sum(axis=1), (likelier * np.exp(logp)).sum(axis=1)
        keep = np.ones(len(logp), bool)
        if options.top_k:
            keep &= rank < options.top_k
        if 0 < options.top_p < 1:
            keep &= mass < options.top_p + slack
        if options.min_p:
            keep &= (logp >= logp.max() + np.log(options.min_p) - slack) | (rank < options.min_tokens_to_keep)
        return keep


NAMES = (
    "input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)  # fmt: skip


def norm(x, weight, c):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.get("norm_eps", 1e-5)) * weight


def rotated(x, angles):
    """RoPE of x (B, H, T, d), which rotates pairs of neighbours."""
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles), np.sin(angles)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def frequencies(c):
    """RoPE's frequencies (d / 2,). Llama 3 lowers those with long waves."""
    f, s = c["rope_theta"] ** -(np.arange(0, c["head_dim"], 2) / c["head_dim"]), c["rope_scaling"]
    if s is None:
        return f
    original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    out = []
    for x in f:
        wave = 2 * np.pi / x
        smooth = (original / wave - low) / (high - low)
        between = (1 - smooth) * x / s["factor"] + smooth * x
        out.append(x if wave < original / high else x / s["factor"] if wave > original / low else between)
    return np.array(out)


def near(scores, code, tie):
    """What is wrong with `code`, or "" if its score is the highest or nearly so."""
    lack = scores.max() - scores[code]
    counts["ties"] += 0 < lack <= tie
    return "" if lack <= tie else f"{code} and not {scores.argmax()}, which is better by {lack:.2g}"
