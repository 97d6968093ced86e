// What the visitor sees and does. The model itself runs in worker.js, in a thread of its own.

import { EXAMPLE_IMAGES, TEXTS } from "./texts.js";
import { photograph } from "./camera.js";

const $ = (id) => document.getElementById(id);
const chat = $("chat");
const question = $("question");

// ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const preferred = () => (navigator.languages.find((language) => /^(en|zh)/.test(language)) ?? "en").slice(0, 2);
let language = preferred();

const say = (key, values = {}) => {
  const text = TEXTS[language][key];
  return typeof text === "function" ? text(values) : text;
};

/** Give an element words that change with the language. */
function label(element, attribute, key, values) {
  element.words = { ...element.words, [attribute]: [key, values] };
  element.toggleAttribute("data-words", true);
  speak(element);
}

function speak(element) {
  for (const [attribute, [key, values]] of Object.entries(element.words)) {
    if (attribute === "text") element.textContent = say(key, values);
    else element.setAttribute(attribute, say(key, values));
  }
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.querySelectorAll("[data-words]").forEach(speak);
  showExamples();
}

/** An element with a class and children. */
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function button(className, key, values, onClick) {
  const element = make("button", className);
  element.type = "button";
  element.onclick = onClick;
  label(element, "aria-label", key, values);
  label(element, "title", key, values);
  return element;
}

// ── Notices ──────────────────────────────────────────────────────────────────────────────────────────────────────────

function notify(key, values, withReload = false) {
  const [text, close] = $("notice").children;
  label(text, "text", key, values);
  $("notice").querySelector(".reload")?.remove();
  if (withReload) {
    const reload = make("button", "quiet reload");
    reload.type = "button";
    reload.onclick = () => location.reload();
    label(reload, "text", "reload");
    close.before(reload);
  }
  $("notice").hidden = false;
}

const closeNotice = () => ($("notice").hidden = true);

// ── The model's thread ───────────────────────────────────────────────────────────────────────────────────────────────

let worker = null;
let isReady = false;
let turn = null; // the question that is being answered

function startWorker() {
  const lacking = ["WebAssembly", "Worker", "OffscreenCanvas", "createImageBitmap"].find((name) => !(name in window));
  if (lacking) return fail("unsupported", { what: lacking });
  worker = new Worker(`worker.js${location.search}`, { type: "module" });
  worker.onmessage = ({ data }) => receive[data.type](data);
  worker.onerror = (event) => {
    event.preventDefault();
    fail(isReady ? "crashed" : "unstarted");
  };
  $("loading").hidden = false;
  label($("loading").firstElementChild, "text", "start");
}

/** The model cannot be had: say why, and take no more questions. */
function fail(code, values) {
  $("loading").hidden = true;
  if (turn) takeBack();
  worker?.terminate();
  worker = null;
  update();
  notify(code, values, true);
}

const receive = {
  progress({ stage, loaded, total }) {
    const inMegabytes = (bytes) => (bytes / 1e6).toFixed(1);
    const values = { loaded: inMegabytes(loaded), total: inMegabytes(total) };
    label($("loading").firstElementChild, "text", stage, values);
    if (stage === "start") $("progress").removeAttribute("value"); // how long that takes is not known
    else $("progress").value = loaded / total;
  },
  ready({ device, threads }) {
    isReady = true;
    $("loading").hidden = true;
    $("device").hidden = false;
    label($("device"), "text", device, { threads });
    if (device === "wasm" && !crossOriginIsolated) label($("device"), "title", "oneThread");
  },
  failed({ code, values }) {
    fail(code, values);
  },
  text({ id, text }) {
    if (id === turn?.id) turn.answer.textContent = text;
  },
  answered({ id, text, tokens, seconds, rate, stopped }) {
    if (id !== turn?.id) return;
    const figures = make("span");
    label(figures, "text", "figures", { tokens, seconds: seconds.toFixed(2), rate: Number(rate.toPrecision(2)) });
    const status = make("p", "status", figures);
    if (stopped) {
      const note = make("span");
      label(note, "text", "stopped");
      status.append(" · ", note);
    }
    turn.answer.textContent = text || "…";
    turn.answer.classList.remove("waiting");
    turn.answer.after(status);
    turn.row.ariaBusy = "false";
    turn = null;
    update();
  },
  refused({ id, code, values }) {
    if (id !== turn?.id) return;
    takeBack();
    notify(code, values);
  },
};

// ── Asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────

let lastId = 0;
let attached = []; // files that go with the next question

function ask(text, files) {
  const shown = make("div", "question");
  if (files.length) shown.append(make("div", "images", ...files.map((file) => imageOf(file))));
  shown.append(make("p", "", text));
  turn = { id: ++lastId, text, files, shown, answer: make("p", "text waiting") };
  turn.row = make("div", "answer", turn.answer);
  turn.row.ariaBusy = "true"; // so that a screen reader waits for the whole of it
  $("messages").append(shown, turn.row);
  scrollToEnd();
  worker.postMessage({ type: "ask", id: turn.id, question: text, files });
  closeNotice();
  update();
}

