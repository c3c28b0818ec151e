"""README.md and docs/: every snippet and command runs, every link and every name exists."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import csm  # before mlx
import csm_batch
import mimi
from csm_tools import show

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
import soundfile

from conftest import clip
from test_narrate import write_epub

HERE = Path(__file__).parent.parent
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md")), HERE / "CONTRIBUTING.md"]
TOUR = (HERE / "docs/tour.md").read_text()
NOT_RUN = {  # start of a command: why it is not run here. Its options must still exist
    "git clone": "needs the network",
    "pip install": "needs the network",
    "python -m csm_tools.serve": "runs until it is stopped; test_serve.py runs it",
    "curl": "needs a running server; test_serve_conversations.py asks the same of one",
    "python -m csm_tools.watermark": "needs Sony's weights; test_watermark.py runs it",
    "CSM_SILENTCIPHER=DIR pytest": "needs Sony's weights",
    "python -m csm_tools.finetune dpo": "three texts give no pairs; test_finetune.py runs it",
    "python -m csm_tools.bench --dtype": "takes hours on a CPU; .ci/run runs it with --tiny",
    "python -m csm_tools.doctor": "takes minutes; test_gpu.py runs its parts",
    "pytest": "would run this test",
    "ruff": ".ci/run runs it",
}


def name(page):
    return page.relative_to(HERE).as_posix()


def blocks(page, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page):
    """The lines of the page's sh blocks, without comments."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def is_run(command):
    return not command.startswith(tuple(NOT_RUN))


def pages(fits):
    """The pages for which fits(page), as test parameters. All but the README are slow."""
    slow = pytest.mark.slow
    return [pytest.param(p, id=name(p), marks=[] if p.name == "README.md" else slow) for p in PAGES if fits(p)]


@pytest.fixture
def sandbox(hub, tmp_path):
    """A folder with the files that the pages mention, and an environment for their commands."""
    for file in ("me.wav", "you.wav", "a.wav"):
        soundfile.write(tmp_path / file, clip(1), 24000)
    (tmp_path / "me.txt").write_text("This is what my voice sounds like.")
    (tmp_path / "turns.json").write_text('[{"speaker": 0, "text": "hello", "audio": "me.wav"}]')
    (tmp_path / "data.json").write_text('[[{"text": "Hello.", "audio_path": "a.wav", "speaker": 0}]]')
    (tmp_path / "script.txt").write_text("0: hello\n1: yes\n")
    for file in ("chapter.txt", "notes.txt", "notes.md"):
        (tmp_path / file).write_text("hello there, how are you today? i am fine, yes i am fine.")
    write_epub(tmp_path / "book.epub")
    (tmp_path / "texts.txt").write_text("Yes, I see.\nWhere is the station?\nIt rains today.\n")
    (tmp_path / "clips/talk_1").mkdir(parents=True)
    soundfile.write(tmp_path / "clips/talk_1/001_speaker0_hello.wav", clip(0.5), 24000)
    (tmp_path / "clips/talk_1/001_speaker0_hello.txt").write_text("hello")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/dialogue.txt").write_text((HERE / "docs/dialogue.txt").read_text())
    if importlib.util.find_spec("IPython") is None:
        (tmp_path / "IPython").mkdir()
        (tmp_path / "IPython/display.py").write_text("def Audio(data, rate):\n    assert data.ndim == 1 and rate\n")
    return tmp_path, {**os.environ, **hub, "PYTHONPATH": str(HERE)}


def test_pages():
    assert len(PAGES) >= 11 and sum(len(blocks(page, "python")) for page in PAGES) >= 24
    run = [command for page in PAGES for command in commands(page) if is_run(command)]
    assert len(run) >= 24
    assert len((HERE / "README.md").read_text().splitlines()) <= 160
    unused = {start for start in NOT_RUN if not any(c.startswith(start) for page in PAGES for c in commands(page))}
    assert not unused
    for page in PAGES:  # tests exist for all kinds of blocks
        kinds = re.findall(r"^```(.+)$", page.read_text(), re.M)
        assert set(kinds) <= {"python", "sh", "py", "nginx"}, page


