"""Speed, side by side: ours and whichever peers are installed, in one process and in turns.

    python -m csm_tools.bench --tiny                     # a minute, small random models
    python -m csm_tools.bench --json b.json --png b.png  # CSM-1B's sizes, random weights: minutes
    python -m csm_tools.bench --checkpoint my-csm        # those of a folder instead, with the time to load them
    python -m csm_tools.bench --dtype bfloat16 --quantize 8 4 --batch 1 16 50   # on a GPU
    python -m csm_tools.bench --doctor                   # are the results right here? (csm_tools/doctor.py)

Peers, through their own public functions: transformers (its `generate`, torch), csm-mlx (`generate_frame`) and
mlx-audio (`SesameModel.generate_frame`, its Mimi). One that is not installed gets a row that says so. Weights are of
the same sizes everywhere; nothing is downloaded. A measure is the median over rounds, in which the systems take turns.
The floor is the time that this machine needs to read a frame's weights, in the same turns: no batch of one can beat it.
transformers-int8 is transformers after torch's own dynamic quantization, what a CPU's user would try first. llama.cpp
(`pip install llama-cpp-python gguf`) runs Llamas of the same sizes with --quantize's bits, q8_0 and q4_k.
"""

import gc
import importlib.metadata
import importlib.util
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import csm  # before mlx
import csm_batch
import csm_layouts
import mimi
import mlx_cpu
from csm_tools import checkpoints, command

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten, tree_map

SMALL = csm.CSMConfig(
    csm.LlamaConfig(4, 256, 8, 2, 32, 1024), csm.LlamaConfig(2, 128, 4, 2, 32, 512), 1000, 2051, 8
)  # fmt: skip
SMALL_MIMI = mimi.MimiConfig(n_filters=8, dim=64, n_layers=2, n_heads=2, ffn_dim=128, codebook_dim=32, n_codebooks=8)
PROMPT = 32  # rows before the frames that are timed


