"""Read thousands of truncated, hostile and mixed files, and count what is used and what is skipped.

    python -m benchmarks.fuzz_readers --files 10000

Each folder holds whole files, cut ones, and ones with changed bytes, of every format that Pillow writes here. A reader
may refuse a file, but not end in a traceback, nor count wrongly: what is used and what is skipped make up all pages.
"""

import argparse
import random
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import Reading, read_images
from lightning_iet.data.sources import open_source

FORMATS = ("png", "jpeg", "tiff", "gif", "webp", "bmp", "ppm", "tga", "ico", "pcx", "sgi")
IN_A_FOLDER = 500


def whole(kind: str, generator: random.Random) -> bytes:
    """Return a file of a format, sometimes with several pages."""
    pages = generator.choice((1, 1, 3)) if kind in ("tiff", "gif", "webp", "png") else 1
    shape = generator.randint(1, 20), generator.randint(1, 20), 3
    frames = [
        Image.fromarray(np.frombuffer(generator.randbytes(int(np.prod(shape))), np.uint8).reshape(shape))
        for _ in range(pages)
    ]
    file = BytesIO()
    frames[0].save(file, kind, **({"save_all": True, "append_images": frames[1:]} if pages > 1 else {}))
    return file.getvalue()


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Cut a file, change some of its bytes, or repeat a part of it."""
    kind, changed = generator.randrange(4), bytearray(data)
    if kind == 0:
        return data[: generator.randrange(len(data))]
    if kind == 1:
        start = generator.randrange(len(data))
        return data[:start] + data[start // 2 :]
    for _ in range(1 if kind == 2 else 20):
        changed[generator.randrange(min(len(changed), 200 if kind == 2 else len(changed)))] = generator.randrange(256)
    return bytes(changed)


def main() -> None:
    """Make folders, read them, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="number of files (default: %(default)s)")
    args = parser.parse_args()
    generator, start = random.Random(0), time.perf_counter()
    images = used = skipped = 0
    for first in range(0, args.files, IN_A_FOLDER):
        with TemporaryDirectory() as folder:
            for number in range(first, min(first + IN_A_FOLDER, args.files)):
                data = whole(generator.choice(FORMATS), generator)
                data = data if number % 3 == 0 else damaged(data, generator)
                (Path(folder) / f"{number}.{generator.choice(FORMATS)}").write_bytes(data)
            source = open_source(Path(folder), argument="train")
            with TemporaryDirectory() as cache:
                how = Reading(size=(8, 8), fit="stretch", workers=0)
                found = read_images(source, BlockCache(Path(cache)), argument="train", location=folder, reading=how)
            if len(found) + len(found.skipped) != len(source):
                raise AssertionError(f"{len(found)} used and {len(found.skipped)} skipped are not {len(source)}")
        images, used, skipped = images + len(source), used + len(found), skipped + len(found.skipped)
    seconds = time.perf_counter() - start
    print(f"{args.files:,} files, {images:,} images: {used:,} used, {skipped:,} skipped with a reason, {seconds:.0f} s")


if __name__ == "__main__":
    main()
