
// Numbers at a glance, latencies, and the paper's three conditions (MegaScale-Infer, section 4.1).

const tokenRates = [];

const spark = (values) => {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, index) => `${((index / Math.max(values.length - 1, 1)) * 100).toFixed(1)},${(21 - (value / most) * 19).toFixed(1)}`);
  return svg('svg', { viewBox: '0 0 100 22', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    svg('polyline', { points: points.join(' '), fill: 'none', stroke: colour('accent'), 'stroke-width': 1.5, 'vector-effect': 'non-scaling-stroke' }));
};

const showTiles = (state) => {
  const tokens = rate('volley_generation_tokens_total');
  if (known(tokens)) {
    tokenRates.push(tokens);
    if (tokenRates.length > 60) tokenRates.shift();
  }
  const seconds = state.since_last_step;
  const tiles = [
    ['tokens/s', digits(tokens), spark(tokenRates)],
    ['prompt tokens/s', digits(rate('volley_prompt_tokens_total'))],
    ['running', String(state.live - state.waiting)],
    ['queue', String(state.waiting)],
    ['KV cache', percent(gauge('volley_kv_cache_usage_ratio'))],
    ['steps/s', digits(rate('volley_steps_total'))],
    ['last step', seconds < 1 ? 'now' : seconds < 120 ? `${seconds.toFixed(0)} s ago` : `${(seconds / 60).toFixed(0)} min ago`],
    ['preempted', digits(gauge('volley_preemptions_total'))],
    ['epoch', String(state.epoch)],
  ];
  $('tiles').replaceChildren(...tiles.map(([name, value, more]) =>
    el('div', { 'data-tile': name }, el('dt', {}, name), el('dd', {}, value), ...(more ? [more] : []))));
};

const LATENCIES = [
  ['first token', 'volley_time_to_first_token_seconds'],
  ['between tokens', 'volley_inter_token_latency_seconds'],
  ['whole request', 'volley_e2e_request_latency_seconds'],
  ['step', 'volley_step_seconds'],
];

const windowSeconds = () => (history.length > 1 ? (latest().at - history[0].at) / 1000 : 0);

const showLatency = () => {
  const rows = LATENCIES.map(([name, metric]) => {
    const { count, values } = quantiles(metric, [0.5, 0.9, 0.99]);
    return el('tr', { 'data-latency': name }, el('th', { scope: 'row' }, name), ...values.map((value) => el('td', {}, time(value))), el('td', {}, digits(count)));
  });
  $('latency').tBodies[0].replaceChildren(...rows);
  $('latency-words').textContent = `Of the last ${windowSeconds().toFixed(0)} s, interpolated within the buckets of /metrics.`;
};

const showConditions = (state) => {
  // Sums over the layers of a step; the network's is of both hops.
  const layers = state.model.layers;
  const attention = mean('volley_attention_seconds') / layers, expert = mean('volley_expert_seconds') / layers;
  const hop = mean('volley_network_seconds') / layers / 2;
  const longer = Math.max(attention, expert), m = state.micro_batches;
  const flying = rallyView.rows.length;
  const ratio = attention / expert, need = 2 * (1 + hop / longer);
  const grade = (good, near) => (!known(longer) ? '' : good ? 'good' : near ? 'warn' : 'bad');
  const lights = [
    [grade(ratio > 0.8 && ratio < 1.25, ratio > 0.5 && ratio < 2), ['(1) T', 'a', ' ≈ T', 'e'], 'both sides take equally long',
      `attention ${time(attention)}, experts ${time(expert)}` + (known(ratio) ? `: ${ratio < 1 ? `experts take ${(1 / ratio).toFixed(1)}` : `attention takes ${ratio.toFixed(1)}`} times as long` : '')],
    [grade(hop < longer * 0.8, hop < longer), ['(2) T', 'c', ' < T', 'f'], 'a hop hides behind the computing',
      `one hop ${time(hop)}, the longer side ${time(longer)}`],
    [grade(m >= need, m >= need * 0.8), ['(3) m T', 'f', ' ≥ 2 (T', 'f', ' + T', 'c', ')'], 'there are enough micro-batches',
      known(need) ? `m is ${m} and has to be ${need.toFixed(2)}` : `m is ${m}`],
  ];
  $('conditions').replaceChildren(...lights.map(([light, formula, meaning, values]) =>
    el('li', { class: light, 'data-light': light || 'unknown' },
      el('span', { class: 'light', role: 'img', 'aria-label': { good: 'holds', warn: 'barely', bad: 'does not hold' }[light] ?? 'not known' }),
      el('span', {}, el('b', {}, ...formula.map((part, index) => (index % 2 ? el('sub', {}, part) : part))), `: ${meaning}`), el('p', { class: 'words' }, values))));
  $('conditions-words').textContent = !known(longer) ? 'No step in the last minute.'
    : `Per layer and micro-batch, means of the last ${windowSeconds().toFixed(0)} s.`
      + (flying && flying < m ? ` Only ${flying} of ${m} micro-batches fly: there is not more work, or it fills no second one.` : '');
};
