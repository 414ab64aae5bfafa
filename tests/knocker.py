"""Connects to Unix sockets all the time, as clients that just start do, and counts who is refused (integration tests).

knocker.py PATH...     prints "knocking", then until its stdin ends; then {"accepted": count, "refused": [error, ...]}
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time


def main() -> None:
    """Knock at each path every millisecond or so."""
    accepted, refused = 0, []
    print("knocking", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for path in sys.argv[1:]:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                try:
                    sock.connect(path)
                    accepted += 1
                except OSError as error:
                    refused.append(f"{os.path.basename(path)}: {error}")  # noqa: PTH119
        time.sleep(0.001)
    print(json.dumps({"accepted": accepted, "refused": refused}), flush=True)


if __name__ == "__main__":
    main()
