
// Rows of every expert in every layer: who is hot.

const expertView = { history: [], shown: null, since: '' };

const takeExperts = (load) => {
  const now = performance.now();
  expertView.history.push({ at: now, rows: load.rows });
  while (expertView.history.length > 2 && expertView.history[1].at < now - MINUTE_MS) expertView.history.shift();
  drawExperts();
};

const drawExperts = () => {
  const { history: kept } = expertView;
  if (!kept.length) return;
  const last = kept[kept.length - 1].rows, first = kept[0].rows;
  const minute = $('experts-span').value === 'minute' && kept.length > 1;
  let rows = minute ? last.map((layer, l) => layer.map((value, e) => value - first[l][e])) : last;
  // Dense layers compute no row; they are left out.
  const layers = rows.map((values, layer) => ({ layer, values, sum: values.reduce((a, b) => a + b, 0) })).filter((one) => one.sum > 0);
  expertView.shown = layers;
  const experts = last[0]?.length ?? 0;
  const cell = Math.max(3, Math.min(18, Math.floor(260 / Math.max(layers.length, 1))));
  const gutter = 34;
  const { ctx, width } = surface($('experts'), Math.max(layers.length * cell + 18, 40));
  if (!layers.length) {
    $('experts-words').textContent = minute ? 'No row in the last minute.' : 'No row yet.';
    return;
  }
  const wide = (width - gutter) / experts;
  ctx.font = '10.5px system-ui, "DejaVu Sans", sans-serif';
  ctx.textBaseline = 'middle';
  const [cold, mid, hot, soft] = ['cold', 'mid', 'hot', 'soft'].map(colour);
  layers.forEach(({ layer, values, sum: all }, index) => {
    values.forEach((value, expert) => {
      // Times its fair share; three times and more is as hot as it gets.
      const heat = Math.min((value * experts) / all / 3, 1);
      const paint = (hue, alpha) => { ctx.globalAlpha = alpha; ctx.fillStyle = hue; ctx.fillRect(gutter + expert * wide, index * cell, Math.max(wide - (wide > 4 ? 1 : 0), 0.6), cell - (cell > 5 ? 1 : 0)); };
      paint(cold, 1);
      if (heat < 0.5) paint(mid, heat * 2); else { paint(mid, 1); paint(hot, heat * 2 - 1); }
    });
    ctx.globalAlpha = 1;
    if (cell >= 11 || layer % Math.ceil(11 / cell) === 0) {
      ctx.fillStyle = soft;
      ctx.textAlign = 'right';
      ctx.fillText(`L${layer}`, gutter - 6, index * cell + cell / 2);
    }
  });
  ctx.fillStyle = soft;
  ctx.textAlign = 'left';
  ctx.fillText('expert 0', gutter, layers.length * cell + 9);
  ctx.textAlign = 'right';
  ctx.fillText(`${experts - 1}`, width, layers.length * cell + 9);
  const worst = layers.map(({ layer, values, sum: all }) => {
    const most = Math.max(...values);
    return { layer, expert: values.indexOf(most), times: (most * experts) / all };
  }).sort((a, b) => b.times - a.times);
  const total = layers.reduce((all, one) => all + one.sum, 0);
  $('experts-words').textContent = `${digits(total)} rows${minute ? ' in the last minute' : ' since the start'}. Hottest: expert ${worst[0].expert} of layer ${worst[0].layer} with ${worst[0].times.toFixed(1)} times its fair share; `
    + `the hottest of a layer has ${median(worst.map((one) => one.times)).toFixed(1)} times at the median. Full red is three times.`;
  Object.assign(expertView, { cell, wide, gutter, experts });
};

$('experts-span').addEventListener('change', drawExperts);
explain($('experts'), (left, top) => {
  const { shown, cell, wide, gutter, experts } = expertView;
  const of = shown?.[Math.floor(top / cell)], expert = Math.floor((left - gutter) / wide);
  if (!of || expert < 0 || expert >= experts) return '';
  return `layer ${of.layer}, expert ${expert}: ${plural(of.values[expert], 'row')}\n${((of.values[expert] * experts) / of.sum).toFixed(2)} times its fair share`;
});
