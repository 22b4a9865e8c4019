from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_calls import answer, call, fails, train, works
from made_up_work import Deadly, Overlapping, Square, Stepwise, Stuck, no_model, no_part, no_process

from medmap.cli import console
from medmap.errors import CheckpointError, ClusterError, InputError
from medmap.scale import Share, _Crew, share, spread

os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # as `medmap.scale` does, before Ray is imported
pytest.importorskip("ray")
from ray.cluster_utils import Cluster

MACHINE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PATIENT = "PHANTOM-00000-000"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines of one core each. They share the cores of this one, but are processes apart."""
    short = Path(tempfile.mkdtemp(prefix="r-"))  # Ray's sockets lie there, and their names must be short
    (short / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(short))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(True, head_node_args={**MACHINE, "temp_dir": str(short / "ray"), "include_dashboard": False})
        made.add_node(**MACHINE)
        yield made
        made.shutdown()
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(autouse=True)
def _plain_manner() -> Iterator[None]:
    yield
    console.begin()


# ---- tasks -------------------------------------------------------------------------------------------------------


def told(results: Any) -> list[Any]:
    """Results in the order of their tasks, errors as text."""
    return [str(r) if isinstance(r, Exception) else r for _, r in sorted(results, key=lambda pair: pair[0])]


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_results_and_errors_are_the_same_wherever_the_work_is_done(
    where: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    address = None if where == "here" else request.getfixturevalue("cluster").address
    assert told(spread(Square, [3, -2, 5, 1], address=address)) == [9, "-2 is negative", 25, 1]
    with pytest.raises(ZeroDivisionError):
        list(spread(Square, [0], address=address))
    with pytest.raises(CheckpointError, match="no run there"):
        list(spread(no_model, [1], address=address))
    with pytest.raises(KeyError if address is None else ClusterError, match=r"'part'"):
        list(spread(no_part, [1], address=address))
    assert capfd.readouterr() == ("", "")


class Deaths:
    """In place of Ray: of its answers in turn, these are of workers that died."""

    class exceptions:
        RayError = RuntimeError
        RayTaskError = ZeroDivisionError

    def __init__(self, died: str) -> None:
        self.left, self.asked = list(died), 0

    def remote(self, kind: type) -> Any:
        worker = SimpleNamespace(start=SimpleNamespace(remote=self._ask), do=SimpleNamespace(remote=self._ask))
        return SimpleNamespace(options=lambda **how: SimpleNamespace(remote=lambda: worker))

    def _ask(self, *arguments: Any) -> int:
        self.asked += 1
        return self.asked

    def wait(self, refs: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        return refs[:1], refs[1:]

    def get(self, ref: int) -> int:
        if self.left.pop(0) == "x":
            raise RuntimeError("died")
        return ref

    def kill(self, worker: Any) -> None: ...


def test_starts_that_fail_now_and_then_do_not_end_a_long_job() -> None:
    """Three starts fail before each of two workers is ready (x); the first of them dies at its second task."""
    crew = _Crew(Deaths("xxx..xxxx.."), Square, [1, 2], Share(1, 1), str)
    assert [index for index, _ in crew.results()] == [0, 1]
    crew = _Crew(Deaths("xxxx"), Square, [1, 2], Share(1, 1), str)
    with pytest.raises(ClusterError, match="4 workers died before they were ready"):
        list(crew.results())


def test_a_task_whose_worker_dies_is_done_by_another(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make = partial(Deadly, 2, tmp_path / "died")
    assert told(spread(make, range(6), address=cluster.address)) == [0, 10, 20, 30, 40, 50]
    assert (tmp_path / "died").exists()
    assert capfd.readouterr().out == ""


def test_a_task_at_which_every_worker_dies_is_named_and_nothing_else_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    make = partial(Deadly, -1, tmp_path / "died", always=(1,))
    results = dict(spread(make, range(4), address=cluster.address, called="case {}".format))
    assert {index: results.pop(index) for index in (0, 2, 3)} == {0: 0, 2: 20, 3: 30}
    assert isinstance(results[1], ClusterError)
    assert str(results[1]).startswith(
        "case 1: 4 workers died at it, one after the other (ActorDiedError: The actor died"
    )


def test_workers_that_never_start_are_given_up(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"8 workers died before they were ready .*; their machines may lack memory"):
        list(spread(no_process, [1, 2], address=cluster.address))


def test_a_machine_that_is_killed_half_way_costs_no_result(cluster: Cluster, tmp_path: Path) -> None:
    doomed = cluster.add_node(**MACHINE)
    make = partial(Stuck, doomed.node_id, tmp_path / "first")
    places: dict[int, str] = {}
    for index, result in spread(make, range(8), address=cluster.address):
        task, places[index] = result  # type: ignore[misc]
        assert task == index
        if places[index] == doomed.node_id:
            cluster.remove_node(doomed, allow_graceful=False)  # it has its next task by now, and hangs at it
    assert sorted(places) == list(range(8))
    assert list(places.values()).count(doomed.node_id) == 1


def test_a_worker_of_another_version_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmap.__version__", "0.0.7")
    with pytest.raises(ClusterError, match=r"has medmap \S+, this machine 0\.0\.7; install the same version on both"):
        list(spread(Square, [1], address=cluster.address))


def test_names_of_files_are_relative_to_where_the_command_was_given(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told(spread(partial(partial, os.path.abspath), ["x"], address=cluster.address)) == [str(tmp_path / "x")]


# ---- machines ----------------------------------------------------------------------------------------------------


def test_machines_are_cut_into_workers() -> None:
    small, big = {"CPU": 4.0, "memory": 8e9}, {"CPU": 64.0, "memory": 256e9, "GPU": 8.0}
    assert share([small], 100, "auto", 4) == Share(2, 2)  # two fit into the memory, each gets half of the cores
    assert share([small], 100, "cpu", 99) == Share(1, 4)
    assert share([small], 1, "cpu", 1) == Share(1, 4)
    assert share([small, big], 100, "auto", 4) == Share(8, 8, 1)
    assert share([big], 100, "cpu", 4) == Share(64, 1)
    with pytest.raises(ClusterError, match="no GPU to work with"):
        share([small], 1, "cuda", 1)
    with pytest.raises(ClusterError, match="no core to work with"):
        share([{"memory": 8e9}], 1, "auto", 1)
    with pytest.raises(
        InputError, match="device 'cuda:1': on a cluster Ray says which GPU; expected auto, cpu or cuda"
    ):
        share([big], 1, "cuda:1", 1)


def test_no_cluster_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ClusterError, match=rf"no Ray cluster at {address} \(.*refused.*start one with `ray start"):
            list(spread(Square, [1], address=address))


# ---- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folds(tiny_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of a network for one sequence, at 8 mm: what it says are crumbs, whose distances take their time."""
    out = tmp_path_factory.mktemp("scale") / "folds"
    for fold in (0, 1):
        works(*train(tiny_phantoms, out / f"fold{fold}", "data.modalities=[t2f]", "--fold", fold, "--spacing", 8))
    return out


