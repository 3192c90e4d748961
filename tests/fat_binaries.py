"""Which GPUs a compiled library has code for, read from the library itself: CUDA puts its code into an ELF section.

The section `.nv_fatbin` holds fat binaries, each a header and entries of machine code (cubin) or PTX for one compute
capability. NVIDIA documents `cuobjdump --list-elf`, which prints the same; the layout is that of fatbinary.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

MAGIC = 0xBA55ED50
# magic, version, header size, size of the entries
HEADER = struct.Struct("<IHHQ")
# kind, version, header size, payload size, compressed size, options, minor, major, architecture
ENTRY = struct.Struct("<HHIQIIHHI")
PTX, CUBIN = 1, 2


def section(library: Path, name: str) -> bytes:
    """A section of a 64-bit little-endian ELF file; empty where there is none."""
    with library.open("rb") as file:
        identity = file.read(64)
        if identity[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{library} is no 64-bit ELF file")
        (table,) = struct.unpack_from("<Q", identity, 40)
        size, count, names_at = struct.unpack_from("<HHH", identity, 58)
        file.seek(table)
        raw = file.read(size * count)
        # name, type, flags, address, offset, size
        entries = [struct.unpack_from("<IIQQQQ", raw, size * number) for number in range(count)]

        def content(entry: tuple[int, ...]) -> bytes:
            file.seek(entry[4])
            return file.read(entry[5])

        names = content(entries[names_at])
        for entry in entries:
            if names[entry[0] : names.index(b"\0", entry[0])] == name.encode():
                return content(entry)
    return b""


def architectures(library: Path) -> set[str]:
    """What the library has code for: sm_90 for machine code, compute_90 for PTX. ValueError: an unknown layout."""
    return {f"{'sm' if kind == CUBIN else 'compute'}_{architecture}"
            for kind, architecture in _entries(section(library, ".nv_fatbin"))}  # fmt: skip


def _entries(data: bytes) -> Iterator[tuple[int, int]]:
    """Kind and architecture of each entry of all fat binaries in a section."""
    at = 0
    while at + HEADER.size <= len(data):
        magic, version, header_size, size = HEADER.unpack_from(data, at)
        if magic != MAGIC:
            at += 8  # what lies between two fat binaries is filled to multiples of 8
            continue
        if version != 1:
            raise ValueError(f"a fat binary of version {version}")
        entry, end = at + header_size, at + header_size + size
        while entry < end:
            kind, _, entry_header, payload, *_, architecture = ENTRY.unpack_from(data, entry)
            if kind in (PTX, CUBIN):
                yield kind, architecture
            entry += entry_header + payload
        at = end
