"""Fine-tune CSM: LoRA or all weights, on one machine or several.

    python finetune.py dataset clips/ data.json                      # folders of 001_speaker0_hello.wav + .txt -> JSON
    python finetune.py train --data-path data.json --output-dir run --lora-rank 8
    python csm.py "In the new voice." out.wav --adapter run
    python finetune.py fuse run my-csm                               # a folder with the adapter in its weights
    mlx.launch -n 2 finetune.py train ...                            # several processes or machines, one result

The data is csm-mlx's: a list of conversations, each a list of {"text", "audio_path", "speaker"}. A conversation is one
sequence; of every frame of its speech, the frame of zeros at the end included, codebook 0 is learned, and codebooks 1..
of a random fraction of the frames alone (--depth-fraction), which is what makes it affordable: Sesame's amortization.
With all frames the gradient is that of transformers' CsmForConditionalGeneration.

A run continues where it stopped, to the very weights that it would have reached: the order of the data and every random
choice come from the seed and the number of the step, and a checkpoint is one file that is put in place whole.
Shapes: B batch, T positions, N frames, K codebooks, D hidden size.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import convert
import csm  # before mlx: it puts a fast BLAS in place
import mimi

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

TARGETS = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("codebook0_head", "audio_head"),
}
OPTIMIZERS = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}
AUDIO = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus", ".aiff")


def read_folder(folder):
    """FOLDER/conversation/001_speaker0_hello.wav with .txt beside it -> conversations as the JSON has them."""
    talks, clips = {}, [p for p in Path(folder).resolve().glob("*/*") if p.suffix.lower() in AUDIO]
    clips.sort(key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(p).lower())])  # 2 before 10
    for clip in clips:
        speaker, text = re.search(r"speaker_?(\d+)", clip.stem), clip.with_suffix(".txt")
        if not speaker or not text.is_file():
            raise ValueError(f"{clip}: no {'.txt beside it' if speaker else 'speaker0, speaker1 ... in its name'}")
        words = text.read_text(encoding="utf-8").strip()
        talks.setdefault(clip.parent, []).append({"text": words, "audio_path": str(clip), "speaker": int(speaker[1])})
    if not talks:
        raise ValueError(f"{folder} has no folders of clips")
    return list(talks.values())


def read_data(path):
    """A JSON file or a folder -> [[Segment]], their audio as paths. Raises ValueError."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    try:
        talks = read_folder(path) if path.is_dir() else json.loads(path.read_text(encoding="utf-8"))
        out = []
        for talk in talks:
            speakers = [int(t["speaker"] if "speaker" in t else t["speaker_id"]) for t in talk]
            files = [path.parent / Path(t["audio_path"]).expanduser() for t in talk]
            out.append([csm.Segment(s, t["text"], f) for s, t, f in zip(speakers, talk, files)])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        expected = '[[{"text": "...", "audio_path": "a.wav", "speaker": 0}, ...], ...]'
        raise ValueError(f"{path}: expected {expected} ({type(e).__name__}: {e})") from None
    if not out:
        raise ValueError(f"{path} holds no conversations")
    return out


class Talk:
    """A conversation as rows (T, K + 1), and the indices of those that are learned: the frames of its speech."""

    def __init__(self, generator, segments, masked=()):
        rows, learned = [], []
        for s in segments:
            text, audio = generator.text_rows(s.text, s.speaker), generator.audio_rows(s)
            start = sum(map(len, rows)) + len(text)
            if s.speaker not in masked:
                learned += range(start, start + len(audio))
            rows += [text, audio]
        self.rows, self.learned = np.concatenate(rows), np.array(learned, np.int32)


