"use strict";
// The page's state is body[data-state]: empty, checking, ready, refused, working, result, failed.

const $ = (id) => document.getElementById(id);
// shown: the sequences of the mask that is on the page; checked: what was said of the images
const page = { patient: "", model: null, sequences: [], shown: [], checked: [], frame: 0, turn: 0, limit: 0, bytes: 0 };

function put(parent, tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

async function ask(path, body) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, body === undefined ? {} : post).catch(() => {
    throw new Error("medmap serve has ended, or does not answer; start it again");
  });
  const found = await said(answer);
  if (!answer.ok) throw new Error(found.error || `the server answered ${answer.status}`);
  return found;
}

async function said(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text);
  } catch {
    return { error: text };
  }
}

// A job's result; null where a later one has taken its place, or its patient is gone.
async function job(path, body, tell) {
  const turn = ++page.turn;
  try {
    return await done(turn, page.patient, path, body, tell);
  } catch (error) {
    if (turn === page.turn) throw error;
    return null;
  }
}

async function done(turn, patient, path, body, tell) {
  const began = Date.now();
  const { job: number } = await ask(`/patients/${patient}/${path}`, body);
  for (;;) {
    const now = await ask(`/patients/${patient}/jobs/${number}`);
    if (turn !== page.turn || now.state === "gone") return null;
    if (now.state === "done") return now.result;
    if (now.state === "failed") throw new Error(now.text);
    const others = now.before === 1 ? "1 other is" : `${now.before} others are`;
    const seconds = Math.round((Date.now() - began) / 1000);
    tell(now.state === "waiting" && now.before ? `Waiting: ${others} before you` : `${now.text || "Beginning"} …`, seconds);
    await new Promise((go) => setTimeout(go, 120));
  }
}

function state(name) {
  document.body.dataset.state = name;
  const busy = name === "checking" || name === "working";
  $("segment").disabled = !["ready", "result", "failed"].includes(name) || !page.sequences.length;
  $("anew").disabled = name === "empty";
  for (const one of document.querySelectorAll("#made button")) one.disabled = busy;
  for (const one of document.querySelectorAll("#volumes select")) one.disabled = name === "checking";
}

function tellIn(box, text, seconds) {
  if (!box.querySelector("progress")) {
    box.replaceChildren();
    put(box, "span", "");
    put(box, "span", "", { "aria-hidden": "true" }); // the box is read out whenever what can be heard of it changes
    put(box, "progress", "", { "aria-label": "working" });
  }
  const [words, clock] = box.querySelectorAll("span");
  if (words.textContent !== text) words.textContent = text;
  clock.textContent = seconds > 2 ? ` ${seconds} s ` : " ";
}

const tellFiles = (text, seconds = 0) => tellIn($("said"), text, seconds);

function bad(box, text) {
  box.replaceChildren();
  put(box, "p", text, { class: "bad" });
}

// ---- images ------------------------------------------------------------------------------------------------------

