"""A hash that says who is held out: the same on every machine and in every version of Python."""


def splitmix64(number: int) -> int:
    """The first output of the splitmix64 generator (Steele, Lea and Flood, 2014) seeded with
    `number` (>= 0): 0 to 2^64 - 1."""
    mask = (1 << 64) - 1
    z = (number + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)
