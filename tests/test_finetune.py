"""Fine-tuning: transformers' gradient, runs that resume to the same bits, and training data that is learned."""

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import csm  # before mlx
import csm_layouts
import mimi
from csm_tools import finetune, speak, tuning_data

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
import soundfile
from mlx.utils import tree_flatten

from conftest import clip, write_model

HERE = Path(__file__).resolve().parents[1]


def write_data(folder, n=6, seconds=0.5):
    """Write n conversations of two turns as JSON and clips."""
    folder.mkdir(exist_ok=True)
    talks = []
    for i in range(n):
        talk = []
        for j, text in enumerate(("hello there", "i am fine")):
            soundfile.write(folder / f"{i}_{j}.wav", clip(seconds + 0.1 * i, seed=10 * i + j), 24000)
            talk.append({"text": text, "audio_path": f"{i}_{j}.wav", "speaker" if j else "speaker_id": j})
        talks.append(talk)
    (folder / "data.json").write_text(json.dumps(talks))
    return folder / "data.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plain"), voices=False)


def train(model, data, out, *more, command="train"):
    """Run `finetune COMMAND`; returns the rows of its log."""
    args = [command, "--model", model, "--data-path", data, "--output-dir", out, "--epochs", 2, "--batch-size", 2]
    args += ["--sample-texts", "none", "--codec-clips", 0]
    finetune.main([str(a) for a in [*args, *more]])
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def arguments(command="train", **more):
    """The default arguments of `train`, `dpo` or `kto`."""
    parsed = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "train", parsed.append)
        finetune.main([command, "--data-path", "x", "--output-dir", "y"])
    finetune.check(parsed[0])
    for name, value in more.items():
        setattr(parsed[0], name, value)
    return parsed[0]


def write_pairs(folder, n=6, seconds=0.5, reverse=False):
    """Write n pairs for dpo and kto: the same context, then one text with two different clips."""
    folder.mkdir(exist_ok=True)
    items, texts = [], ("hello there", "i am fine", "yes yes", "how are you today", "no", "you are there")
    soundfile.write(folder / "before.wav", clip(0.4, seed=99), 24000)
    for i in range(n):
        item = {}
        for j, kind in enumerate(("rejected", "chosen") if reverse else ("chosen", "rejected")):
            soundfile.write(folder / f"{i}_{j}.wav", clip(seconds + 0.1 * (i + j), seed=10 * i + j), 24000)
            turns = (("are you there?", "before.wav", 1), (texts[i % len(texts)], f"{i}_{j}.wav", 0))
            item[kind] = [{"text": t, "audio_path": a, "speaker": k} for t, a, k in turns]
        items.append(item)
    (folder / "pairs.json").write_text(json.dumps(items))
    return folder / "pairs.json"


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("preferences"))


