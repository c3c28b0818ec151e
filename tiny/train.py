"""Train the tiny CSM of this folder from nothing but a speech synthesiser: data, codec, model, export.

    pip install torch transformers wordfreq better-profanity soxr sentencepiece    (and espeak-ng from the system)
    python tiny/train.py all WORK                      many hours on two CPU cores; a GPU is better

The stages, the long ones resumable, each leaving its result in WORK:
    clips     espeak-ng speaks short sentences in many voices, with the times of its phonemes
    encoder   Mimi's encoder and quantizers: log spectrum and pitch through throwaway heads, phonemes from codebook 0
    turns     espeak-ng speaks conversations, the encoder turns them to codes; several may run at once
    decoder   Mimi's decoder, from the frozen codes back to sound: log spectra at five resolutions
    lm        the CSM itself, on the codes
    export    a checkpoint in transformers' layout, and of it, by convert.py, the folder beside this file

A turn is text and speech. Speakers 0 and 1 have a voice of their own; every other voice is heard first, in an earlier
turn of the same speaker that is not trained on, so that the model learns to take a voice from the context.
Shapes: B batch, T positions, F frames, K codebooks, S samples.
"""

import argparse
import ctypes
import hashlib
import math
import os
import pickle
import random
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
RATE, FRAME = 24_000, 1_920  # samples a second, and a frame
K, N_CODES, DIM, CODE_DIM = 8, 512, 128, 64  # codebooks, their size, the codec's width, the codes' width
V = N_CODES + 3  # as CSM-1B has three ids more than codes
VOICES = (("en-us", 50, 50, 160, 1.0), ("en-us+f3", 50, 50, 160, 1.0))  # of speakers 0 and 1: see random_voice
VARIANTS = "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Andy Annie Alex Diogo Gene Hugo Lee Mario Michael Mike adam anika "
VARIANTS += "aunty belinda benjamin boris caleb david edward grandpa kaukovalta linda marcelo max miguel norbert pablo "
VARIANTS += "paul pedro quincy rob robert sandro shelby steph travis victor zac"
PROMPTS = (  # the presets: name, voice, text
    ("deep", ("en-us+m7", 10, 40, 150, 1.0), "I have a deep voice, and I like to take my time."),
    ("bright", ("en-us+f2", 80, 60, 175, 1.0), "This is a bright voice for a sunny morning."),
    ("old", ("en-us+grandpa", 40, 50, 145, 1.0), "When I was young, we had no such machines."),
)
PHONEMES_A_FRAME = 4
PITCHES = 64  # classes of fundamental frequencies, and one for none

