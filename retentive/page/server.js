// Who answers the page: the server that it is from.

export const answer = fetch.bind(globalThis);
export const ready = async () => {}; // at once
