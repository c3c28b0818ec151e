"""narrate speaks long texts in one voice, and an interruption loses nothing."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import csm  # before mlx
import csm_batch
from conftest import clip, write_model
from csm_tools import checkpoints, epub, narrate
from csm_tools.text import parts_of

HERE = Path(__file__).parent.parent
SHORT = ["--max-audio-length-ms", "240"]


TEXT = "hello there, how are you today? i am fine. Yes, I am. No, I am not fine.\n\nHow are you today then?"


def interrupt_at_the_third(monkeypatch):
    """Raise Ctrl-C while narrate speaks the third sentence."""
    spoken = narrate.spoken

    def interrupted(*more):
        for i, codes in spoken(*more):
            if i == 2:
                raise KeyboardInterrupt
            yield i, codes

    monkeypatch.setattr(narrate, "spoken", interrupted)


def test_the_same_whatever_the_batch(generator):
    said = [
        [(n, audio) for n, _, audio in narrate.narrate(generator, TEXT, batch=b, seed=3, max_audio_length_ms=240)]
        for b in (1, 2, 8)
    ]
    n = len(parts_of(TEXT))
    assert n > 2 and [len(s) for s in said] == [n] * 3 and [i for i, _ in said[0]] == list(range(1, n + 1))
    for other in said[1:]:
        for (_, a), (_, b) in zip(said[0], other):
            np.testing.assert_array_equal(a, b)
    rest = list(narrate.narrate(generator, TEXT, batch=2, done={0}, seed=3, max_audio_length_ms=240))
    for (_, a), (_, _, b) in zip(said[0][1:], rest, strict=True):
        np.testing.assert_array_equal(a, b)
    # Sentence i alone, with seed + i and the same voice, is the same.
    part, pause = parts_of(TEXT)[2]
    alone = generator.generate(part, 0, seed=5, max_audio_length_ms=240)
    np.testing.assert_allclose(said[0][2][1][: len(alone)], alone, atol=1e-5)
    assert len(said[0][2][1]) == len(alone) + round(24000 * pause)


def test_fewer_codebooks(generator):
    g = generator
    fewer = csm.Generator(g.model, g.mimi, g.tokenizer, g.voices, codebooks=3)
    said = [audio for _, _, audio in narrate.narrate(fewer, TEXT, seed=3, max_audio_length_ms=240)]
    alone = fewer.generate(parts_of(TEXT)[0][0], 0, seed=3, max_audio_length_ms=240)
    assert len(said) == len(parts_of(TEXT)) and 0 < len(alone) < len(said[0])
    np.testing.assert_allclose(said[0][: len(alone)], alone, atol=1e-5)


def test_a_model_that_continues_its_voice_does_so_here_too(tmp_path):
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"voice_match": True}))
    generator = csm.load(tmp_path, dtype="float32")
    said = [audio for _, _, audio in narrate.narrate(generator, TEXT, seed=3, max_audio_length_ms=240)]
    for i in (0, 1):
        part = parts_of(TEXT)[i][0]
        alone = generator.generate(part, 0, seed=3 + i, max_audio_length_ms=240)
        np.testing.assert_allclose(said[i][: len(alone)], alone, atol=1e-5)


@pytest.mark.slow
def test_the_batch_stays_full(generator, monkeypatch):
    """Sentences join as others end."""
    sizes, step = [], csm_batch.Batch.next
    monkeypatch.setattr(csm_batch.Batch, "next", lambda self: sizes.append(len(self)) or step(self))
    text = "\n\n".join("hello there, you" + " you" * (i % 3) * 4 for i in range(9))
    n = len(parts_of(text))
    pieces = list(narrate.narrate(generator, text, batch=4, seed=1))
    frames = sum((len(audio) - 24000 * parts_of(text)[i][1]) / 1920 for i, (_, _, audio) in enumerate(pieces))
    assert len(pieces) == n and sum(sizes[: -len(sizes) // 3]) > 3.5 * len(sizes[: -len(sizes) // 3])
    assert sum(sizes) >= frames


def test_without_a_voice_the_first_sentence_is_the_voice(generator, monkeypatch):
    contexts, prefill = [], csm.Generator.context_cache
    monkeypatch.setattr(csm.Generator, "context_cache", lambda self, rows: contexts.append(rows) or prefill(self, rows))
    ((_, _, first), *_) = narrate.narrate(generator, TEXT, 1, voice="none", seed=3, max_audio_length_ms=240)
    nothing, voice = contexts
    codes = generator.generate_codes(parts_of(TEXT)[0][0], 1, voice="none", seed=3, max_audio_length_ms=240)
    segment = csm.Segment(1, parts_of(TEXT)[0][0], codes=codes)
    assert not len(nothing) and np.array_equal(voice, generator.segment_rows(segment))
    np.testing.assert_allclose(first[: 3 * 1920], generator.decode(codes), atol=1e-5)


def test_what_ended_at_once_is_said_again(generator, monkeypatch):
    seeds, insert = [], csm_batch.Batch.insert

    def nothing_at_first(self, rows, n, seed, *more):
        uid = insert(self, rows, n, seed, *more)
        seeds.append(seed)
        if seed in (4, 4 + 2**32):  # ends at once
            self.waiting.pop()
            ended.append(uid)
        return uid

    ended, step = [], csm_batch.Batch.next
    monkeypatch.setattr(csm_batch.Batch, "insert", nothing_at_first)
    monkeypatch.setattr(csm_batch.Batch, "next", lambda self: step(self) + [(ended.pop(), None) for _ in ended[:]])
    said = [audio for _, _, audio in narrate.narrate(generator, TEXT, batch=2, seed=3, max_audio_length_ms=240)]
    assert len(said) == len(parts_of(TEXT)) and all(len(audio) >= 3 * 1920 for audio in said)
    assert {4, 4 + 2**32, 4 + 2 * 2**32} <= set(seeds) and 4 + 3 * 2**32 not in seeds


@pytest.mark.slow
def test_endless_speech_is_cut_by_its_own_sentence(generator):
    texts = ["hello there, hello there.", "How are you today? " * 5]
    said = [list(narrate.narrate(generator, "\n\n".join(texts), batch=b, seed=1)) for b in (1, 2)]
    lengths = [[(len(audio) - round(0.7 * 24000)) // 1920 for _, _, audio in s[:1]] for s in said]
    assert lengths[0] == lengths[1] == [int((3_000 + 200 * len(texts[0])) / 80)]


def test_command(folder, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    args = ["--model", str(folder), "--seed", "3", *SHORT]
    narrate.main([str(tmp_path / "book.txt"), str(tmp_path / "a.wav"), "--batch", "2", *args])
    whole, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    n = len(parts_of(TEXT))
    assert rate == 24000 and len(whole) == n * 3 * 1920 + round(24000 * sum(p for _, p in parts_of(TEXT)))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.wav", "book.txt"]
    narrate.main([str(tmp_path / "book.txt"), str(tmp_path / "b.flac"), *args])
    assert soundfile.info(tmp_path / "b.flac").format == "FLAC"
    np.testing.assert_array_equal(soundfile.read(tmp_path / "b.flac", dtype="int16")[0], whole)


def test_captions(folder, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(TEXT)
    args = [str(tmp_path / "book.txt"), str(tmp_path / "a.wav"), "--model", str(folder), "--seed", "3", *SHORT]
    args += ["--captions", "--batch", "1"]
    expected, start = "", 0
    for i, (part, pause) in enumerate(parts_of(TEXT), 1):
        expected += f"{i}\n00:00:0{start:.3f} --> 00:00:0{start + 0.24:.3f}\n{part}\n\n".replace(".", ",", 2)
        start += 0.24 + pause
    narrate.main(args)
    assert (tmp_path / "a.srt").read_text() == expected
    (tmp_path / "a.srt").unlink()
    interrupt_at_the_third(monkeypatch)
    with pytest.raises(SystemExit):
        narrate.main(args)
    monkeypatch.undo()
    narrate.main(args)
    assert (tmp_path / "a.srt").read_text() == expected
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.srt", "a.wav", "book.txt"]


CONTAINER = """<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">
<rootfiles><rootfile full-path="OPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="b" href="text/two.xhtml" media-type="application/xhtml+xml"/>
<item id="a" href="text/one%20a.xhtml" media-type="application/xhtml+xml"/>
<item id="cover" href="cover.xhtml" media-type="application/xhtml+xml"/>
</manifest><spine>
<itemref idref="cover"/><itemref idref="nav"/><itemref idref="a"/><itemref idref="b"/></spine></package>"""
PAGE = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>no</title></head><body>{}</body></html>'
NOTE = '<sup><a epub:type="noteref" href="#n">1</a></sup>'


def write_epub(path):
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("OPS/book.opf", PACKAGE)
        book.writestr("OPS/cover.xhtml", PAGE.format('<img src="a.png" alt=""/>'))
        book.writestr("OPS/nav.xhtml", PAGE.format("<nav><ol><li>contents</li></ol></nav>"))
        one = f"<h1>One</h1>\n<p>Hello <em>there</em>,\n  you.{NOTE}</p><p>Tom &amp; I<br/>am</p>"
        book.writestr("OPS/text/one a.xhtml", PAGE.format(one))
        book.writestr("OPS/text/two.xhtml", PAGE.format("<script>no</script><div>Yes.</div>"))
    return path


def test_an_epub_is_read_in_its_order(folder, tmp_path):
    book = write_epub(tmp_path / "book.epub")
    assert epub.chapters(book) == ["One\n\nHello there, you.\n\nTom & I\n\nam", "Yes."]
    options = ["--model", str(folder), "--seed", "3", *SHORT]
    narrate.main([str(book), "--out-dir", str(tmp_path / "out"), *options])
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["book-01.wav", "book-02.wav"]
    narrate.main([str(book), str(tmp_path / "a.wav"), *options])
    audio = soundfile.read(tmp_path / "a.wav")[0]
    assert len(audio) == 5 * 5760 + round(24000 * (3 * 0.7 + 2))
    assert not audio[-5760 - 48000 : -5760].any()


def test_marks_of_notes_and_what_stands_beside_the_text_are_unsaid(tmp_path):
    """Older books do not name the kind of a link."""
    text = "<p>So<sup><a href='#n1'>1</a></sup> it is.<a href='n.xhtml#n2'>[2]</a>"
    text += " <a href='#c'>Part 3</a> m<sup>2</sup></p>"
    package = PACKAGE.replace('<itemref idref="b"/>', '<itemref idref="b" linear="no"/>')
    with zipfile.ZipFile(tmp_path / "book.epub", "w") as book:
        for name, content in (("META-INF/container.xml", CONTAINER), ("OPS/book.opf", package)):
            book.writestr(name, content)
        for name in ("cover", "nav", "text/two"):
            book.writestr(f"OPS/{name}.xhtml", PAGE.format("<p>Beside.</p>" if name == "text/two" else ""))
        book.writestr("OPS/text/one a.xhtml", PAGE.format(text))
    assert epub.chapters(tmp_path / "book.epub") == ["So it is. Part 3 m2"]


def test_what_is_no_epub_is_said(folder, tmp_path, capfd):
    (tmp_path / "a.epub").write_text("hello")
    with zipfile.ZipFile(tmp_path / "b.epub", "w") as book:
        book.writestr("META-INF/container.xml", "<container/>")
    with zipfile.ZipFile(tmp_path / "c.epub", "w") as book:
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("OPS/book.opf", "<package")
    for name in "abc":
        with pytest.raises(SystemExit) as e:
            narrate.main([str(tmp_path / f"{name}.epub"), str(tmp_path / "a.wav"), "--model", str(folder)])
        err = capfd.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and f"{name}.epub" in err


def test_many_texts(folder, tmp_path, capfd):
    for i, text in enumerate((TEXT, "hello there, how are you today?", "i am fine. Yes, I am.")):
        (tmp_path / f"{i}.txt").write_text(text)
    args = [*(str(tmp_path / f"{i}.txt") for i in range(3)), "--out-dir", str(tmp_path / "out"), "--format", "ogg"]
    args += ["--model", str(folder), "--seed", "3", *SHORT]
    narrate.main(args)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["0.ogg", "1.ogg", "2.ogg"]
    (tmp_path / "out/1.ogg").unlink()
    before = (tmp_path / "out/0.ogg").read_bytes()
    narrate.main(args)
    assert (tmp_path / "out/1.ogg").exists() and (tmp_path / "out/0.ogg").read_bytes() == before
    assert "0.ogg exists already" in capfd.readouterr().err


def test_a_mistake_loses_nothing_of_what_is_finished(folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "book.txt").write_text(TEXT)
    args = [str(tmp_path / "book.txt"), str(tmp_path / "a.wav"), "--model", str(folder), "--batch", "1", *SHORT]
    interrupt_at_the_third(monkeypatch)
    with pytest.raises(SystemExit) as e:
        narrate.main(args)
    assert e.value.code == 130
    monkeypatch.undo()
    part = tmp_path / "a.wav.part"
    before = part.read_bytes()
    assert any(before) and "continues from here" in capfd.readouterr().err
    for wrong in (
        ["--voice", "typo"],
        ["--batch", "0"],
        ["--seed", "-1"],
        ["--speaker", "-1"],
        ["--temperature", "0.5"],
    ):
        with pytest.raises(SystemExit) as e:
            narrate.main([*args, *wrong])
        assert e.value.code == 2 and capfd.readouterr().err.count("\n") == 1 and part.read_bytes() == before
    with open(part, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            narrate.main(args)
    assert "another narrate is writing" in capfd.readouterr().err and part.read_bytes() == before
    (tmp_path / "book.txt").write_text(TEXT)
    part.write_bytes(before[:1000])  # a crash may leave this: start over
    narrate.main(args)
    whole = soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
    assert len(whole) == sum(3 * 1920 + int(24000 * p) for _, p in parts_of(TEXT)) and not part.exists()
    assert (np.abs(whole[: 3 * 1920]) > 0).mean() > 0.5


def interrupted_at(monkeypatch, wanted):
    """Raise Ctrl-C when sentence `wanted` (from 0) is finished."""
    spoken = narrate.spoken

    def until(*more):
        for i, codes in spoken(*more):
            if i == wanted:
                raise KeyboardInterrupt
            yield i, codes

    monkeypatch.setattr(narrate, "spoken", until)


@pytest.mark.parametrize("voice", ["other", "none"])
def test_a_mended_text_keeps_what_did_not_change(folder, tmp_path, monkeypatch, voice):
    """Finished sentences are spoken again only if their words changed, even if new ones come before them."""
    lines = ["hello there, how are you today?", "i am fine, yes i am.", "no, i am not fine.", "yes yes yes yes yes."]
    args = [str(tmp_path / "book.txt"), str(tmp_path / "a.wav"), "--model", str(folder), "--batch", "1", *SHORT]
    args += ["--voice", voice, "--seed", "3"]
    (tmp_path / "book.txt").write_text("\n\n".join(lines))
    with monkeypatch.context() as m:
        interrupted_at(m, 3)
        with pytest.raises(SystemExit):
            narrate.main(args)
    held = (tmp_path / "a.wav.part").read_bytes()
    n = 3 * 1920 * 2 + int(24000 * 0.7) * 2
    assert len(held) == 3 * n
    (tmp_path / "book.txt").write_text("\n\n".join([lines[0], "hello you, hello there.", lines[2], lines[1], lines[3]]))
    said, spoken = [], narrate.spoken
    monkeypatch.setattr(narrate, "spoken", lambda g, todo, *more: said.extend(todo) or spoken(g, todo, *more))
    narrate.main(args)
    assert [i for i in said if i or voice == "other"] == [1, 4]  # without a voice, the first sets it
    whole = soundfile.read(tmp_path / "a.wav", dtype="int16")[0].tobytes()
    assert whole[:n] == held[:n] and whole[2 * n : 3 * n] == held[2 * n :] and whole[3 * n : 4 * n] == held[n : 2 * n]
    assert not list(tmp_path.glob("a.wav.*"))


def test_every_part_fits_before_the_first_is_said(generator, folder, tmp_path, capfd):
    """A page, then parts with too many positions, which are cut, also if the first sentence is the voice."""
    text = "hello there, how are you today? " * 3 + "\n\n" + "9 " * 118 + "\n\n" + "9" * 118
    for voice in (generator.voice_prompt("other"), []):
        parts = narrate.plan(generator, text, 0, voice, verbatim=True)
        sizes = narrate.prompt_sizes(generator, parts, 0, voice)
        rooms = [512 if voice else 256] * len(parts)
        assert all(n + 12.5 * (1 + 0.1 * len(part)) <= room for n, (part, _), room in zip(sizes, parts, rooms))
        words = "".join(part for part, _ in parts).replace(" ", "")
        assert words == text.replace("\n", "").replace(" ", "") and len(parts) > 3
    long = [csm.Segment(0, "hello", np.zeros(0), np.ones((480, 8), np.int32))]
    with pytest.raises(ValueError, match=r"sentence 1 cannot be said.*s of the model's 41 s for 'hello"):
        narrate.plan(generator, "hello.\n\nhow are you today, i am fine, yes i am fine.", 0, long)
    (tmp_path / "a.txt").write_text("hello there.")
    (tmp_path / "b.txt").write_text("hello there.\n\n" + "yes " * 20)
    soundfile.write(tmp_path / "me.wav", clip(38), 24000)
    args = [tmp_path / "a.txt", tmp_path / "b.txt", "--out-dir", tmp_path / "o", "--model", folder]
    with pytest.raises(SystemExit) as e:
        narrate.main([str(a) for a in [*args, "--ref-audio", tmp_path / "me.wav", "--ref-text", "hello"]])
    err = capfd.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and "a.txt: sentence 1 cannot be said" in err, err
    assert not (tmp_path / "o").exists()


def test_a_sentence_that_is_cut_off_is_named(generator, caplog):
    narrated = list(narrate.narrate(generator, "hello there, hello there.", seed=1))
    cut_off = len(narrated[0][2]) == 1920 * int((3000 + 200 * 25) / 80)
    assert ("sentence 1 is cut off after" in caplog.text) == cut_off


def finished(tmp_path, p, n=2):
    """Wait until a narration into a.wav has n finished sentences."""
    state = tmp_path / "a.wav.part.json"
    while not (state.exists() and len(state.read_text().splitlines()) > n):
        assert p.poll() is None, p.stderr.read()
    return state


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_goes_on_after_an_interruption(folder, tmp_path, how):
    (tmp_path / "book.txt").write_text(TEXT * 12)
    command = [sys.executable, "-m", "csm_tools.narrate", "book.txt", "a.wav", "--model", str(folder), *SHORT]
    command += ["--batch", "1", "--temperature", "0.7"]
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(HERE)}}
    with subprocess.Popen(command, **where, stderr=subprocess.PIPE) as p:
        state = finished(tmp_path, p)
        os.kill(p.pid, how)
    before = json.loads(state.read_text().splitlines()[0])
    assert p.returncode != 0 and not (tmp_path / "a.wav").exists()
    if how != signal.SIGKILL:
        assert not list(tmp_path.glob(".*"))
    done = subprocess.run(command, **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
    assert f"seed {before['seed']}" in done.stderr and not state.exists()
    again = subprocess.run([*command[:4], "b.wav", *command[5:], "--seed", str(before["seed"])], **where)
    assert again.returncode == 0
    np.testing.assert_array_equal(whole, soundfile.read(tmp_path / "b.wav", dtype="int16")[0])


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["other", "none"])
def test_two_processes_write_the_file_of_one(folder, tmp_path, voice):
    """Also if one is killed and the same command resumes."""
    (tmp_path / "book.txt").write_text(TEXT * 8)
    args = [
        "-m",
        "csm_tools.narrate",
        "book.txt",
        "OUT",
        "--model",
        str(folder),
        "--seed",
        "5",
        "--voice",
        voice,
        *SHORT,
    ]
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(HERE)}, "stderr": subprocess.PIPE, "text": True}

    def command(out, batch, *launcher):
        return [*launcher, *(out if a == "OUT" else a for a in args), "--batch", batch]

    one = subprocess.run(command("one.wav", "3", sys.executable), **where)
    assert one.returncode == 0, one.stderr
    launcher = str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--python", sys.executable
    if voice == "other":
        with subprocess.Popen(command("a.wav", "1", *launcher), **where) as p:
            finished(tmp_path, p, 3)
            (second,) = (
                int(f.parent.name)
                for f in Path("/proc").glob("[0-9]*/environ")
                if readable(f) and b"MLX_RANK=1" in f.read_bytes() and (f.parent / "cwd").resolve() == tmp_path
            )
            os.kill(second, signal.SIGKILL)
            assert "rank 1 exited with code -9" in p.stderr.read()
        assert not (tmp_path / "a.wav").exists() and not list(tmp_path.glob(".*"))
    two = subprocess.run(command("a.wav", "2", *launcher), **where)
    assert (tmp_path / "a.wav").exists(), two.stderr
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "one.wav").read_bytes()


def readable(file):
    try:
        return bool(file.read_bytes())
    except OSError:
        return False


@pytest.mark.slow
def test_a_mistake_of_a_process_is_named(folder, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    launcher = str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--python", sys.executable
    args = "-m", "csm_tools.narrate", "book.txt", "a.wav", "--model", str(folder), "--voice", "typo"
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(HERE)}}
    done = subprocess.run([*launcher, *args], **where, capture_output=True, text=True)
    assert re.search(r"narrate, process \d of 2: error: .*typo", done.stderr), done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["book.txt"]


def test_tiny_does_not_stand_in_for_csm_1b(tmp_path, monkeypatch, capfd):
    """A book in the wrong voice would waste an hour, so only csm.py falls back to tiny."""

    def load(model, **options):
        raise checkpoints.DownloadError(f"cannot download {model} (--model tiny needs no download)")

    monkeypatch.delenv("CSM_MODEL", raising=False)
    monkeypatch.setattr(csm, "load", load)
    (tmp_path / "book.txt").write_text("Hello.")
    with pytest.raises(SystemExit) as e:
        narrate.main([str(tmp_path / "book.txt"), str(tmp_path / "a.wav")])
    err = capfd.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and "cannot download csm-1b" in err and "--model tiny" in err


def test_errors(folder, tmp_path, capfd):
    (tmp_path / "empty.txt").write_text(" *** \n")
    (tmp_path / "book.txt").write_text("Hello.")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    book, out = tmp_path / "book.txt", tmp_path / "a.wav"
    for args in (
        [tmp_path / "none.txt", out],
        [tmp_path / "empty.txt", out],
        [tmp_path / "latin.txt", out],
        [book],
        [book, tmp_path],
        [book, "-"],
        [book, "/dev/null"],
        [book, tmp_path / "a.xyz"],
        [book, tmp_path / "no/a.wav"],
        [book, book, "--out-dir", tmp_path / "o"],
        [book, out, "--batch", "0"],
        [book, out, "--ref-text", "alone"],
    ):
        with pytest.raises(SystemExit) as e:
            narrate.main([*map(str, args), "--model", str(folder)])
        err = capfd.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("narrate: error: "), err
        assert sorted(f.name for f in tmp_path.iterdir()) == ["book.txt", "empty.txt", "latin.txt"]
