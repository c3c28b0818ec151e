"""How well the tiny CSM speaks: is what it says nearest to what espeak-ng says for the same text?

    python tiny/evaluate.py [FOLDER] [--quantize 4|8] [--only sentences words cloning codec]

Nearest is by dynamic time warping over mel cepstra, among renderings of the right text and of others. Needs what
train.py needs. The sentences are those of heldout.txt, which training never sees.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import csm  # before torch: it puts a fast BLAS in place

import mlx.core as mx  # isort: skip
import torch
import train

EDGES = train.mel_filters(40).numpy()
DCT = np.cos(np.pi / 40 * (np.arange(40) + 0.5) * np.arange(1, 14)[:, None])  # of the second kind, without its mean


def spectrum(wave, hop):
    return train.magnitude(torch.tensor(np.array(wave))[None], 1024, hop)[0].numpy()


def cepstra(wave):
    """(S,) -> (frames of 20 ms, 13), without their mean: so that neither loudness nor a voice's colour counts."""
    c = (DCT @ np.log(EDGES @ spectrum(wave, 480) + 0.02)).T * (2 / 40) ** 0.5
    return c - c.mean(0)


def distances(a, references):
    """Warping distances of a (n, 13) to each reference, a step of either side costing the same."""
    n, m = len(a), max(map(len, references))
    b = np.zeros((len(references), m, a.shape[1]))
    for row, r in zip(b, references):
        row[: len(r)] = r
    squares = (a**2).sum(1)[None, :, None] + (b**2).sum(2)[:, None] - 2 * np.einsum("nd,kmd->knm", a, b)
    cost = np.sqrt(np.maximum(0, squares))
    total = np.full((len(references), n + 1, m + 1), 1e9)
    total[:, 0, 0] = 0
    for s in range(2, n + m + 1):  # along the diagonals, whose cells do not need each other
        i = np.arange(max(1, s - m), min(n, s - 1) + 1)
        j = s - i
        best = np.minimum(np.minimum(total[:, i - 1, j], total[:, i, j - 1]), total[:, i - 1, j - 1])
        total[:, i, j] = cost[:, i - 1, j - 1] + best
    return np.array([total[k, n, len(r)] / (n + len(r)) for k, r in enumerate(references)])


def pitch(wave):
    """The median of the fundamental frequency in Hz, by autocorrelation over 50 ms."""
    found = []
    for i in range(0, len(wave) - 1200, 480):
        x = wave[i : i + 1200] - wave[i : i + 1200].mean()
        if np.sqrt((x**2).mean()) > 0.03:
            r = np.correlate(x, x, "full")[1199:]
            k = 55 + int(np.argmax(r[55:400]))  # 60 to 436 Hz
            if r[k] > 0.5 * r[0]:
                found.append(train.RATE / k)
    return float(np.median(found)) if found else 0.0


