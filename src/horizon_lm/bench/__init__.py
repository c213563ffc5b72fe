"""One harness for the repository's benchmarks and for `horizon bench`: the same protocol for all systems.

`protocol` says what is run, `figures` how it is counted, `worker` runs a system in a process of its own,
`jobs` starts such processes, in turns where two are compared, and keeps what they found.
"""
