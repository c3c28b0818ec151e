"""SilentCipher, the inaudible mark that Sesame's own code puts into all that CSM says, on MLX.

    python -m csm_tools.watermark embed speech.wav marked.wav
    python -m csm_tools.watermark detect marked.wav

Source: Singh et al., "SilentCipher: Deep Audio Watermarking" (2024, arXiv 2406.03822), and Sony's package
`silentcipher` 1.0.5 (MIT), whose numbers these are: its detector finds our marks, and ours finds its. The weights are
Sony's, on the Hub at sony/silentcipher; no licence is stated for them.

How: the sound at 44.1 kHz becomes a spectrogram of T frames. The message, five bytes, is twenty symbols of two bits and
one that marks the end: one symbol a frame, again every 21 frames (0.975 s). A network looks at the spectrogram and the
symbols and says by how much to lower each magnitude, `sdr` decibels below the sound on the whole; the phase is kept.
Another network reads a symbol off each frame.

All its normalizations take the mean and variance of the clip at hand, as the original does (its BatchNorm is never put
into evaluation). So a clip is marked as a whole, up to WHOLE seconds; a longer one in pieces of WHOLE, a stream in
pieces of one mark, each by its own statistics. The symbols run on from piece to piece.

Glossary: T frames, F bins, I and O channels in and out.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import csm_layouts
import mimi as codec

import mlx.core as mx  # isort: skip
import numpy as np

REPO, FOLDER = "sony/silentcipher", "44_1_khz/73999_iteration"
FILES = ("enc_c.ckpt", "dec_c.ckpt", "dec_m_0.ckpt")
SESAME = (212, 211, 146, 56, 201)  # the message in CSM's speech
RATE = 44_100  # Hz: the network's
HOP = 2048  # samples from frame to frame; a frame is two hops long
BAND = 1024  # bins that carry the message, of HOP + 1
PERIOD = 21  # frames a mark: twenty symbols and an end
MARK = PERIOD * HOP  # samples: 0.975 s
WHOLE = 32  # marks (31 s) that are taken as a whole: 0.5 GB
TILE = 1  # frames that go through a layer at once
POWER = 0.002837200844477648  # the mean square that the network was trained on


class Detection(NamedTuple):
    message: tuple  # five bytes
    confidence: float  # share of the symbols that agree with their repetitions; 1.0 where there are none (below 1.95 s)


# ---------------------------------------------------------------------------------------------------- spectrogram


WINDOW = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)  # periodic Hann


def stft(audio):
    """(n,) -> (T, F) complex: frames centred on every HOP-th sample, the ends reflected."""
    audio = np.pad(audio, (0, 2 * HOP - len(audio) % (2 * HOP)))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, HOP, mode="reflect"), 2 * HOP)[::HOP]
    return np.fft.rfft(frames * WINDOW).astype(np.complex64)


def istft(spectrum, n):
    """(T, F) complex -> (n,): between the centres of two frames lie the second half of one, the first of the next."""
    frames = np.fft.irfft(spectrum).astype(np.float32) * WINDOW
    envelope = WINDOW[HOP:] ** 2 + WINDOW[:HOP] ** 2
    return ((frames[:-1, HOP:] + frames[1:, :HOP]) / envelope).reshape(-1)[:n]


# ---------------------------------------------------------------------------------------------------- network


def convolve(x, weight, bias):
    """x (t + k - 1, F + k - 1, I), weight (k, k, I, O) -> (t, F, O)."""
    k, _, I, O = weight.shape
    if mx.default_device() == mx.gpu:
        return mx.conv2d(x[None], weight.transpose(3, 0, 1, 2))[0] + bias
    # MLX's convolution is slow on a CPU, and its matrix products are not: one for each tap, on shifted bins
    frames = []
    for t in range(x.shape[0] - k + 1):
        y = bias
        for i in range(k):
            for j in range(k):
                y = mx.addmm(y, x[t + i, j : x.shape[1] - k + 1 + j], weight[i, j])
        frames.append(y)
    return mx.stack(frames)


class Layer:
    """BatchNorm(conv(x) * sigmoid(gate(x))), by the statistics of x itself. Frames come and go in tiles (t, F, I)."""

    def __init__(self, w, name, c_in, c_out, k=3):
        shape = (c_out, c_in, k, k)  # O, I, bins, frames
        for part in ("conv", "gate"):
            if w[f"{name}.{part}.weight"].shape != shape:
                raise KeyError(f"{name}.{part}.weight of shape {shape}")
        both = mx.concatenate([w[f"{name}.conv.weight"], w[f"{name}.gate.weight"]])
        self.weight = mx.contiguous(both.transpose(3, 2, 1, 0))
        self.bias = mx.concatenate([w[f"{name}.conv.bias"], w[f"{name}.gate.bias"]])
        self.scale, self.shift = w[f"{name}.bn.weight"], w[f"{name}.bn.bias"]

    def __call__(self, tiles):
        """Takes the tiles out of the list as it goes, so that one layer's are held at a time."""
        r = self.weight.shape[0] // 2
        edge = mx.zeros((r, *tiles[0].shape[1:]))
        out, means, variances, before = [], [], [], edge
        while tiles:
            x = tiles.pop(0)
            after = tiles[0][:r] if tiles else edge
            padded = mx.pad(mx.concatenate([before, x, after]), ((0, 0), (r, r), (0, 0)))
            value, gate = mx.split(convolve(padded, self.weight, self.bias), 2, axis=-1)
            y = value * mx.sigmoid(gate)
            means.append(mx.mean(y, axis=(0, 1)))
            variances.append(mx.var(y, axis=(0, 1)))
            mx.eval(y, means[-1], variances[-1])
            out.append(y)
            before = x[len(x) - r :]
        share = mx.array([len(y) for y in out])[:, None] / sum(len(y) for y in out)
        mean = mx.sum(share * mx.stack(means), axis=0)
        variance = mx.sum(share * (mx.stack(variances) + (mx.stack(means) - mean) ** 2), axis=0)
        scale = self.scale * mx.rsqrt(variance + 1e-5)
        return [(y - mean) * scale + self.shift for y in out]


