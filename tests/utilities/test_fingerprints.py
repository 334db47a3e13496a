"""Hashes against those of hashlib."""

import hashlib

import numpy as np
import torch
from torch import nn

from lightning_iet.utilities.fingerprints import checksums, digest, hash_images, hash_weights, sha256_of, tensor_bytes


def test_bytes_are_hashed_one_after_another():
    assert sha256_of([b"ab", b"", b"c"]) == hashlib.sha256(b"abc").hexdigest()


def test_the_lengths_of_parts_are_hashed_too():
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in (b"k", b"50", b"\xed\xb3\xa9"))
    assert digest("k", 50, "\udce9".encode("utf-8", "surrogatepass")) == hashlib.sha256(framed).hexdigest()
    assert digest("a\udce9") != digest("a\udcea")  # names of files that are no UTF-8


def test_images_are_told_apart_by_shape_order_and_value():
    images = torch.arange(8).view(2, 1, 2, 2) / 255
    bits = bytes(range(8))
    assert hash_images(images) == hashlib.sha256(b"(2, 1, 2, 2)" + bits).hexdigest()[:16]
    others = (images.flip(0), images.view(1, 2, 2, 2), images + 1 / 255)
    assert len({hash_images(images), *map(hash_images, others)}) == 4
    assert hash_images(images + 0.1 / 255) == hash_images(images)


def test_weights_are_told_apart_by_name_and_bits():
    layer = nn.Linear(2, 1)
    same = nn.Linear(2, 1)
    same.load_state_dict(layer.state_dict())
    assert hash_weights(layer) == hash_weights(same)
    with torch.no_grad():
        same.bias += 1e-6
    assert hash_weights(layer) != hash_weights(same)
    assert hash_weights(nn.Sequential(layer)) != hash_weights(layer)
    assert tensor_bytes(torch.ones(1, dtype=torch.bfloat16)) == b"\x80\x3f"


def test_checksums_are_made_where_the_tensors_are():
    """On the meta device, for want of another one: a sum on the CPU among them would be refused."""
    tensors = [torch.ones(3), torch.zeros(2, dtype=torch.int64), torch.ones((), dtype=torch.bfloat16)]
    assert checksums([tensor.to("meta") for tensor in tensors]).device.type == "meta"
    expected = [3 * int(np.float32(1).view(np.int32)), 0, int(np.float32(1).view(np.int32)) >> 16]
    assert checksums(tensors).tolist() == expected
    assert checksums([]).tolist() == []
