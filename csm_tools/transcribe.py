"""Transcribe clips with Whisper: the extra [transcribe], mlx-whisper on a Mac and faster-whisper elsewhere.

CSM_WHISPER names another model than MODELS: a folder, or a name that the package knows or finds on the Hub.
"""

import importlib.util
import os
import threading

import numpy as np

from csm_tools.audio import RATE
from csm_tools.text import spoken

MODELS = {"mlx_whisper": "mlx-community/whisper-small.en-mlx", "faster_whisper": "small.en"}
GET_IT = "or `pip install 'csm-speech[transcribe]'` to have it transcribed"
WHISPERS_RATE = 16_000  # Hz

one_at_a_time = threading.Lock()
loaded = {}  # name -> faster_whisper.WhisperModel


def package():
    """The name of the installed recogniser, or None."""
    return next((name for name in MODELS if importlib.util.find_spec(name)), None)


def transcribe(samples):
    """(n,) at 24 kHz, mono -> its text. Raises ValueError. Threads take turns."""
    name = package()
    if name is None:
        raise ValueError(f"a clip needs its transcript, {GET_IT}")
    import soxr

    audio = soxr.resample(np.asarray(samples, np.float32), RATE, WHISPERS_RATE)
    audio = np.pad(audio, WHISPERS_RATE // 5)
    model = os.environ.get("CSM_WHISPER") or MODELS[name]
    try:
        with one_at_a_time:
            text = (by_mlx if name == "mlx_whisper" else by_ctranslate2)(audio, model)
    except Exception as e:  # from the package, the Hub or the files
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise ValueError(
            f"the clip has no transcript, and Whisper's model {model} does not run: give the transcript, or set "
            f"CSM_WHISPER to a model's folder ({reason})"
        ) from None
    text = " ".join(spoken(text).split())  # Whisper writes "Press 1"
    if not text:
        raise ValueError("no speech was heard in the clip: give its transcript")
    return text


def word_errors(said, heard):
    """The edit distance of two lists of words: replaced, deleted and inserted ones."""
    row = np.arange(len(heard) + 1)
    for i, word in enumerate(said, 1):
        above, row = row, np.full_like(row, i)
        for j, other in enumerate(heard, 1):
            row[j] = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other))
    return int(row[-1])


def by_mlx(audio, model):
    import mlx_whisper

    return mlx_whisper.transcribe(audio, path_or_hf_repo=model, temperature=0, condition_on_previous_text=False)["text"]


def by_ctranslate2(audio, model):
    import faster_whisper

    if model not in loaded:
        threads = max(1, (os.cpu_count() or 2) // 2)
        loaded[model] = faster_whisper.WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads)
    found, _ = loaded[model].transcribe(audio, beam_size=5, temperature=0, condition_on_previous_text=False)
    return " ".join(segment.text for segment in found)