def randomize(module, dtype=mx.float32):
    """Random parameters, in place: a million of them, over and over."""
    some = (mx.random.normal((2**20,), key=mx.random.key(0)) * 0.02).astype(dtype)

    def fill(w):
        n = min(w.size, some.size)
        same = mx.tile(some[:n], -(-w.size // n))[: w.size].reshape(w.shape)
        return same + mx.zeros((), dtype)  # memory of its own: what all share would be read from the CPU's cache

    module.update(tree_map(fill, module.parameters()))
    mx.eval(module.parameters())
    return module


def fill_from(module, file, dtype):
    """The weights of a .safetensors file, in place."""
    module.load_weights(str(file))
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    return module


def transformers_fields(config, codec):
    """The config.json of transformers for these sizes, which mlx-audio reads too."""
    fields = csm_layouts.transformers_config(asdict(config), asdict(codec), "float32")
    return json.loads(json.dumps(fields))  # lists in the place of tuples


class Ours:
    def __init__(self, config, codec, dtype, folder, quantize=None):
        self.sampling = csm.Sampling(top_k=50)
        if folder:
            self.generator = csm.load(folder / "ours", dtype=str(dtype).removeprefix("mlx.core."), quantize=quantize)
            mx.eval(self.generator.model.parameters())
            return
        model = randomize(csm.CSM(config), mx.bfloat16 if quantize else dtype)  # as most checkpoints are
        if quantize:
            weights, _ = csm_layouts.quantize(dict(tree_flatten(model.parameters())), quantize)
            weights = {k: w if w.dtype == mx.uint32 else csm.cast(k, w, dtype) for k, w in weights.items()}
            model = csm.blank_model(config, weights)
            mimi.load_weights(model, weights)
        self.generator = csm.Generator(model, randomize(mimi.Mimi(codec)), None)

    def frames(self, batch, n_rows, n):
        K = self.generator.model.config.audio_num_codebooks
        rows = np.zeros((n_rows, K + 1), np.int32)
        if batch == 1:
            for _ in self.speak(rows, n):
                pass
            return
        running = csm_batch.Batch(self.generator)
        for i in range(batch):
            rows[:, K] = i  # no two prompts alike
            running.insert(rows, n, i, self.sampling)
        while len(running):
            running.next()

    def first_audio(self):
        K = self.generator.model.config.audio_num_codebooks
        codes = next(self.speak(np.zeros((PROMPT, K + 1), np.int32), 10))
        np.array(self.generator.decode(mx.array(codes[None])))

    def speak(self, rows, n):
        """The frames after a prompt."""
        model = self.generator.model
        cache = csm.KVCache(model.config.backbone, model.dtype)
        return self.generator.speak(rows, cache, n, 0, self.sampling)

    def graph(self):
        """Seconds to build a frame's graph, nothing computed."""
        model, c = self.generator.model, self.generator.model.config
        cache, options = csm.KVCache(c.backbone, model.dtype), mx.array([self.sampling.as_row()])
        rows = mx.zeros((1, 1, c.audio_num_codebooks + 1), mx.int32)
        begun = time.perf_counter()
        noise = mx.random.gumbel((1, c.audio_num_codebooks, c.audio_vocab_size), key=mx.random.key(0))
        h = model(rows, cache)[:, -1]
        draw = csm.Draw(noise, options, self.generator.mimi.config.codebook_size)
        csm.fast_next_frame(model, h, draw, c.audio_num_codebooks)
        return time.perf_counter() - begun

    def encode(self, audio):
        mx.eval(self.generator.mimi.encode(mx.array(audio)[None, None]))

    def decode(self, codes):
        mx.eval(self.generator.mimi.decode(mx.array(codes)[None]))

    def decode_steps(self, codes):
        state, codes = self.generator.mimi.init_state(1), mx.array(codes)[None]
        for i in range(codes.shape[2]):
            audio, state = self.generator.mimi.decode_step(codes[:, :, i : i + 1], state)
            mx.eval(audio)


class Transformers:
    package = "transformers"

    def __init__(self, config, codec, dtype, folder):
        import torch
        import transformers

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.kind = getattr(torch, str(dtype).removeprefix("mlx.core."))
        if folder:
            model = transformers.CsmForConditionalGeneration.from_pretrained(folder / "transformers", dtype=self.kind)
        else:
            fields = transformers_fields(config, codec)
            ids = ("bos_token_id", "eos_token_id", "pad_token_id", "audio_token_id", "audio_eos_token_id")
            fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "dtype")}
            fields |= {name: i for i, name in enumerate(ids)}
            torch.manual_seed(0)
            with torch.device(self.device):
                model = transformers.CsmForConditionalGeneration(transformers.CsmConfig(**fields))
        self.model = model.to(self.device, self.kind).eval()

    def frames(self, batch, n_rows, n):
        ids = (self.torch.arange(n_rows, device=self.device) % 400 + 5).repeat(batch, 1)
        options = {"do_sample": True, "top_k": 50, "depth_decoder_do_sample": True, "depth_decoder_top_k": 50}
        with self.torch.no_grad():
            self.model.generate(
                input_ids=ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **options
            )

    def encode(self, audio):
        x = self.torch.tensor(audio, device=self.device, dtype=self.kind)[None, None]
        with self.torch.no_grad():
            self.model.codec_model.encode(x)

    def decode(self, codes):
        with self.torch.no_grad():
            self.model.codec_model.decode(self.torch.tensor(codes, device=self.device)[None])


class StaticTransformers(Transformers):
    """With static caches, which transformers compiles on a GPU."""

    def __init__(self, *args):
        import torch

        if not torch.cuda.is_available():
            raise ValueError("on an NVIDIA GPU alone")
        super().__init__(*args)
        for part in (self.model, self.model.depth_decoder):
            part.generation_config.cache_implementation = "static"


class Int8Transformers(Transformers):
    """With the weights of its matrices in 8 bits, as torch itself quantizes them for a CPU."""

    def __init__(self, config, codec, dtype, folder):
        super().__init__(config, codec, dtype, folder)
        if self.device != "cpu" or self.kind != self.torch.float32:
            raise ValueError("on a CPU and in float32 alone")
        linear = {self.torch.nn.Linear}
        for part in (self.model.backbone_model, self.model.depth_decoder, self.model.lm_head):
            self.torch.ao.quantization.quantize_dynamic(part, linear, dtype=self.torch.qint8, inplace=True)


