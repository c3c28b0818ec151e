"""Shared by the commands: options, reading the texts and clips that these name, and one-line errors."""

import argparse
import importlib.util
import itertools
import json
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path

import csm  # before mlx
from csm import read_text
from csm_tools import adapters, audio, checkpoints, transcribe

import mlx.core as mx  # isort: skip

LAST_SPEAKER = 999_999
QUANTIZE = {  # keywords of add_argument("--quantize")
    "type": lambda x: int(x) if x.isdigit() else x,
    "choices": (4, 6, 8, "mxfp4", "nvfp4", "mxfp8"),
    "help": "bits per weight, or a format of MLX",
}

# ---- the program ------------------------------------------------------------------------------------------------


def parser_for(name, **options):
    """An ArgumentParser with one-line errors. Its name is that of the installed command, if started as such."""
    called = Path(sys.argv[0]).name.removesuffix(".exe")
    installed = called == "csm" or called.startswith("csm-")
    p = argparse.ArgumentParser(prog=called if installed else name, **options)
    p.add_argument("--version", action="version", version=f"csm-speech {csm.__version__}")
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    return p


def run(p, function, args, interrupted="interrupted: no file was written"):
    """Run function(args) for the parser `p`. ValueError and OSError become one line and exit status 2."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, lambda n, _: sys.exit(128 + n))  # raise, so temporary files are removed
    try:
        return function(args)
    except BrokenPipeError:  # the program that reads standard output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as e:
        message = "".join(c if c.isprintable() else " " for c in str(e))  # it may hold names from a file
        p.error(as_typed(" ".join(message.split()), args))
    except KeyboardInterrupt:
        p.exit(130, f"{interrupted}\n")


def as_typed(message, args):
    """Write options in a message as users type them: --top-k, not top_k."""
    for name in vars(args):
        if "_" in name:
            message = re.sub(rf"(?<![\w/-]){name}\b", f"--{name.replace('_', '-')}", message)
    return message


def peak_memory():
    """The peak of MLX's memory (a GPU's too) or of the process, whichever is larger, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(mx.get_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


# ---- options ----------------------------------------------------------------------------------------------------


def add_model_options(p, default="$CSM_MODEL, or csm-1b"):
    """The options that `load_for` reads. default: for the help alone."""
    what = f"csm-1b, tiny, a folder, a weights file or a Hugging Face repo (default: {default})"
    p.add_argument("--model", help=what)
    p.add_argument("--quantize", **QUANTIZE)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, or float32")
    how = {"metavar": "DIR[=FACTOR]", "action": "append", "type": adapter}
    p.add_argument("--adapter", **how, help="an adapter of finetune, PEFT or csm-mlx; repeatable")
    p.add_argument("--codebooks", type=int, metavar="N", help="use only the first N: faster, but sounds worse")
    p.add_argument("--check", action="store_true", help="look for NaN in all weights, not only in norms and heads")


def add_options(p):
    """The options that `load_for` and `read_options` read."""
    add_model_options(p)
    p.add_argument("--speaker", type=int, default=0, help="speaker id of the text (default 0)")
    p.add_argument("--voice", help="a preset, clip.wav with clip.txt beside it, or none (default: the model's own)")
    p.add_argument("--ref-audio", metavar="F", help="a clip to speak with, 3 to 12 s long, instead of the voice")
    p.add_argument("--ref-text", metavar="T", help="its transcript (default: transcribed by Whisper, if installed)")
    p.add_argument("--temperature", type=float, help="0 is greedy (default 0.9)")
    p.add_argument("--top-k", type=int, help="0 is off (default 50)")
    p.add_argument("--top-p", type=float, help="1 is off (default)")
    p.add_argument("--min-p", type=float, help="0 is off (default)")
    p.add_argument("--seed", type=int, help="repeats the same speech (default: a random one, which is printed)")
    p.add_argument("--verbatim", action="store_true", help="keep the text: do not write numbers and signs in words")
    p.add_argument("--max-audio-length-ms", type=float, metavar="MS", help="limit of a turn (default: by its text)")
    p.add_argument("--watermark", action="store_true", help="mark the speech as generated (csm_tools.watermark)")


def adapter(argument):
    """DIR or DIR=FACTOR -> (folder, factor)."""
    folder, _, factor = argument.rpartition("=")
    return (folder, float(factor)) if folder and not Path(argument).exists() else (argument, 1.0)


def read_options(args, speaker=None):
    """The options of add_options -> (context, arguments of `generate`). Checks them before a model is loaded.

    The context is the clip of --ref-audio, or the one of --voice, which then belongs to `speaker` (None: --speaker).
    """
    if args.ref_audio == "":
        raise ValueError("--ref-audio is empty: it must name a clip")
    if args.ref_audio is None and args.ref_text is not None:
        raise ValueError("--ref-audio and --ref-text go together: a transcript needs its clip")
    as_speaker(args.speaker)
    context = []
    if args.ref_audio is not None:
        context.append(read_clip(args.speaker, args.ref_text, args.ref_audio))
    if is_clip(args.voice):
        clip = read_clip(args.speaker if speaker is None else speaker, clip_text(args.voice), args.voice)
        context += [] if has_context(args) else [clip]
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    csm.Sampling(**{name: value for name, value in options.items() if value is not None})  # raises early
    csm.check_seed(args.seed or 0)
    return context, options | {"max_audio_length_ms": args.max_audio_length_ms}


def has_context(args):
    """Whether the context comes from --ref-audio or --context, which override --voice."""
    return bool(args.ref_audio or getattr(args, "context", None))


def is_clip(voice):
    """Whether --voice names a file. Presets' names have no suffix."""
    return voice not in (None, "none") and bool(Path(voice).suffix) and Path(voice).is_file()


def clip_text(voice):
    """The transcript of the clip of --voice; None: transcribe it. Raises ValueError."""
    file = Path(voice).with_suffix(".txt")
    if file.is_file():
        return read_text(f"@{file}")
    if transcribe.package() is None:
        raise ValueError(f"{voice} has no transcript: write what it says into {file} ({transcribe.GET_IT})")
    return None


def read_clip(speaker, text, file):
    """A Segment of a clip without the silence at its ends. Raises ValueError if the clip is unusable.

    text None: transcribe it. Prints the transcript and what was cut to standard error.
    """
    samples, note = audio.trimmed(csm.as_samples(file))
    try:
        if text is not None and not text.strip():
            raise ValueError("its transcript is empty")
        audio.check_clip(samples, text)
        if text is None:
            text = transcribe.transcribe(samples)
            print(f"{file}: heard {text!r}", file=sys.stderr)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    if note:
        print(f"{file}: {note}", file=sys.stderr)
    return csm.Segment(speaker, text, samples)


def warn(args, context, speakers):
    """Print warnings about the clips of a context to standard error. speakers: of the texts to speak."""
    if has_context(args) and args.voice not in (None, "none"):
        print("warning: --voice is not used, because --ref-audio or --context is given", file=sys.stderr)
    for segment in context:
        for warning in audio.check_clip(segment.audio, segment.text):
            print(f"warning: {segment.text[:30]!r}: {warning}", file=sys.stderr)
    if context and not {segment.speaker for segment in context} & set(speakers):
        others = ", ".join(str(n) for n in dict.fromkeys(segment.speaker for segment in context))
        print(f"warning: no clip is of speaker {speakers[0]}; it takes the voice of speaker {others}", file=sys.stderr)


def check_out(out, args, *more):
    """Raise ValueError if OUT is one of the input files."""
    clip = [args.voice, Path(args.voice).with_suffix(".txt")] if is_clip(args.voice) else []
    for file in [args.ref_audio, *clip, *more]:
        if file and Path(file).exists() and Path(out).exists() and os.path.samefile(file, out):
            raise ValueError(f"{out} is also an input: give another OUT")


def check_place(file):
    """Raise ValueError if `file` is a folder, or is in none: it cannot be written."""
    file = Path(file)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"cannot write {file}: {'it is a folder' if file.is_dir() else 'there is no such folder'}")


