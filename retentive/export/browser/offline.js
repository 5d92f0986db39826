// Keeps the folder in the browser, so that the page opens without a network. Its address ends in the folder's version.
// What it answers with has the headers of an isolated page, which may have threads whatever server the folder is on.

const VERSION = self.location.search.slice(1);

self.addEventListener("install", (event) => event.waitUntil((async () => {
  const { page, files } = await (await fetch("model.json", { cache: "no-store" })).json();
  const all = ["./", "model.json", ...page, ...Object.keys(files)]; // from the server: the browser may have older ones
  await (await caches.open(VERSION)).addAll(all.map((name) => new Request(name, { cache: "reload" })));
  await self.skipWaiting();
})()));

self.addEventListener("activate", (event) => event.waitUntil((async () => {
  const scope = new URL(self.registration.scope).pathname; // other folders of this host have caches of their own
  for (const name of await caches.keys()) {
    const [first] = await (await caches.open(name)).keys();
    if (name !== VERSION && first && new URL(first.url).pathname === scope) await caches.delete(name);
  }
  await self.clients.claim();
})()));

function isolated(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET" || new URL(event.request.url).origin !== self.location.origin) return;
  event.respondWith((async () => {
    const kept = await (await caches.open(VERSION)).match(event.request, { ignoreSearch: true });
    if (new URL("model.json", self.registration.scope).href === event.request.url) { // which says what there is now
      const now = await fetch(event.request.url, { cache: "no-store" }).catch(() => null);
      return isolated(now?.ok ? now : kept ?? Response.error());
    }
    return isolated(kept ?? await fetch(event.request));
  })());
});
