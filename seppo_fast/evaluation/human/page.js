"use strict";
// The page's state is the list of answers; the number of answers decides which trial and question come next.
const study = JSON.parse(document.getElementById("study").textContent);
const byId = (id) => document.getElementById(id);
const CHOICES = ["left", "same", "right"];
const ZOOMS = [1, 2, 4];
let rater = "";
let answers = [];
let since = 0; // when the current question became visible, in milliseconds
let ready = false; // both media of the current trial are loaded
let zoom = 1;
let origin = [50, 50]; // the point that stays in place when zooming, in percent
let playing = !window.matchMedia("(prefers-reduced-motion: reduce)").matches;
let shown = -1; // the trial whose media are on the page
let clock = 0; // the playing time of the clips, in milliseconds
let last = 0;

const perTrial = study.questions.length;
const plan = () => study.raters[rater];
const total = () => plan().length * perTrial;
const slot = () => `seppo-fast-human ${study.study} ${rater}`;

// Storage

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(slot()) || "[]");
    answers = Array.isArray(stored) ? stored.filter((row, place) => valid(row, place)).slice(0, total()) : [];
  } catch (problem) {
    answers = [];
    byId("storage").hidden = false;
  }
}

function valid(row, place) {
  return Array.isArray(row) && row.length === 4 && row[0] === Math.floor(place / perTrial) &&
    row[1] === study.questions[place % perTrial].name && CHOICES.includes(row[2]) && Number.isInteger(row[3]);
}

function store() {
  try {
    localStorage.setItem(slot(), JSON.stringify(answers));
  } catch (problem) {
    byId("storage").hidden = false;
  }
}

