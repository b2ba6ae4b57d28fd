// What a page does better with a script: it stays fresh, obeys keys, and follows a log. Each of it
// works without, by links and forms.
"use strict";

const main = document.getElementById("main");
const pause = document.getElementById("pause");

// ---------------------------------------------------------------- fresh, without a flicker

const PAUSED = "bgworker paused";

/** Make a node equal to another one, changing only what differs: focus, selection and the place to
 *  which somebody has scrolled stay. What has data-keep belongs to this script. */
function morph(old, fresh) {
  if (old.isEqualNode(fresh) || old.dataset?.keep !== undefined) return;
  if (old.nodeName !== fresh.nodeName || old.nodeType !== Node.ELEMENT_NODE) {
    old.replaceWith(fresh);
    return;
  }
  for (const { name } of [...old.attributes])
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes)
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  let next = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    if (next && child.id && child.id !== next.id) {
      const known = document.getElementById(child.id);
      if (known?.parentNode !== old) {
        old.insertBefore(child, next);
        continue;
      }
      while (next && next !== known) {  // rows leave in the order in which they came
        const gone = next;
        next = next.nextSibling;
        gone.remove();
      }
    }
    const here = next;
    next = next?.nextSibling ?? null;
    if (here) morph(here, child);
    else old.append(child);
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
}

async function refresh() {
  const answer = await fetch(location.href, { cache: "no-store", redirect: "error" });
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (document.body.dataset.sent) return;  // a form or link leads elsewhere already
  document.title = fresh.title;
  morph(document.body, fresh.body);
}

/** Refresh again and again, and take no more than a tenth of the server's time. */
async function keepFresh() {
  for (;;) {
    const seconds = Number(main.dataset.refresh) || 5;
    await sleep(1000 * seconds);
    const isAsked = main.dataset.refresh && !document.hidden && !isPaused() && !isSelecting();
    if (!isAsked) continue;
    const start = performance.now();
    try {
      await refresh();
    } catch {  // the server has ended, or will come back
      pause.textContent = "No answer";
      await sleep(3000);
    }
    show();
    await sleep(9 * (performance.now() - start));
  }
}

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
const isPaused = () => sessionStorage.getItem(PAUSED) === "yes";
const isSelecting = () => String(getSelection()) !== "";

function show() {
  pause.hidden = !main.dataset.refresh;
  const again = document.getElementById("again");  // the link that does it without a script
  if (again) again.hidden = true;
  pause.textContent = isPaused() ? "Resume" : "Pause";
  pause.setAttribute("aria-pressed", isPaused());
}

if (pause) {
  pause.addEventListener("click", () => {
    sessionStorage.setItem(PAUSED, isPaused() ? "no" : "yes");
    show();
    follow();
  });
  show();
  keepFresh();
}

// ---------------------------------------------------------------- keys

const LIST = "bgworker list";
const up = document.querySelector("a[rel=up]");

if (up) up.href = sessionStorage.getItem(LIST) || up.href;
else sessionStorage.setItem(LIST, location.pathname + location.search);

/** Move the focus to the next row, or the one before. Enter then opens its link. */
function step(by) {
  const links = [...main.querySelectorAll("tbody tr")].map((row) => row.querySelector("a"))
    .filter(Boolean);
  const at = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
  const next = links[at < 0 ? (by > 0 ? 0 : links.length - 1) : at + by];
  next?.focus();
  next?.closest("tr").scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input, select, textarea");
  if (event.key === "Escape") {
    if (isTyping || event.target.closest("tr")) event.target.blur();
    else if (up) up.click();
  } else if (isTyping) {
    return;
  } else if (event.key === "/") {
    const search = main.querySelector("input[type=search]");
    search?.focus();
    search?.select();
    if (!search) return;
  } else if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else return;
  event.preventDefault();
});

document.addEventListener("change", (event) => {
  if (event.target.matches(".filter select")) event.target.form.requestSubmit();
});

document.addEventListener("submit", (event) => {
  document.body.dataset.sent = "yes";
  for (const field of event.target.elements) field.disabled = !field.value;  // a short address
});

addEventListener("pageshow", () => {
  delete document.body.dataset.sent;
  for (const field of document.querySelectorAll("form :disabled")) field.disabled = false;
});

// ---------------------------------------------------------------- the live log

const log = document.getElementById("log");
const MOST_LINES = 5000;

let source = null;
let last = null;  // the number of the last line, from which to go on

/** Add what the task says as it says it, and stay at the end while somebody looks there. Nothing
 *  moves while the page is paused; and a page that nobody sees keeps no connection. */
function follow() {
  source?.close();
  source = null;
  if (!log?.dataset.live || document.hidden || isPaused()) return;
  const address = new URL(log.dataset.live, location);
  if (last) address.searchParams.set("after", last);
  source = new EventSource(address);
  source.onmessage = add;
  source.onerror = async ({ target }) => {  // what was refused does not come again by itself
    if (target.readyState !== EventSource.CLOSED) return;
    await sleep(3000);
    if (target === source) follow();
  };
  source.addEventListener("end", () => {
    delete log.dataset.live;
    follow();
    refresh();
  });
}

function add(event) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.querySelector(".nothing")?.remove();
  log.insertAdjacentHTML("beforeend", event.data);
  while (log.childElementCount > MOST_LINES) log.firstElementChild.remove();
  if (isAtEnd) toEnd();
  last = event.lastEventId;
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

if (log) {
  if (log.dataset.end) toEnd();
  follow();
  document.addEventListener("visibilitychange", follow);
  document.querySelector("a[href='#end']")?.addEventListener("click", (event) => {
    event.preventDefault();
    toEnd();
    log.focus();
  });
}
