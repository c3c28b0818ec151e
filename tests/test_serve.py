"""The live speech server: OpenAI's client, other programs' requests, the same speech as `generate`, load, faults."""

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

import csm  # before mlx
import mimi

openai, httpx, av = (pytest.importorskip(name) for name in ("openai", "httpx", "av"))
serve = pytest.importorskip("csm_tools.serve")
from csm_tools import narrate, serve_engine
from csm_tools.text import parts_of

HERE = Path(__file__).resolve().parents[1]
JSON = {"Content-Type": "application/json"}
TEXT = "Hello there, how are you today?"
LONG = "The cat sat on the mat. " * 8
CLIP = HERE / "tiny/prompts/calm.wav"
SAID = CLIP.with_suffix(".txt").read_text().strip()


@contextmanager
def running(*arguments, env=None):
    """Start a server of `tiny` on a free port: (address, process); `process.log` holds its output."""
    command = [sys.executable, "-m", "csm_tools.serve", "--model", "tiny", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    process.log = []
    for line in process.stderr:
        process.log.append(line)
        if line.startswith("ready: "):
            break
    else:
        raise RuntimeError("".join(process.log))
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(lambda: process.log.extend(process.stderr))
        try:
            yield line.split()[1], process
        finally:
            process.terminate()
            process.wait()
            reading.result()


@pytest.fixture(scope="module")
def address():
    with running() as (address, _):
        yield address


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def speak(address, text=TEXT, key="none", **fields):
    """The bytes that openai-python receives; unknown fields go into extra_body."""
    known = {k: fields.pop(k) for k in ("response_format", "speed", "voice") if k in fields}
    known = {"voice": "alloy", "response_format": "pcm"} | known
    return client(address, key).audio.speech.create(input=text, model="tts-1", extra_body=fields, **known).content


def samples(data):
    return np.frombuffer(data, "<i2").astype(np.int32)


def health(address):
    return httpx.get(f"{address}/health").json()


def until(condition):
    while not condition():
        time.sleep(0.02)


def decoded(data):
    """A file's bytes -> (samples,) float at 24 kHz."""
    resampler, out = av.AudioResampler(format="flt", layout="mono", rate=24000), []
    with av.open(io.BytesIO(data)) as file:
        for frame in file.decode(audio=0):
            out += resampler.resample(frame)
    return np.concatenate([frame.to_ndarray()[0] for frame in out + resampler.resample(None)])


def same(got, want):
    """Whether 16-bit samples equal those of `generate` but for rounding, because pieces are decoded one by one."""
    want = mimi.to_pcm16(want).astype(np.int32)
    return len(got) == len(want) and abs(got - want).max() <= 1


# ------------------------------------------------------------------------------------------------------ what is said


def test_every_format_holds_the_same_speech(address):
    speech = samples(speak(address, seed=3)) / 32768
    types = {"mp3": "audio/mpeg", "opus": "audio/ogg", "aac": "audio/aac", "flac": "audio/flac", "wav": "audio/wav"}
    for name, media_type in types.items():
        answer = client(address).audio.speech.with_raw_response.create(
            input=TEXT, model="tts-1", voice="alloy", response_format=name, extra_body={"seed": 3}
        )
        assert answer.headers["content-type"] == media_type and answer.headers["x-seed"] == "3"
        audio = decoded(answer.content)
        assert abs(len(audio) - len(speech)) <= 1920, name  # encoders add some silence
        n = min(len(audio), len(speech))
        shifts = np.fft.irfft(np.fft.rfft(audio, 2 * n) * np.conj(np.fft.rfft(speech, 2 * n)))
        assert shifts[:2400].max() > 0.95 * np.linalg.norm(audio) * np.linalg.norm(speech), name
        if name in ("flac", "wav"):
            assert np.array_equal(np.round(audio * 32768), np.round(speech * 32768))


def test_sound_comes_while_it_is_made(address):
    with client(address).audio.speech.with_streaming_response.create(
        input=LONG, model="tts-1", voice="alloy", response_format="wav"
    ) as answer:
        pieces = answer.iter_bytes()
        first = next(pieces)
        assert health(address)["live"] == 1  # the rest is not made yet
        assert first[:4] + first[8:16] == b"RIFFWAVEfmt " and first[36:40] == b"data" and len(first) < 10_000
        assert first[4:8] == first[40:44] == b"\xff" * 4  # nobody knows the length yet
        n_pieces = 1 + sum(1 for _ in pieces)
    assert n_pieces > 20


def test_server_sent_events(address):
    events = []
    body = {
        "input": TEXT,
        "model": "tts-1",
        "voice": "alloy",
        "response_format": "pcm",
        "stream_format": "sse",
        "seed": 3,
    }
    with httpx.stream("POST", f"{address}/v1/audio/speech", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(json.loads(line.removeprefix("data: ")))
    *deltas, done = events
    assert len(deltas) > 5 and {e["type"] for e in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(e["audio"]) for e in deltas) == speak(address, seed=3)
    usage = done["usage"]
    assert done["type"] == "speech.audio.done" and usage["output_tokens"] == len(deltas)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 5


def test_captions_are_events_with_exact_times(address, tiny):
    text = "Hello there, my friend. [pause:0.5] How are you today, and how is everybody else? [pause:0.25]"
    body = {"input": text, "model": "tts-1", "voice": "bright", "response_format": "pcm", "stream_format": "sse"}
    answer = httpx.post(f"{address}/v1/audio/speech", json=body | {"seed": 3, "captions": True}, timeout=60)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    start, expected = 0.0, []
    for i, (part, pause) in enumerate(parts_of(text, longest=80)):
        end = start + tiny.generate(part, voice="bright", seed=3 + i).size / 24000
        expected.append({"type": "speech.caption", "text": part, "start": round(start, 3), "end": round(end, 3)})
        start = end + pause
    assert [e for e in events if e["type"] == "speech.caption"] == expected and len(expected) == 2
    sound = b"".join(base64.b64decode(e["audio"]) for e in events if e["type"] == "speech.audio.delta")
    assert len(sound) == 2 * round(24000 * start) and not any(sound[-2 * 6000 :])
    assert events[-1]["type"] == "speech.audio.done"


def test_alone_and_among_others_it_is_what_generate_says(address, tiny):
    want = [
        tiny.generate(f"{TEXT} Said {i} times.".replace("? ", ", "), i % 2, voice="calm", seed=i) for i in range(16)
    ]

    def one(i):
        return samples(
            speak(address, f"{TEXT} Said {i} times.".replace("? ", ", "), voice="calm", speaker=i % 2, seed=i)
        )

    assert same(one(5), want[5])
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(one, range(16)))
    assert [same(g, w) for g, w in zip(got, want)] == [True] * 16


def test_sampling_and_a_clip_of_ones_own(address, tiny):
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**63 + 1}
    assert same(samples(speak(address, voice="none", **options)), tiny.generate(TEXT, voice="none", **options))
    clip = HERE / "tiny/prompts/deep.wav"
    said = clip.with_suffix(".txt").read_text().strip()
    fields = {"ref_audio": base64.b64encode(clip.read_bytes()).decode(), "ref_text": said, "speaker": 3, "seed": 1}
    want = tiny.generate(TEXT, 3, [csm.Segment(3, said, clip)], seed=1)
    assert same(samples(speak(address, **fields)), want)
    turn = {"speaker": 3, "text": said, "audio": fields["ref_audio"]}  # a turn said before
    assert same(samples(speak(address, voice="none", context=[turn], speaker=3, seed=1)), want)


