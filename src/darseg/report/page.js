"use strict";
// Unpacks plotly, draws each chart when it comes into view, and recolors the charts when the theme changes.
(async () => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const boxes = [...document.querySelectorAll("[data-chart]")];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Pale cells show the page's background. plotly does not know it, so its own choice of text color may be unreadable.
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

  // Sets values by their paths, such as "font.color".
  function assign(target, changes) {
    for (const [path, value] of Object.entries(changes)) {
      const keys = path.split("."), last = keys.pop();
      let parent = target;
      for (const key of keys) parent = parent[key] ??= {};
      parent[last] = value;
    }
    return target;
  }

  for (const group of document.querySelectorAll(".tabs")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      for (const tab of group.querySelectorAll("button")) {
        const selected = tab === button;
        tab.setAttribute("aria-pressed", selected);
        document.getElementById(tab.dataset.shows).hidden = !selected;
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
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);

  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const figure = charts[box.dataset.chart];
    for (const trace of figure.data) if (trace.type === "heatmap") assign(trace, numbers());
    Plotly.newPlot(box, figure.data, assign(figure.layout, themed()), { responsive: true, displayModeBar: false });
  }

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        observer.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "600px" }
  );
  boxes.forEach((box) => observer.observe(box));
  window.addEventListener("beforeprint", () => boxes.filter((box) => box.offsetParent).forEach(draw));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const box of boxes.filter((chart) => chart.dataset.drawn)) {
      const cells = box.data.flatMap((trace, index) => (trace.type === "heatmap" ? [index] : []));
      Plotly.update(box, cells.length ? numbers() : {}, themed(), cells.length ? cells : undefined);
    }
  });
})();
