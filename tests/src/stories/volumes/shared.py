"""Containers that share a directory: `serve DIR` creates sockets, pipes, locks and mappings in it,
`check DIR TAG` uses them from another container, `read DIR` from one with a read-only mount."""

import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading

PAGE = 4096
IN_CREATE, IN_MOVED_TO, IN_MODIFY, IN_CLOSE_WRITE = 0x100, 0x80, 0x2, 0x8


def path(name):
    return os.path.join(sys.argv[2], name)


def ofd(file, kind):
    """Tries an open file description lock on the whole file."""
    lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)


LOCKS = {
    "flock": lambda file: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "posix": lambda file: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "ofd": lambda file: ofd(file, fcntl.F_WRLCK),
}


def identity(name):
    found = os.stat(path(name))
    return [found.st_dev, found.st_ino]


class Server:
    def __init__(self):
        os.umask(0)
        self.events, self.messages = [], []
        self.open = {name: open(path("lock-" + name), "w+b") for name in LOCKS}
        for name, lock in LOCKS.items():
            lock(self.open[name])
        with open(path("mapped"), "w+b") as file:
            file.write(b"\0" * 4 * PAGE)
            file.flush()
            self.map = mmap.mmap(file.fileno(), 4 * PAGE)
        self.map[:6] = b"server"
        with open(path("held"), "w") as file:
            file.write("held by the server")
        self.held = open(path("held"))
        os.mkfifo(path("pipe"))
        self.spawn(self.watch)
        self.spawn(self.pipe)
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams.bind(path("datagrams"))
        self.spawn(self.receive)
        # Bound a second time with the same name.
        socket.socket(socket.AF_UNIX).bind(path("socket"))
        os.unlink(path("socket"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path("socket"))
        self.listener.listen(8)

    def spawn(self, target):
        threading.Thread(target=target, daemon=True).start()

    def watch(self):
        libc = ctypes.CDLL(None, use_errno=True)
        watch = libc.inotify_init()
        wanted = IN_CREATE | IN_MOVED_TO | IN_CLOSE_WRITE
        assert libc.inotify_add_watch(watch, os.fsencode(sys.argv[2]), wanted) >= 0
        while True:
            data, at = os.read(watch, 65536), 0
            while at < len(data):
                _, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                self.events.append([name, mask])
                at += 16 + length

    def pipe(self):
        while True:
            with open(path("pipe")) as pipe:
                self.messages += pipe.read().split()

    def receive(self):
        while True:
            self.messages.append(self.datagrams.recv(100).decode())

    def answer(self, words, uid):
        if words[0] == "who":
            return uid
        if words[0] == "identity":
            return identity(words[1])
        if words[0] == "mapped":
            return self.map[int(words[1]) :][: int(words[2])].decode()
        if words[0] == "poke":
            self.map[2 * PAGE : 2 * PAGE + len(words[1])] = words[1].encode()
            return True
        if words[0] == "held":
            self.held.seek(0)
            return [self.held.read(), os.path.exists(path("held")), os.listdir(sys.argv[2])]
        if words[0] == "messages":
            return self.messages
        if words[0] == "events":
            return [mask for name, mask in self.events if name == words[1]]

    def run(self):
        print("ready", flush=True)
        while True:
            client, _ = self.listener.accept()
            with client:
                _, uid, _ = struct.unpack("3i", client.getsockopt(1, 17, 12))
                words = client.recv(1000).decode().split()
                client.sendall(json.dumps(self.answer(words, uid)).encode())


def call(*words):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path("socket"))
        client.sendall(" ".join(map(str, words)).encode())
        return json.loads(client.makefile().read())


def until(what, wanted):
    for _ in range(100):
        if wanted():
            return
        threading.Event().wait(0.05)
    raise AssertionError(what)


def read():
    assert call("who") == os.getuid()
    with open(path("mapped"), "rb") as file:
        with mmap.mmap(file.fileno(), 4 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            assert view[:6] == b"server", view[:6]
            call("poke", "fresh")
            assert view[2 * PAGE : 2 * PAGE + 5] == b"fresh", "a write to a mapping is not seen"
    for name in ("socket", "mapped", "pipe", "lock-flock", "."):
        assert identity(name) == call("identity", name), name
    with open(path("lock-flock"), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise AssertionError("a lock that another container holds was taken")


def check(tag):
    read()
    for name, lock in LOCKS.items():
        with open(path("lock-" + name), "r+b") as file:
            try:
                lock(file)
            except OSError:
                continue
            raise AssertionError(f"{name}: a lock that another container holds was taken")
    with open(path("mapped"), "r+b") as file:
        with mmap.mmap(file.fileno(), 4 * PAGE) as view:
            view[PAGE : PAGE + len(tag)] = tag.encode()
            assert call("mapped", PAGE, len(tag)) == tag, "a write to a mapping is not seen"
        # And between a mapping and plain writes.
        file.seek(3 * PAGE)
        file.write(tag.encode())
        file.flush()
        assert call("mapped", 3 * PAGE, len(tag)) == tag, "a write is not seen in a mapping"
    with open(path("pipe"), "w") as pipe:
        pipe.write(f"pipe-{tag} ")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(f"datagram-{tag}".encode(), path("datagrams"))
    until("pipe", lambda: f"pipe-{tag}" in call("messages"))
    until("datagram", lambda: f"datagram-{tag}" in call("messages"))
    with open(path(f"made-{tag}"), "w") as file:
        file.write("x")
    os.rename(path(f"made-{tag}"), path(f"moved-{tag}"))
    until("made", lambda: {IN_CREATE, IN_CLOSE_WRITE} <= set(call("events", f"made-{tag}")))
    until("moved", lambda: IN_MOVED_TO in call("events", f"moved-{tag}"))
    os.rename(path("held"), path("elsewhere"))
    text, there, names = call("held")
    assert (text, there, "elsewhere" in names) == ("held by the server", False, True), names
    os.rename(path("elsewhere"), path("held"))


if sys.argv[1] == "serve":
    Server().run()
elif sys.argv[1] == "read":
    read()
else:
    check(sys.argv[3])
print("passed")
