/* What the pages do: the leaderboard sorts and filters, entries draw their curve, any two are compared.
   Text from entries only ever becomes text (textContent), never markup. */
"use strict";

const slowrun = {
  kept: {},
  put(name, value) {
    this.kept[name] = value;
  },
  /* The value that data/<name>.js puts: a script, as pages from a disk may fetch nothing. */
  load(name) {
    return new Promise((resolve, reject) => {
      if (name in this.kept) return resolve(this.kept[name]);
      const script = make("script", { src: `data/${name}.js` });
      script.onload = () => resolve(this.kept[name]);
      script.onerror = () => reject(new Error(`data/${name}.js is missing; write the site again`));
      document.head.append(script);
    });
  },
};

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const find = (selector) => document.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const fixed = (value, digits = 4) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits = 4) => (value > 0 ? "+" : "") + fixed(value, digits);

/* A table of rows of text; `head`: the columns, a number's one begins with "#". */
function table(caption, head, rows) {
  const kind = head.map((name) => (name.startsWith("#") ? { class: "number" } : {}));
  const cells = (tag, row, more) => row.map((text, i) => make(tag, { ...kind[i], ...more }, text));
  return make(
    "table",
    { class: "plain" },
    make("caption", {}, caption),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...cells(
          "th",
          head.map((name) => name.replace(/^#/, "")),
          { scope: "col" },
        ),
      ),
    ),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))),
  );
}

/* ---- Leaderboard ------------------------------------------------------------------------------ */

function leaderboard() {
  const body = find("#leaderboard tbody"),
    form = find(".filters");
  const rows = all("tr", body),
    heads = all("#leaderboard thead th");

  const valueOf = (row, column, kind) => {
    const cell = row.cells[column],
      text = cell.dataset.value ?? cell.textContent.trim();
    return kind === "text" ? text.toLowerCase() : text === "" ? NaN : parseFloat(text);
  };
  const sort = (column) => {
    const head = heads[column],
      kind = head.dataset.kind;
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    const keyed = rows.map((row) => [valueOf(row, column, kind), row]);
    keyed.sort(([a], [b]) => {
      if (kind === "text") return down * a.localeCompare(b);
      return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : down * (a - b); // what has no value stands last
    });
    body.append(...keyed.map(([, row]) => row));
  };
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent);
    button.addEventListener("click", () => sort(column));
    head.replaceChildren(button);
  });

  const filter = () => {
    const track = form.elements.track.value,
      published = form.elements.published.checked;
    for (const row of rows) {
      const { track: of, kind } = row.dataset;
      row.hidden = (track && of !== track) || (kind === "published" && !published);
    }
    find("#leaderboard").classList.toggle("one", track !== "");
    const shown = rows.filter((row) => !row.hidden);
    const copied = shown.filter((row) => row.dataset.kind === "published").length;
    find("#count").textContent = `${shown.length - copied} filed here, ${copied} published elsewhere`;
  };
  const follow = () => {
    // the address names the track, so that it can be linked to
    const named = decodeURIComponent(location.hash.slice(1)) || "all";
    const choice = all("[name=track]", form).find((input) => (input.value || "all") === named);
    if (choice) choice.checked = true;
    filter();
  };
  form.addEventListener("change", (event) => {
    if (event.target.name === "track") location.hash = event.target.value || "all";
    filter();
  });
  window.addEventListener("hashchange", follow);
  form.hidden = false;
  follow();
}

/* ---- Charts ----------------------------------------------------------------------------------- */

const drawn = new Map(); // host -> how to draw it again, when the colours change

function colors() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(
    ["paper", "ink", "soft", "line", "accent"].map((name) => [name, style.getPropertyValue(`--${name}`)]),
  );
}

/* Puts a chart into `host`. `options` and `data` are uPlot's; `label` says what it is to who doesn't see it;
   `move(chart, by)` is what the arrow keys do, `say(chart)` what stands below it for the
   point under the cursor. */
