"""What finetune.py learns from: conversations and preferences as files, as rows of a model, and made by a model.

A conversation is a list of turns {"text", "audio_path", "speaker"}. `train` takes conversations or single turns in the
forms of `read_items`; `dpo` takes a list of {"chosen", "rejected"}, `kto` one of {"segments", "preference": 1 or -1}.
`pairs` makes such data: each text said several times, the best and the worst of them by a judge.
"""

import csv
import hashlib
import io
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
from csm_tools import code_shards, command
from csm_tools.audio import MUCH_SILENCE, SILENCE_KEPT, check_clip, trim_silence

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

AUDIO = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus", ".aiff")

# ---------------------------------------------------------------------------------------------------- files

KEYS = {  # ours -> what data sets call it, in small letters; the first that is there counts
    "text": ("text", "normalized_text", "transcription", "transcript", "sentence"),
    "audio": ("audio_path", "audio", "audio_filepath", "audio_file", "file_name", "path"),
    "speaker": ("speaker", "speaker_id", "speaker_name"),
    "codes": ("codes_path",),
}
EXPECTED = {
    "train": '[[{"text": "...", "audio_path": "a.wav", "speaker": 0}, ...], ...]',
    "dpo": '[{"chosen": [{"text", "audio_path", "speaker"}, ...], "rejected": [...]}, ...]',
    "kto": '[{"segments": [{"text", "audio_path", "speaker"}, ...], "preference": 1 or -1}, ...]',
}


class TooLong(ValueError):
    """A clip or conversation is longer than is wanted, or than the model holds: left out, and no mistake."""


@dataclass
class Example:
    """What counts as one in a batch."""

    talks: list  # one Talk; of dpo the chosen and the rejected
    wanted: int = 1  # of kto: 1 or -1
    given: int = 0  # turns that a chosen and a rejected conversation both begin with: they are not learned
    other: "Talk | None" = None  # of kto: its texts with the speech of another


def read_data(path, command="train", skip_bad=False, speakers=None):
    """A file or a folder -> [Example], their Talks still conversations [Segment], audio and codes as paths.

    speakers: {name: number}; names that it lacks are added. kto takes the data of dpo, too. A turn may have
    "codes_path", an .npy of (F, K), in place of "audio_path" or beside it. Raises ValueError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    items, faults, found = read_items(path), [], []
    speakers = {} if speakers is None else speakers
    number_speakers([turn for _, item in items for turn in turns_of(item)], speakers)
    for place, item in items:
        try:
            if isinstance(item, ValueError):
                raise item
            found += examples_of(item, command, path.parent, speakers)
        except KeyError as e:
            faults.append(f"{place}: {e} is missing: expected {EXPECTED[command]}")
        except (TypeError, AttributeError) as e:
            faults.append(f"{place}: expected {EXPECTED[command]} ({e})")
        except ValueError as e:
            faults.append(f"{place}: {e}")
    report(faults, len(items), skip_bad)
    if not found:
        raise ValueError(f"{path} holds no conversations")
    return found


def report(faults, n, skip_bad):
    """Print what is wrong with items of the data, a line each, and raise ValueError, or go on without these."""
    if len(faults) == 1 and not skip_bad:
        raise ValueError(f"{faults[0]} (--skip-bad leaves out what is bad)")
    for fault in faults:
        print(f"skipped: {fault}" if skip_bad else fault, file=sys.stderr)
    if faults and not skip_bad:
        raise ValueError(f"{len(faults)} of {n} items are bad, as listed above (--skip-bad leaves them out)")


def examples_of(item, command, folder, speakers):
    """An item of the data -> its Examples. Raises an error for one of another form."""
    if command == "train":
        return [Example([segments_of(item, folder, speakers)])]
    if command == "kto" and "segments" in item:
        if item["preference"] not in (1, -1):
            raise TypeError(f"preference {item['preference']}")
        return [Example([segments_of(item["segments"], folder, speakers)], wanted=item["preference"])]
    good, bad = item["chosen"], item["rejected"]
    given = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(good, bad))])
    if given == min(len(good), len(bad)):
        raise TypeError(f"chosen and rejected are the same: {good}")
    good, bad = (segments_of(turns, folder, speakers) for turns in (good, bad))
    if command == "dpo":
        return [Example([good, bad], 1, given)]
    return [Example([good], 1, given), Example([bad], -1, given)]


def segments_of(talk, folder, speakers):
    """A conversation, or one turn, as the files have it -> [Segment]. Raises ValueError that names the turn."""
    talk = [talk] if isinstance(talk, dict) else talk
    if not talk:
        raise TypeError("a conversation without turns")
    out = []
    for i, turn in enumerate(talk, 1):
        place = f"turn {i}: " if len(talk) > 1 else ""
        turn = with_our_keys(turn)
        text, speaker = turn["text"], turn.get("speaker", 0)
        files = [file_of(turn[key], folder) if key in turn else None for key in ("audio", "codes")]
        if not any(files):
            raise KeyError("audio_path")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}its text is empty, or no text")
        for file in files:
            if file and not file.is_file():
                raise ValueError(f"{place}no such file: {file}")
        try:
            named = isinstance(speaker, str) and speaker in speakers
            number = speakers[speaker] if named else command.as_speaker(speaker)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{place}{e}") from None
        out.append(csm.Segment(number, text.strip().removeprefix("\ufeff"), *files))
    return out


def with_our_keys(turn):
    """A turn's {key: value}, the keys in any case and of any of KEYS, with ours; what is None is left out."""
    low = {str(key).lower().strip(): value for key, value in turn.items() if value is not None}
    out = {}
    for ours, names in KEYS.items():
        if name := next((name for name in names if name in low), None):
            out[ours] = low[name]
    return out


