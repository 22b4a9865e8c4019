"""NIfTI in and out: values, grids bit by bit, damaged files, and nothing half-written."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_trees import AFFINE, image, labels, save

from medmap.core.case import Grid
from medmap.data import nifti
from medmap.data.filenames import stem
from medmap.data.nifti import (
    looks_cut_off,
    read_header,
    read_labels,
    read_volume,
    sha256,
    write_mask,
    write_volume,
)
from medmap.errors import InputError


def test_header_says_what_nibabel_says(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", image("a"))
    header = read_header(path)
    assert (header.shape, header.dtype, header.channels) == ((8, 8, 8), np.dtype("float32"), 1)
    assert (header.orientation, header.oriented) == ("LPS", True)
    assert header.grid.matches(Grid((8, 8, 8), AFFINE))
    assert header.grid.spacing_mm == (1.0, 1.0, 2.0)


def test_scale_and_offset_of_the_file_are_applied(tmp_path: Path) -> None:
    raw = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    nib.save(raw, tmp_path / "b.nii")
    data = bytearray((tmp_path / "b.nii").read_bytes())
    data[112:120] = np.array([0.5, -1.0], "<f4").tobytes()  # scl_slope, scl_inter of the NIfTI-1 standard
    (tmp_path / "b.nii").write_bytes(data)
    volume, _ = read_volume(tmp_path / "b.nii")
    np.testing.assert_array_equal(volume.ravel(), np.arange(8) * 0.5 - 1.0)
    assert volume.dtype == np.float32


def test_what_nibabel_mends_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "a.nii", image("a"))
    data = bytearray(path.read_bytes())
    data[80:92] = np.array([-1.0, -1.0, -2.0], "<f4").tobytes()  # pixdim of the axes
    path.write_bytes(data)
    nib.load(path)
    assert "pixdim" in caplog.text  # nibabel on its own
    caplog.clear()
    read_volume(path)
    write_mask(tmp_path / "seg.nii.gz", labels(range(4)), path)
    assert not caplog.records
    nib.load(path)
    assert "pixdim" in caplog.text  # and afterwards


def test_one_volume_of_a_4d_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.stack([image("a"), image("b")], axis=-1))
    np.testing.assert_array_equal(read_volume(path, channel=1)[0], image("b"))
    with pytest.raises(InputError, match=r"found a 4-D file of shape \(8, 8, 8, 2\); a 3-D volume is expected; split"):
        read_volume(path)
    with pytest.raises(InputError, match=r"volume 3 is asked for, the file holds 2"):
        read_volume(path, channel=2)


def test_a_fourth_axis_of_length_one_is_no_4d_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", image("a")[..., None])
    assert read_header(path).channels == 1
    np.testing.assert_array_equal(read_volume(path)[0], image("a"))


def test_labels_come_as_integers_also_from_floats(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", labels((1, 2, 4)).astype(np.float32))
    codes, affine = read_labels(path)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, labels((1, 2, 4)))
    np.testing.assert_allclose(affine, AFFINE)
    path = save(tmp_path / "b.nii.gz", labels((1, 2)).astype(np.int16) * 300)
    assert read_labels(path)[0].max() == 600
    path = save(tmp_path / "c.nii.gz", labels((1, 2)) * np.float32(0.4))
    with pytest.raises(InputError, match=r"c.nii.gz: 2 voxels are not whole numbers.*nearest-neighbour"):
        read_labels(path)


def test_qform_and_sform_that_disagree_are_measured(tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 3
    moved[2, 2] *= 1.5  # the voxels are 1 mm thicker in the sform: 7 mm over the 7 steps from first to last
    for codes, apart in (((1, 1), np.hypot(3, 7)), ((2, 4), np.hypot(3, 7)), ((1, 0), 0), ((0, 1), 0), ((0, 0), 0)):
        picture = nib.Nifti1Image(image("a"), AFFINE)
        picture.set_sform(moved, code=codes[1])
        picture.header.set_qform(AFFINE, code=codes[0])
        path = tmp_path / "a.nii"
        nib.save(picture, path)
        assert read_header(path).forms_apart == pytest.approx(apart)
    turn = np.array([[0.8, -0.6, 0, 3.3], [0.6, 0.8, 0, -7.1], [0, 0, 1.7, 11.9], [0, 0, 0, 1]])
    write_volume(tmp_path / "b.nii", image("b"), turn)
    assert read_header(tmp_path / "b.nii").forms_apart < 1e-4


# ---- writing ----------------------------------------------------------------------------------------------------


def oblique(path: Path, kind: type[nib.Nifti1Image] = nib.Nifti1Image) -> Path:
    """A file whose qform (code 1) and sform (code 2) differ, with units in mm."""
    turn = np.array([[0.8, -0.6, 0, 3.3], [0.6, 0.8, 0, -7.1], [0, 0, 1.7, 11.9], [0, 0, 0, 1]])
    picture = kind(image("a"), AFFINE)
    picture.set_qform(AFFINE, code=1)
    picture.set_sform(turn, code=2)
    picture.header.set_xyzt_units("mm", "sec")
    nib.save(picture, path)
    return path


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_lies_exactly_where_its_reference_lies(kind: type[nib.Nifti1Image], tmp_path: Path) -> None:
    like = oblique(tmp_path / "image.nii.gz", kind)
    write_mask(tmp_path / "mask.nii.gz", labels((1, 2, 3)), like)
    reference, mask = nib.load(like), nib.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, reference.affine)
    for form in ("get_qform", "get_sform"):
        for one, two in zip(getattr(mask, form)(coded=True), getattr(reference, form)(coded=True), strict=True):
            np.testing.assert_array_equal(one, two)
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), labels((1, 2, 3)))


def test_a_mask_for_one_volume_of_a_4d_file(tmp_path: Path) -> None:
    like = save(tmp_path / "image.nii.gz", np.stack([image("a")] * 4, axis=-1))
    write_mask(tmp_path / "mask.nii.gz", labels((3,)), like)
    codes, affine = read_labels(tmp_path / "mask.nii.gz")
    assert codes.shape == (8, 8, 8)
    np.testing.assert_array_equal(affine, read_header(like).affine)


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    like = save(tmp_path / "image.nii.gz", image("a"))
    for name in ("one", "two"):
        write_mask(tmp_path / f"{name}.nii.gz", labels((1,)), like)
    assert sha256(tmp_path / "one.nii.gz") == sha256(tmp_path / "two.nii.gz")


def test_a_mask_of_another_shape_or_name_is_refused(tmp_path: Path) -> None:
    like = save(tmp_path / "image.nii.gz", image("a"))
    with pytest.raises(InputError, match=r"the mask has \(8, 8, 7\) voxels, .*image.nii.gz has \(8, 8, 8\)"):
        write_mask(tmp_path / "mask.nii.gz", labels(())[:, :, 1:], like)
    with pytest.raises(InputError, match=r"mask.png: masks and volumes are written as .nii.gz"):
        write_mask(tmp_path / "mask.png", labels(()), like)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = save(tmp_path / "image.nii.gz", image("a"))
    write_mask(tmp_path / "mask.nii.gz", labels((1,)), like)
    before = sorted((path.name, sha256(path)) for path in tmp_path.iterdir())

    def full(picture: nib.Nifti1Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nifti.nib, "save", full)
    with pytest.raises(InputError, match=r"mask.nii.gz: cannot be written \(No space left on device\); check that"):
        write_mask(tmp_path / "mask.nii.gz", labels((2,)), like)
    assert sorted((path.name, sha256(path)) for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/a.nii.gz: cannot be written \(No such file or directory\)"):
        write_volume(tmp_path / "nowhere" / "a.nii.gz", image("a"), AFFINE)


@pytest.mark.parametrize("dtype", [None, np.int16, np.uint8, np.float32])
def test_a_written_volume_reads_back(dtype: type | None, tmp_path: Path) -> None:
    volume = np.rint(image("a"))
    write_volume(tmp_path / "a.nii.gz", volume + np.float32(0.2) * (dtype == np.int16), AFFINE, dtype)
    back, affine = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(back, volume)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
    header = nib.load(tmp_path / "a.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert header.get_data_dtype() == np.dtype(dtype or np.float32)


# ---- damaged files ----------------------------------------------------------------------------------------------


def test_files_that_are_no_nifti(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.nii.gz: no such file; check the path"):
        read_header(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"hello, this is text" * 40)
    with pytest.raises(
        InputError, match=r"b.nii.gz: named .gz but its bytes are not gzip, a NIfTI file is expected; copy or"
    ):
        read_header(tmp_path / "b.nii.gz")
    with gzip.open(tmp_path / "c.nii.gz", "wb") as file:
        file.write(b"hello, this is text" * 40)
    with pytest.raises(InputError, match=r"c.nii.gz: something else inside, a NIfTI file is expected"):
        read_header(tmp_path / "c.nii.gz")
    (tmp_path / "d.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"d.nii.gz: empty, a NIfTI file is expected"):
        read_header(tmp_path / "d.nii.gz")
    with pytest.raises(InputError, match=r"is a folder; a NIfTI file is expected"):
        read_header(tmp_path)
    nib.save(nib.MGHImage(image("a"), AFFINE), tmp_path / "e.mgz")
    (tmp_path / "f.mgz").write_bytes((save(tmp_path / "g.nii.gz", image("a"))).read_bytes())  # wrongly named
    (tmp_path / "bare").write_bytes(b"text")
    for name, found in (
        ("e.mgz", r"that ends in \.mgz"),
        ("f.mgz", r"that ends in \.mgz"),
        ("bare", "without an ending"),
    ):
        with pytest.raises(InputError, match=rf"{name}: found a name {found}; expected a NIfTI file .*; convert it"):
            read_header(tmp_path / name)
    with pytest.raises(InputError, match=r"h.mgz: no such file"):
        read_header(tmp_path / "h.mgz")


def test_a_file_cut_off_on_its_way(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(32, 32, 32)).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", noise)
    assert not looks_cut_off(read_header(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_header(path).shape == (32, 32, 32)  # the header is still whole
    assert looks_cut_off(read_header(path))
    with pytest.raises(InputError, match=r"a.nii.gz: damaged or cut off while it was written .*copy or download"):
        read_volume(path)
    plain = save(tmp_path / "b.nii", noise)
    assert not looks_cut_off(read_header(plain))
    plain.write_bytes(plain.read_bytes()[:-1])
    assert looks_cut_off(read_header(plain))
    with pytest.raises(InputError, match=r"b.nii: cannot be read"):
        read_volume(plain)


@pytest.mark.parametrize("volumes", [1, 2])
@pytest.mark.parametrize("end", [8, 4], ids=["checksum", "length"])
def test_a_gzip_file_whose_checksum_does_not_fit_is_damaged(volumes: int, end: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.stack([image("a")] * volumes, axis=-1))
    data = bytearray(path.read_bytes())
    data[-end] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.nii.gz: damaged or cut off .*(CRC|length).*; copy or download it again"):
        read_volume(path, channel=0)


def test_a_flipped_bit_among_stored_voxels_is_found(tmp_path: Path) -> None:
    raw = gzip.decompress(save(tmp_path / "a.nii.gz", image("a")).read_bytes())
    data = bytearray(gzip.compress(raw, compresslevel=0))  # stored as they are, so that any byte unpacks
    data[len(data) // 2] ^= 1
    (tmp_path / "b.nii.gz").write_bytes(data)
    assert read_header(tmp_path / "b.nii.gz").shape == (8, 8, 8)
    for read in (read_volume, read_labels):
        with pytest.raises(InputError, match=r"b.nii.gz: damaged or cut off .*CRC check failed"):
            read(tmp_path / "b.nii.gz")


def test_a_gzip_file_of_two_members_is_whole(tmp_path: Path) -> None:
    data = gzip.decompress(save(tmp_path / "a.nii.gz", image("a")).read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    assert not looks_cut_off(read_header(tmp_path / "b.nii.gz"))
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz")[0], image("a"))


def test_headers_that_cannot_be_used(tmp_path: Path) -> None:
    flat = save(tmp_path / "flat.nii.gz", image("a")[:, :, 0])
    with pytest.raises(InputError, match=r"flat.nii.gz: found 2 dimensions \(8, 8\); a 3-D volume is expected"):
        read_header(flat)
    path = save(tmp_path / "a.nii.gz", image("a"))
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    path.write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(InputError, match=r"a.nii.gz: the affine has no inverse"):
        read_header(path)
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match=r"rgb.nii.gz: voxels are of type .*is it a colour picture"):
        read_header(save(tmp_path / "rgb.nii.gz", colours))


@pytest.mark.parametrize(
    ("code", "unit"),
    [
        *((0, "unknown"), (1, "meter"), (2, "mm"), (3, "micron"), (10, "mm"), (130, "mm")),
        *((code, "unknown") for code in (4, 5, 6, 7, 56, 64, 255)),
    ],
)
def test_a_unit_that_nobody_knows_is_no_reason_to_stop(code: int, unit: str, tmp_path: Path) -> None:
    path = with_bytes(tmp_path / "a.nii", 123, bytes([code]))
    assert read_header(path).unit == unit
    assert read_header(path).shape == (8, 8, 8)
    write_mask(tmp_path / "mask.nii.gz", labels((1, 2)), path)
    np.testing.assert_array_equal(read_labels(tmp_path / "mask.nii.gz")[0], labels((1, 2)))


@pytest.mark.parametrize("offset", [np.inf, -np.inf, np.nan])
def test_voxels_that_begin_nowhere_are_an_error_of_that_file(offset: float, tmp_path: Path) -> None:
    path = with_bytes(tmp_path / "a.nii", 108, np.float32(offset).tobytes())
    for read in (read_header, read_volume, read_labels):
        with pytest.raises(
            InputError, match=r"a.nii: cannot be read \(cannot convert float .*copy or download it again"
        ):
            read(path)


def with_bytes(path: Path, place: int, content: bytes) -> Path:
    """A NIfTI file with other bytes at one place of its header."""
    data = bytearray(save(path, image("a")).read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)
    return path


@given(st.binary(max_size=4096))
def test_sha256_is_that_of_the_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        assert sha256(path) == hashlib.sha256(data).hexdigest()


def test_stem_drops_both_endings() -> None:
    assert [stem(Path(name)) for name in ("a.b.nii.gz", "a.b.NII", "a.txt")] == ["a.b", "a.b", "a.txt"]


def test_real_mask_on_its_own_grid(real_data: Path, tmp_path: Path) -> None:
    like = real_data / "brats2021-2mm" / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz"
    codes, affine = read_labels(like.with_name("BraTS2021_00000_seg.nii.gz"))
    write_mask(tmp_path / "mask.nii.gz", codes, like)
    back, same = read_labels(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(same, affine)
