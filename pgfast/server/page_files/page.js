// The page: pictures come in, questions go out one after the other, answers are kept by picture.

import { drawBoxes } from "./boxes.js";
import { AskError, ask } from "./client.js";
import { Entry } from "./entry.js";
import { openPicture } from "./pictures.js";

const MOST_PICTURES = 30; // older ones are forgotten
const KEY = "pgfast-api-key";
const EXAMPLE = { address: "page/example.png", name: "example.png", question: "what color is the shape?" };
const MODES = {
  question: { label: "Question", placeholder: "What is in the picture?", hint: "" },
  prompt: { label: "Raw prompt", placeholder: "detect cat ; dog", hint: "Goes to the model as it is, for example: caption en" },
};

const $ = (id) => document.getElementById(id);
const limits = {
  maxBody: Number(document.documentElement.dataset.maxBody),
  maxPixels: Number(document.documentElement.dataset.maxPixels),
};

let pictures = []; // in order of arrival: what openPicture gave, and entries (newest first), shown (an entry), tile
let current = null;
let numbered = 0;
let turn = Promise.resolve(); // the end of the last question asked: the next one starts there

// ---- pictures

async function addPictures(files) {
  notify("");
  for (const file of files) {
    try {
      const picture = { ...(await openPicture(file, limits)), entries: [], shown: null };
      picture.tile = makeTile(picture, ++numbered);
      pictures.push(picture);
      $("strip").children[1].after(picture.tile); // behind the two ways to add one
      show(picture);
    } catch (error) {
      notify(error.message);
    }
  }
  while (pictures.length > MOST_PICTURES) forget(pictures[0]);
}

function makeTile(picture, number) {
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button", className: "tile" });
  const image = Object.assign(new Image(), { src: picture.thumbnail, alt: "" });
  const caption = Object.assign(document.createElement("span"), { textContent: number });
  button.setAttribute("aria-label", `Picture ${number}: ${picture.name}`);
  button.append(image, caption);
  button.addEventListener("click", () => show(picture));
  item.append(button);
  return item;
}

function forget(picture) {
  picture.entries.forEach((entry) => entry.stop());
  picture.tile.remove();
  URL.revokeObjectURL(picture.url);
  pictures = pictures.filter((other) => other !== picture);
}