torch.set_flush_denormal(True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------------------------------------------- texts

SLOTS = {  # multi-word entries are joined by underscores
    "name": "john mary anna peter david sarah tom lucy james emma alice bob carol dan eve frank grace henry kate mike",
    "place": "london paris rome berlin boston school town work home church office garden station market river "
    "bridge airport hotel kitchen library beach park village museum hospital restaurant theatre",
    "adj": "red blue green black white big small old new good bad happy sad fast slow hot cold long short bright "
    "dark quiet loud clean strong heavy light warm young rich poor nice fresh sweet empty full early late "
    "easy hard little",
    "noun": "dog cat bird horse fish car bus train boat house door window table chair book phone clock letter "
    "apple tree flower river mountain cup box bag hat shoe ball picture computer song story game question "
    "answer city street child friend teacher doctor water bread coffee dinner money music weather world "
    "family morning idea problem paper key",
    "verb": "see want like need find take buy sell hold watch open close move paint clean break fix keep bring "
    "show read write make use help hear know love send tell ask leave carry cut eat drink learn remember "
    "forget",
    "ved": "saw wanted liked needed found took bought sold held watched opened closed moved painted cleaned "
    "broke fixed kept brought showed wrote made used helped heard knew loved sent told asked left carried "
    "ate drank learned forgot",
    "time": "today tomorrow yesterday tonight now later soon again always this_morning this_evening next_week "
    "last_night every_day on_monday on_tuesday on_wednesday on_thursday on_friday on_saturday on_sunday "
    "in_the_summer last_year in_the_winter after_lunch before_dinner at_noon for_an_hour",
    "who": "i you we they my_brothers the_children our_friends the_people his_parents most_of_us",
    "one": "he she it the_man the_woman my_son the_king everyone nobody the_driver my_sister her_father",
    "prep": "in on under near behind beside over inside above",
}
SLOTS = {slot: [w.replace("_", " ") for w in entries.split()] for slot, entries in SLOTS.items()}
TEMPLATES = """hello {name}|hello there, {name}|good morning, {name}|good evening {name}|how are you {time}?
thank you {name}|my name is {name}|this is {name}|{who} {verb} the {adj} {noun}|the {adj} {noun} is {adj}
the {noun} and the {noun}|{name} {ved} a {adj} {noun}|we {ved} the {noun} {time}
can you {verb} the {noun}?|please {verb} the {noun} {time}|where is the {noun}?|what is the {adj} {noun}?
the number is {num}|{num}, {num}, {num}|{num} {noun}s|i have {num} {adj} {noun}s
{name} and {name} are {adj}|we are going to {place} {time}|{name} is in {place}|she {ved} {num} {noun}s
he is {adj} and {adj}|it is {num} o'clock|the {noun} is {prep} the {noun}|a {noun} in the {place}
let us {verb} it {time}|do not {verb} the {noun}|did {name} {verb} the {noun}?|i think {name} is {adj}
they {ved} it {time}|there is a {noun} near the {place}|your {noun} is {adj}
my {adj} {noun} is in the {place}|why did they {verb} it?|yes, i {verb} it|no, {name} did not {verb} it
welcome to {place}|see you {time}|the {place} is {adj} {time}|{num} plus {num} is {num}
who {ved} my {noun}?|{one} {ved} the {noun} {prep} the {noun}|{who} will {verb} a {noun} {time}
{one} has never {ved} such a {adj} {noun}|if you {verb} it, i will {verb} it too
{time}, {who} {ved} {num} {noun}s|would you like a {adj} {noun}?
{who} could not {verb} the {noun} because it was too {adj}|the {noun} was {adj}, but the {noun} was {adj}
when {one} {ved} the {noun}, {who} {ved} the {noun}|i don't {verb} it|it's a {adj} {noun}, isn't it?
that's {name}'s {noun}|{who} should {verb} more {noun}s and fewer {noun}s
the {noun} of the {noun} is {adj}|{one} is as {adj} as a {noun}
put the {noun} {prep} the {noun} and {verb} it|{name} said that {who} {ved} the {noun}
are there any {noun}s in the {place}?"""
TEMPLATES = TEMPLATES.replace("\n", "|").split("|")
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


def held_out(word):
    """Whether a rare word is kept out of training, to test on."""
    return hashlib.md5(word.encode()).digest()[0] < 8


@cache
def words():
    """English words by falling frequency, rude ones left out: (all of them, those of training)."""
    import better_profanity
    from wordfreq import top_n_list

    listed = Path(better_profanity.__file__).with_name("profanity_wordlist.txt").read_text().split("\n")
    rude = {w.strip().lower() for w in listed}
    stems = tuple(w for w in rude if w.isalpha() and len(w) > 3)
    good = []
    for w in top_n_list("en", 60_000):
        if re.fullmatch(r"[a-z]+('[a-z]+)?", w) and len(w) < 15 and w not in rude:
            if not any(w.startswith(s) and len(w) - len(s) < 4 for s in stems):
                good.append(w)
    return good, [w for i, w in enumerate(good) if i < 3000 or not held_out(w)]


def sentence(r, n=None):
    """A sentence without its end mark: of a template, or of any n words."""
    if n is None and r.random() < 0.4:

        def fill(m):
            return number(int(10 ** r.uniform(0, 4)) - 1) if m[1] == "num" else r.choice(SLOTS[m[1]])

        return re.sub(r"\{(\w+)\}", fill, r.choice(TEMPLATES))
    n = n or r.choice((1, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12, 15))
    good, out = words()[1], []
    for i in range(n):
        w = r.choice(good[:200] if (x := r.random()) < 0.3 else good[:3000] if x < 0.65 else good)
        out.append(w + ("," if i < n - 1 and r.random() < 0.06 else ""))
    if n == 1 and r.random() < 0.3:
        out.insert(0, r.choice(("the", "a", "my", "this", "say")))
    return " ".join(out)


def text(r, longest=150):
    """What one turn says: a sentence, sometimes two or three."""
    while True:
        parts = [sentence(r) for _ in range(1 if r.random() < 0.93 else r.choice((2, 2, 3)))]
        ends = [p[-1] if p[-1] == "?" else r.choices(".?!", (85, 10, 5))[0] for p in parts]
        out = " ".join(p.rstrip("?") + e for p, e in zip(parts, ends))
        if len(parts) == 1 and r.random() < 0.2:
            out = out[:-1]
        if len(out) <= longest and plain(out) not in reserved():
            return out


def held_out_sentences():
    """[(a sentence, three that differ from it in one word)]"""
    lines = [re.match(r"(.*){(.*)}(.*)", line) for line in (HERE / "heldout.txt").read_text().splitlines()]
    return [[m[1] + word + m[3] for word in m[2].split("|")] for m in lines]


def plain(s):
    return re.sub(r"[^a-z' ]", "", s.lower())


@cache
def reserved():
    """The sentences that the evaluation speaks, in plain(): never trained on."""
    return {plain(s) for variants in held_out_sentences() for s in variants}


# ---------------------------------------------------------------------------------------------------- speech


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_uint), ("text", ctypes.c_int), ("length", ctypes.c_int),
                ("ms", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p),
                ("name", ctypes.c_char * 8)]  # fmt: skip


