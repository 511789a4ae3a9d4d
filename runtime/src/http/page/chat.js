
// Talking to the model, through the same API that every client has.

const server = { key: '', model: null };
try { server.key = sessionStorage.getItem('volley-key') ?? ''; } catch { /* a browser without storage asks again */ }

const headers = () => (server.key ? { Authorization: `Bearer ${server.key}` } : {});

const talk = { turns: [], abort: null };

const say = (who, text) => {
  const node = el('div', { class: `said ${who}` }, text);
  $('talk').append(node);
  $('talk').scrollTop = $('talk').scrollHeight;
  return node;
};

/** The data of each server-sent event of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split('\n');
    rest = lines.pop();
    for (const line of lines) if (line.startsWith('data: ')) yield line.slice(6).trimEnd();
  }
}

const why = async (response) => {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answers ${response.status}`;
};

const ask = async (text) => {
  const chat = server.model.chat;
  say('user', text);
  talk.turns.push({ role: 'user', content: text });
  const answer = say('model', '');
  const speed = el('p', { class: 'speed' });
  $('talk').append(speed);
  talk.abort = new AbortController();
  $('send').hidden = true;
  $('stop').hidden = false;
  const sent = performance.now();
  let first = NaN, last = NaN, pieces = 0, tokens = NaN, finish = '', content = '';
  const tell = (end) => {
    const count = known(tokens) ? tokens : pieces;
    const pace = ((count - 1) * 1000) / (last - first);
    const parts = [`TTFT ${time((first - sent) / 1000)}`, `${digits(pace > 0 ? pace : NaN)} tokens/s`, plural(count, 'token')];
    speed.textContent = [...parts, ...(end ? [end] : [])].join(' · ');
  };
  try {
    const response = await fetch(chat ? '/v1/chat/completions' : '/v1/completions', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', ...headers() },
      signal: talk.abort.signal,
      body: JSON.stringify({
        model: server.model.id,
        ...(chat ? { messages: talk.turns } : { prompt: text }),
        max_tokens: Number($('max-tokens').value) || 200,
        temperature: Number($('temperature').value) || 0,
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (response.status === 401) askForKey();
    if (!response.ok) throw new Error(await why(response));
    for await (const data of events(response.body)) {
      if (data === '[DONE]') break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? '';
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (!piece) continue;
      last = performance.now();
      if (!pieces) first = last;
      pieces += 1;
      content += piece;
      answer.append(piece);
      const log = $('talk');
      if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
      tell();
    }
    tell(finish && `ended by ${finish}`);
  } catch (error) {
    if (error.name === 'AbortError') tell('stopped');
    else {
      say('error', error.message);
      if (!content) talk.turns.pop();
    }
    if (!content) answer.remove();
  } finally {
    if (content) talk.turns.push({ role: 'assistant', content });
    talk.abort = null;
    $('send').hidden = false;
    $('stop').hidden = true;
    $('talk').scrollTop = $('talk').scrollHeight;
  }
};

$('say').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = $('text').value;
  if (!text.trim() || talk.abort || !server.model) return;
  $('text').value = '';
  ask(text);
});
$('text').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('say').requestSubmit();
});
$('stop').addEventListener('click', () => talk.abort?.abort());
$('chat-clear').addEventListener('click', () => {
  talk.abort?.abort();
  talk.turns.length = 0;
  $('talk').replaceChildren();
  $('text').focus();
});

const askForKey = () => {
  $('key-form').hidden = false;
  $('key').focus();
};
const useKey = (key) => {
  server.key = key;
  try { key ? sessionStorage.setItem('volley-key', key) : sessionStorage.removeItem('volley-key'); } catch { /* as above */ }
  $('key').value = '';
  $('key-form').hidden = true;
  wake();
};
$('key-open').addEventListener('click', () => ($('key-form').hidden ? askForKey() : ($('key-form').hidden = true)));
$('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  useKey($('key').value.trim());
});
$('key-forget').addEventListener('click', () => useKey(''));