def test_the_tables_of_an_evaluation_are_those_of_one_machine(folds: Path, tmp_path: Path, cluster: Cluster) -> None:
    here, there = shutil.copytree(folds, tmp_path / "here"), shutil.copytree(folds, tmp_path / "there")
    works("evaluate", here, "--device", "cpu")
    done = call("evaluate", "--device", "cpu", "--ray", cluster.address, there)
    assert done.exit_code == 0, done.output
    assert "scoring 2/2" in done.stderr
    for part in (".", "fold0", "fold1"):
        for name in ("subsets.csv", "summary.json"):
            assert (there / part / name).read_bytes() == (here / part / name).read_bytes(), (part, name)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "made")}


def test_masks_are_those_of_one_machine(
    folds: Path, tiny_phantoms: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_phantoms, tmp_path / "data")
    broken = tmp_path / "data" / "PHANTOM-00001-000" / "PHANTOM-00001-000-t2f.nii.gz"
    damaged = bytearray(broken.read_bytes())
    damaged[-8] ^= 1  # the checksum: found only when it is read
    broken.write_bytes(damaged)
    monkeypatch.chdir(tmp_path)
    words = (
        "predict",
        "--model",
        folds / "fold0",
        "-i",
        "data",
        "--device",
        "cpu",
        "--probabilities",
        "float32",
        "--json",
    )
    here = call(*words, "-o", "here")
    there = call(*words, "-o", "there", "--ray", cluster.address)
    assert (here.exit_code, there.exit_code) == (3, 3)
    assert "warning: left out PHANTOM-00001-000: " in there.stderr
    assert "segmenting 3/3" in there.stderr
    one, two = json.loads(here.stdout), json.loads(there.stdout)
    assert list(one["done"]) == list(two["done"]) == [PATIENT, "PHANTOM-00002-000"]
    assert one["failed"] == two["failed"]
    for id, record in one["done"].items():
        assert without_times(two["done"][id]) == without_times(record)
        for name in (f"{id}.nii.gz", f"{id}-probabilities.npz"):
            assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def test_the_runs_of_a_study_are_those_of_one_machine(tmp_path: Path, cluster: Cluster) -> None:
    words = ("study", "organ", "--quick", "--work", tmp_path / "work", "--jobs", 1, "--device", "cpu")
    works(*words, "-o", tmp_path / "here")
    done = call(*words, "-o", tmp_path / "there", "--ray", cluster.address)
    assert done.exit_code == 0, done.output
    here, there = (tmp_path / name / "quick" / "runs" for name in ("here", "there"))
    tables = sorted(file.name for file in here.glob("*.csv"))
    assert len(tables) == 2
    for name in tables:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


