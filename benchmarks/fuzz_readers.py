"""Read thousands of truncated, hostile and mixed files, and count what is used and what is skipped.

    python -m benchmarks.fuzz_readers --files 10000

Folders hold whole files, cut ones, and ones with changed bytes, of every format that Pillow writes here, and of HEIC,
DICOM and NIfTI; a tenth of all are containers that are opened by themselves: .npy, .npz, .tar, .tar.gz, Parquet.
A reader may refuse a file, in one line, but not end in a traceback, nor count wrongly: what is used and what is skipped
make up all images, and of a whole file all images are used.
"""

import argparse
import gzip
import io
import random
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import Reading, read_images
from lightning_iet.data.formats import pages_of
from lightning_iet.data.sources import open_source

FORMATS = ("png", "jpeg", "tiff", "gif", "webp", "bmp", "ppm", "tga", "ico", "pcx", "sgi")
IN_A_FOLDER = 500
CONTAINERS_IN_TEN = 1


# --- whole files ------------------------------------------------------------------------------------------------------


def _noise(generator: random.Random, *shape: int) -> np.ndarray:
    return np.frombuffer(generator.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)


def whole(kind: str, generator: random.Random) -> bytes:
    """Return a file of a format, sometimes with several pages."""
    if kind in MORE_FORMATS:
        return MORE_FORMATS[kind](generator)
    pages = generator.choice((1, 1, 3)) if kind in ("tiff", "gif", "webp", "png") else 1
    shape = generator.randint(1, 20), generator.randint(1, 20), 3
    frames = [Image.fromarray(_noise(generator, *shape)) for _ in range(pages)]
    file = BytesIO()
    frames[0].save(file, kind, **({"save_all": True, "append_images": frames[1:]} if pages > 1 else {}))
    return file.getvalue()


