"use strict";
// Connects NiiVue, which draws, with the controls of every .viewer in the page. An element's viewer is element.niivue.

const MEDMAP_AXES = [["L", "R"], ["P", "A"], ["I", "S"]];

function medmapColours(paints) {
  // one entry a code, 0 is clear: NiiVue wants a table without gaps
  const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
  for (let code = 1; code <= Math.max(0, ...paints.map((paint) => paint.code)); code++) {
    const paint = paints.find((one) => one.code === code);
    const hex = paint ? parseInt(paint.colour.slice(1), 16) : 0;
    table.R.push(hex >> 16);
    table.G.push((hex >> 8) & 255);
    table.B.push(hex & 255);
    table.A.push(paint ? 255 : 0);
    table.I.push(code);
    table.labels.push(paint ? paint.name : "");
  }
  return table;
}

async function medmapViewer(root) {
  const study = JSON.parse(root.querySelector("script").textContent);
  const all = (selector) => [...root.querySelectorAll(selector)];
  const one = (selector) => root.querySelector(selector);
  const { Niivue, NVImage, SHOW_RENDER, SLICE_TYPE } = niivue;
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("no WebGL 2");
  const nv = new Niivue({
    logLevel: "error",
    loadingText: "",
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    multiplanarShowRender: SHOW_RENDER.NEVER,
    scrollRequiresFocus: true, // the wheel scrolls the page until the pictures are clicked
    dragAndDropEnabled: false,
    viewModeHotKey: "", // keys would change what the buttons say
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
    fontColor: [1, 1, 1, 1],
    fontMinPx: 15,
    crosshairWidth: 0.5,
    crosshairGap: 8,
    crosshairColor: [1, 1, 1, 0.6],
  });
  root.niivue = nv;
  await nv.attachToCanvas(one("canvas"));

  const loaded = new Map(); // a sequence is unpacked when it is first asked for
  const image = async ({ name, nifti }) => {
    if (!loaded.has(name)) {
      const range = { cal_min: 0, cal_max: 255, trustCalMinMax: false };
      loaded.set(name, await NVImage.loadFromBase64({ base64: nifti, name: `${name}.nii.gz`, ...range }));
    }
    return loaded.get(name);
  };
  const painted = async (nifti) => {
    const made = await NVImage.loadFromBase64({ base64: nifti, name: "mask.nii.gz" });
    made.setColormapLabel(medmapColours(study.paints));
    return made;
  };
  let mask = await painted(study.mask);

  let asked = "";
  const choose = async (name) => {
    asked = name;
    const under = await image(study.images.find((entry) => entry.name === name));
    if (asked !== name) return; // another one was chosen while this one was unpacked
    nv.back = under;
    nv.overlays = [mask];
    nv.volumes = [under, mask];
    nv.updateGLVolume();
    press("image", name);
    root.dataset.image = name;
  };
  const press = (kind, value) => {
    for (const button of all(`button[data-${kind}]`)) {
      button.setAttribute("aria-pressed", String(button.dataset[kind] === value));
    }
  };
  const blend = () => {
    const on = one("[data-mask]").checked;
    const opacity = on ? one("[data-opacity]").value / 100 : 0;
    nv.opts.atlasOutline = Number(on); // rims have the full colour of the legend, however faint the rest
    nv.setOpacity(1, opacity);
    root.dataset.opacity = opacity;
  };
  const voxel = () => [...nv.frac2vox(nv.scene.crosshairPos)].map(Math.round);
  const go = (place) => {
    nv.scene.crosshairPos = nv.vox2frac(place);
    nv.drawScene();
    nv.createOnLocationChange();
  };
  const views = {
    all: SLICE_TYPE.MULTIPLANAR,
    axial: SLICE_TYPE.AXIAL,
    coronal: SLICE_TYPE.CORONAL,
    sagittal: SLICE_TYPE.SAGITTAL,
  };

  nv.onLocationChange = (place) => {
    const here = voxel();
    for (const slider of all("[data-axis]")) slider.value = here[slider.dataset.axis];
    const mm = MEDMAP_AXES.map((ends, axis) => `${ends[Number(place.mm[axis] >= 0)]} ${Math.abs(Math.round(place.mm[axis]))}`);
    const [x, y, z] = here;
    const paint = study.paints.find((entry) => entry.code === mask.getValue(x, y, z));
    one("output").textContent = `${mm.join(", ")} mm: ${paint ? `${paint.code} ${paint.name}` : "outside the mask"}`;
    root.dataset.voxel = here.join(" ");
  };
  for (const button of all("button[data-image]")) button.addEventListener("click", () => choose(button.dataset.image));
  for (const button of all("button[data-view]")) {
    button.addEventListener("click", () => {
      nv.setSliceType(views[button.dataset.view]);
      press("view", button.dataset.view);
      root.dataset.view = button.dataset.view;
    });
  }
  for (const slider of all("[data-axis]")) {
    slider.addEventListener("input", () => {
      const place = voxel();
      place[slider.dataset.axis] = Number(slider.value);
      go(place);
    });
  }
  one("[data-mask]").addEventListener("change", blend);
  one("[data-opacity]").addEventListener("input", blend);

  root.showMask = async (nifti) => { // another mask on the same voxels
    mask = await painted(nifti);
    await choose(asked);
    blend();
    nv.createOnLocationChange();
  };

  nv.setSliceType(views.all);
  await choose(study.images[0].name);
  blend();
  go(study.focus);
  for (const control of all("button, input")) control.disabled = false;
  root.dataset.state = "ready";
}

for (const root of document.querySelectorAll(".viewer")) {
  medmapViewer(root).catch((error) => {
    root.dataset.state = "failed";
    root.querySelector(".status").textContent =
      `The viewer cannot start here: ${error.message || error}. It needs a browser with WebGL 2 and graphics switched on.`;
  });
}
