// The page of `darseg view`. Names and messages are set as textContent, so they stay text.

const ROW = 64; // pixels, as .item in viewer.css
const PAGE = 100; // images in one request
const NARROW = matchMedia("(max-width: 800px)");
const PANES = [
  { kind: "photo", name: "Photograph", short: "Photo" },
  { kind: "label", name: "Pseudo label", short: "Label" },
  { kind: "prediction", name: "Prediction" },
  { kind: "confidence", name: "Confidence" },
  { kind: "truth", name: "Truth" },
  { kind: "result", name: "Result" },
];
const SLOW = new Set(["prediction", "confidence", "result"]);
const FIELDS = ["text", "class", "share", "of", "coverage_from", "coverage_to", "confidence_from", "confidence_to", "sort"];
const DEFAULTS = { of: "label", sort: "list" };

const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
function percent(value) {
  if (value === null) return "–";
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

const TOKEN = new URLSearchParams(location.search).get("token"); // every request needs it

let info = null;
let list = { total: 0, pages: new Map(), generation: 0 };
let current = null; // the visible image: its entry in the list
let place = null; // its position in the list; null: it does not pass the filter
let pictures = new Map(); // kind → promise of its blob, for the visible image
let leaving = new AbortController(); // aborts requests for the visible image
let aspect = 1.5;
let zoom = { factor: 1, x: 0.5, y: 0.5 }; // x, y: the point in the middle of a frame, as fractions of the image
let shown = { panes: new Set(["photo", "label", "prediction", "confidence"]), overlay: "label", last: "label", opacity: 55 };
const stages = new Map(); // kind → its elements

// Requests.

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...options?.headers, authorization: `token ${TOKEN}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Start `darseg view` again if it has ended.");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();

function report(error) {
  if (error && error.name === "AbortError") return;
  $("message").textContent = error ? error.message : "";
  $("message").hidden = !error;
  layout();
}

const address = (index, kind, small) => `/images/${index}/${kind}?token=${TOKEN}${small ? "&small=1" : ""}`;

// The list.

function query() {
  const parameters = new URLSearchParams();
  for (const name of FIELDS) if ($(name).value && $(name).value !== DEFAULTS[name]) parameters.set(name, $(name).value);
  if ($("marked").checked) parameters.set("marked", "1");
  if ($("down").ariaPressed === "true") parameters.set("down", "1");
  return parameters;
}

async function refresh() {
  const generation = ++list.generation;
  const parameters = query();
  parameters.set("limit", "0");
  if (current) parameters.set("find", current.id);
  const answer = await json(`/api/images?${parameters}`);
  if (generation !== list.generation) return;
  list.total = answer.total;
  list.pages.clear();
  place = answer.place;
  $("rows").style.height = `${answer.total * ROW}px`;
  count(answer.read);
  remember();
  await page(place === null ? 0 : Math.floor(place / PAGE));
  if (generation !== list.generation) return;
  if (place === null && answer.total) await go(0);
  else {
    reveal();
    draw();
    name();
  }
}

function count(read) {
  const all = list.total === info.images ? `${info.images} images` : `${list.total} of ${info.images} images`;
  const marked = info.marked ? `, ${info.marked} marked` : "";
  const reading = read < info.images ? ` – reading label maps, ${read} so far` : "";
  $("count").textContent = (list.total ? all : "No image passes this filter") + marked + reading;
}

function page(number) {
  if (!list.pages.has(number)) {
    const generation = list.generation;
    const parameters = query();
    parameters.set("offset", number * PAGE);
    parameters.set("limit", PAGE);
    const rows = json(`/api/images?${parameters}`).then((answer) => answer.images);
    list.pages.set(number, rows);
    rows.then((images) => {
      if (generation === list.generation) {
        rows.images = images;
        draw();
      }
    }, (error) => {
      if (generation === list.generation) list.pages.delete(number);
      report(error);
    });
  }
  return list.pages.get(number);
}

const at = (position) => list.pages.get(Math.floor(position / PAGE))?.images?.[position % PAGE];

const drawn = new Map(); // position → element

function draw() {
  const box = $("list");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
  const last = Math.min(list.total, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 4);
  for (const [position, element] of drawn) {
    if (position < first || position >= last || element.image !== at(position)) {
      for (const image of element.querySelectorAll("img")) image.removeAttribute("src");
      element.remove();
      drawn.delete(position);
    }
  }
  for (let position = first; position < last; position++) {
    const image = at(position);
    if (!image) {
      page(Math.floor(position / PAGE));
      continue;
    }
    let element = drawn.get(position);
    if (!element) {
      element = row(image, position);
      drawn.set(position, element);
      $("rows").append(element);
    }
    paint(element, image, position);
  }
  clearTimeout(draw.later);
  draw.later = setTimeout(thumbnails, 60); // a list that scrolls past requests nothing
}

function row(image, position) {
  const element = make("div", "item");
  element.image = image;
  element.role = "option";
  element.id = `row-${position}`;
  element.style.top = `${position * ROW}px`;
  element.append(make("span", "thumb"), make("span", "thumb hatch"), make("span", "words"));
  const title = make("b");
  title.append(make("bdi", "", image.name));
  element.lastChild.append(title, make("small"));
  element.title = image.name;
  element.addEventListener("click", () => go(position).then(() => side(false)).catch(report));
  return element;
}

function paint(element, image, position) {
  element.ariaSelected = String(position === place);
  element.ariaPosInSet = String(position + 1);
  element.ariaSetSize = String(list.total);
  element.classList.toggle("bad", image.bad);
  const small = element.querySelector("small");
  small.replaceChildren();
  if (image.bad) small.append(make("span", "tag", "bad"), " · ");
  if (image.left_out) small.append("left out");
  else if (image.unreadable) small.append("unreadable");
  else if (image.coverage === null) small.append("…");
  else small.append(image.share === null ? percent(image.coverage) : `${percent(image.share)} ${info.classes[$("class").value]?.name ?? ""}`);
  if (image.confidence !== null) small.append(` · ${image.confidence.toFixed(2)}`);
  small.title = image.confidence === null ? "labeled" : "labeled · mean confidence";
}

function thumbnails() {
  for (const element of drawn.values()) {
    const { index, left_out: out } = element.image;
    element.querySelectorAll(".thumb").forEach((box, number) => {
      if (box.firstChild || (number && out)) return;
      const picture = make("img");
      picture.alt = "";
      picture.src = address(index, number ? "label" : "photo", true);
      picture.addEventListener("error", () => picture.remove());
      box.append(picture);
    });
  }
}

function reveal() {
  const box = $("list");
  if (place === null) return;
  const top = place * ROW;
  if (top < box.scrollTop) box.scrollTop = top - ROW;
  else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + 2 * ROW - box.clientHeight;
  box.setAttribute("aria-activedescendant", `row-${place}`);
}

// Going from image to image.

let going = 0;

async function go(position) {
  if (!list.total) return;
  const mine = ++going;
  const wanted = clamp(position, 0, list.total - 1);
  place = wanted;
  const images = await page(Math.floor(wanted / PAGE));
  if (mine !== going) return;
  show(images[wanted % PAGE]);
  reveal();
  draw();
  ahead(wanted);
}

const step = (by) => go(place === null ? 0 : place + by).catch(report);

function show(image) {
  const same = current && current.index === image.index;
  current = image;
  name();
  remember();
  if (same) return;
  leaving.abort();
  leaving = new AbortController();
  pictures = new Map();
  for (const [kind, stage] of stages) {
    stage.sheet.classList.add("old");
    if (SLOW.has(kind)) clear(stage.image);
    clear(stage.over);
    stage.side.textContent = "";
  }
  $("pixel").textContent = "";
  crosses(null);
  load();
  json(`/api/images/${image.index}`, { signal: leaving.signal }).then(legend).catch(report);
}

function name() {
  if (!current) return;
  $("id").textContent = current.name;
  $("id").title = current.name;
  document.title = `${current.name} – ${info.name}`;
  const words = [place === null ? "not in the list" : `${place + 1} of ${list.total}`];
  if (current.coverage !== null && !current.left_out) words.push(`${percent(current.coverage)} labeled`);
  if (current.confidence !== null) words.push(`confidence ${current.confidence.toFixed(3)}`);
  if (current.left_out) words.push(`left out of round ${info.round}`);
  $("place").textContent = words.join(" · ");
  $("bad").ariaPressed = String(current.bad);
  $("bad").textContent = current.bad ? "Marked bad" : "Mark bad";
  $("previous").disabled = !list.total || place === 0;
  $("next").disabled = !list.total || place === list.total - 1;
}

function ahead(position) {
  clearTimeout(ahead.later);
  ahead.later = setTimeout(() => {
    for (const next of [position + 1, position - 1]) {
      const image = at(next);
      if (!image) continue;
      const kinds = image.left_out ? ["photo"] : ["photo", "label"];
      for (const kind of kinds) fetch(address(image.index, kind), { priority: "low", signal: leaving.signal }).catch(() => {});
    }
  }, 200);
}

async function mark() {
  if (!current) return;
  const image = current;
  try {
    const answer = await json("/api/marks", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ index: image.index, bad: !image.bad }),
    });
    image.bad = answer.bad;
    info.marked = answer.marked;
    for (const rows of list.pages.values())
      for (const entry of rows.images ?? []) if (entry.index === image.index) entry.bad = answer.bad;
    report(null);
    count(info.images);
    name();
    draw();
  } catch (error) {
    report(error);
  }
}

// Pictures.

function picture(kind) {
  if (!pictures.has(kind)) {
    const { index } = current;
    const { signal } = leaving;
    const wait = SLOW.has(kind) ? 120 : 0; // no prediction for an image that the reader steps past
    const blob = new Promise((done) => setTimeout(done, wait))
      .then(() => {
        signal.throwIfAborted();
        return ask(address(index, kind), { signal });
      })
      .then((answer) => answer.blob());
    blob.catch(() => {}); // the caller that awaits it reports the error
    pictures.set(kind, blob);
  }
  return pictures.get(kind);
}

function clear(image) {
  if (!image) return;
  if (image.src) URL.revokeObjectURL(image.src);
  image.removeAttribute("src");
}

async function put(image, kind, note) {
  const { signal } = leaving;
  if (note) say(note, SLOW.has(kind) ? "predicting…" : "", true);
  try {
    const blob = await picture(kind);
    if (signal.aborted) return;
    const fresh = new Image();
    fresh.src = URL.createObjectURL(blob);
    await fresh.decode();
    if (signal.aborted) return URL.revokeObjectURL(fresh.src);
    clear(image);
    image.src = fresh.src;
    image.closest(".sheet").classList.remove("old");
    if (note) say(note, "");
    if (SLOW.has(kind) && looking.last) again();
    if (image.naturalHeight && Math.abs(image.naturalWidth / image.naturalHeight - aspect) > 1e-3) {
      aspect = image.naturalWidth / image.naturalHeight;
      layout();
    }
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    clear(image);
    if (note) say(note, error.message);
  }
}

function say(note, text, waiting = false) {
  note.hidden = !text;
  note.classList.toggle("wait", waiting);
  note.firstChild.textContent = text;
}

function load() {
  if (!current) return;
  for (const { kind } of PANES) {
    const stage = stages.get(kind);
    if (!stage || !shown.panes.has(kind)) continue;
    if (kind === "label" && current.left_out) {
      clear(stage.image);
      say(stage.note, `Round ${info.round} left this image out because it was marked as bad.`);
    } else put(stage.image, kind, stage.note);
  }
  const photo = stages.get("photo");
  const over = shown.overlay;
  const possible = over && !(over === "label" && current.left_out);
  if (!possible) clear(photo.over);
  else if (shown.panes.has("photo")) put(photo.over, over, null);
  photo.over.style.opacity = shown.opacity / 100;
  const name = PANES.find((pane) => pane.kind === over)?.name.toLowerCase();
  photo.side.textContent = name ? `${name} on top, ${shown.opacity} %` : "";
}

function build() {
  const kinds = PANES.filter((pane) => pane.kind !== "truth" || info.truth);
  kinds.forEach(({ kind, name, short }, number) => {
    const button = make("button");
    button.type = "button";
    button.append(make("kbd", "", String(number + 1)), short ?? name);
    button.title = `${name} (${number + 1})`;
    if (kind === "result") button.title += `: what \`darseg predict\` gives. ${info.result}`;
    button.addEventListener("click", () => pane(kind));
    $("panes").append(button);
    const figure = make("figure");
    const caption = make("figcaption");
    const side = make("span");
    caption.append(make("b", "", name), side);
    const frame = make("div", "frame");
    const sheet = make("div", kind === "label" || kind === "truth" ? "sheet hatch" : "sheet");
    const image = make("img", kind === "photo" ? "" : "map");
    image.alt = name;
    sheet.append(image);
    let over = null;
    if (kind === "photo") {
      over = make("img", "map");
      over.alt = "";
      sheet.append(over);
    }
    if (kind === "confidence") {
      const scale = make("span", "scale");
      const ramp = make("i");
      ramp.style.background = `linear-gradient(to right, ${info.colormap.join(",")})`;
      scale.append("0", ramp, "1");
      caption.append(scale);
    }
    const note = make("div", "note");
    note.append(make("span"));
    note.hidden = true;
    const cross = make("div", "cross");
    cross.hidden = true;
    frame.append(sheet, note, cross);
    figure.append(caption, frame);
    $("stages").append(figure);
    stages.set(kind, { button, figure, frame, sheet, image, over, note, cross, side });
    listen(frame);
  });
  if (!info.truth) $("overlay").querySelector("[value=truth]").remove();
}

