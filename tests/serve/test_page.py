"""The local page in a real browser: images in, a switch, the mask taken away is that of the terminal."""

from __future__ import annotations

import os
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from browser import Browser, chromium
from made_up_page import served
from typer.testing import CliRunner

from medmap.cli import app as cli
from medmap.cli import console

PATIENT = "PHANTOM-00000-000"
SEQUENCES = ("t1n", "t1c", "t2w", "t2f")
STATE = "document.body.dataset.state"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its temporary files."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(tiny_run: Path, folder: Path) -> Iterator[str]:
    chromium()
    options = ("--model", str(tiny_run), "--device", "cpu", "--precision", "fp32", "--limit-mb", "20")
    with served(folder, *options) as (_, address):
        yield address


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture(params=[(1280, False), (390, True)], ids=["wide", "narrow and dark"])
def browser(request: pytest.FixtureRequest, address: str, downloads: Path, tmp_path: Path) -> Iterator[Browser]:
    width, dark = request.param
    with Browser(tmp_path / "profile", width, 900, dark) as opened:
        opened.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        opened.call("Page.navigate", url=address)
        opened.wait("document.body && 'started' in document.body.dataset")
        yield opened


def give(browser: Browser, *files: Path) -> None:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#pick")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])
    browser.wait(f"!['empty', 'checking'].includes({STATE})")


def key(browser: Browser, name: str, code: int, text: str = "") -> None:
    said = {"key": name, "code": name, "windowsVirtualKeyCode": code}
    browser.call("Input.dispatchKeyEvent", type="keyDown", **said, **({"text": text} if text else {}))
    browser.call("Input.dispatchKeyEvent", type="keyUp", **said)


def downloaded(browser: Browser, file: Path) -> None:
    """Wait until the browser has left a file; asked, it goes on with what it does."""
    end = time.monotonic() + 60
    while not file.is_file():
        assert time.monotonic() < end, browser.ask("document.body.innerText")
        browser.ask("1")
        time.sleep(0.1)


def until(browser: Browser, state: str) -> None:
    browser.wait(f"['{state}', 'failed'].includes({STATE})")
    assert browser.ask(STATE) == state, browser.ask("document.body.innerText")


def test_upload_switch_and_take_away(
    browser: Browser, files: dict[str, Path], downloads: Path, tiny_run: Path, tmp_path: Path
) -> None:
    give(browser, *files.values())
    assert browser.ask(STATE) == "ready", browser.ask("document.body.innerText")
    chosen = "[...document.querySelectorAll('#volumes select')].map((one) => one.value)"
    assert browser.ask(chosen) == list(SEQUENCES)

    browser.ask("document.getElementById('segment').focus()")
    key(browser, "Enter", 13, "\r")
    until(browser, "result")
    viewer = "document.querySelector('.viewer')"
    browser.wait(f"{viewer}.dataset.state === 'ready'")
    place = browser.ask(f"{viewer}.dataset.voxel")
    full = browser.ask("document.querySelector('#regions b').textContent")

    browser.ask("document.querySelector('#switches input[value=t1c]').focus()")
    before = browser.ask("document.getElementById('viewer').getBoundingClientRect().top + scrollY")
    key(browser, " ", 32, " ")
    until(browser, "result")
    assert "without T1c" in browser.ask("document.getElementById('progress').innerText")
    assert browser.ask("document.querySelector('#regions b').textContent") != full
    assert browser.ask(f"{viewer}.dataset.voxel") == place
    assert browser.ask("document.getElementById('viewer').getBoundingClientRect().top + scrollY") == before
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")

    browser.ask("document.querySelector('[data-made=mask]').click()")
    mask = downloads / f"{PATIENT}-t1n-t2w-t2f.nii.gz"
    downloaded(browser, mask)
    named = [word for name in ("t1n", "t2w", "t2f") for word in (f"--{name}", str(files[name]))]
    argv = ["predict", "--model", str(tiny_run), *named, "--device", "cpu", "--precision", "fp32"]
    answer = CliRunner().invoke(cli, [*argv, "-o", str(tmp_path / "seg.nii.gz")])
    console.begin()
    assert answer.exit_code == 0, answer.output
    assert mask.read_bytes() == (tmp_path / "seg.nii.gz").read_bytes()

    assert browser.problems == []
    here = browser.requests[0].split("?")[0]
    assert [url for url in browser.requests if not url.startswith((here, "data:", "blob:"))] == []


def test_what_is_refused_is_said_and_can_be_mended(browser: Browser, files: dict[str, Path], tmp_path: Path) -> None:
    wrong = tmp_path / "notes_t1c.nii.gz"
    wrong.write_bytes(b"no image")
    give(browser, wrong)
    assert browser.ask(STATE) == "refused"
    assert "notes_t1c.nii.gz: neither NIfTI nor a zip file" in browser.ask("document.getElementById('said').innerText")
    assert browser.ask("document.getElementById('segment').disabled")
    twin = tmp_path / "twin_t2f.nii.gz"
    twin.write_bytes(files["t2w"].read_bytes())
    give(browser, files["t2f"], twin)
    assert "t2f is named twice" in browser.ask("document.getElementById('said').innerText")
    second = "document.querySelectorAll('#volumes select')[1]"
    browser.ask(f"{second}.value = ''; {second}.dispatchEvent(new Event('change'))")
    until(browser, "ready")
    large = tmp_path / "large.nii"
    large.write_bytes(bytes(21_000_000))
    browser.ask("document.getElementById('anew').click()")
    assert browser.ask(STATE) == "empty"
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#pick")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(large)])
    browser.wait("document.getElementById('said').innerText.includes('at most 20 MB')")