def encode(generator, conversations, args):
    """[[Segment]] -> [Talk]. Codes are kept in OUTPUT/codes by what a file holds; bad files stop it or are skipped."""
    place, talks = args.output_dir / "codes", []
    place.mkdir(parents=True, exist_ok=True)
    n_frames, limit = generator._max_frames(args.max_audio_length_ms), generator.limit
    for segments in conversations:
        try:
            for s in segments:
                if not s.audio.is_file():
                    raise ValueError(f"no such file: {s.audio}")
                kept = place / f"{hashlib.sha256(s.audio.read_bytes()).hexdigest()[:32]}.npy"
                if not kept.exists():
                    with mimi.replacing(kept) as file:
                        np.save(file, generator.encode(s).codes)
                s.codes = np.load(kept)
                if not 0 < len(s.codes) <= n_frames:
                    raise ValueError(f"{s.audio}: {len(s.codes) * 80} ms, and at most {n_frames * 80} are wanted")
            talk = Talk(generator, segments, args.mask_speaker_ids)
            if len(talk.rows) > limit:
                raise ValueError(f"{segments[0].audio} ...: {len(talk.rows)} positions, and the model has {limit}")
            talks += [talk] if len(talk.learned) else []
        except ValueError as e:
            if not args.skip_bad:
                raise ValueError(f"{e} (--skip-bad leaves such conversations out)") from None
            print(f"skipped: {e}", file=sys.stderr)
    if not talks:
        raise ValueError("nothing is left to learn from")
    return talks


def sums(model, rows, first, some):
    """Cross-entropy (2,), summed: of codebook 0 in the rows `first`, and of the others in the rows `some`.

    rows (B, T, K + 1); first, some: indices into the B * T rows, each predicted from the row before it.
    """
    K = model.config.audio_num_codebooks
    h = model(mx.maximum(rows, 0), csm.row_mask(rows))
    h, codes = h.reshape(-1, h.shape[-1]), rows.reshape(-1, K + 1)[:, :K]
    logits = model.head(0, h[first - 1]), model.depth_logits(h[some - 1], codes[some])
    aims = codes[first, 0], codes[some, 1:]
    entropy = nn.losses.cross_entropy
    return mx.stack([entropy(x.astype(mx.float32), y, reduction="sum") for x, y in zip(logits, aims)])


def collate(talks, chosen):
    """Talks and the rows of each whose codebooks 1.. are learned -> rows (B, T, K + 1), first (N,), some (N',)."""
    T = max(len(t.rows) for t in talks)
    rows = [np.pad(t.rows, [(0, T - len(t.rows)), (0, 0)]) for t in talks]  # causal: padding behind changes nothing
    first = [t.learned + b * T for b, t in enumerate(talks)]
    some = [c + b * T for b, c in enumerate(chosen)]
    return mx.array(np.stack(rows)), mx.array(np.concatenate(first)), mx.array(np.concatenate(some))


def choose(talk, fraction, *seed):
    """A random fraction of a Talk's frames, one at least."""
    n = max(1, round(fraction * len(talk.learned)))
    return np.sort(np.random.default_rng(seed).choice(talk.learned, n, replace=False))


class LoRALinear(nn.Module):
    """linear(x) + alpha / rank * dropout(x) a b. a (in, rank) is random at first, b (rank, out) zero."""

    def __init__(self, linear, n_in, rank, alpha, dropout, key):
        super().__init__()
        self.linear = linear
        self.lora_a = mx.random.uniform(-1, 1, (n_in, rank), key=key) / math.sqrt(n_in)
        self.lora_b = mx.zeros((rank, len(linear.weight)))
        self._scale, self._dropout, self._key = alpha / rank, dropout, None

    def __call__(self, x):
        z = x
        if self._dropout and self._key is not None:  # training
            z = x * mx.random.bernoulli(1 - self._dropout, x.shape, key=self._key) / (1 - self._dropout)
        return self.linear(x) + (self._scale * (z @ self.lora_a @ self.lora_b)).astype(x.dtype)


