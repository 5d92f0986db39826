// Keeps the folder in the browser, so that the page opens without a network. Its address ends in the folder's version.

const VERSION = self.location.search.slice(1);

self.addEventListener("install", (event) => event.waitUntil((async () => {
  const { page, files } = await (await fetch("model.json", { cache: "no-store" })).json();
  await (await caches.open(VERSION)).addAll(["./", "model.json", ...page, ...Object.keys(files)]);
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

self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET") return;
  event.respondWith(caches.open(VERSION).then((cache) => cache.match(event.request, { ignoreSearch: true })).then((kept) => kept ?? fetch(event.request)));
});
