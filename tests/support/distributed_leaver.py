"""Process 0 asks the others for something, where process 1 has nothing more to do, or does something else (--stay)."""

import argparse
import time

import jaxmoe.distributed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--stay", action="store_true")
    args = parser.parse_args()
    jaxmoe.distributed.initialize(args.coordinator, args.num_processes, args.process_id, failure_timeout=2)
    print("joined", flush=True)
    if args.process_id == 0:
        jaxmoe.distributed.check_same({"inputs": 1})
    elif args.stay:
        time.sleep(300)


if __name__ == "__main__":
    main()
