"""Pictures out of folders and arrays, as transformers' own processors make them."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from rankwise.data.classes import Classes
from rankwise.data.picture_files import PictureSource, read_pictures
from rankwise.data.pictures import Look
from rankwise.errors import DataError

VIT = Look(ViTImageProcessorPil(size={"height": 12, "width": 10}), 3, 5)


@pytest.fixture
def folder(tmp_path):
    """Two classes, pictures of several sizes and modes."""
    generator = np.random.default_rng(0)
    for name, count in (("cats", 3), ("dogs", 2)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(256, size=(20 + number, 30, 3)).astype(np.uint8)
            picture = Image.fromarray(pixels).convert(("RGB", "L", "RGBA")[number])
            picture.save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "set" / "cats" / "notes.txt").write_text("not a picture")
    return tmp_path / "set"


@pytest.fixture
def arrays(tmp_path):
    generator = np.random.default_rng(0)
    parts = {"class_names": np.array(["shirt", "shoe"])}
    for part, count in (("train", 6), ("test", 4)):
        parts[f"x_{part}"] = generator.integers(256, size=(count, 8, 8)).astype(np.uint8)
        parts[f"y_{part}"] = np.arange(count) % 2
    np.savez(tmp_path / "small.npz", **parts)
    return tmp_path / "small.npz", parts


def read(source, look, tmp_path, part="train"):
    classes = PictureSource(str(source), part).classes()
    return read_pictures(str(source), look, classes, part=part, cache=tmp_path / "cache")


CROPPED = CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 9, "width": 9})


@pytest.mark.parametrize("processor", [VIT.processor, CROPPED], ids=["vit", "clip"])
def test_a_folder_is_what_the_processor_makes_of_each_picture(folder, processor, tmp_path):
    found = read(folder, Look(processor, 3, 5), tmp_path).corpus
    assert found.classes == ("cats", "dogs")
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    files = sorted(folder.glob("*/*.png"))
    assert [found.origin(i) for i in range(5)] == [str(file) for file in files]
    for i, file in enumerate(files):
        with Image.open(file) as picture:
            want = processor(images=[picture.convert("RGB")], return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found.floats([i])[0], want, atol=1e-6)


def test_grey_arrays_are_read_by_part_and_keep_their_one_channel(arrays, tmp_path):
    path, parts = arrays
    even = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=(0.5,), image_std=(0.5,))
    look = Look(even, 1, 5)
    for part in ("train", "test"):
        found = read(path, look, tmp_path, part).corpus
        assert np.array_equal(found.pixels[:, 0], parts[f"x_{part}"])
        assert found.labels.tolist() == parts[f"y_{part}"].tolist()
        assert found.classes == ("shirt", "shoe")
    want = (parts["x_test"][2].astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(found.floats([2])[0, 0], want, atol=1e-6)
    assert found.origin(2) == f"{path}:3"
    named = read_pictures(f"{path}:test", look, Classes(("shirt", "shoe"), (0, 1)), cache=tmp_path / "cache").corpus
    assert np.array_equal(named.pixels, found.pixels)


def test_pictures_are_kept_by_content_and_found_again(arrays, tmp_path):
    first = read(arrays[0], VIT, tmp_path).corpus
    kept = list((tmp_path / "cache").iterdir())
    assert [path.suffix for path in kept] == [".npy"]
    again = read(arrays[0], VIT, tmp_path).corpus
    assert again.digest == first.digest
    assert list((tmp_path / "cache").iterdir()) == kept
    assert len(read(arrays[0], Look(CROPPED, 3, 5), tmp_path).corpus) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_classes_that_are_not_learnt_are_listed(folder, arrays):
    with pytest.raises(DataError, match=r"'cats' \(3 pictures\), 'dogs' \(2 pictures\)"):
        PictureSource(str(folder)).check_known(Classes(("shirt", "shoe"), (0, 1)))
    assert PictureSource(str(arrays[0])).classes() == Classes(("shirt", "shoe"), (0, 1), (3, 3))


def test_files_that_are_no_pictures_are_listed_by_name(folder, tmp_path):
    (folder / "cats" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "dogs" / "9.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read(folder, VIT, tmp_path)
    assert "cats/9.png: no picture" in str(caught.value)
    assert "dogs/9.jpg: no picture" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_no_source_of_pictures_says_what_one_is(tmp_path, folder):
    with pytest.raises(DataError, match="no such folder of pictures"):
        PictureSource(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no pictures in folders of classes; .*set holds folders of its own"):
        PictureSource(str(folder.parent))
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(DataError, match="cannot be read"):
        PictureSource(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((6, 8, 8), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((6, 8), np.uint8)}, r"\(6, 8\), expected uint8"),
        ({"y_train": np.zeros(5, int)}, "expected 6 whole numbers"),
        ({"y_train": np.full(6, 2)}, "label 2 in y_train, but 2 class_names"),
        ({"y_train": np.zeros(6, int)}, "no picture of shoe"),
        ({"y_train": None}, "has no x_train and y_train"),
        ({"class_names": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_arrays_that_are_not_as_they_should_be(arrays, tmp_path, change, words):
    parts = {name: array for name, array in (arrays[1] | change).items() if array is not None}
    np.savez(tmp_path / "other.npz", **parts)
    with pytest.raises(DataError, match=words):
        PictureSource(str(tmp_path / "other.npz")).classes()


def test_the_digest_of_a_look_is_of_all_its_settings():
    assert VIT.digest == Look(ViTImageProcessorPil(size={"height": 12, "width": 10}), 3, 5).digest
    others = [
        Look(ViTImageProcessorPil(size={"height": 12, "width": 12}), 3, 5),
        Look(ViTImageProcessorPil(size={"height": 12, "width": 10}, image_mean=(0.4,) * 3), 3, 5),
        Look(VIT.processor, 1, 5),
    ]
    assert len({VIT.digest, *(look.digest for look in others)}) == 4
