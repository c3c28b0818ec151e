"""Codes of clips in shards on disk: none are computed twice, read needlessly, or lost."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import csm  # before mlx
import mimi
from conftest import clip
from csm_tools import code_shards, tuning_data
from test_finetune import arguments, train

HERE = Path(__file__).resolve().parents[1]


def codes(n, K=4, seed=0):
    return np.random.default_rng(seed).integers(0, 2000, (n, K))


def test_what_is_added_is_read_again(tmp_path, monkeypatch):
    """Codes of several lengths, including 0, from memory and disk, from arrays in C and Fortran order."""
    monkeypatch.setattr(code_shards, "N_CLIPS", 3)
    made = {bytes([i]) * 16: codes(n, seed=i) for i, n in enumerate((3, 0, 125, 1, 7))}
    shards = code_shards.Shards(tmp_path)
    for key, value in made.items():
        shards.add(key, np.asfortranarray(value))
        np.testing.assert_array_equal(shards.get(key), value)
    assert len(list(tmp_path.glob("shard-*.npy"))) == 1  # and two clips wait
    shards.flush()
    shards.flush()
    assert len(list(tmp_path.iterdir())) == 2 and not any(
        isinstance(c.place, np.ndarray) for c in shards.found.values()
    )
    for held in (shards, code_shards.Shards(tmp_path)):
        for key, value in made.items():
            found = held.get(key)
            assert len(found) == len(value) and found.key == key and np.array(found).dtype == np.int32
            np.testing.assert_array_equal(found, value)
        assert held.get(b"x" * 16) is None


def test_wide_codes_and_other_numbers_of_codebooks(tmp_path):
    shards = code_shards.Shards(tmp_path)
    made = {b"a" * 16: codes(5, 4), b"b" * 16: codes(5, 8), b"c" * 16: np.array([[70_000, 1, 2, 3]])}
    for key, value in made.items():
        shards.add(key, value)
    shards.flush()
    again = code_shards.Shards(tmp_path)
    for key, value in made.items():
        np.testing.assert_array_equal(again.get(key), value)


def test_a_damaged_shard_is_said_and_left_out(tmp_path, capfd):
    shards = code_shards.Shards(tmp_path)
    shards.add(b"a" * 16, codes(9))
    shards.flush()
    held = shards.get(b"a" * 16)
    (path,) = tmp_path.glob("shard-*.npy")
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:200], whole[:7], b"", b"not an array at all", whole[:128]):
        path.write_bytes(content)
        assert code_shards.Shards(tmp_path).get(b"a" * 16) is None
        err = capfd.readouterr().err
        assert "is damaged" in err and "encoded again" in err and err.count("\n") == 1, err
    path.write_bytes(whole[:150])
    with pytest.raises(ValueError, match="was cut off while it was read"):
        np.array(held)
    path.write_bytes(whole)
    np.testing.assert_array_equal(code_shards.Shards(tmp_path).get(b"a" * 16), codes(9))
    (tmp_path / "files.npy").write_bytes(b"broken")
    assert code_shards.Shards(tmp_path).files == {}


def test_a_key_is_of_the_content_and_of_the_codec(tmp_path):
    shards = code_shards.Shards(tmp_path / "s")
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    a.write_bytes(b"sound")
    b.write_bytes(b"sound")
    assert shards.key_of(a, b"codec") == shards.key_of(b, b"codec") != shards.key_of(a, b"another")
    before = shards.key_of(a, b"codec")
    a.write_bytes(b"noise")  # the same length
    os.utime(a, ns=(1, 1))
    assert shards.key_of(a, b"codec") != before
    with pytest.raises(OSError):
        shards.key_of(tmp_path / "none", b"codec")


@pytest.fixture
def clips(tmp_path):
    """Five conversations of one clip each; two clips are the same."""
    (tmp_path / "d").mkdir()
    items = []
    for i in range(5):
        soundfile.write(tmp_path / f"d/{i}.wav", clip(0.6 + 0.1 * i, seed=i % 4) + np.float32(0.01), 24000)
        items.append({"text": "hello there now", "audio_path": f"{i}.wav"})
    soundfile.write(tmp_path / "d/4.wav", mimi.read_audio(tmp_path / "d/0.wav"), 24000)
    (tmp_path / "d/data.jsonl").write_text("\n".join(map(json.dumps, items)))
    return tmp_path / "d/data.jsonl"


def test_clips_are_encoded_and_read_once(folder, clips, tmp_path, monkeypatch):
    """A second start encodes and reads nothing; a touched clip is read again; a new text changes nothing."""
    generator, args = csm.load(folder, dtype="float32"), arguments(output_dir=tmp_path / "o")
    encoded, read = [], []
    encode, read_bytes = csm.Generator.encode, Path.read_bytes
    monkeypatch.setattr(csm.Generator, "encode", lambda self, s: encoded.append(s) or encode(self, s))
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name) or read_bytes(self))

    def start():
        encoded.clear()
        read.clear()
        examples = tuning_data.encode(generator, tuning_data.read_data(clips), args)
        wavs = sum(name.endswith(".wav") for name in read)
        return len(encoded), wavs, [e.talks[0].rows.tolist() for e in examples]

    n, wavs, rows = start()
    assert (n, wavs) == (4, 5)
    assert start() == (0, 0, rows)
    os.utime(clips.with_name("2.wav"), ns=(1, 1))
    assert start() == (0, 1, rows)
    assert start() == (0, 0, rows)
    clips.write_text(clips.read_text().replace("there", "hello", 1))
    n, wavs, other = start()
    assert (n, wavs) == (0, 0) and other != rows
    args.codes, args.output_dir = tmp_path / "o/codes", tmp_path / "another run"
    assert start() == (0, 0, other)


def test_an_interruption_keeps_what_is_encoded(folder, clips, tmp_path, monkeypatch):
    generator, args = csm.load(folder, dtype="float32"), arguments(output_dir=tmp_path / "o")
    encode, done = csm.Generator.encode, []

    def interrupted(self, segment):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(segment)
        return encode(self, segment)

    monkeypatch.setattr(csm.Generator, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning_data.encode(generator, tuning_data.read_data(clips), args)
    assert len(code_shards.Shards(tmp_path / "o/codes").found) == 3
    monkeypatch.setattr(csm.Generator, "encode", lambda self, s: done.append(s) or encode(self, s))
    tuning_data.encode(generator, tuning_data.read_data(clips), args)
    assert len(done) == 4


def test_another_codec_has_other_codes(folder, clips, tmp_path):
    generator = csm.load(folder, dtype="float32")
    mark = tuning_data.codec_mark(generator)
    assert mark == tuning_data.codec_mark(csm.load(folder, dtype="float32"))
    generator.mimi.downsample.weight = generator.mimi.downsample.weight * 1.01
    assert tuning_data.codec_mark(generator) != mark


def test_codes_stay_on_disk(folder, tmp_path):
    """2 000 conversations of 10 s take less memory than their codes, 2 MB, and give the right rows."""
    generator, args = csm.load(folder, dtype="float32"), arguments(output_dir=tmp_path / "o")
    items, made = [], {}
    for i in range(20):
        made[i] = np.random.default_rng(i).integers(0, 64, (125, 8))
        np.save(tmp_path / f"{i}.npy", made[i])
    for i in range(2000):
        items.append({"text": "hello there " * 9 + str(i), "codes_path": f"{i % 20}.npy", "speaker": 0})
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, items)))
    data = tuning_data.read_data(tmp_path / "d.jsonl")
    tuning_data.encode(generator, data[:20], args)  # one-time work
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    examples = tuning_data.encode(generator, data, args)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 2000 * 125 * 8  # bytes: half of what int16 would take, a quarter of the rows
    for i in (0, 19, 1234):
        talk = examples[i].talks[0]
        np.testing.assert_array_equal(talk.rows[talk.learned[:-1], :8], made[i % 20])
        assert not talk.rows[talk.learned[-1], :8].any() and len(talk.rows) == talk.n_rows


def test_two_runs_at_once_share_a_folder(folder, clips, tmp_path):
    command = [sys.executable, "-m", "csm_tools.finetune", "train", "--model", folder, "--data-path", clips]
    command += ["--codes", tmp_path / "codes", "--lora-rank", 2, "--epochs", 1, "--sample-texts", "none"]
    command += ["--codec-clips", 0]
    runs = [subprocess.Popen([*map(str, [*command, "--output-dir", tmp_path / name])], cwd=HERE) for name in "ab"]
    assert [run.wait() for run in runs] == [0, 0]
    train(folder, clips, tmp_path / "c", "--codes", tmp_path / "codes", "--lora-rank", 2, "--epochs", 1)
    assert len(code_shards.Shards(tmp_path / "codes").found) == 4
    assert not list((tmp_path / "codes").glob(".*")) and not (tmp_path / "a/codes").exists()


def test_codes_that_the_model_does_not_have_are_named(folder, tmp_path, capfd):
    made = {"high": np.full((3, 8), 99), "few": codes(3, 1), "text": np.ones(3), "flat": codes(3)[0]}
    for name, value in made.items():
        np.save(tmp_path / f"{name}.npy", value)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    names = (*made, "broken")
    (tmp_path / "d.json").write_text(json.dumps([{"text": "hello", "codes_path": f"{name}.npy"} for name in names]))
    with pytest.raises(SystemExit) as e:
        train(folder, tmp_path / "d.json", tmp_path / "o")
    err = capfd.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 6
    for name, line in zip(names, err):
        assert f"{name}.npy is not an .npy" in line