def heic(generator: random.Random) -> bytes:
    """Return a HEIC file."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    file = BytesIO()
    Image.fromarray(_noise(generator, generator.randint(8, 20), generator.randint(8, 20), 3)).save(file, "HEIF")
    return file.getvalue()


def dicom(generator: random.Random, *, frames: int | None = None, claimed: int | None = None) -> bytes:
    """Return a DICOM file of 16 bits, sometimes of several frames and with a window.

    Args:
        generator: the random numbers.
        frames: how many; ``None`` = one or three.
        claimed: how many its header names, if others.
    """
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    frames = generator.choice((1, 3)) if frames is None else frames
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = 6, 8
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.NumberOfFrames = frames if claimed is None else claimed
    if generator.random() < 0.5:
        dataset.WindowCenter, dataset.WindowWidth = 2000, 1000
    dataset.PixelData = (_noise(generator, frames, 6, 8).astype(np.uint16) * 16).tobytes()
    dataset["PixelData"].VR = "OW"
    file = BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def nifti(generator: random.Random) -> bytes:
    """Return a NIfTI file with a volume of a few slices, compressed or not."""
    import nibabel

    volume = _noise(generator, 6, 8, generator.randint(1, 4)).astype(np.int16)
    data = bytes(nibabel.Nifti1Image(volume, np.eye(4)).to_bytes())
    return gzip.compress(data, mtime=0) if generator.random() < 0.3 else data


MORE_FORMATS: dict[str, Callable[[random.Random], bytes]] = {"heic": heic, "dcm": dicom, "nii": nifti}


class Container(NamedTuple):
    """A file that holds several images.

    Attributes:
        suffix: of its name.
        data: its bytes.
        images: how many it holds.
    """

    suffix: str
    data: bytes
    images: int


def npy(generator: random.Random) -> Container:
    """Return an array of images of 8 or 16 bits, or of floating point in [0, 1]."""
    array, file = _images(generator), BytesIO()
    np.save(file, array)
    return Container(".npy", file.getvalue(), len(array))


def npz(generator: random.Random) -> Container:
    """Return an archive with an array of images, and labels."""
    array, file = _images(generator), BytesIO()
    save = generator.choice((np.savez, np.savez_compressed))
    save(file, images=array, labels=np.arange(len(array)))
    return Container(".npz", file.getvalue(), len(array))


def tar(generator: random.Random) -> Container:
    """Return a WebDataset archive of images and captions, compressed or not."""
    count, file = generator.randint(1, 5), BytesIO()
    mode = generator.choice(("w", "w:gz"))
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for number in range(count):
            kind = generator.choice(("png", "jpeg", "bmp"))
            image = BytesIO()
            Image.fromarray(_noise(generator, 6, 8, 3)).save(image, kind)
            _add(archive, f"{number:03d}.{kind}", image.getvalue())
            _add(archive, f"{number:03d}.txt", b"a caption")
    return Container(".tar" if mode == "w" else ".tar.gz", file.getvalue(), count)


def parquet(generator: random.Random) -> Container:
    """Return a table of images, as Hugging Face keeps them."""
    import datasets

    count, rows = generator.randint(1, 5), []
    for _ in range(count):
        image = BytesIO()
        Image.fromarray(_noise(generator, 6, 8, 3)).save(image, "png")
        rows.append({"bytes": image.getvalue(), "path": None})
    file = BytesIO()
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": rows, "label": list(range(count))}, features=features).to_parquet(file)
    return Container(".parquet", file.getvalue(), count)


CONTAINERS: dict[str, Callable[[random.Random], Container]] = {"npy": npy, "npz": npz, "tar": tar, "parquet": parquet}


def _images(generator: random.Random) -> np.ndarray:
    noise = _noise(generator, generator.randint(1, 5), 6, 8, *generator.choice(((), (1,), (3,))))
    kind = generator.choice((np.uint8, np.uint16, np.float32))
    return noise / np.float32(255) if kind is np.float32 else noise.astype(kind)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


# --- damaged and hostile ones -----------------------------------------------------------------------------------------


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


def hostile() -> dict[str, Container]:
    """Return containers that promise what they do not hold, or hold what must not be opened; none has an image."""
    file, objects, linked, twisted = BytesIO(), BytesIO(), BytesIO(), BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000)})
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with tarfile.open(fileobj=linked, mode="w") as archive:
        for number, target in enumerate(("/etc/hostname", "../../secret.png", "0.png")):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = (tarfile.LNKTYPE if number else tarfile.SYMTYPE), target
            archive.addfile(member)
    with tarfile.open(fileobj=twisted, mode="w") as archive:
        _add(archive, "a.png", b"x" * 10)
    size = bytearray(twisted.getvalue())
    size[124:136] = b"77777777777\0"  # eight gigabytes, in octal digits
    return {
        "an array of a terabyte": Container(".npy", file.getvalue() + bytes(100), 0),
        "an array of objects": Container(".npy", objects.getvalue(), 0),
        "an archive of links": Container(".tar", linked.getvalue(), 0),
        "a member of eight gigabytes": Container(".tar", bytes(size), 0),
        "a table of nothing": Container(".parquet", b"PAR1" + bytes(8) + b"PAR1", 0),
        "no bytes": Container(".npz", b"", 0),
    }


def hostile_files() -> dict[str, bytes]:
    """Return files, by their names in a folder, that promise what they do not hold; none has an image."""
    return {"billions of frames.dcm": dicom(random.Random(0), frames=1, claimed=2**31 - 1)[:-60]}


# --- reading ----------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What reading came to: images found, used and skipped; or ``refused``, why nothing was read.

    ``names`` are those of the images that were used.
    """

    images: int = 0
    used: int = 0
    skipped: int = 0
    refused: str = ""
    names: tuple[str, ...] = ()