function save() {
  const lines = [study.study, rater, ...answers.map((row) => row.join(","))];
  const content = { schema: 1, study: study.study, rater, answers, digest: sha256(lines.join("\n")) };
  const link = document.createElement("a");
  const url = URL.createObjectURL(new Blob([JSON.stringify(content) + "\n"], { type: "application/json" }));
  link.href = url;
  link.download = `answers-${rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  byId("said").textContent = `${answers.length} of ${total()} answers saved as ${link.download}.`;
}

// Trials

function start(name) {
  rater = name;
  load();
  shown = -1;
  byId("welcome").hidden = true;
  byId("work").hidden = false;
  byId("work").focus();
  show();
}

function show() {
  const finished = answers.length >= total();
  const trial = Math.min(Math.floor(answers.length / perTrial), plan().length - 1);
  byId("progress").max = total();
  byId("progress").value = answers.length;
  byId("count").textContent = `${rater}: comparison ${trial + 1} of ${plan().length}`;
  byId("undo").disabled = !answers.length;
  byId("trial").hidden = finished;
  byId("finished").hidden = !finished;
  byId("viewing").hidden = finished;
  byId("save").classList.toggle("main", finished);
  if (finished) {
    ready = false;
    byId("finished").focus();
    return;
  }
  const place = answers.length % perTrial;
  const question = perTrial > 1 ? `${place + 1}/${perTrial} ` : "";
  byId("question").textContent = question + study.questions[place].text;
  if (trial !== shown) placeMedia(trial);
  since = performance.now();
}

function placeMedia(trial) {
  shown = trial;
  ready = false;
  clock = 0;
  setZoom(1);
  const [prompt, ...files] = plan()[trial];
  byId("prompt").textContent = prompt;
  const loads = ["left", "right"].map((side, number) => {
    const medium = study.media[files[number]];
    const image = new Image();
    image.alt = prompt;
    image.draggable = false;
    image.src = `media/${files[number]}`;
    const box = byId(side);
    box.style.setProperty("--ratio", medium.width / medium.height);
    box.style.setProperty("--columns", medium.columns);
    box.style.setProperty("--rows", medium.rows);
    box.classList.toggle("small", Math.max(medium.width, medium.height) < 160);
    box.querySelector(".tile").replaceChildren(image);
    return image.decode();
  });
  setButtons();
  byId("play").hidden = !files.some((file) => study.media[file].frames > 1);
  Promise.all(loads).then(
    () => {
      if (shown !== trial) return;
      ready = true;
      since = performance.now();
      clock = 0;
      setButtons();
      preload(trial + 1);
    },
    () => {
      if (shown === trial) byId("said").textContent = "A file in the folder media cannot be loaded; request a new copy of the folder.";
    },
  );
}

function preload(trial) {
  if (trial < plan().length) for (const file of plan()[trial].slice(1)) new Image().src = `media/${file}`;
}

function setButtons() {
  for (const choice of CHOICES) byId(`answer-${choice}`).disabled = !ready;
}

function answer(choice) {
  if (!ready || answers.length >= total()) return;
  const row = [shown, study.questions[answers.length % perTrial].name, choice, Math.round(performance.now() - since)];
  answers.push(row);
  byId("said").textContent = "";
  store();
  show();
}

function undo() {
  if (!answers.length) return;
  answers.pop();
  store();
  byId("said").textContent = "The last answer was taken back.";
  if (answers.length + 1 === total()) {
    ready = false;
    shown = -1;
  }
  show();
}

// Both media are zoomed, moved and played together.

function setZoom(value, point = [50, 50]) {
  zoom = value;
  origin = point.map((percent) => Math.min(100, Math.max(0, percent)));
  const style = byId("pair").style;
  style.setProperty("--zoom", zoom);
  style.setProperty("--x", `${origin[0]}%`);
  style.setProperty("--y", `${origin[1]}%`);
  byId("zoom").firstChild.textContent = `Zoom ${zoom}× `;
}

function nextZoom(point) {
  setZoom(ZOOMS[(ZOOMS.indexOf(zoom) + 1) % ZOOMS.length], point);
}

function pointIn(box, event) {
  const area = box.getBoundingClientRect();
  return [(100 * (event.clientX - area.left)) / area.width, (100 * (event.clientY - area.top)) / area.height];
}

function tick(now) {
  if (playing && ready) clock += now - last;
  last = now;
  if (rater && shown >= 0) {
    const files = plan()[shown].slice(1);
    ["left", "right"].forEach((side, number) => {
      const medium = study.media[files[number]];
      const frame = Math.floor(clock / study.milliseconds) % medium.frames;
      byId(side).style.setProperty("--column", frame % medium.columns);
      byId(side).style.setProperty("--row", Math.floor(frame / medium.columns));
    });
  }
  requestAnimationFrame(tick);
}

function play() {
  playing = !playing;
  setPlay();
}

function setPlay() {
  byId("play").firstChild.textContent = playing ? "Pause " : "Play ";
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !rater || event.target.tagName === "SELECT") return;
  const moves = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] };
  if (/^[123]$/.test(event.key) && !event.repeat) answer(CHOICES[event.key - 1]);
  else if ((event.key === "u" || event.key === "Backspace") && !event.repeat) undo();
  else if (event.key === "z") nextZoom(origin);
  else if (event.key === "p") play();
  else if (event.key === "s") save();
  else if (zoom > 1 && moves[event.key]) setZoom(zoom, origin.map((percent, axis) => percent + moves[event.key][axis]));
  else return;
  event.preventDefault();
}

// SHA-256 of an ASCII text as hexadecimal digits (FIPS 180-4). crypto.subtle is missing on pages served by plain http.
function sha256(text) {
  const primes = [];
  for (let number = 2; primes.length < 64; number++) if (primes.every((prime) => number % prime)) primes.push(number);
  const fraction = (value) => ((value - Math.floor(value)) * 4294967296) | 0;
  const constants = primes.map((prime) => fraction(Math.cbrt(prime)));
  const state = primes.slice(0, 8).map((prime) => fraction(Math.sqrt(prime)));
  const turn = (word, bits) => (word >>> bits) | (word << (32 - bits));
  const words = new Int32Array((((text.length + 8) >> 6) + 1) * 16);
  for (let place = 0; place < text.length; place++) words[place >> 2] |= text.charCodeAt(place) << (24 - 8 * (place % 4));
  words[text.length >> 2] |= 0x80 << (24 - 8 * (text.length % 4));
  words[words.length - 2] = Math.floor(text.length / 536870912);
  words[words.length - 1] = text.length << 3;
  for (let block = 0; block < words.length; block += 16) {
    const w = Array.from(words.subarray(block, block + 16));
    let [a, b, c, d, e, f, g, h] = state;
    for (let round = 0; round < 64; round++) {
      if (round > 15) {
        const x = w[round - 15];
        const y = w[round - 2];
        const first = turn(x, 7) ^ turn(x, 18) ^ (x >>> 3);
        const second = turn(y, 17) ^ turn(y, 19) ^ (y >>> 10);
        w[round] = (w[round - 16] + first + w[round - 7] + second) | 0;
      }
      const one = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + constants[round] + w[round];
      const two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, place) => (state[place] = (state[place] + word) | 0));
  }
  return state.map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
}

for (const name of Object.keys(study.raters)) byId("rater").append(new Option(name, name));
byId("start").addEventListener("click", () => start(byId("rater").value));
for (const choice of CHOICES) byId(`answer-${choice}`).addEventListener("click", () => answer(choice));
byId("undo").addEventListener("click", undo);
byId("save").addEventListener("click", save);
byId("play").addEventListener("click", play);
byId("zoom").addEventListener("click", () => nextZoom(origin));
for (const side of ["left", "right"]) {
  byId(side).addEventListener("click", (event) => nextZoom(pointIn(byId(side), event)));
  byId(side).addEventListener("mousemove", (event) => zoom > 1 && setZoom(zoom, pointIn(byId(side), event)));
}
document.addEventListener("keydown", key);
setPlay();
requestAnimationFrame(tick);
