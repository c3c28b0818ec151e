"""A picture of what the model does with a sentence: rows, codes, entropy, attention and sound of one run.

    python -m csm_tools.show "How are you today?" hello.png --model tiny

All is seen from outside. The speech is generated as ever; then its rows pass through the model once more, with the
codes that were drawn given ("teacher-forced"), which makes again the logits that each code was drawn from.

Shapes: S rows, T of the prompt and then one a frame; F frames, that of zeros among them; K codebooks; L layers.
"""

import sys
import warnings
from dataclasses import dataclass
from textwrap import shorten
from unittest.mock import patch

import csm  # before mlx
import mimi
from csm_tools import command

import mlx.core as mx  # isort: skip
import numpy as np

KINDS = {  # of a row's cells, in colours of Okabe and Ito, which the colour-blind can tell apart
    "off: the mask drops it": "#ececec", "text": "#e69f00", "a clip's codes": "#0072b2",
    "codes just said, which go back in": "#56b4e9", "frame of zeros: end of a turn": "#000000",
}  # fmt: skip


@dataclass
class Run:
    """What was seen of one utterance."""

    title: str
    rows: np.ndarray  # (S, K + 1) int32: codes and text id; csm.NO_TEXT in the text column of an audio row
    n_prompt: int  # T
    ended: bool  # by a frame of zeros, the last row; else the speech was cut off
    entropy: np.ndarray  # (F, K) bits: of what each code was drawn from, before temperature and top-k
    attention: np.ndarray  # (L, F, S - 1): from the row that foretells a frame to all up to itself; mean over heads
    audio: np.ndarray  # (samples,) float32


def observe(generator, text, speaker=0, context=(), *, voice=None, seed=None, **options):
    """Say `text` with the arguments of Generator.generate -> Run."""
    seed, _ = generator.read_options(seed)
    context = [generator.encode(segment) for segment in context]
    prompt = np.concatenate(generator.prompt(text, speaker, context, voice))
    codes = generator.generate_codes(text, speaker, context, voice=voice, seed=seed, **options)
    T = len(prompt)
    ended = len(codes) < min(
        generator.max_frames(options.get("max_audio_length_ms"), text), generator.max_positions - T
    )
    rows = np.concatenate([prompt, generator.audio_rows(csm.Segment(speaker, text, codes=codes))[: len(codes) + ended]])
    h, attention = read(generator.model, rows[:-1], T - 1)  # the last row was not asked what follows it
    bits = [entropy(generator, h[i : i + 64], rows[T:][i : i + 64, :-1]) for i in range(0, len(h), 64)]  # bounds memory
    title = shorten(f"seed {seed}, speaker {speaker}: {text}", 110).replace("$", r"\$")
    return Run(title, rows, T, ended, np.concatenate(bits), attention, np.array(generator.decode(codes)))


