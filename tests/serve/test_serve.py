"""The local page's server: who is let in, what is taken in, what is checked."""

from __future__ import annotations

import gzip
import re
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from made_up_page import KEY, Page, zipped
from typer.testing import CliRunner

from medmap.cli import app as cli
from medmap.cli import console
from medmap.errors import InputError
from medmap.serve import uploads
from medmap.serve.app import PARTS
from medmap.serve.guard import CSP, MOST_BODY_BYTES
from medmap.serve.uploads import kind_of, safe_name, taken_in

PATIENT = "PHANTOM-00000-000"
SEQUENCES = ("t1n", "t1c", "t2w", "t2f")


# ---- who may ask -------------------------------------------------------------------------------------------------


def test_other_hosts_are_refused(page: Page) -> None:
    for host in (
        "evil.example",
        f"evil.example:{page.port}",
        "127.0.0.1",
        f"127.0.0.1:{page.port + 1}",
        f"0.0.0.0:{page.port}",
        "",
    ):
        assert page.client.get("/", headers={"host": host}).status_code == 421
    assert page.client.get("/", headers={"host": f"127.0.0.1:{page.port}"}).status_code == 200


def test_without_the_key_nothing_is_told(page: Page) -> None:
    page.client.cookies.clear()
    for path in ("/", "/model", "/parts/page.js", "/?key=", "/?key=another", "/nowhere"):
        answer = page.client.get(path)
        assert (answer.status_code, "printed" in answer.text) == (403, True), path
    assert page.client.post("/patients", json={}).status_code == 403
    page.client.cookies.set(f"medmap-{page.port}", "another")
    assert page.client.get("/model").status_code == 403


def test_the_key_becomes_a_cookie_that_other_pages_cannot_use(page: Page) -> None:
    page.client.cookies.clear()
    answer = page.client.get("/", params={"key": KEY})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert answer.headers["set-cookie"] == f"medmap-{page.port}={KEY}; HttpOnly; SameSite=Strict; Path=/"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{}", ""])
def test_other_pages_may_change_nothing(page: Page, origin: str) -> None:
    headers = {"origin": origin.format(page.port)}
    assert page.client.post("/patients", json={}, headers=headers).status_code == 403
    assert page.office.patients == {}


def test_a_request_without_origin_changes_nothing(page: Page) -> None:
    del page.client.headers["origin"]
    assert page.client.post("/patients", json={}).status_code == 403


def test_every_answer_is_sealed(page: Page) -> None:
    for answer in (page.client.get("/"), page.client.get("/nowhere"), page.client.get("/", headers={"host": "x"})):
        assert answer.headers["content-security-policy"] == CSP
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?:|\*|unsafe", CSP)


def test_the_page_is_made_of_its_own_parts_alone(page: Page) -> None:
    text = page.client.get("/").text
    assert set(re.findall(r'(?:src|href)="([^"]+)"', text)) == {"data:,", *(f"/parts/{name}" for name in PARTS)}
    for name in PARTS:
        assert page.client.get(f"/parts/{name}").status_code == 200
    for name in ("app.py", "..%2fapp.py", "report:page.css"):
        assert page.client.get(f"/parts/{name}").status_code == 404


def test_a_request_without_file_is_short(page: Page) -> None:
    patient = page.begin()
    named = {"named": {"0": "x" * MOST_BODY_BYTES}}
    assert page.client.post(f"/patients/{patient}/check", json=named).status_code == 413
    assert page.client.post(f"/patients/{patient}/check", content=iter([b"{}"])).status_code == 413
    assert page.client.post(f"/patients/{patient}/check", json={"named": 3}).status_code == 422


# ---- what is taken in --------------------------------------------------------------------------------------------


def test_type_is_told_by_content(files: dict[str, Path], tmp_path: Path) -> None:
    def made(content: bytes) -> str:
        (tmp_path / "x").write_bytes(content)
        return kind_of(tmp_path / "x")

    packed = files["t2f"].read_bytes()
    assert (made(packed), made(gzip.decompress(packed)), made(zipped({"a": b"a"}))) == (".nii.gz", ".nii", ".zip")
    assert [made(content) for content in (b"", b"\x7fELF", b"<html>", bytes(400), b"%PDF-1.4")] == [""] * 5


@pytest.mark.parametrize(
    "name", ["../../x.nii.gz", "/etc/passwd", "..", "...", "C:\\x\\y.nii", "a\0b.nii", "~/.ssh/x", ""]
)
def test_names_lead_nowhere(page: Page, files: dict[str, Path], name: str) -> None:
    found = safe_name(name)
    assert not re.search(r"[/\\\0]", found)
    assert not found.startswith(".")
    patient = page.begin()
    assert page.upload(patient, name, files["t2f"].read_bytes()).status_code == 200
    (file,) = page.on_disk()
    assert Path(file).parent == Path(patient) / "files"
    assert list(page.folder.parent.iterdir()) == [page.folder]


