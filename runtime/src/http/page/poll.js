
// Asking the server: a few small requests a second while somebody looks, fewer when it does not answer, none when the page is hidden.

const EVERY_MS = 1000, PATIENCE_MS = 5000, BACK_OFF_MAX_MS = 10_000;
/** Rounds between two requests for what changes slowly. */
const METRICS_ROUNDS = 2, EXPERTS_ROUNDS = 3;
/** Looks at the timeline after the last step. */
const LOOKS_AFTER = 4;

const get = async (path) => {
  const response = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(PATIENCE_MS), cache: 'no-store' });
  if (response.status === 401) {
    if ($('key-form').hidden) askForKey();
    throw new Error(server.key ? 'the API key is not the right one' : 'this server wants an API key');
  }
  if (!response.ok) throw new Error(await why(response));
  return response;
};

const trouble = (words) => {
  $('trouble').hidden = !words;
  $('trouble').textContent = words ?? '';
};

const pill = (word, grade) => {
  $('pill').textContent = word;
  $('pill').className = `pill ${grade}`;
};

/** No number of another time or another server stays on the page. */
const blank = () => {
  document.body.classList.add('stale');
  forget();
  tokenRates.length = 0;
  expertView.history.length = 0;
  rallyView.lanes = [];
  rallyView.rows = [];
  for (const id of ['tiles', 'conditions', 'topology', 'parts']) $(id).replaceChildren();
  for (const id of ['conditions-words', 'latency-words', 'topology-words', 'timeline-words', 'experts-words']) $(id).textContent = '';
  $('latency').tBodies[0].replaceChildren();
  surface($('timeline'), 60);
  surface($('experts'), 40);
};

const seen = { steps: -1, looks: 0, asked: '', round: 0, failures: 0, since: null };

const round = async () => {
  const state = await (await get('/admin/state')).json();
  // Another server than before.
  if (state.steps < seen.steps || (server.model && server.model.id !== state.model.id)) blank();
  // The last spans come a little after their steps, from workers of other processes by two seconds.
  if (state.steps !== seen.steps) seen.looks = LOOKS_AFTER;
  seen.steps = state.steps;
  server.model = state.model;
  const first = !history.length;
  if (first || seen.round % METRICS_ROUNDS === 0) remember(parseMetrics(await (await get('/metrics')).text()));
  if (first || seen.round % EXPERTS_ROUNDS === 0) takeExperts(await (await get('/admin/experts')).json());
  const wanted = $('steps').value;
  if (!rallyView.held && (seen.looks > 0 || seen.asked !== wanted)) {
    seen.looks -= 1;
    takeTimeline(await (await get(`/admin/timeline?steps=${wanted}`)).json());
    seen.asked = wanted;
  }
  document.body.classList.remove('stale');
  const { model } = state;
  document.title = `Volley: ${model.id}`;
  $('model').textContent = model.id;
  const workers = (role) => state.workers.filter((worker) => worker.worker.startsWith(role)).length;
  $('facts').textContent = `${workers('attention-')} attention × ${workers('expert-')} expert workers, ${state.micro_batches} micro-batches; ${model.layers} layers of ${model.experts} experts, top ${model.top_k}; context ${digits(model.context)}`;
  $('chat-hint').hidden = model.chat;
  $('chat-title').firstChild.data = model.chat ? 'Chat ' : 'Complete ';
  if (state.failed) pill('failed', 'bad');
  else if (state.draining) pill('draining', 'warn');
  else if (state.live > 0 && state.since_last_step > 30) pill('stalled', 'bad');
  else pill(state.live > 0 ? 'serving' : 'ready', 'good');
  showTiles(state);
  showConditions(state);
  showLatency();
  showTopology(state);
  trouble(state.failed && `The cluster cannot go on: ${state.failed}`);
};

let alarm = null;
const wake = () => {
  clearTimeout(alarm);
  alarm = setTimeout(turn, 0);
};
let turning = false;
const turn = async () => {
  if (turning || document.hidden) return;
  turning = true;
  let pause = EVERY_MS;
  try {
    await round();
    seen.round += 1;
    seen.failures = 0;
    seen.since = null;
  } catch (error) {
    seen.failures += 1;
    seen.since ??= new Date();
    pause = Math.min(EVERY_MS * 2 ** (seen.failures - 1), BACK_OFF_MAX_MS);
    blank();
    seen.steps = -1;
    pill('no answer', 'bad');
    const reason = error instanceof TypeError || error.name === 'TimeoutError' ? 'the server does not answer' : error.message;
    trouble(`Nothing to show since ${seen.since.toLocaleTimeString()}: ${reason}. Trying again every ${digits(pause / 1000)} s.`);
  }
  turning = false;
  clearTimeout(alarm);
  alarm = setTimeout(turn, pause);
};
document.addEventListener('visibilitychange', wake);
const redraw = () => { drawTimeline(); drawExperts(); };
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
window.addEventListener('resize', redraw);
wake();