# ------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("command", ["train", "dpo", "kto"])
def test_gradient_is_that_of_transformers_and_torch(plain, data, preferences, tmp_path, command):
    """Each loss and its gradient equal plain PyTorch's, for a model that differs from its reference."""
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import convert

    weights = mx.load(str(plain / "model.safetensors"))
    key = mx.random.key(3)  # gives KTO a divergence above 0
    moved = {
        k: w + 0.03 * mx.random.normal(w.shape, key=mx.random.split(key, 99)[i])
        for i, (k, w) in enumerate(weights.items())
    }
    write_model(tmp_path / "moved", weights=moved, voices=False)
    theirs = []
    for source in (tmp_path / "moved", plain):
        convert.convert(source, tmp_path / f"tf_{source.name}", to="transformers", dtype="float32")
        theirs.append(tf.CsmForConditionalGeneration.from_pretrained(tmp_path / f"tf_{source.name}").train())

    generator = csm.load(plain, dtype="float32")
    K = generator.model.config.audio_num_codebooks
    args = arguments(command, output_dir=tmp_path / "o", batch_size=2)  # three parts
    if command == "train":
        args.mask_speaker_ids = [1]
    else:
        args.beta, args.desirable_weight, args.undesirable_weight = 2.0, 1.5, 0.5
        args.first_codebook_weight_multiplier, args.sft_weight = 3.0, 0.3
    source = data if command == "train" else preferences
    examples = tuning_data.encode(generator, tuning_data.read_data(source, command)[:5], args)
    if command == "kto":
        tuning_data.mismatch(generator, examples, args)
    run = finetune.Run(generator, examples, [], args)
    run.model.load_weights(list(csm.split_heads(moved).items()))
    row, gradient = run.measure(examples, 1, 0, key=(0, 0))

    def labelled(model, talk):
        """Their losses, from embeddings; test_model.py compares their processor with our rows."""
        rows = talk.rows[None]
        labels = np.full((1, len(talk.rows), K), -100)
        labels[0, talk.learned] = talk.rows[talk.learned, :K]
        audio = model.backbone_model.embed_tokens(torch.tensor(np.maximum(rows[..., :K], 0)).long())
        text = model.embed_text_tokens(torch.tensor(np.maximum(rows[..., K], 0)).long())
        is_text = torch.tensor(rows[..., K:] != csm.NO_TEXT)
        return model(inputs_embeds=torch.where(is_text, text, audio), labels=torch.tensor(labels))

    def nats(model, talk):
        """L of a conversation: the mean over codebooks; codebook 0 counts three times."""
        out = labelled(model, talk)
        return (3 * out.backbone_loss + (K - 1) * out.depth_decoder_loss) / K

    def reward(talk):
        with torch.no_grad():
            reference = nats(theirs[1], talk)
        return 2.0 * (reference - nats(theirs[0], talk))

    if command == "train":
        n = sum(len(e.talks[0].learned) for e in examples)
        loss = sum(labelled(theirs[0], e.talks[0]).loss * len(e.talks[0].learned) for e in examples) / n
    elif command == "dpo":
        assert all(len(t.learned) == len(t.segments[1].codes) + 1 for e in examples for t in e.talks)  # not the context
        margins = torch.stack([reward(e.talks[0]) - reward(e.talks[1]) for e in examples])
        own = torch.stack([nats(theirs[0], e.talks[0]) for e in examples])
        loss = (0.3 * own - torch.log(torch.sigmoid(margins))).mean()
        assert row["margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
        assert row["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    else:
        with torch.no_grad():
            kl = torch.stack([reward(e.other) for e in examples]).mean().clamp(min=0)
        parts = []
        for e in examples:
            r = reward(e.talks[0])
            wanted = 1.5 * (1 - torch.sigmoid(r - kl)) + 0.3 * nats(theirs[0], e.talks[0])
            parts.append(wanted if e.wanted == 1 else 0.5 * (1 - torch.sigmoid(kl - r)))
        loss = torch.stack(parts).mean()
        assert row["kl"] == pytest.approx(kl.item(), rel=1e-3) and kl > 0.01
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    named = {k: p.grad for k, p in theirs[0].named_parameters() if p.grad is not None}
    assert not any(k.startswith("codec_model") for k in named)
    config = json.loads((tmp_path / f"tf_{plain.name}/config.json").read_text())
    named = {k: mx.array(g.numpy()) for k, g in named.items()}
    expected = csm_layouts.csm_to_native(config, named, asdict(csm.CSMConfig()))[1]
    ours = csm_layouts.join_heads(dict(tree_flatten(gradient)))
    assert ours.keys() == expected.keys()
    for name, g in ours.items():
        scale = mx.linalg.norm(expected[name]).item()
        assert scale > 0 and mx.linalg.norm(g - expected[name]).item() <= 1e-3 * scale, name


def test_fraction_is_an_estimate_of_the_whole(plain, data, tmp_path):
    generator = csm.load(plain, dtype="float32")
    args = arguments(output_dir=tmp_path)
    (talk,) = tuning_data.encode(generator, tuning_data.read_data(data)[:1], args)[0].talks

    def rest(some):
        return finetune.frame_losses(generator.model, *tuning_data.collate([talk], [some]))[1].mean().item()

    parts = []
    for seed in range(40):
        some = tuning_data.choose(talk, 0.25, seed)
        assert len(some) == round(0.25 * len(talk.learned)) and set(some) <= set(talk.learned)
        parts.append(rest(some))
    assert abs(np.mean(parts) - rest(talk.learned)) < 3 * np.std(parts) / 40**0.5 + 1e-6 and np.std(parts) > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "kto"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_sign(plain, tmp_path, command, kind):
    """Training makes the chosen likelier than the rejected; swapped preferences, less likely."""
    more = {
        "lora": ["--lora-rank", 8, "--lr", 1e-2],
        "dora": ["--lora-rank", 8, "--dora", "--lr", 3e-3],
        "full": ["--lr", 1e-3],
    }
    gaps = []
    for reverse in (False, True):
        data, out = write_pairs(tmp_path / f"{reverse}", n=4, reverse=reverse), tmp_path / f"o{reverse}"
        options = [
            *more[kind],
            "--epochs",
            20,
            "--beta",
            1,
            "--depth-fraction",
            0.5,
            "--val-data-path",
            data,
            "--batch-size",
            8,
        ]
        rows = train(plain, data, out, *options, command=command)
        assert abs(rows[0]["margin"]) < 1e-4 and rows[0]["loss"] == pytest.approx(
            math.log(2) if command == "dpo" else 0.5
        )
        assert rows[-1]["test_loss"] < rows[0]["loss"] and rows[-1]["test_margin"] > 0.1
        assert rows[-1]["test_accuracy"] >= 0.6
        # Equivalently: the nats per code that the first clip won, minus the second's.
        before = csm.load(plain, dtype="float32")
        after = csm.load(plain, dtype="float32", adapter=out if kind != "full" else None)
        if kind == "full":
            after.model.load_weights(list(csm.split_heads(mx.load(str(out / "model.safetensors"))).items()))
        won = [nats(before, *turns, data.parent) - nats(after, *turns, data.parent) for turns in both(data, reverse)]
        gaps.append(np.mean(won[::2]) - np.mean(won[1::2]))
    assert gaps[0] > 0.05 and gaps[1] < -0.05


def both(data, reverse):
    """The turns of the first and the second clip of each pair."""
    for item in json.loads(data.read_text()):
        yield from (item[k] for k in (("rejected", "chosen") if reverse else ("chosen", "rejected")))


def nats(generator, before, turn, folder):
    """A turn's cross-entropy, the mean over frames and codebooks."""
    context = csm.Segment(before["speaker"], before["text"], folder / before["audio_path"])
    said = csm.Segment(turn["speaker"], turn["text"], folder / turn["audio_path"])
    n, rows = len(generator.segment_rows(context)), np.concatenate([generator.segment_rows(s) for s in (context, said)])
    start = n + len(generator.text_rows(said.text, said.speaker))
    h = generator.model(mx.array(rows)[None])[0, start - 1 : -1]
    codes = mx.array(rows[start:, :-1])
    logits = mx.concatenate([generator.model.head(0, h)[:, None], generator.model.depth_logits(h, codes)], axis=1)
    return nn.losses.cross_entropy(logits, codes, reduction="mean").item()


# ------------------------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize("command, kind", [("train", "full"), ("train", "lora"), ("dpo", "full"), ("kto", "dora")])
def test_continues_to_the_same_bits(plain, data, preferences, tmp_path, command, kind):
    more = ["--lora-rank", 4, "--lora-dropout", 0.1] if kind != "full" else ["--lr", 1e-3]
    more += ["--dora"] * (kind == "dora") + ["--batch-size", 3]
    more += ["--ckpt-freq", 1, "--depth-fraction", 0.5, "--warmup-steps", 2, "--cosine", "--validation", 0.2]
    source = data if command == "train" else preferences
    rows = train(plain, source, tmp_path / "a", *more, command=command)
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1)) and len(rows) > 3 and "test_loss" in rows[-1]
    step = finetune.Run.step

    def interrupted(run):
        if run.n == 3:
            raise KeyboardInterrupt
        return step(run)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune.Run, "step", interrupted)
        with pytest.raises(SystemExit) as e:
            train(plain, source, tmp_path / "b", *more, command=command)
        assert e.value.code == 130
    again = train(plain, source, tmp_path / "b", *more, command=command)
    strip = [{k: v for k, v in r.items() if k != "frames_per_second"} for r in rows]
    assert [{k: v for k, v in r.items() if k != "frames_per_second"} for r in again] == strip
    name = "adapters.safetensors" if kind != "full" else "model.safetensors"
    a, b = (mx.load(str(tmp_path / x / name)) for x in "ab")
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)
    with pytest.raises(SystemExit):  # another run than the checkpoint's
        train(plain, source, tmp_path / "b", *more, "--seed", 5, command=command)


