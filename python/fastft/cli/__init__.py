"""The command line: one file per command.

Words come in (`words.check` holds them against the command's signature, before anything runs), Python Fire binds them,
the command function builds a `Job`, and `fastft.__main__` runs it. `table` knows which command lives where.
"""
