"""Long texts to sound files: sentences in batches, in one voice, joined with pauses, resumable.

    python -m csm_tools.narrate book.txt book.mp3 --batch 16
    python -m csm_tools.narrate chapters/*.txt --out-dir spoken
    python -m csm_tools.narrate book.epub --out-dir spoken --captions
    mlx.launch -n 2 -m csm_tools.narrate book.txt book.mp3       # several processes or machines, the same file

After an interruption the same command continues: finished sentences are in OUT.part, and OUT.part.json has a line for
each. A sentence is identified by its words, so the text may be edited in between. Sentence i has the seed seed + i,
whatever the batch and the number of processes.

Processes share the sentences. Every quarter of a second each reports how many more it can take and sends the codes of
those that have ended; process 0 decodes and writes them.
"""

import fcntl
import hashlib
import json
import logging
import secrets
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import csm  # before mlx
import csm_batch
import mimi
from csm_tools import command, epub
from csm_tools.audio import audio_writer
from csm_tools.text import PAUSES, cut, parts_of

import mlx.core as mx  # isort: skip
import numpy as np
from tqdm import tqdm

BETWEEN_CHAPTERS = "\n\n[pause:2]\n\n"


log = logging.getLogger("csm")


def narrate(
    generator, text, speaker=0, context=(), *, voice=None, batch=8, done=(), seed=None, max_audio_length_ms=None,
    verbatim=False, **sampling,
):  # fmt: skip
    """Speak `text`: yields (number of the sentence from 1, number of sentences, (samples,) float32 with its pause).

    text: a text, or the result of `plan`. context, voice, sampling: as for Generator.generate; without a voice, the
    first sentence sets it for the others. verbatim: skip text.spoken. done: indices from 0 of sentences to leave out.
    Only process 0 yields. Raises ValueError at the call, not at the first sentence.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, not {batch}")
    seed, sampling = generator.read_options(seed, sampling)
    context = [generator.encode(s) for s in context]
    context = context or generator.voice_prompt(voice, speaker)
    parts = plan(generator, text, speaker, context, verbatim) if isinstance(text, str) else text
    sizes, room = prompt_sizes(generator, parts, speaker, context), generator.max_positions
    frames = [min(generator.max_frames(ms, part) for ms in (None, max_audio_length_ms)) for part, _ in parts]
    rooms = [room if context or i else room // 2 for i in range(len(parts))]
    frames = [min(n, room - size) for n, room, size in zip(frames, rooms, sizes)]
    group = mx.distributed.init()

    def said(context, todo):
        cache = generator.context_cache(generator.prompt(parts[0][0], speaker, context, "none")[0])

        def job(i, again):
            own = generator.prompt(parts[i][0], speaker, context, "none")[1]  # may continue the voice's clip
            return own, frames[i], (seed + i + again * 2**32) % 2**64, sampling, cache

        return spoken(generator, todo, job, batch, group)

    def pieces(context):
        todo = [i for i in range(len(parts)) if i not in set(done)]
        if not context and todo:
            ((_, codes),) = said([], [0])
            context = [csm.Segment(speaker, parts[0][0], codes=codes)]
            if todo[0] == 0:
                todo = todo[1:]
                if group.rank() == 0:
                    yield piece(0, codes)
        waiting, following = {}, deque(todo)
        for i, codes in said(context, todo) if todo else ():
            waiting[i] = codes
            while group.rank() == 0 and following and following[0] in waiting:
                i = following.popleft()
                yield piece(i, waiting.pop(i))

    def piece(i, codes):
        if len(codes) >= frames[i] and max_audio_length_ms is None:
            seconds = len(codes) / generator.mimi.config.frame_rate
            log.warning("sentence %d is cut off after %.0f s: %s", i + 1, seconds, parts[i][0][:60])
        silence = np.zeros(int(parts[i][1] * generator.sample_rate), np.float32)
        return i + 1, len(parts), np.concatenate([np.array(generator.decode(mx.array(codes))), silence])

    return pieces(context)


# ---- parts that fit the model -----------------------------------------------------------------------------------


def plan(generator, text, speaker=0, context=(), verbatim=False):
    """Cut a text into parts [(text, seconds of silence after it)], each short enough for the model with its speech.

    context: encoded Segments. Without any, the first part becomes the context of the others, and each gets half of the
    positions. Raises ValueError that names a part that cannot be cut.
    """
    parts = parts_of(text, verbatim, generator.model.config.max_part_characters)
    half, rate = generator.max_positions // 2, generator.mimi.config.frame_rate

    def fitting(i, part, pause, room):
        size = prompt_sizes(generator, [(part, pause)], speaker, context, i)[0]
        if size + rate * (1 + 0.1 * len(part)) <= room:  # speech has 10 letters a second or more
            return [(part, pause)]
        pieces = cut(part, max(20, len(part) // 2))
        if len(pieces) == 1:
            left = max(0, room - size) / rate
            raise ValueError(
                f"sentence {i + 1} cannot be said: what comes before it leaves {left:.1f} s of the model's "
                f"{room / rate:.0f} s for {part[:60]!r}: give a shorter clip"
            )
        pauses = [PAUSES["part"]] * (len(pieces) - 1) + [pause]
        return [found for piece, pause in zip(pieces, pauses) for found in fitting(i, piece, pause, room)]

    out = []
    for i, (part, pause) in enumerate(parts):
        alone = not context and not out
        out += fitting(i, part, pause, half if alone or not context else generator.max_positions)
    return out


def prompt_sizes(generator, parts, speaker, context, start=0):
    """The positions that each part's prompt takes; without a context, those of its text."""
    turns, clip = generator.opening(speaker, context, "none")
    before, sizes = len(generator.context_rows(turns)), []
    for i, (part, _) in enumerate(parts, start + 1):
        try:
            sizes.append(before + len(generator.turn_rows(part, speaker, clip)))
        except ValueError as e:
            raise ValueError(f"sentence {i}, {part[:60]!r}: {e}") from None
    return sizes


