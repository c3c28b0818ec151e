"""What pyproject.toml cannot say: the wheel holds the model tiny, but not the scripts that trained it."""

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    def find_package_modules(self, package, package_dir):
        return [] if package == "csm_tools.tiny" else super().find_package_modules(package, package_dir)


setup(cmdclass={"build_py": Build})
