"""Starts the gateway: `MODELS=dog-breeds python -m gateway`."""

import os
import sys

# A large picture's memory goes back to the system once it is decoded, and what is free in one thread serves the others.
# glibc would raise its threshold with the first one and from then on keep such pieces, of 16 MB, for each thread: a
# process of 75 MB held 390 MB after two pictures of 64 megapixels. And it would keep eight arenas for each CPU of the
# machine, each with holes of its own, and for each thread a few pieces of every size, wherever an overload left them
# (docs/speed.md). Python's own lock lets few threads ask for memory at a time. Other allocators read none of this.
MALLOC = {"arena_max": 1, "tcache_count": 0, "mmap_threshold": 4 << 20, "trim_threshold": 4 << 20}
TUNABLES, BEGUN_AGAIN = "GLIBC_TUNABLES", "GATEWAY_BEGUN_AGAIN"

if __name__ == "__main__":
    if BEGUN_AGAIN not in os.environ and sys.executable:  # glibc reads it when a program begins: so this one does, once
        ours = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
        theirs = os.environ.get(TUNABLES)  # which prevail: the last one counts
        changed = {TUNABLES: f"{ours}:{theirs}" if theirs else ours, BEGUN_AGAIN: "1"}
        os.execve(sys.executable, sys.orig_argv, os.environ | changed)
    from gateway.start import main

    main()
