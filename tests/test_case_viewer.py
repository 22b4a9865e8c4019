"""The page of a mask in a real browser. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, chromium
from made_up_mask import make_mask, opened, study_in

from medmap.core.labels import SCHEMES
from medmap.data.nifti import read_labels
from medmap.report.case import case_report

PATIENT = "PHANTOM-00000-000"
SEQUENCES = ("t2f", "t1c", "t2w", "t1n")


@pytest.fixture(scope="module")
def page_file(tiny_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chromium()
    images = {name: tiny_phantoms / PATIENT / f"{PATIENT}-{name}.nii.gz" for name in SEQUENCES}
    truth = SCHEMES["brats2023"].encode(read_labels(tiny_phantoms / PATIENT / f"{PATIENT}-seg.nii.gz")[0])
    return case_report(make_mask(tmp_path_factory.mktemp("case") / "seg.nii.gz", images, truth))


@pytest.fixture(scope="module")
def page(page_file: Path) -> str:
    return page_file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(page_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(page_file)
        opened.wait("document.querySelector('.viewer')?.dataset.state === 'ready'")
        yield opened


VIEWER = "document.querySelector('.viewer')"


def press(browser: Browser, selector: str) -> None:
    browser.ask(f"{VIEWER}.querySelector('{selector}').click()")


def shown(browser: Browser) -> list[str]:
    return list(browser.ask(f"{VIEWER}.niivue.volumes.map((volume) => volume.name)"))


def test_viewer_has_the_volumes(browser: Browser, page: str) -> None:
    assert shown(browser) == ["t2f.nii.gz", "mask.nii.gz"]
    shape = study_in(page)["shape"]
    assert browser.ask(f"{VIEWER}.niivue.volumes.map((volume) => volume.dimsRAS.slice(1))") == [shape, shape]
    focus = " ".join(map(str, study_in(page)["focus"]))
    assert browser.ask(f"{VIEWER}.dataset.voxel") == focus
    assert browser.problems == []


def test_viewer_asks_nothing_of_a_network(browser: Browser) -> None:
    press(browser, "[data-image=t1n]")
    browser.wait(f"{VIEWER}.dataset.image === 't1n'")
    assert [url for url in browser.requests if not url.startswith(("data:", "blob:"))] == browser.requests[:1]
    assert browser.requests[0].startswith("file://")


@pytest.mark.parametrize("name", ["t1c", "t2w", "t1n", "t2f"])
def test_sequences_are_switched(browser: Browser, name: str) -> None:
    before = browser.ask(f"{VIEWER}.dataset.voxel")
    press(browser, f"[data-image={name}]")
    browser.wait(f"{VIEWER}.dataset.image === '{name}'")
    assert shown(browser) == [f"{name}.nii.gz", "mask.nii.gz"]
    pressed = f"[...{VIEWER}.querySelectorAll('[data-image]')].filter((b) => b.ariaPressed === 'true')"
    assert browser.ask(f"{pressed}.map((b) => b.dataset.image)") == [name]
    assert browser.ask(f"{VIEWER}.dataset.voxel") == before
    assert browser.problems == []


def test_the_mask_fades_and_goes(browser: Browser) -> None:
    def opacity() -> float:
        return float(browser.ask(f"{VIEWER}.niivue.volumes[1].opacity"))

    slide(browser, "[data-opacity]", 80)
    assert opacity() == 0.8
    press(browser, "[data-mask]")
    assert opacity() == 0
    press(browser, "[data-mask]")
    assert opacity() == 0.8


def slide(browser: Browser, selector: str, value: int) -> None:
    find = f"{VIEWER}.querySelector('{selector}')"
    browser.ask(f"(() => {{ const s = {find}; s.value = {value}; s.dispatchEvent(new Event('input')); }})()")


def test_sliders_and_keys_move_through_the_slices(browser: Browser, page: str) -> None:
    start = study_in(page)["focus"]
    for axis in (0, 1, 2):
        slide(browser, f'[data-axis="{axis}"]', start[axis])
    slide(browser, '[data-axis="2"]', start[2] + 3)
    assert browser.ask(f"{VIEWER}.dataset.voxel") == f"{start[0]} {start[1]} {start[2] + 3}"
    browser.ask(f"{VIEWER}.querySelector('[data-axis=\"2\"]').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
    assert browser.ask(f"{VIEWER}.dataset.voxel") == f"{start[0]} {start[1]} {start[2] + 2}"
    codes = np.asarray(opened(study_in(page)["mask"]).dataobj)
    names = {paint["code"]: f"{paint['code']} {paint['name']}" for paint in study_in(page)["paints"]}
    here = names.get(int(codes[start[0], start[1], start[2] + 2]), "outside the mask")
    assert browser.ask(f"{VIEWER}.querySelector('output').textContent").endswith(f" mm: {here}")


def test_planes_are_chosen(browser: Browser) -> None:
    for view, kind in (("axial", 0), ("coronal", 1), ("sagittal", 2), ("all", 3)):
        press(browser, f"[data-view={view}]")
        assert browser.ask(f"{VIEWER}.niivue.opts.sliceType") == kind


def test_the_canvas_shows_brain_and_colours(browser: Browser) -> None:
    def colours() -> int:
        draw = (
            f"(() => {{ const nv = {VIEWER}.niivue; nv.drawScene(); const gl = nv.gl, w = gl.drawingBufferWidth, "
            "h = gl.drawingBufferHeight; const p = new Uint8Array(4 * w * h); "
            "gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, p); let n = 0; "
            "for (let i = 0; i < p.length; i += 4) "
            "n += Math.max(p[i], p[i + 1], p[i + 2]) - Math.min(p[i], p[i + 1], p[i + 2]) > 40; return n; })()"
        )
        return int(browser.ask(draw))

    assert browser.ask(f"{VIEWER}.querySelector('[data-mask]').checked")
    assert colours() > 100
    press(browser, "[data-mask]")
    assert colours() == 0
    press(browser, "[data-mask]")


def test_every_control_has_a_name(browser: Browser) -> None:
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in nodes if n.get("role", {}).get("value") in ("button", "slider", "checkbox")]
    assert len(controls) == len(SEQUENCES) + 4 + 1 + 1 + 3
    assert all(node["name"]["value"].strip() for node in controls)


CONTRAST = """(() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  const found = [];
  while (walk.nextNode()) { const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.checkVisibility() || e.closest(".frame, script, noscript")) continue;
    const [a, b] = [numbers(getComputedStyle(e).color), behind(e)].map((c) => light(c.slice(0, 3)));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.textContent.trim().slice(0, 40)]); }
  return found.sort((p, q) => p[0] - q[0]); })()"""


SHIFT = """new Promise((done) => {
  new PerformanceObserver((list) => done(list.getEntries().reduce((sum, entry) => sum + entry.value, 0)))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(0), 500); })"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_page_is_readable(page_file: Path, tmp_path: Path, width: int, dark: bool) -> None:
    with Browser(tmp_path, width, 844, dark) as browser:
        browser.open(page_file)
        browser.wait("document.querySelector('.viewer')?.dataset.state === 'ready'")
        assert browser.ask("document.documentElement.scrollWidth") <= width
        found = browser.ask(CONTRAST)
        assert len(found) > 60
        assert found[0][0] >= 4.5, found[0]
        assert browser.ask(SHIFT) < 0.01
        dimmed = browser.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dimmed == dark


def test_without_webgl_the_page_says_so_and_the_pictures_stay(page_file: Path, tmp_path: Path) -> None:
    with Browser(tmp_path, 1280, 900, False, "--disable-3d-apis") as browser:
        browser.open(page_file)
        browser.wait("document.querySelector('.viewer')?.dataset.state === 'failed'")
        assert "It needs a browser with WebGL 2" in browser.ask("document.querySelector('.status').textContent")
        assert browser.ask("[...document.images].map((image) => image.naturalWidth > 20)") == [True] * 6
        assert browser.ask("[...document.querySelectorAll('.viewer button')].every((button) => button.disabled)")


def test_without_javascript_the_pictures_stay(page_file: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(page_file)
        browser.wait("document.readyState === 'complete' && document.images.length === 6")
        assert browser.ask("[...document.images].every((image) => image.naturalWidth > 20)")
        assert "The viewer needs JavaScript" in browser.ask("document.body.innerText")