def file_of(name, folder):
    """A path of the data: relative to the file that names it, with the slashes of any system."""
    path = folder / Path(str(name)).expanduser()
    return path if path.is_file() else folder / Path(str(name).replace("\\", "/")).expanduser()


def turns_of(item):
    """All turns in an item of the data, as far as it has a known form."""
    if isinstance(item, list):
        return [turn for turn in item if isinstance(turn, dict)]
    if not isinstance(item, dict):
        return []
    parts = [item[key] for key in ("segments", "chosen", "rejected") if isinstance(item.get(key), list)]
    return [turn for part in parts for turn in turns_of(part)] or [item]


def number_speakers(turns, speakers):
    """Add to {name: number} the names of speakers among the turns, in order of appearance."""
    said = [with_our_keys(turn).get("speaker") for turn in turns]
    speakers |= command.number_speakers([s for s in said if isinstance(s, (str, int))], speakers)


def read_items(path):
    """The data in any form -> [(place, item)]: a conversation, a turn or a preference as the JSON has it, or its fault.

    A file: a JSON list, JSON lines, or a table (.csv, .tsv, LJSpeech's metadata.csv); a folder: of a Hub data set (by
    the package datasets), with a metadata.csv or metadata.jsonl, with a folder of clips for each conversation, or of
    clips and their texts. Raises ValueError.
    """
    if not path.is_dir():
        return read_table(path) if path.suffix.lower() in (".csv", ".tsv") else read_lines(path)
    if any(path.rglob("*.parquet")) or any(path.rglob("*.arrow")):
        return read_hub_data(path)
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).is_file():
            return [(place, from_folder(turn, path)) for place, turn in read_items(path / name)]
    return read_folder(path)


def from_folder(turn, folder):
    """A turn of a table in `folder` with an absolute path."""
    for key in KEYS["audio"]:
        if isinstance(turn, dict) and key in turn:
            turn = turn | {key: str(file_of(turn[key], folder.resolve()))}
    return turn


