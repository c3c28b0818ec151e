"""The watermark against Sony's package on random weights, and detected through files on hand-made weights.

We do not have Sony's weights, so what their mark survives is not measured here. If you have them, set
CSM_SILENTCIPHER to their folder.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import csm  # before mlx
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile
import soxr

from csm_tools import watermark

HERE = Path(__file__).resolve().parent.parent
MARK_24K = watermark.MARK * 24_000 / watermark.RATE  # samples of a mark at 24 kHz
PARTS = ("enc_c", "dec_c", "dec_m_0")
PARAMETERS = """
N_FFT: 4096
HOP_LENGTH: 2048
SR: 44100
n_messages: 1
model_type: n_fft
message_dim: 5
message_len: 21
message_band_size: 1024
message_sdr: 47
enc_n_layers: 3
dec_c_n_layers: 4
frame_level_normalization: false
utterance_level_normalization: true
ensure_negative_message: true
ensure_constrained_message: false
no_normalization: false
"""


def speech(*names):
    """Speech of espeak-ng's voices, one after the other: (samples,) at 24 kHz."""
    return np.concatenate([mimi.read_audio(HERE / f"tests/clips/{name}.wav") for name in names or ("bright", "deep")])


def espeak(voice, path):
    text = "The north wind and the sun were disputing which was the stronger."
    subprocess.run(["espeak-ng", "-v", voice, "-w", path, text], check=True)
    return mimi.read_audio(path)


# ---- weights by hand: a symbol s thins out every fifth stripe of four bins, and is read off where little is left


def blank(c_in, c_out, k=3):
    """A layer of zeros with an open gate."""
    return {
        "conv.weight": np.zeros((c_out, c_in, k, k)), "conv.bias": np.zeros(c_out), "bn.weight": np.ones(c_out),
        "gate.weight": np.zeros((c_out, c_in, k, k)), "gate.bias": np.full(c_out, 20.0), "bn.bias": np.zeros(c_out),
    }  # fmt: skip


def by_hand(encoded=1, hidden=1, width=5):
    """State dicts of the three networks, zero but for what is needed, with the package's channels or just enough."""
    stripe = np.arange(1024) // 4 % 5  # the symbol of a bin
    encoder = [blank(1, encoded), blank(encoded, encoded), blank(encoded, encoded)]
    decoder = [blank(3 * encoded, hidden), blank(hidden, hidden), blank(hidden, hidden), blank(hidden, 1, k=1)]
    share = 1024 / 5 / 2049  # of the bins have the symbol: the mean that normalization subtracts
    for i, layer in enumerate(decoder):  # passes the message through
        middle = layer["conv.weight"].shape[-1] // 2
        layer["conv.weight"][0, 0 if i else 2 * encoded, middle, middle] = 1
        layer["bn.weight"][:], layer["bn.bias"][:] = (share * (1 - share)) ** 0.5, share
    detector = [blank(1, width), *(blank(width, width) for _ in range(8)), blank(width, 5)]
    for j, small in enumerate((0.02, 0.05, 0.1, 0.2, 0.4)):  # 1 where the magnitude is below, 0 where it is above
        detector[0]["conv.bias"][j], detector[0]["gate.bias"][j] = 1, 3
        detector[0]["gate.weight"][j, 0, 1, 1] = -3 / small
    for s in range(5):  # symbol s comes from 4 * (s - 2) bins above, since the bins are weighted for all symbols alike
        for i, layer in enumerate(detector[1:9]):
            step = np.sign(s - 2) if i < 4 * abs(s - 2) else 0
            layer["conv.weight"][s, range(5) if i == 0 else s, 1 + step, 1] = 1
        detector[9]["conv.weight"][s, s, 1, 1] = 1
    bins = np.where(np.arange(1024) < 200, 0, np.where(stripe == 2, 0.04, -0.01))
    states = [
        {
            f"main.{2 * i + 1 if layers is detector else i}.{key}": w
            for i, x in enumerate(layers)
            for key, w in x.items()
        }
        for layers in (encoder, decoder, detector)
    ]
    states[0] |= {"linear.weight": stripe[:, None] == np.arange(5), "linear.bias": np.zeros(1024)}
    states[2] |= {"linear.weight": bins[None], "linear.bias": np.zeros(1)}
    return [{name: np.asarray(w, np.float32) for name, w in state.items()} for state in states]


@pytest.fixture(scope="module")
def small():
    return watermark.Watermark(*({name: mx.array(w) for name, w in state.items()} for state in by_hand()))


