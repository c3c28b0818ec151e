"""A picture of what the model does with a sentence: prompt, codes, doubt, attention and sound of one run.

    python -m csm_tools.show "hello world" hello.png --model tiny

All is seen from outside. The speech is generated as ever; then its rows pass through the model once more, with the
codes that were drawn given ("teacher-forced"), which makes again the logits that each code was drawn from.

Shapes: S rows, T of the prompt and then one a frame; F frames, that of zeros among them; K codebooks; L layers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import csm  # before mlx
import mimi

import mlx.core as mx  # isort: skip
import numpy as np

FORMATS = (".png", ".svg", ".pdf")
KINDS = {  # what a cell of the rows may be, in colours of Okabe and Ito, which the colour-blind can tell apart
    "off: the mask drops it": "#ececec", "text": "#e69f00", "a clip's codes": "#0072b2",
    "codes just said, which go back in": "#56b4e9", "frame of zeros: end of a turn": "#000000",
}  # fmt: skip
CHUNK = 64  # frames at once through the depth decoder: bounds memory


@dataclass
class Run:
    """What was seen of one utterance."""

    rows: np.ndarray  # (S, K + 1) int32: codes and text id; csm.NO_TEXT in the text column of an audio row
    n_prompt: int  # T
    ended: bool  # by a frame of zeros, the last row; else the speech was cut off
    entropy: np.ndarray  # (F, K) bits: of what each code was drawn from, before temperature and top-k
    attention: np.ndarray  # (L, F, S - 1): from the row that foretells a frame to all up to itself; mean over heads
    audio: np.ndarray  # (samples,) float32
    title: str

    def stretches(self):
        """[(whether of text, first row, row behind the last)]"""
        text = self.rows[:, -1] != csm.NO_TEXT
        edges = [0, *(np.flatnonzero(np.diff(text)) + 1), len(text)]
        return [(bool(text[a]), a, b) for a, b in zip(edges, edges[1:])]

    def reader(self):
        """The layer that attends most to the text being said. (The first row is where heads rest: it does not count.)"""
        _, first, end = [s for s in self.stretches() if s[0]][-1]
        return int(self.attention[:, :, max(first, 1) : end].sum(axis=(1, 2)).argmax())


def observe(generator, text, speaker=0, context=(), *, voice=None, max_audio_length_ms=None, seed=None, **sampling):
    """Say `text` with the arguments of Generator.generate -> Run."""
    seed, _ = generator.options(seed, sampling)
    context = [generator.encode(segment) for segment in context]
    prompt = np.concatenate(generator.prompt(text, speaker, context, voice))
    codes = generator.generate_codes(
        text, speaker, context, voice=voice, max_audio_length_ms=max_audio_length_ms, seed=seed, **sampling
    )
    T, model = len(prompt), generator.model
    ended = len(codes) < min(generator.max_frames(max_audio_length_ms, text), generator.limit - T)
    rows = np.concatenate([prompt, generator.audio_rows(csm.Segment(speaker, text, codes=codes), end=ended)])
    h, attention = read(model, rows[:-1], T - 1)  # what follows the last row was not asked
    said = mx.array(rows[T:, :-1])
    bits = [entropy(generator, h[i : i + CHUNK], said[i : i + CHUNK]) for i in range(0, len(said), CHUNK)]
    title = f'"{text}", speaker {speaker}, seed {seed}'
    return Run(rows, T, ended, np.concatenate(bits), attention, np.array(generator.decode(codes)), title)


def read(model, rows, first):
    """Rows (S, K + 1) -> of those from `first` on: hidden states (n, D), attention (L, n, S), the mean over heads.

    The backbone attends by one function of MLX: while it reads, that one is replaced by one that also takes notes.
    """
    plain, seen, ids = mx.fast.scaled_dot_product_attention, [], mx.array(rows)[None]
    earlier = mx.arange(len(rows)) <= mx.arange(first, len(rows))[:, None]  # (n, S)

    def noting(q, k, v, *, scale, **rest):  # q (1, H, S, head_dim), k (1, H_kv, S, head_dim)
        H, shared = q.shape[1], q.shape[1] // k.shape[1]
        mean = mx.zeros(earlier.shape)
        for i in range(H):
            scores = scale * (q[0, i, first:] @ k[0, i // shared].T).astype(mx.float32)
            mean = mean + mx.softmax(mx.where(earlier, scores, -mx.inf), axis=-1) / H
        seen.append(np.array(mean))
        return plain(q, k, v, scale=scale, **rest)

    mx.fast.scaled_dot_product_attention = noting
    try:
        h = model(mx.maximum(ids, 0), csm.row_mask(ids))
    finally:
        mx.fast.scaled_dot_product_attention = plain
    return h[0, first:], np.stack(seen)


def entropy(generator, h, codes):
    """Hidden states h (n, D), the frames that they foretold (n, K) -> (n, K) bits. 0: sure; log2 V: no idea."""
    model = generator.model
    logits = mx.concatenate([model.head(0, h)[:, None], model.depth_logits(h, codes)], axis=1)
    logits = logits[..., : generator.mimi.config.codebook_size].astype(mx.float32)  # ids beyond are never drawn
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(-(mx.exp(logp) * logp).sum(axis=-1)) / np.log(2)


def pieces(tokenizer, ids):
    """Token ids -> what each stands for, or its number where a picture's font may lack the letters."""
    if tokenizer.path.suffix == ".json":
        from tokenizers import Tokenizer

        t = Tokenizer.from_file(str(tokenizer.path))
        names = [t.decode([i], skip_special_tokens=False) for i in ids]
    else:
        import sentencepiece

        t = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
        names = [t.id_to_piece(i) for i in ids]
    names = [x.replace("▁", " ").replace(" ", "␣") for x in names]
    return [x if all(c == "␣" or c.isprintable() and ord(c) < 0x250 for c in x) else str(i) for x, i in zip(names, ids)]