def add_lora(model, args):
    """Freeze the model and put a LoRALinear around each target; returns them."""
    names = {n for target in args.target_modules for n in TARGETS.get(target, (target,))}
    model.freeze()
    found, key = [], mx.random.key(args.seed)
    bits = (model.config.quantization or {}).get("bits")
    for name, module in model.named_modules():
        if isinstance(module, csm.Linear) and names & set(name.split(".")) and not frozen(name, args):
            key, own = mx.random.split(key)
            n_in = module.weight.shape[1] * (32 // bits if "scales" in module else 1)
            found.append((name, LoRALinear(module, n_in, args.lora_rank, args.lora_alpha, args.lora_dropout, own)))
    if not found:
        raise ValueError(f"no module is called {' or '.join(sorted(names))}; known sets: {', '.join(TARGETS)}")
    model.update_modules(tree_unflatten(found))
    if args.train_embeddings:
        for part in (model.text_embeddings, model.audio_embeddings):
            part.unfreeze()
    return [module for _, module in found]


def frozen(name, args):
    return (args.freeze_backbone and name.startswith(("backbone.", "codebook0_head", "text_embeddings"))) or (
        args.freeze_decoder and name.startswith(("decoder.", "projection", "audio_head"))
    )


class CheckpointedLayer(csm.Layer):
    """A layer whose activations are computed again on the way back, in place of being kept."""

    def __call__(self, x, *rest):
        return nn.utils.checkpoint(self, lambda x: csm.Layer.__call__(self, x, *rest))(x)


class Run:
    """A model, its optimizer and where they are in the data; `step` is one update."""

    def __init__(self, generator, talks, test, args):
        self.model, self.talks, self.test, self.args = generator.model, talks, test, args
        self.group = mx.distributed.init()
        self.loras = add_lora(self.model, args) if args.lora_rank else []
        if not self.loras:
            self.model.unfreeze()
            for name, module in self.model.named_modules():
                if frozen(f"{name}.", args):
                    module.freeze()
        if not tree_flatten(self.model.trainable_parameters()):
            raise ValueError("everything is frozen: nothing to learn")
        if args.gradient_ckpt:
            for layer in [*self.model.backbone.layers, *self.model.decoder.layers]:
                layer.__class__ = CheckpointedLayer
        decay = {"weight_decay": args.weight_decay} if args.optimizer != "adam" else {}
        self.optimizer = OPTIMIZERS[args.optimizer](learning_rate=args.learning_rate, **decay)
        self.optimizer.init(self.model.trainable_parameters())
        self.n, self.best = 0, None  # updates made; the best loss on the test data, and when
        self.batch = args.batch_size * args.gradient_accumulation_steps * self.group.size()
        self.per_epoch = math.ceil(len(talks) / self.batch)
        self.total = args.epochs * self.per_epoch
        self.gradient = nn.value_and_grad(self.model, self.loss)

    def loss(self, model, rows, first, some, weights):
        zero, rest = losses = sums(model, rows, first, some) * weights
        return self.args.first_codebook_weight_multiplier * zero + rest, losses

    def rate(self):
        """The learning rate of this step: warm-up, then half a cosine, if asked for."""
        warm = min(1, (self.n + 1) / max(1, self.args.warmup_steps))
        done = max(0, self.n - self.args.warmup_steps) / max(1, self.total - self.args.warmup_steps)
        return self.args.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done) if self.args.cosine else 1)

    def step(self):
        """One update: returns the loss of codebook 0, of the others, and the frames learned."""
        epoch, i = divmod(self.n, self.per_epoch)
        order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.talks))
        batch = [int(t) for t in order[i * self.batch : (i + 1) * self.batch]]
        chosen = {t: choose(self.talks[t], self.args.depth_fraction, self.args.seed, self.n, t) for t in batch}
        # Every process knows the whole batch, so each can weigh its own part as a part of the mean over all.
        n_first, n_some = sum(len(self.talks[t].learned) for t in batch), sum(map(len, chosen.values()))
        mimi.use_threads(for_small=False)
        size, K = self.group.size(), self.model.config.audio_num_codebooks
        weights = mx.array([size / n_first, size / (n_some * (K - 1))])
        for j, lora in enumerate(self.loras):
            lora._key = mx.random.key(hash((self.args.seed, self.n, j)) % 2**63)
        mine, total, losses = batch[self.group.rank() :: size], None, mx.zeros((2,))
        for j in range(0, len(mine), self.args.batch_size):
            part = mine[j : j + self.args.batch_size]
            rows, first, some = collate([self.talks[t] for t in part], [chosen[t] for t in part])
            (_, more), gradient = self.gradient(self.model, rows, first, some, weights)
            total, losses = tree_map(mx.add, total, gradient) if total else gradient, losses + more
            mx.eval(total, losses)
        if total is None:  # fewer talks than processes in the last batch of an epoch
            total = tree_map(mx.zeros_like, self.model.trainable_parameters())
        total = nn.average_gradients(total, self.group)
        losses = mx.distributed.all_sum(losses, group=self.group) / size
        if self.args.max_norm:
            total, _ = optim.clip_grad_norm(total, self.args.max_norm)
        self.optimizer.learning_rate = self.rate()
        self.optimizer.update(self.model, total)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, losses)
        self.n += 1
        return *losses.tolist(), n_first

    def evaluate(self):
        """The loss on the test data, all frames of it."""
        total = mx.zeros((2,))
        for lora in self.loras:
            lora._key = None
        n = sum(len(t.learned) for t in self.test)
        weights = mx.array([1 / n, 1 / (n * (self.model.config.audio_num_codebooks - 1))])
        for t in self.test:
            rows, first, some = collate([t], [t.learned])
            total = total + self.loss(self.model, rows, first, some, weights)[1]
            mx.eval(total)
        return total.sum().item()

    def save(self):
        """OUTPUT/checkpoint.safetensors: trained weights, optimizer and where the run is; put in place whole."""
        arrays = dict(tree_flatten({"model": self.model.trainable_parameters(), "optimizer": self.optimizer.state}))
        where = json.dumps({"step": self.n, "best": self.best, "settings": settings(self.args, self.group)})
        save(self.args.output_dir / "checkpoint.safetensors", arrays, {"run": where})

    def resume(self):
        """Go on from OUTPUT's checkpoint, if there is one."""
        file = self.args.output_dir / "checkpoint.safetensors"
        if not file.exists():
            return
        arrays, metadata = mimi.read_safetensors(file)
        where = json.loads(metadata["run"])
        then = where["settings"]
        if other := [k for k, now in settings(self.args, self.group).items() if now != then.get(k)]:
            raise ValueError(f"{file} is of another {', '.join(other)}: give the same, or another --output-dir")
        held = tree_unflatten(list(arrays.items()))
        self.model.update(held["model"])
        self.optimizer.state = held["optimizer"]
        self.n, self.best = where["step"], where["best"]
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)

    def write(self, folder):
        """The result: adapters.safetensors and adapter_config.json, or model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(tree_flatten(self.model.trainable_parameters() if self.loras else self.model.parameters()))
        if not self.loras:
            save(folder / "model.safetensors", csm.join_heads(weights))
            return
        config = {name: getattr(self.args, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
        config |= {"model": str(self.args.model), "target_modules": self.args.target_modules}
        with mimi.replacing(folder / "adapter_config.json") as file:
            file.write(json.dumps(config, indent=2).encode())
        save(folder / "adapters.safetensors", weights)


def settings(args, group):
    """What must be the same for a run to go on."""
    other = ("output_dir", "ckpt_freq", "log_freq", "command", "epochs" if not args.cosine else "")
    shared = {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in vars(args).items()}
    shared["batch_size"] *= group.size()  # however it is spread
    return {k: v for k, v in shared.items() if k not in other}


def save(path, arrays, metadata=None):
    """A .safetensors file, put in place whole, after it is on the disk."""
    with mimi.replacing(path) as file:
        mx.save_safetensors(file, arrays, {"format": "mlx", **(metadata or {})})
        file.flush()
        os.fsync(file.fileno())


def train(args):
    generator = csm.load(args.model, dtype=args.dtype, quantize=args.quantize)
    talks = encode(generator, read_data(args.data_path), args)
    order = np.random.default_rng([args.seed, 1]).permutation(len(talks))
    n_test = max(1, round(args.validation * len(talks))) if args.validation else 0
    if n_test >= len(talks):
        raise ValueError(f"{len(talks)} conversations cannot be split in training and validation")
    test, talks = ([talks[i] for i in part] for part in (order[:n_test], order[n_test:]))
    run = Run(generator, talks, test, args)
    run.resume()
    first = run.group.rank() == 0
    n_trained = sum(w.size for _, w in tree_flatten(run.model.trainable_parameters()))
    if first:
        print(f"{len(talks)} conversations, {run.total} steps, {n_trained / 1e6:.2f} million weights", file=sys.stderr)
    log_file = args.output_dir / "log.jsonl"
    rows = map(json.loads, log_file.read_text().splitlines() if log_file.exists() else [])
    rows = [row for row in rows if row["step"] <= run.n]  # what followed the checkpoint is made again
    begun, since = time.perf_counter(), 0
    with tqdm(total=run.total, initial=run.n, unit="step", disable=None if first else True) as bar:
        while run.n < run.total:
            zero, rest, frames = run.step()
            since += frames
            row = {"step": run.n, "first": zero, "rest": rest, "loss": zero + rest, "rate": run.rate()}
            if not math.isfinite(row["loss"]):
                raise ValueError(f"the loss is {row['loss']} at step {run.n}: try a lower --learning-rate")
            last = run.n == run.total
            row["frames_per_second"] = round(since / (time.perf_counter() - begun), 2)
            if test and (last or run.n % run.per_epoch == 0):
                row["test"] = run.evaluate()
                if run.best is None or row["test"] < run.best[0]:
                    run.best = [row["test"], run.n]
                    if first:
                        run.write(args.output_dir / "best")
            rows.append(row)
            bar.update(1)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['frames_per_second']:.1f} frames/s")
            if first and (last or run.n % args.ckpt_freq == 0):
                run.save()
            if first and (last or run.n % args.log_freq == 0 or run.n % args.ckpt_freq == 0):
                with mimi.replacing(log_file) as file:
                    file.write("".join(json.dumps(r) + "\n" for r in rows).encode())
    if first:
        run.write(args.output_dir)
        chart(rows, args.output_dir / "loss.png")
        print(f"loss {rows[-1]['loss']:.4f} after {run.n} steps; {args.output_dir} holds the result", file=sys.stderr)


def chart(rows, path):
    """The curves, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(8, 4), layout="constrained").subplots()
    for name, label in (("first", "codebook 0"), ("rest", "the others"), ("test", "both, test")):
        if points := [(r["step"], r[name]) for r in rows if name in r]:
            axes.plot(*zip(*points), label=label)
    axes.set(xlabel="step", ylabel="cross-entropy")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def fuse(args):
    """A model folder with what was trained in its weights."""
    config = mimi.read_json(args.run / "adapter_config.json")
    base = args.model or config.get("model") or "csm-1b"

    def fused(weights):
        if not config:
            trained = mimi.read_safetensors(args.run / "model.safetensors")[0]
            if any(trained.get(k, mx.array(0)).shape != w.shape for k, w in weights.items()):
                raise ValueError(f"{args.run} was trained from another model than {base}")
            return {k: trained[k].astype(w.dtype) for k, w in weights.items()}
        changed = csm.apply_adapter(csm.split_heads(weights), args.run)
        return csm.join_heads(changed) if "audio_head" in weights else changed

    fused(convert.read(csm.locate(base))[1])  # what does not fit is said before anything is written
    convert.convert(base, args.destination)
    file = args.destination / "model.safetensors"
    save(file, fused(mimi.read_safetensors(file)[0]))
    print(f"{args.destination}: {base} with {args.run}")


