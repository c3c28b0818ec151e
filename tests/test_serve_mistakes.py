"""Fifty wrong requests over HTTP: each gets a one-line error that names the field, and the server continues."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile

import csm  # noqa: F401  before mlx

httpx = pytest.importorskip("httpx")
pytest.importorskip("csm_tools.serve")
from test_serve import CLIP, SAID, running, samples

SOUND = base64.b64encode(CLIP.read_bytes()).decode()
LOST = "/v1/conversations/lost/turns"
SPEECH, TURNS, VOICES = "/v1/audio/speech", "/v1/conversations/begun/turns", "/v1/audio/voices"
HEAD = {"Content-Type": "application/json"}


def sound_file(audio, format="WAV", rate=24_000, **options):
    """A sound file in base64."""
    out = io.BytesIO()
    soundfile.write(out, audio, rate, format=format, **options)
    return base64.b64encode(out.getvalue()).decode()


TOO_LONG = sound_file(np.zeros(61 * 24_000), "FLAC")
NOT_A_NUMBER = sound_file(np.full(48_000, np.nan), subtype="FLOAT")
LONG = sound_file(np.random.default_rng(0).standard_normal(45 * 24_000) / 9, "FLAC")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with running("--voices", tmp_path_factory.mktemp("voices"), env={"CSM_API_KEY": ""}) as (address, process):
        body = {"input": "Hello.", "voice": "calm", "response_format": "pcm", "conversation": "begun"}
        assert httpx.post(f"{address}{SPEECH}", json=body, timeout=60).status_code == 200
        yield address
    assert process.returncode == 0 and "Traceback" not in "".join(process.log)


def speech(**fields):
    return SPEECH, json.dumps({"input": "Hello.", "voice": "calm", "response_format": "pcm"} | fields)


def turn(**fields):
    return TURNS, json.dumps({"speaker": 1, "text": SAID, "audio": SOUND} | fields)


def voice(**fields):
    return VOICES, json.dumps({"name": "new", "ref_text": SAID, "audio_sample": SOUND} | fields)


BODIES = {  # what is wrong: (path, body), status, the field, words of the message
    "no JSON": ((SPEECH, "input=Hello."), 400, None, "JSON"),
    "JSON that breaks off": ((SPEECH, '{"input": "Hello.'), 400, None, "JSON"),
    "a list": ((SPEECH, "[1]"), 400, None, "object"),
    "nothing": ((SPEECH, ""), 400, None, "JSON"),
    "not UTF-8": ((SPEECH, b'{"input": "\xff"}'), 400, None, "JSON"),
    "nested too deep": ((SPEECH, '{"input": ' + "[" * 9000), 400, None, "JSON"),
    "no input": ((SPEECH, '{"voice": "calm"}'), 400, "input", "required"),
    "an input that is null": (speech(input=None), 400, "input", "required"),
    "an input that is a number": (speech(input=5), 400, "input", "string"),
    "an empty input": (speech(input=" \n"), 400, "input", "empty"),
    "an input without words": (speech(input="?! 🎉"), 400, "input", "no words"),
    "too long an input": (speech(input="a" * 5000), 400, "input", "4096"),
    "a lone surrogate": ((SPEECH, '{"input": "\\ud800"}'), 400, None, "JSON"),
    "an unknown voice": (speech(voice="nobody"), 400, "voice", "there are: alloy"),
    "a path as a voice": (speech(voice="../tiny/prompts/calm.wav"), 400, "voice", "there are: alloy"),
    "a voice that is a list": (speech(voice=["calm"]), 400, "voice", "a name"),
    "an unknown format": (speech(response_format="exe"), 400, "response_format", "'mp3'"),
    "an unknown stream_format": (speech(stream_format="pigeon"), 400, "stream_format", "'sse'"),
    "too fast": (speech(speed=5), 400, "speed", "4"),
    "too slow": (speech(speed=0), 400, "speed", "0.25"),
    "a speed that is a word": (speech(speed="fast"), 400, "speed", "number"),
    "a speed that is no number": ((SPEECH, '{"input": "Hello.", "speed": NaN}'), 400, "speed", "4"),
    "a negative seed": (speech(seed=-1), 400, "seed", "0"),
    "a seed beyond 64 bits": (speech(seed=2**64), 400, "seed", "18446744073709551616"),
    "a negative speaker": (speech(speaker=-1), 400, "speaker", "0"),
    "a speaker beyond all": (speech(speaker=10**30), 400, "speaker", "999999"),
    "half a speaker": (speech(speaker=1.7), 400, "speaker", "integer"),
    "a speaker's name": (speech(speaker="Alice"), 400, "speaker", "integer"),
    "a negative temperature": (speech(temperature=-1), 400, "temperature", "temperature"),
    "top_p above 1": (speech(top_p=1.5), 400, "top_p", "top_p"),
    "top_k that is a word": (speech(top_k="many"), 400, "top_k", "integer"),
    "a misspelt field": (speech(temprature=1), 400, None, "did you mean `temperature`"),
    "a transcript without its clip": (speech(ref_text="Hello."), 400, "ref_audio", "go together"),
    "a clip that is an address": (speech(ref_audio="https://example.org/a.wav"), 400, "ref_audio", "not an address"),
    "a clip that is a path": (speech(ref_audio="/etc/passwd"), 400, "ref_audio", "not an address or a path"),
    "a clip that is no base64": (speech(ref_audio="?%&"), 400, "ref_audio", "base64"),
    "a clip that is no sound": (speech(ref_audio="aaaa", ref_text="a"), 400, "ref_audio", "no audio file"),
    "a clip that breaks off": (speech(ref_audio=SOUND[:60], ref_text="a"), 400, "ref_audio", "clip"),
    "a silent clip": (speech(ref_audio=sound_file(np.zeros(48_000)), ref_text="a"), 400, "ref_audio", "silent"),
    "a short clip": (speech(ref_audio=sound_file(np.ones(1900) / 9), ref_text="a"), 400, "ref_audio", "0.08 s"),
    "too long a clip": (speech(ref_audio=TOO_LONG, ref_text="a"), 400, "ref_audio", "60 s"),
    "NaN in a clip": (speech(ref_audio=NOT_A_NUMBER, ref_text="a"), 400, "ref_audio", "NaN"),
    "a context that is no list": (speech(context={"a": 1}), 400, "context", "array"),
    "a turn without a clip": (speech(context=[{"text": "Hello."}]), 400, "context.0.audio", "required"),
    "a turn of nobody's voice": (speech(context=[{"voice": "nobody"}]), 400, "context.0.voice", "there are"),
    "a turn whose clip is text": (speech(context=[{"text": "a", "audio": "%"}]), 400, "context.0.audio", "base64"),
    "too many turns": (speech(context=[{"text": "a", "audio": "aaaa"}] * 65), 400, "context", "64"),
    "too many seconds": (speech(context=[{"text": "a", "audio": LONG}] * 2), 400, "context.1.audio", "together"),
    "a conversation without a name": (speech(conversation=""), 400, "conversation", "1 character"),
    "a conversation with too long a name": (speech(conversation="x" * 201), 400, "conversation", "200"),
    "a conversation that is lost": (speech(conversation="lost", after_turns=3), 404, "conversation", "begin it again"),
    "a turn of a lost conversation": ((LOST, turn()[1]), 404, "conversation", "no conversation"),
    "a turn heard of nobody": (turn(speaker=-1), 400, "speaker", "0"),
    "a turn heard that is no sound": (turn(audio="aaaa"), 400, "audio", "no audio file"),
    "a voice whose name is a path": (voice(name="../new"), 400, None, "no path"),
    "a voice whose name is taken": (voice(name="calm"), 400, None, "already"),
    "a voice without a clip": ((VOICES, '{"name": "new", "ref_text": "a"}'), 400, "audio_sample", "required"),
}  # fmt: skip

REQUESTS = {  # method, path, headers, status, words of the message
    "another method": ("GET", SPEECH, {}, 405, "Method"),
    "another path": ("POST", "/v1/audio/speeches", HEAD, 404, "Not Found"),
    "another type": ("POST", SPEECH, {"Content-Type": "text/plain"}, 415, "application/json"),
    "no type": ("POST", SPEECH, {}, 415, "application/json"),
    "a model that is not there": ("GET", "/v1/models/gpt-4", {}, 404, "there is 'tiny'"),
    "a voice that is not there": ("DELETE", f"{VOICES}/nobody", {}, 404, "no voice"),
    "a voice of the model's own": ("DELETE", f"{VOICES}/calm", {}, 404, "no voice"),
    "a conversation that is not there": ("GET", "/v1/conversations/none", {}, 404, "no conversation"),
    "the end of one that is not there": ("DELETE", "/v1/conversations/none", {}, 404, "no conversation"),
    "a page of another origin": ("POST", VOICES, HEAD | {"Origin": "http://elsewhere"}, 403, "--cors"),
}


def check(answer, status, words):
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"], answer.text
    assert (
        "\n" not in error["message"]
        and len(error["message"]) < 600
        and error.keys() == {"message", "type", "param", "code"}
    )
    return error


def test_there_are_fifty():
    assert len(BODIES) + len(REQUESTS) >= 50


@pytest.mark.parametrize("what", BODIES)
def test_a_wrong_body(address, what):
    (path, body), status, field, words = BODIES[what]
    error = check(httpx.post(f"{address}{path}", content=body, headers=HEAD, timeout=60), status, words)
    assert error["param"] == field and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("what", REQUESTS)
def test_a_wrong_request(address, what):
    method, path, headers, status, words = REQUESTS[what]
    content = b"{}" if method == "POST" else None
    check(httpx.request(method, f"{address}{path}", headers=headers, content=content), status, words)


# ------------------------------------------------------------------------------------------------------ small print


@pytest.mark.parametrize("format", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_events_carry_every_format(address, format):
    body = {"input": "The cat sat on the mat.", "voice": "calm", "response_format": format, "seed": 1}
    plain = httpx.post(f"{address}{SPEECH}", json=body | {"stream": True}, timeout=60).content
    answer = httpx.post(f"{address}{SPEECH}", json=body | {"stream_format": "sse"}, timeout=60)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    data = b"".join(base64.b64decode(e["audio"]) for e in events if e["type"] == "speech.audio.delta")
    assert events[-1]["type"] == "speech.audio.done"
    if format in ("mp3", "aac", "flac", "wav", "pcm"):
        assert data == plain
    else:  # an Ogg's pages have a random serial number
        assert len(data) == len(plain) and data[:4] == b"OggS"


def test_head_and_trailing_slashes(address):
    for path in ("/health", "/v1/models", VOICES, "/"):
        answer = httpx.head(f"{address}{path}")
        assert answer.status_code == 200 and not answer.content
    for path in ("/health/", "/v1/models/", f"{VOICES}/", "/v1/conversations/begun/"):
        assert httpx.get(f"{address}{path}").status_code == 200
    assert httpx.post(f"{address}{SPEECH}/", json={"input": "Hello.", "voice": "calm"}, timeout=60).status_code == 200


def test_saved_files_open_in_what_people_use(address, tmp_path):
    import wave

    wavfile = pytest.importorskip("scipy.io.wavfile")
    body = {"input": "The cat sat on the mat.", "voice": "calm", "seed": 1}
    want = samples(httpx.post(f"{address}{SPEECH}", json=body | {"response_format": "pcm"}, timeout=60).content)
    for format in ("wav", "flac"):
        answer = httpx.post(f"{address}{SPEECH}", json=body | {"response_format": format}, timeout=60)
        assert int(answer.headers["content-length"]) == len(answer.content)
        (tmp_path / f"a.{format}").write_bytes(answer.content)
        np.testing.assert_array_equal(soundfile.read(tmp_path / f"a.{format}", dtype="int16")[0], want)
        assert soundfile.info(tmp_path / f"a.{format}").frames == len(want)
    np.testing.assert_array_equal(wavfile.read(tmp_path / "a.wav")[1], want)
    with wave.open(str(tmp_path / "a.wav")) as opened:
        assert opened.getnframes() == len(want)
