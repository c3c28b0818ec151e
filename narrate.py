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
# No sentence ends after these, nor after the initial of a name.
ABBREVIATIONS = """
mr mrs ms dr prof rev st sr jr gen col capt lt sgt hon pres gov sen rep mt ft ave blvd no nos vol ch fig pp ed
eds art sec vs cf al ca approx dept est inc ltd co corp bros jan feb mar apr jun jul aug sep sept oct nov dec
mon tue wed thu fri sat sun e.g i.e viz
""".split()
END = re.compile(r"""(?:[.!?…]+['"’”)\]]*(?=\s)|[。！？]+[」』”]?)\s*""")


def sentences(text):
    """Text -> [(a sentence or a part of one, the seconds of silence after it)]. A blank line ends a paragraph."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph, start, parts = " ".join(paragraph.split()), 0, []
        for m in END.finditer(paragraph):
            if ends_here(paragraph[start : m.start()], m[0], paragraph[m.end() :]):
                parts += [paragraph[start : m.end()]]
                start = m.end()
        parts += [paragraph[start:]]
        said = []
        for part in parts:
            if said and len(said[-1].encode()) < SHORTEST:
                said[-1] += f" {part}" if said[-1][-1].isascii() else part
            else:
                said.append(part)
            said[-1] = said[-1].strip()
            if not said[-1]:
                said.pop()
        for i, sentence in enumerate(said):
            *first, last = cut(sentence)
            pause = PAUSES["paragraph" if i == len(said) - 1 else "sentence"]
            out += [(part, PAUSES["part"]) for part in first] + [(last, pause)]
    return [(part, pause) for part, pause in out if re.search(r"\w", part)]


def ends_here(before, mark, after):
    """Whether the sentence ends with `mark`, which may also be an abbreviation's or belong to what is quoted."""
    if not after or mark[0] in "。！？":
        return True
    first = after.lstrip("'\"‘“([¿¡—–- ")[:1]
    if first.islower():  # "Stop!" he cried. He waited ... and left.
        return False
    word = re.search(r"([\w.]*)$", before)[1].lower()
    if mark.strip() != ".":
        return True
    initial = len(word) == 1 and word.isalpha() and word != "i"
    return not (initial or word in ABBREVIATIONS or (re.fullmatch(r"(\w\.)+\w", word) and not first.isupper()))


def cut(sentence):
    """A sentence in parts of at most LONGEST characters."""
    parts = []
    while len(sentence) > LONGEST:
        head = sentence[: LONGEST + 1]
        at = max((m.end() for m in re.finditer(r"[;:,，、—–]\s*", head[:-1]) if m.end() > LONGEST // 3), default=0)
        at = at or head.rfind(" ") + 1 or LONGEST
        parts.append(sentence[:at].strip())
        sentence = sentence[at:].strip()
    return [*parts, sentence]


def narrate(generator, text, speaker=0, context=(), *, voice=None, batch=8, start=0, seed=None, **options):
    """Speak `text`: yields (sentences finished, of how many, (samples,) float32) for each, its pause included.

    context, voice, options: as of Generator.generate; without a voice the first sentence sets that of the others.
    start: the sentence to begin with. Sentence i is drawn with seed + i, whatever the batch. Raises ValueError.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, not {batch}")
    parts = sentences(text)
    if not parts:
        raise ValueError("the text has no words")
    seed = secrets.randbits(32) if seed is None else seed
    talk = generator.conversation(context, voice=voice)
    context = talk.turns or [replace(segment, speaker=speaker) for segment in talk.voice]
    if not context:
        talk.say(parts[0][0], speaker, seed=seed, **limited(options, parts[:1]))
        context = talk.turns
    for i in range(start, len(parts), batch):
        some = parts[i : i + batch]
        limit = limited(options, some)
        audio = generator.generate_batch([part for part, _ in some], speaker, context, seed=seed + i, **limit)
        for j, (part, pause) in enumerate(some):
            for again in (1, 2, 3):  # one that ended at once
                if not len(audio[j]):
                    other = (seed + i + j + again * 2**32) % 2**64
                    audio[j] = generator.generate(part, speaker, context, seed=other, **limit)
            silence = np.zeros(int(pause * generator.sample_rate), np.float32)
            yield i + j + 1, len(parts), np.concatenate([np.array(audio[j]), silence])


def limited(options, parts):
    """The options with a limit of length that speech of these parts does not reach: endless ones are cut."""
    longest = 3_000 + 200 * max(len(part) for part, _ in parts)
    return options | {"max_audio_length_ms": min(options.get("max_audio_length_ms", 90_000), longest)}


def write(generator, text, out, seed, options):
    """Narrate into `out` by way of OUT.part, from where an earlier run of the same text and options stopped."""
    import soundfile
    from tqdm import tqdm

    import mimi

    part, state = (Path(f"{out}.part{x}") for x in ("", ".json"))
    mark = hashlib.sha256(json.dumps([text, seed, options["mark"]]).encode()).hexdigest()
    done = {"mark": mark, "seed": secrets.randbits(32) if seed is None else seed, "sentences": 0, "bytes": 0}
    if part.exists() and (before := mimi.read_json(state)).get("mark") == mark:
        done = before
    with open(part, "r+b" if done["sentences"] else "wb") as file:
        file.truncate(done["bytes"])
        file.seek(0, 2)
        arguments = {k: v for k, v in options.items() if k != "mark"}
        pieces = narrate(generator, text, seed=done["seed"], start=done["sentences"], **arguments)
        with tqdm(unit=" sentences", initial=done["sentences"], disable=None) as bar:
            for n, total, audio in pieces:
                file.write(mimi.to_pcm16(audio).tobytes())
                file.flush()
                done |= {"sentences": n, "bytes": file.tell()}
                with mimi.replacing(state) as f:
                    f.write(json.dumps(done).encode())
                bar.total = total
                bar.update(1)
    samples = np.memmap(part, np.int16, "r")
    with (
        mimi.replacing(out) as file,
        soundfile.SoundFile(file, "w", generator.sample_rate, 1, "PCM_16", format="WAV") as wav,
    ):
        for i in range(0, len(samples), 2**20):
            wav.write(samples[i : i + 2**20])
    n = len(samples)
    del samples
    part.unlink()
    state.unlink()
    return n / generator.sample_rate, done["seed"]


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
        context, options = csm.read_options(args)
        generator = csm.load(args.model, dtype=args.dtype, quantize=args.quantize, adapter=args.adapter)
        options |= {"speaker": args.speaker, "context": context, "voice": args.voice, "batch": args.batch}
        mark = {k: v for k, v in vars(args).items() if k not in ("text", "out", "batch", "seed")}
        seconds, seed = write(generator, text, args.out, args.seed, options | {"mark": mark})
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
