
// Making and reading the document. Text of others only ever becomes text nodes.

const $ = (id) => document.getElementById(id);

const put = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const el = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  put(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const ofMicroBatch = (index) => colour(`mb${index % 8}`);

const NONE = '–';
const known = (value) => Number.isFinite(value);

/** Three digits of a number. */
const digits = (value) => {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)} G`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  return size >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toPrecision(3);
};
/** A time given in seconds. */
const time = (seconds) => {
  if (!known(seconds)) return NONE;
  if (seconds >= 1) return `${seconds < 100 ? seconds.toPrecision(3) : seconds.toFixed(0)} s`;
  if (seconds >= 1e-3) return `${(seconds * 1e3).toPrecision(3)} ms`;
  return seconds >= 1e-7 || seconds === 0 ? `${(seconds * 1e6).toPrecision(3)} µs` : '< 0.1 µs';
};
const percent = (share) => (known(share) ? `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %` : NONE);
const plural = (count, word, words = `${word}s`) => `${count} ${count === 1 ? word : words}`;
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : NaN;
};

/** A canvas as wide as its place and so high, in pixels of the screen; drawn on in those of the page. */
const surface = (canvas, height) => {
  const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const ctx = canvas.getContext('2d');
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  return { ctx, width, height };
};

/** Shows `say(x, y)` beside the pointer while it is over `node`; nothing if it says nothing. */
const explain = (node, say) => {
  const tip = $('tip');
  node.addEventListener('pointermove', (event) => {
    const place = node.getBoundingClientRect();
    const words = say(event.clientX - place.left, event.clientY - place.top);
    tip.hidden = !words;
    tip.textContent = words || '';
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 6);
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${Math.min(event.clientY + 16, window.innerHeight - tip.offsetHeight - 6)}px`;
  });
  node.addEventListener('pointerleave', () => { tip.hidden = true; });
};
