// Markdown of an answer as elements. Answers are untrusted: all text enters the page as text, links lead to http and
// https only, and nothing is loaded. Nesting is bounded, and a text of n characters takes about n steps.

const DEEPEST = 6; // lists and quotes in each other, and emphasis in emphasis; deeper marks are shown as they are
const FENCE = /^[ \t]*(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:_[ \t]*){3,}|(?:\*[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^[ \t]*([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const MARK = /\\[!-/:-@[-`{-~]|`+|\*+|_+|\[|https?:\/\//g; // may begin something other than plain text
const LINK = /\[([^[\]]{1,500})\]\((https?:\/\/[^\s()]{1,2000}(?:\([^\s()]{0,500}\))?[^\s()]{0,2000})\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`]*[^\s<>"`.,;:!?'()[\]{}*_~]/y;

const begun = new WeakMap(); // element -> offset in its text where its last block begins

// Shows `text` in `place`. A text may only grow from call to call: then the last block alone is made anew, so that the
// cost of a step while streaming does not grow with the answer, and selections above survive.
export function render(place, text) {
  const from = begun.get(place) ?? 0;
  const lines = text.slice(from).split("\n");
  place.lastChild?.remove();
  const last = fill(place, lines, 0);
  begun.set(place, lines.slice(0, last).reduce((offset, line) => offset + line.length + 1, from));
}

function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  return made;
}

// Blocks

// Appends one element for each block of `lines`; returns the line where the last block begins.
function fill(place, lines, depth) {
  let last = 0;
  for (let at = skip(lines, 0); at < lines.length; at = skip(lines, at)) {
    last = at;
    const [node, end] = block(lines, at, depth);
    place.append(node);
    at = end;
  }
  return last;
}

// Each kind of block takes the line where it begins, and returns its element and the line behind it.
function block(lines, at, depth) {
  const line = lines[at], heading = line.match(HEADING);
  if (FENCE.test(line)) return code(lines, at);
  if (heading) return [inline(element(`h${Math.min(heading[1].length + 2, 6)}`), heading[2]), at + 1]; // h1, h2: the page's
  if (RULE.test(line)) return [element("hr"), at + 1];
  if (QUOTE.test(line) && depth < DEEPEST) return quote(lines, at, depth);
  if (ITEM.test(line) && depth < DEEPEST) return list(lines, at, depth);
  if (heads(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

function skip(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

const columns = (space) => space.replaceAll("\t", "    ").length;
const indent = (line) => columns(line.match(/^[ \t]*/)[0]);

function dedent(line, most) {
  let at = 0;
  for (let had = 0; had < most && /[ \t]/.test(line[at] ?? ""); at += 1) had += columns(line[at]);
  return line.slice(at);
}

function paragraph(lines, at) {
  const first = at;
  do at += 1; while (at < lines.length && lines[at].trim() && !begins(lines[at]) && !heads(lines, at));
  return [inline(element("p"), lines.slice(first, at).map((line) => line.trim()).join("\n")), at];
}

function code(lines, at) {
  const [, fence, about] = lines[at].match(FENCE), margin = indent(lines[at]);
  const closes = (line) => line.length >= fence.length && /^(?:`+|~+)$/.test(line) && line[0] === fence[0];
  const inside = [];
  for (at += 1; at < lines.length && !closes(lines[at].trim()); at += 1) inside.push(dedent(lines[at], margin));
  const shown = element("code", inside.join("\n"));
  const head = element("div", element("span", about.trim().split(/\s/)[0].slice(0, 30)), copier(shown));
  const whole = element("div", head, element("pre", shown));
  whole.className = "code";
  return [whole, at + 1];
}

function copier(shown) {
  const button = element("button", "Copy code");
  button.type = "button";
  button.onclick = async () => {
    getSelection().selectAllChildren(shown); // for the older command, as plain http may not use the clipboard
    const copied = await navigator.clipboard?.writeText(shown.textContent).then(() => true, () => false);
    button.textContent = copied || document.execCommand("copy") ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy code"; }, 2000);
  };
  return button;
}

function quote(lines, at, depth) {
  const inside = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at += 1) inside.push(lines[at].replace(QUOTE, ""));
  const place = element("blockquote");
  fill(place, inside, depth + 1);
  return [place, at];
}

function list(lines, at, depth) {
  const margin = indent(lines[at]), number = parseInt(lines[at].match(ITEM)[1]);
  const ordered = !Number.isNaN(number), place = element(ordered ? "ol" : "ul");
  if (ordered) place.start = number;
  for (let next = at; next < lines.length; next = skip(lines, at)) { // items may be blank lines apart
    const found = lines[next].match(ITEM);
    if (!found || RULE.test(lines[next]) || indent(lines[next]) > margin || /\d/.test(found[1]) !== ordered) break;
    const inside = [lines[next].slice(found[0].length)];
    at = next + 1;
    while (at < lines.length) {
      const more = skip(lines, at); // behind blank lines, only what is indented belongs to the item
      if (more === lines.length || (indent(lines[more]) <= margin && (more > at || begins(lines[more])))) break;
      inside.push(...lines.slice(at, more), dedent(lines[more], columns(found[0])));
      at = more + 1;
    }
    const item = element("li");
    fill(item, inside, depth + 1);
    place.append(item);
  }
  return [place, at];
}

const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/);

// True if the head of a table begins here: the line below holds dashes, for as many columns.
function heads(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return false;
  const dashes = cells(lines[at + 1]);
  return dashes.every((cell) => /^:?-+:?$/.test(cell.trim())) && dashes.length === cells(lines[at]).length;
}

function table(lines, at) {
  const row = (line, kind) => element("tr", ...cells(line).map((cell) => inline(element(kind), cell.trim())));
  const head = element("thead", row(lines[at], "th")), body = element("tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) body.append(row(lines[at], "td"));
  const wide = element("div", element("table", head, body)); // scrolls by itself, so that the page does not
  wide.className = "table";
  return [wide, at];
}

// Text within a block

function inline(place, text, depth = 0) {
  const missing = new Set(); // marks that nothing closes from here on: not looked for again
  const marks = new RegExp(MARK);
  let shown = 0;
  for (let found; (found = marks.exec(text)); ) {
    const made = span(text, found.index, found[0], depth, missing);
    if (!made) continue;
    place.append(text.slice(shown, found.index), made[0]);
    marks.lastIndex = shown = made[1];
  }
  place.append(text.slice(shown));
  return place;
}

// The element that a mark begins, and the offset behind it; null if it begins nothing.
function span(text, at, mark, depth, missing) {
  if (mark[0] === "\\") return [mark[1], at + 2];
  if (mark === "[") return link(LINK, text, at);
  if (mark[0] === "h") return link(ADDRESS, text, at);
  if (mark[0] !== "`") {
    const inWord = mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[at - 1] ?? "");
    if (mark.length > 3 || depth === DEEPEST || inWord || /^\s?$/.test(text[at + mark.length] ?? "")) return null;
    mark = mark.slice(0, 2); // of three, the third is the first mark inside
  }
  const from = at + mark.length, end = missing.has(mark) ? -1 : closing(text, mark, from);
  if (end < 0) missing.add(mark);
  if (end <= from) return null;
  const inside = text.slice(from, end);
  if (mark[0] === "`") return [element("code", inside.trim() || inside), end + mark.length];
  return [inline(element(mark.length === 1 ? "em" : "strong"), inside, depth + 1), end + mark.length];
}

// Offset of the mark that closes `mark`; -1 if there is none. It does not depend on what was opened.
function closing(text, mark, from) {
  for (let at = from; (at = text.indexOf(mark[0], at)) >= 0; ) {
    const before = text[at - 1];
    let run = 0;
    while (text[at] === mark[0]) [at, run] = [at + 1, run + 1];
    if (mark[0] === "`") {
      if (run === mark.length) return at - run;
    } else if (/\S/.test(before) && (mark.length === 1 ? run % 2 : run > 1)) {
      if (mark[0] === "*" || !/[\p{L}\p{N}]/u.test(text[at] ?? "")) return at - mark.length;
    }
  }
  return -1;
}

function link(pattern, text, at) {
  pattern.lastIndex = at;
  const found = pattern.exec(text);
  if (!found) return null;
  const [whole, label = whole, address = whole] = found;
  const made = element("a", label);
  [made.href, made.target, made.rel] = [address, "_blank", "noopener noreferrer"];
  return [made, at + whole.length];
}
