"""What finetune.py learns from: conversations and preferences as files, as rows of a model, and made by a model.

The files are csm-mlx's: a conversation is a list of {"text", "audio_path", "speaker"}; `train` takes a list of
conversations, `dpo` one of {"chosen", "rejected"}, `kto` one of {"segments", "preference": 1 or -1}. `pairs` makes such
data: each text said several times, the best and the worst of them by a judge.
"""

import hashlib
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import csm  # before mlx
import csm_batch
import mimi
from csm_tools import command

import mlx.core as mx  # isort: skip
import numpy as np
from tqdm import tqdm

AUDIO = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus", ".aiff")

# ---------------------------------------------------------------------------------------------------- files


def read_folder(folder):
    """FOLDER/conversation/001_speaker0_hello.wav with .txt beside it -> conversations as the JSON has them."""
    talks, clips = {}, [p for p in Path(folder).resolve().glob("*/*") if p.suffix.lower() in AUDIO]
    clips.sort(key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(p).lower())])  # 2 before 10
    for clip in clips:
        speaker, text = re.search(r"speaker_?(\d+)", clip.stem), clip.with_suffix(".txt")
        if not speaker or not text.is_file():
            raise ValueError(f"{clip}: no {'.txt beside it' if speaker else 'speaker0, speaker1 ... in its name'}")
        words = text.read_text(encoding="utf-8").strip()
        talks.setdefault(clip.parent, []).append({"text": words, "audio_path": str(clip), "speaker": int(speaker[1])})
    if not talks:
        raise ValueError(f"{folder} has no folders of clips")
    return list(talks.values())


EXPECTED = {
    "train": '[[{"text": "...", "audio_path": "a.wav", "speaker": 0}, ...], ...]',
    "dpo": '[{"chosen": [{"text", "audio_path", "speaker"}, ...], "rejected": [...]}, ...]',
    "kto": '[{"segments": [{"text", "audio_path", "speaker"}, ...], "preference": 1 or -1}, ...]',
}


@dataclass
class Example:
    """What counts as one in a batch."""

    talks: list  # one Talk; of dpo the chosen and the rejected
    wanted: int = 1  # of kto: 1 or -1
    given: int = 0  # turns that a chosen and a rejected conversation both begin with: they are not learned
    other: "Talk | None" = None  # of kto: its texts with the speech of another