@pytest.mark.slow
def test_killed_while_writing(plain, data, tmp_path):
    """Killed ten times at random moments, the run resumes."""
    command = [
        sys.executable,
        "-m",
        "csm_tools.finetune",
        "train",
        "--model",
        plain,
        "--data-path",
        data,
        "--lr",
        "1e-3",
    ]
    command += ["--output-dir", tmp_path / "o", "--ckpt-freq", "1", "--epochs", "200", "--batch-size", "1"]
    command += ["--codec-clips", "0"]
    reached = []
    for i in range(10):
        with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=HERE) as p:
            writing = tmp_path / "o"
            while p.poll() is None and not list(writing.glob(".checkpoint*.part*")):
                pass
            if i % 2 or not reached:
                while p.poll() is None and not (writing / "checkpoint.safetensors").exists():
                    pass
            os.kill(p.pid, signal.SIGKILL)
        arrays, metadata = mx.load(str(tmp_path / "o/checkpoint.safetensors"), return_metadata=True)
        assert all(mx.isfinite(w).all().item() for k, w in arrays.items() if k.startswith("model."))
        reached.append(json.loads(metadata["run"])["step"])
    assert reached == sorted(reached) and reached[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "dpo", "kto"])
def test_two_processes_are_one_with_the_doubled_batch(plain, data, preferences, tmp_path, command):
    source = data if command == "train" else preferences
    more = ["--lr", 1e-3, "--depth-fraction", 0.5, "--validation", 0.4]
    one = train(plain, source, tmp_path / "one", "--batch-size", 4, *more, command=command)
    launch = [
        Path(sys.executable).with_name("mlx.launch"),
        "-n",
        2,
        "--python",
        sys.executable,
        "-m",
        "csm_tools.finetune",
    ]
    args = [command, "--model", plain, "--data-path", source, "--output-dir", tmp_path / "two", "--epochs", 2]
    args += ["--codec-clips", 0]
    done = subprocess.run(
        [str(a) for a in [*launch, *args, "--batch-size", 2, *more]], capture_output=True, text=True, cwd=HERE
    )
    assert (tmp_path / "two/log.jsonl").exists(), done.stderr
    two = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"frames_per_second", "accuracy", "test_accuracy"}:  # not the signs of numbers near 0
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


def test_accumulation_is_a_larger_batch(plain, data, tmp_path):
    one = train(plain, data, tmp_path / "one", "--batch-size", 4, "--lr", 1e-3)
    more = ["--batch-size", 2, "--gradient-accumulation-steps", 2, "--gradient-ckpt"]
    two = train(plain, data, tmp_path / "two", *more, "--lr", 1e-3)
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-5)


@pytest.mark.slow
def test_what_a_run_leaves(plain, data, tmp_path, capfd):
    """The last checkpoints, the best, samples at every test, other test data, the chart."""
    (tmp_path / "say.txt").write_text("hello there\n\nyes\n")
    more = ["--keep", 2, "--ckpt-freq", 1, "--sample-texts", tmp_path / "say.txt", "--lora-rank", 4]
    rows = train(plain, data, tmp_path / "o", *more, "--val-data-path", data)
    assert [("test_loss" in r) for r in rows] == [False, False, True] * 2
    assert f"samples from before and after: {tmp_path / 'o/samples'}" in capfd.readouterr().err
    assert sorted(f.name for f in (tmp_path / "o").glob("step-*")) == ["step-5", "step-6"]
    for folder in ("step-6", "."):
        a, b = (mx.load(str(tmp_path / "o" / f / "adapters.safetensors")) for f in (folder, "step-6"))
        assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)
    assert (tmp_path / "o/best/adapters.safetensors").exists()
    said = sorted(str(f.relative_to(tmp_path / "o/samples")) for f in (tmp_path / "o/samples").glob("*/*"))
    assert said == [f"step-{n}/{i}.wav" for n in (0, 3, 6) for i in (0, 1)]
    assert soundfile.info(tmp_path / "o/samples/step-6/0.wav").samplerate == 24000
    assert (tmp_path / "o/log.png").exists() or not importlib.util.find_spec("matplotlib")
    plain_rows = train(plain, data, tmp_path / "p", "--lora-rank", 4, "--val-data-path", data)
    # sampling has changed nothing
    assert [r["loss"] for r in plain_rows] == [r["loss"] for r in rows]


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_quantized_models(tmp_path, data, dora):
    """3, 6 and 8 bits in one model, with some plain matrices: loading gives the trained model."""
    folder, weights = write_model(tmp_path / "m", voices=False), {}
    for name, w in csm.split_heads(mx.load(str(folder / "model.safetensors"))).items():
        bits = next((n for part, n in (("q_proj", 3), ("mlp", 6), ("k_proj", 8)) if part in name), 0)
        if bits:
            parts = zip(("weight", "scales", "biases"), mx.quantize(w, 32, bits))
            weights |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts}
        else:
            weights[name] = w
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 6}}))
    more = ["--lora-rank", 4, "--lr", 3e-3, "--depth-fraction", 1, "--epochs", 4, *["--dora"] * dora]
    rows = train(folder, data, tmp_path / "o", *more, "--val-data-path", data)
    assert rows[-1]["test_loss"] < rows[0]["loss"]
    adapter = mx.load(str(tmp_path / "o/adapters.safetensors"))
    assert adapter["backbone.layers.0.self_attn.q_proj.lora_a"].shape == (64, 4)
    assert adapter["backbone.layers.0.mlp.down_proj.lora_a"].shape == (128, 4)
    generator = csm.load(folder, dtype="float32", adapter=tmp_path / "o")
    args = arguments(output_dir=tmp_path / "o")
    talks = [e.talks[0] for e in tuning_data.encode(generator, tuning_data.read_data(data), args)]
    rows_of = tuning_data.collate(talks, [t.learned for t in talks])
    zero, rest = finetune.frame_losses(generator.model, *rows_of)
    loss = zero.mean() + rest.mean() / (generator.model.config.audio_num_codebooks - 1)
    assert loss.item() == pytest.approx(rows[-1]["test_loss"], rel=1e-3)


