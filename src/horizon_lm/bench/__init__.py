"""`horizon bench`, and the harness that it shares with the repository's benchmarks.

`protocol` defines a case, `worker` runs one system in its own process, `jobs` starts these processes and
collects their results, `figures` makes a table of them.
"""