function pane(kind) {
  const had = shown.panes.delete(kind);
  if (!had) shown.panes.add(kind);
  if (!shown.panes.size) shown.panes.add(kind);
  arrange();
  load();
  remember();
}

function arrange() {
  for (const [kind, stage] of stages) {
    stage.figure.hidden = !shown.panes.has(kind);
    stage.button.ariaPressed = String(shown.panes.has(kind));
  }
  $("overlay").value = shown.overlay;
  $("opacity").value = shown.opacity;
  $("opacity").disabled = !shown.overlay;
  layout();
}

function overlay(kind) {
  shown.overlay = kind;
  if (kind) shown.last = kind;
  clear(stages.get("photo").over);
  arrange();
  load();
  remember();
}

function opacity(value) {
  shown.opacity = clamp(value, 0, 100);
  arrange();
  load();
  remember();
}

// The layout of panes, and which part of the image they show.

function layout() {
  const seen = [...stages].filter(([kind]) => shown.panes.has(kind)).map(([, stage]) => stage);
  if (!seen.length) return;
  const box = $("stages");
  if (NARROW.matches) {
    box.style.gridTemplateColumns = "";
    for (const stage of seen) stage.frame.style.height = `${stage.frame.clientWidth / aspect}px`;
  } else {
    const [width, height] = [box.clientWidth - 24, box.clientHeight - 16];
    let best = [0, 1];
    for (let columns = 1; columns <= seen.length; columns++) {
      const rows = Math.ceil(seen.length / columns);
      const side = Math.min(width / columns - 8, (height / rows - 31) * aspect);
      if (side > best[0] + 1) best = [side, columns];
    }
    box.style.gridTemplateColumns = `repeat(${best[1]}, minmax(0, 1fr))`;
    for (const stage of seen) stage.frame.style.height = "";
  }
  place_sheets();
}

