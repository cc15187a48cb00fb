"""The command line: parse, call, say where the result is."""
