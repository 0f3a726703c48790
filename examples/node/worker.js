// A worker in Node.js, written from docs/protocol.md:  node worker.js ENDPOINT [PATIENCE]
import { randomBytes } from "node:crypto";
import { readFileSync, readlinkSync } from "node:fs";
import { hostname } from "node:os";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";
import { forTcp } from "./tcp.js";

// The services: put your own here. They get a string (text), a Buffer (bytes) or an object
// (json, msgpack), and may be async. What they throw is told to the caller.
const services = new Map([
  ["square", square],
  ["shout", (data) => String(data).toUpperCase()],
]);

function square(data) {
  const number = Number(data);
  if (!Number.isFinite(number)) throw new TypeError(`not a number: ${data}`);
  return number * number;
}

const codecs = new Map([
  ["", { read: (data) => data, write: (it) => (it instanceof Uint8Array ? it : Buffer.from(String(it))) }],
  ["text", { read: (data) => data.toString(), write: (it) => Buffer.from(String(it)) }],
  ["json", { read: (data) => JSON.parse(data), write: (it) => Buffer.from(JSON.stringify(it)) }],
  ["msgpack", { read: (data) => decode(data), write: (it) => encode(it) }],
]);

async function run([seq, _id, data, codec = "", _shared, _buffers, _segment, name = ""]) {
  const start = performance.now();
  try {
    const { read, write } = codecs.get(codec) ?? {};
    if (!read) throw new TypeError(`this worker does not know the codec ${codec}`);
    const service = services.get(name || services.keys().next().value);
    const answer = await service(read(Buffer.from(data)));
    return [seq, true, write(answer), codec, (performance.now() - start) / 1000];
  } catch (error) {
    return [seq, false, Buffer.from(String(error?.stack ?? error)), "text"];
  }
}

// By this a master on the same host notices at once that this process has ended.
function machine() {
  const parts = [hostname()];
  try {
    parts.push(readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim());
    parts.push(readlinkSync("/proc/self/ns/pid"), readlinkSync("/proc/self/ns/mnt"));
  } catch {} // not Linux
  return parts.join(" ");
}

function fail(reason) {
  console.error(`worker: ${reason}`);
  process.exit(1);
}

const dropped = (error) => console.error(`worker: dropped a message: ${error}`);
let running = Promise.resolve(); // the jobs at hand, even if their master is gone

// Work for one master. `over` becomes "lost" or "left".
class Registration {
  name = randomBytes(16).toString("hex");
  over = new Promise((resolve) => (this.end = resolve));
  greeted = false;
  welcomed = false;
  leaving = false;

  constructor(endpoint, onWelcome) {
    // Sends are given up after a second, since the other side may never come back.
    const options = { routingId: this.name, linger: 0, sendTimeout: 1000, ...forTcp(endpoint) };
    this.onWelcome = onWelcome;
    this.work = new Dealer(options);
    this.control = new Dealer({ ...options, immediate: true }); // queue nothing for nobody
    this.control.events.on("handshake", () => this.greet());
    this.control.events.on("disconnect", () => this.greeted && this.end("lost"));
    this.work.events.on("disconnect", () => this.end("lost"));
    this.hear(this.control);
    this.hear(this.work);
    running.then(() => this.control.closed || this.control.connect(endpoint));
  }

  async hear(socket) {
    for await (const [frame] of socket) {
      try {
        const [name, ...fields] = decode(frame);
        if (/^(Welcome|Refused|Drain|Expelled|Die|Jobs)$/.test(name)) await this[name](...fields);
      } catch (error) {
        dropped(error);
      }
    }
  }

  // Never rejects. A socket of this library takes one send at a time: await it.
  send(socket, ...message) {
    return socket.send(encode(message)).catch(() => this.end("lost"));
  }

  greet() {
    this.greeted = true;
    const about = [this.name, process.pid, hostname(), machine(), null, null, "", [...services.keys()]];
    return this.send(this.control, "Hello", 1, ...about);
  }

  async Welcome(version, address) {
    if (this.welcomed || typeof address !== "string") return;
    if (version !== 1) fail(`the master speaks version ${version} of the protocol`);
    this.onWelcome();
    this.work.connect(address);
    await this.send(this.work, "Ready", this.name);
    this.welcomed = true;
  }

  async Jobs(_confirmed, jobs) {
    if (this.leaving) return; // others will be sent them
    running = (async () => {
      const results = [];
      for (const job of jobs) results.push(await run(job));
      if (results.length && !this.work.closed) await this.send(this.work, "Results", 0, results);
    })().catch(dropped);
    await running;
  }

  Refused = (reason) => fail(`the master refused this worker: ${reason}`);
  Expelled = () => this.end("lost");
  Die = () => process.kill(process.pid, "SIGKILL"); // heard while an async service waits
  Drain = () => void this.leave(); // not awaited: "Die" may follow

  async leave() {
    if (this.leaving) return;
    this.leaving = true;
    await running;
    this.work.linger = 1000;
    if (this.welcomed) await this.send(this.work, "Goodbye");
    this.end("left");
  }
}

const [endpoint, patience = 60] = process.argv.slice(2);
if (!endpoint) fail("usage: node worker.js ENDPOINT [PATIENCE in seconds]");
let registration, giveUp, outcome;
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => registration.leave());
do {
  giveUp ??= setTimeout(() => fail(`no master at ${endpoint} took this worker in time`), 1000 * patience);
  registration = new Registration(endpoint, () => (giveUp = clearTimeout(giveUp)));
  outcome = await registration.over;
  for (const socket of [registration.control, registration.work]) socket.close();
} while (outcome === "lost");
clearTimeout(giveUp);
