"""Sound that goes into the server and comes out of it: clips in any container, files in the formats of OpenAI's API.

Clips come from strangers. They are read in blocks, each mixed to mono at once, within limits of rate, channels and
length, by those of FFmpeg's readers that open nothing but the bytes they are given.
"""

import io
from fractions import Fraction
from types import SimpleNamespace

import av
import soxr

import mimi as codec  # before mlx
from csm_tools import watermark
from csm_tools.audio import RATE

import numpy as np  # isort: skip

# response_format -> media type, container, encoder, bits a second, the container's options
FORMATS = {
    "mp3": ("audio/mpeg", "mp3", "libmp3lame", 64_000, {"write_xing": "0", "id3v2_version": "0"}),
    "opus": ("audio/ogg", "ogg", "libopus", 48_000, {"page_duration": "80000"}),  # microseconds
    "aac": ("audio/aac", "adts", "aac", 64_000, {}),
    "flac": ("audio/flac", "flac", "flac", None, {}),
    "wav": ("audio/wav", "wav", "pcm_s16le", None, {"fflags": "+bitexact"}),  # a header of 44 bytes
    "pcm": ("audio/pcm", "s16le", "pcm_s16le", None, {}),
}
TELEPHONE = {
    "ulaw": ("audio/basic", "mulaw", "pcm_mulaw", None, {}),
    "alaw": ("audio/basic", "alaw", "pcm_alaw", None, {}),
}
SIZED = ("wav", "flac")  # their headers say how long they are
# FFmpeg's readers of one file each. Others, such as hls and concat, open what the file names.
CONTAINERS = "wav,w64,aiff,au,caf,flac,mp3,ogg,aac,mov,mp4,m4a,matroska,webm,amr"
LONGEST_CLIP = 60  # seconds
HIGHEST_RATE, MOST_CHANNELS, MOST_VALUES = 192_000, 8, 768_000  # Hz; and values a second, of all channels


# ---------------------------------------------------------------------------------------------------- clips in


def read_clip(data, longest=LONGEST_CLIP):
    """The bytes of an audio file -> (samples,) float32 at 24 kHz, mono. Raises ValueError."""
    try:
        with av.open(io.BytesIO(data), options={"format_whitelist": CONTAINERS}) as file:
            if not file.streams.audio:
                raise ValueError("the clip holds no sound")
            if file.streams.audio[0].codec_context is None:
                raise ValueError("the clip's sound is coded in a way that is not known here")
            audio = np.concatenate([np.zeros(0, np.float32), *decode_track(file, file.streams.audio[0], longest)])
    except (av.FFmpegError, UnicodeError):
        raise ValueError("the clip is no audio file that can be read (WAV, FLAC, MP3, OGG, M4A, WebM, ...)") from None
    if not np.isfinite(audio).all():
        raise ValueError("the clip contains NaN or infinite samples")
    return audio


def decode_track(file, track, longest):
    """A file's track as pieces (samples,) at 24 kHz, mono. Raises ValueError beyond what is allowed."""
    check_form(track.codec_context.sample_rate, track.codec_context.channels)
    track.codec_context.thread_count = 1
    to_float = av.AudioResampler("flt")  # channels interleaved: PyAV 18 crashes with 8 planes, one for each
    form, resampler, n = None, None, 0
    for frame in file.decode(track):
        if form is None:
            form = frame.sample_rate, frame.layout.nb_channels  # AAC may play at twice the rate that it claims
            check_form(*form)
            resampler = soxr.ResampleStream(form[0], RATE, 1, dtype="float32", quality="HQ")
        if form != (frame.sample_rate, frame.layout.nb_channels):
            raise ValueError("the clip changes its rate or channels on the way")
        n += frame.samples
        if n > longest * form[0]:
            raise ValueError(f"a clip may last {longest:.0f} s here")
        for block in to_float.resample(frame):
            mono = block.to_ndarray().reshape(-1, form[1]).mean(axis=1)
            yield mono if form[0] == RATE else resampler.resample_chunk(mono)
    if form and form[0] != RATE:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def check_form(rate, channels):
    if rate > HIGHEST_RATE or channels > MOST_CHANNELS or rate * channels > MOST_VALUES:
        raise ValueError(
            f"the clip has {channels} channels at {rate} Hz: at most {MOST_CHANNELS} channels, {HIGHEST_RATE} Hz and "
            f"{MOST_VALUES} values a second are read"
        )