def test_a_ray_of_our_own_leaves_nothing_behind(folds: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    words = ("predict", "--model", folds / "fold0", "-i", tiny_phantoms, "-o", tmp_path / "masks", "--device", "cpu")
    command = [sys.executable, "-W", "error", "-m", "medmap", *map(str, words), "--json", "--ray"]
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="r-") as room:
        environment = {**mine, "HOME": str(home), "TMPDIR": room}
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert os.listdir(room) == []
    assert found.returncode == 0, found.stderr
    assert list(json.loads(found.stdout)["done"]) == [f"PHANTOM-0000{n}-000" for n in range(3)]
    assert "ray" not in found.stderr.lower().replace(str(tmp_path), "")
    assert list(home.iterdir()) == []


def test_what_cannot_be_spread(folds: Path, tiny_phantoms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    image = tiny_phantoms / PATIENT / f"{PATIENT}-t2f.nii.gz"
    assert "one patient is one task" in fails("predict", "--t2f", image, "-o", tmp_path / "a.nii.gz", "--ray", code=2)
    masks = ("--pred", tmp_path, "--truth", tmp_path)
    assert "masks and floors need no cluster" in fails("evaluate", "--ray", *masks, code=2)
    assert "need no cluster" in fails("evaluate", "--ray", folds, "--baseline", "flair-threshold", code=2)
    assert "no Ray cluster at 127.0.0.1:1" in fails("evaluate", "--ray", "127.0.0.1:1", folds, "--device", "cpu")
    assert answer("predict", "-i", tiny_phantoms, "--ray", "-o", tmp_path / "masks", "--dry-run")["dry_run"]
    monkeypatch.setattr("medmap.cli.beforehand.find_spec", lambda name: None)
    said = fails("predict", "-i", tiny_phantoms, "-o", tmp_path / "masks", "--ray")
    assert "ray not installed; this part needs it: pip install 'medmap[ray]'" in said


# ---- steps -------------------------------------------------------------------------------------------------------


def test_work_in_steps_gives_every_result_in_order_and_every_error_at_its_task() -> None:
    tasks = ["fine", "read", "compute", "write", "again"]
    found = list(spread(Stepwise, tasks, address=None))
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]
    assert told(found) == ["FINE.", "cannot read", "cannot compute", "cannot write", "AGAIN."]
    assert Stepwise()("fine") == "FINE."


def test_a_task_is_read_and_another_written_while_a_third_is_computed() -> None:
    assert told(spread(Overlapping, [0, 1, 2], address=None)) == [0, 1, 2]


def test_a_bug_in_a_step_is_no_result() -> None:
    with pytest.raises(ZeroDivisionError):
        list(spread(Stepwise, ["fine", "bug"], address=None))
