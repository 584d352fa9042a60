// How long the prompt will be, before it is sent: pictures are counted once each, texts whenever they change.

import { ApiError, count } from "./api.js";
import { messageOf, messagesOf } from "./turns.js";

const PAUSE_MS = 300; // after the last key

export class Counting {
  // show(sentence, isProblem); changed: called where a picture has been counted.
  constructor(show, changed) {
    this.show = show;
    this.changed = changed;
    this.number = 0; // of the newest count: older ones come too late
  }

  // Sets numTokens of a picture, or its problem; once.
  async picture(model, picture) {
    if (picture.reading) return;
    try {
      await picture.read();
      const [whole, bare] = [messageOf("", [picture]), messageOf("", [])];
      const counts = await Promise.all([count(model.id, [whole]), count(model.id, [bare])]);
      picture.numTokens = counts[0] - counts[1];
    } catch (error) {
      picture.problem = error.message;
    }
    this.changed();
  }

  // Shows the length of a chat's prompt: soon, and the newest only.
  prompt(model, turns, system, text, pictures) {
    const number = ++this.number;
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      const messages = [...messagesOf(turns, system, false), messageOf(text, [], false)];
      const all = [...turns.filter((turn) => turn.answer && turn.end !== "failed").flatMap((turn) => turn.pictures), ...pictures];
      try {
        const numText = await count(model.id, messages);
        if (number !== this.number) return;
        const numImages = all.reduce((sum, one) => sum + (one.numTokens ?? 0), 0);
        const images = all.length ? `, ${numImages} of ${all.length === 1 ? "the picture" : `${all.length} pictures`}` : "";
        this.show(`${numText + numImages} tokens of ${model.max_model_len}${images}`, false);
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (number === this.number) this.show(error.message, true);
      }
    }, PAUSE_MS);
  }
}
