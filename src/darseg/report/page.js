"use strict";
// Unpacks plotly and draws the charts of the page when they come into view; again in other colors when the theme changes.
(async () => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const boxes = [...document.querySelectorAll("[data-chart]")];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Cells without much color show the paper, which plotly does not know when it chooses the color of numbers.
  const numbers = () => ({ "textfont.color": color("--text") });

  function themed() {
    const axis = { gridcolor: color("--grid"), linecolor: color("--line"), tickcolor: color("--line") };
    return {
      "paper_bgcolor": "rgba(0,0,0,0)",
      "plot_bgcolor": "rgba(0,0,0,0)",
      "font.color": color("--text"),
      "hoverlabel.bgcolor": color("--card"),
      "hoverlabel.bordercolor": color("--line"),
      "hoverlabel.font.color": color("--text"),
      ...Object.fromEntries(
        ["xaxis", "yaxis"].flatMap((name) => Object.entries(axis).map(([key, value]) => [`${name}.${key}`, value]))
      ),
    };
  }

  function into(layout, changes) {
    for (const [path, value] of Object.entries(changes)) {
      const keys = path.split("."), last = keys.pop();
      let place = layout;
      for (const key of keys) place = place[key] ??= {};
      place[last] = value;
    }
    return layout;
  }

  for (const group of document.querySelectorAll(".tabs")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      for (const other of group.querySelectorAll("button")) {
        const on = other === button;
        other.setAttribute("aria-pressed", on);
        document.getElementById(other.dataset.shows).hidden = !on;
      }
    });
  }

  const dialog = document.querySelector("dialog");
  if (dialog) {
    document.addEventListener("click", (event) => {
      if (event.target.matches("figure img")) {
        const large = event.target.cloneNode();
        large.className = event.target.className;
        dialog.replaceChildren(large);
        dialog.showModal();
      } else if (dialog.open) dialog.close();
    });
  }

  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);

  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const figure = charts[box.dataset.chart];
    for (const trace of figure.data) if (trace.type === "heatmap") into(trace, numbers());
    Plotly.newPlot(box, figure.data, into(figure.layout, themed()), { responsive: true, displayModeBar: false });
  }

  const seen = new IntersectionObserver(
    (entries) => entries.filter((one) => one.isIntersecting).forEach((one) => { seen.unobserve(one.target); draw(one.target); }),
    { rootMargin: "600px" }
  );
  boxes.forEach((box) => seen.observe(box));
  window.addEventListener("beforeprint", () => boxes.filter((box) => box.offsetParent).forEach(draw));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const box of boxes.filter((one) => one.dataset.drawn)) {
      const cells = box.data.flatMap((trace, index) => (trace.type === "heatmap" ? [index] : []));
      Plotly.update(box, cells.length ? numbers() : {}, themed(), cells.length ? cells : undefined);
    }
  });
})();
