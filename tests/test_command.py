"""The command of csm.py, the default downloads, and the real weights if you have them."""

import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import csm  # before mlx
import mimi
from csm_tools import checkpoints, narrate, speak, transcribe
from csm_tools.text import parts_of

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile

from conftest import clip, write_model

HERE = Path(__file__).parent.parent
SHORT = ["--max-audio-length-ms", "400"]


def run(*args, input=None, **env):
    """Run `python csm.py ARGS` in a process."""
    command = [sys.executable, str(HERE / "csm.py"), *map(str, args)]
    return subprocess.run(command, input=input, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


def wav(path):
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype, info.format) == (24000, 1, "PCM_16", "WAV")
    return soundfile.read(path, dtype="int16")[0]


def test_command_and_library_say_the_same(folder, generator, tmp_path):
    done = run("hello there", tmp_path / "a.wav", "--model", folder, "--seed", 7, *SHORT)
    assert done.returncode == 0, done.stderr.decode()
    expected = mimi.to_pcm16(generator.generate("hello there", seed=7, max_audio_length_ms=400))
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), expected)
    last = done.stderr.decode().splitlines()[-1]
    for part in ("0.40 s of audio in", "real-time factor", "first audio after", "peak memory", "seed 7"):
        assert part in last
    assert [f.name for f in tmp_path.iterdir()] == ["a.wav"]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert speak.main(["hello there", "--model", str(folder), *SHORT, "--seed", "7", str(tmp_path / "pipe")]) == 0
        assert len(reader.stdout.read()) == 44 + 2 * len(expected) and (tmp_path / "pipe").is_fifo()
    (tmp_path / "text").write_text("hello there\n")
    for text, stdin in ((f"@{tmp_path / 'text'}", None), ("-", b"hello there\n")):
        done = run(text, "-", "--model", folder, "--seed", 7, *SHORT, input=stdin)
        head, pcm = done.stdout[:44], np.frombuffer(done.stdout[44:], "<i2")
        assert head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt "
        assert np.abs(pcm.astype(int) - expected).max() <= 1  # a stream rounds each piece


def test_command_with_context(folder, generator, tmp_path):
    stereo = np.stack([clip(1), clip(1)], axis=1)
    soundfile.write(tmp_path / "me.wav", stereo, 24000, subtype="FLOAT")
    turns = [csm.Segment(1, "hello", clip(1)), csm.Segment(0, "yes", clip(1))]
    (tmp_path / "turns.json").write_text(
        json.dumps(
            [
                {"speaker": 1, "text": "hello", "audio": "me.wav"},
                {"speaker_id": 0, "text": "yes", "audio_path": "me.wav"},
            ]
        )
    )
    expected = generator.generate("no", 1, turns, seed=1, max_audio_length_ms=400)
    args = ["no", tmp_path / "a.wav", "--model", folder, "--speaker", 1, "--seed", 1, *SHORT]
    assert speak.main([str(a) for a in [*args, "--context", tmp_path / "turns.json"]]) == 0
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(expected))
    expected = generator.generate("no", 1, [turns[0]], seed=1, voice_match=True, max_audio_length_ms=400)
    args += ["--ref-audio", tmp_path / "me.wav", "--ref-text", "hello", "--voice-match"]
    assert speak.main([str(a) for a in args]) == 0
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(expected))


def test_dialogue(folder, generator, tmp_path):
    (tmp_path / "script.txt").write_text("0: hello\n\n[1]: yes: no\n  0 : there\n")
    args = ["--dialogue", tmp_path / "script.txt", tmp_path / "a.wav", "--model", folder, "--seed", 1, *SHORT]
    assert speak.main([str(a) for a in args]) == 0
    talk = generator.conversation()
    turns = [(0, "hello"), (1, "yes: no"), (0, "there")]
    said = [talk.say(text, s, seed=1 + i, max_audio_length_ms=400) for i, (s, text) in enumerate(turns)]
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(mx.concatenate(said)))


SENTENCE = "hello there, how are you today, and how are you? "


