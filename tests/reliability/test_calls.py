"""Every call to the file system fails once: OUT is absent or complete, the error one line, --resume puts it right."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import weightsmith
from reliability.trials import ERRORS, calls_of, fail_at, fail_resume_at

KINDS = itertools.cycle(ERRORS)


@pytest.mark.parametrize(("name", "old", "step"), [("tiny", False, 5), ("tiny", True, 11), ("torch", False, 17)])
def test_every_call_fails(zygote, scenes, tmp_path, note, name, old, step):
    """Each call of a run of its own; here a part of the calls, with another kind of failure at each."""
    count = calls_of(zygote, scenes[name], tmp_path, old)
    cases = [(n, next(KINDS)) for n in range(1, count + 1, step)]
    note("failing calls", fail_at(zygote, scenes[name], tmp_path, cases, old=old))


def test_every_call_of_a_resumed_run_fails(zygote, scenes, tmp_path, note):
    count = calls_of(zygote, scenes["tiny"], tmp_path)
    cases = [(n, next(KINDS)) for n in range(46, count + 1, 11)]
    cases += [(n, "ENOSPC for good") for n in range(60, 70, 2)]  # while it sees what the other has finished
    note("failing calls of a resumed run", fail_resume_at(zygote, scenes["tiny"], tmp_path, cases))


DOOR = """
import os, sys
from pathlib import Path
from weightsmith.cli.main import main
from weightsmith.io import system
inside = 0
def call(function, /, *args, **kwargs):
    global inside
    inside += 1
    try:
        return function(*args, **kwargs)
    finally:
        inside -= 1
events, past, seen = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir",
                      "os.truncate", "os.link", "os.symlink", "os.utime", "os.chmod", "shutil.rmtree"}, [], 0
def audit(event, args):
    global seen
    if event in events and args and isinstance(args[0], (str, bytes, os.PathLike)):
        if os.fsdecode(os.fspath(args[0])).startswith(sys.argv[1]):
            seen += 1
            if not inside:
                past.append(f"{event} {os.fsdecode(os.fspath(args[0]))[len(sys.argv[1]):]}")
main([*sys.argv[2:3], sys.argv[3], sys.argv[1] + "/warm", *sys.argv[5:]])  # what is imported late is no file of ours
system.call = call
sys.addaudithook(audit)
code = main(sys.argv[2:])
print(code, seen, *past, sep="\\n")
"""


@pytest.mark.parametrize(("name", "kind"), [("torch", "safetensors"), ("tiny", "pickle")])
def test_nothing_goes_past_the_door(scenes, tmp_path, name, kind):
    """Python tells of every file that is opened, listed, made, renamed or removed: all of it happens inside `call`."""
    argv = scenes[name].argv(tmp_path, "--overwrite")
    folder = scenes[name].folder
    if kind == "pickle":
        folder = pickled(folder, tmp_path)
        argv[1] = str(folder / "recipe.yaml")
    place = os.path.commonpath([folder, tmp_path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DOOR, place, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    code, seen, *past = done.stdout.split("\n")[:-1]
    assert (code, past) == ("0", [])
    assert int(seen) > 60


def pickled(folder: Path, target: Path) -> Path:
    """The same models as PyTorch checkpoints."""
    import torch

    from weightsmith.io.read.folder import FolderSource

    for model in ("base", "math", "code", "law"):
        source = FolderSource(folder / model)
        (target / model).mkdir()
        torch.save({name: source.read(name) for name in source.keys}, target / model / "pytorch_model.bin")
    recipe = (folder / "recipe.yaml").read_text().replace(str(folder), str(target))
    (target / "recipe.yaml").write_text(recipe)
    return target


QUIET = {"read", "pread", "preadv", "write", "pwrite", "fsync", "fdatasync", "posix_fallocate", "ftruncate"}
OF_OS = {"replace", "remove", "link", "truncate", "utime", "chmod"}
TOUCHES = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "touch", "unlink", "rename",
           "rmdir", "disk_usage", "iterdir", "glob", "rglob", "symlink_to", "hardlink_to", "makedirs", "listdir",
           "scandir", "walk", "rmtree", "copyfile", "copytree", "copy2", "move", "mkstemp", "mkdtemp", "TemporaryFile",
           "NamedTemporaryFile", "save_file", "load_file", "safe_open"}  # fmt: skip
OTHERS = {
    "kernels/native.py": "the kept kernels, below this layer: without them they are compiled again",
    "plugins.py": "the user's code, below this layer", "tune/registry.py": "files of the package",
    "observe/data.py": "the user's texts and images, which are only read",
    "observe/check.py": "the same",
    "observe/model.py": "a config, beside what transformers reads by itself",
    "observe/memory.py": "/proc",
    "align/proof.py": "a temporary folder of its own",
    "report/table.py": "pages of the study",
    "study/bench.py": "the study's folder of scores",
    "study/cache.py": "the same",
    "study/evaluate.py": "the same",
    "study/run.py": "the same",
    "cli/main.py": "/dev/null",
    "cli/options.py": "plugins.load_file", "cli/bench.py": "the same", "cli/methods.py": "the same",
    "cli/schema.py": "the same", "cli/search.py": "the same", "cli/verify.py": "the same",
    "search/score.py": "the user's data, which are only read",
    "inputs/opened.py": "a model, by what opens models", "io/read/open.py": "the same",
    "lora/recipe.py": "recipe.load.read_text", "moe/recipe.py": "the same", "recipe/load.py": "the same",
    "search/schema.py": "the same",
    "train/fuse/recipe.py": "the same", "train/multitask/recipe.py": "the same", "train/recipe.py": "the same",
    "tune/schema.py": "the same",
    "studio/app.py": "the studio's own jobs, and files of the package", "studio/serve.py": "a browser",
    "studio/pages/grid.py": "sizes of files", "studio/shelf.py": "names of models, which are only listed",
}  # fmt: skip


def test_no_module_goes_past_the_door():
    """Whatever could open, list, make, rename or remove a file is handed to `system.call`, not called."""
    root = Path(weightsmith.__file__).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text())
        within = {id(arg) for node in ast.walk(tree) if isinstance(node, ast.Call)
                  and ast.unparse(node.func) in ("system.call", "call") for arg in node.args}  # fmt: skip
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or id(node) in within:  # call(list, path.glob(...)) looks inside
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            of_os = ast.unparse(node.func).startswith("os.")
            if name == "walk" and not of_os:  # over a tree of our own
                continue
            if name in TOUCHES or (of_os and name in QUIET | OF_OS):
                found.add((str(path.relative_to(root)), name, node.lineno))
    assert sorted(f"{file}:{line} {name}" for file, name, line in found if file not in OTHERS) == []
    assert {file for file, _, _ in found} == set(OTHERS)
