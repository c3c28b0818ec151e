"""Fine-tuning: the gradient is transformers', runs continue to the same bits, and what is learned comes out again."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import csm  # first: it puts a fast BLAS in place before mlx is imported
from csm_tools import finetune, tuning_data

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
import soundfile
from mlx.utils import tree_flatten

from conftest import clip, write_model

HERE = Path(__file__).resolve().parents[1]


def write_data(folder, n=6, seconds=0.5):
    """n conversations of two turns as JSON and clips."""
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
    """Runs `finetune COMMAND`; returns the lines of its log."""
    args = [command, "--model", model, "--data-path", data, "--output-dir", out, "--epochs", 2, "--batch-size", 2]
    finetune.main([str(a) for a in [*args, *more]])
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def arguments(command="train", **more):
    """What `train`, `dpo` or `kto` is given by default."""
    parsed = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "train", parsed.append)
        finetune.main([command, "--data-path", "x", "--output-dir", "y"])
    finetune.check(parsed[0])
    for name, value in more.items():
        setattr(parsed[0], name, value)
    return parsed[0]


def write_pairs(folder, n=6, seconds=0.5, reverse=False):
    """n pairs for dpo and kto: the same context, then a text with one clip and with another."""
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
    """Each loss and its gradient, of a model that has moved from its reference, beside plain PyTorch."""
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import csm_layouts
    import convert

    weights = mx.load(str(plain / "model.safetensors"))
    key = mx.random.key(3)  # with which KTO's divergence is above 0
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
        args.first_codebook_weight_multiplier = 3.0
    source = data if command == "train" else preferences
    examples = tuning_data.encode(generator, tuning_data.read_data(source, command)[:5], args)
    if command == "kto":
        tuning_data.mismatch(generator, examples)
    run = finetune.Run(generator, examples, [], args)
    run.model.load_weights(list(csm.split_heads(moved).items()))
    row, gradient = run.measure(examples, 1, 0, key=(0, 0))

    def labelled(model, talk):
        """Theirs, from embeddings: what their processor does with text and clips is compared in test_csm.py."""
        rows = talk.rows[None]
        labels = np.full((1, len(talk.rows), K), -100)
        labels[0, talk.learned] = talk.rows[talk.learned, :K]
        audio = model.backbone_model.embed_tokens(torch.tensor(np.maximum(rows[..., :K], 0)).long())
        text = model.embed_text_tokens(torch.tensor(np.maximum(rows[..., K], 0)).long())
        is_text = torch.tensor(rows[..., K:] != csm.NO_TEXT)
        return model(inputs_embeds=torch.where(is_text, text, audio), labels=torch.tensor(labels))

    def nats(model, talk):
        """L of a conversation: the mean of its codebooks, the first three times."""
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
        loss = -torch.log(torch.sigmoid(margins)).mean()
        assert row["margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
        assert row["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    else:
        with torch.no_grad():
            kl = torch.stack([reward(e.other) for e in examples]).mean().clamp(min=0)
        parts = []
        for e in examples:
            r = reward(e.talks[0])
            parts.append(1.5 * (1 - torch.sigmoid(r - kl)) if e.wanted == 1 else 0.5 * (1 - torch.sigmoid(kl - r)))
        loss = torch.stack(parts).mean()
        assert row["kl"] == pytest.approx(kl.item(), rel=1e-3) and kl > 0.01
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    named = {k: p.grad for k, p in theirs[0].named_parameters() if p.grad is not None}
    assert not any(k.startswith("codec_model") for k in named)
    config = json.loads((tmp_path / f"tf_{plain.name}/config.json").read_text())
    named = {k: mx.array(g.numpy()) for k, g in named.items()}
    expected = csm_layouts.csm_to_native(config, named, asdict(csm.CSMConfig()))[1]
    ours = csm.join_heads(dict(tree_flatten(gradient)))
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


@pytest.mark.parametrize("command", ["dpo", "kto"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_sign(plain, tmp_path, command, kind):
    """What is chosen becomes likelier beside what is rejected; with the preference turned round, less likely."""
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
        assert rows[-1]["test_accuracy"] > 0.7
        # Said in another way: the nats that a code of the first clip has won, less those of the second.
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
    """What a code of a turn costs, mean over frames and codebooks."""
    context = csm.Segment(before["speaker"], before["text"], folder / before["audio_path"])
    said = csm.Segment(turn["speaker"], turn["text"], folder / turn["audio_path"])
    n, rows = len(generator.segment_rows(context)), np.concatenate([generator.segment_rows(s) for s in (context, said)])
    start = n + len(generator.text_rows(said.text, said.speaker))
    h = generator.model(mx.array(np.maximum(rows, 0))[None], csm.row_mask(mx.array(rows))[None])[0, start - 1 : -1]
    codes = mx.array(rows[start:, :-1])
    logits = mx.concatenate([generator.model.head(0, h)[:, None], generator.model.depth_logits(h, codes)], axis=1)
    return nn.losses.cross_entropy(logits, codes, reduction="mean").item()


# ------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_continues_to_the_same_bits(plain, data, tmp_path, kind):
    more = ["--lora-rank", 4, "--lora-dropout", 0.1] if kind == "lora" else ["--lr", 1e-3]
    more += ["--ckpt-freq", 1, "--depth-fraction", 0.5, "--warmup-steps", 2, "--cosine", "--validation", 0.2]
    rows = train(plain, data, tmp_path / "a", *more)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["test_loss"] > 0
    step = finetune.Run.step

    def interrupted(run):
        if run.n == 3:
            raise KeyboardInterrupt
        return step(run)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune.Run, "step", interrupted)
        with pytest.raises(SystemExit) as e:
            train(plain, data, tmp_path / "b", *more)
        assert e.value.code == 130
    again = train(plain, data, tmp_path / "b", *more)
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    name = "adapters.safetensors" if kind == "lora" else "model.safetensors"
    a, b = (mx.load(str(tmp_path / x / name)) for x in "ab")
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)
    with pytest.raises(SystemExit):  # another run than the checkpoint's
        train(plain, data, tmp_path / "b", *more, "--seed", 5)


def test_killed_while_writing(plain, data, tmp_path):
    """Ten times, at any moment: the run goes on."""
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
    reached = []
    for i in range(10):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as p:
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


def test_two_processes_are_one_with_the_doubled_batch(plain, data, tmp_path):
    one = train(plain, data, tmp_path / "one", "--batch-size", 4, "--lr", 1e-3, "--depth-fraction", 0.5)
    launch = Path(sys.executable).with_name("mlx.launch")
    command = [launch, "-n", "2", "--python", sys.executable, "-m", "csm_tools.finetune", "train", "--model", plain]
    command += [
        "--data-path",
        data,
        "--output-dir",
        tmp_path / "two",
        "--epochs",
        "2",
        "--batch-size",
        "2",
        "--lr",
        "1e-3",
    ]
    done = subprocess.run([*map(str, command), "--depth-fraction", "0.5"], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    two = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-4)


def test_accumulation_is_a_larger_batch(plain, data, tmp_path):
    one = train(plain, data, tmp_path / "one", "--batch-size", 4, "--lr", 1e-3)
    more = ["--batch-size", 2, "--gradient-accumulation-steps", 2, "--gradient-ckpt"]
    two = train(plain, data, tmp_path / "two", *more, "--lr", 1e-3)
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-5)


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
    for ((turn,),), _ in tuning_data.read_data(data):
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
    finetune.main(["fuse", str(tmp_path / "o"), str(tmp_path / "m")])
    np.testing.assert_array_equal(
        csm.load(tmp_path / "m", dtype="float32").generate_codes("hello there", 0, **options), codes
    )
    assert csm.main(["hello there", str(tmp_path / "a.wav"), "--model", str(plain), "--adapter", str(tmp_path / "o"),
                     "--max-audio-length-ms", "400"]) == 0  # fmt: skip
    with pytest.raises(SystemExit):
        csm.main(["hello", str(tmp_path / "b.wav"), "--model", str(plain), "--adapter", str(data.parent)])
    assert "has no adapter_config.json" in capfd.readouterr().err


def test_frozen_parts_stay(plain, data, tmp_path):
    before = mx.load(str(plain / "model.safetensors"))
    train(plain, data, tmp_path / "o", "--freeze-backbone", "--lr", 1e-3, "--optimizer", "sgd", "--depth-fraction", 1)
    after = mx.load(str(tmp_path / "o/model.safetensors"))
    assert after.keys() == before.keys()
    for name in after:
        same = mx.array_equal(before[name], after[name]).item()
        assert same == name.startswith(("backbone.", "codebook0_head", "text_embeddings")), name


# ------------------------------------------------------------------------------- data


def test_folders_are_read_in_natural_order(tmp_path, capfd):
    place = tmp_path / "raw/talk_1"
    place.mkdir(parents=True)
    for n, speaker in ((10, 0), (2, 12), (1, 0)):
        soundfile.write(place / f"{n}_speaker{speaker}_x.wav", clip(0.2), 24000)
        (place / f"{n}_speaker{speaker}_x.txt").write_text(f"text {n}\n")
    finetune.main(["dataset", str(tmp_path / "raw"), str(tmp_path / "d.json")])
    (((talk,), _),) = tuning_data.read_data(tmp_path / "d.json")
    assert [(s.text, s.speaker) for s in talk] == [("text 1", 0), ("text 2", 12), ("text 10", 0)]
    assert [[(s.text, s.speaker) for s in t] for (t,), _ in tuning_data.read_data(tmp_path / "raw")] == [
        [(s.text, s.speaker) for s in talk]
    ]
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
    assert e.value.code == 2 and "1_0.wav" in err and err.startswith("finetune.py: error: ")
    train(plain, data, tmp_path / "o", "--skip-bad", "--epochs", 1)
    assert "skipped:" in capfd.readouterr().err


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
    args = ["train", "--model", plain, "--data-path", data, "--output-dir", tmp_path / "o", "--epochs", "1", *more]
    try:
        finetune.main([str(a) for a in args])
    except SystemExit as e:
        err = capfd.readouterr().err
        assert e.code == 2 and message in err and err.count("\n") == 1, err
    else:
        assert not message
