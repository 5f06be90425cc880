"""Speed and memory beside what else a user would use; see ``benchmarks.harness``.

A package of its own right: Opacus, one of those compared, installs a package of the same name.
"""