class Evaluation:
    def __init__(self, generator, options):
        self.generator, self.espeak, self.options = generator, train.Espeak(), options

    def say(self, text, speaker, context=(), seed=0):
        """The speech, and whether it ended by itself."""
        options = self.options | {"seed": seed, "max_audio_length_ms": 12_000}
        audio = np.array(self.generator.generate(text, speaker, context, **options))
        return audio, 0 < len(audio) < 12 * train.RATE

    def nearest(self, wave, references):
        return int(np.argmin(distances(cepstra(wave), references)))

    def sentences(self, speaker, n=50):
        """Of n sentences: nearest to the right one of all and their variants; ended; median length over theirs."""
        groups, voice = train.held_out_sentences()[:n], train.VOICES[speaker]
        texts = [s + "." for variants in groups for s in variants]
        waves = [self.espeak(t, voice)[0] for t in texts]
        references, right, ended, ratios = [cepstra(w) for w in waves], 0, 0, []
        for i, variants in enumerate(groups):
            audio, end = self.say(variants[0].capitalize() + ".", speaker, seed=i)
            ended += end
            if len(audio) > 1920:
                ratios.append(len(audio) / len(waves[4 * i]))
                found = self.nearest(audio, references)
                right += found == 4 * i
                if found != 4 * i:
                    print(f"    {variants[0]} / {texts[found]}", file=sys.stderr)
        return right, ended, float(np.median(ratios))

    def words(self, kind, n=60):
        """Of n lone words: nearest to the right one of 800 common ones and themselves; ended; of how many."""
        good, trained = train.words()
        r = random.Random(3)
        kinds = good[100:3000], sorted(set(trained) - set(good[:3000])), sorted(set(good) - set(trained))
        kinds = ([w for w in words if w.isalpha() and len(w) > 2] for words in kinds)
        common, rare, unseen = (r.sample(words, size) for words, size in zip(kinds, (800, n, n)))
        tested = {"common": common[:n], "rare": rare, "unseen": unseen}[kind]
        others = common if kind == "common" else common + tested
        references, right, ended = [cepstra(self.espeak(w + ".", train.VOICES[0])[0]) for w in others], 0, 0
        for i, w in enumerate(tested):
            audio, end = self.say(w + ".", 0, seed=i)
            ended += end
            found = others[self.nearest(audio, references)] if len(audio) > 1920 else ""
            right += found == w
            if found != w:
                print(f"    {w} / {found}", file=sys.stderr)
        return right, ended, len(others)

    def cloning(self, n=20):
        """n voices, half of men, from clips of the context: correlation of the pitch in and out; sentences right."""
        r, ins, outs, right = random.Random(5), [], [], 0
        groups = train.held_out_sentences()
        for i in range(n):
            names = [v for v in train.VARIANTS.split() if v[0] == "mf"[i % 2] and v[1:].isdigit()]
            voice = (f"en-us+{r.choice(names)}", 100 * i // n, 50, 160, 1.0)
            clip, said = groups[2 * i % 50][0], groups[(2 * i + 1) % 50]
            wave = self.espeak(clip + ".", voice)[0]
            audio, _ = self.say(said[0] + ".", 2, [csm.Segment(2, clip + ".", wave)], seed=i)
            references = [cepstra(self.espeak(s + ".", voice)[0]) for variants in groups for s in variants]
            found = self.nearest(audio, references) if len(audio) > 1920 else -1
            right += found == 4 * ((2 * i + 1) % 50)
            ins.append(pitch(wave))
            outs.append(pitch(audio))
        print("   ", *(f"{a:.0f}>{b:.0f}" for a, b in zip(ins, outs)), "Hz", file=sys.stderr)
        return float(np.corrcoef(ins, outs)[0, 1]), right

    def codec(self, n=60):
        """There and back: nearest to the right one of 200; log-mel L1."""
        groups, right, loss = train.held_out_sentences(), 0, []
        texts = [s + "." for variants in groups for s in variants]
        references = [[cepstra(self.espeak(t, v)[0]) for t in texts] for v in train.VOICES]
        filters, mimi = train.MEL.cpu().numpy(), self.generator.mimi
        for i in range(n):
            speaker, k = i % 2, 4 * (i % 50)
            wave = train.whole_frames(self.espeak(texts[k], train.VOICES[speaker])[0])
            out = np.array(mimi.decode(mimi.encode(mx.array(wave)[None, None]))[0, 0])
            right += self.nearest(out, references[speaker]) == k
            a, b = (np.log(filters @ spectrum(w, 240) + 0.096) for w in (out, wave))
            loss.append(np.abs(a - b).mean())
        return right, float(np.mean(loss))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", default=Path(__file__).parent)
    p.add_argument("--quantize", type=int, choices=(4, 8))
    p.add_argument("--only", nargs="+", default=("codec", "sentences", "words", "cloning"))
    p.add_argument("--temperature", type=float, default=0.9)
    args = p.parse_args()
    generator = csm.load(args.folder, dtype="float32", quantize=args.quantize)
    evaluation = Evaluation(generator, {"temperature": args.temperature})
    torch.set_num_threads(1)
    if "codec" in args.only:
        right, loss = evaluation.codec()
        print(f"| codec alone: sentences right | {right} of 60 |\n| its log-mel L1 | {loss:.3f} |", flush=True)
    if "sentences" in args.only:
        for speaker in (0, 1):
            right, ended, ratio = evaluation.sentences(speaker)
            print(f"| sentences right, speaker {speaker} | {right} of 50 |\n| ended by themselves | {ended} of 50 |")
            print(f"| their length over espeak-ng's, median | {ratio:.3f} |", flush=True)
    if "words" in args.only:
        for kind in ("common", "rare", "unseen"):
            right, ended, n = evaluation.words(kind)
            print(f"| lone words right of {n}, {kind} | {right / 60:.0%} |\n| ended | {ended} of 60 |", flush=True)
    if "cloning" in args.only:
        r, right = evaluation.cloning()
        print(f"| 20 cloned voices: correlation of pitch | {r:.3f} |\n| their sentences right | {right} of 20 |")


if __name__ == "__main__":
    main()
