
// Attention workers on the left, expert workers on the right, and the ways between them.

/** Above so many ways, lines say nothing any more. */
const LINKS_MAX = 256;

/** Expert workers whose hops fit beside each other. */
const HOP_COLUMNS_MAX = 6;

const hopTable = ({ attention, expert }, hop) => {
  const head = el('tr', {}, el('th', { scope: 'col' }, 'hop, P50 / P99'), ...expert.map((to) => el('th', { scope: 'col' }, to.worker)));
  const rows = attention.map((from) => el('tr', {}, el('th', { scope: 'row' }, from.worker),
    ...expert.map((to) => el('td', {}, hop(from, to).map(time).join(' / ')))));
  return el('table', {}, el('thead', {}, head), el('tbody', {}, ...rows));
};

/** What a worker does, in a word, and how good that is. */
const standing = (worker) => {
  if (!worker.present) return ['lost', 'bad'];
  if (worker.leaving) return worker.safe_to_stop ? ['drained', 'warn'] : ['draining', 'warn'];
  if (worker.since_epoch == null) return worker.startup_s.loaded == null ? ['loading', 'warn'] : ['sits by', 'warn'];
  if (worker.waits == null) return ['silent', 'warn'];
  return ['alive', 'good'];
};

const showTopology = (state) => {
  const side = (role) => state.workers.filter((worker) => worker.worker.startsWith(role));
  const sides = { attention: side('attention-'), expert: side('expert-') };
  const rows = Math.max(sides.attention.length, sides.expert.length, 1);
  const pitch = rows > 16 ? 30 : 54, high = pitch - 10;
  const width = 560, height = rows * pitch + 4, wide = 178;
  const at = (list, index) => 2 + pitch / 2 + ((index + 0.5) * rows * pitch) / list.length - pitch / 2;
  const root = svg('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': 'Workers and the ways between them' });

  const bytes = sides.expert.map((worker) => rate('volley_m2n_bytes_total', { direction: 'dispatch', peer: worker.worker }));
  const most = Math.max(...bytes.filter(known), 1);
  const hop = (from, to) => {
    const labels = { worker: from.worker, peer: to.worker };
    const value = (name) => sum(latest(), name, labels) || NaN;
    return [value('volley_hop_median_seconds'), value('volley_hop_p99_seconds')];
  };
  const links = sides.attention.length * sides.expert.length;
  if (links <= LINKS_MAX) {
    sides.attention.forEach((from, a) => sides.expert.forEach((to, e) => {
      if (standing(from)[1] === 'bad' || standing(to)[1] === 'bad') return;
      const [middle, tail] = hop(from, to);
      const words = known(middle) ? `${time(middle)}, P99 ${time(tail)}` : 'no hop measured';
      const [y1, y2] = [at(sides.attention, a), at(sides.expert, e)];
      const strong = 1 + 4 * ((bytes[e] || 0) / most);
      const line = svg('line', { class: 'link', x1: wide, y1, x2: width - wide, y2, 'stroke-width': strong.toFixed(1) });
      line.append(svg('title', {}, `${from.worker} – ${to.worker}: ${words}; dispatch to ${to.worker} ${digits(bytes[e])} bytes/s`));
      root.append(line);
    }));
  }

  const load = bytes.filter(known).reduce((total, one) => total + one, 0);
  const box = (worker, x, y, words, share) => {
    const [word, grade] = standing(worker);
    const node = svg('g', { class: grade, 'data-worker': worker.worker, 'data-state': word });
    node.append(
      svg('rect', { class: 'box', x, y: y - high / 2, width: wide, height: high, rx: 7 }),
      svg('circle', { class: 'dot', cx: x + 13, cy: y - high / 2 + 13, r: 4.5 }),
      svg('text', { x: x + 24, y: y - high / 2 + 17 }, worker.worker),
      svg('text', { class: 'soft', x: x + wide - 9, y: y - high / 2 + 17, 'text-anchor': 'end' }, word),
    );
    if (rows <= 16) {
      node.append(
        svg('text', { class: 'soft', x: x + 24, y: y - high / 2 + 32 }, words),
        svg('rect', { class: 'track', x: x + 1, y: y + high / 2 - 5, width: wide - 2, height: 4 }),
        svg('rect', { class: 'fill', x: x + 1, y: y + high / 2 - 5, width: Math.max(0, (wide - 2) * Math.min(share || 0, 1)), height: 4 }),
      );
    }
    const waits = (worker.waits ?? []).map((wait) => `waits ${time(wait.seconds)} for ${wait.for.join(', ')} (layer ${wait.layer}, micro-batch ${wait.micro_batch}, step ${wait.step})`);
    const loaded = worker.startup_s.ready ?? worker.startup_s.loaded;
    node.append(svg('title', {}, [`${worker.worker}: ${word}, since epoch ${worker.since_epoch ?? NONE}`, words, worker.address ?? '', loaded == null ? '' : `of use after ${time(loaded)}`, ...waits].filter(Boolean).join('\n')));
    root.append(node);
  };
  sides.attention.forEach((worker, index) => {
    const books = state.attention[index];
    const used = books ? 1 - books.free_blocks / books.kv_blocks : NaN;
    box(worker, 1, at(sides.attention, index), books ? `${plural(books.sequences, 'sequence')} · KV ${percent(used)}` : '', used);
  });
  sides.expert.forEach((worker, index) => {
    const share = load > 0 ? bytes[index] / load : NaN;
    box(worker, width - wide - 1, at(sides.expert, index), worker.address ? '' : known(share) ? `${percent(share)} of rows' bytes` : 'no rows of late', share);
  });
  const measured = sides.attention.flatMap((from) => sides.expert.map((to) => hop(from, to)[0])).some(known);
  $('topology').replaceChildren(root, ...(measured && sides.expert.length <= HOP_COLUMNS_MAX ? [hopTable(sides, hop)] : []));

  const hops = (latest()?.series.get('volley_hop_p99_seconds') ?? []).filter((one) => one.value > 0);
  const slowest = hops.sort((a, b) => b.value - a.value)[0];
  const apart = state.workers.some((worker) => worker.address);
  $('topology-words').textContent = [
    `Epoch ${state.epoch}`,
    state.scheduler ? `planned by ${state.scheduler}` : "planned by the controller's own scheduler",
    ...(state.standby.length ? [`standing by: ${state.standby.join(', ')}`] : []),
    slowest ? `slowest hop ${slowest.labels.worker} – ${slowest.labels.peer}: P99 ${time(slowest.value)}`
      : apart ? "hops are in the metrics of each worker's own process" : 'hops show after ten seconds of traffic',
  ].join(' · ') + '.';
};