def load_for(args, fallback=False):
    """Load the Generator for the options, and set args.model to its model.

    Without --model it is the base that an adapter names, else $CSM_MODEL, else csm-1b. fallback: take tiny if csm-1b
    cannot be downloaded.
    """
    options = {name: getattr(args, name) for name in ("dtype", "quantize", "adapter", "codebooks")}
    model = args.model
    for folder, _ in args.adapter or ():
        model = model or adapters.base_model(folder)
    args.model = model = model or os.environ.get("CSM_MODEL")
    if csm.on_gpu() and mx.metal.is_available():  # keep the weights from being paged out, as mlx-lm does
        mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
    try:
        generator = csm.load(model or "csm-1b", **options)
    except checkpoints.DownloadError as e:
        if model or not fallback:
            raise
        print(f"using the small bundled model, tiny, because csm-1b is missing: {e}", file=sys.stderr)
        generator = csm.load("tiny", **options)
    if getattr(args, "check", False):
        checkpoints.check_weights(generator, model or "csm-1b")
    voice = getattr(args, "voice", None)
    if voice not in (None, "none", *generator.voices) and not is_clip(voice):
        generator.voice_prompt(voice)  # raises an error that lists the voices
    return generator


def watermark():
    """The Watermark for --watermark. Raises ValueError if its weights cannot be downloaded."""
    from csm_tools import watermark

    return watermark.load()


