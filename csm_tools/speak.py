"""Text to speech: the whole command. `python csm.py`, `csm` and `python -m csm_tools.speak` are the same.

    python csm.py "Hello from Sesame." hello.wav
    python csm.py --dialogue script.txt dialogue.mp3

What it shares with the other commands is in command.py; how sound is written as it is generated, in audio.py.
"""

import argparse
import logging
import math
import secrets
import sys
import time
from contextlib import contextmanager, nullcontext

import csm  # before mlx
from csm_tools import audio, command
from csm_tools.text import parts_of

import numpy as np  # isort: skip

log = logging.getLogger("csm")

USAGE = """usage: {0} TEXT OUT [--model M] [--voice NAME|clip.wav] [--ref-audio F --ref-text T] [--seed N] ...
       {0} --dialogue SCRIPT OUT ...
all options: {0} --help
"""


def speak(args):
    from tqdm import tqdm

    if (args.dialogue is None) == (args.text is None):
        raise ValueError("give either TEXT and OUT, or --dialogue and OUT, not both")
    if args.play:
        command.need("play", "sounddevice")
    if args.dialogue:
        turns = command.read_dialogue(args.dialogue)
    else:
        turns = [(args.speaker, command.read_text(command.check_text(args.text)))]
    for i, (_, text) in enumerate(turns, 1):
        try:
            parts_of(text, args.verbatim)  # raises early
        except ValueError as e:
            raise ValueError(f"{args.dialogue}, turn {i}: {e}" if args.dialogue else str(e)) from None
    before, turns = command.read_context(args, turns)
    context, options = command.read_options(args, turns[0][0])
    context += before
    command.check_out(args.out, args, *files_read(args))
    seed = secrets.randbits(32) if args.seed is None else args.seed
    live = args.stream or args.play or args.out == "-"
    options["streaming_interval"] = args.streaming_interval if live else 2.0

    progress = tqdm(unit="s", bar_format="{n:.1f} s of speech, {elapsed}", disable=None, leave=False, delay=0.1)
    play_audio = player() if args.play else nullcontext(lambda piece: None)
    n_samples, first, stopped = 0, 0.0, False
    with audio.audio_writer(args.out) as write, play_audio as play, progress:  # OUT is checked before loading
        generator = command.load_for(args, fallback=True)
        rate, start = generator.sample_rate, time.perf_counter()
        parts = cut_turns(generator, turns, args)
        pieces = say(generator, parts, context, seed, args, options)
        if args.watermark:
            pieces = command.watermark().embed_stream(pieces, rate)
        try:
            for piece in map(np.array, pieces):
                first = first or time.perf_counter() - start
                n_samples += len(piece)
                write(piece)
                play(piece)
                progress.update(len(piece) / rate)
        except KeyboardInterrupt:
            if args.out == "-" or not n_samples:
                raise
            stopped = True
    seconds, taken = n_samples / rate, time.perf_counter() - start
    if stopped:
        print(f"interrupted: the {seconds:.1f} s finished so far are in {args.out}", file=sys.stderr)
    elif not n_samples:
        print("the model ended the speech at once: there is no audio (try another seed)", file=sys.stderr)
    factor = taken / seconds if seconds else math.inf
    print(
        f"{seconds:.2f} s of audio in {taken:.2f} s, real-time factor {factor:.2f}, first audio after {first:.2f} s, "
        f"peak memory {command.peak_memory() / 1e9:.2f} GB, seed {seed}",
        file=sys.stderr,
    )
    return 130 if stopped else 0


def files_read(args):
    """The files that the command reads besides those of the voice."""
    clips = [file for _, _, file in command.read_turns(args.context)] if args.context else []
    text = args.text[1:] if args.text and args.text.startswith("@") else None
    return [args.dialogue, args.context, text, *clips]