def test_a_long_text_is_said_in_parts_of_one_voice(folder, generator, tmp_path, caplog):
    text = SENTENCE * 6
    parts = parts_of(text)
    assert len(parts) == 6
    args = [str(tmp_path / "a.wav"), "--model", str(folder), "--seed", "1", *SHORT]
    options = {"max_audio_length_ms": 400}

    def joined(context=(), voice=None):
        pieces = []
        for i, (part, pause) in enumerate(parts):
            pieces.append(generator.generate(part, 0, context, voice=voice, seed=1 + i, **options))
            pieces.append(np.zeros(int(pause * 24000), np.float32))
            if voice == "none" and not context:
                codes = generator.generate_codes(part, 0, voice=voice, seed=1, **options)
                context = [csm.Segment(0, part, codes=codes)]
        return np.concatenate(pieces)

    speak.main([text, *args])
    np.testing.assert_allclose(mimi.read_audio(tmp_path / "a.wav"), np.clip(joined(), -1, 1), atol=1e-4)
    speak.main([text, *args, "--voice", "none"])
    np.testing.assert_allclose(mimi.read_audio(tmp_path / "a.wav"), np.clip(joined(voice="none"), -1, 1), atol=1e-4)
    caplog.clear()
    speak.main([text, *args, "--whole"])
    whole = generator.generate(text.strip(), seed=1, **options)
    np.testing.assert_allclose(mimi.read_audio(tmp_path / "a.wav"), np.clip(whole, -1, 1), atol=1e-4)
    assert "characters are said at once: this model says 240 well" in caplog.text


def test_the_model_says_how_long_a_part_is(tmp_path, monkeypatch):
    write_model(tmp_path / "m", voices=False)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"max_part_characters": 30}))
    said, encode = [], csm.Tokenizer.encode
    monkeypatch.setattr(csm.Tokenizer, "encode", lambda self, text: said.append(text) or encode(self, text))
    speak.main([SENTENCE, str(tmp_path / "a.wav"), "--model", str(tmp_path / "m"), *SHORT])
    assert set(said) == {"[0]hello there,", "[0]how are you today,", "[0]and how are you?"}


def test_what_reaches_the_tokenizer(folder, tmp_path, monkeypatch):
    said, encode = [], csm.Tokenizer.encode
    monkeypatch.setattr(csm.Tokenizer, "encode", lambda self, text: said.append(text) or encode(self, text))
    args = ["**Dr. Smith** has 5 🐈", str(tmp_path / "a.wav"), "--model", str(folder), *SHORT]
    speak.main(args)
    assert "[0]Doctor Smith has five" in said
    speak.main([*args, "--verbatim"])
    assert "[0]**Dr. Smith** has 5 🐈" in said
    (tmp_path / "script.txt").write_text("0: I am 5.\n1: No. 6!\n")
    speak.main(["--dialogue", str(tmp_path / "script.txt"), *args[1:]])
    assert "[0]I am five." in said and "[1]Number six!" in said


def test_a_pause_is_silence(folder, tmp_path):
    text = "hello there [pause:1.5] how are you<break time='500ms'/> today [pause:.25]".replace("'", '"')
    speak.main([text, str(tmp_path / "a.wav"), "--model", str(folder), *SHORT])
    audio = wav(tmp_path / "a.wav")
    assert len(audio) == 3 * 5 * 1920 + 36_000 + 12_000 + 6_000
    assert audio[:9600].any() and not audio[9600 : 9600 + 36_000].any() and not audio[-6_000:].any()


