// Settings: what the form says, as fields of a request.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

// {system, fields, problem}: fields are those that are right; the others are marked, and problem says why, if there are any.
export function settingsOf(form) {
  const fields = {};
  const wrong = new Map(); // what is to be said of an input
  for (const name of NUMBERS) {
    const input = form.elements[name];
    if (!input.validity.valid) wrong.set(input, `${input.labels[0].textContent}: ${input.validationMessage}`);
    else if (input.value) fields[name] = input.valueAsNumber;
  }
  const other = form.elements.other;
  if (other.value.trim()) {
    const value = objectOf(other.value);
    if (value) Object.assign(fields, value);
    else wrong.set(other, 'Other fields: write one JSON object, as in {"top_k": 20}.');
  }
  for (const input of form.elements) {
    if (wrong.has(input)) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
  return { system: form.elements.system.value.trim(), fields, problem: [...wrong.values()].join(" ") };
}

function objectOf(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}
