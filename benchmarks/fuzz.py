"""Spoilt files by the thousand: each is loaded or refused in one sentence, never a traceback, a
hang or a flood of memory.

    python benchmarks/fuzz.py all                            2,000 mutations of each target
    python benchmarks/fuzz.py records --count 5000 --seed 7
    python benchmarks/fuzz.py records --seed 1234 --count 1  repeats what seed 1234 found

Mutation i is drawn from seed + i alone. A process of its own loads the files, so that a crash of a
library is found, too; seeds that found something are printed with what they found.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

import numpy as np
from fuzz_targets import LINE, TARGETS, Attempt, make_attempt

from squeeze_jax.errors import InputError, OutputError

SECONDS, GROWTH = 10.0, 1_000_000_000
"""What one file may take: seconds, and bytes of memory (a picture of the largest size that is read
takes some 700 MB)."""


class Outcome(NamedTuple):
    """How one attempt ended."""

    seed: int
    ended: str
    """`loaded`, `refused`, or what is wrong."""
    detail: str = ""


def run_one(attempt: Attempt, seed: int) -> Outcome:
    """One mutation; whatever goes wrong is in the outcome."""
    folder = Path(tempfile.mkdtemp())
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        attempt(np.random.default_rng(seed), folder)
        ended = Outcome(seed, "loaded")
    except (InputError, OutputError) as error:
        longest = max(map(len, str(error).splitlines()), default=0)
        ended = Outcome(seed, "refused")
        if longest > LINE:
            ended = Outcome(seed, "FLOOD OF WORDS", f"{longest} characters: {str(error)[:300]}")
    except BaseException as error:  # a library's panic is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        ended = Outcome(seed, f"TRACEBACK {type(error).__name__}", traceback.format_exc())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if (took := time.monotonic() - began) > SECONDS:
        return Outcome(seed, "SLOW", f"{took:.1f} s; {ended.ended}")
    return Outcome(seed, "MEMORY", f"{grown / 1e6:.0f} MB") if grown > GROWTH else ended


def _work(target: str, first: int, last: int, out: Any) -> None:
    attempt = make_attempt(target)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries write a line a damaged file
    for seed in range(first, last):
        out.send(seed)
        out.send(run_one(attempt, seed))


def run_target(target: str, seed: int, count: int) -> list[Outcome]:
    """All mutations of a target, in processes that may crash or hang."""
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        ours, theirs = context.Pipe(duplex=False)
        first, at = seed + len(outcomes), None
        process = context.Process(target=_work, args=(target, first, seed + count, theirs))
        process.start()
        theirs.close()
        wrong = "HANG"
        patience = 120.0  # for the imports
        while len(outcomes) < count and ours.poll(patience):
            try:
                news = ours.recv()
            except EOFError:
                process.join()
                wrong = f"CRASH (exit code {process.exitcode})"
                break
            if isinstance(news, Outcome):
                outcomes.append(news)
            else:
                at, patience = news, 6 * SECONDS
        process.kill()
        process.join()
        if at is None:
            raise RuntimeError(f"{target}: its attempts cannot be made")
        if len(outcomes) < count:
            outcomes.append(Outcome(at, wrong))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=["all", *TARGETS])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    failed = False
    for target in TARGETS if given.target == "all" else [given.target]:
        began = time.monotonic()
        outcomes = run_target(target, given.seed, given.count)
        counts = Counter(outcome.ended for outcome in outcomes)
        said = ", ".join(f"{number} {ended}" for ended, number in counts.most_common())
        print(f"{target}: {said}; {time.monotonic() - began:.0f} s", flush=True)
        for ended in sorted(counts.keys() - {"loaded", "refused"}):
            failed = True
            found = [outcome for outcome in outcomes if outcome.ended == ended]
            print(f"  {ended}: seeds {' '.join(str(one.seed) for one in found[:20])}")
            print("    " + "\n    ".join(found[0].detail.splitlines()[-12:]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
