"""Limits against strangers: clips, connections, bodies, and the watermark of many streams."""

import base64
import io
import json
import logging
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import csm  # before mlx

av, httpx = (pytest.importorskip(name) for name in ("av", "httpx"))
serve = pytest.importorskip("csm_tools.serve")
from csm_tools import serve_files, serve_network, serve_requests, serve_voices
from test_serve import CLIP, HERE, SAID, TEXT, running


def encoded(audio, rate, container, codec, layout="mono", **options):
    """Encode channels (C, samples) int16 to a file's bytes with PyAV."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options) as file:
        track = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T.reshape(1, -1)), format="s16", layout=layout)
        frame.rate = rate
        for part in av.AudioResampler(track.format.name, layout, rate, frame_size=track.frame_size).resample(frame):
            file.mux(track.encode(part))
        file.mux(track.encode(None))
    return out.getvalue()


def speech(rate=24_000):
    audio = soundfile.read(CLIP, dtype="int16")[0]
    import soxr

    return audio if rate == 24_000 else soxr.resample(audio, 24_000, rate)


# ------------------------------------------------------------------------------------------------------ clips


@pytest.mark.parametrize("container, codec, rate", [
    ("wav", "pcm_s16le", 24_000), ("wav", "pcm_s16le", 44_100), ("flac", "flac", 48_000), ("mp3", "libmp3lame", 44_100),
    ("ogg", "libopus", 48_000), ("ipod", "aac", 44_100), ("adts", "aac", 48_000), ("webm", "libopus", 48_000),
])  # fmt: skip
def test_clips_of_every_container(container, codec, rate):
    audio = speech(rate)
    got = serve_files.read_clip(encoded(np.stack([audio, audio]), rate, container, codec, "stereo"))
    want = speech() / 32768
    assert got.dtype == np.float32 and abs(len(got) - len(want)) < 3_000  # some encoders add silence
    n = min(len(got), len(want))
    alike = np.fft.irfft(np.fft.rfft(got[:n], 2 * n) * np.conj(np.fft.rfft(want[:n], 2 * n))).max()
    assert alike > 0.95 * np.linalg.norm(got) * np.linalg.norm(want)
    if (codec, rate) == ("pcm_s16le", 24_000):
        np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("codec, layout, n", [("pcm_s16le", "3.0", 3), ("flac", "5.1", 6), ("pcm_s16le", "7.1", 8)])
def test_clips_of_many_channels(codec, layout, n):
    container = "flac" if codec == "flac" else "wav"
    rng = np.random.default_rng(0)
    audio = rng.integers(-9_000, 9_000, (n, 24_000)).astype(np.int16)
    got = serve_files.read_clip(encoded(audio, 24_000, container, codec, layout))
    np.testing.assert_allclose(got, audio.mean(axis=0) / 32768, atol=1e-6)


def test_a_clip_of_the_servers_own_whose_length_nobody_knew():
    for format in ("flac", "wav"):
        encode = serve_files.Encoder(format, 24_000, 1)
        data = b"".join(encode(piece) for piece in (*np.array_split(speech(), 9), None))
        np.testing.assert_allclose(serve_files.read_clip(data), speech() / 32768, atol=1e-7)


def bad_clips():
    silence = np.zeros((1, 24_000), np.int16)
    rate = bytearray(encoded(silence, 24_000, "wav", "pcm_s16le"))
    rate[24:28] = (655_350).to_bytes(4, "little")
    channels = bytearray(encoded(silence, 24_000, "wav", "pcm_s16le"))
    channels[22:24], channels[32:34] = (200).to_bytes(2, "little"), (400).to_bytes(2, "little")
    both = bytearray(encoded(np.zeros((8, 9_000), np.int16), 24_000, "wav", "pcm_s16le", "7.1"))
    at = both.index(b"fmt ") + 12
    both[at : at + 4] = (192_000).to_bytes(4, "little")
    coding = bytearray(encoded(silence, 24_000, "wav", "pcm_s16le"))
    coding[20:22] = (0x7777).to_bytes(2, "little")
    nan = io.BytesIO()
    soundfile.write(nan, np.full(24_000, np.nan), 24_000, format="WAV", subtype="FLOAT")
    long = io.BytesIO()
    soundfile.write(long, np.zeros(61 * 24_000), 24_000, format="FLAC")
    return {
        "Hz": bytes(rate), "200 channels": bytes(channels), "8 channels at 192000 Hz": bytes(both),
        "not known here": bytes(coding), "NaN": nan.getvalue(), "may last 60 s": long.getvalue(),
        "no audio file": b"no sound", "no audio file that": b"",
    }  # fmt: skip


@pytest.mark.parametrize("message, data", bad_clips().items(), ids=lambda x: x if isinstance(x, str) else "")
def test_clips_that_are_refused(message, data):
    with pytest.raises(ValueError, match=message):
        serve_files.read_clip(data)


def test_a_clip_opens_nothing_but_itself(tmp_path):
    (tmp_path / "a.wav").write_bytes(CLIP.read_bytes())
    for text in (
        f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/a.wav\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path}/a.wav\n",
    ):
        with pytest.raises(ValueError, match="no audio file"):
            serve_files.read_clip(text.encode())


def test_clips_that_cannot_be_right(tiny):
    short, silent = encoded(speech()[None, :1_900], 24_000, "wav", "pcm_s16le"), np.zeros((1, 24_000), np.int16)
    for message, data in (("0.", short), ("silent", encoded(silent, 24_000, "flac", "flac"))):
        with pytest.raises(serve_requests.Refused) as e:
            read(tiny, ref_audio=base64.b64encode(data).decode(), ref_text=SAID)
        assert message in e.value.body["error"]["message"] and e.value.body["error"]["param"] == "ref_audio"
    assert "letters" in read(tiny, ref_audio=clip_fields()[0]["audio"], ref_text=SAID * 3)[2][0]
    assert read(tiny, ref_audio=clip_fields()[0]["audio"], ref_text=SAID)[2] == []


def test_base64_as_people_send_it():
    plain = base64.b64encode(b"abcd>?").decode()
    for text in (plain, f"data:audio/wav;base64,{plain}", base64.b64encode(b"abcd").decode().rstrip("="), f" {plain}\n",
                 base64.urlsafe_b64encode(b"abcd>?").decode()):  # fmt: skip
        assert serve_requests.read_base64(text) in (b"abcd>?", b"abcd")
    for text in ("https://example.org/a.wav", "/etc/passwd", "./a.wav", "~/a.wav"):
        with pytest.raises(ValueError, match="not an address or a path"):
            serve_requests.read_base64(text)
    with pytest.raises(ValueError, match="base64"):
        serve_requests.read_base64("ä")


# ------------------------------------------------------------------------------------------------------ requests


def read(tiny, voices=None, **fields):
    body = {"input": TEXT, "voice": "calm"} | fields
    return serve_requests.read_request(json.dumps(body).encode(), voices or serve_voices.Voices(tiny), tiny, 4096)


def clip_fields(n=1, seconds=None, silence=0):
    audio = np.tile(speech(), 20)[: int(24_000 * seconds)] if seconds else speech()
    audio = np.pad(audio, (0, silence * 24_000))
    data = base64.b64encode(encoded(audio[None], 24_000, "flac", "flac")).decode()
    return [{"speaker": 0, "text": SAID, "audio": data}] * n


@pytest.mark.parametrize("fields, param, message", [
    ({"temprature": 1}, None, "did you mean `temperature`"),
    ({"context": clip_fields(65)}, "context", "64"),
    ({"context": clip_fields(3, 50)}, "context.1.audio", "together"),  # tiny has room for 82 s
    ({"context": clip_fields(3, 2, silence=48)}, "context.1.audio", "together"),  # it takes as long to read
    ({"voice": ["calm"]}, "voice", "a name"),
    ({"voice": {"name": "calm"}}, "voice", "a name"),
    ({"temperature": -1}, "temperature", "must lie"),
    ({"voice": "nobody"}, "voice", "there are: alloy"),
    ({"voice": "nobody", "context": clip_fields()}, "voice", "there are: alloy"),
    ({"ref_audio": "http://example.org/a.wav", "ref_text": "a"}, "ref_audio", "not an address"),
    ({"context": [{"text": "a", "audio": "%%%"}]}, "context.0.audio", "base64"),
    ({"input": "?! ..."}, "input", "no words"),
    ({"ref_text": "what it says"}, "ref_audio", "go together"),
])  # fmt: skip
def test_what_is_wrong_is_named(tiny, fields, param, message):
    with pytest.raises(serve_requests.Refused) as e:
        read(tiny, **fields)
    assert e.value.body["error"]["param"] == param and message in e.value.body["error"]["message"]


def test_what_is_lenient(tiny):
    for voice in ("", {}, None, {"id": None}):
        assert read(tiny, voice=voice)[1].voice is None
    assert read(tiny, response_format="WAV")[0].response_format == "wav"
    assert read(tiny, user="me", lang_code="a", stream=True)[0].stream
    assert read(tiny, context=[clip_fields()[0] | {"speaker": None}])[1].context[0].speaker == 0
    assert read(tiny, ref_text="", ref_audio="")[1].context == []
    assert "speaker 1" in read(tiny, context=clip_fields(), speaker=1)[2][0]


def test_alloy_is_who_it_was_whatever_the_folder_holds(tiny, tmp_path):
    before = serve_voices.Voices(tiny).table()["alloy"]
    for name in ("aaa", "nova"):
        (tmp_path / f"{name}.wav").write_bytes(CLIP.read_bytes())
        (tmp_path / f"{name}.txt").write_text(SAID)
    voices = serve_voices.Voices(tiny, tmp_path)
    assert voices.table()["alloy"] == before == "bright" and isinstance(voices.table()["nova"], csm.Segment)
    assert "aaa" in voices.names() and "alloy" not in voices.names()


def test_the_default_voice(tiny, tmp_path):
    """Of requests that name no voice or one of OpenAI's; other names stay what they are."""
    for name in ("mine", "nova"):
        (tmp_path / f"{name}.wav").write_bytes(CLIP.read_bytes())
        (tmp_path / f"{name}.txt").write_text(SAID)
    context = [{"speaker": 0, "voice": "echo"}]
    for default in ("deep", "none", "mine"):
        voices = serve_voices.Voices(tiny, tmp_path, default)
        expected = voices.kept.get(default, default)
        for voice in (None, "", "alloy", "fable"):
            assert read(tiny, voices, voice=voice)[1].voice == expected
        assert read(tiny, voices, context=context)[1].context == [(expected, 0)]
        assert read(tiny, voices, voice="bright")[1].voice == "bright" and read(tiny, voices)[1].voice == "calm"
        assert read(tiny, voices, voice="nova")[1].voice == voices.kept["nova"]
        assert voices.names()[0] == default and sorted(voices.names()) == "bright calm deep mine none nova".split()
    voices.remove("mine")
    assert read(tiny, voices, voice="alloy")[1].voice == expected and "mine" not in voices.names()
    for wrong in ("nobody", "", "alloy"):
        with pytest.raises(ValueError, match="there are: bright, calm, deep, none, nova"):
            serve_voices.Voices(tiny, tmp_path, wrong)


