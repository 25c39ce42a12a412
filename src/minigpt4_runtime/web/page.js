// What the page does in the browser itself: pictures pasted anywhere, the dialogue kept through a
// reload and saved as a file, the way to the answer, and light or dark.
"use strict";

const chatPage = (() => {
  const VERSION = 1;
  const MAX_KEPT_BYTES = 16 * 2 ** 20;
  const blobs = new Map(); // Path of an upload → its bytes.
  let writing = Promise.resolve();

  // --- storage: one record, the dialogue with its pictures ---------------------------------------

  function inStore(mode, act) {
    return new Promise((resolve, reject) => {
      const opening = indexedDB.open("minigpt4", 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore("dialogue");
      opening.onerror = () => reject(opening.error);
      opening.onsuccess = () => {
        const database = opening.result;
        const transaction = database.transaction("dialogue", mode);
        const request = act(transaction.objectStore("dialogue"));
        transaction.oncomplete = () => (database.close(), resolve(request.result));
        transaction.onabort = () => (database.close(), reject(transaction.error));
      };
    });
  }

  async function fetchPicture(path) {
    if (!blobs.has(path)) {
      const answer = await fetch(address("file=" + encodeURI(path)));
      if (!answer.ok) return null;
      blobs.set(path, await answer.blob());
    }
    return blobs.get(path);
  }

  async function write(kept) {
    if (!kept) return inStore("readwrite", (store) => store.delete("last"));
    let room = MAX_KEPT_BYTES;
    const { turns } = JSON.parse(kept);
    for (const turn of turns) {
      const pictures = [];
      for (const path of turn.pictures) {
        const blob = await fetchPicture(path);
        const fits = blob && blob.size <= room;
        if (fits) room -= blob.size;
        pictures.push(fits ? { name: nameOf(path), blob } : null);
      }
      turn.pictures = pictures;
    }
    return inStore("readwrite", (store) => store.put({ version: VERSION, turns }, "last"));
  }

  // One after the other, so that the last one stays. A browser that keeps nothing is no error.
  function keep(kept) {
    writing = writing.then(() => write(kept)).catch(() => {});
    return [];
  }

  async function upload({ name, blob }) {
    const form = new FormData();
    form.append("files", blob, name);
    const answer = await fetch(address("upload"), { method: "POST", body: form }).catch(() => null);
    if (!answer?.ok) return null;
    const [path] = await answer.json();
    blobs.set(path, blob);
    return path;
  }

  function isWhole({ version, turns }) {
    const isText = (each) => typeof each === "string";
    const isTurn = ({ question, answer }) => isText(question) && isText(answer);
    return version === VERSION && turns.every(isTurn);
  }

  // Gives the server what its web/kept.py reads, which checks it anew and says what is damaged.
  async function restore() {
    showColour();
    let record;
    try {
      record = await inStore("readonly", (store) => store.get("last"));
      if (!record) return ["", null];
      if (!isWhole(record)) throw new Error("damaged");
      const turns = [];
      for (const { pictures, ...turn } of record.turns) {
        const uploads = [];
        for (const picture of pictures) uploads.push(picture && (await upload(picture)));
        turns.push({ ...turn, pictures: uploads });
      }
      return [JSON.stringify({ version: VERSION, turns }), null];
    } catch {
      if (!record) return ["", null]; // This browser keeps nothing.
      keep("");
      return ["damaged", null];
    }
  }

  // --- files -------------------------------------------------------------------------------------

  function saveFile(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
    return [];
  }

  function saveMarkdown(kept) {
    const lines = JSON.parse(kept).turns.map((turn) =>
      [
        ...turn.pictures.map((path) => `*Picture: ${nameOf(path)}*`),
        `**Question:** ${turn.question}`,
        turn.answer,
      ].join("\n\n"),
    );
    return saveFile("dialogue.md", "text/markdown", lines.join("\n\n---\n\n").trim() + "\n");
  }

  function asDataUrl(blob) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(blob);
    });
  }

  // The messages of POST /v1/chat/completions, with every picture in full.
  async function saveJson(kept, system) {
    const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    for (const turn of JSON.parse(kept).turns) {
      const content = [];
      for (const path of turn.pictures) {
        const blob = await fetchPicture(path);
        if (blob) content.push({ type: "image_url", image_url: { url: await asDataUrl(blob) } });
      }
      content.push({ type: "text", text: turn.question });
      messages.push({ role: "user", content });
      if (turn.answer) messages.push({ role: "assistant", content: turn.answer });
    }
    return saveFile("dialogue.json", "application/json", JSON.stringify({ messages }, null, 2));
  }

  // --- what is seen ------------------------------------------------------------------------------

  function showAnswer() {
    document.querySelector("#dialogue").scrollIntoView({ block: "nearest", behavior: "smooth" });
    return [];
  }

  function showColour() {
    const chosen = localStorage.getItem("minigpt4-colour");
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
  }

  function changeColour() {
    const isDark = document.body.classList.toggle("dark");
    localStorage.setItem("minigpt4-colour", isDark ? "dark" : "light");
    return [];
  }

  // Gradio takes a pasted picture only where questions are typed.
  addEventListener("paste", (event) => {
    const input = document.querySelector("#question input[type=file]");
    const pictures = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (!input || !pictures.length || event.target.closest?.("#question")) return;
    const pasted = new DataTransfer();
    pictures.forEach((picture) => pasted.items.add(picture));
    input.files = pasted.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    event.preventDefault();
  });

  const address = (path) => new URL("gradio_api/" + path, document.baseURI);
  const nameOf = (path) => path.split(/[\\/]/).pop();

  return { keep, restore, saveMarkdown, saveJson, showAnswer, changeColour };
})();