class MLXPeer:
    """What csm-mlx and mlx-audio share: `generate_frame` on rows and masks, and a sampler."""

    def sampler(self, logits):
        options = mx.array([csm.Sampling(top_k=50).as_row()] * len(logits))
        return csm.sample(logits, mx.random.gumbel(logits.shape, key=mx.random.key(0)), options)

    def rows(self, batch, n):
        K = self.K
        rows = mx.concatenate([mx.zeros((batch, n, K), mx.int32), mx.ones((batch, n, 1), mx.int32)], axis=-1)
        return rows, mx.broadcast_to(mx.arange(K + 1) == K, rows.shape)

    def frames(self, batch, n_rows, n):
        self.reset()
        rows, mask = self.rows(batch, n_rows)
        for _ in range(n):
            codes = self.frame(rows, mask)
            mx.eval(codes)
            rows = mx.pad(codes.astype(mx.int32), [(0, 0), (0, 1)])[:, None]
            mask = mx.broadcast_to(mx.arange(self.K + 1) < self.K, rows.shape)

    def graph(self):
        self.reset()
        rows, mask = self.rows(1, 1)
        begun = time.perf_counter()
        self.frame(rows, mask)
        return time.perf_counter() - begun


class CsmMlx(MLXPeer):
    package = "csm_mlx"

    def __init__(self, config, codec, dtype, folder):
        import csm_mlx
        from csm_mlx.generation import generate_frame
        from mlx_lm.models.cache import make_prompt_cache

        if (config.backbone, config.decoder) != (csm.CSMConfig.backbone, csm.CSMConfig.decoder):
            raise ValueError("CSM-1B's sizes alone")
        self.K, self.make_cache, self.generate_frame = 32, make_prompt_cache, generate_frame
        model = csm_mlx.CSM(csm_mlx.csm_1b())
        self.model = fill_from(model, folder / "ours/model.safetensors", dtype) if folder else randomize(model, dtype)

    def reset(self):
        self.cache = self.make_cache(self.model.backbone)

    def frame(self, rows, mask):
        return self.generate_frame(self.model, rows, token_mask=mask, sampler=self.sampler, cache=self.cache)


class MlxAudio(MLXPeer):
    package = "mlx_audio"

    def __init__(self, config, codec, dtype, folder):
        from mlx_audio.codec.models.mimi import mimi as theirs
        from mlx_audio.tts.models.sesame import sesame

        self.K = config.audio_num_codebooks
        fields = transformers_fields(config, codec)
        depth = dict.fromkeys(sesame.DepthDecoderConfig.__dataclass_fields__) | fields["depth_decoder_config"]
        fields |= {name: getattr(config, name) for name in ("text_vocab_size", "audio_vocab_size")}
        fields |= {"audio_num_codebooks": self.K, "depth_decoder_config": depth}
        known = dict.fromkeys(sesame.SesameModelArgs.__dataclass_fields__)
        model = sesame.SesameModel(known | {k: v for k, v in fields.items() if k in known})
        self.model = fill_from(model, folder / "ours/model.safetensors", dtype) if folder else randomize(model, dtype)
        self.codec = None
        if codec == mimi.MimiConfig():
            self.codec = randomize(theirs.Mimi(theirs.mimi_202407(32)))

    def reset(self):
        self.model.setup_caches(1)

    def frame(self, rows, mask):
        return self.model.generate_frame(rows, mask, None, self.sampler)

    def encode(self, audio):
        mx.eval(self.codec.encode(mx.array(audio)[None, None]))

    def decode(self, codes):
        mx.eval(self.codec.decode(mx.array(codes)[None]))