def test_a_folder_of_voices_is_checked_at_the_start(tiny, tmp_path, caplog):
    long = encoded(np.tile(speech(), 40)[None, : 24_000 * 62], 24_000, "flac", "flac")
    good = CLIP.read_bytes()
    files = {"mine": (good, SAID), "broken": (b"no sound", "a"), "empty": (good, " "), "lonely": (good, None)}
    for name, (data, text) in (files | {"long": (long, "a" * 20)}).items():
        (tmp_path / f"{name}.wav").write_bytes(data)
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    voices = serve_voices.Voices(tiny, tmp_path)
    assert list(voices.kept) == ["mine"]
    lines = [r.getMessage() for r in caplog.records if "no voice" in r.getMessage()]
    assert sorted(line.split()[0] for line in lines) == ["broken.wav", "empty.wav", "lonely.wav", "long.wav"]
    assert str(tmp_path) not in caplog.text


# ------------------------------------------------------------------------------------------------------ connections


class Loop:
    def __init__(self):
        self.now, self.timers = 0.0, []

    def time(self):
        return self.now

    def call_later(self, seconds, f):
        timer = SimpleNamespace(at=self.now + seconds, f=f, on=True)
        timer.cancel = lambda: setattr(timer, "on", False)
        self.timers.append(timer)
        return timer

    def pass_time(self, seconds):
        self.now += seconds
        for timer in self.timers:
            if timer.on and timer.at <= self.now:
                timer.on = False
                timer.f()

    def create_task(self, job, **options):
        job.close()
        return Task()