function show(picture) {
  current = picture;
  $("picture").src = picture.url;
  $("picture").alt = `The picture you ask about, ${picture.name}`;
  $("frame").style.setProperty("--width", picture.width);
  $("frame").style.setProperty("--height", picture.height);
  $("frame").classList.toggle("tiny", picture.width < 256 && picture.height < 256);
  const sent = picture.shrunk ? `, sent as ${size(picture.sent.size)}` : "";
  $("caption").textContent = `${picture.name}  ${picture.width} × ${picture.height}${sent}`;
  $("empty").hidden = true;
  $("frame").hidden = $("strip").hidden = false;
  for (const other of pictures) other.tile.firstChild.setAttribute("aria-pressed", String(other === picture));
  $("entries").replaceChildren(...picture.entries.map((entry) => entry.node));
  if (picture.shown) showEntry(picture.shown);
  else drawBoxes($("boxes"), []);
  if (hasMouse()) $("text").focus(); // on a phone it would bring up the keyboard
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// ---- questions

function submit() {
  const text = $("text").value.replace(/\s+/g, " ").trim();
  const choices = $("choices").value.split(",").map((choice) => choice.trim()).filter(Boolean);
  if (!current) return notify("Choose a picture first.");
  if (!text) return $("text").focus();
  notify("");
  const picture = current;
  const entry = new Entry({ mode: mode(), text, choices }, {
    onShow: () => restore(entry),
    onAgain: () => (entry.restart(), start(picture, entry)),
  });
  picture.entries.unshift(entry);
  $("entries").prepend(entry.node);
  start(picture, entry);
  if (hasMouse()) $("text").select();
  else $("text").blur(); // takes the phone's keyboard away from the answer
  entry.node.scrollIntoView({ block: "nearest" });
}

/** Shows an entry and lets it have its turn. */
function start(picture, entry) {
  picture.shown = entry;
  if (picture === current) showEntry(entry);
  turn = turn.then(() => run(picture, entry));
}

async function run(picture, entry) {
  if (entry.state !== "waiting") return; // stopped before its turn
  const { signal } = entry.controller;
  entry.setState("running");
  const begun = performance.now();
  try {
    const answer = await ask(requestForm(picture, entry.asked), {
      key: sessionStorage.getItem(KEY),
      signal,
      onText: (text) => (entry.setState("running"), entry.showText(text), redraw(picture, entry)),
      onBusy: (seconds) => entry.setState("busy", `The server is busy. Trying again in ${seconds} s.`),
    });
    signal.throwIfAborted(); // stopped in the last moment
    entry.finish(answer, (performance.now() - begun) / 1000);
    redraw(picture, entry);
    if (picture === current) $("spoken").textContent = entry.spoken;
  } catch (error) {
    if (signal.aborted) return; // `stop` has said so
    entry.setState("failed", error instanceof AskError ? error.message : "The connection broke. Ask again.");
    if (picture === current) $("spoken").textContent = entry.part(".trouble").textContent;
    if (error.status === 401) askForKey(picture, entry);
  }
}

function requestForm(picture, { mode, text, choices }) {
  const form = new FormData();
  form.append("image", picture.sent, "picture");
  form.append(mode, text);
  for (const choice of choices) form.append("choices", choice);
  return form;
}

function showEntry(entry) {
  current.shown = entry;
  for (const other of current.entries) other.select(other === entry);
  drawBoxes($("boxes"), entry.boxes);
}

function redraw(picture, entry) {
  if (picture === current && picture.shown === entry) drawBoxes($("boxes"), entry.boxes);
}

/** An earlier question comes back: into the fields, and its boxes onto the picture. */
function restore(entry) {
  const { mode, text, choices } = entry.asked;
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  showMode();
  $("text").value = text;
  $("choices").value = choices.join(", ");
  showEntry(entry);
}

// ---- the API key

let locked = []; // [picture, entry] of questions that wait for a key

function askForKey(picture, entry) {
  if (sessionStorage.getItem(KEY)) notify("The server does not accept this API key.");
  sessionStorage.removeItem(KEY);
  locked.push([picture, entry]);
  $("key").hidden = false;
  $("key-text").focus();
}

function useKey() {
  const key = $("key-text").value.trim();
  if (!/^[!-~]+$/.test(key)) return notify("An API key has plain letters, digits and signs only, and no spaces.");
  sessionStorage.setItem(KEY, key);
  $("key-text").value = "";
  $("key").hidden = true;
  notify("");
  const waiting = locked;
  locked = [];
  for (const [picture, entry] of waiting) {
    if (!pictures.includes(picture) || entry.open) continue;
    entry.restart();
    start(picture, entry);
  }
  $("text").focus();
}

// ---- wiring

function mode() {
  return document.querySelector("[name=mode]:checked").value;
}

function showMode() {
  const { label, placeholder, hint } = MODES[mode()];
  $("text").setAttribute("aria-label", label);
  $("text").placeholder = placeholder;
  $("hint").textContent = hint;
}

function hasMouse() {
  return !matchMedia("(pointer: coarse)").matches;
}

function notify(line) {
  $("notice").textContent = line;
}

function imageFiles(transfer) {
  return [...(transfer?.files ?? [])];
}

for (const input of document.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => {
    addPictures([...input.files]);
    input.value = ""; // the same file may be chosen again
  });
}

$("example").addEventListener("click", async () => {
  try {
    const response = await fetch(EXAMPLE.address);
    const file = new File([await response.blob()], EXAMPLE.name, { type: "image/png" });
    $("text").value ||= EXAMPLE.question;
    await addPictures([file]);
  } catch {
    notify("The server cannot be reached. Is it still running?");
  }
});

$("ask").addEventListener("submit", (event) => (event.preventDefault(), submit()));
$("key").addEventListener("submit", (event) => (event.preventDefault(), useKey()));
for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", showMode);

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return; // an input method ends a word with Enter too
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") current?.entries.findLast((entry) => entry.open)?.stop(); // the oldest: the one that runs
});

document.addEventListener("paste", (event) => {
  const files = imageFiles(event.clipboardData);
  if (!files.length) return; // text goes where the cursor is
  event.preventDefault();
  addPictures(files);
});

let depth = 0; // dragenter and dragleave come for every element on the way
for (const [name, step] of [["dragenter", 1], ["dragleave", -1]]) {
  document.addEventListener(name, () => document.body.classList.toggle("dragging", (depth += step) > 0));
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dragging");
  const files = imageFiles(event.dataTransfer);
  if (files.length) addPictures(files);
  else notify("That was not a picture file. Save it first, or copy and paste it.");
});

showMode();
