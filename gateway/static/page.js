// One picture at a time: show it, ask the gateway, show what came back.

const TIMEOUT_MS = 120_000; // a large photograph over a slow line; the gateway's own deadlines are far shorter
const $ = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

let models = [];
let file; // the picture that is shown
let asked; // AbortController of the only question whose answer may still be shown
let countdown;

function show(next) {
  if (!next) return fail("There is no picture in that: choose a file, or copy the picture itself.");
  file = next;
  URL.revokeObjectURL($("picture").src);
  $("picture").className = "loading"; // the last picture would stay until this one is decoded
  $("picture").src = URL.createObjectURL(file);
  $("picture").alt = `The picture: ${file.name}`;
  $("caption").textContent = "";
  ask();
}

async function ask() {
  asked?.abort();
  const mine = (asked = new AbortController());
  const timer = setTimeout(() => mine.abort(), TIMEOUT_MS);
  clear();
  $("main").className = "asked";
  $("answer").append(element("p", "Looking …", "waiting"));
  const report = await send(mine.signal);
  clearTimeout(timer);
  if (mine === asked) report();
}

// Resolves to what shows the outcome; never rejects.
async function send(signal) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return () => fail(`${file.name} cannot be read: it is a folder, or was moved or changed since. Choose it again.`);
  }
  const query = new URLSearchParams({ top_k: 5, ...($("model").value && { model: $("model").value }) });
  const body = new FormData();
  body.append("image", file); // as it is: a picture scaled down here could get another answer
  const start = performance.now();
  try {
    const response = await fetch(`predict?${query}`, { method: "POST", body, signal });
    const result = await response.json().catch(() => ({})); // a proxy's error page is not JSON
    const took = performance.now() - start;
    if (response.ok && result.top) return () => succeed(result, took);
    const sentence = result.detail ?? `The server answered ${response.status} ${response.statusText}, without a reason.`;
    return () => fail(sentence, {
      request: response.headers.get("X-Request-Id"),
      retry: response.status >= 500 || response.status === 429,
      wait: Number(response.headers.get("Retry-After")) || 0,
    });
  } catch {
    const sentence = signal.aborted ? "No answer came in time." : "The server cannot be reached: the connection may be down.";
    return () => fail(sentence, { retry: true });
  }
}

function succeed({ label, known, probability, top, model, version, digest }, took) {
  clear();
  $("answer").append(
    element("h2", known ? label : "Unknown"),
    element("p", known ? `${share(probability)} sure` : `No answer is sure enough: the best guess has ${share(probability)}.`),
  );
  $("top").className = known ? "known" : "";
  for (const guess of top) {
    const item = element("li");
    item.append(element("span", guess.label), element("span", share(guess.probability)));
    item.style.setProperty("--share", guess.probability);
    $("top").append(item);
  }
  const name = element("span", `${model} ${version} (${digest.slice(0, 12)})`);
  name.title = digest;
  $("source").append("Answered by ", name, ` in ${Math.round(took)} ms`);
  if (!models.length) list();
}

function fail(sentence, { request, retry = false, wait = 0 } = {}) {
  clear();
  $("main").className = "asked";
  $("problem").textContent = sentence;
  $("source").textContent = request ? `Request ${request}` : "";
  $("again").hidden = !retry;
  const tick = () => {
    if (wait <= 0) clearInterval(countdown);
    $("again").disabled = wait > 0;
    $("again").textContent = wait > 0 ? `Try again in ${wait--} s` : "Try again";
  };
  tick();
  countdown = setInterval(tick, 1000);
}

function clear() {
  clearInterval(countdown);
  $("again").hidden = true;
  for (const id of ["answer", "top", "problem", "source"]) $(id).replaceChildren();
}

function share(probability) {
  if (probability > 0.999 && probability < 1) return ">99.9%"; // rounding must not make it certain
  return probability < 0.001 ? "<0.1%" : percent.format(probability);
}

function element(name, text = "", className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}

async function list() {
  try {
    ({ models = [] } = await (await fetch("v1/models")).json());
  } catch {
    return; // the gateway has a default model; asked again after the first answer
  }
  $("model").replaceChildren(...models.map(({ name, ready }) => new Option(ready === false ? `${name} (not ready)` : name, name)));
  $("models").hidden = models.length < 2;
  describe();
}

function describe() {
  const classes = models.find(({ name }) => name === $("model").value)?.classes;
  $("known").hidden = !classes;
  if (!classes) return;
  $("known").firstElementChild.textContent = `${$("model").value} knows ${classes.length} answers`;
  $("known").lastElementChild.textContent = classes.join(", ");
}

$("picture").onload = () => {
  $("picture").hidden = false;
  $("picture").className = "";
};
$("picture").onerror = () => {
  $("picture").hidden = true; // HEIC and TIFF, or no picture at all: the server tells
  $("caption").textContent = `${file.name} cannot be shown here`;
};
$("again").onclick = ask;
$("model").onchange = () => {
  describe();
  if (file) ask();
};
for (const id of ["file", "camera"]) {
  $(id).onchange = ({ target }) => {
    if (target.files.length) show(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
}
document.onpaste = ({ clipboardData }) => show(clipboardData.files[0]);
document.ondragover = (event) => {
  event.preventDefault();
  document.body.className = "dragging";
};
document.ondragleave = ({ relatedTarget }) => {
  if (!relatedTarget) document.body.className = "";
};
document.ondrop = (event) => {
  event.preventDefault(); // the browser would leave the page to open the file
  document.body.className = "";
  show(event.dataTransfer.files[0]);
};
list();
