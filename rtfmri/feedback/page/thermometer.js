// The bar shows `feedback`; without a value, the cross is alone. A volume that is missing, or no
// good, leaves the bar where it is, in grey, and so does a lost connection, which a dim frame tells.
"use strict";

const RETRY_MS = 1000;
const body = document.body;
const bar = document.getElementById("bar");

function look(name) {
  body.classList.toggle("fed", name === "fed");
  body.classList.toggle("unsure", name === "unsure");
}

function show(message) {
  if (Number.isFinite(message.feedback)) {
    bar.style.transform = `scaleY(${Math.min(1, Math.max(0, message.feedback))})`;
    look("fed");
  } else if (!message.missing && message.quality.usable) {
    look("nothing");
  } else {
    doubt();
  }
}

function doubt() {
  if (body.classList.contains("fed")) look("unsure");
}

function connect() {
  const socket = new WebSocket(`ws://${location.host}/`);
  socket.onopen = () => body.classList.remove("lost");
  socket.onmessage = (event) => show(JSON.parse(event.data));
  socket.onclose = () => {
    body.classList.add("lost");
    doubt();
    setTimeout(connect, RETRY_MS);
  };
}

document.addEventListener("keydown", (event) => {
  if (event.key.toLowerCase() !== "f" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.fullscreenElement) document.exitFullscreen();
  else document.documentElement.requestFullscreen().catch(() => {});
});

connect();
