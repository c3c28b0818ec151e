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
    assert {"csm", "mimi", "csm_layouts", "mlx_cpu", "convert"} <= {
        f.relative_to(HERE).parts[0].removesuffix(".py") for f in files
    } and len(files) > 8
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