def test_files_are_dropped_and_go_when_the_page_is_left(browser: Browser, files: dict[str, Path], folder: Path) -> None:
    content = b64encode(files["t2f"].read_bytes()).decode()
    browser.ask(
        "(async () => { const data = new DataTransfer(); "
        f"const bytes = await (await fetch('data:application/gzip;base64,{content}')).blob(); "
        "data.items.add(new File([bytes], 'ann_flair.nii.gz')); "
        "window.dispatchEvent(new DragEvent('drop', { dataTransfer: data, cancelable: true })); })()"
    )
    until(browser, "ready")
    assert "FLAIR of ann" in browser.ask("document.getElementById('said').innerText")
    assert [file.name for file in folder.rglob("*flair*")] == ["ann_flair.nii.gz"]
    browser.call("Page.navigate", url="about:blank")
    end = time.monotonic() + 60
    # unlike rglob, walk does not mind folders that go while it looks
    while any("flair" in name for _, _, names in os.walk(folder) for name in names):
        assert time.monotonic() < end, "the patient is still there"
        time.sleep(0.1)


SAID = "document.getElementById('said').innerText"


def test_what_is_shown_ticked_and_taken_away_is_one_mask(
    browser: Browser, files: dict[str, Path], downloads: Path
) -> None:
    give(browser, *files.values())
    browser.ask(
        "window.whole = fetch; window.failing = () => { window.fetch = (place, how) => place.endsWith('/segment')"
        ' ? Promise.resolve(new Response(\'{"error": "no room"}\', { status: 400 })) : whole(place, how); }'
    )
    browser.ask("failing(); document.getElementById('segment').click()")
    browser.wait(f"{STATE} === 'failed'")
    assert "Checked" in browser.ask(SAID)
    assert "no room" in browser.ask(SAID)
    browser.ask("window.fetch = whole; document.getElementById('segment').click()")
    until(browser, "result")
    assert "Checked" in browser.ask(SAID)
    assert "no room" not in browser.ask(SAID)

    browser.ask("failing(); document.querySelector('#switches input[value=t1c]').click()")
    browser.wait(f"{STATE} === 'failed'")
    assert "no room" in browser.ask("document.getElementById('progress').innerText")
    assert browser.ask("subset()") == list(SEQUENCES)
    browser.ask("window.fetch = whole; document.querySelector('[data-made=json]').click()")
    downloaded(browser, downloads / f"{PATIENT}-t1n-t1c-t2w-t2f.medmap.json")


def test_beginning_anew_while_images_come_in_leaves_no_trace_of_them(browser: Browser, files: dict[str, Path]) -> None:
    browser.ask(
        "window.whole = window.fetch; window.fetch = (place, how) => place.includes('/files')"
        " ? new Promise((go) => { window.release = () => go(whole(place, how)); }) : whole(place, how);"
    )
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#pick")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(files["t2f"])])
    browser.wait("'release' in window")
    browser.ask("document.getElementById('anew').click(); window.fetch = whole; release()")
    browser.ask("new Promise((done) => setTimeout(done, 500))")
    assert (browser.ask(STATE), browser.ask(SAID)) == ("empty", "No image yet.")
    give(browser, files["t1c"])
    assert browser.ask(STATE) == "ready"
    assert browser.ask("document.querySelectorAll('#volumes tbody tr').length") == 1
    assert browser.ask("page.bytes") == files["t1c"].stat().st_size


def test_the_page_says_how_long_without_reading_it_out_and_its_links_keep_the_patient(browser: Browser) -> None:
    heard = "[...document.querySelectorAll('#said > :not([aria-hidden])')].map((one) => one.textContent).join('')"
    browser.ask("tellFiles('Segmenting …', 7)")
    assert "7 s" in browser.ask(SAID)
    assert browser.ask(heard) == "Segmenting …"
    assert browser.ask("[...document.links].every((one) => one.target === '_blank' && one.rel === 'noopener')")


CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  const light = (rgb) => [.2126, .7152, .0722].reduce((sum, share, i) => sum + share * linear(rgb[i] / 255), 0);
  const under = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("main *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.offsetParent || node.closest(".stage") || node.disabled) continue;
    const [a, b] = [parse(getComputedStyle(node).color), under(node)].map(light).sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push(`${node.tagName} ${node.textContent.slice(0, 40)} ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""


def test_everything_can_be_read_and_has_a_name(browser: Browser, files: dict[str, Path]) -> None:
    give(browser, *files.values())
    browser.ask("document.getElementById('segment').click()")
    until(browser, "result")
    assert browser.ask(CONTRAST) == []
    nameless = (
        "[...document.querySelectorAll('main button, main input, main select, main canvas')].filter((one) => "
        "!(one.innerText || one.ariaLabel || (one.labels && one.labels.length && one.labels[0].innerText)))"
        ".map((one) => one.outerHTML)"
    )
    assert browser.ask(nameless) == []
    small = (
        "[...document.querySelectorAll('main button, main select, main .switches label')].filter((one) => "
        "one.offsetParent && one.getBoundingClientRect().height < 44).map((one) => one.outerHTML)"
    )
    assert browser.ask(small) == []