class Watermark:
    """The networks. enc, dec, det: the tensors of enc_c.ckpt, dec_c.ckpt and dec_m_0.ckpt, as read_pt gives them."""

    def __init__(self, enc, dec, det):
        self.encoder = [Layer(enc, f"main.{i}", c, 32) for i, c in enumerate((1, 32, 32))]
        self.symbols = enc["linear.weight"].T + enc["linear.bias"]  # (5, BAND)
        # of the 96 channels that go in, 32 are the carrier and 32 the message, each the same 32 times
        self.decoder = [Layer(dec, f"main.{i}", 96, 96) for i in range(3)] + [Layer(dec, "main.3", 96, 1, k=1)]
        encoded, carrier, message = mx.split(self.decoder[0].weight, 3, axis=2)
        same = [w.sum(axis=2, keepdims=True) for w in (carrier, message)]
        self.decoder[0].weight = mx.concatenate([encoded, *same], axis=2)  # (3, 3, 34, O)
        sizes = [1] + [128] * 9 + [5]
        self.detector = [Layer(det, f"main.{2 * i + 1}", *sizes[i : i + 2]) for i in range(10)]
        self.bins, self.bias = det["linear.weight"][0], det["linear.bias"]  # (BAND,), (1,)

    def embed(self, audio, sample_rate=24_000, message=SESAME, sdr=36.0):
        """(samples,) -> (samples,) float32 NumPy, marked. sdr: decibels from the sound down to the mark.

        Silence stays as it is. Raises ValueError where the message is not five bytes.
        """
        return np.concatenate([*self.embed_stream([audio], sample_rate, message, sdr, WHOLE)])

    def embed_stream(self, pieces, sample_rate=24_000, message=SESAME, sdr=36.0, marks=1):
        """Pieces (samples,) of any length -> pieces, as many samples in all, about `marks` * 0.975 s behind."""
        symbols = to_symbols(message)
        taken = given = 0

        def checked():
            nonlocal taken
            for piece in pieces:
                piece = np.asarray(piece, np.float32)
                if piece.ndim != 1 or not np.isfinite(piece).all():
                    raise ValueError(f"cannot mark audio of shape {piece.shape}, or of NaN: it must be (samples,)")
                taken += len(piece)
                yield piece

        clips = clip(resample(checked(), sample_rate, RATE), marks * MARK)
        for marked in resample((self.mark(y, symbols, sdr) for y in clips), RATE, sample_rate):
            marked = marked[: taken - given]  # rounding up twice can make one too many
            given += len(marked)
            yield marked

    def mark(self, audio, symbols, sdr):
        """One clip (n,) at 44.1 kHz, marked from its first sample on."""
        power = np.mean(audio**2)
        if power == 0:
            return audio
        spectrum = stft(audio * np.sqrt(POWER / power))
        carrier = np.abs(spectrum)  # (T, F)
        info = np.abs(self.info(carrier, np.resize(symbols, len(carrier))))
        info[:, BAND:] = 0
        info *= 10 ** (-sdr / 20) * np.sqrt(np.mean(carrier**2)) / np.sqrt(np.mean(info**2, axis=1, keepdims=True))
        spectrum *= np.maximum(carrier - info, 0) / np.maximum(carrier, 1e-30)
        return istft(spectrum, len(audio)) * np.sqrt(power / POWER)

    def info(self, carrier, symbols):
        """Magnitudes (T, F), symbols (T,) -> what the decoder makes of them, (T, F)."""
        carrier = to_tiles(mx.array(carrier))
        tiles = list(carrier)
        for layer in self.encoder:
            tiles = layer(tiles)  # (t, F, 32)
        message = to_tiles(mx.pad(self.symbols[mx.array(symbols)], ((0, 0), (0, HOP + 1 - BAND))))
        tiles = [mx.concatenate(parts, axis=-1) for parts in zip(tiles, carrier, message)]
        for layer in self.decoder:
            tiles = layer(tiles)
        return np.array(mx.concatenate(tiles)[:, :, 0])

    def logits(self, audio):
        """One clip (n,) at 44.1 kHz -> (T, 5), of the symbols."""
        tiles = to_tiles(mx.array(np.abs(stft(audio))[:, :BAND]))
        for layer in self.detector:
            tiles = layer(tiles)  # (t, BAND, C)
        return np.array(mx.einsum("tfs,f->ts", mx.concatenate(tiles), self.bins) + self.bias)

    def read(self, audio):
        """(n,) at 44.1 kHz, a mark beginning at its first sample or a multiple of HOP from it -> Detection or None."""
        logits = [self.logits(y)[: WHOLE * PERIOD] for y in clip([audio], WHOLE * MARK)]
        symbols = np.concatenate(logits).argmax(axis=1)  # TODO
        rows = symbols[: len(symbols) // PERIOD * PERIOD].reshape(-1, PERIOD)
        counts = (rows[:, :, None] == np.arange(5)).sum(axis=0)  # (PERIOD, 5)
        mode = counts.argmax(axis=1)
        if (mode == 0).sum() != 1:
            return None
        bits = np.roll(mode, -mode.argmin() - 1)[:-1] - 1
        message = tuple(int(b) for b in bits.reshape(5, 4) @ [64, 16, 4, 1])
        return Detection(message, float(np.mean(rows == mode)))


# ---------------------------------------------------------------------------------------------------- small parts


def to_tiles(x):
    """(T, F) -> [(t, F, 1)]"""
    return [x[i : i + TILE, :, None] for i in range(0, len(x), TILE)]


def to_symbols(message):
    """Five bytes -> a mark's 21 symbols: two bits each, the high ones first, counted from 1; then the end, 0."""
    if len(message) != 5 or not all(0 <= byte < 256 for byte in message):
        raise ValueError(f"a watermark's message is five numbers from 0 to 255, not {message}")
    return [(byte >> shift & 3) + 1 for byte in message for shift in (6, 4, 2, 0)] + [0]


def resample(pieces, old, new):
    """Pieces (samples,) at one rate -> pieces at another, rounded up to whole samples in all."""
    import soxr

    if old == new:
        yield from pieces
        return
    stream, taken, given = soxr.ResampleStream(old, new, 1, dtype="float32", quality="HQ"), 0, 0
    for piece in pieces:
        taken += len(piece)
        out = stream.resample_chunk(piece)
        given += len(out)
        yield out
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    n = -(-taken * new // old) - given
    yield np.pad(rest, (0, max(0, n - len(rest))))[:n]


def clip(pieces, size):
    """Pieces (samples,) -> pieces of `size` and what is left."""
    held = np.zeros(0, np.float32)
    for piece in pieces:
        held = np.concatenate([held, piece])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held
