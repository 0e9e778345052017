// peer.js server|client PORT CERT KEY CA VERSION NAME SIZE COUNT
// A server echoes; a client sends SIZE bytes, COUNT times, each time resuming the session before, and wants them back. A line a connection.
"use strict";
const fs = require("fs");
const tls = require("tls");
const [role, port, cert, key, ca, version, name, size, count] = process.argv.slice(2);
const options = {
  cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca), minVersion: version, maxVersion: version,
};
const say = (socket, bytes) =>
  console.log(JSON.stringify({ version: socket.getProtocol(), resumed: socket.isSessionReused(), bytes }));

function serve() {
  const server = tls.createServer({ ...options, requestCert: true, rejectUnauthorized: true }, (socket) => {
    let bytes = 0;
    socket.on("data", (data) => (bytes += data.length));
    socket.on("end", () => say(socket, bytes));
    socket.on("error", (error) => console.log(JSON.stringify({ error: error.message })));
    socket.pipe(socket);
  });
  server.on("tlsClientError", (error) => console.log(JSON.stringify({ error: error.message })));
  server.listen(Number(port), "127.0.0.1");
}

function connect(left, session) {
  if (left === 0) return;
  const sent = Buffer.alloc(Number(size), "node ");
  const got = [];
  let latest = session;
  const socket = tls.connect({ ...options, host: "127.0.0.1", port: Number(port), servername: name, session }, () => socket.write(sent));
  socket.on("session", (given) => (latest = given));
  socket.on("data", (data) => {
    got.push(data);
    if (got.reduce((sum, one) => sum + one.length, 0) === sent.length) {
      say(socket, Buffer.concat(got).equals(sent) ? sent.length : -1);
      socket.end();
    }
  });
  socket.on("error", (error) => {
    console.log(JSON.stringify({ error: error.message }));
    process.exit(1);
  });
  socket.on("close", () => connect(left - 1, latest));
}

if (role === "server") serve();
else connect(Number(count), undefined);
