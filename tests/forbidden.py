"""What no line of this project may do with foreign bytes or sockets: `make check` looks at every tracked file.

Ruff knows most of these calls, and takes ``noqa`` for an answer; this does not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
BUILTINS = {"eval", "exec", "__import__"}
METHODS = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized", "load_module"}
LOADERS = {"torch", "numpy", "np", "jax"}  # of files that may hold pickles
EVERYWHERE = "tcp://" + "*"
# Files that name the address in order to refuse it.
REFUSING = {"rustyrl/addresses.py", "tests/test_addresses.py", "tests/test_errors.py", "tests/test_forbidden.py"}
TEXTS = {".py", ".sh", ".toml", ".yaml", ".yml", ".cfg", ".ini", ".Dockerfile", ""}
INSTEAD = "msgspec or safetensors read foreign bytes without running them"


def in_python(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a module that do what is forbidden, and what that is."""
    for node in ast.walk(ast.parse(source)):
        what = _imported(node) or _used(node)
        if what:
            yield node.lineno, what  # type: ignore[attr-defined]


def _imported(node: ast.AST) -> str:
    """What it imports that it must not."""
    names: list[str] = []
    match node:
        case ast.Import():
            names = [name.name for name in node.names]
        case ast.ImportFrom(module=str(module)):
            loads = module in LOADERS and any(name.name == "load" for name in node.names)
            names = [f"{module}.load" if loads else module]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
            names = [module]
    bad = [name for name in names if name.partition(".")[0] in MODULES or name in {f"{m}.load" for m in LOADERS}]
    return f"imports {bad[0]}: {INSTEAD}" if bad else ""


def _used(node: ast.AST) -> str:
    """What it uses that it must not."""
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
            return f"calls {name}"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="builtins"), attr=name)) if name in BUILTINS:
            return f"calls {name}"
        case ast.Attribute(attr=name) if name in METHODS:
            return f"uses {name}: {INSTEAD}"
        case ast.Attribute(value=ast.Name(id=module), attr="load") if module in LOADERS:
            return f"uses {module}.load: {INSTEAD}"
        case ast.keyword(arg="allow_pickle", value=value) if getattr(value, "value", True) is not False:
            return f"allows pickles: {INSTEAD}"
    return ""


def in_text(text: str) -> Iterator[tuple[int, str]]:
    """The lines of any file that listen to every network without saying so."""
    for number, line in enumerate(text.splitlines(), 1):
        if EVERYWHERE in line:
            yield (
                number,
                f"{EVERYWHERE} listens to every network: tcp://127.0.0.1, or tcp://0.0.0.0 where that is meant",
            )


def findings(root: Path, names: list[str]) -> Iterator[str]:
    """What is wrong in these files, as ``path:line: what``."""
    for name in names:
        path = root / name
        if path.suffix not in TEXTS or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [] if name in REFUSING else list(in_text(text))
        if path.suffix == ".py":
            found += in_python(text)
        yield from (f"{name}:{line}: {what}" for line, what in sorted(found))


def main() -> int:
    """Look at every file that git knows or could know, else at every file below this project's folders."""
    root = Path(__file__).parent.parent
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no repository: an unpacked archive
        tops = ["rustyrl", "actors", "learner", "tests", "benchmarks", "examples", "docs", "docker"]
        names = [str(path.relative_to(root)) for top in tops for path in (root / top).rglob("*") if path.is_file()]
    found = list(findings(root, names))
    print("\n".join(found) or f"{len(names)} files do nothing that is forbidden")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
