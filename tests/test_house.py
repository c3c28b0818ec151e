"""The house: who may import whom, and that csm.py and mimi.py live alone."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
FLOORS = {
    "mlx_cpu": 0,
    "csm_layouts": 0,
    "mimi": 1,
    "csm": 2,
    "convert": 3,
    "csm_tools": 3,
}  # each may import those below
ALLOWED = {
    ("csm_tools/serve.py", "csm_tools.narrate"),  # how a long text is cut
    ("csm_tools/serve.py", "csm_tools.serve_engine"),  # its other half
    ("csm_tools/finetune.py", "csm_tools.tuning_data"),  # its other half
}


def imports(path):
    """Every module that a file imports, late and in `if`s too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
            if node.module == "csm_tools":
                yield from (f"csm_tools.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    files = [*HERE.glob("*.py"), *(HERE / "csm_tools").glob("*.py"), *(HERE / "mlx_cpu").glob("*.py")]
    assert {"csm", "mimi", "csm_layouts", "mlx_cpu", "convert"} <= {f.relative_to(HERE).parts[0].removesuffix(".py") for f in files} and len(files) > 8
    seen = set()
    for file in files:
        name = file.relative_to(HERE).as_posix()
        me = name.split("/")[0].removesuffix(".py")
        if me not in FLOORS:
            continue  # a test, setup.py
        for module in imports(file):
            top = module.split(".")[0]
            assert not module.startswith("."), f"{name} imports {module}"
            if top in FLOORS and (name, module) not in ALLOWED and module != "csm_tools":
                assert FLOORS[top] < FLOORS[me], f"{name} imports {module}"
                seen.add((me, top))
    assert {("mimi", "mlx_cpu"), ("mimi", "csm_layouts"), ("csm", "mimi"), ("csm_tools", "csm")} <= seen


@pytest.mark.parametrize(
    "file", ["csm.py", "csm_layouts.py", "convert.py", *(f"csm_tools/{p}.py" for p in ("narrate", "serve", "finetune"))]
)
def test_only_mimi_knows_of_the_cpu(file):
    assert "mlx_cpu" not in (HERE / file).read_text()


def test_mlx_cpu_knows_nothing_of_csm():
    assert not {m.split(".")[0] for m in imports(HERE / "mlx_cpu/__init__.py")} & FLOORS.keys()


def test_copied_alone_they_speak(tmp_path):
    for name in ("csm.py", "mimi.py", "test_csm.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "tiny", tmp_path / "tiny")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "csm.py", "hello world", "a.wav", "--model", "tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "a.wav").stat().st_size > 5000, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_csm.py"], cwd=tmp_path, env=env, capture_output=True
    )
    assert done.returncode == 0 and b"skipped" not in done.stdout, done.stdout.decode()


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
    assert mlx in {line.replace("[cpu]", "") for line in listed}  # one floor for all


@pytest.mark.parametrize("kind", ["a package", "a module"])
def test_another_projects_csm_is_one_line(kind, tmp_path):
    shutil.copytree(HERE / "csm_tools", tmp_path / "csm_tools", ignore=shutil.ignore_patterns("tiny"))
    if kind == "a package":  # as the project csm on PyPI installs it; it may not even be importable
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
        "@pytest.fixture\ndef peer():\n    pytest.importorskip('no_such_package')\n\n\ndef test_parity(peer):\n    pass\n"
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
