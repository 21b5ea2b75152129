"use strict";
// Unpacks plotly, draws each chart when it comes into view, and recolors the charts when the theme changes.
(async () => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const boxes = [...document.querySelectorAll("[data-chart]")];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Pale cells show the page's background. plotly does not know it, so its own choice of text color may be unreadable.
  const inks = () => ({ "textfont.color": color("--text") });

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
  if (!packed) return; // no charts
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);

  // Figures of charts that a page holds many of: what they share is in charts[numbers.base].
  const figures = {
    confidence({ edges, ends, layout }, { counts, threshold, end, color: accepted }) {
      let marks = edges.map((edge, at) => [edge, ends[at]]);
      if (threshold !== null) {
        marks = marks.filter(([edge]) => Math.abs(edge - threshold) > 1e-6);
        marks = [...marks, [threshold, end]].sort((a, b) => a[0] - b[0]);
      }
      const bars = counts.map((_, at) => [marks[at], marks[at + 1]]);
      const line = { color: "#e5484d", width: 2 };
      const shape = { type: "line", x0: threshold, x1: threshold, y0: 0, y1: 1, yref: "y domain", line };
      return {
        data: [
          {
            type: "bar",
            x: bars.map(([[low], [high]]) => (low + high) / 2),
            y: counts.map((count) => count || null),
            width: bars.map(([[low], [high]]) => high - low),
            marker: {
              color: bars.map(([[low]]) => (threshold !== null && low >= threshold ? accepted : "rgba(148,163,184,0.55)")),
              line: { width: 0.5, color: "#94a3b8" },
            },
            customdata: bars.map(([[, low], [, high]]) => `${low} – ${high}`),
            hovertemplate: "confidence %{customdata}: %{y:,} pixels<extra></extra>",
          },
        ],
        layout: { ...structuredClone(layout), shapes: threshold === null ? [] : [shape] },
      };
    },
    confusion({ names, layout }, { counts }) {
      const totals = counts.map((row) => row.reduce((sum, count) => sum + count, 0));
      const share = counts.map((row, at) => row.map((count) => (totals[at] ? count / totals[at] : null)));
      const few = names.length <= 30; // otherwise numbers do not fit into the cells
      const numbers = {
        text: share.map((row) => row.map((part) => (part >= 0.005 ? `${Math.round(100 * part)}%` : ""))),
        texttemplate: "%{text}",
        textfont: { size: 10 },
      };
      return {
        data: [
          {
            type: "heatmap",
            z: share,
            zmin: 0,
            zmax: 1,
            colorscale: [
              [0, "rgba(59,130,246,0.04)"],
              [1, "rgba(59,130,246,1)"],
            ],
            showscale: false,
            xgap: 1,
            ygap: 1,
            ...(few ? numbers : {}),
            customdata: counts.map((row, i) => row.map((count, j) => [names[i], names[j], count])),
            hovertemplate:
              "%{customdata[0]} predicted as %{customdata[1]}: %{z:.2%}, %{customdata[2]:,} px<extra></extra>",
          },
        ],
        layout: structuredClone(layout),
      };
    },
  };

  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const numbers = charts[box.dataset.chart];
    const figure = numbers.kind ? figures[numbers.kind](charts[numbers.base], numbers) : numbers;
    for (const trace of figure.data) if (trace.type === "heatmap") assign(trace, inks());
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
      Plotly.update(box, cells.length ? inks() : {}, themed(), cells.length ? cells : undefined);
    }
  });
})();