def test_one_name_twice_is_two_files(page: Page, files: dict[str, Path]) -> None:
    patient = page.begin()
    for name in ("t1n", "t2f"):
        assert page.upload(patient, "image.nii.gz", files[name].read_bytes()).status_code == 200
    told = page.job(patient, "check", named={"0": "t1n", "1": "t2f"})["result"]
    assert [row["name"] for row in told["volumes"]] == ["image.nii.gz", "image-2.nii.gz"]
    assert told["refused"] == ""


@pytest.mark.parametrize("sign", ["a", "ü", "图", "\U00020000"])
def test_long_names_are_cut_to_what_a_file_system_takes(sign: str, files: dict[str, Path], tmp_path: Path) -> None:
    name = safe_name(f"{99 * sign}_t2f.nii.gz")
    assert len(name.encode()) <= 100
    assert name.strip(sign) == "_t2f.nii.gz"
    (tmp_path / "files").mkdir()
    for kept in (name, name.replace(".nii.gz", "-2.nii.gz")):
        upload = tmp_path / "upload"
        upload.write_bytes(files["t2f"].read_bytes())
        assert taken_in(upload, f"{99 * sign}_t2f.nii.gz", tmp_path / "files").name == kept


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_nothing_stays_whatever_goes_wrong(
    error: type[BaseException], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path) -> None:
        raise error

    monkeypatch.setattr(uploads, "read_header", fail)
    (tmp_path / "files").mkdir()
    (tmp_path / "upload").write_bytes(files["t2f"].read_bytes())
    with pytest.raises(error):
        taken_in(tmp_path / "upload", "x.nii.gz", tmp_path / "files")
    assert list(tmp_path.rglob("*.nii.gz")) == []


