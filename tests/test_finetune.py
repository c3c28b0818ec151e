"""Fine-tuning: the gradient is transformers', runs continue to the same bits, and what is learned comes out again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import csm  # first: it puts a fast BLAS in place before mlx is imported
import finetune

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
import soundfile
from mlx.utils import tree_flatten

from conftest import clip, write_model

HERE = Path(__file__).parent.parent


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


def train(model, data, out, *more, **kinds):
    args = [
        "train",
        "--model",
        model,
        "--data-path",
        data,
        "--output-dir",
        out,
        "--epochs",
        2,
        "--batch-size",
        2,
        *more,
    ]
    finetune.main([str(a) for a in args])
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def arguments(**more):
    """What `train` is given by default."""
    import argparse

    parsed = {}
    finetune.check, check = lambda args: parsed.update(vars(args)), finetune.check
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(finetune, "train", lambda args: None)
            finetune.main(["train", "--data-path", "x", "--output-dir", "y"])
    finally:
        finetune.check = check
    args = argparse.Namespace(**parsed | more)
    check(args)
    return args


# ------------------------------------------------------------------------------- the gradient


def test_gradient_is_transformers(plain, data, tmp_path):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import convert

    generator = csm.load(plain, dtype="float32")
    K = generator.model.config.audio_num_codebooks
    args = arguments(output_dir=tmp_path / "o", mask_speaker_ids=[1])
    talks = finetune.encode(generator, finetune.read_data(data)[:3], args)
    convert.convert(plain, tmp_path / "tf", to="transformers", dtype="float32")
    theirs = tf.CsmForConditionalGeneration.from_pretrained(tmp_path / "tf").train()
    n, T = sum(len(t.learned) for t in talks), max(len(t.rows) for t in talks)

    # Theirs, from embeddings: what their processor does with text and clips is compared in test_csm.py.
    rows = np.stack([np.pad(t.rows, [(0, T - len(t.rows)), (0, 0)]) for t in talks])
    labels = np.full((len(talks), T, K), -100)
    for b, t in enumerate(talks):
        labels[b, t.learned] = t.rows[t.learned, :K]
    is_text = torch.tensor(rows[..., K:] != csm.NO_TEXT)
    audio = theirs.backbone_model.embed_tokens(torch.tensor(rows[..., :K]).long())
    text = theirs.embed_text_tokens(torch.tensor(np.maximum(rows[..., K], 0)).long())
    out = theirs(inputs_embeds=torch.where(is_text, text, audio), labels=torch.tensor(labels))
    out.loss.backward()

    weights = mx.array([1 / n, 1 / (n * (K - 1))])

    def loss(model):
        first, rest = finetune.sums(model, *finetune.collate(talks, [t.learned for t in talks]))
        return (mx.stack([first, rest]) * weights).sum()

    value, gradient = nn.value_and_grad(generator.model, loss)(generator.model)
    assert abs(value.item() - out.loss.item()) < 1e-4
    named = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    assert not any(k.startswith("codec_model") for k in named)
    config = json.loads((plain / "config.json").read_text())
    expected = convert.csm_weights({k: mx.array(g.numpy()) for k, g in named.items()}, config)
    ours = csm.join_heads(dict(tree_flatten(gradient)))
    assert ours.keys() == expected.keys()
    for name, g in ours.items():
        scale = mx.linalg.norm(expected[name]).item()
        assert scale > 0 and mx.linalg.norm(g - expected[name]).item() <= 1e-3 * scale, name


def test_fraction_is_an_estimate_of_the_whole(plain, data, tmp_path):
    generator = csm.load(plain, dtype="float32")
    talks = finetune.encode(generator, finetune.read_data(data)[:1], arguments(output_dir=tmp_path))
    whole = finetune.sums(generator.model, *finetune.collate(talks, [talks[0].learned]))[1].item() / len(
        talks[0].learned
    )
    parts = []
    for seed in range(40):
        some = finetune.choose(talks[0], 0.25, seed)
        assert len(some) == round(0.25 * len(talks[0].learned)) and set(some) <= set(talks[0].learned)
        parts.append(finetune.sums(generator.model, *finetune.collate(talks, [some]))[1].item() / len(some))
    assert abs(np.mean(parts) - whole) < 3 * np.std(parts) / 40**0.5 + 1e-6 and np.std(parts) > 0


# ------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_continues_to_the_same_bits(plain, data, tmp_path, kind):
    more = ["--lora-rank", 4, "--lora-dropout", 0.1] if kind == "lora" else ["--lr", 1e-3]
    more += ["--ckpt-freq", 1, "--depth-fraction", 0.5, "--warmup-steps", 2, "--cosine", "--validation", 0.2]
    rows = train(plain, data, tmp_path / "a", *more)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["test"] > 0
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
        str(HERE / "finetune.py"),
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
    command = [launch, "-n", "2", "--python", sys.executable, HERE / "finetune.py", "train", "--model", plain]
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
    for (turn,) in finetune.read_data(data):
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
    (talk,) = finetune.read_data(tmp_path / "d.json")
    assert [(s.text, s.speaker) for s in talk] == [("text 1", 0), ("text 2", 12), ("text 10", 0)]
    assert [[(s.text, s.speaker) for s in t] for t in finetune.read_data(tmp_path / "raw")] == [
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
