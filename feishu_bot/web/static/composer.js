// What one writes, and the pictures and files that go along. Pictures are made smaller here before they are sent.
import { $, fill, make, t } from "./page.js";
import { icon } from "./messages.js";

const LONGEST_SIDE = 1568, MAX_FILES = 4, QUALITY = 0.85;
const form = $("composer"), text = $("text"), shown = $("files"), box = form.querySelector(".box");
const takesImages = form.dataset.images === "1", takesFiles = form.dataset.files === "1";
const MOST = Number(form.dataset.most) * 0.72; // base64 takes a third more, and the rest of the request some room

async function smaller(file) {
  const bitmap = await createImageBitmap(file);
  const factor = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", { width: Math.round(bitmap.width * factor), height: Math.round(bitmap.height * factor) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const small = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
  return factor === 1 && file.size <= small.size ? file : small;
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export class Composer {
  constructor({ send, say }) {
    this.files = [];
    this.say = say;
    const submit = () => {
      const message = text.value.trim();
      if (!message && !this.files.length) return;
      const files = this.files;
      if (!send(message, files)) return;
      text.value = "";
      this.files = [];
      this.draw();
    };
    form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
    if (!takesImages && !takesFiles) return;
    $("file").accept = takesFiles ? "" : "image/*";
    $("attach").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => { this.add($("file").files); $("file").value = ""; });
    text.addEventListener("paste", (event) => { if (event.clipboardData.files.length) { event.preventDefault(); this.add(event.clipboardData.files); } });
    for (const name of ["dragover", "dragleave", "drop"]) {
      box.addEventListener(name, (event) => {
        event.preventDefault();
        box.classList.toggle("over", name === "dragover");
        if (name === "drop") this.add(event.dataTransfer.files);
      });
    }
  }

  async add(files) {
    this.say(null);
    for (const file of [...files]) { // a copy: the list empties with the field
      let why = t.not_taken;
      try {
        if (this.files.length >= MAX_FILES) { why = fill(t.too_many, { n: MAX_FILES, name: "{name}" }); throw new Error(why); }
        const isImage = file.type.startsWith("image/");
        const blob = isImage ? await smaller(file) : file;
        const size = this.files.reduce((sum, other) => sum + other.size, blob.size);
        if (!(isImage ? takesImages : takesFiles)) throw new Error(why);
        if (size > MOST) { why = t.too_big; throw new Error(why); }
        this.files.push({ name: file.name || "image.jpg", data: await base64(blob), size: blob.size, url: isImage ? URL.createObjectURL(blob) : null });
      } catch {
        this.say(fill(why, { name: file.name }));
      }
    }
    this.draw();
    text.focus();
  }

  draw() {
    shown.hidden = !this.files.length;
    shown.replaceChildren(...this.files.map((file) => {
      const remove = make("button", { type: "button", className: "quiet icon-button", "aria-label": fill(t.detach, file) }, icon("close"));
      remove.addEventListener("click", () => { this.files = this.files.filter((other) => other !== file); this.draw(); text.focus(); });
      return make("li", {}, file.url ? make("img", { src: file.url, alt: "" }) : null, make("span", {}, file.name), remove);
    }));
  }
}
