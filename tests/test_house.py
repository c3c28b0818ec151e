"""Which file may import which, and that csm.py and mimi.py work without the others."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import csm

HERE = Path(__file__).parent.parent
FLOORS = {  # a module may import those on lower floors
    "mlx_cpu": 0,
    "csm_layouts": 0,
    "mimi": 1,
    "csm": 2,
    "csm_batch": 3,
    "csm_tools.audio": 3,  # shared by the programs
    "csm_tools.code_shards": 3,
    "csm_tools.epub": 3,
    "csm_tools.gguf": 3,
    "csm_tools.text": 3,
    "csm_tools.transcribe": 4,
    "csm_tools.checkpoints": 4,
    "csm_tools.adapters": 5,
    "csm_tools.command": 6,
    "csm_tools": 7,  # the programs and their parts
    "convert": 7,
    "csm_tools.finetune": 8,
    "csm_tools.serve_engine": 8,
    "csm_tools.serve_files": 8,
    "csm_tools.doctor": 9,
    "csm_tools.serve_requests": 9,
    "csm_tools.serve_voices": 9,
    "csm_tools.bench": 10,
    "csm_tools.serve_socket": 10,
    "csm_tools.serve": 11,
}
ALLOWED = {  # exceptions
    ("csm.py", "csm_tools.speak"),  # in its last lines: see test_csm_py_hands_over_in_its_last_lines
    ("mimi.py", "csm_tools.checkpoints"),  # late, for everything but folders in our layout
    ("csm_tools/checkpoints.py", "csm_tools.adapters"),  # late, for csm.load(adapter=...)
    ("csm_tools/command.py", "csm_tools.watermark"),  # late, for --watermark
}
TOOLS = [f"csm_tools/{name}.py" for name in ("command", "speak", "narrate", "serve", "finetune")]


def imports(tree):
    """All modules that a syntax tree imports, also inside functions and `if`s."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "csm_tools":
            yield from (f"csm_tools.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def floor(module):
    """The floor of one of our modules, None for others."""
    top = module.split(".")[0]
    return FLOORS.get(module, FLOORS.get(top))


def test_imports_run_one_way():
    files = [*HERE.glob("*.py"), *(HERE / "csm_tools").glob("*.py"), *(HERE / "mlx_cpu").glob("*.py")]
    seen = set()
    for file in files:
        name = file.relative_to(HERE).as_posix()
        me = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if floor(me) is None:
            continue  # a test, setup.py
        for module in imports(tree(file)):
            assert not module.startswith("."), f"{name} imports {module}"
            if floor(module) is not None and (name, module) not in ALLOWED:
                assert floor(module) < floor(me), f"{name} imports {module}"
            seen.add((name, module))
    assert ALLOWED <= seen, ALLOWED - seen
    for pair in (
        ("mimi.py", "mlx_cpu"),
        ("csm_tools/checkpoints.py", "csm_layouts"),
        ("csm.py", "mimi"),
        ("convert.py", "csm"),
    ):
        assert pair in seen
    assert {("csm_tools/speak.py", f"csm_tools.{shared}") for shared in ("command", "audio")} <= seen


def test_csm_py_hands_over_in_its_last_lines():
    *body, last = tree(HERE / "csm.py").body
    assert ast.unparse(last.test) == "__name__ == '__main__'" and "csm_tools.speak" in imports(last)
    assert "csm_tools.speak" not in imports(ast.Module(body, []))


@pytest.mark.parametrize("file", ["csm.py", "csm_layouts.py", "convert.py", *TOOLS])
def test_only_mimi_knows_of_the_cpu(file):
    assert "mlx_cpu" not in (HERE / file).read_text()


def test_mlx_cpu_knows_nothing_of_csm():
    assert not {m.split(".")[0] for m in imports(tree(HERE / "mlx_cpu/__init__.py"))} & FLOORS.keys()


def test_the_command_loads_csm_py_once():
    command = [sys.executable, "-X", "importtime", HERE / "csm.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    assert "csm_tools.command" in modules and "csm" not in modules


@pytest.fixture
def copy(tmp_path):
    """A folder with csm.py, mimi.py and tiny, and a function that runs a program in it."""
    for name in ("csm.py", "mimi.py", "test_csm.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "tiny", tmp_path / "tiny")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*command, **options):
        return subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, **options)

    return run


@pytest.mark.slow
def test_copied_alone_they_speak(copy, tmp_path):
    done = copy("csm.py", "hello world", "a.wav", "--model", "tiny", "--seed", "1", text=True)
    assert done.returncode == 0 and (tmp_path / "a.wav").stat().st_size > 5000, done.stderr
    assert "s of audio in" in done.stderr and "seed 1" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "text").write_text("hello world\n")
    options = ["--model", "tiny", "--seed", "1", "--speaker", "0", "--voice", "deep", "--temperature", "0"]
    for out, text in (("b.wav", "hello world"), ("c.wav", "-"), ("d.wav", "@text")):
        done = copy("csm.py", text, out, *options, input=b"hello world")
        assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"{name}.wav").read_bytes() for name in "abcd"]
    assert said[0] != said[1] == said[2] == said[3]
    done = copy("-m", "pytest", "-q", "test_csm.py")
    assert done.returncode == 0 and b"skipped" not in done.stdout, done.stdout.decode()


