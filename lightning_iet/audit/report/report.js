"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.getElementById(name);
  const slider = find("threshold"), gallery = find("gallery");
  const cards = gallery ? [...gallery.children] : [];
  const format = new Intl.NumberFormat("en-US");
  const measure = () => document.querySelector("input[name=measure]:checked").value;

  const percent = (share) => {
    const value = 100 * share;
    return (value === 0 ? "0" : value >= 10 ? String(+value.toPrecision(3)) : String(+value.toPrecision(2))) + "\u00a0%";
  };

  // Counts of all images were worked out beforehand, for every stop of the slider: they are exact, and few.
  const showCounts = () => {
    const stop = data.stops[slider.value];
    const text = stop.toFixed(2);
    find("threshold-value").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const [name, set] of Object.entries(data.sets)) {
      const count = set.below[measure()][slider.value];
      find(`count-${name}`).textContent = format.format(count);
      find(`rest-${name}`).textContent = ` of ${format.format(set.total)} (${percent(count / set.total)})`;
    }
    for (const line of document.querySelectorAll(".threshold")) {
      const x = data.left + stop * data.width;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
  };

  const showCards = () => {
    if (!gallery) return;
    const limit = Math.fround(data.stops[slider.value]); // ratios are float32
    const words = find("filter").value.toLowerCase();
    const onlyBelow = find("show").value === "below";
    const ratio = (card) => Number(card.dataset[measure()]);
    let shown = 0;
    for (const card of cards) {
      const below = ratio(card) < limit;
      card.hidden = (onlyBelow && !below) || !card.dataset.names.toLowerCase().includes(words);
      card.classList.toggle("below", below);
      card.querySelector(".value").textContent = ratio(card).toFixed(3);
      shown += !card.hidden;
    }
    const order = find("sort").value;
    const key = (card) => (order === "ratio" ? ratio(card) : Number(card.dataset[order]));
    gallery.append(...cards.toSorted((a, b) => key(a) - key(b)));
    const below = data.sets.generated.below[measure()][slider.value];
    find("shown").textContent =
      `${format.format(shown)} ${shown === 1 ? "pair" : "pairs"} shown; ` +
      `${format.format(below)} generated ${below === 1 ? "image lies" : "images lie"} below the threshold.`;
  };

  const showMeasure = () => {
    for (const chart of document.querySelectorAll("[data-measure]")) chart.toggleAttribute("hidden", chart.dataset.measure !== measure());
  };

  const update = () => { showMeasure(); showCounts(); showCards(); };

  for (const choice of document.querySelectorAll("input[name=measure]")) {
    choice.addEventListener("change", () => { slider.value = data.defaults[measure()]; update(); });
  }
  slider.addEventListener("input", () => { showCounts(); showCards(); });
  for (const [name, event] of gallery ? [["filter", "input"], ["show", "change"], ["sort", "change"]] : []) {
    find(name).addEventListener(event, showCards);
  }
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
  update();
})();