function geometry(frame) {
  const [width, height] = [frame.clientWidth, frame.clientHeight];
  const fits = Math.min(width, height * aspect);
  const [w, h] = [fits * zoom.factor, (fits / aspect) * zoom.factor];
  const middle = (at, size, room) => {
    const half = room / 2 / size;
    return size <= room ? 0.5 : clamp(at, half, 1 - half);
  };
  const [x, y] = [middle(zoom.x, w, width), middle(zoom.y, h, height)];
  return { w, h, left: width / 2 - x * w, top: height / 2 - y * h, x, y };
}

function place_sheets() {
  for (const { frame, sheet, image } of stages.values()) {
    if (!frame.clientWidth) continue;
    const { w, h, left, top, x, y } = geometry(frame);
    sheet.style.width = `${w}px`;
    sheet.style.height = `${h}px`;
    sheet.style.transform = `translate(${left}px, ${top}px)`;
    frame.classList.toggle("moved", zoom.factor > 1);
    image.style.imageRendering = zoom.factor >= 4 ? "pixelated" : "";
    Object.assign(zoom, { x, y });
  }
}

function zoom_at(frame, event, factor) {
  const before = fraction(frame, event);
  const target = clamp(factor, 1, 32);
  const box = frame.getBoundingClientRect();
  zoom.factor = target;
  const { w, h } = geometry(frame);
  zoom.x = before.x - (event.clientX - box.left - box.width / 2) / w;
  zoom.y = before.y - (event.clientY - box.top - box.height / 2) / h;
  place_sheets();
  crosses(null);
}

