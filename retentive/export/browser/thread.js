// A thread of the engine: it works in the memory of worker.js, waits there for more, and answers nobody.

self.onmessage = async ({ data: { module, memory, model, stack, variables } }) => {
  const nothing = new Proxy({}, { get: () => () => { throw new Error("a thread opens no files"); }, has: () => true });
  const { exports } = await WebAssembly.instantiate(module, { env: { memory }, wasi_snapshot_preview1: nothing });
  exports.__stack_pointer.value = stack;
  exports.__wasm_init_tls(variables);
  exports.retentive_join(model);
};