def read_data(path, command="train"):
    """A JSON file or a folder -> [Example], their Talks still conversations [Segment], audio and codes as paths.

    kto takes the data of dpo too. A segment may have "codes_path", an .npy of (F, K), in place of "audio_path" or
    beside it. Raises ValueError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")

    def segments(talk):
        out = []
        for t in talk:
            files = [path.parent / Path(t[k]).expanduser() if k in t else None for k in ("audio_path", "codes_path")]
            if not any(files):
                raise KeyError("audio_path")
            out.append(csm.Segment(int(t["speaker"] if "speaker" in t else t["speaker_id"]), t["text"], *files))
        if not out:
            raise TypeError("a conversation without turns")
        return out

    out = []
    try:
        for item in read_folder(path) if path.is_dir() else json.loads(path.read_text(encoding="utf-8")):
            if command == "train":
                out.append(Example([segments(item)]))
            elif command == "kto" and "segments" in item:
                if item["preference"] not in (1, -1):
                    raise TypeError(f"preference {item['preference']}")
                out.append(Example([segments(item["segments"])], wanted=item["preference"]))
            else:
                good, bad = item["chosen"], item["rejected"]
                given = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(good, bad))])
                if given == min(len(good), len(bad)):
                    raise TypeError(f"chosen and rejected are the same: {good}")
                good, bad = segments(good), segments(bad)
                pair = [Example([good, bad], 1, given)], [Example([good], 1, given), Example([bad], -1, given)]
                out += pair[command == "kto"]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: expected {EXPECTED[command]} ({type(e).__name__}: {e})") from None
    if not out:
        raise ValueError(f"{path} holds no conversations")
    return out


# ---------------------------------------------------------------------------------------------------- rows


class Talk:
    """A conversation as rows (T, K + 1), and the indices of those that are learned: the frames of its speech.

    The first `given` turns are not learned. reference: (N, 2), what the model before training loses on each of these
    frames: in codebook 0, and in the others together.
    """

    def __init__(self, generator, segments, masked=(), given=0):
        rows, learned, self.segments = [], [], segments
        for i, s in enumerate(segments):
            text, audio = generator.text_rows(s.text, s.speaker), generator.audio_rows(s)
            start = sum(map(len, rows)) + len(text)
            if s.speaker not in masked and i >= given:
                learned += range(start, start + len(audio))
            rows += [text, audio]
        self.rows, self.learned, self.reference = np.concatenate(rows), np.array(learned, np.int32), None


def encode(generator, examples, args):
    """What read_data gave, with Talks. Codes are kept in OUTPUT/codes by what a file holds. Bad files: --skip-bad."""
    (args.output_dir / "codes").mkdir(parents=True, exist_ok=True)
    out = []
    for example in examples:
        try:
            talks = []
            for segments in example.talks:
                segments = [with_codes(generator, s, args) for s in segments]
                talks.append(Talk(generator, segments, args.mask_speaker_ids, example.given))
                if (n := len(talks[-1].rows)) > generator.max_positions:
                    name = segments[0].audio or segments[0].text
                    raise ValueError(f"{name} ...: {n} positions, and the model has {generator.max_positions}")
            if all(len(talk.learned) for talk in talks):
                out.append(replace(example, talks=talks))
        except ValueError as e:
            if not args.skip_bad:
                raise ValueError(f"{e} (--skip-bad leaves such conversations out)") from None
            print(f"skipped: {e}", file=sys.stderr)
    if not out:
        raise ValueError("nothing is left to learn from")
    return out


def with_codes(generator, segment, args):
    """The Segment with its codes (F, K), from `codes` if that is the path of an .npy, else from its audio."""
    kept = file = segment.codes or segment.audio
    if not file.is_file():
        raise ValueError(f"no such file: {file}")
    if not segment.codes:
        codec = np.array(generator.mimi.first.codebooks[:, :8]).tobytes()  # another model's codes are others
        kept = args.output_dir / "codes" / f"{hashlib.sha256(codec + file.read_bytes()).hexdigest()[:32]}.npy"
        if not kept.exists():
            with mimi.replacing(kept) as f:
                np.save(f, generator.encode(segment).codes)
    try:
        codes = np.load(kept)
    except (OSError, EOFError) as e:
        raise ValueError(f"{kept} is not an .npy of codes: {e}") from None
    n_frames = generator.max_frames(args.max_audio_length_ms)
    if not 0 < len(codes) <= n_frames and not segment.codes:  # an empty or endless sampling is one to reject
        raise ValueError(f"{file}: {len(codes) * 80} ms, and at most {n_frames * 80} are wanted")
    return replace(segment, codes=codes)


def mismatch(generator, examples, args):
    """Give each Example its texts with the speech of the next one that says something else, turn by turn."""
    texts = [[s.text for s in e.talks[0].segments] for e in examples]
    for i, e in enumerate(examples):
        following = [*range(i + 1, len(examples)), *range(i)]
        if (j := next((j for j in following if texts[j] != texts[i]), None)) is None:
            raise ValueError("kto needs conversations that say different things")
        speech = itertools.cycle(s.codes for s in examples[j].talks[0].segments[examples[j].given :])
        own = e.talks[0].segments
        segments = own[: e.given] + [replace(s, codes=codes) for s, codes in zip(own[e.given :], speech)]
        e.other = Talk(generator, segments, args.mask_speaker_ids, e.given)
        e.other.rows = e.other.rows[: generator.max_positions]
        e.other.learned = e.other.learned[e.other.learned < len(e.other.rows)]


def collate(talks, chosen):
    """Talks and the rows of each whose codebooks 1.. are learned -> rows (B, T, K + 1), first (N,), some (N',)."""
    T = max(len(t.rows) for t in talks)
    rows = [np.pad(t.rows, [(0, T - len(t.rows)), (0, 0)]) for t in talks]  # causal: padding behind changes nothing
    first = [t.learned + b * T for b, t in enumerate(talks)]
    some = [c + b * T for b, c in enumerate(chosen)]
    return mx.array(np.stack(rows)), mx.array(np.concatenate(first)), mx.array(np.concatenate(some))


def choose(talk, fraction, *seed):
    """A random fraction of a Talk's frames, one at least."""
    n = max(1, round(fraction * len(talk.learned)))
    return np.sort(np.random.default_rng(seed).choice(talk.learned, n, replace=False))


# ---------------------------------------------------------------------------------------------------- pairs


def pairs(args):
    """Each text said --samples times, the best and the worst of them as OUT/pairs.json has them for dpo and kto.

    A text that is done is a line of OUT/scores.jsonl; what was interrupted goes on behind the last one.
    """
    texts = [t.strip() for t in command.read_text(f"@{args.texts}").splitlines() if t.strip()]
    if not texts:
        raise ValueError(f"{args.texts} holds no texts")
    if args.samples < 2 or args.batch < 1:
        raise ValueError("--samples is 2 or more, --batch 1 or more")
    if args.watermark:
        raise ValueError("a model must not learn the mark: no --watermark")
    if args.codebooks:
        raise ValueError("dpo and kto learn all codebooks: no --codebooks")
    context, options = command.read_options(args)
    args.out.mkdir(parents=True, exist_ok=True)
    done = scores_so_far(args, texts)
    generator = command.load_for(args)
    context = [generator.encode(s) for s in context]
    context = context or generator.voice_prompt(args.voice, args.speaker)
    with open(args.out / "scores.jsonl", "a") as log:
        bar = tqdm(total=len(texts), initial=len(done), unit="text", disable=None)
        for i, said in samplings(generator, texts, len(done), args, context, options):
            scores = []
            for j, (codes, ended) in enumerate(said):
                audio = np.array(generator.decode(mx.array(codes)))
                file = args.out / f"{i:05}_{j}.wav"
                mimi.write_audio(file, audio if len(audio) else np.zeros(1920, np.float32))
                np.save(file.with_suffix(".npy"), codes)
                if args.judge:
                    scores.append(asked(args.judge, file, texts[i]))
                else:
                    scores.append(judged(texts[i], codes, audio, ended))
            for j in set(range(len(scores))) - set(extremes(scores, args.margin)):
                for suffix in ("wav", "npy"):
                    (args.out / f"{i:05}_{j}.{suffix}").unlink()
            log.write(json.dumps(scores) + "\n")
            log.flush()
            done.append(scores)
            bar.update(1)
    before = []
    for i, s in enumerate(context):
        np.save(args.out / f"context_{i}.npy", s.codes)
        before.append({"text": s.text, "speaker": s.speaker, "codes_path": f"context_{i}.npy"})
    found = []
    for i, scores in enumerate(done):
        names = [f"{i:05}_{j}" for j in extremes(scores, args.margin)]
        turn = {"text": texts[i], "speaker": args.speaker}
        turns = [turn | {"audio_path": f"{name}.wav", "codes_path": f"{name}.npy"} for name in names]
        if turns:
            found.append({kind: [*before, turn] for kind, turn in zip(("chosen", "rejected"), turns)})
    with mimi.replacing(args.out / "pairs.json") as file:
        file.write(json.dumps(found, indent=1, ensure_ascii=False).encode())
    print(f"{args.out / 'pairs.json'}: {len(found)} pairs of {len(texts)} texts", file=sys.stderr)


def extremes(scores, margin):
    """The indices of the best and the worst, or none where they are as good."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return [best, worst] if scores[best] - scores[worst] > margin else []


def scores_so_far(args, texts):
    """The lines of OUT/scores.jsonl, each the scores of a text, behind a first one that tells what they are of."""
    file = args.out / "scores.jsonl"
    mark = {k: str(v) for k, v in vars(args).items() if k not in ("out", "batch", "command", "function")}
    mark["texts"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    first, *done = [json.loads(line) for line in lines if line.endswith("\n")] or [mark]  # the last may be half a line
    if other := [k for k in mark if mark[k] != first.get(k)]:
        raise ValueError(f"{file} is of another {', '.join(other)}: give the same, or another --out")
    with mimi.replacing(file) as f:
        f.write("".join(json.dumps(line) + "\n" for line in (mark, *done)).encode())
    return done


def samplings(generator, texts, start, args, context, options):
    """Yields (i, [(codes (F, K), whether it ended by itself)] * --samples) of each text from `start` on, in order.

    Sampling j of text i is drawn with seed + i * samples + j, whatever the batch.
    """
    K, longest = generator.model.config.audio_num_codebooks, options.pop("max_audio_length_ms")
    seed, sampling = generator.read_options(args.seed, options)
    before = generator.context_rows(context)
    cache = generator.context_cache(before)
    waiting = deque(itertools.product(range(start, len(texts)), range(args.samples)))
    batch, running, said = csm_batch.Batch(generator), {}, {}
    while waiting or running:
        while waiting and len(running) < args.batch:
            i, j = waiting.popleft()
            rows = generator.text_rows(texts[i], args.speaker)
            n = min(generator.max_frames(longest, texts[i]), generator.max_positions - len(before) - len(rows))
            uid = batch.insert(rows, n, (seed + i * args.samples + j) % 2**64, sampling, cache)
            running[uid] = i, j, n, []
        for uid, codes in batch.next():
            i, j, n, frames = running[uid]
            if codes is not None:
                frames.append(codes)
                continue
            del running[uid]
            said.setdefault(i, {})[j] = np.array(frames, np.int32).reshape(-1, K), len(frames) < n
        while len(said.get(start, ())) == args.samples:
            yield start, [said[start][j] for j in range(args.samples)]
            del said[start]
            start += 1


def judged(text, codes, audio, ended):
    """How bad a sampling is, below 0: its length beside the text's, silence, repetition, no end. 0: nothing is odd."""
    if not len(codes):
        return -5.0
    seconds, usual = 0.08 * len(codes), 0.4 + 0.07 * len(text.encode())  # 14 letters a second
    loud = np.sqrt((audio.reshape(len(codes), -1) ** 2).mean(axis=1))
    silent = (loud < 0.02 * loud.max() + 1e-4).mean()
    fours = np.lib.stride_tricks.sliding_window_view(codes[:, 0], min(4, len(codes)))
    repeated = 1 - len(np.unique(fours, axis=0)) / len(fours)
    odd = max(0, abs(math.log(seconds / usual)) - math.log(1.5)), max(0, silent - 0.3), max(0, repeated - 0.2)
    return -float(sum(odd) + 2 * (not ended))


def asked(command, wav, text):
    """The number that is the last word of what `command` prints, {audio} and {text} put in."""
    words = [w.replace("{audio}", str(wav)).replace("{text}", text) for w in shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True)
    try:
        score = float(done.stdout.split()[-1])
    except (ValueError, IndexError):
        score = math.nan
    if done.returncode or math.isnan(score):
        said = " ".join((done.stdout + done.stderr).split())[-200:]
        raise ValueError(f"--judge gave no number for {wav}: exit status {done.returncode}, {said!r}")
    return score