class Task:
    def add_done_callback(self, f):
        pass


class Transport:
    def __init__(self):
        self.gone = False

    def abort(self):
        self.gone = True

    def get_extra_info(self, name):
        return None

    def __getattr__(self, name):
        return lambda *_: False


@pytest.fixture
def connect(monkeypatch):
    import uvicorn
    from uvicorn.server import ServerState

    async def app(scope, receive, send):
        pass

    loop, state = Loop(), ServerState()
    config = uvicorn.Config(app, http=serve_network.Connection, ws="none", lifespan="off")
    monkeypatch.setattr(serve_network.Connection, "most", 3)

    def new():
        c = serve_network.Connection(config, state, {}, loop)
        c.connection_made(Transport())
        loop.now += 0.01
        return c

    return loop, new


def test_half_a_request_is_given_up(connect):
    loop, new = connect
    silent, headers, body, whole = new(), new(), new(), None
    headers.data_received(b"GET /health HTTP/1.1\r\nHo")
    body.data_received(b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    loop.pass_time(serve_network.HEADERS)
    assert silent.transport.gone and headers.transport.gone and not body.transport.gone
    body.data_received(b"{")  # more of it does not buy time
    loop.pass_time(serve_network.BODY - serve_network.HEADERS + 1)
    assert body.transport.gone
    whole = new()
    whole.data_received(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    loop.pass_time(1000)
    assert not whole.transport.gone


def test_where_there_are_too_many_the_oldest_without_a_request_goes(connect):
    _, new = connect
    asking = new()
    asking.data_received(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    first, second, third = new(), new(), new()
    assert first.transport.gone and not second.transport.gone and not third.transport.gone
    new()  # while the first is still being closed
    assert second.transport.gone and not third.transport.gone and not asking.transport.gone


def test_a_line_of_the_log_comes_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(serve_network.time, "monotonic", lambda: now[0])
    seldom, lines = serve_network.Seldom(), []
    for _ in range(1000):
        record = logging.makeLogRecord({"msg": "socket.accept() out of system resource\nsocket: x"})
        lines += [record.msg] if seldom.filter(record) else []
    now[0] += serve_network.SELDOM
    record = logging.makeLogRecord({"msg": "socket.accept() out of system resource\nsocket: x"})
    assert len(lines) == 1 and seldom.filter(record) and "999 more" in record.msg


def test_only_json_is_taken():
    with running(env={"CSM_API_KEY": ""}) as (address, process):
        url, body = f"{address}/v1/audio/speech", json.dumps({"input": TEXT, "response_format": "pcm"})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
            answer = httpx.post(url, content=body, headers={"Content-Type": kind} if kind else {})
            assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
        answer = httpx.post(f"{url}/", content=body, headers={"Content-Type": "Application/JSON; charset=utf-8"})
        assert answer.status_code == 200
        assert httpx.get(f"{address}/health").json()["model"] == "tiny"
        assert httpx.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as s:  # it leaves in the middle of its body
            head = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 99"
            s.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{head}\r\n\r\n{{".encode())
        assert httpx.get(f"{address}/health").status_code == 200
    assert process.returncode == 0 and "Traceback" not in "".join(process.log)


def test_no_other_model_than_was_asked_for(tmp_path):
    env = {**os.environ, "CSM_MODEL": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "csm_tools.serve", "--port", "0"]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "--model tiny" in done.stderr, done.stderr
    assert serve.shown_name(None) == "csm-1b" and serve.shown_name(str(HERE / "tiny")) == "tiny"


def test_what_the_log_gets_is_one_line():
    assert serve.in_one_line("a\nb\x1b[2Jé\u2028") == "a\\nb\\x1b[2Jé\\u2028"