function chart(host, { options, data, label, width = Infinity, height, move, say, legend = [], below = [] }) {
  const canvas = make("div", {
    class: "canvas",
    tabindex: 0,
    role: "group",
    "aria-roledescription": "chart",
    "aria-label": label,
  });
  if (width < Infinity) canvas.style.maxWidth = `${width}px`;
  const output = make("output"),
    caption = make("figcaption", {}, ...below);
  host
    .querySelector("figure")
    .replaceWith(make("figure", {}, make("ul", { class: "legend" }, ...legend), canvas, output, caption));
  const size = () => {
    const w = Math.min(canvas.clientWidth, width);
    return { width: w, height: height ?? w };
  };
  const { soft, line } = colors();
  const axis = {
    stroke: soft,
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    labelSize: 20,
    size: 34,
    grid: { stroke: line, width: 1 },
    ticks: { stroke: line, width: 1, size: 5 },
  };
  const hint = "Arrow keys or the mouse show the numbers.";
  const plot = new uPlot(
    {
      ...options,
      ...size(),
      legend: { show: false },
      axes: options.axes.map((more) => ({ ...axis, ...more })),
      hooks: {
        ...options.hooks,
        setCursor: [
          (u) => {
            output.textContent = u.cursor.left >= 0 ? say(u) : hint;
          },
        ],
      },
    },
    data,
    canvas,
  );
  output.textContent = hint;
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20, Home: -Infinity, End: Infinity }[
      event.key
    ];
    if (by === undefined) return;
    event.preventDefault();
    move(plot, by);
  });
  new ResizeObserver(() => {
    if (canvas.clientWidth && plot.width !== size().width) plot.setSize(size());
  }).observe(canvas);
  return plot;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function sample(shape, color) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 26 12");
  svg.setAttribute("aria-hidden", "true");
  const part = document.createElementNS(svg.namespaceURI, /dot|ring/.test(shape) ? "circle" : "path");
  const looks = {
    line: { d: "M0 6h26" },
    dash: { d: "M0 6h26", "stroke-dasharray": "5 4" },
    dot: { cx: 13, cy: 6, r: 4, fill: color },
    "dot-open": { cx: 13, cy: 6, r: 4 },
    ring: { cx: 13, cy: 6, r: 5 },
  }[shape];
  for (const [name, value] of Object.entries({ fill: "none", stroke: color, "stroke-width": 2, ...looks }))
    part.setAttribute(name, value);
  svg.append(part);
  return svg;
}

/* The entry with one run for all its seeds, their mean, where all took the same steps. */
function averaged(entry) {
  const [first, ...others] = entry.runs;
  const steps = (run) => JSON.stringify([run.step, run.eval.map((p) => p[0]), run.ensemble.map((p) => p[0])]);
  if (!others.length || others.some((run) => steps(run) !== steps(first))) return entry;
  const mean = (of) => entry.runs.reduce((sum, run) => sum + of(run), 0) / entry.runs.length;
  const points = (kind) =>
    first[kind].map((p, i) => [p[0], mean((run) => run[kind][i][1]), mean((run) => run[kind][i][2])]);
  const run = {
    name: `mean of ${entry.runs.length} seeds`,
    step: first.step,
    eval: points("eval"),
    ensemble: points("ensemble"),
  };
  for (const values of ["seconds", "train"])
    run[values] = first[values].map((_, i) => mean((one) => one[values][i]));
  return { ...entry, runs: [run] };
}

/* The curves of one entry, or of two on one axis: the training loss as lines, one for each run; validation
   losses as points; the final predictor's as a dashed line. */
