"""Sound written as it is generated: files in the format of their suffix, live WAV to a pipe or standard output."""

import struct
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mimi


@contextmanager
def audio_writer(path, sample_rate=24_000):
    """A function that writes pieces of audio, (samples,) float, to a file in the format of its suffix.

    A file is put in place once it is complete. "-" (standard output), a pipe and a device get a WAV while it is
    generated. Raises ValueError for an unknown suffix, and if the file cannot be written.
    """
    live = path == "-" or (Path(path).exists() and not Path(path).is_file())
    if Path(path).is_dir() or not (live or Path(path).suffix.lower() == ".wav"):
        with mimi.audio_file(path, sample_rate) as write:
            yield write
        return
    if path == "-":
        file = nullcontext(sys.stdout.buffer)
    else:
        file = open(path, "wb") if live else mimi.replacing(path)
    with file as out:
        started = False

        def write(audio):
            nonlocal started
            if not started:  # not earlier, since the model may fail to load
                out.write(wav_head(sample_rate))
                started = True
            out.write(mimi.to_pcm16(audio).tobytes())
            out.flush()

        yield write
        write([])
        if not live:
            n_bytes = out.tell() - 44
            out.seek(0)
            out.write(wav_head(sample_rate, n_bytes))


def wav_head(sample_rate, n_bytes=None):
    """The 44 bytes before 16-bit mono samples. n_bytes None, or above 4 GB: the largest number that fits."""
    if n_bytes is None or n_bytes + 36 >= 2**32:
        sizes = 2**32 - 1, 2**32 - 1
    else:
        sizes = n_bytes + 36, n_bytes
    form = b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16  # PCM, mono
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", sizes[0], *form, b"data", sizes[1])