def draw(run, generator, layer=None):
    """Run -> matplotlib's Figure, 1200 pixels wide. layer: of the attention; None: Run.reader."""
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.mlab import specgram
    from matplotlib.patches import Patch

    layer = run.reader() if layer is None else layer
    if not 0 <= layer < len(run.attention):
        raise ValueError(f"the backbone has layers 0 to {len(run.attention) - 1}, not {layer}")
    codec, S, T, (F, K) = generator.mimi.config, len(run.rows), run.n_prompt, run.entropy.shape
    text, codes, end = run.rows[:, -1] != csm.NO_TEXT, run.rows[:, :-1], F / codec.frame_rate
    names = dict(zip(np.flatnonzero(text), pieces(generator.tokenizer, run.rows[text, -1].tolist())))
    heights = [1.4, 2, 2, float(np.clip(0.115 * S, 2.4, 5)), 1, 1.8]  # inches of the panels alone
    fig = Figure(figsize=(12, sum(heights) + 4), dpi=100, layout="constrained")
    title = run.title if len(run.title) < 110 else f"{run.title[:70]} ... {run.title[-35:]}"
    patches = [Patch(color=color) for color in KINDS.values()]
    fig.legend(patches, KINDS, loc="outside upper center", ncols=5, frameon=False, title=title, title_fontsize=13)
    grid = fig.add_gridspec(6, 2, width_ratios=[1, 0.013], height_ratios=heights)
    panels = [fig.add_subplot(grid[i, 0]) for i in range(6)]

    def panel(i, title, label, image=None, bar="", extent=None, **how):
        ax = panels[i]
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_ylabel(label)
        if i:  # on one axis of time
            ax.axvline(end - 1 / codec.frame_rate if run.ended else end, color="#d55e00", ls="--")
            ax.set_xlim(0, end)
            ax.tick_params(labelbottom=i == 5)
        if image is not None:
            image = ax.imshow(image, extent=extent, aspect="auto", **how)
            fig.colorbar(image, cax=fig.add_subplot(grid[i, 1]), label=bar)
        return ax

    kind = np.zeros((K + 1, S), int)  # of each cell, of KINDS
    kind[-1, text], kind[:-1, ~text], kind[:-1, T:] = 1, 2, 3
    kind[:-1, ~text & ~codes.any(axis=1)] = 4
    ax = panel(0, f"rows: {T} of the prompt, then one a frame; a row is the sum of what its mask keeps", "codebook")
    ax.pcolormesh(kind, cmap=ListedColormap([*KINDS.values()]), vmin=0, vmax=4, ec="w", lw=0.5 if S <= 120 else 0)
    ax.invert_yaxis()
    ax.set_yticks([0.5, K - 0.5, K + 0.5], ["0", str(K - 1), "text"])
    if S <= 100:
        turned = 90 * (S * max(map(len, names.values())) > 150)  # where they would touch
        ax.set_xticks([i + 0.5 for i in names], names.values(), rotation=turned, fontsize=8, family="monospace")
    ax.set_xlabel(f"row 0 to {S - 1}")

    how = {"extent": (0, end, K - 0.5, -0.5), "vmin": 0, "interpolation": "nearest"}
    title = "codes: a column is a frame, a colour a code's number; " + (
        "all zeros is the end (dashed)" if run.ended else "cut off, no frame of zeros came"
    )
    ax = panel(1, title, "codebook", codes[T:].T, "code", vmax=codec.codebook_size - 1, **how)
    if F <= 36 and K <= 16:
        for (f, k), code in np.ndenumerate(codes[T:]):
            ink = "k" if code > codec.codebook_size / 2 else "w"
            ax.text((f + 0.5) / codec.frame_rate, k, code, ha="center", va="center", color=ink, fontsize=8)
    most = np.log2(codec.codebook_size)
    title = f"doubt: entropy of what each code was drawn from; 0 is sure of one code, {most:g} bits would be no idea"
    panel(2, title, "codebook", run.entropy.T, "entropy (bits)", cmap="magma", **how)
    title = (
        f"attention of the backbone's layer {layer}, mean over its heads: from a frame's time, across, to earlier rows"
    )
    how = {"extent": (0, end, S - 1.5, -0.5), "norm": PowerNorm(0.5, 0), "cmap": "cividis"}
    ax = panel(3, title, "row attended to", run.attention[layer].T, "weight (sum 1)", **how)
    if S <= 45:
        said = {T + f: f"frame {f}" for f in range(F - 1)}
        labels = {i: names.get(i, said.get(i, "clip")) for i in range(S - 1)}
        ax.set_yticks([*labels], labels.values(), fontsize=7, family="monospace")
    else:
        parts = [("text" if words else "clip" if b <= T else "speech", a, b) for words, a, b in run.stretches()]
        ax.set_yticks(*zip(*[((a + b - 1) / 2, name) for name, a, b in parts if b - a > S / 30]))
        for _, a, _ in parts[1:]:
            ax.axhline(a - 0.5, color="w", lw=0.5)
    ax = panel(4, f"waveform: {len(run.audio) / codec.sample_rate:.2f} s, 24 kHz; 1 is full scale", "amplitude")
    ax.plot(np.arange(len(run.audio)) / codec.sample_rate, run.audio, lw=0.5, color="#0072b2")
    if len(run.audio):
        power, _, _ = specgram(np.pad(run.audio, 256), NFFT=512, Fs=codec.sample_rate, noverlap=256)
        db = 10 * np.log10(np.maximum(power / max(power.max(), 1e-20), 1e-6))
        how = {"extent": (0, len(run.audio) / codec.sample_rate, 0, codec.sample_rate / 2000), "origin": "lower"}
        panel(
            5,
            "spectrogram, of windows of 21 ms",
            "frequency (kHz)",
            db,
            "level (dB of peak)",
            cmap="magma",
            interpolation="nearest",
            **how,
        )
    panels[5].set_xlabel("time (s)")
    return fig


