// Files of states in the browser's own database (IndexedDB), by model and name.

const open = new Promise((resolve, reject) => {
  const request = indexedDB.open("retentive", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("states", { keyPath: ["model", "kind", "name"] });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(new Error("The browser keeps no data for this page: it may be a private window."));
});

async function ask(mode, action) {
  const transaction = (await open).transaction("states", mode);
  let request;
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = () => reject(transaction.error);
    request = action(transaction.objectStore("states"));
  }).catch((error) => {
    const full = error?.name === "QuotaExceededError";
    throw new Error(full ? "The browser's storage is full: delete some saved states." : "The browser could not store this.");
  });
}

// Saved states ("saved"), and those of conversations that a reload goes on with ("session"), of one model.
export class Store {
  constructor(model) {
    this.model = model;
  }

  put(kind, name, bytes, tokens) {
    const created = Math.floor(Date.now() / 1000);
    return ask("readwrite", (store) => store.put({ model: this.model, kind, name, bytes, tokens, created }));
  }

  get(kind, name) {
    return ask("readonly", (store) => store.get([this.model, kind, name]));
  }

  delete(kind, name) {
    return ask("readwrite", (store) => store.delete([this.model, kind, name]));
  }

  list(kind) {
    return ask("readonly", (store) => store.getAll(IDBKeyRange.bound([this.model, kind, ""], [this.model, kind, "\uffff"])));
  }
}
