"""A child that is ready and then misbehaves on its link: `rogue_engine.py MODE --fd N`."""

import signal
import socket
import sys

sys.path.insert(0, str(__import__("pathlib").Path(__file__).parents[1]))

from support.fake_engine import INFO

from engines.process import messages as m
from nodeapi.frames import pack_frame
from nodeapi.messages import TokenDelta

mode, sock = sys.argv[1], socket.socket(fileno=int(sys.argv[3]))
sock.recv(1 << 20)
sock.sendall(pack_frame(m.encode(m.Ready(version=2 if mode == "version" else 1, info=INFO))))
if mode == "silent":
    signal.pause()
while data := sock.recv(1 << 20):
    if b"generate" not in data:
        continue
    if mode == "garbage":
        sock.sendall(pack_frame(b"\xc1\xc1\xc1"))
    elif mode == "huge":
        sock.sendall((1 << 31).to_bytes(4, "little") + b"x" * 100)
    elif mode == "flood":
        sock.sendall(pack_frame(m.encode(m.StreamedDelta(id=1, delta=TokenDelta(token_ids=[1])))) * 400)
    elif mode == "close":
        sock.shutdown(socket.SHUT_RDWR)
        signal.pause()
