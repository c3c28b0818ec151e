"""finetune.py's data: reads conversations and preferences from files, makes rows of them, and generates preferences.

A conversation is a list of turns {"text", "audio_path", "speaker"}. `train` takes conversations or single turns in the
forms of `read_items`; `dpo` takes a list of {"chosen", "rejected"}, `kto` one of {"segments", "preference": 1 or -1}.
`pairs` makes such data: it speaks each text several times, and a judge picks the best and the worst.
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

KEYS = {  # our key -> the keys of other data sets, in lower case; the first one found counts
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
    """A clip or conversation exceeds --max-audio-length-ms or the model's context. It is left out; not an error."""


@dataclass
class Example:
    """One example of a batch."""

    talks: list  # one Talk; dpo: the chosen and the rejected
    wanted: int = 1  # kto: 1 or -1
    given: int = 0  # turns that chosen and rejected conversation share; they are context only
    other: "Talk | None" = None  # kto: the same texts with another example's speech


def read_data(path, command="train", skip_bad=False, speakers=None):
    """A file or folder -> [Example], whose talks are lists of Segments with paths as audio and codes.

    speakers: {name: number}; new names are added. kto also takes dpo's data. A turn may have "codes_path", an .npy of
    (F, K), instead of "audio_path" or beside it. Raises ValueError.
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
    """Print a line for each bad item. Raises ValueError if there is one and skip_bad is false."""
    if len(faults) == 1 and not skip_bad:
        raise ValueError(f"{faults[0]} (--skip-bad leaves out bad items)")
    for fault in faults:
        print(f"skipped: {fault}" if skip_bad else fault, file=sys.stderr)
    if faults and not skip_bad:
        raise ValueError(f"{len(faults)} of {n} items are bad, as listed above (--skip-bad leaves them out)")


def examples_of(item, command, folder, speakers):
    """An item of the data -> its Examples. Raises KeyError, TypeError, AttributeError or ValueError if it is bad."""
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
    """A conversation or single turn of the data -> [Segment]. ValueErrors name the turn."""
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
            raise ValueError(f"{place}its text is empty or not a string")
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
    """A turn's {key: value} with our keys in place of any of KEYS, in any case; None values are left out."""
    low = {str(key).lower().strip(): value for key, value in turn.items() if value is not None}
    out = {}
    for ours, names in KEYS.items():
        if name := next((name for name in names if name in low), None):
            out[ours] = low[name]
    return out


def file_of(name, folder):
    """A path in the data, relative to the file that names it. Windows' backslashes work everywhere."""
    path = folder / Path(str(name)).expanduser()
    return path if path.is_file() else folder / Path(str(name).replace("\\", "/")).expanduser()


def turns_of(item):
    """All turns in an item of the data, if its form is known."""
    if isinstance(item, list):
        return [turn for turn in item if isinstance(turn, dict)]
    if not isinstance(item, dict):
        return []
    parts = [item[key] for key in ("segments", "chosen", "rejected") if isinstance(item.get(key), list)]
    return [turn for part in parts for turn in turns_of(part)] or [item]


def number_speakers(turns, speakers):
    """Add the turns' speakers to {name: number}, in order of appearance."""
    said = [with_our_keys(turn).get("speaker") for turn in turns]
    speakers |= command.number_speakers([s for s in said if isinstance(s, (str, int))], speakers)