def command(args):
    suffix = Path(args.out).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot write {args.out}: the suffix must be one of {' '.join(FORMATS)}")
    text = csm.read_text(args.text)
    context, options = csm.read_options(args)
    with mimi.replacing(args.out) as file:
        generator = csm.load_for(args)
        context += csm.read_context(args.context) if args.context else []
        run = observe(generator, text, args.speaker, context, voice=args.voice, seed=args.seed, **options)
        draw(run, generator, args.layer).savefig(file, format=suffix[1:])
    bits = ", ".join(f"{x:.1f}" for x in run.entropy.mean(axis=0))
    print(f"{len(run.audio) / generator.sample_rate:.2f} s of audio, {run.title.rpartition(', ')[2]}", file=sys.stderr)
    print(f"entropy by codebook, mean over frames: {bits} bits", file=sys.stderr)


def main(argv=None):
    p = csm.parser_for("show.py", description="A picture of what the model does with a sentence.")
    p.add_argument("text", metavar="TEXT", help="what to say; - reads standard input, @file a file")
    p.add_argument("out", metavar="OUT", help="a .png, .svg or .pdf file")
    csm.add_options(p)
    p.add_argument("--context", metavar="JSON", help='earlier turns: [{"speaker", "text", "audio"}, ...]')
    p.add_argument("--layer", type=int, help="of the backbone, whose attention is shown (default: what reads most)")
    return csm.run(p, command, p.parse_args(argv), "interrupted: no picture was written")


if __name__ == "__main__":
    sys.exit(main())
