from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from made_up_calls import answer, call, fails, works
from typer.testing import CliRunner

import medmap
from medmap.cli import app, console
from medmap.cli.about import CURES
from medmap.cli.app import VERBS
from medmap.cli.doctor import _connected, _limits
from medmap.data.store import Store
from medmap.models.check import LAWS

HEAVY = ("torch", "monai", "lightning_fabric", "matplotlib")
PATIENT = "PHANTOM-00000-000"


def process(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "medmap", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


def imported_by(words: list[str], names: tuple[str, ...]) -> str:
    """Which of some modules a command that succeeds has imported."""
    code = (
        f"import sys\nsys.argv = {['medmap', *words]!r}\nfrom medmap.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('imported:', [name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(autouse=True)
def _plain_manner() -> Iterator[None]:
    yield
    console.begin()


@pytest.fixture
def image(tiny_phantoms: Path) -> Path:
    return tiny_phantoms / PATIENT / f"{PATIENT}-t2f.nii.gz"


# ---- the whole command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--help",), ("check", "--help"), ("doctor",), ("check", "DATA", "--deep")])
def test_nothing_heavy_is_imported_for_what_must_be_quick(words: tuple[str, ...], tiny_phantoms: Path) -> None:
    argv = [str(tiny_phantoms) if word == "DATA" else word for word in words]
    reads = () if "DATA" in words else ("nibabel", "scipy")
    assert imported_by(argv, HEAVY + reads) == "imported: []"


def test_a_prediction_waits_for_nothing_but_torch(tiny_run: Path, image: Path, tmp_path: Path) -> None:
    """What trains, spreads, draws or compiles takes seconds to import, and one patient needs none of it."""
    others = ("monai", "lightning_fabric", "matplotlib", "ray", "openvino", "torch._dynamo")
    argv = ["predict", "--model", str(tiny_run), "--t2f", str(image), "-o", str(tmp_path / "seg.nii.gz")]
    assert imported_by(argv, ("torch", *others)) == "imported: ['torch']"


def test_what_is_wrong_is_said_before_torch_is_imported(tiny_run: Path, tiny_store: Path, image: Path) -> None:
    wrong = [
        ["predict", "--model", tiny_run, "--t2f", "nowhere.nii.gz", "-o", "seg.nii.gz"],
        ["predict", "--model", tiny_run, "--image", f"adc={image}", "-o", "seg.nii.gz"],
        ["predict", "--model", tiny_run, "--t2f", image, "-o", "seg.nii.gz", "--labels", "brats2024"],
        ["predict", "--model", tiny_run, "--t2f", image, "-o", "/dev/null/seg.nii.gz"],
        ["train", "-d", tiny_store, "-o", "new", "--set", "train.stepz=3"],
        ["train", "-d", tiny_store, "-o", "new", "--set", "data.split=brats2018-list9"],
        ["train", "-d", tiny_store, "-o", "new", "--set", "data.modalities=[adc]"],
        ["evaluate", tiny_run, "--empty", "full"],
    ]
    code = (
        "import sys\nfrom medmap.cli import main\n"
        f"for words in {[[str(word) for word in words] for words in wrong]!r}:\n"
        "    sys.argv = ['medmap', *words]\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert end.code == 1, (words, end.code)\n"
        f"    assert not [name for name in {HEAVY!r} if name in sys.modules], words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(wrong)
    assert all(line.startswith("error: ") for line in lines)


def test_python_m_medmap_is_medmap(tmp_path: Path) -> None:
    assert process("--version").stdout == f"medmap {medmap.__version__}\n"
    wrong = process("check", tmp_path / "nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == f"error: {tmp_path / 'nowhere'}: no such folder; check the path\n"
    traced = process("check", tmp_path / "nowhere", "--debug")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr
    assert "medmap.errors.InputError" in traced.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_in_words(verb: str) -> None:
    text = works(verb, "--help")
    assert f"Usage: medmap {verb}" in text
    assert "Exit codes: 0 ok, 1 error, 2 usage, 3 some cases failed." in " ".join(text.split())


def test_usage_errors_have_their_own_exit_code(tiny_store: Path, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    assert "Did you mean 'predict'?" in fails("predit", code=2)
    assert "No such option: --t9" in fails("predict", "--model", tiny_run, "-o", "x", "--t9", "y", code=2)
    assert "name the images" in fails("predict", "--model", tiny_run, "-o", "x.nii.gz", code=2)
    both = ("predict", "--model", tiny_run, "-o", "x", "--t2f", image, "-i", tmp_path)
    assert "not both" in fails(*both, code=2)
    assert "expected NAME=FILE" in fails("predict", "--model", tiny_run, "-o", "x", "--image", "adc", code=2)
    assert "name the folder of the new run" in fails("train", "-d", tiny_store, code=2)
    assert "name the data" in fails("train", "-o", tmp_path / "new", code=2)
    assert "leave out --set" in fails("train", "--resume", tiny_run, "--set", "seed=1", code=2)
    assert "name a RUN, or both --pred" in fails("evaluate", code=2)
    assert "name two folders or more" in fails("compare", tiny_run, code=2)
    assert "expected a number or all" in fails("train", "-d", tiny_store, "-o", tmp_path / "n", "--fold", "x", code=2)


def boom(error: BaseException) -> Any:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("boom\nbang"),
            r"error: unexpected RuntimeError: boom bang; run again with --debug and report it",
        ),
        (RuntimeError("CUDA out of memory. Tried"), "error: not enough memory; take a smaller train.patch"),
        (ModuleNotFoundError("no", name="monai"), "error: monai is not installed; this part needs it: pip install"),
        (OSError(28, "No space left on device", "a/b"), "error: a/b: No space left on device; check the place"),
    ],
)
def test_no_traceback_reaches_a_user(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tiny_phantoms: Path
) -> None:
    monkeypatch.setattr("medmap.data.check.check", boom(error))
    result = call("check", tiny_phantoms)
    assert result.exit_code == 1
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1
    debugging = CliRunner().invoke(app, ["check", str(tiny_phantoms), "--debug"])
    assert debugging.exception is error


def test_an_interrupt_is_no_crash(monkeypatch: pytest.MonkeyPatch, tiny_phantoms: Path) -> None:
    monkeypatch.setattr("medmap.data.check.check", boom(KeyboardInterrupt()))
    assert fails("check", tiny_phantoms, code=130) == "error: interrupted"


# ---- progress ----------------------------------------------------------------------------------------------------


def test_plain_progress_tells_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 12.0, 13.0, 40.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("working") as tell:
        for done in (1, 2, 3, 10):
            tell(done, 10, f"case {done}")
    assert capsys.readouterr().err.splitlines() == ["working 2/10  eta 48 s  case 2", "working 10/10  40 s  case 10"]


def test_progress_is_a_bar_on_a_terminal_and_silent_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress("working") as tell:
        tell(4, 4, "[case]")
    drawn = capsys.readouterr().err
    assert "4/4" in drawn
    assert "[case]" in drawn
    console.begin(quiet=True)
    with console.progress("working") as tell:
        tell(4, 4, "case")
    assert capsys.readouterr().err == ""


def test_quiet_leaves_the_answer_and_verbose_adds_words(tiny_phantoms: Path, tmp_path: Path) -> None:
    quiet = call("-q", "prepare", tiny_phantoms, "-o", tmp_path / "a")
    assert [line.split()[0] for line in quiet.stdout.splitlines()] == [f"{tmp_path / 'a'}:", "store"]
    assert quiet.stderr == ""
    loud = call("prepare", tiny_phantoms, "-o", tmp_path / "b", "-v")
    said = [" ".join(line.split()[:2]) for line in loud.stderr.splitlines()]
    assert said == [f"{doing} {n}/3" for doing in ("checking", "preparing") for n in (1, 2, 3)]
    assert "next: medmap train" in loud.stdout


# ---- doctor, check, simulate, prepare ----------------------------------------------------------------------------


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDMAP_DATA", str(tmp_path / "nowhere"))
    found = answer("doctor")
    assert found["ok"] is True
    assert found["packages"]["nibabel"] == nib.__version__
    assert found["medmap_data"] == {"path": str(tmp_path / "nowhere"), "exists": False}
    assert set(found["extras"]["train"]) == {"monai", "lightning-fabric"}
    text = works("doctor")
    assert "nowhere: no such folder" in text
    assert text.splitlines()[-1].startswith("Ready (torch for ")


def test_doctor_knows_what_a_container_may_take_and_where_nobody_may_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _limits(tmp_path) == {"memory_gb": 2.0, "cores": 1.5}
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _limits(tmp_path) == _limits(tmp_path / "nowhere") == {}
    routes = tmp_path / "route"
    routes.write_text("Iface Destination Gateway\neth0 0000FEA9 0\n")
    assert _connected(routes) is False
    routes.write_text("Iface Destination Gateway\neth0 00000000 0101A8C0\n")
    assert _connected(routes) is True
    assert _connected(tmp_path / "nowhere") is None
    monkeypatch.setattr("os.access", lambda path, mode: False)
    closed = call("doctor")
    assert closed.exit_code == 1
    assert "may not be written to; work in another folder" in closed.stdout


def test_check_answers_for_people_and_programs(tiny_phantoms: Path, tmp_path: Path) -> None:
    assert "Ready: all 3 cases can be used." in works("check", tiny_phantoms)
    assert answer("check", tiny_phantoms)["labels"]["scheme"]["name"] == "brats2023"
    broken = shutil.copytree(tiny_phantoms, tmp_path / "data")
    (broken / PATIENT / f"{PATIENT}-t1c.nii.gz").write_bytes(b"nothing")
    result = call("check", broken)
    assert result.exit_code == 1
    assert "Not ready: 1 of 3 cases" in result.stdout
    assert "expected one of brats2021" in fails("check", tiny_phantoms, "--labels", "brats1999")


def test_simulate(tmp_path: Path) -> None:
    words = ("simulate", "-o", tmp_path / "p", "-n", 2, "--spacing", 4, "--modalities", "flair+t1ce", "--seed", 3)
    assert "would write 2 patients with t2f+t1c" in works(*words, "--dry-run")
    assert not (tmp_path / "p").exists()
    assert answer(*words)["ids"] == ["PHANTOM-00000-000", "PHANTOM-00001-000"]
    names = sorted(path.name.split("-")[-1] for path in (tmp_path / "p" / PATIENT).iterdir())
    assert names == ["seg.nii.gz", "t1c.nii.gz", "t2f.nii.gz"]
    one = ("simulate", "-o", tmp_path / "q", "-n", 1)
    assert "would write 1 patient with t1n+t1c+t2w+t2f at 2 mm, 80×96×80 voxels" in works(*one, "--dry-run")
    assert "modality pet: no signal equation" in fails(*one, "--modalities", "pet")
    assert "organ 'spleen': not simulated; expected one of brain" in fails(*one, "--organ", "spleen")
    assert "spacing: found 9" in fails(*one, "--spacing", 9)
    assert "--mode: found 'odd'" in fails(*one, "--mode", "odd")
    assert "randomised: found 1.5" in fails(*one, "--mode", 1.5)
    assert "noise: found -1" in fails(*one, "--noise", -1)
    assert "--shape: found '240,240'; expected three" in fails(*one, "--shape", "240,240")
    assert "shape: found (10, 10, 10) voxels of 2 mm, too small" in fails(*one, "--shape", "10x10x10")
    as_brats = works(*one, "--spacing", 1, "--shape", "240,240,155", "--dry-run")
    assert "at 1 mm, 240×240×155 voxels" in as_brats
    assert "Invalid value for '-n'" in fails("simulate", "-o", tmp_path / "q", "-n", 0, code=2)
    assert not (tmp_path / "q").exists()


def test_simulate_refuses_in_a_dry_run_what_a_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p" / "BraTS-GLI-00002-000").mkdir(parents=True)
    refused = "found BraTS-GLI-00002-000, and no phantoms.json; expected nothing, or phantoms"
    assert refused in fails("simulate", "-n", 1, "-o", tmp_path / "p")
    assert refused in fails("simulate", "-n", 1, "-o", tmp_path / "p", "--dry-run")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    assert "0.0 GB are free; make room" in fails("simulate", "-n", 9, "-o", tmp_path / "q", "--dry-run")


def test_simulate_in_the_layout_of_another_year(tmp_path: Path) -> None:
    words = ("simulate", "-o", tmp_path / "p", "-n", 1, "--spacing", 4, "--layout")
    assert "layout 'brats1999': not known; expected one of brats2023" in fails(*words, "brats1999")
    assert "layout brats2021: has no label for rc" in fails(*words, "brats2021", "--operated", 0.1, "--dry-run")
    assert "layout brats2021: has no name for adc" in fails(*words, "brats2021", "--modalities", "t1+adc")
    assert not (tmp_path / "p").exists()
    works(*words, "brats2021", "--modalities", "flair", "--mode", "randomised")
    assert sorted(path.name for path in (tmp_path / "p" / PATIENT).iterdir()) == [
        f"{PATIENT}_flair.nii.gz",
        f"{PATIENT}_seg.nii.gz",
    ]
    assert "Ready: the case can be used." in works("check", tmp_path / "p")
    found = answer("check", tmp_path / "p", "--deep")
    assert (found["labels"]["scheme"]["name"], found["notes"]) == ("brats2021", [])


def test_prepare(tiny_phantoms: Path, tiny_store: Path, tmp_path: Path) -> None:
    words = ("prepare", tiny_phantoms, "-o", tmp_path / "store")
    assert "would prepare" in works(*words, "--dry-run")
    assert not (tmp_path / "store").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("")
    foreign = ("prepare", tiny_phantoms, "-o", tmp_path / "other")
    assert fails(*foreign) == fails(*foreign, "--dry-run")
    assert "other: exists and is no store" in fails(*foreign, "--dry-run")
    assert f"store hash {Store(tiny_store).sha256}" in works(*words)
    again = answer(*words)
    assert (again["prepared"], len(again["unchanged"]), again["failed"]) == ([], 3, {})
    assert again["sha256"] == Store(tiny_store).sha256
    assert "was prepared with spacing_mm native, now 5.0" in fails(*words, "--spacing", 5)


def test_a_case_that_cannot_be_prepared_is_named_and_the_others_go_on(tiny_phantoms: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_phantoms, tmp_path / "data")
    cut = broken / PATIENT / f"{PATIENT}-t1c.nii.gz"
    cut.write_bytes(cut.read_bytes()[:3000])
    said = fails("prepare", broken, "-o", tmp_path / "store", code=3)
    assert f"warning: left out {PATIENT}: {cut.name}: cut off: fewer bytes than its header promises; copy" in said
    assert Store(tmp_path / "store").ids == ("PHANTOM-00001-000", "PHANTOM-00002-000")


def test_places_that_cannot_be_written(
    tiny_phantoms: Path, tiny_run: Path, tiny_store: Path, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "new"
    for words in (
        ("simulate", "-n", 1, "-o", place),
        ("prepare", tiny_phantoms, "-o", place),
        ("train", "-d", tiny_store, "-o", place),
        ("report", tiny_run, "-o", place / "report.html"),
        ("predict", "--model", tiny_run, "--t2f", image, "-o", place / "seg.nii.gz"),
        ("predict", "--model", tiny_run, "-i", tiny_phantoms, "-o", place),
    ):
        assert "file is a file); name a place you may write to with -o" in fails(*words)


def test_a_disk_without_room(
    tiny_phantoms: Path, tiny_run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    assert "0.0 GB are free; make room" in fails("simulate", "-n", 9, "-o", tmp_path / "p")
    assert "GB are free; make room" in fails("prepare", tiny_phantoms, "-o", tmp_path / "s")
    predict = ("predict", "--model", tiny_run, "--t2f", image, "-o", tmp_path / "seg.nii.gz")
    assert "MB are free; make room" in fails(*predict)


# ---- check-backbone, demo ----------------------------------------------------------------------------------------

LEAKING = '''
from torch import nn
from medmap.models.unet import UNet

class Leaking(UNet):
    """Looks at everything that is seen, kept or not."""
    def decode(self, encoded, kept):
        return super().decode(encoded, kept | True)

class Nothing(nn.Module):
    pass
'''


def test_check_backbone(tmp_path: Path) -> None:
    text = works("check-backbone", "unet", "--modalities", "t1c+t2f")
    assert text.splitlines()[-1].endswith("laws hold")
    own = tmp_path / "own.py"
    own.write_text(LEAKING)
    result = call("check-backbone", f"{own}:Leaking", "--modalities", "t1c+t2f")
    assert result.exit_code == 1
    assert "FAULT  leakage" in result.stdout
    found = json.loads(call("check-backbone", f"{own}:Nothing", "--modalities", "t2f", "--json").stdout)
    assert "lacks modalities, classes" in next(law["detail"] for law in found["laws"] if law["law"] == "members")
    assert "did you mean unet?" in fails("check-backbone", "unett")
    assert "has no size 'giant'" in fails("check-backbone", "unet", "--size", "giant")
    assert "holds no Missing; it holds Leaking, Nothing" in fails("check-backbone", f"{own}:Missing")
    assert "name the class or function too" in fails("check-backbone", own)
    own.write_text("1 / 0")
    assert "raised ZeroDivisionError while it was imported" in fails("check-backbone", f"{own}:Leaking")


OF_SOMEBODY = """
from dataclasses import dataclass
from torch import nn
from medmap import adapt
from medmap.models.unet import UNet
from beside import WIDTH

@dataclass
class Sizes:
    width: int = WIDTH

class Encoder(nn.Conv3d):
    def __init__(self):
        super().__init__(1, Sizes().width, 3, padding=1)

class Decoder(nn.Conv3d):
    def __init__(self, classes):
        super().__init__(WIDTH, classes, 1)
    def forward(self, maps):
        return super().forward(maps[0])

class Broken(Decoder):
    def forward(self, maps):
        return maps[1]

Mine = adapt(Encoder, Decoder, levels={"x1": 1})
Wrong = adapt(Encoder, Decoder, levels={"x1": 2})
Raising = adapt(Encoder, Broken, levels={"x1": 1})
ready = Encoder()

def two(modalities, classes):
    return Mine(modalities, classes)

class Leaking(UNet):
    def encode(self, images, seen):
        found = super().encode(images, seen)
        self.before = sum(z.mean() for z in found.levels["x1"].values())
        return found
    def decode(self, encoded, kept):
        found = super().decode(encoded, kept)
        return found._replace(logits=found.logits + self.before)
"""


@pytest.fixture
def of_somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    (tmp_path / "mynet.py").write_text(OF_SOMEBODY)
    return tmp_path / "mynet.py"


def told_of(network: Path, name: str) -> str:
    return call("check-backbone", f"{network}:{name}", "--modalities", "t1c+t2f").stdout


@pytest.mark.parametrize("name", ["Mine", "two"])
def test_check_backbone_of_an_adapted_network(of_somebody: Path, name: str) -> None:
    text = told_of(of_somebody, name)
    parameters = 2 * (27 + 1) * 4 + (4 + 1) * 4
    assert f"{parameters} parameters, 4 classes, 3 subsets; levels to align: x1 (stride 1)\n" in text
    assert text.endswith(f":{name}: all 12 laws hold\n")


def test_check_backbone_tells_an_error_once(of_somebody: Path) -> None:
    text = told_of(of_somebody, "Wrong")
    assert text.count("raised ConfigError: adapt: ") == 1
    assert "FAULT  saving         could not be tried: the error of shape" in text
    text = told_of(of_somebody, "Raising")
    line = OF_SOMEBODY.splitlines().index("        return maps[1]") + 1
    assert text.count(f"raised IndexError: list index out of range (mynet.py, line {line})") == 1


def test_check_backbone_says_law_finding_and_cure(of_somebody: Path) -> None:
    law, found, cure = told_of(of_somebody, "Leaking").partition("FAULT  leakage ")[2].splitlines()[:3]
    assert law.strip() == LAWS["leakage"][0]
    assert "found: kept t1c: logits with t2f removed and logits when t2f is seen but not kept differ" in found
    assert cure.strip() == f"to do: {CURES['leakage']}"
    assert set(CURES) == set(LAWS)


def test_check_backbone_of_what_builds_nothing(of_somebody: Path) -> None:
    network = f"{of_somebody}:ready"
    assert "found an object of type Encoder, expected a class or function" in fails("check-backbone", network)
    offered = "Sizes, Encoder, Decoder, Broken, Mine, Wrong, Raising, two, Leaking"
    assert f"holds no Nil; it holds {offered}" in fails("check-backbone", f"{of_somebody}:Nil")


def test_demo_hands_its_words_and_its_progress_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(out: Path, patients: int, *, on_line: Any, on_row: Any) -> None:
        on_line(f"{patients} patients into {out}")
        on_row({"kind": "train", "step": 5, "steps": 5, "loss": 0.25})

    monkeypatch.setattr("medmap.demo.run", short)
    result = call("demo", "-o", tmp_path / "demo", "--cases", 8)
    assert result.stdout == f"8 patients into {tmp_path / 'demo'}\n"
    assert result.stderr.startswith("training 5/5")