class LlamaCpp:
    """ggml's quantized products: llama.cpp on two Llamas of the backbone's and the depth decoder's sizes.

    Nothing is sampled, and nothing goes from one to the other.
    """

    package = "llama_cpp"

    def __init__(self, config, codec, dtype, folder, quantize):
        import llama_cpp

        if mx.default_device() != mx.cpu or folder:
            raise ValueError("on a CPU with random weights alone")
        with tempfile.TemporaryDirectory() as work:
            files = [self.write(Path(work, f"{i}.gguf"), c, config.audio_vocab_size, quantize)
                     for i, c in enumerate((config.backbone, config.decoder))]  # fmt: skip
            options = {"n_ctx": 2048, "n_batch": 2048, "n_threads": mlx_cpu.n_threads(), "verbose": False}
            options |= {"n_threads_batch": options["n_threads"], "n_gpu_layers": 0, "use_mmap": False}
            self.backbone, self.decoder = (llama_cpp.Llama(str(file), **options) for file in files)
        self.n_codes = config.audio_num_codebooks

    @staticmethod
    def write(path, c, n_vocab, bits):
        """A Llama of these sizes in which every matrix is one quantized block, over and over."""
        import gguf

        kind = gguf.GGMLQuantizationType.Q8_0 if bits == 8 else gguf.GGMLQuantizationType.Q4_K
        n, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        block = np.random.default_rng(0).integers(0, 256, n_bytes).astype(np.uint8)
        block[:4] = np.frombuffer(np.array([0.001, 0.001], np.float16).tobytes(), np.uint8)  # its scales
        out = gguf.GGUFWriter(path, "llama")
        out.add_tokenizer_model("none")
        out.add_vocab_size(n_vocab)
        out.add_context_length(2048)
        out.add_embedding_length(c.dim)
        out.add_block_count(c.n_layers)
        out.add_feed_forward_length(c.ffn_dim)
        out.add_head_count(c.n_heads)
        out.add_head_count_kv(c.n_kv_heads)
        out.add_key_length(c.head_dim)
        out.add_value_length(c.head_dim)
        out.add_rope_dimension_count(c.head_dim)
        out.add_layer_norm_rms_eps(c.norm_eps)
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        shapes = {"token_embd": (n_vocab, c.dim), "output": (n_vocab, c.dim), "output_norm": (c.dim,)}
        for i in range(c.n_layers):
            layer = {"attn_norm": (c.dim,), "attn_q": (q, c.dim), "attn_k": (kv, c.dim), "attn_v": (kv, c.dim),
                     "attn_output": (c.dim, q), "ffn_norm": (c.dim,), "ffn_gate": (c.ffn_dim, c.dim),
                     "ffn_up": (c.ffn_dim, c.dim), "ffn_down": (c.dim, c.ffn_dim)}  # fmt: skip
            shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        for name, shape in shapes.items():
            if len(shape) == 1:
                out.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            else:
                out.add_tensor(f"{name}.weight", np.tile(block, (shape[0], shape[1] // n)), raw_dtype=kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return path

    def frames(self, batch, n_rows, n):
        if batch > 1:
            raise NotImplementedError("one utterance alone")
        self.backbone.reset()
        self.backbone.eval([1] * n_rows)
        for _ in range(n):
            self.decoder.reset()
            self.decoder.eval([1, 1])
            for _ in range(2, self.n_codes):
                self.decoder.eval([1])
            self.backbone.eval([1])


class Floor:
    """Nothing but the reading of a frame's weights, as products with one row."""

    def __init__(self, n_bytes, size=2**28):
        size = min(size, n_bytes)
        self.reads = n_bytes / size
        self.row, self.matrix = mx.ones((1, 4096)), mx.random.normal((size // 4 // 4096, 4096), key=mx.random.key(0))
        mx.eval(self.row, self.matrix)

    def frames(self, batch, n_rows, n):
        mx.eval([self.row @ self.matrix.T for _ in range(round(n * self.reads))])  # a GPU would wait after each


SYSTEMS = {
    "ours": Ours, "transformers": Transformers, "transformers-compiled": StaticTransformers,
    "transformers-int8": Int8Transformers, "csm-mlx": CsmMlx, "mlx-audio": MlxAudio, "llama.cpp": LlamaCpp,
}  # fmt: skip


def seconds(function, *args):
    begun = time.perf_counter()
    function(*args)
    return time.perf_counter() - begun


def frame_bytes(model):
    """Bytes of the weights that one frame reads: the backbone and the heads once, the depth decoder once a codebook."""

    def size(*modules):
        return sum(w.nbytes for module in modules for _, w in tree_flatten(module.parameters()))

    once = size(model.backbone, model.codebook0_head, *model.audio_head)
    return once + (model.config.audio_num_codebooks - 1) * size(model.decoder, model.projection)


def measures(args, config):
    """{name: function of a system -> seconds}"""
    n, rng = args.frames, np.random.default_rng(0)
    audio = (rng.standard_normal(int(args.seconds * 24_000)) * 0.1).astype(np.float32)
    codes = rng.integers(0, 256, (config.audio_num_codebooks, int(args.seconds * 12.5))).astype(np.int32)
    out = {}
    for batch in args.batch:  # what two more frames cost, and then n more
        out[f"frame, batch of {batch}"] = lambda s, b=batch: (
            (seconds(s.frames, b, PROMPT, 2 + n) - seconds(s.frames, b, PROMPT, 2)) / n
        )
    for rows in (r for r in args.prefill if r < config.backbone.max_positions):
        out[f"prompt of {rows} rows and a frame"] = lambda s, rows=rows: seconds(s.frames, 1, rows, 1)
    out["first audio"] = lambda s: seconds(s.first_audio)
    out["graph of a frame, not computed"] = lambda s: s.graph()
    out[f"Mimi encode, {args.seconds:g} s"] = lambda s: seconds(s.encode, audio)
    out[f"Mimi decode, {args.seconds:g} s"] = lambda s: seconds(s.decode, codes)
    out["Mimi decode, a streamed frame"] = lambda s: seconds(s.decode_steps, codes[:, :10]) / 10
    return out


def checkpoint(source, work):
    """`source` in the layouts that the systems read, under the folder `work`. Returns its sizes."""
    csm.load(source, dtype="float32").save(work / "ours")
    config, weights, _ = checkpoints.read_csm(work / "ours")
    codec_weights, codec_config = checkpoints.read_mimi(work / "ours/mimi.safetensors")
    files = csm_layouts.to_transformers(config, weights, codec_config, codec_weights)
    csm_layouts.write_folder(work / "transformers", files)
    codec = mimi.load(work / "ours").config
    return csm.CSMConfig.from_dict(mimi.read_json(work / "ours/config.json")), codec


def run(args, config, codec, folder=None):
    """{measure: {system: seconds, or why not}}; the floor takes its turns among the systems."""
    dtype, systems, table = csm.as_dtype(args.dtype), {}, {}
    made = table["load" if folder else "made, with random weights"] = {}
    kinds = {name: (SYSTEMS[name], {}) for name in args.only if name != "llama.cpp"}
    for name in ("ours", "llama.cpp"):
        for bits in args.quantize if name in args.only else ():
            kinds[f"{name}, {bits} bits"] = SYSTEMS[name], {"quantize": bits}
    for name, (kind, options) in kinds.items():
        try:
            if not name.startswith("ours") and importlib.util.find_spec(kind.package) is None:
                raise ImportError("not installed")
            begun = time.perf_counter()
            systems[name] = kind(config, codec, dtype, folder, **options)
            made[name] = time.perf_counter() - begun
        except Exception as e:  # a peer may lack anything
            if name.startswith("ours"):
                raise
            made[name] = (str(e).splitlines() or [type(e).__name__])[0]
        print(f"{name}: {made[name]}", file=sys.stderr, flush=True)
    if "ours" in kinds:
        for name in [name for name in systems if name.startswith("ours")]:
            systems[name.replace("ours", "floor")] = Floor(frame_bytes(systems[name].generator.model))
    for measure, function in measures(args, config).items():
        times = {name: [] for name in systems}
        for turn in range(args.rounds + 1):  # the first warms up
            for name, system in systems.items():
                if times[name] is None:
                    continue
                try:
                    taken = function(system)
                    if turn:
                        times[name].append(taken)
                except Exception as e:
                    if name.startswith("ours"):
                        raise
                    if not isinstance(e, AttributeError):  # which one that lacks the measure has
                        print(f"{name}, {measure}: {e}", file=sys.stderr, flush=True)
                    times[name] = None
        table[measure] = {name: statistics.median(t) if t else None for name, t in times.items()}
        print(measure, {k: v and round(v, 4) for k, v in table[measure].items()}, file=sys.stderr, flush=True)
        gc.collect()
    return table


def markdown(table, names):
    lines = ["| seconds | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for measure, row in table.items():
        cells = [row.get(n) for n in names]
        cells = ["" if c is None else c if isinstance(c, str) else f"{c:.3g}" for c in cells]
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(table, names, path, title):
    """Seconds a frame as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {m: r for m, r in table.items() if m.startswith("frame")}
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for i, name in enumerate(names):
        heights = [r.get(name) if isinstance(r.get(name), float) else 0 for r in rows.values()]
        axes.bar(np.arange(len(rows)) + 0.8 * i / len(names), heights, 0.8 / len(names), label=name)
    axes.set_xticks(np.arange(len(rows)) + 0.4 - 0.4 / len(names), rows)
    axes.set_ylabel("seconds a frame (0.08 s of sound each)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--doctor" in argv:
        from csm_tools import doctor

        return doctor.main([arg for arg in argv if arg != "--doctor"])
    p = command.parser_for("bench", description="Speed of ours and of installed peers, side by side.")
    p.add_argument("--doctor", action="store_true", help="check the results instead: see csm_tools.doctor --help")
    p.add_argument("--tiny", action="store_true", help="small random models: a minute")
    p.add_argument("--checkpoint", help="a folder in any layout, in place of random weights")
    p.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="systems")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what suits the device")
    p.add_argument("--quantize", nargs="*", type=int, choices=(4, 8), default=[], help="ours with these bits too")
    p.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    p.add_argument("--prefill", nargs="*", type=int, default=[32, 256, 1024], metavar="ROWS")
    p.add_argument("--frames", type=int, default=6, help="timed in one go")
    p.add_argument("--seconds", type=float, default=10, help="of audio through Mimi")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", type=Path)
    p.add_argument("--png", type=Path)
    return command.run(p, program, p.parse_args(argv), "interrupted: nothing was written")


def program(args):
    for file in filter(None, (args.json, args.png)):  # before an hour of measuring
        if not file.absolute().parent.is_dir():
            raise ValueError(f"cannot write {file}: no such folder")
    logging.getLogger("csm").setLevel(logging.ERROR)  # not that each speech was cut off, as it is meant to be
    mlx_cpu.wait()  # for what it compiles in the background
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) if args.checkpoint else None
        config, codec = (SMALL, SMALL_MIMI) if args.tiny else (csm.CSMConfig(), mimi.MimiConfig())
        if folder:
            config, codec = checkpoint(args.checkpoint, folder)
        table = run(args, config, codec, folder)
    packages = {n: version(n) for n in ("mlx", "torch", "transformers", "csm-mlx", "mlx-audio", "llama-cpp-python")}
    about = {"machine": platform.platform(), "device": str(mx.default_device()), "dtype": str(csm.as_dtype(args.dtype)),
             "quantize": args.quantize, "packages": packages, "peak_memory": command.peak_memory()}  # fmt: skip
    made, *rows = table.values()
    names = [*made, *(name for name in rows[0] if name.startswith("floor"))]
    print(markdown(table, names))
    print(f"\n{about['device']}, {about['dtype']}, peak memory of all together {about['peak_memory'] / 1e9:.1f} GB")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "seconds": table}, indent=2) + "\n")
    if args.png:
        sizes = args.checkpoint or ("a small model" if args.tiny else "CSM-1B's sizes")
        dtype, device = about["dtype"].removeprefix("mlx.core."), mx.default_device().type.name.upper()
        title = f"Time of a frame, and of only reading its weights (floor)\n{sizes}, {dtype}, {device}"
        chart(table, names, args.png, title)


if __name__ == "__main__":
    sys.exit(main())
