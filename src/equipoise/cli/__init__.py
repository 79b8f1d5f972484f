"""The command line: one module a command, tables for people, progress on stderr, a last JSON line for scripts."""
