"use strict";

const CLIP_TOKENS = 77;
const by = (id) => document.getElementById(id);
const made = (tag, name, text) => Object.assign(document.createElement(tag), { className: name || "", textContent: text || "" });
let pictures = []; // [{name, uri}]
let searching = false; // whether there is an index
let typed = 0;

function say(words, failed = false) {
  by("status").textContent = words;
  by("status").className = failed ? "failed" : "";
}

async function ask(path, body) {
  const key = by("key").value;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) {
    by("key-field").hidden = false;
    throw new Error("This server asks for an API key.");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told ? told.error.message : `The server answered ${answer.status}.`);
  }
  return answer;
}

async function begin() {
  const model = (await (await ask("v1/models")).json()).data[0];
  by("model").textContent = `longclip-rt · ${model.id}`;
  by("context").textContent = model.context_length;
  by("untrained").hidden = model.trained !== "false";
  searching = model.index_rows !== null;
  by("kind-field").hidden = !searching;
  if (searching) {
    by("title").textContent = `Search ${model.index_rows.toLocaleString("en")} embeddings`;
    by("go").textContent = "Search";
    by("files-label").textContent = "Or drop a picture to search with, or choose one";
    by("files").multiple = false;
  }
}

async function count() {
  const turn = ++typed;
  await new Promise((wake) => setTimeout(wake, 200));
  if (turn !== typed) return;
  const told = await (await ask("v1/tokens", { text: by("text").value })).json();
  if (turn !== typed) return;
  by("count").textContent = `${told.tokens} token${told.tokens === 1 ? "" : "s"}`;
  // The last token that is read is the end token.
  const state = (end) => (end >= told.context_length ? "unread" : end >= CLIP_TOKENS ? "beyond" : "");
  by("words").replaceChildren(...told.words.flatMap(({ word, end }) => [made("span", state(end), word), " "]));
}

async function add(files) {
  const found = await Promise.all([...files].filter((file) => file.type.startsWith("image/")).map((file) =>
    new Promise((take, refuse) => {
      const reader = new FileReader();
      reader.onload = () => take({ name: file.name, uri: reader.result });
      reader.onerror = () => refuse(new Error(`${file.name} cannot be read.`));
      reader.readAsDataURL(file);
    })));
  pictures = searching ? found.slice(0, 1) : pictures.concat(found);
  by("chosen").replaceChildren(...pictures.map(({ name, uri }) => {
    const item = made("li");
    item.append(Object.assign(document.createElement("img"), { src: uri, alt: name, title: name }));
    return item;
  }));
  say(pictures.length ? `${pictures.length} picture${pictures.length === 1 ? "" : "s"} chosen` : "No picture was among them.");
}

function card({ score, name, picture, words }, rank, best) {
  const item = made("li", "card");
  const tile = made("div", picture ? "tile" : words === undefined ? "tile absent" : "tile words");
  if (picture) tile.append(Object.assign(document.createElement("img"), { src: picture, alt: name }));
  else tile.append(made(words === undefined ? "span" : "p", "", words === undefined ? "no picture is shown" : words));
  const facts = made("div", "facts");
  const numbers = made("div", "numbers");
  numbers.append(made("span", "rank", `#${rank}`), made("span", "score", score.toFixed(4).replace("-", "−")));
  const bar = made("div", "bar");
  bar.setAttribute("aria-hidden", "true");
  bar.append(made("span"));
  bar.firstChild.style.width = `${best > 0 ? Math.max(0, (100 * score) / best) : 0}%`;
  facts.append(numbers, bar, made("p", "id", name));
  item.append(tile, facts);
  return item;
}

async function rank(text) {
  if (!text || !pictures.length) throw new Error("Type a text and choose photographs.");
  const body = { queries: text, candidates: pictures.map(({ uri }) => ({ image: uri })) };
  const { scores } = await (await ask("v1/similarity", body)).json();
  return pictures.map(({ name, uri }, index) => ({ score: scores[0][index], name, picture: uri }))
    .sort((one, other) => other.score - one.score);
}

async function pictureAt(path) { // with the key, which the address of an image cannot carry
  try {
    return URL.createObjectURL(await (await ask(path)).blob());
  } catch {
    return null; // it cannot be read
  }
}

async function search(text) {
  if (!text && !pictures.length) throw new Error("Type a text or choose a picture.");
  const input = pictures.length ? { image: pictures[0].uri } : text;
  const { hits } = await (await ask("v1/search", { input, k: 24, kind: by("kind").value || null })).json();
  return Promise.all(hits.map(async ({ score, id, kind, thumbnail }) => ({
    score,
    name: id,
    words: kind === "text" ? id : undefined,
    picture: thumbnail && await pictureAt(thumbnail.slice(1)),
  })));
}

async function submit() {
  by("go").disabled = true;
  say("…");
  try {
    const text = by("text").value.trim();
    const started = performance.now();
    const found = await (searching ? search(text) : rank(text));
    const best = found.length ? found[0].score : 0;
    by("hits").replaceChildren(...found.map((hit, index) => card(hit, index + 1, best)));
    const asked = searching && pictures.length ? " for the picture" : "";
    say(`${found.length} ranked${asked} in ${Math.round(performance.now() - started)} ms`);
  } finally {
    by("go").disabled = false;
  }
}

const guarded = (task) => (...given) => Promise.resolve(task(...given)).catch((error) => say(error.message, true));

by("text").addEventListener("input", guarded(count));
by("key").addEventListener("change", guarded(begin));
by("files").addEventListener("change", guarded(async () => { await add(by("files").files); by("files").value = ""; }));
by("form").addEventListener("submit", (event) => { event.preventDefault(); guarded(submit)(); });
by("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("form").requestSubmit();
});
by("clear").addEventListener("click", () => {
  pictures = [];
  by("text").value = "";
  for (const id of ["chosen", "hits", "words"]) by(id).replaceChildren();
  by("count").textContent = "0 tokens";
  say("");
  by("text").focus();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    by("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") guarded(add)(event.dataTransfer.files);
  });
}
guarded(begin)();
