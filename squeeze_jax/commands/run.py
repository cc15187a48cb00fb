"""What every command shares: the compilation cache, and how an error of the user's input ends."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path


def setup() -> None:
    """Before the first array: the persistent compilation cache (SQUEEZE_JAX_CACHE, by default in
    the user's cache)."""
    import jax

    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "squeeze_jax"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("SQUEEZE_JAX_CACHE", str(default))
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def check_finite(given: object) -> None:
    """Raises InputError where a command's flag is NaN or infinite: no comparison would see it."""
    from squeeze_jax.errors import InputError
    from squeeze_jax.finite import not_finite

    for problem in not_finite(given):
        raise InputError("--" + problem.replace("_", "-"))


def guarded(main: Callable[[], None]) -> int:
    """Runs a command; what its user can mend ends in one sentence and the exit code that `errors`
    names."""
    from squeeze_jax.errors import (
        InputError,
        OutputError,
        Preempted,
        exit_code,
        first_line,
        printable,
    )

    for stream in (sys.stdout, sys.stderr):  # a file's name may be no Unicode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (InputError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        why = first_line(error)  # a library's own word on what it was to read or write
        if error.errno is not None:
            place = f"{error.filename}: " if error.filename is not None else ""
            why = f"{place}{error.strerror}; see to the disk and start again"
        print(f"error: {printable(why)}", file=sys.stderr)
        return exit_code(error)
    except Preempted as notice:
        print(notice, file=sys.stderr)
        return exit_code(notice)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return exit_code(error)
    return 0


def parse_shard(text: str) -> tuple[int, int]:
    """`0/4` as (0, 4). Raises InputError for what is no i/n with 0 ≤ i < n."""
    from squeeze_jax.errors import InputError

    part, slash, parts = text.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts):
        return int(part), int(parts)
    raise InputError(f"--shard {text!r} must be i/n with i below n, such as 0/4")
