"""A small name server on 127.0.0.1: a dictionary of names, and the ways in which real ones fail."""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading
from collections import Counter

A_RECORD = 1
NO_SUCH_NAME = 3
SERVER_FAILURE = 2


class SmallDns:
    """Answers A questions from `names`: a list of addresses, an error code, or None for no answer at all.

    Names that are not there do not exist. Counts the questions.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str] | int | None] = {}
        self.questions: Counter[str] = Counter()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                question, client = self._socket.recvfrom(4096)
            except OSError:
                return
            answer = self._answer(question)
            if answer:
                self._socket.sendto(answer, client)

    def _answer(self, message: bytes) -> bytes | None:
        labels, position = [], 12
        while length := message[position]:
            labels.append(message[position + 1 : position + 1 + length].decode())
            position += 1 + length
        question = message[12 : position + 5]
        name = ".".join(labels).lower()
        kind = struct.unpack(">H", question[-4:-2])[0]
        found = self.names.get(name, NO_SUCH_NAME)
        if kind == A_RECORD:
            self.questions[name] += 1
        if found is None:
            return None
        code = found if isinstance(found, int) else 0
        addresses = found if isinstance(found, list) and kind == A_RECORD else []
        header = message[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(addresses), 0, 0)
        records = [
            b"\xc0\x0c" + struct.pack(">HHIH", A_RECORD, 1, 60, 4) + ipaddress.IPv4Address(address).packed
            for address in addresses
        ]
        return header + question + b"".join(records)

    def __enter__(self) -> SmallDns:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
