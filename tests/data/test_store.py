"""A store is whole or says so: resumed to the same bytes, never half-written, never mixed."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from medmap.core.box import Box
from medmap.core.labels import SCHEMES
from medmap.data import store as store_module
from medmap.data.cases import CaseFiles, ImageRef
from medmap.data.layouts import DataFolder, read_case, recognise
from medmap.data.nifti import write_volume
from medmap.data.preprocess import prepare_case, restore
from medmap.data.sources import describe_sources, same_sources
from medmap.data.store import Store, write_store
from medmap.errors import InputError

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SEQUENCES = ("t1n", "t1c", "t2w", "t2f")


def write_case(root: Path, case_id: str, names: tuple[str, ...] = SEQUENCES, seed: int = 0, top: int = 3) -> None:
    """A case with BraTS 2023 names; labels up to ``top``, so that a code can be made to fit no scheme."""
    rng = np.random.default_rng(seed)
    for name in names:
        image = np.zeros((10, 12, 8), np.float32)
        image[2:8, 1:10, 1 : 6 + rng.integers(0, 2)] = rng.normal(50, 30)
        image[image != 0] += rng.normal(0, 10, np.count_nonzero(image))
        write_volume(root / case_id / f"{case_id}-{name}.nii.gz", image, LPS)
    labels = np.zeros((10, 12, 8), np.uint8)
    labels[3:6, 3:6, 3] = [[1, 2, top]] * 3
    write_volume(root / case_id / f"{case_id}-seg.nii.gz", labels, LPS)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Hundreds of small files are made here; none of them has to survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def data(tmp_path) -> DataFolder:
    """Four cases; the second really lacks two sequences."""
    root = tmp_path / "data"
    for number in range(4):
        case_id = f"BraTS-SSA-{number:05}-000"
        (root / case_id).mkdir(parents=True)
        write_case(root, case_id, SEQUENCES[2:] if number == 1 else SEQUENCES, seed=number)
    return recognise(root)


def contents(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_a_store_gives_back_what_preparing_gives(data, tmp_path):
    report = write_store(data, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert report.done == store.ids == tuple(files.id for files in data.cases)
    assert (report.skipped, report.failed) == ((), {})
    assert store.scheme == SCHEMES["brats2023"]
    assert store.modalities.names == SEQUENCES
    assert store.spacing_mm == 1.0
    for files in data.cases:
        case = read_case(files)
        expected, found = prepare_case(case, data.scheme), store.load(files.id)
        assert found.grid.matches(expected.grid)
        assert_array_equal(found.native.affine, case.affine)
        assert set(found.images) == set(expected.images) == set(store.sequences(files.id))
        for name, boxed in expected.images.items():
            assert isinstance(found.images[name].values, np.memmap)
            assert found.images[name].box == boxed.box
            assert_array_equal(found.images[name].values, boxed.values)
            assert store.brain_ml(files.id)[name] == pytest.approx(np.count_nonzero(case.images[name]) / 1000, abs=1e-3)
        classes = found.labels.window(Box((0, 0, 0), found.grid.shape))
        assert_array_equal(store.scheme.decode(restore(classes, found, order=0)), case.labels)


def test_sequences_that_are_really_missing_are_first_class(data, tmp_path):
    write_store(data, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert store.sequences("BraTS-SSA-00001-000") == ("t2w", "t2f")
    # the other sequences' files removed from disk, or never there: the same bytes
    for name in ("t1n", "t1c"):
        (data.root / "BraTS-SSA-00000-000" / f"BraTS-SSA-00000-000-{name}.nii.gz").unlink()
    write_store(recognise(data.root), tmp_path / "without")
    without = Store(tmp_path / "without").load("BraTS-SSA-00000-000")
    assert set(without.images) == {"t2w", "t2f"}
    for name, boxed in without.images.items():
        full = store.load("BraTS-SSA-00000-000").images[name]
        assert full.box == boxed.box
        assert_array_equal(full.values, boxed.values)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_store_goes_on_to_the_same_bytes(data, tmp_path, stop_after):
    class PulledPlug(Exception):
        pass

    def pull(finished: int, total: int, case_id: str) -> None:
        assert total == 4
        if finished == stop_after:
            raise PulledPlug(case_id)

    write_store(data, tmp_path / "whole", spacing_mm=2.0)
    with pytest.raises(PulledPlug, match=data.cases[stop_after - 1].id):
        write_store(data, tmp_path / "broken", spacing_mm=2.0, on_progress=pull)
    with pytest.raises(InputError, match=r"preparation was interrupted; run medmap prepare again"):
        Store(tmp_path / "broken")
    report = write_store(data, tmp_path / "broken", spacing_mm=2.0)
    assert len(report.skipped) == stop_after
    assert len(report.done) == 4 - stop_after
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert Store(tmp_path / "broken").sha256 == Store(tmp_path / "whole").sha256


def test_a_case_interrupted_while_it_is_written_is_not_there(data, tmp_path, monkeypatch):
    """The plug is pulled between two arrays of the second case."""
    written = []
    write_array = store_module.disk.write_array

    def pull(path, values):
        written.append(path)
        if len(written) == 7:
            raise KeyboardInterrupt("plug")
        write_array(path, values)

    monkeypatch.setattr(store_module.disk, "write_array", pull)
    with pytest.raises(KeyboardInterrupt, match="plug"):
        write_store(data, tmp_path / "store")
    assert [p.name for p in (tmp_path / "store" / "cases").iterdir() if p.name[0] != "."] == [data.cases[0].id]
    monkeypatch.undo()
    assert write_store(data, tmp_path / "store").skipped == (data.cases[0].id,)
    write_store(data, tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_two_files_that_were_exchanged_are_noticed(tmp_path):
    """As `mv` does it: uncompressed images have one size, those of one archive one time of writing, and keep both."""
    one, two, spare = (tmp_path / name for name in ("t1n.nii", "t1c.nii", "spare"))
    for path in (one, two):
        path.write_bytes(path.name.encode())
        os.utime(path, (1, 1))
    files = CaseFiles("p", "p", "", {path.stem: ImageRef(path) for path in (one, two)}, None, "", None)
    before = describe_sources(files, tmp_path)
    assert same_sources(files, before)
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert not same_sources(files, before)


def test_unchanged_cases_are_skipped_by_time_or_hash_and_changed_ones_made_anew(data, tmp_path):
    out = tmp_path / "store"
    write_store(data, out)
    before = contents(out)
    assert len(write_store(data, out).skipped) == 4
    touched = next(iter(data.cases[0].images.values())).path
    os.utime(touched, (1, 1))
    assert len(write_store(data, out).skipped) == 4
    assert contents(out) == before
    write_case(data.root, data.cases[2].id, seed=99)
    (out / "cases" / data.cases[3].id / "t2f.npy").unlink()
    report = write_store(data, out)
    assert report.done == (data.cases[2].id, data.cases[3].id)
    changed = {name for name, content in contents(out).items() if before[name] != content}
    assert {Path(name).parent.name for name in changed} == {"store", data.cases[2].id} - {"store"} | {""}
    assert f"cases/{data.cases[2].id}/t2f.npy" in changed


def test_a_patient_who_is_known_better_now_is_made_anew(data, tmp_path):
    write_store(data, tmp_path / "store")
    first = replace(data.cases[0], patient="somebody")
    report = write_store(replace(data, cases=(first, *data.cases[1:])), tmp_path / "store")
    assert report.done == (first.id,)
    assert Store(tmp_path / "store").patient(first.id) == "somebody"


def test_a_case_that_fails_is_named_and_leaves_nothing(data, tmp_path):
    out = tmp_path / "store"
    write_store(data, out)
    broken, coded = data.cases[0], data.cases[2]
    broken.images["t2f"].path.write_bytes(b"no image")
    write_case(data.root, coded.id, seed=9, top=9)
    for place in (out, tmp_path / "new"):
        seen = []
        report = write_store(data, place, on_progress=lambda done, total, case_id, seen=seen: seen.append(case_id))
        assert seen == [files.id for files in data.cases]
        assert set(report.failed) == {broken.id, coded.id}
        assert "t2f.nii.gz" in report.failed[broken.id]
        assert "found label 9" in report.failed[coded.id]
        assert Store(place).ids == (data.cases[1].id, data.cases[3].id)
        assert sorted(p.name for p in (place / "cases").iterdir()) == [data.cases[1].id, data.cases[3].id]
        assert Store(place).manifest["failed"] == report.failed


def test_what_check_calls_an_error_is_not_prepared(data, tmp_path):
    """One patient under three ids, and one image under two names."""
    out = tmp_path / "store"
    write_store(data, out)
    for copy in (2, 3):
        for name, ref in data.cases[copy].images.items():
            shutil.copy(data.cases[0].images[name].path, ref.path)
    shutil.copy(data.cases[1].images["t2w"].path, data.cases[1].images["t2f"].path)
    for place in (out, tmp_path / "new"):
        report = write_store(data, place)
        assert set(report.failed) == {files.id for files in data.cases[1:]}
        assert "t2w and t2f are one image under two names; find out" in report.failed[data.cases[1].id]
        for copy in data.cases[2:]:
            assert f"the same image as in {data.cases[0].id}" in report.failed[copy.id]
        assert [path.name for path in (place / "cases").iterdir()] == [*Store(place).ids] == [data.cases[0].id]


def test_copies_of_one_patient_are_prepared(data, tmp_path):
    cases = tuple(replace(files, patient="one") for files in data.cases)
    for name, ref in cases[2].images.items():
        shutil.copy(cases[0].images[name].path, ref.path)
    assert not write_store(replace(data, cases=cases), tmp_path / "store").failed


def test_a_store_of_failures_is_refused_when_it_is_opened(data, tmp_path):
    for files in data.cases:
        files.labels.write_bytes(b"")
    assert len(write_store(data, tmp_path / "store").failed) == 4
    with pytest.raises(InputError, match="holds no case, all of them failed"):
        Store(tmp_path / "store")


def test_other_settings_in_a_store_are_refused(data, tmp_path):
    write_store(data, tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(
        InputError, match=r"was prepared with spacing_mm native, now 2\.0 is asked for; give another -o"
    ):
        write_store(data, tmp_path / "store", spacing_mm=2.0)
    with pytest.raises(InputError, match="was prepared with scheme brats2023, now brats2024 is asked for"):
        write_store(recognise(data.root, labels="brats2024"), tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_a_store_is_made_of_one_data_folder(data, tmp_path):
    write_store(data, tmp_path / "store")
    with pytest.raises(InputError, match=rf"holds 1 cases that the data do not \({data.cases[0].id}\)"):
        write_store(replace(data, cases=data.cases[1:]), tmp_path / "store")


def test_undecided_labels_and_unequal_classes_are_refused(data, tmp_path):
    undecided = replace(data.cases[0].map, scheme=None)
    folder = replace(data, cases=(replace(data.cases[0], map=undecided), *data.cases[1:]))
    with pytest.raises(InputError, match=rf"labels of 1 cases mean \({data.cases[0].id}\) is undecided.*--labels"):
        write_store(folder, tmp_path / "store")
    later = replace(data.cases[0].map, scheme=SCHEMES["brats2024"])
    folder = replace(data, cases=(replace(data.cases[0], map=later), *data.cases[1:]))
    with pytest.raises(InputError, match=r"labelled as brats2024, others as brats2023.*two stores"):
        write_store(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_one_store_may_hold_two_codings_of_the_same_classes(data, tmp_path):
    write_case(data.root, data.cases[0].id, top=4)
    old = replace(data.cases[0].map, scheme=SCHEMES["brats2021"])
    write_store(replace(data, cases=(replace(data.cases[0], map=old), *data.cases[1:])), tmp_path / "store")
    store = Store(tmp_path / "store")
    assert [int(store.load(case_id).labels.values.max()) for case_id in store.ids] == [3, 3, 3, 3]


def test_a_case_without_labels_or_without_tumour_is_stored(data, tmp_path):
    data.cases[0].labels.unlink()
    write_volume(data.cases[1].labels, np.zeros((10, 12, 8), np.uint8), LPS)
    write_store(recognise(data.root), tmp_path / "store")
    store = Store(tmp_path / "store")
    assert [store.has_labels(case_id) for case_id in store.ids] == [False, True, True, True]
    assert store.load(store.ids[0]).labels is None
    assert not store.load(store.ids[1]).labels.window(Box((0, 0, 0), (10, 12, 8))).any()


def test_no_room_on_the_disk_is_known_before_the_work(data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 9, 1))
    with pytest.raises(InputError, match=r"are needed for 4 cases, 0\.0 GB are free; make room"):
        write_store(data, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up_is_one_error_and_what_is_done_stays(data, tmp_path, monkeypatch):
    written = []
    write_array = store_module.disk.write_array

    def full(path, values):
        written.append(path)
        if len(written) == 7:
            raise OSError(28, "No space left on device")
        write_array(path, values)

    monkeypatch.setattr(store_module.disk, "write_array", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\).*goes on from there"):
        write_store(data, tmp_path / "store")
    monkeypatch.undo()
    assert write_store(data, tmp_path / "store").skipped == (data.cases[0].id,)


def test_places_that_cannot_be_a_store_are_refused(data, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").write_text("years of work")
    for place in ("file", "full"):
        with pytest.raises(InputError, match="exists and is no store; expected a new or empty folder"):
            write_store(data, tmp_path / place)
    with pytest.raises(InputError, match="cannot be written"):
        write_store(data, tmp_path / "file" / "below")
    with pytest.raises(InputError, match="expected a positive number of millimetres"):
        write_store(data, tmp_path / "store", spacing_mm=-1.0)
    assert (tmp_path / "full" / "thesis.docx").read_text() == "years of work"


def test_opening_what_is_no_store_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json cannot be read.*medmap prepare PATH -o"):
        Store(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Store(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="not the manifest of a store"):
        Store(tmp_path)


def test_a_store_of_another_format_is_refused(data, tmp_path):
    write_store(data, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match="is of format 99, this medmap reads 1"):
        Store(tmp_path / "store")


def test_damaged_arrays_and_unknown_cases_are_named(data, tmp_path):
    write_store(data, tmp_path / "store")
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match="no case BraTS-SSA-0002-000; did you mean BraTS-SSA-00002-000"):
        store.load("BraTS-SSA-0002-000")
    path = tmp_path / "store" / "cases" / store.ids[0] / "t2f.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"no numpy"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"t2f\.npy: damaged or absent.*delete .* and run medmap prepare again"):
            store.load(store.ids[0])
    np.save(path, np.array([{"code": "that a pickle would run"}], dtype=object))
    with pytest.raises(InputError, match="Python objects in dtype"):
        store.load(store.ids[0])
    np.save(path, np.zeros((2, 2, 2), np.float32))
    with pytest.raises(InputError, match=r"found float32 \(2, 2, 2\), the manifest says float16"):
        store.load(store.ids[0])


def test_too_many_open_arrays_are_not_called_damage(data, tmp_path):
    write_store(data, tmp_path / "store")
    store = Store(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    room = next(n for n in range(soft) if n - sum(fd < n for fd in taken) == 12)
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
    try:
        with pytest.raises(InputError, match="too many arrays are open at once; allow more open files: ulimit -n"):
            _ = [store.load(case_id) for case_id in store.ids]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len([store.load(case_id) for case_id in store.ids]) == 4


def test_the_hash_follows_the_voxels_and_not_the_place(data, tmp_path):
    write_store(data, tmp_path / "store")
    shutil.copytree(data.root, tmp_path / "elsewhere")
    write_store(recognise(tmp_path / "elsewhere"), tmp_path / "second")
    assert Store(tmp_path / "store").sha256 == Store(tmp_path / "second").sha256
    write_case(tmp_path / "elsewhere", data.cases[0].id, seed=42)
    write_store(recognise(tmp_path / "elsewhere"), tmp_path / "second")
    assert Store(tmp_path / "store").sha256 != Store(tmp_path / "second").sha256


def test_real_patients_are_stored_and_come_back(real_data, tmp_path):
    for collection, scheme in (("ssa-2mm", "brats2023"), ("brats2021-2mm", "brats2021")):
        folder = recognise(real_data / collection)
        folder = replace(folder, cases=folder.cases[:2])
        write_store(folder, tmp_path / collection)
        store = Store(tmp_path / collection)
        assert (store.scheme.name, store.spacing_mm) == (scheme, 2.0)
        for files in folder.cases:
            prepared = store.load(files.id)
            classes = prepared.labels.window(Box((0, 0, 0), prepared.grid.shape))
            back = store.scheme.decode(restore(classes, prepared, order=0))
            assert_array_equal(back, read_case(files).labels)