def read_lines(path):
    """A JSON list, or a JSON value a line."""
    text = read_utf8(path)
    try:
        items = json.loads(text)
        if not isinstance(items, list) and "\n" in text.strip():
            raise ValueError(f"{path}: a JSON list is expected, or a JSON value a line")
        return [(f"{path}, item {i}", item) for i, item in enumerate(items if isinstance(items, list) else [items], 1)]
    except json.JSONDecodeError as e:
        error = e
    items = []
    for n, line in enumerate(text.splitlines(), 1):
        try:
            items += [(f"{path}, line {n}", json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as e:
            if not items:  # not even the first line: no JSON lines
                raise ValueError(f"{path} is neither a JSON list ({error}) nor JSON lines") from None
            items.append((f"{path}, line {n}", ValueError(f"{e}")))
    return items


def read_table(path):
    """LJSpeech's `id|text|normalized text`, clips in wavs/ beside it; or columns with names, by ",", "|" or tab."""
    text = read_utf8(path)
    first = text.partition("\n")[0]
    delimiter = next((c for c in "|\t," if c in first), ",")
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = [*csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting)]
    names = [name.lower().strip() for name in rows[0]] if rows else []
    known = {name for group in KEYS.values() for name in group}
    if known & set(names):
        return [(f"{path}, row {n}", dict(zip(names, row))) for n, row in enumerate(rows[1:], 2) if row]
    if delimiter != "|":
        raise ValueError(f"{path}: expected id|text|normalized text, or a first line such as audio_path,text,speaker")
    items = []
    for n, row in enumerate(rows, 1):
        if len(row) < 2:
            items += [(f"{path}, row {n}", ValueError("expected id|text|normalized text"))] if row else []
            continue
        stem = row[0].strip().replace("\\", "/")
        places = [path.parent / folder / f"{stem}{end}" for folder in ("wavs", "") for end in ("", *AUDIO)]
        clip = next((place for place in places if place.is_file()), places[1])
        spoken = row[2] if len(row) > 2 and row[2].strip() else row[1]
        items.append((f"{path}, row {n}", {"text": spoken, "audio_path": str(clip.resolve())}))
    return items


def read_folder(folder):
    """A folder of clips, each with its text beside it -> [(place, conversation)].

    FOLDER/conversation/001_speaker0_hello.wav: a folder is a conversation. FOLDER/hello.wav: a conversation each, of
    speaker 0, or as the name has it (speaker1_hello.wav).
    """
    folder = folder.resolve()
    talks, clips = {}, [p for depth in ("*/*", "*") for p in folder.glob(depth) if p.suffix.lower() in AUDIO]
    clips.sort(key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(p).lower())])  # 2 before 10
    for clip in clips:
        place = clip if clip.parent == folder else clip.parent
        speaker = re.search(r"speaker_?(\d+)", clip.stem, re.IGNORECASE)
        text = next((clip.with_suffix(end) for end in (".txt", ".TXT") if clip.with_suffix(end).is_file()), None)
        talk = talks.setdefault(place, [])
        if not text:
            talks[place] = ValueError(f"{clip.name} has no .txt beside it")
        elif not speaker and place != clip:
            talks[place] = ValueError(f"{clip.name} has no speaker0, speaker1 ... in its name")
        elif isinstance(talk, list):
            number = int(speaker[1]) if speaker else 0
            talk.append({"text": read_utf8(text).strip(), "audio_path": str(clip), "speaker": number})
    if not talks:
        raise ValueError(f"{folder} has no clips, and no folders of clips")
    return [*talks.items()]


