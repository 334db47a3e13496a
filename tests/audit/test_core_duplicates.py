import torch

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.core import audit_images
from lightning_iet.audit.features import build_features
from lightning_iet.audit.findings import make_findings
from lightning_iet.audit.reading import image_set
from lightning_iet.audit.search import References, nearest_references, views
from lightning_iet.data import DigitsDataModule
from lightning_iet.functional.duplicates import find_duplicates, without_self
from tests.helpers.image_folders import random_pixels


def duplicates(tmp_path, pixels, k):
    images, features = image_set(pixels, location="train"), build_features("pixels")
    references = References.of(features.rows(pixels), images.sha256)
    found = nearest_references(
        images,
        references,
        k=k + 1,
        features=features,
        views=views("none"),
        cache=BlockCache(tmp_path),
        argument="train",
    )
    return find_duplicates(*without_self(found.sq_distances, found.indices))


def test_copies_inside_the_set_are_grouped(tmp_path):
    pixels = random_pixels(60)
    pixels[50] = pixels[7]
    pixels[51] = pixels[7]
    pixels[52] = (pixels[3].float() * 0.97).to(torch.uint8)
    found = duplicates(tmp_path, pixels, k=20)
    assert found.members == [[7, 50, 51], [3, 52]]
    assert found.images == 5
    assert len(found.group.unique()) == 60 - 3
    assert len({int(found.group[i]) for i in (7, 50, 51)}) == 1


def test_a_set_without_duplicates(tmp_path):
    found = duplicates(tmp_path, random_pixels(60), k=20)
    assert found.members == []
    assert found.images == 0


def test_more_identical_images_than_neighbours(tmp_path):
    pixels = random_pixels(60)
    pixels[:30] = pixels[0]
    assert duplicates(tmp_path, pixels, k=5).members == [list(range(30))]


def test_an_image_is_taken_out_of_its_own_list():
    indices = torch.tensor([[0, 1], [0, 1], [0, 1]])  # image 2 equals images 0 and 1, and does not find itself
    sq_distances = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]])
    found, others = without_self(sq_distances, indices)
    assert found.tolist() == [[1.0], [2.0], [0.0]]
    assert others.tolist() == [[1], [0], [0]]


def test_a_classifiers_features_do_not_make_duplicates_of_a_class(tmp_path):
    digits = DigitsDataModule(num_train=56)
    digits.setup("fit")
    pixels = (digits.train_set.images * 255).round().to(torch.uint8)
    train = image_set(torch.cat([pixels, pixels[9:10]]), location="train")
    others = image_set((digits.control_set.images * 255).round().to(torch.uint8)[:20], location="generated")
    found = audit_images(others, train, features=build_features("digits"), cache=BlockCache(tmp_path))
    assert [9, 56] in found.duplicates.members
    assert {len(group) for group in found.duplicates.members} == {2}  # a few pairs are alike; no class is one group
    assert make_findings(found).duplicates.features == "pixels"