def read_items(path):
    """Data in any form -> [(place, item)]. An item is a conversation, turn or preference as in JSON, or a ValueError.

    A file may be a JSON list, JSON lines, or a table (.csv, .tsv, LJSpeech's metadata.csv). A folder may hold a Hub
    data set (read by the package datasets), a metadata.csv or metadata.jsonl, a folder of clips for each conversation,
    or clips with their texts. Raises ValueError.
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
    """A turn whose audio path is relative to `folder`, with that path absolute."""
    for key in KEYS["audio"]:
        if isinstance(turn, dict) and key in turn:
            turn = turn | {key: str(file_of(turn[key], folder.resolve()))}
    return turn


def read_lines(path):
    """Read a JSON list, or one JSON value per line."""
    text = read_utf8(path)
    try:
        items = json.loads(text)
        if not isinstance(items, list) and "\n" in text.strip():
            raise ValueError(f"{path}: expected a JSON list, or one JSON value per line")
        return [(f"{path}, item {i}", item) for i, item in enumerate(items if isinstance(items, list) else [items], 1)]
    except json.JSONDecodeError as e:
        error = e
    items = []
    for n, line in enumerate(text.split("\n"), 1):  # a JSON string may contain other line ends, such as U+2028
        try:
            items += [(f"{path}, line {n}", json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as e:
            if not items:  # the first line is no JSON, so these are no JSON lines
                raise ValueError(f"{path} is neither a JSON list ({error}) nor JSON lines") from None
            items.append((f"{path}, line {n}", ValueError(f"{e}")))
    return items


def read_table(path):
    """Read LJSpeech's `id|text|normalized text` with clips in wavs/, or named columns split by ",", ";", "|" or tab."""
    text = read_utf8(path).replace("\r\n", "\n").replace("\r", "\n")
    first = text.partition("\n")[0]
    delimiter = next((c for c in "|\t;," if c in first), ",")
    quoting = csv.QUOTE_MINIMAL if delimiter in ";," else csv.QUOTE_NONE
    try:
        rows = [*csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting)]
    except csv.Error as e:
        raise ValueError(f"cannot read {path}: {e}") from None
    names = [name.lower().strip() for name in rows[0]] if rows else []
    known = {name for group in KEYS.values() for name in group}
    if known & set(names):
        wrong = ValueError(f"more columns than the first line's {len(names)}: quote a text that contains {delimiter!r}")
        items = [
            (n, wrong if any(row[len(names) :]) else dict(zip(names, row))) for n, row in enumerate(rows[1:], 2) if row
        ]
        return [(f"{path}, row {n}", item) for n, item in items]
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
    """Clips with their texts beside them -> [(place, conversation)].

    A subfolder is a conversation: FOLDER/conversation/001_speaker0_hello.wav. A clip right in FOLDER is one of its own,
    by speaker 0 unless its name says otherwise: FOLDER/speaker1_hello.wav.
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
    """A Hub data set's folder of .parquet or .arrow with an audio column -> [(place, turn)].

    Writes its clips once as files into FOLDER/clips, and lists them in clips/index.json, which is all that the next
    start reads.
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
        raise ValueError(f"{folder} has no audio column: {', '.join(data.features)}")
    turns, columns = [], {name for names in KEYS.values() for name in names} - {column}
    clips.mkdir(exist_ok=True)
    if isinstance(data.features[column], datasets.Audio):
        data = data.cast_column(column, datasets.Audio(decode=False))  # keep the files' bytes
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
    """The text of a file, without a byte order mark. Raises ValueError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None


# ---------------------------------------------------------------------------------------------------- rows


class Talk:
    """A conversation as rows (T, K + 1), and the indices of the learned rows: the frames of its speech.

    The first `given` turns are not learned. At most `limit` rows are kept. Rows are made on access, so that codes can
    stay on disk. reference (N, 2): each learned frame's loss before training, in codebook 0 and in the others together.
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
        """16 bytes that identify the rows and which of them are learned."""
        said = [(s.text, s.speaker, s.codes.key.hex()) for s in self.segments]
        return code_shards.hashed(json.dumps([said, self.spans, self.n_rows]).encode())


def encode(generator, examples, args):
    """Encode the Examples of read_data into Talks. --codes caches the codes by a file's content."""
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
                        raise TooLong(f"{name} ...: takes {n / rate:.0f} s, and the model holds {limit}")
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
        print(f"... and {len(notes) - 5} more such notes", file=sys.stderr)
    if not out:
        raise ValueError("nothing is left to train on")
    return out


def codec_mark(generator):
    """Bytes that identify the codec and how clips are trimmed for it; part of the key of a clip's codes."""
    mark = hashlib.sha256(f"{SILENCE_KEPT} {MUCH_SILENCE} {generator.model.config.audio_num_codebooks}".encode())
    for name, w in tree_flatten(generator.mimi.parameters()):
        mark.update(f"{name} {w.shape}".encode() + np.array(w.reshape(-1)[:64].astype(mx.float32)).tobytes())
    return mark.digest()


