// Pictures: files as they are, never scaled, that go into messages as data: URLs.

export class UnreadableFile extends Error {}

export class Picture {
  url = ""; // until it is read
  reading = null; // the promise of its url, from the first read on
  numTokens = null; // until the server has counted them
  problem = ""; // why it cannot be read, or the server does not take it

  // taken: names of other pictures; code reads them by name, and all that is pasted is called image.png
  constructor(file, taken) {
    const [, stem, end] = /^(.*?)(\.[^.]*)?$/s.exec(file.name || "picture");
    this.name = file.name || "picture";
    for (let n = 2; taken.includes(this.name); n++) this.name = `${stem}-${n}${end ?? ""}`;
    this.file = file;
    this.type = file.type;
    this.numBytes = file.size;
    this.urlLength = `data:${file.type};base64,`.length + 4 * Math.ceil(file.size / 3); // before it is read
    this.shown = URL.createObjectURL(file);
  }

  // The file as a data: URL. It is read once.
  read() {
    this.reading ??= new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve((this.url = reader.result));
      reader.onerror = () => reject(new UnreadableFile(`${this.name} cannot be read; add it again.`));
      reader.readAsDataURL(this.file);
    });
    return this.reading;
  }

  toJSON() {
    return this.url;
  }

  free() {
    URL.revokeObjectURL(this.shown);
  }

  get size() {
    return this.numBytes < 2 ** 20 ? `${Math.ceil(this.numBytes / 1024)} KiB` : mib(this.numBytes);
  }

  get image() {
    const image = document.createElement("img");
    image.src = this.shown;
    image.alt = this.name;
    return image;
  }
}

export const mib = (numBytes) => `${(numBytes / 2 ** 20).toFixed(1)} MiB`;

// Bytes of a request's body, without writing it or reading its pictures.
export function numBytesOf(body) {
  let numBytes = 0;
  const text = JSON.stringify(body, function (key, value) {
    if (!(this[key] instanceof Picture)) return value;
    numBytes += this[key].urlLength;
    return "";
  });
  return numBytes + new TextEncoder().encode(text).length;
}

// A picture that waits to be sent, as an item of the list; onRemove is called by its button.
export function itemOf(picture, onRemove) {
  const item = document.createElement("li");
  const says = document.createElement("span");
  says.className = picture.problem ? "error" : "small";
  const tokens = picture.numTokens === null ? "counting…" : `${picture.numTokens} tokens`;
  says.textContent = picture.problem || (picture.reading ? `${picture.size}, ${tokens}` : picture.size);
  const remove = document.createElement("button");
  remove.type = "button";
  remove.textContent = "Remove";
  remove.setAttribute("aria-label", `Remove ${picture.name}`);
  remove.addEventListener("click", onRemove);
  item.append(picture.image, says, remove);
  return item;
}

// Calls take(files) with what is dropped, pasted or chosen.
export function onFiles(input, take) {
  const holdsFiles = (event) => event.dataTransfer.types.includes("Files");
  let depth = 0; // dragenter and dragleave come for each element on the way
  const mark = (change) => {
    depth = change ? Math.max(0, depth + change) : 0;
    document.body.classList.toggle("dropping", depth > 0);
  };
  addEventListener("dragenter", (event) => holdsFiles(event) && mark(1));
  addEventListener("dragleave", (event) => holdsFiles(event) && mark(-1));
  addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    mark(0);
    take([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const isText = types.includes("text/plain") && types.includes("text/html"); // word processors add a picture of it
    if (!files.length || isText) return;
    event.preventDefault();
    take([...files]);
  });
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // the same file may be chosen again
  });
}
