"""Compiles rustyrl/c while a wheel is built, an editable one too, if there is a C compiler."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCE = "rustyrl/c/perceptron.c"
# Products and sums may become one instruction, and comparisons need not trap; what is not a number stays so.
FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno"]


class CompilePerceptron(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled module to the wheel; without a compiler the wheel is one for any machine, and slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before anything is packed; hatchling calls it."""
        if self.target_name != "wheel":
            return
        os.chdir(self.root)
        extension = Extension("rustyrl._perceptron", [SOURCE], extra_compile_args=FLAGS, py_limited_api=True)
        command = build_ext(Distribution({"name": "rustyrl", "ext_modules": [extension]}))
        command.inplace = True
        command.build_temp = "build"
        command.force = True  # an object of before would be taken for one of these headers and flags
        command.ensure_finalized()
        try:
            command.run()
        except (BaseError, CCompilerError, OSError) as error:
            Path(command.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # of an older source
            self.app.display_warning(f"rustyrl computes its networks without compiled code, more slowly: {error}")
            return
        built = Path(command.get_ext_fullpath(extension.name)).relative_to(self.root)
        build_data["artifacts"].append(str(built))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}"
