// Conversation that a browser keeps on this device: the text shown and the name of its session. The model's state stays
// with the server. There is one conversation for each address and model: that of the tab that changed it last.

const MOST = 200_000; // characters of text
const CUT = "Text further up is no longer kept in this browser.";

let last; // the conversation as this tab has read or written it: a tab that changes nothing overwrites no other's

export const place = (model) => `conversation ${location.pathname} ${model}`;

// `log`: [[kind, text], …], shortened from its beginning.
export function keep(model, { log, ...more }) {
  const recent = [];
  let room = MOST;
  for (const [kind, text] of log.toReversed()) {
    recent.unshift([kind, text.slice(-room)]);
    room -= text.length;
    if (room > 0) continue;
    if (recent.length < log.length || room < 0) recent.unshift(["note", CUT]);
    break;
  }
  const text = JSON.stringify({ log: recent, ...more });
  if (text === last) return;
  try {
    localStorage.setItem(place(model), text);
    last = text;
  } catch { /* the browser allows no storage, or it is full: the conversation ends with the tab */ }
}

// The conversation, or null.
export function recall(model) {
  try {
    last = localStorage.getItem(place(model));
    return JSON.parse(last);
  } catch {
    return null;
  }
}

export function drop(model) {
  localStorage.removeItem(place(model));
}