def read_hub_data(folder):
    """A Hub data set's folder of .parquet or .arrow with a column of audio -> [(place, turn)].

    Its sounds are written once into FOLDER/clips as files of their own, which training then reads; clips/index.json
    lists them, so that the next start reads that alone.
    """
    clips, files = folder / "clips", sorted([*folder.rglob("*.parquet"), *folder.rglob("*.arrow")])
    about = [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if (clips / "index.json").is_file():
        index = mimi.read_json(clips / "index.json")
        if index.get("files") == about:
            turns = index["turns"]
            return [(f"{folder}, row {i}", from_folder(turn, clips)) for i, turn in enumerate(turns)]
    command.need("datasets", "datasets")
    import datasets

    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(folder))
    else:
        parquet = [str(file) for file in files if file.suffix == ".parquet"]
        data = datasets.load_dataset("parquet", data_files=parquet, split="train")
    if isinstance(data, dict):  # of splits
        data = data["train"] if "train" in data else next(iter(data.values()))
    column = next((name for name, kind in data.features.items() if isinstance(kind, datasets.Audio)), "audio")
    if column not in data.features:
        raise ValueError(f"{folder} has no column of audio: {', '.join(data.features)}")
    turns, columns = [], {name for names in KEYS.values() for name in names} - {column}
    clips.mkdir(exist_ok=True)
    if isinstance(data.features[column], datasets.Audio):
        data = data.cast_column(column, datasets.Audio(decode=False))  # to bytes as they are
    for i, row in enumerate(tqdm(data, desc="clips", unit="clip", disable=None, leave=False, delay=2)):
        sound = row.pop(column)
        name = f"{i:06}_{Path(sound.get('path') or 'clip.wav').name}"
        content = sound.get("bytes") or Path(sound["path"]).read_bytes()
        if not (clips / name).is_file() or (clips / name).stat().st_size != len(content):
            with mimi.replacing(clips / name) as file:
                file.write(content)
        turn = {key: value for key, value in row.items() if str(key).lower().strip() in columns}
        turns.append(turn | {"audio_path": name})
    with mimi.replacing(clips / "index.json") as file:
        file.write(json.dumps({"files": about, "turns": turns}, default=str).encode())
    return [(f"{folder}, row {i}", from_folder(turn, clips)) for i, turn in enumerate(turns)]


def read_utf8(path):
    """The text of a file, without the mark that Windows puts before it. Raises ValueError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None


# ---------------------------------------------------------------------------------------------------- rows


class Talk:
    """A conversation as rows (T, K + 1), and the indices of those that are learned: the frames of its speech.

    The first `given` turns are not learned; what follows `limit` rows is cut off. Rows are made whenever they are asked
    for, so that codes may stay on disk. reference: (N, 2), what the model before training loses on each of the learned
    frames: in codebook 0, and in the others together.
    """

    def __init__(self, generator, segments, masked=(), given=0, limit=None):
        self.generator, self.segments, self.reference = generator, segments, None
        self.n_rows, self.spans = 0, []
        for i, s in enumerate(segments):
            start = self.n_rows + len(generator.text_rows(s.text, s.speaker))
            self.n_rows = start + len(s.codes) + 1
            if s.speaker not in masked and i >= given:
                self.spans.append((start, self.n_rows))
        if limit is not None and limit < self.n_rows:
            self.n_rows = limit
            self.spans = [(start, min(end, limit)) for start, end in self.spans if start < limit]

    @property
    def rows(self):
        """(T, K + 1) int32"""
        parts = [x for s in self.segments
                 for x in (self.generator.text_rows(s.text, s.speaker), self.generator.audio_rows(s))]  # fmt: skip
        return np.concatenate(parts)[: self.n_rows]

    @property
    def learned(self):
        """(N,) int32"""
        return np.concatenate([np.arange(start, end) for start, end in self.spans]).astype(np.int32)

    def mark(self):
        """16 bytes, the same for the same rows and learned."""
        said = [(s.text, s.speaker, s.codes.key.hex()) for s in self.segments]
        return code_shards.hashed(json.dumps([said, self.spans, self.n_rows]).encode())


def encode(generator, examples, args):
    """What read_data gave, with Talks. Codes are kept in --codes by what a file holds. Bad clips: --skip-bad."""
    shards, codec = code_shards.Shards(args.codes or args.output_dir / "codes"), codec_mark(generator)
    out, faults, notes = [], [], []
    try:
        for example in tqdm(examples, desc="codes", unit="item", disable=None, leave=False, delay=2):
            try:
                talks = []
                for segments in example.talks:
                    coded = [with_codes(generator, shards, codec, s, args) for s in segments]
                    notes += [note for _, found in coded for note in found]
                    segments = [segment for segment, _ in coded]
                    talks.append(Talk(generator, segments, args.mask_speaker_ids, example.given))
                    if (n := talks[-1].n_rows) > generator.max_positions:
                        name, rate = segments[0].audio or segments[0].text, generator.mimi.config.frame_rate
                        limit = f"{generator.max_positions / rate:.0f} s of sound and text"
                        raise TooLong(f"{name} ...: takes as much as {n / rate:.0f} s, and the model holds {limit}")
                if all(talk.spans for talk in talks):
                    out.append(replace(example, talks=talks))
            except TooLong as e:
                notes.append(f"left out: {e}")
            except ValueError as e:
                faults.append(str(e))
    finally:
        shards.flush()  # an interruption loses nothing
    report(faults, len(examples), args.skip_bad)
    for note in notes[:5]:
        print(note, file=sys.stderr)
    if len(notes) > 5:
        print(f"... and {len(notes) - 5} more such notes on clips", file=sys.stderr)
    if not out:
        raise ValueError("nothing is left to learn from")
    return out


def codec_mark(generator):
    """Bytes that tell a codec, and how clips are prepared for it: another's codes are others."""
    mark = hashlib.sha256(f"{SILENCE_KEPT} {MUCH_SILENCE} {generator.model.config.audio_num_codebooks}".encode())
    for name, w in tree_flatten(generator.mimi.parameters()):
        mark.update(f"{name} {w.shape}".encode() + np.array(w.reshape(-1)[:64].astype(mx.float32)).tobytes())
    return mark.digest()


