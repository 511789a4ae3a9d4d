
// Prometheus' text read, remembered for a minute, and made into rates and percentiles.

const MINUTE_MS = 60_000;

/** Series by name: [{labels, value}]. */
const parseMetrics = (text) => {
  const series = new Map();
  for (const line of text.split('\n')) {
    const parts = /^([a-z0-9_]+)(?:\{(.*)\})? (\S+)$/i.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, name, value] of (parts[2] ?? '').matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    if (!series.has(parts[1])) series.set(parts[1], []);
    series.get(parts[1]).push({ labels, value: parts[3] === '+Inf' ? Infinity : Number(parts[3]) });
  }
  return series;
};

/** Scrapes of the last minute. */
const history = [];
const remember = (series) => {
  const now = performance.now();
  history.push({ at: now, series });
  while (history.length > 2 && history[1].at < now - MINUTE_MS) history.shift();
};
const forget = () => { history.length = 0; };

const sum = (scrape, name, labels = {}) => {
  const all = scrape?.series.get(name) ?? [];
  const some = all.filter((one) => Object.entries(labels).every(([key, value]) => one.labels[key] === value));
  return some.reduce((total, one) => total + one.value, 0);
};
const latest = () => history[history.length - 1];
const gauge = (name) => (latest()?.series.has(name) ? sum(latest(), name) : NaN);
/** By how much a counter has grown in the window, from `back` scrapes ago or from its beginning. */
const growth = (name, labels = {}, back = Infinity) => {
  if (history.length < 2) return NaN;
  const first = history[Math.max(0, history.length - 1 - back)];
  return sum(latest(), name, labels) - sum(first, name, labels);
};
/** Growth in a second, over the last `back` scrapes. */
const rate = (name, labels = {}, back = 3) => {
  if (history.length < 2) return NaN;
  const first = history[Math.max(0, history.length - 1 - back)];
  return (growth(name, labels, back) * 1000) / (latest().at - first.at);
};
/** Mean of a histogram over the window. */
const mean = (name) => {
  const count = growth(`${name}_count`);
  return count > 0 ? growth(`${name}_sum`) / count : NaN;
};

/** Quantiles of a histogram over the window, interpolated within its buckets. */
const quantiles = (name, shares) => {
  const buckets = (latest()?.series.get(`${name}_bucket`) ?? []).map((one) => ({
    bound: one.labels.le === '+Inf' ? Infinity : Number(one.labels.le),
    count: growth(`${name}_bucket`, { le: one.labels.le }),
  }));
  buckets.sort((a, b) => a.bound - b.bound);
  const count = buckets.length ? buckets[buckets.length - 1].count : 0;
  const at = (share) => {
    if (!(count > 0)) return NaN;
    const wanted = share * count;
    const index = buckets.findIndex((bucket) => bucket.count >= wanted);
    const below = index > 0 ? buckets[index - 1] : { bound: 0, count: 0 };
    const bucket = buckets[index];
    if (bucket.bound === Infinity) return below.bound;
    const within = (wanted - below.count) / (bucket.count - below.count || 1);
    return below.bound + within * (bucket.bound - below.bound);
  };
  return { count, values: shares.map(at) };
};
