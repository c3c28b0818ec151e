"""What pyproject.toml cannot say: two files of the top folder go where they bother no other package's names."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    def run(self):
        super().run()
        place = Path(self.build_lib)
        shutil.copy("convert.py", place / "csm_tools/convert.py")  # as the command csm-convert
        shutil.copy("mlx_cpu.c", place / "mlx_cpu.c")


setup(cmdclass={"build_py": Build})
