// Answers with each teacher's tokens beneath. Everything is written as text, never as markup.
"use strict";
const SATURATED = 4; // nats

function tokenOf(token) {
  if (typeof token === "string") {
    return element("span", "tok", token.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length)));
  }
  return element("span", "tok odd", token.special !== undefined ? token.special : "\\x" + token.hex);
}

function shade(divergence) {
  const strength = Math.min(Math.abs(divergence) / SATURATED, 1) * 0.8;
  return `rgba(${variable(divergence < 0 ? "--low" : "--high")}, ${strength.toFixed(3)})`;
}

function fixed(value) {
  return value === null || value === undefined ? "not known" : value.toFixed(3);
}

function rows(name, tokens, logprobs) {
  return tokens.map((token, i) => {
    const text = typeof token === "string" ? JSON.stringify(token) : token.special || "\\x" + token.hex;
    return `  ${name} ${text}  log-prob ${fixed(logprobs[i])}`;
  });
}

function describe(chunk, ours, theirs) {
  const head = chunk.kind === "masked" ? "masked: not trained on" : `chunk ${chunk.kind}`;
  return [head, `log q - log p = ${fixed(chunk.divergence)} nats`, ...rows("student", ...ours), ...rows("teacher", ...theirs)].join("\n");
}

function chunkOf(chunk, sample, judged) {
  const cut = (values, span) => values.slice(span[0], span[1]);
  const ours = [cut(sample.tokens, chunk.student), cut(sample.logprobs, chunk.student)];
  const theirs = [cut(judged.tokens, chunk.teacher), cut(judged.logprobs, chunk.teacher)];
  const state = chunk.kind === "masked" ? " masked" : chunk.divergence === null ? " unknown" : "";
  const box = element("span", "chunk" + state);
  box.tabIndex = 0;
  for (const tokens of [ours[0], theirs[0]]) {
    const row = element("span", "row");
    row.append(...tokens.map(tokenOf));
    box.append(row);
  }
  if (chunk.divergence !== null) box.firstChild.style.background = shade(chunk.divergence);
  box.dataset.tip = describe(chunk, ours, theirs);
  return box;
}

function judgedBy(name, judged, sample) {
  const box = element("div", "judged");
  const known = judged.chunks.map((chunk) => chunk.divergence).filter((value) => value !== null);
  const total = known.reduce((sum, value) => sum + value, 0);
  box.append(element("span", "who", `teacher ${name}: ${known.length ? total.toFixed(2) + " nats over the answer" : "divergence not known"}`));
  const chunks = element("div", "chunks");
  chunks.append(...judged.chunks.map((chunk) => chunkOf(chunk, sample, judged)));
  box.append(chunks);
  return box;
}

function answerOf(sample) {
  const box = element("article", "answer");
  const about = element("div", "about");
  about.append(element("b", "", `step ${sample.step}`), element("span", "", sample.domain), element("span", "", sample.id));
  if (sample.correct !== null) about.append(element("span", sample.correct ? "right" : "wrong", sample.correct ? "✓ right" : "✗ wrong"));
  if (sample.finish !== "stop") about.append(element("span", "", `ended by ${sample.finish}`));
  if (sample.source !== "student") about.append(element("span", "", `written by the ${sample.source}`));
  if (!sample.trained) about.append(element("span", "", "not trained on"));
  if (sample.omitted) about.append(element("span", "", `${sample.omitted} more tokens`));
  box.append(about);
  const several = sample.prompt.length > 1;
  box.append(element("div", "prompt", sample.prompt.map((m) => (several ? `${m.role}: ` : "") + m.content).join("\n")));
  const teachers = Object.entries(sample.teachers);
  box.append(...teachers.map(([name, judged]) => judgedBy(name, judged, sample)));
  if (!teachers.length) box.append(element("div", "prompt", sample.answer));
  return box;
}

function showTip(target) {
  const tip = document.getElementById("tip");
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = at.bottom + 6 + own.height < window.innerHeight;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - own.height - 6)}px`;
  tip.style.left = `${Math.max(4, Math.min(at.left, window.innerWidth - own.width - 8))}px`;
}

function setUpSamples() {
  const home = document.getElementById("answers");
  if (!home) return;
  const steps = [...new Set(data.samples.map((sample) => sample.step))];
  const domains = [...new Set(data.samples.map((sample) => sample.domain))];
  const step = document.getElementById("step"), domain = document.getElementById("domain");
  const which = document.getElementById("which");
  step.max = steps.length - 1;
  step.value = steps.length - 1;
  for (const name of ["all", ...domains]) {
    const option = element("option", "", name === "all" ? "all" : name);
    option.value = name === "all" ? "" : name;
    domain.append(option);
  }
  const show = () => {
    const chosen = steps[step.value];
    document.getElementById("step-value").textContent = chosen;
    const wanted = data.samples.filter((sample) =>
      sample.step === chosen && (!domain.value || sample.domain === domain.value)
      && (which.value === "all" || sample.correct === (which.value === "right")));
    home.replaceChildren(...wanted.map(answerOf));
    if (!wanted.length) home.append(element("p", "hint", "No such answer was kept of this step."));
    showTip(null);
  };
  for (const control of [step, domain, which]) control.addEventListener("input", show);
  for (const event of ["mouseover", "focusin"]) home.addEventListener(event, (e) => showTip(e.target.closest(".chunk")));
  for (const event of ["mouseleave", "focusout"]) home.addEventListener(event, () => showTip(null));
  dark.addEventListener("change", show);
  show();
}

setUpSamples();