def bad_inputs(d):
    """Users' mistakes: (arguments, part of the message)."""
    d.joinpath("text.wav").write_text("not audio")
    d.joinpath("empty.txt").write_text("\n")
    d.joinpath("bad.json").write_text('[{"speaker": 0}]')
    d.joinpath("odd.json").write_text('["hello"]')
    d.joinpath("script.txt").write_text("0: hello\nhello\n")
    d.joinpath("turns.json").write_text('[{"speaker": 0, "text": "hello", "audio": "none.wav"}]')
    soundfile.write(d / "nan.wav", np.array([0, np.nan, 0], np.float32), 24000, subtype="FLOAT")
    soundfile.write(d / "nothing.wav", np.zeros(0), 24000)
    soundfile.write(d / "ok.wav", clip(2), 24000)
    soundfile.write(d / "short.wav", clip(0.079), 24000)
    soundfile.write(d / "silent.wav", np.zeros(48000), 24000)
    turn = {"speaker": 0, "text": "hello there you", "audio": "ok.wav"}
    d.joinpath("number.json").write_text(json.dumps([turn | {"speaker": 10**30}]))
    d.joinpath("negative.txt").write_text("0: hello\n-1: hello\n")
    d.joinpath("dots.txt").write_text("Ann: hello\nBob: ...\n")
    soundfile.write(d / "mute.wav", clip(2), 24000)
    d.joinpath("mute.txt").write_text("\n")
    d.joinpath("half.json").write_text(json.dumps([turn, turn | {"speaker": 1.7}]))
    soundfile.write(d / "long.wav", clip(41), 24000)

    def ref(name):
        return ["--ref-audio", d / name, "--ref-text", "hello"]

    return [
        ([], ["--model", d / "none"], "no such model"),
        ([], ["--model", "tiny-bird"], "no such model: tiny-bird (csm-1b, tiny, a folder"),
        ([], ["--model", "nobody/nothing"], "--model tiny"),
        ([], ref("none.wav"), "no such file"),
        ([], ref("text.wav"), "not an audio file"),
        ([], ref("nan.wav"), "NaN"),
        ([], ref("nothing.wav"), "no sound"),
        ([], ref("long.wav"), "positions of 512"),
        ([], ["--ref-audio", d / "ok.wav"], "transcript"),
        ([], ["--ref-text", "hello"], "--ref-audio"),
        ([], ["--ref-audio", "", "--ref-text", "hello"], "--ref-audio is empty"),
        ([], ["--voice", "bob"], "unknown voice 'bob'; this model has: conversational_a, other"),
        ([], ["--speaker", "-1"], "speaker must be a whole number from 0"),
        ([], ["--speaker", 10**30], "speaker must be a whole number from 0"),
        ([], ["--voice", "bob", *ref("ok.wav")], "unknown voice 'bob'"),
        ([], ["--voice", d / "ok.wav"], "write what it says into"),
        ([], ref("short.wav"), "short.wav: the clip has 0.08 s of sound"),
        ([], ref("silent.wav"), "silent.wav: the clip is silent throughout"),
        ([], ["--context", d / "number.json"], "number.json, turn 1: speaker must be a whole number from 0"),
        ([], ["--context", d / "half.json"], "half.json, turn 2: speaker must be a whole number from 0"),
        ([d / "script.txt"], [], "script.txt is a file: write @"),
        (["..."], [], "empty"),
        ([], ["--context", d / "none.json"], "none.json"),
        ([], ["--context", d / "bad.json"], "bad.json"),
        ([], ["--context", d / "turns.json"], "none.wav"),
        ([], ["--temperature", "-1"], "temperature"),
        ([], ["--temperature", "warm"], "temperature"),
        ([], ["--context", d / "odd.json"], "odd.json"),
        ([], ["--top-p", "2"], "--top-p must lie"),
        ([], ["--top-k", "-3"], "--top-k must lie"),
        ([], ["--seed", "-1"], "seed"),
        ([], ["--max-audio-length-ms", "0"], "--max-audio-length-ms must be 80"),
        ([], ["--stream", "--streaming-interval", "0"], "--streaming-interval must"),
        ([], ["--voice", "none", "--voice-match"], "--voice-match continues"),
        ([""], [], "empty"),
        ([f"@{d / 'empty.txt'}"], [], "empty"),
        (["?! 🎉 [pause:1]"], [], "no words"),
        (["?!"], ["--verbatim", "--whole"], "no words"),
        ([f"@{d / 'none.txt'}"], [], "none.txt"),
        ([None], ["--dialogue", d / "script.txt"], "line 2"),
        ([None], ["--dialogue", d / "empty.txt"], "no turns"),
        ([None], ["--dialogue", d / "negative.txt"], "negative.txt, line 2: speaker must be a whole number"),
        ([None], ["--dialogue", d / "dots.txt"], "dots.txt, turn 2: the text is empty"),
        ([], ["--voice", d / "mute.wav"], "mute.wav: its transcript is empty"),
        ([], ["--ref-audio", d / "ok.wav", "--ref-text", " "], "ok.wav: its transcript is empty"),
        (["hello"], ["--dialogue", d / "script.txt"], "not both"),
        ([None], [], "TEXT and OUT"),
    ]