@pytest.fixture(scope="module")
def marked(small):
    """4.9 s at 24 kHz."""
    return small.embed(speech())


def test_a_gpu_is_waited_for_every_16_frames(small, marked, monkeypatch):
    sound, counts, evaluate = speech()[:72_000], [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *x: counts.append(0) or evaluate(*x))
    plain, n_plain = small.embed(sound), len(counts)
    counts.clear()
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)  # its convolution and its steps, on this device
    np.testing.assert_allclose(small.embed(sound), plain, atol=1e-5)
    assert 0 < len(counts) < n_plain / 8


# ---- Sony's package


def package(folder, fill):
    """The package's model and ours, both read from a folder of weights set by fill(the package's networks)."""
    torch = pytest.importorskip("torch")
    silentcipher = pytest.importorskip("silentcipher")
    from argparse import Namespace

    from silentcipher import model

    config = Namespace(ensure_negative_message=True, no_normalization=False)
    parts = [model.Encoder(32, 3, 5, 1024, 4096), model.CarrierDecoder(config, 96, 4), model.MsgDecoder(5, 1024)]
    with torch.no_grad():
        fill(parts)
    for name, part in zip(PARTS, parts):
        state = {f"module.{key}": w for key, w in part.state_dict().items()}
        torch.save(state, folder / f"{name}.ckpt")
    (folder / "hparams.yaml").write_text(PARAMETERS)
    theirs = silentcipher.get_model("44.1k", ckpt_path=str(folder), config_path=str(folder / "hparams.yaml"))
    return theirs, watermark.load(folder)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    torch = pytest.importorskip("torch")

    def fill(parts):
        generator = torch.Generator().manual_seed(0)
        for part in parts:
            for name, w in part.named_parameters():
                w.uniform_(-1, 1, generator=generator)
                w.mul_(0.5 if ".bn." in name else 1 / w[0].numel() ** 0.5 if w.ndim > 1 else 0.3)
                if name.endswith("bn.weight"):
                    w.add_(1)

    return package(tmp_path_factory.mktemp("random"), fill)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch = pytest.importorskip("torch")

    def fill(parts):
        for part, state in zip(parts, by_hand(32, 96, 128)):
            part.load_state_dict({name: torch.tensor(w) for name, w in state.items()}, strict=False)

    return package(tmp_path_factory.mktemp("by-hand"), fill)


def clip(case):
    """A case's sound (samples,) and sample rate."""
    long = np.tile(speech(), 5)
    return {
        "1 s": (soxr.resample(long, 24_000, 44_100)[:44_100], 44_100),
        "3 s": (long[: 3 * 24_000], 24_000),
        "20 s": (soxr.resample(long, 24_000, 44_100)[: 20 * 44_100], 44_100),
        "odd at 16 kHz": (soxr.resample(long, 24_000, 16_000)[4_000:25_111], 16_000),
        "odd at 48 kHz": (soxr.resample(long, 24_000, 48_000)[12_345:72_346], 48_000),
        "whole frames": (soxr.resample(long, 24_000, 44_100)[: 8 * 4096], 44_100),
        "short": (long[9_000:9_777], 24_000),
        "clipped": (np.clip(long[:30_000] * 20, -1, 1), 24_000),
        "half silent": (np.concatenate([np.zeros(20_000, np.float32), long[:20_000]]), 24_000),
        "silent": (np.zeros(30_000, np.float32), 24_000),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "1 s",
        "3 s",
        "20 s",
        "odd at 16 kHz",
        "odd at 48 kHz",
        "whole frames",
        "short",
        "clipped",
        "half silent",
        "silent",
    ],
)
def test_marks_as_the_package_does(random, case):
    theirs, ours = random
    audio, rate = clip(case)
    expected, _ = theirs.encode_wav(audio, rate, list(watermark.SESAME), message_sdr=36, calc_sdr=False)
    got = ours.embed(audio, rate)
    assert got.shape == audio.shape and got.dtype == np.float32
    assert np.abs(got - expected[: len(audio)]).max() <= 1e-4 * np.abs(expected).max()  # theirs can be a sample longer
    if case != "silent":
        assert np.abs(got - audio).max() > 1e-3 * np.abs(audio).max()  # and it is marked


def test_another_message_and_level(random):
    theirs, ours = random
    audio, rate = clip("1 s")
    expected, _ = theirs.encode_wav(audio, rate, [0, 255, 1, 128, 77], message_sdr=30, calc_sdr=False)
    got = ours.embed(audio, rate, message=(0, 255, 1, 128, 77), sdr=30)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["1 s", "whole frames"])
