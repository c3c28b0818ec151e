"""Check and trim clips of voices; write sound to files or live, as it is generated."""

import struct
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

import mimi

RATE = 24_000  # Hz, of clips
SHORTEST, SHORT, LONG = 0.5, 1.5, 30.0  # s: shorter clips are an error; shorter or longer ones a warning
LETTERS_A_SECOND = 7.0, 26.0  # speech has 10 to 20; outside this range the text is hardly the clip's
MUCH_SILENCE, SILENCE_KEPT = 0.5, 0.2  # s: longer silence at a clip's end is cut to the second

# ---- clips ------------------------------------------------------------------------------------------------------


def loud(samples):
    """(n,) bool: which windows of 20 ms are not silent, that is within 40 dB of the loudest."""
    size = RATE // 50
    windows = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    rms = np.sqrt((windows.astype(np.float64) ** 2).mean(axis=1))
    return rms > max(1e-4, 0.01 * rms.max(initial=0))


def trim_silence(samples):
    """Cut silence of more than MUCH_SILENCE s at either end to SILENCE_KEPT s. A silent clip stays as it is."""
    found = np.flatnonzero(loud(samples))
    if not len(found):
        return samples
    size, kept, much = RATE // 50, round(SILENCE_KEPT * RATE), MUCH_SILENCE * RATE
    start, end = found[0] * size, (found[-1] + 1) * size
    start = start - kept if start > much else 0
    end = end + kept if len(samples) - end > much else len(samples)
    return samples[start:end]


def trimmed(samples):
    """(trim_silence(samples), a note if it cut something or None)."""
    kept = trim_silence(samples)
    seconds = (len(samples) - len(kept)) / RATE
    return kept, f"{seconds:.1f} s of silence at its ends are left out" if seconds else None


def check_clip(samples, text=None, shortest=SHORTEST):
    """Warnings about a clip of a voice, (samples,) at 24 kHz, and its transcript: [str].

    Raises ValueError if the clip is silent or has less than `shortest` seconds of sound.
    """
    found = np.flatnonzero(loud(samples))
    if not len(found):
        raise ValueError("the clip is silent throughout")
    seconds = min(len(samples) / RATE, (found[-1] + 1 - found[0]) / 50)
    if seconds < shortest:
        raise ValueError(f"the clip has {seconds:.2f} s of sound: give a few seconds of speech")
    warnings = []
    if text is not None:
        n = sum(3 if c >= "\u2e80" else 1 for c in text.strip())  # a letter of Chinese is a syllable
        slow, fast = (limit * seconds for limit in LETTERS_A_SECOND)
        if not slow <= n <= fast and (n > 10 or seconds > SHORT):
            said = f"{len(text.strip())} letters of text for {seconds:.1f} s of sound"
            warnings.append(f"{said}: is the text all that the clip says, and no more?")
    if shortest and not SHORT <= seconds <= LONG:
        warnings.append(f"the clip has {seconds:.1f} s of sound: 3 to 12 s work best")
    return warnings


# ---- writing ----------------------------------------------------------------------------------------------------


@contextmanager
def audio_writer(path, sample_rate=RATE):
    """Yields a function that writes pieces of audio, (samples,) float, to a file in the format of its suffix.

    A file appears once it is complete. "-" (standard output), a pipe or a device gets a WAV as it is generated. Raises
    ValueError for an unknown suffix, or if the file cannot be written.
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
            if not started:  # write nothing before the first audio: the model may fail to load
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
    """The 44-byte header of 16-bit mono samples. If n_bytes is None or above 4 GB, it states the largest size."""
    if n_bytes is None or n_bytes + 36 >= 2**32:
        sizes = 2**32 - 1, 2**32 - 1
    else:
        sizes = n_bytes + 36, n_bytes
    form = b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16  # PCM, mono
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", sizes[0], *form, b"data", sizes[1])
