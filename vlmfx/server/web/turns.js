// Turns: a question with its pictures and the answer to it, as messages and on the page.

export class Turn {
  answer = "";
  end = ""; // "", then "done", "stopped" or "failed"
  body = null; // as it was sent
  numPrompt = 0;
  numTokens = 0;

  constructor(text, pictures) {
    this.text = text;
    this.pictures = pictures;
    this.start = performance.now();
  }

  // Takes in a chunk; the text that it adds.
  take(chunk) {
    const now = performance.now();
    const { usage } = chunk;
    if (usage) {
      this.numPrompt = usage.prompt_tokens;
      if (usage.completion_tokens > this.numTokens) {
        if (!this.numTokens) [this.firstAt, this.numFirst] = [now, usage.completion_tokens];
        [this.numTokens, this.lastAt] = [usage.completion_tokens, now];
      }
    }
    const choice = chunk.choices.find(({ index }) => index === 0); // of several answers the first is shown
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    const added = choice?.delta.content ?? "";
    this.answer += added;
    return added;
  }

  // One line: time to the first token, the rate of those after it, counts.
  get figures() {
    if (!this.numTokens) return this.end === "stopped" ? "stopped" : "";
    const rate = (this.numTokens - this.numFirst) / (this.lastAt - this.firstAt);
    const seconds = (this.firstAt - this.start) / 1000;
    const parts = [`first token after ${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(0)} s`];
    if (rate > 0 && rate < Infinity) parts.push(`${(rate * 1000).toFixed(rate < 0.01 ? 1 : 0)} tokens/s`);
    parts.push(`${this.numTokens} ${this.numTokens === 1 ? "token" : "tokens"} to a prompt of ${this.numPrompt}`);
    if (this.end === "stopped") parts.push("stopped");
    if (this.finish === "length") parts.push("cut at the limit of tokens");
    return parts.join(" · ");
  }
}

// Of the question alone. seesPictures: whether they are in it.
export function messageOf(text, pictures, seesPictures = true) {
  if (!pictures.length || !seesPictures) return { role: "user", content: text };
  const parts = pictures.map((one) => ({ type: "image_url", image_url: { url: one } }));
  return { role: "user", content: [...parts, ...(text ? [{ type: "text", text }] : [])] };
}

// Of a chat so far. What failed is no part of it.
export function messagesOf(turns, system, seesPictures = true) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.filter((one) => one.answer && one.end !== "failed")) {
    messages.push(messageOf(turn.text, turn.pictures, seesPictures), { role: "assistant", content: turn.answer });
  }
  return messages;
}

// The elements of a turn, and what changes them.
export class TurnView {
  constructor(turn, name, { onCode, onRetry }) {
    this.turn = turn;
    const asked = made("article", "turn asked");
    asked.append(made("h2", "who", "You"), ...turn.pictures.map((one) => one.image), made("p", "text", turn.text));
    this.article = made("article", "turn answer");
    this.text = made("p", "text", "");
    this.letters = this.text.appendChild(document.createTextNode(""));
    this.error = made("p", "error");
    this.error.setAttribute("role", "alert");
    this.figures = made("p", "figures small");
    this.code = button("Code", "Code of this request", onCode);
    this.retry = button("Try again", "Try again", onRetry);
    this.retry.hidden = true;
    const row = made("div", "row");
    row.append(this.figures, this.retry, this.code);
    this.article.append(made("h2", "who", name), this.text, this.error, row);
    this.article.setAttribute("aria-busy", "true");
    this.elements = [asked, this.article];
  }

  add(text) {
    this.letters.appendData(text);
    this.figures.textContent = this.turn.figures;
  }

  end(problem = "") {
    this.article.removeAttribute("aria-busy");
    this.figures.textContent = this.turn.figures;
    this.error.textContent = problem;
    this.retry.hidden = !problem;
    if (this.turn.end === "done" && !this.turn.answer) this.text.append(made("em", "small", "(an empty answer)"));
  }
}

function made(kind, className, text = "") {
  const element = document.createElement(kind);
  element.className = className;
  element.textContent = text;
  return element;
}

function button(text, label, onClick) {
  const element = made("button", "quiet", text);
  element.type = "button";
  element.setAttribute("aria-label", label);
  element.addEventListener("click", onClick);
  return element;
}
