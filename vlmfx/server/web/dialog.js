// The dialog that shows a request as code, to be copied.

import { curlOf, needsOf, pythonOf } from "./code.js";

const at = (id) => document.getElementById(id);
const dialog = at("code");
let body = null;

export function showCode(request) {
  body = request;
  write();
  dialog.showModal();
}

function write() {
  const language = dialog.querySelector("input:checked").value;
  at("code-text").value = { curl: curlOf, python: pythonOf }[language](body);
  at("code-text").setSelectionRange(0, 0);
  at("code-text").scrollTop = 0;
  at("code-needs").textContent = needsOf(body);
  at("code-says").textContent = "";
}

async function copy() {
  const text = at("code-text");
  try {
    await navigator.clipboard.writeText(text.value);
  } catch {
    text.select(); // without TLS browsers have no clipboard, but for this machine's own addresses
    if (!document.execCommand("copy")) {
      at("code-says").textContent = "It is selected; copy it by the keyboard.";
      return;
    }
    at("copy").focus();
  }
  at("code-says").textContent = "Copied.";
}

for (const input of dialog.querySelectorAll("input")) input.addEventListener("change", write);
at("copy").addEventListener("click", copy);
at("close").addEventListener("click", () => dialog.close());
