// What pages do beyond their forms: they follow events, and copy what is meant to be copied. Without this file they work as well.

const QUIET_MS = 150;

/** Shows the regions that are marked `data-live` as the server would show them now; what is being typed into stays. */
async function refresh() {
  // A page that answers a form has another address than the one that shows it.
  const answer = await fetch(live.dataset.page ?? location.href, { credentials: "same-origin", redirect: "error" });
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const region of document.querySelectorAll("[data-live]")) {
    const next = fresh.getElementById(region.id);
    if (!next || next.innerHTML === region.dataset.shown || region.contains(document.activeElement)) continue;
    region.dataset.shown = next.innerHTML;
    region.replaceChildren(...next.childNodes);
    makeCopiable(region);
  }
  if (fresh.title) document.title = fresh.title;
}

/** Follows a stream of events; many in a moment make one refresh. */
function follow(address) {
  const source = new EventSource(address);
  let waiting = 0, busy = false, again = false;
  const run = async () => {
    if (busy) { again = true; return; }
    busy = true;
    try { await refresh(); } catch { /* The next event, or the reader, asks again. */ }
    busy = false;
    if (again) { again = false; run(); }
  };
  source.onmessage = () => { clearTimeout(waiting); waiting = setTimeout(run, QUIET_MS); };
  // What the server says of a stream that may not be: it ends, and is not asked for again and again.
  source.addEventListener("error", (event) => { if (event.data) source.close(); });
}

/** Turns what is meant to be copied into buttons that copy it. */
function makeCopiable(root) {
  if (!navigator.clipboard) return;
  for (const text of root.querySelectorAll("code[data-copy]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.id = text.id;
    button.className = text.classList.contains("line") ? "id line" : "id";
    button.textContent = text.textContent;
    button.title = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text.textContent);
      button.title = "Copied";
      said.textContent = "Copied";
      button.dataset.copied = "";
      setTimeout(() => { button.title = "Copy"; said.textContent = ""; delete button.dataset.copied; }, 1500);
    });
    text.replaceWith(button);
  }
}

const said = document.createElement("p");
said.className = "hidden";
said.setAttribute("role", "status");
document.body.append(said);
makeCopiable(document);

const live = document.querySelector("[data-stream]");
if (live) follow(live.dataset.stream);

// Days are those of the reader's own clock, where an address does not say otherwise; and the browser knows the names of all zones.
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
for (const link of document.querySelectorAll("a[data-zoned]")) {
  const address = new URL(link.href);
  if (zone && zone !== "UTC" && !address.searchParams.has("zone")) {
    address.searchParams.set("zone", zone);
    link.href = address;
  }
}
for (const list of document.querySelectorAll("datalist[data-zones]")) {
  list.replaceChildren(...Intl.supportedValuesOf("timeZone").map((name) => new Option(name, name)));
}

// What is open closes with Escape, as people expect of anything that lies over a page.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll("details.ask[open], details.switch[open]")) {
    open.open = false;
    open.querySelector("summary").focus();
  }
});