class Espeak:
    """espeak-ng's library: text and voice -> (S,) float32 at 24 kHz, trimmed, and [(ms, phoneme)]."""

    def __init__(self):
        import ctypes.util

        self.lib = ctypes.CDLL(ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1")
        self.rate = self.lib.espeak_Initialize(2, 500, None, 1)  # synchronous, with events of phonemes
        self.sound, self.events, self.voice = [], [], None
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
        self.callback = kind(self.hear)  # held, or it would be freed
        self.lib.espeak_SetSynthCallback(self.callback)

    def hear(self, wave, n, events):
        if n > 0 and wave:
            self.sound.append(np.ctypeslib.as_array(wave, (n,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == 7:
                self.events.append((events[i].ms, events[i].name.decode("utf-8", "replace")))
            i += 1
        return 0

    def __call__(self, text, voice):
        import soxr

        if voice != self.voice:
            name, pitch, spread, rate, _ = self.voice = voice
            if self.lib.espeak_SetVoiceByName(name.encode()):
                raise ValueError(f"espeak-ng has no voice {name}")
            for parameter, value in ((1, rate), (3, pitch), (4, spread)):
                self.lib.espeak_SetParameter(parameter, value, 0)
        self.sound, self.events = [], []
        data = text.encode() + b"\0"
        self.lib.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, 1, None, None)
        wave = np.concatenate(self.sound).astype(np.float32) / 32768
        loud = np.nonzero(np.abs(wave) > 0.01)[0]
        start, end = max(0, loud[0] - int(0.03 * self.rate)), loud[-1] + int(0.1 * self.rate)
        events = [(ms - 1000 * start / self.rate, name) for ms, name in self.events]
        return np.clip(soxr.resample(wave[start:end], self.rate, RATE) * voice[4], -1, 1), events


def random_voice(r):
    """(name, pitch, its range, words a minute, gain)"""
    name = f"en-us+{r.choice(VARIANTS.split())}" if r.random() < 0.9 else "en-us"
    return name, r.randrange(100), r.randrange(20, 81), r.randrange(130, 200), round(r.uniform(0.6, 1.1), 2)


def whole_frames(wave):
    return np.pad(wave, (0, -len(wave) % FRAME)).astype(np.float32)


def clips(args, n=16_000, shard=1_000):
    """WORK/clips-i.npy: (S,) int16, one clip after the other; WORK/clips-i.pkl: [(start, frames, phonemes)]"""
    espeak = Espeak()
    for i in range(args.part, n // shard, args.parts):
        if (args.work / f"clips-{i}.pkl").exists():
            continue
        r, waves, index, start = random.Random(f"clips {i}"), [], [], 0
        for _ in range(shard):
            wave, events = espeak(text(r, 60), r.choice(VOICES) if r.random() < 0.5 else random_voice(r))
            wave = whole_frames(wave)
            frames, times = len(wave) // FRAME, [ms for ms, _ in events]
            step = 1000 * FRAME / RATE / PHONEMES_A_FRAME
            at = np.searchsorted(times, (np.arange(frames * PHONEMES_A_FRAME) + 0.5) * step, side="right") - 1
            index.append((start, frames, [events[j][1] if j >= 0 else "_" for j in at]))
            waves.append((wave * 32767).astype(np.int16))
            start += len(wave)
        np.save(args.work / f"clips-{i}.npy", np.concatenate(waves))
        save(args.work / f"clips-{i}.pkl", index)
        print(f"clips {i}: {start / RATE / 60:.0f} minutes", flush=True)


def save(path, value):
    """By way of another name, so that an interruption leaves no half of a file."""
    part = path.with_suffix(".part")
    if isinstance(value, (list, tuple)):
        part.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, part)
    part.replace(path)


class Clips:
    """What `clips` made, drawn at random."""

    def __init__(self, work):
        self.waves, self.index = [], []
        for file in sorted(work.glob("clips-*.pkl")):
            self.waves.append(np.load(file.with_suffix(".npy"), mmap_mode="r"))
            self.index += [(len(self.waves) - 1, *row) for row in pickle.loads(file.read_bytes())]
        self.names = sorted({p for row in self.index[:5000] for p in row[3]})
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.rng = np.random.default_rng(0)
        self.long = {}

    def batch(self, frames, total):
        """total // frames crops: (B, S) sound, (B, frames * PHONEMES_A_FRAME) phoneme ids."""
        if frames not in self.long:
            self.long[frames] = [i for i, row in enumerate(self.index) if row[2] >= frames]
        sound, phonemes = [], []
        for i in self.rng.choice(self.long[frames], max(2, total // frames)):
            file, start, n, names = self.index[i]
            a = 0 if self.rng.random() < 0.4 else int(self.rng.integers(0, n - frames + 1))
            wave = self.waves[file][start + a * FRAME : start + (a + frames) * FRAME]
            sound.append(wave.astype(np.float32) / 32767 * self.rng.uniform(0.6, 1.1))
            names = names[a * PHONEMES_A_FRAME : (a + frames) * PHONEMES_A_FRAME]
            phonemes.append([self.ids.get(p, 0) for p in names])
        return torch.tensor(np.stack(sound), device=DEVICE), torch.tensor(phonemes, device=DEVICE)


# ---------------------------------------------------------------------------------------------------- codec


def mimi_config():
    from transformers import MimiConfig

    return MimiConfig(
        hidden_size=DIM, num_filters=16, codebook_size=N_CODES, codebook_dim=CODE_DIM, num_quantizers=K,
        vector_quantization_hidden_dimension=CODE_DIM, upsample_groups=DIM, num_hidden_layers=2,
        intermediate_size=4 * DIM, num_attention_heads=4, num_key_value_heads=4, head_dim=DIM // 4, sliding_window=250,
    )  # fmt: skip


def mel_filters(n_mels=80, n_fft=1024):
    """(n_mels, n_fft / 2 + 1), triangles that sum to 1."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 1400), n_mels + 2) / 2595) - 1)
    f = np.linspace(0, RATE / 2, n_fft // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(up, down))
    return torch.tensor(triangles / np.maximum(triangles.sum(1, keepdims=True), 1e-8), dtype=torch.float32)


MEL = mel_filters().to(DEVICE)


def magnitude(x, n, hop, center=True):
    """(B, S) -> (B, n / 2 + 1, S / hop)"""
    window = torch.hann_window(n, device=x.device)
    return torch.stft(x, n, hop, n, window, center=center, pad_mode="constant", return_complex=True).abs()


def pitches(x):
    """(B, S) -> (B, S / 960): 1 .. PITCHES, logarithmically from 60 to 440 Hz by autocorrelation, or 0 for unvoiced."""
    x = F.pad(x, (480, 480)).unfold(1, 1920, 960)
    r = torch.fft.irfft(torch.fft.rfft(x - x.mean(-1, keepdim=True), 4096).abs(), 4096)[..., :400]
    best, lag = r[..., RATE // 440 :].max(-1)
    kind = 1 + torch.log(RATE / (lag + RATE // 440) / 60) / math.log(440 / 60) * PITCHES
    voiced = (best > 0.4 * r[..., 0]) & (x.pow(2).mean(-1) > 4e-4)
    return torch.where(voiced, kind.long().clamp(1, PITCHES), 0)


class Codebooks(nn.Module):
    """Residual quantization by n codebooks, learned as moving averages of what falls to each code."""

    def __init__(self, n, decay=0.98):
        super().__init__()
        self.decay = decay
        self.register_buffer("usage", torch.ones(n, N_CODES))
        self.register_buffer("sum", torch.zeros(n, N_CODES, CODE_DIM))

    def vectors(self, i):
        return self.sum[i] / self.usage[i].clamp(min=1e-5)[:, None]

    def nearest(self, i, x):
        e = self.vectors(i)
        return ((e * e).sum(1) - 2 * x @ e.T).argmin(1)

    @torch.no_grad()
    def start(self, x, steps=12):
        """k-means of x (N, CODE_DIM), codebook after codebook."""
        for i in range(len(self.usage)):
            self.usage[i] = 1
            self.sum[i] = x[torch.randint(len(x), (N_CODES,))] + 0.01 * x.std() * torch.randn(N_CODES, CODE_DIM).to(x)
            for _ in range(steps):
                ids = self.nearest(i, x)
                n = torch.bincount(ids, minlength=N_CODES).to(x)
                mean = torch.zeros_like(self.sum[i]).index_add_(0, ids, x) / n.clamp(min=1)[:, None]
                self.sum[i] = torch.where(n[:, None] > 0, mean, x[torch.randint(len(x), (N_CODES,))])
            self.usage[i] = len(x) / N_CODES / 8
            self.sum[i] *= self.usage[i][:, None]
            x = x - self.vectors(i)[self.nearest(i, x)]

    def forward(self, x, n=None):
        """x (N, CODE_DIM) -> its sum of the first n codes' vectors, with the gradient of x; the distance between."""
        rest, out = x.detach(), 0
        for i in range(len(self.usage)):
            if n is not None and i >= n:
                break
            with torch.no_grad():
                ids = self.nearest(i, rest)
                y = self.vectors(i)[ids]
                count = torch.bincount(ids, minlength=N_CODES).to(x)
                self.usage[i] = self.usage[i] * self.decay + count * (1 - self.decay)
                self.sum[i] = self.sum[i] * self.decay
                self.sum[i].index_add_(0, ids, rest, alpha=1 - self.decay)
                dead = self.usage[i] < 0.02 * self.usage[i].mean()
                if dead.any():
                    self.usage[i][dead] = fresh = 0.3 * self.usage[i].mean()
                    self.sum[i][dead] = rest[torch.randint(len(rest), (int(dead.sum()),))] * fresh
            out, rest = out + y, rest - y
        return x + (out - x).detach(), F.mse_loss(x, out)


class Clock:
    """The steps of a stage that is given minutes: resumable, with a learning rate that warms up and falls."""

    def __init__(self, minutes, lr, state=None):
        self.minutes, self.lr, self.step = minutes, lr, state["step"] if state else 0
        self.begun = time.time() - 60 * (state["elapsed"] if state else 0)
        self.saved = self.elapsed

    @property
    def elapsed(self):
        return (time.time() - self.begun) / 60

    def tick(self, optimizer, warmup=100, cosine=True):
        done = min(1, self.elapsed / self.minutes)
        fall = 0.5 + 0.5 * math.cos(math.pi * done) if cosine else 1 - done
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1, (self.step + 1) / warmup) * (0.04 + 0.96 * fall)
        self.step += 1
        return done < 1

    def state(self):
        return {"step": self.step, "elapsed": self.elapsed}


def optimize(optimizer, loss, parameters):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Report:
    """Means of what is measured, printed every n steps."""

    def __init__(self, n):
        self.n, self.sums = n, {}

    def __call__(self, clock, **values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + float(value) / self.n
        if clock.step % self.n == 0:
            print(clock.step, f"{clock.elapsed:.1f} min", *(f"{k} {v:.3f}" for k, v in self.sums.items()), flush=True)
            self.sums = {}


def spread(y, n):
    """(B, n * C, T) -> (B, C, T * n)"""
    return y.unflatten(1, (n, -1)).permute(0, 2, 3, 1).flatten(2)


def encoder(args):
    """WORK/encoder.pt: Mimi with a trained encoder and quantizers."""
    from transformers import MimiModel

    torch.manual_seed(0)
    resumed, data, report = args.work / "encoder-state.pt", Clips(args.work), Report(100)
    mimi = MimiModel(mimi_config()).to(DEVICE)
    q = mimi.quantizer
    splits = (q.semantic_residual_vector_quantizer, q.acoustic_residual_vector_quantizer)
    for name, p in mimi.named_parameters():
        if name.endswith("layer_scale.scale"):
            p.data.fill_(0.1)
    books = nn.ModuleList([Codebooks(1), Codebooks(K - 1)])
    # The heads see this frame and the one before. One tells eight spectra a frame: 80 mels and 64 low bins.
    n_out = 80 + 64
    middle = (nn.Conv1d(DIM, 384, 2), nn.GELU(), nn.Conv1d(384, 384, 1), nn.GELU())
    head = nn.Sequential(*middle, nn.Conv1d(384, 8 * n_out, 1))
    phonemes = nn.Conv1d(DIM, PHONEMES_A_FRAME * len(data.names), 1)
    pitch = nn.Conv1d(DIM, 2 * (PITCHES + 1), 2)
    whole = nn.ModuleList([mimi, books, head, phonemes, pitch]).to(DEVICE)
    trained = (mimi.encoder, *(p for s in splits for p in (s.input_proj, s.output_proj)), head, phonemes, pitch)
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    state = torch.load(resumed, map_location=DEVICE) if resumed.exists() else None
    if state:
        whole.load_state_dict(state["whole"])
        optimizer.load_state_dict(state["optimizer"])
    clock, waiting, first = Clock(args.minutes or 14, 1e-3, state), [], 250  # steps before there are codes
    while clock.tick(optimizer):
        frames = int(data.rng.choice((12, 16, 20, 24, 30)))
        x, names = data.batch(frames, 120)
        z = mimi.encoder(x[:, None]).latents
        B, T = len(x), z.shape[-1]
        raw = [s.input_proj(z).transpose(1, 2).reshape(-1, CODE_DIM) for s in splits]
        if clock.step == first:
            for book, group in zip(books, zip(*waiting)):
                book.start(torch.cat(group))
        latents, commit = raw, 0
        if clock.step >= first and (clock.step == first or data.rng.random() < 0.75):
            n = None if data.rng.random() < 0.6 else int(data.rng.integers(1, K))
            (s, c0), (a, c1) = books[0](raw[0]), books[1](raw[1], n and max(1, n - 1))
            latents, commit = [s, a], c0 + c1
        elif first - 60 <= clock.step < first:
            waiting.append([r.detach() for r in raw])
        semantic, acoustic = (s.output_proj(r.view(B, T, -1).transpose(1, 2)) for s, r in zip(splits, latents))
        both = F.pad(semantic + acoustic, (1, 0))
        bins = magnitude(F.pad(x, (392, 392)), 1024, 240, center=False)[..., : 8 * T]
        target = torch.cat([torch.log(MEL @ bins + 0.02), torch.log(bins[:, :64] + 0.05)], 1)
        spectrum = (spread(head(both), 8) - target).abs().mean()
        phoneme = F.cross_entropy(spread(phonemes(semantic), PHONEMES_A_FRAME), names)
        tone = F.cross_entropy(spread(pitch(both), 2), pitches(x))
        rms = sum(torch.log(r.pow(2).mean().sqrt() + 1e-6) ** 2 for r in raw)
        optimize(optimizer, spectrum + 0.1 * phoneme + 0.1 * tone + 0.25 * commit + 0.1 * rms, parameters)
        report(clock, spectrum=spectrum.detach(), phoneme=phoneme.detach(), pitch=tone.detach(), commit=float(commit))
        if clock.step > first and clock.elapsed > clock.saved + 5:
            clock.saved = clock.elapsed
            save(resumed, {"whole": whole.state_dict(), "optimizer": optimizer.state_dict(), **clock.state()})
    with torch.no_grad():
        for split, book in zip(splits, books):
            for i, layer in enumerate(split.layers):
                layer.codebook.embed_sum.copy_(book.vectors(i))
                layer.codebook.cluster_usage.fill_(1.0)
        # Code 0 of codebook 0 begins the end of speech: no sound may have it. It moves to where nothing is near.
        vectors = splits[0].layers[0].codebook.embed_sum
        vectors[int(books[0].usage[0].argmin())] = vectors[0]
        vectors[0] = 3 * vectors.norm(dim=1).max() / CODE_DIM**0.5
    save(args.work / "encoder.pt", mimi.state_dict())


def load_mimi(path):
    from transformers import MimiModel

    mimi = MimiModel(mimi_config())
    mimi.load_state_dict(torch.load(path, map_location="cpu"))
    return mimi.to(DEVICE)


@torch.no_grad()
def bent(a, b, most=0.13, n=14):
    """Spectra b (B, bins, T), each with its frequencies stretched by what makes it nearest to a, 13 % at most.

    A voice whose pitch is a little off then costs little, where noise in its place costs much.
    """
    f = torch.arange(a.shape[1], device=a.device)
    best, out = torch.full_like(a[:, :1], torch.inf), b
    for s in torch.exp(torch.linspace(-most, most, n + 1)).tolist():
        at = (f / s).clamp(max=len(f) - 1.001)
        low = at.long()
        stretched = torch.lerp(b[:, low], b[:, low + 1], (at - low)[:, None])
        far = (torch.log(a + 0.01) - torch.log(stretched + 0.01)).abs().mean(1, keepdim=True)
        out, best = torch.where(far < best, stretched, out), torch.minimum(far, best)
    return out


def decoder(args):
    """WORK/mimi.pt: encoder.pt with a trained decoder."""
    resumed = args.work / "decoder-state.pt"
    state = torch.load(resumed, map_location=DEVICE) if resumed.exists() else None
    torch.manual_seed(1)
    data, report = Clips(args.work), Report(100)
    mimi = load_mimi(args.work / "encoder.pt")
    q = mimi.quantizer
    splits = (q.semantic_residual_vector_quantizer, q.acoustic_residual_vector_quantizer)
    if state:
        mimi.load_state_dict(state["mimi"])
    parameters = [*mimi.decoder.parameters(), *(p for s in splits for p in s.output_proj.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.01)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    clock = Clock(args.minutes or 55, 1.5e-3, state)
    while clock.tick(optimizer):
        frames = int(data.rng.choice((10, 14, 18, 24)))
        x, _ = data.batch(frames, 84)
        with torch.no_grad():
            codes = q.encode(mimi.encoder(x[:, None]).latents).transpose(0, 1)  # (B, K, F)
        y = mimi.decoder(q.decode(codes)).audio_values[:, 0]
        a, b = magnitude(y, 1024, 240), magnitude(x, 1024, 240)
        mel = (torch.log(MEL @ a + 0.096) - torch.log(MEL @ b + 0.096)).abs().mean()
        # The codes do not know where in time a pulse of the voice lies, so short windows are pooled over 20 ms: else a
        # pulse in another place would cost more than none. Nor do they know the pitch to a percent: see bent().
        spectra = 0
        for n, hop, pool in ((512, 120, 4), (256, 64, 8), (96, 24, 20)):
            a, b = (magnitude(m, n, hop).square() / n + 1e-7 for m in (y, x))
            a, b = (F.avg_pool1d(m, pool, pool // 2).sqrt() for m in (a, b))
            far = (torch.log(a + 0.01) - torch.log(b + 0.01)).abs().mean()
            spectra = spectra + far / 4 + 0.1 * (a - b).abs().mean() / (b.mean() + 0.02)
        a, b = (magnitude(m, 2048, 480)[:, :256] / 2048**0.5 for m in (y, x))  # up to 3 kHz, harmonics apart
        b = bent(a.detach(), b)
        harmonics = (torch.log(a + 0.01) - torch.log(b + 0.01)).abs().mean()
        harmonics = harmonics + 0.5 * (a - b).abs().mean() / (b.mean() + 0.02)
        optimize(optimizer, mel + spectra + harmonics, parameters)
        report(clock, spectra=spectra.detach(), mel=mel.detach(), harmonics=harmonics.detach())
        if clock.elapsed > clock.saved + 5:
            clock.saved = clock.elapsed
            save(resumed, {"mimi": mimi.state_dict(), "optimizer": optimizer.state_dict(), **clock.state()})
            save(args.work / "mimi.pt", mimi.state_dict())
    save(args.work / "mimi.pt", mimi.state_dict())


# ---------------------------------------------------------------------------------------------------- conversations


def conversation(r):
    """[(text, speaker, voice, whether it is trained on)]"""
    kind = r.random()
    if kind < 0.45:  # one turn of a speaker with a voice of its own; the ids from 2 share those of 0 and 1
        speaker = r.randrange(2, 10) if r.random() < 0.08 else r.randrange(2)
        return [(text(r), speaker, VOICES[speaker % 2], True)]
    if kind < 0.6:
        speakers = [r.randrange(2) for _ in range(r.choice((2, 2, 3, 4)))]
        return [(text(r, 80), speaker, VOICES[speaker], True) for speaker in speakers]
    ids = r.sample(range(10), r.choice((1, 1, 1, 2)))
    voices = {speaker: random_voice(r) for speaker in ids}
    if len(ids) == 2 and ids[1] < 2 and r.random() < 0.5:
        voices[ids[1]] = VOICES[ids[1]]
    turns, heard = [], {speaker for speaker in ids if voices[speaker] in VOICES}
    for i in range(r.choice((2, 3, 3, 4)) + len(ids) - 1):
        speaker = ids[i % len(ids)]
        said = text(r, 80)
        while speaker not in heard and len(said) < 15:
            said = text(r, 80)
        turns.append((said, speaker, voices[speaker], speaker in heard))
        heard.add(speaker)
    return turns


def turns(args, shard=1_000):
    """WORK/turns-i.pkl: [[(text, speaker, codes (F, K) uint16, whether it is trained on)]], about `shard` turns."""
    espeak, mimi = Espeak(), load_mimi(args.work / "encoder.pt")
    for i in range(args.part, args.turns // shard, args.parts):
        if (args.work / f"turns-{i}.pkl").exists():
            continue
        r, made, waves, begun = random.Random(f"turns {i}"), [], [], time.time()
        while len(waves) < shard:
            made.append(conversation(r))
            waves += [whole_frames(espeak(said, voice)[0]) for said, _, voice, _ in made[-1]]
        order, codes = sorted(range(len(waves)), key=lambda j: len(waves[j])), [None] * len(waves)
        while order:
            n = len(waves[order[-1]]) // FRAME  # the longest left: the encoder is causal, so padding harms nothing
            some = [order.pop() for _ in range(min(len(order), max(1, args.batch // n)))]
            batch = np.stack([np.pad(waves[j], (0, n * FRAME - len(waves[j]))) for j in some])
            with torch.no_grad():
                z = mimi.encoder(torch.tensor(batch, device=DEVICE)[:, None]).latents
                ids = mimi.quantizer.encode(z).permute(1, 2, 0).cpu().numpy().astype(np.uint16)  # (B, F, K)
            for j, row in zip(some, ids):
                codes[j] = row[: len(waves[j]) // FRAME]
        codes = iter(codes)
        save(args.work / f"turns-{i}.pkl", [[(t[0], t[1], next(codes), t[3]) for t in talk] for talk in made])
        seconds = sum(map(len, waves)) / RATE
        print(f"turns {i}: {seconds / 60:.0f} minutes of speech in {(time.time() - begun) / 60:.1f}", flush=True)


# ---------------------------------------------------------------------------------------------------- tokenizer


def year(n):
    """A number of four digits as it is read: 1984 in two halves, 1500 and 2024 in full."""
    return f"{number(n // 100)} {number(n % 100)}" if 1110 <= n < 2000 and n % 100 > 9 else number(n)


def rules():
    """{text: what it becomes}, the longest match first: small letters without accents, numbers and signs in words."""
    ordinals = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
                "twelve": "twelfth"}  # fmt: skip
    out = {chr(c): chr(c).lower() for c in range(ord("A"), ord("Z") + 1)}
    import unicodedata

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
    out |= {
        "€": " euros ",
        "£": " pounds ",
        "°": " degrees ",
        "½": " one half ",
        "¼": " one quarter ",
        "¾": " three quarters ",
    }
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
            out[f"[{n}]"] = f"[{n % 10}]"  # a speaker
    for millions in (",000,000", "000000"):
        out[millions] = " million "
    return out


def tokenizer(args):
    """WORK/tokenizer.model: SentencePiece over single characters, the rules of writing in its normalisation."""
    import sentencepiece

    if not (args.work / "tokenizer.model").exists():
        table = args.work / "rules.tsv"
        lines = ["\t".join(" ".join(f"{ord(c):X}" for c in s) for s in rule) for rule in rules().items()]
        table.write_text("\n".join(lines) + "\n")
        r = random.Random("tokenizer")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text(r) for _ in range(20_000)), model_prefix=str(args.work / "tokenizer"),
            model_type="char", vocab_size=100, hard_vocab_limit=False, character_coverage=1.0,
            normalization_rule_tsv=str(table), add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            control_symbols=["<audio>", "<audio_eos>"], user_defined_symbols=[f"[{i}]" for i in range(10)],
            minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(args.work / "tokenizer.model"))


# ---------------------------------------------------------------------------------------------------- language model


def lm_config(n_text):
    from transformers import CsmConfig

    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    shared = {"num_codebooks": K, "vocab_size": V, "rope_parameters": rope}
    return CsmConfig(
        **shared, text_vocab_size=n_text, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, audio_token_id=4, audio_eos_token_id=5,
        codebook_pad_token_id=V - 1, codebook_eos_token_id=0,
        depth_decoder_config={
            **shared, "backbone_hidden_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": K + 1,
        },
        codec_config=mimi_config().to_dict(),
    )  # fmt: skip


class Talks:
    """The conversations that `turns` has made so far, as rows of the backbone."""

    def __init__(self, work, tokenizer):
        self.work, self.tokenizer, self.files, self.talks, self.r = work, tokenizer, set(), [], random.Random(0)

    def look(self):
        """Take in the files that are new."""
        for file in sorted(set(self.work.glob("turns-*.pkl")) - self.files):
            self.files.add(file)
            self.talks += [self.rows(talk) for talk in pickle.loads(file.read_bytes())]

    def rows(self, talk):
        """[(ids, codes (F, K), trained)], the ids with bos and eos."""
        r, out = self.r, []
        for said, speaker, codes, trained in talk:
            if r.random() < 0.05:  # spaces as the rules of the tokenizer leave them
                said = " " + said
            if r.random() < 0.1:
                said = re.sub(r"([,.?!])", r" \1", said)
            ids = self.tokenizer.encode(f"[{speaker}]{said}")
            if r.random() < 0.02:
                ids.insert(r.randrange(1, len(ids)), self.tokenizer.unk_id())
            out.append(([self.tokenizer.bos_id(), *ids, self.tokenizer.eos_id()], codes, trained))
        return out

    def batches(self, positions, longest):
        """Lists of conversations alike in length, together at most `positions` long when padded."""
        lengths = [sum(len(ids) + len(codes) + 1 for ids, codes, _ in talk) for talk in self.talks]
        some = sorted((n + self.r.random() * 4, i) for i, n in enumerate(lengths) if n <= longest)
        groups, group = [], []
        for n, i in some:
            if group and (len(group) + 1) * (n + 1) > positions:
                groups.append(group)
                group = []
            group.append(self.talks[i])
        self.r.shuffle(groups)
        return groups


def collate(talks):
    """ids (B, T), codes (B, T, K), is_audio (B, T), target (B, T, K): the next frame, -100 where it is not trained."""
    n = max(sum(len(ids) + len(codes) + 1 for ids, codes, _ in talk) for talk in talks)
    ids, audio = np.zeros((len(talks), n), np.int64), np.zeros((len(talks), n, K), np.int64)
    is_audio, target = np.zeros((len(talks), n), bool), np.full((len(talks), n, K), -100)
    for b, talk in enumerate(talks):
        t = 0
        for words, codes, trained in talk:
            ids[b, t : t + len(words)] = words
            t, end = t + len(words), t + len(words) + len(codes)
            audio[b, t:end] = codes
            is_audio[b, t : end + 1] = True  # and the frame of zeros that ends it
            if trained:
                target[b, t - 1 : end - 1] = codes
                target[b, end - 1] = 0
            t = end + 1
    return [torch.from_numpy(x).to(DEVICE) for x in (ids, audio, is_audio, target)]


def losses(model, batch, fraction=1.0, corrupt=0.0):
    """Cross-entropy of codebook 0 in every frame, and of the others in a fraction of them and in all last frames."""
    ids, audio, is_audio, target = batch
    offsets = torch.arange(K, device=DEVICE) * V
    if corrupt:  # of the frames that it reads, so that it can go on from its own mistakes
        hit = (torch.rand(audio.shape, device=DEVICE) < corrupt) & (torch.rand(len(audio), 1, 1, device=DEVICE) < 0.4)
        audio = torch.where(hit, torch.randint(1, N_CODES, audio.shape, device=DEVICE), audio)
    table = model.backbone_model.embed_tokens.embed_audio_tokens.weight
    x = torch.where(is_audio[..., None], F.embedding(audio + offsets, table).sum(2), model.embed_text_tokens(ids))
    h = model.backbone_model(inputs_embeds=x, use_cache=False).last_hidden_state
    h, target = h[target[..., 0] >= 0], target[target[..., 0] >= 0]  # (N, D), (N, K)
    first = F.cross_entropy(model.lm_head(h), target[:, 0])
    some = (torch.rand(len(h), device=DEVICE) < fraction) | (target[:, 0] == 0)
    h, target = h[some], target[some]
    x = torch.cat([h[:, None], F.embedding(target[:, :-1] + offsets[:-1], table)], 1)
    y = model.depth_decoder.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, 1:]  # (N, K - 1, D')
    logits = torch.bmm(y.transpose(0, 1), model.depth_decoder.codebooks_head.weight)  # (K - 1, N, V)
    return first, F.cross_entropy(logits.reshape(-1, V), target[:, 1:].T.reshape(-1))


def lm(args):
    """WORK/lm.pt: the CSM's weights, but for the codec's."""
    from transformers import CsmForConditionalGeneration

    torch.manual_seed(2)
    resumed, words = args.work / "lm-state.pt", tokenizer(args)
    state = torch.load(resumed, map_location=DEVICE) if resumed.exists() else None
    model = CsmForConditionalGeneration(lm_config(words.vocab_size())).to(DEVICE)
    model.codec_model.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [{"params": [p for p in parameters if (p.ndim > 1) == big], "weight_decay": 0.05 * big} for big in (1, 0)]
    optimizer = torch.optim.AdamW(decay, lr=1e-3, betas=(0.9, 0.96), fused=True)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    data, report, clock = Talks(args.work, words), Report(100), Clock(args.minutes or 80, args.lr, state)
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} million parameters", flush=True)
    groups, test, seen = [], None, 0
    while clock.tick(optimizer, 200, cosine=False):
        if not groups:
            data.look()
            if test is None:
                test = collate([talk for talk in data.talks[:200] if len(talk) == 1])
                del data.talks[:200]
            data.r.seed(clock.step)
            early = clock.elapsed < 0.05 * clock.minutes  # short ones first: attention finds its way sooner
            groups = data.batches(args.positions, 90 if early else 640)
            print(f"{len(data.talks)} conversations, {len(groups)} batches", flush=True)
        talks = groups.pop()
        seen += sum(trained for talk in talks for *_, trained in talk)
        first, rest = losses(model, collate(talks), 0.5, 0.06)
        optimize(optimizer, first + rest, parameters)
        report(clock, first=first.detach(), rest=rest.detach())
        if clock.elapsed > clock.saved + 5 or clock.elapsed >= clock.minutes:
            clock.saved = clock.elapsed
            with torch.no_grad():
                first, rest = losses(model, test)
            print(f"test: first {first:.3f}, rest {rest:.3f}; {seen} turns seen", flush=True)
            save(resumed, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **clock.state()})
            save(args.work / "lm.pt", model.state_dict())
    save(args.work / "lm.pt", model.state_dict())


def export(args, first=2.5, rest=3.5):
    """WORK/transformers, and by convert.py the folder beside this file.

    The heads are multiplied by `first` (codebook 0) and `rest`: the usual temperature of 0.9 then draws as carefully as
    suits a model this small.
    """
    from transformers import CsmForConditionalGeneration

    words, out = tokenizer(args), args.work / "transformers"
    config = lm_config(words.vocab_size())
    config.use_default_voice_prompt = False  # speakers 0 and 1 have voices without
    model = CsmForConditionalGeneration(config)
    model.load_state_dict(torch.load(args.work / "lm.pt", map_location="cpu"))
    model.codec_model.load_state_dict(torch.load(args.work / "mimi.pt", map_location="cpu"))
    with torch.no_grad():
        model.lm_head.weight *= first
        model.depth_decoder.codebooks_head.weight *= rest
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "tokenizer.model").write_bytes((args.work / "tokenizer.model").read_bytes())
    (out / "prompts").mkdir(exist_ok=True)
    import soundfile

    espeak = Espeak()
    for name, voice, said in PROMPTS:
        soundfile.write(out / "prompts" / f"{name}.wav", espeak(said, voice)[0], RATE, subtype="PCM_16")
        (out / "prompts" / f"{name}.txt").write_text(said + "\n")
    subprocess.run([sys.executable, HERE.parent / "convert.py", out, args.folder or HERE], check=True)


def everything(args):
    """All stages in turn."""
    for stage in (clips, encoder, turns, decoder, lm, export):
        print(f"--- {stage.__name__}", flush=True)
        stage(args)


def main():
    p = argparse.ArgumentParser(description="Train the tiny CSM.")
    p.add_argument("stage", choices=("clips", "encoder", "turns", "decoder", "tokenizer", "lm", "export", "all"))
    p.add_argument("work", type=Path, help="folder for what the stages make")
    p.add_argument("--minutes", type=float, help="of encoder, decoder and lm (14, 55, 80: too few on a CPU)")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--part", type=int, default=0, help="of clips and turns: which of --parts processes this is")
    p.add_argument("--parts", type=int, default=1)
    p.add_argument("--batch", type=int, default=60, help="frames through the codec at once: small fits a CPU's cache")
    p.add_argument("--positions", type=int, default=2_000, help="of the backbone in a batch of the stage lm")
    p.add_argument("--lr", type=float, default=1.5e-3, help="of the stage lm")
    p.add_argument("--turns", type=int, default=200_000)
    p.add_argument("--folder", type=Path, help="of the stage export (default: beside this file)")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    (everything if args.stage == "all" else globals()[args.stage])(args)


if __name__ == "__main__":
    main()