def test_logits_are_the_packages(random, case):
    torch = pytest.importorskip("torch")
    theirs, ours = random
    audio, rate = clip(case)
    audio = soxr.resample(audio, rate, watermark.RATE)
    with torch.no_grad():
        scaled = torch.tensor(audio * np.sqrt(watermark.POWER / np.mean(audio**2)))
        magnitude, _ = theirs.stft.transform(scaled[None])
        expected = theirs.dec_m[0](magnitude[:, None])[0, 0].T.numpy()  # (T, 5)
    got = ours.logits(audio)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_each_finds_the_others_mark(whole):
    theirs, ours = whole
    audio = soxr.resample(speech("bright"), 24_000, watermark.RATE)
    message = (7, 77, 177, 0, 255)
    by_theirs, _ = theirs.encode_wav(audio, watermark.RATE, list(message), message_sdr=36)
    for marked in (ours.embed(audio, watermark.RATE, message), by_theirs):
        found, _ = ours.read(marked)
        expected = theirs.decode_wav(marked, watermark.RATE, phase_shift_decoding=False)
        assert found.message == message == tuple(expected["messages"][0])
        assert found.confidence == pytest.approx(expected["confidences"][0])


def test_the_ways_of_the_devices_agree(monkeypatch):
    keys = mx.random.split(mx.random.key(0), 5)
    frames, weight, bias = [mx.random.normal((7, 4), key=k) for k in keys[:3]], (3, 3, 4, 6), (6,)
    weight, bias = mx.random.normal(weight, key=keys[3]), mx.random.normal(bias, key=keys[4])
    products = watermark.convolve(frames, weight, bias)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert products.shape == (7, 6)
    assert mx.allclose(products, watermark.convolve(frames, weight, bias), atol=1e-5)


# ---- pieces


def test_a_stream_is_marked_mark_by_mark(small):
    audio = speech("bright")
    expected = [
        small.embed(audio[i : i + watermark.MARK], watermark.RATE) for i in range(0, len(audio), watermark.MARK)
    ]
    cuts = [0, 1, 1000, 1001, 30_000, len(audio)]
    pieces = [mx.array(audio[a:b]) for a, b in itertools.pairwise(cuts)]
    got = [*small.embed_stream(pieces, watermark.RATE)]
    assert np.array_equal(np.concatenate(got), np.concatenate(expected))


@pytest.mark.parametrize("rate", [24_000, 48_000, 16_000])
@pytest.mark.parametrize("n", [0, 1, 5_000, 23_406, 23_407, 50_003])
def test_as_many_samples_about_a_second_later(small, n, rate):
    given = taken = 0
    ahead = [0]

    def pieces():
        nonlocal given
        for piece in np.split(np.resize(speech("deep"), n), range(1_920, n, 1_920)):
            given += len(piece)
            yield piece
            ahead.append(given - taken)

    for out in small.embed_stream(pieces(), rate):
        taken += len(out)
    assert taken == n
    assert max(ahead) <= (MARK_24K / 24_000 + 0.02) * rate + 1_920


def test_what_a_stream_marked_is_found(small):
    audio = speech()
    marked = np.concatenate([*small.embed_stream(np.array_split(audio, 37))])
    found = small.detect(marked)
    assert found.message == watermark.SESAME and found.confidence > 0.9


def test_long_audio_goes_in_pieces(small, marked, monkeypatch):
    """Memory is bounded, and the symbols continue."""
    monkeypatch.setattr(watermark, "WHOLE", 2)
    audio = soxr.resample(speech(), 24_000, watermark.RATE)
    pieces = [audio[i : i + 2 * watermark.MARK] for i in range(0, len(audio), 2 * watermark.MARK)]
    got = small.embed(audio, watermark.RATE)
    assert np.array_equal(got, np.concatenate([small.embed(piece, watermark.RATE) for piece in pieces]))
    assert small.detect(got, watermark.RATE).message == watermark.SESAME
    assert small.detect(marked).message == watermark.SESAME


# ---- what a mark survives, of the weights by hand


def through_file(audio, path, **how):
    soundfile.write(path, audio, 24_000, **how)
    return mimi.read_audio(path)[: len(audio)]


