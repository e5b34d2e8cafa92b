"""Put object files into memory, ready to be called, without a linker.

LLVM compiles the kernels for addresses anywhere in memory (its large code model), so that on x86-64 an address in the
code is always 8 bytes that hold it in full.  Filling these in is all that is left to do.  llvmlite, whose import and
whose linker would be a tenth of a short run, does it for other machines.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["address_of"]

_HEADER = struct.Struct("<7s9xHHIQQQIHHHHHH")
_IDENT = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
_RELOCATABLE, _X86_64 = 1, 62
_SYMBOLS, _RELOCATIONS, _ZEROS, _UNWIND = 2, 4, 8, 0x70000001  # kinds of sections; nothing unwinds a kernel
_IN_MEMORY = 2  # a flag of sections
_UNDEFINED = 0  # in place of a section's number
_ADDRESS = 1  # the relocation R_X86_64_64: the address of the symbol, plus the addend
_READ_AND_RUN = 5

_mapped: list[mmap.mmap] = []
"""The memory of all code, for as long as the process lives."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int  # of symbols: the section of their names
    info: int  # of relocations: the section that they change
    align: int
    entry: int


def address_of(symbol: str, code: bytes, stubs: Mapping[str, int]) -> int | None:
    """The address of a function of an object file, which now lies in memory; None: that takes a linker.

    stubs  addresses of names that the object leaves open; the other names are this process's
    """
    sections = _sections(code)
    offsets, size = _laid_out(sections)
    if not size:
        return None
    # Anonymous pages, zero-filled: sections without content need no copy.
    memory = mmap.mmap(-1, size)
    origin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i, offset in offsets.items():
        section = sections[i]
        if section.kind != _ZEROS:
            memory[offset : offset + section.size] = _content(code, section)
    symbols = _symbols(code, sections, {i: origin + offset for i, offset in offsets.items()}, stubs)
    for section in sections:
        if section.kind != _RELOCATIONS or section.info not in offsets:
            continue
        # Elf64_Rela: offset, symbol and kind in one number, addend.
        for place, what, addend in struct.iter_unpack("<QQq", _content(code, section)):
            _, address = symbols[what >> 32]
            if what & 0xFFFFFFFF != _ADDRESS or address is None:
                return None
            struct.pack_into("<Q", memory, offsets[section.info] + place, address + addend)
    # Read and execute, no longer write.
    found = dict(symbols).get(symbol)
    if found is None or ctypes.CDLL(None).mprotect(ctypes.c_void_p(origin), ctypes.c_size_t(size), _READ_AND_RUN):
        return None
    _mapped.append(memory)
    return found


def _sections(code: bytes) -> Sequence[_Section]:
    """The sections of an object file for this kind of machine; none of others."""
    ident, kind, machine, *_, start, _, _, _, _, size, count, _ = _HEADER.unpack_from(code)
    if (ident, kind, machine) != (_IDENT, _RELOCATABLE, _X86_64):
        return ()
    return [_Section(*struct.unpack_from("<IIQQQQIIQQ", code, start + i * size)) for i in range(count)]


def _content(code: bytes, section: _Section) -> bytes:
    return code[section.offset : section.offset + section.size]


def _laid_out(sections: Sequence[_Section]) -> tuple[dict[int, int], int]:
    """Offset in memory of every section that has a place there, and the bytes of all together."""
    offsets, end = dict[int, int](), 0
    for i, section in enumerate(sections):
        if section.flags & _IN_MEMORY and section.kind != _UNWIND:
            # Rounded up to the section's alignment.
            offsets[i] = -(-end // max(section.align, 1)) * max(section.align, 1)
            end = offsets[i] + section.size
    return offsets, end


def _symbols(
    code: bytes, sections: Sequence[_Section], places: Mapping[int, int], stubs: Mapping[str, int]
) -> list[tuple[str, int | None]]:
    """(name, address) of every symbol; None where it cannot be found."""
    found: list[tuple[str, int | None]] = []
    for table in (section for section in sections if section.kind == _SYMBOLS):
        names = _content(code, sections[table.link])
        for name, _, _, section, value, _ in struct.iter_unpack("<IBBHQQ", _content(code, table)):
            word = names[name : names.index(b"\0", name)].decode()
            if section == _UNDEFINED:
                # Symbols come in the order of their numbers, which relocations name.
                found.append((word, stubs.get(word) or _own(word)))
            else:
                found.append((word, places[section] + value if section in places else None))
    return found


def _own(name: str) -> int | None:
    """The address of a function or variable of this process."""
    try:
        return ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, name))
    except ValueError:
        return None