# ---- several processes ------------------------------------------------------------------------------------------


def spoken(generator, todo, job, size, group):
    """Speak each i in `todo` with all processes of the group; yields (i, codes (F, K)) as they end, the same in all.

    job(i, again): the arguments of Batch.insert; `again` counts earlier attempts that gave no frames, at most 3. size:
    sentences that a process speaks at once.
    """
    todo, mine, batch, running = deque(todo), deque(), csm_batch.Batch(generator), {}
    n, K = len(todo), generator.codebooks
    wanted = [2 * size] * group.size()  # by process: sentences it can take, running and queued
    while n:
        while todo and max(wanted) > 0:  # deal them out in turn, to spread the last ones evenly
            for rank in range(len(wanted)):
                if todo and wanted[rank] > 0:
                    i, wanted[rank] = todo.popleft(), wanted[rank] - 1
                    mine += [(i, 0)] if rank == group.rank() else []
        ended, until = [], time.perf_counter() + 0.25
        while (mine or running) and time.perf_counter() < until:
            while mine and len(running) < size:
                i, again = mine.popleft()
                running[batch.insert(*job(i, again))] = i, again, []
            for uid, codes in batch.next():
                i, again, frames = running[uid]
                if codes is not None:
                    frames.append(codes)
                    continue
                del running[uid]
                if frames or again == 3:
                    ended.append((i, np.array(frames, np.int32).reshape(-1, K)))
                else:
                    mine.appendleft((i, again + 1))
        # Send a row with how many more it can take, then rows [i, codes] of each that ended, [i, -1 ...] if empty.
        rows = [np.pad([2 * size - len(mine) - len(running)], (0, K))[None]]
        for i, codes in ended:
            codes = codes if len(codes) else np.full((1, K), -1)
            rows.append(np.pad(codes, [(0, 0), (1, 0)], constant_values=i))
        wanted = []
        for theirs in gather(group, np.concatenate(rows)):
            wanted.append(int(theirs[0, 0]))
            for i in dict.fromkeys(theirs[1:, 0].tolist()):
                codes = theirs[1:][theirs[1:, 0] == i, 1:]
                yield i, codes[codes[:, 0] >= 0]
                n -= 1


def gather(group, rows):
    """Collect the processes' rows (n, C) int, where n may differ, as a list by process."""
    sizes = mx.distributed.all_gather(mx.array([len(rows)]), group=group).tolist()
    padded = np.pad(rows, [(0, max(sizes) - len(rows)), (0, 0)]).astype(np.int32)
    every = np.array(mx.distributed.all_gather(mx.array(padded), group=group)).reshape(len(sizes), max(sizes), -1)
    return [theirs[:n] for theirs, n in zip(every, sizes)]


# ---- files ------------------------------------------------------------------------------------------------------


def keys_of(parts):
    """The sentences' keys: a hash of its words, its pause and how many equal ones came before."""
    keys, seen = [], {}
    for part, pause in parts:
        n = seen[part, pause] = seen.get((part, pause), -1) + 1
        keys.append(hashlib.sha256(json.dumps([part, pause, n]).encode()).hexdigest()[:16])
    return keys


