"""Check the size that an .npz declares in its headers before anything of it is unpacked.

A few kilobytes can declare terabytes, in the zip's directory or in an array's shape.
"""

import math
import zipfile
from collections.abc import Collection

import numpy as np

MAX_MEMBERS = 1000
"""Files in one archive; data sets have a dozen."""


def check_arrays(packed: zipfile.ZipFile, room: int, names: Collection[str] | None = None) -> None:
    """Refuse an archive that would not fit, or whose arrays are not of the size that they declare.

    A file that is longer than the zip declares is cut off there by ``zipfile`` and fails its checksum, so
    what is declared is what can come.

    Args:
        packed: the open archive.
        room: bytes that there are to unpack to.
        names: the members that will be unpacked; all if None.

    Raises:
        ValueError: too many members, more bytes than there is room for, or an array's header that does not
            fit the bytes behind it. The text names members and sizes.
    """
    members = [info for info in packed.infolist() if names is None or info.filename in names]
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"{len(members)} members, more than the {MAX_MEMBERS} that are read")
    needed = sum(info.file_size for info in members)
    if needed > room:
        raise ValueError(f"it takes {needed:,} bytes unpacked, and there is room for {room:,}")
    for info in members:
        if not info.filename.endswith(".npy"):
            continue
        with packed.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(
                    f"{info.filename} has the version {version} of the .npy format; save it anew"
                )
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(stream)
            # Reading Python objects means unpickling, which runs whatever code the file holds.
            if dtype.hasobject:
                raise ValueError(f"{info.filename} holds Python objects, which are not read")
            declared, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        # NumPy reserves what the shape declares before it reads, so the shape must not exceed the bytes.
        if declared != held:
            raise ValueError(f"{info.filename} declares {dtype} of shape {shape}, and holds {held:,} bytes")