function drawCurves(host, entries) {
  const form = make("form", {}, make("span", {}, "Against"));
  for (const [value, text] of [
    ["step", "steps"],
    ["seconds", "minutes of training"],
  ]) {
    const input = make("input", { type: "radio", name: "x", value });
    input.checked = value === "step";
    form.append(make("label", { class: "tick" }, input, text));
  }
  form.append(
    make(
      "label",
      { class: "tick" },
      make("input", { type: "checkbox", name: "whole" }),
      "the highest losses too",
    ),
  );
  const draw = () => {
    const by = form.elements.x.value,
      whole = form.elements.whole.checked;
    const { accent, ink, paper } = colors(),
      paint = [accent, ink];
    const scale = by === "step" ? 1 : 1 / 60;
    const tables = [],
      series = [{}];
    let low = Infinity,
      high = -Infinity;
    entries.forEach((entry, which) => {
      for (const run of entry.runs) {
        const x = run[by].map((value) => value * scale);
        tables.push([x, run.train]);
        series.push({
          stroke: paint[which],
          width: 1.25,
          alpha: entry.runs.length > 1 ? 0.55 : 1,
          spanGaps: true,
          points: { show: false },
        });
        const rings = {
          eval: { size: 7, fill: which ? paper : paint[which] },
          ensemble: { size: 11, fill: "transparent" },
        };
        for (const kind of ["eval", "ensemble"]) {
          tables.push([
            run[kind].map((p) => (by === "step" ? p[0] : p[1]) * scale),
            run[kind].map((p) => p[2]),
          ]);
          series.push({
            stroke: paint[which],
            paths: () => null,
            points: { show: true, width: 1.5, stroke: paint[which], ...rings[kind] },
          });
          low = Math.min(low, ...run[kind].map((p) => p[2]));
        }
        low = Math.min(low, entry.val, ...run.train);
        const sorted = [...run.train].sort((p, q) => p - q);
        high = Math.max(high, sorted[Math.ceil((whole ? 1 : 15 / 16) * sorted.length) - 1]);
      }
    });
    const pad = (high - low) * 0.04;
    const nearest = (values, x) =>
      values.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(values[best] - x) ? i : best), 0);
    const lead = entries[0].runs[0];
    let at = -1;
    const lines = (u) => {
      entries.forEach((entry, which) => {
        const y = u.valToPos(entry.val, "y", true),
          { ctx, bbox } = u;
        ctx.save();
        ctx.strokeStyle = paint[which];
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
        ctx.restore();
      });
    };
    const summary = entries.map((entry) => {
      const run = entry.runs[0],
        end = run.step.length - 1;
      if (end < 0) return `${entry.name}: its log has no steps.`;
      return (
        `${entry.name}: training loss from ${fixed(run.train[0], 2)} to ${fixed(run.train[end], 2)} in ` +
        `${run.step[end].toLocaleString("en")} steps, ${fixed(run.seconds[end] / 60, 1)} minutes (${run.name}); ` +
        `the final predictor has val loss ${fixed(entry.val)}.`
      );
    });
    const item = (shape, color, text) => make("li", {}, sample(shape, color), text);
    const prefix = (which) => (entries.length > 1 ? `${"AB"[which]}, ${entries[which].name}: ` : "");
    chart(host, {
      height: 380,
      data: tables.length ? uPlot.join(tables) : [[]],
      label: `Loss against ${by === "step" ? "steps" : "minutes"}. ${summary.join(" ")}`,
      legend: entries.flatMap((entry, which) => [
        item(
          "line",
          paint[which],
          `${prefix(which)}training, ${entry.runs.length > 1 ? "a line a seed" : entry.runs[0].name}`,
        ),
        item(which ? "dot-open" : "dot", paint[which], "validation"),
        ...(entry.runs[0].ensemble.length ? [item("ring", paint[which], "the members so far, mixed")] : []),
        item("dash", paint[which], `final predictor ${fixed(entry.val)}`),
      ]),
      below: [
        summary.join(" ") +
          (whole ? "" : " The highest sixteenth of the training losses may lie above the picture."),
      ],
      options: {
        series,
        cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
        scales: { x: { time: false }, y: { range: [low - pad, high + pad] } },
        axes: [
          { label: by === "step" ? "optimizer steps, of all members" : "minutes of training" },
          { label: "nats per token", size: 50 },
        ],
        hooks: { draw: [lines] },
      },
      move(u, step) {
        at = clamp(at + step, 0, lead.step.length - 1);
        u.setCursor({ left: u.valToPos(lead[by][at] * scale, "x"), top: 0 });
      },
      say(u) {
        const x = u.posToVal(u.cursor.left, "x") / scale;
        at = nearest(lead[by], x);
        return (
          entries
            .map((entry, which) => {
              const run = entry.runs[0],
                i = nearest(run[by], x),
                last = run.eval.filter((p) => p[0] <= run.step[i]).at(-1);
              return (
                `${prefix(which)}step ${run.step[i]}, ${fixed(run.seconds[i] / 60, 1)} min: ` +
                `training ${fixed(run.train[i], 3)}` +
                (last ? `, val ${fixed(last[2])} after step ${last[0]}` : "")
              );
            })
            .join("; ") + ` (${lead.name})`
        );
      },
    });
  };
  const rows = entries.flatMap((entry) =>
    entry.runs.flatMap((run) => [
      ...run.eval.map((p) => [entry.name, run.name, `${p[0]}`, fixed(p[1] / 60, 1), fixed(p[2]), "member"]),
      ...run.ensemble.map((p) => [
        entry.name,
        run.name,
        `${p[0]}`,
        fixed(p[1] / 60, 1),
        fixed(p[2]),
        "members so far",
      ]),
    ]),
  );
  host.replaceChildren(
    form,
    make("figure"),
    make(
      "details",
      {},
      make("summary", {}, "Validation losses as a table"),
      table(
        "What was scored on val, and when",
        ["entry", "run", "#step", "#minutes", "#val loss", "of"],
        rows,
      ),
    ),
  );
  form.addEventListener("change", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  drawn.set(host, draw);
  draw();
}

