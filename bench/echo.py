"""A bare ROUTER that echoes: what ZeroMQ alone costs. Runs until killed: echo.py ADDRESS."""

import sys

import zmq


def main() -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(sys.argv[1])
    print("ready", flush=True)
    while True:
        router.send_multipart(router.recv_multipart())


if __name__ == "__main__":
    main()
