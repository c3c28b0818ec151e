"""Long text to one WAV: sentences in batches, in one voice, joined with pauses; written as it goes, and resumable.

    python narrate.py book.txt book.wav --batch 16

Interrupted, by Ctrl-C or worse, the same command goes on where it stopped: what is finished waits in OUT.part, and
OUT.part.json says how far it goes. `sentences` and `narrate` need a csm.Generator and nothing else of ours.
"""

import argparse
import hashlib
import json
import re
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

PAUSES = {"paragraph": 0.7, "sentence": 0.25, "part": 0.05}  # seconds after each
LONGEST = 240  # characters that are said at once; longer sentences are cut at commas, or between words
SHORTEST = 20  # bytes; shorter ones join the next, since a word alone is said less well
# No sentence ends after these, nor after an initial,
ABBREVIATIONS = """
mr mrs ms dr messrs mme mlle prof rev fr st sr jr esq gen col maj capt cmdr adm lt sgt hon pres gov sen rep univ mt ft
ave blvd rd vs cf al ca approx dept est inc ltd co corp bros ed eds viz e.g i.e
""".split()
NUMBERED = "no nos art fig sec vol ch p pp".split()  # nor after these before a number,
DATES = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun".split()
)  # or these with a capital
END = re.compile(r"""(?:(?<![.!?…])[.!?…]+['"’”)\]]*(?:\[\d+\])*(?=\s)|[。！？]+[」』”]?)\s*""")


def sentences(text):
    """Text -> [(a sentence or a part of one, the seconds of silence after it)]. A blank line ends a paragraph."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph, start, said = " ".join(paragraph.split()), 0, []
        for end in [*END.finditer(paragraph), None]:
            if end and not ends_here(paragraph[start : end.start()], end[0], paragraph[end.end() :]):
                continue
            part = paragraph[start : end.end() if end else None]
            start = end.end() if end else None
            if said and len(said[-1].strip().encode()) < SHORTEST:
                said[-1] += part
            else:
                said.append(part)
        said = [part.strip() for part in said if re.search(r"[^\W_]", part)]
        for i, sentence in enumerate(said):
            *first, last = cut(sentence)
            pause = PAUSES["paragraph" if i == len(said) - 1 else "sentence"]
            out += [(part, PAUSES["part"]) for part in first] + [(last, pause)]
    return [(part, pause) for part, pause in out if re.search(r"[^\W_]", part)]


def ends_here(before, mark, after):
    """Whether the sentence ends with `mark`, which may also be an abbreviation's or belong to what is quoted."""
    if not after or mark[0] in "。！？":
        return True
    following, cased = after.lstrip("'\"‘“([¿¡—–- ")[:1], before != before.lower()
    if following.islower() and cased:  # "Stop!" he cried. He waited ... and left.
        return False
    word = re.search(r"[\w.]*$", before)[0]
    if mark.strip() != ".":
        return True
    if re.fullmatch(r"([^\W\d]\.)+[^\W\d]", word):  # J.R.R. Tolkien; at 5 p.m. Then
        return word.islower() and following.isupper()
    if (len(word) == 1 and word.isalpha() and word != "I") or before.strip() in [str(i) for i in range(100)]:
        return False
    low = word.lower()
    if low in NUMBERED or (low in DATES and word[0].isupper()):
        return not following.isdigit()
    return low not in ABBREVIATIONS