def bomb(shape: tuple[int, int, int], more: int, offset: int = 352) -> bytes:
    """A NIfTI file that unpacks to more than its header says, or that says too much."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = offset, b"n+1"
    header.set_sform(np.eye(4), 1)
    length = (offset - 352).to_bytes(4, "little")
    extended = bytes([1, 0, 0, 0]) + length + bytes(4) if offset > 352 else bytes(4)
    return gzip.compress(header.binaryblock + extended + bytes(more), 1)


def test_a_small_file_never_takes_much_memory(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "upload").write_bytes(bomb((8, 8, 8), 2**27, offset=2**27))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"voxels begin at byte 134217728, at most 1,048,576 is taken"):
        taken_in(tmp_path / "upload", "x.nii.gz", tmp_path / "files")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


def test_bad_files_are_refused_and_not_kept(page: Page, files: dict[str, Path]) -> None:
    good = files["t2f"].read_bytes()
    typed = bytearray(gzip.decompress(bomb((8, 8, 8), 512)))
    typed[70:72] = (999).to_bytes(2, "little")  # the type of voxels
    cases = {
        "no.nii.gz": (b"<html>not an image</html>", "neither NIfTI nor a zip file"),
        "empty.nii": (b"", "neither NIfTI nor a zip file"),
        "text.nii.gz": (gzip.compress(b"text"), "a NIfTI file is expected"),
        "cut.nii.gz": (good[: len(good) // 2], "damaged or cut off"),
        "broken.nii.gz": (good[:2000] + bytes(100) + good[2100:], "broken.nii.gz: "),
        "bomb.nii.gz": (bomb((8, 8, 8), 2**26), "unpacks to more than the 8×8×8 voxels of its header"),
        "kind.nii.gz": (gzip.compress(typed), "damaged header"),
        "far.nii": (gzip.decompress(bomb((8, 8, 8), 2**22, offset=2**21)), "voxels begin at byte 2097152"),
        "huge.nii.gz": (bomb((30000, 30000, 30000), 8), "at most 134,217,728 are taken"),
    }
    for name, (content, words) in cases.items():
        patient = page.begin()
        answer = page.upload(patient, name, content)
        assert (answer.status_code, words in answer.json()["error"]) == (400, True), answer.text
        assert str(page.folder) not in answer.text
        assert page.on_disk() == [], name
    assert page.job(page.begin(files["t2f"]), "check")["result"]["refused"] == ""


def test_without_the_extra_a_study_is_told_what_is_lacking(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    told = page.upload(page.begin(), "ann.zip", zipped({"a.dcm": bytes(128) + b"DICM"})).json()["error"]
    assert told.startswith("ann.zip: a .zip is taken for a DICOM study, and pydicom")
    assert "pip install 'medmap[dicom]'" in told
    assert page.on_disk() == []


def test_hostile_archives_are_refused_and_not_kept(page: Page) -> None:
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    image = bytes(128) + b"DICM"
    cases = {
        "path.zip": (zipped({"../../evil.dcm": image}), "names a place outside of itself"),
        "bomb.zip": (zipped({"a.dcm": image + bytes(2**28)}), "unpacks to far more than its size"),
        "none.zip": (zipped({"a.txt": b"text"}), "no DICOM among them"),
        "broken.zip": (zipped({"a.dcm": image})[:40], "cannot be unpacked"),
    }
    for name, (content, words) in cases.items():
        patient = page.begin()
        assert page.upload(patient, name, content).status_code == 200
        told = page.job(patient, "check")["result"]
        assert words in told["refused"], told
        assert told["held_bytes"] == 0
        assert str(page.folder) not in told["refused"]
        assert page.on_disk() == [], name


def test_the_limit_is_of_one_patient(tiny_run: Path, files: dict[str, Path], tmp_path: Path) -> None:
    content = files["t2f"].read_bytes()
    page = Page(tiny_run, tmp_path / "page", limit_mb=1.5 * len(content) / 1e6)
    patient = page.begin(files["t2f"])
    for body in (content, iter([content])):  # with its length, and in pieces without one
        answer = page.client.post(f"/patients/{patient}/files", params={"name": "x.nii.gz"}, content=body)
        assert "MB for one patient" in answer.json()["error"]
    assert len(page.on_disk()) == 1
    page.begin(files["t2f"])
    page.close()


def test_what_is_refused_does_not_count(page: Page, files: dict[str, Path]) -> None:
    patient = page.begin()
    assert page.upload(patient, "no.nii", b"<html>").status_code == 400
    assert page.upload(patient, "t2f.nii.gz", files["t2f"].read_bytes()).status_code == 200
    assert page.job(patient, "check")["result"]["held_bytes"] == files["t2f"].stat().st_size


def test_a_patient_may_be_forgotten_while_an_image_comes_in(page: Page, files: dict[str, Path]) -> None:
    patient, content = page.begin(), files["t2f"].read_bytes()

    def body() -> Iterator[bytes]:
        yield content[:1000]
        page.office.forget(patient)
        yield content[1000:]

    answer = page.client.post(f"/patients/{patient}/files", params={"name": "x.nii.gz"}, content=body())
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "this patient is no longer here; drop the images again",
    )
    assert page.on_disk() == []


def test_a_study_does_not_mix_with_files(page: Page, files: dict[str, Path]) -> None:
    patient = page.begin(files["t2f"])
    assert "one .zip on its own" in page.upload(patient, "s.zip", zipped({"a": b"a"})).json()["error"]
    assert len(page.on_disk()) == 1


# ---- the check ---------------------------------------------------------------------------------------------------


def test_sequences_are_guessed_by_name_and_can_be_mended(page: Page, files: dict[str, Path]) -> None:
    patient = page.begin()
    for name, called in (("t1n", "ann_T1.nii.gz"), ("t1c", "ann_t1ce.nii.gz"), ("t2f", "ann_third.nii.gz")):
        assert page.upload(patient, called, files[name].read_bytes()).status_code == 200
    told = page.job(patient, "check")["result"]
    assert told["chosen"] == {"0": "t1n", "1": "t1c"}
    assert told["warnings"] == ["ann_third.nii.gz: its name does not say which sequence it is; choose it above"]
    told = page.job(patient, "check", named={"0": "t1n", "1": "t1c", "2": "t2f"})["result"]
    assert (told["sequences"], told["refused"]) == (["t1n", "t1c", "t2f"], "")


def test_refusals_are_those_of_the_terminal(page: Page, files: dict[str, Path], tiny_run: Path, tmp_path: Path) -> None:
    small = tmp_path / "ann_t1.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((5, 5, 5), np.float32), np.eye(4)), small)
    flair = tmp_path / "ann_flair.nii.gz"
    flair.write_bytes(files["t2f"].read_bytes())
    argv = [
        "predict",
        "--model",
        str(tiny_run),
        "--t1n",
        str(small),
        "--t2f",
        str(flair),
        "-o",
        str(tmp_path / "x.nii"),
    ]
    said = CliRunner().invoke(cli, argv)
    console.begin()
    assert said.exit_code == 1
    refused = page.job(page.begin(small, flair), "check")["result"]["refused"]
    assert said.output.strip().splitlines()[-1] == f"error: {refused}"


@pytest.mark.parametrize("named", [{"0": "t1n", "1": "t1n"}, {"0": "adc"}, {"9": "t1n"}, {}])
def test_a_choice_that_cannot_be_is_refused(page: Page, files: dict[str, Path], named: dict[str, str]) -> None:
    patient = page.begin(files["t1n"], files["t2f"])
    told = page.job(patient, "check", named=named)["result"]
    assert told["refused"]
    assert "were not checked" in page.job(patient, "segment", subset=["t1n"])["text"]


def test_one_image_under_two_names_is_refused(page: Page, files: dict[str, Path]) -> None:
    patient = page.begin(files["t1n"])
    page.upload(patient, "copy-t1c.nii.gz", files["t1n"].read_bytes())
    assert "one image under two names" in page.job(patient, "check")["result"]["refused"]