@contextmanager
def resumed(out, mark, seed):
    """Lock and open OUT.part and OUT.part.json to append. Yields both, their sentences {key: (start, end)}, the seed.

    A line of OUT.part.json has a sentence's key and the byte of OUT.part where it ends.
    """
    part, state = (Path(f"{out}.part{x}") for x in ("", ".json"))
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another narrate is writing {out}") from None
        lines = state.read_text().splitlines(keepends=True) if state.exists() else []
        try:
            lines = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half a line
            if file.tell() and not lines:
                raise KeyError("mark")
            first = lines[0] if lines else {"mark": mark, "seed": secrets.randbits(32) if seed is None else seed}
            other, said, start = first["mark"] != mark or seed not in (None, first["seed"]), {}, 0
            for key, end in lines[1:]:
                if end <= file.tell():  # else lost in a crash
                    said[key], start = (start, end), end
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{state} does not match {part}: remove both first") from None
        if other:
            raise ValueError(f"{part} holds {len(said)} sentences that were spoken with other options: remove it first")
        try:
            file.truncate(start)
            file.seek(start)
            with mimi.replacing(state) as f:
                lines = [first, *([key, end] for key, (_, end) in said.items())]
                f.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            with open(state, "a") as log_of_state:
                yield file, log_of_state, said, first["seed"]
        finally:
            if not file.tell():
                part.unlink(missing_ok=True)
                state.unlink(missing_ok=True)


