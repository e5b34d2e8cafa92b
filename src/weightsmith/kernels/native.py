"""Machine code of the kernels: compiled once by numba, kept in the user's cache folder, loaded by llvmlite alone.

Loading takes some milliseconds, importing numba half a second.  The kept file is bound to the kernels' source, to
llvmlite's version and to this processor; it is used only from a folder that nobody else can write to, and only if
its checksum holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from weightsmith.core.kernel import SIGNATURES

__all__ = ["cache_folder", "kernels"]

_ARGUMENTS: Mapping[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float}
Kernels = Mapping[str, Callable[..., int]]
_SOURCES = [Path(__file__).parent / name for name in ("compiled.py", "loops.py", "sums.py", "../core/kernel.py")]


announce: Callable[[str], None] = lambda text: None  # noqa: E731
"""Is told when there is something to wait for; the command line shows it."""


@functools.cache
def kernels() -> Kernels | None:
    """The kernels by name; None without llvmlite and numba, or with WEIGHTSMITH_KERNELS=0."""
    if os.environ.get("WEIGHTSMITH_KERNELS", "1") == "0":
        return None
    try:
        import llvmlite
        import llvmlite.binding as llvm
    except ImportError:
        return None
    with contextlib.suppress(RuntimeError):  # newer versions say that they need no initialising
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    file = _file(f"{llvmlite.__version__} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}")
    code = _read(file) if file is not None else None
    if code is None:
        announce("compiling the kernels for this machine; this happens once and takes about ten seconds")
        try:
            code = _compiled(llvm)
        except ImportError:
            return None
        if file is not None:
            _keep(file, code)
    return {kernel: _loaded(llvm, kernel, *code[kernel]) for kernel in SIGNATURES}


# --- compiling and loading -----------------------------------------------------------------------


Code = Mapping[str, tuple[str, bytes]]
"""Kernel -> its symbol, and an object file that defines it."""


def _machine(llvm: Any) -> Any:
    """This very processor, with no liberties taken in floating point."""
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _compiled(llvm: Any) -> Code:
    from weightsmith.kernels.compiled import KERNELS

    machine = _machine(llvm)
    return {
        name: (f.native_name, machine.emit_object(llvm.parse_assembly(f.inspect_llvm()))) for name, f in KERNELS.items()
    }


_NEVER = (
    "NRT_Free",
    "NRT_MemInfo_call_dtor",
    "numba_do_raise",
    "numba_gil_ensure",
    "numba_gil_release",
    "numba_runtime_build_excinfo_struct",
    "numba_unpickle",
)
"""What numba's wrapper would call to report an exception or to free memory: the kernels do neither.

All must be found: one unknown symbol, and the loader leaves every address outside the object at zero.
"""

_engines: list[Any] = []
"""What owns the loaded code, for as long as the process lives."""


def _loaded(llvm: Any, kernel: str, symbol: str, code: bytes) -> Callable[..., int]:
    """A Python callable; ctypes lets go of the interpreter lock while it runs."""
    abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for never in _NEVER:
        if llvm.address_of_symbol(never) is None:
            llvm.add_symbol(never, abort)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    arguments = [_ARGUMENTS[letter] for letter in SIGNATURES[kernel]]
    return ctypes.CFUNCTYPE(ctypes.c_int64, *arguments)(engine.get_function_address(symbol))


def _file(machine: str) -> Path | None:
    """Where the code for this machine and these sources is kept."""
    wanted = [path.read_bytes() for path in _SOURCES]
    folder = cache_folder()
    return None if folder is None else folder / xxhash.xxh3_128(b"\0".join([machine.encode(), *wanted])).hexdigest()


# --- keeping -------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """WEIGHTSMITH_CACHE, or weightsmith/ in the user's cache folder, or a temporary folder of the user's own.

    Only a folder that belongs to this user and that nobody else can write to: what lies there is executed.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    given = os.environ.get("WEIGHTSMITH_CACHE") or Path(home, "weightsmith")
    with contextlib.suppress(RuntimeError):  # no home
        folder = Path(given).expanduser()
        if _own(folder):
            return folder
    folder = Path(tempfile.gettempdir(), f"weightsmith-{os.getuid()}")
    return folder if _own(folder) else None


def _own(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
        return mine and os.access(folder, os.W_OK)
    return False


def _keep(path: Path, code: Code) -> None:
    """Write the file under another name first: a reader never sees a part of it.  Failing to keep it is no failure."""
    head = json.dumps({kernel: [symbol, len(binary)] for kernel, (symbol, binary) in code.items()}).encode()
    body = head + b"\n" + b"".join(binary for _, binary in code.values())
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(xxhash.xxh3_128(body).digest() + body)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise


def _read(path: Path) -> Code | None:
    """What was kept, or None if there is nothing that can be trusted."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[:16], data[16:]
    if xxhash.xxh3_128(body).digest() != digest:
        return None
    head, _, rest = body.partition(b"\n")
    code, place = {}, 0
    try:
        for kernel, (symbol, length) in json.loads(head).items():
            code[str(kernel)] = str(symbol), rest[place : place + length]
            place += length
    except (ValueError, TypeError, AttributeError):
        return None
    whole = all(binary for _, binary in code.values()) and place == len(rest)
    return code if whole and code.keys() == set(SIGNATURES) else None