def need(extra, *modules):
    """Raise ValueError if a module of an extra is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{module} is not installed: pip install 'csm-speech[{extra}]'")


# ---- speakers ---------------------------------------------------------------------------------------------------


def as_speaker(value):
    """A speaker's number from an int or its digits. Raises ValueError."""
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= LAST_SPEAKER:
        raise ValueError(f"speaker must be a whole number from 0 to {LAST_SPEAKER}, not {str(value)[:40]!r}")
    return number


def is_name(speaker):
    return isinstance(speaker, str) and bool(speaker.strip()) and not speaker.strip().lstrip("-").isdecimal()


def number_speakers(speakers, known=None):
    """Number the names among `speakers` (numbers and names): {name: number}, as in `known`, else the lowest free."""
    numbers = dict(known or {})
    used = {*numbers.values()} | {int(s) for s in speakers if not is_name(s) and str(s).isdecimal()}
    free = (n for n in itertools.count() if n not in used)
    for speaker in speakers:
        if is_name(speaker) and speaker not in numbers:
            numbers[speaker] = next(free)
    return numbers


def say_speakers(numbers):
    """Print the number of each name to standard error."""
    if numbers:
        print("speakers: " + ", ".join(f"{name} is {n}" for name, n in numbers.items()), file=sys.stderr)


# ---- files that options name ------------------------------------------------------------------------------------


def check_text(text):
    """Return a TEXT argument. Raises ValueError if it is the name of a file."""
    if re.search(r"[./\\]", text) and not re.search(r"\s", text) and len(text) < 256 and Path(text).is_file():
        raise ValueError(f"{text} is a file: write @{text} to speak its text")
    return text


def read_dialogue(path):
    """A file of lines "0: Hello." or "Ann: Hello." -> [(speaker, text)]. Names stay names. Raises ValueError."""
    turns = []
    for n, line in enumerate(read_text(f"@{path}").splitlines(), 1):
        if m := re.match(r"\s*\[?(?:(\d+)\]?\s*:|([^\s\[\]:][^\[\]:]{0,39}?)\]?\s*:(?=\s))\s*(\S.*)", line):
            try:
                turns.append((m[2] if m[2] and is_name(m[2]) else as_speaker(m[1] or m[2]), m[3].strip()))
            except ValueError as e:
                raise ValueError(f"{path}, line {n}: {e}") from None
        elif line.strip():
            raise ValueError(f"{path}, line {n}: expected `speaker: text`, such as `0: Hello.`")
    if not turns:
        raise ValueError(f"{path} has no turns")
    return turns


def read_turns(path):
    """A JSON list of {"speaker", "text", "audio"} -> [(speaker, text, path)]. Raises ValueError.

    Speakers are numbers or names, paths are relative to the JSON, a missing text is None.
    """
    expected = '[{"speaker": 0, "text": "...", "audio": "file.wav"}, ...]'
    try:
        found = json.loads(read_text(f"@{path}"))
    except (RecursionError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: expected {expected} ({type(e).__name__}: {e})") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected {expected}")
    turns = []
    for i, turn in enumerate(found, 1):
        try:
            speaker = turn["speaker"] if "speaker" in turn else turn["speaker_id"]
            file = str(turn.get("audio") or turn["audio_path"])
            text = turn.get("text")
            if not isinstance(text, str | None):
                raise TypeError("text is not a string")
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, turn {i}: expected {expected} ({type(e).__name__}: {e})") from None
        try:
            speaker = speaker if is_name(speaker) else as_speaker(speaker)
        except ValueError as e:
            raise ValueError(f"{path}, turn {i}: {e}") from None
        place = Path(path).parent / file
        turns.append((speaker, text, place if place.is_file() else Path(path).parent / file.replace("\\", "/")))
    return turns


def read_context(args, turns=()):
    """(Segments of --context, turns [(speaker, text)]), with the names of both numbered. Prints these numbers."""
    before = read_turns(args.context) if args.context else []
    numbers = number_speakers([turn[0] for turn in (*before, *turns)])
    say_speakers(numbers)
    segments = []
    for i, (speaker, text, file) in enumerate(before, 1):
        try:
            segments.append(read_clip(numbers.get(speaker, speaker), text, file))
        except ValueError as e:
            raise ValueError(f"{args.context}, turn {i}: {e}") from None
    return segments, [(numbers.get(speaker, speaker), text) for speaker, text in turns]
