"""The limit: decode, resize and model in this process, no server. Threads that each do one picture after another.

python -m bench.serve.limit photo.jpg --threads 2 --seconds 10 --log calls.tsv
"""

import argparse
import json
import threading
import time
from pathlib import Path

from bench.serve.model import Classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--log", type=Path, required=True, help="as bench.load's")
    args = parser.parse_args()
    photos = [path.read_bytes() for path in args.photos]
    classify = Classifier()
    tops = [classify(photo)["top"] for photo in photos]
    rows: list[tuple[float, float]] = []
    seconds = {"decode, resize": 0.0, "model": 0.0}
    lock, all_ready = threading.Lock(), threading.Barrier(args.threads)

    def work(i: int) -> None:
        classify(photos[0])  # some models are a thread's own, and made at its first picture
        all_ready.wait()
        begin = time.perf_counter()
        while (start := time.perf_counter()) - begin < args.seconds:
            cpu = time.thread_time()
            pixels = classify.decode(photos[i % len(photos)])
            decoded = time.thread_time()
            classify.decide(classify.run(pixels[None])[0])
            with lock:
                rows.append((start - begin, time.perf_counter() - start))
                seconds["decode, resize"] += decoded - cpu
                seconds["model"] += time.thread_time() - decoded
            i += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(args.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    args.log.write_text("".join(f"{start:.6f}\t{took:.6f}\t200\t0\n" for start, took in rows))
    print(json.dumps({"cpu": seconds, "tops": tops, "process_seconds": time.process_time()}))


if __name__ == "__main__":
    main()