@pytest.mark.parametrize("page", pages(lambda p: blocks(p, "python") and p.name != "tour.md"))
def test_snippets_run(page, sandbox):
    """In order, as one program. The tour's run below."""
    folder, environment = sandbox
    (folder / "example.py").write_text("\n".join(blocks(page, "python")))
    done = subprocess.run([sys.executable, "example.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", pages(lambda p: any(map(is_run, commands(p)))))
def test_commands_run(page, sandbox):
    """In order, with small random models instead of downloads, and short speech."""
    folder, environment = sandbox
    for command in filter(is_run, commands(page)):
        line = command.replace("ffplay", "cat #")
        for program in ("csm.py", "csm_tools.narrate", "csm_tools.show"):
            line = line.replace(program, f"{program} --max-audio-length-ms 400")
        line = re.sub(r"\bpython (?=\w)", f"python {HERE}/", line).replace("python ", f"{sys.executable} ")
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True)
        assert done.returncode == 0, (command, done.stderr.decode())
        written = [f for f in re.findall(r"[\w./-]+\.(?:wav|mp3|flac|png|npz)\b", command) if "ffplay" not in command]
        assert all((folder / f).stat().st_size > 500 for f in written), command


def test_the_clips_were_made_by_the_command():
    """The clips exist and contain speech; the dialogue's script exists."""
    for file, turns in (("hello.mp3", 1), ("dialogue.mp3", 4)):
        audio = mimi.read_audio(HERE / "docs" / file)
        assert turns < len(audio) / 24_000 < 4 * turns and 0.1 < np.abs(audio).max() <= 1
        assert (HERE / "docs" / file).stat().st_size < 100e3
    assert len((HERE / "docs/dialogue.txt").read_text().splitlines()) == 4
    assert (HERE / "docs/show.png").stat().st_size < 250e3


def headings(text):
    """GitHub's anchors for a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, HERE / "CHANGELOG.md", HERE / "tiny/README.md"], ids=name)
def test_links(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not re.match(r"https?://", link):
            path, _, anchor = link.removesuffix("?raw=true").partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_exist(page):
    """Every --option on the page belongs to the program that it is written behind, or, without one, to any."""
    files = [*HERE.glob("*.py"), *(HERE / "csm_tools").glob("*.py")]
    options = {f.stem: set(re.findall(r'"(--[a-z][a-z-]*)"', f.read_text())) for f in files}
    options["csm"] |= {"--no-voice-match", "--help"}
    every = set().union(*options.values(), {"--all", "--backend"})  # pytest's and mlx.launch's
    shared = set().union(*(options.get(f, set()) for f in ("csm", "command", "speak")))  # where they stand
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))
    for span in [*spans, *commands(page)]:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span))
        program = re.search(r"-m csm_tools\.(\w+)|\bpython (\w+)\.py", span)
        own = options.get(program[1] or program[2], set()) | shared if program else every
        if "-m csm_tools.finetune" in span:
            own = own | options["tuning_data"]
        assert named <= own, (span, named - own)


def test_the_servers_snippets_run(tmp_path):
    pytest.importorskip("openai")
    running = pytest.importorskip("test_serve").running
    snippets = blocks(HERE / "docs/server.md", "py")
    with running() as (address, _):
        for snippet in snippets:
            assert "://127.0.0.1:8000" in snippet
            snippet = snippet.replace("127.0.0.1:8000", address.removeprefix("http://"))
            file = tmp_path / "example.py"
            file.write_text(f"{snippet}\nimport numpy\nnumpy.save('sound.npy', globals().get('sound', b''))")
            done = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert 0.5 < len(mimi.read_audio(tmp_path / "hello.wav")) / 24_000 < 4
    assert 0.5 < len(np.load(tmp_path / "sound.npy").item()) / 48_000 < 6


# ---------------------------------------------------------------------------------------------------- the tour


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """Run the tour's snippets in order: their names, what they print, and the sound that they write."""
    names, out = {"__name__": "tour"}, io.StringIO()
    snippets = blocks(HERE / "docs/tour.md", "python")
    with contextlib.chdir(tmp_path_factory.mktemp("tour")), contextlib.redirect_stdout(out):
        for i, code in enumerate(snippets):
            exec(compile(code, f"tour.md, snippet {i + 1}", "exec"), names)
        files = {f.name: mimi.read_audio(f) for f in Path().glob("*.wav")}
    return names, snippets, out.getvalue(), files


