"""The server's voices: the model's own, by OpenAI's names too, and those in the folder of --voices."""

import io
import logging
import re
import threading
from contextlib import contextmanager
from pathlib import Path

import soundfile

import csm
import mimi as codec
from csm_tools import transcribe
from csm_tools.audio import RATE, check_clip, trimmed
from csm_tools.serve_files import read_clip

OPENAI_VOICES = "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split()
MOST_VOICES = 1000  # that clients may add to the folder
NAME = re.compile(r"[^\W_][\w .'-]{0,63}")  # which is no path and no hidden file
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")

log = logging.getLogger("csm.serve")


class Voices:
    """All the voices that a request may name. Values are a Speech's `voice`: a model's preset, "none" or a Segment."""

    def __init__(self, generator, folder=None, default=None):
        """default: the name of the voice for requests that name none, or one of OpenAI's names; None: see `table`.

        Raises ValueError if there is no such voice, or if the folder has no clip that can be used; what is wrong with
        others is logged.
        """
        self.generator, self.folder = generator, folder and Path(folder)
        self.presets, self.kept, self.lock = sorted(generator.voices), {}, threading.Lock()
        if folder:
            self.read_folder()
        self.default = None  # a Speech's `voice`
        if default is not None:
            known = self.own()
            if default not in known:
                raise ValueError(f"unknown --default-voice {default!r}; there are: {', '.join(sorted(known))}")
            self.default = known[default]

    def read_folder(self):
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder of clips")
        clips = sorted(f for f in self.folder.iterdir() if f.suffix.lower() in SUFFIXES)
        for clip in clips:
            try:
                self.kept[clip.stem] = self.read(clip)
            except (ValueError, OSError) as e:
                log.warning("%s is no voice: %s", clip.name, e)
        if clips and not self.kept:
            raise ValueError(f"{self.folder} holds no clips (name.wav) with their transcripts (name.txt)")

    def read(self, path):
        """A clip with its transcript beside it -> Segment."""
        codec.check_file(path)
        if not path.with_suffix(".txt").is_file():
            if transcribe.package() is None:
                raise ValueError(f"it needs its transcript beside it, {path.stem}.txt; {transcribe.GET_IT}")
            segment = self.segment(read_clip(path.read_bytes()), None, transcribe.transcribe)
            log.info("%s: heard: %s", path.name, segment.text)
            return segment
        return self.segment(read_clip(path.read_bytes()), csm.read_text(f"@{path.with_suffix('.txt')}"))

    def segment(self, audio, text, hear=None):
        """A clip, checked to leave room for speech -> Segment. text None: what `hear` makes of it."""
        audio, note = trimmed(audio)
        doubts = check_clip(audio, text)
        if text is None:
            text = hear(audio)
        if not text.strip():
            raise ValueError("its transcript is empty")
        g = self.generator
        n = -(-len(audio) // g.mimi.frame_size) + 1 + len(g.text_rows(text, 0))
        if n > g.max_positions * 3 // 4:
            room, has = (x / g.mimi.config.frame_rate for x in (n, g.max_positions))
            raise ValueError(f"it takes as much room as {room:.0f} s of sound, and the model has {has:.0f} s")
        for doubt in (note, *doubts):
            if doubt:
                log.warning("voice: %s", doubt)
        return csm.Segment(0, text, audio)

    def own(self):
        """`table` without OpenAI's names."""
        return {name: name for name in (*self.presets, "none")} | self.kept

    def names(self):
        """Those of `own`, the default first and "none" last if it is not that."""
        return sorted(known := self.own(), key=lambda name: (known[name] != self.default, name == "none", name))

    def table(self):
        """{name: a Speech's `voice`}.

        OpenAI's names are the default, or without one the model's own voices in turn, whatever the folder holds.
        """
        voices = self.presets or ["none"]
        if self.default is not None:
            voices = [self.default]
        return {name: voices[i % len(voices)] for i, name in enumerate(OPENAI_VOICES)} | self.own()

    def add(self, name, data, text, hear):
        """Keep a clip, the bytes of an audio file, under a name -> its transcript. Raises ValueError, OSError.

        text: the transcript; None or empty: what `hear` makes of the sound.
        """
        if not NAME.fullmatch(name) or name == "none" or name != name.strip(" ."):
            raise ValueError("a voice's name is 1 to 64 letters, digits, spaces or _ - . ', and no path")
        segment = self.segment(read_clip(data), " ".join((text or "").split()) or None, hear)
        text, sound = segment.text, io.BytesIO()
        soundfile.write(sound, codec.to_pcm16(segment.audio), RATE, format="WAV")
        with self.lock:
            if name in self.kept or name in self.presets:
                raise ValueError(f"there is a voice {name!r} already")
            if len(self.kept) >= MOST_VOICES:
                raise ValueError(f"there are {len(self.kept)} voices already: delete some first")
            with self.changing():
                with codec.replacing(self.folder / f"{name}.txt") as file:
                    file.write(f"{text}\n".encode())
                with codec.replacing(self.folder / f"{name}.wav") as file:  # last, since it makes the pair a voice
                    file.write(sound.getvalue())
            self.kept[name] = segment
        return text

    def remove(self, name):
        """Forget a kept voice and its files -> whether there was one."""
        with self.lock:
            if name not in self.kept:
                return False
            with self.changing():
                for suffix in (*SUFFIXES, ".txt"):  # the clip first
                    (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
            del self.kept[name]
            return True

    @contextmanager
    def changing(self):
        """What fails with the folder is logged; the client, who is to see no path of the server, gets an OSError."""
        try:
            yield
        except (ValueError, OSError) as e:
            log.error("%s", e)
            raise OSError("the server cannot write into its folder of voices") from None
