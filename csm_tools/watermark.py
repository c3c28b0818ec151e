"""SilentCipher on MLX: the inaudible watermark that Sesame's code adds to all of CSM's speech.

    python -m csm_tools.watermark embed speech.wav marked.wav    # and: detect marked.wav

Source: Singh et al., "SilentCipher: Deep Audio Watermarking" (2024, arXiv 2406.03822), and Sony's package
`silentcipher` 1.0.5 (MIT); each finds the other's marks. The weights are Sony's, on the Hub at sony/silentcipher; no
licence is stated for them.

The message of five bytes becomes twenty symbols of two bits and an end symbol. Each frame of the spectrogram at
44.1 kHz carries one symbol, so the message repeats every 21 frames (0.975 s). From both, two networks compute how much
to lower each magnitude, `sdr` decibels below the sound on the whole; the phase stays. A third network reads a symbol
from each frame.

The normalizations use the mean and variance of the clip, because the original's BatchNorm is never set to evaluation.
So a clip is marked in pieces of 31 s and a stream in pieces of one mark; the symbols continue from piece to piece.
Glossary: T frames, F bins, I and O channels.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import csm_layouts
import mimi as codec
from csm_tools import checkpoints, command
from csm_tools.audio import audio_writer

import mlx.core as mx  # isort: skip
import numpy as np

REPO, FOLDER = "sony/silentcipher", "44_1_khz/73999_iteration"
FILES = ("enc_c.ckpt", "dec_c.ckpt", "dec_m_0.ckpt")
SESAME = (212, 211, 146, 56, 201)  # the message in CSM's speech
RATE = 44_100  # Hz, of the networks
HOP = 2048  # samples between frames; a frame is two hops long
BAND = 1024  # bins, of HOP + 1, that carry the message
LEAST = 0.5  # share of symbols that must agree; random symbols, in four marks or more, do not
PERIOD = 21  # frames in a mark: twenty symbols and the end
MARK = PERIOD * HOP  # samples in a mark: 0.975 s
WHOLE = 32  # marks (31 s) that are processed at once, with 0.5 GB of memory
WINDOW = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)  # periodic Hann
POWER = 0.002837200844477648  # the mean square that the network was trained on


class Detection(NamedTuple):
    message: tuple  # five bytes
    confidence: float  # share of symbols that agree with their repetitions; 1.0 without any (below 1.95 s)


def stft(audio):
    """(n,) -> (T, F) complex: frames centred on every HOP-th sample, with reflected ends."""
    audio = np.pad(audio, (0, 2 * HOP - len(audio) % (2 * HOP)))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, HOP, mode="reflect"), 2 * HOP)[::HOP]
    return np.fft.rfft(frames * WINDOW).astype(np.complex64)


def istft(spectrum, n):
    """(T, F) complex -> (n,): each frame's second half overlaps the next one's first."""
    frames = np.fft.irfft(spectrum).astype(np.float32) * WINDOW
    envelope = WINDOW[HOP:] ** 2 + WINDOW[:HOP] ** 2
    return ((frames[:-1, HOP:] + frames[1:, :HOP]) / envelope).reshape(-1)[:n]


def resample(pieces, old, new):
    """Resample pieces (samples,) to pieces of at most a second. Their total length is rounded up."""
    import soxr

    stream, taken, given = soxr.ResampleStream(old, new, 1, dtype="float32", quality="HQ"), 0, 0
    for piece in pieces:
        piece = np.asarray(piece, np.float32)
        if piece.ndim != 1 or not np.isfinite(piece).all():
            raise ValueError(f"audio must be (samples,), without NaN; this is {piece.shape}")
        for part in np.array_split(piece, len(piece) // MARK + 1):
            out = part if old == new else stream.resample_chunk(part)
            taken, given = taken + len(part), given + len(out)
            yield out
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    n = -(-taken * new // old) - given
    yield np.pad(rest, (0, max(0, n - len(rest))))[:n]


def cut(pieces, size):
    """Pieces (samples,) -> pieces of `size`, and the remainder."""
    held = np.zeros(0, np.float32)
    for piece in pieces:
        held = np.concatenate([held, piece])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


# ---------------------------------------------------------------------------------------------------- network


def to_symbols(message):
    """Five bytes -> a mark's 21 symbols: 1 + two bits each, high bits first, then the end, 0."""
    if len(message) != 5 or not all(0 <= byte < 256 for byte in message):
        raise ValueError(f"a watermark's message is five numbers from 0 to 255, not {message}")
    return [(byte >> shift & 3) + 1 for byte in message for shift in (6, 4, 2, 0)] + [0]