function fraction(frame, event) {
  const box = frame.getBoundingClientRect();
  const { w, h, left, top } = geometry(frame);
  return { x: (event.clientX - box.left - left) / w, y: (event.clientY - box.top - top) / h };
}

function listen(frame) {
  let from = null;
  frame.addEventListener("wheel", (event) => {
    if (NARROW.matches) return;
    event.preventDefault();
    zoom_at(frame, event, zoom.factor * Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)));
  }, { passive: false });
  frame.addEventListener("dblclick", (event) => zoom_at(frame, event, zoom.factor > 1 ? 1 : 4));
  frame.addEventListener("pointerdown", (event) => {
    if (zoom.factor > 1 && event.button === 0) {
      from = { px: event.clientX, py: event.clientY, x: zoom.x, y: zoom.y };
      frame.setPointerCapture(event.pointerId);
    }
    point(frame, event);
  });
  frame.addEventListener("pointermove", (event) => {
    if (!from) return point(frame, event);
    const { w, h } = geometry(frame);
    zoom.x = from.x - (event.clientX - from.px) / w;
    zoom.y = from.y - (event.clientY - from.py) / h;
    place_sheets();
    crosses(null);
  });
  for (const name of ["pointerup", "pointercancel"]) frame.addEventListener(name, () => (from = null));
  frame.addEventListener("pointerleave", () => {
    crosses(null);
    $("pixel").textContent = "";
    looking.last = looking.wanted = null;
  });
}

