"""One process of a crowd that resolves new names: crowd.py REGISTRY PREFIX SECONDS. Prints how many it got."""

import sys
import time

from madsci_registry import RegistryClient


def main() -> None:
    registry, prefix, seconds = sys.argv[1:]
    count = 0
    with RegistryClient(registry) as client:
        client.resolve(f"{prefix}-first", "node", acquire_lock=False)
        print("ready", flush=True)
        sys.stdin.readline()
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            client.resolve(f"{prefix}-{count}", "node", acquire_lock=False)
            count += 1
        print(count, flush=True)


if __name__ == "__main__":
    main()