@pytest.mark.parametrize("voice", ["bright", "none"])  # without one, the first sentence sets that of the others
def test_a_long_text_is_one_file_as_narrate_makes_it(address, tiny, voice):
    text = LONG[: len("The cat sat on the mat. ") * 3] + "\n\nThe dog ran to the big house."
    want = np.concatenate([audio for *_, audio in narrate.narrate(tiny, text, voice=voice, seed=9)])
    got = samples(speak(address, text, voice=voice, seed=9))
    assert same(got, want[: len(got)]) and len(got) > 5 * 24000
    assert not want[len(got) :].any()  # the silence after the last


def test_the_text_is_said_as_people_read_it(address, tiny):
    typed, said = "**Dinner** at 10:30 am 🎉", "Dinner at ten thirty A M"
    assert same(samples(speak(address, typed, voice="bright", seed=9)), tiny.generate(said, voice="bright", seed=9))
    verbatim = tiny.generate(typed, voice="bright", seed=9)
    assert same(samples(speak(address, typed, voice="bright", seed=9, normalize=False)), verbatim)


def test_speed_keeps_the_pitch(address):
    def pitch(x):  # Hz: the strongest periodicity, over the voiced frames
        frames = np.lib.stride_tricks.sliding_window_view(x.astype(float), 2048)[::512]
        loud = frames[np.linalg.norm(frames, axis=1) > 0.3 * np.linalg.norm(frames, axis=1).max()]
        similar = np.fft.irfft(abs(np.fft.rfft(loud * np.hanning(2048), 4096)) ** 2).sum(axis=0)
        return 24000 / (60 + np.argmax(similar[60:400]))

    plain = samples(speak(address, seed=3))
    for speed in (0.25, 0.5, 1.7, 4):
        other = samples(speak(address, seed=3, speed=speed))
        assert abs(len(other) * speed / len(plain) - 1) < 0.06, speed
        if speed < 4:
            assert abs(pitch(other) / pitch(plain) - 1) < 0.06, speed