def read(path: Path) -> Read:
    """Read a folder or a container; refused ones are those that the command line answers in one line.

    Raises:
        AssertionError: if the counts do not add up, or an error is none of these.
    """
    try:
        source = open_source(path, argument="train")
        with TemporaryDirectory() as cache:
            how = Reading(size=(8, 8), fit="stretch", workers=0)
            found = read_images(source, BlockCache(Path(cache)), argument="train", location=str(path), reading=how)
    except (ValueError, OSError) as error:
        if not str(error).startswith("Argument `"):
            raise AssertionError(f"'{path}' ended in {type(error).__name__}: {error}") from error
        return Read(refused=str(error))
    if not len(found) + len(found.skipped) == len(source) == len(set(found.names)) + len(found.skipped):
        raise AssertionError(f"{len(found)} used and {len(found.skipped)} skipped of '{path}' are not {len(source)}")
    return Read(len(source), len(found), len(found.skipped), names=tuple(found.names))


def read_container(container: Container, folder: Path, *, is_whole: bool) -> Read:
    """Write a container and read it; of a whole one all images must be used."""
    path = folder / f"images{container.suffix}"
    path.write_bytes(container.data)
    found = read(path)
    path.unlink()
    if is_whole and (found.refused or (found.images, found.used) != (container.images, container.images)):
        raise AssertionError(f"a whole {container.suffix} of {container.images} images came to {found}")
    return found


def read_folder(files: Mapping[str, bytes], folder: Path, *, whole: Collection[str]) -> Read:
    """Write files and read them; of each whole one all images must be used.

    Args:
        files: their bytes, by their names.
        folder: where to, an empty one.
        whole: names of those that are whole.

    Raises:
        AssertionError: if an image of a whole file is not used, or the counts do not add up.
    """
    for name, data in files.items():
        (folder / name).write_bytes(data)
    found = read(folder)
    used = Counter(name.partition(", page ")[0] for name in found.names)
    for name in whole:
        if used[name] != len(pages_of(files[name]).numbers):
            raise AssertionError(
                f"of the {len(pages_of(files[name]).numbers)} images of the whole {name} {used[name]} are used"
            )
    return found


def main() -> None:
    """Make folders and containers, read them, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="number of files (default: %(default)s)")
    args = parser.parse_args()
    generator, start = random.Random(0), time.perf_counter()
    total: Counter[str] = Counter()
    kinds = [kind for kind in CONTAINERS if kind != "parquet"] * 5 + ["parquet"]  # which takes the longest by far
    containers = args.files * CONTAINERS_IN_TEN // 10
    with TemporaryDirectory() as folder:
        found = [read_container(container, Path(folder), is_whole=False) for container in hostile().values()]
        (Path(folder) / "files").mkdir()
        files = read_folder(hostile_files(), Path(folder) / "files", whole=())
        if any(part.used for part in [*found, files]):
            raise AssertionError("a hostile container or file came to images")
        for number in range(containers):
            container = CONTAINERS[generator.choice(kinds)](generator)
            is_whole = number % 3 == 0
            if not is_whole:
                container = container._replace(data=damaged(container.data, generator))
            found.append(read_container(container, Path(folder), is_whole=is_whole))
    formats = FORMATS + tuple(MORE_FORMATS)
    for first in range(containers, args.files, IN_A_FOLDER):
        files, are_whole = {}, []
        for number in range(first, min(first + IN_A_FOLDER, args.files)):
            data = whole(generator.choice(formats), generator)
            data = data if number % 3 == 0 else damaged(data, generator)
            name = f"{number}.{generator.choice(formats)}"
            files[name] = data
            are_whole += [name] if number % 3 == 0 else []
        with TemporaryDirectory() as folder:
            found.append(read_folder(files, Path(folder), whole=are_whole))
    for part in found:
        total.update({"refused": bool(part.refused), "images": part.images, "used": part.used, "skipped": part.skipped})
    print(
        f"{args.files:,} files, {containers:,} of them containers, of which {total['refused']:,} were refused in one "
        f"line: {total['images']:,} images, {total['used']:,} used, {total['skipped']:,} skipped with a reason, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
