"""Fine-tune CSM: LoRA, DoRA or all weights, on examples or on preferences, on one machine or several.

    python -m csm_tools.finetune dataset clips/ data.json        # clips + .txt, metadata.csv, JSON lines ... -> JSON
    python -m csm_tools.finetune train --data-path data.json --output-dir run --lora-rank 8
    python csm.py "In the new voice." out.wav --adapter run
    python -m csm_tools.finetune fuse run my-csm                 # merge the adapter into a model folder
    python -m csm_tools.finetune pairs --texts texts.txt --out pairs          # a good and a bad reading of each line
    python -m csm_tools.finetune dpo --data-path pairs/pairs.json --output-dir run --lora-rank 8         # or kto
    mlx.launch -n 2 -m csm_tools.finetune train ...              # several processes or machines, one result

The data are conversations, lists of turns {"text", "audio_path", "speaker"}, in any form that tuning_data.read_items
reads. A conversation is one sequence without a voice prompt, so the trained model speaks without one. Codebook 0 is
learned in every frame of its speech, including the frame of zeros at the end. Codebooks 1.. are learned in a random
fraction of the frames (--depth-fraction), which makes training affordable: Sesame's compute amortization. With all
frames, the gradient of `train` equals that of transformers' CsmForConditionalGeneration.

Three losses share one loop. L is a conversation's cross-entropy, the mean over its frames and then over codebooks. Its
reward is r = beta (L before training - L), in nats per code, so that long speech weighs no more than short speech
(Meng et al. 2405.14734).
    train  L, where codebooks 1.. together weigh as much as codebook 0
    dpo    -log sigmoid(r of the chosen - r of the rejected)                              (Rafailov et al. 2305.18290)
    kto    w (1 - sigmoid(+-(r - KL))), + if the speech is wanted. KL = max(0, mean r of the texts paired with other
           speech), without gradient                                                      (Ethayarajh et al. 2402.01306)
--sft-weight adds a multiple of the chosen or wanted speech's L (Pang et al. 2404.19733), so that it stays likely.
L before training is computed once, frame by frame, and stored in the run's folder.

An interrupted run resumes and reaches the same weights: the order of the data and all randomness follow from the seed
and the step, and a checkpoint is one file, replaced atomically.
Shapes: B conversations, T positions, N frames, K codebooks, D hidden size.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import csm  # before mlx
import csm_batch
import csm_layouts
import mimi
from csm_tools import adapters, checkpoints, command, transcribe, tuning_data
from csm_tools.transcribe import word_errors
from csm_tools.tuning_data import choose, collate

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
RESULT = ("adapters.safetensors", "adapter_config.json", "model.safetensors", "config.json")  # files of Run.write
SAMPLE_TEXTS = ["How are you today?", "The boat came home before the rain."]  # spoken before and after training
LOST_WORDS = 0.25  # warn if the codec adds more word errors than this
MOST_HELD_OUT = 20  # conversations, without --validation
HEARS = 0.9  # least likeness_of; tiny's own voices have 0.93 to 0.98, voices that it loses 0.72 to 0.88
OPTIMIZERS = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}

# ---------------------------------------------------------------------------------------------------- losses


def frame_losses(model, rows, first, some):
    """Cross-entropy of codebook 0 in the rows `first` (N,), and summed over the others in the rows `some` (N',).

    rows (B, T, K + 1). first, some: indices into the B * T rows; the row before each predicts it.
    """
    K = model.config.audio_num_codebooks
    h = model(rows)
    h, codes = h.reshape(-1, h.shape[-1]), rows.reshape(-1, K + 1)[:, :K]
    logits = model.head(0, h[first - 1]), model.depth_logits(h[some - 1], codes[some])
    zero, rest = (nn.losses.cross_entropy(x.astype(mx.float32), y)
                  for x, y in zip(logits, (codes[first, 0], codes[some, 1:])))  # fmt: skip
    return zero, rest.sum(axis=1)


def talk_losses(model, rows, first, some, weights):
    """Sum frame_losses by conversation, times weights (B, 2). Returns (B, 2): codebook 0, the others."""
    B, T = rows.shape[:2]
    sums = [((at // T == mx.arange(B)[:, None]) * x).sum(axis=1)
            for at, x in zip((first, some), frame_losses(model, rows, first, some))]  # fmt: skip
    return mx.stack(sums, axis=1) * weights


def weighted(args, losses):
    """Losses (B, 2) of codebook 0 and of the others -> their weighted sum (B,)."""
    return args.first_codebook_weight_multiplier * losses[:, 0] + losses[:, 1]


def objective(args, losses, reference, wanted, kl):
    """The loss to minimize, by example, from talk_losses (B, 2) and `reference`, the same before training.

    wanted: 1 or -1 by example. kl: beta times the divergence.
    """
    if args.command == "train":
        return weighted(args, losses)
    r = args.beta * weighted(args, reference - losses)  # dpo: chosen and rejected alternate
    own = args.sft_weight * weighted(args, losses)
    if args.command == "dpo":
        return mx.logaddexp(0, r[1::2] - r[::2]) + own[::2]
    weight = mx.where(wanted > 0, args.desirable_weight, args.undesirable_weight)
    return weight * (1 - mx.sigmoid(wanted * (r - kl))) + mx.where(wanted > 0, own, 0)


# ---------------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """y = linear(x) + alpha / rank * dropout(x) a b. a (in, rank) starts random, b (rank, out) at zero.

    DoRA (Liu et al. 2402.09353): y * m / |row of the changed weight|. m (out,) starts at the unchanged rows' norms.
    """

    def __init__(self, linear, n_in, args, key):
        super().__init__()
        self.linear = linear
        self.lora_a = mx.random.uniform(-1, 1, (n_in, args.lora_rank), key=key) / math.sqrt(n_in)
        self.lora_b = mx.zeros((args.lora_rank, len(linear.weight)))
        self._scale, self._dropout, self._key = args.lora_alpha / args.lora_rank, args.lora_dropout, None
        if args.dora:
            self.lora_m = self._norms()

    def _norms(self):
        w = self.linear.weight
        if "scales" in self.linear:
            packing = csm.packing(self.linear, len(self.lora_a))
            parts = [self.linear[name] for name in ("scales", "biases") if name in self.linear]
            parts = [x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for x in parts]
            w = mx.dequantize(w, *parts, **packing)
        return mx.linalg.norm(w + self._scale * (self.lora_a @ self.lora_b).T, axis=1)

    def __call__(self, x):
        z = x
        if self._dropout and self._key is not None:  # training
            z = x * mx.random.bernoulli(1 - self._dropout, x.shape, key=self._key) / (1 - self._dropout)
        y = self.linear(x) + self._scale * (z @ self.lora_a @ self.lora_b)
        if "lora_m" in self:
            y = y * (self.lora_m / mx.stop_gradient(self._norms()))  # no gradient, as in the paper: cheaper, no worse
        return y.astype(x.dtype)


def add_lora(model, args):
    """Freeze the model and wrap each target in a LoRALinear. Returns these."""
    names = {n for target in args.target_modules for n in TARGETS.get(target, (target,))}
    model.freeze()
    found, key = [], mx.random.key(args.seed)
    plain = dict(csm.CSM(model.config).named_modules())  # never evaluated: only for shapes
    for name, module in model.named_modules():
        if isinstance(module, csm.Linear) and names & set(name.split(".")) and not frozen(name, args):
            key, own = mx.random.split(key)
            found.append((name, LoRALinear(module, plain[name].weight.shape[1], args, own)))
    if not found:
        raise ValueError(f"no module is called {' or '.join(sorted(names))}; sets of modules: {', '.join(TARGETS)}")
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
    """A layer that recomputes its activations in the backward pass instead of storing them."""

    def __call__(self, x, *rest):
        return nn.utils.checkpoint(self, lambda x: csm.Layer.__call__(self, x, *rest))(x)


# ---------------------------------------------------------------------------------------------------- training


class Run:
    """A model, its optimizer and the position in the data; `step` makes one update."""

    def __init__(self, generator, examples, test, args):
        self.model, self.examples, self.test, self.args = generator.model, examples, test, args
        self.config, self.beside = model_files(generator)
        self.group = mx.distributed.init()
        if not args.reference_free:
            self.remember()
        self.loras = add_lora(self.model, args) if args.lora_rank else []
        if not self.loras:
            self.model.unfreeze()
            for name, module in self.model.named_modules():
                if frozen(f"{name}.", args):
                    module.freeze()
        if not tree_flatten(self.model.trainable_parameters()):
            raise ValueError("all weights are frozen: nothing to train")
        if args.gradient_ckpt:
            for layer in [*self.model.backbone.layers, *self.model.decoder.layers]:
                layer.__class__ = CheckpointedLayer
        decay = {"weight_decay": args.weight_decay} if args.optimizer != "adam" else {}
        self.optimizer = OPTIMIZERS[args.optimizer](learning_rate=args.learning_rate, **decay)
        self.optimizer.init(self.model.trainable_parameters())
        self.n, self.best = 0, None  # steps made; [best loss on the test data, its step]
        self.kept = []  # steps whose folders --keep holds
        self.before = None  # the loss on the test data before training
        self.data = data_mark(examples + test)
        self.batch = args.batch_size * args.gradient_accumulation_steps * self.group.size()
        self.per_epoch = math.ceil(len(examples) / self.batch)
        self.total = args.epochs * self.per_epoch
        self.gradient = nn.value_and_grad(self.model, self.loss)

    def remember(self):
        """Set each Talk's `reference`. The processes share the work and store it in OUTPUT/reference.safetensors."""
        talks = [t for e in self.examples + self.test for t in [*e.talks, e.other] if t]
        rank, size = self.group.rank(), self.group.size()
        mark = hashlib.sha256()
        for _, w in tree_flatten(self.model.parameters()):
            mark.update(str(w.astype(mx.float32).abs().sum().item()).encode())
        for t in talks:
            mark.update(t.mark())
        file = self.args.output_dir / "reference.safetensors"
        kept, metadata = mimi.read_weights(file) if rank == 0 and file.exists() else ({}, {})
        fits = metadata.get("mark") == mark.hexdigest()
        ends = np.cumsum([len(t.learned) for t in talks])
        found = np.array(kept["losses"]) if fits else np.zeros((ends[-1], 2), np.float32)
        if not mx.distributed.all_sum(mx.array(int(fits)), group=self.group).item():
            for i in tqdm(range(rank, len(talks), size), desc="reference", disable=True if rank else None):
                losses = frame_losses(self.model, *collate([talks[i]], [talks[i].learned]))
                found[ends[i] - len(talks[i].learned) : ends[i]] = np.array(mx.stack(losses, axis=1))
        found = mx.distributed.all_sum(mx.array(found), group=self.group)
        if rank == 0 and not fits:
            save(file, {"losses": found}, {"mark": mark.hexdigest()})
        for t, part in zip(talks, np.split(np.array(found), ends[:-1])):
            t.reference = part

    def loss(self, model, rows, first, some, weights, scale, *more):
        losses = talk_losses(model, rows, first, some, weights)
        return scale * objective(self.args, losses, *more).sum(), losses

    def passes(self, talks, chosen, wanted, kl=0.0, key=None):
        """Run this process's share of a whole batch, --batch-size examples at a time.

        chosen: by talk, the rows whose codebooks 1.. count. wanted: by example, 1 or -1. key: compute the gradient,
        with this dropout. Returns the whole batch's talk_losses and reference (B, 2), and this process's gradient or
        None.
        """
        size, K, n = self.group.size(), self.model.config.audio_num_codebooks, len(talks) // len(wanted)
        counts = np.array([[len(t.learned), len(c)] for t, c in zip(talks, chosen)], np.float32)
        if self.args.command == "train":  # mean over the batch's frames
            weights, scale = np.broadcast_to(1 / counts.sum(axis=0) / [1, K - 1], counts.shape), size
        else:  # mean over a conversation's frames and codebooks
            weights, scale = 1 / (counts * K), size / len(wanted)
        reference = np.zeros((len(talks), 2), np.float32)
        for i, (t, c) in enumerate(zip(talks, chosen)):
            if t.reference is not None:
                reference[i] = t.reference[:, 0].sum(), t.reference[np.isin(t.learned, c), 1].sum()
        reference, weights, wanted = mx.array(reference * weights), mx.array(weights), mx.array(wanted)
        losses, total = mx.zeros((len(talks), 2)), None
        mine = range(self.group.rank(), len(wanted), size)
        for i in range(0, len(mine), self.args.batch_size):
            part = mine[i : i + self.args.batch_size]
            self.set_dropout(key, part[0])
            at = [e * n + j for e in part for j in range(n)]
            inputs = *collate([talks[t] for t in at], [chosen[t] for t in at]), weights[mx.array(at)], scale
            inputs += reference[mx.array(at)], wanted[mx.array(list(part))], kl
            if key is None:
                some = self.loss(self.model, *inputs)[1]
            else:
                (_, some), gradient = self.gradient(self.model, *inputs)
                total = tree_map(mx.add, total, gradient) if total else gradient
            losses[mx.array(at)] = some
            mx.eval(losses, total)
        self.set_dropout(None)
        return mx.distributed.all_sum(losses, group=self.group), reference, total

    def set_dropout(self, key, example=0):
        """Give each LoRA a key that depends on `key` and a part's first example, so that each part has its own."""
        for j, lora in enumerate(self.loras):
            seed = None if key is None else np.random.SeedSequence([*key, example, j]).generate_state(1, np.uint64)
            lora._key = None if seed is None else mx.random.key(int(seed[0]))

    def measure(self, examples, fraction, *seed, key=None):
        """A batch -> its row of the log, and this process's gradient if there is a `key`."""
        talks, wanted = [t for e in examples for t in e.talks], [e.wanted for e in examples]
        args, kl = self.args, mx.array(0.0)
        if args.command == "kto":
            others = [e.other for e in examples]
            chosen = [choose(t, fraction, *seed, i, 1) for i, t in enumerate(others)]
            losses, reference, _ = self.passes(others, chosen, wanted)
            kl = mx.maximum(0, args.beta * weighted(args, reference - losses).mean())
        chosen = [choose(t, fraction, *seed, i, 0) for i, t in enumerate(talks)]
        losses, reference, gradient = self.passes(talks, chosen, wanted, kl, key)
        if args.command == "train":
            first, rest = losses.sum(axis=0).tolist()
            return {"loss": first + rest, "first": first, "rest": rest}, gradient
        row = {"loss": objective(args, losses, reference, mx.array(wanted), kl).mean().item()}
        r = np.array(args.beta * weighted(args, reference - losses))
        if args.command == "dpo":
            good, bad = r[::2], r[1::2]
            right = good > bad
        else:
            good, bad = (r[np.array(wanted) == sign] for sign in (1, -1))
            right, row["kl"] = np.array(wanted) * (r - kl.item()) > 0, kl.item()
        row |= {"chosen": float(good.mean())} if len(good) else {}
        row |= {"rejected": float(bad.mean())} if len(bad) else {}
        if len(good) and len(bad):
            row["margin"] = row["chosen"] - row["rejected"]
        return row | {"accuracy": float(right.mean())}, gradient

    def rate(self):
        """The learning rate of this step: warm-up, then constant, or half a cosine with --cosine."""
        warm = min(1, (self.n + 1) / max(1, self.args.warmup_steps))
        done = max(0, self.n - self.args.warmup_steps) / max(1, self.total - self.args.warmup_steps)
        return self.args.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done) if self.args.cosine else 1)

    def step(self):
        """Make one update. Returns its row of the log and the number of frames learned."""
        rate = self.rate()
        epoch, i = divmod(self.n, self.per_epoch)
        order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.examples))
        # Every process has the whole batch, so each can weigh its part by the mean over all.
        batch = [self.examples[int(e)] for e in order[i * self.batch : (i + 1) * self.batch]]
        seed = self.args.seed, self.n
        row, total = self.measure(batch, self.args.depth_fraction, *seed, key=seed)
        if total is None:  # fewer examples than processes in the last batch of an epoch
            total = tree_map(mx.zeros_like, self.model.trainable_parameters())
        total = nn.average_gradients(total, self.group)
        if self.args.max_norm:
            total, _ = optim.clip_grad_norm(total, self.args.max_norm)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model, total)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.n += 1
        return row | {"rate": rate}, sum(len(t.learned) for e in batch for t in e.talks)

    def evaluate(self):
        """The log's entries for the test data, over all of its frames."""
        return {f"test_{k}": v for k, v in self.measure(self.test, 1)[0].items()}

    def save(self):
        """Write OUTPUT/checkpoint.safetensors atomically: trained weights, optimizer, the run's position."""
        arrays = dict(tree_flatten({"model": self.model.trainable_parameters(), "optimizer": self.optimizer.state}))
        old = []
        if self.args.keep:
            self.write(self.args.output_dir / f"step-{self.n}")
            self.kept = [n for n in self.kept if n != self.n] + [self.n]
            old, self.kept = self.kept[: -self.args.keep], self.kept[-self.args.keep :]
        where = {"step": self.n, "best": self.best, "kept": self.kept, "before": self.before}
        where["settings"] = self.settings()
        save(self.args.output_dir / "checkpoint.safetensors", arrays, {"run": json.dumps(where)})
        for n in old:
            self.remove(self.args.output_dir / f"step-{n}")

    def settings(self):
        """What must not change when a run resumes."""
        return settings(self.args, self.group) | {"data": self.data}

    def remove(self, folder):
        """Delete the files of `write` in a folder, and the folder if it is empty then."""
        for name in (*RESULT, *self.beside):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def resume(self):
        """Load OUTPUT's checkpoint, if there is one."""
        file = self.args.output_dir / "checkpoint.safetensors"
        if not file.exists():
            return
        arrays, metadata = mimi.read_weights(file)
        where = json.loads(metadata["run"])
        then = where["settings"]
        if other := [k for k, now in self.settings().items() if now != then.get(k)]:
            raise ValueError(f"{file} has a different {', '.join(other)}: use the same, or another --output-dir")
        held = tree_unflatten(list(arrays.items()))
        self.model.update(held["model"])
        self.optimizer.state = held["optimizer"]
        self.n, self.best, self.kept = where["step"], where["best"], where.get("kept", [])
        self.before = where.get("before")
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)

    def write(self, folder):
        """Write the result: adapters.safetensors and adapter_config.json, or a whole model folder."""
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.model.trainable_parameters() if self.loras else self.model.parameters()
        weights = dict(tree_flatten(trained))
        if self.loras:
            config = {name: getattr(self.args, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
            config |= {"target_modules": self.args.target_modules, "dora": self.args.dora}
            config |= {"model": base_from(self.args.model, folder), "use_default_voice_prompt": False}
            name, file = "adapter_config.json", "adapters.safetensors"
        else:
            for name, content in self.beside.items():
                if isinstance(content, tuple):
                    save(folder / name, *content)
                    continue
                with mimi.replacing(folder / name) as out:
                    out.write(content.read_bytes())
            weights, config = csm_layouts.join_heads(weights), self.config
            name, file = "config.json", "model.safetensors"
        save(folder / file, weights)
        with mimi.replacing(folder / name) as out:
            out.write(json.dumps(config, indent=2).encode())


def model_files(generator):
    """For Run.write: the config and the other files of a model folder, without weights and voices."""
    config = generator.config_json | asdict(generator.model.config)
    config |= {"model_type": "csm", "layout": "native", "use_default_voice_prompt": False}
    sound = dict(tree_flatten(generator.mimi.parameters()))
    files = csm_layouts.native_files(None, None, asdict(generator.mimi.config), sound)
    return config, files | checkpoints.tokenizer_files(generator)


def base_from(model, folder):
    """The base model to name in `folder`'s config: a name as it is, a path relative to the folder."""
    if model in ("csm-1b", "tiny") or not Path(model).exists():
        return str(model)
    return os.path.relpath(model, folder)


def data_mark(examples):
    """A hash of the training data."""
    mark = hashlib.sha256()
    for talk in (t for e in examples for t in e.talks):
        mark.update(talk.mark())
    return mark.hexdigest()[:16]


def settings(args, group):
    """The options that must not change when a run resumes."""
    other = ["output_dir", "codes", "codec_clips", "ckpt_freq", "log_freq", "keep", "sample_texts", "function"]
    other += [] if args.cosine else ["epochs"]
    shared = {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in vars(args).items()}
    shared["batch_size"] *= group.size()  # the number of processes may change
    return {k: v for k, v in shared.items() if k not in other}


def save(path, arrays, metadata=None):
    """Write a .safetensors file atomically, flushed to the disk."""
    with mimi.replacing(path) as file:
        mx.save_safetensors(file, arrays, {"format": "mlx", **(metadata or {})})
        file.flush()
        os.fsync(file.fileno())


def train(args):
    check(args)
    check_output(args)
    kind, speakers = args.command, {}
    data = tuning_data.read_data(args.data_path, kind, args.skip_bad, speakers)
    test = []
    if args.val_data_path:
        test = tuning_data.read_data(args.val_data_path, kind, args.skip_bad, speakers)
    log = args.output_dir / "log.jsonl"
    rows, texts = read_log(log), sample_texts(args)
    generator = csm.load(args.model, dtype=args.dtype, quantize=args.quantize)
    checkpoints.check_weights(generator, args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    examples = tuning_data.encode(generator, data, args)
    if args.val_data_path:
        test = tuning_data.encode(generator, test, args)
    else:
        examples, test = split(examples, args)
    if kind == "kto":
        tuning_data.mismatch(generator, examples + test, args)
    run = Run(generator, examples, test, args)
    run.resume()
    first = run.group.rank() == 0
    if first:
        say_speakers(speakers, args.output_dir)
        if run.n == 0 and args.codec_clips:
            warn_of_codec(generator, examples, args.codec_clips)
        n_trained = sum(w.size for _, w in tree_flatten(run.model.trainable_parameters()))
        held_out = f", {len(test)} held out" if test else ""
        numbers = f"{len(examples)} examples{held_out}, {run.total} steps, {n_trained / 1e6:.2f} million weights"
        print(numbers, file=sys.stderr)
    samples, speaker = args.output_dir / "samples", examples[0].talks[0].segments[-1].speaker
    if run.n == 0 and test:
        run.before = run.evaluate()["test_loss"]
    if first and run.n == 0:
        speak(generator, texts, samples / "step-0", args.seed, speaker)
    rows = [row for row in rows if row["step"] <= run.n]  # steps after the checkpoint are made again
    written = len(rows)
    if first:
        with mimi.replacing(log) as file:
            file.write("".join(json.dumps(r) + "\n" for r in rows).encode())
    begun, since = time.perf_counter(), 0
    with tqdm(total=run.total, initial=run.n, unit="step", disable=None if first else True) as bar:
        while run.n < run.total:
            row, frames = run.step()
            since += frames
            if not math.isfinite(row["loss"]):
                raise ValueError(f"the loss is {row['loss']} at step {run.n}: try a lower --learning-rate")
            last, speed = run.n == run.total, since / (time.perf_counter() - begun)
            row = {"step": run.n} | row | {"frames_per_second": round(speed, 2)}
            if last or run.n % run.per_epoch == 0:
                if test:
                    row |= run.evaluate()
                    if run.best is None or row["test_loss"] < run.best[0]:
                        run.best = [row["test_loss"], run.n]
                        if first:
                            run.write(args.output_dir / "best")
                if first and (last or args.sample_texts):
                    speak(generator, texts, samples / f"step-{run.n}", args.seed, speaker)
            rows.append(row)
            bar.update(1)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:.1f} frames/s")
            if first and (last or run.n % args.ckpt_freq == 0):
                run.save()
            if first and (last or run.n % args.log_freq == 0 or run.n % args.ckpt_freq == 0):
                with open(log, "a") as file:
                    file.write("".join(json.dumps(r) + "\n" for r in rows[written:]))
                written = len(rows)
            if first and (last or run.n % args.ckpt_freq == 0):
                chart(rows, run.before, args.output_dir / "log.png")
    if first:
        run.write(args.output_dir)
        print(f"loss {rows[-1]['loss']:.4f} after {run.n} steps: {args.output_dir} holds the result", file=sys.stderr)
        if test and run.before is not None:
            say_learned(run, rows[-1]["test_loss"])
        if texts:
            print(f"samples from before and after: {samples}", file=sys.stderr)


def split(examples, args):
    """Split the examples into (training, validation) by --validation."""
    if args.validation is None:
        n = min(MOST_HELD_OUT, len(examples) // 10)
    else:
        n = max(1, round(args.validation * len(examples))) if args.validation else 0
    if n >= len(examples):
        raise ValueError(f"{len(examples)} conversations cannot be split into training and validation")
    order = np.random.default_rng([args.seed, 1]).permutation(len(examples))
    test, rest = ([examples[i] for i in part] for part in (order[:n], order[n:]))
    return rest, test


def say_learned(run, after):
    """Print the held-out loss before and after training, and advice if it has not fallen."""
    best, at = run.best
    print(f"held out: loss {run.before:.4f} before training, {after:.4f} now", file=sys.stderr)
    if after >= run.before:
        advice = "try fewer --epochs, a lower --learning-rate, or more data"
        print(f"warning: it has learned nothing that helps with unseen clips: {advice}", file=sys.stderr)
    elif best < after:
        where = run.args.output_dir / "best"
        print(f"the loss was lowest at step {at} ({best:.4f}); {where} holds that model", file=sys.stderr)


def check_output(args):
    """Raise ValueError if the run would overwrite the model that it trains, or files that it did not write."""
    out, base = args.output_dir, Path(args.model)
    if base.exists() and same_place(base if base.is_dir() else base.parent, out):
        raise ValueError(f"--output-dir {out} is the folder of the model itself: give another")
    kept = [name for name in RESULT if (out / name).exists()]
    if kept and not (out / "checkpoint.safetensors").exists():
        raise ValueError(f"{out} holds a {kept[0]} but no run's checkpoint: give another --output-dir")


def same_place(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


def read_log(file):
    """The rows of a run's log, without a half-written last line. Raises ValueError if the file is no such log."""
    try:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if all(isinstance(row["step"], int) and "loss" in row for row in rows):
            return rows
    except (ValueError, TypeError, KeyError, OSError):
        pass
    raise ValueError(f"{file} is not the log of a run: give another --output-dir")


def sample_texts(args):
    """The texts to speak before and after training, or after each epoch."""
    if args.sample_texts is None:
        return SAMPLE_TEXTS
    if args.sample_texts == "none":
        return []
    return [line for line in command.read_text(f"@{args.sample_texts}").splitlines() if line.strip()]


def say_speakers(speakers, folder):
    """Print the numbers given to the speakers' names, and write them to FOLDER/speakers.json."""
    if speakers:
        command.say_speakers(speakers)
        with mimi.replacing(folder / "speakers.json") as file:
            file.write(json.dumps(speakers, indent=2, ensure_ascii=False).encode())


def warn_of_codec(generator, examples, n):
    """Send n of the clips through the codec, and warn if it loses their sound or their words."""
    said = [s for e in examples for t in e.talks for s in t.segments if s.audio]
    some = [
        (s.text, mimi.read_audio(s.audio, generator.sample_rate)[:240_000]) for s in said[:: max(1, len(said) // n)][:n]
    ]
    if not some:
        return
    pairs = [(text, sound, through_codec(generator, sound)) for text, sound in some]
    likeness = float(np.median([likeness_of(sound, back) for _, sound, back in pairs]))
    lost = []
    if likeness < HEARS:
        lost.append(f"spectra correlate by {likeness:.2f}; {HEARS:g} or more is good")
    if package := transcribe.package():
        print(f"transcribing {len(some)} clips before and after the codec with {package}", file=sys.stderr)
    if found := words_wrong(pairs):
        before, after = found
        if after > before + LOST_WORDS:
            lost.append(f"a recogniser gets {before:.0%} of the words wrong in the clips, {after:.0%} after the codec")
    if lost:
        print(
            f"warning: the model's codec loses much of these voices ({len(some)} clips: {'; '.join(lost)}). Training "
            "cannot teach what the codec loses, and may make the model speak worse. Instead, give a clip as --voice or "
            "--ref-audio (docs/fine-tuning.md)",
            file=sys.stderr,
        )


def through_codec(generator, samples):
    """Encode and decode a sound (samples,)."""
    codes = generator.mimi.encode(mx.array(samples)[None, None])
    return np.array(generator.mimi.decode(codes)[0, 0])[: len(samples)]


def words_wrong(pairs):
    """[(text, sound, sound after the codec)] -> the word error rates of both sounds; None without a recogniser."""
    errors, n = np.zeros(2), 0
    for text, *sounds in pairs:
        heard = [words(hear(sound)) for sound in sounds]
        if not heard[0]:  # no recogniser, or it does not hear these clips
            break
        errors += [word_errors(words(text), one) for one in heard]
        n += len(words(text))
    return tuple(errors / n) if n else None


def hear(samples):
    """Transcribe (samples,) at 24 kHz; "" if nothing is heard or no recogniser is installed."""
    try:
        return transcribe.transcribe(samples)
    except ValueError:
        return ""


def words(text):
    return re.findall(r"[\w']+", text.lower())


def likeness_of(samples, back):
    """The correlation of a sound's spectrogram with that after the codec, at the best delay up to 200 ms."""
    before, after = log_spectrum(samples), log_spectrum(back)
    lags = [(before[: len(before) - n], after[n:]) for n in range(min(11, len(before)))]
    found = [np.corrcoef(x.ravel(), y.ravel())[0, 1] if x.std() and y.std() else 0.0 for x, y in lags]
    return float(max(found, default=0.0))


def log_spectrum(samples):
    """(samples,) -> (steps of 20 ms, about 24 mel bands of 80 to 7600 Hz) in dB, at least the maximum - 40."""
    size, low, high = 1024, 80, 7600
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, (0, size)), size)[::480]
    power = np.abs(np.fft.rfft(windows * np.hanning(size))) ** 2
    mels = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (low, high)), 25)
    edges = np.unique((700 * (10 ** (mels / 2595) - 1) / 24_000 * size).round().astype(int))
    level = 10 * np.log10(np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1) + 1e-4)
    return np.maximum(level, level.max() - 40)


def speak(generator, texts, folder, seed, speaker):
    """Speak each text with the current weights and without a voice: FOLDER/0.wav, 1.wav ..."""
    if not texts:
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator.context_caches.clear()  # the weights have changed
    for i, audio in enumerate(csm_batch.generate(generator, texts, speaker, voice="none", seed=seed)):
        mimi.write_audio(folder / f"{i}.wav", audio)


def chart(rows, before, path):
    """Plot the log if matplotlib is installed. before: the loss on the test data before training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = [k for k in rows[0] if k not in ("step", "rate", "frames_per_second")]
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for i, name in enumerate(names):
        points = np.array([(r["step"], r[name]) for r in rows if name in r])
        n = min(len(points), 500)  # points in the plot, each a mean
        axes.plot(*np.array([part.mean(axis=0) for part in np.array_split(points, n)]).T, f"C{i}", label=name)
        points = [(0, before)] if name == "loss" and before is not None else []
        points += [(r["step"], r[f"test_{name}"]) for r in rows if f"test_{name}" in r]
        if points:
            axes.plot(*zip(*points), f"C{i}o--", markersize=4, label=f"{name}, held out")
    axes.set(xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend()
    with mimi.replacing(path) as file:
        axes.figure.savefig(file, dpi=120, format="png")


def fuse(args):
    """Write a model folder with the run's result merged, in the base's type."""
    if not args.run.is_dir():
        raise ValueError(f"no such folder: {args.run}")
    adapter = (args.run / "adapter_config.json").is_file()
    base = args.model or trained_from(args.run)
    for place, what in ((args.run, "the run"), (Path(base), "the base")):
        if place.exists() and same_place(place if place.is_dir() else place.parent, args.destination):
            raise ValueError(f"{args.destination} is the folder of {what} itself: give another")
    dtype = checkpoints.read_csm(checkpoints.find(base))[1]["backbone.norm.weight"].dtype
    if adapter:
        generator = csm.load(base, dtype=dtype, adapter=args.run)
    elif (args.run / "config.json").is_file():
        generator = csm.load(args.run, dtype=dtype)
    else:
        generator = csm.load(base, dtype=dtype)
        trained = mimi.read_weights(args.run / "model.safetensors")[0]
        mimi.load_weights(generator.model, csm.split_heads({k: w.astype(dtype) for k, w in trained.items()}))
    generator.save(args.destination)
    print(f"{args.destination}: {base} with {args.run}")


def trained_from(run):
    """The base model that a run's folder names."""
    if base := adapters.base_model(run):
        return base
    checkpoint = run / "checkpoint.safetensors"
    if checkpoint.is_file():
        return json.loads(mimi.read_weights(checkpoint)[1]["run"])["settings"]["model"]
    return run if (run / "config.json").is_file() else "csm-1b"


def export(args):
    """Write a run's adapter in PEFT's format, for transformers' CSM."""
    adapter = mimi.read_json(args.run / "adapter_config.json")
    if not adapter:
        raise ValueError(f"{args.run} has no adapter_config.json: convert a run that trained all weights by convert.py")
    if same_place(args.run, args.destination):
        raise ValueError(f"{args.destination} is the folder of the run itself: give another")
    base = args.model or adapters.base_model(args.run)
    config = csm.CSMConfig.from_dict(checkpoints.read_csm(checkpoints.find(base))[0])
    tensors = mimi.read_weights(args.run / "adapters.safetensors")[0]
    theirs, tensors = adapters.adapter_to_peft(asdict(config), adapter | {"model": str(base)}, tensors)
    files = {"adapter_config.json": theirs, "adapter_model.safetensors": (tensors, {"format": "pt"})}
    csm_layouts.write_folder(args.destination, files)
    print(f"{args.destination}: {args.run} for PEFT")


# ---------------------------------------------------------------------------------------------------- command


def main(argv=None):
    p = command.parser_for("finetune", description="Fine-tune CSM: LoRA, DoRA or all of it.")
    commands = p.add_subparsers(dest="command", required=True)
    kinds = {
        "train": "train on conversations",
        "dpo": "train on pairs of chosen and rejected speech",
        "kto": "train on speech marked as wanted or unwanted",
    }
    for name, what in kinds.items():
        add_training(commands.add_parser(name, help=what, formatter_class=ShowDefaults), name)
    g = commands.add_parser(
        "pairs", help="make preference data: speak each text several times, keep the best and the worst"
    )
    g.add_argument("--texts", required=True, help="a file with one text per line")
    g.add_argument("--out", type=Path, required=True, help="folder for pairs.json")
    g.add_argument("--samples", type=int, default=4, help="samples of each text (default 4)")
    g.add_argument("--batch", type=int, default=16, help="samples generated at once (default 16)")
    g.add_argument("--margin", type=float, default=0.1, help="least difference of a pair's scores (default 0.1)")
    g.add_argument("--judge", metavar="COMMAND", help='such as "judge {audio} {text}": prints a score, more is better '
                   "(default: length against the text, silence, repetition, no end)")  # fmt: skip
    command.add_options(g)
    g.set_defaults(seed=0)
    g.set_defaults(function=tuning_data.pairs)
    f = commands.add_parser("fuse", help="write a model folder with a run's result merged")
    f.set_defaults(function=fuse)
    e = commands.add_parser("export", help="write an adapter for other programs")
    e.add_argument("--to", choices=("peft",), default="peft")
    e.set_defaults(function=export)
    for parser in (f, e):
        parser.add_argument("run", type=Path, metavar="RUN")
        parser.add_argument("destination", type=Path, metavar="DEST")
        parser.add_argument("--model", help="the base model, if it has moved")
    d = commands.add_parser("dataset", aliases=["convert"], help="data of any form -> JSON")
    d.add_argument("folder", type=Path, metavar="DATA", help="as for train --data-path")
    d.add_argument("out", type=Path, metavar="OUT.json")
    d.add_argument("--skip-bad", action="store_true", help="skip bad items instead of stopping")
    d.set_defaults(function=dataset)
    for parser in commands.choices.values():
        parser.error = p.error
    args = p.parse_args(argv)
    return command.run(p, args.function, args, "interrupted: the same command continues from here")


def dataset(args):
    """Write data of any form as JSON."""
    speakers, talks = {}, []
    for example in tuning_data.read_data(args.folder, "train", args.skip_bad, speakers):
        turns = [{"text": s.text, "audio_path": str(s.audio.resolve()), "speaker": s.speaker} for s in example.talks[0]]
        talks.append(turns)
    with mimi.replacing(args.out) as file:
        file.write(json.dumps(talks, indent=2, ensure_ascii=False).encode())
    command.say_speakers(speakers)
    print(f"{args.out}: {len(talks)} conversations")


class ShowDefaults(argparse.HelpFormatter):
    """Adds each option's default to its help."""

    def _get_help_string(self, action):
        said = action.help or ""
        if "default" in said or action.default in (None, False, "", argparse.SUPPRESS) or action.default == []:
            return said
        return f"{said} (default: %(default)s)"


def add_training(t, kind):
    forms = ": JSON list or lines, metadata.csv, a folder of clips, a Hub data set" if kind == "train" else ": JSON"
    t.add_argument("--data-path", type=Path, required=True, help=f"training data{forms}")
    t.add_argument("--val-data-path", type=Path, help="data for a test after each epoch")
    t.add_argument("--output-dir", type=Path, required=True, help="folder of the run; the same command resumes it")
    codes = "folder for the clips' codes, which runs may share (default: OUTPUT_DIR/codes)"
    t.add_argument("--codes", type=Path, metavar="DIR", help=codes)
    base = os.environ.get("CSM_MODEL") or "csm-1b"
    t.add_argument("--model", "--pretrained-path", default=base, help="as for csm.py")
    types = ("float32", "bfloat16", "float16")
    t.add_argument("--dtype", choices=types, help="default: float32; with LoRA, as csm.py chooses by device")
    t.add_argument("--quantize", type=int, choices=(4, 6, 8), help="bits of the frozen weights under LoRA")
    t.add_argument("--epochs", type=int, default=10, help="passes over the data")
    t.add_argument("--batch-size", type=int, default=4, help="examples at once, in each process")
    t.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches per step")
    usual = "default: 5e-4 with LoRA, 1e-5 without; a tenth of that for dpo and kto"
    t.add_argument("--learning-rate", "--lr", type=float, help=usual)
    t.add_argument("--warmup-steps", type=int, default=0, help="steps over which the learning rate rises")
    t.add_argument("--cosine", action="store_true", help="let the learning rate fall to 0 as half a cosine")
    t.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer")
    t.add_argument("--weight-decay", "--wd", type=float, default=1e-4, help="weight decay of adamw and sgd")
    t.add_argument("--max-norm", type=float, default=1.0, help="clip the gradient to this norm; 0: do not")
    t.add_argument("--lora-rank", type=int, default=0, help="rank of LoRA; 0: train all weights")
    t.add_argument("--lora-alpha", type=float, default=16.0, help="the change is scaled by alpha / rank")
    t.add_argument("--lora-dropout", type=float, default=0.0, help="fraction of LoRA's inputs to drop in training")
    t.add_argument("--dora", action="store_true", help="with LoRA: also learn the norms of the weights' rows")
    modules = "attn, mlp, projection, head or names (default: attn mlp)"
    t.add_argument("--target-modules", nargs="+", default=["attn", "mlp"], help=modules)
    t.add_argument("--train-embeddings", action="store_true", help="with LoRA: also train the whole embeddings")
    t.add_argument("--freeze-backbone", action="store_true", help="train only the depth decoder")
    t.add_argument("--freeze-decoder", action="store_true", help="train only the backbone")
    t.add_argument("--depth-fraction", type=float, default=1 / 16, help="fraction of frames that train codebooks 1..")
    t.add_argument("--first-codebook-weight-multiplier", type=float, default=1.0, help="weight of codebook 0's loss")
    ids = {"type": lambda s: [int(x) for x in s.split(",")], "default": [], "metavar": "IDS"}
    t.add_argument("--mask-speaker-ids", **ids, help="speakers that are context only: 0,2")
    t.add_argument("--max-audio-length-ms", type=float, default=90_000, help="leave out longer clips")
    t.add_argument("--skip-bad", action="store_true", help="skip bad items instead of stopping")
    held_out = f"fraction held out for a test after each epoch (default: a tenth, at most {MOST_HELD_OUT}; 0: none)"
    t.add_argument("--validation", type=float, help=held_out)
    clips = "first send N clips through the codec, and warn if it loses their sound or words; 0: do not"
    t.add_argument("--codec-clips", type=int, default=8, metavar="N", help=clips)
    t.add_argument("--gradient-ckpt", action="store_true", help="less memory, more time")
    t.add_argument("--ckpt-freq", type=int, default=100, help="steps between checkpoints")
    t.add_argument("--log-freq", type=int, default=10, help="steps between writes to log.jsonl")
    keep = "also keep the last N checkpoints as folders of adapters or models that speak"
    t.add_argument("--keep", type=int, default=0, metavar="N", help=keep)
    texts = (
        "speak each line of F before training and after each epoch; none: do not (default: two sentences, before and "
        "after training)"
    )
    t.add_argument("--sample-texts", metavar="F", help=texts)
    t.add_argument("--seed", type=int, default=0, help="seed of the data's order and all randomness")
    if kind != "train":
        t.add_argument("--beta", type=float, default=0.1, help="a higher one keeps the model closer to the original")
        t.add_argument("--sft-weight", type=float, default=0.0, help="weight of the chosen speech's cross-entropy")
    t.set_defaults(reference_free=kind == "train", function=train)
    if kind == "dpo":
        t.add_argument("--reference-free", action="store_true", help="take all speech as equally likely at first")
    if kind == "kto":
        t.add_argument("--desirable-weight", type=float, default=1.0, help="weight of wanted speech")
        t.add_argument("--undesirable-weight", type=float, default=1.0, help="weight of unwanted speech")


def check(args):
    usual = (5e-4 if args.lora_rank else 1e-5) * (1 if args.command == "train" else 0.1)
    args.learning_rate = usual if args.learning_rate is None else args.learning_rate
    if not args.lora_rank or args.train_embeddings:
        args.dtype = args.dtype or "float32"  # bfloat16 would round most updates away
    for name, good in (
        ("depth-fraction", 0 < args.depth_fraction <= 1), ("validation", 0 <= (args.validation or 0) < 1),
        ("batch-size", args.batch_size > 0), ("gradient-accumulation-steps", args.gradient_accumulation_steps > 0),
        ("epochs", args.epochs > 0), ("lora-rank", args.lora_rank >= 0), ("lora-dropout", 0 <= args.lora_dropout < 1),
        ("ckpt-freq", args.ckpt_freq > 0), ("log-freq", args.log_freq > 0),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"--{name} cannot be {getattr(args, name.replace('-', '_'))}")
    if args.quantize and not args.lora_rank:
        raise ValueError("quantized weights cannot be trained: --quantize goes with --lora-rank")


if __name__ == "__main__":
    sys.exit(main())