/** The question goes back into the box, so that it can be changed; what was typed meanwhile is kept. */
function takeBack() {
  const { text, files, shown, row } = turn;
  shown.remove();
  row.remove();
  question.value = [text, question.value].filter(Boolean).join("\n");
  attached = [...files, ...attached];
  turn = null;
  showAttached();
  update();
}

function submit() {
  const text = question.value.trim();
  if (!text || turn || !worker) return;
  const files = attached;
  attached = [];
  question.value = "";
  showAttached();
  ask(text, files);
  focusQuestion();
}

function stop() {
  if (turn) worker.postMessage({ type: "stop" });
}

function reset() {
  worker?.postMessage({ type: "reset" });
  turn = null;
  $("messages").replaceChildren();
  closeNotice();
  update();
  focusQuestion();
}

/** Where typing goes; not on a touch screen, whose keyboard would cover the answer. */
const focusQuestion = () => matchMedia("(pointer: fine)").matches && question.focus();

/** Buttons as the state wants them. */
function update() {
  const isEmpty = !$("messages").childElementCount;
  $("welcome").hidden = !isEmpty;
  $("new").hidden = isEmpty;
  $("send").hidden = Boolean(turn);
  $("stop").hidden = !turn;
  $("send").disabled = !worker || !question.value.trim();
  $("hint").hidden = Boolean(question.value || attached.length);
  // Where the browser grows a text area by itself (field-sizing), this changes nothing
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

// ── Images ───────────────────────────────────────────────────────────────────────────────────────────────────────────

function imageOf(file) {
  const image = make("img");
  image.alt = file.name;
  image.src = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(image.src);
  return image;
}

/** Attach what can be read, and name what cannot. */
async function attach(files) {
  for (const file of files) {
    try {
      (await createImageBitmap(file)).close();
      attached.push(file);
    } catch {
      notify("unreadable", { name: file.name });
    }
  }
  showAttached();
  focusQuestion();
}

function showAttached() {
  $("attached").replaceChildren(
    ...attached.map((file) => {
      const remove = button("remove", "removeImage", { name: file.name }, () => {
        attached = attached.filter((other) => other !== file);
        showAttached();
        focusQuestion();
      });
      remove.textContent = "✕";
      return make("li", "", imageOf(file), remove);
    }),
  );
  update();
}

async function fetchFile(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: ${response.status}`);
  return new File([await response.blob()], address.split("/").at(-1));
}

// Fetched at once, so that they are there without a network too; where they are missing, the page does without
const exampleFiles = Promise.all(EXAMPLE_IMAGES.map(fetchFile)).catch(() => []);

async function showExamples() {
  const files = await exampleFiles;
  $("examples").replaceChildren(
    ...files.map((file, index) => {
      const text = say("examples")[index];
      const element = button("example", "example", { question: text }, () => {
        if (!turn && worker) ask(text, [file]);
        focusQuestion();
      });
      element.append(imageOf(file), make("span", "", text));
      return make("li", "", element);
    }),
  );
}

// ── Scrolling: who is at the end of the chat stays there, whatever grows ─────────────────────────────────────────────

let isAtEnd = true;

function scrollToEnd() {
  chat.scrollTop = chat.scrollHeight;
  isAtEnd = true;
}

chat.onscroll = () => (isAtEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40);
const growth = new ResizeObserver(() => isAtEnd && $("messages").childElementCount && scrollToEnd());
growth.observe(chat);
growth.observe($("messages"));

// ── Wiring ───────────────────────────────────────────────────────────────────────────────────────────────────────────

$("composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
question.oninput = update;
question.onkeydown = (event) => {
  // While characters are being composed, Enter chooses among them
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("camera").open) stop();
});
$("stop").onclick = stop;
$("new").onclick = reset;
$("language").onclick = () => {
  language = language === "zh" ? "en" : "zh";
  translate();
};
$("notice").lastElementChild.onclick = closeNotice;

$("add").onclick = () => $("files").click();
for (const input of [$("files"), $("capture")]) {
  input.onchange = () => {
    attach([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  };
}
$("photograph").onclick = async () => {
  // Without this a page that is not served securely can still ask a telephone's own camera
  if (!navigator.mediaDevices) return $("capture").click();
  try {
    const file = await photograph($("camera"));
    if (file) attach([file]);
  } catch (error) {
    notify("noCamera", { reason: error.message });
  }
};

const imagesIn = (data) => [...data.files].filter((file) => file.type.startsWith("image/") || !file.type);
document.addEventListener("paste", (event) => {
  const files = imagesIn(event.clipboardData);
  if (!files.length) return;
  event.preventDefault();
  attach(files);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true; // it has left the window
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  $("drop").hidden = true;
  attach([...event.dataTransfer.files]);
});

$("unstarted").remove();
for (const [name, attributes] of Object.entries({ text: ["text"], label: ["aria-label", "title"], placeholder: ["placeholder"] })) {
  for (const element of document.querySelectorAll(`[data-${name}]`)) {
    attributes.forEach((attribute) => label(element, attribute, element.dataset[name]));
  }
}
translate();
startWorker();
update();
