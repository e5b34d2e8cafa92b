"""Pickles that want to run something: by what they call, how the call is written, and what file it is put in."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PROTOCOLS = range(6)


def calls(canary: Path) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """'module name' -> arguments; whichever of these is called leaves the file `canary` behind, or tries to."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    inner = pickle.dumps(_Call("posix", "system", (touch,)))
    script = canary.with_name("script.py")
    script.write_text(code)
    hub = canary.with_name("hub")
    hub.mkdir(exist_ok=True)
    (hub / "hubconf.py").write_text(code)
    stored = canary.with_name("inner.pt")
    stored.write_bytes(inner)
    named = {
        "os system": (touch,),
        "posix system": (touch,),
        "nt system": (touch,),
        "os popen": (touch,),
        "os execv": ("/usr/bin/touch", ["touch", str(canary)]),
        "subprocess call": (["touch", str(canary)],),
        "subprocess Popen": (["touch", str(canary)],),
        "pty spawn": (["touch", str(canary)],),
        "builtins eval": (code,),
        "__builtin__ eval": (code,),
        "builtins exec": (code,),
        "builtins compile": (code, "x", "exec"),
        "builtins __import__": ("os",),
        "builtins getattr": ("x", "join"),
        "builtins open": (str(canary), "w"),
        "io open": (str(canary), "w"),
        "pathlib Path.touch": (canary,),
        "importlib import_module": ("os",),
        "runpy run_path": (str(script),),
        "timeit timeit": (code,),
        "code interact": (),
        "operator attrgetter": ("__class__.__base__",),
        "operator methodcaller": ("system", touch),
        "functools partial": (print, "x"),
        "functools reduce": (print, ["x"]),
        "types FunctionType": (),
        "marshal loads": (b"\xe3",),
        "pickle loads": (inner,),
        "_pickle loads": (inner,),
        "copyreg _reconstructor": (object, object, None),
        "ctypes CDLL": ("libc.so.6",),
        "socket create_connection": (("127.0.0.1", 9),),
        "urllib.request urlopen": ("http://127.0.0.1:9/",),
        "webbrowser open": ("http://127.0.0.1:9/",),
        "shutil rmtree": (str(hub),),
        "os remove": (str(script),),
        "numpy load": (str(stored), None, True),
        "torch load": (str(stored), "cpu", None),
        "torch hub.load": (str(hub), "x", "local"),
        "torch.hub load": (str(hub), "x"),
        "torch.hub load_state_dict_from_url": ("http://127.0.0.1:9/x.pt",),
        "torch.hub _load_local": (str(hub), "x"),
        "torch.storage _load_from_bytes": (inner,),
        "torch.serialization load": (str(stored),),
        "torch.jit load": (str(stored),),
        "torch.ops load_library": ("libc.so.6",),
        "torch.utils.collect_env run": (touch,),
        "torch._utils_internal os.system": (touch,),
        "torch.nn Module": (),
        "torch.nn.modules.linear Linear": (1, 1),
        "weightsmith.io.disk write_file": (canary, "x"),
    }
    return {name: (name, arguments) for name, arguments in named.items()}


class _Call:
    """Pickles as a call of module.name, which need not be importable."""

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        self.module, self.name, self.arguments = module, name, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return _Named(self.module, self.name), self.arguments