/* The documents' losses against each other: below the diagonal A is better. */
function drawScatter(host, a, b, pairs) {
  const sorted = [...pairs].sort((p, q) => p.b - q.b),
    ranked = [...sorted.keys()].sort((i, j) => sorted[i].gain - sorted[j].gain).reverse();
  const draw = () => {
    const { accent, soft } = colors();
    const values = sorted.flatMap((pair) => [pair.a, pair.b]);
    const low = values.reduce((x, y) => Math.min(x, y)),
      high = values.reduce((x, y) => Math.max(x, y)),
      pad = (high - low) * 0.04 + 1e-3;
    const range = [low - pad, high + pad];
    let rank = -1;
    const nearest = (u) => {
      let best = 0,
        least = Infinity;
      sorted.forEach((pair, i) => {
        const d =
          (u.valToPos(pair.b, "x") - u.cursor.left) ** 2 + (u.valToPos(pair.a, "y") - u.cursor.top) ** 2;
        if (d < least) [best, least] = [i, d];
      });
      return best;
    };
    const diagonal = (u) => {
      const { ctx } = u;
      ctx.save();
      ctx.strokeStyle = soft;
      ctx.lineWidth = devicePixelRatio;
      ctx.beginPath();
      ctx.moveTo(u.valToPos(range[0], "x", true), u.valToPos(range[0], "y", true));
      ctx.lineTo(u.valToPos(range[1], "x", true), u.valToPos(range[1], "y", true));
      ctx.stroke();
      ctx.restore();
    };
    const better = pairs.filter((pair) => pair.gain > 0).length;
    const summary =
      `Each point is one of ${pairs.length.toLocaleString("en")} val documents; ` +
      "below the diagonal A is better: " +
      `${better.toLocaleString("en")} of them (${fixed((100 * better) / pairs.length, 1)} %).`;
    chart(host, {
      width: 520,
      label: `Losses of documents, A against B. ${summary}`,
      below: [
        `${summary} The arrow keys go from the documents where A gains most down to where it loses.`,
      ],
      data: [sorted.map((pair) => pair.b), sorted.map((pair) => pair.a)],
      options: {
        series: [{}, { paths: () => null, points: { show: true, size: 5, width: 0, fill: `${accent}aa` } }],
        scales: { x: { time: false, range }, y: { range } },
        axes: [
          { label: `B, ${b.name}: nats per token` },
          { label: `A, ${a.name}: nats per token`, size: 50 },
        ],
        cursor: {
          drag: { x: false, y: false },
          x: false,
          y: false,
          dataIdx: (u, of, hovered) => (of === 1 ? nearest(u) : hovered),
          points: { size: 11, width: 2, stroke: () => colors().ink, fill: "transparent" },
        },
        hooks: { draw: [diagonal] },
      },
      move(u, by) {
        rank = clamp(rank + by, 0, ranked.length - 1);
        const pair = sorted[ranked[rank]];
        u.setCursor({ left: u.valToPos(pair.b, "x"), top: u.valToPos(pair.a, "y") });
      },
      say(u) {
        const pair = sorted[nearest(u)];
        return (
          `Document ${pair.id}, ${pair.tokens} tokens: A ${fixed(pair.a, 3)}, B ${fixed(pair.b, 3)}, ` +
          `A gains ${signed(pair.gain, 3)}.${pair.text ? ` “${pair.text} …”` : ""}`
        );
      },
    });
  };
  host.replaceChildren(make("figure"));
  drawn.set(host, draw);
  draw();
}

/* ---- Compare ---------------------------------------------------------------------------------- */

/* The documents that both scored. */
function pairsOf(a, b, texts) {
  return a.documents.loss.flatMap((loss, id) => {
    const other = b.documents.loss[id];
    return loss === null || other === null
      ? []
      : [
          {
            id,
            a: loss,
            b: other,
            gain: other - loss,
            text: texts[id],
            tokens: a.documents.tokens[id],
            nats: (other - loss) * a.documents.tokens[id],
          },
        ];
  });
}

