"""What pyproject.toml cannot say: what of the top folder goes where it bothers no other package's names."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    def run(self):
        super().run()
        place = Path(self.build_lib)
        shutil.copy("convert.py", place / "csm_tools/convert.py")  # the command csm-convert
        trained = shutil.ignore_patterns("*.py", "*.md", "*.txt", "golden.json", "__pycache__")
        shutil.copytree("tiny", place / "csm_tools/tiny", ignore=trained, dirs_exist_ok=True)
        shutil.copytree("tiny/prompts", place / "csm_tools/tiny/prompts", dirs_exist_ok=True)


setup(cmdclass={"build_py": Build})
