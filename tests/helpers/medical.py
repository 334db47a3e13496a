"""DICOM and NIfTI files for tests."""

import struct
from io import BytesIO

import numpy as np


def dicom(pixels, *, windows=None, **attributes):
    """The bytes of a DICOM file: a frame, several each with a window of its own, or none; of 12 bits, or colours."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    if pixels is not None:
        colours = pixels.dtype == np.uint8
        frames = pixels.ndim == 3 and not colours
        dataset.Rows, dataset.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if colours else (1, "MONOCHROME2")
        if colours:
            dataset.PlanarConfiguration = 0
        dataset.BitsAllocated = 8 * pixels.dtype.itemsize
        dataset.BitsStored = 8 if colours else 12 if pixels.dtype == np.uint16 else 16
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        if frames:
            dataset.NumberOfFrames = len(pixels)
        dataset.PixelData = pixels.tobytes()
        dataset["PixelData"].VR = "OB" if colours else "OW"
    if windows is not None:
        groups = []
        for center, width in windows:
            item, group = pydicom.Dataset(), pydicom.Dataset()
            item.WindowCenter, item.WindowWidth = center, width
            group.FrameVOILUTSequence = [item]
            groups.append(group)
        dataset.PerFrameFunctionalGroupsSequence = groups
    for name, value in attributes.items():
        setattr(dataset, name, value)
    file = BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def nifti(volume, *, version=1, affine=None, slope=None):
    """The bytes of a NIfTI file."""
    import nibabel

    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(volume, np.eye(4) if affine is None else affine)
    data = bytearray(image.to_bytes())
    if slope is not None:  # the field scl_slope of version 1
        struct.pack_into("<f", data, 112, slope)
    return bytes(data)
