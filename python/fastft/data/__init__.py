"""From files of rows to samples that a model learns from.

`sources` reads rows, `formats` makes dialogues of them, `template` turns dialogues into tokens and says which are
learned, `packing` joins samples into rows, `prepare` runs all of it and reports, `collate` makes the tensors.
"""
