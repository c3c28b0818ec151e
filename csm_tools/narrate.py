"""Long text to one sound file: sentences side by side, in one voice, joined with pauses; as it goes, and resumable.

    python -m csm_tools.narrate book.txt book.mp3 --batch 16
    python -m csm_tools.narrate chapters/*.txt --out-dir spoken
    python -m csm_tools.narrate book.epub --out-dir spoken --captions
    mlx.launch -n 2 -m csm_tools.narrate book.txt book.mp3       # several processes or machines, the same file

Interrupted, by Ctrl-C or worse, the same command goes on where it stopped: what is finished waits in OUT.part, and
OUT.part.json says how far it goes. Sentence i is drawn with seed + i, whatever the batch and the processes.

Processes share the sentences out a quarter of a second at a time: each says how many more it takes and hands over the
codes of those that have ended; process 0 makes sound of them and writes.
"""

import fcntl
import hashlib
import json
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
from csm_tools.text import parts_of

import mlx.core as mx  # isort: skip
import numpy as np
from tqdm import tqdm

BETWEEN_CHAPTERS = "\n\n[pause:2]\n\n"


def narrate(
    generator, text, speaker=0, context=(), *, voice=None, batch=8, start=0, seed=None, max_audio_length_ms=None,
    verbatim=False, **sampling,
):  # fmt: skip
    """Speak `text`: yields (sentences finished, of how many, (samples,) float32) for each, its pause included.

    context, voice, sampling: as of Generator.generate; without a voice the first sentence sets that of the others.
    verbatim: the text as it is, not as text.spoken has it. start: the sentence to begin with. Of several processes the
    first alone yields. ValueError comes at once.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, not {batch}")
    parts = parts_for(generator, text, verbatim)
    seed, sampling = generator.read_options(seed, sampling)
    rows = [generator.text_rows(part, speaker) for part, _ in parts]
    frames = [min(generator.max_frames(ms, part) for ms in (None, max_audio_length_ms)) for part, _ in parts]
    context = [generator.encode(s) for s in context]
    context = context or generator.voice_prompt(voice, speaker)
    n = sum(len(generator.segment_rows(s)) for s in context) + max(map(len, rows))
    if n >= generator.max_positions:
        raise ValueError(f"the voice and a sentence take {n} positions, and the model has {generator.max_positions}")
    group = mx.distributed.init()

    def said(context, todo):
        cache = generator.context_cache(generator.prompt(parts[0][0], speaker, context, "none")[0])

        def job(i, again):
            own = generator.prompt(parts[i][0], speaker, context, "none")[1]  # which may continue the voice's clip
            return own, frames[i], (seed + i + again * 2**32) % 2**64, sampling, cache

        return spoken(generator, todo, job, batch, group)

    def pieces(context, start):
        if not context:
            ((_, codes),) = said([], [0])
            context = [csm.Segment(speaker, parts[0][0], codes=codes)]
            if start == 0 and group.rank() == 0:
                yield piece(0, codes)
            start = max(start, 1)
        waiting = {}
        for i, codes in said(context, range(start, len(parts))):
            waiting[i] = codes
            while group.rank() == 0 and start in waiting:
                yield piece(start, waiting.pop(start))
                start += 1

    def piece(i, codes):
        silence = np.zeros(int(parts[i][1] * generator.sample_rate), np.float32)
        return i + 1, len(parts), np.concatenate([np.array(generator.decode(mx.array(codes))), silence])

    return pieces(context, start)


def parts_for(generator, text, verbatim):
    return parts_of(text, verbatim, generator.model.config.max_part_characters)


def spoken(generator, todo, job, size, group):
    """Yields (i, codes (F, K)) of each i in `todo`, by all processes of the group, as they end; all yield the same.

    job(i, again): what Batch.insert takes; `again` counts how often it has ended at once, three times at most. size:
    how many a process says at once.
    """
    todo, mine, batch, running = deque(todo), deque(), csm_batch.Batch(generator), {}
    n, K = len(todo), generator.codebooks
    wanted = [2 * size] * group.size()  # by each process: what it says next waits with it
    while n:
        while todo and max(wanted) > 0:  # one each in turn, so that the last ones are spread
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
        # To all: a row of how many more it takes, then of each that has ended [i, codes], or [i, -1 ...] for silence.
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
    """(n, C) int, n each process's own -> [(n, C)] of all of them."""
    sizes = mx.distributed.all_gather(mx.array([len(rows)]), group=group).tolist()
    padded = np.pad(rows, [(0, max(sizes) - len(rows)), (0, 0)]).astype(np.int32)
    every = np.array(mx.distributed.all_gather(mx.array(padded), group=group)).reshape(len(sizes), max(sizes), -1)
    return [theirs[:n] for theirs, n in zip(every, sizes)]


@contextmanager
def resumed(out, mark, seed):
    """OUT.part, locked, behind what a run with the same mark has finished; and what OUT.part.json says of that."""
    part, state = (Path(f"{out}.part{x}") for x in ("", ".json"))
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another narrate is at work on {out}") from None
        done = mimi.read_json(state)
        if not done or file.tell() < done["bytes"]:  # new, or lost in a crash
            done = {"mark": mark, "seed": secrets.randbits(32) if seed is None else seed, "sentences": 0, "bytes": 0}
        if done["mark"] != mark or seed not in (None, done["seed"]):
            raise ValueError(
                f"{part} holds {done['sentences']} sentences of another text or other options: remove it first"
            )
        try:
            file.truncate(done["bytes"])
            yield file, done
        finally:
            if not file.tell():
                part.unlink(missing_ok=True)


