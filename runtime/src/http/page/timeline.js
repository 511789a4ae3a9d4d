
// The last steps as they ran: a lane for each worker, and below a row for each micro-batch that says what bound its steps.

const rallyView = { data: null, spans: [], held: false, from: 0, until: 1, whole: 1, lanes: [] };
const GUTTER = 92, TOP = 20;

const PARTS = [
  ['attention', 'attention_us', 'attention'],
  ['experts', 'expert_us', 'expert'],
  ['network', 'network_us', 'network'],
  ['waiting', 'waiting_us', 'waiting'],
  ['skew', 'skew_us', 'skew'],
];

const takeTimeline = (data) => {
  const view = rallyView;
  view.data = data;
  const steps = new Map(data.steps.map((step) => [`${step.step}/${step.micro_batch}`, { ...step, from: Infinity, until: 0 }]));
  let whole = 0;
  view.lanes = data.workers.filter((worker) => worker.spans.length).map((worker) => {
    const spans = worker.spans.map(([what, mb, step, layer, rows, from, took]) => {
      const span = { what, mb, step, layer, rows, from, until: from + took, worker: worker.worker };
      whole = Math.max(whole, span.until);
      const of = steps.get(`${step}/${mb}`);
      if (of) { of.from = Math.min(of.from, from); of.until = Math.max(of.until, span.until); }
      return span;
    });
    return { name: worker.worker, spans };
  });
  const batches = [...new Set(data.steps.map((step) => step.micro_batch))].sort((a, b) => a - b);
  view.rows = batches.map((mb) => ({ mb, steps: [...steps.values()].filter((step) => step.micro_batch === mb && step.until > 0) }));
  const all = view.until - view.from >= view.whole * 0.999;
  view.whole = Math.max(whole, 1);
  // Who has zoomed in keeps the piece that was looked at, as seen from the end.
  if (all) [view.from, view.until] = [0, view.whole];
  drawTimeline();
  tellTimeline();
};

const drawTimeline = () => {
  const view = rallyView;
  const canvas = $('timeline');
  const lane = view.lanes.length > 24 ? 10 : 22;
  const height = TOP + view.lanes.length * (lane + 4) + view.rows.length * 20 + 10;
  const { ctx, width } = surface(canvas, view.data ? Math.max(height, 60) : 60);
  ctx.font = '11px system-ui, "DejaVu Sans", sans-serif';
  ctx.textBaseline = 'middle';
  const ink = colour('ink'), soft = colour('soft'), line = colour('line');
  if (!view.lanes.length) return;
  const scale = (width - GUTTER) / (view.until - view.from);
  const x = (us) => GUTTER + (us - view.from) * scale;

  // The axis: about six round marks.
  const raw = (view.until - view.from) / 6, magnitude = 10 ** Math.floor(Math.log10(raw));
  const tick = [1, 2, 5, 10].find((factor) => factor * magnitude >= raw) * magnitude;
  ctx.fillStyle = soft;
  ctx.strokeStyle = line;
  for (let us = Math.ceil(view.from / tick) * tick; us <= view.until; us += tick) {
    ctx.beginPath(); ctx.moveTo(x(us), TOP - 4); ctx.lineTo(x(us), height); ctx.stroke();
    ctx.textAlign = 'left';
    ctx.fillText(us === 0 ? '0' : time(us / 1e6), x(us) + 3, 8);
  }
  const name = (text, y) => {
    ctx.textAlign = 'left';
    ctx.fillStyle = ink;
    ctx.fillText(text, 0, y);
  };
  const palette = new Map();
  const hue = (mb) => palette.get(mb) ?? palette.set(mb, ofMicroBatch(mb)).get(mb);
  let y = TOP;
  for (const { name: worker, spans } of view.lanes) {
    if (lane > 12) name(worker, y + lane / 2);
    ctx.fillStyle = line;
    ctx.globalAlpha = 0.35;
    ctx.fillRect(GUTTER, y, width - GUTTER, lane);
    for (const span of spans) {
      if (span.until < view.from || span.from > view.until) continue;
      const left = Math.max(x(span.from), GUTTER), right = Math.min(x(span.until), width);
      ctx.globalAlpha = span.what === 'sample' ? 0.45 : 1;
      ctx.fillStyle = hue(span.mb);
      ctx.fillRect(left, y, Math.max(right - left - (right - left > 3 ? 0.6 : 0), 0.7), lane);
      if (right - left > 26 && lane > 12 && span.what !== 'sample') {
        ctx.globalAlpha = 1;
        ctx.fillStyle = colour('card');
        ctx.textAlign = 'center';
        ctx.fillText(`L${span.layer}`, (left + right) / 2, y + lane / 2 + 0.5);
      }
    }
    ctx.globalAlpha = 1;
    y += lane + 4;
  }
  for (const { mb, steps } of view.rows) {
    name(`mb ${mb}, bound`, y + 9);
    for (const step of steps) {
      if (step.until < view.from || step.from > view.until) continue;
      const left = Math.max(x(step.from), GUTTER), right = Math.min(x(step.until), width);
      ctx.strokeStyle = hue(mb);
      ctx.strokeRect(left + 0.5, y + 2.5, Math.max(right - left - 2, 1), 14);
      const words = step.bound === 'straggler' ? step.straggler : step.bound;
      ctx.fillStyle = soft;
      ctx.textAlign = 'center';
      if (right - left > ctx.measureText(words).width + 6) ctx.fillText(words, (left + right) / 2, y + 9.5);
    }
    y += 20;
  }
};