def read(model, rows, first):
    """Rows (S, K + 1) -> of those from `first` on: hidden states (n, D), attention (L, n, S), the mean over heads."""
    plain, seen, ids = mx.fast.scaled_dot_product_attention, [], mx.array(rows)[None]
    earlier = mx.arange(len(rows)) <= mx.arange(first, len(rows))[:, None]  # (n, S)

    def noting(q, k, v, *, scale, **rest):  # q (1, H, S, head_dim), k (1, H_kv, S, head_dim)
        keys = mx.repeat(k, q.shape[1] // k.shape[1], axis=1)
        scores = scale * (q[0, :, first:] @ keys[0].swapaxes(1, 2)).astype(mx.float32)  # (H, n, S)
        seen.append(np.array(mx.softmax(mx.where(earlier, scores, -mx.inf), axis=-1).mean(axis=0)))
        return plain(q, k, v, scale=scale, **rest)

    with patch.object(mx.fast, "scaled_dot_product_attention", noting):  # by which alone the backbone attends
        h = model(ids)
    return h[0, first:], np.stack(seen)


def entropy(generator, h, codes):
    """Hidden states h (n, D), the frames that they foretold (n, K) -> (n, K) bits. 0: sure; log2 V: no idea."""
    n, V = (codes[0] >= 0).sum(), generator.mimi.config.codebook_size  # --codebooks n; ids beyond V are never drawn
    logits = generator.model.head(0, h)[:, None], generator.model.depth_logits(h, mx.array(np.maximum(codes, 0)))
    logits = mx.concatenate(logits, axis=1)[:, : int(n), :V].astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(-(mx.exp(logp) * logp).sum(axis=-1)) / np.log(2)


def pieces(tokenizer, ids):
    """Token ids -> what each stands for, or its number where the picture's font may lack the letters."""
    if tokenizer.path.suffix == ".json":
        from tokenizers import Tokenizer

        names = Tokenizer.from_file(str(tokenizer.path)).decode_batch([[i] for i in ids], skip_special_tokens=False)
    else:
        from sentencepiece import SentencePieceProcessor

        names = SentencePieceProcessor(model_file=str(tokenizer.path)).id_to_piece(ids)
    names = [name.replace("▁", "_").replace(" ", "_") for name in names]
    return [name if all("!" <= x < "ʰ" or x == "θ" for x in name) else str(i) for name, i in zip(names, ids)]


def draw(run, generator, layer=None):
    """Run -> matplotlib's Figure, 1200 pixels wide. layer: None for what looks at the text most, but row 0, a sink."""
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    c, S, T, (F, K) = generator.mimi.config, len(run.rows), run.n_prompt, run.entropy.shape
    text, codes = run.rows[:, -1] != csm.NO_TEXT, run.rows[:, :-1]
    starts = [0, *np.flatnonzero(np.diff(text)) + 1]  # of text and audio in turn; the last two: of what is said now
    layer = run.attention[:, :, max(starts[-2], 1) : T].sum((1, 2)).argmax() if layer is None else layer
    end, seconds = F / c.frame_rate, len(run.audio) / c.sample_rate
    fig = Figure(figsize=(12, 16.5), dpi=100, layout="constrained")
    axes, bars = fig.subplots(6, 2, width_ratios=[1, 0.013], height_ratios=[1.4, 2, 2, 4.4, 1, 1.8]).T

    def panel(i, title, label, image=None, bar=None):
        axes[i].set_title(title, loc="left", fontsize=10)
        axes[i].set_ylabel(label)
        fig.colorbar(image, cax=bars[i], label=bar) if image else bars[i].remove()
        if i:  # on one axis of time
            axes[i].axvline(end - 1 / c.frame_rate if run.ended else end, color="#d55e00", ls="--")
            axes[i].set_xlim(0, end)

    on = np.array(csm.row_mask(mx.array(run.rows)))  # (S, K + 1)
    kind = np.select([text, ~(codes > 0).any(axis=1), np.arange(S) < T], [1, 4, 2], 3)  # of each row, of KINDS
    patches = [Patch(color=color) for color in KINDS.values()]
    fig.legend(patches, KINDS, loc="outside upper center", ncols=5, frameon=False, title=run.title, title_fontsize=13)
    look = {"cmap": ListedColormap([*KINDS.values()]), "ec": "w", "lw": 0.5 * (S <= 120)}
    y = [*range(on.shape[1]), on.shape[1] + on.shape[1] // 9 - 1]  # the text's column is wider among many
    axes[0].pcolormesh(range(S + 1), y, (on * kind[:, None]).T, vmin=0, vmax=4, **look)
    axes[0].set(ylim=(y[-1], 0), yticks=[0.5, (y[-1] + y[-2]) / 2], yticklabels=[0, "text"])
    names = np.array(["clip"] * T + [f"frame {f}" for f in range(F)], dtype=object)  # of each row
    names[text] = words = pieces(generator.tokenizer, run.rows[text, -1].tolist())
    if S <= 80:  # upright where they would touch
        axes[0].set_xticks(np.flatnonzero(text) + 0.5, words, size=8, rotation=90 * (S * max(map(len, words)) > 150))
    panel(0, f"rows 0 to {S - 1}: {T} of the prompt, then one a frame; a row is the sum of what is on", "codebook")
    area = {"extent": (0, end, K - 0.5, -0.5), "aspect": "auto", "interpolation": "nearest", "vmin": 0}
    image = axes[1].imshow(codes[T:, :K].T, vmax=c.codebook_size - 1, **area)
    for (f, k), code in np.ndenumerate(codes[T:, :K] if F <= 36 and K <= 16 else []):
        ink = "k" if code > c.codebook_size / 2 else "w"
        axes[1].text((f + 0.5) / c.frame_rate, k, code, color=ink, ha="center", va="center", fontsize=8)
    ending = "the column of zeros is the end (dashed)" if run.ended else "cut off: no column of zeros came"
    panel(1, f"codes: a column is a frame, a colour the number of a code; {ending}", "codebook", image, "code")
    image, most = axes[2].imshow(run.entropy.T, cmap="magma", **area), f"{np.log2(c.codebook_size):g} bits are no idea"
    panel(2, f"entropy of what each code was drawn from: 0 is certain, {most}", "codebook", image, "bits")
    area = {"extent": (0, end, S - 1.5, -0.5), "aspect": "auto", "norm": PowerNorm(0.5, 0), "cmap": "cividis"}
    image, parts = axes[3].imshow(run.attention[layer].T, **area), [*zip(starts, [*starts[1:], S - 1])]
    labels = {(a + b - 1) / 2: "text" if text[a] else "clip" if a < T else "speech" for a, b in parts if b - a > S / 30}
    if S <= 45:
        labels = dict(enumerate(names[:-1]))
    axes[3].set_yticks([*labels], labels.values(), fontsize=7 if S <= 45 else 10)
    axes[3].hlines([a - 0.5 for a, _ in parts[1:]], 0, end, color="w", lw=0.5)
    panel(3, f"attention, layer {layer}, mean over heads: from frames (across) to rows", "row", image, "weight (sum 1)")
    axes[4].plot(np.arange(len(run.audio)) / c.sample_rate, run.audio, lw=0.5, color="#0072b2")
    panel(4, f"waveform: {seconds:.2f} s, {c.sample_rate / 1000:g} kHz; 1 is full scale", "amplitude")
    if seconds:
        how = {"Fs": c.sample_rate / 1000, "xextent": (0, seconds), "cmap": "magma", "interpolation": "nearest"}
        *_, image = axes[5].specgram(np.pad(run.audio, 256), NFFT=512, noverlap=256, vmin=-80, **how)
    panel(5, "spectrogram: windows of 512 samples", "frequency (kHz)", image if seconds else None, "level (dB/kHz)")
    axes[5].set_xlabel("time (s)")
    return fig


def program(args):
    kind = args.out.rpartition(".")[2].lower()
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"cannot write {args.out}: the suffix must be .png, .svg or .pdf")
    command.need("show", "matplotlib")
    text, (context, options) = command.read_text(command.check_text(args.text)), command.read_options(args)
    context += command.read_context(args)[0]
    with mimi.replacing(args.out) as file:
        generator = command.load_for(args)
        run = observe(generator, text, args.speaker, context, voice=args.voice, seed=args.seed, **options)
        command.warn(args, context, [args.speaker])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph ")  # of a text's letters that the font lacks: a box is drawn
            draw(run, generator).savefig(file, format=kind)
    print(run.title, file=sys.stderr)


def main(argv=None):
    p = command.parser_for("show", description=__doc__.partition("\n")[0])
    p.add_argument("text", metavar="TEXT", help="what to say; - reads standard input, @file a file")
    p.add_argument("out", metavar="OUT", help="a .png, .svg or .pdf file")
    command.add_options(p)
    p.add_argument("--context", metavar="JSON", help='earlier turns: [{"speaker", "text", "audio"}, ...]')
    return command.run(p, program, p.parse_args(argv), "interrupted: no picture was written")


if __name__ == "__main__":
    sys.exit(main())
