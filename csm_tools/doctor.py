"""Is this machine's GPU (or CPU) right, and how quick? One command, one table, and one JSON to paste into an issue.

    python -m csm_tools.doctor                    # the bundled model, no network: some minutes
    python -m csm_tools.doctor --model my-csm --dtype bfloat16 --quantize 8
    MLX_MAX_OPS_PER_BUFFER=40 python -m csm_tools.doctor --only timings       # without what mimi.py tells MLX

`python -m csm_tools.bench --doctor` is the same. What is compared is this program with itself: the device with the CPU
in float32, streams with whole speech, a batch with one utterance, threads with one thread. Exit status 1 says that
something fell short; the last lines before the JSON say what, in words.

On a CPU in float32 all codes have to be the same. On a GPU other kernels add up in other orders, and serve other batch
sizes: there the first frame's codes have to agree in most, since after one other code all that follow are others too.
"""

import asyncio
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path

import csm  # before mlx
import csm_batch
import csm_layouts
import mimi
from csm_tools import checkpoints, command, serve_engine

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten

MADE = csm.CSMConfig(csm.LlamaConfig(2, 256, 8, 2, 32, 512), csm.LlamaConfig(2, 128, 4, 2, 32, 256), 1000, 515, 8)
BACKENDS = ("mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-cpu")
TEXTS = ("Yes.", "Where is my cat?", "Good morning, John, how are you today?", "We had lunch at the old hotel.")
SHORT = {"max_audio_length_ms": 2000}


# Each check takes the options and the Generator, and returns figures {name: value} and sentences on what fell short.


