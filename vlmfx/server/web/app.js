// The page: a chat with the one model of this server.

import { ApiError, chat, keepKey, keyOf, model as describe } from "./api.js";
import { Counting } from "./counting.js";
import { showCode } from "./dialog.js";
import { keptAtEnd } from "./ends.js";
import { Picture, UnreadableFile, itemOf, mib, numBytesOf, onFiles } from "./pictures.js";
import { settingsOf } from "./settings.js";
import { Turn, TurnView, messageOf, messagesOf } from "./turns.js";

const at = (id) => document.getElementById(id);
const question = at("question");
const form = at("settings").querySelector("form");
const log = keptAtEnd(at("log"));
const counting = new Counting(showCount, changed);
let model = null; // as /v1/models has it
let turns = [];
let pictures = []; // that wait to be sent
let notTaken = ""; // what of the last files was none
let running = null; // the AbortController of the answer that comes

// -- the server

async function start() {
  at("notice").hidden = at("key-form").hidden = true;
  try {
    model = await describe();
  } catch (error) {
    if (error.status === 401) askForKey(keyOf() ? "The server does not take this key." : "");
    else notify(error.message, true);
    return;
  }
  at("model").textContent = model.id;
  document.title = `${model.id} – vlmfx`;
  if (model.task !== "generate") {
    const says = `${model.id} is served for vectors (--task ${model.task}), so there is nothing to chat with; send it to v1/embeddings.`;
    at("anew").hidden = at("show-settings").hidden = at("empty").hidden = true;
    notify(says, false);
    return;
  }
  at("ask").hidden = false;
  changed();
  question.focus();
}

function notify(message, canRetry) {
  at("notice").hidden = false;
  at("notice").querySelector("p").textContent = message;
  at("notice").querySelector("button").hidden = !canRetry;
  if (canRetry) at("notice").querySelector("button").focus();
}

function askForKey(says) {
  at("key-form").hidden = false;
  at("key-says").textContent = says;
  at("key").focus();
}

