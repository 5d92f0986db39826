// Backend of the page: the server that it comes from.

export const answer = fetch.bind(globalThis);
export const ready = async () => {}; // at once