def write(generator, parts, out, mark, seed, args, options):
    """Narrate into `out`, continuing OUT.part. Returns (seconds of sound, seed).

    args: the command's; options: those of `narrate`.
    """
    group = mx.distributed.init()

    def shared(done, seed):
        """Share process 0's finished sentences and seed with all processes."""
        flags = [int(i in done) for i in range(len(parts))]
        numbers = mx.array([*divmod(seed, 2**32), *flags], mx.uint32)
        high, low, *flags = mx.distributed.all_sum(numbers * (group.rank() == 0), group=group).tolist()
        return {"done": [i for i, flag in enumerate(flags) if flag], "seed": high * 2**32 + low}

    if group.rank() > 0:
        for _ in narrate(generator, parts, **shared((), 0), **options):
            pass
        return 0, seed
    part, rate, keys = Path(f"{out}.part"), generator.sample_rate, keys_of(parts)
    # Load the watermark's weights now, so that an error comes before hours of work.
    mark_sound = command.watermark().embed_stream if args.watermark else lambda blocks, rate: blocks
    with resumed(out, mark, seed) as (file, state, said, seed):
        done = {i for i, key in enumerate(keys) if key in said}
        pieces = narrate(generator, parts, **shared(done, seed), **options)
        with tqdm(total=len(parts), unit=" sentences", initial=len(done), disable=None) as bar:
            for n, _, audio in pieces:
                start = file.tell()
                file.write(mimi.to_pcm16(audio).tobytes())
                file.flush()
                said[keys[n - 1]] = start, file.tell()
                state.write(json.dumps([keys[n - 1], file.tell()]) + "\n")
                state.flush()
                bar.update(1)

        def blocks():
            samples = np.memmap(part, np.int16, "r") if file.tell() else np.zeros(0, np.int16)
            for key in keys:
                start, end = said[key]
                yield samples[start // 2 : end // 2] / np.float32(32767)

        with audio_writer(out, rate) as add:
            for block in mark_sound(blocks(), rate):
                add(np.array(block))
        if args.captions:
            with mimi.replacing(out.with_suffix(".srt")) as srt:
                srt.write(captions(parts, [(said[key][1] - said[key][0]) / 2 / rate for key in keys]).encode())
        part.unlink()
        Path(f"{out}.part.json").unlink()
    return sum(said[key][1] - said[key][0] for key in keys) / 2 / rate, seed


def read_chapters(path):
    """An EPUB's chapters, or the whole file as one: [text]."""
    if path.lower().endswith(".epub"):
        return epub.chapters(path) or [""]
    return [command.read_text("-" if path == "-" else f"@{path}")]


def captions(parts, lengths):
    """An .srt file for the parts; lengths: their seconds, with pauses."""
    entries, start = [], 0.0
    for n, ((part, pause), length) in enumerate(zip(parts, lengths), 1):
        entries.append(caption(n, start, start + length - pause, part))
        start += length
    return "".join(entries)


def caption(n, start, end, text):
    """One entry of an .srt file."""
    start, end = (
        f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"
        for ms in (round(seconds * 1000) for seconds in (start, end))
    )
    return f"{n}\n{start} --> {end}\n{text}\n\n"


def program(args):
    begun, seconds, seed, group = time.perf_counter(), 0, args.seed, mx.distributed.init()
    if not args.out_dir and len(args.paths) != 2:
        raise ValueError("give TEXT and OUT, or several TEXTs and --out-dir")
    jobs, texts = [], []  # (path, OUT) and its text
    for path in args.paths if args.out_dir else args.paths[:1]:
        chapters = read_chapters(path)
        if not args.out_dir:
            chapters, outs = [BETWEEN_CHAPTERS.join(chapters)], [Path(args.paths[1])]
        else:
            suffix = args.format.lstrip(".")
            numbers = [f"-{i:02}" for i in range(1, len(chapters) + 1)] if len(chapters) > 1 else [""]
            outs = [args.out_dir / f"{Path(path).stem}{number}.{suffix}" for number in numbers]
        jobs += [(path, out) for out in outs]
        texts += chapters
    for (path, out), text in zip(jobs, texts):
        try:
            parts_of(text, args.verbatim)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        if out.suffix.lower() not in mimi.FORMATS or (out.exists() and not out.is_file()):
            raise ValueError(f"OUT must be a file that ends in {' '.join(mimi.FORMATS)}, not {out}")
        if not args.out_dir:
            command.check_place(out)
    if len({out for _, out in jobs}) < len(jobs):
        raise ValueError("two texts have the same name and would be written to one file")
    context, options = command.read_options(args)
    for path, out in jobs:
        command.check_out(out, args, path)
    generator = command.load_for(args)
    options |= {"speaker": args.speaker, "voice": args.voice, "batch": args.batch}
    options["context"] = [generator.encode(s) for s in context]
    before = options["context"] or generator.voice_prompt(args.voice, args.speaker)
    plans = []  # plan all texts first, so that errors come early
    for (path, _), text in zip(jobs, texts):
        try:
            plans.append(plan(generator, text, args.speaker, before, args.verbatim))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    if group.rank() == 0:
        command.warn(args, context, [args.speaker])
    mark = {k: v for k, v in vars(args).items() if k not in ("paths", "out_dir", "format", "batch", "seed", "captions")}
    adapters = [folder for folder, _ in args.adapter or ()]
    used = [f for p in (args.model, *adapters) if p for f in (Path(p), *sorted(Path(p).glob("*.safetensors")))]
    mark["files"] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in used if f.is_file()]
    mark = json.dumps(mark).encode() + b"".join(s.audio.tobytes() for s in context)
    if args.out_dir:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    for (_, out), parts in zip(jobs, plans):
        there = args.out_dir is not None and group.rank() == 0 and out.exists()
        if mx.distributed.all_sum(mx.array(int(there)), group=group).item():  # as process 0 sees it
            print(f"{out} exists already and is kept", file=sys.stderr)
            continue
        voice = b"" if before else parts[0][0].encode()  # without a voice, the first sentence sets it
        own = hashlib.sha256(mark + voice).hexdigest()
        more, seed = write(generator, parts, out, own, args.seed, args, options)
        seconds += more
    taken = time.perf_counter() - begun
    if seconds:
        print(
            f"{seconds:.2f} s of audio in {taken:.2f} s, real-time factor {taken / seconds:.2f}, "
            f"peak memory {command.peak_memory() / 1e9:.2f} GB, seed {seed}",
            file=sys.stderr,
        )


def main(argv=None):
    p = command.parser_for("narrate", description="A book to one sound file, or many texts to one each; resumable.")
    p.add_argument(
        "paths", nargs="+", metavar="TEXT OUT", help="a text, .md or .epub (-: standard input); a sound file"
    )
    p.add_argument(
        "--out-dir", type=Path, metavar="D", help="every path is a text: write D/NAME.wav for each, or for each chapter"
    )
    p.add_argument("--format", default="wav", help="format of the files in D: wav (default), flac, mp3, ogg, opus")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="sentences at once (default 8)")
    p.add_argument("--captions", action="store_true", help="also write OUT.srt: the sentences with their times")
    command.add_options(p)
    args = p.parse_intermixed_args(argv)
    group = mx.distributed.init()
    if group.size() > 1:
        p.prog += f", process {group.rank()} of {group.size()}"
    return command.run(p, program, args, "interrupted: the same command continues from here")


if __name__ == "__main__":
    sys.exit(main())