const tellTimeline = () => {
  const { data, lanes } = rallyView;
  const words = $('timeline-words');
  $('parts').replaceChildren();
  if (!data.recorded && !lanes.length) {
    words.textContent = data.note ?? 'No step has been noted yet: send a message.';
    return;
  }
  const bounds = new Map();
  for (const step of data.steps) {
    const by = step.bound === 'straggler' ? `straggler ${step.straggler}` : step.bound;
    bounds.set(by, (bounds.get(by) ?? 0) + 1);
  }
  const by = [...bounds].sort((a, b) => b[1] - a[1]).map(([name, count]) => `${name} ${count}`);
  const middle = (field) => median(data.steps.map((step) => step[field]));
  words.textContent = `${plural(data.steps.length, 'step')} of ${plural(rallyView.rows.length, 'micro-batch', 'micro-batches')}, median ${time(middle('total_us') / 1e6)} with ${digits(middle('rows'))} rows. `
    + `Most of it went to: ${by.join(', ')}.`;
  // Means, as medians of parts do not add up.
  const total = data.steps.reduce((all, step) => all + step.total_us, 0);
  for (const [name, field, hue] of PARTS) {
    const share = data.steps.reduce((all, step) => all + step[field], 0) / total;
    const part = el('span', {}, share > 0.09 ? `${name} ${percent(share)}` : '');
    part.style.flexGrow = share;
    part.style.background = `var(--${hue})`;
    part.title = `${name}: ${percent(share)} of the steps' time`;
    $('parts').append(part);
  }
};

const zoom = (factor, middle = (rallyView.from + rallyView.until) / 2) => {
  const view = rallyView;
  const wide = Math.min(Math.max((view.until - view.from) * factor, 10), view.whole);
  const share = (middle - view.from) / (view.until - view.from);
  place(middle - share * wide, wide);
};
const place = (from, wide) => {
  const view = rallyView;
  view.from = Math.min(Math.max(from, 0), view.whole - wide);
  view.until = view.from + wide;
  drawTimeline();
};
const hold = (held) => {
  rallyView.held = held;
  $('hold').setAttribute('aria-pressed', String(held));
  $('hold').textContent = held ? 'Go on' : 'Hold';
};

{
  const canvas = $('timeline'), view = rallyView;
  view.rows = [];
  const us = (left) => view.from + ((left - GUTTER) / (canvas.clientWidth - GUTTER)) * (view.until - view.from);
  canvas.addEventListener('wheel', (event) => {
    if (!view.lanes.length || event.offsetX < GUTTER) return;
    event.preventDefault();
    hold(true);
    zoom(event.deltaY < 0 ? 0.8 : 1.25, us(event.offsetX));
  }, { passive: false });
  canvas.addEventListener('pointermove', (event) => {
    if (!(event.buttons & 1) || !view.lanes.length) return;
    hold(true);
    const wide = view.until - view.from;
    place(view.from - (event.movementX * wide) / (canvas.clientWidth - GUTTER), wide);
  });
  canvas.addEventListener('keydown', (event) => {
    const wide = view.until - view.from;
    const act = {
      ArrowLeft: () => place(view.from - wide / 5, wide), ArrowRight: () => place(view.from + wide / 5, wide),
      '+': () => zoom(0.7), '=': () => zoom(0.7), '-': () => zoom(1.4), 0: () => place(0, view.whole),
    }[event.key];
    if (!act || !view.lanes.length) return;
    event.preventDefault();
    hold(true);
    act();
  });
  explain(canvas, (left, top) => {
    const lane = view.lanes.length > 24 ? 10 : 22, t = us(left);
    const index = Math.floor((top - TOP) / (lane + 4));
    if (left < GUTTER || index < 0) return '';
    if (index < view.lanes.length) {
      const near = ((view.until - view.from) / canvas.clientWidth) * 1.5;
      const span = view.lanes[index].spans.find((one) => one.from - near <= t && t <= one.until + near);
      return span && `${span.worker}: ${span.what}, micro-batch ${span.mb}, step ${span.step}, layer ${span.layer}\n${plural(span.rows, 'row')}, ${time((span.until - span.from) / 1e6)}`;
    }
    const row = view.rows[Math.floor((top - TOP - view.lanes.length * (lane + 4)) / 20)];
    const step = row?.steps.find((one) => one.from <= t && t <= one.until);
    if (!step) return '';
    const parts = PARTS.map(([name, field]) => `${name} ${time(step[field] / 1e6)}`);
    const slow = step.straggler ? `\n${step.straggler} kept its side waiting; beyond the mean: ${time(step.straggling_us / 1e6)}` : '';
    return `step ${step.step} of micro-batch ${step.micro_batch}: ${time(step.total_us / 1e6)}, ${plural(step.rows, 'row')}\n${parts.join(', ')}${slow}`;
  });
  $('hold').addEventListener('click', () => {
    hold(!view.held);
    if (!view.held) { place(0, view.whole); wake(); }
  });
  $('steps').addEventListener('change', () => { hold(false); place(0, view.whole); wake(); });
  $('trace').addEventListener('click', async () => {
    try {
      const response = await fetch(`/admin/timeline?format=chrome&steps=${$('steps').value}`, { headers: headers() });
      if (!response.ok) throw new Error(await why(response));
      const link = el('a', { href: URL.createObjectURL(await response.blob()), download: 'volley-trace.json' });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    } catch (error) {
      trouble(`The timeline cannot be had: ${error.message}`);
    }
  });
}
