"""A switch in user space between network namespaces, with faults: loss, delay, jitter and partitions of any pair of ports.

It needs no kernel modules beyond veth. Ports are veth pairs whose inner end is in a namespace; frames are taken from and given to the outer ends through
packet sockets. Faults are set from outside, one JSON object a line on standard input:

    {"ports": ["a0", "e1"], "loss": 0.05, "delay_ms": 50, "jitter_ms": 10}     both directions between two ports
    {"loss": 0.01}                                                            all pairs

`loss: 1` is a partition. Run as root.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time

SIOCETHTOOL = 0x8946
# ETHTOOL_STXCSUM, ETHTOOL_SGSO, ETHTOOL_STSO, ETHTOOL_SGRO: frames shall look as on a wire.
OFFLOADS = [0x17, 0x24, 0x1F, 0x2C]


def run(*command):
    subprocess.run(command, check=True)


def plain_frames(interface):
    """Switches off what lets the kernel hand over frames that no wire would carry."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for command in OFFLOADS:
        value = ctypes.create_string_buffer(struct.pack("II", command, 0))
        request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
        try:
            fcntl.ioctl(sock, SIOCETHTOOL, request)
        except OSError as error:
            # Some follow from others and are off already.
            print(f"{interface}: {error}", file=sys.stderr)


def mac(index):
    return f"02:00:00:00:00:{index + 1:02x}"


def address(index):
    return f"10.77.0.{index + 1}"


class Namespaces:
    """Namespaces with one port each, on one network."""

    def __init__(self, names, prefix=None):
        self.names = names
        self.prefix = prefix or f"v{os.getpid() % 10000}"
        for index, name in enumerate(names):
            outer, inner, space = self.outer(name), "eth0", self.space(name)
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
            run("ip", "-n", space, "link", "set", inner, "address", mac(index))
            run("ip", "-n", space, "addr", "add", f"{address(index)}/24", "dev", inner)
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("ip", "-n", space, "link", "set", inner, "up")
            run("ip", "link", "set", outer, "up")
            run("ip", "netns", "exec", space, sys.executable, __file__, "--plain-frames", inner)
            plain_frames(outer)

    def space(self, name):
        return f"{self.prefix}-{name}"

    def outer(self, name):
        return f"{self.prefix}{name}"

    def address(self, name):
        return address(self.names.index(name))

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "link", "del", self.outer(name)], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", self.space(name)], check=False)


class Fault:
    def __init__(self):
        self.loss, self.delay, self.jitter = 0.0, 0.0, 0.0

    def set(self, order):
        self.loss = order.get("loss", 0.0)
        self.delay = order.get("delay_ms", 0.0) / 1000
        self.jitter = order.get("jitter_ms", 0.0) / 1000


def switch(ports):
    """Forwards until standard input ends. `ports` are (name, outer interface)."""
    chance = random.Random(7)
    sockets, by_fd, by_mac = [], {}, {}
    for index, (_, interface) in enumerate(ports):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        sock.bind((interface, 0))
        sock.setblocking(False)
        sockets.append(sock)
        by_fd[sock.fileno()] = index
        by_mac[bytes.fromhex(mac(index).replace(":", ""))] = index
    names = [name for name, _ in ports]
    faults = {(a, b): Fault() for a in range(len(ports)) for b in range(len(ports))}
    late, number = [], 0
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    poll.register(0, select.POLLIN)
    os.set_blocking(0, False)
    print("ready", flush=True)
    orders = b""

    def send(to, frame):
        try:
            sockets[to].send(frame)
        except (BlockingIOError, OSError):
            pass  # a full queue loses frames, as on a wire

    while True:
        now = time.monotonic()
        while late and late[0][0] <= now:
            _, _, to, frame = heapq.heappop(late)
            send(to, frame)
        timeout = max(0, (late[0][0] - now) * 1000) if late else None
        for fd, _ in poll.poll(timeout):
            if fd == 0:
                data = os.read(0, 65536)
                if not data:
                    return
                *lines, orders = (orders + data).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    pair = [names.index(name) for name in order["ports"]] if "ports" in order else None
                    for (a, b), fault in faults.items():
                        if pair is None or {a, b} == set(pair):
                            fault.set(order)
                continue
            source = by_fd[fd]
            for _ in range(64):
                try:
                    frame, origin = sockets[source].recvfrom(65536)
                except BlockingIOError:
                    break
                if origin[2] == socket.PACKET_OUTGOING:
                    continue
                known = by_mac.get(frame[:6])
                for to in [known] if known is not None else [p for p in range(len(ports)) if p != source]:
                    fault = faults[(source, to)]
                    if fault.loss and chance.random() < fault.loss:
                        continue
                    if fault.delay or fault.jitter:
                        number += 1
                        wait = fault.delay + chance.uniform(-1, 1) * fault.jitter
                        heapq.heappush(late, (time.monotonic() + max(0, wait), number, to, frame))
                    else:
                        send(to, frame)


class Switch:
    """A running switch between namespaces."""

    def __init__(self, spaces):
        ports = [f"{name}={spaces.outer(name)}" for name in spaces.names]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--switch", *ports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline().strip() == "ready"

    def set(self, ports=None, **fault):
        order = dict(fault, ports=ports) if ports else fault
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=10)


if __name__ == "__main__":
    if sys.argv[1] == "--plain-frames":
        plain_frames(sys.argv[2])
    elif sys.argv[1] == "--switch":
        switch([tuple(port.split("=")) for port in sys.argv[2:]])
    else:
        sys.exit(__doc__)
