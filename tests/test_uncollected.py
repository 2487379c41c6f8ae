"""The garbage collector and what takes long to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys
from rustyrl.imports import uncollected

collections = sum(generation["collections"] for generation in gc.get_stats())
try:
    with uncollected():
        kept = [[] for _ in range(100_000)]
        same = collections == sum(generation["collections"] for generation in gc.get_stats())
        if sys.argv[1] == "fails":
            raise ImportError("libcudart.so is missing")
except ImportError:
    pass
assert same, "it was collected inside"
assert gc.get_freeze_count() > 100_000, gc.get_freeze_count()
assert gc.isenabled()
gc.disable()
with uncollected():
    pass
assert not gc.isenabled()
"""


@pytest.mark.parametrize("ends", ["well", "fails"])
def test_what_is_imported_is_never_looked_through_and_all_else_is(ends: str) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, ends], check=True)