# ---------------------------------------------------------------------------------------------------- files out


class Encoder:
    """Pieces of sound -> pieces of one file. speed: how much faster than it was said, the pitch kept.

    whole: the file comes at the end as one piece, and its header says how long it is. file_rate, bits: its samples and
    bits a second, if not `rate` and the format's own.
    """

    def __init__(self, format, rate, speed, whole=False, file_rate=None, bits=None):
        _, container, encoder, usual, options = (FORMATS | TELEPHONE)[format]
        self.rate, self.samples, self.data = rate, 0, bytearray()
        self.whole = io.BytesIO() if whole else None
        pipe = self.whole or SimpleNamespace(write=self.data.extend)  # which has no seek: no header is gone back to
        self.file = av.open(pipe, "w", format=container, options=options | {"flush_packets": "1"})
        self.track = self.file.add_stream(encoder, rate=file_rate or rate, layout="mono")
        self.track.codec_context.thread_count = 1
        if bits or usual:
            self.track.bit_rate = bits or usual
        self.file.start_encoding()
        factors = [] if speed == 1 else [speed] if speed >= 0.5 else [0.5, speed / 0.5]  # atempo takes 0.5 and more
        self.graph = av.filter.Graph()
        self.graph.threads = 1
        source = self.graph.add_abuffer(sample_rate=rate, format="s16", layout="mono", time_base=Fraction(1, rate))
        tempo = [self.graph.add("atempo", str(factor)) for factor in factors]
        self.graph.link_nodes(source, *tempo, self.graph.add("abuffersink")).configure()

    def __call__(self, audio):
        """(samples,) int16, or None after the last -> the bytes that are ready."""
        frame = None
        if audio is not None:
            if not len(audio):
                return b""
            frame = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = self.rate, self.samples, Fraction(1, self.rate)
            self.samples += len(audio)
        self.graph.push(frame)
        while True:
            try:
                self.file.mux(self.track.encode(self.graph.pull()))
            except (av.BlockingIOError, av.EOFError):
                break
        if audio is None:
            self.file.mux(self.track.encode(None))
            self.file.close()
        if self.whole:
            return self.whole.getvalue() if audio is None else b""
        data = bytes(self.data)
        self.data.clear()
        return data


# ---------------------------------------------------------------------------------------------------- the mark


class Marker:
    """Watermark.embed_stream for pieces that are handed in: so many streams take turns on one thread."""

    def __init__(self, mark, rate):
        self.mark, self.symbols = mark, watermark.to_symbols(watermark.SESAME)
        self.up, self.down = Resampler(rate, watermark.RATE), Resampler(watermark.RATE, rate)
        self.held, self.taken, self.given = np.zeros(0, np.float32), 0, 0

    def __call__(self, audio):
        """(samples,) int16, or None after the last -> (samples,) int16, about a second behind."""
        last = audio is None
        self.taken += 0 if last else len(audio)
        more = self.up(None if last else audio / np.float32(32767))
        self.held, out = np.concatenate([self.held, more]), []
        while len(self.held) >= watermark.MARK or (last and len(self.held)):
            clip, self.held = self.held[: watermark.MARK], self.held[watermark.MARK :]
            out.append(self.down(self.mark.mark(clip, self.symbols, 36.0)))
        if last:
            out.append(self.down(None))
        marked = np.concatenate([np.zeros(0, np.float32), *out])
        marked = marked[: self.taken - self.given]  # two roundings up can make one sample too many
        self.given += len(marked)
        return codec.to_pcm16(marked)


class Resampler:
    """Pieces (samples,) at one rate -> pieces at another, rounded up to whole samples in all."""

    def __init__(self, old, new):
        self.old, self.new, self.taken, self.given = old, new, 0, 0
        self.stream = soxr.ResampleStream(old, new, 1, dtype="float32", quality="HQ")

    def __call__(self, audio):
        """(samples,) float32, or None after the last -> (samples,)."""
        if audio is None:
            rest = self.stream.resample_chunk(np.zeros(0, np.float32), last=True)
            n = -(-self.taken * self.new // self.old) - self.given
            return np.pad(rest, (0, max(0, n - len(rest))))[:n]
        out = self.stream.resample_chunk(audio)
        self.taken, self.given = self.taken + len(audio), self.given + len(out)
        return out