def test_bad_input_gets_one_line_and_loses_nothing(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(transcribe, "package", lambda: None)  # which could transcribe a clip
    out = tmp_path / "out.wav"
    out.write_bytes(b"what was there before")
    for text, args, message in bad_inputs(tmp_path):
        text = [t for t in (text or ["hello"]) if t is not None]
        model = [] if "--model" in args else ["--model", folder]
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as error:
            speak.main([str(a) for a in [*text, out, *model, *args]])
        err = capfd.readouterr().err
        assert error.value.code == 2, args
        assert err.startswith("csm.py: error: ") and err.count("\n") == 1 and message in err, err
        assert out.read_bytes() == b"what was there before" and sorted(tmp_path.iterdir()) == before
    for bad_out in (tmp_path, tmp_path / "none" / "a.wav", tmp_path / "a.m4a", tmp_path / "a"):
        done = run("hello", bad_out, "--model", folder)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"cannot write" in done.stderr


def test_damaged_models_say_what_is_wrong(folder, tmp_path, capfd):
    weights = mx.load(str(folder / "model.safetensors"))
    name = "decoder.layers.0.mlp.up_proj.weight"
    cases = {
        f"missing {name}": {k: w for k, w in weights.items() if k != name},
        "unexpected decoder.extra": weights | {"decoder.extra": mx.zeros(3)},
        f"{name} is (64, 16), not (64, 32)": weights | {name: mx.zeros((64, 16))},
    }
    for message, damaged in cases.items():
        write_model(tmp_path / "m", weights=damaged, voices=False)
        with pytest.raises(SystemExit) as error:
            speak.main(["hello", str(tmp_path / "a.wav"), "--model", str(tmp_path / "m")])
        err = capfd.readouterr().err
        assert error.value.code == 2 and err.count("\n") == 1 and message in err and not (tmp_path / "a.wav").exists()
    write_model(tmp_path / "m", voices=False)
    data = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(data[: len(data) // 2])
    done = run("hello", tmp_path / "a.wav", "--model", tmp_path / "m")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"truncated" in done.stderr
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights of a CSM"):
        csm.load(tmp_path / "m")


def test_gated_and_unknown_repositories(tmp_path, monkeypatch, capfd):
    import huggingface_hub
    from huggingface_hub import errors

    for kind, message in ((errors.GatedRepoError, "is gated"), (errors.RepositoryNotFoundError, "no such")):
        error = kind.__new__(kind)  # its constructor needs a response from the Hub

        def refuse(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        monkeypatch.setattr(checkpoints, "answers", lambda url: True)
        with pytest.raises(SystemExit) as exit:
            speak.main(["hello", str(tmp_path / "a.wav"), "--model", "sesame/csm-1b"])
        err = capfd.readouterr().err
        assert exit.value.code == 2 and err.count("\n") == 1 and message in err and "sesame/csm-1b" in err


def test_interrupted_keeps_what_is_finished(folder, generator, tmp_path, monkeypatch, capfd):
    def frames(self, text, speaker=0, **options):
        yield from np.ones((3, 8), np.int32)
        raise KeyboardInterrupt

    monkeypatch.setattr(csm.Conversation, "frames", frames)
    args = ["hello", str(tmp_path / "a.wav"), "--model", str(folder)]
    assert speak.main(args) == 130
    assert len(wav(tmp_path / "a.wav")) == 3 * 1920 and "0.2 s finished so far are in" in capfd.readouterr().err


def test_a_reader_that_leaves_is_no_error(folder):
    command = [sys.executable, HERE / "csm.py", "hello", "-", "--model", folder, "--streaming-interval", "0.08"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.read(44)[:4] == b"RIFF"
        p.stdout.close()
        assert b"Traceback" not in p.stderr.read() and p.wait() == 1


def test_speakers_by_name(folder, generator, tmp_path, capfd):
    """--context and --dialogue give a name the same number, which is printed."""
    soundfile.write(tmp_path / "me.wav", clip(1), 24000, subtype="FLOAT")
    turn = {"text": "hello there", "audio": r".\me.wav"}
    (tmp_path / "turns.json").write_text(json.dumps([turn | {"speaker": "Ann"}, turn | {"speaker": 0}]))
    (tmp_path / "script.txt").write_text("\ufeffBob: hello\r\nAnn: yes: no\n0: there\n")
    args = ["--dialogue", tmp_path / "script.txt", tmp_path / "a.wav", "--context", tmp_path / "turns.json"]
    assert speak.main([str(a) for a in [*args, "--model", folder, "--seed", 1, "--verbatim", *SHORT]]) == 0
    err = capfd.readouterr().err
    assert "speakers: Ann is 1, Bob is 2\n" in err and "warning: no clip" not in err
    talk = generator.conversation([csm.Segment(n, "hello there", clip(1)) for n in (1, 0)], speaker=2)
    turns = [(2, "hello"), (1, "yes: no"), (0, "there")]
    said = [talk.say(text, s, seed=1 + i, max_audio_length_ms=400) for i, (s, text) in enumerate(turns)]
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(mx.concatenate(said)))


@pytest.mark.parametrize(
    "seconds, text, options, warnings",
    [
        (4, "hello there you, how are you today, i am fine and you?", [], []),
        (1, "hello there you", [], ["the clip has 1.0 s of sound: 3 to 12 s"]),
        (31, "hello there, how are you today? " * 7, [], ["the clip has 31.0 s of sound"]),
        (4, "hello there you.", [], ["16 letters of text for 4.0 s of sound"]),
        (2, "hello there you, how are you today, i am fine and you? yes.", [], ["59 letters of text for 2.0 s"]),
        (4, "hello there you, how are you today, i am fine and you?", ["--voice", "other"], ["--voice is not used"]),
    ],
)
def test_what_may_be_wrong_with_a_clip_is_said(folder, tmp_path, capfd, seconds, text, options, warnings):
    soundfile.write(tmp_path / "me.wav", clip(seconds), 24000)
    args = ["hello", tmp_path / "a.wav", "--model", folder, "--ref-audio", tmp_path / "me.wav", "--ref-text", text]
    assert speak.main([str(a) for a in [*args, *options, *SHORT]]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == len(warnings) and all(part in line for part, line in zip(warnings, said)), said


def test_a_clip_of_another_speaker_is_said_once(folder, tmp_path, capfd):
    soundfile.write(tmp_path / "me.wav", clip(2), 24000)
    turn = {"speaker": 0, "text": "hello there, how are you?", "audio": "me.wav"}
    (tmp_path / "turns.json").write_text(json.dumps([turn]))
    args = ["hello", tmp_path / "a.wav", "--model", folder, "--speaker", 1, "--context", tmp_path / "turns.json"]
    assert speak.main([str(a) for a in [*args, *SHORT]]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "no clip is of speaker 1; it takes the voice of speaker 0" in said[0]


def test_what_is_read_is_never_overwritten(folder, tmp_path, capfd):
    sound = tmp_path / "me.wav"
    soundfile.write(sound, clip(2), 24000)
    (tmp_path / "me.txt").write_text("hello there, how are you?")
    (tmp_path / "turns.json").write_text('[{"speaker": 0, "text": "hello there, how are you?", "audio": "me.wav"}]')
    os.link(sound, tmp_path / "link.wav")
    before = sound.read_bytes()
    ref = ["--ref-audio", sound, "--ref-text", "hello there, how are you?"]
    for out, args in ((sound, ["--voice", sound]), (tmp_path / "link.wav", ref), (sound, ["--context", "turns.json"])):
        args = [tmp_path / a if a == "turns.json" else a for a in args]
        with pytest.raises(SystemExit) as e:
            speak.main([str(a) for a in ["hello", out, "--model", folder, *args]])
        assert e.value.code == 2 and "is also an input" in capfd.readouterr().err
    assert sound.read_bytes() == before


@pytest.mark.parametrize("program", ["speak", "narrate", "dialogue"])
def test_the_clip_of_the_voice_is_read_once(folder, generator, tmp_path, monkeypatch, program):
    """And sounds as in the library, where a dialogue's first speaker gets it."""
    read, own = [], mimi.read_audio
    monkeypatch.setattr(mimi, "read_audio", lambda path, *rest: read.append(path) or own(path, *rest))
    soundfile.write(tmp_path / "me.wav", clip(0.8), 24000, subtype="FLOAT")
    (tmp_path / "me.txt").write_text("hello there")
    (tmp_path / "script.txt").write_text("1: Yes." if program == "dialogue" else "Yes.")
    out, voice = str(tmp_path / "a.wav"), str(tmp_path / "me.wav")
    options = ["--model", str(folder), "--voice", voice, "--seed", "7", *SHORT]
    first = {"speak": ["Yes.", out], "narrate": [str(tmp_path / "script.txt"), out]}
    first["dialogue"] = ["--dialogue", str(tmp_path / "script.txt"), out]
    (narrate if program == "narrate" else speak).main([*first[program], *options])
    assert len(read) == 1
    said = generator.generate("Yes.", int(program == "dialogue"), voice=voice, seed=7, max_audio_length_ms=400)
    np.testing.assert_array_equal(wav(out)[: said.size], mimi.to_pcm16(said))


def test_names_and_modes_of_files(folder, tmp_path):
    """A file name of 251 bytes works, and OUT keeps the mode of the file it replaces."""
    long = tmp_path / ("ä" * 123 + "a.wav")
    assert speak.main(["hello", str(long), "--model", str(folder), *SHORT]) == 0
    long.chmod(0o640)
    assert speak.main(["hello", str(long), "--model", str(folder), *SHORT]) == 0
    assert long.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [long]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import csm_layouts

def counted(own):
    def call(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **options)
    return call

new, place, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
files = {str(path.relative_to(new)): path for path in sorted(new.rglob("*")) if path.is_file()}
for name in ("replace", "unlink", "write_text", "mkdir"):
    setattr(Path, name, counted(getattr(Path, name)))
shutil.copyfile = counted(shutil.copyfile)
csm_layouts.write_folder(place, files)
"""


def test_a_save_that_is_killed_leaves_no_mixture(tmp_path):
    """Killed before any of its steps, it leaves the old model, the new one, or one that does not load."""
    old, new, place = (write_model(tmp_path / name, f"k{K}") for name, K in (("old", 4), ("new", 8), ("m", 4)))
    states, step, code = [], 12, 1
    while code:
        shutil.rmtree(place)
        shutil.copytree(old, place)
        (place / "own.txt").write_text("of the user")
        step += 1
        code = subprocess.run([sys.executable, "-c", KILLED, new, place, str(step)], cwd=HERE).returncode
        assert code in (0, -signal.SIGKILL)
        try:
            states.append(csm.load(place).codebooks)
        except ValueError as e:
            assert "config.json is not a JSON file" in str(e)
            assert any("interrupted" in file.read_text() for file in place.glob("*config.json"))
            states.append("does not load")
        assert (place / "own.txt").exists() and len(list(tmp_path.glob(".m.*.part"))) == (code != 0)
    assert [state for state, _ in itertools.groupby(states)] == [4, "does not load", 8]


def test_what_dead_processes_left_is_removed(folder, generator, tmp_path):
    """Temporary folders and files of dead processes go, those of running processes stay."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f".m.{platform.node()[:30]}-{pid}-0.part").mkdir()
        (tmp_path / f".a.wav.{platform.node()[:30]}-{pid}-0.part").write_bytes(b"")
    (tmp_path / f".a.wav.{platform.node()[:30]}-x.part").write_bytes(b"")
    generator.save(tmp_path / "m")
    mimi.write_audio(tmp_path / "a.wav", clip(0.1))
    left = sorted(p.name.removeprefix(f".{p.name[1:].partition('.')[0]}") for p in tmp_path.glob(".*.part"))
    assert not [name for name in left if f"-{dead.pid}-" in name] and len(left) == 3


def test_the_model_is_the_one_typed_or_the_adapters_or_the_environments(folder, tmp_path, monkeypatch):
    from csm_tools import command

    (tmp_path / "adapter_config.json").write_text(json.dumps({"model": os.path.relpath(folder, tmp_path)}))
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    loaded = []
    bare = csm.Generator.__new__(csm.Generator)
    bare.voices = {}
    monkeypatch.setattr(csm, "load", lambda model, **options: loaded.append(model) or bare)
    p = command.parser_for("x")
    command.add_model_options(p)
    monkeypatch.setenv("CSM_MODEL", "tiny")
    for args in ([], ["--model", "typed"], ["--adapter", str(tmp_path)]):
        command.load_for(p.parse_args(args))
    monkeypatch.delenv("CSM_MODEL")
    command.load_for(p.parse_args([]))
    assert loaded == ["tiny", "typed", str(folder), "csm-1b"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_it_is_an_error(generator):
    pid = os.fork()
    if not pid:
        try:
            generator.generate("hello")
        except ValueError as e:
            os._exit(7 if "before a fork" in str(e) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_the_version_is_one():
    pyproject = HERE / "pyproject.toml"
    if pyproject.exists():
        assert f'version = "{csm.__version__}"' in pyproject.read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals here")
def test_sighup_is_sigterm_but_not_under_nohup(folder, tmp_path):
    for number in (signal.SIG_DFL, signal.SIG_IGN):
        command = [sys.executable, "-c", f"""
import os, signal, sys
signal.signal(signal.SIGHUP, signal.{number.name})
from csm_tools import command
p = command.parser_for("x")
command.run(p, lambda args: os.kill(os.getpid(), signal.SIGHUP) or print("went on"), p.parse_args([]))
"""]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
        expected = (129, "") if number == signal.SIG_DFL else (0, "went on\n")
        assert (done.returncode, done.stdout, done.stderr) == (*expected, "")


def test_without_a_network_it_is_said_at_once(tmp_path, monkeypatch):
    """No retries: the connection is tried first, and cached files are used."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def look(*args, local_files_only=False, **options):
        assert local_files_only, "the Hub is asked"
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", look)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", look)
    with pytest.raises(checkpoints.DownloadError, match="no network"):
        checkpoints.download("somebody/something", "model.safetensors", "*.json")


def test_extras_are_checked_before_anything_is_loaded(tmp_path, monkeypatch, capfd):
    from csm_tools import show

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(csm, "load", None)
    for main, args, extra in (
        (show.main, ["hello", "a.png"], "show"),
        (speak.main, ["hello", "a.wav", "--play"], "play"),
    ):
        with pytest.raises(SystemExit) as e:
            main([*args, "--model", "tiny"])
        err = capfd.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and f"pip install 'csm-speech[{extra}]'" in err


@pytest.mark.parametrize("suffix", mimi.FORMATS)
def test_the_suffix_says_the_format(folder, generator, tmp_path, suffix):
    assert speak.main(["hello there", str(tmp_path / f"a{suffix}"), "--model", str(folder), "--seed", "7", *SHORT]) == 0
    info = soundfile.info(tmp_path / f"a{suffix}")
    assert (info.format, info.channels) == (mimi.FORMATS[suffix][0], 1)
    expected = generator.generate("hello there", seed=7, max_audio_length_ms=400)
    audio = mimi.read_audio(tmp_path / f"a{suffix}")
    assert abs(len(audio) - expected.size) <= 2 * 1920  # encoders pad
    if suffix in (".wav", ".flac"):
        np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=2e-4)


def test_a_text_that_is_not_utf8(folder, tmp_path):
    (tmp_path / "text").write_bytes(b"caf\xe9")
    for text, stdin in ((f"@{tmp_path / 'text'}", None), ("-", b"caf\xe9"), (b"caf\xe9", None)):
        command = [sys.executable, HERE / "csm.py", text, tmp_path / "a.wav", "--model", folder]
        done = subprocess.run(command, input=stdin, capture_output=True)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a process")
@pytest.mark.parametrize("suffix", [".wav", ".mp3"])
def test_a_full_disk_is_one_line(folder, tmp_path, suffix):
    import resource

    def full():  # no file may grow beyond a kilobyte
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, HERE / "csm.py", "hello", tmp_path / f"a{suffix}", "--model", folder]
    done = subprocess.run(
        command, capture_output=True, preexec_fn=full, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert done.returncode == 2 and b"cannot write" in done.stderr and b"Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing_behind(folder, tmp_path):
    command = [sys.executable, HERE / "csm.py", "hello", tmp_path / "a.wav", "--model", folder]
    command += ["--max-audio-length-ms", "30000", "--stream", "--streaming-interval", "0.08"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as p:
        while not any(f.stat().st_size > 100 for f in tmp_path.iterdir()):
            assert p.poll() is None
        p.terminate()
        err = p.stderr.read()
        assert p.wait() == 143 and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_without_csm_1b_the_model_in_the_box_speaks(tmp_path):
    nowhere = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = run("hello", tmp_path / "a.wav", *SHORT, **nowhere)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.decode().splitlines() if "tiny" in line]
    assert len(said) == 1 and "csm-1b" in said[0] and len(wav(tmp_path / "a.wav")) > 0
    done = run("hello", tmp_path / "b.wav", "--model", "csm-1b", **nowhere)  # a named model is never replaced
    assert done.returncode == 2 and b"cannot download" in done.stderr and not (tmp_path / "b.wav").exists()


def test_help_needs_no_model():
    done = run("--help")
    assert done.returncode == 0 and b"--voice-match" in done.stdout


def test_without_arguments_the_usage_is_three_lines(capfd):
    done = run()
    assert done.returncode == 2 and done.stderr.startswith(b"usage: csm.py TEXT OUT") and done.stdout == b""
    assert done.stderr.count(b"\n") == 3
    with pytest.raises(SystemExit):  # `python -m csm_tools.speak` is the same command
        speak.main([])
    assert capfd.readouterr().err == done.stderr.decode()


# --------------------------------------------------------------------------------------- downloads, the real weights


def test_default_downloads(hub, tmp_path):
    done = run("hello", tmp_path / "a.wav", *SHORT, "--seed", 1, **hub)
    assert done.returncode == 0, done.stderr.decode()
    assert len(wav(tmp_path / "a.wav")) == 5 * 1920
    done = run("hello", tmp_path / "a.wav", "--voice", "read_speech_a", **hub)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"read_speech_a" in done.stderr


@pytest.mark.skipif(not os.environ.get("CSM_GOLDEN"), reason="opt-in: CSM_GOLDEN=csm-1b with the real weights at hand")
def test_golden_codes_of_the_real_weights():
    golden = json.loads((HERE / "tests/golden_csm_1b.json").read_text())
    generator = csm.load(os.environ["CSM_GOLDEN"], dtype="float32")
    n = len(golden["frames"])
    codes = generator.generate_codes(
        golden["text"], golden["speaker"], voice="none", temperature=0, max_audio_length_ms=n * 80
    )
    assert codes.tolist() == golden["frames"]
