"""What the commands share: options, the texts and contexts that they name, and errors of one line."""

import argparse
import json
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path

import csm  # before mlx
import csm_layouts
from csm import read_text
from csm_tools import adapters

import mlx.core as mx  # isort: skip

QUANTIZE = {  # keywords of add_argument("--quantize")
    "type": lambda x: int(x) if x.isdigit() else x,
    "choices": (4, 6, 8, "mxfp4", "nvfp4", "mxfp8"),
    "help": "bits per weight, or a format of MLX",
}

# ---- the program ------------------------------------------------------------------------------------------------


def parser_for(name, **options):
    """An ArgumentParser that reports a mistake in one line, under the name of the installed command if it is one."""
    called = Path(sys.argv[0]).name.removesuffix(".exe")
    installed = called == "csm" or called.startswith("csm-")
    p = argparse.ArgumentParser(prog=called if installed else name, **options)
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    return p


def run(p, function, args, interrupted="interrupted: no file was written"):
    """function(args) as the program of the parser `p`; a mistake ends in one line and exit status 2."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files are removed
    try:
        return function(args)
    except BrokenPipeError:  # the program that reads OUT - has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as e:
        p.error(" ".join(str(e).split()))
    except KeyboardInterrupt:
        p.exit(130, f"{interrupted}\n")


def peak_memory():
    """Bytes: the peak of MLX (which counts a GPU's memory) or of the process, whichever is larger."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(mx.get_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


# ---- options ----------------------------------------------------------------------------------------------------


def add_model_options(p):
    """The options that `load_for` reads."""
    p.add_argument("--model", help="csm-1b, tiny, a folder, a weights file or a Hugging Face repo (default: csm-1b)")
    p.add_argument("--quantize", **QUANTIZE)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, or float32")
    how = {"metavar": "DIR[=FACTOR]", "action": "append", "type": adapter}
    p.add_argument("--adapter", **how, help="an adapter of finetune, PEFT or csm-mlx; repeatable")
    p.add_argument("--codebooks", type=int, metavar="N", help="use the first N only: faster, and sounds worse")


def add_options(p):
    """The options that `load_for` and `read_options` read."""
    add_model_options(p)
    p.add_argument("--speaker", type=int, default=0, help="speaker id of the text (default 0)")
    p.add_argument("--voice", help="a preset, clip.wav with clip.txt beside it, or none (default: the model's own)")
    p.add_argument("--ref-audio", metavar="F", help="a clip of the voice to speak with")
    p.add_argument("--ref-text", metavar="T", help="the transcript of that clip")
    p.add_argument("--temperature", type=float, help="0 is greedy (default 0.9)")
    p.add_argument("--top-k", type=int, help="0 is off (default 50)")
    p.add_argument("--top-p", type=float, help="1 is off (default)")
    p.add_argument("--min-p", type=float, help="0 is off (default)")
    p.add_argument("--seed", type=int, help="for the same speech again (default: a random one, which is printed)")
    p.add_argument("--verbatim", action="store_true", help="say the text as it is, not numbers and signs in words")
    p.add_argument("--max-audio-length-ms", type=float, metavar="MS", help="limit of a turn (default: by its text)")
    p.add_argument("--watermark", action="store_true", help="mark the speech as generated (csm_tools.watermark)")


def adapter(argument):
    """DIR or DIR=FACTOR -> (folder, factor)."""
    folder, _, factor = argument.rpartition("=")
    return (folder, float(factor)) if folder and not Path(argument).exists() else (argument, 1.0)


def read_options(args):
    """The options of add_options -> the context, and arguments of `generate`; checked before a model is loaded."""
    if (args.ref_audio is None) != (args.ref_text is None):
        raise ValueError("--ref-audio and --ref-text go together: a clip needs its transcript")
    context = []
    if args.ref_audio is not None:
        context.append(csm.Segment(args.speaker, args.ref_text, csm.as_samples(args.ref_audio)))
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    csm.Sampling(**{name: value for name, value in options.items() if value is not None})  # raises early
    csm.check_seed(args.seed or 0)
    return context, options | {"max_audio_length_ms": args.max_audio_length_ms}


def load_for(args):
    """The Generator for the options.

    Without --model: the base of the adapter, or csm-1b, or tiny if csm-1b cannot be downloaded.
    """
    options = {name: getattr(args, name) for name in ("dtype", "quantize", "adapter", "codebooks")}
    model = args.model or (args.adapter and adapters.base_model(args.adapter[0][0]))
    if csm.on_gpu() and mx.metal.is_available():  # keep the weights from being paged out, as mlx-lm does
        mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
    try:
        return csm.load(model or "csm-1b", **options)
    except csm_layouts.DownloadError as e:
        if model:
            raise
        print(f"using the small bundled model, tiny, because csm-1b is missing: {e}", file=sys.stderr)
        return csm.load("tiny", **options)


def watermark():
    """The Watermark for --watermark. Raises ValueError if its weights cannot be downloaded."""
    from csm_tools import watermark

    return watermark.load()


# ---- files that options name ------------------------------------------------------------------------------------


def read_dialogue(path):
    """A file of lines "0: Hello." -> [(speaker, text)]. Raises ValueError."""
    turns = []
    for n, line in enumerate(read_text(f"@{path}").splitlines(), 1):
        if m := re.match(r"\s*\[?(\d+)\]?\s*:\s*(\S.*)", line):
            turns.append((int(m[1]), m[2].strip()))
        elif line.strip():
            raise ValueError(f"{path}, line {n}: expected `speaker: text`, such as `0: Hello.`")
    if not turns:
        raise ValueError(f"{path} has no turns")
    return turns


def read_context(path):
    """A JSON list of {"speaker", "text", "audio": path beside the JSON} -> Segments. Raises ValueError."""
    context = []
    try:
        for turn in json.loads(read_text(f"@{path}")):
            speaker = turn["speaker"] if "speaker" in turn else turn["speaker_id"]
            audio = Path(path).parent / (turn.get("audio") or turn["audio_path"])
            context.append(csm.Segment(int(speaker), turn["text"], csm.as_samples(audio)))
        return context
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, json.JSONDecodeError) as e:
        expected = '[{"speaker": 0, "text": "...", "audio": "file.wav"}, ...]'
        raise ValueError(f"{path}: expected {expected} ({type(e).__name__}: {e})") from None
