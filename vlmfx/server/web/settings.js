// Settings: what the form says, as fields of a request.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

// {system, fields}; null where something is wrong, which is then said beside it.
export function settingsOf(form, says) {
  const fields = {};
  says.textContent = "";
  for (const name of NUMBERS) {
    const input = form.elements[name];
    if (!input.validity.valid) return wrong(input, `${input.labels[0].textContent}: ${input.validationMessage}`, says);
    if (input.value) fields[name] = input.valueAsNumber;
  }
  const other = form.elements.other;
  if (other.value.trim()) {
    const value = objectOf(other.value);
    if (!value) return wrong(other, 'Other fields: write one JSON object, as in {"top_k": 20}.', says);
    Object.assign(fields, value);
  }
  for (const input of form.elements) input.removeAttribute("aria-invalid");
  return { system: form.elements.system.value.trim(), fields };
}

function wrong(input, message, says) {
  input.setAttribute("aria-invalid", "true");
  says.textContent = message;
  return null;
}

function objectOf(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}