function crosses(where) {
  for (const { frame, cross } of stages.values()) {
    cross.hidden = !where;
    if (!where || !frame.clientWidth) continue;
    const { w, h, left, top } = geometry(frame);
    cross.style.left = `${left + where.x * w}px`;
    cross.style.top = `${top + where.y * h}px`;
  }
}

const looking = { busy: false, wanted: null, last: null };

function again() {
  looking.wanted = { ...looking.last, index: current.index }; // now the prediction of that pixel is known, too
  if (!looking.busy) look();
}

function point(frame, event) {
  const where = fraction(frame, event);
  const inside = where.x >= 0 && where.x < 1 && where.y >= 0 && where.y < 1;
  crosses(inside ? where : null);
  looking.last = looking.wanted = inside && current ? { ...where, index: current.index } : null;
  if (!looking.busy) look();
}

async function look() {
  looking.busy = true;
  while (looking.wanted) {
    const { x, y, index } = looking.wanted;
    looking.wanted = null;
    try {
      const facts = await json(`/api/images/${index}/pixel?x=${x.toFixed(6)}&y=${y.toFixed(6)}`);
      if (current.index === index && !stages.get("photo").cross.hidden) pixel(facts);
    } catch {
      $("pixel").textContent = ""; // the pane of an unreadable map shows the error
    }
  }
  looking.busy = false;
}

