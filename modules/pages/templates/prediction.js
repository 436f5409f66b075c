
"use strict";
// Draws the attention of the word or sentence that is pointed at, or has the focus, over the study's views.
function showAttention(article) {
  const source = article.querySelector(".maps");
  const maps = source ? JSON.parse(source.textContent) : null;
  const canvases = [...article.querySelectorAll("canvas")];
  const words = [...article.querySelectorAll(".word")];
  const status = article.querySelector(".status");
  let pinned = null;

  const clear = () => {
    for (const canvas of canvases) canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    for (const marked of article.querySelectorAll(".shown")) marked.classList.remove("shown");
    status.textContent = maps ? "" : "No attention was recorded.";
  };

  const show = (target) => {
    clear();
    target.classList.add("shown");
    const from = Number(target.dataset.from), to = Number(target.dataset.to);
    const chance = target.classList.contains("word") ? target.title : "sentence, mean probability " + target.textContent;
    if (!maps) { status.textContent = chance; return; }
    // As modules/inference/attention.py colours them: 100 is an even share, and only what exceeds it is drawn.
    const views = canvases.map((_, view) => maps[from][view].map((row, y) => row.map((_, x) => {
      let sum = 0;
      for (let word = from; word < to; word++) sum += maps[word][view][y][x];
      return sum / (to - from);
    })));
    const strongest = Math.max(100, ...views.flat(2).map((share) => share - 100));
    const shares = views.map((view) => view.flat().reduce((a, b) => a + b, 0));
    const total = shares.reduce((a, b) => a + b, 0);
    views.forEach((view, index) => {
      const canvas = canvases[index], context = canvas.getContext("2d");
      canvas.width = view[0].length; canvas.height = view.length;
      view.forEach((row, y) => row.forEach((share, x) => {
        context.fillStyle = `rgba(255, 90, 0, ${0.75 * Math.max(0, share - 100) / strongest})`;
        context.fillRect(x, y, 1, 1);
      }));
    });
    const parts = shares.map((share, view) => `view ${view + 1}: ${Math.round(100 * share / (total || 1))} %`);
    status.textContent = chance + (parts.length > 1 ? "; attention on " + parts.join(", ") : "");
  };

  const restore = () => { if (pinned) show(pinned); else clear(); };
  for (const target of article.querySelectorAll(".word, .mean")) {
    target.addEventListener("pointerenter", () => show(target));
    target.addEventListener("pointerleave", restore);
    target.addEventListener("focus", () => show(target));
    target.addEventListener("blur", restore);
    target.addEventListener("click", () => { pinned = pinned === target ? null : target; restore(); });
  }
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  article.addEventListener("keydown", (event) => {
    const index = words.indexOf(document.activeElement);
    if (event.key === "Escape") { pinned = null; clear(); return; }
    if (index < 0) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); words[index].click(); return; }
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = words[index + steps[event.key]];
    if (!next) return;
    words[index].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
for (const article of document.querySelectorAll("article")) showAttention(article);
