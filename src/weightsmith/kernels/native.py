"""Machine code of the kernels: compiled once by numba, kept in the user's cache folder, loaded without either.

Loading takes some milliseconds, importing numba half a second.  The kept file is bound to the kernels' source, to
the installed llvmlite and to this processor; it is used only from a folder that nobody else can write to, and only if
its checksum holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from weightsmith.kernels.linked import address_of
from weightsmith.kernels.record import SIGNATURES

__all__ = ["cache_folder", "kernels"]

_ARGUMENTS: Mapping[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float}
Kernels = Mapping[str, Callable[..., int]]
_SOURCES = [
    Path(__file__).parent / name
    for name in ("compiled.py", "by_rank.py", "filters.py", "loops.py", "sums.py", "record.py")
]


announce: Callable[[str], None] = lambda text: None  # noqa: E731
"""Is told when there is something to wait for; the command line shows it."""


_COMPILING = threading.Lock()


@functools.cache
def kernels() -> Kernels | None:
    """The kernels by name; None without llvmlite and numba, or with WEIGHTSMITH_KERNELS=0."""
    if os.environ.get("WEIGHTSMITH_KERNELS", "1") == "0":
        return None
    with _COMPILING:  # of several threads that ask first, the others read what one has made
        file = _file()
        code = _read(file) if file is not None else None
        # A new source, processor or llvmlite: another name of the file.
        if code is None:
            if not _installed("numba"):
                return None
            announce("compiling the kernels for this machine; this happens once and takes about ten seconds")
            code = _compiled()
            if file is not None:
                _keep(file, code)
    addresses = _addresses(code)
    return {kernel: _callable(kernel, addresses[kernel]) for kernel in SIGNATURES}


# --- compiling and loading -----------------------------------------------------------------------


Code = Mapping[str, tuple[str, bytes]]
"""Kernel -> its symbol, and an object file that defines it."""


def _llvm() -> tuple[Any, Any]:
    """llvmlite's binding, and this very processor as its target, with no liberties taken in floating point."""
    import llvmlite.binding as llvm

    with contextlib.suppress(RuntimeError):  # newer versions say that they need no initialising
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # opt 3 without fast-math: sums keep their order, and products are not fused with them.
    return llvm, llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _compiled() -> Code:
    from weightsmith.kernels.compiled import KERNELS

    llvm, machine = _llvm()
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
"""What owns the code that llvmlite has loaded, for as long as the process lives."""


def _addresses(code: Code) -> Mapping[str, int]:
    """Where the kernels lie in memory."""
    abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value or 0
    # Were one of them called after all, the process would end rather than go astray.
    stubs = dict.fromkeys(_NEVER, abort)
    found = {kernel: address_of(symbol, binary, stubs) for kernel, (symbol, binary) in code.items()}
    if all(found.values()):
        return {kernel: address for kernel, address in found.items() if address is not None}
    llvm, machine = _llvm()
    for never in _NEVER:
        if llvm.address_of_symbol(never) is None:
            llvm.add_symbol(never, abort)
    return {kernel: _loaded(llvm, machine, *code[kernel]) for kernel in code}


def _loaded(llvm: Any, machine: Any, symbol: str, code: bytes) -> int:
    """The same by LLVM's linker."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(symbol))


def _callable(kernel: str, address: int) -> Callable[..., int]:
    """A Python callable; ctypes lets go of the interpreter lock while it runs."""
    arguments = [_ARGUMENTS[letter] for letter in SIGNATURES[kernel]]
    # CFUNCTYPE lets go of the lock, PYFUNCTYPE would not: threads merge side by side.
    return ctypes.CFUNCTYPE(ctypes.c_int64, *arguments)(address)


def _file() -> Path | None:
    """Where the code for this machine, these sources and the installed llvmlite is kept."""
    compiler, folder = _installed("llvmlite"), cache_folder()
    if compiler is None or folder is None:
        return None
    # Time and size of its first file change with every version.
    status = compiler.stat()  # its version is not to be had without an import
    wanted = [
        _processor(),
        f"{status.st_mtime_ns} {status.st_size}".encode(),
        *(path.read_bytes() for path in _SOURCES),
    ]
    return folder / xxhash.xxh3_128(b"\0".join(wanted)).hexdigest()


def _installed(package: str) -> Path | None:
    """The file that an import would run first."""
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin)


def _processor() -> bytes:
    """What decides which code runs here: the processor's name and what it can do, as Linux tells it, else LLVM."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:  # noqa: PTH123  (only its start is made)
        first = file.read(1 << 14).partition(b"\n\n")[0]
        told = [
            line for line in first.splitlines() if line.startswith((b"vendor_id", b"model", b"cpu family", b"flags"))
        ]
        if any(line.startswith(b"flags") for line in told):
            return b"\n".join(told)
    llvm, _ = _llvm()
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}".encode()


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
    # A home that is not there, or not to be trusted.
    folder = Path(tempfile.gettempdir(), f"weightsmith-{os.getuid()}")
    return folder if _own(folder) else None


def _own(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
        # 022: neither the group nor others may write.
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
        # lstat: a link could lead to what somebody else writes.
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    # Against half-written files and bad disks; who may write here needs no wrong checksum.
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