function pixel(facts) {
  const line = $("pixel");
  line.replaceChildren();
  if (facts.x === undefined) return;
  line.append(`x ${facts.x}, y ${facts.y}`);
  for (const { kind, name } of PANES) {
    if (!(kind in facts)) continue;
    const value = facts[kind];
    const words = kind === "confidence" ? value.toFixed(4) : value === null ? "not labeled" : info.classes[value]?.name ?? value;
    line.append(` · ${name.toLowerCase()} `, make("b", "", words));
  }
}

// Classes.

function legend(detail) {
  const chosen = $("class").value;
  $("legend").replaceChildren(
    ...info.classes.map((entry, k) => {
      const chip = make("button");
      chip.type = "button";
      const swatch = make("i", "swatch");
      swatch.style.background = entry.color;
      const share = detail.kept ? detail.kept[k] : null;
      chip.append(swatch, make("span", "", entry.name), make("small", "", percent(share)));
      chip.title = `${entry.name}: ${percent(share)} of the image in the pseudo label`;
      if (detail.predicted) chip.title += `, ${percent(detail.predicted[k])} in the prediction`;
      chip.title += ". Click to list the images with this class";
      chip.classList.toggle("none", !share);
      chip.ariaPressed = String(chosen === String(k));
      chip.addEventListener("click", () => {
        $("class").value = $("class").value === String(k) ? "" : String(k);
        changed();
      });
      return chip;
    }),
  );
}

// The address holds the state of the page, so that it can be bookmarked.

function remember() {
  const kept = query();
  if (current) kept.set("id", current.id);
  kept.set("panes", PANES.map((pane) => pane.kind).filter((kind) => shown.panes.has(kind)).join(","));
  kept.set("overlay", shown.overlay);
  kept.set("opacity", shown.opacity);
  remember.last = `#${kept}`;
  history.replaceState(null, "", remember.last);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) $(name).value = kept.get(name) ?? DEFAULTS[name] ?? "";
  for (const name of ["class", "of", "sort"]) if ($(name).selectedIndex < 0) $(name).value = DEFAULTS[name] ?? "";
  $("marked").checked = kept.get("marked") === "1";
  descending(kept.get("down") === "1");
  if (kept.has("panes")) {
    const wanted = kept.get("panes").split(",").filter((kind) => stages.has(kind));
    if (wanted.length) shown.panes = new Set(wanted);
  }
  if (kept.has("overlay") && [...$("overlay").options].some((option) => option.value === kept.get("overlay"))) {
    shown.overlay = kept.get("overlay");
    shown.last = shown.overlay || shown.last;
  }
  if (kept.has("opacity")) shown.opacity = clamp(Number(kept.get("opacity")) || 0, 0, 100);
  return kept.get("id");
}

async function restore() {
  const id = recall();
  arrange();
  fields();
  if (id) {
    const { place: position } = await json(`/api/images?${new URLSearchParams({ find: id, limit: "0" })}`);
    if (position !== null) {
      const { images } = await json(`/api/images?${new URLSearchParams({ offset: position, limit: "1" })}`);
      current = null;
      show(images[0]);
    }
  }
  await refresh();
}

function descending(down) {
  $("down").ariaPressed = String(down);
  $("down").textContent = down ? "↓" : "↑";
}

function fields() {
  $("of-class").hidden = !$("class").value;
  const none = !$("class").value;
  $("sort").querySelector("[value=share]").disabled = none;
  if (none && $("sort").value === "share") $("sort").value = "list";
}