def main(argv=None):
    p = argparse.ArgumentParser(prog="finetune.py", description="Fine-tune CSM with LoRA, or all of it.")
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="train on conversations")
    t.add_argument("--data-path", type=Path, required=True, help="JSON, or a folder of folders of clips")
    t.add_argument("--output-dir", type=Path, required=True)
    t.add_argument("--model", "--pretrained-path", default="csm-1b", help="as csm.py has it")
    t.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what suits the device")
    t.add_argument("--quantize", type=int, choices=(4, 8), help="bits of the frozen weights under LoRA")
    t.add_argument("--epochs", type=int, default=10)
    t.add_argument("--batch-size", type=int, default=4, help="conversations at once, in each process")
    t.add_argument("--gradient-accumulation-steps", type=int, default=1)
    t.add_argument("--learning-rate", "--lr", type=float, help="default: 5e-4 with LoRA, 1e-5 without")
    t.add_argument("--warmup-steps", type=int, default=0)
    t.add_argument("--cosine", action="store_true", help="let the learning rate fall to 0 as half a cosine")
    t.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    t.add_argument("--weight-decay", "--wd", type=float, default=1e-4)
    t.add_argument("--max-norm", type=float, default=1.0, help="of the gradient; 0: not clipped")
    t.add_argument("--lora-rank", type=int, default=0, help="0 (default): train all weights")
    t.add_argument("--lora-alpha", type=float, default=16.0)
    t.add_argument("--lora-dropout", type=float, default=0.0)
    t.add_argument("--target-modules", nargs="+", default=["attn", "mlp"], help="attn, mlp, projection, head or names")
    t.add_argument("--train-embeddings", action="store_true", help="with LoRA: the embeddings too, as they are")
    t.add_argument("--freeze-backbone", action="store_true")
    t.add_argument("--freeze-decoder", action="store_true")
    t.add_argument("--depth-fraction", type=float, default=1 / 16, help="of the frames whose codebooks 1.. are learned")
    t.add_argument("--first-codebook-weight-multiplier", type=float, default=1.0)
    t.add_argument("--mask-speaker-ids", type=lambda s: [int(x) for x in s.split(",")], default=[], metavar="IDS")
    t.add_argument("--max-audio-length-ms", type=float, default=90_000, help="longer clips are bad ones")
    t.add_argument("--skip-bad", action="store_true", help="leave bad conversations out, in place of stopping")
    t.add_argument("--validation", type=float, default=0.0, help="fraction kept for a test after each epoch")
    t.add_argument("--gradient-ckpt", action="store_true", help="less memory, more time")
    t.add_argument("--ckpt-freq", type=int, default=100, help="steps between checkpoints")
    t.add_argument("--log-freq", type=int, default=10)
    t.add_argument("--seed", type=int, default=0)
    f = commands.add_parser("fuse", help="write a model folder with what was trained")
    f.add_argument("run", type=Path)
    f.add_argument("destination", type=Path)
    f.add_argument("--model", help="what was trained, if it is elsewhere now")
    d = commands.add_parser("dataset", aliases=["convert"], help="folders of clips -> JSON")
    d.add_argument("folder", type=Path)
    d.add_argument("out", type=Path)
    for parser in (p, t, f, d):
        parser.error = lambda message: p.exit(2, f"finetune.py: error: {message}\n")
    args = p.parse_args(argv)
    try:
        if args.command == "train":
            check(args)
            train(args)
        elif args.command == "fuse":
            fuse(args)
        else:
            talks = read_folder(args.folder)
            with mimi.replacing(args.out) as file:
                file.write(json.dumps(talks, indent=2, ensure_ascii=False).encode())
            print(f"{args.out}: {len(talks)} conversations")
    except (ValueError, OSError) as e:
        p.exit(2, f"finetune.py: error: {' '.join(str(e).split())}\n")
    except KeyboardInterrupt:
        p.exit(130, "interrupted: the same command goes on from the last checkpoint\n")


def check(args):
    args.learning_rate = args.learning_rate or (5e-4 if args.lora_rank else 1e-5)
    for name, good in (
        ("depth-fraction", 0 < args.depth_fraction <= 1), ("validation", 0 <= args.validation < 1),
        ("batch-size", args.batch_size > 0), ("gradient-accumulation-steps", args.gradient_accumulation_steps > 0),
        ("epochs", args.epochs > 0), ("lora-rank", args.lora_rank >= 0), ("lora-dropout", 0 <= args.lora_dropout < 1),
        ("ckpt-freq", args.ckpt_freq > 0), ("log-freq", args.log_freq > 0),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"--{name} cannot be {getattr(args, name.replace('-', '_'))}")
    if args.quantize and not args.lora_rank:
        raise ValueError("quantized weights cannot be trained: --quantize goes with --lora-rank")


if __name__ == "__main__":
    main()