function takeKey(event) {
  event.preventDefault();
  const key = at("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return askForKey("A key has plain letters, digits and signs, and no spaces.");
  keepKey(key);
  at("key").value = "";
  return start();
}

// -- what waits to be sent

function take(files) {
  const images = files.filter((file) => file.type.startsWith("image/"));
  const others = files.filter((file) => !images.includes(file)).map((file) => file.name);
  notTaken = others.length ? `${others.join(", ")}: no picture by its type; add PNG, JPEG, WebP or GIF files.` : "";
  for (const file of images) {
    const those = [...turns.flatMap((turn) => turn.pictures), ...pictures];
    const picture = new Picture(file, those.map((one) => one.name));
    pictures.push(picture);
  }
  changed();
  if (images.length) announce(images.length === 1 ? `${images[0].name} added.` : `${images.length} pictures added.`);
  question.focus();
}

function remove(picture) {
  const place = pictures.indexOf(picture);
  pictures.splice(place, 1);
  picture.free();
  changed();
  (at("pictures").querySelectorAll("button")[place] ?? question).focus();
}

// Shows what waits, and how much it is. Files are read once it is known that they are not too much.
function changed() {
  const settings = settingsOf(form);
  tell("settings-say", settings.problem);
  if (model) {
    const excess = excessOf(bodyOf(settings, question.value, pictures));
    tell("warning", excess || notTaken);
    if (!excess) for (const picture of pictures) counting.picture(model, picture);
    counting.prompt(model, turns, settings.system, question.value, pictures);
  }
  const had = document.activeElement?.getAttribute("aria-label"); // the list is made anew
  at("pictures").replaceChildren(...pictures.map((one) => itemOf(one, () => remove(one))));
  [...at("pictures").querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === had)?.focus();
}

function showCount(sentence, isProblem) {
  at("count").textContent = sentence;
  at("count").classList.toggle("error", isProblem);
}

function bodyOf({ system, fields }, text, those) {
  return { model: model.id, ...fields, messages: [...messagesOf(turns, system), messageOf(text, those)] };
}

// Why a body is not sent; "" where it may be.
function excessOf(body) {
  const numBytes = numBytesOf(body);
  if (numBytes <= model.max_body_bytes) return "";
  const earlier = turns.some((turn) => turn.pictures.length) ? ", or start a new chat, as its pictures are sent with each question" : "";
  return `The request has ${mib(numBytes)}, and the server takes ${mib(model.max_body_bytes)}; remove a picture${earlier}.`;
}

// -- asking

function settingsOrTold() {
  const settings = settingsOf(form);
  if (!settings.problem) return settings;
  showSettings(true);
  form.querySelector("[aria-invalid]").focus();
  return null;
}

async function send(event) {
  event?.preventDefault();
  const settings = running ? null : settingsOrTold();
  const text = question.value.trim();
  if (!settings || !(text || pictures.length)) return;
  const sent = pictures;
  if (excessOf(bodyOf(settings, text, sent))) return;
  [pictures, notTaken, question.value] = [[], "", ""];
  await answer(new Turn(text, sent), settings);
}

async function answer(turn, settings) {
  running = new AbortController();
  const view = new TurnView(turn, model.id, { onCode: () => showCode(turn.body), onRetry: () => again(turn, view) });
  show(view.elements);
  setRunning(true);
  changed();
  let problem = "";
  try {
    turn.body = bodyOf(settings, turn.text, turn.pictures);
    turns.push(turn);
    const excess = excessOf(turn.body); // what is tried again has more before it now
    if (excess) throw new ApiError(excess, 0);
    await Promise.all(turn.pictures.map((one) => one.read()));
    const options = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for await (const chunk of chat({ ...turn.body, ...options }, running.signal)) {
      view.add(turn.take(chunk));
      log.follow();
    }
    turn.end = "done";
  } catch (error) {
    turn.end = error.name === "AbortError" ? "stopped" : "failed";
    problem = turn.end === "failed" ? error.message : "";
    if (error.status === 401) askForKey("The server does not take this key.");
    const isKnown = error instanceof ApiError || error instanceof UnreadableFile;
    if (!isKnown && turn.end === "failed") console.error(error);
  }
  view.end(problem);
  setRunning(false);
  log.follow();
  announce({ done: turn.answer || "The answer is empty.", stopped: "Stopped.", failed: "" }[turn.end]); // errors are alerts
  changed();
}

function again(turn, view) {
  const settings = running ? null : settingsOrTold();
  if (!settings) return;
  turns = turns.filter((one) => one !== turn);
  at("send").focus(); // as if it were sent from there: the button that was clicked goes
  for (const element of view.elements) element.remove();
  answer(new Turn(turn.text, turn.pictures), settings);
}

function anew() {
  running?.abort();
  for (const turn of turns) for (const picture of turn.pictures) picture.free();
  turns = [];
  show([]);
  changed();
  announce("A new chat.");
  question.focus();
}

// -- the page

function show(elements) {
  if (!elements.length) at("log").replaceChildren(at("empty"));
  at("empty").hidden = elements.length > 0;
  at("log").append(...elements);
  log.jump();
}

function setRunning(is) {
  if (!is) running = null;
  const hadFocus = [at("send"), at("stop")].includes(document.activeElement);
  at("send").hidden = is;
  at("stop").hidden = !is;
  if (hadFocus) (is ? at("stop") : question).focus();
}

function showSettings(is) {
  at("settings").hidden = !is;
  at("show-settings").setAttribute("aria-expanded", String(is));
}

// Sets an alert, if it says something else: a screen reader says it each time.
function tell(id, sentence) {
  if (at(id).textContent !== sentence) at(id).textContent = sentence;
}

function announce(sentence) {
  at("status").textContent = sentence;
}

onFiles(at("files"), take);
at("ask").addEventListener("submit", send);
at("key-form").addEventListener("submit", takeKey);
at("notice").querySelector("button").addEventListener("click", start);
at("choose").addEventListener("click", () => at("files").click());
at("stop").addEventListener("click", () => running?.abort());
at("anew").addEventListener("click", anew);
at("code-next").addEventListener("click", () => {
  const settings = settingsOrTold();
  if (settings) showCode(bodyOf(settings, question.value.trim(), pictures));
});
at("show-settings").addEventListener("click", () => showSettings(at("settings").hidden));
form.addEventListener("input", changed);
form.addEventListener("submit", (event) => event.preventDefault());
question.addEventListener("input", changed);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !at("code").open) running?.abort();
});
showSettings(matchMedia("(min-width: 60rem)").matches);
start();
