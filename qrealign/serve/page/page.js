"use strict";

const part = (id) => document.getElementById(id);
let key = "";
let model = null;
let turns = [];
let running = null;

function headers() {
  const known = { "Content-Type": "application/json" };
  return key ? { ...known, Authorization: `Bearer ${key}` } : known;
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function setBadge(kind, text) {
  part("badge").className = `badge ${kind}`;
  part("badge").textContent = text;
}

function sayFailed(text) {
  setBadge("fail", "Unavailable");
  part("status").textContent = text;
}

async function connect() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    return sayFailed("The server cannot be reached.");
  }
  part("key-section").hidden = response.status !== 401;
  if (response.status === 401) {
    setBadge("wait", key ? "Wrong key" : "Locked");
    return part("key").focus();
  }
  if (!response.ok) return sayFailed(await refusal(response));
  model = (await response.json()).data[0];
  showModel();
}

function showModel() {
  document.title = `${model.id}, qrealign`;
  part("name").textContent = model.id;
  part("kind").textContent = `${model.scheme} · up to ${model.max_model_len} tokens`;
  part("max-tokens").max = model.max_model_len;
  const verdict = model.verdict;
  if (verdict === null) {
    setBadge("wait", "No report");
    part("headline").textContent = "No report lies beside this model, so nothing is known of its safety.";
  } else {
    setBadge(verdict.passed ? "pass" : "fail", verdict.passed ? "Passed" : "Not passed");
    part("headline").textContent = `Realignment report: ${verdict.headline}`;
    part("checked").textContent = `${verdict.reasons.length} findings`;
    part("reasons").replaceChildren(
      ...verdict.reasons.map((reason) => {
        const item = document.createElement("li");
        item.textContent = reason;
        return item;
      }),
    );
    part("verdict-section").hidden = verdict.reasons.length === 0;
  }
  part("send").disabled = false;
  part("prompt").focus();
}

function addTurn(role, text) {
  part("empty").hidden = true;
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const title = document.createElement("h3");
  title.textContent = role === "user" ? "You" : "Model";
  const body = document.createElement("p");
  body.textContent = text;
  turn.append(title, body);
  part("log").append(turn);
  scrollDown();
  return turn;
}

function addNote(turn, text) {
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = text;
  turn.append(note);
  scrollDown();
}

function scrollDown() {
  part("log").scrollTop = part("log").scrollHeight;
}

function requestBody() {
  const system = part("system").value.trim();
  const body = {
    model: model.id,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    temperature: Number(part("temperature").value),
    top_p: Number(part("top-p").value) || 1,
    max_tokens: Math.max(1, Math.round(Number(part("max-tokens").value))),
    stream: true,
    stream_options: { include_usage: true },
  };
  return part("seed").value === "" ? body : { ...body, seed: Math.round(Number(part("seed").value)) };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n\n");
    text = lines.pop();
    for (const line of lines) {
      if (line !== "data: [DONE]") yield JSON.parse(line.slice("data: ".length));
    }
  }
}

async function answer(turn) {
  const body = turn.querySelector("p");
  const started = performance.now();
  let first = null;
  let usage = null;
  let finish = null;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(requestBody()),
    signal: running.signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    for (const choice of event.choices) {
      if (choice.delta.content) {
        first ??= performance.now();
        body.append(choice.delta.content);
        scrollDown();
      }
      finish = choice.finish_reason ?? finish;
    }
  }
  const seconds = (performance.now() - (first ?? started)) / 1000;
  const speed = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  const wait = first === null ? "" : `, first text after ${Math.round(first - started)} ms`;
  addNote(turn, `${usage.completion_tokens} tokens${finish === "length" ? ", cut at the limit" : ""}${wait}${speed}`);
}

async function ask(event) {
  event.preventDefault();
  const text = part("prompt").value.trim();
  if (running || !model || !text) return;
  running = new AbortController();
  part("prompt").value = "";
  setBusy(true);
  addTurn("user", text);
  turns.push({ role: "user", content: text });
  const turn = addTurn("assistant", "");
  turn.setAttribute("aria-busy", "true");
  try {
    await answer(turn);
  } catch (error) {
    if (error.name === "AbortError") {
      addNote(turn, "stopped");
    } else {
      turn.classList.add("failed");
      addNote(turn, error.message);
    }
  }
  turn.removeAttribute("aria-busy");
  const said = turn.querySelector("p").textContent;
  // A turn without an answer would be sent along with the next one and confuse the model.
  if (said) turns.push({ role: "assistant", content: said });
  else turns.pop();
  running = null;
  setBusy(false);
  part("prompt").focus();
}

function setBusy(busy) {
  part("send").disabled = busy;
  part("stop").disabled = !busy;
  part("clear").disabled = busy;
  part("status").textContent = busy ? "The model is answering." : "";
}

part("base").textContent = new URL("v1", location.href).href;
part("ask").addEventListener("submit", ask);
part("stop").addEventListener("click", () => running?.abort());
part("clear").addEventListener("click", () => {
  turns = [];
  part("log").querySelectorAll(".turn").forEach((turn) => turn.remove());
  part("empty").hidden = false;
  part("prompt").focus();
});
part("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    part("ask").requestSubmit();
  }
});
part("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = part("key").value.trim();
  part("key").value = "";
  connect();
});
connect();