/* Standard error of the gain over documents, as records/stats.py has it (paired_gain). */
function standardError(pairs) {
  const tokens = pairs.reduce((sum, pair) => sum + pair.tokens, 0);
  const gain = pairs.reduce((sum, pair) => sum + pair.nats, 0) / tokens;
  const squares = pairs.reduce((sum, pair) => sum + ((pair.nats - gain * pair.tokens) / tokens) ** 2, 0);
  return Math.sqrt((squares * pairs.length) / (pairs.length - 1));
}

function showDocuments(a, b, texts) {
  const scatter = find("#scatter"),
    moved = find("#moved"),
    verdict = find("#verdict");
  const same = a.documents.digest === b.documents.digest;
  const pairs = same ? pairsOf(a, b, texts) : [];
  drawn.delete(scatter);
  moved.replaceChildren();
  if (pairs.length < 2) {
    verdict.textContent = `${a.name} and ${b.name} were scored on different text: no loss can be compared.`;
    scatter.replaceChildren(make("p", {}, "No document was scored by both."));
    return;
  }
  const gain = b.val - a.val,
    half = 1.96 * standardError(pairs);
  verdict.textContent =
    a === b
      ? "A and B are one entry."
      : `A has ${fixed(a.val)}, B ${fixed(b.val)}: A gains ${signed(gain)} ± ${fixed(half)} nats per token. ` +
        `The interval is the 95 % one over documents; the noise of seeds (${a.seeds} against ${b.seeds}) comes ` +
        "on top, and ./run.sh compare reckons with it.";
  drawScatter(scatter, a, b, pairs);
  const order = [...pairs].sort((p, q) => q.nats - p.nats),
    few = Math.min(5, order.length >> 1);
  const rows = [...order.slice(0, few), ...order.slice(-few)].map((pair) => [
    `${pair.id}`,
    signed(pair.nats, 1),
    signed(pair.gain, 3),
    pair.text ?? "–",
  ]);
  moved.append(
    table(
      "The documents that moved most: where A gains most, then where it gains least or loses",
      ["#document", "#nats", "#a token", "it begins"],
      rows,
    ),
  );
}

function showDifferences(a, b) {
  const facts = a.facts.map(([what, value], i) => [what, value, b.facts[i][1]]);
  const fields = Object.keys({ ...a.config, ...b.config }).filter(
    (field) => a.config[field] !== b.config[field],
  );
  const changed = fields.map((field) => [field, a.config[field] ?? "–", b.config[field] ?? "–"]);
  find("#differences").replaceChildren(
    table("Facts", ["fact", `A, ${a.name}`, `B, ${b.name}`], facts),
    changed.length
      ? table("Fields of the configuration that differ", ["field", "A", "B"], changed)
      : make("p", {}, "One configuration."),
  );
}

function compare() {
  const [first, second] = [find("#a"), find("#b")];
  const known = [...first.options].map((option) => option.value);
  if (!known.length) {
    find("#verdict").textContent = "No entry is filed yet.";
    return;
  }
  [first.value, second.value] = [known.at(-1), known.at(-2) ?? known[0]];
  let turn = 0;
  const show = async () => {
    const mine = ++turn,
      keys = [first.value, second.value];
    try {
      const [a, b] = await Promise.all(keys.map((key) => slowrun.load(key)));
      const texts =
        a.documents.digest === b.documents.digest
          ? await slowrun.load(`documents-${a.documents.digest}`)
          : [];
      if (mine !== turn) return; // another choice was made meanwhile
      showDocuments(a, b, texts);
      drawCurves(find("#curve"), (a === b ? [a] : [a, b]).map(averaged));
      showDifferences(a, b);
    } catch (error) {
      find("#verdict").textContent = error.message;
    }
  };
  const follow = () => {
    // the address names the two, so that a comparison can be linked to
    const named = location.hash.slice(1).split(",");
    if (named.length === 2 && named.every((key) => known.includes(key))) [first.value, second.value] = named;
    show();
  };
  const choose = () => {
    location.hash = `${first.value},${second.value}`;
  };
  first.addEventListener("change", choose);
  second.addEventListener("change", choose);
  find("#swap").addEventListener("click", () => {
    [first.value, second.value] = [second.value, first.value];
    choose();
  });
  window.addEventListener("hashchange", follow);
  follow();
}

/* ---- Start ------------------------------------------------------------------------------------ */

async function entry() {
  const host = find("#curve");
  try {
    drawCurves(host, [await slowrun.load(find("main").dataset.key)]);
  } catch (error) {
    host.textContent = error.message;
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((draw) => draw()));
({ index: leaderboard, entry, compare })[find("main").dataset.page]();