def test_tour_runs(tour):
    names, snippets, out, files = tour
    assert len(snippets) >= 10 and all(3 <= len(code.split("\n")) <= 11 for code in snippets)
    assert len(TOUR.splitlines()) <= 260
    assert "array(True, dtype=bool)" in out  # the handwritten loop gives csm.frames' codes
    assert 8 < len(names["spoken"]) < 40  # it ended by itself
    assert mx.abs(mx.concatenate(names["parts"], axis=2) - names["sound"]).max() < 1e-5
    assert mx.abs(mx.concatenate(names["alone"], axis=2) - names["sound"]).max() > 1e-2  # clicks
    assert len(names["said"]) == 3 and all(names["said"].values())
    assert {"mine.wav", "without_0.wav", "without_3.wav", "first_8.wav", "clicks.wav"} <= files.keys()


def test_tour_names_exist(tour):
    """Every `name` on the page is a file, an option, a module's or snippet's name, or an attribute of these."""
    names, _, _, made = tour
    generator, model = names["generator"], names["generator"].model
    objects = (generator, model, model.backbone, generator.mimi, names["batch"], names["cache"])
    things = vars(csm) | names | {"mimi": mimi, "csm_batch": csm_batch, "show": show, "np": np, "nn": nn}
    things |= {type(x).__name__: x for x in objects}
    theirs = {".to(device)", "no_grad", "forward", "unsqueeze(0)", "dim", "axis", ".item()", "draw"}  # PyTorch's, words
    spans = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TOUR, flags=re.S))) - theirs
    assert len(spans) > 40
    for span in spans | set(commands(HERE / "docs/tour.md")):
        assert set(re.findall(r"--voice (\S+)", span)) <= generator.voices.keys(), span
        if re.match(r"python |pip |--", span):
            files = [module.replace(".", "/") + ".py" for module in re.findall(r"-m (\S+)", span)]
            files += re.findall(r"[\w./]+\.py\b", span)
            assert all((HERE / f).is_file() for f in files), span
        elif "/" in span or Path(span).suffix in (".py", ".wav"):
            assert (HERE / span).exists() or span in made, span
        elif span.startswith("from "):
            exec(span, {})
        elif not span.startswith("show.draw("):  # which test_show.py calls, and which needs matplotlib
            eval(span, {**things, "a": [1], "x": names["x"]})


def test_the_tours_table():
    """The column of tiny, from its config."""
    generator = csm.load("tiny")
    c, sound = generator.model.config, generator.mimi.config
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in TOUR.splitlines() if line.startswith("| ")]
    sizes = [f"{x.n_layers}; {x.n_heads}; {x.n_kv_heads}" for x in (c.backbone, c.decoder)]
    more = c.audio_vocab_size - sound.codebook_size
    expected = [
        c.audio_num_codebooks,
        f"{sound.codebook_size} (+ {more} that are never spoken)",
        c.backbone.dim,
        sizes[0],
    ]
    expected += [c.decoder.dim, sizes[1], c.backbone.max_positions, len(generator.text_rows("How are you today?", 0))]
    assert [cell for _, cell in rows[1:]] == [str(x) for x in expected]


def test_which_layer_reads():
    """What stop 3 says of the picture, and of speech without the attention of one layer, over four sentences by two
    speakers. Which layer it is may change with the weights."""
    sys.path.insert(0, str(HERE / "tiny"))
    pytest.importorskip("faster_whisper")
    listen = pytest.importorskip("evaluate").Listener()
    whole = csm.load("tiny", dtype="float32")
    n = len(whole.model.backbone.layers)
    texts = [
        "How are you today?",
        "The weather is nice today.",
        "Where is the next station?",
        "I will call you tomorrow.",
    ]
    errors, looks = [], np.zeros(n)
    for layer in range(n + 1):
        generator = csm.load("tiny", dtype="float32")
        if layer < n:
            generator.model.backbone.layers[layer].self_attn.o_proj.weight *= 0
        said = [
            (text, generator.generate(text, i, seed=i, max_audio_length_ms=2_400)) for text in texts for i in (0, 1)
        ]
        errors.append(listen.score([text for text, _ in said], [np.array(audio) for _, audio in said]).error)
    for text in texts:
        run = show.observe(whole, text, seed=1)
        looks += run.attention[:, :, 1 : run.n_prompt].sum(axis=(1, 2))
        line = run.attention[run.attention[:, :, 1 : run.n_prompt].sum(axis=(1, 2)).argmax(), :, 1 : run.n_prompt]
        assert np.corrcoef(line.argmax(axis=1), np.arange(len(line)))[0, 1] > 0.8, text  # it goes down the text
    *without, plain = errors
    assert plain < 0.1 and max(without) > 0.6 and min(without) < plain + 0.1, errors
    assert list(np.argsort(without)) != list(np.argsort(looks)), (errors, looks)