CHANGES = {
    "wav": lambda x, path: through_file(x, path / "a.wav", subtype="PCM_16"),
    "flac": lambda x, path: through_file(x, path / "a.flac", subtype="PCM_16"),
    "mp3 of 64 kbit/s": lambda x, path: through_file(
        x, path / "a.mp3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.632
    ),
    "16 kHz and back": lambda x, path: soxr.resample(soxr.resample(x, 24_000, 16_000), 16_000, 24_000),
    "a tenth as loud": lambda x, path: x * 0.1,
    "a sample cut off": lambda x, path: x[1:],
    "half a frame cut off": lambda x, path: x[557:],
    "a quarter of a second cut off": lambda x, path: x[6_011:-5_000],
    "said after silence": lambda x, path: np.concatenate([np.zeros(31_337, np.float32), x]),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_the_mark_is_found(small, marked, change, tmp_path):
    changed = CHANGES[change](marked, tmp_path)
    if change == "mp3 of 64 kbit/s":
        assert (tmp_path / "a.mp3").stat().st_size * 8 < 67_000 * len(marked) / 24_000
    found = small.detect(changed)
    assert found.message == watermark.SESAME and found.confidence > 0.8


@pytest.mark.slow
def test_any_message_and_level(small):
    for message, sdr in (((0, 0, 0, 0, 0), 30), ((255, 255, 255, 255, 255), 36), ((1, 2, 3, 4, 250), 42)):
        found = small.detect(small.embed(speech(), message=message, sdr=sdr))
        assert found.message == message and found.confidence > 0.8


@pytest.mark.slow
def test_unmarked_speech_has_none(small, tmp_path):
    for voice in ("en-us", "fr+f3"):
        assert small.detect(espeak(voice, tmp_path / "a.wav")) is None
    assert small.detect(speech("deep")) is None
    assert small.detect(np.zeros(60_000, np.float32)) is None
    assert small.detect(np.zeros(0, np.float32)) is None
    assert small.detect(speech()[:10_000]) is None  # no mark fits in


# ---- mistakes and the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder like the Hub's, with the small networks."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("weights")
    (folder / watermark.FOLDER).mkdir(parents=True)
    for name, state in zip(PARTS, by_hand()):
        tensors = {f"module.{key}": torch.tensor(w) for key, w in state.items()}
        torch.save(tensors, folder / watermark.FOLDER / f"{name}.ckpt")
    return folder


def test_mistakes(small, weights, tmp_path):
    with pytest.raises(ValueError, match="five numbers from 0 to 255"):
        small.embed(speech(), message=(1, 2, 3))
    with pytest.raises(ValueError, match="five numbers from 0 to 255"):
        small.embed(speech(), message=(1, 2, 3, 4, 256))
    with pytest.raises(ValueError, match=r"must be \(samples,\)"):
        small.embed(np.zeros((2, 100)))
    with pytest.raises(ValueError, match="NaN"):
        small.detect(np.full(100, np.nan))
    with pytest.raises(ValueError, match=r"no weights for the watermark in .* no such file"):
        watermark.load(tmp_path)
    for name in PARTS:
        (tmp_path / f"{name}.ckpt").write_bytes((weights / watermark.FOLDER / "enc_c.ckpt").read_bytes())
    with pytest.raises(ValueError, match="no weights for the watermark"):
        watermark.load(tmp_path)


def test_command(weights, tmp_path, capsys):
    clear, marked = tmp_path / "clear.wav", tmp_path / "marked.flac"
    mimi.write_audio(clear, speech())
    assert watermark.main(["embed", str(clear), str(marked), "--weights", str(weights)]) == 0
    assert (soundfile.info(marked).samplerate, soundfile.info(marked).frames) == (24_000, len(speech()))
    assert watermark.main(["detect", str(marked), "--weights", str(weights)]) == 0
    assert "CSM's mark: 212 211 146 56 201, confidence 0.9" in capsys.readouterr().out
    assert watermark.main(["detect", str(clear), "--weights", str(weights)]) == 1
    assert capsys.readouterr().out == "no mark\n"
    watermark.main(["embed", str(clear), str(marked), "--weights", str(weights), "--message", *"12345"])
    watermark.main(["detect", str(marked), "--weights", str(weights)])
    assert "a mark, not CSM's: 1 2 3 4 5" in capsys.readouterr().out
    for arguments, match in (
        (["detect", str(tmp_path / "none.wav")], "no such file"),
        (["embed", str(clear)], "embed IN OUT"),
        (["embed", str(clear), str(tmp_path / "a.xyz")], "suffix"),
        (["embed", str(clear), str(tmp_path / "a.wav"), "--message", "1", "2", "3", "4", "256"], "five numbers"),
        (["embed", str(clear), str(tmp_path / "a.wav"), "--message", "1"], "--message"),
    ):
        with pytest.raises(SystemExit) as e:
            watermark.main([*arguments, "--weights", str(weights)])
        error = capsys.readouterr().err
        assert e.value.code == 2 and match in error and error.count("\n") == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["clear.wav", "marked.flac"]


def test_without_the_weights_there_is_an_error_and_no_file(tmp_path):
    mimi.write_audio(tmp_path / "clear.wav", speech("deep"))
    ran = subprocess.run(
        [sys.executable, "-m", "csm_tools.watermark", "embed", tmp_path / "clear.wav", tmp_path / "marked.wav"],
        cwd=HERE, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 2 and "no weights for the watermark in sony/silentcipher" in ran.stderr.splitlines()[-1], (
        ran.stderr
    )
    assert not (tmp_path / "marked.wav").exists() and "--model tiny" not in ran.stderr


@pytest.fixture(scope="module")
def hub(weights, tmp_path_factory):
    """An environment in which the Hub's repository has those weights."""
    cache = tmp_path_factory.mktemp("hub")
    place = cache / "hub/models--sony--silentcipher"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    shutil.copytree(weights, place / "snapshots" / ("0" * 40))
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}


TEXT = "The cat sat on the mat, and the dog went to the market. Then they came home again, and had a good dinner."


def test_the_command_marks_what_it_says(small, hub, tmp_path):
    command = [sys.executable, "csm.py", TEXT, tmp_path / "a.wav", "--model", "tiny", "--seed", "3", "--watermark"]
    command += ["--whole", "--verbatim"]  # as `generate` says it
    subprocess.run(command, cwd=HERE, env=hub, check=True, capture_output=True)
    said = np.array(csm.load("tiny").generate(TEXT, seed=3))
    audio, expected = mimi.read_audio(tmp_path / "a.wav"), np.concatenate([*small.embed_stream([said])])
    assert np.abs(audio - expected).max() < 2 / 32768 and small.detect(audio).message == watermark.SESAME


def test_the_server_marks_what_it_says(small, hub, tmp_path):
    httpx = pytest.importorskip("httpx")
    command = [sys.executable, "-m", "csm_tools.serve", "--model", "tiny", "--port", "0", "--watermark"]
    with subprocess.Popen(command, cwd=HERE, env=hub, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(line for line in server.stderr if line.startswith("ready: ")).split()[1]
            # With this seed the networks made by hand read every symbol.
            request = {"input": TEXT, "voice": "ash", "seed": 7, "model": "csm", "response_format": "pcm"}
            for _ in range(2):
                answer = httpx.post(f"{address}/v1/audio/speech", json=request, timeout=600)
                audio = np.frombuffer(answer.content, "<i2") / np.float32(32767)
                assert small.detect(audio).message == watermark.SESAME
            with httpx.stream("POST", f"{address}/v1/audio/speech", json=request, timeout=600) as answer:
                next(answer.iter_bytes())  # and leaves
            bad = httpx.post(f"{address}/v1/audio/speech", json=request | {"input": ""}, timeout=600)
            assert bad.status_code == 400
            while httpx.get(f"{address}/health").json()["live"]:
                pass
        finally:
            server.terminate()
    assert server.returncode in (0, -15, 143)


@pytest.mark.skipif("CSM_SILENTCIPHER" not in os.environ, reason="CSM_SILENTCIPHER names no folder with Sony's weights")
def test_sonys_weights(tmp_path):
    silentcipher = pytest.importorskip("silentcipher")
    folder = Path(os.environ["CSM_SILENTCIPHER"])
    folder = folder / watermark.FOLDER if (folder / watermark.FOLDER).is_dir() else folder
    ours = watermark.load(folder)
    theirs = silentcipher.get_model("44.1k", ckpt_path=str(folder), config_path=str(folder / "hparams.yaml"))
    audio = speech("bright", "deep", "old")
    marked = ours.embed(audio)
    expected, _ = theirs.encode_wav(audio, 24_000, list(watermark.SESAME), message_sdr=36, calc_sdr=False)
    assert np.abs(marked - expected[: len(audio)]).max() <= 1e-4 * np.abs(expected).max()
    assert theirs.decode_wav(marked, 24_000, False)["messages"][0] == list(watermark.SESAME)
    for change in CHANGES:
        found = ours.detect(CHANGES[change](marked, tmp_path))
        assert found and found.message == watermark.SESAME, change
    assert ours.detect(audio) is None
