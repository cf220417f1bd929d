"""The command line of the fuzzer."""

import argparse
import sys
import time
from collections import Counter
from itertools import count, cycle

from tqdm import tqdm

from tests.fuzz.watch import Case, Guard, attempt, child, failures


def main() -> int:
    """Runs it. Returns: the exit status, 1 when an input ended as none may."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Mutated inputs: a good result or one GlimpseError, nothing else."
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long [60]")
    parser.add_argument("--seed", type=int, default=None, help="of all inputs [the time]")
    parser.add_argument("--targets", nargs="*", help="some of them [all]")
    parser.add_argument("--only", help="one input again, TARGET:SEED:NUMBER, in this process")
    parser.add_argument("--most", type=int, default=20, help="stop behind so many failures [20]")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return 0
    from tests.fuzz.targets import TARGETS, prepare

    if args.only:
        target, seed, number = args.only.split(":")
        prepare()
        wrong = attempt(Case(target, int(seed), int(number)), Guard())
        print(wrong or "ended well")
        return int(wrong is not None)
    seed = int(time.time()) if args.seed is None else args.seed
    names = args.targets or list(TARGETS)
    turns = count()
    cases = (Case(name, seed, number) for number, name in ((next(turns) // len(names), name) for name in cycle(names)))
    tried, wrong = Counter(), 0
    with tqdm(unit="input", desc=f"fuzzing, seed {seed}", disable=None) as bar:
        for case, found in failures(cases, time.monotonic() + args.seconds):
            bar.update()
            tried[case.target] += 1
            if found:
                wrong += 1
                tqdm.write(f"{case}\n{found}\n".encode("utf-8", "backslashreplace").decode(), file=sys.stdout)
                if wrong >= args.most:
                    break
    print(f"{sum(tried.values())} inputs ({', '.join(f'{name} {n}' for name, n in tried.items())}), {wrong} ended as none may")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