# ------------------------------------------------------------------------------------------------------ who asks


def test_requests_as_programs_send_them(address):
    """Requests of Open WebUI, LiveKit, Pipecat and wyoming_openai, taken from their sources."""
    url, headers = f"{address}/v1", {"Authorization": "Bearer sk-unused"}
    # Open WebUI: lists, without a key; then the whole body into a .mp3
    assert httpx.get(f"{url}/audio/models").json()["models"][0]["id"] == "tiny"
    assert {"id": "bright", "name": "bright"} in httpx.get(f"{url}/audio/voices").json()["voices"]
    body = {"input": TEXT, "voice": "alloy", "model": "tts-1"}
    answer = httpx.post(f"{url}/audio/speech", json=body, headers=headers)
    assert answer.headers["content-type"] == "audio/mpeg" and decoded(answer.content).any()
    # LiveKit: mp3, a client of its own with a prewarming GET of the base URL
    assert httpx.get(f"{url}/").status_code == 404
    body = {"input": TEXT, "model": "gpt-4o-mini-tts", "voice": "ash", "response_format": "mp3", "speed": 1.0}
    with httpx.stream("POST", f"{url}/audio/speech", json=body, headers=headers, timeout=30) as answer:
        assert decoded(b"".join(answer.iter_bytes())).any()
    # Pipecat: raw samples, OpenAI's voices alone, instructions
    for voice in "alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split():
        body = {"input": "Yes.", "model": "gpt-4o-mini-tts", "voice": voice, "response_format": "pcm"}
        answer = httpx.post(f"{url}/audio/speech", json=body | {"instructions": "Be kind."}, headers=headers)
        assert answer.status_code == 200 and samples(answer.content).any()
    # wyoming_openai: WAV without a key, what is unset left out; the first bytes read by Python's wave module
    body = {"input": TEXT, "model": "tts-1", "voice": "shimmer", "response_format": "wav", "speed": 1.1}
    with httpx.stream("POST", f"{url}/audio/speech", json=body, headers={}) as answer:
        import wave

        header = wave.open(io.BytesIO(next(answer.iter_bytes(2048))))
        assert (header.getframerate(), header.getnchannels(), header.getsampwidth()) == (24000, 1, 2)
    # a voice as an object, and nulls for what is not set
    body = {"input": "Yes.", "model": "tts-1", "voice": {"id": "calm"}, "speed": None, "response_format": None}
    assert httpx.post(f"{url}/audio/speech", json=body).status_code == 200
    assert [m.id for m in client(address).models.list()] == ["tiny"]