class _Named:
    """Pickles as the global module.name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:  # what a call's first part must have
        raise AssertionError


class _Pickler(pickle._Pickler):  # the one in Python can be told to write any global
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Named):
            if self.proto >= 4:
                super().save(obj.module)
                super().save(obj.name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            return
        super().save(obj, save_persistent_id)


def dumped(value: Any, protocol: int) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def placed(call: _Call) -> dict[str, Any]:
    """Where in a checkpoint the call may stand."""
    return {
        "alone": call,
        "value": {"w": [1, 2], "x": call},
        "nested": {"state_dict": {"w": 1, "deep": [({"x": call},)]}},
        "key": {(call,): 1},
    }


def call(name: str, arguments: tuple[Any, ...]) -> _Call:
    module, _, attribute = name.rpartition(" ")
    return _Call(module, attribute, arguments)


def corpus(canary: Path, protocol: int, *, whole: bool = False) -> Iterator[bytes]:
    """Files that call each of `calls` from each place; in turn one kind of file for each, or (`whole`) all kinds."""
    turn = protocol
    for name, (_, arguments) in calls(canary).items():
        for value in placed(call(name, arguments)).values():
            found = [data for _, data in files(dumped(value, protocol))]
            yield from found if whole else [found[turn % len(found)]]
            turn += 1


def streams(canary: Path) -> dict[str, bytes]:
    """Calls written with opcodes that `pickle.dumps` would not choose."""
    touch = f"touch {canary}".encode()
    text = b"S'" + touch + b"'\n"
    system = b"cposix\nsystem\n"
    short = b"\x8c\x05posix\x8c\x06system\x93"
    unicode = b"X" + len(touch).to_bytes(4, "little") + touch
    return {
        "INST": b"(" + text + b"iposix\nsystem\n.",
        "OBJ": b"(" + system + text + b"o.",
        "NEWOBJ": b"\x80\x02" + system + b"(" + text + b"t\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + b"(" + text + b"t}\x92.",
        "REDUCE": system + b"(" + text + b"tR.",
        "STACK_GLOBAL": b"\x80\x04" + short + b"(" + unicode + b"tR.",
        "STACK_GLOBAL from the memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94" + b"00h\x00h\x01\x93("
        + unicode + b"tR.",
        "framed": b"\x80\x04\x95" + (len(short) + len(unicode) + 4).to_bytes(8, "little") + short + b"("
        + unicode + b"tR.",
        "twice": system + b"(" + text + b"tR0" + system + b"(" + text + b"tR.",
        "through GET": system + b"p7\n0g7\n(" + text + b"tR.",
        "hidden below the result": system + b"(" + text + b"tR0}.",
        "in a mark that is dropped": b"(" + system + b"(" + text + b"tR1}.",
        "BUILD with a state": b"ccollections\nOrderedDict\n)R}S'__class__'\n" + system + b"sb.",
        "BUILD calls __setstate__": b"ctorch.nn\nModule\n)\x81}S'__setstate__'\n" + system + b"sb" + text + b"b.",
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x15_utils_internal.os.sys\x93(" + unicode + b"tR.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Pposix\n.",
        "BINPERSID of a call": system + b"(" + text + b"tRQ.",
        "rebuild with a call as storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + system + b"(" + text
        + b"tRK\x00(K\x01t(K\x01t\x89ccollections\nOrderedDict\n)RtR.",
        "second pickle behind the first": b"}." + system + b"(" + text + b"tR.",
        "protocol 255": b"\x80\xff" + system + b"(" + text + b"tR.",
        "out-of-band buffer": b"\x80\x05\x97" + system + b"(" + text + b"tR.",
        "cut": system + b"(" + text + b"tR",
    }  # fmt: skip


def files(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """A pickle stream in every kind of file that `torch.load` knows."""
    yield "plain", stream
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("archive/data.pkl", stream)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        yield f"zip {method}", buffer.getvalue()
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/constants.pkl", stream)
        archive.writestr("archive/version", "3\n")
    yield "TorchScript", script.getvalue()
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    magic, version = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    about, nothing = pickle.dumps(info, 2), pickle.dumps([], 2)
    yield "legacy", magic + version + about + stream + nothing
    yield "legacy, as magic number", stream + version + about + pickle.dumps({}, 2) + nothing
    yield "legacy, as version", magic + stream + about + pickle.dumps({}, 2) + nothing
    yield "legacy, as system information", magic + version + stream + pickle.dumps({}, 2) + nothing
    yield "legacy, as list of storages", magic + version + about + pickle.dumps({}, 2) + stream
    for victim in ("sys_info", "pickle", "storages", "tensors"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for member in ("sys_info", "pickle", "storages", "tensors"):
                data = stream if member == victim else pickle.dumps(info if member == "sys_info" else 0, 2)
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        yield f"tar, in {victim}", buffer.getvalue()


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Callable[[Path, bool], None]:
    """Save a tensor whose size, stride and offset within its four numbers are free."""

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            four = torch.arange(4.0)
            storage = torch.storage.TypedStorage(
                wrap_storage=four.untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    def save(path: Path, modern: bool) -> None:
        torch.save({"w": Tensor()}, path, _use_new_zipfile_serialization=modern)

    return save