async function take(files) {
  if (!files.length || document.body.dataset.state === "checking") return;
  const size = files.reduce((sum, file) => sum + file.size, page.bytes);
  if (size > page.limit * 1e6) {
    return bad($("said"), `${Math.ceil(size / 1e6)} MB for one patient, at most ${page.limit} MB are taken; drop fewer files, or begin anew with medmap serve --limit-mb`);
  }
  page.sequences = [];
  state("checking");
  $("result").hidden = true;
  const refused = [];
  const turn = ++page.turn;
  try {
    const patient = page.patient || (await ask("/patients", {})).patient;
    if (turn !== page.turn) return forget(patient);
    page.patient = patient;
    for (const [number, file] of files.entries()) {
      tellFiles(`Taking in ${file.name} (${number + 1} of ${files.length}) …`);
      const answer = await fetch(`/patients/${patient}/files?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
      const words = answer.ok ? "" : (await said(answer)).error;
      if (turn !== page.turn) return; // begun anew: these files are nobody's
      if (words) refused.push(words);
    }
  } catch (error) {
    if (turn !== page.turn) return;
    refused.push(error.message);
  }
  await check(null, refused);
}

async function check(named, refused = []) {
  state("checking");
  $("result").hidden = true;
  Object.assign(page, { shown: [], frame: 0 });
  $("viewer").replaceChildren();
  try {
    const found = await job("check", { named }, tellFiles);
    if (found) checked(found, refused);
  } catch (error) {
    page.sequences = [];
    bad($("said"), [...refused, error.message].join(" — "));
    state("refused");
  }
}

function checked(found, refused) {
  page.bytes = found.held_bytes;
  rows(found);
  const box = $("said");
  const stop = [...refused, ...(found.volumes.length || !refused.length ? [found.refused] : [])].filter(Boolean);
  box.replaceChildren();
  for (const text of stop) put(box, "p", text, { class: "bad" });
  for (const text of found.warnings) put(box, "p", text, { class: "odd" });
  page.sequences = found.refused ? [] : found.sequences;
  if (!found.refused) {
    const missing = page.model.sequences.filter((one) => !page.sequences.includes(one.name)).map((one) => one.label);
    const lacks = missing.length ? `, ${missing.join(" and ")} missing: that is allowed` : "";
    const odd = found.warnings.length ? "Checked, with the above" : "Checked, nothing odd";
    put(box, "p", `${odd}: ${page.sequences.map(labelOf).join(", ")} of ${found.case}${lacks}.`);
    document.querySelector("[data-made=seg]").hidden = !found.dicom;
  }
  page.checked = [...box.childNodes];
  state(found.refused ? "refused" : "ready");
}

const labelOf = (name) => page.model.sequences.find((one) => one.name === name).label;

function rows(found) {
  const body = $("volumes").tBodies[0];
  const focused = document.activeElement.dataset ? document.activeElement.dataset.key : "";
  body.replaceChildren();
  for (const volume of found.volumes) {
    const row = put(body, "tr", "");
    const name = put(row, "td", volume.name);
    if (volume.why) put(name, "small", volume.why);
    put(row, "td", volume.about);
    const select = put(put(row, "td", ""), "select", "", { "aria-label": `Sequence of ${volume.name}`, "data-key": volume.key });
    put(select, "option", "leave out", { value: "" });
    for (const one of page.model.sequences) put(select, "option", one.label, { value: one.name });
    select.value = found.chosen[volume.key] || "";
    select.disabled = !volume.usable;
    select.addEventListener("change", () => check(chosen()));
    if (focused === volume.key) select.focus();
  }
  $("volumes").hidden = !found.volumes.length;
}

const chosen = () => Object.fromEntries(
  [...document.querySelectorAll("#volumes select")].filter((one) => one.value).map((one) => [one.dataset.key, one.value]));

const forget = (patient) => ask(`/patients/${patient}/forget`, {}).catch(() => {});

function anew() {
  if (page.patient) forget(page.patient);
  Object.assign(page, { patient: "", sequences: [], shown: [], frame: 0, turn: page.turn + 1, bytes: 0 });
  $("volumes").hidden = $("result").hidden = true;
  $("volumes").tBodies[0].replaceChildren();
  $("viewer").replaceChildren();
  $("said").replaceChildren();
  $("pick").value = "";
  put($("said"), "p", "No image yet.");
  state("empty");
  $("pick").focus();
}

// ---- mask --------------------------------------------------------------------------------------------------------

function begin() {
  const box = $("switches");
  box.querySelectorAll("label").forEach((one) => one.remove());
  for (const name of page.sequences) {
    const made = put(box, "label", "");
    const tick = put(made, "input", "", { type: "checkbox", value: name, checked: "" });
    tick.addEventListener("change", () => switched(tick));
    made.append(labelOf(name));
  }
  segment($("said"));
}

const ticks = () => [...document.querySelectorAll("#switches input")];
const subset = () => ticks().filter((one) => one.checked).map((one) => one.value);

function switched(tick) {
  if (subset().length) return segment($("progress"));
  tick.checked = true;
  bad($("progress"), "One sequence is needed at least; switch another one on first.");
}

async function segment(box) {
  const first = box === $("said");
  state("working");
  try {
    const found = await job("segment", { subset: subset(), frame: page.frame }, (text, seconds) => tellIn(box, text, seconds));
    if (!found) return;
    if (first) box.replaceChildren(...page.checked);
    $("result").hidden = false;
    show(found);
    await picture(found);
    state("result");
    if (first) $("result").scrollIntoView({ block: "start" });
  } catch (error) {
    bad(box, error.message);
    if (first) box.prepend(...page.checked);
    if (page.shown.length) for (const tick of ticks()) tick.checked = page.shown.includes(tick.value);
    state("failed");
  }
}

function show(found) {
  page.shown = found.subset;
  const body = $("regions").tBodies[0];
  body.replaceChildren();
  for (const region of found.regions) {
    const row = put(body, "tr", "");
    const head = put(row, "th", region.name, { scope: "row" });
    if (region.meaning) put(head, "small", region.meaning);
    const volume = put(row, "td", "");
    put(volume, "b", region.ml.toFixed(1));
    put(volume, "small", "ml");
    trusted(put(row, "td", ""), region);
    expected(put(row, "td", ""), region);
  }
  $("trusted").textContent = found.trust
    ? `This mask: its light, and its Dice in % as predicted without any truth, with the interval that held ${found.trust.of_ten} of 10 masks of ${found.trust.patients} patients. Green: all of it is at 70 or above; amber: its lower end is not; red: the number is below 70.`
    : "";
  $("measured").textContent = found.expected.length
    ? `Expected: Dice in %, mean [95 % interval] of ${found.expected[0].replace(/^expect, from [^,]*, Dice in % as on /, "").replace(/:$/, "")}.`
    : "Nobody has measured what to expect of this model from these sequences (medmap evaluate).";
  $("warnings").replaceChildren();
  for (const text of found.warnings) put($("warnings"), "p", text, { class: "caveat" });
  for (const text of found.trust ? found.trust.broken : []) put($("warnings"), "p", `Known to fail: ${text}.`, { class: "caveat" });
  $("progress").replaceChildren();
  const off = page.sequences.filter((name) => !found.subset.includes(name)).map(labelOf);
  put($("progress"), "span", `From ${found.subset.map(labelOf).join(", ")}${off.length ? `, without ${off.join(", ")}` : ""}; computed in ${found.seconds.toFixed(1)} s.`);
}

function trusted(cell, { trust: row, predicted: [dice, low, high] }) {
  if (!row) return put(cell, "small", "not measured");
  if (row.why) return put(cell, "small", row.why, { class: "why" });
  put(cell, "b", dice);
  put(cell, "small", `[${low}, ${high}]`);
  return put(put(cell, "small", ""), "span", row.light, { class: `light ${row.light}` });
}

function expected(cell, region) {
  if (!region.expected.length) return put(cell, "small", "not measured");
  const [mean, low, high] = region.expected;
  put(cell, "b", mean);
  put(cell, "small", `[${low}, ${high}]`);
  // It has its place also where it need not be said, so that nothing moves when a sequence is switched.
  const poor = put(cell, "small", `do not use ${region.name} for volumetry`, { class: "poor" });
  poor.style.visibility = region.good ? "hidden" : "visible";
  return cell;
}

async function picture(found) {
  if (found.mask) {
    const root = document.querySelector(".viewer");
    if (root.showMask) await root.showMask(found.mask);
    return;
  }
  const inert = document.createElement("template");
  // The page's policy lets a script paint, and no style in what was sent.
  inert.innerHTML = found.viewer.replaceAll(' style="background:', ' data-colour="');
  $("viewer").replaceChildren(inert.content);
  for (const one of document.querySelectorAll("[data-colour]")) one.style.background = one.dataset.colour;
  const root = document.querySelector(".viewer");
  page.frame = found.frame;
  await medmapViewer(root).catch((error) => {
    root.dataset.state = "failed";
    root.querySelector(".status").textContent = `The viewer cannot start here: ${error.message || error}. It needs a browser with WebGL 2 and graphics switched on. The mask can be taken away all the same.`;
  });
}

async function carry(what) {
  const box = $("progress");
  const before = [...box.childNodes];
  const { patient } = page;
  state("working");
  tellIn(box, "Making the file …", 0);
  try {
    const answer = await fetch(`/patients/${patient}/made/${page.shown.join("+")}/${what}`);
    if (patient !== page.patient) return;
    if (!answer.ok) throw new Error((await said(answer)).error);
    const name = /filename\*=utf-8''([^;]+)/i.exec(answer.headers.get("Content-Disposition"));
    const plain = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition"));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = name ? decodeURIComponent(name[1]) : plain[1];
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    box.replaceChildren(...before);
  } catch (error) {
    if (patient !== page.patient) return;
    bad(box, error.message);
  }
  state("result");
}

// ---- begin -------------------------------------------------------------------------------------------------------

async function start() {
  page.model = await ask("/model");
  page.limit = page.model.limit_mb;
  $("version").textContent = page.model.version;
  $("about").textContent = page.model.about && `Model: ${page.model.about}.`;
  $("about").hidden = !page.model.about;
  const drop = $("drop");
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    window.addEventListener(kind, (event) => {
      event.preventDefault(); // a file that misses the place does not leave the page
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") take([...event.dataTransfer.files]);
    });
  }
  $("pick").addEventListener("change", () => take([...$("pick").files]));
  $("segment").addEventListener("click", begin);
  $("anew").addEventListener("click", anew);
  for (const one of document.querySelectorAll("[data-made]")) one.addEventListener("click", () => carry(one.dataset.made));
  window.addEventListener("pagehide", () => {
    if (page.patient) fetch(`/patients/${page.patient}/forget`, { method: "POST", body: "{}", keepalive: true });
  });
  document.body.dataset.started = "";
}

start().catch((error) => bad($("said"), error.message));