def test_a_key():
    with running(env={"CSM_API_KEY": "sesame"}) as (address, process):
        for key in ("open", "sesam"):
            with pytest.raises(openai.AuthenticationError) as e:
                speak(address, key=key)
            assert e.value.code == "invalid_api_key"
        url, body = f"{address}/v1/audio/speech", {"input": TEXT, "voice": "alloy"}
        for header in (None, "Bearer sesame\xe9", "sesame", "Basic sesame", "Bearer"):
            header = {"Authorization": header.encode("latin-1")} if header else {}
            assert httpx.post(url, json=body, headers=header).status_code == 401
        assert httpx.post(url, json=body, headers={"Authorization": "bearer sesame"}).status_code == 200
        for path in ("health", "v1/models", "v1/audio/models", "v1/audio/voices", ""):
            assert httpx.get(f"{address}/{path}").status_code == 200
        assert speak(address, key="sesame") and client(address, "sesame").models.list().data
    assert TEXT not in "".join(process.log)


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"text": ""}, "input"),
        ({"text": " \n"}, "input"),
        ({"text": "?! 🎉 [pause:1]"}, "input"),
        ({"text": "...", "normalize": False}, "input"),
        ({"text": "a" * 5000}, "input"),
        ({"text": "\ud800"}, None),
        ({"voice": "nobody"}, "voice"),
        ({"voice": "tiny/prompts/deep.wav"}, "voice"),
        ({"response_format": "exe"}, "response_format"),
        ({"stream_format": "pigeon"}, "stream_format"),
        ({"speed": 5}, "speed"),
        ({"speed": float("nan")}, "speed"),
        ({"seed": -1}, "seed"),
        ({"speaker": -1}, "speaker"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": "many"}, "top_p"),
        ({"ref_audio": base64.b64encode(b"no sound").decode(), "ref_text": "hi"}, "ref_audio"),
        ({"ref_audio": "/etc/passwd", "ref_text": "hi"}, "ref_audio"),
        ({"ref_audio": base64.b64encode(b"/etc/passwd").decode(), "ref_text": "hi"}, "ref_audio"),
        ({"ref_text": "hi"}, "ref_audio"),
        ({"context": [{"text": "hi"}]}, "context.0.audio"),
    ],
)
def test_mistakes_are_openais_errors(address, fields, param):
    body = {"input": fields.get("text", TEXT), "model": "tts-1", "voice": "alloy"} | fields
    answer = httpx.post(f"{address}/v1/audio/speech", content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert (
        error["type"] == "invalid_request_error"
        and error["message"]
        and set(error) == {"message", "type", "param", "code"}
    )
    if "text" not in fields and not isinstance(fields.get("speed"), float):
        with pytest.raises(openai.BadRequestError):
            speak(address, **fields)


def test_bodies_that_are_no_requests(address):
    url = f"{address}/v1/audio/speech"
    for content in (b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000):
        assert httpx.post(url, content=content, headers=JSON).status_code == 400
    assert httpx.post(url, content=b" " * (serve.LARGEST + 1), headers=JSON).status_code == 413
    assert httpx.get(url).json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client(address).models.retrieve("none")
    clip = io.BytesIO()
    soundfile.write(clip, np.zeros(24000 * 61), 24000, format="FLAC")
    fields = {"ref_audio": base64.b64encode(clip.getvalue()).decode(), "ref_text": "hi"}
    assert httpx.post(url, json={"input": TEXT} | fields).json()["error"]["param"] == "ref_audio"
    assert speak(address)


def test_what_was_fine_tuned_speaks_without_a_voice(generator, tiny):
    def default(generator, model, **options):
        return serve.default_voice(
            Namespace(**{"model": model, "adapter": None, "default_voice": None} | options), generator
        )

    assert default(generator, "a/folder") is default(tiny, "tiny") is default(generator, "csm-1b") is None
    assert default(tiny, "a/fused/tiny") == default(generator, "csm-1b", adapter=[("run", 1.0)]) == "none"
    assert default(tiny, "a/fused/tiny", default_voice="calm") == "calm"


def test_a_command_that_cannot_start(tmp_path):
    def fails(*arguments):
        command = [sys.executable, "-m", "csm_tools.serve", *map(str, arguments)]
        p = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        lines = [line for line in p.stderr.splitlines() if "is no voice" not in line]
        assert p.returncode == 2 and len(lines) == 1 and not p.stdout, p.stderr
        return p.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in fails("--model", "tiny", "--port", taken.getsockname()[1])
    assert "no such model" in fails("--port", 0, "--model", tmp_path / "none")
    (tmp_path / "mute.wav").write_bytes(b"no sound")
    assert "transcripts" in fails("--port", 0, "--model", "tiny", "--voices", tmp_path)
    assert "calm" in fails("--port", 0, "--model", "tiny", "--default-voice", "nobody")
    hidden = "import sys; sys.modules['av'] = None; import csm_tools.serve"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "csm-speech's extra [serve]" in done.stderr and len(done.stderr.splitlines()) == 1
    for option, value in (("max-batch", 0), ("max-characters", 0), ("grace", -1), ("port", 65536), ("host", "")):
        assert f": error: --{option} " in fails("--port", 0, "--model", "tiny", f"--{option}", value)


# ------------------------------------------------------------------------------------------------------ many at once


def test_voices_of_a_folder_and_the_log(tmp_path):
    for suffix in (".wav", ".txt"):
        shutil.copy(HERE / f"tiny/prompts/deep{suffix}", tmp_path / f"mine{suffix}")
    with running("--voices", tmp_path, "--log-text") as (address, process):
        assert "mine" in [voice["id"] for voice in httpx.get(f"{address}/v1/audio/voices").json()["voices"]]
        assert speak(address, voice="mine", seed=1) == speak(address, voice="deep", seed=1)
    assert f"voice mine, seed 1: {TEXT}" in "".join(process.log)
    assert {f.name for f in tmp_path.iterdir()} == {"mine.wav", "mine.txt"}  # nothing is written


def test_a_full_server_says_so():
    with running("--max-batch", 1, "--max-waiting", 1) as (address, _):
        with ThreadPoolExecutor() as pool:
            said = []
            for n in range(2):  # one is said, one waits
                said.append(pool.submit(speak, address, LONG, seed=1))
                until(lambda n=n: health(address)["live"] + health(address)["waiting"] == n + 1)
            with pytest.raises(openai.RateLimitError) as e:
                speak(address)
            assert int(e.value.response.headers["retry-after"]) >= 1
            assert said[0].result() == said[1].result()
        assert speak(address)


def test_load_and_clients_that_leave(address):
    """16 clients make 32 requests, and abandon as many more: the completed ones equal `generate`."""
    texts = [f"{TEXT[:-1]}, number {i}?" for i in range(8)]
    alone = [speak(address, text, seed=i) for i, text in enumerate(texts)]

    def leave(i):
        with client(address).audio.speech.with_streaming_response.create(
            input=LONG, model="tts-1", voice="alloy", response_format="pcm"
        ) as answer:
            next(answer.iter_bytes(1920 * 2 * (1 + i % 5)))

    with ThreadPoolExecutor(16) as pool:
        staying = []
        for i in range(32):
            staying.append(pool.submit(speak, address, texts[i % 8], seed=i % 8))
            if i % 2:
                pool.submit(leave, i)
        assert all(answer.result() == alone[i % 8] or same_rounding(answer.result(), alone[i % 8])
                   for i, answer in enumerate(staying))  # fmt: skip
    until(lambda: health(address)["live"] == health(address)["waiting"] == 0)
    state = health(address)
    assert state["status"] == "ok" and state["frames_per_second"] > 0 < state["real_time_factor"]


def same_rounding(a, b):
    return len(a) == len(b) and abs(samples(a) - samples(b)).max() <= 1


def test_one_who_waits_and_leaves_is_forgotten():
    with running("--max-batch", 1, "--max-waiting", 1) as (address, _):
        with ThreadPoolExecutor() as pool:
            said = pool.submit(speak, address, LONG)
            until(lambda: health(address)["live"] == 1)
            with socket.create_connection(address.removeprefix("http://").split(":")) as s:
                body = json.dumps({"input": TEXT})
                head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                s.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{head}{body}".encode())
                until(lambda: health(address)["waiting"] == 1)
            until(lambda: health(address)["waiting"] == 0)
            assert health(address)["live"] == 1 and not said.done()
            assert said.result()


def test_sigterm_lets_speech_finish():
    with running() as (address, process):
        with client(address).audio.speech.with_streaming_response.create(
            input=LONG, model="tts-1", voice="alloy", response_format="pcm", extra_body={"seed": 1}
        ) as answer:
            pieces = answer.iter_bytes()
            got = next(pieces)
            process.send_signal(signal.SIGTERM)
            until(lambda: refuses(address))
            got += b"".join(pieces)
        assert process.wait() == 0
    with running() as (address, _):
        assert same_rounding(speak(address, LONG, seed=1), got)


def refuses(address):
    try:
        return bool(httpx.get(f"{address}/health")) and False
    except httpx.TransportError:  # also one whose connection was being taken
        return True


# ------------------------------------------------------------------------------------------------------ inside


def ask(app, body, send):
    """Make one request to an application without a network. send: receives the application's messages."""
    sent = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive():
        for message in sent:
            return message
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/audio/speech", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    return asyncio.create_task(app(scope, receive, send))


ARGUMENTS = {"model": "tiny", "api_key": None, "max_characters": 4096, "log_text": False, "cors": []}
ARGUMENTS = Namespace(**ARGUMENTS, conversation_memory=1000)


def collector():
    messages = []

    async def send(message):
        messages.append(message)

    return messages, send


@pytest.fixture
def engine(tiny):
    return lambda: serve.Engine(tiny, 4, 4)


def test_a_reader_who_stops_holds_nobody_up(engine, monkeypatch, caplog):
    monkeypatch.setattr(serve_engine, "AHEAD", 2)
    monkeypatch.setattr(serve, "STALLED", 1)

    async def stuck(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def scenario():
        e = engine()
        app = serve.make_app(e, ARGUMENTS, "")
        running = asyncio.create_task(e.run())
        slow = ask(app, {"input": LONG * 3}, stuck)
        # It has enough to read, and has given up its place; on a slow machine it may be dropped before.
        while (e.live or not e.waiting) and "dropped" not in caplog.text:
            await asyncio.sleep(0.01)
        messages, send = collector()
        await ask(app, {"input": TEXT, "response_format": "pcm"}, send)
        assert messages[-1]["more_body"] is False
        await slow
        while e.live or e.waiting:
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(scenario())
    assert "dropped" in caplog.text


def test_what_fails_fails_alone(engine, monkeypatch):
    async def scenario():
        e = engine()
        app = serve.make_app(e, ARGUMENTS, "")
        running = asyncio.create_task(e.run())
        first, last = collector(), collector()
        monkeypatch.setattr(e, "decode", lambda frames: 1 / 0)
        await ask(app, {"input": TEXT}, first[1])
        monkeypatch.undo()
        assert first[0][0]["status"] == 500 and b"generation failed" in first[0][1]["body"]
        await ask(app, {"input": TEXT, "response_format": "pcm"}, last[1])
        assert last[0][0]["status"] == 200 and last[0][-1]["more_body"] is False
        running.cancel()

    asyncio.run(scenario())


def test_what_ends_at_once_is_tried_again(engine):
    class Silent:  # a csm_batch.Batch
        seeds = ()

        def insert(self, rows, max_frames, seed, sampling, cache):
            self.seeds += (seed,)
            return len(self.seeds)

        def next(self):
            return [(len(self.seeds), None)]

    async def scenario():
        e, (messages, send) = engine(), collector()
        e.batch = Silent()
        running = asyncio.create_task(e.run())
        await ask(serve.make_app(e, ARGUMENTS, ""), {"input": TEXT, "seed": 7}, send)
        assert messages[0]["status"] == 500 and b"another seed" in messages[1]["body"]
        assert e.batch.seeds == tuple(7 + i * 2**32 for i in range(4))
        running.cancel()

    asyncio.run(scenario())