def cut(sentence):
    """A sentence in parts of at most LONGEST characters."""
    parts = []
    while len(sentence) > LONGEST:
        head = sentence[:LONGEST]
        for mark in (r"[.!?…]\s+", r"(?:[;:,]\s+|[，、—–]\s*)", r"\s+", r".$"):
            if at := [m.end() for m in re.finditer(mark, head) if m.end() > LONGEST // 3]:
                break
        parts.append(sentence[: at[-1]].strip())
        sentence = sentence[at[-1] :].strip()
    return [*parts, sentence]


def narrate(generator, text, speaker=0, context=(), *, voice=None, batch=8, start=0, seed=None, **options):
    """Speak `text`: yields (sentences finished, of how many, (samples,) float32) for each, its pause included.

    context, voice, options: as of Generator.generate; without a voice the first sentence sets that of the others.
    start: the sentence to begin with. Sentence i is drawn with seed + i, whatever the batch. ValueError comes at once.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, not {batch}")
    parts = sentences(text)
    if not parts:
        raise ValueError("the text has no words")
    seed = secrets.randbits(32) if seed is None else seed
    talk = generator.conversation([generator.encode(s) for s in context], voice=voice)
    context = talk.turns or [replace(segment, speaker=speaker) for segment in talk.voice]
    checked = generator.conversation(context, voice="none")  # what is wrong with the arguments is said here
    checked.frames(parts[0][0], speaker, seed=seed, **limited(options, parts[0][0])).close()

    def alone(i, context):
        """Sentence i by itself as a turn, again where it ended at once."""
        for again in range(4):
            turn = generator.conversation(context, voice="none")
            other = (seed + i + again * 2**32) % 2**64
            audio = turn.say(parts[i][0], speaker, seed=other, **limited(options, parts[i][0]))
            if len(audio):
                break
        return turn.turns[-1], audio

    def pieces(context, start):
        if not context:
            first, audio = alone(0, [])
            context = [first]
            if start == 0:
                yield piece(0, audio)
            start = max(start, 1)
        for i in range(start, len(parts), batch):
            texts = [part for part, _ in parts[i : i + batch]]
            lengths = [limited(options, part)["max_audio_length_ms"] for part in texts]
            others = options | {"max_audio_length_ms": lengths, "seed": (seed + i) % 2**64}
            for j, audio in enumerate(generator.generate_batch(texts, speaker, context, **others), i):
                yield piece(j, audio if len(audio) else alone(j, context)[1])

    def piece(i, audio):
        silence = np.zeros(int(parts[i][1] * generator.sample_rate), np.float32)
        return i + 1, len(parts), np.concatenate([np.array(audio), silence])

    return pieces(context, start)


def limited(options, text):
    """The options with a limit of length that speech of this text does not reach: endless speech is cut."""
    longest = 3_000 + 200 * len(text)
    return options | {"max_audio_length_ms": min(options.get("max_audio_length_ms", 90_000), longest)}


def write(generator, text, out, mark, seed, arguments):
    """Narrate into `out` by way of OUT.part, from where a run with the same mark stopped -> seconds of sound, seed."""
    import soundfile
    from tqdm import tqdm

    import mimi

    part, state = (Path(f"{out}.part{x}") for x in ("", ".json"))
    done = mimi.read_json(state) if part.is_file() else {}
    if done.get("sentences") and part.stat().st_size < done["bytes"]:
        done = {}  # lost in a crash
    if done.get("sentences") and (done["mark"] != mark or seed not in (None, done["seed"])):
        raise ValueError(
            f"{part} holds {done['sentences']} sentences of another text or other options: remove it first"
        )
    done = done or {"mark": mark, "seed": secrets.randbits(32) if seed is None else seed, "sentences": 0, "bytes": 0}
    pieces = narrate(generator, text, seed=done["seed"], start=done["sentences"], **arguments)
    with open(part, "r+b" if done["sentences"] else "wb") as file:
        file.truncate(done["bytes"])
        file.seek(0, 2)
        with tqdm(unit=" sentences", initial=done["sentences"], disable=None) as bar:
            for n, total, audio in pieces:
                file.write(mimi.to_pcm16(audio).tobytes())
                file.flush()
                done |= {"sentences": n, "bytes": file.tell()}
                with mimi.replacing(state) as f:
                    f.write(json.dumps(done).encode())
                bar.total = total
                bar.update(1)
    samples, rate = np.memmap(part, np.int16, "r"), generator.sample_rate
    with mimi.replacing(out) as file, soundfile.SoundFile(file, "w", rate, 1, "PCM_16", format="WAV") as wav:
        for i in range(0, len(samples), 2**20):
            wav.write(samples[i : i + 2**20])
    seconds = len(samples) / rate
    del samples
    part.unlink()
    state.unlink()
    return seconds, done["seed"]


def main(argv=None):
    import csm

    p = argparse.ArgumentParser(prog="narrate.py", description="A book to one WAV, resumable.")
    p.add_argument("text", metavar="TEXT", help="a text file; - reads standard input")
    p.add_argument("out", metavar="OUT", help="WAV file")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="sentences at once (default 8)")
    csm.add_options(p)
    p.error = lambda message: p.exit(2, f"narrate.py: error: {message}\n")
    args = p.parse_args(argv)
    begun = time.perf_counter()
    try:
        text = csm.read_text("-" if args.text == "-" else f"@{args.text}")
        if not sentences(text):
            raise ValueError("the text has no words")
        csm.check_out(args.out)
        if args.out == "-" or (Path(args.out).exists() and not Path(args.out).is_file()):
            raise ValueError("OUT must be a file: use csm.py --batch for a pipe")
        context, options = csm.read_options(args)
        mark = {k: v for k, v in vars(args).items() if k not in ("out", "batch", "seed")} | {"text": text}
        used = [f for p in (args.model, args.adapter) if p for f in (Path(p), *sorted(Path(p).glob("*.safetensors")))]
        mark["files"] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in used if f.is_file()]
        mark = hashlib.sha256(json.dumps(mark).encode() + b"".join(s.audio.tobytes() for s in context)).hexdigest()
        generator = csm.load(args.model, dtype=args.dtype, quantize=args.quantize, adapter=args.adapter)
        options |= {"speaker": args.speaker, "context": context, "voice": args.voice, "batch": args.batch}
        seconds, seed = write(generator, text, args.out, mark, args.seed, options)
    except (ValueError, OSError) as e:
        p.exit(2, f"narrate.py: error: {' '.join(str(e).split())}\n")
    except KeyboardInterrupt:
        p.exit(130, "interrupted: the same command goes on from here\n")
    taken = time.perf_counter() - begun
    print(
        f"{seconds:.2f} s of audio in {taken:.2f} s, real-time factor {taken / seconds:.2f}, "
        f"peak memory {csm.peak_memory() / 1e9:.2f} GB, seed {seed}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
