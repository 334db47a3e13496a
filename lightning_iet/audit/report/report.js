"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.getElementById(name);
  const slider = find("threshold"), gallery = find("gallery");
  const cards = gallery ? [...gallery.children] : [];
  const format = new Intl.NumberFormat("en-US");
  const chosen = () => document.querySelector("input[name=measure]:checked");
  const measure = () => chosen().value;

  const percent = (share) => {
    const value = 100 * share;
    return (value > 0 && value < 0.1 ? String(+value.toPrecision(2)) : value.toFixed(1)) + "%";
  };

  // Counts of all images were worked out beforehand, for every stop of the slider: they are exact, and few.
  const showCounts = () => {
    const stops = data.stops[measure()];
    const stop = stops[slider.value];
    const text = stop.toFixed(2);
    find("threshold-value").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const [name, set] of Object.entries(data.sets)) {
      const count = set.below[measure()][slider.value];
      find(`count-${name}`).textContent = format.format(count);
      find(`rest-${name}`).textContent = ` of ${format.format(set.total)} (${percent(count / set.total)})`;
    }
    for (const line of document.querySelectorAll(".threshold")) {
      const x = data.left + stop / stops.at(-1) * data.width;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
  };

  const showCards = () => {
    if (!gallery) return;
    const limit = Math.fround(data.stops[measure()][slider.value]); // ratios are float32
    const words = find("filter").value.toLowerCase();
    const wanted = find("show").value;
    const ratio = (card) => Number(card.dataset[measure()]);
    let shown = 0;
    for (const card of cards) {
      const below = ratio(card) < limit;
      const kept = below || card.dataset.named === "1";
      const leftOut = (wanted === "below" && !kept) || (wanted === "beyond" && card.dataset.beyond === "0");
      card.hidden = leftOut || !card.dataset.names.toLowerCase().includes(words);
      card.classList.toggle("below", kept);
      card.querySelector(".value").textContent = ratio(card).toFixed(3);
      card.querySelector(".short").textContent = chosen().dataset.short;
      shown += !card.hidden;
    }
    const order = find("sort").value;
    const key = (card) => (order === "ratio" ? ratio(card) : Number(card.dataset[order]));
    gallery.append(...cards.toSorted((a, b) => key(a) - key(b)));
    const below = data.sets.generated.below[measure()][slider.value];
    find("shown").textContent =
      `${format.format(shown)} ${shown === 1 ? "pair" : "pairs"} shown; ` +
      `${format.format(below)} generated ${below === 1 ? "image lies" : "images lie"} below the threshold, and ` +
      `${format.format(data.named)} ${data.named === 1 ? "is" : "are"} named as ${data.named === 1 ? "a copy" : "copies"}.`;
  };

  const showMeasure = () => {
    for (const chart of document.querySelectorAll("[data-measure]")) chart.toggleAttribute("hidden", chart.dataset.measure !== measure());
  };

  const update = () => { showMeasure(); showCounts(); showCards(); };

  for (const choice of document.querySelectorAll("input[name=measure]")) {
    choice.addEventListener("change", () => {
      slider.max = data.stops[measure()].length - 1;
      slider.value = data.defaults[measure()];
      update();
    });
  }
  slider.addEventListener("input", () => { showCounts(); showCards(); });
  for (const [name, event] of gallery ? [["filter", "input"], ["show", "change"], ["sort", "change"]] : []) {
    find(name).addEventListener(event, showCards);
  }
  // What a reviewer has decided about pairs, saved as a file for the next audit: with the decisions that this audit was
  // given, also of pairs that are not shown.
  const keyOf = (pair) => `${pair.sha256} ${pair.source_sha256}`;
  const decisions = new Map(data.decisions.map((pair) => [keyOf(pair), pair]));
  const pairOf = (card) => ({
    name: card.dataset.name, sha256: card.dataset.sha256,
    source: card.dataset.source, source_sha256: card.dataset.sourceSha256,
  });
  const showDecisions = () => {
    for (const button of document.querySelectorAll(".review button")) {
      const decided = decisions.get(keyOf(pairOf(button.closest("li"))));
      button.setAttribute("aria-pressed", String(decided?.decision === button.value));
    }
    if (gallery) find("save").disabled = decisions.size + data.decisions.length === 0;
  };
  for (const button of document.querySelectorAll(".review button")) {
    button.addEventListener("click", () => {
      const pair = pairOf(button.closest("li")), key = keyOf(pair);
      if (decisions.get(key)?.decision === button.value) decisions.delete(key);
      else decisions.set(key, { ...pair, decision: button.value });
      showDecisions();
    });
  }
  showDecisions();
  if (gallery) find("save").addEventListener("click", () => {
    const pairs = [...decisions.values()];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify({ kind: "review", pairs }, null, 2)], { type: "application/json" }));
    link.download = "review.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // A pair, enlarged.
  const large = find("large");
  for (const button of large ? document.querySelectorAll("button.images") : []) {
    button.addEventListener("click", () => {
      const images = [...button.querySelectorAll("img")].map((image) => image.cloneNode());
      [...large.querySelectorAll("figure")].forEach((figure, number) => {
        figure.querySelector("img")?.remove();
        images[number].hidden = false;
        figure.prepend(images[number]);
      });
      const card = button.closest("li");
      find("large-names").textContent = `${card.dataset.name} and ${card.dataset.source}`;
      large.showModal();
    });
  }
  if (large) large.addEventListener("click", (event) => { if (event.target === large) large.close(); });

  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
  update();
})();