def with_codes(generator, shards, codec, segment, args):
    """A Segment of paths -> (the Segment with its code_shards.Codes, notes on its clip). Raises ValueError."""
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
    if not 0 < len(codes) <= n_frames and not segment.codes:  # `pairs` rejects empty or endless ones
        raise TooLong(f"{file}: {len(codes) / rate:.1f} s, and at most {n_frames / rate:.1f} s are wanted")
    return replace(segment, codes=codes), notes


def made_codes(generator, segment):
    """A Segment of paths -> (its codes (F, K), notes on its clip). Raises ValueError.

    Reads the .npy of `codes`, or encodes the clip without the silence at its ends.
    """
    if segment.codes:
        try:
            codes = np.load(segment.codes)
        except (OSError, EOFError, ValueError):  # NumPy's own message advises allow_pickle
            raise ValueError(f"{segment.codes} is not an .npy file") from None
        try:
            if codes.dtype.kind not in "iu":
                raise ValueError(f"{codes.dtype} instead of integers")
            generator.audio_rows(replace(segment, codes=codes))  # raises if the model does not have these codes
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
    """Set each Example's `other`: its texts with the speech of the next example with other texts, turn by turn."""
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
    """Pad Talks to a batch: rows (B, T, K + 1), first (N,), some (N',), as frame_losses takes them.

    chosen: by talk, the rows whose codebooks 1.. are learned.
    """
    T = max(t.n_rows for t in talks)
    rows = [np.pad(t.rows, [(0, T - t.n_rows), (0, 0)]) for t in talks]  # causal, so padding after it is harmless
    first = [t.learned + b * T for b, t in enumerate(talks)]
    some = [c + b * T for b, c in enumerate(chosen)]
    return mx.array(np.stack(rows)), mx.array(np.concatenate(first)), mx.array(np.concatenate(some))


def choose(talk, fraction, *seed):
    """A random fraction of a Talk's learned frames, at least one."""
    n = max(1, round(fraction * len(talk.learned)))
    return np.sort(np.random.default_rng(seed).choice(talk.learned, n, replace=False))


# ---------------------------------------------------------------------------------------------------- pairs


def pairs(args):
    """Speak each text --samples times, and write the best and the worst to OUT/pairs.json, for dpo and kto.

    Each finished text is a line of OUT/scores.jsonl, where an interrupted run resumes.
    """
    texts = [t.strip() for t in command.read_text(f"@{args.texts}").splitlines() if t.strip()]
    if not texts:
        raise ValueError(f"{args.texts} holds no texts")
    if args.samples < 2 or args.batch < 1:
        raise ValueError("--samples is 2 or more, --batch 1 or more")
    if args.watermark:
        raise ValueError("a model must not learn the watermark: leave out --watermark")
    if args.codebooks:
        raise ValueError("dpo and kto learn all codebooks: leave out --codebooks")
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
    """The indices of the best and the worst score, or none if they differ by at most `margin`."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return [best, worst] if scores[best] - scores[worst] > margin else []


def scores_so_far(args, texts):
    """The scores in OUT/scores.jsonl, a line for each text. The first line holds the options and must match."""
    file = args.out / "scores.jsonl"
    mark = {k: str(v) for k, v in vars(args).items() if k not in ("out", "batch", "command", "function")}
    mark["texts"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    first, *done = [json.loads(line) for line in lines if line.endswith("\n")] or [mark]  # the last may be half a line
    if other := [k for k in mark if mark[k] != first.get(k)]:
        raise ValueError(f"{file} has a different {', '.join(other)}: use the same, or another --out")
    with mimi.replacing(file) as f:
        f.write("".join(json.dumps(line) + "\n" for line in (mark, *done)).encode())
    return done


def samplings(generator, texts, start, args, context, options):
    """Yield (i, [(codes (F, K), whether it ended by itself)] * --samples) for each text from `start` on, in order.

    Sample j of text i has the seed seed + i * samples + j, whatever the batch.
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
    """Score a sample: 0 is good, lower is worse. Counts length against the text, silence, repetition, a missing end."""
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
    """Run `command` with {audio} and {text} filled in; the last word that it prints is the score."""
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
