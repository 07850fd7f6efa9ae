// Curves and bars. Text goes into the page as text; plotly reads a little markup, so its is escaped.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5d6b7a"],
  dark: ["#56b4e9", "#ff8a3c", "#2cc9a0", "#e39cc2", "#f0c648", "#9ad0f5", "#b79be0", "#9aa8b6"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const GREYS = { other: "--five", save: "--faint", evaluate: "--faint" };
// A bar of buttons would cover the curves: dragging zooms, a double click goes back.
const CONFIG = { responsive: true, displayModeBar: false };
const drawn = [];

function escaped(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function element(tag, name, text) {
  const found = document.createElement(tag);
  if (name) found.className = name;
  if (text !== undefined) found.textContent = text;
  return found;
}

function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function color(index) {
  const palette = dark.matches ? PALETTE.dark : PALETTE.light;
  return index < 0 ? variable("--text") : palette[index % palette.length];
}

// A teacher or a domain has one color on the whole page; other labels take the next ones.
function place(label, number, curves) {
  if (label === "all") return -1;
  const known = data.names.indexOf(label);
  if (known >= 0) return known;
  const named = data.names.findIndex((name) => label.endsWith(" " + name) || label.startsWith(name + "/"));
  return named >= 0 && curves.length <= data.names.length + 1 ? named : number;
}

function layout(more) {
  const axis = {
    gridcolor: variable("--line"), zerolinecolor: variable("--line"), automargin: true,
    tickfont: { size: 11 }, ...more.axis,
  };
  return {
    margin: { l: 44, r: 10, t: 8, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: variable("--faint"), size: 12 }, hovermode: "x unified", showlegend: true,
    legend: { orientation: "h", y: -0.16, traceorder: "normal", font: { size: 11 } },
    hoverlabel: { bgcolor: variable("--panel"), font: { color: variable("--text"), size: 11 }, namelength: -1 },
    xaxis: { ...axis, hoverformat: "d" },
    yaxis: { ...axis, tickformat: more.share ? ".0%" : undefined, rangemode: more.share ? "tozero" : "normal" },
    ...more.rest,
  };
}

function lines(figure) {
  return figure.curves.flatMap((curve, number) => {
    const index = curve.color === undefined ? place(curve.label, number, figure.curves) : curve.color;
    const style = { color: color(index), width: 2, dash: DASHES[(curve.dash || 0) % DASHES.length] };
    const few = curve.x.length < 40;
    const trace = {
      x: curve.x, y: curve.y, name: escaped(curve.label), type: "scatter",
      mode: few ? "lines+markers" : "lines", line: style, marker: { size: 5 },
      hovertemplate: figure.share ? "%{y:.1%}" : "%{y:.4~g}",
    };
    if (!curve.smooth) return [trace];
    return [
      { ...trace, opacity: 0.28, showlegend: false, hoverinfo: "skip", hovertemplate: undefined, line: { ...style, width: 1 } },
      { ...trace, ...curve.smooth, hovertemplate: trace.hovertemplate },
    ];
  });
}

function bars(time) {
  const sum = (seconds) => seconds.reduce((total, value) => total + value, 0);
  const all = sum(Object.values(time.phases).map(sum));
  const named = Object.entries(time.phases).filter(([, seconds]) => sum(seconds) > 0.001 * all);
  const phases = named.map(([name, seconds], number) => ({
    x: time.steps, y: seconds, name: escaped(name), type: "bar", offset: 0,
    width: time.steps.map((step, i) => (time.steps[i + 1] ?? step + (i ? step - time.steps[i - 1] : 1)) - step),
    marker: { color: GREYS[name] ? variable(GREYS[name]) : color(number), line: { width: 0 } },
    hovertemplate: "%{y:.3~g} s",
  }));
  const beside = Object.entries(time.beside).map(([name, seconds], number) => ({
    x: time.steps, y: seconds, name: escaped(name + " (beside)"), type: "scatter", mode: "lines",
    line: { color: variable("--text"), width: 1.5, dash: DASHES[number % DASHES.length] },
    hovertemplate: "%{y:.3~g} s",
  }));
  return [...phases, ...beside];
}

function draw(div, traces, more) {
  const paint = () => Plotly.react(div, traces(), layout(more()), CONFIG);
  drawn.push(paint);
  return paint();
}

function figureBox(figure) {
  const box = element("div", "figure");
  box.append(element("h3", "", figure.title), element("p", "", figure.hint || ""));
  const div = element("div", "plot");
  box.append(div);
  return [box, div];
}

async function drawAll() {
  for (const figure of data.figures) {
    const home = [...document.querySelectorAll(".plots")].find((one) => one.dataset.section === figure.section);
    const [box, div] = figureBox(figure);
    home.append(box);
    const many = figure.curves.length > 1;
    const more = () => ({ share: figure.share, rest: { showlegend: many || figure.curves[0].label !== "all" } });
    await draw(div, () => lines(figure), more);
  }
  const home = document.getElementById("time-plot");
  if (data.time && home) {
    const [box, div] = figureBox({ title: "Seconds of a step, by phase", hint: "means over parts of the run" });
    home.append(box);
    await draw(div, () => bars(data.time), () => ({ rest: { barmode: "stack" } }));
  }
  document.documentElement.dataset.drawn = String(drawn.length);
}

dark.addEventListener("change", () => drawn.forEach((paint) => paint()));
drawAll();