@pytest.mark.slow
def test_overfits_until_it_says_the_very_codes(plain, tmp_path):
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    talks = []
    for i, text in enumerate(("Good morning.", "Where is my hat?", "The bus is late.", "I like old boats.")):
        subprocess.run(["espeak-ng", "-w", tmp_path / f"{i}.wav", text], check=True)
        talks.append([{"text": text, "audio_path": f"{i}.wav", "speaker": i % 2}])
    data = tmp_path / "data.json"
    data.write_text(json.dumps(talks))
    train(plain, data, tmp_path / "o", "--epochs", 200, "--lr", 3e-3, "--depth-fraction", 1, "--batch-size", 4)
    import convert

    finetune.main(["fuse", str(tmp_path / "o"), str(tmp_path / "m"), "--model", str(plain)])
    generator = csm.load(tmp_path / "m", dtype="float32")
    for (turn,) in (e.talks[0] for e in tuning_data.read_data(data)):
        codes = generator.generate_codes(turn.text, turn.speaker, temperature=0, max_audio_length_ms=4000)
        np.testing.assert_array_equal(codes, generator.encode(turn).codes)  # and it ends where the clip ends
        assert len(codes) > 8
    convert.convert(tmp_path / "m", tmp_path / "t", to="transformers")
    convert.convert(tmp_path / "m", tmp_path / "s", to="sesame")


