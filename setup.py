"""Only this: a wheel has train.py inside the package, so that ``dtron train`` runs without a
checkout."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTrain(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copy("train.py", Path(self.build_lib) / "dtron" / "train_program.py")


setup(cmdclass={"build_py": BuildWithTrain})