def convolve(frames, weight, bias):
    """Convolve frames [(F, I)] * k with weight (bins k, frames k, I, O) to the middle frame (F, O), zero-padded."""
    k, n = len(weight), len(frames[0])
    x = mx.pad(mx.concatenate(frames, axis=1), ((k // 2, k // 2), (0, 0)))  # (F + k - 1, k I)
    if mx.default_device() == mx.gpu:
        return mx.conv2d(x.reshape(1, len(x), k, -1), weight.transpose(3, 0, 1, 2))[0, :, 0] + bias
    y = bias  # MLX's convolution is slow on a CPU: use a matrix product for each tap of the bins
    for i in range(k):
        y = mx.addmm(y, x[i : i + n], weight[i].flatten(0, 1))
    return y


class Layer:
    """BatchNorm(conv(x) * sigmoid(gate(x))), normalized by the clip's own statistics."""

    def __init__(self, weights, name):
        conv, gate = (weights[f"{name}.{part}.weight"] for part in ("conv", "gate"))  # (O, I, bins, frames)
        self.weight = mx.contiguous(mx.concatenate([conv, gate]).transpose(2, 3, 1, 0))
        self.bias = mx.concatenate([weights[f"{name}.conv.bias"], weights[f"{name}.gate.bias"]])
        self.scale, self.shift = weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]

    def __call__(self, frames):
        """[(F, I)] * T -> [(F, O)] * T. Empties the list as it goes, so memory holds one layer of a clip."""
        r = len(self.weight) // 2
        edge = mx.zeros_like(frames[0])
        near = [edge] * r + [frames.pop(0) for _ in range(r)]
        out, means, variances = [], [], []
        step = 16 if mx.default_device() == mx.gpu else 1  # frames between evaluations, at which a GPU idles
        for _ in range(len(frames) + r):
            near.append(frames.pop(0) if frames else edge)
            value, gate = mx.split(convolve(near, self.weight, self.bias), 2, axis=-1)
            out.append(value * mx.sigmoid(gate))
            means.append(mx.mean(out[-1], axis=0))
            variances.append(mx.var(out[-1], axis=0))
            if len(out) % step == 0:
                mx.eval(out[-step:], means[-step:], variances[-step:])
            near.pop(0)
        means = mx.stack(means)
        mean, variance = mx.mean(means, axis=0), mx.mean(mx.stack(variances), axis=0) + mx.var(means, axis=0)
        return [(y - mean) * (self.scale * mx.rsqrt(variance + 1e-5)) + self.shift for y in out]


class Watermark:
    """The networks. encoder, decoder, detector: tensors of enc_c, dec_c and dec_m_0, in PyTorch's shapes."""

    def __init__(self, encoder, decoder, detector):
        self.encoder = [Layer(encoder, f"main.{i}") for i in range(3)]
        self.symbols = encoder["linear.weight"].T + encoder["linear.bias"]  # (5, BAND)
        self.decoder = [Layer(decoder, f"main.{i}") for i in range(4)]
        # The input's channels are the encoder's, the carrier repeated, and the message repeated. Pass these two once.
        encoded, carrier, message = mx.split(self.decoder[0].weight, 3, axis=2)
        once = [w.sum(axis=2, keepdims=True) for w in (carrier, message)]
        self.decoder[0].weight = mx.concatenate([encoded, *once], axis=2)  # (3, 3, 32 + 2, O)
        self.detector = [Layer(detector, f"main.{i}") for i in range(1, 20, 2)]
        self.bins, self.bias = detector["linear.weight"][0], detector["linear.bias"]  # (BAND,), (1,)

    def embed(self, audio, sample_rate=24_000, message=SESAME, sdr=36.0):
        """Mark (samples,); returns float32 NumPy. Silence stays silent. sdr: dB from the sound down to the mark."""
        return np.concatenate([np.zeros(0, np.float32), *self.embed_stream([audio], sample_rate, message, sdr, WHOLE)])

    def embed_stream(self, pieces, sample_rate=24_000, message=SESAME, sdr=36.0, marks=1):
        """Mark a stream of pieces (samples,), with a delay of about `marks` * 0.975 s. The total length is the same."""
        symbols = to_symbols(message)
        taken = given = 0

        def counted():
            nonlocal taken
            for piece in pieces:
                taken += len(piece)
                yield piece

        clips = cut(resample(counted(), sample_rate, RATE), marks * MARK)
        for marked in resample((self.mark(clip, symbols, sdr) for clip in clips), RATE, sample_rate):
            marked = marked[: taken - given]  # rounding up twice can add a sample
            given += len(marked)
            if len(marked):
                yield marked

    def mark(self, clip, symbols, sdr):
        """Mark (n,) at 44.1 kHz from its first sample on."""
        power = np.mean(clip**2)
        if power == 0:
            return clip
        spectrum = stft(clip * np.sqrt(POWER / power))
        carrier = np.abs(spectrum)  # (T, F)
        sound = mx.array(carrier)[:, :, None]
        message = self.symbols[mx.array(np.resize(symbols, len(carrier)))]  # (T, BAND)
        message = mx.pad(message, ((0, 0), (0, HOP + 1 - BAND)))[:, :, None]
        frames = [*sound]
        for layer in self.encoder:
            frames = layer(frames)
        frames = [mx.concatenate(parts, axis=1) for parts in zip(frames, sound, message)]  # (F, 32 + 2)
        for layer in self.decoder:
            frames = layer(frames)
        info = np.array(mx.abs(mx.stack(frames)[:, :, 0]))  # (T, F)
        info[:, BAND:] = 0
        info *= 10 ** (-sdr / 20) * np.sqrt(np.mean(carrier**2) / np.mean(info**2, axis=1, keepdims=True))
        spectrum *= np.maximum(carrier - info, 0) / np.maximum(carrier, 1e-30)
        return istft(spectrum, len(clip)) * np.sqrt(power / POWER)

    def detect(self, audio, sample_rate=24_000):
        """(samples,) -> the Detection, or None if there is no mark.

        Reads from the first sample on. If that fails, tries other offsets of the frames on two seconds of the sound.
        """
        audio = np.concatenate([*resample([audio], sample_rate, RATE)])
        if len(audio) < MARK:
            return None
        found, clarity = self.read(audio)
        if found and found.confidence >= 0.9 and len(audio) >= 2 * MARK:
            return found
        energy = [np.sum(clip**2) for clip in cut([audio], MARK)]
        loudest = int(np.argmax(np.convolve(energy, [1, 1])[1:])) * MARK  # and the mark after it
        excerpt = audio[loudest : loudest + 2 * MARK + HOP]
        clearest = partial(max, key=lambda shift: self.read(excerpt[shift:])[1])
        best = clearest(range(0, HOP, 256))
        best = clearest((best + step) % HOP for step in (0, -128, -64, 64, 128))
        other, clearer = self.read(audio[best:])
        return other if clearer > clarity else found

    def read(self, audio):
        """(n,) at 44.1 kHz, starting with a frame -> (Detection or None, how clear the symbols are)."""
        logits = np.concatenate([self.logits(clip)[: WHOLE * PERIOD] for clip in cut([audio], WHOLE * MARK)])
        logits = logits[: len(logits) // PERIOD * PERIOD].reshape(-1, PERIOD, 5)  # a row per mark
        clarity = mx.softmax(mx.array(logits), axis=-1).mean(axis=0).max(axis=-1).mean().item()
        rows = logits.argmax(axis=-1)
        mode = (rows[:, :, None] == np.arange(5)).sum(axis=0).argmax(axis=-1)  # (PERIOD,)
        confidence = float(np.mean(rows == mode))
        if (mode == 0).sum() != 1 or confidence < LEAST:
            return None, clarity
        pairs = np.roll(mode, -1 - mode.argmin())[:-1] - 1  # the symbols after the end
        return Detection(tuple((pairs.reshape(5, 4) @ [64, 16, 4, 1]).tolist()), confidence), clarity

    def logits(self, clip):
        """(n,) at 44.1 kHz -> logits of the symbols (T, 5)."""
        clip = clip * np.sqrt(POWER / max(np.mean(clip**2), 1e-30))
        frames = [*mx.array(np.abs(stft(clip))[:, :BAND, None])]
        for layer in self.detector:
            frames = layer(frames)
        return np.array(mx.einsum("tfs,f->ts", mx.stack(frames), self.bins) + self.bias)


def load(path_or_repo=REPO):
    """Load the networks from a folder or Hub repository with SilentCipher's 44.1 kHz model. Raises ValueError."""

    folder = Path(path_or_repo)
    try:
        if not folder.is_dir():
            folder = checkpoints.download(str(path_or_repo), *(f"{FOLDER}/{name}" for name in FILES), hint="")
        folder = next(f for f in (folder / FOLDER, folder) if f.is_dir())
        mark = Watermark(*(csm_layouts.read_pt(folder / name) for name in FILES))
        if mark.symbols.shape != (5, BAND) or mark.bins.shape != (BAND,):
            raise ValueError("the networks are for another sample rate")
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"no weights for the watermark in {path_or_repo}: {error}") from None
    return mark


# ---------------------------------------------------------------------------------------------------- command


def program(args):
    import soundfile

    if (args.action == "embed") != (args.output is not None):
        raise ValueError("expected `embed IN OUT` or `detect IN`")
    mark = load(args.weights)
    if args.action == "detect":
        found = mark.detect(codec.read_audio(args.input, RATE), RATE)
        if not found:
            print("no mark")
            return 1
        whose = "CSM's mark" if found.message == SESAME else "a mark, not CSM's"
        print(f"{whose}: {' '.join(map(str, found.message))}, confidence {found.confidence:.2f}")
        return 0
    try:
        rate = soundfile.info(args.input).samplerate
    except soundfile.LibsndfileError:  # read_audio raises an error, or needs ffmpeg
        rate = 24_000
    audio = codec.read_audio(args.input, rate)
    with audio_writer(args.output, rate) as write:
        for piece in mark.embed_stream([audio], rate, args.message, args.sdr, WHOLE):
            write(piece)
    return 0


def main(argv=None):
    p = command.parser_for("watermark", description="Mark speech inaudibly, or detect a mark (exit status 1: none).")
    p.add_argument("action", choices=("embed", "detect"))
    p.add_argument("input", metavar="IN", help="an audio file")
    p.add_argument("output", metavar="OUT", nargs="?", help="embed: a .wav, .flac, .mp3, .ogg or .opus file, mono")
    p.add_argument("--weights", default=REPO, metavar="W", help=f"a folder or a Hub repository (default {REPO})")
    p.add_argument("--sdr", type=float, default=36.0, help="decibels from the sound down to the mark (default 36)")
    p.add_argument("--message", type=int, nargs=5, default=SESAME, metavar="N", help="five bytes (default: CSM's own)")
    return command.run(p, program, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
