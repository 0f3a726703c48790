// What a socket needs for tcp. Keys are in the folder that $ZMQEXECUTOR_KEYS names, in the files
// master.public and worker.secret.

import { createPrivateKey, createPublicKey } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
const X25519_PREFIX = Buffer.from("302e020100300506032b656e04220420", "hex"); // of a key in PKCS #8

// Options for a socket: heartbeats, which notice that the master's host is gone, and the keys.
export function forTcp(endpoint) {
  if (!endpoint.startsWith("tcp:")) return {};
  const heartbeats = { heartbeatInterval: 10_000, heartbeatTimeout: 60_000 };
  const folder = process.env.ZMQEXECUTOR_KEYS;
  if (!folder) return heartbeats;
  const secret = readKey(join(folder, "worker.secret"));
  return {
    ...heartbeats,
    curveServerKey: readKey(join(folder, "master.public")),
    curvePublicKey: publicKey(secret),
    curveSecretKey: secret,
  };
}

function readKey(path) {
  const key = readFileSync(path, "utf8").split("\n").find((line) => /^[^#].{39}$/.test(line));
  if (!key) throw new Error(`${path} has no key: expected a line of 40 characters`);
  return key;
}

// ZeroMQ for Node.js makes pairs of keys, but does not tell the public one of a secret one.
function publicKey(secret) {
  const bytes = Buffer.alloc(32);
  for (let i = 0; i < 8; i++) {
    const group = [...secret.slice(5 * i, 5 * i + 5)];
    bytes.writeUInt32BE(group.reduce((sum, letter) => 85 * sum + Z85.indexOf(letter), 0), 4 * i);
  }
  const key = createPrivateKey({ key: Buffer.concat([X25519_PREFIX, bytes]), format: "der", type: "pkcs8" });
  const raw = Buffer.from(createPublicKey(key).export({ format: "jwk" }).x, "base64url");
  let text = "";
  for (let i = 0; i < 32; i += 4) {
    let number = raw.readUInt32BE(i);
    let group = "";
    for (let digit = 0; digit < 5; digit++, number = Math.floor(number / 85)) group = Z85[number % 85] + group;
    text += group;
  }
  return text;
}