def cut_turns(generator, turns, args):
    """[(speaker, text)] -> [(speaker, part, seconds of silence after it)]; a part is what the model says well."""
    longest, out = generator.model.config.max_part_characters, []
    for speaker, text in turns:
        if args.whole:
            parts = parts_of(text, args.verbatim, together=math.inf)
            if (n := max(len(part) for part, _ in parts)) > longest:
                log.warning("%d characters are said at once: this model says %d well", n, longest)
        else:
            parts = parts_of(text, args.verbatim, longest, together=longest)
        out += [(speaker, part, pause) for part, pause in parts]
    return out


def say(generator, parts, context, seed, args, options):
    """The parts of `cut_turns` as pieces of audio. Ctrl-C comes after what is finished.

    Turns of a dialogue hear all before them; the parts of a text hear the context and the voice alone, and without
    those the first part.
    """
    interrupts, interval = [], options.pop("streaming_interval")
    how = {"voice": args.voice, "voice_match": args.voice_match}

    def until_interrupted(frames, said):
        try:
            for codes in frames:
                said.append(codes)
                yield codes
        except KeyboardInterrupt as e:
            interrupts.append(e)

    speakers = [speaker for speaker, _, _ in parts]
    if args.dialogue:
        talk = generator.conversation(context, speaker=speakers[0], **how)
    else:
        context = [generator.encode(segment) for segment in context]
        for speaker, text, _ in parts:
            generator.prompt(text, speaker, context, **how)  # raises early
        alone = not context and not generator.voice_prompt(args.voice, speakers[0])
    command.warn(args, context, speakers)
    for i, (speaker, text, pause) in enumerate(parts):
        this, said = options | {"seed": (seed + i) % 2**64}, []
        if not args.dialogue:
            talk = generator.conversation(context, speaker=speaker, **how)
        frames = talk.frames(text, speaker, **this)
        yield from generator.decode_stream(until_interrupted(frames, said), interval)
        if interrupts:
            raise interrupts[0]
        if pause:
            yield np.zeros(int(pause * generator.sample_rate), np.float32)
        if not args.dialogue and alone and said:
            alone, context = False, [csm.Segment(speaker, text, codes=generator.join_frames(said))]


@contextmanager
def player():
    """A function that plays pieces of audio, 24 kHz."""
    try:
        import sounddevice

        speaker = sounddevice.OutputStream(samplerate=24_000, channels=1, dtype="float32")
    except Exception as e:  # no package, no PortAudio, no device
        raise ValueError(f"--play needs `pip install sounddevice` and a sound card: {e or type(e).__name__}") from None
    with speaker:
        yield lambda piece: speaker.write(piece[:, None])


def main(argv=None):
    p = command.parser_for("csm.py", description="Text to speech with CSM, Sesame's speech model, on MLX.")
    p.add_argument("text", nargs="?", metavar="TEXT", help="what to say; - is standard input, @file a file")
    p.add_argument("out", metavar="OUT", help="a .wav, .flac, .mp3, .ogg or .opus file; - is WAV to standard output")
    command.add_options(p)
    p.add_argument(
        "--context", metavar="JSON", help='earlier turns, instead of the voice: [{"speaker", "text", "audio"}, ...]'
    )
    how = {"action": argparse.BooleanOptionalAction}
    p.add_argument("--voice-match", **how, help="continue the speaker's last clip (default: by the model's config)")
    p.add_argument("--dialogue", metavar="F", help='speak a script: lines "0: Hello." or "Ann: Hello."')
    p.add_argument("--whole", action="store_true", help="say a long text in one go, not in parts that are said well")
    p.add_argument("--stream", action="store_true", help="write every --streaming-interval seconds")
    p.add_argument("--streaming-interval", type=float, default=0.5, metavar="S")
    p.add_argument("--play", action="store_true", help="play while generating")
    if not (sys.argv[1:] if argv is None else argv):
        p.exit(2, USAGE.format(p.prog))
    return command.run(p, speak, p.parse_intermixed_args(argv))


if __name__ == "__main__":
    sys.exit(main())
