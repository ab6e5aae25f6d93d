"use strict";
// Everything from the model is put in place as text; nothing here is ever read as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const floats = text => new Float32Array(bytes(text)), whole = text => new Uint32Array(bytes(text));
const sides = Object.fromEntries(Object.entries(data.sides).map(([name, side]) =>
  [name, {tokens: whole(side.tokens), scores: floats(side.scores)}]));
const sigma = data.sigma && floats(data.sigma), rows = data.rows, pole = data.pole, per = data.poles * pole;
const unit = data.neurons ? "neuron" : "direction";
const coherence = data.coherence && floats(data.coherence);
const untrained = new Set(data.untrained);
const nearest = data.nearest && {rows: whole(data.nearest.rows), cosines: floats(data.nearest.cosines)};
const response = data.response && {r2: floats(data.response.r2), null: floats(data.response.null)};
const snippets = data.snippets && {...data.snippets, texts: whole(data.snippets.texts), place: new Int32Array(bytes(data.snippets.place)), z: floats(data.snippets.z)};

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter(child => child !== null));
  return made;
}
const signed = (value, digits) => (+value.toFixed(digits) < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
// A token as vindex.console.visible spells it: spaces as ␣, and escapes for what is invisible or turns text around.
const NAMED = {" ": "␣", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"};
function escaped(character) {
  const code = character.codePointAt(0), [kind, digits] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
  return NAMED[character] ?? `\\${kind}${code.toString(16).padStart(digits, "0")}`;
}
const shown = token => token.replace(/[\\\p{C}\p{Z}]/gu, escaped);
// Running text, whose spaces and joiners stay.
const prose = text => text.replaceAll("\n", "⏎").replace(/(?![\u200c\u200d])[\p{C}\p{Zl}\p{Zp}]/gu, escaped);
const quoted = name => /^[\w.\/@%+=:,-]+$/.test(name) ? name : "'" + name.replaceAll("'", "'\"'\"'") + "'";

// A row of all R is a layer, an expert where the layer has them, and a rank; and back.
function placeOf(row) {
  let layer = data.layers.length - 1;
  while (data.layers[layer][0] > row) layer--;
  const [first, , features, experts] = data.layers[layer], at = row - first;
  return {row, layer, expert: experts ? Math.floor(at / features) : null, feature: at % features};
}
const nameOf = ({layer, expert, feature}) => `L${layer}${expert === null ? "" : "E" + expert}F${feature}`;
function parse(text) {
  const found = /^#?L(\d+)(?:E(\d+))?(?:F(\d+))?(w?)$/i.exec(text.trim());
  if (!found || !data.layers[found[1]]) return null;
  const layer = +found[1], [first, groups, features, experts] = data.layers[layer];
  const expert = experts ? +(found[2] || 0) : null, writes = !!found[4];
  if (found[2] && (!experts || expert >= groups)) return null;
  if (found[3] === undefined) return {layer, expert};
  return +found[3] < features ? {row: first + (expert || 0) * features + +found[3], layer, expert, feature: +found[3], writes} : null;
}
function fill(id, ...children) {
  $(id).replaceChildren(...children.filter(child => child !== null));
  if ($(id).querySelector(".never")) $(id).append(el("p", {class: "note"}, "In italics: tokens that training never met, told by their embeddings."));
}
const link = (place, end = "") => el("a", {href: "#" + nameOf(place) + end}, nameOf(place));

// A token as text; what training never met is marked.
function tok(at) {
  const title = shown(data.strings[at]);
  return untrained.has(at) ? el("span", {class: "tok never", title: `${title}: training never met this token`}, title) : el("span", {class: "tok", title}, title);
}

// Search: from a token to the places that hold it, made when it is first needed. Tokens are found as they are spelled here.
const bare = spelled => spelled.replace(/^␣(?=.)/, "");
let holders = null;
function index() {
  const count = data.strings.length, names = Object.keys(sides), starts = new Uint32Array(count + 1);
  for (const name of names) for (const token of sides[name].tokens) starts[token + 1]++;
  for (let i = 0; i < count; i++) starts[i + 1] += starts[i];
  const next = starts.slice(), entries = new Uint32Array(starts[count]), per_side = new Uint8Array(starts[count]);
  names.forEach((name, at) => sides[name].tokens.forEach((token, place) => {
    per_side[next[token]] = at; entries[next[token]++] = place;
  }));
  const spelled = data.strings.map(token => bare(shown(token)));
  return {starts, entries, side: per_side, names, spelled, low: spelled.map(token => token.toLowerCase())};
}
const MOST = 120;
function matches(query) {
  holders ??= index();
  const word = bare(query.replaceAll(" ", "␣")), low = word.toLowerCase(), ranks = [[], [], [], []];
  holders.low.forEach((text, at) => {
    const rank = holders.spelled[at] === word ? 0 : text === low ? 1 : text.startsWith(low) ? 2
      : low.length > 2 && text.includes(low) ? 3 : 4;
    if (rank < 4) ranks[rank].push(at);
  });
  return ranks;
}
function search(query) {
  const found = $("found"), hits = $("hits");
  hits.dataset.query = query;
  if (!query.trim()) { found.textContent = ""; hits.replaceChildren(); return; }
  const place = parse(query);
  if (place) {
    found.textContent = place.row === undefined ? "A layer." : `A ${unit}.`;
    hits.replaceChildren(el("li", {}, el("a", {href: "#" + (place.row === undefined ? `L${place.layer}` : nameOf(place))},
      el("b", {}, place.row === undefined ? `L${place.layer}` : nameOf(place)))));
    return;
  }
  const ranks = matches(query), list = [];
  ranks.forEach((tokens, rank) => {
    for (const token of tokens) for (let i = holders.starts[token]; i < holders.starts[token + 1]; i++) {
      const side = holders.names[holders.side[i]], at = holders.entries[i];
      list.push({rank, token, side, row: Math.floor(at / per), place: at % per, score: sides[side].scores[at]});
    }
  });
  list.sort((a, b) => a.rank - b.rank || a.side.localeCompare(b.side) || a.place % pole - b.place % pole || Math.abs(b.score) - Math.abs(a.score));
  const exact = list.filter(hit => hit.rank < 1).length, count = side => list.filter(hit => hit.rank < 1 && hit.side === side).length;
  found.textContent = exact
    ? `${exact} ${exact === 1 ? "pole holds" : "poles hold"} “${bare(query.replaceAll(" ", "␣"))}”: ` + holders.names.map(side => `${count(side)} ${side}`).join(", ")
      + (list.length > exact ? `; then ${list.length - exact} with tokens like it.` : ".")
    : list.length ? `No pole holds exactly that; ${list.length} hold tokens like it.`
    : per ? `No pole of any ${unit} holds that.` : "This vindex keeps no tokens to search; a direction is found as L2F7.";
  hits.replaceChildren(...list.slice(0, MOST).map(hit => el("li", {},
    el("a", {href: "#" + nameOf(placeOf(hit.row)) + (hit.side === "writes" ? "w" : "")},
      el("b", {}, nameOf(placeOf(hit.row))),
      el("span", {class: "note"}, `${hit.side} ${hit.place < pole ? "+" : "−"}${hit.place % pole + 1}`),
      tok(hit.token), el("span", {class: "note"}, signed(hit.score, 2))))),
    ...(list.length > MOST ? [el("li", {class: "note"}, `… and ${list.length - MOST} more: write more of the token.`)] : []));
}

// Cards.
function poleOf(side, row, against, title, z) {
  const from = row * per + (against ? pole : 0), {tokens, scores} = sides[side];
  const items = [...Array(pole).keys()].map(i => [tokens[from + i], scores[from + i]]).filter(([token]) => data.strings[token] !== "");
  const most = Math.max(...items.map(([, score]) => Math.abs(score)), 1e-9);
  return el("div", {class: `pole${against ? " against" : ""} ${side}`},
    el("h4", {}, title, z === null ? null : el("span", {title: "how alike these tokens are, beside those of random directions"}, `coherence z ${signed(z, 1)}`)),
    el("ol", {}, ...items.map(([token, score]) => {
      const bar = el("i");
      bar.style.width = `${Math.max(2, 100 * Math.abs(score) / most)}%`;
      return el("li", {}, tok(token), bar, el("b", {}, signed(score, 2)));
    })));
}
// Places in texts, each with some tokens before it and after it.
function snippetsOf(row, against, title) {
  const {names, tokens, texts, place, z, window: [before, after]} = snippets, kept = place.length / rows / 2, from = (2 * row + against) * kept;
  const said = (text, first, end) => prose([...texts.subarray(text * tokens + Math.max(first, 0), text * tokens + Math.min(end, tokens))]
    .map(token => data.strings[token]).join(""));
  const items = [...Array(kept).keys()].map(i => from + i).filter(i => place[i] >= 0).map(i => {
    const text = Math.floor(place[i] / tokens), at = place[i] % tokens, token = said(text, at, at + 1), space = token.startsWith(" ") && token.trim() ? " " : "";
    return el("li", {}, el("b", {}, signed(z[i], 1)), el("span", {}, said(text, at - before, at).trimStart() + space,
      el("mark", {}, token.trim() ? token.slice(space.length) : "␣"), said(text, at + 1, at + 1 + after), el("small", {}, `${names[text]}, token ${at}`)));
  });
  return el("div", {class: "snippets"}, el("h4", {}, title, el("span", {title: "less its mean over all texts, over its deviation"}, "z of what is read there")),
    items.length ? el("ol", {}, ...items) : el("p", {class: "note"}, "Nowhere."));
}
const figure = (name, value, hint = "") => el("div", {title: hint}, el("dt", {}, name), el("dd", {}, value));
const clusterOf = (side, row) => data.clusters[side].find(([first, last]) => first <= row && row <= last);
function shareOf(side, row) {
  const {layer, expert} = placeOf(row), [first, , features] = data.layers[layer], from = side * rows + first + (expert || 0) * features;
  let all = 0;
  for (let i = 0; i < features; i++) all += sigma[from + i] ** 2;
  return all ? sigma[side * rows + row] ** 2 / all : 0;
}
function clusterWords(side, row) {
  const found = clusterOf(side, row);
  return found ? `F${placeOf(found[0]).feature}–${placeOf(found[1]).feature}` : "alone";
}
function card(place) {
  const {row, layer, expert, feature} = place, z = at => coherence ? coherence[4 * row + at] : null, name = nameOf(place);
  const near = nearest ? [...Array(nearest.rows.length / rows).keys()].map(i => [nearest.rows[row * nearest.rows.length / rows + i], nearest.cosines[row * nearest.rows.length / rows + i]]) : [];
  const option = expert === null ? "" : ` --expert ${expert}`, keyword = expert === null ? "" : `, expert=${expert}`;
  const both = (side, title, [first, second]) => sides[side] ? el("div", {class: "poles"}, poleOf(side, row, false, `${title} +`.trim(), first),
    data.poles > 1 ? poleOf(side, row, true, `${title} −`, second) : null) : null;
  const writes = !sides.writes || data.neurons ? both("writes", "Writes", [null, null]) : el("details", place.writes ? {open: ""} : {},
    el("summary", {}, "The down direction of the same rank: another direction, which this one does not drive"), both("writes", "Writes", [z(2), z(3)]));
  const share = side => figure("share", (100 * shareOf(side, row)).toFixed(1) + " %", "of σ² of the directions kept of this weight");
  fill("card",
    el("header", {}, el("h3", {}, `Layer ${layer}${expert === null ? "" : `, expert ${expert}`}, ${unit} ${feature}`),
      el("span", {class: "ways"}, row ? el("a", {href: "#" + nameOf(placeOf(row - 1)), rel: "prev"}, "previous") : null,
        row < rows - 1 ? el("a", {href: "#" + nameOf(placeOf(row + 1)), rel: "next"}, "next") : null,
        el("a", {href: `#L${layer}`}, `layer ${layer}`), el("a", {href: "#" + name, title: "a permanent link to this card"}, "#" + name))),
    sigma ? el("dl", {class: "figures"},
      figure("gate σ", sigma[row].toPrecision(4)), share(0), figure("gate cluster", clusterWords("gate", row), "directions of nearly equal σ: single ones are arbitrary"),
      figure("down σ", sigma[rows + row].toPrecision(4)), share(1), figure("down cluster", clusterWords("down", row)),
      response ? figure("response R²", response.r2[row].toFixed(3), "of the FFN's output on what this direction reads") : null,
      response ? figure("R² by chance", response.null[row].toFixed(3), "the larger of two nulls: permuted readings, and random directions") : null) : null,
    both("reads", "Reads", [z(0), z(1)]),
    snippets ? el("div", {class: "poles"}, snippetsOf(row, 0, "Reads + most at"), snippetsOf(row, 1, "Reads − most at")) : null,
    response ? el("div", {class: "poles"}, poleOf("response", row, false, "Reading +, the FFN writes", null), poleOf("response", row, true, "Reading −, the FFN writes", null)) : null,
    response && response.r2[row] <= response.null[row] ? el("p", {class: "note"}, "Chance explains this response: its R² is no more than that of its nulls.") : null,
    writes,
    near.length ? el("p", {}, data.neurons ? "Nearest neurons: " : "Nearest gate directions: ", ...near.flatMap(([other, cosine]) => [link(placeOf(other)), ` ${signed(cosine, 2)}  `])) : null,
    ...Object.entries(data.missing).map(([name, why]) => el("p", {class: "note"}, `No ${name}: ${why}.`)),
    el("div", {class: "commands"}, el("code", {}, `vindex feature ${quoted(data.name)} ${layer} ${feature}${option}`),
      el("code", {}, `vindex.open(${JSON.stringify(data.name)}).feature(${layer}, ${feature}${keyword})`)));
}
const pieces = (row, against = 0, count = 5, side = "reads") => el("span", {class: "tokens"}, ...[...Array(Math.min(count, pole)).keys()]
  .map(i => sides[side].tokens[row * per + against * pole + i]).filter(token => data.strings[token] !== "").flatMap(token => [tok(token), " "]));
function table(columns, lines, kind = "") {
  return el("div", {class: "wide"}, el("table", {class: kind, style: `--figures: ${columns.length - 1}`}, el("thead", {}, el("tr", {}, ...columns.map(([name, kind]) => el("th", {class: kind}, name)))),
    ...lines.map(cells => el("tr", {}, ...cells.map((cell, i) => el("td", {class: columns[i][1]}, cell))))));
}
const MOST_LINES = 500;
function layerCard({layer, expert}) {
  const [first, groups, features] = data.layers[layer], from = first + (expert || 0) * features;
  const others = expert === null ? [] : [...Array(groups).keys()].map(e => el("a", {href: `#L${layer}E${e}`}, `E${e}`)).flatMap(a => [a, " "]);
  const columns = [[[unit, ""], row => link(placeOf(row))], sigma && [["σ", "n"], row => sigma[row].toPrecision(3)],
    ...(sides.reads ? [[["reads +", ""], row => pieces(row)], [["reads −", ""], row => pieces(row, 1)]] : sides.writes ? [[["writes", ""], row => pieces(row, 0, 5, "writes")]] : []),
    coherence && [["coherence z", "n"], row => signed(Math.max(coherence[4 * row], coherence[4 * row + 1]), 1)]].filter(Boolean);
  const lines = [...Array(Math.min(features, MOST_LINES)).keys()].map(i => columns.map(([, cell]) => cell(from + i)));
  fill("card", el("header", {}, el("h3", {}, `Layer ${layer}${expert === null ? "" : `, expert ${expert}`}`), el("span", {class: "ways"},
    layer ? el("a", {href: `#L${layer - 1}`, rel: "prev"}, "previous") : null, layer < data.layers.length - 1 ? el("a", {href: `#L${layer + 1}`, rel: "next"}, "next") : null)),
    el("p", {class: "note"}, ...others, features ? "" : "Not in this vindex."),
    columns.length > 1 ? table(columns.map(([head]) => head), lines) : el("p", {}, ...lines.flatMap(([name]) => [name, " "])),
    features > MOST_LINES ? el("p", {class: "note"}, `… and ${features - MOST_LINES} more: search for L${layer}F${MOST_LINES} and on.`) : null);
}
// What to look at first: the poles whose tokens are most alike, but for those of tokens that are alike because training met none of them.
function welcome() {
  if (!coherence) return layerCard(placeOf(0));
  const best = [], met = (row, at) => 2 * sides.reads.tokens.subarray(row * per + at * pole, row * per + (at + 1) * pole).filter(token => untrained.has(token)).length < pole;
  for (let row = 0; row < rows; row++) for (const at of [0, 1]) best.push([coherence[4 * row + at], row, at]);
  const shown = best.filter(([, row, at]) => met(row, at)).sort((a, b) => b[0] - a[0]), left = best.length - shown.length;
  fill("card", el("h3", {}, "Most coherent directions"), el("p", {class: "note"}, "What is read at one pole, by how alike its tokens are beside those of random directions."
    + (left ? ` Left out: ${left} poles of which half the tokens or more were never met in training, told by their embeddings.` : "")),
    table([["pole", ""], ["coherence z", "n"], ["reads", "t"]], shown.slice(0, 12).map(([z, row, at]) => [el("span", {}, link(placeOf(row)), ` ${at ? "−" : "+"}`), signed(z, 1), pieces(row, at, 8)]), "narrow"));
}
function follow(focus) {
  const place = parse(location.hash);
  for (const small of document.querySelectorAll(".small")) small.removeAttribute("aria-current");
  if (!place) return false;
  (place.row === undefined ? layerCard : card)(place);
  document.querySelectorAll(".small")[place.layer].setAttribute("aria-current", "true");
  if (focus) { $("card").focus({preventScroll: true}); $("card").scrollIntoView({block: "start"}); }
  return true;
}

// Keys.
const links = () => [...$("hits").querySelectorAll("a")];
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const search = $("search"), at = links().indexOf(document.activeElement), typing = document.activeElement.tagName === "INPUT";
  if (event.key === "/" && !typing) { search.focus(); search.select(); event.preventDefault(); }
  else if (event.key === "Escape" && at >= 0) search.focus();
  else if (event.key === "ArrowDown" && (document.activeElement === search || at >= 0)) { links()[at + 1]?.focus(); event.preventDefault(); }
  else if (event.key === "ArrowUp" && at >= 0) { (links()[at - 1] ?? search).focus(); event.preventDefault(); }
  else if ((event.key === "j" || event.key === "k") && !typing) {
    const way = document.querySelector(`#card a[rel=${event.key === "j" ? "next" : "prev"}]`);
    if (way) { location.hash = way.hash; follow(true); }  // at once: the next key may come before the event
  }
});
let waiting = 0;
$("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => search($("search").value), 60); });
$("form").addEventListener("submit", event => { event.preventDefault(); search($("search").value); links()[0]?.click(); });
addEventListener("hashchange", () => { if (!follow(true) && !location.hash) welcome(); });
const slider = $("slider");
function slide() {
  document.querySelectorAll(".traced").forEach((layer, at) => layer.classList.toggle("shown", at === +slider.value));
  $("at").textContent = slider.value;
}
document.documentElement.classList.add("js");
if (slider) { slider.value = slider.max; slider.addEventListener("input", slide); slide(); }
if (!follow(true)) welcome();