def with_codes(generator, shards, codec, segment, args):
    """A Segment of paths -> the Segment with its code_shards.Codes, and notes on its clip. Raises ValueError."""
    file, notes = segment.codes or segment.audio, []
    try:
        key = shards.key_of(file, codec, b"codes" if segment.codes else b"sound")
    except OSError as e:
        raise ValueError(f"cannot read {file}: {e.strerror}") from None
    codes = shards.get(key)
    if codes is None:
        made, notes = made_codes(generator, segment)
        codes = shards.add(key, made)
    n_frames, rate = generator.max_frames(args.max_audio_length_ms), generator.mimi.config.frame_rate
    if not 0 < len(codes) <= n_frames and not segment.codes:  # an empty or endless sampling is one to reject
        raise TooLong(f"{file}: {len(codes) / rate:.1f} s, and at most {n_frames / rate:.1f} s are wanted")
    return replace(segment, codes=codes), notes


def made_codes(generator, segment):
    """A Segment of paths -> its codes (F, K), and notes on its clip. Raises ValueError.

    They are read from the .npy of `codes`, or else made of the clip, without the silence at its ends.
    """
    if segment.codes:
        try:
            codes = np.load(segment.codes)
        except (OSError, EOFError, ValueError):  # of text that advises allow_pickle
            raise ValueError(f"{segment.codes} is not an .npy file") from None
        try:
            if codes.dtype.kind not in "iu":
                raise ValueError(f"{codes.dtype} in place of integers")
            generator.audio_rows(replace(segment, codes=codes))  # raises for what the model does not have
        except ValueError as e:
            raise ValueError(f"{segment.codes} is not an .npy of codes: {e}") from None
        return codes, []
    file, notes = segment.audio, []
    samples = mimi.read_audio(file, generator.sample_rate)
    trimmed = trim_silence(samples)
    if len(trimmed) < len(samples):
        cut = (len(samples) - len(trimmed)) / generator.sample_rate
        notes.append(f"{file}: {cut:.1f} s of silence at its ends left out")
    try:
        notes += [f"{file}: {warning}" for warning in check_clip(trimmed, segment.text, shortest=0.0)]
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    return generator.encode(replace(segment, audio=trimmed)).codes, notes


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
        e.other = Talk(generator, segments, args.mask_speaker_ids, e.given, generator.max_positions)


def collate(talks, chosen):
    """Talks and the rows of each whose codebooks 1.. are learned -> rows (B, T, K + 1), first (N,), some (N',)."""
    T = max(t.n_rows for t in talks)
    rows = [np.pad(t.rows, [(0, T - t.n_rows), (0, 0)]) for t in talks]  # causal: padding behind changes nothing
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