function abilities() {
  const done = info.read === info.images;
  $("confidence-row").hidden = done && !info.confidence;
  $("sort").querySelector("[value=confidence]").disabled = done && !info.confidence;
  $("of").querySelector("[value=prediction]").disabled = done && !info.predicted;
}

function changed() {
  fields();
  for (const [k, chip] of [...$("legend").children].entries()) chip.ariaPressed = String($("class").value === String(k));
  refresh().then(() => report(null)).catch(report);
}

const side = (open) => $("side").classList.toggle("open", open);

// Keys and buttons.

function key(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const field = event.target.closest?.("input, select, textarea");
  if (field && event.key === "Escape") return field.blur();
  if (field && field.type !== "checkbox") return;
  const number = Number(event.key);
  if (number >= 1 && number <= stages.size) pane([...stages.keys()][number - 1]);
  else if (event.key === "ArrowRight" || event.key === "j") step(1);
  else if (event.key === "ArrowLeft" || event.key === "k") step(-1);
  else if (event.key === "ArrowDown" && event.target === $("list")) step(1);
  else if (event.key === "ArrowUp" && event.target === $("list")) step(-1);
  else if (event.key === "Home") go(0).catch(report);
  else if (event.key === "End") go(list.total - 1).catch(report);
  else if (event.key === "b") mark();
  else if (event.key === "o") overlay(shown.overlay ? "" : shown.last);
  else if (event.key === "[") opacity(shown.opacity - 10);
  else if (event.key === "]") opacity(shown.opacity + 10);
  else if (event.key === "0") {
    zoom = { factor: 1, x: 0.5, y: 0.5 };
    place_sheets();
  } else if (event.key === "/") $("text").focus();
  else if (event.key === "?") $("help").showModal();
  else if (event.key === "Escape") side(false);
  else return;
  event.preventDefault();
}

function wire() {
  document.addEventListener("keydown", key);
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("filter").addEventListener("input", (event) => {
    clearTimeout(wire.later);
    wire.later = setTimeout(changed, event.target.matches("select, [type=checkbox]") ? 0 : 250);
  });
  for (const control of document.querySelectorAll("select, [type=range]"))
    control.addEventListener("change", () => control.blur()); // so that arrow keys step through the images again
  $("down").addEventListener("click", () => {
    descending($("down").ariaPressed !== "true");
    changed();
  });
  $("reset").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = DEFAULTS[name] ?? "";
    $("marked").checked = false;
    descending(false);
    changed();
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("bad").addEventListener("click", mark);
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("overlay").addEventListener("change", () => overlay($("overlay").value));
  $("opacity").addEventListener("input", () => opacity(Number($("opacity").value)));
  $("open-list").addEventListener("click", () => {
    side(true);
    reveal();
    draw();
  });
  $("close-list").addEventListener("click", () => side(false));
  $("list").addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", () => {
    layout();
    draw();
  });
  new ResizeObserver(layout).observe($("stages"));
  addEventListener("hashchange", () => {
    if (location.hash !== remember.last) restore().catch(report);
  });
}

async function watch() {
  while (info.read < info.images) {
    await new Promise((done) => setTimeout(done, 700));
    const before = info.read;
    info = await json("/api/run");
    abilities();
    if (info.read !== before) await refresh();
  }
  if (!current) return;
  const detail = await json(`/api/images/${current.index}`);
  legend(detail);
  for (const known of ["coverage", "confidence"]) current[known] = detail[known];
  name();
}

async function begin() {
  info = await json("/api/run");
  $("name").textContent = info.name;
  const out = info.left_out ? `, ${info.left_out} left out` : "";
  $("about").textContent = `Pseudo labels of round ${info.round}${out}`;
  info.classes.forEach((entry, k) => {
    const option = make("option", "", entry.name);
    option.value = String(k);
    $("class").append(option);
  });
  build();
  abilities();
  wire();
  await restore();
  await watch();
}

begin().catch(report);
