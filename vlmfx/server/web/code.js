// A request as curl and as Python, with pictures read from their files and the key from the environment.

import { addressOf, keyOf } from "./api.js";
import { Picture } from "./pictures.js";

const OWN = ["model", "messages", "temperature", "top_p", "max_tokens", "seed"]; // parameters of OpenAI's client
const WIDTH = 80; // what is longer is written over several lines
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const JSON_IN_SHELL = {
  text: (text) => JSON.stringify(text).replace(/[\\$`]/g, "\\$&"), // what a here-document would read as the shell's
  word: (value) => JSON.stringify(value),
  picture: (one) => `"data:${one.type};base64,$(base64 < ${quoted(one.name)} | tr -d '\\n')"`,
};
const PYTHON = {
  text: (text) => JSON.stringify(text),
  word: (value) => ({ true: "True", false: "False", null: "None" })[value] ?? String(value),
  picture: (one) => `data_url(${JSON.stringify(one.name)}, ${JSON.stringify(one.type)})`,
};

export function curlOf(body) {
  const key = keyOf() ? ` \\\n  -H "Authorization: Bearer $VLMFX_API_KEY"` : "";
  const address = quoted(addressOf("v1/chat/completions"));
  return `curl ${address} \\\n  -H "Content-Type: application/json"${key} -d @- <<END\n${written(body, JSON_IN_SHELL)}\nEND\n`;
}

export function pythonOf(body) {
  const key = keyOf() ? 'os.environ["VLMFX_API_KEY"]' : '"EMPTY"';
  const imports = [...(picturesOf(body).length ? ["import base64"] : []), ...(keyOf() ? ["import os"] : [])];
  const reader = picturesOf(body).length
    ? 'def data_url(path, kind):\n    with open(path, "rb") as file:\n' +
      '        return f"data:{kind};base64," + base64.b64encode(file.read()).decode()\n\n\n'
    : "";
  const own = OWN.filter((name) => name in body).map((name) => `    ${name}=${written(body[name], PYTHON, 1)},\n`);
  const rest = Object.fromEntries(Object.entries(body).filter(([name]) => !OWN.includes(name)));
  if (Object.keys(rest).length) own.push(`    extra_body=${written(rest, PYTHON, 1)},\n`);
  return (
    `${imports.map((line) => `${line}\n`).join("")}${imports.length ? "\n" : ""}from openai import OpenAI\n\n\n${reader}` +
    `client = OpenAI(base_url=${JSON.stringify(addressOf("v1"))}, api_key=${key})\n` +
    `answer = client.chat.completions.create(\n${own.join("")})\nprint(answer.choices[0].message.content)\n`
  );
}

// What must be there for the code to run, as a sentence.
export function needsOf(body) {
  const names = [...new Set(picturesOf(body).map((one) => one.name))];
  const files = names.length ? [`It reads ${names.join(", ")} in the folder where it runs.`] : [];
  return [...files, ...(keyOf() ? ["The key is to be in VLMFX_API_KEY."] : [])].join(" ");
}

function picturesOf(value) {
  if (value instanceof Picture) return [value];
  return value && typeof value === "object" ? Object.values(value).flatMap(picturesOf) : [];
}

function written(value, dialect, depth = 0) {
  if (value instanceof Picture) return dialect.picture(value);
  if (typeof value === "string") return dialect.text(value);
  if (value === null || typeof value !== "object") return dialect.word(value);
  const isList = Array.isArray(value);
  const items = Object.entries(value).map(
    ([name, item]) => `${isList ? "" : `${dialect.text(name)}: `}${written(item, dialect, depth + 1)}`,
  );
  const [open, shut] = isList ? "[]" : "{}";
  const line = open + items.join(", ") + shut;
  if (line.length < WIDTH && !line.includes("\n")) return line;
  const inner = `\n${"    ".repeat(depth + 1)}`;
  return `${open}${inner}${items.join(`,${inner}`)}\n${"    ".repeat(depth)}${shut}`;
}