def installation(args, generator):
    """Versions, and whether one package's library lies on top of another's."""
    found = {}
    for name in ("mlx", *BACKENDS, "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    short, backends = [], [name for name in BACKENDS if name in found]
    if len(backends) > 1:
        short.append(f"{' and '.join(backends)} each put a libmlx in the same place: uninstall all, then install one")
    if len({found["mlx"], *(found[name] for name in backends)}) > 1:
        short.append("mlx and its backend have different versions: upgrade both")
    if tuple(int(n) for n in found["mlx"].split(".")[:3] if n.isdigit()) < (0, 32, 4):
        short.append("on CUDA, MLX below 0.32.4 fails after some hundred prompt lengths: upgrade it")
    if not csm.on_gpu() and any("cuda" in name or "metal" in name for name in backends):
        short.append("a GPU's backend is installed, and MLX uses the CPU")
    return found, short


def golden(args, generator):
    """The codes that are stored beside the bundled model."""
    expected = mimi.read_json(checkpoints.find("tiny") / "golden.json")
    if not expected:
        return {"skipped": "golden.json is not installed"}, []
    tiny = csm.load("tiny", dtype="float32")
    codes = tiny.generate_codes(expected["text"], expected["speaker"], seed=expected["seed"])
    return compared(codes, expected["codes"], "the bundled model's", exact=not csm.on_gpu())


def compared(ours, theirs, whose, exact):
    """Frames (F, K) of codes and (F, K) -> figures, sentences."""
    ours, theirs = np.array(ours), np.array(theirs)
    n = min(len(ours), len(theirs))
    same = (ours[:n] == theirs[:n]).all(axis=1)
    first = n if same.all() else int(same.argmin())
    figures = {"frames": n, "the same until frame": first}
    if len(ours) == len(theirs) == first:
        return figures, []
    if exact:
        return figures, [f"{whose} codes are others from frame {first} on"]
    if not n or (ours[0] == theirs[0]).mean() < 0.5:
        return figures, [f"{whose} codes are others from the first frame on"]
    return figures, []


def made_model(dtype, quantize=None):
    """MADE with random weights of a spread that keeps activations near 1; the same on every device."""
    with mx.stream(mx.cpu):
        key, weights = mx.random.key(0), {}
        for name, w in tree_flatten(csm.CSM(MADE).parameters()):
            key, own = mx.random.split(key)
            scale = 1 if "embeddings" in name else 3 / w.shape[-1] ** 0.5 if "head" in name else 1 / w.shape[-1] ** 0.5
            weights[name] = mx.random.normal(w.shape, key=own) * scale if w.ndim > 1 else mx.ones(w.shape)
        if quantize:
            weights, _ = csm_layouts.quantize(weights, quantize)
        weights = {k: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for k, w in weights.items()}
        model = csm.blank_model(MADE, weights)
        mimi.load_weights(model, weights)
    return model


def parity(args, generator):
    """Logits of made weights against those of the CPU in float32, as a share of their spread."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 500, (2, 30, MADE.audio_num_codebooks + 1)).astype(np.int32)
    rows[:, :10, -1] = csm.NO_TEXT
    codes = rng.integers(0, 500, (2, MADE.audio_num_codebooks)).astype(np.int32)

    def logits(model):
        cache = csm.KVCache(MADE.backbone, model.dtype)
        h = model(mx.array(rows[:, :20]), cache)[:, -1]
        for i in range(20, 30):  # one at a time, as frames come
            h = model(mx.array(rows[:, i : i + 1]), cache)[:, -1]
        both = mx.concatenate([model.head(0, h)[:, None], model.depth_logits(h, mx.array(codes))], axis=1)
        return np.array(both.astype(mx.float32))

    figures, short = {}, []
    float32 = 1e-2 if csm.on_gpu() else 1e-4  # a GPU may round the factors of its products to TF32's 10 bits
    for bits in (None, 8, 4):
        with mx.stream(mx.cpu):
            expected = logits(made_model(mx.float32, bits))
        for dtype, bound in ((mx.float32, float32), (mx.bfloat16, 0.1)):
            kind = str(dtype).removeprefix("mlx.core.") + (f", {bits} bits" if bits else "")
            if dtype == mx.bfloat16 and bits and not csm.on_gpu():
                bound = 0.5  # MLX's quantized product on a CPU adds up in the type of its input
            error = float(np.abs(logits(made_model(dtype, bits)) - expected).max() / expected.std())
            figures[kind] = error
            if not error < bound:
                short.append(f"logits in {kind} are off by {error:.2g} of their spread (bound: {bound})")
    return figures, short


def attention(args, generator):
    """MLX's attention of one position over many, and of many, against its formula on the CPU."""
    figures, short = {}, []
    for T, S in ((1, 300), (1, 1500), (1, 2000), (200, 200), (256, 1500)):
        keys = mx.random.split(mx.random.key(T + S), 3)
        q, k, v = (mx.random.normal((2, n, s, 64), key=key) for n, s, key in zip((8, 2, 2), (T, S, S), keys))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal" if T > 1 else None)
        q, k, v = (np.array(x, np.float64) for x in (q, k, v))
        scores = q @ k.repeat(4, axis=1).swapaxes(2, 3) * 0.125
        scores += np.where(np.arange(S) > np.arange(S - T, S)[:, None], -np.inf, 0)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        error = float(np.abs(np.array(y) - p / p.sum(axis=-1, keepdims=True) @ v.repeat(4, axis=1)).max())
        figures[f"{T} over {S}"] = error
        if not error < 5e-3:
            short.append(f"attention of {T} over {S} positions is off by {error:.2g}")
    return figures, short


def codec(args, generator):
    """Mimi on the device against Mimi on the CPU."""
    audio = noise(2.0)[None, None]
    codec = generator.mimi
    with mx.stream(mx.cpu):
        codes = np.array(codec.encode(mx.array(audio)))
        sound = np.array(codec.decode(mx.array(codes)))
    ours = np.array(codec.encode(mx.array(audio)))
    error = float(np.abs(np.array(codec.decode(mx.array(codes))) - sound).max() / np.abs(sound).max())
    first, same = float((ours[:, 0] == codes[:, 0]).mean()), float((ours == codes).mean())
    figures = {"codes that agree": same, "of the first codebook": first, "sound, of the peak": error}
    short = [f"Mimi's sound is off by {error:.2g} of its peak"] * (not error < 1e-2)
    return figures, short + [f"of Mimi's first codes only {first:.0%} agree"] * (first < 0.9)


def noise(seconds):
    n = int(seconds * 24_000)
    return (np.random.default_rng(0).standard_normal(n) * 0.2 * np.sin(np.arange(n) / 2000)).astype(np.float32)


def streams(args, generator):
    """Streamed speech joined, against the same speech whole."""
    whole = np.array(generator.generate(TEXTS[3], 0, seed=1, **SHORT))
    pieces = list(generator.stream(TEXTS[3], 0, seed=1, streaming_interval=0.08, **SHORT))
    joined = np.concatenate([np.array(piece) for piece in pieces])
    if joined.shape != whole.shape or not whole.size:
        return {"samples": len(joined)}, [f"streamed speech has {len(joined)} samples, whole {len(whole)}"]
    error = float(np.abs(joined - whole).max() / np.abs(whole).max())
    bound = 1e-2 if csm.on_gpu() else 1e-4
    short = [f"streamed speech is off by {error:.2g} of its peak"] * (not error < bound)
    return {"pieces": len(pieces), "of the peak": error}, short


def batch(args, generator):
    """Utterances that join a batch one after the other, against each alone: sampled and greedy."""
    figures, short = {"utterances": 0, "the same throughout": 0}, []
    exact = not csm.on_gpu() and generator.model.dtype == mx.float32
    for kind, sampling in (("sampled", csm.Sampling()), ("greedy", csm.Sampling(temperature=0))):
        running, said = csm_batch.Batch(generator), {}
        for seed, text in enumerate(TEXTS):
            before, rows = generator.prompt(text, seed % 2)
            uid = running.insert(rows, 20, seed, sampling, generator.context_cache(before))
            said[uid] = []
            for uid, codes in running.next():
                said[uid] += [] if codes is None else [codes]
        while len(running):
            for uid, codes in running.next():
                said[uid] += [] if codes is None else [codes]
        for (seed, text), codes in zip(enumerate(TEXTS), said.values()):
            before, rows = generator.prompt(text, seed % 2)
            alone = list(generator.speak(rows, generator.context_cache(before).copy(), 20, seed, sampling))
            found, wrong = compared(codes, alone, f"{kind}, in a batch, utterance {seed}'s", exact)
            figures["utterances"] += 1
            figures["the same throughout"] += found["the same until frame"] == len(codes) == len(alone)
            short += wrong
    return figures, short


def threads(args, generator):
    """Four threads on one Generator, against one."""
    options = {"max_audio_length_ms": 800}
    expected = {seed: generator.generate_codes(TEXTS[seed % 4], seed=seed, **options).tolist() for seed in range(4)}
    wrong, errors = [], []

    def work():
        try:
            for seed, codes in expected.items():
                if generator.generate_codes(TEXTS[seed % 4], seed=seed, **options).tolist() != codes:
                    wrong.append(seed)
        except Exception as e:
            errors.append(f"a thread failed: {type(e).__name__}: {e}")

    workers = [threading.Thread(target=work) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    short = [f"{len(wrong)} of 16 speeches made by threads side by side have other codes"] * bool(wrong)
    return {"speeches": 16, "others": len(wrong)}, errors + short


def engine(args, generator):
    """The server's engine with 8 listeners, who ask again as soon as they have heard all."""
    first, sound, errors, begun = [], [], [], time.perf_counter()

    async def listener(engine, number):
        while time.perf_counter() - begun < args.seconds:
            asked, said = time.perf_counter(), 0
            parts = [(TEXTS[(number + len(first)) % 4], 0.0)]
            speech = serve_engine.Speech(parts, number % 2, None, [], len(first), csm.Sampling())
            engine.submit(speech)
            while (piece := await speech.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    errors.append(f"the engine failed: {piece}")
                    return
                if not said:
                    first.append(time.perf_counter() - asked)
                said += len(piece)
                speech.taken = said
            sound.append(said / generator.sample_rate)

    async def serve():
        engine = serve_engine.Engine(generator, 8, 8)
        task = asyncio.create_task(engine.run())
        try:
            await asyncio.gather(*(listener(engine, number) for number in range(8)))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(serve())
    taken = time.perf_counter() - begun
    figures = {"speeches": len(sound), "seconds of sound a second": sum(sound) / taken}
    if first:
        figures |= {"first sound, median, s": statistics.median(first), "first sound, worst, s": max(first)}
    short = ["the engine says less than a second of sound a second"] * (sum(sound) < taken)
    return figures, errors + short


def memory(args, generator):
    """What MLX holds after 20 requests of many lengths, and after 100."""
    held = []
    for i in range(100):
        text = " ".join(TEXTS[j % 4] for j in range(i, i + 1 + i % 3))
        generator.generate(text, i % 2, seed=i, max_audio_length_ms=80 * (3 + i % 10))
        held.append(mx.get_active_memory() / 1e6)
    before, after = max(held[10:20]), max(held[90:])
    figures = {"MB after 20": before, "MB after 100": after, "MB in the cache": mx.get_cache_memory() / 1e6}
    figures["peak, MB"] = command.peak_memory() / 1e6
    return figures, [f"memory grew from {before:.0f} to {after:.0f} MB"] * (after > before * 1.05 + 16)


def timings(args, generator):
    """Milliseconds of a frame, of the first sound, of a prompt, of Mimi: medians."""
    model, K = generator.model, generator.model.config.audio_num_codebooks
    limit = model.config.backbone.max_positions

    def median(function, n=5):
        taken = []
        for _ in range(n + 1):  # the first warms up
            begun = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - begun))
        return statistics.median(taken[1:])

    def rows(n, i=0):
        return np.pad(np.full((n, K), 0, np.int32), [(0, 0), (0, 1)], constant_values=i)

    figures = {}
    for size in (1, 4, 16):
        running = csm_batch.Batch(generator)
        for i in range(size):
            running.insert(rows(32, i), 40, i, csm.Sampling(temperature=9, top_k=0))  # which never ends by itself
        running.next()
        taken = []
        while len(taken) < 30:
            begun = time.perf_counter()
            running.next()
            taken.append(1000 * (time.perf_counter() - begun))
        figures[f"a frame, batch of {size}, ms"] = statistics.median(taken)

    def first_sound():
        cache = csm.KVCache(model.config.backbone, model.dtype)
        codes = next(generator.speak(rows(32), cache, 10, 0, csm.Sampling()))
        np.array(generator.decode(mx.array(codes[None])))

    figures["first sound after 32 rows, ms"] = median(first_sound)
    for n in (n for n in (256, 1024) if n < limit):
        cache = csm.KVCache(model.config.backbone, model.dtype)
        figures[f"a prompt of {n} rows, ms"] = median(lambda n=n, cache=cache: prompt(model, rows(n), cache), 2)
    audio, codes = mx.array(noise(4)[None, None]), mx.zeros((1, generator.mimi.n_codebooks, 50), mx.int32)
    figures["Mimi encodes 4 s, ms"] = median(lambda: mx.eval(generator.mimi.encode(audio)), 3)
    figures["Mimi decodes 4 s, ms"] = median(lambda: mx.eval(generator.mimi.decode(codes)), 3)
    slow = figures["a frame, batch of 1, ms"] > 80
    return figures, ["a frame takes longer than its 80 ms of sound: speech is slower than real time"] * slow


def prompt(model, rows, cache):
    mx.eval(csm.prefill(model, rows, cache))
    cache.trim(len(rows))


CHECKS = {
    "installation": installation, "golden": golden, "parity": parity, "attention": attention, "codec": codec,
    "streams": streams, "batch": batch, "threads": threads, "engine": engine, "memory": memory, "timings": timings,
}  # fmt: skip


def examine(args):
    if args.json:
        command.check_place(args.json)  # before minutes of checks
    generator = command.load_for(args)
    logging.getLogger("csm").setLevel(logging.ERROR)  # not that each speech was cut off, as it is meant to be
    device = {k: v for k, v in mx.device_info().items() if isinstance(v, (str, int))}
    settings = {k: v for k, v in os.environ.items() if k.startswith(("MLX_", "CSM_"))}
    report = {
        "platform": platform.platform(), "python": platform.python_version(), "device": str(mx.default_device()),
        "device_info": device, "model": args.model, "dtype": str(generator.model.dtype).removeprefix("mlx.core."),
        "quantize": args.quantize, "settings": settings,
    }  # fmt: skip
    print(f"{report['device']}, {report['dtype']}, MLX {mx.__version__}, {report['platform']}\n")
    print("| check | result | seconds | figures |\n|---|---|---|---|", flush=True)
    report["checks"], sentences = {}, []
    for name in args.only:
        begun = time.perf_counter()
        try:
            figures, short = CHECKS[name](args, generator)
        except Exception as e:
            figures, short = {}, [f"{name} failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}"]
        taken = time.perf_counter() - begun
        figures = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in figures.items()}
        result = "fell short" if short else "skipped" if "skipped" in figures else "good"
        report["checks"][name] = {"result": result, "seconds": round(taken, 1), "figures": figures, "short": short}
        sentences += short
        shown = ", ".join(f"{k}: {v}" for k, v in figures.items())
        print(f"| {name} | {result} | {taken:.1f} | {shown} |", flush=True)
    print()
    for sentence in sentences or ["Nothing fell short."]:
        print(f"- {sentence}")
    print("\n```json\n" + json.dumps(report) + "\n```")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if sentences else 0


def main(argv=None):
    p = command.parser_for("doctor", description="Checks this machine's results and speed: a table and a JSON.")
    command.add_model_options(p, "tiny")
    p.set_defaults(model="tiny")
    p.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="these checks (default: all)")
    p.add_argument("--seconds", type=float, default=20, help="for which the server's engine runs (default 20)")
    p.add_argument("--json", type=Path, metavar="F", help="write the JSON there too")
    return command.run(p, examine, p.parse_args(argv), "interrupted")


if __name__ == "__main__":
    sys.exit(main())
