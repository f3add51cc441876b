"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

  // The table. Numbers sort as numbers; what is missing comes last, whichever way it is sorted.
  const toNumber = (text) => (text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : null);
  function sort(head) {
    const body = head.closest("table").tBodies[0];
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    all("th[aria-sort]", head.parentNode).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => row.cells[head.cellIndex].dataset.sort;
    const rows = Array.from(body.rows);
    rows.sort((first, second) => {
      const a = key(first), b = key(second);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      const x = toNumber(a), y = toNumber(b);
      if (x === null || y === null) return sign * ((x === null) - (y === null) || a.localeCompare(b));
      return sign * (x - y);
    });
    body.append(...rows);
  }
  all(".runs thead button").forEach((button) => button.addEventListener("click", () => sort(button.closest("th"))));

  // The figures.
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function themed(layout) {
    const result = { xaxis: {}, yaxis: {}, ...layout, paper_bgcolor: style("--panel"), plot_bgcolor: style("--panel") };
    result.font = { color: style("--ink"), family: "system-ui, sans-serif" };
    result.hoverlabel = { bgcolor: style("--shade"), bordercolor: style("--line"), font: { color: style("--ink") } };
    result.modebar = { bgcolor: "rgba(0,0,0,0)", color: style("--faint"), activecolor: style("--accent") };
    for (const name of Object.keys(result).filter((text) => /^[xy]axis\d*$/.test(text))) {
      const lines = { gridcolor: style("--line"), linecolor: style("--line"), zerolinecolor: style("--line") };
      const scale = logarithmic && name.startsWith("y") && layout.losses ? { type: "log" } : {};
      result[name] = { ...layout[name], ...lines, ...scale, automargin: true };
    }
    delete result.losses;
    return result;
  }

  function traces(figure) {
    if (figure.kind !== "parallel") {
      return figure.spec.data.map((trace) => ({ ...trace, visible: hidden.has(trace.meta) ? "legendonly" : true }));
    }
    const kept = figure.runs.map((run, place) => place).filter((place) => !hidden.has(figure.runs[place]));
    const pick = (values) => kept.map((place) => values[place]);
    return figure.spec.data.map((trace) => ({
      ...trace,
      labelfont: { color: style("--ink"), size: 13 },
      tickfont: { color: style("--ink"), size: 12 },
      rangefont: { color: style("--faint"), size: 11 },
      line: { ...trace.line, color: pick(trace.line.color) },
      dimensions: trace.dimensions.map((one) => {
        const marks = [...one.values, ...(one.tickvals || [])];
        const low = Math.min(...marks), high = Math.max(...marks);
        const room = (high - low) * 0.04 || 1;
        return { ...one, values: pick(one.values), range: [low - room, high + room] };
      }),
    }));
  }

  const canvas = document.createElement("canvas");
  const hasWebGl = Boolean(canvas.getContext("webgl"));
  let logarithmic = false;
  const drawn = new Map();
  const options = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
  };

  function draw(figure, place) {
    if (figure.kind === "parallel" && !hasWebGl) {
      place.textContent = "This browser draws no parallel coordinates: it has no WebGL. The scatter plots tell the same.";
      place.classList.add("note");
      return;
    }
    const layout = themed({ ...figure.spec.layout, losses: figure.kind === "loss" });
    const isNew = !drawn.has(place);
    drawn.set(place, figure);
    Plotly.react(place, traces(figure), layout, options);
    if (isNew) {
      place.on("plotly_legendclick", (event) => { toggle([event.data[event.curveNumber].meta]); return false; });
      place.on("plotly_legenddoubleclick", (event) => { alone(event.data[event.curveNumber].meta); return false; });
    }
  }
  const redraw = () => drawn.forEach((figure, place) => draw(figure, place));

  function show() {
    all(".runs input").forEach((box) => { box.checked = !hidden.has(Number(box.value)); });
    all(".grid [data-run]").forEach((cell) => { cell.hidden = hidden.has(Number(cell.dataset.run)); });
    redraw();
  }
  function toggle(runs) {
    runs.forEach((run) => (hidden.has(run) ? hidden.delete(run) : hidden.add(run)));
    show();
  }
  function alone(run) {
    const others = data.labels.map((_, index) => index).filter((index) => index !== run);
    const isAlone = !hidden.has(run) && others.every((index) => hidden.has(index));
    hidden.clear();
    if (!isAlone) others.forEach((index) => hidden.add(index));
    show();
  }
  all(".runs input").forEach((box) => box.addEventListener("change", () => toggle([Number(box.value)])));

  data.figures.filter((figure) => figure.kind !== "scatter")
    .forEach((figure) => draw(figure, document.getElementById(`plot-${figure.name}`)));
  const scatters = data.figures.filter((figure) => figure.kind === "scatter");
  const choice = document.getElementById("parameter");
  if (scatters.length) {
    const place = document.getElementById("plot-scatter");
    const chosen = () => scatters[choice ? choice.selectedIndex : 0];
    draw(chosen(), place);
    if (choice) choice.addEventListener("change", () => draw(chosen(), place));
  }
  const log = document.getElementById("log");
  if (log) {
    log.addEventListener("click", () => {
      logarithmic = !logarithmic;
      log.setAttribute("aria-pressed", String(logarithmic));
      redraw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // The images: of each cell the one of the chosen step, or else the nearest earlier one, greyed.
  const slider = document.getElementById("step");
  const cells = all(".grid figure").map((figure) => {
    const [row, run] = figure.dataset.cell.split(",");
    return { figure, run: Number(run), steps: data.cells[`${row},${run}`] || [], prompt: figure.dataset.prompt };
  });
  function turn() {
    const step = data.steps[Number(slider.value)];
    slider.setAttribute("aria-valuetext", `step ${step}`);
    document.getElementById("step-shown").textContent = `step ${step}`;
    for (const { figure, run, steps, prompt } of cells) {
      const [image, caption] = figure.children;
      const found = steps.filter((one) => one[0] <= step).pop();
      image.hidden = found === undefined;
      figure.classList.toggle("none", found === undefined);
      figure.classList.toggle("earlier", found !== undefined && found[0] < step);
      caption.textContent = found === undefined ? "–" : found[0] < step ? `step ${found[0]}` : "";
      if (found !== undefined) {
        image.src = data.images[found[1]];
        image.alt = `${prompt}, ${data.labels[run]}, step ${found[0]}`;
      } else {
        image.removeAttribute("src");
      }
    }
  }
  if (slider) {
    all(".grid img").forEach((image) => image.addEventListener("load", () => {
      image.classList.toggle("tiny", image.naturalWidth < 128);
    }));
    slider.addEventListener("input", turn);
    turn();
  }
  document.documentElement.dataset.ready = "true";
})();
