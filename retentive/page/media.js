// Pictures and sound attached to the next message: chosen, dropped, pasted or recorded, and shown until it is sent.
// PNG, JPEG and WebP are sent unchanged, other pictures as PNG, and all sound as WAV of one channel.

const RATE = 16000; // samples a second to send; the server resamples them for its model
const AS_IT_IS = ["image/png", "image/jpeg", "image/webp"];

const held = []; // {part: sent to the server, shown: an element}
let place, failed, kinds;
let adding = Promise.resolve(); // resolves when all chosen files are held

export function setup(element, { media, onerror }) {
  [place, failed, kinds] = [element, onerror, media];
  held.length = 0;
  draw();
}

export const takes = (kind) => Boolean(kinds?.includes(kind));
export const empty = () => !held.length;
export const ready = () => adding;

export function take() {
  const taken = held.splice(0);
  draw();
  return taken;
}

export function restore(items) {
  held.unshift(...items);
  draw();
}

export function add(files) {
  const chosen = [...files]; // copied, since the browser empties its list with the input
  adding = adding.then(() => hold(chosen));
  return adding;
}

async function hold(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    try {
      if (!takes(kind)) throw new Error(`This model accepts no ${kind === "image" ? "pictures" : kind || "such files"}.`);
      held.push(kind === "image" ? await picture(file) : await sound(file));
    } catch (error) {
      failed(error.message);
    }
  }
  draw();
}

export async function record(button) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true }).catch(() => {
    throw new Error("The browser does not allow the microphone.");
  });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = async () => {
    stream.getTracks().forEach((track) => track.stop());
    button.ariaPressed = "false";
    await add([new File(pieces, "recording", { type: "audio/webm" })]);
  };
  recorder.start();
  button.ariaPressed = "true";
  return () => recorder.stop();
}

function draw() {
  place.replaceChildren(...held.map((item) => {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.ariaLabel = `Remove ${item.name}`;
    remove.onclick = () => {
      held.splice(held.indexOf(item), 1);
      draw();
    };
    const figure = document.createElement("figure");
    figure.append(item.shown, remove);
    return figure;
  }));
  place.hidden = !held.length;
}

async function picture(file) {
  const drawn = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} is not a picture that this browser can show.`);
  });
  let url;
  if (AS_IT_IS.includes(file.type)) {
    url = await dataURL(file);
  } else {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [drawn.width, drawn.height];
    canvas.getContext("2d").drawImage(drawn, 0, 0);
    url = canvas.toDataURL("image/png");
  }
  const shown = document.createElement("img");
  [shown.src, shown.alt] = [url, file.name];
  return { part: { type: "image_url", image_url: { url } }, shown, name: file.name };
}

async function sound(file) {
  const raw = await file.arrayBuffer();
  const context = new AudioContext();
  const decoded = await context.decodeAudioData(raw).catch(() => {
    throw new Error(`${file.name} is not a sound that this browser can play.`);
  });
  await context.close();
  const one = new OfflineAudioContext(1, Math.max(Math.ceil(decoded.duration * RATE), 1), RATE);
  const source = new AudioBufferSourceNode(one, { buffer: decoded });
  source.connect(one.destination);
  source.start();
  const wav = encode((await one.startRendering()).getChannelData(0));
  const shown = document.createElement("audio");
  [shown.src, shown.controls, shown.title] = [URL.createObjectURL(wav), true, file.name];
  const data = (await dataURL(wav)).split(",")[1];
  return { part: { type: "input_audio", input_audio: { data, format: "wav" } }, shown, name: file.name };
}

// Encodes a WAV file: a header of 44 bytes, then samples of 16 bits
function encode(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, words) => [...words].forEach((c, n) => view.setUint8(at + n, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  [[16, 16, 4], [20, 1, 2], [22, 1, 2], [24, RATE, 4], [28, 2 * RATE, 4], [32, 2, 2], [34, 16, 2]]
    .forEach(([at, value, size]) => (size === 4 ? view.setUint32(at, value, true) : view.setUint16(at, value, true)));
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, n) => view.setInt16(44 + 2 * n, Math.max(-1, Math.min(x, 1)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

function dataURL(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}