def test_mistakes_at_a_copy_alone_end_in_one_line(copy, tmp_path, capfd, monkeypatch):
    done = copy("csm.py", "hello", "a.wav", "--model", "tiny", "--stream", text=True)
    assert done.returncode == 2 and done.stderr.startswith("csm.py: error: --stream is not an option of csm.py alone")
    assert done.stderr.endswith("csm_tools/speak.py, which is not beside csm.py\n") and done.stderr.count("\n") == 1
    done = copy("-c", "import csm; csm.load('tiny', adapter='x')", text=True)
    assert "ValueError: an adapter needs csm_tools" in done.stderr
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for args, message in (
        (["hello", "a.wav", "--model", "none"], "no such model: none"),
        (["hello", "a.wav", "--model", "tiny", "--speaker", "-1"], "speaker"),
        (["hello", "a.wav", "--model", "tiny", "--temperature", "warm"], "temperature"),
        (["hello", "a.wav", "--model", "tiny", "--voice", "bob"], "unknown voice 'bob'"),
        (["hello", "a.xyz", "--model", "tiny"], "cannot write a.xyz: the suffix"),
        (["hello", "none/a.wav", "--model", "tiny"], "cannot write"),
        (["", "a.wav", "--model", "tiny"], "empty"),
        (["@none", "a.wav", "--model", "tiny"], "cannot read none"),
        (["hello"], "OUT"),
        ([], "usage: csm.py TEXT OUT [--model M]"),
    ):
        with pytest.raises(SystemExit) as error:
            csm.main(args)
        err = capfd.readouterr().err
        assert error.value.code == 2 and message in err and err.count("\n") == 1, (args, err)
        assert not args or err.startswith("csm.py: error: ")
    assert list(Path().iterdir()) == []
    Path("me.wav").write_bytes((HERE / "tiny/prompts/calm.wav").read_bytes())
    Path("me.txt").write_text("what I say")
    os.link("me.wav", "too.wav")
    for out in ("me.wav", "too.wav"):  # the clip itself
        with pytest.raises(SystemExit) as error:
            csm.main(["hello", out, "--model", "tiny", "--voice", "me.wav"])
        err = capfd.readouterr().err
        assert error.value.code == 2 and f"{out} is also an input: give another OUT" in err and err.count("\n") == 1
    assert Path("me.wav").read_bytes() == (HERE / "tiny/prompts/calm.wav").read_bytes()


def test_a_users_own_files_are_never_executed(tmp_path):
    for name in ("convert", "narrate", "finetune", "serve", "watermark", "bench"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')\n")
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    for command in (
        ["-m", "csm_tools.narrate", "--help"],
        ["-m", "csm_tools.finetune", "--help"],
        [HERE / "csm.py", "--help"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_requirements_are_the_package_with_its_extra_cpu():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    mlx, *others = project["dependencies"]
    assert sorted(listed) == sorted([*project["optional-dependencies"]["cpu"], *others])
    assert mlx in {line.replace("[cpu]", "") for line in listed}  # one minimum version


@pytest.mark.parametrize("kind", ["a package", "a module"])
def test_another_projects_csm_is_one_line(kind, tmp_path):
    shutil.copytree(HERE / "csm_tools", tmp_path / "csm_tools", ignore=shutil.ignore_patterns("tiny"))
    if kind == "a package":  # like the project csm on PyPI; it may not even be importable
        (tmp_path / "csm").mkdir()
        (tmp_path / "csm/__init__.py").write_text("raise ImportError('of its own')\n")
    else:
        (tmp_path / "csm.py").write_text("symmetry = 1\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "csm_tools.narrate", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "another project" in done.stderr, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import csm_tools"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "ImportError" in done.stderr and "another project" in done.stderr  # a library's import, not a program


def test_what_a_bare_pytest_leaves_out(tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(HERE / "tests/conftest.py", tmp_path / "tests")
    settings = '[tool.pytest.ini_options]\ntestpaths = ["tests"]\nmarkers = ["slow: of this test"]\n'
    (tmp_path / "pyproject.toml").write_text(settings)
    (tmp_path / "tests/test_a.py").write_text(
        "import pytest\n\n\ndef test_plain():\n    pass\n\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n\n\n"
        "@pytest.fixture\ndef peer():\n    pytest.importorskip('no_such_package')\n\n\n"
        "def test_parity(peer):\n    pass\n"
    )
    (tmp_path / "tests/test_b.py").write_text("import pytest\n\npytest.importorskip('no_such_package')\n")
    for arguments, result, left_out in (
        ([], "1 passed, 2 deselected", True), (["tests"], "1 passed, 2 deselected", True),
        (["--all"], "2 passed, 2 skipped", False), (["tests/test_a.py"], "2 passed, 1 skipped", False),
    ):  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result in done.stdout, done.stdout
        assert ("left out: 2 tests and 1 files" in done.stdout) == ("pytest --all" in done.stdout) == left_out