def write(generator, text, out, mark, seed, args, options):
    """Narrate into `out` by way of OUT.part, from where a run with the same mark stopped -> seconds of sound, seed.

    args: of the command; options: of `narrate`. With --captions OUT.part.srt goes along with OUT.part.
    """
    group = mx.distributed.init()

    def shared(start, seed):
        """The numbers that process 0 gives."""
        numbers = mx.array([start, *divmod(seed, 2**32)], mx.uint32)
        start, high, low = mx.distributed.all_sum(numbers * (group.rank() == 0), group=group).tolist()
        return {"start": start, "seed": high * 2**32 + low}

    if group.rank() > 0:
        for _ in narrate(generator, text, **shared(0, 0), **options):
            pass
        return 0, seed
    part, state, captions = (Path(f"{out}.part{x}") for x in ("", ".json", ".srt"))
    parts, rate = parts_for(generator, text, args.verbatim), generator.sample_rate

    def blocks():
        samples = np.memmap(part, np.int16, "r")
        for i in range(0, len(samples), 2**20):
            yield samples[i : i + 2**20] / np.float32(32767)

    # What the watermark lacks is said before an hour of work.
    sound = command.watermark().embed_stream(blocks(), rate) if args.watermark else blocks()
    with resumed(out, mark, seed) as (file, done):
        pieces = narrate(generator, text, **shared(done["sentences"], done["seed"]), **options)
        if args.captions:
            with open(captions, "ab") as srt:
                srt.truncate(done.get("captions", 0))
        with tqdm(unit=" sentences", initial=done["sentences"], disable=None) as bar:
            for n, total, audio in pieces:
                start, (said, pause) = file.tell() / 2 / rate, parts[n - 1]
                file.write(mimi.to_pcm16(audio).tobytes())
                file.flush()
                done |= {"sentences": n, "bytes": file.tell()}
                if args.captions:
                    with open(captions, "ab") as srt:
                        srt.write(caption(n, start, start + len(audio) / rate - pause, said).encode())
                        done["captions"] = srt.tell()
                with mimi.replacing(state) as f:
                    f.write(json.dumps(done).encode())
                bar.total = total
                bar.update(1)
        with audio_writer(out, rate) as add:
            for block in sound:
                add(np.array(block))
        if args.captions:
            captions.replace(out.with_suffix(".srt"))
        part.unlink()
        state.unlink()
    return done["bytes"] / 2 / rate, done["seed"]


def read_chapters(path):
    """[text]: those of an EPUB's chapters, or the whole file's."""
    if path.lower().endswith(".epub"):
        return epub.chapters(path) or [""]
    return [command.read_text("-" if path == "-" else f"@{path}")]


def caption(n, start, end, text):
    """An entry of an .srt file."""
    start, end = (
        f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"
        for ms in (round(seconds * 1000) for seconds in (start, end))
    )
    return f"{n}\n{start} --> {end}\n{text}\n\n"


def program(args):
    begun, seconds, seed, group = time.perf_counter(), 0, args.seed, mx.distributed.init()
    if not args.out_dir and len(args.paths) != 2:
        raise ValueError("give TEXT and OUT, or several TEXTs and --out-dir")
    jobs, texts = [], []  # (path, OUT), and what is said there
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
        if not args.out_dir and not out.absolute().parent.is_dir():
            raise ValueError(f"cannot write {out}: there is no such folder")
    if len({out for _, out in jobs}) < len(jobs):
        raise ValueError("two texts have the same name, and would be one file")
    context, options = command.read_options(args)
    generator = command.load_for(args)
    options |= {"speaker": args.speaker, "context": context, "voice": args.voice, "batch": args.batch}
    options["verbatim"] = args.verbatim
    mark = {k: v for k, v in vars(args).items() if k not in ("paths", "out_dir", "format", "batch", "seed")}
    adapters = [folder for folder, _ in args.adapter or ()]
    used = [f for p in (args.model, *adapters) if p for f in (Path(p), *sorted(Path(p).glob("*.safetensors")))]
    mark["files"] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in used if f.is_file()]
    mark = json.dumps(mark).encode() + b"".join(s.audio.tobytes() for s in context)
    if args.out_dir:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    for (_, out), text in zip(jobs, texts):
        there = args.out_dir is not None and group.rank() == 0 and out.exists()
        if mx.distributed.all_sum(mx.array(int(there)), group=group).item():  # as process 0 sees it
            print(f"{out} is there already, and stays", file=sys.stderr)
            continue
        own = hashlib.sha256(mark + json.dumps(parts_for(generator, text, args.verbatim)).encode()).hexdigest()
        more, seed = write(generator, text, out, own, args.seed, args, options)
        seconds += more
    taken = time.perf_counter() - begun
    if seconds:
        print(
            f"{seconds:.2f} s of audio in {taken:.2f} s, real-time factor {taken / seconds:.2f}, "
            f"peak memory {command.peak_memory() / 1e9:.2f} GB, seed {seed}",
            file=sys.stderr,
        )


def main(argv=None):
    p = command.parser_for("narrate", description="A book to one sound file, resumable; or many texts, one each.")
    p.add_argument(
        "paths", nargs="+", metavar="TEXT OUT", help="a text, .md or .epub (-: standard input); a sound file"
    )
    p.add_argument(
        "--out-dir", type=Path, metavar="D", help="every path is a text: write D/NAME.wav of each, or of each chapter"
    )
    p.add_argument("--format", default="wav", help="of the files in D: wav (default), flac, mp3, ogg, opus")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="sentences at once (default 8)")
    p.add_argument("--captions", action="store_true", help="write OUT.srt too: what is said, with its times")
    command.add_options(p)
    args = p.parse_intermixed_args(argv)
    group = mx.distributed.init()
    if group.size() > 1:
        p.prog += f", process {group.rank()} of {group.size()}"
    return command.run(p, program, args, "interrupted: the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
