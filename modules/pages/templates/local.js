// Chooses images, sends them as one request, and shows the reports that come back; nothing leaves this address.
const form = document.getElementById("form"), input = document.getElementById("files");
const drop = document.getElementById("drop"), list = document.getElementById("chosen");
const beams = document.getElementById("beams"), beamsShown = document.getElementById("beams-shown");
const write = document.getElementById("write"), clearButton = document.getElementById("clear");
const state = document.getElementById("state"), reports = document.getElementById("reports");
const most = Number(document.body.dataset.files);
let chosen = [], busy = false;

const tell = (text, isError = false) => { state.textContent = text; state.classList.toggle("error", isError); };
const update = () => { write.disabled = busy || !chosen.length; clearButton.disabled = busy || !chosen.length; };

function choose(files) {
  for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  chosen = [...files].slice(0, most);
  list.replaceChildren(...chosen.map((file) => {
    const item = document.createElement("li");
    const shown = /^image\/(png|jpeg|webp|bmp|gif)$/.test(file.type) ? document.createElement("img") : document.createElement("span");
    if (shown instanceof HTMLImageElement) { shown.src = URL.createObjectURL(file); shown.alt = ""; }
    else { shown.className = "no-preview"; shown.textContent = "shown with its report"; }
    const name = document.createElement("div");
    name.textContent = file.name;
    item.append(shown, name);
    return item;
  }));
  tell(files.length > most ? `the first ${most} of ${files.length} images are taken` : "");
  update();
}

async function send() {
  const meaning = form.querySelector("input[name=meaning]:checked");
  const head = {
    names: chosen.map((file) => file.name), sizes: chosen.map((file) => file.size),
    together: meaning ? meaning.value === "together" : false, beam_size: Number(beams.value),
  };
  const reply = await fetch("report", {
    method: "POST", headers: { "Content-Type": "application/octet-stream" },
    body: new Blob([JSON.stringify(head), "\n", ...chosen]),
  });
  const answer = await reply.json().catch(() => ({ error: `the server answered ${reply.status}` }));
  if (!reply.ok) throw new Error(answer.error);
  const parsed = new DOMParser().parseFromString(answer.html, "text/html");
  reports.replaceChildren(...parsed.body.children);
  for (const article of reports.querySelectorAll("article")) showAttention(article);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy || !chosen.length) return;
  const began = performance.now();
  busy = true;
  update();
  tell("writing ...");
  try {
    await send();
    tell(`written in ${((performance.now() - began) / 1000).toFixed(1)} s; change the beams and write again, or drop other images`);
    reports.scrollIntoView({ block: "nearest" });
  } catch (error) {
    tell(error instanceof TypeError ? "the server does not answer: is scripts/serve.py still running?" : error.message, true);
  }
  busy = false;
  update();
});
input.addEventListener("change", () => choose(input.files));
beams.addEventListener("input", () => { beamsShown.textContent = beams.value; });
clearButton.addEventListener("click", () => { input.value = ""; choose([]); reports.replaceChildren(); input.focus(); });
document.getElementById("example").addEventListener("click", async () => {
  const picture = await (await fetch("example.png")).blob();
  choose([new File([picture], "synthetic example.png", { type: "image/png" })]);
  write.focus();
});
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files);
});