def test_adapter_in_every_way(plain, data, tmp_path, capfd):
    more = ["--lora-rank", 4, "--lr", 1e-2, "--target-modules", "attn", "projection", "head", "--train-embeddings"]
    rows = train(plain, data, tmp_path / "o", *more, "--epochs", 4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert json.loads((tmp_path / "o/adapter_config.json").read_text())["rank"] == 4
    options = {"temperature": 0, "max_audio_length_ms": 800}
    base, tuned = csm.load(plain, dtype="float32"), csm.load(plain, dtype="float32", adapter=tmp_path / "o")
    codes = np.array(tuned.generate_codes("hello there", 0, **options))
    assert not np.array_equal(codes, base.generate_codes("hello there", 0, **options))
    with pytest.raises(SystemExit):  # of another size
        finetune.main(["fuse", str(tmp_path / "o"), str(tmp_path / "no"), "--model", str(HERE / "tiny")])
    assert "does not fit" in capfd.readouterr().err and not (tmp_path / "no").exists()
    save, calls = mx.save_safetensors, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(mx, "save_safetensors", interrupted)
        with pytest.raises(SystemExit):
            finetune.main(["fuse", str(tmp_path / "o"), str(tmp_path / "m")])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["o"]  # nothing that looks finished
    finetune.main(["fuse", str(tmp_path / "o"), str(tmp_path / "m")])
    fused = csm.load(tmp_path / "m", dtype="float32")
    np.testing.assert_array_equal(fused.generate_codes("hello there", 0, **options), codes)
    finetune.main(["export", str(tmp_path / "o"), str(tmp_path / "peft"), "--to", "peft"])
    finetune.main(["fuse", str(tmp_path / "peft"), str(tmp_path / "m2")])  # PEFT's are taken too
    np.testing.assert_array_equal(csm.load(tmp_path / "m2").generate_codes("hello there", 0, **options), codes)
    assert speak.main(["hello there", str(tmp_path / "a.wav"), "--model", str(plain), "--adapter", str(tmp_path / "o"),
                     "--max-audio-length-ms", "400"]) == 0  # fmt: skip
    with pytest.raises(SystemExit):
        speak.main(["hello", str(tmp_path / "b.wav"), "--model", str(plain), "--adapter", str(data.parent)])
    assert "has no adapter_config.json" in capfd.readouterr().err


def test_frozen_parts_stay(plain, data, tmp_path):
    before = mx.load(str(plain / "model.safetensors"))
    train(plain, data, tmp_path / "o", "--freeze-backbone", "--lr", 1e-3, "--optimizer", "sgd", "--depth-fraction", 1)
    after = mx.load(str(tmp_path / "o/model.safetensors"))
    assert after.keys() == before.keys()
    for name in after:
        same = mx.array_equal(before[name], after[name]).item()
        assert same == name.startswith(("backbone.", "codebook0_head", "text_embeddings")), name


def test_what_is_trained_speaks_without_the_preset_voice(folder, data, tmp_path):
    """An adapter, a fused folder and a run of all weights put no preset voice before the text."""
    train(folder, data, tmp_path / "lora", "--lora-rank", 2, "--epochs", 1)
    train(folder, data, tmp_path / "full", "--epochs", 1)
    finetune.main(["fuse", str(tmp_path / "lora"), str(tmp_path / "fused")])
    assert csm.load(folder).voice_prompt()
    tuned = [csm.load(folder, adapter=tmp_path / "lora"), csm.load(tmp_path / "full"), csm.load(tmp_path / "fused")]
    for generator in tuned:
        assert generator.voice_prompt() == []
    assert tuned[2].voice_prompt("other")  # by its name it is still there


def test_a_run_of_all_weights_is_a_model(plain, data, tmp_path):
    train(plain, data, tmp_path / "o", "--epochs", 1, "--lr", 1e-3, "--keep", 1)
    options = {"temperature": 0, "max_audio_length_ms": 400}
    codes = csm.load(tmp_path / "o", dtype="float32").generate_codes("hello there", **options)
    assert not np.array_equal(codes, csm.load(plain, dtype="float32").generate_codes("hello there", **options))
    finetune.main(["fuse", str(tmp_path / "o"), str(tmp_path / "m")])
    for place in ("m", "o/step-3"):
        again = csm.load(tmp_path / place, dtype="float32").generate_codes("hello there", **options)
        np.testing.assert_array_equal(again, codes)


def test_an_adapter_names_its_base(plain, data, tmp_path, monkeypatch):
    """A path is relative to the adapter's folder, so both may move together."""
    (tmp_path / "a").mkdir()
    shutil.copytree(plain, tmp_path / "a/base")
    monkeypatch.chdir(tmp_path / "a")
    train("base", data, "run", "--lora-rank", 2, "--epochs", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    args = ["hello", "x.wav", "--adapter", "b/run", "--max-audio-length-ms", "400"]
    assert speak.main(args) == 0
    finetune.main(["fuse", "b/run", "fused"])
    assert (tmp_path / "fused/model.safetensors").exists()
    config = json.loads((tmp_path / "b/run/adapter_config.json").read_text())
    (tmp_path / "b/run/adapter_config.json").write_text(json.dumps(config | {"model": "unsloth/csm-1b-bnb-4bit"}))
    with pytest.raises(SystemExit):
        speak.main(args)


def test_nothing_is_overwritten_that_should_stay(plain, data, tmp_path, capfd):
    base = shutil.copytree(plain, tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    train(base, data, tmp_path / "r", "--lora-rank", 2, "--epochs", 1)
    for args in (
        ["train", "--model", base, "--data-path", data, "--output-dir", base],
        ["fuse", tmp_path / "r", base],
        ["fuse", tmp_path / "r", tmp_path / "r"],
        ["export", tmp_path / "r", tmp_path / "r"],
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as e:
            finetune.main([str(a) for a in args])
        assert e.value.code == 2 and "itself: give another" in capfd.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"of somebody")
    (tmp_path / "log").mkdir()
    (tmp_path / "log/log.jsonl").write_text("an entry\n")
    for out, message in (("other", "but no run's checkpoint"), ("log", "is not the log of a run")):
        with pytest.raises(SystemExit):
            train(plain, data, tmp_path / out)
        err = capfd.readouterr().err
        assert message in err and err.count("\n") == 1
    assert (base / "model.safetensors").read_bytes() == before
    assert (tmp_path / "other/model.safetensors").read_bytes() == b"of somebody"


def test_only_folders_of_the_run_are_removed(plain, data, tmp_path):
    for name in ("step-1", "step-notes", "step-7"):
        (tmp_path / "o" / name).mkdir(parents=True)
        (tmp_path / "o" / name / "notes.txt").write_text("mine")
    train(plain, data, tmp_path / "o", "--keep", 1, "--ckpt-freq", 1, "--lora-rank", 2)
    assert {p.parent.name for p in (tmp_path / "o").glob("step-*/notes.txt")} == {"step-1", "step-notes", "step-7"}
    assert [p.parent.name for p in (tmp_path / "o").glob("step-*/adapters.safetensors")] == ["step-6"]
    assert sorted(p.name for p in (tmp_path / "o/step-1").iterdir()) == ["notes.txt"]


def test_a_file_with_new_content_is_other_data(plain, tmp_path, capfd):
    data = write_data(tmp_path / "d", n=2)
    train(plain, data, tmp_path / "o", "--lora-rank", 2, "--epochs", 1)
    soundfile.write(tmp_path / "d/1_0.wav", clip(0.9, seed=77), 24000)
    with pytest.raises(SystemExit):
        train(plain, data, tmp_path / "o", "--lora-rank", 2)
    assert "has a different data" in capfd.readouterr().err


def test_the_log_tells_the_rate_of_its_step(plain, data, tmp_path):
    rows = train(plain, data, tmp_path / "o", "--lr", 1e-3, "--warmup-steps", 2, "--cosine", "--lora-rank", 2)
    assert [r["rate"] for r in rows[:3]] == pytest.approx([5e-4, 1e-3, 1e-3]) and rows[-1]["rate"] > 0
    before = mx.load(str(plain / "model.safetensors"))
    train(plain, data, tmp_path / "zero", "--lr", 0, "--weight-decay", 0, "--epochs", 1)
    after = mx.load(str(tmp_path / "zero/model.safetensors"))
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_the_log_is_appended_to(plain, data, tmp_path, monkeypatch):
    """Rows after the last checkpoint, even half a line, are made again."""
    more = ["--batch-size", 1, "--log-freq", 2, "--ckpt-freq", 4, "--lora-rank", 2, "--epochs", 2]
    rows = train(plain, data, tmp_path / "whole", *more)
    assert [r["step"] for r in rows] == [*range(1, 13)]
    step = finetune.Run.step

    def interrupted(run):
        if run.n == 6:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(finetune.Run, "step", interrupted)
        train(plain, data, tmp_path / "o", *more)
    log = tmp_path / "o/log.jsonl"
    assert len(log.read_text().splitlines()) == 6
    log.write_text(log.read_text() + '{"step": 7, "lo')
    again = train(plain, data, tmp_path / "o", *more)
    assert [(r["step"], r["loss"]) for r in again] == [(r["step"], r["loss"]) for r in rows]


def test_each_part_of_a_batch_has_its_own_dropout(plain, data, tmp_path):
    generator = csm.load(plain, dtype="float32")
    args = arguments(output_dir=tmp_path, lora_rank=2, lora_dropout=0.5, batch_size=1)
    run = finetune.Run(generator, tuning_data.encode(generator, tuning_data.read_data(data), args), [], args)
    seen, gradient = [], run.gradient
    run.gradient = lambda *a: seen.append([lora._key.tolist() for lora in run.loras]) or gradient(*a)
    run.measure(run.examples[:3], 1, 0, key=(0, 5))
    keys = [tuple(key) for part in seen for key in part]
    assert len(seen) == 3 and len(set(keys)) == len(keys) == 3 * len(run.loras)
    assert run.loras[0]._key is None  # and none when it is tested


def said_in(*clips):
    """Examples of these clips, with the text beside each, or "hello"."""
    texts = [c.with_suffix(".txt").read_text() if c.with_suffix(".txt").exists() else "hello" for c in clips]
    segments = [csm.Segment(0, text, c) for text, c in zip(texts, clips)]
    return [tuning_data.Example([argparse.Namespace(segments=[s])]) for s in segments]


def test_a_codec_that_loses_a_voice_is_said(tmp_path, capfd, monkeypatch):
    """By spectra: tiny's codec keeps its own voices and loses noise. By words, if a recogniser hears them."""
    monkeypatch.setattr(finetune, "hear", lambda samples: "")
    tiny = csm.load("tiny")
    own = sorted((HERE / "tiny/prompts").glob("*.wav"))
    soundfile.write(tmp_path / "noise.wav", clip(2), 24000)
    for clips, warned in ((own, False), ([tmp_path / "noise.wav"], True)):
        finetune.warn_of_codec(tiny, said_in(*clips), 8)
        assert ("spectra correlate by" in (err := capfd.readouterr().err)) == warned == ("Instead, give a clip" in err)
    texts = {len(mimi.read_audio(c)): c.with_suffix(".txt").read_text() for c in own}
    heard = []

    def hear(samples):  # the clips well, and every word of what follows wrong
        heard.append(texts[len(samples)].upper() if len(heard) % 2 == 0 else "what")
        return heard[-1]

    monkeypatch.setattr(finetune, "hear", hear)
    finetune.warn_of_codec(tiny, said_in(*own), 8)
    assert "gets 0% of the words wrong in the clips, 100% after the codec" in (err := capfd.readouterr().err)
    assert len(heard) == 2 * len(own) and "spectra" not in err


def test_errors_in_words():
    for said, heard, n in (("a b c", "a b c", 0), ("a b c", "", 3), ("a b", "x a c b", 2), ("", "a", 1)):
        assert finetune.word_errors(said.split(), heard.split()) == n
    assert finetune.words("It's 3 o'clock, Ann!") == ["it's", "3", "o'clock", "ann"]


def test_what_was_learned_is_said(plain, data, tmp_path, capfd):
    """Conversations are held out unless there are few; their loss before and after is printed and plotted."""
    assert len(finetune.split([*range(9)], arguments())[1]) == 0
    for n, held_out in ((10, 1), (75, 7), (1000, 20)):
        rest, test = finetune.split([*range(n)], arguments())
        assert len(test) == held_out and sorted(rest + test) == [*range(n)]
    assert len(finetune.split([*range(100)], arguments(validation=0.5))[1]) == 50
    assert finetune.split([*range(100)], arguments(validation=0.0))[1] == []
    rows = train(plain, data, tmp_path / "o", "--lr", 3e-3, "--validation", 0.2, "--epochs", 4)
    err = capfd.readouterr().err
    before = json.loads(mx.load(str(tmp_path / "o/checkpoint.safetensors"), return_metadata=True)[1]["run"])["before"]
    assert "5 examples, 1 held out" in err
    assert f"held out: loss {before:.4f} before training, {rows[-1]['test_loss']:.4f} now" in err
    assert before > rows[-1]["test_loss"] and "has learned nothing" not in err
    train(plain, data, tmp_path / "bad", "--lr", 0.3, "--validation", 0.2)
    assert "warning: it has learned nothing that helps" in capfd.readouterr().err
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "o/log.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
def test_samples_before_and_after_are_the_default(plain, data, tmp_path):
    args = ["train", "--model", plain, "--data-path", data, "--output-dir", tmp_path / "o", "--epochs", 1]
    finetune.main([str(a) for a in [*args, "--lora-rank", 2, "--codec-clips", 0]])
    said = sorted(str(f.relative_to(tmp_path / "o/samples")) for f in (tmp_path / "o/samples").glob("*/*"))
    assert said == ["step-0/0.wav", "step-0/1.wav", "step-2/0.wav", "step-2/1.wav"]


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("(default: 10)", "(default: adamw)", "(default: 0.0001)", "(default: csm-1b)", "default: attn mlp"):
        assert part in said
    assert "default: None" not in said


# ------------------------------------------------------------------------------- data


def test_folders_are_read_in_natural_order(tmp_path, capfd):
    place = tmp_path / "raw/talk_1"
    place.mkdir(parents=True)
    for n, speaker in ((10, 0), (2, 12), (1, 0)):
        soundfile.write(place / f"{n}_speaker{speaker}_x.wav", clip(0.2), 24000)
        (place / f"{n}_speaker{speaker}_x.txt").write_text(f"text {n}\n")
    finetune.main(["dataset", str(tmp_path / "raw"), str(tmp_path / "d.json")])
    (talk,) = (e.talks[0] for e in tuning_data.read_data(tmp_path / "d.json"))
    assert [(s.text, s.speaker) for s in talk] == [("text 1", 0), ("text 2", 12), ("text 10", 0)]
    assert [
        [(s.text, s.speaker) for s in t] for t in (e.talks[0] for e in tuning_data.read_data(tmp_path / "raw"))
    ] == [[(s.text, s.speaker) for s in talk]]
    (place / "3_speaker1_y.wav").write_bytes(b"")
    with pytest.raises(SystemExit):
        finetune.main(["dataset", str(tmp_path / "raw"), str(tmp_path / "d.json")])
    assert "no .txt beside it" in capfd.readouterr().err


def test_bad_files_are_named(plain, tmp_path, capfd):
    data = write_data(tmp_path / "d", n=3)
    (tmp_path / "d/1_0.wav").write_bytes(b"not a sound")
    with pytest.raises(SystemExit) as e:
        train(plain, data, tmp_path / "o")
    err = capfd.readouterr().err
    assert e.value.code == 2 and "1_0.wav" in err and err.startswith("finetune: error: ")
    train(plain, data, tmp_path / "o", "--skip-bad", "--epochs", 1)
    assert "skipped:" in capfd.readouterr().err


def first_turns(path, **options):
    """The first turn of each conversation in data of any form: (text, speaker, file name)."""
    turns = [e.talks[0][0] for e in tuning_data.read_data(path, **options)]
    return [(t.text, t.speaker, t.audio.name) for t in turns]


def test_every_form_of_data(tmp_path):
    """JSON lists and lines, flat or nested; tables; folders; BOM, CRLF, backslashes, capitals, names."""
    for place in ("clips", "lj/wavs", "flat"):
        (tmp_path / place).mkdir(parents=True)
        for i in (1, 2, 10):
            soundfile.write(tmp_path / place / f"c{i}.wav", clip(0.6, seed=i), 8000 * i)
    flat = [{"text": f"text {i}", "audio_path": f"clips/c{i}.wav", "speaker_id": 7} for i in (1, 2)]
    expected = [("text 1", 7, "c1.wav"), ("text 2", 7, "c2.wav")]

    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    assert first_turns(write("nested.json", json.dumps([[turn] for turn in flat]))) == expected
    assert first_turns(write("flat.json", b"\xef\xbb\xbf" + json.dumps(flat).encode())) == expected
    lines = "\r\n".join(map(json.dumps, flat)) + "\r\n\r\n"
    assert first_turns(write("lines.jsonl", b"\xef\xbb\xbf" + lines.encode())) == expected
    other = [turn | {"text": turn["text"].replace(" ", "\u2028")} for turn in flat]
    lines = "\n".join(json.dumps(turn, ensure_ascii=False) for turn in other)
    said = [(text.replace(" ", "\u2028"), speaker, name) for text, speaker, name in expected]
    assert first_turns(write("lines.jsonl", lines)) == said
    windows = [{"Text": "text 1", "Audio_Path": r".\clips\c1.wav", "Speaker": 7}, flat[1]]
    assert first_turns(write("windows.json", json.dumps(windows))) == expected
    table = "audio_file|text|speaker_name\r\nclips/c1.wav|text 1|7\r\nclips/c2.wav|text 2|7\r\n"
    assert first_turns(write("coqui.csv", table)) == expected
    comma = 'file_name,transcription,speaker\nclips/c1.wav,"text 1",7\nclips/c2.wav,text 2,7\n'
    assert first_turns(write("hub.csv", comma)) == expected
    for ending in ("\r\n", "\r"):  # as Excel writes it, in Europe and on old Macs
        assert first_turns(write("hub.csv", comma.replace(",", ";").replace("\n", ending))) == expected
    write("lj/metadata.csv", '\ufeffc1|Text "one|text 1\nc2|text 2|\n')
    assert first_turns(tmp_path / "lj") == first_turns(tmp_path / "lj/metadata.csv")
    assert first_turns(tmp_path / "lj") == [("text 1", 0, "c1.wav"), ("text 2", 0, "c2.wav")]
    for i in (1, 2, 10):
        write(f"flat/c{i}.txt", b"\xef\xbb\xbf" + f"text {i}\r\n".encode())
    assert first_turns(tmp_path / "flat") == [(f"text {i}", 0, f"c{i}.wav") for i in (1, 2, 10)]
    names = [turn | {"speaker": name, "speaker_id": None} for turn, name in zip(flat * 2, ("Ann", "Bob", 0, "Ann"))]
    speakers = {}
    assert [t[1] for t in first_turns(write("names.json", json.dumps(names)), speakers=speakers)] == [1, 2, 0, 1]
    assert speakers == {"Ann": 1, "Bob": 2}


def test_speakers_by_name_are_said_and_kept(plain, tmp_path, capfd):
    data = write_data(tmp_path / "d", n=2)
    items = json.loads(data.read_text())
    for item in items:
        item[0] = {**item[0], "speaker_id": "Ann"}
    data.write_text(json.dumps(items))
    train(plain, data, tmp_path / "o", "--epochs", 1)
    assert "speakers: Ann is 0" in capfd.readouterr().err
    assert json.loads((tmp_path / "o/speakers.json").read_text()) == {"Ann": 0}


def test_all_faults_are_listed_with_their_place(tmp_path, capfd):
    soundfile.write(tmp_path / "c.wav", clip(0.6), 24000)
    good = {"text": "hello", "audio_path": "c.wav", "speaker": 0}
    bad = [good | {"text": " "}, good | {"audio_path": "none.wav"}, good | {"speaker": 1.7}, good | {"speaker": 10**30}]
    bad += [{"text": "hello"}, "hello", good | {"speaker": -1}]
    lines = [json.dumps(item) for item in [good, *bad]] + ['{"text": "half a li']
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="8 of 9 items are bad"):
        tuning_data.read_data(tmp_path / "d.jsonl")
    err = capfd.readouterr().err.splitlines()
    said = ["text is empty", "no such file", "1.7", str(10**30)[:9], "audio_path", "expected", "-1", "Unterminated"]
    for n, (line, part) in enumerate(zip(err, said, strict=True), 2):
        assert f"d.jsonl, line {n}" in line and part in line, line
    assert len(tuning_data.read_data(tmp_path / "d.jsonl", skip_bad=True)) == 1
    assert capfd.readouterr().err.count("skipped: ") == 8
    (tmp_path / "d.csv").write_text("a;b\n")
    (tmp_path / "d.json").write_text("{")
    for name in ("d.csv", "d.json"):
        with pytest.raises(ValueError, match=name):
            tuning_data.read_data(tmp_path / name)


def test_a_hub_data_set_needs_datasets(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="datasets is not installed: pip install 'csm-speech"):
        tuning_data.read_data(tmp_path)


def test_a_hub_data_set_is_unpacked_once(tmp_path, monkeypatch):
    """With a stand-in for `datasets`. Later starts only read the list of clips, unless the files change."""

    class Audio:
        def __init__(self, decode=True):
            pass

    class Rows(list):
        features = {"audio": Audio(), "text": "string", "speaker_id": "int64", "embedding": "list"}

        def cast_column(self, name, kind):
            return Rows(dict(row) for row in self)

    loaded, rows = [], Rows()
    for i in range(3):
        soundfile.write(tmp_path / "c.wav", clip(0.5 + i / 10), 24000)
        sound = {"path": f"hub/{i}.wav", "bytes": (tmp_path / "c.wav").read_bytes()}
        rows.append({"audio": sound, "text": f"text {i}", "speaker_id": i, "embedding": [b"x"]})
    stand_in = types.SimpleNamespace(Audio=Audio, load_dataset=lambda *_, **more: loaded.append(more) or rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr(tuning_data.command, "need", lambda *_: None)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/0.parquet").write_bytes(b"PAR1")
    expected = [(f"text {i}", i, f"{i:06}_{i}.wav") for i in range(3)]
    for starts in (1, 1):
        assert first_turns(tmp_path / "d") == expected and len(loaded) == starts
    assert (tmp_path / "d/clips/000002_2.wav").read_bytes() == rows[2]["audio"]["bytes"]
    (tmp_path / "d").rename(tmp_path / "e")  # all of it may be moved
    assert first_turns(tmp_path / "e") == expected and len(loaded) == 1
    (tmp_path / "e/0.parquet").write_bytes(b"PAR1PAR1")
    assert first_turns(tmp_path / "e") == expected and len(loaded) == 2


def test_silence_is_trimmed_and_clips_that_cannot_be_right_are_bad(plain, tmp_path, capfd):
    generator, args = csm.load(plain, dtype="float32"), arguments(output_dir=tmp_path / "o")
    sound, silence = clip(1.0) + np.float32(0.01), np.zeros(5 * 24000, np.float32)
    soundfile.write(tmp_path / "long.wav", np.concatenate([silence, sound, silence]), 24000)
    soundfile.write(tmp_path / "silent.wav", silence, 24000)
    items = [[{"text": "hello there now", "audio_path": "long.wav", "speaker": 0}]]
    (tmp_path / "d.json").write_text(json.dumps(items))
    (example,) = tuning_data.encode(generator, tuning_data.read_data(tmp_path / "d.json"), args)
    assert len(example.talks[0].segments[0].codes) * 0.08 == pytest.approx(1.4, abs=0.1)
    assert "long.wav: 9.6 s of silence at its ends left out" in capfd.readouterr().err
    items += [[{"text": "hello", "audio_path": "silent.wav", "speaker": 0}]]
    (tmp_path / "d.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"silent.wav: the clip is silent throughout"):
        tuning_data.encode(generator, tuning_data.read_data(tmp_path / "d.json"), args)
    args.max_audio_length_ms = 500
    with pytest.raises(ValueError, match="nothing is left"):
        tuning_data.encode(generator, tuning_data.read_data(tmp_path / "d.json")[:1], args)
    assert "left out: " in (err := capfd.readouterr().err) and "long.wav: 1.4 s, and at most 0.5 s are wanted" in err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--depth-fraction", "0"], "depth-fraction"),
        (["--lora-rank", "4", "--target-modules", "nothing"], "no module is called"),
        (["--quantize", "4"], "goes with --lora-rank"),
        (["--data-path", "/nowhere.json"], "no such file"),
        (["--freeze-backbone", "--freeze-decoder"], ""),
        (["--mask-speaker-ids", "0,1"], "nothing is left"),
        (["--validation", "1"], "validation"),
    ],
)
def test_errors(plain, data, tmp_path, capfd, more, message):
    args = ["train", "--model", plain, "--data-path", data, "--output-dir", tmp_path / "o", "--epochs", "1"]
    args += ["--sample-texts", "none", *more]
    try:
        finetune.main([str(a) for a in args])
    except SystemExit as e:
        err = capfd.readouterr().err
        assert e.code == 2 and message in err and err.count("\n") == 1, err
    else:
        assert not message


@pytest.mark.parametrize(
    "item", [[], {"chosen": [{"text": "a", "audio_path": "a.wav", "speaker": 0}]}, {"segments": []}]
)
def test_preferences_of_another_form(plain, tmp_path, capfd, item):
    (tmp_path / "d.json").write_text(json.dumps([item]))
    for command in ("dpo", "kto"):
        with pytest.raises(SystemExit):
            train(plain, tmp_path / "d.json", tmp_path / "o", command=command)
        assert "expected [{" in capfd.readouterr().err


# ------------------------------------------------------------------------------- pairs


@pytest.mark.slow
def test_pairs(folder, tmp_path, capfd, monkeypatch):
    """Pairs are each text's best and worst sample; an interrupted run resumes; dpo and kto accept the pairs."""
    monkeypatch.setattr(tuning_data, "judged", lambda text, codes, audio, ended: float(codes[0, 0]))
    texts = ["hello there", "how are you today ?", "yes", "i am fine ."]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    args = ["pairs", "--model", str(folder), "--texts", str(tmp_path / "texts.txt"), "--samples", "3", "--batch", "4"]
    args += ["--max-audio-length-ms", "800", "--margin", "0", "--seed", "7", "--out"]
    finetune.main([*args, str(tmp_path / "a")])
    pairs = json.loads((tmp_path / "a/pairs.json").read_text())
    scores = [json.loads(line) for line in (tmp_path / "a/scores.jsonl").read_text().splitlines()[1:]]
    assert len(scores) == 4 and 0 < len(pairs) == sum(max(s) > min(s) for s in scores)
    generator = csm.load(folder)
    for pair in pairs:
        before, turn = pair["chosen"]
        i = texts.index(turn["text"])
        assert pair["rejected"][0] == before and before["text"] == "how are you today?"  # the voice
        for kind, j in (("chosen", np.argmax(scores[i])), ("rejected", np.argmin(scores[i]))):
            codes = np.load(tmp_path / "a" / pair[kind][1]["codes_path"])
            options = {"seed": 7 + 3 * i + int(j), "max_audio_length_ms": 800}
            np.testing.assert_array_equal(codes, generator.generate_codes(turn["text"], 0, **options))
            audio = soundfile.read(tmp_path / "a" / pair[kind][1]["audio_path"])[0]
            assert len(audio) == 1920 * len(codes)

    judged, calls = tuning_data.judged, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return judged(*args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(tuning_data, "judged", interrupted)
        with pytest.raises(SystemExit) as e:
            finetune.main([*args, str(tmp_path / "b")])
    assert e.value.code == 130 and not (tmp_path / "b/pairs.json").exists()
    finetune.main([*args, str(tmp_path / "b")])
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        finetune.main([*args, str(tmp_path / "b"), "--temperature", "0.5"])
    assert "has a different temperature" in capfd.readouterr().err
    for command in ("dpo", "kto"):
        more = ["--lora-rank", 4, "--lr", 1e-3, "--batch-size", 8, "--epochs", 1]
        (row,) = train(folder, tmp_path / "a/pairs.json", tmp_path / command, *more, command=command)
        assert abs(row["margin"]) < 1e-4


def test_a_judge_of_ones_own(folder, tmp_path, capfd):
    (tmp_path / "texts.txt").write_text("hello there\nyes")
    (tmp_path / "judge.py").write_text(
        "import sys; print('score', 1 if sys.argv[1].endswith('_1.wav') else len(sys.argv[2]) / 1e3)"
    )
    args = ["pairs", "--model", str(folder), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "o")]
    args += ["--samples", "3", "--voice", "none", "--max-audio-length-ms", "400"]
    with pytest.raises(SystemExit):
        finetune.main([*args, "--judge", f"{sys.executable} -c pass {{audio}}"])
    assert "--judge gave no number" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "o")
    finetune.main([*args, "--judge", f"{sys.executable} {tmp_path / 'judge.py'} {{audio}} {{text}}"])
    first, second = json.loads((tmp_path / "o/pairs.json").read_text())
    assert [t["audio_path"] for t in (*first["chosen"], *first["rejected"])] == ["00000_1.wav", "00000_0.wav"]
    assert json.loads((tmp_path / "o/scores.jsonl").read_text().splitlines()[1]) == [0.011, 1, 0.011]
    assert second["chosen"][0]["audio_path"] == "00001_1.wav"


def test_the_judge_in_the_box():
    r = np.random.default_rng(0)
    text, codes = "a sentence of forty letters, more or less", r.integers(0, 2048, (42, 32))
    audio = r.standard_normal(42 * 1920) * 0.1
    good = tuning_data.judged(text, codes, audio, True)
    assert good == 0
    silent = np.concatenate([audio[: 20 * 1920], np.zeros(22 * 1920)])
    bad = [
        tuning_data.judged(text, codes[:0], audio[:0], True),
        tuning_data.judged(text, codes[:10], audio[: 10 * 1920], True),
        tuning_data.judged(text, np.tile(codes, (4, 1)), np.tile(audio, 4), True),
        tuning_data.judged(text, np.repeat(codes[:2], 21, axis=0), audio, True),
        tuning_data.judged(text, codes, silent, True),
        tuning_data.judged(text, codes, audio, False),
    ]
    assert all(score < -0.1 for score in bad), bad
